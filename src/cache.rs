//! The fixed pool of cache blocks and the sequences in it: pure integers; the bytes belong to the backend.
//!
//! A block holds the stored rows of `block` consecutive positions. Sequences hold tables of blocks; a fork shares them,
//! and whoever first writes into a shared block gets a copy of its own.
//!
//! Beside the live sequences the pool keeps *retained* ones: texts that nobody extends, kept for whoever begins with the same
//! tokens. They hold blocks only until a live sequence needs them; the least recently used one shrinks first, from its end.

use crate::error::{Error, Result, invalid};
use crate::schedule::{Ring, Rules, Sequences};

/// Sizes of a session's cache, fixed at its creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Positions that one sequence can hold, and that the pool is made for.
    pub n_positions: usize,
    pub n_sequences: usize,
    /// Positions to a block.
    pub block: usize,
    pub n_blocks: usize,
    /// Stored rows of a position.
    pub stored_copies: usize,
    /// Hidden tokens each sequence remembers for each layer.
    pub ring_capacity: usize,
    /// Drops from the middle of a sequence are multiples of this, in positions: whole blocks, and whole chunks, so that what
    /// remains has its chunk borders where they were.
    pub drop_unit: usize,
}

impl Layout {
    /// No sequence of a session may be longer: row numbers stay below 2^32 for every K.
    pub const MAX_POSITIONS: usize = 1 << 23;
    pub const MAX_SEQUENCES: usize = 1 << 12;
    /// Positions of [`Layout::new`]'s `n_draft`.
    pub const MAX_DRAFT: usize = 256;

    /// `n_draft` positions at a sequence's end can be taken back without their predecessors' hidden keys being lost.
    pub fn new(rules: &Rules, n_positions: usize, n_sequences: usize, n_draft: usize) -> Result<Layout> {
        if n_positions == 0 || n_positions > Self::MAX_POSITIONS {
            return Err(invalid!("n_positions is {n_positions}, expected 1 to {}", Self::MAX_POSITIONS));
        }
        if n_sequences == 0 || n_sequences > Self::MAX_SEQUENCES {
            return Err(invalid!("n_sequences is {n_sequences}, expected 1 to {}", Self::MAX_SEQUENCES));
        }
        if n_draft > Self::MAX_DRAFT {
            return Err(invalid!("n_draft is {n_draft}, expected 0 to {}", Self::MAX_DRAFT));
        }
        // A sequence wastes at most a block less one position. Small pools for many sequences get small blocks, so that
        // the waste stays below a sixty-fourth of the pool.
        let limit = if n_sequences == 1 { 16 } else { n_positions / (64 * n_sequences) };
        let block = [16, 8, 4, 2, 1].into_iter().find(|&b| b <= limit.max(1)).unwrap_or(1);
        Ok(Layout {
            n_positions,
            n_sequences,
            block,
            n_blocks: n_positions.div_ceil(block),
            stored_copies: rules.stored_copies(),
            ring_capacity: match rules.ring_capacity() {
                0 => 0,
                n => n + n_draft * rules.hidden_copies(),
            },
            drop_unit: least_common_multiple(block, rules.chunk.max(1)),
        })
    }

    /// `n` positions in whole blocks, rounded up.
    pub fn whole_blocks(&self, n: usize) -> usize {
        n.next_multiple_of(self.block)
    }

    /// Rows of the cache, for each layer.
    pub fn cache_rows(&self) -> usize {
        self.n_blocks * self.block * self.stored_copies
    }

    /// Rows of the rings, for each layer.
    pub fn ring_rows(&self) -> usize {
        self.n_sequences * self.ring_capacity
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[derive(Debug, Default)]
struct Sequence {
    len: usize,
    blocks: Vec<u32>,
    ring: Ring,
    /// Positions dropped from the middle so far: so far do RoPE positions lie ahead of places in the text.
    dropped: usize,
    /// Blocks that a reservation has taken out of the table and may have to put back. Has room only under a policy that drops.
    aside: Vec<u32>,
}

/// A text that is kept for its prefix.
#[derive(Debug, Default)]
struct Retained {
    len: usize,
    blocks: Vec<u32>,
    last_used: u64,
}

/// Blocks reserved for one sequence's next positions; to be committed or undone.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Reservation {
    seq: usize,
    n_new: usize,
    blocks_before: usize,
    /// A shared block that was replaced by a copy, its index in the table first. It is held until the commit: whoever else has it
    /// must not write into it before.
    replaced: Option<(usize, u32)>,
    dropped: Option<Middle>,
}

/// A part of a sequence that is dropped: positions `keep..keep + n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Middle {
    /// Whole blocks. Their keys and values are computed anew, where the shortened text has them.
    pub keep: usize,
    /// A multiple of [`Layout::drop_unit`].
    pub n: usize,
}

