//! The CUDA backend in a program: what it says where it cannot work, and what it does on several threads. Most of it needs a GPU or
//! the emulator (`tests/cuda/run.sh`); tests whose names begin with `emulated` make the emulated driver fail.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use common::{Golden, demo_model, difference, golden, load};
use phd::Error;
use phd::model::{BackendKind, LoadOptions, Model};
use phd::session::{BatchEntry, CacheType, Logits, Session, SessionOptions};
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorView};

/// `phd run` on the demo model with a backend and an environment.
fn run(backend: &str, environment: &[(&str, &str)]) -> Output {
    let model = demo_model();
    let arguments = ["run", model.to_str().unwrap(), "-p", "In the beginning", "-n", "8", "--temp", "0", "--backend"];
    let mut program = Command::new(env!("CARGO_BIN_EXE_phd"));
    program.args(arguments).arg(backend).envs(environment.iter().copied()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn without_a_gpu_the_cpu_computes() {
    let hidden = [("CUDA_VISIBLE_DEVICES", "-1"), ("PHD_EMULATOR_DEVICES", "0")];
    let cuda = run("cuda", &hidden);
    assert_eq!(cuda.status.code(), Some(1));
    assert!(text(&cuda.stderr).contains("CUDA"), "{}", text(&cuda.stderr));
    let (auto, cpu) = (run("auto", &hidden), run("cpu", &hidden));
    assert!(auto.status.success() && cpu.status.success(), "{}", text(&auto.stderr));
    assert!(!cpu.stdout.is_empty() && auto.stdout == cpu.stdout);
}

#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn it_says_the_same_and_keeps_its_kernels() {
    let folder = tempfile::tempdir().unwrap();
    let cache = [("PHD_CACHE_DIR", folder.path().to_str().unwrap())];
    let (cuda, cpu) = (run("cuda", &cache), run("cpu", &cache));
    assert!(cuda.status.success(), "{}", text(&cuda.stderr));
    assert_eq!(text(&cuda.stdout), text(&cpu.stdout));
    let files = || std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let kept = files();
    assert_eq!(kept.len(), 1);
    // A damaged file is made anew.
    let whole = std::fs::read(&kept[0]).unwrap();
    std::fs::write(&kept[0], &whole[..whole.len() / 2]).unwrap();
    let again = run("cuda", &cache);
    assert_eq!(text(&again.stdout), text(&cpu.stdout));
    assert_eq!(std::fs::read(&kept[0]).unwrap().len(), whole.len());
    assert_eq!(files(), kept);
}

#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn it_is_what_it_is_called() {
    let model = load(&demo_model(), BackendKind::Cuda);
    assert!(model.backend_name().starts_with("cuda 0 ("), "{}", model.backend_name());
    let none = LoadOptions { backend: BackendKind::Cuda, device: 99, ..Default::default() };
    let e = Model::load(&demo_model(), none).err().unwrap().to_string();
    assert!(e.contains("there is no CUDA device 99"), "{e}");
}

/// Passes of more rows than the exact kernels take: activations in bf16.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn long_prompts_at_once() {
    for g in golden() {
        let model = load(&g.path, BackendKind::Cuda);
        for (cache_type, bound) in [(CacheType::F32, 3e-2), (CacheType::F16, 3e-2), (CacheType::Bf16, 5e-2)] {
            let options = SessionOptions { n_positions: g.tokens.len(), cache_type, ..Default::default() };
            let mut s = Session::new(model.clone(), &options).unwrap();
            s.prefill(0, &g.tokens).unwrap();
            let found = difference(s.logits(0).unwrap(), g.logits.last().unwrap());
            assert!(found < bound, "{} {cache_type:?}: {found:e}", g.name);
        }
    }
}

/// A small generator; the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

