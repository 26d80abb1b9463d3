//! Reads `config.json` in every dialect that timm 1.0 reads: architecture, class names, preprocessing.
//!
//! The dialects: nested (`pretrained_cfg` inside), flat (timm ≤ 0.6: fields at the top level, `labels` for class
//! names), and transformers' TimmWrapper (`id2label`). Every field is used, listed as unused because it doesn't affect
//! inference, or refused by name.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::labels::{self, Names};
use super::settings::{Layer, Origin, Settings};
use crate::model::ScoreFunction;

/// Contents of a checkpoint's configuration that inference needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Architecture by timm's name, such as `nf_regnet_b1`; with a tag if the file has one there.
    pub architecture: String,
    /// Tag of the pretrained weights that training started from, such as `ra2_in1k`.
    pub tag: Option<String>,
    /// Arguments that override the architecture's own configuration.
    pub model_args: Map<String, Value>,
    /// Class names.
    pub labels: Names,
    /// Field or file that the names come from; empty without names.
    pub labels_from: String,
    /// Function that turns logits into scores, and the field that names it.
    pub scores: Option<(ScoreFunction, &'static str)>,
    /// Preprocessing settings; the first layer that has a setting wins.
    pub layers: Vec<Layer>,
    /// Fields that don't affect inference, or that nfold doesn't use.
    pub unused: Vec<String>,
}

/// Fields of `pretrained_cfg` that don't affect inference: origin of the weights, settings of training.
const HARMLESS: [&str; 26] = [
    "architecture",
    "classifier",
    "custom_load",
    "description",
    "file",
    "first_conv",
    "fixed_input_size",
    "hf_hub",
    "hf_hub_filename",
    "hf_hub_id",
    "license",
    "min_input_size",
    "notes",
    "num_features",
    "origin_url",
    "paper_ids",
    "paper_name",
    "pool_size",
    "source",
    "state_dict",
    "tags",
    "test_pool_size",
    "title",
    "url",
    "model_card",
    "library_name",
];
/// Fields at the top level of a nested file that are read, or repeat what the architecture defines.
const TOP: [&str; 11] = [
    "architecture",
    "global_pool",
    "label_descriptions",
    "label_names",
    "labels",
    "model_args",
    "num_classes",
    "num_features",
    "pretrained_cfg",
    "id2label",
    "problem_type",
];