impl Reservation {
    /// Positions that are dropped for it.
    pub fn dropped(&self) -> usize {
        self.dropped.map_or(0, |m| m.n)
    }
}

/// Where a prefix was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Live(usize),
    Retained(usize),
}

/// A block's first `n_positions` positions are to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    pub src: u32,
    pub dst: u32,
    pub n_positions: usize,
}

/// How the pool is used, in positions of whole blocks: `used + retained + free` is the whole pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In blocks that sequences refer to.
    pub used: usize,
    /// In blocks that nobody refers to.
    pub free: usize,
    /// The part of `used` that more than one sequence refers to (counted once).
    pub shared: usize,
    /// In blocks that only retained texts refer to: there to be taken.
    pub retained: usize,
}

pub struct Pool {
    layout: Layout,
    free: Vec<u32>,
    /// (block): how many sequences refer to it.
    live: Vec<u32>,
    /// (block): how many retained texts refer to it.
    kept: Vec<u32>,
    /// Blocks that only retained texts refer to.
    n_evictable: usize,
    /// Token id by cache slot (block * layout.block + offset): shared between forks as the blocks are.
    tokens: Vec<u32>,
    sequences: Vec<Sequence>,
    retained: Vec<Retained>,
    /// Counts uses of retained texts.
    clock: u64,
    n_evicted: u64,
}

fn table<T>(n: usize) -> Result<Vec<T>> {
    let mut table = Vec::new();
    let what = "the cache's block tables";
    table.try_reserve_exact(n).map_err(|_| Error::OutOfMemory { what, bytes: n.saturating_mul(size_of::<T>()) })?;
    Ok(table)
}

fn zeros(n: usize) -> Result<Vec<u32>> {
    let mut table = table(n)?;
    table.resize(n, 0);
    Ok(table)
}

impl Pool {
    pub const MAX_RETAINED: usize = 1 << 12;

