//! Every golden checkpoint, by every way of getting there: in one prefill, in pieces, step by step, after a rollback,
//! after a fork, interleaved, with each cache type.

mod common;

use std::sync::Arc;

use common::{
    Golden, argmax, difference, forced_variant, golden, load, on_cuda, on_emulator, rounding, under_every_variant,
};
use phd::model::{BackendKind, Model};
use phd::schedule::Pruning;
use phd::session::{CacheType, Session, SessionOptions};

/// `max |difference| / max |logit|`. With f32 throughout only the order of sums differs from the float64 reference. The others
/// are empirical, set a little above what these checkpoints show (f16 3.1e-3, bf16 2.6e-2, q8_0 above 6e-2). A wrong mask moves a
/// logit by 5e-2 or more: q8_0 does not tell it apart and only guards against gross errors.
fn bound(cache_type: CacheType) -> f32 {
    match cache_type {
        CacheType::F32 => rounding(),
        CacheType::F16 => 6e-3,
        CacheType::Bf16 => 4e-2,
        CacheType::Q8_0 => 8e-2,
    }
}

const CACHE_TYPES: [CacheType; 4] = [CacheType::F32, CacheType::F16, CacheType::Bf16, CacheType::Q8_0];

fn options(n: usize, cache_type: CacheType) -> SessionOptions {
    SessionOptions { n_positions: n, cache_type, ..Default::default() }
}

fn check(session: &Session, seq: i64, g: &Golden, position: usize, cache_type: CacheType, what: &str) {
    let found = difference(session.logits(seq).unwrap(), &g.logits[position]);
    assert!(found <= bound(cache_type), "{} {cache_type:?} {what}: position {position} differs by {found:e}", g.name);
}

/// Both backends; under [`every_variant`] only the one whose kernels are forced.
fn backends() -> &'static [BackendKind] {
    let is_forced = on_cuda() || forced_variant().is_some();
    if is_forced { &[BackendKind::Cpu] } else { &[BackendKind::Reference, BackendKind::Cpu] }
}

/// The whole suite again with each variant of the kernels that this CPU has, and with all fast ones off.
#[test]
fn every_variant() {
    under_every_variant(&[], "9 passed");
}

fn each(test: impl Fn(&Golden, Arc<Model>, CacheType)) {
    let checkpoints = golden();
    each_model(|g, model| {
        let index = checkpoints.iter().position(|c| c.name == g.name).unwrap();
        for (i, cache_type) in CACHE_TYPES.into_iter().enumerate() {
            // On the emulator each checkpoint with one type, each type with a fourth of them.
            if !on_emulator() || (index + i).is_multiple_of(CACHE_TYPES.len()) {
                test(g, model.clone(), cache_type);
            }
        }
    });
}

fn each_model(test: impl Fn(&Golden, Arc<Model>)) {
    for g in golden() {
        for &backend in backends() {
            test(&g, load(&g.path, backend));
        }
    }
}

#[test]
fn prefill_of_every_length() {
    each(|g, model, cache_type| {
        let mut s = Session::new(model, &options(g.tokens.len(), cache_type)).unwrap();
        for n in 1..=g.tokens.len() {
            s.truncate(0, 0).unwrap();
            s.prefill(0, &g.tokens[..n]).unwrap();
            check(&s, 0, g, n - 1, cache_type, "prefill");
        }
    });
}

#[test]
fn one_step_at_a_time() {
    each(|g, model, cache_type| {
        let mut s = Session::new(model, &options(g.tokens.len(), cache_type)).unwrap();
        for (i, &token) in g.tokens.iter().enumerate() {
            s.step(0, token).unwrap();
            check(&s, 0, g, i, cache_type, "step");
        }
    });
}

#[test]
fn prefill_in_pieces_then_steps() {
    each(|g, model, cache_type| {
        let n = g.tokens.len();
        // Small passes as well, so that one call takes several.
        for max_rows in [1, 7, 64] {
            let options = SessionOptions { max_rows, ..options(n, cache_type) };
            let mut s = Session::new(model.clone(), &options).unwrap();
            for cut in [1, 2, n / 3, n / 2, n - 2] {
                s.truncate(0, 0).unwrap();
                s.prefill(0, &g.tokens[..cut]).unwrap();
                check(&s, 0, g, cut - 1, cache_type, "first piece");
                let next = (cut + n).div_ceil(2);
                s.prefill(0, &g.tokens[cut..next]).unwrap();
                check(&s, 0, g, next - 1, cache_type, "second piece");
                for i in next..n {
                    s.step(0, g.tokens[i]).unwrap();
                    check(&s, 0, g, i, cache_type, "step after pieces");
                }
            }
        }
    });
}

