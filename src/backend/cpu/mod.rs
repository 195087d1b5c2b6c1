//! The CPU backend: packed weights, kernels chosen at run time, threads that carry out a step together.
// Kernels walk arrays of registers and pointers with one index; tests walk matrices.
#![allow(clippy::needless_range_loop)]

mod attention;
mod bandwidth;
mod context;
#[cfg(feature = "ggml")]
mod ggml;
mod kernels;
mod matrix;
mod packed;
mod pool;
mod shared;
mod simd;
mod store;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use self::bandwidth::read_bandwidth;

use self::context::CpuContext;
use self::kernels::Kernels;
use self::matrix::{Arena, Choice, Matrix, Needs};
use self::packed::{Packing, TILE, pack_tile};
use super::{Backend, Context, ContextOptions};
use crate::checkpoint::TensorView;
use crate::error::Result;
use crate::model::{Hyper, Linear, Weights};

/// A linear layer, prepared.
struct Projection {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

struct CpuLayer {
    attention_norm: Vec<f32>,
    ffn_norm: Vec<f32>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    gate: Projection,
    up: Projection,
    down: Projection,
    qkv_needs: Needs,
    o_needs: Needs,
    gate_up_needs: Needs,
    down_needs: Needs,
}

enum Embedding {
    /// Looked up in the file.
    Stored(TensorView),
    /// The LM head's matrix is the table too.
    Head,
}

/// Names that `PHD_CPU_VARIANT` takes on this machine, the one chosen by default first.
pub fn variants() -> Vec<&'static str> {
    let own = kernels::Variant::ALL.into_iter().filter(|v| v.kernels().is_some()).map(|v| v.name());
    own.chain(cfg!(feature = "ggml").then_some("ggml")).collect()
}

pub struct Cpu {
    hyper: Arc<Hyper>,
    kernels: &'static Kernels,
    embeddings: Vec<Embedding>,
    layers: Vec<CpuLayer>,
    norm: Vec<f32>,
    head: Matrix,
    head_needs: Needs,
    has_ggml: bool,
    /// Floats that the widest converted matrix wants of each thread.
    convert_scratch: usize,
    weight_bytes: usize,
}

/// Where the next matrix begins: a cache line.
const ALIGNMENT: usize = 64;

impl Cpu {
    /// Packs the weights, on all CPUs.
    pub fn new(hyper: Arc<Hyper>, weights: Weights, progress: &mut dyn FnMut(f32) -> Result<()>) -> Result<Cpu> {
        let kernels = kernels::choose()?;
        let prefer_ggml = kernels::prefers_ggml();
        let mut tensors: Vec<TensorView> = Vec::new();
        for l in &weights.layers {
            tensors.extend([&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].map(|l| l.weight.clone()));
        }
        tensors.push(weights.head.clone());
        let arena = Arc::new(pack(&tensors, prefer_ggml, progress)?);
        let mut offset = 0;
        let mut matrix = |tensor: TensorView| {
            let (n_out, n_in) = (tensor.shape[0], tensor.shape[1]);
            match Choice::of(&tensor, prefer_ggml) {
                Choice::Pack(packing) => {
                    let at = offset;
                    offset += packing.bytes(n_out, n_in).next_multiple_of(ALIGNMENT);
                    Matrix::packed(packing, n_out, n_in, arena.clone(), at)
                }
                Choice::Ggml(dot) => Matrix::ggml(dot, tensor),
                Choice::Convert => Matrix::converted(tensor),
            }
        };
        let mut projection = |l: Linear| Projection { matrix: matrix(l.weight), bias: l.bias };
        let mut layers = Vec::with_capacity(weights.layers.len());
        for l in weights.layers {
            let [q, k, v, o, gate, up, down] = [l.q, l.k, l.v, l.o, l.gate, l.up, l.down].map(&mut projection);
            layers.push(CpuLayer {
                attention_norm: l.attention_norm,
                ffn_norm: l.ffn_norm,
                q_norm: l.q_norm,
                k_norm: l.k_norm,
                qkv_needs: Needs::of(&[&q.matrix, &k.matrix, &v.matrix]),
                o_needs: Needs::of(&[&o.matrix]),
                gate_up_needs: Needs::of(&[&gate.matrix, &up.matrix]),
                down_needs: Needs::of(&[&down.matrix]),
                q,
                k,
                v,
                o,
                gate,
                up,
                down,
            });
        }
        let head_name = weights.head.name.clone();
        let head = matrix(weights.head);
        // A tied table is looked up where it was packed, so that the file's copy of it need not stay in memory.
        let embeddings: Vec<Embedding> = weights
            .embeddings
            .into_iter()
            .map(|t| if t.name == head_name { Embedding::Head } else { Embedding::Stored(t) })
            .collect();

        let mut cpu = Cpu {
            has_ggml: false,
            convert_scratch: 0,
            weight_bytes: 0,
            head_needs: Needs::of(&[&head]),
            hyper,
            kernels,
            embeddings,
            layers,
            norm: weights.norm,
            head,
        };
        cpu.measure();
        Ok(cpu)
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let projections = self.layers.iter().flat_map(CpuLayer::projections);
        projections.map(|p| &p.matrix).chain([&self.head])
    }

