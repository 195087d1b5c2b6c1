//! Which parts of a grammar become lexemes.
//!
//! llguidance cuts a text into lexemes from left to right: of all lexemes that may come next, those that match the longest piece are
//! taken, all that match it. A grammar of characters knows no such rule: `[a-z]+ "b"` matches "ab", which a lexeme `[a-z]+` would have
//! swallowed whole. The two mean the same if a lexeme can never be longer than it should. That is so if for lexemes A and B that may
//! come at the same place, and each text w of A, no text of B begins with w and the first byte of what may follow A there. Where it
//! is not so, B is broken into its parts. A lexeme of one character can always stay, so this ends, and at worst the grammar is read
//! character by character.
//!
//! The analysis takes more texts for possible than are, never fewer: counts of repetitions are taken for unbounded, and what follows
//! an expression at one place for what follows it anywhere.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::grammar::{Grammar, Node, NodeId, Set};
use crate::error::{Result, unsupported};
use crate::sampling::constraint::TokenEnvironment;

/// Steps of the analysis, some tenths of a second of work; beyond them the grammar is read character by character.
const BUDGET: usize = 5_000_000;

pub struct Lexemes {
    /// (node)
    is_lexeme: Vec<bool>,
    pub nullable: Vec<bool>,
    pub has_text: Vec<bool>,
    /// Whether any has been broken.
    pub are_broken: bool,
}

impl Lexemes {
    /// Also joins neighbours that can be one lexeme.
    ///
    /// # Errors
    /// `Unsupported` if tokens and text cannot be told apart.
    pub fn find(grammar: &mut Grammar, environment: &TokenEnvironment) -> Result<Lexemes> {
        let regular = grammar.regular();
        join_neighbours(grammar, &regular)?;
        // Those that have been joined are regular, too.
        let (nullable, has_text, regular) = (grammar.nullable(), grammar.has_text(), grammar.regular());
        let is_lexeme = (0..grammar.len()).map(|id| match grammar.node(id) {
            Node::Token(_) => true,
            Node::Rule(_) => false, // its body is
            _ => regular[id] && has_text[id],
        });
        let mut lexemes = Lexemes { is_lexeme: is_lexeme.collect(), nullable, has_text, are_broken: false };
        let mut budget = BUDGET;
        let mut shapes = HashMap::new();
        loop {
            match lexemes.conflicts(grammar, environment, &mut shapes, &mut budget)? {
                Some(conflicts) if conflicts.is_empty() => return Ok(lexemes),
                Some(conflicts) => {
                    lexemes.are_broken = true;
                    conflicts.into_iter().for_each(|id| lexemes.is_lexeme[id] = false);
                }
                None => {
                    lexemes.are_broken = true;
                    let is_small = |id: NodeId| matches!(grammar.node(id), Node::Class(_));
                    if (0..grammar.len()).any(|id| matches!(grammar.node(id), Node::Token(_))) {
                        return Err(unsupported!("the grammar is too large to tell its tokens from its text"));
                    }
                    lexemes.is_lexeme.iter_mut().enumerate().for_each(|(id, is)| *is &= is_small(id));
                    return Ok(lexemes);
                }
            }
        }
    }

    pub fn contains(&self, id: NodeId) -> bool {
        self.is_lexeme[id]
    }

