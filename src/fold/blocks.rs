//! Walks a network's plan and emits it: stem, blocks, head. Where every scalar goes is decided here, once for folded
//! graphs (scalars vanish into weights) and unfolded ones (scalars stay as operations).

use super::batch_norm::BatchNorm;
use super::{FoldError, SideOutputs};
use crate::checkpoint::Reader;
use crate::graph::{GraphBuilder, Map, Term};
use crate::model::{BlockScalars, FEATURES};
use crate::nets::batch_normed::{BatchNormedPlan, Shortcut};
use crate::nets::nf::{AttentionPoint, NfBlock, NfPlan};
use crate::nets::resnet::ResNetPlan;
use crate::nets::{Attention, Conv, Norm, Pool, scaled_ws};

/// What a convolution's input and output are multiplied by. In a folded graph both go into its weights, the output's
/// into its bias too.
#[derive(Debug, Clone, Copy)]
struct Scales {
    input: f64,
    output: f64,
}

impl Scales {
    const NONE: Self = Self::input(1.0);

    const fn input(input: f64) -> Self {
        Self { input, output: 1.0 }
    }
}

/// Emits one network.
#[derive(Debug)]
pub struct Emitter<'a> {
    reader: &'a Reader<'a>,
    /// The graph so far.
    pub graph: GraphBuilder,
    unfolded: bool,
    outputs: SideOutputs,
    /// Width of the output `features`, where there is one.
    pub features: Option<u32>,
    /// Channels, height and width of the output `map`, where there is one.
    pub map: Option<[u32; 3]>,
}

impl<'a> Emitter<'a> {
    /// Emits into `graph`; `unfolded` leaves standardisation, normalisation and scalars as operations.
    pub fn new(reader: &'a Reader<'a>, graph: GraphBuilder, unfolded: bool, outputs: SideOutputs) -> Self {
        Self { reader, graph, unfolded, outputs, features: None, map: None }
    }

    /// A Normalizer-Free network. Returns its blocks' scalars.
    pub fn norm_free(&mut self, plan: &NfPlan, input: Map) -> Result<Vec<BlockScalars>, FoldError> {
        let gamma = plan.gamma_in_act;
        let mut x = input;
        for (i, conv) in plan.stem.iter().enumerate() {
            let scales = Scales::input(if i == 0 { 1.0 } else { gamma });
            if i > 0 {
                x = self.graph.activation(&x, plan.activation, &format!("stem.act{}", i + 1));
            }
            x = self.conv(&x, conv, scales, None)?;
        }
        if plan.stem_pool {
            x = self.graph.max_pool(&x, "stem.pool");
        }
        let mut scalars = Vec::with_capacity(plan.blocks.len());
        for block in &plan.blocks {
            let (out, used) = self.nf_block(&x, block, plan)?;
            x = out;
            scalars.push(used);
        }
        if let Some(conv) = &plan.final_conv {
            x = self.conv(&x, conv, Scales::NONE, None)?;
        }
        x = self.graph.activation(&x, plan.activation, "final_act");
        self.head(&x, "head.fc", (plan.pool, plan.classes), gamma)?;
        Ok(scalars)
    }

