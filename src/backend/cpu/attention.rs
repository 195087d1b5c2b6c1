//! Attention of a tile of query rows over one read of the cache: keys and values are multiplied where they lie, as integers ([`fixed`])
//! or floats, or converted once for all of them; the softmax is carried along (Milakov and Gimelshein, arXiv 1805.02867).
//!
//! Keys are taken in fixed pieces: runs of 256 to a step of the softmax, splits of a length that depends on the query's own context alone
//! ([`split_len`]), the hidden window as a piece of its own. Splits are what threads share, and are merged in order. So a row's
//! result depends neither on the number of threads nor on the rows beside it, to the bit.

use super::arena::LINE;
use super::fixed::{self, Fixed};
use super::simd::Simd;
use super::store::{Element, GRANULE, Granules, Rows};

/// Keys or values taken at a time.
pub const CHUNK: usize = 64;

/// Keys to a step of the softmax.
pub const RUN: usize = 256;

/// Hidden keys that a query alone takes as they lie, at most.
const FEW: usize = 16;

fn sees_few(&(low, high): &(u32, u32)) -> bool {
    low < high && (high - low) as usize <= FEW
}

/// Most splits of a row's stored keys.
pub const MAX_SPLITS: usize = 32;

/// Stored keys to a split, for a row that sees `stored` of them.
pub fn split_len(stored: usize) -> usize {
    stored.div_ceil(MAX_SPLITS).next_power_of_two().max(RUN)
}

/// Dimensions of a head in scratch: a whole number of vectors of any instruction set.
pub fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(GRANULE)
}

/// Where keys and values lie.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// The stored rows of a sequence, `rows_per_block` to a cache block.
    Stored { k: &'a Granules, v: &'a Rows, blocks: &'a [u32], rows_per_block: usize },
    /// The same, as integers.
    Fixed { cache: &'a Fixed, blocks: &'a [u32], rows_per_block: usize },
    /// Hidden tokens by number: those from `first_fresh` on are the pass's own, from row `fresh_base` on; earlier ones are in the
    /// sequence's ring, which begins at row `ring_base`.
    Hidden {
        ring: (&'a Rows, &'a Rows),
        ring_base: usize,
        capacity: usize,
        fresh: (&'a Rows, &'a Rows),
        first_fresh: usize,
        fresh_base: usize,
        /// The first that anyone sees: those before may not be there.
        first: usize,
    },
}

/// What a thread needs to attend, for tiles of up to `queries` rows.
pub struct Scratch {
    converted: Vec<f32>, // (head_dim, CHUNK) of keys, then (CHUNK, padded) of values: those that are not multiplied where they lie
    scores: Vec<f32>,    // (query, RUN)
    row: Vec<f32>,       // (head_dim)
    gathered: Vec<u8>,   // 16 keys from narrow granules
    integers: fixed::Integers,
}

impl Scratch {
    pub fn new(queries: usize, head_dim: usize, gathered_bytes: usize) -> Scratch {
        Scratch {
            converted: vec![0.0; padded(head_dim) * CHUNK],
            scores: vec![0.0; queries * RUN],
            row: vec![0.0; head_dim],
            gathered: vec![0; gathered_bytes],
            integers: fixed::Integers::new(queries, head_dim),
        }
    }

    pub fn bytes(&self) -> usize {
        let floats = self.converted.len() + self.scores.len() + self.row.len();
        4 * floats + self.gathered.len() + self.integers.bytes()
    }
}

/// Softmax and sum of values of some queries over some keys, before the division by `sum`.
pub struct Attend<'a> {
    pub head_dim: usize,
    /// Which key/value head.
    pub head: usize,
    /// `[head_dim / 16, rounded up][query][16]`, scaled by log2(e) / sqrt(head_dim): the softmax is of powers of two.
    pub queries: &'a [f32],
    /// Keys each query may see, in the source's numbers: from, to.
    pub sight: &'a [(u32, u32)],
    pub source: Source<'a>,
    /// The keys to go over, of hidden ones all that any query sees; `from` is a multiple of 16.
    pub from: usize,
    pub to: usize,
    pub scratch: &'a mut Scratch,
    /// `[query]`: the largest score, and the sum of the powers relative to it.
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    /// `[query][padded]`
    pub acc: &'a mut [f32],
}

