//! Memory that the threads of a step divide among themselves.

use std::cell::UnsafeCell;

use crate::error::{Error, Result};

/// A fixed array that several threads write at once, each its own part: phases end at a barrier, and within a phase no
/// element that one thread writes is touched by another.
pub struct Shared<T> {
    cells: Box<[UnsafeCell<T>]>,
}

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
        Ok(Shared { cells: cells.into_boxed_slice() })
    }
}

impl<T> From<Vec<T>> for Shared<T> {
    fn from(values: Vec<T>) -> Shared<T> {
        Shared { cells: values.into_iter().map(UnsafeCell::new).collect() }
    }
}

impl<T> Shared<T> {
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&*self.cells)
    }

    /// For element-wise writing of parts that no slice describes; the rules are those of [`Shared::slice_mut`].
    pub fn as_ptr(&self) -> *mut T {
        self.cells.as_ptr().cast::<T>().cast_mut()
    }

    /// For a single thread that holds the whole.
    pub fn as_mut(&mut self) -> &mut [T] {
        // SAFETY: `&mut self` is the only access, and UnsafeCell<T> is laid out as T.
        unsafe { std::slice::from_raw_parts_mut(self.cells.as_mut_ptr().cast(), self.cells.len()) }
    }

    /// # Safety
    /// Nobody writes to these elements while the slice lives.
    pub unsafe fn slice(&self, start: usize, n: usize) -> &[T] {
        let cells = &self.cells[start..start + n];
        // SAFETY: in bounds; not written, as the caller promises.
        unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), n) }
    }

    /// # Safety
    /// Nobody else reads or writes these elements while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self, start: usize, n: usize) -> &mut [T] {
        let cells = &self.cells[start..start + n];
        // SAFETY: in bounds; exclusive, as the caller promises; UnsafeCell allows writing through a shared reference.
        unsafe { std::slice::from_raw_parts_mut(cells.as_ptr().cast::<T>().cast_mut(), n) }
    }
}
