//! The command line as documented: help, addresses, the start of a server, special files, misspelt variables.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::cli::{nfold, project, refused, text, with_demo};

/// Runs the program, and fails if it does not end soon.
fn at_once(args: &[&str], folder: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
    command.args(args).current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("nfold {args:?} waits");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn help_of_serve_is_in_groups() {
    let help = text(&nfold(&["serve", "--help"], &std::env::temp_dir()).stdout);
    let groups = ["Models:", "Addresses:", "Engines:", "Queue:", "Limits:", "Security:", "Logs:", "Examples:"];
    let found: Vec<_> = help.lines().filter(|line| groups.contains(line)).collect();
    assert_eq!(found, groups);
    // none but the two that every command has is left over
    let options = help.split("Models:").next().unwrap().split("Options:").nth(1).unwrap();
    assert_eq!(options.matches("--").count(), 2, "{options}");
}

/// The log reports the steps of the start, and ends with a URL; SIGHUP is answered by a line.
#[cfg(unix)]
#[test]
fn the_start_is_told() {
    let folder = with_demo();
    // beyond loopback, and a port that --port picks in place of the address's
    let ports = ["--http", ":1", "--port", "0", "--grpc", "localhost:0", "--admin", "127.0.0.1:0"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_nfold"))
        .arg("serve")
        .args(ports)
        .current_dir(folder.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut until = |what: &str| -> String {
        lines.find(|line| line.contains(what)).unwrap_or_else(|| panic!("the log never says `{what}`"))
    };
    until("warming model nf_regnet_cifar10 version 1");
    until("model nf_regnet_cifar10 version 1 is warm");
    let line = until("try it in a browser: http://localhost:");
    let port: u16 = line.rsplit("http://localhost:").next().unwrap().trim_end_matches(['/', '"']).parse().unwrap();
    assert!(port > 1 && std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "{line}");
    let signal = |name: &str| Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(signal("-HUP").success());
    until("SIGHUP: looking at certificates, API keys and models again");
    assert!(signal("-TERM").success());
    until("stopped");
    assert!(child.wait().unwrap().success());
}

/// Pipes, sockets and devices are named, and not waited for, wherever a file is expected.
#[cfg(unix)]
#[test]
fn what_is_no_file_is_named_at_once() {
    let folder = with_demo();
    let here = folder.path();
    let images = here.join("images");
    fs::create_dir(&images).unwrap();
    for pipe in ["pipe", "images/pipe.jpg"] {
        assert!(Command::new("mkfifo").arg(here.join(pipe)).status().unwrap().success());
    }
    let _socket = std::os::unix::net::UnixListener::bind(images.join("socket.png")).unwrap();
    std::os::unix::fs::symlink("loop", images.join("loop.jpg")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", images.join("zero.jpg")).unwrap();
    std::os::unix::fs::symlink(".", images.join("again")).unwrap();
    for (args, what) in [
        (&["fold", "pipe"][..], "pipe"),
        (&["fold", "repository/nf_regnet_cifar10", "--labels", "pipe"], "repository"),
        (&["inspect", "pipe"], "pipe"),
        (&["spp", "pipe"], "pipe"),
        (&["bench", "engine", "--onnx", "pipe"], "`pipe`: it is not a regular file"),
        (&["bench", "engine", "--onnx", "/dev/zero"], "`/dev/zero`: it is not a regular file"),
        (&["bench", "load", "--image", "pipe"], "`pipe`: it is not a regular file"),
        (&["bench", "load", "--image", "/dev/zero"], "`/dev/zero`: it is not a regular file"),
        (&["serve", "--api-key-file", "pipe"], "`pipe`: it is not a regular file"),
        (&["serve", "--api-key-file", "/dev/zero"], "`/dev/zero`: it is not a regular file"),
        (&["serve", "--tls-cert", "pipe", "--tls-key", "pipe"], "--tls-cert"),
        (&["classify", "images/socket.png"], "socket.png"),
        (&["classify", "/dev/zero"], "/dev/zero"),
        (&["classify", "/dev/null"], "/dev/null"),
        (&["inspect", "repository/nf_regnet_cifar10/7"], "there is nothing at `repository/nf_regnet_cifar10/7`"),
    ] {
        refused(&at_once(args, here), what);
    }
    // what can't be read of a folder is named, and the rest is taken
    for args in [&["bench", "load", "--image", "images"][..], &["spp", "nf_regnet_cifar10", "--images", "images"]] {
        let output = at_once(args, here);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for name in ["pipe.jpg", "socket.png", "loop.jpg", "zero.jpg"] {
            assert!(said.contains(&format!("warning: `images/{name}` is left out: ")), "{name}: {said}");
        }
        assert!(said.contains("1 link to a folder (again)"), "{said}");
        let last = said.lines().last().unwrap();
        assert!(last.starts_with("error: ") && last.contains("no image file"), "{last}");
    }
    fs::copy(project("tests/data/cat.jpg"), images.join("cat.jpg")).unwrap();
    let output = at_once(&["spp", "nf_regnet_cifar10", "--images", "images", "--count", "1"], here);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = at_once(&["bench", "load", "--image", "images", "--server", "127.0.0.1:1"], here);
    assert!(text(&output.stderr).lines().last().unwrap().contains("127.0.0.1:1"), "{}", text(&output.stderr));
}

/// If an output can't be written, the error says what the user named.
#[test]
fn what_cannot_be_written_is_named() {
    let folder = with_demo();
    let here = folder.path();
    fs::write(here.join("file"), "").unwrap();
    let cat = project("tests/data/cat.jpg");
    for output in ["nowhere/a.csv", "file/a.csv", "."] {
        let done = nfold(&["classify", &cat, "--output", output], here);
        refused(&done, &format!("can't write `{output}`"));
        assert!(!text(&done.stderr).contains("draft"), "{}", text(&done.stderr));
    }
}

/// Commands that work for minutes refuse a report that can't be written before they begin: what would be refused next is not.
#[test]
fn what_cannot_be_written_is_named_before_the_work() {
    let folder = with_demo();
    let here = folder.path();
    fs::write(here.join("file"), "").unwrap();
    for (args, what) in [
        (&["bench", "engine", "nowhere", "--report", "file"][..], "can't write `file`"),
        (&["bench", "engine", "nowhere", "--report", "file/report"], "can't write `file/report`"),
        (&["bench", "load", "--image", "nowhere", "--report", "file"], "can't write `file`"),
        (&["eval", "nowhere", "--report", "file"], "can't make `file`"),
        (&["eval", "nowhere", "--report", "file/a/b"], "can't make `file/a/b`"),
        (&["spp", "nowhere", "--csv", "nowhere/a.csv"], "can't write `nowhere/a.csv`"),
        (&["spp", "nowhere", "--svg", "file/a.svg"], "can't write `file/a.svg`"),
    ] {
        refused(&at_once(args, here), what);
    }
    // and a folder that could be made is not made for nothing
    refused(&nfold(&["eval", "nowhere", "--report", "a/b"], here), "can't read `nowhere`");
    let mut left: Vec<_> = fs::read_dir(here).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "repository"]);
}

/// A file where a folder is meant, and the reverse, before anything listens or is computed.
#[test]
fn the_server_refuses_what_is_no_repository_before_its_ports_listen() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    fs::write(here.join("text.txt"), "text").unwrap();
    fs::create_dir(here.join("empty")).unwrap();
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let weights = project("models/nf_regnet_cifar10/model.safetensors");
    for (args, what) in [
        (&["--repository", "nowhere"][..], "model repository `nowhere` does not exist"),
        (&["--repository", "text.txt"], "`text.txt` is no folder: a model repository is one"),
        (&["text.txt"], "`text.txt` is neither a file of torch.save nor safetensors"),
        (&["nowhere"], "`nowhere` is not here"),
        (&["nowhere.pth"], "`nowhere.pth` is not here"),
        (&["empty"], "empty/model.safetensors"),
        (&[&weights, "text.txt"], "`text.txt` is neither"),
        (&[&weights, "--arch", "nf_regnet_b7"], "the nearest that are: nf_regnet_b0"),
    ] {
        // one line: no port was opened
        refused(&at_once(&[&["serve"], args, &ports[..]].concat(), here), what);
        refused(&at_once(&[&["serve", "--check"], args].concat(), here), what);
    }
    // what may be skipped is told while the others load
    let output = at_once(&[&["serve", "--skip-broken-models", "text.txt"], &ports[..]].concat(), here);
    let said = text(&output.stderr);
    assert!(said.contains("skipped, it can't be served: `text.txt` is neither"), "{said}");
    assert!(said.ends_with("error: none of 1 models can be served; the log says why of each\n"), "{said}");
}

/// A flag that took the argument it was written before is named.
#[test]
fn an_argument_that_a_flag_took_is_named() {
    let folder = with_demo();
    let here = folder.path();
    fs::write(here.join("test.csv"), "a.jpg,cat\n").unwrap();
    fs::write(here.join("a.safetensors"), "").unwrap();
    for (args, what) in [
        (
            &["classify", "--explain", "cat.jpg"][..],
            "`cat.jpg` is read as the DIR of --explain; if <IMAGE>... is meant",
        ),
        (
            &["classify", "--features", "cat.jpg", "--json"],
            "`cat.jpg` is read as the FILE of --features; if <IMAGE>...",
        ),
        // not the flag that is last
        (
            &["classify", "--explain", "cat.jpg", "--top-k", "3"],
            "`cat.jpg` is read as the DIR of --explain; if <IMAGE>...",
        ),
        (
            &["classify", "--repository", "repository", "--features", "cat.jpg", "--model", "m"],
            "`cat.jpg` is read as the FILE of --features; if <IMAGE>...",
        ),
        (
            &["eval", "--report", "test.csv"],
            "`test.csv` is read as the DIR of --report; if <DATA> is meant, name the DIR",
        ),
        (
            &["fold", "--calibrate", "a.safetensors"],
            "`a.safetensors` is read as the DIR|theory of --calibrate; if <CHECKPOINT> is meant",
        ),
    ] {
        let output = nfold(args, here);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(&format!("note: {what}")), "{args:?}: {said}");
    }
    // nothing was taken
    for args in [
        &["classify"][..],
        &["classify", "--json"],
        &["classify", "--explain=heat"],
        &["classify", "-k", "3"],
        &["classify", "--repository", "repository"],
        &["classify", "--model", "nf_regnet_cifar10"],
        &["classify", "--output", "test.csv", "--explain", "heat"],
        &["eval", "--report", "page"],
        &["fold", "--labels", "test.csv", "--name", "cat.jpg"],
        &["init", "resnet18"],
    ] {
        let output = nfold(args, here);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(2) && !said.contains("is read as"), "{args:?}: {said}");
    }
    fs::write(here.join("cat.jpg"), "").unwrap();
    let file = nfold(&["classify", "--explain", "cat.jpg", "cat.jpg"], here);
    refused(&file, "`cat.jpg` is a file; --explain takes the folder that pictures are written into");
    refused(
        &nfold(&["classify", "--explain", "heat", "cat.jpg"], here),
        "--explain: `nf_regnet_cifar10` was folded without",
    );
    let bench = nfold(&["bench", "engine", "--rounds", "1", "./cat.jpg"], here);
    let said = text(&bench.stderr);
    assert!(bench.status.code() == Some(1) && said.contains("error: `./cat.jpg` is a file; name the folder"), "{said}");
    refused(&nfold(&["spp", "cat.jpg"], here), "`cat.jpg` is a file");
    // a model of the repository is meant, whatever else is called so
    fs::write(here.join("nf_regnet_cifar10"), "").unwrap();
    let spp = nfold(&["spp", "nf_regnet_cifar10", "--count", "2"], here);
    assert!(spp.status.success(), "{}", text(&spp.stderr));
    let bench = nfold(&["bench", "engine", "--rounds", "1", "nf_regnet_cifar10"], here);
    assert!(!text(&bench.stderr).contains("is a file"), "{}", text(&bench.stderr));
}

