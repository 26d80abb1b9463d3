//! `nfold init`: a newly initialised checkpoint.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use serde_json::{Map, Value};

use super::printable::say;
use crate::checkpoint::init::{InitOptions, init};

/// Arguments of `nfold init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Architecture by timm's name, such as nf_regnet_b1 or resnet50
    architecture: String,
    /// Folder to write; must not exist
    #[arg(long, env = "NFOLD_OUT", value_name = "DIR")]
    out: PathBuf,
    /// Seed of the random weights: the same seed gives the same bytes
    #[arg(long, env = "NFOLD_SEED", default_value_t = 0)]
    seed: u64,
    /// Number of classes [default: 1000]
    #[arg(long, env = "NFOLD_NUM_CLASSES", value_name = "K")]
    num_classes: Option<u32>,
    /// timm's model_args as a JSON object, such as '{"depths": [1, 2, 4, 3], "width_factor": 0.5}'
    #[arg(long, env = "NFOLD_MODEL_ARGS", value_name = "JSON", value_parser = parse_args)]
    model_args: Option<Map<String, Value>>,
}

/// Parses a JSON object.
pub(super) fn parse_args(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|e| format!("not a JSON object: {e}"))
}

/// Runs `nfold init`.
pub fn run(args: &InitArgs) -> anyhow::Result<ExitCode> {
    let mut model_args = args.model_args.clone().unwrap_or_default();
    if let Some(classes) = args.num_classes
        && model_args.insert("num_classes".into(), classes.into()).is_some_and(|given| given != classes)
    {
        bail!("--num-classes {classes} contradicts num_classes in --model-args; give one of them");
    }
    let options = InitOptions { architecture: args.architecture.clone(), seed: args.seed, model_args };
    let network = init(&args.out, &options)?;
    let millions = network.parameters() as f64 / 1e6;
    say(format_args!("wrote {} ({}, {millions:.2} M parameters, untrained)", args.out.display(), args.architecture));
    Ok(ExitCode::SUCCESS)
}