    /// `out = shortcut + α·skip·gain·f(β·act1(x))`; the activation's γ, where it carries one, is read by every
    /// convolution that follows an activation.
    fn nf_block(&mut self, x: &Map, block: &NfBlock, plan: &NfPlan) -> Result<(Map, BlockScalars), FoldError> {
        let (gamma, act, name) = (plan.gamma_in_act, plan.activation, &block.name);
        let skip = if block.skipinit { Some(self.reader.take_scalar(&format!("{name}.skipinit_gain"))?) } else { None };
        let middle = block.attention.as_ref().filter(|(point, _)| *point == AttentionPoint::Middle).map(|(_, a)| a);
        let last = block.attention.as_ref().filter(|(point, _)| *point == AttentionPoint::Last).map(|(_, a)| a);
        let middle_gain = if middle.is_some() { block.attn_gain } else { 1.0 };
        let last_gain = if last.is_some() { block.attn_gain } else { 1.0 };
        let tail = block.alpha * last_gain * skip.unwrap_or(1.0);
        let dropped = tail == 0.0 && !self.unfolded;
        let scalars = BlockScalars {
            block: name.clone(),
            alpha: block.alpha,
            beta: block.beta,
            expected_variance: block.expected_variance,
            attn_gain: block.attention.as_ref().map(|_| block.attn_gain),
            skipinit_gain: skip,
            dropped,
        };

        let first = Scales::input(block.beta * gamma);
        let pre = self.graph.activation(x, act, &format!("{name}.act1"));
        let shortcut = match &block.downsample {
            Some(conv) => {
                let pooled = self.graph.average_pool(&pre, block.pool, &format!("{name}.downsample.pool"));
                self.conv(&pooled, conv, first, None)?
            }
            None => x.clone(),
        };
        let convs: Vec<&Conv> = [Some(&block.conv1), Some(&block.conv2), block.conv2b.as_ref(), Some(&block.conv3)]
            .into_iter()
            .flatten()
            .collect();
        if dropped {
            for conv in convs {
                self.weights(conv)?;
            }
            if let Some((_, attention)) = &block.attention {
                self.attention_weights(attention, 1.0)?;
            }
            return Ok((shortcut, scalars));
        }
        let end = convs.len() - 1;
        let mut y = pre;
        for (i, conv) in convs.into_iter().enumerate() {
            if i > 0 {
                let leaf = conv.name.replace(".conv", ".act");
                y = self.graph.activation(&y, act, &leaf);
            }
            let input = if i == 0 { first.input } else { gamma };
            y = match i {
                _ if i == end => self.conv(&y, conv, Scales { input, output: tail }, last)?,
                _ if i + 1 == end => self.conv(&y, conv, Scales { input, output: middle_gain }, middle)?,
                _ => self.conv(&y, conv, Scales::input(input), None)?,
            };
        }
        Ok((self.graph.add(&y, &shortcut, name), scalars))
    }

    /// A batch-normalised residual network.
    pub fn resnet(&mut self, plan: &ResNetPlan, input: Map) -> Result<(), FoldError> {
        let act = plan.activation;
        let mut x = input;
        for conv in &plan.stem {
            x = self.conv(&x, conv, Scales::NONE, None)?;
            x = self.graph.activation(&x, act, &format!("{}.act", conv.name));
        }
        if plan.stem_pool {
            x = self.graph.max_pool(&x, "maxpool");
        }
        for block in &plan.blocks {
            let mut y = x.clone();
            let last = block.convs.len() - 1;
            for (i, conv) in block.convs.iter().enumerate() {
                if i > 0 {
                    y = self.graph.activation(&y, act, &format!("{}.act{i}", block.name));
                }
                y = self.conv(&y, conv, Scales::NONE, block.attention.as_ref().filter(|_| i == last))?;
            }
            if let Some(conv) = &block.downsample {
                x = self.graph.average_pool(&x, block.pool, &format!("{}.downsample.0", block.name));
                x = self.conv(&x, conv, Scales::NONE, None)?;
            }
            let sum = self.graph.add(&y, &x, &format!("{}.sum", block.name));
            x = self.graph.activation(&sum, act, &block.name);
        }
        self.head(&x, "fc", (plan.pool, plan.classes), 1.0)
    }

    /// A batch-normalised network whose blocks gate the input of their last convolution.
    pub fn batch_normed(&mut self, plan: &BatchNormedPlan, input: Map) -> Result<(), FoldError> {
        let act = plan.activation;
        let mut x = self.conv(&input, &plan.stem, Scales::NONE, None)?;
        x = self.graph.activation(&x, act, "stem.act");
        for block in &plan.blocks {
            let (name, last) = (&block.name, block.convs.len() - 1);
            let mut y = x.clone();
            for (i, conv) in block.convs.iter().enumerate() {
                if i > 0 {
                    y = self.graph.activation(&y, act, &format!("{name}.act{i}"));
                }
                if i == last {
                    y = self.attention(&y, block.attention.as_ref(), 1.0)?;
                }
                y = self.conv(&y, conv, Scales::NONE, None)?;
            }
            if block.branch_activated {
                y = self.graph.activation(&y, act, &format!("{name}.act"));
            }
            x = match &block.shortcut {
                Shortcut::None => y,
                Shortcut::Identity => self.graph.add(&y, &x, &format!("{name}.sum")),
                Shortcut::Conv(conv) => {
                    let shortcut = self.conv(&x, conv, Scales::NONE, None)?;
                    self.graph.add(&y, &shortcut, &format!("{name}.sum"))
                }
            };
            if block.activated {
                x = self.graph.activation(&x, act, name);
            }
        }
        if let Some(conv) = &plan.final_conv {
            x = self.conv(&x, conv, Scales::NONE, None)?;
        }
        if plan.final_conv.is_some() || plan.final_act {
            x = self.graph.activation(&x, act, "final_act");
        }
        self.head(&x, plan.classifier, (plan.pool, plan.classes), 1.0)
    }

