//! Preprocessing against `fast_image_resize`: the same crop of the same images, one thread, interleaved.
//!
//! `cargo bench --bench preprocess [ROUNDS]` prints the median of each and their ratio. The opponent resizes only what
//! the crop keeps (its crop box), with its best instruction set and buffers reused; it is not bit-equal to Pillow.

use std::hint::black_box;
use std::time::{Duration, Instant};

use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, images};
use nfold::model::{CropMode, Interpolation, Preprocessing};
use nfold::pixels::{Picture, Preprocessor, RgbImage, resize};

const SIZE: u32 = 256;
const SHORT: u32 = 284;

fn main() {
    let rounds = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(31);
    println!(
        "image       nfold/ms  opponent/ms  ratio  tensor/ms   (bicubic, {SIZE}x{SIZE} of short side {SHORT}, {rounds} rounds)"
    );
    for (width, height) in [(500, 375), (1920, 1080), (4000, 3000), (375, 500), (60, 40), (300, 900)] {
        let image = photograph(width, height);
        let picture = Picture::from(image.clone());
        // with a crop as large as the image, `apply` resizes and normalises; the resize's share is measured separately
        let whole = Preprocessing {
            height: SIZE,
            width: SIZE,
            crop_pct: f64::from(SIZE) / f64::from(SHORT),
            crop_mode: CropMode::Center,
            interpolation: Interpolation::Bicubic,
            mean: vec![0.485, 0.456, 0.406],
            std: vec![0.229, 0.224, 0.225],
            exif_orientation: false,
        };
        let preprocessor = Preprocessor::new(&whole);
        let mut tensor = vec![0.0; preprocessor.tensor_len()];

        let short = f64::from(width.min(height));
        let side = f64::from(SIZE) * short / f64::from(SHORT);
        let (left, top) = ((f64::from(width) - side) / 2.0, (f64::from(height) - side) / 2.0);
        let options =
            ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).crop(left, top, side, side);
        let source = images::ImageRef::new(width, height, &image.data, PixelType::U8x3).expect("packed RGB");
        let mut target = images::Image::new(SIZE, SIZE, PixelType::U8x3);
        let mut opponent = Resizer::new();

        let (mut ours, mut theirs, mut table) = (Vec::new(), Vec::new(), Vec::new());
        let square = Picture::from(resize(&picture, SIZE, SIZE, Interpolation::Bicubic));
        for _ in 0..rounds {
            ours.push(time(|| preprocessor.apply(black_box(&picture), black_box(&mut tensor))));
            theirs.push(time(|| {
                opponent.resize(black_box(&source), black_box(&mut target), &options).expect("sizes fit")
            }));
            // resizing 256 to 256: a copy and the weight tables
            let plain = Preprocessor::new(&Preprocessing { crop_pct: 1.0, ..whole.clone() });
            table.push(time(|| plain.apply(black_box(&square), black_box(&mut tensor))));
        }
        let (all, theirs, table) = (median(ours), median(theirs), median(table));
        let ours = all.saturating_sub(table);
        println!(
            "{:<11} {:8.3} {:12.3} {:6.2} {:10.3}",
            format!("{width}x{height}"),
            ours.as_secs_f64() * 1e3,
            theirs.as_secs_f64() * 1e3,
            ours.as_secs_f64() / theirs.as_secs_f64(),
            table.as_secs_f64() * 1e3,
        );
    }
}

/// Smooth shapes with some noise; the content does not affect the time of either.
fn photograph(width: u32, height: u32) -> RgbImage {
    let mut state = 1u32;
    let data = (0..width * height * 3)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (i / 3 % width / 7 + i / 3 / width / 5 + (state >> 27)) as u8
        })
        .collect();
    RgbImage { width, height, data }
}

fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
