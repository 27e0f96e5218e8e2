//! Tokens between a sequence and its branches.

// b batch, l seq_len, n and m tokens of one branch, d features

use tch::Tensor;

use flowhn_torch::kernel::rows::{aligned, with_dense_rows};
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use flowhn_torch::{Error, Result};

use super::{Routes, strides};
use crate::Route;
use crate::kernels::TOKENS;

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

/// Launches one of the kernels that write a sum for each token of the sequence.
fn add(entry: &'static str, terms: &[&Tensor], attn: &Route, ssm: &Route) -> Result<Tensor> {
    let terms = terms.iter().map(|x| with_dense_rows(x)).collect::<Result<Vec<_>>>()?;
    let (batch, _, d) = terms[0].size3()?;
    let seq_len = attn.seq_len() as i64;
    let out = Tensor::f_empty([batch, seq_len, d], (terms[0].kind(), terms[0].device()))?;
    let routes = Routes { first: attn, second: Some(ssm) };
    let mut args: Vec<Arg> = terms.iter().chain([&out]).map(Arg::Tensor).collect();
    args.extend(terms.iter().flat_map(|x| strides(Some(x), 1, 1)));
    args.extend(routes.args());
    let touched: Vec<&Tensor> = terms.iter().chain([&out]).collect();
    args.extend([Arg::I32(batch as i32), Arg::I32(seq_len as i32), Arg::I32(d as i32), aligned(d, &touched)]);
    let defines = [("X_KIND", kind_define(entry, "x_bld", &terms[0])?), ("WORD", 16)];
    let kernel = Kernel { source: &TOKENS, entry, defines: &defines };
    kernel.launch(grid(routes.n_tokens(entry, batch)?), 32 * TOKENS_PER_BLOCK, 0, &args)?;
    Ok(out)
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