    /// Convolution, then attention where there is one, then the output's scale.
    ///
    /// Folding the output's scale r into a convolution in front of attention changes what the gate sees: its first
    /// weights are divided by r. (r = 2 and 1/2 of the squeeze-and-excitation gain are exact.)
    fn conv(&mut self, x: &Map, conv: &Conv, scales: Scales, attention: Option<&Attention>) -> Result<Map, FoldError> {
        let Scales { input, output } = scales;
        if self.unfolded {
            let x = self.scale(x, input)?;
            let y = self.unfolded_conv(&x, conv)?;
            let y = self.attention(&y, attention, 1.0)?;
            return self.scale(&y, output);
        }
        let (mut weight, mut bias) = self.weights(conv)?;
        weight.iter_mut().for_each(|w| *w *= input * output);
        bias.iter_mut().for_each(|b| *b *= output);
        let weight = self.graph.constant(&format!("{}.weight", conv.name), &conv.weight_shape(), &weight)?;
        let bias = self.graph.constant(&format!("{}.bias", conv.name), &[conv.out_chs], &bias)?;
        let y = self.graph.conv(x, conv, &weight, Some(&bias));
        self.attention(&y, attention, output.recip())
    }

    /// Plain weights and bias of a convolution, its own normalisation folded in, no other scalar yet.
    fn weights(&self, conv: &Conv) -> Result<(Vec<f64>, Vec<f64>), FoldError> {
        let take = |leaf: &str, shape: &[usize]| self.reader.take(&format!("{}.{leaf}", conv.name), shape);
        let mut weight = take("weight", &conv.weight_shape())?;
        let bias = match &conv.norm {
            Norm::Plain => take("bias", &[conv.out_chs])?,
            Norm::ScaledWs { gamma, eps } => {
                let gain = take("gain", &[conv.out_chs, 1, 1, 1])?;
                scaled_ws::standardise(&mut weight, &gain, *gamma, *eps);
                take("bias", &[conv.out_chs])?
            }
            Norm::BatchNorm { layer, eps } => self.batch_norm(layer, conv.out_chs, *eps)?.fold(&mut weight),
        };
        Ok((weight, bias))
    }

    fn batch_norm(&self, layer: &str, chs: usize, eps: f64) -> Result<BatchNorm, FoldError> {
        let take = |leaf: &str| self.reader.take(&format!("{layer}.{leaf}"), &[chs]);
        let norm = BatchNorm {
            weight: take("weight")?,
            bias: take("bias")?,
            mean: take("running_mean")?,
            variance: take("running_var")?,
            eps,
        };
        self.reader.skip_counter(&format!("{layer}.num_batches_tracked"));
        match norm.variance.iter().position(|v| *v < 0.0) {
            None => Ok(norm),
            Some(channel) => Err(FoldError::NegativeVariance { layer: layer.into(), channel }),
        }
    }

