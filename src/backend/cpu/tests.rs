//! Every kernel of every instruction set that this CPU has, on odd shapes, against plain sums in f64.

use std::sync::Arc;

use super::arena::Arena;
use super::attention::{self, Attend, Source, padded};
use super::fixed::Fixed;
use super::kernels::{Kernels, Variant, groups};
use super::matrix::{Activations, Choice, Matrix, Needs, Outputs};
use super::pack_matrix;
use super::packed::{Packing, TILE};
use super::shared::Grid;
use super::simd::Simd;
use super::simd::plain::Plain;
use super::store::{Cache, Granules, Parts, Rows};
use crate::backend::CacheType;
use crate::backend::testing::{Noise, scales, weights};
use crate::checkpoint::TensorView;
use crate::model::RopePairs;
use crate::tensor::{DType, dequantize_row};

/// Of each instruction set that this CPU has, in all the ways in which some make of CPU uses them; those of AVX-VNNI also where only
/// AVX-512 has its instructions.
fn all_kernels() -> Vec<Kernels> {
    let all: Vec<_> = Variant::ALL.into_iter().filter_map(Variant::kernels).collect();
    assert_eq!(all.last().map(|k| k.variant), Some(Variant::Plain));
    let all = all.into_iter();
    #[cfg(target_arch = "x86_64")]
    let all = all.chain(super::kernels::avx2_vnni_as_avx512());
    all.flat_map(Kernels::all_ways).collect()
}

fn prepare_one(tensor: &TensorView, prefer_ggml: bool) -> Matrix {
    let (n_out, n_in) = (tensor.shape[0], tensor.shape[1]);
    match Choice::of(tensor, prefer_ggml) {
        Choice::Pack(packing) => {
            let mut arena = Arena::new("the weights", packing.bytes(n_out, n_in)).unwrap();
            pack_matrix(tensor, packing, arena.bytes_mut(), 2);
            Matrix::packed(packing, n_out, n_in, Arc::new(arena), 0)
        }
        Choice::Ggml(dot) => Matrix::ggml(dot, tensor.clone()),
        Choice::Convert => Matrix::converted(tensor.clone()),
    }
}

fn multiply(kernels: &Kernels, matrix: &Matrix, x: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let n = x.len();
    let needs = Needs::of(&[matrix]);
    let activations = Activations::new(n, matrix.n_in, &needs).unwrap();
    // Rows go where they are sent, put in or added.
    let outputs = Grid::new("a test", n + 1, matrix.n_out).unwrap();
    let rows: Vec<u32> = (1..=n as u32).rev().collect();
    // SAFETY: these kernels are this CPU's; one thread.
    unsafe {
        for (row, x) in x.iter().enumerate() {
            activations.set(kernels, &needs, row, n, x);
        }
        let mut scratch = vec![0.0; matrix.scratch()];
        let mut run = |adds, bias| {
            let to = Outputs::new(&outputs, &rows, adds);
            matrix.tiles(kernels, &activations, 0..matrix.n_tiles(), &mut scratch, bias, &to);
            rows.iter().map(|&row| outputs.row(row as usize).to_vec()).collect::<Vec<_>>()
        };
        let put = run(false, None);
        let twice = run(true, None);
        let bias: Vec<f32> = (0..matrix.n_out).map(|i| i as f32).collect();
        let biased = run(false, Some(&bias));
        for (row, put) in put.iter().enumerate() {
            for (i, y) in put.iter().enumerate() {
                assert_eq!((twice[row][i], biased[row][i]), (y + y, y + i as f32), "row {row}, output {i}");
            }
        }
        assert!(outputs.row(0).iter().all(|&y| y == 0.0), "nobody's row was written");
        put
    }
}

/// The int8 activations that integer kernels are specified to use: blocks of 32, scale = largest / 127.
fn quantized(x: &[f32]) -> Vec<f64> {
    x.chunks(32)
        .flat_map(|x| {
            let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let (scale, inverse) = (largest / 127.0, if largest > 0.0 { 127.0 / largest } else { 0.0 });
            x.iter().map(move |x| f64::from((x * inverse).round_ties_even()) * f64::from(scale)).collect::<Vec<_>>()
        })
        .collect()
}

const ROWS: [usize; 15] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 16, 17, 21, 25];

