//! Structure that RegNet and EfficientNet share: batch normalisation after every convolution, blocks of one branch with
//! channel attention before its last convolution. Knows no configuration of either family.

use super::activation::Activation;
use super::{Attention, Conv, Init, Norm, Pool, TensorSpec};

/// Plan of a network of either family: every convolution with name and shape.
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
    /// Whether the activation runs before the classifier, for networks whose last block ends without one.
    pub final_act: bool,
    /// Module path of the classifier.
    pub classifier: &'static str,
    /// Initialisation of the classifier's weights; its bias starts at zero.
    pub classifier_init: Init,
    /// Whether the norm after a branch's last convolution starts with scale 0.
    pub zero_init_last: bool,
    /// TensorFlow's SAME padding, which may be asymmetric.
    pub same_padding: bool,
    /// Channels of the last feature map.
    pub num_features: usize,
    /// Pooling before the classifier.
    pub pool: Pool,
    /// Number of classes.
    pub classes: usize,
}

/// A block: `f(x) + shortcut`, followed by the activation in some families.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchNormedBlock {
    /// Module path.
    pub name: String,
    /// Convolutions of the branch; the activation runs between them, not after the last.
    pub convs: Vec<Conv>,
    /// Attention on the input of the last convolution.
    pub attention: Option<Attention>,
    /// What is added to the branch.
    pub shortcut: Shortcut,
    /// Whether the activation runs on the sum.
    pub activated: bool,
    /// Whether the activation runs on the branch, before the sum.
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
    /// All tensors of a checkpoint, in module order.
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

/// Adds a convolution's weights in both families' initialisation (normal, variance 2 / fan-out), then the tensors of
/// its norm; `scale` is the initial weight of the norm.
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
