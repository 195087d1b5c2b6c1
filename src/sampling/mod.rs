//! Choosing the next token from a model's logits.
//!
//! A [`Sampler`] is a chain of [`Stage`]s in the user's order, after a constraint and a logit bias. Stages mean what
//! llama.cpp's samplers of the same names mean. Arithmetic is in f64 and uses only operations that IEEE 754 defines
//! exactly, so that the same logits, stages and seed give the same tokens on every machine. `docs/sampling.md` says where
//! each stage comes from.

mod candidates;
pub mod constraint;
mod dry;
mod gbnf;
mod logprobs;
mod math;
mod schema;

use std::collections::VecDeque;

use candidates::Candidates;
use constraint::Constraint;
use dry::{Breakers, Dry};
pub use logprobs::{log_probabilities, top_log_probabilities};
pub(crate) use logprobs::{log_probability, log_probability_of};
use math::Xoshiro256pp;

use crate::backend::Top;
use crate::error::{Error, Result, invalid};
use crate::tokenizer::Tokenizer;

/// The largest window of the penalties and of DRY, in tokens.
pub const MAX_LAST_N: u32 = 1 << 20;
/// The most stages of a chain.
pub const MAX_STAGES: usize = 64;

/// One step from all logits to one token. `min_keep` is how many candidates a stage leaves at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Stage {
    /// Lowers the logits of tokens among the last `last_n` (0 = off): positive ones are divided by `repetition`, others
    /// multiplied; then `frequency` for each occurrence and `presence` once are subtracted.
    Penalties { last_n: u32, repetition: f32, frequency: f32, presence: f32 },
    /// Subtracts `multiplier * base^(length - allowed_length)` from a token that would continue a repetition of `length`
    /// tokens, none of them a breaker, within the last `last_n`. Off if `multiplier` or `last_n` is 0.
    Dry { multiplier: f32, base: f32, allowed_length: u32, last_n: u32 },
    /// Keeps logits at most `n` standard deviations below the largest. 0 and less = off.
    TopNSigma { n: f32 },
    /// Keeps the `k` largest logits; 0 = off.
    TopK { k: u32 },
    /// Keeps the tokens of surprise nearest to its mean that hold more than `p` of the probability; 1 = off.
    TypicalP { p: f32, min_keep: u32 },
    /// Keeps the most probable tokens that hold at least `p` of the probability; 1 = off.
    TopP { p: f32, min_keep: u32 },
    /// Keeps tokens of at least `p` times the largest probability; 0 = off.
    MinP { p: f32, min_keep: u32 },
    /// With `probability`, drops all tokens of at least probability `threshold` but the least probable of them. Off if
    /// `probability` is 0 or `threshold` above 0.5.
    Xtc { probability: f32, threshold: f32, min_keep: u32 },
    /// Divides the logits by `temperature`; 0 keeps the best token alone. With a `range` above 0, by one from
    /// `temperature - range` (at least 0) to `temperature + range`: the entropy as a share of the largest possible, to the
    /// power of `exponent`, says where.
    Temperature { temperature: f32, range: f32, exponent: f32 },
    /// Takes the best token. Ends the chain.
    Greedy,
    /// Draws by probability. Ends the chain; a chain without an end ends with this.
    Draw,
    /// Draws among the tokens of a surprise below a bound, which learns, at rate `eta`, to make the mean surprise `tau`
    /// bits (Mirostat 2.0). Ends the chain.
    MirostatV2 { tau: f32, eta: f32 },
}

/// Names a stage without its values: see [`SamplerParams::stage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageKind {
    Penalties,
    Dry,
    TopNSigma,
    TopK,
    TypicalP,
    TopP,
    MinP,
    Xtc,
    Temperature,
    Greedy,
    Draw,
    MirostatV2,
}

impl StageKind {
    pub const ALL: [StageKind; 12] = [
        StageKind::Penalties,
        StageKind::Dry,
        StageKind::TopNSigma,
        StageKind::TopK,
        StageKind::TypicalP,
        StageKind::TopP,
        StageKind::MinP,
        StageKind::Xtc,
        StageKind::Temperature,
        StageKind::Greedy,
        StageKind::Draw,
        StageKind::MirostatV2,
    ];

