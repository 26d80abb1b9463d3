//! Charts as self-contained SVG: panels with labelled axes, lines and points. Must not know what is plotted.
//!
//! Readable in light and dark (colours follow `prefers-color-scheme`), with colour blindness (hues after Okabe & Ito
//! 2008; series also differ by dash and marker), and without scripts. The same figure gives the same bytes.

use std::fmt::Write as _;

/// A figure: panels in rows of `columns`, with one legend above them.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Heading.
    pub title: String,
    /// Smaller line under the heading; may be empty.
    pub subtitle: String,
    /// The panels, in reading order.
    pub panels: Vec<Panel>,
    /// Panels per row.
    pub columns: usize,
    /// Width and height of one panel in pixels, including axes and labels.
    pub panel_size: (f64, f64),
}

/// One pair of axes and its data.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Panel {
    /// Heading.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Data, drawn in this order. Series of the same name share a style and a legend entry across panels.
    pub series: Vec<Series>,
    /// Horizontal reference lines: value and label.
    pub rules: Vec<(f64, String)>,
}

/// One axis.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Axis {
    /// Quantity and unit.
    pub label: String,
    /// Mapping of values to lengths.
    pub scale: Scale,
    /// Ends of the axis; derived from the data if absent.
    pub range: Option<(f64, f64)>,
    /// Whether a linear axis without a range starts at zero.
    pub from_zero: bool,
}

/// Mapping of values to lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Proportional.
    #[default]
    Linear,
    /// Logarithmic; values without a logarithm are not drawn.
    Log,
}

/// One set of points.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// (x, y); a non-finite value interrupts the line.
    pub points: Vec<(f64, f64)>,
    /// Whether points are connected.
    pub line: bool,
    /// Points with a marker.
    pub marks: Marks,
    /// Lower and upper end of each point's vertical interval; may be empty.
    pub intervals: Vec<(f64, f64)>,
    /// Text beside each point; may be empty.
    pub labels: Vec<String>,
}

/// Points of a series with a marker.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Marks {
    /// No points.
    #[default]
    None,
    /// All points.
    All,
    /// Points with these indices.
    At(Vec<usize>),
}

/// Colour on a light and on a dark background, and dash pattern of each series, repeated.
const LOOKS: [(&str, &str, &str); 8] = [
    ("#0072b2", "#5ab4f0", ""),
    ("#d55e00", "#ff8c42", "7 3"),
    ("#00855f", "#35cc9c", "2 2.5"),
    ("#b0518a", "#f09ac9", "9 3 2 3"),
    ("#946a00", "#f0c040", "5 2"),
    ("#3d3d9e", "#a8a8ff", "1 3"),
    ("#7a3b1e", "#e0a080", "12 4"),
    ("#5f6b76", "#b4bec8", "4 4"),
];
const FONT: &str = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
/// Margins around the plotting area of a panel: left, top, right, bottom.
const MARGIN: [f64; 4] = [62.0, 30.0, 16.0, 46.0];
const PADDING: f64 = 12.0;
const LEGEND_LINE: f64 = 20.0;

