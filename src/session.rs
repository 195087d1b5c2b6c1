//! Sessions: a fixed cache, the sequences in it, and the calls that extend them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{Context, ContextOptions};
use crate::cache::{BlockCopy, Layout, Pool, Reservation, Usage};
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

/// Logits rows of a scoring pass, beside those of the sequences.
const SCORE_ROWS: usize = 16;

type Progress = Box<dyn FnMut(f32) -> bool + Send>;

pub struct Session {
    model: Arc<Model>,
    options: SessionOptions,
    pool: Pool,
    context: Box<dyn Context>,
    plan: Plan,
    has_logits: Vec<bool>,
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
        let max_rows = options.max_rows.max(rules.copies);
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
            n_logits: layout.n_sequences + SCORE_ROWS,
        };
        let context = model.backend.clone().context(&context_options)?;
        Ok(Session {
            plan: Plan::with_capacity(model.hyper.n_layers, max_rows, 1, layout.n_blocks, SCORE_ROWS),
            pool: Pool::new(layout),
            context,
            has_logits: vec![false; layout.n_sequences],
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
        self.append(seq, tokens, Wanted::Last, &mut |_, _, _| {})
    }

    /// Appends one token.
    pub fn step(&mut self, seq: i64, token: i32) -> Result<()> {
        self.prefill(seq, &[token])
    }

    /// Appends `tokens` and returns `ln p(tokens[i] | everything before it)` for i = 1.. (natural logarithm).
    pub fn score(&mut self, seq: i64, tokens: &[i32]) -> Result<Vec<f32>> {
        let mut scores = Vec::with_capacity(tokens.len().saturating_sub(1));
        let start = self.pool.len(self.pool.check_seq(seq)?);
        let first = self.pool.layout().n_sequences;
        self.append(seq, tokens, Wanted::Every(first), &mut |context, from, n| {
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
        Ok(self.context.logits(seq))
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
        self.context.copy_logits(src, dst);
        self.has_logits[dst] = self.has_logits[src];
        Ok(())
    }

    /// The one way by which sequences grow. `each_pass` sees the context after a pass: its first new position, and how
    /// many positions have logits.
    fn append(
        &mut self,
        seq: i64,
        tokens: &[i32],
        wanted: Wanted,
        each_pass: &mut dyn FnMut(&dyn Context, usize, usize),
    ) -> Result<()> {
        let seq = self.pool.check_seq(seq)?;
        if tokens.is_empty() {
            return Err(invalid!("no tokens given, expected at least one"));
        }
        let room = self.pool.room(seq);
        if tokens.len() > room {
            return Err(Error::CacheFull { needed: tokens.len(), free: room });
        }
        let n_vocab = self.model.hyper.n_vocab;
        self.tokens.clear();
        for (i, &token) in tokens.iter().enumerate() {
            let id = u32::try_from(token).ok().filter(|&t| (t as usize) < n_vocab);
            self.tokens.push(id.ok_or_else(|| invalid!("token {i} is {token}, expected 0 to {}", n_vocab - 1))?);
        }
        let start = self.pool.len(seq);
        let ring = self.pool.ring(seq);
        let (reservation, copy) = self.pool.reserve(seq, &self.tokens)?;
        let rules = self.model.hyper.rules;
        let n_layers = self.model.hyper.n_layers;
        let range = start..start + tokens.len();
        let mut task = Task::new(&rules, n_layers, seq, range, ring, wanted, self.options.pruning);
        match self.run_task(&mut task, copy, each_pass) {
            Ok(()) => {
                self.pool.commit(reservation);
                self.pool.set_ring(seq, task.ring_after(&rules, n_layers, ring));
                self.has_logits[seq] = wanted == Wanted::Last;
                Ok(())
            }
            Err((error, touched)) => {
                self.roll_back(reservation, seq, touched);
                if touched && wanted != Wanted::Last {
                    self.has_logits[seq] = false;
                }
                Err(error)
            }
        }
    }

    /// Runs a task pass by pass. The error says whether any pass was begun.
    fn run_task(
        &mut self,
        task: &mut Task,
        copy: Option<BlockCopy>,
        each_pass: &mut dyn FnMut(&dyn Context, usize, usize),
    ) -> Result<(), (Error, bool)> {
        let rules = self.model.hyper.rules;
        let flags = self.cancel.flags.clone();
        let flag = &flags[task.seq];
        if let Some(copy) = copy {
            self.context.copy_block(copy);
        }
        let mut touched = false;
        let mut done = task.start;
        while !task.is_done() {
            if flag.swap(false, Ordering::AcqRel) {
                return Err((Error::Cancelled, touched));
            }
            self.plan.clear();
            self.plan.add(&rules, task, &self.pool, self.options.max_rows, SCORE_ROWS);
            if self.plan.entries.is_empty() {
                return Err((Error::Internal("no position fits into a pass".to_owned()), touched));
            }
            touched = true;
            let result = self.context.run(&self.plan, &|| flag.load(Ordering::Acquire));
            if let Err(error) = result {
                flag.store(false, Ordering::Release);
                return Err((error, touched));
            }
            self.rows_computed += self.plan.layers.iter().map(|l| l.enter.len() as u64).sum::<u64>();
            each_pass(&*self.context, done, self.plan.outputs.len());
            done += self.plan.outputs.len();
            if let Some(progress) = &mut self.progress {
                let fraction = task.fraction_done();
                if !task.is_done() && !progress(fraction) {
                    return Err((Error::Cancelled, touched));
                }
            }
        }
        Ok(())
    }

    fn roll_back(&mut self, reservation: Reservation, seq: usize, touched: bool) {
        self.pool.undo(reservation);
        if touched {
            self.pool.set_ring(seq, Ring::LOST);
        }
    }
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