impl Config {
    /// Reads `config.json`. The error names the field and the reason.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let file: Value = serde_json::from_slice(text).map_err(|e| format!("not a timm configuration: {e}"))?;
        let Value::Object(mut top) = file else {
            return Err(format!("not a timm configuration: it holds {}", labels::kind(&file)));
        };
        let nested = match top.remove("pretrained_cfg") {
            Some(Value::Object(nested)) => Some(nested),
            None | Some(Value::Null) => None,
            Some(other) => return Err(format!("pretrained_cfg is {}, not a dictionary", labels::kind(&other))),
        };
        let model_args = match top.remove("model_args") {
            Some(Value::Object(args)) => args,
            None | Some(Value::Null) => Map::new(),
            Some(other) => return Err(format!("model_args is {}, not a dictionary", labels::kind(&other))),
        };
        let Some(architecture) = Fields::new("", &mut top).take::<String>("architecture")? else {
            return Err("`architecture` is missing: the name of the network in timm, such as nf_regnet_b1".into());
        };
        match nested {
            Some(nested) => Self::nested(architecture, model_args, top, nested),
            None => Self::flat(architecture, model_args, top),
        }
    }

    fn nested(
        architecture: String,
        model_args: Map<String, Value>,
        mut top: Map<String, Value>,
        mut inner: Map<String, Value>,
    ) -> Result<Self, String> {
        let wrapper = top.get("model_type").and_then(Value::as_str) == Some("timm_wrapper");
        let mut unused = Vec::new();
        let (top_names, top_descriptions) = (top.remove("label_names"), top.remove("label_descriptions"));
        // timm ignores `labels` beside a pretrained_cfg; nfold keeps class names
        let (ids, old_names) = (top.remove("id2label"), top.remove("labels"));
        let (names, descriptions) = (inner.remove("label_names"), inner.remove("label_descriptions"));
        let descriptions = top_descriptions.filter(|v| !v.is_null()).or(descriptions);
        let names = [
            ("label_names", top_names),
            ("pretrained_cfg.label_names", names),
            ("id2label", ids),
            ("labels", old_names),
        ];
        let mut used = None;
        for (field, value) in names {
            match value.filter(|v| !is_empty(v)) {
                Some(value) if used.is_none() => used = Some((field, value)),
                Some(_) => unused.push(field.to_string()),
                None => {}
            }
        }
        let (labels, labels_from) = read_labels(used, descriptions, &mut unused)?;

        let mut fields = Fields::new("", &mut top);
        let mut classes = fields.take::<usize>("num_classes")?;
        if wrapper && classes.is_none() {
            classes = fields.take::<usize>("num_labels")?;
            if classes.is_none() && labels_from == "id2label" {
                classes = Some(labels.len());
            }
        }
        let pool = fields.take::<String>("global_pool")?;
        let mut fields = Fields::new("pretrained_cfg.", &mut inner);
        let own_classes = fields.take::<usize>("num_classes")?;
        let settings = fields.settings()?;
        let tag = fields.take::<String>("tag")?;
        fields.refuse_the_rest(&mut unused)?;
        // timm writes these for information only; they repeat other fields
        unused.extend(top.keys().filter(|key| !TOP.contains(&key.as_str())).cloned());
        let layer = Layer { origin: file("pretrained_cfg."), settings };
        let scores = problem_type(&top)?;
        Self { architecture, tag, model_args, labels, labels_from, scores, layers: vec![layer], unused }
            .with_model(classes.or(own_classes), pool)
    }

    /// Flat dialect of timm ≤ 0.6: every field at the top level.
    fn flat(architecture: String, model_args: Map<String, Value>, mut top: Map<String, Value>) -> Result<Self, String> {
        let mut unused = Vec::new();
        let descriptions = top.remove("label_descriptions");
        // timm renames `labels` to `label_names`, even if that exists
        let names = [
            ("labels", top.remove("labels")),
            ("label_names", top.remove("label_names")),
            ("id2label", top.remove("id2label")),
        ];
        let used = names.into_iter().find_map(|(field, v)| Some((field, v.filter(|v| !is_empty(v))?)));
        let (labels, labels_from) = read_labels(used, descriptions, &mut unused)?;
        let mut fields = Fields::new("", &mut top);
        let classes = fields.take::<usize>("num_classes")?;
        let pool = fields.take::<String>("global_pool")?;
        let tag = fields.take::<String>("tag")?;
        let settings = fields.settings()?;
        let scores = problem_type(fields.map)?;
        fields.map.remove(PROBLEM_TYPE);
        for harmless in ["model_type", "model_name", "architectures", "transformers_version", "torch_dtype", "dtype"] {
            if fields.map.remove(harmless).is_some() {
                unused.push(harmless.into());
            }
        }
        fields.refuse_the_rest(&mut unused)?;
        let layer = Layer { origin: file(""), settings };
        Self { architecture, tag, model_args, labels, labels_from, scores, layers: vec![layer], unused }
            .with_model(classes, pool)
    }

    /// Adds the file's number of classes, pooling and input channels to `model_args`. Another `num_classes` there is an
    /// error.
    fn with_model(mut self, classes: Option<usize>, pool: Option<String>) -> Result<Self, String> {
        let args = &mut self.model_args;
        args.retain(|_, value| !value.is_null());
        if let Some(classes) = classes {
            let given = args.entry("num_classes").or_insert_with(|| classes.into());
            if given.as_u64() != Some(classes as u64) {
                return Err(format!("num_classes is {classes}, but {given} in model_args"));
            }
        }
        // timm derives a network's input channels from the input size
        let channels = self.layers.iter().find_map(|l| l.settings.input_size).map(|[channels, ..]| channels);
        if let Some(channels) = channels.filter(|c| *c != 3) {
            args.entry("in_chans").or_insert_with(|| channels.into());
        }
        if let Some(pool) = pool.filter(|p| !p.is_empty() && p != "avg") {
            args.entry("global_pool").or_insert_with(|| pool.into());
        }
        if let Some((base, tag)) = self.architecture.split_once('.') {
            self.tag = self.tag.filter(|t| !t.is_empty()).or(Some(tag.into()));
            self.architecture = base.into();
        }
        self.tag = self.tag.filter(|t| !t.is_empty());
        Ok(self)
    }
}

/// transformers' field for the kind of a network's outputs.
const PROBLEM_TYPE: &str = "problem_type";

/// The score function for transformers' `problem_type`.
fn problem_type(top: &Map<String, Value>) -> Result<Option<(ScoreFunction, &'static str)>, String> {
    let function = match top.get(PROBLEM_TYPE) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(kind)) => match kind.as_str() {
            "multi_label_classification" => ScoreFunction::Sigmoid,
            "single_label_classification" => ScoreFunction::Softmax,
            "regression" => ScoreFunction::None,
            _ => return Err(format!("{PROBLEM_TYPE} is {kind:?}, none that transformers has")),
        },
        Some(other) => return Err(format!("{PROBLEM_TYPE} is {}, not a name", labels::kind(other))),
    };
    Ok(Some((function, PROBLEM_TYPE)))
}

