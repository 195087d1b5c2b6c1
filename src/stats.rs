//! Counters for a metrics page: written by calls, readable from any thread while they run.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::error::Error;

/// Running totals of a session since it was made.
#[derive(Debug, Default)]
pub struct Stats {
    prompt_tokens: AtomicU64,
    step_tokens: AtomicU64,
    prefill_ns: AtomicU64,
    step_ns: AtomicU64,
    wait_ns: AtomicU64,
    calls: AtomicU64,
    passes: AtomicU64,
    rows: AtomicU64,
    cancelled: AtomicU64,
    full: AtomicU64,
    prefix_lookups: AtomicU64,
    prefix_hits: AtomicU64,
    prefix_tokens: AtomicU64,
    dropped: AtomicU64,
    evicted: AtomicU64,
}

/// What [`Stats`] held at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Positions appended by entries of several tokens.
    pub prompt_tokens: u64,
    /// Positions appended by entries of one token.
    pub step_tokens: u64,
    /// Time in calls with any entry of several tokens.
    pub prefill: Duration,
    /// Time in calls of single tokens only.
    pub step: Duration,
    /// Time that calls have waited for one another.
    pub wait: Duration,
    /// Calls that extend sequences, failed ones included.
    pub calls: u64,
    /// Passes over the weights.
    pub passes: u64,
    /// Rows that have entered a layer, summed over layers.
    pub rows: u64,
    pub cancelled: u64,
    /// Calls that found the cache full.
    pub full: u64,
    pub prefix_lookups: u64,
    /// Look-ups that found at least one token.
    pub prefix_hits: u64,
    /// Positions that were taken over instead of computed.
    pub prefix_tokens: u64,
    /// Positions dropped by policies.
    pub dropped: u64,
    /// Positions that retained texts have given up.
    pub evicted: u64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

impl Stats {
    pub(crate) fn count_tokens(&self, n: usize, dropped: usize) {
        add(if n == 1 { &self.step_tokens } else { &self.prompt_tokens }, n as u64);
        add(&self.dropped, dropped as u64);
    }

    pub(crate) fn count_call(&self, is_step: bool, time: Duration) {
        add(&self.calls, 1);
        add(if is_step { &self.step_ns } else { &self.prefill_ns }, time.as_nanos() as u64);
    }

    pub(crate) fn count_wait(&self, time: Duration) {
        add(&self.wait_ns, time.as_nanos() as u64);
    }

    pub(crate) fn count_pass(&self, rows: u64) {
        add(&self.passes, 1);
        add(&self.rows, rows);
    }

    pub(crate) fn count_failure(&self, error: &Error) {
        match error {
            Error::Cancelled => add(&self.cancelled, 1),
            Error::CacheFull { .. } => add(&self.full, 1),
            _ => {}
        }
    }

    pub(crate) fn count_prefix(&self, n: usize) {
        add(&self.prefix_lookups, 1);
        add(&self.prefix_hits, u64::from(n > 0));
        add(&self.prefix_tokens, n as u64);
    }

    /// Returns what it was.
    pub(crate) fn set_evicted(&self, n: u64) -> u64 {
        self.evicted.swap(n, Relaxed)
    }

    pub fn snapshot(&self) -> Snapshot {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        Snapshot {
            prompt_tokens: read(&self.prompt_tokens),
            step_tokens: read(&self.step_tokens),
            prefill: Duration::from_nanos(read(&self.prefill_ns)),
            step: Duration::from_nanos(read(&self.step_ns)),
            wait: Duration::from_nanos(read(&self.wait_ns)),
            calls: read(&self.calls),
            passes: read(&self.passes),
            rows: read(&self.rows),
            cancelled: read(&self.cancelled),
            full: read(&self.full),
            prefix_lookups: read(&self.prefix_lookups),
            prefix_hits: read(&self.prefix_hits),
            prefix_tokens: read(&self.prefix_tokens),
            dropped: read(&self.dropped),
            evicted: read(&self.evicted),
        }
    }
}
