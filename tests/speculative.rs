//! Speculative decoding: the same tokens as without, to the bit, whatever is drafted; and what it costs.

#[path = "common/allocations.rs"]
mod allocations;
mod common;

use std::sync::{Arc, Mutex};

use allocations::COUNT;
use common::{Golden, demo_model, golden, load, on_cuda};
use phd::model::{BackendKind, Model};
use phd::sampling::constraint::Constraint;
use phd::sampling::{Sampler, SamplerParams};
use phd::session::{BatchEntry, CacheType, Logits, Policy, Session, SessionOptions, WhenFull};
use phd::speculative::{DraftModel, Drafter, PromptLookup, Speculator, SpeculatorStats, Text};
use phd::{Error, Result};

fn options(n_positions: usize, n_draft: usize) -> SessionOptions {
    // To the bit, on a GPU too.
    SessionOptions { n_positions, n_draft, n_threads: 1, batch_invariant: on_cuda(), ..Default::default() }
}

fn session(model: &Arc<Model>, n_positions: usize, n_draft: usize) -> Session {
    Session::new(model.clone(), &options(n_positions, n_draft)).unwrap()
}

/// The model's own vocabulary with one copy, or, for Sequential Hidden Decoding, whose copies are fixed, the model itself.
fn draft_model(model: &Arc<Model>) -> Arc<Model> {
    model.with_rules((1, 0, 0)).map_or_else(|_| model.clone(), Arc::new)
}

fn samplers(n_vocab: usize) -> [Sampler; 2] {
    let greedy = SamplerParams { temperature: 0.0, ..Default::default() };
    let seeded = SamplerParams {
        seed: 5,
        temperature: 0.9,
        repetition_penalty: 1.2,
        xtc_probability: 0.3,
        dry_multiplier: 0.5,
        ..Default::default()
    };
    [greedy, seeded].map(|params| Sampler::new(params, n_vocab).unwrap())
}

/// Tokens and the bits of the logits after each, of a loop without drafts. The last entry may be without logits: no room for it.
fn plain(session: &mut Session, prompt: &[i32], sampler: &mut Sampler, n: usize) -> Vec<(i32, Vec<f32>)> {
    session.truncate(0, 0).unwrap();
    session.prefill(0, prompt).unwrap();
    let mut text = Vec::new();
    while text.len() < n {
        let token = sampler.sample(session.logits(0).unwrap()).unwrap();
        sampler.accept(token).unwrap();
        match session.step(0, token as i32) {
            Ok(()) => text.push((token as i32, session.logits(0).unwrap().to_vec())),
            Err(Error::CacheFull { .. }) => {
                text.push((token as i32, Vec::new()));
                break;
            }
            Err(e) => panic!("{e}"),
        }
    }
    text
}

/// The same with drafts, checking tokens and logits step by step.
fn check(
    session: &mut Session,
    prompt: &[i32],
    mut sampler: Sampler,
    speculator: &mut Speculator,
    expected: &[(i32, Vec<f32>)],
    what: &str,
) {
    session.truncate(0, 0).unwrap();
    session.prefill(0, prompt).unwrap();
    let first = sampler.sample(session.logits(0).unwrap()).unwrap();
    sampler.accept(first).unwrap();
    let mut text = vec![first as i32];
    while text.len() < expected.len() {
        let most = speculator.n_draft() + 1;
        let tokens = speculator.step(session, 0, *text.last().unwrap(), &mut sampler).unwrap();
        assert!((1..=most).contains(&tokens.len()));
        text.extend_from_slice(tokens);
        let n = text.len() - 1;
        assert_eq!(session.len(0).unwrap(), prompt.len() + n, "{what}: all but the last token");
        if n <= expected.len() {
            assert!(session.logits(0).unwrap() == expected[n - 1].1, "{what}: logits after {n} tokens");
        }
    }
    let common = text.iter().zip(expected).take_while(|(a, (b, _))| *a == b).count();
    assert_eq!(common, expected.len(), "{what}: token {common} of {text:?}");
    let held: Vec<u32> = session.tokens(0).unwrap().collect();
    let all = prompt.iter().chain(&text).map(|&t| t as u32);
    assert!(held.iter().copied().eq(all.take(held.len())), "{what}: the session's text");
    session.audit().unwrap();
}

