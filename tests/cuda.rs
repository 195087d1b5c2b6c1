//! The CUDA backend in a program: what it says where it cannot work, and what it does on several threads. Most of it needs a GPU or
//! the emulator (`tests/cuda/run.sh`); tests whose names begin with `emulated` make the emulated driver fail.

mod common;

use std::process::{Command, Output};
use std::sync::Arc;

use common::{demo_model, difference, golden, load};
use phd::Error;
use phd::model::{BackendKind, LoadOptions, Model};
use phd::session::{CacheType, Session, SessionOptions};

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
        for cache_type in [CacheType::F32, CacheType::F16] {
            let options = SessionOptions { n_positions: g.tokens.len(), cache_type, ..Default::default() };
            let mut s = Session::new(model.clone(), &options).unwrap();
            s.prefill(0, &g.tokens).unwrap();
            let found = difference(s.logits(0).unwrap(), g.logits.last().unwrap());
            assert!(found < 3e-2, "{} {cache_type:?}: {found:e}", g.name);
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
        "cuLaunchKernel:40",
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
