//! EfficientNet as timm builds it (`_gen_efficientnet`; Tan and Le 2019, "EfficientNet", table 1 and section 4), as
//! baselines of the benchmark. One table of stages per generation, scaled in width and depth by an architecture's
//! multipliers, which arguments may override (timm's entry points don't allow that).

use serde_json::{Map, Value};

use super::activation::Activation;
use super::batch_normed::{BatchNormedBlock, BatchNormedPlan, Shortcut};
use super::{
    Arguments, Attention, Colours, Conv, Ends, Evaluation, Init, NetError, Norm, activation_argument, bad_argument,
    check_ranges, make_divisible, output_stride,
};

/// A stage of the network before scaling.
#[derive(Debug, Clone, Copy)]
struct Stage {
    kind: Kind,
    depth: usize,
    kernel: usize,
    stride: usize,
    expansion: usize,
    channels: usize,
    squeeze: bool,
}

/// Kind of a stage's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Depthwise-separable: depthwise, then pointwise convolution.
    Separable,
    /// Inverted residual: expansion, depthwise convolution, projection.
    Inverted,
    /// Fused: expansion by the spatial convolution itself, then projection.
    Fused,
    /// One convolution, with the activation before the sum.
    Plain,
}

const fn stage(kind: Kind, sizes: [usize; 5], squeeze: bool) -> Stage {
    let [depth, kernel, stride, expansion, channels] = sizes;
    Stage { kind, depth, kernel, stride, expansion, channels, squeeze }
}

/// Table of stages of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Generation {
    B,
    Lite,
    V2Base,
    V2S,
    V2Rw,
    V2RwM,
    V2M,
    V2L,
    V2Xl,
}

use Kind::{Fused, Inverted, Plain, Separable};

const B: [Stage; 7] = [
    stage(Separable, [1, 3, 1, 1, 16], true),
    stage(Inverted, [2, 3, 2, 6, 24], true),
    stage(Inverted, [2, 5, 2, 6, 40], true),
    stage(Inverted, [3, 3, 2, 6, 80], true),
    stage(Inverted, [3, 5, 1, 6, 112], true),
    stage(Inverted, [4, 5, 2, 6, 192], true),
    stage(Inverted, [1, 3, 1, 6, 320], true),
];
const V2_BASE: [Stage; 6] = [
    stage(Plain, [1, 3, 1, 1, 16], false),
    stage(Fused, [2, 3, 2, 4, 32], false),
    stage(Fused, [2, 3, 2, 4, 48], false),
    stage(Inverted, [3, 3, 2, 4, 96], true),
    stage(Inverted, [5, 3, 1, 6, 112], true),
    stage(Inverted, [8, 3, 2, 6, 192], true),
];
const V2_S: [Stage; 6] = [
    stage(Plain, [2, 3, 1, 1, 24], false),
    stage(Fused, [4, 3, 2, 4, 48], false),
    stage(Fused, [4, 3, 2, 4, 64], false),
    stage(Inverted, [6, 3, 2, 4, 128], true),
    stage(Inverted, [9, 3, 1, 6, 160], true),
    stage(Inverted, [15, 3, 2, 6, 256], true),
];
const V2_M: [Stage; 7] = [
    stage(Plain, [3, 3, 1, 1, 24], false),
    stage(Fused, [5, 3, 2, 4, 48], false),
    stage(Fused, [5, 3, 2, 4, 80], false),
    stage(Inverted, [7, 3, 2, 4, 160], true),
    stage(Inverted, [14, 3, 1, 6, 176], true),
    stage(Inverted, [18, 3, 2, 6, 304], true),
    stage(Inverted, [5, 3, 1, 6, 512], true),
];
const V2_L: [Stage; 7] = [
    stage(Plain, [4, 3, 1, 1, 32], false),
    stage(Fused, [7, 3, 2, 4, 64], false),
    stage(Fused, [7, 3, 2, 4, 96], false),
    stage(Inverted, [10, 3, 2, 4, 192], true),
    stage(Inverted, [19, 3, 1, 6, 224], true),
    stage(Inverted, [25, 3, 2, 6, 384], true),
    stage(Inverted, [7, 3, 1, 6, 640], true),
];

