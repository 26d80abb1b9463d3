//! The paper's networks at initialisation: pre-activation ResNets (He et al. 2016b) of any depth, batch-normalised or
//! normalizer-free, run on Gaussian noise. The stem is two convolutions without pooling.
//!
//! As one graph, a network of 600 layers with every block as an output needs tens of gigabytes. So each convolution is
//! a graph of its own, run once on the whole batch: memory holds a few layers, and batch normalisation uses the batch's
//! own statistics, as in training, in double precision.

use std::time::Instant;

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

use super::statistics::ChannelMoments;
use super::{Profile, Signal, SppError, gaussian_image, mark_stages};
use crate::engine::{Batch, EngineOptions, MapBackend, MapView};
use crate::graph::{Emission, GraphBuilder, Map};
use crate::model::{Gate, Precision};
use crate::nets::activation::Activation;
use crate::nets::{Conv, Norm, gamma, scaled_ws};

/// Channels of the stages and of the stem, at width 1.
const CHANNELS: [usize; 4] = [256, 512, 1024, 2048];
const STEM: usize = 64;
/// PyTorch's default for `BatchNorm2d`, and timm's for `ScaledStdConv2d`.
const EPS: f64 = 1e-5;

/// Order and scaling of a block's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Batch normalisation, activation, convolution; He initialisation.
    BnReluConv,
    /// Activation, batch normalisation, convolution; weights of variance 1/fan-in, since the input has unit variance.
    ReluBnConv,
    /// Normalizer-free with α and β; He initialisation.
    NfHe,
    /// Normalizer-free with α and β; Scaled Weight Standardization.
    NfWs,
    /// Without normalisation and scaling; He initialisation.
    Plain,
}

/// Every variant.
pub const VARIANTS: [Variant; 5] =
    [Variant::BnReluConv, Variant::ReluBnConv, Variant::NfHe, Variant::NfWs, Variant::Plain];

impl Variant {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::BnReluConv => "bn-relu-conv",
            Self::ReluBnConv => "relu-bn-conv",
            Self::NfHe => "nf-he",
            Self::NfWs => "nf-ws",
            Self::Plain => "plain-he",
        }
    }

    fn batch_norm(self) -> bool {
        matches!(self, Self::BnReluConv | Self::ReluBnConv)
    }

    fn normalizer_free(self) -> bool {
        matches!(self, Self::NfHe | Self::NfWs)
    }
}

/// A network at initialisation.
#[derive(Debug, Clone, PartialEq)]
pub struct ResNetV2 {
    /// Order and scaling of layers.
    pub variant: Variant,
    /// Activation.
    pub activation: Activation,
    /// Layers: three per residual block, distributed over the stages as equally as possible.
    pub depth: usize,
    /// Stages, 1 to 4, with 256, 512, 1024 and 2048 channels times `width`.
    pub stages: usize,
    /// Factor on the channels of all layers.
    pub width: f64,
    /// α of the normalizer-free variants.
    pub alpha: f64,
    /// Side of the input, in pixels.
    pub size: usize,
    /// Images in the batch, which batch normalisation takes its statistics from.
    pub images: usize,
    /// Seed of weights and noise.
    pub seed: u64,
}

impl ResNetV2 {
    /// Number of blocks in each stage.
    pub fn blocks(&self) -> Vec<usize> {
        let blocks = self.depth / 3;
        (0..self.stages).map(|s| blocks / self.stages + usize::from(s < blocks % self.stages)).collect()
    }

