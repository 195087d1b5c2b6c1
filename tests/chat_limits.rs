//! Hostile chat templates: none takes more memory, time or stack than is stated in `docs/text.md`. A program of its own,
//! because its allocator counts what all threads hold.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use phd::tokenizer::chat::{ChatTemplate, Conversation, MAX_SOURCE_BYTES};
use serde_json::json;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(held, Relaxed);
        // SAFETY: the caller's promises are those of `System.alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are those of `System.dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// docs/text.md states both.
const MAX_BYTES: usize = 256 << 20;
const MAX_TIME: Duration = Duration::from_secs(10);

/// `body` again and again, with a namespace `n` to carry what grows.
fn grow(start: &str, times: usize, step: &str, end: &str) -> String {
    format!(
        "{{% set n = namespace(x={start}) %}}{{% for i in range({times}) %}}{{% set n.x = {step} %}}{{% endfor %}}{end}"
    )
}

fn hostile() -> Vec<String> {
    let mut all = Vec::new();
    // Doubling strings.
    for step in [
        "n.x ~ n.x",
        "n.x + n.x",
        "n.x * 2",
        "n.x.replace('x', 'xx')",
        "[n.x, n.x]|join",
        "'%s%s'|format(n.x, n.x)",
        "'{0}{0}'.format(n.x)",
        "n.x.join([n.x, n.x])",
        "n.x|replace('', n.x)",
        "n.x.replace('', n.x)",
        "n.x|tojson",
        "[n.x]|string",
        "n.x|e",
        "n.x|indent(1000)",
        "n.x|upper",
        "'%(x)s%(x)s'|format(x=n.x)",
        "'ŉ' ~ n.x|upper ~ n.x",
    ] {
        all.push(grow("'x<'", 70, step, "{{ n.x }}"));
    }
    // Doubling containers, and what reads them.
    for step in [
        "[n.x, n.x]",
        "(n.x, n.x)",
        "{'a': n.x, 'b': n.x}",
        "{'a': [n.x] * 2}",
        "n.x + n.x",
        "n.x * 2",
        "[n.x]|batch(1)|list + [n.x]",
        "dict(a=n.x, b=n.x)",
        "[n.x, n.x]|map('list')|list",
        "[n.x, n.x]|zip([n.x, n.x])|list",
    ] {
        for end in [
            "{{ n.x }}",
            "{{ n.x ~ '' }}",
            "{{ n.x == [n.x] }}",
            "{{ n.x in [[n.x]] }}",
            "{{ n.x|tojson }}",
            "{{ n.x|string|length }}",
            "{{ {n.x: 1} }}",
            "{% set y %}{{ n.x }}{% endset %}",
            "{{ [n.x, n.x]|unique|list|length }}",
            "{{ [[n.x]|sort, n.x]|join }}",
        ] {
            all.push(grow("[1]", 70, step, end));
        }
    }
    // Deep and lazy ones: nesting beyond the stack.
    for step in [
        "[n.x]",
        "(n.x,)",
        "{'a': n.x}",
        "n.x[0:]",
        "n.x|reverse",
        "n.x[::-1]",
        "n.x + []",
        "n.x * 1",
        "n.x|map('string')",
        "n.x|select",
        "n.x|batch(1)",
        "n.x|list",
        "{'a': n.x}.items()",
        "[n.x]|map('reverse')|list",
        "[n.x]|map('list')",
        "n.x|items",
        "n.x|chain([])",
    ] {
        for end in ["", "{{ n.x }}", "{{ n.x == n.x[0:] }}", "{% for a in n.x %}{% endfor %}"] {
            all.push(grow("[1]", 100_000, step, end));
        }
    }
    // Circles.
    for body in [
        "{% set n.x = n %}{{ n }}",
        "{% set n.x = [n] %}{{ n|string }}",
        "{% set n.x = {'a': n} %}{{ n == n.x }}",
        "{% set m = namespace(y=n) %}{% set n.x = m %}{{ n|tojson }}",
        "{% for i in [1] %}{% set n.x = loop %}{{ loop.changed(n) }}{{ n.x }}{% endfor %}",
        "{% macro f() %}{{ n }}{% endmacro %}{% set n.x = f %}{{ n }}",
    ] {
        all.push(format!("{{% set n = namespace() %}}{body}"));
    }
    // Numbers that are sizes.
    for size in ["999999999", "99999999999999999999"] {
        for body in [
            "'x' * S",
            "[0] * S",
            "(0,) * S",
            "range(S)|list",
            "'x'.center(S)",
            "'x'.zfill(S)",
            "'x'.ljust(S, '漢')",
            "'a\\nb'|indent(S)",
            "[1]|batch(S, 'x')|list",
            "[1]|slice(S)|list",
            "[1]|tojson(indent=S)",
            "2.5|round(S)",
            "10 ** S",
            "'%Sd'|format(1)",
            "'%.Sf' % 1.5",
            "'%*d'|format(S, 1)",
            "'{:>S}'.format(1)",
            "'{:>{w}}'.format(1, w=S)",
            "'{:.Sf}'.format(1.5)",
            "[1, 2][::S]",
            "'x'.replace('', 'y', S)",
            "'x'.split('x', S)",
        ] {
            all.push(format!("{{{{ {} }}}}", body.replace('S', size)));
        }
    }
    // Much of something at once.
    let big = "{% set s = 'x' * 4000000 %}{% set w = s[:100000] %}";
    for body in [
        "{{ s.split('x')|length }}",
        "{{ s|list|length }}",
        "{{ s|e|e|e|e }}",
        "{{ s.replace('x', 'y' * 1000) }}",
        "{{ ('{0}' * 5000).format(s) }}",
        "{{ ('%(a)s' * 5000)|format(a=s) }}",
        "{{ ('%s' * 5)|format(s, s, s, s, s) }}",
        "{{ raise_exception(s) }}",
        "{{ [s] * 1000 }}",
        "{{ [s]|cycle }}",
        "{% for i in range(100000) %}{{ s == s ~ 'y' }}{% endfor %}",
        "{% for i in range(100000) %}{{ s in [s, s] }}{% endfor %}",
        "{% set l = w|list %}{% for i in range(100000) %}{{ l == l[:-1] + ['y'] }}{% endfor %}",
        "{% set l = w|list %}{% for i in range(100000) %}{{ l[0:] == l }}{% endfor %}",
        "{% for i in range(100000) %}{{ s }}{% endfor %}",
        "{% for i in range(100000) %}{% set x %}{{ w }}{% endset %}{% endfor %}",
        "{{ s|map('upper')|list|length }}",
        "{% for i in range(100000) %}{{ w.find('y') }}{{ w.count('xy') }}{{ w|length }}{{ w is eq(w ~ '') }}{% endfor %}",
        "{{ s|groupby('x') }}",
        "{{ s|unique|list }}",
        "{% for i in range(100000) %}{% macro m() %}{{ i }}{% endmacro %}{% set ns = namespace(a=i) %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ range(100000)|map('string')|join }}",
        "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = n.x + [{'a': i}] %}{% endfor %}",
        "{{ strftime_now('%A' * 100000) }}",
    ] {
        all.push(format!("{big}{body}"));
    }
    let many: String = (0..2000).map(|i| format!("{{% set n.a{i} = s %}}")).collect();
    for end in
        ["{{ n }}", "{{ n ~ '' }}", "{{ n|string }}", "{{ n|items|list }}", "{{ '%s'|format(n) }}", "{{ n|tojson }}"]
    {
        all.push(format!("{{% set n = namespace() %}}{big}{many}{end}"));
        all.push(format!("{{% set n = namespace() %}}{}{many}{end}", big.replace("4000000", "1000")));
    }
    // Recursion.
    for body in [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(x) %}{{ m([x, x]) }}{% endmacro %}{{ m([1]) }}",
        "{% macro m(x) %}{{ m(x[0:]) }}{{ x }}{% endmacro %}{{ m([1]) }}",
        "{% macro m(x) %}{{ m(x ~ x) }}{{ m(x) }}{% endmacro %}{{ m('x') }}",
        "{% for x in [1] recursive %}{{ loop([x, [x]]) }}{% endfor %}",
        "{% for x in [[1]] recursive %}{{ loop([[x, x]]) }}{% endfor %}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro r() %}{% call m() %}{{ r() }}{% endcall %}{% endmacro %}{{ r() }}",
        "{% include 'chat' %}",
        "{% extends 'chat' %}",
        "{{ self }}{% block a %}{{ super() }}{% endblock %}",
    ] {
        all.push(body.to_owned());
    }
    let nested = |n: usize, open: &str, close: &str| format!("{}1{}", open.repeat(n), close.repeat(n));
    all.push(nested(45, "{% for x in [[x, x]] %}", "{{ x }}{% endfor %}"));
    // Sources that nest deeper than a parser, a compiler or a destructor may recurse.
    let fill = |unit: &str| unit.repeat((MAX_SOURCE_BYTES - 200) / unit.len());
    for unit in ["[0]", ".a", "|d", "~x", "+1", "(1)", " or x", " if x else x", "==x", "[0:]", " is defined"] {
        all.push(format!("{{{{ x{} }}}}", fill(unit)));
        all.push(format!("{{% set x = x{} %}}", unit.repeat(1000)));
    }
    for unit in [
        "(",
        "[",
        "{'a':",
        "-",
        "not ",
        "{% if x %}",
        "{% for x in [1] %}",
        "{% set x %}",
        "{% filter upper %}",
        "{% generation %}",
        "{% macro m() %}",
        "{% raw %}",
        "{{ '",
    ] {
        all.push(if unit.starts_with("{%") || unit.starts_with("{{") {
            fill(unit)
        } else {
            format!("{{{{ {}", fill(unit))
        });
    }
    all.push(format!("{{% if 0 %}}{}{{% endif %}}", fill("{% elif x %}")));
    all.push(fill("{% set x = [x] %}"));
    all.push(fill("{% set x = x[0:] %}"));
    all.push("x".repeat(MAX_SOURCE_BYTES + 1));
    all
}