    /// The convolution as the checkpoint has it, with its normalisation as graph operations.
    fn unfolded_conv(&mut self, x: &Map, conv: &Conv) -> Result<Map, FoldError> {
        let name = &conv.name;
        let shape = conv.weight_shape();
        let take = |leaf: &str, shape: &[usize]| self.reader.take(&format!("{name}.{leaf}"), shape);
        let weight = take("weight", &shape)?;
        match &conv.norm {
            Norm::Plain => {
                let bias = take("bias", &[conv.out_chs])?;
                let weight = self.graph.constant(&format!("{name}.weight"), &shape, &weight)?;
                let bias = self.graph.constant(&format!("{name}.bias"), &[conv.out_chs], &bias)?;
                Ok(self.graph.conv(x, conv, &weight, Some(&bias)))
            }
            Norm::ScaledWs { gamma, eps } => {
                let gain = take("gain", &[conv.out_chs, 1, 1, 1])?;
                let bias = take("bias", &[conv.out_chs])?;
                let bias = self.graph.constant(&format!("{name}.bias"), &[conv.out_chs], &bias)?;
                let scale = gamma / (conv.fan_in() as f64).sqrt();
                let gain: Vec<f64> = gain.iter().map(|g| g * scale).collect();
                let weight = self.standardisation(conv, &weight, &gain, *eps)?;
                Ok(self.graph.conv(x, conv, &weight, Some(&bias)))
            }
            Norm::BatchNorm { layer, eps } => {
                let norm = self.batch_norm(layer, conv.out_chs, *eps)?;
                let weight = self.graph.constant(&format!("{name}.weight"), &shape, &weight)?;
                let y = self.graph.conv(x, conv, &weight, None);
                let mut constant = |leaf: &str, values: &[f64]| {
                    self.graph.constant(&format!("{layer}.{leaf}"), &[conv.out_chs], values)
                };
                let parameters = [
                    constant("weight", &norm.weight)?,
                    constant("bias", &norm.bias)?,
                    constant("running_mean", &norm.mean)?,
                    constant("running_var", &norm.variance)?,
                ];
                Ok(self.graph.batch_norm(&y, layer, parameters.each_ref().map(String::as_str), *eps))
            }
        }
    }

    /// Weight standardisation as operations in double precision; returns the standardised weight's name.
    fn standardisation(&mut self, conv: &Conv, weight: &[f64], gain: &[f64], eps: f64) -> Result<String, FoldError> {
        let graph = &mut self.graph;
        let name = |leaf: &str| format!("{}.weight{leaf}", conv.name);
        let raw = graph.double(&name(""), &conv.weight_shape(), weight)?;
        let gain = graph.double(&name(".gain"), &[conv.out_chs, 1, 1, 1], gain)?;
        let eps = graph.double(&name(".eps"), &[], &[eps])?;
        let fan_in = graph.integers(&name(".fan_in_axes"), &[1, 2, 3]);
        let mut node = |op: &str, leaf: &str, inputs: &[&str]| graph.node(op, &name(leaf), inputs, vec![]);
        let mean = node("ReduceMean", ".mean", &[&raw, &fan_in]);
        let centred = node("Sub", ".centred", &[&raw, &mean]);
        let squares = node("Mul", ".squares", &[&centred, &centred]);
        let variance = node("ReduceMean", ".variance", &[&squares, &fan_in]);
        let shifted = node("Add", ".shifted", &[&variance, &eps]);
        let deviation = node("Sqrt", ".deviation", &[&shifted]);
        let unit = node("Div", ".unit", &[&centred, &deviation]);
        let gained = node("Mul", ".gained", &[&unit, &gain]);
        Ok(graph.narrow(&name(".standardised"), &gained))
    }

    /// Gates `y`; `gate_scale` undoes for the gate what was folded into the convolution before it.
    fn attention(&mut self, y: &Map, attention: Option<&Attention>, gate_scale: f64) -> Result<Map, FoldError> {
        let Some(attention) = attention else { return Ok(y.clone()) };
        let weights = self.attention_weights(attention, gate_scale)?;
        match (attention, weights.as_slice()) {
            (Attention::SqueezeExcite { fc1, fc2, activation }, [w1, b1, w2, b2]) => {
                let module = fc1.name.rsplit_once('.').map_or("", |(module, _)| module);
                let mean = self.graph.global_average_pool(y, &format!("{module}.mean"));
                let w1 = self.graph.constant(&format!("{}.weight", fc1.name), &fc1.weight_shape(), w1)?;
                let b1 = self.graph.constant(&format!("{}.bias", fc1.name), &[fc1.out_chs], b1)?;
                let w2 = self.graph.constant(&format!("{}.weight", fc2.name), &fc2.weight_shape(), w2)?;
                let b2 = self.graph.constant(&format!("{}.bias", fc2.name), &[fc2.out_chs], b2)?;
                let reduced = self.graph.conv(&mean, fc1, &w1, Some(&b1));
                let reduced = self.graph.activation(&reduced, *activation, &format!("{module}.act"));
                let expanded = self.graph.conv(&reduced, fc2, &w2, Some(&b2));
                let gate = self.graph.sigmoid(&expanded, &format!("{module}.sigmoid"));
                Ok(self.graph.gate(y, &gate, module))
            }
            (Attention::Efficient { name, kernel, .. }, [weight, ..]) => {
                let module = name.trim_end_matches(".conv");
                let mean = self.graph.global_average_pool(y, &format!("{module}.mean"));
                let weight = self.graph.constant(&format!("{name}.weight"), &[1, 1, *kernel], weight)?;
                let gate = self.graph.channel_conv(&mean, &weight, *kernel, name)?;
                Ok(self.graph.gate(y, &gate, module))
            }
            _ => Ok(y.clone()),
        }
    }