    /// llama.cpp's name of the stage.
    pub fn name(self) -> &'static str {
        match self {
            StageKind::Penalties => "penalties",
            StageKind::Dry => "dry",
            StageKind::TopNSigma => "top_n_sigma",
            StageKind::TopK => "top_k",
            StageKind::TypicalP => "typ_p",
            StageKind::TopP => "top_p",
            StageKind::MinP => "min_p",
            StageKind::Xtc => "xtc",
            StageKind::Temperature => "temperature",
            StageKind::Greedy => "greedy",
            StageKind::Draw => "dist",
            StageKind::MirostatV2 => "mirostat_v2",
        }
    }

    pub fn from_name(name: &str) -> Option<StageKind> {
        StageKind::ALL.into_iter().find(|k| k.name() == name)
    }
}

impl Stage {
    /// Checks every value against its range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the first value that is out of range.
    pub fn validate(&self) -> Result<()> {
        let check = |good: bool, field: &str, value: f32, expected: &str| {
            if good { Ok(()) } else { Err(invalid!("{field} is {value}, expected {expected}")) }
        };
        let finite = |field: &str, v: f32| check(v.is_finite(), field, v, "a finite number");
        let at_least = |field: &str, v: f32, bound: f32| {
            check(v.is_finite() && v >= bound, field, v, &format!("a finite number of at least {bound}"))
        };
        let above_0 = |field: &str, v: f32| check(v.is_finite() && v > 0.0, field, v, "a finite number above 0");
        let share = |field: &str, v: f32| check((0.0..=1.0).contains(&v), field, v, "a number from 0 to 1");
        let window = |field: &str, n: u32| match n {
            0..=MAX_LAST_N => Ok(()),
            _ => Err(invalid!("{field} is {n}, expected at most {MAX_LAST_N}")),
        };
        match *self {
            Stage::Penalties { last_n, repetition, frequency, presence } => {
                above_0("repetition_penalty", repetition)?;
                finite("frequency_penalty", frequency)?;
                finite("presence_penalty", presence)?;
                window("penalty_last_n", last_n)
            }
            Stage::Dry { multiplier, base, last_n, .. } => {
                at_least("dry_multiplier", multiplier, 0.0)?;
                at_least("dry_base", base, 1.0)?;
                window("dry_penalty_last_n", last_n)
            }
            Stage::TopNSigma { n } => finite("top_n_sigma", n),
            Stage::TypicalP { p, .. } => share("typical_p", p),
            Stage::TopP { p, .. } => share("top_p", p),
            Stage::MinP { p, .. } => share("min_p", p),
            Stage::Xtc { probability, threshold, .. } => {
                share("xtc_probability", probability)?;
                share("xtc_threshold", threshold)
            }
            Stage::Temperature { temperature, range, exponent } => {
                at_least("temperature", temperature, 0.0)?;
                at_least("dynatemp_range", range, 0.0)?;
                at_least("dynatemp_exponent", exponent, 0.0)
            }
            Stage::MirostatV2 { tau, eta } => {
                above_0("mirostat_tau", tau)?;
                at_least("mirostat_eta", eta, 0.0)
            }
            Stage::TopK { .. } | Stage::Greedy | Stage::Draw => Ok(()),
        }
    }

    fn is_off(&self) -> bool {
        match *self {
            Stage::Penalties { last_n, repetition, frequency, presence } => {
                last_n == 0 || (repetition == 1.0 && frequency == 0.0 && presence == 0.0)
            }
            Stage::Dry { multiplier, last_n, .. } => multiplier == 0.0 || last_n == 0,
            Stage::TopNSigma { n } => n <= 0.0,
            Stage::TopK { k } => k == 0,
            Stage::TypicalP { p, .. } | Stage::TopP { p, .. } => p == 1.0,
            Stage::MinP { p, .. } => p == 0.0,
            Stage::Xtc { probability, threshold, .. } => probability == 0.0 || threshold > 0.5,
            Stage::Temperature { temperature, range, .. } => temperature == 1.0 && range == 0.0,
            Stage::Greedy | Stage::Draw | Stage::MirostatV2 { .. } => false,
        }
    }

    fn is_end(&self) -> bool {
        matches!(self, Stage::Greedy | Stage::Draw | Stage::MirostatV2 { .. })
    }

