//! AVX-512 with VNNI: 16 lanes.

use std::arch::x86_64::*;

const LANES: usize = 16;
type Vector = __m512i;
type Singles = __m512;
type Order = __m512i;

/// # Safety
/// 64 bytes are there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load(bytes: *const u8) -> Vector {
    // SAFETY: the caller's
    unsafe { _mm512_loadu_si512(bytes.cast()) }
}

/// So many bytes as numbers of 32 bits.
///
/// # Safety
/// They are there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_bytes(bytes: *const u8) -> Vector {
    // SAFETY: the caller's
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.cast()) })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn all(value: i32) -> Vector {
    _mm512_set1_epi32(value)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn difference(a: Vector, b: Vector) -> Vector {
    _mm512_sub_epi32(a, b)
}

/// Of numbers of 16 bits, each two added up.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn products(a: Vector, b: Vector) -> Vector {
    _mm512_madd_epi16(a, b)
}

/// `M` units, over and over.
///
/// # Safety
/// They are there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn spread<const M: usize>(units: *const u8) -> Vector {
    // SAFETY: the caller's
    unsafe {
        match M {
            1 => _mm512_set1_epi32(units.cast::<i32>().read_unaligned()),
            2 => _mm512_set1_epi64(units.cast::<i64>().read_unaligned()),
            4 => _mm512_broadcast_i32x4(_mm_loadu_si128(units.cast())),
            _ => load(units),
        }
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dot(sum: Vector, x: Vector, weight: Vector) -> Vector {
    _mm512_dpbusd_epi32(sum, x, weight)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn order(lanes: &[i32; LANES]) -> Order {
    // SAFETY: as many values are there
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn permuted(v: Vector, order: Order) -> Vector {
    _mm512_permutexvar_epi32(order, v)
}

/// # Safety
/// They are there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_singles(values: *const f32) -> Singles {
    // SAFETY: the caller's
    unsafe { _mm512_loadu_ps(values) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn all_singles(value: f32) -> Singles {
    _mm512_set1_ps(value)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn product(v: Vector, factor: Singles) -> Singles {
    _mm512_mul_ps(_mm512_cvtepi32_ps(v), factor)
}

/// To the nearest, halves to even.
#[target_feature(enable = "avx512f")]
#[inline]
fn rounded(v: Singles) -> Vector {
    _mm512_cvtps_epi32(v)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn sum(a: Vector, b: Vector) -> Vector {
    _mm512_add_epi32(a, b)
}

/// Within 16 bits and from `least` on.
#[target_feature(enable = "avx512f")]
#[inline]
fn limited(v: Vector, least: i32) -> Vector {
    _mm512_min_epi32(_mm512_max_epi32(v, _mm512_set1_epi32(least)), _mm512_set1_epi32(i16::MAX.into()))
}

/// The first so many of 16.
fn first(count: usize) -> u16 {
    ((1_u32 << count.min(LANES)) - 1) as u16
}

/// The first so many of 64.
fn first_bytes(count: usize) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// # Safety
/// `count` values are there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn load_i16(values: *const i16, count: usize) -> Vector {
    // SAFETY: the caller's
    _mm512_cvtepi16_epi32(unsafe { _mm256_maskz_loadu_epi16(first(count), values) })
}

/// # Safety
/// There is room for `count` values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn put_i16(v: Vector, to: *mut i16, count: usize) {
    // SAFETY: the caller's
    unsafe { _mm256_mask_storeu_epi16(to, first(count), _mm512_cvtepi32_epi16(v)) }
}

/// # Safety
/// There is room for `count` values.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn put_singles(v: Singles, to: *mut f32, count: usize) {
    // SAFETY: the caller's
    unsafe { _mm512_mask_storeu_ps(to, first(count), v) }
}

/// Four vectors as bytes, in order.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn bytes(v: [Vector; 4], zero: i16) -> __m512i {
    let zero = _mm512_set1_epi16(zero);
    let low = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), zero);
    let high = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), zero);
    // four bytes of each vector in turn
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high))
}

/// # Safety
/// There is room for `count` bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn put_bytes<const N: usize>(v: [Vector; N], zero: i16, to: *mut u8, count: usize) {
    let v = bytes(each(|i| v[i.min(N - 1)]), zero);
    // SAFETY: the caller's
    unsafe { _mm512_mask_storeu_epi8(to.cast(), first_bytes(count), v) }
}

/// Pixels of one vector each, `filters` values apart.
///
/// # Safety
/// As for `put`, for each of them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn put_pixels<const P: usize>(
    sums: [Vector; P],
    factor: *const f32,
    at: usize,
    filters: usize,
    count: usize,
    to: &Target,
) {
    if to.kind != Kind::Bytes || to.bytes.is_null() {
        for (p, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's
            unsafe { put([sum], factor, at + p * filters, count, to) };
        }
        return;
    }
    // SAFETY: the caller's
    let factor = unsafe { load_singles(factor) };
    let mask = first(count);
    let mut p = 0;
    while p < P {
        let v = bytes(each(|i| rounded(product(sums[(p + i).min(P - 1)], factor))), to.zero);
        let parts = [
            _mm512_castsi512_si128(v),
            _mm512_extracti32x4_epi32::<1>(v),
            _mm512_extracti32x4_epi32::<2>(v),
            _mm512_extracti32x4_epi32::<3>(v),
        ];
        for (i, part) in parts.into_iter().enumerate() {
            if p + i < P {
                // SAFETY: the caller's
                unsafe { _mm_mask_storeu_epi8(to.bytes.wrapping_add(at + (p + i) * filters).cast(), mask, part) };
            }
        }
        p += 4;
    }
}

