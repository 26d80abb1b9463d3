//! Networks: configurations, plans, activations. Pure data and maths: no files, no graphs, no runtime.
//!
//! An architecture's name and `model_args` give a [`Network`]: a plan that lists every convolution with its name in the
//! checkpoint, its shape and its scalars. Folding follows the plan; so does `nfold init`, through [`Network::tensors`].

pub mod activation;
mod arguments;
pub mod batch_normed;
pub mod efficientnet;
pub mod gamma;
pub mod nf;
mod published;
pub mod regnet;
pub mod resnet;
pub mod scaled_ws;

use serde_json::{Map, Value};

use activation::Activation;
use arguments::{Arguments, Ends, activation_argument, bad_argument, check_ranges, check_stages, output_stride};

/// Why an architecture can't be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// The architecture is not supported.
    #[error("architecture `{name}` is not supported; the nearest that are: {nearest} (`nfold init --help` lists all)")]
    UnknownArchitecture {
        /// Name in the request, without the tag.
        name: String,
        /// The three supported names most similar to it, comma-separated.
        nearest: String,
    },
    /// The architecture has no such argument.
    #[error("model_args: `{name}` is not supported for `{architecture}`; remove it, or fold a checkpoint without it")]
    UnknownArgument {
        /// The argument.
        name: String,
        /// The architecture.
        architecture: String,
    },
    /// The value of a model argument is invalid.
    #[error("model_args: `{name}` = {value} can't be used: {reason}")]
    BadArgument {
        /// The argument.
        name: String,
        /// The value, as JSON.
        value: String,
        /// What was expected.
        reason: String,
    },
}

/// Normalisation of a convolution, and its tensors in the checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum Norm {
    /// Scaled Weight Standardization (Brock et al. 2021, section 4; timm `ScaledStdConv2d`): `weight`, `bias`, `gain`.
    ScaledWs {
        /// γ in the convolution; 1 if the network applies γ in its activations.
        gamma: f64,
        /// Added to the variance under the square root.
        eps: f64,
    },
    /// Batch normalisation with running statistics: `weight` without bias, then the tensors of `layer`.
    BatchNorm {
        /// Module path of the batch normalisation.
        layer: String,
        /// Added to the variance under the square root.
        eps: f64,
    },
    /// A plain convolution with weights and bias.
    Plain,
}

/// One 2-D convolution, weights `[out_chs, in_chs / groups, kernel, kernel]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Conv {
    /// Module path in the checkpoint.
    pub name: String,
    /// Input channels.
    pub in_chs: usize,
    /// Output channels.
    pub out_chs: usize,
    /// Kernel side.
    pub kernel: usize,
    /// Stride.
    pub stride: usize,
    /// Dilation.
    pub dilation: usize,
    /// Groups.
    pub groups: usize,
    /// Normalisation of the weights, or of the output.
    pub norm: Norm,
}

impl Conv {
    /// A 1x1 convolution, stride 1.
    pub fn pointwise(name: String, in_chs: usize, out_chs: usize, norm: Norm) -> Self {
        Self { name, in_chs, out_chs, kernel: 1, stride: 1, dilation: 1, groups: 1, norm }
    }

    /// A square convolution, one group, no dilation.
    pub fn square(name: String, chs: (usize, usize), kernel: usize, stride: usize, norm: Norm) -> Self {
        Self { name, in_chs: chs.0, out_chs: chs.1, kernel, stride, dilation: 1, groups: 1, norm }
    }

    /// Shape of the weights.
    pub fn weight_shape(&self) -> [usize; 4] {
        [self.out_chs, self.in_chs / self.groups, self.kernel, self.kernel]
    }

    /// Number of inputs that an output value is summed over.
    pub fn fan_in(&self) -> usize {
        self.in_chs / self.groups * self.kernel * self.kernel
    }
}

