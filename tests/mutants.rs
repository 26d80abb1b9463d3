//! The faults that `make mutation` and `make mutants` put into the code still have their places in it: both take too long for
//! every change, and a fault without a place is found only when somebody runs them.

use std::fs;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

#[test]
fn every_fault_of_one_expression_has_its_place() {
    let list = read("tests/mutation/mutants.txt");
    let faults = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut count = 0;
    for fault in faults {
        let fields: Vec<String> = fault.split(" | ").map(|field| field.trim().replace("\\|", "|")).collect();
        let [file, there, instead] = &fields[..] else { panic!("not FILE | EXPRESSION | REPLACEMENT: {fault}") };
        assert_ne!(there, instead, "{fault}");
        let code = read(file);
        let code = code.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        assert_eq!(code.matches(there.as_str()).count(), 1, "{file}: `{there}`");
        count += 1;
    }
    assert!(count > 50, "{count} faults");
}

#[test]
fn every_patch_of_the_simulation_applies() {
    let mut hunks = 0;
    for entry in fs::read_dir(root().join("tests/simulation/mutants")).expect("the folder of patches") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "patch") {
            continue;
        }
        let patch = fs::read_to_string(&path).expect("a patch");
        let (mut code, mut before) = (String::new(), String::new());
        let applies = |code: &str, before: &mut String| {
            let before = std::mem::take(before);
            assert!(code.contains(&before), "{} does not apply at:\n{before}", path.display());
            usize::from(!before.is_empty())
        };
        for line in patch.lines() {
            if let Some(file) = line.strip_prefix("--- a/") {
                hunks += applies(&code, &mut before);
                code = read(file);
            } else if line.starts_with("@@") {
                hunks += applies(&code, &mut before);
            } else if let Some(kept) = line.strip_prefix([' ', '-']) {
                before += kept;
                before.push('\n');
            }
        }
        hunks += applies(&code, &mut before);
    }
    assert!(hunks > 10, "{hunks} hunks");
}
