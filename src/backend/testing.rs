//! What tests of several backends' kernels share.

use crate::checkpoint::TensorView;
use crate::tensor::DType;

pub struct Noise(pub u32);

impl Noise {
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }

    /// -1 to 1.
    pub fn float(&mut self) -> f32 {
        self.bits() as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Bytes of any quants and scales, without infinities and NaN.
pub fn weights(dtype: DType, n_out: usize, n_in: usize, noise: &mut Noise) -> TensorView {
    let n = n_out * dtype.row_bytes(n_in).unwrap();
    let bytes = match dtype {
        DType::F32 => (0..n / 4).flat_map(|_| noise.float().to_le_bytes()).collect(),
        DType::F16 => (0..n / 2).flat_map(|_| half::f16::from_f32(noise.float()).to_le_bytes()).collect(),
        DType::BF16 => (0..n / 2).flat_map(|_| half::bf16::from_f32(noise.float()).to_le_bytes()).collect(),
        _ => {
            let mut bytes: Vec<u8> = (0..n).map(|_| noise.bits() as u8).collect();
            // Any bits are quants; scales must be finite.
            for block in bytes.chunks_mut(dtype.block_bytes()) {
                for &at in scales(dtype) {
                    block[at..at + 2].copy_from_slice(&half::f16::from_f32(noise.float()).to_le_bytes());
                }
            }
            bytes
        }
    };
    TensorView::of_bytes("weights", dtype, vec![n_out, n_in], bytes)
}

/// Where the f16 scales and minima of a block lie, for a type that has blocks.
pub fn scales(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        _ => &[0],
    }
}
