//! Sessions: a fixed cache, the sequences in it, and the calls that extend them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::backend::{Context, ContextOptions};
use crate::cache::{Layout, Middle, Pool, Reservation, Source};
use crate::error::{Error, Result, invalid};
use crate::model::Model;
use crate::sampling::Sampler;
use crate::schedule::{Plan, Pruning, Ring, Sequences, Task, Wanted};
use crate::stats::Stats;

pub use crate::backend::CacheType;
pub use crate::cache::Usage;
pub use crate::cores::default_threads;

#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// The whole cache, in positions, shared by all sequences.
    pub n_positions: usize,
    pub n_sequences: usize,
    /// 0 = one for each physical core that this process may use.
    pub n_threads: usize,
    pub cache_type: CacheType,
    /// Texts that [`Session::retain`] keeps at most.
    pub n_retained: usize,
    /// Positions that [`Session::truncate`] takes back without recomputing hidden rows, and logits rows that speculative decoding
    /// asks for beside each sequence's own (see [`Logits::Every`]).
    pub n_draft: usize,
    /// A sequence's results depend, in no bit, on who shares its passes, nor on where its own tokens are cut into pieces. CPUs never
    /// trade that for speed, CUDA does without this.
    pub batch_invariant: bool,
    /// Rows of the largest pass over the weights; a position's K copies always fit.
    pub max_rows: usize,
    /// Leave out what nothing depends on. [`Pruning::All`] is for tests.
    pub pruning: Pruning,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            n_positions: 2048,
            n_sequences: 1,
            n_threads: 0,
            cache_type: CacheType::F16,
            n_retained: 64,
            n_draft: 0,
            batch_invariant: false,
            max_rows: 256,
            pruning: Pruning::Exact,
        }
    }
}

/// Exact bytes held, weights shared with other sessions of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub weights: usize,
    /// Keys and values of stored rows.
    pub cache: usize,
    /// Hidden rings.
    pub hidden: usize,
    pub scratch: usize,
}

/// Cancels calls from other threads, sequence by sequence.
#[derive(Clone)]
pub struct CancelHandle {
    flags: Arc<[AtomicBool]>,
}

impl CancelHandle {
    fn flag(&self, seq: i64) -> Result<&AtomicBool> {
        usize::try_from(seq).ok().and_then(|s| self.flags.get(s)).ok_or_else(|| {
            invalid!("sequence {seq} does not exist, the session has sequences 0 to {}", self.flags.len() - 1)
        })
    }

    /// The running call on `seq`, or else the next one, returns [`Error::Cancelled`]; that uses the request up.
    pub fn cancel(&self, seq: i64) -> Result<()> {
        self.flag(seq)?.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes back a request that no call has used up.
    pub fn clear(&self, seq: i64) -> Result<()> {
        self.flag(seq)?.store(false, Ordering::Release);
        Ok(())
    }
}

/// Of [`SessionOptions::max_rows`]: groups of rows fit into a device's grids.
const MAX_ROWS: usize = 1 << 17;

/// Rows that a pass always has room for if the session's sequences can make so many by one step each.
const MAX_STEP_ROWS: usize = 1024;

/// Rows that scores and embeddings take at a time.
const SCORE_ROWS: usize = 16;

type Progress = Box<dyn FnMut(f32) -> bool + Send>;

/// Sees the context after each pass of a call of a single entry, how many outputs came before, and how many there are.
type EachPass<'a> = &'a mut dyn FnMut(&dyn Context, usize, usize) -> Result<()>;

/// One sequence's part of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchEntry<'a> {
    pub seq: i64,
    /// What is appended: a piece of a prompt, or one token.
    pub tokens: &'a [i32],
    pub logits: Logits,
}

/// Which logits an entry leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: the sequence has none afterwards.
    Nothing,
    /// The last position's.
    Last,
    /// The last position's, and with [`Session::logits_at`] those of all of the entry's tokens: what verifies a draft.
    Every,
}

/// What happens when a sequence has no room for more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// [`Error::CacheFull`].
    #[default]
    Stop,
    /// The oldest positions after the first `keep` are dropped (attention sinks and the recent text remain: StreamingLLM,
    /// arXiv 2309.17453), half of what could be dropped or as much as is needed, in whole chunks of the model. `keep` is rounded up to
    /// whole blocks. The remaining text then has positions without a gap, as in training: the recent keys keep their RoPE positions,
    /// the kept ones are computed anew right before them.
    DropMiddle { keep: usize },
}

/// How long a sequence may become, and what happens then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub when_full: WhenFull,
    /// Positions; 0 = as many as the session has room for. Dropping takes room for a moment, [`WhenFull::DropMiddle`] therefore
    /// stays below what the session holds by the kept blocks and one more.
    pub limit: usize,
}

/// What an embedding is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The last position.
    Last,
    /// The mean over all positions given.
    Mean,
}

/// An entry on its way.
struct Part {
    task: Task,
    reservation: Reservation,
    ring: Ring,
    /// The first positions, to be computed anew since what stood behind them was dropped.
    anew: usize,
    /// Whether any pass has computed something of it.
    touched: bool,
}

