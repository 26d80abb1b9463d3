//! γ of a non-linearity: 1/√Var\[f(Z)\] of a unit Gaussian Z (Brock, De & Smith 2021, section 4.2), in closed form, by
//! quadrature and by simulation, and the constant that timm's checkpoints were trained with.
//!
//! Owns the scalar functions and the integrals over them. Must not know where a network applies a γ.

use std::f64::consts::PI;

use libm::{erf, erfc};
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

/// SELU's constants (Klambauer et al. 2017), as PyTorch has them.
const SELU_SCALE: f64 = 1.050_700_987_355_480_5;
const SELU_ALPHA: f64 = 1.673_263_242_354_377_2;
/// Slope of leaky ReLU below zero: default of PyTorch and timm.
const LEAK: f64 = 0.01;
/// Limit of integration: beyond it, a unit Gaussian's density is below 1e-52, too small to matter in double precision.
const REACH: f64 = 15.5;
/// Longest interval for one Gauss-Legendre rule.
const PIECE: f64 = 0.5;

/// A scalar non-linearity, and data about its γ.
#[derive(Debug, Clone, Copy)]
pub struct NonLinearity {
    /// timm's name, or PyTorch's if timm has none.
    pub name: &'static str,
    /// The function f.
    pub f: fn(f64) -> f64,
    /// Points where f or its derivative jumps; quadrature never integrates across them.
    pub kinks: &'static [f64],
    /// timm's simulated constant (`nfnet.py`).
    pub timm: Option<f64>,
    /// Var\[f(Z)\] in closed form, if there is one.
    closed_variance: Option<fn() -> f64>,
}

/// All non-linearities whose γ is available: the activations that networks are folded with, the rest of timm's table of
/// constants (except softmax, which is no scalar function), and timm's other smooth and hard ones.
pub const NON_LINEARITIES: [NonLinearity; 19] = [
    entry("celu", elu, &[0.0], Some(1.270_926_833_152_771), Some(|| elu_variance(1.0, 1.0))),
    entry("elu", elu, &[0.0], Some(1.271_600_484_848_022_5), Some(|| elu_variance(1.0, 1.0))),
    entry("gelu", |x| x * phi(x), &[], Some(1.701_504_349_708_557_1), Some(gelu_variance)),
    entry("gelu_tanh", gelu_tanh, &[], None, None),
    entry("hard_sigmoid", hard_sigmoid, &[-3.0, 3.0], None, Some(hard_sigmoid_variance)),
    entry("hard_swish", |x| x * hard_sigmoid(x), &[-3.0, 3.0], None, Some(hard_swish_variance)),
    entry("identity", |x| x, &[], Some(1.0), Some(|| 1.0)),
    entry("leaky_relu", |x| x.max(LEAK * x), &[0.0], Some(1.705_903_410_911_56), Some(|| leaky_relu_variance(LEAK))),
    entry("log_sigmoid", |x| -softplus(-x), &[], Some(1.919_348_478_317_260_7), None),
    entry("mish", |x| x * softplus(x).tanh(), &[], None, None),
    entry("quick_gelu", |x| x * sigmoid(1.702 * x), &[], None, None),
    entry("relu", |x| x.max(0.0), &[0.0], Some(1.713_958_859_443_664_6), Some(|| leaky_relu_variance(0.0))),
    entry("relu6", |x| x.clamp(0.0, 6.0), &[0.0, 6.0], Some(1.713_148_474_693_298_3), Some(relu6_variance)),
    entry("selu", selu, &[0.0], Some(1.000_851_511_955_261_2), Some(|| elu_variance(SELU_SCALE, SELU_ALPHA))),
    entry("sigmoid", sigmoid, &[], Some(4.803_835_391_998_291), None),
    entry("silu", |x| x * sigmoid(x), &[], Some(1.788_129_329_681_396_5), None),
    entry("softplus", softplus, &[], Some(1.920_332_312_583_923_3), None),
    entry("softsign", |x| x / (1.0 + x.abs()), &[0.0], Some(2.338_853_120_803_833), None),
    entry("tanh", f64::tanh, &[], Some(1.593_911_767_005_920_4), None),
];

const fn entry(
    name: &'static str,
    f: fn(f64) -> f64,
    kinks: &'static [f64],
    timm: Option<f64>,
    closed_variance: Option<fn() -> f64>,
) -> NonLinearity {
    NonLinearity { name, f, kinks, timm, closed_variance }
}