/// Knows the text and drafts a part of it, with wrong tokens in between; or nothing but wrong tokens.
#[derive(Clone)]
struct Oracle {
    n_prompt: usize,
    text: Vec<i32>,
    n_vocab: i32,
    /// Every so many drafts are right; 0: none is.
    right: usize,
}

impl Drafter for Oracle {
    fn draft(&mut self, text: &Text, n: usize, drafts: &mut Vec<i32>) -> Result<()> {
        let at = text.len() - self.n_prompt;
        assert_eq!(text.token(text.len() - 1), self.text[at - 1]);
        for i in 0..n {
            let next = self.text.get(at + i).copied().unwrap_or(0);
            let is_right = self.right > 0 && !(at + i).is_multiple_of(self.right + 1);
            drafts.push(if is_right { next } else { (next + 1) % self.n_vocab });
        }
        // More than was asked for is not used.
        drafts.push(0);
        Ok(())
    }
}

fn lookup() -> PromptLookup {
    PromptLookup::new(1, 4).unwrap()
}

fn with_draft_model(model: &Arc<Model>, n_positions: usize, n_draft: usize, p_min: f32) -> DraftModel {
    DraftModel::new(model, session(&draft_model(model), n_positions, n_draft), p_min).unwrap()
}

fn each(test: impl Fn(&Golden, &Arc<Model>)) {
    for g in golden() {
        for backend in [BackendKind::Reference, BackendKind::Cpu] {
            test(&g, &load(&g.path, backend));
        }
    }
}

/// Every checkpoint, every number of drafts, every drafter, greedy and with a seed.
#[test]
fn text_and_logits_are_the_same_with_and_without() {
    const N: usize = 24;
    each(|g, model| {
        // Repeats itself, for the lookup.
        let prompt = [&g.tokens[..20], &g.tokens[5..18]].concat();
        let n_positions = prompt.len() + N + 16;
        let mut alone = session(model, n_positions, 0);
        let n_vocab = model.desc().n_vocab;
        for (which, sampler) in samplers(n_vocab).into_iter().enumerate() {
            let expected = plain(&mut alone, &prompt, &mut sampler.clone(), N);
            let oracle = Oracle {
                n_prompt: prompt.len(),
                text: expected.iter().map(|(t, _)| *t).collect(),
                n_vocab: n_vocab as i32,
                right: 0,
            };
            for d in 1..=8 {
                // The reference is slow.
                if model.backend_name().contains("reference") && ![1, 4, 7].contains(&d) {
                    continue;
                }
                let mut s = session(model, n_positions, d);
                let mut run = |drafter: &str, mut speculator: Speculator| -> SpeculatorStats {
                    let what = format!("{} {} sampler {which}, {d} drafts by {drafter}", g.name, model.backend_name());
                    check(&mut s, &prompt, sampler.clone(), &mut speculator, &expected, &what);
                    speculator.stats()
                };
                run("lookup", Speculator::new(lookup(), d).unwrap());
                run("a model", Speculator::new(with_draft_model(model, n_positions, d, 0.0), d).unwrap());
                run("a careful model", Speculator::new(with_draft_model(model, n_positions, d, 0.5), d).unwrap());
                let wrong = run("an adversary", Speculator::new(oracle.clone(), d).unwrap());
                assert_eq!((wrong.steps, wrong.accepted), (N as u64 - 1, 0), "{}", g.name);
                let half = run("luck", Speculator::new(Oracle { right: 2, ..oracle.clone() }, d).unwrap());
                // Two at a time are always the right ones.
                assert!(half.accepted > 0 && (half.accepted < half.drafted || d == 2), "{}: {half:?}", g.name);
                let right = run("an oracle", Speculator::new(Oracle { right: 999, ..oracle.clone() }, d).unwrap());
                assert_eq!(right.steps, (N as u64 - 1).div_ceil(d as u64 + 1), "{}", g.name);
            }
        }
    });
}

