//! timm's named configurations of Normalizer-Free networks, and timm's evaluation settings for them.

use super::{AttnKwargs, NfConfig};
use crate::nets::{Colours, Evaluation};

/// Names of the family's architectures.
pub const VARIANTS: [&str; 36] = [
    "nf_regnet_b0",
    "nf_regnet_b1",
    "nf_regnet_b2",
    "nf_regnet_b3",
    "nf_regnet_b4",
    "nf_regnet_b5",
    "nf_resnet26",
    "nf_resnet50",
    "nf_resnet101",
    "nf_seresnet26",
    "nf_seresnet50",
    "nf_seresnet101",
    "nf_ecaresnet26",
    "nf_ecaresnet50",
    "nf_ecaresnet101",
    "nfnet_l0",
    "eca_nfnet_l0",
    "eca_nfnet_l1",
    "eca_nfnet_l2",
    "eca_nfnet_l3",
    "nfnet_f0",
    "nfnet_f1",
    "nfnet_f2",
    "nfnet_f3",
    "nfnet_f4",
    "nfnet_f5",
    "nfnet_f6",
    "nfnet_f7",
    "dm_nfnet_f0",
    "dm_nfnet_f1",
    "dm_nfnet_f2",
    "dm_nfnet_f3",
    "dm_nfnet_f4",
    "dm_nfnet_f5",
    "dm_nfnet_f6",
    "test_nfnet",
];

/// timm's configuration of an architecture.
pub fn variant(name: &str) -> Option<NfConfig> {
    let name = VARIANTS.into_iter().find(|v| *v == name)?;
    let (family, size) = name.rsplit_once('_').unwrap_or((name, ""));
    let config = match family {
        "nf_regnet" => regnet(size),
        "dm_nfnet" => {
            NfConfig { gamma_in_act: true, same_padding: true, skipinit: true, ..nfnet(&scaled_depths(size), 2.0) }
        }
        "nfnet" if size != "l0" => nfnet(&scaled_depths(size), 2.0),
        "nfnet" | "eca_nfnet" => light_nfnet(size, family == "eca_nfnet"),
        "test" => NfConfig {
            channels: vec![32, 64, 96, 128],
            num_features: 192,
            group_size: Some(8),
            ..light_nfnet("test", false)
        },
        _ => resnet(name),
    };
    Some(config)
}

/// Common base of all configurations (defaults of timm's `NfCfg`).
fn base(depths: &[usize], channels: [usize; 4]) -> NfConfig {
    NfConfig {
        depths: depths.to_vec(),
        channels: channels.to_vec(),
        alpha: 0.2,
        stem_type: "3x3".into(),
        stem_chs: None,
        group_size: None,
        attn_layer: None,
        attn_kwargs: AttnKwargs::default(),
        attn_gain: 2.0,
        width_factor: 1.0,
        bottle_ratio: 0.5,
        num_features: 0,
        ch_div: 8,
        reg: false,
        extra_conv: false,
        gamma_in_act: false,
        same_padding: false,
        std_conv_eps: 1e-5,
        skipinit: false,
        act_layer: "silu".into(),
    }
}

fn squeeze(rd_ratio: f64) -> AttnKwargs {
    AttnKwargs { rd_ratio: Some(rd_ratio), ..AttnKwargs::default() }
}

fn regnet(size: &str) -> NfConfig {
    let (depths, channels) = match size {
        "b0" => ([1, 3, 6, 6], [48, 104, 208, 440]),
        "b1" => ([2, 4, 7, 7], [48, 104, 208, 440]),
        "b2" => ([2, 4, 8, 8], [56, 112, 232, 488]),
        "b3" => ([2, 5, 9, 9], [56, 128, 248, 528]),
        "b4" => ([2, 6, 11, 11], [64, 144, 288, 616]),
        _ => ([3, 7, 14, 14], [80, 168, 336, 704]),
    };
    NfConfig {
        group_size: Some(8),
        width_factor: 0.75,
        bottle_ratio: 2.25,
        num_features: 1280 * channels[3] / 440,
        reg: true,
        attn_layer: Some("se".into()),
        attn_kwargs: squeeze(0.5),
        ..base(&depths, channels)
    }
}

