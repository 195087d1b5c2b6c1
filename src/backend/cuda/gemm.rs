//! Prefill's matrix products through cuBLASLt, found at run time.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::driver::{Buffer, Device, Stream};
use super::params::Address;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// cuBLASLt's handle.
pub struct Gemm(sys::cublasLtHandle_t);

// SAFETY: the library's documentation allows a handle to be used from several threads at once.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

fn failed(e: CublasError) -> Error {
    Error::Backend(format!("cuBLASLt: {e:?}"))
}

impl Gemm {
    pub fn find() -> Result<Gemm> {
        // SAFETY: looks for a library; loading cuBLASLt runs its initialisers, which is what is wanted.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Backend("cuBLASLt (libcublasLt.so) was not found".into()));
        }
        result::create_handle().map(Gemm).map_err(failed)
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: made by `find`.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// `out[row][i] = sum over k of weights[i][k] x[row][k]`; weights and x of `dtype`, BF16 or F32, rows `n_in` apart; out f32.
pub struct Product {
    pub dtype: DType,
    pub weights: Address,
    pub x: Address,
    pub out: Address,
    pub n_out: usize,
    pub n_in: usize,
    pub rows: usize,
    pub out_stride: usize,
}

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
    fn new(gemm: &Gemm, p: &Product, workspace: usize) -> Result<Chosen, CublasError> {
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
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute is a size; all handles were just made.
        let found = unsafe {
            let value = std::ptr::from_ref(&workspace).cast::<c_void>();
            result::set_matmul_pref_attribute(preference, attribute, value, size_of::<usize>()).and_then(|()| {
                result::get_matmul_algo_heuristic(
                    gemm.0,
                    chosen.description,
                    chosen.weights,
                    chosen.x,
                    chosen.out,
                    chosen.out,
                    preference,
                )
            })
        };
        // SAFETY: made above.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        chosen.algorithm = found?.algo;
        Ok(chosen)
    }
}

/// What one session needs for products.
pub struct Workspace {
    gemm: Arc<Gemm>,
    buffer: Buffer,
    /// A matrix, or a part of one, converted to bf16.
    pub converted: Buffer,
    chosen: HashMap<(DType, usize, usize, usize, usize), Chosen>, // (type, n_out, n_in, rows, out_stride)
}

// SAFETY: descriptions and layouts are plain data behind pointers with one owner.
unsafe impl Send for Workspace {}

impl Workspace {
    const BYTES: usize = 32 << 20;
    const CONVERTED: usize = 64 << 20;

    /// `strip` bytes is the least that `converted` holds.
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

    pub fn multiply(&mut self, stream: &Stream, p: &Product) -> Result<()> {
        // Prompts of many lengths must not pile up descriptions.
        const MOST: usize = 1024;
        let key = (p.dtype, p.n_out, p.n_in, p.rows, p.out_stride);
        if self.chosen.len() >= MOST && !self.chosen.contains_key(&key) {
            self.chosen.clear();
        }
        let chosen = match self.chosen.entry(key) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => {
                new.insert(Chosen::new(&self.gemm, p, Self::BYTES).map_err(failed)?)
            }
        };
        let (one, zero) = (1.0f32, 0.0f32);
        let pointer = |address: Address| address as *mut c_void;
        // SAFETY: handles live in `chosen`; the addresses are the caller's, with the shapes that the layouts say.
        unsafe {
            result::matmul(
                self.gemm.0,
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
                pointer(self.buffer.address()),
                Self::BYTES,
                stream.raw().cast(),
            )
        }
        .map_err(failed)
    }
}
