//! Tokens between a sequence and its branches.

// b batch, l seq_len, n and m tokens of one branch, d features

use tch::{Kind, Tensor};

use flowhn_nn::{Fp8Place, Residual};
use flowhn_torch::kernel::rows::{aligned, rows_are_aligned, with_dense_rows};
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use flowhn_torch::{Error, Result};

use super::{Routes, strides};
use crate::Route;
use crate::kernels::{MERGE_FP8, MERGE_FP8_DEFINES, TOKENS};

/// Warps of a block, each with one token.
const TOKENS_PER_BLOCK: u32 = 8;

/// The tokens of each route, in new tensors.
pub(crate) fn split(x_bld: &Tensor, first: &Route, second: Option<&Route>) -> Result<(Tensor, Option<Tensor>)> {
    let size = x_bld.size();
    let branch = |route: &Route| -> Result<Tensor> {
        Ok(Tensor::f_empty([size[0], route.len() as i64, size[2]], (x_bld.kind(), x_bld.device()))?)
    };
    let (a, s) = (branch(first)?, second.map(branch).transpose()?);
    copy(x_bld, &a, s.as_ref(), Routes { first, second }, Towards::Branches)?;
    Ok((a, s))
}

/// The tokens of two branches in the order of their sequence.
pub(crate) fn merge(a_bnd: &Tensor, s_bmd: &Tensor, attn: &Route, ssm: &Route) -> Result<Tensor> {
    let size = a_bnd.size();
    let out = Tensor::f_empty([size[0], attn.seq_len() as i64, size[2]], (a_bnd.kind(), a_bnd.device()))?;
    copy(&out, a_bnd, Some(s_bmd), Routes { first: attn, second: Some(ssm) }, Towards::Sequence)?;
    Ok(out)
}

/// The tokens of one branch at their places among zeros.
pub(crate) fn scatter(x_bnd: &Tensor, route: &Route) -> Result<Tensor> {
    let size = x_bnd.size();
    let out = Tensor::f_zeros([size[0], route.seq_len() as i64, size[2]], (x_bnd.kind(), x_bnd.device()))?;
    copy(&out, x_bnd, None, Routes { first: route, second: None }, Towards::Sequence)?;
    Ok(out)
}

/// `x_bld + merge(a, s)`.
pub(crate) fn merge_residual(
    x_bld: &Tensor,
    a_bnd: &Tensor,
    s_bmd: &Tensor,
    attn: &Route,
    ssm: &Route,
) -> Result<Tensor> {
    add("merge_residual", &[x_bld, a_bnd, s_bmd], attn, ssm)
}

/// `merge(a + da, s + ds)`.
pub(crate) fn merge_sums(branches: [&Tensor; 2], changes: [&Tensor; 2], attn: &Route, ssm: &Route) -> Result<Tensor> {
    add("merge_sums", &[branches, changes].concat(), attn, ssm)
}

/// `[x0 + change0, x1 + change1]`, features side by side: `[b, l, 2 d]` of four times `[b, l, d]`.
pub(crate) fn concat_sums(branches: [&Tensor; 2], changes: [&Tensor; 2]) -> Result<Tensor> {
    const OP: &str = "concat_sums";
    let (batch, seq_len, d) = branches[0].size3()?;
    let n_halves = 2 * batch * seq_len;
    let too_many = |_| Error::invalid(OP, format!("{n_halves} rows are more than a launch counts; split the batch"));
    let n_halves = i32::try_from(n_halves).map_err(too_many)? as u32;
    let out = Tensor::f_empty([batch, seq_len, 2 * d], (branches[0].kind(), branches[0].device()))?;
    launch_sums(OP, &[branches, changes].concat(), &out, [], n_halves)?;
    Ok(out)
}

