//! Normalizer-Free networks as timm builds them (`NormFreeNet`, `NfCfg`): NF-ResNet, NF-RegNet and NFNet.
//!
//! Source of the method: Brock, De & Smith, "Characterizing signal propagation to close the performance gap in
//! unnormalized ResNets" (2021), and "High-performance large-scale image recognition without normalization" (2021).

pub mod variants;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::activation::Activation;
use super::{
    Arguments, Attention, Conv, Ends, Init, NetError, Norm, Pool, ShortcutPool, TensorSpec, activation_argument,
    bad_argument, check_ranges, check_stages, make_divisible, output_stride,
};

/// timm's `NfCfg`: configuration of an architecture.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct NfConfig {
    pub depths: Vec<usize>,
    pub channels: Vec<usize>,
    pub alpha: f64,
    pub stem_type: String,
    pub stem_chs: Option<usize>,
    pub group_size: Option<usize>,
    pub attn_layer: Option<String>,
    pub attn_kwargs: AttnKwargs,
    pub attn_gain: f64,
    pub width_factor: f64,
    pub bottle_ratio: f64,
    pub num_features: usize,
    pub ch_div: usize,
    pub reg: bool,
    pub extra_conv: bool,
    pub gamma_in_act: bool,
    pub same_padding: bool,
    pub std_conv_eps: f64,
    pub skipinit: bool,
    pub act_layer: String,
}

/// Arguments of the attention layer (timm `SEModule`; ECA takes none).
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct AttnKwargs {
    pub rd_ratio: Option<f64>,
    pub rd_channels: Option<usize>,
    pub rd_divisor: Option<usize>,
}

/// Plan of a Normalizer-Free network: every convolution with name and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct NfPlan {
    /// Activation, except inside attention.
    pub activation: Activation,
    /// γ that multiplies the activation's output; 1 if the convolutions apply γ.
    pub gamma_in_act: f64,
    /// TensorFlow's SAME padding, which may be asymmetric.
    pub same_padding: bool,
    /// Stem convolutions; the activation runs between them, not after the last.
    pub stem: Vec<Conv>,
    /// Max pooling 3x3, stride 2, padding 1 after the stem.
    pub stem_pool: bool,
    /// Residual blocks in order.
    pub blocks: Vec<NfBlock>,
    /// 1x1 convolution before the last activation.
    pub final_conv: Option<Conv>,
    /// Channels of the last feature map.
    pub num_features: usize,
    /// Pooling before the classifier.
    pub pool: Pool,
    /// Number of classes.
    pub classes: usize,
}

/// A residual block: `shortcut + α·skip·gain·f(β·act(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct NfBlock {
    /// Module path, `stages.S.B`.
    pub name: String,
    /// Scale of the residual branch.
    pub alpha: f64,
    /// 1/√(expected variance of the block's input).
    pub beta: f64,
    /// Expected variance of the block's output.
    pub expected_variance: f64,
    /// Pooling on the shortcut, before `downsample`.
    pub pool: ShortcutPool,
    /// 1x1 convolution on the shortcut; absent for an identity shortcut.
    pub downsample: Option<Conv>,
    /// 1x1 convolution to the bottleneck.
    pub conv1: Conv,
    /// 3x3 convolution, grouped.
    pub conv2: Conv,
    /// Second 3x3 convolution, of NFNets.
    pub conv2b: Option<Conv>,
    /// 1x1 convolution from the bottleneck.
    pub conv3: Conv,
    /// Attention, and its position.
    pub attention: Option<(AttentionPoint, Attention)>,
    /// Gain after attention; 1 without attention.
    pub attn_gain: f64,
    /// Whether the block has a learnable `skipinit_gain` (a scalar).
    pub skipinit: bool,
}

/// Position of attention in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionPoint {
    /// After the 3x3 convolutions (`reg`, timm `attn`).
    Middle,
    /// After the last convolution (timm `attn_last`).
    Last,
}

impl NfPlan {
    /// Overrides `config` with `args` and plans the network.
    pub fn new(architecture: &str, mut config: NfConfig, args: &Map<String, Value>) -> Result<Self, NetError> {
        let mut args = Arguments::new(architecture, args);
        let ends = args.ends()?;
        let output_stride = output_stride(&mut args)?;
        config.overlay(&mut args)?;
        args.finish()?;
        config.plan(ends, output_stride)
    }

