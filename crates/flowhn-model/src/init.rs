//! How the weights of a model start.

use flowhn_nn::{Init, Params};
use flowhn_ssm::SsmInit;

use crate::config::InitKind;
use crate::{ModelConfig, Result};

/// Standard deviation of embeddings and of every matrix of the released script.
pub(crate) const STD: f64 = 0.02;

/// A projection from `d_in` features: normal with the deviation of PyTorch's default, `(3 d_in)^-1/2`, or the script's.
pub(crate) fn linear(config: &ModelConfig, d_in: i64) -> Init {
    match config.init {
        InitKind::Mamba => Init::Normal { std: (3. * d_in as f64).powf(-0.5) },
        InitKind::Released => Init::Normal { std: STD },
    }
}

/// The choice for a state-space mixer.
pub(crate) fn ssm(config: &ModelConfig) -> SsmInit {
    match config.init {
        InitKind::Mamba => SsmInit::Mamba,
        InitKind::Released => SsmInit::Released,
    }
}

/// Scales the matrices that write into the residual stream, so that its variance does not grow with depth: each of the
/// `2 n_layers` sublayers contributes its share (as in GPT-2 and Mamba). The released script does not.
pub(crate) fn scale_residual_outputs(config: &ModelConfig, params: &Params) -> Result<()> {
    if config.init == InitKind::Released {
        return Ok(());
    }
    let scale = (2. * config.n_layers as f64).powf(-0.5);
    let writers = ["o_proj.weight", "out_proj.weight", "down_proj.weight"];
    for param in params.iter().filter(|param| writers.iter().any(|name| param.name.ends_with(name))) {
        params.assign(&param.name, &param.weight.master().detach().f_mul_scalar(scale)?)?;
    }
    Ok(())
}
