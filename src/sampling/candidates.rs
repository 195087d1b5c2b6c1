//! The tokens still in play, and the stages that need nothing else.

use super::math::{Xoshiro256pp, exp, ln};
use crate::backend::{TOP, TOTAL_PARTS, Top};
use crate::error::Result;

/// A shrinking list of tokens with their logits.
///
/// The temperature is kept aside and divides the logits where probabilities are made of them, so that it costs no
/// rounding.
#[derive(Debug)]
pub struct Candidates {
    /// As [`rank`]s: by ascending token, or best first if `sorted`.
    list: Vec<u64>,
    sorted: bool,
    temperature: f64,
    /// Tokens that are in play and not in the list. The list is best first then, and `sorted` is false: it is about all of them.
    others: Option<Others>,
    /// Scratch of the draw.
    weights: Vec<f64>,
}

/// What is known of tokens that are not in the list.
#[derive(Debug, Clone, Copy)]
struct Others {
    /// They rank after this.
    bound: u64,
    /// Bounds of what [`Candidates::total`] would be, of them and the list together.
    total: Option<[f64; 2]>,
}

impl Candidates {
    pub fn new(n_vocab: usize) -> Result<Self> {
        Ok(Candidates {
            list: super::reserve("the sampler's candidates", n_vocab)?,
            sorted: false,
            temperature: 1.0,
            others: None,
            weights: super::reserve("the sampler's weights", n_vocab)?,
        })
    }

    /// Starts anew with (token, logit), tokens ascending; NaN and -inf are left out, +inf is the largest finite f32. If only the best
    /// `k` will be wanted (0 = all), others may be missing.
    pub fn fill(&mut self, logits: impl Iterator<Item = (u32, f32)>, k: usize) {
        (self.sorted, self.temperature, self.others) = (false, 1.0, None);
        self.list.clear();
        let usable = logits.filter(|&(_, l)| !l.is_nan() && l != f32::NEG_INFINITY);
        let ranks = usable.map(|(token, l)| rank(l.min(f32::MAX), token));
        if k == 0 {
            self.list.extend(ranks);
            return;
        }
        // Cut back to the best k whenever twice as many have come together; from then on only what beats the k-th enters. That is
        // O(1) a token; the 1024 make it rare for small k.
        let room = k.saturating_mul(2).max(1024);
        let mut bound = u64::MAX;
        for c in ranks {
            if c < bound {
                self.list.push(c);
                if self.list.len() == room {
                    bound = *self.list.select_nth_unstable(k - 1).1;
                    self.list.truncate(k);
                }
            }
        }
    }

    /// Starts anew with the best tokens, of which there is one at least. While [`Candidates::has_others`], only the methods that drop
    /// them may be called.
    pub fn fill_top(&mut self, top: &Top) {
        let all = top.tokens.iter().copied().zip(top.logits.iter().copied());
        self.fill(all, 0);
        if top.tokens.len() < TOP {
            self.list.sort_unstable_by_key(|&c| token(c));
        } else {
            let total = Some([1.0 - 1.0 / TOTAL_PARTS, 1.0 + 1.0 / TOTAL_PARTS].map(|f| f * top.total));
            self.others = self.list.last().map(|&bound| Others { bound, total });
        }
    }

    pub fn has_others(&self) -> bool {
        self.others.is_some()
    }

    pub fn is_heated(&self) -> bool {
        self.temperature != 1.0
    }

    /// [`Candidates::edit`] for an `f` that raises no logit, before any heat.
    pub fn lower(&mut self, f: impl FnMut(u32, f64) -> f64) {
        self.edit(f);
        self.list.sort_unstable();
        self.others.iter_mut().for_each(|o| o.total = None);
    }

    /// [`Candidates::top_k`] of all tokens, unless the list does not tell which these are.
    pub fn top_k_of_all(&mut self, k: usize) {
        // The bound may be in the list, where nothing has lowered it.
        if let Some(others) = self.others
            && k > 0
            && self.list.get(k - 1).is_some_and(|&c| c <= others.bound)
        {
            self.list.truncate(k);
            (self.sorted, self.others) = (true, None);
        }
    }

    /// The same of [`Candidates::top_p`].
    pub fn top_p_of_all(&mut self, p: f64, min_keep: usize) {
        let Some(Others { total: Some(total), .. }) = self.others else { return };
        let max = self.max();
        let [low, high] = total.map(|t| p * t);
        let mut sum = 0.0;
        for i in 0..self.list.len() {
            sum += exp(self.exponent(self.list[i], max));
            // Where the sum passes one bound and not the other, nobody knows.
            if sum >= low && i + 1 >= min_keep {
                if sum >= high {
                    self.list.truncate(i + 1);
                    (self.sorted, self.others) = (true, None);
                }
                return;
            }
        }
    }

