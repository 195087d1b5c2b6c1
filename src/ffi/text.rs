//! Text to tokens and back.

use std::ffi::c_char;
use std::sync::Arc;

use serde_json::Value as Json;

use super::params::{self, Versioned};
use super::{borrow, copy_out, guard, input, output, phd_error, phd_model, phd_status, utf8};
use crate::error::{Error, Result, invalid, unsupported};
use crate::model::Model;
use crate::tokenizer::chat::{ChatTemplate, Conversation, parse_json};
use crate::tokenizer::{Progress, Special, StopStrings, StreamDecoder, Tokenizer};

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

/// What a token is for: see phd_special_token.
#[repr(C)]
#[derive(Clone, Copy)]
pub enum phd_special {
    /// Begins a text.
    PHD_SPECIAL_BOS = 0,
    /// Ends a text.
    PHD_SPECIAL_EOS,
    /// Ends a turn of a conversation.
    PHD_SPECIAL_EOT,
    /// Stands for what the vocabulary cannot spell.
    PHD_SPECIAL_UNK,
    PHD_SPECIAL_PAD,
    /// Filling in the middle: before what stands before the gap.
    PHD_SPECIAL_FIM_PREFIX,
    /// Before what stands behind the gap.
    PHD_SPECIAL_FIM_SUFFIX,
    /// Where the model begins to fill the gap.
    PHD_SPECIAL_FIM_MIDDLE,
    PHD_SPECIAL_FIM_PAD,
    /// Before the name of a repository.
    PHD_SPECIAL_FIM_REPO,
    /// Between files of a repository.
    PHD_SPECIAL_FIM_SEPARATOR,
}

/// The token of a role, `kind` a phd_special, or -1 if the vocabulary has none: as the checkpoint's files say, and where they say
/// nothing by well-known spellings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_special_token(
    model: *const phd_model,
    kind: u32,
    token: *mut i32,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, out) = unsafe { (borrow(model, "model")?, output(token, "token")?) };
        let role = Special::ALL.get(kind as usize).ok_or_else(|| invalid!("kind is {kind}, expected a phd_special"))?;
        out.write(tokenizer(&model.model)?.special(*role).map_or(-1, |id| id as i32));
        Ok(())
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

/// The bytes of one token, which may be part of a character, such as OpenAI's `logprobs` list them. Control tokens have
/// none, or with `special` their spelling. Sizes are handled as in phd_tokenize.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_token_bytes(
    model: *const phd_model,
    token: i32,
    special: bool,
    bytes: *mut u8,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let model = unsafe { borrow(model, "model")? };
        let found = tokenizer(&model.model)?.token_bytes(id(token)?, special)?;
        // SAFETY: the C contract.
        unsafe { copy_out(found, bytes, capacity, len, "bytes") }
    })
}

/// A streaming detokenizer: holds back the bytes of a character that later tokens complete, and text that can be the
/// beginning of a stop string. Used by one thread at a time.
pub struct phd_stream {
    model: Arc<Model>,
    decoder: StreamDecoder,
    /// What the last call made; kept for its memory.
    text: String,
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
        let stream =
            phd_stream { model: model.model.clone(), decoder: StreamDecoder::new(), text: String::with_capacity(64) };
        out.write(Box::into_raw(Box::new(stream)));
        Ok(())
    })
}

/// The stream behind a handle, before its text begins.
///
/// # Safety
/// `stream` is null or a live handle that no other thread uses.
unsafe fn fresh<'a>(stream: *mut phd_stream) -> Result<&'a mut phd_stream> {
    // SAFETY: the caller's promise.
    let stream = unsafe { stream.as_mut() }.ok_or_else(|| invalid!("stream is null"))?;
    match stream.decoder.is_fresh() {
        true => Ok(stream),
        false => Err(invalid!("stream is within a text: phd_stream_finish ends it")),
    }
}

