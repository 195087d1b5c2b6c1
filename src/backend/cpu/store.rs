//! Keys and values in the cache's element type, laid out for attention.

use super::shared::Shared;
use super::simd::Simd;
use crate::backend::CacheType;
use crate::error::Result;
use crate::tensor::{DType, dequantize_row, quantize_row};

/// Cache rows whose keys are interleaved, and keys that attention takes at a time from one place.
pub const GRANULE: usize = 16;

/// Bytes of a Q8_0 block of 32, and of 16 of them interleaved.
const Q8_BLOCK: usize = 34;
const Q8_GRANULE: usize = GRANULE * Q8_BLOCK;

fn encode(kind: CacheType, x: &[f32], out: &mut [u8]) {
    match kind {
        CacheType::F32 => quantize_row(DType::F32, x, out),
        CacheType::F16 => quantize_row(DType::F16, x, out),
        CacheType::Q8_0 => {
            for (x, out) in x.chunks(32).zip(out.chunks_mut(Q8_BLOCK)) {
                let mut padded = [0.0; 32];
                padded[..x.len()].copy_from_slice(x);
                quantize_row(DType::Q8_0, &padded, out);
            }
        }
    }
}

/// Rows one after the other: `(row, width)`.
pub struct Rows {
    kind: CacheType,
    row_bytes: usize,
    data: Shared<u8>,
}

impl Rows {
    pub fn new(kind: CacheType, rows: usize, width: usize) -> Result<Rows> {
        let row_bytes = kind.row_bytes(width);
        Ok(Rows { kind, row_bytes, data: Shared::new("the KV cache", rows, row_bytes)? })
    }

    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// # Safety
    /// Nobody else touches this row meanwhile.
    pub unsafe fn write(&self, row: usize, x: &[f32]) {
        // SAFETY: the caller's.
        encode(self.kind, x, unsafe { self.data.slice_mut(row * self.row_bytes, self.row_bytes) });
    }

    /// # Safety
    /// Nobody writes `src`'s row `from` or touches this row `to` meanwhile.
    pub unsafe fn copy_from(&self, to: usize, src: &Rows, from: usize) {
        // SAFETY: the caller's.
        unsafe {
            let source = src.data.slice(from * src.row_bytes, src.row_bytes);
            self.data.slice_mut(to * self.row_bytes, self.row_bytes).copy_from_slice(source);
        }
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        let start = src * self.row_bytes;
        let n = self.row_bytes;
        self.data.as_mut().copy_within(start..start + rows * n, dst * n);
    }

    /// Elements `first..first + out.len()` of a row as f32.
    ///
    /// # Safety
    /// The CPU has `S`; nobody writes the row meanwhile.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(&self, row: usize, first: usize, out: &mut [f32]) {
        // SAFETY: the row is in bounds (slice checks), elements are those of a head, vectors end within `whole`.
        unsafe {
            let bytes = self.data.slice(row * self.row_bytes, self.row_bytes);
            let n = out.len();
            let whole = n - n % S::LANES;
            match self.kind {
                CacheType::F32 => {
                    let bytes = &bytes[4 * first..4 * (first + n)];
                    for i in (0..whole).step_by(S::LANES) {
                        S::store(out.as_mut_ptr().add(i), S::load(bytes.as_ptr().add(4 * i).cast()));
                    }
                    dequantize_row(DType::F32, &bytes[4 * whole..], &mut out[whole..]);
                }
                CacheType::F16 => {
                    let bytes = &bytes[2 * first..2 * (first + n)];
                    for i in (0..whole).step_by(S::LANES) {
                        S::store(out.as_mut_ptr().add(i), S::load_f16(bytes.as_ptr().add(2 * i).cast()));
                    }
                    dequantize_row(DType::F16, &bytes[2 * whole..], &mut out[whole..]);
                }
                CacheType::Q8_0 if n.is_multiple_of(GRANULE) && first.is_multiple_of(GRANULE) => {
                    for i in (0..n).step_by(S::LANES) {
                        let e = first + i;
                        let block = &bytes[e / 32 * Q8_BLOCK..][..Q8_BLOCK];
                        let d = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
                        let q = S::load_i8(block.as_ptr().add(2 + e % 32).cast());
                        S::store(out.as_mut_ptr().add(i), S::mul(q, S::splat(d)));
                    }
                }
                CacheType::Q8_0 => {
                    for (i, out) in out.iter_mut().enumerate() {
                        let e = first + i;
                        let block = &bytes[e / 32 * Q8_BLOCK..][..Q8_BLOCK];
                        let d = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
                        *out = d * f32::from(block[2 + e % 32] as i8);
                    }
                }
            }
        }
    }
}

/// Rows interleaved by sixteens, so that a vector holds one element of 16 keys:
/// `(granule, width, row 16)`; Q8_0: `(granule, block)` of `(32, row 16)` bytes and `(row 16)` f16 scales. The last granule
/// may have fewer rows.
pub struct Granules {
    kind: CacheType,
    row_bytes: usize,
    rows: usize,
    data: Shared<u8>,
}

impl Granules {
    pub fn new(kind: CacheType, rows: usize, width: usize) -> Result<Granules> {
        let row_bytes = kind.row_bytes(width);
        Ok(Granules { kind, row_bytes, rows, data: Shared::new("the KV cache", rows, row_bytes)? })
    }

    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// Rows in the granule of `row`.
    fn lanes(&self, row: usize) -> usize {
        (self.rows - (row - row % GRANULE)).min(GRANULE)
    }