impl Attend<'_> {
    /// Where stored key `key` lies, if there is one to come: it is about to be drawn into the cache.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    unsafe fn key_place<S: Simd>(&self, key: usize) -> Option<*const u8> {
        match self.source {
            Source::Stored { k, blocks, rows_per_block, .. } if key < self.to => {
                Some(k.place(cache_row(blocks, rows_per_block, key), self.head * self.head_dim))
            }
            Source::Fixed { cache, blocks, rows_per_block } if key < self.to => {
                let row = cache_row(blocks, rows_per_block, key);
                // SAFETY: the caller's.
                unsafe { cache.draw_units::<S>(false, row, self.head) };
                Some(cache.address(false, row, self.head))
            }
            _ => None,
        }
    }

    /// The same of its value.
    #[inline(always)]
    fn value_place(&self, key: usize) -> Option<*const u8> {
        match self.source {
            Source::Stored { v, blocks, rows_per_block, .. } if key < self.to => {
                Some(v.place(cache_row(blocks, rows_per_block, key), self.head * self.head_dim))
            }
            Source::Fixed { cache, blocks, rows_per_block } if key < self.to => {
                Some(cache.address(true, cache_row(blocks, rows_per_block, key), self.head))
            }
            _ => None,
        }
    }
}

/// # Safety
/// The CPU has `S`, and nobody writes to the source meanwhile.
#[inline(always)]
pub unsafe fn attend<S: Simd>(a: &mut Attend) {
    let (dim, width) = (a.head_dim, padded(a.head_dim));
    let n = a.sight.len();
    assert!(a.queries.len() == n * width && a.acc.len() == n * width && a.max.len() == n && a.sum.len() == n);
    assert!(a.scratch.scores.len() >= n * RUN && a.scratch.converted.len() == width * CHUNK);
    a.max.fill(f32::NEG_INFINITY);
    a.sum.fill(0.0);
    a.acc.fill(0.0);
    if let Source::Fixed { cache, blocks, rows_per_block } = a.source {
        // SAFETY: the caller's.
        unsafe {
            cache.draw_first::<S>(cache_row(blocks, rows_per_block, a.from), a.head);
            a.scratch.integers.take::<S>(a.queries, n);
        }
    }
    // SAFETY: the caller's.
    let has_few = unsafe { attend_few::<S>(a) };
    let is_left = |s: &(u32, u32)| s.0 < s.1 && !(has_few && sees_few(s));
    let seen = a.sight.iter().filter(|s| is_left(s));
    let (low, high) = seen.fold((usize::MAX, 0), |(l, h), s| (l.min(s.0 as usize), h.max(s.1 as usize)));
    // Runs begin at multiples of 256 and vectors at multiples of 16, whatever is seen of them.
    let (mut from, to) = (a.from.max(low - low % GRANULE), a.to.min(high));
    while from < to {
        let end = (from - from % RUN + RUN).min(to);
        // SAFETY: the lengths were checked above; offsets below stay within them.
        unsafe {
            let scores = a.scratch.scores.as_mut_ptr();
            if let Source::Fixed { cache, blocks, rows_per_block } = a.source {
                // The softmax asks for all of a run's at once.
                let rows = (from..end).step_by(LINE).map(|at| cache_row(blocks, rows_per_block, at));
                rows.for_each(|row| cache.draw_units::<S>(true, row, a.head));
            }
            for at in (from..end).step_by(CHUNK) {
                let count = (end - at).min(CHUNK);
                let next = if at + count < end { a.key_place::<S>(at + count) } else { a.value_place(from) };
                if let Source::Fixed { cache, blocks, rows_per_block } = a.source {
                    let row = |i| cache_row(blocks, rows_per_block, at + i);
                    let to = scores.add(at - from);
                    fixed::scores::<S>(cache, a.head, (n, count), row, &mut a.scratch.integers, to, next);
                    continue;
                }
                let right = keys::<S>(a, at, count);
                let shape = (n, count.next_multiple_of(GRANULE), dim);
                let queries = Left { place: a.queries.as_ptr(), run: GRANULE, on: n * GRANULE };
                right.product::<S, GRANULE>(shape, queries, (scores.add(at - from), RUN), false, next);
            }
            let columns = (end - from).next_multiple_of(GRANULE);
            if let Source::Fixed { cache, blocks, rows_per_block } = a.source {
                let row = |i| cache_row(blocks, rows_per_block, from + i);
                cache.take_units(a.head, end - from, row, &mut a.scratch.integers);
            }
            for q in 0..n {
                let (low, high) = a.sight[q];
                let low = (low as usize).saturating_sub(from).min(columns);
                let high = (high as usize).saturating_sub(from).min(end - from);
                let row = std::slice::from_raw_parts_mut(scores.add(q * RUN), columns);
                if low >= high || !is_left(&a.sight[q]) {
                    row.fill(0.0);
                    a.scratch.integers.set_weights(q, 0.0);
                    continue;
                }
                row[..low].fill(f32::NEG_INFINITY);
                row[high..].fill(f32::NEG_INFINITY);
                let (max, sum, acc) = (&mut a.max[q], &mut a.sum[q], &mut a.acc[q * width..(q + 1) * width]);
                if let Source::Fixed { .. } = a.source {
                    let mut weights = a.scratch.integers.weights::<S>();
                    softmax_step::<S>(row, max, sum, acc, |i, e| weights.scale(i, e));
                    let unit = weights.round(row);
                    a.scratch.integers.set_weights(q, unit);
                } else {
                    softmax_step::<S>(row, max, sum, acc, |_, e| e);
                }
            }
            for at in (from..end).step_by(CHUNK) {
                let count = (end - at).min(CHUNK);
                let next = if at + count < end { a.value_place(at + count) } else { a.key_place::<S>(end) };
                if let Source::Fixed { cache, blocks, rows_per_block } = a.source {
                    let row = |i| cache_row(blocks, rows_per_block, at + i);
                    // Two weights are as large as a score was.
                    let weights = scores.add((at - from) / 2).cast_const().cast();
                    let (acc, integers) = (a.acc.as_mut_ptr(), &mut a.scratch.integers);
                    fixed::add_values::<S>(cache, a.head, (n, count), row, integers, weights, acc, next);
                    continue;
                }
                let right = values::<S>(a, at, count);
                let shape = (n, width, count);
                let weights = Left { place: scores.add(at - from), run: count, on: 0 };
                right.product::<S, RUN>(shape, weights, (a.acc.as_mut_ptr(), width), true, next);
            }
        }
        from = end;
    }
}

