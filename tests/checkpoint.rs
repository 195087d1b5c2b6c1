//! Checkpoint files: right ones load and compute, wrong ones are refused with a sentence, and none does harm.

#[path = "common/allocations.rs"]
mod allocations;
mod common;
#[path = "common/gguf.rs"]
mod gguf;

use std::path::Path;

use allocations::LARGEST;
use common::{difference, golden};
use gguf::{Tensor, Value};
use phd::Error;
use phd::checkpoint::{Checkpoint, OpenOptions};
use phd::model::{BackendKind, LoadOptions, Model};
use phd::session::{CacheType, Session, SessionOptions};

const LLAMA: [(&str, Value<'static>); 9] = [
    ("general.architecture", Value::Str("llama")),
    ("llama.block_count", Value::U32(3)),
    ("llama.context_length", Value::U32(512)),
    ("llama.embedding_length", Value::U32(64)),
    ("llama.feed_forward_length", Value::U32(96)),
    ("llama.attention.head_count", Value::U32(4)),
    ("llama.attention.head_count_kv", Value::U32(2)),
    ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ("phd.copies", Value::U32(2)),
];

/// Rows of q or k as llama.cpp's converter orders them: the two halves of a head interleaved.
fn interleave(data: &[u8], n_heads: usize) -> Vec<u8> {
    let row = data.len() / (n_heads * 16);
    let rows = (0..n_heads * 16).map(|r| {
        let (head, i) = (r / 16, r % 16);
        let from = head * 16 + i % 2 * 8 + i / 2;
        &data[from * row..(from + 1) * row]
    });
    rows.flatten().copied().collect()
}

/// The golden checkpoint `llama-phd-k2` (f32) as a GGUF file.
fn golden_as_gguf() -> Vec<u8> {
    let folder = common::root().join("tests/data/golden/llama-phd-k2");
    let checkpoint = Checkpoint::open(&folder, &OpenOptions::default()).unwrap();
    let mut names = Vec::new();
    for name in checkpoint.tensors.keys() {
        let mut new = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd");
        for (from, to) in [
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("post_attention_layernorm", "ffn_norm"),
            ("input_layernorm", "attn_norm"),
        ] {
            new = new.replace(from, to);
        }
        names.push(new);
    }
    let tensors: Vec<Tensor> = checkpoint
        .tensors
        .values()
        .zip(&names)
        .map(|(t, name)| Tensor {
            name,
            shape: t.shape.iter().map(|&n| n as u64).collect(),
            ggml_type: 0,
            data: match name {
                n if n.contains("attn_q.") => interleave(&t.data, 4),
                n if n.contains("attn_k.") => interleave(&t.data, 2),
                _ => t.data.to_vec(),
            },
        })
        .collect();
    gguf::write(&LLAMA, &tensors)
}

fn in_file<T>(bytes: &[u8], use_it: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    use_it(&path)
}

fn refusal(bytes: &[u8]) -> String {
    in_file(bytes, |path| Model::load(path, LoadOptions::default()).err().expect("refused").to_string())
}

#[test]
fn a_gguf_file_computes_what_the_hub_folder_computes() {
    let g = golden().into_iter().find(|g| g.name == "llama-phd-k2").unwrap();
    for mmap in [true, false] {
        let model =
            in_file(&golden_as_gguf(), |path| Model::load(path, LoadOptions { mmap, ..Default::default() }).unwrap());
        let options = SessionOptions { n_positions: 64, cache_type: CacheType::F32, ..Default::default() };
        let mut session = Session::new(model.into(), &options).unwrap();
        session.prefill(0, &g.tokens).unwrap();
        let found = difference(session.logits(0).unwrap(), g.logits.last().unwrap());
        assert!(found < 2e-5, "{found:e}");
    }
}

/// Reading and repacking both say how far they are, and stop when they are told to, whenever that is.
#[test]
fn loading_reports_how_far_it_is_and_stops_when_told() {
    /// What is done when the files are read, and repacking begins.
    const READ: f32 = 0.3;
    let load = |path: &Path, stop_at: Option<usize>| {
        let mut fractions = Vec::new();
        let mut progress = |fraction| {
            fractions.push(fraction);
            Some(fractions.len() - 1) != stop_at
        };
        let options = LoadOptions { backend: BackendKind::Cpu, progress: Some(&mut progress), ..Default::default() };
        let loaded = Model::load(path, options);
        (loaded, fractions)
    };
    let folders = [common::demo_model(), common::root().join("tests/data/golden/llama-phd-k2")];
    for path in folders {
        let (model, fractions) = load(&path, None);
        let n_layers = model.unwrap().desc().n_layers;
        assert!(fractions.is_sorted(), "{fractions:?}");
        assert_eq!((fractions[0], fractions.last()), (0.0, Some(&1.0)), "{fractions:?}");
        assert!(fractions.contains(&READ), "{fractions:?}");
        let mut repacking: Vec<f32> = fractions.iter().copied().filter(|f| (READ..1.0).contains(f)).collect();
        repacking.dedup();
        // A layer has seven matrices, one after the other; the table is the last.
        assert!(repacking.len() > 7 * n_layers, "{repacking:?}");
        let widest = repacking.windows(2).map(|pair| pair[1] - pair[0]).fold(1.0 - repacking.last().unwrap(), f32::max);
        assert!(widest < 0.2, "{repacking:?}");
        for stop_at in 0..fractions.len() {
            let (model, until) = load(&path, Some(stop_at));
            assert!(matches!(model, Err(Error::Cancelled)), "call {stop_at} of {}", fractions.len());
            assert_eq!(until, fractions[..=stop_at]);
        }
    }
}

/// One file for each way in which a header can lie; see CVE-2024-21802, -23605, -23496, CVE-2025-53630, CVE-2026-27940,
/// -33298, -7482 and their relatives.
#[test]
fn lying_headers_are_refused() {
    let u64s = |n: u64| n.to_le_bytes().to_vec();
    let good = gguf::write(&LLAMA, &[]);
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    for (file, word) in [
        (b"".to_vec(), "magic"),
        (b"GGUX\x03\0\0\0".to_vec(), "GGUF"),
        (with(4, &[1]), "version 1"),
        (with(4, &[0, 0, 0, 3]), "big-endian"),
        (with(8, &u64s(u64::MAX)), "tensor count"),
        (with(8, &u64s(1 << 40)), "tensor count"),
        (with(16, &u64s(u64::MAX / 13)), "metadata count"),
        (with(24, &u64s(u64::MAX)), "metadata key"),
        (with(24, &u64s(0)), "metadata key"),
        (with(32, b"\xff\xfe"), "UTF-8"),
        (good[..good.len() - 3].to_vec(), "left"),
    ] {
        let message = refusal(&file);
        assert!(message.contains(word), "{word}: {message}");
    }

    let meta = |key: &'static str, value| gguf::write(&[(key, value)], &[]);
    let array =
        |kind: u32, n: u64, bytes: &[u8]| Value::Raw(9, [&kind.to_le_bytes()[..], &n.to_le_bytes(), bytes].concat());
    for (file, word) in [
        (meta("k", Value::Raw(99, vec![0; 64])), "type 99"),
        (meta("k", Value::Raw(7, vec![2])), "bool"),
        (meta("k", array(4, u64::MAX, &[])), "at most"),
        (meta("k", array(8, 1 << 61, &[0; 64])), "at most"),
        (meta("k", array(9, 1, &[0; 64])), "array of arrays"),
        (meta("k", array(77, 1, &[0; 64])), "type 77"),
        (meta("general.alignment", Value::U32(0)), "alignment"),
        (meta("general.alignment", Value::U32(1 << 31)), "alignment"),
        (meta("general.alignment", Value::U32(24)), "alignment"),
        (meta("general.alignment", Value::Str("x")), "integer"),
        (meta("split.count", Value::U32(3)), "split"),
        (gguf::write(&[("k", Value::U32(1)), ("k", Value::U32(2))], &[]), "twice"),
        (meta("general.architecture", Value::Str("gpt5")), "gpt5"),
    ] {
        let message = refusal(&file);
        assert!(message.contains(word), "{word}: {message}");
    }

    let tensor = |shape: &[u64], ggml_type| {
        let data = vec![0; 64];
        gguf::write(&LLAMA, &[Tensor { name: "t", shape: shape.to_vec(), ggml_type, data }])
    };
    for (file, word) in [
        (tensor(&[0], 0), "zero"),
        (tensor(&[4, 0], 0), "zero"),
        (tensor(&[], 0), "0 dimensions"),
        (tensor(&[1, 1, 1, 1, 1], 0), "5 dimensions"),
        (tensor(&[1 << 32, 1 << 32], 0), "whole number"),
        (tensor(&[u64::MAX / 2, 8], 0), "t"),
        (tensor(&[1 << 30, 32], 2), "bytes"),
        (tensor(&[17], 0), "68 bytes"),
        (tensor(&[33], 2), "whole number"),
        (tensor(&[16], 99), "type 99"),
    ] {
        let message = refusal(&file);
        assert!(message.contains(word), "{word}: {message}");
    }
    let twice = || Tensor { name: "t", shape: vec![8], ggml_type: 0, data: vec![0; 32] };
    assert!(refusal(&gguf::write(&LLAMA, &[twice(), twice()])).contains("twice"));

    // The second tensor moved onto the first one's bytes.
    let named = |name| Tensor { name, shape: vec![8], ggml_type: 0, data: vec![0; 32] };
    let mut file = gguf::write(&LLAMA, &[named("aaaa"), named("bbbb")]);
    let name = file.windows(4).position(|w| w == b"bbbb").unwrap();
    let offset = name + 4 + 4 + 8 + 4;
    assert_eq!(file[offset..offset + 8], 32u64.to_le_bytes());
    file[offset..offset + 8].fill(0);
    let message = refusal(&file);
    assert!(message.contains("tensors aaaa and bbbb overlap"), "{message}");
}

#[test]
fn absurd_hyper_parameters_are_refused() {
    for (key, value, word) in [
        ("llama.block_count", Value::U32(0), "block_count is 0"),
        ("llama.block_count", Value::U32(u32::MAX), "block_count"),
        ("llama.attention.head_count", Value::U32(0), "head_count is 0"),
        ("llama.attention.head_count", Value::U32(3), "3 query heads"),
        ("llama.embedding_length", Value::Str("64"), "string"),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "NaN"),
        ("llama.feed_forward_length", Value::U32(97), "shape"),
        ("phd.copies", Value::U32(0), "copies is 0"),
        ("phd.copies", Value::U32(257), "copies is 257"),
    ] {
        // A rebuilt header before the same tensors: their offsets count from the header's aligned end.
        let good = golden_as_gguf();
        let old = gguf::write(&LLAMA, &[]);
        let changed: Vec<(&str, Value)> =
            LLAMA.into_iter().map(|(k, v)| if k == key { (k, clone(&value)) } else { (k, v) }).collect();
        let mut header = gguf::write(&changed, &[]);
        header[8..16].copy_from_slice(&good[8..16]);
        header.extend(&good[old.len()..]);
        let message = refusal(&header);
        assert!(message.contains(word), "{key}: {message}");
    }
}

