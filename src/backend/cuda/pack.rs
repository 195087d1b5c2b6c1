//! The layouts in which `kernels/linear.cu` reads weights.
//!
//! A matrix is strips of 16 outputs, one after another; missing outputs of the last one are zeros. In a strip:
//!
//! F32, F16, BF16: rows of `n_in` rounded up to 32, with zeros in the padding; the whole matrix is row-major.
//!
//! Quantized types: a warp multiplies a unit of 32 inputs at a time; lane `4 g + t` has the outputs `g` and `g + 8`
//! of the strip and eight inputs of each, as four pairs: 8 t .. 8 t + 7; for Q6_K, 4 t .. 4 t + 3 and
//! 16 + 4 t .. 16 + 4 t + 3. Little-endian throughout. "Of each output pair" means: for g in 0..8, for the outputs
//! g and g + 8. Sizes in bytes:
//!
//! | type | a strip is a row of | each of which is |
//! |---|---|---|
//! | Q8_0 | units | 32 lanes x 16: two outputs' values; 32: f16 d of each output pair |
//! | Q4_0 | chunks of two units | 512 of quarters; 64: of each output pair, for both units, f16 d |
//! | Q4_1 | chunks of two units | 512 of quarters; 128: the same, each f16 d, m |
//! | Q4_K | blocks of four chunks | 4 x 512 of quarters; 4 x 64 scales; 64: of each output pair f16 d, dmin |
//! | Q5_K | blocks of four chunks | 4 x 512 of quarters; 4 x 128 of fifth bits; scales and d as Q4_K |
//! | Q6_K | blocks of four chunks | 4 x 512 of quarters; 4 x 256 of high bits; 4 x 64 scales; 32: of each pair f16 d |
//!
//! * Values of Q8_0: two words for each output; word i has the pairs 2 i and 2 i + 1, whose first values are the
//!   bytes 0 and 1, and whose second ones are the bytes 2 and 3.
//! * Quarters: 32 lanes x 16: a word of four-bit values for each of (unit, output); bits 4 p .. 4 p + 3 are the first
//!   value of pair p, 16 bits above is its second one. The second unit of a row's last chunk may be missing: zeros.
//! * Fifth bits: 32 lanes x 4: bit 8 unit + 4 (output > 7) + p for the first value of pair p, 16 bits above for the
//!   second.
//! * High bits: 32 lanes x 8: a word for each unit; bits 8 (output > 7) + 2 p and the next, 16 bits above for the
//!   second value.
//! * Scales, a byte each: for each g: Q4_K, Q5_K: for both units: of each of g, g + 8: scale, minimum; Q6_K: for both
//!   units: for the first and second half of the unit: of each of g, g + 8: scale, signed.
//!
//! Q4_K takes 2.8% and Q5_K 2.3% more than in files, since scales are unpacked; the others are as large as there.

use crate::tensor::DType;

/// Outputs of a strip.
pub const STRIP: usize = 16;
const UNIT: usize = 32;
/// Bytes of a chunk's four-bit values.
const QUARTERS: usize = 512;

/// Whether kernels for the type exist.
pub fn is_packed(dtype: DType) -> bool {
    use DType::{BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0};
    matches!(dtype, F32 | F16 | BF16 | Q8_0 | Q4_0 | Q4_1 | Q4_K | Q5_K | Q6_K)
}

/// The type in the names of kernels.
pub fn type_name(dtype: DType) -> String {
    dtype.name().to_lowercase()
}

/// Inputs of a part of a strip, and its bytes.
fn part(dtype: DType) -> (usize, usize) {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => (UNIT, STRIP * UNIT * dtype.block_bytes()),
        DType::Q8_0 => (UNIT, 512 + 32),
        DType::Q4_0 => (2 * UNIT, QUARTERS + 64),
        DType::Q4_1 => (2 * UNIT, QUARTERS + 128),
        DType::Q4_K => (8 * UNIT, 4 * (QUARTERS + 64) + 64),
        DType::Q5_K => (8 * UNIT, 4 * (QUARTERS + 128 + 64) + 64),
        DType::Q6_K => (8 * UNIT, 4 * (QUARTERS + 256 + 64) + 32),
        _ => unreachable!("no kernels for {dtype}"),
    }
}

/// Bytes of a strip, a multiple of 32.
pub fn strip_bytes(dtype: DType, n_in: usize) -> usize {
    let (inputs, bytes) = part(dtype);
    n_in.div_ceil(inputs) * bytes
}

