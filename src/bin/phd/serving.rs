//! `phd bench --cancel` and `--prefix`: what a server waits for.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use phd::Error;
use serde_json::json;

use crate::{Common, Failure, mib};

/// Tokens that a request has beyond the shared prefix.
const TAIL: usize = 16;

fn token(i: usize, n_vocab: usize) -> i32 {
    (i * 7919 % n_vocab) as i32
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// How long running prefills of `prompt` tokens take to stop after another thread's request, at moments spread over their time.
pub fn cancel(common: &Common, prompt: usize, tries: usize, as_json: bool) -> Result<(), Failure> {
    let model = common.load()?;
    let tokens: Vec<i32> = (0..prompt).map(|i| token(i, model.desc().n_vocab)).collect();
    let mut session = common.session(&model, prompt)?;
    let begin = Instant::now();
    session.prefill(0, &tokens)?;
    let whole = begin.elapsed();
    let handle = session.cancel_handle();
    let mut waits = Vec::new();
    for i in 0..tries {
        session.truncate(0, 0)?;
        // The golden ratio's multiples are spread evenly and fall on no phase in particular; the last twentieth is left out, so that
        // the call has not ended before it is cancelled.
        let share = (i as f64 * 0.618_033_988_749_895).fract() * 0.95;
        let handle = handle.clone();
        let (start, started) = mpsc::channel::<()>();
        let canceller = std::thread::spawn(move || {
            // The sender sends before it begins.
            let _ = started.recv();
            std::thread::sleep(whole.mul_f64(share));
            let at = Instant::now();
            handle.cancel(0).map(|()| at)
        });
        start.send(())?;
        let result = session.prefill(0, &tokens);
        let end = Instant::now();
        let at = canceller.join().map_err(|_| "the cancelling thread failed")??;
        match result {
            Err(Error::Cancelled) => waits.push(ms(end.duration_since(at))),
            Err(other) => return Err(other.into()),
            // It was faster than before.
            Ok(()) => session.cancel_handle().clear(0)?,
        }
    }
    if waits.is_empty() {
        return Err("every prefill ended before it was cancelled: ask for more --cancel or a longer --prompt".into());
    }
    waits.sort_by(f64::total_cmp);
    let (median, worst, n) = (waits[waits.len() / 2], waits[waits.len() - 1], waits.len());
    if as_json {
        println!(
            "{}",
            json!({"prompt": prompt, "prefill_ms": ms(whole), "cancelled": n, "median_ms": median, "worst_ms": worst})
        );
    } else {
        println!(
            "prefill of {prompt} takes {:.0} ms; {n} cancelled ones stopped after {median:.1} ms (median), {worst:.1} ms (worst)",
            ms(whole)
        );
    }
    Ok(())
}

/// Time from a request to its first logits, with a prefix of `n` tokens computed and with it taken over from a retained text; and
/// what the second request adds to the cache.
pub fn prefix(common: &Common, n: usize, rounds: usize, as_json: bool) -> Result<(), Failure> {
    let model = common.load()?;
    let n_vocab = model.desc().n_vocab;
    let mut session = common.sessions(&model, 2 * (n + TAIL) + 64, 2)?;
    let memory = session.memory();
    let row_bytes = memory.cache as f64 / session.options().n_positions.next_multiple_of(session.block()) as f64;
    // A text of its own for each round, so that none is found that an earlier round has left.
    let text =
        |round: usize| (0..n + TAIL).map(move |i| token(i + 1 + round * (n + TAIL), n_vocab)).collect::<Vec<_>>();
    let (mut cold, mut warm, mut grown) = (Vec::new(), Vec::new(), 0);
    for round in 0..rounds.max(1) {
        let mut tokens = text(round);
        let begin = Instant::now();
        if session.take_prefix(0, &tokens[..n + TAIL - 1])? > TAIL {
            return Err("a text of an earlier round was found".into());
        }
        session.truncate(0, 0)?;
        session.prefill(0, &tokens)?;
        cold.push(ms(begin.elapsed()));
        session.retain(0)?;
        let before = session.usage();
        // Another request that begins alike.
        tokens[n..].iter_mut().for_each(|t| *t = (*t + 1) % n_vocab as i32);
        let begin = Instant::now();
        let found = session.take_prefix(1, &tokens[..n + TAIL - 1])?;
        session.prefill(1, &tokens[found..])?;
        warm.push(ms(begin.elapsed()));
        if found != n {
            return Err(format!("{found} positions were found, expected {n}").into());
        }
        let after = session.usage();
        // Later rounds take blocks of retained texts, which are no growth.
        grown = grown.max((after.used + after.retained).saturating_sub(before.used + before.retained));
        session.truncate(1, 0)?;
    }
    let median = |v: &mut Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    let (cold, warm) = (median(&mut cold), median(&mut warm));
    let bytes = grown as f64 * row_bytes;
    let is_same = session.memory() == memory;
    if as_json {
        println!(
            "{}",
            json!({"prefix": n, "tail": TAIL, "computed_ms": cold, "taken_over_ms": warm, "ratio": cold / warm,
                "grown_positions": grown, "grown_bytes": bytes, "allocated": !is_same})
        );
    } else {
        println!(
            "a prefix of {n} and {TAIL} more tokens: first logits after {cold:.1} ms, after {warm:.1} ms with the prefix taken over: \
             {:.1} times sooner; {grown} more positions in use, {} of the cache, {}",
            cold / warm,
            mib(bytes as usize),
            if is_same { "nothing allocated" } else { "and memory allocated" }
        );
    }
    Ok(())
}
