//! Class names in the forms that checkpoints use: a list, a dictionary by class number (which may have gaps), names
//! with descriptions; and ImageNet's class names, for checkpoints tagged with it.

use std::io::Read as _;

use flate2::read::GzDecoder;
use serde_json::{Map, Value};

/// ImageNet's 1000 classes in logit order, one per line: WordNet lemmas as in timm (licence in `imagenet-1k.LICENSE`).
const IMAGENET_1K: &str = include_str!("labels/imagenet-1k.txt");
/// WordNet synsets of the 1000 classes, in the same order, which is ascending.
const SYNSETS_1K: &str = include_str!("labels/imagenet-1k.synsets.txt");
/// Classes of the larger lists, ordered by synset, one per line: a letter whose bits, counted from `a`, say which lists
/// have the class (1: 12k, 2: 22k, 4: 21k), then the lemmas.
const IMAGENET_21K: &[u8] = include_bytes!("labels/imagenet-21k.txt.gz");
/// Most bytes of a file of class names.
const LARGEST_FILE: usize = 16 << 20;

/// A list of ImageNet classes, as timm's tags distinguish them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageNet {
    /// The 1000 classes of ILSVRC 2012.
    In1k,
    /// The subset of the 22k that has enough images per class.
    In12k,
    /// Google's selection of the full set.
    In21k,
    /// The full set; nearly the same as 21k.
    In22k,
}

impl ImageNet {
    /// All lists.
    pub const ALL: [Self; 4] = [Self::In1k, Self::In12k, Self::In21k, Self::In22k];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::In1k => "imagenet-1k",
            Self::In12k => "imagenet-12k",
            Self::In21k => "imagenet-21k",
            Self::In22k => "imagenet-22k",
        }
    }

    /// Number of classes.
    pub fn classes(self) -> usize {
        match self {
            Self::In1k => 1000,
            Self::In12k => 11_821,
            Self::In21k => 21_843,
            Self::In22k => 21_841,
        }
    }

    /// The list of the classifier's last training data, by a pretrained tag such as `ra2_in1k`.
    pub fn of_tag(tag: &str) -> Option<Self> {
        match tag.rsplit('_').next()? {
            "in1k" => Some(Self::In1k),
            "in12k" => Some(Self::In12k),
            "in21k" => Some(Self::In21k),
            "in22k" => Some(Self::In22k),
            _ => None,
        }
    }

    /// Class names, in logit order.
    pub fn labels(self) -> Vec<String> {
        let list = match self {
            Self::In1k => return IMAGENET_1K.lines().map(String::from).collect(),
            Self::In12k => 1,
            Self::In22k => 2,
            Self::In21k => 4,
        };
        let mut text = String::new();
        // embedded data, which can't fail; a test reads it
        let _ = GzDecoder::new(IMAGENET_21K).read_to_string(&mut text);
        let mut entries = text.lines().filter_map(|line| line.split_at_checked(1));
        let all = entries.by_ref().filter(|(lists, _)| lists.as_bytes()[0].wrapping_sub(b'a') & list != 0);
        all.map(|(_, lemmas)| lemmas.to_string()).collect()
    }
}

/// Position of a synset, such as `n01440764`, among ImageNet's 1000 classes.
pub fn imagenet_1k_synset(name: &str) -> Option<usize> {
    SYNSETS_1K.lines().position(|synset| synset == name)
}

/// Reads class names of a configuration: a list or a dictionary by class number, each name looked up in `descriptions`
/// if these are given. The number of classes is unknown here: a dictionary's names end at its highest number, and
/// [`Names::complete`] adds the rest. `what` names the field in messages.
pub fn read(names: &Value, descriptions: Option<&Value>, what: &str) -> Result<Names, String> {
    let mut found = match names {
        Value::Array(list) => {
            let names = list.iter().map(|name| text(name, what)).collect::<Result<Vec<_>, _>>()?;
            Names { names: names.into_iter().map(Some).collect(), sparse: false }
        }
        Value::Object(map) => by_number(map, what)?,
        other => return Err(format!("{what} is {}, not a list or dictionary of names", kind(other))),
    };
    match descriptions {
        None | Some(Value::Null) => {}
        Some(Value::Object(map)) => {
            for name in found.names.iter_mut().flatten() {
                if let Some(description) = map.get(name.as_str()) {
                    *name = text(description, "label_descriptions")?;
                }
            }
        }
        // descriptions in a list are by class number, like the names
        Some(Value::Array(list)) if list.len() == found.names.len() => {
            for (name, description) in found.names.iter_mut().zip(list) {
                *name = Some(text(description, "label_descriptions")?);
            }
        }
        Some(Value::Array(list)) => {
            return Err(format!("label_descriptions has {} entries for {} names", list.len(), found.names.len()));
        }
        Some(other) => {
            return Err(format!("label_descriptions is {}, not a list or dictionary", kind(other)));
        }
    }
    Ok(found)
}

