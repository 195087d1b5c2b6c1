//! Stop strings in a text that comes in pieces.

use crate::error::{Result, invalid};

pub const MAX_STOPS: usize = 64;
pub const MAX_STOP_BYTES: usize = 1024;

const ROOT: u32 = 0;

/// Several stop strings as one automaton (Aho and Corasick, 1975). A node stands for a beginning of a stop string; the
/// node that a text leads to is the longest end of the text that is such a beginning, which is what has to be held back.
#[derive(Debug)]
pub struct StopStrings {
    nodes: Vec<Node>,
    stops: Vec<Box<str>>,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    /// The last byte of the beginning.
    byte: u8,
    /// Bytes of the beginning.
    depth: usize,
    /// A stop string that begins so.
    of: usize,
    first_child: Option<u32>,
    sibling: Option<u32>,
    /// The longest proper end of this beginning that is a beginning itself.
    fail: u32,
    /// The longest stop string that the beginning ends with.
    complete: Option<usize>,
}

/// What a piece of text did.
pub(super) struct Step {
    /// Where the automaton is now.
    pub(super) node: u32,
    /// Bytes of the held and the new text together that can be given out.
    pub(super) released: usize,
    /// The stop string that is complete.
    pub(super) stop: Option<usize>,
}

impl StopStrings {
    /// # Errors
    /// `InvalidArgument` for an empty or overlong string, and for too many.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<StopStrings> {
        if stops.len() > MAX_STOPS {
            return Err(invalid!("{} stop strings, expected at most {MAX_STOPS}", stops.len()));
        }
        let root = Node { byte: 0, depth: 0, of: 0, first_child: None, sibling: None, fail: ROOT, complete: None };
        let mut automaton = StopStrings { nodes: vec![root], stops: Vec::with_capacity(stops.len()) };
        for (index, stop) in stops.iter().map(AsRef::as_ref).enumerate() {
            if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
                return Err(invalid!("stop string {index} has {} bytes, expected 1 to {MAX_STOP_BYTES}", stop.len()));
            }
            automaton.insert(index, stop);
        }
        automaton.link();
        Ok(automaton)
    }

    fn insert(&mut self, index: usize, stop: &str) {
        let mut at = ROOT;
        for (i, byte) in stop.bytes().enumerate() {
            at = self.child(at, byte).unwrap_or_else(|| {
                let new = self.nodes.len() as u32;
                let sibling = self.nodes[at as usize].first_child.replace(new);
                self.nodes.push(Node {
                    byte,
                    depth: i + 1,
                    of: index,
                    first_child: None,
                    sibling,
                    fail: ROOT,
                    complete: None,
                });
                new
            });
        }
        // Of equal stop strings the first counts.
        self.nodes[at as usize].complete.get_or_insert(index);
        self.stops.push(stop.into());
    }

    /// Sets `fail`, shallow nodes first, and inherits `complete` from it.
    fn link(&mut self) {
        let mut queue = std::collections::VecDeque::from([ROOT]);
        while let Some(parent) = queue.pop_front() {
            let mut child = self.nodes[parent as usize].first_child;
            while let Some(id) = child {
                let Node { byte, sibling, .. } = self.nodes[id as usize];
                if parent != ROOT {
                    let fail = self.next(self.nodes[parent as usize].fail, byte);
                    self.nodes[id as usize].fail = fail;
                    // A whole stop string is longer than any that it ends with.
                    self.nodes[id as usize].complete =
                        self.nodes[id as usize].complete.or(self.nodes[fail as usize].complete);
                }
                queue.push_back(id);
                child = sibling;
            }
        }
    }

    /// At most one child for each stop string.
    fn child(&self, node: u32, byte: u8) -> Option<u32> {
        let mut child = self.nodes[node as usize].first_child;
        while let Some(id) = child {
            let node = &self.nodes[id as usize];
            if node.byte == byte {
                return Some(id);
            }
            child = node.sibling;
        }
        None
    }

    /// Every turn of the loop makes the held text shorter and every call makes it longer by one at most: linear.
    fn next(&self, mut node: u32, byte: u8) -> u32 {
        loop {
            match self.child(node, byte) {
                Some(child) => return child,
                None if node == ROOT => return ROOT,
                None => node = self.nodes[node as usize].fail,
            }
        }
    }

    /// The text that is held back at a node: whole characters, if whole characters led there.
    pub(super) fn held(&self, node: u32) -> &str {
        let node = &self.nodes[node as usize];
        self.stops.get(node.of).map_or("", |stop| &stop[..node.depth])
    }

    /// Reads `text` after what led to `node`, up to the end of the stop string that is complete first; of several that end
    /// there, the longest.
    pub(super) fn read(&self, mut node: u32, text: &str) -> Step {
        let held = self.nodes[node as usize].depth;
        for (i, byte) in text.bytes().enumerate() {
            node = self.next(node, byte);
            if let Some(stop) = self.nodes[node as usize].complete {
                return Step { node: ROOT, released: held + i + 1 - self.stops[stop].len(), stop: Some(stop) };
            }
        }
        Step { node, released: held + text.len() - self.nodes[node as usize].depth, stop: None }
    }

    pub fn stops(&self) -> &[Box<str>] {
        &self.stops
    }
}
