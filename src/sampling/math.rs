//! Arithmetic that is the same on every machine, and random numbers.

// ln 2 in two parts (from fdlibm): the high one has trailing zeros enough to make its small multiples exact.
const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);

/// e^x for x <= 0, to about 2 ulp; 0 below -708. The system's `exp` differs in the last bit between platforms (and
/// glibc's between CPUs), which would let one seed mean two sequences; additions and multiplications do not.
pub fn exp(x: f64) -> f64 {
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

/// ln x for positive, normal x, to about 2 ulp (near 1: of x - 1); for the reason given at [`exp`].
pub fn ln(x: f64) -> f64 {
    // x = m 2^k with m from sqrt(1/2) to sqrt(2); ln m = 2 artanh s, whose 13 terms leave an error below 1e-18.
    let bits = x.to_bits();
    let mut k = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | 1023 << 52);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        k += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let mut sum = 0.0;
    for n in (0..=12).rev() {
        sum = sum * s * s + const { reciprocals() }[2 * n + 1];
    }
    f64::from(k) * LN2_HIGH + (2.0 * s * sum + f64::from(k) * LN2_LOW)
}

const fn reciprocals() -> [f64; 26] {
    let mut r = [1.0; 26];
    let mut n = 1;
    while n < 26 {
        r[n] = 1.0 / n as f64;
        n += 1;
    }
    r
}

/// xoshiro256++ 1.0 (Blackman and Vigna 2021, arXiv:1805.01407), its state filled by splitmix64 as its authors advise.
#[derive(Debug, Clone)]
pub struct Xoshiro256pp(pub [u64; 4]);

impl Xoshiro256pp {
    pub fn new(seed: u64) -> Self {
        let mut x = seed;
        Xoshiro256pp(std::array::from_fn(|_| {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }))
    }

    pub fn next(&mut self) -> u64 {
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
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn ln_is_accurate() {
        assert_eq!(ln(1.0), 0.0);
        let mut rng = Xoshiro256pp::new(1);
        for i in 0..500_000 {
            let x = (rng.uniform() + 0.5) * f64::from_bits((1023 + (i % 300) - 150) << 52);
            assert!((ln(x) - x.ln()).abs() <= 5e-16 * x.ln().abs().max((x - 1.0).abs()), "{x}");
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
