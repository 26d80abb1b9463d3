//! What the program says about itself: the configuration reference, shell completions, manual pages.

use std::collections::BTreeSet;
use std::fs;

use nfold::metrics::Metrics;

use crate::cli::{nfold, project, text};

/// Commands as a user types them, from the reference's headings.
fn commands() -> Vec<String> {
    let reference = fs::read_to_string(project("docs/configuration.md")).unwrap();
    let commands: Vec<_> = reference.lines().filter_map(|l| l.strip_prefix("## nfold ")).map(String::from).collect();
    assert!(commands.len() >= 12 && commands.contains(&"bench load".into()), "{commands:?}");
    commands
}

#[test]
fn the_reference_is_fresh() {
    let made = nfold(&["docs"], &std::env::temp_dir());
    assert!(made.status.success(), "{}", text(&made.stderr));
    let kept = fs::read_to_string(project("docs/configuration.md")).unwrap();
    for (kept, made) in kept.lines().zip(text(&made.stdout).lines()) {
        assert_eq!(kept, made, "docs/configuration.md is stale: make docs");
    }
    assert!(kept == text(&made.stdout), "docs/configuration.md is stale: make docs");
}

/// Flags and variables are those of `--help`, command by command.
#[test]
fn the_reference_is_complete() {
    let reference = fs::read_to_string(project("docs/configuration.md")).unwrap();
    let mut flags = 0;
    for section in reference.split("\n## nfold ").skip(1) {
        let command: Vec<_> = section.lines().next().unwrap().split(' ').chain(["--help"]).collect();
        let help = text(&nfold(&command, &std::env::temp_dir()).stdout);
        let named = |text: &str, start: &str| -> BTreeSet<String> {
            let ends = |c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-';
            let words = text.split(ends).filter(|w| w.starts_with(start) && w.len() > start.len());
            words.filter(|w| !["--help", "--version"].contains(w)).map(String::from).collect()
        };
        // a line of its own for each flag, whatever else the help speaks of
        let lines = |l: &&str| l.starts_with('-');
        let own = help.lines().map(str::trim_start).filter(lines).filter_map(|l| l.split("  ").next());
        let listed = named(&own.collect::<Vec<_>>().join("\n"), "--");
        let rows = |l: &&str| l.starts_with("| `--");
        let cells: Vec<_> = section.lines().filter(rows).map(|l| l.split('|').nth(1).unwrap()).collect();
        assert_eq!(named(&cells.join("\n"), "--"), listed, "{command:?}");
        assert_eq!(named(section, "NFOLD_"), named(&help, "NFOLD_"), "{command:?}");
        flags += listed.len();
    }
    assert!(flags > 80, "{flags}");
}

#[test]
fn completions_name_every_command_and_flag() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let made = nfold(&["completions", shell], &std::env::temp_dir());
        assert!(made.status.success(), "{}", text(&made.stderr));
        let script = text(&made.stdout);
        for command in commands() {
            for word in command.split(' ') {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
        assert!(["queue-limit", "top-k", "slo"].iter().all(|flag| script.contains(flag)), "{shell}");
    }
    let unknown = nfold(&["completions", "basic"], &std::env::temp_dir());
    assert_eq!(unknown.status.code(), Some(2), "{}", text(&unknown.stderr));
}

/// Bash, if installed, can run its completion script.
#[test]
fn bash_completes_commands_and_flags() {
    let made = nfold(&["completions", "bash"], &std::env::temp_dir());
    let ask = "\nCOMP_WORDS=(nfold serve --queue); COMP_CWORD=2; _nfold nfold --queue serve; echo \"${COMPREPLY[@]}\"\
               \nCOMP_WORDS=(nfold cl); COMP_CWORD=1; _nfold nfold cl nfold; echo \"${COMPREPLY[@]}\"\n";
    let script = text(&made.stdout) + ask;
    match std::process::Command::new("bash").args(["-c", &script]).output() {
        Ok(said) => assert_eq!(text(&said.stdout), "--queue-limit\nclassify\n", "{}", text(&said.stderr)),
        Err(_) => crate::cli::skip("no bash here"),
    }
}