impl Figure {
    /// The figure as an SVG document, which can be embedded in HTML.
    pub fn svg(&self) -> String {
        let columns = self.columns.clamp(1, self.panels.len().max(1));
        let rows = self.panels.len().div_ceil(columns);
        let width = columns as f64 * self.panel_size.0 + 2.0 * PADDING;
        let legend = self.legend(width);
        let top = if self.subtitle.is_empty() { 40.0 } else { 60.0 };
        let panels_top = top + legend.lines as f64 * LEGEND_LINE + 4.0;
        let height = panels_top + rows as f64 * self.panel_size.1 + PADDING;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"nfold-chart\" role=\"img\" aria-label=\"{0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\">\n<title>{0}</title>\n{1}\
             <rect class=\"ground\" width=\"100%\" height=\"100%\"/>\n",
            escape(&self.title),
            style()
        );
        let left = PADDING + 6.0;
        let _ = writeln!(out, "<text class=\"heading\" x=\"{left}\" y=\"28\">{}</text>", escape(&self.title));
        if !self.subtitle.is_empty() {
            let _ = writeln!(out, "<text class=\"quiet\" x=\"{left}\" y=\"47\">{}</text>", escape(&self.subtitle));
        }
        let _ = writeln!(out, "<g transform=\"translate({left} {top})\">{}</g>", legend.svg);
        let names = self.names();
        for (i, panel) in self.panels.iter().enumerate() {
            let x = PADDING + (i % columns) as f64 * self.panel_size.0;
            let y = panels_top + (i / columns) as f64 * self.panel_size.1;
            let drawn = Drawing::new(panel, self.panel_size).svg(&names);
            let _ = writeln!(out, "<g transform=\"translate({x:.1} {y:.1})\">\n{drawn}</g>");
        }
        out + "</svg>\n"
    }

    /// Names of all series in order of appearance; the index determines the style.
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for series in self.panels.iter().flat_map(|p| &p.series) {
            if !names.contains(&series.name.as_str()) {
                names.push(&series.name);
            }
        }
        names
    }

    fn legend(&self, width: f64) -> Legend {
        let (mut svg, mut x, mut lines) = (String::new(), 0.0, 0);
        let names = self.names();
        for (i, name) in names.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
            let needed = 44.0 + text_width(name, 12.5);
            if lines == 0 || (x > 0.0 && x + needed > width - 3.0 * PADDING) {
                (x, lines) = (0.0, lines + 1);
            }
            let y = (lines - 1) as f64 * LEGEND_LINE + 10.0;
            let of_name = || self.panels.iter().flat_map(|p| &p.series).filter(|s| s.name == *name);
            if of_name().any(|s| s.line) {
                let (class, thick, end) = (look_class(i), thickness(i), x + 26.0);
                let _ = write!(svg, "<path class=\"line {class}\"{thick} d=\"M{x:.1} {y:.1}H{end:.1}\"/>");
            }
            if of_name().any(|s| s.marks != Marks::None) {
                svg += &mark(i, x + 13.0, y, 4.0);
            }
            let _ = write!(svg, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", x + 32.0, y + 4.0, escape(name));
            x += needed;
        }
        Legend { svg, lines }
    }
}

struct Legend {
    svg: String,
    lines: usize,
}

/// A panel with fixed scales.
struct Drawing<'a> {
    panel: &'a Panel,
    x: Ruler,
    y: Ruler,
}

impl<'a> Drawing<'a> {
    fn new(panel: &'a Panel, (width, height): (f64, f64)) -> Self {
        let [left, top, right, bottom] = MARGIN;
        let points = || panel.series.iter().flat_map(|s| s.points.iter());
        let xs = points().map(|p| p.0);
        let ends = panel.series.iter().flat_map(|s| s.intervals.iter().flat_map(|i| [i.0, i.1]));
        let ys = points().map(|p| p.1).chain(ends).chain(panel.rules.iter().map(|r| r.0));
        let x = Ruler::new(&panel.x, xs, (left, width - right), 0.02);
        let y = Ruler::new(&panel.y, ys, (height - bottom, top), 0.06);
        Self { panel, x, y }
    }

