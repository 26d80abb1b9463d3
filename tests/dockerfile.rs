//! Checks the Dockerfile against rules: those of hadolint that apply, and what the manifests rely on.
//! `deploy/check-dockerfile` runs it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

struct Instruction {
    keyword: String,
    arguments: String,
}

struct Stage {
    name: String,
    base: String,
    instructions: Vec<Instruction>,
}

struct Dockerfile {
    defaults: BTreeMap<String, String>,
    stages: Vec<Stage>,
}

fn project(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string()
}

fn read() -> Dockerfile {
    let text = fs::read_to_string(project("Dockerfile")).unwrap();
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim_start().starts_with('#')).collect();
    let mut file = Dockerfile { defaults: BTreeMap::new(), stages: vec![] };
    for line in lines.join("\n").replace("\\\n", " ").lines().filter(|l| !l.trim().is_empty()) {
        let (keyword, arguments) = line.trim().split_once(' ').unwrap();
        let instruction = Instruction { keyword: keyword.into(), arguments: arguments.trim().into() };
        match (keyword, file.stages.last_mut()) {
            ("FROM", _) => {
                let (base, name) = arguments.split_once(" AS ").expect("every stage has a name");
                file.stages.push(Stage { name: name.trim().into(), base: base.trim().into(), instructions: vec![] });
            }
            ("ARG", None) => {
                let (name, value) = arguments.split_once('=').expect("a global ARG has a default");
                file.defaults.insert(name.into(), value.into());
            }
            (_, Some(stage)) => stage.instructions.push(instruction),
            (_, None) => panic!("{keyword} before the first FROM"),
        }
    }
    file
}

impl Dockerfile {
    fn all(&self) -> impl Iterator<Item = (&Stage, &Instruction)> {
        self.stages.iter().flat_map(|s| s.instructions.iter().map(move |i| (s, i)))
    }

    fn last(&self, keyword: &str) -> &str {
        let found: Vec<_> = self.stages.last().unwrap().instructions.iter().filter(|i| i.keyword == keyword).collect();
        assert_eq!(found.len(), 1, "one {keyword} in the last stage");
        &found[0].arguments
    }
}

#[test]
fn base_images_and_stages_are_sound() {
    let file = read();
    let mut seen: Vec<&str> = vec![];
    for stage in &file.stages {
        assert!(!seen.contains(&stage.name.as_str()), "stage {} twice", stage.name);
        if let Some(argument) = stage.base.strip_prefix("${").and_then(|b| b.strip_suffix('}')) {
            let image = &file.defaults[argument];
            let (registry, _) = image.split_once('/').unwrap();
            let tag = image.rsplit_once(':').map(|(_, tag)| tag);
            assert!(registry.contains('.'), "{image} names no registry");
            assert!(tag.is_some_and(|t| t != "latest" && !t.contains('/')), "{image} has no tag");
        } else {
            let base = stage.base.replace("${VARIANT}", &file.defaults["VARIANT"]);
            assert!(seen.contains(&base.as_str()), "{base} is no earlier stage");
        }
        seen.push(&stage.name);
    }
    for variant in ["cpu", "cuda"] {
        assert!(seen.contains(&format!("runtime-{variant}").as_str()), "{variant}");
    }
}

