//! The C boundary and nothing else: handles, status codes, parameter structs, every `extern "C"` function.
//!
//! Each export goes through [`guard`], which catches panics and turns a `Result` into a status. Nothing here unwinds into
//! the caller, aborts, prints or exits.

// C names are C's own.
#![allow(non_camel_case_types, clippy::missing_safety_doc)]

mod convert;
mod log;
mod params;
mod sampler;
mod session;
mod speculative;
mod status;
mod text;

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::Once;

pub use convert::*;
pub use log::*;
pub use params::*;
pub use sampler::*;
pub use session::*;
pub use speculative::*;
pub use status::*;
pub use text::*;

use crate::error::{Error, Result, invalid, unsupported};
use crate::model::{BackendKind, LoadOptions, Model};

/// Weights and tokenizer: immutable, shared by any number of threads.
pub struct phd_model {
    pub(crate) model: Arc<Model>,
}

/// Runs an export's body: a panic becomes `PHD_ERROR_INTERNAL`, a failure is described in `*error`.
fn guard(error: *mut *mut phd_error, body: impl FnOnce() -> Result<()>) -> phd_status {
    // Rust reports panics on stderr, on whatever thread; this boundary does not print. The hook is that of the Rust runtime
    // within libphd, which a host written in C or Go has no other of. Tests of this crate want their panics reported.
    static QUIET: Once = Once::new();
    if !cfg!(test) {
        QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    }
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<&str>().map(|s| s.to_string());
        let what = what.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Internal(what.unwrap_or_else(|| "panic".to_owned())))
    });
    match result {
        Ok(()) => phd_status::PHD_OK,
        Err(e) => status::report(e, error),
    }
}

/// The object behind a handle that must not be null.
///
/// # Safety
/// `handle` is null or was made by this library and not freed, and nothing holds it exclusively.
unsafe fn borrow<'a, T>(handle: *const T, name: &str) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { handle.as_ref() }.ok_or_else(|| invalid!("{name} is null"))
}

/// Where an output goes.
///
/// # Safety
/// `out` is null or points to memory for a `T` that the caller may write.
unsafe fn output<'a, T>(out: *mut T, name: &str) -> Result<&'a mut std::mem::MaybeUninit<T>> {
    // SAFETY: the caller's promise; MaybeUninit asks nothing of what is there.
    unsafe { out.cast::<std::mem::MaybeUninit<T>>().as_mut() }.ok_or_else(|| invalid!("{name} is null"))
}

/// An input array, which may be null if it is empty.
///
/// # Safety
/// `data` is null or points to `len` readable elements.
unsafe fn input<'a, T>(data: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(invalid!("{name} is null, but its length is {len}"));
    }
    if len > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(invalid!("{name} has a length of {len}, more than memory holds"));
    }
    // SAFETY: not null, readable for `len` elements by the caller's promise, and within isize::MAX bytes.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// An input text, which may be null if it is empty.
///
/// # Safety
/// `text` is null or points to `len` readable bytes.
unsafe fn utf8<'a>(text: *const c_char, len: usize, name: &str) -> Result<&'a str> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { input(text.cast::<u8>(), len, name)? };
    std::str::from_utf8(bytes)
        .map_err(|e| invalid!("{name} is not UTF-8: byte {} is no part of a character", e.valid_up_to()))
}

/// A path given as a terminated string.
///
/// # Safety
/// `path` is null or a terminated string.
unsafe fn path_of<'a>(path: *const c_char) -> Result<&'a Path> {
    if path.is_null() {
        return Err(invalid!("path is null"));
    }
    // SAFETY: the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    path.to_str().map(Path::new).map_err(|_| invalid!("path is not UTF-8"))
}

/// Whether the caller's buffer has room for `needed` elements; a small one gets `BufferTooSmall` and the size in `*n`. Nothing else
/// is written: what follows may still fail.
///
/// # Safety
/// `n` is null or the caller's size_t.
unsafe fn check_room<U>(to: *mut U, capacity: usize, needed: usize, n: *mut usize, name: &str) -> Result<()> {
    if to.is_null() && capacity > 0 {
        return Err(invalid!("{name} is null, but its capacity is {capacity}"));
    }
    // SAFETY: the caller's promise.
    let n = unsafe { output(n, "the length") }?;
    if needed > capacity {
        n.write(needed);
        return Err(Error::BufferTooSmall { needed, capacity });
    }
    Ok(())
}

/// Copies `from` into the caller's buffer; a small one gets `BufferTooSmall` and the size in `*n`.
///
/// # Safety
/// `to` is null or writable for `capacity` elements, `n` null or the caller's size_t.
unsafe fn copy_out<T: Copy, U>(from: &[T], to: *mut U, capacity: usize, n: *mut usize, name: &str) -> Result<()> {
    assert_eq!(size_of::<T>(), size_of::<U>());
    // SAFETY: the caller's promises; `to` is writable for `capacity` >= `from.len()` elements of the same size, and freshly owned
    // memory cannot overlap it.
    unsafe {
        check_room(to, capacity, from.len(), n, name)?;
        output(n, "the length")?.write(from.len());
        if !from.is_empty() {
            std::ptr::copy_nonoverlapping(from.as_ptr().cast(), to, from.len());
        }
    }
    Ok(())
}

