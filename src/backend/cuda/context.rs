//! One session's cache and scratch in the device's memory, and the step: kernels in a row, replayed as a graph when they are few.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::driver::{Buffer, Event, Graph, Grid, Pinned, Stream};
use super::params::{
    Activations, Address, AttentionParams, EmbedParams, GatedParams, KeyValues, MergeParams, QkvParams, ResidualParams,
    TopParams,
};
use super::plan::{self, LayerLists, Shape, Splits};
use super::weights::{DeviceLayer, DeviceMatrix};
use super::{Cuda, FEW_ROWS, Sums, THREADS, gemm, weights};
use crate::backend::{CacheType, Context, ContextMemory, ContextOptions, TOP, Top};
use crate::cache::BlockCopy;
use crate::error::{Error, Result};
use crate::model::{Hyper, NormPlacement, QkNorm, RopePairs};
use crate::schedule::Plan;

/// Of the attention kernels.
pub const MAX_HEAD_DIM: usize = 256;
/// Queries (rows times heads of one key head) that share a read of the keys.
pub const TILE_QUERIES: usize = 64;
pub const ATTENTION_THREADS: u32 = 128;
const MAX_SPLITS: usize = 64;
/// Rows of partial attention results, splits counted.
const PARTIAL_ROWS: usize = 512;
/// Rows of logits computed at once.
const HEAD_ROWS: usize = 64;
/// Layers queued ahead of what has been computed: cancelling waits for no more than these.
const LAYERS_AHEAD: usize = 2;
/// Of the kernels `top_chunks` and `top_rows`: tokens that one block sorts, and its threads.
pub const TOP_CHUNK: usize = 4096;
pub const TOP_THREADS: u32 = 512;
/// Bytes of cached rows copied between host and device at a time; a row always fits.
const STAGED_BYTES: usize = 1 << 20;
/// Graphs that are kept.
const MAX_GRAPHS: usize = 32;

/// Keys and values of many rows in each of many layers.
struct Store {
    buffer: Buffer, // (layer, k or v, row, row_bytes)
    rows: usize,
    row_bytes: usize,
}

impl Store {
    fn new(model: &Cuda, what: &'static str, layers: usize, rows: usize, row_bytes: usize) -> Result<Store> {
        let bytes = layers * 2 * rows * row_bytes;
        // Zeros, not what was there: masked keys are multiplied by zero, which NaNs would survive.
        Ok(Store { buffer: Buffer::zeroed(&model.device, what, bytes)?, rows, row_bytes })
    }

    fn layer(&self, layer: usize) -> KeyValues {
        KeyValues { k: self.row(layer, 0, 0), v: self.row(layer, 1, 0) }
    }

    /// `part` 0: keys, 1: values.
    fn row(&self, layer: usize, part: usize, row: usize) -> Address {
        self.buffer.at(((layer * 2 + part) * self.rows + row) * self.row_bytes)
    }

    /// Copies rows in all layers.
    fn copy(&self, stream: &Stream, n_layers: usize, src: usize, dst: usize, rows: usize) -> Result<()> {
        for layer in 0..n_layers {
            for part in 0..2 {
                let (to, from) = (self.row(layer, part, dst), self.row(layer, part, src));
                // SAFETY: rows of one store; the caller copies between different blocks or sequences.
                unsafe { stream.copy(to, from, rows * self.row_bytes)? };
            }
        }
        Ok(())
    }
}

/// Bytes of a cached row on the device: see `KeyValues` in `kernels/params.cuh`.
pub fn row_bytes(kind: CacheType, kv_dim: usize) -> usize {
    kind.row_bytes(kv_dim).next_multiple_of(16)
}

/// A row as [`CacheType::Q8_0`] has it, in the device's order: all values, then all scales.
fn q8_to_device(blocks: &[u8], device: &mut [u8]) {
    let n = blocks.len() / 34;
    let (values, scales) = device.split_at_mut(n * 32);
    for ((block, values), scale) in
        blocks.chunks_exact(34).zip(values.chunks_exact_mut(32)).zip(scales.chunks_exact_mut(2))
    {
        scale.copy_from_slice(&block[..2]);
        values.copy_from_slice(&block[2..]);
    }
}

fn q8_from_device(device: &[u8], blocks: &mut [u8]) {
    let n = blocks.len() / 34;
    let (values, scales) = device.split_at(n * 32);
    for ((block, values), scale) in blocks.chunks_exact_mut(34).zip(values.chunks_exact(32)).zip(scales.chunks_exact(2))
    {
        block[..2].copy_from_slice(scale);
        block[2..].copy_from_slice(values);
    }
}

/// A cached row in the device's order, without padding.
fn to_device(kind: CacheType, row: &[u8], device: &mut [u8]) {
    match kind {
        CacheType::Q8_0 => q8_to_device(row, device),
        _ => device[..row.len()].copy_from_slice(row),
    }
}

fn from_device(kind: CacheType, device: &[u8], row: &mut [u8]) {
    match kind {
        CacheType::Q8_0 => q8_from_device(device, row),
        _ => row.copy_from_slice(&device[..row.len()]),
    }
}

/// Activations with their memory.
struct Input {
    hi: Buffer,
    lo: Buffer,
    exact: Option<Buffer>,
    sums: Option<Buffer>,
    stride: usize,
}