    /// All tensors of a checkpoint, in module order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut out = Vec::new();
        let conv = |out: &mut Vec<TensorSpec>, c: &Conv, gain: f32| {
            let std = (c.fan_in() as f64).sqrt().recip();
            out.push(TensorSpec::new(format!("{}.weight", c.name), &c.weight_shape(), Init::Normal(std)));
            out.push(TensorSpec::new(format!("{}.bias", c.name), &[c.out_chs], Init::Constant(0.0)));
            if matches!(c.norm, Norm::ScaledWs { .. }) {
                let shape = [c.out_chs, 1, 1, 1];
                out.push(TensorSpec::new(format!("{}.gain", c.name), &shape, Init::Constant(gain)));
            }
        };
        self.stem.iter().for_each(|c| conv(&mut out, c, 1.0));
        for block in &self.blocks {
            if block.skipinit {
                out.push(TensorSpec::new(format!("{}.skipinit_gain", block.name), &[], Init::Constant(0.0)));
            }
            let before = [block.downsample.as_ref(), Some(&block.conv1), Some(&block.conv2), block.conv2b.as_ref()];
            before.into_iter().flatten().for_each(|c| conv(&mut out, c, 1.0));
            conv(&mut out, &block.conv3, if block.skipinit { 1.0 } else { 0.0 });
            match &block.attention {
                Some((_, Attention::SqueezeExcite { fc1, fc2, .. })) => {
                    conv(&mut out, fc1, 1.0);
                    conv(&mut out, fc2, 1.0);
                }
                Some((_, Attention::Efficient { name, kernel, .. })) => {
                    let init = Init::Uniform((*kernel as f64).sqrt().recip());
                    out.push(TensorSpec::new(format!("{name}.weight"), &[1, 1, *kernel], init));
                }
                None => {}
            }
        }
        self.final_conv.iter().for_each(|c| conv(&mut out, c, 1.0));
        let head = [self.classes, self.pool.features(self.num_features)];
        out.push(TensorSpec::new("head.fc.weight".into(), &head, Init::Normal(0.01)));
        out.push(TensorSpec::new("head.fc.bias".into(), &[self.classes], Init::Constant(0.0)));
        out
    }
}

impl NfConfig {
    fn overlay(&mut self, args: &mut Arguments<'_>) -> Result<(), NetError> {
        args.set("depths", &mut self.depths)?;
        args.set("channels", &mut self.channels)?;
        args.set("alpha", &mut self.alpha)?;
        args.set("stem_type", &mut self.stem_type)?;
        args.set("stem_chs", &mut self.stem_chs)?;
        args.set("group_size", &mut self.group_size)?;
        args.set("attn_layer", &mut self.attn_layer)?;
        args.set("attn_kwargs", &mut self.attn_kwargs)?;
        args.set("attn_gain", &mut self.attn_gain)?;
        args.set("width_factor", &mut self.width_factor)?;
        args.set("bottle_ratio", &mut self.bottle_ratio)?;
        args.set("num_features", &mut self.num_features)?;
        args.set("ch_div", &mut self.ch_div)?;
        args.set("reg", &mut self.reg)?;
        args.set("extra_conv", &mut self.extra_conv)?;
        args.set("gamma_in_act", &mut self.gamma_in_act)?;
        args.set("same_padding", &mut self.same_padding)?;
        args.set("std_conv_eps", &mut self.std_conv_eps)?;
        args.set("skipinit", &mut self.skipinit)?;
        args.set("act_layer", &mut self.act_layer)
    }

    fn check(&self) -> Result<Activation, NetError> {
        check_stages(["depths", "channels"], &self.depths, &self.channels)?;
        check_ranges([
            ("alpha", self.alpha, 0.0..=1e3),
            ("attn_gain", self.attn_gain, 0.0..=1e3),
            ("width_factor", self.width_factor, 1e-3..=1e3),
            ("bottle_ratio", self.bottle_ratio, 1e-3..=1e3),
            ("std_conv_eps", self.std_conv_eps, 0.0..=1.0),
            ("ch_div", self.ch_div as f64, 1.0..=1024.0),
            ("num_features", self.num_features as f64, 0.0..=1e6),
            ("stem_chs", self.stem_chs.unwrap_or(1) as f64, 1.0..=65_536.0),
        ])?;
        activation_argument(&self.act_layer)
    }

    fn norm(&self, activation: Activation) -> Norm {
        let gamma = if self.gamma_in_act { 1.0 } else { activation.gamma() };
        Norm::ScaledWs { gamma, eps: self.std_conv_eps }
    }

    fn width(&self, channels: usize) -> usize {
        make_divisible(channels as f64 * self.width_factor, self.ch_div, 0.9)
    }

