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
    /// Not f16's precision, but the range of f32.
    PHD_CACHE_BF16,
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
    /// 0 = one per physical core that the process may use.
    pub n_threads: u32,
    /// A phd_cache_type.
    pub cache_type: u32,
    /// Called between the passes of a long prefill; may be null.
    pub progress: phd_progress,
    pub progress_user: *mut c_void,
    /// Texts that phd_seq_retain keeps at most.
    pub n_retained: u32,
    /// For speculative decoding: positions that can be taken back without recomputing hidden rows; and the tokens, for each
    /// sequence of a batch, whose logits PHD_ENTRY_LOGITS_ALL can ask for are one more (16 in all at least).
    pub n_draft: u32,
    /// 1: a sequence's results must not depend, in any bit, on who shares its batches. On the CPU they never do; a backend that
    /// would trade that for speed does not under this flag.
    pub batch_invariant: u32,
    /// Must be 0.
    pub reserved: u32,
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
    pub n_heads: u32,
    /// Heads of keys and values.
    pub n_kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Width of the feed-forward layers.
    pub n_ff: u32,
    /// 1, or 0 for a checkpoint of token ids only.
    pub has_tokenizer: u32,
    /// Parameters in the checkpoint's tensors.
    pub n_params: u64,
    /// Bytes of the checkpoint's tensors, as it stores them.
    pub weights_bytes: u64,
}

/// A text that describes a model: see phd_model_string.
#[repr(C)]
#[derive(Clone, Copy)]
pub enum phd_model_text {
    /// The family, by the checkpoint's name for it: "llama".
    PHD_MODEL_ARCHITECTURE = 0,
    /// What a GGUF file calls its model (`general.name`); may be empty.
    PHD_MODEL_NAME,
    /// The type that most parameters are stored in: "Q4_1".
    PHD_MODEL_WEIGHT_TYPE,
    /// What computes: the backend and its variant.
    PHD_MODEL_BACKEND,
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

/// How a session's pool is used, in positions of whole blocks: used + retained + free is the whole pool.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_usage {
    pub struct_size: usize,
    /// In blocks that sequences refer to.
    pub used: u64,
    /// In blocks that nobody refers to.
    pub free: u64,
    /// The part of `used` that several sequences share, counted once.
    pub shared: u64,
    /// In blocks that only retained texts refer to: given up as soon as a sequence needs them.
    pub retained: u64,
    /// Positions of a block.
    pub block: u64,
}

/// A session's counters since it was created; times in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_stats {
    pub struct_size: usize,
    /// Positions appended by entries of several tokens.
    pub prompt_tokens: u64,
    /// Positions appended by entries of one token.
    pub step_tokens: u64,
    /// Time in calls with an entry of several tokens.
    pub prefill_ns: u64,
    /// Time in calls of single tokens only.
    pub step_ns: u64,
    /// Time that calls have waited for one another.
    pub wait_ns: u64,
    /// Calls that extend sequences, failed ones included.
    pub calls: u64,
    /// Passes over the weights.
    pub passes: u64,
    /// Rows that have entered a layer, summed over layers.
    pub rows: u64,
    pub cancelled: u64,
    /// Calls that found the cache full.
    pub cache_full: u64,
    pub prefix_lookups: u64,
    /// Look-ups that found at least one token.
    pub prefix_hits: u64,
    /// Positions taken over instead of computed.
    pub prefix_tokens: u64,
    /// Positions dropped by policies.
    pub dropped: u64,
    /// Positions that retained texts have given up.
    pub evicted: u64,
}

/// What happens when a sequence has no room for more.
#[repr(C)]
pub enum phd_when_full {
    /// PHD_ERROR_CACHE_FULL.
    PHD_WHEN_FULL_STOP = 0,
    /// The oldest positions after the first `n_keep` are dropped: half of what could be, or as much as is needed, in whole chunks of
    /// the model. The remaining text has positions without a gap, as in training.
    PHD_WHEN_FULL_DROP_MIDDLE,
}

/// See phd_seq_set_policy.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_seq_policy {
    pub struct_size: usize,
    /// A phd_when_full.
    pub when_full: u32,
    /// Positions at the beginning that are never dropped; rounded up to whole blocks.
    pub n_keep: u32,
    /// Positions that the sequence may have; 0 = as many as the session allows.
    pub limit: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// What an embedding is of.
#[repr(C)]
pub enum phd_pooling {
    /// The last position.
    PHD_POOLING_LAST = 0,
    /// The mean over all positions given.
    PHD_POOLING_MEAN,
}

/// Leave the logits of the entry's last position.
pub const PHD_ENTRY_LOGITS: u32 = 1;
/// Leave the logits of all of the entry's positions: see phd_logits_at.
pub const PHD_ENTRY_LOGITS_ALL: u32 = 2;

/// One sequence's part of a batch. All entries of an array have the `struct_size` of the first, `sizeof(phd_batch_entry)`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_batch_entry {
    pub struct_size: usize,
    pub seq: i32,
    /// PHD_ENTRY_LOGITS, PHD_ENTRY_LOGITS_ALL, or 0: then the sequence has no logits afterwards.
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
            n_retained: 64,
            n_draft: 0,
            batch_invariant: 0,
            reserved: 0,
        }
    }
}

// SAFETY: as above.
unsafe impl Versioned for phd_seq_policy {
    const NAME: &'static str = "phd_seq_policy";

    fn defaults() -> Self {
        let when_full = phd_when_full::PHD_WHEN_FULL_STOP as u32;
        phd_seq_policy { struct_size: size_of::<Self>(), when_full, n_keep: 0, limit: 0, reserved: 0 }
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

/// Writes the defaults into `policy`; `struct_size` is `sizeof(phd_seq_policy)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_policy_init(policy: *mut phd_seq_policy, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { init(policy, struct_size) }
}
