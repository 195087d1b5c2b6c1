//! Which rows a call computes, layer by layer, and who sees whom: pure integers.
//!
//! A *row* is one copy of one position. What is exact and subtle about hidden decoding lives here and in
//! [`crate::cache`]: the attention rules, the pruned prefill, the reach of the hidden window, the rebuilding of hidden
//! keys after a rollback. Backends receive a [`Plan`] and compute it; they decide nothing.
//!
//! Two kinds of row exist. *Stored* rows have their keys and values kept in the cache for the whole context: the
//! original tokens, or every copy under Sequential Hidden Decoding. *Hidden* rows have theirs kept for the pass, and for
//! the window after it in a ring.

use std::ops::Range;

use crate::error::{Error, Result, invalid};

/// How copies attend to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// PHD, PHD-SWA and PHD-CSWA (arXiv 2504.14992): only original tokens are stored.
    Hidden,
    /// Sequential Hidden Decoding (arXiv 2607.08186): plain causal attention over all rows, all of them stored.
    Full,
}

/// The attention rules of a model. `copies` is K, `window` W (in hidden tokens, 0 = none), `chunk` C (in positions,
/// 0 = one chunk without end).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    pub copies: usize,
    pub window: usize,
    pub chunk: usize,
    pub attention: Attention,
}

/// A row's place in the text: its position and its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub position: usize,
    pub copy: usize,
}

/// What a row may attend to: the first `stored` stored rows of its sequence, and the hidden tokens numbered
/// `hidden_from..=own number` (empty for stored rows). Both are ranges because every rule of the model is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    pub stored: usize,
    pub hidden_from: usize,
}

impl Rules {
    pub const VANILLA: Rules = Rules { copies: 1, window: 0, chunk: 0, attention: Attention::Hidden };

    /// Bounds that keep every product below in range. K up to 256 is what the paper serves.
    pub const MAX_COPIES: usize = 256;
    pub const MAX_WINDOW: usize = 1 << 20;

    pub fn check(&self) -> Result<()> {
        if self.copies == 0 || self.copies > Self::MAX_COPIES {
            return Err(invalid!("copies is {}, expected 1 to {}", self.copies, Self::MAX_COPIES));
        }
        if self.window > Self::MAX_WINDOW {
            return Err(invalid!("window is {}, expected 0 to {}", self.window, Self::MAX_WINDOW));
        }
        if self.chunk > Self::MAX_WINDOW {
            return Err(invalid!("chunk is {}, expected 0 to {}", self.chunk, Self::MAX_WINDOW));
        }
        if self.chunk > 0 && self.window == 0 {
            return Err(invalid!("chunk is {} but window is 0: a chunk limits a window", self.chunk));
        }
        Ok(())
    }

    /// Stored rows of a position: 1, or all copies under [`Attention::Full`].
    pub fn stored_copies(&self) -> usize {
        match self.attention {
            Attention::Hidden => 1,
            Attention::Full => self.copies,
        }
    }

    /// Hidden rows of a position.
    pub fn hidden_copies(&self) -> usize {
        self.copies - self.stored_copies()
    }

    /// The window in positions: how far back (rounded up) a hidden row sees hidden rows.
    fn reach(&self) -> usize {
        if self.window == 0 { 0 } else { self.window.div_ceil(self.hidden_copies().max(1)) }
    }

    fn chunk_start(&self, position: usize) -> usize {
        if self.chunk == 0 { 0 } else { position - position % self.chunk }
    }

    /// Hidden tokens a sequence must remember for each layer between calls: `min(W, C (K-1))`.
    pub fn ring_capacity(&self) -> usize {
        if self.hidden_copies() == 0 || self.window == 0 {
            return 0;
        }
        let chunk = if self.chunk == 0 { usize::MAX } else { self.chunk * self.hidden_copies() };
        self.window.min(chunk)
    }

    /// Number of a hidden row among the hidden rows of its sequence, `h(i, s) = i (K-1) + (s-1)`.
    pub fn hidden_number(&self, place: Place) -> usize {
        place.position * self.hidden_copies() + place.copy - 1
    }

