//! Writes GGUF v3 files, whole or not at all.
//!
//! Everything goes to a temporary file in the target's folder, which takes the target's name only when all of it is on the
//! disk. Until then an existing target is untouched, and a [`Writer`] that is dropped leaves nothing behind.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::{Error, Result, invalid};
use crate::files::WholeFile;
use crate::tensor::DType;

const ALIGNMENT: usize = 32;
const MAX_KEY_BYTES: usize = 65535;
/// ggml's names have 64 bytes with their terminator.
const MAX_NAME_BYTES: usize = 63;
const ARRAY: u32 = 9;

/// A value of one of GGUF's types.
pub trait Field {
    /// The number that GGUF gives the type.
    const KIND: u32;
    fn put(&self, out: &mut Vec<u8>);
}

macro_rules! numbers {
    ($($type:ty = $kind:literal),*) => {$(
        impl Field for $type {
            const KIND: u32 = $kind;

            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
numbers!(u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6, u64 = 10, i64 = 11, f64 = 12);

impl Field for bool {
    const KIND: u32 = 7;

    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Field for &str {
    const KIND: u32 = 8;

    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u64).put(out);
        out.extend_from_slice(self.as_bytes());
    }
}

impl Field for String {
    const KIND: u32 = 8;

    fn put(&self, out: &mut Vec<u8>) {
        self.as_str().put(out);
    }
}

/// Keys and values in the order in which they were first set.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// Values as stored: type number, then value.
    entries: Vec<(String, Vec<u8>)>,
}

impl Metadata {
    pub fn set<T: Field>(&mut self, key: &str, value: T) {
        let mut bytes = T::KIND.to_le_bytes().to_vec();
        value.put(&mut bytes);
        self.set_raw(key, bytes);
    }

    pub fn set_array<T: Field>(&mut self, key: &str, values: &[T]) {
        let mut bytes = ARRAY.to_le_bytes().to_vec();
        T::KIND.put(&mut bytes);
        (values.len() as u64).put(&mut bytes);
        values.iter().for_each(|v| v.put(&mut bytes));
        self.set_raw(key, bytes);
    }

    /// A type number and a value as a GGUF file stores them.
    pub fn set_raw(&mut self, key: &str, bytes: Vec<u8>) {
        match self.entries.iter_mut().find(|e| e.0 == key) {
            Some(entry) => entry.1 = bytes,
            None => self.entries.push((key.to_owned(), bytes)),
        }
    }
}

/// What the header says of a tensor.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: DType,
    /// Outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Bytes of the tensor; an error for a shape that is no whole number of blocks.
    pub fn bytes(&self) -> Result<usize> {
        super::tensor_bytes(self.dtype, &self.shape).ok_or_else(|| {
            invalid!("tensor {}: shape {:?} is no whole number of {} blocks", self.name, self.shape, self.dtype)
        })
    }
}

/// A file that is being written: the header first, then the tensors' data in the header's order.
pub struct Writer {
    file: WholeFile,
    /// Bytes that are missing of each tensor, the current one last.
    missing: Vec<usize>,
    written: usize,
    total: usize,
}

impl Writer {
    /// Writes the header.
    ///
    /// # Errors
    /// `Io` naming the folder or the target, `InvalidArgument` for a target that is no regular file, names that GGUF or
    /// ggml does not allow, or shapes that cut a block.
    pub fn create(target: &Path, metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Writer> {
        let header = header(metadata, tensors)?;
        let mut total = header.len();
        let mut missing = Vec::with_capacity(tensors.len());
        for t in tensors.iter().rev() {
            missing.push(t.bytes()?);
            // `header` has seen the sum.
            total += t.bytes()?.next_multiple_of(ALIGNMENT);
        }
        let mut writer = Writer { file: WholeFile::create(target)?, missing, written: 0, total };
        writer.put(&header)?;
        Ok(writer)
    }

    /// Bytes of the whole file.
    pub fn total(&self) -> usize {
        self.total
    }

    fn fail(&self, e: std::io::Error) -> Error {
        let what = format!("{e} (after {} of {} bytes)", self.written, self.total);
        Error::io(self.file.target(), std::io::Error::new(e.kind(), what))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write(bytes).map_err(|e| self.fail(e))?;
        self.written += bytes.len();
        Ok(())
    }

    /// Writes the next bytes of the current tensor.
    ///
    /// # Errors
    /// `Io` naming the target; `Internal` for more bytes than the tensor has.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(missing) = self.missing.last_mut().filter(|m| **m >= bytes.len()) else {
            return Err(Error::Internal("more bytes than the tensor has".to_owned()));
        };
        *missing -= bytes.len();
        let is_whole = *missing == 0;
        self.put(bytes)?;
        if is_whole {
            self.missing.pop();
            let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
            self.put(&[0; ALIGNMENT][..padding])?;
        }
        Ok(())
    }

    /// Waits until everything is on the disk, then gives the file the target's name.
    ///
    /// # Errors
    /// `Io` naming the target; `Internal` if tensors are missing.
    pub fn finish(self) -> Result<()> {
        if !self.missing.is_empty() {
            return Err(Error::Internal(format!("{} tensors were not written", self.missing.len())));
        }
        self.file.finish()
    }
}

/// Everything before the tensors' data, padded.
fn header(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Vec<u8>> {
    let mut out = b"GGUF".to_vec();
    3u32.put(&mut out);
    (tensors.len() as u64).put(&mut out);
    (metadata.entries.len() as u64).put(&mut out);
    for (key, value) in &metadata.entries {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(invalid!("a metadata key has {} bytes, expected 1 to {MAX_KEY_BYTES}", key.len()));
        }
        key.put(&mut out);
        out.extend_from_slice(value);
    }
    let mut names = BTreeSet::new();
    let mut offset = 0usize;
    for t in tensors {
        if t.name.is_empty() || t.name.len() > MAX_NAME_BYTES || !names.insert(&t.name) {
            let what = format!("tensor name {:?} stands twice or has not 1 to {MAX_NAME_BYTES} bytes", t.name);
            return Err(Error::InvalidArgument(what));
        }
        t.name.put(&mut out);
        (t.shape.len() as u32).put(&mut out);
        t.shape.iter().rev().for_each(|&n| (n as u64).put(&mut out));
        t.dtype.ggml_id().put(&mut out);
        (offset as u64).put(&mut out);
        let end = t.bytes()?.checked_next_multiple_of(ALIGNMENT).and_then(|n| n.checked_add(offset));
        offset = end
            .filter(|&end| end < isize::MAX as usize / 2)
            .ok_or_else(|| invalid!("tensor {}: the file would be beyond the address space", t.name))?;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}
