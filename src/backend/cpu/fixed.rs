//! An f16 cache as integers. A head's key or value is 16-bit integers and one exponent: its f16 elements, but for what lies below 2^-14 of
//! the largest of them. Attention multiplies them in pairs ([`Simd::dot_pairs`]), twice as many in an instruction as in f32, with nothing to
//! convert.
//!
//! Every such element is an f16 number again (a multiple of the unit with 11 digits at most), so rows leave and enter as f16
//! and come back as the same integers.

use super::arena::{Arena, LINE};
use super::attention::{CHUNK, RUN};
use super::shared::Shared;
use super::simd::Simd;
use super::store::{GRANULE, lanes, scatter, widen};
use crate::backend::CacheType;
use crate::error::Result;

/// Integers are smaller than `2^DIGITS`.
const DIGITS: u32 = 14;

/// The exponent that stands for a head with an element that is no number, or infinite: its integers are 0, and 0 times this unit is NaN.
const NOT_FINITE: u8 = 255;

/// Added to an f32 of at most 2^22, it rounds off what is no integer, to even, and leaves the integer in the low bits.
const ROUNDS: f32 = 12_582_912.0; // 1.5 * 2^23

/// Bytes of the integers of a pair's two rows or two elements, side by side.
const PAIR: usize = 4;

/// Rows of queries or weights that a product takes at once.
const ROWS: usize = 6;

/// Pairs of a granule's 16 elements or rows.
const STEPS: usize = GRANULE / 2;

/// A layer's keys and values.
pub struct Fixed {
    rows: usize,
    heads: usize,
    dim: usize,
    /// Rows of a granule: 16, or as many as divide a block of the cache, whose granules are gathered before they are multiplied.
    lanes: usize,
    /// `(head, granule, pair of elements, row)` of pairs.
    keys: Shared<u8>,
    /// `(head, pair of rows, element)` of pairs; `(head, row, element)` where a granule is one row.
    values: Shared<u8>,
    /// `(keys or values, head, row)`: the unit of integers as the biased exponent of an f32.
    exponents: Shared<u8>,
}

/// Turns a head's f16 elements into integers; tells their unit's exponent.
fn fix(x: &mut [u8]) -> u8 {
    use half::slice::HalfFloatSliceExt;
    let largest = x.as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b) & 0x7fff).max();
    let largest = half::f16::from_bits(largest.unwrap_or(0));
    if !largest.is_finite() {
        x.fill(0);
        return NOT_FINITE;
    }
    // At least 2^-24, the smallest f16: of a head of zeros, too.
    let exponent = (largest.to_f32().max(half::f16::from_bits(1).to_f32()).to_bits() >> 23) - (DIGITS - 1);
    let inverse = f32::from_bits((254 - exponent) << 23);
    for x in x.chunks_mut(128) {
        let (mut halves, mut floats) = ([half::f16::ZERO; 64], [0.0f32; 64]);
        halves.iter_mut().zip(x.as_chunks::<2>().0).for_each(|(h, &b)| *h = half::f16::from_le_bytes(b));
        halves.convert_to_f32_slice(&mut floats);
        for (b, x) in x.as_chunks_mut::<2>().0.iter_mut().zip(floats) {
            *b = ((x * inverse + ROUNDS).to_bits() as i16).to_le_bytes();
        }
    }
    exponent as u8
}

/// The f16 elements again.
fn unfix(x: &mut [u8], exponent: u8) {
    let unit = unit(exponent);
    for b in x.as_chunks_mut::<2>().0 {
        *b = half::f16::from_f32(f32::from(i16::from_le_bytes(*b)) * unit).to_le_bytes();
    }
}

fn unit(exponent: u8) -> f32 {
    f32::from_bits(u32::from(exponent) << 23)
}

impl Fixed {
    /// Whether a cache can be kept so: with whole vectors in a head.
    pub fn suits(kind: CacheType, head_dim: usize) -> bool {
        kind == CacheType::F16 && head_dim.is_multiple_of(GRANULE)
    }

    /// `n` layers of `rows` rows, a multiple of `rows_per_block`.
    pub fn layers(
        n: usize,
        (rows, rows_per_block): (usize, usize),
        (heads, dim): (usize, usize),
    ) -> Result<Vec<Fixed>> {
        assert!(Fixed::suits(CacheType::F16, dim) && rows.is_multiple_of(rows_per_block));
        let lanes = lanes(rows_per_block);
        let mut data = Arena::divided("the KV cache", 2 * n, rows, heads * dim * 2)?.into_iter();
        let exponents = Arena::divided("the KV cache", n, rows, 2 * heads)?;
        let layer =
            |exponents| Some(Fixed { rows, heads, dim, lanes, keys: data.next()?, values: data.next()?, exponents });
        Ok(exponents.into_iter().filter_map(layer).collect())
    }

