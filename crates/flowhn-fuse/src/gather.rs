//! From the sequence to the branches.

// b batch, l seq_len, n and m tokens of one branch, d features

use tch::Tensor;

use flowhn_nn::RmsNorm;
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check};

use crate::{Route, pieces};

/// The tokens of one branch, in order: `y_bnd[:, j] = x_bld[:, route.positions()[j]]`.
///
/// A view of `x_bld` when the route is one span; the gradient is written once into zeros, or is the incoming one itself when
/// the route is the whole sequence.
///
/// # Shapes
/// - `x_bld`: `[batch, seq_len, d]`, any dtype and strides
/// - returns `[batch, route.len(), d]`
///
/// ```
/// use flowhn_fuse::{Route, gather};
/// use tch::{Device, Kind, Tensor};
/// let x = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([1, 6, 1]);
/// let route = Route::new(6, &[1..2, 4..6], Device::Cpu)?;
/// assert_eq!(Vec::<f32>::try_from(gather(&x, &route)?.view(-1)).unwrap(), [1., 4., 5.]);
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] if `x_bld` is not of the route's length, [`Error::Device`] if it is elsewhere.
pub fn gather(x_bld: &Tensor, route: &Route) -> Result<Tensor> {
    check_sequence("gather", x_bld, route)?;
    if route.is_all() {
        return Ok(x_bld.shallow_clone());
    }
    if route.is_empty() {
        // No token, no gradient: the branch is not on the tape.
        return pieces::take(&x_bld.detach(), route);
    }
    one(apply(Gather { route: route.clone() }, &[x_bld])?)
}

/// [`gather`], then the norm that opens the branch; the slot of a kernel that does both in one pass.
///
/// # Shapes
/// As [`gather`]; the norm is over `d`.
///
/// # Errors
/// Those of [`gather`] and of the norm.
pub fn gather_norm(x_bld: &Tensor, route: &Route, norm: &RmsNorm) -> Result<Tensor> {
    norm.forward(&gather(x_bld, route)?)
}

/// Both branches' tokens at once: `(gather(x, attn), gather(x, ssm))`, with one merged gradient instead of two padded ones
/// when the routes share out the sequence.
///
/// Where both routes are the whole sequence both results are `x_bld` itself.
///
/// # Shapes
/// - `x_bld`: `[batch, seq_len, d]`, any dtype and strides
/// - returns `[batch, attn.len(), d]` and `[batch, ssm.len(), d]`
///
/// ```
/// use flowhn_fuse::{Route, split};
/// use tch::{Device, Kind, Tensor};
/// let x = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([1, 6, 1]);
/// let (attn, ssm) = (Route::new(6, &[4..6], Device::Cpu)?, Route::new(6, &[0..4], Device::Cpu)?);
/// let (a, s) = split(&x, &attn, &ssm)?;
/// assert_eq!((a.size(), s.size()), (vec![1, 2, 1], vec![1, 4, 1]));
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] if `x_bld` is not of the routes' length, [`Error::Device`] if it is elsewhere.
pub fn split(x_bld: &Tensor, attn: &Route, ssm: &Route) -> Result<(Tensor, Tensor)> {
    check_sequence("split", x_bld, attn)?;
    check_sequence("split", x_bld, ssm)?;
    if attn.is_empty() || ssm.is_empty() || !attn.partitions_with(ssm) {
        return Ok((gather(x_bld, attn)?, gather(x_bld, ssm)?));
    }
    let mut parts = apply(Split { attn: attn.clone(), ssm: ssm.clone() }, &[x_bld])?.into_iter();
    match (parts.next(), parts.next()) {
        (Some(a), Some(s)) => Ok((a, s)),
        _ => Err(Error::invalid("split", "the function lost its outputs")),
    }
}

/// Checks that a tensor is a sequence that the route is about, where the route is.
pub(crate) fn check_sequence(op: &'static str, x_bld: &Tensor, route: &Route) -> Result<()> {
    let [batch, seq_len, d] = check::dims(op, "x_bld", x_bld, "[batch, seq_len, d]")?;
    if seq_len != route.seq_len() as i64 {
        check::shape(op, "x_bld", x_bld, &[batch, route.seq_len() as i64, d])?;
    }
    check::device(op, "x_bld", x_bld, route.device())
}

/// The one output of a function.
pub(crate) fn one(outputs: Vec<Tensor>) -> Result<Tensor> {
    outputs.into_iter().next().ok_or_else(|| Error::invalid("fuse", "the function lost its output"))
}

struct Gather {
    route: Route,
}

impl Function for Gather {
    const NAME: &'static str = "gather";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![pieces::take(inputs[0], &self.route)?])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(pieces::scatter(&grads[0], &self.route)?)])
    }
}

struct Split {
    attn: Route,
    ssm: Route,
}

impl Function for Split {
    const NAME: &'static str = "split";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![pieces::take(inputs[0], &self.attn)?, pieces::take(inputs[0], &self.ssm)?])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(pieces::interleave(&grads[0], &grads[1], &self.attn, &self.ssm)?)])
    }
}
