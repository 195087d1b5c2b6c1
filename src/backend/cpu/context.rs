//! One session's cache and scratch, and the step: the phases of a layer, shared among threads.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::attention::{self, Attend, MAX_SPLITS, Source, padded, split_len};
use super::kernels::Kernels;
use super::matrix::{Activations, Needs, Outputs, embedding_row};
use super::packed::TILE;
use super::pool::{By, Pool, Worker, cpus};
use super::shared::{Grid, Shared};
use super::store::{Cache, GRANULE, Granules, Parts, Rows};
use super::{Cpu, CpuLayer, Embedding, Projection};
use crate::backend::{Context, ContextMemory, ContextOptions};
use crate::cache::BlockCopy;
use crate::error::{Error, Result};
use crate::model::{Hyper, NormPlacement, QkNorm};
use crate::schedule::{LayerRows, Plan, Row, Store};

/// Up to so many rows every thread converts the activations for itself, which saves a barrier.
const OWN_ROWS: usize = 8;
/// Up to so many rows the context is divided among threads.
const SPLIT_ROWS: usize = 16;
/// Pieces that a thread's share of a matrix is taken in, of many rows.
const PIECES: usize = 16;
/// Query vectors that share one conversion of keys and values.
const TILE_QUERIES: usize = 48;

pub struct CpuContext {
    pool: Pool,
    step: Step,
}

/// What a thread has to itself.
struct Own {
    row: Vec<f32>,     // the widest row
    convert: Vec<f32>, // see Matrix::scratch
    encoded: Vec<u8>,  // a cache row
    attention: attention::Scratch,
    queries: Vec<f32>,      // (padded / 16, query, 16)
    sight: Vec<(u32, u32)>, // (query)
    max: Vec<f32>,          // (query)
    sum: Vec<f32>,          // (query)
    acc: Vec<f32>,          // (query, padded)
    totals: Vec<f32>,       // (query, padded + 2): running merge
    tiles: Vec<QueryTile>,
    rows: Vec<u32>, // where a product's rows go
}

/// Rows of one sequence that attend together.
#[derive(Clone, Copy)]
struct QueryTile {
    /// Their indices among the rows that go on.
    first: usize,
    n: usize,
    entry: usize,
    stored: usize,
    split: usize,
    /// Hidden tokens that any of them sees.
    hidden: (usize, usize),
}

impl QueryTile {
    fn splits(&self) -> usize {
        self.stored.div_ceil(self.split)
    }

    fn parts(&self) -> usize {
        self.splits() + usize::from(self.hidden.0 < self.hidden.1)
    }
}

/// The queries of a key/value head that a thread takes together: of those of a tile, (row, query head) by number.
struct Asked<'a> {
    tile: &'a QueryTile,
    head: usize,
    queries: Range<usize>,
}

/// How `n` pieces of work of one size are shared by threads that are waited for: whole ones first, as many to each thread; what is left is
/// cut into so many parts that they go round, of which a thread takes those of one piece together.
struct Cut {
    threads: usize,
    /// Whole pieces of each thread, and all of them.
    each: usize,
    whole: usize,
    /// Parts of each thread, of each piece that is cut, and the pieces that a thread's are of, at most.
    parts_each: usize,
    parts: usize,
    spans: usize,
}

impl Cut {
    fn new(n: usize, threads: usize) -> Cut {
        let (each, left) = (n / threads, n % threads);
        // The fewest that left * parts = threads * parts_each allows.
        let parts_each = (1..=threads).find(|each| left > 0 && (threads * each).is_multiple_of(left)).unwrap_or(0);
        let parts = (threads * parts_each).checked_div(left).unwrap_or(1);
        // A thread has less than a piece's worth of them.
        let spans = if parts_each == 0 { 0 } else { 1 + usize::from(!parts.is_multiple_of(parts_each)) };
        Cut { threads, each, whole: n - left, parts_each, parts, spans }
    }

    /// Of all threads, one thread's after another's.
    fn pieces(&self) -> usize {
        self.threads * (self.each + self.spans)
    }

    /// The piece, which of its parts, possibly none, and of how many.
    fn at(&self, i: usize) -> (usize, Range<usize>, usize) {
        let (thread, i) = (i / (self.each + self.spans), i % (self.each + self.spans));
        if i < self.each {
            return (thread * self.each + i, 0..1, 1);
        }
        let (first, last) = (thread * self.parts_each, (thread + 1) * self.parts_each);
        let piece = first / self.parts;
        let end = (piece + 1) * self.parts;
        if i == self.each {
            return (self.whole + piece, first % self.parts..last.min(end) - piece * self.parts, self.parts);
        }
        let beyond = last.saturating_sub(end);
        (self.whole + piece + usize::from(beyond > 0), 0..beyond, self.parts)
    }
}

struct Step {
    model: Arc<Cpu>,
    options: ContextOptions,
    cache: Vec<Cache>,        // (layer): keys, values of (cache row, kv_dim)
    rings: Vec<(Rows, Rows)>, // (layer): (sequence, hidden number % ring_capacity), kv_dim
    fresh: (Rows, Rows),      // (hidden row of the pass, kv_dim)
    logits: Grid,             // (logits row, n_vocab)
    embeddings: Grid,         // (embedding, n_embd)
    x: Grid,                  // (row of the plan, n_embd): the residual stream
    rope: Grid,               // (row of the plan, head_dim): cosines, then sines
    q: Grid,                  // (entering row, q_dim)
    k: Grid,                  // (entering row, kv_dim)
    v: Grid,                  // (entering row, kv_dim)
    attention: Grid,          // (row that goes on, q_dim)
    partials: Shared<f32>,    // (row that goes on, head, split or hidden, padded + 2)
    gate: Grid,               // (row that goes on, n_ff)
    up: Grid,                 // (row that goes on, n_ff)
    out: Grid,                // (row that goes on, n_embd)
    numbers: Vec<u32>,        // 0, 1, 2...: the rows of a product in their own order
    activations: Activations, // of more than OWN_ROWS rows, or attention's
    gated: Activations,       // (row that goes on, n_ff): the down projection's
    own: Shared<Own>,
    own_activations: Vec<Activations>, // (thread)
}

