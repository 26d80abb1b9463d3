//! A model hub on loopback: its routes, headers and error codes, content on another host than the hub's own, and the
//! faults that a test asks for, in order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use sha2::Digest as _;

/// A fault of the next request of a kind.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The connection ends after this many bytes of content.
    Cut(usize),
    /// The content stops after this many bytes, and the connection stays open.
    Stall(usize),
    /// The whole file, whatever range was requested.
    NoRange,
    /// Other content of the same length.
    Changed,
    /// More bytes than announced.
    Longer,
    /// A web page.
    Page,
    /// A status, with further headers.
    Status(u16, &'static str),
}

/// A received request, and which of the two hosts received it.
#[derive(Debug, Clone)]
pub struct Request {
    pub at_hub: bool,
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
pub struct State {
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
    /// Token needed for reading, if any.
    pub gated: Option<String>,
    /// Headers that replace the right ones in the response to HEAD.
    pub lies: BTreeMap<(String, &'static str), String>,
    /// Faults of the hub's next responses, by file.
    pub at_hub: BTreeMap<String, VecDeque<Fault>>,
    /// Faults of the next content responses, by file.
    pub contents: BTreeMap<String, VecDeque<Fault>>,
    /// Whether connections end at once.
    pub down: bool,
    pub requests: Vec<Request>,
}

/// The hub; its only model is `timm/demo`.
pub struct Hub {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

pub const REPOSITORY: &str = "timm/demo";

impl Hub {
    pub fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        // content is on another host
        let elsewhere = TcpListener::bind("127.0.0.2:0").unwrap();
        let (address, content) = (hub.local_addr().unwrap(), elsewhere.local_addr().unwrap());
        let state = Arc::<Mutex<State>>::default();
        for (listener, at_hub) in [(hub, true), (elsewhere, false)] {
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = state.clone();
                    thread::spawn(move || {
                        let _ = answer(stream, &state, at_hub, content);
                    });
                }
            });
        }
        let hub = Self { address, state };
        hub.publish('a', files);
        hub
    }

    /// Publishes a commit of these files on `main`, whose id repeats one letter.
    pub fn publish(&self, commit: char, files: &[(&str, Vec<u8>)]) {
        let mut state = self.state();
        state.commit = commit.to_string().repeat(40);
        state.files = files.iter().map(|(name, bytes)| (name.to_string(), bytes.clone())).collect();
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn fails(&self, file: &str, faults: impl IntoIterator<Item = Fault>) {
        self.state().contents.insert(file.into(), faults.into_iter().collect());
    }

    pub fn refuses(&self, file: &str, faults: impl IntoIterator<Item = Fault>) {
        self.state().at_hub.insert(file.into(), faults.into_iter().collect());
    }

    pub fn lies(&self, file: &str, header: &'static str, value: &str) {
        self.state().lies.insert((file.into(), header), value.into());
    }

    /// Returns the received requests, and forgets them.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }
}

/// Whether a file is in LFS: large files and weights are, as on the hub.
fn in_lfs(name: &str) -> bool {
    [".safetensors", ".bin"].iter().any(|end| name.ends_with(end))
}

pub fn etag(name: &str, bytes: &[u8]) -> String {
    let hex = |digest: &[u8]| digest.iter().map(|b| format!("{b:02x}")).collect::<String>();
    if in_lfs(name) {
        return hex(&sha2::Sha256::digest(bytes));
    }
    let mut git = sha1::Sha1::new();
    git.update(format!("blob {}\0", bytes.len()));
    git.update(bytes);
    hex(&git.finalize())
}

fn answer(stream: TcpStream, state: &Mutex<State>, at_hub: bool, content: SocketAddr) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let mut first = String::new();
        if lines.read_line(&mut first).ok()? == 0 {
            return None;
        }
        let mut words = first.split_whitespace();
        let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            lines.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
        }
        let request = Request { at_hub, method, path, headers };
        let mut state = state.lock().ok()?;
        if state.down {
            return None;
        }
        state.requests.push(request.clone());
        let reply = if at_hub { at_the_hub(&mut state, &request, content) } else { elsewhere(&mut state, &request) };
        drop(state);
        let body = if request.method == "HEAD" { &[] } else { reply.body.as_slice() };
        let length = reply.length.unwrap_or(reply.body.len());
        let head = format!("HTTP/1.1 {} X\r\ncontent-length: {length}\r\n{}\r\n", reply.status, reply.headers);
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(body).ok()?;
        if reply.stalls {
            thread::sleep(Duration::from_secs(20));
        }
        if request.method != "HEAD" && length != body.len() {
            return None;
        }
    }
}

#[derive(Default)]
struct Reply {
    status: u16,
    headers: String,
    body: Vec<u8>,
    /// Announced length, if not the real one.
    length: Option<usize>,
    stalls: bool,
}

