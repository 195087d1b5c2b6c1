//! The `phd` program as a user meets it.

mod common;

use std::process::{Command, Output};

fn phd(arguments: &[&str]) -> Output {
    let model = common::demo_model();
    let arguments = arguments.iter().map(|a| if *a == "MODEL" { model.to_str().unwrap() } else { a });
    Command::new(env!("CARGO_BIN_EXE_phd")).args(arguments).output().unwrap()
}

fn stdout(arguments: &[&str]) -> String {
    let output = phd(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn run_streams_the_reference_s_text() {
    let text = stdout(&["run", "MODEL", "-p", "In the beginning", "-n", "24", "--temp", "0"]);
    assert_eq!(
        text,
        "In the beginning of the Lord,\nAnd the greatest of the world, and all the world\nCannot be so,\n"
    );
    let seeded = |seed| stdout(&["run", "MODEL", "-p", "To be", "-n", "20", "--seed", seed]);
    assert_eq!(seeded("3"), seeded("3"));
    assert_ne!(seeded("3"), seeded("4"));
}

#[test]
fn drafts_change_no_text() {
    let plain = ["run", "MODEL", "-p", "In the beginning, in the", "-n", "40", "--seed", "3"];
    let text = stdout(&plain);
    let drafting: [&[&str]; 3] = [
        &["--draft-lookup", "4", "--draft-ngram", "1,4"],
        &["--draft-model", "MODEL", "--draft", "3"],
        &["--draft-model", "MODEL", "--draft-p-min", "0"],
    ];
    for options in drafting {
        let output = phd(&[&plain, options].concat());
        assert_eq!(String::from_utf8_lossy(&output.stdout), text, "{options:?}");
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(report.contains("drafts accepted"), "{options:?}: {report}");
    }
    for (options, word) in [(&["--draft-lookup", "0"][..], "n_draft is 0"), (&["--draft", "3"], "--draft-model")] {
        let output = phd(&[&plain, options].concat());
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(word), "{options:?}");
    }
}

#[test]
fn run_follows_a_schema_and_other_stages() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let schema =
        file("schema.json", r#"{"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}"#);
    let text =
        stdout(&["run", "MODEL", "-p", "Numbers: ", "--schema", &schema, "--seed", "5", "--dry-multiplier", "0.8"]);
    let numbers: Vec<f64> = serde_json::from_str(text.strip_prefix("Numbers: ").unwrap()).unwrap();
    assert!((2..=4).contains(&numbers.len()), "{text}");
    let grammar = file("grammar.lark", "start: /[a-c]{5}/");
    let text = stdout(&[
        "run",
        "MODEL",
        "-p",
        "x",
        "--grammar",
        &grammar,
        "--samplers",
        "xtc;top_k;temperature",
        "--cache",
        "bf16",
    ]);
    let word = text.trim_end().strip_prefix('x').unwrap();
    assert!(word.len() == 5 && word.bytes().all(|b| (b'a'..=b'c').contains(&b)), "{text}");
    let gbnf = file("grammar.gbnf", "root ::= \"(\" root \")\" | [d-f]{3} # nested\n");
    let text = stdout(&["run", "MODEL", "-p", "x", "--gbnf", &gbnf, "--seed", "3", "--temp", "0.2"]);
    let word = text.trim_end().trim_start_matches(['x', '(']).trim_end_matches(')');
    assert!(word.len() == 3 && word.bytes().all(|b| (b'd'..=b'f').contains(&b)), "{text}");
    let bad = file("bad.json", r#"{"uniqueItems": true}"#);
    let output = phd(&["run", "MODEL", "-p", "x", "--schema", &bad]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && message.contains("uniqueItems") && message.contains("bad.json"),
        "{message}"
    );
    let output = phd(&["run", "MODEL", "-p", "x", "--samplers", "top_k;top_q"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("top_q"));
}

#[test]
fn score_tells_k_2_from_k_1() {
    let file = common::demo_model().join("held_out.txt");
    let score = |more: &[&str]| -> f64 {
        let mut arguments =
            vec!["score", "MODEL", file.to_str().unwrap(), "--segment", "256", "--cache", "f32", "--json"];
        arguments.extend(more);
        let json: serde_json::Value = serde_json::from_str(&stdout(&arguments)).unwrap();
        assert_eq!(json["positions"], 4 * 255);
        json["mean_nll"].as_f64().unwrap()
    };
    let (phd, vanilla) = (score(&[]), score(&["--copies", "1"]));
    assert!((phd - 2.845).abs() < 0.02 && phd < vanilla - 0.002, "{phd} and {vanilla}");
}

#[test]
fn info_and_bench_report() {
    let info = stdout(&["info", "MODEL"]);
    assert!(info.contains("K = 2, W = 16, C = 32 (PHD-CSWA)") && info.contains("2.8 M"), "{info}");
    let timing = [
        "bench",
        "MODEL",
        "--prompt",
        "16",
        "--prefills",
        "1",
        "--context",
        "8,16",
        "--steps",
        "3",
        "--copies-list",
        "1,3",
    ];
    let json: serde_json::Value = serde_json::from_str(&stdout(&[&timing[..], &["--json"]].concat())).unwrap();
    for figure in ["prefill", "decode"] {
        assert_eq!(json[figure][1]["copies"], 3);
        let [ms, rate] = ["ms", "tokens_per_second"].map(|field| json[figure][1][field].as_f64().unwrap());
        let tokens = if figure == "prefill" { 16.0 } else { 1.0 };
        assert!((ms * rate / (1e3 * tokens) - 1.0).abs() < 1e-9, "{figure}: {ms} ms, {rate} tok/s");
    }
    let steps = json["steps"].as_array().unwrap();
    let of = |i: usize| (steps[i]["context"].as_u64().unwrap(), steps[i]["copies"].as_u64().unwrap());
    assert_eq!((0..steps.len()).map(of).collect::<Vec<_>>(), [(8, 1), (8, 3), (16, 1), (16, 3)]);
    for step in steps {
        for field in ["ms", "ratio", "gb_per_second", "bandwidth_gb_per_second", "share_of_bandwidth"] {
            assert!(step[field].as_f64().unwrap() > 0.0, "{field}: {step}");
        }
        let [gb, bandwidth, share] = ["gb_per_second", "bandwidth_gb_per_second", "share_of_bandwidth"]
            .map(|field| step[field].as_f64().unwrap());
        assert!((share * bandwidth / gb - 1.0).abs() < 1e-9, "{step}");
    }
    let table = stdout(&timing);
    assert!(table.contains(json["backend"].as_str().unwrap()) && table.contains("GB/s"), "{table}");
    assert!(table.contains("a token of 48 from an empty cache"), "{table}");
}

/// More threads than the process may use would only wait for each other, whatever is asked for.
#[cfg(target_os = "linux")]
#[test]
fn threads_stay_within_the_affinity() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let first = allowed.split([',', '-']).next().unwrap();
    for asked in ["0", "8"] {
        let model = common::demo_model();
        let output = Command::new("taskset")
            .args(["-c", first, env!("CARGO_BIN_EXE_phd"), "bench", model.to_str().unwrap(), "--threads", asked])
            .args(["--backend", "cpu", "--prompt", "8", "--context", "8", "--steps", "1", "--copies-list", "1", "--json"])
            .output()
            .unwrap();
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["threads"], 1, "asked for {asked}");
    }
}

#[test]
fn bench_times_what_servers_wait_for() {
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&stdout(&[&["bench", "MODEL"], arguments, &["--json"]].concat())).unwrap()
    };
    let cancel = json(&["--prompt", "1500", "--cancel", "8"]);
    let ms = |field: &str| cancel[field].as_f64().unwrap();
    assert!(cancel["cancelled"].as_u64().unwrap() > 0 && ms("median_ms") <= ms("worst_ms"), "{cancel}");
    assert!(ms("worst_ms") < ms("prefill_ms"), "{cancel}");
    let prefix = json(&["--prefix", "200", "--prefills", "1"]);
    // Blocks of two positions.
    assert_eq!(
        (prefix["grown_positions"].as_u64(), prefix["allocated"].as_bool()),
        (Some(16), Some(false)),
        "{prefix}"
    );
    assert!(prefix["ratio"].as_f64().unwrap() > 1.0, "{prefix}");
}

#[test]
fn mistakes_are_explained() {
    for (arguments, code, word) in [
        (vec!["run", "/no/such/model", "-p", "x"], 1, "/no/such/model"),
        (vec!["run", "MODEL", "-p", ""], 1, "no tokens"),
        (vec!["run", "MODEL", "-p", "x", "--cache", "q2"], 2, "q8_0"),
        (vec!["run", "MODEL"], 2, "--prompt"),
        (vec!["chat", "MODEL"], 1, "chat template"),
        (vec!["score", "MODEL", "/no/such/text"], 1, "/no/such/text"),
        (vec!["score", "MODEL", "Cargo.toml", "--segment", "1"], 1, "at least 2"),
    ] {
        let output = phd(&arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(word), "{arguments:?}: {message}");
    }
}
