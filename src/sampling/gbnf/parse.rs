//! Reads GBNF.

use std::collections::HashMap;

use super::grammar::{Grammar, Node, NodeId, Rule, Set};
use crate::error::{Error, Result, invalid};
use crate::sampling::constraint::{MAX_DEPTH, TokenEnvironment};

/// The largest count of a repetition.
pub const MAX_REPETITIONS: u32 = 100_000;

/// Reads a grammar whose root is the rule `root`.
///
/// # Errors
/// `InvalidArgument` with line, column, what was found and what was expected.
pub fn parse(text: &str, environment: &TokenEnvironment) -> Result<Grammar> {
    let mut p = Parser { text, at: 0, environment, grammar: Grammar::default(), names: HashMap::new(), choices: None };
    p.space(true);
    while p.peek().is_some() {
        p.rule()?;
    }
    let undefined = p.names.iter().filter(|(_, name)| name.defined.is_none()).min_by_key(|(_, name)| name.first);
    if let Some((name, &Name { first, .. })) = undefined {
        return Err(p.fail(first, format!("rule {name} is not defined")));
    }
    let root = p.names.get("root").ok_or_else(|| invalid!("the grammar has no rule root, where it would begin"))?.rule;
    let mut grammar = p.grammar;
    grammar.root = root;
    Ok(grammar)
}

