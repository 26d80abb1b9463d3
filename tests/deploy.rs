//! deploy/ names only what exists: flags and variables of the command line, ports, probe paths, metrics, their labels
//! and the values of these. `deploy/check-manifests` holds the same files to the Kubernetes schemas.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use nfold::metrics::{Metrics, Outcome, Phase, Protocol, RunResult};

use crate::cli::nfold;
use crate::process::{Server, ask};

/// Labels that Prometheus adds, and the bound of a histogram's bucket.
const SCRAPED: [&str; 4] = ["instance", "namespace", "pod", "le"];

/// Every text file of deploy/, by its path there.
fn texts() -> BTreeMap<String, String> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, files) } else { files.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.retain(|f| f.extension().is_some_and(|e| ["yaml", "json", "env"].iter().any(|known| e == *known)));
    let name = |f: &PathBuf| f.strip_prefix(&root).unwrap().display().to_string();
    files.iter().map(|f| (name(f), fs::read_to_string(f).unwrap())).collect()
}

/// Words that begin with `prefix`, followed by characters for which `in_word` holds.
fn words(text: &str, prefix: &str, in_word: impl Fn(char) -> bool) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        let before = text[..at].chars().next_back();
        if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '-') {
            let rest = &text[at + prefix.len()..];
            let end = rest.find(|c| !in_word(c)).unwrap_or(rest.len());
            found.insert(format!("{prefix}{}", &rest[..end]));
        }
    }
    found
}

fn is_name(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'
}

struct Help {
    flags: BTreeSet<String>,
    variables: BTreeSet<String>,
    text: String,
}

