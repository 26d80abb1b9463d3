//! Activations in double precision, the same on every machine.

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum Function {
    Elu,
    Gelu,
    HardSwish,
    LeakyRelu(f32),
    Mish,
    Relu,
    Relu6,
    Selu,
    Sigmoid,
    Silu,
    Tanh,
}

impl Function {
    /// Its value in double precision, by arithmetic that is the same on every machine.
    pub fn apply(self, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        match self {
            Self::Elu if x > 0.0 => x,
            Self::Elu => libm::expm1(x),
            Self::Gelu => 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            Self::HardSwish => x * (x / 6.0 + 0.5).clamp(0.0, 1.0),
            Self::LeakyRelu(slope) if x < 0.0 => x * f64::from(slope),
            Self::LeakyRelu(_) => x,
            Self::Mish => x * libm::tanh(x.max(0.0) + libm::log1p(libm::exp(-x.abs()))),
            Self::Relu => x.max(0.0),
            Self::Relu6 => x.clamp(0.0, 6.0),
            Self::Selu if x > 0.0 => SELU_GAMMA * x,
            Self::Selu => SELU_GAMMA * SELU_ALPHA * libm::expm1(x),
            Self::Sigmoid => sigmoid(x),
            Self::Silu => x * sigmoid(x),
            Self::Tanh => libm::tanh(x),
        }
    }
}

/// The constants of the operator `Selu`.
const SELU_ALPHA: f64 = 1.673_263_192_176_818_8;
const SELU_GAMMA: f64 = 1.050_700_987_355_480_5;
