//! RegNetX and RegNetY as timm builds them (`RegNet`; Radosavovic et al. 2020, "Designing Network Design Spaces",
//! section 3.3), as baselines of the benchmark. Widths follow the paper's linear rule.

use serde_json::{Map, Value};

use super::activation::Activation;
use super::batch_normed::{BatchNormedBlock, BatchNormedPlan, Shortcut};
use super::{
    Arguments, Attention, Conv, Ends, Evaluation, Init, NetError, Norm, activation_argument, bad_argument,
    check_ranges, make_divisible, output_stride,
};

/// PyTorch's default for `BatchNorm2d`.
const EPS: f64 = 1e-5;
/// Number of stages of every network.
const STAGES: usize = 4;

/// Configuration of an architecture (timm `RegNetCfg`).
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct RegNetConfig {
    pub depth: usize,
    pub w0: usize,
    pub wa: f64,
    pub wm: f64,
    pub group_size: usize,
    pub bottle_ratio: f64,
    pub se_ratio: f64,
    /// If above 0, bottleneck widths are rounded as torchvision does.
    pub group_min_ratio: f64,
    pub stem_width: usize,
    pub linear_out: bool,
    pub num_features: usize,
    pub act_layer: String,
}

/// A stage: width, depth, and channels per group of its 3x3 convolutions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stage {
    width: usize,
    depth: usize,
    group_size: usize,
}

impl RegNetConfig {
    /// Overrides the configuration with `args` and plans the network.
    pub fn plan(mut self, architecture: &str, args: &Map<String, Value>) -> Result<BatchNormedPlan, NetError> {
        let mut args = Arguments::new(architecture, args);
        let ends = args.ends()?;
        let output_stride = output_stride(&mut args)?;
        let (mut preact, mut downsample) = (false, "conv1x1".to_string());
        args.set("depth", &mut self.depth)?;
        args.set("w0", &mut self.w0)?;
        args.set("wa", &mut self.wa)?;
        args.set("wm", &mut self.wm)?;
        args.set("group_size", &mut self.group_size)?;
        args.set("bottle_ratio", &mut self.bottle_ratio)?;
        args.set("se_ratio", &mut self.se_ratio)?;
        args.set("group_min_ratio", &mut self.group_min_ratio)?;
        args.set("stem_width", &mut self.stem_width)?;
        args.set("linear_out", &mut self.linear_out)?;
        args.set("num_features", &mut self.num_features)?;
        args.set("act_layer", &mut self.act_layer)?;
        args.set("preact", &mut preact)?;
        args.set("downsample", &mut downsample)?;
        args.ignore(&["zero_init_last"]);
        args.finish()?;
        let refuse = |name: &str, value: Value, reason: &str| Err(bad_argument(name, &value, reason.into()));
        if preact {
            return refuse("preact", true.into(), "only post-activation networks are supported");
        }
        if downsample != "conv1x1" {
            return refuse("downsample", downsample.into(), "only `conv1x1` is supported");
        }
        self.network(ends, output_stride)
    }

    fn network(&self, ends: Ends, output_stride: usize) -> Result<BatchNormedPlan, NetError> {
        let activation = self.check()?;
        let stem = Conv::square("stem.conv".into(), (ends.in_chans, self.stem_width), 3, 2, norm("stem.bn"));
        let (mut in_chs, mut blocks) = (self.stem_width, Vec::new());
        let (mut net_stride, mut dilation) = (2, 1);
        for (s, stage) in self.stages()?.into_iter().enumerate() {
            let stage_stride = if net_stride >= output_stride { 1 } else { 2 };
            if stage_stride == 1 {
                dilation *= 2;
            }
            net_stride *= stage_stride;
            for index in 0..stage.depth {
                let shape = BlockShape {
                    name: format!("s{}.b{}", s + 1, index + 1),
                    in_chs,
                    stage,
                    stride: if index == 0 { stage_stride } else { 1 },
                    // a stage's first block has the dilation of the previous stage
                    first_dilation: match index {
                        0 if dilation <= 2 => 1,
                        0 => 2,
                        _ => dilation,
                    },
                    dilation,
                };
                blocks.push(self.block(shape, activation)?);
                in_chs = stage.width;
            }
        }
        let wide = self.num_features;
        let final_conv =
            (wide > 0).then(|| Conv::pointwise("final_conv.conv".into(), in_chs, wide, norm("final_conv.bn")));
        Ok(BatchNormedPlan {
            family: "regnet",
            activation,
            stem,
            blocks,
            final_act: final_conv.is_none() && self.linear_out,
            num_features: final_conv.as_ref().map_or(in_chs, |c| c.out_chs),
            final_conv,
            classifier: "head.fc",
            classifier_init: Init::Normal(0.01),
            zero_init_last: true,
            same_padding: false,
            pool: ends.pool,
            classes: ends.classes,
        })
    }

