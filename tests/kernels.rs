//! Our own kernels compute what their definition says, whatever the shape, and the same bits however the work is divided.

use nfold::engine::{Backend as _, Batch, EngineOptions, Fitted, OrtBackend, channel_block};
use nfold::graph::{Emission, GraphBuilder, Map, Term};
use nfold::kernels::activation::Activation;
use nfold::kernels::grouped_conv::{Block, GroupedConv};
use nfold::kernels::pointwise_conv::{Outputs, Panel};
use nfold::kernels::processor::Processor;
use nfold::kernels::scratch::Scratch;
use nfold::model::{Gate, Precision};
use nfold::nets::{self, Conv, Norm};
use nfold::relayout::Kernels;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

fn values(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-scale..scale)).collect()
}

/// Those that this machine has, beside the portable one.
fn processors() -> Vec<Processor> {
    let all = [Processor::Avx512, Processor::Avx2];
    let here: Vec<_> = all.into_iter().filter(|processor| processor.is_here()).collect();
    if here.len() < all.len() {
        crate::cli::skip("not every processor's kernels run here");
    }
    here
}

/// A convolution of some shape, if it has a kernel.
fn conv(rng: &mut ChaCha8Rng, block: usize) -> Option<GroupedConv> {
    let group = *[4, 8, 16, 32].choose(rng)?;
    let kernel = 3;
    let stride = rng.random_range(1..=2);
    let (height, width) = (rng.random_range(1..20), rng.random_range(1..40));
    let mut pad = || rng.random_range(0..=kernel / 2);
    let (top, left, bottom, right) = (pad(), pad(), pad(), pad());
    let out = |side: usize, pads: usize| Some((side + pads).checked_sub(kernel)? / stride + 1);
    let (out_height, out_width) = (out(height, top + bottom)?, out(width, left + right)?);
    let (before, after) = (*Activation::ALL.choose(rng)?, *Activation::ALL.choose(rng)?);
    let pads = [top, left];
    let conv = GroupedConv { block, group, kernel, stride, height, width, pads, out_height, out_width, before, after };
    conv.is_supported().then_some(conv)
}

/// One block of output channels, in so many bands of rows; its sums too if it is one.
fn run(
    conv: &GroupedConv,
    processor: Processor,
    map: [&[f32]; 3],
    bands: usize,
    scratch: &mut Scratch,
) -> [Vec<f32>; 2] {
    let [input, weight, bias] = map;
    let line = conv.out_width * conv.block;
    let (mut output, mut sums) = (vec![f32::NAN; conv.out_height * line], vec![f32::NAN; conv.block]);
    let rows = conv.out_height.div_ceil(bands);
    for (band, output) in output.chunks_mut(rows * line).enumerate() {
        let sums = (bands == 1).then_some(sums.as_mut_slice());
        processor.convolve(conv, Block { input, weight, bias, output, first: band * rows, sums }, scratch);
    }
    [output, sums]
}

#[test]
fn convolutions_are_those_of_the_portable_version_in_the_same_bits_by_bands() {
    let (mut rng, mut scratch, mut seen) = (ChaCha8Rng::seed_from_u64(22), Scratch::default(), 0);
    for processor in processors() {
        let block = processor.block();
        for _ in 0..150 {
            let Some(conv) = conv(&mut rng, block) else { continue };
            let input = values(&mut rng, conv.depth() * conv.height * conv.width * block, 3.0);
            let fan_in = (conv.group * conv.kernel * conv.kernel) as f32;
            let plain = values(&mut rng, block * conv.group * conv.kernel * conv.kernel, 1.0 / fan_in.sqrt());
            let mut weight = Vec::new();
            conv.groups().arrange(&plain, |v| v, &mut weight);
            let bias = values(&mut rng, block, 1.0);
            let map = [input.as_slice(), weight.as_slice(), bias.as_slice()];
            let [output, sums] = run(&conv, processor, map, 1, &mut scratch);
            let [expected, totals] = run(&conv, Processor::Portable(block), map, 1, &mut scratch);
            let near = |(a, b): (&f32, &f32), of: f32| (a - b).abs() <= of;
            assert!(output.iter().zip(&expected).all(|pair| near(pair, 1e-5)), "{processor:?} {conv:?}");
            let pixels = (conv.out_height * conv.out_width) as f32;
            assert!(sums.iter().zip(&totals).all(|pair| near(pair, 1e-5 * pixels)), "{processor:?} {conv:?}");
            let [banded, _] = run(&conv, processor, map, rng.random_range(1..=conv.out_height), &mut scratch);
            assert!(
                banded.iter().map(|v| v.to_bits()).eq(output.iter().map(|v| v.to_bits())),
                "{processor:?} {conv:?}"
            );
            seen += 1;
        }
    }
    assert!(seen > 0 || processors().is_empty());
}

