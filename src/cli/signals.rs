//! Signals: SIGTERM, SIGINT, SIGHUP and SIGQUIT end every command, also as process 1 of a container, where signals have
//! no default action.
//!
//! Owns the handlers, from the start of the program, and the thread that acts on them: drafts are removed and the
//! process ends with 128 plus the signal's number. A server is told instead ([`Signals::tell`]), as it has requests to
//! finish. SIGXFSZ (a file at its size limit) is only caught, so that the write that hit the limit fails with an error.

use std::io;
#[cfg(unix)]
use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc::Sender;

use crate::server::Control;
use crate::{files, logging};

/// The channel to a server; `None` before it listens, and in all other commands.
#[cfg(unix)]
static SERVER: Mutex<Option<Sender<Control>>> = Mutex::new(None);

/// Ends the process at once: drafts are removed and log lines written, but neither destructors nor exit handlers run.
/// Other threads may still be inside ONNX Runtime, whose exit handlers would free memory that these use.
pub fn end(code: i32) -> ! {
    files::abandon();
    logging::flush();
    #[cfg(unix)]
    signal_hook::low_level::exit(code);
    #[cfg(not(unix))]
    std::process::exit(code)
}

#[cfg(unix)]
pub use unix::Signals;

/// Without Unix signals: Ctrl-C ends a command by itself, and stops a server.
#[cfg(not(unix))]
#[derive(Debug)]
pub struct Signals;

#[cfg(not(unix))]
impl Signals {
    /// Nothing to catch.
    pub fn catch() -> io::Result<Self> {
        Ok(Self)
    }

    /// Nothing to act on.
    pub fn act(self, _serving: bool) -> io::Result<()> {
        Ok(())
    }

    /// Sends Ctrl-C to a server from now on.
    pub fn tell(server: Sender<Control>) {
        tokio::spawn(async move {
            while tokio::signal::ctrl_c().await.is_ok() && server.send(Control::Stop).await.is_ok() {}
        });
    }
}

#[cfg(unix)]
mod unix {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};
    use signal_hook::iterator::Signals as Iterator;

    use super::*;

    /// Caught signals, which are acted on once a command is known.
    #[derive(Debug)]
    pub struct Signals(Iterator);

    impl Signals {
        /// Catches signals; those that arrive before [`act`](Self::act) wait for it.
        pub fn catch() -> io::Result<Self> {
            // the flag is not read: with a handler the write fails, without one the process would be killed
            signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
            let hangup = if ignored(SIGHUP) { None } else { Some(SIGHUP) };
            Iterator::new([SIGTERM, SIGINT, SIGQUIT].into_iter().chain(hangup)).map(Self)
        }

        /// Acts on signals on a thread of its own, for `nfold serve` (`serving`) or any other command.
        pub fn act(mut self, serving: bool) -> io::Result<()> {
            if serving {
                // SIGHUP reloads, even under `nohup`
                self.0.add_signal(SIGHUP)?;
            }
            let act = move || {
                for signal in self.0.forever() {
                    match signal {
                        SIGTERM | SIGINT if serving => stop(),
                        SIGHUP if serving => reload(),
                        _ => end(128 + signal),
                    }
                }
            };
            std::thread::Builder::new().name("nfold-signals".into()).spawn(act).map(drop)
        }

        /// Sends signals to a server from now on.
        pub fn tell(server: Sender<Control>) {
            *super::SERVER.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        }
    }

    fn server() -> Option<Sender<Control>> {
        super::SERVER.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stop() {
        // the server does not listen yet, or no longer
        if server().is_none_or(|server| server.blocking_send(Control::Stop).is_err()) {
            end(0);
        }
    }

    fn reload() {
        let Some(server) = server() else { return };
        tracing::info!("SIGHUP: looking at certificates, API keys and models again");
        // a full channel has a pending request already
        let _ = server.try_send(Control::Reload);
    }

    /// Whether the signal was ignored when this process started, as under `nohup`; false if unknown.
    fn ignored(signal: i32) -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
        mask >> (signal - 1) & 1 == 1
    }
}
