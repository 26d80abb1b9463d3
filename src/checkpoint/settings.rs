//! Resolves preprocessing settings from layers: the first layer that has a setting wins, as in timm's
//! `resolve_data_config`, where arguments override the checkpoint's configuration and that overrides defaults. Records
//! each setting's origin.

use crate::model::{CropMode, Interpolation, Preprocessing, SourceSetting};

/// Preprocessing settings of one source; `None` if it has no value.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Settings {
    /// `[channels, height, width]` of evaluation, if it differs from training.
    pub test_input_size: Option<[u32; 3]>,
    /// `[channels, height, width]`.
    pub input_size: Option<[u32; 3]>,
    /// Crop fraction at `test_input_size`.
    pub test_crop_pct: Option<f64>,
    /// Crop fraction.
    pub crop_pct: Option<f64>,
    /// How the image is fitted to the input's aspect ratio.
    pub crop_mode: Option<CropMode>,
    /// Resampling filter.
    pub interpolation: Option<Interpolation>,
    /// Mean per channel, or one for all.
    pub mean: Option<Vec<f64>>,
    /// Standard deviation per channel, or one for all.
    pub std: Option<Vec<f64>>,
}

/// Settings of one source, with their origin.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Origin of the settings.
    pub origin: Origin,
    /// The settings.
    pub settings: Settings,
}

/// A source of settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Options of the command line.
    CommandLine,
    /// Fields of a file, described by the text around a field's name.
    File {
        /// Before the name, such as `pretrained_cfg.`.
        before: String,
        /// After it, such as ` in config.json`.
        after: String,
    },
    /// Arguments of a training script, recorded in a checkpoint file.
    Training {
        /// File name.
        file: String,
        /// Whether the size was given as one side (`img_size`).
        by_side: bool,
    },
    /// Settings that timm publishes for an architecture.
    Architecture(String),
}

impl Origin {
    /// Describes the origin of `field`.
    fn of(&self, field: &str) -> String {
        match self {
            Self::CommandLine => match field {
                "input_size" | "test_input_size" => "--img-size".into(),
                other => format!("--{}", other.replace('_', "-")),
            },
            Self::File { before, after } => format!("{before}{field}{after}"),
            Self::Training { file, by_side: true } if field == "input_size" => format!("args.img_size in {file}"),
            Self::Training { file, .. } => format!("args.{field} in {file}"),
            Self::Architecture(name) => format!("timm's settings of {name}"),
        }
    }
}

/// timm's defaults (`resolve_data_config`).
const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];
const DEFAULT_SIZE: u32 = 224;
const DEFAULT_CROP_PCT: f64 = 0.875;
const DEFAULT: &str = "timm's default";

/// Resolves preprocessing as timm's `validate.py` does for evaluation: a layer's test size and crop fraction come
/// before its plain ones (`resolve_data_config(use_test_size=True)`). `size` (height, width) overrides only the input
/// size; `channels` is the number of input channels of the network. Returns the settings with their origins.
pub fn resolve(
    layers: &[Layer],
    size: Option<(u32, u32)>,
    channels: usize,
) -> Result<(Preprocessing, Vec<SourceSetting>), String> {
    let mut origins = Vec::new();
    let mut note = |setting: &str, origin: String| origins.push(SourceSetting { setting: setting.into(), origin });
    // timm treats 0 and an empty list as absent
    let share = |pct: Option<f64>| pct.filter(|c| *c != 0.0);
    let ([_, height, width], from) =
        first(layers, [("test_input_size", &|s| s.test_input_size), ("input_size", &|s| s.input_size)])
            .unwrap_or(([3, DEFAULT_SIZE, DEFAULT_SIZE], DEFAULT.into()));
    let ((height, width), from) = match size {
        Some(size) => (size, "--size".into()),
        None => ((height, width), from),
    };
    note("size", from);
    let (crop_pct, from) =
        first(layers, [("test_crop_pct", &|s| share(s.test_crop_pct)), ("crop_pct", &|s| share(s.crop_pct))])
            .unwrap_or((DEFAULT_CROP_PCT, DEFAULT.into()));
    note("crop_pct", from);
    let (crop_mode, from) =
        first(layers, [("crop_mode", &|s| s.crop_mode)]).unwrap_or((CropMode::Center, DEFAULT.into()));
    note("crop_mode", from);
    let (interpolation, from) =
        first(layers, [("interpolation", &|s| s.interpolation)]).unwrap_or((Interpolation::Bicubic, DEFAULT.into()));
    note("interpolation", from);
    let given = |values: Option<&Vec<f64>>| values.filter(|v| !v.is_empty()).cloned();
    let (mean, from) =
        first(layers, [("mean", &|s| given(s.mean.as_ref()))]).unwrap_or((IMAGENET_MEAN.to_vec(), DEFAULT.into()));
    let (mean, from) = by_channel("mean", mean, channels, from)?;
    note("mean", from);
    let (std, from) =
        first(layers, [("std", &|s| given(s.std.as_ref()))]).unwrap_or((IMAGENET_STD.to_vec(), DEFAULT.into()));
    let (std, from) = by_channel("std", std, channels, from)?;
    note("std", from);
    let resolved =
        Preprocessing { height, width, crop_pct, crop_mode, interpolation, mean, std, exif_orientation: false };
    match resolved.check() {
        Ok(()) => Ok((resolved, origins)),
        Err(reason) => {
            let sides = reason.starts_with("height") || reason.starts_with("width");
            let about = |o: &&SourceSetting| if sides { o.setting == "size" } else { reason.contains(&o.setting) };
            let from: Vec<&str> = origins.iter().filter(about).map(|o| o.origin.as_str()).collect();
            Err(format!("{reason} ({})", from.join(", ")))
        }
    }
}

