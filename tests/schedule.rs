//! The schedule, carried out with hashes instead of numbers: a row's value is a hash of everything that it depends on, so
//! pruned, split, rolled-back and forked computations must agree with the dense definition to the bit.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use phd::Error;
use phd::cache::{Layout, Middle, Pool, Reservation, Source};
use phd::schedule::{Attention, Place, Plan, Pruning, Ring, Rules, Sequences, Store, Task, Wanted};

fn hash(parts: impl Hash) -> u64 {
    let mut h = DefaultHasher::new();
    parts.hash(&mut h);
    h.finish()
}

/// The attention mask as the specification states it, rule by rule, over rows of (position, copy).
fn may_attend(rules: &Rules, q: Place, k: Place) -> bool {
    let own = k.position == q.position && k.copy <= q.copy;
    if rules.attention == Attention::Full {
        return own || k.position < q.position;
    }
    let earlier = k.position < q.position;
    let number = |p: Place| (p.position * (rules.copies - 1) + p.copy) as i64;
    let window = rules.window > 0
        && q.copy >= 1
        && k.copy >= 1
        && earlier
        && number(q) - number(k) <= rules.window as i64
        && (rules.chunk == 0 || q.position / rules.chunk == k.position / rules.chunk);
    own || (k.copy == 0 && earlier) || window
}

fn places(rules: &Rules, n: usize) -> Vec<Place> {
    (0..n * rules.copies).map(|r| Place { position: r / rules.copies, copy: r % rules.copies }).collect()
}

/// A text and, layer by layer, what enters of its stored rows: the dense definition, which prunes, splits and shares nothing.
#[derive(Clone)]
struct Text {
    rules: Rules,
    tokens: Vec<u32>,
    dropped: usize,
    stored: Vec<Vec<u64>>,
}

impl Text {
    fn new(rules: Rules, n_layers: usize) -> Text {
        Text { rules, tokens: Vec::new(), dropped: 0, stored: vec![Vec::new(); n_layers] }
    }

    fn embedded(&self, p: Place) -> u64 {
        let rope = self.rules.rope_position(Place { position: p.position + self.dropped, ..p });
        hash((self.tokens[p.position], p.copy, rope as u32))
    }

    /// Output of the last position's last copy: all rows that are not known, by the dense mask.
    fn append(&mut self, piece: &[u32]) -> u64 {
        self.tokens.extend(piece);
        let rules = self.rules;
        let rows = places(&rules, self.tokens.len());
        let is_stored = |p: Place| rules.attention == Attention::Full || p.copy == 0;
        let mut values: Vec<u64> = rows.iter().map(|&p| self.embedded(p)).collect();
        for layer in 0..self.stored.len() {
            let known = &mut self.stored[layer];
            let stored: Vec<usize> = (0..rows.len()).filter(|&r| is_stored(rows[r])).collect();
            for (i, &r) in stored.iter().enumerate() {
                match known.get(i) {
                    Some(&value) => values[r] = value,
                    None => known.push(values[r]),
                }
            }
            let next = |q: usize| {
                // Stored keys first, then hidden ones, each in row order: the order in which backends read them.
                let mut keys: Vec<u64> = Vec::new();
                for wanted in [true, false] {
                    keys.extend((0..rows.len()).filter_map(|k| {
                        (is_stored(rows[k]) == wanted && may_attend(&rules, rows[q], rows[k])).then_some(values[k])
                    }));
                }
                hash((layer, values[q], keys))
            };
            values = (0..rows.len()).map(next).collect();
        }
        values[rows.len() - 1]
    }

    fn truncate(&mut self, n: usize) {
        self.tokens.truncate(n);
        self.dropped = if n == 0 { 0 } else { self.dropped };
        self.stored.iter_mut().for_each(|s| s.truncate(n * self.rules.stored_copies()));
    }

    /// The first positions are computed anew, as a text of their own that begins where nothing is missing before the rest.
    fn drop_middle(&mut self, middle: Middle) {
        let per = self.rules.stored_copies();
        self.dropped += middle.n;
        let mut first = Text { dropped: self.dropped, ..Text::new(self.rules, self.stored.len()) };
        if middle.keep > 0 {
            first.append(&self.tokens[..middle.keep]);
        }
        self.tokens.drain(middle.keep..middle.keep + middle.n);
        for (stored, first) in self.stored.iter_mut().zip(first.stored) {
            stored.splice(..(middle.keep + middle.n) * per, first);
        }
    }
}