impl Input {
    fn new(model: &Cuda, rows: usize, n: usize) -> Result<Input> {
        let stride = n.next_multiple_of(32);
        let (exact, sums) = model.needs();
        let new = |bytes: usize| Buffer::new(&model.device, SCRATCH, rows * bytes);
        Ok(Input {
            hi: new(stride * 2)?,
            lo: new(stride * 2)?,
            exact: exact.then(|| new(stride * 4)).transpose()?,
            sums: sums.then(|| new(stride / 16 * 4)).transpose()?,
            stride,
        })
    }

    /// From a row on.
    fn from(&self, row: usize) -> Activations {
        let at = |buffer: &Option<Buffer>, bytes: usize| buffer.as_ref().map_or(0, |b| b.at(row * bytes));
        Activations {
            hi: self.hi.at(row * self.stride * 2),
            lo: self.lo.at(row * self.stride * 2),
            exact: at(&self.exact, self.stride * 4),
            sums: at(&self.sums, self.stride / 16 * 4),
            stride: self.stride as u32,
            unused: 0,
        }
    }

    fn bytes(&self) -> usize {
        let more = |b: &Option<Buffer>| b.as_ref().map_or(0, Buffer::bytes);
        self.hi.bytes() + self.lo.bytes() + more(&self.exact) + more(&self.sums)
    }
}

const SCRATCH: &str = "scratch in device memory";

fn float_bytes(what: &'static str, rows: usize, width: usize) -> Result<usize> {
    let bytes = rows.checked_mul(width).and_then(|n| n.checked_mul(4));
    bytes.ok_or(Error::OutOfMemory { what, bytes: usize::MAX })
}

/// A panic elsewhere leaves nothing half done behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What the kernels work on. Its methods queue work and return; [`CudaContext`] waits for it.
struct Step {
    // Dropped first: it waits for what is queued before the memory goes.
    stream: Stream,
    ahead: [Event; LAYERS_AHEAD],
    model: Arc<Cuda>,
    options: ContextOptions,
    cache: Store,
    rings: Store,
    fresh: Store,    // one layer's; (hidden row of the pass)
    x: [Buffer; 2],  // (row, n_embd): the residual stream, before and after
    q: Buffer,       // (entering row, q_dim)
    k: Buffer,       // (entering row, kv_dim)
    v: Buffer,       // (entering row, kv_dim)
    partial: Buffer, // (row that goes on, head, split, head_dim + 2)
    gate: Buffer,    // (row that goes on, n_ff), or nothing if it is always computed together with up
    up: Buffer,      // the same
    out: Buffer,     // (row that goes on, n_embd)
    normed: Buffer,  // (output, n_embd), of passes that make embeddings
    head: Buffer,    // (output, up to HEAD_ROWS of them; n_vocab)
    tops: Option<Tops>,
    logits: Buffer,   // (logits row, n_vocab)
    input: Input,     // of n_embd
    attended: Input,  // of q_dim
    activated: Input, // of n_ff
    gemm: Mutex<Option<gemm::Workspace>>,
    sums: Sums,
    splits: Splits,
    plan: Buffer, // see plan.rs
}

/// Where the best tokens of outputs are found.
struct Tops {
    n_chunks: usize,
    keys: Buffer,   // (output, chunk, TOP)
    parts: Buffer,  // (output, chunk, 2)
    tokens: Buffer, // (output, TOP)
    values: Buffer, // (output, TOP)
    totals: Buffer, // (output)
}

/// A row of logits as the host knows it.
struct Row {
    /// Its logits have been copied to the host, or put there.
    is_here: AtomicBool,
    /// How many of the best are in `CudaContext::best_tokens`.
    n_best: usize,
    /// See [`Top::total`].
    total: f32,
}

pub struct CudaContext {
    graphs: VecDeque<(Shape, Graph)>,
    step: Step,
    packed: Pinned,        // the plan, on the host
    shape: Shape,          // of the running pass
    logits: Pinned,        // (logits row, n_vocab): copied when they are asked for
    rows: Vec<Row>,        // (logits row)
    best_tokens: Vec<u32>, // (logits row, TOP)
    best_values: Vec<f32>, // (logits row, TOP)
    found: [Pinned; 3],    // (output, TOP): tokens and values of the running pass; (output): totals
    embeddings: Pinned,    // (embedding, n_embd)
    /// (k or v, row, row_bytes): cached rows in the device's order. Held by whoever copies between host and device aside of a pass.
    staged: Mutex<Pinned>,
}

/// Bytes of dynamic shared memory of `attention_mma_*`: two tiles of 64 keys, and of as many values, in f16, each row with 16 bytes
/// between it and the next.
pub fn mma_shared(head_dim: usize) -> usize {
    2 * 2 * 64 * (2 * head_dim + 16)
}

/// The same of `attention_plain`: 16 queries, 64 keys.
pub fn plain_shared(head_dim: usize) -> usize {
    4 * (16 * head_dim + 64 * (head_dim | 1))
}

/// The same of `qkv_finish`: a row.
pub fn qkv_shared(h: &Hyper) -> usize {
    4 * h.q_dim().max(h.kv_dim())
}