/// Channel attention: multiplies a `[N, C, H, W]` map by a gate `[N, C, 1, 1]`.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Squeeze-and-excitation: mean → `fc1` → activation → `fc2` → sigmoid.
    SqueezeExcite {
        /// Reducing layer, `[reduced, C, 1, 1]`.
        fc1: Conv,
        /// Expanding layer, `[C, reduced, 1, 1]`.
        fc2: Conv,
        /// Activation between the two layers.
        activation: Activation,
    },
    /// Efficient channel attention: mean → 1-D convolution over channels → sigmoid.
    Efficient {
        /// Module path of the 1-D convolution (no bias).
        name: String,
        /// Channels.
        chs: usize,
        /// Kernel length, odd.
        kernel: usize,
    },
}

impl Attention {
    /// timm's `SEModule` over `chs` channels, with `reduced` channels between its two layers. Its activation is ReLU,
    /// whatever the network's is.
    fn squeeze_excite(module: &str, chs: usize, reduced: usize) -> Self {
        let fc = |leaf: &str, from, to| Conv::pointwise(format!("{module}.{leaf}"), from, to, Norm::Plain);
        Self::SqueezeExcite { fc1: fc("fc1", chs, reduced), fc2: fc("fc2", reduced, chs), activation: Activation::Relu }
    }

    /// timm's `EcaModule` over `chs` channels, which determine the kernel's length.
    fn efficient(module: &str, chs: usize) -> Self {
        let t = (((chs as f64).log2() + 1.0).abs() / 2.0) as usize;
        let kernel = (if t.is_multiple_of(2) { t + 1 } else { t }).max(3);
        Self::Efficient { name: format!("{module}.conv"), chs, kernel }
    }
}

/// Pooling on the shortcut before its 1x1 convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShortcutPool {
    /// No pooling.
    None,
    /// 2x2 average, stride 2; windows at the far border average only the pixels that they cover.
    Average2,
    /// 2x2 average, stride 1; zero padding at the far border counts (dilated networks, timm `AvgPool2dSame`).
    AverageSame,
}

/// Initialisation of a tensor, as in timm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All elements have this value.
    Constant(f32),
    /// Normal distribution with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform distribution on ± this bound.
    Uniform(f64),
    /// A counter of 0, stored as a 64-bit integer (`num_batches_tracked`).
    Counter,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Initialisation.
    pub init: Init,
    /// Whether it counts as a parameter (running statistics don't).
    pub trainable: bool,
}

impl TensorSpec {
    fn new(name: String, shape: &[usize], init: Init) -> Self {
        Self { name, shape: shape.to_vec(), init, trainable: true }
    }

    fn buffer(name: String, shape: &[usize], init: Init) -> Self {
        Self { trainable: false, ..Self::new(name, shape, init) }
    }

    /// Batch normalisation over `chs` channels with initial weight `scale`.
    fn batch_norm(layer: &str, chs: usize, scale: f32) -> [Self; 5] {
        let name = |leaf: &str| format!("{layer}.{leaf}");
        [
            Self::new(name("weight"), &[chs], Init::Constant(scale)),
            Self::new(name("bias"), &[chs], Init::Constant(0.0)),
            Self::buffer(name("running_mean"), &[chs], Init::Constant(0.0)),
            Self::buffer(name("running_var"), &[chs], Init::Constant(1.0)),
            Self::buffer(name("num_batches_tracked"), &[], Init::Counter),
        ]
    }
}

/// Plan of a network of any family.
#[derive(Debug, Clone, PartialEq)]
pub enum Network {
    /// Normalizer-Free (timm `NormFreeNet`).
    NormFree(nf::NfPlan),
    /// Batch-normalised residual network (timm `ResNet`).
    ResNet(resnet::ResNetPlan),
    /// Batch-normalised network with attention inside its blocks (timm `RegNet`, `EfficientNet`).
    BatchNormed(batch_normed::BatchNormedPlan),
}