const V2_XL: [Stage; 7] = [
    stage(Plain, [4, 3, 1, 1, 32], false),
    stage(Fused, [8, 3, 2, 4, 64], false),
    stage(Fused, [8, 3, 2, 4, 96], false),
    stage(Inverted, [16, 3, 2, 4, 192], true),
    stage(Inverted, [24, 3, 1, 6, 256], true),
    stage(Inverted, [32, 3, 2, 6, 512], true),
    stage(Inverted, [8, 3, 1, 6, 640], true),
];

impl Generation {
    fn stages(self) -> Vec<Stage> {
        match self {
            Self::B => B.to_vec(),
            Self::Lite => B.map(|s| Stage { squeeze: false, ..s }).to_vec(),
            Self::V2Base => V2_BASE.to_vec(),
            Self::V2S => V2_S.to_vec(),
            Self::V2Rw => {
                let mut stages = V2_S;
                stages[0].kind = Fused;
                stages[5].channels = 272;
                stages.to_vec()
            }
            // scales depth by more than the other sizes do, in later stages
            Self::V2RwM => {
                let depths = [3, 5, 5, 8, 15, 24];
                let stages = Self::V2Rw.stages().into_iter().zip(depths);
                stages.map(|(stage, depth)| Stage { depth, ..stage }).collect()
            }
            Self::V2M => V2_M.to_vec(),
            Self::V2L => V2_L.to_vec(),
            Self::V2Xl => V2_XL.to_vec(),
        }
    }

    /// Channels of the stem, and before the classifier; whether each is scaled by the width multiplier.
    fn ends(self) -> [(usize, bool); 2] {
        match self {
            Self::B | Self::V2Base => [(32, true), (1280, true)],
            Self::Lite => [(32, false), (1280, false)],
            Self::V2S => [(24, true), (1280, true)],
            Self::V2Rw | Self::V2RwM => [(24, true), (1792, true)],
            Self::V2M => [(24, true), (1280, false)],
            Self::V2L | Self::V2Xl => [(32, true), (1280, false)],
        }
    }
}

/// Reduced channels of squeeze-and-excitation, as a share of the block's input channels.
const SQUEEZE: f64 = 0.25;

/// Configuration of an architecture.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct EfficientNetConfig {
    pub channel_multiplier: f64,
    pub depth_multiplier: f64,
    pub channel_divisor: usize,
    pub act_layer: String,
    pub bn_eps: f64,
    pub generation: Generation,
    /// `same`, or empty.
    pub pad_type: String,
}

impl EfficientNetConfig {
    /// Overrides the configuration with `args` and plans the network.
    pub fn plan(mut self, architecture: &str, args: &Map<String, Value>) -> Result<BatchNormedPlan, NetError> {
        let mut args = Arguments::new(architecture, args);
        let ends = args.ends()?;
        let output_stride = output_stride(&mut args)?;
        args.set("channel_multiplier", &mut self.channel_multiplier)?;
        args.set("depth_multiplier", &mut self.depth_multiplier)?;
        args.set("channel_divisor", &mut self.channel_divisor)?;
        args.set("act_layer", &mut self.act_layer)?;
        args.set("bn_eps", &mut self.bn_eps)?;
        args.set("pad_type", &mut self.pad_type)?;
        args.ignore(&["bn_momentum"]);
        args.finish()?;
        if !matches!(self.pad_type.as_str(), "" | "same") {
            return Err(bad_argument("pad_type", &self.pad_type.into(), "`same` or nothing".into()));
        }
        self.network(ends, output_stride)
    }