    fn check(&self) -> Result<Activation, NetError> {
        check_ranges([
            ("depth", self.depth, 1..=1000),
            ("w0", self.w0, 8..=4096),
            ("group_size", self.group_size, 1..=4096),
            ("stem_width", self.stem_width, 1..=4096),
            ("num_features", self.num_features, 0..=65_536),
        ])?;
        check_ranges([
            ("wa", self.wa, 0.0..=1e4),
            ("wm", self.wm, 1.001..=64.0),
            ("bottle_ratio", self.bottle_ratio, 0.01..=16.0),
            ("se_ratio", self.se_ratio, 0.0..=16.0),
            ("group_min_ratio", self.group_min_ratio, 0.0..=1.0),
        ])?;
        if !self.w0.is_multiple_of(8) {
            return Err(bad_argument("w0", &self.w0.into(), "must be a multiple of 8".into()));
        }
        activation_argument(&self.act_layer)
    }

    /// Widths of blocks by the paper's rule (equations 2 to 4), in single precision as in timm. Blocks of equal width
    /// form a stage, whose width is then adjusted to its groups.
    fn stages(&self) -> Result<Vec<Stage>, NetError> {
        let (w0, wm) = (self.w0 as f32, self.wm.ln() as f32);
        let width = |block: usize| {
            let exponent = ((block as f32 * self.wa as f32 + w0) / w0).ln() / wm;
            let wide = w0 * (self.wm as f32).powf(exponent.round_ties_even());
            ((wide / 8.0).round_ties_even() * 8.0) as usize
        };
        let mut stages: Vec<Stage> = Vec::new();
        for width in (0..self.depth).map(width) {
            match stages.last_mut() {
                Some(stage) if stage.width == width => stage.depth += 1,
                _ => stages.push(Stage { width, depth: 1, group_size: self.group_size }),
            }
        }
        if stages.len() != STAGES || stages.iter().any(|s| !(1..=65_536).contains(&s.width)) {
            let value = Value::from(stages.iter().map(|s| s.width).collect::<Vec<_>>());
            return Err(bad_argument("w0, wa, wm, depth", &value, format!("{STAGES} stage widths are needed")));
        }
        for stage in &mut stages {
            let bottleneck = (stage.width as f64 * self.bottle_ratio) as usize;
            stage.group_size = self.group_size.min(bottleneck).max(1);
            let size = stage.group_size;
            let fitted = if self.group_min_ratio > 0.0 {
                make_divisible(bottleneck as f64, size, 0.9)
            } else {
                (bottleneck as f64 / size as f64).round_ties_even() as usize * size
            };
            stage.width = (fitted as f64 / self.bottle_ratio) as usize;
            if stage.width == 0 {
                return Err(bad_argument("group_size", &self.group_size.into(), "leaves a stage no channel".into()));
            }
        }
        Ok(stages)
    }

