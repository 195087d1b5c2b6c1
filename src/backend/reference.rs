//! Plain f32 on one thread: obviously right, and the oracle of the other backends.
//!
//! Weights stay as they are stored; a row is converted when it is used, once for all rows of the pass.

use std::sync::Arc;

use super::{Backend, CacheType, Context, ContextMemory, ContextOptions};
use crate::cache::BlockCopy;
use crate::error::{Error, Result};
use crate::model::{Hyper, Layer, Linear, NormPlacement, QkNorm, RopePairs, Weights};
use crate::schedule::{Plan, Row, Rules, Store};
use crate::tensor::{DType, dequantize_row};

pub struct Reference {
    hyper: Arc<Hyper>,
    weights: Weights,
}

impl Reference {
    pub fn new(hyper: Arc<Hyper>, weights: Weights) -> Reference {
        Reference { hyper, weights }
    }
}

impl Backend for Reference {
    fn name(&self) -> String {
        "reference (plain f32, one thread)".to_owned()
    }

    fn weight_bytes(&self) -> usize {
        let linear = |l: &Linear| l.weight.data.len() + l.bias.as_ref().map_or(0, |b| b.len() * 4);
        let layers: usize = self
            .weights
            .layers
            .iter()
            .map(|l| {
                [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].into_iter().map(linear).sum::<usize>()
                    + 4 * (l.attention_norm.len() + l.ffn_norm.len() + l.q_norm.len() + l.k_norm.len())
            })
            .sum();
        let embeddings: usize = self.weights.embeddings.iter().map(|e| e.data.len()).sum();
        let is_tied = self.weights.head.name == self.weights.embeddings[0].name;
        layers + embeddings + if is_tied { 0 } else { self.weights.head.data.len() } + self.weights.norm.len() * 4
    }

    fn pass_bytes(&self) -> usize {
        let linear = |l: &Linear| l.weight.data.len();
        let layer =
            |l: &Layer| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].into_iter().map(linear).sum::<usize>();
        self.weights.layers.iter().map(layer).sum::<usize>() + self.weights.head.data.len()
    }

    fn context(self: Arc<Self>, options: &ContextOptions) -> Result<Box<dyn Context>> {
        Ok(Box::new(ReferenceContext::new(self, options)?))
    }
}

/// Rows of keys or values in the cache's element type.
struct RowStore {
    kind: CacheType,
    row_bytes: usize,
    width: usize,
    bytes: Vec<u8>, // (row, row_bytes)
}

impl RowStore {
    fn new(kind: CacheType, rows: usize, width: usize) -> Result<RowStore> {
        let row_bytes = kind.row_bytes(width);
        Ok(RowStore { kind, row_bytes, width, bytes: zeroed("the KV cache", rows, row_bytes)? })
    }

    fn range(&self, row: usize) -> std::ops::Range<usize> {
        row * self.row_bytes..(row + 1) * self.row_bytes
    }

    fn write(&mut self, row: usize, x: &[f32]) {
        let range = self.range(row);
        self.kind.encode(x, &mut self.bytes[range]);
    }

    fn read(&self, row: usize, out: &mut [f32]) {
        let bytes = &self.bytes[self.range(row)];
        match self.kind {
            CacheType::F32 => dequantize_row(DType::F32, bytes, out),
            CacheType::F16 => dequantize_row(DType::F16, bytes, out),
            CacheType::Bf16 => dequantize_row(DType::BF16, bytes, out),
            CacheType::Q8_0 => {
                for (bytes, out) in bytes.chunks(34).zip(out[..self.width].chunks_mut(32)) {
                    let mut padded = [0.0; 32];
                    dequantize_row(DType::Q8_0, bytes, &mut padded);
                    out.copy_from_slice(&padded[..out.len()]);
                }
            }
        }
    }

    fn copy(&mut self, src: usize, dst: usize, rows: usize) {
        let start = src * self.row_bytes;
        self.bytes.copy_within(start..start + rows * self.row_bytes, dst * self.row_bytes);
    }
}

/// Keys and values of one layer.
struct KeyValues {
    k: RowStore,
    v: RowStore,
}

impl KeyValues {
    fn new(kind: CacheType, rows: usize, width: usize) -> Result<KeyValues> {
        Ok(KeyValues { k: RowStore::new(kind, rows, width)?, v: RowStore::new(kind, rows, width)? })
    }

    fn bytes(&self) -> usize {
        self.k.bytes.len() + self.v.bytes.len()
    }