    fn network(&self, ends: Ends, output_stride: usize) -> Result<BatchNormedPlan, NetError> {
        let activation = self.check()?;
        let [stem_chs, features] =
            self.generation.ends().map(|(chs, scaled)| if scaled { self.channels(chs) } else { chs });
        let mut in_chs = stem_chs;
        let stem = Conv::square("conv_stem".into(), (ends.in_chans, in_chs), 3, 2, self.norm("bn1".into()));
        let mut blocks = Vec::new();
        let stages = self.generation.stages();
        let last = stages.len() - 1;
        let (mut net_stride, mut dilation) = (2, 1);
        for (s, stage) in stages.into_iter().enumerate() {
            let out_chs = self.channels(stage.channels);
            let fixed = self.generation == Generation::Lite && (s == 0 || s == last);
            let multiplier = if fixed { 1.0 } else { self.depth_multiplier };
            for index in 0..(stage.depth as f64 * multiplier).ceil() as usize {
                let mut stride = if index == 0 { stage.stride } else { 1 };
                let mut next_dilation = dilation;
                if net_stride * stride > output_stride {
                    next_dilation *= stride;
                    stride = 1;
                }
                net_stride *= stride;
                let (name, chs) = (format!("blocks.{s}.{index}"), (in_chs, out_chs));
                blocks.push(self.block(BlockShape { name, chs, stride, dilation, stage }, activation));
                (in_chs, dilation) = (out_chs, next_dilation);
            }
        }
        Ok(BatchNormedPlan {
            family: "efficientnet",
            activation,
            stem,
            blocks,
            final_conv: Some(Conv::pointwise("conv_head".into(), in_chs, features, self.norm("bn2".into()))),
            final_act: true,
            classifier: "classifier",
            classifier_init: Init::Uniform((ends.classes as f64).sqrt().recip()),
            zero_init_last: false,
            same_padding: self.pad_type == "same",
            num_features: features,
            pool: ends.pool,
            classes: ends.classes,
        })
    }

    fn check(&self) -> Result<Activation, NetError> {
        check_ranges([
            ("channel_multiplier", self.channel_multiplier, 0.01..=16.0),
            ("depth_multiplier", self.depth_multiplier, 0.01..=100.0),
            ("bn_eps", self.bn_eps, 0.0..=1.0),
        ])?;
        check_ranges([("channel_divisor", self.channel_divisor, 1..=1024)])?;
        activation_argument(&self.act_layer)
    }

    fn channels(&self, unscaled: usize) -> usize {
        let limit = if self.generation == Generation::V2Base { 0.0 } else { 0.9 };
        make_divisible(unscaled as f64 * self.channel_multiplier, self.channel_divisor, limit)
    }

    fn norm(&self, layer: String) -> Norm {
        Norm::BatchNorm { layer, eps: self.bn_eps }
    }

