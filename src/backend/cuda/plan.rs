//! A pass as the kernels read it: the [`Plan`] and what follows from it, packed into one buffer that is copied to the device.

use super::params::{Address, Entry, Params, Row, Tile};
use crate::model::Hyper;
use crate::schedule::{self, Plan, Store};

/// Where a list lies in the buffer, and how many elements it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct List {
    offset: u32,
    pub n: u32,
}

impl List {
    pub fn at(self, base: Address) -> Address {
        base + u64::from(self.offset)
    }

    pub fn len(self) -> usize {
        self.n as usize
    }
}

/// A layer's rows. Layers with the same rows share their lists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LayerLists {
    pub enter: List,
    pub keep: List,
    pub tiles: List,
    /// Of each tile: see [`Splits`].
    pub splits: u32,
}

/// Stored rows that a split has at least; lengths are multiples of it.
pub const SPLIT_ROWS: usize = 64;

/// How attention cuts a tile's stored rows into splits, which it computes at the same time. The last split has the hidden tokens, too.
pub struct Splits {
    /// That keep the device busy if there is one tile.
    pub wanted: usize,
    /// That stored rows are cut into at most.
    pub most: usize,
    /// Rows of partial results that there is room for, splits counted.
    pub room: usize,
    /// Where a row's keys are cut is a matter of how many it sees, and the hidden tokens have the last split for themselves. Splits
    /// that a row sees nothing of add nothing, exactly, so that it does not matter what others in its tile see.
    pub is_invariant: bool,
}

impl Splits {
    /// Of each tile. A matter of counts alone: passes of one shape have the same.
    fn count(&self, n_tiles: usize, n_keep: usize) -> usize {
        if self.is_invariant {
            return self.most + 1;
        }
        self.wanted.div_ceil(n_tiles.max(1)).min(self.room / n_keep.max(1)).clamp(1, self.most)
    }

    /// Stored rows to a split, of `count`, for rows that see up to `stored` of them.
    fn length(&self, stored: u32, count: usize) -> u32 {
        let share = |n: usize| (stored as usize).div_ceil(n).div_ceil(SPLIT_ROWS).max(1);
        let lengths = if self.is_invariant { share(count - 1).next_power_of_two() } else { share(count) };
        (lengths * SPLIT_ROWS) as u32
    }

    /// Rows that go on whose partial results fit; tiles do not lie across multiples of it.
    pub fn rows_at_once(&self, n_keep: usize) -> usize {
        if self.is_invariant { self.room / (self.most + 1) } else { n_keep }
    }
}

/// Where everything is. Two passes with equal shapes differ in the buffer's content alone, so that a graph of one computes the other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shape {
    pub tokens: List, // (row)
    pub tables: List, // (row)
    pub rows: List,   // (row)
    pub entries: List,
    pub rope: List, // (row, head_dim / 2, 2)
    pub layers: Vec<LayerLists>,
    /// Embedding tables that any row uses, a bit each.
    pub tables_used: Vec<u32>,
    pub n_outputs: u32,
    pub is_embedding: bool,
    /// Comes last: its length is no part of the shape.
    pub(super) blocks: u32,
}

impl Shape {
    pub fn blocks(&self, base: Address) -> Address {
        base + u64::from(self.blocks)
    }

    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }
}

const ALIGNMENT: usize = 16;

/// Bytes that any pass of up to `rows` rows takes.
pub fn capacity(h: &Hyper, rows: usize, n_entries: usize, n_blocks: usize) -> usize {
    let list = |n: usize, bytes: usize| (n * bytes).next_multiple_of(ALIGNMENT);
    let layer = 2 * list(rows, 4) + list(rows, size_of::<Tile>());
    2 * list(rows, 4)
        + list(rows, size_of::<Row>())
        + list(n_entries, size_of::<Entry>())
        + list(rows, h.head_dim.div_ceil(2) * 8)
        + h.n_layers * layer
        + list(n_blocks, 4)
}

