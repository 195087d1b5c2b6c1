//! What templates take for granted of Python, as far as the engine differs: how values print, `json.dumps`, `strftime`,
//! what counts as white space, and some methods.

use std::cmp::Ordering;
use std::fmt::Write;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, ObjectRepr, Rest, Tuple, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State};

use super::guard::failure;

/// Fuel for each byte of text that is made of a container, and bytes that one unit buys elsewhere: the engine's own prices.
const BYTES_PER_FUEL: u64 = 64;
const PRINTED_BYTES_PER_FUEL: u64 = 4;

/// Text up to what the remaining fuel pays for.
struct Text {
    out: String,
    room: usize,
}

impl Text {
    fn new(state: &State) -> Text {
        let fuel = state.fuel_levels().map_or(0, |(_, remaining)| remaining);
        Text { out: String::new(), room: (fuel * PRINTED_BYTES_PER_FUEL) as usize }
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.out.len() + text.len() > self.room {
            return Err(Error::from(ErrorKind::OutOfFuel));
        }
        self.out.push_str(text);
        Ok(())
    }

    fn pay(self, state: &State) -> Result<String, Error> {
        state.consume_fuel(self.out.len() as u64 / PRINTED_BYTES_PER_FUEL)?;
        Ok(self.out)
    }
}

/// The shortest digits that read back as `f`, with an exponent below 1e-4 and from 1e16 on.
fn float(f: f64) -> String {
    if !f.is_finite() {
        return if f.is_nan() {
            "nan"
        } else if f > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{f:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if !(-4..16).contains(&e) => format!("{mantissa}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs()),
        _ if f.fract() == 0.0 => format!("{f:.1}"),
        _ => format!("{f}"),
    }
}

fn as_float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok())?
}

/// A value as `{{ }}` prints it, where the engine prints something else: containers and floats.
pub(super) fn text_value(state: &State, value: Value) -> Result<Value, Error> {
    match (as_float(&value), value.as_object()) {
        (Some(f), _) => Ok(Value::from(float(f))),
        (_, Some(_)) => {
            let mut text = Text::new(state);
            repr(&value, &mut text)?;
            text.pay(state).map(Value::from)
        }
        _ => Ok(value),
    }
}

/// `str(value)`.
pub(super) fn string(state: &State, value: Value) -> Result<String, Error> {
    text_value(state, value).map(|v| v.to_string())
}

/// `repr(value)`. The guard bounds how deep values nest.
fn repr(value: &Value, out: &mut Text) -> Result<(), Error> {
    if let Some(f) = as_float(value) {
        return out.push(&float(f));
    }
    if let Some(s) = value.as_str() {
        return repr_string(s, out);
    }
    let Some(object) = value.as_object() else { return out.push(&value.to_string()) };
    match object.repr() {
        ObjectRepr::Map => {
            out.push("{")?;
            for (i, (key, value)) in object.try_iter_pairs().into_iter().flatten().enumerate() {
                out.push(if i > 0 { ", " } else { "" })?;
                repr(&key, out)?;
                out.push(": ")?;
                repr(&value, out)?;
            }
            out.push("}")
        }
        ObjectRepr::Seq => {
            let tuple = value.is_tuple();
            out.push(if tuple { "(" } else { "[" })?;
            for (i, item) in value.try_iter()?.enumerate() {
                out.push(if i > 0 { ", " } else { "" })?;
                repr(&item, out)?;
            }
            out.push(if tuple && value.len() == Some(1) { "," } else { "" })?;
            out.push(if tuple { ")" } else { "]" })
        }
        _ => Err(failure(format!("a {} has no text", value.kind()))),
    }
}

fn repr_string(s: &str, out: &mut Text) -> Result<(), Error> {
    let quote = if s.contains('\'') && !s.contains('"') { "\"" } else { "'" };
    out.push(quote)?;
    for c in s.chars() {
        let mut buffer = [0; 4];
        match c {
            '\\' => out.push("\\\\")?,
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            '\'' if quote == "'" => out.push("\\'")?,
            ' '..='~' => out.push(c.encode_utf8(&mut buffer))?,
            // Rust escapes the same characters in the middle of a string, in another spelling.
            _ if !c.is_ascii() && !format!("{:?}", format!("a{c}")).contains('\\') => {
                out.push(c.encode_utf8(&mut buffer))?;
            }
            _ => out.push(&match u32::from(c) {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ ..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            })?,
        }
    }
    out.push(quote)
}

