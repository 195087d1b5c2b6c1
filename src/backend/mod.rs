//! The seam: a model prepared for a device, and a context that carries out one scheduled pass after another.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod reference;
#[cfg(test)]
mod testing;

use std::sync::Arc;

use crate::cache::{BlockCopy, Layout};
#[cfg(not(feature = "cuda"))]
use crate::error::unsupported;
use crate::error::{Error, Result};
use crate::model::{BackendKind, Hyper, Weights};
use crate::sampling::{log_probability, log_probability_of};
use crate::schedule::Plan;
use crate::tensor::{DType, quantize_row};

/// Element type of cached keys and values, and of the hidden rings. Saved states, the C interface and `kernels/params.cuh` have the same
/// numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum CacheType {
    F32,
    #[default]
    F16,
    /// Blocks of 32 with one f16 scale, over the concatenated heads of a row (the last block is padded).
    Q8_0,
    /// The range of f32, and 8 bits of precision.
    Bf16,
}

impl CacheType {
    /// Bytes of a row of `n` elements.
    pub fn row_bytes(self, n: usize) -> usize {
        match self {
            CacheType::F32 => n * 4,
            CacheType::F16 | CacheType::Bf16 => n * 2,
            CacheType::Q8_0 => n.div_ceil(32) * 34,
        }
    }
}

impl CacheType {
    /// Converts a row, or a head's part of one, of `x.len()` elements into its `row_bytes` bytes.
    fn encode(self, x: &[f32], out: &mut [u8]) {
        match self {
            CacheType::F32 => quantize_row(DType::F32, x, out),
            CacheType::F16 => quantize_row(DType::F16, x, out),
            CacheType::Bf16 => quantize_row(DType::BF16, x, out),
            CacheType::Q8_0 => {
                for (x, out) in x.chunks(32).zip(out.chunks_mut(34)) {
                    let mut padded = [0.0; 32];
                    padded[..x.len()].copy_from_slice(x);
                    quantize_row(DType::Q8_0, &padded, out);
                }
            }
        }
    }
}

/// Tokens of [`Context::top`].
pub const TOP: usize = 64;

/// What a context is made for; everything is allocated at its creation.
#[derive(Clone, Copy, Debug)]
pub struct ContextOptions {
    pub layout: Layout,
    pub cache_type: CacheType,
    pub n_threads: usize,
    /// A row's results depend on its own sequence alone, to the bit, whatever passes it was computed in.
    pub batch_invariant: bool,
    /// Rows of the largest pass.
    pub max_rows: usize,
    /// Rows of the logits buffer.
    pub n_logits: usize,
    /// Rows of the embeddings buffer.
    pub n_embeddings: usize,
}

/// Bytes held by a context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextMemory {
    pub cache: usize,
    pub hidden: usize,
    pub scratch: usize,
}

/// A model's weights, prepared.
pub trait Backend: Send + Sync {
    fn name(&self) -> String;
    fn weight_bytes(&self) -> usize;
    /// Bytes of weights that a pass reads: all but embedding tables.
    fn pass_bytes(&self) -> usize;
    /// What the memory that weights lie in is measured to give, in bytes a second: the CPU's is read by `n_threads`, a GPU's is
    /// copied (bytes read plus bytes written).
    fn bandwidth(&self, n_threads: usize) -> Result<f64> {
        cpu::read_bandwidth(n_threads)
    }
    fn context(self: Arc<Self>, options: &ContextOptions) -> Result<Box<dyn Context>>;
}

/// The best tokens of a row of logits, and what the others come to.
#[derive(Clone, Copy, Debug)]
pub struct Top<'a> {
    /// Best first (of equal logits the lower token): [`TOP`], or as many as have a logit that is a number above -infinity.
    pub tokens: &'a [u32],
    /// Of those tokens.
    pub logits: &'a [f32],
    /// The sum of `exp(logit - the largest)` over the whole row, which a device has in f32: off by less than a part in
    /// [`TOTAL_PARTS`].
    pub total: f64,
}

/// See [`Top::total`]. Ten times what is lost: some 40 roundings of 2^-24, and, for logits that are up to 100 below the largest, of 2^-18
/// to the exponent.
pub const TOTAL_PARTS: f64 = 8192.0;

