//! Activation functions and their γ: what a unit Gaussian's variance is divided by on the way through.

use std::f64::consts::PI;

/// An activation function, by timm's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Activation {
    Celu,
    Elu,
    Gelu,
    HardSwish,
    Identity,
    LeakyRelu,
    Mish,
    Relu,
    Relu6,
    Selu,
    Sigmoid,
    Silu,
    Tanh,
}

/// Every activation that can be folded.
pub const ACTIVATIONS: [Activation; 13] = [
    Activation::Celu,
    Activation::Elu,
    Activation::Gelu,
    Activation::HardSwish,
    Activation::Identity,
    Activation::LeakyRelu,
    Activation::Mish,
    Activation::Relu,
    Activation::Relu6,
    Activation::Selu,
    Activation::Sigmoid,
    Activation::Silu,
    Activation::Tanh,
];

impl Activation {
    /// The activation of this name in timm.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "swish" => Some(Self::Silu),
            "hardswish" => Some(Self::HardSwish),
            _ => ACTIVATIONS.into_iter().find(|a| a.name() == name),
        }
    }

    /// timm's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Celu => "celu",
            Self::Elu => "elu",
            Self::Gelu => "gelu",
            Self::HardSwish => "hard_swish",
            Self::Identity => "identity",
            Self::LeakyRelu => "leaky_relu",
            Self::Mish => "mish",
            Self::Relu => "relu",
            Self::Relu6 => "relu6",
            Self::Selu => "selu",
            Self::Sigmoid => "sigmoid",
            Self::Silu => "silu",
            Self::Tanh => "tanh",
        }
    }

    /// γ that a timm checkpoint was trained with: timm's simulated constant (`nfnet.py`), or, for an activation timm
    /// has none for, 1/√Var[f(Z)] of a unit Gaussian Z by quadrature (Brock et al. 2021, section 4.2).
    pub fn gamma(self) -> f64 {
        match self {
            Self::Identity => 1.0,
            Self::Celu => 1.270_926_833_152_771,
            Self::Elu => 1.271_600_484_848_022_5,
            Self::Gelu => 1.701_504_349_708_557_1,
            Self::LeakyRelu => 1.705_903_410_911_56,
            Self::Relu => 1.713_958_859_443_664_6,
            Self::Relu6 => 1.713_148_474_693_298_3,
            Self::Selu => 1.000_851_511_955_261_2,
            Self::Sigmoid => 4.803_835_391_998_291,
            Self::Silu => 1.788_129_329_681_396_5,
            Self::Tanh => 1.593_911_767_005_920_4,
            Self::HardSwish => gamma_of(|x| x * ((x + 3.0) / 6.0).clamp(0.0, 1.0)),
            Self::Mish => gamma_of(|x| x * x.exp().ln_1p().tanh()),
        }
    }
}

/// 1/√Var[f(Z)], Z ~ N(0, 1), by the trapezoidal rule on ±12 (for a smooth f exact to double precision; a kink costs
/// about the square of the step, 1e-8).
fn gamma_of(f: impl Fn(f64) -> f64) -> f64 {
    let (steps, reach) = (240_000, 12.0);
    let h = 2.0 * reach / f64::from(steps);
    let (mut mean, mut square) = (0.0, 0.0);
    for i in 0..=steps {
        let x = -reach + h * f64::from(i);
        let weight = h * (-0.5 * x * x).exp() / (2.0 * PI).sqrt();
        mean += weight * f(x);
        square += weight * f(x) * f(x);
    }
    (square - mean * mean).sqrt().recip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for a in ACTIVATIONS {
            assert_eq!(Activation::parse(a.name()), Some(a));
        }
        assert_eq!(Activation::parse("swish"), Some(Activation::Silu));
        assert_eq!(Activation::parse("softmax"), None);
    }

    #[test]
    fn quadrature_agrees_with_the_closed_form_and_timm() {
        let relu = (2.0 / (1.0 - 1.0 / PI)).sqrt();
        assert!((gamma_of(|x| x.max(0.0)) - relu).abs() < 1e-6);
        let silu = gamma_of(|x| x / (1.0 + (-x).exp()));
        assert!((silu / Activation::Silu.gamma() - 1.0).abs() < 2e-3, "{silu}");
    }
}
