//! Text to tokens and back.

use std::ffi::c_char;
use std::sync::Arc;

use super::{borrow, copy_out, guard, input, output, phd_error, phd_model, phd_status};
use crate::error::{Error, Result, invalid, unsupported};
use crate::model::Model;
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// Flags of phd_tokenize: add the special tokens that the model expects around a text.
pub const PHD_TOKENIZE_ADD_SPECIAL: u32 = 1;
/// Flags of phd_tokenize: take the spelling of a special token in the text for that token.
pub const PHD_TOKENIZE_PARSE_SPECIAL: u32 = 2;

pub(super) fn tokenizer(model: &Model) -> Result<&Tokenizer> {
    model.tokenizer().ok_or_else(|| unsupported!("the checkpoint has no tokenizer: token ids only"))
}

fn id(token: i32) -> Result<u32> {
    u32::try_from(token).map_err(|_| invalid!("token is {token}, expected a token id"))
}

/// Token ids of `len` bytes of UTF-8. `*n_tokens` is how many there are; if that exceeds `capacity`, nothing else is
/// written and the status is `PHD_ERROR_BUFFER_TOO_SMALL`. A null buffer with capacity 0 asks for the count.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_tokenize(
    model: *const phd_model,
    text: *const c_char,
    len: usize,
    flags: u32,
    tokens: *mut i32,
    capacity: usize,
    n_tokens: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, text) = unsafe { (borrow(model, "model")?, input(text.cast::<u8>(), len, "text")?) };
        if flags & !(PHD_TOKENIZE_ADD_SPECIAL | PHD_TOKENIZE_PARSE_SPECIAL) != 0 {
            return Err(invalid!("flags is {flags:#x}, expected bits 0 and 1 only"));
        }
        let (add, parse) = (flags & PHD_TOKENIZE_ADD_SPECIAL != 0, flags & PHD_TOKENIZE_PARSE_SPECIAL != 0);
        let ids = tokenizer(&model.model)?.encode(text, add, parse)?;
        // SAFETY: the C contract.
        unsafe { copy_out(&ids, tokens, capacity, n_tokens, "tokens") }
    })
}

/// The text of tokens, `*len` bytes, not terminated; it may end within a character. Control tokens have no text. Sizes
/// are handled as in phd_tokenize.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_detokenize(
    model: *const phd_model,
    tokens: *const i32,
    n_tokens: usize,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, tokens) = unsafe { (borrow(model, "model")?, input(tokens, n_tokens, "tokens")?) };
        let ids = tokens.iter().map(|&t| id(t)).collect::<Result<Vec<u32>>>()?;
        let bytes = tokenizer(&model.model)?.decode(&ids)?;
        // SAFETY: the C contract.
        unsafe { copy_out(&bytes, text, capacity, len, "text") }
    })
}

/// Whether generation ends with `token`: end of text, of turn, of message.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_token_is_end(
    model: *const phd_model,
    token: i32,
    is_end: *mut bool,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, out) = unsafe { (borrow(model, "model")?, output(is_end, "is_end")?) };
        out.write(tokenizer(&model.model)?.is_end_of_generation(id(token)?));
        Ok(())
    })
}

/// A streaming detokenizer: holds back the bytes of a character that later tokens complete.
pub struct phd_stream {
    model: Arc<Model>,
    decoder: StreamDecoder,
}

/// Creates a streaming detokenizer. On failure `*out` is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_create(
    model: *const phd_model,
    out: *mut *mut phd_stream,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, out) = unsafe { (borrow(model, "model")?, output(out, "out")?) };
        tokenizer(&model.model)?;
        out.write(Box::into_raw(Box::new(phd_stream { model: model.model.clone(), decoder: StreamDecoder::new() })));
        Ok(())
    })
}

/// Passes one token and writes the whole characters that it completes, `*len` bytes of UTF-8, not terminated. With
/// `PHD_ERROR_BUFFER_TOO_SMALL` the token has not been taken.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_push(
    stream: *mut phd_stream,
    token: i32,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    // SAFETY: the C contract.
    unsafe { stream_text(stream, text, capacity, len, error, |d, t, out| d.push(t, id(token)?, out)) }
}

/// Ends the text: an incomplete character becomes U+FFFD. The stream can then begin another.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_finish(
    stream: *mut phd_stream,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    let finish = |decoder: &mut StreamDecoder, _: &Tokenizer, out: &mut String| {
        decoder.finish(out);
        *decoder = StreamDecoder::new();
        Ok(())
    };
    // SAFETY: the C contract.
    unsafe { stream_text(stream, text, capacity, len, error, finish) }
}

/// Advances a stream if its text fits.
///
/// # Safety
/// The C contract of phd_stream_push.
unsafe fn stream_text(
    stream: *mut phd_stream,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
    advance: impl FnOnce(&mut StreamDecoder, &Tokenizer, &mut String) -> Result<()>,
) -> phd_status {
    guard(error, || {
        // SAFETY: a live handle that no other thread uses.
        let stream = unsafe { stream.as_mut() }.ok_or_else(|| invalid!("stream is null"))?;
        let tokenizer =
            stream.model.tokenizer().ok_or_else(|| Error::Internal("a stream without tokenizer".to_owned()))?;
        let (mut next, mut out) = (stream.decoder.clone(), String::new());
        advance(&mut next, tokenizer, &mut out)?;
        // SAFETY: the caller's buffer and length.
        unsafe { copy_out(out.as_bytes(), text, capacity, len, "text") }?;
        stream.decoder = next;
        Ok(())
    })
}

/// Frees a stream; null is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_free(stream: *mut phd_stream) {
    guard(std::ptr::null_mut(), || {
        if !stream.is_null() {
            // SAFETY: made by phd_stream_create and, by the C contract, freed once.
            drop(unsafe { Box::from_raw(stream) });
        }
        Ok(())
    });
}