    /// An empty pool that can keep `n_retained` texts. Nothing but [`Pool::allow_drops`] allocates later.
    pub fn new(layout: Layout, n_retained: usize) -> Result<Pool> {
        if n_retained > Self::MAX_RETAINED {
            return Err(invalid!("n_retained is {n_retained}, expected 0 to {}", Self::MAX_RETAINED));
        }
        let mut free = table(layout.n_blocks)?;
        free.extend((0..layout.n_blocks as u32).rev());
        let sequence = |_| Ok(Sequence { blocks: table(layout.n_blocks)?, ..Default::default() });
        let text = |_| Ok(Retained { blocks: table(layout.n_blocks)?, ..Default::default() });
        Ok(Pool {
            layout,
            free,
            live: zeros(layout.n_blocks)?,
            kept: zeros(layout.n_blocks)?,
            n_evictable: 0,
            tokens: zeros(layout.n_blocks * layout.block)?,
            sequences: (0..layout.n_sequences).map(sequence).collect::<Result<_>>()?,
            retained: (0..n_retained).map(text).collect::<Result<_>>()?,
            clock: 0,
            n_evicted: 0,
        })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Bytes of the pool's own tables.
    pub fn bytes(&self) -> usize {
        let aside: usize = self.sequences.iter().map(|s| s.aside.capacity()).sum();
        let tables = self.layout.n_blocks * (3 + self.layout.n_sequences + self.retained.len());
        (tables + self.tokens.len() + aside) * size_of::<u32>()
    }

    pub fn check_seq(&self, seq: i64) -> Result<usize> {
        usize::try_from(seq).ok().filter(|&s| s < self.layout.n_sequences).ok_or_else(|| {
            invalid!("sequence {seq} does not exist, the session has sequences 0 to {}", self.layout.n_sequences - 1)
        })
    }

    pub fn len(&self, seq: usize) -> usize {
        self.sequences[seq].len
    }

    /// The sequence's tokens, in order; what was dropped is not among them.
    pub fn text(&self, seq: usize) -> impl ExactSizeIterator<Item = u32> {
        (0..self.sequences[seq].len).map(move |position| self.token(seq, position))
    }

    /// The stored rows of `seq` in order, as runs of consecutive rows of the cache: where each begins, and how many.
    pub fn row_runs(&self, seq: usize) -> impl Iterator<Item = (usize, usize)> {
        let Layout { block, stored_copies, .. } = self.layout;
        let Sequence { blocks, len, .. } = &self.sequences[seq];
        blocks.chunk_by(|a, b| a + 1 == *b).scan(*len, move |left, run| {
            let n = (run.len() * block).min(*left);
            *left -= n;
            Some((run[0] as usize * block * stored_copies, n * stored_copies))
        })
    }

    pub fn ring(&self, seq: usize) -> Ring {
        self.sequences[seq].ring
    }

    pub fn set_ring(&mut self, seq: usize, ring: Ring) {
        self.sequences[seq].ring = ring;
    }

    pub fn usage(&self) -> Usage {
        let Layout { block, n_blocks, .. } = self.layout;
        let shared = self.live.iter().filter(|&&r| r > 1).count();
        Usage {
            used: (n_blocks - self.free.len() - self.n_evictable) * block,
            free: self.free.len() * block,
            shared: shared * block,
            retained: self.n_evictable * block,
        }
    }

    /// Positions that retained texts have given up since the pool was made.
    pub fn n_evicted(&self) -> u64 {
        self.n_evicted
    }

    /// Blocks that live sequences can have.
    fn n_available(&self) -> usize {
        self.free.len() + self.n_evictable
    }

    /// The part-filled block that appending to `seq` would write into.
    fn tail(&self, seq: usize) -> Option<u32> {
        let s = &self.sequences[seq];
        (!s.len.is_multiple_of(self.layout.block)).then(|| s.blocks[s.len / self.layout.block])
    }

    /// Positions that could be appended to `seq` if `available` blocks were to be had. `is_shared`: its last block must be replaced
    /// first. What is dropped is given back only when the call is done, and the blocks before it are computed into others.
    fn room_in(&self, seq: usize, available: usize, is_shared: bool, dropped: Option<Middle>) -> usize {
        let Layout { block, n_positions, .. } = self.layout;
        let s = &self.sequences[seq];
        let Middle { keep, n } = dropped.unwrap_or_default();
        match available.checked_sub(keep / block + usize::from(is_shared)) {
            Some(more) => ((s.blocks.len() + more) * block - s.len).min(n_positions + n - s.len),
            None => 0,
        }
    }

    /// Positions that could be appended to `seq` now.
    pub fn room(&self, seq: usize) -> usize {
        self.room_in(seq, self.n_available(), self.has_shared_tail(seq), None)
    }

    /// Whether another sequence has the block that appending to `seq` would write into.
    fn has_shared_tail(&self, seq: usize) -> bool {
        self.tail(seq).is_some_and(|b| self.live[b as usize] > 1)
    }

    /// Whether positions can be appended to several sequences at once: `(sequence, how many, what is dropped first)` each.
    ///
    /// Returns the blocks that remain.
    ///
    /// # Errors
    /// [`Error::CacheFull`] with the positions that all need and those that there is room for; nothing has changed.
    pub fn check_room(&self, entries: impl Iterator<Item = (usize, usize, Option<Middle>)>) -> Result<usize> {
        let block = self.layout.block;
        let mut available = self.n_available();
        let (mut needed, mut fits, mut is_full) = (0usize, 0usize, false);
        for (seq, n, dropped) in entries {
            needed = needed.saturating_add(n);
            if is_full {
                continue;
            }
            let is_shared = self.has_shared_tail(seq);
            let room = self.room_in(seq, available, is_shared, dropped);
            fits += n.min(room);
            is_full = n > room;
            if !is_full {
                let s = &self.sequences[seq];
                let anew = dropped.map_or(0, |m| m.keep / block);
                available -= anew + usize::from(is_shared) + (s.len + n).div_ceil(block) - s.blocks.len();
            }
        }
        if is_full { Err(Error::CacheFull { needed, free: fits }) } else { Ok(available) }
    }

    /// Gives `seq` the blocks for `tokens` after its end, without what is to be dropped, and notes their ids. `spare` blocks may be
    /// used beyond what [`Pool::check_room`] counted, so that retained texts stay whole. The block copy must be carried out before
    /// the positions are written; the length does not grow before [`Pool::commit`].
    pub fn reserve(
        &mut self,
        seq: usize,
        tokens: &[u32],
        dropped: Option<Middle>,
        spare: &mut usize,
    ) -> Result<(Reservation, Option<BlockCopy>)> {
        self.check_room(std::iter::once((seq, tokens.len(), dropped)))?;
        let block = self.layout.block;
        if let Some(middle) = dropped {
            self.drop_middle(seq, middle);
        }
        let Sequence { len, ref blocks, .. } = self.sequences[seq];
        let blocks_before = blocks.len();
        let grown = (len + tokens.len()).div_ceil(block) - blocks_before;
        let (replaced, copy) = self.replace_tail(seq, grown, spare);
        self.evict_for(grown);
        for _ in 0..grown {
            let fresh = self.take();
            self.sequences[seq].blocks.push(fresh);
        }
        for (i, &token) in tokens.iter().enumerate() {
            let slot = Self::slot(&self.sequences[seq].blocks, block, len + i);
            self.tokens[slot] = token;
        }
        Ok((Reservation { seq, n_new: tokens.len(), blocks_before, replaced, dropped }, copy))
    }

    /// Makes the part-filled block at the end of `seq` its own to write into. `grown` blocks are still to be taken.
    fn replace_tail(
        &mut self,
        seq: usize,
        grown: usize,
        spare: &mut usize,
    ) -> (Option<(usize, u32)>, Option<BlockCopy>) {
        let Some(src) = self.tail(seq) else { return (None, None) };
        if !self.has_shared_tail(seq) {
            // Retained texts that end before what is to be written lose nothing.
            if *spare == 0 || !self.is_kept_beyond(seq, src) {
                self.cut_retained(seq, src);
                return (None, None);
            }
            *spare -= 1;
        }
        self.evict_for(grown + 1);
        let dst = self.take();
        let Sequence { len, ref mut blocks, .. } = self.sequences[seq];
        let (index, n_positions) = (len / self.layout.block, len % self.layout.block);
        blocks[index] = dst;
        let (from, to) = (src as usize * self.layout.block, dst as usize * self.layout.block);
        self.tokens.copy_within(from..from + n_positions, to);
        (Some((index, src)), Some(BlockCopy { src, dst, n_positions }))
    }

    /// Whether a retained text has positions in `block`, the last of `seq`, after the end of `seq`.
    fn is_kept_beyond(&self, seq: usize, block: u32) -> bool {
        let len = self.sequences[seq].len;
        let index = len / self.layout.block;
        self.retained.iter().any(|r| r.len > len && r.blocks.get(index) == Some(&block))
    }

    /// Shortens the retained texts of [`Pool::is_kept_beyond`] to the end of `seq`.
    fn cut_retained(&mut self, seq: usize, block: u32) {
        let len = self.sequences[seq].len;
        let index = len / self.layout.block;
        for i in 0..self.retained.len() {
            let text = &mut self.retained[i];
            if text.len > len && text.blocks.get(index) == Some(&block) {
                self.n_evicted += (text.len - len) as u64;
                text.len = len;
                while self.retained[i].blocks.len() > index + 1 {
                    self.unkeep_last(i);
                }
            }
        }
    }

    pub fn commit(&mut self, reservation: Reservation) {
        let seq = reservation.seq;
        self.sequences[seq].len += reservation.n_new;
        if let Some((_, block)) = reservation.replaced {
            self.release(block);
        }
        while let Some(block) = self.sequences[seq].aside.pop() {
            self.release(block);
        }
    }

    /// Takes a reservation back, the last one first; the sequence is what it was. What retained texts gave up for it stays given up.
    pub fn undo(&mut self, reservation: Reservation) {
        let seq = reservation.seq;
        while self.sequences[seq].blocks.len() > reservation.blocks_before {
            self.release_last(seq);
        }
        if let Some((index, block)) = reservation.replaced {
            let copy = std::mem::replace(&mut self.sequences[seq].blocks[index], block);
            self.release(copy);
        }
        if let Some(Middle { keep, n }) = reservation.dropped {
            let s = &mut self.sequences[seq];
            let (n_anew, n_aside) = (keep / self.layout.block, s.aside.len());
            // From (anew, rest) to (aside, rest, anew). All are different blocks, so the table has room for them.
            s.blocks.append(&mut s.aside);
            s.blocks.rotate_right(n_aside);
            s.blocks[n_aside..].rotate_left(n_anew);
            (s.len, s.dropped) = (s.len + n, s.dropped - n);
            for _ in 0..n_anew {
                self.release_last(seq);
            }
        }
    }

    /// Takes a part out of `seq`'s table, and gives it new blocks for what stands before.
    fn drop_middle(&mut self, seq: usize, middle: Middle) {
        let block = self.layout.block;
        let (n_anew, n_dropped) = (middle.keep / block, middle.n / block);
        self.evict_for(n_anew);
        let s = &mut self.sequences[seq];
        s.aside.extend(s.blocks.drain(..n_anew + n_dropped));
        (s.len, s.dropped) = (s.len - middle.n, s.dropped + middle.n);
        for i in 0..n_anew {
            let fresh = self.take();
            let s = &mut self.sequences[seq];
            s.blocks.insert(i, fresh);
            let from = s.aside[i] as usize * block;
            self.tokens.copy_within(from..from + block, fresh as usize * block);
        }
    }

    /// Lets [`Pool::reserve`] drop from `seq` (or no longer): what it needs for that is allocated here.
    pub fn allow_drops(&mut self, seq: usize, allowed: bool) -> Result<()> {
        self.sequences[seq].aside = if allowed { table(self.layout.n_blocks)? } else { Vec::new() };
        Ok(())
    }

    /// Positions dropped from `seq` so far.
    pub fn dropped(&self, seq: usize) -> usize {
        self.sequences[seq].dropped
    }

    fn take(&mut self) -> u32 {
        let fresh = self.free.pop().expect("evict_for() made room");
        self.live[fresh as usize] = 1;
        fresh
    }

    fn hold(&mut self, block: u32) {
        let block = block as usize;
        self.live[block] += 1;
        if self.live[block] == 1 && self.kept[block] > 0 {
            self.n_evictable -= 1;
        }
    }

    fn release(&mut self, block: u32) {
        let at = block as usize;
        self.live[at] -= 1;
        match (self.live[at], self.kept[at]) {
            (0, 0) => self.free.push(block),
            (0, _) => self.n_evictable += 1,
            _ => {}
        }
    }

    fn release_last(&mut self, seq: usize) {
        let block = self.sequences[seq].blocks.pop().expect("the table has blocks");
        self.release(block);
    }

    /// Shortens retained texts, the least recently used first, until `n` blocks are free or none is left.
    fn evict_for(&mut self, n: usize) {
        while self.free.len() < n {
            let texts = self.retained.iter().enumerate().filter(|(_, r)| !r.blocks.is_empty());
            let Some((index, text)) = texts.min_by_key(|(_, r)| r.last_used) else { return };
            let len = (text.blocks.len() - 1) * self.layout.block;
            self.n_evicted += (text.len - len) as u64;
            self.retained[index].len = len;
            self.unkeep_last(index);
        }
    }

    /// Takes a retained text's last block from it.
    fn unkeep_last(&mut self, index: usize) {
        let block = self.retained[index].blocks.pop().expect("the table has blocks");
        let at = block as usize;
        self.kept[at] -= 1;
        if self.kept[at] == 0 && self.live[at] == 0 {
            self.n_evictable -= 1;
            self.free.push(block);
        }
    }

    /// Empties `seq` and keeps its text for [`Pool::take_prefix`], in place of those that it begins with and, if the pool keeps as
    /// many as it can, of the least recently used one. A text that parts were dropped from is no prefix of anything and not kept.
    pub fn retain(&mut self, seq: usize) {
        if self.sequences[seq].dropped == 0 && self.sequences[seq].len > 0 && !self.retained.is_empty() {
            for index in 0..self.retained.len() {
                let Retained { len, ref blocks, .. } = self.retained[index];
                let is_part = len <= self.sequences[seq].len
                    && (0..len).all(|i| self.tokens[Self::slot(blocks, self.layout.block, i)] == self.token(seq, i));
                if is_part {
                    self.forget(index);
                }
            }
            let order = |r: &Retained| (!r.blocks.is_empty(), r.last_used);
            let index = (0..self.retained.len()).min_by_key(|&i| order(&self.retained[i])).expect("there are some");
            self.n_evicted += self.retained[index].len as u64;
            self.forget(index);
            self.clock += 1;
            let (s, text) = (&mut self.sequences[seq], &mut self.retained[index]);
            std::mem::swap(&mut s.blocks, &mut text.blocks);
            (text.len, text.last_used) = (s.len, self.clock);
            for i in 0..self.retained[index].blocks.len() {
                let block = self.retained[index].blocks[i];
                self.kept[block as usize] += 1;
                self.release(block);
            }
        }
        self.clear(seq);
    }

    fn forget(&mut self, index: usize) {
        while !self.retained[index].blocks.is_empty() {
            self.unkeep_last(index);
        }
        self.retained[index].len = 0;
    }

    fn clear(&mut self, seq: usize) {
        while !self.sequences[seq].blocks.is_empty() {
            self.release_last(seq);
        }
        let s = &mut self.sequences[seq];
        (s.len, s.ring, s.dropped) = (0, Ring::default(), 0);
    }

    /// The longest text in the pool that `tokens` begin with, a part of a sequence or of a retained text, and its length; `None` if
    /// not even the first token is there. Of equally long ones `preferred` is taken, then live ones.
    pub fn match_prefix(&self, tokens: &[u32], preferred: Option<usize>) -> Option<(Source, usize)> {
        let live = self.sequences.iter().enumerate().filter(|(_, s)| s.dropped == 0);
        let live = live.map(|(i, s)| (Source::Live(i), &s.blocks, s.len));
        let retained = self.retained.iter().enumerate().map(|(i, r)| (Source::Retained(i), &r.blocks, r.len));
        let common = |(source, blocks, len): (Source, &Vec<u32>, usize)| {
            let at = |position| self.tokens[Self::slot(blocks, self.layout.block, position)];
            let n = tokens.iter().take(len).enumerate().take_while(|&(i, &token)| at(i) == token).count();
            (source, n)
        };
        let rank = |&(source, n): &(Source, usize)| match source {
            Source::Live(i) if Some(i) == preferred => (n, 2),
            Source::Live(_) => (n, 1),
            Source::Retained(_) => (n, 0),
        };
        live.chain(retained).map(common).max_by_key(rank).filter(|&(_, n)| n > 0)
    }

    /// Makes `dst` the longest prefix of `tokens` that is in the pool, whatever it held, and returns where that was and its length.
    /// Full blocks are shared; the caller copies a live source's ring.
    pub fn take_prefix(&mut self, dst: usize, tokens: &[u32]) -> Option<(Source, usize)> {
        let found = self.match_prefix(tokens, Some(dst));
        let Some((source, n)) = found else {
            self.clear(dst);
            return None;
        };
        match source {
            Source::Live(src) => self.fork(src, dst),
            Source::Retained(index) => {
                self.clock += 1;
                self.retained[index].last_used = self.clock;
                self.clear(dst);
                for i in 0..n.div_ceil(self.layout.block) {
                    let block = self.retained[index].blocks[i];
                    self.hold(block);
                    self.sequences[dst].blocks.push(block);
                }
                (self.sequences[dst].len, self.sequences[dst].ring) = (n, Ring::LOST);
            }
        }
        self.shorten(dst, n);
        found
    }

    /// Shortens `seq` to `n_positions`. The ring is kept as it is: [`Ring::serves`] tells whether it still fits.
    pub fn truncate(&mut self, seq: usize, n_positions: usize) -> Result<()> {
        let len = self.sequences[seq].len;
        if n_positions > len {
            return Err(invalid!("sequence {seq} has {len} positions, it cannot be truncated to {n_positions}"));
        }
        self.shorten(seq, n_positions);
        Ok(())
    }

    fn shorten(&mut self, seq: usize, n_positions: usize) {
        if n_positions == 0 {
            return self.clear(seq);
        }
        while self.sequences[seq].blocks.len() > n_positions.div_ceil(self.layout.block) {
            self.release_last(seq);
        }
        self.sequences[seq].len = n_positions;
    }

    /// Makes `dst` the same text as `src`, sharing its blocks. The caller copies the ring's bytes.
    pub fn fork(&mut self, src: usize, dst: usize) {
        if src == dst {
            return;
        }
        self.clear(dst);
        for i in 0..self.sequences[src].blocks.len() {
            let block = self.sequences[src].blocks[i];
            self.hold(block);
            // Both tables have their full capacity since the beginning: nothing is allocated here.
            self.sequences[dst].blocks.push(block);
        }
        let Sequence { len, ring, dropped, .. } = self.sequences[src];
        let to = &mut self.sequences[dst];
        (to.len, to.ring, to.dropped) = (len, ring, dropped);
    }

    /// Makes `seq`, whatever it held, a text of `tokens` whose keys and values the caller writes; `dropped` as [`Pool::dropped`] counts.
    ///
    /// # Errors
    /// [`Error::CacheFull`]; the sequence is what it was.
    pub fn restore(&mut self, seq: usize, tokens: &[u32], dropped: usize) -> Result<()> {
        let own = self.sequences[seq].blocks.iter().filter(|&&b| self.live[b as usize] == 1).count();
        let free = ((self.n_available() + own) * self.layout.block).min(self.layout.n_positions);
        if tokens.len() > free {
            return Err(Error::CacheFull { needed: tokens.len(), free });
        }
        self.clear(seq);
        if !tokens.is_empty() {
            let (reservation, _) = self.reserve(seq, tokens, None, &mut 0)?;
            self.commit(reservation);
            let s = &mut self.sequences[seq];
            (s.dropped, s.ring) = (dropped, Ring::LOST);
        }
        Ok(())
    }

    /// Recounts everything.
    ///
    /// # Errors
    /// `Internal` with what does not add up.
    pub fn audit(&self) -> Result<()> {
        let Layout { block, n_blocks, .. } = self.layout;
        let (mut live, mut kept) = (vec![0u32; n_blocks], vec![0u32; n_blocks]);
        let wrong = |what: String| Err(Error::Internal(what));
        for (i, s) in self.sequences.iter().enumerate() {
            s.blocks.iter().for_each(|&b| live[b as usize] += 1);
            if s.blocks.len() != s.len.div_ceil(block) || !s.aside.is_empty() {
                return wrong(format!("sequence {i} has {} positions in {} blocks", s.len, s.blocks.len()));
            }
        }
        for (i, r) in self.retained.iter().enumerate() {
            r.blocks.iter().for_each(|&b| kept[b as usize] += 1);
            if r.blocks.len() != r.len.div_ceil(block) {
                return wrong(format!("retained text {i} has {} positions in {} blocks", r.len, r.blocks.len()));
            }
        }
        let mut is_free = vec![false; n_blocks];
        self.free.iter().for_each(|&b| is_free[b as usize] = true);
        let n_free = is_free.iter().filter(|&&f| f).count();
        let evictable = (0..n_blocks).filter(|&b| live[b] == 0 && kept[b] > 0).count();
        let unused = (0..n_blocks).all(|b| is_free[b] == (live[b] == 0 && kept[b] == 0));
        if live != self.live
            || kept != self.kept
            || evictable != self.n_evictable
            || !unused
            || n_free != self.free.len()
        {
            return wrong(format!(
                "the pool of {n_blocks} blocks counts {} free and {} retained ones, there are {n_free} and {evictable}",
                self.free.len(),
                self.n_evictable
            ));
        }
        Ok(())
    }

    fn slot(blocks: &[u32], block: usize, position: usize) -> usize {
        blocks[position / block] as usize * block + position % block
    }
}

impl Sequences for Pool {
    fn token(&self, seq: usize, position: usize) -> u32 {
        self.tokens[Self::slot(&self.sequences[seq].blocks, self.layout.block, position)]
    }

    fn cache_row(&self, seq: usize, stored: usize) -> u32 {
        let Layout { block, stored_copies, .. } = self.layout;
        let slot = Self::slot(&self.sequences[seq].blocks, block, stored / stored_copies);
        (slot * stored_copies + stored % stored_copies) as u32
    }

    fn blocks(&self, seq: usize) -> &[u32] {
        &self.sequences[seq].blocks
    }

    fn dropped(&self, seq: usize) -> usize {
        self.sequences[seq].dropped
    }
}