#[test]
fn instructions_keep_the_rules() {
    let file = read();
    for (stage, Instruction { keyword, arguments }) in file.all() {
        let step = format!("stage {}: {keyword} {arguments}", stage.name);
        match keyword.as_str() {
            "RUN" => {
                for word in ["sudo ", "curl ", "wget ", "apt-get upgrade", "latest", "cd "] {
                    assert!(!arguments.contains(word), "{step}");
                }
                assert!(!arguments.contains("| ") || arguments.contains("pipefail"), "{step}: a pipe hides failures");
                assert!(!arguments.contains("cargo ") || arguments.contains("--locked"), "{step}");
                assert!(
                    !arguments.contains("apt-get install") || arguments.contains("--no-install-recommends"),
                    "{step}"
                );
                assert!(!stage.name.starts_with("runtime") && stage.name != "nfold", "{step}: there is no shell");
            }
            "COPY" => {
                let words: Vec<&str> = arguments.split_whitespace().collect();
                match words[0].strip_prefix("--from=") {
                    Some(from) => {
                        assert!(file.stages.iter().any(|s| s.name == from && s.name != stage.name), "{step}")
                    }
                    None => words[..words.len() - 1].iter().for_each(|w| in_context(w)),
                }
            }
            "WORKDIR" => assert!(arguments.starts_with('/'), "{step}"),
            "ENV" | "ARG" => {
                for secret in ["PASSWORD", "TOKEN", "SECRET", "KEY"] {
                    assert!(!arguments.to_uppercase().contains(secret), "{step}");
                }
            }
            "ENTRYPOINT" | "CMD" => assert!(arguments.starts_with("[\""), "{step}: needs a shell"),
            "EXPOSE" => arguments.split(' ').for_each(|p| assert!(p.parse::<u16>().is_ok(), "{step}")),
            "LABEL" | "USER" | "HEALTHCHECK" | "STOPSIGNAL" => {}
            _ => panic!("{step}: an instruction that this project does not use"),
        }
    }
}

/// Asserts that a file exists and .dockerignore does not exclude it.
fn in_context(path: &str) {
    assert!(Path::new(&project(path)).exists(), "COPY {path}: no such file");
    let ignore = fs::read_to_string(project(".dockerignore")).unwrap();
    let allowed = ignore.lines().filter_map(|l| l.strip_prefix('!'));
    let allowed = allowed.map(|a| a.trim_end_matches('*')).any(|a| path == a || path.starts_with(a));
    assert!(ignore.lines().any(|l| l == "*") && allowed, "COPY {path}: .dockerignore keeps it out");
}

#[test]
fn the_image_is_what_the_manifests_rely_on() {
    let file = read();
    assert_eq!(file.last("USER"), "65532:65532", "by number, so that Kubernetes can tell it is not root");
    assert_eq!(file.last("STOPSIGNAL"), "SIGTERM");
    assert_eq!(file.last("EXPOSE"), "8000 8001 8002");
    assert_eq!(file.last("ENTRYPOINT"), r#"["/usr/bin/nfold"]"#);
    assert_eq!(file.last("CMD"), r#"["serve"]"#);
    assert!(file.last("HEALTHCHECK").ends_with(r#"CMD ["/usr/bin/nfold", "healthcheck"]"#));
    let program = "COPY --from=build /build/target/release/nfold /usr/bin/nfold";
    assert!(file.all().any(|(s, i)| s.name == "nfold" && format!("{} {}", i.keyword, i.arguments) == program));
    for label in ["title", "description", "licenses", "version", "revision"] {
        assert!(file.last("LABEL").contains(&format!("org.opencontainers.image.{label}=")), "{label}");
    }
    let version = concat!("ARG VERSION=", env!("CARGO_PKG_VERSION"));
    assert!(file.all().any(|(s, i)| s.name == "nfold" && format!("{} {}", i.keyword, i.arguments) == version));
    let parts = "COPY --from=build /build/sbom.cdx.json /usr/share/doc/nfold/sbom.cdx.json";
    assert!(file.all().any(|(s, i)| s.name == "nfold" && format!("{} {}", i.keyword, i.arguments) == parts));
    // a layer of its own per variant, and below the program
    for variant in ["cpu", "cuda"] {
        let stage = file.stages.iter().find(|s| s.name == format!("runtime-{variant}")).unwrap();
        assert!(stage.instructions.len() == 1 && stage.instructions[0].arguments.contains("/usr/lib/onnxruntime"));
    }
    assert!(file.last("ENV").contains("ORT_DYLIB_PATH=/usr/lib/onnxruntime/libonnxruntime.so"));
    assert!(file.last("ENV").contains("NFOLD_REPOSITORY=/models"));
    assert!(file.last("ENV").contains("MALLOC_MMAP_THRESHOLD_=16777216"));
}