    /// Lexemes that can be longer than they should; `None` if the budget is used up.
    fn conflicts(
        &self,
        grammar: &Grammar,
        environment: &TokenEnvironment,
        shapes: &mut HashMap<NodeId, Shape>,
        budget: &mut usize,
    ) -> Result<Option<HashSet<NodeId>>> {
        let root = grammar.rules[grammar.root].body;
        let Some(order) = Order::of(grammar, root, &self.nullable, |id| self.is_lexeme[id], budget) else {
            return Ok(None);
        };
        for &id in &order.leaves {
            if let Entry::Vacant(vacant) = shapes.entry(id) {
                let Some(shape) = Shape::of(grammar, id, &self.nullable, environment, budget) else { return Ok(None) };
                vacant.insert(shape);
            }
        }
        let lexemes: Vec<&Shape> = order.leaves.iter().map(|id| &shapes[id]).collect();
        let follow: Vec<Follow> = order.next.iter().map(|next| Follow::of(next.iter().map(|&i| lexemes[i]))).collect();
        // Pairs that may come at the same place; those that match the same text lead to more such pairs.
        let (mut seen, mut to_do, mut conflicts) = (HashSet::new(), Vec::new(), HashSet::new());
        let mut push = |a: &[usize], b: &[usize], to_do: &mut Vec<(usize, usize)>, budget: &mut usize| {
            *budget = budget.checked_sub(a.len() * b.len())?;
            let pairs = a.iter().flat_map(|&a| b.iter().map(move |&b| (a.min(b), a.max(b))));
            to_do.extend(pairs.filter(|&pair| seen.insert(pair)));
            Some(())
        };
        if push(&order.first, &order.first, &mut to_do, budget).is_none() {
            return Ok(None);
        }
        while let Some((a, b)) = to_do.pop() {
            let meeting = match (lexemes[a], lexemes[b]) {
                (Shape::Token { .. }, Shape::Token { .. }) if a == b => {
                    Some(Meeting { is_common: true, ..Meeting::default() })
                }
                (Shape::Token { ranges: x, .. }, Shape::Token { ranges: y, .. }) => {
                    if x.iter().any(|x| y.iter().any(|y| x.0 <= y.1 && y.0 <= x.1)) {
                        return Err(unsupported!("the grammar allows the same token in two ways at one place"));
                    }
                    Some(Meeting::default())
                }
                (Shape::Token { is_control, .. }, Shape::Text { .. })
                | (Shape::Text { .. }, Shape::Token { is_control, .. }) => {
                    if !is_control {
                        return Err(ambiguous_token());
                    }
                    Some(Meeting::default())
                }
                // Nothing follows: they can be as long as they like.
                (Shape::Text(_), Shape::Text(_)) if order.next[a].is_empty() && order.next[b].is_empty() => {
                    Some(Meeting::default())
                }
                (Shape::Text(x), Shape::Text(y)) => Meeting::of((x, &follow[a]), (y, &follow[b]), budget),
            };
            let Some(meeting) = meeting else { return Ok(None) };
            if meeting.has_ambiguous_token {
                return Err(ambiguous_token());
            }
            conflicts.extend(meeting.a_is_too_long.then_some(order.leaves[a]));
            conflicts.extend(meeting.b_is_too_long.then_some(order.leaves[b]));
            if meeting.is_common && push(&order.next[a], &order.next[b], &mut to_do, budget).is_none() {
                return Ok(None);
            }
        }
        Ok(Some(conflicts))
    }
}

fn ambiguous_token() -> crate::Error {
    unsupported!("the grammar allows a token that is no control token where it allows text, too")
}

