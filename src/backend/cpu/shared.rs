//! Memory that the threads of a step divide among themselves.

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;

use super::arena::{self, Arena};
use crate::error::{Error, Result};

/// A fixed array that several threads write at once, each its own part: phases end at a barrier, and within a phase no
/// element that one thread writes is touched by another.
pub struct Shared<T> {
    memory: Memory<T>,
}

enum Memory<T> {
    Own(Box<[UnsafeCell<T>]>),
    Part(Part<T>),
}

/// Memory of the arena that nobody else touches.
struct Part<T> {
    cells: NonNull<[UnsafeCell<T>]>,
    /// Kept for as long as the part.
    _arena: Arc<Arena>,
}

const _: () = {
    const fn can_be_sent<T: Send + Sync>() {}
    can_be_sent::<Arc<Arena>>();
};
// SAFETY: the cells are as much their owner's alone as those of a box, and the arena can be sent.
unsafe impl<T: Send> Send for Part<T> {}
// SAFETY: access goes through `slice` and `slice_mut`, whose callers promise that nothing is written while it is used.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

impl<T: Clone + Default> Shared<T> {
    /// `rows` times `width` default elements, in one allocation.
    pub fn new(what: &'static str, rows: usize, width: usize) -> Result<Shared<T>> {
        let too_large =
            || Error::OutOfMemory { what, bytes: rows.saturating_mul(width).saturating_mul(size_of::<T>()) };
        let n = rows.checked_mul(width).ok_or_else(too_large)?;
        let mut cells = Vec::new();
        cells.try_reserve_exact(n).map_err(|_| too_large())?;
        cells.resize_with(n, || UnsafeCell::new(T::default()));
        Ok(Shared { memory: Memory::Own(cells.into_boxed_slice()) })
    }
}

impl Shared<u8> {
    /// # Safety
    /// The `n` initialized bytes at `start`, which may be written through, are in the arena, and nobody else touches them while the
    /// arena lives, not even by [`Arena::bytes`].
    pub unsafe fn part(start: *mut u8, n: usize, arena: Arc<Arena>) -> Shared<u8> {
        let start = NonNull::new(start).expect("memory of an arena");
        let cells = NonNull::slice_from_raw_parts(start.cast(), n);
        Shared { memory: Memory::Part(Part { cells, _arena: arena }) }
    }
}

impl<T> From<Vec<T>> for Shared<T> {
    fn from(values: Vec<T>) -> Shared<T> {
        Shared { memory: Memory::Own(values.into_iter().map(UnsafeCell::new).collect()) }
    }
}

impl<T> Shared<T> {
    fn cells(&self) -> &[UnsafeCell<T>] {
        match &self.memory {
            Memory::Own(cells) => cells,
            // SAFETY: initialized and there as long as the arena: `part`'s caller has promised it.
            Memory::Part(part) => unsafe { part.cells.as_ref() },
        }
    }

    pub fn len(&self) -> usize {
        self.cells().len()
    }

    pub fn bytes(&self) -> usize {
        size_of_val(self.cells())
    }

    /// For element-wise writing of parts that no slice describes; the rules are those of [`Shared::slice_mut`].
    pub fn as_ptr(&self) -> *mut T {
        self.cells().as_ptr().cast::<T>().cast_mut()
    }

    /// For a single thread that holds the whole.
    pub fn as_mut(&mut self) -> &mut [T] {
        // SAFETY: `&mut self` is the only access, and UnsafeCell<T> is laid out as T.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len()) }
    }

    /// # Safety
    /// Nobody writes to these elements while the slice lives.
    pub unsafe fn slice(&self, start: usize, n: usize) -> &[T] {
        let cells = &self.cells()[start..start + n];
        // SAFETY: in bounds; not written, as the caller promises.
        unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), n) }
    }

    /// # Safety
    /// Nobody else reads or writes these elements while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self, start: usize, n: usize) -> &mut [T] {
        let cells = &self.cells()[start..start + n];
        // SAFETY: in bounds; exclusive, as the caller promises; UnsafeCell allows writing through a shared reference.
        unsafe { std::slice::from_raw_parts_mut(cells.as_ptr().cast::<T>().cast_mut(), n) }
    }
}

/// Floats of a cache line.
const LINE: usize = arena::LINE / size_of::<f32>();

