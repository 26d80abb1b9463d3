//! Log output: destination and format. Knows nothing of what is logged.
//!
//! Everything goes to stderr; stdout is for machine-readable output. Bodies, images and secrets are never logged.
//!
//! No thread that logs blocks on stderr: lines go to a bounded queue, and one thread writes them, whole and in order.
//! Lines that don't fit (nobody reads the pipe) or can't be written (its reader is gone) are dropped and counted.
//! `tracing-appender` has such a queue, but at shutdown it prints to the blocked stream, and it bounds lines, not
//! bytes.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Most lines in the queue.
const LINES: usize = 8192;
/// Most bytes in the queue.
const BYTES: usize = 4 << 20;
/// Most bytes of lines written together: a pipe of Linux takes them in one piece (PIPE_BUF), not mixed with another program's.
const TOGETHER: usize = 4096;
/// How long lines are gathered after some were written, unless a warning or an error comes. A wake-up and a write for each of
/// a thousand lines a second take some per cent of a core.
const GATHERING: Duration = Duration::from_millis(10);
/// Longest that the process waits at its end for lines to be written.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object per line, with fields at the top level.
    Json,
}

/// The process's queue, once logging has started.
static QUEUE: OnceLock<Queue> = OnceLock::new();
/// Bytes of the queued lines.
static WAITING: AtomicUsize = AtomicUsize::new(0);
/// Number of lines that were dropped.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Starts logging. `filter` is a list of directives in the syntax of `RUST_LOG`, such as `info,ort=warn`; the error
/// says what is wrong with it, or that the system refused a thread. Only the first call in a process has an effect.
pub fn init(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("log filter `{filter}` is not valid: {e}"))?;
    let queue = Queue::start().map_err(|e| format!("can't start the thread that writes log lines: {e}"))?;
    let queue = QUEUE.get_or_init(|| queue);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(queue).with_target(false);
    // a second call keeps the first subscriber: harmless, and tests do it
    let _ = match format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// Number of log lines dropped since the process started.
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Writes a line to stderr after all queued lines, waiting for at most half a second. Ignores failures.
pub fn last_line(text: &str) {
    match QUEUE.get() {
        Some(queue) => queue.push(format!("{text}\n").into_bytes(), true),
        None => drop(writeln!(io::stderr(), "{text}")),
    }
    flush();
}

/// Waits until all queued lines are written, for at most half a second.
pub fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let deadline = Instant::now() + LAST_LINES;
    let (written, done) = mpsc::sync_channel(1);
    let mut message = Message::Flush(written);
    while let Err(mpsc::TrySendError::Full(back)) = queue.lines.try_send(message) {
        if Instant::now() > deadline {
            return;
        }
        message = back;
        std::thread::sleep(Duration::from_millis(5));
    }
    queue.writer.unpark();
    let _ = done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
}

/// Logs a panic. The standard hook prints to stderr, and would block if nobody reads it.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let text = panic.payload_as_str().unwrap_or("no text");
    let thread = std::thread::current();
    let (thread, location) = (thread.name().unwrap_or("unnamed"), panic.location().map(ToString::to_string));
    tracing::error!(thread, location, "thread {thread} panicked: {text}");
}

enum Message {
    Line(Vec<u8>),
    /// Answered when all earlier lines are written.
    Flush(SyncSender<()>),
}

/// Sender to the writing thread.
struct Queue {
    lines: SyncSender<Message>,
    writer: Thread,
}

impl Queue {
    fn start() -> io::Result<Self> {
        let (lines, queued) = mpsc::sync_channel(LINES);
        // not the standard library's handle: a blocked writer would hold its lock
        let stderr = stderr()?;
        let writer = std::thread::Builder::new().name("nfold-log".into()).spawn(move || write(&queued, stderr))?;
        Ok(Self { lines, writer: writer.thread().clone() })
    }

    /// Queues a line; one that must not be lost by the process's death is written without gathering more.
    fn push(&self, line: Vec<u8>, at_once: bool) {
        let bytes = line.len();
        let fits = WAITING.fetch_add(bytes, Ordering::Relaxed) + bytes <= BYTES;
        if !fits || self.lines.try_send(Message::Line(line)).is_err() {
            WAITING.fetch_sub(bytes, Ordering::Relaxed);
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        if at_once {
            self.writer.unpark();
        }
    }
}

#[cfg(unix)]
fn stderr() -> io::Result<File> {
    use std::os::fd::AsFd as _;
    Ok(File::from(io::stderr().as_fd().try_clone_to_owned()?))
}

#[cfg(windows)]
fn stderr() -> io::Result<File> {
    use std::os::windows::io::AsHandle as _;
    Ok(File::from(io::stderr().as_handle().try_clone_to_owned()?))
}

/// Whole lines that are written together.
#[derive(Default)]
struct Together {
    bytes: Vec<u8>,
    /// Where each line ends.
    ends: Vec<usize>,
}

fn write(lines: &Receiver<Message>, mut stderr: File) {
    let (mut together, mut said) = (Together::default(), 0);
    while let Ok(first) = lines.recv() {
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Line(line) => {
                    if together.bytes.len() + line.len() > TOGETHER {
                        write_out(&mut stderr, &mut together, &mut said);
                    }
                    together.bytes.extend_from_slice(&line);
                    together.ends.push(together.bytes.len());
                }
                Message::Flush(done) => {
                    write_out(&mut stderr, &mut together, &mut said);
                    let _ = done.try_send(());
                }
            }
            next = lines.try_recv().ok();
        }
        write_out(&mut stderr, &mut together, &mut said);
        let dropped = dropped_lines();
        if dropped > said && WAITING.load(Ordering::Relaxed) == 0 {
            tracing::warn!(lines = dropped - said, "log lines were dropped: nobody read them in time");
            said = dropped;
        }
        // whoever logs meanwhile need not wake this thread
        std::thread::park_timeout(GATHERING);
    }
}

/// Writes the lines to stderr, and counts those that can't be written, or not whole.
fn write_out(stderr: &mut File, together: &mut Together, said: &mut u64) {
    let Together { bytes, ends } = together;
    WAITING.fetch_sub(bytes.len(), Ordering::Relaxed);
    let written = bytes.len() - write_all(stderr, bytes).len();
    let dropped = ends.iter().filter(|&&end| end > written).count();
    if dropped > 0 {
        DROPPED.fetch_add(dropped as u64, Ordering::Relaxed);
        // not logged: that line would be dropped as well
        *said = dropped_lines();
    }
    bytes.clear();
    ends.clear();
}

/// Writes everything, even to a non-blocking stream; returns what can't be written.
fn write_all<'a>(stderr: &mut File, mut bytes: &'a [u8]) -> &'a [u8] {
    while !bytes.is_empty() {
        match stderr.write(bytes) {
            Ok(0) => break,
            Ok(written) => bytes = &bytes[written..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
        }
    }
    bytes
}

/// Writer of one event, which the formatter writes in one call.
struct Line<'a> {
    queue: &'a Queue,
    at_once: bool,
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(line.to_vec(), self.at_once);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for &'static Queue {
    type Writer = Line<'static>;

    fn make_writer(&self) -> Line<'static> {
        Line { queue: self, at_once: false }
    }

    fn make_writer_for(&self, event: &Metadata<'_>) -> Line<'static> {
        Line { queue: self, at_once: *event.level() <= Level::WARN }
    }
}
