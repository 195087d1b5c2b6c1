//! No special instructions: what every CPU can do, and the check on the others.
#![allow(unsafe_op_in_unsafe_fn)] // the contract is the trait's, see the module above

use half::{bf16, f16};

use super::{Simd, Tiled};

#[derive(Clone, Copy)]
pub struct Plain;

const N: usize = 4;

#[inline(always)]
fn each<T: Copy + Default, U>(x: [U; N], f: impl Fn(&U) -> T) -> [T; N] {
    let mut out = [T::default(); N];
    out.iter_mut().zip(&x).for_each(|(o, x)| *o = f(x));
    out
}

#[inline(always)]
fn pairs<T: Copy + Default>(a: [T; N], b: [T; N], f: impl Fn(T, T) -> T) -> [T; N] {
    let mut out = a;
    out.iter_mut().zip(b).for_each(|(o, b)| *o = f(*o, b));
    out
}

#[inline(always)]
fn four(x: i32) -> [i8; 4] {
    x.to_le_bytes().map(|b| b as i8)
}

impl Tiled for Plain {
    const LANES: usize = N;

    type F = [f32; N];
    type I = [i32; N];
    type P = [i32; N];
    type B = [u8; 4 * N];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; N] {
        p.cast::<[f32; N]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn add(a: [f32; N], b: [f32; N]) -> [f32; N] {
        pairs(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; N] {
        each(p.cast::<[u16; N]>().read_unaligned(), |&x| bf16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: [f32; N]) {
        p.cast::<[f32; N]>().write_unaligned(x);
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; N], b: [f32; N]) -> [f32; N] {
        pairs(a, b, |a, b| a * b)
    }
    // Not `mul_add`: without the instruction it is a call into the C library.
    #[inline(always)]
    unsafe fn fma(a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        Self::add(Self::mul(a, b), c)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> [f32; N] {
        each(p.cast::<[u16; N]>().read_unaligned(), |&x| f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> [f32; N] {
        each(p.cast::<[u8; N]>().read_unaligned(), |&x| f32::from(x))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> [f32; N] {
        each(p.cast::<[i8; N]>().read_unaligned(), |&x| f32::from(x))
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> [i32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn to_f(x: [i32; N]) -> [f32; N] {
        each(x, |&x| x as f32)
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> [u8; 4 * N] {
        p.cast::<[u8; 4 * N]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn bits(x: [u8; 4 * N], left: i32, right: i32, mask: u8) -> [u8; 4 * N] {
        x.map(|x| ((x << left) >> right) & mask)
    }
    #[inline(always)]
    unsafe fn or(mut a: [u8; 4 * N], b: [u8; 4 * N]) -> [u8; 4 * N] {
        a.iter_mut().zip(b).for_each(|(a, b)| *a |= b);
        a
    }
    #[inline(always)]
    unsafe fn begin(zero: i32) -> [i32; N] {
        Self::splat_i(zero)
    }
    #[inline(always)]
    unsafe fn carry(sum: [i32; N], carried: [i32; N]) -> ([i32; N], [i32; N]) {
        (sum, carried)
    }
    #[inline(always)]
    unsafe fn end(sum: [i32; N], _carried: [i32; N], _zero: i32) -> [i32; N] {
        sum
    }
    #[inline(always)]
    unsafe fn dot(mut sum: [i32; N], w: [u8; 4 * N], x: i32) -> [i32; N] {
        let x = four(x);
        for (sum, w) in sum.iter_mut().zip(w.chunks_exact(4)) {
            let d: i32 = w.iter().zip(x).map(|(&w, x)| i32::from(w) * i32::from(x)).sum();
            *sum = sum.wrapping_add(d);
        }
        sum
    }
    #[inline(always)]
    unsafe fn biased_start(_zero: i32) -> [i32; N] {
        [0; N]
    }
    #[inline(always)]
    unsafe fn dot_biased(mut sum: [i32; N], w: [u8; 4 * N], x: i32) -> [i32; N] {
        let x = four(x);
        for (sum, w) in sum.iter_mut().zip(w.chunks_exact(4)) {
            let d: i32 = w.iter().zip(x).map(|(&w, x)| (i32::from(w) - 128) * i32::from(x)).sum();
            *sum = sum.wrapping_add(d);
        }
        sum
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
}

impl Simd for Plain {
    const INT_ROWS: usize = 4;
    const FLOAT_ROWS: usize = 2;
    const REGISTERS: usize = 15; // of 16: a product lies in one before it is added

    type Wide = Self;

    #[inline(always)]
    unsafe fn div(a: [f32; N], b: [f32; N]) -> [f32; N] {
        pairs(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: [f32; N], b: [f32; N]) -> [f32; N] {
        pairs(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn reduce_add(x: [f32; N]) -> f32 {
        (x[0] + x[2]) + (x[1] + x[3])
    }
    #[inline(always)]
    unsafe fn reduce_max(x: [f32; N]) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn round(x: [f32; N]) -> [f32; N] {
        each(x, |x| x.round_ties_even())
    }
    #[inline(always)]
    unsafe fn scale2(x: [f32; N], n: [f32; N]) -> [f32; N] {
        pairs(x, n, |x, n| x * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn zero_below(x: [f32; N], limit: f32, y: [f32; N]) -> [f32; N] {
        pairs(x, y, |x, y| if x >= limit { y } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn to_i(x: [f32; N]) -> [i32; N] {
        each(x, |x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn reduce_add_i(x: [i32; N]) -> i32 {
        x.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: [i32; N]) {
        p.cast::<[i8; N]>().write_unaligned(each(x, |&x| x as i8));
    }
    #[inline(always)]
    unsafe fn store_i16(p: *mut i16, x: [i32; N]) {
        p.cast::<[i16; N]>().write_unaligned(each(x, |&x| x as i16));
    }
    #[inline(always)]
    unsafe fn dot_pairs(mut sum: [i32; N], w: [u8; 4 * N], x: i32) -> [i32; N] {
        let half = |x: i32, i: i32| i32::from((x >> (16 * i)) as i16);
        for (sum, w) in sum.iter_mut().zip(w.as_chunks::<4>().0) {
            let w = i32::from_le_bytes(*w);
            *sum += half(w, 0) * half(x, 0) + half(w, 1) * half(x, 1);
        }
        sum
    }
    #[inline(always)]
    unsafe fn sum_i8(p: *const i8) -> i32 {
        p.cast::<[i8; 16]>().read().map(i32::from).iter().sum()
    }
    #[inline(always)]
    unsafe fn prefetch_l2(_p: *const u8) {}
}
