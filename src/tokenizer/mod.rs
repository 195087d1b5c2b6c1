//! Text to token ids and back: tokenizer.json through the `tokenizers` crate, and the vocabularies of GGUF files.

pub mod chat;
mod gguf;
mod hub;
mod sentencepiece;
mod special;
mod stop;
mod stream;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::Tokenizer as HubTokenizer;

pub use gguf::GgufVocab;
pub(crate) use gguf::{is_byte_piece, is_known_pre, pre_of_pattern};
use hub::HubPair;
use sentencepiece::SentencePiece;
pub use special::Special;
use special::Specials;
pub use stop::{MAX_STOP_BYTES, MAX_STOPS, StopStrings};
pub(crate) use stream::Progress;
pub use stream::{StreamDecoder, Utf8Stream};

use crate::checkpoint::HubFiles;
use crate::error::{Error, Result, invalid, unsupported};

/// How the text of a vocabulary entry stands for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's alphabet: a printable character for each byte.
    ByteLevel,
    /// SentencePiece: U+2581 for a space, `<0xNN>` for a byte.
    Pieces,
}

/// A vocabulary entry as bytes.
#[derive(Clone, Debug, Default)]
struct Token {
    bytes: Box<[u8]>,
    /// Control tokens stand for no text.
    is_control: bool,
}

/// A vocabulary's entries by id.
#[derive(Default)]
struct Tokens {
    bytes: Vec<u8>, // of all, one after the other
    ends: Vec<usize>,
    is_control: Vec<bool>,
}

impl Tokens {
    fn len(&self) -> usize {
        self.ends.len()
    }

    fn get(&self, id: usize) -> Option<(&[u8], bool)> {
        let end = *self.ends.get(id)?;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some((&self.bytes[start..end], self.is_control[id]))
    }
}

impl FromIterator<Token> for Tokens {
    fn from_iter<I: IntoIterator<Item = Token>>(tokens: I) -> Tokens {
        let mut all = Tokens::default();
        for token in tokens {
            all.bytes.extend_from_slice(&token.bytes);
            all.ends.push(all.bytes.len());
            all.is_control.push(token.is_control);
        }
        all.bytes.shrink_to_fit();
        all.ends.shrink_to_fit();
        all.is_control.shrink_to_fit();
        all
    }
}

enum Encoder {
    Hub(Box<HubPair>),
    SentencePiece(Box<SentencePiece>),
}

/// Immutable; shared by any number of threads.
pub struct Tokenizer {
    encoder: Encoder,
    tokens: Tokens,
    specials: Specials,
    add_bos: bool,
    add_eos: bool,
    /// Ids that end a generation.
    ends: Vec<u32>,
    /// By name; the one that is meant unless another is asked for is called "default".
    chat_templates: BTreeMap<String, String>,
    /// SentencePiece puts a space before a text; decoding takes it away again.
    has_space_prefix: bool,
}

const DEFAULT_TEMPLATE: &str = "default";
const TOOL_TEMPLATE: &str = "tool_use";

/// Texts of tokens that end a turn or a document in the families that are served, whatever the file calls them.
const END_TEXTS: [&str; 8] =
    ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "</s>"];

