//! Settings for turning a decoded image into the network's input, and their valid ranges.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Valid sides of the network's input, in pixels.
const SIDE: RangeInclusive<u32> = 1..=4096;
/// Valid crop fractions. At 0.1, the image is resized to ten times the input size.
const CROP_PCT: RangeInclusive<f64> = 0.1..=1.0;
/// Valid means on the 0..1 scale: more than any image has, but far from overflow.
const MEAN: RangeInclusive<f64> = -10.0..=10.0;
/// Valid standard deviations on the 0..1 scale; 1/255 is the smallest in use.
const STD: RangeInclusive<f64> = 1e-4..=100.0;

/// How an image is fitted to the network's input size (timm `crop_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CropMode {
    /// Resizes the shortest side to `floor(size / crop_pct)`, keeping the aspect ratio; centre crop, which loses the
    /// borders.
    Center,
    /// Resizes each side to its `floor(size / crop_pct)`, ignoring the aspect ratio; centre crop.
    Squash,
    /// Resizes the longest side to `floor(size / crop_pct)`, keeping the aspect ratio; centre crop, or padding with the
    /// mean colour.
    Border,
}

/// Resampling filter of the resize (timm `interpolation`), as Pillow defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Nearest neighbour, no antialiasing.
    Nearest,
    /// Box filter (area average when shrinking).
    Box,
    /// Triangle filter, antialiased.
    Bilinear,
    /// Keys cubic with a = -0.5, antialiased.
    Bicubic,
    /// Windowed sinc with three lobes, antialiased.
    Lanczos,
}

impl fmt::Display for CropMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Center => "center",
            Self::Squash => "squash",
            Self::Border => "border",
        })
    }
}

impl fmt::Display for Interpolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nearest => "nearest",
            Self::Box => "box",
            Self::Bilinear => "bilinear",
            Self::Bicubic => "bicubic",
            Self::Lanczos => "lanczos",
        })
    }
}

/// Valid numbers of input channels.
const CHANNELS: RangeInclusive<usize> = 1..=16;

/// Steps from a decoded image to the network's input tensor, as timm resolves them from `pretrained_cfg`
/// (`resolve_data_config` + `create_transform(is_training=False)`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Height of the network's input, in pixels.
    pub height: u32,
    /// Width of the network's input, in pixels.
    pub width: u32,
    /// Fraction of the resized side that the crop keeps, in (0, 1] (timm allows more than 1 in no published config).
    pub crop_pct: f64,
    /// How the image is fitted to the input's aspect ratio.
    pub crop_mode: CropMode,
    /// Resampling filter.
    pub interpolation: Interpolation,
    /// Mean per channel on the 0..1 scale: of red, green and blue, or of grey. One value per input channel of the
    /// network; if it has neither 1 nor 3, images can't be preprocessed.
    pub mean: Vec<f64>,
    /// Standard deviation per channel on the 0..1 scale, the same number of values.
    pub std: Vec<f64>,
    /// Whether to apply the EXIF orientation first. Off by default, as in timm.
    #[serde(default)]
    pub exif_orientation: bool,
}

/// Meaning of the input's channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colors {
    /// One channel: grey, as in Pillow's `convert("L")`.
    Grey,
    /// Red, green, blue.
    Rgb,
}

impl Colors {
    /// The colours for a network with this number of input channels; `None` if images can't be its input.
    pub fn of_channels(channels: usize) -> Option<Self> {
        match channels {
            1 => Some(Self::Grey),
            3 => Some(Self::Rgb),
            _ => None,
        }
    }
}

impl Preprocessing {
    /// Number of channels of the network's input.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Shape of one image's tensor: `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels(), self.height as usize, self.width as usize]
    }

    /// Number of values in one image's tensor.
    pub fn tensor_len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Checks that all values are valid; the error names the field, its value and the valid range.
    pub fn check(&self) -> Result<(), String> {
        for (name, side) in [("height", self.height), ("width", self.width)] {
            if !SIDE.contains(&side) {
                return Err(format!("{name} {side} is outside {}..={} pixels", SIDE.start(), SIDE.end()));
            }
        }
        let inside = |name: &str, value: f64, allowed: RangeInclusive<f64>, scale: &str| {
            // no range contains NaN
            if allowed.contains(&value) {
                return Ok(());
            }
            let (low, high) = allowed.into_inner();
            Err(format!("{name} {value:?} is outside {low}..={high}{scale}"))
        };
        inside("crop_pct", self.crop_pct, CROP_PCT, "")?;
        let (means, stds) = (self.mean.len(), self.std.len());
        if means != stds || !CHANNELS.contains(&means) {
            let (low, high) = CHANNELS.into_inner();
            return Err(format!("mean has {means} values and std {stds}; as many are needed, {low} to {high}"));
        }
        for (&mean, &std) in self.mean.iter().zip(&self.std) {
            inside("mean", mean, MEAN, " (of pixels from 0 to 1)")?;
            inside("std", std, STD, " (of pixels from 0 to 1)")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Preprocessing {
        Preprocessing {
            height: 224,
            width: 224,
            crop_pct: 0.9,
            crop_mode: CropMode::Center,
            interpolation: Interpolation::Bicubic,
            mean: vec![0.485, 0.456, 0.406],
            std: vec![0.229, 0.224, 0.225],
            exif_orientation: false,
        }
    }

    #[test]
    fn every_bound_names_its_field_and_range() {
        assert_eq!(usual().check(), Ok(()));
        let refused = |change: &dyn Fn(&mut Preprocessing), what: &str, range: &str| {
            let mut p = usual();
            change(&mut p);
            let reason = p.check().expect_err(what);
            assert!(reason.starts_with(what) && reason.contains(range), "{reason}");
        };
        for side in [0, 4097, 1_000_000, u32::MAX] {
            refused(&|p| p.height = side, "height", "1..=4096");
            refused(&|p| p.width = side, "width", "1..=4096");
        }
        for share in [0.0, -0.0, -1.0, 1e-300, 1e-6, 0.01, 1.0001, 1e308, f64::INFINITY, f64::NAN, f64::MIN_POSITIVE] {
            refused(&|p| p.crop_pct = share, "crop_pct", "0.1..=1");
        }
        for mean in [1e308, -1e308, 255.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            (0..3).for_each(|channel| refused(&|p| p.mean[channel] = mean, "mean", "-10..=10"));
        }
        for std in [0.0, -0.0, -0.2, 1e-300, 5e-324, 1e308, 255.0, f64::NAN, f64::INFINITY] {
            (0..3).for_each(|channel| refused(&|p| p.std[channel] = std, "std", "0.0001..=100"));
        }
    }

    #[test]
    fn mean_and_std_are_as_many() {
        for (means, stds) in [(3, 1), (0, 0), (17, 17)] {
            let reason = Preprocessing { mean: vec![0.5; means], std: vec![0.5; stds], ..usual() }.check();
            assert!(reason.expect_err("refused").contains(&format!("mean has {means} values and std {stds}")));
        }
    }

    #[test]
    fn what_is_in_use_passes() {
        for (crop_pct, mean, std) in [
            (1.0, vec![0.0; 3], vec![1.0; 3]),
            (0.875, vec![0.5], vec![0.5]),
            (0.1, vec![124.0 / 255.0; 3], vec![1.0 / (0.0167 * 255.0); 3]),
            (0.95, vec![0.0; 16], vec![1.0 / 255.0; 16]),
        ] {
            assert_eq!(Preprocessing { crop_pct, mean, std, ..usual() }.check(), Ok(()));
        }
    }
}
