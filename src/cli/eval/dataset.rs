//! Images whose classes are known: a folder with a folder per class (torchvision's ImageFolder), or a table of paths
//! and classes. Maps the names of classes to the model's classes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{anyhow, bail};

use crate::checkpoint::labels;
use crate::cli::classify::search::{self, Found, Search};
use crate::cli::printable::{self, printable, say};

/// Most bytes of a table.
const LARGEST_TABLE: u64 = 1 << 30;
/// Bytes at a table's start that show whether it is text.
const HEAD: u64 = 1 << 13;
/// Names of a table's first column that make its first row a header.
const HEADERS: [&str; 5] = ["path", "image", "file", "filename", "filepath"];
/// Unknown names that a message lists.
const NAMED: usize = 3;

/// An image and its class.
#[derive(Debug)]
pub struct Sample {
    /// Path as the data names it: below the folder, or in the table.
    pub name: String,
    /// The file, or why it can't be read.
    pub found: Found,
    /// Name of its class in the data.
    pub class: String,
}

/// Every image of `data`, in order.
pub fn read(data: &Path, hidden: bool) -> anyhow::Result<Vec<Sample>> {
    let shown = printable::path(data);
    let there = fs::metadata(data).map_err(|e| anyhow!("can't read `{shown}`: {e}; check the path"))?;
    if !there.is_dir() && search::is_image(data) {
        bail!(
            "`{shown}` is an image, and of one image there is no accuracy: eval takes a folder with a folder of images for each class \
             (CLASS/IMAGE), or a table of path,class; `nfold classify` classifies it"
        );
    }
    let samples = if there.is_dir() { folder(data, hidden)? } else { table(data, there.len())? };
    if samples.is_empty() {
        bail!("`{shown}` names no image; give a folder with a folder for each class, or a table of path,class");
    }
    Ok(samples)
}

fn folder(data: &Path, hidden: bool) -> anyhow::Result<Vec<Sample>> {
    let shown = printable::path(data);
    let read = |e| anyhow!("can't search `{shown}`: {e}");
    let entries = fs::read_dir(data).map_err(read)?.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>();
    let mut entries = entries.map_err(read)?;
    entries.sort();
    let (mut samples, mut outside, mut left_out) = (Vec::new(), 0, Vec::new());
    for path in entries {
        let class = printable::path(Path::new(path.file_name().unwrap_or_default()));
        if class.starts_with('.') && !hidden {
            continue;
        }
        let mut search = Search::new(hidden);
        match fs::metadata(&path) {
            Ok(there) if there.is_dir() => {
                if let Err(e) = search.folder(&path) {
                    // as a folder below it
                    search.refuse_folder(path, &e);
                }
            }
            // a link to a folder that is gone: files have extensions
            Err(e) if path.extension().is_none() => search.refuse_folder(path, &e),
            Ok(_) | Err(_) => {
                outside += 1;
                continue;
            }
        }
        left_out.extend(search.left_out().map(|left| format!("in {class}: {left}")));
        samples.extend(search.found.into_iter().map(|found| {
            let name = found.path.strip_prefix(data).unwrap_or(&found.path).to_string_lossy().replace('\\', "/");
            Sample { name, found, class: class.clone() }
        }));
    }
    if samples.is_empty() {
        bail!(
            "`{shown}` holds no folder with image files (looked for: {}); lay it out as CLASS/IMAGE, or give a table of \
             path,class",
            search::known()
        );
    }
    if outside > 0 {
        say(format_args!("note: left out {outside} files beside the folders of classes"));
    }
    for left in left_out {
        say(format_args!("note: {left}"));
    }
    Ok(samples)
}

