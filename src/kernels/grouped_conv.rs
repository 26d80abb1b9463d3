//! Convolutions of channels in groups.
//!
//! Where a block of `b` channels holds `m` groups, its channels are put in another order on the way in: channel `i` of every
//! group side by side. So one load that repeats `m` values gives all groups of a vector what their `i`-th input is, and a
//! vector of weights serves `m` groups. On the way out they are put back. A group of several blocks is read block by block.
//! A pixel's sum is added up in one order, wherever it stands: by input block, row of the kernel, channel, column.

use super::activation::Activation;

/// Side of the kernels that there are.
pub const KERNEL: usize = 3;

/// A convolution of maps in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupedConv {
    /// Channels of a block.
    pub block: usize,
    /// Channels of a group, in and out: they divide the block, or it divides them.
    pub group: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Step, in both directions.
    pub stride: usize,
    /// Pixels of the input.
    pub height: usize,
    /// Pixels of the input.
    pub width: usize,
    /// Zeros above and left of the input; below and right there are as many as it takes.
    pub pads: [usize; 2],
    /// Pixels of the output.
    pub out_height: usize,
    /// Pixels of the output.
    pub out_width: usize,
    /// Of what is read; zeros around it stay zeros.
    pub before: Activation,
    /// Of what is written.
    pub after: Activation,
}

/// What is read for a block of output channels and what is written.
#[derive(Debug)]
pub struct Block<'a> {
    /// `[depth, height, width, b]`
    pub input: &'a [f32],
    /// `[depth, kernel, b/m, kernel, b]`
    pub weight: &'a [f32],
    /// `[b]`
    pub bias: &'a [f32],
    /// Some rows of `[out_height, out_width, b]`
    pub output: &'a mut [f32],
    /// First of these rows.
    pub first: usize,
    /// Sums of the output's channels over these rows, `[b]`, in the order of rows.
    pub sums: Option<&'a mut [f32]>,
}

/// How channels are grouped, and weights ordered by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Channels of a block.
    pub block: usize,
    /// Channels of a group, in and out.
    pub group: usize,
    /// Side of the kernel.
    pub kernel: usize,
}

impl Groups {
    /// Whether there are kernels for it.
    pub fn are_supported(&self) -> bool {
        let (large, small) = (self.group.max(self.block), self.group.min(self.block));
        small > 0
            && large.is_multiple_of(small)
            && [1, 2, 4 * (self.block / 16)].contains(&self.merged())
            && self.kernel == KERNEL
    }

    /// Whether the kernels are faster than ONNX Runtime's: for groups of less than a block.
    pub fn pays(&self) -> bool {
        self.are_supported() && (2..=self.block).contains(&self.group)
    }

    /// Groups of a block, at least one.
    pub fn merged(&self) -> usize {
        (self.block / self.group).max(1)
    }

    /// Input blocks that a block of output channels reads.
    pub fn depth(&self) -> usize {
        (self.group / self.block).max(1)
    }

    /// Weights of a block of output channels.
    pub fn weights(&self) -> usize {
        self.depth() * self.kernel * self.kernel * self.block / self.merged() * self.block
    }

    /// Channel of a block that has this lane while it is worked on.
    fn channel(&self, lane: usize) -> usize {
        let m = self.merged();
        lane % m * (self.block / m) + lane / m
    }

    /// Appends weights `[O, group, kernel, kernel]` in the order that kernels read them, block by block of
    /// output channels.
    pub fn arrange<T: Copy>(&self, weight: &[T], number: impl Fn(T) -> f32, arranged: &mut Vec<f32>) {
        let (b, m, k) = (self.block, self.merged(), self.kernel);
        let row = self.group * k * k;
        for rows in weight.chunks_exact(b * row) {
            for (block, ky) in (0..self.depth()).flat_map(|block| (0..k).map(move |ky| (block, ky))) {
                for (channel, kx) in (0..b / m).flat_map(|channel| (0..k).map(move |kx| (channel, kx))) {
                    let at = ((block * b + channel) * k + ky) * k + kx;
                    arranged.extend((0..b).map(|lane| number(rows[self.channel(lane) * row + at])));
                }
            }
        }
    }
}

impl GroupedConv {
    /// How its channels are grouped.
    pub fn groups(&self) -> Groups {
        Groups { block: self.block, group: self.group, kernel: self.kernel }
    }

