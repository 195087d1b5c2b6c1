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

/// Rows of values (and of hidden keys), a head's part of `granule` rows together: `(granule, head, row of it, head_dim)`. With
/// granules of one row that is `(row, width)`; with sixteen, what attention reads for a head is one stream.
pub struct Rows {
    kind: CacheType,
    rows: usize,
    granule: usize,
    row_bytes: usize,
    /// A head's bytes in a row; the whole row where Q8_0 blocks straddle heads.
    part_bytes: usize,
    part_width: usize,
    data: Shared<u8>,
}

impl Rows {
    pub fn new(kind: CacheType, rows: usize, width: usize, head_dim: usize, granule: usize) -> Result<Rows> {
        let row_bytes = kind.row_bytes(width);
        let straddles = kind == CacheType::Q8_0 && !head_dim.is_multiple_of(32);
        let part_width = if straddles { width } else { head_dim };
        let part_bytes = kind.row_bytes(part_width);
        let data = Shared::new("the KV cache", rows, row_bytes)?;
        Ok(Rows { kind, rows, granule, row_bytes, part_bytes, part_width, data })
    }

    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// Where part `part` of a row lies.
    fn at(&self, row: usize, part: usize) -> usize {
        let (first, lane) = (row - row % self.granule, row % self.granule);
        let lanes = (self.rows - first).min(self.granule);
        first * self.row_bytes + (part * lanes + lane) * self.part_bytes
    }

    /// # Safety
    /// Nobody else touches this row meanwhile.
    pub unsafe fn write(&self, row: usize, x: &[f32]) {
        for (part, x) in x.chunks_exact(self.part_width).enumerate() {
            // SAFETY: the caller's.
            encode(self.kind, x, unsafe { self.data.slice_mut(self.at(row, part), self.part_bytes) });
        }
    }

    /// Both with granules of one row.
    ///
    /// # Safety
    /// Nobody writes `src`'s row `from` or touches this row `to` meanwhile.
    pub unsafe fn copy_from(&self, to: usize, src: &Rows, from: usize) {
        debug_assert!(self.granule == 1 && src.granule == 1);
        // SAFETY: the caller's.
        unsafe {
            let source = src.data.slice(from * src.row_bytes, src.row_bytes);
            self.data.slice_mut(to * self.row_bytes, self.row_bytes).copy_from_slice(source);
        }
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        for i in 0..rows {
            for part in 0..self.row_bytes / self.part_bytes {
                let (from, to) = (self.at(src + i, part), self.at(dst + i, part));
                self.data.as_mut().copy_within(from..from + self.part_bytes, to);
            }
        }
    }

    /// Asks for a head's part of the whole granule that begins at `row`.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    pub unsafe fn prefetch<S: Simd>(&self, row: usize, first: usize) {
        let start = self.at(row, first / self.part_width);
        for line in (0..self.granule * self.part_bytes).step_by(64) {
            // SAFETY: a prefetch may name any address.
            unsafe { S::prefetch(self.data.as_ptr().wrapping_add(start + line)) };
        }
    }

    /// Elements `first..first + out.len()` of a row as f32.
    ///
    /// # Safety
    /// The CPU has `S`; nobody writes the row meanwhile.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(&self, row: usize, first: usize, out: &mut [f32]) {
        // SAFETY: the row is in bounds (slice checks), elements are those of a head, vectors end within `whole`.
        unsafe {
            let (part, first) = (first / self.part_width, first % self.part_width);
            let bytes = self.data.slice(self.at(row, part), self.part_bytes);
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

/// Elements of `N` bytes, `stride` elements apart.
///
/// # Safety
/// There is room for all of them behind `to`.
unsafe fn scatter<const N: usize>(elements: &[u8], to: *mut u8, stride: usize) {
    for (i, element) in elements.as_chunks::<N>().0.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { to.add(i * stride * N).cast::<[u8; N]>().write(*element) };
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

    /// Where a row's part of its granule begins, and the step from one of its elements to the next.
    fn lane(&self, row: usize) -> (usize, usize) {
        (row / GRANULE * GRANULE * self.row_bytes, self.lanes(row))
    }

    /// `scratch` has room for an encoded row.
    ///
    /// # Safety
    /// Nobody else touches this row meanwhile.
    pub unsafe fn write(&self, row: usize, x: &[f32], scratch: &mut [u8]) {
        let encoded = &mut scratch[..self.row_bytes];
        encode(self.kind, x, encoded);
        let ((base, lanes), lane) = (self.lane(row), row % GRANULE);
        assert!(base + lanes * self.row_bytes <= self.data.len());
        // SAFETY: elements of this row only, within the granule that was checked to be in bounds.
        unsafe {
            let granule = self.data.as_ptr().add(base);
            match self.kind {
                CacheType::F32 => scatter::<4>(encoded, granule.add(4 * lane), lanes),
                CacheType::F16 => scatter::<2>(encoded, granule.add(2 * lane), lanes),
                CacheType::Q8_0 => {
                    for (i, block) in encoded.chunks_exact(Q8_BLOCK).enumerate() {
                        let to = granule.add(i * lanes * Q8_BLOCK);
                        scatter::<2>(&block[..2], to.add(32 * lanes + 2 * lane), lanes);
                        scatter::<1>(&block[2..], to.add(lane), lanes);
                    }
                }
            }
        }
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        let kind = self.kind;
        for i in 0..rows {
            let ((from, from_lanes), from_lane) = (self.lane(src + i), (src + i) % GRANULE);
            let ((to, to_lanes), to_lane) = (self.lane(dst + i), (dst + i) % GRANULE);
            let n_blocks = self.row_bytes / Q8_BLOCK;
            let data = self.data.as_mut();
            let mut copy = |from: usize, to: usize, n: usize| data.copy_within(from..from + n, to);
            match kind {
                CacheType::F32 | CacheType::F16 => {
                    let size = if kind == CacheType::F32 { 4 } else { 2 };
                    for e in 0..self.row_bytes / size {
                        let place = |base, lanes, lane| base + (e * lanes + lane) * size;
                        copy(place(from, from_lanes, from_lane), place(to, to_lanes, to_lane), size);
                    }
                }
                CacheType::Q8_0 => {
                    for block in 0..n_blocks {
                        let (from, to) = (from + block * from_lanes * Q8_BLOCK, to + block * to_lanes * Q8_BLOCK);
                        for e in 0..32 {
                            copy(from + e * from_lanes + from_lane, to + e * to_lanes + to_lane, 1);
                        }
                        copy(from + 32 * from_lanes + 2 * from_lane, to + 32 * to_lanes + 2 * to_lane, 2);
                    }
                }
            }
        }
    }

    /// Asks for `n` elements from `first` on of a whole granule.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    pub unsafe fn prefetch<S: Simd>(&self, granule: usize, first: usize, n: usize) {
        let row = GRANULE * self.row_bytes;
        let (start, len) = match self.kind {
            CacheType::F32 => (first * GRANULE * 4, n * GRANULE * 4),
            CacheType::F16 => (first * GRANULE * 2, n * GRANULE * 2),
            CacheType::Q8_0 => (first / 32 * Q8_GRANULE, n.div_ceil(32) * Q8_GRANULE),
        };
        for line in (0..len).step_by(64) {
            // SAFETY: a prefetch may name any address.
            unsafe { S::prefetch(self.data.as_ptr().wrapping_add(granule * row + start + line)) };
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