#[test]
fn the_demo_model_says_the_same() {
    let model = load(&demo_model(), BackendKind::Cpu);
    let tokenizer = model.tokenizer().unwrap();
    let prompt: Vec<i32> = tokenizer
        .encode(b"To be, or not to be. Thus spake the king, and thus spake the", true, true)
        .unwrap()
        .into_iter()
        .map(|t| t as i32)
        .collect();
    let n_positions = prompt.len() + 80;
    for (which, sampler) in samplers(model.desc().n_vocab).into_iter().enumerate() {
        let expected = plain(&mut session(&model, n_positions, 0), &prompt, &mut sampler.clone(), 60);
        let mut accepted = 0;
        for d in 1..=8 {
            for by_model in [false, true] {
                let mut speculator = match by_model {
                    false => Speculator::new(lookup(), d).unwrap(),
                    true => Speculator::new(with_draft_model(&model, n_positions, d, 0.0), d).unwrap(),
                };
                let what = format!("sampler {which}, {d} drafts, by a model: {by_model}");
                let mut s = session(&model, n_positions, d);
                check(&mut s, &prompt, sampler.clone(), &mut speculator, &expected, &what);
                accepted += speculator.stats().accepted;
            }
        }
        assert!(accepted > 50, "sampler {which}: {accepted} drafts were right");
    }
}

/// `(1 + d) K` rows a step in every layer, whether or not drafts are right: nothing is computed anew after a rollback.
#[test]
fn a_step_computes_its_rows_and_no_more() {
    each(|g, model| {
        let desc = model.desc();
        let prompt = &g.tokens[..30];
        let mut alone = session(model, 80, 0);
        let sampler = samplers(desc.n_vocab)[0].clone();
        let expected = plain(&mut alone, prompt, &mut sampler.clone(), 40);
        let text: Vec<i32> = expected.iter().map(|(t, _)| *t).collect();
        for right in [0, 1, 3] {
            for d in [1, 4, 8] {
                let mut s = session(model, 80, d);
                s.prefill(0, prompt).unwrap();
                let oracle = Oracle { n_prompt: prompt.len(), text: text.clone(), n_vocab: desc.n_vocab as i32, right };
                let mut speculator = Speculator::new(oracle, d).unwrap();
                let mut sampler = sampler.clone();
                let mut n = 1;
                while n < 30 {
                    let before = s.stats().snapshot();
                    n += speculator.step(&mut s, 0, text[n - 1], &mut sampler).unwrap().len();
                    let after = s.stats().snapshot();
                    let rows = ((1 + d) * desc.rules.copies * desc.n_layers) as u64;
                    assert_eq!(after.rows - before.rows, rows, "{}: {d} drafts, {n} tokens", g.name);
                    assert_eq!(after.passes - before.passes, 1, "{}", g.name);
                }
            }
        }
    });
}

/// At the end of the cache drafts become fewer, and the last position is used as without.
#[test]
fn the_end_of_the_cache() {
    each(|g, model| {
        let desc = model.desc();
        let prompt = &g.tokens[..25];
        for n_positions in [26, 27, 33, 40] {
            let sampler = samplers(desc.n_vocab)[1].clone();
            let expected = plain(&mut session(model, n_positions, 0), prompt, &mut sampler.clone(), 100);
            assert_eq!(expected.len(), n_positions - prompt.len() + 1);
            let text: Vec<i32> = expected.iter().map(|(t, _)| *t).collect();
            for right in [0, 2, 999] {
                let oracle = Oracle { n_prompt: prompt.len(), text: text.clone(), n_vocab: desc.n_vocab as i32, right };
                let mut s = session(model, n_positions, 5);
                let mut speculator = Speculator::new(oracle, 5).unwrap();
                let what = format!("{} {n_positions} positions", g.name);
                check(&mut s, prompt, sampler.clone(), &mut speculator, &expected, &what);
                assert_eq!(s.len(0).unwrap(), n_positions);
                let (mut sampler, last) = (sampler.clone(), *text.last().unwrap());
                let full = speculator.step(&mut s, 0, last, &mut sampler).map(drop);
                assert!(matches!(full, Err(Error::CacheFull { needed: 1, free: 0 })), "{what}");
                assert!(s.logits(0).is_ok(), "{what}");
            }
            // A draft model with less room drafts while it can.
            let mut small = Speculator::new(with_draft_model(model, 28, 5, 0.0), 5).unwrap();
            check(&mut session(model, n_positions, 5), prompt, sampler, &mut small, &expected, &g.name);
        }
    });
}

