//! Batch-normalised residual networks as timm builds them (`ResNet`): the opponents of the benchmark.

use serde_json::{Map, Value};

use super::activation::{ACTIVATIONS, Activation};
use super::{Arguments, Conv, Evaluation, Init, NetError, Norm, ShortcutPool, TensorSpec, bad_argument, check_stages};

/// PyTorch's default of `BatchNorm2d`.
const EPS: f64 = 1e-5;

/// What makes one architecture of the family.
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
}

/// A residual network, every convolution named and sized.
#[derive(Debug, Clone, PartialEq)]
pub struct ResNetPlan {
    /// Activation.
    pub activation: Activation,
    /// Stem convolutions, each followed by the activation; then max pooling 3x3, stride 2, padding 1.
    pub stem: Vec<Conv>,
    /// Residual blocks in order.
    pub blocks: Vec<ResNetBlock>,
    /// Channels that the classifier sees.
    pub num_features: usize,
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
    /// Pooling on the shortcut, before `downsample`.
    pub pool: ShortcutPool,
    /// Convolution on the shortcut; absent where input and output agree.
    pub downsample: Option<Conv>,
}

fn norm(layer: String) -> Norm {
    Norm::BatchNorm { layer, eps: EPS }
}

impl ResNetPlan {
    /// Lays `args` over `config` and plans the network.
    pub fn new(architecture: &str, mut config: ResNetConfig, args: &Map<String, Value>) -> Result<Self, NetError> {
        let mut args = Arguments::new(architecture, args);
        let classes = args.classifier()?;
        args.set("layers", &mut config.layers)?;
        args.set("channels", &mut config.channels)?;
        args.set("stem_type", &mut config.stem_type)?;
        args.set("stem_width", &mut config.stem_width)?;
        args.set("avg_down", &mut config.avg_down)?;
        args.set("cardinality", &mut config.cardinality)?;
        args.set("base_width", &mut config.base_width)?;
        args.set("act_layer", &mut config.act_layer)?;
        args.ignore(&["zero_init_last"]);
        args.finish()?;
        config.plan(classes)
    }

    /// Every tensor of a checkpoint, in module order.
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
            // timm starts every branch at zero: the last layer's weight
            block.convs.iter().enumerate().for_each(|(i, c)| conv(&mut out, c, if i == last { 0.0 } else { 1.0 }));
            block.downsample.iter().for_each(|c| conv(&mut out, c, 1.0));
        }
        let bound = Init::Uniform((self.num_features as f64).sqrt().recip());
        out.push(TensorSpec::new("fc.weight".into(), &[self.classes, self.num_features], bound));
        out.push(TensorSpec::new("fc.bias".into(), &[self.classes], bound));
        out
    }
}

impl ResNetConfig {
    fn check(&self) -> Result<Activation, NetError> {
        check_stages(["layers", "channels"], &self.layers, &self.channels)?;
        for (name, value) in
            [("stem_width", self.stem_width), ("cardinality", self.cardinality), ("base_width", self.base_width)]
        {
            if !(1..=4096).contains(&value) {
                return Err(bad_argument(name, &value.into(), "must lie in 1..=4096".into()));
            }
        }
        if !self.bottleneck && (self.cardinality != 1 || self.base_width != 64) {
            let value = Value::from(self.cardinality);
            return Err(bad_argument(
                "cardinality",
                &value,
                "basic blocks take only cardinality 1, base_width 64".into(),
            ));
        }
        let known = || ACTIVATIONS.map(Activation::name).join(", ");
        Activation::parse(&self.act_layer)
            .ok_or_else(|| bad_argument("act_layer", &self.act_layer.as_str().into(), format!("known are {}", known())))
    }

