//! The one error type of the crate. It knows nothing of C; `ffi` maps it to a status and a sentence.

use std::path::{Path, PathBuf};

/// Every failure of the library. Messages are one sentence naming the file, tensor, field or value, with what was
/// found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller passed something that no state of the library allows.
    #[error("{0}")]
    InvalidArgument(String),
    /// The operating system refused to open or read a file.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A file is not what its format says.
    #[error("{}: {what}", path.display())]
    Format { path: PathBuf, what: String },
    /// A well-formed request for something that is not implemented, refused by name.
    #[error("{0}")]
    Unsupported(String),
    /// Of 0 bytes if it is not known how many.
    #[error("out of memory: {what} needs {}", match bytes { 0 => "more than there is".into(), n => format!("{n} bytes") })]
    OutOfMemory { what: &'static str, bytes: usize },
    /// The fixed cache has no room; nothing was changed. Counts are positions.
    #[error("the cache is full: {needed} more positions needed, {free} free")]
    CacheFull { needed: usize, free: usize },
    /// The device or kernel layer failed.
    #[error("{0}")]
    Backend(String),
    #[error("cancelled")]
    Cancelled,
    /// The caller's buffer is too small. Counts are in the buffer's own elements.
    #[error("the buffer holds {capacity} elements, {needed} are needed")]
    BufferTooSmall { needed: usize, capacity: usize },
    /// A bug of libphd's.
    #[error("internal error: {0}")]
    Internal(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_owned(), source }
    }

    pub(crate) fn format(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_owned(), what: what.into() }
    }
}

/// `invalid!("token {t} is not below {n}")`: an [`Error::InvalidArgument`] with a formatted sentence.
macro_rules! invalid {
    ($($t:tt)*) => { $crate::error::Error::InvalidArgument(format!($($t)*)) };
}
/// The same for [`Error::Unsupported`].
macro_rules! unsupported {
    ($($t:tt)*) => { $crate::error::Error::Unsupported(format!($($t)*)) };
}
pub(crate) use {invalid, unsupported};
