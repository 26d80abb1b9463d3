//! Renders profiles as CSV, as a table with sparklines, and as a figure with the paper's three panels.

use std::fmt::Write as _;

use super::{Profile, Signal};
use crate::chart::{Axis, Figure, Marks, Panel, Scale, Series};

/// A statistic: short name, the paper's name, and getter.
type Statistic = (&'static str, &'static str, fn(&Signal) -> Option<f64>);

/// The three statistics of the paper's section 3, in the order of its panels.
const STATISTICS: [Statistic; 3] = [
    ("squared mean", "Average channel squared mean", |s| Some(s.squared_mean)),
    ("variance", "Average channel variance", |s| Some(s.variance)),
    ("residual variance", "Residual average channel variance", |s| s.residual_variance),
];
/// Ratio of largest to smallest value above which an axis is logarithmic.
const WIDE: f64 = 1e4;
/// The same where networks have panels of their own on one axis.
const WIDE_IN_ROWS: f64 = 50.0;
/// Most networks whose lines are told apart in one panel.
const OVERLAID: usize = 4;
/// Characters of a sparkline.
const SPARK_WIDTH: usize = 60;

/// Comma-separated values (RFC 4180) of all networks, one line per block; missing values are empty.
pub fn csv(profiles: &[Profile]) -> String {
    let header = [
        "network",
        "index",
        "block",
        "ends_stage",
        "squared_mean",
        "variance",
        "residual_squared_mean",
        "residual_variance",
        "expected_variance",
        "max_abs",
    ];
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut line = |fields: [String; 10]| writer.write_record(fields).expect("memory takes lines of one length");
    line(header.map(String::from));
    for profile in profiles {
        for (i, s) in profile.blocks.iter().enumerate() {
            let optional = |v: Option<f64>| v.map_or_else(String::new, |v| v.to_string());
            line([
                profile.network.clone(),
                i.to_string(),
                s.block.clone(),
                s.ends_stage.to_string(),
                s.squared_mean.to_string(),
                s.variance.to_string(),
                optional(s.residual_squared_mean),
                optional(s.residual_variance),
                optional(s.expected_variance),
                s.max_abs.to_string(),
            ]);
        }
    }
    String::from_utf8(writer.into_inner().expect("memory needs no flushing")).expect("fields are text")
}

/// A table of each network: three sparklines with their ends, then a line per block (only the last of each stage if
/// there are many).
pub fn table(profiles: &[Profile]) -> String {
    let mut out = String::new();
    for p in profiles {
        let (height, width) = p.size;
        let _ = writeln!(
            out,
            "{}: {} blocks, {} images of {height}x{width}, {} ({:.1} s)",
            p.network,
            p.blocks.len(),
            p.images,
            p.input,
            p.seconds
        );
        for (name, _, read) in STATISTICS {
            let values: Vec<f64> = p.blocks.iter().map(|s| read(s).unwrap_or(f64::NAN)).collect();
            let known = || values.iter().copied().filter(|v| v.is_finite());
            let (low, high) = (known().fold(f64::INFINITY, f64::min), known().fold(f64::NEG_INFINITY, f64::max));
            let range = if low <= high { format!("{} … {}", number(low), number(high)) } else { "none".into() };
            let _ = writeln!(out, "  {name:<18} {} {range}", sparkline(&values));
        }
        let few = p.blocks.len() <= 40;
        let _ = writeln!(
            out,
            "  {:<16} {:>12} {:>12} {:>12} {:>18} {:>12}",
            if few { "block" } else { "end of stage" },
            "squared mean",
            "variance",
            "expected",
            "residual variance",
            "largest |x|"
        );
        for s in p.blocks.iter().filter(|s| few || s.ends_stage) {
            let optional = |v: Option<f64>| v.map_or_else(|| "-".into(), number);
            let _ = writeln!(
                out,
                "  {:<16} {:>12} {:>12} {:>12} {:>18} {:>12}",
                s.block,
                number(s.squared_mean),
                number(s.variance),
                optional(s.expected_variance),
                optional(s.residual_variance),
                number(s.max_abs)
            );
        }
    }
    out
}

/// Formats a number with about five significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        m if !m.is_finite() || !(1e-3..1e5).contains(&m) => format!("{value:.2e}"),
        m if m < 10.0 => format!("{value:.4}"),
        m if m < 1000.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