/// How `json.dumps` writes.
struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: transformers' filter, which is
/// `json.dumps`; Jinja's own escapes for HTML.
pub(super) fn tojson(state: &State, value: Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut args = args.into_values();
    // Of nothing there are no keyword arguments.
    let kwargs = Kwargs::try_from(args.pop_if(|last| last.is_kwargs()).unwrap_or_default())?;
    let argument = |i: usize, name: &str| match args.get(i) {
        Some(value) => Ok(value.clone()),
        None => kwargs.get::<Option<Value>>(name).map(Option::unwrap_or_default),
    };
    let indent = argument(1, "indent")?;
    const MAX_INDENT: usize = 32;
    let indent = match (indent.as_str(), indent.is_none() || indent.is_undefined()) {
        (Some(s), _) => Some(s.to_owned()),
        (None, true) => None,
        (None, false) => Some(" ".repeat(i64::try_from(indent)?.clamp(0, MAX_INDENT as i64 + 1) as usize)),
    };
    if indent.as_ref().is_some_and(|s| s.len() > MAX_INDENT) {
        return Err(failure(format!("tojson indents by {MAX_INDENT} bytes at most")));
    }
    let separators = argument(2, "separators")?;
    let (item_separator, key_separator) = if separators.is_none() || separators.is_undefined() {
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
    } else {
        let pair: Vec<Value> = separators.try_iter()?.collect();
        match pair.as_slice() {
            [item, key] => (item.to_string(), key.to_string()),
            _ => return Err(failure("separators are not a pair")),
        }
    };
    let style = Style {
        ensure_ascii: argument(0, "ensure_ascii")?.is_true(),
        indent,
        item_separator,
        key_separator,
        sort_keys: argument(3, "sort_keys")?.is_true(),
    };
    kwargs.assert_all_used()?;
    let mut text = Text::new(state);
    dump(&value, &style, 0, &mut text)?;
    text.pay(state).map(Value::from)
}

fn line(style: &Style, depth: usize, out: &mut Text) -> Result<(), Error> {
    let Some(indent) = &style.indent else { return Ok(()) };
    out.push("\n")?;
    (0..depth).try_for_each(|_| out.push(indent))
}

fn dump(value: &Value, style: &Style, depth: usize, out: &mut Text) -> Result<(), Error> {
    let Some(object) = value.as_object() else { return dump_scalar(value, style, out) };
    let (open, close) = match object.repr() {
        ObjectRepr::Map => ("{", "}"),
        ObjectRepr::Seq => ("[", "]"),
        _ => return Err(failure(format!("a {} has no JSON", value.kind()))),
    };
    out.push(open)?;
    let mut n = 0;
    let mut begin = |out: &mut Text| {
        n += 1;
        out.push(if n > 1 { &style.item_separator } else { "" })?;
        line(style, depth + 1, out)
    };
    if object.repr() == ObjectRepr::Map {
        let mut pairs: Vec<(Value, Value)> = object.try_iter_pairs().into_iter().flatten().collect();
        if style.sort_keys {
            pairs.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal));
        }
        for (key, value) in &pairs {
            begin(out)?;
            match (key.as_str(), key.as_object()) {
                (Some(_), _) => dump_scalar(key, style, out)?,
                (None, None) => {
                    out.push("\"")?;
                    dump_scalar(key, style, out)?;
                    out.push("\"")?;
                }
                (None, Some(_)) => return Err(failure(format!("a {} is no key in JSON", key.kind()))),
            }
            out.push(&style.key_separator)?;
            dump(value, style, depth + 1, out)?;
        }
    } else {
        for item in value.try_iter()? {
            begin(out)?;
            dump(&item, style, depth + 1, out)?;
        }
    }
    if n > 0 {
        line(style, depth, out)?;
    }
    out.push(close)
}

fn dump_scalar(value: &Value, style: &Style, out: &mut Text) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push("null"),
        ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => match as_float(value) {
            Some(f) if f.is_nan() => out.push("NaN"),
            Some(f) if f.is_infinite() => out.push(if f > 0.0 { "Infinity" } else { "-Infinity" }),
            Some(f) => out.push(&float(f)),
            None => out.push(&value.to_string()),
        },
        ValueKind::String => dump_string(value.as_str().unwrap_or_default(), style, out),
        other => Err(failure(format!("{other} has no JSON"))),
    }
}

fn dump_string(s: &str, style: &Style, out: &mut Text) -> Result<(), Error> {
    out.push("\"")?;
    for c in s.chars() {
        let mut buffer = [0; 4];
        match c {
            '"' => out.push("\\\"")?,
            '\\' => out.push("\\\\")?,
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            '\u{8}' => out.push("\\b")?,
            '\u{c}' => out.push("\\f")?,
            ' '..='~' => out.push(c.encode_utf8(&mut buffer))?,
            '\u{7f}'.. if !style.ensure_ascii => out.push(c.encode_utf8(&mut buffer))?,
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push(&format!("\\u{unit:04x}"))?;
                }
            }
        }
    }
    out.push("\"")
}

