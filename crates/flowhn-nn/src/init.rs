//! How a parameter starts. Values are drawn on the host from a stream that depends on the seed and the parameter's name
//! alone, so a model starts the same on every device, and adding a parameter leaves the others as they were.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Normal, Uniform};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use flowhn_torch::{Error, Result};

/// Values that come from one stream of random numbers; chunks of a larger parameter are drawn beside each other.
const CHUNK: usize = 1 << 19;

/// Initial values of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// One value everywhere.
    Const(f64),
    /// Independent normal values of mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Independent uniform values.
    Uniform {
        /// Least value.
        low: f64,
        /// Greatest value.
        high: f64,
    },
    /// Identities side by side: `[d, d]` is I, `[d, 2d]` is `[I I]`.
    Eye,
    /// Given values, in row-major order.
    Values(Vec<f32>),
}

impl Init {
    /// The values for a parameter of this shape.
    pub(crate) fn values(self, shape: &[i64], rng: &ChaCha8Rng) -> Result<Vec<f32>> {
        let n = shape.iter().product::<i64>() as usize;
        let invalid = |message: String| Error::invalid("init", message);
        Ok(match self {
            Self::Zeros => vec![0.; n],
            Self::Ones => vec![1.; n],
            Self::Const(value) => vec![value as f32; n],
            Self::Normal { std } => {
                let normal = Normal::new(0., std).map_err(|_| invalid(format!("a standard deviation of {std}")))?;
                draw(normal, n, rng)
            }
            Self::Uniform { low, high } => {
                let uniform = Uniform::new(low, high).map_err(|_| invalid(format!("an empty range {low}..{high}")))?;
                draw(uniform, n, rng)
            }
            Self::Eye => match *shape {
                [rows, cols] if rows > 0 && cols % rows == 0 => {
                    (0..rows * cols).map(|i| f32::from(u8::from(i / cols == (i % cols) % rows))).collect()
                }
                _ => return Err(invalid(format!("shape {shape:?} does not hold identities side by side"))),
            },
            Self::Values(values) if values.len() == n => values,
            Self::Values(values) => return Err(invalid(format!("{} values for shape {shape:?}", values.len()))),
        })
    }
}

/// `n` values, the same on any number of threads: each chunk has a stream of its own, the first that of `rng` as it is.
fn draw(distribution: impl Distribution<f64> + Copy + Sync, n: usize, rng: &ChaCha8Rng) -> Vec<f32> {
    let mut values = vec![0.; n];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(idx, chunk)| {
        let mut rng = rng.clone();
        rng.set_stream(idx as u64);
        chunk.fill_with(|| distribution.sample(&mut rng) as f32);
    });
    values
}

/// The random stream of the parameter `name` under `seed`.
pub(crate) fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(xxh3_64_with_seed(name.as_bytes(), seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eye_repeats_identities() {
        let values = Init::Eye.values(&[2, 4], &stream(0, "w")).unwrap();
        assert_eq!(values, [1., 0., 1., 0., 0., 1., 0., 1.]);
        assert!(Init::Eye.values(&[2, 3], &stream(0, "w")).is_err());
    }

    #[test]
    fn chunks_are_the_same_on_any_number_of_threads() {
        let n = CHUNK as i64 + 9;
        let draw = |n| Init::Normal { std: 1. }.values(&[n], &stream(0, "w")).unwrap();
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(|| draw(n));
        assert_eq!(alone, draw(n));
        let (first, second) = alone.split_at(CHUNK);
        let one_by_one = Normal::new(0., 1.).unwrap().sample_iter(stream(0, "w")).map(|value| value as f32);
        assert!(first.iter().copied().eq(one_by_one.take(CHUNK)), "the first chunk is the stream as it is");
        assert_ne!(first[..9], *second);
    }

    #[test]
    fn streams_depend_on_seed_and_name() {
        let draw = |seed, name| Init::Normal { std: 1. }.values(&[8], &stream(seed, name)).unwrap();
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
    }

    #[test]
    fn normal_has_its_standard_deviation() {
        let values = Init::Normal { std: 0.02 }.values(&[100, 1000], &stream(3, "w")).unwrap();
        let variance = values.iter().map(|v| f64::from(v * v)).sum::<f64>() / values.len() as f64;
        assert!((variance.sqrt() / 0.02 - 1.).abs() < 0.01, "{}", variance.sqrt());
    }
}
