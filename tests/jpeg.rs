//! JPEG: Pillow's pixels to the bit, the pixels of Pillow's `draft` to the bit, and hostile files. Goldens come from
//! `tests/data/preprocess/make_goldens.py`.

use nfold::pixels::{Decoder, ImageError, ImageLimits, Picture, RgbImage, Scale};
use proptest::prelude::*;

use crate::preprocess::{encoded, goldens, hash, jpeg_of};

const LIMITS: ImageLimits =
    ImageLimits { max_bytes: 20 << 20, max_side: 16384, max_pixels: 64_000_000, max_decoded_bytes: 224 << 20 };
const EXACT: Decoder = Decoder { limits: LIMITS, jpeg: Scale::Exact };
const FAST: Decoder = Decoder { jpeg: Scale::Fast, ..EXACT };

fn decode(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    EXACT.decode(bytes, false, |_, _| unreachable!("only the fast mode asks")).map(Picture::into_rgb)
}

#[test]
fn every_jpeg_equals_pillow_to_the_bit() {
    let mut count = 0;
    for case in goldens().images.iter().filter(|case| case.file.ends_with(".jpg")) {
        let bytes = encoded(&format!("images/{}", case.file));
        assert_eq!(hash(&decode(&bytes).unwrap().data), case.sha256, "{}", case.file);
        let upright = EXACT.decode(&bytes, true, |w, h| [w, h]).unwrap().into_rgb();
        assert_eq!(hash(&upright.data), case.upright_sha256, "{} upright", case.file);
        count += 1;
    }
    assert!(count >= 12, "{count} JPEGs");
}

#[test]
fn other_formats_are_never_scaled() {
    for case in goldens().images.iter().filter(|case| !case.file.ends_with(".jpg")) {
        let bytes = encoded(&format!("images/{}", case.file));
        let expected = Decoder::default().decode(&bytes, true, |w, h| [w, h]).unwrap().into_rgb();
        assert_eq!(FAST.decode(&bytes, true, |_, _| [1, 1]).unwrap().into_rgb(), expected, "{}", case.file);
    }
}

#[test]
fn fast_equals_pillows_draft_to_the_bit() {
    let drafts = goldens().drafts;
    for case in &drafts {
        let bytes = encoded(&format!("images/{}", case.file));
        let image = FAST.decode(&bytes, false, |_, _| case.target).unwrap().into_rgb();
        assert_eq!([image.width, image.height], case.size, "{} for {:?}", case.file, case.target);
        assert_eq!(hash(&image.data), case.sha256, "{} for {:?}", case.file, case.target);
    }
    assert!(drafts.len() >= 90 && drafts.iter().any(|case| case.size == [12, 9]));
}

#[test]
fn fast_asks_for_the_upright_image() {
    // stored as 96 x 72, shown as 72 x 96
    let bytes = encoded("images/exif_6.jpg");
    let image = FAST.decode(&bytes, true, |w, h| {
        assert_eq!((w, h), (72, 96));
        [30, 48]
    });
    let image = image.unwrap();
    assert_eq!((image.width, image.height), (36, 48));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn fast_is_never_below_what_is_needed(width in 1u32..200, height in 1u32..200) {
        let image = FAST.decode(&encoded("images/jpeg_420.jpg"), false, |_, _| [width, height]).unwrap().into_rgb();
        prop_assert!(image.width >= width.min(96) && image.height >= height.min(72));
        prop_assert_eq!(image.data.len(), (image.width * image.height * 3) as usize);
    }

    #[test]
    fn damaged_jpegs_never_panic(progressive: bool, changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), fast: bool) {
        let mut bytes = encoded(if progressive { "images/jpeg_progressive.jpg" } else { "images/jpeg_restart.jpg" });
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let decoder = if fast { FAST } else { EXACT };
        if let Ok(image) = decoder.decode(&bytes, true, |w, h| [w.div_ceil(4), h.div_ceil(4)]).map(Picture::into_rgb) {
            prop_assert_eq!(image.data.len(), image.width as usize * image.height as usize * 3);
        }
    }
}

#[test]
fn a_jpeg_cut_anywhere_is_invalid() {
    for name in ["jpeg_420.jpg", "jpeg_progressive.jpg", "jpeg_restart.jpg", "jpeg_cmyk.jpg", "jpeg_grey.jpg"] {
        let bytes = encoded(&format!("images/{name}"));
        for part in 1..20 {
            let error = decode(&bytes[..bytes.len() * part / 20]).unwrap_err();
            assert!(matches!(error, ImageError::Invalid { .. }), "{name} {part}/20: {error}");
            assert!(ImageError::REASONS.contains(&error.reason()));
        }
        assert_eq!(decode(&bytes[..bytes.len() - 2]).unwrap_err().reason(), "truncated", "{name}");
    }
}

