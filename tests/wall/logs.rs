//! Readers of the log that leave, sleep or never start: the server still serves, counts dropped lines, and ends as
//! asked.

use std::fs::File;
use std::io::{Read as _, pipe};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::metric;
use crate::cli::with_demo;
use crate::fakes::eventually;
use crate::process::{ask, data};

/// A server whose stderr a test chooses.
pub struct Logging {
    pub child: Child,
    pub http: SocketAddr,
    pub admin: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Logging {
    fn start(stderr: impl Into<Stdio>) -> Self {
        let folder = with_demo();
        let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
        Self::spawn(&mut command, stderr.into(), folder)
    }

    pub fn spawn(command: &mut Command, stderr: Stdio, folder: tempfile::TempDir) -> Self {
        let free = || TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let free = [free(), free(), free()].map(|listener| listener.local_addr().unwrap());
        let [http, grpc, admin] = free.map(|address| address.to_string());
        command.args(["serve", "--http", &http, "--grpc", &grpc, "--admin", &admin, "--log-format", "json"]);
        let child = command.current_dir(folder.path()).stderr(stderr).spawn().unwrap();
        let server = Self { child, http: free[0], admin: free[2], _folder: folder };
        eventually("ready", || ask(server.admin, "GET", "/readyz", &[], b"").is_ok_and(|a| a.status == 200));
        server
    }

    /// Causes log lines of some 400 bytes, more than any pipe holds.
    fn fill(&self) {
        for _ in 0..400 {
            let path = format!("/v2/models/{}", "x".repeat(300));
            assert_eq!(ask(self.http, "GET", &path, &[], b"").unwrap().status, 404);
        }
    }

    pub fn classify(&self) -> u16 {
        ask(self.http, "POST", "/v1/classify", &[], &data("cat.jpg")).unwrap().status
    }

    fn dropped(&self) -> u64 {
        metric(self.admin, "nfold_dropped_log_lines_total")
    }

    /// Stops the server; returns its exit status and how long that took.
    fn stop(mut self) -> (ExitStatus, Duration) {
        let asked = Instant::now();
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
        eventually("ended", || self.child.try_wait().unwrap().is_some());
        (self.child.wait().unwrap(), asked.elapsed())
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Longest time to stop with nothing in flight, on a busy machine.
const STOP: Duration = Duration::from_secs(5);

pub fn stops(server: Logging) {
    let (status, took) = server.stop();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    assert!(took < STOP, "{took:?}");
}

#[test]
fn a_pipe_that_nobody_reads_stops_nothing() {
    let (mut reader, writer) = pipe().unwrap();
    let server = Logging::start(writer);
    server.fill();
    assert_eq!(server.classify(), 200);
    // wide more lines than wait for a reader
    let mut stream = crate::process::connect(server.http).unwrap();
    let path = format!("/v2/models/{}", "x".repeat(300));
    for _ in 0..9000 {
        let answer = crate::process::exchange(&mut stream, "GET", &path, &[], b"").unwrap();
        assert_eq!(answer.status, 404);
    }
    assert!(server.dropped() > 0);
    assert_eq!(server.classify(), 200);
    stops(server);
    // what was written is whole lines but for the last, which was under way when the process ended
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    let (whole, _) = log.rsplit_once('\n').unwrap();
    for line in whole.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    }
}

#[test]
fn a_reader_that_leaves_takes_nothing_with_it() {
    let (reader, writer) = pipe().unwrap();
    let server = Logging::start(writer);
    drop(reader);
    server.fill();
    assert_eq!(server.classify(), 200);
    eventually("lines that could not be written are counted", || server.dropped() >= 400);
    stops(server);
}

#[test]
fn a_full_disk_or_no_stderr_at_all_stops_nothing() {
    let server = Logging::start(File::options().write(true).open("/dev/full").unwrap());
    server.fill();
    assert_eq!(server.classify(), 200);
    assert!(server.dropped() > 0);
    stops(server);

    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" <&- >&- 2>&-", env!("CARGO_BIN_EXE_nfold")]);
    let server = Logging::spawn(&mut command, Stdio::null(), with_demo());
    server.fill();
    assert_eq!(server.classify(), 200);
    stops(server);
}

/// A live reader gets every line, including the last ones.
#[test]
fn the_last_lines_are_written_before_the_end() {
    let (mut reader, writer) = pipe().unwrap();
    let server = Logging::start(writer);
    let log = std::thread::spawn(move || {
        let mut log = String::new();
        reader.read_to_string(&mut log).map(|_| log)
    });
    server.fill();
    assert_eq!(server.dropped(), 0);
    stops(server);
    let log = log.join().unwrap().unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("model_not_found")).count(), 400);
    let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(last["message"], "stopped");
}

/// A failed start reports its error and exits, even if nobody reads it.
#[test]
fn a_failed_start_ends_without_a_reader() {
    let fail = |stderr: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nfold"));
        let any = "127.0.0.1:0";
        command.args(["serve", "--repository", "/nowhere", "--http", any, "--grpc", any, "--admin", any]);
        command.stderr(stderr).spawn().unwrap()
    };
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut unread = fail(writer.into());
    eventually("ended", || unread.try_wait().unwrap().is_some());
    assert_eq!(unread.wait().unwrap().code(), Some(1));
    let told = fail(Stdio::piped()).wait_with_output().unwrap();
    assert_eq!(told.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&told.stderr).lines().last().unwrap().starts_with("error: "), "{told:?}");
}
