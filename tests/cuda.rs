//! The CUDA backend in a program: what it says where it cannot work, and what it does on several threads. Most of it needs a GPU or
//! the emulator (`tests/cuda/run.sh`); tests whose names begin with `emulated` make the emulated driver fail.

mod common;
#[path = "common/wide.rs"]
mod wide;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use common::{Golden, Random, demo_model, difference, golden, load, with_head_dim};
use phd::Error;
use phd::convert::{self, convert};
use phd::model::{BackendKind, LoadOptions, Model};
use phd::session::{BatchEntry, CacheType, Logits, Session, SessionOptions};
use phd::tensor::DType;
use safetensors::Dtype;

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
    // It is another file under the same name: who has opened the old one does not see it change.
    let aside = tempfile::tempdir().unwrap();
    let old = aside.path().join("old");
    std::fs::hard_link(&kept[0], &old).unwrap();
    let again = run("cuda", &cache);
    assert_eq!(std::fs::read(&old).unwrap().len(), whole.len() / 2);
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

/// Passes of more rows than the exact kernels take: activations in bf16, products by cuBLASLt if it is there.
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

fn named(name: &str) -> Golden {
    golden().into_iter().find(|g| g.name == name).unwrap()
}

/// Attention on tensor cores: one token's copies, whose warps share the queries, and prompts, whose warps have their own.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn tensor_cores_attend_as_the_reference() {
    for (name, dim) in [("llama-cswa-k4-w5-c6", 64), ("llama-cswa-k2-w16-c32", 128), ("llama-vanilla", 64)] {
        let (g, folder) = (named(name), tempfile::tempdir().unwrap());
        let path = with_head_dim(&g.path, dim, folder.path());
        // Activations of more than 16 rows are one bf16 part, and keys that two backends round may come out as neighbouring values.
        for (cache_type, bound) in [(CacheType::F16, 6e-3), (CacheType::Bf16, 1.6e-2), (CacheType::Q8_0, 2e-2)] {
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

/// A model on the GPU against the reference: a few rows, one token's copies, and as many rows as a library's products are for.
fn assert_same(path: &Path, bounds: [f32; 3], what: &str) {
    let tokens: Vec<i32> = (0..70).map(|i| i * 37 % 256).collect();
    let options = SessionOptions { n_positions: 128, cache_type: CacheType::F32, ..Default::default() };
    let new = |backend| Session::new(load(path, backend), &options).unwrap();
    let (mut s, mut reference) = (new(BackendKind::Cuda), new(BackendKind::Reference));
    let mut rest = &tokens[..];
    for (piece, bound) in [4, 1, 65].into_iter().zip(bounds) {
        let (now, later) = rest.split_at(piece);
        rest = later;
        s.prefill(0, now).unwrap();
        reference.prefill(0, now).unwrap();
        let found = difference(s.logits(0).unwrap(), reference.logits(0).unwrap());
        assert!(found < bound, "{what}, {piece} tokens: {found:e}");
    }
    // Scores need one logit of each row, and what normalizes it.
    let next = &tokens[..20];
    let (found, expected) = (s.score(0, next).unwrap(), reference.score(0, next).unwrap());
    let size = expected.iter().fold(1.0f32, |a, x| a.max(x.abs()));
    for (f, e) in found.iter().zip(&expected) {
        assert!((f - e).abs() < bounds[2] * size, "{what}: a score is {f}, expected {e}");
    }
}

/// Files of every type: what has a layout of its own, and what becomes F16; embeddings too.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn quantized_models_compute_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let source = wide::write(folder.path(), |_| Dtype::F32);
    let out = folder.path().join("quantized.gguf");
    let types = [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4_K, DType::Q5_K, DType::Q6_K];
    for (dtype, pure) in types.map(|t| (t, true)).into_iter().chain([(DType::Q4_K, false)]) {
        convert(&source, &out, Some(dtype), convert::Options { pure, ..Default::default() }).unwrap();
        assert_same(&out, [2e-4, 2e-4, 2e-2], &format!("{dtype}, pure: {pure}"));
    }
    // Its rows are no whole blocks of 256: most of it becomes Q5_0.
    convert(&demo_model(), &out, Some(DType::Q4_K), convert::Options::default()).unwrap();
    assert_same(&out, [2e-4, 2e-4, 2e-2], "Q5_0");
}

/// Types that differ within q, k and v, or between gate and up, are computed one by one.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn mixed_models_compute_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let mixed = |name: &str| match name.rsplit("layers.0.").next().unwrap() {
        "self_attn.k_proj.weight" | "mlp.gate_proj.weight" | "model.embed_tokens.weight" => Dtype::F16,
        "self_attn.v_proj.weight" | "mlp.down_proj.weight" | "lm_head.weight" => Dtype::F32,
        _ => Dtype::BF16,
    };
    assert_same(&wide::write(folder.path(), mixed), [2e-4, 2e-4, 2e-2], "mixed");
}

