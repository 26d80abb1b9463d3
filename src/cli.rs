//! The command line: what the user typed → typed options → one call into the rooms below. Errors are printed here,
//! once, as one line; machine output goes to stdout, everything else to stderr.

mod bench;
mod classify;
mod completions;
mod docs;
mod fold;
mod gamma;
mod healthcheck;
mod images;
mod init;
mod inspect;
mod man;
mod serve;
mod spp;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::logging;

/// Fold Normalizer-Free image classifiers into plain convolutions, and serve them.
#[derive(Debug, Parser)]
#[command(name = "nfold", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fold a timm checkpoint into a plain ONNX graph and put it into a model repository
    Fold(fold::FoldArgs),
    /// Classify image files with a folded model, without a server
    Classify(classify::ClassifyArgs),
    /// Serve a model repository over HTTP and gRPC
    Serve(Box<serve::ServeArgs>),
    /// Exit 0 when a server is ready: for containers without a shell
    Healthcheck(healthcheck::HealthcheckArgs),
    /// Say what a folded model or a checkpoint is
    Inspect(inspect::InspectArgs),
    /// Measure latency against BN-folded networks
    Bench(bench::BenchArgs),
    /// Write a freshly initialised checkpoint in timm's layout
    Init(init::InitArgs),
    /// γ of an activation: closed form, quadrature, simulation and timm's constant
    Gamma(gamma::GammaArgs),
    /// Show the scale of hidden activations, block by block: signal propagation plots
    Spp(spp::SppArgs),
    /// Print a shell's completion script
    Completions(completions::CompletionsArgs),
    /// Write manual pages
    Man(man::ManArgs),
    /// Print the configuration reference as Markdown
    #[command(hide = true)]
    Docs,
}

/// Parses the command line, runs the command and turns its outcome into an exit code: 0 done, 1 failed, 2 wrong usage.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Fold(args) => fold::run(&args),
        Command::Classify(args) => classify::run(&args),
        Command::Serve(args) => serve::run(*args),
        Command::Healthcheck(args) => healthcheck::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Gamma(args) => gamma::run(&args),
        Command::Spp(args) => spp::run(&args),
        Command::Completions(args) => completions::run(&args, Cli::command()),
        Command::Man(args) => man::run(&args, Cli::command()),
        Command::Docs => docs::run(Cli::command()),
    };
    match outcome {
        Ok(code) => {
            logging::flush();
            code
        }
        // whoever reads our output has had enough, as `head` does
        Err(e) if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            logging::last_line(&format!("error: {e}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }

    /// Every flag can be set by an environment variable `NFOLD_…`.
    #[test]
    fn every_flag_has_a_variable() {
        let mut left = vec![super::Cli::command()];
        while let Some(command) = left.pop() {
            left.extend(command.get_subcommands().cloned());
            for argument in command.get_arguments().filter(|a| a.get_long().is_some()) {
                let name = argument.get_id().as_str();
                if matches!(name, "help" | "version") {
                    continue;
                }
                let variable = argument.get_env().unwrap_or_else(|| panic!("{} --{name}", command.get_name()));
                assert!(variable.to_string_lossy().starts_with("NFOLD_"), "{variable:?}");
            }
        }
    }
}
