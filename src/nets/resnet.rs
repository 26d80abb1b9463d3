//! Batch-normalised residual networks as timm builds them (`ResNet`), as baselines of the benchmark.

use serde_json::{Map, Value};

use super::activation::Activation;
use super::{
    Arguments, Attention, Conv, Ends, Evaluation, Init, NetError, Norm, Pool, ShortcutPool, TensorSpec,
    activation_argument, bad_argument, check_ranges, check_stages, make_divisible, output_stride,
};

/// PyTorch's default for `BatchNorm2d`.
const EPS: f64 = 1e-5;

/// Configuration of an architecture.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct ResNetConfig {
    pub bottleneck: bool,
    pub layers: Vec<usize>,
    pub channels: Vec<usize>,
    pub stem_type: String,
    pub stem_width: usize,
    pub avg_down: bool,
    pub cardinality: usize,
    pub base_width: usize,
    pub act_layer: String,
    /// Attention after a branch's last convolution: `se`, `eca` or none.
    pub attn_layer: Option<String>,
    /// Reduced channels of squeeze-and-excitation, as a share of the map's channels.
    pub se_ratio: f64,
    /// A convolution of stride 2 instead of pooling after the stem.
    pub replace_stem_pool: bool,
}

/// timm's `block_args`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockArgs {
    attn_layer: Option<String>,
}

/// Plan of a residual network: every convolution with name and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct ResNetPlan {
    /// Activation.
    pub activation: Activation,
    /// Stem convolutions, each followed by the activation.
    pub stem: Vec<Conv>,
    /// Max pooling 3x3, stride 2, padding 1 after the stem.
    pub stem_pool: bool,
    /// Residual blocks in order.
    pub blocks: Vec<ResNetBlock>,
    /// Channels of the last feature map.
    pub num_features: usize,
    /// Pooling before the classifier.
    pub pool: Pool,
    /// Number of classes.
    pub classes: usize,
}

/// A block: `act(f(x) + shortcut)`.
#[derive(Debug, Clone, PartialEq)]
pub struct ResNetBlock {
    /// Module path, `layerN.B`.
    pub name: String,
    /// Convolutions of the branch; the activation runs between them, not after the last.
    pub convs: Vec<Conv>,
    /// Attention on the output of the last convolution.
    pub attention: Option<Attention>,
    /// Pooling on the shortcut, before `downsample`.
    pub pool: ShortcutPool,
    /// Convolution on the shortcut; absent for an identity shortcut.
    pub downsample: Option<Conv>,
}

fn norm(layer: String) -> Norm {
    Norm::BatchNorm { layer, eps: EPS }
}

impl ResNetPlan {
    /// Overrides `config` with `args` and plans the network.
    pub fn new(architecture: &str, mut config: ResNetConfig, args: &Map<String, Value>) -> Result<Self, NetError> {
        let mut args = Arguments::new(architecture, args);
        let ends = args.ends()?;
        let output_stride = output_stride(&mut args)?;
        args.set("layers", &mut config.layers)?;
        args.set("channels", &mut config.channels)?;
        args.set("stem_type", &mut config.stem_type)?;
        args.set("stem_width", &mut config.stem_width)?;
        args.set("avg_down", &mut config.avg_down)?;
        args.set("cardinality", &mut config.cardinality)?;
        args.set("base_width", &mut config.base_width)?;
        args.set("act_layer", &mut config.act_layer)?;
        args.set("replace_stem_pool", &mut config.replace_stem_pool)?;
        let mut block_args = None;
        args.set::<Option<BlockArgs>>("block_args", &mut block_args)?;
        if let Some(BlockArgs { attn_layer }) = block_args {
            config.attn_layer = attn_layer;
        }
        args.ignore(&["zero_init_last"]);
        args.finish()?;
        config.plan(ends, output_stride)
    }

