//! The CUDA backend: weights in layouts of our own, kernels compiled for the GPU that is there, steps replayed as graphs.
//!
//! The driver, NVRTC and cuBLASLt are found at run time. See `docs/gpu.md`.

pub mod compile;
mod context;
mod driver;
mod gemm;
mod pack;
mod params;
mod plan;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::HashMap;
use std::sync::Arc;

use self::context::CudaContext;
use self::driver::{Buffer, Device, Grid, Kernel, Module, Stream};
use self::gemm::Gemm;
use self::params::{Activations, LinearParams, Matrix};
use self::weights::{DeviceMatrix, DeviceWeights, STRIP};
use super::{Backend, Context, ContextOptions};
use crate::error::{Result, unsupported};
use crate::model::{Hyper, Weights};
use crate::tensor::DType;

/// Columns of activations that a `linear_*` kernel takes at once, in tiles of 8 (the number in its name), and the rows that makes:
/// up to 16 rows as two bf16 parts each, above as one.
const WIDTHS: [(usize, usize); 4] = [(1, 4), (2, 8), (4, 16), (8, 64)];
/// What a session asks of the sums of linear layers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sums {
    Fast,
    /// Both parts of the activations, for any number of rows.
    Exact,
    /// The same bits for any number of rows. The kernels with tiles of 8 rows in two parts do the same for each row, however many
    /// tiles there are; the narrowest adds up the parts apart.
    Invariant,
}

/// The narrowest of [`WIDTHS`] for so many rows, or the widest. `linear_f32` has groups of 8 rows and no tiles.
fn width(dtype: DType, rows: usize, sums: Sums) -> (usize, usize) {
    if dtype == DType::F32 {
        return (0, 8);
    }
    let widths = match sums {
        Sums::Fast => &WIDTHS[..],
        Sums::Exact => &WIDTHS[..3],
        Sums::Invariant => &WIDTHS[1..3],
    };
    *widths.iter().find(|(_, n)| rows <= *n).unwrap_or(&widths[widths.len() - 1])
}

/// Rows above which a GEMM library pays.
const FEW_ROWS: usize = 64;
const THREADS: u32 = 256;

/// A device that has been asked for, and found fit.
pub struct Opened {
    device: Arc<Device>,
    module: Module,
}

/// Finds the device and compiles the kernels for it.
///
/// # Errors
/// `Backend` with the reason: no driver, no device, one too old, no NVRTC; `OutOfMemory`.
pub fn open(ordinal: i32) -> Result<Opened> {
    let device = Device::open(ordinal)?;
    let module = Module::load(&device, &compile::kernels(device.arch)?)?;
    Ok(Opened { device, module })
}

/// Every kernel that a model uses.
struct Kernels {
    linear: HashMap<(DType, usize), Kernel>, // (type, tiles); 0 tiles: the f32 one
    gemm: gemm::Kernels,
    embed: HashMap<DType, Kernel>,
    residual_norm: Kernel,
    gated: Kernel,
    qkv_finish: Kernel,
    attention_plain: Kernel,
    attention_mma: Option<Kernel>,
    attention_mma_bf16: Option<Kernel>,
    attention_merge: Kernel,
    top_chunks: Kernel,
    top_rows: Kernel,
}

pub struct Cuda {
    hyper: Arc<Hyper>,
    /// `PHD_CUDA_EXACT`: activations in two parts for any number of rows, at the cost of more reads of the weights.
    is_exact: bool,
    weights: DeviceWeights,
    kernels: Kernels,
    gemm: Option<Arc<Gemm>>,
    /// Keeps the kernels loaded.
    _module: Module,
    device: Arc<Device>,
}

