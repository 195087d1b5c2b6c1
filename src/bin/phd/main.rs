//! The `phd` program: run, chat, info, score, bench, convert and quantize on the library's Rust interface.

mod bench;
mod convert;
mod generate;
mod serving;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand, ValueEnum};
use phd::model::{BackendKind, LoadOptions, Model};
use phd::session::{CacheType, Session, SessionOptions};
use phd::tokenizer::Tokenizer;

#[derive(Parser)]
#[command(version, about = "Hidden-decoding language models: read each token K times, remember it once.")]
#[command(
    after_help = "Examples:\n  phd run models/english-phd-cswa-2-16-32 -p 'In the beginning' -n 60\n  phd chat smollm2.gguf --temp 0.7\n  phd bench smollm2.gguf --copies-list 1,2,3,4\n\nMODEL is a Hub folder (config.json and safetensors) or a GGUF file."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt
    Run(generate::Run),
    /// Talk to a model that has a chat template; /exit ends
    Chat(generate::Chat),
    /// Describe a checkpoint and the memory that a session of it takes
    Info {
        #[command(flatten)]
        common: Common,
    },
    /// Perplexity of a text file
    Score {
        #[command(flatten)]
        common: Common,
        file: PathBuf,
        /// Tokens to a segment; each starts from an empty cache
        #[arg(long, default_value_t = 512)]
        segment: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Time prefill and steps for several K
    Bench(bench::Bench),
    /// Write a Hub folder as a GGUF file
    Convert(convert::Convert),
    /// Write a GGUF file with weights of another type
    Quantize(convert::Quantize),
}

#[derive(Clone, Copy, ValueEnum)]
enum Backend {
    Auto,
    Cpu,
    Cuda,
    Reference,
}

#[derive(Clone, Copy, ValueEnum)]
enum Cache {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

/// What every command needs to know of the model and its cache.
#[derive(Args, Clone)]
struct Common {
    model: PathBuf,
    /// What computes
    #[arg(long, value_enum, default_value = "auto")]
    backend: Backend,
    /// Threads; 0 = one per physical core that the process may use
    #[arg(long, short = 't', default_value_t = 0)]
    threads: usize,
    /// Type of cached keys and values
    #[arg(long, value_enum, default_value = "f16")]
    cache: Cache,
    /// Cache size in positions
    #[arg(long = "ctx", default_value_t = 2048)]
    n_positions: usize,
    /// K instead of the checkpoint's own
    #[arg(long)]
    copies: Option<usize>,
    /// W in hidden tokens, with --copies
    #[arg(long, requires = "copies", default_value_t = 0)]
    window: usize,
    /// C in positions, with --window
    #[arg(long, requires = "copies", default_value_t = 0)]
    chunk: usize,
}

type Failure = Box<dyn std::error::Error>;

impl Common {
    fn load(&self) -> Result<Arc<Model>, Failure> {
        self.load_as(self.copies.map(|k| (k, self.window, self.chunk)))
    }

    fn load_as(&self, rules: Option<(usize, usize, usize)>) -> Result<Arc<Model>, Failure> {
        // Draws on a terminal only.
        let bar = indicatif::ProgressBar::new(100).with_message("loading");
        let mut progress = |fraction: f32| {
            bar.set_position((fraction * 100.0) as u64);
            true
        };
        let backend = match self.backend {
            Backend::Auto => BackendKind::Auto,
            Backend::Cpu => BackendKind::Cpu,
            Backend::Cuda => BackendKind::Cuda,
            Backend::Reference => BackendKind::Reference,
        };
        let options = LoadOptions { backend, rules, progress: Some(&mut progress), ..Default::default() };
        let model = Model::load(&self.model, options);
        bar.finish_and_clear();
        Ok(Arc::new(model?))
    }

    fn session(&self, model: &Arc<Model>, n_positions: usize) -> Result<Session, Failure> {
        self.sessions(model, n_positions, 1)
    }

    /// A session of `n_sequences`, with `n_positions` for all of them.
    fn sessions(&self, model: &Arc<Model>, n_positions: usize, n_sequences: usize) -> Result<Session, Failure> {
        Ok(Session::new(model.clone(), &SessionOptions { n_sequences, ..self.options(n_positions) })?)
    }