/// Texts that a machine's pool retains.
const RETAINED: usize = 3;

/// Executes plans on hashes. What a pass has not written in time is missing, and missing keys panic.
struct Machine {
    rules: Rules,
    n_layers: usize,
    pool: Pool,
    cache: Vec<HashMap<usize, u64>>,
    rings: Vec<HashMap<(usize, usize), u64>>,
    outputs: HashMap<u32, u64>,
    rows_computed: usize,
}

impl Machine {
    fn new(rules: Rules, n_layers: usize, layout: Layout) -> Machine {
        let maps = || vec![HashMap::new(); n_layers];
        Machine {
            rules,
            n_layers,
            pool: Pool::new(layout, RETAINED).unwrap(),
            cache: maps(),
            rings: vec![HashMap::new(); n_layers],
            outputs: HashMap::new(),
            rows_computed: 0,
        }
    }

    fn run(&mut self, plan: &Plan) {
        let layout = *self.pool.layout();
        let per_block = layout.block * layout.stored_copies;
        let mut values: Vec<u64> =
            plan.rows.iter().zip(&plan.places).map(|(r, p)| hash((r.token, p.copy, r.rope))).collect();
        for (layer, rows) in plan.layers.iter().enumerate() {
            assert_eq!(rows.enter.len(), values.len());
            self.rows_computed += values.len();
            let mut fresh = HashMap::new();
            for (&row, &value) in rows.enter.iter().zip(&values) {
                match plan.rows[row as usize].store {
                    Store::Cache(at) => drop(self.cache[layer].insert(at as usize, value)),
                    Store::Hidden(at) => drop(fresh.insert(at as usize, value)),
                }
            }
            let next: Vec<u64> = rows
                .keep
                .iter()
                .map(|&at| {
                    let row = &plan.rows[rows.enter[at as usize] as usize];
                    let entry = &plan.entries[row.entry as usize];
                    let blocks = &plan.blocks[entry.blocks.clone()];
                    let mut keys: Vec<u64> = (0..row.stored as usize)
                        .map(|i| self.cache[layer][&(blocks[i / per_block] as usize * per_block + i % per_block)])
                        .collect();
                    keys.extend((row.hidden_from as usize..row.hidden_to as usize).map(|number| {
                        match number.checked_sub(entry.first_hidden) {
                            Some(i) => fresh[&(entry.hidden_base + i)],
                            None => self.rings[layer][&(entry.seq, number % layout.ring_capacity)],
                        }
                    }));
                    hash((layer, values[at as usize], keys))
                })
                .collect();
            for &row in &rows.enter {
                let row = &plan.rows[row as usize];
                let entry = &plan.entries[row.entry as usize];
                let Store::Hidden(at) = row.store else { continue };
                let number = row.hidden_to as usize - 1;
                if layout.ring_capacity > 0 && number + layout.ring_capacity >= entry.first_hidden + entry.n_hidden {
                    self.rings[layer].insert((entry.seq, number % layout.ring_capacity), fresh[&(at as usize)]);
                }
            }
            values = next;
        }
        assert_eq!(values.len(), plan.outputs.len());
        self.outputs.extend(plan.outputs.iter().zip(values).map(|(o, v)| (o.logits, v)));
    }

