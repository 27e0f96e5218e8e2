//! Root-mean-square normalisation, plain and gated.

mod gated;
mod plain;

use std::fmt::Display;

use tch::{Device, Kind, Tensor};

use flowhn_torch::{Error, Result, apply, check};

use crate::cuda::norm::{GatedRmsNormCuda, ResidualNormCuda, RmsNormCuda};
use crate::rows::{check_weight_kind, no_kernel};
use crate::{Activations, Decay, Fp8Place, Init, Linear, Path, Rounding, Weight};

/// Returns `x / sqrt(mean(x^2) + eps) * weight`, the mean over the last axis (Zhang and Sennrich 2019).
///
/// Statistics are f32 (f64 for f64 inputs). As in Llama's models the normalised value is rounded to the type of `x`
/// before the weight multiplies it.
///
/// # Shapes
/// - `x`: `[.., d]`, f32, bf16 or f64 (f64 on the CPU only); copied only if its last axis is not contiguous
/// - `weight`: `[d]`, in the type of `x`, or f32 beside bf16
/// - returns a contiguous tensor like `x`
///
/// ```
/// use flowhn_nn::rms_norm;
/// use tch::Tensor;
/// let y = rms_norm(&Tensor::from_slice(&[3f32, 4.]), &Tensor::from_slice(&[1f32, 2.]), 0.)?;
/// // The root of the mean square is sqrt(12.5).
/// assert!((y.double_value(&[1]) - 8. / 12.5f64.sqrt()).abs() < 1e-6);
/// # Ok::<(), flowhn_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`], naming the argument at fault.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    const OP: &str = "rms_norm";
    check_arguments(OP, x, weight)?;
    match x.device() {
        Device::Cpu => apply(plain::RmsNormCpu { eps }, &[x, weight]).map(first),
        Device::Cuda(_) => apply(RmsNormCuda { eps }, &[x, weight]).map(first),
        other => Err(no_kernel(OP, "x", other)),
    }
}

/// Returns `x + delta` and `rms_norm(x + delta)`: the end of one sublayer and the start of the next.
///
/// On CUDA both come from one pass over the rows, and backward another one adds the gradient of the sum to that of the norm.
/// Without `delta` the sum is `x` itself: use it in the place of `x` afterwards, so that the gradients meet in that pass.
///
/// # Shapes
/// - `x`, `delta`: `[.., d]`, both f32, bf16 or f64 (f64 on the CPU only); copied only if the last axis is not contiguous
/// - `weight`: `[d]`, in the type of `x`, or f32 beside bf16
/// - returns two tensors like `x`
///
/// ```
/// use flowhn_nn::{residual_norm, rms_norm};
/// use tch::Tensor;
/// let (x, delta) = (Tensor::from_slice(&[1f32, 4.]), Tensor::from_slice(&[2f32, 0.]));
/// let weight = Tensor::from_slice(&[1f32, 2.]);
/// let (sum, normed) = residual_norm(&x, Some(&delta), &weight, 0.)?;
/// assert_eq!(sum, &x + &delta);
/// assert_eq!(normed, rms_norm(&sum, &weight, 0.)?);
/// # Ok::<(), flowhn_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`], naming the argument at fault.
pub fn residual_norm(x: &Tensor, delta: Option<&Tensor>, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    residual_norm_to(None, x, delta, weight, eps)
}

/// [`residual_norm`] with the norm left where its reader wants it: with a place, the second result stands in for what is there.
///
/// # Errors
/// Those of [`residual_norm`].
pub fn residual_norm_to(
    place: Option<Fp8Place>,
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "residual_norm";
    check_arguments(OP, x, weight)?;
    if let Some(delta) = delta {
        check::shape(OP, "delta", delta, &x.size())?;
        check::kind(OP, "delta", delta, &[x.kind()])?;
        check::device(OP, "delta", delta, x.device())?;
    }
    match x.device() {
        Device::Cpu => {
            let sum = delta.map_or_else(|| Ok(x.shallow_clone()), |delta| x.f_add(delta))?;
            let normed = apply(Rounding::new(plain::RmsNormCpu { eps }, 0, place), &[&sum, weight]).map(first)?;
            Ok((sum, normed))
        }
        Device::Cuda(_) => {
            let inputs: Vec<&Tensor> = [Some(x), Some(weight), delta].into_iter().flatten().collect();
            let mut outputs = apply(ResidualNormCuda { eps, n_inputs: inputs.len(), place }, &inputs)?;
            let normed = outputs.swap_remove(1);
            Ok((first(outputs), normed))
        }
        other => Err(no_kernel(OP, "x", other)),
    }
}

