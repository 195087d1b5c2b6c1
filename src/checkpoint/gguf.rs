//! GGUF v2 and v3 (ggml's `docs/gguf.md`).

/// Typed metadata of a GGUF file.
pub struct Metadata {}
