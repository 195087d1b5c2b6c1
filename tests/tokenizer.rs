//! GGUF vocabularies against llama.cpp's ids: see `tests/data/tokenizer/README.md`.

mod common;

use std::path::Path;

use phd::tokenizer::{GgufVocab, Special, StreamDecoder, Tokenizer};
use serde_json::Value as Json;

fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The demo model's vocabulary as a GGUF file would hold it; its last two tokens give way to a control and a user-defined
/// one.
fn vocab(pre: &str) -> GgufVocab {
    let file = json(&common::demo_model().join("tokenizer.json"));
    let mut tokens = vec![String::new(); 2048];
    for (text, id) in file["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = text.clone();
    }
    tokens[2046] = "<|im_start|>".to_owned();
    tokens[2047] = "<user>".to_owned();
    let mut types = vec![1; 2048];
    (types[0], types[2046], types[2047]) = (3, 3, 4);
    let known: std::collections::HashSet<&str> = tokens.iter().map(String::as_str).collect();
    let merges = file["model"]["merges"].as_array().unwrap().iter().map(|m| match m {
        Json::String(s) => s.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    let merges = merges.filter(|m| known.contains(m.replacen(' ', "", 1).as_str())).collect();
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        token_types: Some(types),
        merges,
        bos: Some(0),
        eos: Some(0),
        add_bos: Some(false),
        tokens,
        ..Default::default()
    }
}

/// A SentencePiece vocabulary of the same words, the frequent ones first: bytes, then every token of printable ASCII.
fn sentencepiece() -> GgufVocab {
    let mut pieces: Vec<(String, f32, i32)> =
        vec![("<unk>".to_owned(), 0.0, 2), ("<s>".to_owned(), 0.0, 3), ("</s>".to_owned(), 0.0, 3)];
    pieces.extend((0..256).map(|b| (format!("<0x{b:02X}>"), 0.0, 6)));
    let mut rank = 0.0;
    for token in &vocab("gpt-2").tokens[1..2046] {
        if token.chars().all(|c| c == 'Ġ' || c.is_ascii_graphic()) {
            rank += 1.0;
            pieces.push((token.replace('Ġ', "\u{2581}"), -rank, 1));
        }
    }
    pieces.extend([("<|im_start|>".to_owned(), 0.0, 3), ("<user>".to_owned(), 0.0, 4)]);
    GgufVocab {
        model: "llama".to_owned(),
        tokens: pieces.iter().map(|p| p.0.clone()).collect(),
        scores: Some(pieces.iter().map(|p| p.1).collect()),
        token_types: Some(pieces.iter().map(|p| p.2).collect()),
        bos: Some(1),
        eos: Some(2),
        add_bos: Some(false),
        ..Default::default()
    }
}

fn check_recorded(name: &str, vocab: GgufVocab, cases: &Json) {
    let tokenizer = Tokenizer::from_gguf(Path::new("recorded"), vocab).unwrap();
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        for (field, parse) in [("plain", false), ("parsed", true)] {
            let expected: Vec<u32> =
                case[field].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
            let found = tokenizer.encode(text.as_bytes(), false, parse).unwrap();
            assert_eq!(found, expected, "{name} {field} {text:?}");
        }
    }
}

#[test]
fn ids_are_llama_cpp_s() {
    let recorded = json(&common::root().join("tests/data/tokenizer/llama_cpp.json"));
    for (pre, cases) in recorded.as_object().unwrap() {
        check_recorded(pre, vocab(pre), cases);
    }
    let recorded = json(&common::root().join("tests/data/tokenizer/sentencepiece.json"));
    check_recorded("sentencepiece", sentencepiece(), &recorded);
}

#[test]
fn texts_survive_the_round_trip() {
    let tokenizer = Tokenizer::from_gguf(Path::new("recorded"), vocab("smollm")).unwrap();
    for text in ["", " a", "NUL \0 inside", "👩‍👩‍👧 漢字 مرحبا", "a\r\n\tb  c", "<|im_start|>not parsed", "<user>"]
    {
        let ids = tokenizer.encode(text.as_bytes(), false, false).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
        let (mut decoder, mut out) = (StreamDecoder::new(), String::new());
        ids.iter().for_each(|&id| decoder.push(&tokenizer, id, &mut out).unwrap());
        decoder.finish(&mut out);
        assert_eq!(out, text);
    }
    assert!(tokenizer.encode(b"ok \xff", false, false).is_err());
    assert!(tokenizer.decode(&[5000]).is_err());
}

