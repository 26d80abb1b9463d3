//! Calls of each processor's kernels.

use super::packed::{Packed, Plan};
use super::processor::Processor;
use super::scratch::Scratch;
use super::{Band, Gated, Output, Pool, SLACK, Table, reference};

/// Calls a function of the processor's, or the reference's where it has none.
macro_rules! call {
    ($processor:expr, $function:ident($($argument:expr),*)) => {
        match $processor {
            // SAFETY (of all): who calls has made sure that the processor is here, and of what a function asks for
            #[cfg(target_arch = "x86_64")]
            Processor::Avx2 => unsafe { super::avx2::$function($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            Processor::AvxVnni => unsafe { super::avx_vnni::$function($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            Processor::Avx512Vnni | Processor::Amx => unsafe { super::avx512::$function($($argument),*) },
            _ => reference::$function($($argument),*),
        }
    };
}

impl Processor {
    /// Pixels of a map times their gate, one value a channel: see [`reference::gated`].
    ///
    /// # Panics
    /// If slices aren't alike, the input lacks its slack, or the processor isn't here.
    pub fn gated(self, gated: &Gated, gate: &[u8], band: Band<'_>) {
        let values = band.values();
        assert!(self.is_here() && band.has(values) && band.input.len() >= values + SLACK && !gate.is_empty());
        call!(self, gated(gated, gate, band));
    }

    /// Terms of a residual sum: see [`reference::add`].
    ///
    /// # Panics
    /// If slices aren't alike, or the processor isn't here.
    pub fn add(self, output: &Output, terms: &[i16], band: Band<'_>) {
        assert!(self.is_here() && band.has(terms.len()));
        call!(self, add(output, terms, band));
    }

    /// A table's value for each: see [`reference::look_up`].
    ///
    /// # Panics
    /// If the processor isn't here.
    pub fn look_up(self, table: &Table, x: &[u8], y: &mut [u8]) {
        let values = x.len().min(y.len());
        assert!(self.is_here());
        call!(self, look_up(table, &x[..values], &mut y[..values]));
    }

    /// Sums of channels: see [`reference::totals`].
    ///
    /// # Panics
    /// If the processor isn't here, or there are no channels.
    pub fn totals(self, x: &[u8], zero: u8, totals: &mut [i32]) {
        assert!(self.is_here() && !totals.is_empty());
        call!(self, totals(x, zero, totals));
    }

    /// A pooling of one image: see [`reference::pool`].
    ///
    /// # Panics
    /// If the processor isn't here.
    pub fn pool(self, pool: &Pool, x: &[u8], y: &mut [u8]) {
        assert!(self.is_here());
        match pool.window() {
            Some(1..=256) if pool.channels > 0 => call!(self, pool(pool, x, y)),
            _ => reference::pool(pool, x, y),
        }
    }

    /// An image of finite numbers as u8, channels last: see [`reference::quantise`].
    ///
    /// # Panics
    /// If there is no room for it, or the processor isn't here.
    pub fn quantise(self, image: &[f32], channels: usize, scale: (f32, u8), bytes: &mut [u8]) {
        assert!(self.is_here() && channels > 0 && bytes.len() >= image.len());
        call!(self, quantise(image, channels, scale, bytes));
    }
}

impl Packed {
    /// Computes rows of the output.
    ///
    /// # Panics
    /// If slices aren't as large as they have to be.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub fn convolve(&self, band: Band<'_>, scratch: &mut Scratch) {
        if self.plan == Plan::Reference {
            return reference::conv(&self.conv, band);
        }
        assert!(self.conv.fits(&band));
        match self.processor {
            // SAFETY (of all): the processor is here, or there was no packing for it; the band fits
            #[cfg(target_arch = "x86_64")]
            Processor::Avx2 => unsafe { super::avx2::convolve(self, band, scratch) },
            #[cfg(target_arch = "x86_64")]
            Processor::AvxVnni => unsafe { super::avx_vnni::convolve(self, band, scratch) },
            #[cfg(target_arch = "x86_64")]
            Processor::Amx if self.plan == Plan::Tiles => unsafe { super::amx::convolve(self, band, scratch) },
            #[cfg(target_arch = "x86_64")]
            Processor::Avx512Vnni | Processor::Amx => unsafe { super::avx512::convolve(self, band, scratch) },
            _ => reference::conv(&self.conv, band),
        }
    }
}