    /// Of keys and values alone.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    pub fn exponent_bytes(&self) -> usize {
        self.exponents.bytes()
    }

    fn data(&self, is_value: bool) -> &Shared<u8> {
        if is_value { &self.values } else { &self.keys }
    }

    /// Where the granule of a key begins, and the granule of a value: both are as long.
    fn granule(&self, row: usize, head: usize) -> usize {
        (head * self.rows + row - row % self.lanes) * self.dim * 2
    }

    /// Where a row's exponent lies.
    fn exponent(&self, is_value: bool, row: usize, head: usize) -> usize {
        assert!(row < self.rows && head < self.heads);
        (usize::from(is_value) * self.heads + head) * self.rows + row
    }

    /// Where the first integer of a row lies, and how many bytes on the next ones do: two of keys and one of values.
    fn place(&self, is_value: bool, row: usize, head: usize) -> (usize, usize) {
        let lane = row % self.lanes;
        let (within, on) = match (is_value, self.lanes) {
            (false, lanes) => (lane * PAIR, lanes * PAIR),
            (true, 1) => (0, 2),
            (true, _) => value_in_granule(lane, self.dim),
        };
        (self.granule(row, head) + within, on)
    }

    /// Draws into the cache what attention of keys from this row on begins with.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    pub unsafe fn draw_first<S: Simd>(&self, row: usize, head: usize) {
        // SAFETY: the caller's.
        unsafe {
            self.draw_units::<S>(false, row, head);
            let keys = self.address(false, row, head);
            (0..CHUNK * 2 * self.dim).step_by(LINE).for_each(|at| S::prefetch_l2(keys.wrapping_add(at)));
        }
    }

    /// The address of a row's granule of keys or of values: to prefetch.
    #[inline(always)]
    pub fn address(&self, is_value: bool, row: usize, head: usize) -> *const u8 {
        self.data(is_value).as_ptr().cast_const().wrapping_add(self.granule(row, head))
    }

    /// Draws the exponents of rows from this one on into the cache, a line of them: they are so few that no prefetcher of the CPU sees
    /// them coming.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    pub unsafe fn draw_units<S: Simd>(&self, is_value: bool, row: usize, head: usize) {
        let exponents = self.exponents.as_ptr().cast_const().wrapping_add(self.exponent(is_value, row, head));
        // SAFETY: the caller's.
        unsafe { S::prefetch(exponents) }
    }

    /// Whole heads of keys or of values, from element `first` of the row on; `scratch` has room for one.
    ///
    /// # Safety
    /// Nobody else touches them meanwhile.
    pub unsafe fn write(&self, is_value: bool, row: usize, first: usize, x: &[f32], scratch: &mut [u8]) {
        let encoded = &mut scratch[..2 * self.dim];
        for (i, x) in x.chunks_exact(self.dim).enumerate() {
            CacheType::F16.encode(x, encoded);
            // SAFETY: the caller's.
            unsafe { self.put(is_value, row, first / self.dim + i, encoded) };
        }
    }

    /// A head's key or value, given as f16 in `x`, which is lost.
    ///
    /// # Safety
    /// Nobody else touches it meanwhile.
    unsafe fn put(&self, is_value: bool, row: usize, head: usize, x: &mut [u8]) {
        let (at, on) = self.place(is_value, row, head);
        let (data, exponent) = (self.data(is_value), self.exponent(is_value, row, head));
        assert!(x.len() == 2 * self.dim && self.granule(row, head) + self.lanes * x.len() <= data.len());
        // SAFETY: this row's bytes only, within its granule, which is in bounds, as its exponent is.
        unsafe {
            self.exponents.slice_mut(exponent, 1)[0] = fix(x);
            let to = data.as_ptr().add(at);
            if is_value { scatter::<2>(x, to, on / 2) } else { scatter::<4>(x, to, on / PAIR) }
        }
    }

    /// A row's f16 elements, heads one after another.
    ///
    /// # Safety
    /// Nobody writes the row meanwhile.
    pub unsafe fn encoded(&self, row: usize, k: &mut [u8], v: &mut [u8]) {
        for (is_value, x) in [(false, k), (true, v)] {
            let (data, size) = (self.data(is_value), if is_value { 2 } else { PAIR });
            for (head, x) in x.chunks_exact_mut(2 * self.dim).enumerate() {
                let (at, on) = self.place(is_value, row, head);
                for (i, out) in x.chunks_exact_mut(size).enumerate() {
                    // SAFETY: the caller's; the slice checks the bounds.
                    out.copy_from_slice(unsafe { data.slice(at + i * on, size) });
                }
                // SAFETY: likewise.
                unfix(x, unsafe { self.exponents.slice(self.exponent(is_value, row, head), 1) }[0]);
            }
        }
    }

    /// The same the other way; `scratch` has room for a head.
    pub fn set_encoded(&mut self, row: usize, k: &[u8], v: &[u8], scratch: &mut [u8]) {
        let scratch = &mut scratch[..2 * self.dim];
        for (is_value, x) in [(false, k), (true, v)] {
            for (head, x) in x.chunks_exact(2 * self.dim).enumerate() {
                scratch.copy_from_slice(x);
                // SAFETY: `&mut self` is the only access.
                unsafe { self.put(is_value, row, head, scratch) };
            }
        }
    }

    /// Fills all of it with what is no key and no value.
    #[cfg(test)]
    pub fn spoil(&mut self) {
        let all = [&mut self.keys, &mut self.values, &mut self.exponents];
        all.into_iter().for_each(|data| data.as_mut().fill(0xff));
    }

    pub fn copy_within(&mut self, src: usize, dst: usize, rows: usize) {
        for (is_value, head) in (0..self.heads).flat_map(|head| [(false, head), (true, head)]) {
            let size = if is_value { 2 } else { PAIR };
            for i in 0..rows {
                let ((from, on), (to, _)) = (self.place(is_value, src + i, head), self.place(is_value, dst + i, head));
                let data = if is_value { self.values.as_mut() } else { self.keys.as_mut() };
                for e in 0..2 * self.dim / size {
                    data.copy_within(from + e * on..from + e * on + size, to + e * on);
                }
            }
            let (from, to) = (self.exponent(is_value, src, head), self.exponent(is_value, dst, head));
            self.exponents.as_mut().copy_within(from..from + rows, to);
        }
    }

    /// Where the granules of up to [`CHUNK`] rows begin.
    ///
    /// # Safety
    /// Nobody writes the rows meanwhile.
    #[inline(always)]
    unsafe fn chunk(
        &self,
        is_value: bool,
        head: usize,
        rows: usize,
        row: impl Fn(usize) -> usize,
        gathered: &mut [u8],
    ) -> Chunk {
        assert!(rows <= CHUNK);
        let data = self.data(is_value);
        let mut chunk = [data.as_ptr().cast_const(); CHUNK / GRANULE];
        if self.lanes < GRANULE {
            for i in (0..rows).step_by(self.lanes) {
                // SAFETY: the caller's.
                unsafe { self.gather(is_value, row(i), head, i, gathered) };
            }
            for (i, granule) in chunk.iter_mut().enumerate() {
                *granule = gathered[i * GRANULE * 2 * self.dim..][..GRANULE * 2 * self.dim].as_ptr();
            }
            return chunk;
        }
        for (i, granule) in chunk.iter_mut().take(rows.div_ceil(GRANULE)).enumerate() {
            // SAFETY: the caller's; the slice checks the bounds.
            *granule = unsafe { data.slice(self.granule(row(GRANULE * i), head), GRANULE * 2 * self.dim) }.as_ptr();
        }
        chunk
    }

    /// The units of keys or values, 0 for those beyond `rows`.
    ///
    /// # Safety
    /// Nobody writes the rows meanwhile.
    #[inline(always)]
    unsafe fn units(&self, is_value: bool, head: usize, rows: usize, row: impl Fn(usize) -> usize, units: &mut [f32]) {
        for i in (0..rows).step_by(self.lanes) {
            let first = row(i);
            let first = self.exponent(is_value, first - first % self.lanes, head);
            // SAFETY: the caller's; the slice checks the bounds.
            let exponents = unsafe { self.exponents.slice(first, self.lanes) };
            units[i..].iter_mut().zip(exponents).for_each(|(u, &e)| *u = unit(e));
        }
        units[rows..].fill(0.0);
    }

    /// Takes the units of a run's values: for [`Weights`].
    ///
    /// # Safety
    /// Nobody writes the rows meanwhile.
    #[inline(always)]
    pub unsafe fn take_units(&self, head: usize, rows: usize, row: impl Fn(usize) -> usize, integers: &mut Integers) {
        // SAFETY: the caller's.
        unsafe { self.units(true, head, rows, row, &mut integers.of_values) }
    }

    /// Copies a narrow granule to where rows `i` and on of a chunk of wide ones lie.
    ///
    /// # Safety
    /// Nobody writes the granule meanwhile.
    #[inline(never)] // it would crowd the loops of whole granules
    unsafe fn gather(&self, is_value: bool, row: usize, head: usize, i: usize, gathered: &mut [u8]) {
        let (lanes, wide) = (self.lanes, GRANULE * 2 * self.dim);
        // SAFETY: the caller's; the slice checks the bounds.
        let from = unsafe { self.data(is_value).slice(self.granule(row, head), lanes * 2 * self.dim) };
        let (to, lane) = (&mut gathered[i / GRANULE * wide..][..wide], i % GRANULE);
        match (is_value, lanes) {
            (false, _) => widen::<PAIR>(from, lanes, lane, to),
            (true, 1) => {
                let (within, on) = value_in_granule(lane, self.dim);
                // SAFETY: a lane of the granule that begins there.
                unsafe { scatter::<2>(from, to.as_mut_ptr().add(within), on / 2) };
            }
            (true, _) => to[lane / 2 * self.dim * PAIR..][..from.len()].copy_from_slice(from),
        }
    }
}

