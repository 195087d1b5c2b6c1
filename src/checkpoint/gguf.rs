//! GGUF v2 and v3, little-endian (the format is described in ggml's `docs/gguf.md`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Bytes, Description, Mapping, OpenOptions, TensorView, check_disjoint};
use crate::error::{Error, Result, unsupported};
use crate::tensor::DType;

/// A metadata value. Integers keep their value, not their width.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Floats(Vec<f32>),
    /// Any integer array; none that a model needs exceeds 32 bits.
    Integers(Vec<i32>),
    /// Arrays of other types, checked and skipped.
    Opaque(&'static str),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) | Value::Signed(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a bool",
            Value::String(_) => "a string",
            Value::Strings(_) => "an array of strings",
            Value::Floats(_) => "an array of floats",
            Value::Integers(_) => "an array of integers",
            Value::Opaque(kind) => kind,
        }
    }
}

/// Typed metadata of a GGUF file. A getter gives `None` for an absent key and an error for one of another type.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
    /// As stored, in the file's order: type number, then value.
    raw: Vec<(String, Bytes)>,
}

impl Metadata {
    fn typed<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let mismatch =
            || Error::format(&self.path, format!("metadata key {key} is {}, expected {expected}", value.kind()));
        read(value).map(Some).ok_or_else(mismatch)
    }

    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer of 0 to 2^32 - 1", |v| match v {
            Value::Unsigned(n) => (*n).try_into().ok(),
            Value::Signed(n) => (*n).try_into().ok(),
            _ => None,
        })
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a float", |v| match v {
            Value::Float(x) => Some(*x as f32),
            _ => None,
        })
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Strings(s) => Some(s.as_slice()),
            _ => None,
        })
    }

    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of floats", |v| match v {
            Value::Floats(x) => Some(x.as_slice()),
            _ => None,
        })
    }

    pub fn i32s(&self, key: &str) -> Result<Option<&[i32]>> {
        self.typed(key, "an array of integers", |v| match v {
            Value::Integers(x) => Some(x.as_slice()),
            _ => None,
        })
    }

    /// Keys and values as the file stores them, in its order: the type number (u32), then the value.
    pub fn raw(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.raw.iter().map(|(key, bytes)| (key.as_str(), &**bytes))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(k, v)| (k.as_str(), v))
    }
}

/// Offsets of tensors are multiples of this unless the file says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;
const MAX_ALIGNMENT: usize = 1 << 20;
const MAX_DIMENSIONS: u32 = 4;
const MAX_KEY_BYTES: usize = 65535;

