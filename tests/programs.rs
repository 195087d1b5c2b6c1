//! Random programs over many sequences, against the plain reference model: whatever was opened, extended in pieces and batches, forked,
//! cut, cancelled, retained, taken over, saved, restored, evicted or dropped before, a sequence's logits are those of its text, and the
//! pool's accounting is exact after every operation. A failing program is shrunk and printed.
//!
//! `PHD_PROGRAMS` is the number of programs to each checkpoint and backend.

mod common;

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use common::{difference, golden, load, one_layer, rounding};
use phd::model::{BackendKind, Model};
use phd::session::{BatchEntry, CacheType, Logits, Policy, Pooling, Session, SessionOptions, WhenFull};
use phd::{Error, Result};
use proptest::prelude::*;
use proptest::test_runner::{Config, FailurePersistence, TestCaseError, TestRunner};

const SEQUENCES: usize = 4;
const POSITIONS: usize = 96;
const DRAFT: usize = 3;

#[derive(Clone, Debug)]
enum Op {
    /// One entry to each of the first sequences from `first` on: so many tokens, and which logits.
    Extend {
        first: usize,
        entries: Vec<(Vec<i32>, u8)>,
        cancel: Option<u8>,
    },
    Fork(usize, usize),
    Truncate(usize, usize),
    Retain(usize),
    /// The beginning of another sequence's or an earlier text, with more tokens after it.
    TakePrefix {
        seq: usize,
        like: usize,
        n: usize,
        more: Vec<i32>,
    },
    /// Saved, and restored into another sequence, perhaps of another session of the same kind.
    SaveRestore {
        src: usize,
        dst: usize,
        damage: Option<u16>,
    },
    Policy {
        seq: usize,
        drops: bool,
        keep: usize,
        limit: usize,
    },
    Score(usize, Vec<i32>),
    Embed(usize, Vec<i32>),
}

fn tokens(most: usize) -> impl Strategy<Value = Vec<i32>> {
    // Few different ones, so that texts have prefixes in common.
    prop::collection::vec(1..4i32, 1..=most)
}

fn op() -> impl Strategy<Value = Op> {
    let seq = 0..SEQUENCES;
    prop_oneof![
        8 => (seq.clone(), prop::collection::vec((tokens(12), 0..3u8), 1..=SEQUENCES), prop::option::weighted(0.15, 0..3u8))
            .prop_map(|(first, entries, cancel)| Op::Extend { first, entries, cancel }),
        1 => (seq.clone(), seq.clone()).prop_map(|(a, b)| Op::Fork(a, b)),
        2 => (seq.clone(), 0..40usize).prop_map(|(s, n)| Op::Truncate(s, n)),
        2 => seq.clone().prop_map(Op::Retain),
        2 => (seq.clone(), 0..8usize, 0..40usize, tokens(4))
            .prop_map(|(seq, like, n, more)| Op::TakePrefix { seq, like, n, more }),
        1 => (seq.clone(), seq.clone(), prop::option::weighted(0.3, any::<u16>()))
            .prop_map(|(src, dst, damage)| Op::SaveRestore { src, dst, damage }),
        1 => (seq.clone(), any::<bool>(), 0..6usize, 0..60usize)
            .prop_map(|(seq, drops, keep, limit)| Op::Policy { seq, drops, keep, limit }),
        1 => (seq.clone(), tokens(20)).prop_map(|(s, t)| Op::Score(s, t)),
        1 => (seq, tokens(6)).prop_map(|(s, t)| Op::Embed(s, t)),
    ]
}

/// What the reference model says of texts, computed once each.
struct Oracle {
    session: RefCell<Session>,
    logits: RefCell<HashMap<Vec<i32>, Arc<Vec<f32>>>>,
}

impl Oracle {
    fn new(path: &Path) -> Oracle {
        let options = SessionOptions { n_positions: POSITIONS, cache_type: CacheType::F32, ..Default::default() };
        let session = RefCell::new(Session::new(load(path, BackendKind::Reference), &options).unwrap());
        Oracle { session, logits: RefCell::default() }
    }

    fn logits(&self, text: &[i32]) -> Arc<Vec<f32>> {
        let compute = || {
            let mut s = self.session.borrow_mut();
            s.truncate(0, 0).unwrap();
            s.prefill(0, text).unwrap();
            Arc::new(s.logits(0).unwrap().to_vec())
        };
        self.logits.borrow_mut().entry(text.to_vec()).or_insert_with(compute).clone()
    }
}