/// `phd bench` has the table of the CPU, with shares of what copies reach.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn bench_measures_the_device() {
    let model = demo_model();
    let arguments =
        "--backend cuda --json --prompt 70 --prefills 1 --context 20 --steps 1 --copies-list 1,2 --sequences 2";
    let mut program = Command::new(env!("CARGO_BIN_EXE_phd"));
    let program = program.arg("bench").arg(&model).args(arguments.split(' '));
    let output = program.output().unwrap();
    assert_success(&output, "bench");
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(result["backend"].as_str().unwrap().starts_with("cuda 0 ("), "{result}");
    let is_positive = |value: &serde_json::Value| value.as_f64().is_some_and(|x| x.is_finite() && x > 0.0);
    assert!(is_positive(&result["bandwidth_gb_per_second"]) && result["together"].as_array().unwrap().len() == 2);
    for (list, fields) in [("prefill", ["ms", "ratio"]), ("steps", ["ratio", "share_of_bandwidth"])] {
        let rows = result[list].as_array().unwrap();
        assert_eq!(rows.len(), 2, "{result}");
        assert!(rows.iter().all(|row| fields.iter().all(|f| is_positive(&row[f]))), "{result}");
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
        let path = with_head_dim(&g.path, 64, &at);
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

/// Runs one of these tests again, in a process of its own with another environment.
fn again(test: &str, environment: &[(&str, &str)]) -> Output {
    let mut program = Command::new(std::env::current_exe().unwrap());
    let mut program = program.args([test, "--exact", "--include-ignored", "--nocapture"]);
    program = program.envs(environment.iter().copied()).env("PHD_TEST_AGAIN", "1");
    program.output().unwrap()
}

fn is_again() -> bool {
    std::env::var_os("PHD_TEST_AGAIN").is_some()
}

fn assert_success(output: &Output, what: &str) {
    assert!(output.status.success(), "{what}: {}{}", text(&output.stdout), text(&output.stderr));
}

/// The test that was to be run [`again`] ran, and passed.
fn assert_passed(output: &Output, what: &str) {
    assert_success(output, what);
    assert!(text(&output.stdout).contains("1 passed"), "{what}: {}", text(&output.stdout));
}

/// A folder with the emulator's files but for one library. (One that the system knows would be found in its place.)
fn emulator_without(library: &str) -> tempfile::TempDir {
    let paths = std::env::var_os("LD_LIBRARY_PATH").unwrap();
    let emulator = std::env::split_paths(&paths).find(|p| p.join("libcuda.so.1").exists()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(emulator.canonicalize().unwrap()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with(library) {
            std::os::unix::fs::symlink(entry.path(), folder.path().join(name)).unwrap();
        }
    }
    folder
}

/// Long prompts without cuBLASLt, and where it has no algorithm, are computed by kernels of our own.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_prefill_without_cublaslt() {
    let folder = emulator_without("libcublasLt");
    let missing = [("LD_LIBRARY_PATH", folder.path().to_str().unwrap()), ("PHD_EMULATOR_FAIL", "cublasLtMatmul:1")];
    assert_passed(&again("long_prompts_at_once", &missing), "missing");
    assert_passed(&again("long_prompts_at_once", &[("PHD_EMULATOR_FAIL", "cublasLtCreate:1")]), "without a handle");
    let refused = [("PHD_EMULATOR_ALGORITHMS", "refused")];
    assert_passed(&again("long_prompts_at_once", &refused), "with algorithms that will not do");
    let none = [("PHD_EMULATOR_ALGORITHMS", "0"), ("PHD_EMULATOR_FAIL", "cublasLtMatmul:1")];
    assert_passed(&again("long_prompts_at_once", &none), "without algorithms");
}

/// Whatever cuBLASLt refuses, it is an error that says so, once; the session goes on.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_failures_of_cublaslt() {
    if !is_again() {
        for function in [
            "cublasLtMatmulDescCreate:1",
            "cublasLtMatmulDescSetAttribute:1",
            "cublasLtMatrixLayoutCreate:1",
            "cublasLtMatrixLayoutCreate:3",
            "cublasLtMatmulPreferenceCreate:2",
            "cublasLtMatmulPreferenceSetAttribute:1",
            "cublasLtMatmulPreferenceSetAttribute:2",
            "cublasLtMatmulAlgoGetHeuristic:2",
            "cublasLtMatmul:1",
            "cublasLtMatmul:5",
        ] {
            let failed = again("emulated_failures_of_cublaslt", &[("PHD_EMULATOR_FAIL", function)]);
            assert_passed(&failed, function);
        }
        return;
    }
    let g = golden().into_iter().find(|g| g.name == "llama3-rope-k2").unwrap();
    let model = load(&g.path, BackendKind::Cuda);
    let options = SessionOptions { n_positions: g.tokens.len(), ..Default::default() };
    let mut s = Session::new(model, &options).unwrap();
    s.prefill(0, &g.tokens[..3]).unwrap();
    let e = s.prefill(0, &g.tokens[3..]).unwrap_err().to_string();
    assert!(e.contains("cuBLASLt: CUBLAS_STATUS_INTERNAL_ERROR"), "{e}");
    assert_eq!(s.len(0).unwrap(), 3);
    s.prefill(0, &g.tokens[3..]).unwrap();
    let found = difference(s.logits(0).unwrap(), g.logits.last().unwrap());
    assert!(found < 3e-2, "{found:e}");
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
    // The size that is named is all that weights take: a device of so many bytes has no room for the session only.
    let message = text(&cuda.stderr);
    let named = message.split(" needs ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let bytes: usize = named.parse().unwrap();
    for (bytes, has_room) in [(bytes - 1, false), (bytes, true)] {
        let message = text(&run("cuda", &[("PHD_EMULATOR_MEMORY", &bytes.to_string())]).stderr);
        assert!(message.contains("out of memory"), "{bytes}: {message}");
        assert_eq!(!message.contains("the weights in device memory"), has_room, "{bytes}: {message}");
    }
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

/// A pass of a shape that has been captured is replayed, not captured again.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_graphs_are_captured_once() {
    if !is_again() {
        // The first pass, and one step: more captures would fail.
        let once = again("emulated_graphs_are_captured_once", &[("PHD_EMULATOR_FAIL", "cuStreamBeginCapture_v2:3")]);
        return assert_passed(&once, "captured again");
    }
    let mut s = Session::new(load(&demo_model(), BackendKind::Cuda), &SessionOptions::default()).unwrap();
    s.prefill(0, &[5; 20]).unwrap();
    (0..6).for_each(|token| s.step(0, token).unwrap());
}

/// Weights are read and packed while others are copied: loading waits for the device a few times, not after each of them.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_uploads_overlap() {
    if !is_again() {
        let waits = [("PHD_EMULATOR_FAIL", "cuStreamSynchronize:8")];
        return assert_passed(&again("emulated_uploads_overlap", &waits), "waited for");
    }
    let folder = tempfile::tempdir().unwrap();
    // Twelve tensors.
    let path = wide::write(folder.path(), |_| Dtype::BF16);
    Model::load(&path, LoadOptions { backend: BackendKind::Cuda, ..Default::default() }).unwrap();
}

