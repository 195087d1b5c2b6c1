//! The fixed pool of cache blocks and the sequences in it: pure integers; the bytes belong to the backend.
//!
//! A block holds the stored rows of `block` consecutive positions. Sequences hold tables of blocks; a fork shares them,
//! and whoever first writes into a shared block gets a copy of its own.

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
}

impl Layout {
    /// No sequence of a session may be longer: row numbers stay below 2^32 for every K.
    pub const MAX_POSITIONS: usize = 1 << 23;
    pub const MAX_SEQUENCES: usize = 1 << 12;

    pub fn new(rules: &Rules, n_positions: usize, n_sequences: usize) -> Result<Layout> {
        if n_positions == 0 || n_positions > Self::MAX_POSITIONS {
            return Err(invalid!("n_positions is {n_positions}, expected 1 to {}", Self::MAX_POSITIONS));
        }
        if n_sequences == 0 || n_sequences > Self::MAX_SEQUENCES {
            return Err(invalid!("n_sequences is {n_sequences}, expected 1 to {}", Self::MAX_SEQUENCES));
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
            ring_capacity: rules.ring_capacity(),
        })
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

#[derive(Clone, Debug)]
struct Sequence {
    len: usize,
    blocks: Vec<u32>,
    ring: Ring,
}

/// Blocks reserved for one sequence's next positions; to be committed or undone.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Reservation {
    seq: usize,
    n_new: usize,
    blocks_before: usize,
    /// A shared block that was replaced by a copy: its index in the table, and the block itself.
    replaced: Option<(usize, u32)>,
}

/// A block's first `n_positions` positions are to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    pub src: u32,
    pub dst: u32,
    pub n_positions: usize,
}

/// How the pool is used, in positions of whole blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub used: usize,
    pub free: usize,
    /// Positions in blocks that more than one sequence refers to (counted once).
    pub shared: usize,
}

pub struct Pool {
    layout: Layout,
    free: Vec<u32>,
    /// How many sequences refer to each block.
    references: Vec<u32>,
    /// Token id by cache slot (block * layout.block + offset): shared between forks as the blocks are.
    tokens: Vec<u32>,
    sequences: Vec<Sequence>,
}

