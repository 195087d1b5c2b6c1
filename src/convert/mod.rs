//! From a Hub folder to GGUF, and from GGUF to GGUF of another type.
//!
//! The files are llama.cpp's: its architectures, tensor names, metadata and vocabularies, so that it runs them as the vanilla
//! base. The `phd.*` keys, which it does not know, carry hidden decoding. `docs/convert.md` says what is supported.

mod hub;
mod quantize;
mod vocab;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::checkpoint::gguf_writer::{Metadata, TensorInfo, Writer};
use crate::checkpoint::{Checkpoint, Description, OpenOptions, TensorView};
use crate::error::{Error, Result, invalid};
use crate::model;
use crate::tensor::DType;
use quantize::{Converter, is_quantized};

/// Types that weights can be converted to.
pub const TYPES: [DType; 9] =
    [DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::Q4_K, DType::Q5_K, DType::Q6_K];

pub struct Options<'a> {
    /// `tokenizer.ggml.pre` instead of what the tokenizer's own description says; for Hub folders.
    pub pre: Option<&'a str>,
    /// Quantized weights may be converted once more, from what their rounding left of them.
    pub requantize: bool,
    /// No finer type for the output layer.
    pub pure: bool,
    /// 0 = one per physical core that this process may use.
    pub n_threads: usize,
    /// Map the input (it must then not be truncated meanwhile) or read it whole.
    pub mmap: bool,
    /// Called with the fraction done; `false` cancels.
    pub progress: Option<&'a mut dyn FnMut(f32) -> bool>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Options { pre: None, requantize: false, pure: false, n_threads: 0, mmap: true, progress: None }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Bytes of the file.
    pub bytes: usize,
    /// Tensors of each type.
    pub dtypes: BTreeMap<DType, usize>,
    /// Sentences on what is not as was asked for.
    pub notes: Vec<String>,
}

/// Where a tensor's values come from.
enum Source {
    Stored(TensorView),
    /// The same, with the rows of each head reordered for interleaved RoPE; the head's dimension.
    Interleaved(TensorView, usize),
    Values(Vec<f32>),
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    source: Source,
}

impl Tensor {
    fn stored(name: impl Into<String>, view: &TensorView) -> Tensor {
        Tensor { name: name.into(), shape: view.shape.clone(), source: Source::Stored(view.clone()) }
    }

    fn values(name: impl Into<String>, values: Vec<f32>) -> Tensor {
        Tensor { name: name.into(), shape: vec![values.len()], source: Source::Values(values) }
    }

    fn dtype(&self) -> DType {
        match &self.source {
            Source::Stored(view) | Source::Interleaved(view, _) => view.dtype,
            Source::Values(_) => DType::F32,
        }
    }
}

/// Converts a Hub folder to the GGUF file `out`. Weights become `dtype`, or keep their type if that is `None`.
///
/// # Errors
/// As [`crate::Model::load`]; `Unsupported` naming what GGUF or llama.cpp cannot say; `InvalidArgument` for an output that is
/// one of the inputs, weights that the type cannot hold; `Io`; `Cancelled`. An existing `out` is then what it was.
pub fn convert(folder: &Path, out: &Path, dtype: Option<DType>, mut options: Options) -> Result<Summary> {
    report(&mut options, 0.0)?;
    let checkpoint = Checkpoint::open(folder, &OpenOptions { mmap: options.mmap })?;
    let Description::Hub(files) = &checkpoint.description else {
        return Err(invalid!("{}: is a GGUF file, expected a Hub folder", folder.display()));
    };
    check_output(&checkpoint, out)?;
    let (mut metadata, tensors) = hub::describe(&checkpoint, files)?;
    let mut notes = Vec::new();
    vocab::describe(&mut metadata, &checkpoint.path, files, hub::n_vocab(&tensors), options.pre, &mut notes)?;
    write(out, metadata, tensors, dtype, notes, options)
}

/// Converts the weights of a GGUF file; everything else stays as it is.
///
/// # Errors
/// As [`convert`]; `InvalidArgument` for weights that are quantized already, unless [`Options::requantize`].
pub fn quantize(input: &Path, out: &Path, dtype: DType, mut options: Options) -> Result<Summary> {
    report(&mut options, 0.0)?;
    let checkpoint = Checkpoint::open(input, &OpenOptions { mmap: options.mmap })?;
    let Description::Gguf(stored) = &checkpoint.description else {
        return Err(invalid!("{}: is a Hub folder, expected a GGUF file", input.display()));
    };
    check_output(&checkpoint, out)?;
    // Whatever would not load is refused now.
    model::from_gguf(&checkpoint, stored)?;
    let mut metadata = Metadata::default();
    // Written here: one file, aligned as GGUF does by default.
    let ours = |key: &str| key == "general.alignment" || key.starts_with("split.");
    for (key, value) in stored.raw().filter(|(key, _)| !ours(key)) {
        metadata.set_raw(key, value.to_vec());
    }
    let mut views: Vec<&TensorView> = checkpoint.tensors.values().collect();
    views.sort_by_key(|t| t.data.offset());
    let tensors = views.into_iter().map(|t| Tensor::stored(&t.name, t)).collect();
    write(out, metadata, tensors, Some(dtype), Vec::new(), options)
}

/// The name that users give a type: as [`DType::name`], in any case; llama.cpp's `Q4_K_S` and the like are not types.
pub fn parse_type(name: &str) -> Result<DType> {
    let known = || TYPES.map(DType::name).join(", ");
    let found = TYPES.into_iter().find(|t| t.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| invalid!("type {name:?} is unknown, expected one of {}", known()))
}

