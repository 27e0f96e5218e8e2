//! The gated activation of Llama's MLP and the MLP itself.

use tch::{Device, Kind, Tensor};

use flowhn_torch::cpu;
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check};

use crate::cuda::gated_mlp::GatedMlp;
use crate::cuda::swiglu::SwiGluCuda;
use crate::fp8::{Activations, MlpFp8, check_activations};
use crate::linear::meets_bf16_copy;
use crate::rows::{Rows, block_rows, for_float_kind, map_blocks, no_kernel, with_contiguous_rows};
use crate::simd::{Real, Storage, dispatch};
use crate::{Bias, Init, Linear, Path};

/// Returns `silu(gate) * up`, where `gate` is the first half of the last axis and `up` the second (Shazeer 2020).
///
/// Computed in f32 (f64 for f64 inputs) and rounded once.
///
/// # Shapes
/// - `gate_up`: `[.., 2 f]`, f32, bf16 or f64 (f64 on the CPU only); copied only if its last axis is not contiguous
/// - returns `[.., f]`, contiguous, in the type of `gate_up`
///
/// ```
/// use flowhn_nn::swiglu;
/// use tch::Tensor;
/// let y = swiglu(&Tensor::from_slice(&[0f32, 100., 2., 3.]))?;
/// assert_eq!(Vec::<f32>::try_from(y).unwrap(), [0., 300.]);
/// # Ok::<(), flowhn_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`].
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    check::kind(OP, "gate_up", gate_up, &[Kind::Float, Kind::BFloat16, Kind::Double])?;
    match gate_up.size().last() {
        Some(&width) if width > 0 && width % 2 == 0 => {}
        _ => {
            let want = "[.., 2 f] with f >= 1".to_owned();
            return Err(Error::Shape { op: OP, arg: "gate_up", got: gate_up.size(), want });
        }
    }
    let mut outputs = match gate_up.device() {
        Device::Cpu => apply(SwiGluCpu, &[gate_up])?,
        Device::Cuda(_) => apply(SwiGluCuda, &[gate_up])?,
        other => return Err(no_kernel(OP, "gate_up", other)),
    };
    Ok(outputs.swap_remove(0))
}

/// `down(silu(gate(x)) * up(x))` with the two input projections merged into one product.
#[derive(Debug)]
pub struct SwiGluMlp {
    gate_up_proj: Linear,
    down_proj: Linear,
}

impl SwiGluMlp {
    /// Registers `gate_up_proj.weight`, `[2 d_ff, d_model]` with the gate's rows first, and `down_proj.weight`,
    /// `[d_model, d_ff]`; with a bias also `gate_up_proj.bias` and `down_proj.bias`.
    ///
    /// ```
    /// use flowhn_nn::{Bias, Init, Params, SwiGluMlp};
    /// use tch::{Device, Kind, Tensor};
    /// let mut params = Params::new(Device::Cpu, 0);
    /// let init = Init::Normal { std: 0.02 };
    /// let mlp = SwiGluMlp::new(&mut params.root().push("mlp"), 8, 24, init.clone(), init, &Bias::None)?;
    /// assert_eq!(mlp.forward(&Tensor::randn([2, 5, 8], (Kind::Float, Device::Cpu)))?.size(), [2, 5, 8]);
    /// assert!(params.get("mlp.gate_up_proj.weight").is_some());
    /// # Ok::<(), flowhn_nn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] if a name is taken or the initial values do not fit.
    pub fn new(path: &mut Path, d_model: i64, d_ff: i64, init_in: Init, init_out: Init, bias: &Bias) -> Result<Self> {
        Ok(Self {
            gate_up_proj: Linear::new(path, "gate_up_proj", d_model, 2 * d_ff, init_in, bias.clone())?,
            down_proj: Linear::new(path, "down_proj", d_ff, d_model, init_out, bias.clone())?,
        })
    }

    /// Maps `[.., d_model]` to `[.., d_model]`, in the type of `x`.
    ///
    /// # Errors
    /// Those of [`Linear::forward`] and [`swiglu`].
    pub fn forward(&self, x: impl Into<Activations>) -> Result<Tensor> {
        let (x, gate_up, down) = (x.into(), &self.gate_up_proj, &self.down_proj);
        if gate_up.bias().is_none()
            && let (Some(gate_up_factors), Some(down_factors)) = (gate_up.weight().fp8()?, down.weight().fp8()?)
        {
            let (x, place) = x.into_parts();
            check_activations(&x, gate_up.weight())?;
            let inputs = [&x, gate_up.weight().grad_leaf(), down.weight().grad_leaf()];
            let y = apply(MlpFp8::new(gate_up_factors, down_factors, place), &inputs)?.swap_remove(0);
            return Ok(down.bias().map(|bias| y.f_add(&bias.to(y.kind()))).transpose()?.unwrap_or(y));
        }
        if let Some(y) = self.gated(&x)? {
            return Ok(y);
        }
        down.forward(&swiglu(&gate_up.forward(x)?)?)
    }

