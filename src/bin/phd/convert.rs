//! `phd convert` and `phd quantize`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use phd::convert::{self, Options, Summary};
use phd::tensor::DType;

use crate::{Failure, mib};

fn weight_type(name: &str) -> Result<DType, String> {
    convert::parse_type(name).map_err(|e| e.to_string())
}

fn weight_type_or_auto(name: &str) -> Result<Choice, String> {
    if name == "auto" { Ok(Choice(None)) } else { weight_type(name).map(|t| Choice(Some(t))) }
}

/// `None` keeps each weight's type.
#[derive(Clone, Copy)]
struct Choice(Option<DType>);

#[derive(Args)]
struct How {
    /// The same type for the output layer as for all others
    #[arg(long)]
    pure: bool,
    /// Threads; 0 = one per physical core that the process may use
    #[arg(long, short = 't', default_value_t = 0)]
    threads: usize,
}

#[derive(Args)]
pub struct Convert {
    /// config.json, safetensors files and tokenizer.json
    folder: PathBuf,
    /// The GGUF file to write
    out: PathBuf,
    /// Type of the weights: auto (as they are), f32, f16, bf16, q4_0, q4_1, q8_0, q4_k, q5_k or q6_k
    #[arg(long = "type", value_parser = weight_type_or_auto, default_value = "auto")]
    weights: Choice,
    /// How byte-level BPE cuts a text into words, where tokenizer.json's own description is not known: such as olmo
    #[arg(long)]
    pre: Option<String>,
    #[command(flatten)]
    how: How,
}

#[derive(Args)]
pub struct Quantize {
    /// A GGUF file
    input: PathBuf,
    /// The GGUF file to write
    out: PathBuf,
    /// f32, f16, bf16, q4_0, q4_1, q8_0, q4_k, q5_k or q6_k
    #[arg(value_name = "TYPE", value_parser = weight_type)]
    weights: DType,
    /// Convert weights that are quantized already: what their rounding took is lost
    #[arg(long)]
    requantize: bool,
    #[command(flatten)]
    how: How,
}

impl Convert {
    pub fn execute(&self) -> Result<(), Failure> {
        run(&self.out, &self.how, self.pre.as_deref(), false, |options| {
            convert::convert(&self.folder, &self.out, self.weights.0, options)
        })
    }
}

impl Quantize {
    pub fn execute(&self) -> Result<(), Failure> {
        run(&self.out, &self.how, None, self.requantize, |options| {
            convert::quantize(&self.input, &self.out, self.weights, options)
        })
    }
}

/// With a progress bar, which draws on a terminal only; Ctrl-C cancels, so that no half-written file stays.
fn run(
    out: &Path,
    how: &How,
    pre: Option<&str>,
    requantize: bool,
    work: impl FnOnce(Options) -> phd::Result<Summary>,
) -> Result<(), Failure> {
    let is_stopped = Arc::new(AtomicBool::new(false));
    let stop = is_stopped.clone();
    ctrlc::set_handler(move || stop.store(true, Ordering::Relaxed))?;
    let bar = indicatif::ProgressBar::new(1000).with_message("converting");
    let mut progress = |fraction: f32| {
        bar.set_position((fraction * 1000.0) as u64);
        !is_stopped.load(Ordering::Relaxed)
    };
    let options = Options {
        pre,
        requantize,
        pure: how.pure,
        n_threads: how.threads,
        progress: Some(&mut progress),
        ..Default::default()
    };
    let result = work(options);
    bar.finish_and_clear();
    let summary = result?;
    let types: Vec<String> = summary.dtypes.iter().map(|(t, n)| format!("{t} x {n}")).collect();
    println!("{}: {}, {}", out.display(), mib(summary.bytes), types.join(", "));
    summary.notes.iter().for_each(|note| eprintln!("note: {note}"));
    Ok(())
}
