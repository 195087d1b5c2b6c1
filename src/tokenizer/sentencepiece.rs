//! SentencePiece vocabularies of GGUF files (`tokenizer.ggml.model` = "llama"): pairs of neighbouring symbols are merged
//! in the order of the score of what they make, leftmost first.

use std::collections::{BinaryHeap, HashMap};

/// GGUF token types (`tokenizer.ggml.token_type`).
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;

/// The byte that a token spelled `<0xNN>` stands for.
pub(super) fn byte_piece(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

pub(super) struct SentencePiece {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    byte_ids: [Option<u32>; 256],
    unknown: Option<u32>,
    /// Tokens found in the text before anything else, longest first: (text, id, only when special tokens are parsed).
    found_first: Vec<(String, u32, bool)>,
    add_space_prefix: bool,
}

/// A run of text that is one symbol so far, in a doubly linked list by index.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    previous: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

/// A merge that could be made. The order of the heap: highest score, then leftmost.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of the merged symbol when the merge was found; another length means it is out of date.
    len: usize,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Merge {}

impl SentencePiece {
    /// `tokens`, `scores` and `types` have the same length.
    pub(super) fn new(
        tokens: &[String],
        scores: Vec<f32>,
        types: &[i32],
        unknown: Option<u32>,
        add_space_prefix: bool,
    ) -> Self {
        let mut byte_ids = [None; 256];
        let mut found_first = Vec::new();
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, (text, &kind)) in tokens.iter().zip(types).enumerate() {
            let id = id as u32;
            if let Some(byte) = byte_piece(text) {
                byte_ids[byte as usize] = Some(id);
            }
            if matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) && !text.is_empty() {
                found_first.push((text.clone(), id, kind != USER_DEFINED));
            }
            ids.insert(text.clone(), id);
        }
        found_first.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.1.cmp(&b.1)));
        SentencePiece { ids, scores, byte_ids, unknown, found_first, add_space_prefix }
    }

    pub(super) fn encode(&self, text: &str, parse_special: bool, out: &mut Vec<u32>) {
        // Fragments of plain text and tokens found in them, in order.
        let mut fragments: Vec<Result<&str, u32>> = vec![Ok(text)];
        for (token, id, _) in self.found_first.iter().filter(|f| parse_special || !f.2) {
            if !text.contains(token.as_str()) {
                continue;
            }
            let mut split = Vec::with_capacity(fragments.len());
            for fragment in fragments {
                let Ok(plain) = fragment else {
                    split.push(fragment);
                    continue;
                };
                for (i, piece) in plain.split(token.as_str()).enumerate() {
                    if i > 0 {
                        split.push(Err(*id));
                    }
                    if !piece.is_empty() {
                        split.push(Ok(piece));
                    }
                }
            }
            fragments = split;
        }
        let mut after_special = true;
        for fragment in fragments {
            match fragment {
                Err(id) => {
                    out.push(id);
                    after_special = true;
                }
                Ok(plain) if !plain.is_empty() => {
                    let prefix = if self.add_space_prefix && after_special { " " } else { "" };
                    self.encode_plain(&format!("{prefix}{plain}").replace(' ', "\u{2581}"), out);
                    after_special = false;
                }
                Ok(_) => {}
            }
        }
    }

    fn encode_plain(&self, text: &str, out: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { start, len: c.len_utf8(), previous: i.wrapping_sub(1), next: i + 1 })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut heap = BinaryHeap::new();
        let consider = |symbols: &[Symbol], left: usize, right: usize, heap: &mut BinaryHeap<Merge>| {
            if left == NONE || right == NONE {
                return;
            }
            let len = symbols[left].len + symbols[right].len;
            let start = symbols[left].start;
            if let Some(&id) = self.ids.get(&text[start..start + len]) {
                heap.push(Merge { score: self.scores[id as usize], left, right, len });
            }
        };
        for right in 1..symbols.len() {
            consider(&symbols, right - 1, right, &mut heap);
        }
        while let Some(merge) = heap.pop() {
            let (left, right) = (symbols[merge.left], symbols[merge.right]);
            // A symbol that was merged into its left neighbour has length 0.
            if left.len == 0 || right.len == 0 || left.len + right.len != merge.len {
                continue;
            }

            symbols[merge.left].len = merge.len;
            symbols[merge.left].next = right.next;
            symbols[merge.right].len = 0;
            if right.next != NONE {
                symbols[right.next].previous = merge.left;
            }
            consider(&symbols, left.previous, merge.left, &mut heap);
            consider(&symbols, merge.left, right.next, &mut heap);
        }
        let mut at = if symbols.is_empty() { NONE } else { 0 };
        while at != NONE {
            let Symbol { start, len, next, .. } = symbols[at];
            let piece = &text[start..start + len];
            match self.ids.get(piece) {
                Some(&id) => out.push(id),
                None => out.extend(piece.bytes().filter_map(|b| self.byte_ids[b as usize].or(self.unknown))),
            }
            at = next;
        }
    }
}
