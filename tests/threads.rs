//! How many threads a session starts. A process of its own: no other session's threads are in it.
#![cfg(target_os = "linux")]

mod common;

use std::process::Command;

use common::{golden, load};
use phd::model::BackendKind;
use phd::session::{Session, SessionOptions, default_threads};

/// Set for a run whose affinity leaves it one physical core.
const ONE_CORE: &str = "PHD_TEST_ONE_CORE";

/// Pools' threads of this process, as the system has them.
fn started() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // One of the test harness may have ended since.
    let name = |task: &std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks.filter(|task| name(task.as_ref().unwrap()).starts_with("phd-")).count()
}

/// The caller's thread and those that were started are as many as were asked for, or as there are CPUs for.
#[test]
fn as_many_as_there_are_cpus_for() {
    let cpus = std::thread::available_parallelism().unwrap().get();
    let is_one_core = std::env::var_os(ONE_CORE).is_some();
    let default = default_threads();
    assert!(if is_one_core { default == 1 } else { (1..=cpus).contains(&default) }, "{default} for {cpus} CPUs");
    let [model, reference] = [BackendKind::Cpu, BackendKind::Reference].map(|backend| load(&golden()[0].path, backend));
    // Sessions stay: how long the system lists threads that have ended is its own affair.
    let mut sessions = Vec::new();
    for (asked, expected) in [(1, 1), (2, 2.min(cpus)), (64, 64.min(cpus)), (0, default)] {
        let before = started();
        let options = SessionOptions { n_positions: 64, n_threads: asked, ..Default::default() };
        let mut session = Session::new(model.clone(), &options).unwrap();
        session.step(0, 1).unwrap(); // a thread gives itself its name before it works
        assert_eq!(started() - before + 1, expected, "asked for {asked}, {cpus} CPUs");
        assert_eq!(session.threads(), expected, "asked for {asked}, {cpus} CPUs");
        assert_eq!(Session::new(reference.clone(), &options).unwrap().threads(), 1);
        sessions.push(session);
    }
}

/// The same on one CPU, and on all CPUs of its core, however many those are.
#[test]
fn affinity_is_kept() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let first = allowed.split([',', '-']).next().unwrap();
    let siblings = format!("/sys/devices/system/cpu/cpu{first}/topology/thread_siblings_list");
    let siblings = std::fs::read_to_string(siblings).unwrap_or_else(|_| first.to_owned());
    for cpus in [first, siblings.trim()] {
        let output = Command::new("taskset")
            .args(["-c", cpus])
            .arg(std::env::current_exe().unwrap())
            .args(["as_many_as_there_are_cpus_for", "--exact"])
            .env(ONE_CORE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "on {cpus}: {text}");
    }
}
