//! Options that override or complete a checkpoint's own settings, by timm's names.

use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use crate::checkpoint::labels::ImageNet;
use crate::checkpoint::settings::Settings;
use crate::checkpoint::{LabelChoice, OpenOptions};
use crate::fold::{FoldOptions, ScoreOptions, SideOutputs, Size};
use crate::model::scoring::check_temperature;
use crate::model::{CropMode, Gate, Interpolation, Precision, ScoreFunction};

/// Options of every command that opens checkpoints.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// Architecture by timm's name, such as nf_regnet_b1, for files that don't name it
    #[arg(long, env = "NFOLD_ARCH", value_name = "NAME")]
    arch: Option<String>,
    /// timm's model_args as a JSON object, which override the checkpoint's, such as '{"act_layer": "silu"}'
    #[arg(long, env = "NFOLD_MODEL_ARGS", value_name = "JSON", value_parser = super::init::parse_args)]
    model_args: Option<Map<String, Value>>,
    /// Class names: a file with one per line or a JSON list, or `imagenet-1k`, `-12k`, `-21k`, `-22k` [default: the
    /// checkpoint's]
    #[arg(long, env = "NFOLD_LABELS", value_name = "FILE|LIST")]
    labels: Option<PathBuf>,
    /// Use the averaged weights (EMA) that training saved beside the others
    #[arg(long, env = "NFOLD_USE_EMA", value_parser = FalseyValueParser::new())]
    use_ema: bool,
    /// Evaluation size in pixels, `H` or `HxW` [default: the checkpoint's]
    #[arg(long, env = "NFOLD_IMG_SIZE", value_name = "H|HxW", value_parser = parse_size)]
    img_size: Option<[u32; 2]>,
    /// Mean that images are normalised with: R,G,B in 0..1, or one for all [default: the checkpoint's]
    #[arg(long, env = "NFOLD_MEAN", value_name = "R,G,B", value_delimiter = ',')]
    mean: Vec<f64>,
    /// Standard deviation that images are normalised with, like --mean [default: the checkpoint's]
    #[arg(long, env = "NFOLD_STD", value_name = "R,G,B", value_delimiter = ',')]
    std: Vec<f64>,
    /// Share of the resized side that the crop keeps [default: the checkpoint's]
    #[arg(long, env = "NFOLD_CROP_PCT", value_name = "SHARE")]
    crop_pct: Option<f64>,
    /// How images are fitted to the input's aspect ratio: center, squash or border [default: the checkpoint's]
    #[arg(long, env = "NFOLD_CROP_MODE", value_name = "MODE", value_parser = parse_word::<CropMode>)]
    crop_mode: Option<CropMode>,
    /// Resampling filter: nearest, box, bilinear, bicubic or lanczos [default: the checkpoint's]
    #[arg(long, env = "NFOLD_INTERPOLATION", value_name = "FILTER", value_parser = parse_word::<Interpolation>)]
    interpolation: Option<Interpolation>,
}

impl SourceArgs {
    /// The typed options.
    pub fn options(&self) -> OpenOptions {
        let labels = self.labels.clone().map(|path| {
            match ImageNet::ALL.into_iter().find(|list| path.as_os_str() == list.name()) {
                Some(list) => LabelChoice::ImageNet(list),
                None => LabelChoice::File(path),
            }
        });
        let list = |values: &[f64]| Some(values.to_vec()).filter(|v| !v.is_empty());
        OpenOptions {
            architecture: self.arch.clone(),
            model_args: self.model_args.clone().unwrap_or_default(),
            labels,
            use_ema: self.use_ema,
            settings: Settings {
                input_size: self.img_size.map(|[height, width]| [3, height, width]),
                crop_pct: self.crop_pct,
                crop_mode: self.crop_mode,
                interpolation: self.interpolation,
                mean: list(&self.mean),
                std: list(&self.std),
                ..Settings::default()
            },
        }
    }
}