/// The portable version is what a convolution of channels as ONNX orders them is.
#[test]
fn the_portable_version_is_the_definition() {
    let (mut rng, mut scratch) = (ChaCha8Rng::seed_from_u64(5), Scratch::default());
    for block in [8, 16] {
        for _ in 0..60 {
            let Some(conv) = conv(&mut rng, block) else { continue };
            let (g, k) = (conv.group, conv.kernel);
            let input = values(&mut rng, conv.depth() * conv.height * conv.width * block, 3.0);
            let plain = values(&mut rng, block * g * k * k, 1.0 / ((g * k * k) as f32).sqrt());
            let mut weight = Vec::new();
            conv.groups().arrange(&plain, |v| v, &mut weight);
            let bias = values(&mut rng, block, 1.0);
            let map = [input.as_slice(), weight.as_slice(), bias.as_slice()];
            let [output, _] = run(&conv, Processor::Portable(block), map, 1, &mut scratch);
            let channel = rng.random_range(0..block);
            let (y, x) = (rng.random_range(0..conv.out_height), rng.random_range(0..conv.out_width));
            let mut sum = f64::from(bias[channel]);
            for (i, ky, kx) in (0..g).flat_map(|i| (0..k).flat_map(move |ky| (0..k).map(move |kx| (i, ky, kx)))) {
                let inside = |at: usize, pad: usize, side: usize| at.checked_sub(pad).filter(|&at| at < side);
                let row = inside(y * conv.stride + ky, conv.pads[0], conv.height);
                let column = inside(x * conv.stride + kx, conv.pads[1], conv.width);
                let Some((row, column)) = row.zip(column) else { continue };
                let source = if g >= block { i } else { channel / g * g + i };
                let at = ((source / block * conv.height + row) * conv.width + column) * block + source % block;
                let value = f64::from(conv.before.of(input[at]));
                sum += value * f64::from(plain[((channel * g + i) * k + ky) * k + kx]);
            }
            let got = output[(y * conv.out_width + x) * block + channel];
            assert!((conv.after.of(sum as f32) - got).abs() < 1e-5, "{conv:?}: {got} instead of {sum}");
        }
    }
}

/// Some pixels of a map, as a kernel reads them, and what it makes of them.
struct Pixels {
    /// Pixels, blocks in, blocks out.
    sizes: [usize; 3],
    /// `[blocks in, pixels, b]`
    x: Vec<f32>,
    /// `[blocks out, blocks in, b, b]`
    weight: Vec<f32>,
    /// `[blocks out, b]`
    bias: Vec<f32>,
    /// `[blocks out, pixels, b]`
    sum: Option<Vec<f32>>,
    after: Activation,
}

impl Pixels {
    fn any(rng: &mut ChaCha8Rng, b: usize) -> Self {
        let sizes = [rng.random_range(1..90), rng.random_range(1..7), rng.random_range(1..6)];
        let [pixels, depth, blocks] = sizes;
        let x = values(rng, depth * pixels * b, 3.0);
        let weight = values(rng, blocks * b * depth * b, 1.0 / ((depth * b) as f32).sqrt());
        let bias = values(rng, blocks * b, 1.0);
        let sum = rng.random_bool(0.5).then(|| values(rng, blocks * pixels * b, 3.0));
        Self { sizes, x, weight, bias, sum, after: *Activation::ALL.choose(rng).unwrap() }
    }

    /// The outputs, `part` pixels of `group` blocks at a time.
    fn run(&self, processor: Processor, part: usize, group: usize) -> Vec<f32> {
        let ([pixels, depth, blocks], b) = (self.sizes, processor.block());
        let mut y = self.sum.clone().unwrap_or_else(|| vec![f32::NAN; blocks * pixels * b]);
        for (g, y) in y.chunks_mut(group * pixels * b).enumerate() {
            let mut parts: Vec<Vec<&mut [f32]>> = Vec::new();
            parts.resize_with(pixels.div_ceil(part), Vec::new);
            for map in y.chunks_mut(pixels * b) {
                map.chunks_mut(part * b).zip(&mut parts).for_each(|(map, part)| part.push(map));
            }
            for (p, maps) in parts.iter_mut().enumerate() {
                let panel = Panel { values: &self.x[p * part * b..], pitch: pixels * b, depth };
                let (first, last) = (g * group * b, (g * group + maps.len()) * b);
                let weight = &self.weight[first * depth * b..last * depth * b];
                let (bias, adds) = (&self.bias[first..last], self.sum.is_some());
                processor.convolve_pixels(panel, Outputs { weight, bias, maps, adds, after: self.after });
            }
        }
        y
    }
}

