//! Prefill's matrix products through cuBLASLt, found at run time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::THREADS;
use super::driver::{Buffer, Device, Grid, Kernel, Module, Stream};
use super::pack::type_name;
use super::params::{Activations, Address, BiasParams, DequantizeParams};
use super::weights::{DeviceMatrix, STRIP, strip_bytes};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// cuBLASLt's handle, which belongs to one device.
pub struct Gemm {
    handle: sys::cublasLtHandle_t,
    device: Arc<Device>,
}

// SAFETY: the library's documentation allows a handle to be used from several threads at once.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

fn failed(e: CublasError) -> Error {
    Error::Backend(format!("cuBLASLt: {:?}", e.0))
}

impl Gemm {
    pub fn find(device: &Arc<Device>) -> Result<Gemm> {
        // SAFETY: looks for a library; loading cuBLASLt runs its initialisers, which is what is wanted.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Backend("cuBLASLt (libcublasLt.so) was not found".into()));
        }
        // A handle is made for the device whose context is current.
        let _entered = device.enter()?;
        let handle = result::create_handle().map_err(failed)?;
        Ok(Gemm { handle, device: device.clone() })
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: made by `find`.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Kernels that are needed beside the library.
pub struct Kernels {
    dequantize: HashMap<DType, Kernel>,
    add_bias: Kernel,
}

impl Kernels {
    pub fn of(module: &Module, types: impl Iterator<Item = DType>) -> Result<Kernels> {
        let mut dequantize = HashMap::new();
        for dtype in types.filter(|t| !matches!(t, DType::F32 | DType::BF16)) {
            if let Entry::Vacant(new) = dequantize.entry(dtype) {
                new.insert(module.kernel(&format!("dequantize_{}", type_name(dtype)), 0)?);
            }
        }
        Ok(Kernels { dequantize, add_bias: module.kernel("add_bias", 0)? })
    }
}

/// `out[row][i] = sum over k of weights[i][k] x[row][k]`; weights and x of `dtype`, BF16 or F32, rows `n_in` apart; out f32.
#[derive(Clone, Copy, Debug)]
struct Product {
    dtype: DType,
    weights: Address,
    x: Address,
    out: Address,
    n_out: usize,
    n_in: usize,
    rows: usize,
    out_stride: usize,
}

/// What addresses of matrices are multiples of: strips of weights and outputs begin at multiples of 64 bytes of an allocation. The
/// library takes them for multiples of 256 unless it is told. 16 is what its kernels load at a time.
const ALIGNMENT: u32 = 16;

/// A description of one shape's product and the algorithm chosen for it.
struct Chosen {
    description: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Chosen {
    fn drop(&mut self) {
        // SAFETY: null, or made by `Chosen::new`.
        unsafe {
            for layout in [self.weights, self.x, self.out] {
                if !layout.is_null() {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            if !self.description.is_null() {
                let _ = result::destroy_matmul_desc(self.description);
            }
        }
    }
}

impl Chosen {
    /// `None` if the library has no algorithm for it.
    fn new(gemm: &Gemm, p: &Product, workspace: usize) -> Result<Option<Chosen>, CublasError> {
        // Sums in f32; of f32 values, not of their first 10 bits (TF32), which would be another compute type.
        use sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let kind = if p.dtype == DType::F32 { CUDA_R_32F } else { CUDA_R_16BF };
        // SAFETY: a plain struct of integers.
        let algorithm = unsafe { std::mem::zeroed() };
        let mut chosen = Chosen {
            description: std::ptr::null_mut(),
            weights: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            out: std::ptr::null_mut(),
            algorithm,
        };
        chosen.description = result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
        // In the library's terms, columns first: out (n_out, rows) = transposed weights (n_in, n_out) times x (n_in, rows).
        let transposed: i32 = 1;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute is a 32-bit integer.
        unsafe {
            let value = std::ptr::from_ref(&transposed).cast::<c_void>();
            result::set_matmul_desc_attribute(chosen.description, attribute, value, size_of::<i32>())?;
        }
        chosen.weights = result::create_matrix_layout(kind, p.n_in as u64, p.n_out as u64, p.n_in as i64)?;
        chosen.x = result::create_matrix_layout(kind, p.n_in as u64, p.rows as u64, p.n_in as i64)?;
        chosen.out = result::create_matrix_layout(CUDA_R_32F, p.n_out as u64, p.rows as u64, p.out_stride as i64)?;
        let preference = result::create_matmul_pref()?;
        let found = chosen.search(gemm, preference, workspace);
        // SAFETY: made above.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        match found {
            Ok(found) => chosen.algorithm = found.algo,
            Err(e) if is_unsupported(e) => return Ok(None),
            Err(e) => return Err(e),
        }
        Ok(Some(chosen))
    }

    fn search(
        &self,
        gemm: &Gemm,
        preference: sys::cublasLtMatmulPreference_t,
        workspace: usize,
    ) -> Result<sys::cublasLtMatmulHeuristicResult_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        };
        // SAFETY: the attributes are a size and 32-bit integers; all handles live.
        unsafe {
            let value = std::ptr::from_ref(&workspace).cast::<c_void>();
            let attribute = CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, attribute, value, size_of::<usize>())?;
            for attribute in [
                CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                let value = std::ptr::from_ref(&ALIGNMENT).cast::<c_void>();
                result::set_matmul_pref_attribute(preference, attribute, value, size_of::<u32>())?;
            }
            let (weights, x, out) = (self.weights, self.x, self.out);
            result::get_matmul_algo_heuristic(gemm.handle, self.description, weights, x, out, out, preference)
        }
    }
}