/// Files of a Hub folder beside its weights.
const HUB_FILES: [&str; 6] = [
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Refuses to write over what is read, whatever names lead to it.
fn check_output(checkpoint: &Checkpoint, out: &Path) -> Result<()> {
    match std::fs::metadata(out) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(out, e)),
        Ok(m) if !m.is_file() => return Err(invalid!("{}: is not a regular file", out.display())),
        Ok(_) => {}
    }
    let beside = HUB_FILES.iter().map(|name| checkpoint.path.join(name)).filter(|path| path.is_file());
    let inputs: BTreeSet<PathBuf> =
        checkpoint.tensors.values().map(|t| t.data.file().to_owned()).chain(beside).collect();
    for path in inputs {
        if same_file::is_same_file(&path, out).map_err(|e| Error::io(&path, e))? {
            return Err(invalid!("{}: is the input {}", out.display(), path.display()));
        }
    }
    Ok(())
}

fn report(options: &mut Options, fraction: f32) -> Result<()> {
    let go_on = options.progress.as_mut().is_none_or(|f| f(fraction));
    if go_on { Ok(()) } else { Err(Error::Cancelled) }
}

/// The type of a tensor in the file. As llama-quantize does it, without the mixtures of its `_M` types: linear layers and the
/// embedding have the type asked for; what multiplies the final hidden state has Q6_K if that type is coarser. Rows that are
/// no whole number of blocks get a type of 32-element blocks that is no coarser, or F16.
fn type_of(t: &Tensor, dtype: Option<DType>, is_output: bool, pure: bool) -> DType {
    let is_weight = t.shape.len() == 2 && t.name.ends_with(".weight") && !t.name.ends_with("_norm.weight");
    if !is_weight {
        return DType::F32; // what llama.cpp's kernels take
    }
    let Some(mut dtype) = dtype else { return t.dtype() };
    let fits = |dtype: DType| t.shape[1].is_multiple_of(dtype.block_len());
    if is_output && !pure && is_quantized(dtype) && dtype != DType::Q8_0 {
        dtype = if fits(dtype) { DType::Q6_K } else { DType::Q8_0 };
    }
    if !fits(dtype) {
        dtype = match dtype {
            DType::Q4_K => DType::Q5_0,
            DType::Q5_K => DType::Q5_1,
            DType::Q6_K => DType::Q8_0,
            other => other,
        };
    }
    if fits(dtype) { dtype } else { DType::F16 }
}

/// llama.cpp's `general.file_type` for a file of mostly this type.
fn file_type(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 7,
        DType::Q5_0 => 8,
        DType::Q5_1 => 9,
        DType::Q2_K => 10,
        DType::Q3_K => 11,
        DType::Q4_K => 14,
        DType::Q5_K => 16,
        DType::Q6_K => 18,
        DType::IQ4_NL => 25,
        DType::IQ4_XS => 30,
        DType::BF16 => 32,
    }
}

fn write(
    out: &Path,
    mut metadata: Metadata,
    tensors: Vec<Tensor>,
    dtype: Option<DType>,
    mut notes: Vec<String>,
    mut options: Options,
) -> Result<Summary> {
    if let Some(other) = dtype.filter(|t| !TYPES.contains(t)) {
        return Err(crate::error::unsupported!("conversion to {other} is not implemented"));
    }
    // Without an output layer of its own, a model uses its embedding.
    let output = if tensors.iter().any(|t| t.name == "output.weight") { "output.weight" } else { "token_embd.weight" };
    let mut infos = Vec::with_capacity(tensors.len());
    let mut elements = BTreeMap::<DType, usize>::new();
    let mut fallbacks = BTreeMap::<(usize, DType), usize>::new();
    for t in &tensors {
        let to = type_of(t, dtype, t.name == output, options.pure);
        if is_quantized(t.dtype()) && to != t.dtype() && !options.requantize {
            return Err(invalid!(
                "tensor {} is {} already; converting it to {to} would lose twice and has to be asked for (requantize)",
                t.name,
                t.dtype()
            ));
        }
        quantize::check_type(to)?;
        if t.shape.len() == 2 {
            *elements.entry(to).or_default() += t.shape.iter().product::<usize>();
            let asked = dtype.filter(|d| !t.shape[1].is_multiple_of(d.block_len()));
            if asked.is_some_and(|d| d != to) && t.name.ends_with(".weight") {
                *fallbacks.entry((t.shape[1], to)).or_default() += 1;
            }
        }
        infos.push(TensorInfo { name: t.name.clone(), dtype: to, shape: t.shape.clone() });
    }
    for ((width, to), n) in fallbacks {
        notes.push(format!("rows of {width} are no whole number of blocks: {n} tensors are {to}"));
    }
    let mostly = elements.into_iter().max_by_key(|&(_, n)| n).map_or(DType::F32, |(t, _)| t);
    metadata.set("general.quantization_version", 2u32);
    metadata.set("general.file_type", file_type(dtype.unwrap_or(mostly)));

    let mut converter = Converter::new(options.n_threads);
    let mut writer = Writer::create(out, &metadata, &infos)?;
    let total = tensors.iter().map(|t| t.shape.iter().product::<usize>()).sum::<usize>().max(1);
    let mut done = 0;
    for (t, info) in tensors.iter().zip(&infos) {
        let n = t.shape.iter().product::<usize>();
        converter.convert(t, info.dtype, &mut writer, &mut |elements| {
            report(&mut options, (done + elements) as f32 / total as f32)
        })?;
        done += n;
    }
    let mut dtypes = BTreeMap::new();
    infos.iter().for_each(|t| *dtypes.entry(t.dtype).or_default() += 1);
    let bytes = writer.total();
    writer.finish()?;
    Ok(Summary { bytes, dtypes, notes })
}
