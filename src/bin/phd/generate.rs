//! `phd run` and `phd chat`.

use std::io::{BufRead, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use phd::model::Model;
use phd::sampling::constraint::{Constraint, TokenEnvironment};
use phd::sampling::{Sampler, SamplerParams, StageKind};
use phd::session::{Session, SessionOptions};
use phd::speculative::{DraftModel, PromptLookup, Speculator};
use phd::tokenizer::chat::{ChatTemplate, Conversation};
use phd::tokenizer::{StopStrings, StreamDecoder, Tokenizer};
use serde_json::{Map, Value as Json, json};

use crate::{Common, Failure, describe_memory, ids, tokenizer};

#[derive(Args, Clone)]
struct Sampling {
    /// Temperature; 0 = greedy
    #[arg(long, default_value_t = 0.8)]
    temp: f32,
    /// Let the temperature vary by this with the entropy; 0 = off
    #[arg(long, default_value_t = 0.0)]
    dynatemp_range: f32,
    #[arg(long, default_value_t = 1.0)]
    dynatemp_exp: f32,
    /// Keep the K likeliest tokens; 0 = all
    #[arg(long, default_value_t = 40)]
    top_k: u32,
    /// Keep the likeliest tokens that make up this probability; 1 = all
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Keep tokens of at least this share of the likeliest one's probability; 0 = all
    #[arg(long, default_value_t = 0.05)]
    min_p: f32,
    /// Keep the most typical tokens that make up this probability; 1 = all
    #[arg(long, default_value_t = 1.0)]
    typical: f32,
    /// Keep logits at most this many standard deviations below the best; 0 = all
    #[arg(long, default_value_t = 0.0)]
    top_n_sigma: f32,
    /// How often XTC drops the likeliest tokens; 0 = never
    #[arg(long, default_value_t = 0.0)]
    xtc_probability: f32,
    #[arg(long, default_value_t = 0.1)]
    xtc_threshold: f32,
    /// Divide what was said before; 1 = off
    #[arg(long, default_value_t = 1.0)]
    repeat_penalty: f32,
    #[arg(long, default_value_t = 0.0)]
    presence_penalty: f32,
    #[arg(long, default_value_t = 0.0)]
    frequency_penalty: f32,
    /// Recent tokens that penalties look at
    #[arg(long, default_value_t = 64)]
    repeat_last_n: u32,
    /// Strength of DRY, which penalizes repeated passages; 0 = off
    #[arg(long, default_value_t = 0.0)]
    dry_multiplier: f32,
    #[arg(long, default_value_t = 1.75)]
    dry_base: f32,
    #[arg(long, default_value_t = 2)]
    dry_allowed_length: u32,
    #[arg(long, default_value_t = 4096)]
    dry_penalty_last_n: u32,
    /// What DRY sees no repetition across; repeat it for several
    #[arg(long, default_values_t = ["\n", ":", "\"", "*"].map(str::to_owned))]
    dry_sequence_breaker: Vec<String>,
    /// 2 = Mirostat 2.0 instead of the other stages but the temperature
    #[arg(long, default_value_t = 0)]
    mirostat: u32,
    #[arg(long, default_value_t = 5.0)]
    mirostat_ent: f32,
    #[arg(long, default_value_t = 0.1)]
    mirostat_lr: f32,
    /// Stages in another order, such as "top_k;temperature"
    #[arg(long)]
    samplers: Option<String>,
    /// Equal seeds give equal texts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl Sampling {
    fn sampler(&self, model: &Model, tokenizer: &Tokenizer) -> Result<Sampler, Failure> {
        let params = SamplerParams {
            temperature: self.temp,
            dynatemp_range: self.dynatemp_range,
            dynatemp_exponent: self.dynatemp_exp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical,
            top_n_sigma: self.top_n_sigma,
            xtc_probability: self.xtc_probability,
            xtc_threshold: self.xtc_threshold,
            repetition_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            penalty_last_n: self.repeat_last_n,
            dry_multiplier: self.dry_multiplier,
            dry_base: self.dry_base,
            dry_allowed_length: self.dry_allowed_length,
            dry_penalty_last_n: self.dry_penalty_last_n,
            mirostat: self.mirostat,
            mirostat_tau: self.mirostat_ent,
            mirostat_eta: self.mirostat_lr,
            min_keep: 0,
            seed: self.seed,
        };
        let n_vocab = model.desc().n_vocab;
        let mut sampler = match &self.samplers {
            None => Sampler::new(params, n_vocab)?,
            Some(order) => {
                let mut sampler = Sampler::empty(n_vocab, self.seed)?;
                for name in order.split(';').filter(|name| !name.is_empty()) {
                    let kind = StageKind::from_name(name).ok_or_else(|| {
                        format!("--samplers: {name:?}, expected of {}", StageKind::ALL.map(StageKind::name).join(";"))
                    })?;
                    sampler.push(params.stage(kind))?;
                }
                sampler
            }
        };
        if self.dry_multiplier > 0.0 {
            for text in &self.dry_sequence_breaker {
                sampler.add_dry_breaker_text(text, tokenizer)?;
            }
        }
        Ok(sampler)
    }

    /// For text that goes on after the prompt.
    fn decoder(&self) -> Result<StreamDecoder, Failure> {
        Ok(StreamDecoder::continuing().with_stops(Arc::new(StopStrings::new(&self.stop)?)))
    }
}

#[derive(Args)]
pub struct Run {
    #[command(flatten)]
    common: Common,
    /// The prompt; - reads it from standard input
    #[arg(short, long)]
    prompt: String,
    /// Tokens to generate at most
    #[arg(short, long, default_value_t = 128)]
    n_predict: usize,
    /// Write JSON that is valid by the JSON schema in this file
    #[arg(long, value_name = "FILE", group = "constraint")]
    schema: Option<PathBuf>,
    /// Write text of the grammar in this file, in llguidance's variant of Lark
    #[arg(long, value_name = "FILE", group = "constraint")]
    grammar: Option<PathBuf>,
    /// Write text of the grammar in this file, in llama.cpp's format
    #[arg(long, value_name = "FILE", group = "constraint")]
    gbnf: Option<PathBuf>,
    #[command(flatten)]
    drafting: Drafting,
    #[command(flatten)]
    sampling: Sampling,
}

/// Speculative decoding: the same text, sooner if drafts are often right.
#[derive(Args)]
struct Drafting {
    /// Draft up to N tokens a step from where the text's last tokens stood before
    #[arg(long, value_name = "N", conflicts_with_all = ["draft_model", "draft"])]
    draft_lookup: Option<usize>,
    /// Tokens that must have stood before, and how many are compared at most
    #[arg(long, value_name = "MIN,MAX", value_delimiter = ',', num_args = 1, default_values_t = [2, 8])]
    draft_ngram: Vec<usize>,
    /// Draft with a smaller model of the same vocabulary
    #[arg(long, value_name = "MODEL")]
    draft_model: Option<PathBuf>,
    /// Draft up to N tokens a step with it
    #[arg(long, value_name = "N", default_value_t = 4, requires = "draft_model")]
    draft: usize,
    /// Stop drafting before a token less probable than this; 0 = never
    #[arg(long, value_name = "P", default_value_t = 0.75, requires = "draft_model")]
    draft_p_min: f32,
}

impl Drafting {
    /// What the session must be able to take back.
    fn n_draft(&self) -> usize {
        self.draft_lookup.unwrap_or(if self.draft_model.is_some() { self.draft } else { 0 })
    }

    fn speculator(&self, common: &Common, model: &Model) -> Result<Option<Speculator>, Failure> {
        if let Some(path) = &self.draft_model {
            let common = Common { model: path.clone(), copies: None, window: 0, chunk: 0, ..common.clone() };
            let options = SessionOptions { n_draft: self.draft, ..common.options(common.n_positions) };
            let session = Session::new(common.load()?, &options)?;
            let drafter = DraftModel::new(model, session, self.draft_p_min)?;
            return Ok(Some(Speculator::new(drafter, self.draft)?));
        }
        let Some(n) = self.draft_lookup else { return Ok(None) };
        let [min, max] = self.draft_ngram[..] else { return Err("--draft-ngram: expected MIN,MAX".into()) };
        Ok(Some(Speculator::new(PromptLookup::new(min, max)?, n)?))
    }
}

impl Run {
    fn constraint(&self, model: &Model) -> Result<Option<Constraint>, Failure> {
        type Make = fn(&Arc<TokenEnvironment>, &str) -> phd::Result<Constraint>;
        let kinds: [(_, Make); 3] = [
            (&self.schema, Constraint::json_schema),
            (&self.grammar, Constraint::grammar),
            (&self.gbnf, Constraint::gbnf),
        ];
        let Some((path, make)) = kinds.into_iter().find_map(|(path, make)| Some((path.as_ref()?, make))) else {
            return Ok(None);
        };
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let made = make(&model.token_environment()?, &text);
        Ok(Some(made.map_err(|e| format!("{}: {e}", path.display()))?))
    }

    pub fn execute(&self) -> Result<(), Failure> {
        let mut prompt = self.prompt.clone();
        if prompt == "-" {
            prompt.clear();
            std::io::stdin().read_to_string(&mut prompt)?;
        }
        let model = self.common.load()?;
        let tokenizer = tokenizer(&model, &self.common.model)?;
        let tokens = ids(tokenizer.encode(prompt.as_bytes(), true, true)?);
        if tokens.is_empty() {
            return Err("the prompt has no tokens".into());
        }
        let mut speculator = self.drafting.speculator(&self.common, &model)?;
        let options =
            SessionOptions { n_draft: self.drafting.n_draft(), ..self.common.options(self.common.n_positions) };
        let mut session = Session::new(model.clone(), &options)?;
        let mut sampler = self.sampling.sampler(&model, tokenizer)?;
        if let Some(constraint) = self.constraint(&model)? {
            sampler.set_constraint(constraint)?;
        }
        let decoder = self.sampling.decoder()?;
        let mut out = std::io::stdout().lock();
        write!(out, "{prompt}")?;
        out.flush()?;
        let begin = Instant::now();
        prefill(&mut session, &tokens)?;
        let prefill_seconds = begin.elapsed().as_secs_f64();
        tokens.iter().for_each(|&t| sampler.accept_prompt(t as u32));
        let begin = Instant::now();
        let n = self.n_predict;
        let reply = generate(&mut session, &mut sampler, speculator.as_mut(), tokenizer, decoder, n, &mut out)?;
        let step_seconds = begin.elapsed().as_secs_f64();
        writeln!(out)?;
        eprintln!(
            "\nprefill {} tokens at {:.1} tok/s; {} tokens at {:.1} tok/s\n{}",
            tokens.len(),
            tokens.len() as f64 / prefill_seconds,
            reply.len(),
            reply.len() as f64 / step_seconds.max(1e-9),
            describe_memory(&session),
        );
        if let Some(stats) = speculator.map(|s| s.stats()) {
            let share = 100.0 * stats.accepted as f64 / (stats.drafted as f64).max(1.0);
            eprintln!("{} steps; {} of {} drafts accepted ({share:.0} %)", stats.steps, stats.accepted, stats.drafted);
        }
        Ok(())
    }
}

/// Prefill with a progress bar, which draws on a terminal only.
fn prefill(session: &mut Session, tokens: &[i32]) -> Result<(), Failure> {
    let bar = indicatif::ProgressBar::new(100).with_message("prefill");
    let shown = bar.clone();
    session.set_progress(Some(Box::new(move |fraction| {
        shown.set_position((fraction * 100.0) as u64);
        true
    })));
    let result = session.prefill(0, tokens);
    session.set_progress(None);
    bar.finish_and_clear();
    Ok(result?)
}

/// Streams tokens until the model ends, a stop string comes, `n` are made, or the cache is full; every token but the last is in
/// the session.
fn generate(
    session: &mut Session,
    sampler: &mut Sampler,
    mut speculator: Option<&mut Speculator>,
    tokenizer: &Tokenizer,
    mut decoder: StreamDecoder,
    n: usize,
    out: &mut dyn Write,
) -> Result<Vec<i32>, Failure> {
    let mut reply = Vec::new();
    let mut text = String::new();
    let mut tokens = Vec::new();
    if n > 0 {
        tokens.push(choose(session, sampler)?);
    }
    'steps: while !tokens.is_empty() {
        for &token in &tokens {
            if tokenizer.is_end_of_generation(token as u32) {
                break 'steps;
            }
            reply.push(token);
            text.clear();
            decoder.push(tokenizer, token as u32, &mut text)?;
            out.write_all(text.as_bytes())?;
            out.flush()?;
            if reply.len() == n || decoder.stop().is_some() {
                break 'steps;
            }
        }
        let last = tokens[tokens.len() - 1];
        tokens.clear();
        let step = match &mut speculator {
            Some(speculator) => speculator.step(session, 0, last, sampler).map(|t| tokens.extend_from_slice(t)),
            None => session.step(0, last).and_then(|()| choose(session, sampler)).map(|token| tokens.push(token)),
        };
        match step {
            Err(phd::Error::CacheFull { .. }) => eprint!("\n(the cache is full: --ctx makes it larger)"),
            other => other?,
        }
    }
    text.clear();
    decoder.finish(&mut text);
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(reply)
}