impl CudaContext {
    pub fn new(model: Arc<Cuda>, options: &ContextOptions) -> Result<CudaContext> {
        let h = model.hyper.clone();
        let layout = options.layout;
        let rows = options.max_rows;
        let row_bytes = row_bytes(options.cache_type, h.kv_dim());
        let scratch = |rows, width| Buffer::new(&model.device, SCRATCH, float_bytes(SCRATCH, rows, width)?);
        let host = |what, rows, width| Pinned::new(&model.device, what, float_bytes(what, rows, width)?);
        let n_blocks = layout.n_blocks * layout.n_sequences;
        let plan_bytes = plan::capacity(&h, rows, layout.n_sequences, n_blocks);
        if plan_bytes > u32::MAX as usize {
            return Err(Error::OutOfMemory { what: "the plan of a pass", bytes: plan_bytes });
        }
        let gemm = match &model.gemm {
            Some(gemm) if rows > FEW_ROWS && !options.batch_invariant => {
                let pitch = |n: usize| n.next_multiple_of(32) * 2;
                let converted = model.weights.matrices().map(|m| m.strips() * weights::STRIP * pitch(m.n_in));
                let strip = model.weights.matrices().map(|m| weights::STRIP * pitch(m.n_in)).max().unwrap_or(0);
                Some(gemm::Workspace::new(&model.device, gemm.clone(), strip, converted.max().unwrap_or(0))?)
            }
            _ => None,
        };
        let is_apart = gemm.is_some() || model.weights.layers.iter().any(|l| l.gate.dtype != l.up.dtype);
        let rows_apart = if is_apart { rows } else { 0 };
        let n_head = options.n_logits.clamp(1, HEAD_ROWS);
        // Two blocks to each multiprocessor.
        let wanted = (2 * model.device.n_multiprocessors).div_ceil(h.n_kv_heads);
        let longest = layout.n_positions * layout.stored_copies;
        let most = wanted.min(longest.div_ceil(plan::SPLIT_ROWS)).clamp(1, MAX_SPLITS);
        let splits = match options.batch_invariant {
            false => Splits { wanted, most, room: rows.max(PARTIAL_ROWS), is_invariant: false },
            true => Splits { wanted, most, room: rows.min(FEW_ROWS) * (most + 1), is_invariant: true },
        };
        let staged_bytes = 2 * row_bytes * (STAGED_BYTES / (2 * row_bytes)).clamp(1, layout.cache_rows());
        let step = Step {
            cache: Store::new(&model, "the KV cache in device memory", h.n_layers, layout.cache_rows(), row_bytes)?,
            rings: Store::new(&model, "the rings in device memory", h.n_layers, layout.ring_rows(), row_bytes)?,
            fresh: Store::new(&model, SCRATCH, 1, rows, row_bytes)?,
            x: [scratch(rows, h.n_embd)?, scratch(rows, h.n_embd)?],
            q: scratch(rows, h.q_dim())?,
            k: scratch(rows, h.kv_dim())?,
            v: scratch(rows, h.kv_dim())?,
            partial: scratch(splits.room * h.n_heads, h.head_dim + 2)?,
            gate: scratch(rows_apart, h.n_ff)?,
            up: scratch(rows_apart, h.n_ff)?,
            out: scratch(rows, h.n_embd)?,
            normed: scratch(rows, h.n_embd)?,
            head: scratch(n_head, h.n_vocab)?,
            input: Input::new(&model, rows, h.n_embd)?,
            attended: Input::new(&model, rows, h.q_dim())?,
            activated: Input::new(&model, rows, h.n_ff)?,
            tops: Tops::new(&model, n_head)?,
            logits: scratch(options.n_logits, h.n_vocab)?,
            gemm: Mutex::new(gemm),
            sums: match (options.batch_invariant, model.is_exact) {
                (true, _) => Sums::Invariant,
                (false, true) => Sums::Exact,
                (false, false) => Sums::Fast,
            },
            splits,
            plan: Buffer::new(&model.device, SCRATCH, plan_bytes)?,
            stream: Stream::new(&model.device)?,
            ahead: [Event::new(&model.device)?, Event::new(&model.device)?],
            options: *options,
            model: model.clone(),
        };
        Ok(CudaContext {
            graphs: VecDeque::with_capacity(MAX_GRAPHS),
            packed: Pinned::new(&model.device, "scratch", plan_bytes)?,
            shape: Shape { layers: Vec::with_capacity(h.n_layers), ..Shape::default() },
            logits: host("the logits", options.n_logits, h.n_vocab)?,
            rows: (0..options.n_logits).map(|_| Row::put()).collect(),
            best_tokens: vec![0; options.n_logits * TOP],
            best_values: vec![0.0; options.n_logits * TOP],
            found: [host("scratch", n_head, TOP)?, host("scratch", n_head, TOP)?, host("scratch", n_head, 1)?],
            embeddings: host("the embeddings", options.n_embeddings, h.n_embd)?,
            staged: Mutex::new(Pinned::new(&model.device, "scratch", staged_bytes)?),
            step,
        })
    }