impl Tokenizer {
    /// Reads a `tokenizer.json`; the other files of the folder say which tokens begin and end a text.
    ///
    /// # Errors
    /// `Format` naming the file, `Unsupported` for a decoder whose tokens do not spell bytes.
    pub fn from_hub(tokenizer_json: &Path, files: &HubFiles) -> Result<Tokenizer> {
        let (tokenizer_config, generation_config) = (files.tokenizer_config.as_ref(), files.generation_config.as_ref());
        let bytes = std::fs::read(tokenizer_json).map_err(|e| Error::io(tokenizer_json, e))?;
        let fail = |what: String| Error::format(tokenizer_json, what);
        let json: Json = serde_json::from_slice(&bytes).map_err(|e| fail(format!("is not JSON: {e}")))?;
        let hub = HubTokenizer::from_bytes(&bytes).map_err(|e| fail(format!("is not a tokenizer: {e}")))?;
        let spelling = spelling_of(&json["decoder"]).ok_or_else(|| {
            unsupported!("{}: decoder {} is not implemented", tokenizer_json.display(), json["decoder"]["type"])
        })?;
        let added = hub.get_added_tokens_decoder();
        let n = hub.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if n > 1 << 22 {
            return Err(fail(format!("has a token id of {}, expected less than {}", n - 1, 1 << 22)));
        }
        let tokens = (0..n as u32)
            .map(|id| match added.get(&id) {
                Some(token) => Token { bytes: token.content.as_bytes().into(), is_control: token.special },
                None => Token { bytes: spelling.bytes(&hub.id_to_token(id).unwrap_or_default()), is_control: false },
            })
            .collect();

        // By text, or by number: a list where several tokens end a text, the first of which is the one.
        let id_of = |text: &str| hub.token_to_id(text);
        let by_text = |source: &Json, name: &str| {
            let value = source.get(format!("{name}_token"))?;
            id_of(value.as_str().or_else(|| value.get("content")?.as_str())?)
        };
        let ids = |source: &Json, name: &str| -> Vec<u32> {
            let ids = match &source[format!("{name}_token_id")] {
                Json::Array(ids) => ids.as_slice(),
                id => std::slice::from_ref(id),
            };
            ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
        };
        let texts = [tokenizer_config, files.special_tokens_map.as_ref()];
        let numbers = [Some(&files.config), generation_config];
        let said = |special: Special| {
            let name = match special {
                Special::Bos => "bos",
                Special::Eos => "eos",
                Special::Unk => "unk",
                Special::Pad => "pad",
                _ => return None,
            };
            let by_number = || numbers.iter().flatten().find_map(|source| ids(source, name).first().copied());
            let said = texts.iter().flatten().find_map(|source| by_text(source, name)).or_else(by_number);
            let unknown = || id_of(json["model"]["unk_token"].as_str()?).filter(|_| special == Special::Unk);
            said.or_else(unknown).filter(|&id| (id as usize) < n)
        };
        let specials = Specials::new(said, id_of);
        let ends = numbers.iter().flatten().flat_map(|source| ids(source, "eos")).collect();
        let mut chat_templates = BTreeMap::new();
        match tokenizer_config.map(|config| &config["chat_template"]) {
            Some(Json::String(template)) => {
                chat_templates.insert(DEFAULT_TEMPLATE.to_owned(), template.clone());
            }
            Some(Json::Array(list)) => chat_templates.extend(
                list.iter().filter_map(|t| Some((t["name"].as_str()?.to_owned(), t["template"].as_str()?.to_owned()))),
            ),
            _ => {}
        }
        // Files of their own take precedence.
        chat_templates.extend(files.chat_templates.clone());
        let encoder = Encoder::Hub(Box::new(HubPair::new(&hub)));
        // What is added around a text is the post-processor's business here.
        let mut t = Tokenizer {
            encoder,
            tokens,
            specials,
            add_bos: false,
            add_eos: false,
            ends,
            chat_templates,
            has_space_prefix: spelling == Spelling::Pieces,
        };
        t.finish_ends();
        Ok(t)
    }

    /// Adds the end tokens that are known by role or spelling, drops ids that do not exist.
    fn finish_ends(&mut self) {
        let roles = [Special::Eos, Special::Eot].into_iter().chain(Special::FIM_ENDS);
        self.ends.extend(roles.filter_map(|role| self.specials.get(role)));
        for id in 0..self.tokens.len() {
            let is_end = |bytes| END_TEXTS.iter().any(|t| t.as_bytes() == bytes);
            if self.tokens.get(id).is_some_and(|(bytes, is_control)| is_control && is_end(bytes)) {
                self.ends.push(id as u32);
            }
        }
        self.ends.retain(|&id| (id as usize) < self.tokens.len());
        self.ends.sort_unstable();
        self.ends.dedup();
    }

    /// Token ids of a text. `add_special` adds what the model expects around a text (usually a begin token);
    /// `parse_special` takes the spelling of a control token for that token.
    ///
    /// # Errors
    /// `InvalidArgument` if the text is not UTF-8, naming the offset.
    pub fn encode(&self, text: &[u8], add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let text = std::str::from_utf8(text)
            .map_err(|e| invalid!("the text is not UTF-8: byte {} is no part of a character", e.valid_up_to()))?;
        let mut ids = Vec::new();
        if add_special && self.add_bos {
            ids.extend(self.bos());
        }
        match &self.encoder {
            Encoder::Hub(pair) => {
                let encoding = pair.encode(text, add_special, parse_special);
                let encoding = encoding.map_err(|e| Error::Internal(format!("the tokenizer failed: {e}")))?;
                ids.extend_from_slice(encoding.get_ids());
            }
            Encoder::SentencePiece(pieces) => pieces.encode(text, parse_special, &mut ids),
        }
        if add_special && self.add_eos {
            ids.extend(self.eos());
        }
        Ok(ids)
    }

    /// A token's bytes, and whether it is a control token.
    fn token(&self, id: u32) -> Result<(&[u8], bool)> {
        self.tokens
            .get(id as usize)
            .ok_or_else(|| invalid!("token {id} is not in the vocabulary of {} tokens", self.tokens.len()))
    }

