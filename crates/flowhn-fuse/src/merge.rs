//! From the branches back to the sequence.

// b batch, l seq_len, n and m tokens of one branch, d features

use tch::Tensor;

use flowhn_nn::{Activations, Fp8Place, Linear, Residual, RmsNorm, residual_norm};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check};

use crate::cuda::MergeResidualNorm;
use crate::gather::{check_sequence, norm_weight, one};
use crate::{Route, cuda, pieces};

/// The two branches' tokens back in the order of the sequence, with one copy; the inverse of [`crate::split`].
///
/// If one route is the whole sequence, its branch's output is
/// returned as it is.
///
/// # Shapes
/// - `a_bnd`: `[batch, attn.len(), d]`, `s_bmd`: `[batch, ssm.len(), d]`, of one dtype, any strides
/// - returns `[batch, seq_len, d]`
///
/// ```
/// use flowhn_fuse::{Route, merge};
/// use tch::{Device, Tensor};
/// let (attn, ssm) = (Route::new(3, &[1..2], Device::Cpu)?, Route::new(3, &[0..1, 2..3], Device::Cpu)?);
/// let a = Tensor::from_slice(&[20f32]).view([1, 1, 1]);
/// let s = Tensor::from_slice(&[1f32, 3.]).view([1, 2, 1]);
/// assert_eq!(Vec::<f32>::try_from(merge(&a, &s, &attn, &ssm)?.view(-1)).unwrap(), [1., 20., 3.]);
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// [`Error::Invalid`] unless the routes share out the sequence, [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`] if a
/// branch's output is not what its route says.
pub fn merge(a_bnd: &Tensor, s_bmd: &Tensor, attn: &Route, ssm: &Route) -> Result<Tensor> {
    check_branches("merge", a_bnd, s_bmd, attn, ssm)?;
    if ssm.is_empty() {
        return Ok(a_bnd.shallow_clone());
    }
    if attn.is_empty() {
        return Ok(s_bmd.shallow_clone());
    }
    one(apply(Merge { attn: attn.clone(), ssm: ssm.clone() }, &[a_bnd, s_bmd])?)
}

/// `merge(a.sum(), s.sum())`: what the branches' last sublayers add, and the merge, on CUDA in one pass over the sequence.
///
/// # Shapes
/// As [`merge`], also for what is added.
///
/// ```
/// use flowhn_fuse::{Route, merge_sums};
/// use flowhn_nn::Residual;
/// use tch::{Device, Tensor};
/// let (attn, ssm) = (Route::new(3, &[1..2], Device::Cpu)?, Route::new(3, &[0..1, 2..3], Device::Cpu)?);
/// let a = Residual { x: Tensor::from_slice(&[20f32]).view([1, 1, 1]), change: Some(Tensor::ones([1, 1, 1], tch::kind::FLOAT_CPU)) };
/// let s = Residual::of(Tensor::from_slice(&[1f32, 3.]).view([1, 2, 1]));
/// assert_eq!(Vec::<f32>::try_from(merge_sums(&a, &s, &attn, &ssm)?.view(-1)).unwrap(), [1., 21., 3.]);
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// As [`merge`], also for what is added.
pub fn merge_sums(a: &Residual, s: &Residual, attn: &Route, ssm: &Route) -> Result<Tensor> {
    const OP: &str = "merge_sums";
    let (Some(da_bnd), Some(ds_bmd), true) = (&a.change, &s.change, a.x.device().is_cuda()) else {
        return merge(&a.sum()?, &s.sum()?, attn, ssm);
    };
    check_branches(OP, &a.x, &s.x, attn, ssm)?;
    check_branches(OP, da_bnd, ds_bmd, attn, ssm)?;
    check::shape(OP, "change of a_bnd", da_bnd, &a.x.size())?;
    check::kind(OP, "change of a_bnd", da_bnd, &[a.x.kind()])?;
    if attn.is_empty() || ssm.is_empty() {
        return merge(&a.sum()?, &s.sum()?, attn, ssm);
    }
    let function = MergeSums { attn: attn.clone(), ssm: ssm.clone(), is_read_in_fp8: false, place: None };
    one(apply(function, &[&a.x, &s.x, da_bnd, ds_bmd])?)
}

