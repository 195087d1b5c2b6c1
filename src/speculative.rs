//! Speculative decoding: cheap guesses of the next tokens, verified by the model in one pass over its weights.
//!
//! A step appends the token chosen last and `d` drafts, `(1 + d) K` rows in one pass, and samples at each row in order for as long as
//! what is sampled is what was drafted. Every token comes from the model's own logits, in the order and with the random numbers of a
//! loop without drafts, so drafts change how fast a text comes and never which. `docs/speculative.md` says when that pays.
//!
//! [`Speculator::step`] does it all for one sequence. A server that decodes several sequences at once calls its three parts:
//! [`Speculator::draft`] for each sequence, one [`Session::decode`] of all of them with [`Logits::Every`], and
//! [`Speculator::accept`] for each.

use crate::cache::Layout;
use crate::error::{Result, invalid};
use crate::model::Model;
use crate::sampling::{Sampler, log_probability};
use crate::session::{BatchEntry, Logits, Session};

/// A sequence's text, with the token that was chosen to follow it.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    session: &'a Session,
    seq: usize,
    len: usize,
    last: i32,
}

impl<'a> Text<'a> {
    fn new(session: &'a Session, seq: i64, last: i32) -> Result<Self> {
        Ok(Text { session, len: session.len(seq)? + 1, seq: seq as usize, last })
    }

    pub fn session(&self) -> &'a Session {
        self.session
    }

    pub fn seq(&self) -> usize {
        self.seq
    }

    /// At least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Token `index`, below [`Text::len`]. What a policy has dropped is not counted.
    pub fn token(&self, index: usize) -> i32 {
        if index + 1 == self.len { self.last } else { self.session.token(self.seq, index) as i32 }
    }
}

/// Guesses how texts go on.
pub trait Drafter: Send {
    /// Appends up to `n` tokens to `drafts`, which is empty. None is always a right answer.
    fn draft(&mut self, text: &Text, n: usize, drafts: &mut Vec<i32>) -> Result<()>;

    /// Gives up what is remembered of a sequence's text.
    fn forget(&mut self, seq: i64) -> Result<()> {
        let _ = seq;
        Ok(())
    }

    /// Bytes held, weights not counted.
    fn bytes(&self) -> usize {
        0
    }
}

/// Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): where the text's last tokens stood before, it may go on as
/// it did there. The longest match wins, of equal ones the latest. A match that reaches into the end is continued periodically.
#[derive(Debug)]
pub struct PromptLookup {
    ngram_min: usize,
    ngram_max: usize,
    /// (k): length of the longest proper border of the last `k + 1` tokens.
    borders: Vec<usize>,
}

impl PromptLookup {
    pub const MAX_NGRAM: usize = 64;
    /// Tokens before the end that are searched.
    pub const LOOK_BACK: usize = 1 << 14;

    /// Matches of `ngram_min` to `ngram_max` tokens.
    pub fn new(ngram_min: usize, ngram_max: usize) -> Result<Self> {
        if ngram_max == 0 || ngram_max > Self::MAX_NGRAM {
            return Err(invalid!("ngram_max is {ngram_max}, expected 1 to {}", Self::MAX_NGRAM));
        }
        if ngram_min == 0 || ngram_min > ngram_max {
            return Err(invalid!("ngram_min is {ngram_min}, expected 1 to ngram_max = {ngram_max}"));
        }
        Ok(PromptLookup { ngram_min, ngram_max, borders: Vec::with_capacity(ngram_max) })
    }

    /// Index of the token after the match. Knuth, Morris and Pratt's search, from the end backwards, so that one pass finds the
    /// longest match of all lengths.
    fn find(&mut self, len: usize, token: impl Fn(usize) -> i32) -> Option<usize> {
        let most = self.ngram_max.min(len - 1);
        if most < self.ngram_min {
            return None;
        }
        let pattern = |k: usize| token(len - 1 - k);
        let borders = &mut self.borders;
        borders.clear();
        borders.push(0);
        for k in 1..most {
            let mut border = borders[k - 1];
            while border > 0 && pattern(k) != pattern(border) {
                border = borders[border - 1];
            }
            borders.push(border + usize::from(pattern(k) == pattern(border)));
        }
        let (mut matched, mut longest, mut found) = (0, 0, None);
        for start in ((len - 1).saturating_sub(Self::LOOK_BACK)..len - 1).rev() {
            let here = token(start);
            while matched > 0 && here != pattern(matched) {
                matched = borders[matched - 1];
            }
            matched += usize::from(here == pattern(matched));
            if matched > longest {
                longest = matched;
                found = Some(start + matched);
                if matched == most {
                    break;
                }
            }
        }
        found.filter(|_| longest >= self.ngram_min)
    }

