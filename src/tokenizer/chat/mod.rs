//! Chat templates: the Jinja that checkpoints carry, rendered as transformers' `apply_chat_template` does, within limits.

mod guard;
mod python;

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::machinery::{eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, Value};
use minijinja::{AutoEscape, Environment, State};
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result, invalid};
use guard::{MAX_DEPTH, NODE_BYTES, failure};

/// A template's source; those in use have up to 20 KB.
pub const MAX_SOURCE_BYTES: usize = 256 << 10;
/// What a conversation may count: its bytes, and 64 for each value in it.
pub const MAX_INPUT_WEIGHT: u64 = 64 << 20;
/// Steps, or 64 times as many bytes, that a template may take: for itself, and for each byte of the conversation's weight.
/// Templates in use take less than a tenth of it.
const BASE_FUEL: u64 = 500_000;
const FUEL_PER_WEIGHT: u64 = 2;
/// What one value of a template may count, printed: for itself, and for each byte of the conversation's weight.
const BASE_LIMIT: u64 = 8 << 20;
const LIMIT_PER_WEIGHT: u64 = 4;
/// Address space for the engine's recursions, whatever stack the caller has; only what is used takes memory.
const STACK_BYTES: usize = 64 << 20;
/// Calls of macros, loops and scopes within each other (a macro counts 4).
const MAX_RECURSION: usize = 200;

/// A chat template. Immutable; shared by any number of threads.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

/// What is rendered.
#[derive(Clone, Copy)]
pub struct Conversation<'a> {
    /// A list of objects, usually with `role` and `content`.
    pub messages: &'a Json,
    /// A list of objects that describe functions.
    pub tools: Option<&'a Json>,
    /// A list of objects with `title` and `text`.
    pub documents: Option<&'a Json>,
    /// Ends the text with the beginning of the model's turn.
    pub add_generation_prompt: bool,
    /// The begin and end tokens' texts; empty if there are none.
    pub bos: &'a str,
    pub eos: &'a str,
    /// Variables of the template's own, such as `enable_thinking`.
    pub variables: Option<&'a Map<String, Json>>,
    /// What `strftime_now` takes for the time: seconds since 1970 as a clock on the wall shows it. By default it is UTC.
    pub now: Option<i64>,
}

impl<'a> Conversation<'a> {
    /// Messages and nothing else.
    pub fn new(messages: &'a Json) -> Conversation<'a> {
        Conversation {
            messages,
            tools: None,
            documents: None,
            add_generation_prompt: false,
            bos: "",
            eos: "",
            variables: None,
            now: None,
        }
    }
}

/// How much a rendering took of what it was given.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub fuel: u64,
    pub fuel_limit: u64,
}

