//! AVX2: products of 16 bits, so that no sum of two leaves its 32.

use super::processor::AVX2 as SHAPE;

super::lanes8::functions!("avx2");
super::target::kernel!("avx2");
super::dense::kernel!("avx2", SHAPE, [(2, 6), (1, 8)]);
super::narrow::kernel!("avx2", SHAPE, [12, 9, 8, 6, 4, 2, 1]);
super::passes::kernel!("avx2", SHAPE);

#[target_feature(enable = "avx2")]
#[inline]
fn dot(sum: Vector, x: Vector, weight: Vector) -> Vector {
    _mm256_add_epi32(sum, _mm256_madd_epi16(x, weight))
}
