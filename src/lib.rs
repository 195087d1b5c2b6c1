//! libphd: the embeddable runtime for hidden-decoding language models.

mod error;
pub mod checkpoint;
pub mod tensor;

pub use error::{Error, Result};