    /// Appends to several sequences, `(sequence, tokens, what is dropped first)` each, in passes of `max_rows` rows. `fails_after` so
    /// many passes all is undone.
    fn append(
        &mut self,
        entries: &[(usize, &[u32], Option<Middle>)],
        max_rows: usize,
        pruning: Pruning,
        fails_after: Option<usize>,
    ) -> Result<Vec<u64>, Error> {
        let mut spare = self.pool.check_room(entries.iter().map(|&(seq, tokens, m)| (seq, tokens.len(), m)))?;
        let max_rows = max_rows.max(self.rules.copies);
        let mut parts: Vec<(Reservation, Task, Ring)> = Vec::new();
        let mut anew = Vec::new();
        for &(seq, tokens, dropped) in entries {
            let ring = if dropped.is_some() { Ring::LOST } else { self.pool.ring(seq) };
            let (reservation, copy) = self.pool.reserve(seq, tokens, dropped, &mut spare).unwrap();
            if let Some(copy) = copy {
                let layout = self.pool.layout();
                let per = layout.block * layout.stored_copies;
                for cache in &mut self.cache {
                    for i in 0..copy.n_positions * layout.stored_copies {
                        let value = cache[&(copy.src as usize * per + i)];
                        cache.insert(copy.dst as usize * per + i, value);
                    }
                }
            }
            let start = self.pool.len(seq);
            let range = start..start + tokens.len();
            let task = Task::new(&self.rules, self.n_layers, seq, range, ring, Wanted::Last(seq), pruning);
            anew.extend(dropped.filter(|m| m.keep > 0).map(|m| Task::stored_only(seq, 0..m.keep)));
            parts.push((reservation, task, ring));
        }
        let mut plan = Plan::with_capacity(self.n_layers, max_rows, 3, 400, 4).unwrap();
        let mut n_passes = 0;
        let mut tasks: Vec<&mut Task> = anew.iter_mut().collect();
        for round in 0..2 {
            if round == 1 {
                tasks = parts.iter_mut().map(|(_, task, _)| task).collect();
            }
            while tasks.iter().any(|t| !t.is_done()) && fails_after != Some(n_passes) {
                plan.clear();
                for task in tasks.iter_mut().filter(|t| !t.is_done()) {
                    plan.add(&self.rules, task, &self.pool, max_rows, 4);
                }
                assert!(plan.rows.len() <= max_rows && !plan.rows.is_empty());
                self.run(&plan);
                n_passes += 1;
            }
        }
        if fails_after.is_some() {
            for (reservation, task, _) in parts.into_iter().rev() {
                self.pool.undo(reservation);
                self.pool.set_ring(task.seq, Ring::LOST);
            }
            return Err(Error::Cancelled);
        }
        let capacity = self.pool.layout().ring_capacity;
        for (reservation, task, ring) in parts {
            self.pool.commit(reservation);
            self.pool.set_ring(task.seq, task.ring_after(&self.rules, self.n_layers, capacity, ring));
        }
        Ok(entries.iter().map(|(seq, ..)| self.outputs[&(*seq as u32)]).collect())
    }

    fn copy_rings(&mut self, src: usize, dst: usize) {
        for ring in &mut self.rings {
            let copies: Vec<_> = ring.iter().filter(|((s, _), _)| *s == src).map(|((_, n), v)| (*n, *v)).collect();
            ring.retain(|(s, _), _| *s != dst);
            ring.extend(copies.into_iter().map(|(n, v)| ((dst, n), v)));
        }
    }
}

/// A small generator: the tests enumerate much and need no quality.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn rules(&mut self) -> Rules {
        let copies = [1, 2, 2, 3, 3, 4, 5, 7][self.below(8)];
        if self.below(6) == 0 {
            return Rules { copies, window: 0, chunk: 0, attention: Attention::Full };
        }
        let window = if self.below(3) == 0 { 0 } else { 1 + self.below(12) };
        let chunk = if window == 0 || self.below(2) == 0 { 0 } else { 1 + self.below(9) };
        Rules { copies, window, chunk, attention: Attention::Hidden }
    }
}

#[test]
fn sight_is_the_mask() {
    let mut random = Random(1);
    for _ in 0..300 {
        let rules = random.rules();
        let rows = places(&rules, 14);
        for &q in &rows {
            let sight = rules.sight(q);
            for &k in &rows {
                let is_stored = k.copy < rules.stored_copies();
                let seen = if is_stored {
                    k.position * rules.stored_copies() + k.copy < sight.stored
                } else {
                    q.copy >= rules.stored_copies()
                        && (sight.hidden_from..=rules.hidden_number(q)).contains(&rules.hidden_number(k))
                };
                assert_eq!(seen, may_attend(&rules, q, k), "{rules:?} {q:?} {k:?}");
            }
        }
    }
}

/// Which row of the cache a stored row of `seq` is.
fn row_of(pool: &Pool, seq: usize) -> impl Fn(usize) -> usize {
    move |stored| pool.cache_row(seq, stored) as usize
}

