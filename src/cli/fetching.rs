//! Shows a download: a bar on a terminal, a line elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::printable::{printable, say};
use crate::hub::Event;

/// The file that is being downloaded.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    file: String,
    size: u64,
    started: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self { bar: ProgressBar::hidden(), file: String::new(), size: 0, started: Instant::now() }
    }
}

impl Progress {
    /// Shows an event.
    pub fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Begins { file, size, have } => {
                (self.file, self.size, self.started) = (printable(file).into_owned(), size, Instant::now());
                // hidden if stderr is no terminal
                self.bar = ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::stderr());
                let style = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}";
                if let Ok(style) = ProgressStyle::with_template(style) {
                    self.bar.set_style(style);
                }
                self.bar.set_message(self.file.clone());
                self.bar.set_position(have);
                self.bar.reset_eta();
                if have > 0 {
                    self.line(format!("{}: going on from {have} of {size} bytes", self.file));
                }
            }
            Event::At(bytes) => self.bar.set_position(bytes),
            Event::Ends => {
                self.bar.finish_and_clear();
                let (file, megabytes) = (&self.file, self.size as f64 / 1e6);
                let seconds = self.started.elapsed().max(Duration::from_millis(1)).as_secs_f64();
                say(format_args!("fetched {file} ({megabytes:.1} MB) in {seconds:.1} s"));
            }
            Event::Note(text) => self.line(format!("note: {text}")),
        }
    }

    /// Prints a line that the bar does not overwrite.
    fn line(&self, text: String) {
        self.bar.suspend(|| say(format_args!("{text}")));
    }
}