/// A policy drops the same positions at the same time.
#[test]
fn dropping_the_middle() {
    each(|g, model| {
        let desc = model.desc();
        let (prompt, n) = (&g.tokens[..30], 150);
        let limit = 96;
        let policy = Policy { when_full: WhenFull::DropMiddle { keep: 4 }, limit };
        let make = |n_draft| {
            let mut s = session(model, 160, n_draft);
            s.set_policy(0, policy).unwrap();
            s
        };
        let sampler = samplers(desc.n_vocab)[1].clone();
        let mut alone = make(0);
        let expected = plain(&mut alone, prompt, &mut sampler.clone(), n);
        assert!(alone.dropped(0).unwrap() > 0);
        let text: Vec<i32> = expected.iter().map(|(t, _)| *t).collect();
        for d in [1, 3, 8] {
            // Every second draft is right: it counts tokens itself, since the session's text becomes shorter.
            struct Coin {
                text: Vec<i32>,
                at: Arc<Mutex<usize>>,
                n_vocab: i32,
            }
            impl Drafter for Coin {
                fn draft(&mut self, _: &Text, n: usize, drafts: &mut Vec<i32>) -> Result<()> {
                    let at = *self.at.lock().unwrap();
                    drafts.extend((at..at + n).map(|i| {
                        let next = self.text.get(i).copied().unwrap_or(0);
                        if i.is_multiple_of(3) { (next + 1) % self.n_vocab } else { next }
                    }));
                    Ok(())
                }
            }
            let at = Arc::new(Mutex::new(1));
            let coin = Coin { text: text.clone(), at: at.clone(), n_vocab: desc.n_vocab as i32 };
            let by_model = with_draft_model(model, 160, d, 0.0);
            for (mut speculator, is_lucky) in
                [(Speculator::new(coin, d).unwrap(), true), (Speculator::new(by_model, d).unwrap(), false)]
            {
                let (mut s, mut sampler) = (make(d), sampler.clone());
                s.prefill(0, prompt).unwrap();
                let first = sampler.sample(s.logits(0).unwrap()).unwrap();
                sampler.accept(first).unwrap();
                let mut found = vec![first as i32];
                while found.len() < n {
                    *at.lock().unwrap() = found.len();
                    found.extend(speculator.step(&mut s, 0, *found.last().unwrap(), &mut sampler).unwrap());
                    let done = found.len() - 1;
                    if done <= n {
                        assert!(*s.logits(0).unwrap() == expected[done - 1].1, "{}: {done} of {d} drafts", g.name);
                    }
                }
                assert_eq!(found[..n], text, "{}", g.name);
                assert!(s.dropped(0).unwrap() > 0, "{}", g.name);
                assert!(speculator.stats().accepted > 0 || !is_lucky, "{}", g.name);
                s.audit().unwrap();
            }
        }
    });
}