fn choose(session: &Session, sampler: &mut Sampler) -> phd::Result<i32> {
    let token = session.sample(0, sampler)?;
    sampler.accept(token)?;
    Ok(token as i32)
}

#[derive(Args)]
pub struct Chat {
    #[command(flatten)]
    common: Common,
    /// System prompt
    #[arg(long)]
    system: Option<String>,
    /// Variable of the chat template, such as enable_thinking=false; what is not JSON is text
    #[arg(long, value_name = "NAME=JSON", value_parser = template_var)]
    template_var: Vec<(String, Json)>,
    /// Tokens to a reply at most
    #[arg(short, long, default_value_t = 512)]
    n_predict: usize,
    #[command(flatten)]
    sampling: Sampling,
}

fn template_var(text: &str) -> Result<(String, Json), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=JSON")?;
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| json!(value))))
}

impl Chat {
    pub fn execute(&self) -> Result<(), Failure> {
        let model = self.common.load()?;
        let tokenizer = tokenizer(&model, &self.common.model)?;
        let source = tokenizer.chat_template().ok_or("the model has no chat template; use phd run")?;
        let template = ChatTemplate::new(source)?;
        let (bos, eos) = (tokenizer.spelling(tokenizer.bos()), tokenizer.spelling(tokenizer.eos()));
        let variables: Map<String, Json> = self.template_var.iter().cloned().collect();
        let mut session = self.common.session(&model, self.common.n_positions)?;
        let mut sampler = self.sampling.sampler(&model, tokenizer)?;
        let decoder = self.sampling.decoder()?;
        let mut messages: Vec<_> = self.system.iter().map(|s| json!({"role": "system", "content": s})).collect();
        // What the session holds: each turn prefills only what is new.
        let mut held: Vec<i32> = Vec::new();
        let mut out = std::io::stdout().lock();
        loop {
            write!(out, "> ")?;
            out.flush()?;
            let mut line = String::new();
            if std::io::stdin().lock().read_line(&mut line)? == 0 || line.trim() == "/exit" {
                writeln!(out)?;
                return Ok(());
            }
            messages.push(json!({"role": "user", "content": line.trim_end()}));
            let text = template.render(&Conversation {
                add_generation_prompt: true,
                bos: &bos,
                eos: &eos,
                variables: Some(&variables),
                ..Conversation::new(&json!(messages))
            })?;
            // The template writes the begin token itself.
            let tokens = ids(tokenizer.encode(text.as_bytes(), false, true)?);
            let common =
                held.iter().zip(&tokens).take_while(|(a, b)| a == b).count().min(tokens.len().saturating_sub(1));
            session.truncate(0, common)?;
            prefill(&mut session, &tokens[common..])?;
            let mut shown = Tee { out: &mut out, copy: Vec::new() };
            let reply =
                generate(&mut session, &mut sampler, None, tokenizer, decoder.clone(), self.n_predict, &mut shown)?;
            let said = String::from_utf8_lossy(&shown.copy).into_owned();
            held = tokens;
            held.extend(reply);
            held.truncate(session.len(0)?);
            messages.push(json!({"role": "assistant", "content": said}));
            writeln!(out)?;
        }
    }
}

/// Output that is shown and kept.
struct Tee<'a> {
    out: &'a mut dyn Write,
    copy: Vec<u8>,
}

impl Write for Tee<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.copy.extend_from_slice(bytes);
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