    fn pass(&mut self, plan: &Plan, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        if cancelled() {
            return Err(Error::Cancelled);
        }
        let model = self.step.model.clone();
        let packed = self.packed.as_mut_slice();
        let used = plan::pack(plan, &model.hyper, TILE_QUERIES, &self.step.splits, packed, &mut self.shape);
        // SAFETY: both buffers have the capacity of any plan; nothing writes `packed` before the pass has been waited for.
        unsafe { self.step.stream.upload(self.step.plan.address(), &self.packed.as_slice()[..used])? };
        let n_outputs = plan.outputs.len();
        let at_once = self.step.head_rows();
        if self.shape.n_rows() <= FEW_ROWS && n_outputs <= at_once {
            self.replay()?;
            return self.fetch(plan, 0, n_outputs);
        }
        self.step.layers(&self.shape, Some(cancelled))?;
        for first in (0..n_outputs).step_by(at_once) {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let n = at_once.min(n_outputs - first);
            self.step.outputs(&self.shape, first, n)?;
            self.fetch(plan, first, n)?;
        }
        Ok(())
    }

    /// The pass as a graph, captured if it is the first of its shape.
    fn replay(&mut self) -> Result<()> {
        if let Some(at) = self.graphs.iter().position(|(shape, _)| *shape == self.shape) {
            // The most recently used one comes last.
            let known = self.graphs.remove(at).expect("found");
            self.graphs.push_back(known);
        } else {
            let (step, shape) = (&self.step, &self.shape);
            let all = || {
                step.layers(shape, None)?;
                step.outputs(shape, 0, shape.n_outputs as usize)
            };
            let graph = match step.stream.capture(all) {
                // A graph takes memory, which may be had by no more than launching its kernels one by one.
                Err(Error::OutOfMemory { .. }) => return all(),
                captured => captured?,
            };
            if self.graphs.len() == MAX_GRAPHS {
                self.graphs.pop_front();
            }
            self.graphs.push_back((shape.clone(), graph));
        }
        let (_, graph) = self.graphs.back().expect("one was put there");
        // SAFETY: it was captured of this context's buffers, which live as long as it does.
        unsafe { self.step.stream.launch_graph(graph) }
    }

    /// Takes outputs to where they belong.
    fn fetch(&mut self, plan: &Plan, first: usize, n: usize) -> Result<()> {
        let h = &self.step.model.hyper;
        let step = &self.step;
        let outputs = &plan.outputs[first..first + n];
        if plan.is_embedding {
            for (i, output) in outputs.iter().enumerate() {
                let to = &mut self.embeddings.as_mut_slice()[output.logits as usize * h.n_embd * 4..][..h.n_embd * 4];
                // Embeddings are computed all at once, logits piece by piece.
                // SAFETY: `run` waits for the stream before anyone can look.
                unsafe { step.stream.download(to, step.normed.at((first + i) * h.n_embd * 4))? };
            }
            return Ok(());
        }
        let bytes = h.n_vocab * 4;
        for (i, output) in outputs.iter().enumerate() {
            let row = output.logits as usize;
            // SAFETY: rows of two buffers.
            unsafe { step.stream.copy(step.logits.at(row * bytes), step.head.at(i * bytes), bytes)? };
            *self.rows[row].is_here.get_mut() = false;
            self.rows[row].n_best = 0;
        }
        let Some(tops) = &step.tops else { return Ok(()) };
        for (to, from) in self.found.iter_mut().zip([&tops.tokens, &tops.values, &tops.totals]) {
            let bytes = to.bytes() / step.head_rows() * n;
            // SAFETY: waited for right below.
            unsafe { step.stream.download(&mut to.as_mut_slice()[..bytes], from.address())? };
        }
        step.stream.synchronize()?;
        let [tokens, values, totals] = &self.found;
        for (i, output) in outputs.iter().enumerate() {
            let row = output.logits as usize;
            let (found, best) = (i * TOP..(i + 1) * TOP, row * TOP..(row + 1) * TOP);
            self.best_values[best.clone()].copy_from_slice(&values.floats()[found.clone()]);
            let best = &mut self.best_tokens[best];
            best.iter_mut().zip(&tokens.floats()[found]).for_each(|(b, t)| *b = t.to_bits());
            self.rows[row].n_best = best.iter().take_while(|&&t| t != u32::MAX).count();
            self.rows[row].total = totals.floats()[i];
        }
        Ok(())
    }

    /// Copies a row of logits to the host, unless it is there.
    fn bring(&self, row: usize) -> Result<()> {
        let n = self.step.model.hyper.n_vocab * 4;
        let _one_at_a_time = lock(&self.staged);
        if self.rows[row].is_here.load(Ordering::Acquire) {
            return Ok(());
        }
        self.step.wait_for(|step| {
            // SAFETY: nobody has seen this row of the host's since it was written on the device.
            let to = unsafe { self.logits.part(row * n..(row + 1) * n) };
            // SAFETY: waited for.
            unsafe { step.stream.download(to, step.logits.at(row * n)) }
        })?;
        self.rows[row].is_here.store(true, Ordering::Release);
        Ok(())
    }
}

impl Row {
    /// One that the device has not computed.
    fn put() -> Row {
        Row { is_here: AtomicBool::new(true), n_best: 0, total: 0.0 }
    }
}