/// [`merge_sums`] for one reader: what that multiplies in fp8 is rounded in the same pass where the tokens of a branch are neighbours,
/// and gradients are then handed to the branches as views, since what rounds them takes those as they are.
pub(crate) fn merge_sums_for(
    reader: &Linear,
    a: &Residual,
    s: &Residual,
    attn: &Route,
    ssm: &Route,
) -> Result<Activations> {
    let in_one_pass = || -> Result<Option<Activations>> {
        let (Some(da_bnd), Some(ds_bmd), true) = (&a.change, &s.change, cuda::rounds_merge(a, s, attn, ssm)) else {
            return Ok(None);
        };
        let shape = [a.x.size()[0], attn.seq_len() as i64, a.x.size()[2]];
        let Some(place) = reader.fp8_place(&shape, a.x.kind())? else { return Ok(None) };
        let (attn, ssm, place) = (attn.clone(), ssm.clone(), Some(place));
        let function = MergeSums { attn, ssm, is_read_in_fp8: true, place: place.clone() };
        Ok(Some(Activations::new(one(apply(function, &[&a.x, &s.x, da_bnd, ds_bmd])?)?, place)))
    };
    match in_one_pass()? {
        Some(merged) => Ok(merged),
        None => Ok(merge_sums(a, s, attn, ssm)?.into()),
    }
}

/// The sums of two branches that both read every token, features side by side: `[batch, seq_len, 2 d]`.
pub(crate) fn concat_sums(first: &Residual, second: &Residual) -> Result<Tensor> {
    const OP: &str = ConcatSums::NAME;
    let (Some(change0), Some(change1), true) = (&first.change, &second.change, first.x.device().is_cuda()) else {
        return Ok(Tensor::f_cat(&[first.sum()?, second.sum()?], -1)?);
    };
    for (arg, x) in [("second", &second.x), ("change of the first", change0), ("change of the second", change1)] {
        check::shape(OP, arg, x, &first.x.size())?;
        check::kind(OP, arg, x, &[first.x.kind()])?;
    }
    one(apply(ConcatSums, &[&first.x, &second.x, change0, change1])?)
}

/// `x_bld + merge(a, s)` in one pass over the sequence: the residual add of a block.
///
/// # Shapes
/// - `x_bld`: `[batch, seq_len, d]`, the rest as in [`merge`], of the same dtype
/// - returns `[batch, seq_len, d]`
///
/// ```
/// use flowhn_fuse::{Route, merge_residual};
/// use tch::{Device, Kind, Tensor};
/// let (attn, ssm) = (Route::new(3, &[1..2], Device::Cpu)?, Route::new(3, &[0..1, 2..3], Device::Cpu)?);
/// let x = Tensor::ones([1, 3, 1], (Kind::Float, Device::Cpu));
/// let a = Tensor::from_slice(&[20f32]).view([1, 1, 1]);
/// let s = Tensor::from_slice(&[1f32, 3.]).view([1, 2, 1]);
/// assert_eq!(Vec::<f32>::try_from(merge_residual(&x, &a, &s, &attn, &ssm)?.view(-1)).unwrap(), [2., 21., 4.]);
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// As [`merge`], also for `x_bld`.
pub fn merge_residual(x_bld: &Tensor, a_bnd: &Tensor, s_bmd: &Tensor, attn: &Route, ssm: &Route) -> Result<Tensor> {
    check_residual("merge_residual", x_bld, a_bnd, s_bmd, attn, ssm)?;
    one(apply(MergeResidual { attn: attn.clone(), ssm: ssm.clone() }, &[x_bld, a_bnd, s_bmd])?)
}

