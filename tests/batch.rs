//! Batches: any mix of prompt pieces and steps of several sequences in one call, carried out whole or not at all.

mod common;

use common::{Golden, Random, difference, forced_variant, golden, load, rounding, under_every_variant};
use phd::model::BackendKind;
use phd::session::{BatchEntry, CacheType, Logits, Session, SessionOptions};
use phd::{Error, Result};

const SEQUENCES: usize = 3;

fn cases() -> Vec<(Golden, BackendKind)> {
    let backends: &[BackendKind] = match forced_variant() {
        Some(_) => &[BackendKind::Cpu],
        None => &[BackendKind::Reference, BackendKind::Cpu],
    };
    golden().into_iter().flat_map(|g| backends.iter().map(move |&b| (g.clone(), b))).collect()
}

#[test]
fn every_variant() {
    under_every_variant(&[], "6 passed");
}

fn options(n_positions: usize, max_rows: usize) -> SessionOptions {
    SessionOptions { n_positions, n_sequences: SEQUENCES, cache_type: CacheType::F32, max_rows, ..Default::default() }
}

fn session(g: &Golden, backend: BackendKind, n_positions: usize, max_rows: usize) -> Session {
    Session::new(load(&g.path, backend), &options(n_positions, max_rows)).unwrap()
}

fn entry(seq: usize, tokens: &[i32]) -> BatchEntry<'_> {
    BatchEntry { seq: seq as i64, tokens, logits: Logits::Last }
}

fn check(s: &Session, seq: usize, g: &Golden, n: usize, what: &str) {
    assert_eq!(s.len(seq as i64).unwrap(), n, "{} {what}", g.name);
    let found = difference(s.logits(seq as i64).unwrap(), &g.logits[n - 1]);
    assert!(found < rounding(), "{} {what}: sequence {seq} of {n} positions differs by {found:e}", g.name);
}

/// Three sequences grow by random pieces, whoever is in the batch; passes are far smaller than the batches. On all but the reference
/// each has, to the bit, the logits that it has alone.
#[test]
fn results_do_not_depend_on_the_company() {
    for (g, backend) in cases() {
        let n = g.tokens.len();
        let mut random = Random(7);
        // A small pool for many sequences has blocks of a position, a large one of 16, in which keys lie otherwise.
        let large = 16 * 64 * SEQUENCES;
        let f32 = [(7, SEQUENCES * n), (64, SEQUENCES * n), (64, large)].map(|(rows, n)| (rows, n, CacheType::F32));
        // Narrower elements are multiplied where they lie, or converted first: their logits are held to those of the sequence alone.
        let narrow = [CacheType::F16, CacheType::Bf16].map(|cache_type| (64, large, cache_type));
        let narrow = if backend == BackendKind::Cpu { &narrow[..] } else { &[] };
        for &(max_rows, n_positions, cache_type) in f32.iter().chain(narrow) {
            let options = SessionOptions { batch_invariant: true, cache_type, ..options(n_positions, max_rows) };
            let new = || Session::new(load(&g.path, backend), &options).unwrap();
            let (mut s, mut alone) = (new(), new());
            assert_eq!(s.block(), if n_positions == large { 16 } else { 1 });
            while (0..SEQUENCES).any(|seq| s.len(seq as i64).unwrap() < n) {
                let mut batch = Vec::new();
                for seq in [2, 0, 1] {
                    let len = s.len(seq as i64).unwrap();
                    let piece = [0, 1, 1, 2, 9, n][random.below(6)].min(n - len);
                    if piece > 0 {
                        batch.push(entry(seq, &g.tokens[len..len + piece]));
                    }
                }
                if batch.is_empty() {
                    continue;
                }
                s.decode(&batch).unwrap();
                for e in &batch {
                    if cache_type == CacheType::F32 {
                        check(&s, e.seq as usize, &g, s.len(e.seq).unwrap(), "in a batch");
                    }
                    alone.prefill(e.seq, e.tokens).unwrap();
                    if backend == BackendKind::Cpu {
                        assert_eq!(s.logits(e.seq).unwrap(), alone.logits(e.seq).unwrap(), "{}", g.name);
                    }
                }
            }
            for seq in (0..SEQUENCES).filter(|_| cache_type == CacheType::F32) {
                check(&s, seq, &g, n, "at the end");
            }
        }
    }
}

