//! AVX2 with FMA and F16C, with and without the VNNI extension.
#![allow(unsafe_op_in_unsafe_fn)] // the contract is the trait's, see the module above

use std::arch::asm;
use std::arch::x86_64::*;

use super::twice::Twice;
use super::{Simd, Tiled};

#[derive(Clone, Copy)]
pub struct Avx2;

#[derive(Clone, Copy)]
pub struct Avx2Vnni;

/// The same with the instructions of AVX-512 VL and VNNI, which do the same: for tests.
#[cfg(test)]
#[derive(Clone, Copy)]
pub struct Avx2VnniOf512;

/// A sum that the compiler may not see through: it would gather the additions of one row, for integers may be added in any order, and
/// move the products of the others to the stack until then.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: no instruction, and nothing but the operand. Not `pure`: then the statements keep their order among themselves.
    asm!("/* {0} */", inout(ymm_reg) sum, options(nomem, nostack, preserves_flags));
    sum
}

macro_rules! avx2 {
    ($name:ident, $dot_pairs:expr, $($dots:tt)*) => {
        impl Tiled for $name {
            const LANES: usize = 8;

            type F = __m256;
            type I = __m256i;
            type B = __m256i;

            #[inline(always)]
            unsafe fn splat(x: f32) -> __m256 {
                _mm256_set1_ps(x)
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> __m256 {
                _mm256_loadu_ps(p)
            }
            #[inline(always)]
            unsafe fn add(a: __m256, b: __m256) -> __m256 {
                _mm256_add_ps(a, b)
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const u16) -> __m256 {
                let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, x: __m256) {
                _mm256_storeu_ps(p, x);
            }
            #[inline(always)]
            unsafe fn mul(a: __m256, b: __m256) -> __m256 {
                _mm256_mul_ps(a, b)
            }
            #[inline(always)]
            unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
                _mm256_fmadd_ps(a, b, c)
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const u16) -> __m256 {
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
            }
            #[inline(always)]
            unsafe fn load_u8(p: *const u8) -> __m256 {
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())))
            }
            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> __m256 {
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))
            }
            #[inline(always)]
            unsafe fn splat_i(x: i32) -> __m256i {
                _mm256_set1_epi32(x)
            }
            #[inline(always)]
            unsafe fn to_f(x: __m256i) -> __m256 {
                _mm256_cvtepi32_ps(x)
            }
            #[inline(always)]
            unsafe fn load_b(p: *const u8) -> __m256i {
                _mm256_loadu_si256(p.cast())
            }
            #[inline(always)]
            unsafe fn bits(x: __m256i, left: i32, right: i32, mask: u8) -> __m256i {
                let x = _mm256_sll_epi16(x, _mm_cvtsi32_si128(left));
                let x = _mm256_srl_epi16(x, _mm_cvtsi32_si128(right));
                _mm256_and_si256(x, _mm256_set1_epi8(mask as i8))
            }
            #[inline(always)]
            unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
                _mm256_or_si256(a, b)
            }
            #[inline(always)]
            unsafe fn prefetch(p: *const u8) {
                _mm_prefetch::<_MM_HINT_T0>(p.cast());
            }
            $($dots)*
        }

        impl Simd for $name {
            const INT_ROWS: usize = 5; // ten sums, two vectors of weights, an activation and a product fill 14 of 16 registers
            const FLOAT_ROWS: usize = 3;
            const REGISTERS: usize = 16;

            type Wide = Twice<Self>;

            #[inline(always)]
            unsafe fn div(a: __m256, b: __m256) -> __m256 {
                _mm256_div_ps(a, b)
            }
            #[inline(always)]
            unsafe fn max(a: __m256, b: __m256) -> __m256 {
                _mm256_max_ps(a, b)
            }
            #[inline(always)]
            unsafe fn reduce_add(x: __m256) -> f32 {
                let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
            }
            #[inline(always)]
            unsafe fn reduce_max(x: __m256) -> f32 {
                let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
            }
            #[inline(always)]
            unsafe fn round(x: __m256) -> __m256 {
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
            }
            #[inline(always)]
            unsafe fn scale2(x: __m256, n: __m256) -> __m256 {
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
            }
            #[inline(always)]
            unsafe fn zero_below(x: __m256, limit: f32, y: __m256) -> __m256 {
                _mm256_and_ps(y, _mm256_cmp_ps::<_CMP_GE_OQ>(x, _mm256_set1_ps(limit)))
            }
            #[inline(always)]
            unsafe fn to_i(x: __m256) -> __m256i {
                _mm256_cvtps_epi32(x)
            }
            #[inline(always)]
            unsafe fn reduce_add_i(x: __m256i) -> i32 {
                let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
                _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
            }
            #[inline(always)]
            unsafe fn store_i8(p: *mut i8, x: __m256i) {
                let x = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                _mm_storel_epi64(p.cast(), _mm_packs_epi16(x, x));
            }
            #[inline(always)]
            unsafe fn store_i16(p: *mut i16, x: __m256i) {
                let x = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                _mm_storeu_si128(p.cast(), x);
            }
            #[inline(always)]
            unsafe fn dot_pairs(sum: __m256i, w: __m256i, x: i32) -> __m256i {
                $dot_pairs(sum, w, _mm256_set1_epi32(x))
            }
            #[inline(always)]
            unsafe fn sum_i8(p: *const i8) -> i32 {
                sum_i8(p)
            }
            #[inline(always)]
            unsafe fn prefetch_l2(p: *const u8) {
                _mm_prefetch::<_MM_HINT_T1>(p.cast());
            }
        }
    };
}

