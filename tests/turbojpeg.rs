//! JPEG by libjpeg-turbo: Pillow's pixels to the bit, Pillow's `draft` to the bit, and hostile files. Goldens come from
//! `tests/data/preprocess/make_goldens.py`.

use std::{env, process};

use nfold::pixels::{Decoder, ImageError, ImageLimits, JpegDecoder, RgbImage};
use proptest::prelude::*;

use crate::preprocess::{encoded, goldens, hash, hostile, jpeg_of, peak_kib};

const EXACT: Decoder = Decoder {
    limits: ImageLimits {
        max_bytes: 20 << 20,
        max_side: 16384,
        max_pixels: 64_000_000,
        max_decoded_bytes: 256 << 20,
        max_metadata_bytes: 8 << 20,
    },
    jpeg: JpegDecoder::TurboJpeg,
};
const FAST: Decoder = Decoder { jpeg: JpegDecoder::TurboJpegFast, ..EXACT };

fn decode(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    EXACT.decode(bytes, false, |_, _| unreachable!("only the fast mode asks"))
}

#[test]
fn every_jpeg_equals_pillow_to_the_bit() {
    let mut count = 0;
    for case in goldens().images.iter().filter(|case| case.file.ends_with(".jpg")) {
        let bytes = encoded(&format!("images/{}", case.file));
        assert_eq!(hash(&decode(&bytes).unwrap().data), case.sha256, "{}", case.file);
        let upright = EXACT.decode(&bytes, true, |w, h| [w, h]).unwrap();
        assert_eq!(hash(&upright.data), case.upright_sha256, "{} upright", case.file);
        count += 1;
    }
    assert!(count >= 12, "{count} JPEGs");
}

#[test]
fn other_formats_take_the_other_decoders() {
    for case in goldens().images.iter().filter(|case| !case.file.ends_with(".jpg")) {
        let bytes = encoded(&format!("images/{}", case.file));
        let expected = Decoder::default().decode(&bytes, true, |w, h| [w, h]);
        assert_eq!(FAST.decode(&bytes, true, |_, _| [1, 1]), expected, "{}", case.file);
    }
}

#[test]
fn fast_equals_pillows_draft_to_the_bit() {
    let drafts = goldens().drafts;
    for case in &drafts {
        let bytes = encoded(&format!("images/{}", case.file));
        let image = FAST.decode(&bytes, false, |_, _| case.target).unwrap();
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
        let image = FAST.decode(&encoded("images/jpeg_420.jpg"), false, |_, _| [width, height]).unwrap();
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
        if let Ok(image) = decoder.decode(&bytes, true, |w, h| [w.div_ceil(4), h.div_ceil(4)]) {
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

/// As Pillow: what the library only warns of is a picture.
#[test]
fn bytes_between_segments_are_a_warning() {
    let mut bytes = encoded("images/jpeg_420.jpg");
    let pixels = decode(&bytes).unwrap();
    let end = bytes.len() - 2;
    bytes.splice(end..end, [0x12, 0x34]);
    assert_eq!(decode(&bytes).unwrap(), pixels);
    // a warning before the pixels: the other decoder takes over
    let at = bytes.windows(4).position(|four| four == b"JFIF").unwrap() + 5;
    bytes[at] = 9;
    assert_eq!(decode(&bytes).unwrap(), Decoder::default().decode(&bytes, false, |w, h| [w, h]).unwrap());
}

#[test]
fn limits_hold_before_pixels_are_decoded() {
    let bytes = encoded("images/jpeg_progressive.jpg");
    let limited = |limits| Decoder { limits, ..EXACT }.decode(&bytes, false, |w, h| [w, h]).unwrap_err().reason();
    let limits = EXACT.limits;
    assert_eq!(limited(ImageLimits { max_bytes: bytes.len() - 1, ..limits }), "too_large");
    assert_eq!(limited(ImageLimits { max_side: 95, ..limits }), "too_large");
    assert_eq!(limited(ImageLimits { max_pixels: 96 * 72 - 1, ..limits }), "too_many_pixels");
    assert_eq!(limited(ImageLimits { max_decoded_bytes: 96 * 72 * 3 - 1, ..limits }), "too_much_memory");
    // 4:2:0, two bytes a coefficient: as much as the pixels, however few of these are asked for
    let exact = ImageLimits { max_decoded_bytes: 96 * 72 * 3, ..limits };
    let scarce = ImageLimits { max_decoded_bytes: 96 * 72 * 3 - 1, ..limits };
    let error = Decoder { limits: scarce, ..FAST }.decode(&bytes, false, |_, _| [12, 9]).unwrap_err();
    assert!(error.to_string().contains("bytes of coefficients"), "{error}");
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
    assert!(error.to_string().contains("more than 100 scans"), "{error}");
}

#[test]
fn hostile_images_stay_within_64_mib() {
    let output = process::Command::new(env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "--test-threads=1", "turbojpeg::hostile_child"])
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
    decode(&encoded("images/jpeg_420.jpg")).unwrap();
    let before = peak_kib();
    for (what, bytes, reason) in &files {
        let answer = decode(bytes);
        match (&answer, reason) {
            (Err(error), Some(reason)) => assert_eq!(error.reason(), *reason, "{what}: {error}"),
            (Ok(_), Some(reason)) => panic!("{what}: decoded, expected {reason}"),
            _ => {}
        }
    }
    let added = peak_kib() - before;
    println!("hostile images added {added} KiB");
    assert!(added < 64 << 10);
}
