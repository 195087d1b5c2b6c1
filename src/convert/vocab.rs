//! A Hub folder's tokenizer as the `tokenizer.*` keys of a GGUF file.
//!
//! Nothing is taken on trust: the vocabulary that is written is read back, and must give the folder's own token ids on texts
//! on which tokenizers differ.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;

use crate::checkpoint::HubFiles;
use crate::checkpoint::gguf_writer::Metadata;
use crate::error::{Error, Result, unsupported};
use crate::tokenizer::{GgufVocab, Special, Tokenizer, is_byte_piece, is_known_pre, pre_of_pattern};

/// GGUF token types.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Texts that pre-tokenizers and normalizers treat differently.
const PROBES: [&str; 12] = [
    "In the beginning",
    " leading,  two   three    spaces \t tabs\t\t and trailing ",
    "lines\n\nand\r\nmore\n   \n\t\nindented",
    "1 12 123 1234 12345 3.14 1,000,000 ⅷ ½ 二十",
    "I'm you're they've we'll he'd it's DON'T WE'RE I'LL",
    "fn main() { println!(\"{}\", a[i]+=1); } // <|not|> ==> !== <<< >>>",
    "naïve café Ångström straße ĳ ﬁ",
    "Привет, мир! Γειά σου — “quotes” … €100",
    "漢字かな交じり文、ハングル 한국어 ภาษาไทย ខ្មែរ",
    "مرحبا بالعالم שלום",
    "🙂 👩‍👩‍👧 🇩🇪 👍🏽 \u{200b}\u{a0}x\u{3000}y",
    "______ ------ ...... !!!???  a-b_c.d@e/f\\g",
];

