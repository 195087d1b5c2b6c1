//! Sessions and sequences.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::params::{
    self, PHD_ENTRY_LOGITS, PHD_ENTRY_LOGITS_ALL, phd_batch_entry, phd_memory, phd_seq_policy, phd_session_params,
    phd_stats, phd_usage,
};
use super::{borrow, check_room, copy_out, guard, input, output, path_of, phd_error, phd_model, phd_status};
use crate::error::{Error, Result, invalid};
use crate::session::{BatchEntry, CacheType, CancelHandle, Logits, Policy, Pooling, Session, SessionOptions, WhenFull};
use crate::stats::Stats;

/// A fixed-size KV cache and the sequences in it. Calls from several threads wait for each other.
pub struct phd_session {
    session: Mutex<Session>,
    cancel: CancelHandle,
    stats: Arc<Stats>,
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
        let begin = Instant::now();
        let session =
            self.session.lock().map_err(|_| Error::Internal("this session has failed before; free it".to_owned()))?;
        self.stats.count_wait(begin.elapsed());
        self.inside.store(me, Ordering::Release);
        Ok(Inside { session, inside: &self.inside })
    }
}

/// Runs `body` inside a session.
///
/// # Safety
/// `session` is null or a live handle.
pub(super) unsafe fn with(
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

/// The session that its parameters describe.
pub(super) fn new_session(model: &phd_model, params: &phd_session_params) -> Result<Session> {
    let cache_type = match params.cache_type {
        0 => CacheType::F32,
        1 => CacheType::F16,
        2 => CacheType::Q8_0,
        3 => CacheType::Bf16,
        other => return Err(invalid!("cache_type is {other}, expected a phd_cache_type")),
    };
    let options = SessionOptions {
        n_positions: params.n_positions as usize,
        n_sequences: params.n_sequences as usize,
        n_threads: params.n_threads as usize,
        cache_type,
        n_retained: params.n_retained as usize,
        n_draft: params.n_draft as usize,
        batch_invariant: params.batch_invariant == 1,
        ..Default::default()
    };
    if params.batch_invariant > 1 || params.reserved != 0 {
        let (flag, rest) = (params.batch_invariant, params.reserved);
        return Err(invalid!("batch_invariant is {flag} and reserved {rest}, expected 0 or 1, and 0"));
    }
    let mut session = Session::new(model.model.clone(), &options)?;
    if let Some(callback) = params.progress {
        let user = User(params.progress_user);
        // SAFETY: the C contract: the callback may be called with its pointer while a call on the session runs.
        session.set_progress(Some(Box::new(move |fraction| unsafe { callback(fraction, user.get()) })));
    }
    Ok(session)
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
        let session = new_session(model, &params)?;
        let (cancel, stats) = (session.cancel_handle(), session.stats().clone());
        out.write(Box::into_raw(Box::new(phd_session {
            session: Mutex::new(session),
            cancel,
            stats,
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
            let logits = match flags {
                0 => Logits::Nothing,
                PHD_ENTRY_LOGITS => Logits::Last,
                // With or without the last position's.
                _ if flags & !PHD_ENTRY_LOGITS == PHD_ENTRY_LOGITS_ALL => Logits::Every,
                _ => return Err(invalid!("entry {i} has flags {flags:#x}, expected PHD_ENTRY_LOGITS, _ALL or 0")),
            };
            // SAFETY: readable tokens, by the C contract.
            let tokens = unsafe { input(tokens, n_tokens, "tokens")? };
            Ok(BatchEntry { seq: seq.into(), tokens, logits })
        };
        s.decode_each(n_entries, &mut read)
    };
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, body) }
}

/// The logits that the last call on `seq` left, `n_vocab` of them. They lie in the session and are valid until the next
/// call that changes that sequence. `PHD_ERROR_INVALID_ARGUMENT` if there are none. A GPU's are copied first: phd_sample and
/// phd_sample_at may do without.
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

/// The logits after token `index` of the last entry of `seq`, if that asked for PHD_ENTRY_LOGITS_ALL. They are valid until the
/// sequence is changed or another call asks for all positions'. `PHD_ERROR_INVALID_ARGUMENT` if there are none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_logits_at(
    session: *const phd_session,
    seq: i32,
    index: usize,
    logits: *mut *const f32,
    n_vocab: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and places for the outputs, by the C contract.
    unsafe {
        with(session, error, |s| {
            let (to, n) = (output(logits, "logits")?, output(n_vocab, "n_vocab")?);
            let row = s.logits_at(seq.into(), index)?;
            to.write(row.as_ptr());
            n.write(row.len());
            Ok(())
        })
    }
}

