//! The report as one self-contained HTML page: tables and charts, in light and dark, without scripts.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::engine::{Report, Row};
use super::load;
use super::load::answer::Outcome;
use super::load::record::Step;
use super::machine::Machine;
use crate::chart::{Axis, Figure, Marks, Panel, Scale, Series, escape};

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#666;--line:#dcdcdc;--paper:#fff}\
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--soft:#a4a4a4;--line:#3a3a3a;--paper:#161616}}\
.nfold-chart{max-width:100%;height:auto}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1280px;margin:2rem auto;\
padding:0 1rem}h1{font-size:1.6rem}h2{margin-top:2.4rem}h3{margin-top:1.8rem}figure{margin:1rem 0}\
figcaption,small,.note{color:var(--soft);font-size:.88rem}.wide{overflow-x:auto}table{border-collapse:collapse;\
font-size:.86rem;width:100%}th,td{padding:.25rem .55rem;text-align:right;border-bottom:1px solid var(--line);\
white-space:nowrap}th:first-child,td:first-child{text-align:left}code{font-size:.88em;overflow-wrap:anywhere}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem}dt{color:var(--soft)}dd{margin:0}";

/// The page for the available reports.
pub fn html(engine: Option<&Report>, load: Option<&load::Report>) -> String {
    let mut out = String::from("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">");
    out.push_str("<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>nfold bench</title>");
    let _ = write!(out, "<style>{STYLE}</style></head><body><h1>nfold bench</h1>");
    if let Some(report) = engine {
        engine_section(&mut out, report);
    }
    if let Some(report) = load {
        load_section(&mut out, report);
    }
    out.push_str("</body></html>\n");
    out
}

fn engine_section(out: &mut String, report: &Report) {
    out.push_str("<h2>Engine: latency in process</h2>");
    for (threads, batch) in cells(report) {
        let _ = write!(out, "<p>{}</p>", escape(&gist(report, threads, batch)));
    }
    out.push_str(
        "<p class=\"note\">Batch normalisation folds as well as Scaled Weight Standardization does: a BN-folded ResNet \
         runs the same plain convolutions, and is batch-independent too in exact arithmetic. Accuracy is what timm \
         publishes for trained weights of the same architecture and size; the weights timed here are freshly \
         initialised, which costs the same time.</p>",
    );
    for (threads, batch) in cells(report) {
        let rows: Vec<&Row> = report.rows.iter().filter(|r| (r.threads, r.batch) == (threads, batch)).collect();
        let plural = if threads == 1 { "" } else { "s" };
        let _ = write!(out, "<h3>Batch {batch}, {threads} thread{plural}</h3>");
        table(out, &rows);
        if rows.iter().any(|r| r.published.is_some()) {
            let caption = "Up and to the left is better. Latency is the median of a run; accuracy as published.";
            figure(out, &front(&rows, batch), caption);
        }
        let lines = rows.iter().map(|r| (r.label.clone(), &r.percentiles_ms[..])).collect();
        let spread = distribution("latency of a run, ms", "runs at most as slow, %", lines);
        figure(out, &spread, "How latency is spread over runs: a steep line is a steady one.");
    }
    machine(out, &report.machine, report.stolen_share);
    let plan = &report.plan;
    let _ = write!(
        out,
        "<p class=\"note\">{} rounds, each giving every contender one turn of at least {} ms in a fresh random order \
         after one untimed run; warm-up at least {} runs and {} ms; seed {}. Speed is the ratio of medians over \
         rounds to the reference's, with a 95 % bootstrap interval over rounds. Peak: ",
        plan.rounds, plan.turn_ms, plan.warmup_runs, plan.warmup_ms, plan.seed
    );
    let peaks: Vec<String> = report
        .peaks
        .iter()
        .map(|p| format!("{:.1} GFLOP/s with {} thread{}", p.gflops, p.threads, if p.threads == 1 { "" } else { "s" }))
        .collect();
    let _ = write!(out, "{} (fused multiply-adds in registers, measured).</p>", peaks.join(", "));
    if let Some(note) = report.implausible() {
        let _ = write!(out, "<p class=\"note\">Note: {note}.</p>");
    }
}

/// The result in a sentence: the fastest network, beside the reference, or beside the slowest where it is that itself.
fn gist(report: &Report, threads: usize, batch: usize) -> String {
    let mut rows: Vec<&Row> = report.rows.iter().filter(|r| (r.threads, r.batch) == (threads, batch)).collect();
    let how = format!("batch {batch}, {threads} thread{}", if threads == 1 { "" } else { "s" });
    let reference = rows.iter().copied().find(|r| report.plan.reference.as_ref().is_none_or(|name| *name == r.label));
    rows.sort_by(|a, b| a.latency_ms.median.total_cmp(&b.latency_ms.median));
    let ([first, ..], Some(slowest)) = (&rows[..], rows.last()) else {
        return format!("Nothing was timed with {how}.");
    };
    let other = reference.filter(|r| r.label != first.label).unwrap_or(slowest);
    let (median, rate) = (number(first.latency_ms.median), number(first.images_per_s));
    let mut text = format!("{} is the fastest with {how}: {median} ms, {rate} images/s", first.label);
    if other.label != first.label {
        let ratio = number(other.latency_ms.median / first.latency_ms.median);
        let _ = write!(text, "; {} takes {ratio} times as long", other.label);
    }
    text + "."
}

fn cells(report: &Report) -> BTreeSet<(usize, usize)> {
    report.rows.iter().map(|r| (r.threads, r.batch)).collect()
}

fn table(out: &mut String, rows: &[&Row]) {
    out.push_str(
        "<div class=\"wide\"><table><tr><th>model</th><th>top-1 %</th><th>parameters, M</th><th>GMACs</th>\
         <th>median, ms</th><th>p90</th><th>p99</th><th>images/s</th><th>GFLOP/s</th><th>of peak</th>\
         <th>speed (95 % interval)</th><th>load, ms</th></tr>",
    );
    let mut sorted = rows.to_vec();
    sorted.sort_by(|a, b| a.latency_ms.median.total_cmp(&b.latency_ms.median));
    for r in sorted {
        let or = |v: Option<f64>, digits: usize| v.map_or_else(|| "–".into(), |v| format!("{v:.digits$}"));
        let speed = r.speed.as_ref();
        let speed = speed.map_or_else(|| "–".into(), |s| format!("{:.3} ({:.3}–{:.3})", s.value, s.low, s.high));
        let top1 = match &r.published {
            Some(p) => format!("<span title=\"{}, {}\">{:.2}</span>", escape(&p.weights), escape(&p.source), p.top1),
            None => "–".into(),
        };
        let l = &r.latency_ms;
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{top1}</td><td>{}</td><td>{}</td><td>{:.2}</td><td>{:.2}</td><td>{}</td><td>{:.1}</td>\
             <td>{}</td><td>{}</td><td>{speed}</td><td>{:.0}</td></tr>",
            escape(&r.label),
            or(r.parameters.map(|p| p as f64 / 1e6), 2),
            or(r.gmacs, 3),
            l.median,
            l.p90,
            or(l.p99, 2),
            r.images_per_s,
            or(r.gflops, 1),
            r.peak_share.map_or_else(|| "–".into(), |s| format!("{:.0} %", 100.0 * s)),
            r.load_ms,
        );
    }
    out.push_str("</table></div>");
    let sources: BTreeSet<&str> = rows.iter().filter_map(|r| Some(r.published.as_ref()?.source.as_str())).collect();
    if !sources.is_empty() {
        let all = sources.into_iter().map(escape).collect::<Vec<_>>().join("; ");
        let _ = write!(out, "<small>Top-1: {all}.</small>");
    }
}

