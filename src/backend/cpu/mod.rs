//! The CPU backend: packed weights, kernels chosen at run time, threads that carry out a step together.
// Kernels walk arrays of registers and pointers with one index; tests walk matrices.
#![allow(clippy::needless_range_loop)]

mod arena;
mod attention;
mod bandwidth;
mod context;
mod fixed;
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

use self::arena::{Arena, LINE};
use self::context::CpuContext;
use self::kernels::Kernels;
use self::matrix::{Choice, Matrix, Needs};
use self::packed::{Packing, TILE, pack_tile};
use super::{Backend, Context, ContextOptions};
use crate::checkpoint::TensorView;
use crate::error::Result;
use crate::model::{Hyper, Linear, Weights};
#[cfg(feature = "ggml")]
use crate::tensor::DType;

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
    #[cfg(feature = "ggml")]
    let own = own.chain(ggml::Dot::of(DType::Q4_0).map(|_| "ggml"));
    own.collect()
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
    /// Of all matrices.
    needs: Needs,
    /// Floats that the widest converted matrix wants of each thread.
    convert_scratch: usize,
    weight_bytes: usize,
}

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
        let mut matrices = prepare(tensors, prefer_ggml, progress)?.into_iter();
        let mut matrix = || matrices.next().expect("one for each tensor, in their order");
        let mut projection = |l: Linear| Projection { matrix: matrix(), bias: l.bias };
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
        let head = matrix();
        // A tied table is looked up where it was packed, so that the file's copy of it need not stay in memory.
        let embeddings: Vec<Embedding> = weights
            .embeddings
            .into_iter()
            .map(|t| if t.name == weights.head.name { Embedding::Head } else { Embedding::Stored(t) })
            .collect();

        let mut cpu = Cpu {
            has_ggml: false,
            needs: Needs::default(),
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
        self.needs = Needs::of(&self.matrices().collect::<Vec<_>>());
    }
}

impl CpuLayer {
    fn projections(&self) -> [&Projection; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }
}

/// Makes a matrix of each tensor. All that can be packed goes into one arena, in order, and its file pages are given back.
fn prepare(
    tensors: Vec<TensorView>,
    prefer_ggml: bool,
    progress: &mut dyn FnMut(f32) -> Result<()>,
) -> Result<Vec<Matrix>> {
    /// A prepared tensor; packed ones by their place in the arena.
    enum Prepared {
        Packed { packing: Packing, shape: (usize, usize), offset: usize },
        AsItIs(Matrix),
    }
    let mut total = 0;
    let plan: Vec<(TensorView, Choice, usize)> = tensors
        .into_iter()
        .map(|tensor| {
            let choice = Choice::of(&tensor, prefer_ggml);
            let offset = total;
            if let Choice::Pack(packing) = choice {
                total += packing.bytes(tensor.shape[0], tensor.shape[1]).next_multiple_of(LINE);
            }
            (tensor, choice, offset)
        })
        .collect();
    let mut arena = Arena::new("the weights", total)?;
    let mut prepared = Vec::with_capacity(plan.len());
    for (tensor, choice, offset) in plan {
        prepared.push(match choice {
            Choice::Pack(packing) => {
                progress(offset as f32 / total as f32)?;
                let shape = (tensor.shape[0], tensor.shape[1]);
                let bytes = offset..offset + packing.bytes(shape.0, shape.1);
                pack_matrix(&tensor, packing, &mut arena.bytes_mut()[bytes], pool::cpus());
                Prepared::Packed { packing, shape, offset }
            }
            Choice::Ggml(dot) => Prepared::AsItIs(Matrix::ggml(dot, tensor)),
            Choice::Convert => Prepared::AsItIs(Matrix::converted(tensor)),
        });
    }
    let arena = Arc::new(arena);
    let matrix = |prepared| match prepared {
        Prepared::Packed { packing, shape, offset } => Matrix::packed(packing, shape.0, shape.1, arena.clone(), offset),
        Prepared::AsItIs(matrix) => matrix,
    };
    Ok(prepared.into_iter().map(matrix).collect())
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