/// Where the first integer of a value lies within its granule, and how many bytes on the next ones do.
fn value_in_granule(lane: usize, dim: usize) -> (usize, usize) {
    (lane / 2 * dim * PAIR + lane % 2 * 2, PAIR)
}

/// The granules of a chunk of keys or values.
type Chunk = [*const u8; CHUNK / GRANULE];

/// Queries and weights of a thread as integers.
pub struct Integers {
    queries: Vec<i32>,    // (head_dim / 16, query, 8) of pairs
    units: Vec<f32>,      // (query): of the queries
    of_values: Vec<f32>,  // (RUN): the units of a run's values
    of_weights: Vec<f32>, // (query): the units of the weights
    gathered: Vec<u8>,    // (CHUNK / 16) granules of narrow ones
}

impl Integers {
    pub fn new(queries: usize, head_dim: usize) -> Integers {
        Integers {
            queries: vec![0; queries * head_dim / 2],
            units: vec![0.0; queries],
            of_values: vec![0.0; RUN],
            of_weights: vec![0.0; queries],
            gathered: vec![0; CHUNK * 2 * head_dim],
        }
    }

    pub fn bytes(&self) -> usize {
        let floats = self.units.len() + self.of_values.len() + self.of_weights.len();
        4 * (self.queries.len() + floats) + self.gathered.len()
    }

