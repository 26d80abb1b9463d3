//! Activations in one pass, of a map or of a map times its gate: in its place, or on the way to another.

use super::activation::Activation;

/// `y = activation(y)`, in plain Rust.
pub(super) fn activate(activation: Activation, y: &mut [f32]) {
    y.iter_mut().for_each(|y| *y = activation.of(*y));
}

/// `y = activation(y · gate)`, in plain Rust.
pub(super) fn gated(activation: Activation, gate: &[f32], y: &mut [f32]) {
    for y in y.chunks_exact_mut(gate.len()) {
        y.iter_mut().zip(gate).for_each(|(y, gate)| *y = activation.of(*y * gate));
    }
}

/// All of them, over a processor's vector functions.
macro_rules! kernel {
    ($features:literal) => {
        /// Vectors that are worked on at once: what one waits for is time for the others.
        const ABREAST: usize = 4;

        /// Vectors that are asked for before it is their turn, since maps may come from far.
        const AHEAD: usize = 8 * ABREAST;

        #[target_feature(enable = $features)]
        pub(super) fn activate_all(activation: Activation, y: &mut [f32]) {
            activate_in_place(activation, y.as_chunks_mut().0);
        }

        #[target_feature(enable = $features)]
        fn activate_in_place(activation: Activation, y: &mut [[f32; LANES]]) {
            let place = y.as_mut_ptr();
            // SAFETY: it is read before it is written, vector by vector
            unsafe { pass(activation, place, y.len(), place, |v| v) };
        }

        #[target_feature(enable = $features)]
        pub(super) fn gated(activation: Activation, gate: &[f32], y: &mut [f32]) {
            let Some(gate) = gate.first_chunk() else { return };
            let (gate, y) = (load(gate), y.as_chunks_mut().0);
            let place = y.as_mut_ptr();
            // SAFETY: as above
            unsafe { pass(activation, place, y.len(), place, |v| mul(v, gate)) };
        }

        /// `y = activation(x · gate)`
        #[target_feature(enable = $features)]
        pub(super) fn activate_from(activation: Activation, gate: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
            let (x, y) = (x.as_chunks().0, y.as_chunks_mut().0);
            let count = x.len().min(y.len());
            // SAFETY: so many are there, in both
            match gate.and_then(|gate| gate.first_chunk()) {
                Some(gate) => {
                    let gate = load(gate);
                    unsafe { pass(activation, x.as_ptr(), count, y.as_mut_ptr(), |v| mul(v, gate)) }
                }
                None => unsafe { pass(activation, x.as_ptr(), count, y.as_mut_ptr(), |v| v) },
            }
        }

        /// `y = activation(first(x))`. Which activation it is is asked once, not for every vector.
        ///
        /// # Safety
        /// There are so many of `x` and of `y`, which may be the same.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn pass(
            activation: Activation,
            x: *const [f32; LANES],
            count: usize,
            y: *mut [f32; LANES],
            first: impl Fn(Vector) -> Vector,
        ) {
            // SAFETY: the caller's
            unsafe {
                match activation {
                    Activation::None => vectors(x, count, y, |x| x.map(&first), |[x]| [first(x)]),
                    Activation::Relu => vectors(x, count, y, |x| relu(x.map(&first)), |[x]| relu([first(x)])),
                    Activation::Silu => vectors(x, count, y, |x| silu(x.map(&first)), |[x]| silu([first(x)])),
                    Activation::Sigmoid => vectors(x, count, y, |x| sigmoid(x.map(&first)), |[x]| sigmoid([first(x)])),
                    Activation::Gelu => vectors(x, count, y, |x| gelu(x.map(&first)), |[x]| gelu([first(x)])),
                }
            }
        }

        /// `y = of(x)`: several vectors at once, and the last ones alone.
        ///
        /// # Safety
        /// As above.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn vectors(
            x: *const [f32; LANES],
            count: usize,
            y: *mut [f32; LANES],
            several: impl Fn([Vector; ABREAST]) -> [Vector; ABREAST],
            one: impl Fn([Vector; 1]) -> [Vector; 1],
        ) {
            let mut i = 0;
            while i + ABREAST <= count {
                // SAFETY: the caller's
                unsafe {
                    (0..ABREAST).for_each(|k| prefetch(x.wrapping_add(i + AHEAD + k).cast()));
                    let v = several([0, 1, 2, 3].map(|k| load(&*x.add(i + k))));
                    (0..ABREAST).for_each(|k| store(&mut *y.add(i + k), v[k]));
                }
                i += ABREAST;
            }
            while i < count {
                // SAFETY: the caller's
                unsafe {
                    let [v] = one([load(&*x.add(i))]);
                    store(&mut *y.add(i), v);
                }
                i += 1;
            }
        }
    };
}
pub(super) use kernel;