    /// The lowest hidden number that any row of `position` may see besides its own position's.
    fn lowest_seen(&self, position: usize) -> usize {
        let per = self.hidden_copies();
        (position * per).saturating_sub(self.window).max(self.chunk_start(position) * per)
    }

    /// Who `place` sees. This is the whole of the model's attention mask.
    pub fn sight(&self, place: Place) -> Sight {
        let Place { position, copy } = place;
        if self.attention == Attention::Full {
            return Sight { stored: position * self.copies + copy + 1, hidden_from: 0 };
        }
        if copy == 0 {
            return Sight { stored: position + 1, hidden_from: 0 };
        }
        let own = position * self.hidden_copies();
        let hidden_from = if self.window == 0 {
            own
        } else {
            // W counts back from this very row; the row's own position is always in sight.
            let window = self.hidden_number(place).saturating_sub(self.window);
            window.max(self.chunk_start(position) * self.hidden_copies()).min(own)
        };
        Sight { stored: position + 1, hidden_from }
    }

    /// RoPE position of a row.
    pub fn rope_position(&self, place: Place) -> usize {
        match self.attention {
            Attention::Hidden => place.position,
            Attention::Full => place.position * self.copies + place.copy,
        }
    }

    /// The first position whose hidden rows must enter `layer` (0 = first of `n_layers`) if `position` is the first
    /// whose output is wanted and nothing is remembered. Nothing above looks further back than the window, so each
    /// layer below the top adds one window of reach.
    fn first_hidden(&self, layer: usize, n_layers: usize, position: usize) -> usize {
        if self.window == 0 {
            return position;
        }
        position.saturating_sub(self.reach() * (n_layers - layer)).max(self.chunk_start(position))
    }
}

/// What a sequence's ring holds, the same for each layer: the hidden tokens numbered `low ..` of the positions before
/// `end`. After a rollback `end` may lie beyond the sequence's length; what is stale is overwritten before it is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    pub low: usize,
    pub end: usize,
}

impl Ring {
    /// Nothing usable: any window that looks back must be rebuilt.
    pub const LOST: Ring = Ring { low: usize::MAX, end: 0 };

    /// Whether the ring holds all that rows from `position` on may see of the hidden rows before it.
    pub fn serves(&self, rules: &Rules, position: usize) -> bool {
        let per = rules.hidden_copies();
        if per == 0 || rules.window == 0 {
            return true;
        }
        let lowest = rules.lowest_seen(position);
        lowest == position * per || (self.end >= position && self.low <= lowest)
    }
}

/// Which positions of a task get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: the sequence is only extended.
    Nothing,
    /// The last position, into this logits row.
    Last(usize),
    /// Every new position, into consecutive logits rows from the given one on.
    Every(usize),
    /// The same, but each pass begins again at the given row.
    EveryInPass(usize),
}

/// How much of the prefill is left out. `All` exists as the oracle of the tests: it computes every hidden row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pruning {
    Exact,
    All,
}

/// One sequence's share of a call: positions `start..end` are appended. Carried out in one pass or several.
#[derive(Clone, Debug)]
pub struct Task {
    pub seq: usize,
    pub start: usize,
    pub end: usize,
    pub wanted: Wanted,
    /// Next position to be scheduled; begins before `start` if hidden rows must be rebuilt.
    cursor: usize,
    /// Whether the ring as it was at the beginning of the call may be read.
    ring_ready: bool,
    /// The first position whose output matters for something.
    first_output: usize,
    pruning: Pruning,
    is_stored_only: bool,
}

impl Task {
    pub fn new(
        rules: &Rules,
        n_layers: usize,
        seq: usize,
        range: Range<usize>,
        ring: Ring,
        wanted: Wanted,
        pruning: Pruning,
    ) -> Task {
        let ring_ready = ring.serves(rules, range.start);
        let first_output = match wanted {
            Wanted::Every(_) | Wanted::EveryInPass(_) => range.start,
            Wanted::Nothing | Wanted::Last(_) => range.end - 1,
        };
        let Range { start, end } = range;
        let is_stored_only = false;
        let mut task = Task { seq, start, end, wanted, cursor: 0, ring_ready, first_output, pruning, is_stored_only };
        task.cursor =
            if rules.hidden_copies() == 0 { task.start } else { task.start.min(task.first_hidden(rules, 0, n_layers)) };
        task
    }