/// Attention of those queries that see up to [`FEW`] hidden keys, each for itself, with keys and values where they lie: a product would
/// mostly multiply what nobody sees. Whether a query is one of them depends on itself alone. `false` if the source is not of this kind, and nothing was done.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn attend_few<S: Simd>(a: &mut Attend) -> bool {
    let Source::Hidden { fresh, .. } = a.source else { return false };
    if !a.head_dim.is_multiple_of(GRANULE) {
        return false;
    }
    // SAFETY: the caller's; elements are what they are said to be.
    unsafe {
        match fresh.0.element() {
            Some(Element::F32) => few::<S, 4>(a, |p| S::load(p.cast())),
            Some(Element::F16) => few::<S, 2>(a, |p| S::load_f16(p.cast())),
            Some(Element::Bf16) => few::<S, 2>(a, |p| S::load_bf16(p.cast())),
            None => return false,
        }
    }
    true
}

/// The same with elements of `N` bytes, that `load` turns into f32.
#[inline(always)]
unsafe fn few<S: Simd, const N: usize>(a: &mut Attend, load: impl Fn(*const u8) -> S::F) {
    let (dim, n) = (a.head_dim, a.sight.len());
    for q in 0..n {
        if !sees_few(&a.sight[q]) {
            continue;
        }
        let (low, high) = (a.sight[q].0 as usize, a.sight[q].1 as usize);
        let mut weights = [f32::NEG_INFINITY; FEW];
        let mut values = [std::ptr::null(); FEW];
        // SAFETY: queries and sums are whole vectors of 16; of a row's head, the slices check the bounds.
        unsafe {
            for (number, (weight, value)) in (low..high).zip(weights.iter_mut().zip(&mut values)) {
                let ((k, v), row) = a.source.hidden_row(number).expect("what a query sees is there");
                let key = k.rows(row, 1, a.head * dim).as_ptr();
                *value = v.rows(row, 1, a.head * dim).as_ptr();
                let (mut query, mut key) = (a.queries.as_ptr().add(q * GRANULE), key);
                let mut sum = S::splat(0.0);
                for _ in 0..dim / GRANULE {
                    for lane in (0..GRANULE).step_by(S::LANES) {
                        sum = S::fma(S::load(query.add(lane)), load(key.add(N * lane)), sum);
                    }
                    (query, key) = (query.wrapping_add(n * GRANULE), key.add(N * GRANULE));
                }
                *weight = S::reduce_add(sum);
            }
            softmax_step::<S>(&mut weights, &mut a.max[q], &mut a.sum[q], &mut [], |_, e| e);
            let acc = a.acc.as_mut_ptr().add(q * dim);
            for at in (0..dim).step_by(S::LANES) {
                let mut sum = S::splat(0.0);
                for (weight, value) in weights.iter().zip(values).take(high - low) {
                    sum = S::fma(S::splat(*weight), load(value.add(N * at)), sum);
                }
                S::store(acc.add(at), sum);
            }
        }
    }
}

