//! AMX: tiles of 16 pixels, or 16 channels, by 64 bytes.

use super::packed::Packed;
use super::scratch::Scratch;
use super::target::Target;
use super::{Band, Conv};

/// Pixels, and channels, of a step: two tiles each.
pub(super) const SIDE: usize = 32;

/// Bytes of a tile's row.
const ROW: usize = 64;

/// Bytes of weights that don't stay in the second cache.
const LARGE: usize = 1 << 20;

/// Bytes of windows that do.
const MEMORY: usize = 512 << 10;

/// All eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Tiles([u8; 64]);

static TILES: Tiles = Tiles({
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = ROW as u8;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    bytes
});

/// Computes rows of the output.
///
/// # Safety
/// The band fits, and the convolution is packed for AMX.
pub(super) unsafe fn convolve(packed: &Packed, mut band: Band<'_>, scratch: &mut Scratch) {
    let conv = &packed.conv;
    let width = conv.shape.out_size[1];
    let pixels = band.rows.len() * width;
    let all = conv.shape.kernel[0] * conv.shape.kernel[1] * conv.shape.channels;
    let steps = all.div_ceil(ROW);
    let pitch = steps * ROW;
    let is_pixel = windows_are_pixels(conv);
    // large weights are gone through as seldom as can be, small ones stay near
    let at_a_time = match packed.weight.all().len() {
        LARGE.. => (MEMORY / pitch / SIDE).max(1) * SIDE,
        _ => SIDE,
    };
    // SAFETY: the processor has tiles, see `tiles`
    unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const TILES, options(nostack, readonly)) };
    let sums = scratch.sums.bytes(SIDE * SIDE * 4).as_mut_ptr();
    let memory = scratch.rows.bytes(at_a_time * pitch + super::SLACK);
    let mut done = 0;
    while done < pixels {
        // the last pixels, some of them again
        let first = done.min(pixels.saturating_sub(SIDE));
        let count = at_a_time.min(pixels - first);
        // rows of tiles: the input itself where pixels are all there is to a window
        let (source, pitch) = if is_pixel && count >= SIDE {
            (band.input[(band.rows.start * width + first) * conv.shape.channels..].as_ptr(), conv.shape.channels)
        } else {
            let (mut row, mut column) = (band.rows.start + first / width, first % width);
            for i in 0..count {
                copy_window(conv, band.input, row, column, &mut memory[i * pitch..]);
                column += 1;
                if column == width {
                    (row, column) = (row + 1, 0);
                }
            }
            (memory.as_ptr(), pitch)
        };
        let target = Target::of(&conv.output, &mut band, first * conv.shape.filters);
        for (panel, channel) in (0..conv.shape.filters).step_by(SIDE).enumerate() {
            let weight = packed.weight.all()[panel * steps * 16 * 2 * ROW..].as_ptr();
            let lanes = panel * SIDE;
            let mut tile = done - first;
            while tile < count {
                let start = tile.min(count.saturating_sub(SIDE));
                // SAFETY: 32 rows of `steps` times 64 bytes are there (of the input the last may end in its slack), and the
                // panel's weights; the target has room
                unsafe {
                    multiply(
                        source.wrapping_add(start * pitch),
                        pitch,
                        weight,
                        steps,
                        packed.bias[lanes..].as_ptr(),
                        sums,
                    );
                    super::avx512::put_tile(
                        sums.cast(),
                        tile - start..(count - start).min(SIDE),
                        packed.factor[lanes..].as_ptr(),
                        [start, channel],
                        conv.shape.filters,
                        &target,
                    );
                }
                tile = start + SIDE;
            }
        }
        if let Some((table, bytes)) = conv.output.table().zip(band.bytes.as_deref_mut()) {
            // SAFETY: whoever has tiles has AVX-512
            unsafe {
                super::avx512::look_up_in_place(
                    table,
                    &mut bytes[done * conv.shape.filters..(first + count) * conv.shape.filters],
                )
            };
        }
        done = first + count;
    }
    // SAFETY: as above
    unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
}