fn shapes(dtype: DType) -> Vec<(usize, usize)> {
    let block = dtype.block_len();
    if block == 1 {
        vec![(1, 1), (16, 4), (17, 7), (5, 33), (40, 130)]
    } else {
        vec![(1, block), (16, 2 * block), (17, 3 * block), (40, 5 * block)]
    }
}

fn inputs(n: usize, n_in: usize, noise: &mut Noise) -> Vec<Vec<f32>> {
    (0..n)
        .map(|row| {
            // Rows of different size, one of zeros, one with an outlier.
            let size = [1.0, 0.0, 100.0, 1e-3][row % 4];
            let mut x: Vec<f32> = (0..n_in).map(|_| noise.float() * size).collect();
            if row % 5 == 4 {
                x[n_in / 2] = 50.0;
            }
            x
        })
        .collect()
}

/// Packing moves bits about and loses none.
fn check_rows(packing: Packing, tensor: &TensorView, matrix: &Matrix, rows: impl IntoIterator<Item = usize>) {
    let (n_out, n_in) = (tensor.shape[0], tensor.shape[1]);
    let row_bytes = tensor.data.len() / n_out;
    for r in rows {
        let (mut expected, mut found) = (vec![0.0; n_in], vec![f32::NAN; n_in]);
        dequantize_row(packing.dtype(), &tensor.data[r * row_bytes..][..row_bytes], &mut expected);
        matrix.row(r, &mut found);
        for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
            assert!((e - f).abs() <= 1e-5 * e.abs(), "{packing:?} row {r} column {i}: {f}, expected {e}");
        }
    }
}

#[test]
fn packed_rows_are_the_stored_rows() {
    let mut noise = Noise(6);
    for packing in Packing::ALL {
        let dtype = packing.dtype();
        for (n_out, n_in) in shapes(dtype) {
            let tensor = weights(dtype, n_out, n_in, &mut noise);
            let matrix = prepare_one(&tensor, false);
            check_rows(packing, &tensor, &matrix, 0..n_out);
        }
    }
}

/// Rows of a tensor as (weight, the sum of absolute values that a kernel adds up for it): where a type has minima, these are summed apart
/// from the products that they offset.
fn weights_and_sizes(dtype: DType, n_in: usize, data: &[u8]) -> Vec<Vec<(f64, f64)>> {
    let from = match dtype {
        DType::Q4_1 => 4,
        DType::Q4_K | DType::Q5_K => 16,
        _ => 0,
    };
    let row_bytes = dtype.row_bytes(n_in).unwrap();
    data.chunks(row_bytes)
        .map(|row| {
            let (mut w, mut minima) = (vec![0.0; n_in], vec![0.0; n_in]);
            dequantize_row(dtype, row, &mut w);
            if from > 0 {
                let mut row = row.to_vec();
                row.chunks_mut(dtype.block_bytes()).for_each(|block| block[from..].fill(0));
                dequantize_row(dtype, &row, &mut minima);
            }
            let both = w.iter().zip(&minima).map(|(&w, &m)| (f64::from(w), f64::from(m)));
            both.map(|(w, m)| (w, (w - m).abs() + m.abs())).collect()
        })
        .collect()
}

/// Own kernels: 2e-6 of the sum of absolute products, given the activations as quantized; nothing but the order of f32 sums.
fn check_exact(packing: Packing, tensor: &TensorView, x: &[Vec<f32>]) {
    let (n_out, n_in) = (tensor.shape[0], tensor.shape[1]);
    let matrix = prepare_one(tensor, false);
    let w = weights_and_sizes(packing.dtype(), n_in, &tensor.data);
    let exact: Vec<Vec<f64>> = x
        .iter()
        .map(|x| if packing.is_float() { x.iter().map(|&x| f64::from(x)).collect() } else { quantized(x) })
        .collect();
    for kernels in &all_kernels() {
        let found = multiply(kernels, &matrix, x);
        for row in 0..x.len() {
            for o in 0..n_out {
                let (mut sum, mut size) = (0.0, 0.0);
                w[o].iter().zip(&exact[row]).for_each(|(w, x)| (sum, size) = (sum + w.0 * x, size + w.1 * x.abs()));
                let error = (f64::from(found[row][o]) - sum).abs();
                assert!(
                    error <= 2e-6 * size + 1e-30,
                    "{} {packing:?} {n_out}x{n_in}, row {row} of {}, output {o}: {} for {sum}, size {size}",
                    kernels.variant,
                    x.len(),
                    found[row][o]
                );
            }
        }
    }
}