/// Turns a run's scores into weights relative to the new maximum, and brings what was summed before to it. What `keep` makes of the
/// weights from an index on is left in their place.
///
/// # Safety
/// The CPU has `S`; lengths are multiples of 16.
#[inline(always)]
unsafe fn softmax_step<S: Simd>(
    scores: &mut [f32],
    max: &mut f32,
    sum: &mut f32,
    acc: &mut [f32],
    mut keep: impl FnMut(usize, S::F) -> S::F,
) {
    // SAFETY: whole vectors of slices whose lengths LANES divides.
    unsafe {
        let p = scores.as_mut_ptr();
        let mut largest = S::load(p);
        for i in (S::LANES..scores.len()).step_by(S::LANES) {
            largest = S::max(largest, S::load(p.add(i)));
        }
        let new = max.max(S::reduce_max(largest));
        let mut total = S::splat(0.0);
        for i in (0..scores.len()).step_by(S::LANES) {
            let e = S::exp2(S::add(S::load(p.add(i)), S::splat(-new)));
            total = S::add(total, e);
            S::store(p.add(i), keep(i, e));
        }
        if new > *max {
            let shrink = exp2::<S>(*max - new);
            *sum *= shrink;
            for i in (0..acc.len()).step_by(S::LANES) {
                let at = acc.as_mut_ptr().add(i);
                S::store(at, S::mul(S::load(at), S::splat(shrink)));
            }
            *max = new;
        }
        *sum += S::reduce_add(total);
    }
}

/// `count` keys from number `from` on as columns, `head_dim` deep: where they lie if they do so one after another, else converted.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn keys<S: Simd>(a: &mut Attend, from: usize, count: usize) -> Right {
    let dim = a.head_dim;
    let first = a.head * dim;
    if let Source::Stored { k, blocks, rows_per_block, .. } = a.source
        && let Some(element) = k.element()
        && are_together(blocks, rows_per_block, from, count)
    {
        // SAFETY: the caller's.
        let granules = unsafe { k.granules(cache_row(blocks, rows_per_block, from), count, first) };
        let column = GRANULE * element.bytes();
        return Right { element, place: granules.as_ptr(), row: column, granule: dim * column };
    }
    let Scratch { converted, row: temporary, gathered, .. } = &mut *a.scratch;
    let keys = converted.as_mut_ptr(); // (head_dim, CHUNK)
    // SAFETY: `converted` is (dim, CHUNK) or more, count <= CHUNK.
    unsafe {
        match a.source {
            Source::Stored { k, blocks, rows_per_block, .. } => {
                for i in (0..count).step_by(GRANULE) {
                    let row = |key| cache_row(blocks, rows_per_block, from + i + key);
                    k.read::<S>(row, (count - i).min(GRANULE), first, dim, keys.add(i), CHUNK, gathered);
                }
            }
            // Those that are integers have products of their own.
            Source::Hidden { .. } | Source::Fixed { .. } => {
                for i in 0..count {
                    if let Some(((k, _), row)) = a.source.hidden_row(from + i) {
                        k.read::<S>(row, first, temporary);
                        for (d, x) in temporary.iter().enumerate() {
                            *keys.add(d * CHUNK + i) = *x;
                        }
                    }
                }
            }
        }
    }
    Right::f32(keys, CHUNK)
}

