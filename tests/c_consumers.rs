//! C99 and C++17 programs on `libphd.so`: plainly, under the sanitizers, and under Valgrind; and what the library exports.

mod common;

use std::path::PathBuf;
use std::process::Command;

/// The folder of `libphd.so`: cargo builds it beside the test programs' folder.
fn library_folder() -> PathBuf {
    let folder = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
    assert!(
        folder.join("libphd.so").is_file(),
        "no libphd.so in {}: run cargo build --release first",
        folder.display()
    );
    folder
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

struct Program {
    folder: tempfile::TempDir,
}

impl Program {
    fn compile(source: &str, compiler: &str, flags: &[&str]) -> Program {
        let (root, lib) = (common::root(), library_folder());
        let program = Program { folder: tempfile::tempdir().unwrap() };
        run(Command::new(compiler)
            .args(["-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
            .args(flags)
            .arg("-I")
            .arg(root.join("include"))
            .arg(root.join(source))
            .args(["-x", "none", "-L"])
            .arg(&lib)
            .args(["-lphd", "-lm"])
            .arg(format!("-Wl,-rpath,{}", lib.display()))
            .arg("-o")
            .arg(program.path()));
        program
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("program")
    }
}

fn contract(command: &mut Command) {
    let root = common::root();
    let text = run(command
        .arg(root.join("tests/data/golden/llama-cswa-k2-w16-c32"))
        .arg(common::demo_model())
        .arg(root.join("tests")));
    assert!(text.contains("contract holds"), "{text}");
}

const C99: &[&str] = &["-x", "c", "-std=c99"];
const CPP17: &[&str] = &["-x", "c++", "-std=c++17"];
const SANITIZERS: &[&str] = &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

#[test]
fn c99() {
    contract(&mut Command::new(Program::compile("tests/c/contract.c", "cc", C99).path()));
}

#[test]
fn cpp17() {
    contract(&mut Command::new(Program::compile("tests/c/contract.c", "c++", CPP17).path()));
}

#[test]
fn c99_under_sanitizers() {
    let flags = [C99, SANITIZERS].concat();
    contract(&mut Command::new(Program::compile("tests/c/contract.c", "cc", &flags).path()));
}

#[test]
fn cpp17_under_sanitizers() {
    let flags = [CPP17, SANITIZERS].concat();
    contract(&mut Command::new(Program::compile("tests/c/contract.c", "c++", &flags).path()));
}

#[test]
fn c99_under_valgrind() {
    let program = Program::compile("tests/c/contract.c", "cc", C99);
    let mut command = Command::new("valgrind");
    contract(
        command
            .args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"])
            .arg(program.path()),
    );
}

#[test]
fn builds_are_timed_against_one_another() {
    let program = Program::compile("bench/builds.c", "cc", &["-x", "c", "-std=c11"]);
    let library = library_folder().join("libphd.so");
    for (copies, steps) in [("1", "4"), ("2,16,32", "0")] {
        let model = common::demo_model();
        let text = run(Command::new(program.path())
            .args([model.to_str().unwrap(), copies, "8", steps, "2"])
            .args([library.display().to_string(), format!("{}:PHD_CPU_VARIANT=plain", library.display())]));
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 2, "{text}");
        for line in &lines {
            // The library, then thrice a time and its ratio to the first's.
            assert_eq!(line.len(), 7, "{text}");
            assert!(line[1..].iter().all(|x| x.parse::<f64>().is_ok_and(|x| x > 0.0)), "{text}");
        }
        assert!([2, 4, 6].iter().all(|&i| lines[0][i] == "1.000"), "{text}");
    }
}

#[test]
fn the_example_generates() {
    let program = Program::compile("examples/c/generate.c", "cc", C99);
    let text = run(Command::new(program.path()).arg(common::demo_model()).args(["In the beginning", "24"]));
    assert_eq!(
        text,
        "In the beginning of the Lord,\nAnd the greatest of the world, and all the world\nCannot be so,\n"
    );
    let missing = Command::new(program.path()).args(["/no/such/model", "x"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/no/such/model"));
}

/// Many prompts at once come out as each does alone; and those that begin alike share what they have in common.
#[test]
fn the_example_serves() {
    let (serve, generate) =
        (Program::compile("examples/c/serve.c", "cc", C99), Program::compile("examples/c/generate.c", "cc", C99));
    let long = "And God said unto Moses, Speak unto the children of Israel, and say unto them, When ye come into the land which I \
                give unto you, then shall the land keep a sabbath unto the LORD.";
    let prompts =
        ["In the beginning", "And God", long, "The", "In the beginning God", &format!("{long} Six years"), "And"];
    let run_serve = |command: &mut Command| {
        let output = command.output().unwrap();
        let (out, counters) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success(), "{counters}");
        (out, counters)
    };
    let (out, counters) = run_serve(Command::new(serve.path()).arg(common::demo_model()).arg("24").args(prompts));
    for (i, prompt) in prompts.into_iter().enumerate() {
        let number = format!("{}| ", i + 1);
        let lines: Vec<&str> = out.lines().filter_map(|l| l.strip_prefix(number.as_str())).collect();
        let alone = run(Command::new(generate.path()).arg(common::demo_model()).args([prompt, "24"]));
        let alone = alone.strip_prefix(prompt).unwrap().trim_end_matches('\n');
        assert_eq!(lines.join("\n").trim_end_matches('\n'), alone, "{prompt}");
    }
    let counted = counters.lines().find(|l| l.starts_with("tokens: ")).unwrap();
    let numbers: Vec<usize> = counted.split(' ').filter_map(|w| w.parse().ok()).collect();
    let [prompt, steps, taken, hits, lookups] = numbers[..] else { panic!("{counted}") };
    // 23 steps each, and up to one piece of a prompt that is a single token.
    assert!(prompt > 40 && (7 * 23..=7 * 24).contains(&steps) && taken > 20, "{counters}");
    assert!(hits >= 2 && lookups == 7, "{counters}");

    // The same from standard input; a prompt without tokens is refused, the others go on.
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("prompts");
    std::fs::write(&input, "In the beginning\n\nAnd God\n").unwrap();
    let input = std::fs::File::open(&input).unwrap();
    let mut command = Command::new(serve.path());
    let (again, counters) = run_serve(command.arg(common::demo_model()).arg("24").stdin(input));
    let of = |out: &str, number: &str| -> Vec<String> {
        out.lines().filter_map(|l| l.strip_prefix(number)).map(str::to_owned).collect()
    };
    assert_eq!((of(&again, "1| "), of(&again, "3| ")), (of(&out, "1| "), of(&out, "2| ")));
    assert!(counters.contains("prompt 2 is refused"), "{counters}");
    let missing = Command::new(serve.path()).args(["/no/such/model", "3", "x"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
}

#[test]
fn the_document_quotes_the_example() {
    let read = |path: &str| std::fs::read_to_string(common::root().join(path)).unwrap();
    let (document, example) = (read("docs/serving.md"), read("examples/c/serve.c"));
    let blocks: Vec<&str> = document.split("```c\n").skip(1).map(|b| b.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 3);
    for block in blocks {
        assert!(example.contains(block), "not in examples/c/serve.c:\n{block}");
    }
}

#[test]
fn only_phd_symbols_are_exported() {
    let symbols = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library_folder().join("libphd.so")));
    let names: Vec<&str> = symbols.lines().filter_map(|l| l.split_whitespace().last()).collect();
    assert!(names.contains(&"phd_model_load"));
    let foreign: Vec<&&str> = names.iter().filter(|n| !n.starts_with("phd_")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}
