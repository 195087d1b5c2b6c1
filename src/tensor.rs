//! Element types, quantized block layouts and their plain conversion to f32.
//!
//! The layouts are ggml's (`ggml-common.h`), which GGUF files store as they are.

use half::slice::HalfFloatSliceExt;

/// Element type of a stored tensor. Quantized types store blocks of consecutive elements of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)]
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

impl DType {
    /// All types, for tables and tests.
    pub const ALL: [DType; 15] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::IQ4_NL,
        DType::IQ4_XS,
    ];

    /// The number that GGUF and ggml give this type (`enum ggml_type`).
    pub const fn ggml_id(self) -> u32 {
        match self {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::Q4_0 => 2,
            DType::Q4_1 => 3,
            DType::Q5_0 => 6,
            DType::Q5_1 => 7,
            DType::Q8_0 => 8,
            DType::Q2_K => 10,
            DType::Q3_K => 11,
            DType::Q4_K => 12,
            DType::Q5_K => 13,
            DType::Q6_K => 14,
            DType::IQ4_NL => 20,
            DType::IQ4_XS => 23,
            DType::BF16 => 30,
        }
    }

    pub fn from_ggml_id(id: u32) -> Option<DType> {
        DType::ALL.into_iter().find(|t| t.ggml_id() == id)
    }

    /// Elements in a block: 1 for the plain types.
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 | DType::IQ4_NL => 32,
            DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K | DType::IQ4_XS => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q4_0 | DType::IQ4_NL => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q8_0 => 34,
            DType::Q2_K => 84,
            DType::Q3_K => 110,
            DType::Q4_K => 144,
            DType::Q5_K => 176,
            DType::Q6_K => 210,
            DType::IQ4_XS => 136,
        }
    }

    /// Bytes of a row of `n` elements; `None` if the row is not a whole number of blocks or the size overflows.
    pub const fn row_bytes(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }

    /// ggml's spelling, which users know: `Q4_K`, `BF16`.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::Q4_0 => "Q4_0",
            DType::Q4_1 => "Q4_1",
            DType::Q5_0 => "Q5_0",
            DType::Q5_1 => "Q5_1",
            DType::Q8_0 => "Q8_0",
            DType::Q2_K => "Q2_K",
            DType::Q3_K => "Q3_K",
            DType::Q4_K => "Q4_K",
            DType::Q5_K => "Q5_K",
            DType::Q6_K => "Q6_K",
            DType::IQ4_NL => "IQ4_NL",
            DType::IQ4_XS => "IQ4_XS",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn f16(b: &[u8]) -> f32 {
    half::f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// Splits a byte of two 4-bit quants: low, high.
fn nibbles(b: u8) -> (u8, u8) {
    (b & 15, b >> 4)
}

/// The 16 levels of the IQ4 types.
const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The 6-bit scale and minimum of sub-block `j` of 8 in a Q4_K or Q5_K block: `scales` holds twelve bytes.
fn scale_min_k4(j: usize, scales: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let (low, high) = nibbles(scales[j + 4]);
        (low | scales[j - 4] >> 6 << 4, high | scales[j] >> 6 << 4)
    };
    (scale.into(), min.into())
}

