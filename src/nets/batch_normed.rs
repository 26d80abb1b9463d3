//! The shape that RegNet and EfficientNet share: every convolution followed by batch normalisation, blocks of a
//! straight branch with channel attention before its last convolution. Knows neither family's numbers.

use super::activation::Activation;
use super::{Attention, Conv, Init, Norm, Pool, TensorSpec};

/// A network of either family, every convolution named and sized.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchNormedPlan {
    /// `regnet` or `efficientnet`.
    pub family: &'static str,
    /// Activation.
    pub activation: Activation,
    /// Stem convolution, followed by the activation.
    pub stem: Conv,
    /// Blocks in order.
    pub blocks: Vec<BatchNormedBlock>,
    /// Convolution after the blocks, followed by the activation.
    pub final_conv: Option<Conv>,
    /// The activation once more before the classifier, where the last block ends without one.
    pub final_act: bool,
    /// Module path of the classifier.
    pub classifier: &'static str,
    /// How a fresh classifier's weights are filled; its bias is zero.
    pub classifier_init: Init,
    /// A fresh branch starts at zero: the scale after its last convolution is zero.
    pub zero_init_last: bool,
    /// TensorFlow's SAME padding, asymmetric where it must be.
    pub same_padding: bool,
    /// Channels of the last map.
    pub num_features: usize,
    /// What the classifier sees of them.
    pub pool: Pool,
    /// Number of classes.
    pub classes: usize,
}

/// A block: `f(x) + shortcut`, the activation after it where the family has one.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchNormedBlock {
    /// Module path.
    pub name: String,
    /// Convolutions of the branch; the activation runs between them, not after the last.
    pub convs: Vec<Conv>,
    /// Gates the input of the last convolution.
    pub attention: Option<Attention>,
    /// What is added to the branch.
    pub shortcut: Shortcut,
    /// The activation runs on the sum.
    pub activated: bool,
    /// The activation runs on the branch, before the sum.
    pub branch_activated: bool,
}

/// What a block adds to its branch.
#[derive(Debug, Clone, PartialEq)]
pub enum Shortcut {
    /// Nothing.
    None,
    /// The block's input.
    Identity,
    /// A convolution of the block's input.
    Conv(Conv),
}

impl BatchNormedPlan {
    /// Every tensor of a checkpoint, in module order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut out = Vec::new();
        conv(&mut out, &self.stem, 1.0);
        for block in &self.blocks {
            let last = block.convs.len() - 1;
            for (i, c) in block.convs.iter().enumerate() {
                if let Some(Attention::SqueezeExcite { fc1, fc2, .. }) = block.attention.as_ref().filter(|_| i == last)
                {
                    conv(&mut out, fc1, 1.0);
                    conv(&mut out, fc2, 1.0);
                }
                conv(&mut out, c, if i == last && self.zero_init_last { 0.0 } else { 1.0 });
            }
            if let Shortcut::Conv(c) = &block.shortcut {
                conv(&mut out, c, 1.0);
            }
        }
        self.final_conv.iter().for_each(|c| conv(&mut out, c, 1.0));
        let shape = [self.classes, self.pool.features(self.num_features)];
        out.push(TensorSpec::new(format!("{}.weight", self.classifier), &shape, self.classifier_init));
        out.push(TensorSpec::new(format!("{}.bias", self.classifier), &shape[..1], Init::Constant(0.0)));
        out
    }
}

/// Weights as both families start them (normal, variance 2 / outputs that read an input), then what the convolution's
/// norm holds; `scale` is the norm's own weight.
fn conv(out: &mut Vec<TensorSpec>, c: &Conv, scale: f32) {
    let fan_out = c.kernel * c.kernel * c.out_chs / c.groups;
    let std = (2.0 / fan_out as f64).sqrt();
    out.push(TensorSpec::new(format!("{}.weight", c.name), &c.weight_shape(), Init::Normal(std)));
    let chs = [c.out_chs];
    match &c.norm {
        Norm::BatchNorm { layer, .. } => out.extend(TensorSpec::batch_norm(layer, c.out_chs, scale)),
        Norm::Plain | Norm::ScaledWs { .. } => {
            out.push(TensorSpec::new(format!("{}.bias", c.name), &chs, Init::Constant(0.0)));
        }
    }
}