/// Neighbours in a sequence that are regular, while the whole is not, become a sequence of their own; so do alternatives.
fn join_neighbours(grammar: &mut Grammar, regular: &[bool]) -> Result<()> {
    for id in (0..regular.len()).filter(|&id| !regular[id]) {
        match grammar.node(id) {
            Node::Seq(children) => {
                let runs: Vec<Vec<NodeId>> =
                    children.chunk_by(|&a, &b| regular[a] && regular[b]).map(<[NodeId]>::to_vec).collect();
                if runs.len() < children.len() {
                    let joined = runs.into_iter().map(|run| grammar.add(Node::Seq(run))).collect::<Result<_>>()?;
                    grammar.replace(id, Node::Seq(joined));
                }
            }
            Node::Alt(children) => {
                let (simple, mut others): (Vec<NodeId>, Vec<NodeId>) = children.iter().partition(|&&c| regular[c]);
                if simple.len() > 1 {
                    others.push(grammar.add(Node::Alt(simple))?);
                    grammar.replace(id, Node::Alt(others));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The order in which the leaves of an expression can come.
struct Order {
    leaves: Vec<NodeId>,
    /// The following are places in `leaves`.
    first: Vec<usize>,
    /// (leaf)
    next: Vec<Vec<usize>>,
    /// (leaf): whether the expression can end after it.
    is_last: Vec<bool>,
}

impl Order {
    /// `None` if the budget is used up.
    fn of(
        grammar: &Grammar,
        root: NodeId,
        nullable: &[bool],
        is_leaf: impl Fn(NodeId) -> bool,
        budget: &mut usize,
    ) -> Option<Order> {
        // Each expression has a place before it and one after it, joined by edges that pass no leaf.
        let mut place = HashMap::from([(root, 0)]);
        let (mut found, mut edges, mut leaf_at) = (vec![root], vec![Vec::new(); 2], vec![None]);
        let mut leaves = Vec::new();
        let mut at = 0;
        while at < found.len() {
            *budget = budget.checked_sub(1)?;
            let id = found[at];
            let (before, after) = (2 * at, 2 * at + 1);
            at += 1;
            if nullable[id] {
                edges[before].push(after);
            }
            if is_leaf(id) {
                leaf_at[before / 2] = Some(leaves.len());
                leaves.push(id);
                continue;
            }
            let mut child = |id: NodeId, edges: &mut Vec<Vec<usize>>| {
                let i = *place.entry(id).or_insert_with(|| {
                    found.push(id);
                    leaf_at.push(None);
                    edges.resize(edges.len() + 2, Vec::new());
                    found.len() - 1
                });
                (2 * i, 2 * i + 1)
            };
            match grammar.node(id) {
                Node::Empty | Node::Class(_) | Node::Token(_) => {}
                Node::Seq(children) => {
                    let mut here = before;
                    for &c in children {
                        let (b, a) = child(c, &mut edges);
                        edges[here].push(b);
                        here = a;
                    }
                    edges[here].push(after);
                }
                Node::Alt(children) => {
                    for &c in children {
                        let (b, a) = child(c, &mut edges);
                        edges[before].push(b);
                        edges[a].push(after);
                    }
                }
                &Node::Repeat(c, _, most) => {
                    let (b, a) = child(c, &mut edges);
                    edges[before].push(b);
                    edges[a].push(after);
                    if most != Some(1) {
                        edges[a].push(b);
                    }
                }
                Node::Rule(rule) => {
                    let (b, a) = child(grammar.rules[*rule].body, &mut edges);
                    edges[before].push(b);
                    edges[a].push(after);
                }
            }
        }
        let leaf_place: Vec<usize> = (0..found.len()).filter(|&i| leaf_at[i].is_some()).collect();
        // What can be reached without passing a leaf.
        let mut visited = vec![usize::MAX; edges.len()];
        let mut reach = |from: usize, mark: usize| -> Option<(Vec<usize>, bool)> {
            let (mut reached, mut to_do, mut is_last) = (Vec::new(), vec![from], false);
            while let Some(place) = to_do.pop() {
                if std::mem::replace(&mut visited[place], mark) == mark {
                    continue;
                }
                *budget = budget.checked_sub(1 + edges[place].len())?;
                is_last |= place == 1;
                if place % 2 == 0 {
                    reached.extend(leaf_at[place / 2]);
                }
                to_do.extend(&edges[place]);
            }
            Some((reached, is_last))
        };
        let (first, _) = reach(0, leaves.len())?;
        let (mut next, mut is_last) = (Vec::with_capacity(leaves.len()), Vec::with_capacity(leaves.len()));
        for (leaf, place) in leaf_place.into_iter().enumerate() {
            let (reached, ends) = reach(2 * place + 1, leaf)?;
            next.push(reached);
            is_last.push(ends);
        }
        Some(Order { leaves, first, next, is_last })
    }
}

/// A set of bytes.
#[derive(Clone, Copy, Default)]
struct Bytes([u64; 4]);

impl Bytes {
    /// The bytes that the characters' UTF-8 begins with.
    fn first_of(ranges: &[(u32, u32)]) -> Bytes {
        let first = |c: u32| char::from_u32(c).expect("sets hold characters").encode_utf8(&mut [0; 4]).as_bytes()[0];
        let mut bytes = Bytes::default();
        for &(low, high) in ranges {
            // The first byte grows with the character.
            (first(low)..=first(high)).for_each(|b| bytes.0[usize::from(b) / 64] |= 1 << (b % 64));
        }
        bytes
    }

    fn union(self, other: Bytes) -> Bytes {
        Bytes(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    fn intersects(self, other: Bytes) -> bool {
        (0..4).any(|i| self.0[i] & other.0[i] != 0)
    }
}

/// What a lexeme looks like.
enum Shape {
    Text(Text),
    Token { ranges: Vec<(u32, u32)>, is_control: bool },
}

/// An automaton whose states are the last character's class.
struct Text {
    order: Order,
    /// (class)
    sets: Vec<Set>,
    bytes: Vec<Bytes>,
    first: Bytes,
}

impl Shape {
    fn of(
        grammar: &Grammar,
        id: NodeId,
        nullable: &[bool],
        environment: &TokenEnvironment,
        budget: &mut usize,
    ) -> Option<Shape> {
        if let Node::Token(ranges) = grammar.node(id) {
            let is_control = ranges.iter().all(|&(low, high)| (low..=high).all(|id| environment.is_control(id)));
            return Some(Shape::Token { ranges: ranges.clone(), is_control });
        }
        let is_leaf = |id: NodeId| matches!(grammar.node(id), Node::Class(_));
        let order = Order::of(grammar, id, nullable, is_leaf, budget)?;
        let set_of = |&leaf: &NodeId| match grammar.node(leaf) {
            Node::Class(set) => set.clone(),
            _ => unreachable!("leaves are classes"),
        };
        let sets: Vec<Set> = order.leaves.iter().map(set_of).collect();
        let bytes: Vec<Bytes> = sets.iter().map(|set| Bytes::first_of(set.ranges())).collect();
        let first = order.first.iter().fold(Bytes::default(), |all, &i| all.union(bytes[i]));
        Some(Shape::Text(Text { order, sets, bytes, first }))
    }
}

/// What may come after a lexeme.
#[derive(Default)]
struct Follow {
    bytes: Bytes,
    /// A token that can be text, too.
    has_text_token: bool,
}

impl Follow {
    fn of<'a>(shapes: impl Iterator<Item = &'a Shape>) -> Follow {
        shapes.fold(Follow::default(), |follow, shape| match shape {
            Shape::Text(text) => Follow { bytes: follow.bytes.union(text.first), ..follow },
            Shape::Token { is_control, .. } => {
                Follow { has_text_token: follow.has_text_token || !is_control, ..follow }
            }
        })
    }
}

/// Two lexemes on the same text.
#[derive(Default)]
struct Meeting {
    /// Some text is a text of both.
    is_common: bool,
    a_is_too_long: bool,
    b_is_too_long: bool,
    has_ambiguous_token: bool,
}

impl Meeting {
    /// `None` if the budget is used up.
    fn of((a, a_follow): (&Text, &Follow), (b, b_follow): (&Text, &Follow), budget: &mut usize) -> Option<Meeting> {
        let mut meeting = Meeting::default();
        if !a.first.intersects(b.first) {
            return Some(meeting);
        }
        // Whether `other`, which may be longer than the text so far, goes on as what follows this one does.
        let goes_on = |other: &Text, state: usize, follow: &Follow| {
            let next = &other.order.next[state];
            let mut bytes = next.iter().map(|&i| other.bytes[i]);
            (bytes.any(|b| b.intersects(follow.bytes)), follow.has_text_token && !next.is_empty())
        };
        let (mut seen, mut to_do) = (HashSet::new(), Vec::new());
        let mut push = |x: &[usize], y: &[usize], to_do: &mut Vec<(usize, usize)>, budget: &mut usize| {
            *budget = budget.checked_sub(x.len() * y.len())?;
            for &x in x {
                for &y in y {
                    if a.sets[x].intersects(&b.sets[y]) && seen.insert((x, y)) {
                        to_do.push((x, y));
                    }
                }
            }
            Some(())
        };
        push(&a.order.first, &b.order.first, &mut to_do, budget)?;
        while let Some((x, y)) = to_do.pop() {
            let (a_ends, b_ends) = (a.order.is_last[x], b.order.is_last[y]);
            meeting.is_common |= a_ends && b_ends;
            if a_ends {
                let (is_too_long, is_token) = goes_on(b, y, a_follow);
                meeting.b_is_too_long |= is_too_long;
                meeting.has_ambiguous_token |= is_token;
            }
            if b_ends {
                let (is_too_long, is_token) = goes_on(a, x, b_follow);
                meeting.a_is_too_long |= is_too_long;
                meeting.has_ambiguous_token |= is_token;
            }
            push(&a.order.next[x], &b.order.next[y], &mut to_do, budget)?;
        }
        Some(meeting)
    }
}
