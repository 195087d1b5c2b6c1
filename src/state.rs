//! Sequences as bytes: saved, and restored into any session of the same model and cache type.
//!
//! Little endian, in this order: [`MAGIC`]; version u32; cache type u32; the model's fingerprint u128; layers u32; stored copies of a
//! position u32; bytes of a row of keys (or of values) u32; 1 if there are logits u32; positions u64; positions dropped u64; token ids
//! u32 (position); logits f32 (n_vocab) if there are any; for each layer and stored row its keys, then its values, as
//! [`Context::read_rows`](crate::backend::Context::read_rows) gives them; XXH3-64 of all that, u64. Hidden rings are not stored: the next
//! call rebuilds what it needs.
//!
//! A blob is untrusted: its length must be exactly what its header implies before anything else is looked at, and nothing is changed
//! before all of it has been checked.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use crate::backend::CacheType;
use crate::cache::Layout;
use crate::error::{Error, Result, invalid};
use crate::files::write_whole;
use crate::session::Session;

const MAGIC: [u8; 8] = *b"PHDSTATE";
const VERSION: u32 = 1;
/// Bytes before the tokens.
const HEADER: usize = 8 + 4 + 4 + 16 + 4 * 4 + 2 * 8;
/// Bytes of the checksum.
const CHECKSUM: usize = 8;

/// What a header says, or a session would write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    cache_type: u32,
    fingerprint: u128,
    n_layers: u32,
    stored_copies: u32,
    row_bytes: u32,
    has_logits: bool,
    n_positions: u64,
    dropped: u64,
}

impl Header {
    /// Bytes of the whole blob.
    fn size(&self, n_vocab: usize) -> Option<usize> {
        let n = usize::try_from(self.n_positions).ok()?;
        let rows = n.checked_mul(self.stored_copies as usize)?.checked_mul(self.n_layers as usize)?;
        let logits = if self.has_logits { 4 * n_vocab } else { 0 };
        let kv = rows.checked_mul(2)?.checked_mul(self.row_bytes as usize)?;
        (HEADER + CHECKSUM + logits).checked_add(n.checked_mul(4)?)?.checked_add(kv)
    }

    fn write(&self, to: &mut Writer) {
        to.put(&MAGIC);
        to.put(&VERSION.to_le_bytes());
        to.put(&self.cache_type.to_le_bytes());
        to.put(&self.fingerprint.to_le_bytes());
        for n in [self.n_layers, self.stored_copies, self.row_bytes, u32::from(self.has_logits)] {
            to.put(&n.to_le_bytes());
        }
        for n in [self.n_positions, self.dropped] {
            to.put(&n.to_le_bytes());
        }
    }

    fn read(blob: &[u8]) -> Result<Header> {
        if blob.len() < HEADER + CHECKSUM {
            return Err(invalid!("the saved state has {} bytes, expected at least {}", blob.len(), HEADER + CHECKSUM));
        }
        let mut from = Reader(blob);
        if from.take::<8>() != MAGIC {
            return Err(invalid!("the saved state does not begin with {:?}", String::from_utf8_lossy(&MAGIC)));
        }
        let version = from.u32();
        if version != VERSION {
            return Err(invalid!("the saved state has version {version}, expected {VERSION}"));
        }
        let (cache_type, fingerprint) = (from.u32(), u128::from_le_bytes(from.take()));
        let [n_layers, stored_copies, row_bytes, logits] = std::array::from_fn(|_| from.u32());
        if logits > 1 {
            return Err(invalid!("the saved state's logits flag is {logits}, expected 0 or 1"));
        }
        let [n_positions, dropped] = std::array::from_fn(|_| u64::from_le_bytes(from.take()));
        let has_logits = logits == 1;
        Ok(Header { cache_type, fingerprint, n_layers, stored_copies, row_bytes, has_logits, n_positions, dropped })
    }
}

/// Fills a buffer of exactly the size that was counted.
struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    fn room(&mut self, n: usize) -> &mut [u8] {
        self.at += n;
        &mut self.out[self.at - n..self.at]
    }
}

/// Takes bytes from the front of a blob whose length has been checked.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(n);
        self.0 = rest;
        front
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("N bytes were taken")
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
}

/// Whether all numbers of an encoded row are finite.
fn is_finite(kind: CacheType, row: &[u8]) -> bool {
    let half = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).is_finite();
    match kind {
        CacheType::F32 => row.as_chunks::<4>().0.iter().all(|&b| f32::from_le_bytes(b).is_finite()),
        CacheType::F16 => row.chunks_exact(2).all(half),
        CacheType::Q8_0 => row.chunks_exact(34).all(half),
        CacheType::Bf16 => row.chunks_exact(2).all(|b| half::bf16::from_le_bytes([b[0], b[1]]).is_finite()),
    }
}

impl Session {
    fn header(&self, seq: i64) -> Result<Header> {
        let hyper = &self.model().hyper;
        Ok(Header {
            cache_type: self.cache_type() as u32,
            fingerprint: self.model().fingerprint(),
            n_layers: hyper.n_layers as u32,
            stored_copies: hyper.rules.stored_copies() as u32,
            row_bytes: self.cache_type().row_bytes(hyper.kv_dim()) as u32,
            has_logits: self.has_logits(seq)?,
            n_positions: self.len(seq)? as u64,
            dropped: self.dropped(seq)? as u64,
        })
    }

    /// Bytes that [`Session::save`] writes.
    pub fn save_size(&self, seq: i64) -> Result<usize> {
        let n_vocab = self.model().hyper.n_vocab;
        self.header(seq)?.size(n_vocab).ok_or_else(|| Error::Internal("a state larger than memory".to_owned()))
    }

