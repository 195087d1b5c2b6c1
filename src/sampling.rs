//! Choosing the next token from a model's logits.
//!
//! The stages and their order are those of llama.cpp's default chain: penalties, top-k, top-p, min-p, temperature,
//! then one random draw. Top-p and min-p therefore see the distribution at temperature 1. Arithmetic after the
//! penalties is in f64 and uses only operations that IEEE 754 defines exactly, so that the same logits, parameters and
//! seed give the same tokens on every machine.

use crate::error::{Error, Result, invalid};

/// The largest [`SamplerParams::penalty_last_n`].
pub const MAX_PENALTY_LAST_N: u32 = 1 << 20;

/// What a [`Sampler`] does to the logits before it draws. The defaults are llama.cpp's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerParams {
    /// Divides the logits before the draw; finite and at least 0. 0 takes the largest logit and draws nothing.
    pub temperature: f32,
    /// Keeps this many tokens of largest logit (Fan et al. 2018, arXiv:1805.04833). 0 keeps all.
    pub top_k: u32,
    /// Keeps the shortest run of most probable tokens whose probabilities sum to at least this, always one (nucleus
    /// sampling, Holtzman et al. 2019, arXiv:1904.09751); from 0 to 1. 1 keeps all.
    pub top_p: f32,
    /// Keeps the tokens whose probability is at least this fraction of the largest (Nguyen et al. 2024,
    /// arXiv:2407.01082); from 0 to 1. 0 keeps all.
    pub min_p: f32,
    /// Positive logits of tokens in the window are divided by this, the others multiplied (after Keskar et al. 2019,
    /// arXiv:1909.05858); finite and above 0. 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit once for each time it occurs in the window; finite. 0 changes nothing.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit once if it occurs in the window; finite. 0 changes nothing.
    pub presence_penalty: f32,
    /// Length of the penalties' window in tokens, at most [`MAX_PENALTY_LAST_N`]: the last tokens passed to
    /// [`Sampler::accept`]. 0 turns all penalties off.
    pub penalty_last_n: u32,
    /// Start of the random sequence; every value is good.
    pub seed: u64,
}

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplerParams {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let check = |field: &str, value: f32, good: bool, expected: &str| {
            if good { Ok(()) } else { Err(invalid!("{field} is {value}, expected {expected}")) }
        };
        let SamplerParams { temperature: t, top_p, min_p, repetition_penalty: r, .. } = *self;
        check("temperature", t, t.is_finite() && t >= 0.0, "a finite number of at least 0")?;
        check("top_p", top_p, (0.0..=1.0).contains(&top_p), "a number from 0 to 1")?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "a number from 0 to 1")?;
        check("repetition_penalty", r, r.is_finite() && r > 0.0, "a finite number above 0")?;
        for (field, value) in
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)]
        {
            check(field, value, value.is_finite(), "a finite number")?;
        }
        if self.penalty_last_n > MAX_PENALTY_LAST_N {
            return Err(invalid!("penalty_last_n is {}, expected at most {MAX_PENALTY_LAST_N}", self.penalty_last_n));
        }
        Ok(())
    }

    fn penalizes(&self) -> bool {
        self.penalty_last_n > 0
            && (self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0)
    }
}

/// Samples tokens one at a time for one sequence. All memory is allocated by [`Sampler::new`] and by `clone`; a clone
/// continues from the same point, independently.
#[derive(Debug)]
pub struct Sampler {
    params: SamplerParams,
    n_vocab: usize,
    /// How many candidates the top-k stage leaves; `n_vocab` if it is off.
    k: usize,
    rng: Xoshiro256pp,
    /// Occurrences in the window of each token; empty if no penalty is on.
    counts: Vec<u32>,
    /// The window, a ring: `window[next]` is the oldest token once `filled` is its length.
    window: Vec<u32>,
    next: usize,
    filled: usize,
    /// The tokens still in play, at most `room` of them, as [`rank`]s.
    candidates: Vec<u64>,
    weights: Vec<f64>,
    room: usize,
}

impl Clone for Sampler {
    fn clone(&self) -> Self {
        Sampler {
            counts: self.counts.clone(),
            window: self.window.clone(),
            // Scratch: a clone needs its capacity, which `Vec::clone` drops, and not its content.
            candidates: Vec::with_capacity(self.room),
            weights: Vec::with_capacity(self.room),
            rng: self.rng.clone(),
            ..*self
        }
    }
}

