//! A device that fails in the middle of a call: the call says so, and everything is what it was. The emulator alone can be told to
//! (`tests/cuda/run.sh`): which call of a driver's function fails is a setting of the process, so that tests take turns.

mod common;

use std::sync::{Mutex, MutexGuard};

use common::{Golden, difference, golden, load};
use phd::Error;
use phd::model::{BackendKind, LoadOptions, Model};
use phd::sampling::{Sampler, SamplerParams};
use phd::session::{BatchEntry, CacheType, Logits, Session, SessionOptions};

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// `call` while call `n` of the driver's `function` fails.
fn failing<T>(function: &str, n: usize, call: impl FnOnce() -> T) -> T {
    // SAFETY: tests take turns, and no other thread of this process looks at its environment.
    unsafe { std::env::set_var("PHD_EMULATOR_FAIL", format!("{function}:{n}")) };
    let result = call();
    // SAFETY: as above.
    unsafe { std::env::remove_var("PHD_EMULATOR_FAIL") };
    result
}

/// `call` fails in each of its calls of `function` in turn, with `after` called every time; then it succeeds. How many there were.
fn each_failure<S>(
    state: &mut S,
    function: &str,
    mut call: impl FnMut(&mut S) -> phd::Result<()>,
    mut after: impl FnMut(&mut S),
) -> usize {
    for n in 1..10_000 {
        match failing(function, n, || call(state)) {
            Ok(()) => return n - 1,
            Err(Error::Backend(what)) => assert!(what.contains("CUDA_ERROR_UNKNOWN"), "{function}:{n}: {what}"),
            Err(other) => panic!("{function}:{n}: {other}"),
        }
        after(state);
    }
    panic!("{function} is called without end");
}

fn named(part: &str) -> Golden {
    golden().into_iter().find(|g| g.name.contains(part)).unwrap()
}

/// With blocks of 16 positions.
fn session(g: &Golden, cache_type: CacheType) -> Session {
    let options = SessionOptions { n_positions: 2048, n_sequences: 2, n_draft: 3, cache_type, ..Default::default() };
    Session::new(load(&g.path, BackendKind::Cuda), &options).unwrap()
}

fn saved(s: &Session, seq: i64) -> Vec<u8> {
    let mut blob = vec![0; s.save_size(seq).unwrap()];
    s.save(seq, &mut blob).unwrap();
    blob
}

fn sampler(top_k: u32, n_vocab: usize) -> Sampler {
    Sampler::new(SamplerParams { top_k, ..Default::default() }, n_vocab).unwrap()
}

#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn logits_that_cannot_be_copied() {
    let _turn = turn();
    let g = named("k3-w16-c32");
    for function in ["cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuCtxPushCurrent_v2"] {
        let (mut s, mut twin) = (session(&g, CacheType::F16), session(&g, CacheType::F16));
        for s in [&mut s, &mut twin] {
            s.prefill(0, &g.tokens[..5]).unwrap();
            s.decode(&[BatchEntry { seq: 1, tokens: &g.tokens[..3], logits: Logits::Every }]).unwrap();
        }
        let n_vocab = s.model().desc().n_vocab;
        // What was found on the device needs none.
        let best = failing(function, 1, || s.sample(0, &mut sampler(4, n_vocab))).unwrap();
        assert_eq!(best, sampler(4, n_vocab).sample(twin.logits(0).unwrap()).unwrap());
        let found = each_failure(&mut s, function, |s| s.logits(0).map(drop), |_| {});
        assert_eq!(found, 1, "{function}");
        assert_eq!(s.logits(0).unwrap(), twin.logits(0).unwrap());
        let found = each_failure(&mut s, function, |s| s.sample_at(1, 2, &mut sampler(0, n_vocab)).map(drop), |_| {});
        assert_eq!(found, 1, "{function}");
        assert_eq!(s.logits_at(1, 2).unwrap(), twin.logits_at(1, 2).unwrap());
        // Once they are there, nothing is asked of the device.
        failing(function, 1, || s.logits(0).map(drop)).unwrap();
    }
}

#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn states_that_cannot_be_copied() {
    let _turn = turn();
    let g = named("k3-w16-c32");
    for cache_type in [CacheType::F32, CacheType::F16, CacheType::Q8_0] {
        let mut s = session(&g, cache_type);
        s.prefill(0, &g.tokens[..20]).unwrap();
        // Sequence 0's second block becomes its own, after sequence 1's.
        s.fork(0, 1).unwrap();
        s.step(0, g.tokens[20]).unwrap();
        let (expected, next) = (saved(&s, 0), g.tokens[22]);
        let n_layers = s.model().desc().n_layers;
        let mut blob = vec![0; expected.len()];
        for function in ["cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuCtxPushCurrent_v2"] {
            let n = each_failure(&mut (&s, &mut blob), function, |(s, blob)| s.save(0, blob), |_| {});
            // Keys and values of two runs of rows, waited for together; not row by row.
            let expected_calls = if function == "cuMemcpyDtoHAsync_v2" { 4 * n_layers } else { 2 * n_layers };
            assert_eq!(n, expected_calls, "{function}");
            assert_eq!(blob, expected);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        assert!(failing("cuMemcpyDtoHAsync_v2", 2, || s.save_file(0, &path)).is_err() && !path.exists());

        s.restore(0, &expected).unwrap();
        s.step(0, next).unwrap();
        let logits = s.logits(0).unwrap().to_vec();
        for function in ["cuMemcpyHtoDAsync_v2", "cuStreamSynchronize", "cuCtxPushCurrent_v2"] {
            let n = each_failure(
                &mut s,
                function,
                |s| s.restore(0, &expected),
                |s| {
                    assert_eq!((s.len(0).unwrap(), s.logits(0).is_err()), (0, true));
                    s.audit().unwrap();
                    // The other sequence is none of its business.
                    assert_eq!(s.len(1).unwrap(), 20);
                },
            );
            assert!(n >= n_layers, "{function}: {n}");
            assert_eq!(saved(&s, 0), expected, "{function}");
            s.step(0, next).unwrap();
            assert_eq!(s.logits(0).unwrap(), logits, "{function}");
        }
    }
}