/// An entry that has been checked.
#[derive(Clone, Copy, Debug)]
struct Asked {
    seq: usize,
    n: usize,
    logits: Logits,
    /// What goes for its positions.
    dropped: Option<Middle>,
}

/// Where the logits of an entry's tokens lie: the first row, and how many.
#[derive(Clone, Copy, Debug, Default)]
struct EveryRows {
    first: usize,
    n: usize,
}

pub struct Session {
    model: Arc<Model>,
    options: SessionOptions,
    pool: Pool,
    context: Box<dyn Context>,
    plan: Plan,
    has_logits: Vec<bool>,
    /// (sequence): which of its two logits rows counts. A call writes the other one, so that a failed call changes nothing.
    logits_row: Vec<usize>,
    /// (sequence): rows of [`Logits::Every`], until another call uses them.
    every: Vec<EveryRows>,
    policies: Vec<Policy>,
    /// The running call's, empty between calls.
    parts: Vec<Part>,
    cancel: CancelHandle,
    progress: Option<Progress>,
    /// Token ids of a call's entries, one after the other, as the pool wants them; room for as many as the pool has.
    tokens: Vec<u32>,
    /// (sequence): scratch.
    seen: Vec<bool>,
    /// (entry): what a batch asks for, read once.
    asked: Vec<Asked>,
    stats: Arc<Stats>,
}

impl Session {
    /// Everything that prefill and step need is allocated here.
    ///
    /// # Errors
    /// `InvalidArgument` for counts out of range, `OutOfMemory`.
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Session> {
        let rules = model.hyper.rules;
        let layout = Layout::new(&rules, options.n_positions, options.n_sequences, options.n_draft)?;
        if options.max_rows > MAX_ROWS {
            return Err(invalid!("max_rows is {}, expected at most {MAX_ROWS}", options.max_rows));
        }
        // One step of every sequence is one pass, up to where its scratch would outgrow what it saves.
        let max_rows = options.max_rows.max(rules.copies).max((layout.n_sequences * rules.copies).min(MAX_STEP_ROWS));
        let n_threads = match options.n_threads {
            0 => default_threads(),
            n if n <= 1024 => n,
            n => return Err(invalid!("n_threads is {n}, expected 0 to 1024")),
        };
        let context_options = ContextOptions {
            layout,
            cache_type: options.cache_type,
            n_threads,
            batch_invariant: options.batch_invariant,
            max_rows,
            n_logits: 2 * layout.n_sequences + n_every(options),
            n_embeddings: SCORE_ROWS,
        };
        let context = model.backend.clone().context(&context_options)?;
        log::info!(
            "a session of {} positions in blocks of {} for {n_sequences} sequences, {:?} cache, {threads} threads",
            layout.n_positions,
            layout.block,
            options.cache_type,
            n_sequences = layout.n_sequences,
            threads = context.threads(),
        );
        Ok(Session {
            // Sequences may share all their blocks.
            plan: Plan::with_capacity(
                model.hyper.n_layers,
                max_rows,
                layout.n_sequences,
                layout.n_blocks * layout.n_sequences,
                layout.n_sequences + n_every(options),
            )?,
            pool: Pool::new(layout, options.n_retained)?,
            context,
            has_logits: vec![false; layout.n_sequences],
            logits_row: (0..layout.n_sequences).map(|seq| 2 * seq).collect(),
            every: vec![EveryRows::default(); layout.n_sequences],
            policies: vec![Policy::default(); layout.n_sequences],
            parts: Vec::with_capacity(layout.n_sequences),
            cancel: CancelHandle { flags: (0..layout.n_sequences).map(|_| AtomicBool::new(false)).collect() },
            progress: None,
            tokens: Vec::with_capacity(layout.n_blocks * layout.block),
            seen: vec![false; layout.n_sequences],
            asked: Vec::with_capacity(layout.n_sequences),
            options: SessionOptions { max_rows, ..options.clone() },
            stats: Arc::default(),
            model,
        })
    }

    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    pub fn memory(&self) -> Memory {
        let context = self.context.memory();
        Memory {
            weights: self.model.backend.weight_bytes(),
            cache: context.cache,
            hidden: context.hidden,
            scratch: context.scratch + self.pool.bytes(),
        }
    }

    /// Threads that compute, the caller's among them: as many as were asked for, or as there are CPUs for.
    pub fn threads(&self) -> usize {
        self.context.threads()
    }

    pub fn usage(&self) -> Usage {
        self.pool.usage()
    }

    /// Positions of a block.
    pub fn block(&self) -> usize {
        self.pool.layout().block
    }

    /// Counters, readable from any thread while calls run.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Recounts the pool: for tests, and for whoever suspects a leak.
    pub fn audit(&self) -> Result<()> {
        self.pool.audit()
    }

    pub fn cancel_handle(&self) -> CancelHandle {
        self.cancel.clone()
    }

    /// Called with the fraction done between the passes of a call; `false` cancels it.
    pub fn set_progress(&mut self, progress: Option<Progress>) {
        self.progress = progress;
    }

