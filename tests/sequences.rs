//! What sequences promise beyond right logits: embeddings, what taking over a prefix costs, who gives way when the pool is full, texts
//! that lose their middle, states of other sessions and forged ones, counters.

#[path = "common/allocations.rs"]
mod allocations;
mod common;

use std::path::Path;

use allocations::LARGEST;
use common::{
    Golden, difference, golden, load, logits_through, on_emulator, one_key_head, one_layer, rounding, with_head_dim,
};
use phd::Error;
use phd::model::BackendKind;
use phd::session::{BatchEntry, CacheType, Logits, Policy, Pooling, Session, SessionOptions, WhenFull};
use xxhash_rust::xxh3::xxh3_64;

const BACKENDS: [BackendKind; 2] = [BackendKind::Reference, BackendKind::Cpu];

fn options(n_positions: usize, n_sequences: usize) -> SessionOptions {
    SessionOptions { n_positions, n_sequences, n_threads: 2, cache_type: CacheType::F32, ..Default::default() }
}

fn named(name: &str) -> Golden {
    golden().into_iter().find(|g| g.name == name).unwrap()
}

fn text(s: &Session, seq: i64) -> Vec<i32> {
    s.tokens(seq).unwrap().map(|t| t as i32).collect()
}

/// The LM head's weights, `(n_vocab, n_embd)`, read from the checkpoint without the library.
fn head(folder: &Path) -> Vec<f32> {
    let mut tied = None;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, tensor) in file.tensors() {
            if !["lm_head.weight", "model.embed_tokens.weight"].contains(&name.as_str()) {
                continue;
            }
            let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
            let data = tensor.data();
            let weights: Vec<f32> = match tensor.dtype() {
                safetensors::Dtype::F32 => data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
                safetensors::Dtype::F16 => data.chunks(2).map(|b| half::f16::from_bits(half(b)).to_f32()).collect(),
                safetensors::Dtype::BF16 => data.chunks(2).map(|b| f32::from_bits(u32::from(half(b)) << 16)).collect(),
                other => panic!("{other:?}"),
            };
            if name == "lm_head.weight" {
                return weights;
            }
            tied = Some(weights);
        }
    }
    tied.unwrap()
}

#[test]
fn embeddings_are_what_the_head_sees() {
    for g in golden() {
        let head = head(&g.path);
        for backend in BACKENDS {
            let model = load(&g.path, backend);
            let n_embd = model.desc().n_embd;
            let mut s = Session::new(model, &options(64, 1)).unwrap();
            let mut embed = |tokens: &[i32], pooling, normalize| {
                let mut out = vec![0.0; n_embd];
                s.truncate(0, 0).unwrap();
                s.embed(0, tokens, pooling, normalize, &mut out).unwrap();
                assert!(s.logits(0).is_err() && s.len(0).unwrap() == tokens.len());
                out
            };
            let n = 24;
            let mut sum = vec![0.0f64; n_embd];
            for i in 0..n {
                let last = embed(&g.tokens[..=i], Pooling::Last, false);
                let logits: Vec<f32> = head
                    .chunks(n_embd)
                    .map(|row| row.iter().zip(&last).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() as f32)
                    .collect();
                let d = difference(&logits, &g.logits[i]);
                assert!(d < rounding(), "{} on {backend:?}: position {i} differs by {d:e}", g.name);
                sum.iter_mut().zip(&last).for_each(|(s, &x)| *s += f64::from(x));
            }
            let expected: Vec<f32> = sum.iter().map(|s| (s / n as f64) as f32).collect();
            let mean = embed(&g.tokens[..n], Pooling::Mean, false);
            let d = difference(&mean, &expected);
            assert!(d < rounding(), "{} on {backend:?}: the mean differs by {d:e}", g.name);
            for pooling in [Pooling::Last, Pooling::Mean] {
                let (plain, unit) = (embed(&g.tokens[..n], pooling, false), embed(&g.tokens[..n], pooling, true));
                let length = plain.iter().map(|x| x * x).sum::<f32>().sqrt();
                let scaled: Vec<f32> = plain.iter().map(|x| x / length).collect();
                assert!(difference(&unit, &scaled) < 1e-5 && (length - 1.0).abs() > 1e-3, "{}: {length}", g.name);
            }
        }
    }
}

