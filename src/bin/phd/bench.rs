//! `phd bench`: prefill and step times for several K.

use std::time::Instant;

use clap::Args;
use serde_json::json;

use crate::{Common, Failure};

#[derive(Args)]
pub struct Bench {
    #[command(flatten)]
    common: Common,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Steps after it; the median counts
    #[arg(long, default_value_t = 16)]
    steps: usize,
    /// The K to time
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4")]
    copies_list: Vec<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

struct Figures {
    copies: usize,
    prefill_ms: f64,
    step_ms: f64,
}

impl Bench {
    pub fn execute(&self) -> Result<(), Failure> {
        if self.prompt == 0 || self.steps == 0 || self.copies_list.is_empty() {
            return Err("--prompt, --steps and --copies-list need at least one".into());
        }
        let mut figures = Vec::new();
        let mut backend = String::new();
        for &copies in &self.copies_list {
            let hidden = if copies > 1 { (self.common.window, self.common.chunk) } else { (0, 0) };
            let model = self.common.load_as(Some((copies, hidden.0, hidden.1)))?;
            backend = model.backend_name();
            let mut session = self.common.session(&model, self.prompt + self.steps)?;
            let n_vocab = model.desc().n_vocab;
            let tokens: Vec<i32> = (0..self.prompt).map(|i| (i * 7919 % n_vocab) as i32).collect();
            let begin = Instant::now();
            session.prefill(0, &tokens)?;
            let prefill_ms = begin.elapsed().as_secs_f64() * 1e3;
            let mut steps = Vec::with_capacity(self.steps);
            for i in 0..self.steps {
                let begin = Instant::now();
                session.step(0, tokens[i % tokens.len()])?;
                steps.push(begin.elapsed().as_secs_f64() * 1e3);
            }
            steps.sort_by(f64::total_cmp);
            figures.push(Figures { copies, prefill_ms, step_ms: steps[steps.len() / 2] });
        }
        let base = &figures[0];
        if self.json {
            let rows: Vec<_> = figures
                .iter()
                .map(|f| {
                    json!({
                        "copies": f.copies, "prefill_ms": f.prefill_ms, "step_ms": f.step_ms,
                        "prefill_tokens_per_second": self.prompt as f64 / f.prefill_ms * 1e3,
                        "step_tokens_per_second": 1e3 / f.step_ms,
                        "prefill_ratio": f.prefill_ms / base.prefill_ms, "step_ratio": f.step_ms / base.step_ms,
                    })
                })
                .collect();
            println!("{}", json!({"backend": backend, "prompt": self.prompt, "steps": self.steps, "results": rows}));
            return Ok(());
        }
        println!("{backend}; prompt of {}, median of {} steps; ratios to K = {}", self.prompt, self.steps, base.copies);
        println!("   K  prefill ms     tok/s  ratio     step ms     tok/s  ratio");
        for f in &figures {
            println!(
                "{:4} {:11.1} {:9.1} {:6.2} {:11.2} {:9.1} {:6.2}",
                f.copies,
                f.prefill_ms,
                self.prompt as f64 / f.prefill_ms * 1e3,
                f.prefill_ms / base.prefill_ms,
                f.step_ms,
                1e3 / f.step_ms,
                f.step_ms / base.step_ms
            );
        }
        Ok(())
    }
}