/// The library or the device cannot do such a product.
fn is_unsupported(e: CublasError) -> bool {
    use sys::cublasStatus_t::{CUBLAS_STATUS_ARCH_MISMATCH, CUBLAS_STATUS_NOT_SUPPORTED};
    matches!(e.0, CUBLAS_STATUS_NOT_SUPPORTED | CUBLAS_STATUS_ARCH_MISMATCH)
}

/// Type, n_out, n_in, rows, out_stride.
type Shape = (DType, usize, usize, usize, usize);

/// What one session needs for products.
pub struct Workspace {
    gemm: Arc<Gemm>,
    buffer: Buffer,
    /// A matrix, or a part of one, converted to bf16.
    converted: Buffer,
    /// `None` if there is no algorithm.
    chosen: HashMap<Shape, Option<Chosen>>,
}

// SAFETY: descriptions and layouts are plain data behind pointers with one owner.
unsafe impl Send for Workspace {}

impl Workspace {
    const BYTES: usize = 32 << 20;
    const CONVERTED: usize = 64 << 20;

    /// `strip` bytes, a strip of the widest matrix, is the least that `converted` holds; `largest`, a whole matrix, the most.
    pub fn new(device: &Arc<Device>, gemm: Arc<Gemm>, strip: usize, largest: usize) -> Result<Workspace> {
        Ok(Workspace {
            gemm,
            buffer: Buffer::new(device, "scratch in device memory", Self::BYTES)?,
            converted: Buffer::new(device, "scratch in device memory", largest.min(Self::CONVERTED).max(strip))?,
            chosen: HashMap::new(),
        })
    }

    pub fn bytes(&self) -> usize {
        self.buffer.bytes() + self.converted.bytes()
    }

