//! The gated MLP, whose activation kernels of ours make inside its products, against the operations one after the other and, on the CPU, which
//! has nothing else, against the formula.

use flowhn_torch::testing::{Case, noise, same_bits};
use flowhn_torch::{DeviceProperties, Result};
use tch::{Device, Kind, Tensor, no_grad};

use crate::cuda::gated_mlp::GatedMlp;
use crate::{Bias, Init, Params, SwiGluMlp, swiglu};

use super::{ensure, grad_of, grads_add_in_place};

/// Tokens, d_model, d_ff. On Hopper a tile of ours has 128 tokens, 128 columns of gate and of up, and 64 values of k.
const SHAPES: [[i64; 3]; 8] = [
    [1000, 264, 2824],
    [4100, 96, 1000],
    [300, 712, 8200],
    [129, 8, 18_000],
    [4096, 768, 2048],
    [2048, 2048, 5632],
    // Too few tokens for our tiles, and too little to do.
    [128, 16, 40_000],
    [33, 40, 72],
];
const TOO_SMALL: [[i64; 3]; 2] = [SHAPES[6], SHAPES[7]];

/// How the gradient of y comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gradient {
    Dense,
    /// Row after column.
    Transposed,
    /// One row for all tokens.
    Expanded,
}

/// What is asked for.
#[derive(Clone, Copy)]
struct Wanted {
    dx: bool,
    dgate_up: bool,
    ddown: bool,
}

const ALL: Wanted = Wanted { dx: true, dgate_up: true, ddown: true };

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for grad_kind in [Kind::Float, Kind::BFloat16] {
        for shape @ [n_tokens, d_model, d_ff] in SHAPES {
            let name = format!("mlp: {n_tokens} tokens, {d_model} through {d_ff}, weight gradients in {grad_kind:?}");
            cases.push(Case::new(name, move |device| check(shape, grad_kind, Gradient::Dense, ALL, device)));
        }
    }
    for gradient in [Gradient::Transposed, Gradient::Expanded] {
        let name = format!("mlp: a gradient that comes {gradient:?}");
        cases.push(Case::new(name, move |device| check(SHAPES[0], Kind::Float, gradient, ALL, device)));
    }
    let parts = [
        ("x alone", Wanted { dx: true, dgate_up: false, ddown: false }),
        ("gate and up alone", Wanted { dx: false, dgate_up: true, ddown: false }),
        ("the second product alone", Wanted { dx: false, dgate_up: false, ddown: true }),
        ("x and the second product", Wanted { dx: true, dgate_up: false, ddown: true }),
    ];
    for (what, wanted) in parts {
        let name = format!("mlp: the gradient of {what}");
        let check = move |device| check(SHAPES[0], Kind::BFloat16, Gradient::Dense, wanted, device);
        cases.push(Case::new(name, check));
    }
    cases.push(Case::new("mlp: gradients of two passes, added up by their products", adds_in_place));
    cases
}

fn adds_in_place(device: Device) -> Result<String> {
    let [n_tokens, d_model, d_ff] = if device == Device::Cpu { [70, 64, 200] } else { SHAPES[4] };
    let mut params = Params::new(device, 0);
    let init = Init::Normal { std: 0.05 };
    let mlp = SwiGluMlp::new(&mut params.root(), d_model, d_ff, init.clone(), init, &Bias::None)?;
    params.refresh_bf16_copies()?;
    let x = [1, 2].map(|seed| noise(&[n_tokens, d_model], seed).to_kind(Kind::BFloat16).to_device(device));
    grads_add_in_place(&params, &|x| mlp.forward(x.shallow_clone()), [&x[0], &x[1]])
}

