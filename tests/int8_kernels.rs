//! Integer kernels of every processor equal the reference to the bit, whatever the shape and however the work is divided.

use nfold::kernels::int8::conv_shape::ConvShape;
use nfold::kernels::int8::float_conv::FloatConv;
use nfold::kernels::int8::packed::Packed;
use nfold::kernels::int8::packed_floats::PackedFloats;
use nfold::kernels::int8::processor::Processor;
use nfold::kernels::int8::scratch::Scratch;
use nfold::kernels::int8::{Band, Conv, Gated, Output, Pool, Read, SLACK, ToBytes, reference};
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Those that this machine has, beside the portable one.
fn processors() -> Vec<Processor> {
    let all = Processor::ALL.into_iter().filter(|&processor| processor != Processor::Portable);
    let here: Vec<_> = all.clone().filter(|processor| processor.is_here()).collect();
    if here.len() < all.count() {
        crate::cli::skip("not every processor's integer kernels run here");
    }
    here
}

fn bytes(rng: &mut ChaCha8Rng, count: usize) -> Vec<u8> {
    (0..count).map(|_| rng.random()).collect()
}

fn shorts(rng: &mut ChaCha8Rng, count: usize) -> Vec<i16> {
    (0..count).map(|_| rng.random()).collect()
}

fn to_bytes(rng: &mut ChaCha8Rng) -> ToBytes {
    let table = rng.random::<bool>().then(|| Box::new(std::array::from_fn(|_| rng.random())));
    ToBytes { zero: rng.random(), table }
}

fn bytes_or_sums(rng: &mut ChaCha8Rng) -> Output {
    match rng.random_range(0..4) {
        0 | 1 => Output::Bytes(to_bytes(rng)),
        2 => Output::Sum { relu: rng.random(), read: None },
        _ => Output::Sum { relu: rng.random(), read: Some(Read { factor: 0.01, to: to_bytes(rng) }) },
    }
}

/// Channels, filters and groups: of every kind that kernels tell apart.
fn channels(rng: &mut ChaCha8Rng) -> [usize; 3] {
    let kind = rng.random_range(0..6);
    let (groups, any) = (rng.random_range(1..10), rng.random_range(1..80));
    match kind {
        0 | 1 => {
            let depth = *[2, 3, 4, 8, 8, 16, 24, 32].choose(rng).expect("some");
            [depth * groups, depth * groups, groups]
        }
        2 => [any, any, any],
        3 => [groups * rng.random_range(1..9), groups * rng.random_range(1..30), groups],
        4 => [3, any, 1],
        _ => [rng.random_range(1..150), rng.random_range(1..150), 1],
    }
}

