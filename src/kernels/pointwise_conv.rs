//! Convolutions of single pixels (1x1), all channels with all.
//!
//! What is read is a panel `[I/b, pixels, b]`: the map itself, or a copy of some of its pixels with their gate and activation
//! applied. A pixel's sum is added up in one order, wherever it stands: from the bias on by input channel, then what is added
//! to it. So pixels can be shared out in any way.

use super::activation::Activation;

/// Tiles after which an activation is applied to them: they are in the nearest cache then.
pub(super) const TILES: usize = 8;

/// Values of a cache line.
pub(super) const LINE: usize = 16;

/// Some pixels of an input map.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// From the first of these pixels in the first block to the last in the last.
    pub values: &'a [f32],
    /// Values from one block of channels to the next.
    pub pitch: usize,
    /// Blocks of channels.
    pub depth: usize,
}

impl Panel<'_> {
    /// From so many values of each block on.
    pub(super) fn from(self, first: usize) -> Self {
        Self { values: &self.values[first..], ..self }
    }
}

/// Some pixels of some blocks of output channels.
#[derive(Debug)]
pub struct Outputs<'a, 'b> {
    /// `[blocks, I, b]`
    pub weight: &'a [f32],
    /// `[blocks, b]`
    pub bias: &'a [f32],
    /// Of each block, `[pixels, b]`.
    pub maps: &'a mut [&'b mut [f32]],
    /// Whether sums are added to what is there.
    pub adds: bool,
    /// Of what is written.
    pub after: Activation,
}

impl Outputs<'_, '_> {
    /// Whether slices are as large as this needs them.
    pub(super) fn fit(&self, panel: &Panel<'_>, block: usize) -> bool {
        let Some(pixels) = self.maps.first().map(|map| map.len()) else { return true };
        let rest = panel.depth.checked_sub(1).and_then(|rest| rest.checked_mul(panel.pitch));
        pixels.is_multiple_of(block)
            && self.maps.iter().all(|map| map.len() == pixels)
            && rest.and_then(|rest| rest.checked_add(pixels)).is_some_and(|needed| needed <= panel.values.len())
            && self.bias.len() == self.maps.len() * block
            && self.weight.len() == self.bias.len() * panel.depth * block
    }
}

/// Computes in plain Rust.
pub(super) fn portable(block: usize, panel: Panel<'_>, outputs: Outputs<'_, '_>) {
    let inputs = panel.depth * block;
    for (i, map) in outputs.maps.iter_mut().enumerate() {
        let weight = &outputs.weight[i * inputs * block..(i + 1) * inputs * block];
        for (p, pixel) in map.chunks_exact_mut(block).enumerate() {
            for (lane, value) in pixel.iter_mut().enumerate() {
                let mut sum = outputs.bias[i * block + lane];
                for input in 0..inputs {
                    let x = panel.values[input / block * panel.pitch + p * block + input % block];
                    sum = x.mul_add(weight[input * block + lane], sum);
                }
                *value = outputs.after.of(if outputs.adds { sum + *value } else { sum });
            }
        }
    }
}

