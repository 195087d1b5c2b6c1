//! Kernels against plain arithmetic on odd shapes. They need a GPU or the emulator, which `tests/cuda/run.sh` sees to.

use std::sync::Arc;

use super::context::{ATTENTION_THREADS, TOP_CHUNK, TOP_THREADS, mma_shared, plain_shared, row_bytes};
use super::driver::{Buffer, Device, Grid, Module, Stream};
use super::gemm::{self, Gemm, Workspace};
use super::pack::{matrix_bytes, pack_strip, strip_bytes, type_name};
use super::params::{
    Activations, AttentionParams, Entry, KeyValues, LinearParams, Matrix, MergeParams, Params, QkvParams,
    ResidualParams, Row, Tile, TopParams,
};
use super::plan::SPLIT_ROWS;
use super::weights::{DeviceMatrix, STRIP};
use super::{Sums, THREADS, compile, width};
use crate::backend::testing::{Noise, weights};
use crate::backend::{CacheType, TOP, TOTAL_PARTS, Top};
use crate::checkpoint::TensorView;
use crate::sampling::{Sampler, SamplerParams};
use crate::tensor::{DType, dequantize_row};

struct Bench {
    device: Arc<Device>,
    module: Module,
    stream: Stream,
}

fn bench() -> Bench {
    let device = Device::open(0).unwrap();
    let module = Module::load(&device, &compile::kernels(device.arch).unwrap()).unwrap();
    let stream = Stream::new(&device).unwrap();
    Bench { device, module, stream }
}

fn bytes_of<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

impl Bench {
    fn upload<T: Copy>(&self, values: &[T]) -> Buffer {
        let buffer = Buffer::new(&self.device, "a test", size_of_val(values)).unwrap();
        let _entered = self.device.enter().unwrap();
        // SAFETY: the buffer has the size; waited for right here.
        unsafe { self.stream.upload(buffer.address(), bytes_of(values)).unwrap() };
        self.stream.synchronize().unwrap();
        buffer
    }

    fn bytes(&self, buffer: &Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.bytes()];
        let _entered = self.device.enter().unwrap();
        // SAFETY: as above.
        unsafe { self.stream.download(&mut bytes, buffer.address()).unwrap() };
        self.stream.synchronize().unwrap();
        bytes
    }

    fn download(&self, buffer: &Buffer) -> Vec<f32> {
        self.bytes(buffer).as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    fn launch<P: Params>(&self, kernel: &str, grid: Grid, params: &P) {
        let _entered = self.device.enter().unwrap();
        let kernel = self.module.kernel(kernel, grid.shared).unwrap();
        // SAFETY: the tests hold what the parameters name.
        unsafe { self.stream.launch(kernel, grid, params).unwrap() };
        self.stream.synchronize().unwrap();
    }
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut noise = Noise(seed);
    (0..n).map(|_| noise.float()).collect()
}

/// Activations of some rows.
struct Made {
    buffers: Vec<Buffer>, // hi, lo, exact, sums; what they were made from
    act: Activations,
}

/// Nothing yet, for `rows` rows of `n`.
fn no_activations(b: &Bench, rows: usize, n: usize) -> Made {
    let stride = n.next_multiple_of(32);
    let buffer = |bytes: usize| Buffer::new(&b.device, "a test", rows * bytes).unwrap();
    let buffers = vec![buffer(stride * 2), buffer(stride * 2), buffer(stride * 4), buffer(stride / 16 * 4)];
    let at = |i: usize| buffers[i].address();
    let act = Activations { hi: at(0), lo: at(1), exact: at(2), sums: at(3), stride: stride as u32, unused: 0 };
    Made { buffers, act }
}

/// Those of x, (row, n), made by the kernel that makes them in a step.
fn activations(b: &Bench, x: &[f32], rows: usize, n: usize) -> Made {
    let mut made = no_activations(b, rows, n);
    made.buffers.push(b.upload(x));
    let act = made.act;
    let params = ResidualParams {
        x_in: made.buffers[4].address(),
        act,
        rows: rows as u32,
        n: n as u32,
        ..ResidualParams::default()
    };
    b.launch("residual_norm", Grid { blocks: (rows, 1, 1), threads: THREADS, shared: n * 4 }, &params);
    made
}

fn packed(dtype: DType, n_in: usize, rows: &[u8]) -> Vec<u8> {
    let row_bytes = dtype.row_bytes(n_in).unwrap();
    let mut out = vec![0; matrix_bytes(dtype, rows.len() / row_bytes, n_in)];
    let strips = out.chunks_exact_mut(strip_bytes(dtype, n_in));
    strips.zip(rows.chunks(STRIP * row_bytes)).for_each(|(out, rows)| pack_strip(dtype, n_in, rows, out));
    out
}