impl Step {
    /// Of the cache: its type, the bytes of a row, and those it takes here.
    fn row_shape(&self) -> (CacheType, usize, usize) {
        let kind = self.options.cache_type;
        (kind, kind.row_bytes(self.model.hyper.kv_dim()), self.cache.row_bytes)
    }

    /// Queues `work` and waits until it is through, also the part of it that was queued before something failed.
    fn wait_for(&self, work: impl FnOnce(&Step) -> Result<()>) -> Result<()> {
        let _entered = self.model.device.enter()?;
        let queued = work(self);
        let waited = self.stream.synchronize();
        queued.and(waited)
    }

    fn head_rows(&self) -> usize {
        self.head.bytes() / (4 * self.model.hyper.n_vocab)
    }

    /// One block to each of `rows`, with a row of `width` floats in shared memory.
    fn by_row(rows: usize, width: usize) -> Grid {
        Grid { blocks: (rows, 1, 1), threads: THREADS, shared: width * 4 }
    }

    /// Queues linear layers.
    ///
    /// # Safety
    /// As [`Cuda::linear`].
    unsafe fn linear(&self, x: Activations, matrices: &[(&DeviceMatrix, Address)], rows: usize) -> Result<()> {
        let mut gemm = lock(&self.gemm);
        // SAFETY: the caller's promise.
        unsafe { self.model.linear(&self.stream, x, matrices, rows, self.sums, gemm.as_mut()) }
    }

    /// Queues gate and up: `activated` from `input`.
    ///
    /// # Safety
    /// As [`Cuda::linear`].
    unsafe fn gated(&self, layer: &DeviceLayer, rows: usize) -> Result<()> {
        let model = &*self.model;
        let (x, act) = (self.input.from(0), self.activated.from(0));
        let is_product = rows > FEW_ROWS && lock(&self.gemm).is_some();
        if layer.gate.dtype == layer.up.dtype && !is_product {
            // SAFETY: the caller's promise.
            return unsafe { model.linear_gated(&self.stream, x, [&layer.gate, &layer.up], act, rows, self.sums) };
        }
        let (gate, up, n) = (self.gate.address(), self.up.address(), model.hyper.n_ff);
        let params = GatedParams { gate, up, act, rows: rows as u32, n: n as u32 };
        // SAFETY: the caller's promise; gate and up have room, see `new`.
        unsafe {
            self.linear(x, &[(&layer.gate, gate), (&layer.up, up)], rows)?;
            self.stream.launch(model.kernels.gated, Self::by_row(rows, n), &params)
        }
    }

    /// Queues all layers, and the output norm. With `cancelled`, which is asked between layers, it waits for earlier ones.
    fn layers(&self, shape: &Shape, cancelled: Option<&(dyn Fn() -> bool + Sync)>) -> Result<()> {
        let model = &*self.model;
        let h = &*model.hyper;
        let base = self.plan.address();
        self.embed(shape)?;
        let before = |weight: Address| if h.norms == NormPlacement::Before { weight } else { 0 };
        let after = |weight: Address| if h.norms == NormPlacement::After { weight } else { 0 };
        let [mut x, mut x_next] = [&self.x[0], &self.x[1]];
        let first = ResidualParams {
            x_in: x.address(),
            norm: before(model.weights.layers[0].attention_norm),
            act: self.input.from(0),
            rows: shape.tokens.n,
            n: h.n_embd as u32,
            eps: h.norm_eps,
            ..ResidualParams::default()
        };
        // SAFETY: here and below: the buffers have room for the rows of any pass, and live until the stream is through.
        unsafe { self.stream.launch(model.kernels.residual_norm, Self::by_row(shape.n_rows(), h.n_embd), &first)? };
        for (i, layer) in model.weights.layers.iter().enumerate() {
            if let Some(cancelled) = cancelled {
                let event = &self.ahead[i % LAYERS_AHEAD];
                if i >= LAYERS_AHEAD {
                    event.wait()?;
                }
                if cancelled() {
                    return Err(Error::Cancelled);
                }
            }
            let lists = &shape.layers[i];
            self.attention(shape, i, layer, lists)?;
            let n_keep = lists.keep.len();
            let out = self.out.address();
            // SAFETY: as above.
            unsafe {
                self.linear(self.attended.from(0), &[(&layer.o, out)], n_keep)?;
            }
            let residual = ResidualParams {
                x_in: x.address(),
                gather: lists.keep.at(base),
                add: out,
                add_norm: after(layer.attention_norm),
                x_out: x_next.address(),
                norm: before(layer.ffn_norm),
                rows: n_keep as u32,
                ..first
            };
            let grid = Self::by_row(n_keep, h.n_embd);
            // SAFETY: as above.
            unsafe { self.stream.launch(model.kernels.residual_norm, grid, &residual)? };
            (x, x_next) = (x_next, x);
            // SAFETY: as above.
            unsafe {
                self.gated(layer, n_keep)?;
                self.linear(self.activated.from(0), &[(&layer.down, out)], n_keep)?;
            }
            let next = model.weights.layers.get(i + 1);
            let residual = ResidualParams {
                x_in: x.address(),
                gather: 0,
                add_norm: after(layer.ffn_norm),
                x_out: x_next.address(),
                norm: next.map_or(model.weights.norm, |l| before(l.attention_norm)),
                normed: if next.is_none() && shape.is_embedding { self.normed.address() } else { 0 },
                ..residual
            };
            // SAFETY: as above.
            unsafe { self.stream.launch(model.kernels.residual_norm, grid, &residual)? };
            (x, x_next) = (x_next, x);
            if cancelled.is_some() {
                self.stream.record(&self.ahead[i % LAYERS_AHEAD])?;
            }
        }
        Ok(())
    }

