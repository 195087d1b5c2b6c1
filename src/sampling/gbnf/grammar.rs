//! A grammar as a graph of expressions.

use crate::error::{Result, invalid};

pub type NodeId = usize;

/// Characters: sorted ranges of code points, both ends included, that do not touch; never empty, no surrogates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set(Vec<(u32, u32)>);

impl Set {
    /// What is in `ranges`, or with `negated` what is not; `None` for no character at all.
    pub fn new(mut ranges: Vec<(u32, u32)>, negated: bool) -> Option<Set> {
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::new();
        for (low, high) in ranges {
            match merged.last_mut() {
                Some(last) if low <= last.1.saturating_add(1) => last.1 = last.1.max(high),
                _ => merged.push((low, high)),
            }
        }
        if negated {
            let mut next = 0;
            let mut others = Vec::with_capacity(merged.len() + 1);
            for (low, high) in merged {
                if low > next {
                    others.push((next, low - 1));
                }
                next = high.saturating_add(1);
            }
            others.push((next, u32::MAX));
            merged = others;
        }
        let blocks = [(0, 0xd7ff), (0xe000, 0x10ffff)];
        let within = |&(low, high): &(u32, u32)| blocks.map(|(least, most)| (low.max(least), high.min(most)));
        let set: Vec<(u32, u32)> = merged.iter().flat_map(within).filter(|(low, high)| low <= high).collect();
        (!set.is_empty()).then_some(Set(set))
    }

    pub fn ranges(&self) -> &[(u32, u32)] {
        &self.0
    }

    pub fn intersects(&self, other: &Set) -> bool {
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            if x.1 < y.0 {
                a.next();
            } else if y.1 < x.0 {
                b.next();
            } else {
                return true;
            }
        }
        false
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// The empty text.
    Empty,
    /// One character.
    Class(Set),
    /// One token of those from one id to another, whatever its text.
    Token(Vec<(u32, u32)>),
    Seq(Vec<NodeId>),
    Alt(Vec<NodeId>),
    /// At least, and at most if that is bounded; at most once at least.
    Repeat(NodeId, u32, Option<u32>),
    /// What the rule of this number says.
    Rule(usize),
}

#[derive(Debug)]
pub struct Rule {
    pub name: String,
    /// Where it is defined.
    pub line: usize,
    pub body: NodeId,
}

#[derive(Debug, Default)]
pub struct Grammar {
    nodes: Vec<Node>,
    /// (node): how deeply expressions nest in it; a rule's name counts once.
    depth: Vec<usize>,
    pub rules: Vec<Rule>,
    /// Of `rules`.
    pub root: usize,
}

/// How deeply expressions may nest: analyses recurse.
const MAX_NESTING: usize = 500;
/// The most expressions that a rule may become when its recursion is made a repetition.
const MAX_UNROLLED: usize = 4096;