/// Whether [`merge_sums_fp8`] takes these.
pub(crate) fn rounds_merge(a: &Residual, s: &Residual, attn: &Route, ssm: &Route) -> bool {
    let terms: Vec<&Tensor> =
        [Some(&a.x), Some(&s.x), a.change.as_ref(), s.change.as_ref()].into_iter().flatten().collect();
    let shapes = [&a.x, &s.x].map(|x| x.size());
    a.x.device().is_cuda()
        && terms.iter().all(|x| x.kind() == Kind::BFloat16 && x.dim() == 3 && x.stride()[2] == 1)
        && [&a.change, &s.change]
            .into_iter()
            .zip(&shapes)
            .all(|(x, shape)| x.as_ref().is_some_and(|x| x.size() == *shape))
        && attn.partitions_with(ssm)
        && (attn.is_single_span() || ssm.is_single_span())
        && rows_are_aligned(shapes[0][2], &terms)
}

/// [`merge_sums`] rounded to `place`; returns what stands in for it. One of the routes is a single span.
pub(crate) fn merge_sums_fp8(
    branches: [&Tensor; 2],
    changes: [&Tensor; 2],
    attn: &Route,
    ssm: &Route,
    place: &Fp8Place,
) -> Result<Tensor> {
    /// Rows and columns of a block.
    const TILE: i64 = 128;
    let (first, second, route) = if attn.is_single_span() { (0, 1, attn) } else { (1, 0, ssm) };
    let terms = [branches[first], branches[second], changes[first], changes[second]];
    let (batch, _, d) = terms[0].size3()?;
    let n_rows = batch * route.seq_len() as i64;
    let start = route.spans().first().map_or(0, |span| span.start);
    let mut args: Vec<Arg> = terms.into_iter().map(Arg::Tensor).collect();
    args.extend(terms.into_iter().flat_map(|x| strides(Some(x), 1, 1)));
    args.extend([start, route.len(), route.seq_len()].map(|n| Arg::I32(n as i32)));
    let [y, y_t, slot, n_padded] = place.args();
    args.extend([y, y_t, slot, Arg::I32(n_rows as i32), n_padded, Arg::I32(d as i32)]);
    let tiles = |n: i64| ((n + TILE - 1) / TILE) as u32;
    let kernel = Kernel { source: &MERGE_FP8, entry: "merge_sums_fp8", defines: MERGE_FP8_DEFINES };
    kernel.launch([tiles(d), tiles(place.n_padded()), 1], 256, 0, &args)?;
    Ok(place.stand_in())
}

/// Launches one of the kernels that write a sum for each token of the sequence.
fn add(entry: &'static str, terms: &[&Tensor], attn: &Route, ssm: &Route) -> Result<Tensor> {
    let (batch, _, d) = terms[0].size3()?;
    let out = Tensor::f_empty([batch, attn.seq_len() as i64, d], (terms[0].kind(), terms[0].device()))?;
    let routes = Routes { first: attn, second: Some(ssm) };
    launch_sums(entry, terms, &out, routes.args(), routes.n_tokens(entry, batch)?)?;
    Ok(out)
}

/// Launches a kernel that adds rows of `d` elements of these terms, one a warp, to `out`, `[b, l, ..]`; `routes` are its arguments that tell which.
fn launch_sums<const N: usize>(
    entry: &'static str,
    terms: &[&Tensor],
    out: &Tensor,
    routes: [Arg; N],
    n_rows: u32,
) -> Result<()> {
    let terms = terms.iter().map(|x| with_dense_rows(x)).collect::<Result<Vec<_>>>()?;
    let (batch, seq_len, d) = (out.size()[0], out.size()[1], terms[0].size()[2]);
    let touched: Vec<&Tensor> = terms.iter().chain([out]).collect();
    let mut args: Vec<Arg> = touched.iter().map(|x| Arg::Tensor(x)).collect();
    args.extend(terms.iter().flat_map(|x| strides(Some(x), 1, 1)));
    args.extend(routes);
    args.extend([Arg::I32(batch as i32), Arg::I32(seq_len as i32), Arg::I32(d as i32), aligned(d, &touched)]);
    let defines = [("X_KIND", kind_define(entry, "x_bld", &terms[0])?), ("WORD", 16)];
    let kernel = Kernel { source: &TOKENS, entry, defines: &defines };
    kernel.launch(grid(n_rows), 32 * TOKENS_PER_BLOCK, 0, &args)
}