/// Class names before the number of classes is known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// By class number; `None` for a gap in a dictionary.
    names: Vec<Option<String>>,
    /// Read from a dictionary, which need not cover the last class.
    sparse: bool,
}

impl Names {
    /// Whether there are no names.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Number of classes up to the highest named one.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Names of all `classes`, in logit order; a class without a name gets its number. A list must name every class.
    pub fn complete(self, classes: usize) -> Result<Vec<String>, String> {
        if self.names.len() > classes || (!self.sparse && !self.names.is_empty() && self.names.len() != classes) {
            return Err(format!("{} label_names for {classes} classes", self.names.len()));
        }
        if self.names.is_empty() {
            return Ok(Vec::new());
        }
        let gaps = std::iter::repeat_with(|| None).take(classes - self.names.len());
        let all = self.names.into_iter().chain(gaps).enumerate();
        Ok(all.map(|(class, name)| name.unwrap_or_else(|| class.to_string())).collect())
    }
}

/// Reads a file of class names: JSON (a list or a dictionary by class number), or one name per line.
pub fn from_file(bytes: &[u8]) -> Result<Names, String> {
    if bytes.len() > LARGEST_FILE {
        return Err(format!("has {} bytes, too many for a list of names", bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| format!("is not UTF-8 text: {e}"))?;
    let text = text.trim_start_matches('\u{feff}');
    if text.trim_start().starts_with(['[', '{']) {
        let value = serde_json::from_str(text).map_err(|e| format!("is not the JSON it begins as: {e}"))?;
        return match &value {
            Value::Object(map) if is_class_to_idx(map) => by_number(&inverted(map)?, "it"),
            _ => read(&value, None, "it"),
        };
    }
    let lines = text.trim_end().lines().map(|line| Some(line.trim().to_string()));
    let names: Vec<_> = if text.trim().is_empty() { Vec::new() } else { lines.collect() };
    match names.iter().position(|n| n.as_deref() == Some("")) {
        Some(line) => Err(format!("has no name in line {}", line + 1)),
        None if names.is_empty() => Err("holds no names".into()),
        None => Ok(Names { names, sparse: false }),
    }
}

/// Whether this is torchvision's `class_to_idx`: numbers by name. Where every name is a number too, it is read as names by number.
fn is_class_to_idx(map: &Map<String, Value>) -> bool {
    map.values().all(Value::is_u64) && map.keys().any(|key| key.trim().parse::<usize>().is_err())
}

/// Names by number of numbers by name.
fn inverted(map: &Map<String, Value>) -> Result<Map<String, Value>, String> {
    let mut names = Map::new();
    for (name, number) in map {
        if let Some(Value::String(other)) = names.insert(number.to_string(), name.as_str().into()) {
            return Err(format!("it gives the number {number} to `{other}` and to `{name}`"));
        }
    }
    Ok(names)
}

fn by_number(map: &Map<String, Value>, what: &str) -> Result<Names, String> {
    let mut names = Vec::new();
    for (key, name) in map {
        let class: usize =
            key.trim().parse().map_err(|_| format!("{what} has the key `{key}`, which is no class number"))?;
        if class >= 1_000_000 {
            return Err(format!("{what} names class {class}; the highest possible is 999999"));
        }
        if class >= names.len() {
            names.resize(class + 1, None);
        }
        if names[class].replace(text(name, what)?).is_some() {
            return Err(format!("{what} names class {class} twice"));
        }
    }
    Ok(Names { names, sparse: true })
}

/// A name; whole numbers are valid names.
fn text(value: &Value, what: &str) -> Result<String, String> {
    match value {
        Value::String(name) => Ok(name.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(format!("{what} holds {}, which is no name", kind(other))),
    }
}

/// Type of a JSON value, for messages.
pub fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a dictionary".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn names(names: Value, descriptions: Value, classes: usize) -> Result<Vec<String>, String> {
        read(&names, Some(&descriptions), "label_names")?.complete(classes)
    }

    #[test]
    fn gaps_keep_their_number() {
        let found = names(json!({"0": "cat", "3": "dog"}), Value::Null, 6).expect("reads");
        assert_eq!(found, ["cat", "1", "2", "dog", "4", "5"]);
        assert_eq!(names(json!([0, 1]), Value::Null, 2).expect("reads"), ["0", "1"]);
    }

    #[test]
    fn descriptions_explain_names() {
        let found = names(json!(["n1", "n2"]), json!({"n1": "tench", "n9": "shark"}), 2).expect("reads");
        assert_eq!(found, ["tench", "n2"]);
        assert_eq!(names(json!(["a", "b"]), json!(["ant", "bee"]), 2).expect("reads"), ["ant", "bee"]);
    }

    #[test]
    fn what_is_no_list_of_names_is_refused() {
        for (value, what) in [
            (json!("cat"), "label_names is \"cat\""),
            (json!({"cat": 0}), "`cat`"),
            (json!({"7": "cat"}), "8 label_names for 2"),
            (json!({"1": "cat", "01": "dog"}), "class 1 twice"),
            (json!({"99999999": "cat"}), "class 99999999"),
            (json!(["a"]), "1 label_names for 2"),
            (json!(["a", null]), "holds null"),
        ] {
            let error = names(value, Value::Null, 2).expect_err(what);
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn files_hold_lines_or_json() {
        let read = |text: &str, classes| from_file(text.as_bytes()).and_then(|n| n.complete(classes));
        assert_eq!(read("cat\r\ndog\n", 2).expect("lines"), ["cat", "dog"]);
        assert_eq!(read("\u{feff}[\"cat\", \"dog\"]", 2).expect("list"), ["cat", "dog"]);
        assert_eq!(read("{\"1\": \"dog\"}", 2).expect("dictionary"), ["0", "dog"]);
        assert_eq!(read("{\"dog\": 1, \"7\": 0}", 2).expect("class_to_idx"), ["7", "dog"]);
        assert_eq!(read("{\"0\": 1, \"1\": 0}", 2).expect("numbers name numbers"), ["1", "0"]);
        assert!(read("{\"dog\": 1, \"cat\": 1}", 2).is_err_and(|e| e.contains("number 1")));
        for text in ["", "cat\n\ndog", "[1"] {
            assert!(read(text, 2).is_err(), "{text:?}");
        }
        assert!(from_file(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn imagenets_lists_are_timms() {
        assert_eq!(ImageNet::In1k.labels()[0], "tench, Tinca tinca");
        assert_eq!(imagenet_1k_synset("n01440764"), Some(0));
        assert_eq!((SYNSETS_1K.lines().count(), SYNSETS_1K.lines().is_sorted()), (1000, true));
        // of timm 1.0.31: SHA-256 of the lemmas of its synsets, joined by line feeds
        for (list, digest) in [
            (ImageNet::In12k, "5ebe3dde6550d38e4a45d3dfd5b60fd5684940f4393932616d73f4a8097cdc2c"),
            (ImageNet::In21k, "1cc12d5969905d8d13e02c7db8f075bfb34f9cdf8fb6fe7608d34da5c4306f49"),
            (ImageNet::In22k, "d0ec1485ef832e606c510ea3d94d39a6553726ec0c5ebcf40c4f32cf3e7bf303"),
        ] {
            assert_eq!(crate::model::sha256(list.labels().join("\n").as_bytes()), digest, "{list:?}");
        }
        for list in ImageNet::ALL {
            assert_eq!(list.labels().len(), list.classes(), "{list:?}");
        }
        for (tag, list) in [
            ("ra2_in1k", Some(ImageNet::In1k)),
            ("in12k_ft_in1k", Some(ImageNet::In1k)),
            ("in21k", Some(ImageNet::In21k)),
            ("sw_in12k", Some(ImageNet::In12k)),
            ("cifar", None),
        ] {
            assert_eq!(ImageNet::of_tag(tag), list, "{tag}");
        }
    }
}