    /// A query's weights begin.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    pub unsafe fn weights<S: Simd>(&self) -> Weights<S> {
        // SAFETY: the caller's.
        let zero = unsafe { S::splat(0.0) };
        Weights { of_values: self.of_values.as_ptr(), total: zero, largest: zero }
    }

    /// What a query's weights are worth; 0 for one that sees nothing of a run.
    pub fn set_weights(&mut self, query: usize, unit: f32) {
        self.of_weights[query] = unit;
    }

    /// Takes `n` queries, `[head_dim / 16][query][16]`. Their integers are so large that no sum of products with a key's exceeds 31 bits:
    /// by Cauchy and Schwarz, a part of it is at most the product of the lengths of both.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    pub unsafe fn take<S: Simd>(&mut self, queries: &[f32], n: usize) {
        let dim = queries.len() / n;
        assert!(queries.len() == n * dim && dim.is_multiple_of(GRANULE));
        assert!(n <= self.units.len() && queries.len() <= 2 * self.queries.len());
        // A hundredth less: for roundings, of half an integer to an element.
        let longest = 0.99 * (1u32 << (31 - DIGITS)) as f32 / (dim as f32).sqrt();
        let on = n * GRANULE;
        for (q, unit) in self.units.iter_mut().enumerate().take(n) {
            // SAFETY: the caller's; whole vectors of a group of 16, which LANES divides; as many integers as queries have elements.
            unsafe {
                let first = queries.as_ptr().add(q * GRANULE);
                let (mut from, mut squares) = (first, S::splat(0.0));
                for _ in 0..dim / GRANULE {
                    for lane in (0..GRANULE).step_by(S::LANES) {
                        let x = S::load(from.add(lane));
                        squares = S::fma(x, x, squares);
                    }
                    from = from.wrapping_add(on); // at last beyond the end
                }
                *unit = S::reduce_add(squares).sqrt() / longest;
                let factor = S::splat(reciprocal(*unit));
                let (mut from, mut to) = (first, self.queries.as_mut_ptr().cast::<i16>().add(q * GRANULE));
                for _ in 0..dim / GRANULE {
                    for lane in (0..GRANULE).step_by(S::LANES) {
                        S::store_i16(to.add(lane), S::to_i(S::mul(S::load(from.add(lane)), factor)));
                    }
                    (from, to) = (from.wrapping_add(on), to.wrapping_add(on));
                }
            }
        }
    }
}

/// A query's weights of a run on their way to integers: each times its value's unit, their unit such that their sum is below 2^17, what
/// products with values of 14 digits allow, and none is beyond 16 bits. So none is off by more than 2^-18 of their sum or, if that is
/// more, 2^-16 of the largest.
pub struct Weights<S: Simd> {
    /// `[RUN]`
    of_values: *const f32,
    total: S::F,
    largest: S::F,
}

impl<S: Simd> Weights<S> {
    /// Weights from index `i` on, times their values' units.
    ///
    /// # Safety
    /// The CPU has `S`; a vector of units lies at `i`.
    #[inline(always)]
    pub unsafe fn scale(&mut self, i: usize, weights: S::F) -> S::F {
        // SAFETY: the caller's.
        unsafe {
            let x = S::mul(weights, S::load(self.of_values.add(i)));
            self.total = S::add(self.total, x);
            self.largest = S::max(self.largest, x);
            x
        }
    }

    /// Leaves integers, two to an element, in the first half of the `scaled` weights; tells their unit.
    ///
    /// # Safety
    /// The CPU has `S`; `scaled` are whole vectors.
    #[inline(always)]
    pub unsafe fn round(self, scaled: &mut [f32]) -> f32 {
        // A hundredth less: for roundings, of half an integer to a weight.
        const MOST: f32 = 0.99 * (1u32 << (31 - DIGITS)) as f32;
        // SAFETY: whole vectors; each is read before its integers, which lie no farther on, are written.
        unsafe {
            let total = S::reduce_add(self.total);
            let mut unit = total;
            if total.is_finite() {
                unit = (total / MOST).max(S::reduce_max(self.largest) / f32::from(i16::MAX));
            }
            let inverse = S::splat(reciprocal(unit));
            let p = scaled.as_mut_ptr();
            for i in (0..scaled.len()).step_by(S::LANES) {
                S::store_i16(p.cast::<i16>().add(i), S::to_i(S::mul(S::load(p.add(i)), inverse)));
            }
            unit
        }
    }
}

