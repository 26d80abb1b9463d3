//! Memory that integer kernels work in.

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes that begin at a cache line.
#[derive(Debug, Default, Clone)]
pub(super) struct Lines(Vec<Line>);

impl Lines {
    /// So many bytes, of any content.
    pub fn bytes(&mut self, count: usize) -> &mut [u8] {
        let lines = count.div_ceil(64);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 64]));
        }
        // SAFETY: `Line` is 64 `u8` and nothing else
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), count) }
    }

    /// All of them.
    pub fn all(&self) -> &[u8] {
        // SAFETY: as above
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 64) }
    }
}

/// What a thread keeps from one call of a kernel to the next.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the reference needs none"))]
#[derive(Debug, Default)]
pub struct Scratch {
    /// Rows of the input.
    pub(super) rows: Lines,
    /// Sums of a tile.
    pub(super) sums: Lines,
}