impl CpuContext {
    pub fn new(model: Arc<Cpu>, options: &ContextOptions) -> Result<CpuContext> {
        let h = model.hyper.clone();
        let layout = options.layout;
        let rows = options.max_rows;
        let n_threads = options.n_threads.clamp(1, cpus());
        let kind = options.cache_type;
        let parts = |rows: usize| Parts::new(kind, rows, h.kv_dim(), h.head_dim);
        let (ring, fresh) = (parts(layout.ring_rows()), parts(rows));
        let natural = |parts: Parts| move |(k, v)| (Rows::new(parts, k), Rows::new(parts, v));
        let cached = (layout.cache_rows(), layout.block * layout.stored_copies);
        let scratch = |rows: usize, width: usize| Grid::new("scratch", rows, width);
        let group = h.n_heads / h.n_kv_heads;
        let queries = tile_rows(group) * group;
        let widest = h.n_embd.max(h.n_ff).max(h.q_dim());
        let width = padded(h.head_dim);
        let gathered = Granules::gathered_bytes(kind, h.kv_dim(), h.head_dim);
        let own = || Own {
            row: vec![0.0; widest.max(h.kv_dim())],
            convert: vec![0.0; model.convert_scratch],
            encoded: vec![0; kind.row_bytes(h.kv_dim())],
            attention: attention::Scratch::new(queries, h.head_dim, gathered),
            queries: vec![0.0; queries * width],
            sight: vec![(0, 0); queries],
            max: vec![0.0; queries],
            sum: vec![0.0; queries],
            acc: vec![0.0; queries * width],
            totals: vec![0.0; queries * (width + 2)],
            tiles: Vec::with_capacity(rows),
            rows: Vec::with_capacity(rows),
        };
        let own_activations = (0..n_threads)
            .map(|_| Activations::new(OWN_ROWS.min(rows), widest, &model.needs))
            .collect::<Result<_>>()?;
        let own: Vec<Own> = (0..n_threads).map(|_| own()).collect();
        let step = Step {
            cache: Cache::layers(h.n_layers, kind, cached, (h.n_kv_heads, h.head_dim))?,
            rings: ring.pairs(h.n_layers)?.map(natural(ring)).collect(),
            fresh: fresh.pairs(1)?.map(natural(fresh)).next().expect("one was asked for"),
            logits: Grid::new("the logits", options.n_logits, h.n_vocab)?,
            embeddings: Grid::new("the embeddings", options.n_embeddings, h.n_embd)?,
            x: scratch(rows, h.n_embd)?,
            rope: scratch(rows, h.head_dim)?,
            q: scratch(rows, h.q_dim())?,
            k: scratch(rows, h.kv_dim())?,
            v: scratch(rows, h.kv_dim())?,
            attention: scratch(rows, h.q_dim())?,
            partials: Shared::new("scratch", rows.min(SPLIT_ROWS) * h.n_heads * slots(&layout), width + 2)?,
            gate: scratch(rows, h.n_ff)?,
            up: scratch(rows, h.n_ff)?,
            out: scratch(rows, h.n_embd)?,
            numbers: (0..rows as u32).collect(),
            activations: Activations::new(rows, widest, &model.needs)?,
            gated: Activations::new(rows, h.n_ff, &model.needs)?,
            own: own.into(),
            own_activations,
            options: *options,
            model,
        };
        Ok(CpuContext { pool: Pool::new(n_threads)?, step })
    }
}

/// Parts of a row's context: its splits, and the hidden window.
fn slots(layout: &crate::cache::Layout) -> usize {
    let stored = layout.n_positions * layout.stored_copies;
    // Shorter contexts never have more splits than this.
    stored.div_ceil(split_len(0)).min(MAX_SPLITS) + 1
}

/// Rows of a query tile.
fn tile_rows(group: usize) -> usize {
    (TILE_QUERIES / group).max(1)
}

