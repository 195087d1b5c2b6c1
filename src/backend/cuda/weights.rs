//! Weights in the device's memory: one allocation, whose size is known before anything is read.

use std::sync::Arc;

use super::driver::{Buffer, Device, Event, Pinned, Stream};
pub use super::pack::{STRIP, strip_bytes};
use super::pack::{is_packed, matrix_bytes, pack_strip};
use super::params::Address;
use crate::checkpoint::TensorView;
use crate::error::{Error, Result};
use crate::model::{Linear, Weights};
use crate::tensor::{DType, dequantize_row, quantize_row};

/// Where matrices and vectors begin.
const ALIGNMENT: usize = 256;
/// Bytes that are packed while as many are copied.
const STAGING: usize = 32 << 20;

#[derive(Clone, Copy, Debug)]
pub struct DeviceMatrix {
    pub dtype: DType,
    pub weights: Address,
    /// `[n_out]`, or null.
    pub bias: Address,
    pub n_out: usize,
    pub n_in: usize,
}

impl DeviceMatrix {
    pub fn bytes(&self) -> usize {
        matrix_bytes(self.dtype, self.n_out, self.n_in)
    }

    pub fn strips(&self) -> usize {
        self.n_out.div_ceil(STRIP)
    }
}

/// Norms are `[n]` f32, or null.
pub struct DeviceLayer {
    pub attention_norm: Address,
    pub ffn_norm: Address,
    pub q_norm: Address,
    pub k_norm: Address,
    pub q: DeviceMatrix,
    pub k: DeviceMatrix,
    pub v: DeviceMatrix,
    pub o: DeviceMatrix,
    pub gate: DeviceMatrix,
    pub up: DeviceMatrix,
    pub down: DeviceMatrix,
}

impl DeviceLayer {
    pub fn matrices(&self) -> [&DeviceMatrix; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }
}

pub struct DeviceWeights {
    pub embeddings: Vec<DeviceMatrix>,
    pub layers: Vec<DeviceLayer>,
    pub norm: Address,
    pub head: DeviceMatrix,
    arena: Buffer,
}

impl DeviceWeights {
    pub fn bytes(&self) -> usize {
        self.arena.bytes()
    }

    pub fn matrices(&self) -> impl Iterator<Item = &DeviceMatrix> {
        self.layers.iter().flat_map(DeviceLayer::matrices).chain([&self.head])
    }
}

/// The type that a tensor has on the device: types without kernels of their own become f16.
fn device_type(dtype: DType) -> DType {
    if is_packed(dtype) { dtype } else { DType::F16 }
}