    /// Weights of an attention layer, the first of them (which reads the map's mean) multiplied by `gate_scale`.
    fn attention_weights(&self, attention: &Attention, gate_scale: f64) -> Result<Vec<Vec<f64>>, FoldError> {
        let mut all = match attention {
            Attention::SqueezeExcite { fc1, fc2, .. } => {
                let ((w1, b1), (w2, b2)) = (self.weights(fc1)?, self.weights(fc2)?);
                vec![w1, b1, w2, b2]
            }
            Attention::Efficient { name, kernel, .. } => {
                vec![self.reader.take(&format!("{name}.weight"), &[1, 1, *kernel])?]
            }
        };
        all[0].iter_mut().for_each(|w| *w *= gate_scale);
        Ok(all)
    }

    /// Global pooling and classifier; `input` (positive) is what the classifier's input is multiplied by.
    fn head(&mut self, x: &Map, name: &str, (pool, classes): (Pool, usize), input: f64) -> Result<(), FoldError> {
        let (chs, features) = (x.chs, pool.features(x.chs));
        let weight = self.reader.take(&format!("{name}.weight"), &[classes, features])?;
        let bias = self.reader.take(&format!("{name}.bias"), &[classes])?;
        // the mean of mean and maximum is half their sum
        let share = if pool == Pool::AverageMax { 0.5 } else { 1.0 };
        let (x, factor) = match self.unfolded {
            true => (self.scale(x, input)?, 1.0),
            false => (x.clone(), input * share),
        };
        if self.outputs.map {
            // the gain that the classifier's weights carry is the map's own
            self.graph.map(&x, if self.unfolded { 1.0 } else { input });
            self.map = Some([x.chs, x.height, x.width].map(|side| side as u32));
        }
        let mean = |graph: &mut GraphBuilder| graph.global_average_pool(&x, "head.global_pool");
        let maximum = |graph: &mut GraphBuilder| graph.global_max_pool(&x, "head.global_max");
        let graph = &mut self.graph;
        let pooled = match pool {
            Pool::Average => vec![mean(graph)],
            Pool::Max => vec![maximum(graph)],
            Pool::Both => vec![mean(graph), maximum(graph)],
            Pool::AverageMax => {
                let (mean, maximum) = (mean(graph), maximum(graph));
                let sum = graph.add(&mean, &maximum, "head.global_sum");
                vec![if self.unfolded { self.scale(&sum, share)? } else { sum }]
            }
        };
        let bias = self.graph.constant(&format!("{name}.bias"), &[classes], &bias)?;
        let alone = pooled.len() == 1;
        // where the classifier reads the features as they are, they are no copy
        let plain = self.outputs.features && alone && factor == 1.0 && self.graph.is_single();
        let mut terms = Vec::with_capacity(pooled.len());
        for (i, map) in pooled.into_iter().enumerate() {
            let flat = if plain {
                FEATURES.to_string()
            } else if alone {
                "head.flatten".to_string()
            } else {
                format!("head.flatten{i}")
            };
            let values = self.graph.flatten(&map, &flat);
            let leaf = if i == 0 { "weight" } else { "weight.max" };
            let part = weight.chunks(features).flat_map(|row| &row[i * chs..(i + 1) * chs]);
            let part: Vec<f64> = part.map(|w| w * factor).collect();
            let weight = self.graph.constant(&format!("{name}.{leaf}"), &[classes, chs], &part)?;
            terms.push(Term { values, width: chs, weight });
        }
        self.graph.classifier(&terms, &bias, classes, name);
        if self.outputs.features {
            let parts: Vec<String> = terms.into_iter().map(|term| term.values).collect();
            self.graph.features(&parts, features, factor);
            self.features = Some(features as u32);
        }
        Ok(())
    }

    fn scale(&mut self, x: &Map, scalar: f64) -> Result<Map, FoldError> {
        if scalar == 1.0 { Ok(x.clone()) } else { Ok(self.graph.scale(x, scalar)?) }
    }
}
