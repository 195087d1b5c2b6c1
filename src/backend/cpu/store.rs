//! Keys and values in the cache's element type, laid out for attention.

use super::arena::Arena;
use super::attention::Source;
use super::fixed::Fixed;
use super::shared::Shared;
use super::simd::Simd;
use crate::backend::CacheType;
use crate::error::Result;
use crate::tensor::{DType, dequantize_row};

/// Cache rows whose keys are interleaved, and keys that attention takes at a time from one place.
pub const GRANULE: usize = 16;

/// Bytes of a Q8_0 block of 32.
const Q8_BLOCK: usize = 34;

/// Bytes ahead of the current ones that are prefetched: a head's rows follow one another as long as its blocks do.
const AHEAD: usize = 4096;

/// Elements that a vector of f32 is loaded from with nothing but where they lie.
#[derive(Clone, Copy)]
pub enum Element {
    F32,
    F16,
    Bf16,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }
}

/// A layer's keys and values.
pub enum Cache {
    Floats(Granules, Rows),
    Fixed(Fixed),
}

impl Cache {
    /// `n` layers for blocks of `rows_per_block` rows, of which `rows` is a multiple.
    pub fn layers(
        n: usize,
        kind: CacheType,
        (rows, rows_per_block): (usize, usize),
        (heads, head_dim): (usize, usize),
    ) -> Result<Vec<Cache>> {
        if Fixed::suits(kind, head_dim) {
            return Ok(Fixed::layers(n, (rows, rows_per_block), (heads, head_dim))?
                .into_iter()
                .map(Cache::Fixed)
                .collect());
        }
        let parts = Parts::new(kind, rows, heads * head_dim, head_dim);
        let floats = |(k, v)| Cache::Floats(Granules::new(parts, rows_per_block, k), Rows::new(parts, v));
        Ok(parts.pairs(n)?.map(floats).collect())
    }

    /// Of keys and values.
    pub fn bytes(&self) -> usize {
        match self {
            Cache::Floats(k, v) => k.bytes() + v.bytes(),
            Cache::Fixed(cache) => cache.bytes(),
        }
    }

    /// Of what else it takes.
    pub fn scratch_bytes(&self) -> usize {
        match self {
            Cache::Floats(..) => 0,
            Cache::Fixed(cache) => cache.exponent_bytes(),
        }
    }

    pub fn source<'a>(&'a self, blocks: &'a [u32], rows_per_block: usize) -> Source<'a> {
        match self {
            Cache::Floats(k, v) => Source::Stored { k, v, blocks, rows_per_block },
            Cache::Fixed(cache) => Source::Fixed { cache, blocks, rows_per_block },
        }
    }

    /// Whole heads of keys or of values, from element `first` of the row on; `scratch` has room for an encoded row.
    ///
    /// # Safety
    /// Nobody else touches them meanwhile.
    pub unsafe fn write(&self, is_value: bool, row: usize, first: usize, x: &[f32], scratch: &mut [u8]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Cache::Floats(keys, _) if !is_value => keys.write(row, first, x, scratch),
                Cache::Floats(_, values) => values.write(row, first, x),
                Cache::Fixed(cache) => cache.write(is_value, row, first, x, scratch),
            }
        }
    }

    /// A row's bytes as [`CacheType::encode`] made them, its heads one after another.
    ///
    /// # Safety
    /// Nobody writes the row meanwhile.
    pub unsafe fn encoded(&self, row: usize, k: &mut [u8], v: &mut [u8]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Cache::Floats(keys, values) => {
                    keys.encoded(row, k);
                    values.encoded(row, v);
                }
                Cache::Fixed(cache) => cache.encoded(row, k, v),
            }
        }
    }

    pub fn set_encoded(&mut self, row: usize, k: &[u8], v: &[u8], scratch: &mut [u8]) {
        match self {
            Cache::Floats(keys, values) => {
                keys.set_encoded(row, k);
                values.set_encoded(row, v);
            }
            Cache::Fixed(cache) => cache.set_encoded(row, k, v, scratch),
        }
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        match self {
            Cache::Floats(keys, values) => {
                keys.copy_within(src, dst, rows);
                values.copy_within(src, dst, rows);
            }
            Cache::Fixed(cache) => cache.copy_within(src, dst, rows),
        }
    }
}

