//! Log lines: where they go and how they look. Knows nothing of what is logged.
//!
//! Everything goes to stderr; stdout is for machine output. Bodies, images and secrets are never logged.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people; in colour on a terminal.
    #[default]
    Text,
    /// One JSON object a line, fields at the top level.
    Json,
}

/// Starts logging. `filter` is a list of directives as `RUST_LOG` takes them, such as `info,ort=warn`; the error says
/// what is wrong with it. Only the first call in a process takes effect.
pub fn init(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("log filter `{filter}` is not valid: {e}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // a second call keeps the first subscriber: harmless, and tests do it
    let _ = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
    Ok(())
}