    fn block(&self, shape: BlockShape, activation: Activation) -> Result<BatchNormedBlock, NetError> {
        let BlockShape { name, in_chs, stage, stride, first_dilation, dilation } = shape;
        let Stage { width, group_size, .. } = stage;
        let mid = (width as f64 * self.bottle_ratio).round_ties_even() as usize;
        let groups = mid / group_size;
        if groups == 0 || !mid.is_multiple_of(groups) {
            let reason = format!("does not divide the {mid} bottleneck channels of `{name}`");
            return Err(bad_argument("group_size", &self.group_size.into(), reason));
        }
        let reduced = (in_chs as f64 * self.se_ratio).round_ties_even() as usize;
        if self.se_ratio > 0.0 && reduced == 0 {
            return Err(bad_argument("se_ratio", &self.se_ratio.into(), format!("leaves `{name}.se` no channel")));
        }
        let fc = |leaf: &str, from, to| Conv::pointwise(format!("{name}.se.{leaf}"), from, to, Norm::Plain);
        let point = |leaf: &str, from, to| {
            Conv::pointwise(format!("{name}.{leaf}.conv"), from, to, norm(&format!("{name}.{leaf}.bn")))
        };
        let grouped =
            Conv::square(format!("{name}.conv2.conv"), (mid, mid), 3, stride, norm(&format!("{name}.conv2.bn")));
        Ok(BatchNormedBlock {
            convs: vec![
                point("conv1", in_chs, mid),
                Conv { groups, dilation: first_dilation, ..grouped },
                point("conv3", mid, width),
            ],
            attention: (reduced > 0).then(|| Attention::SqueezeExcite {
                fc1: fc("fc1", mid, reduced),
                fc2: fc("fc2", reduced, mid),
                activation,
            }),
            shortcut: if in_chs == width && stride == 1 && first_dilation == dilation {
                Shortcut::Identity
            } else {
                Shortcut::Conv(Conv { stride, ..point("downsample", in_chs, width) })
            },
            activated: !self.linear_out,
            branch_activated: false,
            name,
        })
    }
}

/// Parameters that depend on a block's position in the network.
struct BlockShape {
    name: String,
    in_chs: usize,
    stage: Stage,
    stride: usize,
    /// Dilation of its 3x3 convolution.
    first_dilation: usize,
    /// Dilation of the stage.
    dilation: usize,
}

fn norm(layer: &str) -> Norm {
    Norm::BatchNorm { layer: layer.into(), eps: EPS }
}

/// Names of the family's architectures.
pub const VARIANTS: [&str; 30] = [
    "regnety_002",
    "regnety_004",
    "regnety_006",
    "regnety_008",
    "regnety_008_tv",
    "regnety_016",
    "regnety_032",
    "regnetx_002",
    "regnetx_004",
    "regnetx_004_tv",
    "regnetx_006",
    "regnetx_008",
    "regnetx_016",
    "regnetx_032",
    "regnetx_040",
    "regnetx_064",
    "regnetx_080",
    "regnetx_120",
    "regnetx_160",
    "regnetx_320",
    "regnety_040",
    "regnety_064",
    "regnety_080",
    "regnety_080_tv",
    "regnety_120",
    "regnety_160",
    "regnety_320",
    "regnety_640",
    "regnety_1280",
    "regnety_2560",
];