/// Adds a stop string, `len` bytes of UTF-8, 1 to 1024; 64 at most. The text ends before the stop string that is complete
/// first; of several that end together, before the longest. Between texts only. Stop strings stay when a text ends.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_add_stop(
    stream: *mut phd_stream,
    stop: *const c_char,
    len: usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (stream, stop) = unsafe { (fresh(stream)?, utf8(stop, len, "stop")?) };
        let mut stops: Vec<&str> =
            stream.decoder.stops().into_iter().flat_map(StopStrings::stops).map(|s| &**s).collect();
        stops.push(stop);
        let stops = StopStrings::new(&stops)?;
        stream.decoder = std::mem::take(&mut stream.decoder).with_stops(Arc::new(stops));
        Ok(())
    })
}

/// Spells control tokens out (true) or leaves them out (false, as at first). Between texts only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_set_special(
    stream: *mut phd_stream,
    special: bool,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let stream = unsafe { fresh(stream)? };
        stream.decoder = std::mem::take(&mut stream.decoder).with_special(special);
        Ok(())
    })
}

/// Passes one token and writes the text that it completes, `*len` bytes of whole characters of UTF-8, not terminated.
/// After a stop string there is no more text. With `PHD_ERROR_BUFFER_TOO_SMALL` the token has not been taken.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_push(
    stream: *mut phd_stream,
    token: i32,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    let push =
        |decoder: &mut StreamDecoder, tokenizer: &Tokenizer, out: &mut String| decoder.push(tokenizer, id(token)?, out);
    // SAFETY: the C contract.
    unsafe { stream_text(stream, text, capacity, len, error, push) }
}

/// Which stop string ended the text, counted in the order in which they were added, or -1; and the bytes of text written so
/// far, which after a stop string are those before it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_stream_stop(
    stream: *const phd_stream,
    stop: *mut i32,
    n_bytes: *mut u64,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (stream, stop, n_bytes) =
            unsafe { (borrow(stream, "stream")?, output(stop, "stop")?, output(n_bytes, "n_bytes")?) };
        stop.write(stream.decoder.stop().map_or(-1, |stop| stop as i32));
        n_bytes.write(stream.decoder.n_bytes());
        Ok(())
    })
}

/// Ends the text: an incomplete character becomes U+FFFD, and what was held back for a stop string is written. The stream
/// can then begin another text.
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
        decoder.set_progress(Progress::default());
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
        let phd_stream { model, decoder, text: out } =
            unsafe { stream.as_mut() }.ok_or_else(|| invalid!("stream is null"))?;
        let tokenizer = model.tokenizer().ok_or_else(|| Error::Internal("a stream without tokenizer".to_owned()))?;
        let before = decoder.progress();
        out.clear();
        let result = advance(decoder, tokenizer, out)
            // SAFETY: the caller's buffer and length.
            .and_then(|()| unsafe { copy_out(out.as_bytes(), text, capacity, len, "text") });
        if result.is_err() {
            decoder.set_progress(before);
        }
        result
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

/// The Jinja source of one of the checkpoint's chat templates, `*len` bytes of UTF-8, not terminated; a null name of length 0 asks
/// for the default one. `PHD_ERROR_UNSUPPORTED` if there is none of that name. Sizes are handled as in phd_tokenize.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_chat_template(
    model: *const phd_model,
    name: *const c_char,
    name_len: usize,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, name) = unsafe { (borrow(model, "model")?, utf8(name, name_len, "name")?) };
        let name = Some(name).filter(|name| !name.is_empty());
        let source = tokenizer(&model.model)?.choose_chat_template(name, false);
        let source = source.map_err(|e| unsupported!("{e}"))?;
        // SAFETY: the C contract.
        unsafe { copy_out(source.as_bytes(), text, capacity, len, "text") }
    })
}