    /// The bytes of one token, which may be part of a character; control tokens have none unless `special`.
    pub fn token_bytes(&self, id: u32, special: bool) -> Result<&[u8]> {
        let (bytes, is_control) = self.token(id)?;
        Ok(if is_control && !special { &[] } else { bytes })
    }

    /// How a token is spelled in a template; empty for none.
    pub fn spelling(&self, id: Option<u32>) -> String {
        let bytes = id.and_then(|id| self.token_bytes(id, true).ok()).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// The bytes of a text. Control tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for &id in ids {
            let bytes = self.token_bytes(id, false)?;
            let at_start = self.has_space_prefix && out.is_empty();
            out.extend_from_slice(bytes.strip_prefix(b" ").filter(|_| at_start).unwrap_or(bytes));
        }
        Ok(out)
    }

    pub fn n_vocab(&self) -> usize {
        self.tokens.len()
    }

    pub fn bos(&self) -> Option<u32> {
        self.special(Special::Bos)
    }

    pub fn eos(&self) -> Option<u32> {
        self.special(Special::Eos)
    }

    /// The token of a role, if the vocabulary has one.
    pub fn special(&self, role: Special) -> Option<u32> {
        self.specials.get(role)
    }

    /// Whether generation ends with this token: end of text, of turn, of message.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// How a text begins and ends when special tokens are added: whether with [`Tokenizer::bos`] and [`Tokenizer::eos`];
    /// `None` if it is anything else.
    pub(crate) fn added_around(&self) -> Option<(bool, bool)> {
        let (bare, whole) = (self.encode(b"a", false, false).ok()?, self.encode(b"a", true, false).ok()?);
        let at = whole.windows(bare.len().max(1)).position(|w| w == bare)?;
        let (before, after) = (&whole[..at], &whole[at + bare.len()..]);
        let side = |ids: &[u32], id: Option<u32>| match ids {
            [] => Some(false),
            [only] => Some(id == Some(*only)).filter(|&is| is),
            _ => None,
        };
        Some((side(before, self.bos())?, side(after, self.eos())?))
    }

    pub fn chat_template(&self) -> Option<&str> {
        self.chat_templates.get(DEFAULT_TEMPLATE).map(String::as_str)
    }

    /// The template of that name; without a name the one called "tool_use" if there is one and tools are given, else the
    /// default.
    ///
    /// # Errors
    /// `InvalidArgument` naming the templates that there are.
    pub fn choose_chat_template(&self, name: Option<&str>, has_tools: bool) -> Result<&str> {
        let name = name.unwrap_or(match has_tools && self.chat_templates.contains_key(TOOL_TEMPLATE) {
            true => TOOL_TEMPLATE,
            false => DEFAULT_TEMPLATE,
        });
        self.chat_templates.get(name).map(String::as_str).ok_or_else(|| {
            let names: Vec<&str> = self.chat_templates().map(|(name, _)| name).collect();
            match names.is_empty() {
                true => invalid!("the checkpoint has no chat template"),
                false => invalid!("the checkpoint has no chat template called {name}, but {}", names.join(", ")),
            }
        })
    }

    /// Names and sources.
    pub fn chat_templates(&self) -> impl Iterator<Item = (&str, &str)> {
        self.chat_templates.iter().map(|(name, source)| (name.as_str(), source.as_str()))
    }
}

/// Finds out from a tokenizer.json's decoder how tokens spell bytes.
fn spelling_of(decoder: &Json) -> Option<Spelling> {
    match decoder["type"].as_str()? {
        "ByteLevel" => Some(Spelling::ByteLevel),
        "Metaspace" | "ByteFallback" => Some(Spelling::Pieces),
        "Sequence" => decoder["decoders"].as_array()?.iter().find_map(spelling_of),
        _ => None,
    }
}

impl Spelling {
    fn bytes(self, text: &str) -> Box<[u8]> {
        match self {
            // A character outside the alphabet stands for itself, as in added tokens.
            Spelling::ByteLevel => match text.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => bytes.into(),
                None => text.as_bytes().into(),
            },
            Spelling::Pieces => match sentencepiece::byte_piece(text) {
                Some(byte) => [byte].into(),
                None => text.replace('\u{2581}', " ").into_bytes().into(),
            },
        }
    }
}

/// GPT-2's alphabet, reversed: printable Latin-1 characters are themselves, the other bytes follow from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(c);
    match u8::try_from(code) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=255u8).filter(|&b| !printable(b)).nth(code as usize - 256),
    }
}
