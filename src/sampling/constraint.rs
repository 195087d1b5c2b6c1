//! Output that must match a JSON schema, a regular expression or a grammar, through the `llguidance` crate.

use std::sync::Arc;

use llguidance::api::{GrammarInit, GrammarWithLexer, ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Logger, Matcher, ParserFactory};

use super::{gbnf, schema};
use crate::error::{Error, Result, invalid, unsupported};
use crate::tokenizer::Tokenizer;

/// The longest JSON schema in bytes.
pub const MAX_SCHEMA: usize = 1 << 20;
/// The longest regular expression or grammar in bytes.
pub const MAX_GRAMMAR: usize = 1 << 17;
/// How deeply brackets may nest in a grammar, outside its literals.
pub(super) const MAX_DEPTH: usize = 100;
/// Limits of llguidance's parser for grammars that it reads character by character: more items to find the tokens that may come next,
/// some tenths of a second of work, but fewer at a time, for it compares them with each other.
const FINE_ITEMS: usize = 1_000_000;
const FINE_ROW: usize = 500;
/// Compilers recurse as deeply as definitions refer to each other, and a stack that overflows cannot be caught. Within the
/// limits above and [`schema::MAX_REFS`] this is enough; only what is touched takes memory.
const STACK: usize = 256 << 20;

/// The vocabulary in the form that constraints need: built once for a model, shared by all its constraints.
pub struct TokenEnvironment {
    factory: ParserFactory,
    ends: Vec<u32>,
}

impl std::fmt::Debug for TokenEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("TokenEnvironment").field("ends", &self.ends).finish_non_exhaustive()
    }
}

impl TokenEnvironment {
    /// # Errors
    /// `Unsupported` for a vocabulary without a token that ends a text.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let n_vocab = tokenizer.n_vocab() as u32;
        let ends: Vec<u32> = (0..n_vocab).filter(|&id| tokenizer.is_end_of_generation(id)).collect();
        let &[end, ..] = &ends[..] else {
            return Err(unsupported!("the tokenizer has no token that ends a text, which a constraint needs"));
        };
        let mut words = Vec::with_capacity(n_vocab as usize);
        for id in 0..n_vocab {
            let (bytes, text) = (tokenizer.token_bytes(id, true)?, tokenizer.token_bytes(id, false)?);
            words.push(match text {
                // A control token matches its name in a grammar and no text, which the marker sees to.
                [] if !bytes.is_empty() => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                // The marker's own byte is in no UTF-8; without bytes a token is never allowed.
                [TokTrie::SPECIAL_TOKEN_MARKER, ..] => Vec::new(),
                text => text.to_vec(),
            });
        }
        let factory = on_large_stack(|| {
            let trie = TokTrie::from(&TokRxInfo::new(n_vocab, end), &words).with_eos_tokens(&ends);
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            ParserFactory::new_simple(&environment)
        })?;
        let factory = factory.map_err(|e| Error::Internal(format!("the token environment: {}", sentence(&e))))?;
        Ok(TokenEnvironment { factory, ends })
    }

    fn limits(&self) -> ParserLimits {
        ParserLimits { verbose_errors: false, ..self.factory.limits().clone() }
    }

    pub(super) fn n_vocab(&self) -> u32 {
        self.factory.tok_env().tok_trie().vocab_size() as u32
    }

    /// The token that is spelled so.
    pub(super) fn named(&self, spelling: &str) -> Option<u32> {
        let trie = self.factory.tok_env().tok_trie();
        trie.get_special_token(spelling).or_else(|| trie.token_id(spelling.as_bytes()))
    }

    /// Whether a grammar may ask for the token by its id.
    pub(super) fn is_choice(&self, token: u32) -> bool {
        !self.bytes(token).is_empty() && !self.ends.contains(&token)
    }

    /// Whether the token is no text.
    pub(super) fn is_control(&self, token: u32) -> bool {
        self.bytes(token).first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER)
    }

    /// A token as the grammars see it; control tokens begin with a marker.
    fn bytes(&self, token: u32) -> &[u8] {
        let trie = self.factory.tok_env().tok_trie();
        if (token as usize) < trie.vocab_size() { trie.token(token) } else { &[] }
    }
}