/// A misspelt `NFOLD_` variable is reported; variables of other programs are not.
#[test]
fn misspelt_variables_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let said = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
        text(
            &command
                .args(["gamma", "relu", "--samples", "1000"])
                .env(name, "x")
                .current_dir(folder.path())
                .output()
                .unwrap()
                .stderr,
        )
    };
    for (wrong, right) in [("NFOLD_REPOSITRY", "NFOLD_REPOSITORY"), ("NFOLD_MODELS", "NFOLD_MODEL")] {
        let said = said(wrong);
        assert!(said.contains(&format!("variable {wrong}; {right} is meant")), "{said}");
    }
    // of Kubernetes, for a Service called nfold, and of another program
    for theirs in
        ["NFOLD_SERVICE_HOST", "NFOLD_SERVICE_PORT_HTTP", "NFOLD_PORT_8000_TCP_ADDR", "NFOLD_THEME", "NFOLDING"]
    {
        assert!(said(theirs).is_empty(), "{theirs}: {}", said(theirs));
    }
}

/// Non-UTF-8 names in the command that a report repeats.
#[cfg(target_os = "linux")]
#[test]
fn reports_take_names_that_are_no_text() {
    use std::os::unix::ffi::OsStrExt as _;
    let folder = with_demo();
    let report = std::ffi::OsStr::from_bytes(b"r\xe9port");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
    command.args([
        "bench",
        "engine",
        "nf_regnet_cifar10",
        "--rounds",
        "1",
        "--turn",
        "0s",
        "--warmup",
        "0s",
        "--warmup-runs",
        "1",
    ]);
    let output = command.arg("--report").arg(report).current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(folder.path().join(report).join("index.html").is_file());
}

