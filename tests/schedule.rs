//! The schedule, carried out with hashes instead of numbers: a row's value is a hash of everything that it depends on, so
//! pruned, split, rolled-back and forked computations must agree with the dense definition to the bit.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use phd::cache::{Layout, Pool};
use phd::schedule::{Attention, Place, Plan, Pruning, Ring, Rules, Store, Task, Wanted};

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

/// Output of each position's last copy after `n_layers`, by the dense mask.
fn dense(rules: &Rules, n_layers: usize, tokens: &[u32]) -> Vec<u64> {
    let rows = places(rules, tokens.len());
    let mut values: Vec<u64> = rows.iter().map(|p| hash((tokens[p.position], p.copy))).collect();
    for layer in 0..n_layers {
        let next = |q: usize| {
            let mut keys: Vec<u64> = Vec::new();
            // Stored keys first, then hidden ones, each in row order: the order in which backends read them.
            for stored in [true, false] {
                for k in 0..rows.len() {
                    let is_stored = rules.attention == Attention::Full || rows[k].copy == 0;
                    if is_stored == stored && may_attend(rules, rows[q], rows[k]) {
                        keys.push(values[k]);
                    }
                }
            }
            hash((layer, values[q], keys))
        };
        values = (0..rows.len()).map(next).collect();
    }
    values.into_iter().skip(rules.copies - 1).step_by(rules.copies).collect()
}

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
    fn new(rules: Rules, n_layers: usize, n_positions: usize, n_sequences: usize) -> Machine {
        let layout = Layout::new(&rules, n_positions, n_sequences).unwrap();
        let maps = || vec![HashMap::new(); n_layers];
        Machine {
            rules,
            n_layers,
            pool: Pool::new(layout),
            cache: maps(),
            rings: vec![HashMap::new(); n_layers],
            outputs: HashMap::new(),
            rows_computed: 0,
        }
    }

    fn run(&mut self, plan: &Plan) {
        let layout = *self.pool.layout();
        let per_block = layout.block * layout.stored_copies;
        let mut values: Vec<u64> = plan.rows.iter().zip(&plan.places).map(|(r, p)| hash((r.token, p.copy))).collect();
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

    fn append(&mut self, seq: usize, tokens: &[u32], max_rows: usize, pruning: Pruning) -> u64 {
        let (start, ring) = (self.pool.len(seq), self.pool.ring(seq));
        let (reservation, copy) = self.pool.reserve(seq, tokens).unwrap();
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
        let range = start..start + tokens.len();
        let mut task = Task::new(&self.rules, self.n_layers, seq, range, ring, Wanted::Last(seq), pruning);
        let mut plan = Plan::with_capacity(self.n_layers, max_rows, 1, 64, 4);
        while !task.is_done() {
            plan.clear();
            plan.add(&self.rules, &mut task, &self.pool, max_rows.max(self.rules.copies), 4);
            assert!(plan.rows.len() <= max_rows.max(self.rules.copies) && !plan.rows.is_empty());
            self.run(&plan);
        }
        self.pool.commit(reservation);
        let after = task.ring_after(&self.rules, self.n_layers, ring);
        self.pool.set_ring(seq, after);
        self.outputs[&(seq as u32)]
    }

    fn fork(&mut self, src: usize, dst: usize) {
        self.pool.fork(src, dst);
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

#[test]
fn random_programs_agree_with_the_dense_mask() {
    let mut random = Random(7);
    for round in 0..1500 {
        let rules = random.rules();
        let n_layers = 1 + random.below(4);
        let pruning = if random.below(4) == 0 { Pruning::All } else { Pruning::Exact };
        let max_rows = 1 + random.below(40);
        let (n, n_sequences) = (48, 3);
        let mut machine = Machine::new(rules, n_layers, n * n_sequences, n_sequences);
        let mut texts: Vec<Vec<u32>> = vec![Vec::new(); n_sequences];
        for _ in 0..12 {
            let seq = random.below(n_sequences);
            match random.below(5) {
                0 => {
                    let m = random.below(texts[seq].len() + 1);
                    texts[seq].truncate(m);
                    machine.pool.truncate(seq, m).unwrap();
                }
                1 => {
                    let dst = random.below(n_sequences);
                    texts[dst] = texts[seq].clone();
                    machine.fork(seq, dst);
                }
                2 => machine.pool.set_ring(seq, Ring::LOST),
                _ => {
                    let room = n - texts[seq].len();
                    if room == 0 {
                        continue;
                    }
                    let piece: Vec<u32> =
                        (0..1 + random.below(room.min(20))).map(|_| random.below(100) as u32).collect();
                    texts[seq].extend(&piece);
                    let found = machine.append(seq, &piece, max_rows, pruning);
                    let expected = *dense(&rules, n_layers, &texts[seq]).last().unwrap();
                    assert_eq!(
                        found,
                        expected,
                        "round {round}: {rules:?} {n_layers} layers, text of {}",
                        texts[seq].len()
                    );
                }
            }
        }
        for seq in 0..n_sequences {
            machine.pool.truncate(seq, 0).unwrap();
        }
        assert_eq!(machine.pool.usage().used, 0, "blocks leaked");
    }
}

/// The table of the specification: which rows a prefill of n computes.
#[test]
fn prefill_computes_the_rows_of_the_table() {
    let (n, n_layers) = (100, 4);
    let tokens: Vec<u32> = (0..n as u32).collect();
    let count = |rules: Rules| {
        let mut machine = Machine::new(rules, n_layers, n, 1);
        machine.append(0, &tokens, 64, Pruning::Exact);
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