/// `count` values from number `from` on as rows of `padded` columns, likewise.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn values<S: Simd>(a: &mut Attend, from: usize, count: usize) -> Right {
    let (dim, width) = (a.head_dim, padded(a.head_dim));
    let first = a.head * dim;
    if width == dim
        && let Source::Stored { v, blocks, rows_per_block, .. } = a.source
        && let Some(element) = v.element()
        && are_together(blocks, rows_per_block, from, count)
    {
        // SAFETY: the caller's.
        let rows = unsafe { v.rows(cache_row(blocks, rows_per_block, from), count, first) };
        let (row, granule) = (dim * element.bytes(), GRANULE * element.bytes());
        return Right { element, place: rows.as_ptr(), row, granule };
    }
    let values = &mut a.scratch.converted; // (CHUNK, padded)
    if width > dim {
        values.fill(0.0); // the padding; keys were here
    }
    // SAFETY: the caller's.
    unsafe {
        match a.source {
            Source::Stored { v, blocks, rows_per_block, .. } => {
                for i in (0..count).step_by(GRANULE) {
                    let last = (i + GRANULE).min(count);
                    if rows_per_block.is_multiple_of(GRANULE) && width == dim && v.heads_are_apart(dim) {
                        let row = cache_row(blocks, rows_per_block, from + i);
                        v.read::<S>(row, first, &mut values[i * dim..last * dim]);
                        continue;
                    }
                    for j in i..last {
                        let row = cache_row(blocks, rows_per_block, from + j);
                        v.read::<S>(row, first, &mut values[j * width..j * width + dim]);
                    }
                }
            }
            // Those that are integers have products of their own.
            Source::Hidden { .. } | Source::Fixed { .. } => {
                for i in 0..count {
                    let to = &mut values[i * width..i * width + dim];
                    match a.source.hidden_row(from + i) {
                        Some(((_, v), row)) => v.read::<S>(row, first, to),
                        None => to.fill(0.0),
                    }
                }
            }
        }
    }
    Right::f32(values.as_ptr(), width)
}

/// Where a stored row of a sequence lies.
#[inline(always)]
fn cache_row(blocks: &[u32], rows_per_block: usize, key: usize) -> usize {
    blocks[key / rows_per_block] as usize * rows_per_block + key % rows_per_block
}

/// Whether `count` stored rows from `from` on lie one after another.
#[inline(always)]
fn are_together(blocks: &[u32], rows_per_block: usize, from: usize, count: usize) -> bool {
    let (first, last) = (from / rows_per_block, (from + count - 1) / rows_per_block);
    blocks[first..=last].windows(2).all(|pair| pair[0] + 1 == pair[1])
}

impl<'a> Source<'a> {
    /// Where hidden token `number` lies, if it is among those that are there.
    #[inline(always)]
    fn hidden_row(&self, number: usize) -> Option<((&'a Rows, &'a Rows), usize)> {
        match *self {
            Source::Hidden { ring, ring_base, capacity, fresh, first_fresh, fresh_base, first } if number >= first => {
                Some(match number.checked_sub(first_fresh) {
                    Some(i) => (fresh, fresh_base + i),
                    None => (ring, ring_base + number % capacity),
                })
            }
            _ => None,
        }
    }
}

/// The right side of a product where it lies: rows of granules of 16 columns.
#[derive(Clone, Copy)]
struct Right {
    element: Element,
    place: *const u8,
    /// Bytes from a row to the next, and from a granule to the next of the row.
    row: usize,
    granule: usize,
}

impl Right {
    fn f32(place: *const f32, stride: usize) -> Right {
        Right { element: Element::F32, place: place.cast(), row: 4 * stride, granule: 4 * GRANULE }
    }