    /// Plans an inverted residual block (`conv_pw`, `conv_dw`, `conv_pwl`), a depthwise-separable one (`conv_dw`,
    /// `conv_pw`), a fused one (`conv_exp`, `conv_pwl`), or a single convolution (`conv`).
    fn block(&self, shape: BlockShape, activation: Activation) -> BatchNormedBlock {
        let BlockShape { name, chs: (in_chs, out_chs), stride, dilation, stage } = shape;
        let Stage { kind, kernel, expansion, squeeze, .. } = stage;
        let mid = if kind == Separable { in_chs } else { make_divisible((in_chs * expansion) as f64, 8, 0.9) };
        let path = |leaf: &str| format!("{name}.{leaf}");
        let norm = |number: usize| self.norm(path(&format!("bn{number}")));
        let square =
            |leaf: &str, chs, number| Conv { dilation, ..Conv::square(path(leaf), chs, kernel, stride, norm(number)) };
        let depthwise = |number| Conv { groups: mid, ..square("conv_dw", (mid, mid), number) };
        let spatial = |leaf: &str, to| square(leaf, (in_chs, to), 1);
        let point = |leaf: &str, from, to, number| Conv::pointwise(path(leaf), from, to, norm(number));
        let convs = match kind {
            Separable => vec![depthwise(1), point("conv_pw", mid, out_chs, 2)],
            Inverted => vec![point("conv_pw", in_chs, mid, 1), depthwise(2), point("conv_pwl", mid, out_chs, 3)],
            Fused => vec![spatial("conv_exp", mid), point("conv_pwl", mid, out_chs, 2)],
            Plain => vec![spatial("conv", out_chs)],
        };
        let reduced = (mid as f64 * (SQUEEZE / expansion as f64)).round_ties_even().max(1.0) as usize;
        let fc = |leaf: &str, from, to| Conv::pointwise(path(leaf), from, to, Norm::Plain);
        let (fc1, fc2) = (fc("se.conv_reduce", mid, reduced), fc("se.conv_expand", reduced, mid));
        BatchNormedBlock {
            convs,
            attention: squeeze.then_some(Attention::SqueezeExcite { fc1, fc2, activation }),
            shortcut: if in_chs == out_chs && stride == 1 { Shortcut::Identity } else { Shortcut::None },
            activated: false,
            branch_activated: kind == Plain,
            name,
        }
    }
}

/// Parameters that depend on a block's position in the network.
struct BlockShape {
    name: String,
    chs: (usize, usize),
    stride: usize,
    dilation: usize,
    stage: Stage,
}

/// Names of the family's architectures.
pub const VARIANTS: [&str; 45] = [
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "tf_efficientnet_b0",
    "tf_efficientnet_b1",
    "tf_efficientnet_b2",
    "tf_efficientnet_b3",
    "tf_efficientnet_b4",
    "tf_efficientnet_b5",
    "tf_efficientnet_b6",
    "tf_efficientnet_b7",
    "tf_efficientnet_lite0",
    "tf_efficientnet_lite1",
    "tf_efficientnet_lite2",
    "tf_efficientnet_lite3",
    "tf_efficientnet_lite4",
    "efficientnet_lite0",
    "efficientnetv2_s",
    "efficientnetv2_m",
    "efficientnetv2_l",
    "tf_efficientnetv2_s",
    "tf_efficientnetv2_m",
    "tf_efficientnetv2_l",
    "tf_efficientnetv2_b0",
    "tf_efficientnetv2_b1",
    "tf_efficientnetv2_b2",
    "tf_efficientnetv2_b3",
    "efficientnetv2_rw_s",
    "efficientnetv2_rw_t",
    "efficientnet_b8",
    "efficientnet_l2",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_lite3",
    "efficientnet_lite4",
    "efficientnetv2_xl",
    "efficientnetv2_rw_m",
    "tf_efficientnet_b8",
    "tf_efficientnet_l2",
    "tf_efficientnetv2_xl",
];