fn resnet(name: &str) -> NfConfig {
    let depths = match name.trim_start_matches(|c: char| !c.is_ascii_digit()) {
        "26" => [2, 2, 2, 2],
        "50" => [3, 4, 6, 3],
        _ => [3, 4, 23, 3],
    };
    let attn_layer = match name {
        _ if name.starts_with("nf_se") => Some("se".into()),
        _ if name.starts_with("nf_eca") => Some("eca".into()),
        _ => None,
    };
    NfConfig {
        stem_type: "7x7_pool".into(),
        stem_chs: Some(64),
        bottle_ratio: 0.25,
        act_layer: "relu".into(),
        attn_layer,
        ..base(&depths, [256, 512, 1024, 2048])
    }
}

/// Depths of the F and L sizes: multiples of (1, 2, 6, 3).
fn scaled_depths(size: &str) -> Vec<usize> {
    let n = 1 + size.trim_start_matches(['f', 'l']).parse::<usize>().unwrap_or(0);
    [1, 2, 6, 3].map(|d| d * n).to_vec()
}

fn nfnet(depths: &[usize], feat_mult: f64) -> NfConfig {
    NfConfig {
        stem_type: "deep_quad".into(),
        stem_chs: Some(128),
        group_size: Some(128),
        extra_conv: true,
        num_features: (1536.0 * feat_mult) as usize,
        act_layer: "gelu".into(),
        attn_layer: Some("se".into()),
        attn_kwargs: squeeze(0.5),
        ..base(depths, [256, 512, 1536, 1536])
    }
}

fn light_nfnet(size: &str, eca: bool) -> NfConfig {
    let depths = if size == "test" { vec![1, 1, 1, 1] } else { scaled_depths(size) };
    NfConfig {
        group_size: Some(64),
        bottle_ratio: 0.25,
        act_layer: "silu".into(),
        attn_layer: Some(if eca { "eca" } else { "se" }.into()),
        attn_kwargs: if eca { AttnKwargs::default() } else { squeeze(0.25) },
        ..nfnet(&depths, if matches!(size, "l0" | "test") { 1.5 } else { 2.0 })
    }
}

/// timm's evaluation settings of an architecture.
pub fn evaluation(name: &str) -> Option<Evaluation> {
    let name = VARIANTS.into_iter().find(|v| *v == name)?;
    let plain = |input, test_input| Evaluation { input, test_input, crop_pct: 0.9, ..Evaluation::USUAL };
    let (family, size) = name.rsplit_once('_').unwrap_or((name, ""));
    Some(match (family, size) {
        ("nf_regnet", "b0") => plain(192, Some(256)),
        ("nf_regnet", "b1") => plain(256, Some(288)),
        ("nf_regnet", "b2") => plain(240, Some(272)),
        ("nf_regnet", "b3") => plain(288, Some(320)),
        ("nf_regnet", "b4") => plain(320, Some(384)),
        ("nf_regnet", _) => plain(384, Some(456)),
        ("nfnet" | "eca_nfnet", "l0") => Evaluation { test_crop_pct: Some(1.0), ..plain(224, Some(288)) },
        ("eca_nfnet", "l1") => Evaluation { test_crop_pct: Some(1.0), ..plain(256, Some(320)) },
        ("eca_nfnet", "l2") => Evaluation { test_crop_pct: Some(1.0), ..plain(320, Some(384)) },
        ("eca_nfnet", _) => Evaluation { test_crop_pct: Some(1.0), ..plain(352, Some(448)) },
        ("nfnet" | "dm_nfnet", f) => {
            let (input, test, dm_crop) = match f {
                "f0" => (192, 256, 0.9),
                "f1" => (224, 320, 0.91),
                "f2" => (256, 352, 0.92),
                "f3" => (320, 416, 0.94),
                "f4" => (384, 512, 0.951),
                "f5" => (416, 544, 0.954),
                "f6" => (448, 576, 0.956),
                _ => (480, 608, 0.9),
            };
            match family {
                "dm_nfnet" => Evaluation { crop_pct: dm_crop, crop_mode: "squash", ..plain(input, Some(test)) },
                _ => plain(input, Some(test)),
            }
        }
        ("test", _) => Evaluation { crop_pct: 0.95, norm: Colours::Half, ..plain(160, None) },
        ("nf", "resnet50") => Evaluation { crop_pct: 0.94, ..plain(256, Some(288)) },
        _ => plain(224, None),
    })
}