/// Whatever is wrong with one entry, all sequences are what they were.
#[test]
fn a_failed_batch_changes_nothing() {
    for (g, backend) in cases() {
        let n = g.tokens.len();
        let mut s = session(&g, backend, 2 * n, 5);
        let cuts = [n / 3, n / 2, 5];
        for (seq, &cut) in cuts.iter().enumerate() {
            s.prefill(seq as i64, &g.tokens[..cut]).unwrap();
        }
        let free = 2 * n - cuts.iter().sum::<usize>();
        let before = s.usage();
        let logits: Vec<Vec<f32>> = (0..SEQUENCES).map(|seq| s.logits(seq as i64).unwrap().to_vec()).collect();
        let rest = |seq: usize| &g.tokens[cuts[seq]..];
        let fails = |s: &mut Session, batch: &[BatchEntry], is_right: &dyn Fn(&Error) -> bool| {
            let error = s.decode(batch).unwrap_err();
            assert!(is_right(&error), "{}: {error}", g.name);
            assert_eq!(s.usage(), before, "{}: {error}", g.name);
            for seq in 0..SEQUENCES {
                assert_eq!(s.len(seq as i64).unwrap(), cuts[seq]);
                assert_eq!(s.logits(seq as i64).unwrap(), logits[seq], "{}: {error}", g.name);
            }
        };
        let says = |word: &'static str| move |e: &Error| matches!(e, Error::InvalidArgument(m) if m.contains(word));
        fails(&mut s, &[], &says("empty"));
        fails(&mut s, &[entry(0, rest(0)), entry(1, &[])], &says("no tokens given for sequence 1"));
        fails(&mut s, &[entry(0, rest(0)), entry(2, &[1]), entry(0, &[1])], &says("sequence 0 occurs twice"));
        fails(&mut s, &[entry(0, rest(0)), entry(SEQUENCES, &[1])], &says("sequence 3 does not exist"));
        fails(&mut s, &[entry(0, rest(0)), entry(1, &[1, 2, -7])], &says("token 2 of sequence 1 is -7"));
        // Sequence 0 would fit, 1 would not after it; 2 counts as well.
        let many = vec![1; free];
        let full = |needed: usize, free: usize| move |e: &Error| matches!(*e, Error::CacheFull { needed: a, free: b } if (a, b) == (needed, free));
        fails(&mut s, &[entry(0, &[1, 2]), entry(1, &many), entry(2, &[1])], &full(free + 3, free));
        // Two sequences more, whoever of them asks first.
        let half = &many[..free / 2 + 1];
        fails(&mut s, &[entry(2, half), entry(1, half)], &full(2 * half.len(), free));

        // Cancelled between its passes: by the callback, and by a request for a sequence whose part is done by then.
        let batch = [entry(2, &g.tokens[5..6]), entry(1, rest(1)), entry(0, &rest(0)[..9])];
        s.set_progress(Some(Box::new(|_| false)));
        fails(&mut s, &batch, &|e| matches!(e, Error::Cancelled));
        let handle = s.cancel_handle();
        s.set_progress(Some(Box::new(move |_| handle.cancel(2).is_ok())));
        fails(&mut s, &batch, &|e| matches!(e, Error::Cancelled));
        s.set_progress(None);
        s.cancel_handle().cancel(0).unwrap();
        fails(&mut s, &batch, &|e| matches!(e, Error::Cancelled));
        // A request for a sequence outside the batch waits.
        s.cancel_handle().cancel(0).unwrap();
        s.decode(&batch[..2]).unwrap();
        check(&s, 2, &g, 6, "after failures");
        check(&s, 1, &g, n, "after failures");
        assert!(matches!(s.step(0, 1), Err(Error::Cancelled)));
        for i in cuts[0]..n.min(cuts[0] + 12) {
            s.decode(&[entry(0, &g.tokens[i..i + 1])]).unwrap();
            check(&s, 0, &g, i + 1, "after failures");
        }
    }
}