    fn copy(&mut self, src: usize, dst: usize, rows: usize) {
        self.k.copy(src, dst, rows);
        self.v.copy(src, dst, rows);
    }
}

fn zeroed<T: Clone + Default>(what: &'static str, rows: usize, width: usize) -> Result<Vec<T>> {
    let too_large = || Error::OutOfMemory { what, bytes: rows.saturating_mul(width).saturating_mul(size_of::<T>()) };
    let n = rows.checked_mul(width).ok_or_else(too_large)?;
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| too_large())?;
    v.resize(n, T::default());
    Ok(v)
}

struct ReferenceContext {
    model: Arc<Reference>,
    options: ContextOptions,
    cache: Vec<KeyValues>, // (layer): (cache row, kv_dim)
    rings: Vec<KeyValues>, // (layer): (sequence, hidden number % ring_capacity), kv_dim
    fresh: KeyValues,      // (hidden row of the pass, kv_dim)
    logits: Vec<f32>,      // (logits row, n_vocab)
    embeddings: Vec<f32>,  // (embedding, n_embd)
    x: Vec<f32>,           // (row, n_embd): the residual stream
    norm: Vec<f32>,        // (row, n_embd)
    q: Vec<f32>,           // (row, q_dim)
    k: Vec<f32>,           // (row, kv_dim)
    v: Vec<f32>,           // (row, kv_dim)
    attention: Vec<f32>,   // (row, q_dim)
    gate: Vec<f32>,        // (row, n_ff)
    up: Vec<f32>,          // (row, n_ff)
    out: Vec<f32>,         // (row, n_embd)
    weight_row: Vec<f32>,  // the widest input of a linear layer
    key: Vec<f32>,         // (kv_dim)
    scores: Vec<f32>,      // (head, visible key)
    visible: Vec<Key>,
}

/// Where a visible key lies.
#[derive(Clone, Copy)]
enum Key {
    Cache(usize),
    Ring(usize),
    Fresh(usize),
}

impl ReferenceContext {
    fn new(model: Arc<Reference>, options: &ContextOptions) -> Result<ReferenceContext> {
        let h = model.hyper.clone();
        let layout = options.layout;
        let rows = options.max_rows;
        let layers = |n: usize| -> Result<Vec<KeyValues>> {
            (0..h.n_layers).map(|_| KeyValues::new(options.cache_type, n, h.kv_dim())).collect()
        };
        // The longest sight: every stored row and the window.
        let max_visible = layout.n_positions * layout.stored_copies + layout.ring_capacity + Rules::MAX_COPIES;
        let mut visible = Vec::new();
        visible
            .try_reserve_exact(max_visible)
            .map_err(|_| Error::OutOfMemory { what: "scratch", bytes: max_visible * 16 })?;
        let scratch = |width: usize| zeroed("scratch", rows, width);
        Ok(ReferenceContext {
            cache: layers(layout.cache_rows())?,
            rings: layers(layout.ring_rows())?,
            fresh: KeyValues::new(options.cache_type, rows, h.kv_dim())?,
            logits: zeroed("the logits", options.n_logits, h.n_vocab)?,
            embeddings: zeroed("the embeddings", options.n_embeddings, h.n_embd)?,
            x: scratch(h.n_embd)?,
            norm: scratch(h.n_embd)?,
            q: scratch(h.q_dim())?,
            k: scratch(h.kv_dim())?,
            v: scratch(h.kv_dim())?,
            attention: scratch(h.q_dim())?,
            gate: scratch(h.n_ff)?,
            up: scratch(h.n_ff)?,
            out: scratch(h.n_embd)?,
            weight_row: zeroed("scratch", 1, h.n_embd.max(h.n_ff).max(h.q_dim()))?,
            key: zeroed("scratch", 1, h.kv_dim())?,
            scores: zeroed("scratch", h.n_heads, max_visible)?,
            visible,
            options: *options,
            model,
        })
    }

