//! Bounds on what a template can make. The engine's fuel pays for instructions and for the bytes of strings, but values
//! share their parts: a few instructions make a list that is 2^40 elements when it is printed or compared, one that is
//! nested deeper than the stack, or one that contains itself. So instructions that make values are followed by a check
//! of what they made, and instructions that read whole values are preceded by one that pays for the reading.

use minijinja::machinery::ast::Stmt;
use minijinja::machinery::{CodeGenerator, Instruction, Instructions, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{ObjectRepr, Value};
use minijinja::{Environment, Error, ErrorKind, State};

use super::python;

/// Levels of lists and dicts in lists and dicts.
pub(super) const MAX_DEPTH: usize = 128;
/// What a value counts at least, in bytes: about what it takes in memory.
pub(super) const NODE_BYTES: u64 = 64;
/// Nodes that one unit of fuel pays for. A step of the engine takes as long as looking at a dozen.
const NODES_PER_FUEL: u64 = 64;
/// Tokens between the braces of one tag: bounds how deep expressions nest. Templates in use have up to 250.
const MAX_TAG_TOKENS: usize = 4096;
/// `elif`s nest, too.
const MAX_ELIFS: usize = 1024;

// No template can spell these names.
const MADE: &str = "made!";
const READ: &str = "read!";
const TEXT: &str = "text!";
const STORED: &str = "stored!";
const REMAINDER: &str = "remainder!";
const ITERATED: &str = "iterated!";
const NAMESPACE: &str = "namespace!";

pub(super) fn failure(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// `{% generation %}` marks what the model says, for training; here it is a scope like any other.
pub(super) fn prepare(source: &str, syntax: &SyntaxConfig) -> Result<String, Error> {
    let mut out = String::with_capacity(source.len());
    let (mut copied, mut in_tag, mut elifs) = (0, 0, 0);
    let mut starts_block = false;
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token?;
        match token {
            Token::VariableStart | Token::BlockStart => in_tag = 0,
            Token::Ident(name @ ("generation" | "endgeneration")) if starts_block => {
                let (start, end) = (span.start_offset as usize, span.end_offset as usize);
                out.push_str(&source[copied..start]);
                out.push_str(if name == "generation" { "with" } else { "endwith" });
                copied = end;
            }
            Token::Ident("elif") if starts_block => elifs += 1,
            _ => in_tag += 1,
        }
        starts_block = matches!(token, Token::BlockStart);
        if in_tag > MAX_TAG_TOKENS || elifs > MAX_ELIFS {
            let line = span.start_line;
            return Err(failure(format!(
                "more than {MAX_TAG_TOKENS} tokens in a tag or {MAX_ELIFS} elifs (line {line})"
            )));
        }
    }
    out.push_str(&source[copied..]);
    Ok(out)
}

/// Compiles a parsed template with its checks.
pub(super) fn compile<'s>(ast: &Stmt<'s>, source: &'s str) -> Result<Instructions<'s>, Error> {
    let mut generator = CodeGenerator::new("chat", source);
    generator.compile_stmt(ast);
    let (plain, blocks) = generator.finish();
    if !blocks.is_empty() {
        return Err(failure("{% block %} is not for chat templates"));
    }
    // Where each instruction goes, its checks before it included.
    let mut places = Vec::new();
    let mut place = 0u32;
    while let Some(instruction) = plain.get(places.len() as u32) {
        places.push(place);
        let (before, after) = checks(instruction)?;
        place += before.len() as u32 + 1 + after.len() as u32;
    }
    places.push(place);
    let mut checked = Instructions::new("chat", source);
    for i in 0..places.len() as u32 - 1 {
        let Some(instruction) = plain.get(i) else { break };
        let (before, after) = checks(instruction)?;
        let moved = match instruction.clone() {
            Instruction::Iterate(to) => Instruction::Iterate(places[to as usize]),
            Instruction::Jump(to) => Instruction::Jump(places[to as usize]),
            Instruction::JumpIfFalse(to) => Instruction::JumpIfFalse(places[to as usize]),
            Instruction::JumpIfFalseOrPop(to) => Instruction::JumpIfFalseOrPop(places[to as usize]),
            Instruction::JumpIfTrueOrPop(to) => Instruction::JumpIfTrueOrPop(places[to as usize]),
            Instruction::BuildMacro(name, to, flags) => Instruction::BuildMacro(name, places[to as usize], flags),
            Instruction::Rem => filter(REMAINDER, 2),
            other => other,
        };
        for instruction in before.iter().chain([&moved]).chain(&after) {
            match (plain.get_span(i), plain.get_line(i)) {
                (Some(span), _) => checked.add_with_span(instruction.clone(), span),
                (None, Some(line)) => checked.add_with_line(instruction.clone(), line.min(u16::MAX.into()) as u16),
                (None, None) => checked.add(instruction.clone()),
            };
        }
    }
    Ok(checked)
}

fn filter(name: &'static str, n: u16) -> Instruction<'static> {
    // Not one of the slots in which the generator lets filters be remembered.
    Instruction::ApplyFilter(name, Some(n), u8::MAX)
}

/// What runs before and after an instruction.
fn checks(instruction: &Instruction) -> Result<(Vec<Instruction<'static>>, Vec<Instruction<'static>>), Error> {
    use Instruction as I;
    let both = |name| vec![I::Swap, filter(name, 1), I::Swap, filter(name, 1)];
    Ok(match instruction {
        I::BuildList(_)
        | I::BuildMap(_)
        | I::BuildTuple(_)
        | I::Slice
        | I::Add
        | I::Mul
        | I::ApplyFilter(..)
        | I::CallFunction(..)
        | I::CallMethod(..)
        | I::CallObject(_) => (vec![], vec![filter(MADE, 1)]),
        // The generator computes with constants.
        I::LoadConst(value) if value.as_object().is_some() && !value.is_kwargs() => (vec![], vec![filter(MADE, 1)]),
        I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte | I::In | I::CompareAndPreserve(_) => (both(READ), vec![]),
        I::PushLoop(_) => (vec![filter(ITERATED, 1)], vec![]),
        // A key is hashed.
        I::GetItem => (vec![filter(READ, 1)], vec![]),
        I::PerformTest(_, n, _) if *n != Some(1) => (vec![filter(READ, 1)], vec![]),
        I::StringConcat => (both(TEXT), vec![]),
        I::Emit => (vec![filter(TEXT, 1)], vec![]),
        I::SetAttr(name) if name.starts_with('_') => {
            return Err(failure(format!("a namespace cannot have the attribute {name}: it begins with _")));
        }
        I::SetAttr(_) => {
            let namespace = || I::Lookup(NAMESPACE);
            (vec![I::StoreLocal(NAMESPACE), namespace(), filter(STORED, 2), namespace()], vec![])
        }
        I::LoadBlocks | I::Include(_) | I::ExportLocals | I::CallBlock(_) | I::FastSuper | I::PushAutoEscape => {
            return Err(failure("include, import, extends, block and autoescape are not for chat templates"));
        }
        _ => (vec![], vec![]),
    })
}

/// Adds what the checks call. `limit` is what one value may count.
pub(super) fn install(environment: &mut Environment, limit: u64) {
    environment.add_filter(MADE, move |state: &State, value: Value| made(state, value, limit));
    environment.add_filter(READ, read);
    environment.add_filter(TEXT, python::text_value);
    environment.add_filter(ITERATED, |value: Value| match value.is_none() {
        true => Err(failure("None is not iterable")),
        false => Ok(value),
    });
    environment.add_filter(STORED, move |state: &State, value: Value, namespace: Value| {
        stored(state, value, &namespace, limit)
    });
    environment.add_filter(REMAINDER, python::remainder);
}

/// Counts a value and all that it contains, each part as often as it would be printed.
struct Scale {
    left: u64,
    nodes: u64,
}

impl Scale {
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.nodes += 1;
        let bytes = value.as_bytes().map_or(0, <[u8]>::len) as u64;
        self.left = self.left.checked_sub(NODE_BYTES + bytes).ok_or_else(|| failure("a value grows too large"))?;
        let Some(object) = value.as_object() else { return Ok(()) };
        if depth == MAX_DEPTH {
            return Err(failure(format!("values nest deeper than {MAX_DEPTH}")));
        }
        if !is_data(value) {
            return Err(failure("a list, dict or namespace can only hold data"));
        }
        if object.repr() == ObjectRepr::Map {
            for (key, value) in object.try_iter_pairs().into_iter().flatten() {
                self.add(&key, depth + 1)?;
                self.add(&value, depth + 1)?;
            }
        } else {
            for item in value.try_iter()? {
                self.add(&item, depth + 1)?;
            }
        }
        Ok(())
    }

    fn pay(&self, state: &State) -> Result<(), Error> {
        state.consume_fuel(self.nodes / NODES_PER_FUEL)
    }
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|o| o.type_name().ends_with("::Namespace"))
}

