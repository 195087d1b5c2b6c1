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
pub fn pack(plan: &Plan, h: &Hyper, tile_queries: usize, bytes: &mut [u8], shape: &mut Shape) -> usize {
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
        let tiles = to.list(Tiles { n_keep: rows.keep.len(), row, at_once, next: 0 });
        shape.layers.push(LayerLists { enter, keep, tiles });
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
struct Tiles<F> {
    n_keep: usize,
    row: F,
    at_once: usize,
    next: usize,
}

impl<'a, F: Fn(usize) -> &'a schedule::Row> Iterator for Tiles<F> {
    type Item = Tile;

    fn next(&mut self) -> Option<Tile> {
        let first = self.next;
        if first == self.n_keep {
            return None;
        }
        let entry = (self.row)(first).entry;
        let mut tile = Tile { first: first as u32, n: 0, entry, stored: 0, hidden_from: u32::MAX, hidden_to: 0 };
        while self.next < self.n_keep && (tile.n as usize) < self.at_once && (self.row)(self.next).entry == entry {
            let row = (self.row)(self.next);
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