/// Cache, rings and scratch of one session.
pub trait Context: Send {
    /// Computes a pass. `cancelled` is asked several times a layer. After an error the cache rows and rings that the pass
    /// would have written hold nothing useful; logits and everything else are as before.
    fn run(&mut self, plan: &Plan, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<()>;
    /// A row of the logits buffer, `[n_vocab]`.
    ///
    /// # Errors
    /// `Backend` or `OutOfMemory`, here and below: the device does not do what is asked, and what would have been copied there is as it
    /// was or lost.
    fn logits(&self, row: usize) -> Result<&[f32]>;
    fn put_logits(&mut self, row: usize, logits: &[f32]);
    /// The best tokens of a row of the logits buffer, if the device has looked for them and there are any.
    fn top(&self, _row: usize) -> Option<Top<'_>> {
        None
    }
    /// One of a row of the logits buffer.
    fn logit(&self, row: usize, token: usize) -> Result<f32> {
        Ok(self.logits(row)?[token])
    }
    /// `ln softmax(row of the logits buffer)[token]`; -infinity if no logit is finite. By [`Top::total`] where there is one.
    fn log_probability(&self, row: usize, token: usize) -> Result<f32> {
        let Some(top) = self.top(row) else {
            return Ok(log_probability(self.logits(row)?, token));
        };
        let logit = match top.tokens.iter().position(|&t| t as usize == token) {
            Some(i) => top.logits[i],
            None => self.logit(row, token)?,
        };
        Ok(log_probability_of(logit, top.logits[0], top.total))
    }
    fn copy_logits(&mut self, src: usize, dst: usize) -> Result<()>;
    /// A row of the embeddings buffer, `[n_embd]`: where the outputs of a plan of embeddings go.
    fn embedding(&self, row: usize) -> &[f32];
    fn copy_block(&mut self, copy: BlockCopy) -> Result<()>;
    /// Copies a sequence's hidden rings.
    fn copy_rings(&mut self, src: usize, dst: usize) -> Result<()>;
    /// Cache rows of a layer from `first` on, as many as fill `rows`: of each its keys, then its values, as every backend of the
    /// cache's type encodes them, [`CacheType::row_bytes`] of `kv_dim` elements, heads one after another.
    fn read_rows(&self, layer: usize, first: usize, rows: &mut [u8]) -> Result<()>;
    fn write_rows(&mut self, layer: usize, first: usize, rows: &[u8]) -> Result<()>;
    fn memory(&self) -> ContextMemory;
    /// Threads of the CPU that carry out a pass, the caller's among them.
    fn threads(&self) -> usize {
        1
    }
    /// How often the CPU's threads have waited for each other.
    #[cfg(test)]
    fn barriers(&self) -> usize {
        0
    }
}

/// Prepares weights for the backend asked for; `device` is the number of a GPU. `progress` is told the fraction done and may cancel.
pub(crate) fn prepare(
    hyper: Arc<Hyper>,
    weights: Weights,
    kind: BackendKind,
    device: i32,
    progress: &mut dyn FnMut(f32) -> Result<()>,
) -> Result<Arc<dyn Backend>> {
    progress(0.0)?;
    match kind {
        BackendKind::Reference => Ok(Arc::new(reference::Reference::new(hyper, weights))),
        BackendKind::Cuda => prepare_cuda(hyper, &weights, device, progress),
        BackendKind::Cpu => Ok(Arc::new(cpu::Cpu::new(hyper, weights, progress)?)),
        BackendKind::Auto => match prepare_cuda(hyper.clone(), &weights, device, progress) {
            Ok(backend) => Ok(backend),
            Err(Error::Cancelled) => Err(Error::Cancelled),
            Err(e) => {
                log::info!("the CPU computes: {e}");
                Ok(Arc::new(cpu::Cpu::new(hyper, weights, progress)?))
            }
        },
    }
}

#[cfg(feature = "cuda")]
fn prepare_cuda(
    hyper: Arc<Hyper>,
    weights: &Weights,
    device: i32,
    progress: &mut dyn FnMut(f32) -> Result<()>,
) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(cuda::Cuda::new(cuda::open(device)?, hyper, weights, progress)?))
}

#[cfg(not(feature = "cuda"))]
fn prepare_cuda(_: Arc<Hyper>, _: &Weights, _: i32, _: &mut dyn FnMut(f32) -> Result<()>) -> Result<Arc<dyn Backend>> {
    Err(unsupported!("the CUDA backend is not part of this build"))
}
