//! timm's `config.json`: which network, which classes, which preprocessing.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::{CropMode, Interpolation, Preprocessing};

/// What a checkpoint's `config.json` says, as far as inference needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Architecture with its tag, such as `nf_regnet_b1.ra2_in1k`.
    pub architecture: String,
    /// Arguments laid over the architecture's own configuration.
    pub model_args: Map<String, Value>,
    /// Class names in logit order; empty when there are none.
    pub labels: Vec<String>,
    /// Preprocessing settings.
    pub pretrained: PretrainedConfig,
}

/// The part of timm's `pretrained_cfg` that preprocessing comes from.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[allow(missing_docs)]
pub struct PretrainedConfig {
    pub tag: Option<String>,
    pub input_size: Option<[u32; 3]>,
    pub test_input_size: Option<[u32; 3]>,
    pub crop_pct: Option<f64>,
    pub test_crop_pct: Option<f64>,
    pub crop_mode: Option<CropMode>,
    pub interpolation: Option<Interpolation>,
    pub mean: Option<[f64; 3]>,
    pub std: Option<[f64; 3]>,
}

#[derive(Deserialize)]
struct File {
    architecture: String,
    num_classes: Option<usize>,
    label_names: Option<Vec<String>>,
    model_args: Option<Map<String, Value>>,
    #[serde(default)]
    pretrained_cfg: Map<String, Value>,
}

/// timm's defaults (`resolve_data_config`).
const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];
const DEFAULT_SIZE: u32 = 224;
const DEFAULT_CROP_PCT: f64 = 0.875;

impl Config {
    /// Reads `config.json`. The error says what is wrong and where.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let file: File = serde_json::from_slice(text).map_err(|e| format!("not a timm configuration: {e}"))?;
        let pretrained: PretrainedConfig = serde_json::from_value(Value::Object(file.pretrained_cfg.clone()))
            .map_err(|e| format!("pretrained_cfg: {e}"))?;
        let labels = match (file.label_names, file.pretrained_cfg.get("label_names")) {
            (Some(labels), _) => labels,
            (None, Some(Value::Array(_))) => serde_json::from_value(file.pretrained_cfg["label_names"].clone())
                .map_err(|e| format!("pretrained_cfg.label_names: {e}"))?,
            _ => Vec::new(),
        };
        let mut model_args = file.model_args.unwrap_or_default();
        if let Some(classes) = file.num_classes {
            let given = model_args.entry("num_classes").or_insert_with(|| classes.into());
            if given.as_u64() != Some(classes as u64) {
                return Err(format!("num_classes is {classes}, but {given} in model_args"));
            }
        }
        let architecture = match &pretrained.tag {
            Some(tag) if !tag.is_empty() && !file.architecture.contains('.') => format!("{}.{tag}", file.architecture),
            _ => file.architecture,
        };
        let config = Self { architecture, model_args, labels, pretrained };
        config.preprocessing(None)?;
        Ok(config)
    }

    /// Preprocessing as timm resolves it for evaluation: the test size and its crop share where the checkpoint has
    /// them (`resolve_data_config(use_test_size=True)`, as timm's own `validate.py` does). `size` (height, width)
    /// overrides the size alone.
    pub fn preprocessing(&self, size: Option<(u32, u32)>) -> Result<Preprocessing, String> {
        let p = &self.pretrained;
        let [_, height, width] = p.test_input_size.or(p.input_size).unwrap_or([3, DEFAULT_SIZE, DEFAULT_SIZE]);
        let (height, width) = size.unwrap_or((height, width));
        // timm treats 0 as absent
        let share = |pct: Option<f64>| pct.filter(|c| *c != 0.0);
        let resolved = Preprocessing {
            height,
            width,
            crop_pct: share(p.test_crop_pct).or(share(p.crop_pct)).unwrap_or(DEFAULT_CROP_PCT),
            crop_mode: p.crop_mode.unwrap_or(CropMode::Center),
            interpolation: p.interpolation.unwrap_or(Interpolation::Bicubic),
            mean: p.mean.unwrap_or(IMAGENET_MEAN),
            std: p.std.unwrap_or(IMAGENET_STD),
            exif_orientation: false,
        };
        resolved.check().map_err(|reason| format!("pretrained_cfg: {reason}"))?;
        Ok(resolved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Config, String> {
        Config::parse(json.as_bytes())
    }

    #[test]
    fn test_size_and_its_crop_win() {
        let config = parse(
            r#"{"architecture": "eca_nfnet_l0", "num_classes": 5, "pretrained_cfg": {"tag": "ra2_in1k",
                "input_size": [3, 224, 224], "test_input_size": [3, 288, 288], "crop_pct": 0.9, "test_crop_pct": 1.0,
                "interpolation": "bilinear", "crop_mode": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}"#,
        )
        .expect("valid");
        assert_eq!(config.architecture, "eca_nfnet_l0.ra2_in1k");
        assert_eq!(config.model_args["num_classes"], 5);
        let p = config.preprocessing(None).expect("resolves");
        assert_eq!((p.height, p.width, p.crop_pct), (288, 288, 1.0));
        assert_eq!((p.crop_mode, p.interpolation), (CropMode::Squash, Interpolation::Bilinear));
        assert_eq!(config.preprocessing(Some((100, 120))).expect("resolves").width, 120);
    }

    #[test]
    fn defaults_are_timms() {
        let p = parse(r#"{"architecture": "resnet18"}"#).and_then(|c| c.preprocessing(None)).expect("resolves");
        assert_eq!((p.height, p.crop_pct, p.mean), (224, 0.875, IMAGENET_MEAN));
    }

    #[test]
    fn contradictions_are_refused() {
        for (json, what) in [
            ("[]", "timm configuration"),
            (r#"{"num_classes": 3}"#, "architecture"),
            (r#"{"architecture": "a", "num_classes": 3, "model_args": {"num_classes": 4}}"#, "num_classes is 3"),
            (r#"{"architecture": "a", "pretrained_cfg": {"interpolation": "random"}}"#, "random"),
            (r#"{"architecture": "a", "pretrained_cfg": {"input_size": [3, 0, 9]}}"#, "height 0"),
            (r#"{"architecture": "a", "pretrained_cfg": {"crop_pct": -1.0}}"#, "crop_pct"),
            (r#"{"architecture": "a", "pretrained_cfg": {"std": [0.0, 1.0, 1.0]}}"#, "std"),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.contains(what), "{error}");
        }
    }
}
