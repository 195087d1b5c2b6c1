//! The CUDA kernels compile for every architecture that matters, without a warning and without spilled registers.
//! Run by `tests/cuda/run.sh`, which brings NVRTC along; no GPU is needed.

use phd::backend::cuda::compile::compile;

/// Ampere, Hopper, Blackwell.
const ARCHS: [(i32, i32); 3] = [(8, 0), (9, 0), (10, 0)];

#[test]
#[ignore = "needs NVRTC: tests/cuda/run.sh"]
fn they_compile_everywhere() {
    for arch in ARCHS {
        let compiled = compile(arch, true).unwrap_or_else(|e| panic!("{e}"));
        let mut name = "";
        let mut kernels = 0;
        for line in compiled.log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                name = rest.split('\'').next().unwrap();
                kernels += 1;
            } else if let Some((_, rest)) = line.split_once("Used ") {
                println!("sm_{}{} {name}: {rest}", arch.0, arch.1);
            } else if line.contains("spill stores") {
                assert!(line.contains(" 0 bytes spill stores, 0 bytes spill loads"), "{arch:?}: {name} spills: {line}");
            } else {
                // Anything else is a warning.
                assert!(line.trim().is_empty() || line.starts_with("ptxas info"), "{arch:?}: {}", compiled.log);
            }
        }
        assert!(kernels > 40, "{arch:?}: a report of {kernels} kernels:\n{}", compiled.log);
        assert!(compiled.image.starts_with(b"\x7fELF"));
    }
}