#[test]
fn after_truncate_at_every_length() {
    each(|g, model, cache_type| {
        let n = g.tokens.len();
        let mut s = Session::new(model, &options(n, cache_type)).unwrap();
        for m in 1..n {
            let len = s.len(0).unwrap();
            s.prefill(0, &g.tokens[len..]).unwrap();
            s.truncate(0, m).unwrap();
            assert!(s.logits(0).is_err(), "logits of a text that is gone");
            s.step(0, g.tokens[m]).unwrap();
            check(&s, 0, g, m, cache_type, "step after truncate");
        }
    });
}

#[test]
fn forks_and_interleaved_sequences() {
    each(|g, model, cache_type| {
        let n = g.tokens.len();
        let options = SessionOptions { n_sequences: 3, ..options(3 * n, cache_type) };
        let mut s = Session::new(model, &options).unwrap();
        for cut in [1, n / 2, n - 2] {
            for seq in 0..3 {
                s.truncate(seq, 0).unwrap();
            }
            s.prefill(0, &g.tokens[..cut]).unwrap();
            s.fork(0, 1).unwrap();
            check(&s, 1, g, cut - 1, cache_type, "logits of a fork");
            // Another text in between must not be seen; a second fork goes its own way.
            s.prefill(2, &g.tokens[cut..]).unwrap();
            for i in cut..n {
                s.step(1, g.tokens[i]).unwrap();
                s.step(0, g.tokens[i]).unwrap();
                check(&s, 0, g, i, cache_type, "step of the source");
                check(&s, 1, g, i, cache_type, "step of the fork");
            }
        }
    });
}

#[test]
fn greedy_continuations() {
    each_model(|g, model| {
        let n = g.tokens.len() / 2;
        let continuation = |cache_type| {
            let mut s = Session::new(model.clone(), &options(n + g.greedy.len(), cache_type)).unwrap();
            s.prefill(0, &g.tokens[..n]).unwrap();
            let mut steps = vec![s.logits(0).unwrap().to_vec()];
            for &token in &g.greedy[..g.greedy.len() - 1] {
                s.step(0, token).unwrap();
                steps.push(s.logits(0).unwrap().to_vec());
            }
            steps
        };
        let exact = continuation(CacheType::F32);
        assert_eq!(exact.iter().map(|l| argmax(l)).collect::<Vec<_>>(), g.greedy, "{}", g.name);
        for cache_type in [CacheType::F16, CacheType::Bf16, CacheType::Q8_0] {
            for (i, (found, exact)) in continuation(cache_type).iter().zip(&exact).enumerate() {
                // A rounded cache may decide a tie otherwise. Three steps of these checkpoints are that close: their two best
                // logits lie within 3.5e-4 of the largest; all others must be equal.
                let largest = exact.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                let lead = exact[g.greedy[i] as usize] - exact[argmax(found) as usize];
                assert!(lead <= 4e-4 * largest, "{} {cache_type:?} token {i} lost by {lead}", g.name);
            }
        }
    });
}

#[test]
fn scores_are_the_log_probabilities() {
    each_model(|g, model| {
        let mut s = Session::new(model, &options(g.tokens.len(), CacheType::F32)).unwrap();
        let scores = s.score(0, &g.tokens).unwrap();
        assert_eq!(scores.len(), g.tokens.len() - 1);
        for (i, score) in scores.iter().enumerate() {
            let sum: f64 = g.logits[i].iter().map(|&l| f64::from(l).exp()).sum();
            let expected = f64::from(g.logits[i][g.tokens[i + 1] as usize]) - sum.ln();
            assert!(
                (f64::from(*score) - expected).abs() < 1e-3,
                "{} position {i}: {score}, expected {expected}",
                g.name
            );
        }
    });
}

#[test]
fn pruned_prefill_computes_less_and_the_same() {
    each_model(|g, model| {
        let n = g.tokens.len();
        let run = |pruning| {
            let options = SessionOptions { pruning, ..options(n, CacheType::F32) };
            let mut s = Session::new(model.clone(), &options).unwrap();
            s.prefill(0, &g.tokens).unwrap();
            check(&s, 0, g, n - 1, CacheType::F32, &format!("{pruning:?}"));
            s.stats().snapshot().rows
        };
        let (pruned, all) = (run(Pruning::Exact), run(Pruning::All));
        let desc = model.desc();
        assert_eq!(all, (n * desc.rules.copies * desc.n_layers) as u64, "{}", g.name);
        assert!(pruned <= all);
        if g.name.starts_with("llama-phd") {
            assert_eq!(pruned, (desc.n_layers * (n + desc.rules.copies - 1)) as u64, "{}", g.name);
        }
    });
}
