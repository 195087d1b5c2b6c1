//! Hyper-parameters and named weights of a model family, checked. Knows nothing of devices.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::Value as Json;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::backend::{self, Backend};
use crate::checkpoint::gguf::Metadata;
use crate::checkpoint::{Checkpoint, Description, OpenOptions, TensorView};
use crate::error::{Error, Result, invalid, unsupported};
use crate::sampling::constraint::TokenEnvironment;
use crate::schedule::{Attention, Rules};
use crate::tensor::{DType, dequantize_row};
use crate::tokenizer::{GgufVocab, Tokenizer};

/// Where the two rotated elements of a RoPE pair lie within a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + head_dim / 2`: the Hub's convention.
    Halves,
    /// `2 i` and `2 i + 1`: GGUF files of the `llama` architecture, whose q and k weights are permuted for it.
    Adjacent,
}

/// Where a block's RMS norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and feed-forward (llama, mistral, qwen).
    Before,
    /// After them, before the residual addition (olmo2).
    After,
}

/// RMS norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    None,
    /// Over each head (qwen3).
    Head,
    /// Over the whole projection (olmo2).
    Projection,
}

#[derive(Clone, Debug)]
pub struct Hyper {
    pub family: String,
    pub n_vocab: usize,
    pub n_layers: usize,
    pub n_embd: usize,
    pub n_ff: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub n_ctx_train: usize,
    pub norm_eps: f32,
    pub norms: NormPlacement,
    pub qk_norm: QkNorm,
    pub rope_pairs: RopePairs,
    /// `[head_dim / 2]`: radians per position, scaling included.
    pub rope_frequencies: Vec<f64>,
    pub rules: Rules,
}

impl Hyper {
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// A linear layer, `y = W x + b`: weight `[out, in]`, bias `[out]`.
pub struct Linear {
    pub weight: TensorView,
    pub bias: Option<Vec<f32>>,
}

pub struct Layer {
    /// Before or after attention, see [`NormPlacement`]: `[n_embd]`.
    pub attention_norm: Vec<f32>,
    pub ffn_norm: Vec<f32>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// `[head_dim]` or the whole projection, see [`QkNorm`]; empty for none.
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

pub struct Weights {
    /// `[n_vocab, n_embd]`; one, or one for each copy under Sequential Hidden Decoding.
    pub embeddings: Vec<TensorView>,
    pub layers: Vec<Layer>,
    pub norm: Vec<f32>,
    pub head: TensorView,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendKind {
    #[default]
    Auto,
    Cpu,
    Cuda,
    /// Plain f32, one thread: the oracle of the others.
    Reference,
}

pub struct LoadOptions<'a> {
    pub backend: BackendKind,
    pub device: i32,
    /// Map the files (they must then not be truncated while the model lives) or read them whole.
    pub mmap: bool,
    /// (copies, window, chunk) instead of the checkpoint's own, to time any vanilla model as PHD.
    pub rules: Option<(usize, usize, usize)>,
    /// Called with the fraction done; `false` cancels.
    pub progress: Option<&'a mut dyn FnMut(f32) -> bool>,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        LoadOptions { backend: BackendKind::Auto, device: 0, mmap: true, rules: None, progress: None }
    }
}

/// What a model says of itself.
#[derive(Clone, Debug)]
pub struct Desc {
    pub n_vocab: usize,
    pub n_layers: usize,
    pub n_embd: usize,
    pub n_ctx_train: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub n_ff: usize,
    pub rules: Rules,
    pub family: String,
    /// `general.name` of a GGUF file; empty if there is none.
    pub name: String,
    pub n_parameters: usize,
    /// Of all tensors, as the checkpoint stores them.
    pub weight_bytes: usize,
    /// Such as "Q4_1 x 210, F32 x 61".
    pub dtypes: String,
    /// The type of most parameters.
    pub weight_type: DType,
}

/// Weights prepared for a backend, and a tokenizer: immutable, shared by any number of threads.
pub struct Model {
    pub(crate) hyper: Arc<Hyper>,
    pub(crate) backend: Arc<dyn Backend>,
    tokenizer: Option<Arc<Tokenizer>>,
    token_environment: Arc<OnceLock<Arc<TokenEnvironment>>>,
    desc: Desc,
    weights_hash: u128,
}

impl Model {
    /// Loads a Hub folder or a GGUF file.
    ///
    /// # Errors
    /// `Io`, `Format` for what is not a checkpoint, `Unsupported` naming what is not implemented, `Cancelled`.
    pub fn load(path: &Path, mut options: LoadOptions) -> Result<Model> {
        let mut report = |fraction: f32| {
            let go_on = options.progress.as_mut().is_none_or(|f| f(fraction));
            if go_on { Ok(()) } else { Err(Error::Cancelled) }
        };
        report(0.0)?;
        let checkpoint = Checkpoint::open(path, &OpenOptions { mmap: options.mmap })?;
        report(0.1)?;
        let tokenizer = tokenizer_of(&checkpoint)?;
        give_back_memory(); // it is much, and weights are about to be there beside their file
        report(0.3)?;
        let (mut hyper, weights) = match &checkpoint.description {
            Description::Hub(files) => from_hub(&checkpoint, &files.config)?,
            Description::Gguf(metadata) => from_gguf(&checkpoint, metadata)?,
        };
        if let Some(rules) = options.rules {
            hyper.rules = other_rules(&hyper, rules)?;
        }
        let desc = describe(&hyper, &checkpoint)?;
        let hyper = Arc::new(hyper);
        let weights_hash = hash_weights(&checkpoint);
        let backend =
            backend::prepare(hyper.clone(), weights, options.backend, options.device, &mut |f| report(0.3 + 0.7 * f))?;
        report(1.0)?;
        log::info!(
            "{}: {}, {} layers of {}, {} copies, on {}",
            path.display(),
            hyper.family,
            hyper.n_layers,
            hyper.n_embd,
            hyper.rules.copies,
            backend.name()
        );
        let token_environment = Arc::default();
        let tokenizer = tokenizer.map(Arc::new);
        drop(checkpoint);
        give_back_memory();
        Ok(Model { hyper, backend, tokenizer, token_environment, desc, weights_hash })
    }

