//! EfficientNet as timm builds it (`_gen_efficientnet`; Tan and Le 2019, "EfficientNet", table 1 and section 4):
//! opponents of the benchmark. One table of stages, scaled in width and depth (by an architecture's own multipliers;
//! timm's entry points take no others, nfold does).

use serde_json::{Map, Value};

use super::activation::{ACTIVATIONS, Activation};
use super::batch_normed::{BatchNormedBlock, BatchNormedPlan, Shortcut};
use super::{Arguments, Attention, Colours, Conv, Evaluation, Init, NetError, Norm, bad_argument, make_divisible};

/// Stages of the unscaled network: blocks, kernel, stride, expansion, channels. An expansion of 1 has no convolution
/// of its own.
const STAGES: [(usize, usize, usize, usize, usize); 7] = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
];
const STEM: usize = 32;
const FEATURES: usize = 1280;
/// Squeezed channels by the block's input channels.
const SQUEEZE: f64 = 0.25;

/// What makes one architecture of the family.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct EfficientNetConfig {
    pub channel_multiplier: f64,
    pub depth_multiplier: f64,
    pub channel_divisor: usize,
    pub act_layer: String,
    pub bn_eps: f64,
}

impl EfficientNetConfig {
    /// Lays `args` over the configuration and plans the network.
    pub fn plan(mut self, architecture: &str, args: &Map<String, Value>) -> Result<BatchNormedPlan, NetError> {
        let mut args = Arguments::new(architecture, args);
        let classes = args.classifier()?;
        let (mut pad_type, mut output_stride) = (String::new(), 32usize);
        args.set("channel_multiplier", &mut self.channel_multiplier)?;
        args.set("depth_multiplier", &mut self.depth_multiplier)?;
        args.set("channel_divisor", &mut self.channel_divisor)?;
        args.set("act_layer", &mut self.act_layer)?;
        args.set("bn_eps", &mut self.bn_eps)?;
        args.set("pad_type", &mut pad_type)?;
        args.set("output_stride", &mut output_stride)?;
        args.ignore(&["bn_momentum"]);
        args.finish()?;
        if !pad_type.is_empty() {
            return Err(bad_argument("pad_type", &pad_type.into(), "only symmetric padding (``) is supported".into()));
        }
        if output_stride != 32 {
            return Err(bad_argument("output_stride", &output_stride.into(), "only 32 is supported".into()));
        }
        self.network(classes)
    }

    fn network(&self, classes: usize) -> Result<BatchNormedPlan, NetError> {
        let activation = self.check()?;
        let mut in_chs = self.channels(STEM);
        let stem = Conv::square("conv_stem".into(), (3, in_chs), 3, 2, self.norm("bn1".into()));
        let mut blocks = Vec::new();
        for (stage, (depth, kernel, stride, expansion, channels)) in STAGES.into_iter().enumerate() {
            let out_chs = self.channels(channels);
            let depth = (depth as f64 * self.depth_multiplier).ceil() as usize;
            for index in 0..depth {
                let shape = BlockShape {
                    name: format!("blocks.{stage}.{index}"),
                    chs: (in_chs, out_chs),
                    kernel,
                    stride: if index == 0 { stride } else { 1 },
                    expansion,
                };
                blocks.push(self.block(shape, activation));
                in_chs = out_chs;
            }
        }
        let features = self.channels(FEATURES);
        Ok(BatchNormedPlan {
            family: "efficientnet",
            activation,
            stem,
            blocks,
            final_conv: Some(Conv::pointwise("conv_head".into(), in_chs, features, self.norm("bn2".into()))),
            final_act: true,
            classifier: "classifier",
            classifier_init: Init::Uniform((classes as f64).sqrt().recip()),
            zero_init_last: false,
            num_features: features,
            classes,
        })
    }

