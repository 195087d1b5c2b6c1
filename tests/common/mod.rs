//! What several test programs share.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use phd::model::{BackendKind, LoadOptions, Model};
use phd::session::Session;
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorView};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn demo_model() -> PathBuf {
    root().join("models/kjv-phd-cswa-2-16-32")
}

/// A golden checkpoint: see `tests/data/golden/README.md`.
#[derive(Clone)]
pub struct Golden {
    pub name: String,
    pub path: PathBuf,
    pub tokens: Vec<i32>,
    /// `(position, n_vocab)`
    pub logits: Vec<Vec<f32>>,
    pub greedy: Vec<i32>,
}

pub fn golden() -> Vec<Golden> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root().join("tests/data/golden"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .collect();
    folders.sort();
    folders.into_iter().map(|path| read_golden(&path)).collect()
}

fn read_golden(path: &Path) -> Golden {
    let bytes = std::fs::read(path.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        file.tensor(name).unwrap().data().chunks(4).map(|b| b.try_into().unwrap()).collect()
    };
    let ints = |name: &str| words(name).into_iter().map(i32::from_le_bytes).collect();
    let tokens: Vec<i32> = ints("tokens");
    let all: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
    Golden {
        name: path.file_name().unwrap().to_string_lossy().into_owned(),
        logits: all.chunks(all.len() / tokens.len()).map(<[f32]>::to_vec).collect(),
        greedy: ints("greedy"),
        path: path.to_owned(),
        tokens,
    }
}

/// A golden checkpoint cut down to its first layer.
pub fn one_layer(path: &Path, folder: &Path) -> PathBuf {
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let first = |name: &str| !name.contains(".layers.") || name.contains(".layers.0.");
    let tensors: Vec<_> = file.tensors().into_iter().filter(|(name, _)| first(name)).collect();
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["num_hidden_layers"] = 1.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder.to_owned()
}

/// A golden checkpoint whose query heads all share its first key/value head: one that no two threads have the same number of.
pub fn one_key_head(path: &Path, folder: &Path) -> PathBuf {
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let heads = config["num_key_value_heads"].as_u64().unwrap() as usize;
    let width = file.tensor("model.layers.0.self_attn.k_proj.weight").unwrap().shape()[0];
    let is_cut = |name: &str| [".k_proj.", ".v_proj.", ".k_norm."].iter().any(|part| name.contains(part));
    let tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let mut shape = tensor.shape().to_vec();
            let mut data = tensor.data();
            if is_cut(&name) && shape[0] == width {
                shape[0] /= heads;
                data = &data[..data.len() / heads];
            }
            (name, TensorView::new(tensor.dtype(), shape, data).unwrap())
        })
        .collect();
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
    config["num_key_value_heads"] = 1.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder.to_owned()
}

/// Numbers that are the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