/// Family of a model, which shares a series in the chart.
fn family(model: &str) -> &'static str {
    let prefixes = [
        ("nf_regnet", "NF-RegNet"),
        ("nf_", "NF-ResNet"),
        ("resn", "ResNet (BN)"),
        ("regnet", "RegNetY (BN)"),
        ("efficientnet", "EfficientNet (BN)"),
    ];
    let found = prefixes.into_iter().find(|(prefix, _)| model.starts_with(prefix));
    found.map_or_else(|| if model.contains("nfnet") { "NFNet" } else { "others" }, |(_, name)| name)
}

fn front(rows: &[&Row], batch: usize) -> Figure {
    // other variants of a network have the same accuracy
    let rows: Vec<&&Row> = rows.iter().filter(|r| r.variant == "folded").collect();
    let families: BTreeSet<&str> = rows.iter().map(|r| family(&r.model)).collect();
    let point = |r: &&&Row| Some((r.latency_ms.median, r.published.as_ref()?.top1, r.label.clone()));
    let series = families.into_iter().filter_map(|name| {
        let mut points: Vec<(f64, f64, String)> =
            rows.iter().filter(|r| family(&r.model) == name).filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        (!points.is_empty()).then(|| Series {
            name: name.into(),
            points: points.iter().map(|p| (p.0, p.1)).collect(),
            labels: points.into_iter().map(|p| p.2).collect(),
            line: true,
            marks: Marks::All,
            ..Series::default()
        })
    });
    let images = if batch == 1 { "an image".into() } else { format!("a batch of {batch}") };
    one(
        "Accuracy against latency",
        Panel {
            x: axis(format!("median latency of {images}, ms"), Scale::Log),
            y: axis("ImageNet-1k top-1, %", Scale::Linear),
            series: series.collect(),
            ..Panel::default()
        },
    )
}