/// Several sequences verified in one pass: each has what it has alone.
#[test]
fn sequences_share_a_pass() {
    const N: usize = 20;
    each(|g, model| {
        let desc = model.desc();
        let prompts = [&g.tokens[..12], &g.tokens[7..30], &g.tokens[3..9]];
        let base = samplers(desc.n_vocab)[1].clone();
        let expected: Vec<Vec<i32>> = prompts
            .iter()
            .map(|prompt| plain(&mut session(model, 64, 0), prompt, &mut base.clone(), N))
            .map(|text| text.iter().map(|(t, _)| *t).collect())
            .collect();
        let several = SessionOptions { n_sequences: 3, ..options(3 * 64, 4) };
        let draft = Session::new(draft_model(model), &several).unwrap();
        let drafters = [
            Speculator::new(lookup(), 4).unwrap(),
            Speculator::new(DraftModel::new(model, draft, 0.0).unwrap(), 4).unwrap(),
        ];
        for mut speculator in drafters {
            let mut s = Session::new(model.clone(), &several).unwrap();
            let mut samplers = [base.clone(), base.clone(), base.clone()];
            let mut texts: Vec<Vec<i32>> = Vec::new();
            for (seq, prompt) in prompts.iter().enumerate() {
                s.prefill(seq as i64, prompt).unwrap();
                let token = samplers[seq].sample(s.logits(seq as i64).unwrap()).unwrap();
                samplers[seq].accept(token).unwrap();
                texts.push(vec![token as i32]);
            }
            while texts.iter().any(|t| t.len() < N) {
                let entries: Vec<(i64, Vec<i32>)> = (0..3)
                    .filter(|&seq| texts[seq].len() < N)
                    .map(|seq| {
                        let last = *texts[seq].last().unwrap();
                        let drafts = speculator.draft(&s, seq as i64, last).unwrap();
                        (seq as i64, [&[last][..], drafts].concat())
                    })
                    .collect();
                let batch: Vec<BatchEntry> = entries
                    .iter()
                    .map(|(seq, tokens)| BatchEntry { seq: *seq, tokens, logits: Logits::Every })
                    .collect();
                s.decode(&batch).unwrap();
                for (seq, _) in &entries {
                    let seq = *seq as usize;
                    texts[seq].extend(speculator.accept(&mut s, seq as i64, &mut samplers[seq]).unwrap());
                    let twice = speculator.accept(&mut s, seq as i64, &mut samplers[seq]).map(drop);
                    assert!(matches!(twice, Err(Error::InvalidArgument(m)) if m.contains("no entry to accept")));
                }
            }
            for seq in 0..3 {
                assert_eq!(texts[seq][..N], expected[seq], "{} sequence {seq}", g.name);
                speculator.forget(seq as i64).unwrap();
            }
        }
    });
}

/// A failed step leaves text, logits and sampler as they were.
#[test]
fn a_failed_step_changes_nothing() {
    let g = golden().into_iter().find(|g| g.name.contains("cswa-k3")).unwrap();
    let model = load(&g.path, BackendKind::Cpu);
    let n_vocab = model.desc().n_vocab;
    let sampler = samplers(n_vocab)[1].clone();
    let prompt = &g.tokens[..20];
    let expected = plain(&mut session(&model, 64, 0), prompt, &mut sampler.clone(), 12);
    let text: Vec<i32> = expected.iter().map(|(t, _)| *t).collect();
    let oracle = Oracle { n_prompt: 20, text: text.clone(), n_vocab: n_vocab as i32, right: 999 };
    // From the prompt on: a session, the sampler after its first token, and that token.
    let begin = || {
        let (mut s, mut sampler) = (session(&model, 64, 4), sampler.clone());
        s.prefill(0, prompt).unwrap();
        let first = sampler.sample(s.logits(0).unwrap()).unwrap();
        sampler.accept(first).unwrap();
        (s, sampler, vec![first as i32])
    };
    let go_on = |speculator: &mut Speculator, s: &mut Session, sampler: &mut Sampler, mut found: Vec<i32>| {
        while found.len() < 12 {
            found.extend(speculator.step(s, 0, *found.last().unwrap(), sampler).unwrap());
        }
        assert_eq!(found[..12], text);
    };
    for by_model in [false, true] {
        let mut speculator = match by_model {
            false => Speculator::new(oracle.clone(), 4).unwrap(),
            true => Speculator::new(with_draft_model(&model, 64, 4, 0.0), 4).unwrap(),
        };
        let (mut s, mut sampler, found) = begin();
        let logits = s.logits(0).unwrap().to_vec();
        // With a draft model its prefill is what is cancelled.
        s.cancel_handle().cancel(0).unwrap();
        let calls = s.stats().snapshot().calls;
        assert!(matches!(speculator.step(&mut s, 0, text[0], &mut sampler), Err(Error::Cancelled)));
        assert_eq!(s.stats().snapshot().calls - calls, u64::from(!by_model));
        assert_eq!((s.len(0).unwrap(), s.logits(0).unwrap()), (20, &logits[..]));
        go_on(&mut speculator, &mut s, &mut sampler, found);
    }
    // A sampler that refuses.
    let mut speculator = Speculator::new(oracle, 4).unwrap();
    let (mut s, mut sampler, found) = begin();
    let mut other = Sampler::new(SamplerParams::default(), n_vocab + 1).unwrap();
    let error = speculator.step(&mut s, 0, text[0], &mut other).unwrap_err();
    assert!(error.to_string().contains("n_vocab"), "{error}");
    assert_eq!((s.len(0).unwrap(), speculator.stats()), (20, SpeculatorStats::default()));
    go_on(&mut speculator, &mut s, &mut sampler, found);
    assert_eq!(speculator.stats().steps, 3);
}

