//! The scripts that the figures of `docs/performance.md` come from; `bench/builds.c` is in `c_consumers.rs`.
#![cfg(unix)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use common::{demo_model, difference, root};
use phd::checkpoint::{Checkpoint, Description, OpenOptions};
use phd::model::{BackendKind, LoadOptions, Model};
use phd::session::{CacheType, Session, SessionOptions};
use phd::tensor::DType;
use serde_json::Value as Json;

fn random_gguf(arguments: &[&str]) -> Output {
    Command::new(root().join("bench/random_gguf.py")).args(arguments).output().unwrap()
}

fn assert_success(output: &Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Of every type the script knows, as its usage says: loaded, described, and computed as the reference computes it.
#[test]
fn random_weights_of_every_type_compute() {
    const SMALL: &str = "--hidden 256 --layers 2 --feed-forward 512 --heads 8 --kv-heads 2 --vocabulary 384";
    // The large matrices of two layers and the table; the norms.
    let (n_large, n_norms) = (2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 512 * 256) + 384 * 256, 5 * 256);
    let types = [DType::F16, DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::Q4_K, DType::Q5_K, DType::Q6_K];
    let usage = String::from_utf8(random_gguf(&["--help"]).stdout).unwrap();
    let names = types.map(DType::name).join(",");
    assert!(usage.contains(&format!("{{{names}}}")), "a type that this test lacks, or lacks itself: {usage}");
    let folder = tempfile::tempdir().unwrap();
    for dtype in types {
        let path = folder.path().join(format!("{dtype}.gguf"));
        let arguments = [&[dtype.name(), path.to_str().unwrap()], &SMALL.split(' ').collect::<Vec<_>>()[..]].concat();
        assert_success(&random_gguf(&arguments), dtype.name());
        let [mut cpu, mut reference] = [BackendKind::Cpu, BackendKind::Reference].map(|backend| {
            let model = Model::load(&path, LoadOptions { backend, ..Default::default() }).unwrap();
            let d = model.desc();
            assert_eq!((d.n_embd, d.n_layers, d.n_ff, d.n_vocab), (256, 2, 512, 384), "{dtype}");
            assert_eq!((d.n_heads, d.n_kv_heads, d.head_dim), (8, 2, 32), "{dtype}");
            assert_eq!((d.weight_type, d.dtypes.as_str()), (dtype, &*format!("{dtype} x 15, F32 x 5")));
            let bytes = n_large / dtype.block_len() * dtype.block_bytes() + 4 * n_norms;
            assert_eq!((d.n_parameters, d.weight_bytes), (n_large + n_norms, bytes), "{dtype}");
            let options = SessionOptions { n_positions: 64, cache_type: CacheType::F32, ..Default::default() };
            Session::new(Arc::new(model), &options).unwrap()
        });
        let tokens: Vec<i32> = (0..28).map(|i| i * 89 % 384).collect();
        let mut compare = |piece: &[i32]| {
            cpu.prefill(0, piece).unwrap();
            reference.prefill(0, piece).unwrap();
            let (found, expected) = (cpu.logits(0).unwrap(), reference.logits(0).unwrap());
            assert!(expected.iter().all(|x| x.is_finite()), "{dtype}: {expected:?}");
            let (low, high) = expected.iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
            // Of what the logits differ by, not of their size: in some types' noise all weights are positive.
            let largest = expected.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let found = difference(found, expected) * largest / (high - low);
            assert!(found < if dtype == DType::F16 { 1e-3 } else { 0.2 }, "{dtype} after {piece:?}: {found}");
        };
        compare(&tokens[..20]);
        tokens[20..].iter().for_each(|&token| compare(&[token]));
    }
}

