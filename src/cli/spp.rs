//! `nfold spp`: signal propagation statistics of networks at initialisation, of checkpoints (unfolded, folded, in half
//! precision) and of folded models, side by side; exit code 1 when a statistic is unhealthy.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{anyhow, bail};
use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::classify::search::Search;
use crate::checkpoint::{CONFIG_FILE, Checkpoint, init};
use crate::engine::Batch;
use crate::files::{DraftFile, DraftFolder};
use crate::fold::{FoldError, FoldOptions, Folded, SideOutputs, Size, fold};
use crate::model::{self, MANIFEST_FILE, Manifest, ModelDir, Precision, Preprocessing, regular_file};
use crate::nets::activation::{ACTIVATIONS, Activation};
use crate::pixels::{Decoder, Preprocessor};
use crate::spp::health::{self, Limits, Problem};
use crate::spp::resnet_v2::{ResNetV2, VARIANTS};
use crate::spp::taps::{BlockFacts, Exposed};
use crate::spp::{Profile, gaussian_image, render};

/// Images per run: affects memory, but not the statistics.
const BATCH: usize = 4;
/// Default side of the input of the paper's networks, in pixels.
const DEFAULT_SIZE: usize = 224;
/// Largest relative difference of any statistic from the unfolded graph's.
const TOLERANCE: f64 = 1e-4;
const TOLERANCE_FP16: f64 = 2e-2;