/// `str.isspace`: Rust's white space and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

pub(super) fn trim(state: &State, value: Value, chars: Option<String>) -> Result<String, Error> {
    Ok(strip(&string(state, value)?, chars.as_deref(), true, true).to_owned())
}

fn strip<'a>(s: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let chars: Option<Vec<char>> = chars.map(|s| s.chars().collect());
    let matches = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(&c));
    let s = if left { s.trim_start_matches(matches) } else { s };
    if right { s.trim_end_matches(matches) } else { s }
}

/// The tests `sequence` and `iterable`: whatever has items. The engine counts None among them, and strings not.
pub(super) fn is_sequence(value: Value) -> bool {
    value.is_undefined() || value.as_str().is_some() || value.as_object().is_some_and(|o| o.repr() != ObjectRepr::Plain)
}

/// `%`: the engine has it for numbers only.
pub(super) fn remainder(state: &State, a: Value, b: Value) -> Result<Value, Error> {
    if let Some(s) = a.as_str() {
        let args = if b.is_tuple() { b.try_iter()?.collect() } else { vec![b] };
        return formatted(state, FormatStyle::Printf, s, &args).map(Value::from);
    }
    let zero = || failure("division by zero");
    match (a.as_i64(), b.as_i64()) {
        // Of a number that is none, or a float.
        (Some(x), Some(y)) if a.is_integer() && b.is_integer() => {
            let r = x.checked_rem(y).ok_or_else(zero)?;
            Ok(Value::from(if r != 0 && (r < 0) != (y < 0) { r + y } else { r }))
        }
        _ => {
            let (x, y) = (f64::try_from(a)?, f64::try_from(b)?);
            let r = x % y;
            match y == 0.0 {
                true => Err(zero()),
                false => Ok(Value::from(if r != 0.0 && (r < 0.0) != (y < 0.0) { r + y } else { r })),
            }
        }
    }
}

/// The filter `format`: printf style.
pub(super) fn format_filter(state: &State, s: String, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    formatted(state, FormatStyle::Printf, &s, &args.into_values())
}

/// Formats what fuel can pay for: the engine does not price widths, nor arguments that are used again.
fn formatted(state: &State, style: FormatStyle, s: &str, args: &[Value]) -> Result<String, Error> {
    const MAX_WIDTH_DIGITS: usize = 3;
    let mut digits = 0;
    for b in s.bytes() {
        digits = if b.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > MAX_WIDTH_DIGITS || b == b'*' {
            return Err(failure("a format string can have no * and no number of more than 3 digits"));
        }
    }
    let (sign, nested) = match style {
        FormatStyle::Printf => ('%', false),
        _ => ('{', s.split('{').any(|part| part.contains(':') && !part.contains('}'))),
    };
    if nested {
        return Err(failure("a width in a format string has to be a number"));
    }
    let mut longest = 1000;
    for arg in args {
        let text = match arg.as_str() {
            Some(s) => s.len(),
            None => string(state, arg.clone())?.len(),
        };
        longest = longest.max(text as u64);
    }
    let fields = s.matches(sign).count() as u64;
    state.consume_fuel(fields * (longest + 1000) / BYTES_PER_FUEL)?;
    format(style, s, args)
}