    fn check(&self, spec: &str) -> Result<(), SppError> {
        let bad = |reason: &str| Err(SppError::BadSpec { spec: spec.into(), reason: reason.into() });
        if !(1..=CHANNELS.len()).contains(&self.stages) {
            return bad("1 to 4 stages are possible");
        }
        if self.depth / 3 < self.stages || self.depth > 30_000 {
            return bad("the depth must be 3 layers a stage at least (three a residual block), 30,000 at most");
        }
        if !(0.01..=8.0).contains(&self.width) {
            return bad("the width must lie between 0.01 and 8");
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 || self.alpha > 1e3 {
            return bad("α must be above 0, 1000 at most");
        }
        // the last stage has 1/32 of the input's resolution
        if !(32..=4096).contains(&self.size) {
            return bad("the input must have 32 to 4096 pixels a side");
        }
        if !(1..=4096).contains(&self.images) {
            return bad("1 to 4096 images are possible");
        }
        Ok(())
    }

    /// Runs the network. `spec` names it in the profile and in errors; `progress` is called after each block with the
    /// number of finished blocks and of all.
    pub fn profile(&self, spec: &str, mut progress: impl FnMut(usize, usize)) -> Result<Profile, SppError> {
        self.check(spec)?;
        let started = Instant::now();
        let mut run = Run::new(self);
        let mut x = run.stem()?;
        let stages = self.blocks();
        let total = stages.iter().sum();
        let mut signals = Vec::with_capacity(total);
        let mut variance = 1.0;
        for (stage, &count) in stages.iter().enumerate() {
            let channels = run.width(CHANNELS[stage]);
            for i in 0..count {
                let transition = (i == 0).then_some(if stage == 0 { 1 } else { 2 });
                let beta = if self.variant.normalizer_free() { f64::sqrt(variance).recip() } else { 1.0 };
                let (out, residual) = run.block(x, channels, transition, beta)?;
                variance = if i == 0 { 1.0 } else { variance } + self.alpha * self.alpha;
                let mut signal = Signal::new(&format!("stages.{stage}.{i}"), &out.moments, Some((&residual, 1.0)));
                signal.expected_variance = self.variant.normalizer_free().then_some(variance);
                signals.push(signal);
                x = out;
                progress(signals.len(), total);
            }
        }
        mark_stages(&mut signals);
        Ok(Profile {
            network: spec.into(),
            input: "unit Gaussian noise".into(),
            images: self.images,
            size: (self.size, self.size),
            blocks: signals,
            finite_logits: None,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// Feature maps of the whole batch, with their moments.
struct Layer {
    /// `[images, chs, height, width]`.
    shape: [usize; 4],
    data: Vec<f32>,
    moments: ChannelMoments,
    /// The activated maps, if the next layer normalises these.
    activated: Option<Box<Layer>>,
}

impl Layer {
    fn copy(view: MapView<'_>) -> Self {
        let mut moments = ChannelMoments::default();
        moments.add(view.shape, view.data);
        Self { shape: view.shape, data: view.data.to_vec(), moments, activated: None }
    }

    /// The maps that a convolution reads.
    fn source(&self) -> &Self {
        self.activated.as_deref().unwrap_or(self)
    }
}

struct Run<'a> {
    net: &'a ResNetV2,
    rng: ChaCha8Rng,
    options: EngineOptions,
    /// Generalised He initialisation: 1/E\[f(Z)²\], which is 2 for ReLU and 1 without activation.
    he_gain: f64,
    gamma: f64,
}

impl<'a> Run<'a> {
    fn new(net: &'a ResNetV2) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut rng = ChaCha8Rng::seed_from_u64(net.seed);
        // stream 0 is for weights, the others are for images
        rng.set_stream(0);
        let known = gamma::find(net.activation.name());
        Self {
            net,
            rng,
            options: EngineOptions { intra_threads: threads, spinning: threads > 1, ..EngineOptions::default() },
            he_gain: known.map_or(1.0, |n| n.second_moment().recip()),
            gamma: known.map_or(1.0, |n| n.quadrature().gamma),
        }
    }

    fn width(&self, channels: usize) -> usize {
        ((channels as f64 * self.net.width).round() as usize).max(4)
    }

    /// 7x7 convolution of stride 2, and a 3x3 one of stride 2 instead of ResNet's max pooling: pooling would shift
    /// every mean, but the analysis starts with unit Gaussians. Weights have variance 1/fan-in, since no activation
    /// comes before.
    fn stem(&mut self) -> Result<Layer, SppError> {
        let net = self.net;
        let mut batch = Batch::zeros(net.images, net.size, net.size);
        (0..net.images).for_each(|i| gaussian_image(net.seed, i, &mut batch, i));
        let mut graph = empty_graph();
        let mut y = graph.input("x", 3, net.size, net.size);
        let chs = self.width(STEM);
        for (name, in_chs, kernel) in [("stem.conv1", 3, 7), ("stem.conv2", chs, 3)] {
            let conv = Conv::square(name.into(), (in_chs, chs), kernel, 2, Norm::Plain);
            let weight = self.weights(&conv, 1.0, false);
            y = convolve(&mut graph, &y, &conv, &weight)?;
        }
        let outputs = self.outputs(&mut graph, vec![y]);
        let shape = [net.images, 3, net.size, net.size];
        let view = MapView { name: "x", shape, data: &batch.data };
        self.run(graph, "the stem", &[view], outputs).map(Finished::last)
    }

    /// Runs one block: returns its output, and the moments of its residual branch before α. `transition` is the stride
    /// of a block whose shortcut is a convolution (of the normalised, activated input).
    fn block(
        &mut self,
        x: Layer,
        channels: usize,
        transition: Option<usize>,
        beta: f64,
    ) -> Result<(Layer, ChannelMoments), SppError> {
        let middle = (channels / 4).max(1);
        let stride = transition.unwrap_or(1);
        let in_chs = x.shape[1];

        let (mut graph, a) = self.open(x.source(), beta)?;
        let conv = Conv::pointwise("conv1".into(), in_chs, middle, Norm::Plain);
        let y = self.conv(&mut graph, &a, &conv)?;
        let mut maps = vec![y];
        if transition.is_some() {
            let conv = Conv { stride, ..Conv::pointwise("shortcut".into(), in_chs, channels, Norm::Plain) };
            maps.push(self.conv(&mut graph, &a, &conv)?);
        }
        let mut first = self.finish(graph, &x, maps)?;
        let shortcut = if transition.is_some() { first.take("shortcut") } else { x };
        let y = first.take("conv1");

        let (mut graph, a) = self.open(y.source(), 1.0)?;
        let conv = Conv::square("conv2".into(), (middle, middle), 3, stride, Norm::Plain);
        let y2 = self.conv(&mut graph, &a, &conv)?;
        let y = self.finish(graph, &y, vec![y2])?.last();

        let (mut graph, a) = self.open(y.source(), 1.0)?;
        let conv = Conv::pointwise("conv3".into(), middle, channels, Norm::Plain);
        let residual = self.conv(&mut graph, &a, &conv)?;
        let [_, chs, height, width] = shortcut.shape;
        let other = graph.input("shortcut", chs, height, width);
        let alpha = if self.net.variant.normalizer_free() { self.net.alpha } else { 1.0 };
        let scaled = if alpha == 1.0 { residual.clone() } else { graph.scale(&residual, alpha)? };
        let sum = graph.add(&scaled, &other, "sum");
        let mut outputs = self.outputs(&mut graph, vec![sum]);
        graph.output(&residual);
        outputs.statistics_only = Some(residual.name);
        let source = y.source();
        let views = [
            MapView { name: "x", shape: source.shape, data: &source.data },
            MapView { name: "shortcut", shape: shortcut.shape, data: &shortcut.data },
        ];
        let mut finished = self.run(graph, "a block", &views, outputs)?;
        let residual = finished.statistics.take().unwrap_or_default();
        Ok((finished.last(), residual))
    }

    /// Starts a graph that reads `x` and applies what precedes a convolution: normalisation, β, activation.
    fn open(&self, x: &Layer, beta: f64) -> Result<(GraphBuilder, Map), SppError> {
        let [_, chs, height, width] = x.shape;
        let mut graph = empty_graph();
        let mut map = graph.input("x", chs, height, width);
        if self.net.variant.batch_norm() {
            let constants = [
                ("norm.scale", vec![1.0; chs]),
                ("norm.shift", vec![0.0; chs]),
                ("norm.mean", x.moments.means()),
                ("norm.variance", x.moments.variances()),
            ];
            for (name, values) in &constants {
                graph.constant(name, &[chs], values)?;
            }
            map = graph.batch_norm(&map, "norm", constants.each_ref().map(|c| c.0), EPS);
        }
        if beta != 1.0 {
            map = graph.scale(&map, beta)?;
        }
        // if the activation comes first, the previous layer's graph has applied it
        if self.net.variant != Variant::ReluBnConv {
            map = graph.activation(&map, self.net.activation, "act");
        }
        Ok((graph, map))
    }

    fn conv(&mut self, graph: &mut GraphBuilder, x: &Map, conv: &Conv) -> Result<Map, SppError> {
        let gain = match self.net.variant {
            Variant::ReluBnConv => 1.0,
            Variant::NfWs | Variant::BnReluConv | Variant::NfHe | Variant::Plain => self.he_gain,
        };
        let weight = self.weights(conv, gain, self.net.variant == Variant::NfWs);
        convolve(graph, x, conv, &weight)
    }

    /// Normal weights of variance `gain`/fan-in, or weights standardised to γ. The latter are drawn with unit variance,
    /// so that eps doesn't shrink them (at variance 1/fan-in, it removes 4 % at a fan-in of 4608).
    fn weights(&mut self, conv: &Conv, gain: f64, standardised: bool) -> Vec<f64> {
        let deviation = if standardised { 1.0 } else { (gain / conv.fan_in() as f64).sqrt() };
        let count = conv.weight_shape().iter().product();
        let normals = StandardNormal.sample_iter(&mut self.rng).take(count);
        let mut weight: Vec<f64> = normals.map(|z: f64| z * deviation).collect();
        if standardised {
            scaled_ws::standardise(&mut weight, &vec![1.0; conv.out_chs], self.gamma, EPS);
        }
        weight
    }

    /// Declares `maps` as outputs, with their activations if the next normalisation needs these.
    fn outputs(&self, graph: &mut GraphBuilder, maps: Vec<Map>) -> Outputs {
        let activation = self.net.activation;
        let mut names = Vec::new();
        for map in maps {
            graph.output(&map);
            // the shortcut is added, not normalised
            let wanted = self.net.variant == Variant::ReluBnConv && map.name != "shortcut";
            let activated = (wanted && activation != Activation::Identity).then(|| {
                let activated = graph.activation(&map, activation, &format!("{}.act", map.name));
                graph.output(&activated);
                activated.name
            });
            names.push((map.name, activated));
        }
        Outputs { names, statistics_only: None }
    }

    fn finish(&self, mut graph: GraphBuilder, x: &Layer, maps: Vec<Map>) -> Result<Finished, SppError> {
        let outputs = self.outputs(&mut graph, maps);
        let source = x.source();
        let view = MapView { name: "x", shape: source.shape, data: &source.data };
        self.run(graph, "a layer", &[view], outputs)
    }

    fn run(
        &self,
        graph: GraphBuilder,
        what: &str,
        inputs: &[MapView<'_>],
        outputs: Outputs,
    ) -> Result<Finished, SppError> {
        let mut backend = MapBackend::open(&graph.encode(&[])?, what, &self.options)?;
        let mut finished = Finished::default();
        backend.run(inputs, |view| {
            if outputs.statistics_only.as_deref() == Some(view.name) {
                let mut moments = ChannelMoments::default();
                moments.add(view.shape, view.data);
                finished.statistics = Some(moments);
            } else {
                finished.layers.push((view.name.into(), Layer::copy(view)));
            }
        })?;
        for (name, activated) in outputs.names {
            if let Some(activated) = activated {
                let layer = Box::new(finished.take(&activated));
                if let Some((_, owner)) = finished.layers.iter_mut().find(|(n, _)| *n == name) {
                    owner.activated = Some(layer);
                }
            }
        }
        Ok(finished)
    }
}

/// Outputs of a graph: maps by name, each with the name of its activation.
struct Outputs {
    names: Vec<(String, Option<String>)>,
    /// A map of which only the moments are needed.
    statistics_only: Option<String>,
}

#[derive(Default)]
struct Finished {
    layers: Vec<(String, Layer)>,
    statistics: Option<ChannelMoments>,
}

impl Finished {
    /// The layer of this name, which the graph declared as an output.
    fn take(&mut self, name: &str) -> Layer {
        let at = self.layers.iter().position(|(n, _)| n == name);
        self.layers.swap_remove(at.expect("the graph gives out what it was told to")).1
    }

    fn last(mut self) -> Layer {
        self.layers.pop().expect("the graph gives out what it was told to").1
    }
}

fn empty_graph() -> GraphBuilder {
    GraphBuilder::empty(Emission {
        height: 0,
        width: 0,
        dynamic: false,
        precision: Precision::Fp32,
        gate: Gate::Broadcast,
        same_padding: false,
    })
}

fn convolve(graph: &mut GraphBuilder, x: &Map, conv: &Conv, weight: &[f64]) -> Result<Map, SppError> {
    let name = graph.constant(&format!("{}.weight", conv.name), &conv.weight_shape(), weight)?;
    Ok(graph.conv(x, conv, &name, None))
}
