//! libphd: the embeddable runtime for hidden-decoding language models (PHD-Transformer, PHD-SWA, PHD-CSWA,
//! arXiv 2504.14992; Sequential Hidden Decoding, arXiv 2607.08186).
//!
//! A [`Model`] is weights and tokenizer; a [`Session`] is a fixed-size cache and the sequences in it. Programs in other
//! languages use the same through `include/phd.h`.

pub mod backend;
pub mod cache;
pub mod checkpoint;
pub mod convert;
mod cores;
mod error;
pub mod ffi;
mod files;
pub mod model;
pub mod sampling;
pub mod schedule;
pub mod session;
pub mod speculative;
mod state;
pub mod stats;
pub mod tensor;
pub mod tokenizer;

pub use error::{Error, Result};
pub use model::Model;
pub use session::Session;
