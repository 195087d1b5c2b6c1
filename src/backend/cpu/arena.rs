//! Memory on huge pages.

use std::sync::Arc;

#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::{MmapMut, MmapOptions};

use super::shared::Shared;
use crate::error::{Error, Result};

const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4 << 10;
/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Anonymous memory, zero at first; on huge pages where the system has them: about a tenth more bandwidth.
pub struct Arena {
    map: MmapMut,
    start: usize,
    len: usize,
}

impl Arena {
    /// # Errors
    /// `OutOfMemory`, naming `what`.
    pub fn new(what: &'static str, len: usize) -> Result<Arena> {
        let too_large = |_| Error::OutOfMemory { what, bytes: len };
        let map = MmapOptions::new().len(len.saturating_add(HUGE_PAGE)).map_anon().map_err(too_large)?;
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        // Whole huge pages only: one that reaches beyond the end would be resident as a whole. It is advice: without it
        // everything works, a little slower.
        #[cfg(target_os = "linux")]
        if len >= HUGE_PAGE {
            let _ = map.advise_range(Advice::HugePage, start, len - len % HUGE_PAGE);
        }
        Ok(Arena { map, start, len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }

    /// `n` arrays of `rows` times `width` zeros in one piece of memory, so that small ones too lie on huge pages. All of it is there
    /// from the beginning: no step waits for the system to find some.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`.
    pub fn divided(what: &'static str, n: usize, rows: usize, width: usize) -> Result<Vec<Shared<u8>>> {
        let too_large = || Error::OutOfMemory { what, bytes: rows.saturating_mul(width).saturating_mul(n) };
        let len = rows.checked_mul(width).ok_or_else(too_large)?;
        let apart = len.checked_next_multiple_of(LINE).ok_or_else(too_large)?;
        let mut arena = Arena::new(what, apart.checked_mul(n).ok_or_else(too_large)?)?;
        arena.bytes_mut().iter_mut().step_by(PAGE).for_each(|byte| *byte = 0);
        let base = arena.bytes_mut().as_mut_ptr();
        let arena = Arc::new(arena);
        // SAFETY: parts of the arena that do not overlap; nobody else has it, and it stays as long as they do.
        Ok((0..n).map(|i| unsafe { Shared::part(base.add(i * apart), len, arena.clone()) }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divided_memory_is_each_its_own() {
        for (n, rows, width) in [(1, 1, 1), (3, 5, 13), (4, 3, 1 << 20), (2, 0, 7), (0, 1, 1)] {
            let mut arrays = Arena::divided("a test", n, rows, width).unwrap();
            assert_eq!(arrays.len(), n);
            for (i, array) in arrays.iter_mut().enumerate() {
                assert_eq!((array.len(), array.as_ptr().addr() % LINE), (rows * width, 0));
                assert!(array.as_mut().iter().all(|&byte| byte == 0), "array {i} of {n} has another's bytes");
                array.as_mut().fill(i as u8 + 1);
            }
            let first = arrays.drain(..n.min(1)).next();
            for (i, array) in arrays.iter_mut().enumerate() {
                assert!(array.as_mut().iter().all(|&byte| byte == i as u8 + 2), "array {} of {n}", i + 1);
            }
            drop(arrays);
            assert!(first.is_none_or(|mut a| a.as_mut().iter().all(|&byte| byte == 1)), "gone with the others");
        }
    }

    /// Huge pages are asked for, for all that fills some, and for no more: the rest would be resident for nothing.
    #[test]
    #[cfg(target_os = "linux")]
    fn whole_huge_pages_are_asked_for() {
        let has_any = std::fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap();
        let arena = Arena::new("a test", 2 * HUGE_PAGE + 5 * PAGE).unwrap();
        // What is asked for the mapping that an address is in: `proc_pid_smaps(5)`.
        let is_asked = |address: usize| {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut is_here = false;
            for line in smaps.lines() {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                let number = |text| usize::from_str_radix(text, 16).ok();
                if let Some((Some(from), Some(to))) = range.map(|(from, to)| (number(from), number(to))) {
                    is_here = (from..to).contains(&address);
                } else if is_here && let Some(flags) = line.strip_prefix("VmFlags:") {
                    return flags.split_whitespace().any(|flag| flag == "hg");
                }
            }
            panic!("{address:x} is in no mapping");
        };
        let first = arena.bytes().as_ptr().addr();
        let found = [0, 2 * HUGE_PAGE - 1, 2 * HUGE_PAGE].map(|at| is_asked(first + at));
        assert_eq!(found, [has_any, has_any, false]);
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        for (n, rows, width) in
            [(2, usize::MAX / 4, 1), (1, usize::MAX, 1), (usize::MAX, 1, 2), (8, usize::MAX >> 14, 1)]
        {
            let error = Arena::divided("the KV cache", n, rows, width).err().expect("more than any machine has");
            assert!(matches!(error, Error::OutOfMemory { what: "the KV cache", .. }), "{error}");
        }
    }
}