    /// Whether [`Granules::read`] can take the 16 rows from `row` on.
    pub fn is_whole(&self, row: usize) -> bool {
        row.is_multiple_of(GRANULE) && self.lanes(row) == GRANULE
    }

    /// Where piece `piece` of an encoded row goes: its offset in the buffer, its offset in the row, its length.
    fn pieces(&self, row: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (kind, lane, lanes) = (self.kind, row % GRANULE, self.lanes(row));
        let base = row / GRANULE * GRANULE * self.row_bytes;
        let n = match kind {
            CacheType::F32 => self.row_bytes / 4,
            CacheType::F16 => self.row_bytes / 2,
            CacheType::Q8_0 => self.row_bytes / Q8_BLOCK * 33,
        };
        (0..n).map(move |i| match kind {
            CacheType::F32 => (base + (i * lanes + lane) * 4, i * 4, 4),
            CacheType::F16 => (base + (i * lanes + lane) * 2, i * 2, 2),
            CacheType::Q8_0 => {
                let (block, j) = (base + i / 33 * lanes * Q8_BLOCK, i % 33);
                let source = i / 33 * Q8_BLOCK;
                match j {
                    0 => (block + 32 * lanes + 2 * lane, source, 2),
                    _ => (block + (j - 1) * lanes + lane, source + 1 + j, 1),
                }
            }
        })
    }

    /// `scratch` has room for an encoded row.
    ///
    /// # Safety
    /// Nobody else touches this row meanwhile.
    pub unsafe fn write(&self, row: usize, x: &[f32], scratch: &mut [u8]) {
        let encoded = &mut scratch[..self.row_bytes];
        encode(self.kind, x, encoded);
        for (to, from, n) in self.pieces(row) {
            // SAFETY: bytes of this row only.
            unsafe { self.data.slice_mut(to, n) }.copy_from_slice(&encoded[from..from + n]);
        }
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        for i in 0..rows {
            for ((from, _, n), (to, _, _)) in self.pieces(src + i).zip(self.pieces(dst + i)) {
                self.data.as_mut().copy_within(from..from + n, to);
            }
        }
    }

    /// Elements `first..first + n` of a whole granule's 16 rows as f32 into `out[element][stride]`, 16 at a time.
    ///
    /// # Safety
    /// The CPU has `S`; nobody writes the granule meanwhile; `out` has room.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(&self, granule: usize, first: usize, n: usize, out: *mut f32, stride: usize) {
        // SAFETY: elements of a head lie within the row; the caller's for the rest.
        unsafe {
            let bytes = self.data.slice(granule * GRANULE * self.row_bytes, GRANULE * self.row_bytes);
            match self.kind {
                CacheType::F32 => {
                    let bytes = &bytes[first * GRANULE * 4..(first + n) * GRANULE * 4];
                    for i in 0..n {
                        for lane in (0..GRANULE).step_by(S::LANES) {
                            let x = S::load(bytes.as_ptr().add((i * GRANULE + lane) * 4).cast());
                            S::store(out.add(i * stride + lane), x);
                        }
                    }
                }
                CacheType::F16 => {
                    let bytes = &bytes[first * GRANULE * 2..(first + n) * GRANULE * 2];
                    for i in 0..n {
                        for lane in (0..GRANULE).step_by(S::LANES) {
                            let x = S::load_f16(bytes.as_ptr().add((i * GRANULE + lane) * 2).cast());
                            S::store(out.add(i * stride + lane), x);
                        }
                    }
                }
                CacheType::Q8_0 => {
                    for i in 0..n {
                        let e = first + i;
                        let block = &bytes[e / 32 * Q8_GRANULE..][..Q8_GRANULE];
                        for lane in (0..GRANULE).step_by(S::LANES) {
                            let d = S::load_f16(block.as_ptr().add(32 * GRANULE + 2 * lane).cast());
                            let q = S::load_i8(block.as_ptr().add(e % 32 * GRANULE + lane).cast());
                            S::store(out.add(i * stride + lane), S::mul(q, d));
                        }
                    }
                }
            }
        }
    }

    /// Elements `first..first + n` of one row, into `out[element * stride]`.
    ///
    /// # Safety
    /// Nobody writes the row meanwhile; `out` has room.
    pub unsafe fn read_row(&self, row: usize, first: usize, n: usize, out: *mut f32, stride: usize) {
        let (lane, lanes) = (row % GRANULE, self.lanes(row));
        // SAFETY: the caller's.
        unsafe {
            let bytes = self.data.slice(row / GRANULE * GRANULE * self.row_bytes, lanes * self.row_bytes);
            let half = |at: usize| half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
            for i in 0..n {
                let e = first + i;
                let x = match self.kind {
                    CacheType::F32 => {
                        let at = (e * lanes + lane) * 4;
                        f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
                    }
                    CacheType::F16 => half((e * lanes + lane) * 2),
                    CacheType::Q8_0 => {
                        let block = e / 32 * lanes * Q8_BLOCK;
                        let q = bytes[block + e % 32 * lanes + lane] as i8;
                        half(block + 32 * lanes + 2 * lane) * f32::from(q)
                    }
                };
                *out.add(i * stride) = x;
            }
        }
    }
}
