//! Text out of a stream of tokens: whole characters only.

use super::Tokenizer;
use crate::error::Result;

/// Cuts a stream of bytes into whole UTF-8 characters. Holds back at most the three bytes of an incomplete one; bytes
/// that can be part of none become U+FFFD. How the stream is cut into pushes makes no difference.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    held: [u8; 3],
    n_held: usize,
}

impl Utf8Stream {
    /// Appends to `out` the text that `bytes` complete.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        // The held bytes go first; only a handful of new ones can finish their character.
        let mut rest = bytes;
        while self.n_held > 0 && !rest.is_empty() {
            let mut joined = [0; 4];
            joined[..self.n_held].copy_from_slice(&self.held[..self.n_held]);
            joined[self.n_held] = rest[0];
            let n = self.n_held + 1;
            rest = &rest[1..];
            self.n_held = 0;
            self.whole(&joined[..n], out);
        }
        self.whole(rest, out);
    }

    /// Appends what is whole and holds the rest back; nothing may be held yet.
    fn whole(&mut self, bytes: &[u8], out: &mut String) {
        let mut rest = bytes;
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => return out.push_str(text),
                Err(e) => {
                    let (good, bad) = rest.split_at(e.valid_up_to());
                    out.push_str(std::str::from_utf8(good).unwrap_or_default());
                    let Some(n) = e.error_len() else {
                        self.held[..bad.len()].copy_from_slice(bad);
                        self.n_held = bad.len();
                        return;
                    };
                    out.push('\u{FFFD}');
                    rest = &bad[n..];
                }
            }
        }
    }

    /// Bytes held back.
    pub fn held(&self) -> &[u8] {
        &self.held[..self.n_held]
    }

    /// Ends the stream: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if self.n_held > 0 {
            out.push('\u{FFFD}');
        }
        self.n_held = 0;
    }
}

/// The incremental detokenizer.
#[derive(Clone, Debug, Default)]
pub struct StreamDecoder {
    stream: Utf8Stream,
    started: bool,
}

impl StreamDecoder {
    pub fn new() -> StreamDecoder {
        StreamDecoder::default()
    }

    /// A decoder for text that goes on after other text: a leading space stays.
    pub fn continuing() -> StreamDecoder {
        StreamDecoder { started: true, ..StreamDecoder::default() }
    }

    /// Appends to `out` the text that `token` completes.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32, out: &mut String) -> Result<()> {
        let bytes = tokenizer.token_bytes(token, false)?;
        let strip = tokenizer.has_space_prefix && !self.started;
        self.started |= !bytes.is_empty();
        self.stream.push(bytes.strip_prefix(b" ").filter(|_| strip).unwrap_or(bytes), out);
        Ok(())
    }

    pub fn finish(&mut self, out: &mut String) {
        self.stream.finish(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any way of cutting a stream gives what the whole gives, and that is the standard library's lossy reading.
    #[test]
    fn cuts_make_no_difference() {
        let texts: [&[u8]; 7] = [
            "plain, ünïcödé, 漢字, 👩‍👩‍👧 and a\u{0301}".as_bytes(),
            b"\xff\xfe bad",
            b"\xe2\x82",
            b"\xf0\x9f\x91 cut short \xf0\x9f",
            b"\xed\xa0\x80 surrogate \xc0\x80 overlong",
            b"\x80\x80\x80",
            b"nul \0 inside",
        ];
        for text in texts {
            let expected = String::from_utf8_lossy(text);
            for width in 1..=text.len() {
                let (mut stream, mut out) = (Utf8Stream::default(), String::new());
                for piece in text.chunks(width) {
                    stream.push(piece, &mut out);
                    assert!(stream.held().len() <= 3);
                }
                stream.finish(&mut out);
                assert_eq!(out, expected, "{text:?} by {width}");
            }
        }
    }
}