/// Writes lists one after another.
struct Writer<'a> {
    bytes: &'a mut [u8],
    used: usize,
}

impl Writer<'_> {
    fn list<P: Params>(&mut self, items: impl Iterator<Item = P>) -> List {
        let offset = self.used;
        let mut n = 0;
        for item in items {
            let room = &mut self.bytes[self.used..self.used + size_of::<P>()];
            // SAFETY: the room has the size; `Params` have no padding and no pointers that matter here.
            unsafe { room.as_mut_ptr().cast::<P>().write_unaligned(item) };
            self.used += size_of::<P>();
            n += 1;
        }
        self.used = self.used.next_multiple_of(ALIGNMENT);
        List { offset: offset as u32, n }
    }
}

/// Packs `plan` into `bytes`; returns how many of them it took. `shape` keeps its vectors' capacity.
pub fn pack(
    plan: &Plan,
    h: &Hyper,
    tile_queries: usize,
    splits: &Splits,
    bytes: &mut [u8],
    shape: &mut Shape,
) -> usize {
    let mut to = Writer { bytes, used: 0 };
    let place = |store: Store| match store {
        Store::Cache(at) => (at, 0),
        Store::Hidden(at) => (at, 1),
    };
    shape.tokens = to.list(plan.rows.iter().map(|r| r.token));
    shape.tables = to.list(plan.rows.iter().map(|r| r.table));
    shape.rows = to.list(plan.rows.iter().map(|r| {
        let schedule::Row { stored, hidden_from, hidden_to, entry, .. } = *r;
        let (place, is_hidden) = place(r.store);
        Row { stored, hidden_from, hidden_to, entry, place, is_hidden }
    }));
    shape.entries = to.list(plan.entries.iter().map(|e| Entry {
        seq: e.seq as u32,
        blocks: e.blocks.start as u32,
        first_hidden: e.first_hidden as u32,
        hidden_base: e.hidden_base as u32,
        n_hidden: e.n_hidden as u32,
        unused: 0,
    }));
    // In f64, as every backend: at long contexts the angle has more digits than f32 keeps.
    let pairs = h.head_dim / 2;
    shape.rope = to.list(plan.rows.iter().flat_map(|r| {
        (0..pairs).flat_map(move |i| {
            let angle = h.rope_frequencies.get(i).map_or(0.0, |f| f64::from(r.rope) * f);
            [angle.cos() as f32, angle.sin() as f32]
        })
    }));
    shape.layers.clear();
    for (i, rows) in plan.layers.iter().enumerate() {
        if i > 0 && *rows == plan.layers[i - 1] {
            shape.layers.push(shape.layers[i - 1]);
            continue;
        }
        let enter = to.list(rows.enter.iter().copied());
        let keep = to.list(rows.keep.iter().copied());
        let row = |k: usize| &plan.rows[rows.enter[rows.keep[k] as usize] as usize];
        let at_once = (tile_queries / (h.n_heads / h.n_kv_heads)).max(1);
        let n_keep = rows.keep.len();
        let tiles = || Tiles { n_keep, row, at_once, splits, next: 0 };
        let count = splits.count(tiles().count(), n_keep);
        let tiles = to.list(tiles().map(|t| Tile { split: splits.length(t.stored, count), ..t }));
        shape.layers.push(LayerLists { enter, keep, tiles, splits: count as u32 });
    }
    shape.tables_used.clear();
    shape.tables_used.resize(plan.rows.iter().map(|r| r.table as usize / 32 + 1).max().unwrap_or(0), 0);
    plan.rows.iter().for_each(|r| shape.tables_used[r.table as usize / 32] |= 1 << (r.table % 32));
    shape.n_outputs = plan.outputs.len() as u32;
    shape.is_embedding = plan.is_embedding;
    shape.blocks = to.list(plan.blocks.iter().copied()).offset;
    to.used
}

