//! The trained checkpoints in `models/` against what the float64 reference says of it (`expected.json`).

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{argmax, root};
use phd::model::{LoadOptions, Model};
use phd::session::{CacheType, Session, SessionOptions};
use serde_json::Value as Json;

fn models() -> Vec<PathBuf> {
    let folders: Vec<PathBuf> = std::fs::read_dir(root().join("models")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(folders.len() >= 2);
    folders
}

fn expected(model: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(model.join("expected.json")).unwrap()).unwrap()
}

fn load(model: &Path, rules: Option<(usize, usize, usize)>) -> Arc<Model> {
    Arc::new(Model::load(model, LoadOptions { rules, ..Default::default() }).unwrap())
}

fn ints(json: &Json) -> Vec<i32> {
    json.as_array().unwrap().iter().map(|v| v.as_i64().unwrap() as i32).collect()
}

/// Mean negative log-likelihood over the held-out text, in windows from an empty cache.
fn held_out_loss(folder: &Path, rules: Option<(usize, usize, usize)>, cache_type: CacheType) -> f64 {
    let (expected, model) = (expected(folder), load(folder, rules));
    let window = expected["window"].as_u64().unwrap() as usize;
    let text = std::fs::read(folder.join("held_out.txt")).unwrap();
    let tokens: Vec<i32> =
        model.tokenizer().unwrap().encode(&text, false, false).unwrap().into_iter().map(|t| t as i32).collect();
    assert_eq!(tokens.len() as u64, expected["tokens"].as_u64().unwrap());
    let options = SessionOptions { n_positions: window + 1, cache_type, ..Default::default() };
    let mut session = Session::new(model, &options).unwrap();
    let mut scores = Vec::new();
    for start in (0..tokens.len()).step_by(window) {
        session.truncate(0, 0).unwrap();
        // A window's last input predicts the next window's first token.
        scores.extend(session.score(0, &tokens[start..(start + window + 1).min(tokens.len())]).unwrap());
    }
    assert_eq!(scores.len(), tokens.len() - 1);
    -scores.iter().map(|&s| f64::from(s)).sum::<f64>() / scores.len() as f64
}

#[test]
fn held_out_loss_is_the_reference_s() {
    for folder in models() {
        let expected = expected(&folder);
        let of = |name: &str| expected[name].as_f64().unwrap();
        for (rules, cache_type, expected) in [
            (None, CacheType::F32, of("mean_nll")),
            (None, CacheType::F16, of("mean_nll")),
            (Some((1, 0, 0)), CacheType::F32, of("mean_nll_if_run_as_vanilla")),
        ] {
            let found = held_out_loss(&folder, rules, cache_type);
            let what = folder.display();
            assert!((found - expected).abs() < 1e-3, "{what} {rules:?} {cache_type:?}: {found}, expected {expected}");
        }
    }
}

#[test]
fn prompts_tokenize_and_continue_as_the_reference_s() {
    models().iter().for_each(|folder| continues_as_the_reference(folder));
}

fn continues_as_the_reference(folder: &Path) {
    let model = load(folder, None);
    let tokenizer = model.tokenizer().unwrap();
    for case in expected(folder)["greedy"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let tokens: Vec<i32> =
            tokenizer.encode(prompt.as_bytes(), false, false).unwrap().into_iter().map(|t| t as i32).collect();
        assert_eq!(tokens, ints(&case["tokens"]), "{prompt}");
        let expected = ints(&case["greedy"]);
        let options = SessionOptions { cache_type: CacheType::F32, ..Default::default() };
        let mut session = Session::new(model.clone(), &options).unwrap();
        session.prefill(0, &tokens).unwrap();
        let mut found = vec![argmax(session.logits(0).unwrap())];
        while found.len() < expected.len() {
            session.step(0, *found.last().unwrap()).unwrap();
            found.push(argmax(session.logits(0).unwrap()));
        }
        assert_eq!(found, expected, "{prompt}");
        let ids: Vec<u32> = found.iter().map(|&t| t as u32).collect();
        assert_eq!(String::from_utf8(tokenizer.decode(&ids).unwrap()).unwrap(), case["text"].as_str().unwrap());
    }
}