/// The training argument that says that an image may have several classes, if any. timm's own `bce_loss` doesn't say
/// so: its data sets have one class per image, and timm evaluates models trained with it by softmax.
pub fn of_several_classes(args: &Map<String, Value>) -> Option<&'static str> {
    const SWITCHES: [&str; 3] = ["multi_label", "multilabel", "multi_label_classification"];
    const LOSSES: [&str; 4] = ["loss", "loss_fn", "loss_function", "criterion"];
    const SEVERAL: [&str; 6] =
        ["bce", "binarycrossentropy", "bcewithlogits", "multilabelsoftmargin", "asymmetric", "asl"];
    let on = |name: &&str| args.get(*name) == Some(&Value::Bool(true));
    let several = |name: &&str| {
        let Some(loss) = args.get(*name).and_then(Value::as_str) else { return false };
        let plain: String = loss.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
        SEVERAL.contains(&plain.strip_suffix("loss").unwrap_or(&plain))
    };
    SWITCHES.into_iter().find(on).or_else(|| LOSSES.into_iter().find(several))
}

/// Arguments of timm's train.py that affect inference: preprocessing, and arguments of the network.
pub fn training(args: &Map<String, Value>) -> Result<(Settings, Map<String, Value>), String> {
    let mut args = args.clone();
    let mut fields = Fields::new("args.", &mut args);
    let mut settings = Settings {
        input_size: fields.take("input_size")?,
        crop_pct: fields.take("crop_pct")?,
        mean: fields.take("mean")?,
        std: fields.take("std")?,
        ..Settings::default()
    };
    let channels: Option<u32> = fields.take("in_chans")?;
    let side: Option<u32> = fields.take("img_size")?;
    if let (None, Some(side)) = (settings.input_size, side) {
        settings.input_size = Some([channels.unwrap_or(3), side, side]);
    }
    // training picks one of two filters for `random`; evaluation uses bicubic
    let filter: Option<String> = fields.take("interpolation")?;
    if let Some(filter) = filter.filter(|f| !f.is_empty() && f != "random") {
        let value = Value::from(filter);
        settings.interpolation = Some(serde_json::from_value(value).map_err(|e| format!("args.interpolation: {e}"))?);
    }
    let mode: Option<String> = fields.take("crop_mode")?;
    if let Some(mode) = mode.filter(|m| !m.is_empty()) {
        settings.crop_mode = Some(serde_json::from_value(mode.into()).map_err(|e| format!("args.crop_mode: {e}"))?);
    }
    let mut model_args: Map<String, Value> = fields.take("model_kwargs")?.unwrap_or_default();
    model_args.retain(|_, value| !value.is_null());
    let classes: Option<usize> = fields.take("num_classes")?;
    let pool: Option<String> = fields.take("gp")?;
    let eps: Option<f64> = fields.take("bn_eps")?;
    let own = [
        ("num_classes", classes.map(Value::from)),
        ("in_chans", channels.filter(|c| *c != 3).map(Value::from)),
        ("global_pool", pool.filter(|p| !p.is_empty() && p != "avg").map(Value::from)),
        ("bn_eps", eps.map(Value::from)),
    ];
    for (name, value) in own {
        if let Some(value) = value {
            model_args.entry(name).or_insert(value);
        }
    }
    Ok((settings, model_args))
}

