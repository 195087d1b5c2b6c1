//! Bytes in, checked views out: Hub folders of safetensors files, and GGUF files.
//!
//! Files are hostile until shown otherwise: no count, length or offset is used before it has been compared with the
//! bytes that are there.

pub mod gguf;
pub mod safetensors;

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::tensor::DType;

/// A file's bytes: mapped, or read into memory.
pub struct Mapping {
    pub path: PathBuf,
    // private: memmap2::Mmap or Vec<u8>
}

/// A range of a mapped file; cheap to clone, keeps the mapping alive.
#[derive(Clone)]
pub struct Bytes {
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

/// A tensor as stored: never copied, never converted here.
#[derive(Clone)]
pub struct TensorView {
    pub name: String,
    pub dtype: DType,
    /// Row-major, outermost first: a linear layer is `[out_features, in_features]`. (GGUF stores the reverse order.)
    pub shape: Vec<usize>,
    pub data: Bytes,
}

/// What describes the model besides its tensors.
pub enum Description {
    /// `config.json`, and the files beside it that may be missing.
    Hub { config: serde_json::Value, tokenizer_config: Option<serde_json::Value>, generation_config: Option<serde_json::Value>, tokenizer: Option<PathBuf> },
    Gguf(gguf::Metadata),
}

/// An opened checkpoint.
pub struct Checkpoint {
    /// As given by the caller; named in error messages.
    pub path: PathBuf,
    pub description: Description,
    pub tensors: BTreeMap<String, TensorView>,
    /// Bytes of all tensors, as stored.
    pub tensor_bytes: usize,
}

#[derive(Clone, Copy)]
pub struct OpenOptions {
    /// Map files (the default) or read them whole. A mapped file must not be truncated while in use.
    pub mmap: bool,
}
