//! Where a kernel's sums go.

use super::{Band, Output};

/// What becomes of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bytes,
    Sum,
    Singles,
}

/// Where values of some rows go and what they become. Tables are applied afterwards, see [`super::passes`].
///
/// Pointers are null where nothing is wanted; what they point at is as large as these rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub kind: Kind,
    pub bytes: *mut u8,
    pub sums: *mut i16,
    pub addend: *const i16,
    pub singles: *mut f32,
    /// Zero point of the bytes.
    pub zero: i16,
    /// Smallest sum.
    pub least: i32,
    /// Of what is read of a sum.
    pub factor: f32,
}

impl Target {
    /// Of a band, from value `at` on.
    pub fn of(output: &Output, band: &mut Band<'_>, at: usize) -> Self {
        let (zero, factor, least) = match output {
            Output::Bytes(to) => (to.zero, 0.0, 0),
            Output::Sum { relu, read } => {
                let (zero, factor) = read.as_ref().map_or((0, 0.0), |read| (read.to.zero, read.factor));
                (zero, factor, if *relu { 0 } else { i16::MIN.into() })
            }
            Output::Singles => (0, 0.0, 0),
        };
        let kind = match output {
            Output::Bytes(_) => Kind::Bytes,
            Output::Sum { .. } => Kind::Sum,
            Output::Singles => Kind::Singles,
        };
        let reads = !matches!(output, Output::Sum { read: None, .. });
        let bytes = band.bytes.as_deref_mut().filter(|_| reads);
        Self {
            kind,
            bytes: bytes.map_or(std::ptr::null_mut(), |values| values[at..].as_mut_ptr()),
            sums: band.sums.as_deref_mut().map_or(std::ptr::null_mut(), |values| values[at..].as_mut_ptr()),
            addend: band.addend.map_or(std::ptr::null(), |values| values[at..].as_ptr()),
            singles: band.singles.as_deref_mut().map_or(std::ptr::null_mut(), |values| values[at..].as_mut_ptr()),
            zero: zero.into(),
            least,
            factor,
        }
    }
}

/// Writes vectors of sums, over a processor's vector functions.
macro_rules! kernel {
    ($features:literal) => {
        use super::target::{Kind, Target};

        /// Writes the first `count` values of some vectors as the values from `at` on.
        ///
        /// # Safety
        /// There are as many factors, and so much room in the target.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn put<const N: usize>(sums: [Vector; N], factor: *const f32, at: usize, count: usize, to: &Target) {
            let products: [_; N] = each(|n| {
                // SAFETY: the caller's
                let factor = unsafe { load_singles(factor.wrapping_add(n * LANES)) };
                product(sums[n], factor)
            });
            let left: [usize; N] = each(|n| count.saturating_sub(n * LANES).min(LANES));
            let places: [usize; N] = each(|n| at + n * LANES);
            // SAFETY: the caller's
            unsafe {
                match to.kind {
                    Kind::Bytes => {
                        if !to.bytes.is_null() {
                            put_bytes::<N>(each(|n| rounded(products[n])), to.zero, to.bytes.wrapping_add(at), count);
                        }
                    }
                    Kind::Sum => {
                        let mut values: [Vector; N] = each(|n| rounded(products[n]));
                        if !to.addend.is_null() {
                            values = each(|n| sum(values[n], load_i16(to.addend.wrapping_add(places[n]), left[n])));
                        }
                        let values: [Vector; N] = each(|n| limited(values[n], to.least));
                        if !to.sums.is_null() {
                            (0..N).for_each(|n| put_i16(values[n], to.sums.wrapping_add(places[n]), left[n]));
                        }
                        if !to.bytes.is_null() {
                            let factor = all_singles(to.factor);
                            let bytes: [Vector; N] = each(|n| rounded(product(values[n], factor)));
                            put_bytes(bytes, to.zero, to.bytes.wrapping_add(at), count);
                        }
                    }
                    Kind::Singles => {
                        if !to.singles.is_null() {
                            (0..N).for_each(|n| put_singles(products[n], to.singles.wrapping_add(places[n]), left[n]));
                        }
                    }
                }
            }
        }
    };
}
pub(super) use kernel;
