//! The structure of src/: imports only point down, and some names are confined to one module. docs/architecture.md
//! states these as invariants.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules, each with the modules that it may import.
const ROOMS: [(&str, &[&str]); 27] = [
    ("main", &["cli"]),
    (
        "cli",
        &[
            "bench",
            "eval",
            "files",
            "fold",
            "hub",
            "server",
            "sources",
            "spp",
            "infer",
            "engine",
            "pixels",
            "chart",
            "checkpoint",
            "nets",
            "model",
            "metrics",
            "logging",
            "printable",
        ],
    ),
    ("fold", &["checkpoint", "graph", "nets", "model", "printable"]),
    ("bench", &["infer", "engine", "chart", "files", "model", "pb"]),
    ("server", &["infer", "pixels", "model", "metrics", "pb", "panics", "printable"]),
    ("eval", &["model"]),
    ("spp", &["engine", "graph", "nets", "model", "pb", "chart"]),
    ("infer", &["engine", "pixels", "model", "metrics", "panics"]),
    ("int8", &["graph", "kernels", "model", "pb"]),
    ("engine", &["int8", "kernels", "relayout", "graph", "model", "files", "printable"]),
    ("relayout", &["graph", "kernels", "nets", "model", "pb"]),
    ("kernels", &[]),
    ("pixels", &["model"]),
    (
        "sources",
        &["infer", "engine", "eval", "int8", "printable", "fold", "hub", "checkpoint", "files", "metrics", "model"],
    ),
    ("hub", &["checkpoint", "files", "model", "printable"]),
    ("checkpoint", &["files", "nets", "model", "printable"]),
    ("graph", &["nets", "model", "pb"]),
    ("nets", &[]),
    ("model", &["files", "printable"]),
    ("files", &[]),
    ("metrics", &["logging"]),
    ("logging", &[]),
    ("chart", &[]),
    ("panics", &[]),
    ("pb", &[]),
    ("printable", &[]),
    ("lib", &[]),
];

/// Words, and the only files (or folders) that may use them.
const CONFINED: [(&str, &[&str]); 20] = [
    ("ort::", &["engine.rs", "engine/", "kernels/operators.rs", "kernels/operators/"]),
    ("safetensors::", &["checkpoint/"]),
    ("ureq::", &["hub/client.rs"]),
    ("rustls_native_certs::", &["hub/client.rs"]),
    ("prometheus::", &["metrics.rs", "metrics/"]),
    ("\"nfold_", &["metrics.rs"]),
    ("axum::", &["server/"]),
    ("tonic::", &["server/", "bench/load/grpc.rs"]),
    ("image::codecs", &["pixels/"]),
    ("libjpeg_turbo_rs::", &["pixels/"]),
    ("png::", &["pixels/"]),
    ("gif::", &["pixels/"]),
    ("fax::", &["pixels/"]),
    ("weezl::", &["pixels/"]),
    ("fearless_simd::", &["pixels/", "bench/peak.rs"]),
    ("arch::x86_64", &["pixels/", "kernels/"]),
    ("hyper::client", &["bench/load/client.rs"]),
    // the one statement that switches telemetry off before a library loads
    ("unsafe {", &["main.rs", "kernels/"]),
    ("StatusCode::BAD_REQUEST", &["server/status.rs"]),
    ("StatusCode::INTERNAL_SERVER_ERROR", &["server/status.rs"]),
];

/// Words that a module never uses.
const FORBIDDEN: [(&str, &[&str]); 23] = [
    ("fold/", &["tokio", "axum", "tonic", "ort::"]),
    ("infer/", &["axum", "tonic", "http::", "crate::pb"]),
    ("engine", &["axum", "tonic", "tokio", "http::", "crate::pb"]),
    ("checkpoint/", &["tokio", "axum", "tonic", "ort::"]),
    ("spp/", &["tokio", "axum", "ort::"]),
    ("model", &["tokio", "axum", "ort::"]),
    ("hub/", &["tokio", "axum", "ort::"]),
    ("sources/", &["tokio", "axum", "tonic", "ort::"]),
    ("pixels/", &["tokio", "axum", "ort::", "crate::infer", "crate::metrics"]),
    // the server prints nothing outside the log: a closed or blocked stdout would end it
    ("server/", &["println!", "eprintln!"]),
    ("infer/", &["println!", "eprintln!"]),
    ("engine", &["println!", "eprintln!"]),
    ("pixels/", &["println!", "eprintln!"]),
    // scheduling gets time and waiting from `infer::system`, so that a simulation can replace them
    ("infer/admission.rs", UNSIMULATED),
    ("infer/estimate.rs", UNSIMULATED),
    ("infer/line.rs", UNSIMULATED),
    ("infer/pending.rs", UNSIMULATED),
    ("infer/queue.rs", UNSIMULATED),
    ("infer/shared.rs", UNSIMULATED),
    ("infer/lane.rs", UNSIMULATED),
    ("infer/worker.rs", UNSIMULATED),
    ("infer/scheduler.rs", UNSIMULATED),
    ("infer/registry.rs", UNSIMULATED),
];

const UNSIMULATED: &[&str] = &["Instant::now", ".elapsed()", "Condvar", "mpsc", "thread::sleep", "thread::spawn"];

/// Every source file by its path under `src/`, comments and test modules removed.
fn sources() -> BTreeMap<String, String> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, files) } else { files.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let code = |text: String| {
        let before_tests = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_string();
        let lines = before_tests.lines().filter(|l| !l.trim_start().starts_with("//"));
        lines.collect::<Vec<_>>().join("\n")
    };
    files.retain(|f| f.extension().is_some_and(|e| e == "rs"));
    let name = |f: &Path| f.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
    files.iter().map(|f| (name(f), code(fs::read_to_string(f).unwrap()))).collect()
}