/// Random programs over a few sequences in a small pool: every result is the dense definition's, failed calls change nothing, the
/// pool's accounting adds up after each step, and what a prefix look-up finds is the longest there is.
#[test]
fn random_programs_agree_with_the_dense_mask() {
    let mut random = Random(7);
    let (mut n_full, mut n_dropped, mut n_reused, mut n_evicted) = (0, 0, 0, 0);
    for round in 0..2500 {
        let rules = random.rules();
        let n_layers = 1 + random.below(4);
        let pruning = if random.below(4) == 0 { Pruning::All } else { Pruning::Exact };
        let max_rows = 1 + random.below(40);
        let (n, n_sequences) = (40, 3);
        let block = [1, 2, 3, 4, 8][random.below(5)];
        let mut layout = Layout::new(&rules, n * (1 + random.below(3)), n_sequences, random.below(4)).unwrap();
        layout.block = block;
        layout.n_blocks = layout.n_positions.div_ceil(block);
        layout.drop_unit = (1..).map(|i| i * block).find(|u| rules.chunk == 0 || u % rules.chunk == 0).unwrap();
        let mut machine = Machine::new(rules, n_layers, layout);
        (0..n_sequences).for_each(|seq| machine.pool.allow_drops(seq, true).unwrap());
        let mut texts: Vec<Text> = vec![Text::new(rules, n_layers); n_sequences];
        let mut retained: Vec<Vec<u32>> = Vec::new();
        let what = |text: &Text| format!("round {round}: {rules:?} {n_layers} layers, text of {}", text.tokens.len());
        for _ in 0..16 {
            let seq = random.below(n_sequences);
            match random.below(9) {
                0 => {
                    let m = random.below(texts[seq].tokens.len() + 1);
                    texts[seq].truncate(m);
                    machine.pool.truncate(seq, m).unwrap();
                }
                1 => {
                    let dst = random.below(n_sequences);
                    texts[dst] = texts[seq].clone();
                    machine.pool.fork(seq, dst);
                    machine.copy_rings(seq, dst);
                }
                2 => machine.pool.set_ring(seq, Ring::LOST),
                3 => {
                    let text = std::mem::replace(&mut texts[seq], Text::new(rules, n_layers));
                    if text.dropped == 0 && !text.tokens.is_empty() {
                        retained.push(text.tokens);
                    }
                    machine.pool.retain(seq);
                }
                4 => {
                    let mut tokens: Vec<u32> = (0..random.below(30)).map(|_| random.below(100) as u32).collect();
                    if random.below(4) > 0 {
                        let all: Vec<&Vec<u32>> = retained.iter().chain(texts.iter().map(|t| &t.tokens)).collect();
                        let from = all[random.below(all.len())];
                        tokens.splice(0..0, from[..random.below(from.len() + 1)].iter().copied());
                    }
                    let common = |text: &[u32]| text.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
                    let live = texts.iter().filter(|t| t.dropped == 0).map(|t| common(&t.tokens)).max().unwrap_or(0);
                    let kept = retained.iter().map(|t| common(t)).max().unwrap_or(0);
                    let expected = machine.pool.match_prefix(&tokens, None).map_or(0, |(_, n)| n);
                    let found = machine.pool.take_prefix(seq, &tokens);
                    let n = found.map_or(0, |(_, n)| n);
                    assert!(n == expected && n >= live && n <= live.max(kept), "{n} of {live} and {kept}");
                    if machine.pool.n_evicted() == 0 && retained.len() <= RETAINED {
                        assert_eq!(n, live.max(kept));
                    }
                    if let Some((Source::Live(src), _)) = found {
                        machine.copy_rings(src, seq);
                    }
                    n_reused += usize::from(matches!(found, Some((Source::Retained(_), _))));
                    texts[seq] = Text::new(rules, n_layers);
                    if n > 0 {
                        texts[seq].append(&tokens[..n]);
                    }
                }
                _ => {
                    // One to three sequences; perhaps one drops something first.
                    let pieces: Vec<Vec<u32>> =
                        (0..3).map(|_| (0..1 + random.below(12)).map(|_| random.below(100) as u32).collect()).collect();
                    let mut entries: Vec<(usize, &[u32], Option<Middle>)> = Vec::new();
                    for (i, piece) in pieces.iter().enumerate().take(1 + random.below(3)) {
                        let seq = (seq + i) % n_sequences;
                        let keep = layout.whole_blocks(random.below(9));
                        let most = texts[seq].tokens.len().saturating_sub(keep) / layout.drop_unit;
                        let dropped = (most > 0 && random.below(3) == 0)
                            .then(|| Middle { keep, n: layout.drop_unit * (1 + random.below(most)) });
                        entries.push((seq, piece, dropped));
                    }
                    let fails_after = (random.below(5) == 0).then(|| random.below(3));
                    let before = machine.pool.usage();
                    match machine.append(&entries, max_rows, pruning, fails_after) {
                        Ok(found) => {
                            for (&(seq, piece, dropped), found) in entries.iter().zip(found) {
                                if let Some(middle) = dropped {
                                    texts[seq].drop_middle(middle);
                                    n_dropped += 1;
                                }
                                let expected = texts[seq].append(piece);
                                assert_eq!(found, expected, "{}", what(&texts[seq]));
                            }
                        }
                        Err(error) => {
                            n_full += usize::from(matches!(error, Error::CacheFull { .. }));
                            let after = machine.pool.usage();
                            assert_eq!((after.used, after.shared), (before.used, before.shared), "{error}");
                            if let Error::CacheFull { needed, free } = error {
                                assert!(after == before && free < needed);
                            }
                        }
                    }
                }
            }
            machine.pool.audit().unwrap_or_else(|e| panic!("{}: {e}", what(&texts[seq])));
            for seq in 0..n_sequences {
                let runs: Vec<_> = machine.pool.row_runs(seq).collect();
                let n_rows = machine.pool.len(seq) * rules.stored_copies();
                assert!(
                    runs.iter()
                        .flat_map(|&(first, n)| first..first + n)
                        .eq((0..n_rows).map(row_of(&machine.pool, seq)))
                );
                assert!(runs.windows(2).all(|two| two[0].0 + two[0].1 != two[1].0), "runs are as long as they can be");
            }
            for (seq, text) in texts.iter().enumerate() {
                assert!(machine.pool.text(seq).eq(text.tokens.iter().copied()), "{}", what(text));
            }
        }
        n_evicted += machine.pool.n_evicted();
        for seq in 0..n_sequences {
            machine.pool.truncate(seq, 0).unwrap();
        }
        let usage = machine.pool.usage();
        assert_eq!((usage.used, usage.free + usage.retained), (0, layout.n_blocks * block), "blocks leaked");
    }
    // The programs reach what they are for.
    assert!(
        n_full > 500 && n_dropped > 1000 && n_reused > 100 && n_evicted > 1000,
        "{n_full} {n_dropped} {n_reused} {n_evicted}"
    );
}

