//! Natural log-probabilities of a row of logits.

use super::candidates::{rank, token};
use super::math::{exp, ln};
use crate::error::{Result, invalid};

/// A row with what normalizes it. NaN counts as -inf, +inf as the largest finite f32.
struct Row<'a> {
    logits: &'a [f32],
    max: f64,
    ln_total: f64,
}

fn normalized(logit: f32, max: f64, ln_total: f64) -> f32 {
    (f64::from(clean(logit)) - max - ln_total) as f32
}

fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

impl<'a> Row<'a> {
    fn new(logits: &'a [f32]) -> Result<Self> {
        let max = logits.iter().fold(f32::NEG_INFINITY, |a, &l| a.max(clean(l)));
        if max == f32::NEG_INFINITY {
            return Err(invalid!("logits has no finite element, expected at least one"));
        }
        let max = f64::from(max);
        let total: f64 = logits.iter().map(|&l| exp(f64::from(clean(l)) - max)).sum();
        Ok(Row { logits, max, ln_total: ln(total) })
    }

    fn log_probability(&self, token: usize) -> f32 {
        normalized(self.logits[token], self.max, self.ln_total)
    }

    fn rank(&self, token: u32) -> u64 {
        rank(clean(self.logits[token as usize]), token)
    }
}

/// `ln softmax(logits)[token]`, summed in f64; -inf if no logit is finite.
pub(crate) fn log_probability(logits: &[f32], token: usize) -> f32 {
    Row::new(logits).map_or(f32::NEG_INFINITY, |row| row.log_probability(token))
}

/// The same of one logit, by the largest and the sum of `exp(logit - largest)`.
pub(crate) fn log_probability_of(logit: f32, largest: f32, total: f64) -> f32 {
    normalized(logit, clean(largest).into(), ln(total))
}

/// `out[i] = ln softmax(logits)[tokens[i]]`, summed in f64.
///
/// # Errors
/// [`InvalidArgument`](crate::Error::InvalidArgument) for a token outside `logits`, an `out` of another length than
/// `tokens`, or logits without a finite element. `out` is then what it was.
pub fn log_probabilities(logits: &[f32], tokens: &[i32], out: &mut [f32]) -> Result<()> {
    if out.len() != tokens.len() {
        return Err(invalid!("out has {} elements, expected one for each of {} tokens", out.len(), tokens.len()));
    }
    for &t in tokens {
        if !usize::try_from(t).is_ok_and(|t| t < logits.len()) {
            return Err(invalid!("token is {t}, expected 0 to {}", logits.len() as i64 - 1));
        }
    }
    let row = Row::new(logits)?;
    for (out, &t) in out.iter_mut().zip(tokens) {
        *out = row.log_probability(t as usize);
    }
    Ok(())
}

