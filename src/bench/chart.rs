//! Charts as SVG: points and lines on labelled axes, in light and dark. Knows numbers and names, not what they mean.
//!
//! Colours are Okabe and Ito's (distinguishable to colour-blind readers), and no series relies on colour alone: marks
//! and dashes differ too. The page's style sheet, [`STYLE`], gives every class its colour.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 430.0;
/// Plot area: left, top, right, bottom.
const FRAME: [f64; 4] = [72.0, 18.0, 744.0, 376.0];
/// Width of a character of a label, and its height, in the chart's units.
const CHARACTER: [f64; 2] = [6.7, 13.0];

/// Style sheet of everything a chart draws.
pub const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#666;--line:#dcdcdc;--paper:#fff;--c0:#0072b2;--c1:#d55e00;\
--c2:#00795a;--c3:#b0548a;--c4:#8a6d00;--c5:#2b8cc4;--c6:#444}\
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--soft:#a4a4a4;--line:#3a3a3a;--paper:#161616;--c0:#56b4e9;\
--c1:#f0853a;--c2:#2fc295;--c3:#dd8fbd;--c4:#f0e442;--c5:#8ecbf0;--c6:#c8c8c8}}\
.chart{width:100%;height:auto;font:12px system-ui,sans-serif}.chart text{fill:var(--ink)}.chart .tick{fill:var(--soft)}\
.chart .grid{stroke:var(--line);stroke-width:1}.chart .label{font-size:11px}\
.chart .s0{--c:var(--c0)}.chart .s1{--c:var(--c1)}.chart .s2{--c:var(--c2)}.chart .s3{--c:var(--c3)}\
.chart .s4{--c:var(--c4)}.chart .s5{--c:var(--c5)}.chart .s6{--c:var(--c6)}\
.chart .mark{fill:var(--c);stroke:var(--paper);stroke-width:1}.chart .curve{fill:none;stroke:var(--c);stroke-width:2}\
.chart .span{stroke:var(--c);stroke-width:1.5}.chart .rule{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}";

/// How numbers are laid on an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Evenly, not from zero unless zero is among the values.
    Linear,
    /// By ratios; values must be above zero.
    Log,
}

/// An axis: what it shows, with the unit.
#[derive(Debug, Clone)]
pub struct Axis {
    /// Label with its unit, such as `latency, ms`.
    pub label: String,
    /// How numbers are laid out.
    pub scale: Scale,
}

/// A point, its name and its vertical uncertainty where it has them.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Horizontal value.
    pub x: f64,
    /// Vertical value.
    pub y: f64,
    /// Text beside the point; none where empty.
    pub label: String,
}

/// Points of one kind.
#[derive(Debug, Clone)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Points in drawing order; those that the scales can't show are left out.
    pub points: Vec<Point>,
    /// A line through them.
    pub line: bool,
    /// A mark on each.
    pub marks: bool,
}

/// A chart.
#[derive(Debug, Clone)]
pub struct Chart {
    /// What it shows, for readers who can't see it.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Series; the first seven have their own colours.
    pub series: Vec<Series>,
    /// Vertical values with a line across and a name.
    pub rules: Vec<(f64, String)>,
}

/// From values to places.
struct Ruler {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Ruler {
    fn new(scale: Scale, values: &[f64], from: f64, to: f64) -> Self {
        let value = |v: f64| if scale == Scale::Log { v.ln() } else { v };
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values.iter().map(|&v| value(v)).filter(|v| v.is_finite()) {
            (low, high) = (low.min(v), high.max(v));
        }
        if !low.is_finite() {
            (low, high) = (0.0, 1.0);
        }
        let room = if high > low { 0.06 * (high - low) } else { 0.5 };
        // a linear axis whose values start near zero starts at zero
        let zero = scale == Scale::Linear && low >= 0.0 && low < 0.35 * high;
        Self { scale, low: if zero { 0.0 } else { low - room }, high: high + room, from, to }
    }

    fn place(&self, v: f64) -> Option<f64> {
        let v = if self.scale == Scale::Log { v.ln() } else { v };
        let share = (v - self.low) / (self.high - self.low);
        (share.is_finite() && (-1e-9..=1.0 + 1e-9).contains(&share)).then(|| self.from + share * (self.to - self.from))
    }

    /// Round values within the range: every 1, 2 or 5 times a power of ten.
    fn ticks(&self) -> Vec<f64> {
        if self.scale == Scale::Log {
            let (low, high) = (self.low.exp(), self.high.exp());
            let decades = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
            let steps: &[f64] = if high / low > 300.0 { &[1.0] } else { &[1.0, 2.0, 3.0, 5.0, 7.0] };
            let all = decades.flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d)));
            return all.filter(|v| (low..=high).contains(v)).collect();
        }
        let rough = (self.high - self.low) / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|s| *s >= rough).unwrap_or(10.0 * power);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|v| *v <= self.high).take(50).collect()
    }
}

/// A box that a label fills: left, top, right, bottom.
type Area = [f64; 4];

