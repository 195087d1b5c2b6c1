//! Text out of streams of tokens: stop strings against a naive search, allocations, and where chat templates come from.

#[path = "common/allocations.rs"]
mod allocations;
mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use phd::checkpoint::{Checkpoint, Description, OpenOptions};
use phd::tokenizer::{GgufVocab, MAX_STOP_BYTES, MAX_STOPS, Special, StopStrings, StreamDecoder, Tokenizer};
use proptest::prelude::*;

/// GPT-2's alphabet: printable Latin-1 is itself, the other bytes follow from U+0100 on.
fn spelled(bytes: &[u8]) -> String {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let others: Vec<u8> = (0..=255).filter(|&b| !printable(b)).collect();
    let spell = |&b: &u8| match others.iter().position(|&o| o == b) {
        Some(i) => char::from_u32(256 + i as u32).unwrap(),
        None => char::from(b),
    };
    bytes.iter().map(spell).collect()
}

/// A tokenizer whose tokens are `pieces`, whatever bytes they are, and one control token `<|end|>` at the end.
fn tokenizer(pieces: &[Vec<u8>]) -> Tokenizer {
    let mut tokens: Vec<String> = pieces.iter().map(|p| spelled(p)).collect();
    let mut types = vec![1; tokens.len()];
    tokens.push("<|end|>".to_owned());
    types.push(3);
    let vocab =
        GgufVocab { model: "gpt2".to_owned(), tokens, token_types: Some(types), eos: None, ..Default::default() };
    Tokenizer::from_gguf(Path::new("pieces"), vocab).unwrap()
}

/// The stop string that is complete first, the longest of those that end there: its place and where it begins.
fn naive_stop(text: &str, stops: &[String]) -> Option<(usize, usize)> {
    (1..=text.len()).find_map(|end| {
        let ending = |&i: &usize| text.as_bytes()[..end].ends_with(stops[i].as_bytes());
        let longest = (0..stops.len()).filter(ending).max_by_key(|&i| (stops[i].len(), std::cmp::Reverse(i)))?;
        Some((longest, end - stops[longest].len()))
    })
}

/// Bytes at the end of `text` that are the beginning of a stop string, but not all of it.
fn naive_held(text: &str, stops: &[String]) -> usize {
    let held = |n: &usize| stops.iter().any(|s| s.len() > *n && text.as_bytes().ends_with(&s.as_bytes()[..*n]));
    (0..=text.len()).rev().find(held).unwrap_or(0)
}

