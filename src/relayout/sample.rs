//! A small classifier with every operator that [`lay_out`](super::blocked_layout::lay_out) writes: one image through it
//! shows whether a runtime takes them as they are meant.

use super::Kernels;
use crate::graph::{Emission, GraphBuilder, GraphError, Map, Term};
use crate::model::{Gate, Precision};
use crate::nets::activation::Activation;
use crate::nets::{Conv, Norm, ShortcutPool};

/// Side of the image, in pixels: its maps have so many that convolutions in groups divide them, and come to have so few that they don't.
/// How larger maps are divided shows in a model's golden answer.
pub const SIDE: usize = 18;

/// The classifier as ONNX, its widths being multiples of `block`; for our kernels with groups of less than that too.
pub fn sample(block: usize, kernels: Kernels) -> Result<Vec<u8>, GraphError> {
    let (wide, side) = (2 * block, SIDE as u32);
    let (precision, gate) = (Precision::Fp32, Gate::Resize);
    let emission = Emission { height: side, width: side, dynamic: false, precision, gate, same_padding: false };
    let (mut g, image) = GraphBuilder::new(emission, 3);

    let stem = conv(&mut g, &image, "stem", wide, 3, 1)?;
    let stem = g.activation(&stem, Activation::Silu, "stem.act");
    let shortcut = g.average_pool(&stem, ShortcutPool::AverageSame, "shortcut.pool");
    let shortcut = conv(&mut g, &shortcut, "shortcut", wide, 1, 1)?;

    let x = conv(&mut g, &stem, "pointwise", wide, 1, 1)?;
    let x = g.activation(&x, Activation::LeakyRelu, "pointwise.act");
    let x = conv(&mut g, &x, "grouped", wide, 3, 2)?;
    let x = if kernels == Kernels::Own {
        let x = g.activation(&x, Activation::Silu, "grouped.act");
        let x = conv(&mut g, &x, "small groups", wide, 3, 4)?;
        let x = g.activation(&x, Activation::Gelu, "small groups.act");
        let x = conv(&mut g, &x, "expand", wide, 1, 1)?;
        let x = g.activation(&x, Activation::Silu, "expand.act");
        conv(&mut g, &x, "small groups again", wide, 3, 4)?
    } else {
        x
    };
    let mean = g.global_average_pool(&x, "gate.mean");
    let gate = conv(&mut g, &mean, "gate.narrow", block, 1, 1)?;
    let gate = g.activation(&gate, Activation::Relu, "gate.act");
    let gate = conv(&mut g, &gate, "gate.widen", wide, 1, 1)?;
    let gate = g.sigmoid(&gate, "gate.sigmoid");
    let x = g.gate(&x, &gate, "gate");
    let x = g.activation(&x, Activation::Gelu, "gate.gelu");
    let x = conv(&mut g, &x, "depthwise", wide, 3, wide)?;
    let mean = g.global_average_pool(&x, "mix.mean");
    let weight = g.constant("mix.weight", &[1, 1, 3], &numbers(3, 1))?;
    let mix = g.channel_conv(&mean, &weight, 3, "mix.conv")?;
    let x = g.gate(&x, &mix, "mix");
    let x = if kernels == Kernels::Own { g.activation(&x, Activation::Silu, "mix.act") } else { x };
    let x = conv(&mut g, &x, "project", wide, 1, 1)?;

    let x = g.add(&x, &shortcut, "sum");
    let x = g.activation(&x, Activation::Relu, "sum.act");
    let x = g.max_pool(&x, "max");
    let x = if kernels == Kernels::Own {
        let x = g.activation(&x, Activation::Silu, "strided.act");
        strided(&mut g, &x, "strided", wide, 1, 1, 2)?
    } else {
        x
    };
    let x = conv(&mut g, &x, "last", wide, 1, 1)?;
    let x = g.activation(&x, Activation::Tanh, "last.act");
    let x = g.average_pool(&x, ShortcutPool::Average2, "average");

    let weight = g.constant("head.weight", &[wide, wide], &numbers(wide * wide, wide))?;
    let bias = g.constant("head.bias", &[wide], &numbers(wide, 1))?;
    let pooled = g.global_average_pool(&x, "head.global_pool");
    let values = g.flatten(&pooled, "head.flatten");
    g.classifier(&[Term { values, width: pooled.chs, weight }], &bias, wide, "head");
    g.finish(wide, &[])
}

/// An image for it, `[3, SIDE, SIDE]`.
pub fn image() -> Vec<f32> {
    numbers(3 * SIDE * SIDE, 1).into_iter().map(|v| v as f32).collect()
}

fn conv(
    g: &mut GraphBuilder,
    x: &Map,
    name: &str,
    out_chs: usize,
    kernel: usize,
    groups: usize,
) -> Result<Map, GraphError> {
    strided(g, x, name, out_chs, kernel, groups, 1)
}

fn strided(
    g: &mut GraphBuilder,
    x: &Map,
    name: &str,
    out_chs: usize,
    kernel: usize,
    groups: usize,
    stride: usize,
) -> Result<Map, GraphError> {
    let norm = Norm::Plain;
    let c = Conv { name: name.into(), in_chs: x.chs, out_chs, kernel, stride, dilation: 1, groups, norm };
    let shape = c.weight_shape();
    let weight = g.constant(&format!("{name}.weight"), &shape, &numbers(shape.iter().product(), c.fan_in()))?;
    let bias = g.constant(&format!("{name}.bias"), &[out_chs], &numbers(out_chs, 1))?;
    Ok(g.conv(x, &c, &weight, Some(&bias)))
}

/// So many numbers between -1 and 1, over √`fan_in`: each in another place would make another sum.
fn numbers(count: usize, fan_in: usize) -> Vec<f64> {
    let scale = (fan_in as f64).sqrt();
    (0..count as u64).map(|i| (((i * 2_654_435_761) >> 9) % 1024) as f64 / 512.0 - 1.0).map(|v| v / scale).collect()
}