pub fn matrix_bytes(dtype: DType, n_out: usize, n_in: usize) -> usize {
    n_out.div_ceil(STRIP) * strip_bytes(dtype, n_in)
}

/// Packs up to 16 rows, as files have them, into a strip.
///
/// # Panics
/// If the lengths do not fit, or there are no kernels for the type.
pub fn pack_strip(dtype: DType, n_in: usize, rows: &[u8], out: &mut [u8]) {
    let row_bytes = dtype.row_bytes(n_in).expect("whole blocks");
    assert!(rows.len() <= STRIP * row_bytes && rows.len().is_multiple_of(row_bytes), "up to 16 rows");
    assert_eq!(out.len(), strip_bytes(dtype, n_in), "bytes of a strip");
    out.fill(0);
    if dtype.block_len() == 1 {
        let pitch = out.len() / STRIP;
        for (row, out) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(pitch)) {
            out[..row_bytes].copy_from_slice(row);
        }
        return;
    }
    let (inputs, bytes) = part(dtype);
    let blocks_in_part = inputs / dtype.block_len();
    for (output, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (i, block) in row.chunks_exact(dtype.block_bytes()).enumerate() {
            let part = &mut out[i / blocks_in_part * bytes..][..bytes];
            match dtype {
                DType::Q8_0 => pack_q8_0(block, output, part),
                DType::Q4_0 | DType::Q4_1 => pack_q4(block, output, i % 2, part),
                _ => pack_k(dtype, block, output, part),
            }
        }
    }
}

/// Sets bits in a little-endian word.
fn set(out: &mut [u8], at: usize, bits: u32) {
    let word: &mut [u8; 4] = (&mut out[at..at + 4]).try_into().expect("four bytes");
    *word = (u32::from_le_bytes(*word) | bits).to_le_bytes();
}

fn pack_q8_0(block: &[u8], output: usize, out: &mut [u8]) {
    let (g, upper) = (output % 8, output / 8);
    out[512 + 4 * g + 2 * upper..][..2].copy_from_slice(&block[..2]);
    for (t, q) in block[2..].chunks_exact(8).enumerate() {
        // Pairs 0 and 1, 2 and 3.
        for (i, q) in q.chunks_exact(4).enumerate() {
            let at = (4 * g + t) * 16 + upper * 8 + i * 4;
            out[at..at + 4].copy_from_slice(&[q[0], q[2], q[1], q[3]]);
        }
    }
}

/// Four-bit values of a unit; `input_of(t, i)` is the i-th input of lane t.
fn pack_quarters(q: &[u8], output: usize, unit: usize, input_of: fn(usize, usize) -> usize, out: &mut [u8]) {
    let (g, upper) = (output % 8, output / 8);
    for t in 0..4 {
        let value = |i: usize| u32::from(q[input_of(t, i)] & 15) << (i / 2 * 4 + i % 2 * 16);
        let word = (0..8).fold(0, |word, i| word | value(i));
        set(out, (4 * g + t) * 16 + (2 * unit + upper) * 4, word);
    }
}

fn contiguous(t: usize, i: usize) -> usize {
    8 * t + i
}

/// For types with a scale to 16 inputs: a pair's values and its neighbour's are of one half.
fn halves(t: usize, i: usize) -> usize {
    i / 4 * 16 + 4 * t + i % 4
}

/// Q4_0 and Q4_1.
fn pack_q4(block: &[u8], output: usize, unit: usize, out: &mut [u8]) {
    let scales = block.len() - 16;
    let mut q = [0; UNIT];
    for (i, byte) in block[scales..].iter().enumerate() {
        (q[i], q[i + 16]) = (byte & 15, byte >> 4);
    }
    pack_quarters(&q, output, unit, contiguous, out);
    let at = QUARTERS + ((output % 8 * 2 + unit) * 2 + output / 8) * scales;
    out[at..at + scales].copy_from_slice(&block[..scales]);
}