/// Taking over a prefix costs hidden rows of one chunk at most, blocks for the tail, and nothing else.
#[test]
fn a_prefix_is_paid_for_once() {
    for g in golden() {
        let model = load(&g.path, BackendKind::Cpu);
        let (rules, n_layers) = (model.desc().rules, model.desc().n_layers);
        let n = g.tokens.len();
        // Enough for blocks of 16.
        let mut s = Session::new(model, &options(64 * 16 * 3, 3)).unwrap();
        let (block, memory) = (s.block(), s.memory());
        assert_eq!(block, 16);
        let mut most = 0;
        // On the emulator a few cuts around a block's end and a chunk's, in each of both ways by turns.
        let cuts: Vec<usize> =
            if on_emulator() { vec![1, 7, 15, 16, 17, n / 2 + 3, n - 2] } else { (1..n - 1).collect() };
        for &cut in &cuts {
            for from_live in [false, true].into_iter().filter(|&l| !on_emulator() || l == cut.is_multiple_of(2)) {
                (0..3).for_each(|seq| s.truncate(seq, 0).unwrap());
                s.prefill(0, &g.tokens).unwrap();
                if !from_live {
                    s.retain(0).unwrap();
                }
                let (usage, rows) = (s.usage(), s.stats().snapshot().rows);
                assert_eq!(s.take_prefix(1, &g.tokens[..cut]).unwrap(), cut);
                let shared = s.usage();
                assert_eq!(
                    shared.used + shared.retained,
                    usage.used + usage.retained,
                    "{}: sharing takes blocks",
                    g.name
                );
                assert_eq!(shared.shared, if from_live { cut.next_multiple_of(block) } else { 0 }, "{}", g.name);
                let tail = &g.tokens[cut..(cut + 3).min(n)];
                s.step(1, tail[0]).unwrap();
                let d = difference(s.logits(1).unwrap(), &g.logits[cut]);
                assert!(d < rounding(), "{}: position {cut} after a prefix differs by {d:e}", g.name);
                let step = rules.copies * n_layers;
                let again = (s.stats().snapshot().rows - rows) as usize - step;
                if rules.chunk > 0 || rules.window == 0 {
                    let positions = if rules.chunk > 0 { cut % rules.chunk } else { 0 };
                    let bound = positions * rules.hidden_copies() * n_layers;
                    assert!(again <= bound, "{}: {again} rows again at {cut}, expected {bound} at most", g.name);
                }
                most = most.max(again);
                tail[1..].iter().for_each(|&t| s.step(1, t).unwrap());
                let grown = s.usage().used + s.usage().retained - usage.used - usage.retained;
                assert_eq!(grown, (cut % block + tail.len()).next_multiple_of(block), "{}: cut at {cut}", g.name);
                assert_eq!(s.memory(), memory);
                s.audit().unwrap();
            }
        }
        assert_eq!(most > 0, rules.window > 0 && rules.hidden_copies() > 0, "{}: {most}", g.name);
    }
}

