//! llama.cpp's grammar format, GBNF, as llguidance's Lark.

mod grammar;
mod lexemes;
mod parse;

use std::collections::HashSet;
use std::fmt::Write as _;

use grammar::{Grammar, Node, NodeId, Set};
use lexemes::Lexemes;

use super::constraint::TokenEnvironment;
use crate::error::Result;

/// The same grammar for llguidance.
pub struct Translation {
    /// In its variant of Lark's syntax.
    pub lark: String,
    /// Whether the parser has more and smaller pieces of text to do than it is made for; only small grammars may.
    pub is_fine_grained: bool,
}

/// The most rules of a grammar that may be fine-grained: the parser's work for a piece of text grows with them.
const MAX_FINE_GRAINED: usize = 300;

/// # Errors
/// `InvalidArgument` with line, column, what was found and what was expected; `Unsupported` for tokens that cannot be told from text.
pub fn translate(text: &str, environment: &TokenEnvironment) -> Result<Translation> {
    let mut grammar = parse::parse(text, environment)?;
    grammar.unroll_tails()?;
    grammar.check_ends()?;
    let lexemes = Lexemes::find(&mut grammar, environment)?;
    let lark = Writer::new(&grammar, &lexemes).write();
    let is_fine_grained = lexemes.are_broken && lark.lines().count() <= MAX_FINE_GRAINED;
    Ok(Translation { lark, is_fine_grained })
}

/// How deeply one regular expression may nest: each level here is up to four there, where 250 are allowed.
const MAX_REGEX_DEPTH: usize = 40;

/// A rule or terminal that has been named and is to be written.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Definition {
    /// `nID`: a rule.
    Rule(NodeId),
    /// `LID`: a lexeme, which is never empty.
    Lexeme(NodeId),
    /// `TID`: a part of lexemes.
    Part(NodeId),
}

struct Writer<'a> {
    grammar: &'a Grammar,
    lexemes: &'a Lexemes,
    has_rules: Vec<bool>,
    named: HashSet<Definition>,
    to_do: Vec<Definition>,
}

impl<'a> Writer<'a> {
    fn new(grammar: &'a Grammar, lexemes: &'a Lexemes) -> Self {
        let has_rules = grammar.has_rules();
        Writer { grammar, lexemes, has_rules, named: HashSet::new(), to_do: Vec::new() }
    }

    fn write(mut self) -> String {
        let mut out = format!("start: {}\n", self.symbol(self.grammar.rules[self.grammar.root].body));
        while let Some(definition) = self.to_do.pop() {
            let line = match definition {
                Definition::Rule(id) if self.lexemes.contains(id) => {
                    format!("n{id}: {}?", self.name(Definition::Lexeme(id)))
                }
                Definition::Rule(id) => format!("n{id}: {}", self.expression(id, Self::symbol)),
                Definition::Lexeme(id) => {
                    let part = self.part(id);
                    let not_empty = if self.lexemes.nullable[id] { " & /(?s:.)+/" } else { "" };
                    format!("L{id}: {part}{not_empty}")
                }
                Definition::Part(id) => format!("T{id}: {}", self.expression(id, Self::part)),
            };
            out.push_str(&line);
            out.push('\n');
        }
        out
    }

    fn name(&mut self, definition: Definition) -> String {
        if self.named.insert(definition) {
            self.to_do.push(definition);
        }
        match definition {
            Definition::Rule(id) => format!("n{id}"),
            Definition::Lexeme(id) => format!("L{id}"),
            Definition::Part(id) => format!("T{id}"),
        }
    }

    /// The expression that a name stands for.
    fn meant(&self, mut id: NodeId) -> NodeId {
        while let Node::Rule(rule) = self.grammar.node(id) {
            id = self.grammar.rules[*rule].body;
        }
        id
    }

    /// An expression by its operands, each as `operand` has it.
    fn expression(&mut self, id: NodeId, operand: fn(&mut Self, NodeId) -> String) -> String {
        let mut operands: Vec<String> = self.grammar.children(id).iter().map(|&child| operand(self, child)).collect();
        match self.grammar.node(id) {
            Node::Alt(_) => operands.join(" | "),
            Node::Repeat(_, least, most) => operands.remove(0) + &quantifier(*least, *most),
            _ => operands.join(" "),
        }
    }

    /// An operand of a rule.
    fn symbol(&mut self, id: NodeId) -> String {
        let id = self.meant(id);
        if !self.lexemes.has_text[id] {
            return "\"\"".to_owned();
        }
        match self.grammar.node(id) {
            Node::Token(ranges) => {
                let ranges: Vec<String> = ranges.iter().map(|(low, high)| format!("{low}-{high}")).collect();
                format!("<[{}]>", ranges.join(","))
            }
            _ if self.lexemes.contains(id) && !self.lexemes.nullable[id] => self.name(Definition::Lexeme(id)),
            _ => self.name(Definition::Rule(id)),
        }
    }

    /// An operand of a terminal.
    fn part(&mut self, id: NodeId) -> String {
        let id = self.meant(id);
        if !self.lexemes.has_text[id] {
            return "\"\"".to_owned();
        }
        if self.has_rules[id] || self.grammar.depth(id) > MAX_REGEX_DEPTH {
            return self.name(Definition::Part(id));
        }
        let mut regex = String::from("/");
        self.regex(id, &mut regex);
        regex + "/"
    }