    fn extend(&mut self, len: usize, token: impl Fn(usize) -> i32, n: usize, drafts: &mut Vec<i32>) {
        let Some(next) = self.find(len, &token) else { return };
        for i in next..next + n {
            drafts.push(if i < len { token(i) } else { drafts[i - len] });
        }
    }
}

impl Drafter for PromptLookup {
    fn draft(&mut self, text: &Text, n: usize, drafts: &mut Vec<i32>) -> Result<()> {
        self.extend(text.len(), |i| text.token(i), n, drafts);
        Ok(())
    }
}

/// A smaller model of the same vocabulary writes ahead, greedily (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv
/// 2302.01318; both verify by rejection sampling, here tokens are compared). Its session follows each sequence's text in the sequence of
/// the same number, and is cancelled with it.
pub struct DraftModel {
    session: Session,
    ln_p_min: f32,
    /// What its session lacks of the text.
    missing: Vec<i32>,
}

impl DraftModel {
    /// `session` is the draft model's, best with an `n_draft` of at least the drafts of a step. A text that it has no room for gets no
    /// drafts. Drafting stops before a token of a probability below `p_min`; 0 never stops it.
    ///
    /// # Errors
    /// `InvalidArgument` if the vocabularies differ, naming the first token that does, or for `p_min` outside 0 to 1.
    pub fn new(target: &Model, session: Session, p_min: f32) -> Result<Self> {
        if !(0.0..=1.0).contains(&p_min) {
            return Err(invalid!("p_min is {p_min}, expected a number from 0 to 1"));
        }
        check_vocabularies(target, session.model())?;
        let missing = Vec::with_capacity(session.options().n_positions);
        Ok(DraftModel { session, ln_p_min: p_min.ln(), missing })
    }

    pub fn session(&self) -> &Session {
        &self.session
    }
}

impl Drafter for DraftModel {
    fn draft(&mut self, text: &Text, n: usize, drafts: &mut Vec<i32>) -> Result<()> {
        let (n_sequences, n_vocab) = (self.session.options().n_sequences, self.session.model().hyper.n_vocab);
        if text.seq() >= n_sequences {
            return Err(invalid!(
                "the draft model's session has {n_sequences} sequences, expected one for {}",
                text.seq()
            ));
        }
        let found = text.session().model().hyper.n_vocab;
        if found != n_vocab {
            return Err(invalid!("the session's model has {found} tokens, the draft model {n_vocab}"));
        }
        let seq = text.seq() as i64;
        self.session.share_cancel_handle(text.session().cancel_handle());
        // The last token is computed in any case: its logits are wanted.
        let most = self.session.len(seq)?.min(text.len() - 1);
        let common = (0..most).find(|&i| self.session.token(text.seq(), i) as i32 != text.token(i)).unwrap_or(most);
        self.session.truncate(seq, common)?;
        let room = self.session.room(seq)?;
        if text.len() - common > room {
            return Ok(());
        }
        self.missing.clear();
        self.missing.extend((common..text.len()).map(|i| text.token(i)));
        // The last draft is not appended.
        let n = n.min(room - self.missing.len() + 1);
        self.session.prefill(seq, &self.missing)?;
        loop {
            let logits = self.session.logits(seq)?;
            let best = best(logits);
            if self.ln_p_min > f32::NEG_INFINITY && log_probability(logits, best) < self.ln_p_min {
                return Ok(());
            }
            drafts.push(best as i32);
            if drafts.len() >= n {
                return Ok(());
            }
            self.session.step(seq, best as i32)?;
        }
    }

    fn forget(&mut self, seq: i64) -> Result<()> {
        self.session.truncate(seq, 0)
    }

    fn bytes(&self) -> usize {
        let m = self.session.memory();
        m.cache + m.hidden + m.scratch
    }
}

/// The largest logit; of equal ones the first.
fn best(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

fn check_vocabularies(target: &Model, draft: &Model) -> Result<()> {
    let (expected, found) = (target.hyper.n_vocab, draft.hyper.n_vocab);
    if found != expected {
        return Err(invalid!("the draft model has a vocabulary of {found} tokens, expected the model's {expected}"));
    }
    let (target, draft) = match (target.tokenizer(), draft.tokenizer()) {
        (None, None) => return Ok(()),
        (Some(target), Some(draft)) => (target, draft),
        (has, _) => {
            let (with, without) = if has.is_some() { ("model", "draft model") } else { ("draft model", "model") };
            return Err(invalid!("the {without} has no tokenizer to compare with the {with}'s"));
        }
    };
    // The vocabulary may be larger than the tokenizer's, for the sake of round numbers.
    for id in 0..expected as u32 {
        let (expected, found) = (target.token_bytes(id, true).ok(), draft.token_bytes(id, true).ok());
        if found != expected {
            let spell = |bytes: Option<&[u8]>| match bytes {
                Some(bytes) => format!("{:?}", String::from_utf8_lossy(bytes)),
                None => "none".to_owned(),
            };
            return Err(invalid!(
                "token {id} is {} in the draft model's vocabulary, expected {} as in the model's",
                spell(found),
                spell(expected)
            ));
        }
    }
    Ok(())
}

/// Counts since a speculator was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculatorStats {
    /// Passes verified.
    pub steps: u64,
    /// Drafts that they verified.
    pub drafted: u64,
    /// Those that became text.
    pub accepted: u64,
}