/// Retained texts give way, the least recently used first and from its end; sequences never do.
#[test]
fn retained_texts_give_way() {
    let g = named("llama-cswa-k2-w16-c32");
    let model = load(&g.path, BackendKind::Cpu);
    let mut s = Session::new(model.clone(), &SessionOptions { n_retained: 3, ..options(128, 1) }).unwrap();
    assert_eq!(s.block(), 16);
    let texts: Vec<Vec<i32>> = (0..4).map(|i| (0..32).map(|j| (i * 40 + j * 3) % 128).collect()).collect();
    let matched = |s: &mut Session| -> Vec<usize> { texts.iter().map(|t| s.match_prefix(t).unwrap().0).collect() };
    for text in &texts[..3] {
        s.prefill(0, text).unwrap();
        s.retain(0).unwrap();
    }
    assert_eq!(matched(&mut s), [32, 32, 32, 0]);
    // The first is used again, so the second is the oldest.
    assert_eq!(s.take_prefix(0, &texts[0]).unwrap(), 32);
    s.truncate(0, 0).unwrap();
    let live: Vec<i32> = (0..128).map(|i| 127 - i % 7).collect();
    let usage = s.usage();
    assert_eq!((usage.used, usage.retained, usage.free), (0, 96, 32));
    let mut at = 0;
    for (to, expected, evicted) in [
        (32, [32, 32, 32], 0),
        (33, [32, 16, 32], 16),
        (48, [32, 16, 32], 16),
        (49, [32, 0, 32], 32),
        (65, [32, 0, 16], 48),
        (96, [32, 0, 0], 64),
        (97, [16, 0, 0], 80),
        (128, [0, 0, 0], 96),
    ] {
        s.prefill(0, &live[at..to]).unwrap();
        at = to;
        assert_eq!(matched(&mut s)[..3], expected, "{to} positions in use");
        assert_eq!(s.stats().snapshot().evicted, evicted, "{to} positions in use");
        s.audit().unwrap();
    }
    assert!(matches!(s.step(0, 1), Err(Error::CacheFull { needed: 1, free: 0 })));
    assert_eq!(text(&s, 0), live);
    let mut fresh = Session::new(model, &options(128, 1)).unwrap();
    fresh.prefill(0, &live).unwrap();
    assert!(difference(s.logits(0).unwrap(), fresh.logits(0).unwrap()) < rounding());

    // A fourth text takes the place of the least recently used of three.
    s.truncate(0, 0).unwrap();
    for text in &texts {
        s.prefill(0, &text[..16]).unwrap();
        s.retain(0).unwrap();
    }
    assert_eq!(matched(&mut s), [0, 16, 16, 16]);
    assert_eq!(s.stats().snapshot().evicted, 96 + 16);
    // A longer text takes the place of its beginning: nothing is given up.
    assert_eq!(s.take_prefix(0, &texts[3]).unwrap(), 16);
    s.prefill(0, &texts[3][16..]).unwrap();
    s.retain(0).unwrap();
    assert_eq!((matched(&mut s), s.stats().snapshot().evicted), (vec![0, 16, 16, 32], 96 + 16));
    assert_eq!(s.usage().retained, 64);
}

/// Thousands of steps in a small session: the length stays within its limit, the beginning stays, numbers stay numbers.
#[test]
fn a_text_without_end_keeps_its_beginning_and_its_limit() {
    for backend in BACKENDS {
        let g = named("llama-cswa-k2-w16-c32");
        let mut s = Session::new(load(&g.path, backend), &options(128, 1)).unwrap();
        let policy = Policy { when_full: WhenFull::DropMiddle { keep: 16 }, limit: 90 };
        s.set_policy(0, policy).unwrap();
        s.prefill(0, &g.tokens).unwrap();
        let n = match backend {
            BackendKind::Cpu if on_emulator() => 250,
            BackendKind::Cpu => 5000,
            _ => 500,
        };
        let mut dropped = 0;
        let mut expected = g.tokens.clone();
        for i in 0..n {
            let token = (i * 29 + i / 128) % 128;
            s.step(0, token).unwrap();
            let now = s.dropped(0).unwrap();
            expected.drain(16..16 + now - dropped);
            dropped = now;
            expected.push(token);
            assert!(s.len(0).unwrap() <= 90 && dropped.is_multiple_of(32));
            assert!(s.logits(0).unwrap().iter().all(|x| x.is_finite()), "step {i}");
        }
        assert_eq!(text(&s, 0), expected);
        assert_eq!(s.stats().snapshot().dropped as usize, dropped);
        assert!(dropped + 90 > n as usize && s.usage().used <= 96);
        s.audit().unwrap();
    }
}