/// The kernel for so many rows, and how many of them a block takes.
fn kernel(dtype: DType, rows: usize, sums: Sums) -> (String, usize) {
    match width(dtype, rows, sums) {
        (0, at_once) => (format!("linear_{}", type_name(dtype)), at_once),
        (tiles, at_once) => (format!("linear_{}_{tiles}", type_name(dtype)), at_once),
    }
}

/// How far a linear layer's sum may be off, relative to its products' size: 2^-17 for two bf16 parts, 2^-9 for one.
fn relative_bound(dtype: DType, rows: usize, sums: Sums) -> f64 {
    match (dtype, rows, sums) {
        (DType::F32, ..) => 2e-6,
        (_, ..=16, _) | (_, _, Sums::Invariant) => 2e-5,
        _ => 4e-3,
    }
}

const TYPES: [DType; 9] =
    [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4_K, DType::Q5_K, DType::Q6_K];

#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn linear_layers_of_every_type() {
    let b = bench();
    for dtype in TYPES {
        let widths: &[usize] = match dtype.block_len() {
            1 => &[1, 33, 100, 256],
            32 => &[32, 96, 320],
            _ => &[256, 768],
        };
        for (&n_in, n_out) in widths.iter().zip([1, 40, 17, 16]) {
            let tensor = weights(dtype, n_out, n_in, &mut Noise(n_in as u32));
            let bytes: &[u8] = &tensor.data;
            let device_weights = b.upload(&packed(dtype, n_in, bytes));
            let bias = noise(n_out, 99);
            let device_bias = b.upload(&bias);
            let mut one_row: Vec<f32> = Vec::new(); // of Sums::Invariant
            let invariant = [1, 8, 9, 17].map(|rows| (Sums::Invariant, rows));
            for (sums, rows) in
                [1, 3, 4, 5, 8, 9, 16, 17, 65].map(|rows| (Sums::Fast, rows)).into_iter().chain(invariant)
            {
                let x = noise(rows * n_in, 7);
                let made = activations(&b, &x, rows, n_in);
                let out = b.upload(&vec![f32::NAN; rows * n_out]);
                let (name, at_once) = kernel(dtype, rows, sums);
                let matrix = Matrix {
                    weights: device_weights.address(),
                    bias: device_bias.address(),
                    out: out.address(),
                    n_out: n_out as u32,
                    unused: 0,
                };
                let params = LinearParams {
                    x: made.act,
                    matrices: [matrix, Matrix::default(), Matrix::default()],
                    n_matrices: 1,
                    n_in: n_in as u32,
                    rows: rows as u32,
                    ..LinearParams::default()
                };
                let blocks = (n_out.div_ceil(STRIP), rows.div_ceil(at_once), 1);
                b.launch(&name, Grid { blocks, threads: THREADS, shared: 0 }, &params);
                let found = b.download(&out);
                if sums == Sums::Invariant {
                    if one_row.is_empty() {
                        one_row = found.clone();
                    }
                    assert!(found[..n_out] == one_row, "{dtype} ({n_out}, {n_in}): the first row of {rows}");
                }
                let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                let bound = |size: f64, expected: f64| relative_bound(dtype, rows, sums) * (size + expected);
                assert_products(&found, &tensor, &bias, &x, bound);
            }
        }
    }
}

/// `found`, (row, n_out), against `W x + bias` in f64. `bound` is told the sum of the products' sizes and the size of the result.
fn assert_products(found: &[f32], tensor: &TensorView, bias: &[f32], x: &[f64], bound: impl Fn(f64, f64) -> f64) {
    let (n_out, n_in) = (tensor.shape[0], tensor.shape[1]);
    let row_bytes = tensor.data.len() / n_out;
    let rows = x.len() / n_in;
    assert_eq!(found.len(), rows * n_out);
    let mut w = vec![0.0; n_in];
    for o in 0..n_out {
        dequantize_row(tensor.dtype, &tensor.data[o * row_bytes..][..row_bytes], &mut w);
        for (row, x) in x.chunks_exact(n_in).enumerate() {
            let products = x.iter().zip(&w).map(|(x, w)| x * f64::from(*w));
            let (sum, size) = products.fold((0.0, 0.0), |(s, a), p| (s + p, a + p.abs()));
            let expected = sum + f64::from(bias[o]);
            let found = found[row * n_out + o];
            assert!(
                (f64::from(found) - expected).abs() <= bound(size, expected.abs()),
                "{} ({n_out}, {n_in}), row {row} of {rows}, output {o}: {found} for {expected}",
                tensor.dtype
            );
        }
    }
}