    /// `out[row][i] = W[i] x[row] + b[i]`, the matrix converted to bf16 first where it is stored otherwise, piece by piece. False if the
    /// library has no algorithm for that; `out` is then to be computed by others.
    ///
    /// # Safety
    /// Everything is allocated for as many rows, and lives until the stream is through.
    pub unsafe fn linear(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        x: Activations,
        matrix: &DeviceMatrix,
        out: Address,
        rows: usize,
    ) -> Result<bool> {
        let pitch = matrix.n_in.next_multiple_of(32);
        debug_assert_eq!(x.stride as usize, pitch);
        let mut product = Product {
            dtype: DType::BF16,
            weights: matrix.weights,
            x: x.hi,
            out,
            n_out: matrix.n_out,
            n_in: pitch,
            rows,
            out_stride: matrix.n_out,
        };
        match matrix.dtype {
            DType::BF16 | DType::F32 => {
                if matrix.dtype == DType::F32 {
                    (product.dtype, product.x) = (DType::F32, x.exact);
                }
                // SAFETY: the caller's promise.
                if !unsafe { self.multiply(stream, &product)? } {
                    return Ok(false);
                }
            }
            dtype => {
                let per_strip = strip_bytes(dtype, matrix.n_in);
                let at_once = (self.converted.bytes() / (STRIP * pitch * 2)).max(1);
                product.weights = self.converted.address();
                let piece = |first: usize| {
                    let n = at_once.min(matrix.strips() - first);
                    let n_out = (n * STRIP).min(matrix.n_out - first * STRIP);
                    (n, Product { out: out + (first * STRIP * 4) as u64, n_out, ..product })
                };
                // Both shapes, before anything is converted.
                for first in [0, (matrix.strips() - 1) / at_once * at_once] {
                    if self.choose(&piece(first).1)?.is_none() {
                        return Ok(false);
                    }
                }
                for first in (0..matrix.strips()).step_by(at_once) {
                    let (n, product) = piece(first);
                    let parameters = DequantizeParams {
                        weights: matrix.weights + (first * per_strip) as u64,
                        out: self.converted.address(),
                        n_in: matrix.n_in as u32,
                        n_strips: n as u32,
                    };
                    let grid = Grid { blocks: (n, 1, 1), threads: THREADS, shared: 0 };
                    // SAFETY: `converted` holds as many strips, see `new`; the rest is the caller's promise.
                    let is_done = unsafe {
                        stream.launch(kernels.dequantize[&dtype], grid, &parameters)?;
                        self.multiply(stream, &product)?
                    };
                    if !is_done {
                        return Ok(false);
                    }
                }
            }
        }
        if matrix.bias != 0 {
            let parameters = BiasParams { y: out, bias: matrix.bias, rows: rows as u32, n: matrix.n_out as u32 };
            let grid = Grid { blocks: (rows, 1, 1), threads: THREADS, shared: 0 };
            // SAFETY: the caller's promise.
            unsafe { stream.launch(kernels.add_bias, grid, &parameters)? };
        }
        Ok(true)
    }

    /// `None` if the library has no algorithm for it.
    fn choose(&mut self, p: &Product) -> Result<&mut Option<Chosen>> {
        // Prompts of many lengths must not pile up descriptions.
        const MOST: usize = 1024;
        let key = (p.dtype, p.n_out, p.n_in, p.rows, p.out_stride);
        if self.chosen.len() >= MOST && !self.chosen.contains_key(&key) {
            self.chosen.clear();
        }
        Ok(match self.chosen.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let chosen = Chosen::new(&self.gemm, p, Self::BYTES).map_err(failed)?;
                if chosen.is_none() {
                    log::info!("cuBLASLt has no algorithm for {p:?}");
                }
                new.insert(chosen)
            }
        })
    }

    /// False if the library has no algorithm for it.
    ///
    /// # Safety
    /// The addresses have the shapes, and live until the stream is through.
    unsafe fn multiply(&mut self, stream: &Stream, p: &Product) -> Result<bool> {
        let (handle, workspace) = (self.gemm.handle, self.buffer.address());
        let known = self.choose(p)?;
        let Some(chosen) = known else { return Ok(false) };
        let (one, zero) = (1.0f32, 0.0f32);
        let pointer = |address: Address| address as *mut c_void;
        // SAFETY: handles live in `chosen`; the rest is the caller's promise.
        let done = unsafe {
            result::matmul(
                handle,
                chosen.description,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&zero).cast(),
                pointer(p.weights),
                chosen.weights,
                pointer(p.x),
                chosen.x,
                pointer(p.out),
                chosen.out,
                pointer(p.out),
                chosen.out,
                &chosen.algorithm,
                pointer(workspace),
                Self::BYTES,
                stream.raw().cast(),
            )
        };
        match done {
            Ok(()) => Ok(true),
            Err(e) if is_unsupported(e) => {
                *known = None;
                Ok(false)
            }
            Err(e) => Err(failed(e)),
        }
    }
}