    /// All tensors of a checkpoint, in module order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut out = Vec::new();
        let conv = |out: &mut Vec<TensorSpec>, c: &Conv, scale: f32| {
            let fan_out = c.out_chs * c.kernel * c.kernel;
            let std = (2.0 / fan_out as f64).sqrt();
            out.push(TensorSpec::new(format!("{}.weight", c.name), &c.weight_shape(), Init::Normal(std)));
            let Norm::BatchNorm { layer, .. } = &c.norm else { return };
            out.extend(TensorSpec::batch_norm(layer, c.out_chs, scale));
        };
        self.stem.iter().for_each(|c| conv(&mut out, c, 1.0));
        for block in &self.blocks {
            let last = block.convs.len() - 1;
            // timm initialises every branch to zero, by the weight of its last norm
            block.convs.iter().enumerate().for_each(|(i, c)| conv(&mut out, c, if i == last { 0.0 } else { 1.0 }));
            match &block.attention {
                Some(Attention::SqueezeExcite { fc1, fc2, .. }) => {
                    for fc in [fc1, fc2] {
                        conv(&mut out, fc, 1.0);
                        out.push(TensorSpec::new(format!("{}.bias", fc.name), &[fc.out_chs], Init::Constant(0.0)));
                    }
                }
                Some(Attention::Efficient { name, kernel, .. }) => {
                    let init = Init::Uniform((*kernel as f64).sqrt().recip());
                    out.push(TensorSpec::new(format!("{name}.weight"), &[1, 1, *kernel], init));
                }
                None => {}
            }
            block.downsample.iter().for_each(|c| conv(&mut out, c, 1.0));
        }
        let features = self.pool.features(self.num_features);
        let bound = Init::Uniform((features as f64).sqrt().recip());
        out.push(TensorSpec::new("fc.weight".into(), &[self.classes, features], bound));
        out.push(TensorSpec::new("fc.bias".into(), &[self.classes], bound));
        out
    }
}

impl ResNetConfig {
    fn check(&self) -> Result<Activation, NetError> {
        check_stages(["layers", "channels"], &self.layers, &self.channels)?;
        check_ranges([
            ("stem_width", self.stem_width, 1..=4096),
            ("cardinality", self.cardinality, 1..=4096),
            ("base_width", self.base_width, 1..=4096),
        ])?;
        if !self.bottleneck && (self.cardinality != 1 || self.base_width != 64) {
            let value = Value::from(self.cardinality);
            return Err(bad_argument(
                "cardinality",
                &value,
                "basic blocks take only cardinality 1, base_width 64".into(),
            ));
        }
        activation_argument(&self.act_layer)
    }

    fn plan(&self, ends: Ends, output_stride: usize) -> Result<ResNetPlan, NetError> {
        let activation = self.check()?;
        let mut stem = self.stem(ends.in_chans)?;
        if self.replace_stem_pool {
            let chs = stem.last().map_or(64, |c| c.out_chs);
            stem.push(Conv::square("maxpool.0".into(), (chs, chs), 3, 2, norm("maxpool.1".into())));
        }
        let expansion = if self.bottleneck { 4 } else { 1 };
        let mut in_chs = stem.last().map_or(64, |c| c.out_chs);
        let mut blocks = Vec::new();
        let (mut net_stride, mut dilation, mut first_dilation) = (4, 1, 1);
        for (stage, (&depth, &planes)) in self.layers.iter().zip(&self.channels).enumerate() {
            let mut stage_stride = if stage > 0 { 2 } else { 1 };
            if net_stride >= output_stride {
                dilation *= stage_stride;
                stage_stride = 1;
            }
            net_stride *= stage_stride;
            for index in 0..depth {
                let name = format!("layer{}.{index}", stage + 1);
                let stride = if index == 0 { stage_stride } else { 1 };
                let out_chs = planes * expansion;
                let downsample = index == 0 && (stride != 1 || in_chs != out_chs);
                let pool = match (downsample && self.avg_down, stride, dilation) {
                    (false, ..) | (true, 1, 1) => ShortcutPool::None,
                    (true, 1, _) => ShortcutPool::AverageSame,
                    (true, ..) => ShortcutPool::Average2,
                };
                // the module is a sequence: [convolution, norm], or [pool, convolution, norm]
                let first = if self.avg_down { 1 } else { 0 };
                blocks.push(ResNetBlock {
                    convs: self.branch(&name, in_chs, planes, (stride, first_dilation, dilation))?,
                    attention: self.attention(&name, out_chs)?,
                    pool,
                    downsample: downsample.then(|| Conv {
                        stride: if self.avg_down { 1 } else { stride },
                        ..Conv::pointwise(
                            format!("{name}.downsample.{first}"),
                            in_chs,
                            out_chs,
                            norm(format!("{name}.downsample.{}", first + 1)),
                        )
                    }),
                    name,
                });
                (in_chs, first_dilation) = (out_chs, dilation);
            }
        }
        let stem_pool = !self.replace_stem_pool;
        let Ends { pool, classes, .. } = ends;
        Ok(ResNetPlan { activation, stem, stem_pool, blocks, num_features: in_chs, pool, classes })
    }

