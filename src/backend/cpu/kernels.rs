//! The inner loops, written once over [`Simd`] and [`Tiled`] and compiled for each instruction set; a table of entry points for each,
//! chosen once.
//!
//! Sums have one fixed order for each element, whatever the number of rows or threads: a row's result does not depend on
//! what is computed beside it, to the bit.

use std::fmt;
use std::sync::OnceLock;

use super::attention::{self, Attend};
use super::packed::{Packing, TILE};
use super::simd::plain::Plain;
use super::simd::{Simd, Tiled, Twice};
use crate::error::{Error, Result, invalid};
use crate::model::RopePairs;

/// Some tiles of weights times a group of activation rows.
#[derive(Clone, Copy)]
pub struct Tiles {
    /// The tiles one after another, `tile_bytes` each, which is `packing.tile_bytes(n_in)`.
    pub weights: *const u8,
    pub n_tiles: usize,
    pub tile_bytes: usize,
    pub n_in: usize,
    /// int8 `[block][row][32]`; or f32 `[column][row]`.
    pub x: *const u8,
    /// `[META][block][row]`, see [`meta`]; unused by float weights.
    pub meta: *const u32,
    /// The first tile's first column of the outputs, in their row 0.
    pub out: *mut f32,
    /// Floats from a row of the outputs to the next.
    pub stride: usize,
    /// Each row's place among the rows of the outputs.
    pub rows: *const u32,
    /// Whether to add to what is there.
    pub adds: bool,
    /// How many bytes ahead of the current ones weights are prefetched; 0: not at all, of up to [`UNPREFETCHED_ROWS`] rows.
    pub ahead: usize,
    /// Whether to take tiles in twos, of up to [`Simd::PAIRED_ROWS`] rows.
    pub pairs: bool,
}

impl Tiles {
    /// The first of a word's `[block][row]` for groups of K rows.
    ///
    /// # Safety
    /// The group has K rows.
    #[inline(always)]
    unsafe fn plane<const K: usize>(&self, word: usize) -> *const u32 {
        // SAFETY: `meta` has WORDS planes.
        unsafe { self.meta.add(word * (self.n_in / 32) * K) }
    }

    /// Stores the outputs of all rows that begin at `lane`.
    ///
    /// # Safety
    /// As for [`tiles`].
    #[inline(always)]
    unsafe fn store<S: Tiled, const K: usize>(&self, lane: usize, sums: [S::F; K]) {
        for k in 0..K {
            // SAFETY: the row's part of the outputs.
            unsafe {
                let to = self.out.add((*self.rows.add(k) as usize).wrapping_mul(self.stride)).add(lane);
                S::store(to, if self.adds { S::add(S::load(to), sums[k]) } else { sums[k] });
            }
        }
    }
}

/// Words that accompany 32 activations; each is a plane of its own, so that a kernel draws those it needs into the cache and no
/// others.
pub mod meta {
    /// f32: what one quantum is worth.
    pub const SCALE: usize = 0;
    /// i32: -8 times the sum, the zero point of Q4_0.
    pub const ZERO_8: usize = 1;
    /// i32: -128 times the sum, that of Q8_0 as stored.
    pub const ZERO_128: usize = 2;
    /// f32: scale times sum, what minima are multiplied with.
    pub const SUM: usize = 3;
    /// i32: -32 times the sums of either half, the zero points of Q6_K.
    pub const ZERO_32: usize = 4;
    pub const WORDS: usize = 6;
}

/// Where blocks of one activation row go within their group.
pub struct Quants {
    /// int8 `[block][row][32]`, from the first of the blocks on.
    pub quants: *mut i8,
    /// `[META][block][row]`, likewise.
    pub meta: *mut u32,
    /// Words to a plane of `meta`.
    pub plane: usize,
    /// The planes that are wanted, a bit for each; all of them are with a scale.
    pub words: u8,
    /// Rows of the group, and which of them this is.
    pub rows: usize,
    pub row: usize,
}

pub type TilesFn = unsafe fn(&Tiles);

/// Entry points for one instruction set. All of them are unsafe to call on a CPU without it, and take pointers for speed:
/// what must lie behind them is said at the argument types.
pub struct Kernels {
    pub variant: Variant,
    int_rows: usize,
    float_rows: usize,
    /// Rows that weights are not prefetched for, up to [`UNPREFETCHED_ROWS`]: so few leave the CPU's own prefetchers the time, and on some
    /// CPUs those alone do better.
    unprefetched_rows: usize,
    /// Whether integer tiles are taken in twos, which share each activation that is read.
    pairs: bool,
    paired_rows: usize,
    /// The kernel for a group of so many rows.
    pub tiles: fn(Packing, usize) -> TilesFn,
    /// Quantizes whole blocks of a row of activations.
    pub quantize: unsafe fn(&[f32], &Quants),
    /// (x, weight, eps, out): RMS norm.
    pub norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    /// (gate, up): `gate = silu(gate) up`.
    pub silu: unsafe fn(&mut [f32], &[f32]),
    /// (head, cosines and sines, pairs): turns a head by its position.
    pub rotate: unsafe fn(&mut [f32], &[f32], RopePairs),
    pub attend: unsafe fn(&mut Attend),
    /// See [`attention::merge`] and [`attention::finish`].
    pub merge: unsafe fn(&mut [f32], f32, f32, &[f32]),
    pub finish: unsafe fn(&[f32], &mut [f32]),
    /// Reads memory as fast as the vectors go, prefetching or not; the result is there to be wanted.
    pub read: unsafe fn(&[u8], bool) -> i32,
}

