//! The image path on arbitrary bytes: no panic, and what decodes becomes finite numbers.
//!
//! `cargo fuzz run image -- -max_total_time=600 -rss_limit_mb=2048`, with `tests/data/preprocess/images` as the corpus.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nfold::pixels::{Decoder, ImageLimits, Preprocessor, Scale};
use nfold::model::{CropMode, Interpolation, Preprocessing};

fuzz_target!(|bytes: &[u8]| {
    // smaller than in service: the fuzzer shall look for damage, not wait for honest pixels
    let limits = ImageLimits { max_side: 2048, max_pixels: 1 << 20, max_decoded_bytes: 16 << 20, ..Default::default() };
    let jpeg = if bytes.len() % 3 == 0 { Scale::Fast } else { Scale::Exact };
    let decoder = Decoder { limits, jpeg };
    let Ok(image) = decoder.decode(bytes, bytes.len() % 2 == 0, |w, h| [w.div_ceil(3), h.div_ceil(2)]) else { return };
    let crop_mode = [CropMode::Center, CropMode::Squash, CropMode::Border][bytes.len() % 3];
    let interpolation =
        [Interpolation::Bicubic, Interpolation::Bilinear, Interpolation::Lanczos, Interpolation::Nearest][bytes.len() % 4];
    let preprocessor = Preprocessor::new(&Preprocessing {
        height: 32,
        width: 40,
        crop_pct: 0.9,
        crop_mode,
        interpolation,
        mean: [0.5; 3],
        std: [0.5; 3],
        exif_orientation: true,
    });
    let mut tensor = vec![f32::NAN; preprocessor.tensor_len()];
    preprocessor.apply(&image, &mut tensor);
    assert!(tensor.iter().all(|value| value.is_finite()));
});
