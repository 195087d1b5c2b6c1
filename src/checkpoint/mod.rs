//! Bytes in, checked views out: Hub folders of safetensors files, and GGUF files.
//!
//! Files are hostile until shown otherwise: no count, length or offset is used before it has been compared with the
//! bytes that are there.

pub mod gguf;
pub mod gguf_writer;
pub mod safetensors;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tensor::DType;

/// A file's bytes: mapped, or read into memory.
pub struct Mapping {
    pub path: PathBuf,
    content: Content,
}

enum Content {
    Mapped(memmap2::Mmap),
    Read(Vec<u8>),
}

impl Mapping {
    /// Opens a regular file. Pipes and devices are refused before they can block.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<Mapping>> {
        let io = |e| Error::io(path, e);
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(Error::format(path, "is not a regular file"));
        }
        let mut file = File::open(path).map_err(io)?;
        let content = if options.mmap {
            // SAFETY: the mapping is read-only and private to this process. That nobody truncates the file while it is
            // mapped is what `OpenOptions::mmap` asks of the caller.
            Content::Mapped(unsafe { memmap2::Mmap::map(&file) }.map_err(io)?)
        } else {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(io)?;
            Content::Read(bytes)
        };
        Ok(Arc::new(Mapping { path: path.to_owned(), content }))
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.content {
            Content::Mapped(map) => map,
            Content::Read(bytes) => bytes,
        }
    }
}

/// A range of a file's bytes; cheap to clone, keeps the mapping alive.
#[derive(Clone)]
pub struct Bytes {
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

impl Bytes {
    /// Lets the system drop the mapped pages that lie within `part`: whoever needs them again reads the file again.
    pub fn give_back(&self, part: Range<usize>) {
        #[cfg(unix)]
        if let Content::Mapped(map) = &self.mapping.content {
            // A length that is no whole number of pages is rounded up: partly used pages at either end must be left out.
            const LARGEST_PAGE: usize = 1 << 16;
            let (start, end) = (self.range.start + part.start, self.range.start + part.end.min(self.range.len()));
            let (start, end) = (start.next_multiple_of(LARGEST_PAGE), end - end % LARGEST_PAGE);
            if start < end {
                // SAFETY: a file mapping that nobody writes to: dropped pages come back with the same bytes. Failure is harmless.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes {:?} of {}", self.range, self.mapping.path.display())
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.mapping[self.range.clone()]
    }
}

impl Bytes {
    /// The file that they are in.
    pub fn file(&self) -> &Path {
        &self.mapping.path
    }

    /// Where they begin in their file.
    pub fn offset(&self) -> usize {
        self.range.start
    }
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

impl TensorView {
    /// A tensor of bytes at hand.
    #[cfg(test)]
    pub fn of_bytes(name: &str, dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> TensorView {
        let range = 0..bytes.len();
        let mapping = Arc::new(Mapping { path: PathBuf::from(name), content: Content::Read(bytes) });
        TensorView::new(&mapping, name, dtype, shape, range).unwrap()
    }

    /// A view of `range` in `mapping`, if shape and type make exactly as many bytes, in whole blocks.
    fn new(
        mapping: &Arc<Mapping>,
        name: &str,
        dtype: DType,
        shape: Vec<usize>,
        range: Range<usize>,
    ) -> Result<TensorView> {
        let fail = |what: String| Error::format(&mapping.path, format!("tensor {name}: {what}"));
        let expected = tensor_bytes(dtype, &shape)
            .ok_or_else(|| fail(format!("shape {shape:?} is no whole number of {dtype} blocks")))?;
        if range.start > range.end || range.end > mapping.len() || range.len() != expected {
            let what = format!(
                "bytes {}..{} of a file of {}, expected {expected} bytes for {dtype} {shape:?}",
                range.start,
                range.end,
                mapping.len()
            );
            return Err(fail(what));
        }
        Ok(TensorView { name: name.to_owned(), dtype, shape, data: Bytes { mapping: mapping.clone(), range } })
    }
}

/// Bytes of a tensor; `None` for a size that overflows, has a zero dimension, or cuts a block.
fn tensor_bytes(dtype: DType, shape: &[usize]) -> Option<usize> {
    let (&width, outer) = shape.split_last()?;
    if shape.contains(&0) {
        return None;
    }
    outer.iter().try_fold(dtype.row_bytes(width)?, |bytes, &n| bytes.checked_mul(n))
}

/// What describes the model besides its tensors.
pub enum Description {
    Hub(Box<HubFiles>),
    Gguf(gguf::Metadata),
}

/// `config.json`, and the files beside it that may be missing.
pub struct HubFiles {
    pub config: serde_json::Value,
    pub tokenizer_config: Option<serde_json::Value>,
    pub special_tokens_map: Option<serde_json::Value>,
    pub generation_config: Option<serde_json::Value>,
    /// `tokenizer.json`
    pub tokenizer: Option<PathBuf>,
    /// By name: `chat_template.jinja` is "default", `additional_chat_templates/NAME.jinja` the others. They take precedence
    /// over those in `tokenizer_config.json`.
    pub chat_templates: BTreeMap<String, String>,
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

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { mmap: true }
    }
}

impl Checkpoint {
    /// Opens a Hub folder or a GGUF file. Reads headers, not tensors.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Checkpoint> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        let (description, tensors) =
            if metadata.is_dir() { safetensors::open(path, options)? } else { gguf::open(path, options)? };
        let tensor_bytes = tensors.values().map(|t| t.data.len()).sum();
        Ok(Checkpoint { path: path.to_owned(), description, tensors, tensor_bytes })
    }
}

/// Tensors of one file must not share bytes.
fn check_disjoint<'a>(tensors: impl Iterator<Item = &'a TensorView>) -> Result<()> {
    let mut views: Vec<&TensorView> = tensors.collect();
    views.sort_by_key(|t| t.data.range.start);
    for pair in views.windows(2) {
        if pair[0].data.range.end > pair[1].data.range.start {
            let what = format!("tensors {} and {} overlap", pair[0].name, pair[1].name);
            return Err(Error::format(&pair[0].data.mapping.path, what));
        }
    }
    Ok(())
}
