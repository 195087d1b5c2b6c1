//! Samplers and log-probabilities.

use std::ffi::c_char;

use super::params::{self, Versioned};
use super::session::with;
use super::text::tokenizer;
use super::{borrow, guard, input, output, phd_error, phd_model, phd_session, phd_status, utf8};
use crate::error::{Error, Result, invalid};
use crate::sampling::constraint::{Constraint, TokenEnvironment};
use crate::sampling::{self, Sampler, SamplerParams, StageKind};

/// Turns logits into tokens, reproducibly: a chain of stages, in the order in which they were added. Used by one thread at
/// a time. Without a constraint, sampling allocates nothing.
pub struct phd_sampler {
    sampler: Sampler,
}

/// What a stage of a sampler does; docs/sampling.md says more. The values are fields of phd_sampler_params.
#[repr(C)]
#[derive(Clone, Copy)]
pub enum phd_stage {
    /// repetition_penalty, frequency_penalty, presence_penalty, penalty_last_n
    PHD_STAGE_PENALTIES = 0,
    /// dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n
    PHD_STAGE_DRY,
    /// top_n_sigma
    PHD_STAGE_TOP_N_SIGMA,
    /// top_k
    PHD_STAGE_TOP_K,
    /// typical_p, min_keep
    PHD_STAGE_TYPICAL_P,
    /// top_p, min_keep
    PHD_STAGE_TOP_P,
    /// min_p, min_keep
    PHD_STAGE_MIN_P,
    /// xtc_probability, xtc_threshold, min_keep
    PHD_STAGE_XTC,
    /// temperature, dynatemp_range, dynatemp_exponent
    PHD_STAGE_TEMPERATURE,
    /// Takes the best token. Ends the chain, as the following do.
    PHD_STAGE_GREEDY,
    /// Draws by probability; what a chain ends with if nothing else ends it.
    PHD_STAGE_DRAW,
    /// mirostat_tau, mirostat_eta
    PHD_STAGE_MIROSTAT_V2,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_sampler_params {
    pub struct_size: usize,
    /// 0 = greedy.
    pub temperature: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub min_p: f32,
    /// 1 = off.
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    /// Recent tokens that the penalties look at; 0 = off.
    pub penalty_last_n: u32,
    pub seed: u64,
    /// The temperature varies by this with the entropy; 0 = off.
    pub dynatemp_range: f32,
    pub dynatemp_exponent: f32,
    /// 1 = off.
    pub typical_p: f32,
    /// 0 = off.
    pub top_n_sigma: f32,
    /// 0 = off.
    pub xtc_probability: f32,
    /// Above 0.5 = off.
    pub xtc_threshold: f32,
    /// 0 = off.
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: u32,
    /// Recent tokens that DRY looks at; 0 = off.
    pub dry_penalty_last_n: u32,
    /// 2: the default chain is the temperature and Mirostat 2.0 alone. 0 = off.
    pub mirostat: u32,
    pub mirostat_tau: f32,
    pub mirostat_eta: f32,
    /// Candidates that typical_p, top_p, min_p and XTC leave at least.
    pub min_keep: u32,
}

// SAFETY: repr(C), struct_size first, numbers only.
unsafe impl Versioned for phd_sampler_params {
    const NAME: &'static str = "phd_sampler_params";

    fn defaults() -> Self {
        let p = SamplerParams::default();
        phd_sampler_params {
            struct_size: size_of::<Self>(),
            temperature: p.temperature,
            top_k: p.top_k,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            frequency_penalty: p.frequency_penalty,
            presence_penalty: p.presence_penalty,
            penalty_last_n: p.penalty_last_n,
            seed: p.seed,
            dynatemp_range: p.dynatemp_range,
            dynatemp_exponent: p.dynatemp_exponent,
            typical_p: p.typical_p,
            top_n_sigma: p.top_n_sigma,
            xtc_probability: p.xtc_probability,
            xtc_threshold: p.xtc_threshold,
            dry_multiplier: p.dry_multiplier,
            dry_base: p.dry_base,
            dry_allowed_length: p.dry_allowed_length,
            dry_penalty_last_n: p.dry_penalty_last_n,
            mirostat: p.mirostat,
            mirostat_tau: p.mirostat_tau,
            mirostat_eta: p.mirostat_eta,
            min_keep: p.min_keep,
        }
    }
}

impl phd_sampler_params {
    fn values(&self) -> SamplerParams {
        SamplerParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            penalty_last_n: self.penalty_last_n,
            seed: self.seed,
            dynatemp_range: self.dynatemp_range,
            dynatemp_exponent: self.dynatemp_exponent,
            typical_p: self.typical_p,
            top_n_sigma: self.top_n_sigma,
            xtc_probability: self.xtc_probability,
            xtc_threshold: self.xtc_threshold,
            dry_multiplier: self.dry_multiplier,
            dry_base: self.dry_base,
            dry_allowed_length: self.dry_allowed_length,
            dry_penalty_last_n: self.dry_penalty_last_n,
            mirostat: self.mirostat,
            mirostat_tau: self.mirostat_tau,
            mirostat_eta: self.mirostat_eta,
            min_keep: self.min_keep,
        }
    }
}