/// The non-linearity with this name; also accepts spellings with or without underscores, and `swish`.
pub fn find(name: &str) -> Option<NonLinearity> {
    let plain = |name: &str| name.replace(['_', '-'], "").to_ascii_lowercase();
    let asked = match plain(name).as_str() {
        "swish" => "silu".to_string(),
        other => other.to_string(),
    };
    NON_LINEARITIES.into_iter().find(|n| plain(n.name) == asked)
}

/// γ by numerical integration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quadrature {
    /// γ.
    pub gamma: f64,
    /// Relative difference from a rule of higher order: an estimate of the error, not a bound.
    pub relative_error: f64,
}

/// γ from random samples, as the paper and timm computed it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Simulation {
    /// γ.
    pub gamma: f64,
    /// Standard error of γ, by the delta method from the sample's fourth central moment.
    pub standard_error: f64,
    /// Size of the sample.
    pub samples: u64,
}

impl NonLinearity {
    /// γ in closed form, if there is one.
    pub fn closed_form(&self) -> Option<f64> {
        self.closed_variance.map(|variance| variance().sqrt().recip())
    }

    /// γ by composite Gauss-Legendre quadrature on ±15.5, in intervals of at most 0.5 that end at the kinks. Accurate
    /// to about 1e-14 for every function of [`NON_LINEARITIES`].
    pub fn quadrature(&self) -> Quadrature {
        let gamma = |order| self.variance(order).sqrt().recip();
        let (lower, higher) = (gamma(20), gamma(32));
        Quadrature { gamma: higher, relative_error: (lower / higher - 1.0).abs() }
    }

    /// E\[f(Z)²\] by the same quadrature. He initialisation multiplies 1/fan-in by its inverse.
    pub fn second_moment(&self) -> f64 {
        self.expectation(32, &|x| (self.f)(x).powi(2))
    }

    fn variance(&self, order: usize) -> f64 {
        // centred, which avoids cancellation
        let mean = self.expectation(order, &|x| (self.f)(x));
        self.expectation(order, &|x| ((self.f)(x) - mean).powi(2))
    }

    /// E\[g(Z)\] for a function g that is smooth between f's kinks.
    fn expectation(&self, order: usize, g: &dyn Fn(f64) -> f64) -> f64 {
        let rule = gauss_legendre(order);
        let mut ends: Vec<f64> = self.kinks.iter().copied().filter(|k| k.abs() < REACH).collect();
        ends.extend([-REACH, REACH]);
        ends.sort_by(f64::total_cmp);
        let pieces = ends.windows(2).flat_map(|pair| {
            let count = ((pair[1] - pair[0]) / PIECE).ceil().max(1.0);
            let width = (pair[1] - pair[0]) / count;
            (0..count as usize).map(move |i| (pair[0] + width * i as f64, width))
        });
        let piece = |(from, width): (f64, f64)| -> f64 {
            let (half, middle) = (width / 2.0, from + width / 2.0);
            let at = |&(x, w): &(f64, f64)| w * half * density(middle + half * x) * g(middle + half * x);
            rule.iter().map(at).sum()
        };
        pieces.map(piece).sum()
    }

    /// γ from `samples` (at least 2) unit Gaussian values drawn with `seed`.
    pub fn simulation(&self, samples: u64, seed: u64) -> Simulation {
        let samples = samples.max(2);
        let values = || {
            let rng = ChaCha8Rng::seed_from_u64(seed);
            let normals = StandardNormal.sample_iter(rng).take(samples as usize);
            normals.map(|x: f64| (self.f)(x))
        };
        let n = samples as f64;
        let mean = values().sum::<f64>() / n;
        let (squares, fourths) = values().fold((0.0, 0.0), |(s, q), y| {
            let square = (y - mean) * (y - mean);
            (s + square, q + square * square)
        });
        let (variance, fourth) = (squares / (n - 1.0), fourths / n);
        let gamma = variance.sqrt().recip();
        let error_of_variance = ((fourth - variance * variance * (n - 3.0) / (n - 1.0)) / n).max(0.0).sqrt();
        Simulation { gamma, standard_error: gamma / 2.0 * error_of_variance / variance, samples }
    }
}

/// Effect of a squeeze-and-excitation gate on the variance at initialisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateSimulation {
    /// Mean of the sigmoid's output.
    pub mean_gate: f64,
    /// Standard error of `mean_gate`, over independent networks.
    pub standard_error: f64,
    /// Factor that restores the gated map's variance: 1/√E\[gate²\].
    pub factor: f64,
}