/// Convolves over a processor's vector functions, two blocks of output channels at a time, in tiles of so many pixels at most:
/// widest first.
macro_rules! kernel {
    ($features:literal, [$most:literal $($fewer:literal)*]) => {
        use super::pointwise_conv::{LINE, Outputs, Panel, TILES};

        #[target_feature(enable = $features)]
        pub(super) fn pointwise_conv(panel: Panel<'_>, outputs: Outputs<'_, '_>) {
            let row = panel.depth * LANES * LANES;
            let blocks = outputs.weight.chunks(2 * row).zip(outputs.bias.as_chunks().0.chunks(2));
            for (maps, (weight, bias)) in outputs.maps.chunks_mut(2).zip(blocks) {
                match (maps, bias) {
                    ([a, b], [first, second]) => {
                        let bias = [load(first), load(second)];
                        pixels(panel, weight, bias, [a, b], outputs.adds, outputs.after);
                    }
                    ([a], [first]) => pixels(panel, weight, [load(first)], [a], outputs.adds, outputs.after),
                    _ => {}
                }
            }
        }

        /// All pixels of `N` blocks, in tiles as even as can be.
        #[target_feature(enable = $features)]
        #[inline]
        fn pixels<const N: usize>(
            panel: Panel<'_>,
            weight: &[f32],
            bias: [Vector; N],
            maps: [&mut [f32]; N],
            adds: bool,
            after: Activation,
        ) {
            let mut maps = maps.map(|map| map.as_chunks_mut().0);
            let count = maps[0].len();
            let all = count.div_ceil($most).max(1);
            let (narrow, wider) = (count / all, count % all);
            let mut first = 0;
            let mut done = 0;
            for (wide, tiles) in [(narrow + 1, wider), (narrow, all - wider)] {
                for run in (0..tiles).step_by(TILES) {
                    let tiles = TILES.min(tiles - run);
                    let last = first + wide * tiles;
                    let source = &panel.values[first * LANES..];
                    let target = maps.each_mut().map(|map| &mut map[first..last]);
                    let tile = [done, all];
                    match wide {
                        $most => pointwise_tiles::<N, $most>(panel, source, weight, bias, target, tile, adds),
                        $($fewer => pointwise_tiles::<N, $fewer>(panel, source, weight, bias, target, tile, adds),)*
                        _ => {}
                    }
                    if after != Activation::None {
                        maps.iter_mut().for_each(|map| activate_in_place(after, &mut map[first..last]));
                    }
                    first = last;
                    done += tiles;
                }
            }
        }

        /// `P` pixels of `N` blocks, and the next ones, as many as there are. They are some of `all` tiles,
        /// of which others are `done`.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn pointwise_tiles<const N: usize, const P: usize>(
            panel: Panel<'_>,
            source: &[f32],
            weight: &[f32],
            bias: [Vector; N],
            target: [&mut [[f32; LANES]]; N],
            [done, all]: [usize; 2],
            adds: bool,
        ) {
            let (depth, row) = (panel.depth, panel.depth * LANES * LANES);
            let mut target = target.map(|target| target.as_chunks_mut::<P>().0);
            let tiles = target[0].len();
            assert!(tiles == 0 || source.len() >= (depth - 1) * panel.pitch + tiles * P * LANES);
            assert!(weight.len() >= N * row && target.iter().all(|target| target.len() == tiles));
            const { assert!(N <= 2 && P <= 12, "below there is nothing for more") };
            // the weights of the next blocks come right behind, and from far: each tile asks for its share of them
            let due = N * LANES * LANES / LINE;
            let share = due.div_ceil(all);
            for tile in 0..tiles {
                let before = (done + tile) * share;
                let lines = share.min(due.saturating_sub(before));
                let mut next = weight.as_ptr().wrapping_add(N * row + before.min(due) * depth * LINE);
                for target in &target {
                    for line in target[tile].as_flattened().iter().step_by(LINE) {
                        prefetch(line);
                    }
                }
                let mut sums: [[Vector; P]; N] = each(|n| [bias[n]; P]);
                let mut weight = weight.as_ptr();
                let mut block = source.as_ptr().wrapping_add(tile * P * LANES);
                for _ in 0..depth {
                    for _ in 0..lines {
                        prefetch(next);
                        next = next.wrapping_add(LINE);
                    }
                    let mut channel = block;
                    for _ in 0..LANES {
                        // SAFETY: within `weight` and `source`, see above: both went through as many as the loops before did
                        // turns
                        let weights: [Vector; N] = each(|n| unsafe { repeat::<LANES>(weight.wrapping_add(row.wrapping_mul(n))) });
                        super::grouped_conv::unrolled!(I in [0 1 2 3 4 5 6 7 8 9 10 11] below P, {
                            // SAFETY: as above
                            let x = unsafe { repeat::<1>(channel.wrapping_add(const { I * LANES })) };
                            sums[0][I] = fma(x, weights[0], sums[0][I]);
                            if const { N > 1 } {
                                sums[N - 1][I] = fma(x, weights[N - 1], sums[N - 1][I]);
                            }
                        });
                        weight = weight.wrapping_add(LANES);
                        channel = channel.wrapping_add(1);
                    }
                    block = block.wrapping_add(panel.pitch);
                }
                for (sums, target) in sums.into_iter().zip(&mut target) {
                    for (sum, target) in sums.into_iter().zip(&mut target[tile]) {
                        let sum = if adds { add(sum, load(target)) } else { sum };
                        store(target, sum);
                    }
                }
            }
        }
    };
}
pub(super) use kernel;