/// Arguments of `nfold spp`.
#[derive(Debug, Args)]
pub struct SppArgs {
    /// Checkpoint folders, version folders, or names of models in the repository
    #[arg(value_name = "MODEL|CHECKPOINT")]
    networks: Vec<PathBuf>,
    /// A network at initialisation; repeat for several: bn-relu-conv, relu-bn-conv, nf-he, nf-ws, plain-he
    /// (pre-activation ResNets of the paper), or an architecture of timm; settings may follow, as in
    /// nf-he:act=identity,alpha=0.2
    #[arg(long, env = "NFOLD_ARCH", value_name = "ARCH[:KEY=VALUE,…]", value_delimiter = ';')]
    arch: Vec<String>,
    /// Layers of the pre-activation ResNets, three per residual block
    #[arg(long, env = "NFOLD_DEPTH", default_value_t = 50, value_name = "LAYERS")]
    depth: usize,
    /// Stages of the pre-activation ResNets, 1 to 4
    #[arg(long, env = "NFOLD_STAGES", default_value_t = 4, value_name = "N")]
    stages: usize,
    /// Factor on the channels of networks at initialisation
    #[arg(long, env = "NFOLD_WIDTH", value_name = "FACTOR")]
    width: Option<f64>,
    /// Activation of networks at initialisation [default: relu, or the architecture's own]
    #[arg(long, env = "NFOLD_ACT", value_name = "NAME")]
    act: Option<String>,
    /// α of networks at initialisation [default: 1, or the architecture's own]
    #[arg(long, env = "NFOLD_ALPHA", value_name = "α")]
    alpha: Option<f64>,
    /// Side of the input in pixels [default: 224 for pre-activation ResNets, else the evaluation size]
    #[arg(long, env = "NFOLD_SIZE", value_name = "PIXELS")]
    size: Option<u32>,
    /// Most images to run
    #[arg(long, env = "NFOLD_COUNT", default_value_t = 8, value_name = "N")]
    count: usize,
    /// Folder of photographs to run instead of Gaussian noise, searched recursively
    #[arg(long, env = "NFOLD_IMAGES", value_name = "DIR")]
    images: Option<PathBuf>,
    /// Seed of weights and noise
    #[arg(long, env = "NFOLD_SEED", default_value_t = 0)]
    seed: u64,
    /// Graphs to examine of each checkpoint
    #[arg(long, env = "NFOLD_GRAPHS", value_delimiter = ',', default_value = "unfolded,folded,fp16")]
    graphs: Vec<GraphArg>,
    /// Model repository that names are looked up in
    #[arg(long, env = "NFOLD_REPOSITORY", default_value = "repository", value_name = "DIR")]
    repository: PathBuf,
    /// Version of the models [default: the highest]
    #[arg(long, env = "NFOLD_MODEL_VERSION", value_name = "N")]
    model_version: Option<u64>,
    /// Second moment of a block's output or residual branch above which it counts as exploding
    #[arg(long, env = "NFOLD_EXPLODE", default_value_t = Limits::default().explode, value_name = "LIMIT")]
    explode: f64,
    /// Second moment of a block's output below which it counts as vanishing
    #[arg(long, env = "NFOLD_VANISH", default_value_t = Limits::default().vanish, value_name = "LIMIT")]
    vanish: f64,
    /// Heading of the figure
    #[arg(long, env = "NFOLD_TITLE", default_value = "Signal propagation")]
    title: String,
    /// Write the figure with the paper's three panels as SVG
    #[arg(long, env = "NFOLD_SVG", value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write every number as CSV
    #[arg(long, env = "NFOLD_CSV", value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print as JSON instead of a table
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GraphArg {
    /// As in the checkpoint, scalars as operations
    Unfolded,
    /// Folded, single precision
    Folded,
    /// Folded, half precision
    Fp16,
}

/// The profiles measured so far.
#[derive(Default)]
struct Findings {
    profiles: Vec<Profile>,
    comparisons: Vec<Value>,
    problems: Vec<Problem>,
}

/// Runs `nfold spp`.
pub fn run(args: &SppArgs) -> anyhow::Result<ExitCode> {
    if args.networks.is_empty() && args.arch.is_empty() {
        bail!("nothing to look at; name a model or checkpoint, or a network with --arch, as in --arch nf-ws");
    }
    if !(1..=100_000).contains(&args.count) {
        bail!("--count {} can't be; 1 to 100000 images are possible", args.count);
    }
    let csv = args.csv.as_deref().map(create).transpose()?;
    let svg = args.svg.as_deref().map(create).transpose()?;
    let mut findings = Findings::default();
    for spec in &args.arch {
        let profile = at_initialisation(spec, args)?;
        findings.profiles.push(profile);
    }
    let in_repository = |network: &Path| {
        let listing = model::list(&args.repository);
        listing.is_ok_and(|listing| listing.models.contains_key(network.to_string_lossy().as_ref()))
    };
    for network in &args.networks {
        if network.join(CONFIG_FILE).is_file() {
            checkpoint(network, args, &mut findings)?;
        } else if network.is_file() && !in_repository(network) {
            bail!("`{}` is a file; name a checkpoint's folder, a version folder or a model", network.display());
        } else {
            let model = if network.join(MANIFEST_FILE).is_file() {
                ModelDir::open_path(network)?
            } else {
                ModelDir::open(&args.repository, Some(&network.to_string_lossy()), args.model_version)?
            };
            if args.size.is_some() {
                bail!("`{}` is folded for one size; leave --size out, or name its checkpoint", model.name);
            }
            let name = format!("{}/{}", model.name, model.version);
            let (model, onnx) = model.with_onnx()?;
            let profile = look_into(&onnx, &model.manifest, &name, args)?;
            findings.profiles.push(profile);
        }
    }
    let limits = Limits { explode: args.explode, vanish: args.vanish };
    findings.problems.extend(findings.profiles.iter().flat_map(|p| health::examine(p, &limits)));
    if let Some(file) = csv {
        write_whole(file, &render::csv(&findings.profiles))?;
    }
    if let Some(file) = svg {
        write_whole(file, &render::figure(&findings.profiles, &args.title).svg())?;
    }
    tell(&findings, args)?;
    match findings.problems.as_slice() {
        [] => Ok(ExitCode::SUCCESS),
        problems => {
            let list = problems.iter().map(|p| format!("`{}` at `{}` {}: {}", p.network, p.block, p.kind, p.detail));
            let list = list.collect::<Vec<_>>().join("; ");
            bail!("{} sick signals: {list}", problems.len())
        }
    }
}

fn tell(findings: &Findings, args: &SppArgs) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        let Findings { profiles, comparisons, problems } = findings;
        let report = json!({ "profiles": profiles, "comparisons": comparisons, "problems": problems });
        writeln!(out, "{report:#}")?;
    } else {
        write!(out, "{}", render::table(&findings.profiles))?;
        for c in &findings.comparisons {
            writeln!(
                out,
                "{} against {}: largest relative difference of a statistic {:.2e}, at {} (allowed {:.0e})",
                c["network"].as_str().unwrap_or_default(),
                c["reference"].as_str().unwrap_or_default(),
                c["largest_relative_difference"].as_f64().unwrap_or(f64::INFINITY),
                c["block"].as_str().unwrap_or_default(),
                c["tolerance"].as_f64().unwrap_or_default(),
            )?;
        }
    }
    Ok(())
}

/// A file that appears once it is complete, and its name.
type Draft<'a> = (DraftFile, &'a Path);

/// Begins a file before the networks are run, so that one that can't be written is known then.
fn create(path: &Path) -> anyhow::Result<Draft<'_>> {
    Ok((DraftFile::create(path).map_err(|e| not_written(path, &e))?, path))
}