/// cuBLASLt's products, with a workspace that holds whole converted matrices, and one that holds a strip.
#[test]
#[ignore = "needs cuBLASLt and a GPU, or the emulator: tests/cuda/run.sh"]
fn products_of_every_type() {
    let b = bench();
    let gemm = Arc::new(Gemm::find(&b.device).unwrap());
    let kernels = gemm::Kernels::of(&b.module, TYPES.into_iter()).unwrap();
    for dtype in TYPES {
        let widths: &[usize] = match dtype.block_len() {
            1 => &[1, 33, 100, 256],
            32 => &[32, 96, 320],
            _ => &[256, 768],
        };
        for (&n_in, (n_out, rows)) in widths.iter().zip([(1, 65), (40, 100), (17, 7), (48, 1)]) {
            let tensor = weights(dtype, n_out, n_in, &mut Noise(n_in as u32));
            let bytes: &[u8] = &tensor.data;
            let device_weights = b.upload(&packed(dtype, n_in, bytes));
            let bias = noise(n_out, 99);
            let device_bias = b.upload(&bias);
            let x = noise(rows * n_in, 7);
            let made = activations(&b, &x, rows, n_in);
            let strip = STRIP * n_in.next_multiple_of(32) * 2;
            for (largest, has_bias) in [(3 * strip, true), (0, false)] {
                let mut workspace = Workspace::new(&b.device, gemm.clone(), strip, largest).unwrap();
                let out = b.upload(&vec![f32::NAN; rows * n_out]);
                let matrix = DeviceMatrix {
                    dtype,
                    weights: device_weights.address(),
                    bias: if has_bias { device_bias.address() } else { 0 },
                    n_out,
                    n_in,
                };
                {
                    let _entered = b.device.enter().unwrap();
                    // SAFETY: all of it is held here, with room for as many rows.
                    let done = unsafe {
                        workspace.linear(&b.stream, &kernels, made.act, &matrix, out.address(), rows).unwrap()
                    };
                    assert!(done, "{dtype} ({n_out}, {n_in}): no algorithm");
                    b.stream.synchronize().unwrap();
                }
                let found = b.download(&out);
                let rounded = x.iter().map(|&x| match dtype {
                    DType::F32 => f64::from(x),
                    _ => half::bf16::from_f32(x).to_f64(),
                });
                // Sums in f32, which tensor cores truncate, and weights that were rounded to bf16 (2^-9).
                let relative = match dtype {
                    DType::F32 => 2e-6,
                    DType::BF16 => 1e-5,
                    _ => 2.1e-3,
                };
                let bias = if has_bias { bias.clone() } else { vec![0.0; n_out] };
                let bound = |size, expected| relative * size + 1e-6 * expected;
                assert_products(&found, &tensor, &bias, &rounded.collect::<Vec<f64>>(), bound);
            }
        }
    }
}

/// Descriptions of shapes are given up when they are many; what was queued with them is computed.
#[test]
#[ignore = "needs cuBLASLt and a GPU, or the emulator: tests/cuda/run.sh"]
fn products_of_more_shapes_than_are_kept() {
    let b = bench();
    let gemm = Arc::new(Gemm::find(&b.device).unwrap());
    let kernels = gemm::Kernels::of(&b.module, std::iter::empty()).unwrap();
    let (n_in, most) = (32, 1100);
    let weights = noise(STRIP * n_in, 1);
    let x = noise(most * n_in, 2);
    let made = activations(&b, &x, most, n_in);
    let device_weights = b.upload(&weights);
    let outs: Vec<Buffer> = (0..=most).map(|rows| b.upload(&vec![f32::NAN; rows.max(1)])).collect();
    let matrix = DeviceMatrix { dtype: DType::F32, weights: device_weights.address(), bias: 0, n_out: 1, n_in };
    let mut workspace = Workspace::new(&b.device, gemm, STRIP * n_in * 2, 0).unwrap();
    {
        let _entered = b.device.enter().unwrap();
        // The first shapes come again, after they were given up.
        for rows in (1..=most).chain(1..=9) {
            let out = outs[rows].address();
            // SAFETY: all of it is held here, with room for as many rows.
            assert!(unsafe { workspace.linear(&b.stream, &kernels, made.act, &matrix, out, rows).unwrap() });
        }
        b.stream.synchronize().unwrap();
    }
    let dot = |row: &[f32]| row.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
    let expected: Vec<f64> = x.chunks(n_in).map(dot).collect();
    for rows in [1, 2, 9, 10, 1000, 1024, 1025, most] {
        for (found, expected) in b.download(&outs[rows]).iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{rows} rows: {found} for {expected}");
        }
    }
}

