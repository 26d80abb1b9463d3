//! Preprocessing compared with Pillow, timm and a plain reference implementation, and on hostile images.
//!
//! Goldens come from `tests/data/preprocess/make_goldens.py`, which records the versions that made them.

use std::path::{Path, PathBuf};
use std::{env, fs, process};

use nfold::model::{CropMode, Interpolation, Preprocessing};
use nfold::pixels::{Decoder, ImageError, ImageLimits, Picture, Preprocessor, RgbImage, Scale, decode};
use proptest::prelude::*;
use serde::Deserialize;

use crate::bombs::{Bomb, bombs};

/// Peak memory that all hostile images together may add, in KiB.
const HOSTILE_KIB: u64 = 64 << 10;

#[derive(Deserialize)]
pub struct Goldens {
    versions: std::collections::BTreeMap<String, String>,
    resize: Vec<ResizeCase>,
    transforms: Vec<TransformCase>,
    pub images: Vec<ImageCase>,
    pub drafts: Vec<DraftCase>,
}

#[derive(Deserialize)]
struct ResizeCase {
    source: [u32; 2],
    kind: String,
    target: [u32; 2],
    filter: Interpolation,
    sha256: String,
}

#[derive(Deserialize)]
struct TransformCase {
    source: [u32; 2],
    preprocessing: Preprocessing,
    sha256: String,
}

#[derive(Deserialize)]
pub struct ImageCase {
    pub file: String,
    size: [u32; 2],
    pub sha256: String,
    upright_size: [u32; 2],
    pub upright_sha256: String,
}

#[derive(Deserialize)]
pub struct DraftCase {
    pub file: String,
    pub target: [u32; 2],
    pub size: [u32; 2],
    pub sha256: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/preprocess")
}

pub fn goldens() -> Goldens {
    serde_json::from_slice(&fs::read(folder().join("goldens.json")).unwrap()).unwrap()
}

pub fn encoded(name: &str) -> Vec<u8> {
    fs::read(folder().join(name)).unwrap()
}

pub fn hash(bytes: &[u8]) -> String {
    nfold::model::sha256(bytes)
}

/// The same as in make_goldens.py.
fn pattern([width, height]: [u32; 2], kind: &str) -> RgbImage {
    let data = (0..width * height * 3).map(|i| {
        let mut h = i.wrapping_mul(2_654_435_761).wrapping_add(40503);
        h ^= h >> 15;
        h = h.wrapping_mul(2_246_822_519);
        h ^= h >> 13;
        let (y, rest) = (i / (width * 3), i % (width * 3));
        match kind {
            "noise" => h as u8,
            "edges" => (h & 1) as u8 * 255,
            _ => (rest / 3 * 3 + y * 5 + rest % 3 * 85) as u8,
        }
    });
    RgbImage { width, height, data: data.collect() }
}

#[test]
fn every_resize_equals_pillow() {
    let goldens = goldens();
    assert_eq!(goldens.versions["pillow"], "13.0.0", "the order of passes changed between versions of Pillow");
    for case in &goldens.resize {
        let [width, height] = case.target;
        let resized = resize(&pattern(case.source, &case.kind), width, height, case.filter);
        assert_eq!(hash(&resized.data), case.sha256, "{:?} to {:?} by {:?}", case.source, case.target, case.filter);
    }
    assert!(goldens.resize.len() >= 5 * 40);
}

#[test]
fn every_tensor_equals_timm_to_the_bit() {
    for case in goldens().transforms {
        let tensor = tensor(&pattern(case.source, "noise"), &case.preprocessing);
        let bytes: Vec<u8> = tensor.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(hash(&bytes), case.sha256, "{:?} through {:?}", case.source, case.preprocessing);
    }
}

fn resize(image: &RgbImage, width: u32, height: u32, filter: Interpolation) -> RgbImage {
    nfold::pixels::resize(&Picture::from(image.clone()), width, height, filter)
}

fn tensor(image: &RgbImage, preprocessing: &Preprocessing) -> Vec<f32> {
    tensor_of(&Picture::from(image.clone()), preprocessing)
}