    /// The same weights, shared, run with other (copies, window, chunk): see [`LoadOptions::rules`].
    ///
    /// # Errors
    /// `InvalidArgument` for rules out of range, or a model of Sequential Hidden Decoding.
    pub fn with_rules(&self, rules: (usize, usize, usize)) -> Result<Model> {
        let rules = other_rules(&self.hyper, rules)?;
        Ok(Model {
            hyper: Arc::new(Hyper { rules, ..(*self.hyper).clone() }),
            backend: self.backend.clone(),
            tokenizer: self.tokenizer.clone(),
            token_environment: self.token_environment.clone(),
            desc: Desc { rules, ..self.desc.clone() },
            weights_hash: self.weights_hash,
        })
    }

    /// Tells models apart: hyper-parameters, rules, and each tensor's name, type, shape and a sample of its bytes.
    pub fn fingerprint(&self) -> u128 {
        let text = format!("{:?} {:x}", self.hyper, self.weights_hash);
        xxh3_128(text.as_bytes())
    }

    /// Bytes of weights that one pass reads.
    pub fn pass_bytes(&self) -> usize {
        self.backend.pass_bytes()
    }

    /// Bytes a second that the memory of the weights gives, measured now: read by `n_threads` of the CPU, or copied by the GPU.
    pub fn bandwidth(&self, n_threads: usize) -> Result<f64> {
        self.backend.bandwidth(n_threads)
    }

    pub fn desc(&self) -> &Desc {
        &self.desc
    }

    /// `None` if the checkpoint has none: token ids only.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_deref()
    }

    /// What constraints of the output need of the vocabulary; made by the first call, which takes a moment.
    ///
    /// # Errors
    /// `Unsupported` if there is no tokenizer, or none of its tokens ends a text.
    pub fn token_environment(&self) -> Result<Arc<TokenEnvironment>> {
        if let Some(made) = self.token_environment.get() {
            return Ok(made.clone());
        }
        let tokenizer =
            self.tokenizer().ok_or_else(|| unsupported!("the checkpoint has no tokenizer: token ids only"))?;
        let made = Arc::new(TokenEnvironment::new(tokenizer)?);
        Ok(self.token_environment.get_or_init(|| made).clone())
    }

    /// What computes: the backend and its variant.
    pub fn backend_name(&self) -> String {
        self.backend.name()
    }
}