#[test]
fn own_kernels_are_exact_but_for_rounding() {
    let mut noise = Noise(1);
    for packing in Packing::ALL {
        for (n_out, n_in) in shapes(packing.dtype()) {
            let tensor = weights(packing.dtype(), n_out, n_in, &mut noise);
            for rows in ROWS {
                check_exact(packing, &tensor, &inputs(rows, n_in, &mut noise));
            }
        }
    }
}

/// The largest sums that integers of any width may come to: no instruction's are too narrow for them, and none saturates.
#[test]
fn the_largest_sums_fit() {
    let mut noise = Noise(8);
    for packing in Packing::ALL.into_iter().filter(|packing| !packing.is_float()) {
        let dtype = packing.dtype();
        let n_in = 5 * dtype.block_len();
        // Quants and 6-bit scales of all ones, of all zeros, and of the largest and smallest signed bytes.
        for fill in [0xff, 0, 0x7f, 0x80] {
            let mut bytes = weights(dtype, 17, n_in, &mut noise).data.to_vec();
            for block in bytes.chunks_mut(dtype.block_bytes()) {
                for at in 0..block.len() {
                    if !scales(dtype).iter().any(|&scale| (scale..scale + 2).contains(&at)) {
                        block[at] = fill;
                    }
                }
            }
            let tensor = TensorView::of_bytes("weights", dtype, vec![17, n_in], bytes);
            let signs: [fn(usize) -> f32; 4] = [
                |_| 1.0,
                |_| -1.0,
                |i| if i % 2 == 0 { 1.0 } else { -1.0 },
                |i| if i / 16 % 2 == 0 { -1.0 } else { 1.0 },
            ];
            let x: Vec<Vec<f32>> = signs.iter().map(|sign| (0..n_in).map(sign).collect()).collect();
            check_exact(packing, &tensor, &x);
        }
    }
}

/// Slabs and threads only divide the work of packing.
#[test]
fn packing_does_not_depend_on_threads() {
    let mut noise = Noise(9);
    // Of several slabs; of one, on threads; of less than they are started for. The last tile of each is not full.
    for (packing, n_out, n_in) in [(Packing::Q8_0, 16500, 1024), (Packing::Q4_K, 1000, 1024), (Packing::Q4_0, 50, 64)] {
        let tensor = weights(packing.dtype(), n_out, n_in, &mut noise);
        let packed = |n_threads| {
            let mut arena = Arena::new("the weights", packing.bytes(n_out, n_in)).unwrap();
            pack_matrix(&tensor, packing, arena.bytes_mut(), n_threads);
            arena
        };
        let mut alone = packed(1);
        for n_threads in [2, 7] {
            let mut other = packed(n_threads);
            assert!(alone.bytes_mut() == other.bytes_mut(), "{packing:?} on {n_threads} threads");
        }
        let matrix = Matrix::packed(packing, n_out, n_in, Arc::new(alone), 0);
        check_rows(packing, &tensor, &matrix, [0, n_out / 2, n_out - 1]);
    }
}

/// What is computed beside a row does not touch it, to the bit: neither other rows nor their number, nor whether tiles are taken in twos.
#[test]
fn rows_do_not_depend_on_their_neighbours() {
    let mut noise = Noise(2);
    let tables = all_kernels();
    for packing in Packing::ALL {
        let dtype = packing.dtype();
        // Two tiles, one, and a part of one.
        let (n_out, n_in) = (56, 4 * dtype.block_len().max(25));
        let matrix = prepare_one(&weights(dtype, n_out, n_in, &mut noise), false);
        let x = inputs(25, n_in, &mut noise);
        for kernels in &tables {
            let plain = tables.iter().find(|k| k.variant == kernels.variant && k.tiles_at_once() == 1).unwrap();
            let alone: Vec<Vec<f32>> =
                x.iter().map(|x| multiply(plain, &matrix, std::slice::from_ref(x)).remove(0)).collect();
            for rows in ROWS {
                assert_eq!(multiply(kernels, &matrix, &x[..rows]), alone[..rows], "{} {packing:?}", kernels.variant);
            }
        }
    }
}