/// Writes the keys. `path` is the folder, `n_vocab` the rows of the embedding, `pre` the caller's own `tokenizer.ggml.pre`.
///
/// # Errors
/// `Unsupported` naming what GGUF cannot say or this library does not know, `Format` for a tokenizer that does not fit the model.
pub fn describe(
    m: &mut Metadata,
    path: &Path,
    files: &HubFiles,
    n_vocab: usize,
    pre: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<()> {
    if let Some(pre) = pre.filter(|pre| !is_known_pre(pre)) {
        return Err(unsupported!("tokenizer.ggml.pre = {pre} is not implemented"));
    }
    let Some(json_path) = &files.tokenizer else {
        if path.join("tokenizer.model").exists() {
            return Err(unsupported!("{}: tokenizer.model without tokenizer.json is not implemented", path.display()));
        }
        m.set("tokenizer.ggml.model", "no_vocab");
        return Ok(());
    };
    let bytes = std::fs::read(json_path).map_err(|e| Error::io(json_path, e))?;
    let json: Json =
        serde_json::from_slice(&bytes).map_err(|e| Error::format(json_path, format!("is not JSON: {e}")))?;
    let hub = Tokenizer::from_hub(json_path, files)?;
    let mut vocab = read(json_path, &json, n_vocab, pre)?;

    let (add_bos, add_eos) = hub.added_around().ok_or_else(|| {
        unsupported!(
            "{}: post_processor adds other tokens than bos and eos, which GGUF cannot say",
            json_path.display()
        )
    })?;
    (vocab.add_bos, vocab.add_eos) = (Some(add_bos), Some(add_eos));
    let in_vocab = |id: &u32| (*id as usize) < n_vocab;
    (vocab.bos, vocab.eos) = (hub.bos().filter(in_vocab), hub.eos().filter(in_vocab));
    vocab.unk = vocab.unk.or(hub.special(Special::Unk).filter(in_vocab));
    vocab.pad = hub.special(Special::Pad).filter(in_vocab);
    vocab.chat_template = hub.chat_template().map(str::to_owned);
    other_ends(&mut vocab, &hub, json_path, notes)?;

    let ours = Tokenizer::from_gguf(json_path, vocab.clone())?;
    let has_metaspace = steps(&json["pre_tokenizer"], "pretokenizers").iter().any(|s| s["type"] == "Metaspace");
    compare(json_path, &hub, &ours, &vocab, pre, has_metaspace)?;
    set(m, &vocab);
    Ok(())
}

/// Ends of a generation beside eos, which GGUF has two keys for; well-known ones are found by their text.
fn other_ends(vocab: &mut GgufVocab, hub: &Tokenizer, path: &Path, notes: &mut Vec<String>) -> Result<()> {
    let is_eom = |id: u32| vocab.tokens[id as usize] == "<|eom_id|>";
    let known = Special::FIM_ENDS.map(|role| hub.special(role)).into_iter().chain([vocab.eos]);
    let known: Vec<u32> = known.flatten().collect();
    let ends: Vec<u32> = (0..vocab.tokens.len().min(hub.n_vocab()) as u32)
        .filter(|&id| hub.is_end_of_generation(id) && !known.contains(&id))
        .collect();
    let is_turn = |id: u32| {
        ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"].contains(&vocab.tokens[id as usize].as_str())
    };
    let eom = ends.iter().copied().find(|&id| is_eom(id));
    let eot = ends.iter().copied().find(|&id| is_turn(id)).or_else(|| ends.iter().copied().find(|&id| !is_eom(id)));
    (vocab.eot, vocab.eom) = (eot, eom);
    let read_back = Tokenizer::from_gguf(path, vocab.clone())?;
    for id in ends.into_iter().filter(|&id| !read_back.is_end_of_generation(id)) {
        notes.push(format!("token {id} {:?} ends a generation, which GGUF has no key for", vocab.tokens[id as usize]));
    }
    Ok(())
}

/// The vocabulary itself.
fn read(path: &Path, json: &Json, n_vocab: usize, pre: Option<&str>) -> Result<GgufVocab> {
    let fail = |what: String| Error::format(path, what);
    let refuse = |what: &str| unsupported!("{}: {what}", path.display());
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(refuse(&format!("model {} is not implemented", model["type"])));
    }
    for field in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        let value = &model[field];
        if !value.is_null() && value != "" && value.as_f64() != Some(0.0) {
            return Err(refuse(&format!("model.{field} = {value} is not implemented")));
        }
    }
    let ignore_merges = model["ignore_merges"].as_bool().unwrap_or(false);
    let is_pieces = model["byte_fallback"].as_bool().unwrap_or(false);
    let mut vocab = GgufVocab::default();
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; n_vocab];
    let mut place = |text: &str, id: &Json, kind: i32| {
        let found = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < n_vocab);
        let id = found
            .ok_or_else(|| fail(format!("token {text:?} has id {id}, the model has {n_vocab} rows for tokens")))?;
        tokens[id] = Some((text.to_owned(), kind));
        Ok::<_, Error>(id)
    };
    let entries = model["vocab"].as_object().ok_or_else(|| fail("model.vocab is no object".to_owned()))?;
    let unknown = model["unk_token"].as_str().filter(|_| is_pieces);
    let mut ids = HashMap::with_capacity(entries.len());
    for (text, id) in entries {
        let is_unknown = unknown == Some(text);
        let kind = match is_pieces {
            true if is_unknown => UNKNOWN,
            true if is_byte_piece(text) => BYTE,
            _ => NORMAL,
        };
        let id = place(text, id, kind)?;
        ids.insert(text.as_str(), id);
        if is_unknown {
            vocab.unk = Some(id as u32);
        }
    }
    for token in json["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let text = token["content"].as_str().ok_or_else(|| fail("an added token has no content".to_owned()))?;
        if let Some(field) = ["lstrip", "rstrip", "single_word"].into_iter().find(|&f| token[f] == true) {
            return Err(refuse(&format!("added token {text:?} has {field}, which GGUF cannot say")));
        }
        // As llama.cpp's converter does: what looks like a control token is one, whatever the file says.
        let is_control = token["special"] == true || (text.starts_with("<|") && text.ends_with("|>"));
        let kind = match () {
            _ if unknown == Some(text) => UNKNOWN,
            _ if is_control => CONTROL,
            _ => USER_DEFINED,
        };
        place(text, &token["id"], kind)?;
    }
    let mut merges = Vec::new();
    for merge in model["merges"].as_array().ok_or_else(|| fail("model.merges is no list".to_owned()))? {
        let pair = match merge {
            Json::String(s) => s.split_once(' '),
            pair => pair[0].as_str().zip(pair[1].as_str()),
        };
        let pair = pair.filter(|(l, r)| !l.is_empty() && !r.is_empty() && !l.contains(' ') && !r.contains(' '));
        merges.push(pair.ok_or_else(|| fail(format!("merge {merge} is not two tokens without a space")))?);
    }
    if is_pieces {
        pieces(path, json, &mut vocab)?;
        if ignore_merges {
            return Err(refuse("model.ignore_merges with byte_fallback is not implemented"));
        }
        // SentencePiece merges in the order of the result's score, this description in the order of the list. What no
        // merge makes has the lowest.
        let mut scores: Vec<f32> = vec![-(merges.len() as f32) - 1.0; n_vocab];
        for (rank, (left, right)) in merges.iter().enumerate().rev() {
            let text = format!("{left}{right}");
            let id = ids.get(text.as_str()).ok_or_else(|| fail(format!("merge {text:?} makes no token")))?;
            scores[*id] = -(rank as f32);
        }
        vocab.scores = Some(scores);
    } else {
        let detected = byte_level_pre(json, ignore_merges);
        let pre = pre.or(detected).ok_or_else(|| {
            unsupported!(
                "{}: pre_tokenizer {} with normalizer {} and ignore_merges {ignore_merges} is none of gpt-2, smollm, \
                 llama-bpe, dbrx, qwen2; if it is the same as one of these or olmo, name it (pre)",
                path.display(),
                json["pre_tokenizer"],
                json["normalizer"]
            )
        })?;
        vocab.model = "gpt2".to_owned();
        vocab.pre = Some(pre.to_owned());
        vocab.merges = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
    }
    let named = tokens.into_iter().enumerate().map(|(id, t)| t.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)));
    let (texts, kinds): (Vec<String>, Vec<i32>) = named.unzip();
    (vocab.tokens, vocab.token_types) = (texts, Some(kinds));
    Ok(vocab)
}

