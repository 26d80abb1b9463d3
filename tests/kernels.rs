//! Our own kernels compute what their definition says, whatever the shape, and the same bits however the work is divided.

use nfold::kernels::activation::Activation;
use nfold::kernels::grouped_conv::{Block, GroupedConv};
use nfold::kernels::processor::Processor;
use nfold::kernels::scratch::Scratch;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

const ACTIVATIONS: [Activation; 4] = [Activation::None, Activation::Relu, Activation::Silu, Activation::Gelu];

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
    let (before, after) = (*ACTIVATIONS.choose(rng)?, *ACTIVATIONS.choose(rng)?);
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

#[test]
fn activations_are_exact_to_a_few_bits_and_keep_what_is_no_number() {
    let odd = [0.0, -0.0, 1e-40, -1e-40, 87.5, -87.5, 1e30, -1e30, -3e38, f32::INFINITY, f32::NAN, 1e-5, -1e-5];
    let mut x: Vec<f32> = (-8000..8000).map(|i| i as f32 * 1e-2).chain(odd).collect();
    x.resize(x.len().next_multiple_of(16), 1.0);
    for processor in processors() {
        for activation in ACTIVATIONS {
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