fn letters(max: usize) -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof![Just('a'), Just('b'), Just('é'), Just('è'), Just('漢')], 1..=max)
        .prop_map(|chars| chars.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// However a text is cut into tokens, also within characters: the text given out and the stop are those of a search in
    /// the whole text, and what is held back is no more than it must be.
    #[test]
    fn stops_are_those_of_the_whole_text(
        text in letters(40),
        stops in proptest::collection::vec(letters(5), 1..=6),
        cuts in proptest::collection::vec(1usize..7, 1..=40),
    ) {
        let mut pieces: Vec<Vec<u8>> = Vec::new();
        let (mut ids, mut rest, mut cuts) = (Vec::new(), text.as_bytes(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (piece, other) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            ids.push(pieces.iter().position(|p| p == piece).unwrap_or_else(|| {
                pieces.push(piece.to_vec());
                pieces.len() - 1
            }));
            rest = other;
        }
        let tokenizer = tokenizer(&pieces);
        let mut decoder = StreamDecoder::new().with_stops(Arc::new(StopStrings::new(&stops).unwrap()));
        let (mut out, mut read) = (String::new(), 0);
        let stop = naive_stop(&text, &stops);
        for &id in &ids {
            decoder.push(&tokenizer, id as u32, &mut out).unwrap();
            read += pieces[id].len();
            let whole = (0..=read).rev().find(|&n| text.is_char_boundary(n)).unwrap();
            match stop {
                Some((index, start)) if start + stops[index].len() <= whole => {
                    prop_assert_eq!((decoder.stop(), &out[..]), (Some(index), &text[..start]));
                }
                _ => {
                    let held = naive_held(&text[..whole], &stops);
                    prop_assert_eq!((decoder.stop(), &out[..]), (None, &text[..whole - held]));
                }
            }
            prop_assert_eq!(decoder.n_bytes(), out.len() as u64);
        }
        decoder.finish(&mut out);
        prop_assert_eq!(&out[..], stop.map_or(&text[..], |(_, start)| &text[..start]));
        prop_assert_eq!(decoder.n_bytes(), out.len() as u64);
    }
}

#[test]
fn stop_strings_are_checked() {
    let stops = |n: usize, len: usize| StopStrings::new(&vec!["x".repeat(len); n]);
    assert!(stops(MAX_STOPS, MAX_STOP_BYTES).is_ok() && stops(0, 0).is_ok());
    assert!(stops(1, 0).unwrap_err().to_string().contains("stop string 0 has 0 bytes"));
    assert!(stops(1, MAX_STOP_BYTES + 1).unwrap_err().to_string().contains("1025"));
    assert!(stops(MAX_STOPS + 1, 1).unwrap_err().to_string().contains("65"));
}

/// A stop string within a token, control tokens left out and spelled out, broken bytes before a stop string.
#[test]
fn streams_of_odd_tokens() {
    let tokenizer = tokenizer(&[b"one STOP two".to_vec(), b"\xff ST".to_vec(), b"OP".to_vec(), b"\xe6\xbc".to_vec()]);
    let run = |stops: &[&str], special: bool, ids: &[u32]| {
        let mut decoder =
            StreamDecoder::new().with_stops(Arc::new(StopStrings::new(stops).unwrap())).with_special(special);
        let mut out = String::new();
        ids.iter().for_each(|&id| decoder.push(&tokenizer, id, &mut out).unwrap());
        decoder.finish(&mut out);
        (out, decoder.stop())
    };
    assert_eq!(run(&["STOP"], false, &[0, 0]), ("one ".to_owned(), Some(0)));
    assert_eq!(run(&["none", "STOP"], false, &[1, 2, 3]), ("\u{FFFD} ".to_owned(), Some(1)));
    assert_eq!(run(&["STOPPED"], false, &[1, 2]), ("\u{FFFD} STOP".to_owned(), None));
    assert_eq!(run(&["\u{FFFD}!"], false, &[2, 3]), ("OP\u{FFFD}".to_owned(), None));
    assert_eq!(run(&[], false, &[2, 4, 2]), ("OPOP".to_owned(), None));
    assert_eq!(run(&["<|end|>"], false, &[2, 4, 2]), ("OPOP".to_owned(), None));
    assert_eq!(run(&[], true, &[2, 4, 2]), ("OP<|end|>OP".to_owned(), None));
    assert_eq!(run(&["<|end|>"], true, &[2, 4, 2]), ("OP".to_owned(), Some(0)));
    assert_eq!(tokenizer.token_bytes(3, false).unwrap(), b"\xe6\xbc");
    assert!(StreamDecoder::new().push(&tokenizer, 5, &mut String::new()).is_err());
}

#[test]
fn a_stream_allocates_nothing() {
    let tokenizer = tokenizer(&[b"ab".to_vec(), b"abc".to_vec(), "漢".as_bytes().to_vec(), b"\xe6\xbc".to_vec()]);
    let stops = StopStrings::new(&["ababd", "abcab漢漢", "bcx"]).unwrap();
    let mut decoder = StreamDecoder::new().with_stops(Arc::new(stops));
    let mut out = String::with_capacity(1 << 16);
    let before = allocations::COUNT.get();
    for i in 0..10_000 {
        decoder.push(&tokenizer, [0, 1, 2, 3, 0, 0][i % 6], &mut out).unwrap();
    }
    assert_eq!(allocations::COUNT.get(), before);
    assert!(decoder.stop().is_none() && out.len() > 20_000);
}

/// The demo model's folder, without some of its files.
fn folder_without(left_out: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(common::demo_model()).unwrap().map(|f| f.unwrap()) {
        let name = file.file_name();
        if left_out.iter().all(|&l| name != l) {
            std::os::unix::fs::symlink(file.path(), folder.path().join(name)).unwrap();
        }
    }
    folder
}

fn tokenizer_of(folder: &Path) -> Tokenizer {
    let checkpoint = Checkpoint::open(folder, &OpenOptions::default()).unwrap();
    let Description::Hub(files) = checkpoint.description else { panic!("not a Hub folder") };
    Tokenizer::from_hub(&folder.join("tokenizer.json"), &files).unwrap()
}

/// tokenizer_config.json before special_tokens_map.json before the numbers in config.json and generation_config.json.
#[test]
fn hub_tokens_by_role() {
    let folder = folder_without(&["tokenizer_config.json", "config.json", "generation_config.json"]);
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let roles =
        || [Special::Bos, Special::Eos, Special::Unk, Special::Pad].map(|r| tokenizer_of(folder.path()).special(r));
    let id = |text: &str| tokenizer_of(folder.path()).encode(text.as_bytes(), false, false).unwrap()[0];
    write("config.json", "{}");
    assert_eq!(roles(), [None; 4]);
    assert_eq!(tokenizer_of(folder.path()).special(Special::Eot), Some(0), "<|endoftext|>");
    write("generation_config.json", r#"{"eos_token_id": [5, 6], "pad_token_id": 7}"#);
    assert_eq!(roles(), [None, Some(5), None, Some(7)]);
    assert!([5, 6].iter().all(|&id| tokenizer_of(folder.path()).is_end_of_generation(id)));
    write("config.json", r#"{"bos_token_id": 8, "eos_token_id": 4096, "pad_token_id": null}"#);
    assert_eq!(roles(), [Some(8), None, None, Some(7)], "4096 is no token");
    write(
        "special_tokens_map.json",
        r#"{"bos_token": {"content": "a"}, "eos_token": "b", "unk_token": "no such token"}"#,
    );
    assert_eq!(roles(), [Some(id("a")), Some(id("b")), None, Some(7)]);
    write("tokenizer_config.json", r#"{"bos_token": "c", "eos_token": null, "pad_token": "d"}"#);
    assert_eq!(roles(), [Some(id("c")), Some(id("b")), None, Some(id("d"))]);
}

/// Files that were saved after training say how its batches were cut and filled up.
#[test]
fn prompts_are_neither_cut_nor_filled_up() {
    let folder = folder_without(&["tokenizer.json"]);
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(common::demo_model().join("tokenizer.json")).unwrap()).unwrap();
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0,
    });
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 1, "pad_type_id": 0, "pad_token": "a",
    });
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let (found, expected) = (tokenizer_of(folder.path()), tokenizer_of(&common::demo_model()));
    let text = "In the beginning God created the heaven and the earth.";
    for (add, parse) in [(false, false), (true, false), (false, true), (true, true)] {
        let encode = |t: &Tokenizer| t.encode(text.as_bytes(), add, parse).unwrap();
        assert_eq!(encode(&found), encode(&expected));
        assert!(encode(&found).len() > 5);
    }
}

