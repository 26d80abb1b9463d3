//! `nfold completions`: a shell's completion script, generated from the command line's definition.

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Args, Command};
use clap_complete::Shell;

/// Arguments of `nfold completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell that will read the script
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script on stdout.
pub fn run(args: &CompletionsArgs, mut program: Command) -> anyhow::Result<ExitCode> {
    // generated in memory first: the generator panics if stdout is closed
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut program, "nfold", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