/// A sparkline with eight heights from the smallest to the largest value (logarithmic if they are far apart); `!` for
/// non-finite values. Long series are thinned.
fn sparkline(values: &[f64]) -> String {
    const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let log = spread(finite()) > WIDE;
    let length = |v: f64| if log { v.max(f64::MIN_POSITIVE).ln() } else { v };
    let (low, high) = finite().map(length).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    // so that rounding noise looks flat
    let span = (high - low).max(1e-6 * high.abs()).max(f64::MIN_POSITIVE);
    let shown = values.len().min(SPARK_WIDTH);
    (0..shown)
        .map(|i| values[i * values.len() / shown])
        .map(|v| {
            if v.is_finite() { HEIGHTS[((length(v) - low) / span * 7.0).round().clamp(0.0, 7.0) as usize] } else { '!' }
        })
        .collect()
}

/// The ratio of the largest positive value to the smallest.
fn spread(values: impl Iterator<Item = f64>) -> f64 {
    let (mut low, mut high) = (f64::INFINITY, 0.0);
    for v in values.filter(|v| *v > 0.0) {
        (low, high) = (f64::min(low, v), f64::max(high, v));
    }
    high / low
}

/// The paper's three panels; markers show the ends of stages. A few networks are overlaid, of many each has a row of its own, on
/// the same axes.
pub fn figure(profiles: &[Profile], title: &str) -> Figure {
    let all = |read: fn(&Signal) -> Option<f64>| {
        profiles.iter().flat_map(move |p| p.blocks.iter().filter_map(read)).filter(|v| v.is_finite())
    };
    let largest_variance = all(|s| Some(s.variance)).fold(0.0, f64::max);
    let blocks = profiles.iter().map(|p| p.blocks.len()).max().unwrap_or_default();
    let overlaid = profiles.len() <= OVERLAID;
    let panel = |(short, _, read): Statistic, shown: &[Profile], title: &str| {
        let is_mean = short == "squared mean";
        let largest = all(read).fold(0.0, f64::max);
        // squared means near zero need no logarithmic axis; in rows, small networks are a line at the bottom much earlier
        let apart = if overlaid { WIDE } else { WIDE_IN_ROWS };
        let scale = if spread(all(read)) > apart && !(is_mean && largest < 1e3) { Scale::Log } else { Scale::Linear };
        // nor do means that are negligible beside the variance
        let least = 0.02 * largest_variance;
        let range = if is_mean && scale == Scale::Linear && largest < least {
            Some((0.0, least))
        } else if overlaid {
            None
        } else if scale == Scale::Log {
            Some((all(read).filter(|v| *v > 0.0).fold(largest, f64::min), largest))
        } else {
            Some((0.0, largest))
        };
        let series = |p: &Profile| Series {
            name: if overlaid { p.network.clone() } else { String::new() },
            points: (p.blocks.iter().enumerate()).map(|(i, s)| (i as f64 + 1.0, read(s).unwrap_or(f64::NAN))).collect(),
            line: true,
            marks: Marks::At(p.blocks.iter().enumerate().filter(|(_, s)| s.ends_stage).map(|(i, _)| i).collect()),
            ..Series::default()
        };
        let x_range = (!overlaid).then_some((0.0, blocks as f64));
        let y_label = if overlaid { "" } else { short };
        Panel {
            title: title.into(),
            x: Axis { label: "residual block".into(), range: x_range, ..Axis::default() },
            y: Axis { label: y_label.into(), scale, range, from_zero: true },
            series: shown.iter().map(series).collect(),
            rules: Vec::new(),
        }
    };
    let panels = if overlaid {
        STATISTICS.map(|statistic| panel(statistic, profiles, statistic.1)).into()
    } else {
        let of = |p: &Profile| STATISTICS.map(|statistic| panel(statistic, std::slice::from_ref(p), &p.network));
        profiles.iter().flat_map(of).collect()
    };
    let input = profiles.first().map_or_else(String::new, |p| {
        format!("{} images of {}x{}, {}; marks end the stages", p.images, p.size.0, p.size.1, p.input)
    });
    Figure {
        title: title.into(),
        subtitle: input,
        panels,
        columns: 3,
        panel_size: (380.0, if overlaid { 320.0 } else { 200.0 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparklines_show_shape_and_faults() {
        assert_eq!(sparkline(&[0.0, 1.0, 2.0, 7.0]), "▁▂▃█");
        assert_eq!(sparkline(&[1.0, 10.0, f64::NAN, 1e5]), "▁▂!█");
        assert_eq!(sparkline(&[3.0, 3.0 + 1e-9]), "▁▁");
        assert_eq!(sparkline(&[1.0; 500]).chars().count(), SPARK_WIDTH);
        assert_eq!(sparkline(&[]), "");
    }
}