/// timm's configuration of an architecture.
pub fn variant(name: &str) -> Option<EfficientNetConfig> {
    let name = VARIANTS.into_iter().find(|v| *v == name)?;
    // weights ported from TensorFlow need its padding and its epsilon
    let (tensorflow, size) = match name.strip_prefix("tf_") {
        Some(rest) => (true, rest),
        None => (false, name),
    };
    let (generation, channel_multiplier, depth_multiplier) = match size.trim_start_matches("efficientnet") {
        "_b0" => (Generation::B, 1.0, 1.0),
        "_b1" => (Generation::B, 1.0, 1.1),
        "_b2" => (Generation::B, 1.1, 1.2),
        "_b3" => (Generation::B, 1.2, 1.4),
        "_b4" => (Generation::B, 1.4, 1.8),
        "_b5" => (Generation::B, 1.6, 2.2),
        "_b6" => (Generation::B, 1.8, 2.6),
        "_b7" => (Generation::B, 2.0, 3.1),
        "_b8" => (Generation::B, 2.2, 3.6),
        "_l2" => (Generation::B, 4.3, 5.3),
        "_lite0" => (Generation::Lite, 1.0, 1.0),
        "_lite1" => (Generation::Lite, 1.0, 1.1),
        "_lite2" => (Generation::Lite, 1.1, 1.2),
        "_lite3" => (Generation::Lite, 1.2, 1.4),
        "_lite4" => (Generation::Lite, 1.4, 1.8),
        "v2_b0" => (Generation::V2Base, 1.0, 1.0),
        "v2_b1" => (Generation::V2Base, 1.0, 1.1),
        "v2_b2" => (Generation::V2Base, 1.1, 1.2),
        "v2_b3" => (Generation::V2Base, 1.2, 1.4),
        "v2_s" => (Generation::V2S, 1.0, 1.0),
        "v2_m" => (Generation::V2M, 1.0, 1.0),
        "v2_l" => (Generation::V2L, 1.0, 1.0),
        "v2_xl" => (Generation::V2Xl, 1.0, 1.0),
        "v2_rw_s" => (Generation::V2Rw, 1.0, 1.0),
        "v2_rw_m" => (Generation::V2RwM, 1.2, 1.0),
        "v2_rw_t" => (Generation::V2S, 0.8, 0.9),
        _ => return None,
    };
    let act_layer = if generation == Generation::Lite { "relu6" } else { "silu" }.into();
    Some(EfficientNetConfig {
        channel_multiplier,
        depth_multiplier,
        channel_divisor: 8,
        act_layer,
        bn_eps: if tensorflow { 1e-3 } else { 1e-5 },
        generation,
        pad_type: if tensorflow { "same" } else { "" }.into(),
    })
}

/// timm's evaluation settings of an architecture.
pub fn evaluation(name: &str) -> Option<Evaluation> {
    let (input, test_input, crop_pct) = match name {
        "efficientnet_b0" => (224, None, 0.875),
        "efficientnet_b1" => (240, Some(288), 0.9),
        "efficientnet_b2" => (256, Some(288), 0.875),
        "efficientnet_b3" => (288, Some(320), 0.875),
        "efficientnet_b4" => (320, Some(384), 0.875),
        _ => return None,
    };
    let test_crop_pct = test_input.map(|_| 1.0);
    let norm = if name == "efficientnet_b1" { Colours::Half } else { Colours::ImageNet };
    Some(Evaluation { input, test_input, crop_pct, test_crop_pct, norm, ..Evaluation::USUAL })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(args: Value) -> Result<BatchNormedPlan, NetError> {
        let args = args.as_object().cloned().unwrap_or_default();
        variant("efficientnet_b0").expect("known").plan("efficientnet_b0", &args)
    }

    #[test]
    fn arguments_are_refused_by_name() {
        for (args, what) in [
            (serde_json::json!({"pad_type": "valid"}), "`pad_type`"),
            (serde_json::json!({"output_stride": 5}), "`output_stride`"),
            (serde_json::json!({"channel_multiplier": 0.0}), "`channel_multiplier`"),
            (serde_json::json!({"depth_multiplier": -1.0}), "`depth_multiplier`"),
            (serde_json::json!({"channel_divisor": 0}), "`channel_divisor`"),
            (serde_json::json!({"act_layer": "softmax"}), "`act_layer`"),
            (serde_json::json!({"block_args": []}), "`block_args`"),
        ] {
            let error = plan(args).expect_err(what).to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn blocks_keep_their_input_only_where_shapes_agree() {
        let plan = plan(serde_json::json!({})).expect("plans");
        let kept = plan.blocks.iter().filter(|b| b.shortcut == Shortcut::Identity).count();
        assert_eq!((plan.blocks.len(), kept), (16, 9));
        assert_eq!(plan.blocks[0].convs.len(), 2);
    }
}