impl Context for CpuContext {
    fn run(&mut self, plan: &Plan, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let stopped = AtomicBool::new(false);
        let step = &self.step;
        self.pool.run(&|w: &Worker| {
            if step.carry_out(w, plan, cancelled).is_none() {
                stopped.store(true, Ordering::Relaxed);
            }
        });
        if stopped.into_inner() { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn logits(&self, row: usize) -> Result<&[f32]> {
        // SAFETY: no step is running: that takes `&mut self`.
        Ok(unsafe { self.step.logits.row(row) })
    }

    fn put_logits(&mut self, row: usize, logits: &[f32]) {
        self.step.logits.row_alone(row).copy_from_slice(logits);
    }

    fn embedding(&self, row: usize) -> &[f32] {
        // SAFETY: no step is running: that takes `&mut self`.
        unsafe { self.step.embeddings.row(row) }
    }

    #[cfg(test)]
    fn barriers(&self) -> usize {
        self.pool.barriers()
    }

    fn read_rows(&self, layer: usize, first: usize, rows: &mut [u8]) -> Result<()> {
        let cache = &self.step.cache[layer];
        let n = self.step.options.cache_type.row_bytes(self.step.model.hyper.kv_dim());
        for (i, row) in rows.chunks_exact_mut(2 * n).enumerate() {
            let (k, v) = row.split_at_mut(n);
            // SAFETY: no step is running: that takes `&mut self`.
            unsafe { cache.encoded(first + i, k, v) };
        }
        Ok(())
    }

    fn write_rows(&mut self, layer: usize, first: usize, rows: &[u8]) -> Result<()> {
        let n = self.step.options.cache_type.row_bytes(self.step.model.hyper.kv_dim());
        let cache = &mut self.step.cache[layer];
        let scratch = &mut self.step.own.as_mut()[0].encoded;
        for (i, row) in rows.chunks_exact(2 * n).enumerate() {
            let (k, v) = row.split_at(n);
            cache.set_encoded(first + i, k, v, scratch);
        }
        Ok(())
    }

    fn copy_logits(&mut self, src: usize, dst: usize) -> Result<()> {
        self.step.logits.copy_row(src, dst);
        Ok(())
    }

    fn copy_block(&mut self, copy: BlockCopy) -> Result<()> {
        let layout = self.step.options.layout;
        let rows_per_block = layout.block * layout.stored_copies;
        let (src, dst) = (copy.src as usize * rows_per_block, copy.dst as usize * rows_per_block);
        let n = copy.n_positions * layout.stored_copies;
        self.step.cache.iter_mut().for_each(|cache| cache.copy_within(src, dst, n));
        Ok(())
    }

    fn copy_rings(&mut self, src: usize, dst: usize) -> Result<()> {
        let capacity = self.step.options.layout.ring_capacity;
        for (k, v) in &mut self.step.rings {
            k.copy_within(src * capacity, dst * capacity, capacity);
            v.copy_within(src * capacity, dst * capacity, capacity);
        }
        Ok(())
    }

    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn memory(&self) -> ContextMemory {
        let s = &self.step;
        let grids = [&s.logits, &s.embeddings, &s.x, &s.rope, &s.q, &s.k, &s.v, &s.attention, &s.gate, &s.up, &s.out];
        // SAFETY: no step is running.
        let own = unsafe { s.own.slice(0, s.own.len()) };
        ContextMemory {
            cache: s.cache.iter().map(Cache::bytes).sum(),
            hidden: s.rings.iter().map(|(k, v)| k.bytes() + v.bytes()).sum(),
            scratch: grids.into_iter().map(Grid::bytes).sum::<usize>()
                + s.cache.iter().map(Cache::scratch_bytes).sum::<usize>()
                + s.partials.bytes()
                + s.fresh.0.bytes()
                + s.fresh.1.bytes()
                + s.activations.bytes()
                + s.gated.bytes()
                + s.own_activations.iter().map(Activations::bytes).sum::<usize>()
                + own.iter().map(Own::bytes).sum::<usize>(),
        }
    }
}

impl Own {
    fn bytes(&self) -> usize {
        let floats = [&self.row, &self.convert, &self.queries, &self.max, &self.sum, &self.acc, &self.totals];
        self.attention.bytes()
            + floats.into_iter().map(|v| 4 * v.len()).sum::<usize>()
            + self.encoded.len()
            + 8 * self.sight.len()
            + self.tiles.capacity() * size_of::<QueryTile>()
            + 4 * self.rows.capacity()
    }
}

/// The part of `range` that lies in `from..from + n`, counted from `from`.
fn overlap(range: &Range<usize>, from: usize, n: usize) -> Range<usize> {
    range.start.clamp(from, from + n) - from..range.end.clamp(from, from + n) - from
}

impl Step {
    /// One thread's part of the step; `None` when it was cancelled.
    fn carry_out(&self, w: &Worker, plan: &Plan, cancelled: &(dyn Fn() -> bool + Sync)) -> Option<()> {
        let model = &*self.model;
        let mine = &self.own_activations[w.index];
        let p = Phases { s: self, h: &model.hyper, kernels: model.kernels, w, plan, cancelled, mine };
        // SAFETY: each thread takes the element of its own index.
        let own = &mut unsafe { self.own.slice_mut(w.index, 1) }[0];
        p.embed();
        for (index, layer) in model.layers.iter().enumerate() {
            let rows = &plan.layers[index];
            p.meet()?;
            p.project(own, layer, &rows.enter)?;
            p.meet()?;
            p.store(own, layer, index, &rows.enter);
            p.meet()?;
            p.attend(own, layer, index, rows);
            p.meet()?;
            p.keep_hidden(index, &rows.enter);
            p.attention_output(own, layer, rows)?;
            p.meet()?;
            p.feed_forward(own, layer, rows)?;
            p.meet()?;
            p.feed_forward_output(own, layer, rows)?;
        }
        p.meet()?;
        p.head(own)
    }
}

/// Where a row of activations was put.
enum Input<'a> {
    Shared(&'a [f32]),
    /// In [`Own::row`], so many of them.
    Own(usize),
}

/// The phases of a step as one thread sees them. Within a phase a thread writes rows or columns of its own share only, and reads
/// what earlier phases wrote; they are separated by [`Phases::meet`]. That is the guarantee behind every use of
/// [`Shared::slice`] and [`Shared::slice_mut`] here ("phases").
#[derive(Clone, Copy)]
struct Phases<'a> {
    s: &'a Step,
    h: &'a Hyper,
    kernels: &'static Kernels,
    w: &'a Worker<'a>,
    plan: &'a Plan,
    cancelled: &'a (dyn Fn() -> bool + Sync),
    /// Activations of up to [`OWN_ROWS`] rows, which every thread converts for itself.
    mine: &'a Activations,
}

impl<'a> Phases<'a> {
    /// Waits for all threads; ends the step on all of them alike if that was asked for.
    fn meet(self) -> Option<()> {
        if self.w.index == 0 {
            self.is_stopping();
        }
        (!self.w.barrier()).then_some(())
    }