/// A grammar and how far a text has come in it. A clone continues from the same point, independently.
#[derive(Clone)]
pub struct Constraint {
    environment: Arc<TokenEnvironment>,
    matcher: Matcher,
    start: Matcher,
    /// For JSON: how far the text's last number has come.
    number: Option<Number>,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Constraint").field("stopped", &self.matcher.is_stopped()).finish_non_exhaustive()
    }
}

impl Constraint {
    /// JSON that is valid by a JSON schema (draft 4 to 2020-12).
    ///
    /// # Errors
    /// `InvalidArgument` for what is not JSON or too large, `Unsupported` naming the keyword, format or value that is not
    /// implemented, or saying why nothing can match.
    pub fn json_schema(environment: &Arc<TokenEnvironment>, schema: &str) -> Result<Self> {
        check_length("the schema", schema.len(), MAX_SCHEMA)?;
        let json = serde_json::from_str(schema).map_err(|e| invalid!("the schema is not JSON: {e}"))?;
        let schema = schema::prepare(json)?;
        let refuse = |e: String| unsupported!("the schema is refused: {e}");
        let constraint = Self::new(environment, GrammarWithLexer::from_json_schema(schema), refuse)?;
        Ok(Constraint { number: Some(Number::default()), ..constraint })
    }

    /// Text that matches a regular expression from its first to its last byte; syntax of Rust's `regex` crate, without look-around.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn regex(environment: &Arc<TokenEnvironment>, regex: &str) -> Result<Self> {
        check_length("the regular expression", regex.len(), MAX_GRAMMAR)?;
        let slashes = regex.len() - regex.trim_end_matches('\\').len();
        if regex.is_empty() || slashes % 2 == 1 {
            return Err(invalid!("the regular expression is empty or ends in a lone backslash"));
        }
        let refuse = |e: String| invalid!("the regular expression is refused: {e}");
        Self::new(environment, GrammarWithLexer::from_regex(regex), refuse)
    }

    /// Text of a grammar in llguidance's variant of Lark's syntax. `%json` takes schemas as in [`Constraint::json_schema`].
    ///
    /// # Errors
    /// `InvalidArgument` naming the place, `Unsupported`.
    pub fn grammar(environment: &Arc<TokenEnvironment>, grammar: &str) -> Result<Self> {
        check_length("the grammar", grammar.len(), MAX_GRAMMAR)?;
        let refuse = |e: String| invalid!("the grammar is refused: {e}");
        Self::new(environment, GrammarWithLexer::from_lark(prepare_grammar(grammar)?), refuse)
    }

    /// Text of a grammar in llama.cpp's format.
    ///
    /// # Errors
    /// `InvalidArgument` naming the place, `Unsupported`.
    pub fn gbnf(environment: &Arc<TokenEnvironment>, grammar: &str) -> Result<Self> {
        check_length("the grammar", grammar.len(), MAX_GRAMMAR)?;
        let refuse = |e: String| invalid!("the grammar is refused: {e}");
        let grammar = on_large_stack(|| gbnf::translate(grammar, environment))??;
        let limits = match grammar.is_fine_grained {
            true => ParserLimits { step_max_items: FINE_ITEMS, max_items_in_row: FINE_ROW, ..environment.limits() },
            false => environment.limits(),
        };
        Self::within(environment, GrammarWithLexer::from_lark(grammar.lark), limits, refuse)
    }

    fn new(
        environment: &Arc<TokenEnvironment>,
        grammar: GrammarWithLexer,
        refuse: impl Fn(String) -> Error,
    ) -> Result<Self> {
        Self::within(environment, grammar, environment.limits(), refuse)
    }

    fn within(
        environment: &Arc<TokenEnvironment>,
        grammar: GrammarWithLexer,
        limits: ParserLimits,
        refuse: impl Fn(String) -> Error,
    ) -> Result<Self> {
        let factory = &environment.factory;
        let grammar = GrammarInit::Serialized(TopLevelGrammar::from_grammar(grammar));
        let (logger, capabilities) = (Logger::new(0, 0), InferenceCapabilities::default());
        let parser = on_large_stack(|| factory.create_parser_from_init_ext(grammar, logger, capabilities, limits))?;
        let start = Matcher::new(Ok(parser.map_err(|e| refuse(sentence(&e)))?));
        // A grammar that nothing matches, or that is too complex to begin with, is better known now.
        start.clone().compute_mask_or_eos().map_err(|e| match sentence(&e) {
            nothing if nothing == StopReason::NoExtensionBias.to_string() => refuse("nothing matches it".to_owned()),
            other => refuse(other),
        })?;
        Ok(Constraint { environment: environment.clone(), matcher: start.clone(), start, number: None })
    }

    /// Which tokens may come next; at the end of the grammar those that end a text.
    ///
    /// # Errors
    /// `Unsupported` if the grammar has become too complex, or allows nothing; it stays so until [`Constraint::reset`].
    pub fn allowed(&mut self) -> Result<impl Fn(u32) -> bool + use<>> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| too_complex(&e))?;
        let (environment, number) = (self.environment.clone(), self.number);
        Ok(move |token: u32| {
            (token as usize) < mask.len()
                && mask.is_allowed(token)
                && number.is_none_or(|n| n.after(environment.bytes(token)).is_some())
        })
    }

    /// Advances by a token of the text.
    ///
    /// # Errors
    /// `InvalidArgument` if the grammar does not allow it, nothing being changed; `Unsupported` as above.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        let is_end = self.environment.ends.contains(&token);
        let refused = || invalid!("the constraint does not allow token {token} here");
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return if is_end { Ok(()) } else { Err(refused()) };
        }
        let n_vocab = self.environment.factory.tok_env().tok_trie().vocab_size();
        let number = self.number.map(|n| n.after(self.environment.bytes(token)));
        let fits = if (token as usize) < n_vocab && number != Some(None) {
            let n = self.matcher.validate_tokens(&[token]).map_err(|e| too_complex(&e))?;
            n == 1 || (is_end && self.matcher.is_accepting().map_err(|e| too_complex(&e))?)
        } else {
            false
        };
        if !fits {
            return Err(refused());
        }
        self.matcher.consume_token(token).map_err(|e| too_complex(&e))?;
        self.number = number.flatten();
        Ok(())
    }

    /// Advances by text that is part of the output already, whatever its tokens are.
    ///
    /// # Errors
    /// `InvalidArgument` if the grammar does not allow it, nothing being changed; `Unsupported` as above.
    pub fn accept_text(&mut self, text: &str) -> Result<()> {
        let refused = || invalid!("the constraint does not allow the text {:?} here", sentence(&text));
        // Any tokens that spell the text will do: a grammar reads bytes.
        let tokens = self.environment.factory.tok_env().tok_trie().greedy_tokenize(text.as_bytes());
        if tokens.iter().map(|&token| self.environment.bytes(token).len()).sum::<usize>() != text.len() {
            return Err(unsupported!("the vocabulary has no tokens that spell {:?}", sentence(&text)));
        }
        let mut advanced = self.clone();
        for token in tokens {
            advanced.accept(token).map_err(|e| if let Error::InvalidArgument(_) = e { refused() } else { e })?;
        }
        *self = advanced;
        Ok(())
    }

    /// Whether the grammar has ended: only tokens that end a text are allowed. (One that may end and may go on has not.)
    ///
    /// # Errors
    /// `Unsupported` as above.
    pub fn is_done(&mut self) -> Result<bool> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(true);
        }
        if !self.matcher.is_accepting().map_err(|e| too_complex(&e))? {
            return Ok(false);
        }
        let allowed = self.allowed()?;
        Ok((0..self.environment.n_vocab()).all(|token| !allowed(token) || self.environment.ends.contains(&token)))
    }

    /// Back to the beginning.
    pub fn reset(&mut self) {
        self.matcher = self.start.clone();
        self.number = self.number.map(|_| Number::default());
    }
}