/// Rows of the CPU's cache, in more pieces than are copied at a time.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn a_long_state_is_the_same_everywhere() {
    let _turn = turn();
    let g = named("scale-seq-n4");
    for (cache_type, n) in
        [(CacheType::F32, 2100), (CacheType::F16, 100), (CacheType::Q8_0, 100), (CacheType::Bf16, 100)]
    {
        let tokens: Vec<i32> = g.tokens.iter().copied().cycle().take(n).collect();
        let options = SessionOptions { n_positions: n, cache_type, ..Default::default() };
        let [mut cpu, mut cuda] = [BackendKind::Cpu, BackendKind::Cuda].map(|backend| {
            let model = Model::load(&g.path, LoadOptions { backend, ..Default::default() }).unwrap();
            Session::new(model.into(), &options).unwrap()
        });
        cpu.prefill(0, &tokens).unwrap();
        let blob = saved(&cpu, 0);
        cuda.restore(0, &blob).unwrap();
        assert!(saved(&cuda, 0) == blob, "{cache_type:?}");
        assert_eq!(cuda.logits(0).unwrap(), cpu.logits(0).unwrap());
    }
}

/// A failed call that extends, forks or shortens sequences leaves them as they were.
#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn copies_on_the_device_that_fail() {
    let _turn = turn();
    let g = named("k3-w16-c32");
    let mut s = session(&g, CacheType::F16);
    s.prefill(0, &g.tokens[..5]).unwrap();
    s.fork(0, 1).unwrap();
    let logits = |s: &Session, seq| s.logits(seq).unwrap().to_vec();
    // Hidden rows that are computed anew have other company than before.
    let is_near = |a: &[f32], b: &[f32]| assert!(difference(a, b) < 5e-3, "{:e}", difference(a, b));
    let before = [logits(&s, 0), logits(&s, 1)];
    let function = "cuMemcpyDtoDAsync_v2";

    // The shared block is copied before it is written, and the last token's logits become the sequence's.
    let entry = BatchEntry { seq: 0, tokens: &g.tokens[10..13], logits: Logits::Every };
    let n = each_failure(
        &mut s,
        function,
        |s| s.decode(&[entry]),
        |s| {
            assert_eq!((s.len(0).unwrap(), s.len(1).unwrap()), (5, 5));
            assert_eq!([logits(s, 0), logits(s, 1)], before);
            s.audit().unwrap();
        },
    );
    assert!(n > 2 * s.model().desc().n_layers, "{n} copies");
    let mut twin = session(&g, CacheType::F16);
    twin.prefill(0, &g.tokens[..5]).unwrap();
    twin.decode(&[entry]).unwrap();
    is_near(&logits(&s, 0), &logits(&twin, 0));

    let last = logits(&s, 0);
    let n = each_failure(
        &mut s,
        function,
        |s| s.keep(0, 2),
        |s| {
            assert_eq!((s.len(0).unwrap(), s.n_logits_at(0).unwrap()), (8, 3));
            assert_eq!(logits(s, 0), last);
        },
    );
    assert_eq!(n, 1);
    twin.keep(0, 2).unwrap();
    is_near(&logits(&s, 0), &logits(&twin, 0));

    s.step(0, g.tokens[20]).unwrap();
    twin.step(0, g.tokens[20]).unwrap();
    assert!(matches!(failing(function, 1, || s.fork(0, 1)), Err(Error::Backend(_))));
    assert_eq!((s.len(1).unwrap(), logits(&s, 1)), (5, before[1].clone()));
    // Rings can be done without: they are computed anew.
    failing(function, 2, || s.fork(0, 1)).unwrap();
    twin.step(0, g.tokens[21]).unwrap();
    s.step(1, g.tokens[21]).unwrap();
    is_near(&logits(&s, 1), &logits(&twin, 0));
    s.audit().unwrap();
}

#[test]
#[ignore = "needs the emulator: tests/cuda/run.sh"]
fn scores_that_cannot_be_read() {
    let _turn = turn();
    let g = named("k3-w16-c32");
    let mut s = session(&g, CacheType::F16);
    s.prefill(0, &g.tokens[..5]).unwrap();
    let before = s.logits(0).unwrap().to_vec();
    let n = each_failure(
        &mut s,
        "cuMemcpyDtoHAsync_v2",
        |s| s.score(0, &g.tokens[5..10]).map(drop),
        |s| {
            assert_eq!((s.len(0).unwrap(), s.logits(0).unwrap()), (5, &before[..]));
            s.audit().unwrap();
        },
    );
    // The best tokens of the pass, their logits, what normalizes these; a logit each of the two tokens that are not among the best.
    assert_eq!(n, 5);
    assert_eq!(s.len(0).unwrap(), 10);
}
