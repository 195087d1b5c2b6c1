//! Stages against llama.cpp's own samplers, which the feature `ggml` links: the same tokens, the same logits.
#![cfg(feature = "ggml")]

use llama_cpp_sys_2 as llama;
use phd::sampling::{Sampler, Stage};

/// What a sampler of llama.cpp leaves after `history`, by token; llama.cpp marks some dropped tokens with -inf.
///
/// # Safety
/// `sampler` is fresh and not null. It is freed.
unsafe fn theirs(sampler: *mut llama::llama_sampler, history: &[u32], logits: &[f32]) -> Vec<(u32, f64)> {
    assert!(!sampler.is_null());
    let mut data: Vec<llama::llama_token_data> = logits
        .iter()
        .enumerate()
        .map(|(id, &logit)| llama::llama_token_data { id: id as i32, logit, p: 0.0 })
        .collect();
    let mut array =
        llama::llama_token_data_array { data: data.as_mut_ptr(), size: data.len(), selected: -1, sorted: false };
    // SAFETY: the caller's promise; `array` is of `data`, which outlives it. XTC moves its start forward within it.
    let left = unsafe {
        history.iter().for_each(|&t| llama::llama_sampler_accept(sampler, t as i32));
        llama::llama_sampler_apply(sampler, &mut array);
        llama::llama_sampler_free(sampler);
        std::slice::from_raw_parts(array.data, array.size)
    };
    let mut left: Vec<(u32, f64)> =
        left.iter().filter(|d| d.logit > f32::NEG_INFINITY).map(|d| (d.id as u32, d.logit.into())).collect();
    left.sort_by_key(|c| c.0);
    left
}

fn ours(stage: Stage, history: &[u32], logits: &[f32]) -> Vec<(u32, f64)> {
    let mut sampler = Sampler::empty(logits.len(), 0).unwrap();
    sampler.push(stage).unwrap();
    history.iter().for_each(|&t| sampler.accept(t).unwrap());
    let mut left: Vec<(u32, f64)> = sampler.candidates(logits).unwrap().collect();
    left.sort_by_key(|c| c.0);
    left
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }

    fn uniform(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 24) as f32
    }

    /// Roughly normal.
    fn logits(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| ((0..12).map(|_| self.uniform()).sum::<f32>() - 6.0) * 2.0).collect()
    }
}

fn compare(at: &str, found: &[(u32, f64)], want: &[(u32, f64)]) {
    let tokens = |left: &[(u32, f64)]| left.iter().map(|c| c.0).collect::<Vec<u32>>();
    assert_eq!(tokens(found), tokens(want), "{at}");
    for (f, w) in found.iter().zip(want) {
        assert!((f.1 - w.1).abs() <= 1e-5 * w.1.abs().max(1.0), "{at}: token {} has {}, llama.cpp's {}", f.0, f.1, w.1);
    }
}

/// Rounding to f32, as llama.cpp sums, moves the border of a stage by about this share of its parameter.
const ROUNDING: f64 = 2e-5;

/// As [`compare`], but tokens within rounding of the border may fall to either side of it.
fn compare_borders(at: &str, stage: Stage, logits: &[f32], want: &[(u32, f64)]) {
    let nudged = |by: f64| {
        let nudge = |x: f32| (f64::from(x) * (1.0 + by)) as f32;
        let stage = match stage {
            Stage::TopP { p, min_keep } => Stage::TopP { p: nudge(p).min(1.0), min_keep },
            Stage::TypicalP { p, min_keep } => Stage::TypicalP { p: nudge(p).min(1.0), min_keep },
            Stage::MinP { p, min_keep } => Stage::MinP { p: nudge(p).min(1.0), min_keep },
            Stage::TopNSigma { n } => Stage::TopNSigma { n: nudge(n) },
            other => other,
        };
        ours(stage, &[], logits)
    };
    let (mut fewer, mut more) = (nudged(-ROUNDING), nudged(ROUNDING));
    if fewer.len() > more.len() {
        std::mem::swap(&mut fewer, &mut more);
    }
    let all: std::collections::BTreeMap<u32, f64> = more.iter().copied().collect();
    assert!(want.iter().all(|c| all.get(&c.0) == Some(&c.1)), "{at}: {} of {}", want.len(), more.len());
    let theirs: std::collections::BTreeSet<u32> = want.iter().map(|c| c.0).collect();
    assert!(fewer.iter().all(|c| theirs.contains(&c.0)), "{at}: {} of {}", fewer.len(), want.len());
    assert!(more.len() - fewer.len() <= 1 + logits.len() / 100, "{at}: the comparison says nothing");
}

