//! The sampler allocates nothing per token. In a file of its own because it replaces the allocator.

use phd::sampling::{Sampler, SamplerParams};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Per thread: the test harness allocates on its own.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are those of `System.alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are those of `System.dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
        let before = ALLOCATIONS.get();
        for sampler in [&mut original, &mut copy] {
            for _ in 0..20 {
                let token = sampler.sample(&logits).unwrap();
                sampler.accept(token);
            }
            sampler.reset();
        }
        assert_eq!(ALLOCATIONS.get(), before, "{params:?}");
        drop(Sampler::new(params, n_vocab));
        assert!(ALLOCATIONS.get() > before, "the counter works");
    }
}
