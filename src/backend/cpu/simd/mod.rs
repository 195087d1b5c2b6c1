//! Vectors of one instruction set, as far as the kernels need them. Kernels are written once, over these traits; each
//! instruction set is one small implementation of them.
//!
//! Every function is `unsafe` for one reason: the caller must run on a CPU that has the implementation's instructions
//! (the entry points in `kernels` carry the `target_feature`s, and dispatch checks them), and pointers must be valid for the
//! lanes that are read or written. No alignment is asked for.

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "aarch64")]
pub mod neon;
pub mod plain;
mod twice;

pub use twice::Twice;

/// What the kernels of matrices need of vectors: those of an instruction set, or two of them side by side (`Twice`).
pub trait Tiled: Copy {
    /// 32-bit elements of a vector; divides 16, the rows of a weight tile.
    const LANES: usize;
    /// Sums that a float kernel keeps for each element, by column: one would wait for itself. Divides 4.
    const CHAINS: usize = 4;

    /// f32 x LANES
    type F: Copy;
    /// i32 x LANES
    type I: Copy;
    /// u8 x 4 LANES
    type B: Copy;
    /// A running sum of [`Tiled::dot`]: i32 x LANES, or narrower where the CPU has no instruction that adds four products to 32 bits.
    type P: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn load_u8(p: *const u8) -> Self::F;
    unsafe fn load_i8(p: *const i8) -> Self::F;
    unsafe fn splat_i(x: i32) -> Self::I;
    unsafe fn to_f(x: Self::I) -> Self::F;
    unsafe fn load_b(p: *const u8) -> Self::B;
    /// `(byte << left >> right) & mask`, where mask has no bit that came from a neighbouring byte.
    unsafe fn bits(x: Self::B, left: i32, right: i32, mask: u8) -> Self::B;
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B;
    /// What a sum over [`Tiled::dot`] begins with; [`Tiled::end`] is told the same `zero`, which one of the two adds.
    unsafe fn begin(zero: i32) -> Self::P;
    /// Adds to each element the products of its four bytes of `w`, unsigned, with the four signed bytes of `x`, at most 127 large. Between
    /// [`Tiled::begin`] or [`Tiled::carry`] and the next `carry` or `end`: 8 times for `w` of up to 4 bits, 4 times for 5, twice for 6.
    unsafe fn dot(sum: Self::P, w: Self::B, x: i32) -> Self::P;
    /// Takes what is in `sum` to `carried`, where `sum` is too narrow to go on; both make up the sum.
    unsafe fn carry(sum: Self::P, carried: Self::I) -> (Self::P, Self::I);
    unsafe fn end(sum: Self::P, carried: Self::I, zero: i32) -> Self::I;
    /// What a sum over [`Tiled::dot_biased`] begins with; `zero` is -128 times the sum of all x.
    unsafe fn biased_start(zero: i32) -> Self::I;
    /// The same for signed weights that are stored with 128 added.
    unsafe fn dot_biased(sum: Self::I, w: Self::B, x: i32) -> Self::I;
    unsafe fn prefetch(p: *const u8);