/// Reads a table: `path,class` per line, with an optional header; paths are relative to the table's folder.
fn table(path: &Path, bytes: u64) -> anyhow::Result<Vec<Sample>> {
    let shown = printable::path(path);
    if bytes > LARGEST_TABLE {
        bail!("`{shown}` has {bytes} bytes, at most {LARGEST_TABLE} are read; is it a table of path,class?");
    }
    let mut head = Vec::new();
    let unreadable = |e: io::Error| anyhow!("can't read `{shown}`: {e}");
    // opened once: it may be a pipe
    let mut file = fs::File::open(path).map_err(unreadable)?;
    file.by_ref().take(HEAD).read_to_end(&mut head).map_err(unreadable)?;
    if head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]) {
        bail!("`{shown}` is not UTF-8 but UTF-16; save the table as UTF-8");
    }
    if head.contains(&0) {
        bail!("`{shown}` is no text; give a folder of CLASS/IMAGE, or a table of path,class");
    }
    let bad = |line: u64, why: String| anyhow!("`{shown}`, line {line}: {why}; a line is path,class");
    let mut reader = csv::ReaderBuilder::new();
    reader.has_headers(false).flexible(true).trim(csv::Trim::All);
    let mut samples = Vec::new();
    let base = path.parent().unwrap_or(Path::new(""));
    for (row, record) in reader.from_reader(head.as_slice().chain(file.take(LARGEST_TABLE))).into_records().enumerate()
    {
        let record = record.map_err(|e| match e.kind() {
            csv::ErrorKind::Utf8 { pos, .. } => {
                let line = pos.as_ref().map_or(row as u64 + 1, csv::Position::line);
                anyhow!("`{shown}`, line {line} is not UTF-8; save the table as UTF-8")
            }
            _ => bad(row as u64 + 1, e.to_string()),
        })?;
        let line = record.position().map_or(row as u64 + 1, csv::Position::line);
        let (Some(image), Some(class)) = (record.get(0).filter(|i| !i.is_empty()), record.get(1)) else {
            return Err(bad(line, "two columns are needed".into()));
        };
        if row == 0 && HEADERS.iter().any(|header| image.eq_ignore_ascii_case(header)) {
            continue;
        }
        let found = Found::image(base.join(image));
        samples.push(Sample { name: image.into(), found, class: class.into() });
    }
    Ok(samples)
}

/// The index in the model's logits of each class of the data. A folder that can't be searched needs none.
pub fn resolve(samples: &[Sample], labels: &[String], classes: usize) -> anyhow::Result<BTreeMap<String, usize>> {
    let known = Known::new(labels, classes);
    let mut found = BTreeMap::new();
    let mut unknown = Vec::new();
    for sample in samples {
        if sample.found.is_folder || found.contains_key(&sample.class) || unknown.contains(&sample.class) {
            continue;
        }
        match known.find(&sample.class)? {
            Some(index) => {
                found.insert(sample.class.clone(), index);
            }
            None => unknown.push(sample.class.clone()),
        }
    }
    if let Some(first) = unknown.first() {
        let named: Vec<_> = unknown.iter().take(NAMED).map(|name| format!("`{}`", printable(name))).collect();
        let more = if unknown.len() > NAMED { format!(" and {} more", unknown.len() - NAMED) } else { String::new() };
        bail!(
            "the model has no class {}{more}; nearest to the first: {}. Classes are named by label, by position (0 to {})\
             {}",
            named.join(", "),
            known.nearest(first),
            classes.saturating_sub(1),
            if classes == labels::ImageNet::In1k.classes() { ", or by synset (n01440764)" } else { "" }
        );
    }
    Ok(found)
}

/// The model's classes by name.
struct Known<'a> {
    labels: &'a [String],
    classes: usize,
    /// By label, and by the part of a label before its first comma; `None` if several classes share the name.
    by_name: BTreeMap<String, Option<usize>>,
}

impl<'a> Known<'a> {
    fn new(labels: &'a [String], classes: usize) -> Self {
        let mut by_name: BTreeMap<String, Option<usize>> = BTreeMap::new();
        for (index, label) in labels.iter().enumerate() {
            let whole = plain(label);
            let first = plain(label.split(',').next().unwrap_or_default());
            for name in if first == whole { vec![whole] } else { vec![whole, first] } {
                by_name.entry(name).and_modify(|known| *known = None).or_insert(Some(index));
            }
        }
        Self { labels, classes, by_name }
    }

    fn find(&self, name: &str) -> anyhow::Result<Option<usize>> {
        match self.by_name.get(&plain(name)) {
            Some(Some(index)) => return Ok(Some(*index)),
            Some(None) => bail!("several classes of the model are called `{}`; name them by position", printable(name)),
            None => {}
        }
        let imagenet = self.classes == labels::ImageNet::In1k.classes();
        let by_synset = if imagenet { labels::imagenet_1k_synset(name) } else { None };
        Ok(by_synset.or_else(|| name.parse().ok().filter(|&index| index < self.classes)))
    }