/// Drafts and verifies, for any sequences of one session. Steps allocate nothing, unless the sampler does for its constraint.
pub struct Speculator {
    drafter: Box<dyn Drafter>,
    n_draft: usize,
    drafts: Vec<i32>,
    /// The token chosen last, and the drafts.
    entry: Vec<i32>,
    accepted: Vec<i32>,
    stats: SpeculatorStats,
}

impl Speculator {
    /// Up to `n_draft` drafts a step.
    pub fn new(drafter: impl Drafter + 'static, n_draft: usize) -> Result<Self> {
        if n_draft == 0 || n_draft > Layout::MAX_DRAFT {
            return Err(invalid!("n_draft is {n_draft}, expected 1 to {}", Layout::MAX_DRAFT));
        }
        Ok(Speculator {
            drafter: Box::new(drafter),
            n_draft,
            drafts: Vec::with_capacity(n_draft),
            entry: Vec::with_capacity(n_draft + 1),
            accepted: Vec::with_capacity(n_draft + 1),
            stats: SpeculatorStats::default(),
        })
    }

    pub fn n_draft(&self) -> usize {
        self.n_draft
    }

    pub fn stats(&self) -> SpeculatorStats {
        self.stats
    }

    /// Bytes that the drafter holds, weights not counted.
    pub fn drafter_bytes(&self) -> usize {
        self.drafter.bytes()
    }

    /// Gives up what the drafter remembers of a sequence's text: for one that has ended. It costs nothing but time to forget too much.
    pub fn forget(&mut self, seq: i64) -> Result<()> {
        self.drafter.forget(seq)
    }

    /// Guesses how `seq` goes on after `token`, which was chosen and is not in the session: at most `n_draft` tokens, and never more than
    /// the sequence has room for without its policy dropping any. Several sequences' drafts together may still be too many for the
    /// cache they share.
    ///
    /// # Errors
    /// `InvalidArgument` if the session's `n_draft` is smaller than this one's; what the draft model's prefill may fail with but
    /// `CacheFull`. The session is not changed.
    pub fn draft(&mut self, session: &Session, seq: i64, token: i32) -> Result<&[i32]> {
        if session.options().n_draft < self.n_draft {
            let found = session.options().n_draft;
            return Err(invalid!(
                "the session's n_draft is {found}, expected the speculator's {} at least",
                self.n_draft
            ));
        }
        let text = Text::new(session, seq, token)?;
        let n = self.n_draft.min(session.room(seq)?.saturating_sub(1));
        self.drafts.clear();
        if n > 0 {
            self.drafter.draft(&text, n, &mut self.drafts)?;
            self.drafts.truncate(n);
        }
        Ok(&self.drafts)
    }

    /// Samples after each token of the last entry of `seq` (the token chosen before, then drafts; decoded with [`Logits::Every`]) until a
    /// sampled token is not the draft there or ends the generation, and tells the sampler of each. Returns the sampled tokens,
    /// at least one. All but the last of them, and nothing after them, are then in the session: the last is what the next step begins with.
    /// The sequence's logits are those that it was sampled from.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such entry; those of [`Sampler::sample`] and [`Sampler::accept`] for the first token. The session
    /// is then not changed. What fails later ends the run, and comes back as the next step's error.
    pub fn accept(&mut self, session: &mut Session, seq: i64, sampler: &mut Sampler) -> Result<&[i32]> {
        self.verify(session, seq, sampler)?;
        Ok(&self.accepted)
    }

    fn verify(&mut self, session: &mut Session, seq: i64, sampler: &mut Sampler) -> Result<()> {
        let n = session.n_logits_at(seq)?;
        if n == 0 {
            return Err(invalid!(
                "sequence {seq} has no entry to accept: decode one that asks for every token's logits"
            ));
        }
        let first = session.len(seq)? - n;
        self.accepted.clear();
        for i in 0..n {
            let token = match session.sample_at(seq, i, sampler).and_then(|token| sampler.accept(token).map(|()| token))
            {
                Ok(token) => token,
                Err(error) if i == 0 => return Err(error),
                Err(_) => break,
            };
            self.accepted.push(token as i32);
            let is_end = session.model().tokenizer().is_some_and(|t| t.is_end_of_generation(token));
            if is_end || i + 1 == n || session.token(seq as usize, first + i + 1) != token {
                break;
            }
        }
        session.keep(seq, self.accepted.len())?;
        self.stats.steps += 1;
        self.stats.drafted += n as u64 - 1;
        self.stats.accepted += self.accepted.len() as u64 - 1;
        Ok(())
    }

