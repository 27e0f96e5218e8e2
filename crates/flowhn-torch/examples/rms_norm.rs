//! A hand-written RMSNorm inside a small trained network: check its gradient, then watch the loss fall.
//!
//! `cargo run --package flowhn-torch --example rms_norm` (`LD_LIBRARY_PATH` names the folder of libtorch unless the linker knows
//! it).

// b batch, d width

use flowhn_torch::op::{self, Arg};
use flowhn_torch::testing::gradcheck;
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply};
use tch::{Device, Kind, Tensor};

/// `y = x / sqrt(mean(x^2) + eps) * w` over the last axis.
struct RmsNorm {
    eps: f64,
}

impl Function for RmsNorm {
    const NAME: &'static str = "rms_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let [x_bd, w_d] = inputs else { return Err(Error::invalid(Self::NAME, "takes x and w")) };
        let inv_rms_b1 = (mean_last(&(*x_bd * *x_bd)) + self.eps).rsqrt();
        let y_bd = *x_bd * &inv_rms_b1 * *w_d;
        for tensor in [*x_bd, *w_d, &inv_rms_b1] {
            ctx.save(tensor);
        }
        Ok(vec![y_bd])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x_bd, w_d, inv_rms_b1] = ctx.saved() else {
            return Err(Error::invalid(Self::NAME, "saves three tensors"));
        };
        let x_hat_bd = x_bd * inv_rms_b1;
        let dx_bd = ctx.needs_grad(0).then(|| {
            let g_bd = &grads[0] * w_d;
            let along_b1 = mean_last(&(&g_bd * &x_hat_bd));
            inv_rms_b1 * (g_bd - &x_hat_bd * along_b1)
        });
        let dw_d =
            ctx.needs_grad(1).then(|| (&grads[0] * &x_hat_bd).sum_dim_intlist([0i64].as_slice(), false, w_d.kind()));
        Ok(vec![dx_bd, dw_d])
    }
}

fn mean_last(x: &Tensor) -> Tensor {
    x.mean_dim([-1i64].as_slice(), true, x.kind())
}

fn norm(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    Ok(apply(RmsNorm { eps: 1e-6 }, &[x, w])?.remove(0))
}

fn main() -> Result<()> {
    tch::manual_seed(1);
    let random = |size: &[i64], kind| Tensor::randn(size, (kind, Device::Cpu));

    let inputs = [random(&[4, 6], Kind::Double), random(&[6], Kind::Double)].map(|x| x.set_requires_grad(true));
    gradcheck(|x| norm(&x[0], &x[1]), &inputs, 1e-6, 1e-7)?;
    println!("the gradient agrees with difference quotients");

    // A network that must find the weights of another one. The optimiser is one fused operator, called by name.
    let (d, x_bd) = (16, random(&[256, 16], Kind::Float));
    let target_b1 = norm(&x_bd, &random(&[d], Kind::Float))?.tanh().matmul(&random(&[d, 1], Kind::Float));
    let params = [Tensor::ones([d], (Kind::Float, Device::Cpu)), random(&[d, 1], Kind::Float) * 0.1]
        .map(|param| param.set_requires_grad(true));
    let mut optimiser = AdamW::new(&params);
    for step in 0..=200 {
        let predicted_b1 = norm(&x_bd, &params[0])?.tanh().matmul(&params[1]);
        let loss = predicted_b1.mse_loss(&target_b1, tch::Reduction::Mean);
        let grads = Tensor::f_run_backward(&[&loss], &params, false, false)?;
        optimiser.step(&params, &grads)?;
        if step % 40 == 0 {
            println!("step {step:3}  loss {:.4}", loss.double_value(&[]));
        }
    }
    Ok(())
}

/// AdamW over all parameters in one call.
struct AdamW {
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl AdamW {
    fn new(params: &[Tensor]) -> Self {
        let zeros = || params.iter().map(|param| param.detach().zeros_like()).collect();
        let step = |_| Tensor::zeros([] as [i64; 0], (Kind::Float, Device::Cpu));
        Self { first: zeros(), second: zeros(), steps: params.iter().map(step).collect() }
    }

    fn step(&mut self, params: &[Tensor], grads: &[Tensor]) -> Result<()> {
        fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
            tensors.iter().collect()
        }
        for step in &mut self.steps {
            *step += 1.;
        }
        let lists = [params, grads, &self.first, &self.second, &[], &self.steps].map(refs);
        let mut args: Vec<Arg> = lists.iter().map(|list| Arg::Tensors(list)).collect();
        let (lr, beta1, beta2, weight_decay, eps) = (0.03, 0.9, 0.95, 0., 1e-8);
        args.extend([lr, beta1, beta2, weight_decay, eps].map(Arg::Double));
        args.extend([Arg::Bool(false), Arg::Bool(false)]); // amsgrad, maximize
        tch::no_grad(|| op::call("aten::_fused_adamw_", "", &args))?;
        Ok(())
    }
}