/// What users mistake for a checkpoint, a file of names or an image's bytes is named for what it is.
#[test]
fn what_is_mistaken_for_something_else_is_named() {
    let folder = with_demo();
    let here = folder.path();
    let onnx = "repository/nf_regnet_cifar10/1/model.onnx";
    for (args, what) in [
        (
            &["serve", "repository", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"][..],
            "nfold serve --repository repository",
        ),
        (
            &[
                "serve",
                "repository/nf_regnet_cifar10",
                "--http",
                "127.0.0.1:0",
                "--grpc",
                "127.0.0.1:0",
                "--admin",
                "127.0.0.1:0",
            ],
            "nfold serve --repository repository",
        ),
        (&["fold", "repository"], "holds folded models"),
        (&["fold", onnx, "--arch", "nf_regnet_b0"], "an ONNX graph"),
        (&["fold", &project("tests/data/cat.jpg"), "--arch", "nf_regnet_b0"], "nfold classify` takes images"),
        (&["fold", &project("models/nf_regnet_cifar10"), "--labels", "cat,dog"], "--labels takes a file of names"),
        (
            &["classify", &project("tests/data/cat.jpg"), "--repository", "empty"],
            "holds no model; fold a checkpoint into it",
        ),
    ] {
        std::fs::create_dir_all(here.join("empty")).unwrap();
        let output = nfold(args, here);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(what), "{args:?}: {said}");
    }
}