/// Building a tokenizer takes several times the memory that it keeps, in small pieces that the allocator holds on to. It is the host's
/// allocator: its own free pages go back, too, and it takes them again when it needs them.
fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Names, types, shapes, and some sixteen pieces of each tensor: reading all of a large file would take longer than loading it.
fn hash_weights(checkpoint: &Checkpoint) -> u128 {
    const PIECE: usize = 4096;
    let mut hash = Xxh3::new();
    for t in checkpoint.tensors.values() {
        hash.update(format!("{:?} {:?} {:?}\0", t.name, t.dtype, t.shape).as_bytes());
        let data: &[u8] = &t.data;
        let step = (data.len() / 16).next_multiple_of(PIECE).max(PIECE);
        data.chunks(step).for_each(|c| hash.update(&c[..c.len().min(PIECE)]));
        hash.update(&data[data.len().saturating_sub(PIECE)..]);
    }
    hash.digest128()
}

fn other_rules(hyper: &Hyper, (copies, window, chunk): (usize, usize, usize)) -> Result<Rules> {
    if hyper.rules.attention == Attention::Full {
        return Err(invalid!("copies, window and chunk of a {} model cannot be changed", hyper.family));
    }
    let rules = Rules { copies, window, chunk, attention: Attention::Hidden };
    rules.check()?;
    Ok(rules)
}

fn describe(hyper: &Hyper, checkpoint: &Checkpoint) -> Result<Desc> {
    // (tensors, parameters) of each type.
    let mut counts = BTreeMap::<DType, (usize, usize)>::new();
    for t in checkpoint.tensors.values() {
        let (n_tensors, n_parameters) = counts.entry(t.dtype).or_default();
        *n_tensors += 1;
        *n_parameters += t.shape.iter().product::<usize>();
    }
    let name = match &checkpoint.description {
        Description::Hub(_) => None,
        Description::Gguf(metadata) => metadata.str("general.name")?,
    };
    let weight_type = counts.iter().max_by_key(|(_, (_, n))| *n).map_or(DType::F32, |(&dtype, _)| dtype);
    let n_parameters = counts.values().map(|(_, n)| n).sum();
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, (n, _))| std::cmp::Reverse(n));
    Ok(Desc {
        n_vocab: hyper.n_vocab,
        n_layers: hyper.n_layers,
        n_embd: hyper.n_embd,
        n_ctx_train: hyper.n_ctx_train,
        n_heads: hyper.n_heads,
        n_kv_heads: hyper.n_kv_heads,
        head_dim: hyper.head_dim,
        n_ff: hyper.n_ff,
        rules: hyper.rules,
        family: hyper.family.clone(),
        name: name.unwrap_or_default().to_owned(),
        n_parameters,
        weight_bytes: checkpoint.tensor_bytes,
        dtypes: counts.iter().map(|(t, (n, _))| format!("{t} x {n}")).collect::<Vec<_>>().join(", "),
        weight_type,
    })
}

fn tokenizer_of(checkpoint: &Checkpoint) -> Result<Option<Tokenizer>> {
    match &checkpoint.description {
        Description::Hub(files) => files.tokenizer.as_deref().map(|path| Tokenizer::from_hub(path, files)).transpose(),
        Description::Gguf(metadata) => {
            let vocab = GgufVocab::from_metadata(metadata)?;
            vocab.map(|v| Tokenizer::from_gguf(&checkpoint.path, v)).transpose()
        }
    }
}

/// Looks tensors up by name, dtype and shape, and knows at the end what nobody asked for.
struct Lookup<'a> {
    checkpoint: &'a Checkpoint,
    used: BTreeSet<String>,
}

impl<'a> Lookup<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Self {
        Lookup { checkpoint, used: BTreeSet::new() }
    }

    fn optional(&mut self, name: &str, shape: &[usize]) -> Result<Option<TensorView>> {
        let Some(tensor) = self.checkpoint.tensors.get(name) else { return Ok(None) };
        if tensor.shape != shape {
            let what = format!("tensor {name} has shape {:?}, expected {shape:?}", tensor.shape);
            return Err(Error::format(&self.checkpoint.path, what));
        }
        self.used.insert(name.to_owned());
        Ok(Some(tensor.clone()))
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<TensorView> {
        self.optional(name, shape)?
            .ok_or_else(|| Error::format(&self.checkpoint.path, format!("tensor {name} of shape {shape:?} is missing")))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, &[len])?;
        Ok(to_f32(&tensor))
    }

    fn linear(&mut self, name: &str, n_out: usize, n_in: usize) -> Result<Linear> {
        let weight = self.tensor(&format!("{name}.weight"), &[n_out, n_in])?;
        let bias = self.optional(&format!("{name}.bias"), &[n_out])?.map(|b| to_f32(&b));
        Ok(Linear { weight, bias })
    }

    /// Refuses tensors that the family does not have: weights that are there must not be ignored.
    fn finish(self, harmless: impl Fn(&str) -> bool) -> Result<()> {
        match self.checkpoint.tensors.keys().find(|name| !self.used.contains(*name) && !harmless(name)) {
            Some(name) => {
                Err(unsupported!("{}: tensor {name} has no place in this model family", self.checkpoint.path.display()))
            }
            None => Ok(()),
        }
    }
}