impl Pool {
    pub fn new(layout: Layout) -> Pool {
        let sequence = || Sequence { len: 0, blocks: Vec::with_capacity(layout.n_blocks), ring: Ring::default() };
        Pool {
            layout,
            free: (0..layout.n_blocks as u32).rev().collect(),
            references: vec![0; layout.n_blocks],
            tokens: vec![0; layout.n_blocks * layout.block],
            sequences: (0..layout.n_sequences).map(|_| sequence()).collect(),
        }
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Bytes of the pool's own tables.
    pub fn bytes(&self) -> usize {
        let tables = self.layout.n_blocks * (2 + self.layout.n_sequences) + self.tokens.len();
        tables * size_of::<u32>()
    }

    pub fn check_seq(&self, seq: i64) -> Result<usize> {
        usize::try_from(seq).ok().filter(|&s| s < self.layout.n_sequences).ok_or_else(|| {
            invalid!("sequence {seq} does not exist, the session has sequences 0 to {}", self.layout.n_sequences - 1)
        })
    }

    pub fn len(&self, seq: usize) -> usize {
        self.sequences[seq].len
    }

    pub fn ring(&self, seq: usize) -> Ring {
        self.sequences[seq].ring
    }

    pub fn set_ring(&mut self, seq: usize, ring: Ring) {
        self.sequences[seq].ring = ring;
    }

    pub fn usage(&self) -> Usage {
        let block = self.layout.block;
        let shared = self.references.iter().filter(|&&r| r > 1).count();
        Usage {
            used: (self.layout.n_blocks - self.free.len()) * block,
            free: self.free.len() * block,
            shared: shared * block,
        }
    }

    /// The shared block that appending to `seq` would write into, as an index of its table.
    fn shared_tail(&self, seq: usize) -> Option<usize> {
        let s = &self.sequences[seq];
        let tail = s.len / self.layout.block;
        (!s.len.is_multiple_of(self.layout.block) && self.references[s.blocks[tail] as usize] > 1).then_some(tail)
    }

    /// Positions that could be appended to `seq` now.
    pub fn room(&self, seq: usize) -> usize {
        let Layout { block, n_positions, .. } = self.layout;
        let s = &self.sequences[seq];
        let in_blocks = match self.shared_tail(seq) {
            Some(tail) => (tail + self.free.len()) * block,
            None => (s.blocks.len() + self.free.len()) * block,
        };
        in_blocks.min(n_positions).saturating_sub(s.len)
    }

    /// Gives `seq` the blocks for `tokens` after its end and notes their ids. The block copy must be carried out before the
    /// positions are written; the length does not change before [`Pool::commit`].
    pub fn reserve(&mut self, seq: usize, tokens: &[u32]) -> Result<(Reservation, Option<BlockCopy>)> {
        let room = self.room(seq);
        if tokens.len() > room {
            return Err(Error::CacheFull { needed: tokens.len(), free: room });
        }
        let block = self.layout.block;
        let shared_tail = self.shared_tail(seq);
        let s = &mut self.sequences[seq];
        let mut reservation = Reservation { seq, n_new: tokens.len(), blocks_before: s.blocks.len(), replaced: None };
        let mut copy = None;
        let mut take = || {
            let fresh = self.free.pop().expect("room() counted the free blocks");
            self.references[fresh as usize] = 1;
            fresh
        };
        if let Some(tail) = shared_tail {
            let (src, dst) = (s.blocks[tail], take());
            s.blocks[tail] = dst;
            reservation.replaced = Some((tail, src));
            copy = Some(BlockCopy { src, dst, n_positions: s.len % block });
        }
        while s.blocks.len() * block < s.len + tokens.len() {
            let fresh = take();
            s.blocks.push(fresh);
        }
        if let Some(BlockCopy { src, dst, n_positions }) = copy {
            let (src, dst) = (src as usize * block, dst as usize * block);
            self.tokens.copy_within(src..src + n_positions, dst);
        }
        for (i, &token) in tokens.iter().enumerate() {
            let slot = Self::slot(&s.blocks, block, s.len + i);
            self.tokens[slot] = token;
        }
        Ok((reservation, copy))
    }

    pub fn commit(&mut self, reservation: Reservation) {
        self.sequences[reservation.seq].len += reservation.n_new;
        if let Some((_, block)) = reservation.replaced {
            self.release(block);
        }
    }

    /// Takes a reservation back; the sequence is what it was.
    pub fn undo(&mut self, reservation: Reservation) {
        let seq = reservation.seq;
        while self.sequences[seq].blocks.len() > reservation.blocks_before {
            let block = self.sequences[seq].blocks.pop().expect("longer than before");
            self.release(block);
        }
        if let Some((index, block)) = reservation.replaced {
            let copy = std::mem::replace(&mut self.sequences[seq].blocks[index], block);
            self.release(copy);
        }
    }

    fn release(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references -= 1;
        if *references == 0 {
            self.free.push(block);
        }
    }

    /// Shortens `seq` to `n_positions`. The ring is kept as it is: [`Ring::serves`] tells whether it still fits.
    pub fn truncate(&mut self, seq: usize, n_positions: usize) -> Result<()> {
        let len = self.sequences[seq].len;
        if n_positions > len {
            return Err(invalid!("sequence {seq} has {len} positions, it cannot be truncated to {n_positions}"));
        }
        let keep = n_positions.div_ceil(self.layout.block);
        while self.sequences[seq].blocks.len() > keep {
            let block = self.sequences[seq].blocks.pop().expect("longer than keep");
            self.release(block);
        }
        let s = &mut self.sequences[seq];
        s.len = n_positions;
        if n_positions == 0 {
            s.ring = Ring::default();
        }
        Ok(())
    }

    /// Makes `dst` the same text as `src`, sharing its blocks. The caller copies the ring's bytes.
    pub fn fork(&mut self, src: usize, dst: usize) {
        if src == dst {
            return;
        }
        while let Some(block) = self.sequences[dst].blocks.pop() {
            self.release(block);
        }
        // Both tables have their full capacity since the beginning: nothing is allocated here.
        let mut blocks = std::mem::take(&mut self.sequences[dst].blocks);
        blocks.extend_from_slice(&self.sequences[src].blocks);
        for &block in &blocks {
            self.references[block as usize] += 1;
        }
        let Sequence { len, ring, .. } = self.sequences[src];
        self.sequences[dst] = Sequence { len, blocks, ring };
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
}