/// Whether a pixel's window is the pixel itself, and the next pixel's is the next.
fn windows_are_pixels(conv: &Conv) -> bool {
    conv.shape.kernel == [1, 1]
        && conv.shape.stride == [1, 1]
        && conv.shape.pads == [0, 0]
        && conv.shape.size == conv.shape.out_size
}

/// Copies the window of a pixel of the output, its rows one after another.
fn copy_window(conv: &Conv, x: &[u8], row: usize, column: usize, to: &mut [u8]) {
    let run = conv.shape.kernel[1] * conv.shape.channels;
    let left = (column * conv.shape.stride[1]) as isize - conv.shape.pads[1] as isize;
    // columns of the kernel that are inside
    let from = (-left).clamp(0, conv.shape.kernel[1] as isize) as usize;
    let until = (conv.shape.size[1] as isize - left).clamp(from as isize, conv.shape.kernel[1] as isize) as usize;
    for ky in 0..conv.shape.kernel[0] {
        let to = &mut to[ky * run..];
        let y = (row * conv.shape.stride[0] + ky).checked_sub(conv.shape.pads[0]).filter(|&y| y < conv.shape.size[0]);
        let Some(y) = y.filter(|_| until > from) else {
            to[..run].fill(conv.zero);
            continue;
        };
        let start = (y * conv.shape.size[1] + (left + from as isize) as usize) * conv.shape.channels;
        let (before, inside) = (from * conv.shape.channels, (until - from) * conv.shape.channels);
        to[..before].fill(conv.zero);
        // in whole lines: what is too much is slack, or overwritten by what follows
        let lines = inside.div_ceil(ROW) * ROW;
        let (source, target) = (&x[start..start + lines], &mut to[before..before + lines]);
        for (to, from) in target.as_chunks_mut::<ROW>().0.iter_mut().zip(source.as_chunks().0) {
            *to = *from;
        }
        to[before + inside..run].fill(conv.zero);
    }
}

/// 32 pixels by 32 channels: sums `[32, 32]`.
///
/// # Safety
/// 32 rows of `steps` times 64 bytes are there, `pitch` bytes apart, weights of two vectors for as many units, 32 biases, and
/// room for the sums. Tiles are configured.
#[inline]
unsafe fn multiply(x: *const u8, pitch: usize, weight: *const u8, steps: usize, bias: *const i32, sums: *mut u8) {
    // SAFETY: the caller's
    unsafe {
        std::arch::asm!(
            // sums begin with biases: the same row 16 times
            "tileloadd tmm0, [{bias} + {none}]",
            "tileloadd tmm1, [{bias} + {none} + 64]",
            "tileloadd tmm2, [{bias} + {none}]",
            "tileloadd tmm3, [{bias} + {none} + 64]",
            "2:",
            "tileloadd tmm4, [{x} + {pitch}]",
            "tileloadd tmm6, [{weight} + {line}]",
            "tdpbusd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{weight} + {line} + 64]",
            "tdpbusd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{below} + {pitch}]",
            "tdpbusd tmm2, tmm5, tmm6",
            "tdpbusd tmm3, tmm5, tmm7",
            "add {x}, 64",
            "add {below}, 64",
            "add {weight}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 64], tmm1",
            "tilestored [{sums} + {line} + 2048], tmm2",
            "tilestored [{sums} + {line} + 2112], tmm3",
            x = inout(reg) x => _,
            below = inout(reg) x.wrapping_add(16 * pitch) => _,
            pitch = in(reg) pitch,
            weight = inout(reg) weight => _,
            line = in(reg) 128_usize,
            steps = inout(reg) steps => _,
            bias = in(reg) bias,
            none = in(reg) 0_usize,
            sums = in(reg) sums,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
