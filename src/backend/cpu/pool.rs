//! Threads that carry out a whole step together: woken once, then kept in time by barriers.
//!
//! Who waits spins briefly, then yields, and between steps sleeps. A panic in one thread releases all others; the step fails and
//! the pool remains usable.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long a thread without work stays awake: a caller that samples between steps finds its threads running.
const AWAKE: Duration = Duration::from_micros(500);
/// Polls before a waiting thread lets others run: some tens of microseconds.
const SPINS: u32 = 1000;

/// CPUs that affinity and the container's quota leave to this process: more threads would only wait for each other.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

type Job<'a> = &'a (dyn Fn(&Worker) + Sync);

struct State {
    n: usize,
    /// Number of the current job.
    epoch: AtomicUsize,
    job: UnsafeCell<Option<Job<'static>>>,
    stop_asked: AtomicBool,
    panicked: AtomicBool,
    arrived: Counter,
    /// Barriers passed, and in the lowest bit whether the step is to end here.
    passed: Counter,
    /// Pieces taken of each thread's share in this phase.
    taken: Box<[Counter]>,
    done: AtomicU32,
    shutdown: AtomicBool,
}

/// On a memory line of its own, which nobody waits for who reads or writes another.
#[repr(align(128))]
#[derive(Default)]
struct Counter(AtomicUsize);

impl State {
    fn begin_phase(&self) {
        self.taken.iter().for_each(|t| t.0.store(0, Ordering::Relaxed));
    }
}

// SAFETY: `job` is written only while all workers wait for the epoch, and read only after it has changed.
unsafe impl Sync for State {}

/// One thread's view of a running job.
pub struct Worker<'a> {
    pub index: usize,
    pub n: usize,
    state: &'a State,
}

/// What the threads of a job unwind with when another one has panicked. Never reported: the first panic was.
struct Released;

impl Worker<'_> {
    /// This thread's share of `0..n`, in steps of `grain`.
    pub fn share(&self, n: usize, grain: usize) -> Range<usize> {
        let pieces = n.div_ceil(grain);
        let cut = |i: usize| (pieces * i / self.n * grain).min(n);
        cut(self.index)..cut(self.index + 1)
    }

    /// Pieces of `0..n`, multiples of `grain`: this thread's share in order, as memory likes to be read, then what others have
    /// not come to of theirs, so that nobody waits for long. Every piece goes to one thread. At most one such loop between two
    /// barriers.
    pub fn pieces(&self, n: usize, grain: usize, by: By) -> Pieces<'_> {
        Pieces { worker: self, n, grain, by, done: 0 }
    }

    /// Asks that all threads see `true` at the next barrier.
    pub fn ask_stop(&self) {
        self.state.stop_asked.store(true, Ordering::Relaxed);
    }

    /// Whether any thread has asked.
    pub fn is_stop_asked(&self) -> bool {
        self.state.stop_asked.load(Ordering::Relaxed)
    }

    /// Waits for all threads; what they wrote before is visible after. `true`, for all of them alike: the step is to end.
    #[must_use]
    pub fn barrier(&self) -> bool {
        let s = self.state;
        let before = s.passed.0.load(Ordering::Acquire);
        if s.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == self.n {
            s.arrived.0.store(0, Ordering::Relaxed);
            s.begin_phase();
            let stop = usize::from(s.stop_asked.load(Ordering::Relaxed));
            s.passed.0.store(((before & !1).wrapping_add(2)) | stop, Ordering::Release);
            return stop == 1;
        }
        let mut wait = Wait::new();
        loop {
            let now = s.passed.0.load(Ordering::Acquire);
            if now != before {
                return now & 1 == 1;
            }
            if s.panicked.load(Ordering::Acquire) {
                resume_unwind(Box::new(Released));
            }
            wait.step();
        }
    }
}

/// How a share is cut.
#[derive(Clone, Copy)]
pub enum By {
    Grain,
    /// First a half, then a half of what is left, an eighth, and the rest: few pieces, of which the last are short.
    Halves,
}

impl By {
    /// Which grains of `len` piece `i` is; nothing from there on where no more are left.
    fn piece(self, len: usize, i: usize) -> Range<usize> {
        let from = |i: usize| match self {
            By::Grain => i.min(len),
            By::Halves if i < 4 => len - (len >> i),
            By::Halves => len,
        };
        from(i)..from(i + 1)
    }
}

/// See [`Worker::pieces`].
pub struct Pieces<'a> {
    worker: &'a Worker<'a>,
    n: usize,
    grain: usize,
    by: By,
    /// Threads, from this one on, of whose shares nothing is left.
    done: usize,
}

