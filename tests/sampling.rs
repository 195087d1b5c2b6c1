//! The sampler allocates nothing per token. In a file of its own because it replaces the allocator.

#[path = "common/allocations.rs"]
mod allocations;

use allocations::COUNT;
use phd::sampling::{Sampler, SamplerParams};

#[test]
fn no_allocation_per_token() {
    let n_vocab = 20_000;
    let logits: Vec<f32> = (0..n_vocab as u64).map(|i| (i * 7919 % 20_011) as f32 / 2000.0).collect();
    let plain = SamplerParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
    for params in [
        plain,
        SamplerParams::default(),
        SamplerParams { temperature: 0.0, ..plain },
        SamplerParams { top_k: 15_000, ..plain },
        SamplerParams { top_p: 0.9, repetition_penalty: 1.1, ..plain },
        SamplerParams { min_p: 0.1, frequency_penalty: 0.5, penalty_last_n: 5, ..plain },
    ] {
        let mut original = Sampler::new(params, n_vocab).unwrap();
        let mut copy = original.clone();
        let before = COUNT.get();
        for sampler in [&mut original, &mut copy] {
            for _ in 0..20 {
                let token = sampler.sample(&logits).unwrap();
                sampler.accept(token);
            }
            sampler.reset();
        }
        assert_eq!(COUNT.get(), before, "{params:?}");
        drop(Sampler::new(params, n_vocab));
        assert!(COUNT.get() > before, "the counter works");
    }
}