/// Replaces bytes by what a table has for them.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn look_up_by_bytes(table: &Table, bytes: &mut [u8]) {
    // SAFETY: 256 bytes are there
    let t: [__m512i; 4] = each(|i| unsafe { _mm512_loadu_si512(table[i * 64..].as_ptr().cast()) });
    let of = |x: __m512i| {
        let (low, high) = (_mm512_permutex2var_epi8(t[0], x, t[1]), _mm512_permutex2var_epi8(t[2], x, t[3]));
        _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high)
    };
    let mut chunks = bytes.chunks_exact_mut(64);
    for chunk in &mut chunks {
        // SAFETY: 64 bytes are there
        unsafe { _mm512_storeu_si512(chunk.as_mut_ptr().cast(), of(_mm512_loadu_si512(chunk.as_ptr().cast()))) };
    }
    let rest = chunks.into_remainder();
    let mask = first_bytes(rest.len());
    // SAFETY: no more than the bytes that are left
    unsafe {
        _mm512_mask_storeu_epi8(rest.as_mut_ptr().cast(), mask, of(_mm512_maskz_loadu_epi8(mask, rest.as_ptr().cast())))
    };
}

/// The same without a permutation of bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vl")]
pub(super) fn look_up_in_place(table: &Table, bytes: &mut [u8]) {
    if std::arch::is_x86_feature_detected!("avx512vbmi") {
        // SAFETY: the processor has it
        unsafe { look_up_by_bytes(table, bytes) };
    } else {
        bytes.iter_mut().for_each(|byte| *byte = table[usize::from(*byte)]);
    }
}

/// A value for each number below `N`.
#[inline(always)]
fn each<T, const N: usize>(f: impl FnMut(usize) -> T) -> [T; N] {
    std::array::from_fn(f)
}

use super::Table;
use super::processor::AVX512 as SHAPE;
super::target::kernel!("avx512f,avx512bw,avx512vl,avx512vnni");
super::dense::kernel!("avx512f,avx512bw,avx512vl,avx512vnni", SHAPE, [(4, 6), (3, 8), (2, 8), (1, 8)]);
super::narrow::kernel!("avx512f,avx512bw,avx512vl,avx512vnni", SHAPE, [12, 9, 8, 6, 4, 2, 1]);
super::passes::kernel!("avx512f,avx512bw,avx512vl,avx512vnni", SHAPE);

/// Writes some rows of a tile `[.., 32]` of sums, which begins with a pixel and a channel.
///
/// # Safety
/// They are there, there are as many factors, and there is room in the target.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn put_tile(
    sums: *const i32,
    rows: std::ops::Range<usize>,
    factor: *const f32,
    [pixel, channel]: [usize; 2],
    filters: usize,
    to: &Target,
) {
    let count = (filters - channel).min(2 * LANES);
    let mut row = rows.start;
    // SAFETY: the caller's
    unsafe {
        let factors: [Singles; 2] = each(|n| load_singles(factor.wrapping_add(n * LANES)));
        while row < rows.end {
            let vectors: [Vector; 4] =
                each(|n| load(sums.wrapping_add((row + n / 2).min(rows.end - 1) * 32 + n % 2 * LANES).cast()));
            let at = (pixel + row) * filters + channel;
            if to.kind == Kind::Bytes && !to.bytes.is_null() {
                // two rows at once
                let all = bytes(each(|n| rounded(product(vectors[n], factors[n % 2]))), to.zero);
                let mask = first_bytes(count) as u32;
                _mm256_mask_storeu_epi8(to.bytes.wrapping_add(at).cast(), mask, _mm512_castsi512_si256(all));
                if row + 1 < rows.end {
                    let upper = _mm512_extracti64x4_epi64::<1>(all);
                    _mm256_mask_storeu_epi8(to.bytes.wrapping_add(at + filters).cast(), mask, upper);
                }
            } else if to.kind == Kind::Sum && count == 2 * LANES && row + 1 < rows.end {
                put_sums(each(|n| rounded(product(vectors[n], factors[n % 2]))), [at, at + filters], to);
            } else {
                put([vectors[0], vectors[1]], factor, at, count, to);
                if row + 1 < rows.end {
                    put([vectors[2], vectors[3]], factor, at + filters, count, to);
                }
            }
            row += 2;
        }
    }
}

/// Writes two rows of 32 scaled sums.
///
/// # Safety
/// There is room in the target.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn put_sums(mut sums: [Vector; 4], at: [usize; 2], to: &Target) {
    let place = |n: usize| at[n / 2] + n % 2 * LANES;
    // SAFETY: the caller's
    unsafe {
        if !to.addend.is_null() {
            sums = each(|n| {
                let addend = _mm256_loadu_si256(to.addend.wrapping_add(place(n)).cast());
                sum(sums[n], _mm512_cvtepi16_epi32(addend))
            });
        }
        let sums: [Vector; 4] = each(|n| limited(sums[n], to.least));
        if !to.sums.is_null() {
            // eight bytes of each vector in turn
            let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
            for row in 0..2 {
                let shorts = _mm512_permutexvar_epi64(order, _mm512_packs_epi32(sums[2 * row], sums[2 * row + 1]));
                _mm512_storeu_si512(to.sums.wrapping_add(at[row]).cast(), shorts);
            }
        }
        if !to.bytes.is_null() {
            let factor = all_singles(to.factor);
            let all = bytes(each(|n| rounded(product(sums[n], factor))), to.zero);
            _mm256_storeu_si256(to.bytes.wrapping_add(at[0]).cast(), _mm512_castsi512_si256(all));
            _mm256_storeu_si256(to.bytes.wrapping_add(at[1]).cast(), _mm512_extracti64x4_epi64::<1>(all));
        }
    }
}