/// A golden checkpoint whose heads have another dimension, one that attention has tensor-core kernels for. What is not the
/// checkpoint's is noise.
fn with_head_dim(g: &Golden, dim: usize, folder: &Path) -> PathBuf {
    let bytes = std::fs::read(g.path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let config = std::fs::read_to_string(g.path.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let of = |name: &str| config[name].as_u64().unwrap() as usize;
    let (n_embd, q, kv) = (of("hidden_size"), of("num_attention_heads") * dim, of("num_key_value_heads") * dim);
    let mut random = Random(1);
    let mut noise = |n: usize| -> Vec<u8> {
        (0..n).flat_map(|_| ((random.below(2001) as f32 - 1000.0) / 5000.0).to_le_bytes()).collect()
    };
    let made: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .names()
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

fn named(name: &str) -> Golden {
    golden().into_iter().find(|g| g.name == name).unwrap()
}

/// Attention on tensor cores: one token's copies, whose warps share the queries, and prompts, whose warps have their own.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn tensor_cores_attend_as_the_reference() {
    for (name, dim) in [("llama-cswa-k4-w5-c6", 64), ("llama-cswa-k2-w16-c32", 128), ("llama-vanilla", 64)] {
        let (g, folder) = (named(name), tempfile::tempdir().unwrap());
        let path = with_head_dim(&g, dim, folder.path());
        // Keys that two backends round may come out as neighbouring values.
        for (cache_type, bound) in [(CacheType::F16, 2e-3), (CacheType::Bf16, 1.6e-2), (CacheType::Q8_0, 2e-2)] {
            let options = SessionOptions { n_positions: 256, max_rows: 60, cache_type, ..Default::default() };
            let new = |backend| Session::new(load(&path, backend), &options).unwrap();
            let (mut s, mut reference) = (new(BackendKind::Cuda), new(BackendKind::Reference));
            let tokens: Vec<i32> = g.tokens.iter().copied().cycle().take(150).collect();
            let mut rest = &tokens[..];
            for piece in [1, 1, 50, 1, 20, 1, 1, 70, 1] {
                let (now, later) = rest.split_at(piece.min(rest.len()));
                rest = later;
                s.prefill(0, now).unwrap();
                reference.prefill(0, now).unwrap();
                let found = difference(s.logits(0).unwrap(), reference.logits(0).unwrap());
                let at = s.len(0).unwrap();
                assert!(found < bound, "{name}, heads of {dim}, {cache_type:?}: {found:e} at {at}");
            }
        }
    }
}

/// With `batch_invariant`, what a sequence becomes does not depend on its company, on the pieces that it comes in, nor on the size of
/// the session.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn company_and_pieces_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut models = vec![];
    for name in ["llama-cswa-k4-w5-c6", "qwen3-scale-seq-n2"] {
        let (g, at) = (named(name), folder.path().join(name));
        std::fs::create_dir(&at).unwrap();
        let path = with_head_dim(&g, 64, &at);
        models.extend([CacheType::F16, CacheType::Bf16, CacheType::Q8_0].map(|t| (path.clone(), t)));
        models.push((g.path, CacheType::F32));
    }
    models.push((demo_model(), CacheType::F16));
    for (path, cache_type) in models {
        let model = load(&path, BackendKind::Cuda);
        let mut random = Random(3);
        // Longer than what is cut into the shortest splits.
        let n = 290;
        let text: Vec<i32> = (0..n).map(|_| random.below(100) as i32).collect();
        let new = |n_positions: usize, n_sequences: usize| {
            let options =
                SessionOptions { n_positions, n_sequences, cache_type, batch_invariant: true, ..Default::default() };
            Session::new(model.clone(), &options).unwrap()
        };
        let (mut s, mut alone) = (new(4 * n, 3), new(n, 1));
        while s.len(1).unwrap() < n {
            let mut batch = vec![];
            for seq in [2, 0, 1] {
                let len = s.len(seq).unwrap();
                let piece = [0, 1, 1, 7, 30, 70][random.below(6)].min(n - len);
                if piece > 0 {
                    batch.push(BatchEntry { seq, tokens: &text[len..len + piece], logits: Logits::Last });
                }
            }
            if batch.is_empty() {
                continue;
            }
            s.decode(&batch).unwrap();
            let (len, known) = (s.len(1).unwrap(), alone.len(0).unwrap());
            if len > known + 60 || len == n {
                alone.prefill(0, &text[known..len]).unwrap();
                let what = format!("{} {cache_type:?} at {len}", path.display());
                assert!(s.logits(1).unwrap() == alone.logits(0).unwrap(), "{what}");
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn threads_do_not_disturb_each_other() {
    let g = golden().into_iter().find(|g| g.name.contains("cswa")).unwrap();
    let model = load(&g.path, BackendKind::Cuda);
    let options = SessionOptions { n_positions: g.tokens.len(), ..Default::default() };
    let steps = |model: &Arc<Model>| {
        let mut s = Session::new(model.clone(), &options).unwrap();
        let logits = |s: &Session| s.logits(0).unwrap().to_vec();
        g.tokens.iter().map(|&t| (s.step(0, t).unwrap(), logits(&s)).1).collect::<Vec<_>>()
    };
    let alone = steps(&model);
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..3).map(|_| scope.spawn(|| steps(&model))).collect();
        all.into_iter().for_each(|t| assert!(t.join().unwrap() == alone));
    });
}

/// Sizes that no device has room for.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn a_session_without_room_is_refused_and_the_model_lives() {
    let model = load(&demo_model(), BackendKind::Cuda);
    let options = SessionOptions { n_positions: 1 << 23, cache_type: CacheType::F32, ..Default::default() };
    match Session::new(model.clone(), &options) {
        Err(Error::OutOfMemory { .. }) => {}
        Err(e) => panic!("{e}"),
        Ok(_) => eprintln!("this device has room for it"),
    }
    let mut s = Session::new(model, &SessionOptions { n_positions: 64, ..Default::default() }).unwrap();
    s.prefill(0, &[1, 2, 3]).unwrap();
}

#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_lack_of_memory() {
    let small = [("PHD_EMULATOR_MEMORY", "1000000")];
    let cuda = run("cuda", &small);
    assert_eq!(cuda.status.code(), Some(1));
    assert!(text(&cuda.stderr).contains("out of memory: the weights in device memory"), "{}", text(&cuda.stderr));
    assert!(run("auto", &small).status.success());
}