/// The steps of a normalizer or pre-tokenizer, which may be one or a sequence.
fn steps<'a>(json: &'a Json, list: &str) -> Vec<&'a Json> {
    match json {
        Json::Null => Vec::new(),
        one if one["type"] == "Sequence" => one[list].as_array().map(|l| l.iter().collect()).unwrap_or_default(),
        one => vec![one],
    }
}

/// The `tokenizer.ggml.pre` that says the same as a tokenizer.json's description.
fn byte_level_pre(json: &Json, ignore_merges: bool) -> Option<&'static str> {
    let normalizers = steps(&json["normalizer"], "normalizers");
    let steps = steps(&json["pre_tokenizer"], "pretokenizers");
    let (&last, words) = steps.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    let use_regex = last["use_regex"].as_bool().unwrap_or(true);
    let pre = match words {
        [] if use_regex && !ignore_merges => "gpt-2",
        [d] if d["type"] == "Digits" && d["individual_digits"] == true && use_regex && !ignore_merges => "smollm",
        [s] if s["type"] == "Split" && s["behavior"] == "Isolated" && s["invert"] != true && !use_regex => {
            pre_of_pattern(s["pattern"]["Regex"].as_str()?, ignore_merges)?
        }
        _ => return None,
    };
    match normalizers.as_slice() {
        [] => Some(pre),
        // llama.cpp's qwen2 leaves out the composition of characters.
        [nfc] if nfc["type"] == "NFC" && pre == "qwen2" => Some(pre),
        _ => None,
    }
}