    /// Tokens of the past that the stage looks at.
    fn last_n(&self) -> usize {
        match *self {
            Stage::Penalties { last_n, .. } | Stage::Dry { last_n, .. } => last_n as usize,
            _ => 0,
        }
    }
}

/// The values of all stages, and the seed. The defaults are llama.cpp's, but that DRY looks at 4096 tokens instead of the
/// whole context. See [`Stage`] for the fields.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerParams {
    /// 0 takes the largest logit and draws nothing.
    pub temperature: f32,
    pub dynatemp_range: f32,
    pub dynatemp_exponent: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub typical_p: f32,
    pub top_n_sigma: f32,
    pub xtc_probability: f32,
    pub xtc_threshold: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub penalty_last_n: u32,
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: u32,
    pub dry_penalty_last_n: u32,
    /// 2: the default chain is the temperature and Mirostat 2.0 alone. 0: it is not used.
    pub mirostat: u32,
    pub mirostat_tau: f32,
    pub mirostat_eta: f32,
    pub min_keep: u32,
    /// Start of the random sequence; every value is good.
    pub seed: u64,
}

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            temperature: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            top_n_sigma: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_last_n: 64,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 4096,
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            min_keep: 0,
            seed: 0,
        }
    }
}

impl SamplerParams {
    /// The default order, llama.cpp's.
    const ORDER: [StageKind; 9] = [
        StageKind::Penalties,
        StageKind::Dry,
        StageKind::TopNSigma,
        StageKind::TopK,
        StageKind::TypicalP,
        StageKind::TopP,
        StageKind::MinP,
        StageKind::Xtc,
        StageKind::Temperature,
    ];

    /// A stage with these values.
    pub fn stage(&self, kind: StageKind) -> Stage {
        let min_keep = self.min_keep;
        match kind {
            StageKind::Penalties => Stage::Penalties {
                last_n: self.penalty_last_n,
                repetition: self.repetition_penalty,
                frequency: self.frequency_penalty,
                presence: self.presence_penalty,
            },
            StageKind::Dry => Stage::Dry {
                multiplier: self.dry_multiplier,
                base: self.dry_base,
                allowed_length: self.dry_allowed_length,
                last_n: self.dry_penalty_last_n,
            },
            StageKind::TopNSigma => Stage::TopNSigma { n: self.top_n_sigma },
            StageKind::TopK => Stage::TopK { k: self.top_k },
            StageKind::TypicalP => Stage::TypicalP { p: self.typical_p, min_keep },
            StageKind::TopP => Stage::TopP { p: self.top_p, min_keep },
            StageKind::MinP => Stage::MinP { p: self.min_p, min_keep },
            StageKind::Xtc => Stage::Xtc { probability: self.xtc_probability, threshold: self.xtc_threshold, min_keep },
            StageKind::Temperature => Stage::Temperature {
                temperature: self.temperature,
                range: self.dynatemp_range,
                exponent: self.dynatemp_exponent,
            },
            StageKind::Greedy => Stage::Greedy,
            StageKind::Draw => Stage::Draw,
            StageKind::MirostatV2 => Stage::MirostatV2 { tau: self.mirostat_tau, eta: self.mirostat_eta },
        }
    }

    /// Checks the values of all stages, also of those that are off.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if self.mirostat != 0 && self.mirostat != 2 {
            return Err(invalid!("mirostat is {}, expected 0 or 2", self.mirostat));
        }
        StageKind::ALL.into_iter().try_for_each(|kind| self.stage(kind).validate())
    }
}

/// Samples tokens one at a time for one sequence. Sampling allocates nothing, unless there is a constraint: what adds to the
/// chain and `clone` do. A clone continues from the same point, independently.
#[derive(Debug)]
pub struct Sampler {
    n_vocab: usize,
    seed: u64,
    rng: Xoshiro256pp,
    constraint: Option<Box<Constraint>>,
    /// `[n_vocab]`, or empty.
    bias: Vec<f32>,
    stages: Vec<Stage>,
    breakers: Breakers,
    /// The last `window` tokens, oldest first.
    history: VecDeque<u32>,
    window: usize,
    /// Bound of the surprise in bits.
    mu: f64,
    candidates: Candidates,
    /// `[n_vocab]` if a stage looks at the past, else empty; zeros between uses.
    marks: Vec<u32>,
    /// DRY's scratch, with room for `window`.
    lengths: Vec<u32>,
}