    /// Groups of a block, at least one.
    pub fn merged(&self) -> usize {
        self.groups().merged()
    }

    /// Input blocks that a block of output channels reads.
    pub fn depth(&self) -> usize {
        self.groups().depth()
    }

    /// First input block that output block `i` reads.
    pub fn first_input(&self, i: usize) -> usize {
        i / self.depth() * self.depth()
    }

    /// Weights of a block of output channels.
    pub fn weights(&self) -> usize {
        self.groups().weights()
    }

    /// Whether there is a kernel for it.
    pub fn is_supported(&self) -> bool {
        self.groups().are_supported()
            && matches!(self.stride, 1 | 2)
            && self.pads.iter().all(|&p| p < self.kernel)
            && self.out_height > 0
            && self.out_width > 0
            && (self.out_height - 1) * self.stride < self.height + self.pads[0]
            && (self.out_width - 1) * self.stride < self.width + self.pads[1]
    }

    /// Whether slices are as large as this needs them.
    pub(super) fn fits(&self, block: &Block<'_>) -> bool {
        let (b, line) = (self.block, self.out_width * self.block);
        block.input.len() == self.depth() * self.height * self.width * b
            && block.weight.len() == self.weights()
            && block.bias.len() == b
            && block.output.len().is_multiple_of(line)
            && block.first + block.output.len() / line <= self.out_height
            && block.sums.as_ref().is_none_or(|sums| sums.len() == b)
    }

    /// Computes rows of one block of output channels, in plain Rust.
    pub(super) fn portable(&self, block: Block<'_>) {
        let (b, m, k) = (self.block, self.merged(), self.kernel);
        let mut sums = vec![0.0; b];
        for (y, row) in (block.first..).zip(block.output.chunks_exact_mut(self.out_width * b)) {
            for (x, pixel) in row.chunks_exact_mut(b).enumerate() {
                for lane in 0..b {
                    let channel = self.groups().channel(lane);
                    let mut sum = block.bias[channel];
                    for depth in 0..self.depth() {
                        for (ky, i, kx) in
                            (0..k).flat_map(|ky| (0..b / m).flat_map(move |i| (0..k).map(move |kx| (ky, i, kx))))
                        {
                            let (row, column) = (y * self.stride + ky, x * self.stride + kx);
                            let inside = (self.pads[0]..self.pads[0] + self.height).contains(&row)
                                && (self.pads[1]..self.pads[1] + self.width).contains(&column);
                            if inside {
                                let pixel =
                                    (depth * self.height + row - self.pads[0]) * self.width + column - self.pads[1];
                                // group `lane % m` of the block
                                let input = block.input[pixel * b + lane % m * (b / m) + i];
                                let weight = block.weight[(((depth * k + ky) * (b / m) + i) * k + kx) * b + lane];
                                sum = self.before.of(input).mul_add(weight, sum);
                            }
                        }
                    }
                    pixel[channel] = self.after.of(sum);
                }
                sums.iter_mut().zip(&*pixel).for_each(|(sum, value)| *sum += value);
            }
        }
        if let Some(to) = block.sums {
            to.copy_from_slice(&sums);
        }
    }
}

/// The input with zeros around it, its channels in the order of work, for some rows of the output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Padded {
    /// Values of a row.
    pub pitch: usize,
    /// Values of an input block.
    pub plane: usize,
}

impl GroupedConv {
    pub(super) fn padded(&self, rows: usize) -> Padded {
        let pitch = ((self.out_width - 1) * self.stride + self.kernel) * self.block;
        Padded { pitch, plane: ((rows - 1) * self.stride + self.kernel) * pitch }
    }

    /// Channel by lane of work, and lane by channel.
    pub(super) fn orders<const B: usize>(&self) -> ([i32; B], [i32; B]) {
        let (mut to, mut back) = ([0; B], [0; B]);
        for (lane, to) in to.iter_mut().enumerate() {
            let channel = self.groups().channel(lane);
            *to = channel as i32;
            back[channel] = lane as i32;
        }
        (to, back)
    }
}

/// Columns of the input that so many of the output are made of.
pub(super) const fn wide(columns: usize, stride: usize) -> usize {
    (columns - 1) * stride + KERNEL
}

