//! Writes what was measured: JSON (whole), CSV (one line a row), and the page. Files appear whole or not at all.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{BenchError, engine, page};

/// File name of the engine's report, without extension.
pub const ENGINE: &str = "engine";
/// The page that shows every report of the folder.
pub const PAGE: &str = "index.html";

/// Writes `folder/engine.json`, `folder/engine.csv` and the page.
pub fn write_engine(folder: &Path, report: &engine::Report) -> Result<(), BenchError> {
    write_json(folder, ENGINE, report)?;
    write(folder, &format!("{ENGINE}.csv"), engine_csv(report).as_bytes())?;
    write_page(folder)
}

/// The page from the reports that the folder holds.
pub fn write_page(folder: &Path) -> Result<(), BenchError> {
    let engine: Option<engine::Report> = read(folder, ENGINE, engine::SCHEMA);
    write(folder, PAGE, page::html(engine.as_ref()).as_bytes())
}

/// A report of this folder, where it is there and of this layout.
fn read<T: DeserializeOwned>(folder: &Path, name: &str, schema: &str) -> Option<T> {
    let value: serde_json::Value = serde_json::from_slice(&fs::read(folder.join(format!("{name}.json"))).ok()?).ok()?;
    (value["schema"] == schema).then(|| serde_json::from_value(value).ok()).flatten()
}

/// Writes `folder/name.json`.
pub fn write_json(folder: &Path, name: &str, report: &impl Serialize) -> Result<(), BenchError> {
    let path = folder.join(format!("{name}.json"));
    let text = serde_json::to_string(report).map_err(|e| BenchError::Write { path, source: e.into() })?;
    write(folder, &format!("{name}.json"), (text + "\n").as_bytes())
}

/// Writes a file of the folder, which is made where missing: to a temporary name first.
pub fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), BenchError> {
    let path = folder.join(name);
    let failed = |source| BenchError::Write { path: path.clone(), source };
    fs::create_dir_all(folder).map_err(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed)?;
    }
    file.persist(&path).map_err(|e| failed(e.error))?;
    Ok(())
}

/// One line a row; empty fields where a figure is not known.
pub fn engine_csv(report: &engine::Report) -> String {
    let mut out = String::from(
        "model,variant,height,width,batch,threads,parameters,gmacs,onnx_bytes,load_ms,runs,median_ms,p90_ms,p99_ms,\
         images_per_s,gflops,peak_share,speed,speed_low,speed_high,top1,top1_weights\n",
    );
    for r in &report.rows {
        let real = |v: Option<f64>| v.map_or_else(String::new, |v| format!("{v:.4}"));
        let speed = |pick: fn(&super::statistics::Ratio) -> f64| real(r.speed.as_ref().map(pick));
        let fields = [
            field(&r.model),
            field(&r.variant),
            r.height.to_string(),
            r.width.to_string(),
            r.batch.to_string(),
            r.threads.to_string(),
            r.parameters.map_or_else(String::new, |p| p.to_string()),
            real(r.gmacs),
            r.onnx_bytes.to_string(),
            real(Some(r.load_ms)),
            r.latency_ms.runs.to_string(),
            real(Some(r.latency_ms.median)),
            real(Some(r.latency_ms.p90)),
            real(r.latency_ms.p99),
            real(Some(r.images_per_s)),
            real(r.gflops),
            real(r.peak_share),
            speed(|s| s.value),
            speed(|s| s.low),
            speed(|s| s.high),
            real(r.published.as_ref().map(|p| p.top1)),
            r.published.as_ref().map_or_else(String::new, |p| field(&p.weights)),
        ];
        out.push_str(&fields.join(","));
        out.push('\n');
    }
    out
}

/// A CSV field (RFC 4180).
pub fn field(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must() {
        assert_eq!(field("a@1"), "a@1");
        assert_eq!(field("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
