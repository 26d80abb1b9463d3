//! Vectors of 8 lanes: what AVX2 and AVX-VNNI have in common.

/// All vector functions but `dot`, over AVX2.
macro_rules! functions {
    ($features:literal) => {
        use std::arch::x86_64::*;

        use super::Table;

        const LANES: usize = 8;
        type Vector = __m256i;
        type Singles = __m256;
        type Order = __m256i;

        /// # Safety
        /// 32 bytes are there.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn load(bytes: *const u8) -> Vector {
            // SAFETY: the caller's
            unsafe { _mm256_loadu_si256(bytes.cast()) }
        }

        /// So many bytes as numbers of 32 bits.
        ///
        /// # Safety
        /// They are there.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn load_bytes(bytes: *const u8) -> Vector {
            // SAFETY: the caller's
            _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.cast()) })
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn all(value: i32) -> Vector {
            _mm256_set1_epi32(value)
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn difference(a: Vector, b: Vector) -> Vector {
            _mm256_sub_epi32(a, b)
        }

        /// Of numbers of 16 bits, each two added up.
        #[target_feature(enable = $features)]
        #[inline]
        fn products(a: Vector, b: Vector) -> Vector {
            _mm256_madd_epi16(a, b)
        }

        /// `M` units, over and over.
        ///
        /// # Safety
        /// They are there.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn spread<const M: usize>(units: *const u8) -> Vector {
            // SAFETY: the caller's
            unsafe {
                match M {
                    1 => _mm256_set1_epi32(units.cast::<i32>().read_unaligned()),
                    2 => _mm256_set1_epi64x(units.cast::<i64>().read_unaligned()),
                    4 => _mm256_broadcastsi128_si256(_mm_loadu_si128(units.cast())),
                    _ => load(units),
                }
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn order(lanes: &[i32; LANES]) -> Order {
            // SAFETY: as many values are there
            unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn permuted(v: Vector, order: Order) -> Vector {
            _mm256_permutevar8x32_epi32(v, order)
        }

        /// # Safety
        /// They are there.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn load_singles(values: *const f32) -> Singles {
            // SAFETY: the caller's
            unsafe { _mm256_loadu_ps(values) }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn all_singles(value: f32) -> Singles {
            _mm256_set1_ps(value)
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn product(v: Vector, factor: Singles) -> Singles {
            _mm256_mul_ps(_mm256_cvtepi32_ps(v), factor)
        }

        /// To the nearest, halves to even.
        #[target_feature(enable = $features)]
        #[inline]
        fn rounded(v: Singles) -> Vector {
            _mm256_cvtps_epi32(v)
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn sum(a: Vector, b: Vector) -> Vector {
            _mm256_add_epi32(a, b)
        }

        /// Within 16 bits and from `least` on.
        #[target_feature(enable = $features)]
        #[inline]
        fn limited(v: Vector, least: i32) -> Vector {
            _mm256_min_epi32(_mm256_max_epi32(v, _mm256_set1_epi32(least)), _mm256_set1_epi32(i16::MAX.into()))
        }

        /// Two vectors as 16 bits each, in order.
        #[target_feature(enable = $features)]
        #[inline]
        fn shorts(a: Vector, b: Vector) -> __m256i {
            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b))
        }

        /// # Safety
        /// `count` values are there.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn load_i16(values: *const i16, count: usize) -> Vector {
            let mut few = [0; LANES];
            let mut from = values;
            if count < LANES {
                // SAFETY: the caller's
                unsafe { std::ptr::copy_nonoverlapping(values, few.as_mut_ptr(), count) };
                from = few.as_ptr();
            }
            // SAFETY: as many are there
            _mm256_cvtepi16_epi32(unsafe { _mm_loadu_si128(from.cast()) })
        }

        /// # Safety
        /// There is room for `count` values.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn put_i16(v: Vector, to: *mut i16, count: usize) {
            let mut all = [0_i16; LANES];
            // SAFETY: the caller's, and `all` is as large as a vector
            unsafe {
                let target = if count < LANES { all.as_mut_ptr() } else { to };
                _mm_storeu_si128(target.cast(), _mm256_castsi256_si128(shorts(v, v)));
                if count < LANES {
                    std::ptr::copy_nonoverlapping(all.as_ptr(), to, count);
                }
            }
        }

        /// # Safety
        /// There is room for `count` values.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn put_singles(v: Singles, to: *mut f32, count: usize) {
            let mut all = [0_f32; LANES];
            // SAFETY: the caller's, and `all` is as large as a vector
            unsafe {
                let target = if count < LANES { all.as_mut_ptr() } else { to };
                _mm256_storeu_ps(target, v);
                if count < LANES {
                    std::ptr::copy_nonoverlapping(all.as_ptr(), to, count);
                }
            }
        }

        /// # Safety
        /// There is room for `count` bytes.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn put_bytes<const N: usize>(v: [Vector; N], zero: i16, to: *mut u8, count: usize) {
            let all = _mm256_adds_epi16(shorts(v[0], v[N - 1]), _mm256_set1_epi16(zero));
            let all = _mm_packus_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
            // SAFETY: the caller's, and `few` is as large as a vector
            unsafe {
                match count {
                    16 if N == 2 => _mm_storeu_si128(to.cast(), all),
                    8 => _mm_storel_epi64(to.cast(), all),
                    _ => {
                        let mut few = [0_u8; 16];
                        _mm_storeu_si128(few.as_mut_ptr().cast(), all);
                        std::ptr::copy_nonoverlapping(few.as_ptr(), to, count);
                    }
                }
            }
        }

        /// Pixels of one vector each, `filters` values apart.
        ///
        /// # Safety
        /// As for `put`, for each of them.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn put_pixels<const P: usize>(
            sums: [Vector; P],
            factor: *const f32,
            at: usize,
            filters: usize,
            count: usize,
            to: &Target,
        ) {
            for p in 0..P {
                // SAFETY: the caller's
                unsafe { put([sums[p]], factor, at + p * filters, count, to) };
            }
        }

        /// Replaces bytes by what a table has for them.
        #[target_feature(enable = $features)]
        fn look_up_in_place(table: &Table, bytes: &mut [u8]) {
            bytes.iter_mut().for_each(|byte| *byte = table[usize::from(*byte)]);
        }

        /// A value for each number below `N`.
        #[inline(always)]
        fn each<T, const N: usize>(f: impl FnMut(usize) -> T) -> [T; N] {
            std::array::from_fn(f)
        }
    };
}
pub(super) use functions;