/// Reads forward through the header; every read is checked against the bytes that remain.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn fail(&self, what: impl Into<String>) -> Error {
        Error::format(self.path, what)
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        if n > self.remaining() {
            return Err(self.fail(format!(
                "{what} needs {n} bytes at offset {}, {} are left",
                self.at,
                self.remaining()
            )));
        }
        let bytes = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        Ok(self.take(N, what)?.try_into().expect("take gives N bytes"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least` bytes each, so that it can be trusted for a reserve.
    fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let n = self.u64(what)?;
        let most = self.remaining() / least;
        usize::try_from(n).ok().filter(|&n| n <= most).ok_or_else(|| {
            self.fail(format!("{what} is {n}, the {} bytes that are left hold at most {most}", self.remaining()))
        })
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.count(1, what)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|e| self.fail(format!("{what} is not UTF-8: {e}")))
    }

    /// The value of `key`, of GGUF type `kind`.
    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.fail(format!("metadata key {key} is the bool {other}, expected 0 or 1"))),
            },
            8 => Value::String(self.string(key)?),
            9 => self.typed_array(key)?,
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(self.fail(format!("metadata key {key} has type {kind}, expected 0 to 12"))),
        })
    }

    fn typed_array(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(unsupported!("{}: metadata key {key} is an array of arrays", self.path.display())),
            _ => return Err(self.fail(format!("metadata key {key} is an array of type {kind}, expected 0 to 12"))),
        };
        let n = self.count(size, key)?;
        if kind == 8 {
            let mut strings = Vec::with_capacity(n);
            for _ in 0..n {
                strings.push(self.string(key)?);
            }
            return Ok(Value::Strings(strings));
        }
        // `count` has compared n with the bytes that are left, so the product cannot overflow.
        let elements = self.take(n * size, key)?.chunks_exact(size);
        Ok(match kind {
            4 | 5 => Value::Integers(elements.map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
            6 => Value::Floats(elements.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
            _ => Value::Opaque("an array of another element type"),
        })
    }
}

pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<(Description, BTreeMap<String, TensorView>)> {
    let mapping = Mapping::open(path, options)?;
    let (metadata, tensors) = read(&mapping)?;
    Ok((Description::Gguf(metadata), tensors))
}

fn read(mapping: &Arc<Mapping>) -> Result<(Metadata, BTreeMap<String, TensorView>)> {
    let path = &mapping.path;
    let mut r = Reader { path, bytes: mapping, at: 0 };
    if r.take(4, "the magic")? != b"GGUF" {
        return Err(r.fail("is neither a Hub folder nor a GGUF file: it does not start with GGUF"));
    }
    let version = r.u32("the version")?;
    if !(2..=3).contains(&version) {
        let swapped = (2..=3).contains(&version.swap_bytes());
        let what = if swapped { "big-endian".to_owned() } else { format!("version {version}") };
        return Err(unsupported!("{}: GGUF {what}, expected version 2 or 3, little-endian", path.display()));
    }
    // A tensor takes at least 8 + 4 + 8 + 4 + 8 bytes of header, a key 8 + 4 + 1.
    let n_tensors = r.count(32, "the tensor count")?;
    let n_keys = r.count(13, "the metadata count")?;
    let (mut values, mut raw) = (BTreeMap::new(), Vec::with_capacity(n_keys));
    for _ in 0..n_keys {
        let key = r.string("a metadata key")?;
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(r.fail(format!("a metadata key has {} bytes, expected 1 to {MAX_KEY_BYTES}", key.len())));
        }
        let start = r.at;
        let kind = r.u32(&key)?;
        let value = r.value(kind, &key)?;
        raw.push((key.clone(), Bytes { mapping: mapping.clone(), range: start..r.at }));
        if values.insert(key.clone(), value).is_some() {
            return Err(r.fail(format!("metadata key {key} stands twice")));
        }
    }
    let metadata = Metadata { path: path.clone(), values, raw };
    if let Some(n) = metadata.u32("split.count")?.filter(|&n| n > 1) {
        return Err(unsupported!("{}: one part of {n}; split GGUF files are not implemented", path.display()));
    }
    let alignment = metadata.u32("general.alignment")?.map_or(DEFAULT_ALIGNMENT, |a| a as usize);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        let what = format!("general.alignment is {alignment}, expected a power of two up to {MAX_ALIGNMENT}");
        return Err(r.fail(what));
    }

    struct Info {
        name: String,
        dtype: DType,
        shape: Vec<usize>,
        offset: u64,
    }
    let mut infos = Vec::with_capacity(n_tensors);
    for _ in 0..n_tensors {
        let name = r.string("a tensor name")?;
        let n_dims = r.u32(&name)?;
        if n_dims == 0 || n_dims > MAX_DIMENSIONS {
            return Err(r.fail(format!("tensor {name} has {n_dims} dimensions, expected 1 to {MAX_DIMENSIONS}")));
        }
        let mut shape = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            let n = r.u64(&name)?;
            let n = usize::try_from(n).ok().filter(|&n| n > 0);
            shape.push(
                n.ok_or_else(|| r.fail(format!("tensor {name} has a dimension of zero or beyond the address space")))?,
            );
        }
        shape.reverse();
        let id = r.u32(&name)?;
        let dtype = DType::from_ggml_id(id).ok_or_else(|| {
            unsupported!("{}: tensor {name} has ggml type {id}, which is not implemented", path.display())
        })?;
        infos.push(Info { dtype, shape, offset: r.u64(&name)?, name });
    }
    let data_start =
        r.at.checked_next_multiple_of(alignment)
            .filter(|&start| start <= mapping.len() || infos.is_empty())
            .ok_or_else(|| {
                r.fail(format!("the tensors should begin after offset {}, the file has {} bytes", r.at, mapping.len()))
            })?;
    let mut tensors = BTreeMap::new();
    for Info { name, dtype, shape, offset } in infos {
        let fail = |what: String| Error::format(path, format!("tensor {name}: {what}"));
        if !offset.is_multiple_of(alignment as u64) {
            return Err(fail(format!("offset {offset} is no multiple of the alignment {alignment}")));
        }
        let bytes = super::tensor_bytes(dtype, &shape)
            .ok_or_else(|| fail(format!("shape {shape:?} is no whole number of {dtype} blocks")))?;
        let start = usize::try_from(offset).ok().and_then(|o| o.checked_add(data_start));
        let end = start.and_then(|s| s.checked_add(bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(fail(format!("offset {offset} is beyond the address space")));
        };
        let view = TensorView::new(mapping, &name, dtype, shape, start..end)?;
        if tensors.insert(name.clone(), view).is_some() {
            return Err(fail("stands twice".to_owned()));
        }
    }
    check_disjoint(tensors.values())?;
    Ok((metadata, tensors))
}