    fn regex(&self, id: NodeId, out: &mut String) {
        match self.grammar.node(id) {
            Node::Empty => {}
            Node::Class(set) => class(set, out),
            Node::Seq(children) => children.iter().for_each(|&child| self.regex(child, out)),
            Node::Alt(children) => {
                out.push_str("(?:");
                for (i, &child) in children.iter().enumerate() {
                    out.push_str(if i > 0 { "|" } else { "" });
                    self.regex(child, out);
                }
                out.push(')');
            }
            Node::Repeat(child, least, most) => {
                out.push_str("(?:");
                self.regex(*child, out);
                out.push(')');
                out.push_str(&quantifier(*least, *most));
            }
            Node::Token(_) | Node::Rule(_) => unreachable!("a regular expression has characters only"),
        }
    }
}

fn quantifier(least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, None) => "*".to_owned(),
        (1, None) => "+".to_owned(),
        (0, Some(1)) => "?".to_owned(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    }
}

/// A character class of Rust's regular expressions, in letters that mean nothing in Lark either.
fn class(set: &Set, out: &mut String) {
    let is_plain = |c: u32| u8::try_from(c).is_ok_and(|b| b.is_ascii_alphanumeric());
    match *set.ranges() {
        [(low, high)] if low == high && is_plain(low) => out.extend(char::from_u32(low)),
        ref ranges => {
            out.push('[');
            for &(low, high) in ranges {
                let _ = write!(out, "\\x{{{low:X}}}");
                if high > low {
                    let _ = write!(out, "-\\x{{{high:X}}}");
                }
            }
            out.push(']');
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::tokenizer::{GgufVocab, Tokenizer};

    fn environment() -> TokenEnvironment {
        let tokens = ["a", "b", "</s>"].map(str::to_owned).to_vec();
        let vocab =
            GgufVocab { model: "gpt2".to_owned(), tokens, token_types: Some(vec![1, 1, 3]), ..Default::default() };
        let tokenizer = Tokenizer::from_gguf(Path::new("letters"), vocab).unwrap();
        TokenEnvironment::new(&tokenizer).unwrap()
    }

    /// How many lexemes there are, and whether any has been broken.
    fn lexemes(text: &str) -> (usize, bool) {
        let translation = translate(text, &environment()).unwrap();
        let n = translation.lark.lines().filter(|line| line.starts_with('L')).count();
        (n, translation.is_fine_grained)
    }

    /// What decides how fast a grammar is.
    #[test]
    fn regular_parts_are_lexemes() {
        // Without recursion: all of it, rules included.
        assert_eq!(lexemes("root ::= \"x\"* y [a-z]+ \"z\"{2,5}\ny ::= (\"y\" | z)?\nz ::= [^z]"), (1, false));
        assert_eq!(lexemes("root ::= item ws\nitem ::= \"a\" item | \"b\"\nws ::= ([ \\t] ws)?"), (1, false), "tails");
        // JSON: strings, numbers and words are one; then come { } [ ] : and commas with the white space after them.
        let json = r#"
            root   ::= value
            value  ::= "{" ws (pair ("," ws pair)*)? "}" ws | "[" ws (value ("," ws value)*)? "]" ws | simple
            pair   ::= string ":" ws value
            simple ::= (string | [0-9]+ ws | "true" ws)
            string ::= "\"" ([^"\\] | "\\" ["\\nt])* "\"" ws
            ws     ::= [ \n]*
        "#;
        let (n, is_broken) = lexemes(json);
        assert!(n <= 9 && !is_broken, "{n}");
        // Each of these has a lexeme that could swallow what comes after it.
        for text in [
            "root ::= \"(\" root \")\" | [a-z]+ root? \"b\"",
            "root ::= \"a\" root \"b\" | \"aab\"*",
            "root ::= \"(\" root \")\" | \"é\" root | [è-ë]+",
        ] {
            assert!(lexemes(text).1, "{text}");
        }
    }

    #[test]
    fn classes_are_sets_of_characters() {
        let set = |ranges: &[(u32, u32)], negated| Set::new(ranges.to_vec(), negated).map(|s| s.ranges().to_vec());
        assert_eq!(set(&[(5, 9), (1, 3), (4, 4), (8, 20)], false), Some(vec![(1, 20)]));
        assert_eq!(set(&[(5, 5), (0, 3)], true), Some(vec![(4, 4), (6, 0xd7ff), (0xe000, 0x10ffff)]));
        assert_eq!(set(&[(0xd000, u32::MAX)], false), Some(vec![(0xd000, 0xd7ff), (0xe000, 0x10ffff)]));
        assert_eq!(set(&[], true), Some(vec![(0, 0xd7ff), (0xe000, 0x10ffff)]));
        assert_eq!((set(&[], false), set(&[(0xd800, 0xdfff)], false), set(&[(0, u32::MAX)], true)), (None, None, None));
        let meets = |a: &[(u32, u32)], b: &[(u32, u32)]| {
            Set::new(a.to_vec(), false).unwrap().intersects(&Set::new(b.to_vec(), false).unwrap())
        };
        assert!(meets(&[(1, 2), (9, 9)], &[(3, 5), (9, 12)]) && !meets(&[(1, 2), (9, 9)], &[(3, 8), (10, 10)]));
    }
}
