//! Speculative decoding.

use super::params::{self, Versioned, phd_session_params};
use super::sampler::{exclusive as exclusive_sampler, phd_sampler};
use super::session::{new_session, phd_session, with};
use super::{borrow, copy_out, guard, output, phd_error, phd_model, phd_status};
use crate::error::{Error, Result, invalid};
use crate::speculative::{DraftModel, PromptLookup, Speculator};

/// Guesses how the texts of a session's sequences go on, and verifies the guesses: docs/speculative.md. One thread at a time may use it,
/// together with the session and the sampler of the call.
pub struct phd_speculator {
    speculator: Speculator,
}

/// Where drafts come from.
#[repr(C)]
pub enum phd_draft_kind {
    /// The text itself: where its last tokens stood before, it may go on as it did there.
    PHD_DRAFT_LOOKUP = 0,
    /// A smaller model of the same vocabulary.
    PHD_DRAFT_MODEL,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_speculator_params {
    pub struct_size: usize,
    /// A phd_draft_kind.
    pub kind: u32,
    /// Drafts of a step at most, 1 to 256. The session's `n_draft` must be at least as large.
    pub n_draft: u32,
    /// Lookup: tokens that must have stood before, and how many of them at most are compared, up to 64.
    pub ngram_min: u32,
    pub ngram_max: u32,
    /// Draft model: drafting stops before a token less probable than this; 0 = never.
    pub p_min: f32,
    /// Must be 0.
    pub reserved: u32,
}

/// Counts since a speculator was created.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_draft_stats {
    pub struct_size: usize,
    /// Passes verified.
    pub steps: u64,
    /// Drafts that they verified.
    pub drafted: u64,
    /// Those that became text.
    pub accepted: u64,
    /// Bytes of the draft model's session, weights not counted.
    pub draft_bytes: u64,
}

// SAFETY: repr(C), struct_size first, numbers only.
unsafe impl Versioned for phd_speculator_params {
    const NAME: &'static str = "phd_speculator_params";

    fn defaults() -> Self {
        phd_speculator_params {
            struct_size: size_of::<Self>(),
            kind: phd_draft_kind::PHD_DRAFT_LOOKUP as u32,
            n_draft: 4,
            ngram_min: 2,
            ngram_max: 8,
            p_min: 0.75,
            reserved: 0,
        }
    }
}

/// Writes the defaults into `params`; `struct_size` is `sizeof(phd_speculator_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_params_init(params: *mut phd_speculator_params, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { params::init(params, struct_size) }
}

/// Creates a speculator for sessions of `model`. For PHD_DRAFT_MODEL it makes a session of `draft_model` with `draft_params` (null: the
/// defaults) for itself, which follows each sequence in the sequence of the same number and needs as many of them; a draft model whose
/// vocabulary differs is refused, naming the first token that does. For PHD_DRAFT_LOOKUP both must be null. `params` may be null. On
/// failure `*out` is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_create(
    model: *const phd_model,
    draft_model: *const phd_model,
    draft_params: *const phd_session_params,
    params: *const phd_speculator_params,
    out: *mut *mut phd_speculator,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, p, out) =
            unsafe { (borrow(model, "model")?, params::read::<phd_speculator_params>(params)?, output(out, "out")?) };
        let n_draft = p.n_draft as usize;
        let speculator = match (p.kind, p.reserved) {
            (_, 1..) => return Err(invalid!("reserved is {}, expected 0", p.reserved)),
            (0, _) if !draft_model.is_null() || !draft_params.is_null() => {
                return Err(invalid!("draft_model or draft_params is set, but kind is PHD_DRAFT_LOOKUP"));
            }
            (0, _) => Speculator::new(PromptLookup::new(p.ngram_min as usize, p.ngram_max as usize)?, n_draft)?,
            (1, _) => {
                // SAFETY: the C contract.
                let (draft_model, mut session_params) =
                    unsafe { (borrow(draft_model, "draft_model")?, params::read(draft_params)?) };
                session_params.n_draft = session_params.n_draft.max(p.n_draft);
                let session = new_session(draft_model, &session_params)?;
                Speculator::new(DraftModel::new(&model.model, session, p.p_min)?, n_draft)?
            }
            (other, _) => return Err(invalid!("kind is {other}, expected a phd_draft_kind")),
        };
        out.write(Box::into_raw(Box::new(phd_speculator { speculator })));
        Ok(())
    })
}

/// Frees a speculator; null is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_free(speculator: *mut phd_speculator) {
    guard(std::ptr::null_mut(), || {
        if !speculator.is_null() {
            // SAFETY: made by phd_speculator_create and, by the C contract, freed once.
            drop(unsafe { Box::from_raw(speculator) });
        }
        Ok(())
    });
}

/// The speculator behind a handle.
///
/// # Safety
/// `speculator` is null or a live handle that no other thread uses.
unsafe fn exclusive<'a>(speculator: *mut phd_speculator) -> Result<&'a mut Speculator> {
    // SAFETY: the caller's promise.
    unsafe { speculator.as_mut() }.map(|s| &mut s.speculator).ok_or_else(|| invalid!("speculator is null"))
}