impl Chart {
    /// The chart as an `<svg>` element.
    pub fn svg(&self) -> String {
        let [left, top, right, bottom] = FRAME;
        let all = || self.series.iter().flat_map(|s| &s.points);
        let x = Ruler::new(self.x.scale, &all().map(|p| p.x).collect::<Vec<_>>(), left, right);
        let ys: Vec<f64> = all().map(|p| p.y).chain(self.rules.iter().map(|r| r.0)).collect();
        let y = Ruler::new(self.y.scale, &ys, bottom, top);
        let legend = if self.series.len() > 1 { 22.0 * self.series.len().div_ceil(3) as f64 } else { 0.0 };
        let mut out = format!(
            r#"<svg class="chart" viewBox="0 0 {WIDTH} {}" role="img" aria-label="{}">"#,
            HEIGHT + legend,
            escape(&self.title)
        );
        self.axes(&mut out, &x, &y);
        for (value, name) in &self.rules {
            let Some(at) = y.place(*value) else { continue };
            let _ = write!(out, r#"<line class="rule" x1="{left}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/>"#);
            let _ = write!(
                out,
                r#"<text class="tick" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
                right - 4.0,
                at - 4.0,
                escape(name)
            );
        }
        let mut taken: Vec<Area> = Vec::new();
        let mut labels: Vec<(f64, f64, &str)> = Vec::new();
        for (i, series) in self.series.iter().enumerate() {
            let places: Vec<(f64, f64, &str)> =
                series.points.iter().filter_map(|p| Some((x.place(p.x)?, y.place(p.y)?, p.label.as_str()))).collect();
            let _ = write!(out, r#"<g class="s{}">"#, i % 7);
            if series.line && places.len() > 1 {
                let path: Vec<String> = places.iter().map(|(x, y, _)| format!("{x:.1},{y:.1}")).collect();
                let dash = ["", "7 4", "2 3", "9 3 2 3"][i / 2 % 4];
                let _ =
                    write!(out, r#"<polyline class="curve" stroke-dasharray="{dash}" points="{}"/>"#, path.join(" "));
            }
            for &(px, py, label) in &places {
                if series.marks {
                    out.push_str(&mark(i, px, py));
                    taken.push([px - 5.0, py - 5.0, px + 5.0, py + 5.0]);
                }
                if !label.is_empty() {
                    labels.push((px, py, label));
                }
            }
            out.push_str("</g>");
        }
        for (px, py, label) in labels {
            let (tx, ty) = beside(px, py, label, &mut taken);
            let _ = write!(out, r#"<text class="label" x="{tx:.1}" y="{ty:.1}">{}</text>"#, escape(label));
        }
        if self.series.len() > 1 {
            self.legend(&mut out);
        }
        out.push_str("</svg>");
        out
    }

    fn axes(&self, out: &mut String, x: &Ruler, y: &Ruler) {
        let [left, top, right, bottom] = FRAME;
        let mut last = f64::NEG_INFINITY;
        for tick in x.ticks() {
            let Some(at) = x.place(tick) else { continue };
            let _ = write!(out, r#"<line class="grid" x1="{at:.1}" x2="{at:.1}" y1="{top}" y2="{bottom}"/>"#);
            if at - last > 28.0 {
                let text = number(tick);
                let _ = write!(
                    out,
                    r#"<text class="tick" x="{at:.1}" y="{}" text-anchor="middle">{text}</text>"#,
                    bottom + 17.0
                );
                last = at;
            }
        }
        let mut last = f64::INFINITY;
        for tick in y.ticks() {
            let Some(at) = y.place(tick) else { continue };
            let _ = write!(out, r#"<line class="grid" x1="{left}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/>"#);
            if last - at > 15.0 {
                let text = number(tick);
                let _ = write!(
                    out,
                    r#"<text class="tick" x="{}" y="{:.1}" text-anchor="end">{text}</text>"#,
                    left - 7.0,
                    at + 4.0
                );
                last = at;
            }
        }
        let (middle, half) = ((left + right) / 2.0, (top + bottom) / 2.0);
        let log = |axis: &Axis| if axis.scale == Scale::Log { " (log scale)" } else { "" };
        let (xl, yl) = (escape(&self.x.label), escape(&self.y.label));
        let _ =
            write!(out, r#"<text x="{middle}" y="{}" text-anchor="middle">{xl}{}</text>"#, bottom + 40.0, log(&self.x));
        let _ = write!(
            out,
            r#"<text transform="translate(16 {half}) rotate(-90)" text-anchor="middle">{yl}{}</text>"#,
            log(&self.y)
        );
    }

    fn legend(&self, out: &mut String) {
        for (i, series) in self.series.iter().enumerate() {
            let (x, y) = (FRAME[0] + 226.0 * (i % 3) as f64, HEIGHT + 10.0 + 22.0 * (i / 3) as f64);
            let _ = write!(out, r#"<g class="s{}">"#, i % 7);
            if series.line {
                let dash = ["", "7 4", "2 3", "9 3 2 3"][i / 2 % 4];
                let (from, to) = (x - 14.0, x + 14.0);
                let _ = write!(
                    out,
                    r#"<line class="curve" stroke-dasharray="{dash}" x1="{from}" x2="{to}" y1="{y}" y2="{y}"/>"#
                );
            }
            if series.marks {
                out.push_str(&mark(i, x, y));
            }
            let _ = write!(out, r#"</g><text x="{}" y="{}">{}</text>"#, x + 20.0, y + 4.0, escape(&series.name));
        }
    }
}

/// A mark whose shape tells series apart without colour.
fn mark(series: usize, x: f64, y: f64) -> String {
    let polygon = |points: &[(f64, f64)]| {
        let all: Vec<String> = points.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
        format!(r#"<polygon class="mark" points="{}"/>"#, all.join(" "))
    };
    match series % 5 {
        0 => format!(r#"<circle class="mark" cx="{x:.1}" cy="{y:.1}" r="5"/>"#),
        1 => polygon(&[(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)]),
        2 => polygon(&[(0.0, -6.0), (5.5, 4.5), (-5.5, 4.5)]),
        3 => polygon(&[(0.0, -6.2), (6.2, 0.0), (0.0, 6.2), (-6.2, 0.0)]),
        _ => polygon(&[(0.0, 6.0), (5.5, -4.5), (-5.5, -4.5)]),
    }
}

/// A place for a label beside its point that overlaps nothing placed so far, if there is one.
fn beside(x: f64, y: f64, label: &str, taken: &mut Vec<Area>) -> (f64, f64) {
    let [character, height] = CHARACTER;
    let width = character * label.chars().count() as f64;
    let around = [
        (9.0, 4.0),
        (-width - 9.0, 4.0),
        (-width / 2.0, -10.0),
        (-width / 2.0, 19.0),
        (8.0, -9.0),
        (8.0, 17.0),
        (-width - 8.0, -9.0),
        (-width - 8.0, 17.0),
    ];
    let further = (2..5).flat_map(|k| {
        [(9.0, -11.0 * f64::from(k)), (9.0, 4.0 + 11.0 * f64::from(k)), (-width - 9.0, -11.0 * f64::from(k))]
    });
    let area = |(dx, dy): (f64, f64)| [x + dx, y + dy - height + 3.0, x + dx + width, y + dy + 3.0];
    let free = |a: &Area| {
        let inside = a[0] >= FRAME[0] && a[2] <= WIDTH && a[1] >= 0.0 && a[3] <= FRAME[3];
        inside && !taken.iter().any(|t| a[0] < t[2] && t[0] < a[2] && a[1] < t[3] && t[1] < a[3])
    };
    let chosen = around.into_iter().chain(further).find(|&offset| free(&area(offset))).unwrap_or(around[0]);
    taken.push(area(chosen));
    (x + chosen.0, y + chosen.1)
}

/// A number as a person writes it: no needless digits.
pub fn number(v: f64) -> String {
    match v.abs() {
        _ if v == 0.0 => "0".into(),
        a if a >= 1e6 => format!("{} M", trimmed(v / 1e6, 2)),
        a if a >= 100.0 => trimmed(v, 0),
        a if a >= 1.0 => trimmed(v, 2),
        a if a >= 1e-3 => trimmed(v, 4),
        _ => format!("{v:e}"),
    }
}

fn trimmed(v: f64, digits: usize) -> String {
    let text = format!("{v:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}

/// Text that HTML takes as text.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: &[(f64, f64)], scale: Scale) -> Chart {
        let axis = |label: &str| Axis { label: label.into(), scale };
        let points = points.iter().map(|&(x, y)| Point { x, y, label: "a<b".into() }).collect();
        let series = vec![Series { name: "s".into(), points, line: true, marks: true }];
        Chart { title: "t".into(), x: axis("x, ms"), y: axis("y"), series, rules: vec![] }
    }

    #[test]
    fn every_point_is_drawn_once_and_text_is_escaped() {
        let svg = chart(&[(1.0, 2.0), (10.0, 5.0), (100.0, 3.0)], Scale::Log).svg();
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b") && svg.contains("x, ms (log scale)"));
        assert_eq!(svg.matches("<g").count(), svg.matches("</g>").count());
    }

    #[test]
    fn odd_values_break_nothing() {
        for points in [&[][..], &[(5.0, 5.0)], &[(0.0, -1.0), (f64::NAN, 2.0), (f64::INFINITY, 1.0)]] {
            for scale in [Scale::Linear, Scale::Log] {
                let svg = chart(points, scale).svg();
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            }
        }
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(Ruler::new(Scale::Linear, &[0.0, 10.0], 0.0, 1.0).ticks(), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        let log = Ruler::new(Scale::Log, &[8.0, 120.0], 0.0, 1.0).ticks();
        assert_eq!(log.iter().map(|v| number(*v)).collect::<Vec<_>>(), ["7", "10", "20", "30", "50", "70", "100"]);
        assert_eq!(number(2_500_000.0), "2.5 M");
    }
}