/// How a row is divided: a head's part of all rows lies together, so that attention reads a head as one stream. Q8_0 blocks that
/// would straddle heads are not divided.
#[derive(Clone, Copy)]
pub struct Parts {
    kind: CacheType,
    rows: usize,
    n: usize,
    width: usize,
    bytes: usize,
}

impl Parts {
    pub fn new(kind: CacheType, rows: usize, width: usize, head_dim: usize) -> Parts {
        let straddles = kind == CacheType::Q8_0 && !head_dim.is_multiple_of(32);
        let part = if straddles { width } else { head_dim };
        Parts { kind, rows, n: width / part, width: part, bytes: kind.row_bytes(part) }
    }

    /// Of what elements a part consists, which is one head then.
    fn element(&self) -> Option<Element> {
        match self.kind {
            CacheType::F32 => Some(Element::F32),
            CacheType::F16 => Some(Element::F16),
            CacheType::Bf16 => Some(Element::Bf16),
            CacheType::Q8_0 => None,
        }
    }

    /// Memory for keys and for values of `n` layers.
    pub fn pairs(self, n: usize) -> Result<impl Iterator<Item = (Shared<u8>, Shared<u8>)>> {
        let mut buffers = Arena::divided("the KV cache", 2 * n, self.rows, self.n * self.bytes)?.into_iter();
        Ok(std::iter::from_fn(move || buffers.next().zip(buffers.next())))
    }

    fn fit(&self, data: &Shared<u8>) -> bool {
        data.len() == self.rows * self.n * self.bytes
    }
}

/// Rows of values, and of hidden keys: `(head, row, head_dim)`.
pub struct Rows {
    parts: Parts,
    data: Shared<u8>,
}

impl Rows {
    pub fn new(parts: Parts, data: Shared<u8>) -> Rows {
        assert!(parts.fit(&data));
        Rows { parts, data }
    }

    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// Whether the elements of a head follow one another from row to row, without another head's or padding between.
    pub fn heads_are_apart(&self, head_dim: usize) -> bool {
        self.parts.width == head_dim && (self.parts.kind != CacheType::Q8_0 || head_dim.is_multiple_of(32))
    }

    /// The elements, where a row's part is one head of them.
    pub fn element(&self) -> Option<Element> {
        self.parts.element()
    }

    /// Where part `part` of a row lies.
    fn at(&self, row: usize, part: usize) -> usize {
        (part * self.parts.rows + row) * self.parts.bytes
    }

    /// Where the head that begins at element `first` of the row lies: an address to prefetch.
    pub fn place(&self, row: usize, first: usize) -> *const u8 {
        self.data.as_ptr().cast_const().wrapping_add(self.at(row, first / self.parts.width))
    }

    /// The part that begins at element `first`, of `count` rows.
    ///
    /// # Safety
    /// Nobody writes them meanwhile.
    pub unsafe fn rows(&self, row: usize, count: usize, first: usize) -> &[u8] {
        // SAFETY: the caller's; the slice checks the bounds.
        unsafe { self.data.slice(self.at(row, first / self.parts.width), count * self.parts.bytes) }
    }

    /// Whole heads from element `first` of the row on.
    ///
    /// # Safety
    /// Nobody else touches them meanwhile.
    pub unsafe fn write(&self, row: usize, first: usize, x: &[f32]) {
        for (i, x) in x.chunks_exact(self.parts.width).enumerate() {
            let part = first / self.parts.width + i;
            // SAFETY: the caller's.
            self.parts.kind.encode(x, unsafe { self.data.slice_mut(self.at(row, part), self.parts.bytes) });
        }
    }

    /// # Safety
    /// Nobody writes `src`'s row `from` or touches this row `to` meanwhile.
    pub unsafe fn copy_from(&self, to: usize, src: &Rows, from: usize) {
        for part in 0..self.parts.n {
            // SAFETY: the caller's.
            unsafe {
                let source = src.data.slice(src.at(from, part), self.parts.bytes);
                self.data.slice_mut(self.at(to, part), self.parts.bytes).copy_from_slice(source);
            }
        }
    }

