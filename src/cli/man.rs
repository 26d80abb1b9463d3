//! `nfold man`: manual pages, generated from the command line's definition.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::anyhow;
use clap::{Args, Command};
use clap_mangen::Man;

use super::printable::say;
use crate::files;

/// Arguments of `nfold man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder for the pages, such as /usr/local/share/man/man1
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Writes `nfold.1` and one page per command, such as `nfold-serve.1`.
pub fn run(args: &ManArgs, program: Command) -> anyhow::Result<ExitCode> {
    let failed = |e| anyhow!("can't write manual pages to {}: {e}; choose another folder", args.folder.display());
    fs::create_dir_all(&args.folder).map_err(failed)?;
    let mut program = program.disable_help_subcommand(true);
    program.build();
    let count = write(&program, &args.folder).map_err(failed)?;
    say(format_args!("wrote {count} manual pages to {}", args.folder.display()));
    Ok(ExitCode::SUCCESS)
}

/// Writes the pages of a command and of its subcommands; returns their number.
fn write(command: &Command, folder: &Path) -> std::io::Result<usize> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let mut text = Vec::new();
    Man::new(command.clone()).render(&mut text)?;
    files::write(&folder.join(format!("{name}.1")), &text)?;
    let mut count = 1;
    for subcommand in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        count += write(subcommand, folder)?;
    }
    Ok(count)
}