    /// Computes the stored rows of a range anew and nothing else: no hidden rows, no logits.
    pub fn stored_only(seq: usize, range: Range<usize>) -> Task {
        let Range { start, end } = range;
        Task {
            seq,
            start,
            end,
            wanted: Wanted::Nothing,
            cursor: start,
            ring_ready: true,
            first_output: end,
            pruning: Pruning::Exact,
            is_stored_only: true,
        }
    }

    pub fn is_done(&self) -> bool {
        self.cursor == self.end
    }

    /// Share of the new positions that is done.
    pub fn fraction_done(&self) -> f32 {
        self.cursor.saturating_sub(self.start) as f32 / (self.end - self.start) as f32
    }

    /// The first position whose hidden rows enter `layer`.
    fn first_hidden(&self, rules: &Rules, layer: usize, n_layers: usize) -> usize {
        if self.is_stored_only {
            return self.end;
        }
        let first = match self.pruning {
            Pruning::Exact => rules.first_hidden(layer, n_layers, self.first_output),
            Pruning::All => rules.first_hidden(layer, n_layers, self.start).min(self.start),
        };
        if self.ring_ready { first.max(self.start) } else { first }
    }

    /// Rows of `from..to` at layer 0.
    fn rows_between(&self, rules: &Rules, first_hidden: usize, from: usize, to: usize) -> usize {
        to.saturating_sub(from.max(self.start)) * rules.stored_copies()
            + to.saturating_sub(from.max(first_hidden)) * rules.hidden_copies()
    }

    /// How far the next pass can go from the cursor within `max_rows` rows and `max_outputs` logits rows.
    fn pass_end(&self, rules: &Rules, n_layers: usize, max_rows: usize, max_outputs: usize) -> usize {
        let first_hidden = self.first_hidden(rules, 0, n_layers);
        let mut end = self.end;
        if let Wanted::Every(_) | Wanted::EveryInPass(_) = self.wanted {
            end = end.min(self.cursor.max(self.start) + max_outputs);
        }
        // Positions before the first hidden one cost less than those after it; both parts are linear.
        while end > self.cursor && self.rows_between(rules, first_hidden, self.cursor, end) > max_rows {
            let over = self.rows_between(rules, first_hidden, self.cursor, end) - max_rows;
            end = end.saturating_sub(over.div_ceil(rules.copies)).max(self.cursor);
        }
        end
    }

    /// What a ring of `capacity` hidden tokens holds once every pass of the task is done.
    pub fn ring_after(&self, rules: &Rules, n_layers: usize, capacity: usize, before: Ring) -> Ring {
        let per = rules.hidden_copies();
        if capacity == 0 {
            return Ring::default();
        }
        // The top layer starts last, so it bounds what all layers hold.
        let first = self.first_hidden(rules, n_layers - 1, n_layers);
        let low =
            if self.ring_ready && first == self.start && before.low <= first * per { before.low } else { first * per };
        Ring { low: low.max((self.end * per).saturating_sub(capacity)), end: self.end }
    }
}

/// Where a row's keys and values go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Cache row (see [`crate::cache`]): block-table lookup already done.
    Cache(u32),
    /// Row of the pass's own hidden keys, index into the pass's hidden rows.
    Hidden(u32),
}

/// One row of a pass, as a backend needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub token: u32,
    /// Embedding table: 0, or the copy under Sequential Hidden Decoding.
    pub table: u32,
    /// RoPE position.
    pub rope: u32,
    /// Index into [`Plan::entries`].
    pub entry: u32,
    pub store: Store,
    /// The row attends to the first `stored` stored rows of its sequence …
    pub stored: u32,
    /// … and to the hidden tokens `hidden_from..hidden_to` of it (empty for stored rows).
    pub hidden_from: u32,
    pub hidden_to: u32,
}

