//! How fast pairs of features turn.

use std::f64::consts::TAU;
use std::fmt;

/// Rotary position embedding of an attention layer: pair `i` of a head turns by `theta^(-2 i / d_head)` radians a position, scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base of the geometric series of rates, often 10000.
    pub theta: f64,
    /// What is done to the rates of a model that reads further than it first learnt to.
    pub scaling: RopeScaling,
}

/// The rates of a model that was taught longer sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    #[default]
    None,
    /// All of them divided (position interpolation; Chen et al., arXiv 2306.15595).
    Linear {
        /// By this.
        factor: f64,
    },
    /// As in Llama 3.1 (`rope_type = "llama3"` of transformers): slow pairs are divided, fast ones are left, those between change over.
    Llama3 {
        /// What slow rates are divided by.
        factor: f64,
        /// Pairs that turn fewer times than this over `original_len` positions are slow.
        low_freq_factor: f64,
        /// Pairs that turn more times than this are fast.
        high_freq_factor: f64,
        /// The length that was learnt first.
        original_len: usize,
    },
}

impl Rope {
    /// Rates that nothing scales.
    pub const fn new(theta: f64) -> Self {
        Self { theta, scaling: RopeScaling::None }
    }

    /// Radians that each pair of a head's features turns by from one position to the next.
    pub(crate) fn rates(&self, d_head: i64) -> Vec<f64> {
        let plain = (0..d_head / 2).map(|i| self.theta.powf(-2. * i as f64 / d_head as f64));
        plain.map(|rate| self.scaling.of(rate)).collect()
    }

    /// What is wrong with the numbers, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        if !(self.theta > 0. && self.theta.is_finite()) {
            return Some(format!("theta is {}, expected a positive number such as 10000", self.theta));
        }
        self.scaling.problem()
    }
}

impl From<f64> for Rope {
    fn from(theta: f64) -> Self {
        Self::new(theta)
    }
}

impl fmt::Display for Rope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "base {}", self.theta)?;
        match self.scaling {
            RopeScaling::None => Ok(()),
            scaling => write!(f, ", scaled as {scaling:?}"),
        }
    }
}

impl RopeScaling {
    /// What is wrong with the numbers, if anything.
    pub fn problem(&self) -> Option<String> {
        let is_number = |x: f64| x > 0. && x.is_finite();
        match *self {
            Self::None => None,
            Self::Linear { factor } | Self::Llama3 { factor, .. } if !is_number(factor) => {
                Some(format!("the factor of rotary scaling is {factor}, expected a positive number such as 8"))
            }
            Self::Llama3 { low_freq_factor: low, high_freq_factor: high, .. }
                if !(is_number(low) && is_number(high) && low < high) =>
            {
                Some(format!(
                    "low_freq_factor {low} and high_freq_factor {high} of rotary scaling must be positive, the first smaller"
                ))
            }
            Self::Llama3 { original_len: 0, .. } => Some("the original length of rotary scaling is 0".to_owned()),
            Self::Linear { .. } | Self::Llama3 { .. } => None,
        }
    }

    fn of(&self, rate: f64) -> f64 {
        match *self {
            Self::None => rate,
            Self::Linear { factor } => rate / factor,
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_len } => {
                let turns = original_len as f64 * rate / TAU;
                let fast = ((turns - low) / (high - low)).clamp(0., 1.);
                (1. - fast) * rate / factor + fast * rate
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_1_turns_as_transformers_has_it() {
        let scaling = RopeScaling::Llama3 { factor: 8., low_freq_factor: 1., high_freq_factor: 4., original_len: 8192 };
        let rates = Rope { theta: 500_000., scaling }.rates(128);
        // `_compute_llama3_parameters` of transformers 4.57.6, in single precision.
        for (i, want) in WANT {
            assert!((rates[i] - want).abs() < 1e-6 * want, "{i}: {}, {want}", rates[i]);
        }
        assert_eq!(rates[0], 1.);
    }

    #[test]
    fn positions_are_interpolated() {
        let scaled = Rope { theta: 100., scaling: RopeScaling::Linear { factor: 4. } }.rates(4);
        assert_eq!(scaled, Rope::new(100.).rates(4).iter().map(|rate| rate / 4.).collect::<Vec<_>>());
    }

    #[test]
    fn numbers_that_scale_nothing_are_named() {
        let llama = |factor, low_freq_factor, high_freq_factor, original_len| {
            let scaling = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len };
            Rope { theta: 1e4, scaling }.problem().unwrap_or_default()
        };
        assert_eq!(llama(8., 1., 4., 8192), "");
        assert!(llama(0., 1., 4., 8192).contains("factor"));
        assert!(llama(8., 4., 4., 8192).contains("low_freq_factor 4"));
        assert!(llama(8., 1., 4., 0).contains("length"));
        assert!(Rope::new(f64::NAN).problem().unwrap().contains("theta is NaN"));
        let linear = Rope { theta: 1e4, scaling: RopeScaling::Linear { factor: f64::INFINITY } };
        assert!(linear.problem().unwrap().contains("factor"));
    }

    const WANT: [(usize, f64); 5] = [
        (10, 0.12868738174438477),
        (28, 0.0032114461064338684),
        (30, 0.0013718936825171113),
        (34, 0.0001785077911335975),
        (63, 3.068925877869333e-07),
    ];
}
