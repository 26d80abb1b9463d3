//! Activations in one pass, of a map or of a map times its gate.

use super::activation::Activation;

/// `y = activation(x)`, in plain Rust.
pub(super) fn activate(activation: Activation, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = activation.of(*x));
}

/// `y = activation(x · gate)`, in plain Rust.
pub(super) fn gated(activation: Activation, x: &[f32], gate: &[f32], y: &mut [f32]) {
    for (y, x) in y.chunks_exact_mut(gate.len()).zip(x.chunks_exact(gate.len())) {
        y.iter_mut().zip(x.iter().zip(gate)).for_each(|(y, (x, gate))| *y = activation.of(x * gate));
    }
}

/// Both, over a processor's vector functions.
macro_rules! kernel {
    ($features:literal) => {
        /// Vectors that are worked on at once: what one waits for is time for the others.
        const ABREAST: usize = 4;

        #[target_feature(enable = $features)]
        pub(super) fn activate_all(activation: Activation, x: &[f32], y: &mut [f32]) {
            let (x, rest) = x.as_chunks().0.as_chunks::<ABREAST>();
            let (y, last) = y.as_chunks_mut().0.as_chunks_mut::<ABREAST>();
            for (y, x) in y.iter_mut().zip(x) {
                let v = activate(activation, [load(&x[0]), load(&x[1]), load(&x[2]), load(&x[3])]);
                (0..ABREAST).for_each(|i| store(&mut y[i], v[i]));
            }
            for (y, x) in last.iter_mut().zip(rest) {
                let [v] = activate(activation, [load(x)]);
                store(y, v);
            }
        }

        #[target_feature(enable = $features)]
        fn activate_in_place(activation: Activation, y: &mut [[f32; LANES]]) {
            let (y, last) = y.as_chunks_mut::<ABREAST>();
            for y in y {
                let v = activate(activation, [load(&y[0]), load(&y[1]), load(&y[2]), load(&y[3])]);
                (0..ABREAST).for_each(|i| store(&mut y[i], v[i]));
            }
            for y in last {
                let [v] = activate(activation, [load(y)]);
                store(y, v);
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn gated(activation: Activation, x: &[f32], gate: &[f32], y: &mut [f32]) {
            let Some(gate) = gate.first_chunk() else { return };
            let gate = load(gate);
            let (x, rest) = x.as_chunks().0.as_chunks::<ABREAST>();
            let (y, last) = y.as_chunks_mut().0.as_chunks_mut::<ABREAST>();
            for (y, x) in y.iter_mut().zip(x) {
                let v =
                    [mul(load(&x[0]), gate), mul(load(&x[1]), gate), mul(load(&x[2]), gate), mul(load(&x[3]), gate)];
                let v = activate(activation, v);
                (0..ABREAST).for_each(|i| store(&mut y[i], v[i]));
            }
            for (y, x) in last.iter_mut().zip(rest) {
                let [v] = activate(activation, [mul(load(x), gate)]);
                store(y, v);
            }
        }
    };
}
pub(super) use kernel;