#[test]
fn lossless_jpeg_gives_back_its_pixels() {
    use libjpeg_turbo_rs::{Encoder, PixelFormat};
    let (width, height) = (40, 30);
    for (format, samples) in [(PixelFormat::Rgb, 3), (PixelFormat::Grayscale, 1)] {
        let pixels: Vec<u8> = (0..width * height * samples).map(|i| (i * 7 + i / 31) as u8).collect();
        let file = Encoder::new(&pixels, width, height, format).lossless(true).encode().unwrap();
        let image = decode(&file).unwrap();
        assert_eq!((image.width, image.height), (40, 30));
        let rgb = pixels.iter().flat_map(|&sample| std::iter::repeat_n(sample, 3 / samples));
        assert!(image.data.into_iter().eq(rgb), "{format:?}");
    }
}

/// As Pillow: what the library only warns of is a picture.
#[test]
fn bytes_between_segments_are_a_warning() {
    let mut bytes = encoded("images/jpeg_420.jpg");
    let pixels = decode(&bytes).unwrap();
    let end = bytes.len() - 2;
    bytes.splice(end..end, [0x12, 0x34]);
    assert_eq!(decode(&bytes).unwrap(), pixels);
}

/// Readers that go by the length of a table and readers that go by what is in it would find different frames behind it.
#[test]
fn segments_whose_length_does_not_fit_are_refused() {
    let refused = |bytes: &[u8], what: &str| {
        for decoder in [EXACT, FAST] {
            match decoder.decode(bytes, false, |_, _| [8, 8]) {
                Err(ImageError::Invalid { reason: "corrupt", detail }) => {
                    assert!(detail.contains("length"), "{what}: {detail}")
                }
                other => panic!("{what}: {other:?}"),
            }
        }
    };
    refused(&std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/found/jpeg/two-frames")).unwrap(), "found");
    let bytes = encoded("images/jpeg_420.jpg");
    decode(&bytes).unwrap();
    let segment = |marker: u8| bytes.windows(2).position(|two| two == [0xFF, marker]).unwrap();
    for (marker, change) in [(0xDB, -64_i16), (0xDB, 1), (0xC4, -1), (0xC4, 1)] {
        let (at, mut bytes) = (segment(marker) + 2, bytes.clone());
        let length = i16::from_be_bytes([bytes[at], bytes[at + 1]]) + change;
        bytes[at..at + 2].copy_from_slice(&length.to_be_bytes());
        refused(&bytes, &format!("{marker:X} {change}"));
    }
}

#[test]
fn limits_hold_before_pixels_are_decoded() {
    let bytes = encoded("images/jpeg_progressive.jpg");
    let limited = |limits| Decoder { limits, ..EXACT }.decode(&bytes, false, |w, h| [w, h]).unwrap_err().reason();
    let limits = EXACT.limits;
    assert_eq!(limited(ImageLimits { max_bytes: bytes.len() - 1, ..limits }), "too_large");
    assert_eq!(limited(ImageLimits { max_side: 95, ..limits }), "too_large");
    assert_eq!(limited(ImageLimits { max_pixels: 96 * 72 - 1, ..limits }), "too_many_pixels");
    // 4:2:0: planes of a byte a sample, coefficients of two, and what is known of each block of 64; Huffman tables of all scans
    let blocks = 96 / 16 * 80 / 16 * 6;
    let need = blocks * (64 + 129) + 10 * 8192 + bytes.len() as u64;
    assert_eq!(EXACT.open(&bytes, false).unwrap().need().bytes, need);
    let exact = ImageLimits { max_decoded_bytes: need, ..limits };
    let scarce = ImageLimits { max_decoded_bytes: need - 1, ..limits };
    let error = Decoder { limits: scarce, ..FAST }.decode(&bytes, false, |_, _| [12, 9]).unwrap_err();
    assert!(error.to_string().contains("bytes to be decoded in"), "{error}");
    assert!(Decoder { limits: exact, ..EXACT }.decode(&bytes, false, |w, h| [w, h]).is_ok());
    // the header's word counts, before the end of the file is missed; full size counts in the fast mode, too
    for decoder in [EXACT, FAST] {
        let refused = |bytes: &[u8]| decoder.decode(bytes, false, |_, _| [1, 1]).unwrap_err();
        assert!(matches!(refused(&jpeg_of(65535, 65535)[..700]), ImageError::TooLarge { .. }));
        assert_eq!(refused(&jpeg_of(16384, 16384)).reason(), "too_many_pixels");
    }
}

#[test]
fn endless_scans_are_refused() {
    let bytes = encoded("images/jpeg_progressive.jpg");
    let scan = bytes.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
    let end = bytes.len() - 2;
    let repeated = [&bytes[..end], &bytes[scan..end].repeat(200), &bytes[end..]].concat();
    let error = decode(&repeated).unwrap_err();
    assert_eq!(error.reason(), "too_many_scans");
    assert!(error.to_string().contains("scans, the limit is 100"), "{error}");
}