/// 0 for what has none that is finite: a unit of 0, or one that is no number, which then makes its product none.
fn reciprocal(x: f32) -> f32 {
    if x > 1e-30 && x < f32::INFINITY { 1.0 / x } else { 0.0 }
}

/// Sums of products of pairs, M rows of A by V vectors of B.
struct Sums<S: Simd, const M: usize, const V: usize>([[S::I; V]; M]);

impl<S: Simd, const M: usize, const V: usize> Sums<S, M, V> {
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's.
        Sums([[unsafe { S::splat_i(0) }; V]; M])
    }

    /// Adds the products of [`STEPS`] pairs: A's rows are `ROW` pairs apart, B's vectors begin at `b`, its rows are `on` bytes apart.
    ///
    /// # Safety
    /// The CPU has `S`; the matrices lie behind the pointers.
    #[inline(always)]
    unsafe fn add<const ROW: usize>(
        mut self,
        mut a: *const i32,
        (mut b, on): ([*const u8; V], usize),
        ahead: &mut Ahead,
    ) -> Self {
        for _ in 0..STEPS {
            // SAFETY: the caller's.
            unsafe {
                ahead.draw::<S>();
                let mut right = [S::load_b(b[0]); V];
                for v in 0..V {
                    right[v] = S::load_b(b[v]);
                    b[v] = b[v].wrapping_add(on); // at last beyond the end
                }
                for m in 0..M {
                    let left = *a.add(m * ROW);
                    for v in 0..V {
                        self.0[m][v] = S::dot_pairs(self.0[m][v], right[v], left);
                    }
                }
            }
            a = a.wrapping_add(1);
        }
        self
    }
}

/// Memory to draw into the cache during a product: evenly, for in bursts the memory's queue is full and then idle; and in the order in
/// which it will be read, for what is drawn last is not there yet when the next product begins.
struct Ahead {
    place: *const u8,
    /// Streams that are read side by side, as a power of two, and the bytes from one to the next.
    streams: u32,
    apart: usize,
    /// Bytes to draw at each step.
    on: usize,
    /// Bytes that should be drawn by now, and lines that are.
    due: usize,
    lines: usize,
}

impl Ahead {
    const NOTHING: Ahead = Ahead { place: std::ptr::null(), streams: 0, apart: 0, on: 0, due: 0, lines: 0 };

    /// As many bytes as V vectors take at each step, spread over all the blocks of rows that take them.
    fn new<S: Simd>(place: *const u8, vectors: usize, blocks: usize) -> Ahead {
        Ahead { place, on: PAIR * S::LANES * vectors / blocks, ..Ahead::NOTHING }
    }

    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    unsafe fn draw<S: Simd>(&mut self) {
        self.due = self.due.wrapping_add(self.on);
        while self.lines * LINE < self.due {
            let stream = self.lines & ((1 << self.streams) - 1);
            let line = (self.lines >> self.streams) * LINE;
            // SAFETY: the caller's.
            unsafe { S::prefetch_l2(self.place.wrapping_add(stream * self.apart).wrapping_add(line)) };
            self.lines += 1;
        }
    }
}

/// Calls `$f::<S, M, V>` for the constants that are these numbers.
macro_rules! constants {
    ($m:expr, $v:expr, $f:ident($($x:expr),*)) => {
        constants!(@m $m, $v, $f, ($($x),*), 1 2 3 4 5 6)
    };
    (@m $m:expr, $v:expr, $f:ident, $x:tt, $($n:literal)*) => {
        match $m {
            $($n => constants!(@v $v, $f, $n, $x),)*
            _ => unreachable!("more rows than a block has"),
        }
    };
    (@v $v:expr, $f:ident, $n:literal, ($($x:expr),*)) => {
        match $v {
            4 => $f::<S, $n, 4>($($x),*),
            3 => $f::<S, $n, 3>($($x),*),
            2 => $f::<S, $n, 2>($($x),*),
            _ => $f::<S, $n, 1>($($x),*),
        }
    };
}

/// Blocks of like sizes that a product is cut into, whose sums fit into registers beside a vector for each of B's, an element of A and a
/// product: all rows of some columns, then of the next ones.
struct Blocks {
    rows: usize,
    columns: usize,
    lanes: usize,
    at_once: usize,
    row: usize,
    column: usize,
}

/// One of them: (row, rows, column, vectors).
type Block = (usize, usize, usize, usize);

impl Blocks {
    #[inline(always)]
    fn new<S: Simd>(rows: usize, columns: usize) -> Blocks {
        let at_once = ((S::REGISTERS - 2) / (rows.div_ceil(rows.div_ceil(ROWS)) + 1)).clamp(1, 4);
        Blocks { rows, columns, lanes: S::LANES, at_once, row: 0, column: 0 }
    }

