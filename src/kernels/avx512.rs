//! AVX-512: 16 channels a vector.

use std::arch::x86_64::*;

use super::activation::{Activation, ERFC, EXP2, ROUNDER};

const LANES: usize = 16;
type Vector = __m512;
type Order = __m512i;

#[target_feature(enable = "avx512f")]
#[inline]
fn load(values: &[f32; LANES]) -> Vector {
    // SAFETY: as many values are there
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(values: &mut [f32; LANES], v: Vector) {
    // SAFETY: as many values are there
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), v) }
}

/// `M` values, over and over.
///
/// # Safety
/// They are there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn repeat<const M: usize>(values: *const f32) -> Vector {
    // SAFETY: the caller's
    unsafe {
        match M {
            1 => _mm512_set1_ps(*values),
            2 => _mm512_castpd_ps(_mm512_set1_pd(values.cast::<f64>().read_unaligned())),
            4 => _mm512_broadcast_f32x4(_mm_loadu_ps(values)),
            8 => _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_loadu_pd(values.cast()))),
            _ => _mm512_loadu_ps(values),
        }
    }
}

/// Asks for what will be read soon, wherever that is.
#[target_feature(enable = "avx512f")]
#[inline]
fn prefetch(values: *const f32) {
    _mm_prefetch::<_MM_HINT_T1>(values.cast());
}

/// These vectors, in registers from here on: left to itself, LLVM loads the last of them late and keeps in memory what waits
/// for it.
#[target_feature(enable = "avx512f")]
#[inline]
fn pinned([mut a, mut b, mut c]: [Vector; 3]) -> [Vector; 3] {
    // SAFETY: no instruction at all
    unsafe {
        std::arch::asm!("/* {a} {b} {c} */", a = inout(zmm_reg) a, b = inout(zmm_reg) b, c = inout(zmm_reg) c, options(nostack, preserves_flags))
    };
    [a, b, c]
}

#[target_feature(enable = "avx512f")]
#[inline]
fn order(lanes: &[i32; LANES]) -> Order {
    // SAFETY: as many values are there
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn permute(v: Vector, order: Order) -> Vector {
    _mm512_permutexvar_ps(order, v)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn all(x: f32) -> Vector {
    _mm512_set1_ps(x)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn fma(a: Vector, b: Vector, c: Vector) -> Vector {
    _mm512_fmadd_ps(a, b, c)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn add(a: Vector, b: Vector) -> Vector {
    _mm512_add_ps(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn mul(a: Vector, b: Vector) -> Vector {
    _mm512_mul_ps(a, b)
}

/// `2^t` for `-126 < t < 128`, where `t = a b` is given by its factors so that nothing of it is lost.
#[target_feature(enable = "avx512f")]
#[inline]
fn exp2_of<const N: usize>(a: [Vector; N], b: [Vector; N]) -> [Vector; N] {
    // the sum is rounded to a whole number, whose lowest bits are those of `t` rounded
    let shifted: [Vector; N] = each(|i| fma(a[i], b[i], all(ROUNDER)));
    let f: [Vector; N] = each(|i| _mm512_fmsub_ps(a[i], b[i], _mm512_sub_ps(shifted[i], all(ROUNDER))));
    let p = polynomial(&EXP2, f);
    // added to the exponent
    let n: [_; N] = each(|i| _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted[i])));
    each(|i| _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p[i]), n[i])))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn polynomial<const N: usize>(coefficients: &[f32], x: [Vector; N]) -> [Vector; N] {
    let mut p = [all(coefficients[0]); N];
    for c in &coefficients[1..] {
        p = each(|i| fma(p[i], x[i], all(*c)));
    }
    p
}

#[target_feature(enable = "avx512f")]
#[inline]
fn silu<const N: usize>(x: [Vector; N]) -> [Vector; N] {
    // NaN stays: it is the second operand
    let x: [Vector; N] = each(|i| _mm512_max_ps(all(-87.0), x[i]));
    let r = logistic(x);
    each(|i| mul(x[i], r[i]))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn sigmoid<const N: usize>(x: [Vector; N]) -> [Vector; N] {
    logistic(each(|i| _mm512_max_ps(all(-87.0), x[i])))
}

/// `1 / (1 + exp(-x))` for `x ≥ -87`.
#[target_feature(enable = "avx512f")]
#[inline]
fn logistic<const N: usize>(x: [Vector; N]) -> [Vector; N] {
    let bounded = each(|i| _mm512_min_ps(all(87.0), x[i]));
    let e = exp2_of(bounded, [all(-std::f32::consts::LOG2_E); N]);
    let d: [Vector; N] = each(|i| add(e[i], all(1.0)));
    let r: [Vector; N] = each(|i| _mm512_rcp14_ps(d[i]));
    let rest: [Vector; N] = each(|i| _mm512_fnmadd_ps(d[i], r[i], all(1.0)));
    each(|i| fma(rest[i], r[i], r[i]))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn gelu<const N: usize>(x: [Vector; N]) -> [Vector; N] {
    let x: [Vector; N] = each(|i| _mm512_max_ps(all(-7.0), x[i]));
    let a: [Vector; N] = each(|i| _mm512_min_ps(all(7.0), _mm512_abs_ps(x[i])));
    let p = polynomial(&ERFC, a);
    let e = exp2_of(each(|i| _mm512_sub_ps(all(0.0), a[i])), p);
    let half: [Vector; N] = each(|i| mul(e[i], all(0.5)));
    each(|i| {
        mul(x[i], {
            let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x[i], all(0.0));
            _mm512_mask_blend_ps(negative, _mm512_sub_ps(all(1.0), half[i]), half[i])
        })
    })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn relu<const N: usize>(x: [Vector; N]) -> [Vector; N] {
    // NaN stays
    each(|i| _mm512_max_ps(all(0.0), x[i]))
}

/// A vector for each number below `N`.
#[inline(always)]
fn each<T, const N: usize>(f: impl FnMut(usize) -> T) -> [T; N] {
    std::array::from_fn(f)
}

super::grouped_conv::kernel!("avx512f", [1, 2, 4], [(12, 2), (9, 2), (8, 3), (7, 3), (6, 3), (5, 5), (2, 4), (1, 1)]);
super::pointwise::kernel!("avx512f");
super::pointwise_conv::kernel!("avx512f", [12 11 10 9 8 7 6 5 4 3 2 1]);
