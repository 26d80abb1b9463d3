//! Operators of integer networks: what they are. `docs/int8.md` says what they compute, [`mod@reference`] does it in plain Rust.
//!
//! Maps are `[H, W, C]` (channels last), one image after the other: u8, or s16 for residual sums.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
pub mod conv_shape;
#[cfg(target_arch = "x86_64")]
mod dense;
mod dispatch;
pub mod float_conv;
#[cfg(target_arch = "x86_64")]
mod lanes8;
#[cfg(target_arch = "x86_64")]
mod narrow;
pub mod packed;
pub mod packed_floats;
#[cfg(target_arch = "x86_64")]
mod passes;
pub mod processor;
pub mod reference;
#[cfg(target_arch = "x86_64")]
mod rows;
pub mod scratch;
#[cfg(target_arch = "x86_64")]
mod target;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

use self::conv_shape::ConvShape;

/// Bytes after the last image of a u8 map that a kernel may read, whatever they are.
pub const SLACK: usize = 64;

/// A table from u8 to u8: an activation.
pub type Table = [u8; 256];

/// How an integer becomes a u8: `table[clamp(rhe(f32(acc)·m) + zero, 0, 255)]`. The factor `m` is the operator's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToBytes {
    /// Zero point.
    pub zero: u8,
    /// What each value is replaced by then.
    pub table: Option<Box<Table>>,
}

/// How a residual sum is read as u8: `to.table[clamp(rhe(f32(r)·factor) + to.zero, 0, 255)]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Read {
    /// Scale of the sum divided by scale of the bytes.
    pub factor: f32,
    /// The rest.
    pub to: ToBytes,
}

/// What an operator's integers become.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// u8.
    Bytes(ToBytes),
    /// A residual sum: `r = sat16(rhe(f32(acc)·m) + r0)`, and `max(r, 0)` if `relu`. It is written where the operator is given
    /// room for it, and so are the bytes that are read of it.
    Sum {
        /// Whether a ReLU follows the sum.
        relu: bool,
        /// How it is read as u8, if it is.
        read: Option<Read>,
    },
    /// Single precision: `f32(acc)·m`.
    Singles,
}

impl Output {
    /// The table that bytes go through.
    pub fn table(&self) -> Option<&Table> {
        match self {
            Self::Bytes(to) => to.table.as_deref(),
            Self::Sum { read, .. } => read.as_ref().and_then(|read| read.to.table.as_deref()),
            Self::Singles => None,
        }
    }
}

/// A convolution of one image of fixed size.
#[derive(Debug, Clone, PartialEq)]
pub struct Conv {
    /// Its sizes.
    pub shape: ConvShape,
    /// Value of the padding: the input's zero point.
    pub zero: u8,
    /// `[filters, kernel height, kernel width, channels / groups]`.
    pub weight: Vec<i8>,
    /// A filter's bias, less `zero` times the sum of its weights: what `Σ w·x` over the padded input is added to.
    pub bias: Vec<i32>,
    /// A filter's factor `m`.
    pub factor: Vec<f32>,
    /// What sums become.
    pub output: Output,
}

/// Some rows of an operator's output, of one image, and what they are made of.
#[derive(Debug)]
pub struct Band<'a> {
    /// Rows of the output.
    pub rows: Range<usize>,
    /// The whole image `[H, W, channels]`, and [`SLACK`] bytes that may be anything.
    pub input: &'a [u8],
    /// Terms of a residual sum, `[rows, W', filters]`.
    pub addend: Option<&'a [i16]>,
    /// Where residual sums go, `[rows, W', filters]`.
    pub sums: Option<&'a mut [i16]>,
    /// Where bytes go, `[rows, W', filters]`.
    pub bytes: Option<&'a mut [u8]>,
    /// Where numbers in single precision go, `[rows, W', filters]`.
    pub singles: Option<&'a mut [f32]>,
}

impl Band<'_> {
    /// Values of what is written; the smallest, where slices aren't alike.
    fn values(&self) -> usize {
        let lens = [
            self.sums.as_ref().map(|sums| sums.len()),
            self.bytes.as_ref().map(|bytes| bytes.len()),
            self.singles.as_ref().map(|singles| singles.len()),
        ];
        lens.into_iter().flatten().min().unwrap_or(0)
    }

    /// Whether slices have so many values each, where they are.
    fn has(&self, values: usize) -> bool {
        self.addend.is_none_or(|addend| addend.len() == values)
            && self.sums.as_ref().is_none_or(|sums| sums.len() == values)
            && self.bytes.as_ref().is_none_or(|bytes| bytes.len() == values)
            && self.singles.as_ref().is_none_or(|singles| singles.len() == values)
    }
}

impl Conv {
    /// Whether sizes, weights, biases and factors fit together.
    pub fn is_whole(&self) -> bool {
        self.shape.has_weights(self.weight.len(), self.bias.len()) && self.factor.len() == self.shape.filters
    }

    /// Whether a band has the sizes of its rows.
    pub fn fits(&self, band: &Band<'_>) -> bool {
        let input = product([self.shape.size[0], self.shape.size[1], self.shape.channels])
            .and_then(|input| input.checked_add(SLACK));
        let values = product([band.rows.len(), self.shape.out_size[1], self.shape.filters]);
        band.rows.end <= self.shape.out_size[0]
            && input.is_some_and(|input| band.input.len() >= input)
            && values.is_some_and(|values| band.has(values))
    }
}

/// Of numbers, if it isn't too large for one.
fn product<const N: usize>(numbers: [usize; N]) -> Option<usize> {
    numbers.into_iter().try_fold(1, usize::checked_mul)
}

/// A map times its gate, whose values are of one pixel: `acc = (x - zero)·(g - gate_zero)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Gated {
    /// Zero point of the map.
    pub zero: u8,
    /// Zero point of the gate.
    pub gate_zero: u8,
    /// The factor `m`, one for all channels.
    pub factor: f32,
    /// What products become.
    pub output: Output,
}

/// The largest or the average of a window, scale and zero point kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Channels.
    pub channels: usize,
    /// Height and width of the input.
    pub size: [usize; 2],
    /// Height and width of the output.
    pub out_size: [usize; 2],
    /// Height and width of the window.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Pixels of padding above and to the left.
    pub pads: [usize; 2],
    /// Whether the largest.
    pub largest: bool,
    /// Of an average: whether padding counts, as zeros.
    pub counts_padding: bool,
    /// Zero point.
    pub zero: u8,
}

impl Pool {
    /// Rows (axis 0) or columns (1) of the input that a window has which aren't padding.
    fn inside(&self, axis: usize, at: usize) -> Range<usize> {
        let start = at.saturating_mul(self.stride[axis]);
        let end = start.saturating_add(self.kernel[axis]).saturating_sub(self.pads[axis]).min(self.size[axis]);
        start.saturating_sub(self.pads[axis]).min(end)..end
    }

    /// Pixels of a window, padding and all.
    fn window(&self) -> Option<usize> {
        product(self.kernel)
    }
}