/// A SentencePiece vocabulary small enough to merge by hand.
#[test]
fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
    let pieces: [(&str, f32, i32); 12] = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<0xC3>", 0.0, 6),
        ("<0xA9>", 0.0, 6),
        ("\u{2581}", -1.0, 1),
        ("a", -2.0, 1),
        ("b", -3.0, 1),
        ("ab", -5.0, 1),
        ("\u{2581}a", -4.0, 1),
        ("bb", -3.5, 1),
        ("aa", -6.0, 1),
    ];
    let vocab = GgufVocab {
        model: "llama".to_owned(),
        tokens: pieces.iter().map(|p| p.0.to_owned()).collect(),
        scores: Some(pieces.iter().map(|p| p.1).collect()),
        token_types: Some(pieces.iter().map(|p| p.2).collect()),
        ..Default::default()
    };
    let tokenizer = Tokenizer::from_gguf(Path::new("pieces"), vocab).unwrap();
    let ids = |text: &str, parse| tokenizer.encode(text.as_bytes(), true, parse).unwrap();
    assert_eq!(ids("abb", false), [1, 9, 10], "bb before the space and a, that before ab");
    assert_eq!(ids("baa", false), [1, 5, 7, 11]);
    assert_eq!(ids("é", false), [1, 5, 3, 4], "bytes of an unknown character");
    assert_eq!(ids("a</s>b", true), [1, 9, 2, 5, 7], "a text after a special token begins anew");
    assert_eq!(tokenizer.decode(&[1, 9, 10]).unwrap(), b"abb");
}

/// The file's word counts, then spellings, of which those that end a turn come first.
#[test]
fn tokens_by_role() {
    let role = |v: &GgufVocab, role| Tokenizer::from_gguf(Path::new("roles"), v.clone()).unwrap().special(role);
    let mut v = vocab("gpt-2");
    assert_eq!(Special::ALL.map(|r| role(&v, r)).iter().flatten().count(), 3, "bos, eos, and <|endoftext|> as eot");
    for (id, text) in [(9, "<|endoftext|>"), (20, "<|im_end|>"), (21, "<fim_prefix>"), (22, "<|fim_prefix|>")] {
        v.tokens[id] = text.to_owned();
    }
    (v.tokens[0], v.tokens[23]) = ("<|begin|>".to_owned(), "<|file_sep|>".to_owned());
    v.merges.clear();
    assert_eq!(role(&v, Special::Eot), Some(20));
    assert_eq!(role(&v, Special::FimPrefix), Some(22));
    assert_eq!(role(&v, Special::FimMiddle), None);
    v.eot = Some(30);
    v.fim = [Some(31), Some(32), Some(33), Some(34), Some(35), None];
    (v.unk, v.pad) = (Some(36), Some(37));
    let found = Special::ALL.map(|r| role(&v, r).unwrap());
    assert_eq!(found, [0, 0, 30, 36, 37, 31, 32, 33, 34, 35, 23]);
    let tokenizer = Tokenizer::from_gguf(Path::new("roles"), v.clone()).unwrap();
    let ends: Vec<u32> = (0..2048).filter(|&id| tokenizer.is_end_of_generation(id)).collect();
    assert_eq!(ends, [0, 23, 30, 34, 35]);
    (v.pad, v.fim) = (Some(u32::MAX), [Some(2048); 6]);
    assert_eq!((role(&v, Special::Pad), role(&v, Special::FimPrefix)), (None, Some(22)), "ids that do not exist");
    let pieces = sentencepiece();
    assert_eq!((role(&pieces, Special::Unk), role(&pieces, Special::Eos)), (Some(0), Some(2)));
}

#[test]
fn hostile_vocabularies_are_refused() {
    let refused = |change: fn(&mut GgufVocab), word: &str| {
        let mut v = vocab("gpt-2");
        change(&mut v);
        let error = Tokenizer::from_gguf(Path::new("hostile"), v).err().expect(word).to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(|v| v.tokens.clear(), "tokens is empty");
    refused(|v| v.tokens[7] = v.tokens[8].clone(), "twice");
    refused(|v| v.token_types = Some(vec![1; 3]), "token_type has 3");
    refused(|v| v.eos = Some(4_000_000_000), "4000000000");
    refused(|v| v.merges.push("nospace".to_owned()), "nospace");
    refused(|v| v.merges.push("absent pair".to_owned()), "merges");
    refused(|v| v.pre = Some("martian".to_owned()), "martian");
    refused(|v| v.model = "bert".to_owned(), "bert");
    refused(|v| v.model = "llama".to_owned(), "scores");
    let mut odd = vocab("gpt-2");
    odd.tokens[9] = "<0x-1>".to_owned();
    odd.tokens[10] = String::new();
    drop(Tokenizer::from_gguf(Path::new("odd"), odd));
}