/// Cuts the rows that go on into tiles: consecutive rows of one sequence.
struct Tiles<'s, F> {
    n_keep: usize,
    row: F,
    at_once: usize,
    splits: &'s Splits,
    next: usize,
}

impl<F> Tiles<'_, F> {
    /// Rows of different kinds are in different tiles.
    fn kind(&self, index: usize, row: &schedule::Row) -> (u32, usize, u32) {
        let splits = self.splits;
        if !splits.is_invariant {
            return (row.entry, 0, 0);
        }
        (row.entry, index / splits.rows_at_once(self.n_keep), splits.length(row.stored, splits.most + 1))
    }
}

impl<'a, F: Fn(usize) -> &'a schedule::Row> Iterator for Tiles<'_, F> {
    type Item = Tile;

    fn next(&mut self) -> Option<Tile> {
        let first = self.next;
        if first == self.n_keep {
            return None;
        }
        let entry = (self.row)(first).entry;
        let kind = self.kind(first, (self.row)(first));
        let mut tile = Tile { first: first as u32, entry, hidden_from: u32::MAX, ..Tile::default() };
        while self.next < self.n_keep && (tile.n as usize) < self.at_once {
            let row = (self.row)(self.next);
            if self.kind(self.next, row) != kind {
                break;
            }
            tile.stored = tile.stored.max(row.stored);
            if row.hidden_from < row.hidden_to {
                tile.hidden_from = tile.hidden_from.min(row.hidden_from);
                tile.hidden_to = tile.hidden_to.max(row.hidden_to);
            }
            tile.n += 1;
            self.next += 1;
        }
        tile.hidden_from = tile.hidden_from.min(tile.hidden_to);
        Some(tile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_cover_what_is_seen() {
        for (wanted, most) in [(1, 1), (4, 4), (33, 33), (33, 7), (264, 64)] {
            for is_invariant in [false, true] {
                let splits = Splits { wanted, most, room: 512, is_invariant };
                for (n_tiles, n_keep) in [(1, 1), (1, 16), (7, 100), (40, 600)] {
                    let count = splits.count(n_tiles, n_keep);
                    let of_stored = if is_invariant { count - 1 } else { count };
                    assert!((1..=most).contains(&of_stored));
                    assert!(is_invariant || count == 1 || count * n_keep <= splits.room);
                    for stored in [0, 1, 63, 64, 65, 448, 449, 5000, 1 << 20] {
                        let length = splits.length(stored, count);
                        assert!(
                            length > 0 && length.is_multiple_of(64) && of_stored * length as usize >= stored as usize
                        );
                    }
                }
            }
        }
    }

    /// Rows of one tile have the same splits as each has alone.
    #[test]
    fn tiles_do_not_mix_lengths() {
        let splits = Splits { wanted: 4, most: 4, room: 5 * 8, is_invariant: true };
        let row = |i: u32| schedule::Row {
            token: 0,
            table: 0,
            rope: 0,
            entry: i / 30,
            store: Store::Cache(i),
            stored: 240 + i,
            hidden_from: 0,
            hidden_to: 0,
        };
        let rows: Vec<schedule::Row> = (0..40).map(row).collect();
        let tiles = || Tiles { n_keep: rows.len(), row: |i: usize| &rows[i], at_once: 16, splits: &splits, next: 0 };
        let mut next = 0;
        for tile in tiles() {
            assert_eq!(tile.first, next);
            next += tile.n;
            let of = |row: &schedule::Row| (row.entry, splits.length(row.stored, 5));
            let inside = &rows[tile.first as usize..next as usize];
            assert!(inside.iter().all(|row| of(row) == of(&inside[0]) && row.stored <= tile.stored));
            assert_eq!(tile.first / 8, (next - 1) / 8);
        }
        assert_eq!(next, 40);
        assert!(splits.length(256, 5) == 64 && splits.length(257, 5) == 128);
    }
}
