//! From the branches back to the sequence.

// b batch, l seq_len, n and m tokens of one branch, d features

use tch::Tensor;

use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check};

use crate::gather::{check_sequence, one};
use crate::{Route, pieces};

/// The two branches' tokens back in the order of the sequence, with one copy; the inverse of [`crate::split`].
///
/// The gradient of a branch is a view where its route is one span. If one route is the whole sequence, its branch's output is
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

/// `x_bld + merge(a, s)` in one pass over the sequence: the residual add of a block, and the slot of a kernel for it.
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
    const OP: &str = "merge_residual";
    check_branches(OP, a_bnd, s_bmd, attn, ssm)?;
    check_sequence(OP, x_bld, attn)?;
    check::kind(OP, "x_bld", x_bld, &[a_bnd.kind()])?;
    let (batch, d) = (x_bld.size()[0], x_bld.size()[2]);
    check::shape(OP, "a_bnd", a_bnd, &[batch, attn.len() as i64, d])?;
    one(apply(MergeResidual { attn: attn.clone(), ssm: ssm.clone() }, &[x_bld, a_bnd, s_bmd])?)
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
        [(0, &self.attn), (1, &self.ssm)].into_iter().map(|(i, route)| branch_grad(ctx, i, &grads[0], route)).collect()
    }
}

struct MergeResidual {
    attn: Route,
    ssm: Route,
}

impl Function for MergeResidual {
    const NAME: &'static str = "merge_residual";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let mut out = pieces::empty_like_sequence(inputs[0], self.attn.seq_len())?;
        pieces::put_sum(&mut out, inputs[0], inputs[1], &self.attn)?;
        pieces::put_sum(&mut out, inputs[0], inputs[2], &self.ssm)?;
        Ok(vec![out])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let residual = ctx.needs_grad(0).then(|| grads[0].shallow_clone());
        Ok(vec![residual, branch_grad(ctx, 1, &grads[0], &self.attn)?, branch_grad(ctx, 2, &grads[0], &self.ssm)?])
    }
}

fn branch_grad(ctx: &BackwardCtx, input_idx: usize, grad_bld: &Tensor, route: &Route) -> Result<Option<Tensor>> {
    ctx.needs_grad(input_idx).then(|| pieces::take(grad_bld, route)).transpose()
}