/// Whether a column of the input is the `kx`-th of one of so many of the output.
pub(super) const fn is_tap(column: usize, kx: usize, stride: usize, columns: usize) -> bool {
    column >= kx && (column - kx).is_multiple_of(stride) && (column - kx) / stride < columns
}

/// A block for each of some numbers below a bound, so that what it names by them can stay in registers.
macro_rules! unrolled {
    ($i:ident in [$($number:literal)*] below $bound:expr, $body:block) => {
        $(if const { $number < $bound } {
            const $i: usize = $number;
            $body
        })*
    };
}
pub(super) use unrolled;

/// Convolves over a processor's vector functions: with these numbers of groups in a vector, and tiles of so many columns and
/// rows, widest first, one of a single pixel last. Rows that are fewer are done one by one.
///
/// Each tile is a function for each number of groups and stride: widths are those that waste few columns on the networks of `bench engine`. Nothing
/// in the innermost loop can overflow or panic, so that builds with debug assertions are fast enough to test with.
macro_rules! kernel {
    ($features:literal, [$($merged:literal),*], [$(($columns:literal, $rows:literal)),*]) => {
        use super::grouped_conv::{Block, GroupedConv, KERNEL as K, Padded, is_tap, wide};
        use super::scratch::Scratch;

        #[target_feature(enable = $features)]
        pub(super) fn grouped_conv(conv: &GroupedConv, block: Block<'_>, scratch: &mut Scratch) {
            match (conv.merged(), conv.stride) {
                $(
                    ($merged, 1) => convolve::<$merged, 1>(conv, block, scratch),
                    ($merged, 2) => convolve::<$merged, 2>(conv, block, scratch),
                )*
                _ => {}
            }
        }

        #[target_feature(enable = $features)]
        fn convolve<const M: usize, const S: usize>(
            conv: &GroupedConv,
            block: Block<'_>,
            scratch: &mut Scratch,
        ) {
            const TILES: &[(usize, usize)] = &[$(($columns, $rows)),*];
            let width = conv.out_width;
            let line = width * LANES;
            let rows = block.output.len() / line;
            if rows == 0 {
                return;
            }
            let padded = conv.padded(rows);
            let memory = scratch.values(conv.depth() * padded.plane);
            let (to, back) = conv.orders::<LANES>();
            let (to, back) = (order(&to), order(&back));
            let bias = permute(load(block.bias.first_chunk().expect("a block")), to);
            // as few columns twice as can be, then as wide as can be
            let cost = |&&(columns, _): &&(usize, usize)| width.div_ceil(columns) * (columns + 1);
            let &(columns, most) = TILES.iter().filter(|t| t.0 <= width).min_by_key(cost).unwrap_or(&(1, 1));
            let mut sums = all(0.0);
            let (mut ready, mut y) = (0, 0);
            while y < rows {
                let high = if rows - y >= most { most } else { 1 };
                let needed = (y + high - 1) * S + K;
                for row in ready..needed {
                    for depth in 0..conv.depth() {
                        let start = depth * padded.plane + row * padded.pitch;
                        let target = &mut memory[start..start + padded.pitch];
                        prepare(conv, block.input, depth, block.first * S + row, to, target);
                    }
                }
                ready = needed;
                for piece in 0..width.div_ceil(columns) {
                    let x = (piece * columns).min(width - columns);
                    let start = y * S * padded.pitch + x * S * LANES;
                    let source = &memory[start..];
                    let target = &mut block.output[y * line + x * LANES..(y + high - 1) * line + (x + columns) * LANES];
                    match (columns, high) {
                        $(
                            ($columns, $rows) => tile::<M, S, $rows, $columns>(conv, padded, source, block.weight, bias, back, target),
                        )*
                        $(
                            #[allow(unreachable_patterns, reason = "a tile of one row")]
                            ($columns, 1) => tile::<M, S, 1, $columns>(conv, padded, source, block.weight, bias, back, target),
                        )*
                        _ => {}
                    }
                }
                let done = block.output[y * line..(y + high) * line].as_chunks_mut().0;
                if conv.after != Activation::None {
                    activate_in_place(conv.after, done);
                }
                if block.sums.is_some() {
                    for row in done.chunks_exact(width) {
                        let mut sum = all(0.0);
                        for pixel in row {
                            sum = add(sum, load(pixel));
                        }
                        sums = add(sums, sum);
                    }
                }
                y += high;
            }
            if let Some(to) = block.sums.and_then(|to| to.first_chunk_mut()) {
                store(to, sums);
            }
        }

        /// A row of the padded input, counted from its top.
        #[target_feature(enable = $features)]
        fn prepare(conv: &GroupedConv, input: &[f32], depth: usize, row: usize, to: Order, target: &mut [f32]) {
            let target = target.as_chunks_mut().0;
            let Some(row) = row.checked_sub(conv.pads[0]).filter(|&row| row < conv.height) else {
                target.fill([0.0; LANES]);
                return;
            };
            let start = (depth * conv.height + row) * conv.width * LANES;
            let source = input[start..start + conv.width * LANES].as_chunks::<LANES>().0;
            let (left, rest) = target.split_at_mut(conv.pads[1].min(target.len()));
            let (middle, right) = rest.split_at_mut(source.len().min(rest.len()));
            left.fill([0.0; LANES]);
            right.fill([0.0; LANES]);
            for (target, source) in middle.iter_mut().zip(source) {
                store(target, permute(load(source), to));
            }
            if conv.before != Activation::None {
                activate_in_place(conv.before, middle);
            }
        }

        /// `R` rows of `P` pixels.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn tile<const M: usize, const S: usize, const R: usize, const P: usize>(
            conv: &GroupedConv,
            padded: Padded,
            source: &[f32],
            weight: &[f32],
            bias: Vector,
            back: Order,
            target: &mut [f32],
        ) {
            let channels = LANES / M;
            let depth = conv.depth();
            let line = conv.out_width * LANES;
            assert!(source.len() >= (depth - 1) * padded.plane + ((R - 1) * S + K - 1) * padded.pitch + ((P - 1) * S + K) * LANES);
            assert!(weight.len() >= depth * K * channels * K * LANES);
            assert!(target.len() >= (R - 1) * line + P * LANES);
            const { assert!(R * wide(P, S) <= 55, "below there is nothing for more inputs") };
            let mut sums = [[bias; P]; R];
            let (mut weight, mut plane) = (weight.as_ptr(), source.as_ptr());
            // from a row's inputs to those of the row below in the tile
            let below = S.wrapping_mul(padded.pitch);
            for _ in 0..depth {
                let mut top = plane;
                for _ in 0..K {
                    for channel in 0..channels {
                        let rows: [_; R] = each(|r| top.wrapping_add(below.wrapping_mul(r).wrapping_add(channel.wrapping_mul(M))));
                        // SAFETY: within `weight` and `source`, see above: `weight` went through as many vectors, and `top`
                        // through as many rows, as the loops before did turns
                        let taps: [Vector; K] = each(|kx| unsafe { repeat::<LANES>(weight.wrapping_add(kx * LANES)) });
                        let taps = pinned(taps);
                        // each input is loaded once, for all that it is a tap of: the fewest registers
                        super::grouped_conv::unrolled!(I in [
                            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19
                            20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
                            40 41 42 43 44 45 46 47 48 49 50 51 52 53 54
                        ] below R * wide(P, S), {
                            let (r, column) = const { (I / wide(P, S), I % wide(P, S)) };
                            // SAFETY: as above
                            let x = unsafe { repeat::<M>(rows[r].wrapping_add(const { I % wide(P, S) * LANES })) };
                            let sums = &mut sums[r];
                            if const { is_tap(I % wide(P, S), 0, S, P) } {
                                let sum = &mut sums[column / S];
                                *sum = fma(x, taps[0], *sum);
                            }
                            if const { is_tap(I % wide(P, S), 1, S, P) } {
                                let sum = &mut sums[(column - 1) / S];
                                *sum = fma(x, taps[1], *sum);
                            }
                            if const { is_tap(I % wide(P, S), 2, S, P) } {
                                let sum = &mut sums[(column - 2) / S];
                                *sum = fma(x, taps[2], *sum);
                            }
                        });
                        weight = weight.wrapping_add(K * LANES);
                    }
                    top = top.wrapping_add(padded.pitch);
                }
                plane = plane.wrapping_add(padded.plane);
            }
            for r in 0..R {
                let pixels = target[r * line..r * line + P * LANES].as_chunks_mut().0;
                for p in 0..P {
                    store(&mut pixels[p], permute(sums[r][p], back));
                }
            }
        }
    };
}
pub(super) use kernel;