    /// Q, K, V of the entering rows, with q/k norm and RoPE; keys and values go to the cache or to the pass's own.
    fn project(&mut self, layer: &Layer, index: usize, plan: &Plan, enter: &[u32]) {
        let model = self.model.clone();
        let h = &*model.hyper;
        let n = enter.len();
        let source = match h.norms {
            NormPlacement::Before => {
                rms_norm(&self.x, &layer.attention_norm, h.norm_eps, n, &mut self.norm);
                &self.norm
            }
            NormPlacement::After => &self.x,
        };
        linear(&layer.q, source, n, &mut self.q, &mut self.weight_row);
        linear(&layer.k, source, n, &mut self.k, &mut self.weight_row);
        linear(&layer.v, source, n, &mut self.v, &mut self.weight_row);
        let width = match h.qk_norm {
            QkNorm::None => 0,
            QkNorm::Head => h.head_dim,
            QkNorm::Projection => usize::MAX,
        };
        for (x, weight, dim) in [(&mut self.q, &layer.q_norm, h.q_dim()), (&mut self.k, &layer.k_norm, h.kv_dim())] {
            if width > 0 {
                x[..n * dim].chunks_mut(width.min(dim)).for_each(|x| norm_in_place(x, weight, h.norm_eps));
            }
            for (x, &row) in x.chunks_mut(dim).zip(enter) {
                x.chunks_mut(h.head_dim).for_each(|head| rope(head, plan.rows[row as usize].rope, h));
            }
        }
        let kv_rows = self.k.chunks(h.kv_dim()).zip(self.v.chunks(h.kv_dim()));
        for (&row, (k, v)) in enter.iter().zip(kv_rows) {
            let (store, at) = match plan.rows[row as usize].store {
                Store::Cache(at) => (&mut self.cache[index], at as usize),
                Store::Hidden(at) => (&mut self.fresh, at as usize),
            };
            store.k.write(at, k);
            store.v.write(at, v);
        }
    }

    /// Every key that `row` may see, in order.
    fn find_visible(&mut self, plan: &Plan, row: &Row) {
        let layout = self.options.layout;
        let entry = &plan.entries[row.entry as usize];
        let blocks = &plan.blocks[entry.blocks.clone()];
        let rows_per_block = layout.block * layout.stored_copies;
        self.visible.clear();
        for i in 0..row.stored as usize {
            let at = blocks[i / rows_per_block] as usize * rows_per_block + i % rows_per_block;
            self.visible.push(Key::Cache(at));
        }
        for number in row.hidden_from as usize..row.hidden_to as usize {
            self.visible.push(match number.checked_sub(entry.first_hidden) {
                Some(i) => Key::Fresh(entry.hidden_base + i),
                None => Key::Ring(entry.seq * layout.ring_capacity + number % layout.ring_capacity),
            });
        }
    }

    /// Attention of one row; `at` is its index among the entering rows, `to` among those that go on.
    fn attend(&mut self, index: usize, plan: &Plan, row: u32, at: usize, to: usize) {
        let model = self.model.clone();
        let h = &*model.hyper;
        self.find_visible(plan, &plan.rows[row as usize]);
        let n = self.visible.len();
        let group = h.n_heads / h.n_kv_heads;
        let scale = 1.0 / (h.head_dim as f32).sqrt();
        let store = |context: &Self, key: Key, values: bool, out: &mut [f32]| {
            let (kv, at) = match key {
                Key::Cache(at) => (&context.cache[index], at),
                Key::Ring(at) => (&context.rings[index], at),
                Key::Fresh(at) => (&context.fresh, at),
            };
            if values { kv.v.read(at, out) } else { kv.k.read(at, out) }
        };
        let mut key = std::mem::take(&mut self.key);
        let mut scores = std::mem::take(&mut self.scores);
        let q = &self.q[at * h.q_dim()..(at + 1) * h.q_dim()];
        for i in 0..n {
            store(self, self.visible[i], false, &mut key);
            for (head, q) in q.chunks(h.head_dim).enumerate() {
                let k = &key[head / group * h.head_dim..][..h.head_dim];
                scores[head * n + i] = dot(q, k) * scale;
            }
        }
        scores[..h.n_heads * n].chunks_mut(n).for_each(softmax);
        let range = to * h.q_dim()..(to + 1) * h.q_dim();
        self.attention[range.clone()].fill(0.0);
        for i in 0..n {
            store(self, self.visible[i], true, &mut key);
            for (head, out) in self.attention[range.clone()].chunks_mut(h.head_dim).enumerate() {
                let v = &key[head / group * h.head_dim..][..h.head_dim];
                let weight = scores[head * n + i];
                out.iter_mut().zip(v).for_each(|(o, v)| *o += weight * v);
            }
        }
        self.key = key;
        self.scores = scores;
    }