impl Cuda {
    /// Loads the weights into the device's memory.
    pub fn new(
        opened: Opened,
        hyper: Arc<Hyper>,
        weights: &Weights,
        progress: &mut dyn FnMut(f32) -> Result<()>,
    ) -> Result<Cuda> {
        let Opened { device, module } = opened;
        // A row in shared memory: see residual_norm and gated.
        let widest = 4 * hyper.n_ff.max(hyper.n_embd).max(hyper.q_dim());
        if widest + (4 << 10) > device.shared_memory {
            return Err(unsupported!(
                "{}: a row of {} elements does not fit into {} bytes of shared memory",
                device.name,
                widest / 4,
                device.shared_memory
            ));
        }
        if hyper.head_dim > context::MAX_HEAD_DIM {
            return Err(unsupported!(
                "head_dim is {}, the CUDA backend has at most {}",
                hyper.head_dim,
                context::MAX_HEAD_DIM
            ));
        }
        let weights = weights::load(&device, weights, progress)?;
        let is_exact = std::env::var_os("PHD_CUDA_EXACT").is_some_and(|v| v == "1");
        let gemm = match is_exact {
            true => None,
            false => Gemm::find(&device)
                .inspect_err(|e| log::info!("{e}; prefill goes on with kernels of our own"))
                .ok()
                .map(Arc::new),
        };
        let kernels = Kernels::of(&module, &hyper, &weights, widest)?;
        log::info!(
            "{} MiB of weights on {} ({} multiprocessors, compute capability {}.{}, driver for CUDA {})",
            weights.bytes() >> 20,
            device.name,
            device.n_multiprocessors,
            device.arch.0,
            device.arch.1,
            driver::version_text(device.driver_version),
        );
        Ok(Cuda { hyper, is_exact, weights, kernels, gemm, _module: module, device })
    }

    /// Whether any matrix is f32, and whether any has blocks with minimums: what activations must have for them.
    fn needs(&self) -> (bool, bool) {
        let any = |types: &[DType]| self.weights.matrices().any(|m| types.contains(&m.dtype));
        (any(&[DType::F32]), any(&[DType::Q4_1, DType::Q4_K, DType::Q5_K]))
    }

    /// `out[i] = W[i] x + b[i]` for `rows` rows: `out[i]` is (row, n_out). With `gemm`, what cuBLASLt can do of many rows is its.
    ///
    /// # Safety
    /// Everything is allocated for as many rows.
    unsafe fn linear(
        &self,
        stream: &Stream,
        x: Activations,
        matrices: &[(&DeviceMatrix, params::Address)],
        rows: usize,
        sums: Sums,
        gemm: Option<&mut gemm::Workspace>,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let mut left = Vec::new();
        let matrices = match gemm {
            Some(workspace) if rows > FEW_ROWS => {
                for &(matrix, out) in matrices {
                    // SAFETY: the caller's promise.
                    if !unsafe { workspace.linear(stream, &self.kernels.gemm, x, matrix, out, rows)? } {
                        left.push((matrix, out));
                    }
                }
                &left
            }
            _ => matrices,
        };
        // Matrices of one type share a launch.
        for same in matrices.chunk_by(|a, b| a.0.dtype == b.0.dtype) {
            let mut parameters = LinearParams {
                x,
                n_matrices: same.len() as u32,
                n_in: same[0].0.n_in as u32,
                rows: rows as u32,
                ..LinearParams::default()
            };
            for (p, (m, out)) in parameters.matrices.iter_mut().zip(same) {
                *p = Matrix { weights: m.weights, bias: m.bias, out: *out, n_out: m.n_out as u32, unused: 0 };
            }
            let strips = same.iter().map(|(m, _)| m.strips()).sum();
            // SAFETY: the caller's promise; the matrices lie in the model's arena.
            unsafe { self.launch_linear(stream, same[0].0.dtype, strips, sums, &parameters)? };
        }
        Ok(())
    }

    /// `act = silu(gate x) * up x`, in one launch; gate and up are of one type.
    ///
    /// # Safety
    /// As [`Cuda::linear`].
    unsafe fn linear_gated(
        &self,
        stream: &Stream,
        x: Activations,
        both: [&DeviceMatrix; 2],
        act: Activations,
        rows: usize,
        sums: Sums,
    ) -> Result<()> {
        let of =
            |m: &DeviceMatrix| Matrix { weights: m.weights, bias: m.bias, n_out: m.n_out as u32, ..Matrix::default() };
        let parameters = LinearParams {
            x,
            act,
            matrices: [of(both[0]), of(both[1]), Matrix::default()],
            n_matrices: 2,
            n_in: both[0].n_in as u32,
            rows: rows as u32,
            is_gated: 1,
        };
        // SAFETY: the caller's promise; the matrices lie in the model's arena.
        unsafe { self.launch_linear(stream, both[0].dtype, act.stride as usize / STRIP, sums, &parameters) }
    }