/// With one layer, keys and values depend on token and position alone. So after a drop the sequence must be what a fresh prefill of
/// the shortened text is, with its chunk borders where that has them.
#[test]
fn what_is_left_after_a_drop_is_a_text_of_its_own() {
    for g in golden().into_iter().filter(|g| g.path.join("model.safetensors").exists()) {
        let folder = tempfile::tempdir().unwrap();
        let model = load(&one_layer(&g.path, folder.path()), BackendKind::Cpu);
        let mut fresh = Session::new(model.clone(), &options(160, 1)).unwrap();
        for (keep, piece) in [(0, 1), (1, 1), (16, 7)] {
            let mut s = Session::new(model.clone(), &options(160, 1)).unwrap();
            s.set_policy(0, Policy { when_full: WhenFull::DropMiddle { keep }, limit: 0 }).unwrap();
            let (mut dropped, mut drops) = (0, 0);
            // On the emulator as few drops as tell.
            for i in 0..500 / piece {
                if on_emulator() && drops == 3 {
                    break;
                }
                let tokens: Vec<i32> = (0..piece).map(|j| (i * piece + j) * 53 % 127).collect();
                s.prefill(0, &tokens).unwrap();
                let now = s.dropped(0).unwrap();
                // At the drop, and within the chunks after it.
                if now > dropped || (dropped > 0 && i % 11 == 0) {
                    drops += usize::from(now > dropped);
                    fresh.truncate(0, 0).unwrap();
                    fresh.prefill(0, &text(&s, 0)).unwrap();
                    let d = difference(s.logits(0).unwrap(), fresh.logits(0).unwrap());
                    assert!(d < rounding(), "{}, keep {keep}: drop {drops} differs by {d:e}", g.name);
                }
                dropped = now;
            }
            assert!(drops >= 3, "{}: {drops} drops", g.name);
        }
    }
}

/// One key/value head is cut by its queries where two threads share it, and its context where that is long; heads of any even dimension,
/// of which a vector holds a part or more than one.
#[test]
fn threads_and_the_shape_of_heads_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let new = |name: String| {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let goldens = golden().into_iter().filter(|g| g.path.join("model.safetensors").exists());
    let mut paths: Vec<_> = goldens.map(|g| one_key_head(&g.path, &new(g.name))).collect();
    for name in ["llama-cswa-k4-w5-c6", "qwen3-cswa-k4-w3-c8", "llama-vanilla"] {
        for dim in [6, 8, 24, 100] {
            let path = with_head_dim(&named(name).path, dim, &new(format!("{name}, heads of {dim}")));
            paths.push(one_key_head(&path, &new(format!("{name}, one head of {dim}"))));
            paths.push(path);
        }
    }
    let tokens: Vec<i32> = (0..300).map(|i| i * 53 % 127).collect();
    for path in paths {
        let run = |backend, n_threads, cache_type| -> Vec<Vec<f32>> {
            let o = SessionOptions { n_threads, cache_type, ..options(320, 1) };
            let mut s = Session::new(load(&path, backend), &o).unwrap();
            // A prompt, steps, and a long context's.
            logits_through(&mut s, &tokens, &[(100, 106), (296, 300)])
        };
        // Keys that two backends round may come out as neighbouring values.
        for (kind, bound) in [(CacheType::F32, rounding()), (CacheType::F16, 1e-2), (CacheType::Q8_0, 2e-2)] {
            let expected = run(BackendKind::Reference, 1, kind);
            let alone = run(BackendKind::Cpu, 1, kind);
            assert!(
                alone == run(BackendKind::Cpu, 2, kind),
                "{}, {kind:?}: two threads differ from one",
                path.display()
            );
            for (i, (found, expected)) in alone.iter().zip(&expected).enumerate() {
                let d = difference(found, expected);
                assert!(d < bound, "{}, {kind:?}: logits {i} differ by {d:e}", path.display());
            }
        }
    }
}

