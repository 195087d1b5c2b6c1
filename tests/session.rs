//! Promises of a session beyond right numbers: what it allocates, what it reports, what a cancelled call leaves behind.

#[path = "common/allocations.rs"]
mod allocations;
mod common;

use allocations::COUNT;
use common::{Golden, demo_model, difference, golden, load, on_cuda, rounding};
use phd::Error;
use phd::model::{BackendKind, LoadOptions, Model};
use phd::sampling::constraint::Constraint;
use phd::sampling::{Sampler, SamplerParams};
use phd::session::{BatchEntry, CacheType, Logits, Policy, Session, SessionOptions, WhenFull};

fn cases() -> impl Iterator<Item = (Golden, BackendKind)> {
    golden().into_iter().flat_map(|g| [(g.clone(), BackendKind::Reference), (g, BackendKind::Cpu)])
}

/// One of every kind, with its name.
fn samplers(n_vocab: usize) -> Vec<(&'static str, Sampler)> {
    let all = SamplerParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
    let kinds = [
        ("the default", SamplerParams::default()),
        ("another seed", SamplerParams { seed: 99, ..Default::default() }),
        ("all tokens", all),
        ("greedy", SamplerParams { temperature: 0.0, ..all }),
        ("greedy at the end", SamplerParams { temperature: 0.0, ..Default::default() }),
        ("top-k 1", SamplerParams { top_k: 1, ..all }),
        ("top-k 64", SamplerParams { top_k: 64, ..all }),
        ("top-k 65", SamplerParams { top_k: 65, ..all }),
        ("min-p", SamplerParams { min_p: 0.1, ..all }),
        ("top-p", SamplerParams { top_p: 0.3, ..all }),
        ("typical-p", SamplerParams { typical_p: 0.6, ..all }),
        (
            "penalties",
            SamplerParams { repetition_penalty: 1.4, presence_penalty: 0.2, penalty_last_n: 8, ..Default::default() },
        ),
        ("DRY", SamplerParams { dry_multiplier: 0.8, dry_penalty_last_n: 32, ..Default::default() }),
        ("XTC", SamplerParams { xtc_probability: 0.5, ..Default::default() }),
        ("dynamic temperature", SamplerParams { dynatemp_range: 0.4, ..Default::default() }),
        ("mirostat", SamplerParams { mirostat: 2, ..all }),
    ];
    let mut samplers: Vec<_> = kinds.map(|(name, p)| (name, Sampler::new(p, n_vocab).unwrap())).into();
    let mut biased = Sampler::new(SamplerParams::default(), n_vocab).unwrap();
    biased.add_logit_bias([(3, 2.0), (0, f32::NEG_INFINITY)].into_iter()).unwrap();
    samplers.push(("bias", biased));
    samplers
}

/// Steps with what the session draws, which is what is drawn from its logits; the same for the last entry's tokens.
fn session_draws_from_its_logits(s: &mut Session, prompt: &[i32], name: &str, sampler: &mut Sampler, n: usize) {
    s.truncate(0, 0).unwrap();
    s.decode(&[BatchEntry { seq: 0, tokens: prompt, logits: Logits::Every }]).unwrap();
    for index in 0..prompt.len() {
        let found = s.sample_at(0, index, &mut sampler.clone()).unwrap();
        assert_eq!(found, sampler.clone().sample(s.logits_at(0, index).unwrap()).unwrap(), "{name}: after {index}");
    }
    for i in 0..n {
        let mut twin = sampler.clone();
        let token = s.sample(0, sampler).unwrap();
        assert_eq!(token, twin.sample(s.logits(0).unwrap()).unwrap(), "{name}: token {i}");
        sampler.accept(token).unwrap();
        s.step(0, token as i32).unwrap();
    }
}

#[test]
fn sampling_in_the_session_is_sampling_from_its_logits() {
    for (g, backend) in cases().filter(|(g, _)| g.name.contains("k3-w16-c32") || g.name.contains("qwen3-cswa")) {
        let options = SessionOptions { n_positions: 32, ..Default::default() };
        let mut s = Session::new(load(&g.path, backend), &options).unwrap();
        for (name, mut sampler) in samplers(s.model().desc().n_vocab) {
            session_draws_from_its_logits(&mut s, &g.tokens[..4], name, &mut sampler, 20);
        }
    }
    let model = load(&demo_model(), BackendKind::Cpu);
    let mut sampler = Sampler::new(SamplerParams::default(), model.desc().n_vocab).unwrap();
    sampler.set_constraint(Constraint::regex(&model.token_environment().unwrap(), "(no|yes)[a-d ]+").unwrap()).unwrap();
    let mut s = Session::new(model, &SessionOptions { n_positions: 32, ..Default::default() }).unwrap();
    session_draws_from_its_logits(&mut s, &[5, 6], "a constraint", &mut sampler, 5);
}