    /// A row's bytes, its parts one after another.
    ///
    /// # Safety
    /// Nobody writes the row meanwhile.
    pub unsafe fn encoded(&self, row: usize, out: &mut [u8]) {
        for (part, out) in out.chunks_exact_mut(self.parts.bytes).enumerate() {
            // SAFETY: the caller's.
            out.copy_from_slice(unsafe { self.data.slice(self.at(row, part), self.parts.bytes) });
        }
    }

    pub fn set_encoded(&mut self, row: usize, bytes: &[u8]) {
        for (part, bytes) in bytes.chunks_exact(self.parts.bytes).enumerate() {
            let at = self.at(row, part);
            self.data.as_mut()[at..at + self.parts.bytes].copy_from_slice(bytes);
        }
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        for part in 0..self.parts.n {
            let (from, to) = (self.at(src, part), self.at(dst, part));
            self.data.as_mut().copy_within(from..from + rows * self.parts.bytes, to);
        }
    }

    /// Elements of one head, from element `first` of the row on, as f32: of this row and, if `out` is longer than the head, of the
    /// rows after it.
    ///
    /// # Safety
    /// The CPU has `S`; nobody writes the rows meanwhile.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(&self, row: usize, first: usize, out: &mut [f32]) {
        let (part, first) = (first / self.parts.width, first % self.parts.width);
        let n = out.len();
        // SAFETY: slices check that the elements are there; vectors end within them.
        unsafe {
            let at = self.at(row, part);
            match self.parts.kind {
                CacheType::F32 => {
                    let bytes = self.data.slice(at + 4 * first, 4 * n);
                    vectors::<S, 4>(bytes.as_ptr(), out, |p| S::load(p.cast()));
                    let whole = n - n % S::LANES;
                    dequantize_row(DType::F32, &bytes[4 * whole..], &mut out[whole..]);
                }
                CacheType::F16 => {
                    let bytes = self.data.slice(at + 2 * first, 2 * n);
                    vectors::<S, 2>(bytes.as_ptr(), out, |p| S::load_f16(p.cast()));
                    let whole = n - n % S::LANES;
                    dequantize_row(DType::F16, &bytes[2 * whole..], &mut out[whole..]);
                }
                CacheType::Bf16 => {
                    let bytes = self.data.slice(at + 2 * first, 2 * n);
                    vectors::<S, 2>(bytes.as_ptr(), out, |p| S::load_bf16(p.cast()));
                    let whole = n - n % S::LANES;
                    dequantize_row(DType::BF16, &bytes[2 * whole..], &mut out[whole..]);
                }
                // Whole blocks.
                CacheType::Q8_0 if n.is_multiple_of(32) && first.is_multiple_of(32) => {
                    let bytes = self.data.slice(at + first / 32 * Q8_BLOCK, n / 32 * Q8_BLOCK);
                    for (block, out) in bytes.as_chunks::<Q8_BLOCK>().0.iter().zip(out.as_chunks_mut::<32>().0) {
                        S::prefetch(block.as_ptr().wrapping_add(AHEAD));
                        let d = S::splat(half::f16::from_le_bytes([block[0], block[1]]).to_f32());
                        let (mut q, mut to) = (block.as_ptr().add(2), out.as_mut_ptr());
                        for _ in 0..32 / S::LANES {
                            S::store(to, S::mul(S::load_i8(q.cast()), d));
                            (q, to) = (q.add(S::LANES), to.add(S::LANES));
                        }
                    }
                }
                CacheType::Q8_0 => {
                    let bytes = self.data.slice(at, self.parts.bytes);
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

/// Converts whole vectors of elements of `N` bytes.
///
/// # Safety
/// The CPU has `S`; `out.len()` elements lie behind `p`.
#[inline(always)]
unsafe fn vectors<S: Simd, const N: usize>(mut p: *const u8, out: &mut [f32], load: impl Fn(*const u8) -> S::F) {
    let mut to = out.as_mut_ptr();
    // Pointers, not indices: their sums are not checked for overflow, and this is a fifth of a long context's time.
    for _ in 0..out.len() / S::LANES {
        // SAFETY: within the elements that the caller vouches for.
        unsafe {
            S::prefetch(p.wrapping_add(AHEAD));
            S::store(to, load(p));
            (p, to) = (p.add(N * S::LANES), to.add(S::LANES));
        }
    }
}

/// Converts `n` columns of 16 elements of `N` bytes into rows `stride` apart.
///
/// # Safety
/// The CPU has `S`; the elements lie behind `p`, and room for them behind `out`.
#[inline(always)]
unsafe fn columns<S: Simd, const N: usize>(
    mut p: *const u8,
    n: usize,
    mut out: *mut f32,
    stride: usize,
    load: impl Fn(*const u8) -> S::F,
) {
    for _ in 0..n {
        // SAFETY: within what the caller vouches for.
        unsafe {
            S::prefetch(p.wrapping_add(AHEAD));
            let mut to = out;
            for _ in 0..GRANULE / S::LANES {
                S::store(to, load(p));
                (p, to) = (p.add(N * S::LANES), to.add(S::LANES));
            }
            out = out.add(stride);
        }
    }
}

/// Elements of `N` bytes, `stride` elements apart.
///
/// # Safety
/// There is room for all of them behind `to`.
pub unsafe fn scatter<const N: usize>(elements: &[u8], to: *mut u8, stride: usize) {
    for (i, element) in elements.as_chunks::<N>().0.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { to.add(i * stride * N).cast::<[u8; N]>().write(*element) };
    }
}

/// Keys interleaved, so that a vector holds one element of several keys: `(head, granule, head_dim, lane)`; Q8_0: `(head,
/// granule, block)` of `(32, lane)` bytes and `(lane)` f16 scales. A granule is 16 rows where a cache block is a multiple of
/// that, else as many as divide a block: a sequence's keys do not share memory lines with others' then.
pub struct Granules {
    parts: Parts,
    lanes: usize,
    data: Shared<u8>,
}

/// Rows of a granule where a cache block has `rows_per_block`.
pub fn lanes(rows_per_block: usize) -> usize {
    1 << rows_per_block.trailing_zeros().min(GRANULE.trailing_zeros())
}

/// A part of a row within its granule.
struct Lane {
    /// Where the granule's part begins.
    base: usize,
    lane: usize,
}

impl Granules {
    /// For blocks of `rows_per_block` rows, of which the rows are a multiple.
    pub fn new(parts: Parts, rows_per_block: usize, data: Shared<u8>) -> Granules {
        assert!(parts.rows.is_multiple_of(rows_per_block) && parts.fit(&data));
        Granules { parts, lanes: lanes(rows_per_block), data }
    }

    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// The elements, where a granule's part is `(head_dim, 16)` of them.
    pub fn element(&self) -> Option<Element> {
        self.parts.element().filter(|_| self.lanes == GRANULE)
    }

    fn at(&self, row: usize, part: usize) -> Lane {
        let lane = row % self.lanes;
        Lane { base: (part * self.parts.rows + row - lane) * self.parts.bytes, lane }
    }

    /// Where the granule of a row and of the head that begins at element `first` lies: an address to prefetch.
    pub fn place(&self, row: usize, first: usize) -> *const u8 {
        self.data.as_ptr().cast_const().wrapping_add(self.at(row, first / self.parts.width).base)
    }

    /// The part that begins at element `first`, of the granules of `count` rows.
    ///
    /// # Safety
    /// Nobody writes them meanwhile.
    pub unsafe fn granules(&self, row: usize, count: usize, first: usize) -> &[u8] {
        let bytes = count.next_multiple_of(self.lanes) * self.parts.bytes;
        // SAFETY: the caller's; the slice checks the bounds.
        unsafe { self.data.slice(self.at(row, first / self.parts.width).base, bytes) }
    }

    /// Whole heads from element `first` of the row on; `scratch` has room for an encoded row.
    ///
    /// # Safety
    /// Nobody else touches them meanwhile.
    pub unsafe fn write(&self, row: usize, first: usize, x: &[f32], scratch: &mut [u8]) {
        let encoded = &mut scratch[..self.parts.bytes];
        for (i, x) in x.chunks_exact(self.parts.width).enumerate() {
            self.parts.kind.encode(x, encoded);
            // SAFETY: the caller's.
            unsafe { self.scatter_row(row, first / self.parts.width + i, encoded) };
        }
    }

    /// A part of a row, given as its bytes.
    ///
    /// # Safety
    /// Nobody else touches it meanwhile.
    unsafe fn scatter_row(&self, row: usize, part: usize, encoded: &[u8]) {
        let Lane { base, lane } = self.at(row, part);
        let lanes = self.lanes;
        assert!(base + lanes * self.parts.bytes <= self.data.len() && encoded.len() == self.parts.bytes);
        // SAFETY: elements of this row only, within the granule that was checked to be in bounds.
        unsafe {
            let granule = self.data.as_ptr().add(base);
            match self.parts.kind {
                CacheType::F32 => scatter::<4>(encoded, granule.add(4 * lane), lanes),
                CacheType::F16 | CacheType::Bf16 => scatter::<2>(encoded, granule.add(2 * lane), lanes),
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

    pub fn set_encoded(&mut self, row: usize, bytes: &[u8]) {
        for (part, bytes) in bytes.chunks_exact(self.parts.bytes).enumerate() {
            // SAFETY: `&mut self` is the only access.
            unsafe { self.scatter_row(row, part, bytes) };
        }
    }

    /// A row's bytes, its parts one after another, each as [`CacheType::encode`] made it.
    ///
    /// # Safety
    /// Nobody writes the row meanwhile.
    pub unsafe fn encoded(&self, row: usize, out: &mut [u8]) {
        let Parts { kind, bytes: n, .. } = self.parts;
        for (part, out) in out.chunks_exact_mut(n).enumerate() {
            let Lane { base, lane } = self.at(row, part);
            let lanes = self.lanes;
            // SAFETY: the caller's.
            let granule = unsafe { self.data.slice(base, lanes * n) };
            let mut gather = |to: usize, size: usize, count: usize, from: usize| {
                for i in 0..count {
                    out[to + i * size..][..size].copy_from_slice(&granule[from + (i * lanes + lane) * size..][..size]);
                }
            };
            match kind {
                CacheType::F32 => gather(0, 4, n / 4, 0),
                CacheType::F16 | CacheType::Bf16 => gather(0, 2, n / 2, 0),
                CacheType::Q8_0 => {
                    for at in (0..n).step_by(Q8_BLOCK) {
                        gather(at, 2, 1, at * lanes + 32 * lanes);
                        gather(at + 2, 1, 32, at * lanes);
                    }
                }
            }
        }
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        let Parts { kind, n, bytes, .. } = self.parts;
        let lanes = self.lanes;
        for (i, part) in (0..rows).flat_map(|i| (0..n).map(move |part| (i, part))) {
            let (from, to) = (self.at(src + i, part), self.at(dst + i, part));
            let data = self.data.as_mut();
            let mut copy = |from: usize, to: usize, n: usize| data.copy_within(from..from + n, to);
            match kind {
                CacheType::F32 | CacheType::F16 | CacheType::Bf16 => {
                    let size = if kind == CacheType::F32 { 4 } else { 2 };
                    let place = |l: &Lane, e: usize| l.base + (e * lanes + l.lane) * size;
                    (0..bytes / size).for_each(|e| copy(place(&from, e), place(&to, e), size));
                }
                CacheType::Q8_0 => {
                    let block = |l: &Lane, b: usize| l.base + b * lanes * Q8_BLOCK;
                    let scale = |l: &Lane, b: usize| block(l, b) + 32 * lanes + 2 * l.lane;
                    let quant = |l: &Lane, b: usize, e: usize| block(l, b) + e * lanes + l.lane;
                    for b in 0..bytes / Q8_BLOCK {
                        (0..32).for_each(|e| copy(quant(&from, b, e), quant(&to, b, e), 1));
                        copy(scale(&from, b), scale(&to, b), 2);
                    }
                }
            }
        }
    }

    /// Bytes that [`Granules::read`] needs to gather narrow granules in.
    pub fn gathered_bytes(kind: CacheType, width: usize, head_dim: usize) -> usize {
        GRANULE * Parts::new(kind, 0, width, head_dim).bytes
    }

    /// Elements `first..first + n`, of one head, of up to 16 keys as f32 into `out[element][stride]`, 16 at a time; lanes without a
    /// key get anything. `row` tells the cache row of a key that begins a granule.
    ///
    /// # Safety
    /// The CPU has `S`; nobody writes the rows meanwhile; `out` has room.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn read<S: Simd>(
        &self,
        row: impl Fn(usize) -> usize,
        keys: usize,
        first: usize,
        n: usize,
        out: *mut f32,
        stride: usize,
        gathered: &mut [u8],
    ) {
        // SAFETY: elements of a head lie within the row; the caller's for the rest.
        unsafe {
            let (part, first) = (first / self.parts.width, first % self.parts.width);
            let bytes = if self.lanes == GRANULE {
                self.data.slice(self.at(row(0), part).base, GRANULE * self.parts.bytes)
            } else {
                for key in (0..keys).step_by(self.lanes) {
                    self.gather(row(key), part, key, gathered);
                }
                &*gathered
            };
            match self.parts.kind {
                CacheType::F32 => {
                    let bytes = &bytes[first * GRANULE * 4..(first + n) * GRANULE * 4];
                    columns::<S, 4>(bytes.as_ptr(), n, out, stride, |p| S::load(p.cast()));
                }
                CacheType::F16 => {
                    let bytes = &bytes[first * GRANULE * 2..(first + n) * GRANULE * 2];
                    columns::<S, 2>(bytes.as_ptr(), n, out, stride, |p| S::load_f16(p.cast()));
                }
                CacheType::Bf16 => {
                    let bytes = &bytes[first * GRANULE * 2..(first + n) * GRANULE * 2];
                    columns::<S, 2>(bytes.as_ptr(), n, out, stride, |p| S::load_bf16(p.cast()));
                }
                CacheType::Q8_0 => {
                    let mut done = 0;
                    while done < n {
                        let e = first + done;
                        let some = (32 - e % 32).min(n - done);
                        let block = &bytes[e / 32 * GRANULE * Q8_BLOCK..][..GRANULE * Q8_BLOCK];
                        for lane in (0..GRANULE).step_by(S::LANES) {
                            let d = S::load_f16(block.as_ptr().add(32 * GRANULE + 2 * lane).cast());
                            let mut q = block.as_ptr().add(e % 32 * GRANULE + lane);
                            let mut to = out.add(done * stride + lane);
                            for _ in 0..some {
                                S::prefetch(q.wrapping_add(AHEAD));
                                S::store(to, S::mul(S::load_i8(q.cast()), d));
                                (q, to) = (q.add(GRANULE), to.add(stride));
                            }
                        }
                        done += some;
                    }
                }
            }
        }
    }

    /// Copies a narrow granule to lane `lane` of one of 16 lanes.
    ///
    /// # Safety
    /// Nobody writes the granule meanwhile.
    #[inline(never)] // it would crowd the loops of whole granules
    unsafe fn gather(&self, row: usize, part: usize, lane: usize, to: &mut [u8]) {
        let lanes = self.lanes;
        // SAFETY: the caller's; the slice checks the bounds.
        let from = unsafe { self.data.slice(self.at(row, part).base, lanes * self.parts.bytes) };
        match self.parts.kind {
            CacheType::F32 => widen::<4>(from, lanes, lane, to),
            CacheType::F16 | CacheType::Bf16 => widen::<2>(from, lanes, lane, to),
            CacheType::Q8_0 => {
                let blocks = from.chunks_exact(lanes * Q8_BLOCK).zip(to.chunks_exact_mut(GRANULE * Q8_BLOCK));
                for (from, to) in blocks {
                    let ((quants, scales), to) = (from.split_at(32 * lanes), to.split_at_mut(32 * GRANULE));
                    widen::<1>(quants, lanes, lane, to.0);
                    widen::<2>(scales, lanes, lane, to.1);
                }
            }
        }
    }
}

/// Columns of `lanes` elements of `N` bytes into columns of 16, from lane `lane` on.
#[inline(always)]
pub fn widen<const N: usize>(from: &[u8], lanes: usize, lane: usize, to: &mut [u8]) {
    fn columns<const BYTES: usize>(from: &[u8], at: usize, to: &mut [u8], wide: usize) {
        for (from, to) in from.as_chunks::<BYTES>().0.iter().zip(to.chunks_exact_mut(wide)) {
            to[at..at + BYTES].copy_from_slice(from);
        }
    }
    let (at, wide) = (N * lane, N * GRANULE);
    match N * lanes {
        1 => columns::<1>(from, at, to, wide),
        2 => columns::<2>(from, at, to, wide),
        4 => columns::<4>(from, at, to, wide),
        8 => columns::<8>(from, at, to, wide),
        16 => columns::<16>(from, at, to, wide),
        _ => columns::<32>(from, at, to, wide),
    }
}