/// Returns `rms_norm(x * silu(z)) * weight` with the mean taken over each of `n_groups` equal parts of the last axis,
/// as Mamba-2 normalises its output (gate before norm).
///
/// # Shapes
/// - `x`, `z`: `[.., d]`, both f32, bf16 or f64 (f64 on the CPU only); copied only if the last axis is not contiguous
/// - `weight`: `[d]`, in the type of `x`, or f32 beside bf16
/// - returns a contiguous tensor like `x`; the only rounding to its type is the last
///
/// ```
/// use flowhn_nn::gated_rms_norm;
/// use tch::{Device, Kind, Tensor};
/// let f32_cpu = (Kind::Float, Device::Cpu);
/// tch::manual_seed(0);
/// let (x, z) = (Tensor::randn([5, 8], f32_cpu), Tensor::randn([5, 8], f32_cpu));
/// let y = gated_rms_norm(&x, &z, &Tensor::ones([8], f32_cpu), 1e-6, 2)?;
/// // Each group of four has mean square 1.
/// let squares = y.square().view([5, 2, 4]).mean_dim(2, false, Kind::Float);
/// assert!((squares - 1.).abs().max().double_value(&[]) < 1e-3);
/// # Ok::<(), flowhn_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`], naming the argument at fault; [`Error::Invalid`] if the
/// groups do not divide `d`.
pub fn gated_rms_norm(x: &Tensor, z: &Tensor, weight: &Tensor, eps: f64, n_groups: i64) -> Result<Tensor> {
    gated_rms_norm_to(None, x, z, weight, eps, n_groups)
}

/// [`gated_rms_norm`] left where its reader wants it.
fn gated_rms_norm_to(
    place: Option<Fp8Place>,
    x: &Tensor,
    z: &Tensor,
    weight: &Tensor,
    eps: f64,
    n_groups: i64,
) -> Result<Tensor> {
    const OP: &str = "gated_rms_norm";
    let d = check_arguments(OP, x, weight)?;
    check::shape(OP, "z", z, &x.size())?;
    check::kind(OP, "z", z, &[x.kind()])?;
    check::device(OP, "z", z, x.device())?;
    if n_groups < 1 || d % n_groups != 0 {
        return Err(Error::invalid(OP, format!("{n_groups} groups do not divide the last axis of {d}")));
    }
    let inputs = [x, z, weight];
    match x.device() {
        Device::Cpu => {
            let norm = gated::GatedRmsNormCpu { eps, n_groups: n_groups as usize };
            apply(Rounding::new(norm, 0, place), &inputs).map(first)
        }
        Device::Cuda(_) => apply(GatedRmsNormCuda { eps, n_groups, place }, &inputs).map(first),
        other => Err(no_kernel(OP, "x", other)),
    }
}

/// [`rms_norm`] with its weight, which clones share.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Weight,
    eps: f64,
}

impl RmsNorm {
    /// Registers `name.weight`, ones of length `d`, not decayed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is taken.
    pub fn new(path: &mut Path, name: impl Display, d: i64, eps: f64) -> Result<Self> {
        let weight = path.push(name).weight("weight", &[d], Init::Ones, Decay::No)?;
        Ok(Self { weight, eps })
    }

