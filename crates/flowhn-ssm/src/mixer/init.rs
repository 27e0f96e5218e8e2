//! How the parameters of a mixer start.

use flowhn_nn::{Init, Path};
use flowhn_torch::{Error, Result};
use rand_distr::{Distribution, Uniform};

/// The choice of initial values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SsmInit {
    /// Mamba's own: step sizes log-uniform in [0.001, 0.1], projections uniform in their fan-in, so that states remember hundreds of
    /// tokens from the start.
    #[default]
    Mamba,
    /// That of the released FlowHN script, which a base class overwrites: projections and taps normal of deviation 0.02, biases
    /// zero, so that step sizes start near 0.69 and states forget within a token or two.
    Released,
}

impl SsmInit {
    /// A projection from `d_in` features.
    pub(super) fn linear(self, d_in: i64) -> Init {
        match self {
            Self::Mamba => uniform((d_in as f64).powf(-0.5)),
            Self::Released => Init::Normal { std: 0.02 },
        }
    }

    /// The taps of the convolution.
    pub(super) fn conv_weight(self, d_conv: i64) -> Init {
        self.linear(d_conv)
    }

    /// The bias of the convolution.
    pub(super) fn conv_bias(self, d_conv: i64) -> Init {
        match self {
            Self::Mamba => uniform((d_conv as f64).powf(-0.5)),
            Self::Released => Init::Zeros,
        }
    }

    /// The bias of `n` step sizes, registered as `name`: softplus of it is log-uniform in [0.001, 0.1].
    pub(super) fn dt_bias(self, path: &Path, name: &str, n: i64) -> Result<Init> {
        if self == Self::Released {
            return Ok(Init::Zeros);
        }
        let log_dt = Uniform::new(1e-3f64.ln(), 1e-1f64.ln()).map_err(|e| Error::invalid("init", e.to_string()))?;
        let inverse_softplus = |dt: f64| dt + (-(-dt).exp_m1()).ln();
        let values = log_dt.sample_iter(path.rng(name)).take(n as usize);
        Ok(Init::Values(values.map(|log_dt| inverse_softplus(log_dt.exp()) as f32).collect()))
    }
}

fn uniform(limit: f64) -> Init {
    Init::Uniform { low: -limit, high: limit }
}