    fn svg(&self, names: &[&str]) -> String {
        let mut out = String::new();
        let (left, right) = self.x.pixels;
        let (bottom, top) = self.y.pixels;
        let _ = writeln!(out, "<text class=\"title\" x=\"{left:.1}\" y=\"18\">{}</text>", escape(&self.panel.title));
        for tick in self.y.ticks((bottom - top) / 44.0) {
            let at = self.y.at(tick);
            let _ = write!(out, "<path class=\"grid\" d=\"M{left:.1} {at:.1}H{right:.1}\"/>");
            let text = self.y.text(tick);
            let _ =
                writeln!(out, "<text class=\"tick end\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>", left - 7.0, at + 4.0);
        }
        for tick in self.x.ticks((right - left) / 70.0) {
            let at = self.x.at(tick);
            let _ = write!(out, "<path class=\"axis\" d=\"M{at:.1} {bottom:.1}v4\"/>");
            let text = self.x.text(tick);
            let _ = writeln!(out, "<text class=\"tick middle\" x=\"{at:.1}\" y=\"{:.1}\">{text}</text>", bottom + 17.0);
        }
        let _ = writeln!(out, "<path class=\"axis\" d=\"M{left:.1} {bottom:.1}H{right:.1}\"/>");
        let (middle, low) = ((left + right) / 2.0, bottom + 36.0);
        let _ = writeln!(
            out,
            "<text class=\"middle\" x=\"{middle:.1}\" y=\"{low:.1}\">{}</text>",
            escape(&self.panel.x.label)
        );
        let _ = writeln!(
            out,
            "<text class=\"middle\" transform=\"translate(13 {:.1}) rotate(-90)\">{}</text>",
            (bottom + top) / 2.0,
            escape(&self.panel.y.label)
        );
        for (value, label) in &self.panel.rules {
            let Some(at) = self.y.drawn_at(*value) else { continue };
            let _ = write!(out, "<path class=\"rule\" d=\"M{left:.1} {at:.1}H{right:.1}\"/>");
            let label = escape(label);
            let _ = writeln!(
                out,
                "<text class=\"quiet end\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
                right - 2.0,
                at - 4.0
            );
        }
        for series in &self.panel.series {
            let look = names.iter().position(|n| *n == series.name).unwrap_or(0);
            self.series(&mut out, series, look);
        }
        out
    }