/// Appends tokens as phd_prefill does, leaves no logits, and writes `ln p(tokens[i] | everything before it)` for i = 1.. to
/// `scores[i - 1]`: `n_tokens - 1` of them. A small buffer gets `PHD_ERROR_BUFFER_TOO_SMALL` and nothing is appended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_score(
    session: *mut phd_session,
    seq: i32,
    tokens: *const i32,
    n_tokens: usize,
    scores: *mut f32,
    capacity: usize,
    n_scores: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, readable tokens and writable scores, by the C contract.
    unsafe {
        with(session, error, |s| {
            let tokens = input(tokens, n_tokens, "tokens")?;
            check_room(scores, capacity, tokens.len().saturating_sub(1), n_scores, "scores")?;
            let found = s.score(seq.into(), tokens)?;
            copy_out(&found, scores, capacity, n_scores, "scores")
        })
    }
}

/// Appends tokens as phd_prefill does, leaves no logits, and writes an embedding of them, `n_embd` numbers: the output norm's row of
/// the last copy, `pooling` (a phd_pooling) over the tokens, divided by its length if `normalize`. Empty the sequence before and after
/// for embeddings of single texts. A small buffer gets `PHD_ERROR_BUFFER_TOO_SMALL` and nothing is appended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_embed(
    session: *mut phd_session,
    seq: i32,
    tokens: *const i32,
    n_tokens: usize,
    pooling: u32,
    normalize: bool,
    embedding: *mut f32,
    capacity: usize,
    n_embd: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, readable tokens and a writable embedding, by the C contract.
    unsafe {
        with(session, error, |s| {
            let pooling = match pooling {
                0 => Pooling::Last,
                1 => Pooling::Mean,
                other => return Err(invalid!("pooling is {other}, expected a phd_pooling")),
            };
            let tokens = input(tokens, n_tokens, "tokens")?;
            let mut found = vec![0.0f32; s.model().desc().n_embd];
            check_room(embedding, capacity, found.len(), n_embd, "embedding")?;
            s.embed(seq.into(), tokens, pooling, normalize, &mut found)?;
            copy_out(&found, embedding, capacity, n_embd, "embedding")
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

/// Empties `seq` and keeps its text as long as there is room, so that phd_seq_take_prefix can take it over. Retained texts give way,
/// the least recently used first and from its end, as soon as a sequence needs their blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_retain(session: *mut phd_session, seq: i32, error: *mut *mut phd_error) -> phd_status {
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, |s| s.retain(seq.into())) }
}

/// How many of `tokens` the longest cached text has that they begin with, among all sequences and retained texts; 0 if none.
/// `*seq` is the sequence that has it, or -1. Nothing is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_match_prefix(
    session: *mut phd_session,
    tokens: *const i32,
    n_tokens: usize,
    n_positions: *mut usize,
    seq: *mut i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, readable tokens and places for the outputs, by the C contract.
    unsafe {
        with(session, error, |s| {
            let tokens = input(tokens, n_tokens, "tokens")?;
            let (n_out, seq_out) = (output(n_positions, "n_positions")?, output(seq, "seq")?);
            let (n, source) = s.match_prefix(tokens)?;
            n_out.write(n);
            seq_out.write(source.map_or(-1, |seq| seq as i32));
            Ok(())
        })
    }
}

/// Makes `seq`, whatever it held, the longest cached prefix of `tokens`, and writes its length. Keys and values are shared, not
/// computed. The sequence has no logits: leave the last token out, and prefill what is missing. Of hidden rows at most one chunk's
/// positions are computed again by that (PHD-SWA: a few windows).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_take_prefix(
    session: *mut phd_session,
    seq: i32,
    tokens: *const i32,
    n_tokens: usize,
    n_positions: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, readable tokens and a place for the output, by the C contract.
    unsafe {
        with(session, error, |s| {
            let (tokens, out) = (input(tokens, n_tokens, "tokens")?, output(n_positions, "n_positions")?);
            out.write(s.take_prefix(seq.into(), tokens)?);
            Ok(())
        })
    }
}

/// The tokens of `seq`, in order. A small buffer gets `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_tokens`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_tokens(
    session: *const phd_session,
    seq: i32,
    tokens: *mut i32,
    capacity: usize,
    n_tokens: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and a writable buffer, by the C contract.
    unsafe {
        with(session, error, |s| {
            let text: Vec<i32> = s.tokens(seq.into())?.map(|t| t as i32).collect();
            copy_out(&text, tokens, capacity, n_tokens, "tokens")
        })
    }
}