    fn embed(&self, shape: &Shape) -> Result<()> {
        let model = &*self.model;
        let base = self.plan.address();
        for (i, table) in model.weights.embeddings.iter().enumerate() {
            if shape.tables_used.get(i / 32).is_none_or(|bits| bits >> (i % 32) & 1 == 0) {
                continue;
            }
            let params = EmbedParams {
                weights: table.weights,
                tokens: shape.tokens.at(base),
                tables: shape.tables.at(base),
                x: self.x[0].address(),
                table: i as u32,
                n: table.n_in as u32,
                rows: shape.tokens.n,
                unused: 0,
            };
            // SAFETY: see `layers`.
            unsafe {
                self.stream.launch(model.kernels.embed[&table.dtype], Self::by_row(shape.n_rows(), 0), &params)?;
            }
        }
        Ok(())
    }

    /// Queries, keys, values; attention; the rings.
    fn attention(&self, shape: &Shape, index: usize, layer: &DeviceLayer, lists: &LayerLists) -> Result<()> {
        let model = &*self.model;
        let h = &*model.hyper;
        let base = self.plan.address();
        let (n_enter, n_keep) = (lists.enter.len(), lists.keep.len());
        let (q, k, v) = (self.q.address(), self.k.address(), self.v.address());
        let three = [(&layer.q, q), (&layer.k, k), (&layer.v, v)];
        // SAFETY: see `layers`.
        unsafe { self.linear(self.input.from(0), &three, n_enter)? };
        let cache_type = self.options.cache_type as u32;
        let (cache, ring, fresh) = (self.cache.layer(index), self.rings.layer(index), self.fresh.layer(0));
        let row_bytes = self.cache.row_bytes as u32;
        let (n_heads, n_kv_heads, head_dim) = (h.n_heads as u32, h.n_kv_heads as u32, h.head_dim as u32);
        let (rows, enter) = (shape.rows.at(base), lists.enter.at(base));
        let finish = QkvParams {
            q,
            k,
            v,
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            rope: shape.rope.at(base),
            rows,
            enter,
            cache,
            fresh,
            n: lists.enter.n,
            n_heads,
            n_kv_heads,
            head_dim,
            n_rope: h.rope_frequencies.len() as u32,
            adjacent: (h.rope_pairs == RopePairs::Adjacent).into(),
            norm_whole: (h.qk_norm == QkNorm::Projection).into(),
            cache_type,
            row_bytes,
            eps: h.norm_eps,
        };
        let grid = Grid { blocks: (n_enter, 3, 1), threads: ATTENTION_THREADS, shared: qkv_shared(h) };
        // SAFETY: see `layers`.
        unsafe { self.stream.launch(model.kernels.qkv_finish, grid, &finish)? };

        let splits = lists.splits as usize;
        let partial = self.partial.address();
        let attention = AttentionParams {
            q,
            rows,
            enter,
            keep: lists.keep.at(base),
            tiles: lists.tiles.at(base),
            entries: shape.entries.at(base),
            blocks: shape.blocks(base),
            cache,
            ring,
            fresh,
            partial,
            first: 0,
            n: lists.keep.n,
            n_heads,
            n_kv_heads,
            head_dim,
            splits: splits as u32,
            rows_per_block: (self.options.layout.block * self.options.layout.stored_copies) as u32,
            ring_capacity: self.options.layout.ring_capacity as u32,
            cache_type,
            row_bytes,
            is_invariant: self.splits.is_invariant.into(),
            scale: 1.0 / (h.head_dim as f32).sqrt(),
        };
        let mma = match self.options.cache_type {
            CacheType::F32 => None,
            CacheType::F16 | CacheType::Q8_0 => model.kernels.attention_mma,
            CacheType::Bf16 => model.kernels.attention_mma_bf16,
        };
        let (kernel, shared) = match mma {
            Some(kernel) => (kernel, mma_shared(h.head_dim)),
            None => (model.kernels.attention_plain, plain_shared(h.head_dim)),
        };
        let grid = Grid { blocks: (lists.tiles.len(), h.n_kv_heads, splits), threads: ATTENTION_THREADS, shared };
        // Heads that make up whole parts of 32 values, see `MergeParams`.
        let heads = (1..=h.n_heads).find(|n| (n * h.head_dim).is_multiple_of(32)).unwrap_or(h.n_heads);
        let merge = MergeParams {
            partial,
            act: self.attended.from(0),
            rows,
            enter,
            entries: shape.entries.at(base),
            ring,
            fresh,
            n: 0,
            n_heads,
            head_dim,
            heads: heads as u32,
            splits: lists.splits,
            ring_capacity: self.options.layout.ring_capacity as u32,
            row_bytes,
            unused: 0,
        };
        let at_once = self.splits.rows_at_once(n_keep).max(1);
        // Once, too, if no row goes on: hidden ones are kept.
        for first in (0..n_keep.max(1)).step_by(at_once) {
            let n = at_once.min(n_keep - first);
            // Rings change when nobody reads them any more.
            let is_last = first + n == n_keep;
            let n_kept = if is_last && self.options.layout.ring_capacity > 0 { n_enter } else { 0 };
            let attention = AttentionParams { first: first as u32, n: n as u32, ..attention };
            let merge = MergeParams { n: n as u32, act: self.attended.from(first), ..merge };
            let blocks = (n + n_kept, h.n_heads.div_ceil(heads), 1);
            let merge_grid = Grid { blocks, threads: ATTENTION_THREADS, shared: heads * h.head_dim * 4 };
            // SAFETY: see `layers`.
            unsafe {
                self.stream.launch(kernel, grid, &attention)?;
                self.stream.launch(model.kernels.attention_merge, merge_grid, &merge)?;
            }
        }
        Ok(())
    }