/// Refuses a buffer for fewer than `needed` tokens, with the size in `*n`, before anything happens.
///
/// # Safety
/// `n` is null or the caller's size_t.
unsafe fn check_buffer(tokens: *mut i32, capacity: usize, needed: usize, n: *mut usize, name: &str) -> Result<()> {
    // SAFETY: the caller's promise.
    let n = unsafe { output(n, "the length")? };
    if tokens.is_null() && capacity > 0 {
        return Err(invalid!("{name} is null, but its capacity is {capacity}"));
    }
    if capacity < needed {
        n.write(needed);
        return Err(Error::BufferTooSmall { needed, capacity });
    }
    Ok(())
}

/// Guesses how `seq` goes on after `token`, which was chosen and is not in the session: up to `n_draft` tokens, and no more than the
/// sequence has room for without its policy dropping any. The first part of a step, for servers: decode `token` and the drafts of
/// each sequence as one entry with PHD_ENTRY_LOGITS_ALL (if all of them together get `PHD_ERROR_CACHE_FULL`, without drafts), and then
/// phd_speculator_accept. A buffer of less than `n_draft` tokens gets `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_drafts`. The
/// session is not changed; cancelling `seq` ends what the draft model computes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_draft(
    speculator: *mut phd_speculator,
    session: *mut phd_session,
    seq: i32,
    token: i32,
    drafts: *mut i32,
    capacity: usize,
    n_drafts: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: live handles and a writable buffer, by the C contract.
    unsafe {
        with(session, error, |s| {
            let speculator = exclusive(speculator)?;
            check_buffer(drafts, capacity, speculator.n_draft(), n_drafts, "drafts")?;
            copy_out(speculator.draft(s, seq.into(), token)?, drafts, capacity, n_drafts, "drafts")
        })
    }
}

/// Samples after each token of the last entry of `seq`, which was decoded with PHD_ENTRY_LOGITS_ALL and is the token chosen before and
/// its drafts, until a sampled token is not the draft there or ends the generation, and tells the sampler of each. Writes the sampled
/// tokens, one at least. All of them but the last, and nothing after them, are then in the session: the last is what the next step
/// begins with. phd_logits has what it was sampled from. A buffer of fewer tokens than the entry has gets
/// `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_tokens`. After any failure session and sampler are what they were; what fails
/// after the first token ends the run, and comes back as the next step's failure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_accept(
    speculator: *mut phd_speculator,
    session: *mut phd_session,
    seq: i32,
    sampler: *mut phd_sampler,
    tokens: *mut i32,
    capacity: usize,
    n_tokens: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: live handles and a writable buffer, by the C contract.
    unsafe {
        with(session, error, |s| {
            let (speculator, sampler) = (exclusive(speculator)?, exclusive_sampler(sampler)?);
            check_buffer(tokens, capacity, s.n_logits_at(seq.into())?, n_tokens, "tokens")?;
            copy_out(speculator.accept(s, seq.into(), sampler)?, tokens, capacity, n_tokens, "tokens")
        })
    }
}

/// Appends `token`, which was chosen last, with drafts, in one pass, and writes the tokens that follow it: one, and one more for each
/// draft that was right. They are those that phd_step, phd_sampler_sample and phd_sampler_accept in turn would give. All of them but the
/// last are then in the session too; the last is what the next step begins with. A buffer of less than `n_draft + 1` tokens gets
/// `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_tokens`. After any failure the sequence's text and the sampler are what they were,
/// but for what a policy has dropped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_step(
    speculator: *mut phd_speculator,
    session: *mut phd_session,
    seq: i32,
    token: i32,
    sampler: *mut phd_sampler,
    tokens: *mut i32,
    capacity: usize,
    n_tokens: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: live handles and a writable buffer, by the C contract.
    unsafe {
        with(session, error, |s| {
            let (speculator, sampler) = (exclusive(speculator)?, exclusive_sampler(sampler)?);
            check_buffer(tokens, capacity, speculator.n_draft() + 1, n_tokens, "tokens")?;
            copy_out(speculator.step(s, seq.into(), token, sampler)?, tokens, capacity, n_tokens, "tokens")
        })
    }
}

/// Gives up what the draft model holds of a sequence's text: for one that has ended, so that others have its room.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_forget(
    speculator: *mut phd_speculator,
    seq: i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: a live handle, by the C contract.
    guard(error, || unsafe { exclusive(speculator)? }.forget(seq.into()))
}

/// What has been drafted and accepted. The caller sets `out->struct_size`; no more than that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_speculator_stats(
    speculator: *const phd_speculator,
    out: *mut phd_draft_stats,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: a live handle, by the C contract.
        let speculator = &unsafe { borrow(speculator, "speculator")? }.speculator;
        let stats = speculator.stats();
        let value = phd_draft_stats {
            struct_size: 0,
            steps: stats.steps,
            drafted: stats.drafted,
            accepted: stats.accepted,
            draft_bytes: speculator.drafter_bytes() as u64,
        };
        // SAFETY: an out struct of its own struct_size, by the C contract.
        unsafe { params::write(value, out) }
    })
}
