//! Activations, and the numbers that vector versions of them are made of.

/// What an operator makes of each value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Itself.
    None,
    /// `max(x, 0)`.
    Relu,
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `x (1 + erf(x / √2)) / 2`.
    Gelu,
}

/// `2^f` for `|f| ≤ 1/2`: a polynomial, highest power first; its relative error is 8e-8 at most (fitted for this file).
pub const EXP2: [f32; 6] = [0.001_327_647_1, 0.009_675_541, 0.055_507_13, 0.240_221_2, 0.693_146_94, 1.000_000_1];

/// Added to a number below 2²² and taken off again, it leaves a whole one.
pub const ROUNDER: f32 = 12_582_912.0;

/// `-log2(erfc(a / √2)) / a` for `0 ≤ a ≤ 7`: a polynomial, highest power first (fitted for this file): GELU's error by it is
/// 2.2e-8 at most.
pub const ERFC: [f32; 10] = [
    1.615_295_5e-8,
    -5.469_901e-7,
    7.803_261e-6,
    -5.928_097e-5,
    0.000_225_448_21,
    0.000_101_480_3,
    -0.007_057_052,
    0.052_506_067,
    0.459_202_95,
    1.151_105_8,
];

impl Activation {
    /// All that there are.
    pub const ALL: [Self; 5] = [Self::None, Self::Relu, Self::Silu, Self::Sigmoid, Self::Gelu];

    /// Its name in a graph.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Relu => "Relu",
            Self::Silu => "Silu",
            Self::Sigmoid => "Sigmoid",
            Self::Gelu => "Gelu",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|activation| activation.name() == name)
    }

    /// As defined, by the standard library.
    pub fn of(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            Self::Relu => x.max(0.0),
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Self::Gelu => {
                let polynomial = |a: f32| ERFC.iter().fold(0.0, |sum, c| f64::from(a).mul_add(sum, f64::from(*c)));
                // beyond that nothing is left of a negative number
                let x = if x < -7.0 { -7.0 } else { x };
                let a = x.abs().min(7.0);
                let tail = (-f64::from(a) * polynomial(a)).exp2() * 0.5;
                (f64::from(x) * if x < 0.0 { tail } else { 1.0 - tail }) as f32
            }
        }
    }
}