#[derive(Clone, Copy, PartialEq)]
enum Towards {
    Branches,
    Sequence,
}

/// Copies tokens of any dtype; the receiving tensors are new.
fn copy(sequence: &Tensor, branch0: &Tensor, branch1: Option<&Tensor>, routes: Routes, towards: Towards) -> Result<()> {
    const OP: &str = "copy_tokens";
    let (batch, _, d) = sequence.size3()?;
    if d == 0 {
        return Ok(());
    }
    let sequence = with_dense_rows(sequence)?;
    let (branch0, branch1) = (with_dense_rows(branch0)?, branch1.map(with_dense_rows).transpose()?);
    let tensors: Vec<&Tensor> = [Some(&sequence), Some(&branch0), branch1.as_ref()].into_iter().flatten().collect();
    let n_bytes = element_bytes(&sequence)?;
    let word = word_bytes(n_bytes * d, n_bytes, &tensors);
    let mut args = vec![Arg::Tensor(&sequence), Arg::Tensor(&branch0), Arg::opt(branch1.as_ref())];
    args.extend(
        [Some(&sequence), Some(&branch0), branch1.as_ref()].into_iter().flat_map(|x| strides(x, n_bytes, word)),
    );
    args.extend(routes.args());
    let n_words = (n_bytes * d / word) as i32;
    args.extend([Arg::I32(batch as i32), Arg::I32(n_words), Arg::I32(i32::from(towards == Towards::Sequence))]);
    let defines = [("X_KIND", 0), ("WORD", word)];
    let kernel = Kernel { source: &TOKENS, entry: "copy_tokens", defines: &defines };
    kernel.launch(grid(routes.n_tokens(OP, batch)?), 32 * TOKENS_PER_BLOCK, 0, &args)
}

fn grid(n_tokens: u32) -> [u32; 3] {
    [n_tokens.div_ceil(TOKENS_PER_BLOCK), 1, 1]
}

fn element_bytes(x: &Tensor) -> Result<i64> {
    use tch::Kind;
    match x.kind() {
        Kind::Bool | Kind::Uint8 | Kind::Int8 => Ok(1),
        Kind::BFloat16 | Kind::Half | Kind::Int16 => Ok(2),
        Kind::Float | Kind::Int => Ok(4),
        Kind::Double | Kind::Int64 => Ok(8),
        got => Err(Error::Dtype { op: "copy_tokens", arg: "x_bld", got, want: "a real or integer type".to_owned() }),
    }
}

/// The longest word, up to 16 bytes, that rows, strides and addresses are multiples of.
fn word_bytes(row_bytes: i64, element_bytes: i64, tensors: &[&Tensor]) -> i64 {
    let fits = |word: &i64| {
        row_bytes % word == 0
            && tensors.iter().all(|x| {
                let strides = x.stride();
                x.data_ptr() as i64 % word == 0 && strides[..2].iter().all(|stride| stride * element_bytes % word == 0)
            })
    };
    [16, 8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn words_divide_rows_strides_and_addresses() {
        let zeros = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
        let word = |x: &Tensor| {
            let n_bytes = element_bytes(x).unwrap();
            word_bytes(x.size()[2] * n_bytes, n_bytes, &[x])
        };
        assert_eq!(word(&zeros(&[2, 3, 8], Kind::BFloat16)), 16);
        assert_eq!(word(&zeros(&[2, 3, 12], Kind::BFloat16)), 8);
        assert_eq!(word(&zeros(&[2, 3, 7], Kind::Float)), 4);
        assert_eq!(word(&zeros(&[2, 3, 5], Kind::BFloat16)), 2);
        assert_eq!(word(&zeros(&[2, 3, 5], Kind::Bool)), 1);
        assert_eq!(word(&zeros(&[2, 3, 1], Kind::Int64)), 8);
        assert_eq!(word(&zeros(&[2, 3, 16], Kind::BFloat16).narrow(2, 4, 8)), 8);
        assert!(element_bytes(&zeros(&[1], Kind::ComplexFloat)).is_err());
    }
}
