//! Environment variables `NFOLD_…`: empty and misspelt ones, and which one an error comes from.
//!
//! A variable that is set but empty counts as not set: compose files (`${X:-}`) and Helm charts (`value: ""`) produce
//! such. So does what Kubernetes sets for a Service called `nfold` (`NFOLD_PORT=tcp://…`).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command};

use super::classify::search;
use super::printable;

/// The command, ignoring every variable that counts as not set.
pub fn without_empty(command: Command) -> Command {
    command.mut_args(set_or_not).mut_subcommands(without_empty)
}

fn set_or_not(argument: Arg) -> Arg {
    let value = argument.get_env().and_then(std::env::var_os);
    match value {
        Some(value) if is_unset(&value) => argument.env(None::<&'static str>),
        _ => argument,
    }
}

fn is_unset(value: &OsStr) -> bool {
    value.is_empty() || ["tcp://", "udp://", "sctp://"].iter().any(|link| value.to_string_lossy().starts_with(link))
}

/// Variables that are set but that no command reads, with the name that was probably meant. Names unlike any of nfold's
/// are ignored.
pub fn misspelt(program: &Command) -> Vec<(String, String)> {
    let mut known = BTreeSet::new();
    let mut left = vec![program];
    while let Some(command) = left.pop() {
        left.extend(command.get_subcommands());
        known.extend(command.get_arguments().filter_map(|argument| argument.get_env()?.to_str().map(String::from)));
    }
    let set = std::env::vars_os().filter(|(_, value)| !is_unset(value)).filter_map(|(name, _)| name.into_string().ok());
    let unknown = set.filter(|name| name.starts_with("NFOLD_") && !known.contains(name));
    let meant = |name: String| {
        let likeness = |other: &String| strsim::normalized_damerau_levenshtein(&name, other);
        let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?.clone();
        (likeness(&nearest) > 0.85).then_some((name, nearest))
    };
    unknown.filter_map(meant).collect()
}

/// Whether any variable's value is not [`printable`] text.
pub fn has_control_characters() -> bool {
    std::env::vars_os().any(|(name, value)| {
        name.as_encoded_bytes().starts_with(b"NFOLD_") && OsStr::new(&printable::os(&value)) != value
    })
}

/// A line that names the variables a clap error comes from; `None` if all values were typed.
pub fn blame(error: &clap::Error, program: &Command, typed: &[String]) -> Option<String> {
    let named: Vec<String> = match error.get(ContextKind::InvalidArg)? {
        ContextValue::String(argument) => vec![argument.clone()],
        ContextValue::Strings(arguments) => arguments.clone(),
        _ => Vec::new(),
    };
    let command = command_of(program, typed);
    let set = |argument: &&Arg| argument.get_env().and_then(std::env::var_os).is_some_and(|value| !is_unset(&value));
    let variable = |argument: &Arg| argument.get_env().map(|name| name.to_string_lossy().into_owned());
    let from_environment = |argument: &&Arg| set(argument) && !is_typed(argument, typed);
    let blamed = |argument: &&Arg| {
        let long = argument.get_long().map(|long| format!("--{long}"));
        long.is_some_and(|long| named.iter().any(|named| named.split([' ', '=']).next() == Some(long.as_str())))
    };
    let arguments = || command.get_arguments().filter(from_environment);
    let names: Vec<String> = arguments().filter(blamed).filter_map(variable).collect();
    if !names.is_empty() {
        return Some(format!("the value comes from the environment: {}", names.join(", ")));
    }
    let names: Vec<String> = arguments().filter_map(variable).collect();
    if names.is_empty() { None } else { Some(format!("set in the environment: {}", names.join(", "))) }
}

/// A line about the value of a flag that takes a file or folder, where an argument without a flag is missing, and the value looks
/// like that: an image where images are missing, a file that a flag for folders has taken.
pub fn mistaken(error: &clap::Error, program: &Command, typed: &[String]) -> Option<String> {
    if error.kind() != ErrorKind::MissingRequiredArgument {
        return None;
    }
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else { return None };
    let missing = missing.iter().find(|name| name.starts_with('<'))?;
    let command = command_of(program, typed);
    let flag = |word: &str| {
        let is_it = |argument: &&Arg| match (word.strip_prefix("--"), word.strip_prefix('-')) {
            (Some(long), _) => argument.get_long() == Some(long),
            (None, Some(short)) => argument.get_short().is_some_and(|letter| short == letter.to_string()),
            (None, None) => false,
        };
        command.get_arguments().find(is_it).filter(|argument| argument.get_action().takes_values())
    };
    let taken = |pair: &'_ [String]| -> Option<(String, String, String)> {
        let (argument, value) = (flag(&pair[0])?, &pair[1]);
        let (long, name) = (argument.get_long()?, argument.get_value_names()?.first()?);
        let takes = |kind| name.split('|').any(|word| word == kind);
        let is_image = missing.starts_with("<IMAGE>") && search::is_image(Path::new(value));
        let is_meant = match (takes("DIR"), takes("FILE")) {
            (true, _) => is_image || Path::new(value).is_file(),
            (false, true) => is_image,
            (false, false) => false,
        };
        if is_meant { Some((long.into(), name.to_string(), value.clone())) } else { None }
    };
    let (long, name, value) = typed.windows(2).find_map(taken)?;
    Some(format!("`{value}` is read as the {name} of --{long}; if {missing} is meant, name the {name} before it"))
}

/// The subcommand on the command line.
fn command_of<'a>(program: &'a Command, typed: &[String]) -> &'a Command {
    let mut command = program;
    for word in typed.iter().skip(1) {
        match command.find_subcommand(word) {
            Some(found) => command = found,
            None => break,
        }
    }
    command
}

fn is_typed(argument: &Arg, typed: &[String]) -> bool {
    let long = argument.get_long().map(|long| format!("--{long}")).unwrap_or_default();
    let short = argument.get_short().map(|short| format!("-{short}")).unwrap_or_else(|| "\0".into());
    typed.iter().skip(1).any(|word| {
        let is_long = word.strip_prefix(&long).is_some_and(|rest| rest.is_empty() || rest.starts_with('='));
        is_long || (word.starts_with(&short) && !word.starts_with("--"))
    })
}
