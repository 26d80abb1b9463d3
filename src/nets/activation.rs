//! Activation functions and their γ, the factor that gives the output for a unit Gaussian unit variance.

use super::gamma;

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

/// All activations that nfold folds.
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
    /// The activation with timm's name `name`.
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

    /// γ that a timm checkpoint was trained with: timm's simulated constant (`nfnet.py`), or, for an activation without
    /// one, 1/√Var[f(Z)] of a unit Gaussian Z by quadrature (Brock et al. 2021, section 4.2).
    pub fn gamma(self) -> f64 {
        let known = gamma::find(self.name());
        known.map_or(1.0, |n| n.timm.unwrap_or_else(|| n.quadrature().gamma))
    }
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
    fn each_has_a_gamma() {
        for a in ACTIVATIONS {
            assert_eq!(gamma::find(a.name()).map(|n| n.name), Some(a.name()));
        }
        assert_eq!(Activation::Relu.gamma(), 1.713_958_859_443_664_6);
        let hard_swish = gamma::find("hard_swish").and_then(|n| n.closed_form()).expect("has one");
        assert!((Activation::HardSwish.gamma() / hard_swish - 1.0).abs() < 1e-12);
    }
}