/// A golden checkpoint whose heads have another dimension. What is not the checkpoint's is noise.
pub fn with_head_dim(path: &Path, dim: usize, folder: &Path) -> PathBuf {
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let of = |name: &str| config[name].as_u64().unwrap() as usize;
    let (n_embd, q, kv) = (of("hidden_size"), of("num_attention_heads") * dim, of("num_key_value_heads") * dim);
    let mut random = Random(1);
    let mut noise = |n: usize| -> Vec<u8> {
        (0..n).flat_map(|_| ((random.below(2001) as f32 - 1000.0) / 5000.0).to_le_bytes()).collect()
    };
    let mut names = file.names();
    names.sort(); // the noise is the same in every run
    let made: Vec<(String, Vec<usize>, Vec<u8>)> = names
        .into_iter()
        .filter_map(|name| {
            let shape = match name.rsplit("self_attn.").next().unwrap() {
                "q_proj.weight" => vec![q, n_embd],
                "k_proj.weight" | "v_proj.weight" => vec![kv, n_embd],
                "o_proj.weight" => vec![n_embd, q],
                "q_norm.weight" | "k_norm.weight" => vec![dim],
                _ => return None,
            };
            let bytes = noise(shape.iter().product());
            Some((name.to_string(), shape, bytes))
        })
        .collect();
    let mut tensors: Vec<(String, TensorView)> =
        file.tensors().into_iter().filter(|(name, _)| !made.iter().any(|(other, ..)| other == name)).collect();
    for (name, shape, bytes) in &made {
        tensors.push((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    }
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
    config["head_dim"] = dim.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder.to_owned()
}

/// Whether the tests' CPU backend is to be the CUDA one: on a GPU, or on the emulator (`tests/cuda/run.sh`).
pub fn on_cuda() -> bool {
    std::env::var_os("PHD_TEST_CUDA").is_some()
}

/// Whether that is the emulator, which is slow: tests do as much less as their comments say.
pub fn on_emulator() -> bool {
    std::env::var_os("PHD_TEST_CUDA").is_some_and(|v| v == "emulated")
}

/// How far the logits of f32 caches may lie from the reference's: see [`difference`]. CUDA kernels split activations into two bf16
/// parts, 16 bits of mantissa.
pub fn rounding() -> f32 {
    if on_cuda() { 2e-4 } else { 2e-5 }
}

pub fn load(path: &Path, backend: BackendKind) -> Arc<Model> {
    let backend = if backend == BackendKind::Cpu && on_cuda() { BackendKind::Cuda } else { backend };
    let model = Model::load(path, LoadOptions { backend, ..Default::default() }).unwrap_or_else(|e| panic!("{e}"));
    if backend == BackendKind::Cpu {
        check_variant(&model);
    }
    Arc::new(model)
}

/// The kernels that `PHD_CPU_VARIANT` forces.
pub fn forced_variant() -> Option<String> {
    std::env::var("PHD_CPU_VARIANT").ok().filter(|name| !name.is_empty())
}

/// Whether a model on the CPU is computed by the kernels that are forced, if any are.
pub fn check_variant(model: &Model) {
    let Some(forced) = forced_variant() else { return };
    let name = model.backend_name();
    let kernels =
        name.strip_prefix("cpu (").and_then(|rest| rest.strip_suffix(')')).unwrap_or_else(|| panic!("{name}"));
    let (variant, uses_ggml) = match kernels.strip_suffix(" and ggml") {
        Some(variant) => (variant, true),
        None => (kernels, false),
    };
    match forced.as_str() {
        // It has none for float weights.
        "ggml" => assert_eq!(uses_ggml, model.desc().dtypes.contains('Q'), "{name}: {}", model.desc().dtypes),
        _ => assert_eq!(variant, forced, "{name}"),
    }
}

/// `max |difference| / max |expected|`: how golden logits are compared.
pub fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    found.iter().zip(expected).fold(0.0f32, |a, (f, e)| if f.is_nan() { f32::INFINITY } else { a.max((f - e).abs()) })
        / largest
}

/// Grows sequence 0: for each (from, to) a prompt up to `from`, then steps up to `to`. The logits after each prompt and each step.
pub fn logits_through(s: &mut Session, tokens: &[i32], pieces: &[(usize, usize)]) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    for &(from, to) in pieces {
        s.prefill(0, &tokens[s.len(0).unwrap()..from]).unwrap();
        logits.push(s.logits(0).unwrap().to_vec());
        for &token in &tokens[from..to] {
            s.step(0, token).unwrap();
            logits.push(s.logits(0).unwrap().to_vec());
        }
    }
    logits
}

pub fn argmax(logits: &[f32]) -> i32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap() as i32
}

/// Runs this test program again with each variant of the kernels that this CPU has, and with all fast ones off; `outcome` must
/// stand in what it prints. That the variant is what runs is checked by [`load`].
pub fn under_every_variant(arguments: &[&str], outcome: &str) {
    if forced_variant().is_some() {
        load(&golden()[0].path, BackendKind::Cpu); // this is such a run
        return;
    }
    let variants = phd::backend::cpu::variants();
    assert!(variants.contains(&"plain"));
    for variant in variants {
        let mut program = std::process::Command::new(std::env::current_exe().unwrap());
        let run = program.args(arguments).env("PHD_CPU_VARIANT", variant).output().unwrap();
        let text = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && text.contains(outcome), "{variant}: {text}");
    }
}
