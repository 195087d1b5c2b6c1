//! The trained checkpoint in `models/` against what the float64 reference says of it (`expected.json`).

mod common;

use std::sync::Arc;

use common::{argmax, demo_model};
use phd::model::{LoadOptions, Model};
use phd::session::{CacheType, Session, SessionOptions};
use serde_json::Value as Json;

fn expected() -> Json {
    serde_json::from_slice(&std::fs::read(demo_model().join("expected.json")).unwrap()).unwrap()
}

fn load(rules: Option<(usize, usize, usize)>) -> Arc<Model> {
    Arc::new(Model::load(&demo_model(), LoadOptions { rules, ..Default::default() }).unwrap())
}

fn ints(json: &Json) -> Vec<i32> {
    json.as_array().unwrap().iter().map(|v| v.as_i64().unwrap() as i32).collect()
}

/// Mean negative log-likelihood over the held-out text, in windows from an empty cache.
fn held_out_loss(model: Arc<Model>, cache_type: CacheType) -> f64 {
    let expected = expected();
    let window = expected["window"].as_u64().unwrap() as usize;
    let text = std::fs::read(demo_model().join("held_out.txt")).unwrap();
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
    let expected = expected();
    let (phd, vanilla) =
        (expected["mean_nll"].as_f64().unwrap(), expected["mean_nll_if_run_as_vanilla"].as_f64().unwrap());
    let found = held_out_loss(load(None), CacheType::F32);
    assert!((found - phd).abs() < 1e-3, "{found}, expected {phd}");
    let found = held_out_loss(load(None), CacheType::F16);
    assert!((found - phd).abs() < 1e-3, "f16 cache: {found}, expected {phd}");
    let found = held_out_loss(load(Some((1, 0, 0))), CacheType::F32);
    assert!((found - vanilla).abs() < 1e-3, "K = 1: {found}, expected {vanilla}");
}

#[test]
fn prompts_tokenize_and_continue_as_the_reference_s() {
    let model = load(None);
    let tokenizer = model.tokenizer().unwrap();
    for case in expected()["greedy"].as_array().unwrap() {
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
