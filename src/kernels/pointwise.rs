//! Activations in one pass, of a map or of a map times its gate, in its place.

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

/// Both, over a processor's vector functions.
macro_rules! kernel {
    ($features:literal) => {
        /// Vectors that are worked on at once: what one waits for is time for the others.
        const ABREAST: usize = 4;

        #[target_feature(enable = $features)]
        pub(super) fn activate_all(activation: Activation, y: &mut [f32]) {
            activate_in_place(activation, y.as_chunks_mut().0);
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
        pub(super) fn gated(activation: Activation, gate: &[f32], y: &mut [f32]) {
            let Some(gate) = gate.first_chunk() else { return };
            let gate = load(gate);
            let (y, last) = y.as_chunks_mut().0.as_chunks_mut::<ABREAST>();
            for y in y {
                let v =
                    [mul(load(&y[0]), gate), mul(load(&y[1]), gate), mul(load(&y[2]), gate), mul(load(&y[3]), gate)];
                let v = activate(activation, v);
                (0..ABREAST).for_each(|i| store(&mut y[i], v[i]));
            }
            for y in last {
                let [v] = activate(activation, [mul(load(y), gate)]);
                store(y, v);
            }
        }
    };
}
pub(super) use kernel;