/// Grows when the ABI breaks.
#[unsafe(no_mangle)]
pub extern "C" fn phd_abi_version() -> u32 {
    1
}

/// The library's version, such as "0.1.0"; static.
#[unsafe(no_mangle)]
pub extern "C" fn phd_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Loads a Hub folder or a GGUF file. `params` may be null. On failure `*out` is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_model_load(
    path: *const c_char,
    params: *const phd_model_params,
    out: *mut *mut phd_model,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract: `path` is null or a terminated string, `params` null or a struct of its own struct_size,
        // `out` null or a pointer's place.
        let (path, params, out) =
            unsafe { (path_of(path)?, params::read::<phd_model_params>(params)?, output(out, "out")?) };
        let backend = match params.backend {
            0 => BackendKind::Auto,
            1 => BackendKind::Cpu,
            2 => BackendKind::Cuda,
            3 => BackendKind::Reference,
            other => return Err(invalid!("backend is {other}, expected a phd_backend")),
        };
        if params.device != 0 && backend != BackendKind::Cuda {
            return Err(unsupported!("device {} does not exist on this backend, expected 0", params.device));
        }
        let mut progress = params.progress.map(|callback| {
            let user = params.progress_user;
            // SAFETY: the C contract: the callback may be called with `user` while phd_model_load runs.
            move |fraction: f32| unsafe { callback(fraction, user) }
        });
        let rules =
            (params.copies != 0).then_some((params.copies as usize, params.window as usize, params.chunk as usize));
        let options = LoadOptions {
            backend,
            device: params.device,
            mmap: params.no_mmap == 0,
            rules,
            progress: progress.as_mut().map(|p| p as &mut dyn FnMut(f32) -> bool),
        };
        let model = Model::load(path, options)?;
        out.write(Box::into_raw(Box::new(phd_model { model: Arc::new(model) })));
        Ok(())
    })
}

/// Frees the handle; null is fine. Sessions keep what they need alive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_model_free(model: *mut phd_model) {
    guard(std::ptr::null_mut(), || {
        if !model.is_null() {
            // SAFETY: made by phd_model_load and, by the C contract, freed once.
            drop(unsafe { Box::from_raw(model) });
        }
        Ok(())
    });
}

/// Describes a model. The caller sets `out->struct_size`; no more than that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_model_info(
    model: *const phd_model,
    out: *mut phd_model_desc,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: a live handle and an out struct of its own struct_size, by the C contract.
        let model = &unsafe { borrow(model, "model") }?.model;
        let desc = model.desc();
        let value = phd_model_desc {
            struct_size: 0,
            n_vocab: desc.n_vocab as u32,
            n_layers: desc.n_layers as u32,
            n_embd: desc.n_embd as u32,
            n_ctx_train: desc.n_ctx_train as u32,
            copies: desc.rules.copies as u32,
            window: desc.rules.window as u32,
            chunk: desc.rules.chunk as u32,
            n_heads: desc.n_heads as u32,
            n_kv_heads: desc.n_kv_heads as u32,
            head_dim: desc.head_dim as u32,
            n_ff: desc.n_ff as u32,
            has_tokenizer: model.tokenizer().is_some().into(),
            n_params: desc.n_parameters as u64,
            weights_bytes: desc.weight_bytes as u64,
        };
        // SAFETY: as above.
        unsafe { params::write(value, out) }
    })
}

/// A text that describes a model, `kind` a phd_model_text: `*len` bytes of UTF-8, not terminated. Sizes are handled as in
/// phd_tokenize.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_model_string(
    model: *const phd_model,
    kind: u32,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let model = &unsafe { borrow(model, "model") }?.model;
        let desc = model.desc();
        let found = match kind {
            0 => desc.family.clone(),
            1 => desc.name.clone(),
            2 => desc.weight_type.to_string(),
            3 => model.backend_name(),
            other => return Err(invalid!("kind is {other}, expected a phd_model_text")),
        };
        // SAFETY: the C contract.
        unsafe { copy_out(found.as_bytes(), text, capacity, len, "text") }
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn a_panic_becomes_a_status_with_its_message() {
        let mut error = std::ptr::null_mut();
        let status = guard(&mut error, || std::panic::resume_unwind(Box::new("on purpose")));
        assert_eq!(status, phd_status::PHD_ERROR_INTERNAL);
        // SAFETY: set by the failed call; freed once.
        unsafe {
            let message = CStr::from_ptr(phd_error_message(error));
            assert!(message.to_str().unwrap().contains("on purpose"));
            phd_error_free(error);
        }
    }
}