#[test]
fn sampling_in_the_session_fails_as_the_two_calls_do() {
    for (g, backend) in cases().filter(|(g, _)| g.name.contains("k3-w16-c32")) {
        let options = SessionOptions { n_positions: 16, n_sequences: 2, ..Default::default() };
        let mut s = Session::new(load(&g.path, backend), &options).unwrap();
        let n_vocab = s.model().desc().n_vocab;
        s.prefill(0, &g.tokens[..3]).unwrap();
        let sentence = |result: phd::Result<u32>| match result {
            Err(Error::InvalidArgument(sentence)) => sentence,
            other => panic!("{other:?}"),
        };
        for k in [0, 1, 40] {
            let params = SamplerParams { top_k: k, ..Default::default() };
            let mut sampler = Sampler::new(params, n_vocab).unwrap();
            assert_eq!(sentence(s.sample(1, &mut sampler)), s.logits(1).unwrap_err().to_string());
            assert_eq!(sentence(s.sample(2, &mut sampler)), s.logits(2).unwrap_err().to_string());
            assert_eq!(sentence(s.sample_at(0, 0, &mut sampler)), s.logits_at(0, 0).unwrap_err().to_string());
            for other in [n_vocab - 1, n_vocab + 1] {
                let mut sampler = Sampler::new(params, other).unwrap();
                let expected = sampler.sample(s.logits(0).unwrap()).unwrap_err().to_string();
                assert_eq!(sentence(s.sample(0, &mut sampler)), expected);
            }
        }
    }
}

#[test]
fn calls_allocate_nothing() {
    for (g, backend) in cases() {
        let n = g.tokens.len();
        let options = SessionOptions { n_positions: 2 * n, n_sequences: 2, max_rows: 16, ..Default::default() };
        let mut s = Session::new(load(&g.path, backend), &options).unwrap();
        let mut samplers = samplers(s.model().desc().n_vocab);
        // It takes effect at 2 n - 3 positions.
        s.set_policy(0, Policy { when_full: WhenFull::DropMiddle { keep: 2 }, limit: 0 }).unwrap();
        let before = COUNT.get();
        s.prefill(0, &g.tokens[..n / 2]).unwrap();
        s.fork(0, 1).unwrap();
        for &token in &g.tokens[n / 2..] {
            s.step(0, token).unwrap();
            s.step(1, token).unwrap();
        }
        s.truncate(0, n / 3).unwrap();
        s.prefill(0, &g.tokens[n / 3..]).unwrap();
        s.truncate(0, n / 4).unwrap();
        s.truncate(1, n / 2).unwrap();
        s.decode(&[
            BatchEntry { seq: 1, tokens: &g.tokens[n / 2..], logits: Logits::Last },
            BatchEntry { seq: 0, tokens: &g.tokens[n / 4..], logits: Logits::Nothing },
        ])
        .unwrap();
        s.retain(1).unwrap();
        assert_eq!(s.take_prefix(1, &g.tokens[..n / 2]).unwrap(), n / 2);
        s.decode(&[BatchEntry { seq: 1, tokens: &g.tokens[n / 2..n / 2 + 4], logits: Logits::Every }]).unwrap();
        assert!(s.logits_at(1, 3).unwrap()[0].is_finite());
        for (_, sampler) in &mut samplers {
            let token = s.sample(1, sampler).unwrap();
            sampler.accept(token).unwrap();
            s.sample_at(1, 2, sampler).unwrap();
        }
        s.retain(1).unwrap();
        for &token in &g.tokens {
            s.step(0, token).unwrap();
        }
        assert_eq!(COUNT.get(), before, "{}", g.name);
        assert!(s.dropped(0).unwrap() > 0 && s.stats().snapshot().evicted > 0, "{}", g.name);
    }
}

#[test]
fn the_cache_does_not_grow_with_the_copies() {
    let memory = |rules, cache_type| {
        let model = Model::load(&demo_model(), LoadOptions { rules: Some(rules), ..Default::default() }).unwrap();
        let options = SessionOptions { n_positions: 512, cache_type, ..Default::default() };
        Session::new(model.into(), &options).unwrap().memory()
    };
    // 6 layers, 2 key/value heads of 32, keys and values.
    for (cache_type, row) in
        [(CacheType::F32, 256), (CacheType::F16, 128), (CacheType::Bf16, 128), (CacheType::Q8_0, 68)]
    {
        for (rules, ring) in [((1, 0, 0), 0), ((2, 0, 0), 0), ((2, 16, 32), 16), ((3, 16, 4), 8), ((256, 16, 32), 16)] {
            let found = memory(rules, cache_type);
            assert_eq!(
                (found.cache, found.hidden),
                (6 * 2 * 512 * row, 6 * 2 * ring * row),
                "{rules:?} {cache_type:?}"
            );
        }
    }
}