    fn options(&self, n_positions: usize) -> SessionOptions {
        let cache_type = match self.cache {
            Cache::F32 => CacheType::F32,
            Cache::F16 => CacheType::F16,
            Cache::Bf16 => CacheType::Bf16,
            Cache::Q8_0 => CacheType::Q8_0,
        };
        SessionOptions { n_positions, n_threads: self.threads, cache_type, ..Default::default() }
    }
}

fn tokenizer<'a>(model: &'a Model, path: &Path) -> Result<&'a Tokenizer, Failure> {
    model.tokenizer().ok_or_else(|| format!("{}: has no tokenizer, and this command needs text", path.display()).into())
}

fn ids(tokens: Vec<u32>) -> Vec<i32> {
    tokens.into_iter().map(|t| t as i32).collect()
}

/// "K = 2, W = 16, C = 32 (PHD-CSWA)".
fn describe_rules(rules: phd::schedule::Rules) -> String {
    let name = match (rules.attention, rules.copies, rules.window, rules.chunk) {
        (phd::schedule::Attention::Full, ..) => "sequential",
        (_, 1, ..) => "vanilla",
        (_, _, 0, _) => "PHD",
        (_, _, _, 0) => "PHD-SWA",
        _ => "PHD-CSWA",
    };
    format!("K = {}, W = {}, C = {} ({name})", rules.copies, rules.window, rules.chunk)
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / 1048576.0)
}

fn describe_memory(session: &Session) -> String {
    let m = session.memory();
    format!("weights {}, cache {}, hidden {}, scratch {}", mib(m.weights), mib(m.cache), mib(m.hidden), mib(m.scratch))
}

fn info(common: &Common) -> Result<(), Failure> {
    let model = common.load()?;
    let d = model.desc();
    println!("family       {}", d.family);
    println!("parameters   {:.1} M", d.n_parameters as f64 / 1e6);
    println!("weights      {} ({})", mib(d.weight_bytes), d.dtypes);
    println!("layers       {}, embedding {}, vocabulary {}", d.n_layers, d.n_embd, d.n_vocab);
    println!("trained for  {} positions", d.n_ctx_train);
    println!("decoding     {}", describe_rules(d.rules));
    println!("tokenizer    {}", if model.tokenizer().is_some() { "yes" } else { "none: token ids only" });
    println!("backend      {}", model.backend_name());
    println!("{} positions  {}", common.n_positions, describe_memory(&common.session(&model, common.n_positions)?));
    Ok(())
}

fn score(common: &Common, file: &Path, segment: usize, json: bool) -> Result<(), Failure> {
    if segment < 2 {
        return Err(format!("--segment is {segment}, expected at least 2").into());
    }
    let model = common.load()?;
    let text = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let tokens = ids(tokenizer(&model, &common.model)?.encode(&text, false, false)?);
    let mut session = common.session(&model, segment)?;
    let bar = indicatif::ProgressBar::new(tokens.len() as u64);
    let (mut sum, mut n) = (0.0, 0usize);
    for tokens in tokens.chunks(segment) {
        session.truncate(0, 0)?;
        let scores = session.score(0, tokens)?;
        sum -= scores.iter().map(|&s| f64::from(s)).sum::<f64>();
        n += scores.len();
        bar.inc(tokens.len() as u64);
    }
    bar.finish_and_clear();
    if n == 0 {
        return Err(format!("{}: {} tokens, expected at least 2", file.display(), tokens.len()).into());
    }
    let mean = sum / n as f64;
    if json {
        println!(
            "{}",
            serde_json::json!({"mean_nll": mean, "perplexity": mean.exp(), "positions": n, "segment": segment})
        );
    } else {
        println!(
            "{n} positions scored in segments of {segment}: mean negative log-likelihood {mean:.4}, perplexity {:.3}",
            mean.exp()
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(run) => run.execute(),
        Command::Chat(chat) => chat.execute(),
        Command::Info { common } => info(&common),
        Command::Score { common, file, segment, json } => score(&common, &file, segment, json),
        Command::Bench(bench) => bench.execute(),
        Command::Convert(convert) => convert.execute(),
        Command::Quantize(quantize) => quantize.execute(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("phd: {e}");
            ExitCode::FAILURE
        }
    }
}
