//! Samplers.

use super::params::{self, Versioned};
use super::{borrow, guard, input, output, phd_error, phd_status};
use crate::error::{Result, invalid};
use crate::sampling::{Sampler, SamplerParams};

/// Turns logits into tokens, reproducibly. Used by one thread at a time; allocates nothing after its creation.
pub struct phd_sampler {
    sampler: Sampler,
    n_vocab: usize,
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
        }
    }
}

/// Writes the defaults into `params`; `struct_size` is `sizeof(phd_sampler_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_params_init(params: *mut phd_sampler_params, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { params::init(params, struct_size) }
}

/// Creates a sampler for logits of `n_vocab`. `params` may be null. On failure `*out` is as it was.
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
        let params = SamplerParams {
            temperature: p.temperature,
            top_k: p.top_k,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            frequency_penalty: p.frequency_penalty,
            presence_penalty: p.presence_penalty,
            penalty_last_n: p.penalty_last_n,
            seed: p.seed,
        };
        let sampler = Sampler::new(params, n_vocab)?;
        out.write(Box::into_raw(Box::new(phd_sampler { sampler, n_vocab })));
        Ok(())
    })
}

/// The sampler behind a handle.
///
/// # Safety
/// `sampler` is null or a live handle that no other thread uses.
unsafe fn exclusive<'a>(sampler: *mut phd_sampler) -> Result<&'a mut phd_sampler> {
    // SAFETY: the caller's promise.
    unsafe { sampler.as_mut() }.ok_or_else(|| invalid!("sampler is null"))
}

/// Chooses a token from `n_vocab` logits, which are not changed. The choice is not remembered: see phd_sampler_accept.
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
        token.write(sampler.sampler.sample(logits)? as i32);
        Ok(())
    })
}

/// Tells the penalties of a token that has become part of the text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_accept(
    sampler: *mut phd_sampler,
    token: i32,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let sampler = unsafe { exclusive(sampler)? };
        let known = usize::try_from(token).is_ok_and(|t| t < sampler.n_vocab);
        if !known {
            return Err(invalid!("token is {token}, expected 0 to {}", sampler.n_vocab - 1));
        }
        sampler.sampler.accept(token as u32);
        Ok(())
    })
}

/// Back to the seed and an empty memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_sampler_reset(sampler: *mut phd_sampler, error: *mut *mut phd_error) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        unsafe { exclusive(sampler)? }.sampler.reset();
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
