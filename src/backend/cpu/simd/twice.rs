//! Two vectors as one.
#![allow(unsafe_op_in_unsafe_fn)] // the contract is the trait's, see the module above

use std::marker::PhantomData;

use super::Tiled;

/// Two vectors side by side. Where a tile's 16 rows are two vectors, taking both at once reads the tile in one go, so that memory is
/// never left waiting while the other half is computed, and broadcasts each activation once. Or, if `TILES`, one of each of two tiles, for
/// the latter alone: a CPU may read no more vectors than it multiplies.
#[derive(Clone, Copy)]
pub struct Twice<S, const TILES: bool = false>(PhantomData<S>);

/// Both halves.
macro_rules! both {
    ($f:ident($($x:ident),*)) => { (S::$f($($x.0),*), S::$f($($x.1),*)) };
}

impl<S: Tiled, const TILES: bool> Tiled for Twice<S, TILES> {
    const LANES: usize = 2 * S::LANES;
    const CHAINS: usize = S::CHAINS / 2;

    type F = (S::F, S::F);
    type I = (S::I, S::I);
    type B = (S::B, S::B);
    type P = (S::P, S::P);

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        (S::splat(x), S::splat(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        (S::load(p), S::load(p.add(S::LANES)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        S::store(p, x.0);
        S::store(p.add(S::LANES), x.1);
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        both!(add(a, b))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        both!(mul(a, b))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(fma(a, b, c))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        (S::load_f16(p), S::load_f16(p.add(S::LANES)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        (S::load_bf16(p), S::load_bf16(p.add(S::LANES)))
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::F {
        (S::load_u8(p), S::load_u8(p.add(S::LANES)))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::F {
        (S::load_i8(p), S::load_i8(p.add(S::LANES)))
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> Self::I {
        (S::splat_i(x), S::splat_i(x))
    }
    #[inline(always)]
    unsafe fn to_f(x: Self::I) -> Self::F {
        both!(to_f(x))
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> Self::B {
        (S::load_b(p), S::load_b(p.add(4 * S::LANES)))
    }
    #[inline(always)]
    unsafe fn bits(x: Self::B, left: i32, right: i32, mask: u8) -> Self::B {
        (S::bits(x.0, left, right, mask), S::bits(x.1, left, right, mask))
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        both!(or(a, b))
    }
    #[inline(always)]
    unsafe fn begin(zero: i32) -> Self::P {
        (S::begin(zero), S::begin(zero))
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::P, w: Self::B, x: i32) -> Self::P {
        (S::dot(sum.0, w.0, x), S::dot(sum.1, w.1, x))
    }
    #[inline(always)]
    unsafe fn carry(sum: Self::P, carried: Self::I) -> (Self::P, Self::I) {
        let (first, second) = both!(carry(sum, carried));
        ((first.0, second.0), (first.1, second.1))
    }
    #[inline(always)]
    unsafe fn end(sum: Self::P, carried: Self::I, zero: i32) -> Self::I {
        (S::end(sum.0, carried.0, zero), S::end(sum.1, carried.1, zero))
    }
    #[inline(always)]
    unsafe fn biased_start(zero: i32) -> Self::I {
        (S::biased_start(zero), S::biased_start(zero))
    }
    #[inline(always)]
    unsafe fn dot_biased(sum: Self::I, w: Self::B, x: i32) -> Self::I {
        (S::dot_biased(sum.0, w.0, x), S::dot_biased(sum.1, w.1, x))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        S::prefetch(p);
    }
    #[inline(always)]
    unsafe fn weights(apart: usize, p: *const u8) -> Self::B {
        let on = if TILES { apart } else { 4 * S::LANES };
        (S::weights(apart, p), S::weights(apart, p.add(on)))
    }
    #[inline(always)]
    unsafe fn weights_f16(apart: usize, p: *const u16) -> Self::F {
        let on = if TILES { apart } else { 2 * S::LANES };
        (S::weights_f16(apart, p), S::weights_f16(apart, p.byte_add(on)))
    }
    #[inline(always)]
    unsafe fn weights_u8(apart: usize, p: *const u8) -> Self::F {
        let on = if TILES { apart } else { S::LANES };
        (S::weights_u8(apart, p), S::weights_u8(apart, p.add(on)))
    }
    #[inline(always)]
    unsafe fn weights_i8(apart: usize, p: *const i8) -> Self::F {
        let on = if TILES { apart } else { S::LANES };
        (S::weights_i8(apart, p), S::weights_i8(apart, p.add(on)))
    }
    #[inline(always)]
    unsafe fn prefetch_weights(apart: usize, p: *const u8) {
        S::prefetch_weights(apart, p);
        if TILES {
            S::prefetch_weights(apart, p.wrapping_add(apart));
        }
    }
}