/// How a checkpoint is folded: the options that `nfold fold` and `nfold serve SOURCE` share.
#[derive(Debug, Args)]
pub struct FoldingArgs {
    /// Input size in pixels: `dynamic`, `H` or `HxW` [default: the checkpoint's evaluation size]
    #[arg(long, env = "NFOLD_SIZE", value_parser = parse_graph_size)]
    size: Option<Size>,
    /// Number format of weights and arithmetic; `int8` is calibrated on images, with `nfold fold --calibrate`
    #[arg(long, env = "NFOLD_PRECISION", default_value = "fp32")]
    precision: PrecisionArg,
    /// How attention gates multiply: `resize` is fastest on ONNX Runtime's CPU, `broadcast` suits other runtimes
    #[arg(long, env = "NFOLD_GATE", default_value = "resize")]
    gate: GateArg,
    /// Turn images upright by their EXIF orientation before they are classified; timm, and so training, does not
    #[arg(long, env = "NFOLD_EXIF_ORIENTATION", value_parser = FalseyValueParser::new())]
    exif_orientation: bool,
    /// What makes scores of logits: softmax (one class an image), sigmoid (any number) or none (the logits themselves)
    /// [default: what the checkpoint says, else sigmoid for one output and softmax for several]
    #[arg(long, env = "NFOLD_ACTIVATION", value_name = "FUNCTION", value_parser = parse_word::<ScoreFunction>)]
    activation: Option<ScoreFunction>,
    /// Name all classes with this score or more, instead of the most probable ones: `0.5` for all, `LABEL=0.3` for one class, by
    /// label or position; may be given several times
    #[arg(long, env = "NFOLD_THRESHOLD", value_name = "[LABEL=]SCORE", value_parser = parse_threshold, allow_negative_numbers = true)]
    threshold: Vec<(Option<String>, f64)>,
    /// Divide logits by this before they become scores; `nfold eval --fit-temperature` finds it
    #[arg(long, env = "NFOLD_TEMPERATURE", value_name = "T", value_parser = parse_temperature)]
    temperature: Option<f64>,
    /// What the graph gives: logits always; features, the vector before the classifier, for retrieval (/v1/embed, classify
    /// --features); map, the one that is pooled, for heat maps (/v1/explain, classify --explain)
    #[arg(long, env = "NFOLD_OUTPUTS", value_delimiter = ',', default_value = "logits,features", value_name = "LIST")]
    outputs: Vec<OutputArg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputArg {
    Logits,
    Features,
    Map,
}

/// `SCORE` or `LABEL=SCORE`; labels may hold `=`.
fn parse_threshold(text: &str) -> Result<(Option<String>, f64), String> {
    let (label, score) = match text.rsplit_once('=') {
        Some((label, score)) => (Some(label.to_string()), score),
        None => (None, text),
    };
    let score = score.trim().parse().map_err(|_| format!("`{score}` is no number"))?;
    Ok((label, score))
}

fn parse_temperature(text: &str) -> Result<f64, String> {
    let temperature = text.parse().map_err(|_| format!("`{text}` is no number"))?;
    check_temperature(temperature).map(|()| temperature)
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PrecisionArg {
    Fp32,
    Fp16,
    Int8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum GateArg {
    Resize,
    Broadcast,
}

impl FoldingArgs {
    /// The typed options.
    pub fn options(&self) -> FoldOptions {
        FoldOptions {
            size: self.size.unwrap_or_default(),
            precision: match self.precision {
                PrecisionArg::Fp32 => Precision::Fp32,
                PrecisionArg::Fp16 => Precision::Fp16,
                PrecisionArg::Int8 => Precision::Int8,
            },
            gate: match self.gate {
                GateArg::Resize => Gate::Resize,
                GateArg::Broadcast => Gate::Broadcast,
            },
            unfolded: false,
            exif_orientation: self.exif_orientation,
            scores: ScoreOptions {
                activation: self.activation,
                temperature: self.temperature,
                thresholds: self.threshold.clone(),
            },
            outputs: SideOutputs {
                features: self.outputs.contains(&OutputArg::Features),
                map: self.outputs.contains(&OutputArg::Map),
            },
        }
    }
}

fn parse_graph_size(text: &str) -> Result<Size, String> {
    let side =
        |s: &str| s.parse::<u32>().map_err(|_| format!("`{text}` is not `dynamic`, `H` or `HxW`, as in 288x288"));
    match text.split_once('x') {
        _ if text == "dynamic" => Ok(Size::Dynamic),
        Some((height, width)) => Ok(Size::Fixed(side(height)?, side(width)?)),
        None => side(text).map(|s| Size::Fixed(s, s)),
    }
}

fn parse_size(text: &str) -> Result<[u32; 2], String> {
    let side = |s: &str| s.parse::<u32>().map_err(|_| format!("`{text}` is not `H` or `HxW`, as in 288x288"));
    match text.split_once('x') {
        Some((height, width)) => Ok([side(height)?, side(width)?]),
        None => side(text).map(|s| [s, s]),
    }
}

/// Parses a word of a configuration, as config.json spells it.
pub(super) fn parse_word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|e| e.to_string())
}