fn to_f32(tensor: &TensorView) -> Vec<f32> {
    let mut out = vec![0.0; tensor.shape.iter().product()];
    dequantize_row(tensor.dtype, &tensor.data, &mut out);
    out
}

/// A whole number within bounds, or a sentence with the field's name.
fn in_range(path: &Path, field: &str, value: u64, low: usize, high: usize) -> Result<usize> {
    usize::try_from(value)
        .ok()
        .filter(|v| (low..=high).contains(v))
        .ok_or_else(|| Error::format(path, format!("{field} is {value}, expected {low} to {high}")))
}

fn finite(path: &Path, field: &str, value: f64, low: f64, high: f64) -> Result<f64> {
    if value.is_finite() && value >= low && value <= high {
        Ok(value)
    } else {
        Err(Error::format(path, format!("{field} is {value}, expected {low:e} to {high:e}")))
    }
}

const MAX_VOCAB: usize = 1 << 22;
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 18;
const MAX_HEADS: usize = 1024;
const MAX_HEAD_DIM: usize = 1024;
const MAX_CONTEXT: usize = 1 << 30;

/// Typed reading of `config.json`.
struct Config<'a> {
    path: &'a Path,
    json: &'a Json,
}

impl Config<'_> {
    /// The value, unless absent or null.
    fn get(&self, field: &str) -> Option<&Json> {
        self.json.get(field).filter(|v| !v.is_null())
    }

    fn expected(&self, field: &str, what: &str) -> Error {
        Error::format(self.path, format!("config.json: {field} is {}, expected {what}", short(&self.json[field])))
    }

    fn usize(&self, field: &str, low: usize, high: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_u64().ok_or_else(|| self.expected(field, "a whole number"))?;
        in_range(self.path, &format!("config.json: {field}"), number, low, high).map(Some)
    }

    fn required(&self, field: &str, low: usize, high: usize) -> Result<usize> {
        self.usize(field, low, high)?
            .ok_or_else(|| Error::format(self.path, format!("config.json: {field} is missing")))
    }

    fn number(&self, field: &str, low: f64, high: f64) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| self.expected(field, "a number"))?;
        finite(self.path, &format!("config.json: {field}"), number, low, high).map(Some)
    }

    fn str(&self, field: &str) -> Result<Option<&str>> {
        self.get(field).map(|v| v.as_str().ok_or_else(|| self.expected(field, "a string"))).transpose()
    }

    fn flag(&self, field: &str) -> Result<bool> {
        Ok(self
            .get(field)
            .map(|v| v.as_bool().ok_or_else(|| self.expected(field, "true or false")))
            .transpose()?
            .unwrap_or(false))
    }

    fn refuse(&self, field: &str) -> Error {
        unsupported!("{}: config.json: {field} = {} is not implemented", self.path.display(), short(&self.json[field]))
    }
}

fn short(value: &Json) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

