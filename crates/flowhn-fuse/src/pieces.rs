//! The copies behind gather and merge, outside autograd.
//!
//! With few spans on a CPU, whole spans are copied; with many, tokens are copied by index. On CUDA one kernel of our own moves
//! all tokens.

// b batch, l seq_len, n and m tokens of one branch, d features

use std::ops::Range;

use tch::{Device, Tensor};

use flowhn_torch::Result;

use crate::{Route, cuda};

/// Up to this many spans a CPU copies span by span.
const MAX_SPANS: usize = 64;

/// One span of the sequence, of `x_bld`, as a view.
pub(crate) fn span_of(x_bld: &Tensor, span: &Range<usize>) -> Result<Tensor> {
    Ok(x_bld.f_narrow(1, span.start as i64, span.len() as i64)?)
}

/// The route's tokens of `x_bld`: a view if they are neighbours, a copy if not.
pub(crate) fn take(x_bld: &Tensor, route: &Route) -> Result<Tensor> {
    match route.spans() {
        [] => span_of(x_bld, &(0..0)),
        [span] => span_of(x_bld, span),
        _ if x_bld.device().is_cuda() => Ok(cuda::split(x_bld, route, None)?.0),
        spans if by_span(x_bld, spans.len()) => {
            let views = spans.iter().map(|span| span_of(x_bld, span)).collect::<Result<Vec<Tensor>>>()?;
            Ok(Tensor::f_cat(&views, 1)?)
        }
        _ => Ok(x_bld.f_index_select(1, route.positions_tensor())?),
    }
}

/// The tokens of both routes: views of neighbours, and one launch for the others where launches are counted.
pub(crate) fn take_both(x_bld: &Tensor, attn: &Route, ssm: &Route) -> Result<(Tensor, Tensor)> {
    if x_bld.device().is_cuda() && !attn.is_single_span() && !ssm.is_single_span() {
        let (a_bnd, s_bmd) = cuda::split(x_bld, attn, Some(ssm))?;
        return match s_bmd {
            Some(s_bmd) => Ok((a_bnd, s_bmd)),
            None => Ok((a_bnd, take(x_bld, ssm)?)),
        };
    }
    Ok((take(x_bld, attn)?, take(x_bld, ssm)?))
}

/// Writes the tokens of a branch to their places in `out_bld`.
pub(crate) fn put(out_bld: &mut Tensor, x_bnd: &Tensor, route: &Route) -> Result<()> {
    if by_span(out_bld, route.spans().len()) {
        for (place, tokens) in places(route) {
            span_of(out_bld, place)?.f_copy_(&span_of(x_bnd, &tokens)?)?;
        }
    } else {
        let _ = out_bld.f_index_copy_(1, route.positions_tensor(), x_bnd)?;
    }
    Ok(())
}

/// The tokens of two branches in order, when the routes partition the sequence: one copy.
pub(crate) fn interleave(a_bnd: &Tensor, s_bmd: &Tensor, attn: &Route, ssm: &Route) -> Result<Tensor> {
    if a_bnd.device().is_cuda() {
        return cuda::merge(a_bnd, s_bmd, attn, ssm);
    }
    if by_span(a_bnd, attn.spans().len() + ssm.spans().len()) {
        let mut parts: Vec<(usize, Tensor)> = Vec::with_capacity(attn.spans().len() + ssm.spans().len());
        for (x, route) in [(a_bnd, attn), (s_bmd, ssm)] {
            for (place, tokens) in places(route) {
                parts.push((place.start, span_of(x, &tokens)?));
            }
        }
        parts.sort_by_key(|(start, _)| *start);
        let parts: Vec<Tensor> = parts.into_iter().map(|(_, part)| part).collect();
        return Ok(Tensor::f_cat(&parts, 1)?);
    }
    let mut out = empty_like_sequence(a_bnd, attn.seq_len())?;
    put(&mut out, a_bnd, attn)?;
    put(&mut out, s_bmd, ssm)?;
    Ok(out)
}

/// `x_bld` plus the tokens of two branches at their places, when the routes partition the sequence.
pub(crate) fn interleave_sum(
    x_bld: &Tensor,
    a_bnd: &Tensor,
    s_bmd: &Tensor,
    attn: &Route,
    ssm: &Route,
) -> Result<Tensor> {
    if x_bld.device().is_cuda() {
        return cuda::merge_residual(x_bld, a_bnd, s_bmd, attn, ssm);
    }
    let mut out = empty_like_sequence(x_bld, attn.seq_len())?;
    put_sum(&mut out, x_bld, a_bnd, attn)?;
    put_sum(&mut out, x_bld, s_bmd, ssm)?;
    Ok(out)
}

/// The gradients of two branches out of that of their sequence. On CUDA they are copied in one launch also where views would do:
/// the matrix products that take them next would copy the views one by one.
pub(crate) fn take_grads(grad_bld: &Tensor, attn: &Route, ssm: &Route) -> Result<(Tensor, Tensor)> {
    if grad_bld.device().is_cuda()
        && let (a_bnd, Some(s_bmd)) = cuda::split(grad_bld, attn, Some(ssm))?
    {
        return Ok((a_bnd, s_bmd));
    }
    take_both(grad_bld, attn, ssm)
}

/// Adds the tokens of a branch to `x_bld` at their places, into the same places of `out_bld`.
pub(crate) fn put_sum(out_bld: &mut Tensor, x_bld: &Tensor, branch_bnd: &Tensor, route: &Route) -> Result<()> {
    if by_span(out_bld, route.spans().len()) {
        for (place, tokens) in places(route) {
            let sum = span_of(branch_bnd, &tokens)?.f_add_out(&span_of(out_bld, place)?, &span_of(x_bld, place)?)?;
            debug_assert_eq!(sum.size()[1], place.len() as i64);
        }
    } else {
        put(out_bld, &take(x_bld, route)?.f_add(branch_bnd)?, route)?;
    }
    Ok(())
}

/// Zeros of the whole sequence with the branch's tokens at their places.
pub(crate) fn scatter(x_bnd: &Tensor, route: &Route) -> Result<Tensor> {
    if x_bnd.device().is_cuda() {
        return cuda::scatter(x_bnd, route);
    }
    let mut out = empty_like_sequence(x_bnd, route.seq_len())?.f_zero_()?;
    put(&mut out, x_bnd, route)?;
    Ok(out)
}

/// An unwritten tensor like `x_bnd`, for `seq_len` tokens.
pub(crate) fn empty_like_sequence(x_bnd: &Tensor, seq_len: usize) -> Result<Tensor> {
    let size = x_bnd.size();
    Ok(Tensor::f_empty([size[0], seq_len as i64, size[2]], (x_bnd.kind(), x_bnd.device()))?)
}

/// Each span of a route with the range of its tokens among the branch's tokens.
fn places(route: &Route) -> impl Iterator<Item = (&Range<usize>, Range<usize>)> {
    route.spans().iter().scan(0, |start, place| {
        let tokens = *start..*start + place.len();
        *start = tokens.end;
        Some((place, tokens))
    })
}

fn by_span(x: &Tensor, n_spans: usize) -> bool {
    n_spans <= 1 || (x.device() == Device::Cpu && n_spans <= MAX_SPANS)
}