    /// Of the same columns.
    fn of_rows(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    #[inline(always)]
    fn next(&mut self) -> Option<Block> {
        if self.column >= self.columns {
            return None;
        }
        let left = self.rows - self.row;
        let rows = left.div_ceil(left.div_ceil(ROWS));
        let left = (self.columns - self.column) / self.lanes;
        let vectors = left.div_ceil(left.div_ceil(self.at_once));
        let block = (self.row, rows, self.column, vectors);
        self.row += rows;
        if self.row == self.rows {
            self.row = 0;
            self.column += vectors * self.lanes;
        }
        Some(block)
    }
}

/// A block of a product.
struct Product<'a> {
    granules: &'a [*const u8],
    dim: usize,
    row: usize,
    column: usize,
    /// Where A is, in pairs, and how many of them on the next [`STEPS`] columns are.
    a: *const i32,
    on: usize,
    /// Units of A's rows, and of the keys.
    units: &'a [f32],
    of_keys: &'a [f32],
    to: *mut f32,
}

/// Scores of up to [`CHUNK`] keys for `n` queries: into `scores`, `[query][RUN]`, whole granules of them. `row` tells where the chunk's keys lie;
/// `next`, where the next chunk begins, is drawn into the cache meanwhile.
///
/// # Safety
/// The CPU has `S`; nobody writes the keys meanwhile; `scores` has room.
#[inline(always)]
pub unsafe fn scores<S: Simd>(
    cache: &Fixed,
    head: usize,
    (n, count): (usize, usize),
    row: impl Fn(usize) -> usize,
    integers: &mut Integers,
    scores: *mut f32,
    next: Option<*const u8>,
) {
    let (dim, mut of_keys) = (cache.dim, [0.0; CHUNK]);
    // SAFETY: the caller's.
    let granules = &unsafe {
        cache.units(false, head, count, &row, &mut of_keys);
        cache.chunk(false, head, count, &row, &mut integers.gathered)
    };
    let (a, units, of_keys) = (integers.queries[..n * dim / 2].as_ptr(), &integers.units[..n], &of_keys);
    let mut ahead = Ahead::NOTHING;
    let mut blocks = Blocks::new::<S>(n, count.next_multiple_of(GRANULE));
    while let Some((row, m, column, vectors)) = blocks.next() {
        if let (0, Some(next)) = (row, next) {
            ahead = Ahead::new::<S>(next.wrapping_add(2 * column * dim), vectors, blocks.of_rows());
            let granules = vectors * S::LANES / GRANULE;
            if granules.is_power_of_two() && vectors * S::LANES == granules * GRANULE {
                (ahead.streams, ahead.apart) = (granules.trailing_zeros(), 2 * GRANULE * dim);
            }
        }
        let p = Product { granules, dim, row, column, a, on: n * STEPS, units, of_keys, to: scores };
        // SAFETY: blocks stay within rows and columns.
        unsafe { constants!(m, vectors, score_block(&p, &mut ahead)) }
    }
}

/// # Safety
/// As for [`scores`].
#[inline(always)]
unsafe fn score_block<S: Simd, const M: usize, const V: usize>(p: &Product, ahead: &mut Ahead) {
    if M * V + V + 2 > S::REGISTERS {
        return; // never asked for
    }
    // SAFETY: the caller's: the block lies in all matrices.
    unsafe {
        let mut a = p.a.add(p.row * STEPS);
        let mut b: [*const u8; V] = std::array::from_fn(|v| {
            let column = p.column + v * S::LANES;
            p.granules[column / GRANULE].add(column % GRANULE * PAIR)
        });
        let mut sums = Sums::<S, M, V>::zero();
        for _ in 0..p.dim / GRANULE {
            sums = sums.add::<STEPS>(a, (b, GRANULE * PAIR), ahead);
            a = a.wrapping_add(p.on);
            b = b.map(|b| b.wrapping_add(STEPS * GRANULE * PAIR)); // at last beyond the end
        }
        for v in 0..V {
            let column = p.column + v * S::LANES;
            let of_keys = S::load(p.of_keys.as_ptr().add(column));
            for m in 0..M {
                let unit = S::mul(of_keys, S::splat(*p.units.as_ptr().add(p.row + m)));
                S::store(p.to.add((p.row + m) * RUN + column), S::mul(S::to_f(sums.0[m][v]), unit));
            }
        }
    }
}