    /// # Safety
    /// `parameters` describe memory of the right sizes.
    unsafe fn launch_linear(
        &self,
        stream: &Stream,
        dtype: DType,
        strips: usize,
        sums: Sums,
        parameters: &LinearParams,
    ) -> Result<()> {
        let rows = parameters.rows as usize;
        let (tiles, at_once) = width(dtype, rows, sums);
        let grid = Grid { blocks: (strips, rows.div_ceil(at_once), 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's promise.
        unsafe { stream.launch(self.kernels.linear[&(dtype, tiles)], grid, parameters) }
    }
}

impl Kernels {
    fn of(module: &Module, h: &Hyper, weights: &DeviceWeights, widest: usize) -> Result<Kernels> {
        let (mut linear, mut embed) = (HashMap::new(), HashMap::new());
        for m in weights.matrices() {
            let name = pack::type_name(m.dtype);
            if m.dtype == DType::F32 {
                linear.insert((m.dtype, 0), module.kernel("linear_f32", 0)?);
                continue;
            }
            for (tiles, _) in WIDTHS {
                linear.insert((m.dtype, tiles), module.kernel(&format!("linear_{name}_{tiles}"), 0)?);
            }
        }
        for m in &weights.embeddings {
            embed.insert(m.dtype, module.kernel(&format!("embed_{}", pack::type_name(m.dtype)), 0)?);
        }
        let mma = |cache: &str| match h.head_dim {
            n @ (64 | 128) if h.n_heads / h.n_kv_heads <= context::TILE_QUERIES => {
                module.kernel(&format!("attention_mma{cache}_{n}"), context::mma_shared(n)).map(Some)
            }
            _ => Ok(None),
        };
        Ok(Kernels {
            linear,
            gemm: gemm::Kernels::of(module, weights.matrices().map(|m| m.dtype))?,
            embed,
            residual_norm: module.kernel("residual_norm", widest)?,
            gated: module.kernel("gated", widest)?,
            qkv_finish: module.kernel("qkv_finish", context::qkv_shared(h))?,
            attention_plain: module.kernel("attention_plain", context::plain_shared(h.head_dim))?,
            attention_mma: mma("")?,
            attention_mma_bf16: mma("_bf16")?,
            attention_merge: module.kernel("attention_merge", 0)?,
            top_chunks: module.kernel("top_chunks", 0)?,
            top_rows: module.kernel("top_rows", 0)?,
        })
    }
}

impl Backend for Cuda {
    fn name(&self) -> String {
        let (major, minor) = self.device.arch;
        format!("cuda {} ({}, sm_{major}{minor})", self.device.ordinal, self.device.name)
    }

    fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    fn pass_bytes(&self) -> usize {
        self.weights.matrices().map(DeviceMatrix::bytes).sum()
    }

    fn bandwidth(&self, _: usize) -> Result<f64> {
        const BYTES: usize = 512 << 20;
        const COPIES: usize = 8;
        let _entered = self.device.enter()?;
        let stream = Stream::new(&self.device)?;
        let bytes = BYTES.min(self.device.memory()?.0 / 4);
        let buffer = || Buffer::zeroed(&self.device, "a measurement", bytes);
        let (from, to) = (buffer()?, buffer()?);
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let begin = std::time::Instant::now();
            for _ in 0..COPIES {
                // SAFETY: both buffers have the bytes, and live until the stream has been waited for.
                unsafe { stream.copy(to.address(), from.address(), bytes)? };
            }
            stream.synchronize()?;
            best = best.min(begin.elapsed().as_secs_f64());
        }
        Ok((2 * COPIES * bytes) as f64 / best)
    }

    fn context(self: Arc<Self>, options: &ContextOptions) -> Result<Box<dyn Context>> {
        Ok(Box::new(CudaContext::new(self, options)?))
    }
}