    /// Appends `tokens` to `seq` and leaves the last position's logits.
    ///
    /// # Errors
    /// `InvalidArgument`, `CacheFull`, `Cancelled`: the sequence is what it was, its logits included.
    pub fn prefill(&mut self, seq: i64, tokens: &[i32]) -> Result<()> {
        self.decode(&[BatchEntry { seq, tokens, logits: Logits::Last }])
    }

    /// Extends several sequences at once: all copies of all their tokens share each pass over the weights. Pieces of prompts and
    /// single steps mix freely; a sequence may occur once. On the CPU a sequence's logits do not depend on who shares the batch,
    /// to the bit.
    ///
    /// # Errors
    /// Those of [`Session::prefill`]. A batch is carried out whole or not at all: after an error, the cancelling of any of its
    /// sequences included, all of them are what they were, their logits included. `CacheFull` counts positions of the whole batch.
    pub fn decode(&mut self, batch: &[BatchEntry]) -> Result<()> {
        self.decode_each(batch.len(), &mut |i| Ok(batch[i]))
    }

    /// [`Session::decode`] of `n` entries that are read by index, each once.
    pub(crate) fn decode_each<'a>(
        &mut self,
        n: usize,
        entry: &mut dyn FnMut(usize) -> Result<BatchEntry<'a>>,
    ) -> Result<()> {
        self.extend(n, entry, Purpose::Decode, &mut |_, _, _| Ok(()))
    }

    /// Appends one token.
    pub fn step(&mut self, seq: i64, token: i32) -> Result<()> {
        self.prefill(seq, &[token])
    }

    /// Appends `tokens` and writes `ln p(tokens[i] | everything before it)` for i = 1.. (natural logarithm) to `scores[i - 1]`.
    ///
    /// # Errors
    /// Those of [`Session::prefill`]; `InvalidArgument` unless there is one score less than tokens.
    pub fn score_into(&mut self, seq: i64, tokens: &[i32], scores: &mut [f32]) -> Result<()> {
        if scores.len() + 1 != tokens.len() {
            return Err(invalid!("there is room for {} scores of {} tokens", scores.len(), tokens.len()));
        }
        let first = 2 * self.pool.layout().n_sequences;
        self.extend_one(seq, tokens, Purpose::Score, &mut |context, from, n| {
            for i in 0..n {
                let at = from + i;
                if let Some(&next) = tokens.get(at + 1) {
                    scores[at] = context.log_probability(first + i, next as usize)?;
                }
            }
            Ok(())
        })
    }

    /// [`Session::score_into`] as a vector, empty for a single token.
    pub fn score(&mut self, seq: i64, tokens: &[i32]) -> Result<Vec<f32>> {
        let mut scores = vec![0.0; tokens.len().saturating_sub(1)];
        self.score_into(seq, tokens, &mut scores)?;
        Ok(scores)
    }

    /// Appends `tokens` and writes an embedding of them to `out`, `[n_embd]`: the output norm's row of the last copy, at the last
    /// position or averaged, divided by its length if `normalize`.
    ///
    /// # Errors
    /// Those of [`Session::prefill`]; `InvalidArgument` for another length of `out`.
    pub fn embed(
        &mut self,
        seq: i64,
        tokens: &[i32],
        pooling: Pooling,
        normalize: bool,
        out: &mut [f32],
    ) -> Result<()> {
        let n_embd = self.model.hyper.n_embd;
        if out.len() != n_embd {
            return Err(invalid!("the embedding has room for {} elements, expected {n_embd}", out.len()));
        }
        let mut sum = vec![0.0f64; n_embd];
        let mut count = 0;
        self.extend_one(seq, tokens, Purpose::Embed(pooling), &mut |context, _, n| {
            for row in 0..n {
                sum.iter_mut().zip(context.embedding(row)).for_each(|(s, &x)| *s += f64::from(x));
            }
            count += n;
            Ok(())
        })?;
        let length = sum.iter().map(|s| s * s).sum::<f64>().sqrt();
        let scale = if normalize && length > 0.0 { length } else { count as f64 };
        out.iter_mut().zip(&sum).for_each(|(o, s)| *o = (s / scale) as f32);
        Ok(())
    }

    /// The logits that the last call on `seq` left, `[n_vocab]`.
    pub fn logits(&self, seq: i64) -> Result<&[f32]> {
        self.context.logits(self.logits_row(seq)?)
    }

    /// Whether [`Session::logits`] has any.
    pub(crate) fn has_logits(&self, seq: i64) -> Result<bool> {
        Ok(self.has_logits[self.pool.check_seq(seq)?])
    }

    /// Chooses the next token of `seq` by its logits, as [`Sampler::sample`] does with [`Session::logits`]. Where a GPU computes, and the
    /// best 64 tokens and the sum of all probabilities tell what the sampler chooses, the vocabulary does not leave the GPU.
    ///
    /// # Errors
    /// Those of both.
    pub fn sample(&self, seq: i64, sampler: &mut Sampler) -> Result<u32> {
        self.sample_row(self.logits_row(seq)?, sampler)
    }

    /// The same by the logits of [`Session::logits_at`].
    pub fn sample_at(&self, seq: i64, index: usize, sampler: &mut Sampler) -> Result<u32> {
        self.sample_row(self.logits_row_at(seq, index)?, sampler)
    }

    fn sample_row(&self, logits_row: usize, sampler: &mut Sampler) -> Result<u32> {
        if self.model.hyper.n_vocab == sampler.n_vocab()
            && let Some(top) = self.context.top(logits_row)
            && let Some(token) = sampler.sample_top(&top)
        {
            return Ok(token);
        }
        sampler.sample(self.context.logits(logits_row)?)
    }

    /// Where the logits of `seq` are.
    fn logits_row(&self, seq: i64) -> Result<usize> {
        let seq = self.pool.check_seq(seq)?;
        if !self.has_logits[seq] {
            return Err(invalid!("sequence {seq} has no logits: prefill or step it first"));
        }
        Ok(self.logits_row[seq])
    }

    /// The logits after token `index` of the last entry of `seq`, `[n_vocab]`, if it asked for [`Logits::Every`]. They are there until
    /// `seq` is changed or another call asks for every position's.
    pub fn logits_at(&self, seq: i64, index: usize) -> Result<&[f32]> {
        self.context.logits(self.logits_row_at(seq, index)?)
    }

    fn logits_row_at(&self, seq: i64, index: usize) -> Result<usize> {
        let seq = self.pool.check_seq(seq)?;
        let EveryRows { first, n } = self.every[seq];
        if index >= n {
            return Err(invalid!("sequence {seq} has logits of {n} tokens of its last entry, not of token {index}"));
        }
        Ok(first + index)
    }

    /// Positions in `seq`.
    pub fn len(&self, seq: i64) -> Result<usize> {
        Ok(self.pool.len(self.pool.check_seq(seq)?))
    }

    /// Shortens `seq`; unless that changes nothing its logits are gone. Hidden keys that are needed again are recomputed by
    /// the next call.
    pub fn truncate(&mut self, seq: i64, n_positions: usize) -> Result<()> {
        let seq = self.pool.check_seq(seq)?;
        if n_positions != self.pool.len(seq) {
            self.pool.truncate(seq, n_positions)?;
            self.forget_logits(seq);
        }
        Ok(())
    }

    fn forget_logits(&mut self, seq: usize) {
        self.has_logits[seq] = false;
        self.every[seq] = EveryRows::default();
    }

    /// Positions that could be appended to `seq` now without its policy dropping any.
    pub fn room(&self, seq: i64) -> Result<usize> {
        let seq = self.pool.check_seq(seq)?;
        let room = self.pool.room(seq);
        Ok(match self.policies[seq].limit {
            0 => room,
            limit => room.min(limit.saturating_sub(self.pool.len(seq))),
        })
    }

    /// Tokens of the last entry of `seq` that [`Session::logits_at`] has logits of; 0 if it did not ask for [`Logits::Every`].
    pub fn n_logits_at(&self, seq: i64) -> Result<usize> {
        Ok(self.every[self.pool.check_seq(seq)?].n)
    }

    /// Takes back what the last entry of `seq`, one of [`Logits::Every`], appended after its first `n` tokens: at least one stays.
    /// [`Session::logits`] are then those of the last token that stays, [`Session::logits_at`] has none any more.
    pub fn keep(&mut self, seq: i64, n: usize) -> Result<()> {
        let seq = self.pool.check_seq(seq)?;
        let EveryRows { first, n: n_entry } = self.every[seq];
        if n == 0 || n > n_entry {
            return Err(invalid!(
                "{n} tokens of the last entry of sequence {seq} are to stay, expected 1 to {n_entry}"
            ));
        }
        let row = self.logits_row[seq] ^ 1;
        self.context.copy_logits(first + n - 1, row)?;
        self.pool.truncate(seq, self.pool.len(seq) - n_entry + n)?;
        self.logits_row[seq] = row;
        self.every[seq] = EveryRows::default();
        Ok(())
    }

    /// The token at a position that `seq` has.
    pub(crate) fn token(&self, seq: usize, position: usize) -> u32 {
        self.pool.token(seq, position)
    }

    /// From now on requests to cancel are those of `handle`, of a session that has at least the sequences that calls are made on.
    pub(crate) fn share_cancel_handle(&mut self, handle: CancelHandle) {
        self.cancel = handle;
    }

    /// The tokens of `seq`, in order.
    pub fn tokens(&self, seq: i64) -> Result<impl ExactSizeIterator<Item = u32>> {
        Ok(self.pool.text(self.pool.check_seq(seq)?))
    }

    pub fn cache_type(&self) -> CacheType {
        self.options.cache_type
    }

    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// All stored rows of a sequence in a layer, as [`Context::read_rows`] gives them.
    pub(crate) fn read_stored(&self, seq: i64, layer: usize, mut rows: &mut [u8]) -> Result<()> {
        let bytes = 2 * self.cache_type().row_bytes(self.model.hyper.kv_dim());
        for (first, n) in self.pool.row_runs(self.pool.check_seq(seq)?) {
            let (run, rest) = rows.split_at_mut(n * bytes);
            self.context.read_rows(layer, first, run)?;
            rows = rest;
        }
        Ok(())
    }

    pub(crate) fn write_stored(&mut self, seq: i64, layer: usize, mut rows: &[u8]) -> Result<()> {
        let bytes = 2 * self.cache_type().row_bytes(self.model.hyper.kv_dim());
        for (first, n) in self.pool.row_runs(self.pool.check_seq(seq)?) {
            let (run, rest) = rows.split_at(n * bytes);
            self.context.write_rows(layer, first, run)?;
            rows = rest;
        }
        Ok(())
    }

    /// Makes `seq` a text whose stored rows are still to be written; after an error it is what it was.
    pub(crate) fn put_text(&mut self, seq: i64, tokens: &[u32], dropped: usize) -> Result<()> {
        let seq = self.pool.check_seq(seq)?;
        self.pool.restore(seq, tokens, dropped)?;
        self.stats.set_evicted(self.pool.n_evicted());
        self.forget_logits(seq);
        Ok(())
    }

    pub(crate) fn put_logits(&mut self, seq: i64, logits: &[f32]) -> Result<()> {
        let seq = self.pool.check_seq(seq)?;
        self.context.put_logits(self.logits_row[seq], logits);
        self.has_logits[seq] = true;
        Ok(())
    }

    /// Positions that a policy has dropped from `seq`.
    pub fn dropped(&self, seq: i64) -> Result<usize> {
        Ok(self.pool.dropped(self.pool.check_seq(seq)?))
    }

    /// Empties `seq` and keeps its text, as long as there is room, for [`Session::take_prefix`].
    pub fn retain(&mut self, seq: i64) -> Result<()> {
        let seq = self.pool.check_seq(seq)?;
        self.pool.retain(seq);
        self.stats.set_evicted(self.pool.n_evicted());
        self.forget_logits(seq);
        Ok(())
    }

    /// How many of `tokens` the longest cached text has that they begin with, among all sequences and retained texts; and the
    /// sequence, or `None` for a retained one.
    pub fn match_prefix(&mut self, tokens: &[i32]) -> Result<(usize, Option<usize>)> {
        self.note_tokens(tokens)?;
        Ok(match self.pool.match_prefix(&self.tokens, None) {
            Some((Source::Live(seq), n)) => (n, Some(seq)),
            Some((Source::Retained(_), n)) => (n, None),
            None => (0, None),
        })
    }

    /// Makes `dst`, whatever it held, the longest cached prefix of `tokens` and returns its length. Keys and values are shared, not
    /// computed: what is left to do is to prefill the other tokens (so at least one should be left out here to have logits of), and
    /// to recompute hidden rows: at most one chunk of positions, nothing for PHD, a few windows for PHD-SWA.
    pub fn take_prefix(&mut self, dst: i64, tokens: &[i32]) -> Result<usize> {
        let dst = self.pool.check_seq(dst)?;
        self.note_tokens(tokens)?;
        let found = self.pool.take_prefix(dst, &self.tokens);
        if let Some((Source::Live(src), _)) = found
            && src != dst
        {
            self.copy_rings(src, dst);
        }
        self.forget_logits(dst);
        let n = found.map_or(0, |(_, n)| n);
        self.stats.count_prefix(n);
        Ok(n)
    }

    /// The part of `tokens` that a sequence could hold, checked, into `self.tokens`.
    fn note_tokens(&mut self, tokens: &[i32]) -> Result<()> {
        let (n, n_vocab) = (tokens.len().min(self.pool.layout().n_positions), self.model.hyper.n_vocab);
        self.tokens.clear();
        self.tokens.extend(tokens[..n].iter().map(|&t| t as u32));
        check_tokens(self.tokens.iter().map(|&t| t as i32), n_vocab)
            .map_err(|(i, t)| invalid!("token {i} is {t}, expected 0 to {}", n_vocab - 1))
    }

    /// Decides what happens when `seq` is full, from the next call on.
    ///
    /// # Errors
    /// `InvalidArgument` if the session is too small for the policy.
    pub fn set_policy(&mut self, seq: i64, policy: Policy) -> Result<()> {
        let seq = self.pool.check_seq(seq)?;
        let layout = *self.pool.layout();
        let Policy { when_full, mut limit } = policy;
        if limit > layout.n_positions {
            return Err(invalid!("limit is {limit}, the session has {} positions", layout.n_positions));
        }
        if let WhenFull::DropMiddle { keep } = when_full {
            let keep = layout.whole_blocks(keep.min(layout.n_positions));
            let most = layout.n_positions.saturating_sub(keep + layout.block);
            limit = if limit == 0 { most } else { limit };
            let least = keep + layout.drop_unit + layout.block;
            if limit > most || limit < least {
                return Err(invalid!(
                    "limit is {limit}, expected {least} to {most}: {keep} positions are kept, {} are dropped at a time, and \
                     dropping needs {} more of the session's {}",
                    layout.drop_unit,
                    keep + layout.block,
                    layout.n_positions
                ));
            }
        }
        self.pool.allow_drops(seq, when_full != WhenFull::Stop)?;
        self.policies[seq] = Policy { when_full, limit };
        Ok(())
    }

    /// What must be dropped from `seq` before `n` positions are appended.
    fn to_drop(&self, seq: usize, n: usize) -> Result<Option<Middle>> {
        let Policy { when_full, limit } = self.policies[seq];
        let len = self.pool.len(seq);
        if limit == 0 || len.saturating_add(n) <= limit {
            return Ok(None);
        }
        let full = Err(Error::CacheFull { needed: n, free: limit.saturating_sub(len) });
        let WhenFull::DropMiddle { keep } = when_full else { return full };
        let layout = self.pool.layout();
        let keep = layout.whole_blocks(keep);
        let unit = layout.drop_unit;
        let most = len.saturating_sub(keep) / unit * unit;
        let wanted = (len + n - limit).max(len.saturating_sub(keep) / 2).next_multiple_of(unit);
        let dropped = wanted.min(most);
        // RoPE positions are 32 bits wide.
        let rope = (self.pool.dropped(seq) + len + n) * self.model.hyper.rules.copies;
        if len + n - dropped > limit || rope > u32::MAX as usize {
            return full;
        }
        Ok(Some(Middle { keep, n: dropped }))
    }

    /// Makes `dst` a copy of `src`, logits included, whatever it held before. Cache blocks are shared until one of the two
    /// writes into them.
    pub fn fork(&mut self, src: i64, dst: i64) -> Result<()> {
        let (src, dst) = (self.pool.check_seq(src)?, self.pool.check_seq(dst)?);
        if src == dst {
            return Ok(());
        }
        let row = self.logits_row[dst] ^ 1;
        if self.has_logits[src] {
            self.context.copy_logits(self.logits_row[src], row)?;
        }
        self.pool.fork(src, dst);
        self.copy_rings(src, dst);
        self.forget_logits(dst);
        (self.has_logits[dst], self.logits_row[dst]) = (self.has_logits[src], row);
        Ok(())
    }

    /// Copies rings to a sequence that the pool has made the same text. If the device fails they are lost, and computed anew.
    fn copy_rings(&mut self, src: usize, dst: usize) {
        if let Err(error) = self.context.copy_rings(src, dst) {
            log::error!("{error}");
            self.pool.set_ring(dst, Ring::LOST);
        }
    }

    fn extend_one(&mut self, seq: i64, tokens: &[i32], purpose: Purpose, each_pass: EachPass) -> Result<()> {
        self.extend(1, &mut |_| Ok(BatchEntry { seq, tokens, logits: Logits::Nothing }), purpose, each_pass)
    }

    /// The one way by which sequences grow.
    fn extend<'a>(
        &mut self,
        n: usize,
        entry: &mut dyn FnMut(usize) -> Result<BatchEntry<'a>>,
        purpose: Purpose,
        each_pass: EachPass,
    ) -> Result<()> {
        let begin = Instant::now();
        let result = self.begin(n, entry, purpose).and_then(|()| self.run_parts(purpose, each_pass));
        let is_step = self.parts.iter().all(|p| p.task.end - p.task.start == 1);
        match &result {
            Ok(()) => {
                let (rules, n_layers) = (self.model.hyper.rules, self.model.hyper.n_layers);
                let capacity = self.pool.layout().ring_capacity;
                for part in self.parts.drain(..) {
                    let Task { seq, start, end, wanted, .. } = part.task;
                    self.stats.count_tokens(end - start, part.reservation.dropped());
                    self.pool.commit(part.reservation);
                    self.pool.set_ring(seq, part.task.ring_after(&rules, n_layers, capacity, part.ring));
                    self.has_logits[seq] =
                        matches!(wanted, Wanted::Last(_) | Wanted::Every(_)) && purpose == Purpose::Decode;
                    self.every[seq] = EveryRows::default();
                    match wanted {
                        Wanted::Last(row) if purpose == Purpose::Decode => self.logits_row[seq] = row,
                        Wanted::Every(first) => {
                            self.every[seq] = EveryRows { first, n: end - start };
                            self.logits_row[seq] ^= 1;
                        }
                        _ => {}
                    }
                }
            }
            Err(error) => {
                // The last reservation first: each goes back to what it found.
                while let Some(part) = self.parts.pop() {
                    self.pool.undo(part.reservation);
                    if part.touched {
                        self.pool.set_ring(part.task.seq, Ring::LOST);
                    }
                }
                self.stats.count_failure(error);
                log::debug!("a call of {n} entries: {error}");
            }
        }
        self.stats.count_call(is_step, begin.elapsed());
        let evicted = self.pool.n_evicted();
        let more = evicted - self.stats.set_evicted(evicted);
        if more > 0 {
            log::debug!("retained texts gave up {more} positions");
        }
        result
    }

    /// Checks a batch and reserves its positions, into `parts`.
    fn begin<'a>(
        &mut self,
        n: usize,
        entry: &mut dyn FnMut(usize) -> Result<BatchEntry<'a>>,
        purpose: Purpose,
    ) -> Result<()> {
        let (rules, n_layers, n_vocab) = (self.model.hyper.rules, self.model.hyper.n_layers, self.model.hyper.n_vocab);
        let n_sequences = self.pool.layout().n_sequences;
        if n == 0 {
            return Err(invalid!("the batch is empty, expected at least one entry"));
        }
        if n > n_sequences {
            return Err(invalid!("the batch has {n} entries, the session {n_sequences} sequences"));
        }
        let mut n_every_rows = 0;
        self.seen.fill(false);
        self.asked.clear();
        self.tokens.clear();
        for i in 0..n {
            let BatchEntry { seq, tokens, logits } = entry(i)?;
            let seq = self.pool.check_seq(seq)?;
            if std::mem::replace(&mut self.seen[seq], true) {
                return Err(invalid!("sequence {seq} occurs twice in the batch"));
            }
            if tokens.is_empty() {
                return Err(invalid!("no tokens given for sequence {seq}, expected at least one"));
            }
            if logits == Logits::Every {
                n_every_rows += tokens.len();
            }
            self.asked.push(Asked { seq, n: tokens.len(), logits, dropped: self.to_drop(seq, tokens.len())? });
            // What does not fit here has no room in the pool, which is found out below.
            let from = self.tokens.len();
            let (copied, rest) = tokens.split_at(tokens.len().min(self.tokens.capacity() - from));
            self.tokens.extend(copied.iter().map(|&t| t as u32));
            check_tokens(self.tokens[from..].iter().map(|&t| t as i32).chain(rest.iter().copied()), n_vocab)
                .map_err(|(i, t)| invalid!("token {i} of sequence {seq} is {t}, expected 0 to {}", n_vocab - 1))?;
        }
        if n_every_rows > n_every(&self.options) {
            let most = n_every(&self.options);
            return Err(invalid!(
                "the batch asks for the logits of {n_every_rows} tokens, expected at most {most}: see n_draft"
            ));
        }
        let room = self.asked.iter().map(|asked| (asked.seq, asked.n, asked.dropped));
        let mut spare = self.pool.check_room(room)?;
        let (mut every_row, mut at) = (2 * n_sequences, 0);
        for &Asked { seq, n, logits, dropped } in &self.asked {
            let tokens = &self.tokens[at..at + n];
            at += n;
            let before = self.pool.ring(seq);
            let (reservation, copy) = self.pool.reserve(seq, tokens, dropped, &mut spare)?;
            if let Some(Middle { keep, n }) = dropped {
                log::debug!("sequence {seq} is full: drops {n} positions after the first {keep}");
            }
            let start = self.pool.len(seq);
            let wanted = match (purpose, logits) {
                (Purpose::Score, _) => Wanted::EveryInPass(every_row),
                (Purpose::Embed(Pooling::Mean), _) => Wanted::EveryInPass(0),
                (Purpose::Embed(Pooling::Last), _) => Wanted::Last(0),
                (Purpose::Decode, Logits::Nothing) => Wanted::Nothing,
                (Purpose::Decode, Logits::Last) => Wanted::Last(self.logits_row[seq] ^ 1),
                (Purpose::Decode, Logits::Every) => Wanted::Every(every_row),
            };
            if let Wanted::Every(_) | Wanted::EveryInPass(_) = wanted {
                self.every.fill(EveryRows::default());
                every_row += tokens.len();
            }
            // What hidden rows saw has changed.
            let ring = if dropped.is_some() { Ring::LOST } else { before };
            let range = start..start + tokens.len();
            let task = Task::new(&rules, n_layers, seq, range, ring, wanted, self.options.pruning);
            let anew = dropped.map_or(0, |m| m.keep);
            self.parts.push(Part { task, reservation, ring, anew, touched: false });
            if let Some(copy) = copy {
                self.context.copy_block(copy)?;
            }
        }
        Ok(())
    }

    /// Runs the parts of a call pass by pass.
    fn run_parts(&mut self, purpose: Purpose, each_pass: EachPass) -> Result<()> {
        let rules = self.model.hyper.rules;
        let max_outputs = match purpose {
            Purpose::Decode => self.pool.layout().n_sequences + n_every(&self.options),
            Purpose::Score | Purpose::Embed(_) => SCORE_ROWS,
        };
        for i in 0..self.parts.len() {
            if self.parts[i].anew > 0 {
                let mut task = Task::stored_only(self.parts[i].task.seq, 0..self.parts[i].anew);
                while !task.is_done() {
                    self.plan.clear();
                    self.plan.add(&rules, &mut task, &self.pool, self.options.max_rows, 0);
                    self.run_plan()?;
                }
            }
        }
        let mut done = 0;
        while self.parts.iter().any(|p| !p.task.is_done()) {
            self.plan.clear();
            self.plan.is_embedding = matches!(purpose, Purpose::Embed(_));
            for part in self.parts.iter_mut().filter(|p| !p.task.is_done()) {
                let before = self.plan.entries.len();
                self.plan.add(&rules, &mut part.task, &self.pool, self.options.max_rows, max_outputs);
                part.touched |= self.plan.entries.len() > before;
            }
            self.run_plan()?;
            each_pass(&*self.context, done, self.plan.outputs.len())?;
            done += self.plan.outputs.len();
            if let Some(progress) = &mut self.progress {
                let (mut computed, mut all) = (0.0, 0.0);
                for Part { task, .. } in &self.parts {
                    let n = (task.end - task.start) as f32;
                    (computed, all) = (computed + task.fraction_done() * n, all + n);
                }
                let is_done = self.parts.iter().all(|p| p.task.is_done());
                if !is_done && !progress(computed / all) {
                    return Err(Error::Cancelled);
                }
            }
        }
        for Part { task, .. } in &self.parts {
            if let Wanted::Every(first) = task.wanted {
                self.context.copy_logits(first + task.end - task.start - 1, self.logits_row[task.seq] ^ 1)?;
            }
        }
        Ok(())
    }

    /// One pass over the weights.
    fn run_plan(&mut self) -> Result<()> {
        let (flags, parts) = (&self.cancel.flags, &self.parts);
        if use_up(flags, parts) {
            return Err(Error::Cancelled);
        }
        if self.plan.entries.is_empty() {
            return Err(Error::Internal("no position fits into a pass".to_owned()));
        }
        let is_cancelled = || parts.iter().any(|p| flags[p.task.seq].load(Ordering::Acquire));
        if let Err(error) = self.context.run(&self.plan, &is_cancelled) {
            use_up(flags, parts);
            return Err(error);
        }
        self.stats.count_pass(self.plan.layers.iter().map(|l| l.enter.len() as u64).sum());
        Ok(())
    }
}