    fn stem(&self, in_chans: usize) -> Result<Vec<Conv>, NetError> {
        let w = self.stem_width;
        let first = match self.stem_type.as_str() {
            "" => return Ok(vec![Conv::square("conv1".into(), (in_chans, 64), 7, 2, norm("bn1".into()))]),
            "deep" => w,
            "deep_tiered" => 3 * (w / 4),
            other => return Err(bad_argument("stem_type", &other.into(), "one of ``, deep, deep_tiered".into())),
        };
        if first == 0 {
            return Err(bad_argument("stem_width", &w.into(), "too small for deep_tiered".into()));
        }
        let conv =
            |i: usize, chs, stride, layer: &str| Conv::square(format!("conv1.{i}"), chs, 3, stride, norm(layer.into()));
        Ok(vec![
            conv(0, (in_chans, first), 2, "conv1.1"),
            conv(3, (first, w), 1, "conv1.4"),
            conv(6, (w, 2 * w), 1, "bn1"),
        ])
    }

    fn attention(&self, block: &str, chs: usize) -> Result<Option<Attention>, NetError> {
        let module = format!("{block}.se");
        match self.attn_layer.as_deref() {
            None | Some("") => Ok(None),
            Some("se") => {
                let reduced = make_divisible(chs as f64 * self.se_ratio, 8, 0.0);
                Ok(Some(Attention::squeeze_excite(&module, chs, reduced)))
            }
            Some("eca") => Ok(Some(Attention::efficient(&module, chs))),
            Some(other) => {
                Err(bad_argument("block_args", &serde_json::json!({"attn_layer": other}), "`se`, `eca` or null".into()))
            }
        }
    }

    /// Plans the branch. The third argument: stride and dilation of the first 3x3 convolution, dilation of the second.
    fn branch(
        &self,
        name: &str,
        in_chs: usize,
        planes: usize,
        (stride, first_dilation, dilation): (usize, usize, usize),
    ) -> Result<Vec<Conv>, NetError> {
        let square = |i: usize, chs: (usize, usize), stride, dilation| Conv {
            dilation,
            ..Conv::square(format!("{name}.conv{i}"), chs, 3, stride, norm(format!("{name}.bn{i}")))
        };
        if !self.bottleneck {
            let first = square(1, (in_chs, planes), stride, first_dilation);
            return Ok(vec![first, square(2, (planes, planes), 1, dilation)]);
        }
        let width = planes * self.base_width / 64 * self.cardinality;
        if width == 0 || !width.is_multiple_of(self.cardinality) {
            let reason = format!("leaves `{name}` {width} channels in {} groups", self.cardinality);
            return Err(bad_argument("base_width", &self.base_width.into(), reason));
        }
        let point =
            |i: usize, from, to| Conv::pointwise(format!("{name}.conv{i}"), from, to, norm(format!("{name}.bn{i}")));
        Ok(vec![
            point(1, in_chs, width),
            Conv { groups: self.cardinality, ..square(2, (width, width), stride, first_dilation) },
            point(3, width, planes * 4),
        ])
    }
}

/// Names of the family's architectures.
pub const VARIANTS: [&str; 63] = [
    "resnet18",
    "resnet18d",
    "resnet26",
    "resnet26d",
    "resnet34",
    "resnet34d",
    "resnet50",
    "resnet50d",
    "resnet101",
    "resnet101d",
    "resnet152",
    "resnet152d",
    "resnext50_32x4d",
    "resnet10t",
    "resnet14t",
    "resnet26t",
    "resnet50t",
    "resnet200",
    "resnet200d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50d_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_32x16d",
    "resnext101_32x32d",
    "resnext101_64x4d",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet50t",
    "seresnet101",
    "seresnet152",
    "seresnet152d",
    "seresnext26d_32x4d",
    "seresnext26t_32x4d",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
    "seresnext101_32x8d",
    "seresnext101_64x4d",
    "ecaresnet26t",
    "ecaresnet50d",
    "ecaresnet50t",
    "ecaresnet101d",
    "ecaresnet200d",
    "ecaresnetlight",
    "resnetrs50",
    "resnetrs101",
    "resnetrs152",
    "resnetrs200",
    "resnetrs270",
    "resnetrs350",
    "resnetrs420",
    "resnet50c",
    "resnet101c",
    "resnet152c",
    "resnet50s",
    "resnet101s",
    "resnet152s",
    "seresnet200d",
    "seresnet269d",
    "seresnext101d_32x8d",
    "ecaresnet269d",
];