/// Decides what happens when `seq` is full, from the next call on; null: the default, to stop. Under PHD_WHEN_FULL_DROP_MIDDLE a
/// call that finds no room below `limit` first drops, and is still carried out whole or not at all. For the moment of the dropping
/// the old text and the new one both take room: `limit` is at most the session's positions less `n_keep` and a block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_set_policy(
    session: *mut phd_session,
    seq: i32,
    policy: *const phd_seq_policy,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, and `policy` null or a struct of its own struct_size, by the C contract.
    unsafe {
        with(session, error, |s| {
            let p = params::read::<phd_seq_policy>(policy)?;
            let when_full = match (p.when_full, p.reserved) {
                (0, 0) => WhenFull::Stop,
                (1, 0) => WhenFull::DropMiddle { keep: p.n_keep as usize },
                (other, 0) => return Err(invalid!("when_full is {other}, expected a phd_when_full")),
                (_, other) => return Err(invalid!("reserved is {other}, expected 0")),
            };
            s.set_policy(seq.into(), Policy { when_full, limit: p.limit as usize })
        })
    }
}

/// Positions that its policy has dropped from `seq`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_dropped(
    session: *const phd_session,
    seq: i32,
    n_positions: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and a place for the output, by the C contract.
    unsafe {
        with(session, error, |s| {
            let out = output(n_positions, "n_positions")?;
            out.write(s.dropped(seq.into())?);
            Ok(())
        })
    }
}

/// How the pool is used. The caller sets `out->struct_size`; no more than that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_session_usage(
    session: *const phd_session,
    out: *mut phd_usage,
    error: *mut *mut phd_error,
) -> phd_status {
    let body = |s: &mut Session| {
        let u = s.usage();
        let value = phd_usage {
            struct_size: 0,
            used: u.used as u64,
            free: u.free as u64,
            shared: u.shared as u64,
            retained: u.retained as u64,
            block: s.block() as u64,
        };
        // SAFETY: an out struct of its own struct_size, by the C contract.
        unsafe { params::write(value, out) }
    };
    // SAFETY: a live handle, by the C contract.
    unsafe { with(session, error, body) }
}

/// The session's counters, from any thread, without waiting for a running call. The caller sets `out->struct_size`; no more than
/// that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_session_stats(
    session: *const phd_session,
    out: *mut phd_stats,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: a live handle, by the C contract.
        let s = unsafe { borrow(session, "session") }?.stats.snapshot();
        let value = phd_stats {
            struct_size: 0,
            prompt_tokens: s.prompt_tokens,
            step_tokens: s.step_tokens,
            prefill_ns: s.prefill.as_nanos() as u64,
            step_ns: s.step.as_nanos() as u64,
            wait_ns: s.wait.as_nanos() as u64,
            calls: s.calls,
            passes: s.passes,
            rows: s.rows,
            cancelled: s.cancelled,
            cache_full: s.full,
            prefix_lookups: s.prefix_lookups,
            prefix_hits: s.prefix_hits,
            prefix_tokens: s.prefix_tokens,
            dropped: s.dropped,
            evicted: s.evicted,
        };
        // SAFETY: an out struct of its own struct_size, by the C contract.
        unsafe { params::write(value, out) }
    })
}

/// Writes `seq`, logits included, to `state`: for any session of the same model and cache type. A small buffer gets
/// `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_bytes`. After `PHD_ERROR_BACKEND`, when a device fails, what the buffer holds is no
/// state.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_save(
    session: *const phd_session,
    seq: i32,
    state: *mut u8,
    capacity: usize,
    n_bytes: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and a writable buffer, by the C contract.
    unsafe {
        with(session, error, |s| {
            let n = s.save_size(seq.into())?;
            check_room(state, capacity, n, n_bytes, "state")?;
            // C may not have written the buffer yet.
            std::ptr::write_bytes(state, 0, n);
            s.save(seq.into(), std::slice::from_raw_parts_mut(state, n))?;
            output(n_bytes, "n_bytes")?.write(n);
            Ok(())
        })
    }
}

/// Makes `seq`, whatever it held, what phd_seq_save wrote. A state of another model or cache type, a damaged or a forged one gets
/// `PHD_ERROR_INVALID_ARGUMENT`; after any failure the sequence is what it was, but after `PHD_ERROR_BACKEND`, when a device fails while
/// it is written, it is empty.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_restore(
    session: *mut phd_session,
    seq: i32,
    state: *const u8,
    n_bytes: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and readable bytes, by the C contract.
    unsafe { with(session, error, |s| s.restore(seq.into(), input(state, n_bytes, "state")?)) }
}

/// phd_seq_save to a file, written whole or not at all.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_save_file(
    session: *const phd_session,
    seq: i32,
    path: *const c_char,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and a terminated string, by the C contract.
    unsafe { with(session, error, |s| s.save_file(seq.into(), path_of(path)?)) }
}

/// phd_seq_restore from a file; what is wrong with it is `PHD_ERROR_FORMAT`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_seq_restore_file(
    session: *mut phd_session,
    seq: i32,
    path: *const c_char,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle and a terminated string, by the C contract.
    unsafe { with(session, error, |s| s.restore_file(seq.into(), path_of(path)?)) }
}
