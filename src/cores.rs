//! How many threads are worth having: two hyper-threads of a core share what computes.

use std::collections::HashSet;
use std::fs::read_to_string;

/// One thread for each physical core that affinity and the container's CPU quota leave to the calling thread.
pub fn default_threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    // Where the system does not tell which core a CPU is of: no more than the machine has.
    allowed_cores().unwrap_or_else(num_cpus::get_physical).clamp(1, cpus)
}

/// Physical cores that the calling thread's affinity leaves any CPU of, by Linux's account.
fn allowed_cores() -> Option<usize> {
    let status = read_to_string("/proc/thread-self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    count(allowed, |cpu| read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok())
}

/// Cores that the CPUs of a list such as "0-3,8" belong to. `siblings` are the CPUs of a CPU's core, the same text for each of them.
/// CPUs without any are switched off, or not there: such lists may go up to what the kernel has room for.
fn count(allowed: &str, siblings: impl Fn(usize) -> Option<String>) -> Option<usize> {
    let mut cores = HashSet::new();
    for range in allowed.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cores.extend((first.parse().ok()?..=last.parse().ok()?).filter_map(&siblings));
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hyper_threads_share_a_core() {
        let pairs = |cpu: usize| (cpu < 16).then(|| format!("{}-{}\n", cpu & !1, cpu | 1));
        let halves = |cpu: usize| (cpu < 8).then(|| format!("{},{}\n", cpu % 4, cpu % 4 + 4));
        let alone = |cpu: usize| (cpu < 8).then(|| format!("{cpu}\n"));
        // Two packages of two cores, whose second threads are numbered after all first ones.
        let packages =
            |cpu: usize| ["0,4", "1,5", "2,6", "3,7"].get(cpu % 4).filter(|_| cpu < 8).map(|s| s.to_string());
        // Cores with two threads, then such with one.
        let hybrid = |cpu: usize| if cpu < 8 { pairs(cpu) } else { (cpu < 12).then(|| cpu.to_string()) };
        let odd_ones_off = |cpu: usize| cpu.is_multiple_of(2).then(|| cpu.to_string()).filter(|_| cpu < 8);
        let nothing = |_: usize| None;
        type Siblings<'a> = &'a dyn Fn(usize) -> Option<String>;
        let cases: [(&str, Siblings, Option<usize>); 19] = [
            ("0-1", &pairs, Some(1)),
            ("\t0-15\n", &pairs, Some(8)),
            ("1-2", &pairs, Some(2)),
            ("1,3,5", &pairs, Some(3)),
            ("0-3,8,10-11", &pairs, Some(4)),
            ("15", &pairs, Some(1)),
            ("0,4", &halves, Some(1)),
            ("0-3", &halves, Some(4)),
            ("0,5", &halves, Some(2)),
            ("0-7", &alone, Some(8)),
            ("0-7", &packages, Some(4)),
            ("0,2,4,6", &packages, Some(2)),
            ("0-1,4-5", &packages, Some(2)),
            ("6-9", &hybrid, Some(3)),
            ("0-7", &odd_ones_off, Some(4)),
            ("0-127", &pairs, Some(8)),
            ("0-7", &nothing, None),
            ("", &pairs, None),
            ("0-x", &pairs, None),
        ];
        for (i, (allowed, siblings, expected)) in cases.into_iter().enumerate() {
            assert_eq!(count(allowed, siblings), expected, "case {i}: {allowed:?}");
        }
    }
}