    fn series(&self, out: &mut String, series: &Series, look: usize) {
        let class = look_class(look);
        let points: Vec<Option<(f64, f64)>> =
            series.points.iter().map(|p| Some((self.x.drawn_at(p.0)?, self.y.drawn_at(p.1)?))).collect();
        let _ = writeln!(out, "<g><title>{}</title>", escape(&series.name));
        if series.line {
            let mut path = String::new();
            let mut pen = 'M';
            for point in &points {
                match point {
                    Some((x, y)) => {
                        let _ = write!(path, "{pen}{x:.1} {y:.1}");
                        pen = 'L';
                    }
                    None => pen = 'M',
                }
            }
            let _ = writeln!(out, "<path class=\"line {class}\"{} d=\"{path}\"/>", thickness(look));
        }
        for (point, interval) in points.iter().zip(&series.intervals) {
            if let (Some((x, _)), Some(low), Some(high)) =
                (point, self.y.drawn_at(interval.0), self.y.drawn_at(interval.1))
            {
                let _ = writeln!(out, "<path class=\"interval {class}\" d=\"M{x:.1} {low:.1}V{high:.1}\"/>");
            }
        }
        for (i, point) in points.iter().enumerate() {
            let Some((x, y)) = *point else { continue };
            let marked = match &series.marks {
                Marks::None => false,
                Marks::All => true,
                Marks::At(positions) => positions.contains(&i),
            };
            if marked {
                *out += &mark(look, x, y, 4.0);
            }
            if let Some(label) = series.labels.get(i).filter(|l| !l.is_empty()) {
                // a label that would leave the panel is put left of its point
                let fits = x + 8.0 + text_width(label, 11.0) < self.x.pixels.1 + MARGIN[2];
                let (class, x) = if fits { ("quiet", x + 8.0) } else { ("quiet end", x - 8.0) };
                let _ =
                    writeln!(out, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>", y + 4.0, escape(label));
            }
        }
        *out += "</g>\n";
    }
}

/// An axis, with the values and pixels at its ends.
#[derive(Debug, Clone)]
struct Ruler {
    scale: Scale,
    ends: (f64, f64),
    pixels: (f64, f64),
}

impl Ruler {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, pixels: (f64, f64), air: f64) -> Self {
        let usable = |v: &f64| v.is_finite() && (axis.scale == Scale::Linear || *v > 0.0);
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(usable) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
            if axis.scale == Scale::Log {
                (low, high) = (1.0, 10.0);
            }
        }
        let ends = match (axis.range, axis.scale) {
            (Some(range), _) => range,
            (None, Scale::Linear) => {
                let grows_from_zero = axis.from_zero && low >= 0.0;
                let low = if grows_from_zero { 0.0 } else { low };
                // a constant gets a range around it, so that rounding errors aren't magnified
                let least = high.abs().max(low.abs()).max(1e-300) * 0.05;
                let widen = ((least - (high - low)) / 2.0).max(0.0);
                let room = (high - low + 2.0 * widen) * air + widen;
                (if grows_from_zero { 0.0 } else { low - room }, high + room)
            }
            (None, Scale::Log) => {
                let room = ((high / low).ln() * air).max(0.2).exp();
                ((low / room).max(1e-305), (high * room).min(1e305))
            }
        };
        Self { scale: axis.scale, ends, pixels }
    }

    /// Pixel position of a value, if it can be drawn.
    fn drawn_at(&self, value: f64) -> Option<f64> {
        let drawable = value.is_finite() && (self.scale == Scale::Linear || value > 0.0);
        // clamp values far outside of a given range, to keep numbers in the document small
        drawable.then(|| self.at(value).clamp(-9999.0, 9999.0))
    }

    fn at(&self, value: f64) -> f64 {
        let length = |v: f64| if self.scale == Scale::Log { v.ln() } else { v };
        let (low, high) = (length(self.ends.0), length(self.ends.1));
        self.pixels.0 + (length(value) - low) / (high - low) * (self.pixels.1 - self.pixels.0)
    }

    /// About `wanted` round values between the ends.
    fn ticks(&self, wanted: f64) -> Vec<f64> {
        let (low, high) = self.ends;
        let sound = low < high && (high - low).is_finite() && (self.scale == Scale::Linear || low > 0.0);
        if !sound {
            return Vec::new();
        }
        if self.scale == Scale::Log {
            let decades = low.log10().ceil() as i32..=high.log10().floor() as i32;
            let every = (f64::from(decades.end() - decades.start() + 1) / wanted.max(1.0)).ceil().max(1.0) as usize;
            if decades.clone().count() > 2 {
                return decades.step_by(every).map(|d| 10f64.powi(d)).collect();
            }
            let decades = decades.start() - 1..=*decades.end();
            let some = decades.flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d)));
            return some.filter(|t| (low..=high).contains(t)).collect();
        }
        let raw = (high - low) / wanted.max(2.0);
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw).unwrap_or(raw);
        let (from, to) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
        (from..=to).map(|i| i as f64 * step).collect()
    }

    fn text(&self, value: f64) -> String {
        let magnitude = value.abs();
        if magnitude < 1e-12 * (self.ends.1 - self.ends.0).abs() && self.scale == Scale::Linear {
            return "0".into();
        }
        let text = if (1e-4..1e5).contains(&magnitude) {
            // enough digits to distinguish neighbours, without trailing zeros
            let rounded = format!("{value:.6}");
            rounded.trim_end_matches('0').trim_end_matches('.').to_string()
        } else {
            let text = format!("{value:.2e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let digits = digits.trim_end_matches('0').trim_end_matches('.');
            format!("{digits}e{exponent}")
        };
        text.replace('-', "−")
    }
}

fn look_class(i: usize) -> String {
    format!("s{}", i % LOOKS.len())
}

/// Line width of series `i`: styles repeat after the last one, with thicker lines.
fn thickness(i: usize) -> &'static str {
    if i < LOOKS.len() { "" } else { " style=\"stroke-width:4\"" }
}