/// One sequence's part of a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub seq: usize,
    /// This sequence's rows within [`Plan::rows`].
    pub rows: Range<usize>,
    /// The sequence's cache blocks, as a range of [`Plan::blocks`].
    pub blocks: Range<usize>,
    /// Number of the first hidden token computed in this pass; earlier ones are read from the ring at
    /// `number % ring_capacity`.
    pub first_hidden: usize,
    /// Index of that token among the pass's hidden rows.
    pub hidden_base: usize,
    /// Hidden tokens of this sequence in this pass.
    pub n_hidden: usize,
}

/// The rows of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerRows {
    /// Rows that enter: indices into [`Plan::rows`], ascending. Their keys and values are computed.
    pub enter: Vec<u32>,
    /// Those that go on: indices into `enter`, ascending. Their queries, attention and feed-forward are computed, and
    /// they are what enters the next layer (after the last layer: what the output norm and LM head see).
    pub keep: Vec<u32>,
}

/// Logits wanted of a row that has come through the last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Row of the logits buffer.
    pub logits: u32,
}

/// One pass over the weights: everything a backend needs to know. Its vectors keep their capacity from pass to pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub rows: Vec<Row>,
    pub entries: Vec<Entry>,
    pub blocks: Vec<u32>,
    pub layers: Vec<LayerRows>,
    /// In the order in which their rows leave the last layer.
    pub outputs: Vec<Output>,
    /// Outputs are embeddings, the output norm's rows, instead of logits.
    pub is_embedding: bool,
    /// Hidden rows of all entries.
    pub n_hidden: usize,
    /// For each row of `rows`, its place; the backend does not need it, tests and bookkeeping do.
    pub places: Vec<Place>,
}

/// What the schedule asks of the cache: token ids and cache rows by position.
pub trait Sequences {
    fn token(&self, seq: usize, position: usize) -> u32;
    /// Cache row of a stored row, `stored = position * stored_copies + copy`.
    fn cache_row(&self, seq: usize, stored: usize) -> u32;
    fn blocks(&self, seq: usize) -> &[u32];
    /// How far the sequence's RoPE positions lie ahead of its places.
    fn dropped(&self, seq: usize) -> usize;
}

fn list<T>(n: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    let what = "the plan of a pass";
    list.try_reserve_exact(n).map_err(|_| Error::OutOfMemory { what, bytes: n.saturating_mul(size_of::<T>()) })?;
    Ok(list)
}

impl Plan {
    /// A plan that never allocates again for passes of up to `max_rows` rows of `max_entries` sequences with `max_blocks`
    /// cache blocks between them.
    pub fn with_capacity(
        n_layers: usize,
        max_rows: usize,
        max_entries: usize,
        max_blocks: usize,
        max_outputs: usize,
    ) -> Result<Plan> {
        let layer = |_| Ok(LayerRows { enter: list(max_rows)?, keep: list(max_rows)? });
        Ok(Plan {
            rows: list(max_rows)?,
            entries: list(max_entries)?,
            blocks: list(max_blocks)?,
            layers: (0..n_layers).map(layer).collect::<Result<_>>()?,
            outputs: list(max_outputs)?,
            is_embedding: false,
            n_hidden: 0,
            places: list(max_rows)?,
        })
    }

    pub fn clear(&mut self) {
        self.rows.clear();
        self.entries.clear();
        self.blocks.clear();
        self.outputs.clear();
        self.places.clear();
        self.n_hidden = 0;
        self.is_embedding = false;
        for layer in &mut self.layers {
            layer.enter.clear();
            layer.keep.clear();
        }
    }