/// Keeps JSON's numbers within 10^200, for parsers refuse those that no f64 holds: at most 100 digits before the point and 2
/// in the exponent, which the grammars do not bound.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Number {
    within: Within,
    /// Digits so far of an integer part or an exponent.
    digits: u8,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Within {
    #[default]
    Other,
    String,
    Escape,
    Integer,
    Fraction,
    Exponent,
}

impl Number {
    /// After more bytes of the text; `None` if a number has become too long.
    fn after(mut self, bytes: &[u8]) -> Option<Self> {
        for &b in bytes {
            self.within = match (self.within, b) {
                (Within::Escape, _) => Within::String,
                (Within::String, b'\\') => Within::Escape,
                (Within::String, b'"') => Within::Other,
                (Within::String, _) => Within::String,
                (_, b'"') => Within::String,
                (Within::Other, b'0'..=b'9') => {
                    self.digits = 1;
                    Within::Integer
                }
                (Within::Integer, b'0'..=b'9') if self.digits < 100 => {
                    self.digits += 1;
                    Within::Integer
                }
                (Within::Exponent, b'0'..=b'9') if self.digits < 2 => {
                    self.digits += 1;
                    Within::Exponent
                }
                (Within::Integer | Within::Exponent, b'0'..=b'9') => return None,
                (Within::Fraction, b'0'..=b'9') | (Within::Integer, b'.') => Within::Fraction,
                (Within::Integer | Within::Fraction, b'e' | b'E') => {
                    self.digits = 0;
                    Within::Exponent
                }
                (Within::Exponent, b'+' | b'-') => Within::Exponent,
                _ => Within::Other,
            };
        }
        Some(self)
    }
}