/// Beyond 8,192 positions a context's parts are longer than before. A pass may hold rows of either length, and steps, whose contexts
/// threads share, compute what such a pass does.
#[test]
fn long_contexts_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let narrow = tempfile::tempdir().unwrap();
    let path = one_layer(&named("llama-cswa-k4-w5-c6").path, folder.path());
    let path = one_key_head(&path, narrow.path());
    let tokens: Vec<i32> = (0..8_200).map(|i| i * 53 % 127).collect();
    for kind in [CacheType::F32, CacheType::F16] {
        let o = SessionOptions { cache_type: kind, ..options(8_200, 1) };
        let new = || Session::new(load(&path, BackendKind::Cpu), &o).unwrap();
        let (mut steps, mut prompt) = (new(), new());
        steps.prefill(0, &tokens[..8_188]).unwrap();
        tokens[8_188..].iter().for_each(|&token| steps.step(0, token).unwrap());
        prompt.prefill(0, &tokens[..8_180]).unwrap();
        prompt.prefill(0, &tokens[8_180..]).unwrap();
        assert!(prompt.logits(0).unwrap() == steps.logits(0).unwrap(), "{kind:?}: steps differ from a prompt");
        if kind == CacheType::F32 {
            let mut reference = Session::new(load(&path, BackendKind::Reference), &o).unwrap();
            reference.prefill(0, &tokens).unwrap();
            let d = difference(steps.logits(0).unwrap(), reference.logits(0).unwrap());
            assert!(d < rounding(), "differs from the reference by {d:e}");
        }
    }
}

#[test]
fn a_call_cancelled_at_a_drop_changes_nothing() {
    let g = named("llama-cswa-k2-w16-c32");
    for backend in BACKENDS {
        let model = load(&g.path, backend);
        let mut sessions: Vec<Session> = (0..2)
            .map(|_| {
                let mut s = Session::new(model.clone(), &SessionOptions { max_rows: 4, ..options(128, 1) }).unwrap();
                let policy = Policy { when_full: WhenFull::DropMiddle { keep: 16 }, limit: 80 };
                s.set_policy(0, policy).unwrap();
                s.prefill(0, &g.tokens[..79]).unwrap();
                s
            })
            .collect();
        let (a, b) = sessions.split_at_mut(1);
        let (s, twin) = (&mut a[0], &mut b[0]);
        let (logits, usage) = (s.logits(0).unwrap().to_vec(), s.usage());
        // Before the first pass, and between the passes over the new tokens.
        for passes in 0..3 {
            if passes == 0 {
                s.cancel_handle().cancel(0).unwrap();
            }
            let mut left = passes;
            s.set_progress(Some(Box::new(move |_| {
                left -= 1;
                left > 0
            })));
            assert!(matches!(s.prefill(0, &g.tokens[..20]), Err(Error::Cancelled)), "after {passes}");
            s.set_progress(None);
            assert_eq!(text(s, 0), g.tokens[..79]);
            assert_eq!((s.logits(0).unwrap(), s.usage(), s.dropped(0).unwrap()), (&logits[..], usage, 0));
            s.audit().unwrap();
        }
        for &token in &g.tokens[..40] {
            s.step(0, token).unwrap();
            twin.step(0, token).unwrap();
            assert!(difference(s.logits(0).unwrap(), twin.logits(0).unwrap()) < rounding());
        }
        assert!(s.dropped(0).unwrap() > 0 && s.dropped(0).unwrap() == twin.dropped(0).unwrap());
    }
}

fn save(s: &Session, seq: i64) -> Vec<u8> {
    let mut blob = vec![0; s.save_size(seq).unwrap()];
    s.save(seq, &mut blob).unwrap();
    blob
}

