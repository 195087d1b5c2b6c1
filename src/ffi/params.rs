//! Structs that cross the boundary. Each starts with its size, so that programs built against an older header keep
//! working: what they do not know of has its default.

use std::ffi::c_void;

use crate::error::{Result, invalid};

/// What computes.
#[repr(C)]
pub enum phd_backend {
    /// The best there is.
    PHD_BACKEND_AUTO = 0,
    PHD_BACKEND_CPU,
    PHD_BACKEND_CUDA,
    /// Plain f32 on one thread: slow, and what the others are compared with.
    PHD_BACKEND_REFERENCE,
}

/// Element type of cached keys and values.
#[repr(C)]
pub enum phd_cache_type {
    PHD_CACHE_F32 = 0,
    PHD_CACHE_F16,
    PHD_CACHE_Q8_0,
}

/// Told the fraction done, 0 to 1; returning false cancels the call. Must not call into the same session.
pub type phd_progress = Option<unsafe extern "C" fn(fraction: f32, user: *mut c_void) -> bool>;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_model_params {
    pub struct_size: usize,
    /// A phd_backend.
    pub backend: u32,
    pub device: i32,
    /// May be null.
    pub progress: phd_progress,
    pub progress_user: *mut c_void,
    /// Instead of the checkpoint's own hidden decoding; 0 copies: as the checkpoint says.
    pub copies: u32,
    pub window: u32,
    pub chunk: u32,
    /// Read files whole instead of mapping them. A mapped file must not be truncated while the model lives.
    pub no_mmap: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_session_params {
    pub struct_size: usize,
    /// The whole cache, in positions, shared by all sequences.
    pub n_positions: u32,
    pub n_sequences: u32,
    /// 0 = one per physical core.
    pub n_threads: u32,
    /// A phd_cache_type.
    pub cache_type: u32,
    /// Called between the passes of a long prefill; may be null.
    pub progress: phd_progress,
    pub progress_user: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_model_desc {
    pub struct_size: usize,
    pub n_vocab: u32,
    pub n_layers: u32,
    pub n_embd: u32,
    pub n_ctx_train: u32,
    /// K: how often each token is read.
    pub copies: u32,
    /// W, in hidden tokens; 0 = none.
    pub window: u32,
    /// C, in positions; 0 = none.
    pub chunk: u32,
}

/// Exact bytes held by a session; the weights are shared with the model's other sessions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_memory {
    pub struct_size: usize,
    pub weights_bytes: u64,
    /// Keys and values of the original tokens.
    pub cache_bytes: u64,
    /// Hidden-token rings.
    pub hidden_bytes: u64,
    pub scratch_bytes: u64,
}

/// Leave the logits of the entry's last position.
pub const PHD_ENTRY_LOGITS: u32 = 1;

/// One sequence's part of a batch. All entries of an array have the `struct_size` of the first, `sizeof(phd_batch_entry)`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_batch_entry {
    pub struct_size: usize,
    pub seq: i32,
    /// PHD_ENTRY_LOGITS or 0: then the sequence has no logits afterwards.
    pub flags: u32,
    /// What is appended: a piece of a prompt, or one token.
    pub tokens: *const i32,
    pub n_tokens: usize,
}

/// A struct of plain old data with a leading size.
///
/// # Safety
/// `repr(C)`, first field `struct_size: usize`, and valid for any bytes that C may write into its fields.
pub(super) unsafe trait Versioned: Copy {
    const NAME: &'static str;
    fn defaults() -> Self;
}

// SAFETY: repr(C), struct_size first; integers and pointers.
unsafe impl Versioned for phd_model_params {
    const NAME: &'static str = "phd_model_params";

    fn defaults() -> Self {
        phd_model_params {
            struct_size: size_of::<Self>(),
            backend: phd_backend::PHD_BACKEND_AUTO as u32,
            device: 0,
            progress: None,
            progress_user: std::ptr::null_mut(),
            copies: 0,
            window: 0,
            chunk: 0,
            no_mmap: 0,
        }
    }
}

