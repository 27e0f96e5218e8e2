//! The gated MLP, which one kernel takes through an activation and its products, against the operations one after the other.

use flowhn_torch::testing::{Case, noise, same_bits};
use flowhn_torch::{DeviceProperties, Result};
use tch::{Device, Kind, Tensor, no_grad};

use crate::cuda::gated_mlp::GatedMlp;
use crate::{Bias, Init, Params, SwiGluMlp, swiglu};

use super::{ensure, grad_of};

/// Tokens, d_model, d_ff. On Hopper a tile of ours has 128 tokens, 128 columns of gate and of up, and 64 values of k; the last is too small.
const SHAPES: [[i64; 3]; 7] = [
    [1000, 264, 2824],
    [4100, 96, 1000],
    [300, 712, 8200],
    [129, 8, 18_000],
    [4096, 768, 2048],
    [2048, 2048, 5632],
    [33, 40, 72],
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for grad_kind in [Kind::Float, Kind::BFloat16] {
        for shape @ [n_tokens, d_model, d_ff] in SHAPES {
            let name = format!("mlp: {n_tokens} tokens, {d_model} through {d_ff}, weight gradients in {grad_kind:?}");
            cases.push(Case::new(name, move |device| check(shape, grad_kind, device)));
        }
    }
    cases
}

fn check(shape @ [n_tokens, d_model, d_ff]: [i64; 3], grad_kind: Kind, device: Device) -> Result<String> {
    // A CPU takes the operations one after the other whatever the size.
    let [n_tokens, d_ff] = if device == Device::Cpu { [n_tokens.min(70), d_ff.min(200)] } else { [n_tokens, d_ff] };
    let bf16 = |shape: &[i64], seed| noise(shape, seed).to_kind(Kind::BFloat16).to_device(device);
    let mut params = Params::new(device, 0);
    let mlp = SwiGluMlp::new(&mut params.root(), d_model, d_ff, Init::Zeros, Init::Zeros, &Bias::None)?;
    params.assign("gate_up_proj.weight", &(noise(&[2 * d_ff, d_model], 3) * (4. / (d_model as f64).sqrt())))?;
    params.assign("down_proj.weight", &(noise(&[d_model, d_ff], 4) * (d_ff as f64).powf(-0.5)))?;
    params.refresh_bf16_copies()?;
    params.use_bf16_grads(|_| grad_kind == Kind::BFloat16)?;
    // Rows of a wider tensor, as those of a branch may be.
    let wide = bf16(&[1, n_tokens, d_model + 8], 1);
    let dy = bf16(&[1, n_tokens, d_model], 2);
    let run = |fused: bool| -> Result<Vec<Tensor>> {
        params.zero_grad()?;
        let x = wide.detach().set_requires_grad(true);
        let part = x.narrow(2, 8, d_model);
        let y = match fused {
            true => mlp.forward(&part)?,
            false => mlp.down_proj().forward(&swiglu(&mlp.gate_up_proj().forward(&part)?)?)?,
        };
        (&y * &dy).sum(Kind::Float).f_backward()?;
        let mut results = vec![y.detach(), x.grad()];
        for param in params.iter() {
            results.push(grad_of(&param.weight, grad_kind)?);
        }
        Ok(results)
    };
    let (fused, again, apart) = (run(true)?, run(true)?, run(false)?);
    for (name, i) in ["y", "dx", "dgate_up", "ddown"].iter().zip(0..) {
        ensure(same_bits(&fused[i], &again[i]), || format!("{name}: two runs differ"))?;
        ensure(same_bits(&fused[i], &apart[i]), || {
            let difference = (&fused[i] - &apart[i]).abs().max().double_value(&[]);
            format!("{name} differs by up to {difference:e}, of {:e}", apart[i].abs().max().double_value(&[]))
        })?;
    }
    let without = no_grad(|| mlp.forward(wide.narrow(2, 8, d_model)))?;
    let is_fused = GatedMlp::new(&wide.narrow(2, 8, d_model), d_ff, [grad_kind; 2])?.is_some();
    ensure(is_fused || same_bits(&without, &fused[0]), || "without gradients y differs".to_owned())?;
    let difference = ((&without - &fused[0]).abs().max() / fused[0].abs().max()).double_value(&[]);
    ensure(difference <= 2f64.powi(-7), || format!("without gradients y differs by {difference:e}"))?;
    if let Device::Cuda(device_idx) = device {
        let has_kernels = DeviceProperties::of(device_idx)?.compute_capability == 90;
        let is_large = shape != SHAPES[SHAPES.len() - 1];
        ensure(is_fused == (has_kernels && is_large), || format!("by our kernels: {is_fused}"))?;
    }
    Ok("the same bits".to_owned())
}