/// Lists, tuples and dicts; not namespaces, loops, macros, functions, nor what is made while it is read.
fn is_data(value: &Value) -> bool {
    value.as_object().is_none_or(|object| {
        matches!(object.repr(), ObjectRepr::Seq | ObjectRepr::Map)
            && !object.type_name().starts_with("minijinja::vm::")
            && !is_namespace(value)
    })
}

/// Checks what an instruction made. What would be made while it is read is made now.
fn made(state: &State, value: Value, limit: u64) -> Result<Value, Error> {
    let Some(object) = value.as_object() else { return Ok(value) };
    let mut scale = Scale { left: limit, nodes: 0 };
    if is_data(&value) {
        scale.add(&value, 0)?;
        scale.pay(state)?;
    } else if object.repr() == ObjectRepr::Iterable {
        let mut items = Vec::new();
        for item in value.try_iter()? {
            // An error of the engine's travels as an item.
            if let Some(error) = invalid(&item) {
                return Err(error);
            }
            scale.add(&item, 1)?;
            items.push(item);
        }
        scale.pay(state)?;
        return Ok(Value::from(items));
    } else if is_namespace(&value) {
        weigh_namespace(&value, &mut scale)?;
        scale.pay(state)?;
    }
    Ok(value)
}

fn invalid(value: &Value) -> Option<Error> {
    (value.kind() == minijinja::value::ValueKind::Invalid).then(|| failure(value.to_string()))
}