#[test]
fn manual_pages_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("share/man1");
    let made = nfold(&["man", &pages.display().to_string()], folder.path());
    assert!(made.status.success(), "{}", text(&made.stderr));
    let read = |name: &str| fs::read_to_string(pages.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    for command in commands() {
        let page = read(&format!("nfold-{}.1", command.replace(' ', "-")));
        assert!(page.contains(".SH SYNOPSIS") && page.contains(".SH DESCRIPTION"), "{page}");
    }
    assert!(read("nfold-serve.1").contains("NFOLD_QUEUE_LIMIT"));
    assert!(read("nfold.1").contains("nfold\\-classify(1)"), "the first page leads to the others");
    let left = fs::read_dir(&pages).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let strange: Vec<_> = left.filter(|n| !n.starts_with("nfold") || !n.ends_with(".1")).collect();
    assert!(strange.is_empty(), "{strange:?}");
    // no folder can be made below a file
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let refused = nfold(&["man", &file.join("x").display().to_string()], folder.path());
    crate::cli::refused(&refused, "can't write manual pages");
}

/// The documents: README.md, CHANGELOG.md and docs/*.md by name.
fn documents() -> Vec<(String, String)> {
    let mut names: Vec<String> = vec!["README.md".into(), "CHANGELOG.md".into()];
    for entry in fs::read_dir(project("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        names.extend(name.ends_with(".md").then(|| format!("docs/{name}")));
    }
    assert!(names.len() >= 11, "{names:?}");
    names.sort();
    names.into_iter().map(|name| (name.clone(), fs::read_to_string(project(&name)).unwrap())).collect()
}

/// Anchors of headings, as GitHub and GitLab generate them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|l| l.starts_with('#')).map(|l| l.trim_start_matches('#').trim());
    let plain = |c: char| c.is_alphanumeric() || c == ' ' || c == '-' || c == '_';
    headings.map(|h| h.to_lowercase().chars().filter(|c| plain(*c)).collect::<String>().replace(' ', "-")).collect()
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut followed = 0;
    for (name, text) in documents() {
        let folder = name.rsplit_once('/').map_or(".", |(folder, _)| folder);
        for (at, _) in text.match_indices("](") {
            let rest = &text[at + 2..];
            let link = &rest[..rest.find(')').unwrap()];
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { project(&name) } else { project(&format!("{folder}/{file}")) };
            assert!(fs::exists(&target).unwrap(), "{name}: {link}");
            let known = anchor.is_empty() || anchors(&fs::read_to_string(&target).unwrap()).contains(anchor);
            assert!(known, "{name}: {link}: no such heading");
            followed += 1;
        }
    }
    assert!(followed > 40, "{followed}");
}

/// Documents name only flags and variables of the reference, and metrics of the code.
#[test]
fn documents_name_what_exists() {
    let reference = fs::read_to_string(project("docs/configuration.md")).unwrap();
    let mut checked = 0;
    for (name, text) in documents().into_iter().filter(|(name, _)| name != "docs/configuration.md") {
        let word = |from: usize| -> &str {
            let ends = |c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-';
            text[from..].split(ends).next().unwrap()
        };
        // nfold's flags stand alone in backticks: those of other programs follow their names
        for (at, _) in text.match_indices("`--") {
            let flag = word(at + 1);
            let other = ["--features", "--locked", "--build-arg"].contains(&flag);
            // a changelog also names removed flags
            let known = other || name == "CHANGELOG.md" || reference.contains(&format!("`{flag}"));
            assert!(known, "{name}: {flag}");
            checked += 1;
        }
        for (at, _) in text.match_indices("NFOLD_") {
            let variable = word(at);
            assert!(variable == "NFOLD_" || reference.contains(&format!("`{variable}`")), "{name}: {variable}");
            checked += 1;
        }
        for (at, _) in text.match_indices("`nfold_") {
            let metric = word(at + "`nfold_".len());
            assert!(Metrics::DECLARATIONS.iter().any(|m| m.name == metric), "{name}: {metric}");
            checked += 1;
        }
    }
    assert!(checked > 60, "{checked}");
}
