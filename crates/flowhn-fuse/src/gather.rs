//! From the sequence to the branches.

// b batch, l seq_len, n and m tokens of one branch, d features

use tch::Tensor;

use flowhn_nn::{Activations, Fp8Place, Linear, RmsNorm, residual_norm, residual_norm_to, rms_norm};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check};

use crate::cuda::{GatherNorm, SplitNorm, TwinNorm};
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

/// [`gather`], then the norm that opens the branch: on CUDA one pass over the branch's tokens, forward and backward.
///
/// # Shapes
/// As [`gather`]; the norm is over `d`.
///
/// # Errors
/// Those of [`gather`] and of the norm.
pub fn gather_norm(x_bld: &Tensor, route: &Route, norm: &RmsNorm) -> Result<Tensor> {
    const OP: &str = "gather_norm";
    check_sequence(OP, x_bld, route)?;
    normed_gather(x_bld, route, &norm_weight(OP, x_bld, norm)?, norm.eps())
}

/// [`gather_norm`] with the weight at hand.
pub(crate) fn normed_gather(x_bld: &Tensor, route: &Route, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x_bld.device().is_cuda() || route.is_all() || route.is_empty() {
        return rms_norm(&gather(x_bld, route)?, weight, eps);
    }
    one(apply(GatherNorm { route: route.clone(), eps }, &[x_bld, weight])?)
}

/// What [`split_norm`] returns.
#[derive(Debug)]
pub struct SplitNormed {
    /// `x + delta`, or `x` where nothing is added: `[batch, seq_len, d]`.
    pub sum_bld: Tensor,
    /// The attention branch's tokens, normed: `[batch, attn.len(), d]`.
    pub attn_bnd: Tensor,
    /// The state-space branch's tokens, normed: `[batch, ssm.len(), d]`.
    pub ssm_bmd: Tensor,
}

/// `x + delta`, and of its tokens both branches', each through the norm that opens the branch.
///
/// On CUDA one pass over the sequence forward and one backward, if the routes share out the sequence, or both take all of it and a token has
/// at most 4,096 features, and the norms agree in what they add to the mean square. Use the sum in the place of `x` afterwards, also without `delta`: its gradient is then
/// added to those of the norms in the same pass.
///
/// # Shapes
/// - `x_bld`, `delta_bld`: `[batch, seq_len, d]`, of one dtype, any strides; the norms are over `d`
///
/// ```
/// use flowhn_fuse::{Route, split_norm};
/// use flowhn_nn::{Params, RmsNorm};
/// use tch::{Device, Kind, Tensor};
/// let mut params = Params::new(Device::Cpu, 0);
/// let norm = RmsNorm::new(&mut params.root(), "norm", 1, 0.)?;
/// let x = Tensor::ones([1, 3, 1], (Kind::Float, Device::Cpu));
/// let (attn, ssm) = (Route::new(3, &[2..3], Device::Cpu)?, Route::new(3, &[0..2], Device::Cpu)?);
/// let normed = split_norm(&x, Some(&x), &attn, &ssm, &norm, &norm)?;
/// assert_eq!(normed.sum_bld, &x * 2.);
/// assert_eq!((normed.attn_bnd.size(), normed.ssm_bmd.size()), (vec![1, 1, 1], vec![1, 2, 1]));
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// Those of [`split`] and of the norms; [`Error::Shape`] and its kin for `delta_bld`.
pub fn split_norm(
    x_bld: &Tensor,
    delta_bld: Option<&Tensor>,
    attn: &Route,
    ssm: &Route,
    attn_norm: &RmsNorm,
    ssm_norm: &RmsNorm,
) -> Result<SplitNormed> {
    let norms = [attn_norm, ssm_norm];
    let [attn_weight, ssm_weight] = checked_weights("split_norm", x_bld, delta_bld, [attn, ssm], norms)?;
    normed_split(x_bld, delta_bld, attn, ssm, [&attn_weight, &ssm_weight], norms.map(RmsNorm::eps))
}