#[test]
fn hostile_templates_stay_within_bounds() {
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let (mut worst_bytes, mut worst_time) = ((0, String::new()), (Duration::ZERO, String::new()));
    let templates = hostile();
    for source in &templates {
        let shown: String = source.chars().take(200).collect();
        let before = HELD.load(Relaxed);
        PEAK.store(before, Relaxed);
        let begin = Instant::now();
        let result = ChatTemplate::new(source).and_then(|t| t.render(&Conversation::new(&messages)));
        drop(result.map_err(|e| assert!(matches!(e, phd::Error::InvalidArgument(_)), "{shown}: {e:?}")));
        let (time, bytes) = (begin.elapsed(), PEAK.load(Relaxed) - before);
        if std::env::var_os("PHD_VERBOSE").is_some() {
            println!("{:>8.1?} {:>5} MiB {shown}", time, bytes >> 20);
        }
        worst_bytes = std::cmp::max(worst_bytes, (bytes, shown.clone()));
        worst_time = std::cmp::max(worst_time, (time, shown));
    }
    println!(
        "{} templates; most memory {} MiB: {}; most time {:?}: {}",
        templates.len(),
        worst_bytes.0 >> 20,
        worst_bytes.1,
        worst_time.0,
        worst_time.1
    );
    assert!(worst_bytes.0 <= MAX_BYTES, "{} bytes: {}", worst_bytes.0, worst_bytes.1);
    assert!(worst_time.0 <= MAX_TIME, "{:?}: {}", worst_time.0, worst_time.1);
}

/// A long conversation in the templates of the table takes a small part of what it may, and gets all of it.
#[test]
fn long_conversations_fit() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat");
    let turn = |i: usize| json!({"role": if i.is_multiple_of(2) { "user" } else { "assistant" }, "content": format!("{i} {}", "word ".repeat(1 + i % 50))});
    for n in [201, 2001] {
        let messages: serde_json::Value = (0..n).map(turn).collect();
        let size = messages.to_string().len();
        for path in std::fs::read_dir(&folder)
            .unwrap()
            .map(|f| f.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "jinja"))
        {
            let template = ChatTemplate::new(&std::fs::read_to_string(&path).unwrap()).unwrap();
            let begin = Instant::now();
            let (text, usage) = template.render_measured(&Conversation::new(&messages)).unwrap();
            println!(
                "{}: {n} messages, {size} bytes, {:?}, {usage:?}",
                path.file_stem().unwrap().display(),
                begin.elapsed()
            );
            assert!(
                text.contains(&format!("{} word", n - 1)) && usage.fuel < usage.fuel_limit / 4,
                "{}: {usage:?}",
                path.display()
            );
        }
    }
}