    /// Appends `token`, which was chosen last, and returns the tokens that follow it: one, and one more for each draft that was right.
    /// All of them but the last are then in the session too; see [`Speculator::accept`].
    ///
    /// # Errors
    /// Those of [`Session::step`], [`Speculator::draft`] and [`Speculator::accept`]. The text is then what it was, but for what a
    /// policy has dropped for it, and the sampler has not advanced.
    pub fn step(&mut self, session: &mut Session, seq: i64, token: i32, sampler: &mut Sampler) -> Result<&[i32]> {
        self.draft(session, seq, token)?;
        self.entry.clear();
        self.entry.push(token);
        self.entry.extend_from_slice(&self.drafts);
        session.decode(&[BatchEntry { seq, tokens: &self.entry, logits: Logits::Every }])?;
        if let Err(error) = self.verify(session, seq, sampler) {
            session.truncate(seq, session.len(seq)? - self.entry.len())?;
            return Err(error);
        }
        Ok(&self.accepted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the definition says, the slow way.
    fn expected(tokens: &[i32], min: usize, max: usize, n: usize) -> Vec<i32> {
        let len = tokens.len();
        for length in (min..=max.min(len - 1)).rev() {
            let earliest = (len - 1).saturating_sub(PromptLookup::LOOK_BACK);
            for start in (earliest..len - length).rev() {
                if tokens[start..start + length] == tokens[len - length..] {
                    let mut all = tokens.to_vec();
                    (0..n).for_each(|i| all.push(all[start + length + i]));
                    return all[len..].to_vec();
                }
            }
        }
        Vec::new()
    }

    #[test]
    fn lookup_finds_the_latest_of_the_longest_matches() {
        let mut state = 1u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let mut n_found = 0;
        for round in 0..20_000 {
            let (n_symbols, len) = (1 + below(4), 1 + below(40) as usize);
            let tokens: Vec<i32> = (0..len).map(|_| below(n_symbols) as i32).collect();
            let max = 1 + below(9) as usize;
            let min = 1 + below(max as u64) as usize;
            let n = 1 + below(8) as usize;
            let mut drafts = Vec::new();
            PromptLookup::new(min, max).unwrap().extend(len, |i| tokens[i], n, &mut drafts);
            assert_eq!(drafts, expected(&tokens, min, max, n), "round {round}: {tokens:?}, {min} to {max}");
            n_found += usize::from(!drafts.is_empty());
        }
        assert!(n_found > 5_000 && n_found < 19_000, "{n_found}");
    }

    #[test]
    fn lookup_looks_back_so_far_and_reads_each_token_a_few_times() {
        let n = 3 * PromptLookup::LOOK_BACK;
        for (max, period) in [(8, 1), (64, 63), (64, 7000), (64, usize::MAX)] {
            // The hard case for a search: all but the last of many tokens are equal.
            let token = |i: usize| if i == n - 1 || (i + 1).is_multiple_of(period) { 1 } else { 0 };
            let reads = std::cell::Cell::new(0);
            let counted = |i: usize| {
                reads.set(reads.get() + 1);
                token(i)
            };
            PromptLookup::new(2, max).unwrap().extend(n, counted, 4, &mut Vec::new());
            assert!(reads.get() < 6 * (PromptLookup::LOOK_BACK + max), "{}: {} reads", period, reads.get());
        }
        let mut drafts = Vec::new();
        for (at, is_found) in [(n - 2 - PromptLookup::LOOK_BACK, false), (n - 1 - PromptLookup::LOOK_BACK, true)] {
            let token = |i: usize| if i == at || i == n - 1 { -1 } else { i as i32 };
            drafts.clear();
            PromptLookup::new(1, 4).unwrap().extend(n, token, 2, &mut drafts);
            let expected = [at as i32 + 1, at as i32 + 2];
            assert_eq!(drafts, if is_found { &expected[..] } else { &[] });
        }
    }

    #[test]
    fn counts_out_of_range_are_refused() {
        for (min, max, word) in
            [(0, 4, "ngram_min is 0"), (5, 4, "ngram_min is 5"), (1, 0, "ngram_max"), (1, 65, "ngram_max is 65")]
        {
            let error = PromptLookup::new(min, max).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        for n in [0, Layout::MAX_DRAFT + 1] {
            let error = Speculator::new(PromptLookup::new(1, 4).unwrap(), n).map(drop).unwrap_err();
            assert!(error.to_string().contains(&format!("n_draft is {n}")), "{error}");
        }
    }
}