/// [`split_norm`] with the weights at hand, attention's first.
pub(crate) fn normed_split(
    x_bld: &Tensor,
    delta_bld: Option<&Tensor>,
    attn: &Route,
    ssm: &Route,
    weights: [&Tensor; 2],
    eps: [f64; 2],
) -> Result<SplitNormed> {
    if is_twin(x_bld, attn, ssm, eps) {
        let [sum_bld, attn_bnd, ssm_bmd] = apply_twin_norm(x_bld, delta_bld, weights, eps[0], false)?;
        return Ok(SplitNormed { sum_bld, attn_bnd, ssm_bmd });
    }
    if attn.is_all() && ssm.is_all() {
        let (sum_bld, attn_bnd) = residual_norm(x_bld, delta_bld, weights[0], eps[0])?;
        let (sum_bld, ssm_bmd) = residual_norm(&sum_bld, None, weights[1], eps[1])?;
        return Ok(SplitNormed { sum_bld, attn_bnd, ssm_bmd });
    }
    if !is_fused(x_bld, attn, ssm, eps) {
        let sum_bld = delta_bld.map_or_else(|| Ok(x_bld.shallow_clone()), |delta| x_bld.f_add(delta))?;
        let (a_bnd, s_bmd) = split(&sum_bld, attn, ssm)?;
        let attn_bnd = rms_norm(&a_bnd, weights[0], eps[0])?;
        return Ok(SplitNormed { attn_bnd, ssm_bmd: rms_norm(&s_bmd, weights[1], eps[1])?, sum_bld });
    }
    let [sum_bld, attn_bnd, ssm_bmd] = apply_split_norm(x_bld, delta_bld, attn, ssm, weights, eps[0], None)?;
    Ok(SplitNormed { sum_bld, attn_bnd, ssm_bmd })
}

/// What [`split_norm_tokens`] returns.
#[derive(Debug)]
pub struct SplitTokens {
    /// `x + delta`, or `x` where nothing is added: `[batch, seq_len, d]`.
    pub sum_bld: Tensor,
    /// The attention branch's tokens of the sum: `[batch, attn.len(), d]`.
    pub attn_bnd: Tensor,
    /// The same, normed.
    pub attn_normed: Activations,
    /// The state-space branch's tokens of the sum: `[batch, ssm.len(), d]`.
    pub ssm_bmd: Tensor,
    /// The same, normed.
    pub ssm_normed: Activations,
}

/// [`split_norm`] for branches that also go on with their tokens as they are, as where a branch has a residual of its own. `readers` are
/// the projections, attention's first, that alone read the normed tokens, where there are such: what they multiply in fp8 is rounded here.
///
/// On CUDA one pass over the sequence forward and one backward, in which the gradients of the sum, of its tokens and of their norms
/// become one, as in [`split_norm`]; where both routes take all of it, only up to 4,096 features and without a reader in fp8.
///
/// # Shapes
/// As [`split_norm`].
///
/// ```
/// use flowhn_fuse::{Route, split_norm_tokens};
/// use flowhn_nn::{Params, RmsNorm};
/// use tch::{Device, Kind, Tensor};
/// let mut params = Params::new(Device::Cpu, 0);
/// let norm = RmsNorm::new(&mut params.root(), "norm", 1, 0.)?;
/// let x = Tensor::ones([1, 3, 1], (Kind::Float, Device::Cpu));
/// let (attn, ssm) = (Route::new(3, &[2..3], Device::Cpu)?, Route::new(3, &[0..2], Device::Cpu)?);
/// let split = split_norm_tokens(&x, Some(&x), &attn, &ssm, [&norm, &norm], [None, None])?;
/// let normed = split.attn_normed.values()?;
/// assert_eq!((split.attn_bnd.double_value(&[0, 0, 0]), normed.double_value(&[0, 0, 0])), (2., 1.));
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// Those of [`split_norm`].
pub fn split_norm_tokens(
    x_bld: &Tensor,
    delta_bld: Option<&Tensor>,
    attn: &Route,
    ssm: &Route,
    norms: [&RmsNorm; 2],
    readers: [Option<&Linear>; 2],
) -> Result<SplitTokens> {
    let [attn_weight, ssm_weight] = checked_weights("split_norm_tokens", x_bld, delta_bld, [attn, ssm], norms)?;
    let weights = [&attn_weight, &ssm_weight];
    normed_split_tokens(x_bld, delta_bld, attn, ssm, weights, norms.map(RmsNorm::eps), readers)
}

