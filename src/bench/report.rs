//! Writes reports: JSON (complete), CSV (one line per row), and the HTML page. Files are written atomically.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::load::answer::Outcome;
use super::{BenchError, engine, load, page};
use crate::files;

/// File name of the engine report, without extension.
pub const ENGINE: &str = "engine";
/// File name of the load report, without extension.
pub const LOAD: &str = "load";
/// File name of the page with all reports of the folder.
pub const PAGE: &str = "index.html";

/// Checks that reports can be written into the folder, before anything is measured for them. Leaves nothing.
pub fn check(folder: &Path) -> Result<(), BenchError> {
    files::check_folder(folder).map_err(|source| BenchError::Write { path: folder.into(), source })
}

/// Writes `folder/engine.json`, `folder/engine.csv` and the page.
pub fn write_engine(folder: &Path, report: &engine::Report) -> Result<(), BenchError> {
    write_json(folder, ENGINE, report)?;
    write(folder, &format!("{ENGINE}.csv"), engine_csv(report).as_bytes())?;
    write_page(folder)
}

/// Writes the page from the reports in the folder.
pub fn write_page(folder: &Path) -> Result<(), BenchError> {
    let engine: Option<engine::Report> = read(folder, ENGINE, engine::SCHEMA);
    let load: Option<load::Report> = read(folder, LOAD, load::SCHEMA);
    write(folder, PAGE, page::html(engine.as_ref(), load.as_ref()).as_bytes())
}

/// Writes `folder/load.json`, `folder/load.csv`, `folder/load.hlog` (HdrHistogram's interval log, one histogram per
/// step, in microseconds) and the page.
pub fn write_load(folder: &Path, report: &load::Report) -> Result<(), BenchError> {
    write_json(folder, LOAD, report)?;
    write(folder, &format!("{LOAD}.csv"), load_csv(report).as_bytes())?;
    write(folder, &format!("{LOAD}.hlog"), &histograms(report))?;
    write_page(folder)
}

fn histograms(report: &load::Report) -> Vec<u8> {
    let (mut out, mut serializer) = (Vec::new(), V2DeflateSerializer::new());
    let began = SystemTime::UNIX_EPOCH + Duration::from_secs(report.machine.unix_time);
    let mut builder = IntervalLogWriterBuilder::new();
    builder.with_start_time(began).with_max_value_divisor(1000.0);
    builder.add_comment("microseconds from due to answered; maxima in milliseconds; one line a step of load.json");
    // writing to memory does not fail
    if let Ok(mut log) = builder.begin_log_with(&mut out, &mut serializer) {
        let each = Duration::from_secs_f64(report.plan.warmup_s + report.plan.window_s);
        for (i, step) in report.steps.iter().enumerate() {
            let Some(latencies) = &step.latencies else { continue };
            let tag = format!("step{i}");
            let _ = log.write_histogram(latencies, each * i as u32, each, Tag::new(&tag));
        }
    }
    out
}

/// One line per step; empty fields for unknown figures.
pub fn load_csv(report: &load::Report) -> String {
    let outcomes = [
        Outcome::Ok,
        Outcome::Refused,
        Outcome::Deadline,
        Outcome::ClientError,
        Outcome::ServerError,
        Outcome::Transport,
        Outcome::Timeout,
    ];
    let header = "kind,connections,rate,multiple,ok,refused,deadline,client_error,server_error,transport,timeout,throughput,\
         goodput,p50_ms,p90_ms,p99_ms,p999_ms,max_ms,lag_p99_ms,valid";
    let mut lines = vec![header.split(',').map(String::from).collect()];
    for s in &report.steps {
        let real = |v: Option<f64>| v.map_or_else(String::new, |v| format!("{v:.3}"));
        let latency = s.latency_ms.as_ref();
        let mut fields = vec![s.kind.clone(), s.connections.map_or_else(String::new, |c| c.to_string())];
        fields.extend([real(s.rate), real(s.multiple)]);
        fields.extend(outcomes.map(|o| s.count(o).to_string()));
        fields.extend([real(Some(s.throughput)), real(Some(s.goodput))]);
        fields.extend([real(latency.map(|l| l.p50)), real(latency.map(|l| l.p90))]);
        fields.extend([real(latency.and_then(|l| l.p99)), real(latency.and_then(|l| l.p999))]);
        fields.extend([real(latency.map(|l| l.max)), real(Some(s.lag_ms[1])), s.valid.to_string()]);
        lines.push(fields);
    }
    csv_of(lines)
}

/// A report in the folder, if it exists and has this schema.
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

/// Writes a file atomically; creates the folder if it is missing.
pub fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), BenchError> {
    let path = folder.join(name);
    let written = fs::create_dir_all(folder).and_then(|()| files::write(&path, bytes));
    written.map_err(|source| BenchError::Write { path, source })
}

/// One line per row; empty fields for unknown figures.
pub fn engine_csv(report: &engine::Report) -> String {
    let header = "model,variant,height,width,batch,threads,parameters,gmacs,onnx_bytes,load_ms,runs,median_ms,p90_ms,p99_ms,\
         images_per_s,gflops,peak_share,speed,speed_low,speed_high,top1,top1_weights";
    let mut lines = vec![header.split(',').map(String::from).collect()];
    for r in &report.rows {
        let real = |v: Option<f64>| v.map_or_else(String::new, |v| format!("{v:.4}"));
        let speed = |pick: fn(&super::statistics::Ratio) -> f64| real(r.speed.as_ref().map(pick));
        let fields = [
            r.model.clone(),
            r.variant.clone(),
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
            r.published.as_ref().map_or_else(String::new, |p| p.weights.clone()),
        ];
        lines.push(fields.into());
    }
    csv_of(lines)
}

/// Formats lines as comma-separated values (RFC 4180).
fn csv_of(lines: Vec<Vec<String>>) -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for line in lines {
        writer.write_record(line).expect("lines are of one length, and memory takes them");
    }
    String::from_utf8(writer.into_inner().expect("memory needs no flushing")).expect("fields are text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must() {
        let lines = ["a@1,,x", "a,\"b\""].map(|text| vec![text.to_string(), String::new()]);
        assert_eq!(csv_of(lines.to_vec()), "\"a@1,,x\",\n\"a,\"\"b\"\"\",\n");
    }
}