    /// `C = A B` or `C += A B` for this B; `shape` is rows, columns (a multiple of 16), depth. A and C are f32, A's rows `ROW` elements
    /// apart (a constant: no register), C's rows `c.1`. Draws as many bytes as B has, from `next` on, into the cache meanwhile.
    ///
    /// # Safety
    /// The CPU has `S`; the matrices lie behind the pointers.
    #[inline(always)]
    unsafe fn product<S: Simd, const ROW: usize>(
        self,
        shape: (usize, usize, usize),
        a: Left,
        c: (*mut f32, usize),
        accumulate: bool,
        next: Option<*const u8>,
    ) {
        // SAFETY: the caller's; elements are what they are said to be.
        unsafe {
            match self.element {
                Element::F32 => self.blocks::<S, 4, ROW>(|p| S::load(p.cast()), shape, a, c, accumulate, next),
                Element::F16 => self.blocks::<S, 2, ROW>(|p| S::load_f16(p.cast()), shape, a, c, accumulate, next),
                Element::Bf16 => self.blocks::<S, 2, ROW>(|p| S::load_bf16(p.cast()), shape, a, c, accumulate, next),
            }
        }
    }

    /// The same with elements of `N` bytes, that `load` turns into f32: again for every six rows of A, which hides behind their
    /// multiplications, where storing them as f32 first would take as long as two rows.
    #[inline(always)]
    unsafe fn blocks<S: Simd, const N: usize, const ROW: usize>(
        self,
        load: impl Fn(*const u8) -> S::F + Copy,
        (rows, columns, depth): (usize, usize, usize),
        a: Left,
        (c, ldc): (*mut f32, usize),
        accumulate: bool,
        next: Option<*const u8>,
    ) {
        // Blocks of like heights: one row alone would wait for its own sums.
        let blocks = |rows: usize| rows.div_ceil(6);
        let height = |rows: usize| rows.div_ceil(blocks(rows));
        // Registers hold the sums, a vector of B for each vector of columns and an element of A: one sum more than fits is loaded
        // and stored at every step.
        let at_once = ((S::REGISTERS - 1) / (height(rows) + 1)).min(4);
        let mut column = 0;
        while column < columns {
            // Of like widths, for the same reason as heights.
            let left = (columns - column) / S::LANES;
            let vectors = left.div_ceil(left.div_ceil(at_once));
            // Once, and spread evenly over the whole product: in bursts, the memory's queue is full and then idle.
            let on = N * S::LANES * vectors / blocks(rows);
            let mut ahead = next.map_or((self.place, 0), |p| (p.wrapping_add(N * column * depth), on));
            let mut row = 0;
            while row < rows {
                let m = height(rows - row);
                // SAFETY: blocks stay within rows and columns.
                unsafe {
                    let (a, c) = (Left { place: a.place.add(row * ROW), ..a }, c.add(row * ldc + column));
                    let block = Block::<N, ROW> { a, right: self, column, c, ldc, depth, accumulate, ahead };
                    match vectors {
                        4 => block.rows::<S, 4>(m, load),
                        3 => block.rows::<S, 3>(m, load),
                        2 => block.rows::<S, 2>(m, load),
                        _ => block.rows::<S, 1>(m, load),
                    }
                }
                ahead.0 = ahead.0.wrapping_add(ahead.1 * depth);
                row += m;
            }
            column += vectors * S::LANES;
        }
    }
}

/// The left side of a product: `run` columns side by side, and so again every `on` elements.
#[derive(Clone, Copy)]
struct Left {
    place: *const f32,
    run: usize,
    on: usize,
}

/// A part of a product that is summed in registers.
struct Block<const N: usize, const ROW: usize> {
    a: Left,
    right: Right,
    /// The first of `right`.
    column: usize,
    c: *mut f32,
    ldc: usize,
    depth: usize,
    accumulate: bool,
    /// What to prefetch, and the bytes to go on by.
    ahead: (*const u8, usize),
}

