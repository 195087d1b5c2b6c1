//! Linear layers: weights as the kernels want them, activations as the weights want them.

use std::ops::Range;
use std::sync::Arc;

use super::arena::Arena;
#[cfg(feature = "ggml")]
use super::ggml::Dot;
use super::kernels::{Kernels, Quants, Tiles, TilesFn, group_of, groups, meta};
use super::packed::{Packing, TILE, unpack_row};
use super::shared::{Grid, Shared};
use crate::checkpoint::TensorView;
use crate::error::Result;
use crate::tensor::dequantize_row;

/// ggml's kernels are an option of the build; without them no `Dot` exists.
#[cfg(not(feature = "ggml"))]
#[derive(Clone, Copy)]
pub enum Dot {}

#[cfg(not(feature = "ggml"))]
impl Dot {
    pub fn of(_: crate::tensor::DType) -> Option<Dot> {
        None
    }
    pub fn activation_bytes(&self, _: usize) -> usize {
        match *self {}
    }
    pub fn most_bytes(_: usize) -> usize {
        0
    }
    pub fn slot(&self) -> usize {
        match *self {}
    }
    pub fn convert(&self, _: &[f32], _: &mut [u8]) {
        match *self {}
    }
    pub fn dot(&self, _: usize, _: &[u8], _: &[u8]) -> f32 {
        match *self {}
    }
}

enum Storage {
    Packed {
        packing: Packing,
        arena: Arc<Arena>,
        offset: usize,
    },
    Ggml {
        dot: Dot,
        rows: TensorView,
    },
    /// Converted to f32 tile by tile as it is used: right, and slow.
    Converted {
        rows: TensorView,
    },
}

/// Rows of the largest group of any instruction set.
const MOST_ROWS: usize = 12;

/// A weight matrix `[n_out, n_in]`.
pub struct Matrix {
    storage: Storage,
    pub n_out: usize,
    pub n_in: usize,
}

/// How a tensor is to be kept.
pub enum Choice {
    Pack(Packing),
    Ggml(Dot),
    Convert,
}

impl Choice {
    pub fn of(tensor: &TensorView, prefer_ggml: bool) -> Choice {
        let dot = Dot::of(tensor.dtype);
        match (Packing::of(tensor.dtype), dot) {
            (_, Some(dot)) if prefer_ggml => Choice::Ggml(dot),
            (Some(packing), _) => Choice::Pack(packing),
            (None, Some(dot)) => Choice::Ggml(dot),
            (None, None) => Choice::Convert,
        }
    }
}

/// The forms of activations that some matrices take.
#[derive(Clone, Copy, Default)]
pub struct Needs {
    /// Of int8 blocks, the words that are wanted with them ([`Packing::words`]); 0: no such blocks.
    words: u8,
    float: bool,
    /// By [`Dot::slot`].
    ggml: [Option<Dot>; 3],
}

impl Needs {
    pub fn of(matrices: &[&Matrix]) -> Needs {
        let mut needs = Needs::default();
        for m in matrices {
            match &m.storage {
                Storage::Packed { packing, .. } if !packing.is_float() => needs.words |= packing.words(),
                Storage::Packed { .. } | Storage::Converted { .. } => needs.float = true,
                Storage::Ggml { dot, .. } => needs.ggml[dot.slot()] = Some(*dot),
            }
        }
        needs
    }

    /// Whether int8 is the only form asked for: then blocks can be converted one by one.
    pub fn is_int(&self) -> bool {
        self.words != 0 && !self.float && self.ggml.iter().all(Option::is_none)
    }
}

/// Rows of activations in the forms that weights take, grouped as the kernels take them.
pub struct Activations {
    quants: Shared<i8>,  // (group): (block, row, 32)
    meta: Shared<u32>,   // (group): (meta::WORDS, block, row)
    floats: Shared<f32>, // (group): (column, row)
    ggml: Shared<u8>,    // (slot 3, row, ggml_row_bytes)
    ggml_row_bytes: usize,
    capacity: usize,
}

