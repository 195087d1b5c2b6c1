use proptest::prelude::*;

use super::candidates::{logit, rank, token};
use super::*;
use crate::backend::{TOP, TOTAL_PARTS};

/// Every stage off.
fn plain() -> SamplerParams {
    SamplerParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        penalty_last_n: 0,
        seed: 1,
        ..Default::default()
    }
}

fn sampler(params: SamplerParams, n_vocab: usize) -> Sampler {
    Sampler::new(params, n_vocab).unwrap()
}

fn chain(stages: &[Stage], n_vocab: usize) -> Sampler {
    let mut sampler = Sampler::empty(n_vocab, 1).unwrap();
    stages.iter().for_each(|&stage| sampler.push(stage).unwrap());
    sampler
}

/// Roughly normal logits of standard deviation `scale`; rounded to multiples of 1/2 if `ties`.
fn random_logits(rng: &mut Xoshiro256pp, n: usize, scale: f64, ties: bool) -> Vec<f32> {
    (0..n)
        .map(|_| {
            let x = ((0..12).map(|_| rng.uniform()).sum::<f64>() - 6.0) * scale;
            (if ties { (x * 2.0).round() / 2.0 } else { x }) as f32
        })
        .collect()
}

type Left = Vec<(u32, f64)>;

fn sort(left: &mut Left) {
    left.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
}

/// What is left, in its order, as shares of the most probable.
fn weights(left: &Left) -> Vec<f64> {
    let max = left.iter().fold(f64::NEG_INFINITY, |a, c| a.max(c.1));
    left.iter().map(|c| (c.1 - max).exp()).collect()
}