#[test]
fn a_saved_sequence_goes_on_anywhere() {
    for (index, g) in golden().into_iter().enumerate() {
        let models = BACKENDS.map(|backend| load(&g.path, backend));
        let cut = g.tokens.len() / 2 + 1;
        let n = if on_emulator() { cut + 12 } else { g.tokens.len() };
        // Keys that two backends round to a cache type may come out as neighbouring values.
        let types =
            [(CacheType::F32, rounding()), (CacheType::F16, 2e-3), (CacheType::Bf16, 1.6e-2), (CacheType::Q8_0, 5e-2)];
        for (i, (cache_type, bound)) in types.into_iter().enumerate() {
            // As in tests/golden.rs: each checkpoint with one type on the emulator.
            if on_emulator() && !(index + i).is_multiple_of(types.len()) {
                continue;
            }
            let options = SessionOptions { cache_type, ..options(n, 1) };
            for from in &models {
                let mut source = Session::new(from.clone(), &options).unwrap();
                source.prefill(0, &g.tokens[..cut]).unwrap();
                let blob = save(&source, 0);
                let logits = source.logits(0).unwrap().to_vec();
                let mut expected = Vec::new();
                for &token in &g.tokens[cut..n] {
                    source.step(0, token).unwrap();
                    expected.push(source.logits(0).unwrap().to_vec());
                }
                for to in &models {
                    let mut s = Session::new(to.clone(), &options).unwrap();
                    s.prefill(0, &g.tokens[5..15]).unwrap();
                    s.restore(0, &blob).unwrap();
                    assert_eq!((s.logits(0).unwrap(), text(&s, 0)), (&logits[..], g.tokens[..cut].to_vec()));
                    // The CPU keeps f16 as integers, which the smallest elements of a head are rounded to: once.
                    let again = save(&s, 0);
                    if cache_type == CacheType::F16 && !std::sync::Arc::ptr_eq(from, to) {
                        let mut third = Session::new(to.clone(), &options).unwrap();
                        third.restore(0, &again).unwrap();
                        assert_eq!(save(&third, 0), again, "{}: saved a third time", g.name);
                    } else {
                        assert_eq!(again, blob, "{}: saved again", g.name);
                    }
                    for (i, expected) in expected.iter().enumerate() {
                        s.step(0, g.tokens[cut + i]).unwrap();
                        let d = difference(s.logits(0).unwrap(), expected);
                        let bound = if std::sync::Arc::ptr_eq(from, to) { bound.min(1e-3) } else { bound };
                        assert!(d < bound, "{} {cache_type:?}: step {i} after the restore differs by {d:e}", g.name);
                    }
                    s.audit().unwrap();
                }
            }
        }
    }
}

/// A session with a short text, what must be refused on it, and the text's blob.
fn target() -> (Session, Vec<u8>) {
    let g = named("llama-cswa-k2-w16-c32");
    let mut s = Session::new(load(&g.path, BackendKind::Cpu), &options(32, 2)).unwrap();
    s.prefill(1, &g.tokens[..2]).unwrap();
    let blob = save(&s, 1);
    s.prefill(0, &g.tokens[4..9]).unwrap();
    (s, blob)
}

/// Restoring must fail with a sentence that contains `what`, change nothing and allocate no more than the blob's size.
fn refused(s: &mut Session, blob: &[u8], what: &str) {
    let (logits, tokens, usage) = (s.logits(0).unwrap().to_vec(), text(s, 0), s.usage());
    LARGEST.set(0);
    let error = s.restore(0, blob).unwrap_err();
    let largest = LARGEST.get();
    let sentence = error.to_string();
    assert!(matches!(error, Error::InvalidArgument(_)) && sentence.contains(what), "{what}: {sentence}");
    assert!(largest <= blob.len().max(1024), "{what}: {largest} bytes allocated for a blob of {}", blob.len());
    assert_eq!((s.logits(0).unwrap(), text(s, 0), s.usage()), (&logits[..], tokens, usage), "{what}");
}

#[test]
fn damaged_states_are_refused() {
    let (mut s, mut blob) = target();
    for bit in 0..8 * blob.len() {
        blob[bit / 8] ^= 1 << (bit % 8);
        refused(&mut s, &blob, "the saved state");
        blob[bit / 8] ^= 1 << (bit % 8);
    }
    for n in 0..blob.len() {
        refused(&mut s, &blob[..n], "the saved state");
    }
    let longer = [&blob[..], &[0]].concat();
    refused(&mut s, &longer, "the saved state");
    s.restore(0, &blob).unwrap();
}