impl Grammar {
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id]
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn depth(&self, id: NodeId) -> usize {
        self.depth[id]
    }

    pub fn children(&self, id: NodeId) -> &[NodeId] {
        match &self.nodes[id] {
            Node::Empty | Node::Class(_) | Node::Token(_) => &[],
            Node::Seq(children) | Node::Alt(children) => children,
            Node::Repeat(child, ..) => std::slice::from_ref(child),
            Node::Rule(rule) => std::slice::from_ref(&self.rules[*rule].body),
        }
    }

    /// Adds an expression, in its simplest form.
    ///
    /// # Errors
    /// `InvalidArgument` if it nests too deeply.
    pub fn add(&mut self, node: Node) -> Result<NodeId> {
        let node = match node {
            Node::Seq(children) => {
                let children: Vec<NodeId> =
                    children.into_iter().filter(|&child| self.nodes[child] != Node::Empty).collect();
                match children[..] {
                    [] => Node::Empty,
                    [only] => return Ok(only),
                    _ => Node::Seq(children),
                }
            }
            Node::Alt(children) if children.len() == 1 => return Ok(children[0]),
            Node::Repeat(_, _, Some(0)) => Node::Empty,
            Node::Repeat(child, ..) if self.nodes[child] == Node::Empty => Node::Empty,
            Node::Repeat(child, 1, Some(1)) => return Ok(child),
            other => other,
        };
        let depth = match &node {
            Node::Seq(children) | Node::Alt(children) => {
                1 + children.iter().map(|&child| self.depth[child]).max().unwrap_or(0)
            }
            Node::Repeat(child, ..) => 1 + self.depth[*child],
            Node::Empty | Node::Class(_) | Node::Token(_) | Node::Rule(_) => 1,
        };
        if depth > MAX_NESTING {
            return Err(invalid!("the grammar: expressions nest deeper than {MAX_NESTING}"));
        }
        self.nodes.push(node);
        self.depth.push(depth);
        Ok(self.nodes.len() - 1)
    }

    /// Puts another expression of no greater depth in the place of one.
    pub fn replace(&mut self, id: NodeId, node: Node) {
        self.nodes[id] = node;
    }

    /// The least set of expressions that has each one of whose children as many are in it as `needs` says; `None` is never.
    pub fn closure(&self, needs: impl Fn(&Node) -> Option<usize>) -> Vec<bool> {
        let mut parents = vec![Vec::new(); self.nodes.len()];
        for id in 0..self.nodes.len() {
            self.children(id).iter().for_each(|&child| parents[child].push(id));
        }
        let mut missing: Vec<usize> = self.nodes.iter().map(|node| needs(node).unwrap_or(usize::MAX)).collect();
        let mut ready: Vec<NodeId> = (0..self.nodes.len()).filter(|&id| missing[id] == 0).collect();
        let mut is_in = vec![false; self.nodes.len()];
        while let Some(id) = ready.pop() {
            is_in[id] = true;
            for &parent in &parents[id] {
                if missing[parent] > 0 && missing[parent] < usize::MAX {
                    missing[parent] -= 1;
                    if missing[parent] == 0 {
                        ready.push(parent);
                    }
                }
            }
        }
        is_in
    }

    /// The expressions that can be the empty text.
    pub fn nullable(&self) -> Vec<bool> {
        self.closure(|node| match node {
            Node::Empty | Node::Repeat(_, 0, _) => Some(0),
            Node::Class(_) | Node::Token(_) => None,
            Node::Seq(children) => Some(children.len()),
            Node::Alt(_) | Node::Repeat(..) | Node::Rule(_) => Some(1),
        })
    }

    /// The expressions that can be another text than the empty one.
    pub fn has_text(&self) -> Vec<bool> {
        self.closure(|node| match node {
            Node::Empty => None,
            Node::Class(_) | Node::Token(_) => Some(0),
            Node::Seq(_) | Node::Alt(_) | Node::Repeat(..) | Node::Rule(_) => Some(1),
        })
    }

    /// The expressions that a regular expression can say: of characters alone, without recursion.
    pub fn regular(&self) -> Vec<bool> {
        self.closure(|node| match node {
            Node::Empty | Node::Class(_) => Some(0),
            Node::Token(_) => None,
            Node::Seq(children) | Node::Alt(children) => Some(children.len()),
            Node::Repeat(..) | Node::Rule(_) => Some(1),
        })
    }

    /// The expressions that name rules.
    pub fn has_rules(&self) -> Vec<bool> {
        self.closure(|node| match node {
            Node::Rule(_) => Some(0),
            Node::Empty | Node::Class(_) | Node::Token(_) => None,
            Node::Seq(_) | Node::Alt(_) | Node::Repeat(..) => Some(1),
        })
    }

    /// Expressions that the root has, itself included.
    pub fn reachable(&self) -> Vec<bool> {
        let mut is_reachable = vec![false; self.nodes.len()];
        let mut to_do = vec![self.rules[self.root].body];
        while let Some(id) = to_do.pop() {
            if !std::mem::replace(&mut is_reachable[id], true) {
                to_do.extend(self.children(id));
            }
        }
        is_reachable
    }

    /// Refuses rules that the root needs and that no text satisfies.
    pub fn check_ends(&self) -> Result<()> {
        let ends = self.closure(|node| match node {
            Node::Empty | Node::Class(_) | Node::Token(_) | Node::Repeat(_, 0, _) => Some(0),
            Node::Seq(children) => Some(children.len()),
            Node::Alt(_) | Node::Repeat(..) | Node::Rule(_) => Some(1),
        });
        let is_reachable = self.reachable();
        match self.rules.iter().find(|rule| is_reachable[rule.body] && !ends[rule.body]) {
            Some(Rule { name, line, .. }) => {
                Err(invalid!("the grammar, line {line}: no text of rule {name} ever ends"))
            }
            None => Ok(()),
        }
    }

    /// Makes rules that end in themselves, as white space is often written, repetitions, which are regular:
    /// `a ::= x a | y` is `a ::= x* y`.
    pub fn unroll_tails(&mut self) -> Result<()> {
        for rule in 0..self.rules.len() {
            let body = self.rules[rule].body;
            if !self.mentions(body, rule) {
                continue;
            }
            let mut room = MAX_UNROLLED;
            let Some(sequences) = self.sequences(body, rule, &mut room) else { continue };
            let (mut again, mut ends) = (Vec::new(), Vec::new());
            for mut sequence in sequences {
                let is_tail = sequence.last().is_some_and(|&last| self.nodes[last] == Node::Rule(rule));
                if is_tail {
                    sequence.pop();
                }
                if sequence.iter().any(|&id| self.mentions(id, rule)) {
                    again.clear();
                    ends.clear();
                    break;
                }
                let sequence = self.add(Node::Seq(sequence))?;
                if is_tail { again.push(sequence) } else { ends.push(sequence) }
            }
            again.retain(|&id| self.nodes[id] != Node::Empty);
            if ends.is_empty() {
                continue; // recursive elsewhere, or without an end, which check_ends finds
            }
            let end = self.add(Node::Alt(ends))?;
            self.rules[rule].body = if again.is_empty() {
                end
            } else {
                let again = self.add(Node::Alt(again))?;
                let again = self.add(Node::Repeat(again, 0, None))?;
                self.add(Node::Seq(vec![again, end]))?
            };
        }
        Ok(())
    }

    fn mentions(&self, id: NodeId, rule: usize) -> bool {
        match &self.nodes[id] {
            Node::Rule(other) => *other == rule,
            _ => self.children(id).iter().any(|&child| self.mentions(child, rule)),
        }
    }

    /// The alternatives of an expression as sequences; a last part that mentions `rule` is opened. `None` beyond `room`.
    fn sequences(&self, id: NodeId, rule: usize, room: &mut usize) -> Option<Vec<Vec<NodeId>>> {
        let sequences = match &self.nodes[id] {
            _ if !self.mentions(id, rule) => vec![vec![id]],
            Node::Alt(children) => {
                let mut all = Vec::new();
                for &child in children {
                    all.extend(self.sequences(child, rule, room)?);
                }
                all
            }
            &Node::Repeat(child, 0, Some(1)) => {
                let mut all = self.sequences(child, rule, room)?;
                all.push(Vec::new());
                all
            }
            Node::Seq(children) => {
                let (&last, others) = children.split_last()?;
                let mut all = self.sequences(last, rule, room)?;
                for sequence in &mut all {
                    *room = room.checked_sub(others.len())?;
                    sequence.splice(..0, others.iter().copied());
                }
                all
            }
            _ => vec![vec![id]],
        };
        *room = room.checked_sub(sequences.len())?;
        Some(sequences)
    }
}