impl Activations {
    /// Room for `rows` rows of up to `widest` columns, in the forms that are needed.
    pub fn new(rows: usize, widest: usize, needs: &Needs) -> Result<Activations> {
        let what = "scratch";
        let has_ggml = needs.ggml.iter().any(Option::is_some);
        let ggml_row_bytes = if has_ggml { Dot::most_bytes(widest) } else { 0 };
        let ints = if needs.words != 0 { rows } else { 0 };
        Ok(Activations {
            quants: Shared::new(what, ints, widest)?,
            meta: Shared::new(what, ints, widest.div_ceil(32) * meta::WORDS)?,
            floats: Shared::new(what, if needs.float { rows } else { 0 }, widest)?,
            ggml: Shared::new(what, 3 * rows, ggml_row_bytes)?,
            ggml_row_bytes,
            capacity: rows,
        })
    }

    pub fn bytes(&self) -> usize {
        self.quants.bytes() + self.meta.bytes() + self.floats.bytes() + self.ggml.bytes()
    }

    /// Puts columns from `first_column` on in as int8, of row `row` of `n` rows of `width` columns; whole blocks.
    ///
    /// # Safety
    /// Nobody reads this meanwhile or writes the same columns.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn set_blocks(
        &self,
        kernels: &Kernels,
        needs: &Needs,
        row: usize,
        n: usize,
        width: usize,
        first_column: usize,
        x: &[f32],
    ) {
        let (first, rows) = group_of(row, n, kernels.largest_group(false, n));
        let plane = width / 32 * rows;
        assert!(row < n && n <= self.capacity && first_column + x.len() <= width);
        assert!(width.is_multiple_of(32) && first_column.is_multiple_of(32) && x.len().is_multiple_of(32));
        assert!((first + rows) * width <= self.quants.len());
        // SAFETY: the group's part of either buffer; within it only these elements are written.
        unsafe {
            let quants = self.quants.as_ptr().add(first * width + first_column * rows);
            let meta = self.meta.as_ptr().add(first * (width / 32) * meta::WORDS + first_column / 32 * rows);
            let words = needs.words;
            (kernels.quantize)(x, &Quants { quants, meta, plane, words, rows, row: row - first });
        }
    }

    /// Puts `x` in as row `row` of `n`.
    ///
    /// # Safety
    /// Nobody reads this meanwhile or writes the same row.
    pub unsafe fn set(&self, kernels: &Kernels, needs: &Needs, row: usize, n: usize, x: &[f32]) {
        assert!(row < n && n <= self.capacity);
        let width = x.len();
        if needs.words != 0 {
            // SAFETY: the caller's.
            unsafe { self.set_blocks(kernels, needs, row, n, width, 0, x) };
        }
        if needs.float {
            let (first, rows) = group_of(row, n, kernels.largest_group(true, n));
            assert!((first + rows) * width <= self.floats.len());
            for (column, x) in x.iter().enumerate() {
                // SAFETY: in bounds as asserted; only this row's elements.
                unsafe { *self.floats.as_ptr().add(first * width + column * rows + row - first) = *x };
            }
        }
        for dot in needs.ggml.iter().flatten() {
            let at = (dot.slot() * self.capacity + row) * self.ggml_row_bytes;
            // SAFETY: this row's bytes.
            dot.convert(x, unsafe { self.ggml.slice_mut(at, self.ggml_row_bytes) });
        }
    }
}

impl Matrix {
    pub fn packed(packing: Packing, n_out: usize, n_in: usize, arena: Arc<Arena>, offset: usize) -> Matrix {
        assert!(offset + packing.bytes(n_out, n_in) <= arena.len());
        Matrix { storage: Storage::Packed { packing, arena, offset }, n_out, n_in }
    }

    pub fn ggml(dot: Dot, rows: TensorView) -> Matrix {
        Matrix { n_out: rows.shape[0], n_in: rows.shape[1], storage: Storage::Ggml { dot, rows } }
    }

    pub fn converted(rows: TensorView) -> Matrix {
        Matrix { n_out: rows.shape[0], n_in: rows.shape[1], storage: Storage::Converted { rows } }
    }

    pub fn uses_ggml(&self) -> bool {
        matches!(self.storage, Storage::Ggml { .. })
    }

