//! Chat templates against transformers (see `tests/data/chat/README.md`), and against hostile ones.

mod common;

use std::path::PathBuf;

use phd::tokenizer::chat::{ChatTemplate, Conversation};
use serde_json::{Value as Json, json};

/// 2026-03-07 09:05:03, as record.py has it.
const NOW: i64 = 1_772_874_303;

fn data(name: &str) -> PathBuf {
    common::root().join("tests/data/chat").join(name)
}

fn read(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

fn conversation(case: &Json) -> Conversation<'_> {
    Conversation {
        tools: case.get("tools"),
        documents: case.get("documents"),
        add_generation_prompt: case["add_generation_prompt"] == true,
        bos: "<s>",
        eos: "</s>",
        variables: case["variables"].as_object(),
        now: Some(NOW),
        ..Conversation::new(&case["messages"])
    }
}

/// What differs from the recorded text, or from the recorded failure.
fn difference(source: &str, case: &Json, expected: &Json) -> Option<String> {
    let found = ChatTemplate::new(source).and_then(|t| t.render_measured(&conversation(case)));
    match (&found, expected.as_str()) {
        (Ok((text, usage)), Some(expected)) if text == expected => {
            (usage.fuel > usage.fuel_limit / 10).then(|| format!("{usage:?}"))
        }
        (Err(phd::Error::InvalidArgument(_)), None) => None,
        (Ok((text, _)), _) => Some(format!("found    {text:?}\nexpected {expected}")),
        (Err(e), _) => Some(format!("found    {e}\nexpected {expected}")),
    }
}

/// 9 templates, 37 conversations: 333 renderings.
#[test]
fn templates_render_as_in_transformers() {
    let cases = read("cases.json");
    let (mut n, mut wrong) = (0, Vec::new());
    // Others, recorded elsewhere: FOLDER holds NAME.jinja and expected/NAME.json.
    let folder = std::env::var_os("PHD_CHAT_TEMPLATES").map_or_else(|| data(""), PathBuf::from);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|f| f.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().filter(|p| p.extension().is_some_and(|e| e == "jinja")) {
        let source = std::fs::read_to_string(path).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let expected = std::fs::read(folder.join(format!("expected/{name}.json"))).unwrap();
        let expected: Json = serde_json::from_slice(&expected).unwrap();
        for case in cases.as_array().unwrap() {
            let case_name = case["name"].as_str().unwrap();
            n += 1;
            wrong.extend(difference(&source, case, &expected[case_name]).map(|d| format!("{name}, {case_name}:\n{d}")));
        }
    }
    assert!(wrong.is_empty(), "{} of {n} differ\n{}", wrong.len(), wrong.join("\n"));
    assert!(n >= 9 * 37, "only {n} renderings");
}

#[test]
fn snippets_render_as_in_transformers() {
    let snippets = read("snippets.json");
    let mut wrong = Vec::new();
    for snippet in snippets.as_array().unwrap() {
        let mut case = snippet.clone();
        case["messages"] = json!([{"role": "user", "content": "Hi"}]);
        let source = snippet["source"].as_str().unwrap();
        wrong.extend(difference(source, &case, &snippet["expected"]).map(|d| format!("{source}\n{d}")));
    }
    assert!(wrong.is_empty(), "{} of {} differ\n{}", wrong.len(), snippets.as_array().unwrap().len(), wrong.join("\n"));
}