/// [`split_norm_tokens`] with the weights at hand, attention's first.
pub(crate) fn normed_split_tokens(
    x_bld: &Tensor,
    delta_bld: Option<&Tensor>,
    attn: &Route,
    ssm: &Route,
    weights: [&Tensor; 2],
    eps: [f64; 2],
    readers: [Option<&Linear>; 2],
) -> Result<SplitTokens> {
    let (batch, d) = (x_bld.size()[0], x_bld.size()[2]);
    let place = |reader: Option<&Linear>, route: &Route| -> Result<Option<Fp8Place>> {
        let Some(reader) = reader else { return Ok(None) };
        reader.fp8_place(&[batch, route.len() as i64, d], x_bld.kind())
    };
    let places = [place(readers[0], attn)?, place(readers[1], ssm)?];
    if is_twin(x_bld, attn, ssm, eps) && places.iter().all(Option::is_none) {
        let [sum_bld, attn_normed, ssm_normed, attn_bnd, ssm_bmd] =
            apply_twin_norm(x_bld, delta_bld, weights, eps[0], true)?;
        let (attn_normed, ssm_normed) = (attn_normed.into(), ssm_normed.into());
        return Ok(SplitTokens { sum_bld, attn_bnd, attn_normed, ssm_bmd, ssm_normed });
    }
    let given = places.clone();
    let [attn_place, ssm_place] = places;
    if !is_fused(x_bld, attn, ssm, eps) {
        let sum_bld = delta_bld.map_or_else(|| Ok(x_bld.shallow_clone()), |delta| x_bld.f_add(delta))?;
        let (sum_bld, a_bnd, s_bmd) = split_residual(&sum_bld, attn, ssm)?;
        let [given_attn, given_ssm] = given;
        let (attn_bnd, attn_normed) = residual_norm_to(given_attn, &a_bnd, None, weights[0], eps[0])?;
        let (ssm_bmd, ssm_normed) = residual_norm_to(given_ssm, &s_bmd, None, weights[1], eps[1])?;
        let attn_normed = Activations::new(attn_normed, attn_place);
        let ssm_normed = Activations::new(ssm_normed, ssm_place);
        return Ok(SplitTokens { sum_bld, attn_bnd, attn_normed, ssm_bmd, ssm_normed });
    }
    let [sum_bld, attn_normed, ssm_normed, attn_bnd, ssm_bmd] =
        apply_split_norm(x_bld, delta_bld, attn, ssm, weights, eps[0], Some(given))?;
    let attn_normed = Activations::new(attn_normed, attn_place);
    let ssm_normed = Activations::new(ssm_normed, ssm_place);
    Ok(SplitTokens { sum_bld, attn_bnd, attn_normed, ssm_bmd, ssm_normed })
}

/// Whether one kernel does a split and the norms behind it.
fn is_fused(x_bld: &Tensor, attn: &Route, ssm: &Route, eps: [f64; 2]) -> bool {
    x_bld.device().is_cuda() && attn.partitions_with(ssm) && eps[0] == eps[1]
}

/// Whether one kernel norms all tokens for both branches.
fn is_twin(x_bld: &Tensor, attn: &Route, ssm: &Route, eps: [f64; 2]) -> bool {
    let fits = x_bld.size()[2] <= TwinNorm::MAX_WIDTH;
    x_bld.device().is_cuda() && attn.is_all() && ssm.is_all() && eps[0] == eps[1] && fits
}

fn apply_twin_norm<const N: usize>(
    x_bld: &Tensor,
    delta_bld: Option<&Tensor>,
    weights: [&Tensor; 2],
    eps: f64,
    with_tokens: bool,
) -> Result<[Tensor; N]> {
    let inputs = norm_inputs(x_bld, weights, delta_bld);
    let outputs = apply(TwinNorm { eps, n_inputs: inputs.len(), with_tokens }, &inputs)?;
    outputs.try_into().map_err(|_| Error::invalid("twin_norm", "the function lost its outputs"))
}

fn apply_split_norm<const N: usize>(
    x_bld: &Tensor,
    delta_bld: Option<&Tensor>,
    attn: &Route,
    ssm: &Route,
    weights: [&Tensor; 2],
    eps: f64,
    with_tokens: Option<[Option<Fp8Place>; 2]>,
) -> Result<[Tensor; N]> {
    let inputs = norm_inputs(x_bld, weights, delta_bld);
    let (attn, ssm) = (attn.clone(), ssm.clone());
    let (n_inputs, with_tokens, places) = (inputs.len(), with_tokens.is_some(), with_tokens.unwrap_or_default());
    let function = SplitNorm { attn, ssm, eps, n_inputs, with_tokens, places };
    let outputs = apply(function, &inputs)?;
    outputs.try_into().map_err(|_| Error::invalid("split_norm", "the function lost its outputs"))
}

