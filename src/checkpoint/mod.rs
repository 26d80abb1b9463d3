//! Reads untrusted checkpoints in all supported formats. Headers are validated when a checkpoint is opened; a
//! [`Reader`] then returns each tensor once, with the shape that the network's plan expects, and refuses unread
//! tensors.
//!
//! `files` finds and opens the files: a folder in the model hub's layout, shards, one file; `safetensors_file` and
//! `torch` index their tensors, which `store` reads one at a time. `config` reads `config.json`; `settings` resolves
//! preprocessing; `labels` reads class names; `prefix` removes wrappers' prefixes from tensor names. `init` writes
//! newly initialised checkpoints. Doesn't know ONNX graphs.

pub mod config;
mod files;
pub mod init;
pub mod labels;
mod prefix;
mod reader;
mod safetensors_file;
pub mod settings;
mod store;
mod torch;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use config::Config;
pub use files::{HUB_WEIGHTS, is_folder, is_index, shards_of};
pub use reader::Reader;
pub use torch::pickle;

use self::files::shown;
use self::labels::{ImageNet, Names};
use self::settings::{Layer, Origin, Settings};
use self::store::Tensors;
use crate::model::{CropMode, Interpolation, Preprocessing, ScoreFunction, Source, SourceSetting};
use crate::nets::{self, NetError, Network};
use crate::printable::brief;

/// File name of the configuration inside a checkpoint folder.
pub const CONFIG_FILE: &str = "config.json";
/// File name of the weights inside a checkpoint folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// Hint for errors about tensors that don't match the architecture.
const DESCRIBE: &str =
    "do `architecture` and `model_args` of config.json (or --arch and --model-args) describe these weights?";

