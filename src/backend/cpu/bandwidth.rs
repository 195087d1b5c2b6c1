//! How fast this machine's memory can be read: what a step is measured against.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

use super::arena::Arena;
use super::kernels;
use super::pool::{Pool, Worker, cpus};
use crate::error::Result;

/// Bytes a second that `n_threads` threads read from memory together, the best of some passes over 512 MiB.
///
/// # Errors
/// `OutOfMemory`, `Internal` if threads cannot be started.
pub fn read_bandwidth(n_threads: usize) -> Result<f64> {
    const BYTES: usize = 512 << 20;
    const PASSES: usize = 8;
    let kernels = kernels::choose()?;
    let mut pool = Pool::new(n_threads.clamp(1, cpus()))?;
    let mut arena = Arena::new("measuring the bandwidth", BYTES)?;
    arena.bytes_mut().fill(1);
    let bytes = arena.bytes();
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let total = AtomicI32::new(0);
        let begin = Instant::now();
        pool.run(&|w: &Worker| {
            // As weights of one row are read. SAFETY: these kernels are this CPU's.
            let seen = unsafe { (kernels.read)(&bytes[w.share(BYTES, 1 << 16)], kernels.prefetches()) };
            total.fetch_add(seen, Ordering::Relaxed);
        });
        std::hint::black_box(total.into_inner());
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(BYTES as f64 / best)
}