impl Sampler {
    /// A sampler for logits of length `n_vocab`, with an empty window.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a parameter is out of range, or `n_vocab` is 0 or above 2^32 - 1;
    /// [`Error::OutOfMemory`].
    pub fn new(params: SamplerParams, n_vocab: usize) -> Result<Self> {
        params.validate()?;
        if n_vocab == 0 || n_vocab > u32::MAX as usize {
            return Err(invalid!("n_vocab is {n_vocab}, expected from 1 to {}", u32::MAX));
        }
        // Greedy sampling is top-k of 1: no later stage drops the best candidate.
        let k = if params.temperature == 0.0 { 1 } else { params.top_k as usize };
        let k = if k == 0 { n_vocab } else { k.min(n_vocab) };
        // Twice k makes the selections that `collect` repeats cost O(1) a token; the 1024 make them rare for small k.
        let room = n_vocab.min(k.saturating_mul(2).max(1024));
        let (n_counts, n_window) = if params.penalizes() { (n_vocab, params.penalty_last_n as usize) } else { (0, 0) };
        Ok(Sampler {
            params,
            n_vocab,
            k,
            rng: Xoshiro256pp::new(params.seed),
            counts: zeros("the sampler's token counts", n_counts)?,
            window: zeros("the sampler's penalties window", n_window)?,
            next: 0,
            filled: 0,
            candidates: reserve("the sampler's candidates", room)?,
            weights: reserve("the sampler's weights", room)?,
            room,
        })
    }