    /// Moves what later calls may see of the pass's hidden keys into the rings.
    fn keep_hidden(&mut self, index: usize, plan: &Plan, enter: &[u32]) {
        let capacity = self.options.layout.ring_capacity;
        if capacity == 0 {
            return;
        }
        let (ring, fresh) = (&mut self.rings[index], &self.fresh);
        for &row in enter {
            let row = &plan.rows[row as usize];
            let entry = &plan.entries[row.entry as usize];
            let Store::Hidden(from) = row.store else { continue };
            let number = row.hidden_to as usize - 1;
            if number + capacity < entry.first_hidden + entry.n_hidden {
                continue;
            }
            let (from, to) = (from as usize, entry.seq * capacity + number % capacity);
            for (ring, fresh) in [(&mut ring.k, &fresh.k), (&mut ring.v, &fresh.v)] {
                let range = ring.range(to);
                ring.bytes[range].copy_from_slice(&fresh.bytes[fresh.range(from)]);
            }
        }
    }

    /// Output projection, feed-forward and residuals of the `n` rows that go on.
    fn finish_layer(&mut self, layer: &Layer, n: usize) {
        let model = self.model.clone();
        let h = &*model.hyper;
        linear(&layer.o, &self.attention, n, &mut self.out, &mut self.weight_row);
        if h.norms == NormPlacement::After {
            self.out[..n * h.n_embd]
                .chunks_mut(h.n_embd)
                .for_each(|x| norm_in_place(x, &layer.attention_norm, h.norm_eps));
        }
        add(&mut self.x, &self.out, n * h.n_embd);
        let source = match h.norms {
            NormPlacement::Before => {
                rms_norm(&self.x, &layer.ffn_norm, h.norm_eps, n, &mut self.norm);
                &self.norm
            }
            NormPlacement::After => &self.x,
        };
        linear(&layer.gate, source, n, &mut self.gate, &mut self.weight_row);
        linear(&layer.up, source, n, &mut self.up, &mut self.weight_row);
        for (g, u) in self.gate[..n * h.n_ff].iter_mut().zip(&self.up) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
        linear(&layer.down, &self.gate, n, &mut self.out, &mut self.weight_row);
        if h.norms == NormPlacement::After {
            self.out[..n * h.n_embd].chunks_mut(h.n_embd).for_each(|x| norm_in_place(x, &layer.ffn_norm, h.norm_eps));
        }
        add(&mut self.x, &self.out, n * h.n_embd);
    }
}

impl Context for ReferenceContext {
    fn run(&mut self, plan: &Plan, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let model = self.model.clone();
        let h = &*model.hyper;
        let e = h.n_embd;
        for (row, x) in plan.rows.iter().zip(self.x.chunks_mut(e)) {
            let table = &model.weights.embeddings[row.table as usize];
            let row_bytes = table.data.len() / h.n_vocab;
            dequantize_row(table.dtype, &table.data[row.token as usize * row_bytes..][..row_bytes], x);
        }
        for (index, layer) in model.weights.layers.iter().enumerate() {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let rows = &plan.layers[index];
            self.project(layer, index, plan, &rows.enter);
            for (to, &at) in rows.keep.iter().enumerate() {
                self.attend(index, plan, rows.enter[at as usize], at as usize, to);
            }
            self.keep_hidden(index, plan, &rows.enter);
            // `keep` ascends, so a row only ever moves towards the front.
            for (to, &at) in rows.keep.iter().enumerate() {
                self.x.copy_within(at as usize * e..(at as usize + 1) * e, to * e);
            }
            self.finish_layer(layer, rows.keep.len());
        }
        for (output, x) in plan.outputs.iter().zip(self.x.chunks(e)) {
            rms_norm(x, &model.weights.norm, h.norm_eps, 1, &mut self.norm);
            if plan.is_embedding {
                self.embeddings[output.logits as usize * e..][..e].copy_from_slice(&self.norm[..e]);
                continue;
            }
            let logits = &mut self.logits[output.logits as usize * h.n_vocab..][..h.n_vocab];
            matmul(&model.weights.head, &self.norm, 1, logits, &mut self.weight_row);
        }
        Ok(())
    }

    fn logits(&self, row: usize) -> Result<&[f32]> {
        let n = self.model.hyper.n_vocab;
        Ok(&self.logits[row * n..(row + 1) * n])
    }

    fn put_logits(&mut self, row: usize, logits: &[f32]) {
        let n = self.model.hyper.n_vocab;
        self.logits[row * n..(row + 1) * n].copy_from_slice(logits);
    }

    fn embedding(&self, row: usize) -> &[f32] {
        let n = self.model.hyper.n_embd;
        &self.embeddings[row * n..(row + 1) * n]
    }

