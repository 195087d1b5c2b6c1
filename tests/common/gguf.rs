//! Writes GGUF files, right ones and wrong ones.
#![allow(dead_code)]

pub enum Value<'a> {
    U32(u32),
    F32(f32),
    Str(&'a str),
    /// Type number and bytes as they are.
    Raw(u32, Vec<u8>),
}

pub struct Tensor<'a> {
    pub name: &'a str,
    /// Outermost first.
    pub shape: Vec<u64>,
    pub ggml_type: u32,
    pub data: Vec<u8>,
}

fn string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

/// A GGUF v3 file with alignment 32.
pub fn write(metadata: &[(&str, Value)], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        string(&mut out, key);
        match value {
            Value::U32(v) => {
                out.extend(4u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Value::F32(v) => {
                out.extend(6u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Value::Str(v) => {
                out.extend(8u32.to_le_bytes());
                string(&mut out, v);
            }
            Value::Raw(kind, bytes) => {
                out.extend(kind.to_le_bytes());
                out.extend(bytes);
            }
        }
    }
    let mut offset = 0u64;
    for t in tensors {
        string(&mut out, t.name);
        out.extend((t.shape.len() as u32).to_le_bytes());
        t.shape.iter().rev().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(t.ggml_type.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (t.data.len() as u64).next_multiple_of(32);
    }
    for t in tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&t.data);
    }
    out
}