/// [`merge_residual`] and the norm of its result: `x + merge(a, s)` and `norm(x + merge(a, s))`. On CUDA one pass over the
/// sequence, and backward one more that adds both gradients and hands the branches theirs in their own order.
///
/// # Shapes
/// As [`merge_residual`]; the norm is over `d`.
///
/// ```
/// use flowhn_fuse::{Route, merge_residual_norm};
/// use flowhn_nn::{Params, RmsNorm};
/// use tch::{Device, Kind, Tensor};
/// let mut params = Params::new(Device::Cpu, 0);
/// let norm = RmsNorm::new(&mut params.root(), "norm", 1, 0.)?;
/// let (attn, ssm) = (Route::new(3, &[1..2], Device::Cpu)?, Route::new(3, &[0..1, 2..3], Device::Cpu)?);
/// let x = Tensor::ones([1, 3, 1], (Kind::Float, Device::Cpu));
/// let a = Tensor::from_slice(&[20f32]).view([1, 1, 1]);
/// let s = Tensor::from_slice(&[1f32, 3.]).view([1, 2, 1]);
/// let (sum, normed) = merge_residual_norm(&x, &a, &s, &attn, &ssm, &norm)?;
/// assert_eq!(Vec::<f32>::try_from(sum.view(-1)).unwrap(), [2., 21., 4.]);
/// assert_eq!(Vec::<f32>::try_from(normed.view(-1)).unwrap(), [1., 1., 1.]);
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// As [`merge_residual`], and those of the norm.
pub fn merge_residual_norm(
    x_bld: &Tensor,
    a_bnd: &Tensor,
    s_bmd: &Tensor,
    attn: &Route,
    ssm: &Route,
    norm: &RmsNorm,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "merge_residual_norm";
    check_residual(OP, x_bld, a_bnd, s_bmd, attn, ssm)?;
    normed_merge(x_bld, a_bnd, s_bmd, attn, ssm, &norm_weight(OP, x_bld, norm)?, norm.eps())
}

/// [`merge_residual_norm`] with the weight at hand.
pub(crate) fn normed_merge(
    x_bld: &Tensor,
    a_bnd: &Tensor,
    s_bmd: &Tensor,
    attn: &Route,
    ssm: &Route,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    if !x_bld.device().is_cuda() {
        let sum_bld = merge_residual(x_bld, a_bnd, s_bmd, attn, ssm)?;
        return residual_norm(&sum_bld, None, weight, eps);
    }
    let function = MergeResidualNorm { attn: attn.clone(), ssm: ssm.clone(), eps };
    let mut outputs = apply(function, &[x_bld, a_bnd, s_bmd, weight])?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(sum_bld), Some(normed_bld)) => Ok((sum_bld, normed_bld)),
        _ => Err(Error::invalid("merge_residual_norm", "the function lost its outputs")),
    }
}

fn check_residual(
    op: &'static str,
    x_bld: &Tensor,
    a_bnd: &Tensor,
    s_bmd: &Tensor,
    attn: &Route,
    ssm: &Route,
) -> Result<()> {
    check_branches(op, a_bnd, s_bmd, attn, ssm)?;
    check_sequence(op, x_bld, attn)?;
    check::kind(op, "x_bld", x_bld, &[a_bnd.kind()])?;
    let (batch, d) = (x_bld.size()[0], x_bld.size()[2]);
    check::shape(op, "a_bnd", a_bnd, &[batch, attn.len() as i64, d])
}