/// What is written without options is the paper's model. Its header, that is: the file after it is a hole here.
#[test]
fn random_weights_have_the_papers_shape() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("1b.gguf");
    let script = "import random_gguf, sys; args = random_gguf.arguments(['Q4_0', sys.argv[1]]); file = open(args.file, 'wb'); \
                  file.write(random_gguf.layout(args)[0]); file.truncate(1 << 30)";
    let mut python = Command::new("python3");
    python.args(["-B", "-c", script]).arg(&path).env("PYTHONPATH", root().join("bench"));
    assert_success(&python.output().unwrap(), "random_gguf.layout");
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
    let Description::Gguf(metadata) = &checkpoint.description else { panic!("a GGUF file") };
    for (key, value) in [
        ("block_count", 16),
        ("embedding_length", 2048),
        ("feed_forward_length", 8192),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
        ("vocab_size", 100_352),
    ] {
        assert_eq!(metadata.u32(&format!("llama.{key}")).unwrap(), Some(value), "{key}");
    }
    assert_eq!(metadata.str("general.name").unwrap(), Some("random weights, 1.2B, Q4_0"));
    assert_eq!(checkpoint.tensors.len(), 2 + 16 * 9);
    for (name, shape) in [
        ("token_embd", &[100_352, 2048][..]),
        ("output_norm", &[2048]),
        ("blk.0.attn_q", &[2048, 2048]),
        ("blk.7.attn_k", &[512, 2048]),
        ("blk.7.attn_v", &[512, 2048]),
        ("blk.7.attn_output", &[2048, 2048]),
        ("blk.15.ffn_gate", &[8192, 2048]),
        ("blk.15.ffn_up", &[8192, 2048]),
        ("blk.15.ffn_down", &[2048, 8192]),
        ("blk.15.ffn_norm", &[2048]),
    ] {
        let tensor = &checkpoint.tensors[&format!("{name}.weight")];
        let dtype = if shape.len() == 1 { DType::F32 } else { DType::Q4_0 };
        assert_eq!((&tensor.shape[..], tensor.dtype), (shape, dtype), "{name}");
    }
}

#[test]
fn wrong_usage_of_random_gguf_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let file = path.to_str().unwrap();
    for (arguments, word) in [
        (&[][..], "required"),
        (&["Q4_0"], "required"),
        (&["Q3_K", file], "Q3_K"),
        (&["Q4_0", file, "more"], "more"),
        (&["Q4_0", file, "--layers", "0"], "at least 1"),
        (&["Q4_K", file, "--hidden", "128", "--heads", "4", "--kv-heads", "2"], "multiples of 256"),
        (&["Q8_0", file, "--feed-forward", "100"], "multiples of 32"),
        (&["Q4_0", file, "--heads", "24"], "divides"),
        (&["Q4_0", file, "--kv-heads", "5"], "divides"),
    ] {
        let output = random_gguf(arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.starts_with("usage: ") && message.contains(word), "{arguments:?}: {message}");
        assert!(!path.exists(), "{arguments:?}");
    }
}

const ROUNDS: usize = 3;