    /// Bytes that a pass reads.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::Packed { packing, .. } => packing.bytes(self.n_out, self.n_in),
            Storage::Ggml { rows, .. } | Storage::Converted { rows } => rows.data.len(),
        }
    }

    /// Floats of scratch that [`Matrix::tiles`] wants.
    pub fn scratch(&self) -> usize {
        let converted = match self.storage {
            Storage::Converted { .. } => (TILE + 1) * self.n_in,
            _ => 0,
        };
        MOST_ROWS * TILE + converted
    }

    pub fn n_tiles(&self) -> usize {
        self.n_out.div_ceil(TILE)
    }

    /// Row `row` as f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        match &self.storage {
            Storage::Packed { packing, arena, offset } => {
                let bytes = packing.tile_bytes(self.n_in);
                let tile = &arena.bytes()[offset + row / TILE * bytes..][..bytes];
                unpack_row(*packing, tile, row % TILE, out);
            }
            Storage::Ggml { rows, .. } | Storage::Converted { rows } => embedding_row(rows, row, out),
        }
    }

    /// Computes tiles of outputs, with `bias` added, for as many rows of activations as `to` has rows.
    ///
    /// # Safety
    /// `x` was filled with all rows for this matrix's needs, by the same kernels, and is not written meanwhile; the kernels are
    /// this CPU's. Nobody else touches the columns of these tiles in the rows of `to`.
    pub unsafe fn tiles(
        &self,
        kernels: &Kernels,
        x: &Activations,
        tiles: Range<usize>,
        scratch: &mut [f32],
        bias: Option<&[f32]>,
        to: &Outputs,
    ) {
        let n_in = self.n_in;
        let (out, scratch) = scratch.split_at_mut(MOST_ROWS * TILE); // (row, column): what cannot go where it belongs as it is
        match &self.storage {
            Storage::Packed { packing, arena, offset } => {
                let tile_bytes = packing.tile_bytes(n_in);
                let bytes = arena.bytes()[*offset..].as_ptr();
                // Whole tiles go where they belong as they are.
                let whole = if bias.is_none() { self.n_out / TILE } else { 0 };
                // Groups take turns with a tile or two, which stay in the first-level cache; one alone goes through them all.
                let n = to.rows.len();
                let is_one_group = group_of(0, n, kernels.largest_group(packing.is_float(), n)).1 == n;
                let at_once = if is_one_group { usize::MAX } else { kernels.tiles_at_once() };
                let mut tile = tiles.start;
                while tile < tiles.end {
                    let next = tile.saturating_add(at_once).min(tiles.end.min(whole)).max(tile + 1);
                    // SAFETY: the constructor checked that all tiles lie in the arena; the caller's for the rest.
                    unsafe {
                        self.run_tiles(kernels, *packing, bytes.add(tile * tile_bytes), x, tile..next, out, bias, to)
                    }
                    tile = next;
                }
            }
            Storage::Ggml { dot, rows } => {
                let row_bytes = rows.data.len() / self.n_out;
                let used = dot.activation_bytes(n_in);
                for tile in tiles {
                    let outputs = tile * TILE..((tile + 1) * TILE).min(self.n_out);
                    // Few rows at a time, so that a weight row is still in the cache for the next one.
                    for first_row in (0..to.rows.len()).step_by(MOST_ROWS) {
                        let group = first_row..(first_row + MOST_ROWS).min(to.rows.len());
                        for (o, output) in outputs.clone().enumerate() {
                            let weights = &rows.data[output * row_bytes..][..row_bytes];
                            for row in group.clone() {
                                let at = (dot.slot() * x.capacity + row) * x.ggml_row_bytes;
                                // SAFETY: not written meanwhile: the caller's.
                                let activations = unsafe { x.ggml.slice(at, used) };
                                out[(row - first_row) * TILE + o] = dot.dot(n_in, weights, activations);
                            }
                        }
                        for row in group {
                            let out = &mut out[(row - first_row) * TILE..][..outputs.len()];
                            // SAFETY: the caller's.
                            unsafe { to.deliver(row, outputs.start, out, bias) };
                        }
                    }
                }
            }
            Storage::Converted { rows } => {
                let row_bytes = rows.data.len() / self.n_out;
                let (columns, row_values) = scratch[..(TILE + 1) * n_in].split_at_mut(TILE * n_in);
                for tile in tiles {
                    let outputs = tile * TILE..((tile + 1) * TILE).min(self.n_out);
                    for (r, output) in outputs.enumerate() {
                        dequantize_row(rows.dtype, &rows.data[output * row_bytes..][..row_bytes], row_values);
                        for (column, value) in row_values.iter().enumerate() {
                            columns[column * TILE + r] = *value;
                        }
                    }
                    // SAFETY: an F32 tile of n_in columns; the caller's for the rest.
                    unsafe {
                        self.run_tiles(kernels, Packing::F32, columns.as_ptr().cast(), x, tile..tile + 1, out, bias, to)
                    }
                }
            }
        }
    }

    /// Some tiles times all groups of activations: whole ones without a bias, or one. `out` is for what cannot go where it belongs as
    /// it is.
    ///
    /// # Safety
    /// Tiles of this packing lie at `weights`; the rest as for [`Matrix::tiles`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn run_tiles(
        &self,
        kernels: &Kernels,
        packing: Packing,
        weights: *const u8,
        x: &Activations,
        tiles: Range<usize>,
        out: &mut [f32],
        bias: Option<&[f32]>,
        to: &Outputs,
    ) {
        const NUMBERS: [u32; MOST_ROWS] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        let n_in = self.n_in;
        let (n_tiles, tile_bytes) = (tiles.len(), packing.tile_bytes(n_in));
        let column = tiles.start * TILE;
        let width = self.n_out.min(tiles.end * TILE) - column;
        let is_direct = width == n_tiles * TILE && bias.is_none();
        let (at, stride) = if is_direct {
            assert!(column + width <= to.grid.width());
            (to.grid.as_ptr().wrapping_add(column), to.grid.stride())
        } else {
            assert!(n_tiles == 1);
            (out.as_mut_ptr(), TILE)
        };
        for (first, n) in groups(to.rows.len(), kernels.largest_group(packing.is_float(), to.rows.len())) {
            // SAFETY: the group's activations were written by `Activations::set` at these same offsets. `Outputs::new` has
            // checked the rows; `out` has room for the largest group.
            unsafe {
                let (quants, meta) = if packing.is_float() {
                    (x.floats.as_ptr().add(first * n_in).cast::<u8>(), std::ptr::null())
                } else {
                    let meta = x.meta.as_ptr().add(first * (n_in / 32) * meta::WORDS);
                    (x.quants.as_ptr().add(first * n_in).cast::<u8>(), meta.cast_const())
                };
                let rows = if is_direct { &to.rows[first..first + n] } else { &NUMBERS[..n] };
                let kernel: TilesFn = (kernels.tiles)(packing, n);
                let (rows, adds) = (rows.as_ptr(), to.adds && is_direct);
                let (ahead, pairs) = (kernels.ahead(first == 0, n, tile_bytes), kernels.tiles_at_once() == 2);
                kernel(&Tiles {
                    weights,
                    n_tiles,
                    tile_bytes,
                    n_in,
                    x: quants,
                    meta,
                    out: at,
                    stride,
                    rows,
                    adds,
                    ahead,
                    pairs,
                });
            }
            if !is_direct {
                for row in 0..n {
                    // SAFETY: the caller's.
                    unsafe { to.deliver(first + row, column, &mut out[row * TILE..][..width], bias) };
                }
            }
        }
    }
}

