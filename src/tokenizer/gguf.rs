//! Vocabularies of GGUF files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::json;
use tokenizers::Tokenizer as HubTokenizer;

use super::hub::HubPair;
use super::sentencepiece::{CONTROL, SentencePiece, UNKNOWN, USER_DEFINED};
use super::special::{Special, Specials, is_spelling};
use super::{DEFAULT_TEMPLATE, Encoder, Spelling, Token, Tokenizer};
use crate::checkpoint::gguf::Metadata;
use crate::error::{Error, Result, unsupported};

/// What the `tokenizer.*` keys of a GGUF file hold.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: "gpt2" is byte-level BPE, "llama" SentencePiece.
    pub model: String,
    /// `tokenizer.ggml.pre`: how byte-level BPE cuts a text into words.
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    pub scores: Option<Vec<f32>>,
    pub token_types: Option<Vec<i32>>,
    /// "left right", in order of rank.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    /// Filling in the middle: prefix, suffix, middle, pad, repository, file separator.
    pub fim: [Option<u32>; 6],
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.NAME`, by name.
    pub named_chat_templates: BTreeMap<String, String>,
}

impl GgufVocab {
    /// Reads the keys; `None` for a file without vocabulary.
    pub fn from_metadata(m: &Metadata) -> Result<Option<GgufVocab>> {
        let Some(model) = m.str("tokenizer.ggml.model")?.filter(|&model| model != "no_vocab" && model != "none") else {
            return Ok(None);
        };
        let id = |name: &str| m.u32(&format!("tokenizer.ggml.{name}_token_id"));
        Ok(Some(GgufVocab {
            model: model.to_owned(),
            pre: m.str("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens: m.strings("tokenizer.ggml.tokens")?.unwrap_or_default().to_vec(),
            scores: m.f32s("tokenizer.ggml.scores")?.map(<[f32]>::to_vec),
            token_types: m.i32s("tokenizer.ggml.token_type")?.map(<[i32]>::to_vec),
            merges: m.strings("tokenizer.ggml.merges")?.unwrap_or_default().to_vec(),
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            eom: id("eom")?,
            unk: id("unknown")?,
            pad: id("padding")?,
            fim: [
                // The second name is that of older files.
                id("fim_pre")?.or(id("prefix")?),
                id("fim_suf")?.or(id("suffix")?),
                id("fim_mid")?.or(id("middle")?),
                id("fim_pad")?,
                id("fim_rep")?,
                id("fim_sep")?,
            ],
            add_bos: m.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: m.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: m.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: m.str("tokenizer.chat_template")?.map(str::to_owned),
            named_chat_templates: named_chat_templates(m)?,
        }))
    }
}

fn named_chat_templates(m: &Metadata) -> Result<BTreeMap<String, String>> {
    let names = m.iter().filter_map(|(key, _)| key.strip_prefix("tokenizer.chat_template."));
    names
        .map(|name| Ok((name, m.str(&format!("tokenizer.chat_template.{name}"))?)))
        .filter_map(|named| named.map(|(name, source)| Some((name.to_owned(), source?.to_owned()))).transpose())
        .collect()
}

const GPT2_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3_WORDS: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_WORDS: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A pre-tokenizer: the patterns that cut words out one after the other, whether words that are tokens skip the merges,
/// and whether a begin token is added unless the file says so.
struct Words {
    patterns: &'static [&'static str],
    ignore_merges: bool,
    add_bos: bool,
}

fn words(pre: &str) -> Option<Words> {
    let plain = |patterns| Some(Words { patterns, ignore_merges: false, add_bos: false });
    match pre {
        "gpt2" | "gpt-2" | "olmo" => plain(&[GPT2_WORDS]),
        "smollm" => plain(&[r"\p{N}", GPT2_WORDS]),
        "qwen2" => plain(&[QWEN2_WORDS]),
        "dbrx" => plain(&[LLAMA3_WORDS]),
        "llama-bpe" | "llama3" | "llama-v3" => {
            Some(Words { patterns: &[LLAMA3_WORDS], ignore_merges: true, add_bos: true })
        }
        _ => None,
    }
}

/// Whether a `tokenizer.ggml.pre` is implemented.
pub(crate) fn is_known_pre(pre: &str) -> bool {
    words(pre).is_some()
}

/// Whether a token's text stands for a byte: `<0xNN>`.
pub(crate) fn is_byte_piece(text: &str) -> bool {
    super::sentencepiece::byte_piece(text).is_some()
}

/// The `tokenizer.ggml.pre` of byte-level BPE that cuts words out by this pattern, spelled as here or as on the Hub.
pub(crate) fn pre_of_pattern(pattern: &str, ignore_merges: bool) -> Option<&'static str> {
    let contractions = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
    let pattern = pattern.replacen("(?i:'s|'t|'re|'ve|'m|'ll|'d)", contractions, 1);
    match (pattern.as_str(), ignore_merges) {
        (LLAMA3_WORDS, true) => Some("llama-bpe"),
        (LLAMA3_WORDS, false) => Some("dbrx"),
        (QWEN2_WORDS, false) => Some("qwen2"),
        (GPT2_WORDS, false) => Some("gpt-2"),
        _ => None,
    }
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file; `path` is named in messages.
    ///
    /// # Errors
    /// `Format` for arrays that do not fit each other, `Unsupported` naming the kind or pre-tokenizer.
    pub fn from_gguf(path: &Path, vocab: GgufVocab) -> Result<Tokenizer> {
        let fail = |what: String| Error::format(path, what);
        let n = vocab.tokens.len();
        if n == 0 {
            return Err(fail("tokenizer.ggml.tokens is empty or missing".to_owned()));
        }
        let types = vocab.token_types.clone().unwrap_or_else(|| vec![1; n]);
        if types.len() != n {
            return Err(fail(format!("tokenizer.ggml.token_type has {} entries, expected {n}", types.len())));
        }
        for (name, id) in
            [("bos", vocab.bos), ("eos", vocab.eos), ("eot", vocab.eot), ("eom", vocab.eom), ("unknown", vocab.unk)]
        {
            if let Some(id) = id.filter(|&id| id as usize >= n) {
                return Err(fail(format!("tokenizer.ggml.{name}_token_id is {id}, expected less than {n}")));
            }
        }
        let (encoder, spelling, add_bos, defaults) = match vocab.model.as_str() {
            "gpt2" => {
                let (encoder, add_bos) = byte_level(path, &vocab, &types)?;
                (encoder, Spelling::ByteLevel, add_bos, (None, None, None))
            }
            "llama" => {
                let scores = vocab.scores.clone().ok_or_else(|| fail("tokenizer.ggml.scores is missing".to_owned()))?;
                if scores.len() != n {
                    return Err(fail(format!("tokenizer.ggml.scores has {} entries, expected {n}", scores.len())));
                }
                // The kind's own conventions where the file is silent.
                let unknown = vocab.unk.or(Some(0));
                let pieces =
                    SentencePiece::new(&vocab.tokens, scores, &types, unknown, vocab.add_space_prefix.unwrap_or(true));
                let default = |id: u32| Some(id).filter(|&id| (id as usize) < n);
                (Encoder::SentencePiece(Box::new(pieces)), Spelling::Pieces, true, (default(1), default(2), default(0)))
            }
            other => return Err(unsupported!("{}: tokenizer.ggml.model = {other} is not implemented", path.display())),
        };
        let tokens = vocab
            .tokens
            .iter()
            .zip(&types)
            .map(|(text, &kind)| match kind {
                CONTROL | UNKNOWN => Token { bytes: text.as_bytes().into(), is_control: true },
                USER_DEFINED => Token { bytes: text.as_bytes().into(), is_control: false },
                _ => Token { bytes: spelling.bytes(text), is_control: false },
            })
            .collect();
        let by_text: HashMap<&str, u32> =
            (0u32..).zip(&vocab.tokens).filter(|(_, text)| is_spelling(text)).map(|(id, text)| (&**text, id)).collect();
        let said = |special: Special| match special {
            Special::Bos => vocab.bos.or(defaults.0),
            Special::Eos => vocab.eos.or(defaults.1),
            Special::Eot => vocab.eot,
            Special::Unk => vocab.unk.or(defaults.2),
            // Files say 2^32 - 1 for none.
            Special::Pad => vocab.pad.filter(|&id| (id as usize) < n),
            fim => vocab.fim[fim as usize - Special::FIM[0] as usize].filter(|&id| (id as usize) < n),
        };
        let specials = Specials::new(said, |text| by_text.get(text).copied());
        let mut chat_templates = vocab.named_chat_templates;
        chat_templates.extend(vocab.chat_template.map(|template| (DEFAULT_TEMPLATE.to_owned(), template)));
        let mut tokenizer = Tokenizer {
            encoder,
            tokens,
            specials,
            add_bos: vocab.add_bos.unwrap_or(add_bos),
            add_eos: vocab.add_eos.unwrap_or(false),
            ends: vocab.eom.into_iter().collect(),
            chat_templates,
            has_space_prefix: spelling == Spelling::Pieces && vocab.add_space_prefix.unwrap_or(true),
        };
        tokenizer.finish_ends();
        Ok(tokenizer)
    }
}

/// Byte-level BPE through the `tokenizers` crate, described to it in its own JSON.
fn byte_level(path: &Path, vocab: &GgufVocab, types: &[i32]) -> Result<(Encoder, bool)> {
    let pre = vocab.pre.as_deref().unwrap_or("gpt2");
    let words =
        words(pre).ok_or_else(|| unsupported!("{}: tokenizer.ggml.pre = {pre} is not implemented", path.display()))?;
    let mut ids = serde_json::Map::with_capacity(vocab.tokens.len());
    let mut added = Vec::new();
    for (id, (text, &kind)) in vocab.tokens.iter().zip(types).enumerate() {
        if ids.insert(text.clone(), id.into()).is_some() {
            return Err(Error::format(path, format!("token {text:?} stands twice in tokenizer.ggml.tokens")));
        }
        if matches!(kind, CONTROL | UNKNOWN | USER_DEFINED) && !text.is_empty() {
            added.push(json!({
                "id": id, "content": text, "special": kind != USER_DEFINED,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            }));
        }
    }
    let mut merges = Vec::with_capacity(vocab.merges.len());
    for merge in &vocab.merges {
        // Neither half is empty, and the first may itself begin with what looks like a separator.
        let cut = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(i, _)| i);
        let (left, right) = cut
            .map(|i| (&merge[..i], &merge[i + 1..]))
            .ok_or_else(|| Error::format(path, format!("merge {merge:?} is not two tokens separated by a space")))?;
        merges.push(json!([left, right]));
    }
    let mut steps: Vec<_> = words
        .patterns
        .iter()
        .map(|p| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false}))
        .collect();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    let description = json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": words.ignore_merges},
    });
    let hub = HubTokenizer::from_bytes(description.to_string())
        .map_err(|e| Error::format(path, format!("the tokenizer's vocabulary or merges do not fit together: {e}")))?;
    Ok((Encoder::Hub(Box::new(HubPair::new(&hub))), words.add_bos))
}