/// SentencePiece as tokenizer.json describes it: by Metaspace, or by a normalizer that does the same.
fn pieces(path: &Path, json: &Json, vocab: &mut GgufVocab) -> Result<()> {
    let normalizers = steps(&json["normalizer"], "normalizers");
    let pre = steps(&json["pre_tokenizer"], "pretokenizers");
    let is_replace = |n: &Json| n["type"] == "Replace" && n["pattern"]["String"] == " " && n["content"] == "\u{2581}";
    let prefix = match (normalizers.as_slice(), pre.as_slice()) {
        ([prepend, replace], []) if prepend["type"] == "Prepend" && is_replace(replace) => {
            (prepend["prepend"] == "\u{2581}").then_some(true)
        }
        ([replace], []) if is_replace(replace) => Some(false),
        ([], [m]) if m["type"] == "Metaspace" && m["replacement"] == "\u{2581}" && m["split"] != true => {
            match m["prepend_scheme"].as_str() {
                Some("always" | "first") => Some(true),
                Some("never") => Some(false),
                _ => None,
            }
        }
        _ => None,
    };
    let prefix = prefix.ok_or_else(|| {
        unsupported!(
            "{}: normalizer {} with pre_tokenizer {} is not SentencePiece's",
            path.display(),
            json["normalizer"],
            json["pre_tokenizer"]
        )
    })?;
    vocab.model = "llama".to_owned();
    vocab.pre = Some("default".to_owned());
    vocab.add_space_prefix = Some(prefix);
    Ok(())
}

/// Both must give the same ids.
fn compare(
    path: &Path,
    hub: &Tokenizer,
    ours: &Tokenizer,
    vocab: &GgufVocab,
    pre: Option<&str>,
    has_metaspace: bool,
) -> Result<()> {
    let check = |text: &str, add: bool, parse: bool| {
        let (expected, found) = (hub.encode(text.as_bytes(), add, parse)?, ours.encode(text.as_bytes(), add, parse)?);
        if expected != found {
            let named = pre.map_or(String::new(), |pre| format!(" with the pre-tokenizer {pre}"));
            return Err(unsupported!(
                "{}: in GGUF{named} the text {text:?} would have the tokens {found:?}, the folder has {expected:?}",
                path.display()
            ));
        }
        Ok(())
    };
    for text in PROBES {
        // Metaspace puts no space before a text that begins with one; SentencePiece does.
        check(if has_metaspace { text.trim_start() } else { text }, true, false)?;
    }
    // SentencePiece begins anew after a special token, or does not: descriptions differ, and so do runtimes.
    if vocab.model == "gpt2" {
        let kinds = vocab.token_types.as_deref().unwrap_or_default();
        for (text, _) in vocab.tokens.iter().zip(kinds).filter(|(_, k)| [CONTROL, USER_DEFINED].contains(*k)) {
            check(&format!("a{text} b"), false, true)?;
        }
    }
    Ok(())
}

fn set(m: &mut Metadata, v: &GgufVocab) {
    m.set("tokenizer.ggml.model", v.model.as_str());
    if let Some(pre) = &v.pre {
        m.set("tokenizer.ggml.pre", pre.as_str());
    }
    m.set_array("tokenizer.ggml.tokens", &v.tokens);
    if let Some(scores) = &v.scores {
        m.set_array("tokenizer.ggml.scores", scores);
    }
    if let Some(kinds) = &v.token_types {
        m.set_array("tokenizer.ggml.token_type", kinds);
    }
    if v.model == "gpt2" {
        m.set_array("tokenizer.ggml.merges", &v.merges);
    }
    for (name, id) in
        [("bos", v.bos), ("eos", v.eos), ("eot", v.eot), ("eom", v.eom), ("unknown", v.unk), ("padding", v.pad)]
    {
        if let Some(id) = id {
            m.set(&format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
    for (name, flag) in
        [("add_bos_token", v.add_bos), ("add_eos_token", v.add_eos), ("add_space_prefix", v.add_space_prefix)]
    {
        if let Some(flag) = flag {
            m.set(&format!("tokenizer.ggml.{name}"), flag);
        }
    }
    if let Some(template) = &v.chat_template {
        m.set("tokenizer.chat_template", template.as_str());
    }
}