/// Types without a kernel of our own, through ggml and without it; ggml's quantize activations their own way (one scale for up to
/// 256 of them), so the bound is what that may cost.
#[test]
fn other_types_are_right_within_their_rounding() {
    let mut noise = Noise(3);
    for dtype in DType::ALL {
        for (n_out, n_in) in shapes(dtype) {
            let tensor = weights(dtype, n_out, n_in, &mut noise);
            let mut w = vec![vec![0.0; n_in]; n_out];
            let row_bytes = tensor.data.len() / n_out;
            w.iter_mut().zip(tensor.data.chunks(row_bytes)).for_each(|(w, b)| dequantize_row(dtype, b, w));
            let through_ggml = Some(prepare_one(&tensor, true)).filter(Matrix::uses_ggml);
            for matrix in through_ggml.into_iter().chain([Matrix::converted(tensor.clone())]) {
                for rows in [1, 3, 13] {
                    let x = inputs(rows, n_in, &mut noise);
                    for kernels in &all_kernels() {
                        let found = multiply(kernels, &matrix, &x);
                        for row in 0..rows {
                            let largest = x[row].iter().fold(0.0f32, |a, x| a.max(x.abs()));
                            for o in 0..n_out {
                                let pairs = || w[o].iter().zip(&x[row]).map(|(&w, &x)| (f64::from(w), f64::from(x)));
                                let sum: f64 = pairs().map(|(w, x)| w * x).sum();
                                let size: f64 = pairs().map(|(w, x)| (w * x).abs()).sum();
                                let rounding: f64 = pairs().map(|(w, _)| w.abs() * f64::from(largest) / 127.0).sum();
                                // Offsets of Q2_K, Q4_1 and the like multiply the activations' sum.
                                let offset = 64.0 * f64::from(largest) * n_in as f64;
                                let bound = if matrix.uses_ggml() {
                                    rounding + 1e-3 * size + 1e-3 * offset
                                } else {
                                    2e-6 * size + 1e-30
                                };
                                let error = (f64::from(found[row][o]) - sum).abs();
                                assert!(
                                    error <= bound,
                                    "{} {dtype} ggml {}: {n_out}x{n_in} row {row} output {o}: {} for {sum}, bound {bound}",
                                    kernels.variant,
                                    matrix.uses_ggml(),
                                    found[row][o]
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(feature = "ggml")]
#[test]
fn ggml_serves_what_we_do_not() {
    for dtype in [DType::Q5_0, DType::Q5_1, DType::Q2_K, DType::Q3_K, DType::IQ4_NL, DType::IQ4_XS] {
        assert!(Packing::of(dtype).is_none());
        let is_there = super::ggml::Dot::of(dtype).is_some();
        #[cfg(target_arch = "x86_64")]
        assert_eq!(is_there, is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2"), "{dtype}");
        #[cfg(not(target_arch = "x86_64"))]
        assert!(is_there, "{dtype}");
    }
}

#[test]
fn groups_are_what_kernels_exist_for() {
    for kernels in &all_kernels() {
        for n in 1..300 {
            for packing in [Packing::Q4_0, Packing::F32] {
                let mut next = 0;
                for (first, rows) in groups(n, kernels.largest_group(packing.is_float(), n)) {
                    assert_eq!(first, next);
                    next += rows;
                    let _ = (kernels.tiles)(packing, rows); // panics for a size without a kernel
                }
                assert_eq!(next, n);
            }
        }
    }
}

#[test]
fn norms_and_activations() {
    let mut noise = Noise(4);
    for kernels in &all_kernels() {
        for n in [1, 3, 4, 15, 16, 17, 64, 100] {
            let x: Vec<f32> = (0..n).map(|_| noise.float() * 3.0).collect();
            let w: Vec<f32> = (0..n).map(|_| noise.float()).collect();
            let mut found = vec![f32::NAN; n];
            // SAFETY: these kernels are this CPU's.
            unsafe { (kernels.norm)(&x, &w, 1e-5, &mut found) };
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
            for i in 0..n {
                let expected = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
                assert!((f64::from(found[i]) - expected).abs() <= 1e-6 * (expected.abs() + 1.0), "{}", kernels.variant);
            }

            let wide: Vec<f32> = (0..n).map(|i| if i % 7 == 6 { -1000.0 } else { noise.float() * 90.0 }).collect();
            let mut found = wide.clone();
            // SAFETY: these kernels are this CPU's.
            unsafe { (kernels.silu)(&mut found, &w) };
            for i in 0..n {
                let expected = f64::from(wide[i]) / (1.0 + (-f64::from(wide[i])).exp()) * f64::from(w[i]);
                let error = (f64::from(found[i]) - expected).abs();
                assert!(error <= 1e-6 * expected.abs() + 1e-30, "{}: silu({}) {}", kernels.variant, wide[i], found[i]);
            }
        }
    }
}

/// Heads are turned, and parts of a context put together, as the formulas say.
#[test]
fn rotations_and_merged_parts() {
    let mut noise = Noise(10);
    for kernels in &all_kernels() {
        for dim in [2, 6, 16, 24, 64, 100, 128] {
            let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| noise.float()).collect() };
            let (head, rope) = (floats(dim), floats(dim));
            let half = dim / 2;
            for pairs in [RopePairs::Halves, RopePairs::Adjacent] {
                let mut found = head.clone();
                // SAFETY: these kernels are this CPU's.
                unsafe { (kernels.rotate)(&mut found, &rope, pairs) };
                for i in 0..half {
                    let (a, b) = if pairs == RopePairs::Halves { (i, i + half) } else { (2 * i, 2 * i + 1) };
                    let [x, y, cos, sin] = [head[a], head[b], rope[i], rope[half + i]].map(f64::from);
                    for (at, expected) in [(a, x * cos - y * sin), (b, y * cos + x * sin)] {
                        let error = (f64::from(found[at]) - expected).abs();
                        assert!(error <= 2e-7, "{} {pairs:?} of {dim}, element {at}", kernels.variant);
                    }
                }
            }
            // Largest scores that rise, fall and are equal; parts in which nothing was seen, at first and later.
            let maxima = [f32::NEG_INFINITY, 1.5, -3.0, f32::NEG_INFINITY, 20.25, 20.25, -150.0];
            let width = padded(dim);
            let parts: Vec<(f32, f32, Vec<f32>)> =
                maxima.iter().map(|&max| (max, 1.0 + floats(1)[0].abs(), floats(width))).collect();
            let mut total = vec![f32::NAN; width + 2];
            attention::begin(&mut total);
            let mut found = vec![f32::NAN; dim];
            // SAFETY: these kernels are this CPU's.
            unsafe {
                parts.iter().for_each(|(max, sum, acc)| (kernels.merge)(&mut total, *max, *sum, acc));
                (kernels.finish)(&total, &mut found);
            }
            let weight = |max: f32| (f64::from(max) - 20.25).exp2();
            let sum: f64 = parts.iter().map(|(max, sum, _)| weight(*max) * f64::from(*sum)).sum();
            for d in 0..dim {
                let values = parts.iter().map(|(max, _, acc)| weight(*max) * f64::from(acc[d])).sum::<f64>();
                let error = (f64::from(found[d]) - values / sum).abs();
                assert!(error <= 1e-6, "{}: {dim}, element {d}: {}", kernels.variant, found[d]);
            }
        }
    }
}

struct Case {
    head_dim: usize,
    n_kv_heads: usize,
    rows_per_block: usize,
    stored: usize,
    hidden: usize,
    queries: usize,
}

/// Softmax and weighted sum in f64 over the values as the cache rounded them.
#[test]
fn attention_is_right_for_every_cache() {
    let case = |head_dim, n_kv_heads, rows_per_block, stored, hidden, queries| Case {
        head_dim,
        n_kv_heads,
        rows_per_block,
        stored,
        hidden,
        queries,
    };
    let cases = [
        case(2, 1, 1, 1, 1, 1),
        case(32, 1, 1, 40, 3, 2),
        case(6, 3, 4, 15, 7, 2),
        case(16, 2, 16, 16, 16, 3),
        case(64, 1, 8, 300, 16, 3),
        case(24, 2, 2, 17, 5, 5),
        case(24, 2, 16, 150, 20, 13),
        case(32, 3, 48, 65, 33, 7),
        case(32, 3, 80, 330, 33, 7),
        case(64, 2, 16, 200, 20, 9),
        case(48, 2, 32, 600, 20, 4),
        case(64, 1, 16, 530, 20, 16),
        case(80, 1, 32, 130, 9, 48),
        case(128, 2, 16, 64, 3, 12),
        case(64, 1, 16, 90, 17, 17),
    ];
    let mut noise = Noise(5);
    for kind in [CacheType::F32, CacheType::F16, CacheType::Bf16, CacheType::Q8_0] {
        for c in &cases {
            let width = c.head_dim * c.n_kv_heads;
            let n_blocks = c.stored.div_ceil(c.rows_per_block);
            // Blocks in reverse order, three of a row that follow one another, and one that is not ours.
            let mut blocks: Vec<u32> = (1..=n_blocks as u32).rev().collect();
            blocks.chunks_mut(3).for_each(<[u32]>::reverse);
            let rows = (n_blocks + 1) * c.rows_per_block;
            // Whatever was there before, even where it is no number, does not matter.
            let spoilt = |parts: Parts| {
                let (mut k, mut v) = parts.pairs(1).unwrap().next().unwrap();
                k.as_mut().fill(0xff);
                v.as_mut().fill(0xff);
                (k, v)
            };
            let parts = |rows: usize| Parts::new(kind, rows, width, c.head_dim);
            let rows_of = |n: usize| Rows::new(parts(n), spoilt(parts(n)).0);
            let cache = if Fixed::suits(kind, c.head_dim) {
                let mut layers = Fixed::layers(1, (rows, c.rows_per_block), (c.n_kv_heads, c.head_dim)).unwrap();
                layers[0].spoil();
                Cache::Fixed(layers.remove(0))
            } else {
                let (k, v) = spoilt(parts(rows));
                Cache::Floats(Granules::new(parts(rows), c.rows_per_block, k), Rows::new(parts(rows), v))
            };
            // With integers, queries and weights are rounded, too: by as much as f16 rounds keys.
            let bound = if matches!(cache, Cache::Fixed(_)) { 1e-3 } else { 5e-6 };
            let plain = (rows_of(rows), rows_of(rows)); // the same, not interleaved
            let natural = |n: usize| (rows_of(n), rows_of(n));
            let capacity = c.hidden + 2;
            let (ring, fresh) = (natural(2 * capacity), natural(c.hidden + 3));
            let mut encoded = vec![0; kind.row_bytes(width)];
            let gathered = Granules::gathered_bytes(kind, width, c.head_dim);
            let mut row = || -> Vec<f32> { (0..width).map(|_| noise.float()).collect() };
            let first_fresh = 100 + c.hidden / 2;
            let at_stored = |i: usize| blocks[i / c.rows_per_block] as usize * c.rows_per_block + i % c.rows_per_block;
            // SAFETY: one thread.
            unsafe {
                for i in 0..c.stored {
                    let (key, value) = (row(), row());
                    cache.write(false, at_stored(i), 0, &key, &mut encoded);
                    cache.write(true, at_stored(i), 0, &value, &mut encoded);
                    plain.0.write(at_stored(i), 0, &key);
                    plain.1.write(at_stored(i), 0, &value);
                }
                for number in 100..100 + c.hidden {
                    let (store, at) = match number.checked_sub(first_fresh) {
                        Some(i) => (&fresh, 3 + i),
                        None => (&ring, capacity + number % capacity),
                    };
                    store.0.write(at, 0, &row());
                    store.1.write(at, 0, &row());
                }
            }
            let stored = cache.source(&blocks, c.rows_per_block);
            let hidden = Source::Hidden {
                ring: (&ring.0, &ring.1),
                ring_base: capacity,
                capacity,
                fresh: (&fresh.0, &fresh.1),
                first_fresh,
                fresh_base: 3,
                first: 100,
            };
            let mut sources = vec![(stored, (0, c.stored)), (hidden, (100, 100 + c.hidden))];
            if c.stored > 256 {
                // The second split of the context, which may begin within a block.
                sources.push((stored, (256, c.stored)));
            }
            // As scaled by log2(e) / sqrt(head_dim): scores of some -15 to 15 for every size of head.
            let size = 13.0 / (c.head_dim as f32).sqrt();
            let queries: Vec<f32> = (0..c.queries * c.head_dim).map(|_| noise.float() * size).collect();
            for (source, (low, high)) in sources {
                let is_hidden = matches!(source, Source::Hidden { .. });
                let sight: Vec<(u32, u32)> = (0..c.queries)
                    .map(|q| {
                        // Causal-like ends, window-like beginnings, and one that sees nothing.
                        let to = high - q % (high - low);
                        let from = if is_hidden { low + q % (to - low) } else { low };
                        if q == 4 { (0, 0) } else { (from as u32, to as u32) }
                    })
                    .collect();
                for head in 0..c.n_kv_heads {
                    let mut key = vec![0.0; c.head_dim];
                    let mut value = vec![0.0; c.head_dim];
                    let mut keys = Vec::new();
                    for i in low..high {
                        // SAFETY: one thread; Plain runs everywhere.
                        unsafe {
                            let (keys, values, at) = match i.checked_sub(first_fresh) {
                                _ if !is_hidden => (&plain.0, &plain.1, at_stored(i)),
                                Some(i) => (&fresh.0, &fresh.1, 3 + i),
                                None => (&ring.0, &ring.1, capacity + i % capacity),
                            };
                            keys.read::<Plain>(at, head * c.head_dim, &mut key);
                            values.read::<Plain>(at, head * c.head_dim, &mut value);
                        }
                        keys.push((key.clone(), value.clone()));
                    }
                    // (head_dim / 16, query, 16)
                    let grouped: Vec<f32> = (0..padded(c.head_dim) * c.queries)
                        .map(|i| (i / 16 % c.queries, i / 16 / c.queries * 16 + i % 16))
                        .map(|(q, d)| if d < c.head_dim { queries[q * c.head_dim + d] } else { f32::NAN })
                        .collect();
                    for kernels in &all_kernels() {
                        let dim = padded(c.head_dim);
                        let mut scratch = attention::Scratch::new(c.queries, c.head_dim, gathered);
                        let (mut max, mut sum) = (vec![0.0; c.queries], vec![0.0; c.queries]);
                        let mut acc = vec![f32::NAN; c.queries * dim];
                        let mut a = Attend {
                            head_dim: c.head_dim,
                            head,
                            queries: &grouped,
                            sight: &sight,
                            source,
                            from: low - low % 16,
                            to: high,
                            scratch: &mut scratch,
                            max: &mut max,
                            sum: &mut sum,
                            acc: &mut acc,
                        };
                        // SAFETY: these kernels are this CPU's; one thread.
                        unsafe { (kernels.attend)(&mut a) };
                        for (q, &(from, to)) in sight.iter().enumerate() {
                            let query = &queries[q * c.head_dim..(q + 1) * c.head_dim];
                            let (mut total, mut expected) = (0.0, vec![0.0; c.head_dim]);
                            for (key, value) in keys
                                .iter()
                                .enumerate()
                                .filter_map(|(i, kv)| ((from as usize)..to as usize).contains(&(low + i)).then_some(kv))
                            {
                                let score: f64 =
                                    query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                                total += score.exp2();
                                expected.iter_mut().zip(value).for_each(|(e, &v)| *e += score.exp2() * f64::from(v));
                            }
                            if from == to {
                                assert_eq!((max[q], sum[q]), (f32::NEG_INFINITY, 0.0));
                                continue;
                            }
                            for d in 0..c.head_dim {
                                let found = f64::from(acc[q * dim + d] / sum[q]);
                                assert!(
                                    (found - expected[d] / total).abs() < bound,
                                    "{} {kind:?} head {head} of {} query {q} dimension {d}: {found}, expected {}",
                                    kernels.variant,
                                    c.head_dim,
                                    expected[d] / total
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The trait's own arithmetic where kernels lean on it.
#[test]
fn exponentials() {
    fn check<S: Simd>() {
        for i in -90000..=12700 {
            let x = i as f32 / 100.0;
            let wide = f64::from(x);
            let (mut two, mut e) = ([0.0f32; TILE], [0.0f32; TILE]);
            // SAFETY: called for instruction sets that were found.
            unsafe {
                S::store(two.as_mut_ptr(), S::exp2(S::splat(x)));
                S::store(e.as_mut_ptr(), S::exp(S::splat(x.min(87.0))));
            }
            for (name, found, expected, bound) in [
                ("exp2", two[0], if x < -125.0 { 0.0 } else { wide.exp2() }, 3e-7),
                ("exp", e[0], if x < -87.0 { 0.0 } else { wide.min(87.0).exp() }, 4e-7),
            ] {
                let error = (f64::from(found) - expected).abs();
                assert!(error <= bound * expected, "{name}({x}) = {found}, expected {expected}");
            }
        }
    }
    check::<Plain>();
    #[cfg(target_arch = "x86_64")]
    {
        if Variant::Avx512Vnni.kernels().is_some() {
            check::<super::simd::avx512::Avx512Vnni>();
        }
        if Variant::Avx2.kernels().is_some() {
            check::<super::simd::avx2::Avx2>();
            check::<super::simd::avx2::Avx2Vnni>(); // whose own instructions are none of these
        }
    }
    #[cfg(target_arch = "aarch64")]
    if Variant::NeonDot.kernels().is_some() {
        check::<super::simd::neon::NeonDot>();
    }
}
