//! Encoded images, by format: a decoded image gives finite numbers, within the memory claimed from its header.

use super::{Door, Verdict, counted, files, is_readable, root, run};
use crate::model::{CropMode, Interpolation, Preprocessing};
use crate::pixels::{Decoder, ImageError, ImageLimits, Preprocessor, Scale};

/// Smaller than in service: damage is of interest, not pixels.
const LIMITS: ImageLimits =
    ImageLimits { max_bytes: 1 << 20, max_side: 1024, max_pixels: 1 << 18, max_decoded_bytes: 8 << 20 };

/// Bytes that parsing a header, or anything but pixels, may need beside the file.
const SLACK: usize = 512 * 1024;

fn judge(bytes: &[u8]) -> Verdict {
    let lot = bytes.len();
    let decoder = Decoder { limits: LIMITS, jpeg: if lot.is_multiple_of(3) { Scale::Fast } else { Scale::Exact } };
    let preprocessor = Preprocessor::new(&Preprocessing {
        height: 32,
        width: 40,
        crop_pct: 0.9,
        crop_mode: [CropMode::Center, CropMode::Squash, CropMode::Border][lot % 3],
        interpolation: [
            Interpolation::Bicubic,
            Interpolation::Bilinear,
            Interpolation::Lanczos,
            Interpolation::Nearest,
        ][lot % 4],
        mean: vec![0.5; 3],
        std: vec![0.5; 3],
        exif_orientation: true,
    });
    let mut need = 0;
    let (outcome, cost) = counted(|| -> Result<(), ImageError> {
        let image = decoder.open(bytes, lot.is_multiple_of(2))?;
        need = image.need().bytes;
        assert!(need <= LIMITS.max_decoded_bytes);
        let image = image.decode(|width, height| preprocessor.resized(width, height))?;
        let mut tensor = vec![f32::NAN; preprocessor.tensor_len()];
        preprocessor.apply(&image, &mut tensor);
        assert!(tensor.iter().all(|value| value.is_finite()));
        Ok(())
    });
    let scratch = preprocessor.scratch(LIMITS.max_side, LIMITS.max_side);
    let outcome = match outcome {
        Ok(()) => "an image".to_string(),
        Err(error) => {
            assert!(ImageError::REASONS.contains(&error.reason()), "{error:?}");
            assert!(is_readable(&error.to_string()), "{error:?}");
            format!("{}: {error}", error.reason())
        }
    };
    // WebP's decoder asks for as many zeros as a partition says it is long, and the system gives them no memory until they are
    // written; no more of them are than the file has
    let partition = if bytes.get(8..12) == Some(b"WEBP") { 1 << 24 } else { 0 };
    let bytes_right = need as usize + scratch as usize + 2 * lot + SLACK + partition;
    Verdict { outcome, cost, bytes: bytes_right, allocations: 20_000 + lot * 4 }
}

fn door(name: &'static str, extensions: &[&str], words: &'static [&'static str]) {
    let folders = ["tests/data/preprocess/images", "tests/data/preprocess/odd", "tests/data/preprocess/bombs"];
    let of_format = |path: &std::path::Path| {
        path.extension().is_some_and(|found| extensions.iter().any(|extension| *extension == found))
    };
    let all = folders.iter().flat_map(|folder| files(&root().join(folder), 48 * 1024));
    let seeds = all.filter(|(path, _)| of_format(path)).map(|(_, bytes)| bytes).collect();
    run(&Door { name, seeds, words, longest: 96 * 1024 }, judge);
}

#[test]
fn jpeg() {
    door("jpeg", &["jpg", "jpeg"], &["\u{0}", "Exif\0\0", "Adobe", "JFIF\0", "II*\0", "MM\0*"]);
}

#[test]
fn png() {
    door("png", &["png"], &["IHDR", "PLTE", "tRNS", "IDAT", "IEND", "eXIf", "iCCP", "zTXt", "iTXt", "acTL", "fcTL"]);
}

#[test]
fn gif() {
    door("gif", &["gif"], &["GIF87a", "GIF89a", "NETSCAPE2.0", "!", ","]);
}

#[test]
fn tiff() {
    door("tiff", &["tif", "tiff"], &["II*\0", "MM\0*", "II+\0"]);
}

#[test]
fn webp() {
    door("webp", &["webp"], &["RIFF", "WEBP", "VP8 ", "VP8L", "VP8X", "ALPH", "ANIM", "ANMF", "EXIF", "ICCP"]);
}

#[test]
fn bmp() {
    door("bmp", &["bmp"], &["BM"]);
}

/// Arbitrary bytes.
#[test]
fn what_is_no_image() {
    let seeds = ["", "\u{0}", "<svg xmlns='http://www.w3.org/2000/svg'/>", "%PDF-1.7", "....ftypheic....mif1heic"];
    let seeds = seeds.iter().map(|text| text.as_bytes().to_vec()).collect();
    let words = &["RIFF", "WEBP", "BM", "GIF89a", "II*\0", "ftyp", "avif", "heic", "JXL ", "<?xml"];
    run(&Door { name: "no_image", seeds, words, longest: 4096 }, judge);
}