impl Kernels {
    /// Activation rows of the largest group that `n` rows are cut into for a packing; see [`groups`].
    pub fn largest_group(&self, is_float: bool, n: usize) -> usize {
        // Seven and eight rows of one tile are faster than two groups of two tiles.
        let pairs = self.pairs && !(self.paired_rows + 1..=8).contains(&n);
        match is_float {
            true => self.float_rows,
            false if pairs => self.paired_rows,
            false => self.int_rows,
        }
    }

    /// Tiles that are taken together.
    pub fn tiles_at_once(&self) -> usize {
        if self.pairs { 2 } else { 1 }
    }

    /// How many bytes ahead the kernel of a group of so many rows prefetches weights, in tiles of so many bytes; 0: not at all, or
    /// what it reads anyway.
    pub fn ahead(&self, is_first: bool, rows: usize, tile_bytes: usize) -> usize {
        let is_paired = self.pairs && rows <= self.paired_rows;
        // Groups after the first find two tiles in the cache.
        if rows <= self.unprefetched_rows || is_paired && !is_first {
            0
        } else if is_paired && 2 * tile_bytes <= 4 * AHEAD {
            2 * tile_bytes // the same place in the next two: 4 KiB on in a short tile would be in the other one
        } else {
            AHEAD
        }
    }

    /// Whether weights of one row are prefetched.
    pub fn prefetches(&self) -> bool {
        self.unprefetched_rows == 0
    }

    /// The same entry points as they are used on any make of CPU.
    #[cfg(test)]
    pub fn all_ways(&self) -> Vec<Kernels> {
        let ways = [(0, false), (UNPREFETCHED_ROWS, false), (0, true)];
        let there = ways.into_iter().filter(|&(_, pairs)| !pairs || self.paired_rows > 0);
        there.map(|(unprefetched_rows, pairs)| Kernels { unprefetched_rows, pairs, ..*self }).collect()
    }
}

/// The group that row `row` of `n` belongs to, as (first row, rows): `n` rows are cut into groups that kernels exist for.
pub fn group_of(row: usize, n: usize, largest: usize) -> (usize, usize) {
    let full = n - n % largest;
    if row < full {
        return (row - row % largest, largest);
    }
    match n - full {
        // Nine to eleven are no group.
        rest if rest <= 8 => (full, rest),
        _ if row < full + 6 => (full, 6),
        rest => (full + 6, rest - 6),
    }
}

/// All groups of `n` rows.
pub fn groups(n: usize, largest: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let group = (at < n).then(|| group_of(at, n, largest))?;
        at += group.1;
        Some(group)
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    Plain,
    Avx2,
    Avx2Vnni,
    Avx512Vnni,
    NeonDot,
}

impl Variant {
    /// From the fastest to the one that always works.
    pub const ALL: [Variant; 5] =
        [Variant::Avx512Vnni, Variant::Avx2Vnni, Variant::Avx2, Variant::NeonDot, Variant::Plain];