/// Marker of series `i`: circle, square, diamond and triangle in turn.
fn mark(i: usize, x: f64, y: f64, r: f64) -> String {
    let class = look_class(i);
    let path = match i % 4 {
        0 => return format!("<circle class=\"mark {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\"/>\n"),
        1 => format!("M{:.1} {:.1}h{2}v{2}h-{2}z", x - r, y - r, 2.0 * r),
        2 => format!("M{x:.1} {:.1}l{1} {1}l-{1} {1}l-{1} -{1}z", y - 1.25 * r, 1.25 * r),
        _ => format!("M{x:.1} {:.1}l{} {}h-{}z", y - 1.2 * r, 1.2 * r, 2.1 * r, 2.4 * r),
    };
    format!("<path class=\"mark {class}\" d=\"{path}\"/>\n")
}

fn style() -> String {
    let mut rules = format!(
        ".nfold-chart {{ font: 12.5px {FONT}; color-scheme: light dark; max-width: 100%; height: auto; \
         --ground: #ffffff; --ink: #1c2128; --quiet: #57606a; --grid: #e4e7eb; --axis: #8c959f }}\n\
         .nfold-chart text {{ fill: var(--ink) }} .nfold-chart .heading {{ font-size: 17px; font-weight: 600 }}\n\
         .nfold-chart .title {{ font-size: 13.5px; font-weight: 600 }} .nfold-chart .quiet, .nfold-chart .tick {{ fill: var(--quiet); font-size: 11.5px }}\n\
         .nfold-chart .end {{ text-anchor: end }} .nfold-chart .middle {{ text-anchor: middle }}\n\
         .nfold-chart .ground {{ fill: var(--ground) }} .nfold-chart .grid {{ stroke: var(--grid) }} .nfold-chart .axis {{ stroke: var(--axis); fill: none }}\n\
         .nfold-chart .rule {{ stroke: var(--quiet); stroke-dasharray: 1 3 }}\n\
         .nfold-chart .line {{ fill: none; stroke-width: 2; stroke-linejoin: round }} .nfold-chart .interval {{ stroke-width: 1.5 }}\n\
         .nfold-chart .mark {{ stroke: var(--ground) !important; stroke-width: 1 }}\n"
    );
    let looks = |pick: fn(&(&'static str, &'static str, &'static str)) -> &'static str| {
        LOOKS.iter().enumerate().map(|(i, l)| format!("--s{i}: {}", pick(l))).collect::<Vec<_>>().join("; ")
    };
    let _ = writeln!(rules, ".nfold-chart {{ {} }}", looks(|l| l.0));
    let _ = writeln!(
        rules,
        "@media (prefers-color-scheme: dark) {{ .nfold-chart {{ --ground: #14171c; --ink: #e6e9ed; --quiet: #a3adb8; \
         --grid: #2c323a; --axis: #6e7781; {} }} }}",
        looks(|l| l.1)
    );
    for (i, (_, _, dash)) in LOOKS.iter().enumerate() {
        let _ = writeln!(
            rules,
            ".nfold-chart .s{i} {{ stroke: var(--s{i}); }} .nfold-chart .mark.s{i} {{ fill: var(--s{i}) }}"
        );
        if !dash.is_empty() {
            let _ = writeln!(rules, ".nfold-chart .line.s{i} {{ stroke-dasharray: {dash} }}");
        }
    }
    format!("<style>\n{rules}</style>\n")
}

/// Approximate width of a text, in pixels.
fn text_width(text: &str, size: f64) -> f64 {
    text.chars().map(|c| if "ijlt.,:;|'()[] ".contains(c) { 0.34 } else { 0.6 }).sum::<f64>() * size
}

/// Escapes text for HTML and SVG; drops control characters.
pub fn escape(text: &str) -> String {
    let printable = text.chars().filter(|c| !c.is_control());
    let mut out = String::with_capacity(text.len());
    for c in printable {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure() -> Figure {
        let series = |name: &str, k: f64| Series {
            name: name.into(),
            points: (0..20).map(|i| (f64::from(i), k * f64::from(i) + 1.0)).collect(),
            line: true,
            marks: Marks::At(vec![4, 19]),
            ..Series::default()
        };
        let axis = |label: &str| Axis { label: label.into(), ..Axis::default() };
        let panel = Panel {
            title: "variance".into(),
            x: axis("block"),
            y: axis("σ²"),
            series: vec![series("a <b> & \"c\"", 1.0), series("second", 0.3)],
            rules: vec![(4.0, "limit".into())],
        };
        Figure {
            title: "Two lines".into(),
            subtitle: "for a test".into(),
            panels: vec![panel.clone(), Panel { y: Axis { scale: Scale::Log, ..axis("σ²") }, ..panel }],
            columns: 2,
            panel_size: (380.0, 300.0),
        }
    }

    #[test]
    fn no_two_series_look_alike() {
        let mut many = figure();
        let one = many.panels[0].series[0].clone();
        many.panels[0].series = (0..12).map(|i| Series { name: format!("series {i}"), ..one.clone() }).collect();
        let svg = many.svg();
        let mut looks: Vec<&str> =
            svg.split("<path class=\"line ").skip(1).filter_map(|l| l.split(" d=").next()).collect();
        looks.sort_unstable();
        looks.dedup();
        assert_eq!(looks.len(), 12 + 2, "and two of the second panel: {looks:?}");
    }

    #[test]
    fn everything_is_there_and_escaped() {
        let svg = figure().svg();
        assert_eq!(svg, figure().svg());
        for part in
            ["Two lines", "for a test", "a &lt;b&gt; &amp; &quot;c&quot;", ">second</text>", ">σ²</text>", "limit"]
        {
            assert!(svg.contains(part), "{part}");
        }
        assert_eq!(svg.matches("class=\"line s1\"").count(), 3, "two panels and the legend");
        assert_eq!(svg.matches("<circle").count(), 5, "two marks a panel and the legend's");
        assert!(svg.contains("prefers-color-scheme: dark") && !svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn holes_interrupt_and_never_write_nonsense() {
        let mut figure = figure();
        figure.panels[1].series[0].points = vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 1e300), (3.0, 0.0), (4.0, 1e-300)];
        figure.panels[0].series[0].points = vec![(f64::INFINITY, 1.0); 3];
        figure.panels[0].series.truncate(1);
        let svg = figure.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let log = svg.matches("class=\"line s0\" d=\"M").last().map(|_| svg.split("class=\"line s0\" d=\"").last());
        let path = log.flatten().and_then(|rest| rest.split('"').next()).expect("drawn");
        assert_eq!(path.matches('M').count(), 3, "{path}");
    }

    #[test]
    fn ticks_are_round() {
        let ruler = |scale, ends| Ruler { scale, ends, pixels: (0.0, 100.0) };
        let texts = |r: &Ruler, n: f64| r.ticks(n).into_iter().map(|t| r.text(t)).collect::<Vec<_>>();
        assert_eq!(texts(&ruler(Scale::Linear, (0.0, 52.0)), 5.0), ["0", "20", "40"]);
        assert_eq!(texts(&ruler(Scale::Linear, (-0.11, 0.21)), 4.0), ["−0.1", "0", "0.1", "0.2"]);
        assert_eq!(texts(&ruler(Scale::Log, (0.5, 2e6)), 3.0), ["1", "1000", "1e6"]);
        assert_eq!(texts(&ruler(Scale::Log, (1.5, 6.0)), 3.0), ["2", "5"]);
        assert_eq!(texts(&ruler(Scale::Log, (0.02, 500.0)), 2.0), ["0.1", "10"], "few, not all of them");
        let constant = Ruler::new(&Axis::default(), [3.0, 3.0 + 1e-12].into_iter(), (0.0, 100.0), 0.05);
        assert!(constant.ends.1 - constant.ends.0 > 0.1, "{constant:?}");
    }
}