pub fn tensor_of(image: &Picture, preprocessing: &Preprocessing) -> Vec<f32> {
    let preprocessor = Preprocessor::new(preprocessing);
    // what a batch buffer holds before must not matter
    let mut tensor = vec![f32::NAN; preprocessor.tensor_len()];
    preprocessor.apply(image, &mut tensor);
    tensor
}

#[test]
fn a_side_that_border_mode_shrinks_to_nothing_keeps_one_pixel() {
    let preprocessing = Preprocessing {
        height: 16,
        width: 16,
        crop_pct: 1.0,
        crop_mode: CropMode::Border,
        interpolation: Interpolation::Bicubic,
        mean: vec![0.5; 3],
        std: vec![0.5; 3],
        exif_orientation: false,
    };
    let white = RgbImage { width: 640, height: 1, data: vec![255; 640 * 3] };
    let tensor = tensor(&white, &preprocessing);
    // the mean colour, round(127.5) = 128, with one white line in the middle
    let (grey, white) = ((128.0f32 / 255.0 - 0.5) / 0.5, 1.0);
    for (y, line) in tensor.chunks_exact(16).take(16).enumerate() {
        assert_eq!(line, [if y == 7 { white } else { grey }; 16], "line {y}");
    }
}

#[test]
fn every_format_decodes_as_pillow_does() {
    let limits = ImageLimits::default();
    for case in goldens().images {
        let bytes = encoded(&format!("images/{}", case.file));
        let image = decode(&bytes, &limits, false).unwrap_or_else(|e| panic!("{}: {e}", case.file));
        assert_eq!([image.width, image.height], case.size, "{}", case.file);
        let upright = decode(&bytes, &limits, true).unwrap();
        assert_eq!([upright.width, upright.height], case.upright_size, "{}", case.file);
        assert_eq!(hash(&image.data), case.sha256, "{}", case.file);
        assert_eq!(hash(&upright.data), case.upright_sha256, "{} upright", case.file);
    }
}

/// An unusual or slightly malformed file that users do send.
#[derive(Deserialize)]
struct OddCase {
    file: String,
    /// Digest of Pillow's pixels; `None`: Pillow or nfold refuses it.
    sha256: Option<String>,
    size: Option<[u32; 2]>,
    /// Why nfold refuses it.
    reason: Option<String>,
}

/// A selection of the colour rules, trailers, checksums, kinds and layouts of `compare_pillow.py`.
#[test]
fn odd_files_are_read_as_pillow_reads_them() {
    let cases: Vec<OddCase> = serde_json::from_slice(&encoded("odd/odd.json")).unwrap();
    assert!(cases.len() > 60);
    for OddCase { file, sha256, size, reason } in cases {
        let answer = decode(&encoded(&format!("odd/{file}")), &ImageLimits::default(), false);
        match (answer, reason) {
            (Ok(image), None) => {
                assert_eq!(Some([image.width, image.height]), size, "{file}");
                assert_eq!(Some(hash(&image.data)), sha256, "{file}");
            }
            (Err(error), Some(reason)) => assert_eq!(error.reason(), reason, "{file}: {error}"),
            (answer, reason) => panic!("{file}: {:?}, expected {reason:?}", answer.map(|i| (i.width, i.height))),
        }
    }
}