    /// The same of [`Candidates::min_p`].
    pub fn min_p_of_all(&mut self, p: f64, min_keep: usize) {
        let Some(others) = self.others else { return };
        let max = self.max();
        // A margin above what `exp` is off by. The best token may have been lowered below others.
        if self.list[0] > others.bound || exp(self.exponent(others.bound, max)) >= p * (1.0 - 1e-12) {
            return;
        }
        if self.list.iter().filter(|&&c| exp(self.exponent(c, max)) >= p).count() < min_keep {
            return self.top_k_of_all(min_keep);
        }
        self.others = None;
        self.list.sort_unstable_by_key(|&c| token(c));
        self.min_p(p, min_keep);
    }

    /// [`Candidates::heat`]; 0 leaves the best of all tokens alone, if it is in the list.
    pub fn heat_all(&mut self, temperature: f64) {
        if temperature > 0.0 {
            self.heat(temperature);
            self.others.iter_mut().for_each(|o| o.total = None);
        } else {
            self.top_k_of_all(1);
        }
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Each (token, logit over temperature), in an order that depends on the stages so far.
    pub fn iter(&self) -> impl Iterator<Item = (u32, f64)> {
        self.list.iter().map(|&c| (token(c), logit(c) / self.temperature))
    }

    /// The best candidate's logit; there is one wherever this is called.
    fn max(&self) -> f64 {
        let best = if self.sorted || self.has_others() { self.list.first() } else { self.list.iter().min() };
        best.map_or(0.0, |&c| logit(c))
    }

    /// How far a candidate's logit lies above `max`, over the temperature: never above 0.
    fn exponent(&self, candidate: u64, max: f64) -> f64 {
        (logit(candidate) - max) / self.temperature
    }

    fn total(&self, max: f64) -> f64 {
        self.list.iter().map(|&c| exp(self.exponent(c, max))).sum()
    }

    fn sort(&mut self) {
        if !self.sorted {
            self.list.sort_unstable();
            self.sorted = true;
        }
    }

    /// Changes logits, `f(token, logit)`. Results beyond f32 become its largest and smallest finite values.
    pub fn edit(&mut self, mut f: impl FnMut(u32, f64) -> f64) {
        for c in &mut self.list {
            let changed = f(token(*c), logit(*c) / self.temperature) as f32;
            *c = rank(changed.clamp(f32::MIN, f32::MAX), token(*c));
        }
        self.temperature = 1.0;
        if std::mem::take(&mut self.sorted) {
            self.sort();
        }
    }

    pub fn top_k(&mut self, k: usize) {
        if k == 0 {
            return;
        }
        if !self.sorted && k < self.list.len() {
            self.list.select_nth_unstable(k - 1);
        }
        self.list.truncate(k);
        // A draw depends on the order, which a selection leaves to the standard library's version.
        self.sort();
    }

    /// The shortest run of most probable candidates that hold `p` of the probability, at least `min_keep`.
    pub fn top_p(&mut self, p: f64, min_keep: usize) {
        if p >= 1.0 {
            return;
        }
        let max = self.max();
        let target = p * self.total(max);
        let n = self.list.len();
        let mut sorted = if self.sorted { n } else { 0 };
        let mut sum = 0.0;
        for i in 0..n {
            if i == sorted {
                // Usually a few hundred tokens hold the mass, so sort only as far as the sum has got.
                sorted = n.min(i.saturating_mul(8).max(256));
                let rest = &mut self.list[i..];
                let prefix = sorted - i;
                if prefix < rest.len() {
                    rest.select_nth_unstable(prefix - 1);
                }
                rest[..prefix].sort_unstable();
            }
            sum += exp(self.exponent(self.list[i], max));
            if sum >= target && i + 1 >= min_keep {
                self.list.truncate(i + 1);
                break;
            }
        }
        self.sorted = true;
    }

    /// The candidates of at least `p` times the largest probability, at least `min_keep`.
    pub fn min_p(&mut self, p: f64, min_keep: usize) {
        if p <= 0.0 {
            return;
        }
        let max = self.max();
        let temperature = self.temperature;
        let keeps = |&c: &u64| exp((logit(c) - max) / temperature) >= p;
        if self.list.iter().filter(|c| keeps(c)).count() < min_keep {
            self.top_k(min_keep);
        } else {
            self.list.retain(keeps);
        }
    }

    /// The candidates whose surprise is nearest to its mean, until they hold more than `p` of the probability, at least
    /// `min_keep`.
    pub fn typical_p(&mut self, p: f64, min_keep: usize) {
        if p >= 1.0 {
            return;
        }
        // The surprise -ln p is the negative exponent plus a constant, which falls out of the distance to the mean. Over
        // the sorted list it grows, so that what is kept is one run around the mean.
        self.sort();
        let max = self.max();
        let (mut total, mut mean) = (0.0, 0.0);
        for &c in &self.list {
            let x = self.exponent(c, max);
            let weight = exp(x);
            total += weight;
            if weight > 0.0 {
                mean -= weight * x;
            }
        }
        mean /= total;
        let surprise = |i: usize| -self.exponent(self.list[i], max);
        let first = self.list.partition_point(|&c| -self.exponent(c, max) < mean);
        let (mut begin, mut end, mut sum) = (first, first, 0.0);
        while end - begin < self.list.len() {
            let left = begin > 0 && (end == self.list.len() || mean - surprise(begin - 1) <= surprise(end) - mean);
            let taken = if left { begin - 1 } else { end };
            (begin, end) = if left { (taken, end) } else { (begin, end + 1) };
            sum += exp(self.exponent(self.list[taken], max));
            if sum > p * total && end - begin >= min_keep {
                break;
            }
        }
        self.list.truncate(end);
        self.list.drain(..begin);
    }

    /// The candidates at most `n` standard deviations below the best.
    pub fn top_n_sigma(&mut self, n: f64) {
        if n <= 0.0 || self.list.len() < 2 {
            return;
        }
        // The temperature scales both sides of the comparison alike.
        let count = self.list.len() as f64;
        let mean = self.list.iter().map(|&c| logit(c)).sum::<f64>() / count;
        let variance = self.list.iter().map(|&c| (logit(c) - mean) * (logit(c) - mean)).sum::<f64>() / count;
        let bound = self.max() - n * variance.sqrt();
        self.list.retain(|&c| logit(c) >= bound);
    }

    /// Of the candidates of at least probability `threshold`, only the least probable, if `min_keep` are left then.
    pub fn exclude_top(&mut self, threshold: f64, min_keep: usize) {
        let max = self.max();
        let bound = threshold * self.total(max);
        let temperature = self.temperature;
        let above = |c: u64| exp((logit(c) - max) / temperature) >= bound;
        let (mut n, mut last) = (0, 0);
        for &c in self.list.iter().filter(|&&c| above(c)) {
            (n, last) = (n + 1, last.max(c));
        }
        if n >= 2 && self.list.len() + 1 - n >= min_keep {
            self.list.retain(|&c| c == last || !above(c));
        }
    }

    /// Divides the logits; 0 leaves the best candidate alone.
    pub fn heat(&mut self, temperature: f64) {
        if temperature > 0.0 {
            self.temperature = (self.temperature * temperature).clamp(f64::MIN_POSITIVE, f64::MAX);
        } else {
            self.keep_best();
        }
    }

    /// A temperature from `low` to `high`: low plus the range times (entropy over the largest possible)^`exponent`.
    pub fn heat_by_entropy(&mut self, low: f64, high: f64, exponent: f64) {
        if self.list.len() < 2 {
            return;
        }
        let max = self.max();
        let (mut total, mut entropy) = (0.0, 0.0);
        for &c in &self.list {
            let x = self.exponent(c, max);
            let weight = exp(x);
            total += weight;
            if weight > 0.0 {
                entropy -= weight * x;
            }
        }
        entropy = entropy / total + ln(total);
        let share = (entropy / ln(self.list.len() as f64)).min(1.0);
        let power = match exponent {
            0.0 => 1.0,
            _ if share < f64::MIN_POSITIVE => 0.0,
            _ => exp(exponent * ln(share)),
        };
        self.heat(low + (high - low) * power);
    }

    pub fn keep_best(&mut self) {
        if let Some(&best) = self.list.iter().min() {
            self.list.clear();
            self.list.push(best);
        }
    }

    /// The candidates of a surprise, -log2 p, of at most `mu`, always the best.
    pub fn at_most_as_surprising(&mut self, mu: f64) {
        let max = self.max();
        let bound = mu * std::f64::consts::LN_2 - ln(self.total(max));
        if bound < 0.0 {
            return self.keep_best();
        }
        let temperature = self.temperature;
        self.list.retain(|&c| (max - logit(c)) / temperature <= bound);
    }

    /// One candidate by its probability, and its surprise in bits. A single one is taken without a draw.
    pub fn draw(&mut self, rng: &mut Xoshiro256pp) -> (u32, f64) {
        if let [only] = self.list[..] {
            return (token(only), 0.0);
        }
        let max = self.max();
        self.weights.clear();
        let (list, temperature) = (&self.list, self.temperature);
        self.weights.extend(list.iter().map(|&c| exp((logit(c) - max) / temperature)));
        let total: f64 = self.weights.iter().sum();
        let target = rng.uniform() * total;
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
        let surprise = (ln(total) - self.exponent(self.list[chosen], max)) / std::f64::consts::LN_2;
        (token(self.list[chosen]), surprise)
    }
}

/// A logit (not NaN) and its token as one integer, smaller for the larger logit and, of equal ones, for the lower id.
/// Comparing integers is what makes selection over a whole vocabulary cheap.
pub fn rank(logit: f32, token: u32) -> u64 {
    let bits = (logit + 0.0).to_bits(); // + 0.0 turns -0 into 0, its equal
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(token)
}

pub fn logit(rank: u64) -> f64 {
    let ascending = !(rank >> 32) as u32;
    let bits = if ascending >> 31 == 1 { ascending ^ 1 << 31 } else { !ascending };
    f64::from(f32::from_bits(bits))
}

pub fn token(rank: u64) -> u32 {
    rank as u32
}