    /// As `PHD_CPU_VARIANT` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Variant::Plain => "plain",
            Variant::Avx2 => "avx2",
            Variant::Avx2Vnni => "avx2-vnni",
            Variant::Avx512Vnni => "avx512-vnni",
            Variant::NeonDot => "neon-dot",
        }
    }

    /// The entry points, if this CPU has the instructions.
    pub fn kernels(self) -> Option<&'static Kernels> {
        match self {
            Variant::Plain => Some(&plain::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 if has_avx2() => Some(&avx2::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2Vnni if has_avx2() && is_x86_feature_detected!("avxvnni") => Some(&avx2_vnni::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512Vnni
                if has_avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni") =>
            {
                Some(if is_amd() { &AVX512_AMD } else { &avx512::KERNELS })
            }
            #[cfg(target_arch = "aarch64")]
            Variant::NeonDot if std::arch::is_aarch64_feature_detected!("dotprod") => Some(&neon::KERNELS),
            _ => None,
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// On Zen 4 one and two rows are faster with the CPU's own prefetchers alone and tiles in twos are slower, on Ice Lake it is the other way
/// round (docs/performance.md).
#[cfg(target_arch = "x86_64")]
static AVX512_AMD: Kernels = avx512::table(UNPREFETCHED_ROWS, false);

/// The kernels of AVX2 with AVX-VNNI, with the same instructions as AVX-512 encodes them: most CPUs have one of the two.
#[cfg(all(test, target_arch = "x86_64"))]
pub fn avx2_vnni_as_avx512() -> Option<&'static Kernels> {
    Variant::Avx512Vnni.kernels().map(|_| &avx2_vnni_512::KERNELS)
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let maker = std::arch::x86_64::__cpuid(0);
    [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The variant named by `PHD_CPU_VARIANT`, or the best that this CPU has.
///
/// # Errors
/// `InvalidArgument` if the variable names none, `Unsupported` if the CPU lacks it.
pub fn choose() -> Result<&'static Kernels> {
    static BEST: OnceLock<&'static Kernels> = OnceLock::new();
    match std::env::var("PHD_CPU_VARIANT") {
        Ok(name) if !name.is_empty() && name != "ggml" => {
            let variant = Variant::ALL.into_iter().find(|v| v.name() == name).ok_or_else(|| {
                let names: Vec<_> = Variant::ALL.iter().map(|v| v.name()).collect();
                invalid!("PHD_CPU_VARIANT is {name:?}, expected ggml or one of {}", names.join(", "))
            })?;
            variant.kernels().ok_or_else(|| Error::Unsupported(format!("this CPU has no {name}")))
        }
        _ => Ok(BEST.get_or_init(|| {
            Variant::ALL.into_iter().find_map(Variant::kernels).expect("the plain variant runs everywhere")
        })),
    }
}

/// Whether `PHD_CPU_VARIANT` asks for ggml's kernels wherever it has one.
pub fn prefers_ggml() -> bool {
    std::env::var("PHD_CPU_VARIANT").is_ok_and(|v| v == "ggml")
}

/// Bytes ahead of the current ones that are prefetched, as a rule: with more rows more instructions stand between loads and the hardware's own
/// prefetcher falls behind.
const AHEAD: usize = 4096;

/// Up to so many rows there are kernels that leave prefetching to the CPU.
const UNPREFETCHED_ROWS: usize = 2;

/// Repeats a statement for i = 0.. with `$i` a constant: the loops that must not stay loops.
macro_rules! repeat {
    ([$($n:literal)*] $i:ident => $body:block) => { $({ const $i: usize = $n; $body })* };
}

#[inline(always)]
unsafe fn f32_at(p: *const u32, i: usize) -> f32 {
    // SAFETY: the caller's: `p + i` is in bounds.
    f32::from_bits(unsafe { *p.add(i) })
}

#[inline(always)]
unsafe fn i32_at(p: *const u32, i: usize) -> i32 {
    // SAFETY: the caller's: `p + i` is in bounds.
    unsafe { *p.add(i) as i32 }
}

/// Adds the products of a quad of weights with that quad of all K rows; `x` is the block's activations.
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn add_quad<S: Tiled, const K: usize>(s: &mut [S::P; K], weights: S::B, x: *const i32, quad: usize) {
    for k in 0..K {
        // SAFETY: a block has 8 quads of K rows.
        unsafe { s[k] = S::dot(s[k], weights, x.add(8 * k + quad).read_unaligned()) };
    }
}

/// See [`Tiled::carry`].
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn carry<S: Tiled, const K: usize>(s: &mut [S::P; K], carried: &mut [S::I; K]) {
    for k in 0..K {
        // SAFETY: the caller's.
        (s[k], carried[k]) = unsafe { S::carry(s[k], carried[k]) };
    }
}

/// Adds row `k`'s integer sum over a block, scaled by the weights' and the activations' scales.
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn add_scaled<S: Tiled>(acc: &mut S::F, sum: S::I, scale: S::F, scales: *const u32, k: usize) {
    // SAFETY: a word for each row.
    unsafe { *acc = S::fma(S::mul(scale, S::splat(f32_at(scales, k))), S::to_f(sum), *acc) };
}

/// Q4_0 and, with a minimum, Q4_1.
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn tile_4<S: Tiled, const K: usize, const PREFETCHES: bool, const HAS_MIN: bool>(t: &Tiles) {
    let unit = if HAS_MIN { 320 } else { 288 };
    let apart = t.tile_bytes;
    // SAFETY: every pointer stays within its array: blocks and rows are counted by the loops.
    unsafe {
        for lane in (0..TILE).step_by(S::LANES) {
            let mut acc = [S::splat(0.0); K];
            let (mut w, mut x) = (t.weights, t.x.cast::<i32>());
            let mut scales = t.plane::<K>(meta::SCALE);
            let mut zeros = t.plane::<K>(meta::ZERO_8);
            let mut sums = t.plane::<K>(meta::SUM);
            for _ in 0..t.n_in / 32 {
                let mut s = [S::begin(0); K];
                if !HAS_MIN {
                    for k in 0..K {
                        s[k] = S::begin(i32_at(zeros, k));
                    }
                }
                repeat!([0 1 2 3] Q => {
                    if PREFETCHES && lane == 0 {
                        S::prefetch_weights(apart, w.wrapping_add(64 * Q).wrapping_add(t.ahead));
                    }
                    let v = S::weights(apart, w.add(64 * Q + 4 * lane));
                    let low = S::bits(v, 0, 0, 15);
                    add_quad::<S, K>(&mut s, low, x, Q);
                    let high = S::bits(v, 0, 4, 15);
                    add_quad::<S, K>(&mut s, high, x, 4 + Q);
                });
                let d = S::weights_f16(apart, w.add(256 + 2 * lane).cast());
                for k in 0..K {
                    let zero = if HAS_MIN { 0 } else { i32_at(zeros, k) };
                    add_scaled::<S>(&mut acc[k], S::end(s[k], S::splat_i(0), zero), d, scales, k);
                }
                if HAS_MIN {
                    let min = S::weights_f16(apart, w.add(288 + 2 * lane).cast());
                    for k in 0..K {
                        acc[k] = S::fma(min, S::splat(f32_at(sums, k)), acc[k]);
                    }
                }
                w = w.add(unit);
                x = x.add(8 * K);
                scales = scales.add(K);
                zeros = zeros.add(K);
                sums = sums.add(K);
            }
            t.store::<S, K>(lane, acc);
        }
    }
}

/// Q8_0.
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn tile_8<S: Tiled, const K: usize, const PREFETCHES: bool>(t: &Tiles) {
    let apart = t.tile_bytes;
    // SAFETY: as in `tile_4`.
    unsafe {
        for lane in (0..TILE).step_by(S::LANES) {
            let mut acc = [S::splat(0.0); K];
            let (mut w, mut x) = (t.weights, t.x.cast::<i32>());
            let mut scales = t.plane::<K>(meta::SCALE);
            let mut zeros = t.plane::<K>(meta::ZERO_128);
            for _ in 0..t.n_in / 32 {
                let mut s = [S::splat_i(0); K];
                for k in 0..K {
                    s[k] = S::biased_start(i32_at(zeros, k));
                }
                repeat!([0 1 2 3 4 5 6 7] Q => {
                    if PREFETCHES && lane == 0 {
                        S::prefetch_weights(apart, w.wrapping_add(64 * Q).wrapping_add(t.ahead));
                    }
                    let v = S::weights(apart, w.add(64 * Q + 4 * lane));
                    for k in 0..K {
                        s[k] = S::dot_biased(s[k], v, x.add(8 * k + Q).read_unaligned());
                    }
                });
                let d = S::weights_f16(apart, w.add(512 + 2 * lane).cast());
                for k in 0..K {
                    add_scaled::<S>(&mut acc[k], s[k], d, scales, k);
                }
                w = w.add(544);
                x = x.add(8 * K);
                scales = scales.add(K);
                zeros = zeros.add(K);
            }
            t.store::<S, K>(lane, acc);
        }
    }
}

/// Q4_K and, with the fifth bits, Q5_K.
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn tile_4_k<S: Tiled, const K: usize, const PREFETCHES: bool, const HAS_HIGH: bool>(t: &Tiles) {
    let block = if HAS_HIGH { 352 } else { 288 };
    let apart = t.tile_bytes;
    // SAFETY: as in `tile_4`.
    unsafe {
        for lane in (0..TILE).step_by(S::LANES) {
            let mut acc = [S::splat(0.0); K];
            let (mut w, mut x) = (t.weights, t.x.cast::<i32>());
            let mut scales = t.plane::<K>(meta::SCALE);
            let mut sums = t.plane::<K>(meta::SUM);
            for _ in 0..t.n_in / 256 {
                let d = S::weights_f16(apart, w.add(2 * lane).cast());
                let dmin = S::mul(S::weights_f16(apart, w.add(32 + 2 * lane).cast()), S::splat(-1.0));
                w = w.add(64);
                for _ in 0..8 {
                    let (mut s, mut carried) = ([S::begin(0); K], [S::splat_i(0); K]);
                    let q = w.add(32);
                    repeat!([0 1 2 3] Q => {
                        if PREFETCHES && lane == 0 {
                            S::prefetch_weights(apart, q.wrapping_add(64 * Q).wrapping_add(t.ahead));
                        }
                        let v = S::weights(apart, q.add(64 * Q + 4 * lane));
                        let mut low = S::bits(v, 0, 0, 15);
                        let mut high = S::bits(v, 0, 4, 15);
                        if HAS_HIGH {
                            // Bit Q, then bit 4 + Q, of the plane becomes the fifth bit.
                            let plane = S::weights(apart, q.add(256 + 4 * lane));
                            low = S::or(low, S::bits(plane, 4 - Q as i32, 0, 16));
                            high = S::or(high, S::bits(plane, 0, Q as i32, 16));
                        }
                        add_quad::<S, K>(&mut s, low, x, Q);
                        add_quad::<S, K>(&mut s, high, x, 4 + Q);
                        if HAS_HIGH && Q == 1 {
                            carry::<S, K>(&mut s, &mut carried);
                        }
                    });
                    let scale = S::mul(d, S::weights_u8(apart, w.add(lane)));
                    let min = S::mul(dmin, S::weights_u8(apart, w.add(TILE + lane)));
                    for k in 0..K {
                        add_scaled::<S>(&mut acc[k], S::end(s[k], carried[k], 0), scale, scales, k);
                        acc[k] = S::fma(min, S::splat(f32_at(sums, k)), acc[k]);
                    }
                    w = w.add(block);
                    x = x.add(8 * K);
                    scales = scales.add(K);
                    sums = sums.add(K);
                }
            }
            t.store::<S, K>(lane, acc);
        }
    }
}

/// Q6_K: a scale for each half of a block.
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn tile_6_k<S: Tiled, const K: usize, const PREFETCHES: bool>(t: &Tiles) {
    let apart = t.tile_bytes;
    // SAFETY: as in `tile_4`.
    unsafe {
        for lane in (0..TILE).step_by(S::LANES) {
            let mut acc = [S::splat(0.0); K];
            let (mut w, mut x) = (t.weights, t.x.cast::<i32>());
            let mut scales = t.plane::<K>(meta::SCALE);
            let mut zeros = [t.plane::<K>(meta::ZERO_32), t.plane::<K>(meta::ZERO_32 + 1)];
            for _ in 0..t.n_in / 256 {
                let d = S::weights_f16(apart, w.add(2 * lane).cast());
                w = w.add(32);
                for _ in 0..8 {
                    // Nibbles hold quad Q and quad 4 + Q: the first half of the columns is all in the low ones.
                    let q = w.add(32);
                    let scale = [
                        S::mul(d, S::weights_i8(apart, w.add(lane).cast())),
                        S::mul(d, S::weights_i8(apart, w.add(TILE + lane).cast())),
                    ];
                    repeat!([0 1] HALF => {
                        let (mut s, mut carried) = ([S::begin(0); K], [S::splat_i(0); K]);
                        for k in 0..K {
                            s[k] = S::begin(i32_at(zeros[HALF], k));
                        }
                        let plane = S::weights(apart, q.add(256 + 64 * HALF + 4 * lane));
                        repeat!([0 1 2 3] Q => {
                            if PREFETCHES && lane == 0 && HALF == 0 {
                                S::prefetch_weights(apart, q.wrapping_add(64 * Q).wrapping_add(t.ahead));
                                if Q < 2 {
                                    S::prefetch_weights(apart, q.wrapping_add(256 + 64 * Q).wrapping_add(t.ahead));
                                }
                            }
                            let v = S::weights(apart, q.add(64 * Q + 4 * lane));
                            let low = S::bits(v, 0, 4 * HALF as i32, 15);
                            // Bits 2Q and 2Q + 1 become bits 4 and 5.
                            let high = S::bits(plane, [4, 2, 0, 0][Q], [0, 0, 0, 2][Q], 48);
                            let v = S::or(low, high);
                            add_quad::<S, K>(&mut s, v, x, 4 * HALF + Q);
                            if Q == 1 {
                                carry::<S, K>(&mut s, &mut carried);
                            }
                        });
                        for k in 0..K {
                            let sum = S::end(s[k], carried[k], i32_at(zeros[HALF], k));
                            add_scaled::<S>(&mut acc[k], sum, scale[HALF], scales, k);
                        }
                    });
                    w = w.add(416);
                    x = x.add(8 * K);
                    scales = scales.add(K);
                    zeros = zeros.map(|z| z.add(K));
                }
            }
            t.store::<S, K>(lane, acc);
        }
    }
}

const F32: u8 = Packing::F32 as u8;
const F16: u8 = Packing::F16 as u8;

/// # Safety
/// The CPU has `S`; a column of a tile lies behind `w`.
#[inline(always)]
unsafe fn column<S: Tiled, const T: u8>(w: *const u8, lane: usize) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        match T {
            F32 => S::load(w.add(4 * lane).cast()),
            F16 => S::load_f16(w.add(2 * lane).cast()),
            _ => S::load_bf16(w.add(2 * lane).cast()),
        }
    }
}

/// F32, F16 and BF16 with f32 activations.
///
/// # Safety
/// As for [`tiles`].
#[inline(always)]
unsafe fn tile_f<S: Tiled, const K: usize, const PREFETCHES: bool, const T: u8>(t: &Tiles) {
    let column_bytes = if T == F32 { 4 * TILE } else { 2 * TILE };
    // SAFETY: as in `tile_4`.
    unsafe {
        for lane in (0..TILE).step_by(S::LANES) {
            let mut acc = [[S::splat(0.0); K]; 4];
            let (mut w, mut x) = (t.weights, t.x.cast::<f32>());
            for _ in 0..t.n_in / 4 {
                repeat!([0 1 2 3] C => {
                    if PREFETCHES && lane == 0 && (T == F32 || [true, false, true, false][C]) {
                        S::prefetch(w.wrapping_add(C * column_bytes).wrapping_add(t.ahead));
                    }
                    let v = column::<S, T>(w.add(C * column_bytes), lane);
                    for k in 0..K {
                        let chain = C % S::CHAINS;
                        acc[chain][k] = S::fma(v, S::splat(x.add(C * K + k).read_unaligned()), acc[chain][k]);
                    }
                });
                w = w.add(4 * column_bytes);
                x = x.add(4 * K);
            }
            for _ in 0..t.n_in % 4 {
                let v = column::<S, T>(w, lane);
                for k in 0..K {
                    acc[0][k] = S::fma(v, S::splat(x.add(k).read_unaligned()), acc[0][k]);
                }
                w = w.add(column_bytes);
                x = x.add(K);
            }
            for k in 0..K {
                acc[0][k] = S::add(S::add(acc[0][k], acc[1][k]), S::add(acc[2][k], acc[3][k]));
            }
            t.store::<S, K>(lane, acc[0]);
        }
    }
}

/// # Safety
/// The CPU has `S`; the pointers of `t` hold what its fields say, for a group of `K` rows.
#[inline(always)]
unsafe fn tiles<S: Simd, const T: u8, const K: usize>(t: &Tiles) {
    // In here, so that the end of a tile and the beginning of the next overlap.
    let mut i = 0;
    while i < t.n_tiles {
        let is_pair = T < F32 && K <= S::PAIRED_ROWS && t.pairs && i + 1 < t.n_tiles;
        // SAFETY: the caller's: tiles lie one after another, as their columns of the outputs do.
        unsafe {
            let here = Tiles { weights: t.weights.add(i * t.tile_bytes), out: t.out.add(i * TILE), ..*t };
            if is_pair {
                tile_of::<Twice<S::Wide, true>, T, K, true>(&here);
            } else if K <= UNPREFETCHED_ROWS && t.ahead == 0 {
                tile_of::<S::Wide, T, K, false>(&here);
            } else {
                tile_of::<S::Wide, T, K, true>(&here);
            }
        }
        i += 1 + usize::from(is_pair);
    }
}

/// # Safety
/// As for [`tiles`]: of one tile, or of two for a vector that is a pair.
#[inline(always)]
unsafe fn tile_of<S: Tiled, const T: u8, const K: usize, const PREFETCHES: bool>(t: &Tiles) {
    // SAFETY: the caller's.
    unsafe {
        match T {
            0 => tile_4::<S, K, PREFETCHES, false>(t),
            1 => tile_4::<S, K, PREFETCHES, true>(t),
            2 => tile_8::<S, K, PREFETCHES>(t),
            3 => tile_4_k::<S, K, PREFETCHES, false>(t),
            4 => tile_4_k::<S, K, PREFETCHES, true>(t),
            5 => tile_6_k::<S, K, PREFETCHES>(t),
            _ => tile_f::<S, K, PREFETCHES, T>(t),
        }
    }
}

/// # Safety
/// The CPU has `S`; there is room behind the pointers of `to` for `x.len() / 32` blocks.
#[inline(always)]
unsafe fn quantize<S: Simd>(x: &[f32], to: &Quants) {
    // Below it 127 / largest is infinite: all such values are zero.
    const SMALLEST: f32 = 4e-37;
    let &Quants { quants, meta, plane, words, rows, row } = to;
    let wants = |word: usize| words & (1 << word) != 0;
    // SAFETY: `row < rows`, and a block of the group has 32 bytes and a word of each plane for every row.
    unsafe {
        let (mut quants, mut meta) = (quants.add(32 * row), meta.add(row));
        for x in x.as_chunks::<32>().0 {
            let mut largest = S::splat(0.0);
            for i in (0..32).step_by(S::LANES) {
                let v = S::load(x.as_ptr().add(i));
                largest = S::max(largest, S::max(v, S::mul(v, S::splat(-1.0))));
            }
            let largest = S::reduce_max(largest);
            let inverse = S::splat(if largest > SMALLEST { 127.0 / largest } else { 0.0 });
            for i in (0..32).step_by(S::LANES) {
                S::store_i8(quants.add(i), S::to_i(S::mul(S::load(x.as_ptr().add(i)), inverse)));
            }
            let scale = largest / 127.0;
            let (first, second) = (S::sum_i8(quants), S::sum_i8(quants.add(16)));
            let sum = first + second;
            *meta.add(meta::SCALE * plane) = scale.to_bits();
            if wants(meta::ZERO_8) {
                *meta.add(meta::ZERO_8 * plane) = (-8 * sum) as u32;
            }
            if wants(meta::ZERO_128) {
                *meta.add(meta::ZERO_128 * plane) = (-128 * sum) as u32;
            }
            if wants(meta::SUM) {
                *meta.add(meta::SUM * plane) = (scale * sum as f32).to_bits();
            }
            if wants(meta::ZERO_32) {
                *meta.add(meta::ZERO_32 * plane) = (-32 * first) as u32;
                *meta.add((meta::ZERO_32 + 1) * plane) = (-32 * second) as u32;
            }
            (quants, meta) = (quants.wrapping_add(32 * rows), meta.wrapping_add(rows)); // at last beyond the end
        }
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn norm<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len();
    assert!(weight.len() == n && out.len() == n);
    // SAFETY: whole vectors below n, then single elements.
    unsafe {
        let whole = n - n % S::LANES;
        let mut sums = S::splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            let v = S::load(x.as_ptr().add(i));
            sums = S::fma(v, v, sums);
        }
        let sum = S::reduce_add(sums) + x[whole..].iter().map(|x| x * x).sum::<f32>();
        let scale = 1.0 / (sum / n as f32 + eps).sqrt();
        for i in (0..whole).step_by(S::LANES) {
            let v = S::mul(S::load(x.as_ptr().add(i)), S::splat(scale));
            S::store(out.as_mut_ptr().add(i), S::mul(v, S::load(weight.as_ptr().add(i))));
        }
        for i in whole..n {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

/// # Safety
/// The CPU has `S`; a vector lies behind each pointer.
#[inline(always)]
unsafe fn silu_vector<S: Simd>(gate: *mut f32, up: *const f32) {
    // SAFETY: the caller's.
    unsafe {
        let x = S::load(gate);
        // Below -87 e^-x would overflow; the quotient is 0 there all the same.
        let e = S::exp(S::mul(S::max(x, S::splat(-87.0)), S::splat(-1.0)));
        S::store(gate, S::mul(S::div(x, S::add(S::splat(1.0), e)), S::load(up)));
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn silu<S: Simd>(gate: &mut [f32], up: &[f32]) {
    let n = gate.len();
    assert_eq!(up.len(), n);
    // SAFETY: whole vectors below n; the rest goes through arrays of one vector.
    unsafe {
        let whole = n - n % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            silu_vector::<S>(gate.as_mut_ptr().add(i), up.as_ptr().add(i));
        }
        if whole < n {
            let (mut g, mut u) = ([0.0f32; 16], [0.0f32; 16]);
            g[..n - whole].copy_from_slice(&gate[whole..]);
            u[..n - whole].copy_from_slice(&up[whole..]);
            silu_vector::<S>(g.as_mut_ptr(), u.as_ptr());
            gate[whole..].copy_from_slice(&g[..n - whole]);
        }
    }
}

#[inline(always)]
fn rotate(head: &mut [f32], rope: &[f32], pairs: RopePairs) {
    let half = head.len() / 2;
    let (cos, sin) = rope.split_at(half);
    match pairs {
        RopePairs::Halves => {
            let (first, second) = head.split_at_mut(half);
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
        RopePairs::Adjacent => {
            for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
            }
        }
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn read<S: Simd>(bytes: &[u8], prefetches: bool) -> i32 {
    // SAFETY: the caller's.
    unsafe { if prefetches { read_all::<S, true>(bytes) } else { read_all::<S, false>(bytes) } }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn read_all<S: Simd, const PREFETCHES: bool>(bytes: &[u8]) -> i32 {
    // SAFETY: blocks of 256 bytes are whole vectors of every instruction set.
    unsafe {
        let mut seen = [S::load_b([0u8; 64].as_ptr()); 4];
        for block in bytes.as_chunks::<256>().0 {
            for i in 0..4 {
                if PREFETCHES {
                    S::prefetch(block.as_ptr().wrapping_add(64 * i + AHEAD));
                }
                for part in (0..64).step_by(4 * S::LANES) {
                    seen[i] = S::or(seen[i], S::load_b(block.as_ptr().add(64 * i + part)));
                }
            }
        }
        let seen = S::or(S::or(seen[0], seen[1]), S::or(seen[2], seen[3]));
        S::reduce_add_i(S::end(S::dot(S::begin(0), S::bits(seen, 0, 0, 1), 0x0101_0101), S::splat_i(0), 0))
    }
}

/// The entry points of one instruction set: the same code inside functions that may use its instructions.
macro_rules! instruction_set {
    ($(#[$condition:meta])* $module:ident, $simd:ty, $variant:expr, [$($feature:literal)?], [$($k:literal)*], [$($kf:literal)*]) => {
        $(#[$condition])*
        mod $module {
            use super::*;

            // SAFETY of all: `Variant::kernels` hands the table out only where the features are; the rest is the caller's.
            $(#[target_feature(enable = $feature)])?
            unsafe fn tiles_for<const T: u8, const K: usize>(t: &Tiles) {
                // SAFETY: see above.
                unsafe { tiles::<$simd, T, K>(t) }
            }

            fn int<const T: u8>(rows: usize) -> TilesFn {
                match rows {
                    $($k => tiles_for::<T, $k>,)*
                    _ => panic!("no kernel for {rows} rows"),
                }
            }

            fn float<const T: u8>(rows: usize) -> TilesFn {
                match rows {
                    $($kf => tiles_for::<T, $kf>,)*
                    _ => panic!("no kernel for {rows} rows"),
                }
            }

            fn select(packing: Packing, rows: usize) -> TilesFn {
                match packing {
                    Packing::Q4_0 => int::<0>(rows),
                    Packing::Q4_1 => int::<1>(rows),
                    Packing::Q8_0 => int::<2>(rows),
                    Packing::Q4_K => int::<3>(rows),
                    Packing::Q5_K => int::<4>(rows),
                    Packing::Q6_K => int::<5>(rows),
                    Packing::F32 => float::<6>(rows),
                    Packing::F16 => float::<7>(rows),
                    Packing::BF16 => float::<8>(rows),
                }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn quantize_row(x: &[f32], to: &Quants) {
                // SAFETY: see above.
                unsafe { quantize::<$simd>(x, to) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                // SAFETY: see above.
                unsafe { norm::<$simd>(x, weight, eps, out) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn silu_row(gate: &mut [f32], up: &[f32]) {
                // SAFETY: see above.
                unsafe { silu::<$simd>(gate, up) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn attend(a: &mut Attend) {
                // SAFETY: see above.
                unsafe { attention::attend::<$simd>(a) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn rotate_head(head: &mut [f32], rope: &[f32], pairs: RopePairs) {
                rotate(head, rope, pairs);
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn merge_part(total: &mut [f32], max: f32, sum: f32, acc: &[f32]) {
                // SAFETY: see above.
                unsafe { attention::merge::<$simd>(total, max, sum, acc) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn finish_total(total: &[f32], out: &mut [f32]) {
                attention::finish(total, out);
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn read_bytes(bytes: &[u8], prefetches: bool) -> i32 {
                // SAFETY: see above.
                unsafe { read::<$simd>(bytes, prefetches) }
            }

            pub const fn table(unprefetched_rows: usize, pairs: bool) -> Kernels {
                Kernels {
                    variant: $variant,
                    int_rows: <$simd>::INT_ROWS,
                    float_rows: <$simd>::FLOAT_ROWS,
                    unprefetched_rows,
                    pairs,
                    paired_rows: <$simd>::PAIRED_ROWS,
                    tiles: select,
                    quantize: quantize_row,
                    norm: norm_row,
                    silu: silu_row,
                    rotate: rotate_head,
                    attend,
                    merge: merge_part,
                    finish: finish_total,
                    read: read_bytes,
                }
            }

            pub static KERNELS: Kernels = table(0, <$simd>::PAIRED_ROWS > 0);
        }
    };
}

instruction_set!(plain, Plain, Variant::Plain, [], [1 2 3 4], [1 2]);
instruction_set!(
    #[cfg(target_arch = "x86_64")]
    avx2,
    super::super::simd::avx2::Avx2,
    Variant::Avx2,
    ["avx2,fma,f16c"],
    [1 2 3 4 5],
    [1 2 3]
);
instruction_set!(
    #[cfg(target_arch = "x86_64")]
    avx2_vnni,
    super::super::simd::avx2::Avx2Vnni,
    Variant::Avx2Vnni,
    ["avx2,fma,f16c,avxvnni"],
    [1 2 3 4 5],
    [1 2 3]
);
instruction_set!(
    #[cfg(all(test, target_arch = "x86_64"))]
    avx2_vnni_512,
    super::super::simd::avx2::Avx2VnniOf512,
    Variant::Avx2Vnni,
    ["avx2,fma,f16c,avx512f,avx512vl,avx512vnni"],
    [1 2 3 4 5],
    [1 2 3]
);
instruction_set!(
    #[cfg(target_arch = "x86_64")]
    avx512,
    super::super::simd::avx512::Avx512Vnni,
    Variant::Avx512Vnni,
    ["avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"],
    [1 2 3 4 5 6 7 8 12],
    [1 2 3 4 5 6]
);
instruction_set!(
    #[cfg(target_arch = "aarch64")]
    neon,
    super::super::simd::neon::NeonDot,
    Variant::NeonDot,
    ["neon,dotprod"],
    [1 2 3 4 5 6 7 8],
    [1 2 3 4 5 6]
);