    /// Adds as much of `task` as fits beside what the plan already holds, and moves the task on. Nothing is added when
    /// not even one position fits.
    pub fn add(
        &mut self,
        rules: &Rules,
        task: &mut Task,
        sequences: &impl Sequences,
        max_rows: usize,
        max_outputs: usize,
    ) {
        let n_layers = self.layers.len();
        let (from, to) =
            (task.cursor, task.pass_end(rules, n_layers, max_rows - self.rows.len(), max_outputs - self.outputs.len()));
        if from == to {
            return;
        }
        let entry = self.entries.len();
        let first_row = self.rows.len();
        let stored_copies = rules.stored_copies();

        // Row order within the entry: stored rows, then hidden rows, each by position and copy. Hidden rows that drop out
        // on the way up are then always the earliest of theirs.
        for position in from.max(task.start)..to {
            for copy in 0..stored_copies {
                self.push_row(rules, entry, task.seq, Place { position, copy }, sequences, 0);
            }
        }
        let hidden_start =
            if rules.hidden_copies() == 0 { to } else { from.max(task.first_hidden(rules, 0, n_layers)).min(to) };
        let hidden_base = self.n_hidden;
        for position in hidden_start..to {
            for copy in stored_copies..rules.copies {
                self.push_row(rules, entry, task.seq, Place { position, copy }, sequences, self.n_hidden);
                self.n_hidden += 1;
            }
        }

        for layer in 0..n_layers {
            let hidden_here = task.first_hidden(rules, layer, n_layers);
            let is_last = layer + 1 == n_layers;
            let hidden_above = if is_last { usize::MAX } else { task.first_hidden(rules, layer + 1, n_layers) };
            for row in first_row..self.rows.len() {
                let place = self.places[row];
                let is_stored = place.copy < stored_copies;
                if !(is_stored || place.position >= hidden_here) {
                    continue;
                }
                let goes_on = if is_last {
                    place.copy + 1 == rules.copies && task.output_row(place.position).is_some()
                } else {
                    is_stored || place.position >= hidden_above
                };
                let LayerRows { enter, keep } = &mut self.layers[layer];
                if goes_on {
                    keep.push(enter.len() as u32);
                }
                enter.push(row as u32);
            }
        }
        let first_new = from.max(task.start);
        for position in first_new..to {
            if let Some(logits) = task.output_row(position) {
                let offset = match task.wanted {
                    Wanted::Every(_) => position - task.start,
                    Wanted::EveryInPass(_) => position - first_new,
                    Wanted::Nothing | Wanted::Last(_) => 0,
                };
                self.outputs.push(Output { logits: (logits + offset) as u32 });
            }
        }

        let blocks = self.blocks.len();
        self.blocks.extend_from_slice(sequences.blocks(task.seq));
        self.entries.push(Entry {
            seq: task.seq,
            rows: first_row..self.rows.len(),
            blocks: blocks..self.blocks.len(),
            first_hidden: hidden_start * rules.hidden_copies(),
            hidden_base,
            n_hidden: self.n_hidden - hidden_base,
        });
        task.cursor = to;
    }

    fn push_row(
        &mut self,
        rules: &Rules,
        entry: usize,
        seq: usize,
        place: Place,
        sequences: &impl Sequences,
        hidden: usize,
    ) {
        let sight = rules.sight(place);
        let is_stored = place.copy < rules.stored_copies();
        let store = if is_stored {
            Store::Cache(sequences.cache_row(seq, place.position * rules.stored_copies() + place.copy))
        } else {
            Store::Hidden(hidden as u32)
        };
        let (hidden_from, hidden_to) =
            if is_stored { (0, 0) } else { (sight.hidden_from as u32, rules.hidden_number(place) as u32 + 1) };
        self.rows.push(Row {
            token: sequences.token(seq, place.position),
            table: if rules.attention == Attention::Full { place.copy as u32 } else { 0 },
            rope: rules.rope_position(Place { position: place.position + sequences.dropped(seq), ..place }) as u32,
            entry: entry as u32,
            store,
            stored: sight.stored as u32,
            hidden_from,
            hidden_to,
        });
        self.places.push(place);
    }
}

impl Task {
    /// First logits row for the output of `position`, if it is wanted.
    fn output_row(&self, position: usize) -> Option<usize> {
        match self.wanted {
            Wanted::Nothing => None,
            Wanted::Last(row) => (position + 1 == self.end).then_some(row),
            Wanted::Every(first) | Wanted::EveryInPass(first) => (position >= self.start).then_some(first),
        }
    }
}