    /// The parameters that the sampler was built with.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// Chooses a token id below `n_vocab` from `logits`, `[n_vocab]`, unnormalised log-probabilities. Advances the
    /// random sequence by one draw (at temperature 0, and on an error, by none). Does not put the token into the
    /// window: see [`Sampler::accept`].
    ///
    /// NaN counts as -inf, which is never chosen; +inf counts as the largest finite f32. Of equal logits the lower
    /// token id ranks first.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `logits` has another length than `n_vocab`, or if every logit, after the
    /// penalties, is -inf or NaN.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        self.filter(logits)?;
        if self.params.temperature == 0.0 {
            return Ok(token(self.candidates[0]));
        }
        let temperature = f64::from(self.params.temperature);
        let max = logit(self.best());
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|&c| exp((logit(c) - max) / temperature)));
        let total: f64 = self.weights.iter().sum();
        let target = self.rng.uniform() * total;
        let (mut sum, mut chosen) = (0.0, 0);
        for (i, &weight) in self.weights.iter().enumerate() {
            if weight > 0.0 {
                chosen = i; // remembered because `target` may have been rounded up to `total`
            }
            sum += weight;
            if target < sum {
                break;
            }
        }
        Ok(token(self.candidates[chosen]))
    }

    /// Appends `token` to the penalties' window, dropping the oldest token of a full one. Prompt tokens may be passed
    /// too. A token that is not below `n_vocab` takes its place in the window and penalizes nothing.
    pub fn accept(&mut self, token: u32) {
        if self.window.is_empty() {
            return;
        }
        let oldest = std::mem::replace(&mut self.window[self.next], token);
        if self.filled == self.window.len() {
            if let Some(count) = self.counts.get_mut(oldest as usize) {
                *count -= 1;
            }
        } else {
            self.filled += 1;
        }
        self.next = (self.next + 1) % self.window.len();
        if let Some(count) = self.counts.get_mut(token as usize) {
            *count += 1;
        }
    }

    /// Back to the state after [`Sampler::new`]: the start of the seed's random sequence and an empty window.
    pub fn reset(&mut self) {
        self.rng = Xoshiro256pp::new(self.params.seed);
        self.counts.fill(0);
        (self.next, self.filled) = (0, 0);
    }

    /// All stages before the temperature. Leaves at least one candidate; the best comes first if top-k or top-p ran.
    fn filter(&mut self, logits: &[f32]) -> Result<()> {
        if logits.len() != self.n_vocab {
            return Err(invalid!("logits has {} elements, expected n_vocab = {}", logits.len(), self.n_vocab));
        }
        self.collect(logits);
        if self.candidates.is_empty() {
            return Err(invalid!("logits has no finite element left to sample, expected at least one"));
        }
        self.top_p();
        self.min_p();
        Ok(())
    }

    /// Penalties and top-k in one pass over the logits: the candidates with room for at least 2k are cut back to the
    /// best k whenever they fill up, and from then on only what beats the k-th enters.
    fn collect(&mut self, logits: &[f32]) {
        let SamplerParams { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.params;
        let candidates = &mut self.candidates;
        candidates.clear();
        let mut bound = u64::MAX;
        for (id, &raw) in logits.iter().enumerate() {
            let mut logit = raw;
            if let Some(&count) = self.counts.get(id).filter(|&&count| count > 0) {
                logit = if logit <= 0.0 { logit * repetition_penalty } else { logit / repetition_penalty };
                logit -= count as f32 * frequency_penalty + presence_penalty;
            }
            if logit.is_nan() || logit == f32::NEG_INFINITY {
                continue;
            }
            let rank = rank(logit.min(f32::MAX), id as u32);
            if rank < bound {
                candidates.push(rank);
                if candidates.len() == self.room && self.k < self.room {
                    bound = *candidates.select_nth_unstable(self.k - 1).1;
                    candidates.truncate(self.k);
                }
            }
        }
        if self.k < self.n_vocab {
            if candidates.len() > self.k {
                candidates.select_nth_unstable(self.k - 1);
                candidates.truncate(self.k);
            }
            // The draw depends on the order, which a selection leaves to the standard library's version.
            candidates.sort_unstable();
        }
    }

    fn top_p(&mut self) {
        if self.params.top_p >= 1.0 {
            return;
        }
        let max = logit(self.best());
        let weight = |c: u64| exp(logit(c) - max);
        let target = f64::from(self.params.top_p) * self.candidates.iter().map(|&c| weight(c)).sum::<f64>();
        let n = self.candidates.len();
        let mut sorted = if self.k < self.n_vocab { n } else { 0 };
        let mut sum = 0.0;
        for i in 0..n {
            if i == sorted {
                // Usually a few hundred tokens hold the mass, so sort only as far as the sum has got.
                sorted = n.min(i.saturating_mul(8).max(256));
                let rest = &mut self.candidates[i..];
                let prefix = sorted - i;
                if prefix < rest.len() {
                    rest.select_nth_unstable(prefix - 1);
                }
                rest[..prefix].sort_unstable();
            }
            sum += weight(self.candidates[i]);
            if sum >= target {
                self.candidates.truncate(i + 1);
                break;
            }
        }
    }

    fn min_p(&mut self) {
        if self.params.min_p <= 0.0 {
            return;
        }
        let max = logit(self.best());
        let min_p = f64::from(self.params.min_p);
        self.candidates.retain(|&c| exp(logit(c) - max) >= min_p);
    }

    /// The best candidate; there is one wherever this is called.
    fn best(&self) -> u64 {
        self.candidates.iter().copied().min().unwrap_or(u64::MAX)
    }
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

/// A logit (not NaN) and its token as one integer, smaller for the larger logit and, of equal ones, for the lower id.
/// Comparing integers is what makes selection over a whole vocabulary cheap.
fn rank(logit: f32, token: u32) -> u64 {
    let bits = (logit + 0.0).to_bits(); // + 0.0 turns -0 into 0, its equal
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(token)
}

fn logit(rank: u64) -> f64 {
    let ascending = !(rank >> 32) as u32;
    let bits = if ascending >> 31 == 1 { ascending ^ 1 << 31 } else { !ascending };
    f64::from(f32::from_bits(bits))
}

fn token(rank: u64) -> u32 {
    rank as u32
}

/// e^x for x <= 0, to about 2 ulp; 0 below -708. The system's `exp` differs in the last bit between platforms (and
/// glibc's between CPUs), which would let one seed mean two sequences; additions and multiplications do not.
fn exp(x: f64) -> f64 {
    // ln 2 in two parts (from fdlibm): the high one has trailing zeros enough to make `k * LN2_HIGH` exact.
    const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    if x < -708.0 {
        return 0.0;
    }
    // x = k ln 2 + r with |r| <= ln(2) / 2, where 14 terms of the Taylor series leave an error below 1e-17.
    let k = (x * std::f64::consts::LOG2_E - 0.5) as i32;
    let r = (x - f64::from(k) * LN2_HIGH) - f64::from(k) * LN2_LOW;
    let mut sum = 1.0;
    for n in (1..=13).rev() {
        sum = 1.0 + sum * r * const { reciprocals() }[n];
    }
    sum * f64::from_bits(((k + 1023) as u64) << 52)
}

const fn reciprocals() -> [f64; 14] {
    let mut r = [1.0; 14];
    let mut n = 1;
    while n < 14 {
        r[n] = 1.0 / n as f64;
        n += 1;
    }
    r
}

/// xoshiro256++ 1.0 (Blackman and Vigna 2021, arXiv:1805.01407), its state filled by splitmix64 as its authors advise.
#[derive(Debug, Clone)]
struct Xoshiro256pp([u64; 4]);

impl Xoshiro256pp {
    fn new(seed: u64) -> Self {
        let mut x = seed;
        Xoshiro256pp(std::array::from_fn(|_| {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }))
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let out = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        out
    }

    /// A multiple of 2^-53 in [0, 1).
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every stage off.
    const PLAIN: SamplerParams = SamplerParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        penalty_last_n: 0,
        seed: 1,
    };

    fn sampler(params: SamplerParams, n_vocab: usize) -> Sampler {
        Sampler::new(params, n_vocab).unwrap()
    }

    /// Roughly normal logits of standard deviation `scale`; rounded to multiples of 1/2 if `ties`.
    fn random_logits(rng: &mut Xoshiro256pp, n: usize, scale: f64, ties: bool) -> Vec<f32> {
        (0..n)
            .map(|_| {
                let x = ((0..12).map(|_| rng.uniform()).sum::<f64>() - 6.0) * scale;
                (if ties { (x * 2.0).round() / 2.0 } else { x }) as f32
            })
            .collect()
    }

    /// The stages by their definitions: the tokens left, best first, each with its probability in the draw.
    fn oracle(p: &SamplerParams, history: &[u32], logits: &[f32]) -> Vec<(u32, f64)> {
        let window = &history[history.len().saturating_sub(p.penalty_last_n as usize)..];
        let mut left: Vec<(u32, f64)> = Vec::new();
        for (id, &l) in logits.iter().enumerate() {
            let count = window.iter().filter(|&&t| t as usize == id).count();
            let mut l = l;
            if count > 0 {
                l = if l <= 0.0 { l * p.repetition_penalty } else { l / p.repetition_penalty };
                l -= count as f32 * p.frequency_penalty + p.presence_penalty;
            }
            if l > f32::NEG_INFINITY {
                left.push((id as u32, f64::from(l)));
            }
        }
        left.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        if p.top_k > 0 {
            left.truncate(p.top_k as usize);
        }
        let max = left[0].1;
        let total: f64 = left.iter().map(|c| (c.1 - max).exp()).sum();
        let mut sum = 0.0;
        let mut n = 0;
        while n < left.len() {
            sum += (left[n].1 - max).exp();
            n += 1;
            if p.top_p < 1.0 && sum >= f64::from(p.top_p) * total {
                break;
            }
        }
        left.truncate(n);
        left.retain(|c| p.min_p == 0.0 || (c.1 - max).exp() >= f64::from(p.min_p));
        for c in &mut left {
            c.1 = ((c.1 - max) / f64::from(p.temperature)).exp();
        }
        let total: f64 = left.iter().map(|c| c.1).sum();
        left.iter().map(|c| (c.0, c.1 / total)).collect()
    }

    /// What the sampler would draw from, in the oracle's form.
    fn distribution(s: &mut Sampler, logits: &[f32]) -> Vec<(u32, f64)> {
        s.clone().sample(logits).unwrap();
        s.sample(logits).unwrap();
        let total: f64 = s.weights.iter().sum();
        let mut both: Vec<(u64, f64)> = s.candidates.iter().zip(&s.weights).map(|(&c, &w)| (c, w / total)).collect();
        both.sort_by_key(|c| c.0);
        both.iter().map(|c| (token(c.0), c.1)).collect()
    }

    #[test]
    fn stages_match_the_oracle() {
        let mut rng = Xoshiro256pp::new(7);
        let stages = [
            PLAIN,
            SamplerParams { temperature: 0.3, ..PLAIN },
            SamplerParams { temperature: 2.5, ..PLAIN },
            SamplerParams { top_k: 1, ..PLAIN },
            SamplerParams { top_k: 40, ..PLAIN },
            SamplerParams { top_k: 2000, ..PLAIN },
            SamplerParams { top_k: u32::MAX, ..PLAIN },
            SamplerParams { top_p: 0.0, ..PLAIN },
            SamplerParams { top_p: 0.5, ..PLAIN },
            SamplerParams { top_p: 0.99, ..PLAIN },
            SamplerParams { min_p: 0.05, ..PLAIN },
            SamplerParams { min_p: 1.0, ..PLAIN },
            SamplerParams { repetition_penalty: 1.3, penalty_last_n: 16, ..PLAIN },
            SamplerParams { frequency_penalty: 0.7, penalty_last_n: 16, ..PLAIN },
            SamplerParams { presence_penalty: -0.7, penalty_last_n: 16, ..PLAIN },
            SamplerParams { repetition_penalty: 1.2, frequency_penalty: 0.1, ..Default::default() },
            SamplerParams { presence_penalty: 0.5, penalty_last_n: 1000, top_k: 0, ..Default::default() },
        ];
        for (case, &params) in stages.iter().enumerate() {
            for n in [1, 2, 3, 50, 1023, 1024, 1025, 5000] {
                for ties in [false, true] {
                    for scale in [0.0, 0.5, 4.0] {
                        let mut s = sampler(params, n);
                        let history: Vec<u32> = (0..100).map(|_| (rng.next() % n.min(60) as u64) as u32).collect();
                        history.iter().for_each(|&t| s.accept(t));
                        let logits = random_logits(&mut rng, n, scale, ties);
                        let (want, got) = (oracle(&params, &history, &logits), distribution(&mut s, &logits));
                        let at = format!("case {case}, n {n}, ties {ties}, scale {scale}");
                        assert_eq!(want.len(), got.len(), "{at}");
                        for (w, g) in want.iter().zip(&got) {
                            assert_eq!(w.0, g.0, "{at}");
                            assert!((w.1 - g.1).abs() <= 1e-13 * w.1, "{at}: {w:?} {g:?}");
                        }
                    }
                }
            }
        }
    }

    /// Rising logits cut the candidates back as often as can be, falling ones never after the first time.
    #[test]
    fn top_k_of_sorted_logits() {
        for n in [3000, 4096] {
            let rising: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let falling: Vec<f32> = rising.iter().rev().copied().collect();
            for top_k in [1, 40, 511, 512, 513, 1500, 2999] {
                let mut s = sampler(SamplerParams { top_k, ..PLAIN }, n);
                s.filter(&rising).unwrap();
                assert!(s.candidates.iter().map(|&c| token(c)).eq((n as u32 - top_k..n as u32).rev()));
                s.filter(&falling).unwrap();
                assert!(s.candidates.iter().map(|&c| token(c)).eq(0..top_k));
                assert!(s.candidates.len() <= s.room);
            }
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        let mut rng = Xoshiro256pp::new(3);
        for params in [
            PLAIN,
            SamplerParams { temperature: 0.5, top_k: 10, ..PLAIN },
            SamplerParams { temperature: 1.7, top_p: 0.9, min_p: 0.02, ..PLAIN },
        ] {
            let logits = random_logits(&mut rng, 30, 1.0, false);
            let want = oracle(&params, &[], &logits);
            let mut s = sampler(params, 30);
            let draws = 200_000;
            let mut seen = [0u32; 30];
            for _ in 0..draws {
                seen[s.sample(&logits).unwrap() as usize] += 1;
            }
            let chi_square: f64 = want
                .iter()
                .map(|&(id, p)| {
                    let expected = p * f64::from(draws);
                    (f64::from(std::mem::take(&mut seen[id as usize])) - expected).powi(2) / expected
                })
                .sum();
            assert_eq!(seen, [0; 30], "a token outside the candidates was drawn");
            // Mean plus four standard deviations of the chi-square distribution.
            let freedom = (want.len() - 1) as f64;
            assert!(chi_square < freedom + 4.0 * (2.0 * freedom).sqrt(), "{chi_square} with {freedom} degrees");
        }
    }

    #[test]
    fn a_seed_fixes_the_sequence() {
        let mut rng = Xoshiro256pp::new(5);
        let params = SamplerParams { frequency_penalty: 0.3, temperature: 1.5, ..Default::default() };
        let steps: Vec<Vec<f32>> = (0..50).map(|_| random_logits(&mut rng, 500, 1.0, false)).collect();
        let run = |s: &mut Sampler| -> Vec<u32> {
            steps
                .iter()
                .map(|logits| {
                    let t = s.sample(logits).unwrap();
                    s.accept(t);
                    t
                })
                .collect()
        };
        let mut s = sampler(params, 500);
        let first = run(&mut s);
        let mut fork = s.clone();
        let second = run(&mut s);
        assert_eq!(run(&mut fork), second);
        assert_ne!(first, second);
        s.reset();
        assert_eq!(run(&mut s), first);
        assert_eq!(run(&mut sampler(params, 500)), first);
        assert_ne!(run(&mut sampler(SamplerParams { seed: 1, ..params }, 500)), first);
    }

    /// Recorded once: a change here changes what every user's seed means.
    #[test]
    fn the_sequence_never_changes() {
        let logits: Vec<f32> = (0..100).map(|i| (i * 37 % 100) as f32 / 25.0).collect();
        let draw = |params| -> Vec<u32> {
            let mut s = sampler(params, 100);
            (0..8).map(|_| s.sample(&logits).unwrap()).collect()
        };
        assert_eq!(draw(PLAIN), [81, 75, 10, 75, 18, 58, 97, 53]);
        assert_eq!(draw(SamplerParams { seed: 42, ..Default::default() }), [21, 89, 45, 86, 94, 78, 81, 5]);
    }

    #[test]
    fn penalties_as_in_llama_cpp() {
        let params = SamplerParams {
            repetition_penalty: 2.0,
            frequency_penalty: 0.25,
            presence_penalty: 0.5,
            penalty_last_n: 4,
            ..PLAIN
        };
        let mut s = sampler(params, 5);
        let mut after = |accepted: &[u32]| -> Vec<f64> {
            accepted.iter().for_each(|&t| s.accept(t));
            s.filter(&[3.0, -3.0, 0.0, 1.0, 1.0]).unwrap();
            s.candidates.iter().map(|&c| logit(c)).collect()
        };
        assert_eq!(after(&[]), [3.0, -3.0, 0.0, 1.0, 1.0]);
        assert_eq!(after(&[0, 1, 1]), [1.5 - 0.75, -6.0 - 1.0, 0.0, 1.0, 1.0]);
        assert_eq!(after(&[2, 2]), [3.0, -6.0 - 1.0, -1.0, 1.0, 1.0], "token 0 left the window");
        assert_eq!(after(&[3, 3, 3, 3]), [3.0, -3.0, 0.0, 0.5 - 1.5, 1.0]);
        assert_eq!(after(&[u32::MAX, 9, 9]), [3.0, -3.0, 0.0, 0.5 - 0.75, 1.0], "unknown tokens fill the window");
        s.reset();
        s.filter(&[1.0; 5]).unwrap();
        assert!(s.candidates.iter().all(|&c| logit(c) == 1.0));
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut s = sampler(SamplerParams { temperature: 0.0, top_p: 0.1, min_p: 0.9, ..PLAIN }, 4);
        let rng = s.rng.0;
        assert_eq!(s.sample(&[1.0, 2.0, 2.0, f32::NAN]).unwrap(), 1);
        assert_eq!(s.sample(&[-0.0, 0.0, -1.0, 0.0]).unwrap(), 0);
        assert_eq!(s.sample(&[f32::NEG_INFINITY, -f32::MAX, f32::NAN, -f32::MAX]).unwrap(), 1);
        assert_eq!(s.sample(&[1.0, f32::MAX, f32::INFINITY, f32::INFINITY]).unwrap(), 1);
        assert_eq!(s.rng.0, rng, "greedy sampling draws nothing");
    }

    #[test]
    fn extreme_values() {
        let wild = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, 1e-45, -88.0, 3.0];
        let mut rng = Xoshiro256pp::new(11);
        let choose = |rng: &mut Xoshiro256pp, values: &[f32]| values[(rng.next() % values.len() as u64) as usize];
        for _ in 0..5000 {
            let params = SamplerParams {
                temperature: choose(&mut rng, &[0.0, f32::MIN_POSITIVE, 1e-45, 1.0, f32::MAX]),
                top_k: choose(&mut rng, &[0.0, 1.0, 2.0, 1e9]) as u32,
                top_p: choose(&mut rng, &[0.0, 1e-45, 0.5, 1.0]),
                min_p: choose(&mut rng, &[0.0, 1e-45, 0.5, 1.0]),
                repetition_penalty: choose(&mut rng, &[1e-45, 1.0, f32::MAX]),
                frequency_penalty: choose(&mut rng, &[0.0, f32::MIN, f32::MAX, -1.0]),
                presence_penalty: choose(&mut rng, &[0.0, f32::MIN, f32::MAX, -1.0]),
                penalty_last_n: choose(&mut rng, &[0.0, 1.0, 3.0]) as u32,
                seed: rng.next(),
            };
            let n = 1 + (rng.next() % 6) as usize;
            let mut s = sampler(params, n);
            for _ in 0..4 {
                s.accept((rng.next() % 4) as u32);
            }
            let logits: Vec<f32> = (0..n).map(|_| choose(&mut rng, &wild)).collect();
            let usable = |l: f32| !l.is_nan() && l != f32::NEG_INFINITY;
            let before = s.rng.0;
            match s.sample(&logits) {
                Ok(t) => assert!(usable(logits[t as usize]), "{t} of {logits:?} with {params:?}"),
                Err(e) => {
                    assert!(params.penalizes() || !logits.iter().any(|&l| usable(l)), "{e}: {logits:?}");
                    assert_eq!(s.rng.0, before);
                }
            }
        }
    }

    #[test]
    fn refusals_name_the_field() {
        let bad = [
            ("temperature is -1, ", SamplerParams { temperature: -1.0, ..PLAIN }),
            ("temperature is NaN, ", SamplerParams { temperature: f32::NAN, ..PLAIN }),
            ("temperature is inf, ", SamplerParams { temperature: f32::INFINITY, ..PLAIN }),
            ("top_p is 1.5, ", SamplerParams { top_p: 1.5, ..PLAIN }),
            ("min_p is -0.5, ", SamplerParams { min_p: -0.5, ..PLAIN }),
            ("repetition_penalty is 0, ", SamplerParams { repetition_penalty: 0.0, ..PLAIN }),
            ("frequency_penalty is NaN, ", SamplerParams { frequency_penalty: f32::NAN, ..PLAIN }),
            ("presence_penalty is -inf, ", SamplerParams { presence_penalty: f32::NEG_INFINITY, ..PLAIN }),
            ("penalty_last_n is 4294967295, ", SamplerParams { penalty_last_n: u32::MAX, ..PLAIN }),
        ];
        for (start, params) in bad {
            let message = Sampler::new(params, 10).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
        SamplerParams::default().validate().unwrap();
        assert!(Sampler::new(PLAIN, 0).unwrap_err().to_string().starts_with("n_vocab is 0, "));
        let mut s = sampler(PLAIN, 3);
        assert!(
            s.sample(&[0.0; 2]).unwrap_err().to_string().starts_with("logits has 2 elements, expected n_vocab = 3")
        );
        for nothing in [f32::NAN, f32::NEG_INFINITY] {
            assert!(s.sample(&[nothing; 3]).unwrap_err().to_string().starts_with("logits has no finite element"));
        }
        assert!(s.sample(&[0.0; 3]).is_ok(), "a refusal leaves the sampler usable");
    }

    #[test]
    fn ranks_order_and_decode() {
        let logits = [f32::MAX, 2.0, 1e-45, 0.0, -1e-45, -2.0, f32::MIN];
        for pair in logits.windows(2) {
            assert!(rank(pair[0], 9) < rank(pair[1], 1));
        }
        for l in logits {
            assert!(rank(l, 3) < rank(l, 4));
            assert_eq!((logit(rank(l, u32::MAX)), token(rank(l, u32::MAX))), (f64::from(l), u32::MAX));
        }
        assert!(rank(-0.0, 1) < rank(0.0, 2));
    }

    #[test]
    fn exp_is_accurate() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e300), 0.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        for i in 0..708_000 {
            let x = -f64::from(i) / 1000.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 5e-16, "{x}");
        }
    }

    /// The vectors of the rand_xoshiro crate.
    #[test]
    fn xoshiro_reference_vectors() {
        let mut rng = Xoshiro256pp([1, 2, 3, 4]);
        let want = [41943041, 58720359, 3588806011781223, 3591011842654386, 9228616714210784205];
        assert_eq!(want.map(|_| rng.next()), want);
        let mut rng = Xoshiro256pp::new(0);
        let want = [5987356902031041503, 7051070477665621255, 6633766593972829180, 211316841551650330];
        assert_eq!(want.map(|_| rng.next()), want);
    }
}