impl Clone for Sampler {
    fn clone(&self) -> Self {
        // A clone of a vector drops its capacity, which the windows and the scratch need.
        let mut history = VecDeque::with_capacity(self.window);
        history.extend(&self.history);
        Sampler {
            rng: self.rng.clone(),
            constraint: self.constraint.clone(),
            bias: self.bias.clone(),
            stages: self.stages.clone(),
            breakers: self.breakers.clone(),
            history,
            candidates: Candidates::new(self.n_vocab).unwrap_or_else(|e| panic!("{e}")),
            marks: self.marks.clone(),
            lengths: Vec::with_capacity(self.lengths.capacity()),
            ..*self
        }
    }
}

impl Sampler {
    /// A chain without stages, for logits of length `n_vocab`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `n_vocab` is 0 or above 2^32 - 1; [`Error::OutOfMemory`].
    pub fn empty(n_vocab: usize, seed: u64) -> Result<Self> {
        if n_vocab == 0 || n_vocab > u32::MAX as usize {
            return Err(invalid!("n_vocab is {n_vocab}, expected from 1 to {}", u32::MAX));
        }
        Ok(Sampler {
            n_vocab,
            seed,
            rng: Xoshiro256pp::new(seed),
            constraint: None,
            bias: Vec::new(),
            stages: Vec::new(),
            breakers: Breakers::default(),
            history: VecDeque::new(),
            window: 0,
            mu: 0.0,
            candidates: Candidates::new(n_vocab)?,
            marks: Vec::new(),
            lengths: Vec::new(),
        })
    }

    /// The default chain: penalties, DRY, top-n-sigma, top-k, typical-p, top-p, min-p, XTC, temperature, and a draw.
    ///
    /// # Errors
    /// Those of [`SamplerParams::validate`] and [`Sampler::empty`].
    pub fn new(params: SamplerParams, n_vocab: usize) -> Result<Self> {
        params.validate()?;
        let mut sampler = Sampler::empty(n_vocab, params.seed)?;
        let kinds: &[StageKind] = match params.mirostat {
            2 => &[StageKind::Temperature, StageKind::MirostatV2],
            _ => &SamplerParams::ORDER,
        };
        kinds.iter().try_for_each(|&kind| sampler.push(params.stage(kind)))?;
        Ok(sampler)
    }

    /// Appends a stage. One that is off takes no time.
    ///
    /// # Errors
    /// Those of [`Stage::validate`]; [`Error::InvalidArgument`] after a stage that ends the chain, or past
    /// [`MAX_STAGES`]; [`Error::OutOfMemory`]. The chain is then what it was.
    pub fn push(&mut self, stage: Stage) -> Result<()> {
        stage.validate()?;
        if let Some(end) = self.stages.last().filter(|s| s.is_end()) {
            return Err(invalid!("the chain has ended with {end:?}, expected no stage after it"));
        }
        if self.stages.len() == MAX_STAGES {
            return Err(invalid!("the chain has {MAX_STAGES} stages, expected no more"));
        }
        if stage.is_off() {
            return Ok(());
        }
        let window = self.window.max(stage.last_n());
        if stage.last_n() > 0 {
            let what = "the sampler's window";
            let bytes = window * size_of::<u32>();
            self.history
                .try_reserve_exact(window - self.history.len())
                .and_then(|()| self.lengths.try_reserve_exact(window))
                .map_err(|_| Error::OutOfMemory { what, bytes })?;
            if self.marks.is_empty() {
                self.marks = zeros("the sampler's token counts", self.n_vocab)?;
            }
        }
        if let Stage::MirostatV2 { tau, .. } = stage {
            self.mu = 2.0 * f64::from(tau);
        }
        self.window = window;
        self.stages.push(stage);
        Ok(())
    }