/// Simulates squeeze-and-excitation gates at initialisation (Brock et al. 2021, section 4.4: the gate's expected value
/// is 0.5, so the branch is multiplied by 2). Each of `networks` initialised gates runs on one unit Gaussian map of
/// `channels` channels of `pixels` pixels; weights have variance 1/fan-in, biases are 0.
pub fn simulate_gate(networks: u32, channels: usize, reduced: usize, pixels: usize, seed: u64) -> GateSimulation {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut normals = |count: usize, deviation: f64| -> Vec<f64> {
        (0..count)
            .map(|_| {
                let z: f64 = StandardNormal.sample(&mut rng);
                z * deviation
            })
            .collect()
    };
    let deviation = |fan_in: usize| (fan_in.max(1) as f64).sqrt().recip();
    let (mut means, mut squares) = (Vec::new(), 0.0);
    for _ in 0..networks.max(2) {
        // the mean over a unit Gaussian map is Gaussian
        let pooled = normals(channels, deviation(pixels));
        let (w1, w2) =
            (normals(reduced * channels, deviation(channels)), normals(channels * reduced, deviation(reduced)));
        let dot = |row: &[f64], x: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let hidden: Vec<f64> = w1.chunks(channels.max(1)).map(|row| dot(row, &pooled).max(0.0)).collect();
        let gates: Vec<f64> = w2.chunks(reduced.max(1)).map(|row| sigmoid(dot(row, &hidden))).collect();
        means.push(gates.iter().sum::<f64>() / gates.len() as f64);
        squares += gates.iter().map(|g| g * g).sum::<f64>() / gates.len() as f64;
    }
    let n = means.len() as f64;
    let mean_gate = means.iter().sum::<f64>() / n;
    let variance = means.iter().map(|m| (m - mean_gate).powi(2)).sum::<f64>() / (n - 1.0);
    GateSimulation { mean_gate, standard_error: (variance / n).sqrt(), factor: (squares / n).sqrt().recip() }
}

