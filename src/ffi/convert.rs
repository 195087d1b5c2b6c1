//! Conversion of checkpoints.

use std::ffi::{CStr, c_char, c_void};
use std::path::Path;

use super::params::{self, Versioned, phd_progress};
use super::{guard, phd_error, phd_status};
use crate::convert::{self, Options};
use crate::error::{Result, invalid};
use crate::tensor::DType;

/// Type of a file's weights. Values never change meaning; new ones are added at the end.
#[repr(C)]
pub enum phd_weight_type {
    /// As they are; for phd_convert.
    PHD_WEIGHT_AUTO = 0,
    PHD_WEIGHT_F32,
    PHD_WEIGHT_F16,
    PHD_WEIGHT_BF16,
    PHD_WEIGHT_Q4_0,
    PHD_WEIGHT_Q4_1,
    PHD_WEIGHT_Q8_0,
    PHD_WEIGHT_Q4_K,
    PHD_WEIGHT_Q5_K,
    PHD_WEIGHT_Q6_K,
}

/// Weights that are quantized already may be quantized once more.
pub const PHD_CONVERT_REQUANTIZE: u32 = 1;
/// No finer type for the output layer.
pub const PHD_CONVERT_PURE: u32 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_convert_params {
    pub struct_size: usize,
    /// A phd_weight_type.
    pub weight_type: u32,
    /// PHD_CONVERT_REQUANTIZE, PHD_CONVERT_PURE.
    pub flags: u32,
    /// 0 = one per physical core that the process may use.
    pub n_threads: u32,
    /// Read the input whole instead of mapping it. A mapped file must not be truncated meanwhile.
    pub no_mmap: u32,
    /// `tokenizer.ggml.pre` instead of what the folder's tokenizer.json says; null: that. For phd_convert.
    pub pre: *const c_char,
    /// May be null. Returning false cancels.
    pub progress: phd_progress,
    pub progress_user: *mut c_void,
}

// SAFETY: repr(C), struct_size first; integers and pointers.
unsafe impl Versioned for phd_convert_params {
    const NAME: &'static str = "phd_convert_params";

    fn defaults() -> Self {
        phd_convert_params {
            struct_size: size_of::<Self>(),
            weight_type: phd_weight_type::PHD_WEIGHT_AUTO as u32,
            flags: 0,
            n_threads: 0,
            no_mmap: 0,
            pre: std::ptr::null(),
            progress: None,
            progress_user: std::ptr::null_mut(),
        }
    }
}

/// A terminated string that must not be null.
///
/// # Safety
/// `text` is null or a terminated string that outlives the result.
unsafe fn string<'a>(text: *const c_char, name: &str) -> Result<&'a str> {
    if text.is_null() {
        return Err(invalid!("{name} is null"));
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| invalid!("{name} is not UTF-8"))
}

/// Checks the arguments and hands them to `body`: input, output, type, options.
///
/// # Safety
/// Paths are null or terminated strings, `params` null or a struct of its own struct_size.
unsafe fn with_arguments(
    input: *const c_char,
    input_name: &str,
    out: *const c_char,
    params: *const phd_convert_params,
    body: impl FnOnce(&Path, &Path, Option<DType>, Options) -> Result<()>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let (input, out, params) = unsafe { (string(input, input_name)?, string(out, "out")?, params::read(params)?) };
    let dtype = match params.weight_type {
        0 => None,
        n => Some(
            *convert::TYPES
                .get(n as usize - 1)
                .ok_or_else(|| invalid!("weight_type is {n}, expected a phd_weight_type"))?,
        ),
    };
    if params.flags & !(PHD_CONVERT_REQUANTIZE | PHD_CONVERT_PURE) != 0 {
        return Err(invalid!("flags is {:#x}, expected PHD_CONVERT_ flags", params.flags));
    }
    // SAFETY: by the C contract a terminated string, which was just found not to be null.
    let pre = if params.pre.is_null() { None } else { Some(unsafe { string(params.pre, "pre") }?) };
    let mut progress = params.progress.map(|callback| {
        let user = params.progress_user;
        // SAFETY: the C contract: the callback may be called with `user` while the conversion runs.
        move |fraction: f32| unsafe { callback(fraction, user) }
    });
    let options = Options {
        pre,
        requantize: params.flags & PHD_CONVERT_REQUANTIZE != 0,
        pure: params.flags & PHD_CONVERT_PURE != 0,
        n_threads: params.n_threads as usize,
        mmap: params.no_mmap == 0,
        progress: progress.as_mut().map(|p| p as &mut dyn FnMut(f32) -> bool),
    };
    body(Path::new(input), Path::new(out), dtype, options)
}

/// Writes the defaults into `params`; `struct_size` is `sizeof(phd_convert_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_convert_params_init(params: *mut phd_convert_params, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { params::init(params, struct_size) }
}

/// Converts a Hub folder to the GGUF file `out`, which llama.cpp reads as the vanilla base. `params` may be null. The file is
/// written whole or not at all: after a failure or a cancel `out` is what it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_convert(
    folder: *const c_char,
    out: *const c_char,
    params: *const phd_convert_params,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        unsafe {
            with_arguments(folder, "folder", out, params, |folder, out, dtype, options| {
                convert::convert(folder, out, dtype, options).map(drop)
            })
        }
    })
}

/// Converts the weights of the GGUF file `input` to `params->weight_type` and keeps everything else. Written whole or not at
/// all, as by phd_convert.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_quantize(
    input: *const c_char,
    out: *const c_char,
    params: *const phd_convert_params,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        unsafe {
            with_arguments(input, "input", out, params, |input, out, dtype, options| {
                let dtype = dtype.ok_or_else(|| invalid!("weight_type is PHD_WEIGHT_AUTO, expected a type"))?;
                if options.pre.is_some() {
                    return Err(invalid!("pre is set, but a GGUF file keeps its vocabulary"));
                }
                convert::quantize(input, out, dtype, options).map(drop)
            })
        }
    })
}