/// Whether `word` occurs in `code` as a word: `report::` is not `ort::`.
fn says(code: &str, word: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| !word.starts_with(joins) || !code[..at].ends_with(joins))
}

fn room(file: &str) -> &str {
    file.split('/').next().unwrap_or(file).trim_end_matches(".rs")
}

#[test]
fn imports_point_down() {
    for (file, code) in sources() {
        let own = room(&file);
        let (_, allowed) = ROOMS.iter().find(|(name, _)| *name == own).unwrap_or_else(|| panic!("`{file}` is no room"));
        let mut names: Vec<&str> = code.split("crate::").skip(1).collect();
        names.extend(code.split("nfold::").skip(1));
        for rest in names {
            let other = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
            let is_room = ROOMS.iter().any(|(name, _)| *name == other);
            assert!(
                !is_room || other == own || allowed.contains(&other),
                "src/{file} imports `{other}`; `{own}` may import only {allowed:?}"
            );
        }
    }
}

/// Every path that a file names by `use` or in its code, such as `super::queue::Slots`. Groups are taken apart.
fn paths(code: &str) -> Vec<String> {
    fn expand(before: &str, tree: &str, found: &mut Vec<String>) {
        let Some((head, rest)) = tree.split_once('{') else {
            let path = tree.split(" as ").next().unwrap_or_default().trim();
            found.push(format!("{before}{path}"));
            return;
        };
        let (before, mut depth, mut item) = (format!("{before}{}", head.trim()), 0, String::new());
        for c in rest.trim_end().strip_suffix('}').unwrap_or(rest).chars() {
            match c {
                ',' if depth == 0 => expand(&before, &std::mem::take(&mut item), found),
                _ => {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    item.push(c);
                }
            }
        }
        if !item.trim().is_empty() {
            expand(&before, &item, found);
        }
    }
    let mut found = Vec::new();
    for statement in code.split(';') {
        let used = statement.split_once("use ").filter(|(before, _)| {
            let line = before.rsplit('\n').next().unwrap_or_default().trim();
            line.is_empty() || line.starts_with("pub")
        });
        if let Some((_, tree)) = used {
            expand("", tree.trim(), &mut found);
        }
    }
    for root in ["crate::", "super::", "self::"] {
        let names = code.match_indices(root).map(|(at, _)| &code[at..]);
        let end = |rest: &str| rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(rest.len());
        found.extend(names.map(|rest| rest[..end(rest)].trim_end_matches(':').to_string()));
    }
    found
}

/// The file that a path in `module` refers to: the longest prefix that is one.
fn leads_to(module: &str, path: &str, modules: &BTreeMap<String, String>) -> Option<String> {
    let mut parts: Vec<&str> = path.split("::").collect();
    let mut from: Vec<&str> = module.split("::").collect();
    match parts[0] {
        "crate" => {
            from.clear();
            parts.remove(0);
        }
        "self" | "super" => {
            while matches!(parts.first(), Some(&("self" | "super"))) {
                if parts.remove(0) == "super" {
                    from.pop();
                }
            }
        }
        child if !modules.contains_key(&format!("{module}::{child}")) => return None,
        _ => {}
    }
    let target = |count: usize| [&from, &parts[..count]].concat().join("::");
    (0..=parts.len()).rev().map(target).find(|name| modules.contains_key(name))
}

/// A file may use what its parent defines, and a parent its children: apart from that, no files import each other,
/// directly or indirectly.
#[test]
fn no_imports_go_round_in_circles() {
    let name = |file: &str| file.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
    let modules: BTreeMap<String, String> = sources().into_iter().map(|(file, code)| (name(&file), code)).collect();
    let imports = |(module, code): (&String, &String)| {
        let targets = paths(code).into_iter().filter_map(|path| leads_to(module, &path, &modules));
        let others = targets.filter(|t| t != module && !module.starts_with(&format!("{t}::")));
        (module.clone(), others.collect::<std::collections::BTreeSet<_>>())
    };
    let mut imports: BTreeMap<_, _> = modules.iter().map(imports).collect();
    assert!(imports["server"].contains("infer::registry"), "imports are seen");
    // a file that imports none of the remaining ones is in no cycle
    loop {
        let free: Vec<String> =
            imports.iter().filter(|(_, targets)| targets.is_empty()).map(|(m, _)| m.clone()).collect();
        if free.is_empty() {
            break;
        }
        for module in free {
            imports.remove(&module);
            imports.values_mut().for_each(|targets| {
                targets.remove(&module);
            });
        }
    }
    assert!(imports.is_empty(), "these files import each other in circles, or import such files: {imports:#?}");
}

#[test]
fn names_stay_in_their_rooms() {
    for (file, code) in sources() {
        for (word, owners) in CONFINED {
            let is_owner = owners.iter().any(|p| file == *p || (p.ends_with('/') && file.starts_with(p)));
            assert!(is_owner || !says(&code, word), "src/{file} uses `{word}`, which belongs in {owners:?}");
        }
        for (room, words) in FORBIDDEN {
            for word in words.iter().filter(|_| file.starts_with(room)) {
                assert!(!says(&code, word), "src/{file} uses `{word}`, which {room} must not know");
            }
        }
    }
}

#[test]
fn no_room_is_a_junk_drawer() {
    for file in sources().keys() {
        for name in ["utils", "util", "helpers", "helper", "common", "misc"] {
            assert!(!file.split('/').any(|part| part.trim_end_matches(".rs") == name), "src/{file}");
        }
    }
}

/// Every file opens with what it owns.
#[test]
fn every_file_introduces_itself() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in sources().keys() {
        let text = fs::read_to_string(root.join(file)).unwrap();
        assert!(text.starts_with("//!"), "src/{file} does not say what it owns");
    }
}