/// Name of a field, and its getter.
type Field<'a, T> = (&'a str, &'a dyn Fn(&Settings) -> Option<T>);

/// The first field that is set in the first layer that has one, with its origin.
fn first<T, const N: usize>(layers: &[Layer], fields: [Field<'_, T>; N]) -> Option<(T, String)> {
    layers
        .iter()
        .find_map(|layer| fields.iter().find_map(|(name, read)| Some((read(&layer.settings)?, layer.origin.of(name)))))
}

/// One value per channel; a single value is repeated. For a network with other than 3 channels, values of three colours
/// become their average, as in timm's loader, and the origin says so.
fn by_channel(name: &str, values: Vec<f64>, channels: usize, from: String) -> Result<(Vec<f64>, String), String> {
    match values.len() {
        found if found == channels => Ok((values, from)),
        1 => Ok((vec![values[0]; channels], from)),
        3 => {
            let plural = if channels == 1 { "" } else { "s" };
            let average = values.iter().sum::<f64>() / 3.0;
            Ok((vec![average; channels], format!("{from}, averaged over colours for {channels} channel{plural}")))
        }
        found => Err(format!("{name} has {found} values for {channels} channels ({from})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(origin: Origin, settings: Settings) -> Layer {
        Layer { origin, settings }
    }

    #[test]
    fn earlier_layers_win_setting_by_setting() {
        let config = Origin::File { before: "pretrained_cfg.".into(), after: String::new() };
        let layers = [
            layer(Origin::CommandLine, Settings { mean: Some(vec![0.5]), ..Settings::default() }),
            layer(
                config,
                Settings {
                    test_input_size: Some([3, 96, 64]),
                    input_size: Some([3, 32, 32]),
                    mean: Some(vec![0.1, 0.2, 0.3]),
                    crop_pct: Some(0.9),
                    test_crop_pct: Some(0.0),
                    ..Settings::default()
                },
            ),
            layer(Origin::Architecture("a".into()), Settings { std: Some(vec![0.2; 3]), ..Settings::default() }),
        ];
        let (p, origins) = resolve(&layers, None, 3).expect("resolves");
        assert_eq!((p.height, p.width, p.crop_pct, p.mean, p.std), (96, 64, 0.9, vec![0.5; 3], vec![0.2; 3]));
        let from = |name: &str| origins.iter().find(|o| o.setting == name).map(|o| o.origin.as_str());
        assert_eq!(from("size"), Some("pretrained_cfg.test_input_size"));
        assert_eq!(from("mean"), Some("--mean"));
        assert_eq!(from("std"), Some("timm's settings of a"));
        assert_eq!(from("crop_pct"), Some("pretrained_cfg.crop_pct"));
        assert_eq!(from("interpolation"), Some("timm's default"));
        assert_eq!(resolve(&layers, Some((7, 8)), 3).expect("resolves").0.height, 7);
    }

    #[test]
    fn colours_become_grey_by_their_average() {
        let (grey, origins) = resolve(&[], None, 1).expect("resolves");
        assert_eq!((grey.mean, grey.std), (vec![(0.485 + 0.456 + 0.406) / 3.0], vec![(0.229 + 0.224 + 0.225) / 3.0]));
        let said = |o: &SourceSetting| o.setting == "mean" && o.origin.contains("averaged over colours for 1 channel");
        assert!(origins.iter().any(said), "{origins:?}");
    }

    #[test]
    fn channels_must_fit() {
        let two = [layer(Origin::CommandLine, Settings { std: Some(vec![0.5; 2]), ..Settings::default() })];
        assert!(resolve(&two, None, 3).expect_err("two").contains("std has 2 values"));
    }
}