/// A run ends with the token that ends the generation, though drafts after it were right; and with the text that a constraint allows.
#[test]
fn ends_and_constraints() {
    let model = load(&demo_model(), BackendKind::Cpu);
    let tokenizer = model.tokenizer().unwrap();
    let n_vocab = model.desc().n_vocab;
    let has_ended = |text: &[i32]| text.last().is_some_and(|&t| tokenizer.is_end_of_generation(t as u32));
    let prompt: Vec<i32> = tokenizer.encode(b"Numbers: ", true, true).unwrap().into_iter().map(|t| t as i32).collect();
    let constrained = || {
        let mut sampler = Sampler::new(SamplerParams { seed: 3, ..Default::default() }, n_vocab).unwrap();
        let constraint = Constraint::regex(&model.token_environment().unwrap(), "[0-9]{6}").unwrap();
        sampler.set_constraint(constraint).unwrap();
        sampler
    };
    let mut s = session(&model, 200, 8);
    s.prefill(0, &prompt).unwrap();
    let mut sampler = constrained();
    let mut text = Vec::new();
    while !has_ended(&text) {
        if let Some(&last) = text.last() {
            s.step(0, last).unwrap();
        }
        let token = sampler.sample(s.logits(0).unwrap()).unwrap();
        sampler.accept(token).unwrap();
        text.push(token as i32);
        assert!(text.len() < 20);
    }
    let n = text.len();
    // Drafts that are right beyond the end.
    text.extend([text[n - 1]; 4]);
    for d in 1..=8 {
        let oracle = Oracle { n_prompt: prompt.len(), text: text.clone(), n_vocab: n_vocab as i32, right: 999 };
        let mut speculator = Speculator::new(oracle, d).unwrap();
        let mut s = session(&model, 200, d);
        s.prefill(0, &prompt).unwrap();
        let mut sampler = constrained();
        let first = sampler.sample(s.logits(0).unwrap()).unwrap();
        sampler.accept(first).unwrap();
        let mut found = vec![first as i32];
        while !has_ended(&found) {
            found.extend(speculator.step(&mut s, 0, *found.last().unwrap(), &mut sampler).unwrap());
        }
        assert_eq!(found, text[..n], "{d} drafts");
        assert_eq!(s.len(0).unwrap(), prompt.len() + n - 1);
    }
    // What fails at a later row ends the run, and the next step tells: after three letters there is no token left.
    let letter = (0..n_vocab as i32).find(|&t| tokenizer.token_bytes(t as u32, false).unwrap() == b"A").unwrap();
    let oracle = Oracle { n_prompt: prompt.len(), text: vec![letter; 9], n_vocab: n_vocab as i32, right: 999 };
    let mut speculator = Speculator::new(oracle, 4).unwrap();
    let mut sampler = Sampler::new(SamplerParams { temperature: 0.0, ..Default::default() }, n_vocab).unwrap();
    let others = (0..n_vocab as i64).filter(|&t| t != i64::from(letter)).map(|t| (t, f32::NEG_INFINITY));
    sampler.add_logit_bias(others).unwrap();
    sampler.set_constraint(Constraint::regex(&model.token_environment().unwrap(), "A{3}x").unwrap()).unwrap();
    let mut s = session(&model, 200, 4);
    s.prefill(0, &prompt).unwrap();
    assert_eq!(speculator.step(&mut s, 0, letter, &mut sampler).unwrap(), [letter; 3]);
    for _ in 0..2 {
        assert_eq!(s.len(0).unwrap(), prompt.len() + 3);
        let error = speculator.step(&mut s, 0, letter, &mut sampler).map(drop);
        assert!(matches!(error, Err(Error::InvalidArgument(_))), "{error:?}");
    }
}

