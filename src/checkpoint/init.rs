//! Writes checkpoints in timm's layout with newly initialised weights (timm's initialisation), so that benchmarks and
//! tests need no download.

use std::fs;
use std::path::Path;

use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, Normal, Uniform};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::{CONFIG_FILE, CheckpointError, WEIGHTS_FILE};
use crate::files::DraftFolder;
use crate::nets::{self, Init, NetError, Network, TensorSpec};

/// What to initialise, and how.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// Architecture by timm's name, without a tag.
    pub architecture: String,
    /// Seed: the same seed gives the same bytes.
    pub seed: u64,
    /// timm's `model_args`, `num_classes` among them.
    pub model_args: Map<String, Value>,
}

/// Writes `folder/{config.json,model.safetensors}`, whole or not at all. `folder` must not exist.
pub fn init(folder: &Path, options: &InitOptions) -> Result<Network, CheckpointError> {
    write(folder, options, |_| {})
}

/// As [`init`], but with every residual branch at full strength: timm starts the gain of a branch's last layer (and
/// SkipInit's) at 0, where the analysis of Brock et al. 2021 assumes 1.
pub fn init_active(folder: &Path, options: &InitOptions) -> Result<Network, CheckpointError> {
    write(folder, options, |spec| {
        let is_gain = spec.name.ends_with("gain") || spec.name.ends_with(".weight");
        if is_gain && spec.init == Init::Constant(0.0) {
            spec.init = Init::Constant(1.0);
        }
    })
}

fn write(folder: &Path, options: &InitOptions, adjust: impl Fn(&mut TensorSpec)) -> Result<Network, CheckpointError> {
    let network = Network::plan(&options.architecture, &options.model_args)?;
    if folder.exists() {
        return Err(CheckpointError::Exists(folder.into()));
    }
    let write = |source| CheckpointError::Write { path: folder.into(), source };
    let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(write)?;
    let draft = DraftFolder::create_in(parent).map_err(write)?;
    let config = config(options, &network)?;
    let text = serde_json::to_string_pretty(&config).map_err(|e| write(e.into()))?;
    draft.write(CONFIG_FILE, (text + "\n").as_bytes()).map_err(write)?;
    draft.write(WEIGHTS_FILE, &weights(&network, options.seed, adjust)?).map_err(write)?;
    draft.publish(folder, false).map_err(write)?;
    Ok(network)
}

fn config(options: &InitOptions, network: &Network) -> Result<Value, NetError> {
    let name = nets::base_name(&options.architecture);
    let evaluation = nets::evaluation(name)
        .ok_or_else(|| NetError::UnknownArchitecture { name: name.into(), nearest: nets::nearest(name) })?;
    let channels = network.in_chans();
    let square = |side: u32| json!([channels, side, side]);
    let by_channel = |colors: [f64; 3]| match channels {
        3 => colors.to_vec(),
        _ => vec![colors.iter().sum::<f64>() / 3.0; channels],
    };
    let mut pretrained = json!({
        "input_size": square(evaluation.input),
        "interpolation": evaluation.interpolation,
        "crop_pct": evaluation.crop_pct,
        "crop_mode": evaluation.crop_mode,
        "mean": by_channel(evaluation.norm.mean()),
        "std": by_channel(evaluation.norm.std()),
        "num_classes": network.classes(),
    });
    if let Some(side) = evaluation.test_input {
        pretrained["test_input_size"] = square(side);
    }
    if let Some(share) = evaluation.test_crop_pct {
        pretrained["test_crop_pct"] = share.into();
    }
    Ok(json!({
        "architecture": name,
        "num_classes": network.classes(),
        "model_args": options.model_args,
        "pretrained_cfg": pretrained,
    }))
}

fn weights(network: &Network, seed: u64, adjust: impl Fn(&mut TensorSpec)) -> Result<Vec<u8>, CheckpointError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut specs = network.tensors();
    specs.iter_mut().for_each(adjust);
    let data: Vec<Vec<u8>> = specs.iter().map(|spec| fill(spec, &mut rng)).collect();
    let sound = |reason: String| CheckpointError::Weights { path: WEIGHTS_FILE.into(), reason };
    let mut views = Vec::with_capacity(specs.len());
    for (spec, bytes) in specs.iter().zip(&data) {
        let dtype = if spec.init == Init::Counter { Dtype::I64 } else { Dtype::F32 };
        let view = TensorView::new(dtype, spec.shape.clone(), bytes).map_err(|e| sound(e.to_string()))?;
        views.push((spec.name.as_str(), view));
    }
    let format = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize(views, Some(format)).map_err(|e| sound(e.to_string()))
}

fn fill(spec: &TensorSpec, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let count: usize = spec.shape.iter().product();
    let bytes = |values: &mut dyn Iterator<Item = f32>| values.take(count).flat_map(f32::to_le_bytes).collect();
    match spec.init {
        Init::Constant(value) => bytes(&mut std::iter::repeat(value)),
        // the plan's deviations and bounds are positive and finite, where neither constructor fails
        Init::Normal(std) => match Normal::new(0.0, std) {
            Ok(normal) => bytes(&mut normal.sample_iter(rng).map(|v: f64| v as f32)),
            Err(_) => bytes(&mut std::iter::repeat(0.0)),
        },
        Init::Uniform(bound) => match Uniform::new(-bound, bound) {
            Ok(uniform) => bytes(&mut uniform.sample_iter(rng).map(|v: f64| v as f32)),
            Err(_) => bytes(&mut std::iter::repeat(0.0)),
        },
        Init::Counter => 0i64.to_le_bytes().to_vec(),
    }
}