impl Network {
    /// Plans `architecture` (a tag after a dot is ignored) with timm's `model_args` overriding its configuration.
    pub fn plan(architecture: &str, model_args: &Map<String, Value>) -> Result<Self, NetError> {
        let name = base_name(architecture);
        if let Some(config) = nf::variants::variant(name) {
            return Ok(Self::NormFree(nf::NfPlan::new(name, config, model_args)?));
        }
        if let Some(config) = resnet::variant(name) {
            return Ok(Self::ResNet(resnet::ResNetPlan::new(name, config, model_args)?));
        }
        if let Some(config) = regnet::variant(name) {
            return Ok(Self::BatchNormed(config.plan(name, model_args)?));
        }
        if let Some(config) = efficientnet::variant(name) {
            return Ok(Self::BatchNormed(config.plan(name, model_args)?));
        }
        Err(NetError::UnknownArchitecture { name: name.into(), nearest: nearest(name) })
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        match self {
            Self::NormFree(plan) => plan.classes,
            Self::ResNet(plan) => plan.classes,
            Self::BatchNormed(plan) => plan.classes,
        }
    }

    /// Number of input channels.
    pub fn in_chans(&self) -> usize {
        let first = match self {
            Self::NormFree(plan) => plan.stem.first(),
            Self::ResNet(plan) => plan.stem.first(),
            Self::BatchNormed(plan) => Some(&plan.stem),
        };
        first.map_or(3, |conv| conv.in_chs)
    }

    /// Whether convolutions use TensorFlow's SAME padding.
    pub fn same_padding(&self) -> bool {
        match self {
            Self::NormFree(plan) => plan.same_padding,
            Self::ResNet(_) => false,
            Self::BatchNormed(plan) => plan.same_padding,
        }
    }

    /// Name of the classifier's weights, of shape `[classes, features]`.
    pub fn classifier(&self) -> String {
        let module = match self {
            Self::NormFree(_) => "head.fc",
            Self::ResNet(_) => "fc",
            Self::BatchNormed(plan) => plan.classifier,
        };
        format!("{module}.weight")
    }

    /// All tensors of a checkpoint of this network.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        match self {
            Self::NormFree(plan) => plan.tensors(),
            Self::ResNet(plan) => plan.tensors(),
            Self::BatchNormed(plan) => plan.tensors(),
        }
    }

    /// Number of trainable parameters.
    pub fn parameters(&self) -> u64 {
        let trainable = self.tensors().into_iter().filter(|t| t.trainable);
        trainable.map(|t| t.shape.iter().product::<usize>() as u64).sum()
    }
}

/// Evaluation settings that timm publishes for an architecture; `nfold init` writes them into `pretrained_cfg`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Side of the input in training, in pixels.
    pub input: u32,
    /// Side of the input in evaluation, if it differs.
    pub test_input: Option<u32>,
    /// Crop fraction at `input`.
    pub crop_pct: f64,
    /// Crop fraction at `test_input`, if it differs.
    pub test_crop_pct: Option<f64>,
    /// `center` or `squash`.
    pub crop_mode: &'static str,
    /// `bicubic` or `bilinear`.
    pub interpolation: &'static str,
    /// Mean and standard deviation for normalisation.
    pub norm: Colours,
}

impl Evaluation {
    /// Settings of most architectures, without sizes.
    const USUAL: Self = Self {
        input: 224,
        test_input: None,
        crop_pct: 0.875,
        test_crop_pct: None,
        crop_mode: "center",
        interpolation: "bicubic",
        norm: Colours::ImageNet,
    };
}

/// Mean and standard deviation of colours in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colours {
    /// ImageNet's own.
    ImageNet,
    /// 0.5 for all channels ("Inception").
    Half,
}

impl Colours {
    /// Mean per channel (R, G, B) on the 0..1 scale.
    pub fn mean(self) -> [f64; 3] {
        match self {
            Self::ImageNet => [0.485, 0.456, 0.406],
            Self::Half => [0.5; 3],
        }
    }