/// A device without room for a graph computes without one.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_lack_of_memory_for_graphs() {
    let cpu = run("cpu", &[]);
    for fails in ["cuGraphInstantiateWithFlags:1=2", "cuGraphInstantiateWithFlags:2=2"] {
        let cuda = run("cuda", &[("PHD_EMULATOR_FAIL", fails)]);
        assert_success(&cuda, fails);
        assert_eq!(text(&cuda.stdout), text(&cpu.stdout), "{fails}");
    }
    let launch = run("cuda", &[("PHD_EMULATOR_FAIL", "cuGraphLaunch:2=2")]);
    assert_eq!(launch.status.code(), Some(1));
    let message = text(&launch.stderr);
    assert!(message.contains("out of memory: the CUDA driver needs more than there is"), "{message}");
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

/// A GPU that NVRTC does not know yet gets PTX, which is kept as well: for this GPU, made by this NVRTC.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_newer_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ("PHD_CACHE_DIR", folder.path().to_str().unwrap());
    let (newer, no_compiler) = (("PHD_EMULATOR_ARCH", "121"), ("PHD_EMULATOR_FAIL", "nvrtcCompileProgram:1"));
    let cpu = run("cpu", &[]);
    let is_fine = |environment: &[(&str, &str)]| {
        let cuda = run("cuda", environment);
        cuda.status.success() && cuda.stdout == cpu.stdout
    };
    let n_files = || std::fs::read_dir(folder.path()).unwrap().count();
    assert!(!is_fine(&[cache, newer, no_compiler]), "nothing is kept yet");
    assert!(is_fine(&[cache, newer]) && n_files() == 1);
    assert!(is_fine(&[cache, newer, no_compiler]), "it was kept");
    assert!(!is_fine(&[cache, no_compiler]), "another GPU's code was used");
    assert!(is_fine(&[cache]) && n_files() == 2);
    let updated = ("PHD_EMULATOR_NVRTC_VERSION", "13.1");
    assert!(!is_fine(&[cache, newer, updated, no_compiler]), "another NVRTC's code was used");
    // One that knows the GPU makes code for it.
    assert!(is_fine(&[cache, newer, updated, ("PHD_EMULATOR_NVRTC_ARCH", "121")]) && n_files() == 3);
}