/// Before anything is allocated.
#[test]
fn sizes_out_of_range_are_refused() {
    let model = load(&demo_model(), BackendKind::Cpu);
    let fine = || SessionOptions { n_positions: 64, ..Default::default() };
    for (options, what) in [
        (SessionOptions { n_positions: 0, ..fine() }, "n_positions is 0"),
        (SessionOptions { n_positions: usize::MAX, ..fine() }, "n_positions is 18446744073709551615"),
        (SessionOptions { n_sequences: 0, ..fine() }, "n_sequences is 0"),
        (SessionOptions { n_threads: 1025, ..fine() }, "n_threads is 1025"),
        (SessionOptions { n_draft: 257, ..fine() }, "n_draft is 257"),
        (SessionOptions { max_rows: (1 << 17) + 1, ..fine() }, "max_rows is 131073"),
        (SessionOptions { max_rows: usize::MAX / 64, ..fine() }, "max_rows is 288230376151711743"),
    ] {
        let error = Session::new(model.clone(), &options).err().expect(what);
        assert!(matches!(&error, Error::InvalidArgument(e) if e.contains(what)), "{what}: {error}");
    }
}

/// A call that is cancelled between its passes leaves the sequence as it was: length, logits, and what follows.
#[test]
fn a_cancelled_call_changes_nothing() {
    for (g, backend) in cases() {
        let n = g.tokens.len();
        let options = SessionOptions { n_positions: n, cache_type: CacheType::F32, max_rows: 4, ..Default::default() };
        let mut s = Session::new(load(&g.path, backend), &options).unwrap();
        for cut in [1, n / 3, n / 2] {
            s.truncate(0, 0).unwrap();
            s.prefill(0, &g.tokens[..cut]).unwrap();
            let handle = s.cancel_handle();
            s.set_progress(Some(Box::new(move |_| handle.cancel(0).is_ok())));
            assert!(matches!(s.prefill(0, &g.tokens[cut..]), Err(Error::Cancelled)), "{}", g.name);
            s.set_progress(Some(Box::new(|_| false)));
            assert!(matches!(s.prefill(0, &g.tokens[cut..]), Err(Error::Cancelled)), "{}", g.name);
            s.set_progress(None);
            assert_eq!(s.len(0).unwrap(), cut);
            assert!(difference(s.logits(0).unwrap(), &g.logits[cut - 1]) < rounding(), "{}: logits before", g.name);
            assert!(
                matches!(s.prefill(0, &vec![1; n]), Err(Error::CacheFull { needed, free }) if needed == n && free == n - cut)
            );
            for i in cut..n {
                s.step(0, g.tokens[i]).unwrap();
                assert!(difference(s.logits(0).unwrap(), &g.logits[i]) < rounding(), "{}: position {i} after", g.name);
            }
        }
    }
}

/// A request from another thread ends the running call, or else the next one, and that alone.
#[test]
fn another_thread_cancels() {
    let model = load(&demo_model(), BackendKind::Cpu);
    let options = SessionOptions { n_positions: 4096, cache_type: CacheType::F32, ..Default::default() };
    let mut s = Session::new(model, &options).unwrap();
    let tokens: Vec<i32> = (0..4000).map(|i| i * 37 % 1024).collect();
    s.prefill(0, &tokens[..100]).unwrap();
    let before = s.logits(0).unwrap().to_vec();
    let handle = s.cancel_handle();
    for _ in 0..20 {
        let handle = handle.clone();
        let other = std::thread::spawn(move || handle.cancel(0).unwrap());
        let result = s.prefill(0, &tokens[100..]);
        other.join().unwrap();
        match result {
            // It came too late for this call.
            Ok(()) => {
                assert!(matches!(s.step(0, 1), Err(Error::Cancelled)));
                s.truncate(0, 100).unwrap();
            }
            Err(Error::Cancelled) if on_cuda() => assert!(difference(s.logits(0).unwrap(), &before) < rounding()),
            Err(Error::Cancelled) => assert_eq!(s.logits(0).unwrap(), before),
            Err(e) => panic!("{e}"),
        }
        assert_eq!(s.len(0).unwrap(), 100);
        s.prefill(0, &tokens[100..110]).unwrap();
        s.truncate(0, 99).unwrap();
        s.step(0, tokens[99]).unwrap();
        assert!(difference(s.logits(0).unwrap(), &before) < rounding());
    }
}
