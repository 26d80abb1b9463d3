//! Which kernels run: those over the instructions of the processor that is here.

use super::activation::Activation;
use super::grouped_conv::{Block, GroupedConv};
use super::pointwise_conv::{Outputs, Panel};
use super::scratch::Scratch;
use super::{pointwise, pointwise_conv};

/// Whose instructions a kernel uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// Any; blocks of so many channels.
    Portable(usize),
    /// Blocks of 8.
    Avx2,
    /// Blocks of 16.
    Avx512,
}

impl Processor {
    /// Channels of a block.
    pub fn block(self) -> usize {
        match self {
            Self::Portable(block) => block,
            Self::Avx2 => 8,
            Self::Avx512 => 16,
        }
    }

    /// The best of those that are here.
    pub fn here() -> Option<Self> {
        [Self::Avx512, Self::Avx2].into_iter().find(|processor| processor.is_here())
    }

    /// Whether this processor has the instructions.
    pub fn is_here(self) -> bool {
        match self {
            Self::Portable(_) => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => std::arch::is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Computes rows of one block of output channels.
    ///
    /// # Panics
    /// If there is no kernel for it, slices aren't as large as they have to be, or the processor isn't here.
    pub fn convolve(self, conv: &GroupedConv, block: Block<'_>, scratch: &mut Scratch) {
        assert!(conv.is_supported() && conv.fits(&block) && self.is_here() && self.block() == conv.block);
        match self {
            Self::Portable(_) => conv.portable(block),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx2 => unsafe { super::avx2::grouped_conv(conv, block, scratch) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx512 => unsafe { super::avx512::grouped_conv(conv, block, scratch) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => drop(scratch),
        }
    }

    /// Computes some pixels of some blocks of output channels.
    ///
    /// # Panics
    /// If slices aren't as large as they have to be, or the processor isn't here.
    pub fn convolve_pixels(self, panel: Panel<'_>, outputs: Outputs<'_, '_>) {
        assert!(outputs.fit(&panel, self.block()) && self.is_here());
        match self {
            Self::Portable(block) => pointwise_conv::portable(block, panel, outputs),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx2 => unsafe { super::avx2::pointwise_conv(panel, outputs) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx512 => unsafe { super::avx512::pointwise_conv(panel, outputs) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => {}
        }
    }

    /// `y = activation(y)`, of whole blocks.
    ///
    /// # Panics
    /// If `y` isn't of whole blocks, or the processor isn't here.
    pub fn activate(self, activation: Activation, y: &mut [f32]) {
        assert!(self.is_here() && y.len().is_multiple_of(self.block()));
        match self {
            Self::Portable(_) => pointwise::activate(activation, y),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx2 => unsafe { super::avx2::activate_all(activation, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx512 => unsafe { super::avx512::activate_all(activation, y) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => {}
        }
    }

    /// `y = activation(y · gate)`, of one block of channels: `gate` is of one pixel.
    ///
    /// # Panics
    /// If `y` isn't of whole blocks, `gate` isn't one block, or the processor isn't here.
    pub fn gated(self, activation: Activation, gate: &[f32], y: &mut [f32]) {
        let block = self.block();
        assert!(self.is_here() && y.len().is_multiple_of(block) && gate.len() == block);
        match self {
            Self::Portable(_) => pointwise::gated(activation, gate, y),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx2 => unsafe { super::avx2::gated(activation, gate, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx512 => unsafe { super::avx512::gated(activation, gate, y) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => {}
        }
    }

    /// `y = activation(x · gate)`, of one block of channels, or of whole blocks without a gate, which is of one pixel.
    ///
    /// # Panics
    /// If `x` isn't of whole blocks and as large as `y`, `gate` isn't one block, or the processor isn't here.
    pub fn activate_from(self, activation: Activation, gate: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
        let block = self.block();
        assert!(self.is_here() && x.len() == y.len() && x.len().is_multiple_of(block));
        assert!(gate.is_none_or(|gate| gate.len() == block));
        match self {
            Self::Portable(_) => {
                y.copy_from_slice(x);
                match gate {
                    Some(gate) => pointwise::gated(activation, gate, y),
                    None => pointwise::activate(activation, y),
                }
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx2 => unsafe { super::avx2::activate_from(activation, gate, x, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor is here
            Self::Avx512 => unsafe { super::avx512::activate_from(activation, gate, x, y) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => {}
        }
    }
}
