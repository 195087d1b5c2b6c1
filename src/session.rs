//! Sessions: a fixed cache, the sequences in it, and the calls that extend them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{Context, ContextOptions};
use crate::cache::{Layout, Pool, Reservation, Usage};
use crate::error::{Error, Result, invalid};
use crate::model::Model;
use crate::schedule::{Plan, Pruning, Ring, Task, Wanted};

pub use crate::backend::CacheType;

#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// The whole cache, in positions, shared by all sequences.
    pub n_positions: usize,
    pub n_sequences: usize,
    /// 0 = one for each physical core that this process may use.
    pub n_threads: usize,
    pub cache_type: CacheType,
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

/// Rows that a pass always has room for if the session's sequences can make so many by one step each.
const MAX_STEP_ROWS: usize = 1024;

/// Logits rows of a scoring pass, beside those of the sequences.
const SCORE_ROWS: usize = 16;

type Progress = Box<dyn FnMut(f32) -> bool + Send>;

/// One sequence's part of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchEntry<'a> {
    pub seq: i64,
    /// What is appended: a piece of a prompt, or one token.
    pub tokens: &'a [i32],
    /// Whether the last position's logits are left; otherwise the sequence has none afterwards.
    pub logits: bool,
}

/// An entry on its way.
struct Part {
    task: Task,
    reservation: Reservation,
    ring: Ring,
    /// Whether any pass has computed something of it.
    touched: bool,
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
    /// The running call's, empty between calls.
    parts: Vec<Part>,
    cancel: CancelHandle,
    progress: Option<Progress>,
    /// Token ids of the call, as the pool wants them.
    tokens: Vec<u32>,
    rows_computed: u64,
}

impl Session {
    /// Everything that prefill and step need is allocated here.
    ///
    /// # Errors
    /// `InvalidArgument` for counts out of range, `OutOfMemory`.
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Session> {
        let rules = model.hyper.rules;
        let layout = Layout::new(&rules, options.n_positions, options.n_sequences)?;
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
            max_rows,
            n_logits: 2 * layout.n_sequences + SCORE_ROWS,
        };
        let context = model.backend.clone().context(&context_options)?;
        Ok(Session {
            // Sequences may share all their blocks.
            plan: Plan::with_capacity(
                model.hyper.n_layers,
                max_rows,
                layout.n_sequences,
                layout.n_blocks * layout.n_sequences,
                layout.n_sequences.max(SCORE_ROWS),
            ),
            pool: Pool::new(layout),
            context,
            has_logits: vec![false; layout.n_sequences],
            logits_row: (0..layout.n_sequences).map(|seq| 2 * seq).collect(),
            parts: Vec::with_capacity(layout.n_sequences),
            cancel: CancelHandle { flags: (0..layout.n_sequences).map(|_| AtomicBool::new(false)).collect() },
            progress: None,
            tokens: Vec::with_capacity(layout.n_positions),
            options: SessionOptions { max_rows, ..options.clone() },
            rows_computed: 0,
            model,
        })
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

    pub fn usage(&self) -> Usage {
        self.pool.usage()
    }

    /// Rows that have entered a layer since the session was made, summed over layers.
    pub fn rows_computed(&self) -> u64 {
        self.rows_computed
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
        self.decode(&[BatchEntry { seq, tokens, logits: true }])
    }

    /// Extends several sequences at once: all copies of all their tokens share each pass over the weights. Pieces of prompts and
    /// single steps mix freely; a sequence may occur once. On the CPU a sequence's logits do not depend on who shares the batch,
    /// to the bit.
    ///
    /// # Errors
    /// Those of [`Session::prefill`]. A batch is carried out whole or not at all: after an error, the cancelling of any of its
    /// sequences included, all of them are what they were, their logits included. `CacheFull` counts positions of the whole batch.
    pub fn decode(&mut self, batch: &[BatchEntry]) -> Result<()> {
        self.extend(&mut batch.iter().copied().map(Ok), None, &mut |_, _, _| {})
    }

