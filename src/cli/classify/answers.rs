//! The output of `classify`: a table, JSON lines or CSV, on stdout or in a file.

use std::io::{self, IsTerminal as _, Write};
use std::path::Path;

use anyhow::anyhow;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clap::ValueEnum;
use serde_json::json;

use crate::cli::printable::{self, printable, say};
use crate::files::DraftFile;
use crate::infer::top_k::Prediction;
use crate::model::{ModelDir, ScoreFunction};

/// The result for one image: predictions, or an error (a stable reason and a message).
pub type Answer = Result<Vec<Prediction>, (&'static str, String)>;

/// Output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people: one line per image and one per class
    Table,
    /// JSON lines: one object per image
    Jsonl,
    /// Comma-separated values: one row per class, with the image's name in each
    Csv,
}

impl Format {
    /// The format by a file's extension.
    pub fn of(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        match ending.as_str() {
            "jsonl" | "ndjson" | "json" => Some(Self::Jsonl),
            "csv" => Some(Self::Csv),
            "txt" => Some(Self::Table),
            _ => None,
        }
    }
}

/// Destination of the output.
pub enum Out {
    /// Standard output.
    Stdout(io::StdoutLock<'static>),
    /// A file that appears once it is complete; the text is its name.
    File(DraftFile, String),
}

impl Out {
    /// Opens the file, or standard output.
    pub fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self::Stdout(io::stdout().lock())) };
        let shown = printable::path(path);
        match DraftFile::create(path) {
            Ok(draft) => Ok(Self::File(draft, shown)),
            Err(e) => Err(anyhow!("can't write `{shown}`: {e}; check --output")),
        }
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Stdout(out) if out.is_terminal())
    }

    /// Writes `bytes` at once, so that a signal splits no line.
    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Stdout(out) => Ok(out.write_all(bytes)?),
            Self::File(draft, path) => {
                draft.write_all(bytes).map_err(|e| anyhow!("can't write `{path}`: {e}; check --output"))
            }
        }
    }

    fn publish(self) -> anyhow::Result<()> {
        match self {
            Self::Stdout(mut out) => Ok(out.flush()?),
            Self::File(draft, path) => {
                draft.publish().map_err(|e| anyhow!("can't write `{path}`: {e}; check --output"))
            }
        }
    }
}

/// Prints results one by one.
pub struct Printer<'a> {
    model: &'a ModelDir,
    format: Format,
    out: Out,
    /// Images that could not be classified.
    pub failed: usize,
    /// The last of their errors, as a line.
    pub last_error: String,
}

impl<'a> Printer<'a> {
    /// A printer for results of `model`. CSV begins with a header.
    pub fn new(model: &'a ModelDir, format: Format, out: Out) -> anyhow::Result<Self> {
        let mut printer = Self { model, format, out, failed: 0, last_error: String::new() };
        if format == Format::Csv {
            printer
                .row(&["image", "model", "version", "rank", "index", "label", "score", "error"].map(str::as_bytes))?;
        }
        Ok(printer)
    }

    /// Prints the result for one image.
    pub fn print(&mut self, path: &Path, answer: Answer) -> anyhow::Result<()> {
        if let Err((_, message)) = &answer {
            self.failed += 1;
            self.last_error = format!("`{}`: {message}", printable::path(path));
        }
        match self.format {
            Format::Table => self.table(path, answer),
            Format::Jsonl => self.object(path, answer),
            Format::Csv => self.rows(path, answer),
        }
    }

    /// Flushes the output; a file appears under its name.
    pub fn finish(self) -> anyhow::Result<()> {
        self.out.publish()
    }

    fn table(&mut self, path: &Path, answer: Answer) -> anyhow::Result<()> {
        let Ok(predictions) = answer else {
            say(format_args!("error: {}", self.last_error));
            return Ok(());
        };
        let labels: Vec<_> = predictions.iter().map(|p| printable(&p.label)).collect();
        let width = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
        let mut text = printable::path(path) + "\n";
        if predictions.is_empty() {
            text.push_str("  no class reaches its threshold\n");
        }
        let logits = self.model.manifest.scoring().activation == ScoreFunction::None;
        for (p, label) in predictions.iter().zip(&labels) {
            let line = if logits {
                format!("  {label:<width$}  {:.4}", p.score)
            } else {
                format!("  {label:<width$}  {:5.1} %  {}", 100.0 * p.score, blocks(p.score))
            };
            text.push_str(line.trim_end());
            text.push('\n');
        }
        self.out.write(text.as_bytes())
    }

    fn object(&mut self, path: &Path, answer: Answer) -> anyhow::Result<()> {
        let (model, version) = (&self.model.name, self.model.version);
        let mut line = match answer {
            Ok(predictions) => json!({ "model": model, "version": version, "predictions": predictions }),
            Err((reason, message)) => json!({ "error": { "reason": reason, "message": message } }),
        };
        line["image"] = path.to_string_lossy().into();
        if path.to_str().is_none() {
            // a name that is not UTF-8: its bytes identify the file
            line["image_b64"] = BASE64_STANDARD.encode(path.as_os_str().as_encoded_bytes()).into();
        }
        self.out.write(format!("{line}\n").as_bytes())
    }

    fn rows(&mut self, path: &Path, answer: Answer) -> anyhow::Result<()> {
        let version = self.model.version.to_string();
        let image = path.as_os_str().as_encoded_bytes();
        let model = self.model.name.as_bytes();
        match answer {
            // no class reaches its threshold: the image is there all the same
            Ok(predictions) if predictions.is_empty() => {
                let cells = [version.as_str(), "", "", "", "", ""].map(str::as_bytes);
                self.row(&[&[image, model], &cells[..]].concat())
            }
            Ok(predictions) => {
                for (rank, p) in predictions.iter().enumerate() {
                    let [rank, index, score] = [(rank + 1).to_string(), p.index.to_string(), p.score.to_string()];
                    let cells = [version.as_str(), &rank, &index, &p.label, &score, ""].map(str::as_bytes);
                    self.row(&[&[image, model], &cells[..]].concat())?;
                }
                Ok(())
            }
            Err((reason, message)) => {
                let error = format!("{reason}: {message}");
                let cells = [version.as_str(), "", "", "", "", &error].map(str::as_bytes);
                self.row(&[&[image, model], &cells[..]].concat())
            }
        }
    }

    /// Writes one CSV row. For a terminal, control characters are escaped.
    fn row(&mut self, cells: &[&[u8]]) -> anyhow::Result<()> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(cells)?;
        let row = writer.into_inner().map_err(|e| anyhow!("{e}"))?;
        if self.out.is_terminal() {
            let row = String::from_utf8_lossy(&row);
            return self.out.write(format!("{}\n", printable(row.trim_end_matches('\n'))).as_bytes());
        }
        self.out.write(&row)
    }
}

/// A bar of up to 30 characters, in steps of an eighth.
fn blocks(share: f64) -> String {
    let eighths = (share * 240.0).round() as usize;
    let partial = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    "█".repeat(eighths / 8) + partial[eighths % 8]
}