    /// Adds to the logits of tokens, before all stages; -inf forbids one. Repeated biases of a token add up.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token that is not below `n_vocab` or a bias that is NaN or +inf, nothing being
    /// changed then; [`Error::OutOfMemory`].
    pub fn add_logit_bias(&mut self, biases: impl Iterator<Item = (i64, f32)> + Clone) -> Result<()> {
        for (token, bias) in biases.clone() {
            self.known(token)?;
            if bias.is_nan() || bias == f32::INFINITY {
                return Err(invalid!("the logit bias of token {token} is {bias}, expected a finite number or -inf"));
            }
        }
        if self.bias.is_empty() {
            let mut bias = reserve("the sampler's logit bias", self.n_vocab)?;
            bias.resize(self.n_vocab, 0.0);
            self.bias = bias;
        }
        for (token, bias) in biases {
            let sum = &mut self.bias[token as usize];
            *sum = (*sum + bias).min(f32::MAX);
        }
        Ok(())
    }

    /// Adds a sequence of tokens that no repetition reaches across, for all DRY stages. A breaker of one token is never
    /// penalized by them.
    pub fn add_dry_breaker(&mut self, tokens: &[u32]) -> Result<()> {
        self.breakers.add(tokens)
    }

    /// The same for a text, in all the ways in which tokens can spell it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a text that is empty or longer than 40 bytes.
    pub fn add_dry_breaker_text(&mut self, text: &str, tokenizer: &Tokenizer) -> Result<()> {
        let mut breakers = self.breakers.clone();
        breakers.add_text(text, tokenizer)?;
        self.breakers = breakers;
        Ok(())
    }

    /// Sets the constraint, which comes before all stages. It begins with the next token that is accepted, also within a text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is one.
    pub fn set_constraint(&mut self, constraint: Constraint) -> Result<()> {
        if self.constraint.is_some() {
            return Err(invalid!("the sampler has a constraint, expected none"));
        }
        self.constraint = Some(Box::new(constraint));
        Ok(())
    }

    /// Takes the constraint away; the text goes on freely.
    pub fn remove_constraint(&mut self) -> Option<Constraint> {
        self.constraint.take().map(|constraint| *constraint)
    }

    pub fn constraint_mut(&mut self) -> Option<&mut Constraint> {
        self.constraint.as_deref_mut()
    }

    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// Checks a token id from outside.
    pub(crate) fn known(&self, token: i64) -> Result<u32> {
        let known = u32::try_from(token).ok().filter(|&t| (t as usize) < self.n_vocab);
        known.ok_or_else(|| invalid!("token is {token}, expected 0 to {}", self.n_vocab - 1))
    }