/// Probability density of a unit Gaussian.
fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// Cumulative distribution function of a unit Gaussian.
fn phi(x: f64) -> f64 {
    0.5 * erfc(-x / 2f64.sqrt())
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn elu(x: f64) -> f64 {
    if x > 0.0 { x } else { x.exp_m1() }
}

fn selu(x: f64) -> f64 {
    SELU_SCALE * if x > 0.0 { x } else { SELU_ALPHA * x.exp_m1() }
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
}

fn hard_sigmoid(x: f64) -> f64 {
    ((x + 3.0) / 6.0).clamp(0.0, 1.0)
}

/// Variance of leaky ReLU with slope `a`: E\[f²\] = (1 + a²)/2, E\[f\] = (1 − a)/√(2π).
fn leaky_relu_variance(a: f64) -> f64 {
    (1.0 + a * a) / 2.0 - (1.0 - a) * (1.0 - a) / (2.0 * PI)
}

/// Variance of `scale · (x above 0, a·(eˣ − 1) below)`: E\[eˣ; x < 0\] = √e·Φ(−1), E\[e²ˣ; x < 0\] = e²·Φ(−2).
fn elu_variance(scale: f64, a: f64) -> f64 {
    let (once, twice) = (0.5f64.exp() * phi(-1.0), 2f64.exp() * phi(-2.0));
    let mean = density(0.0) + a * (once - 0.5);
    let square = 0.5 + a * a * (twice - 2.0 * once + 0.5);
    scale * scale * (square - mean * mean)
}

/// Variance of GELU by Stein's lemma: E\[ZΦ\] = 1/(2√π), E\[Z²Φ²\] = 1/3 + 1/(2π√3).
fn gelu_variance() -> f64 {
    1.0 / 3.0 + 1.0 / (2.0 * PI * 3f64.sqrt()) - 1.0 / (4.0 * PI)
}

/// E\[Zᵏ; a < Z < b\] for k = 0 … 4, integrated by parts.
fn moments(a: f64, b: f64) -> [f64; 5] {
    let edge = |k: i32| b.powi(k) * density(b) - a.powi(k) * density(a);
    let mass = 0.5 * (erf(b / 2f64.sqrt()) - erf(a / 2f64.sqrt()));
    let (first, second) = (-edge(0), mass - edge(1));
    [mass, first, second, 2.0 * first - edge(2), 3.0 * second - edge(3)]
}

fn relu6_variance() -> f64 {
    let [_, mean, square, ..] = moments(0.0, 6.0);
    let above = phi(-6.0);
    let mean = mean + 6.0 * above;
    square + 36.0 * above - mean * mean
}

/// Variance of hard sigmoid: (Z + 3)/6 between its kinks, 1 above.
fn hard_sigmoid_variance() -> f64 {
    let [mass, _, square, ..] = moments(-3.0, 3.0);
    // E[f] = 1/2 by symmetry
    (square + 9.0 * mass) / 36.0 + phi(-3.0) - 0.25
}

/// Variance of hard swish: Z(Z + 3)/6 between its kinks, Z above.
fn hard_swish_variance() -> f64 {
    let [_, _, second, _, fourth] = moments(-3.0, 3.0);
    let mean = second / 6.0 + density(3.0);
    let square = (fourth + 9.0 * second) / 36.0 + phi(-3.0) + 3.0 * density(3.0);
    square - mean * mean
}

/// Gauss-Legendre nodes and weights on \[−1, 1\], by Newton's method on the Legendre polynomial.
fn gauss_legendre(order: usize) -> Vec<(f64, f64)> {
    let n = order as f64;
    (1..=order)
        .map(|i| {
            let mut x = (PI * (i as f64 - 0.25) / (n + 0.5)).cos();
            let mut slope = 1.0;
            for _ in 0..100 {
                let (mut before, mut p) = (1.0, x);
                for k in 2..=order {
                    let k = k as f64;
                    (before, p) = (p, ((2.0 * k - 1.0) * x * p - (k - 1.0) * before) / k);
                }
                slope = n * (x * p - before) / (x * x - 1.0);
                let step = p / slope;
                x -= step;
                if step.abs() < 1e-16 {
                    break;
                }
            }
            (x, 2.0 / ((1.0 - x * x) * slope * slope))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_forms_and_quadrature_agree() {
        let mut closed_forms = 0;
        for n in NON_LINEARITIES {
            let quadrature = n.quadrature();
            assert!(quadrature.relative_error < 1e-12, "{}: {quadrature:?}", n.name);
            if let Some(closed) = n.closed_form() {
                closed_forms += 1;
                assert!((closed / quadrature.gamma - 1.0).abs() < 1e-12, "{}: {closed} {quadrature:?}", n.name);
            }
        }
        assert_eq!(closed_forms, 10);
        // the paper's closed form: section 4.2
        let relu = find("relu").and_then(|n| n.closed_form()).expect("has one");
        assert!((relu - 2f64.sqrt() / (1.0 - 1.0 / PI).sqrt()).abs() < 1e-15);
    }

    /// timm drew 1024 × 256 values for each of its constants.
    #[test]
    fn timm_is_within_the_noise_of_its_own_simulation() {
        for n in NON_LINEARITIES {
            let Some(timm) = n.timm else { continue };
            let error = n.simulation(1 << 18, 0).standard_error;
            let off = (timm - n.quadrature().gamma).abs();
            assert!(off <= 4.0 * error, "{}: {off:e}, standard error {error:e}", n.name);
        }
    }

    #[test]
    fn simulations_are_as_uncertain_as_they_say() {
        for name in ["relu", "silu", "sigmoid", "hard_swish"] {
            let n = find(name).expect("known");
            let exact = n.quadrature().gamma;
            let deviations: Vec<f64> =
                (0..60).map(|seed| n.simulation(20_000, seed)).map(|s| (s.gamma - exact) / s.standard_error).collect();
            let rms = (deviations.iter().map(|d| d * d).sum::<f64>() / 60.0).sqrt();
            assert!((0.7..1.35).contains(&rms), "{name}: {rms}");
        }
    }

    #[test]
    fn a_fresh_gate_halves() {
        let gate = simulate_gate(64, 128, 32, 196, 0);
        assert!((gate.mean_gate - 0.5).abs() < 4.0 * gate.standard_error, "{gate:?}");
        assert!((gate.factor - 2.0).abs() < 0.01, "{gate:?}");
    }

    #[test]
    fn names_are_found_as_people_write_them() {
        for (asked, name) in [("swish", "silu"), ("hardswish", "hard_swish"), ("LeakyReLU", "leaky_relu")] {
            assert_eq!(find(asked).map(|n| n.name), Some(name));
        }
        assert!(find("softmax").is_none());
    }
}