    fn plan(&self, ends: Ends, output_stride: usize) -> Result<NfPlan, NetError> {
        let activation = self.check()?;
        let norm = self.norm(activation);
        let stem_chs = self.width(self.stem_chs.unwrap_or(self.channels[0]));
        let (stem, stem_pool, stem_stride) = self.stem(ends.in_chans, stem_chs, &norm)?;
        let mut blocks = Vec::new();
        let (mut in_chs, mut net_stride, mut dilation, mut variance) = (stem_chs, stem_stride, 1, 1.0f64);
        for (stage, &depth) in self.depths.iter().enumerate() {
            let mut stride = if stage == 0 && stem_stride > 2 { 1 } else { 2 };
            if net_stride >= output_stride && stride > 1 {
                dilation *= stride;
                stride = 1;
            }
            net_stride *= stride;
            let mut first_dilation = if dilation <= 2 { 1 } else { 2 };
            for index in 0..depth {
                let shape = BlockShape {
                    name: format!("stages.{stage}.{index}"),
                    in_chs,
                    out_chs: self.width(self.channels[stage]),
                    stride: if index == 0 { stride } else { 1 },
                    dilation,
                    first_dilation,
                    bottle_ratio: if self.reg && stage == 0 && index == 0 { 1.0 } else { self.bottle_ratio },
                };
                let beta = variance.sqrt().recip();
                // the first block of a stage has no identity shortcut, so variance restarts at 1
                variance = if index == 0 { 1.0 } else { variance } + self.alpha * self.alpha;
                in_chs = shape.out_chs;
                blocks.push(self.block(shape, &norm, (beta, variance))?);
                first_dilation = dilation;
            }
        }
        let features = (self.num_features > 0).then(|| self.width(self.num_features));
        Ok(NfPlan {
            activation,
            gamma_in_act: if self.gamma_in_act { activation.gamma() } else { 1.0 },
            same_padding: self.same_padding,
            stem,
            stem_pool,
            blocks,
            final_conv: features.map(|f| Conv::pointwise("final_conv".into(), in_chs, f, norm)),
            num_features: features.unwrap_or(in_chs),
            pool: ends.pool,
            classes: ends.classes,
        })
    }

    fn stem(&self, in_chans: usize, out: usize, norm: &Norm) -> Result<(Vec<Conv>, bool, usize), NetError> {
        let (widths, strides): (Vec<usize>, &[usize]) = match self.stem_type.as_str() {
            "deep_quad" => (vec![out / 8, out / 4, out / 2, out], &[2, 1, 1, 2]),
            "deep_tiered" => (vec![3 * out / 8, out / 2, out], &[2, 1, 1]),
            "deep" | "deep_pool" => (vec![out / 2, out / 2, out], &[2, 1, 1]),
            "" | "3x3" | "3x3_pool" | "7x7" | "7x7_pool" => (vec![out], &[2]),
            other => {
                let known = "one of deep, deep_pool, deep_tiered, deep_quad, 3x3, 3x3_pool, 7x7, 7x7_pool";
                return Err(bad_argument("stem_type", &other.into(), known.into()));
            }
        };
        if widths.contains(&0) {
            return Err(bad_argument("stem_chs", &out.into(), format!("too few for stem_type {}", self.stem_type)));
        }
        let kernel = if widths.len() > 1 || self.stem_type.contains("3x3") { 3 } else { 7 };
        let inputs = std::iter::once(in_chans).chain(widths.iter().copied());
        let name = |i: usize| if widths.len() == 1 { "stem.conv".into() } else { format!("stem.conv{}", i + 1) };
        let convs = inputs.zip(&widths).zip(strides).enumerate();
        let convs = convs.map(|(i, ((from, &to), &s))| Conv::square(name(i), (from, to), kernel, s, norm.clone()));
        let pool = self.stem_type.ends_with("_pool");
        let stride = strides.iter().product::<usize>() * if pool { 2 } else { 1 };
        Ok((convs.collect(), pool, stride))
    }