    /// Standard deviation per channel (R, G, B) on the 0..1 scale.
    pub fn std(self) -> [f64; 3] {
        match self {
            Self::ImageNet => [0.229, 0.224, 0.225],
            Self::Half => [0.5; 3],
        }
    }
}

/// timm's evaluation settings for a supported architecture.
pub fn evaluation(architecture: &str) -> Option<Evaluation> {
    let name = base_name(architecture);
    let opponents = || regnet::evaluation(name).or_else(|| efficientnet::evaluation(name));
    let own = nf::variants::evaluation(name).or_else(|| resnet::evaluation(name)).or_else(opponents);
    own.or_else(|| published::evaluation(name))
}

/// Names of all supported architectures.
pub fn architectures() -> Vec<&'static str> {
    [&nf::variants::VARIANTS[..], &resnet::VARIANTS, &regnet::VARIANTS, &efficientnet::VARIANTS].concat()
}

/// The three supported names most similar to `name`, comma-separated.
pub fn nearest(name: &str) -> String {
    let mut names = architectures();
    let likeness = |other: &str| strsim::normalized_damerau_levenshtein(name, other);
    names.sort_by(|a, b| likeness(b).total_cmp(&likeness(a)));
    names.truncate(3);
    names.join(", ")
}

/// Removes the tag: `nf_regnet_b1.ra2_in1k` → `nf_regnet_b1`.
pub fn base_name(architecture: &str) -> &str {
    architecture.split('.').next().unwrap_or(architecture)
}

/// timm's `make_divisible`: nearest multiple of `divisor`, at least `divisor`, not below `round_limit · value`.
fn make_divisible(value: f64, divisor: usize, round_limit: f64) -> usize {
    let d = divisor as f64;
    let rounded = (((value + d / 2.0) / d).floor() * d).max(d);
    (if rounded < round_limit * value { rounded + d } else { rounded }) as usize
}

/// Pooling of the last feature map to the classifier's input (timm `SelectAdaptivePool2d`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// Mean.
    Average,
    /// Maximum.
    Max,
    /// Half the sum of mean and maximum (`avgmax`).
    AverageMax,
    /// Mean and maximum concatenated, means first: twice as many features (`catavgmax`).
    Both,
}

impl Pool {
    /// The pooling with timm's name `name`; the `fast` variants compute the same.
    fn parse(name: &str) -> Option<Self> {
        match name.strip_prefix("fast").unwrap_or(name) {
            "avg" => Some(Self::Average),
            "" if name == "fast" => Some(Self::Average),
            "max" => Some(Self::Max),
            "avgmax" => Some(Self::AverageMax),
            "catavgmax" => Some(Self::Both),
            _ => None,
        }
    }

    /// Number of features for the classifier, for a last map of `channels`.
    pub fn features(self, channels: usize) -> usize {
        if self == Self::Both { 2 * channels } else { channels }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn make_divisible_follows_timm() {
        assert_eq!(make_divisible(36.0, 8, 0.9), 40);
        assert_eq!(make_divisible(44.0, 8, 0.9), 48);
        assert_eq!(make_divisible(43.9, 8, 0.9), 40);
        assert_eq!(make_divisible(3.0, 8, 0.9), 8);
        // 0.9 rule: 16 would lose more than a tenth of 19.9
        assert_eq!(make_divisible(19.9, 8, 0.9), 24);
        assert_eq!(make_divisible(19.9, 8, 0.0), 16);
    }

    #[test]
    fn unknown_architectures_get_the_nearest() {
        let error = Network::plan("vit_base.x", &Map::new()).expect_err("not supported");
        assert!(error.to_string().contains("`vit_base`") && error.to_string().matches(", ").count() == 2);
        for (name, near) in [("resnet51", "resnet50"), ("nf_regnet-b1", "nf_regnet_b1"), ("nfresnet50", "nf_resnet50")]
        {
            assert!(nearest(name).split(", ").any(|known| known == near), "{name}: {}", nearest(name));
        }
    }
}