/// A conversation to render. Texts are JSON by length; null with length 0 leaves one out.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct phd_chat_params {
    pub struct_size: usize,
    /// A list of objects, usually with `role` and `content`.
    pub messages: *const c_char,
    pub messages_len: usize,
    /// A list of objects that describe functions.
    pub tools: *const c_char,
    pub tools_len: usize,
    /// A list of objects with `title` and `text`.
    pub documents: *const c_char,
    pub documents_len: usize,
    /// An object: variables of the template's own, such as `{"enable_thinking": false}`.
    pub variables: *const c_char,
    pub variables_len: usize,
    /// Jinja instead of the checkpoint's template.
    pub source: *const c_char,
    pub source_len: usize,
    /// The name of one of the checkpoint's templates. By default "tool_use" if there is one and tools are given, else
    /// "default".
    pub name: *const c_char,
    pub name_len: usize,
    /// What the template takes for the time, in seconds since 1970 as a clock on the wall shows it; 0: now, in UTC.
    pub now: i64,
    /// Not 0: ends the text with the beginning of the model's turn.
    pub add_generation_prompt: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), struct_size first, numbers and pointers only.
unsafe impl Versioned for phd_chat_params {
    const NAME: &'static str = "phd_chat_params";

    fn defaults() -> Self {
        let (text, len) = (std::ptr::null(), 0);
        phd_chat_params {
            struct_size: size_of::<Self>(),
            messages: text,
            messages_len: len,
            tools: text,
            tools_len: len,
            documents: text,
            documents_len: len,
            variables: text,
            variables_len: len,
            source: text,
            source_len: len,
            name: text,
            name_len: len,
            now: 0,
            add_generation_prompt: 1,
            reserved: 0,
        }
    }
}

/// Writes the defaults into `params`; `struct_size` is `sizeof(phd_chat_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_chat_params_init(params: *mut phd_chat_params, struct_size: usize) {
    // SAFETY: the C contract.
    unsafe { params::init(params, struct_size) }
}

/// The text that a conversation is for the model, `*len` bytes of UTF-8, not terminated: what transformers'
/// `apply_chat_template` makes of it. The template writes the begin token itself: phd_tokenize it with
/// `PHD_TOKENIZE_PARSE_SPECIAL` alone. Sizes are handled as in phd_tokenize; asking for the size renders, too.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_chat_render(
    model: *const phd_model,
    params: *const phd_chat_params,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        // SAFETY: the C contract.
        let (model, p) = unsafe { (borrow(model, "model")?, params::read::<phd_chat_params>(params)?) };
        // SAFETY: the texts that `params` points to, by the C contract.
        let rendered = unsafe { render(tokenizer(&model.model)?, &p) }?;
        // SAFETY: the C contract.
        unsafe { copy_out(rendered.as_bytes(), text, capacity, len, "text") }
    })
}

/// # Safety
/// Each text of `p` is null or readable for its length.
unsafe fn render(tokenizer: &Tokenizer, p: &phd_chat_params) -> Result<String> {
    let json = |text: *const c_char, len, name| {
        // SAFETY: the caller's promise.
        match unsafe { input(text.cast::<u8>(), len, name)? } {
            [] => Ok(Json::Null),
            text => parse_json(text, name),
        }
    };
    let messages = json(p.messages, p.messages_len, "messages")?;
    let tools = json(p.tools, p.tools_len, "tools")?;
    let documents = json(p.documents, p.documents_len, "documents")?;
    let variables = json(p.variables, p.variables_len, "variables")?;
    if !matches!(variables, Json::Null | Json::Object(_)) {
        return Err(invalid!("variables is no object"));
    }
    // SAFETY: the caller's promise.
    let (source, name) = unsafe { (utf8(p.source, p.source_len, "source")?, utf8(p.name, p.name_len, "name")?) };
    let source = match source.is_empty() {
        true => tokenizer.choose_chat_template(Some(name).filter(|n| !n.is_empty()), !tools.is_null())?,
        false => source,
    };
    ChatTemplate::new(source)?.render(&Conversation {
        tools: Some(&tools),
        documents: Some(&documents),
        variables: variables.as_object(),
        add_generation_prompt: p.add_generation_prompt != 0,
        bos: &tokenizer.spelling(tokenizer.bos()),
        eos: &tokenizer.spelling(tokenizer.eos()),
        now: Some(p.now).filter(|&now| now != 0),
        ..Conversation::new(&messages)
    })
}