    fn block(
        &self,
        shape: BlockShape,
        norm: &Norm,
        (beta, expected_variance): (f64, f64),
    ) -> Result<NfBlock, NetError> {
        let BlockShape { name, in_chs, out_chs, stride, dilation, first_dilation, bottle_ratio } = shape;
        let base = if self.reg { in_chs } else { out_chs };
        let mut mid = make_divisible(base as f64 * bottle_ratio, self.ch_div, 0.9);
        let mut groups = 1;
        if let Some(size) = self.group_size.filter(|&s| s > 0) {
            groups = mid / size;
            if size.is_multiple_of(self.ch_div) {
                mid = size * groups;
            }
            if groups == 0 || !mid.is_multiple_of(groups) {
                let reason = format!("does not divide the {mid} bottleneck channels of `{name}`");
                return Err(bad_argument("group_size", &size.into(), reason));
            }
        }
        let conv =
            |leaf: &str, chs: (usize, usize)| Conv::pointwise(format!("{name}.{leaf}"), chs.0, chs.1, norm.clone());
        let spatial = |leaf: &str, stride: usize, dilation: usize| Conv {
            stride,
            dilation,
            groups,
            ..Conv::square(format!("{name}.{leaf}"), (mid, mid), 3, stride, norm.clone())
        };
        let point = if self.reg { AttentionPoint::Middle } else { AttentionPoint::Last };
        let (module, gated) = if self.reg { ("attn", mid) } else { ("attn_last", out_chs) };
        let attention = self.attention(&format!("{name}.{module}"), gated)?;
        let has_downsample = in_chs != out_chs || stride != 1 || dilation != first_dilation;
        Ok(NfBlock {
            alpha: self.alpha,
            beta,
            expected_variance,
            pool: match (has_downsample, stride, dilation) {
                (false, ..) | (true, 1, 1) => ShortcutPool::None,
                (true, _, 1) => ShortcutPool::Average2,
                (true, ..) => ShortcutPool::AverageSame,
            },
            downsample: has_downsample.then(|| conv("downsample.conv", (in_chs, out_chs))),
            conv1: conv("conv1", (in_chs, mid)),
            conv2: spatial("conv2", stride, first_dilation),
            conv2b: self.extra_conv.then(|| spatial("conv2b", 1, dilation)),
            conv3: conv("conv3", (mid, out_chs)),
            attn_gain: if attention.is_some() { self.attn_gain } else { 1.0 },
            attention: attention.map(|a| (point, a)),
            skipinit: self.skipinit,
            name,
        })
    }

    fn attention(&self, module: &str, chs: usize) -> Result<Option<Attention>, NetError> {
        let AttnKwargs { rd_ratio, rd_channels, rd_divisor } = self.attn_kwargs;
        match self.attn_layer.as_deref() {
            None | Some("") => Ok(None),
            Some("se") => {
                let (ratio, divisor) = (rd_ratio.unwrap_or(1.0 / 16.0), rd_divisor.unwrap_or(8));
                if !(ratio > 0.0 && ratio <= 16.0 && (1..=1024).contains(&divisor)) {
                    let value = format!("rd_ratio {ratio}, rd_divisor {divisor}");
                    return Err(bad_argument("attn_kwargs", &value.into(), "out of range".into()));
                }
                let rounded = || make_divisible(chs as f64 * ratio, divisor, 0.0);
                let reduced = rd_channels.filter(|&c| c > 0).unwrap_or_else(rounded);
                Ok(Some(Attention::squeeze_excite(module, chs, reduced)))
            }
            Some("eca") => Ok(Some(Attention::efficient(module, chs))),
            Some(other) => Err(bad_argument("attn_layer", &other.into(), "`se`, `eca` or null".into())),
        }
    }
}

/// Parameters that depend on a block's position in the network.
struct BlockShape {
    name: String,
    in_chs: usize,
    out_chs: usize,
    stride: usize,
    dilation: usize,
    first_dilation: usize,
    bottle_ratio: f64,
}

#[cfg(test)]
mod tests {
    use super::variants::{VARIANTS, evaluation, variant};
    use super::*;

    fn plan(name: &str, args: Value) -> Result<NfPlan, NetError> {
        let args = args.as_object().cloned().unwrap_or_default();
        NfPlan::new(name, variant(name).expect("known"), &args)
    }

    #[test]
    fn expected_variance_resets_after_each_transition() {
        let plan = plan("nf_resnet50", serde_json::json!({})).expect("plans");
        let betas: Vec<f64> = plan.blocks.iter().map(|b| b.beta).collect();
        let after = |n: f64| (1.0 + 0.04 * n).sqrt().recip();
        for (found, expected) in betas.iter().zip([1.0, after(1.0), after(2.0), after(3.0), after(1.0)]) {
            assert!((found - expected).abs() < 1e-12, "{betas:?}");
        }
    }

    #[test]
    fn every_variant_plans() {
        for name in VARIANTS {
            plan(name, serde_json::json!({})).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(evaluation(name).is_some(), "{name}");
        }
    }

    #[test]
    fn arguments_are_refused_by_name() {
        for (args, what) in [
            (serde_json::json!({"depth": [1]}), "`depth`"),
            (serde_json::json!({"depths": [1, 2]}), "`depths`"),
            (serde_json::json!({"depths": [1, 2, 3, 0]}), "`depths`"),
            (serde_json::json!({"in_chans": 17}), "`in_chans`"),
            (serde_json::json!({"global_pool": "median"}), "`global_pool`"),
            (serde_json::json!({"act_layer": "softmax"}), "`act_layer`"),
            (serde_json::json!({"attn_layer": "cbam"}), "`attn_layer`"),
            (serde_json::json!({"width_factor": -1}), "`width_factor`"),
            (serde_json::json!({"num_classes": 0}), "`num_classes`"),
            (serde_json::json!({"stem_type": "9x9"}), "`stem_type`"),
        ] {
            let error = plan("nf_regnet_b0", args).expect_err(what).to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