fn clone<'a>(value: &Value<'a>) -> Value<'a> {
    match value {
        Value::U32(v) => Value::U32(*v),
        Value::F32(v) => Value::F32(*v),
        Value::Str(v) => Value::Str(v),
        Value::Raw(kind, bytes) => Value::Raw(*kind, bytes.clone()),
    }
}

/// Thousands of damaged files: an error or a model, never a panic, a hang, or memory out of proportion to the file.
#[test]
fn damaged_files_do_no_harm() {
    let good = golden_as_gguf();
    let header_end = good.len() - good.len() * 9 / 10;
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    let extremes = [0u64, 1, 31, 1 << 31, u32::MAX as u64, 1 << 62, 1 << 63, u64::MAX];
    for _ in 0..3000 {
        let mut file = good.clone();
        for _ in 0..1 + random(3) {
            let at = random(header_end.min(file.len() - 8));
            match random(4) {
                0 => file[at] ^= 1 << random(8),
                1 => file[at..at + 8].copy_from_slice(&extremes[random(extremes.len())].to_le_bytes()),
                2 => file.truncate(at + 8),
                _ => file[at] = random(256) as u8,
            }
            if file.len() < 64 {
                break;
            }
        }
        std::fs::write(&path, &file).unwrap();
        LARGEST.set(0);
        drop(Model::load(&path, LoadOptions { mmap: false, ..Default::default() }));
        assert!(LARGEST.get() <= 4 * good.len() + (1 << 16), "{} bytes at once for {}", LARGEST.get(), file.len());
    }
}