impl ChatTemplate {
    /// # Errors
    /// `InvalidArgument` with the template engine's message.
    pub fn new(source: &str) -> Result<ChatTemplate> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(invalid!("the chat template has {} bytes, expected at most {MAX_SOURCE_BYTES}", source.len()));
        }
        // The engine counts lines and columns in 16 bits.
        let widest = source.lines().map(str::len).max().unwrap_or(0);
        if widest.max(source.lines().count()) >= usize::from(u16::MAX) {
            let n = source.lines().count();
            return Err(invalid!(
                "the chat template has {n} lines of up to {widest} bytes, expected below {}",
                u16::MAX
            ));
        }
        let syntax = syntax()?;
        let source = guard::prepare(source, &syntax).map_err(|e| invalid!("the chat template: {}", short(&e)))?;
        let template = ChatTemplate { environment: environment(), source };
        // To see that it compiles.
        on_own_stack(|| {
            parse(&template.source, "chat", syntax).and_then(|ast| guard::compile(&ast, &template.source).map(drop))
        })?
        .map_err(|e| invalid!("the chat template does not compile: {}", short(&e)))?;
        Ok(template)
    }

    /// The conversation as the model is to read it.
    ///
    /// # Errors
    /// `InvalidArgument`: the conversation is not of the form described at [`Conversation`], the template refuses it
    /// (`raise_exception`), has an error, or exceeds a limit.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        self.render_measured(conversation).map(|(text, _)| text)
    }

    /// The same, with what it took.
    pub fn render_measured(&self, conversation: &Conversation) -> Result<(String, Usage)> {
        let mut input = Input { weight: 0 };
        let root = input.root(conversation)?;
        let limit = BASE_LIMIT + LIMIT_PER_WEIGHT * input.weight;
        let fuel_limit = BASE_FUEL + FUEL_PER_WEIGHT * input.weight;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel_limit));
        guard::install(&mut environment, limit);
        let now = conversation.now.unwrap_or_else(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs().min(i64::MAX as u64) as i64)
        });
        // Beyond the years that have four digits nothing is well-defined.
        let now = now.clamp(-62_135_596_800, 253_402_300_799);
        environment.add_function("strftime_now", move |pattern: String| python::strftime(now, &pattern));
        let syntax = syntax()?;
        let rendered = on_own_stack(|| {
            let ast = parse(&self.source, "chat", syntax)?;
            let instructions = guard::compile(&ast, &self.source)?;
            let mut text = String::new();
            // Fuel pays for each byte of the output, and `limit` bounds what one step of the template writes.
            let mut output = make_string_output(&mut text);
            let blocks = Default::default();
            let (_, state) = eval(&environment, &instructions, root, &blocks, &mut output, AutoEscape::None)?;
            let fuel = state.fuel_levels().map_or(0, |(consumed, _)| consumed);
            Ok((text, Usage { fuel, fuel_limit }))
        })?;
        rendered.map_err(|e: minijinja::Error| invalid!("the chat template fails: {}", short(&e)))
    }
}

/// As transformers sets Jinja up.
fn syntax() -> Result<SyntaxConfig> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    syntax.map_err(|e| Error::Internal(e.to_string()))
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(python::method);
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("trim", python::trim);
    environment.add_filter("string", python::string);
    environment.add_filter("format", python::format_filter);
    environment.add_test("sequence", python::is_sequence);
    environment.add_test("iterable", python::is_sequence);
    // Jinja has no such filters and functions; among them is what prints without a bound and what makes lists that nest
    // without looking so.
    for name in ["pprint", "chain", "zip", "split", "lines", "bool"] {
        environment.remove_filter(name);
    }
    environment.remove_global("debug");
    environment.add_function("raise_exception", |state: &State, message: Rest<Value>| {
        let message = message.first().cloned().unwrap_or_default();
        Err::<Value, _>(failure(python::text_value(state, message)?.to_string()))
    });
    environment
}

/// Runs on a thread that has a stack of known size.
fn on_own_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("phd chat template".to_owned()).stack_size(STACK_BYTES);
        let thread = builder
            .spawn_scoped(scope, work)
            .map_err(|_| Error::OutOfMemory { what: "a stack for the chat template", bytes: STACK_BYTES })?;
        thread.join().map_err(|_| Error::Internal("the template engine panicked".to_owned()))
    })
}

/// An error's text, which a template may have made as long as it likes.
fn short(error: &minijinja::Error) -> String {
    const MAX_CHARS: usize = 500;
    struct Some500(String);
    impl fmt::Write for Some500 {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            let room = MAX_CHARS.saturating_sub(self.0.chars().count());
            self.0.extend(s.chars().take(room));
            if room == 0 { Err(fmt::Error) } else { Ok(()) }
        }
    }
    let mut text = Some500(String::new());
    let _ = fmt::write(&mut text, format_args!("{error}"));
    text.0
}

/// Turns JSON into the engine's values and weighs it.
struct Input {
    weight: u64,
}