/// timm's configuration of an architecture.
pub fn variant(name: &str) -> Option<RegNetConfig> {
    let (depth, w0, wa, wm, group_size) = match name {
        "regnety_002" => (13, 24, 36.44, 2.49, 8),
        "regnety_004" => (16, 48, 27.89, 2.09, 8),
        "regnety_006" => (15, 48, 32.54, 2.32, 16),
        "regnety_008" | "regnety_008_tv" => (14, 56, 38.84, 2.4, 16),
        "regnety_016" => (27, 48, 20.71, 2.65, 24),
        "regnety_032" => (21, 80, 42.63, 2.66, 24),
        "regnetx_002" => (13, 24, 36.44, 2.49, 8),
        "regnetx_004" | "regnetx_004_tv" => (22, 24, 24.48, 2.54, 16),
        "regnetx_006" => (16, 48, 36.97, 2.24, 24),
        "regnetx_008" => (16, 56, 35.73, 2.28, 16),
        "regnetx_016" => (18, 80, 34.01, 2.25, 24),
        "regnetx_032" => (25, 88, 26.31, 2.25, 48),
        "regnetx_040" => (23, 96, 38.65, 2.43, 40),
        "regnetx_064" => (17, 184, 60.83, 2.07, 56),
        "regnetx_080" => (23, 80, 49.56, 2.88, 120),
        "regnetx_120" => (19, 168, 73.36, 2.37, 112),
        "regnetx_160" => (22, 216, 55.59, 2.1, 128),
        "regnetx_320" => (23, 320, 69.86, 2.0, 168),
        "regnety_040" => (22, 96, 31.41, 2.24, 64),
        "regnety_064" => (25, 112, 33.22, 2.27, 72),
        "regnety_080" | "regnety_080_tv" => (17, 192, 76.82, 2.19, 56),
        "regnety_120" => (19, 168, 73.36, 2.37, 112),
        "regnety_160" => (18, 200, 106.23, 2.48, 112),
        "regnety_320" => (20, 232, 115.89, 2.53, 232),
        "regnety_640" => (20, 352, 147.48, 2.4, 328),
        "regnety_1280" => (27, 456, 160.83, 2.52, 264),
        "regnety_2560" => (27, 640, 230.83, 2.53, 373),
        _ => return None,
    };
    Some(RegNetConfig {
        depth,
        w0,
        wa,
        wm,
        group_size,
        bottle_ratio: 1.0,
        se_ratio: if name.starts_with("regnetx") { 0.0 } else { 0.25 },
        group_min_ratio: if name.ends_with("_tv") { 0.9 } else { 0.0 },
        stem_width: 32,
        linear_out: false,
        num_features: 0,
        act_layer: "relu".into(),
    })
}

/// timm's evaluation settings of an architecture.
pub fn evaluation(name: &str) -> Option<Evaluation> {
    let name = VARIANTS[..7].iter().find(|v| **v == name)?;
    let (test_input, crop_pct, test_crop_pct) = match *name {
        "regnety_004" | "regnety_008_tv" | "regnety_016" => (None, 0.965, None),
        "regnety_032" => (Some(288), 0.95, Some(1.0)),
        _ => (None, 0.875, None),
    };
    Some(Evaluation { input: 224, test_input, crop_pct, test_crop_pct, ..Evaluation::USUAL })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(name: &str, args: Value) -> Result<BatchNormedPlan, NetError> {
        let args = args.as_object().cloned().unwrap_or_default();
        variant(name).expect("known").plan(name, &args)
    }

    /// The paper's final networks (figure 16 and appendix): widths and depths.
    #[test]
    fn widths_are_the_papers() {
        for (name, widths, depths) in [
            ("regnety_008", [64, 128, 320, 768], [1, 3, 8, 2]),
            ("regnety_016", [48, 120, 336, 888], [2, 6, 17, 2]),
            ("regnety_032", [72, 216, 576, 1512], [2, 5, 13, 1]),
        ] {
            let stages = variant(name).expect("known").stages().expect("plans");
            assert_eq!(stages.iter().map(|s| s.width).collect::<Vec<_>>(), widths, "{name}");
            assert_eq!(stages.iter().map(|s| s.depth).collect::<Vec<_>>(), depths, "{name}");
        }
    }

    #[test]
    fn arguments_are_refused_by_name() {
        for (args, what) in [
            (serde_json::json!({"preact": true}), "`preact`"),
            (serde_json::json!({"downsample": "avg"}), "`downsample`"),
            (serde_json::json!({"output_stride": 5}), "`output_stride`"),
            (serde_json::json!({"depth": 0}), "`depth`"),
            (serde_json::json!({"wm": 1.0}), "`wm`"),
            (serde_json::json!({"depth": 2}), "stage widths"),
            (serde_json::json!({"depths": [1]}), "`depths`"),
            (serde_json::json!({"act_layer": "softmax"}), "`act_layer`"),
            (serde_json::json!({"se_ratio": 0.001}), "`se_ratio`"),
        ] {
            let error = plan("regnety_008", args).expect_err(what).to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