    /// [`Session::decode`] for entries that are read one by one.
    pub(crate) fn decode_each<'a>(&mut self, batch: &mut dyn Iterator<Item = Result<BatchEntry<'a>>>) -> Result<()> {
        self.extend(batch, None, &mut |_, _, _| {})
    }

    /// Appends one token.
    pub fn step(&mut self, seq: i64, token: i32) -> Result<()> {
        self.prefill(seq, &[token])
    }

    /// Appends `tokens` and returns `ln p(tokens[i] | everything before it)` for i = 1.. (natural logarithm).
    pub fn score(&mut self, seq: i64, tokens: &[i32]) -> Result<Vec<f32>> {
        let mut scores = Vec::with_capacity(tokens.len().saturating_sub(1));
        let start = self.pool.len(self.pool.check_seq(seq)?);
        let first = 2 * self.pool.layout().n_sequences;
        let entry = BatchEntry { seq, tokens, logits: false };
        self.extend(&mut std::iter::once(Ok(entry)), Some(first), &mut |context, from, n| {
            for i in 0..n {
                if let Some(&next) = tokens.get(from + i + 1 - start) {
                    scores.push(log_probability(context.logits(first + i), next as usize));
                }
            }
        })?;
        Ok(scores)
    }

    /// The logits that the last call on `seq` left, `[n_vocab]`.
    pub fn logits(&self, seq: i64) -> Result<&[f32]> {
        let seq = self.pool.check_seq(seq)?;
        if !self.has_logits[seq] {
            return Err(invalid!("sequence {seq} has no logits: prefill or step it first"));
        }
        Ok(self.context.logits(self.logits_row[seq]))
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
            self.has_logits[seq] = false;
        }
        Ok(())
    }

    /// Makes `dst` a copy of `src`, logits included, whatever it held before. Cache blocks are shared until one of the two
    /// writes into them.
    pub fn fork(&mut self, src: i64, dst: i64) -> Result<()> {
        let (src, dst) = (self.pool.check_seq(src)?, self.pool.check_seq(dst)?);
        if src == dst {
            return Ok(());
        }
        self.pool.fork(src, dst);
        self.context.copy_rings(src, dst);
        self.context.copy_logits(self.logits_row[src], self.logits_row[dst]);
        self.has_logits[dst] = self.has_logits[src];
        Ok(())
    }

    /// The one way by which sequences grow. `every` is the first logits row for a single entry that wants all its positions';
    /// `each_pass` sees the context after a pass of it: its first new position, and how many positions have logits.
    fn extend<'a>(
        &mut self,
        batch: &mut dyn Iterator<Item = Result<BatchEntry<'a>>>,
        every: Option<usize>,
        each_pass: &mut dyn FnMut(&dyn Context, usize, usize),
    ) -> Result<()> {
        let result = self.begin(batch, every).and_then(|()| self.run_parts(every.is_some(), each_pass));
        match &result {
            Ok(()) => {
                let (rules, n_layers) = (self.model.hyper.rules, self.model.hyper.n_layers);
                for part in self.parts.drain(..) {
                    let seq = part.task.seq;
                    self.pool.commit(part.reservation);
                    self.pool.set_ring(seq, part.task.ring_after(&rules, n_layers, part.ring));
                    self.has_logits[seq] = false;
                    if let Wanted::Last(row) = part.task.wanted {
                        (self.has_logits[seq], self.logits_row[seq]) = (true, row);
                    }
                }
            }
            Err(_) => {
                // The last reservation first: each goes back to what it found.
                while let Some(part) = self.parts.pop() {
                    self.pool.undo(part.reservation);
                    if part.touched {
                        self.pool.set_ring(part.task.seq, Ring::LOST);
                    }
                }
            }
        }
        result
    }

    /// Checks a batch and reserves its positions, into `parts`.
    fn begin<'a>(
        &mut self,
        batch: &mut dyn Iterator<Item = Result<BatchEntry<'a>>>,
        every: Option<usize>,
    ) -> Result<()> {
        let (rules, n_layers, n_vocab) = (self.model.hyper.rules, self.model.hyper.n_layers, self.model.hyper.n_vocab);
        let mut total = 0usize;
        while let Some(entry) = batch.next().transpose()? {
            let seq = self.pool.check_seq(entry.seq)?;
            if self.parts.iter().any(|p| p.task.seq == seq) {
                return Err(invalid!("sequence {seq} occurs twice in the batch"));
            }
            if entry.tokens.is_empty() {
                return Err(invalid!("no tokens given for sequence {seq}, expected at least one"));
            }
            let room = self.pool.room(seq);
            if entry.tokens.len() > room {
                let mut needed = total.saturating_add(entry.tokens.len());
                while let Some(later) = batch.next().transpose()? {
                    needed = needed.saturating_add(later.tokens.len());
                }
                return Err(Error::CacheFull { needed, free: total + room });
            }
            total += entry.tokens.len();
            self.tokens.clear();
            for (i, &token) in entry.tokens.iter().enumerate() {
                let id = u32::try_from(token).ok().filter(|&t| (t as usize) < n_vocab);
                self.tokens.push(id.ok_or_else(|| {
                    invalid!("token {i} of sequence {seq} is {token}, expected 0 to {}", n_vocab - 1)
                })?);
            }
            let (start, ring) = (self.pool.len(seq), self.pool.ring(seq));
            let (reservation, copy) = self.pool.reserve(seq, &self.tokens)?;
            if let Some(copy) = copy {
                self.context.copy_block(copy);
            }
            let wanted = match every {
                Some(first) => Wanted::Every(first),
                None if entry.logits => Wanted::Last(self.logits_row[seq] ^ 1),
                None => Wanted::Nothing,
            };
            let range = start..start + entry.tokens.len();
            let task = Task::new(&rules, n_layers, seq, range, ring, wanted, self.options.pruning);
            self.parts.push(Part { task, reservation, ring, touched: false });
        }
        if self.parts.is_empty() { Err(invalid!("the batch is empty, expected at least one entry")) } else { Ok(()) }
    }

    /// Runs the parts of a call pass by pass.
    fn run_parts(&mut self, is_score: bool, each_pass: &mut dyn FnMut(&dyn Context, usize, usize)) -> Result<()> {
        let rules = self.model.hyper.rules;
        let flags = self.cancel.flags.clone();
        let max_outputs = if is_score { SCORE_ROWS } else { self.pool.layout().n_sequences };
        let mut done = self.parts[0].task.start;
        while self.parts.iter().any(|p| !p.task.is_done()) {
            if use_up(&flags, &self.parts) {
                return Err(Error::Cancelled);
            }
            self.plan.clear();
            for part in self.parts.iter_mut().filter(|p| !p.task.is_done()) {
                let before = self.plan.entries.len();
                self.plan.add(&rules, &mut part.task, &self.pool, self.options.max_rows, max_outputs);
                part.touched |= self.plan.entries.len() > before;
            }
            if self.plan.entries.is_empty() {
                return Err(Error::Internal("no position fits into a pass".to_owned()));
            }
            let parts = &self.parts;
            let is_cancelled = || parts.iter().any(|p| flags[p.task.seq].load(Ordering::Acquire));
            if let Err(error) = self.context.run(&self.plan, &is_cancelled) {
                use_up(&flags, &self.parts);
                return Err(error);
            }
            self.rows_computed += self.plan.layers.iter().map(|l| l.enter.len() as u64).sum::<u64>();
            each_pass(&*self.context, done, self.plan.outputs.len());
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
        Ok(())
    }
}

/// Takes back the requests to cancel any of `parts`; whether there were any.
fn use_up(flags: &[AtomicBool], parts: &[Part]) -> bool {
    parts.iter().filter(|p| flags[p.task.seq].swap(false, Ordering::AcqRel)).count() > 0
}

/// `ln softmax(logits)[token]`, summed in f64.
fn log_probability(logits: &[f32], token: usize) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    (f64::from(logits[token] - max) - sum.ln()) as f32
}

/// One thread for each physical core that affinity and the container's CPU quota leave to this process.
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    allowed.min(num_cpus::get_physical()).max(1)
}