/// The table of the specification: which rows a prefill of n computes.
#[test]
fn prefill_computes_the_rows_of_the_table() {
    let (n, n_layers) = (100, 4);
    let tokens: Vec<u32> = (0..n as u32).collect();
    let count = |rules: Rules| {
        let mut machine = Machine::new(rules, n_layers, Layout::new(&rules, n, 1, 0).unwrap());
        machine.append(&[(0, &tokens, None)], 64, Pruning::Exact, None).unwrap();
        machine.rows_computed
    };
    let rules = |copies, window, chunk| Rules { copies, window, chunk, attention: Attention::Hidden };
    assert_eq!(count(rules(1, 0, 0)), n_layers * n);
    // PHD: hidden rows of the last position only.
    assert_eq!(count(rules(3, 0, 0)), n_layers * (n + 2));
    // PHD-CSWA: hidden rows of the last chunk only; 100 = 3 * 32 + 4.
    assert_eq!(count(rules(3, 16, 32)), n_layers * (n + 2 * 4));
    // PHD-SWA: w (L - l) + 1 positions enter layer l, w = ceil(W / (K - 1)).
    let swa: usize = (0..n_layers).map(|l| n + 2 * (3 * (n_layers - l) + 1)).sum();
    assert_eq!(count(rules(3, 5, 0)), swa);
    // Sequential: every copy.
    assert_eq!(count(Rules { copies: 4, window: 0, chunk: 0, attention: Attention::Full }), n_layers * n * 4);
    // 256 copies: the window reaches one position back, so the upper layers need fewer than the chunk's four.
    assert_eq!(count(rules(256, 16, 32)), n_layers * n + 255 * (4 + 4 + 3 + 2));
}