/// A Hub folder's templates: files before tokenizer_config.json, single or by name.
#[test]
fn hub_templates_by_name() {
    let folder = folder_without(&["tokenizer_config.json", "chat_template.jinja"]);
    let load = || tokenizer_of(folder.path());
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    assert!(load().choose_chat_template(None, true).unwrap_err().to_string().contains("no chat template"));
    write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    assert_eq!(load().chat_template(), Some("one"));
    let list = r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, 7]}"#;
    write("tokenizer_config.json", list);
    let tokenizer = load();
    assert_eq!(tokenizer.choose_chat_template(None, false).unwrap(), "D");
    assert_eq!(tokenizer.choose_chat_template(None, true).unwrap(), "T");
    assert_eq!(tokenizer.choose_chat_template(Some("default"), true).unwrap(), "D");
    assert!(tokenizer.choose_chat_template(Some("rag"), true).unwrap_err().to_string().contains("default, tool_use"));
    write("chat_template.jinja", "file");
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    write("additional_chat_templates/rag.jinja", "R");
    let tokenizer = load();
    assert_eq!(tokenizer.chat_template(), Some("file"));
    assert_eq!(tokenizer.choose_chat_template(Some("rag"), true).unwrap(), "R");
    assert_eq!(tokenizer.chat_templates().count(), 3);
}

#[test]
fn gguf_templates_by_name() {
    let vocab = GgufVocab {
        model: "gpt2".to_owned(),
        tokens: vec!["a".to_owned()],
        chat_template: Some("D".to_owned()),
        named_chat_templates: BTreeMap::from([("tool_use".to_owned(), "T".to_owned())]),
        ..Default::default()
    };
    let tokenizer = Tokenizer::from_gguf(Path::new("named"), vocab).unwrap();
    assert_eq!(tokenizer.choose_chat_template(None, false).unwrap(), "D");
    assert_eq!(tokenizer.choose_chat_template(None, true).unwrap(), "T");
}