/// Launches ask to overlap where the driver can, unless told not to.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_overlap() {
    let refused = ("PHD_EMULATOR_NO_OVERLAP", "1");
    let message = text(&run("cuda", &[refused]).stderr);
    assert!(message.contains("CUDA_ERROR_NOT_SUPPORTED"), "{message}");
    for without in [("PHD_CUDA_OVERLAP", "0"), ("PHD_EMULATOR_VERSION", "12020")] {
        let done = run("cuda", &[refused, without]);
        assert!(done.status.success(), "{}", text(&done.stderr));
    }
}

/// Whatever the driver refuses, it is an error that says so.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_failures() {
    for function in [
        "cuInit:1",
        "cuDevicePrimaryCtxRetain:1",
        "cuModuleLoadData:1",
        "cuModuleGetFunction:5",
        "cuMemAlloc_v2:1",
        "cuMemAlloc_v2:9",
        "cuMemHostAlloc:1",
        "cuMemHostAlloc:3",
        "cuMemcpyHtoDAsync_v2:3",
        "cuMemcpyDtoHAsync_v2:2",
        "cuLaunchKernelEx:40",
        "cuStreamCreate:2",
        "cuStreamBeginCapture_v2:1",
        "cuStreamEndCapture:1",
        "cuGraphInstantiateWithFlags:1",
        "cuGraphLaunch:3",
        "cuStreamSynchronize:4",
        "cuEventCreate:1",
    ] {
        let failed = run("cuda", &[("PHD_EMULATOR_FAIL", function)]);
        let message = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(1), "{function}: {message}");
        assert!(message.contains("CUDA_ERROR") || message.contains("out of memory"), "{function}: {message}");
    }
}