impl<const N: usize, const ROW: usize> Block<N, ROW> {
    #[inline(always)]
    unsafe fn rows<S: Simd, const V: usize>(&self, m: usize, load: impl Fn(*const u8) -> S::F) {
        // SAFETY: the caller's.
        unsafe {
            match m {
                1 => self.sum::<S, 1, V>(load),
                2 => self.sum::<S, 2, V>(load),
                3 => self.sum::<S, 3, V>(load),
                4 => self.sum::<S, 4, V>(load),
                5 => self.sum::<S, 5, V>(load),
                _ => self.sum::<S, 6, V>(load),
            }
        }
    }

    /// M rows by V vectors.
    #[inline(always)]
    unsafe fn sum<S: Simd, const M: usize, const V: usize>(&self, load: impl Fn(*const u8) -> S::F) {
        if M * V + V + 1 > S::REGISTERS {
            return; // never asked for
        }
        // SAFETY: the caller's.
        unsafe {
            let mut acc = [[S::splat(0.0); V]; M];
            if self.accumulate {
                for m in 0..M {
                    for v in 0..V {
                        acc[m][v] = S::load(self.c.add(m * self.ldc + v * S::LANES));
                    }
                }
            }
            let mut run = self.a.place;
            let mut b = [self.right.place; V];
            for v in 0..V {
                let column = self.column + v * S::LANES;
                b[v] = b[v].add(column / GRANULE * self.right.granule + column % GRANULE * N);
            }
            let (mut ahead, on) = self.ahead;
            let mut left = self.depth;
            while left > 0 {
                let columns = left.min(self.a.run);
                let mut a = run;
                for _ in 0..columns {
                    for line in (0..N * S::LANES * V).step_by(LINE) {
                        S::prefetch_l2(ahead.wrapping_add(line));
                    }
                    ahead = ahead.wrapping_add(on);
                    let mut right = [S::splat(0.0); V];
                    for v in 0..V {
                        right[v] = load(b[v]);
                        b[v] = b[v].wrapping_add(self.right.row); // at last beyond the end
                    }
                    for m in 0..M {
                        let left = S::splat(*a.add(m * ROW));
                        for v in 0..V {
                            acc[m][v] = S::fma(left, right[v], acc[m][v]);
                        }
                    }
                    a = a.wrapping_add(1);
                }
                run = run.wrapping_add(self.a.on);
                left -= columns;
            }
            for m in 0..M {
                for v in 0..V {
                    S::store(self.c.add(m * self.ldc + v * S::LANES), acc[m][v]);
                }
            }
        }
    }
}

/// Adds a part to a running total over a query's parts: `[padded]` sums of values, then the largest score and the sum of
/// powers. A total begins as zeros and a largest score of -infinity ([`begin`]).
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub unsafe fn merge<S: Simd>(total: &mut [f32], max: f32, sum: f32, acc: &[f32]) {
    if max == f32::NEG_INFINITY {
        return; // it saw nothing here
    }
    let (total, [total_max, total_sum]) = total.split_last_chunk_mut().expect("two more than padded");
    if *total_max == f32::NEG_INFINITY {
        total.copy_from_slice(acc);
        (*total_max, *total_sum) = (max, sum);
        return;
    }
    let new = total_max.max(max);
    // SAFETY: the caller's.
    let (before, here) = unsafe { (exp2::<S>(*total_max - new), exp2::<S>(max - new)) };
    total.iter_mut().zip(acc).for_each(|(total, part)| *total = *total * before + part * here);
    *total_sum = *total_sum * before + sum * here;
    *total_max = new;
}

pub fn begin(total: &mut [f32]) {
    total.fill(0.0);
    total[total.len() - 2] = f32::NEG_INFINITY;
}

/// The weighted mean that a total stands for.
#[inline(always)]
pub fn finish(total: &[f32], out: &mut [f32]) {
    let inverse = 1.0 / total[total.len() - 1];
    out.iter_mut().zip(total).for_each(|(o, t)| *o = t * inverse);
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn exp2<S: Simd>(x: f32) -> f32 {
    let mut all = [0.0f32; 16];
    // SAFETY: 16 elements are a vector of any instruction set.
    unsafe { S::store(all.as_mut_ptr(), S::exp2(S::splat(x))) };
    all[0]
}