/// Q4_K, Q5_K and Q6_K.
fn pack_k(dtype: DType, block: &[u8], output: usize, out: &mut [u8]) {
    let (g, upper) = (output % 8, output / 8);
    let high_bytes = match dtype {
        DType::Q5_K => 128,
        DType::Q6_K => 256,
        _ => 0,
    };
    let (high_at, scales_at) = (4 * QUARTERS, 4 * (QUARTERS + high_bytes));
    let d_at = scales_at + 4 * 64;
    let is_q6 = dtype == DType::Q6_K;
    let input_of = if is_q6 { halves } else { contiguous };
    let q = if is_q6 { values_q6_k(block) } else { values_q4_k(block) };
    for (unit, q) in q.chunks_exact(UNIT).enumerate() {
        let (chunk, unit) = (unit / 2, unit % 2);
        pack_quarters(q, output, unit, input_of, &mut out[chunk * QUARTERS..][..QUARTERS]);
        for t in 0..4 {
            let lane = 4 * g + t;
            for i in 0..8 {
                let (bits, above) = (u32::from(q[input_of(t, i)] >> 4), i % 2 * 16);
                match dtype {
                    DType::Q5_K => {
                        set(out, high_at + chunk * 128 + lane * 4, bits << (8 * unit + 4 * upper + i / 2 + above));
                    }
                    DType::Q6_K => {
                        let at = high_at + chunk * 256 + lane * 8 + unit * 4;
                        set(out, at, bits << (8 * upper + i / 2 * 2 + above));
                    }
                    _ => {}
                }
            }
        }
        let scales = &mut out[scales_at + chunk * 64 + g * 8 + unit * 4..][..4];
        if is_q6 {
            let of_unit = &block[192 + (2 * chunk + unit) * 2..][..2];
            (scales[upper], scales[2 + upper]) = (of_unit[0], of_unit[1]);
        } else {
            let (scale, minimum) = scale_and_minimum(2 * chunk + unit, &block[4..16]);
            (scales[2 * upper], scales[2 * upper + 1]) = (scale, minimum);
        }
    }
    let d = if is_q6 { &block[208..] } else { &block[..4] };
    out[d_at + (2 * g + upper) * d.len()..][..d.len()].copy_from_slice(d);
}

/// Of Q4_K and Q5_K: 6 bits each, of unit `i`.
fn scale_and_minimum(i: usize, packed: &[u8]) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let both = packed[i + 4];
    (both & 15 | packed[i - 4] >> 6 << 4, both >> 4 | packed[i] >> 6 << 4)
}

