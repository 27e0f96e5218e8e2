use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::{Error, Fingerprint, Result, Windows};

/// Where a [`Sampler`] stands: enough to go on with exactly the windows that would have come next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// The seed of the shuffles.
    pub seed: u64,
    /// The current pass over the data, from 0.
    pub epoch: u64,
    /// Windows of this pass already drawn.
    pub index: u64,
    /// Windows of a pass.
    pub n_windows: u64,
    /// Targets of a window.
    pub seq_len: usize,
    /// The data set's fingerprint.
    pub data: Fingerprint,
}

/// Draws windows in an order that is shuffled anew in each epoch.
///
/// The order of an epoch depends on the seed and the epoch's number alone: a Fisher-Yates shuffle driven by ChaCha8,
/// the seed as its key and the epoch as its stream. It is the same on every platform.
#[derive(Debug, Clone)]
pub struct Sampler {
    state: SamplerState,
    /// The order of the current epoch, once it is needed.
    order: Option<Vec<u64>>,
}

impl Sampler {
    /// Starts at the first window of epoch 0.
    pub fn new(windows: &Windows, seed: u64) -> Self {
        let state = SamplerState {
            seed,
            epoch: 0,
            index: 0,
            n_windows: windows.n_windows(),
            seq_len: windows.seq_len(),
            data: windows.dataset().fingerprint(),
        };
        Sampler { state, order: None }
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] where the state belongs to other data, another sequence length or another seed.
    pub fn resume(windows: &Windows, seed: u64, state: &SamplerState) -> Result<Self> {
        let fresh = Self::new(windows, seed).state;
        let pairs = [
            ("seed", state.seed.to_string(), fresh.seed.to_string()),
            ("seq_len", state.seq_len.to_string(), fresh.seq_len.to_string()),
            ("data fingerprint", state.data.to_string(), fresh.data.to_string()),
            ("n_windows", state.n_windows.to_string(), fresh.n_windows.to_string()),
        ];
        if let Some((field, stored, current)) = pairs.into_iter().find(|(_, stored, current)| stored != current) {
            return Err(Error::StateMismatch { field, stored, current });
        }
        if state.index > state.n_windows {
            let (stored, current) = (state.index.to_string(), format!("{} windows", state.n_windows));
            return Err(Error::StateMismatch { field: "index", stored, current });
        }
        Ok(Sampler { state: state.clone(), order: None })
    }

    /// The next window as `(epoch, window)`.
    pub fn draw(&mut self) -> (u64, u64) {
        if self.state.index >= self.state.n_windows {
            self.state.epoch += 1;
            self.state.index = 0;
            self.order = None;
        }
        let SamplerState { seed, epoch, index, n_windows, .. } = self.state;
        let order = self.order.get_or_insert_with(|| shuffled(n_windows, seed, epoch));
        self.state.index += 1;
        (epoch, order[index as usize])
    }

    /// Where it stands.
    pub fn state(&self) -> &SamplerState {
        &self.state
    }
}

fn shuffled(n: u64, seed: u64, epoch: u64) -> Vec<u64> {
    let mut key = *b"________flowhn window order v1  ";
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(epoch);
    let mut order: Vec<u64> = (0..n).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, below(&mut rng, i as u64 + 1) as usize);
    }
    order
}

/// A uniform number below `n`; draws that would favour the small ones are thrown away.
fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    let limit = u64::MAX - u64::MAX % n;
    loop {
        let draw = rng.next_u64();
        if draw < limit {
            return draw % n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_part_of_the_contract() {
        // Computed by an implementation of ChaCha8 of its own; a change breaks the resumption of every checkpoint.
        assert_eq!(shuffled(10, 0, 0), [2, 9, 4, 8, 7, 6, 1, 3, 0, 5]);
        assert_eq!(shuffled(10, 0, 1), [9, 6, 3, 4, 1, 5, 7, 8, 2, 0]);
        assert_eq!(shuffled(10, (1 << 63) + 5, (1 << 40) + 7), [3, 5, 6, 7, 9, 2, 4, 1, 0, 8]);
    }

    #[test]
    fn every_window_once_and_epochs_and_seeds_differ() {
        let base = shuffled(1000, 7, 3);
        let mut sorted = base.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_ne!(base, shuffled(1000, 7, 4));
        assert_ne!(base, shuffled(1000, 8, 3));
        assert!(shuffled(0, 1, 1).is_empty());
    }

    #[test]
    fn draws_are_uniform() {
        let mut rng = ChaCha8Rng::from_seed([1; 32]);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[below(&mut rng, 6) as usize] += 1;
        }
        // Five standard deviations of a binomial(60000, 1/6) are about 456.
        assert!(counts.iter().all(|&n| n.abs_diff(10_000) < 456), "{counts:?}");
    }
}