/// A convolution of some shape, if there is an output.
fn conv(rng: &mut ChaCha8Rng) -> Option<Conv> {
    let [channels, filters, groups] = channels(rng);
    let kernel = *[[1, 1], [1, 1], [3, 3], [3, 3], [5, 5], [7, 7], [1, 3], [3, 2]].choose(rng)?;
    let stride = *[[1, 1], [1, 1], [2, 2], [2, 1], [3, 3]].choose(rng)?;
    let dilation = *[[1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [2, 1]].choose(rng)?;
    let size = [rng.random_range(1..14), rng.random_range(1..30)];
    let mut pads = || -> [usize; 2] { kernel.map(|side| rng.random_range(0..side)) };
    let (mut before, mut after) = (pads(), pads());
    if rng.random_range(0..3) == 0 {
        (before, after) = ([0; 2], [0; 2]);
    }
    let out = |i: usize| {
        let reach = (kernel[i] - 1) * dilation[i] + 1;
        Some((size[i] + before[i] + after[i]).checked_sub(reach)? / stride[i] + 1)
    };
    let out_size = [out(0)?, out(1)?];
    let taps = kernel[0] * kernel[1] * channels / groups;
    let scale = 1e-5 / (taps as f32).sqrt();
    let output = if rng.random_range(0..5) == 0 { Output::Singles } else { bytes_or_sums(rng) };
    Some(Conv {
        shape: ConvShape { channels, size, filters, out_size, groups, kernel, stride, dilation, pads: before },
        zero: rng.random(),
        weight: (0..filters * taps).map(|_| rng.random()).collect(),
        bias: (0..filters).map(|_| rng.random_range(-10_000..10_000)).collect(),
        factor: (0..filters).map(|_| rng.random_range(500.0..1500.0) * scale).collect(),
        output,
    })
}

/// Everything that a convolution writes, in bands of so many rows.
fn run(
    packed: &Packed,
    input: &[u8],
    addend: Option<&[i16]>,
    rows: usize,
    scratch: &mut Scratch,
) -> (Vec<i16>, Vec<u8>, Vec<u32>) {
    let conv = packed.conv();
    let line = conv.shape.out_size[1] * conv.shape.filters;
    let values = conv.shape.out_size[0] * line;
    let (mut sums, mut bytes, mut singles) = (vec![7; values], vec![9; values], vec![1.0; values]);
    for first in (0..conv.shape.out_size[0]).step_by(rows) {
        let end = conv.shape.out_size[0].min(first + rows);
        let part = first * line..end * line;
        let band = Band {
            rows: first..end,
            input,
            addend: addend.map(|addend| &addend[part.clone()]),
            sums: Some(&mut sums[part.clone()]),
            bytes: Some(&mut bytes[part.clone()]),
            singles: Some(&mut singles[part]),
        };
        packed.convolve(band, scratch);
    }
    (sums, bytes, singles.into_iter().map(f32::to_bits).collect())
}

#[test]
fn convolutions_are_the_references_in_any_bands() {
    let (mut rng, mut scratch) = (ChaCha8Rng::seed_from_u64(28), Scratch::default());
    let processors = processors();
    for _ in 0..400 {
        let Some(conv) = conv(&mut rng) else { continue };
        let input = bytes(&mut rng, conv.shape.channels * conv.shape.size[0] * conv.shape.size[1] + SLACK);
        let values = conv.shape.filters * conv.shape.out_size[0] * conv.shape.out_size[1];
        let addend = rng.random::<bool>().then(|| shorts(&mut rng, values));
        let reference = Packed::new(Processor::Portable, conv.clone());
        let expected = run(&reference, &input, addend.as_deref(), conv.shape.out_size[0], &mut scratch);
        for &processor in &processors {
            let packed = Packed::new(processor, conv.clone());
            for rows in [conv.shape.out_size[0], rng.random_range(1..=conv.shape.out_size[0])] {
                let got = run(&packed, &input, addend.as_deref(), rows, &mut scratch);
                let shape = || Conv { weight: Vec::new(), bias: Vec::new(), factor: Vec::new(), ..conv.clone() };
                assert!(got == expected, "{processor:?} by {rows} rows: {:?}", shape());
            }
        }
    }
}

/// The same convolution in single precision.
fn floats(rng: &mut ChaCha8Rng, conv: &Conv) -> FloatConv {
    FloatConv {
        shape: conv.shape,
        weight: conv.weight.iter().map(|_| rng.random_range(-1.0..1.0)).collect(),
        bias: conv.bias.iter().map(|_| rng.random_range(-1.0..1.0)).collect(),
    }
}

#[test]
fn convolutions_in_single_precision_are_the_references_in_any_bands() {
    let mut rng = ChaCha8Rng::seed_from_u64(29);
    let processors = processors();
    for _ in 0..400 {
        let Some(conv) = conv(&mut rng) else { continue };
        let conv = floats(&mut rng, &conv);
        let input: Vec<f32> = (0..conv.shape.channels * conv.shape.size[0] * conv.shape.size[1])
            .map(|_| rng.random_range(-3.0..3.0))
            .collect();
        let line = conv.shape.out_size[1] * conv.shape.filters;
        let mut expected = vec![7.0; conv.shape.out_size[0] * line];
        reference::float_conv(&conv, 0..conv.shape.out_size[0], &input, &mut expected);
        let expected: Vec<u32> = expected.into_iter().map(f32::to_bits).collect();
        for processor in processors.iter().copied().chain([Processor::Portable]) {
            let packed = PackedFloats::new(processor, conv.clone());
            let rows = rng.random_range(1..=conv.shape.out_size[0]);
            let mut found = vec![9.0; conv.shape.out_size[0] * line];
            for (i, band) in found.chunks_mut(rows * line).enumerate() {
                packed.convolve(i * rows..i * rows + band.len() / line, &input, band);
            }
            let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
            let shape = || FloatConv { weight: Vec::new(), bias: Vec::new(), ..conv.clone() };
            assert!(found == expected, "{processor:?} by {rows} rows: {:?}", shape());
        }
    }
}

/// The reference itself: against the definition, in double precision.
#[test]
fn convolutions_in_single_precision_are_convolutions() {
    let mut rng = ChaCha8Rng::seed_from_u64(30);
    for _ in 0..50 {
        let Some(conv) = conv(&mut rng) else { continue };
        let conv = floats(&mut rng, &conv);
        let [height, width] = conv.shape.size;
        let input: Vec<f32> = (0..conv.shape.channels * height * width).map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut found = vec![0.0; conv.shape.out_size[0] * conv.shape.out_size[1] * conv.shape.filters];
        reference::float_conv(&conv, 0..conv.shape.out_size[0], &input, &mut found);
        let depth = conv.shape.channels / conv.shape.groups;
        for (i, found) in found.into_iter().enumerate() {
            let (filter, pixel) = (i % conv.shape.filters, i / conv.shape.filters);
            let at = [pixel / conv.shape.out_size[1], pixel % conv.shape.out_size[1]];
            let mut sum = f64::from(conv.bias[filter]);
            for (tap, w) in
                conv.weight.chunks_exact(conv.weight.len() / conv.shape.filters).nth(filter).unwrap().iter().enumerate()
            {
                let (k, channel) =
                    (tap / depth, filter / (conv.shape.filters / conv.shape.groups) * depth + tap % depth);
                let k = [k / conv.shape.kernel[1], k % conv.shape.kernel[1]];
                let [y, x] = [0, 1].map(|i| {
                    (at[i] * conv.shape.stride[i] + k[i] * conv.shape.dilation[i]) as i64 - conv.shape.pads[i] as i64
                });
                if (0..height as i64).contains(&y) && (0..width as i64).contains(&x) {
                    let x = input[(y as usize * width + x as usize) * conv.shape.channels + channel];
                    sum += f64::from(x) * f64::from(*w);
                }
            }
            assert!((f64::from(found) - sum).abs() < 1e-3, "{found} {sum}");
        }
    }
}

/// What is read beyond an image, or left in memory by what ran before, is of no account.
#[test]
fn no_answer_depends_on_what_is_around() {
    let mut rng = ChaCha8Rng::seed_from_u64(82);
    for _ in 0..100 {
        let Some(conv) = conv(&mut rng) else { continue };
        let mut input = bytes(&mut rng, conv.shape.channels * conv.shape.size[0] * conv.shape.size[1] + SLACK);
        for processor in processors() {
            let packed = Packed::new(processor, conv.clone());
            let mut answer = |slack: u8, scratch: &mut Scratch| {
                let image = input.len() - SLACK;
                input[image..].fill(slack);
                run(&packed, &input, None, conv.shape.out_size[0], scratch)
            };
            let mut used = Scratch::default();
            let first = answer(0, &mut used);
            assert!(first == answer(255, &mut used) && first == answer(77, &mut Scratch::default()), "{processor:?}");
        }
    }
}

#[test]
fn extremes_neither_saturate_nor_wrap() {
    let mut scratch = Scratch::default();
    let extremes = [(255, 127), (255, -128), (255, -127)];
    for ((x, weight), groups) in extremes.into_iter().flat_map(|pair| [1, 4, 32].map(|groups| (pair, groups))) {
        let (channels, kernel) = (32, [3, 3]);
        let conv = Conv {
            shape: ConvShape {
                channels,
                size: [5, 6],
                filters: 32,
                out_size: [5, 6],
                groups,
                kernel,
                stride: [1, 1],
                dilation: [1, 1],
                pads: [1, 1],
            },
            zero: 255,
            weight: vec![weight; 32 * 9 * channels / groups],
            bias: vec![0; 32],
            factor: vec![1.0; 32],
            output: Output::Singles,
        };
        let exact = (i32::from(x) * i32::from(weight) * (9 * channels / groups) as i32) as f32;
        let input = vec![x; channels * 30 + SLACK];
        for processor in processors().into_iter().chain([Processor::Portable]) {
            let (_, _, singles) = run(&Packed::new(processor, conv.clone()), &input, None, 5, &mut scratch);
            assert!(singles.iter().all(|&value| f32::from_bits(value) == exact), "{processor:?} {x} {weight} {groups}");
        }
    }
}

/// A map, a gate, terms of sums and a table, and what becomes of them.
#[test]
fn passes_are_the_references() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let processors = processors();
    for _ in 0..400 {
        let (channels, pixels) = (rng.random_range(1..150), rng.random_range(1..90));
        let values = channels * pixels;
        let x = bytes(&mut rng, values + SLACK);
        let (terms, addend) = (shorts(&mut rng, values), shorts(&mut rng, values));
        let addend = rng.random::<bool>().then_some(addend.as_slice());
        let output = bytes_or_sums(&mut rng);
        let gate = bytes(&mut rng, channels);
        let (zero, gate_zero) = (rng.random(), rng.random());
        let single = rng.random_range(0..5) == 0;
        let product = if single { Output::Singles } else { output.clone() };
        let gated = Gated { zero, gate_zero, factor: 0.003, output: product };
        let table = std::array::from_fn(|_| rng.random());
        let image: Vec<f32> = (0..values).map(|_| rng.random_range(-200.0..200.0)).collect();
        let all = |processor: Processor| {
            let mut sums = [vec![1; values], vec![1; values]];
            let mut bytes = [vec![2; values], vec![2; values], vec![0; values], vec![0; values]];
            let mut totals = vec![0; channels];
            let [gated_sums, added_sums] = &mut sums;
            let [gated_bytes, added_bytes, found, quantised] = &mut bytes;
            let band = |sums, bytes| Band {
                rows: 0..1,
                input: &x,
                addend,
                sums: Some(sums),
                bytes: Some(bytes),
                singles: None,
            };
            let mut singles = vec![3.0; values];
            let products = if single {
                Band { sums: None, bytes: None, singles: Some(&mut singles), ..band(&mut [], &mut []) }
            } else {
                band(gated_sums, gated_bytes)
            };
            processor.gated(&gated, &gate, products);
            processor.add(&output, &terms, band(added_sums, added_bytes));
            processor.look_up(&table, &x[..values], found);
            processor.totals(&x[..values], zero, &mut totals);
            processor.quantise(&image, channels, (0.7, zero), quantised);
            (sums, bytes, totals, singles.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let expected = all(Processor::Portable);
        for &processor in &processors {
            assert!(all(processor) == expected, "{processor:?}: {channels} channels, {pixels} pixels, {output:?}");
        }
    }
}

#[test]
fn pools_are_the_references() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let processors = processors();
    for _ in 0..600 {
        let channels = rng.random_range(1..150);
        let size: [usize; 2] = [rng.random_range(1..10), rng.random_range(1..10)];
        let kernel = [rng.random_range(1..5), rng.random_range(1..5)];
        let stride = [rng.random_range(1..4), rng.random_range(1..4)];
        let pads = kernel.map(|side| rng.random_range(0..side));
        let out = |i: usize| Some((size[i] + 2 * pads[i]).checked_sub(kernel[i])? / stride[i] + 1);
        let (Some(height), Some(width)) = (out(0), out(1)) else { continue };
        let (largest, counts_padding, zero) = (rng.random(), rng.random(), rng.random());
        let out_size = [height, width];
        let pool = Pool { channels, size, out_size, kernel, stride, pads, largest, counts_padding, zero };
        let x = bytes(&mut rng, channels * size[0] * size[1] + SLACK);
        let run = |processor: Processor| {
            let mut y = vec![0; channels * height * width];
            processor.pool(&pool, &x, &mut y);
            y
        };
        let expected = run(Processor::Portable);
        for &processor in &processors {
            assert_eq!(run(processor), expected, "{processor:?} {pool:?}");
        }
    }
}