#[test]
fn broken_hub_folders_are_refused() {
    let source = common::root().join("tests/data/golden/llama-cswa-k3-w16-c32");
    let refusal = |change: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&source).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        change(folder.path());
        Model::load(folder.path(), LoadOptions::default()).err().expect("refused").to_string()
    };
    let edit = |file: &'static str, from: &'static str, to: &'static str, word: &str| {
        let message = refusal(&|folder| {
            let text = std::fs::read_to_string(folder.join(file)).unwrap();
            assert!(text.contains(from), "{from}");
            std::fs::write(folder.join(file), text.replacen(from, to, 1)).unwrap();
        });
        assert!(message.contains(word), "{word}: {message}");
    };
    edit("config.json", "\"llama\"", "\"gptx\"", "gptx");
    edit("config.json", "\"silu\"", "\"gelu\"", "hidden_act");
    edit("config.json", "\"hidden_size\": 64", "\"hidden_size\": 0", "hidden_size is 0");
    edit("config.json", "\"hidden_size\": 64", "\"hidden_size\": 128", "shape [128, 64], expected [128, 128]");
    edit("config.json", "\"hidden_size\": 64", "\"hidden_size\": 1e300", "hidden_size");
    edit("config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", "model.layers.3");
    edit("config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2", "no place");
    edit("config.json", "\"rope_theta\": 10000.0", "\"rope_theta\": -1", "rope_theta");
    edit("config.json", "\"rope_theta\": 10000.0", "\"rope_scaling\": {\"type\": \"yarn\"}", "yarn");
    edit("config.json", "\"copies\": 3", "\"copies\": 0", "copies is 0");
    edit("config.json", "\"copies\": 3", "\"copys\": 3", "copys");
    edit("config.json", "{", "", "JSON");
    edit("model.safetensors.index.json", "model-00001-of-00003", "../model-00001-of-00003", "within the folder");
    edit("model.safetensors.index.json", "model-00001-of-00003", "model-00002-of-00003", "missing");
    let shard = "model-00002-of-00003.safetensors";
    assert!(refusal(&|f| std::fs::remove_file(f.join(shard)).unwrap()).contains(shard));
    assert!(refusal(&|f| std::fs::remove_file(f.join("config.json")).unwrap()).contains("config.json"));
    let truncated = refusal(&|f| {
        let bytes = std::fs::read(f.join(shard)).unwrap();
        std::fs::write(f.join(shard), &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(truncated.contains(shard), "{truncated}");
}
