//! Rows that are too large or too small for careless arithmetic, through the norms that are fused with moves of tokens.

use flowhn_torch::testing::{Case, Rule, noise};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::{BATCH, EPS, both_read_all, normed, put, routes, taken, weight};
use crate::Route;
use crate::gather::normed_split_tokens;
use crate::merge::normed_merge;

const D: i64 = 136;

/// Which outputs gradients arrive at. Beside the gradient of a sum, that of its norm may be too small to be seen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Read {
    All,
    Norms,
}

/// A check of these routes, with the dtype of the tokens and the size of the rows.
type OfRoutes = fn(&(Route, Route), Kind, f64, Read, Device) -> Result<String>;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        let name = |op: &str| format!("{op}: extreme rows stay finite, {kind:?}");
        cases.push(Case::new(name("split_norm_tokens, halves"), move |device| {
            all_sizes(splits, &routes(&[17, 14], device)?, kind, device)
        }));
        cases.push(Case::new(name("split_norm_tokens, each to both branches"), move |device| {
            all_sizes(splits, &both_read_all(31, device)?, kind, device)
        }));
        cases.push(Case::new(name("merge_residual_norm"), move |device| {
            all_sizes(merges, &routes(&[5, 21, 5], device)?, kind, device)
        }));
    }
    cases
}

fn all_sizes(check: OfRoutes, routes: &(Route, Route), kind: Kind, device: Device) -> Result<String> {
    let mut found = String::new();
    for size in [0., 1e-30, 1e-4, 1e4, 1e14] {
        for read in [Read::All, Read::Norms] {
            found = check(routes, kind, size, read, device)
                .map_err(|error| Error::invalid("extremes", format!("rows of {size}, {read:?} read: {error}")))?;
        }
    }
    Ok(found)
}

fn tokens(n: usize, seed: i64) -> Tensor {
    noise(&[BATCH, n as i64, D], seed)
}

/// Gradients arrive at the norms, and maybe at the sum and its tokens.
fn splits((attn, ssm): &(Route, Route), kind: Kind, size: f64, read: Read, device: Device) -> Result<String> {
    let n_read = if read == Read::All { 5 } else { 2 };
    let kernel = |x: &[Tensor]| {
        let split = normed_split_tokens(&x[0], Some(&x[1]), attn, ssm, [&x[2], &x[3]], [EPS; 2], [None, None])?;
        let norms = [split.attn_normed.values()?.shallow_clone(), split.ssm_normed.values()?.shallow_clone()];
        let rest = [split.attn_bnd, split.ssm_bmd, split.sum_bld];
        Ok(norms.into_iter().chain(rest).take(n_read).collect())
    };
    let plain = |x: &[Tensor]| {
        let sum = &x[0] + &x[1];
        let (a, s) = (taken(&sum, attn), taken(&sum, ssm));
        let mut outputs = vec![normed(&a, &x[2]), normed(&s, &x[3]), a, s, sum];
        outputs.truncate(n_read);
        Ok(outputs)
    };
    let n = attn.seq_len();
    let inputs = [tokens(n, 1) * size, tokens(n, 2) * size, weight(D, 3), weight(D, 4)];
    let kinds = [kind, kind, Kind::Float, Kind::Float];
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check_extremes(&inputs, &kinds, device)
}

fn merges((attn, ssm): &(Route, Route), kind: Kind, size: f64, read: Read, device: Device) -> Result<String> {
    let n_read = if read == Read::All { 2 } else { 1 };
    let kernel = |x: &[Tensor]| {
        let (sum, normed) = normed_merge(&x[0], &x[1], &x[2], attn, ssm, &x[3], EPS)?;
        Ok([normed, sum].into_iter().take(n_read).collect())
    };
    let plain = |x: &[Tensor]| {
        let sum = &x[0] + put(&x[1], &x[2], attn, ssm);
        let normed = normed(&sum, &x[3]);
        Ok([normed, sum].into_iter().take(n_read).collect())
    };
    let inputs =
        [tokens(attn.seq_len(), 1) * size, tokens(attn.len(), 2) * size, tokens(ssm.len(), 3) * size, weight(D, 4)];
    let kinds = [kind, kind, kind, Kind::Float];
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check_extremes(&inputs, &kinds, device)
}
