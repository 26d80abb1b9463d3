//! Class names in every form that checkpoints carry them: a list, a dictionary by class number (gaps keep their number),
//! names that descriptions explain; and ImageNet's own, for checkpoints that are tagged with it.

use serde_json::{Map, Value};

/// ImageNet's 1000 classes in logit order, one a line: WordNet lemmas as timm has them (`imagenet-1k.LICENSE` beside).
const IMAGENET_1K: &str = include_str!("labels/imagenet-1k.txt");
/// Number of ImageNet's classes.
pub const IMAGENET_1K_CLASSES: usize = 1000;
/// Most bytes that a file of names may have.
const LARGEST_FILE: usize = 16 << 20;

/// ImageNet's class names, in logit order.
pub fn imagenet_1k() -> Vec<String> {
    IMAGENET_1K.lines().map(String::from).collect()
}

/// Whether a pretrained tag says that the classifier was trained on ImageNet's 1000 classes, as in `ra2_in1k`.
pub fn is_imagenet_1k(tag: &str) -> bool {
    tag == "in1k" || tag.ends_with("_in1k")
}

/// Names as a configuration writes them: `names` in a list or a dictionary by class number, each looked up in
/// `descriptions` where there are some. The number of classes is not known yet: a dictionary's names end with its highest
/// number, and [`Names::complete`] fills up. `what` names the field in messages.
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
        // by class number, like the names
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
    /// By class number; `None` where a dictionary has a gap.
    names: Vec<Option<String>>,
    /// From a dictionary, which need not reach the last class.
    sparse: bool,
}

impl Names {
    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// How many classes the names reach to.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Names of all `classes`, in logit order: a class without a name has its number. A list must name every class.
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

/// Names in a file: JSON (a list or a dictionary by class number), or one a line.
pub fn from_file(bytes: &[u8]) -> Result<Names, String> {
    if bytes.len() > LARGEST_FILE {
        return Err(format!("has {} bytes, too many for a list of names", bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| format!("is not UTF-8 text: {e}"))?;
    let text = text.trim_start_matches('\u{feff}');
    if text.trim_start().starts_with(['[', '{']) {
        let value = serde_json::from_str(text).map_err(|e| format!("is not the JSON it begins as: {e}"))?;
        return read(&value, None, "it");
    }
    let lines = text.trim_end().lines().map(|line| Some(line.trim().to_string()));
    let names: Vec<_> = if text.trim().is_empty() { Vec::new() } else { lines.collect() };
    match names.iter().position(|n| n.as_deref() == Some("")) {
        Some(line) => Err(format!("has no name in line {}", line + 1)),
        None if names.is_empty() => Err("holds no names".into()),
        None => Ok(Names { names, sparse: false }),
    }
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

/// A name; whole numbers are names, too.
fn text(value: &Value, what: &str) -> Result<String, String> {
    match value {
        Value::String(name) => Ok(name.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(format!("{what} holds {}, which is no name", kind(other))),
    }
}

/// What a JSON value is, for messages.
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
        for text in ["", "cat\n\ndog", "[1"] {
            assert!(read(text, 2).is_err(), "{text:?}");
        }
        assert!(from_file(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn imagenet_has_its_classes() {
        let names = imagenet_1k();
        assert_eq!((names.len(), names[0].as_str()), (IMAGENET_1K_CLASSES, "tench, Tinca tinca"));
        assert!(is_imagenet_1k("ra2_in1k") && is_imagenet_1k("in12k_ft_in1k") && !is_imagenet_1k("in21k"));
    }
}
