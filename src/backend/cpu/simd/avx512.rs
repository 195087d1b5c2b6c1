//! AVX-512 F, BW, VL and VNNI: Ice Lake, Zen 4 and later.
#![allow(unsafe_op_in_unsafe_fn)] // the contract is the trait's, see the module above

use std::arch::x86_64::*;

use super::{Simd, Tiled};

#[derive(Clone, Copy)]
pub struct Avx512Vnni;

impl Tiled for Avx512Vnni {
    const LANES: usize = 16;

    type F = __m512;
    type I = __m512i;
    type P = __m512i;
    type B = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        _mm512_storeu_ps(p, x);
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn to_f(x: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(x)
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    // The counts are constants at every call; the compiler makes immediate shifts of them.
    #[inline(always)]
    unsafe fn bits(x: __m512i, left: i32, right: i32, mask: u8) -> __m512i {
        let x = _mm512_sll_epi16(x, _mm_cvtsi32_si128(left));
        let x = _mm512_srl_epi16(x, _mm_cvtsi32_si128(right));
        _mm512_and_si512(x, _mm512_set1_epi8(mask as i8))
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn begin(zero: i32) -> __m512i {
        Self::splat_i(zero)
    }
    #[inline(always)]
    unsafe fn carry(sum: __m512i, carried: __m512i) -> (__m512i, __m512i) {
        (sum, carried)
    }
    #[inline(always)]
    unsafe fn end(sum: __m512i, _carried: __m512i, _zero: i32) -> __m512i {
        sum
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, w: __m512i, x: i32) -> __m512i {
        _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn biased_start(zero: i32) -> __m512i {
        _mm512_set1_epi32(zero)
    }
    #[inline(always)]
    unsafe fn dot_biased(sum: __m512i, w: __m512i, x: i32) -> __m512i {
        Self::dot(sum, w, x)
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

impl Simd for Avx512Vnni {
    const INT_ROWS: usize = 12;
    const FLOAT_ROWS: usize = 6;
    const PAIRED_ROWS: usize = 6;
    const REGISTERS: usize = 32;

    type Wide = Self;

    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn reduce_add(x: __m512) -> f32 {
        _mm512_reduce_add_ps(x)
    }
    #[inline(always)]
    unsafe fn reduce_max(x: __m512) -> f32 {
        _mm512_reduce_max_ps(x)
    }
    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
    }
    #[inline(always)]
    unsafe fn scale2(x: __m512, n: __m512) -> __m512 {
        _mm512_scalef_ps(x, n)
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m512, limit: f32, y: __m512) -> __m512 {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(limit)), y)
    }
    #[inline(always)]
    unsafe fn to_i(x: __m512) -> __m512i {
        _mm512_cvtps_epi32(x)
    }
    #[inline(always)]
    unsafe fn reduce_add_i(x: __m512i) -> i32 {
        _mm512_reduce_add_epi32(x)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: __m512i) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(x));
    }
    #[inline(always)]
    unsafe fn store_i16(p: *mut i16, x: __m512i) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(x));
    }
    #[inline(always)]
    unsafe fn dot_pairs(sum: __m512i, w: __m512i, x: i32) -> __m512i {
        _mm512_dpwssd_epi32(sum, w, _mm512_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn sum_i8(p: *const i8) -> i32 {
        super::avx2::sum_i8(p)
    }
    #[inline(always)]
    unsafe fn prefetch_l2(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
}
