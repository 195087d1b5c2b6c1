//! Text out of a stream of tokens: whole characters only.

use std::sync::Arc;

use super::Tokenizer;
use super::stop::StopStrings;
use crate::error::Result;

/// Cuts a stream of bytes into whole UTF-8 characters. Holds back at most the three bytes of an incomplete one; bytes
/// that can be part of none become U+FFFD. How the stream is cut into pushes makes no difference.
#[derive(Clone, Copy, Debug, Default)]
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

/// The incremental detokenizer: whole characters, up to a stop string. Allocates nothing of its own.
#[derive(Clone, Debug, Default)]
pub struct StreamDecoder {
    special: bool,
    stops: Option<Arc<StopStrings>>,
    progress: Progress,
}

/// How far a decoder is: all that a push changes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    utf8: Utf8Stream,
    started: bool,
    /// The node of the stop strings' automaton that the text led to.
    node: u32,
    stop: Option<usize>,
    n_bytes: u64,
}

impl StreamDecoder {
    pub fn new() -> StreamDecoder {
        StreamDecoder::default()
    }

    /// A decoder for text that goes on after other text: a leading space stays.
    pub fn continuing() -> StreamDecoder {
        StreamDecoder { progress: Progress { started: true, ..Progress::default() }, ..StreamDecoder::default() }
    }

    /// Spells control tokens out instead of leaving them out.
    pub fn with_special(self, special: bool) -> StreamDecoder {
        StreamDecoder { special, ..self }
    }

    /// Ends the text before the stop string that is complete first (of several that end together, the longest). Text that
    /// can be the beginning of one is held back.
    pub fn with_stops(self, stops: Arc<StopStrings>) -> StreamDecoder {
        StreamDecoder { stops: Some(stops), ..self }
    }

    /// Appends to `out` the text that `token` completes; after a stop string there is none.
    ///
    /// # Errors
    /// `InvalidArgument` for a token that is not in the vocabulary.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32, out: &mut String) -> Result<()> {
        let bytes = tokenizer.token_bytes(token, self.special)?;
        let strip = tokenizer.has_space_prefix && !self.progress.started;
        self.progress.started |= !bytes.is_empty();
        let at = out.len();
        self.progress.utf8.push(bytes.strip_prefix(b" ").filter(|_| strip).unwrap_or(bytes), out);
        self.hold_back(at, out);
        Ok(())
    }

    /// Ends the text: an incomplete character becomes U+FFFD, held text is given out.
    pub fn finish(&mut self, out: &mut String) {
        let at = out.len();
        self.progress.utf8.finish(out);
        self.hold_back(at, out);
        if let (Some(stops), None) = (&self.stops, self.progress.stop) {
            let held = stops.held(self.progress.node);
            out.push_str(held);
            self.progress.n_bytes += held.len() as u64;
            self.progress.node = 0;
        }
    }

    /// Takes the text from `at` on, which is new, for what can be given out.
    fn hold_back(&mut self, at: usize, out: &mut String) {
        let progress = &mut self.progress;
        if progress.stop.is_some() {
            out.truncate(at);
        } else if let Some(stops) = &self.stops {
            let step = stops.read(progress.node, &out[at..]);
            out.insert_str(at, stops.held(progress.node));
            out.truncate(at + step.released);
            (progress.node, progress.stop) = (step.node, step.stop);
        }
        progress.n_bytes += (out.len() - at) as u64;
    }

    /// The stop string that ended the text: its place in the list.
    pub fn stop(&self) -> Option<usize> {
        self.progress.stop
    }

    /// Bytes of text given out so far; at a stop string, the bytes before it.
    pub fn n_bytes(&self) -> u64 {
        self.progress.n_bytes
    }

    pub fn stops(&self) -> Option<&StopStrings> {
        self.stops.as_deref()
    }

    pub(crate) fn progress(&self) -> Progress {
        self.progress
    }

    /// Back, or to the beginning of another text.
    pub(crate) fn set_progress(&mut self, progress: Progress) {
        self.progress = progress;
    }

    pub(crate) fn is_fresh(&self) -> bool {
        !self.progress.started && self.progress.stop.is_none()
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