    /// Queues the LM head for outputs `first..first + n`, into the first rows of `head`.
    fn outputs(&self, shape: &Shape, first: usize, n: usize) -> Result<()> {
        if shape.is_embedding {
            return Ok(());
        }
        let head = [(&self.model.weights.head, self.head.address())];
        // SAFETY: see `layers`.
        unsafe { self.linear(self.input.from(first), &head, n)? };
        let Some(tops) = &self.tops else { return Ok(()) };
        let params = TopParams {
            logits: self.head.address(),
            keys: tops.keys.address(),
            tokens: tops.tokens.address(),
            values: tops.values.address(),
            parts: tops.parts.address(),
            totals: tops.totals.address(),
            n_vocab: self.model.hyper.n_vocab as u32,
            n_chunks: tops.n_chunks as u32,
        };
        let grid = |x: usize, y: usize| Grid { blocks: (x, y, 1), threads: TOP_THREADS, shared: 0 };
        // SAFETY: see `layers`.
        unsafe {
            self.stream.launch(self.model.kernels.top_chunks, grid(tops.n_chunks, n), &params)?;
            self.stream.launch(self.model.kernels.top_rows, grid(n, 1), &params)
        }
    }
}

impl Tops {
    /// For up to `rows` outputs at once. `None` for vocabularies larger than the kernels merge.
    fn new(model: &Cuda, rows: usize) -> Result<Option<Tops>> {
        let n_chunks = model.hyper.n_vocab.div_ceil(TOP_CHUNK);
        if n_chunks * TOP > TOP_CHUNK {
            return Ok(None);
        }
        let new = |bytes: usize| Buffer::new(&model.device, SCRATCH, rows * bytes);
        Ok(Some(Tops {
            n_chunks,
            keys: new(n_chunks * TOP * 8)?,
            parts: new(n_chunks * 8)?,
            tokens: new(TOP * 4)?,
            values: new(TOP * 4)?,
            totals: new(4)?,
        }))
    }

    fn bytes(&self) -> usize {
        [&self.keys, &self.parts, &self.tokens, &self.values, &self.totals].into_iter().map(Buffer::bytes).sum()
    }
}

impl Context for CudaContext {
    fn run(&mut self, plan: &Plan, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let model = self.step.model.clone();
        let _entered = model.device.enter()?;
        let done = self.pass(plan, cancelled);
        // Whatever became of it: what is queued must be through before the host goes on.
        let waited = self.step.stream.synchronize();
        done.and(waited)
    }

    fn logits(&self, row: usize) -> Result<&[f32]> {
        self.bring(row)?;
        let n = self.step.model.hyper.n_vocab;
        Ok(&self.logits.floats()[row * n..(row + 1) * n])
    }

    fn put_logits(&mut self, row: usize, logits: &[f32]) {
        self.rows[row] = Row::put();
        let n = self.step.model.hyper.n_vocab;
        self.logits.floats_mut()[row * n..(row + 1) * n].copy_from_slice(logits);
    }