    /// Writes `seq`, its logits included, to `out`, of exactly [`Session::save_size`] bytes.
    ///
    /// # Errors
    /// `InvalidArgument` for another size; `Backend` if the device fails: what `out` holds is then no state.
    pub fn save(&self, seq: i64, out: &mut [u8]) -> Result<()> {
        let (header, size) = (self.header(seq)?, self.save_size(seq)?);
        if out.len() != size {
            return Err(invalid!("there is room for {} bytes, the state has {size}", out.len()));
        }
        let mut to = Writer { out, at: 0 };
        header.write(&mut to);
        self.tokens(seq)?.for_each(|token| to.put(&token.to_le_bytes()));
        if header.has_logits {
            self.logits(seq)?.iter().for_each(|x| to.put(&x.to_le_bytes()));
        }
        let layer_bytes = header.n_positions as usize * header.stored_copies as usize * 2 * header.row_bytes as usize;
        for layer in 0..header.n_layers as usize {
            self.read_stored(seq, layer, to.room(layer_bytes))?;
        }
        let checksum = xxh3_64(&to.out[..to.at]);
        to.put(&checksum.to_le_bytes());
        Ok(())
    }

    /// Makes `seq`, whatever it held, what was saved.
    ///
    /// # Errors
    /// `InvalidArgument` naming what is wrong with the blob, `CacheFull`: the sequence is what it was. `Backend` if the device fails:
    /// the sequence is then empty.
    pub fn restore(&mut self, seq: i64, blob: &[u8]) -> Result<()> {
        let found = Header::read(blob)?;
        let n_vocab = self.model().hyper.n_vocab;
        let expected = self.header(seq)?;
        if found.fingerprint != expected.fingerprint {
            return Err(invalid!(
                "the saved state is of another model: its fingerprint is {:032x}, expected {:032x}",
                found.fingerprint,
                expected.fingerprint
            ));
        }
        if found.cache_type != expected.cache_type {
            let (found, expected) = (found.cache_type, expected.cache_type);
            return Err(invalid!("the saved state has cache type {found}, expected {expected}"));
        }
        let Header { has_logits, n_positions, dropped, .. } = found;
        let text = Header { has_logits, n_positions, dropped, ..expected };
        if found != text {
            return Err(invalid!("the saved state has rows of another shape: {found:?}, expected {text:?}"));
        }
        let size = found.size(n_vocab);
        if size != Some(blob.len()) {
            return Err(invalid!(
                "the saved state has {} bytes, its {n_positions} positions need {size:?}",
                blob.len()
            ));
        }
        let (body, checksum) = blob.split_at(blob.len() - CHECKSUM);
        if xxh3_64(body).to_le_bytes() != checksum {
            return Err(invalid!("the saved state is damaged: its checksum does not match"));
        }
        // Lengths agree with the bytes that are there: everything below is within them.
        let n = n_positions as usize;
        let mut from = Reader(&body[HEADER..]);
        let tokens: Vec<u32> = (0..n).map(|_| from.u32()).collect();
        if let Some((i, token)) = tokens.iter().enumerate().find(|&(_, &t)| t as usize >= n_vocab) {
            return Err(invalid!("token {i} of the saved state is {token}, expected 0 to {}", n_vocab - 1));
        }
        // RoPE positions are 32 bits wide.
        let most_dropped = (u32::MAX as usize / self.model().hyper.rules.copies - Layout::MAX_POSITIONS) as u64;
        if (has_logits || dropped > 0) && n == 0 || dropped > most_dropped {
            return Err(invalid!(
                "the saved state has {n} positions, logits: {has_logits}, {dropped} positions dropped"
            ));
        }
        let logits: Vec<f32> =
            (0..if has_logits { n_vocab } else { 0 }).map(|_| f32::from_le_bytes(from.take())).collect();
        if logits.iter().any(|x| x.is_nan()) {
            return Err(invalid!("the saved state has logits that are no numbers"));
        }
        let row = found.row_bytes as usize;
        let rows = from.0;
        if rows.chunks_exact(row).any(|r| !is_finite(self.cache_type(), r)) {
            return Err(invalid!("the saved state has keys or values that are not finite"));
        }
        self.put_text(seq, &tokens, dropped as usize)?;
        let layer_bytes = n * found.stored_copies as usize * 2 * row;
        let mut layers = rows.chunks_exact(layer_bytes.max(1)).enumerate();
        if let Err(error) = layers.try_for_each(|(layer, rows)| self.write_stored(seq, layer, rows)) {
            self.truncate(seq, 0)?;
            return Err(error);
        }
        if has_logits {
            self.put_logits(seq, &logits)?;
        }
        Ok(())
    }

    /// [`Session::save`] to a file, whole or not at all: under a temporary name, then renamed.
    pub fn save_file(&self, seq: i64, path: &Path) -> Result<()> {
        let mut blob = vec![0; self.save_size(seq)?];
        self.save(seq, &mut blob)?;
        write_whole(path, &blob)
    }

    /// [`Session::restore`] from a file.
    pub fn restore_file(&mut self, seq: i64, path: &Path) -> Result<()> {
        let length = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
        // The largest state that this session could hold.
        let most = Header { has_logits: true, n_positions: self.options().n_positions as u64, ..self.header(seq)? };
        if most.size(self.model().hyper.n_vocab).is_some_and(|most| length > most as u64) {
            return Err(Error::format(path, format!("{length} bytes, more than a sequence of this session can have")));
        }
        let blob = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        self.restore(seq, &blob).map_err(|e| match e {
            Error::InvalidArgument(what) => Error::format(path, what),
            other => other,
        })
    }
}