#[test]
fn truncations_keep_the_same_tokens() {
    let mut random = Random(1);
    for round in 0..300 {
        let n = [1, 2, 5, 30, 300, 2000][round % 6];
        let logits = random.logits(n);
        let (p, keep) = (random.uniform(), random.below(4));
        let min_keep = keep as u32;
        let k = 1 + random.below(n as u64 + 5) as u32;
        let at = |name: &str| format!("{name}, round {round}, n {n}, p {p}, k {k}, min_keep {keep}");
        // SAFETY: constructors that take numbers.
        unsafe {
            let keep = keep as usize;
            let want = theirs(llama::llama_sampler_init_top_k(k as i32), &[], &logits);
            compare(&at("top-k"), &ours(Stage::TopK { k }, &[], &logits), &want);
            let want = theirs(llama::llama_sampler_init_top_p(p, keep), &[], &logits);
            compare_borders(&at("top-p"), Stage::TopP { p, min_keep }, &logits, &want);
            let want = theirs(llama::llama_sampler_init_min_p(p, keep), &[], &logits);
            compare_borders(&at("min-p"), Stage::MinP { p, min_keep }, &logits, &want);
            let want = theirs(llama::llama_sampler_init_typical(p, keep), &[], &logits);
            compare_borders(&at("typical-p"), Stage::TypicalP { p, min_keep }, &logits, &want);
            let want = theirs(llama::llama_sampler_init_top_n_sigma(3.0 * p), &[], &logits);
            compare_borders(&at("top-n-sigma"), Stage::TopNSigma { n: 3.0 * p }, &logits, &want);
            let want = theirs(llama::llama_sampler_init_xtc(1.0, 0.3 * p, keep, 0), &[], &logits);
            let stage = Stage::Xtc { probability: 1.0, threshold: 0.3 * p, min_keep };
            compare(&at("XTC"), &ours(stage, &[], &logits), &want);
            let want = theirs(llama::llama_sampler_init_temp_ext(0.1 + p, p, 0.5 + p), &[], &logits);
            let stage = Stage::Temperature { temperature: 0.1 + p, range: p, exponent: 0.5 + p };
            compare(&at("dynamic temperature"), &ours(stage, &[], &logits), &want);
        }
    }
}

#[test]
fn penalties_and_dry_give_the_same_logits() {
    let mut random = Random(2);
    for round in 0..300 {
        let n = 20;
        let logits = random.logits(n);
        let history: Vec<u32> = (0..random.below(80)).map(|_| random.below(2 + round % 18) as u32).collect();
        let last_n = random.below(100) as u32;
        let [repetition, frequency, presence] = std::array::from_fn(|_| 0.5 + random.uniform());
        let at = format!("round {round}, last_n {last_n}, history {history:?}");
        // SAFETY: constructors that take numbers; without breakers DRY reads no vocabulary.
        unsafe {
            let sampler = llama::llama_sampler_init_penalties(n as i32, last_n as i32, repetition, frequency, presence);
            let stage = Stage::Penalties { last_n, repetition, frequency, presence };
            compare(&at, &ours(stage, &history, &logits), &theirs(sampler, &history, &logits));

            let (multiplier, base, allowed_length) = (presence, 1.0 + frequency / 2.0, random.below(4) as u32);
            let sampler = llama::llama_sampler_init_dry(
                std::ptr::null(),
                multiplier,
                base,
                allowed_length as i32,
                last_n as i32,
                std::ptr::null_mut(),
                0,
            );
            let stage = Stage::Dry { multiplier, base, allowed_length, last_n };
            compare(&at, &ours(stage, &history, &logits), &theirs(sampler, &history, &logits));
        }
    }
}
