//! What a JSON schema asks for and `llguidance` would not do, refused by name before it gets there: it ignores keywords
//! that it does not know, some of those that it does, and keeps some promises only approximately.

use std::collections::HashSet;

use llguidance::JsonCompileOptions;
use serde_json::{Value as Json, json};

use crate::error::{Result, invalid, unsupported};

/// Distinct `$ref`s in a schema. The compiler recurses along chains of them.
pub const MAX_REFS: usize = 4096;

/// Keywords that say nothing of the output.
const ANNOTATIONS: [&str; 19] = [
    "$schema",
    "$id",
    "id",
    "$anchor",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentMediaType",
    "contentEncoding",
    "contentSchema",
    "type",
];
const COUNTS: [&str; 5] = ["minLength", "maxLength", "minItems", "maxItems", "maxProperties"];
const NUMBERS: [&str; 5] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// The schema as the compiler gets it.
///
/// # Errors
/// `Unsupported` naming the keyword, format or value, and where it is.
pub fn prepare(schema: Json) -> Result<Json> {
    let mut schema = match schema {
        Json::Object(map) => Json::Object(map),
        Json::Bool(true) => Json::Object(Default::default()),
        Json::Bool(false) => return Err(unsupported!("the schema is refused: nothing matches false")),
        _ => return Err(invalid!("the schema is not an object, expected one")),
    };
    Checker { root: &schema, refs: HashSet::new() }.check()?;
    spell_out_formats(&mut schema);
    let options = JsonCompileOptions {
        // Without \u escapes a string has one spelling. With them a key could be spelt so as to slip past the schema of
        // the property that it names.
        json_allowed_escapes: Some("nrbtf\\\"".to_owned()),
        // Without a bound, models at times write white space for ever.
        whitespace_pattern: Some(r" |\n{1,2}[ \t]{0,20}".to_owned()),
        ..Default::default()
    };
    options.apply_to(&mut schema);
    Ok(schema)
}

/// RFC 3339's dates, each of which exists, and times without leap seconds, which most parsers refuse.
const DATE: &str = "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)\
    |02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)";
const TIME: &str =
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";

/// Short enough for RFC 5321, which allows 64 characters before the @ and 63 in a label.
const MAX_EMAIL: u64 = 60;

/// Replaces formats of dates and times with patterns that are more exact than the compiler's, and bounds mail addresses.
fn spell_out_formats(schema: &mut Json) {
    let Json::Object(map) = schema else { return };
    for (keyword, value) in map.iter_mut() {
        match (keyword.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Json::Object(schemas)) => {
                schemas.values_mut().for_each(spell_out_formats);
            }
            ("prefixItems" | "items" | "allOf" | "anyOf" | "oneOf", Json::Array(schemas)) => {
                schemas.iter_mut().for_each(spell_out_formats);
            }
            ("items" | "additionalItems" | "additionalProperties", schema) => spell_out_formats(schema),
            _ => {}
        }
    }
    let pattern = match map.get("format").and_then(Json::as_str) {
        Some("date") => format!("^{DATE}$"),
        Some("time") => format!("^{TIME}$"),
        Some("date-time") => format!("^{DATE}T{TIME}$"),
        Some("email") => {
            let length = map.entry("maxLength").or_insert(MAX_EMAIL.into());
            if length.as_u64().is_some_and(|n| n > MAX_EMAIL) {
                *length = MAX_EMAIL.into();
            }
            return;
        }
        _ => return,
    };
    if let Json::Array(all) = map.entry("allOf").or_insert_with(|| Json::Array(Vec::new())) {
        all.push(json!({"pattern": pattern}));
        map.shift_remove("format");
    }
}

struct Checker<'a> {
    root: &'a Json,
    refs: HashSet<&'a str>,
}