    /// Normalises `[.., d]`; the weight multiplies in f32 also beside bf16 activations.
    ///
    /// # Errors
    /// Those of [`rms_norm`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.beside(x.kind()), self.eps)
    }

    /// As [`residual_norm`] with this weight: `x + delta` and its norm.
    ///
    /// # Errors
    /// Those of [`residual_norm`].
    pub fn forward_residual(&self, x: &Tensor, delta: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        residual_norm(x, delta, &self.beside(x.kind()), self.eps)
    }

    /// As [`RmsNorm::forward`], with the mean taken over each of `n_groups` equal parts of the last axis.
    ///
    /// ```
    /// use flowhn_nn::{Params, RmsNorm};
    /// use tch::{Device, Kind, Tensor};
    /// let norm = RmsNorm::new(&mut Params::new(Device::Cpu, 0).root(), "norm", 8, 0.)?;
    /// tch::manual_seed(0);
    /// let x = Tensor::randn([5, 8], (Kind::Float, Device::Cpu));
    /// let halves = [x.narrow(1, 0, 4), x.narrow(1, 4, 4)].map(|half| &half / half.square().mean_dim(1, true, None).sqrt());
    /// assert!((norm.forward_groups(&x, 2)? - Tensor::cat(&halves, 1)).abs().max().double_value(&[]) < 1e-5);
    /// # Ok::<(), flowhn_nn::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`rms_norm`]; [`Error::Invalid`] if the groups do not divide `d`.
    pub fn forward_groups(&self, x: &Tensor, n_groups: i64) -> Result<Tensor> {
        const OP: &str = "rms_norm";
        let weight = self.beside(x.kind());
        let d = check_arguments(OP, x, &weight)?;
        match n_groups {
            1 => rms_norm(x, &weight, self.eps),
            _ if n_groups < 1 || d % n_groups != 0 => {
                Err(Error::invalid(OP, format!("{n_groups} groups do not divide the last axis of {d}")))
            }
            _ => {
                let ones = Tensor::f_ones([d / n_groups], (weight.kind(), x.device()))?;
                let normed = rms_norm(&x.f_unflatten(-1, [n_groups, d / n_groups])?, &ones, self.eps)?;
                Ok(normed.f_flatten(-2, -1)?.f_mul(&weight)?.f_to_kind(x.kind())?)
            }
        }
    }

    /// [`RmsNorm::forward_residual`] for one reader of the norm: where that multiplies in fp8, the kernel of the norm rounds.
    ///
    /// # Errors
    /// Those of [`residual_norm`].
    pub fn forward_residual_for(
        &self,
        reader: &Linear,
        x: &Tensor,
        delta: Option<&Tensor>,
    ) -> Result<(Tensor, Activations)> {
        let place = reader.fp8_place(&x.size(), x.kind())?;
        let (sum, normed) = residual_norm_to(place.clone(), x, delta, &self.beside(x.kind()), self.eps)?;
        Ok((sum, Activations::new(normed, place)))
    }

    /// As [`gated_rms_norm`] with this weight.
    ///
    /// # Errors
    /// Those of [`gated_rms_norm`].
    pub fn forward_gated(&self, x: &Tensor, z: &Tensor, n_groups: i64) -> Result<Tensor> {
        gated_rms_norm(x, z, &self.beside(x.kind()), self.eps, n_groups)
    }

    /// [`RmsNorm::forward_gated`] for one reader, as [`RmsNorm::forward_residual_for`].
    ///
    /// # Errors
    /// Those of [`gated_rms_norm`].
    pub fn forward_gated_for(&self, reader: &Linear, x: &Tensor, z: &Tensor, n_groups: i64) -> Result<Activations> {
        let place = reader.fp8_place(&x.size(), x.kind())?;
        let normed = gated_rms_norm_to(place.clone(), x, z, &self.beside(x.kind()), self.eps, n_groups)?;
        Ok(Activations::new(normed, place))
    }

    /// The weight, `[d]`.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The weight in the type that multiplies activations of that type: f32, or f64 beside f64.
    pub fn beside(&self, activations: Kind) -> Tensor {
        match activations {
            Kind::Double => self.weight.to(Kind::Double),
            _ => self.weight.to(Kind::Float),
        }
    }
}

/// Checks what both norms share and returns `d`.
fn check_arguments(op: &'static str, x: &Tensor, weight: &Tensor) -> Result<i64> {
    let d = match x.size().last() {
        Some(&d) if d > 0 => d,
        _ => return Err(Error::Shape { op, arg: "x", got: x.size(), want: "[.., d] with d >= 1".to_owned() }),
    };
    check::kind(op, "x", x, &[Kind::Float, Kind::BFloat16, Kind::Double])?;
    check::shape(op, "weight", weight, &[d])?;
    check_weight_kind(op, weight, x.kind())?;
    check::device(op, "weight", weight, x.device())?;
    Ok(d)
}

fn first(mut outputs: Vec<Tensor>) -> Tensor {
    outputs.swap_remove(0)
}
