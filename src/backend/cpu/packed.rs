//! Weights rearranged for the kernels: tiles of 16 output rows, in which the rows' elements of the same columns lie side by
//! side, so that a vector holds one column (or four) of all 16 rows and a tile is one stream of memory.
//!
//! Quantized types keep their integers and scales, so nothing is rounded. A block is 32 columns of a tile:
//! ```text
//! nibbles   [quad 4][row 16][4]   columns 4q.. in the low, 16 + 4q.. in the high halves (as in ggml's blocks)
//! bytes     [quad 8][row 16][4]   signed, stored with 128 added
//! bit plane [row 16][4]           bit q: the fifth bit of quad q's column
//! two-bit planes [2][row 16][4]   bits 2q, 2q + 1 of plane p: the upper bits of quad 4 p + q
//!
//! Q4_0: nibbles, d f16[16]        Q4_1: nibbles, d f16[16], m f16[16]        Q8_0: bytes, d f16[16]
//! Q4_K, for 8 blocks: d f16[16], dmin f16[16], then 8 x (scale u8[16], min u8[16], nibbles)
//! Q5_K, likewise:                               8 x (scale u8[16], min u8[16], nibbles, bit plane)
//! Q6_K, likewise:     d f16[16],                8 x (scale i8[2][16], nibbles, two-bit planes)
//! F32, F16, BF16: [column][row 16]
//! ```
//! The layout is the yardstick's for Q4_0 and Q8_0. Rows beyond the last are zero.

use half::{bf16, f16};

use super::kernels::meta;
use crate::tensor::{DType, dequantize_row};

/// Rows of a tile.
pub const TILE: usize = 16;

/// The types with kernels of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
#[repr(u8)]
pub enum Packing {
    Q4_0,
    Q4_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
    F32,
    F16,
    BF16,
}

impl Packing {
    pub const ALL: [Packing; 9] = [
        Packing::Q4_0,
        Packing::Q4_1,
        Packing::Q8_0,
        Packing::Q4_K,
        Packing::Q5_K,
        Packing::Q6_K,
        Packing::F32,
        Packing::F16,
        Packing::BF16,
    ];

    pub fn of(dtype: DType) -> Option<Packing> {
        Packing::ALL.into_iter().find(|p| p.dtype() == dtype)
    }

    pub const fn dtype(self) -> DType {
        match self {
            Packing::Q4_0 => DType::Q4_0,
            Packing::Q4_1 => DType::Q4_1,
            Packing::Q8_0 => DType::Q8_0,
            Packing::Q4_K => DType::Q4_K,
            Packing::Q5_K => DType::Q5_K,
            Packing::Q6_K => DType::Q6_K,
            Packing::F32 => DType::F32,
            Packing::F16 => DType::F16,
            Packing::BF16 => DType::BF16,
        }
    }

    /// The words ([`meta`]) that its kernels want with activations, a bit for each; of those that are two, the first's.
    pub fn words(self) -> u8 {
        let bits = |words: &[usize]| words.iter().fold(0, |bits, word| bits | 1 << word);
        match self {
            Packing::Q4_0 => bits(&[meta::SCALE, meta::ZERO_8]),
            Packing::Q8_0 => bits(&[meta::SCALE, meta::ZERO_128]),
            Packing::Q4_1 | Packing::Q4_K | Packing::Q5_K => bits(&[meta::SCALE, meta::SUM]),
            Packing::Q6_K => bits(&[meta::SCALE, meta::ZERO_32]),
            Packing::F32 | Packing::F16 | Packing::BF16 => 0,
        }
    }

    /// Whether the kernels take activations as f32, not as int8.
    pub const fn is_float(self) -> bool {
        matches!(self, Packing::F32 | Packing::F16 | Packing::BF16)
    }

    /// Columns and bytes of the unit that repeats along a tile.
    pub const fn unit(self) -> (usize, usize) {
        match self {
            Packing::Q4_0 => (32, 256 + 32),
            Packing::Q4_1 => (32, 256 + 64),
            Packing::Q8_0 => (32, 512 + 32),
            Packing::Q4_K => (256, 64 + 8 * (32 + 256)),
            Packing::Q5_K => (256, 64 + 8 * (32 + 256 + 64)),
            Packing::Q6_K => (256, 32 + 8 * (32 + 256 + 128)),
            Packing::F32 => (1, 64),
            Packing::F16 | Packing::BF16 => (1, 32),
        }
    }