/// The sixteen 6-bit scales of a Q3_K block, stored with an offset of 32: four low bits in 8 bytes, two high bits in 4.
fn scales_q3_k(packed: &[u8]) -> [i8; 16] {
    std::array::from_fn(|i| {
        let low = packed[i % 8] >> (4 * (i / 8)) & 15;
        let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// Converts a row as stored into f32. `bytes` is `dtype.row_bytes(out.len())` long.
///
/// # Panics
/// If the lengths do not fit; loaders have checked them.
pub fn dequantize_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), dtype.row_bytes(out.len()), "bytes of a {dtype} row of {}", out.len());
    let blocks = bytes.chunks_exact(dtype.block_bytes()).zip(out.chunks_exact_mut(dtype.block_len()));
    match dtype {
        DType::F32 => blocks.for_each(|(b, y)| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::F16 => blocks.for_each(|(b, y)| y[0] = f16(b)),
        DType::BF16 => blocks.for_each(|(b, y)| y[0] = half::bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        DType::Q4_0 => blocks.for_each(|(b, y)| {
            let d = f16(b);
            for (j, &q) in b[2..].iter().enumerate() {
                let (low, high) = nibbles(q);
                y[j] = (low as i32 - 8) as f32 * d;
                y[j + 16] = (high as i32 - 8) as f32 * d;
            }
        }),
        DType::Q4_1 => blocks.for_each(|(b, y)| {
            let (d, m) = (f16(b), f16(&b[2..]));
            for (j, &q) in b[4..].iter().enumerate() {
                let (low, high) = nibbles(q);
                y[j] = low as f32 * d + m;
                y[j + 16] = high as f32 * d + m;
            }
        }),
        DType::Q5_0 => blocks.for_each(|(b, y)| {
            let (d, fifth) = (f16(b), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
            for (j, &q) in b[6..].iter().enumerate() {
                let (low, high) = nibbles(q);
                let bit = |i: usize| (fifth >> i & 1) << 4;
                y[j] = ((low as u32 | bit(j)) as i32 - 16) as f32 * d;
                y[j + 16] = ((high as u32 | bit(j + 16)) as i32 - 16) as f32 * d;
            }
        }),
        DType::Q5_1 => blocks.for_each(|(b, y)| {
            let (d, m, fifth) = (f16(b), f16(&b[2..]), u32::from_le_bytes([b[4], b[5], b[6], b[7]]));
            for (j, &q) in b[8..].iter().enumerate() {
                let (low, high) = nibbles(q);
                let bit = |i: usize| (fifth >> i & 1) << 4;
                y[j] = (low as u32 | bit(j)) as f32 * d + m;
                y[j + 16] = (high as u32 | bit(j + 16)) as f32 * d + m;
            }
        }),
        DType::Q8_0 => blocks.for_each(|(b, y)| {
            let d = f16(b);
            y.iter_mut().zip(&b[2..]).for_each(|(y, &q)| *y = q as i8 as f32 * d);
        }),
        DType::Q2_K => blocks.for_each(|(b, y)| {
            let (scales, quants, d, dmin) = (&b[..16], &b[16..80], f16(&b[80..]), f16(&b[82..]));
            for (i, y) in y.iter_mut().enumerate() {
                // (half of 128, shift of 4, 32): each byte holds elements 32 apart.
                let q = quants[i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3;
                let (scale, min) = nibbles(scales[i / 16]);
                *y = d * scale as f32 * q as f32 - dmin * min as f32;
            }
        }),
        DType::Q3_K => blocks.for_each(|(b, y)| {
            let (high, quants, scales, d) = (&b[..32], &b[32..96], scales_q3_k(&b[96..108]), f16(&b[108..]));
            for (i, y) in y.iter_mut().enumerate() {
                let q = (quants[i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3) as i32;
                let has_high = high[i % 32] >> (i / 32) & 1 == 1;
                *y = d * scales[i / 16] as f32 * (q - if has_high { 0 } else { 4 }) as f32;
            }
        }),
        DType::Q4_K => blocks.for_each(|(b, y)| {
            let (d, dmin, scales, quants) = (f16(b), f16(&b[2..]), &b[4..16], &b[16..]);
            for (i, y) in y.iter_mut().enumerate() {
                let (low, high) = nibbles(quants[i / 64 * 32 + i % 32]);
                let (scale, min) = scale_min_k4(i / 32, scales);
                let q = if i % 64 < 32 { low } else { high };
                *y = d * scale * q as f32 - dmin * min;
            }
        }),
        DType::Q5_K => blocks.for_each(|(b, y)| {
            let (d, dmin, scales, fifth, quants) = (f16(b), f16(&b[2..]), &b[4..16], &b[16..48], &b[48..]);
            for (i, y) in y.iter_mut().enumerate() {
                let (low, high) = nibbles(quants[i / 64 * 32 + i % 32]);
                let (scale, min) = scale_min_k4(i / 32, scales);
                let q = if i % 64 < 32 { low } else { high } | (fifth[i % 32] >> (i / 32) & 1) << 4;
                *y = d * scale * q as f32 - dmin * min;
            }
        }),
        DType::Q6_K => blocks.for_each(|(b, y)| {
            let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], f16(&b[208..]));
            for (i, y) in y.iter_mut().enumerate() {
                let (half, quarter) = (i / 128, i % 128 / 32);
                let four = low[half * 64 + quarter % 2 * 32 + i % 32] >> (quarter / 2 * 4) & 15;
                let two = high[half * 32 + i % 32] >> (2 * quarter) & 3;
                *y = d * scales[i / 16] as i8 as f32 * ((four | two << 4) as i32 - 32) as f32;
            }
        }),
        DType::IQ4_NL => blocks.for_each(|(b, y)| {
            let d = f16(b);
            for (j, &q) in b[2..].iter().enumerate() {
                let (low, high) = nibbles(q);
                y[j] = d * IQ4_LEVELS[low as usize] as f32;
                y[j + 16] = d * IQ4_LEVELS[high as usize] as f32;
            }
        }),
        DType::IQ4_XS => blocks.for_each(|(b, y)| {
            let (d, high_bits, low_bits) = (f16(b), u16::from_le_bytes([b[2], b[3]]), &b[4..8]);
            for (i, (y, quants)) in y.chunks_exact_mut(32).zip(b[8..].chunks_exact(16)).enumerate() {
                let scale = low_bits[i / 2] >> (4 * (i % 2)) & 15 | ((high_bits >> (2 * i) & 3) << 4) as u8;
                let d = d * (scale as i32 - 32) as f32;
                for (j, &q) in quants.iter().enumerate() {
                    let (low, high) = nibbles(q);
                    y[j] = d * IQ4_LEVELS[low as usize] as f32;
                    y[j + 16] = d * IQ4_LEVELS[high as usize] as f32;
                }
            }
        }),
    }
}

/// Converts f32 into a row of F32, F16, BF16 or Q8_0 (ggml's reference rounding): the types of caches.
///
/// # Panics
/// If the lengths do not fit, or for another type.
pub fn quantize_row(dtype: DType, x: &[f32], out: &mut [u8]) {
    assert_eq!(Some(out.len()), dtype.row_bytes(x.len()), "bytes of a {dtype} row of {}", x.len());
    let blocks = x.chunks_exact(dtype.block_len()).zip(out.chunks_exact_mut(dtype.block_bytes()));
    match dtype {
        DType::F32 => blocks.for_each(|(x, b)| b.copy_from_slice(&x[0].to_le_bytes())),
        DType::F16 => {
            // Some at a time: the conversion of slices uses vectors where the CPU has them.
            for (x, out) in x.chunks(64).zip(out.chunks_mut(128)) {
                let mut halves = [half::f16::ZERO; 64];
                halves[..x.len()].convert_from_f32_slice(x);
                out.chunks_exact_mut(2).zip(halves).for_each(|(b, h)| b.copy_from_slice(&h.to_le_bytes()));
            }
        }
        DType::BF16 => blocks.for_each(|(x, b)| b.copy_from_slice(&half::bf16::from_f32(x[0]).to_le_bytes())),
        DType::Q8_0 => blocks.for_each(|(x, b)| {
            let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let d = largest / 127.0;
            let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
            b[..2].copy_from_slice(&half::f16::from_f32(d).to_le_bytes());
            b[2..].iter_mut().zip(x).for_each(|(b, x)| *b = (x * inverse).round() as i8 as u8);
        }),
        _ => panic!("no conversion from f32 to {dtype}"),
    }
}