    /// Weights of a tile; where these are vectors of two tiles ([`Twice`]), of both, the second being `apart` bytes on.
    #[inline(always)]
    unsafe fn weights(_apart: usize, p: *const u8) -> Self::B {
        // SAFETY: as for every function of this trait.
        unsafe { Self::load_b(p) }
    }
    #[inline(always)]
    unsafe fn weights_f16(_apart: usize, p: *const u16) -> Self::F {
        // SAFETY: as for every function of this trait.
        unsafe { Self::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn weights_u8(_apart: usize, p: *const u8) -> Self::F {
        // SAFETY: as for every function of this trait.
        unsafe { Self::load_u8(p) }
    }
    #[inline(always)]
    unsafe fn weights_i8(_apart: usize, p: *const i8) -> Self::F {
        // SAFETY: as for every function of this trait.
        unsafe { Self::load_i8(p) }
    }
    #[inline(always)]
    unsafe fn prefetch_weights(_apart: usize, p: *const u8) {
        // SAFETY: as for every function of this trait.
        unsafe { Self::prefetch(p) }
    }
}

/// What all the other kernels need, too.
pub trait Simd: Tiled {
    /// Activation rows of the largest integer kernel.
    const INT_ROWS: usize;
    /// Activation rows of the largest float kernel.
    const FLOAT_ROWS: usize;
    /// Activation rows of the largest integer kernel of two tiles; 0: there is none.
    const PAIRED_ROWS: usize = 0;
    /// Vector registers: a product of attention keeps its sums and operands in them.
    const REGISTERS: usize;

    /// The vectors that kernels of matrices take tiles in.
    type Wide: Tiled;

    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn reduce_add(x: Self::F) -> f32;
    unsafe fn reduce_max(x: Self::F) -> f32;
    /// Nearest integer.
    unsafe fn round(x: Self::F) -> Self::F;
    /// `x 2^n` for whole n such that the result is normal.
    unsafe fn scale2(x: Self::F, n: Self::F) -> Self::F;
    /// `y` where `x >= limit`, else 0.
    unsafe fn zero_below(x: Self::F, limit: f32, y: Self::F) -> Self::F;

    /// Nearest integer.
    unsafe fn to_i(x: Self::F) -> Self::I;
    unsafe fn reduce_add_i(x: Self::I) -> i32;
    /// Stores elements of -128..=127 as bytes.
    unsafe fn store_i8(p: *mut i8, x: Self::I);
    /// Stores elements of -32768..=32767 as 16-bit integers.
    unsafe fn store_i16(p: *mut i16, x: Self::I);
    /// Adds to each element the products of its two 16-bit integers with the two of `x`, which fit into 32 bits together, as does the sum.
    unsafe fn dot_pairs(sum: Self::I, w: Self::B, x: i32) -> Self::I;
    /// The sum of 16 bytes.
    unsafe fn sum_i8(p: *const i8) -> i32;
    /// Into the L2 cache, where [`Tiled::prefetch`] draws a line into the first: for what is not needed soon.
    unsafe fn prefetch_l2(p: *const u8);

    /// `2^n 2^r` for whole n and r of at most 1/2, where that is normal.
    #[inline(always)]
    unsafe fn power(n: Self::F, r: Self::F) -> Self::F {
        // The polynomial of least relative error (Remez), 2^-23, but for a first coefficient of exactly 1.
        // SAFETY: as for every function of this trait.
        unsafe {
            let mut y = Self::splat(0.001_327_647_2);
            for c in [0.009_675_541, 0.055_507_13, 0.240_221_2, 0.693_146_94, 1.0] {
                y = Self::fma(y, r, Self::splat(c));
            }
            Self::scale2(y, n)
        }
    }

    /// `2^x`, relative error below 3e-7; 0 below -125.
    #[inline(always)]
    unsafe fn exp2(x: Self::F) -> Self::F {
        // SAFETY: as for every function of this trait.
        unsafe {
            let clamped = Self::max(x, Self::splat(-125.0));
            let n = Self::round(clamped);
            Self::zero_below(x, -125.0, Self::power(n, Self::fma(n, Self::splat(-1.0), clamped)))
        }
    }

    /// `e^x`, relative error below 4e-7; 0 below -87.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // Cody and Waite's reduction: x log2(e), rounded, would be off by as much more as x is large.
        // SAFETY: as for every function of this trait.
        unsafe {
            let clamped = Self::max(x, Self::splat(-87.0));
            let n = Self::round(Self::mul(clamped, Self::splat(std::f32::consts::LOG2_E)));
            let r = Self::fma(n, Self::splat(-0.693_359_4), clamped);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            Self::zero_below(x, -87.0, Self::power(n, Self::mul(r, Self::splat(std::f32::consts::LOG2_E))))
        }
    }
}