fn check(
    shape @ [n_tokens, d_model, d_ff]: [i64; 3],
    grad_kind: Kind,
    gradient: Gradient,
    wanted: Wanted,
    device: Device,
) -> Result<String> {
    // A CPU takes the operations one after the other whatever the size.
    let [n_tokens, d_ff] = if device == Device::Cpu { [n_tokens.min(70), d_ff.min(200)] } else { [n_tokens, d_ff] };
    let bf16 = |shape: &[i64], seed| noise(shape, seed).to_kind(Kind::BFloat16).to_device(device);
    let mut params = Params::new(device, 0);
    let mlp = SwiGluMlp::new(&mut params.root(), d_model, d_ff, Init::Zeros, Init::Zeros, &Bias::None)?;
    params.assign("gate_up_proj.weight", &(noise(&[2 * d_ff, d_model], 3) * (4. / (d_model as f64).sqrt())))?;
    params.assign("down_proj.weight", &(noise(&[d_model, d_ff], 4) * (d_ff as f64).powf(-0.5)))?;
    let projections = [(mlp.gate_up_proj(), wanted.dgate_up), (mlp.down_proj(), wanted.ddown)];
    for (projection, is_wanted) in projections {
        let _ = projection.weight().master().set_requires_grad(is_wanted);
    }
    params.refresh_bf16_copies()?;
    params.use_bf16_grads(|_| grad_kind == Kind::BFloat16)?;
    // Rows of a wider tensor, as those of a branch may be.
    let wide = bf16(&[1, n_tokens, d_model + 8], 1);
    let part = |x: &Tensor| x.narrow(2, 8, d_model);
    let dy = bf16(&[1, n_tokens, d_model], 2);
    let weighed = |y: &Tensor, dy: &Tensor| match gradient {
        Gradient::Dense => y * dy,
        Gradient::Transposed => y.transpose(1, 2).contiguous() * dy.view([1, d_model, n_tokens]),
        Gradient::Expanded => y.sum_dim_intlist(1, false, y.kind()) * dy.select(1, 0),
    };
    let run = |fused: bool| -> Result<Vec<Tensor>> {
        params.zero_grad()?;
        let x = wide.detach().set_requires_grad(wanted.dx);
        let y = match fused {
            true => mlp.forward(part(&x))?,
            false => mlp.down_proj().forward(&swiglu(&mlp.gate_up_proj().forward(part(&x))?)?)?,
        };
        weighed(&y, &dy).sum(Kind::Float).f_backward()?;
        let mut results = vec![y.detach()];
        if wanted.dx {
            results.push(x.grad());
        }
        for (projection, _) in projections.iter().filter(|(_, is_wanted)| *is_wanted) {
            results.push(grad_of(projection.weight(), grad_kind)?);
        }
        Ok(results)
    };
    let (fused, again, apart) = (run(true)?, run(true)?, run(false)?);
    for i in 0..fused.len() {
        ensure(same_bits(&fused[i], &again[i]), || format!("result {i}: two runs differ"))?;
        ensure(same_bits(&fused[i], &apart[i]), || {
            let difference = (&fused[i] - &apart[i]).abs().max().double_value(&[]);
            format!("result {i} differs by up to {difference:e}, of {:e}", apart[i].abs().max().double_value(&[]))
        })?;
    }
    if device == Device::Cpu {
        let weights = [mlp.gate_up_proj(), mlp.down_proj()].map(|projection| projection.weight().bf16());
        let [gate_up, down] = weights.map(|weight| weight.map(|weight| leaf(&weight)));
        let (x, gate_up, down) = (leaf(&part(&wide)), gate_up?, down?);
        let y = formula(&x, &gate_up, &down);
        weighed(&y, &dy.to_kind(Kind::Double)).sum(Kind::Double).f_backward()?;
        let grads = [(&x, wanted.dx), (&gate_up, wanted.dgate_up), (&down, wanted.ddown)];
        let wants = grads.iter().filter(|(_, is_wanted)| *is_wanted).map(|(leaf, _)| leaf.grad());
        // dx is that of the wider tensor.
        let got = fused.iter().map(|got| if got.size() == wide.size() { part(got) } else { got.shallow_clone() });
        for (i, (got, want)) in got.zip(std::iter::once(y.detach()).chain(wants)).enumerate() {
            let error = (got.to_kind(Kind::Double) - &want).abs().max() / want.abs().max();
            let error = error.double_value(&[]);
            ensure(error <= 2f64.powi(-6), || format!("result {i} is off by {error:.2e} of the largest value"))?;
        }
    }
    let without = no_grad(|| mlp.forward(part(&wide)))?;
    ensure(same_bits(&without, &fused[0]), || "without gradients y differs".to_owned())?;
    if let Device::Cuda(device_idx) = device {
        let has_kernels = DeviceProperties::of(device_idx)?.compute_capability == 90;
        let places = [mlp.gate_up_proj(), mlp.down_proj()].map(|projection| projection.weight().grad_place());
        let is_fused = GatedMlp::new(&part(&wide), d_ff, places)?.is_some();
        let fits = has_kernels && !TOO_SMALL.contains(&shape);
        ensure(is_fused == fits, || format!("by our kernels: {is_fused}, expected {fits}"))?;
    }
    Ok("the same bits".to_owned())
}

fn leaf(x: &Tensor) -> Tensor {
    x.detach().to_kind(Kind::Double).set_requires_grad(true)
}

fn formula(x: &Tensor, gate_up: &Tensor, down: &Tensor) -> Tensor {
    let both = x.matmul(&gate_up.tr()).chunk(2, -1);
    (both[0].silu() * &both[1]).matmul(&down.tr())
}