#[test]
fn lookup_steps_allocate_nothing() {
    each(|g, model| {
        let prompt = [&g.tokens[..20], &g.tokens[5..18]].concat();
        let mut s = session(model, 100, 6);
        let mut sampler = samplers(model.desc().n_vocab)[1].clone();
        let mut speculator = Speculator::new(lookup(), 6).unwrap();
        s.prefill(0, &prompt).unwrap();
        let before = COUNT.get();
        let mut last = g.tokens[18];
        for _ in 0..8 {
            last = *speculator.step(&mut s, 0, last, &mut sampler).unwrap().last().unwrap();
        }
        assert_eq!(COUNT.get(), before, "{}", g.name);
        assert!(speculator.stats().drafted > 0, "{}", g.name);
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let says = |result: Result<()>, word: &str| match result {
        Err(Error::InvalidArgument(m)) => assert!(m.contains(word), "{m}"),
        other => panic!("{other:?}, expected {word}"),
    };
    let g = golden().remove(0);
    let small = load(&g.path, BackendKind::Cpu);
    let demo = load(&demo_model(), BackendKind::Cpu);
    let options = SessionOptions { cache_type: CacheType::F32, ..options(64, 0) };
    let mut s = Session::new(small.clone(), &options).unwrap();
    s.prefill(0, &[1, 2, 3]).unwrap();
    let draft_session = |m: &Arc<Model>| Session::new(m.clone(), &options).unwrap();
    says(DraftModel::new(&small, draft_session(&demo), 0.0).map(drop), "a vocabulary of");
    says(DraftModel::new(&small, draft_session(&small), f32::NAN).map(drop), "p_min is NaN");
    says(DraftModel::new(&small, draft_session(&small), 1.5).map(drop), "p_min is 1.5");
    let mut speculator = Speculator::new(lookup(), 3).unwrap();
    says(speculator.draft(&s, 0, 1).map(drop), "n_draft is 0");
    let mut drafting = session(&small, 64, 3);
    says(speculator.draft(&drafting, 1, 1).map(drop), "sequence 1");
    let mut sampler = samplers(small.desc().n_vocab)[0].clone();
    says(speculator.accept(&mut s, 0, &mut sampler).map(drop), "no entry to accept");
    says(drafting.keep(0, 0), "expected 1 to 0");
    drafting.decode(&[BatchEntry { seq: 0, tokens: &[1, 2], logits: Logits::Every }]).unwrap();
    says(drafting.keep(0, 3), "expected 1 to 2");
    drafting.keep(0, 1).unwrap();
    assert_eq!(drafting.len(0).unwrap(), 1);
    // A sequence that the draft model has none for, and a session of another model.
    let mut by_model = Speculator::new(DraftModel::new(&small, draft_session(&small), 0.0).unwrap(), 3).unwrap();
    let two = SessionOptions { n_sequences: 2, n_draft: 3, ..options.clone() };
    says(by_model.draft(&Session::new(small.clone(), &two).unwrap(), 1, 1).map(drop), "has 1 sequences");
    says(by_model.draft(&Session::new(demo.clone(), &two).unwrap(), 0, 1).map(drop), "the draft model 128");
}

/// A vocabulary of the same size that differs in one token is refused, and the token named.
#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let model = load(&demo_model(), BackendKind::Cpu);
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(demo_model()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let file = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    // Two tokens that no merge makes trade places.
    let (a, b) = (vocab["A"].clone(), vocab["B"].clone());
    (vocab["A"], vocab["B"]) = (b, a.clone());
    std::fs::write(&file, serde_json::to_vec(&json).unwrap()).unwrap();
    let other = load(folder.path(), BackendKind::Cpu);
    let error = DraftModel::new(&model, session(&other, 64, 0), 0.0).map(drop).unwrap_err().to_string();
    assert!(error.contains(&format!("token {a} is \"B\"")) && error.contains("expected \"A\""), "{error}");
    DraftModel::new(&model, session(&draft_model(&model), 64, 0), 0.0).unwrap();
}