pub(crate) fn from_hub(checkpoint: &Checkpoint, json: &Json) -> Result<(Hyper, Weights)> {
    let path = &checkpoint.path;
    let c = Config { path, json };
    let model_type =
        c.str("model_type")?.ok_or_else(|| Error::format(path, "config.json: model_type is missing"))?.to_owned();
    let (norms, qk_norm) = match model_type.as_str() {
        "llama" | "mistral" | "qwen2" => (NormPlacement::Before, QkNorm::None),
        "qwen3" | "qwen3_scale_seq" => (NormPlacement::Before, QkNorm::Head),
        "olmo2" => (NormPlacement::After, QkNorm::Projection),
        _ => return Err(c.refuse("model_type")),
    };
    for field in [
        "quantization_config",
        "num_experts",
        "num_local_experts",
        "attention_multiplier",
        "logits_scaling",
        "embedding_multiplier",
        "residual_multiplier",
        "final_logit_softcapping",
        "attn_logit_softcapping",
    ] {
        if c.get(field).is_some() {
            return Err(c.refuse(field));
        }
    }
    if !matches!(c.str("hidden_act")?, None | Some("silu")) {
        return Err(c.refuse("hidden_act"));
    }
    if !matches!(c.number("partial_rotary_factor", 0.0, 1.0)?, None | Some(1.0)) {
        return Err(c.refuse("partial_rotary_factor"));
    }
    let n_ctx_train = c.required("max_position_embeddings", 1, MAX_CONTEXT)?;
    // qwen2 and qwen3 name a window that they only use when told to; mistral uses what it names.
    let sliding = c.usize("sliding_window", 0, usize::MAX)?.is_some_and(|w| w > 0 && w < n_ctx_train);
    if sliding && (c.flag("use_sliding_window")? || (model_type == "mistral" && c.get("use_sliding_window").is_none()))
    {
        return Err(c.refuse("sliding_window"));
    }

    let n_embd = c.required("hidden_size", 1, MAX_WIDTH)?;
    let n_heads = c.required("num_attention_heads", 1, MAX_HEADS)?;
    let n_kv_heads = c.usize("num_key_value_heads", 1, MAX_HEADS)?.unwrap_or(n_heads);
    let head_dim = c.usize("head_dim", 1, MAX_HEAD_DIM)?.unwrap_or(n_embd / n_heads);
    let rules = hub_rules(&c, &model_type)?;
    let hyper = Hyper {
        n_vocab: c.required("vocab_size", 1, MAX_VOCAB)?,
        n_layers: c.required("num_hidden_layers", 1, MAX_LAYERS)?,
        n_embd,
        n_ff: c.required("intermediate_size", 1, MAX_WIDTH)?,
        n_heads,
        n_kv_heads,
        head_dim,
        n_ctx_train,
        norm_eps: c.number("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6) as f32,
        norms,
        qk_norm,
        rope_pairs: RopePairs::Halves,
        rope_frequencies: hub_rope(path, json, head_dim)?.frequencies(head_dim),
        rules,
        family: model_type,
    };
    check_heads(path, &hyper)?;

    let (e, q_dim, kv_dim) = (hyper.n_embd, hyper.q_dim(), hyper.kv_dim());
    let mut t = Lookup::new(checkpoint);
    let mut embeddings = vec![t.tensor("model.embed_tokens.weight", &[hyper.n_vocab, e])?];
    if rules.attention == Attention::Full {
        for copy in 0..rules.copies - 1 {
            let name = format!("model.scale_seq_embed_tokens_list.{copy}.weight");
            embeddings.push(t.tensor(&name, &[hyper.n_vocab, e])?);
        }
    }
    let (attention_norm, ffn_norm) = match norms {
        NormPlacement::Before => ("input_layernorm", "post_attention_layernorm"),
        NormPlacement::After => ("post_attention_layernorm", "post_feedforward_layernorm"),
    };
    let (q_norm, k_norm) = qk_norm_lengths(&hyper);
    let mut layers = Vec::with_capacity(hyper.n_layers);
    for i in 0..hyper.n_layers {
        let p = format!("model.layers.{i}");
        let mut norm = |name: &str, len: usize| match len {
            0 => Ok(Vec::new()),
            _ => t.vector(&format!("{p}.{name}.weight"), len),
        };
        layers.push(Layer {
            attention_norm: norm(attention_norm, e)?,
            ffn_norm: norm(ffn_norm, e)?,
            q_norm: norm("self_attn.q_norm", q_norm)?,
            k_norm: norm("self_attn.k_norm", k_norm)?,
            q: t.linear(&format!("{p}.self_attn.q_proj"), q_dim, e)?,
            k: t.linear(&format!("{p}.self_attn.k_proj"), kv_dim, e)?,
            v: t.linear(&format!("{p}.self_attn.v_proj"), kv_dim, e)?,
            o: t.linear(&format!("{p}.self_attn.o_proj"), e, q_dim)?,
            gate: t.linear(&format!("{p}.mlp.gate_proj"), hyper.n_ff, e)?,
            up: t.linear(&format!("{p}.mlp.up_proj"), hyper.n_ff, e)?,
            down: t.linear(&format!("{p}.mlp.down_proj"), e, hyper.n_ff)?,
        });
    }
    let norm = t.vector("model.norm.weight", e)?;
    let tied = c.flag("tie_word_embeddings")?;
    let head = if tied { embeddings[0].clone() } else { t.tensor("lm_head.weight", &[hyper.n_vocab, e])? };
    // Old exports carry RoPE tables, and tied ones a second copy of the embedding.
    t.finish(|name| name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight"))?;
    Ok((hyper, Weights { embeddings, layers, norm, head }))
}

fn hub_rules(c: &Config, model_type: &str) -> Result<Rules> {
    let in_file = |e: Error| Error::format(c.path, format!("config.json: phd: {e}"));
    if model_type == "qwen3_scale_seq" {
        let copies = c.usize("scale_seq_times", 0, Rules::MAX_COPIES - 1)?.unwrap_or(0) + 1;
        if c.get("phd").is_some() {
            return Err(c.refuse("phd"));
        }
        return Ok(Rules { copies, window: 0, chunk: 0, attention: Attention::Full });
    }
    let Some(phd) = c.get("phd") else { return Ok(Rules::VANILLA) };
    let fields = phd.as_object().ok_or_else(|| c.expected("phd", "an object"))?;
    if let Some(name) = fields.keys().find(|k| !["copies", "window", "chunk"].contains(&k.as_str())) {
        return Err(unsupported!("{}: config.json: phd.{name} is not implemented", c.path.display()));
    }
    let sub = Config { path: c.path, json: phd };
    let read = |field: &str| sub.usize(field, 0, usize::MAX >> 1);
    let rules = Rules {
        copies: read("copies")?.unwrap_or(1),
        window: read("window")?.unwrap_or(0),
        chunk: read("chunk")?.unwrap_or(0),
        attention: Attention::Hidden,
    };
    rules.check().map_err(in_file)?;
    Ok(rules)
}

fn base_frequencies(theta: f64, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64)).collect()
}