fn program(path: &Path, text: &str) {
    std::fs::write(
        path,
        format!("#!/bin/sh\nset -e\necho \"$(basename \"$0\") $*\" >> \"$(dirname \"$0\")/calls\"\n{text}"),
    )
    .unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// A program that prints, the first time, the first of `outputs`, then the second, ...
fn prints_in_turn(path: &Path, outputs: &[String]) {
    for (i, output) in outputs.iter().enumerate() {
        std::fs::write(path.with_extension(format!("{}", i + 1)), output).unwrap();
    }
    program(path, "echo x >> \"$0.turns\"\ncat \"$0.$(wc -l < \"$0.turns\" | tr -d ' ')\"\n");
}

fn median(mut values: Vec<f64>) -> f64 {
    assert_eq!(values.len(), ROUNDS);
    values.sort_by(f64::total_cmp);
    values[ROUNDS / 2]
}

/// A number as it is printed, rounded.
fn assert_prints(text: &str, expected: f64, what: &str) {
    let decimals = text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let found: f64 = text.parse().unwrap_or_else(|_| panic!("{what}: {text}"));
    let unit = 0.1f64.powi(decimals as i32);
    assert!((found - expected).abs() <= 0.5 * unit * (1.0 + 1e-6), "{what}: {text}, expected {expected}");
}

/// Every figure of the table is the median of what the programs said, and every ratio that of both medians.
#[test]
fn libphd_is_compared_with_llama_cpp() {
    const STEPS: [usize; 5] = [1, 2, 3, 4, 8];
    const TOGETHER: [usize; 6] = [1, 2, 4, 8, 16, 32];
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // What llama.cpp's programs print, as far as it matters; the median is of another round each time.
    let rates: [[f64; 2]; ROUNDS] = [[1500.5, 40.25], [1000.0, 55.5], [2100.0, 50.75]];
    let rate = |which: usize| median(rates.iter().map(|round| round[which]).collect());
    let bench = |(i, rate): (usize, &f64)| {
        let (prompt, tokens) = if i == 0 { (16, 0) } else { (0, 48) };
        format!(
            "[\n  {{\n    \"n_prompt\": {prompt},\n    \"n_gen\": {tokens},\n    \"avg_ts\": {rate},\n    \"stddev_ts\": 0.5\n  }}\n]\n"
        )
    };
    prints_in_turn(
        &at("llama-bench"),
        &rates.iter().flatten().enumerate().map(|(i, r)| bench((i % 2, r))).collect::<Vec<_>>(),
    );
    let step_ms = |round: usize, rows: usize| (3.0 + rows as f64) * [1.0, 0.75, 1.5][(round + rows) % 3];
    let batched = |round: usize| {
        let line = |rows: usize| {
            let seconds = 24.0 * step_ms(round, rows) / 1e3;
            format!(
                "{{\"pp\": 64, \"tg\": 24, \"pl\": {rows}, \"n_kv\": 88, \"t_pp\": 0.5, \"t_tg\": {seconds}, \"speed_tg\": 1.0}}\n"
            )
        };
        let lines = [1, 2, 3, 4, 8, 16, 32].map(line).concat();
        format!("\nmain: n_kv_max = 4096, n_batch = 2048\n\n{lines}\nllama_perf_context_print: load time = 1 ms\n")
    };
    prints_in_turn(&at("llama-batched-bench"), &(0..ROUNDS).map(batched).collect::<Vec<_>>());
    // The real program; what it says is kept.
    program(
        &at("phd"),
        &format!("said=$('{}' \"$@\")\necho \"$said\" | tee -a \"$0.said\"\n", env!("CARGO_BIN_EXE_phd")),
    );

    let output = Command::new(root().join("bench/compare.py"))
        .arg("--llama")
        .arg(folder.path())
        .arg("--phd")
        .arg(at("phd"))
        .args(["--threads", "1", "--rounds", &ROUNDS.to_string(), "--prompt", "16"])
        .arg(demo_model())
        .output()
        .unwrap();
    assert_success(&output, "compare.py");

    let calls = std::fs::read_to_string(at("calls")).unwrap();
    let calls: Vec<&str> = calls.lines().collect();
    let model = demo_model().display().to_string();
    let expected = [
        format!("llama-bench -m {model} -o json -p 16 -n 0 -r 1 -t 1"),
        format!("llama-bench -m {model} -o json -p 0 -n 48 -r 3 -t 1"),
        format!(
            "llama-batched-bench -m {model} --output-format jsonl -c 4096 -npp 64 -ntg 24 -npl 1,2,3,4,8,16,32 -t 1"
        ),
    ];
    assert_eq!(calls.len(), 5 * ROUNDS);
    for round in calls.chunks(5) {
        assert_eq!(round[..3], expected);
        let begin = format!("phd bench {model} --backend cpu --context 64 --steps 24 --json -t 1 --prompt ");
        assert!(round[3..].iter().all(|call| call.starts_with(&begin)), "{round:?}");
    }

    let said = std::fs::read_to_string(at("phd.said")).unwrap();
    let said: Vec<Json> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // Of all rounds, the figure at `pointer` of the first of both calls, or of the second.
    let ours = |call: usize, pointer: &str| {
        let of =
            |json: &Json| json.pointer(pointer).and_then(Json::as_f64).unwrap_or_else(|| panic!("{pointer}: {json}"));
        median(said.iter().skip(call).step_by(2).map(of).collect())
    };
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let backend = said[0]["backend"].as_str().unwrap();
    assert!(backend.starts_with("cpu ("), "{backend}");
    let head = format!("**kjv-phd-cswa-2-16-32**, {backend}, 1 threads, memory reads at ");
    let reads =
        lines[1].strip_prefix(&head).and_then(|rest| rest.strip_suffix(" GB/s")).unwrap_or_else(|| panic!("{text}"));
    assert_prints(reads, ours(0, "/bandwidth_gb_per_second"), "bandwidth");
    assert_eq!([lines[0], lines[2]], [""; 2], "{text}");
    assert_eq!(lines[3..5], ["| | libphd | llama.cpp | ratio |", "| --- | --- | --- | --- |"], "{text}");

    // What a row is of, both figures, and for steps both of one row; rates are better where they are higher, times where they are lower.
    let mut rows = vec![
        ("prefill of 16, tok/s".to_owned(), ours(0, "/prefill/0/tokens_per_second"), rate(0), None),
        ("decode of 48 at K = 1, tok/s".to_owned(), ours(1, "/decode/0/tokens_per_second"), rate(1), None),
    ];
    let theirs = |rows: usize| median((0..ROUNDS).map(|round| step_ms(round, rows)).collect());
    for (i, n) in STEPS.into_iter().enumerate() {
        assert!(said.iter().step_by(2).all(|json| json["steps"][i]["copies"] == n));
        let (of_rows, first) = (ours(0, &format!("/steps/{i}/ms")), (ours(0, "/steps/0/ms"), theirs(1)));
        let plural = if n > 1 { "s" } else { "" };
        rows.push((format!("step of {n} row{plural}, ms (over 1)"), of_rows, theirs(n), Some(first)));
    }
    for (i, n) in TOGETHER.into_iter().enumerate() {
        assert!(said.iter().skip(1).step_by(2).all(|json| json["together"][i]["sequences"] == n));
        let [ours, theirs] = [ours(1, &format!("/together/{i}/ms")), theirs(n)].map(|ms| 1e3 * n as f64 / ms);
        rows.push((format!("{n} sequence{} decoding, tok/s", if n > 1 { "s" } else { "" }), ours, theirs, None));
    }
    assert_eq!(lines.len(), 5 + rows.len(), "{text}");
    for (line, (what, ours, theirs, first)) in lines[5..].iter().zip(rows) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, our_cell, their_cell, ratio] = cells[..] else { panic!("{line}") };
        assert_eq!(name, what, "{text}");
        match first {
            None => {
                assert_prints(our_cell, ours, line);
                assert_prints(their_cell, theirs, line);
                assert_prints(ratio, ours / theirs, line);
            }
            Some((our_first, their_first)) => {
                for (cell, ms, first) in [(our_cell, ours, our_first), (their_cell, theirs, their_first)] {
                    let (time, over) = cell.strip_suffix(')').and_then(|cell| cell.split_once(" (")).unwrap();
                    assert_prints(time, ms, line);
                    assert_prints(over, ms / first, line);
                }
                assert_prints(ratio, theirs / ours, line);
            }
        }
    }

    // What a program said that failed is no figure.
    let failing = tempfile::tempdir().unwrap();
    program(&failing.path().join("llama-bench"), "echo '[{\"avg_ts\": 1.0}]'\nexit 3\n");
    prints_in_turn(&failing.path().join("llama-batched-bench"), &[batched(0)]);
    for llama in [failing.path(), Path::new("/no/such/folder")] {
        let mut command = Command::new(root().join("bench/compare.py"));
        command.arg("--llama").arg(llama).args(["--phd", env!("CARGO_BIN_EXE_phd"), "--rounds", "1", "--prompt", "16"]);
        let output = command.arg(demo_model()).output().unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "{}", llama.display());
    }
}