/// Gives everything its place in the arena.
#[derive(Default)]
struct Placement<'a> {
    base: Address,
    bytes: usize,
    tensors: Vec<(&'a TensorView, DeviceMatrix)>,
    vectors: Vec<(&'a [f32], Address)>,
}

impl<'a> Placement<'a> {
    fn take(&mut self, bytes: usize) -> Address {
        let at = self.base + self.bytes as u64;
        self.bytes += bytes.next_multiple_of(ALIGNMENT);
        at
    }

    fn vector(&mut self, v: &'a [f32]) -> Address {
        if v.is_empty() {
            return 0;
        }
        let at = self.take(4 * v.len());
        self.vectors.push((v, at));
        at
    }

    fn matrix(&mut self, t: &'a TensorView) -> DeviceMatrix {
        let (n_out, n_in, dtype) = (t.shape[0], t.shape[1], device_type(t.dtype));
        let weights = self.take(matrix_bytes(dtype, n_out, n_in));
        let matrix = DeviceMatrix { dtype, weights, bias: 0, n_out, n_in };
        self.tensors.push((t, matrix));
        matrix
    }

    fn linear(&mut self, l: &'a Linear) -> DeviceMatrix {
        let bias = l.bias.as_deref().map_or(0, |b| self.vector(b));
        DeviceMatrix { bias, ..self.matrix(&l.weight) }
    }

    fn all(&mut self, weights: &'a Weights) -> (Vec<DeviceLayer>, Vec<DeviceMatrix>, Address, DeviceMatrix) {
        let layers = weights
            .layers
            .iter()
            .map(|l| DeviceLayer {
                attention_norm: self.vector(&l.attention_norm),
                ffn_norm: self.vector(&l.ffn_norm),
                q_norm: self.vector(&l.q_norm),
                k_norm: self.vector(&l.k_norm),
                q: self.linear(&l.q),
                k: self.linear(&l.k),
                v: self.linear(&l.v),
                o: self.linear(&l.o),
                gate: self.linear(&l.gate),
                up: self.linear(&l.up),
                down: self.linear(&l.down),
            })
            .collect();
        let head = self.matrix(&weights.head);
        // A tied table is the head's matrix.
        let is_tied = |t: &TensorView| t.name == weights.head.name;
        let embeddings = weights.embeddings.iter().map(|t| if is_tied(t) { head } else { self.matrix(t) }).collect();
        (layers, embeddings, self.vector(&weights.norm), head)
    }
}

/// Bytes of device memory that the weights will take, exactly.
pub fn estimate(weights: &Weights) -> usize {
    let mut placement = Placement::default();
    placement.all(weights);
    placement.bytes
}

/// Packs the weights on all CPUs and copies them to the device; a piece is packed while the one before is copied.
///
/// # Errors
/// `OutOfMemory`, `Backend`, and what `progress` says.
pub fn load(
    device: &Arc<Device>,
    weights: &Weights,
    progress: &mut dyn FnMut(f32) -> Result<()>,
) -> Result<DeviceWeights> {
    let bytes = estimate(weights);
    let what = "the weights in device memory";
    if bytes > device.memory()?.0 {
        return Err(Error::OutOfMemory { what, bytes });
    }
    let arena = Buffer::new(device, what, bytes)?;
    let mut placement = Placement { base: arena.address(), ..Placement::default() };
    let (layers, embeddings, norm, head) = placement.all(weights);
    let mut upload = Upload::new(device)?;
    let _entered = device.enter()?;
    for (v, at) in &placement.vectors {
        upload.bytes(*at, &v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
    }
    let mut done = 0;
    for (tensor, matrix) in &placement.tensors {
        upload.matrix(tensor, matrix, &mut |n| progress((done + n) as f32 / bytes as f32))?;
        done += matrix.bytes();
    }
    upload.finish()?;
    Ok(DeviceWeights { embeddings, layers, norm, head, arena })
}

/// Two staging buffers in turn.
struct Upload {
    stream: Stream,
    staging: [(Pinned, Event); 2],
    next: usize,
}

impl Drop for Upload {
    fn drop(&mut self) {
        // After an error copies may still be under way. They read the staging buffers, which go next.
        let _ = self.stream.synchronize();
    }
}

impl Upload {
    fn new(device: &Arc<Device>) -> Result<Upload> {
        let buffer = || Ok::<_, Error>((Pinned::new(device, "staging memory", STAGING)?, Event::new(device)?));
        Ok(Upload { stream: Stream::new(device)?, staging: [buffer()?, buffer()?], next: 0 })
    }

    /// Fills up to [`STAGING`] bytes of host memory through `fill` and starts their copy to `to`.
    fn piece(&mut self, to: Address, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let (buffer, copied) = &mut self.staging[self.next];
        self.next = 1 - self.next;
        // The copy of two pieces ago. An event that was never recorded counts as passed.
        copied.wait()?;
        let staged = &mut buffer.as_mut_slice()[..bytes];
        fill(staged);
        // SAFETY: the arena has the range; the buffer is not touched again before `copied` has been waited for.
        unsafe { self.stream.upload(to, staged)? };
        self.stream.record(copied)
    }

    fn bytes(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        for (i, part) in bytes.chunks(STAGING).enumerate() {
            self.piece(to + (i * STAGING) as u64, part.len(), |staged| staged.copy_from_slice(part))?;
        }
        Ok(())
    }

    /// `progress` is told the bytes done.
    fn matrix(
        &mut self,
        tensor: &TensorView,
        matrix: &DeviceMatrix,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let per_strip = strip_bytes(matrix.dtype, matrix.n_in);
        if per_strip > STAGING {
            return Err(Error::Unsupported(format!("{}: rows of {} elements", tensor.name, matrix.n_in)));
        }
        let row_bytes = tensor.data.len() / matrix.n_out;
        let at_once = STAGING / per_strip;
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        for first in (0..matrix.strips()).step_by(at_once) {
            progress(first * per_strip)?;
            let n = at_once.min(matrix.strips() - first);
            let rows = first * STRIP * row_bytes..((first + n) * STRIP * row_bytes).min(tensor.data.len());
            let source = &tensor.data[rows.clone()];
            self.piece(matrix.weights + (first * per_strip) as u64, n * per_strip, |staged| {
                let share = n.div_ceil(n_threads);
                let parts = staged.chunks_mut(share * per_strip).zip(source.chunks(share * STRIP * row_bytes));
                let pack = |out: &mut [u8], source: &[u8]| {
                    for (out, rows) in out.chunks_exact_mut(per_strip).zip(source.chunks(STRIP * row_bytes)) {
                        pack_rows(tensor.dtype, matrix, rows, out);
                    }
                };
                // Small pieces are packed sooner than threads are started.
                if source.len() < 1 << 18 {
                    parts.for_each(|(out, source)| pack(out, source));
                } else {
                    std::thread::scope(|scope| {
                        for (out, source) in parts {
                            scope.spawn(move || pack(out, source));
                        }
                    });
                }
            })?;
            tensor.data.give_back(rows);
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        self.stream.synchronize()
    }
}

fn pack_rows(from: DType, matrix: &DeviceMatrix, rows: &[u8], out: &mut [u8]) {
    if from == matrix.dtype {
        return pack_strip(from, matrix.n_in, rows, out);
    }
    let n_in = matrix.n_in;
    let row_bytes = from.row_bytes(n_in).expect("whole blocks");
    let mut floats = vec![0.0; n_in];
    let mut converted = vec![0; rows.len() / row_bytes * n_in * 2];
    for (row, out) in rows.chunks_exact(row_bytes).zip(converted.chunks_exact_mut(n_in * 2)) {
        dequantize_row(from, row, &mut floats);
        quantize_row(matrix.dtype, &floats, out);
    }
    pack_strip(matrix.dtype, n_in, &converted, out);
}