    /// [`SwiGluMlp::forward`] where the kernels of [`GatedMlp`] can do it.
    fn gated(&self, x: &Activations) -> Result<Option<Tensor>> {
        let projections = [&self.gate_up_proj, &self.down_proj];
        let fits = |linear: &&Linear| {
            linear.bias().is_none() && !linear.weight().takes_fp8() && meets_bf16_copy(x.tensor(), linear.weight())
        };
        let [gate_up, down] = projections.map(Linear::weight);
        // What has another width is refused by the operations one after the other.
        if !projections.iter().all(fits) || x.tensor().size().last() != gate_up.size().last() {
            return Ok(None);
        }
        let (x, d_ff, grads) = (x.values()?, down.size()[1], [gate_up.grad_place(), down.grad_place()]);
        let Some(function) = GatedMlp::new(x, d_ff, grads)? else { return Ok(None) };
        let inputs = [x, gate_up.grad_leaf(), down.grad_leaf(), &gate_up.bf16()?, &down.bf16()?];
        Ok(Some(apply(function, &inputs)?.swap_remove(0)))
    }

    /// The projection to gate and up.
    pub fn gate_up_proj(&self) -> &Linear {
        &self.gate_up_proj
    }

    /// The projection back.
    pub fn down_proj(&self) -> &Linear {
        &self.down_proj
    }
}

/// The gradient of `gate_up` from that of [`swiglu`], on the CPU or a CUDA device.
pub(crate) fn swiglu_grad(gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
    match gate_up.device() {
        Device::Cuda(_) => SwiGluCuda::grad(gate_up, dy),
        _ => SwiGluCpu::grad(gate_up, dy),
    }
}

struct SwiGluCpu;

impl SwiGluCpu {
    fn grad(gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (gate_up, dy) = (with_contiguous_rows(gate_up), with_contiguous_rows(dy));
        for_float_kind!(Self::NAME, "gate_up", gate_up.kind(), T => backward::<T>(&gate_up, &dy))
    }
}

impl Function for SwiGluCpu {
    const NAME: &'static str = "swiglu";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let gate_up = with_contiguous_rows(inputs[0]);
        if ctx.is_recorded() {
            ctx.save(inputs[0]);
        }
        let y = for_float_kind!(Self::NAME, "gate_up", gate_up.kind(), T => forward::<T>(&gate_up))?;
        Ok(vec![y])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(Self::grad(&ctx.saved()[0], &grads[0])?)])
    }
}

fn forward<T: Storage>(gate_up: &Tensor) -> Result<Tensor> {
    let rows = Rows::<T>::new(gate_up)?;
    let mut shape = gate_up.size();
    let f = half_of_last(&mut shape);
    let block = block_rows(rows.n_rows());
    Ok(cpu::build(&shape, |y: &mut [T]| {
        map_blocks(y, block * f, |block_idx, y| {
            dispatch(
                #[inline(always)]
                || {
                    for (i, y) in y.chunks_exact_mut(f).enumerate() {
                        let (gate, up) = rows.row(block_idx * block + i).split_at(f);
                        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                            *y = T::narrow(gate.widen().silu() * up.widen());
                        }
                    }
                },
            );
        });
    }))
}

/// `dgate = dy up silu'(gate)`, `dup = dy silu(gate)`.
fn backward<T: Storage>(gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (rows, dy_rows) = (Rows::<T>::new(gate_up)?, Rows::<T>::new(dy)?);
    let f = half_of_last(&mut gate_up.size());
    let block = block_rows(rows.n_rows());
    Ok(cpu::build(&gate_up.size(), |grad: &mut [T]| {
        map_blocks(grad, block * 2 * f, |block_idx, grad| {
            dispatch(
                #[inline(always)]
                || {
                    for (i, grad) in grad.chunks_exact_mut(2 * f).enumerate() {
                        let row_idx = block_idx * block + i;
                        let (gate, up) = rows.row(row_idx).split_at(f);
                        let (dgate, dup) = grad.split_at_mut(f);
                        let (dy, up, dup) = (&dy_rows.row(row_idx)[..f], &up[..f], &mut dup[..f]);
                        for i in 0..f {
                            let (value, slope) = gate[i].widen().silu_and_derivative();
                            let dy = dy[i].widen();
                            dgate[i] = T::narrow(dy * up[i].widen() * slope);
                            dup[i] = T::narrow(dy * value);
                        }
                    }
                },
            );
        });
    }))
}

/// Halves the last axis and returns its new size.
fn half_of_last(shape: &mut [i64]) -> usize {
    let Some(last) = shape.last_mut() else { return 0 };
    *last /= 2;
    *last as usize
}