/// Writes the defaults into `params`; `struct_size` is `sizeof(phd_sampler_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_params_init(params: *mut phd_sampler_params, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { params::init(params, struct_size) }
}

/// Creates a sampler for logits of `n_vocab` with the default chain: penalties, DRY, top-n-sigma, top-k, typical-p, top-p,
/// min-p, XTC, temperature, draw. `params` may be null. On failure `*out` is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_create(
    params: *const phd_sampler_params,
    n_vocab: usize,
    out: *mut *mut phd_sampler,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (p, out) = unsafe { (params::read::<phd_sampler_params>(params)?, output(out, "out")?) };
        let sampler = Sampler::new(p.values(), n_vocab)?;
        out.write(Box::into_raw(Box::new(phd_sampler { sampler })));
        Ok(())
    })
}

/// Creates a sampler without stages, which draws from all tokens: see phd_sampler_add.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_create_empty(
    n_vocab: usize,
    seed: u64,
    out: *mut *mut phd_sampler,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let out = unsafe { output(out, "out")? };
        let sampler = Sampler::empty(n_vocab, seed)?;
        out.write(Box::into_raw(Box::new(phd_sampler { sampler })));
        Ok(())
    })
}

/// A sampler that continues from the same point, independently.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_clone(
    sampler: *const phd_sampler,
    out: *mut *mut phd_sampler,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, out) = unsafe { (borrow(sampler, "sampler")?, output(out, "out")?) };
        let sampler = sampler.sampler.clone();
        out.write(Box::into_raw(Box::new(phd_sampler { sampler })));
        Ok(())
    })
}

/// The sampler behind a handle.
///
/// # Safety
/// `sampler` is null or a live handle that no other thread uses.
pub(super) unsafe fn exclusive<'a>(sampler: *mut phd_sampler) -> Result<&'a mut Sampler> {
    // SAFETY: the caller's promise.
    unsafe { sampler.as_mut() }.map(|s| &mut s.sampler).ok_or_else(|| invalid!("sampler is null"))
}

/// Appends a stage, a phd_stage, with its values from `params`, which may be null. After a failure the chain is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add(
    sampler: *mut phd_sampler,
    stage: u32,
    params: *const phd_sampler_params,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, p) = unsafe { (exclusive(sampler)?, params::read::<phd_sampler_params>(params)?) };
        let kind = StageKind::ALL.get(stage as usize);
        sampler.push(p.values().stage(*kind.ok_or_else(|| invalid!("stage is {stage}, expected a phd_stage"))?))
    })
}

/// Adds `biases` to the logits of `tokens` (`n` of each) before all stages, whenever it is called; -infinity forbids a
/// token. Biases of a token add up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add_logit_bias(
    sampler: *mut phd_sampler,
    tokens: *const i32,
    biases: *const f32,
    n: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, tokens, biases) =
            unsafe { (exclusive(sampler)?, input(tokens, n, "tokens")?, input(biases, n, "biases")?) };
        sampler.add_logit_bias(tokens.iter().map(|&t| t.into()).zip(biases.iter().copied()))
    })
}

/// Adds a sequence of 1 to 21 tokens that DRY sees no repetition across.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add_dry_breaker(
    sampler: *mut phd_sampler,
    tokens: *const i32,
    n: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, tokens) = unsafe { (exclusive(sampler)?, input(tokens, n, "tokens")?) };
        let tokens = tokens.iter().map(|&t| sampler.known(t.into())).collect::<Result<Vec<u32>>>()?;
        sampler.add_dry_breaker(&tokens)
    })
}

