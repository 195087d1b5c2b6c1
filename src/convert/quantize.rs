//! Rows of one type to rows of another, piece by piece on some threads, in the order of the file.

use super::{Source, Tensor};
use crate::checkpoint::gguf_writer::Writer;
use crate::cores::default_threads;
use crate::error::{Error, Result, invalid, unsupported};
use crate::tensor::{DType, dequantize_row, quantize_row};

/// Elements that a thread converts at a time: 4 MiB of f32.
const PIECE: usize = 1 << 20;
/// Bytes that are copied at a time.
const SLICE: usize = 8 << 20;
/// The largest finite f16: scales of blocks are stored as f16.
const MAX_F16: f32 = 65504.0;

pub fn is_quantized(dtype: DType) -> bool {
    dtype.block_len() > 1
}

/// Whether this build can convert to a type.
///
/// # Errors
/// `Unsupported` naming the type.
pub fn check_type(dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::Q8_0 => Ok(()),
        _ if cfg!(feature = "ggml") => Ok(()),
        _ => Err(unsupported!("conversion to {dtype} needs ggml, which this build of libphd is without")),
    }
}

/// Buffers and threads for conversions.
pub struct Converter {
    pieces: Vec<Piece>,
}

/// A thread's buffers.
#[derive(Default)]
struct Piece {
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl Converter {
    /// 0 threads: one per physical core that this process may use.
    pub fn new(n_threads: usize) -> Converter {
        let n = if n_threads == 0 { default_threads() } else { n_threads };
        Converter { pieces: (0..n.clamp(1, 256)).map(|_| Piece::default()).collect() }
    }

    /// Writes a tensor as `to`; `report` is told how many of its elements are done.
    pub fn convert(
        &mut self,
        tensor: &Tensor,
        to: DType,
        writer: &mut Writer,
        report: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let (width, n_rows) = match tensor.shape.split_last() {
            Some((&width, outer)) => (width, outer.iter().product::<usize>()),
            None => return Err(Error::Internal(format!("tensor {} has no shape", tensor.name))),
        };
        match &tensor.source {
            Source::Values(values) => {
                let mut bytes = vec![0; to.row_bytes(width).unwrap_or_default() * n_rows];
                quantize_row(to, values, &mut bytes);
                writer.write(&bytes)?;
                return report(values.len());
            }
            Source::Stored(view) if view.dtype == to => {
                let row = to.row_bytes(width).unwrap_or(1);
                for (i, slice) in view.data.chunks((SLICE / row).max(1) * row).enumerate() {
                    writer.write(slice)?;
                    let at = i * (SLICE / row).max(1) * row;
                    view.data.give_back(at..at + slice.len());
                    report((at + slice.len()) / row * width)?;
                }
                return Ok(());
            }
            Source::Stored(_) | Source::Interleaved(..) => {}
        }
        let rows_each = (PIECE / width).max(1);
        let mut row = 0;
        while row < n_rows {
            let ranges: Vec<_> = (0..self.pieces.len())
                .map(|i| row + i * rows_each)
                .take_while(|&start| start < n_rows)
                .map(|start| start..(start + rows_each).min(n_rows))
                .collect();
            let pieces = &mut self.pieces[..ranges.len()];
            let results = std::thread::scope(|scope| {
                let mut work = pieces.iter_mut().zip(&ranges);
                let first = work.next();
                let others: Vec<_> = work
                    .map(|(piece, rows)| {
                        std::thread::Builder::new()
                            .spawn_scoped(scope, || piece.convert(tensor, to, width, rows.clone()))
                    })
                    .collect();
                let mut results = Vec::with_capacity(ranges.len());
                results.extend(first.map(|(piece, rows)| piece.convert(tensor, to, width, rows.clone())));
                for thread in others {
                    results.push(match thread.map(|t| t.join()) {
                        Ok(Ok(result)) => result,
                        Ok(Err(_)) => Err(Error::Internal(format!("tensor {}: a conversion panicked", tensor.name))),
                        Err(e) => Err(Error::Backend(format!("a thread for the conversion cannot start: {e}"))),
                    });
                }
                results
            });
            results.into_iter().collect::<Result<()>>()?;
            for piece in pieces {
                writer.write(&piece.bytes)?;
            }
            let end = ranges.last().map_or(n_rows, |r| r.end);
            if let Source::Stored(view) = &tensor.source {
                let row_bytes = view.data.len() / n_rows;
                view.data.give_back(row * row_bytes..end * row_bytes);
            }
            row = end;
            report(row * width)?;
        }
        Ok(())
    }
}

impl Piece {
    /// Converts `rows` of a stored tensor into `bytes`.
    fn convert(&mut self, tensor: &Tensor, to: DType, width: usize, rows: std::ops::Range<usize>) -> Result<()> {
        let (view, head_dim) = match &tensor.source {
            Source::Stored(view) => (view, None),
            Source::Interleaved(view, head_dim) => (view, Some(*head_dim)),
            Source::Values(_) => return Err(Error::Internal(format!("tensor {} is not stored", tensor.name))),
        };
        let (from, into) = match (view.dtype.row_bytes(width), to.row_bytes(width)) {
            (Some(from), Some(into)) => (from, into),
            _ => return Err(invalid!("tensor {}: rows of {width} are no whole number of blocks", tensor.name)),
        };
        let stored = |row: usize| {
            let row = head_dim.map_or(row, |head_dim| interleaved(row, head_dim));
            &view.data[row * from..(row + 1) * from]
        };
        self.bytes.resize(rows.len() * into, 0);
        if view.dtype == to {
            rows.zip(self.bytes.chunks_exact_mut(into)).for_each(|(row, bytes)| bytes.copy_from_slice(stored(row)));
            return Ok(());
        }
        self.values.resize(rows.len() * width, 0.0);
        for (row, values) in rows.clone().zip(self.values.chunks_exact_mut(width)) {
            dequantize_row(view.dtype, stored(row), values);
            if !matches!(to, DType::F32 | DType::BF16)
                && let Some(x) = values.iter().find(|x| x.abs() > MAX_F16 || x.is_nan())
            {
                return Err(invalid!(
                    "tensor {} row {row} holds {x}, which {to} cannot: expected at most {MAX_F16} in size",
                    view.name
                ));
            }
        }
        match to {
            DType::F32 | DType::F16 | DType::BF16 | DType::Q8_0 => {
                let rows = self.values.chunks_exact(width).zip(self.bytes.chunks_exact_mut(into));
                rows.for_each(|(values, bytes)| quantize_row(to, values, bytes));
            }
            _ => by_ggml(to, &self.values, width, &mut self.bytes)?,
        }
        Ok(())
    }
}

/// The row of a Hub checkpoint's q or k that is row `row` for interleaved RoPE: within a head of dimension d, rows 2 i and
/// 2 i + 1 are i and i + d / 2.
pub fn interleaved(row: usize, head_dim: usize) -> usize {
    let i = row % head_dim;
    row - i + i % 2 * (head_dim / 2) + i / 2
}

/// ggml's own quantizers, in `libggml-base`, which is compiled for the architecture's base instruction set.
#[cfg(feature = "ggml")]
fn by_ggml(to: DType, values: &[f32], width: usize, bytes: &mut [u8]) -> Result<()> {
    let n_rows = values.len() / width;
    // What ggml aborts on.
    if to.row_bytes(width).and_then(|n| n.checked_mul(n_rows)) != Some(bytes.len()) || n_rows * width != values.len() {
        return Err(Error::Internal(format!("{n_rows} rows of {width} do not make {} bytes of {to}", bytes.len())));
    }
    // SAFETY: `values` holds n_rows * width finite floats and `bytes` as many blocks, which were just counted; none of
    // these types needs an importance matrix, which may then be null.
    let written = unsafe {
        llama_cpp_sys_2::ggml_quantize_chunk(
            to.ggml_id(),
            values.as_ptr(),
            bytes.as_mut_ptr().cast(),
            0,
            n_rows as i64,
            width as i64,
            std::ptr::null(),
        )
    };
    if written == bytes.len() { Ok(()) } else { Err(Error::Internal(format!("ggml wrote {written} bytes of {to}"))) }
}

#[cfg(not(feature = "ggml"))]
fn by_ggml(to: DType, _: &[f32], _: usize, _: &mut [u8]) -> Result<()> {
    check_type(to)
}