impl Input {
    fn root(&mut self, c: &Conversation) -> Result<Value> {
        let messages = c.messages.as_array().ok_or_else(|| invalid!("messages is no list"))?;
        if messages.is_empty() {
            return Err(invalid!("messages is empty, expected one at least"));
        }
        let messages = messages.iter().enumerate().map(|(i, m)| self.message(m, &format!("messages[{i}]")));
        let messages = messages.collect::<Result<Vec<Value>>>()?;
        let mut root: Vec<(Value, Value)> = vec![("messages".into(), messages.into())];
        for (name, list) in [("tools", c.tools), ("documents", c.documents)] {
            let value = match list {
                None | Some(Json::Null) => Value::from(()),
                Some(json @ Json::Array(list)) => match list.iter().position(|item| !item.is_object()) {
                    Some(i) => return Err(invalid!("{name}[{i}] is no object")),
                    None => self.value(json, name, 0)?,
                },
                Some(_) => return Err(invalid!("{name} is no list")),
            };
            root.push((name.into(), value));
        }
        root.push(("add_generation_prompt".into(), c.add_generation_prompt.into()));
        for (name, text) in [("bos_token", c.bos), ("eos_token", c.eos)] {
            root.push((name.into(), text.into()));
        }
        for (name, json) in c.variables.into_iter().flatten() {
            if ["messages", "tools", "documents", "add_generation_prompt"].contains(&name.as_str()) {
                return Err(invalid!("variables.{name} is given beside the variables already"));
            }
            let value = self.value(json, &format!("variables.{name}"), 0)?;
            root.push((name.as_str().into(), value));
        }
        Ok(Value::from_pairs(root))
    }

    /// transformers leaves out what is null, and knows reasoning under three names.
    fn message(&mut self, json: &Json, path: &str) -> Result<Value> {
        let object = json.as_object().ok_or_else(|| invalid!("{path} is no object"))?;
        let mut fields: Vec<(&str, &Json)> =
            object.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.as_str(), v)).collect();
        let field = |name: &str| object.get(name).filter(|v| !v.is_null());
        let reasoning = ["reasoning_content", "thinking", "reasoning"].into_iter().find_map(field);
        if let Some(reasoning) = reasoning {
            if field("thinking").is_none() {
                fields.insert(0, ("thinking", reasoning));
            }
            if field("reasoning_content").is_none() {
                fields.push(("reasoning_content", reasoning));
            }
        }
        let mut pairs = Vec::with_capacity(fields.len());
        for (name, value) in fields {
            self.count(name.len(), path)?;
            pairs.push((Value::from(name), self.value(value, &format!("{path}.{name}"), 2)?));
        }
        self.count(0, path)?;
        Ok(Value::from_pairs(pairs))
    }

    fn value(&mut self, json: &Json, path: &str, depth: usize) -> Result<Value> {
        if depth > MAX_DEPTH / 2 {
            return Err(invalid!("{path} nests deeper than {} levels", MAX_DEPTH / 2));
        }
        self.count(json.as_str().map_or(0, str::len), path)?;
        Ok(match json {
            Json::Null => Value::from(()),
            Json::Bool(b) => Value::from(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(i), _) => Value::from(i),
                (None, Some(u)) => Value::from(u),
                (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(s) => Value::from(s.as_str()),
            Json::Array(list) => {
                let items =
                    list.iter().map(|item| self.value(item, path, depth + 1)).collect::<Result<Vec<Value>>>()?;
                Value::from(items)
            }
            Json::Object(map) => {
                let mut pairs = Vec::with_capacity(map.len());
                for (name, value) in map {
                    self.count(name.len(), path)?;
                    pairs.push((Value::from(name.as_str()), self.value(value, path, depth + 1)?));
                }
                Value::from_pairs(pairs)
            }
        })
    }

    fn count(&mut self, bytes: usize, path: &str) -> Result<()> {
        self.weight += NODE_BYTES + bytes as u64;
        if self.weight > MAX_INPUT_WEIGHT {
            return Err(invalid!(
                "{path}: the conversation is too large: it counts more than {MAX_INPUT_WEIGHT} bytes"
            ));
        }
        Ok(())
    }
}

/// Reads JSON that a caller passed as text; `name` is what it is for.
///
/// # Errors
/// `InvalidArgument` naming line and column.
pub fn parse_json(text: &[u8], name: &str) -> Result<Json> {
    const MAX_BYTES: usize = MAX_INPUT_WEIGHT as usize;
    if text.len() > MAX_BYTES {
        return Err(invalid!("{name} has {} bytes, expected at most {MAX_BYTES}", text.len()));
    }
    serde_json::from_slice(text).map_err(|e| invalid!("{name} is not JSON: {e}"))
}