/// What sequences are extended for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Decode,
    Score,
    Embed(Pooling),
}

/// Logits rows beside the sequences' own.
fn n_every(options: &SessionOptions) -> usize {
    let drafts = if options.n_draft == 0 { 0 } else { options.n_sequences * (options.n_draft + 1) };
    drafts.max(SCORE_ROWS)
}

/// The first token outside the vocabulary, with its index.
fn check_tokens(tokens: impl Iterator<Item = i32>, n_vocab: usize) -> Result<(), (usize, i32)> {
    let is_known = |t: i32| usize::try_from(t).is_ok_and(|t| t < n_vocab);
    tokens.enumerate().find(|&(_, t)| !is_known(t)).map_or(Ok(()), Err)
}

/// Takes back the requests to cancel any of `parts`; whether there were any.
fn use_up(flags: &[AtomicBool], parts: &[Part]) -> bool {
    parts.iter().filter(|p| flags[p.task.seq].swap(false, Ordering::AcqRel)).count() > 0
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::model::{BackendKind, LoadOptions};

    /// How often a pass of more rows than are captured as a graph asks whether it is cancelled; whenever it is, it ends.
    fn asked(backend: BackendKind) -> (usize, usize) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/english-phd-cswa-2-16-32");
        let model = Arc::new(Model::load(&path, LoadOptions { backend, ..Default::default() }).unwrap());
        let n_layers = model.hyper.n_layers;
        let mut s =
            Session::new(model, &SessionOptions { n_positions: 128, max_rows: 160, ..Default::default() }).unwrap();
        s.prefill(0, &[7; 70]).unwrap();
        let asked = |s: &mut Session, most: usize| {
            let n = AtomicUsize::new(0);
            let cancelled = || n.fetch_add(1, Ordering::Relaxed) >= most;
            let result = s.context.run(&s.plan, &cancelled);
            assert!(matches!(result, Ok(()) | Err(Error::Cancelled)), "{result:?}");
            (result.is_ok(), n.into_inner())
        };
        let (is_done, n) = asked(&mut s, usize::MAX);
        assert!(is_done);
        for most in 0..n.min(20) {
            let (is_done, so_often) = asked(&mut s, most);
            assert!(!is_done && so_often == most + 1, "{so_often} after {most}");
        }
        (n, n_layers)
    }

    #[test]
    fn a_pass_asks_several_times_a_layer() {
        let (n, n_layers) = asked(BackendKind::Reference);
        assert!(n >= n_layers, "{n}");
    }

    /// Threads wait for each other once before each of six phases of a layer, and before the logits.
    #[test]
    fn a_step_has_few_barriers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/english-phd-cswa-2-16-32");
        let options = LoadOptions { backend: BackendKind::Cpu, ..Default::default() };
        let model = Arc::new(Model::load(&path, options).unwrap());
        let n_layers = model.hyper.n_layers;
        let mut s = Session::new(model, &SessionOptions { n_positions: 512, ..Default::default() }).unwrap();
        // Contexts that threads do not share, and some that they do.
        for len in [70, 400] {
            let before = s.len(0).unwrap();
            s.prefill(0, &vec![7; len - before]).unwrap();
            let before = s.context.barriers();
            s.step(0, 7).unwrap();
            assert_eq!(s.context.barriers() - before, 6 * n_layers + 1, "{len} positions");
        }
    }

    #[test]
    #[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
    fn cuda_asks_before_the_pass_each_layer_and_the_outputs() {
        let (n, n_layers) = asked(BackendKind::Cuda);
        assert_eq!(n, n_layers + 2);
    }
}