    /// Whether the step is to end at the next [`Phases::meet`]: what is left of the phase is then for nothing.
    fn is_stopping(self) -> bool {
        if (self.cancelled)() {
            self.w.ask_stop();
        }
        self.w.is_stop_asked()
    }

    /// Index in the plan of the `i`th row that goes on.
    fn kept(self, rows: &LayerRows, i: usize) -> usize {
        rows.enter[rows.keep[i] as usize] as usize
    }

    fn embed(self) {
        let (s, h) = (self.s, self.h);
        for i in self.w.share(self.plan.rows.len(), 1) {
            let row = &self.plan.rows[i];
            // SAFETY: phases.
            let (x, rope) = unsafe { (s.x.row_mut(i), s.rope.row_mut(i)) };
            match &s.model.embeddings[row.table as usize] {
                Embedding::Stored(table) => embedding_row(table, row.token as usize, x),
                Embedding::Head => s.model.head.row(row.token as usize, x),
            }
            let (cos, sin) = rope.split_at_mut(h.head_dim / 2);
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&h.rope_frequencies) {
                // In f64: at long contexts the angle has more digits than f32 keeps.
                let (a, b) = (f64::from(row.rope) * frequency).sin_cos();
                (*sin, *cos) = (a as f32, b as f32);
            }
        }
    }

