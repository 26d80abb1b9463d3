//! AVX2 with VNNI: products of four bytes.

use super::processor::AVX_VNNI as SHAPE;

super::lanes8::functions!("avx2,avxvnni");
super::target::kernel!("avx2,avxvnni");
super::dense::kernel!("avx2,avxvnni", SHAPE, [(2, 6), (1, 8)]);
super::narrow::kernel!("avx2,avxvnni", SHAPE, [12, 9, 8, 6, 4, 2, 1]);
super::passes::kernel!("avx2,avxvnni", SHAPE);

#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn dot(sum: Vector, x: Vector, weight: Vector) -> Vector {
    _mm256_dpbusd_avx_epi32(sum, x, weight)
}