/// The `tokens.len()` most probable tokens, best first (of equals the lower id), and their log-probabilities in `out`.
///
/// # Errors
/// [`InvalidArgument`](crate::Error::InvalidArgument) if there are not that many logits or more than 2^31 - 1, for an
/// `out` of another length than `tokens`, or logits without a finite element. Nothing is written then.
pub fn top_log_probabilities(logits: &[f32], tokens: &mut [i32], out: &mut [f32]) -> Result<()> {
    let n = tokens.len();
    if n > logits.len() || logits.len() > i32::MAX as usize {
        return Err(invalid!("n is {n} of {} logits, expected at most as many", logits.len()));
    }
    if out.len() != n {
        return Err(invalid!("out has {} elements, expected {n}", out.len()));
    }
    let row = Row::new(logits)?;
    if n == 0 {
        return Ok(());
    }
    // A heap of the best so far, the worst of them on top.
    let rank = |t: i32| row.rank(t as u32);
    let sift = |heap: &mut [i32]| {
        let mut i = 0;
        loop {
            let child = (2 * i + 1..(2 * i + 3).min(heap.len())).max_by_key(|&c| rank(heap[c]));
            match child.filter(|&c| rank(heap[c]) > rank(heap[i])) {
                Some(c) => heap.swap(i, c),
                None => break,
            }
            i = child.unwrap_or(i);
        }
    };
    for i in 0..n {
        tokens[i] = i as i32;
        let mut at = i;
        while at > 0 && rank(tokens[at]) > rank(tokens[(at - 1) / 2]) {
            tokens.swap(at, (at - 1) / 2);
            at = (at - 1) / 2;
        }
    }
    let mut bound = rank(tokens[0]);
    for t in n as u32..logits.len() as u32 {
        let r = row.rank(t);
        if r < bound {
            tokens[0] = token(r) as i32;
            sift(tokens);
            bound = rank(tokens[0]);
        }
    }
    for end in (1..n).rev() {
        tokens.swap(0, end);
        sift(&mut tokens[..end]);
    }
    for (out, &t) in out.iter_mut().zip(&*tokens) {
        *out = row.log_probability(t as usize);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_of_the_definition() {
        let mut state = 1u64;
        for n in [1usize, 2, 7, 300, 5000] {
            let logits: Vec<f32> = (0..n)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                    ((state >> 40) as f32 / 65536.0 - 128.0).round() / 8.0 + 0.0 // with ties, without -0
                })
                .collect();
            let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            let want = |t: usize| f64::from(logits[t]) - total.ln();
            let tokens: Vec<i32> = (0..n as i32).rev().collect();
            let mut out = vec![0.0; n];
            log_probabilities(&logits, &tokens, &mut out).unwrap();
            for (&t, &found) in tokens.iter().zip(&out) {
                assert!((f64::from(found) - want(t as usize)).abs() <= 1e-6 * want(t as usize).abs().max(1.0), "{t}");
            }
            let mut order: Vec<i32> = (0..n as i32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            for top in [0, 1, 2, 3, 20, n - 1, n] {
                let top = top.min(n);
                let (mut tokens, mut out) = (vec![0; top], vec![0.0; top]);
                top_log_probabilities(&logits, &mut tokens, &mut out).unwrap();
                assert_eq!(tokens, order[..top], "{n} {top}");
                let mut again = vec![0.0; top];
                log_probabilities(&logits, &tokens, &mut again).unwrap();
                assert_eq!(out, again);
            }
        }
    }

    #[test]
    fn odd_logits_and_refusals() {
        let logits = [f32::NAN, 1.0, f32::NEG_INFINITY, 1.0];
        let (mut tokens, mut out) = ([9; 4], [9.0; 4]);
        top_log_probabilities(&logits, &mut tokens, &mut out).unwrap();
        let half = -std::f32::consts::LN_2;
        assert_eq!((tokens, out), ([1, 3, 0, 2], [half, half, f32::NEG_INFINITY, f32::NEG_INFINITY]));
        log_probabilities(&[f32::INFINITY, 0.0], &[0, 1], &mut out[..2]).unwrap();
        assert_eq!(out[..2], [0.0, f32::MIN]);

        let refused = |logits: &[f32], tokens: &[i32], n: usize| {
            let mut out = vec![7.0; n];
            let message = log_probabilities(logits, tokens, &mut out).unwrap_err().to_string();
            assert!(out.iter().all(|&o| o == 7.0));
            message
        };
        assert!(refused(&[1.0], &[1], 1).starts_with("token is 1, expected 0 to 0"));
        assert!(refused(&[1.0], &[-1], 1).starts_with("token is -1, "));
        assert!(refused(&[1.0], &[0], 2).starts_with("out has 2 elements"));
        assert!(refused(&[f32::NAN; 2], &[0], 1).starts_with("logits has no finite element"));
        assert!(refused(&[], &[], 0).starts_with("logits has no finite element"));
        let message = top_log_probabilities(&[1.0], &mut [5; 2], &mut [0.0; 2]).unwrap_err().to_string();
        assert!(message.starts_with("n is 2 of 1 logits"), "{message}");
    }
}