/// Most lines that are told apart in one panel.
const OVERLAID: usize = 4;

/// The percentiles 0 to 100 of each name's latency in ms: one panel, or of many names a panel each, on the same axes.
fn distribution(of: &str, share: &str, lines: Vec<(String, &[f64])>) -> Figure {
    let title = "Distribution of latency";
    let panel = |name: String, series, range| Panel {
        title: name,
        x: Axis { range, ..axis(of, Scale::Log) },
        y: axis(share, Scale::Linear),
        series,
        ..Panel::default()
    };
    let series = |name: String, percentiles: &[f64]| Series {
        name,
        points: percentiles.iter().enumerate().map(|(p, &x)| (x, p as f64)).collect(),
        line: true,
        ..Series::default()
    };
    if lines.len() <= OVERLAID {
        let overlaid = lines.into_iter().map(|(name, percentiles)| series(name, percentiles)).collect();
        return one(title, panel(String::new(), overlaid, None));
    }
    let all = || lines.iter().flat_map(|(_, percentiles)| percentiles.iter().copied());
    let range = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let alone = |(name, percentiles)| panel(name, vec![series(String::new(), percentiles)], Some(range));
    Figure {
        title: title.into(),
        subtitle: "all panels have the same axes".into(),
        panels: lines.into_iter().map(alone).collect(),
        columns: 4,
        panel_size: (304.0, 220.0),
    }
}

/// An axis whose label says if it is logarithmic.
fn axis(label: impl Into<String>, scale: Scale) -> Axis {
    let mut label = label.into();
    if scale == Scale::Log {
        label += " (log scale)";
    }
    Axis { label, scale, ..Axis::default() }
}

fn one(title: &str, panel: Panel) -> Figure {
    let (title, subtitle) = (title.into(), String::new());
    Figure { title, subtitle, panels: vec![panel], columns: 1, panel_size: (1040.0, 440.0) }
}

fn figure(out: &mut String, chart: &Figure, caption: &str) {
    let _ = write!(out, "<figure>{}<figcaption>{}</figcaption></figure>", chart.svg(), escape(caption));
}

/// Writes the machine and versions of a report.
fn machine(out: &mut String, m: &Machine, stolen: Option<f64>) {
    out.push_str("<h3>Machine and versions</h3><dl>");
    let mut entry = |key: &str, value: String| {
        let _ = write!(out, "<dt>{key}</dt><dd>{}</dd>", escape(&value));
    };
    entry("processor", format!("{}, {} cores ({})", m.processor, m.cores, m.extensions.join(" ")));
    entry("memory", format!("{} GiB", number(m.memory_gib)));
    entry("system", format!("{}, kernel {}", m.system, m.kernel));
    entry("governor", m.governor.clone().unwrap_or_else(|| "not shown by this machine".into()));
    entry("nfold", m.nfold.clone());
    m.onnxruntime.iter().for_each(|build| entry("ONNX Runtime", build.clone()));
    if let Some(load) = m.load_average {
        entry("load before", number(load));
    }
    if let Some(share) = stolen {
        entry("stolen time", format!("{:.2} % of the processors' time went to other guests", 100.0 * share));
    }
    entry("time", m.date());
    entry("command", m.command.join(" "));
    out.push_str("</dl>");
}

fn load_section(out: &mut String, report: &load::Report) {
    let plan = &report.plan;
    let _ = write!(
        out,
        "<h2>Server: load over the network</h2><p>{}</p><p class=\"note\">Open-loop latency counts from when a request was due, \
         not from when it could be sent: a stall is charged for everyone who waited. Percentiles are given only where \
         enough answers came (459 for p99, 4603 for p99.9). Goodput counts answers within {} ms. A step is void where \
         the generator's own lag passed {} ms at its 99th percentile; generator and server share this machine.</p>",
        escape(&load_gist(report)),
        number(plan.slo_ms),
        number(plan.max_lag_ms)
    );
    steps(out, report);
    let open: Vec<&Step> = report.steps.iter().filter(|s| s.rate.is_some()).collect();
    if open.len() > 1 {
        let caption = "Throughput counts every answer, goodput those within the objective: past the knee a good server \
                       keeps both and refuses the rest.";
        figure(out, &served(&open, report.capacity), caption);
        figure(out, &latency(&open), "Latency from the due time against offered load.");
    }
    let answered = report.steps.iter().filter(|s| !s.percentiles_ms.is_empty());
    let lines = answered.map(|s| (name(s), &s.percentiles_ms[..])).collect();
    let spread = distribution("latency, ms", "answers at most as slow, %", lines);
    figure(out, &spread, "How latency is spread over answers as asked.");
    machine(out, &report.machine, report.stolen_share);
    let _ = write!(
        out,
        "<p class=\"note\">{} arrivals, seed {}; {} s of warm-up, then {} s measured a step; {} different bodies of \
         {:.1} kB in random order; patience {} s.</p>",
        plan.arrivals.name(),
        plan.seed,
        number(plan.warmup_s),
        number(plan.window_s),
        report.payloads,
        report.payload_bytes / 1e3,
        number(plan.timeout_s)
    );
}

