//! The learning rate as a pure function of the step.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine from the peak down to the minimum at the last step.
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the peak, then a straight line to the minimum over the last `decay_steps`.
    Wsd,
    /// The peak to the end.
    Constant,
}

/// A learning rate for each of `steps` updates.
///
/// Warm-up is a straight line from 0, which it never takes, to the peak, which update `warmup_steps - 1` takes. The last
/// update of `Cosine` and `Wsd` takes exactly `min_lr`.
///
/// ```
/// use flowhn_train::schedule::{LearningRate, Schedule};
/// let lr = LearningRate { schedule: Schedule::Cosine, peak: 1e-3, min_lr: 1e-4, steps: 100, warmup_steps: 10, decay_steps: 0 };
/// assert_eq!(lr.at(0), 1e-4);
/// assert_eq!(lr.at(9), 1e-3);
/// assert_eq!(lr.at(99), 1e-4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    /// The shape after warm-up.
    pub schedule: Schedule,
    /// The highest rate.
    pub peak: f64,
    /// The rate of the last update; not used by [`Schedule::Constant`].
    pub min_lr: f64,
    /// Number of updates.
    pub steps: u64,
    /// Updates that rise to the peak.
    pub warmup_steps: u64,
    /// Updates that fall to the minimum; used by [`Schedule::Wsd`] alone.
    pub decay_steps: u64,
}

impl LearningRate {
    /// The rate of update `step_idx`, which counts from 0. Past the last update it stays where it ended.
    pub fn at(&self, step_idx: u64) -> f64 {
        let done = step_idx + 1;
        if done < self.warmup_steps {
            return self.peak * done as f64 / self.warmup_steps as f64;
        }
        match self.schedule {
            Schedule::Constant => self.peak,
            Schedule::Cosine => {
                let fall = progress(done, self.warmup_steps, self.steps);
                self.between(0.5 * (1. + (std::f64::consts::PI * fall).cos()))
            }
            Schedule::Wsd => {
                let start = self.steps.saturating_sub(self.decay_steps).max(self.warmup_steps);
                self.between(1. - progress(done, start, self.steps))
            }
        }
    }

    /// The minimum at 0, the peak at 1, both exactly.
    fn between(&self, height: f64) -> f64 {
        match height {
            1. => self.peak,
            _ => self.min_lr + (self.peak - self.min_lr) * height,
        }
    }
}

/// How much of the way from `start` to `end` lies behind `done`, in `0..=1`.
fn progress(done: u64, start: u64, end: u64) -> f64 {
    match end.saturating_sub(start) {
        // A stretch without steps lies behind once its end is reached.
        0 => f64::from(u8::from(done > end)),
        len => (done.saturating_sub(start) as f64 / len as f64).min(1.),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(schedule: Schedule) -> LearningRate {
        LearningRate { schedule, peak: 2., min_lr: 0.5, steps: 20, warmup_steps: 4, decay_steps: 5 }
    }

    #[test]
    fn warm_up_is_a_line_that_ends_at_the_peak() {
        for schedule in [Schedule::Cosine, Schedule::Wsd, Schedule::Constant] {
            let rates: Vec<f64> = (0..4).map(|i| of(schedule).at(i)).collect();
            assert_eq!(rates, [0.5, 1., 1.5, 2.], "{schedule:?}");
        }
    }

    #[test]
    fn cosine_is_half_way_in_the_middle_and_ends_at_the_minimum() {
        let lr = of(Schedule::Cosine);
        // Updates 4..20 fall; after 8 of those 16 the cosine is at its middle.
        assert!((lr.at(11) - 1.25).abs() < 1e-12);
        assert_eq!(lr.at(19), 0.5);
        assert_eq!(lr.at(1000), 0.5);
    }

    #[test]
    fn wsd_holds_the_peak_and_then_falls_in_a_line() {
        let lr = of(Schedule::Wsd);
        assert!((3..15).all(|i| lr.at(i) == 2.));
        let fall: Vec<f64> = (15..20).map(|i| lr.at(i)).collect();
        for (got, want) in fall.iter().zip([1.7, 1.4, 1.1, 0.8, 0.5]) {
            assert!((got - want).abs() < 1e-12, "{fall:?}");
        }
        assert_eq!(lr.at(19), 0.5);
    }

    #[test]
    fn constant_stays_at_the_peak() {
        assert!((3..50).all(|i| of(Schedule::Constant).at(i) == 2.));
    }

    #[test]
    fn one_step_and_no_warm_up() {
        let lr = LearningRate { steps: 1, warmup_steps: 0, ..of(Schedule::Cosine) };
        assert_eq!(lr.at(0), 0.5);
        let lr = LearningRate { steps: 1, warmup_steps: 1, ..of(Schedule::Cosine) };
        assert_eq!(lr.at(0), 2.);
    }

    #[test]
    fn a_decay_that_overlaps_the_warm_up_starts_after_it() {
        let lr = LearningRate { warmup_steps: 12, decay_steps: 20, ..of(Schedule::Wsd) };
        assert_eq!(lr.at(11), 2.);
        assert_eq!(lr.at(19), 0.5);
    }

    proptest! {
        #[test]
        fn rates_stay_in_range_rise_once_and_never_rise_again(
            steps in 1u64..200, warmup in 0u64..200, decay in 0u64..200, cosine in any::<bool>(),
        ) {
            let schedule = if cosine { Schedule::Cosine } else { Schedule::Wsd };
            let warmup_steps = warmup.min(steps);
            let lr = LearningRate { schedule, peak: 2., min_lr: 0.5, steps, warmup_steps, decay_steps: decay.min(steps) };
            let rates: Vec<f64> = (0..steps).map(|i| lr.at(i)).collect();
            prop_assert!(rates.iter().all(|&rate| rate > 0. && rate <= 2.));
            let top = warmup_steps.saturating_sub(1) as usize;
            prop_assert!(rates[..=top].windows(2).all(|w| w[0] < w[1]));
            prop_assert!(rates[top..].windows(2).all(|w| w[0] >= w[1]));
            if warmup_steps < steps && (cosine || decay > 0) {
                prop_assert_eq!(rates[steps as usize - 1], 0.5);
            }
        }
    }
}