/// The values of a Q4_K or Q5_K block, as integers.
fn values_q4_k(block: &[u8]) -> [u8; 256] {
    let (fifth, quarters) = block[16..].split_at(block.len() - 16 - 128);
    std::array::from_fn(|i| {
        let low = quarters[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15;
        low | fifth.get(i % 32).map_or(0, |bits| (bits >> (i / 32) & 1) << 4)
    })
}

/// The values of a Q6_K block, 32 too large.
fn values_q6_k(block: &[u8]) -> [u8; 256] {
    std::array::from_fn(|i| {
        let (half, quarter) = (i / 128, i % 128 / 32);
        let low = block[half * 64 + quarter % 2 * 32 + i % 32] >> (quarter / 2 * 4) & 15;
        let high = block[128 + half * 32 + i % 32] >> (2 * quarter) & 3;
        low | high << 4
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::dequantize_row;

    fn f16(bytes: &[u8]) -> f32 {
        half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }

    fn word(strip: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(strip[at..at + 4].try_into().unwrap())
    }

    /// The weight (output, input) of a strip, read by the layout's description.
    fn weight(dtype: DType, n_in: usize, strip: &[u8], output: usize, input: usize) -> f32 {
        let (g, upper) = (output % 8, output / 8);
        let (unit, k) = (input / 32, input % 32);
        let (t, pair, second) = match dtype {
            DType::Q6_K => (k % 16 / 4, k / 16 * 2 + k % 4 / 2, k % 2),
            _ => (k / 8, k % 8 / 2, k % 2),
        };
        let lane = 4 * g + t;
        let (inputs, bytes) = part(dtype);
        let at = input / inputs * bytes;
        // Of types of chunks.
        let (chunk, u) = (unit % 8 / 2, unit % 2);
        let quarter = |at: usize| word(strip, at + lane * 16 + (2 * u + upper) * 4) >> (4 * pair + 16 * second) & 15;
        match dtype {
            DType::F32 => f32::from_bits(word(strip, (output * n_in.next_multiple_of(32) + input) * 4)),
            DType::F16 => f16(&strip[(output * n_in.next_multiple_of(32) + input) * 2..]),
            DType::BF16 => {
                let at = (output * n_in.next_multiple_of(32) + input) * 2;
                half::bf16::from_le_bytes([strip[at], strip[at + 1]]).to_f32()
            }
            DType::Q8_0 => {
                let q = strip[at + lane * 16 + upper * 8 + pair / 2 * 4 + pair % 2 + 2 * second] as i8;
                q as f32 * f16(&strip[at + 512 + 4 * g + 2 * upper..])
            }
            DType::Q4_0 => (quarter(at) as i32 - 8) as f32 * f16(&strip[at + 512 + g * 8 + u * 4 + upper * 2..]),
            DType::Q4_1 => {
                let scales = &strip[at + 512 + g * 16 + u * 8 + upper * 4..];
                quarter(at) as f32 * f16(scales) + f16(&scales[2..])
            }
            DType::Q4_K | DType::Q5_K => {
                let is_q5 = dtype == DType::Q5_K;
                let fifth =
                    || word(strip, at + 2048 + chunk * 128 + lane * 4) >> (8 * u + 4 * upper + pair + 16 * second) & 1;
                let q = quarter(at + chunk * 512) + if is_q5 { fifth() << 4 } else { 0 };
                let scales_at = at + 2048 + if is_q5 { 512 } else { 0 };
                let scales = &strip[scales_at + chunk * 64 + g * 8 + u * 4 + upper * 2..];
                let d = &strip[scales_at + 256 + g * 8 + upper * 4..];
                f16(d) * scales[0] as f32 * q as f32 - f16(&d[2..]) * scales[1] as f32
            }
            DType::Q6_K => {
                let word = word(strip, at + 2048 + chunk * 256 + lane * 8 + u * 4);
                let high = word >> (8 * upper + 2 * pair + 16 * second) & 3;
                let q = (quarter(at + chunk * 512) | high << 4) as i32 - 32;
                let scale = strip[at + 3072 + chunk * 64 + g * 8 + u * 4 + pair / 2 * 2 + upper] as i8;
                f16(&strip[at + 3072 + 256 + g * 4 + upper * 2..]) * scale as f32 * q as f32
            }
            _ => unreachable!(),
        }
    }

    /// Random bytes with moderate scales.
    fn random_row(dtype: DType, n_in: usize, seed: &mut u64) -> Vec<u8> {
        let mut random = || {
            *seed ^= *seed << 13;
            *seed ^= *seed >> 7;
            *seed ^= *seed << 17;
            *seed
        };
        let mut row: Vec<u8> = (0..dtype.row_bytes(n_in).unwrap()).map(|_| random() as u8).collect();
        let halves: &[usize] = match dtype {
            DType::F32 => &[2],
            DType::Q4_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
            DType::Q6_K => &[208],
            _ => &[0],
        };
        for block in row.chunks_exact_mut(dtype.block_bytes()) {
            for &at in halves {
                // Finite as f16, bf16 and as the upper half of f32.
                let bits = 0x2000 | random() as u16 & 0x9fff;
                block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            }
        }
        row
    }

    #[test]
    fn strips_hold_the_files_weights() {
        let mut seed = 0x2545_f491_4f6c_dd1d;
        for dtype in DType::ALL.into_iter().filter(|&t| is_packed(t)) {
            for n_in in [1, 32, 33, 96, 256, 768] {
                let Some(row_bytes) = dtype.row_bytes(n_in) else { continue };
                for n_rows in [1, 7, 9, 16] {
                    let rows: Vec<u8> = (0..n_rows).flat_map(|_| random_row(dtype, n_in, &mut seed)).collect();
                    let mut strip = vec![0xff; strip_bytes(dtype, n_in)];
                    pack_strip(dtype, n_in, &rows, &mut strip);
                    for output in 0..16 {
                        let mut expected = vec![0.0; n_in];
                        if let Some(row) = rows.chunks_exact(row_bytes).nth(output) {
                            dequantize_row(dtype, row, &mut expected);
                        }
                        for (input, expected) in expected.iter().enumerate() {
                            let got = weight(dtype, n_in, &strip, output, input);
                            let same = got.to_bits() == expected.to_bits() || (got == 0.0 && *expected == 0.0);
                            assert!(same, "{dtype} {n_in} ({output}, {input}): {got} {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn padding_is_zero_and_sizes_are_those_of_files() {
        for dtype in DType::ALL.into_iter().filter(|&t| is_packed(t)) {
            let in_file = dtype.row_bytes(4096).unwrap() * 48;
            let packed = matrix_bytes(dtype, 48, 4096);
            assert!(packed >= in_file && packed * 100 <= in_file * 103, "{dtype}: {packed} bytes for {in_file}");
            assert_eq!(matrix_bytes(dtype, 33, 4096), packed, "{dtype}");
        }
        let mut strip = vec![0xff; strip_bytes(DType::F16, 33)];
        pack_strip(DType::F16, 33, &[1; 66], &mut strip);
        assert_eq!(strip.len(), 16 * 64 * 2);
        assert!(strip[..66].iter().all(|&b| b == 1) && strip[66..].iter().all(|&b| b == 0));
    }
}
