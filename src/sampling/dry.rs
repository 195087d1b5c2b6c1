//! DRY ("don't repeat yourself"): a penalty for tokens that would make a repetition longer. By p-e-w, 2024
//! (github.com/oobabooga/text-generation-webui/pull/5677); details as in llama.cpp.

use std::collections::{HashMap, VecDeque};

use super::candidates::Candidates;
use crate::error::{Result, invalid};
use crate::tokenizer::Tokenizer;

/// The longest text of a breaker in bytes, and the longest token sequence: llama.cpp's limits, past which it cuts.
const MAX_TEXT: usize = 40;
const MAX_TOKENS: usize = 21;
const MAX_BREAKERS: usize = 1 << 20;

/// Token sequences that no repetition reaches across, by first token.
#[derive(Debug, Clone, Default)]
pub struct Breakers {
    tails: HashMap<u32, Vec<Box<[u32]>>>,
    n: usize,
}

impl Breakers {
    pub fn add(&mut self, tokens: &[u32]) -> Result<()> {
        let [head, tail @ ..] = tokens else { return Err(invalid!("the sequence breaker has no tokens")) };
        if tokens.len() > MAX_TOKENS {
            return Err(invalid!("the sequence breaker has {} tokens, expected at most {MAX_TOKENS}", tokens.len()));
        }
        if self.n == MAX_BREAKERS {
            return Err(invalid!("there are {MAX_BREAKERS} sequence breakers, expected no more"));
        }
        let tails = self.tails.entry(*head).or_default();
        if !tails.iter().any(|t| **t == *tail) {
            tails.push(tail.into());
            self.n += 1;
        }
        Ok(())
    }

    /// A text, in all the ways in which tokens can spell it: within a token, or from the end of one on.
    pub fn add_text(&mut self, text: &str, tokenizer: &Tokenizer) -> Result<()> {
        if text.is_empty() || text.len() > MAX_TEXT {
            return Err(invalid!("the sequence breaker has {} bytes, expected 1 to {MAX_TEXT}", text.len()));
        }
        // What follows the first i bytes, as tokens. A rest that begins within a character is no text to tokenize.
        let rests = (1..text.len())
            .filter(|&i| text.is_char_boundary(i))
            .map(|i| Ok((i, tokenizer.encode(&text.as_bytes()[i..], false, false)?)))
            .collect::<Result<Vec<_>>>()?;
        for id in 0..tokenizer.n_vocab() as u32 {
            let bytes = tokenizer.token_bytes(id, true)?;
            if bytes.windows(text.len()).any(|w| w == text.as_bytes()) {
                self.add(&[id])?;
                continue;
            }
            for (i, rest) in rests.iter().filter(|(i, _)| bytes.ends_with(&text.as_bytes()[..*i])) {
                debug_assert!(*i < text.len());
                let tokens: Vec<u32> = std::iter::once(id).chain(rest.iter().copied()).take(MAX_TOKENS).collect();
                self.add(&tokens)?;
            }
        }
        Ok(())
    }

    fn is_single(&self, token: u32) -> bool {
        self.tails.get(&token).is_some_and(|tails| tails.iter().any(|t| t.is_empty()))
    }

    /// How many of the last `n` tokens follow the last breaker.
    fn since_last(&self, n: usize, recent: impl Fn(usize) -> u32) -> usize {
        for i in 0..n {
            let Some(tails) = self.tails.get(&recent(i)) else { continue };
            let fits = |t: &[u32]| t.len() <= i && t.iter().enumerate().all(|(j, &x)| x == recent(i - j - 1));
            if let Some(longest) = tails.iter().filter(|t| fits(t)).map(|t| t.len()).max() {
                return i - longest;
            }
        }
        n
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dry {
    pub multiplier: f32,
    pub base: f32,
    pub allowed_length: u32,
    pub last_n: u32,
}

impl Dry {
    /// `marks` is `[n_vocab]`, zeros before and after; `lengths` has room for `last_n`.
    pub fn apply(
        &self,
        candidates: &mut Candidates,
        history: &VecDeque<u32>,
        breakers: &Breakers,
        marks: &mut [u32],
        lengths: &mut Vec<u32>,
    ) {
        let allowed = self.allowed_length as usize;
        let n = history.len().min(self.last_n as usize);
        let recent = |i: usize| history[history.len() - 1 - i];
        if n <= allowed {
            return;
        }
        let limit = breakers.since_last(n, recent);
        if limit < allowed {
            return;
        }
        // lengths[k]: how far the text's end, read backwards, equals what ends k tokens earlier (the Z function of the
        // reversed text; Gusfield 1997, section 1.3).
        lengths.clear();
        lengths.push(0);
        let (mut left, mut right) = (0, 0);
        for k in 1..n {
            let mut length = if k < right { (lengths[k - left] as usize).min(right - k) } else { 0 };
            while k + length < n && recent(length) == recent(k + length) {
                length += 1;
            }
            if k + length > right {
                (left, right) = (k, k + length);
            }
            lengths.push(length as u32);
        }
        // The token that followed then would continue the repetition now. A mark is the longest such repetition plus 1.
        let mut any = false;
        for (k, &length) in lengths.iter().enumerate().skip(1) {
            let length = (length as usize).min(limit);
            if length >= allowed
                && let Some(mark) = marks.get_mut(recent(k - 1) as usize)
            {
                *mark = (*mark).max(length as u32 + 1);
                any = true;
            }
        }
        if !any {
            return;
        }
        candidates.edit(|token, logit| {
            let mark = marks[token as usize] as usize;
            if mark == 0 || breakers.is_single(token) { logit } else { logit - self.penalty(mark - 1 - allowed) }
        });
        for i in 0..n {
            if let Some(mark) = marks.get_mut(recent(i) as usize) {
                *mark = 0;
            }
        }
    }

    /// multiplier times base^exponent, the power being at most the largest f32.
    fn penalty(&self, exponent: usize) -> f64 {
        let (mut power, base) = (1.0, f64::from(self.base));
        for _ in 0..exponent {
            power *= base;
            if power >= f64::from(f32::MAX) {
                power = f64::from(f32::MAX);
                break;
            }
            if base == 1.0 {
                break;
            }
        }
        f64::from(self.multiplier) * power
    }
}