/// Where a product goes: row `i` of it is put into row `rows[i]` of the grid, or added to that.
pub struct Outputs<'a> {
    grid: &'a Grid,
    rows: &'a [u32],
    adds: bool,
}

impl<'a> Outputs<'a> {
    pub fn new(grid: &'a Grid, rows: &'a [u32], adds: bool) -> Outputs<'a> {
        assert!(rows.iter().all(|&row| (row as usize) < grid.rows()));
        Outputs { grid, rows, adds }
    }

    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// Puts or adds some columns of a row in.
    ///
    /// # Safety
    /// Nobody else touches these columns.
    unsafe fn deliver(&self, row: usize, first: usize, values: &mut [f32], bias: Option<&[f32]>) {
        if let Some(bias) = bias {
            values.iter_mut().zip(&bias[first..]).for_each(|(x, b)| *x += b);
        }
        // SAFETY: the caller's.
        let to = unsafe { self.grid.part_mut(self.rows[row] as usize, first, values.len()) };
        if self.adds {
            to.iter_mut().zip(values).for_each(|(to, x)| *to += *x);
        } else {
            to.copy_from_slice(values);
        }
    }
}

/// Row `row` of a stored table as f32.
pub fn embedding_row(table: &TensorView, row: usize, out: &mut [f32]) {
    let row_bytes = table.data.len() / table.shape[0];
    dequantize_row(table.dtype, &table.data[row * row_bytes..][..row_bytes], out);
}