/// The same for 1 to 40 bytes of UTF-8, in all the ways in which the model's tokens spell them. llama.cpp's default
/// breakers are "\n", ":", "\"" and "*".
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add_dry_breaker_text(
    sampler: *mut phd_sampler,
    model: *const phd_model,
    text: *const c_char,
    len: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, model, text) =
            unsafe { (exclusive(sampler)?, borrow(model, "model")?, utf8(text, len, "text")?) };
        sampler.add_dry_breaker_text(text, tokenizer(&model.model)?)
    })
}

/// Sets a constraint made of a text.
///
/// # Safety
/// Those of the C contract for each pointer.
unsafe fn constrain(
    sampler: *mut phd_sampler,
    model: *const phd_model,
    text: (*const c_char, usize, &str),
    make: impl FnOnce(&std::sync::Arc<TokenEnvironment>, &str) -> Result<Constraint, Error>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let (sampler, model, text) =
        unsafe { (exclusive(sampler)?, borrow(model, "model")?, utf8(text.0, text.1, text.2)?) };
    sampler.set_constraint(make(&model.model.token_environment()?, text)?)
}

/// Lets only JSON pass that is valid by a JSON schema, `len` bytes of UTF-8. Then only end tokens are left. The constraint
/// comes before all stages, whenever it is called, and begins with the next token that is accepted, also within a text: what was
/// accepted before is not part of it. A sampler has one at most: see phd_sampler_remove_constraint. Schemas with keywords that are not
/// implemented are refused with `PHD_ERROR_UNSUPPORTED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add_json_schema(
    sampler: *mut phd_sampler,
    model: *const phd_model,
    schema: *const c_char,
    len: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: the C contract.
    guard(error, || unsafe { constrain(sampler, model, (schema, len, "schema"), Constraint::json_schema) })
}

/// The same for a regular expression that the whole text must match; syntax of Rust's regex crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add_regex(
    sampler: *mut phd_sampler,
    model: *const phd_model,
    regex: *const c_char,
    len: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: the C contract.
    guard(error, || unsafe { constrain(sampler, model, (regex, len, "regex"), Constraint::regex) })
}

/// The same for a grammar in llguidance's variant of Lark's syntax.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add_grammar(
    sampler: *mut phd_sampler,
    model: *const phd_model,
    grammar: *const c_char,
    len: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: the C contract.
    guard(error, || unsafe { constrain(sampler, model, (grammar, len, "grammar"), Constraint::grammar) })
}

/// The same for a grammar in llama.cpp's format, GBNF.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_add_gbnf(
    sampler: *mut phd_sampler,
    model: *const phd_model,
    grammar: *const c_char,
    len: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: the C contract.
    guard(error, || unsafe { constrain(sampler, model, (grammar, len, "grammar"), Constraint::gbnf) })
}

/// Whether the constraint has ended: it allows only end tokens. False if it may go on, also where it may end, and without a
/// constraint. What comes after a constraint within a text begins with phd_sampler_remove_constraint.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_constraint_done(
    sampler: *mut phd_sampler,
    done: *mut bool,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, done) = unsafe { (exclusive(sampler)?, output(done, "done")?) };
        let is_done = sampler.constraint_mut().map(Constraint::is_done).transpose()?;
        done.write(is_done.unwrap_or(false));
        Ok(())
    })
}

/// Advances the constraint, and nothing else, by `len` bytes of UTF-8 that are part of the text already: what a token that has
/// been accepted says beyond the point where the constraint was to begin. Text that the constraint does not allow is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_constraint_accept(
    sampler: *mut phd_sampler,
    text: *const c_char,
    len: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, text) = unsafe { (exclusive(sampler)?, utf8(text, len, "text")?) };
        let constraint = sampler.constraint_mut();
        constraint.ok_or_else(|| invalid!("the sampler has no constraint, expected one"))?.accept_text(text)
    })
}

/// Takes the constraint away, if there is one. The text goes on freely, or under another constraint.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_remove_constraint(
    sampler: *mut phd_sampler,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        unsafe { exclusive(sampler)? }.remove_constraint();
        Ok(())
    })
}

/// Chooses a token from `n_vocab` logits, which are not changed. NaN counts as -infinity, which is never chosen. The choice
/// is not remembered: see phd_sampler_accept.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_sample(
    sampler: *mut phd_sampler,
    logits: *const f32,
    n_vocab: usize,
    token: *mut i32,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, logits, token) =
            unsafe { (exclusive(sampler)?, input(logits, n_vocab, "logits")?, output(token, "token")?) };
        token.write(sampler.sample(logits)? as i32);
        Ok(())
    })
}