/// timm's configuration of an architecture, parsed from its name: attention, width, depth, stem, groups.
pub fn variant(name: &str) -> Option<ResNetConfig> {
    let name = VARIANTS.into_iter().find(|v| *v == name)?;
    let (attention, rest) = match name {
        _ if name.starts_with("seres") => (Some("se"), &name[2..]),
        _ if name.starts_with("ecares") => (Some("eca"), &name[3..]),
        _ => (None, name),
    };
    let wide = rest.starts_with("wide_");
    let scaled = rest.starts_with("resnetrs");
    let rest = rest.trim_start_matches("wide_").trim_start_matches("resne");
    let rest = rest.trim_start_matches(['t', 'x']).trim_start_matches("rs");
    let (depth, groups) = rest.split_once('_').unwrap_or((rest, ""));
    let stem = depth.trim_start_matches(|c: char| c.is_ascii_digit());
    let light = depth == "light";
    let depth = if light { depth } else { depth.trim_end_matches(['c', 'd', 's', 't']) };
    let layers = match depth {
        "10" | "14" => [1, 1, 1, 1],
        "18" | "26" => [2, 2, 2, 2],
        "101" => [3, 4, 23, 3],
        "152" => [3, 8, 36, 3],
        "200" => [3, 24, 36, 3],
        "269" => [3, 30, 48, 8],
        "270" => [4, 29, 53, 4],
        "350" => [4, 36, 72, 4],
        "420" => [4, 44, 87, 4],
        "light" => [1, 1, 11, 3],
        _ => [3, 4, 6, 3],
    };
    // `32x4d`: 32 groups of 4 channels
    let groups = groups.strip_suffix('d').and_then(|g| g.split_once('x'));
    let groups = groups.and_then(|(count, width)| Some((count.parse().ok()?, width.parse().ok()?)));
    let (cardinality, base_width) = groups.unwrap_or((1, if wide { 128 } else { 64 }));
    let (deep, tiered) = ((matches!(stem, "c" | "d" | "s") || scaled) && !light, stem == "t" && !light);
    Some(ResNetConfig {
        bottleneck: !matches!(depth, "10" | "18" | "34"),
        layers: layers.to_vec(),
        channels: vec![64, 128, 256, 512],
        stem_type: if deep {
            "deep"
        } else if tiered {
            "deep_tiered"
        } else {
            ""
        }
        .into(),
        stem_width: if (deep && stem != "s") || tiered || light { 32 } else { 64 },
        avg_down: (deep && !matches!(stem, "c" | "s")) || tiered || light,
        cardinality,
        base_width,
        act_layer: "relu".into(),
        attn_layer: attention.map(String::from).or(scaled.then(|| "se".into())),
        se_ratio: if scaled { 0.25 } else { 1.0 / 16.0 },
        replace_stem_pool: scaled,
    })
}

/// timm's evaluation settings of an architecture.
pub fn evaluation(name: &str) -> Option<Evaluation> {
    let name = VARIANTS[..13].iter().find(|v| **v == name)?;
    let (input, test, crop_pct, test_crop_pct) = match *name {
        "resnet101d" | "resnet152d" => (256, 320, 0.95, 1.0),
        "resnet18d" | "resnet26" | "resnet26d" | "resnet34d" | "resnet50d" => (224, 288, 0.875, 0.95),
        _ => (224, 288, 0.95, 1.0),
    };
    let (test_input, test_crop_pct) = (Some(test), Some(test_crop_pct));
    Some(Evaluation { input, test_input, crop_pct, test_crop_pct, ..Evaluation::USUAL })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_plans() {
        for name in VARIANTS {
            let plan = ResNetPlan::new(name, variant(name).expect("known"), &Map::new());
            plan.unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}
