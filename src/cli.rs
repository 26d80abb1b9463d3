//! The command line: arguments → typed options → one call into the modules below. Errors are printed here, once, as one
//! line; machine-readable output goes to stdout, everything else to stderr.

mod addresses;
mod bench;
mod calibrate;
mod classify;
mod completions;
mod docs;
mod environment;
mod eval;
mod examples;
mod fetching;
mod fold;
mod gamma;
mod healthcheck;
mod hosts;
mod images;
mod init;
mod inspect;
mod man;
mod printable;
mod serve;
mod signals;
mod source;
mod spp;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::ExitCode;

use anyhow::anyhow;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::printable::{printable, say};
use self::signals::Signals;
use crate::logging;

/// Fold Normalizer-Free image classifiers into plain convolutions, and serve them.
#[derive(Debug, Parser)]
#[command(name = "nfold", version, propagate_version = true, after_help = examples::PROGRAM)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fold a timm checkpoint into a plain ONNX graph and put it into a model repository
    #[command(after_help = examples::FOLD)]
    Fold(fold::FoldArgs),
    /// Classify image files with a folded model, without a server
    #[command(after_help = examples::CLASSIFY)]
    Classify(classify::ClassifyArgs),
    /// Measure the accuracy of a folded model on images whose classes are known
    #[command(after_help = examples::EVAL)]
    Eval(eval::EvalArgs),
    /// Serve a model repository, or checkpoints, over HTTP and gRPC
    #[command(after_help = examples::SERVE)]
    Serve(Box<serve::ServeArgs>),
    /// Exit 0 when a server is ready; for containers without a shell
    #[command(after_help = examples::HEALTHCHECK)]
    Healthcheck(healthcheck::HealthcheckArgs),
    /// Describe a folded model or a checkpoint
    #[command(after_help = examples::INSPECT)]
    Inspect(inspect::InspectArgs),
    /// Measure latency against BN-folded networks
    Bench(bench::BenchArgs),
    /// Write a newly initialised checkpoint in timm's layout
    #[command(after_help = examples::init())]
    Init(init::InitArgs),
    /// γ of an activation: closed form, quadrature, simulation and timm's constant
    #[command(after_help = examples::GAMMA)]
    Gamma(gamma::GammaArgs),
    /// Show the scale of hidden activations, block by block: signal propagation plots
    #[command(after_help = examples::SPP)]
    Spp(spp::SppArgs),
    /// Print a shell's completion script
    #[command(after_help = examples::COMPLETIONS)]
    Completions(completions::CompletionsArgs),
    /// Write manual pages
    #[command(after_help = examples::MAN)]
    Man(man::ManArgs),
    /// Print the configuration reference as Markdown
    #[command(hide = true)]
    Docs,
}

/// Parses the command line, runs the command and maps its result to an exit code: 0 success, 1 failure, 2 wrong usage,
/// 128 plus the signal's number if a signal ended it.
pub fn main() -> ExitCode {
    let signals = Signals::catch();
    let cli = match parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let serving = matches!(cli.command, Command::Serve(_));
    let watched = signals.and_then(|signals| signals.act(serving));
    let outcome = match watched {
        Err(e) => Err(anyhow!("can't listen for signals: {e}")),
        Ok(()) => match catch_unwind(AssertUnwindSafe(|| run(cli.command))) {
            Ok(outcome) => outcome,
            // threads may still be inside ONNX Runtime, whose exit handlers would free memory that they use
            Err(_) if serving => signals::end(1),
            Err(panic) => resume_unwind(panic),
        },
    };
    // the last write may fail too, for example on a full disk
    let outcome = outcome.and_then(|code| Ok(io::stdout().flush().map(|()| code)?));
    let code = match outcome {
        Ok(code) => code,
        // the reader closed the pipe, as `head` does
        Err(e) if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            logging::last_line(&printable(&format!("error: {e}")));
            ExitCode::FAILURE
        }
    };
    if serving {
        // threads of the server may still run inside an engine
        signals::end(if code == ExitCode::SUCCESS { 0 } else { 1 });
    }
    code
}

/// The arguments, with values from the environment. On help, version or an error, prints it and returns the exit code.
fn parse() -> Result<Cli, ExitCode> {
    for (name, meant) in environment::misspelt(&Cli::command()) {
        say(format_args!("warning: no flag reads the variable {name}; {meant} is meant?"));
    }
    let program = environment::without_empty(Cli::command());
    let parsed = program.clone().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|error| {
        tell(&error, &program);
        let typed: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        if let Some(mistaken) = environment::mistaken(&error, &program, &typed) {
            say(format_args!("note: {mistaken}"));
        }
        if let Some(blame) = environment::blame(&error, &program, &typed) {
            say(format_args!("note: {blame}"));
        }
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
    })
}

/// Prints clap's message, which repeats the arguments. If these hold control characters, the arguments are parsed again
/// as [`printable()`] text, which fails in the same way.
fn tell(error: &clap::Error, program: &clap::Command) {
    let words: Vec<OsString> = std::env::args_os().collect();
    let shown: Vec<OsString> = words.iter().map(|word| printable::os(word).into()).collect();
    let is_plain = shown == words && !environment::has_control_characters();
    if is_plain || !error.use_stderr() {
        // a closed pipe is no failure
        let _ = error.print();
        return;
    }
    let again = program.clone().try_get_matches_from(shown).and_then(|matches| Cli::from_arg_matches(&matches)).err();
    // without clap's colours; a variable's value may still hold control characters
    let text = again.filter(|again| again.kind() == error.kind()).as_ref().unwrap_or(error).render().to_string();
    for line in text.lines() {
        say(format_args!("{line}"));
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Fold(args) => fold::run(&args),
        Command::Classify(args) => classify::run(&args),
        Command::Eval(args) => eval::run(&args),
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