    fn check(&self) -> Result<Activation, NetError> {
        for (name, value, low, high) in [
            ("channel_multiplier", self.channel_multiplier, 0.01, 16.0),
            ("depth_multiplier", self.depth_multiplier, 0.01, 100.0),
            ("bn_eps", self.bn_eps, 0.0, 1.0),
        ] {
            if !(low..=high).contains(&value) {
                return Err(bad_argument(name, &value.into(), format!("must lie in {low}..={high}")));
            }
        }
        if !(1..=1024).contains(&self.channel_divisor) {
            let reason = "must lie in 1..=1024".into();
            return Err(bad_argument("channel_divisor", &self.channel_divisor.into(), reason));
        }
        let known = || ACTIVATIONS.map(Activation::name).join(", ");
        Activation::parse(&self.act_layer)
            .ok_or_else(|| bad_argument("act_layer", &self.act_layer.as_str().into(), format!("known are {}", known())))
    }

    fn channels(&self, unscaled: usize) -> usize {
        make_divisible(unscaled as f64 * self.channel_multiplier, self.channel_divisor, 0.9)
    }

    fn norm(&self, layer: String) -> Norm {
        Norm::BatchNorm { layer, eps: self.bn_eps }
    }

    /// An inverted residual (`conv_pw`, `conv_dw`, `conv_pwl`), or, where nothing expands, a depthwise-separable
    /// block (`conv_dw`, `conv_pw`).
    fn block(&self, shape: BlockShape, activation: Activation) -> BatchNormedBlock {
        let BlockShape { name, chs: (in_chs, out_chs), kernel, stride, expansion } = shape;
        let separable = expansion == 1;
        let mid = if separable { in_chs } else { make_divisible((in_chs * expansion) as f64, 8, 0.9) };
        let names = if separable { ["", "conv_dw", "conv_pw"] } else { ["conv_pw", "conv_dw", "conv_pwl"] };
        let path = |leaf: &str| format!("{name}.{leaf}");
        let norm = |place: usize| self.norm(path(&format!("bn{}", place + usize::from(!separable))));
        let depthwise = Conv { groups: mid, ..Conv::square(path(names[1]), (mid, mid), kernel, stride, norm(1)) };
        let project = Conv::pointwise(path(names[2]), mid, out_chs, norm(2));
        let expand = (!separable).then(|| Conv::pointwise(path(names[0]), in_chs, mid, norm(0)));
        let reduced = (mid as f64 * (SQUEEZE / expansion as f64)).round_ties_even().max(1.0) as usize;
        let fc = |leaf: &str, from, to| Conv::pointwise(path(leaf), from, to, Norm::Plain);
        let (fc1, fc2) = (fc("se.conv_reduce", mid, reduced), fc("se.conv_expand", reduced, mid));
        BatchNormedBlock {
            convs: expand.into_iter().chain([depthwise, project]).collect(),
            attention: Some(Attention::SqueezeExcite { fc1, fc2, activation }),
            shortcut: if in_chs == out_chs && stride == 1 { Shortcut::Identity } else { Shortcut::None },
            activated: false,
            name,
        }
    }
}

/// What a block's place in the network decides.
struct BlockShape {
    name: String,
    chs: (usize, usize),
    kernel: usize,
    stride: usize,
    expansion: usize,
}

/// Names of the family's architectures.
pub const VARIANTS: [&str; 5] =
    ["efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"];

/// timm's configuration of an architecture.
pub fn variant(name: &str) -> Option<EfficientNetConfig> {
    let (channel_multiplier, depth_multiplier) = match name {
        "efficientnet_b0" => (1.0, 1.0),
        "efficientnet_b1" => (1.0, 1.1),
        "efficientnet_b2" => (1.1, 1.2),
        "efficientnet_b3" => (1.2, 1.4),
        "efficientnet_b4" => (1.4, 1.8),
        _ => return None,
    };
    let (channel_divisor, act_layer, bn_eps) = (8, "silu".into(), 1e-5);
    Some(EfficientNetConfig { channel_multiplier, depth_multiplier, channel_divisor, act_layer, bn_eps })
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
            (serde_json::json!({"pad_type": "same"}), "`pad_type`"),
            (serde_json::json!({"output_stride": 16}), "`output_stride`"),
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