/// Why a checkpoint can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The folder or one of its files is missing or unreadable.
    #[error(
        "can't read `{path}`: {source}; a checkpoint is a folder with `{CONFIG_FILE}` and `{WEIGHTS_FILE}`, or a file of weights"
    )]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("can't write `{path}`: {source}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The output folder exists.
    #[error("`{0}` exists already; choose another --out, or remove it first")]
    Exists(PathBuf),
    /// `config.json` is not in a format that timm writes.
    #[error("`{path}`: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// The architecture or its arguments are not supported.
    #[error(transparent)]
    Network(#[from] NetError),
    /// `model.safetensors` is malformed.
    #[error("`{path}` is not a sound safetensors file: {reason}; download or save the checkpoint again")]
    Weights {
        /// The file.
        path: PathBuf,
        /// Message of the safetensors reader.
        reason: String,
    },
    /// A torch.save file is malformed or of another kind.
    #[error("`{path}`: {reason}")]
    Torch {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file has another format.
    #[error("`{path}` is {what}")]
    Kind {
        /// The file.
        path: PathBuf,
        /// The format.
        what: &'static str,
    },
    /// The file is a Git LFS pointer.
    #[error("`{0}` is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")]
    LfsPointer(PathBuf),
    /// The folder has weights, but under other names than the hub's.
    #[error("`{folder}` has no `{WEIGHTS_FILE}`; to fold `{first}`, name that file itself")]
    OtherNames {
        /// The folder.
        folder: PathBuf,
        /// The first file that may hold weights.
        first: PathBuf,
    },
    /// No file names the weights' architecture.
    #[error("`{0}` does not say which network its weights are of; name it by timm's name with --arch")]
    NoArchitecture(PathBuf),
    /// An option contradicts the checkpoint.
    #[error("--arch {given} contradicts `{path}`, which says {found}; leave --arch out")]
    OtherArchitecture {
        /// Value of the option.
        given: String,
        /// The checkpoint's architecture.
        found: String,
        /// File that names it.
        path: PathBuf,
    },
    /// Class names can't be used.
    #[error("labels `{path}`: {reason}")]
    Labels {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The preprocessing settings are invalid.
    #[error("preprocessing can't be used: {0}")]
    Preprocessing(String),
    /// A tensor of the architecture is not in the file.
    #[error("tensor `{0}` is missing; {DESCRIBE}")]
    Missing(String),
    /// A tensor has another shape than in the architecture.
    #[error("tensor `{name}` has shape {found:?}, but the network's is {expected:?}; {DESCRIBE}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// Shape in the plan.
        expected: Vec<usize>,
    },
    /// A tensor's data type can't be a weight's.
    #[error("tensor `{name}` has data type {dtype}, not F64, F32, F16 or BF16")]
    DataType {
        /// The tensor.
        name: String,
        /// Data type in the file.
        dtype: String,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{name}` holds {value} at element {index}; the checkpoint is damaged or its training diverged")]
    NotFinite {
        /// The tensor.
        name: String,
        /// Index of the first such element, row-major.
        index: usize,
        /// `NaN`, `inf` or `-inf`.
        value: f64,
    },
    /// The file has tensors that the architecture doesn't have.
    #[error("{count} tensors are not part of `{architecture}`, first `{first}`; {DESCRIBE}")]
    Leftover {
        /// Number of such tensors.
        count: usize,
        /// Name of the first, in alphabetical order.
        first: String,
        /// The architecture.
        architecture: String,
    },
}

/// Options of the user, which override what the files say.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OpenOptions {
    /// Architecture by timm's name, for files that don't name one.
    pub architecture: Option<String>,
    /// Arguments that override the checkpoint's own (timm's `model_kwargs`).
    pub model_args: Map<String, Value>,
    /// Preprocessing settings.
    pub settings: Settings,
    /// Class names.
    pub labels: Option<LabelChoice>,
    /// Use the EMA weights that training saved beside the plain ones.
    pub use_ema: bool,
}

impl OpenOptions {
    /// Refuses a given architecture that isn't known, or isn't what the configuration in this file says.
    fn check_architecture(&self, told: Option<(&Path, &str)>) -> Result<(), CheckpointError> {
        let Some(given) = &self.architecture else { return Ok(()) };
        if let Err(unknown @ NetError::UnknownArchitecture { .. }) = Network::plan(given, &Map::new()) {
            return Err(unknown.into());
        }
        match told {
            Some((path, found)) if nets::base_name(given) != nets::base_name(found) => {
                Err(CheckpointError::OtherArchitecture { given: given.clone(), found: found.into(), path: path.into() })
            }
            _ => Ok(()),
        }
    }
}

/// Source of class names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelChoice {
    /// A list of ImageNet classes.
    ImageNet(ImageNet),
    /// A file: one name per line, or JSON.
    File(PathBuf),
}

/// A checkpoint with validated headers and a planned network. A [`Reader`] returns the tensors.
#[derive(Debug)]
pub struct Checkpoint {
    /// Architecture by timm's name, with the tag of the weights unless they were retrained for other classes.
    pub architecture: String,
    /// Plan of the network.
    pub network: Network,
    /// Class names in logit order; empty if there are none.
    pub labels: Vec<String>,
    /// Function that turns logits into scores, and the field that names it; `None` if no field does.
    pub scores: Option<(ScoreFunction, String)>,
    /// SHA-256 of the weights file in hexadecimal; of shards, SHA-256 of their digests.
    pub sha256: String,
    /// SHA-256 of the other files that were read: configuration and class names.
    pub told_sha256: String,
    /// Name of the model: the folder's name, or the file's.
    pub name: String,
    layers: Vec<Layer>,
    source: Source,
    tensors: Tensors,
}

impl Checkpoint {
    /// Opens a folder or file. Validates headers; a [`Reader`] validates values.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// Refuses what can't be opened by its names, its configuration and its first bytes, without reading the weights.
    pub fn check(path: &Path, options: &OpenOptions) -> Result<(), CheckpointError> {
        files::check(&Self::described(path, options)?.0.weights)
    }

    /// Where the checkpoint is, and its configuration: the text, and what it says with the user's options.
    fn described(
        path: &Path,
        options: &OpenOptions,
    ) -> Result<(files::Location, Vec<u8>, Option<Config>), CheckpointError> {
        options.check_architecture(None)?;
        let at = files::locate(path)?;
        // read first, so that an unreadable configuration is the first error
        let text = at.config.as_deref().map(files::text).transpose()?.unwrap_or_default();
        let mut config = match &at.config {
            Some(file) => Some(
                Config::parse(&text)
                    .map_err(|reason| CheckpointError::Config { path: file.clone(), reason: brief(reason) })?,
            ),
            None => None,
        };
        if path.is_dir() && config.is_none() && options.architecture.is_none() {
            return Err(files::text(&path.join(CONFIG_FILE))
                .err()
                .unwrap_or(CheckpointError::NoArchitecture(path.into())));
        }
        if let Some(config) = &mut config {
            config.model_args.extend(options.model_args.clone());
            options.check_architecture(at.config.as_deref().map(|file| (file, config.architecture.as_str())))?;
            // report an unsupported network before the weights are read
            Network::plan(&config.architecture, &config.model_args)?;
        }
        Ok((at, text, config))
    }

    /// As [`open`](Self::open), with the user's options.
    pub fn open_with(path: &Path, options: &OpenOptions) -> Result<Self, CheckpointError> {
        let (at, text, config) = Self::described(path, options)?;
        let opened = files::open(&at.weights, options.use_ema)?;
        let told = config.is_some();
        let (config, architecture_from) = match config {
            Some(config) => (config, format!("architecture in {CONFIG_FILE}")),
            None => without_config(&at.weights, options, &opened)?,
        };
        let mut checkpoint =
            Assembly { path: &at.weights, options, config, opened, told: text, source: Source::default() };
        checkpoint.source.settings.push(setting("architecture", architecture_from));
        checkpoint.finish(at.name, told)
    }

    /// Checks whether a configuration alone describes a supported network, before weights are downloaded.
    pub fn check_config(text: &[u8], options: &OpenOptions) -> Result<(), CheckpointError> {
        let bad = |reason| CheckpointError::Config { path: CONFIG_FILE.into(), reason: brief(reason) };
        let mut config = Config::parse(text).map_err(bad)?;
        options.check_architecture(Some((Path::new(CONFIG_FILE), &config.architecture)))?;
        config.model_args.extend(options.model_args.clone());
        Ok(Network::plan(&config.architecture, &config.model_args).map(drop)?)
    }

    /// Preprocessing as timm resolves it for evaluation, with the origin of every setting. `size` (height, width)
    /// overrides only the input size.
    pub fn preprocessing(&self, size: Option<(u32, u32)>) -> Result<(Preprocessing, Source), String> {
        let (preprocessing, origins) = settings::resolve(&self.layers, size, self.network.in_chans())?;
        let mut source = self.source.clone();
        source.settings.extend(origins);
        Ok((preprocessing, source))
    }

    /// Sets the name, and the origin that the checkpoint was downloaded from.
    pub fn set_origin(&mut self, name: &str, origin: String) {
        self.name = name.into();
        self.source.settings.insert(0, setting("checkpoint", origin));
    }

    /// A reader of the checkpoint's tensors.
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(&self.tensors, &self.architecture)
    }
}

fn setting(setting: &str, origin: String) -> SourceSetting {
    SourceSetting { setting: setting.into(), origin }
}

/// Configuration of a file without `config.json`: what the weights file says, completed by timm's settings of the
/// architecture. Also returns the source of the architecture's name.
fn without_config(
    path: &Path,
    options: &OpenOptions,
    opened: &files::Opened,
) -> Result<(Config, String), CheckpointError> {
    let (architecture, from) = match (&options.architecture, &opened.architecture) {
        (Some(given), Some((found, _))) if nets::base_name(given) != nets::base_name(found) => {
            return Err(CheckpointError::OtherArchitecture {
                given: given.clone(),
                found: found.clone(),
                path: path.into(),
            });
        }
        (Some(given), _) => (given.clone(), "--arch".to_string()),
        (None, Some(found)) => found.clone(),
        (None, None) => return Err(CheckpointError::NoArchitecture(path.into())),
    };
    let (base, tag) = match architecture.split_once('.') {
        Some((base, tag)) => (base.to_string(), Some(tag.to_string())),
        None => (architecture, None),
    };
    let bad = |reason| CheckpointError::Torch { path: path.into(), reason };
    let (settings, mut model_args) = config::training(&opened.training.args).map_err(bad)?;
    model_args.extend(options.model_args.clone());
    let mut layers = Vec::new();
    if settings != Settings::default() {
        let by_side = opened.training.args.get("input_size").is_none_or(Value::is_null);
        layers.push(Layer { origin: Origin::Training { file: shown(path), by_side }, settings });
    }
    layers.extend(of_architecture(&base));
    let config = Config {
        architecture: base,
        tag,
        model_args,
        labels: Names::default(),
        labels_from: String::new(),
        scores: None,
        layers,
        unused: Vec::new(),
    };
    Ok((config, from))
}

/// timm's evaluation settings of an architecture.
fn of_architecture(architecture: &str) -> Option<Layer> {
    let e = nets::evaluation(architecture)?;
    let square = |side: u32| [3, side, side];
    let settings = Settings {
        input_size: Some(square(e.input)),
        test_input_size: e.test_input.map(square),
        crop_pct: Some(e.crop_pct),
        test_crop_pct: e.test_crop_pct,
        crop_mode: Some(if e.crop_mode == "squash" { CropMode::Squash } else { CropMode::Center }),
        interpolation: Some(if e.interpolation == "bilinear" {
            Interpolation::Bilinear
        } else {
            Interpolation::Bicubic
        }),
        mean: Some(e.norm.mean().to_vec()),
        std: Some(e.norm.std().to_vec()),
    };
    Some(Layer { origin: Origin::Architecture(architecture.into()), settings })
}

/// Parts of a checkpoint before they are checked against each other.
struct Assembly<'a> {
    path: &'a Path,
    options: &'a OpenOptions,
    config: Config,
    opened: files::Opened,
    /// Contents of the files that describe the weights, concatenated.
    told: Vec<u8>,
    source: Source,
}

impl Assembly<'_> {
    /// Checks the parts against each other. `told`: the checkpoint has a configuration.
    fn finish(mut self, name: String, told: bool) -> Result<Checkpoint, CheckpointError> {
        // the draft's tensor names show the prefix in the file; the head's shape in the file may set the number of
        // classes
        let draft = Network::plan(&self.config.architecture, &self.config.model_args)?;
        self.unwrap(&draft)?;
        let network = self.size_head(draft)?;
        let labels = self.labels(network.classes())?;
        let of_command_line = self.options.settings.clone();
        let mut layers = std::mem::take(&mut self.config.layers);
        let own = layers.iter().any(|l| matches!(l.origin, Origin::Training { .. }));
        layers.insert(0, Layer { origin: Origin::CommandLine, settings: of_command_line });
        let in_file = |reason: String| {
            if told {
                CheckpointError::Config { path: CONFIG_FILE.into(), reason }
            } else {
                CheckpointError::Preprocessing(reason)
            }
        };
        let (resolved, _) = settings::resolve(&layers, None, network.in_chans()).map_err(in_file)?;
        self.warn(&network, &labels, &resolved, told, own);
        let scores = self.scores(network.classes());
        let tag = self.config.tag.filter(|tag| !is_retrained(tag, network.classes()));
        let architecture = match tag {
            Some(tag) => format!("{}.{tag}", self.config.architecture),
            None => self.config.architecture,
        };
        self.source.unused.append(&mut self.config.unused);
        self.source.unused.append(&mut self.opened.unused);
        Ok(Checkpoint {
            architecture,
            network,
            labels,
            scores,
            sha256: self.opened.sha256,
            told_sha256: crate::model::sha256(&self.told),
            name,
            layers,
            source: self.source,
            tensors: self.opened.tensors,
        })
    }

    /// The score function, from the configuration or the arguments of training.
    fn scores(&mut self, classes: usize) -> Option<(ScoreFunction, String)> {
        if let Some((function, field)) = self.config.scores {
            return Some((function, format!("{field} in {CONFIG_FILE}")));
        }
        let args = &self.opened.training.args;
        if let Some(field) = config::of_several_classes(args) {
            return Some((ScoreFunction::Sigmoid, format!("args.{field} in {}", shown(self.path))));
        }
        if args.get("bce_loss") == Some(&Value::Bool(true)) && classes > 1 {
            self.source.warnings.push(
                "args.bce_loss: the network was trained with binary cross-entropy; its scores are of softmax, as timm reads \
                 such networks; where an image may be of several classes, fold it with --activation sigmoid"
                    .into(),
            );
        }
        None
    }

    fn unwrap(&mut self, draft: &Network) -> Result<(), CheckpointError> {
        let Some(first) = draft.tensors().into_iter().next() else { return Ok(()) };
        let use_ema = self.options.use_ema;
        let bad = |reason| CheckpointError::Torch { path: self.path.into(), reason };
        let found = prefix::unwrap(&mut self.opened.tensors, &first.name, use_ema).map_err(bad)?;
        if use_ema && !found.averaged && !self.opened.averaged {
            return Err(bad(torch::NO_EMA.into()));
        }
        if !found.prefix.is_empty() {
            self.source.settings.push(setting("tensors", format!("under `{}`", found.prefix)));
        }
        if let Some(ema) = self.opened.ema.take().or(found.ema) {
            self.source.warnings.push(format!(
                "the file also holds averaged weights (`{ema}`), which are often better; fold them with --use-ema"
            ));
        }
        self.source.unused.extend(found.unused);
        Ok(())
    }

    /// Plans the network with the number of classes of the weights' head, if nothing else gives it.
    fn size_head(&mut self, draft: Network) -> Result<Network, CheckpointError> {
        let args = &mut self.config.model_args;
        if args.contains_key("num_classes") {
            return Ok(draft);
        }
        let head = draft.classifier();
        let rows = self.opened.tensors.entries.get(&head).and_then(|entry| entry.shape.first().copied());
        match rows.filter(|rows| *rows != draft.classes()) {
            None => Ok(draft),
            Some(rows) => {
                args.insert("num_classes".into(), rows.into());
                self.source.settings.push(setting("num_classes", format!("tensor `{head}`")));
                Ok(Network::plan(&self.config.architecture, args)?)
            }
        }
    }

    fn labels(&mut self, classes: usize) -> Result<Vec<String>, CheckpointError> {
        let own = std::mem::take(&mut self.config.labels);
        let (names, from, path) = match &self.options.labels {
            Some(LabelChoice::ImageNet(list)) => {
                if classes != list.classes() {
                    let reason = format!("{} names for {classes} classes", list.classes());
                    return Err(CheckpointError::Labels { path: list.name().into(), reason });
                }
                self.source.settings.push(setting("labels", format!("--labels {}", list.name())));
                return Ok(list.labels());
            }
            Some(LabelChoice::File(path)) => {
                let bad = |reason| CheckpointError::Labels { path: path.clone(), reason };
                let advice = "--labels takes a file of names, one a line or JSON, or imagenet-1k, -12k, -21k or -22k";
                let text = files::text(path).map_err(|e| match e {
                    CheckpointError::Read { source, .. } => bad(format!("can't read it: {source}; {advice}")),
                    other => other,
                })?;
                let names = labels::from_file(&text).map_err(bad)?;
                self.told.extend(text);
                (names, format!("--labels {}", shown(path)), path.clone())
            }
            None if own.is_empty() => {
                let tag = self.config.tag.as_deref().unwrap_or_default();
                if let Some(list) = ImageNet::of_tag(tag).filter(|list| list.classes() == classes) {
                    self.source.settings.push(setting("labels", format!("ImageNet's, by the tag {tag}")));
                    return Ok(list.labels());
                }
                return Ok(Vec::new());
            }
            None => {
                let from = format!("{} in {CONFIG_FILE}", self.config.labels_from);
                (own, from, CONFIG_FILE.into())
            }
        };
        let bad = |reason| match &self.options.labels {
            Some(_) => CheckpointError::Labels { path: path.clone(), reason },
            None => CheckpointError::Config { path: path.clone(), reason },
        };
        let names = names.complete(classes).map_err(bad)?;
        self.source.settings.push(setting("labels", from));
        Ok(names)
    }

    /// Adds warnings about settings that are probably wrong.
    fn warn(&mut self, network: &Network, labels: &[String], resolved: &Preprocessing, told: bool, own: bool) {
        let (classes, name) = (network.classes(), &self.config.architecture);
        let warnings = &mut self.source.warnings;
        let by_hand = self.options.settings != Settings::default();
        let published =
            of_architecture(name).and_then(|layer| Some(settings::resolve(&[layer], None, network.in_chans()).ok()?.0));
        if !told && !own && !by_hand {
            warnings.push(format!(
                "the file says nothing about preprocessing, so timm's settings of {name} are used; if the weights were trained with others, give --img-size, --mean, --std, --crop-pct, --interpolation"
            ));
        } else if told && !by_hand && classes != 1000 && published.as_ref() == Some(resolved) {
            warnings.push(format!(
                "the weights were trained further for {classes} classes, but the preprocessing is that of {name} as published; if they were trained with another, give --img-size, --mean, --std, --crop-pct, --interpolation"
            ));
        }
        if labels.is_empty() {
            let list = ImageNet::ALL.into_iter().find(|list| list.classes() == classes);
            let or = list.map(|list| format!(", or {} if they are", list.name())).unwrap_or_default();
            warnings
                .push(format!("classes have no names, so answers carry numbers; give names with --labels FILE{or}"));
        }
    }
}

/// Whether weights with the pretrained tag `tag` were retrained for another number of classes.
fn is_retrained(tag: &str, classes: usize) -> bool {
    ImageNet::of_tag(tag).is_some_and(|list| list.classes() != classes)
}

fn read(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Read { path, source }
}
