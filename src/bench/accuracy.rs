//! Published ImageNet-1k accuracy of timm's weights, to compare with latency. nfold measured none of it.

use serde::{Deserialize, Serialize};

/// Source of a figure: `results/results-imagenet.csv` of huggingface/pytorch-image-models.
const AUGUST: &str = "timm results/results-imagenet.csv, snapshot aa4b585 (8 Aug 2026)";
const OLDER: &str = "timm results/results-imagenet.csv, commit 0173a139";

/// A published accuracy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// Top-1 accuracy on the ImageNet-1k validation set, in per cent.
    pub top1: f64,
    /// timm's tag of the weights with this accuracy.
    pub weights: String,
    /// Source of the figure.
    pub source: String,
}

/// Architecture, side in pixels, top-1, weights, source: the best ImageNet-1k weights of an architecture at that size.
const TABLE: [(&str, u32, f64, &str, &str); 27] = [
    ("nf_regnet_b1", 256, 78.71, "ra2_in1k", AUGUST),
    ("nf_regnet_b1", 288, 79.37, "ra2_in1k", AUGUST),
    ("nf_resnet50", 256, 80.24, "ra2_in1k", AUGUST),
    ("nf_resnet50", 288, 80.66, "ra2_in1k", AUGUST),
    ("nfnet_l0", 224, 81.87, "ra2_in1k", AUGUST),
    ("nfnet_l0", 288, 82.77, "ra2_in1k", AUGUST),
    ("eca_nfnet_l0", 224, 81.76, "ra2_in1k", AUGUST),
    ("eca_nfnet_l0", 288, 82.59, "ra2_in1k", AUGUST),
    ("dm_nfnet_f0", 256, 83.486, "dm_in1k", OLDER),
    ("resnet18", 224, 71.50, "a1_in1k", AUGUST),
    ("resnet18", 288, 73.16, "a1_in1k", AUGUST),
    ("resnet26", 224, 75.30, "bt_in1k", AUGUST),
    ("resnet34", 224, 76.42, "a1_in1k", AUGUST),
    ("resnet34", 288, 77.918, "a1_in1k", OLDER),
    ("resnet50", 224, 80.38, "a1_in1k", AUGUST),
    ("resnet50", 288, 81.24, "a1_in1k", AUGUST),
    ("resnet101", 288, 82.778, "a1h_in1k", OLDER),
    ("resnet101d", 320, 83.016, "ra2_in1k", OLDER),
    ("regnety_004", 224, 75.598, "tv2_in1k", OLDER),
    ("regnety_008", 224, 76.33, "pycls_in1k", AUGUST),
    ("regnety_008_tv", 224, 78.67, "tv2_in1k", AUGUST),
    ("regnety_016", 224, 80.67, "tv2_in1k", AUGUST),
    ("regnety_032", 288, 82.728, "ra_in1k", OLDER),
    ("efficientnet_b0", 224, 78.57, "ra4_e3600_r224_in1k", AUGUST),
    ("efficientnet_b1", 256, 78.81, "ft_in1k", AUGUST),
    ("efficientnet_b1", 288, 81.44, "ra4_e3600_r240_in1k", AUGUST),
    ("efficientnet_b3", 320, 82.242, "ra2_in1k", OLDER),
];

/// Accuracy that timm publishes for an architecture (without tag) at a square size, if the table has it.
pub fn published(architecture: &str, height: usize, width: usize) -> Option<Published> {
    let found = TABLE.iter().find(|row| row.0 == architecture && row.1 as usize == height && height == width)?;
    Some(Published { top1: found.2, weights: found.3.into(), source: found.4.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_apart() {
        assert_eq!(published("nf_regnet_b1", 288, 288).expect("known").top1, 79.37);
        assert_eq!(published("nf_regnet_b1", 256, 256).expect("known").top1, 78.71);
        assert_eq!(published("nf_regnet_b1", 288, 256), None);
        assert_eq!(published("nf_regnet_b0", 256, 256), None);
    }
}