/// What both functions take: the delta is last, if there is one.
fn norm_inputs<'a>(x_bld: &'a Tensor, weights: [&'a Tensor; 2], delta_bld: Option<&'a Tensor>) -> Vec<&'a Tensor> {
    [x_bld, weights[0], weights[1]].into_iter().chain(delta_bld).collect()
}

/// Checks what is split and what is added to it, and returns the norms' weights.
fn checked_weights(
    op: &'static str,
    x_bld: &Tensor,
    delta_bld: Option<&Tensor>,
    routes: [&Route; 2],
    [attn_norm, ssm_norm]: [&RmsNorm; 2],
) -> Result<[Tensor; 2]> {
    routes.into_iter().try_for_each(|route| check_sequence(op, x_bld, route))?;
    if let Some(delta_bld) = delta_bld {
        check::shape(op, "delta_bld", delta_bld, &x_bld.size())?;
        check::kind(op, "delta_bld", delta_bld, &[x_bld.kind()])?;
        check::device(op, "delta_bld", delta_bld, x_bld.device())?;
    }
    Ok([norm_weight(op, x_bld, attn_norm)?, norm_weight(op, x_bld, ssm_norm)?])
}

/// The weight of a norm over the tokens of `x_bld`.
pub(crate) fn norm_weight(op: &'static str, x_bld: &Tensor, norm: &RmsNorm) -> Result<Tensor> {
    let weight = norm.beside(x_bld.kind());
    let [batch, seq_len, d] = check::dims(op, "x_bld", x_bld, "[batch, seq_len, d]")?;
    if weight.size() != [d] {
        check::shape(op, "x_bld", x_bld, &[batch, seq_len, weight.size()[0]])?;
    }
    check::device(op, "norm.weight", &weight, x_bld.device())?;
    Ok(weight)
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

/// [`split`], and `x` itself to go on with, as `(x, gather(x, attn), gather(x, ssm))`: the gradients of all three become one in one
/// pass, where using `x` itself beside its parts would cost a merge and an addition.
///
/// # Shapes
/// As [`split`].
///
/// ```
/// use flowhn_fuse::{Route, split_residual};
/// use tch::{Device, Kind, Tensor};
/// let x = Tensor::ones([1, 3, 1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let (attn, ssm) = (Route::new(3, &[2..3], Device::Cpu)?, Route::new(3, &[0..2], Device::Cpu)?);
/// let (residual, a, s) = split_residual(&x, &attn, &ssm)?;
/// (residual.sum(Kind::Float) + a.sum(Kind::Float) * 10. + s.sum(Kind::Float) * 100.).backward();
/// assert_eq!(Vec::<f32>::try_from(x.grad().view(-1)).unwrap(), [101., 101., 11.]);
/// # Ok::<(), flowhn_fuse::Error>(())
/// ```
///
/// # Errors
/// As [`split`].
pub fn split_residual(x_bld: &Tensor, attn: &Route, ssm: &Route) -> Result<(Tensor, Tensor, Tensor)> {
    if attn.is_empty() || ssm.is_empty() || !attn.partitions_with(ssm) {
        let (a_bnd, s_bmd) = split(x_bld, attn, ssm)?;
        return Ok((x_bld.shallow_clone(), a_bnd, s_bmd));
    }
    check_sequence("split_residual", x_bld, attn)?;
    check_sequence("split_residual", x_bld, ssm)?;
    let outputs: [Tensor; 3] = apply(SplitResidual { attn: attn.clone(), ssm: ssm.clone() }, &[x_bld])?
        .try_into()
        .map_err(|_| Error::invalid("split_residual", "the function lost its outputs"))?;
    Ok(outputs.into())
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
        let (a_bnd, s_bmd) = pieces::take_both(inputs[0], &self.attn, &self.ssm)?;
        Ok(vec![a_bnd, s_bmd])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(pieces::interleave(&grads[0], &grads[1], &self.attn, &self.ssm)?)])
    }
}

struct SplitResidual {
    attn: Route,
    ssm: Route,
}

impl Function for SplitResidual {
    const NAME: &'static str = "split_residual";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (a_bnd, s_bmd) = pieces::take_both(inputs[0], &self.attn, &self.ssm)?;
        Ok(vec![inputs[0].shallow_clone(), a_bnd, s_bmd])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(pieces::interleave_sum(&grads[0], &grads[1], &grads[2], &self.attn, &self.ssm)?)])
    }
}