/// Methods of strings, lists and dicts.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), value.kind()) {
        (Some(s), _) => string_method(state, s, value, name, args),
        (_, ValueKind::Seq) if name == "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *what);
            at.map(Value::from).ok_or_else(|| failure("index: not in the list"))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn string_method(state: &mut State, s: &str, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let tuple = |a: &str, b: &str, c: &str| Value::from(Tuple::from([a, b, c].map(Value::from).to_vec()));
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(Value::from(strip(s, chars, name != "rstrip", name != "lstrip")))
        }
        "split" | "rsplit" => {
            let (separator, n): (Option<&str>, Option<i64>) = from_args(args)?;
            if separator == Some("") {
                return Err(failure("split: the separator is empty"));
            }
            // A list slot costs half a unit.
            let pieces = separator.map_or_else(|| s.split(is_space).count(), |sep| s.matches(sep).count());
            state.consume_fuel(pieces as u64 / 2)?;
            let n = n.filter(|&n| n >= 0).map_or(usize::MAX, |n| n as usize);
            Ok(Value::from(split(s, separator, n, name == "rsplit")))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let right = name == "rpartition";
            Ok(match if right { s.rsplit_once(separator) } else { s.split_once(separator) } {
                Some((a, b)) => tuple(a, separator, b),
                None if right => tuple("", "", s),
                None => tuple(s, "", ""),
            })
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(s.strip_prefix(prefix).unwrap_or(s)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(s.strip_suffix(suffix).unwrap_or(s)))
        }
        "index" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            let at = if name == "index" { s.find(what) } else { s.rfind(what) };
            let at = at.ok_or_else(|| failure(format!("{name}: not in the string")))?;
            Ok(Value::from(s[..at].chars().count()))
        }
        "zfill" | "ljust" | "rjust" | "center" => {
            let (width, c): (u64, Option<&str>) = from_args(args)?;
            let c = c.and_then(|c| c.chars().next()).unwrap_or(' ');
            let missing = width.saturating_sub(s.chars().count() as u64);
            state.consume_fuel(missing / (BYTES_PER_FUEL / 4))?;
            let missing = missing as usize;
            let fill = |n: usize, c: char| c.to_string().repeat(n);
            Ok(Value::from(match name {
                "zfill" => {
                    let sign = usize::from(s.starts_with(['+', '-']));
                    format!("{}{}{}", &s[..sign], fill(missing, '0'), &s[sign..])
                }
                "ljust" => format!("{s}{}", fill(missing, c)),
                "rjust" => format!("{}{s}", fill(missing, c)),
                _ => {
                    // The odd one goes to the left if the width is odd.
                    let left = missing / 2 + (missing & width as usize & 1);
                    format!("{}{s}{}", fill(left, c), fill(missing - left, c))
                }
            }))
        }
        "isspace" => Ok(Value::from(!s.is_empty() && s.chars().all(is_space))),
        "format" => formatted(state, FormatStyle::StrFormat, s, args).map(Value::from),
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (i, item) in items.try_iter()?.enumerate() {
                let item = item.as_str().map(str::to_owned).ok_or_else(|| failure("join: an item is not a string"))?;
                state.consume_fuel((s.len() + item.len()) as u64 / BYTES_PER_FUEL)?;
                let _ = write!(out, "{}{item}", if i > 0 { s } else { "" });
            }
            Ok(Value::from(out))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn split(s: &str, separator: Option<&str>, n: usize, from_right: bool) -> Vec<Value> {
    let limit = n.saturating_add(1);
    let mut pieces: Vec<&str> = match (separator, from_right) {
        (Some(separator), false) => s.splitn(limit, separator).collect(),
        (Some(separator), true) => s.rsplitn(limit, separator).collect(),
        (None, _) => {
            let (mut rest, mut pieces) = (strip(s, None, true, true), Vec::new());
            while !rest.is_empty() {
                let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(at) = cut.filter(|_| pieces.len() < n) else {
                    pieces.push(rest);
                    break;
                };
                let (left, right) = (&rest[..at], &rest[at..]);
                let (piece, other) = if from_right { (strip(right, None, true, false), left) } else { (left, right) };
                pieces.push(piece);
                rest = strip(other, None, !from_right, from_right);
            }
            pieces
        }
    };
    if from_right {
        pieces.reverse();
    }
    pieces.into_iter().map(Value::from).collect()
}

/// `datetime.strftime` of the C locale, for a time in seconds since 1970 as a clock on the wall shows it.
pub(super) fn strftime(seconds: i64, pattern: &str) -> Result<String, Error> {
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (weekday, month_name) = (DAYS[(days + 4).rem_euclid(7) as usize], MONTHS[month as usize - 1]);
    let mut out = String::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let number = |n: i64, width: usize| if bare { n.to_string() } else { format!("{n:0width$}") };
        let text = match directive {
            Some('d') => number(day, 2),
            Some('m') => number(month, 2),
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(days - days_before(year) + 1, 3),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year:04}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => return Err(failure(format!("strftime: %{} is not implemented", other.unwrap_or(' ')))),
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar. Years are counted from March, so that
/// the leap day is their last.
fn date(days: i64) -> (i64, i64, i64) {
    let day = days + 719_468;
    let (era, day) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    (era * 400 + year + i64::from(month <= 2), month, day)
}

/// Days from 1970 to the first of January.
fn days_before(year: i64) -> i64 {
    let y = year - 1;
    y * 365 + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) - 719_162
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_s() {
        for (f, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (123456789.125, "123456789.125"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(float(f), text);
        }
    }

    /// Every day of 400 years, which is when the calendar repeats.
    #[test]
    fn dates_follow_each_other() {
        let mut expected = (1970, 1, 1);
        for days in 0..146_097 {
            assert_eq!(date(days), expected);
            let (year, month, day) = expected;
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + i64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            if (month, day) == (1, 1) {
                assert_eq!(days_before(year), days);
            }
            expected = match (day == length, month == 12) {
                (false, _) => (year, month, day + 1),
                (true, false) => (year, month + 1, 1),
                (true, true) => (year + 1, 1, 1),
            };
        }
        assert_eq!(date(-1), (1969, 12, 31));
    }
}