// SAFETY: as above.
unsafe impl Versioned for phd_session_params {
    const NAME: &'static str = "phd_session_params";

    fn defaults() -> Self {
        phd_session_params {
            struct_size: size_of::<Self>(),
            n_positions: 2048,
            n_sequences: 1,
            n_threads: 0,
            cache_type: phd_cache_type::PHD_CACHE_F16 as u32,
            progress: None,
            progress_user: std::ptr::null_mut(),
        }
    }
}

// SAFETY: as above.
unsafe impl Versioned for phd_batch_entry {
    const NAME: &'static str = "phd_batch_entry";

    fn defaults() -> Self {
        phd_batch_entry { struct_size: size_of::<Self>(), seq: 0, flags: 0, tokens: std::ptr::null(), n_tokens: 0 }
    }
}

/// No header declares a larger struct; a larger size is a mistake, not a newer program.
const MAX_STRUCT: usize = 4096;

fn check_size(name: &str, size: usize) -> Result<()> {
    if size <= size_of::<usize>() || size > MAX_STRUCT {
        return Err(invalid!("{name}: struct_size is {size}, expected sizeof({name}); call its init function first"));
    }
    Ok(())
}

/// Reads a parameter struct of any version: fields beyond its size have their defaults; fields beyond what is known must
/// be zero.
///
/// # Safety
/// `params` is null or points to `struct_size` readable bytes.
pub(super) unsafe fn read<T: Versioned>(params: *const T) -> Result<T> {
    let mut value = T::defaults();
    if params.is_null() {
        return Ok(value);
    }
    // SAFETY: at least the size field is there.
    let size = unsafe { params.cast::<usize>().read_unaligned() };
    check_size(T::NAME, size)?;
    let known = size.min(size_of::<T>());
    for i in known..size {
        // SAFETY: within struct_size.
        if unsafe { params.cast::<u8>().add(i).read() } != 0 {
            return Err(invalid!("{}: a field beyond byte {known} is set, which this version does not know", T::NAME));
        }
    }
    // SAFETY: `known` bytes are readable by the caller's promise and writable in `value`; T takes any such bytes.
    unsafe { std::ptr::copy_nonoverlapping(params.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    Ok(value)
}

/// Writes defaults, no more than `struct_size` bytes.
///
/// # Safety
/// `params` is null or points to `struct_size` writable bytes.
pub(super) unsafe fn init<T: Versioned>(params: *mut T, struct_size: usize) {
    if params.is_null() || struct_size < size_of::<usize>() {
        return;
    }
    let value = T::defaults();
    let known = struct_size.min(size_of::<T>());
    // SAFETY: `struct_size` bytes are writable by the caller's promise.
    unsafe {
        std::ptr::write_bytes(params.cast::<u8>(), 0, struct_size);
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), params.cast::<u8>(), known);
        params.cast::<usize>().write_unaligned(struct_size);
    }
}

/// Writes an out struct up to the size that its caller has set in it.
///
/// # Safety
/// `out` is null or points to `struct_size` writable bytes, the size field being set.
pub(super) unsafe fn write<T: Copy>(value: T, out: *mut T) -> Result<()> {
    if out.is_null() {
        return Err(invalid!("out is null"));
    }
    // SAFETY: the size field is there.
    let size = unsafe { out.cast::<usize>().read_unaligned() };
    check_size("the out struct", size)?;
    let from = size_of::<usize>();
    let known = size.min(size_of::<T>());
    // SAFETY: both are readable and writable up to `known`; the size field is left as it is.
    unsafe {
        let bytes = (&raw const value).cast::<u8>();
        std::ptr::copy_nonoverlapping(bytes.add(from), out.cast::<u8>().add(from), known - from);
    }
    Ok(())
}

/// Writes the defaults into `params`; `struct_size` is `sizeof(phd_model_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_model_params_init(params: *mut phd_model_params, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { init(params, struct_size) }
}

/// Writes the defaults into `params`; `struct_size` is `sizeof(phd_session_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_session_params_init(params: *mut phd_session_params, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { init(params, struct_size) }
}
