//! The page of `--report`: the results, and the pictures with the most confident wrong predictions. One file, no
//! script.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::{Run, label, percent};
use crate::chart;
use crate::cli::classify::workers::read;

/// Pictures of errors.
const WORST: usize = 24;
/// Most bytes of pictures in the page.
const LARGEST: usize = 32 << 20;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#666;--line:#dcdcdc;--paper:#fff;--bar:#2f6fb2}\
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--soft:#a4a4a4;--line:#3a3a3a;--paper:#161616;--bar:#7db2ea}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.6rem}h2{margin-top:2.2rem}p.lead{font-size:1.15rem}.note{color:var(--soft);font-size:.88rem}\
.errors{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:1rem}figure{margin:0}\
figure img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--line)}figcaption{font-size:.84rem;overflow-wrap:anywhere}\
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}th,td{padding:.2rem .6rem;text-align:right;\
border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}meter{width:8rem}";

/// The page. Pictures of more than `max_bytes` bytes are only named.
pub fn html(run: &Run, max_bytes: usize) -> String {
    let labels = &run.subject.labels;
    let name = |index| chart::escape(&label(labels, index));
    let evaluation = &run.evaluation;
    let mut out = String::from("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">");
    out.push_str("<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>nfold eval</title>");
    let model = chart::escape(&run.subject.name);
    let _ = write!(out, "<style>{STYLE}</style></head><body><h1>{model}, version {}</h1>", run.subject.version);
    let _ = write!(out, "<p class=\"lead\">Right on {}.</p>", percent(&evaluation.top1));
    let _ = write!(
        out,
        "<p>Among the first five: {}. Mean recall of the classes: {:.2} %. Scores are {:.2} points from the share of right \
         answers.</p>",
        percent(&evaluation.top5),
        100.0 * evaluation.mean_recall,
        100.0 * evaluation.calibration_error
    );
    if let Some((file, found)) = &run.against {
        let _ = write!(
            out,
            "<p>Against {}: the same class for {}; right here only {}, there only {} (McNemar's p = {:.3}).</p>",
            chart::escape(file),
            percent(&found.agreement),
            found.only_this,
            found.only_other,
            found.p
        );
    }
    let (failed, folders) = run.missed();
    if failed > 0 {
        let _ = write!(out, "<p>{failed} images could not be read and are not counted.</p>");
    }
    if let Some(folders) = folders {
        let _ = write!(out, "<p>{folders} could not be searched.</p>");
    }
    errors(&mut out, run, max_bytes);
    out.push_str("<h2>Classes</h2><div class=\"wide\"><table><tr><th>class<th>images<th>recall<th><th>precision</tr>");
    for class in &evaluation.classes {
        let recall = class.recall.value;
        let _ = write!(
            out,
            "<tr><td>{}<td>{}<td>{:.1} %<td><meter value=\"{recall:.4}\"></meter><td>{:.1} %</tr>",
            name(class.index),
            class.recall.of,
            100.0 * recall,
            100.0 * class.precision.value
        );
    }
    out.push_str("</table></div><h2>Most often confused</h2><table><tr><th>class<th>taken for<th>images</tr>");
    for confusion in evaluation.confusions.iter().take(30) {
        let (class, predicted) = (name(confusion.class), name(confusion.predicted));
        let _ = write!(out, "<tr><td>{class}<td>{predicted}<td>{}</tr>", confusion.images);
    }
    out.push_str("</table><h2>Calibration</h2><table><tr><th>score from<th>images<th>mean score<th>right</tr>");
    for bin in &evaluation.reliability {
        let _ = write!(
            out,
            "<tr><td>{:.2}<td>{}<td>{:.1} %<td>{:.1} %</tr>",
            bin.from,
            bin.images,
            100.0 * bin.score,
            100.0 * bin.accuracy
        );
    }
    let _ = writeln!(
        out,
        "</table><p class=\"note\">sha256 of the graph {}; intervals are Wilson's of 95 %; calibration error in 15 ranges of the \
         best score (Guo et al., 2017).</p></body></html>",
        run.subject.onnx_sha256
    );
    out
}

/// The pictures with the most confident wrong predictions.
fn errors(out: &mut String, run: &Run, max_bytes: usize) {
    let labels = &run.subject.labels;
    let mut wrong: Vec<_> = run.answered.iter().filter(|(_, judged, _)| !judged.is_right()).collect();
    wrong.sort_by(|(_, a, _), (_, b, _)| b.score.total_cmp(&a.score));
    if wrong.is_empty() {
        out.push_str("<p>No image was given another class.</p>");
        return;
    }
    out.push_str("<h2>Surest and wrong</h2><div class=\"errors\">");
    let mut room = LARGEST;
    for (i, judged, _) in wrong.into_iter().take(WORST) {
        let sample = &run.samples[*i];
        let shown = chart::escape(&sample.name);
        out.push_str("<figure>");
        // without a media type: browsers detect the format
        if let Ok(bytes) = read(&sample.found.path, max_bytes.min(room))
            && bytes.len() <= max_bytes.min(room)
        {
            room -= bytes.len();
            let _ =
                write!(out, "<img alt=\"{shown}\" src=\"data:image/jpeg;base64,{}\">", BASE64_STANDARD.encode(&bytes));
        }
        let _ = write!(
            out,
            "<figcaption>{} <b>{:.1} %</b>, is {}<br><span class=\"note\">{shown}</span></figcaption></figure>",
            chart::escape(&label(labels, judged.predicted)),
            100.0 * judged.score,
            chart::escape(&label(labels, judged.class))
        );
    }
    out.push_str("</div>");
}