fn too_complex(error: &impl std::fmt::Display) -> Error {
    unsupported!("the constraint cannot go on: {}", sentence(error))
}

fn check_length(what: &str, n: usize, most: usize) -> Result<()> {
    if n > most { Err(invalid!("{what} has {n} bytes, expected at most {most}")) } else { Ok(()) }
}

/// The first line of what may be a page.
fn sentence(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().chars().take(300).collect()
}

/// Runs something that may recurse deeply, or panic.
fn on_large_stack<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, f)
            .map_err(|_| Error::OutOfMemory { what: "the stack of a grammar's compiler", bytes: STACK })?;
        thread.join().map_err(|_| Error::Internal("llguidance panicked".to_owned()))
    })
}

/// Checks the schemas in a grammar, and what its compiler would recurse on or accept without heeding.
fn prepare_grammar(grammar: &str) -> Result<String> {
    let mut out = String::with_capacity(grammar.len());
    let mut depth = 0usize;
    let mut rest = grammar;
    while let Some(c) = rest.chars().next() {
        let line = || 1 + grammar[..grammar.len() - rest.len()].matches('\n').count();
        let n = match c {
            '"' => literal(rest, '"'),
            '#' => line_end(rest),
            '/' if rest.starts_with("//") => line_end(rest),
            '/' => literal(rest, '/'),
            // A special token, whose name may hold any of these.
            '<' => rest.find(|c: char| c == '>' || c.is_whitespace()).map_or(1, |n| n + 1),
            '%' if rest.starts_with("%json") => {
                let mut values = serde_json::Deserializer::from_str(&rest[5..]).into_iter();
                let schema = match values.next() {
                    Some(Ok(schema)) => schema::prepare(schema)?,
                    Some(Err(e)) => return Err(invalid!("the grammar, line {}: %json: {e}", line())),
                    None => return Err(invalid!("the grammar, line {}: %json stands alone", line())),
                };
                let n = 5 + values.byte_offset();
                out.push_str("%json ");
                out.push_str(&schema.to_string());
                rest = &rest[n..];
                continue;
            }
            '(' | '[' | '{' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(invalid!("the grammar, line {}: brackets nest deeper than {MAX_DEPTH}", line()));
                }
                1
            }
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                1
            }
            c if c.is_alphabetic() || c == '_' => {
                let n = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                if &rest[..n] == "temperature" && rest[n..].trim_start().starts_with('=') {
                    return Err(unsupported!("the grammar, line {}: temperature= is not implemented", line()));
                }
                n
            }
            c => c.len_utf8(),
        };
        out.push_str(&rest[..n]);
        rest = &rest[n..];
    }
    Ok(out)
}

/// Length of the literal that `text` begins with, to its closing `quote` or the end.
fn literal(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return i + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

fn line_end(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}