    /// Converts `n` rows of activations, handed in by `row`, to the forms that matrices need. Many rows are divided among the
    /// threads, which then meet.
    fn inputs(
        self,
        own: &mut Own,
        needs: &Needs,
        n: usize,
        row: impl Fn(&mut Own, usize) -> Input<'a>,
    ) -> Option<&'a Activations> {
        let is_own = n <= OWN_ROWS;
        let x = if is_own { self.mine } else { &self.s.activations };
        for i in if is_own { 0..n } else { self.w.share(n, 1) } {
            let values = match row(own, i) {
                Input::Shared(values) => values,
                Input::Own(width) => &own.row[..width],
            };
            // SAFETY: this thread's own activations, or a row of its share.
            unsafe { x.set(self.kernels, needs, i, n, values) };
        }
        if !is_own {
            self.meet()?;
        }
        Some(x)
    }

    /// A row of the residual stream, RMS-normed if the family norms `when`.
    fn normed(self, own: &mut Own, row: usize, weight: &[f32], when: NormPlacement) -> Input<'a> {
        let (s, h) = (self.s, self.h);
        // SAFETY: phases.
        let x = unsafe { s.x.row(row) };
        if h.norms != when {
            return Input::Shared(x);
        }
        // SAFETY: these kernels are this CPU's.
        unsafe { (self.kernels.norm)(x, weight, h.norm_eps, &mut own.row[..h.n_embd]) };
        Input::Own(h.n_embd)
    }

    /// This thread's part of the outputs of `projections`, which follow one another.
    fn multiply(self, convert: &mut [f32], x: &Activations, projections: &[(&Projection, Outputs)]) {
        let (n_tiles, n) = (projections.iter().map(|(p, _)| p.matrix.n_tiles()).sum(), projections[0].1.n_rows());
        for piece in self.pieces(n_tiles, self.kernels.tiles_at_once(), n) {
            let mut from = 0;
            for (p, to) in projections {
                let tiles = overlap(&piece, from, p.matrix.n_tiles());
                from += p.matrix.n_tiles();
                self.multiply_tiles(convert, x, p, tiles, to);
            }
        }
    }

    /// This thread's pieces of `0..n_tiles`, multiples of `grain`, for a product of `n` rows, and none after a request to stop, for which
    /// many rows would take too long.
    fn pieces(self, n_tiles: usize, grain: usize, n: usize) -> impl Iterator<Item = Range<usize>> {
        // Few rows want few pieces, to be read as streams; but whatever a thread has left at the end is waited for.
        let pieces = if n <= OWN_ROWS {
            self.w.pieces(n_tiles, grain, By::Halves)
        } else {
            self.w.pieces(n_tiles, n_tiles.div_ceil(PIECES * self.w.n * grain) * grain, By::Grain)
        };
        pieces.take_while(move |_| !self.is_stopping())
    }

    /// A product's `n` rows go into the first of the grid.
    fn in_order(self, grid: &'a Grid, n: usize) -> Outputs<'a> {
        Outputs::new(grid, &self.s.numbers[..n], false)
    }

    /// Some tiles of one projection.
    fn multiply_tiles(self, convert: &mut [f32], x: &Activations, p: &Projection, tiles: Range<usize>, to: &Outputs) {
        // SAFETY: `inputs` has put in all rows for the needs of this projection; kernels are this CPU's. Phases: the columns
        // of this thread's tiles.
        unsafe { p.matrix.tiles(self.kernels, x, tiles, convert, p.bias.as_deref(), to) }
    }

    /// Queries, keys and values of the entering rows.
    fn project(self, own: &mut Own, layer: &CpuLayer, enter: &[u32]) -> Option<()> {
        let s = self.s;
        let n = enter.len();
        let x = self.inputs(own, &layer.qkv_needs, n, |own, i| {
            self.normed(own, enter[i] as usize, &layer.attention_norm, NormPlacement::Before)
        })?;
        let to = |grid| self.in_order(grid, n);
        self.multiply(&mut own.convert, x, &[(&layer.q, to(&s.q)), (&layer.k, to(&s.k)), (&layer.v, to(&s.v))]);
        Some(())
    }

    /// Keys are normed and turned by their positions, and go with the values to the cache or to the pass's own. Divided by key/value heads
    /// and rows, or by rows where a norm or a block of the cache spans heads.
    fn store(self, own: &mut Own, layer: &CpuLayer, index: usize, enter: &[u32]) {
        let (s, h) = (self.s, self.h);
        let spans_heads = h.qk_norm == QkNorm::Projection || !s.fresh.0.heads_are_apart(h.head_dim);
        let (pieces, n) = (if spans_heads { 1 } else { h.n_kv_heads }, enter.len());
        let width = h.kv_dim() / pieces;
        // By heads first, then keys and values: a row that goes to the cache takes longest, and so every thread has a part of it. Else by
        // rows: keys take longer than values.
        for unit in self.w.share(2 * n * pieces, 1) {
            let first = unit / (2 * n) * width;
            let (is_value, i) = if spans_heads { (unit % 2 == 1, unit / 2) } else { (unit / n % 2 == 1, unit % n) };
            let row = enter[i] as usize;
            // SAFETY: phases: units of this thread's share; of this row's queries, the unit of its keys where that spans heads.
            let x = unsafe { if is_value { s.v.part_mut(i, first, width) } else { s.k.part_mut(i, first, width) } };
            if !is_value {
                let mut norm = |x: &mut [f32], weight: &[f32]| {
                    let copy = &mut own.row[..x.len()];
                    copy.copy_from_slice(x);
                    // SAFETY: these kernels are this CPU's.
                    unsafe { (self.kernels.norm)(copy, weight, h.norm_eps, x) };
                };
                match h.qk_norm {
                    QkNorm::None => {}
                    QkNorm::Head => x.chunks_exact_mut(h.head_dim).for_each(|head| norm(head, &layer.k_norm)),
                    QkNorm::Projection => {
                        norm(x, &layer.k_norm);
                        // SAFETY: as above.
                        norm(unsafe { s.q.row_mut(i) }, &layer.q_norm);
                    }
                }
                for head in x.chunks_exact_mut(h.head_dim) {
                    // SAFETY: phases; these kernels are this CPU's.
                    unsafe { (self.kernels.rotate)(head, s.rope.row(row), h.rope_pairs) };
                }
            }
            // SAFETY: phases: these heads of the cache row or hidden row of this row alone.
            unsafe {
                match self.plan.rows[row].store {
                    Store::Cache(at) => s.cache[index].write(is_value, at as usize, first, x, &mut own.encoded),
                    Store::Hidden(at) => {
                        let fresh = if is_value { &s.fresh.1 } else { &s.fresh.0 };
                        fresh.write(at as usize, first, x);
                    }
                }
            }
        }
    }

    /// Cuts the rows that go on into tiles that attend together.
    fn find_tiles(self, tiles: &mut Vec<QueryTile>, rows: &LayerRows) {
        let most = tile_rows(self.h.n_heads / self.h.n_kv_heads);
        tiles.clear();
        for i in 0..rows.keep.len() {
            let row = &self.plan.rows[self.kept(rows, i)];
            let stored = row.stored as usize;
            let (split, entry) = (split_len(stored), row.entry as usize);
            let hidden = (row.hidden_from as usize, row.hidden_to as usize);
            match tiles.last_mut() {
                Some(t) if t.entry == entry && t.split == split && t.n < most => {
                    t.n += 1;
                    t.stored = t.stored.max(stored);
                    if hidden.0 < hidden.1 {
                        let whole = if t.hidden.0 < t.hidden.1 { t.hidden } else { hidden };
                        t.hidden = (whole.0.min(hidden.0), whole.1.max(hidden.1));
                    }
                }
                _ => tiles.push(QueryTile { first: i, n: 1, entry, stored, split, hidden }),
            }
        }
    }

    /// Whether threads share the rows' contexts, too: of few rows, of which one has more than a split's worth.
    fn shares_contexts(self, rows: &LayerRows) -> bool {
        let stored = |i| self.plan.rows[self.kept(rows, i)].stored as usize;
        rows.keep.len() <= SPLIT_ROWS && (0..rows.keep.len()).any(|i| stored(i) > split_len(stored(i)))
    }

    /// Whether attention that is finished is left as int8 blocks, which the output projection takes and no other.
    fn attends_into_blocks(self, layer: &CpuLayer) -> bool {
        layer.o_needs.is_int() && self.h.head_dim.is_multiple_of(32)
    }

    /// Attention of the rows that go on: into `partials` if contexts are shared, else finished, into `activations` or `attention`.
    fn attend(self, own: &mut Own, layer: &CpuLayer, index: usize, rows: &LayerRows) {
        let (s, h) = (self.s, self.h);
        let width = padded(h.head_dim);
        let group = h.n_heads / h.n_kv_heads;
        let mut tiles = std::mem::take(&mut own.tiles);
        self.find_tiles(&mut tiles, rows);
        let is_shared = self.shares_contexts(rows);
        let pieces = |t: &QueryTile| h.n_kv_heads * if is_shared { t.parts() } else { 1 };
        // Parts of contexts are of many sizes; who is done with his takes others'.
        let cut = Cut::new(tiles.iter().map(pieces).sum(), if is_shared { 1 } else { self.w.n });
        let slots = slots(&s.options.layout);
        for at in self.w.pieces(cut.pieces(), 1, By::Grain).take_while(|_| !self.is_stopping()) {
            let (mut piece, part, parts) = cut.at(at.start);
            let tile = tiles.iter().find(|t| {
                let here = piece < pieces(t);
                piece -= if here { 0 } else { pieces(t) };
                here
            });
            let tile = tile.expect("pieces were counted");
            let queries = tile.n * group * part.start / parts..tile.n * group * part.end / parts;
            if queries.is_empty() {
                continue;
            }
            let (part, head) = (piece / h.n_kv_heads, piece % h.n_kv_heads);
            let asked = Asked { tile, head, queries: queries.clone() };
            self.load_queries(own, layer, rows, &asked);
            if is_shared {
                self.attend_part(own, index, rows, &asked, part);
                let slot = if part < tile.splits() { part } else { slots - 1 };
                for (q, query) in queries.enumerate() {
                    let (i, head) = (tile.first + query / group, head * group + query % group);
                    let at = ((i * h.n_heads + head) * slots + slot) * (width + 2);
                    // SAFETY: phases: each piece has partials of its own.
                    let partial = unsafe { s.partials.slice_mut(at, width + 2) };
                    partial[..width].copy_from_slice(&own.acc[q * width..(q + 1) * width]);
                    partial[width] = own.max[q];
                    partial[width + 1] = own.sum[q];
                }
                continue;
            }
            own.totals.chunks_exact_mut(width + 2).take(queries.len()).for_each(attention::begin);
            for part in 0..tile.parts() {
                self.attend_part(own, index, rows, &asked, part);
                for q in 0..queries.len() {
                    let total = &mut own.totals[q * (width + 2)..(q + 1) * (width + 2)];
                    // SAFETY: these kernels are this CPU's.
                    unsafe {
                        (self.kernels.merge)(total, own.max[q], own.sum[q], &own.acc[q * width..(q + 1) * width])
                    };
                }
            }
            self.deliver(own, layer, rows, &asked);
        }
        own.tiles = tiles;
    }

    /// Finishes the queries' attention, from their totals, and puts it where the output projection wants it.
    fn deliver(self, own: &mut Own, layer: &CpuLayer, rows: &LayerRows, asked: &Asked) {
        let (s, h) = (self.s, self.h);
        let (dim, width) = (h.head_dim, padded(h.head_dim));
        let group = h.n_heads / h.n_kv_heads;
        let place = |query: usize| (asked.tile.first + query / group, (asked.head * group + query % group) * dim);
        if !self.attends_into_blocks(layer) {
            for (total, query) in own.totals.chunks_exact(width + 2).zip(asked.queries.clone()) {
                let (i, first) = place(query);
                // SAFETY: phases: this row's and this head's part; these kernels are this CPU's.
                unsafe { (self.kernels.finish)(total, s.attention.part_mut(i, first, dim)) };
            }
            return;
        }
        // All of them before any is read again, which would wait for it.
        let finished = &mut own.acc[..asked.queries.len() * dim];
        for (total, out) in own.totals.chunks_exact(width + 2).zip(finished.chunks_exact_mut(dim)) {
            // SAFETY: these kernels are this CPU's.
            unsafe { (self.kernels.finish)(total, out) };
        }
        let mut from = asked.queries.start;
        while from < asked.queries.end {
            let to = (from - from % group + group).min(asked.queries.end); // heads of a row follow one another
            let ((i, first), at) = (place(from), from - asked.queries.start);
            let heads = &finished[at * dim..(at + to - from) * dim];
            // SAFETY: phases: this row's and these heads' part; these kernels are this CPU's.
            unsafe {
                s.activations.set_blocks(self.kernels, &layer.o_needs, i, rows.keep.len(), h.q_dim(), first, heads)
            };
            from = to;
        }
    }

    /// Query vectors as [`Attend::queries`]: normed if the family norms heads, turned by their positions, and scaled to units in which scores
    /// are powers of two.
    fn load_queries(self, own: &mut Own, layer: &CpuLayer, rows: &LayerRows, asked: &Asked) {
        let (s, h) = (self.s, self.h);
        let dim = h.head_dim;
        let group = h.n_heads / h.n_kv_heads;
        let scale = std::f32::consts::LOG2_E / (dim as f32).sqrt();
        let n = asked.queries.len();
        for (q, query) in asked.queries.clone().enumerate() {
            let row = asked.tile.first + query / group;
            let first = (asked.head * group + query % group) * dim;
            let x = &mut own.row[..dim];
            // SAFETY: phases; these kernels are this CPU's.
            unsafe {
                let projected = s.q.part(rows.keep[row] as usize, first, dim);
                if h.qk_norm == QkNorm::Head {
                    (self.kernels.norm)(projected, &layer.q_norm, h.norm_eps, x);
                } else {
                    x.copy_from_slice(projected);
                }
                (self.kernels.rotate)(x, s.rope.row(self.kept(rows, row)), h.rope_pairs);
            }
            let groups = own.queries[q * GRANULE..].chunks_mut(n * GRANULE);
            for (to, x) in groups.zip(x.chunks(GRANULE)) {
                match x.first_chunk::<GRANULE>() {
                    Some(x) => to[..GRANULE].copy_from_slice(&x.map(|x| x * scale)),
                    None => to.iter_mut().zip(x).for_each(|(to, x)| *to = x * scale),
                }
            }
        }
    }

    /// One split of a tile's stored keys, or its hidden window.
    fn attend_part(self, own: &mut Own, index: usize, rows: &LayerRows, asked: &Asked, part: usize) {
        let (s, h) = (self.s, self.h);
        let layout = s.options.layout;
        let group = h.n_heads / h.n_kv_heads;
        let (tile, n) = (asked.tile, asked.queries.len());
        let is_hidden = part == tile.splits();
        let entry = &self.plan.entries[tile.entry];
        let (from, to) = if is_hidden {
            // Chunks begin at the same hidden tokens whatever the tile.
            (tile.hidden.0 - tile.hidden.0 % 16, tile.hidden.1)
        } else {
            (part * tile.split, ((part + 1) * tile.split).min(tile.stored))
        };
        for (query, sight) in asked.queries.clone().zip(&mut own.sight) {
            let row = &self.plan.rows[self.kept(rows, tile.first + query / group)];
            *sight = if is_hidden { (row.hidden_from, row.hidden_to) } else { (0, row.stored) };
        }
        let source = if is_hidden {
            Source::Hidden {
                ring: (&s.rings[index].0, &s.rings[index].1),
                ring_base: entry.seq * layout.ring_capacity,
                capacity: layout.ring_capacity,
                fresh: (&s.fresh.0, &s.fresh.1),
                first_fresh: entry.first_hidden,
                fresh_base: entry.hidden_base,
                first: tile.hidden.0,
            }
        } else {
            let blocks = &self.plan.blocks[entry.blocks.clone()];
            s.cache[index].source(blocks, layout.block * layout.stored_copies)
        };
        let width = padded(h.head_dim);
        let mut attend = Attend {
            head_dim: h.head_dim,
            head: asked.head,
            queries: &own.queries[..n * width],
            sight: &own.sight[..n],
            source,
            from,
            to,
            scratch: &mut own.attention,
            max: &mut own.max[..n],
            sum: &mut own.sum[..n],
            acc: &mut own.acc[..n * width],
        };
        // SAFETY: these kernels are this CPU's; nobody writes keys or values in this phase.
        unsafe { (self.kernels.attend)(&mut attend) }
    }

    /// Moves what later calls may see of the pass's hidden keys into the rings.
    fn keep_hidden(self, index: usize, enter: &[u32]) {
        let capacity = self.s.options.layout.ring_capacity;
        if capacity == 0 {
            return;
        }
        let (ring, fresh) = (&self.s.rings[index], &self.s.fresh);
        for i in self.w.share(enter.len(), 1) {
            let row = &self.plan.rows[enter[i] as usize];
            let entry = &self.plan.entries[row.entry as usize];
            let Store::Hidden(from) = row.store else { continue };
            let number = row.hidden_to as usize - 1;
            if number + capacity < entry.first_hidden + entry.n_hidden {
                continue;
            }
            let to = entry.seq * capacity + number % capacity;
            // SAFETY: phases: the ring's slot of this token; the pass's own rows are written by no one now.
            unsafe {
                ring.0.copy_from(to, &fresh.0, from as usize);
                ring.1.copy_from(to, &fresh.1, from as usize);
            }
        }
    }

    /// A row's attention, merged from its parts.
    fn merged(self, own: &mut Own, rows: &LayerRows, i: usize) -> Input<'a> {
        let (s, h) = (self.s, self.h);
        let out = &mut own.row[..h.q_dim()];
        let row: &Row = &self.plan.rows[self.kept(rows, i)];
        let splits = (row.stored as usize).div_ceil(split_len(row.stored as usize));
        let slots = slots(&s.options.layout);
        let width = padded(h.head_dim);
        let has_hidden = row.hidden_from < row.hidden_to;
        for (head, out) in out.chunks_exact_mut(h.head_dim).enumerate() {
            let total = &mut own.totals[..width + 2];
            attention::begin(total);
            for slot in (0..splits).chain(has_hidden.then_some(slots - 1)) {
                let at = ((i * h.n_heads + head) * slots + slot) * (width + 2);
                // SAFETY: phases; these kernels are this CPU's.
                unsafe {
                    let partial = s.partials.slice(at, width + 2);
                    (self.kernels.merge)(total, partial[width], partial[width + 1], &partial[..width]);
                }
            }
            // SAFETY: these kernels are this CPU's.
            unsafe { (self.kernels.finish)(total, out) };
        }
        Input::Own(h.q_dim())
    }

    /// Output projection of attention, and its residual.
    fn attention_output(self, own: &mut Own, layer: &CpuLayer, rows: &LayerRows) -> Option<()> {
        let n = rows.keep.len();
        let x = if self.shares_contexts(rows) {
            self.inputs(own, &layer.o_needs, n, |own, i| self.merged(own, rows, i))?
        } else if self.attends_into_blocks(layer) {
            &self.s.activations // as `attend` has left them
        } else {
            // SAFETY: phases.
            self.inputs(own, &layer.o_needs, n, |_, i| Input::Shared(unsafe { self.s.attention.row(i) }))?
        };
        self.add_to_residual(own, &layer.o, &layer.attention_norm, x, rows)
    }

    /// Gate, up and SiLU.
    fn feed_forward(self, own: &mut Own, layer: &CpuLayer, rows: &LayerRows) -> Option<()> {
        let (s, h) = (self.s, self.h);
        let n = rows.keep.len();
        let x = self.inputs(own, &layer.gate_up_needs, n, |own, i| {
            self.normed(own, self.kept(rows, i), &layer.ffn_norm, NormPlacement::Before)
        })?;
        let (gate, up) = (self.in_order(&s.gate, n), self.in_order(&s.up, n));
        for tiles in self.pieces(layer.gate.matrix.n_tiles(), 2, n) {
            self.multiply_tiles(&mut own.convert, x, &layer.gate, tiles.clone(), &gate);
            self.multiply_tiles(&mut own.convert, x, &layer.up, tiles.clone(), &up);
            let columns = tiles.start * TILE..(tiles.end * TILE).min(h.n_ff);
            for i in 0..n {
                // SAFETY: phases: as above; these kernels are this CPU's.
                unsafe {
                    let gate = s.gate.part_mut(i, columns.start, columns.len());
                    (self.kernels.silu)(gate, s.up.part(i, columns.start, columns.len()));
                    if layer.down_needs.is_int() {
                        s.gated.set_blocks(self.kernels, &layer.down_needs, i, n, h.n_ff, columns.start, gate);
                    }
                }
            }
        }
        Some(())
    }

    /// Down projection of the feed-forward, and its residual.
    fn feed_forward_output(self, own: &mut Own, layer: &CpuLayer, rows: &LayerRows) -> Option<()> {
        let s = self.s;
        let n = rows.keep.len();
        let x = if layer.down_needs.is_int() {
            &s.gated // as `feed_forward` has left them
        } else {
            // SAFETY: phases.
            self.inputs(own, &layer.down_needs, n, |_, i| Input::Shared(unsafe { s.gate.row(i) }))?
        };
        self.add_to_residual(own, &layer.down, &layer.ffn_norm, x, rows)
    }

    /// `x += W a`, or `x += norm(W a)` for families that norm after.
    fn add_to_residual(
        self,
        own: &mut Own,
        projection: &Projection,
        norm: &[f32],
        x: &Activations,
        rows: &LayerRows,
    ) -> Option<()> {
        let (s, h) = (self.s, self.h);
        let n = rows.keep.len();
        let norms_after = h.norms == NormPlacement::After;
        let to = if norms_after {
            self.in_order(&s.out, n)
        } else {
            own.rows.clear();
            own.rows.extend((0..n).map(|i| self.kept(rows, i) as u32));
            Outputs::new(&s.x, &own.rows, true)
        };
        self.multiply(&mut own.convert, x, &[(projection, to)]);
        if norms_after {
            self.meet()?;
            for i in self.w.share(n, 1) {
                let normed = &mut own.row[..h.n_embd];
                // SAFETY: phases: rows of this thread's share; these kernels are this CPU's.
                unsafe {
                    (self.kernels.norm)(s.out.row(i), norm, h.norm_eps, normed);
                    let x = s.x.row_mut(self.kept(rows, i));
                    x.iter_mut().zip(normed).for_each(|(x, n)| *x += *n);
                }
            }
        }
        Some(())
    }

    /// Output norm and LM head of the rows that came through.
    fn head(self, own: &mut Own) -> Option<()> {
        let (s, h) = (self.s, self.h);
        let n = self.plan.outputs.len();
        let (Some(rows), true) = (self.plan.layers.last(), n > 0) else { return Some(()) };
        if self.plan.is_embedding {
            for i in self.w.share(n, 1) {
                // SAFETY: phases: rows of this thread's share; these kernels are this CPU's.
                unsafe {
                    let out = s.embeddings.row_mut(self.plan.outputs[i].logits as usize);
                    (self.kernels.norm)(s.x.row(self.kept(rows, i)), &s.model.norm, h.norm_eps, out);
                }
            }
            return Some(());
        }
        let x = self.inputs(own, &s.model.head_needs, n, |own, i| {
            let row = self.kept(rows, i);
            // SAFETY: phases; these kernels are this CPU's.
            unsafe {
                (self.kernels.norm)(s.x.row(row), &s.model.norm, h.norm_eps, &mut own.row[..h.n_embd]);
            }
            Input::Own(h.n_embd)
        })?;
        own.rows.clear();
        own.rows.extend(self.plan.outputs.iter().map(|output| output.logits));
        let to = Outputs::new(&s.logits, &own.rows, false);
        for tiles in self.pieces(s.model.head.n_tiles(), self.kernels.tiles_at_once(), n) {
            // SAFETY: `inputs` has put in all rows; logits: the columns of this thread's tiles.
            unsafe { s.model.head.tiles(self.kernels, x, tiles, &mut own.convert, None, &to) };
        }
        // The threads do not meet again.
        (!self.w.is_stop_asked()).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of contexts stay few, at most [`MAX_SPLITS`], and begin where a run of the softmax does.
    #[test]
    fn contexts_have_few_splits() {
        for (stored, split) in
            [(0, 256), (1, 256), (8_192, 256), (8_193, 512), (16_384, 512), (16_385, 1_024), (1 << 20, 1 << 15)]
        {
            assert_eq!(split_len(stored), split, "{stored} keys");
        }
        for stored in (0..100_000).step_by(37) {
            let split = split_len(stored);
            assert!(stored.div_ceil(split) <= MAX_SPLITS && split.is_multiple_of(attention::RUN), "{stored} keys");
        }
    }

    /// Every piece is taken once, all of it, and each thread has as much.
    #[test]
    fn pieces_go_round() {
        for (n, threads) in (0..40).flat_map(|n| (1..18).map(move |threads| (n, threads))) {
            let cut = Cut::new(n, threads);
            let mut taken = vec![0; n]; // parts, which come in order
            for i in 0..cut.pieces() {
                let (piece, part, parts) = cut.at(i);
                assert!(part.end <= parts && (part.is_empty() || part.start == taken[piece]), "{n} for {threads}");
                taken[piece] += part.len();
                assert!(part.end < parts || taken[piece] == parts, "{n} for {threads}");
            }
            assert!(
                (0..n).all(|piece| taken[piece] == if piece < cut.whole { 1 } else { cut.parts }),
                "{n} for {threads}"
            );
            let of_thread = |thread: usize| -> f64 {
                let each = cut.pieces() / threads;
                let size = |(_, part, parts): (usize, Range<usize>, usize)| part.len() as f64 / parts as f64;
                (thread * each..(thread + 1) * each).map(|i| size(cut.at(i))).sum()
            };
            assert!((0..threads).all(|t| (of_thread(t) - n as f64 / threads as f64).abs() < 1e-9), "{n} for {threads}");
        }
    }
}