/// Adds up to [`CHUNK`] values, times their `weights`, `[query][RUN]` of pairs as [`Weights::round`] has left them, to `acc`,
/// `[query][head_dim]`. The rest as for [`scores`].
///
/// # Safety
/// The CPU has `S`; nobody writes the values meanwhile; the matrices lie behind the pointers, weights in whole granules.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn add_values<S: Simd>(
    cache: &Fixed,
    head: usize,
    (n, count): (usize, usize),
    row: impl Fn(usize) -> usize,
    integers: &mut Integers,
    weights: *const i32,
    acc: *mut f32,
    next: Option<*const u8>,
) {
    // SAFETY: the caller's.
    let granules = &unsafe { cache.chunk(true, head, count, row, &mut integers.gathered) };
    let granules = &granules[..count.div_ceil(GRANULE)];
    let (dim, units) = (cache.dim, &integers.of_weights[..n]);
    let mut ahead = Ahead::NOTHING;
    let mut blocks = Blocks::new::<S>(n, dim);
    while let Some((row, m, column, vectors)) = blocks.next() {
        if let (0, Some(next)) = (row, next) {
            ahead = Ahead::new::<S>(next.wrapping_add(2 * column * count), vectors, blocks.of_rows());
        }
        let p = Product { granules, dim, row, column, a: weights, on: STEPS, units, of_keys: &[], to: acc };
        // SAFETY: blocks stay within rows and columns.
        unsafe { constants!(m, vectors, value_block(&p, &mut ahead)) }
    }
}

