//! Sessions and sequences.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::params::{self, PHD_ENTRY_LOGITS, phd_batch_entry, phd_memory, phd_session_params};
use super::{borrow, guard, input, output, phd_error, phd_model, phd_status};
use crate::error::{Error, Result, invalid};
use crate::session::{BatchEntry, CacheType, CancelHandle, Session, SessionOptions};

/// A fixed-size KV cache and the sequences in it. Calls from several threads wait for each other.
pub struct phd_session {
    session: Mutex<Session>,
    cancel: CancelHandle,
    /// Who is inside, so that a call from the session's own callback is refused and not locked out for ever.
    inside: AtomicU64,
}

/// A number for this thread; never 0.
fn this_thread() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static ID: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    ID.with(|id| *id)
}

struct Inside<'a> {
    session: MutexGuard<'a, Session>,
    inside: &'a AtomicU64,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.inside.store(0, Ordering::Release);
    }
}

impl phd_session {
    /// Enters the session. A panic inside poisons the lock: from then on every call fails, other sessions go on.
    fn enter(&self) -> Result<Inside<'_>> {
        let me = this_thread();
        if self.inside.load(Ordering::Acquire) == me {
            return Err(invalid!("the session is called from its own callback"));
        }
        let session =
            self.session.lock().map_err(|_| Error::Internal("this session has failed before; free it".to_owned()))?;
        self.inside.store(me, Ordering::Release);
        Ok(Inside { session, inside: &self.inside })
    }
}

/// Runs `body` inside a session.
///
/// # Safety
/// `session` is null or a live handle.
unsafe fn with(
    session: *const phd_session,
    error: *mut *mut phd_error,
    body: impl FnOnce(&mut Session) -> Result<()>,
) -> phd_status {
    guard(error, || {
        // SAFETY: the caller's promise.
        let mut inside = unsafe { borrow(session, "session") }?.enter()?;
        body(&mut inside.session)
    })
}

/// A pointer for a callback: the caller promises that it may be used from whichever thread makes the call.
struct User(*mut c_void);
// SAFETY: only handed back to the callback, by the thread that the session's caller uses.
unsafe impl Send for User {}

impl User {
    fn get(&self) -> *mut c_void {
        self.0
    }
}

/// Creates a session, with everything it will ever need. `params` may be null. On failure `*out` is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_session_create(
    model: *const phd_model,
    params: *const phd_session_params,
    out: *mut *mut phd_session,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, params, out) =
            unsafe { (borrow(model, "model")?, params::read::<phd_session_params>(params)?, output(out, "out")?) };
        let cache_type = match params.cache_type {
            0 => CacheType::F32,
            1 => CacheType::F16,
            2 => CacheType::Q8_0,
            other => return Err(invalid!("cache_type is {other}, expected a phd_cache_type")),
        };
        let options = SessionOptions {
            n_positions: params.n_positions as usize,
            n_sequences: params.n_sequences as usize,
            n_threads: params.n_threads as usize,
            cache_type,
            ..Default::default()
        };
        let mut session = Session::new(model.model.clone(), &options)?;
        if let Some(callback) = params.progress {
            let user = User(params.progress_user);
            // SAFETY: the C contract: the callback may be called with its pointer while a call on the session runs.
            session.set_progress(Some(Box::new(move |fraction| unsafe { callback(fraction, user.get()) })));
        }
        let cancel = session.cancel_handle();
        out.write(Box::into_raw(Box::new(phd_session {
            session: Mutex::new(session),
            cancel,
            inside: AtomicU64::new(0),
        })));
        Ok(())
    })
}

/// Frees a session; null is fine. No call may be running on it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_session_free(session: *mut phd_session) {
    guard(std::ptr::null_mut(), || {
        if !session.is_null() {
            // SAFETY: made by phd_session_create and, by the C contract, freed once.
            drop(unsafe { Box::from_raw(session) });
        }
        Ok(())
    });
}

/// Reports what the session holds. The caller sets `out->struct_size`; no more than that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_session_memory(
    session: *const phd_session,
    out: *mut phd_memory,
    error: *mut *mut phd_error,
) -> phd_status {
    let body = |s: &mut Session| {
        let m = s.memory();
        let value = phd_memory {
            struct_size: 0,
            weights_bytes: m.weights as u64,
            cache_bytes: m.cache as u64,
            hidden_bytes: m.hidden as u64,
            scratch_bytes: m.scratch as u64,
        };
        // SAFETY: an out struct of its own struct_size, by the C contract.
        unsafe { params::write(value, out) }
    };
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, body) }
}