fn check_branches(op: &'static str, a_bnd: &Tensor, s_bmd: &Tensor, attn: &Route, ssm: &Route) -> Result<()> {
    if !attn.partitions_with(ssm) {
        let message = format!(
            "the routes must share out the sequence, but attn reads {:?} and ssm reads {:?} of {} and {} tokens",
            attn.spans(),
            ssm.spans(),
            attn.seq_len(),
            ssm.seq_len()
        );
        return Err(Error::invalid(op, message));
    }
    let [batch, _, d] = check::dims(op, "a_bnd", a_bnd, "[batch, n, d]")?;
    check::shape(op, "a_bnd", a_bnd, &[batch, attn.len() as i64, d])?;
    check::shape(op, "s_bmd", s_bmd, &[batch, ssm.len() as i64, d])?;
    check::kind(op, "s_bmd", s_bmd, &[a_bnd.kind()])?;
    check::device(op, "a_bnd", a_bnd, attn.device())?;
    check::device(op, "s_bmd", s_bmd, ssm.device())
}

struct Merge {
    attn: Route,
    ssm: Route,
}

impl Function for Merge {
    const NAME: &'static str = "merge";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![pieces::interleave(inputs[0], inputs[1], &self.attn, &self.ssm)?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        branch_grads(ctx, 0, &grads[0], &self.attn, &self.ssm).map(Vec::from)
    }
}

/// On CUDA only.
struct MergeSums {
    attn: Route,
    ssm: Route,
    is_read_in_fp8: bool,
    /// Where the merged tokens go, until they are there.
    place: Option<Fp8Place>,
}

impl Function for MergeSums {
    const NAME: &'static str = "merge_sums";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let [a_bnd, s_bmd, da_bnd, ds_bmd] = inputs else { unreachable!("four inputs") };
        let (branches, changes) = ([*a_bnd, *s_bmd], [*da_bnd, *ds_bmd]);
        Ok(vec![match self.place.take() {
            Some(place) => cuda::merge_sums_fp8(branches, changes, &self.attn, &self.ssm, &place)?,
            None => cuda::merge_sums(branches, changes, &self.attn, &self.ssm)?,
        }])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let take = if self.is_read_in_fp8 { pieces::take_both } else { pieces::take_grads };
        let (a_bnd, s_bmd) = take(&grads[0], &self.attn, &self.ssm)?;
        Ok(vec![Some(a_bnd.shallow_clone()), Some(s_bmd.shallow_clone()), Some(a_bnd), Some(s_bmd)])
    }
}

/// On CUDA only.
struct ConcatSums;

impl Function for ConcatSums {
    const NAME: &'static str = "concat_sums";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let [first, second, change0, change1] = inputs else { unreachable!("four inputs") };
        Ok(vec![cuda::concat_sums([first, second], [change0, change1])?])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let d = grads[0].size()[2] / 2;
        let (first, second) = (grads[0].f_narrow(2, 0, d)?, grads[0].f_narrow(2, d, d)?);
        Ok(vec![Some(first.shallow_clone()), Some(second.shallow_clone()), Some(first), Some(second)])
    }
}

struct MergeResidual {
    attn: Route,
    ssm: Route,
}

impl Function for MergeResidual {
    const NAME: &'static str = "merge_residual";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![pieces::interleave_sum(inputs[0], inputs[1], inputs[2], &self.attn, &self.ssm)?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let residual = ctx.needs_grad(0).then(|| grads[0].shallow_clone());
        let [attn, ssm] = branch_grads(ctx, 1, &grads[0], &self.attn, &self.ssm)?;
        Ok(vec![residual, attn, ssm])
    }
}

/// The branches' parts of a gradient, if inputs `first` and `first + 1` want them.
fn branch_grads(
    ctx: &BackwardCtx,
    first: usize,
    grad_bld: &Tensor,
    attn: &Route,
    ssm: &Route,
) -> Result<[Option<Tensor>; 2]> {
    match (ctx.needs_grad(first), ctx.needs_grad(first + 1)) {
        (true, true) => pieces::take_grads(grad_bld, attn, ssm).map(|(a_bnd, s_bmd)| [Some(a_bnd), Some(s_bmd)]),
        (true, false) => Ok([Some(pieces::take(grad_bld, attn)?), None]),
        (false, true) => Ok([None, Some(pieces::take(grad_bld, ssm)?)]),
        (false, false) => Ok([None, None]),
    }
}