#[test]
fn convolutions_of_single_pixels_are_the_definition_in_the_same_bits_by_parts() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for processor in processors().into_iter().chain([Processor::Portable(8), Processor::Portable(16)]) {
        let b = processor.block();
        for _ in 0..150 {
            let map = Pixels::any(&mut rng, b);
            let [pixels, depth, blocks] = map.sizes;
            let y = map.run(processor, pixels, blocks);
            for _ in 0..60 {
                let (out, p) = (rng.random_range(0..blocks * b), rng.random_range(0..pixels));
                let input = |i: usize| f64::from(map.x[(i / b * pixels + p) * b + i % b]);
                let weight = |i: usize| f64::from(map.weight[(out / b * depth * b + i) * b + out % b]);
                let sum: f64 = (0..depth * b).map(|i| input(i) * weight(i)).sum();
                let at = (out / b * pixels + p) * b + out % b;
                let added = map.sum.as_ref().map_or(0.0, |sum| sum[at]);
                let exact = map.after.of((sum + f64::from(map.bias[out]) + f64::from(added)) as f32);
                assert!((y[at] - exact).abs() < 2e-5, "{processor:?} {:?}: {} instead of {exact}", map.sizes, y[at]);
            }
            let (part, group) = (rng.random_range(1..=pixels), rng.random_range(1..=blocks));
            let divided = map.run(processor, part, group);
            assert!(
                divided.iter().map(|v| v.to_bits()).eq(y.iter().map(|v| v.to_bits())),
                "{processor:?} {:?}",
                map.sizes
            );
        }
    }
}

#[test]
#[should_panic(expected = "outputs.fit")]
fn pixels_that_are_not_there_are_not_read() {
    let mut map = Pixels::any(&mut ChaCha8Rng::seed_from_u64(1), 8);
    map.x.pop();
    map.run(Processor::Portable(8), map.sizes[0], map.sizes[2]);
}

/// A graph of operators in any order that ours take part in.
struct AnyGraph<'a> {
    g: GraphBuilder,
    rng: &'a mut ChaCha8Rng,
    layers: usize,
}

impl AnyGraph<'_> {
    fn onnx(rng: &mut ChaCha8Rng, block: usize, [height, width]: [usize; 2]) -> Vec<u8> {
        let (precision, gate) = (Precision::Fp32, Gate::Resize);
        let (height, width) = (height as u32, width as u32);
        let emission = Emission { height, width, dynamic: false, precision, gate, same_padding: false };
        let (g, image) = GraphBuilder::new(emission, 3);
        let mut any = AnyGraph { g, rng, layers: 0 };
        let chs = block * any.rng.random_range(1..4);
        let mut x = any.conv(&image, chs, 3, 1, 1);
        for _ in 0..any.rng.random_range(1..5) {
            x = any.activation(&x);
            let (chs, stride) = (block * any.rng.random_range(1..6), any.rng.random_range(1..3));
            x = any.conv(&x, chs, 1, stride, 1);
            x = any.activation(&x);
            x = match any.rng.random_range(0..4) {
                0 => any.gated(&x),
                1 => {
                    let stride = any.rng.random_range(1..3);
                    let x = any.conv(&x, chs, 3, stride, chs / 4);
                    any.gated(&x)
                }
                2 => {
                    let act = any.activation(&x);
                    let y = any.conv(&act, chs, 1, 1, 1);
                    any.layers += 1;
                    let name = format!("sum{}", any.layers);
                    any.g.add(&y, &x, &name)
                }
                _ => x,
            };
        }
        let mut g = any.g;
        let numbers: Vec<f64> = (0..x.chs * 4).map(|_| any.rng.random_range(-1.0..1.0)).collect();
        let weight = g.constant("head.weight", &[4, x.chs], &numbers).unwrap();
        let bias = g.constant("head.bias", &[4], &numbers[..4]).unwrap();
        let pooled = g.global_average_pool(&x, "head.pool");
        let values = g.flatten(&pooled, "head.flatten");
        g.classifier(&[Term { values, width: x.chs, weight }], &bias, 4, "head");
        g.finish(4, &[]).unwrap()
    }

    fn conv(&mut self, x: &Map, out_chs: usize, kernel: usize, stride: usize, groups: usize) -> Map {
        self.layers += 1;
        let (name, norm) = (format!("conv{}", self.layers), Norm::Plain);
        let c = Conv { name, in_chs: x.chs, out_chs, kernel, stride, dilation: 1, groups, norm };
        let shape = c.weight_shape();
        let scale = (c.fan_in() as f64).sqrt().recip();
        let mut numbers = |count: usize| (0..count).map(|_| self.rng.random_range(-scale..scale)).collect::<Vec<_>>();
        let weight = self.g.constant(&format!("{}.weight", c.name), &shape, &numbers(shape.iter().product())).unwrap();
        let bias = self.g.constant(&format!("{}.bias", c.name), &[out_chs], &numbers(out_chs)).unwrap();
        self.g.conv(x, &c, &weight, Some(&bias))
    }

    fn activation(&mut self, x: &Map) -> Map {
        use nets::activation::Activation::{Gelu, Relu, Silu};
        self.layers += 1;
        match [None, Some(Relu), Some(Silu), Some(Gelu)].choose(self.rng).copied().flatten() {
            Some(activation) => self.g.activation(x, activation, &format!("act{}", self.layers)),
            None => x.clone(),
        }
    }

    fn gated(&mut self, x: &Map) -> Map {
        self.layers += 1;
        let name = format!("gate{}", self.layers);
        let mean = self.g.global_average_pool(x, &format!("{name}.mean"));
        let gate = self.conv(&mean, x.chs, 1, 1, 1);
        let gate = self.g.sigmoid(&gate, &format!("{name}.sigmoid"));
        self.g.gate(x, &gate, &name)
    }
}