    fn nearest(&self, name: &str) -> String {
        let mut labels: Vec<&String> = self.labels.iter().collect();
        let name = plain(name);
        labels.sort_by(|a, b| {
            let likeness = |label: &str| strsim::jaro_winkler(&name, &plain(label));
            likeness(b).total_cmp(&likeness(a))
        });
        let nearest: Vec<_> = labels.into_iter().take(NAMED).map(|label| printable(label)).collect();
        if nearest.is_empty() { "it has no names".into() } else { nearest.join(", ") }
    }
}

/// A name in lower case, with spaces for underscores, as folders often differ in both.
fn plain(name: &str) -> String {
    name.trim().replace('_', " ").to_lowercase()
}

/// `limit` samples at equal distances, so that every class keeps its share.
pub fn limited(samples: Vec<Sample>, limit: usize) -> Vec<Sample> {
    let count = samples.len();
    if limit >= count {
        return samples;
    }
    let chosen = |i: usize| (i + 1) * limit / count > i * limit / count;
    samples.into_iter().enumerate().filter(|(i, _)| chosen(*i)).map(|(_, sample)| sample).collect()
}

/// Predictions of another run: labels by image name, and by every end part of the name's path.
pub struct Other(BTreeMap<String, Option<String>>);

impl Other {
    /// Reads JSON lines written by `nfold classify` or `nfold eval --predictions`.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let shown = printable::path(path);
        let text = fs::read_to_string(path).map_err(|e| anyhow!("can't read `{shown}`: {e}; check --against"))?;
        let mut answers: BTreeMap<String, Option<String>> = BTreeMap::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let bad = |why: &str| {
                anyhow!("`{shown}`, line {}: {why}; --against takes what `nfold classify` wrote as JSON lines", i + 1)
            };
            let row: serde_json::Value = serde_json::from_str(line).map_err(|e| bad(&e.to_string()))?;
            let image = row["image"].as_str().ok_or_else(|| bad("it has no `image`"))?.replace('\\', "/");
            // an image that could not be read there has no prediction
            let Some(label) = row["predictions"][0]["label"].as_str() else { continue };
            let ends = image.match_indices('/').map(|(at, _)| &image[at + 1..]);
            for name in std::iter::once(image.as_str()).chain(ends) {
                // several images may share this end
                answers.entry(name.into()).and_modify(|known| *known = None).or_insert_with(|| Some(label.into()));
            }
        }
        Ok(Self(answers))
    }

    /// The label predicted for an image, whose path may be longer there.
    pub fn of(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(class: &str) -> Sample {
        Sample { name: String::new(), found: Found::image(Path::new("").into()), class: class.into() }
    }

    fn found(classes: &[&str], labels: &[&str], count: usize) -> Result<Vec<usize>, String> {
        let samples: Vec<_> = classes.iter().map(|class| sample(class)).collect();
        let labels: Vec<_> = labels.iter().map(|label| (*label).to_string()).collect();
        let found = resolve(&samples, &labels, count).map_err(|e| e.to_string())?;
        Ok(classes.iter().map(|class| found[*class]).collect())
    }

    #[test]
    fn classes_are_found_by_label_position_and_synset() {
        let labels = ["tench, Tinca tinca", "great white shark", "crane", "crane"];
        assert_eq!(found(&["tench", "Great_White_Shark", "tench, tinca tinca", "3"], &labels, 4), Ok(vec![0, 1, 0, 3]));
        let error = found(&["crane"], &labels, 4).expect_err("refused");
        assert!(error.contains("several classes"), "{error}");
        let error = found(&["tanch", "4", "-1"], &labels, 4).expect_err("refused");
        assert!(error.contains("`tanch`, `4`, `-1`") && error.contains("tench, Tinca tinca"), "{error}");
        assert_eq!(found(&["n01440764", "n15075141", "5"], &[], 1000), Ok(vec![0, 999, 5]));
        assert!(found(&["n01440764"], &[], 10).is_err());
    }

    #[test]
    fn a_limit_keeps_every_class() {
        let samples = (0..100).map(|i| sample(if i < 50 { "a" } else { "b" })).collect();
        let left = limited(samples, 10);
        assert_eq!(left.len(), 10);
        assert_eq!(left.iter().filter(|s| s.class == "a").count(), 5);
    }
}