/// [`Simd::sum_i8`]: the differences of bytes from 0 are what this instruction adds up.
///
/// # Safety
/// 16 bytes lie behind `p`.
#[inline(always)]
pub(super) unsafe fn sum_i8(p: *const i8) -> i32 {
    let biased = _mm_xor_si128(_mm_loadu_si128(p.cast()), _mm_set1_epi8(-128));
    let halves = _mm_sad_epu8(biased, _mm_setzero_si128());
    _mm_cvtsi128_si32(_mm_add_epi32(halves, _mm_unpackhi_epi64(halves, halves))) - 16 * 128
}

macro_rules! avx2_vnni {
    ($name:ident, $dot:ident, $dot_pairs:ident) => {
        avx2! {
            $name,
            $dot_pairs,
            type P = __m256i;

            #[inline(always)]
            unsafe fn begin(zero: i32) -> __m256i {
                Self::splat_i(zero)
            }
            #[inline(always)]
            unsafe fn carry(sum: __m256i, carried: __m256i) -> (__m256i, __m256i) {
                (sum, carried)
            }
            #[inline(always)]
            unsafe fn end(sum: __m256i, _carried: __m256i, _zero: i32) -> __m256i {
                sum
            }
            #[inline(always)]
            unsafe fn dot(sum: __m256i, w: __m256i, x: i32) -> __m256i {
                $dot(sum, w, _mm256_set1_epi32(x))
            }
            #[inline(always)]
            unsafe fn biased_start(zero: i32) -> __m256i {
                _mm256_set1_epi32(zero)
            }
            #[inline(always)]
            unsafe fn dot_biased(sum: __m256i, w: __m256i, x: i32) -> __m256i {
                Self::dot(sum, w, x)
            }
        }
    };
}

avx2_vnni!(Avx2Vnni, _mm256_dpbusd_avx_epi32, _mm256_dpwssd_avx_epi32);
#[cfg(test)]
avx2_vnni!(Avx2VnniOf512, _mm256_dpbusd_epi32, _mm256_dpwssd_epi32);

avx2! {
    Avx2,
    |sum, w, x| in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(w, x))),
    // i16, two to an element: 2 * 8 products of 15 * 127 fit, or 2 * 4 of 31 * 127, or 2 * 2 of 63 * 127. Widening each time would
    // take half as many instructions again.
    type P = __m256i;

    #[inline(always)]
    unsafe fn begin(_zero: i32) -> __m256i {
        _mm256_setzero_si256()
    }
    #[inline(always)]
    unsafe fn dot(sum: __m256i, w: __m256i, x: i32) -> __m256i {
        in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(x))))
    }
    #[inline(always)]
    unsafe fn carry(sum: __m256i, carried: __m256i) -> (__m256i, __m256i) {
        (_mm256_setzero_si256(), Self::end(sum, carried, 0))
    }
    #[inline(always)]
    unsafe fn end(sum: __m256i, carried: __m256i, zero: i32) -> __m256i {
        let sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
        _mm256_add_epi32(_mm256_add_epi32(sum, carried), _mm256_set1_epi32(zero))
    }
    #[inline(always)]
    unsafe fn biased_start(_zero: i32) -> __m256i {
        _mm256_setzero_si256()
    }
    #[inline(always)]
    unsafe fn dot_biased(sum: __m256i, w: __m256i, x: i32) -> __m256i {
        // Stored + 128, two products would saturate 16 bits: |w| <= 128 and w's sign moved to x do not.
        let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(x), w));
        in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
    }
}
