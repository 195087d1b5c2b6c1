//! A Hub folder's hyper-parameters and weights under llama.cpp's names.

use super::quantize::interleaved;
use super::{Source, Tensor};
use crate::checkpoint::gguf_writer::Metadata;
use crate::checkpoint::{Checkpoint, HubFiles};
use crate::error::{Result, unsupported};
use crate::model::{self, Hyper, NormPlacement, RopeScaling};
use crate::schedule::Attention;

/// Rows of the embedding.
pub fn n_vocab(tensors: &[Tensor]) -> usize {
    tensors.iter().find(|t| t.name == "token_embd.weight").map_or(0, |t| t.shape[0])
}

/// Metadata and tensors, without the tokenizer.
///
/// # Errors
/// As [`model::from_hub`]; `Unsupported` for what llama.cpp's graph of the family has no place for.
pub fn describe(checkpoint: &Checkpoint, files: &HubFiles) -> Result<(Metadata, Vec<Tensor>)> {
    let path = &checkpoint.path;
    let (hyper, weights) = model::from_hub(checkpoint, &files.config)?;
    let refuse = |what: &str| unsupported!("{}: {what}", path.display());
    if hyper.rules.attention == Attention::Full {
        return Err(refuse(&format!("{} has several embedding tables, for which GGUF has no names", hyper.family)));
    }
    // llama.cpp runs mistral as llama.
    let arch = if hyper.family == "mistral" { "llama" } else { hyper.family.as_str() };
    let is_llama = arch == "llama";
    if matches!(arch, "qwen2" | "olmo2") && hyper.q_dim() != hyper.n_embd {
        let what = format!(
            "{} heads of {} do not make the hidden size {}, which llama.cpp's {arch} expects",
            hyper.n_heads, hyper.head_dim, hyper.n_embd
        );
        return Err(refuse(&what));
    }
    let rope = model::hub_rope(path, &files.config, hyper.head_dim)?;
    let mut tensors = Vec::new();
    tensors.push(Tensor::stored("token_embd.weight", &weights.embeddings[0]));
    match rope.scaling {
        RopeScaling::Factors(_) if !is_llama => {
            return Err(refuse(&format!("llama.cpp's {arch} has no place for llama3 RoPE scaling")));
        }
        RopeScaling::Factors(ref factors) => {
            tensors.push(Tensor::values("rope_freqs.weight", factors.iter().map(|&f| f as f32).collect()));
        }
        RopeScaling::None | RopeScaling::Linear(_) => {}
    }
    let (attention_norm, ffn_norm) = match hyper.norms {
        NormPlacement::Before => ("attn_norm", "ffn_norm"),
        NormPlacement::After => ("post_attention_norm", "post_ffw_norm"),
    };
    for (i, layer) in weights.layers.into_iter().enumerate() {
        let norms = [
            (attention_norm, layer.attention_norm),
            (ffn_norm, layer.ffn_norm),
            ("attn_q_norm", layer.q_norm),
            ("attn_k_norm", layer.k_norm),
        ];
        for (name, norm) in norms.into_iter().filter(|n| !n.1.is_empty()) {
            tensors.push(Tensor::values(format!("blk.{i}.{name}.weight"), norm));
        }
        // (name, layer, whether its rows are those of rotated heads)
        let linears = [
            ("attn_q", layer.q, true),
            ("attn_k", layer.k, true),
            ("attn_v", layer.v, false),
            ("attn_output", layer.o, false),
            ("ffn_gate", layer.gate, false),
            ("ffn_up", layer.up, false),
            ("ffn_down", layer.down, false),
        ];
        for (name, linear, is_rotated) in linears {
            let head_dim = (is_rotated && is_llama).then_some(hyper.head_dim);
            let mut weight = Tensor::stored(format!("blk.{i}.{name}.weight"), &linear.weight);
            if let Some(head_dim) = head_dim {
                weight.source = Source::Interleaved(linear.weight, head_dim);
            }
            tensors.push(weight);
            let Some(mut bias) = linear.bias else { continue };
            if !is_llama && !["attn_q", "attn_k", "attn_v"].contains(&name) {
                return Err(refuse(&format!("llama.cpp's {arch} has no place for the bias of {name}")));
            }
            if let Some(head_dim) = head_dim {
                bias = (0..bias.len()).map(|row| bias[interleaved(row, head_dim)]).collect();
            }
            tensors.push(Tensor::values(format!("blk.{i}.{name}.bias"), bias));
        }
    }
    tensors.push(Tensor::values("output_norm.weight", weights.norm));
    // A tied output layer is left out, but for the one graph that does not look for it in the embedding.
    if weights.head.name != weights.embeddings[0].name || arch == "olmo2" {
        tensors.push(Tensor::stored("output.weight", &weights.head));
    }
    Ok((metadata(arch, &name_of(checkpoint), &hyper, rope.theta, &rope.scaling, files), tensors))
}

/// The folder's own name.
fn name_of(checkpoint: &Checkpoint) -> String {
    let path = checkpoint.path.canonicalize().unwrap_or_else(|_| checkpoint.path.clone());
    path.file_name().map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
}

fn metadata(arch: &str, name: &str, h: &Hyper, theta: f64, scaling: &RopeScaling, files: &HubFiles) -> Metadata {
    let mut m = Metadata::default();
    m.set("general.architecture", arch);
    m.set("general.type", "model");
    m.set("general.name", name);
    for (key, n) in [
        ("block_count", h.n_layers),
        ("context_length", h.n_ctx_train),
        ("embedding_length", h.n_embd),
        ("feed_forward_length", h.n_ff),
        ("attention.head_count", h.n_heads),
        ("attention.head_count_kv", h.n_kv_heads),
        ("attention.key_length", h.head_dim),
        ("attention.value_length", h.head_dim),
        ("rope.dimension_count", h.head_dim),
        ("vocab_size", h.n_vocab),
    ] {
        // The loader has bounded them all far below.
        m.set(&format!("{arch}.{key}"), n as u32);
    }
    m.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), h.norm_eps);
    m.set(&format!("{arch}.rope.freq_base"), theta as f32);
    if let RopeScaling::Linear(factor) = scaling {
        m.set(&format!("{arch}.rope.scaling.type"), "linear");
        m.set(&format!("{arch}.rope.scaling.factor"), *factor as f32);
    }
    if files.config.get("phd").is_some_and(|phd| !phd.is_null()) {
        for (key, n) in [("copies", h.rules.copies), ("window", h.rules.window), ("chunk", h.rules.chunk)] {
            m.set(&format!("phd.{key}"), n as u32);
        }
    }
    m
}