    fn plan(&self, classes: usize) -> Result<ResNetPlan, NetError> {
        let activation = self.check()?;
        let stem = self.stem()?;
        let expansion = if self.bottleneck { 4 } else { 1 };
        let mut in_chs = stem.last().map_or(64, |c| c.out_chs);
        let mut blocks = Vec::new();
        for (stage, (&depth, &planes)) in self.layers.iter().zip(&self.channels).enumerate() {
            for index in 0..depth {
                let name = format!("layer{}.{index}", stage + 1);
                let stride = if index == 0 && stage > 0 { 2 } else { 1 };
                let out_chs = planes * expansion;
                let downsample = index == 0 && (stride != 1 || in_chs != out_chs);
                let pooled = downsample && self.avg_down && stride != 1;
                // the module is a sequence: [convolution, norm], or [pool, convolution, norm]
                let first = if self.avg_down { 1 } else { 0 };
                blocks.push(ResNetBlock {
                    convs: self.branch(&name, in_chs, planes, stride)?,
                    pool: if pooled { ShortcutPool::Average2 } else { ShortcutPool::None },
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
                in_chs = out_chs;
            }
        }
        Ok(ResNetPlan { activation, stem, blocks, num_features: in_chs, classes })
    }

    fn stem(&self) -> Result<Vec<Conv>, NetError> {
        let w = self.stem_width;
        let first = match self.stem_type.as_str() {
            "" => return Ok(vec![Conv::square("conv1".into(), (3, 64), 7, 2, norm("bn1".into()))]),
            "deep" => w,
            "deep_tiered" => 3 * (w / 4),
            other => return Err(bad_argument("stem_type", &other.into(), "one of ``, deep, deep_tiered".into())),
        };
        if first == 0 {
            return Err(bad_argument("stem_width", &w.into(), "too small for deep_tiered".into()));
        }
        let conv =
            |i: usize, chs, stride, layer: &str| Conv::square(format!("conv1.{i}"), chs, 3, stride, norm(layer.into()));
        Ok(vec![conv(0, (3, first), 2, "conv1.1"), conv(3, (first, w), 1, "conv1.4"), conv(6, (w, 2 * w), 1, "bn1")])
    }

    fn branch(&self, name: &str, in_chs: usize, planes: usize, stride: usize) -> Result<Vec<Conv>, NetError> {
        let square = |i: usize, chs: (usize, usize), stride| {
            Conv::square(format!("{name}.conv{i}"), chs, 3, stride, norm(format!("{name}.bn{i}")))
        };
        if !self.bottleneck {
            return Ok(vec![square(1, (in_chs, planes), stride), square(2, (planes, planes), 1)]);
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
            Conv { groups: self.cardinality, ..square(2, (width, width), stride) },
            point(3, width, planes * 4),
        ])
    }
}

/// Names of the family's architectures.
pub const VARIANTS: [&str; 13] = [
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
];

/// timm's configuration of an architecture.
pub fn variant(name: &str) -> Option<ResNetConfig> {
    let name = VARIANTS.into_iter().find(|v| *v == name)?;
    let next = name == "resnext50_32x4d";
    let depth = name.trim_start_matches("resnet").trim_end_matches('d');
    let layers = match depth {
        "18" | "26" => [2, 2, 2, 2],
        "101" => [3, 4, 23, 3],
        "152" => [3, 8, 36, 3],
        _ => [3, 4, 6, 3],
    };
    let deep = !next && name.ends_with('d');
    Some(ResNetConfig {
        bottleneck: !matches!(depth, "18" | "34"),
        layers: layers.to_vec(),
        channels: vec![64, 128, 256, 512],
        stem_type: if deep { "deep" } else { "" }.into(),
        stem_width: if deep { 32 } else { 64 },
        avg_down: deep,
        cardinality: if next { 32 } else { 1 },
        base_width: if next { 4 } else { 64 },
        act_layer: "relu".into(),
    })
}

/// timm's evaluation settings of an architecture.
pub fn evaluation(name: &str) -> Option<Evaluation> {
    let name = VARIANTS.into_iter().find(|v| *v == name)?;
    let (input, test, crop_pct, test_crop_pct) = match name {
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