#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn gate_and_up_in_one_launch() {
    let b = bench();
    for dtype in TYPES {
        let n_in = if dtype.block_len() == 1 { 100 } else { 256 };
        for n_out in [1, 40, 96] {
            let tensors = [1, 2].map(|seed| weights(dtype, n_out, n_in, &mut Noise(seed)));
            let on_device = [0, 1].map(|i| b.upload(&packed(dtype, n_in, &tensors[i].data)));
            let biases = [noise(n_out, 98), noise(n_out, 99)];
            let device_biases = [0, 1].map(|i| b.upload(&biases[i]));
            let matrix = |i: usize| Matrix {
                weights: on_device[i].address(),
                bias: device_biases[i].address(),
                n_out: n_out as u32,
                ..Matrix::default()
            };
            let cases = [1, 4, 5, 15, 17, 65].map(|rows| (Sums::Fast, rows)).into_iter();
            for (sums, rows) in cases.chain([(Sums::Invariant, 17)]) {
                let mut x = noise(rows * n_in, 7);
                x.iter_mut().for_each(|x| *x *= 0.2);
                let made = activations(&b, &x, rows, n_in);
                let out = no_activations(&b, rows, n_out);
                let params = LinearParams {
                    x: made.act,
                    act: out.act,
                    matrices: [matrix(0), matrix(1), Matrix::default()],
                    n_matrices: 2,
                    n_in: n_in as u32,
                    rows: rows as u32,
                    is_gated: 1,
                };
                let (name, at_once) = kernel(dtype, rows, sums);
                let stride = out.act.stride as usize;
                let blocks = (stride / STRIP, rows.div_ceil(at_once), 1);
                b.launch(&name, Grid { blocks, threads: THREADS, shared: 0 }, &params);
                let [hi, lo] = [0, 1].map(|i| {
                    let words = b.download(&out.buffers[i]).into_iter().map(f32::to_bits);
                    words.flat_map(|w| [w << 16, w & 0xffff_0000].map(f32::from_bits)).collect::<Vec<f32>>()
                });
                let (exact, of_16) = (b.download(&out.buffers[2]), b.download(&out.buffers[3]));
                let mut w = vec![0.0; n_in];
                let row_bytes = tensors[0].data.len() / n_out;
                for row in 0..rows {
                    #[allow(clippy::needless_range_loop)] // columns of several arrays
                    for o in 0..stride {
                        let at = row * stride + o;
                        let (mut expected, mut bound) = (0.0, 0.0);
                        if o < n_out {
                            let [(gate, gate_bound), (up, up_bound)] = [0, 1].map(|i| {
                                dequantize_row(dtype, &tensors[i].data[o * row_bytes..][..row_bytes], &mut w);
                                let products =
                                    x[row * n_in..].iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                                let (sum, size) = products.fold((0.0, 0.0), |(s, a), p| (s + p, a + p.abs()));
                                let y = sum + f64::from(biases[i][o]);
                                (y, relative_bound(dtype, rows, sums) * (size + y.abs()))
                            });
                            let silu = gate / (1.0 + (-gate).exp());
                            expected = silu * up;
                            // The slope of SiLU is at most 1.1.
                            bound = 1.1 * gate_bound * (up.abs() + up_bound)
                                + silu.abs() * up_bound
                                + 2e-6 * expected.abs();
                        }
                        let what = format!("{dtype} {n_out}, row {row} of {rows}, column {o}");
                        let difference = (f64::from(exact[at]) - expected).abs();
                        assert!(difference <= bound, "{what}: {} for {expected}, bound {bound}", exact[at]);
                        let parts = f64::from(hi[at]) + f64::from(lo[at]);
                        assert!(
                            (parts - f64::from(exact[at])).abs() <= 2e-5 * f64::from(exact[at]).abs() + 1e-38,
                            "{what}: {parts}"
                        );
                        if o % 16 == 0 {
                            let sum: f64 = (at..at + 16).map(|i| f64::from(hi[i]) + f64::from(lo[i])).sum();
                            let size: f64 = (at..at + 16).map(|i| f64::from(hi[i]).abs()).sum();
                            assert!(
                                (f64::from(of_16[at / 16]) - sum).abs() <= 1e-6 * size,
                                "{what}: sum {}",
                                of_16[at / 16]
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn residuals_and_norms() {
    let b = bench();
    for n in [1, 31, 64, 100, 300] {
        let rows = 5;
        let (x, add, norm, add_norm) = (noise(rows * n, 1), noise(3 * n, 2), noise(n, 3), noise(n, 4));
        let gather = [4u32, 0, 2];
        let (dx, dadd, dnorm, dadd_norm) = (b.upload(&x), b.upload(&add), b.upload(&norm), b.upload(&add_norm));
        let (dgather, out, normed) = (b.upload(&gather), b.upload(&vec![0f32; 3 * n]), b.upload(&vec![0f32; 3 * n]));
        for after in [false, true] {
            let params = ResidualParams {
                x_in: dx.address(),
                gather: dgather.address(),
                add: dadd.address(),
                add_norm: if after { dadd_norm.address() } else { 0 },
                x_out: out.address(),
                norm: dnorm.address(),
                normed: normed.address(),
                rows: 3,
                n: n as u32,
                eps: 1e-5,
                ..ResidualParams::default()
            };
            b.launch("residual_norm", Grid { blocks: (3, 1, 1), threads: THREADS, shared: n * 4 }, &params);
            let (out, normed) = (b.download(&out), b.download(&normed));
            let scale = |x: &[f64]| 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n as f64 + 1e-5).sqrt();
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            for row in 0..3 {
                let mut added = wide(&add[row * n..][..n]);
                if after {
                    let scale = scale(&added);
                    added.iter_mut().zip(&add_norm).for_each(|(a, w)| *a *= scale * f64::from(*w));
                }
                let x = wide(&x[gather[row] as usize * n..][..n]);
                let y: Vec<f64> = x.iter().zip(&added).map(|(x, a)| x + a).collect();
                let scale = scale(&y);
                for i in 0..n {
                    let z = y[i] * scale * f64::from(norm[i]);
                    assert!(
                        (f64::from(out[row * n + i]) - y[i]).abs() < 1e-5 * (1.0 + y[i].abs()),
                        "{n} {after} {row} {i}"
                    );
                    assert!(
                        (f64::from(normed[row * n + i]) - z).abs() < 1e-5 * (1.0 + z.abs()),
                        "{n} {after} {row} {i}"
                    );
                }
            }
        }
    }
}

/// Rows of logits that a search for the best could get wrong, each with its name.
fn hard_logits(n: usize) -> Vec<(&'static str, Vec<f32>)> {
    let some = noise(n, 5);
    let with = |f: &dyn Fn(usize) -> Option<f32>| (0..n).map(|i| f(i).unwrap_or(some[i])).collect::<Vec<f32>>();
    vec![
        ("any", some.clone()),
        ("all equal", vec![0.5; n]),
        ("many ties", some.iter().map(|x| (x * 3.0).round()).collect()),
        // Fewer than 64 lie above the tie, at both ends of the vocabulary.
        ("a tie at the 64th", with(&|i| Some(if i % 97 == 3 { 1.0 + some[i] } else { 0.25 }))),
        ("zeros of both signs", with(&|i| Some(if i % 2 == 0 { -0.0 } else { 0.0 }))),
        ("NaN of both signs", with(&|i| [Some(f32::NAN), Some(-f32::NAN), None][i % 3])),
        ("few numbers", with(&|i| if i % 211 == 5 { None } else { Some(f32::NEG_INFINITY) })),
        ("one number", with(&|i| Some(if i == n / 2 { -7.0 } else { f32::NAN }))),
        ("no number", with(&|i| Some(if i % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY }))),
        // Samplers take +infinity for the largest number, so that these are all equal.
        ("infinities", with(&|i| Some(if i >= n / 2 { f32::INFINITY } else { f32::MAX }))),
        ("small numbers", some.iter().map(|x| x * f32::MIN_POSITIVE).collect()),
    ]
}

/// Sampling from the best tokens is sampling from all.
#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn the_best_tokens_are_all_that_samplers_see() {
    let b = bench();
    for n in [1, 63, 64, 65, TOP_CHUNK, TOP_CHUNK + 1, 2 * TOP_CHUNK + 100] {
        let rows = hard_logits(n);
        let all: Vec<f32> = rows.iter().flat_map(|(_, row)| row.iter().copied()).collect();
        let n_chunks = n.div_ceil(TOP_CHUNK);
        let (logits, keys) = (b.upload(&all), b.upload(&vec![0u64; rows.len() * n_chunks * TOP]));
        let parts = b.upload(&vec![f32::NAN; rows.len() * n_chunks * 2]);
        let outputs = [TOP, TOP, 1].map(|width| b.upload(&vec![f32::NAN; rows.len() * width]));
        let params = TopParams {
            logits: logits.address(),
            keys: keys.address(),
            tokens: outputs[0].address(),
            values: outputs[1].address(),
            parts: parts.address(),
            totals: outputs[2].address(),
            n_vocab: n as u32,
            n_chunks: n_chunks as u32,
        };
        let grid = |x, y| Grid { blocks: (x, y, 1), threads: TOP_THREADS, shared: 0 };
        b.launch("top_chunks", grid(n_chunks, rows.len()), &params);
        b.launch("top_rows", grid(rows.len(), 1), &params);
        let [tokens, values, totals] = outputs.map(|buffer| b.download(&buffer));
        for (i, (name, row)) in rows.iter().enumerate() {
            let found = tokens[i * TOP..(i + 1) * TOP].iter().map(|t| t.to_bits());
            let tokens: Vec<u32> = found.take_while(|&t| t != u32::MAX).collect();
            let usable = row.iter().filter(|x| !x.is_nan() && **x != f32::NEG_INFINITY).count();
            assert_eq!(tokens.len(), usable.min(TOP), "{n} {name}");
            let total = f64::from(totals[i]);
            let top = Top { tokens: &tokens, logits: &values[i * TOP..][..tokens.len()], total };
            if usable == 0 {
                assert_eq!(total, 0.0, "{n} {name}");
                continue;
            }
            let clean = |x: f32| f64::from(if x.is_nan() { f32::NEG_INFINITY } else { x.min(f32::MAX) });
            let expected: f64 = row.iter().map(|&x| (clean(x) - clean(top.logits[0])).exp()).sum();
            assert!((total / expected - 1.0).abs() < 1.0 / TOTAL_PARTS, "{n} {name}: {total} for {expected}");
            for (k, top_p) in [(0, 1.0), (1, 0.9), (2, 0.9), (40, 0.9), (TOP as u32, 0.9), (0, 0.02)] {
                // Greedy where nothing is cut.
                let temperature = if k == 0 && top_p == 1.0 { 0.0 } else { 1.3 };
                let p = SamplerParams { temperature, top_k: k, top_p, seed: 11, ..SamplerParams::default() };
                let mut sampler = Sampler::new(p, n).unwrap();
                let mut twin = sampler.clone();
                for draw in 0..20 {
                    let best = sampler.sample_top(&top);
                    // Where all are equal, nobody knows what a share of them holds.
                    assert!(best.is_some() || k == 0, "{n} tokens, {name}, top-k {k}, draw {draw}");
                    let best = best.unwrap_or_else(|| sampler.sample(row).unwrap());
                    assert_eq!(best, twin.sample(row).unwrap(), "{n} tokens, {name}, top-k {k}, draw {draw}");
                }
            }
        }
    }
}

/// A row as the cache rounds it, and its bytes.
fn cached(kind: CacheType, row: &[f32]) -> (Vec<f64>, Vec<u8>) {
    let mut bytes = vec![0; kind.row_bytes(row.len())];
    kind.encode(row, &mut bytes);
    let dtype = match kind {
        CacheType::F32 => DType::F32,
        CacheType::F16 => DType::F16,
        CacheType::Q8_0 => DType::Q8_0,
        CacheType::Bf16 => DType::BF16,
    };
    let mut rounded = vec![0.0; row.len().next_multiple_of(dtype.block_len())];
    dequantize_row(dtype, &bytes, &mut rounded);
    (rounded[..row.len()].iter().map(|&x| f64::from(x)).collect(), bytes)
}

struct AttentionCase {
    head_dim: usize,
    n_kv_heads: usize,
    /// Heads of a key head.
    group: usize,
    n_stored: usize,
    n_hidden: usize,
    /// Rows that attend: the last ones.
    n_keep: usize,
    splits: usize,
}

const ROWS_PER_BLOCK: usize = 16;

/// A pass of one sequence without a past: stored rows, in blocks in reverse order, each of which sees those before it; then hidden
/// rows, which see the stored rows, and the few hidden ones before them. Against f64 over the values as the cache rounds them.
fn attention(b: &Bench, c: &AttentionCase, kind: CacheType, size: f32) {
    let (dim, n) = (c.head_dim, c.n_stored + c.n_hidden);
    let (kv_dim, q_dim) = (c.n_kv_heads * dim, c.n_kv_heads * c.group * dim);
    let n_blocks = c.n_stored.div_ceil(ROWS_PER_BLOCK);
    let blocks: Vec<u32> = (0..n_blocks as u32).rev().collect();
    let place = |i: usize| blocks[i / ROWS_PER_BLOCK] as usize * ROWS_PER_BLOCK + i % ROWS_PER_BLOCK;
    let rows: Vec<Row> = (0..n)
        .map(|i| match i.checked_sub(c.n_stored) {
            None => Row { stored: i as u32 + 1, place: place(i) as u32, ..Row::default() },
            Some(j) => Row {
                stored: (c.n_stored - j % c.n_stored.min(3)) as u32,
                hidden_from: j.saturating_sub(10) as u32,
                hidden_to: j as u32 + 1,
                place: j as u32,
                is_hidden: 1,
                ..Row::default()
            },
        })
        .collect();
    let kept = &rows[n - c.n_keep..];
    let most = |of: fn(&Row) -> u32| kept.iter().map(of).max().unwrap();
    let hidden = kept.iter().filter(|r| r.is_hidden == 1).map(|r| r.hidden_from).min();
    let stored = most(|r| r.stored);
    let tile = Tile {
        n: c.n_keep as u32,
        stored,
        split: stored.div_ceil(c.splits as u32).next_multiple_of(SPLIT_ROWS as u32),
        hidden_from: hidden.unwrap_or(0),
        hidden_to: most(|r| r.hidden_to),
        ..Tile::default()
    };
    // Scores of -9 to 9 or so for every size of head.
    let scaled = |values: Vec<f32>, by: f32| values.into_iter().map(|x| x * by).collect::<Vec<f32>>();
    let q = scaled(noise(n * q_dim, 1), 9.0 / size);
    let (k, v) = (scaled(noise(n * kv_dim, 2), size), scaled(noise(n * kv_dim, 3), 8.0 * size));

    let row_bytes = row_bytes(kind, kv_dim);
    let store = |rows: usize| b.upload(&vec![0u8; rows.max(1) * row_bytes]);
    let (cache, fresh) = ([store(n_blocks * ROWS_PER_BLOCK), store(n_blocks * ROWS_PER_BLOCK)], [store(n), store(n)]);
    let pair = |stores: &[Buffer; 2]| KeyValues { k: stores[0].address(), v: stores[1].address() };
    let all: Vec<u32> = (0..n as u32).collect();
    let (dq, dk, dv) = (b.upload(&q), b.upload(&k), b.upload(&v));
    let (drows, denter, dkeep) = (b.upload(&rows), b.upload(&all), b.upload(&all[n - c.n_keep..]));
    let finish = QkvParams {
        q: dq.address(),
        k: dk.address(),
        v: dv.address(),
        rope: dq.address(), // nothing is rotated
        rows: drows.address(),
        enter: denter.address(),
        cache: pair(&cache),
        fresh: pair(&fresh),
        n: n as u32,
        n_heads: (c.n_kv_heads * c.group) as u32,
        n_kv_heads: c.n_kv_heads as u32,
        head_dim: dim as u32,
        cache_type: kind as u32,
        row_bytes: row_bytes as u32,
        ..QkvParams::default()
    };
    let grid = |blocks, threads, shared| Grid { blocks, threads, shared };
    b.launch("qkv_finish", grid((n, 3, 1), ATTENTION_THREADS, 4 * q_dim), &finish);

    // What was stored, and what the values are.
    let rounded = |values: &[f32], part: usize| {
        let (cache, fresh) = (b.bytes(&cache[part]), b.bytes(&fresh[part]));
        let rows = values.chunks_exact(kv_dim).zip(&rows).map(|(values, row)| {
            let (rounded, bytes) = cached(kind, values);
            let store = if row.is_hidden == 1 { &fresh } else { &cache };
            let stored = &store[row.place as usize * row_bytes..][..bytes.len()];
            assert!(kind == CacheType::Q8_0 || stored == bytes, "{kind:?}: a row of {kv_dim} is encoded otherwise");
            rounded
        });
        rows.collect::<Vec<Vec<f64>>>()
    };
    let (k, v) = (rounded(&k, 0), rounded(&v, 1));

    let dtile = b.upload(&[tile]);
    let dentry = b.upload(&[Entry { n_hidden: c.n_hidden as u32, ..Entry::default() }]);
    let dblocks = b.upload(&blocks);
    let partial = b.upload(&vec![f32::NAN; c.n_keep * c.n_kv_heads * c.group * c.splits * (dim + 2)]);
    let params = AttentionParams {
        q: dq.address(),
        rows: drows.address(),
        enter: denter.address(),
        keep: dkeep.address(),
        tiles: dtile.address(),
        entries: dentry.address(),
        blocks: dblocks.address(),
        cache: pair(&cache),
        ring: pair(&fresh), // nothing is in a ring
        fresh: pair(&fresh),
        partial: partial.address(),
        first: 0,
        n: c.n_keep as u32,
        n_heads: finish.n_heads,
        n_kv_heads: finish.n_kv_heads,
        head_dim: finish.head_dim,
        splits: c.splits as u32,
        rows_per_block: ROWS_PER_BLOCK as u32,
        ring_capacity: 1,
        cache_type: finish.cache_type,
        row_bytes: finish.row_bytes,
        is_invariant: 0,
        scale: 1.0 / (dim as f32).sqrt(),
    };
    // Relative to the largest value. f32; weights in f16; keys and values, too; weights and queries in two bf16 parts.
    let plain = ("attention_plain".to_owned(), plain_shared(dim), 1e-5);
    let mma = |name: &str, bound| (format!("{name}_{dim}"), mma_shared(dim), bound);
    let mma = match (dim, kind) {
        (64 | 128, CacheType::F16) => Some(mma("attention_mma", 5e-4)),
        (64 | 128, CacheType::Q8_0) => Some(mma("attention_mma", 2e-3)),
        (64 | 128, CacheType::Bf16) => Some(mma("attention_mma_bf16", 1e-4)),
        _ => None,
    };
    // Warps share the keys of up to 16 queries, or, if it is to be invariant, each has its own queries.
    for (kernel, is_invariant) in [(Some(&plain), 0), (mma.as_ref(), 0), (mma.as_ref(), 1)] {
        let Some((kernel, shared, bound)) = kernel else { continue };
        let params = AttentionParams { is_invariant, ..params };
        b.launch(kernel, grid((1, c.n_kv_heads, c.splits), ATTENTION_THREADS, *shared), &params);
        let made = no_activations(b, c.n_keep, q_dim);
        let heads =
            (1..c.n_kv_heads * c.group).find(|n| (n * dim).is_multiple_of(32)).unwrap_or(c.n_kv_heads * c.group);
        let merge = MergeParams {
            partial: partial.address(),
            act: made.act,
            rows: drows.address(),
            enter: denter.address(),
            entries: dentry.address(),
            ring: params.ring,
            fresh: params.fresh,
            n: c.n_keep as u32,
            n_heads: finish.n_heads,
            head_dim: finish.head_dim,
            heads: heads as u32,
            splits: c.splits as u32,
            ring_capacity: 1,
            row_bytes: finish.row_bytes,
            unused: 0,
        };
        let blocks = (c.n_keep, (c.n_kv_heads * c.group).div_ceil(heads), 1);
        b.launch("attention_merge", grid(blocks, ATTENTION_THREADS, 4 * heads * dim), &merge);
        let found = b.download(&made.buffers[2]);
        let stride = made.act.stride as usize;
        for (i, row) in kept.iter().enumerate() {
            let stored = 0..row.stored as usize;
            let hidden = c.n_stored + row.hidden_from as usize..c.n_stored + row.hidden_to as usize;
            for head in 0..c.n_kv_heads * c.group {
                let q = &q[(n - c.n_keep + i) * q_dim + head * dim..][..dim];
                let of = |row: &[f64]| row[head / c.group * dim..][..dim].to_vec();
                let (mut total, mut expected) = (0.0, vec![0.0; dim]);
                for key in stored.clone().chain(hidden.clone()) {
                    let score: f64 = q.iter().zip(of(&k[key])).map(|(&q, k)| f64::from(q) * k).sum();
                    let weight = (score / (dim as f64).sqrt()).exp();
                    total += weight;
                    expected.iter_mut().zip(of(&v[key])).for_each(|(e, v)| *e += weight * v);
                }
                for d in 0..dim {
                    let (found, expected) = (f64::from(found[i * stride + head * dim + d]), expected[d] / total);
                    assert!(
                        (found - expected).abs() <= bound * f64::from(8.0 * size),
                        "{kernel} {kind:?} {n} rows, {head} of {} heads, row {i}, {d}: {found} for {expected}",
                        c.n_kv_heads * c.group
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU or the emulator: tests/cuda/run.sh"]
fn attention_over_every_cache() {
    let b = bench();
    let case = |head_dim, n_kv_heads, group, n_stored, n_hidden, n_keep, splits| AttentionCase {
        head_dim,
        n_kv_heads,
        group,
        n_stored,
        n_hidden,
        n_keep,
        splits,
    };
    let cases = [
        case(6, 1, 1, 3, 0, 1, 1),
        case(24, 3, 2, 20, 5, 7, 2),
        case(64, 2, 1, 70, 9, 4, 2),
        case(64, 1, 5, 130, 17, 9, 3),
        case(128, 2, 3, 67, 0, 5, 1),
        case(128, 1, 7, 150, 33, 9, 2),
    ];
    for kind in [CacheType::F32, CacheType::F16, CacheType::Q8_0, CacheType::Bf16] {
        // Larger keys and values than f16 has.
        let sizes: &[f32] = if matches!(kind, CacheType::F32 | CacheType::Bf16) { &[1.0, 1e6] } else { &[1.0] };
        for c in &cases {
            sizes.iter().for_each(|&size| attention(&b, c, kind, size));
        }
    }
}
