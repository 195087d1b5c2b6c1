//! The `phd` program as a user meets it.

mod common;

use std::process::{Command, Output};

use serde_json::Value;

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
        let json: Value = serde_json::from_str(&stdout(&arguments)).unwrap();
        assert_eq!(json["positions"], 4 * 255);
        json["mean_nll"].as_f64().unwrap()
    };
    let (phd, vanilla) = (score(&[]), score(&["--copies", "1"]));
    assert!((phd - 2.845).abs() < 0.02 && phd < vanilla - 0.002, "{phd} and {vanilla}");
}

/// Bytes of the matrices and of all tensors in a checkpoint's file, by its header.
fn stored_bytes() -> (usize, usize) {
    let bytes = std::fs::read(common::demo_model().join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let of = |n_dims: usize| {
        let tensors = file.tensors().into_iter().map(|(_, tensor)| tensor);
        tensors.filter(|t| t.shape().len() >= n_dims).map(|t| t.data().len()).sum()
    };
    (of(2), of(0))
}

fn is_same(found: f64, expected: f64) -> bool {
    (found / expected - 1.0).abs() < 1e-9
}

#[test]
fn info_and_bench_report() {
    let info = stdout(&["info", "MODEL", "--backend", "cpu"]);
    assert!(info.contains("K = 2, W = 16, C = 32 (PHD-CSWA)") && info.contains("2.8 M"), "{info}");
    let timing = [
        ["bench", "MODEL"],
        ["--backend", "cpu"],
        ["--threads", "1"],
        ["--prompt", "16"],
        ["--prefills", "1"],
        ["--context", "8,16"],
        ["--steps", "3"],
        ["--copies-list", "1,3"],
        ["--sequences", "1,2"],
    ]
    .concat();
    let json: Value = serde_json::from_str(&stdout(&[&timing[..], &["--json"]].concat())).unwrap();
    let backend = json["backend"].as_str().unwrap();
    assert!(info.lines().any(|line| line.strip_prefix("backend ").is_some_and(|b| b.trim() == backend)), "{info}");
    let variant = backend.strip_prefix("cpu (").and_then(|b| b.strip_suffix(')'));
    assert!(variant.is_some_and(|v| phd::backend::cpu::variants().contains(&v)), "{backend}");
    assert_eq!(json["threads"], 1);
    // Embeddings are tied: the table is the head, which every pass reads. Norms are in the file beside the matrices.
    let (matrices, all) = stored_bytes();
    let weights = json["weight_bytes_per_pass"].as_u64().unwrap() as usize;
    assert!(weights == matrices && weights < all, "{weights} of {matrices} in {all}");

    let number = |of: &Value, field: &str| of[field].as_f64().unwrap_or_else(|| panic!("{field}: {of}"));
    for figure in ["prefill", "decode"] {
        let timed = json[figure].as_array().unwrap();
        assert_eq!(timed.iter().map(|t| t["copies"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3], "{figure}");
        let tokens = if figure == "prefill" { 16.0 } else { 1.0 };
        for t in timed {
            let ms = number(t, "ms");
            assert!(ms > 0.0 && is_same(number(t, "tokens_per_second"), 1e3 * tokens / ms), "{figure}: {t}");
            assert!(is_same(number(t, "ratio"), ms / number(&timed[0], "ms")), "{figure}: {t}");
        }
        assert_eq!(timed[0]["ratio"], 1.0, "{figure}");
    }

    let steps = json["steps"].as_array().unwrap();
    let of = |step: &Value| (step["context"].as_u64().unwrap(), step["copies"].as_u64().unwrap());
    assert_eq!(steps.iter().map(of).collect::<Vec<_>>(), [(8, 1), (8, 3), (16, 1), (16, 3)]);
    for step in steps {
        let first = steps.iter().find(|s| s["context"] == step["context"]).unwrap();
        let ms = number(step, "ms");
        assert!(ms > 0.0 && is_same(number(step, "tokens_per_second"), 1e3 / ms), "{step}");
        assert!(is_same(number(step, "ratio"), ms / number(first, "ms")), "{step}");
        let [gb, bandwidth, share] =
            ["gb_per_second", "bandwidth_gb_per_second", "share_of_bandwidth"].map(|field| number(step, field));
        assert!(gb > 0.0 && bandwidth > 0.0 && is_same(share * bandwidth, gb), "{step}");
    }
    // A step reads the weights and the cached positions: their keys and values in f16 in six layers of two heads of 32 dimensions, and
    // what pads a block.
    let cached = |i: usize| number(&steps[i], "gb_per_second") * number(&steps[i], "ms") * 1e6 - weights as f64;
    for (i, step) in steps.iter().enumerate() {
        let rows = number(step, "context") * (6 * 2 * 2 * 32 * 2) as f64;
        assert!((rows - 1.0..rows * 1.2).contains(&cached(i)), "{} of {rows}: {step}", cached(i));
    }
    for copies in 0..2 {
        assert!(
            (cached(2 + copies) / cached(copies) - 2.0).abs() < 1e-4,
            "{} and {}",
            cached(copies),
            cached(2 + copies)
        );
    }

    let together = json["together"].as_array().unwrap();
    let of = |t: &Value| (t["sequences"].as_u64().unwrap(), t["copies"].as_u64().unwrap());
    assert_eq!(together.iter().map(of).collect::<Vec<_>>(), [(1, 1), (1, 3), (2, 1), (2, 3)]);
    for t in together {
        let (ms, n) = (number(t, "ms"), number(t, "sequences"));
        assert!(ms > 0.0 && is_same(number(t, "tokens_per_second"), 1e3 * n / ms), "{t}");
    }

    let table = stdout(&timing);
    assert!(table.contains(&format!("{backend}, 1 threads, 5.2 MiB of weights a pass")), "{table}");
    assert!(table.contains("GB/s") && table.contains("a token of 48 from an empty cache, median of 1"), "{table}");
    let (_, below) = table.split_once("sequences together, 8 positions each, median of 3 steps").unwrap();
    // Of each row the tokens per second of 1 sequence, and of the first K, that its own are.
    let rows: Vec<Vec<f64>> =
        below.lines().skip(2).map(|line| line.split_whitespace().map(|n| n.parse().unwrap()).collect()).collect();
    assert_eq!(rows.iter().map(|r| (r[0], r[1])).collect::<Vec<_>>(), [(1.0, 1.0), (1.0, 3.0), (2.0, 1.0), (2.0, 3.0)]);
    for row in &rows {
        for (found, other) in [(row[4], (1.0, row[1])), (row[5], (row[0], 1.0))] {
            let other = rows.iter().find(|r| (r[0], r[1]) == other).unwrap()[3];
            let over = row[3] / other;
            // Printed with two digits, of rates that are printed with one.
            let rounding = 0.0051 + over * 0.051 * (1.0 / row[3] + 1.0 / other);
            assert!((found - over).abs() < rounding, "{found}, not {over}: {table}");
        }
    }
}

/// `PHD_CPU_VARIANT` forces one of what the system says the CPU has, and nothing else.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[test]
fn variants_are_those_of_the_cpu() {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = cpuinfo.lines().find(|line| line.starts_with("flags") || line.starts_with("Features")).unwrap();
    let flags: Vec<&str> = line.split_once(':').unwrap().1.split_whitespace().collect();
    let has = |all: &str| all.split(' ').all(|flag| flags.contains(&flag));
    let all = [
        ("avx512-vnni", has("avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni")),
        ("avx2-vnni", has("avx2 fma f16c avx_vnni")),
        ("avx2", has("avx2 fma f16c")),
        ("neon-dot", has("asimddp")),
        ("plain", true),
        ("ggml", cfg!(feature = "ggml") && (cfg!(not(target_arch = "x86_64")) || has("sse4_2 avx2 fma f16c bmi2"))),
    ];
    let there: Vec<&str> = all.iter().filter(|(_, is_there)| *is_there).map(|(name, _)| *name).collect();
    assert_eq!(phd::backend::cpu::variants(), there);

    let info = |forced: Option<&str>| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_phd"));
        program
            .args(["info", common::demo_model().to_str().unwrap(), "--backend", "cpu"])
            .env_remove("PHD_CPU_VARIANT");
        program.envs(forced.map(|name| ("PHD_CPU_VARIANT", name))).output().unwrap()
    };
    let best = there[0];
    let chosen = [(None, best), (Some(""), best)].into_iter();
    // The model's weights are floats, which ggml's kernels are not for.
    for (forced, runs) in chosen.chain(there.iter().map(|&name| (Some(name), if name == "ggml" { best } else { name })))
    {
        let output = info(forced);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{forced:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains(&format!("backend      cpu ({runs})\n")), "{forced:?}: {text}");
    }
    let names = "expected ggml or one of avx512-vnni, avx2-vnni, avx2, neon-dot, plain";
    let absent = all.iter().filter(|(name, is_there)| !is_there && *name != "ggml");
    let refused: Vec<_> = absent.map(|(name, _)| (*name, format!("this CPU has no {name}"))).collect();
    assert!(!refused.is_empty(), "no CPU has both x86's and ARM's");
    for (forced, message) in refused.into_iter().chain([("nonsense", names.to_owned())]) {
        let output = info(Some(forced));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && text.contains(&message), "{forced}: {text}");
    }
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
            .args(["--backend", "cpu", "--prompt", "8", "--context", "8", "--steps", "1"])
            .args(["--copies-list", "1", "--json"])
            .output()
            .unwrap();
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["threads"], 1, "asked for {asked}");
    }
}

#[test]
fn bench_times_what_servers_wait_for() {
    let json = |arguments: &[&str]| -> Value {
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