/// # Safety
/// As for [`add_values`].
#[inline(always)]
unsafe fn value_block<S: Simd, const M: usize, const V: usize>(p: &Product, ahead: &mut Ahead) {
    if M * V + V + 2 > S::REGISTERS {
        return; // never asked for
    }
    // SAFETY: the caller's: the block lies in all matrices.
    unsafe {
        let mut sums = Sums::<S, M, V>::zero();
        let mut a = p.a.add(p.row * RUN);
        for granule in p.granules {
            let b = std::array::from_fn(|v| granule.add((p.column + v * S::LANES) * PAIR));
            sums = sums.add::<RUN>(a, (b, p.dim * PAIR), ahead);
            a = a.wrapping_add(p.on);
        }
        for m in 0..M {
            let unit = S::splat(*p.units.as_ptr().add(p.row + m));
            for v in 0..V {
                let to = p.to.add((p.row + m) * p.dim + p.column + v * S::LANES);
                S::store(to, S::fma(S::to_f(sums.0[m][v]), unit, S::load(to)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd::plain::Plain;
    use half::f16;

    fn fixed(x: &[f16]) -> (Vec<i16>, u8) {
        let mut bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        let exponent = fix(&mut bytes);
        (bytes.as_chunks::<2>().0.iter().map(|&b| i16::from_le_bytes(b)).collect(), exponent)
    }

    fn again(x: &[i16], exponent: u8) -> Vec<f16> {
        let mut bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        unfix(&mut bytes, exponent);
        bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b)).collect()
    }

    /// Each f16 beside each power of two: what is not 2^3 and more below the largest is kept to the bit, the rest to half a unit;
    /// and what is kept comes back as the same integers.
    #[test]
    fn integers_are_f16_numbers() {
        for largest in
            (0..16).map(|e| f16::from_f32(1.3 * 2f32.powi(e))).chain((0..30).map(|e| f16::from_bits(e * 1000)))
        {
            for chunk in (0..=f16::MAX.to_bits()).collect::<Vec<_>>().chunks(63) {
                let of = |&bits: &u16| f16::from_bits(if bits % 2 == 0 { bits } else { bits | 0x8000 });
                let x: Vec<f16> =
                    chunk.iter().map(of).filter(|x| x.to_f32().abs() <= largest.to_f32()).chain([largest]).collect();
                let (integers, exponent) = fixed(&x);
                let size = integers.iter().map(|x| x.unsigned_abs()).max().unwrap();
                assert!(
                    size < 1 << DIGITS && (size >= 1 << (DIGITS - 1) || largest == f16::ZERO),
                    "{size} for {largest}"
                );
                let kept = again(&integers, exponent);
                for (x, kept) in x.iter().zip(&kept) {
                    let off = (x.to_f32() - kept.to_f32()).abs();
                    assert!(off <= unit(exponent) / 2.0, "{x} beside {largest} is {kept}");
                    assert!(off == 0.0 || x.to_f32().abs() * 8.0 < largest.to_f32(), "{x} beside {largest} is {kept}");
                }
                assert_eq!(fixed(&kept), (integers, exponent), "beside {largest}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for x in [f16::INFINITY, f16::NEG_INFINITY, f16::NAN] {
            let (integers, exponent) = fixed(&[f16::ONE, x, f16::ZERO]);
            assert_eq!((integers.as_slice(), exponent), (&[0; 3][..], NOT_FINITE));
            assert!(again(&integers, exponent).iter().all(|x| x.is_nan()));
        }
    }

    /// Rows leave as they came, lie where no other does, and are copied within, also an odd number of them.
    #[test]
    fn rows_are_kept() {
        for rows_per_block in [16, 8, 6, 3] {
            rows_of_blocks(rows_per_block);
        }
    }

    fn rows_of_blocks(rows_per_block: usize) {
        let (rows, heads, dim) = (48, 3, 32);
        let mut cache = Fixed::layers(2, (rows, rows_per_block), (heads, dim)).unwrap().remove(1);
        // Elements of 2^-3 to 1, exact.
        let row = |i: usize| -> Vec<u8> {
            let element = |e: usize| {
                f16::from_f32((1.0 - 2.0 * (e % 2) as f32) * ((i * 37 + e * 11) % 897 + 128) as f32 / 1024.0)
            };
            (0..heads * dim).flat_map(|e| element(e).to_le_bytes()).collect()
        };
        let mut scratch = vec![0; 2 * dim];
        (0..rows).for_each(|i| cache.set_encoded(i, &row(2 * i), &row(2 * i + 1), &mut scratch));
        cache.copy_within(2, 33, 5);
        let from = |i: usize| if (33..38).contains(&i) { i - 31 } else { i };
        let (mut k, mut v) = (vec![0; 2 * heads * dim], vec![0; 2 * heads * dim]);
        for i in 0..rows {
            // SAFETY: one thread.
            unsafe { cache.encoded(i, &mut k, &mut v) };
            assert!(k == row(2 * from(i)) && v == row(2 * from(i) + 1), "row {i}");
        }
        // A head alone, as a session writes it.
        let (key, value) = ([0.5; 32], [-0.25; 32]);
        // SAFETY: one thread.
        unsafe {
            cache.write(false, 7, dim, &key, &mut scratch);
            cache.write(true, 7, dim, &value, &mut scratch);
            cache.encoded(7, &mut k, &mut v);
        }
        for (found, before, now) in [(&k, row(14), 0.5), (&v, row(15), -0.25)] {
            let now = [f16::from_f32(now); 32].map(f16::to_le_bytes).concat();
            assert!(
                found[..2 * dim] == before[..2 * dim]
                    && found[2 * dim..4 * dim] == now
                    && found[4 * dim..] == before[4 * dim..]
            );
        }
    }

    /// The longest queries and keys there are, one along the other: sums still fit.
    #[test]
    fn sums_fit() {
        for dim in [16, 64, 256] {
            let mut integers = Integers::new(1, dim);
            let queries = vec![-3.7e3; dim];
            let mut take = |queries: &[f32]| {
                // SAFETY: Plain runs everywhere.
                unsafe { integers.take::<Plain>(queries, 1) };
                (integers.queries.clone(), integers.units[0])
            };
            let (pairs, unit) = take(&queries);
            let (key, _) = fixed(&vec![f16::from_f32(1.999); dim]);
            let sum: i64 = pairs
                .iter()
                .flat_map(|&pair| [pair as i16, (pair >> 16) as i16])
                .zip(&key)
                .map(|(q, &k)| i64::from(q) * i64::from(k))
                .sum();
            assert!((-(1 << 31)..-(1 << 30)).contains(&sum), "{sum} of {dim}");
            let back = f64::from(unit) * pairs.iter().map(|&pair| f64::from(pair as i16)).sum::<f64>();
            assert!((back / (-3.7e3 * dim as f64 / 2.0) - 1.0).abs() < 1e-3, "{back}");
            let (pairs, unit) = take(&vec![0.0; dim]);
            assert!(pairs.iter().all(|&pair| pair == 0) && unit == 0.0);
            assert!(take(&vec![f32::INFINITY; dim]).1.is_infinite());
        }
    }

    /// Weights of a run: none beyond 16 bits, no sum of products with values beyond 31, each as near as is said; what is no number stays
    /// none.
    #[test]
    fn weights_fit() {
        use crate::backend::cpu::simd::Tiled;
        let mut integers = Integers::new(1, 16);
        let mut round = |weights: &mut [f32; RUN], of_values: f32| {
            integers.of_values.fill(of_values);
            // SAFETY: Plain runs everywhere; all are RUN long, 16 is whole vectors.
            unsafe {
                let mut w = integers.weights::<Plain>();
                for i in (0..RUN).step_by(Plain::LANES) {
                    let scaled = w.scale(i, Plain::load(weights.as_ptr().add(i)));
                    Plain::store(weights.as_mut_ptr().add(i), scaled);
                }
                w.round(weights)
            }
        };
        for spread in [0.0, 1e-3, 0.05, 0.4, 3.0, 80.0] {
            let weights: [f32; RUN] = std::array::from_fn(|i| (-spread * (i * 37 % RUN) as f32).exp2());
            let mut scaled = weights;
            let unit = round(&mut scaled, 0.125);
            let found: Vec<i16> =
                scaled[..RUN / 2].iter().flat_map(|x| [x.to_bits() as i16, (x.to_bits() >> 16) as i16]).collect();
            let sum: i64 = found.iter().map(|&w| i64::from(w)).sum();
            assert!(found.iter().all(|&w| w >= 0) && sum << DIGITS < 1 << 31, "{sum} of {spread}");
            let total: f32 = weights.iter().sum();
            let bound = 1.02 * (total / (1 << 18) as f32).max(1.0 / (1 << 16) as f32);
            for (w, found) in weights.iter().zip(found) {
                assert!((w - f32::from(found) * unit * 8.0).abs() <= bound, "{found} is {w} of {spread}");
            }
        }
        assert_eq!(round(&mut [0.0; RUN], 1.0), 0.0);
        assert!(round(&mut [0.0; RUN], f32::INFINITY).is_nan());
        assert!(!round(&mut [1.0; RUN], f32::INFINITY).is_finite());
    }
}