/// How a Hub folder's positions become angles.
pub(crate) struct HubRope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

pub(crate) enum RopeScaling {
    None,
    /// What positions are divided by.
    Linear(f64),
    /// `[head_dim / 2]`: what the unscaled frequencies are divided by.
    Factors(Vec<f64>),
}

impl HubRope {
    /// `[head_dim / 2]`, in radians per position.
    fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let mut frequencies = base_frequencies(self.theta, head_dim);
        match &self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear(factor) => frequencies.iter_mut().for_each(|f| *f /= factor),
            RopeScaling::Factors(factors) => frequencies.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor),
        }
        frequencies
    }
}

/// Reads `rope_theta` and `rope_scaling` of a `config.json`; `path` is named in messages.
pub(crate) fn hub_rope(path: &Path, json: &Json, head_dim: usize) -> Result<HubRope> {
    let c = Config { path, json };
    let scaling_field = if c.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let empty = Json::Object(Default::default());
    let scaling = Config { path, json: c.get(scaling_field).unwrap_or(&empty) };
    if !scaling.json.is_object() {
        return Err(c.expected(scaling_field, "an object"));
    }
    let theta = match c.number("rope_theta", 1.0, 1e12)? {
        Some(theta) => theta,
        None => scaling.number("rope_theta", 1.0, 1e12)?.unwrap_or(10_000.0),
    };
    let kind = match scaling.str("rope_type")? {
        Some(kind) => kind,
        None => scaling.str("type")?.unwrap_or("default"),
    };
    let need = |field: &str, low: f64, high: f64| {
        scaling
            .number(field, low, high)?
            .ok_or_else(|| Error::format(path, format!("config.json: {scaling_field}.{field} is missing")))
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear(need("factor", 1e-6, 1e6)?),
        "llama3" => {
            let factor = need("factor", 1e-6, 1e6)?;
            let (low, high) = (need("low_freq_factor", 1e-6, 1e6)?, need("high_freq_factor", 1e-6, 1e6)?);
            let old = need("original_max_position_embeddings", 1.0, 1e12)?;
            if high <= low {
                return Err(Error::format(
                    path,
                    format!(
                        "config.json: {scaling_field}: high_freq_factor is {high}, expected more than low_freq_factor {low}"
                    ),
                ));
            }
            let factors = base_frequencies(theta, head_dim).into_iter().map(|f| {
                let wavelength = 2.0 * std::f64::consts::PI / f;
                let smooth = ((old / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                1.0 / ((1.0 - smooth) / factor + smooth)
            });
            RopeScaling::Factors(factors.collect())
        }
        _ => return Err(c.refuse(scaling_field)),
    };
    Ok(HubRope { theta, scaling })
}

fn qk_norm_lengths(hyper: &Hyper) -> (usize, usize) {
    match hyper.qk_norm {
        QkNorm::None => (0, 0),
        QkNorm::Head => (hyper.head_dim, hyper.head_dim),
        QkNorm::Projection => (hyper.q_dim(), hyper.kv_dim()),
    }
}

fn check_heads(path: &Path, h: &Hyper) -> Result<()> {
    if !h.n_heads.is_multiple_of(h.n_kv_heads) {
        let what = format!("{} query heads are no multiple of {} key/value heads", h.n_heads, h.n_kv_heads);
        return Err(Error::format(path, what));
    }
    if h.head_dim == 0 || !h.head_dim.is_multiple_of(2) {
        return Err(Error::format(path, format!("head dimension is {}, expected an even number", h.head_dim)));
    }
    if h.q_dim() > MAX_WIDTH {
        return Err(Error::format(path, format!("{} heads of {} exceed {MAX_WIDTH}", h.n_heads, h.head_dim)));
    }
    Ok(())
}

pub(crate) fn from_gguf(checkpoint: &Checkpoint, m: &Metadata) -> Result<(Hyper, Weights)> {
    let path = &checkpoint.path;
    let missing = |key: &str| Error::format(path, format!("metadata key {key} is missing"));
    let arch = m.str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?.to_owned();
    let (norms, qk_norm, rope_pairs) = match arch.as_str() {
        "llama" => (NormPlacement::Before, QkNorm::None, RopePairs::Adjacent),
        "qwen2" => (NormPlacement::Before, QkNorm::None, RopePairs::Halves),
        "qwen3" => (NormPlacement::Before, QkNorm::Head, RopePairs::Halves),
        "olmo2" => (NormPlacement::After, QkNorm::Projection, RopePairs::Halves),
        _ => return Err(unsupported!("{}: architecture {arch} is not implemented", path.display())),
    };
    let key = |name: &str| format!("{arch}.{name}");
    for (name, neutral) in [
        ("expert_count", 0.0),
        ("logit_scale", 1.0),
        ("embedding_scale", 1.0),
        ("residual_scale", 1.0),
        ("attention.scale", 0.0),
        ("attention.sliding_window", 0.0),
        ("attention.max_alibi_bias", 0.0),
    ] {
        let value = if name == "expert_count" || name == "attention.sliding_window" {
            m.u32(&key(name))?.map(|v| v as f32)
        } else {
            m.f32(&key(name))?
        };
        if value.is_some_and(|v| v != neutral) {
            return Err(unsupported!(
                "{}: metadata key {} = {} is not implemented",
                path.display(),
                key(name),
                value.unwrap()
            ));
        }
    }
    let opt = |name: &str, low: usize, high: usize| {
        m.u32(&key(name))?.map(|v| in_range(path, &key(name), v.into(), low, high)).transpose()
    };
    let required = |name: &str, low: usize, high: usize| opt(name, low, high)?.ok_or_else(|| missing(&key(name)));
    let n_embd = required("embedding_length", 1, MAX_WIDTH)?;
    let n_heads = required("attention.head_count", 1, MAX_HEADS)?;
    let n_kv_heads = opt("attention.head_count_kv", 1, MAX_HEADS)?.unwrap_or(n_heads);
    let head_dim = opt("attention.key_length", 1, MAX_HEAD_DIM)?.unwrap_or(n_embd / n_heads);
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = opt(name, 0, usize::MAX)?.filter(|&v| v != head_dim) {
            return Err(unsupported!(
                "{}: {} is {found}, only the head dimension {head_dim} is implemented",
                path.display(),
                key(name)
            ));
        }
    }
    let embedding = checkpoint.tensors.get("token_embd.weight");
    let n_vocab =
        embedding.map(|t| t.shape[0]).ok_or_else(|| Error::format(path, "tensor token_embd.weight is missing"))?;
    if let Some(tokens) = m.strings("tokenizer.ggml.tokens")?.filter(|t| t.len() > n_vocab) {
        return Err(Error::format(
            path,
            format!("the vocabulary has {} tokens, token_embd.weight only {n_vocab} rows", tokens.len()),
        ));
    }

    let mut t = Lookup::new(checkpoint);
    let theta =
        finite(path, &key("rope.freq_base"), m.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0).into(), 1.0, 1e12)?;
    let mut rope_frequencies = base_frequencies(theta, head_dim);
    match m.str(&key("rope.scaling.type"))?.unwrap_or("none") {
        "none" => {}
        "linear" => {
            let factor = m.f32(&key("rope.scaling.factor"))?.ok_or_else(|| missing(&key("rope.scaling.factor")))?;
            let factor = finite(path, &key("rope.scaling.factor"), factor.into(), 1e-6, 1e6)?;
            rope_frequencies.iter_mut().for_each(|f| *f /= factor);
        }
        other => {
            return Err(unsupported!("{}: {} = {other} is not implemented", path.display(), key("rope.scaling.type")));
        }
    }
    if let Some(factors) = t.optional("rope_freqs.weight", &[head_dim / 2])? {
        for (f, factor) in rope_frequencies.iter_mut().zip(to_f32(&factors)) {
            *f /= finite(path, "an element of rope_freqs.weight", factor.into(), 1e-6, 1e6)?;
        }
    }
    let phd = |name: &str| Ok::<_, Error>(m.u32(&format!("phd.{name}"))?.map(|v| v as usize));
    if let Some((name, _)) =
        m.iter().find(|(k, _)| k.starts_with("phd.") && !["phd.copies", "phd.window", "phd.chunk"].contains(k))
    {
        return Err(unsupported!("{}: metadata key {name} is not implemented", path.display()));
    }
    let rules = Rules {
        copies: phd("copies")?.unwrap_or(1),
        window: phd("window")?.unwrap_or(0),
        chunk: phd("chunk")?.unwrap_or(0),
        attention: Attention::Hidden,
    };
    rules.check().map_err(|e| Error::format(path, format!("phd.*: {e}")))?;
    let hyper = Hyper {
        n_vocab: in_range(path, "rows of token_embd.weight", n_vocab as u64, 1, MAX_VOCAB)?,
        n_layers: required("block_count", 1, MAX_LAYERS)?,
        n_embd,
        n_ff: required("feed_forward_length", 1, MAX_WIDTH)?,
        n_heads,
        n_kv_heads,
        head_dim,
        n_ctx_train: required("context_length", 1, MAX_CONTEXT)?,
        norm_eps: {
            let name = key("attention.layer_norm_rms_epsilon");
            finite(path, &name, m.f32(&name)?.ok_or_else(|| missing(&name))?.into(), 0.0, 1.0)? as f32
        },
        norms,
        qk_norm,
        rope_pairs,
        rope_frequencies,
        rules,
        family: arch,
    };
    check_heads(path, &hyper)?;

    let (e, q_dim, kv_dim) = (hyper.n_embd, hyper.q_dim(), hyper.kv_dim());
    let embeddings = vec![t.tensor("token_embd.weight", &[n_vocab, e])?];
    let (attention_norm, ffn_norm) = match norms {
        NormPlacement::Before => ("attn_norm", "ffn_norm"),
        NormPlacement::After => ("post_attention_norm", "post_ffw_norm"),
    };
    let (q_norm, k_norm) = qk_norm_lengths(&hyper);
    let mut layers = Vec::with_capacity(hyper.n_layers);
    for i in 0..hyper.n_layers {
        let mut norm = |name: &str, len: usize| match len {
            0 => Ok(Vec::new()),
            _ => t.vector(&format!("blk.{i}.{name}.weight"), len),
        };
        layers.push(Layer {
            attention_norm: norm(attention_norm, e)?,
            ffn_norm: norm(ffn_norm, e)?,
            q_norm: norm("attn_q_norm", q_norm)?,
            k_norm: norm("attn_k_norm", k_norm)?,
            q: t.linear(&format!("blk.{i}.attn_q"), q_dim, e)?,
            k: t.linear(&format!("blk.{i}.attn_k"), kv_dim, e)?,
            v: t.linear(&format!("blk.{i}.attn_v"), kv_dim, e)?,
            o: t.linear(&format!("blk.{i}.attn_output"), e, q_dim)?,
            gate: t.linear(&format!("blk.{i}.ffn_gate"), hyper.n_ff, e)?,
            up: t.linear(&format!("blk.{i}.ffn_up"), hyper.n_ff, e)?,
            down: t.linear(&format!("blk.{i}.ffn_down"), e, hyper.n_ff)?,
        });
    }
    let norm = t.vector("output_norm.weight", e)?;
    let head = match t.optional("output.weight", &[n_vocab, e])? {
        Some(head) => head,
        None => embeddings[0].clone(),
    };
    t.finish(|_| false)?;
    Ok((hyper, Weights { embeddings, layers, norm, head }))
}
