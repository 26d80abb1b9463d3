//! `nfold docs`: the configuration reference (docs/configuration.md), generated from the command line's definition.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use clap::{Arg, Command};

/// Prints the reference on stdout.
pub fn run(mut program: Command) -> anyhow::Result<ExitCode> {
    program.build();
    let text = reference(&program);
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn reference(program: &Command) -> String {
    let mut text = String::from(
        "# Configuration reference\n\n\
         Made by `make docs` from the program itself; a test keeps it fresh. A flag on the command line wins over its\n\
         environment variable, which wins over the default; a variable that is empty is as good as none. Durations are a number and a unit: `500ms`, `10s`, `2m`.\n\
         Switches (flags without a value) are on by variable unless it is `0`, `false`, `no`, `off`, `n` or `f`.\n",
    );
    let mut commands = vec![];
    collect(program, &mut commands);
    text.push('\n');
    for (path, command) in &commands {
        let anchor = path.replace(' ', "-");
        let _ = writeln!(text, "* [`{path}`](#{anchor}): {}", about(command));
    }
    for (path, command) in &commands {
        section(&mut text, path, command);
    }
    text
}

/// Collects every command without subcommands, with its full name.
fn collect<'a>(command: &'a Command, commands: &mut Vec<(&'a str, &'a Command)>) {
    for subcommand in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        if subcommand.has_subcommands() {
            collect(subcommand, commands);
        } else {
            commands.push((subcommand.get_bin_name().unwrap_or_default(), subcommand));
        }
    }
}

fn about(command: &Command) -> String {
    command.get_about().map(ToString::to_string).unwrap_or_default()
}

fn section(text: &mut String, path: &str, command: &Command) {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").split_whitespace().collect::<Vec<_>>().join(" ");
    let _ = write!(text, "\n## {path}\n\n{}.\n\n```\n{usage}\n```\n", about(command));
    let shown = |a: &&Arg| !a.is_hide_set() && !matches!(a.get_id().as_str(), "help" | "version");
    let (flags, words): (Vec<_>, Vec<_>) = command.get_arguments().filter(shown).partition(|a| a.get_long().is_some());
    if !words.is_empty() {
        text.push('\n');
    }
    for word in words {
        let name = word.get_value_names().and_then(|n| n.first()).map_or(word.get_id().as_str(), |n| n.as_str());
        let _ = writeln!(text, "* `{name}`: {}", help(word).0);
    }
    let mut headings: Vec<Option<&str>> = Vec::new();
    for flag in &flags {
        if !headings.contains(&flag.get_help_heading()) {
            headings.push(flag.get_help_heading());
        }
    }
    for heading in headings {
        if let Some(heading) = heading {
            let _ = writeln!(text, "\n### {heading}");
        }
        text.push_str("\n| flag | variable | default | what it sets |\n|---|---|---|---|\n");
        flags.iter().filter(|flag| flag.get_help_heading() == heading).for_each(|flag| row(text, flag));
    }
}

/// Writes a flag as a row of its table.
fn row(text: &mut String, flag: &Arg) {
    let (meaning, said) = help(flag);
    let values: Vec<_> = flag.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    let default = match (values.is_empty(), said) {
        _ if !flag.get_action().takes_values() => String::new(),
        (false, _) => format!("`{}`", values.join(",")),
        (true, Some(said)) => said,
        (true, None) if flag.is_required_set() => "required".into(),
        (true, None) => String::new(),
    };
    let value = match flag.get_value_names() {
        Some(names) if flag.get_action().takes_values() => format!(" {}", names.join(" ")),
        _ => String::new(),
    };
    let variable = flag.get_env().map(|v| format!("`{}`", v.to_string_lossy())).unwrap_or_default();
    let long = flag.get_long().unwrap_or_default();
    let row = [format!("`--{long}{value}`"), variable, default, meaning].map(|cell| cell.replace('|', "\\|"));
    let _ = writeln!(text, "| {} |", row.join(" | "));
}

/// An argument's help with its possible values, and its default if the help describes it in words.
fn help(argument: &Arg) -> (String, Option<String>) {
    let long = argument.get_long_help().or_else(|| argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let long = long.split_whitespace().collect::<Vec<_>>().join(" ");
    let (mut meaning, said) = match long.split_once(" [default: ") {
        Some((meaning, rest)) => (meaning.to_string(), Some(rest.trim_end_matches(']').to_string())),
        None => (long, None),
    };
    let choices: Vec<_> = argument
        .get_possible_values()
        .iter()
        .filter(|v| !v.is_hide_set() && argument.get_action().takes_values())
        .map(|v| match v.get_help() {
            Some(help) => format!("`{}` ({help})", v.get_name()),
            None => format!("`{}`", v.get_name()),
        })
        .collect();
    if !choices.is_empty() {
        meaning = format!("{meaning}; one of {}", choices.join(", "));
    }
    (meaning, said)
}