/// Blobs with a right checksum and wrong contents. Offsets are those of the format's description in src/state.rs.
#[test]
fn forged_states_are_refused() {
    let (mut s, blob) = target();
    let seal = |mut body: Vec<u8>| {
        let checksum = xxh3_64(&body);
        body.extend(checksum.to_le_bytes());
        body
    };
    let body = blob[..blob.len() - 8].to_vec();
    assert_eq!(seal(body.clone()), blob, "the test knows the format");
    let with = |at: usize, bytes: &[u8]| {
        let mut body = body.clone();
        body[at..at + bytes.len()].copy_from_slice(bytes);
        seal(body)
    };
    let (positions, tokens, logits) = (48, 64, 64 + 2 * 4);
    let rows = logits + 128 * 4;
    for n in [0, 1, 3, 4, 1 << 23, 1 << 32, 1 << 60, u64::MAX / 1536, u64::MAX / 4, u64::MAX] {
        refused(&mut s, &with(positions, &u64::to_le_bytes(n)), "positions need");
    }
    for id in [128, 1 << 31, u32::MAX] {
        refused(&mut s, &with(tokens + 4, &u32::to_le_bytes(id)), &format!("token 1 of the saved state is {id}"));
    }
    for (at, what) in
        [(8, "version"), (12, "cache type"), (16, "another model"), (32, "shape"), (36, "shape"), (40, "shape")]
    {
        refused(&mut s, &with(at, &u32::to_le_bytes(77)), what);
    }
    for flag in [2, u32::MAX] {
        refused(&mut s, &with(44, &u32::to_le_bytes(flag)), "logits flag");
    }
    refused(&mut s, &with(44, &u32::to_le_bytes(0)), "positions need");
    for dropped in [u64::MAX, 1 << 32, u64::from(u32::MAX) / 2] {
        refused(&mut s, &with(56, &u64::to_le_bytes(dropped)), "positions dropped");
    }
    refused(&mut s, &with(logits + 4, &f32::NAN.to_le_bytes()), "logits that are no numbers");
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [rows, rows + 128, body.len() - 4] {
            refused(&mut s, &with(at, &wrong.to_le_bytes()), "not finite");
        }
    }
    // No text, but logits.
    let mut empty = body[..tokens].to_vec();
    empty[positions..positions + 8].fill(0);
    empty.extend(&body[logits..rows]);
    refused(&mut s, &seal(empty), "0 positions");
    refused(&mut s, &[], "0 bytes");

    // Room is a matter of the session, not of the blob.
    let g = named("llama-cswa-k2-w16-c32");
    let mut large = Session::new(s.model().clone(), &options(64, 1)).unwrap();
    large.prefill(0, &g.tokens[..33]).unwrap();
    let usage = s.usage();
    assert!(matches!(s.restore(0, &save(&large, 0)), Err(Error::CacheFull { needed: 33, .. })));
    assert_eq!(s.usage(), usage);

    // Other weights; other rules.
    let other = load(&named("llama-swa-k2-w4").path, BackendKind::Cpu);
    let rules = s.model().with_rules((3, 16, 32)).unwrap();
    for model in [other, std::sync::Arc::new(rules)] {
        let mut other = Session::new(model, &options(32, 2)).unwrap();
        other.prefill(0, &[1]).unwrap();
        refused(&mut other, &blob, "another model");
    }
    // The half-precision forms of what is not finite.
    for (cache_type, wrong) in [(CacheType::F16, 0x7c01u16), (CacheType::Q8_0, 0x7c00), (CacheType::Bf16, 0x7f80)] {
        let options = SessionOptions { cache_type, ..options(32, 2) };
        let mut s = Session::new(s.model().clone(), &options).unwrap();
        s.prefill(0, &g.tokens[..2]).unwrap();
        let mut body = save(&s, 0);
        body.truncate(body.len() - 8);
        body[rows..rows + 2].copy_from_slice(&wrong.to_le_bytes());
        refused(&mut s, &seal(body), "not finite");
    }
    // Rows of another type, even of as many bytes.
    let mut sessions = [CacheType::F32, CacheType::F16, CacheType::Q8_0, CacheType::Bf16].map(|cache_type| {
        let mut other = Session::new(s.model().clone(), &SessionOptions { cache_type, ..options(32, 2) }).unwrap();
        other.prefill(0, &g.tokens[..2]).unwrap();
        other
    });
    let blobs = sessions.each_ref().map(|s| save(s, 0));
    for s in &mut sessions {
        let own = s.cache_type() as usize;
        for (found, blob) in blobs.iter().enumerate().filter(|&(i, _)| i != own) {
            refused(s, blob, &format!("cache type {found}, expected {own}"));
        }
    }
    s.restore(0, &blob).unwrap();
}