    /// Chooses a token id below `n_vocab` from `logits`, `[n_vocab]`, unnormalised log-probabilities. Advances the random
    /// sequence by one draw, and one more for each XTC stage; a single candidate is taken without one. Does not remember
    /// the token: see [`Sampler::accept`].
    ///
    /// NaN counts as -inf, which is never chosen; +inf counts as the largest finite f32. Of equal logits the lower token
    /// id ranks first.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `logits` has another length than `n_vocab`, or if every logit that the constraint
    /// allows is, with its bias, -inf or NaN; [`Error::Unsupported`] if the constraint has grown beyond its limits. The
    /// sampler is then what it was.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        self.collect(logits, self.leading_k())?;
        Ok(self.choose(0))
    }

    /// What [`Sampler::sample`] chooses of the whole row, if the best tokens tell; else `None`, and nothing has happened.
    pub(crate) fn sample_top(&mut self, top: &Top) -> Option<u32> {
        if self.constraint.is_some() || !self.bias.is_empty() || top.tokens.is_empty() {
            return None;
        }
        let k = self.leading_k();
        if (1..=top.tokens.len()).contains(&k) {
            self.candidates.fill(top.tokens.iter().copied().zip(top.logits.iter().copied()), k);
            return Some(self.choose(0));
        }
        self.candidates.fill_top(top);
        let n_done = self.drop_others()?;
        Some(self.choose(n_done))
    }

    /// Runs stages on the best tokens until one drops all others, and says how many have been run. `None` if the best tokens do not tell
    /// what a stage does. Draws nothing.
    fn drop_others(&mut self) -> Option<usize> {
        for i in 0..self.stages.len() {
            let candidates = &mut self.candidates;
            if !candidates.has_others() {
                return Some(i);
            }
            match self.stages[i] {
                Stage::Penalties { .. } if self.history.is_empty() => {}
                Stage::Penalties { last_n, repetition, frequency, presence }
                    if repetition >= 1.0 && frequency >= 0.0 && presence >= 0.0 && !candidates.is_heated() =>
                {
                    let penalties = [repetition, frequency, presence].map(f64::from);
                    penalize(&self.history, last_n, &mut self.marks, penalties, |f| candidates.lower(f));
                }
                Stage::TopK { k } => candidates.top_k_of_all(k as usize),
                Stage::TopP { p, min_keep } => candidates.top_p_of_all(p.into(), min_keep as usize),
                Stage::MinP { p, min_keep } => candidates.min_p_of_all(p.into(), min_keep as usize),
                Stage::Temperature { temperature, range: 0.0, .. } => candidates.heat_all(temperature.into()),
                Stage::Greedy => candidates.top_k_of_all(1),
                _ => return None,
            }
            // These pass others on; what cuts and could not does not.
            let passes = match self.stages[i] {
                Stage::Penalties { .. } => true,
                Stage::Temperature { temperature, .. } => temperature > 0.0,
                _ => false,
            };
            if self.candidates.has_others() && !passes {
                return None;
            }
        }
        (!self.candidates.has_others()).then_some(self.stages.len())
    }

    /// Runs the chain but for its first stages on the candidates and draws.
    fn choose(&mut self, n_done: usize) -> u32 {
        self.run_stages(n_done);
        match self.stages.last() {
            Some(Stage::Greedy) => {
                self.candidates.keep_best();
                self.candidates.draw(&mut self.rng).0
            }
            Some(&Stage::MirostatV2 { tau, eta }) => {
                self.candidates.at_most_as_surprising(self.mu);
                let (token, surprise) = self.candidates.draw(&mut self.rng);
                self.mu -= f64::from(eta) * (surprise - f64::from(tau));
                token
            }
            _ => self.candidates.draw(&mut self.rng).0,
        }
    }

    /// The tokens that the chain leaves before its end, each with its logit over the temperatures, in no order that means
    /// anything. XTC draws as it does in [`Sampler::sample`].
    ///
    /// # Errors
    /// Those of [`Sampler::sample`].
    pub fn candidates(&mut self, logits: &[f32]) -> Result<impl Iterator<Item = (u32, f64)>> {
        let k = match self.active().next() {
            Some(&Stage::TopK { k }) => k as usize,
            _ => 0,
        };
        self.collect(logits, k)?;
        self.run_stages(0);
        Ok(self.candidates.iter())
    }

    /// Constraint and bias; `k` as in [`Candidates::fill`].
    fn collect(&mut self, logits: &[f32], k: usize) -> Result<()> {
        if logits.len() != self.n_vocab {
            return Err(invalid!("logits has {} elements, expected n_vocab = {}", logits.len(), self.n_vocab));
        }
        let biased = logits.iter().enumerate().map(|(id, &l)| match self.bias.get(id) {
            Some(bias) => (id as u32, l + bias),
            None => (id as u32, l),
        });
        match &mut self.constraint {
            Some(constraint) => {
                let allowed = constraint.allowed()?;
                self.candidates.fill(biased.filter(|&(id, _)| allowed(id)), k);
            }
            None => self.candidates.fill(biased, k),
        }
        if self.candidates.len() == 0 {
            return Err(nothing_left());
        }
        Ok(())
    }

    /// The stages that change anything now.
    fn active(&self) -> impl Iterator<Item = &Stage> + Clone {
        self.stages.iter().filter(move |s| !matches!(s, Stage::Penalties { .. }) || !self.history.is_empty())
    }

    /// How many of the best candidates the choice depends on; 0 if on all of them. Most chains begin with top-k: what it drops need
    /// not be collected. Nor need anything but the best token, where it alone is taken and no stage before drops it.
    fn leading_k(&self) -> usize {
        let keeps_best = |s: &Stage| {
            matches!(s, Stage::TopK { .. } | Stage::TopNSigma { .. } | Stage::TopP { .. } | Stage::MinP { .. })
        };
        let mut active = self.active();
        match active.clone().find(|s| !keeps_best(s)) {
            Some(Stage::Greedy | Stage::Temperature { temperature: 0.0, range: 0.0, .. }) => 1,
            _ => match active.next() {
                Some(&Stage::TopK { k }) => k as usize,
                _ => 0,
            },
        }
    }

    fn run_stages(&mut self, n_done: usize) {
        let candidates = &mut self.candidates;
        for &stage in &self.stages[n_done..] {
            match stage {
                Stage::Penalties { .. } if self.history.is_empty() => {}
                Stage::Penalties { last_n, repetition, frequency, presence } => {
                    let penalties = [repetition, frequency, presence].map(f64::from);
                    penalize(&self.history, last_n, &mut self.marks, penalties, |f| candidates.edit(f));
                }
                Stage::Dry { multiplier, base, allowed_length, last_n } => {
                    let dry = Dry { multiplier, base, allowed_length, last_n };
                    dry.apply(candidates, &self.history, &self.breakers, &mut self.marks, &mut self.lengths);
                }
                Stage::TopNSigma { n } => candidates.top_n_sigma(n.into()),
                Stage::TopK { k } => candidates.top_k(k as usize),
                Stage::TypicalP { p, min_keep } => candidates.typical_p(p.into(), min_keep as usize),
                Stage::TopP { p, min_keep } => candidates.top_p(p.into(), min_keep as usize),
                Stage::MinP { p, min_keep } => candidates.min_p(p.into(), min_keep as usize),
                Stage::Xtc { probability, threshold, min_keep } => {
                    if self.rng.uniform() < f64::from(probability) {
                        candidates.exclude_top(threshold.into(), min_keep as usize);
                    }
                }
                Stage::Temperature { temperature, range: 0.0, .. } => candidates.heat(temperature.into()),
                Stage::Temperature { temperature, range, exponent } => {
                    let [temperature, range] = [temperature, range].map(f64::from);
                    candidates.heat_by_entropy((temperature - range).max(0.0), temperature + range, exponent.into());
                }
                Stage::Greedy | Stage::Draw | Stage::MirostatV2 { .. } => {}
            }
        }
    }

    /// Tells the constraint, the penalties and DRY of a token that has become part of the text, usually that of
    /// [`Sampler::sample`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token that the constraint does not allow here, nothing being changed then.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token)?;
        }
        self.accept_prompt(token);
        Ok(())
    }

    /// Tells the penalties and DRY, and not the constraint, of a token that stands before the text. A token that is not
    /// below `n_vocab` takes its place in the window and penalizes nothing.
    pub fn accept_prompt(&mut self, token: u32) {
        if self.window > 0 {
            if self.history.len() == self.window {
                self.history.pop_front();
            }
            self.history.push_back(token);
        }
    }

    /// Back to the start of the seed's random sequence, of the constraint and of Mirostat, with nothing accepted.
    pub fn reset(&mut self) {
        self.rng = Xoshiro256pp::new(self.seed);
        self.history.clear();
        if let Some(constraint) = &mut self.constraint {
            constraint.reset();
        }
        if let Some(Stage::MirostatV2 { tau, .. }) = self.stages.last() {
            self.mu = 2.0 * f64::from(*tau);
        }
    }
}

