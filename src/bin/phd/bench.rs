//! `phd bench`: prefill and step times for several K, side by side.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use phd::session::{BatchEntry, Logits};
use phd::{Model, Session};
use serde_json::json;

use crate::{Common, Failure};

#[derive(Args)]
pub struct Bench {
    #[command(flatten)]
    common: Common,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Cached positions at which steps are timed
    #[arg(long, value_delimiter = ',', default_value = "512")]
    context: Vec<usize>,
    /// Timed steps of each K; the median counts
    #[arg(long, default_value_t = 32)]
    steps: usize,
    /// Timed prefills, and decodings, of each K; the median counts
    #[arg(long, default_value_t = 3)]
    prefills: usize,
    /// Tokens to decode without a pause from an empty cache
    #[arg(long, default_value_t = 48)]
    decode: usize,
    /// The K to time, in turn; ratios are to the first
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4")]
    copies_list: Vec<usize>,
    /// Numbers of sequences that decode together, each with the first of --context cached
    #[arg(long, value_delimiter = ',')]
    sequences: Vec<usize>,
    /// Instead: cancel so many prefills of --prompt tokens from another thread and time how long they take to stop
    #[arg(long, value_name = "TRIES", conflicts_with = "prefix")]
    cancel: Option<usize>,
    /// Instead: time a request's first logits with a prefix of so many tokens computed, and with it taken over
    #[arg(long, value_name = "TOKENS")]
    prefix: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Steps of one K before another has its turn.
const TURN: usize = 8;

/// Steps at the beginning of a turn that are not timed: after a pause, and after so much other reading as a bandwidth takes, they are 3 to 11%
/// slower than those of an endless decoding.
const UNTIMED: usize = 2;

/// Threads of the session that had its turn go to sleep, before another's are timed.
const PAUSE: Duration = Duration::from_millis(2);

struct Contender {
    copies: usize,
    session: Session,
    prefill_ms: Vec<f64>,
    /// Of a token.
    decode_ms: Vec<f64>,
    step_ms: Vec<f64>,
}

impl Contender {
    /// The median of each contender's `ms` for so many tokens; ratios are to the first's.
    fn report(all: &mut [Contender], tokens: usize, ms: impl Fn(&mut Contender) -> &mut Vec<f64>) -> Vec<Timed> {
        let mut timed: Vec<Timed> = Vec::new();
        for c in all {
            let copies = c.copies;
            let all = ms(c);
            if !all.is_empty() {
                let ms = median(all);
                let base = timed.first().map_or(ms, |t| t.ms);
                timed.push(Timed { copies, ms, rate: tokens as f64 / ms * 1e3, ratio: ms / base });
            }
        }
        timed
    }
}

/// Milliseconds of a prompt or a token, and tokens per second.
struct Timed {
    copies: usize,
    ms: f64,
    rate: f64,
    ratio: f64,
}

impl Timed {
    fn json(&self) -> serde_json::Value {
        json!({"copies": self.copies, "ms": self.ms, "tokens_per_second": self.rate, "ratio": self.ratio})
    }