#[test]
fn state_files() {
    let (mut s, blob) = target();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    assert!(matches!(s.restore_file(0, &path), Err(Error::Io { .. })));
    assert!(matches!(s.restore_file(0, folder.path()), Err(Error::Io { .. })));
    // A file of a terabyte, sparse: nobody reads it.
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    LARGEST.set(0);
    let error = s.restore_file(0, &path).unwrap_err();
    assert!(LARGEST.get() < 4096 && matches!(error, Error::Format { .. }), "{error}, {} bytes", LARGEST.get());
    std::fs::write(&path, &blob[..blob.len() - 1]).unwrap();
    assert!(matches!(s.restore_file(0, &path), Err(Error::Format { .. })));
    s.save_file(1, &path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), blob);
    s.restore_file(0, &path).unwrap();
    assert_eq!(save(&s, 0), blob);
    assert!(matches!(s.save_file(1, &folder.path().join("no/such/folder")), Err(Error::Io { .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn counters_add_up() {
    let g = named("llama-vanilla");
    let model = load(&g.path, BackendKind::Cpu);
    let n_layers = model.desc().n_layers as u64;
    let mut s = Session::new(model, &SessionOptions { max_rows: 8, ..options(32, 2) }).unwrap();
    let stats = s.stats().clone();
    assert_eq!(stats.snapshot(), Default::default());
    let t = &g.tokens;
    s.prefill(0, &t[..10]).unwrap(); // two passes
    let first = stats.snapshot();
    assert_eq!((first.prompt_tokens, first.step_tokens, first.calls, first.passes), (10, 0, 1, 2));
    assert!(first.rows == 10 * n_layers && !first.prefill.is_zero() && first.step.is_zero());
    s.step(0, t[10]).unwrap();
    s.step(0, t[11]).unwrap();
    let steps = stats.snapshot();
    assert_eq!((steps.prompt_tokens, steps.step_tokens, steps.calls, steps.passes), (10, 2, 3, 4));
    assert!(steps.prefill == first.prefill && !steps.step.is_zero());
    let entry = |seq, tokens| BatchEntry { seq, tokens, logits: Logits::Nothing };
    s.decode(&[entry(0, &t[12..13]), entry(1, &t[..5])]).unwrap();
    s.score(1, &t[5..8]).unwrap();
    let mixed = stats.snapshot();
    assert_eq!((mixed.prompt_tokens, mixed.step_tokens, mixed.calls, mixed.rows), (18, 3, 5, 21 * n_layers));
    assert!(mixed.step == steps.step && mixed.prefill > steps.prefill);
    s.cancel_handle().cancel(0).unwrap();
    s.step(0, 1).unwrap_err();
    s.prefill(0, t).unwrap_err();
    s.step(0, -1).unwrap_err();
    let failed = stats.snapshot();
    assert_eq!((failed.calls, failed.cancelled, failed.full, failed.rows), (8, 1, 1, mixed.rows));
    s.retain(0).unwrap();
    assert_eq!(s.take_prefix(0, &t[..6]).unwrap(), 6);
    assert_eq!(s.take_prefix(1, &t[1..6]).unwrap(), 0);
    s.match_prefix(&t[..4]).unwrap();
    let prefix = stats.snapshot();
    assert_eq!((prefix.prefix_lookups, prefix.prefix_hits, prefix.prefix_tokens), (2, 1, 6));
    s.prefill(0, &t[6..32]).unwrap();
    let last = stats.snapshot();
    // The prefix was sequence 1's, so that nothing of the retained text was in use.
    assert_eq!((last.evicted, last.dropped, last.calls, last.wait.is_zero()), (13, 0, 9, true));
}