fn file(before: &str) -> Origin {
    Origin::File { before: before.into(), after: format!(" in {}", super::CONFIG_FILE) }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn read_labels(
    used: Option<(&str, Value)>,
    descriptions: Option<Value>,
    unused: &mut Vec<String>,
) -> Result<(Names, String), String> {
    match used {
        Some((field, value)) => Ok((labels::read(&value, descriptions.as_ref(), field)?, field.to_string())),
        None => {
            if descriptions.is_some_and(|d| !is_empty(&d)) {
                unused.push("label_descriptions".into());
            }
            Ok((Names::default(), String::new()))
        }
    }
}

/// A JSON object whose fields are removed one by one; null counts as absent.
struct Fields<'a> {
    before: &'a str,
    map: &'a mut Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn new(before: &'a str, map: &'a mut Map<String, Value>) -> Self {
        Self { before, map }
    }

    fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, String> {
        let Some(value) = self.map.remove(name).filter(|v| !v.is_null()) else { return Ok(None) };
        serde_json::from_value(value).map(Some).map_err(|e| format!("{}{name}: {e}", self.before))
    }

    fn settings(&mut self) -> Result<Settings, String> {
        // timm treats empty text as absent
        for name in ["crop_mode", "interpolation"] {
            if self.map.get(name).is_some_and(|v| v == "") {
                self.map.remove(name);
            }
        }
        Ok(Settings {
            test_input_size: self.take("test_input_size")?,
            input_size: self.take("input_size")?,
            test_crop_pct: self.take("test_crop_pct")?,
            crop_pct: self.take("crop_pct")?,
            crop_mode: self.take("crop_mode")?,
            interpolation: self.take("interpolation")?,
            mean: self.take("mean")?,
            std: self.take("std")?,
        })
    }

    /// Lists harmless fields that are set; refuses unknown ones.
    fn refuse_the_rest(&mut self, unused: &mut Vec<String>) -> Result<(), String> {
        let offset = self.map.remove("label_offset").filter(|v| !v.is_null() && *v != 0);
        if let Some(offset) = offset {
            return Err(format!(
                "{}label_offset is {offset}: the classifier has classes in front that aren't to be used, which nfold can't leave out",
                self.before
            ));
        }
        for (name, value) in std::mem::take(self.map) {
            if !HARMLESS.contains(&name.as_str()) {
                return Err(format!(
                    "{0}{name} is not a field that timm has, and could change answers; remove it if it does not",
                    self.before
                ));
            }
            if !is_empty(&value) && value != false {
                unused.push(format!("{}{name}", self.before));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::settings::resolve;
    use crate::model::{CropMode, Interpolation, Preprocessing};

    fn parse(json: &str) -> Result<Config, String> {
        Config::parse(json.as_bytes())
    }

    fn preprocessing(json: &str) -> Result<Preprocessing, String> {
        Ok(resolve(&parse(json)?.layers, None, 3)?.0)
    }

    #[test]
    fn test_size_and_its_crop_win() {
        let json = r#"{"architecture": "eca_nfnet_l0", "num_classes": 5, "pretrained_cfg": {"tag": "ra2_in1k",
            "input_size": [3, 224, 224], "test_input_size": [3, 288, 288], "crop_pct": 0.9, "test_crop_pct": 1.0,
            "interpolation": "bilinear", "crop_mode": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}"#;
        let config = parse(json).expect("valid");
        assert_eq!((config.architecture.as_str(), config.tag.as_deref()), ("eca_nfnet_l0", Some("ra2_in1k")));
        assert_eq!(config.model_args["num_classes"], 5);
        let p = preprocessing(json).expect("resolves");
        assert_eq!((p.height, p.width, p.crop_pct), (288, 288, 1.0));
        assert_eq!((p.crop_mode, p.interpolation), (CropMode::Squash, Interpolation::Bilinear));
    }

    #[test]
    fn defaults_are_timms() {
        let p = preprocessing(r#"{"architecture": "resnet18"}"#).expect("resolves");
        assert_eq!((p.height, p.crop_pct, p.mean), (224, 0.875, vec![0.485, 0.456, 0.406]));
    }

    #[test]
    fn contradictions_are_refused() {
        for (json, what) in [
            ("[]", "timm configuration"),
            (r#"{"num_classes": 3}"#, "architecture"),
            (r#"{"architecture": "a", "num_classes": 3, "model_args": {"num_classes": 4}}"#, "num_classes is 3"),
            (r#"{"architecture": "a", "pretrained_cfg": {"interpolation": "random"}}"#, "pretrained_cfg.interpolation"),
            (r#"{"architecture": "a", "pretrained_cfg": {"input_size": [3, 0, 9]}}"#, "height 0"),
            (r#"{"architecture": "a", "pretrained_cfg": {"crop_pct": -1.0}}"#, "crop_pct"),
            (r#"{"architecture": "a", "pretrained_cfg": {"std": [0.0, 1.0, 1.0]}}"#, "std"),
            (r#"{"architecture": "a", "pretrained_cfg": {"mean": [0.5, 0.5]}}"#, "mean has 2 values"),
            (r#"{"architecture": "a", "pretrained_cfg": 7}"#, "pretrained_cfg is 7"),
            (r#"{"architecture": "a", "model_args": []}"#, "model_args is a list"),
            (r#"{"architecture": "a", "crop_mode": "fit"}"#, "crop_mode"),
            (r#"{"architecture": "a", "input_space": "BGR"}"#, "input_space"),
            (r#"{"architecture": "a", "pretrained_cfg": {"input_range": [0, 255]}}"#, "pretrained_cfg.input_range"),
            (r#"{"architecture": "a", "pretrained_cfg": {"label_offset": 1}}"#, "label_offset is 1"),
        ] {
            let error = preprocessing(json).expect_err(json);
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn what_is_not_used_is_listed() {
        let config = parse(
            r#"{"architecture": "a", "num_features": 9, "dataset": "mine", "pretrained_cfg": {"license": "mit", "custom_load": false}}"#,
        )
        .expect("valid");
        assert_eq!(config.unused, ["pretrained_cfg.license", "dataset"]);
    }
}