fn write_whole((mut draft, path): Draft<'_>, text: &str) -> anyhow::Result<()> {
    draft.write_all(text.as_bytes()).and_then(|()| draft.publish()).map_err(|e| not_written(path, &e))
}

fn not_written(path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow!("can't write `{}`: {error}; check the folder", path.display())
}

/// Adds a checkpoint's graphs; the first of them is the reference for the others.
fn checkpoint(folder: &Path, args: &SppArgs, findings: &mut Findings) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut reference: Option<Profile> = None;
    for graph in [GraphArg::Unfolded, GraphArg::Folded, GraphArg::Fp16] {
        if !args.graphs.contains(&graph) {
            continue;
        }
        let options = FoldOptions {
            outputs: SideOutputs::NONE,
            size: args.size.map_or(Size::Checkpoint, |s| Size::Fixed(s, s)),
            precision: if graph == GraphArg::Fp16 { Precision::Fp16 } else { Precision::Fp32 },
            unfolded: graph == GraphArg::Unfolded,
            ..FoldOptions::default()
        };
        let (what, tolerance) = match graph {
            GraphArg::Unfolded => ("unfolded", TOLERANCE),
            GraphArg::Folded => ("folded", TOLERANCE),
            GraphArg::Fp16 => ("folded fp16", TOLERANCE_FP16),
        };
        let name = format!("{} {what}", checkpoint.name);
        let folded = match fold(&checkpoint, &options) {
            // a finding about this precision, not a failure of the others
            Err(FoldError::Graph(e)) if graph == GraphArg::Fp16 => {
                let block = "weights".into();
                findings.problems.push(Problem {
                    network: name,
                    block,
                    kind: "not_representable",
                    detail: e.to_string(),
                });
                continue;
            }
            other => other?,
        };
        let profile = look_into(&folded.onnx, &folded.manifest, &name, args)?;
        if let Some(reference) = &reference {
            if let Some((difference, block)) = health::largest_difference(reference, &profile) {
                findings.comparisons.push(json!({
                    "reference": reference.network, "network": profile.network,
                    "largest_relative_difference": difference, "block": block, "tolerance": tolerance,
                }));
            }
            findings.problems.extend(health::compare(reference, &profile, tolerance));
        }
        reference.get_or_insert_with(|| profile.clone());
        findings.profiles.push(profile);
    }
    Ok(())
}

/// Profiles a classifier's graph on noise or photographs.
fn look_into(onnx: &[u8], manifest: &Manifest, name: &str, args: &SppArgs) -> anyhow::Result<Profile> {
    let scalars = manifest.fold.blocks.iter();
    let facts: Vec<BlockFacts> = scalars
        .map(|b| BlockFacts {
            block: b.block.clone(),
            scale: b.alpha * b.skipinit_gain.unwrap_or(1.0),
            expected_variance: b.expected_variance,
        })
        .collect();
    let mut exposed = Exposed::open(onnx, name, &facts)?;
    let p = &manifest.preprocessing;
    match &args.images {
        Some(folder) => {
            let batches = photographs(folder, p, args.count)?;
            Ok(exposed.profile(&format!("photographs of {}", folder.display()), batches.iter())?)
        }
        None => {
            let batches = noise(args.seed, p.shape(), args.count);
            Ok(exposed.profile("unit Gaussian noise", batches.iter())?)
        }
    }
}

fn noise(seed: u64, shape: [usize; 3], count: usize) -> Vec<Batch> {
    let batch = |first: usize| {
        let mut batch = Batch::zeros_of(BATCH.min(count - first), shape);
        (0..batch.images).for_each(|i| gaussian_image(seed, first + i, &mut batch, i));
        batch
    };
    (0..count).step_by(BATCH).map(batch).collect()
}

/// `count` images of a folder, spaced evenly over the sorted names.
fn photographs(folder: &Path, p: &Preprocessing, count: usize) -> anyhow::Result<Vec<Batch>> {
    let mut search = Search::new(false);
    search.folder(folder).map_err(|e| anyhow!("can't search `{}`: {e}", folder.display()))?;
    let files = search.readable(&format!("name another folder than `{}` with --images", folder.display()))?;
    let count = count.min(files.len());
    let preprocessor = Preprocessor::new(p);
    if !preprocessor.takes_images() {
        bail!("the network takes {} channels, which no photograph has; leave --images out", p.channels());
    }
    let decoder = Decoder::default();
    let mut batches = Vec::new();
    for first in (0..count).step_by(BATCH) {
        let mut batch = Batch::zeros_of(BATCH.min(count - first), p.shape());
        for i in 0..batch.images {
            let path = &files[(first + i) * files.len() / count];
            let bytes = regular_file::read(path, decoder.limits.max_bytes as u64);
            let bytes = bytes.map_err(|e| anyhow!("can't read `{}`: {e}", path.display()))?;
            let image = decoder.decode(&bytes, p.exif_orientation, |width, height| [width, height]);
            let image = image.map_err(|e| anyhow!("`{}`: {e}", path.display()))?;
            preprocessor.apply(&image, batch.image_mut(i));
        }
        batches.push(batch);
    }
    Ok(batches)
}