/// A rule that is defined or mentioned.
struct Name {
    /// In the grammar's rules.
    rule: usize,
    /// Where it is mentioned first.
    first: usize,
    defined: Option<usize>,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    environment: &'a TokenEnvironment,
    grammar: Grammar,
    names: HashMap<&'a str, Name>,
    choices: Option<Vec<(u32, u32)>>,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-'
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, token: &str) -> bool {
        let is_next = self.rest().starts_with(token);
        if is_next {
            self.at += token.len();
        }
        is_next
    }

    /// Line and column of a place, in characters from 1.
    fn line_of(&self, at: usize) -> (usize, usize) {
        let before = &self.text[..at];
        let line_start = before.rfind('\n').map_or(0, |n| n + 1);
        (1 + before.matches('\n').count(), 1 + before[line_start..].chars().count())
    }

    fn fail(&self, at: usize, what: impl std::fmt::Display) -> Error {
        let (line, column) = self.line_of(at);
        invalid!("the grammar, line {line}, column {column}: {what}")
    }

    fn expected(&self, what: &str) -> Error {
        let found = match self.peek() {
            None => "the end".to_owned(),
            Some('\n' | '\r') => "the end of the line".to_owned(),
            Some(c) => format!("{c:?}"),
        };
        self.fail(self.at, format!("found {found}, expected {what}"))
    }

    /// Spaces, tabs and comments, and line ends where they mean nothing.
    fn space(&mut self, line_ends: bool) {
        loop {
            match self.peek() {
                Some(' ' | '\t') => self.at += 1,
                Some('\r' | '\n') if line_ends => self.at += 1,
                Some('#') => self.at += self.rest().find(['\r', '\n']).unwrap_or(self.rest().len()),
                _ => return,
            }
        }
    }

    fn word(&mut self) -> &'a str {
        let rest = self.rest();
        let word = &rest[..rest.find(|c| !is_word(c)).unwrap_or(rest.len())];
        self.at += word.len();
        word
    }

    /// The number of the rule called `name`, mentioned at `at`.
    fn name(&mut self, name: &'a str, at: usize) -> Result<usize> {
        if let Some(known) = self.names.get(name) {
            return Ok(known.rule);
        }
        let rule = self.grammar.rules.len();
        // The body comes with the definition.
        let body = self.grammar.add(Node::Empty)?;
        self.grammar.rules.push(Rule { name: name.to_owned(), line: self.line_of(at).0, body });
        self.names.insert(name, Name { rule, first: at, defined: None });
        Ok(rule)
    }

    fn rule(&mut self) -> Result<()> {
        let at = self.at;
        let name = self.word();
        if name.is_empty() {
            return Err(self.expected("the name of a rule: letters, digits and hyphens"));
        }
        let rule = self.name(name, at)?;
        let line = self.line_of(at).0;
        if let Some(before) = self.names.get_mut(name).and_then(|n| n.defined.replace(at)) {
            let before = self.line_of(before).0;
            return Err(self.fail(at, format!("rule {name} is defined again, first on line {before}")));
        }
        self.space(false);
        if !self.eat("::=") {
            return Err(self.expected("::="));
        }
        self.space(true);
        let body = self.alternatives(0)?;
        (self.grammar.rules[rule].body, self.grammar.rules[rule].line) = (body, line);
        if !matches!(self.peek(), None | Some('\r' | '\n')) {
            return Err(self.expected("an expression or the end of the line"));
        }
        self.space(true);
        Ok(())
    }

    /// Sequences between `|`, within `depth` parentheses.
    fn alternatives(&mut self, depth: usize) -> Result<NodeId> {
        let mut all = vec![self.sequence(depth)?];
        while self.eat("|") {
            self.space(true);
            all.push(self.sequence(depth)?);
        }
        self.grammar.add(Node::Alt(all))
    }

    fn sequence(&mut self, depth: usize) -> Result<NodeId> {
        let mut items = Vec::new();
        loop {
            let item = match self.peek() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('<' | '!') => self.token()?,
                Some('.') => {
                    self.at += 1;
                    self.grammar.add(Node::Class(Set::new(Vec::new(), true).expect("all characters")))?
                }
                Some('(') if depth == MAX_DEPTH => {
                    return Err(self.fail(self.at, format!("parentheses nest deeper than {MAX_DEPTH}")));
                }
                Some('(') => {
                    self.at += 1;
                    self.space(true);
                    let group = self.alternatives(depth + 1)?;
                    if !self.eat(")") {
                        return Err(self.expected("an expression or )"));
                    }
                    group
                }
                Some(c) if is_word(c) => {
                    let at = self.at;
                    let name = self.word();
                    let rule = self.name(name, at)?;
                    self.grammar.add(Node::Rule(rule))?
                }
                Some('*' | '+' | '?' | '{') => return Err(self.expected("something to repeat before it")),
                _ => return self.grammar.add(Node::Seq(items)),
            };
            let (line_ends, mut item) = (depth > 0, item);
            self.space(line_ends);
            while let Some((least, most)) = self.repetition(line_ends)? {
                item = self.grammar.add(Node::Repeat(item, least, most))?;
            }
            items.push(item);
        }
    }

    /// How often what stands before is repeated.
    fn repetition(&mut self, line_ends: bool) -> Result<Option<(u32, Option<u32>)>> {
        let at = self.at;
        let counts = match self.peek() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => {
                self.at += 1;
                self.space(line_ends);
                let least = self.count()?;
                self.space(line_ends);
                let most = if self.eat(",") {
                    self.space(line_ends);
                    let most = self.count()?;
                    self.space(line_ends);
                    most
                } else {
                    least
                };
                if least.is_none() && most.is_none() {
                    return Err(self.expected("a count"));
                }
                if self.peek() != Some('}') {
                    return Err(self.expected(", or }"));
                }
                let counts = (least.unwrap_or(0), most);
                if let (least, Some(most)) = counts
                    && least > most
                {
                    return Err(self.fail(at, format!("at least {least} and at most {most} times")));
                }
                counts
            }
            _ => return Ok(None),
        };
        self.at += 1;
        self.space(line_ends);
        Ok(Some(counts))
    }

    fn count(&mut self) -> Result<Option<u32>> {
        let (at, rest) = (self.at, self.rest());
        let digits = &rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())];
        self.at += digits.len();
        if digits.is_empty() {
            return Ok(None);
        }
        let count = digits.parse().ok().filter(|&n| n <= MAX_REPETITIONS);
        let shown: String = digits.chars().take(20).collect();
        count.map(Some).ok_or_else(|| self.fail(at, format!("found {shown}, expected at most {MAX_REPETITIONS}")))
    }

    fn literal(&mut self) -> Result<NodeId> {
        let start = self.at;
        self.at += 1;
        let mut items = Vec::new();
        while !self.eat("\"") {
            let at = self.at;
            let c = self.character(start, "the literal")?;
            let set = Set::new(vec![(c, c)], false);
            let set = set.ok_or_else(|| self.fail(at, format!("U+{c:04X} is no character")))?;
            items.push(self.grammar.add(Node::Class(set))?);
        }
        self.grammar.add(Node::Seq(items))
    }

    fn class(&mut self) -> Result<NodeId> {
        let start = self.at;
        self.at += 1;
        let negated = self.eat("^");
        let mut ranges = Vec::new();
        while !self.eat("]") {
            let at = self.at;
            let low = self.character(start, "the character class")?;
            let is_range = self.peek() == Some('-') && !self.rest().starts_with("-]");
            let high = if is_range {
                self.at += 1;
                self.character(start, "the character class")?
            } else {
                low
            };
            if low > high {
                return Err(self.fail(at, format!("the range goes from U+{low:04X} to U+{high:04X}")));
            }
            ranges.push((low, high));
        }
        if ranges.is_empty() {
            return Err(self.fail(start, "the character class is empty"));
        }
        let set = Set::new(ranges, negated);
        let set = set.ok_or_else(|| self.fail(start, "the character class has no character"))?;
        self.grammar.add(Node::Class(set))
    }

    /// A code point of `what`, which begins at `start`.
    fn character(&mut self, start: usize, what: &str) -> Result<u32> {
        let at = self.at;
        let Some(c) = self.next() else {
            return Err(self.fail(start, format!("{what} has no end")));
        };
        if c != '\\' {
            return Ok(c.into());
        }
        let n_digits = match self.next() {
            Some('t') => return Ok('\t'.into()),
            Some('r') => return Ok('\r'.into()),
            Some('n') => return Ok('\n'.into()),
            Some(c @ ('\\' | '"' | '[' | ']' | '-')) => return Ok(c.into()),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            _ => {
                self.at = at + 1;
                return Err(self.expected("an escape: one of n r t \\ \" [ ] - x u U"));
            }
        };
        let digits = self.rest().get(..n_digits).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let value = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
        let value = value.ok_or_else(|| self.fail(self.at, format!("expected {n_digits} hexadecimal digits")))?;
        self.at += n_digits;
        Ok(value)
    }

    /// All tokens that may be asked for.
    fn choices(&mut self) -> &[(u32, u32)] {
        let environment = self.environment;
        self.choices.get_or_insert_with(|| {
            let mut ranges: Vec<(u32, u32)> = Vec::new();
            for id in (0..environment.n_vocab()).filter(|&id| environment.is_choice(id)) {
                match ranges.last_mut() {
                    Some(last) if last.1 + 1 == id => last.1 = id,
                    _ => ranges.push((id, id)),
                }
            }
            ranges
        })
    }

    /// `<name>` or `<[id]>`, or any token but that.
    fn token(&mut self) -> Result<NodeId> {
        let start = self.at;
        let negated = self.eat("!");
        let at = self.at;
        if !self.eat("<") {
            return Err(self.expected("<"));
        }
        let rest = self.rest();
        let end = rest.find(['>', '\n', '\r']).filter(|&end| rest[end..].starts_with('>'));
        let end = end.ok_or_else(|| self.fail(at, "the token has no closing >"))?;
        self.at += end + 1;
        let (name, environment) = (&self.text[at..self.at], self.environment);
        let shown = name.chars().take(60).collect::<String>();
        let id = match name.strip_prefix("<[").and_then(|id| id.strip_suffix("]>")) {
            Some(id) => id.parse().ok().filter(|&id| id < environment.n_vocab()),
            None => environment.named(name),
        };
        let id = id.ok_or_else(|| self.fail(at, format!("the vocabulary has no token {shown}")))?;
        if !environment.is_choice(id) {
            return Err(self.fail(at, format!("token {shown} has no text or ends it")));
        }
        let ranges: Vec<(u32, u32)> = if negated {
            let without = |&(low, high): &(u32, u32)| {
                let below = (low < id).then(|| (low, high.min(id - 1)));
                let above = (high > id).then(|| (low.max(id + 1), high));
                [below, above].into_iter().flatten()
            };
            self.choices().iter().flat_map(without).collect()
        } else {
            vec![(id, id)]
        };
        if ranges.is_empty() {
            return Err(self.fail(start, "no token is left"));
        }
        self.grammar.add(Node::Token(ranges))
    }
}