    fn top(&self, row: usize) -> Option<Top<'_>> {
        let best = row * TOP..row * TOP + self.rows[row].n_best;
        let total = f64::from(self.rows[row].total);
        (!best.is_empty()).then(|| Top {
            tokens: &self.best_tokens[best.clone()],
            logits: &self.best_values[best],
            total,
        })
    }

    fn logit(&self, row: usize, token: usize) -> Result<f32> {
        if self.rows[row].is_here.load(Ordering::Acquire) {
            return Ok(self.logits(row)?[token]);
        }
        let at = self.step.logits.at((row * self.step.model.hyper.n_vocab + token) * 4);
        let mut staged = lock(&self.staged);
        let to = &mut staged.as_mut_slice()[..4];
        // SAFETY: waited for.
        self.step.wait_for(|step| unsafe { step.stream.download(to, at) })?;
        Ok(staged.floats()[0])
    }

    fn copy_logits(&mut self, src: usize, dst: usize) -> Result<()> {
        if src == dst {
            return Ok(());
        }
        let n = self.step.model.hyper.n_vocab;
        if *self.rows[src].is_here.get_mut() {
            self.logits.floats_mut().copy_within(src * n..(src + 1) * n, dst * n);
        } else {
            let step = &self.step;
            let _entered = step.model.device.enter()?;
            // SAFETY: different rows of one buffer.
            unsafe { step.stream.copy(step.logits.at(dst * n * 4), step.logits.at(src * n * 4), n * 4)? };
        }
        *self.rows[dst].is_here.get_mut() = *self.rows[src].is_here.get_mut();
        (self.rows[dst].n_best, self.rows[dst].total) = (self.rows[src].n_best, self.rows[src].total);
        self.best_tokens.copy_within(src * TOP..(src + 1) * TOP, dst * TOP);
        self.best_values.copy_within(src * TOP..(src + 1) * TOP, dst * TOP);
        Ok(())
    }

    fn embedding(&self, row: usize) -> &[f32] {
        let n = self.step.model.hyper.n_embd;
        &self.embeddings.floats()[row * n..(row + 1) * n]
    }

    fn copy_block(&mut self, copy: BlockCopy) -> Result<()> {
        let layout = self.step.options.layout;
        let rows_per_block = layout.block * layout.stored_copies;
        let (src, dst) = (copy.src as usize * rows_per_block, copy.dst as usize * rows_per_block);
        let n = copy.n_positions * layout.stored_copies;
        let _entered = self.step.model.device.enter()?;
        self.step.cache.copy(&self.step.stream, self.step.model.hyper.n_layers, src, dst, n)
    }

    fn copy_rings(&mut self, src: usize, dst: usize) -> Result<()> {
        let capacity = self.step.options.layout.ring_capacity;
        if src == dst || capacity == 0 {
            return Ok(());
        }
        let _entered = self.step.model.device.enter()?;
        let (src, dst) = (src * capacity, dst * capacity);
        self.step.rings.copy(&self.step.stream, self.step.model.hyper.n_layers, src, dst, capacity)
    }

    fn read_rows(&self, layer: usize, first: usize, rows: &mut [u8]) -> Result<()> {
        let (kind, n, padded) = self.step.row_shape();
        let mut staged = lock(&self.staged);
        let at_once = staged.bytes() / (2 * padded);
        for (i, rows) in rows.chunks_mut(at_once * 2 * n).enumerate() {
            let (first, bytes) = (first + i * at_once, rows.len() / (2 * n) * padded);
            let (keys, values) = staged.as_mut_slice()[..2 * bytes].split_at_mut(bytes);
            // SAFETY: rows of the cache; waited for.
            self.step.wait_for(|step| unsafe {
                step.stream.download(keys, step.cache.row(layer, 0, first))?;
                step.stream.download(values, step.cache.row(layer, 1, first))
            })?;
            let from = keys.chunks_exact(padded).zip(values.chunks_exact(padded));
            for (row, (key, value)) in rows.chunks_exact_mut(2 * n).zip(from) {
                let (k, v) = row.split_at_mut(n);
                from_device(kind, key, k);
                from_device(kind, value, v);
            }
        }
        Ok(())
    }

    fn write_rows(&mut self, layer: usize, first: usize, rows: &[u8]) -> Result<()> {
        let (kind, n, padded) = self.step.row_shape();
        let mut staged = lock(&self.staged);
        let at_once = staged.bytes() / (2 * padded);
        for (i, rows) in rows.chunks(at_once * 2 * n).enumerate() {
            let (first, bytes) = (first + i * at_once, rows.len() / (2 * n) * padded);
            let (keys, values) = staged.as_mut_slice()[..2 * bytes].split_at_mut(bytes);
            let to = keys.chunks_exact_mut(padded).zip(values.chunks_exact_mut(padded));
            for (row, (key, value)) in rows.chunks_exact(2 * n).zip(to) {
                let (k, v) = row.split_at(n);
                to_device(kind, k, key);
                to_device(kind, v, value);
            }
            // SAFETY: rows of the cache; waited for.
            self.step.wait_for(|step| unsafe {
                step.stream.upload(step.cache.row(layer, 0, first), keys)?;
                step.stream.upload(step.cache.row(layer, 1, first), values)
            })?;
        }
        Ok(())
    }

    fn memory(&self) -> ContextMemory {
        let s = &self.step;
        let buffers = [
            &s.x[0], &s.x[1], &s.q, &s.k, &s.v, &s.partial, &s.gate, &s.up, &s.out, &s.normed, &s.head, &s.logits,
            &s.plan,
        ];
        let inputs = [&s.input, &s.attended, &s.activated];
        let gemm = lock(&s.gemm);
        ContextMemory {
            cache: s.cache.buffer.bytes(),
            hidden: s.rings.buffer.bytes(),
            scratch: buffers.into_iter().map(Buffer::bytes).sum::<usize>()
                + inputs.into_iter().map(Input::bytes).sum::<usize>()
                + s.fresh.buffer.bytes()
                + s.tops.as_ref().map_or(0, Tops::bytes)
                + (self.best_tokens.len() + self.best_values.len()) * 4
                + gemm.as_ref().map_or(0, gemm::Workspace::bytes)
                + lock(&self.staged).bytes()
                + self
                    .found
                    .iter()
                    .chain([&self.packed, &self.logits, &self.embeddings])
                    .map(Pinned::bytes)
                    .sum::<usize>(),
        }
    }
}