/// Whatever operators ours stand for, they make the logits that ONNX Runtime makes of the graph as it was; of every image the
/// same bits, alone or in a batch, with one thread or two.
#[test]
fn operators_are_what_they_stand_for_in_the_same_bits_in_any_batch() {
    let Some(block) = channel_block() else {
        crate::cli::skip("without AVX2 nothing is laid out");
        return;
    };
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for case in 0..60 {
        // some maps are divided among threads by pixels, some by channels, some by bands of rows of which the last is shorter
        let most = if case % 3 == 0 { 160 } else { 40 };
        let sides = [rng.random_range(4..most), rng.random_range(4..most)];
        let onnx = AnyGraph::onnx(&mut rng, block, sides);
        let [height, width] = sides;
        let size = 3 * height * width;
        let data = values(&mut rng, 3 * size, 2.0);
        let run = |graph: &Fitted, threads: usize, images: &[f32]| {
            let options = EngineOptions { intra_threads: threads, ..EngineOptions::default() };
            let mut backend = OrtBackend::open_fitted(graph, "any", &options).unwrap();
            let batch = Batch { images: images.len() / size, height, width, data: images.to_vec() };
            backend.run(&batch).unwrap().data
        };
        let own = Fitted::for_this_cpu(onnx.clone(), Kernels::Own);
        assert!(own.is_laid_out(), "case {case}");
        let expected = run(&Fitted::as_it_is(onnx), 1, &data);
        let logits = run(&own, 1, &data);
        let most = expected.iter().fold(1.0_f32, |most, v| most.max(v.abs()));
        let apart = expected.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart <= 2e-5 * most, "case {case}: {apart} apart, {sides:?}");
        let bits = |logits: &[f32]| logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&run(&own, 2, &data)), bits(&logits), "case {case}: two threads");
        for (image, logits) in data.chunks_exact(size).zip(logits.chunks_exact(4)) {
            assert_eq!(bits(&run(&own, 1, image)), bits(logits), "case {case}: alone");
        }
    }
}

#[test]
fn activations_are_exact_to_a_few_bits_and_keep_what_is_no_number() {
    let odd = [0.0, -0.0, 1e-40, -1e-40, 87.5, -87.5, 1e30, -1e30, -3e38, f32::INFINITY, f32::NAN, 1e-5, -1e-5];
    let mut x: Vec<f32> = (-8000..8000).map(|i| i as f32 * 1e-2).chain(odd).collect();
    x.resize(x.len().next_multiple_of(16), 1.0);
    for processor in processors() {
        for activation in Activation::ALL {
            let mut y = x.clone();
            processor.activate(activation, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let exact = activation.of(*x);
                let near = (exact - y).abs() <= 3e-7 * x.abs().max(1.0) || exact == *y || exact.is_nan() && y.is_nan();
                assert!(near || x.is_nan() && y.is_nan(), "{processor:?} {activation:?} of {x}: {y}, not {exact}");
                let vanishes = *x < -100.0 && activation != Activation::None;
                assert!(!vanishes || y.abs() < 1e-10, "{processor:?} {activation:?} of {x}: {y}");
            }
            let gate = vec![0.5; processor.block()];
            let mut gated = x.clone();
            processor.gated(activation, &gate, &mut gated);
            y = x.iter().map(|v| v * 0.5).collect();
            processor.activate(activation, &mut y);
            assert!(
                gated.iter().map(|v| v.to_bits()).eq(y.iter().map(|v| v.to_bits())),
                "{processor:?} {activation:?}"
            );
        }
    }
}