#[test]
fn other_formats_are_named() {
    let others: [(&[u8], &str); 9] = [
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\0\0\0", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<?xml version=\"1.0\"?>\n<!-- drawn -->\n<svg/>", "SVG"),
        (b"\n<svg xmlns=\"http://www.w3.org/2000/svg\"/>", "SVG"),
        (b"<!DOCTYPE html><p>no picture", "HTML"),
    ];
    for (bytes, name) in others {
        let error = refused(bytes);
        assert_eq!(error.reason(), "bad_format");
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// One output sample of Pillow's two passes, by the formula: weights in double precision, rounded to 22 bits.
fn reference(image: &RgbImage, width: usize, height: usize, filter: Interpolation) -> Vec<u8> {
    let (w, h) = (image.width as usize, image.height as usize);
    let across = |data: &[u8], from: usize, lines: usize, to: usize, at: &dyn Fn(usize, usize, usize) -> usize| {
        let mut out = vec![0; to * lines * 3];
        for position in 0..to {
            let (first, weights) = reference_weights(filter, from, to, position);
            for line in 0..lines {
                for channel in 0..3 {
                    let sum: i64 = weights
                        .iter()
                        .enumerate()
                        .map(|(i, weight)| weight * i64::from(data[at(first + i, line, from) + channel]))
                        .sum();
                    out[at(position, line, to) + channel] = ((sum + (1 << 21)) >> 22).clamp(0, 255) as u8;
                }
            }
        }
        out
    };
    let horizontally = |data: &[u8], rows: usize| {
        if w == width { data.to_vec() } else { across(data, w, rows, width, &|x, y, width| 3 * (y * width + x)) }
    };
    let vertically = |data: &[u8], columns: usize| {
        if h == height { data.to_vec() } else { across(data, h, columns, height, &|y, x, _| 3 * (y * columns + x)) }
    };
    let (less_w, less_h) = (w as i64 - width as i64, h as i64 - height as i64);
    if less_h > 0 && less_h > 2 * less_w {
        horizontally(&vertically(&image.data, w), height)
    } else {
        vertically(&horizontally(&image.data, h), width)
    }
}

fn reference_weights(filter: Interpolation, from: usize, to: usize, position: usize) -> (usize, Vec<i64>) {
    let kernel = |x: f64| -> f64 {
        let d = x.abs();
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        match filter {
            Interpolation::Nearest => unreachable!("has no kernel"),
            Interpolation::Box => f64::from(x > -0.5 && x <= 0.5),
            Interpolation::Bilinear => (1.0 - d).max(0.0),
            Interpolation::Bicubic if d < 1.0 => (1.5 * d - 2.5) * d * d + 1.0,
            Interpolation::Bicubic if d < 2.0 => (((d - 5.0) * d + 8.0) * d - 4.0) * -0.5,
            Interpolation::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Interpolation::Bicubic | Interpolation::Lanczos => 0.0,
        }
    };
    let radius = match filter {
        Interpolation::Box | Interpolation::Nearest => 0.5,
        Interpolation::Bilinear => 1.0,
        Interpolation::Bicubic => 2.0,
        Interpolation::Lanczos => 3.0,
    };
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let center = (position as f64 + 0.5) * scale;
    let first = (center - radius * stretch + 0.5).max(0.0) as usize;
    let end = ((center + radius * stretch + 0.5) as usize).min(from);
    let weights: Vec<f64> = (first..end).map(|i| kernel((i as f64 - center + 0.5) * (1.0 / stretch))).collect();
    let sum: f64 = weights.iter().sum();
    let fixed = |w: &f64| {
        let w = if sum == 0.0 { *w } else { w / sum };
        (w * f64::from(1 << 22) + if w < 0.0 { -0.5 } else { 0.5 }) as i64
    };
    (first, weights.iter().map(fixed).collect())
}

fn a_filter() -> impl Strategy<Value = Interpolation> {
    use Interpolation::{Bicubic, Bilinear, Box, Lanczos};
    prop_oneof![Just(Box), Just(Bilinear), Just(Bicubic), Just(Lanczos)]
}

fn an_image() -> impl Strategy<Value = RgbImage> {
    (1u32..70, 1u32..70).prop_flat_map(|(width, height)| {
        proptest::collection::vec(any::<u8>(), (width * height * 3) as usize).prop_map(move |data| RgbImage {
            width,
            height,
            data,
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn resize_is_the_formula(image in an_image(), width in 1u32..60, height in 1u32..60, filter in a_filter()) {
        let expected = reference(&image, width as usize, height as usize, filter);
        prop_assert_eq!(resize(&image, width, height, filter).data, expected);
    }

    #[test]
    fn a_crop_is_a_part_of_the_whole(image in an_image(), size in 1u32..40, spare in 0u32..20, filter in a_filter()) {
        // squash has the simplest geometry: everything to one size, then the middle of it
        let whole = size + spare;
        let preprocessing = Preprocessing {
            height: size,
            width: size,
            crop_pct: f64::from(size) / (f64::from(whole) + 0.5),
            crop_mode: CropMode::Squash,
            interpolation: filter,
            mean: vec![0.0; 3],
            std: vec![1.0; 3],
            exif_orientation: false,
        };
        let resized = resize(&image, whole, whole, filter);
        let at = (f64::from(spare) / 2.0).round_ties_even() as u32;
        let plane = (size * size) as usize;
        for (i, value) in tensor(&image, &preprocessing).into_iter().enumerate() {
            let (channel, i) = (i / plane, (i % plane) as u32);
            let pixel = (at + i / size) * whole + at + i % size;
            prop_assert_eq!(value, f32::from(resized.data[pixel as usize * 3 + channel]) / 255.0);
        }
    }

    #[test]
    fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 0usize..6) {
        let heads: [&[u8]; 6] = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF\x40\0\0\0WEBP"];
        prop_assert!(decode(&[heads[at], &bytes].concat(), &ImageLimits::default(), true).is_err());
        if let Ok(image) = decode(&bytes, &ImageLimits::default(), true) {
            prop_assert!(false, "random bytes are a picture of {} x {}", image.width, image.height);
        }
    }

    #[test]
    fn damaged_images_never_panic(file in 0usize..9, at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = encoded(&format!("images/{}", WHOLE[file]));
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(image) = decode(&bytes, &ImageLimits::default(), true) {
            prop_assert_eq!(image.data.len(), image.width as usize * image.height as usize * 3);
        }
    }
}

/// One file per format, whose last bytes matter for its pixels.
const WHOLE: [&str; 9] = [
    "jpeg_420.jpg",
    "jpeg_progressive.jpg",
    "png_rgb.png",
    "webp_lossy.webp",
    "webp_lossless.webp",
    "gif.gif",
    "bmp_24.bmp",
    "tiff_raw.tif",
    "tiff_lzw.tif",
];

fn refused(bytes: &[u8]) -> ImageError {
    decode(bytes, &ImageLimits::default(), true).unwrap_err()
}

#[test]
fn what_is_no_image_is_unsupported() {
    assert_eq!(refused(b""), ImageError::Empty);
    assert_eq!(refused(b"").reason(), "empty");
    let others: [&[u8]; 5] = [
        b"just some text, longer than any signature of a picture",
        b"{\"images\":[]}",
        &[0; 4096],
        b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf",
        b"P6 1 1 255\nabc",
    ];
    for bytes in others {
        let error = refused(bytes);
        assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
        assert_eq!(error.reason(), "bad_format");
        assert!(error.to_string().ends_with("; send it as JPEG, PNG or WebP"), "{error}");
    }
}

#[test]
fn a_file_cut_anywhere_is_invalid() {
    for name in WHOLE {
        let bytes = encoded(&format!("images/{name}"));
        for part in 1..20 {
            let error = refused(&bytes[..bytes.len() * part / 20]);
            assert!(matches!(error, ImageError::Invalid { .. }), "{name} {part}/20: {error}");
            assert!(ImageError::REASONS.contains(&error.reason()));
        }
    }
    // as Pillow: the marker at the end belongs to the image
    let bytes = encoded("images/jpeg_420.jpg");
    assert_eq!(refused(&bytes[..bytes.len() - 2]).reason(), "truncated");
}

/// Further frames are neither counted nor read, however many there are.
#[test]
fn only_the_first_frame_is_read() {
    let whole = encoded("images/gif_animated.gif");
    let first = decode(&whole, &ImageLimits::default(), false).unwrap();
    // the first frame has no control block, the second's comes before it
    let second = whole.windows(3).position(|three| three == [0x21, 0xF9, 4]).unwrap();
    let mut damaged = whole[..second].to_vec();
    damaged.extend([0xAB; 1000]);
    assert_eq!(decode(&damaged, &ImageLimits::default(), false).unwrap(), first);
    // pages of a TIFF: the first one's directory ends with the next one's place
    let mut pages = encoded("images/tiff_raw.tif");
    let at = u32::from_le_bytes(pages[4..8].try_into().unwrap()) as usize;
    let next = at + 2 + 12 * usize::from(u16::from_le_bytes([pages[at], pages[at + 1]]));
    let page = decode(&pages, &ImageLimits::default(), false).unwrap();
    pages[next..next + 4].copy_from_slice(&[0xFF; 4]);
    assert_eq!(decode(&pages, &ImageLimits::default(), false).unwrap(), page);
}

/// JPEG with its header's height and width replaced.
pub fn jpeg_of(height: u16, width: u16) -> Vec<u8> {
    let mut bytes = encoded("images/jpeg_420.jpg");
    let frame = bytes.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
    bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
    bytes
}

fn patched(name: &str, at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = encoded(&format!("images/{name}"));
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

/// Files that claim to be large, and the error they must cause (`None`: they may decode).
pub fn hostile() -> Vec<(&'static str, Vec<u8>, Option<&'static str>)> {
    vec![
        ("100 million pixels of PNG", encoded("bombs/pixels.png"), Some("too_many_pixels")),
        ("65535 x 65535 JPEG", jpeg_of(65535, 65535), Some("too_large")),
        ("16384 x 16384 JPEG", jpeg_of(16384, 16384), Some("too_many_pixels")),
        ("65535 x 65535 GIF", patched("gif.gif", 6, &[0xFF; 4]), Some("too_large")),
        ("2 billion pixels wide BMP", patched("bmp_24.bmp", 18, &[0xFF, 0xFF, 0xFF, 0x7F]), None),
        ("16384 x 8000 BMP", patched("bmp_24.bmp", 18, &[0, 0x40, 0, 0, 0x40, 0x1F, 0, 0]), Some("too_many_pixels")),
        ("96 MiB behind the pixels of a PNG", encoded("bombs/idat.png"), None),
        ("96 MiB of colour profile in a PNG", encoded("bombs/profile.png"), None),
        ("96 MiB of text in a PNG", encoded("bombs/text.png"), None),
        ("21 MB of zeros", vec![0; 21 << 20], Some("too_large")),
    ]
}

#[test]
fn hostile_images_stay_within_64_mib() {
    // in a process of its own: peak memory is the process's, and other tests run beside this one
    let output = process::Command::new(env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "--test-threads=1", "preprocess::hostile_child"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("hostile images added"), "the child failed");
}

#[test]
#[ignore = "run by hostile_images_stay_within_64_mib"]
fn hostile_child() {
    let files = hostile();
    // warm up what every decode needs, then start to count
    decode(&encoded("images/png_rgb.png"), &ImageLimits::default(), false).unwrap();
    let before = peak_kib();
    for (what, bytes, reason) in &files {
        let answer = decode(bytes, &ImageLimits::default(), true);
        match (&answer, reason) {
            (Err(error), Some(reason)) => assert_eq!(error.reason(), *reason, "{what}: {error}"),
            (Ok(_), Some(reason)) => panic!("{what}: decoded, expected {reason}"),
            _ => {}
        }
        let added = peak_kib() - before;
        println!("{what}: {:?}; peak +{added} KiB", answer.as_ref().map(|i| (i.width, i.height)));
        assert!(added < HOSTILE_KIB, "{what}: {added} KiB");
    }
    println!("hostile images added {} KiB", peak_kib() - before);
}

/// For every format, decoding needs the memory that the header predicts.
#[test]
fn decoding_takes_what_the_header_says() {
    let output = process::Command::new(env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "--test-threads=1", "preprocess::measured_child"])
        // what is freed goes back to the system at once, so that the next one's peak is its own
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("all are measured"), "the child failed");
}

#[test]
#[ignore = "run by decoding_takes_what_the_header_says"]
fn measured_child() {
    const SIDE: u16 = 4000;
    const MIB: u64 = 1 << 20;
    let limits = ImageLimits { max_decoded_bytes: u64::MAX, ..ImageLimits::default() };
    let decoder = Decoder { limits, jpeg: Scale::Exact };
    println!("{:36} bytes a pixel: said, taken", "");
    for Bomb { what, bytes, .. } in bombs(SIDE) {
        let Ok(image) = decoder.open(&bytes, false) else { continue };
        let need = image.need();
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = peak_kib() << 10;
        let picture = image.decode(|width, height| [width, height]).unwrap();
        let taken = (peak_kib() << 10).saturating_sub(before);
        let pixels = f64::from(need.width) * f64::from(need.height);
        println!("{what:36} {:.2} {:.2}", need.bytes as f64 / pixels, taken as f64 / pixels);
        assert!(taken < need.bytes + 4 * MIB, "{what}: {taken} bytes, the header says {}", need.bytes);
        // what is never written is never there
        let blank = ["GIF", "BMP"].iter().any(|format| what.starts_with(format));
        assert!(blank || need.bytes < 2 * taken + 8 * MIB, "{what}: {taken} bytes, the header says {}", need.bytes);
        assert!(picture.bytes() <= need.bytes);
    }
    println!("all are measured");
}

/// Peak resident memory in KiB; 0 if the system doesn't report it.
pub fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
}

#[test]
fn limits_are_read_from_the_header_alone() {
    let png = encoded("images/png_rgb.png");
    let limited = |limits: ImageLimits| decode(&png, &limits, false).unwrap_err().reason();
    let limits = ImageLimits::default();
    assert_eq!(limited(ImageLimits { max_bytes: png.len() - 1, ..limits }), "too_large");
    assert_eq!(limited(ImageLimits { max_side: 95, ..limits }), "too_large");
    assert_eq!(limited(ImageLimits { max_pixels: 96 * 72 - 1, ..limits }), "too_many_pixels");
    let need = Decoder::default().open(&png, false).unwrap().need().bytes;
    assert!((96 * 72 * 3..96 * 72 * 3 + (1 << 20)).contains(&need), "{need}");
    assert_eq!(limited(ImageLimits { max_decoded_bytes: need - 1, ..limits }), "too_much_memory");
    let exact = ImageLimits { max_bytes: png.len(), max_side: 96, max_pixels: 96 * 72, max_decoded_bytes: need };
    assert!(decode(&png, &exact, false).is_ok());
    // the header's word counts, before the end of the file is missed
    assert!(matches!(refused(&jpeg_of(65535, 65535)[..700]), ImageError::TooLarge { .. }));
}

/// Writes the tensors of a list of files, for `compare_timm.py`. Each line of `NFOLD_COMPARE` is an encoded file; its
/// tensor is written beside it as little-endian floats. `NFOLD_JPEG_SCALE` is `--jpeg-scale`.
#[test]
#[ignore = "run by tests/data/preprocess/compare_timm.py"]
fn write_tensors() {
    let Ok(list) = env::var("NFOLD_COMPARE") else { return };
    let preprocessing: Preprocessing = serde_json::from_str(&env::var("NFOLD_PREPROCESSING").unwrap()).unwrap();
    let jpeg = match env::var("NFOLD_JPEG_SCALE").as_deref() {
        Ok("fast") => Scale::Fast,
        Ok("exact") | Err(_) => Scale::Exact,
        Ok(other) => panic!("no scale `{other}`"),
    };
    let decoder = Decoder { limits: ImageLimits::default(), jpeg };
    let preprocessor = Preprocessor::new(&preprocessing);
    for file in fs::read_to_string(list).unwrap().lines() {
        let image = decoder.decode(&fs::read(file).unwrap(), false, |w, h| preprocessor.resized(w, h)).unwrap();
        let bytes: Vec<u8> = tensor_of(&image, &preprocessing).iter().flat_map(|value| value.to_le_bytes()).collect();
        fs::write(format!("{file}.tensor"), bytes).unwrap();
    }
}