/// Chooses the next token of `seq`: what phd_sampler_sample does with phd_logits, with the same outcome. Where a GPU computes, its
/// logits are not even copied where its best 64 tokens tell what the sampler chooses, see docs/sampling.md. The session is busy
/// meanwhile, as in any call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sample(
    session: *const phd_session,
    seq: i32,
    sampler: *mut phd_sampler,
    token: *mut i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: live handles and a place for the output, by the C contract.
    unsafe {
        with(session, error, |s| {
            let (sampler, token) = (exclusive(sampler)?, output(token, "token")?);
            token.write(s.sample(seq.into(), sampler)? as i32);
            Ok(())
        })
    }
}

/// The same by the logits of phd_logits_at: after token `index` of the last entry of `seq`, if that asked for
/// PHD_ENTRY_LOGITS_ALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sample_at(
    session: *const phd_session,
    seq: i32,
    index: usize,
    sampler: *mut phd_sampler,
    token: *mut i32,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: live handles and a place for the output, by the C contract.
    unsafe {
        with(session, error, |s| {
            let (sampler, token) = (exclusive(sampler)?, output(token, "token")?);
            token.write(s.sample_at(seq.into(), index, sampler)? as i32);
            Ok(())
        })
    }
}

/// Tells the constraint, the penalties and DRY of a token that has become part of the text. One that the constraint does
/// not allow here is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_accept(
    sampler: *mut phd_sampler,
    token: i32,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let sampler = unsafe { exclusive(sampler)? };
        sampler.accept(sampler.known(token.into())?)
    })
}

/// Tells the penalties and DRY, but not the constraint, of tokens that stand before the text: the prompt.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_accept_prompt(
    sampler: *mut phd_sampler,
    tokens: *const i32,
    n_tokens: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (sampler, tokens) = unsafe { (exclusive(sampler)?, input(tokens, n_tokens, "tokens")?) };
        tokens.iter().try_for_each(|&t| sampler.known(t.into()).map(drop))?;
        tokens.iter().for_each(|&t| sampler.accept_prompt(t as u32));
        Ok(())
    })
}

/// Back to the seed, the beginning of the constraint, and an empty memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_reset(sampler: *mut phd_sampler, error: *mut *mut phd_error) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        unsafe { exclusive(sampler)? }.reset();
        Ok(())
    })
}

/// Frees a sampler; null is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_free(sampler: *mut phd_sampler) {
    guard(std::ptr::null_mut(), || {
        // SAFETY: made by phd_sampler_create and, by the C contract, freed once.
        if unsafe { borrow(sampler.cast_const(), "sampler") }.is_ok() {
            // SAFETY: as above.
            drop(unsafe { Box::from_raw(sampler) });
        }
        Ok(())
    });
}

/// Natural log-probabilities of `n_tokens` tokens by `n_vocab` logits, into `logprobs` (`n_tokens`). Sums are in f64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_logprobs(
    logits: *const f32,
    n_vocab: usize,
    tokens: *const i32,
    n_tokens: usize,
    logprobs: *mut f32,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (logits, tokens, logprobs) = unsafe {
            (
                input(logits, n_vocab, "logits")?,
                input(tokens, n_tokens, "tokens")?,
                outputs(logprobs, n_tokens, "logprobs")?,
            )
        };
        sampling::log_probabilities(logits, tokens, logprobs)
    })
}

/// The `n` most probable tokens by `n_vocab` logits, best first, and their natural log-probabilities: `n` of each are
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_top_logprobs(
    logits: *const f32,
    n_vocab: usize,
    n: usize,
    tokens: *mut i32,
    logprobs: *mut f32,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (logits, tokens, logprobs) = unsafe {
            (input(logits, n_vocab, "logits")?, outputs(tokens, n, "tokens")?, outputs(logprobs, n, "logprobs")?)
        };
        sampling::top_log_probabilities(logits, tokens, logprobs)
    })
}

/// An output array of numbers. Any bytes are a number, also those that C has not set.
///
/// # Safety
/// `data` is null or points to `len` numbers that the caller may write.
unsafe fn outputs<'a, T: Copy>(data: *mut T, len: usize, name: &str) -> Result<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: the caller's promise. Checks null and length.
    unsafe { input(data.cast_const(), len, name)? };
    // SAFETY: not null, writable for `len` elements by the caller's promise, and within isize::MAX bytes.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, len) })
}
