//! NEON with the dot product instructions (Armv8.2 and later).
#![allow(unsafe_op_in_unsafe_fn)] // the contract is the trait's, see the module above

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Simd, Tiled};

#[derive(Clone, Copy)]
pub struct NeonDot;

/// `sdot`, for which there is no stable intrinsic.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    asm!(".arch_extension dotprod", "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
        options(pure, nomem, nostack, preserves_flags));
    sum
}

impl Tiled for NeonDot {
    const LANES: usize = 4;

    type F = float32x4_t;
    type I = int32x4_t;
    type P = int32x4_t;
    type B = uint8x16_t;

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        vdupq_n_f32(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        vld1q_f32(p)
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vaddq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> float32x4_t {
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: float32x4_t) {
        vst1q_f32(p, x);
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmulq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        vfmaq_f32(c, a, b)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> float32x4_t {
        let half = vld1_u16(p);
        let out: float32x4_t;
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) half, options(pure, nomem, nostack, preserves_flags));
        out
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> float32x4_t {
        let x = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(x))))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> float32x4_t {
        let x = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x))))
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> int32x4_t {
        vdupq_n_s32(x)
    }
    #[inline(always)]
    unsafe fn to_f(x: int32x4_t) -> float32x4_t {
        vcvtq_f32_s32(x)
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> uint8x16_t {
        vld1q_u8(p)
    }
    #[inline(always)]
    unsafe fn bits(x: uint8x16_t, left: i32, right: i32, mask: u8) -> uint8x16_t {
        let x = vshlq_u8(x, vdupq_n_s8(left as i8));
        vandq_u8(vshlq_u8(x, vdupq_n_s8(-right as i8)), vdupq_n_u8(mask))
    }
    #[inline(always)]
    unsafe fn or(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
        vorrq_u8(a, b)
    }
    #[inline(always)]
    unsafe fn begin(zero: i32) -> int32x4_t {
        Self::splat_i(zero)
    }
    #[inline(always)]
    unsafe fn carry(sum: int32x4_t, carried: int32x4_t) -> (int32x4_t, int32x4_t) {
        (sum, carried)
    }
    #[inline(always)]
    unsafe fn end(sum: int32x4_t, _carried: int32x4_t, _zero: i32) -> int32x4_t {
        sum
    }
    #[inline(always)]
    unsafe fn dot(sum: int32x4_t, w: uint8x16_t, x: i32) -> int32x4_t {
        sdot(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_s32(vdupq_n_s32(x)))
    }
    #[inline(always)]
    unsafe fn biased_start(_zero: i32) -> int32x4_t {
        vdupq_n_s32(0)
    }
    #[inline(always)]
    unsafe fn dot_biased(sum: int32x4_t, w: uint8x16_t, x: i32) -> int32x4_t {
        Self::dot(sum, veorq_u8(w, vdupq_n_u8(128)), x)
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        asm!("prfm pldl1keep, [{0}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
}

impl Simd for NeonDot {
    const INT_ROWS: usize = 8;
    const FLOAT_ROWS: usize = 6;
    const REGISTERS: usize = 32;

    type Wide = Self;

    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vdivq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmaxq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn reduce_add(x: float32x4_t) -> f32 {
        vaddvq_f32(x)
    }
    #[inline(always)]
    unsafe fn reduce_max(x: float32x4_t) -> f32 {
        vmaxvq_f32(x)
    }
    #[inline(always)]
    unsafe fn round(x: float32x4_t) -> float32x4_t {
        vrndnq_f32(x)
    }
    #[inline(always)]
    unsafe fn scale2(x: float32x4_t, n: float32x4_t) -> float32x4_t {
        let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
        vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
    }
    #[inline(always)]
    unsafe fn zero_below(x: float32x4_t, limit: f32, y: float32x4_t) -> float32x4_t {
        let mask = vcgeq_f32(x, vdupq_n_f32(limit));
        vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(y)))
    }
    #[inline(always)]
    unsafe fn to_i(x: float32x4_t) -> int32x4_t {
        vcvtnq_s32_f32(x)
    }
    #[inline(always)]
    unsafe fn reduce_add_i(x: int32x4_t) -> i32 {
        vaddvq_s32(x)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: int32x4_t) {
        let x = vqmovn_s32(x);
        let x = vqmovn_s16(vcombine_s16(x, x));
        p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_s8(x)));
    }
    #[inline(always)]
    unsafe fn store_i16(p: *mut i16, x: int32x4_t) {
        vst1_s16(p, vqmovn_s32(x));
    }
    #[inline(always)]
    unsafe fn dot_pairs(sum: int32x4_t, w: uint8x16_t, x: i32) -> int32x4_t {
        // The vectors of even and of odd integers are the same for all rows of a block.
        let (w, x) = (vreinterpretq_s16_u8(w), vreinterpret_s16_s32(vdup_n_s32(x)));
        let (even, odd) = (vget_low_s16(vuzp1q_s16(w, w)), vget_low_s16(vuzp2q_s16(w, w)));
        vmlal_lane_s16::<1>(vmlal_lane_s16::<0>(sum, even, x), odd, x)
    }
    #[inline(always)]
    unsafe fn sum_i8(p: *const i8) -> i32 {
        i32::from(vaddlvq_s8(vld1q_s8(p)))
    }
    #[inline(always)]
    unsafe fn prefetch_l2(p: *const u8) {
        asm!("prfm pldl2keep, [{0}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
}