/// Appends `n_tokens` tokens to `seq` and leaves the last position's logits. After any failure the sequence, its logits
/// included, is what it was; `PHD_ERROR_CACHE_FULL` names the positions needed and free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_prefill(
    session: *mut phd_session,
    seq: i32,
    tokens: *const i32,
    n_tokens: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and `n_tokens` readable tokens, by the C contract.
    unsafe { with(session, error, |s| s.prefill(seq.into(), input(tokens, n_tokens, "tokens")?)) }
}

/// Appends one token; otherwise as phd_prefill.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_step(
    session: *mut phd_session,
    seq: i32,
    token: i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, |s| s.step(seq.into(), token)) }
}

/// Extends several sequences at once: pieces of prompts and single tokens of any of them, each sequence at most once. All copies of
/// all tokens share each pass over the weights. A batch is carried out whole or not at all: after any failure, the cancelling of
/// one of its sequences included, all of them are what they were, their logits included. `PHD_ERROR_CACHE_FULL` names the
/// positions that the batch needs and those free for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_decode(
    session: *mut phd_session,
    entries: *const phd_batch_entry,
    n_entries: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    let body = |s: &mut Session| {
        if entries.is_null() && n_entries > 0 {
            return Err(invalid!("entries is null, but there are {n_entries}"));
        }
        let mut stride = None;
        let mut read = |i: usize| {
            // SAFETY: entry `i` begins `i` strides after the first, by the C contract; `read` checks its size.
            let entry = unsafe {
                let at = entries.byte_add(i * stride.unwrap_or(0));
                let size = at.cast::<usize>().read_unaligned();
                if *stride.get_or_insert(size) != size {
                    return Err(invalid!("entry {i} has struct_size {size}, entry 0 another"));
                }
                params::read(at)?
            };
            let phd_batch_entry { seq, flags, tokens, n_tokens, .. } = entry;
            if flags & !PHD_ENTRY_LOGITS != 0 {
                return Err(invalid!("entry {i} has flags {flags:#x}, expected PHD_ENTRY_LOGITS or 0"));
            }
            // SAFETY: readable tokens, by the C contract.
            let tokens = unsafe { input(tokens, n_tokens, "tokens")? };
            Ok(BatchEntry { seq: seq.into(), tokens, logits: flags != 0 })
        };
        s.decode_each(&mut (0..n_entries).map(&mut read))
    };
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, body) }
}

/// The logits that the last call on `seq` left, `n_vocab` of them. They lie in the session and are valid until the next
/// call that changes that sequence. `PHD_ERROR_INVALID_ARGUMENT` if there are none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_logits(
    session: *const phd_session,
    seq: i32,
    logits: *mut *const f32,
    n_vocab: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and places for the outputs, by the C contract.
    unsafe {
        with(session, error, |s| {
            let (to, n) = (output(logits, "logits")?, output(n_vocab, "n_vocab")?);
            let row = s.logits(seq.into())?;
            to.write(row.as_ptr());
            n.write(row.len());
            Ok(())
        })
    }
}

/// Positions in `seq`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_length(
    session: *const phd_session,
    seq: i32,
    n_positions: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and a place for the output, by the C contract.
    unsafe {
        with(session, error, |s| {
            let out = output(n_positions, "n_positions")?;
            out.write(s.len(seq.into())?);
            Ok(())
        })
    }
}

/// Shortens `seq` to `n_positions`; 0 empties it. Unless that changes nothing its logits are gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_truncate(
    session: *mut phd_session,
    seq: i32,
    n_positions: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, |s| s.truncate(seq.into(), n_positions)) }
}

/// Makes `dst` a copy of `src`, logits included, whatever `dst` held. Cache blocks are shared until one of the two writes
/// into them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_fork(
    session: *mut phd_session,
    src: i32,
    dst: i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, |s| s.fork(src.into(), dst.into())) }
}

/// From any thread: the call running on `seq`, or else the next one, returns `PHD_ERROR_CANCELLED`, which uses the
/// request up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_cancel(
    session: *const phd_session,
    seq: i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, by the C contract.
    guard(error, || unsafe { borrow(session, "session") }?.cancel.cancel(seq.into()))
}

/// Takes back a request to cancel that no call has used up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_cancel_clear(
    session: *const phd_session,
    seq: i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, by the C contract.
    guard(error, || unsafe { borrow(session, "session") }?.cancel.clear(seq.into()))
}