/// Rows of f32 that threads divide among themselves, as they do a [`Shared`] array. Rows begin with a cache line, so that no tile's
/// outputs straddle two, and an odd number of lines apart: a column of many rows, which is what a tile makes, then lies in all sets
/// of a cache and not in a few.
pub struct Grid {
    cells: Shared<f32>,
    /// The first element of the first row.
    start: usize,
    width: usize,
    stride: usize,
}

impl Grid {
    /// # Errors
    /// `OutOfMemory`, naming `what`.
    pub fn new(what: &'static str, rows: usize, width: usize) -> Result<Grid> {
        let stride = (width.div_ceil(LINE) | 1) * LINE;
        let cells: Shared<f32> = Shared::new(what, rows.saturating_mul(stride).saturating_add(LINE), 1)?;
        // Where the compiler cannot tell, any place is right.
        let start = cells.as_ptr().align_offset(arena::LINE).min(LINE);
        Ok(Grid { cells, start, width, stride })
    }

    pub fn bytes(&self) -> usize {
        self.cells.bytes()
    }

    pub fn rows(&self) -> usize {
        (self.cells.len() - LINE) / self.stride
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Floats from a row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// For kernels that write several rows; the rules are those of [`Grid::part_mut`].
    pub fn as_ptr(&self) -> *mut f32 {
        self.cells.as_ptr().wrapping_add(self.start)
    }

    fn at(&self, row: usize, first: usize, n: usize) -> usize {
        assert!(first + n <= self.width, "{n} columns from {first} on of {}", self.width);
        self.start + row * self.stride + first
    }

    /// # Safety
    /// Nobody writes to this row while the slice lives.
    pub unsafe fn row(&self, row: usize) -> &[f32] {
        // SAFETY: the caller's.
        unsafe { self.part(row, 0, self.width) }
    }

    /// # Safety
    /// Nobody else reads or writes this row while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row_mut(&self, row: usize) -> &mut [f32] {
        // SAFETY: the caller's.
        unsafe { self.part_mut(row, 0, self.width) }
    }

    /// `n` columns of a row.
    ///
    /// # Safety
    /// Nobody writes to these elements while the slice lives.
    pub unsafe fn part(&self, row: usize, first: usize, n: usize) -> &[f32] {
        // SAFETY: the caller's.
        unsafe { self.cells.slice(self.at(row, first, n), n) }
    }

    /// `n` columns of a row.
    ///
    /// # Safety
    /// Nobody else reads or writes these elements while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part_mut(&self, row: usize, first: usize, n: usize) -> &mut [f32] {
        // SAFETY: the caller's.
        unsafe { self.cells.slice_mut(self.at(row, first, n), n) }
    }

    /// A row, for a single thread that holds the whole.
    pub fn row_alone(&mut self, row: usize) -> &mut [f32] {
        let at = self.at(row, 0, self.width);
        &mut self.cells.as_mut()[at..at + self.width]
    }

    /// For a single thread that holds the whole.
    pub fn copy_row(&mut self, src: usize, dst: usize) {
        let (from, to) = (self.at(src, 0, self.width), self.at(dst, 0, self.width));
        self.cells.as_mut().copy_within(from..from + self.width, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_apart_and_on_lines_of_their_own() {
        for (rows, width) in [(0, 5), (1, 1), (3, 16), (4, 17), (5, 64), (2, 1536)] {
            let mut grid = Grid::new("a test", rows, width).unwrap();
            assert_eq!((grid.rows(), grid.width(), grid.stride() / LINE % 2), (rows, width, 1));
            for row in 0..rows {
                let cells = grid.row_alone(row);
                assert_eq!((cells.len(), cells.as_ptr().addr() % arena::LINE), (width, 0));
                assert!(cells.iter().all(|&x| x == 0.0), "row {row} has another's elements");
                cells.fill(1.0 + row as f32);
            }
            if rows > 1 {
                grid.copy_row(rows - 1, 0);
                // SAFETY: nobody writes.
                assert!(unsafe { grid.row(0) }.iter().all(|&x| x == rows as f32));
                assert!(unsafe { grid.part(rows - 1, width - 1, 1) } == [rows as f32]);
            }
        }
        assert!(matches!(Grid::new("logits", usize::MAX / 8, 3), Err(Error::OutOfMemory { what: "logits", .. })));
    }
}
