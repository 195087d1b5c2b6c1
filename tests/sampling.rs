//! The sampler allocates nothing per token. In a file of its own because it replaces the allocator.

#[path = "common/allocations.rs"]
mod allocations;

use allocations::COUNT;
use phd::sampling::{Sampler, SamplerParams, Stage, StageKind, log_probabilities, top_log_probabilities};

const N_VOCAB: usize = 20_000;

fn logits() -> Vec<f32> {
    (0..N_VOCAB as u64).map(|i| (i * 7919 % 20_011) as f32 / 2000.0).collect()
}

fn assert_allocates_nothing(mut original: Sampler, what: &dyn std::fmt::Debug) {
    let logits = logits();
    original.accept(7).unwrap();
    let mut copy = original.clone();
    let before = COUNT.get();
    for sampler in [&mut original, &mut copy] {
        for _ in 0..20 {
            let token = sampler.sample(&logits).unwrap();
            // Repeats itself, for DRY.
            sampler.accept(token % 4).unwrap();
        }
        sampler.reset();
        assert!(sampler.candidates(&logits).unwrap().count() > 0);
    }
    assert_eq!(COUNT.get(), before, "{what:?}");
    drop(original.clone());
    assert!(COUNT.get() > before, "the counter works");
}

#[test]
fn no_allocation_per_token() {
    let plain = SamplerParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
    let all = SamplerParams {
        repetition_penalty: 1.1,
        frequency_penalty: 0.5,
        presence_penalty: 0.1,
        penalty_last_n: 5,
        dry_multiplier: 0.8,
        dry_penalty_last_n: 10,
        top_n_sigma: 3.0,
        typical_p: 0.95,
        xtc_probability: 0.5,
        dynatemp_range: 0.3,
        ..Default::default()
    };
    for params in [
        plain,
        SamplerParams::default(),
        all,
        SamplerParams { top_k: 0, min_keep: 3, ..all },
        SamplerParams { mirostat: 2, ..all },
        SamplerParams { temperature: 0.0, ..plain },
        SamplerParams { top_k: 15_000, ..plain },
        SamplerParams { top_p: 0.9, ..plain },
        SamplerParams { typical_p: 0.5, ..plain },
    ] {
        let mut sampler = Sampler::new(params, N_VOCAB).unwrap();
        sampler.add_dry_breaker(&[3, 1]).unwrap();
        sampler.add_logit_bias([(5, 1.0), (6, f32::NEG_INFINITY)].into_iter()).unwrap();
        assert_allocates_nothing(sampler, &params);
    }
    // In an order of the user's, with every stage.
    let mut sampler = Sampler::empty(N_VOCAB, 1).unwrap();
    for kind in StageKind::ALL.into_iter().rev().filter(|k| !["greedy", "dist", "mirostat_v2"].contains(&k.name())) {
        sampler.push(all.stage(kind)).unwrap();
    }
    sampler.push(Stage::Greedy).unwrap();
    assert_allocates_nothing(sampler, &"reversed");
}

#[test]
fn log_probabilities_allocate_nothing() {
    let logits = logits();
    let (mut tokens, mut out) = ([0i32; 50], [0f32; 50]);
    let before = COUNT.get();
    top_log_probabilities(&logits, &mut tokens, &mut out).unwrap();
    let mut again = [0f32; 50];
    log_probabilities(&logits, &tokens, &mut again).unwrap();
    assert_eq!(COUNT.get(), before);
    assert_eq!(out, again);
}