fn refusal(status: u16, code: &str) -> Reply {
    Reply { status, headers: format!("X-Error-Code: {code}\r\nX-Error-Message: no\r\n"), ..Reply::default() }
}

fn page() -> Reply {
    Reply {
        status: 200,
        headers: "content-type: text/html\r\n".into(),
        body: b"<html>log in".to_vec(),
        ..Reply::default()
    }
}

fn at_the_hub(state: &mut State, request: &Request, content: SocketAddr) -> Reply {
    let short = request.path.strip_prefix("/api/resolve-cache/models/");
    let (repository, revision, file) = match short {
        Some(rest) => {
            let parts: Vec<&str> = rest.splitn(4, '/').collect();
            (parts[..2].join("/"), parts[2].to_string(), parts[3].to_string())
        }
        None => {
            let Some((repository, rest)) = request.path.trim_start_matches('/').split_once("/resolve/") else {
                return refusal(404, "");
            };
            let (revision, file) = rest.split_once('/').unwrap();
            (repository.to_string(), revision.replace("%2F", "/"), file.to_string())
        }
    };
    match state.at_hub.get_mut(&file).and_then(VecDeque::pop_front) {
        Some(Fault::Status(status, headers)) => return Reply { status, headers: headers.into(), ..Reply::default() },
        Some(Fault::Page) => return page(),
        _ => {}
    }
    let token = request.headers.get("authorization");
    if repository != REPOSITORY {
        return refusal(401, "RepoNotFound");
    }
    if let Some(gate) = &state.gated
        && token != Some(&format!("Bearer {gate}"))
    {
        return refusal(if token.is_some() { 403 } else { 401 }, "GatedRepo");
    }
    let branches: BTreeSet<&str> = ["main", "refs/pr/1", state.commit.as_str()].into();
    if !branches.contains(revision.as_str()) {
        return refusal(404, "RevisionNotFound");
    }
    let Some(bytes) = state.files.get(&file).cloned() else { return refusal(404, "EntryNotFound") };
    let commit = state.commit.clone();
    let header = |name: &'static str, right: String| {
        let said = state.lies.get(&(file.clone(), name)).cloned().unwrap_or(right);
        if said.is_empty() { said } else { format!("{name}: {said}\r\n") }
    };
    let tag = format!("\"{}\"", etag(&file, &bytes));
    let common = header("X-Repo-Commit", commit.clone());
    if in_lfs(&file) {
        let headers = common
            + &header("X-Linked-Etag", tag)
            + &header("X-Linked-Size", bytes.len().to_string())
            + &header("Location", format!("http://{content}/{file}?signature=secret"));
        return Reply { status: 302, headers, ..Reply::default() };
    }
    if short.is_none() {
        let headers = common + &format!("Location: /api/resolve-cache/models/{repository}/{commit}/{file}\r\n");
        return Reply { status: 307, headers, ..Reply::default() };
    }
    let headers = common + &header("ETag", tag);
    faulty(state, request, &file, bytes, headers, None)
}

fn elsewhere(state: &mut State, request: &Request) -> Reply {
    let file = request.path.trim_start_matches('/').split('?').next().unwrap_or_default().to_string();
    let Some(bytes) = state.files.get(&file).cloned() else { return refusal(404, "NoSuchKey") };
    let range = request.headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    faulty(state, request, &file, bytes, "ETag: \"something-else\"\r\n".into(), range)
}

/// Content from `from` on, with a fault if one is due.
fn faulty(
    state: &mut State,
    request: &Request,
    file: &str,
    bytes: Vec<u8>,
    headers: String,
    from: Option<usize>,
) -> Reply {
    let faults = state.contents.get_mut(file).filter(|_| request.method == "GET");
    let fault = faults.and_then(VecDeque::pop_front);
    let from = from.filter(|_| !matches!(fault, Some(Fault::NoRange)));
    let whole = bytes.len();
    let mut reply = match from {
        Some(from) if from >= whole => return Reply { status: 416, ..Reply::default() },
        Some(from) => {
            let headers = headers + &format!("Content-Range: bytes {from}-{}/{whole}\r\n", whole - 1);
            Reply { status: 206, headers, body: bytes[from..].to_vec(), ..Reply::default() }
        }
        None => Reply { status: 200, headers, body: bytes, ..Reply::default() },
    };
    match fault {
        Some(Fault::Cut(count) | Fault::Stall(count)) => {
            reply.length = Some(reply.body.len());
            reply.body.truncate(count);
            reply.stalls = matches!(fault, Some(Fault::Stall(_)));
        }
        Some(Fault::Changed) => reply.body.iter_mut().for_each(|b| *b ^= 1),
        Some(Fault::Longer) => reply.body.extend([0; 100]),
        Some(Fault::Page) => return page(),
        Some(Fault::Status(status, headers)) => return Reply { status, headers: headers.into(), ..Reply::default() },
        Some(Fault::NoRange) | None => {}
    }
    reply
}
