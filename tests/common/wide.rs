//! A checkpoint into which every type's blocks fit, and whose heads tensor cores attend.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

/// Numbers that repeat never and mean nothing.
pub fn noise(n: usize, seed: u32, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435769).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    // Four uniform ones make nearly a normal one.
    (0..n).map(|_| (next() + next() + next() + next()) * scale).collect()
}

/// A PHD-CSWA-3-8-16 llama of width 512; 2.1 million parameters of noise, each tensor of the type that `dtype` says of its name: F32,
/// F16 or BF16.
pub fn write(folder: &Path, dtype: impl Fn(&str) -> Dtype) -> PathBuf {
    let config = json!({
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 1,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": false, "phd": {"copies": 3, "window": 8, "chunk": 16},
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let layer = "model.layers.0";
    let shapes: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".to_owned(), vec![256, 512]),
        ("lm_head.weight".to_owned(), vec![256, 512]),
        ("model.norm.weight".to_owned(), vec![512]),
        (format!("{layer}.input_layernorm.weight"), vec![512]),
        (format!("{layer}.post_attention_layernorm.weight"), vec![512]),
        (format!("{layer}.self_attn.q_proj.weight"), vec![512, 512]),
        (format!("{layer}.self_attn.k_proj.weight"), vec![128, 512]),
        (format!("{layer}.self_attn.v_proj.weight"), vec![128, 512]),
        (format!("{layer}.self_attn.o_proj.weight"), vec![512, 512]),
        (format!("{layer}.mlp.gate_proj.weight"), vec![768, 512]),
        (format!("{layer}.mlp.up_proj.weight"), vec![768, 512]),
        (format!("{layer}.mlp.down_proj.weight"), vec![512, 768]),
    ];
    let encode = |name: &str, values: &[f32]| -> Vec<u8> {
        match dtype(name) {
            Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    };
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let scale = if shape.len() == 1 { 1.0 } else { 0.1 };
            let bytes = encode(&name, &noise(shape.iter().product(), 77 + i as u32, scale));
            (name, shape, bytes)
        })
        .collect();
    let tensors =
        data.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype(name), shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
    folder.to_owned()
}
