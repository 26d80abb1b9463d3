//! What nfold makes of image files, for comparison with other decoders: `tests/data/preprocess/compare_pillow.py`.
//!
//! Paths come on standard input, one a line; for each a line of JSON goes to standard output: width, height and the SHA-256
//! of the RGB bytes, or the reason and the message of the refusal. With `--fast WIDTHxHEIGHT` JPEGs are decoded for that
//! size (`--jpeg-scale fast`), with `--upright` images are turned as their EXIF block says. With `--time ROUNDS` a line tells
//! the median of the milliseconds from encoded bytes to a tensor of 224 × 224 (bicubic, 0.9 of the image), for
//! `benches/pixels.py`.

use std::io::{BufRead as _, Write as _};
use std::time::Instant;

use nfold::model::{CropMode, Interpolation, Preprocessing};
use nfold::pixels::{Decoder, ImageError, Picture, Preprocessor, Scale};
use serde_json::json;
use sha2::{Digest as _, Sha256};

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let upright = arguments.iter().any(|argument| argument == "--upright");
    let fast = arguments.iter().position(|argument| argument == "--fast");
    let fast = fast.and_then(|at| arguments.get(at + 1)?.split_once('x'));
    let fast = fast.and_then(|(width, height)| Some([width.parse().ok()?, height.parse().ok()?]));
    let jpeg = if fast.is_some() { Scale::Fast } else { Scale::Exact };
    let decoder = Decoder { jpeg, ..Decoder::default() };
    let time = arguments.iter().position(|argument| argument == "--time");
    let rounds: usize = time.and_then(|at| arguments.get(at + 1)?.parse().ok()).unwrap_or(0);
    let mut out = std::io::stdout().lock();
    for path in std::io::stdin().lock().lines() {
        let path = path?;
        let bytes = std::fs::read(&path)?;
        if rounds > 0 {
            let milliseconds = median(&decoder, &bytes, rounds).map_err(std::io::Error::other)?;
            writeln!(out, "{}", json!({ "file": path, "ms": milliseconds }))?;
            continue;
        }
        let decoded = std::panic::catch_unwind(|| {
            decoder.decode(&bytes, upright, |width, height| fast.unwrap_or([width, height])).map(Picture::into_rgb)
        });
        let line = match decoded {
            Ok(Ok(image)) => {
                let digest: String = Sha256::digest(&image.data).iter().map(|byte| format!("{byte:02x}")).collect();
                json!({ "file": path, "size": [image.width, image.height], "sha256": digest })
            }
            Ok(Err(error)) => json!({ "file": path, "reason": error.reason(), "error": error.to_string() }),
            Err(_) => json!({ "file": path, "reason": "panic", "error": "it panicked" }),
        };
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Median time from encoded bytes to a tensor.
fn median(decoder: &Decoder, bytes: &[u8], rounds: usize) -> Result<f64, ImageError> {
    let preprocessor = Preprocessor::new(&Preprocessing {
        height: 224,
        width: 224,
        crop_pct: 0.9,
        crop_mode: CropMode::Center,
        interpolation: Interpolation::Bicubic,
        mean: vec![0.485, 0.456, 0.406],
        std: vec![0.229, 0.224, 0.225],
        exif_orientation: false,
    });
    let mut tensor = vec![0.0; preprocessor.tensor_len()];
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let started = Instant::now();
        let image = decoder.decode(bytes, false, |width, height| preprocessor.resized(width, height))?;
        preprocessor.apply(&image, &mut tensor);
        times.push(started.elapsed().as_secs_f64() * 1e3);
        std::hint::black_box(&tensor);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[rounds / 2])
}