    /// Bytes of a tile of rows of `n_in` columns.
    pub const fn tile_bytes(self, n_in: usize) -> usize {
        let (columns, bytes) = self.unit();
        n_in / columns * bytes
    }

    /// Bytes of a whole matrix.
    pub const fn bytes(self, n_out: usize, n_in: usize) -> usize {
        n_out.div_ceil(TILE) * self.tile_bytes(n_in)
    }
}

/// Packs up to 16 rows, stored one after the other in `rows` in ggml's layout, into one tile.
pub fn pack_tile(packing: Packing, n_in: usize, rows: &[u8], tile: &mut [u8]) {
    let dtype = packing.dtype();
    let (columns, unit_bytes) = packing.unit();
    assert_eq!(tile.len(), packing.tile_bytes(n_in));
    let row_bytes = dtype.row_bytes(n_in).expect("checked at load");
    tile.fill(0);
    let block_bytes = dtype.block_bytes();
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (block, unit) in row.chunks_exact(block_bytes).zip(tile.chunks_exact_mut(unit_bytes)) {
            pack_block(packing, block, r, unit);
        }
    }
    debug_assert_eq!(columns, dtype.block_len());
}

/// One ggml block of row `r` into a tile's unit.
fn pack_block(packing: Packing, b: &[u8], r: usize, unit: &mut [u8]) {
    let mut put2 = |at: usize, bytes: &[u8]| unit[at + 2 * r..][..2].copy_from_slice(bytes);
    match packing {
        Packing::Q4_0 => {
            put2(256, &b[..2]);
            put_quads(&mut unit[..256], r, &b[2..18]);
        }
        Packing::Q4_1 => {
            put2(256, &b[..2]);
            put2(288, &b[2..4]);
            put_quads(&mut unit[..256], r, &b[4..20]);
        }
        Packing::Q8_0 => {
            put2(512, &b[..2]);
            let mut biased = [0; 32];
            biased.iter_mut().zip(&b[2..34]).for_each(|(o, q)| *o = q ^ 128);
            put_quads(&mut unit[..512], r, &biased);
        }
        Packing::Q4_K | Packing::Q5_K => {
            let has_high = packing == Packing::Q5_K;
            put2(0, &b[..2]);
            put2(32, &b[2..4]);
            let quants = if has_high { &b[48..176] } else { &b[16..144] };
            for (s, block) in unit[64..].chunks_exact_mut(if has_high { 352 } else { 288 }).enumerate() {
                let (scale, min) = scale_and_min(&b[4..16], s);
                block[r] = scale;
                block[TILE + r] = min;
                let mut q = [0; 32];
                let pair = &quants[s / 2 * 32..][..32];
                q.iter_mut().zip(pair).for_each(|(q, x)| *q = (x >> (4 * (s % 2))) & 15);
                put_quads(&mut block[32..288], r, &nibbles(&q));
                if has_high {
                    let high = &b[16..48];
                    for (i, &bits) in high.iter().enumerate() {
                        block[288 + 4 * r + i % 4] |= ((bits >> s) & 1) << (i / 4);
                    }
                }
            }
        }
        Packing::Q6_K => {
            put2(0, &b[208..210]);
            let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
            for (s, block) in unit[32..].chunks_exact_mut(416).enumerate() {
                let (half, j) = (s / 4, s % 4);
                block[r] = scales[half * 8 + 2 * j];
                block[TILE + r] = scales[half * 8 + 2 * j + 1];
                let mut q = [0; 32];
                let source = &low[half * 64 + j % 2 * 32..][..32];
                q.iter_mut().zip(source).for_each(|(q, x)| *q = (x >> (4 * (j / 2))) & 15);
                put_quads(&mut block[32..288], r, &nibbles(&q));
                for (i, &bits) in high[half * 32..][..32].iter().enumerate() {
                    block[288 + i / 16 * 64 + 4 * r + i % 4] |= ((bits >> (2 * j)) & 3) << (2 * (i / 4 % 4));
                }
            }
        }
        Packing::F32 => unit[4 * r..][..4].copy_from_slice(b),
        Packing::F16 | Packing::BF16 => put2(0, b),
    }
}