impl Iterator for Pieces<'_> {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        let (w, grains) = (self.worker, self.n.div_ceil(self.grain));
        while self.done < w.n {
            let owner = (w.index + self.done) % w.n;
            let (first, last) = (grains * owner / w.n, grains * (owner + 1) / w.n);
            let (len, taken) = (last - first, &w.state.taken[owner].0);
            // A look costs others less than a change.
            if self.done > 0 && self.by.piece(len, taken.load(Ordering::Relaxed)).is_empty() {
                self.done += 1;
                continue;
            }
            let piece = self.by.piece(len, taken.fetch_add(1, Ordering::Relaxed));
            self.done += usize::from(piece.end == len);
            if !piece.is_empty() {
                return Some((first + piece.start) * self.grain..((first + piece.end) * self.grain).min(self.n));
            }
        }
        None
    }
}

struct Wait {
    rounds: u32,
}

impl Wait {
    fn new() -> Wait {
        Wait { rounds: 0 }
    }

    fn step(&mut self) {
        self.rounds = self.rounds.saturating_add(1);
        if self.rounds < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

pub struct Pool {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl Pool {
    /// `n` threads, the caller of [`Pool::run`] being the first of them.
    pub fn new(n: usize) -> Result<Pool> {
        let state = Arc::new(State {
            n,
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            stop_asked: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            arrived: Counter::default(),
            passed: Counter::default(),
            taken: (0..n).map(|_| Counter::default()).collect(),
            done: AtomicU32::new(0),
            shutdown: AtomicBool::new(false),
        });
        let mut pool = Pool { state, threads: Vec::new(), handles: Vec::new() };
        for index in 1..n {
            let state = pool.state.clone();
            let thread = std::thread::Builder::new()
                .name(format!("phd-{index}"))
                .spawn(move || work(&state, index))
                .map_err(|e| Error::Internal(format!("thread {index} of {n} could not be started: {e}")))?;
            pool.handles.push(thread.thread().clone());
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Those that were started, and the caller's.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `job` on every thread at once.
    ///
    /// # Panics
    /// If the job does, on whatever thread.
    pub fn run(&mut self, job: Job) {
        let s = &*self.state;
        s.arrived.0.store(0, Ordering::Relaxed);
        s.begin_phase();
        s.stop_asked.store(false, Ordering::Relaxed);
        s.panicked.store(false, Ordering::Relaxed);
        s.done.store(0, Ordering::Relaxed);
        // SAFETY: all workers wait for the next epoch, so nobody reads the job; and this function does not return, nor unwind,
        // before every worker is done with it, so the longer lifetime is never used.
        unsafe { *s.job.get() = Some(std::mem::transmute::<Job<'_>, Job<'static>>(job)) };
        s.epoch.fetch_add(1, Ordering::Release);
        self.handles.iter().for_each(Thread::unpark);
        let mine = catch_unwind(AssertUnwindSafe(|| job(&Worker { index: 0, n: s.n, state: s })));
        if mine.is_err() {
            s.panicked.store(true, Ordering::Release);
        }
        let mut wait = Wait::new();
        while s.done.load(Ordering::Acquire) as usize + 1 < s.n {
            wait.step();
        }
        match mine {
            Err(payload) => resume_unwind(payload),
            Ok(()) if s.panicked.load(Ordering::Acquire) => resume_unwind(Box::new(Released)),
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
impl Pool {
    /// Barriers that its jobs have passed.
    pub fn barriers(&self) -> usize {
        self.state.passed.0.load(Ordering::Relaxed) >> 1
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.shutdown.store(true, Ordering::Release);
        self.state.epoch.fetch_add(1, Ordering::Release);
        self.handles.iter().for_each(Thread::unpark);
        for thread in self.threads.drain(..) {
            // Workers catch every panic; there is nothing to learn from the result.
            let _ = thread.join();
        }
    }
}

fn work(s: &State, index: usize) {
    let mut seen = 0;
    loop {
        let mut wait = Wait::new();
        let mut since = None;
        while s.epoch.load(Ordering::Acquire) == seen {
            wait.step();
            if wait.rounds >= SPINS && wait.rounds.is_multiple_of(16) {
                let since = since.get_or_insert_with(Instant::now);
                if since.elapsed() > AWAKE {
                    // A wake-up between the look at the epoch and this line leaves a token that makes it return at once.
                    std::thread::park();
                }
            }
        }
        seen += 1;
        if s.shutdown.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: the epoch has changed, so the job is there, and stays until `done` has counted this thread.
        let job = unsafe { (*s.job.get()).expect("set before the epoch") };
        if catch_unwind(AssertUnwindSafe(|| job(&Worker { index, n: s.n, state: s }))).is_err() {
            s.panicked.store(true, Ordering::Release);
        }
        s.done.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_keep_time() {
        for n in [1, 2, 3, 8] {
            let mut pool = Pool::new(n).unwrap();
            for round in 0..200 {
                let counts: Vec<AtomicUsize> = (0..50).map(|_| AtomicUsize::new(0)).collect();
                let taken = AtomicUsize::new(0);
                pool.run(&|w: &Worker| {
                    for (i, count) in counts.iter().enumerate() {
                        count.fetch_add(1, Ordering::Relaxed);
                        assert!(!w.barrier());
                        assert_eq!(count.load(Ordering::Relaxed), n, "round {round}, phase {i}");
                        for piece in w.pieces(20, 3, By::Grain) {
                            taken.fetch_add(piece.len(), Ordering::Relaxed);
                        }
                        assert!(!w.barrier());
                    }
                });
                assert_eq!(taken.load(Ordering::Relaxed), 20 * 50);
            }
        }
    }

    #[test]
    fn shares_are_everything_once() {
        for threads in [1, 2, 3, 7] {
            let mut pool = Pool::new(threads).unwrap();
            for (n, grain) in [(0, 1), (1, 16), (5, 1), (49, 16), (576, 16)] {
                let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                pool.run(&|w: &Worker| {
                    w.share(n, grain).chain(w.pieces(n, grain, By::Grain).flatten()).for_each(|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(!w.barrier());
                    w.pieces(n, grain, By::Halves).flatten().for_each(|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 3), "{n} by {grain} on {threads}");
            }
        }
    }

    /// Few pieces of a share, and the last ones short.
    #[test]
    fn halves_end_in_short_pieces() {
        let pieces = |len| (0..6).map(|i| By::Halves.piece(len, i)).collect::<Vec<_>>();
        assert_eq!(pieces(16), [0..8, 8..12, 12..14, 14..16, 16..16, 16..16]);
        assert_eq!(pieces(3), [0..2, 2..3, 3..3, 3..3, 3..3, 3..3]);
    }

    /// Who has no work sleeps, until there is some.
    #[cfg(target_os = "linux")]
    #[test]
    fn threads_without_work_sleep() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..3 {
            let tasks = std::sync::Mutex::new(Vec::new());
            pool.run(&|w: &Worker| {
                if w.index > 0 {
                    let task = std::fs::read_link("/proc/thread-self").unwrap();
                    tasks.lock().unwrap().push(std::path::Path::new("/proc").join(task).join("stat"));
                }
            });
            for task in tasks.into_inner().unwrap() {
                // The state is what follows the name in brackets: S while it sleeps, R while it spins or yields.
                let sleeps = || std::fs::read_to_string(&task).unwrap().rsplit(") ").next().unwrap().starts_with('S');
                let is_asleep = (0..10_000).any(|_| {
                    std::thread::sleep(Duration::from_millis(2));
                    sleeps()
                });
                assert!(is_asleep, "{} is awake", task.display());
            }
        }
    }

    #[test]
    fn all_threads_stop_at_the_same_barrier() {
        let mut pool = Pool::new(3).unwrap();
        let ends: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|w: &Worker| {
            for phase in 0..100 {
                if w.index == 0 && phase == 41 {
                    w.ask_stop();
                }
                if w.barrier() {
                    ends[w.index].store(phase, Ordering::Relaxed);
                    return;
                }
            }
        });
        let first = ends[0].load(Ordering::Relaxed);
        assert!(first >= 41 && ends.iter().all(|e| e.load(Ordering::Relaxed) == first), "{ends:?}");
    }

    #[test]
    fn a_panic_ends_the_job_and_not_the_pool() {
        let mut pool = Pool::new(3).unwrap();
        for who in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|w: &Worker| {
                    if w.index == who {
                        resume_unwind(Box::new("on purpose"));
                    }
                    let _ = w.barrier();
                });
            }));
            assert!(result.is_err());
            let count = AtomicUsize::new(0);
            pool.run(&|w: &Worker| {
                count.fetch_add(1, Ordering::Relaxed);
                assert!(!w.barrier());
            });
            assert_eq!(count.load(Ordering::Relaxed), 3);
        }
    }
}