    fn read_rows(&self, layer: usize, first: usize, rows: &mut [u8]) -> Result<()> {
        let kv = &self.cache[layer];
        for (i, row) in rows.chunks_exact_mut(2 * kv.k.row_bytes).enumerate() {
            let (k, v) = row.split_at_mut(kv.k.row_bytes);
            k.copy_from_slice(&kv.k.bytes[kv.k.range(first + i)]);
            v.copy_from_slice(&kv.v.bytes[kv.v.range(first + i)]);
        }
        Ok(())
    }

    fn write_rows(&mut self, layer: usize, first: usize, rows: &[u8]) -> Result<()> {
        let kv = &mut self.cache[layer];
        for (i, row) in rows.chunks_exact(2 * kv.k.row_bytes).enumerate() {
            let (k, v) = row.split_at(kv.k.row_bytes);
            let range = kv.k.range(first + i);
            kv.k.bytes[range.clone()].copy_from_slice(k);
            kv.v.bytes[range].copy_from_slice(v);
        }
        Ok(())
    }

    fn copy_logits(&mut self, src: usize, dst: usize) -> Result<()> {
        let n = self.model.hyper.n_vocab;
        self.logits.copy_within(src * n..(src + 1) * n, dst * n);
        Ok(())
    }

    fn copy_block(&mut self, copy: BlockCopy) -> Result<()> {
        let layout = self.options.layout;
        let rows_per_block = layout.block * layout.stored_copies;
        for kv in &mut self.cache {
            let (src, dst) = (copy.src as usize * rows_per_block, copy.dst as usize * rows_per_block);
            kv.copy(src, dst, copy.n_positions * layout.stored_copies);
        }
        Ok(())
    }

    fn copy_rings(&mut self, src: usize, dst: usize) -> Result<()> {
        let capacity = self.options.layout.ring_capacity;
        for ring in &mut self.rings {
            ring.copy(src * capacity, dst * capacity, capacity);
        }
        Ok(())
    }

    fn memory(&self) -> ContextMemory {
        let floats = [
            &self.logits,
            &self.embeddings,
            &self.x,
            &self.norm,
            &self.q,
            &self.k,
            &self.v,
            &self.attention,
            &self.gate,
            &self.up,
            &self.out,
            &self.weight_row,
            &self.key,
            &self.scores,
        ];
        ContextMemory {
            cache: self.cache.iter().map(KeyValues::bytes).sum(),
            hidden: self.rings.iter().map(KeyValues::bytes).sum(),
            scratch: floats.into_iter().map(|v| v.len() * 4).sum::<usize>()
                + self.fresh.bytes()
                + self.visible.capacity() * size_of::<Key>(),
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight partial sums: closer to the exact sum than one running total, and the compiler can use vectors.
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `y[row] = W x[row]`, W stored as it is, `[n_out, n_in]`.
fn matmul(weight: &crate::checkpoint::TensorView, x: &[f32], rows: usize, y: &mut [f32], weight_row: &mut [f32]) {
    let (n_out, n_in) = (weight.shape[0], weight.shape[1]);
    let row_bytes = weight.data.len() / n_out;
    let w = &mut weight_row[..n_in];
    for (o, bytes) in weight.data.chunks(row_bytes).enumerate() {
        dequantize_row(weight.dtype, bytes, w);
        for row in 0..rows {
            y[row * n_out + o] = dot(w, &x[row * n_in..(row + 1) * n_in]);
        }
    }
}

fn linear(l: &Linear, x: &[f32], rows: usize, y: &mut [f32], weight_row: &mut [f32]) {
    matmul(&l.weight, x, rows, y, weight_row);
    if let Some(bias) = &l.bias {
        for y in y[..rows * bias.len()].chunks_mut(bias.len()) {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
}

fn norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = dot(x, x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w);
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32, rows: usize, out: &mut [f32]) {
    let n = rows * weight.len();
    out[..n].copy_from_slice(&x[..n]);
    out[..n].chunks_mut(weight.len()).for_each(|x| norm_in_place(x, weight, eps));
}

fn rope(head: &mut [f32], position: u32, h: &Hyper) {
    for (i, frequency) in h.rope_frequencies.iter().enumerate() {
        // In f64: at long contexts the angle has more digits than f32 keeps.
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (sin, cos) = (sin as f32, cos as f32);
        let (a, b) = match h.rope_pairs {
            RopePairs::Halves => (i, i + h.head_dim / 2),
            RopePairs::Adjacent => (2 * i, 2 * i + 1),
        };
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
    }
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    x.iter_mut().for_each(|x| *x /= sum);
}

fn add(x: &mut [f32], y: &[f32], n: usize) {
    x[..n].iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