/// An entry that wants no logits leaves none, and costs less: its last position's later layers are not computed.
#[test]
fn logits_are_left_where_they_are_wanted() {
    for (g, backend) in cases() {
        let n = g.tokens.len();
        let mut s = session(&g, backend, 3 * n, 64);
        s.prefill(1, &g.tokens[..3]).unwrap();
        let quiet = BatchEntry { logits: Logits::Nothing, ..entry(1, &g.tokens[3..n / 2]) };
        s.decode(&[entry(0, &g.tokens[..n / 2]), quiet]).unwrap();
        check(&s, 0, &g, n / 2, "wanted");
        assert!(matches!(s.logits(1), Err(Error::InvalidArgument(_))), "{}", g.name);
        assert_eq!(s.len(1).unwrap(), n / 2);
        s.decode(&[entry(1, &g.tokens[n / 2..n / 2 + 1]), entry(0, &g.tokens[n / 2..])]).unwrap();
        check(&s, 1, &g, n / 2 + 1, "after an entry without logits");
        check(&s, 0, &g, n, "at the end");
    }
}

/// Forks that share a part-filled block write into their own copies when they step in one batch.
#[test]
fn forks_step_in_one_batch() {
    for (g, backend) in cases() {
        let n = g.tokens.len();
        // Large enough for blocks of several positions.
        let mut s = session(&g, backend, 64 * SEQUENCES * 16, 64);
        let cut = (n / 2) | 1;
        let other: Vec<i32> = g.tokens[cut..].iter().map(|t| (t + 1) % 100).collect();
        let alone = |tokens: &[i32]| -> Result<Vec<f32>> {
            let mut s = session(&g, backend, n, 64);
            s.prefill(0, &g.tokens[..cut])?;
            s.prefill(0, tokens)?;
            Ok(s.logits(0)?.to_vec())
        };
        s.prefill(0, &g.tokens[..cut]).unwrap();
        s.fork(0, 1).unwrap();
        s.fork(0, 2).unwrap();
        for i in cut..n {
            s.decode(&[
                entry(1, &g.tokens[i..i + 1]),
                entry(2, &other[i - cut..i - cut + 1]),
                entry(0, &g.tokens[i..i + 1]),
            ])
            .unwrap();
            check(&s, 0, &g, i + 1, "source");
            check(&s, 1, &g, i + 1, "fork");
        }
        assert!(difference(s.logits(2).unwrap(), &alone(&other).unwrap()) < rounding(), "{}", g.name);
        for seq in 0..SEQUENCES {
            s.truncate(seq as i64, 0).unwrap();
        }
        assert_eq!((s.usage().used, s.usage().shared), (0, 0));
    }
}

/// More sequences than a pass has rows for: the pass holds what it can, the rest follows.
#[test]
fn many_sequences_step_together() {
    let g = golden().into_iter().find(|g| g.name.contains("cswa-k3")).expect("a checkpoint with three copies");
    let n_sequences = 40;
    let options = SessionOptions {
        n_positions: n_sequences * 32,
        n_sequences,
        cache_type: CacheType::F32,
        max_rows: 3,
        ..Default::default()
    };
    let mut s = Session::new(load(&g.path, BackendKind::Cpu), &options).unwrap();
    for length in [11, 1, 2] {
        let start = s.len(0).unwrap();
        let batch: Vec<_> = (0..n_sequences).map(|seq| entry(seq, &g.tokens[start..start + length])).collect();
        s.decode(&batch).unwrap();
        for seq in 0..n_sequences {
            check(&s, seq, &g, start + length, "of many");
        }
    }
}
