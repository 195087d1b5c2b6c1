//! `include/phd.h` is what cbindgen makes of `src/ffi`. After a change: `PHD_UPDATE_HEADER=1 cargo test --test header`.

mod common;

#[test]
fn the_committed_header_is_the_generated_one() {
    let root = common::root();
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    // cbindgen follows the file's `mod` declarations.
    let builder = cbindgen::Builder::new().with_config(config).with_src(root.join("src/ffi/mod.rs"));
    let mut bytes = Vec::new();
    builder.generate().unwrap().write(&mut bytes);
    let generated = String::from_utf8(bytes).unwrap();
    let path = root.join("include/phd.h");
    if std::env::var_os("PHD_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "include/phd.h is out of date: run PHD_UPDATE_HEADER=1 cargo test --test header");
}