impl<'a> Checker<'a> {
    fn check(&mut self) -> Result<()> {
        let old = self.root["$schema"].as_str().is_some_and(|s| s.contains("draft-0") || s.contains("2019-09"));
        let mut open = vec![(self.root, "#".to_owned())];
        while let Some((schema, at)) = open.pop() {
            let Json::Object(map) = schema else { continue };
            for (keyword, value) in map {
                let here = || format!("{at}/{keyword}");
                match (keyword.as_str(), value) {
                    ("properties" | "patternProperties" | "$defs" | "definitions", Json::Object(schemas)) => {
                        open.extend(schemas.iter().map(|(name, s)| (s, format!("{at}/{keyword}/{name}"))));
                    }
                    ("prefixItems" | "items" | "allOf" | "anyOf" | "oneOf", Json::Array(schemas)) => {
                        open.extend(schemas.iter().enumerate().map(|(i, s)| (s, format!("{at}/{keyword}/{i}"))));
                    }
                    ("items" | "additionalItems" | "additionalProperties", _) => open.push((value, here())),
                    ("$ref", Json::String(reference)) if self.refs.insert(reference) => {
                        if self.refs.len() > MAX_REFS {
                            return Err(unsupported!("the schema has more than {MAX_REFS} different $refs"));
                        }
                        // What it points to may be outside the places that hold schemas.
                        let target = reference.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer));
                        open.extend(target.map(|t| (t, reference.clone())));
                    }
                    ("const" | "enum", _) => check_constant(value, &here())?,
                    ("format", Json::String(format)) => {
                        let on_strings = match &map.get("type") {
                            Some(Json::String(t)) => t == "string",
                            Some(Json::Array(types)) => types.iter().any(|t| t == "string"),
                            _ => true,
                        };
                        if on_strings && !FORMATS.contains(&format.as_str()) {
                            return Err(unsupported!("the schema's format {format:?} at {at} is not implemented"));
                        }
                    }
                    ("minProperties", _) => {
                        // Names may repeat in the output, where a parser counts them once.
                        let required = map.get("required").and_then(Json::as_array).map_or(0, Vec::len);
                        let closed = map.get("additionalProperties") == Some(&Json::Bool(false))
                            && !map.contains_key("patternProperties");
                        if !closed && value.as_u64().is_some_and(|n| n > required as u64 + 1) {
                            return Err(unsupported!(
                                "the schema's minProperties at {at} asks for more than the required properties and one, \
                                 which is not implemented"
                            ));
                        }
                    }
                    (k, _) if NUMBERS.contains(&k) => check_constant(value, &here())?,
                    (k, _) if COUNTS.contains(&k) || ANNOTATIONS.contains(&k) => {}
                    ("required" | "pattern" | "$ref" | "format", _) => {}
                    ("properties" | "patternProperties" | "prefixItems" | "allOf" | "anyOf" | "oneOf", _) => {}
                    (k, _) if k.starts_with("x-") && k != "x-guidance" => {}
                    _ => return Err(unsupported!("the schema keyword {keyword:?} at {at} is not implemented")),
                }
            }
            let positional = matches!(map.get("items"), Some(Json::Array(_))) || map.contains_key("additionalItems");
            if map.contains_key("prefixItems") && (old || positional) {
                return Err(unsupported!(
                    "the schema keyword \"prefixItems\" at {at} is not implemented in drafts before 2020-12"
                ));
            }
        }
        Ok(())
    }
}

/// Integers that f64 holds exactly, numbers that have a spelling within [`super::constraint`]'s bounds, and text that has
/// one without \u.
fn check_constant(value: &Json, at: &str) -> Result<()> {
    match value {
        Json::Number(n) => {
            let integer = n.as_u64().or_else(|| n.as_i64().map(i64::unsigned_abs));
            if integer.is_some_and(|i| i > 1 << 53) || n.as_f64().is_none_or(|x| x.abs() > 1e99) {
                return Err(unsupported!("the schema's number {n} at {at} is too large, which is not implemented"));
            }
            Ok(())
        }
        Json::String(s) if s.chars().any(|c| c < ' ' && !"\n\r\t\u{8}\u{c}".contains(c) || c == '\u{7f}') => {
            Err(unsupported!("the schema's text at {at} has a control character, which is not implemented"))
        }
        Json::Array(values) => values.iter().try_for_each(|v| check_constant(v, at)),
        Json::Object(map) => map.values().try_for_each(|v| check_constant(v, at)),
        _ => Ok(()),
    }
}