    /// Sums up what the matrices are and want.
    fn measure(&mut self) {
        let vectors: usize = self
            .layers
            .iter()
            .map(|l| {
                let biases: usize = l.projections().iter().map(|p| p.bias.as_ref().map_or(0, Vec::len)).sum();
                l.attention_norm.len() + l.ffn_norm.len() + l.q_norm.len() + l.k_norm.len() + biases
            })
            .sum();
        let tables = self.embeddings.iter().map(|e| match e {
            Embedding::Stored(table) => table.data.len(),
            Embedding::Head => 0,
        });
        self.weight_bytes =
            self.matrices().map(Matrix::bytes).sum::<usize>() + tables.sum::<usize>() + 4 * (vectors + self.norm.len());
        self.convert_scratch = self.matrices().map(Matrix::scratch).max().unwrap_or(0);
        let has_ggml = self.matrices().any(Matrix::uses_ggml);
        self.has_ggml = has_ggml;
    }
}

impl CpuLayer {
    fn projections(&self) -> [&Projection; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }
}

/// Packs all that can be into one arena, in order, and gives the file's pages back.
fn pack(tensors: &[TensorView], prefer_ggml: bool, progress: &mut dyn FnMut(f32) -> Result<()>) -> Result<Arena> {
    let jobs: Vec<(&TensorView, Packing)> = tensors
        .iter()
        .filter_map(|t| match Choice::of(t, prefer_ggml) {
            Choice::Pack(packing) => Some((t, packing)),
            _ => None,
        })
        .collect();
    let bytes = |t: &TensorView, p: Packing| p.bytes(t.shape[0], t.shape[1]).next_multiple_of(ALIGNMENT);
    let total = jobs.iter().map(|&(t, p)| bytes(t, p)).sum();
    let mut arena = Arena::new(total)?;
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut rest = arena.bytes_mut();
    let mut done = 0;
    for (tensor, packing) in jobs {
        progress(done as f32 / total as f32)?;
        let here;
        (here, rest) = rest.split_at_mut(bytes(tensor, packing));
        pack_matrix(tensor, packing, here, n_threads);
        done += bytes(tensor, packing);
    }
    Ok(arena)
}

/// Bytes of a tensor that are packed before their pages are given back, so that both copies of a large one never coexist.
const SLAB: usize = 16 << 20;

fn pack_matrix(tensor: &TensorView, packing: Packing, out: &mut [u8], n_threads: usize) {
    let (n_out, n_in) = (tensor.shape[0], tensor.shape[1]);
    let row_bytes = tensor.data.len() / n_out;
    let tile_bytes = packing.tile_bytes(n_in);
    let n_tiles = n_out.div_ceil(TILE);
    let slab = (SLAB / (TILE * row_bytes)).clamp(1, n_tiles);
    for first in (0..n_tiles).step_by(slab) {
        let last = (first + slab).min(n_tiles);
        let bytes = first * TILE * row_bytes..(last * TILE * row_bytes).min(tensor.data.len());
        let per_thread = (last - first).div_ceil(n_threads);
        // Small matrices are packed sooner than a thread is started.
        let threaded = bytes.len() >= 1 << 18;
        let source = tensor.data[bytes.clone()].chunks(per_thread * TILE * row_bytes);
        std::thread::scope(|scope| {
            for (out, source) in
                out[first * tile_bytes..last * tile_bytes].chunks_mut(per_thread * tile_bytes).zip(source)
            {
                let mut work = move || {
                    for (tile, rows) in out.chunks_exact_mut(tile_bytes).zip(source.chunks(TILE * row_bytes)) {
                        pack_tile(packing, n_in, rows, tile);
                    }
                };
                if threaded {
                    scope.spawn(work);
                } else {
                    work();
                }
            }
        });
        tensor.data.give_back(bytes);
    }
}

impl Backend for Cpu {
    fn name(&self) -> String {
        let ggml = if self.has_ggml { " and ggml" } else { "" };
        format!("cpu ({}{ggml})", self.kernels.variant)
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn pass_bytes(&self) -> usize {
        self.matrices().map(Matrix::bytes).sum()
    }

    fn context(self: Arc<Self>, options: &ContextOptions) -> Result<Box<dyn Context>> {
        Ok(Box::new(CpuContext::new(self, options)?))
    }
}
