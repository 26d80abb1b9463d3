//! Charts in the documents are drawn from the raw files beside them. `UPDATE_FIGURES=1 cargo test figures::` redraws.

use std::collections::BTreeMap;
use std::fs;

use nfold::chart::{Axis, Figure, Marks, Panel, Scale, Series};

use crate::cli::project;

const FAMILIES: [(&str, &str); 5] = [
    ("nf_regnet", "NF-RegNet"),
    ("nf_resnet", "NF-ResNet"),
    ("resnet", "ResNet (BN)"),
    ("regnety", "RegNetY (BN)"),
    ("efficientnet", "EfficientNet (BN)"),
];

/// docs/figures/front.svg from docs/benchmarks/engine.csv: what timm publishes as top-1 against measured latency.
#[test]
fn the_front_is_drawn_from_its_data() {
    let table = fs::read_to_string(project("docs/benchmarks/engine.csv")).unwrap();
    let mut rows = table.lines().map(|l| l.split(',').collect::<Vec<_>>());
    let names = rows.next().unwrap();
    let column = |name: &str| names.iter().position(|n| *n == name).unwrap_or_else(|| panic!("no column {name}"));
    let (model, size, threads, median, top1) =
        (column("model"), column("height"), column("threads"), column("median_ms"), column("top1"));
    // latency, top-1, label of each network that has a published accuracy
    let mut families: BTreeMap<usize, Vec<(f64, f64, String)>> = BTreeMap::new();
    for row in rows.filter(|r| r[threads] == "1" && !r[top1].is_empty()) {
        let family = FAMILIES.iter().position(|(start, _)| row[model].starts_with(start)).unwrap();
        let label = format!("{}@{}", row[model], row[size]);
        families.entry(family).or_default().push((row[median].parse().unwrap(), row[top1].parse().unwrap(), label));
    }
    let series = families.into_iter().map(|(family, mut points)| {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Series {
            name: FAMILIES[family].1.into(),
            points: points.iter().map(|p| (p.0, p.1)).collect(),
            labels: points.into_iter().map(|p| p.2).collect(),
            line: true,
            marks: Marks::All,
            ..Series::default()
        }
    });
    let panel = Panel {
        x: Axis {
            label: "median latency of an image, 1 thread, ms (log scale)".into(),
            scale: Scale::Log,
            ..Axis::default()
        },
        y: Axis { label: "ImageNet-1k top-1 as published, %".into(), ..Axis::default() },
        series: series.collect(),
        ..Panel::default()
    };
    assert!(panel.series.len() == 5 && panel.series.iter().map(|s| s.points.len()).sum::<usize>() == 10, "{panel:?}");
    let figure = Figure {
        title: "Accuracy against latency: up and to the left is better".into(),
        subtitle: "every network folded by nfold, ONNX Runtime 1.28, AMD EPYC (Zen 3); docs/benchmarks.md".into(),
        panels: vec![panel],
        columns: 1,
        panel_size: (860.0, 400.0),
    };
    let file = project("docs/figures/front.svg");
    if std::env::var_os("UPDATE_FIGURES").is_some() {
        fs::write(&file, figure.svg()).unwrap();
    }
    assert!(
        fs::read_to_string(&file).unwrap_or_default() == figure.svg(),
        "docs/figures/front.svg is stale: UPDATE_FIGURES=1"
    );
}