/// What a sequence must be.
#[derive(Clone, Debug, Default)]
struct Text {
    tokens: Vec<i32>,
    dropped: usize,
    has_logits: bool,
    /// Tokens of the last entry whose logits there are.
    n_every: usize,
    policy: Policy,
}

struct Program<'a> {
    session: Session,
    oracle: &'a Oracle,
    texts: Vec<Text>,
    /// Texts that were retained at some time.
    past: Vec<Vec<i32>>,
    /// With one layer, keys and values depend on token and position alone: then a text without its middle is a text of its own.
    has_one_layer: bool,
}

impl<'a> Program<'a> {
    fn new(model: &Arc<Model>, oracle: &'a Oracle) -> Program<'a> {
        let options = SessionOptions {
            n_positions: POSITIONS,
            n_sequences: SEQUENCES,
            n_threads: 2,
            cache_type: CacheType::F32,
            n_retained: 3,
            n_draft: DRAFT,
            max_rows: 13,
            ..Default::default()
        };
        Program {
            session: Session::new(model.clone(), &options).unwrap(),
            oracle,
            texts: vec![Text::default(); SEQUENCES],
            past: Vec::new(),
            has_one_layer: model.desc().n_layers == 1,
        }
    }

    fn close(&self, found: &[f32], text: &[i32], what: &str) {
        let d = difference(found, &self.oracle.logits(text));
        assert!(d < rounding(), "{what}: logits after {text:?} differ by {d:e}");
    }

    /// After each operation.
    fn check(&self, op: &Op) {
        self.session.audit().unwrap_or_else(|e| panic!("{op:?}: {e}"));
        let usage = self.session.usage();
        let whole = (POSITIONS as u64).next_multiple_of(self.session.block() as u64) as usize;
        assert_eq!(usage.used + usage.free + usage.retained, whole, "{op:?}: {usage:?}");
        for (i, text) in self.texts.iter().enumerate() {
            let (seq, s) = (i as i64, &self.session);
            let what = format!("after {op:?}: sequence {i}");
            assert_eq!(s.len(seq).unwrap(), text.tokens.len(), "{what}");
            assert!(s.tokens(seq).unwrap().eq(text.tokens.iter().map(|&t| t as u32)), "{what}");
            assert_eq!(s.dropped(seq).unwrap(), text.dropped, "{what}");
            assert_eq!(s.logits(seq).is_ok(), text.has_logits, "{what}");
            if text.has_logits && (text.dropped == 0 || self.has_one_layer) {
                self.close(s.logits(seq).unwrap(), &text.tokens, &what);
                let n = text.tokens.len() - text.n_every;
                for at in 0..text.n_every {
                    self.close(s.logits_at(seq, at).unwrap(), &text.tokens[..n + at + 1], &what);
                }
            }
            assert!(s.logits_at(seq, text.n_every).is_err(), "{what}");
        }
    }

    /// What the policy makes of a text before `n` more: `Err` if it has no room.
    fn dropped(&self, text: &Text, n: usize) -> Result<Option<(usize, usize)>, ()> {
        let (len, limit) = (text.tokens.len(), text.policy.limit);
        if limit == 0 || len + n <= limit {
            return Ok(None);
        }
        let WhenFull::DropMiddle { keep } = text.policy.when_full else { return Err(()) };
        let rules = self.session.model().desc().rules;
        let block = self.session.block();
        let unit = (1..).map(|i| i * block).find(|u| u % rules.chunk.max(1) == 0).unwrap();
        let keep = keep.next_multiple_of(block);
        let rest = len.saturating_sub(keep);
        let d = (len + n - limit).max(rest / 2).next_multiple_of(unit).min(rest / unit * unit);
        if len + n - d > limit { Err(()) } else { Ok(Some((keep, d))) }
    }

    fn extend(&mut self, first: usize, entries: &[(Vec<i32>, u8)], cancel: Option<u8>) {
        let kinds = [Logits::Nothing, Logits::Last, Logits::Every];
        let batch: Vec<BatchEntry> = entries
            .iter()
            .enumerate()
            .map(|(i, (tokens, kind))| {
                // A draft's verification is short.
                let kind = if tokens.len() > DRAFT + 1 { *kind as usize % 2 } else { *kind as usize };
                BatchEntry { seq: ((first + i) % SEQUENCES) as i64, tokens, logits: kinds[kind] }
            })
            .collect();
        if let Some(after) = cancel {
            let mut left = after;
            self.session.set_progress(Some(Box::new(move |_| {
                left = left.saturating_sub(1);
                left > 0
            })));
        }
        let before = self.session.usage();
        let result = self.session.decode(&batch);
        self.session.set_progress(None);
        let plans: Vec<_> = batch.iter().map(|e| self.dropped(&self.texts[e.seq as usize], e.tokens.len())).collect();
        match result {
            Ok(()) => {
                if batch.iter().any(|e| e.logits == Logits::Every) {
                    self.texts.iter_mut().for_each(|t| t.n_every = 0);
                }
                for (e, plan) in batch.iter().zip(plans) {
                    let text = &mut self.texts[e.seq as usize];
                    if let Some((keep, d)) = plan.expect("a sequence without room was extended") {
                        text.tokens.drain(keep..keep + d);
                        text.dropped += d;
                    }
                    text.tokens.extend(e.tokens);
                    text.has_logits = e.logits != Logits::Nothing;
                    text.n_every = if e.logits == Logits::Every { e.tokens.len() } else { 0 };
                }
            }
            Err(Error::CacheFull { needed, free }) => {
                assert!(needed > free, "{needed} needed, {free} free");
                let after = self.session.usage();
                assert_eq!(after, before);
                // There was a reason: a limit, or too few blocks for all (each may waste a block's part and copy a shared one).
                let total: usize = batch.iter().map(|e| e.tokens.len()).sum();
                let block = self.session.block();
                let is_limited = plans.iter().any(|p| !matches!(p, Ok(None)));
                assert!(is_limited || total + 2 * batch.len() * block > before.free + before.retained, "{before:?}");
            }
            Err(Error::Cancelled) => {
                assert!(cancel.is_some());
                // Rows of all positions may have been written by then.
                if batch.iter().any(|e| e.logits == Logits::Every) {
                    self.texts.iter_mut().for_each(|t| t.n_every = 0);
                }
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Extend { first, entries, cancel } => self.extend(*first, entries, *cancel),
            &Op::Fork(src, dst) => {
                self.session.fork(src as i64, dst as i64).unwrap();
                if src != dst {
                    let policy = self.texts[dst].policy;
                    self.texts[dst] = Text { policy, n_every: 0, ..self.texts[src].clone() };
                }
            }
            &Op::Truncate(seq, n) => {
                let text = &mut self.texts[seq];
                let n = n.min(text.tokens.len());
                self.session.truncate(seq as i64, n).unwrap();
                if n < text.tokens.len() {
                    (text.has_logits, text.n_every) = (false, 0);
                    text.tokens.truncate(n);
                    text.dropped = if n == 0 { 0 } else { text.dropped };
                }
            }
            &Op::Retain(seq) => {
                self.session.retain(seq as i64).unwrap();
                let policy = self.texts[seq].policy;
                let text = std::mem::replace(&mut self.texts[seq], Text { policy, ..Text::default() });
                if text.dropped == 0 {
                    self.past.push(text.tokens);
                }
            }
            Op::TakePrefix { seq, like, n, more } => {
                let like = match self.texts.get(*like) {
                    Some(text) => text.tokens.clone(),
                    None if self.past.is_empty() => Vec::new(),
                    None => self.past[like % self.past.len()].clone(),
                };
                let wanted: Vec<i32> = like.iter().take(*n).chain(more).copied().collect();
                let common = |text: &[i32]| text.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
                let live = self.texts.iter().filter(|t| t.dropped == 0).map(|t| common(&t.tokens)).max().unwrap_or(0);
                let past = self.past.iter().map(|t| common(t)).max().unwrap_or(0);
                let (matched, _) = self.session.match_prefix(&wanted).unwrap();
                let found = self.session.take_prefix(*seq as i64, &wanted).unwrap();
                assert!(found == matched && live <= found && found <= live.max(past), "{found} of {live} and {past}");
                let policy = self.texts[*seq].policy;
                self.texts[*seq] = Text { tokens: wanted[..found].to_vec(), policy, ..Text::default() };
            }
            &Op::SaveRestore { src, dst, damage } => {
                let mut blob = vec![0; self.session.save_size(src as i64).unwrap()];
                self.session.save(src as i64, &mut blob).unwrap();
                if let Some(at) = damage {
                    let at = at as usize % blob.len();
                    blob[at] ^= 1 << (at % 8);
                    let before = self.session.usage();
                    self.session.restore(dst as i64, &blob).unwrap_err();
                    assert_eq!(self.session.usage(), before);
                    return;
                }
                match self.session.restore(dst as i64, &blob) {
                    Ok(()) => {
                        let policy = self.texts[dst].policy;
                        self.texts[dst] = Text { policy, n_every: 0, ..self.texts[src].clone() };
                    }
                    Err(Error::CacheFull { needed, free }) => assert!(needed > free && free < POSITIONS),
                    Err(e) => panic!("{e}"),
                }
            }
            &Op::Policy { seq, drops, keep, limit } => {
                let when_full = if drops { WhenFull::DropMiddle { keep } } else { WhenFull::Stop };
                if self.session.set_policy(seq as i64, Policy { when_full, limit }).is_ok() {
                    let block = self.session.block();
                    let most = POSITIONS - (keep.next_multiple_of(block) + block);
                    let limit = if drops && limit == 0 { most } else { limit };
                    self.texts[seq].policy = Policy { when_full, limit };
                }
            }
            Op::Score(seq, tokens) | Op::Embed(seq, tokens) => {
                let text = &self.texts[*seq];
                let plan = self.dropped(text, tokens.len());
                let result = if let Op::Score(..) = op {
                    self.session.score(*seq as i64, tokens).map(|scores| assert_eq!(scores.len() + 1, tokens.len()))
                } else {
                    let mut out = vec![0.0; self.session.model().desc().n_embd];
                    self.session.embed(*seq as i64, tokens, Pooling::Mean, true, &mut out).map(|()| {
                        let length: f32 = out.iter().map(|x| x * x).sum();
                        assert!((length - 1.0).abs() < 1e-4, "{length}");
                    })
                };
                match (result, plan) {
                    (Ok(()), Ok(plan)) => {
                        self.texts.iter_mut().for_each(|t| t.n_every = 0);
                        let text = &mut self.texts[*seq];
                        if let Some((keep, d)) = plan {
                            text.tokens.drain(keep..keep + d);
                            text.dropped += d;
                        }
                        text.tokens.extend(tokens);
                        text.has_logits = false;
                    }
                    (Err(Error::CacheFull { .. }), _) => {}
                    (result, plan) => panic!("{result:?} {plan:?}"),
                }
            }
        }
        self.check(op);
    }
}

fn run_programs(path: &Path, backend: BackendKind, cases: u32) {
    let (model, oracle) = (load(path, backend), Oracle::new(path));
    let config = Config {
        cases,
        max_shrink_iters: 4096,
        failure_persistence: None::<Box<dyn FailurePersistence>>,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&prop::collection::vec(op(), 1..40), |ops| {
        let run = || {
            let mut program = Program::new(&model, &oracle);
            ops.iter().for_each(|op| program.run(op));
            let memory = program.session.memory();
            for seq in 0..SEQUENCES {
                program.session.truncate(seq as i64, 0).unwrap();
            }
            assert_eq!(program.session.usage().used, 0, "positions leaked");
            assert!(program.session.memory().cache == memory.cache && program.session.memory().hidden == memory.hidden);
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(|panic| {
            let what = panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "panic".to_owned());
            TestCaseError::fail(what)
        })
    });
    if let Err(e) = outcome {
        panic!("{} on {backend:?}: {e}", path.display());
    }
}

#[test]
fn random_programs_agree_with_the_reference() {
    let cases = std::env::var("PHD_PROGRAMS").ok().map_or(24, |n| n.parse().expect("PHD_PROGRAMS is a number"));
    let folder = tempfile::tempdir().unwrap();
    for g in golden() {
        run_programs(&g.path, BackendKind::Cpu, cases);
        // Its logits are the oracle's to the bit if the schedule is right: cheap to shrink, and no kernel to blame.
        run_programs(&g.path, BackendKind::Reference, cases / 2);
        if g.path.join("model.safetensors").exists() {
            let path = one_layer(&g.path, folder.path());
            run_programs(&path, BackendKind::Cpu, cases);
        }
    }
}