/// [`Stage::Penalties`]: has `edit` change logits by what it is given. `marks` are zeros before and afterwards.
fn penalize(
    history: &VecDeque<u32>,
    last_n: u32,
    marks: &mut [u32],
    [repetition, frequency, presence]: [f64; 3],
    edit: impl FnOnce(&dyn Fn(u32, f64) -> f64),
) {
    let skip = history.len().saturating_sub(last_n as usize);
    let recent = || history.range(skip..).map(|&t| t as usize);
    recent().for_each(|t| marks.get_mut(t).into_iter().for_each(|m| *m += 1));
    edit(&|token, logit| match marks[token as usize] {
        0 => logit,
        count => {
            let logit = if logit <= 0.0 { logit * repetition } else { logit / repetition };
            logit - (f64::from(count) * frequency + presence)
        }
    });
    recent().for_each(|t| marks.get_mut(t).into_iter().for_each(|m| *m = 0));
}

fn nothing_left() -> Error {
    invalid!("logits has no finite element left to sample, expected at least one")
}

fn reserve<T>(what: &'static str, n: usize) -> Result<Vec<T>> {
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| Error::OutOfMemory { what, bytes: n.saturating_mul(size_of::<T>()) })?;
    Ok(v)
}

fn zeros(what: &'static str, n: usize) -> Result<Vec<u32>> {
    let mut v = reserve(what, n)?;
    v.resize(n, 0);
    Ok(v)
}

#[cfg(test)]
mod tests;
