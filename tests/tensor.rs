//! Conversions of every element type against ggml's: see `tests/data/quants/README.md`.

mod common;

use phd::tensor::{DType, dequantize_row, quantize_row};
use serde_json::Value as Json;

fn bytes(hex: &Json) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn dequantized_blocks_are_ggml_s() {
    let file = std::fs::read(common::root().join("tests/data/quants/ggml.json")).unwrap();
    let recorded: Json = serde_json::from_slice(&file).unwrap();
    for dtype in DType::ALL.into_iter().filter(|&t| t != DType::F32) {
        let case = &recorded[dtype.name()];
        let expected: Vec<f32> =
            bytes(&case["f32"]).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let mut found = vec![0.0; expected.len()];
        dequantize_row(dtype, &bytes(&case["bytes"]), &mut found);
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // The order of the two or three products differs.
            assert!(
                (found - expected).abs() <= expected.abs() * 1e-6,
                "{dtype} element {i}: {found}, expected {expected}"
            );
        }
    }
}

#[test]
fn cache_types_round_to_their_precision() {
    let x: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.5) / 7.0).collect();
    for (dtype, bound) in
        [(DType::F32, 0.0), (DType::F16, 2e-3), (DType::BF16, 1.6e-2), (DType::Q8_0, 4.5 / 127.0 * 0.51)]
    {
        let mut row = vec![0; dtype.row_bytes(x.len()).unwrap()];
        let mut back = vec![0.0; x.len()];
        quantize_row(dtype, &x, &mut row);
        dequantize_row(dtype, &row, &mut back);
        for (x, back) in x.iter().zip(&back) {
            assert!((x - back).abs() <= bound, "{dtype}: {x} became {back}");
        }
    }
    let mut zeros = [1u8; 34];
    quantize_row(DType::Q8_0, &[0.0; 32], &mut zeros);
    assert_eq!(zeros, [0; 34]);
}

/// To the nearest, of two as near the even one; what is no number stays none.
#[test]
fn bf16_rounds_to_even() {
    let rounded = |bits: u32| {
        let mut row = [0; 2];
        quantize_row(DType::BF16, &[f32::from_bits(bits)], &mut row);
        u16::from_le_bytes(row)
    };
    for (bits, expected) in [
        (0x3f80_7fff, 0x3f80),
        (0x3f80_8000, 0x3f80),
        (0x3f80_8001, 0x3f81),
        (0x3f81_8000, 0x3f82),
        (0xbf81_8000, 0xbf82),
        (1e5f32.to_bits(), 0x47c3),
        (1e38f32.to_bits(), 0x7e96),
        (0x7f7f_ffff, 0x7f80),
        (0xff80_0000, 0xff80),
        (0x8000_0001, 0x8000),
    ] {
        assert_eq!(rounded(bits), expected, "{bits:08x}");
    }
    for bits in [0x7fc0_0000, 0x7f80_0001, 0xff80_7fff, 0xffff_ffff] {
        assert!(half::bf16::from_bits(rounded(bits)).is_nan(), "{bits:08x}");
    }
}

#[test]
fn sizes_are_whole_blocks() {
    for dtype in DType::ALL {
        assert_eq!(DType::from_ggml_id(dtype.ggml_id()), Some(dtype));
        assert_eq!(dtype.row_bytes(256), Some(256 / dtype.block_len() * dtype.block_bytes()));
        assert_eq!(dtype.row_bytes(dtype.block_len() + 1).is_some(), dtype.block_len() == 1);
    }
    assert_eq!(DType::F32.row_bytes(usize::MAX), None);
}