fn weigh_namespace(namespace: &Value, scale: &mut Scale) -> Result<(), Error> {
    for key in namespace.try_iter()? {
        let name = key.as_str().unwrap_or_default();
        if name.starts_with('_') {
            return Err(failure(format!("a namespace cannot have the attribute {name}: it begins with _")));
        }
        scale.add(&namespace.get_item(&key)?, 1)?;
    }
    Ok(())
}

/// Checks what is put into a namespace: it must not make a circle, and all of a namespace counts as one value.
fn stored(state: &State, value: Value, namespace: &Value, limit: u64) -> Result<Value, Error> {
    const SMALL: u64 = 1024;
    let mut scale = Scale { left: limit, nodes: 0 };
    scale.add(&value, 1)?;
    // The number of attributes is that of the source's words: small ones need no count.
    if limit - scale.left > SMALL && is_namespace(namespace) {
        weigh_namespace(namespace, &mut scale)?;
    }
    scale.pay(state)?;
    Ok(value)
}

/// Pays for a value that is compared or hashed as a whole.
fn read(state: &State, value: Value) -> Result<Value, Error> {
    let mut scale = Scale { left: u64::MAX, nodes: 0 };
    if let Some(bytes) = value.as_bytes() {
        state.consume_fuel(bytes.len() as u64 / 64)?;
    } else if is_namespace(&value) {
        weigh_namespace(&value, &mut scale)?;
    } else if value.as_object().is_some() && is_data(&value) {
        scale.add(&value, 0)?;
    }
    scale.pay(state)?;
    Ok(value)
}