    fn print(all: &[Timed], title: &str) {
        if all.is_empty() {
            return;
        }
        println!("\n{title}\n   K          ms     tok/s  ratio");
        for t in all {
            println!("{:4} {:11.2} {:9.1} {:6.2}", t.copies, t.ms, t.rate, t.ratio);
        }
    }
}

impl Bench {
    pub fn execute(&self) -> Result<(), Failure> {
        if let Some(tries) = self.cancel {
            return crate::serving::cancel(&self.common, self.prompt.max(1), tries, self.json);
        }
        if let Some(n) = self.prefix {
            return crate::serving::prefix(&self.common, n.max(1), self.prefills, self.json);
        }
        if self.steps == 0 || self.copies_list.is_empty() || self.context.contains(&0) || self.sequences.contains(&0) {
            return Err("--steps, --copies-list, --context and --sequences need at least one".into());
        }
        let model = self.common.load()?;
        let mut contexts = self.context.clone();
        contexts.sort_unstable();
        let longest = self.prompt.max(self.decode).max(contexts[contexts.len() - 1]);
        let room = longest + contexts.len() * 2 * (self.steps + TURN);
        let mut all = Vec::new();
        for &copies in &self.copies_list {
            let hidden = if copies > 1 { (self.common.window, self.common.chunk) } else { (0, 0) };
            let model = Arc::new(model.with_rules((copies, hidden.0, hidden.1))?);
            let session = self.common.session(&model, room)?;
            let (prefill_ms, decode_ms, step_ms) = Default::default();
            all.push(Contender { copies, session, prefill_ms, decode_ms, step_ms });
        }
        let n_vocab = model.desc().n_vocab;
        let token = |i: usize| (i * 7919 % n_vocab) as i32;
        let tokens: Vec<i32> = (0..room).map(token).collect();
        let pause = || std::thread::sleep(PAUSE);

        let bar = indicatif::ProgressBar::new((self.prefills + contexts.len()) as u64).with_message("timing");
        for _ in 0..self.prefills {
            for c in all.iter_mut().filter(|_| self.prompt > 0) {
                pause();
                c.session.truncate(0, 0)?;
                let begin = Instant::now();
                c.session.prefill(0, &tokens[..self.prompt])?;
                c.prefill_ms.push(begin.elapsed().as_secs_f64() * 1e3);
            }
            for c in all.iter_mut().filter(|_| self.decode > 0) {
                pause();
                c.session.truncate(0, 0)?;
                c.session.step(0, tokens[0])?; // not timed: it wakes the threads
                c.session.truncate(0, 0)?;
                let begin = Instant::now();
                tokens[..self.decode].iter().try_for_each(|&token| c.session.step(0, token))?;
                c.decode_ms.push(begin.elapsed().as_secs_f64() * 1e3 / self.decode as f64);
            }
            bar.inc(1);
        }
        let threads = all[0].session.threads();
        let mut rows = Vec::new();
        for &context in &contexts {
            for c in &mut all {
                if c.session.len(0)? > context {
                    c.session.truncate(0, context)?;
                }
                let len = c.session.len(0)?;
                if len < context {
                    c.session.prefill(0, &tokens[len..context])?;
                }
                c.step_ms.clear();
            }
            let mut bandwidths = Vec::new();
            for turn in 0..self.steps.div_ceil(TURN) {
                // In turn with the steps: others on the machine change it from one moment to the next.
                bandwidths.push(model.bandwidth(threads)?);
                // Each is first at times: who comes after so much reading is slower.
                let begin_with = turn % all.len();
                let (last, first) = all.split_at_mut(begin_with);
                for c in first.iter_mut().chain(last) {
                    take_turn(&mut c.session, &tokens, &mut c.step_ms)?;
                }
            }
            let bandwidth = median(&mut bandwidths);
            let base = median(&mut all[0].step_ms);
            for c in &mut all {
                let ms = median(&mut c.step_ms);
                let cache = c.session.memory().cache as f64 * context as f64 / room as f64;
                let bytes = model.pass_bytes() as f64 + cache;
                rows.push(Row {
                    context,
                    copies: c.copies,
                    ms,
                    ratio: ms / base,
                    gb_per_s: bytes / ms * 1e-6,
                    bandwidth,
                });
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        let bandwidth = median(&mut rows.iter().map(|r: &Row| r.bandwidth).collect::<Vec<_>>());
        let together = self.together(&model, self.context[0], &tokens)?;
        let backend = model.backend_name();
        let prefill = Contender::report(&mut all, self.prompt, |c| &mut c.prefill_ms);
        let decode = Contender::report(&mut all, 1, |c| &mut c.decode_ms);
        if self.json {
            let of = |timed: &[Timed]| timed.iter().map(Timed::json).collect::<Vec<_>>();
            let steps: Vec<_> = rows
                .iter()
                .map(|r| {
                    json!({"context": r.context, "copies": r.copies, "ms": r.ms, "tokens_per_second": 1e3 / r.ms,
                        "ratio": r.ratio, "gb_per_second": r.gb_per_s,
                        "bandwidth_gb_per_second": r.bandwidth * 1e-9, "share_of_bandwidth": r.share()})
                })
                .collect();
            let result = json!({"backend": backend, "threads": threads, "prompt": self.prompt,
                "bandwidth_gb_per_second": bandwidth * 1e-9, "weight_bytes_per_pass": model.pass_bytes(),
                "prefill": of(&prefill), "decode": of(&decode), "steps": steps, "together": together.iter().map(Together::json).collect::<Vec<_>>()});
            println!("{result}");
            return Ok(());
        }
        println!(
            "{backend}, {threads} threads, {} of weights a pass; its memory gives {:.1} GB/s here",
            crate::mib(model.pass_bytes()),
            bandwidth * 1e-9
        );
        Timed::print(&prefill, &format!("prefill of {}, median of {}", self.prompt, self.prefills));
        Timed::print(&decode, &format!("a token of {} from an empty cache, median of {}", self.decode, self.prefills));
        println!("\nsteps, median of {}\n context    K          ms     tok/s  ratio    GB/s  of bandwidth", self.steps);
        for r in &rows {
            println!(
                "{:8} {:4} {:11.2} {:9.1} {:6.2} {:7.1} {:12.0}%",
                r.context,
                r.copies,
                r.ms,
                1e3 / r.ms,
                r.ratio,
                r.gb_per_s,
                100.0 * r.share()
            );
        }
        if !together.is_empty() {
            println!(
                "\nsequences together, {} positions each, median of {} steps\n   n    K          ms     tok/s  tok/s over 1  K over {}",
                self.context[0], self.steps, self.copies_list[0]
            );
        }
        for t in &together {
            let [alone, first] = [(self.sequences[0], t.copies), (t.sequences, self.copies_list[0])].map(|key| {
                let other = together.iter().find(|o| (o.sequences, o.copies) == key).expect("all pairs were timed");
                t.tokens_per_second() / other.tokens_per_second()
            });
            let (ms, rate) = (t.ms, t.tokens_per_second());
            println!("{:4} {:4} {ms:11.2} {rate:9.1} {alone:13.2} {first:9.2}", t.sequences, t.copies);
        }
        Ok(())
    }

    /// Steps of several sequences in one batch, for each number of them and each K.
    fn together(&self, model: &Model, context: usize, tokens: &[i32]) -> Result<Vec<Together>, Failure> {
        let mut times = Vec::new();
        for &n in &self.sequences {
            let mut contenders = Vec::new();
            for &copies in &self.copies_list {
                let hidden = if copies > 1 { (self.common.window, self.common.chunk) } else { (0, 0) };
                let model = Arc::new(model.with_rules((copies, hidden.0, hidden.1))?);
                // A sequence's last block may be part-filled.
                let room = n * (context + 2 * (self.steps + TURN) + 16);
                let mut session = self.common.sessions(&model, room, n)?;
                for seq in 0..n {
                    session.prefill(seq as i64, &tokens[..context])?;
                }
                contenders.push((copies, session, Vec::new()));
            }
            for _ in 0..self.steps.div_ceil(TURN) {
                for (_, session, ms) in &mut contenders {
                    take_turn(session, tokens, ms)?;
                }
            }
            for (copies, _, mut ms) in contenders {
                times.push(Together { sequences: n, copies, ms: median(&mut ms) });
            }
        }
        Ok(times)
    }
}

/// Steps of all sequences of a session, equally long, in one batch each.
fn take_turn(session: &mut Session, tokens: &[i32], ms: &mut Vec<f64>) -> Result<(), Failure> {
    std::thread::sleep(PAUSE);
    for i in 0..UNTIMED + TURN {
        let len = session.len(0)?;
        let next = |seq| BatchEntry { seq, tokens: &tokens[len..len + 1], logits: Logits::Last };
        let batch: Vec<_> = (0..session.options().n_sequences as i64).map(next).collect();
        let begin = Instant::now();
        session.decode(&batch)?;
        if i >= UNTIMED {
            ms.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(())
}

struct Together {
    sequences: usize,
    copies: usize,
    ms: f64,
}

impl Together {
    fn tokens_per_second(&self) -> f64 {
        1e3 * self.sequences as f64 / self.ms
    }

    fn json(&self) -> serde_json::Value {
        json!({"sequences": self.sequences, "copies": self.copies, "ms": self.ms, "tokens_per_second": self.tokens_per_second()})
    }
}

struct Row {
    context: usize,
    copies: usize,
    ms: f64,
    ratio: f64,
    gb_per_s: f64,
    /// Bytes a second that plain reading gave meanwhile.
    bandwidth: f64,
}

impl Row {
    fn share(&self) -> f64 {
        self.gb_per_s * 1e9 / self.bandwidth
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