fn help(command: &str) -> Help {
    let folder = tempfile::tempdir().unwrap();
    let output = nfold(&[command, "--help"], folder.path());
    assert!(output.status.success(), "{command}");
    let text = String::from_utf8(output.stdout).unwrap();
    let flags = words(&text, "--", |c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    let variables = words(&text, "NFOLD_", |c| c.is_ascii_uppercase() || c == '_');
    Help { flags, variables, text }
}

#[test]
fn flags_variables_and_ports_exist() {
    let (serve, classify) = (help("serve"), help("classify"));
    let mut checked = 0;
    for (file, text) in texts() {
        let lines = text.lines().filter(|l| !l.trim_start().starts_with('#') && *l != "---");
        let text: String = lines.map(|l| format!("{l}\n")).collect();
        let command = if file.starts_with("jobs/") { &classify } else { &serve };
        if file.ends_with(".yaml") && !file.starts_with("prometheus/") {
            for flag in words(&text, "--", |c| c.is_ascii_lowercase() || c == '-') {
                assert!(command.flags.contains(&flag), "{file}: {flag}");
                checked += 1;
            }
        }
        for variable in words(&text, "NFOLD_", |c| c.is_ascii_uppercase() || c == '_') {
            let known = command.variables.contains(&variable);
            assert!(known, "{file}: {variable}");
            checked += 1;
        }
        for (at, key) in text.match_indices("containerPort: ") {
            let digits: String = text[at + key.len()..].chars().take_while(char::is_ascii_digit).collect();
            // a default, or the port of an address in the same file, or in the runtime that the file is for
            let by_default = serve.text.contains(&format!("0.0.0.0:{digits}]"));
            let addressed =
                [&text, &texts()["kserve/runtime.yaml"]].iter().any(|t| t.contains(&format!("[::]:{digits}")));
            assert!(by_default || addressed, "{file}: nothing listens on {digits}");
            checked += 1;
        }
    }
    assert!(checked > 30, "{checked}");
}

#[test]
fn probe_paths_exist_on_the_admin_port() {
    let server = Server::start(&[]);
    let mut checked = 0;
    for (file, text) in texts().into_iter().filter(|(file, _)| file.ends_with(".yaml")) {
        for start in ["{ path: ", " path: ", "prometheus.kserve.io/path: "] {
            for (at, _) in text.match_indices(start) {
                let rest = &text[at + start.len()..];
                let path = &rest[..rest.find([',', '\n', ' ']).unwrap()];
                // a field of a resource, in a patch or in kustomize's own files
                if path.trim_start_matches(['"', '/']).starts_with("spec/") {
                    continue;
                }
                let answer = ask(server.admin, "GET", path, &[], &[]).unwrap();
                assert_eq!(answer.status, 200, "{file}: {path}");
                checked += 1;
            }
        }
    }
    assert!(checked >= 8, "{checked}");
}

/// Every metric: name, whether it is a histogram, labels.
fn declared() -> BTreeMap<String, (bool, BTreeSet<String>)> {
    let declarations = Metrics::DECLARATIONS.iter().map(|metric| {
        let labels = metric.labels.iter().map(|l| l.to_string()).collect();
        (format!("nfold_{}", metric.name), (metric.buckets.is_some(), labels))
    });
    declarations.collect()
}

#[test]
fn metrics_and_labels_exist() {
    let declared = declared();
    let server = Server::start(&[]);
    let process = ask(server.admin, "GET", "/metrics", &[], &[]).unwrap().body;
    let values: BTreeMap<&str, Vec<&str>> = BTreeMap::from([
        ("outcome", Outcome::ALL.map(Outcome::name).to_vec()),
        ("protocol", Protocol::ALL.map(Protocol::name).to_vec()),
        ("phase", Phase::ALL.map(Phase::name).to_vec()),
        ("result", RunResult::ALL.map(RunResult::name).to_vec()),
    ]);
    let (mut used, mut expressions) = (BTreeSet::new(), 0);
    for (file, text) in texts() {
        // a JSON string's quotes are escaped
        let text = text.replace("\\\"", "\"");
        for name in words(&text, "process_", is_name) {
            assert!(process.contains(&format!("\n{name} ")), "{file}: {name}");
        }
        for name in words(&text, "nfold_", is_name) {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
            let known = match base.and_then(|b| declared.get(b)) {
                Some((true, labels)) => labels,
                _ => match declared.get(&name) {
                    Some((false, labels)) => labels,
                    other => panic!("{file}: {name} is {other:?}: no metric, or a histogram without its suffix"),
                },
            };
            used.insert(base.unwrap_or(&name).to_string());
            for (at, _) in text.match_indices(&format!("{name}{{")) {
                let inside = &text[at + name.len() + 1..];
                let inside = &inside[..inside.find('}').unwrap()];
                for matcher in inside.split(',').filter(|m| !m.is_empty()) {
                    let (label, value) = matcher.split_once('=').unwrap();
                    let label = label.trim_end_matches('!');
                    assert!(known.contains(label) || SCRAPED.contains(&label), "{file}: {name} has no label `{label}`");
                    let value = value.trim_start_matches('~').trim_matches('"');
                    for value in value.split('|').filter(|_| values.contains_key(label)) {
                        assert!(values[label].contains(&value), "{file}: {label} is never `{value}`");
                    }
                    expressions += 1;
                }
            }
        }
        for (at, key) in text.match_indices(" by (") {
            let inside = &text[at + key.len()..];
            let inside = &inside[..inside.find(')').unwrap()];
            // what is summed: the next metric
            let metric = words(&inside_next(&text[at..]), "nfold_", is_name);
            for label in inside.split(", ") {
                let known = metric.iter().any(|m| labels_of(&declared, m).contains(label));
                assert!(
                    known || SCRAPED.contains(&label) || label.starts_with("<<"),
                    "{file}: by ({inside}) of {metric:?}"
                );
            }
        }
    }
    let unused: Vec<_> = declared.keys().filter(|name| !used.contains(*name)).collect();
    assert!(unused.len() <= 6, "metrics that no dashboard, rule or scaler looks at: {unused:?}");
    assert!(expressions > 30, "{expressions}");
}

/// The text up to and with the first metric.
fn inside_next(text: &str) -> String {
    let at = text.find("nfold_").unwrap_or(0);
    let end = text[at..].find(|c| !is_name(c)).map_or(text.len(), |e| at + e);
    text[..end].into()
}

fn labels_of(declared: &BTreeMap<String, (bool, BTreeSet<String>)>, name: &str) -> BTreeSet<String> {
    let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
    declared.get(name).or_else(|| declared.get(base)).map(|(_, labels)| labels.clone()).unwrap_or_default()
}

/// The Prometheus Operator's object holds the rules that have the tests.
#[test]
fn the_rules_are_the_same_for_the_operator() {
    let texts = texts();
    let rules = &texts["prometheus/rules.yaml"];
    let rules = &rules[rules.find("groups:").unwrap()..];
    let object = &texts["kubernetes/components/prometheus-operator/prometheusrule.yaml"];
    let spec = object.split_once("\nspec:\n").unwrap().1;
    let spec: String = spec.lines().map(|l| format!("{}\n", l.strip_prefix("  ").unwrap_or(l))).collect();
    assert!(spec == *rules, "rules.yaml and prometheusrule.yaml differ: indent `groups:` of the former by two");
}