fn softmax(left: &Left) -> Vec<f64> {
    let weights = weights(left);
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// How many of an order it takes until `enough(sum of weights, all weights)`, at least `min_keep`.
fn prefix(weights: &[f64], min_keep: u32, enough: impl Fn(f64, f64) -> bool) -> usize {
    let (mut sum, total) = (0.0, weights.iter().sum());
    let cut = weights.iter().enumerate().position(|(i, w)| {
        sum += w;
        enough(sum, total) && i + 1 >= min_keep as usize
    });
    cut.map_or(weights.len(), |i| i + 1)
}

/// The length of the longest run of tokens at the end of `text[..end]` that also ends `text`.
fn repetition(text: &[u32], end: usize) -> usize {
    text[..end].iter().rev().zip(text.iter().rev()).take_while(|(a, b)| a == b).count()
}

/// The penalty for each token that would continue a repetition, by DRY's definition.
fn dry_penalties(text: &[u32], breakers: &[Vec<u32>], multiplier: f64, base: f64, allowed: usize) -> Vec<(u32, f64)> {
    // Where the last breaker begins, and what the longest that begins there leaves.
    let limit = (0..text.len())
        .rev()
        .find_map(|i| {
            let longest = breakers.iter().filter(|b| text[i..].starts_with(b)).map(Vec::len).max()?;
            Some(text.len() - i - longest)
        })
        .unwrap_or(text.len());
    if text.len() <= allowed || limit < allowed {
        return Vec::new();
    }
    let mut longest = std::collections::BTreeMap::new();
    for end in 1..text.len() {
        let length = repetition(text, end).min(limit);
        if length >= allowed {
            let most = longest.entry(text[end]).or_insert(length);
            *most = length.max(*most);
        }
    }
    let penalized = longest.into_iter().filter(|&(t, _)| !breakers.contains(&vec![t]));
    penalized.map(|(t, length)| (t, multiplier * base.powi((length - allowed) as i32))).collect()
}

/// A stage by its definition. XTC with a probability of 0 or 1 only.
fn oracle_stage(left: &mut Left, stage: Stage, history: &[u32], breakers: &[Vec<u32>]) {
    let last = |n: u32| &history[history.len().saturating_sub(n as usize)..];
    sort(left);
    match stage {
        Stage::Penalties { last_n, repetition, frequency, presence } => {
            for c in left.iter_mut() {
                let count = last(last_n).iter().filter(|&&t| t == c.0).count() as f64;
                if count > 0.0 {
                    let r = f64::from(repetition);
                    c.1 = if c.1 <= 0.0 { c.1 * r } else { c.1 / r };
                    c.1 -= count * f64::from(frequency) + f64::from(presence);
                }
            }
        }
        Stage::Dry { multiplier, base, allowed_length, last_n } => {
            let text = last(last_n);
            for (t, penalty) in dry_penalties(text, breakers, multiplier.into(), base.into(), allowed_length as usize) {
                left.iter_mut().filter(|c| c.0 == t).for_each(|c| c.1 -= penalty);
            }
        }
        Stage::TopNSigma { n } if n > 0.0 => {
            let count = left.len() as f64;
            let mean = left.iter().map(|c| c.1).sum::<f64>() / count;
            let deviation = (left.iter().map(|c| (c.1 - mean).powi(2)).sum::<f64>() / count).sqrt();
            let max = left[0].1;
            left.retain(|c| c.1 >= max - f64::from(n) * deviation);
        }
        Stage::TopK { k } if k > 0 => left.truncate(k as usize),
        Stage::TypicalP { p, min_keep } if p < 1.0 => {
            let probabilities = softmax(left);
            let entropy: f64 = probabilities.iter().map(|p| if *p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
            let mut order: Vec<usize> = (0..left.len()).collect();
            order.sort_by(|&a, &b| {
                let score = |i: usize| (-probabilities[i].ln() - entropy).abs();
                score(a).partial_cmp(&score(b)).unwrap()
            });
            let ordered: Vec<f64> = order.iter().map(|&i| probabilities[i]).collect();
            let n = prefix(&ordered, min_keep, |sum, total| sum > f64::from(p) * total);
            *left = order[..n].iter().map(|&i| left[i]).collect();
        }
        Stage::TopP { p, min_keep } if p < 1.0 => {
            let n = prefix(&weights(left), min_keep, |sum, total| sum >= f64::from(p) * total);
            left.truncate(n);
        }
        Stage::MinP { p, min_keep } => {
            let max = left[0].1;
            let n = left.iter().take_while(|c| (c.1 - max).exp() >= f64::from(p)).count();
            left.truncate(n.max(min_keep as usize));
        }
        Stage::Xtc { probability: 1.0, threshold, min_keep } if threshold <= 0.5 => {
            let n = softmax(left).iter().take_while(|&&p| p >= f64::from(threshold)).count();
            if n >= 2 && left.len() - (n - 1) >= min_keep as usize {
                left.drain(..n - 1);
            }
        }
        Stage::Temperature { temperature, range, exponent } => {
            let mut t = f64::from(temperature);
            if range > 0.0 {
                if left.len() < 2 {
                    return;
                }
                let entropy: f64 = softmax(left).iter().map(|p| if *p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
                let (low, high) = ((t - f64::from(range)).max(0.0), t + f64::from(range));
                let share = (entropy / (left.len() as f64).ln()).min(1.0);
                t = low + (high - low) * share.powf(f64::from(exponent));
            }
            match t {
                0.0 => left.truncate(1),
                t => left.iter_mut().for_each(|c| c.1 /= t),
            }
        }
        _ => {}
    }
}

fn oracle(stages: &[Stage], history: &[u32], breakers: &[Vec<u32>], logits: &[f32]) -> Left {
    let mut left: Left = logits.iter().enumerate().map(|(id, &l)| (id as u32, f64::from(l))).collect();
    left.retain(|c| c.1 > f64::NEG_INFINITY);
    stages.iter().for_each(|&stage| oracle_stage(&mut left, stage, history, breakers));
    sort(&mut left);
    left
}

fn candidates(s: &mut Sampler, logits: &[f32]) -> Left {
    let mut left: Left = s.candidates(logits).unwrap().collect();
    sort(&mut left);
    left
}

/// Equal tokens, and logits within rounding to f32, which edits of them imply.
fn assert_same(found: &Left, want: &Left, at: &dyn std::fmt::Debug) {
    let tokens = |left: &Left| left.iter().map(|c| c.0).collect::<std::collections::BTreeSet<u32>>();
    assert_eq!(tokens(found), tokens(want), "{at:?}");
    let of = |left: &Left, t: u32| left.iter().find(|c| c.0 == t).unwrap().1;
    for &(t, l) in found {
        assert!((l - of(want, t)).abs() <= 1e-5 * l.abs().max(1.0), "{at:?}: token {t} has {l}, not {}", of(want, t));
    }
}

fn any_stage() -> impl Strategy<Value = Stage> {
    let keep = 0..4u32;
    prop_oneof![
        (0..30u32, 0.5..2.0f32, -1.0..1.0f32, -1.0..1.0f32).prop_map(|(last_n, repetition, frequency, presence)| {
            Stage::Penalties { last_n, repetition, frequency, presence }
        }),
        (0.0..2.0f32, 1.0..2.0f32, 0..4u32, 0..40u32).prop_map(|(multiplier, base, allowed_length, last_n)| {
            Stage::Dry { multiplier, base, allowed_length, last_n }
        }),
        (-0.5..3.0f32).prop_map(|n| Stage::TopNSigma { n }),
        (0..60u32).prop_map(|k| Stage::TopK { k }),
        (0.0..=1.0f32, keep.clone()).prop_map(|(p, min_keep)| Stage::TypicalP { p, min_keep }),
        (0.0..=1.0f32, keep.clone()).prop_map(|(p, min_keep)| Stage::TopP { p, min_keep }),
        (0.0..=1.0f32, keep.clone()).prop_map(|(p, min_keep)| Stage::MinP { p, min_keep }),
        (prop::bool::ANY, 0.0..0.6f32, keep).prop_map(|(on, threshold, min_keep)| Stage::Xtc {
            probability: f32::from(u8::from(on)),
            threshold,
            min_keep
        }),
        (prop_oneof![Just(0.0f32), 0.1..3.0f32], prop_oneof![Just(0.0f32), 0.0..2.0f32], 0.0..2.0f32).prop_map(
            |(temperature, range, exponent)| {
                // Where a dynamic temperature comes near 0 the oracle's entropy has no digits left.
                let temperature = if range > 0.0 { temperature + range + 0.05 } else { temperature };
                Stage::Temperature { temperature, range, exponent }
            }
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_chain_matches_the_oracle(
        stages in prop::collection::vec(any_stage(), 1..6),
        logits in prop::collection::vec(prop_oneof![9 => -8.0..8.0f32, 1 => Just(f32::NEG_INFINITY)], 1..80),
        history in prop::collection::vec(0..12u32, 0..60),
        breakers in prop::collection::vec(prop::collection::vec(0..12u32, 1..4), 0..3),
    ) {
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        let mut s = chain(&stages, logits.len());
        breakers.iter().for_each(|b| s.add_dry_breaker(b).unwrap());
        history.iter().for_each(|&t| s.accept(t).unwrap());
        let want = oracle(&stages, &history, &breakers, &logits);
        let found = candidates(&mut s, &logits);
        assert_same(&found, &want, &(&stages, &logits));
        // Again, after what the first time left in the scratch; and from a clone.
        prop_assert_eq!(&candidates(&mut s.clone(), &logits), &found);
        prop_assert_eq!(&candidates(&mut s, &logits), &found);
        let drawn = s.sample(&logits).unwrap();
        prop_assert!(found.iter().any(|c| c.0 == drawn));
    }
}

/// What a choice does not depend on is not collected: the choice is the same.
#[test]
fn the_choice_is_that_of_all_candidates() {
    let mut rng = Xoshiro256pp::new(3);
    let [top_p, min_p] = [Stage::TopP { p: 0.8, min_keep: 2 }, Stage::MinP { p: 0.1, min_keep: 40 }];
    let [sigma, top_k] = [Stage::TopNSigma { n: 1.0 }, Stage::TopK { k: 50 }];
    let [typical, xtc] =
        [Stage::TypicalP { p: 0.2, min_keep: 0 }, Stage::Xtc { probability: 1.0, threshold: 0.01, min_keep: 0 }];
    let cold = Stage::Temperature { temperature: 0.0, range: 0.0, exponent: 1.0 };
    let warm = Stage::Temperature { temperature: 0.0, range: 1.0, exponent: 1.0 };
    let penalties = Stage::Penalties { last_n: 3, repetition: 1.5, frequency: 0.0, presence: 0.0 };
    let mirostat = Stage::MirostatV2 { tau: 2.0, eta: 0.3 };
    // With the number of best candidates that the chain begins with.
    let cases: [(&[Stage], usize); 14] = [
        (&[Stage::Greedy], 1),
        (&[cold], 1),
        (&[cold, mirostat], 1),
        (&[sigma, top_k, top_p, min_p, cold], 1),
        (&[top_p, Stage::Greedy], 1),
        (&[penalties, min_p, Stage::Greedy], 1),
        (&[top_k], 50),
        (&[top_k, typical, xtc, cold], 50),
        (&[penalties, top_k, top_p, mirostat], 50),
        (&[top_k, warm], 50),
        (&[warm], 0),
        (&[top_p, typical, cold], 0),
        (&[xtc, Stage::Greedy], 0),
        (&[mirostat], 0),
    ];
    for (stages, k) in cases {
        let mut s = chain(stages, 3000);
        assert_eq!(s.leading_k(), k, "{stages:?}");
        for round in 0..30 {
            let logits = random_logits(&mut rng, 3000, 2.0, round % 2 == 0);
            let mut twin = s.clone();
            twin.candidates.fill((0..).zip(logits.iter().copied()), 0);
            assert_eq!(s.sample(&logits).unwrap(), twin.choose(0), "{stages:?}");
            assert_eq!((s.rng.uniform(), s.mu), (twin.rng.uniform(), twin.mu), "{stages:?}");
            if round > 20 {
                s.accept(round).unwrap(); // from now on penalties have something to look at
            }
        }
    }
    // What is reported is more than what is chosen among.
    let logits = random_logits(&mut rng, 3000, 2.0, false);
    for stages in [&[Stage::Greedy][..], &[top_p, Stage::Greedy]] {
        let all = chain(&stages[..stages.len() - 1], 3000).candidates(&logits).unwrap().count();
        assert_eq!(chain(stages, 3000).candidates(&logits).unwrap().count(), all, "{stages:?}");
    }
}

/// Many candidates: the selections of top-k and top-p.
#[test]
fn long_rows_match_the_oracle() {
    let mut rng = Xoshiro256pp::new(7);
    let cases: [&[Stage]; 9] = [
        &[Stage::TopK { k: 1 }],
        &[Stage::TopK { k: 40 }],
        &[Stage::TopK { k: 2000 }],
        &[Stage::TopK { k: u32::MAX }],
        &[Stage::TopP { p: 0.5, min_keep: 0 }],
        &[Stage::TopP { p: 0.99, min_keep: 300 }],
        &[Stage::MinP { p: 0.05, min_keep: 0 }, Stage::TopP { p: 0.9, min_keep: 0 }],
        &[Stage::MinP { p: 1.0, min_keep: 0 }],
        &[Stage::TopNSigma { n: 1.0 }, Stage::TopK { k: 100 }, Stage::TopP { p: 0.9, min_keep: 0 }],
    ];
    for stages in cases {
        for n in [1, 2, 3, 50, 1023, 1024, 1025, 5000] {
            for ties in [false, true] {
                for scale in [0.0, 0.5, 4.0] {
                    let logits = random_logits(&mut rng, n, scale, ties);
                    let found = candidates(&mut chain(stages, n), &logits);
                    assert_same(&found, &oracle(stages, &[], &[], &logits), &(stages, n, ties, scale));
                }
            }
        }
    }
}

/// Rising logits cut the candidates back as often as can be, falling ones never after the first time.
#[test]
fn top_k_of_sorted_logits() {
    for n in [3000, 4096] {
        let rising: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let falling: Vec<f32> = rising.iter().rev().copied().collect();
        for k in [1, 40, 511, 512, 513, 1500, 2999] {
            let mut s = chain(&[Stage::TopK { k }], n);
            let left =
                |s: &mut Sampler, logits: &[f32]| -> Vec<u32> { s.candidates(logits).unwrap().map(|c| c.0).collect() };
            assert!(left(&mut s, &rising).into_iter().eq((n as u32 - k..n as u32).rev()));
            assert!(left(&mut s, &falling).into_iter().eq(0..k));
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let mut rng = Xoshiro256pp::new(3);
    let temperature = |temperature| Stage::Temperature { temperature, range: 0.0, exponent: 1.0 };
    let cases: [&[Stage]; 3] = [
        &[],
        &[Stage::TopK { k: 10 }, temperature(0.5)],
        &[Stage::TopP { p: 0.9, min_keep: 0 }, Stage::MinP { p: 0.02, min_keep: 0 }, temperature(1.7)],
    ];
    for stages in cases {
        let logits = random_logits(&mut rng, 30, 1.0, false);
        let want = oracle(stages, &[], &[], &logits);
        let probabilities = softmax(&want);
        let mut s = chain(stages, 30);
        let draws = 200_000;
        let mut seen = [0u32; 30];
        for _ in 0..draws {
            seen[s.sample(&logits).unwrap() as usize] += 1;
        }
        let chi_square: f64 = std::iter::zip(&want, probabilities)
            .map(|(c, p)| {
                let expected = p * f64::from(draws);
                (f64::from(std::mem::take(&mut seen[c.0 as usize])) - expected).powi(2) / expected
            })
            .sum();
        assert_eq!(seen, [0; 30], "a token outside the candidates was drawn");
        // Mean plus four standard deviations of the chi-square distribution.
        let freedom = (want.len() - 1) as f64;
        assert!(chi_square < freedom + 4.0 * (2.0 * freedom).sqrt(), "{chi_square} with {freedom} degrees");
    }
}

#[test]
fn xtc_acts_as_often_as_it_should() {
    let mut s = chain(&[Stage::Xtc { probability: 0.3, threshold: 0.2, min_keep: 0 }], 4);
    let logits = [0.0, 0.0, 0.0, -1.0]; // the first two go if it acts
    let acted = (0..100_000).filter(|_| s.candidates(&logits).unwrap().count() == 2).count();
    assert!((acted as f64 - 30_000.0).abs() < 4.0 * (100_000.0f64 * 0.3 * 0.7).sqrt(), "{acted}");
}

#[test]
fn a_seed_fixes_the_sequence() {
    let mut rng = Xoshiro256pp::new(5);
    let params = SamplerParams {
        frequency_penalty: 0.3,
        temperature: 1.5,
        dry_multiplier: 0.8,
        xtc_probability: 0.5,
        top_n_sigma: 2.0,
        typical_p: 0.95,
        dynatemp_range: 0.5,
        ..Default::default()
    };
    let steps: Vec<Vec<f32>> = (0..50).map(|_| random_logits(&mut rng, 500, 1.0, false)).collect();
    let run = |s: &mut Sampler| -> Vec<u32> {
        steps
            .iter()
            .map(|logits| {
                let t = s.sample(logits).unwrap();
                s.accept(t).unwrap();
                t
            })
            .collect()
    };
    for params in [params, SamplerParams { mirostat: 2, ..params }] {
        let mut s = sampler(params, 500);
        let first = run(&mut s);
        let mut fork = s.clone();
        let second = run(&mut s);
        assert_eq!(run(&mut fork), second);
        assert_ne!(first, second);
        s.reset();
        assert_eq!(run(&mut s), first);
        assert_eq!(run(&mut sampler(params, 500)), first);
        assert_ne!(run(&mut sampler(SamplerParams { seed: 1, ..params }, 500)), first);
    }
}

/// Recorded once: a change here changes what every user's seed means.
#[test]
fn the_sequence_never_changes() {
    let logits: Vec<f32> = (0..100).map(|i| (i * 37 % 100) as f32 / 25.0).collect();
    let draw = |params| -> Vec<u32> {
        let mut s = sampler(params, 100);
        (0..8).map(|_| s.sample(&logits).unwrap()).collect()
    };
    assert_eq!(draw(plain()), [81, 75, 10, 75, 18, 58, 97, 53]);
    assert_eq!(draw(SamplerParams { seed: 42, ..Default::default() }), [21, 89, 45, 86, 94, 78, 81, 5]);
}

#[test]
fn penalties_by_hand() {
    let stage = Stage::Penalties { last_n: 4, repetition: 2.0, frequency: 0.25, presence: 0.5 };
    let mut s = chain(&[stage], 5);
    let mut after = |accepted: &[u32]| -> Vec<f64> {
        accepted.iter().for_each(|&t| s.accept(t).unwrap());
        s.candidates(&[3.0, -3.0, 0.0, 1.0, 1.0]).unwrap().map(|c| c.1).collect()
    };
    assert_eq!(after(&[]), [3.0, -3.0, 0.0, 1.0, 1.0]);
    assert_eq!(after(&[0, 1, 1]), [1.5 - 0.75, -6.0 - 1.0, 0.0, 1.0, 1.0]);
    assert_eq!(after(&[2, 2]), [3.0, -6.0 - 1.0, -1.0, 1.0, 1.0], "token 0 left the window");
    assert_eq!(after(&[3, 3, 3, 3]), [3.0, -3.0, 0.0, 0.5 - 1.5, 1.0]);
    assert_eq!(after(&[u32::MAX, 9, 9]), [3.0, -3.0, 0.0, 0.5 - 0.75, 1.0], "unknown tokens fill the window");
    s.reset();
    assert!(s.candidates(&[1.0; 5]).unwrap().all(|c| c.1 == 1.0));
}

#[test]
fn dry_by_hand() {
    let stage = Stage::Dry { multiplier: 1.0, base: 2.0, allowed_length: 2, last_n: 100 };
    let mut s = chain(&[stage], 8);
    let mut after = |accepted: &[u32]| -> Vec<f64> {
        s.reset();
        accepted.iter().for_each(|&t| s.accept(t).unwrap());
        s.candidates(&[0.0; 8]).unwrap().map(|c| c.1).collect()
    };
    // "1 2 3" again would be continued by 4: 1 * 2^(3 - 2). After "2 3" alone 5 would follow, 2^0.
    assert_eq!(after(&[1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3]), [0.0, 0.0, 0.0, 0.0, -2.0, -1.0, 0.0, 0.0]);
    assert_eq!(after(&[1, 2, 3, 4, 0, 3]), [0.0; 8], "a repetition of one token is allowed");
    s.add_dry_breaker(&[2]).unwrap();
    let mut after = |accepted: &[u32]| -> Vec<f64> {
        s.reset();
        accepted.iter().for_each(|&t| s.accept(t).unwrap());
        s.candidates(&[0.0; 8]).unwrap().map(|c| c.1).collect()
    };
    assert_eq!(after(&[1, 2, 3, 4, 7, 1, 2, 3]), [0.0; 8], "the repetition since the breaker is short");
    assert_eq!(after(&[3, 4, 2, 3, 4]), [0.0; 8], "a breaker is not penalized");
    assert_eq!(after(&[3, 4, 5, 3, 4]), [0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0]);
}

#[test]
fn stages_by_hand() {
    let tokens = |stage: Stage, logits: &[f32]| -> Vec<u32> {
        let mut left: Vec<u32> = chain(&[stage], logits.len()).candidates(logits).unwrap().map(|c| c.0).collect();
        left.sort_unstable();
        left
    };
    // Probabilities 0.5, 0.3, 0.15, 0.05.
    let logits = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
    assert_eq!(tokens(Stage::TopP { p: 0.75, min_keep: 0 }, &logits), [0, 1]);
    assert_eq!(tokens(Stage::TopP { p: 0.1, min_keep: 3 }, &logits), [0, 1, 2]);
    assert_eq!(tokens(Stage::MinP { p: 0.2, min_keep: 0 }, &logits), [0, 1, 2]);
    // Surprises 0.69, 1.20, 1.90, 3.00; their mean is 1.14.
    assert_eq!(tokens(Stage::TypicalP { p: 0.2, min_keep: 0 }, &logits), [1]);
    assert_eq!(tokens(Stage::TypicalP { p: 0.4, min_keep: 0 }, &logits), [0, 1]);
    assert_eq!(tokens(Stage::Xtc { probability: 1.0, threshold: 0.1, min_keep: 0 }, &logits), [2, 3]);
    assert_eq!(tokens(Stage::Xtc { probability: 1.0, threshold: 0.1, min_keep: 3 }, &logits), [0, 1, 2, 3]);
    assert_eq!(tokens(Stage::Xtc { probability: 1.0, threshold: 0.4, min_keep: 0 }, &logits), [0, 1, 2, 3]);
    // Mean 2, deviation 2.
    assert_eq!(tokens(Stage::TopNSigma { n: 1.0 }, &[4.0, 4.0, 0.0, 0.0]), [0, 1]);
    assert_eq!(tokens(Stage::TopNSigma { n: 2.0 }, &[4.0, 4.0, 0.0, 0.0]), [0, 1, 2, 3]);
    // Equal logits have the largest entropy: the highest temperature. A sure one has none: the lowest.
    let heat = Stage::Temperature { temperature: 1.5, range: 0.5, exponent: 1.0 };
    let heated: Vec<f64> = chain(&[heat], 2).candidates(&[2.0, 2.0]).unwrap().map(|c| c.1).collect();
    assert!(heated.iter().all(|&l| (l - 1.0).abs() < 1e-15), "{heated:?}");
    let heated: Vec<f64> = chain(&[heat], 2).candidates(&[900.0, 0.0]).unwrap().map(|c| c.1).collect();
    assert!((heated[0] - 900.0).abs() < 1e-9, "{heated:?}");
}

/// Mirostat 2.0 step by step, from its definition in the paper's algorithm 2.
#[test]
fn mirostat_follows_its_rule() {
    let mut rng = Xoshiro256pp::new(4);
    let (tau, eta) = (3.0, 0.2);
    let mut s = chain(&[Stage::MirostatV2 { tau: tau as f32, eta: eta as f32 }], 200);
    let eta = f64::from(eta as f32);
    let (mut mu, mut surprises) = (2.0 * tau, 0.0);
    for step in 0..3000 {
        let logits = random_logits(&mut rng, 200, 2.0, false);
        let chosen = s.sample(&logits).unwrap();
        let mut left = oracle(&[], &[], &[], &logits);
        let n = softmax(&left).iter().take_while(|p| -p.log2() <= mu).count().max(1);
        left.truncate(n);
        let at = left.iter().position(|c| c.0 == chosen).unwrap_or_else(|| panic!("step {step}"));
        let surprise = -softmax(&left)[at].log2();
        mu -= eta * (surprise - tau);
        assert!((mu - s.mu).abs() < 1e-6, "step {step}: {mu} {}", s.mu);
        surprises += surprise;
    }
    assert!((surprises / 3000.0 - tau).abs() < 0.05, "{}", surprises / 3000.0);
}

#[test]
fn bias_comes_before_the_stages() {
    let mut s = sampler(SamplerParams { top_k: 1, ..plain() }, 4);
    s.add_logit_bias([(3, 1.0), (0, f32::NEG_INFINITY), (3, 1.5)].into_iter()).unwrap();
    assert_eq!(s.candidates(&[9.0, 1.0, 2.0, 0.0]).unwrap().collect::<Left>(), [(3, 2.5)]);
    assert_eq!(s.candidates(&[9.0, 1.0, 2.0, -1.0]).unwrap().collect::<Left>(), [(2, 2.0)]);
    assert_eq!(s.candidates(&[f32::INFINITY, 1.0, -2.0, -9.0]).unwrap().collect::<Left>(), [(1, 1.0)]);
    for (bias, start) in [
        ((4, 0.0), "token is 4, expected 0 to 3"),
        ((-1, 0.0), "token is -1, "),
        ((1, f32::NAN), "the logit bias of token 1 is NaN"),
        ((1, f32::INFINITY), "the logit bias of token 1 is inf"),
    ] {
        let message = s.add_logit_bias([(1, 50.0), bias].into_iter()).unwrap_err().to_string();
        assert!(message.starts_with(start), "{message}");
    }
    assert_eq!(s.candidates(&[9.0, 1.0, 2.0, 0.0]).unwrap().collect::<Left>(), [(3, 2.5)], "nothing was changed");
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let greedy = sampler(SamplerParams { temperature: 0.0, top_p: 0.1, min_p: 0.9, ..plain() }, 4);
    for mut s in [greedy, chain(&[Stage::Greedy], 4)] {
        let rng = s.rng.0;
        assert_eq!(s.sample(&[1.0, 2.0, 2.0, f32::NAN]).unwrap(), 1);
        assert_eq!(s.sample(&[-0.0, 0.0, -1.0, 0.0]).unwrap(), 0);
        assert_eq!(s.sample(&[f32::NEG_INFINITY, -f32::MAX, f32::NAN, -f32::MAX]).unwrap(), 1);
        assert_eq!(s.sample(&[1.0, f32::MAX, f32::INFINITY, f32::INFINITY]).unwrap(), 1);
        assert_eq!(s.rng.0, rng, "greedy sampling draws nothing");
    }
}

#[test]
fn extreme_values() {
    let wild = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, 1e-45, -88.0, 3.0];
    let mut rng = Xoshiro256pp::new(11);
    let choose = |rng: &mut Xoshiro256pp, values: &[f32]| values[(rng.next() % values.len() as u64) as usize];
    for _ in 0..20_000 {
        let share = |rng: &mut Xoshiro256pp| choose(rng, &[0.0, 1e-45, 0.5, 1.0]);
        let any = |rng: &mut Xoshiro256pp| choose(rng, &[0.0, f32::MIN, f32::MAX, -1.0]);
        let scale = |rng: &mut Xoshiro256pp| choose(rng, &[0.0, f32::MIN_POSITIVE, 1e-45, 1.0, f32::MAX]);
        let count = |rng: &mut Xoshiro256pp| choose(rng, &[0.0, 1.0, 2.0, 1e9]) as u32;
        let r = &mut rng;
        let params = SamplerParams {
            temperature: scale(r),
            dynatemp_range: scale(r),
            dynatemp_exponent: scale(r),
            top_k: count(r),
            top_p: share(r),
            min_p: share(r),
            typical_p: share(r),
            top_n_sigma: any(r),
            xtc_probability: share(r),
            xtc_threshold: share(r),
            repetition_penalty: choose(r, &[1e-45, 1.0, f32::MAX]),
            frequency_penalty: any(r),
            presence_penalty: any(r),
            penalty_last_n: choose(r, &[0.0, 1.0, 3.0]) as u32,
            dry_multiplier: scale(r),
            dry_base: choose(r, &[1.0, 2.0, f32::MAX]),
            dry_allowed_length: choose(r, &[0.0, 1.0, 1e9]) as u32,
            dry_penalty_last_n: choose(r, &[0.0, 1.0, 9.0]) as u32,
            mirostat: choose(r, &[0.0, 2.0]) as u32,
            mirostat_tau: choose(r, &[1e-45, 1.0, f32::MAX]),
            mirostat_eta: scale(r),
            min_keep: count(r),
            seed: r.next(),
        };
        let n = 1 + (rng.next() % 6) as usize;
        let mut s = sampler(params, n);
        // Every order of stages is a good one.
        if rng.next().is_multiple_of(2) {
            s = Sampler::empty(n, 0).unwrap();
            for _ in 0..6 {
                let kind = StageKind::ALL[(rng.next() % 9) as usize];
                s.push(params.stage(kind)).unwrap();
            }
        }
        for _ in 0..4 {
            s.accept((rng.next() % 4) as u32).unwrap();
        }
        let usable = |l: f32| !l.is_nan() && l != f32::NEG_INFINITY;
        for _ in 0..3 {
            let logits: Vec<f32> = (0..n).map(|_| choose(&mut rng, &wild)).collect();
            let before = s.rng.0;
            match s.sample(&logits) {
                Ok(t) => assert!(usable(logits[t as usize]), "{t} of {logits:?} with {params:?}"),
                Err(e) => {
                    assert!(!logits.iter().any(|&l| usable(l)), "{e}: {logits:?}");
                    assert_eq!(s.rng.0, before);
                }
            }
        }
    }
}

#[test]
fn refusals_name_the_field() {
    let p = plain();
    let bad = [
        ("temperature is -1, ", SamplerParams { temperature: -1.0, ..p }),
        ("temperature is NaN, ", SamplerParams { temperature: f32::NAN, ..p }),
        ("temperature is inf, ", SamplerParams { temperature: f32::INFINITY, ..p }),
        ("dynatemp_range is -1, ", SamplerParams { dynatemp_range: -1.0, ..p }),
        ("dynatemp_exponent is NaN, ", SamplerParams { dynatemp_exponent: f32::NAN, ..p }),
        ("top_p is 1.5, ", SamplerParams { top_p: 1.5, ..p }),
        ("min_p is -0.5, ", SamplerParams { min_p: -0.5, ..p }),
        ("typical_p is NaN, ", SamplerParams { typical_p: f32::NAN, ..p }),
        ("top_n_sigma is inf, ", SamplerParams { top_n_sigma: f32::INFINITY, ..p }),
        ("xtc_probability is 2, ", SamplerParams { xtc_probability: 2.0, ..p }),
        ("xtc_threshold is -1, ", SamplerParams { xtc_threshold: -1.0, ..p }),
        ("repetition_penalty is 0, ", SamplerParams { repetition_penalty: 0.0, ..p }),
        ("frequency_penalty is NaN, ", SamplerParams { frequency_penalty: f32::NAN, ..p }),
        ("presence_penalty is -inf, ", SamplerParams { presence_penalty: f32::NEG_INFINITY, ..p }),
        ("penalty_last_n is 4294967295, ", SamplerParams { penalty_last_n: u32::MAX, ..p }),
        ("dry_multiplier is -1, ", SamplerParams { dry_multiplier: -1.0, ..p }),
        ("dry_base is 0.5, ", SamplerParams { dry_base: 0.5, ..p }),
        ("dry_penalty_last_n is 4294967295, ", SamplerParams { dry_penalty_last_n: u32::MAX, ..p }),
        ("mirostat is 1, ", SamplerParams { mirostat: 1, ..p }),
        ("mirostat_tau is 0, ", SamplerParams { mirostat_tau: 0.0, ..p }),
        ("mirostat_eta is -1, ", SamplerParams { mirostat_eta: -1.0, ..p }),
    ];
    for (start, params) in bad {
        let message = Sampler::new(params, 10).unwrap_err().to_string();
        assert!(message.starts_with(start), "{message}");
    }
    SamplerParams::default().validate().unwrap();
    assert!(Sampler::new(p, 0).unwrap_err().to_string().starts_with("n_vocab is 0, "));

    let mut s = chain(&[Stage::Draw], 3);
    let message = s.push(Stage::TopK { k: 1 }).unwrap_err().to_string();
    assert!(message.starts_with("the chain has ended with Draw"), "{message}");
    let mut s = chain(&[Stage::TopK { k: 1 }; MAX_STAGES], 3);
    assert!(s.push(Stage::Draw).unwrap_err().to_string().starts_with("the chain has 64 stages"));
    assert!(s.add_dry_breaker(&[]).unwrap_err().to_string().starts_with("the sequence breaker has no tokens"));
    assert!(s.add_dry_breaker(&[1; 22]).unwrap_err().to_string().starts_with("the sequence breaker has 22 tokens"));

    let mut s = sampler(p, 3);
    assert!(s.sample(&[0.0; 2]).unwrap_err().to_string().starts_with("logits has 2 elements, expected n_vocab = 3"));
    for nothing in [f32::NAN, f32::NEG_INFINITY] {
        assert!(s.sample(&[nothing; 3]).unwrap_err().to_string().starts_with("logits has no finite element"));
    }
    assert!(s.sample(&[0.0; 3]).is_ok(), "a refusal leaves the sampler usable");
}

#[test]
fn names_lead_back_to_stages() {
    for kind in StageKind::ALL {
        assert_eq!(StageKind::from_name(kind.name()), Some(kind));
    }
    assert_eq!(StageKind::from_name("top_q"), None);
}

#[test]
fn ranks_order_and_decode() {
    let logits = [f32::MAX, 2.0, 1e-45, 0.0, -1e-45, -2.0, f32::MIN];
    for pair in logits.windows(2) {
        assert!(rank(pair[0], 9) < rank(pair[1], 1));
    }
    for l in logits {
        assert!(rank(l, 3) < rank(l, 4));
        assert_eq!((logit(rank(l, u32::MAX)), token(rank(l, u32::MAX))), (f64::from(l), u32::MAX));
    }
    assert!(rank(-0.0, 1) < rank(0.0, 2));
}

/// The best tokens of a row, as a device finds them, and a sum that is off by `error`.
fn best_of(logits: &[f32], error: f64) -> (Vec<u32>, Vec<f32>, f64) {
    let mut ranks: Vec<u64> = (0..logits.len()).map(|t| rank(logits[t], t as u32)).collect();
    ranks.sort_unstable();
    ranks.truncate(TOP);
    let tokens: Vec<u32> = ranks.iter().map(|&r| token(r)).collect();
    let max = f64::from(logits[tokens[0] as usize]);
    let total: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    let values = tokens.iter().map(|&t| logits[t as usize]).collect();
    (tokens, values, total * (1.0 + error / TOTAL_PARTS))
}

/// How often the best tokens told the choice, in `draws` draws by chains of these stages, which are then the choices by all logits.
fn told_by_the_best(stages: &[Stage], rng: &mut Xoshiro256pp, draws: usize) -> usize {
    let mut told = 0;
    for round in 0..draws {
        let n = [1, 40, 63, 64, 65, 500, 3000][rng.next() as usize % 7];
        let scale = [0.3, 2.0, 6.0][rng.next() as usize % 3];
        let logits = random_logits(rng, n, scale, round % 3 == 0);
        let mut one = chain(stages, n);
        for _ in 0..rng.next() % 50 {
            // Many of them are among the best.
            let best = (0..n as u32).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])).unwrap();
            let any = rng.next() as u32 % n as u32;
            one.accept([any, best][rng.next() as usize % 2]).unwrap();
        }
        let mut twin = one.clone();
        let (tokens, values, total) = best_of(&logits, rng.uniform() * 1.99 - 0.995);
        for _ in 0..3 {
            let found = one.sample_top(&Top { tokens: &tokens, logits: &values, total });
            told += usize::from(found.is_some());
            let found = found.unwrap_or_else(|| one.sample(&logits).unwrap());
            assert_eq!(found, twin.sample(&logits).unwrap(), "{n} tokens, {scale}, {stages:?}");
            assert!(one.rng.0 == twin.rng.0 && one.mu == twin.mu, "{stages:?}");
        }
    }
    told
}

#[test]
fn the_best_tokens_tell_what_all_would() {
    let mut rng = Xoshiro256pp::new(7);
    let heat = |temperature| Stage::Temperature { temperature, range: 0.0, exponent: 1.0 };
    let penalties = Stage::Penalties { last_n: 32, repetition: 1.3, frequency: 0.2, presence: 0.1 };
    let raising = Stage::Penalties { last_n: 32, repetition: 0.8, frequency: 0.0, presence: -0.5 };
    let (top_k, top_p, min_p) =
        (Stage::TopK { k: 20 }, Stage::TopP { p: 0.7, min_keep: 3 }, Stage::MinP { p: 0.3, min_keep: 2 });
    // Chains, and whether the best tokens tell more often than where they are all.
    for (stages, most) in [
        (vec![top_p], true),
        (vec![top_p, heat(0.7), top_k], true),
        (vec![min_p, heat(1.5)], true),
        (vec![min_p, top_p], true),
        (vec![heat(0.5), min_p], true),
        (vec![heat(0.5), top_k, top_p], true),
        (vec![penalties, top_k], true),
        (vec![penalties, min_p], true),
        (vec![penalties, Stage::Greedy], true),
        (vec![penalties, heat(0.0)], true),
        (vec![penalties, penalties, top_k, Stage::MirostatV2 { tau: 2.0, eta: 0.1 }], true),
        (vec![top_p, Stage::Xtc { probability: 0.5, threshold: 0.1, min_keep: 1 }], true),
        (vec![raising, top_k], false),
        (vec![heat(0.5), penalties, top_k], false),
        (vec![heat(0.5), top_p], false),
        (vec![penalties, top_p], false),
        (vec![Stage::TypicalP { p: 0.5, min_keep: 1 }, top_k], false),
        (vec![Stage::TopK { k: 100 }], false),
        (vec![heat(0.9)], false),
        (vec![], false),
    ] {
        let told = told_by_the_best(&stages, &mut rng, 300);
        // They are all in three vocabularies of seven.
        assert_eq!(told > 900 * 9 / 14, most, "{told} of 900 by {stages:?}");
    }
    // In any order.
    let all = [penalties, raising, top_k, top_p, min_p, heat(0.8), heat(2.0), Stage::TopNSigma { n: 1.5 }];
    for _ in 0..300 {
        let stages: Vec<Stage> = (0..rng.next() % 5).map(|_| all[rng.next() as usize % all.len()]).collect();
        told_by_the_best(&stages, &mut rng, 10);
    }
    // Where top-p ends within the error of the sum, they do not tell: 32 of 128 equal tokens hold a fourth exactly.
    let logits = vec![0.5; 128];
    for (p, is_told) in [(0.25, false), (0.246, true)] {
        for error in [-0.9, 0.9] {
            let mut one = chain(&[Stage::TopP { p, min_keep: 0 }], 128);
            let mut twin = one.clone();
            let (tokens, values, total) = best_of(&logits, error);
            for _ in 0..50 {
                let found = one.sample_top(&Top { tokens: &tokens, logits: &values, total });
                assert_eq!(found.is_some(), is_told, "{p} {error}");
                let found = found.unwrap_or_else(|| one.sample(&logits).unwrap());
                assert_eq!(found, twin.sample(&logits).unwrap());
            }
        }
    }
    // A bias or a constraint is about all tokens.
    let mut biased = chain(&[top_k], 3);
    biased.add_logit_bias([(1, 0.5)].into_iter()).unwrap();
    assert_eq!(biased.sample_top(&Top { tokens: &[0], logits: &[1.0], total: 1.0 }), None);
}