/// Kept kernels need no NVRTC.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_lack_of_nvrtc() {
    let (libraries, folder) = (emulator_without("libnvrtc"), tempfile::tempdir().unwrap());
    let cache = ("PHD_CACHE_DIR", folder.path().to_str().unwrap());
    let missing = ("LD_LIBRARY_PATH", libraries.path().to_str().unwrap());
    let cpu = run("cpu", &[]);
    assert_refused(&[cache, missing], "NVRTC (libnvrtc.so) was not found", &cpu);
    assert_success(&run("cuda", &[cache]), "with NVRTC");
    let kept = run("cuda", &[cache, missing]);
    assert_success(&kept, "kept");
    assert_eq!(text(&kept.stdout), text(&cpu.stdout));
    let another = [cache, missing, ("PHD_EMULATOR_ARCH", "80")];
    assert_refused(&another, "NVRTC (libnvrtc.so) was not found", &cpu);
}

/// The CUDA backend says why it does not compute, and the CPU does where it may.
fn assert_refused(environment: &[(&str, &str)], why: &str, cpu: &Output) {
    let cuda = run("cuda", environment);
    let message = text(&cuda.stderr);
    assert!(cuda.status.code() == Some(1) && message.contains(why), "expected {why}: {message}");
    let auto = run("auto", environment);
    assert_success(&auto, why);
    assert_eq!(text(&auto.stdout), text(&cpu.stdout), "{why}");
}

#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn emulated_reasons() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ("PHD_CACHE_DIR", folder.path().to_str().unwrap());
    let cpu = run("cpu", &[]);
    for (setting, why) in [
        (("PHD_EMULATOR_VERSION", "11040"), "the CUDA driver is too old: it is for CUDA 11.4, at least 12.0 is needed"),
        (("PHD_EMULATOR_NVRTC_VERSION", "11.8"), "NVRTC is too old: it is 11.8, at least 12.0 is needed"),
        (("PHD_EMULATOR_ARCH", "75"), "has compute capability 7.5, at least 8.0 is needed"),
        (("PHD_EMULATOR_ARCH", "86"), "NVRTC supports [90], nothing for compute capability 86"),
        (
            ("PHD_EMULATOR_FAIL", "nvrtcCompileProgram:1"),
            "do not compile for sm_90: NvrtcError(NVRTC_ERROR_COMPILATION)",
        ),
        (("PHD_EMULATOR_FAIL", "nvrtcCompileProgram:1"), "an error that somebody wanted"),
        (("PHD_EMULATOR_FAIL", "cuModuleLoadData:1"), "cannot load the kernels"),
    ] {
        assert_refused(&[cache, setting], why, &cpu);
    }
}