/// Profiles a network at initialisation by its specification, `NAME[:KEY=VALUE,…]`.
fn at_initialisation(spec: &str, args: &SppArgs) -> anyhow::Result<Profile> {
    let (name, settings) = spec.split_once(':').unwrap_or((spec, ""));
    let mut s = Settings {
        act: args.act.clone(),
        depth: args.depth,
        stages: args.stages,
        width: args.width,
        alpha: args.alpha,
    };
    s.overlay(spec, settings)?;
    match VARIANTS.into_iter().find(|v| v.name() == name) {
        Some(variant) => {
            if args.images.is_some() {
                bail!("`{name}` is untrained and runs on noise only; leave --images out");
            }
            let act = s.act.as_deref().unwrap_or("relu");
            let activation = Activation::parse(act).ok_or_else(|| {
                anyhow!("activation `{act}` is not known; known are {}", ACTIVATIONS.map(Activation::name).join(", "))
            })?;
            let network = ResNetV2 {
                variant,
                activation,
                depth: s.depth,
                stages: s.stages,
                width: s.width.unwrap_or(1.0),
                alpha: s.alpha.unwrap_or(1.0),
                size: args.size.map_or(DEFAULT_SIZE, |size| size as usize),
                images: args.count,
                seed: args.seed,
            };
            let style = ProgressStyle::with_template("{prefix} {bar:40} {pos}/{len} blocks, {elapsed}, {eta} left");
            let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(spec.to_string());
            let profile = network.profile(spec, |done, all| {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            });
            bar.finish_and_clear();
            Ok(profile?)
        }
        None => fresh_checkpoint(name, spec, &s, args),
    }
}

/// Profiles an architecture of timm with new weights and its residual branches at full strength.
fn fresh_checkpoint(name: &str, spec: &str, s: &Settings, args: &SppArgs) -> anyhow::Result<Profile> {
    let mut model_args = Map::new();
    let mut set = |key: &str, value: Option<Value>| value.map(|v| model_args.insert(key.into(), v));
    set("act_layer", s.act.clone().map(Value::from));
    set("alpha", s.alpha.map(Value::from));
    set("width_factor", s.width.map(Value::from));
    let options = init::InitOptions { architecture: name.into(), seed: args.seed, model_args };
    let folder = DraftFolder::scratch().map_err(|e| anyhow!("can't make a temporary folder: {e}; set TMPDIR"))?;
    let path = folder.path().join("checkpoint");
    init::init_active(&path, &options).map_err(|e| {
        let own = VARIANTS.map(|v| v.name()).join(", ");
        anyhow!("--arch {spec}: {e}; besides timm's there are {own}")
    })?;
    let checkpoint = Checkpoint::open(&path)?;
    let size = args.size.map_or(Size::Checkpoint, |s| Size::Fixed(s, s));
    let Folded { onnx, manifest } =
        fold(&checkpoint, &FoldOptions { size, outputs: SideOutputs::NONE, ..FoldOptions::default() })?;
    look_into(&onnx, &manifest, spec, args)
}

/// The settings of a network at initialisation.
struct Settings {
    act: Option<String>,
    depth: usize,
    stages: usize,
    width: Option<f64>,
    alpha: Option<f64>,
}

impl Settings {
    /// Applies `KEY=VALUE,…` over the flags.
    fn overlay(&mut self, spec: &str, settings: &str) -> anyhow::Result<()> {
        for setting in settings.split(',').filter(|s| !s.is_empty()) {
            let known = "act, depth, stages, width, alpha";
            let Some((key, value)) = setting.split_once('=') else {
                bail!("--arch {spec}: `{setting}` is not KEY=VALUE; keys are {known}");
            };
            let bad = || anyhow!("--arch {spec}: `{value}` is not a number");
            match key {
                "act" => self.act = Some(value.into()),
                "depth" => self.depth = value.parse().map_err(|_| bad())?,
                "stages" => self.stages = value.parse().map_err(|_| bad())?,
                "width" => self.width = Some(value.parse().map_err(|_| bad())?),
                "alpha" => self.alpha = Some(value.parse().map_err(|_| bad())?),
                _ => bail!("--arch {spec}: `{key}` is not known; keys are {known}"),
            }
        }
        Ok(())
    }
}