/// Four bytes at a time into row `r` of `[quad][row 16][4]`.
fn put_quads(out: &mut [u8], r: usize, bytes: &[u8]) {
    for (quad, bytes) in out.chunks_exact_mut(4 * TILE).zip(bytes.chunks_exact(4)) {
        quad[4 * r..][..4].copy_from_slice(bytes);
    }
}

/// 32 values below 16 as ggml's 16 bytes: value i in the low, i + 16 in the high half.
fn nibbles(q: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| q[i] | q[i + 16] << 4)
}

/// The six-bit scale and minimum of sub-block `s` (ggml's `get_scale_min_k4`).
fn scale_and_min(packed: &[u8], s: usize) -> (u8, u8) {
    if s < 4 {
        (packed[s] & 63, packed[s + 4] & 63)
    } else {
        (packed[s + 4] & 15 | packed[s - 4] >> 6 << 4, packed[s + 4] >> 4 | packed[s] >> 6 << 4)
    }
}

/// Row `r` of a tile as f32: for embedding look-ups in a matrix that is kept packed, and for tests.
pub fn unpack_row(packing: Packing, tile: &[u8], r: usize, out: &mut [f32]) {
    let (columns, unit_bytes) = packing.unit();
    let half_at = |unit: &[u8], at: usize| f16::from_le_bytes([unit[at + 2 * r], unit[at + 2 * r + 1]]).to_f32();
    // Element i of a block's nibbles.
    let nibble = |block: &[u8], i: usize| {
        let byte = block[i % 16 / 4 * 64 + 4 * r + i % 4];
        i32::from(if i < 16 { byte & 15 } else { byte >> 4 })
    };
    for (unit, out) in tile.chunks_exact(unit_bytes).zip(out.chunks_exact_mut(columns)) {
        match packing {
            Packing::Q4_0 => {
                let d = half_at(unit, 256);
                out.iter_mut().enumerate().for_each(|(i, o)| *o = d * (nibble(unit, i) - 8) as f32);
            }
            Packing::Q4_1 => {
                let (d, m) = (half_at(unit, 256), half_at(unit, 288));
                out.iter_mut().enumerate().for_each(|(i, o)| *o = d * nibble(unit, i) as f32 + m);
            }
            Packing::Q8_0 => {
                let d = half_at(unit, 512);
                let q = |i: usize| i32::from(unit[i / 4 * 64 + 4 * r + i % 4]) - 128;
                out.iter_mut().enumerate().for_each(|(i, o)| *o = d * q(i) as f32);
            }
            Packing::Q4_K | Packing::Q5_K => {
                let has_high = packing == Packing::Q5_K;
                let (d, dmin) = (half_at(unit, 0), half_at(unit, 32));
                let blocks = unit[64..].chunks_exact(if has_high { 352 } else { 288 });
                for (block, out) in blocks.zip(out.chunks_exact_mut(32)) {
                    let (d, m) = (d * f32::from(block[r]), dmin * f32::from(block[TILE + r]));
                    for (i, o) in out.iter_mut().enumerate() {
                        let high = if has_high { (block[288 + 4 * r + i % 4] >> (i / 4) & 1) << 4 } else { 0 };
                        *o = d * (nibble(&block[32..], i) + i32::from(high)) as f32 - m;
                    }
                }
            }
            Packing::Q6_K => {
                let d = half_at(unit, 0);
                for (block, out) in unit[32..].chunks_exact(416).zip(out.chunks_exact_mut(32)) {
                    for (i, o) in out.iter_mut().enumerate() {
                        let scale = block[i / 16 * TILE + r] as i8;
                        let high = block[288 + i / 16 * 64 + 4 * r + i % 4] >> (2 * (i / 4 % 4)) & 3;
                        *o = d * f32::from(scale) * (nibble(&block[32..], i) + (i32::from(high) << 4) - 32) as f32;
                    }
                }
            }
            Packing::F32 => dequantize_row(DType::F32, &unit[4 * r..][..4], out),
            Packing::F16 => out[0] = half_at(unit, 0),
            Packing::BF16 => out[0] = bf16::from_le_bytes([unit[2 * r], unit[2 * r + 1]]).to_f32(),
        }
    }
}