/// The result in a sentence: the step with the most answers within the objective.
fn load_gist(report: &load::Report) -> String {
    let valid = report.steps.iter().filter(|s| s.valid);
    let Some(best) = valid.max_by(|a, b| a.goodput.total_cmp(&b.goodput)) else {
        return "No step is valid: the load generator itself was late.".into();
    };
    let mut text = format!(
        "The server gave up to {} answers a second within {} ms ({})",
        number(best.goodput),
        number(report.plan.slo_ms),
        name(best)
    );
    if let Some(latency) = &best.latency_ms {
        let _ = write!(text, ", half of them within {} ms", number(latency.p50));
        if let Some(p99) = latency.p99 {
            let _ = write!(text, " and 99 % within {} ms", number(p99));
        }
    }
    text + "."
}

/// Name of a step in charts and tables.
fn name(step: &Step) -> String {
    match (step.connections, step.rate) {
        (Some(n), _) => format!("closed, {n} connection{}", if n == 1 { "" } else { "s" }),
        (None, Some(rate)) => {
            let multiple = step.multiple.map_or_else(String::new, |m| format!(" ({} of capacity)", number(m)));
            format!("open, {}/s{multiple}", number(rate))
        }
        (None, None) => step.kind.clone(),
    }
}

fn steps(out: &mut String, report: &load::Report) {
    out.push_str(
        "<div class=\"wide\"><table><tr><th>step</th><th>throughput/s</th><th>goodput/s</th><th>ok</th><th>refused</th>\
         <th>other failures</th><th>p50, ms</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th><th>lag p99, ms</th>\
         </tr>",
    );
    for s in &report.steps {
        let l = s.latency_ms.as_ref();
        let or = |v: Option<f64>| v.map_or_else(|| "–".into(), |v| format!("{v:.1}"));
        let failed = s.failed();
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{:.1}</td><td>{:.1}</td><td>{}</td><td>{}</td><td>{failed}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{}</td><td>{:.2}{}</td></tr>",
            escape(&name(s)),
            s.throughput,
            s.goodput,
            s.count(Outcome::Ok),
            s.count(Outcome::Refused),
            or(l.map(|l| l.p50)),
            or(l.map(|l| l.p90)),
            or(l.and_then(|l| l.p99)),
            or(l.and_then(|l| l.p999)),
            or(l.map(|l| l.max)),
            s.lag_ms[1],
            if s.valid { "" } else { " void" },
        );
    }
    out.push_str("</table></div>");
}

fn served(open: &[&Step], capacity: Option<f64>) -> Figure {
    let series = |name: &str, pick: fn(&Step) -> f64| Series {
        name: name.into(),
        points: open.iter().map(|s| (s.rate.unwrap_or(0.0), pick(s))).collect(),
        line: true,
        marks: Marks::All,
        ..Series::default()
    };
    one(
        "Throughput and goodput against offered load",
        Panel {
            x: axis("offered load, requests/s", Scale::Linear),
            y: axis("answers as asked, 1/s", Scale::Linear),
            series: vec![series("throughput", |s| s.throughput), series("goodput", |s| s.goodput)],
            rules: capacity.into_iter().map(|c| (c, "closed-loop capacity".to_string())).collect(),
            ..Panel::default()
        },
    )
}

fn latency(open: &[&Step]) -> Figure {
    let series = |name: &str, pick: fn(&Step) -> Option<f64>| Series {
        name: name.into(),
        points: open.iter().filter_map(|s| Some((s.rate?, pick(s)?))).collect(),
        line: true,
        marks: Marks::All,
        ..Series::default()
    };
    one(
        "Latency against offered load",
        Panel {
            x: axis("offered load, requests/s", Scale::Linear),
            y: axis("latency from the due time, ms", Scale::Log),
            series: vec![
                series("p50", |s| s.latency_ms.as_ref().map(|l| l.p50)),
                series("p90", |s| s.latency_ms.as_ref().map(|l| l.p90)),
                series("p99", |s| s.latency_ms.as_ref().and_then(|l| l.p99)),
            ],
            ..Panel::default()
        },
    )
}

/// Formats a number with at most two decimals, none from 100 on.
fn number(v: f64) -> String {
    let digits = if v.abs() >= 100.0 { 0 } else { 2 };
    let text = format!("{v:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}
