//! RMSNorm with the move of tokens and the residual addition beside it: one pass forward, one backward.

// b batch, l seq_len, n and m tokens of one branch, d features

use tch::{Kind, Tensor};

use flowhn_nn::Fp8Place;
use flowhn_torch::kernel::rows::{Fp8Blocks, RowAccess, RowForm, RowTiling, with_dense_rows};
use flowhn_torch::kernel::{Arg, ColumnSums, Defines, Kernel, kind_define};
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result};

use super::{Routes, f32s, strides};
use crate::kernels::{ROUTED_NORM, norm as defines, norm_fp8 as fp8_defines};
use crate::{Route, pieces};

/// Forms of `routed_norm.cu` forward.
const FORWARD: &[RowForm] = &[RowForm::new(1, 512, 1), RowForm::new(2, 512, 1), RowForm::new(3, 256, 1)];
/// Those that round: threads enough to hide the barrier before columns go out, in teams as above, since the order of a row's sum decides
/// its last bits.
const FP8_FORWARD: &[RowForm] = &[RowForm::new(1, 512, 2), RowForm::new(2, 1024, 1), RowForm::new(3, 256, 2)];
/// Backward rows in flight count most, and two vectors a thread keep the most of them, also where some lanes idle.
const BACKWARD: &[RowForm] = &[RowForm::new(2, 512, 1)];

/// Inputs x and weight; output `norm(gather(x))`.
pub(crate) struct GatherNorm {
    pub(crate) route: Route,
    pub(crate) eps: f64,
}

impl Function for GatherNorm {
    const NAME: &'static str = "gather_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let [x_bld, weight] = inputs else { unreachable!("two inputs") };
        let call = Call::new(Self::NAME, x_bld, Routes { first: &self.route, second: None }, &[weight])?;
        let y_bnd = call.branch(&self.route)?;
        let none = Sums::of_sequence(None);
        let y = Normed::Plain([&y_bnd, &y_bnd], Order::Branch);
        let rstd_bl = call.forward(None, Order::Branch, y, none, self.eps)?;
        if ctx.is_recorded() {
            [*x_bld, *weight, &rstd_bl].into_iter().for_each(|x| ctx.save(x));
        }
        Ok(vec![y_bnd])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x_bld, weight, rstd_bl] = ctx.saved() else { unreachable!("three tensors are saved") };
        let call = Call::new(Self::NAME, x_bld, Routes { first: &self.route, second: None }, &[weight])?;
        // Tokens of no route have no gradient.
        let dx_bld = call.sequence()?.f_zero_()?;
        // Nothing else reaches x: one row of zeros serves for all.
        let (batch, seq_len, d) = x_bld.size3()?;
        let none = Tensor::f_zeros([1, 1, d], (x_bld.kind(), x_bld.device()))?.f_expand([batch, seq_len, d], false)?;
        let dy = [Some(&grads[0]), None];
        let ds = Sums::of_sequence(Some(&none));
        let dweights = call.backward(rstd_bl, dy, Order::Branch, ds, &dx_bld, [None, None], &[ctx.needs_grad(1)])?;
        Ok([Some(dx_bld)].into_iter().chain(dweights).collect())
    }
}

/// Inputs x, the branches' weights and, maybe, what is added to x. Outputs: the sum, each branch's normalised tokens and, where the
/// branches want them, each branch's tokens of the sum. Without an addend the sum is x itself, handed on so that its gradient arrives
/// here and is added in the same pass, as those of the branches' tokens are.
pub(crate) struct SplitNorm {
    pub(crate) attn: Route,
    pub(crate) ssm: Route,
    pub(crate) eps: f64,
    pub(crate) n_inputs: usize,
    pub(crate) with_tokens: bool,
    /// Where the branches' normalised tokens go, if their readers want them in fp8.
    pub(crate) places: [Option<Fp8Place>; 2],
}

impl SplitNorm {
    fn routes(&self) -> Routes<'_> {
        Routes { first: &self.attn, second: Some(&self.ssm) }
    }
}

impl Function for SplitNorm {
    const NAME: &'static str = "split_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        // The function lives until the backward pass is through; places belong to their readers.
        let places = std::mem::take(&mut self.places);
        let call = Call::new(Self::NAME, inputs[0], self.routes(), &inputs[1..3])?;
        let delta = inputs.get(3).map(|delta| with_dense_rows(delta)).transpose()?;
        let sum = delta.as_ref().map(|_| call.sequence()).transpose()?;
        let change = delta.as_ref().map(|delta| [delta, delta]);
        // Neighbours are a view of the sum; the tokens of several spans are written beside it.
        let written = |route: &Route| match self.with_tokens && !route.is_single_span() {
            true => call.branch(route).map(Some),
            false => Ok(None),
        };
        let tokens = [written(&self.attn)?, written(&self.ssm)?];
        let sums = Sums { sequence: sum.as_ref(), branches: [tokens[0].as_ref(), tokens[1].as_ref()] };
        let read: Vec<&Tensor> = [&call.x_bld, call.weight(0), call.weight(1)].into_iter().chain(&delta).collect();
        let blocks = match &places {
            [Some(attn), Some(ssm)] => Fp8Blocks::new(call.d, &read)?.map(|blocks| ([attn, ssm], blocks)),
            _ => None,
        };
        let (rstd_bl, a_bnd, s_bmd) = match blocks {
            Some((places, blocks)) => {
                let normed = Normed::Fp8(places, blocks);
                let rstd_bl = call.forward(change, Order::Sequence, normed, sums, self.eps)?;
                (rstd_bl, places[0].stand_in(), places[1].stand_in())
            }
            None => {
                let (a_bnd, s_bmd) = (call.branch(&self.attn)?, call.branch(&self.ssm)?);
                let normed = Normed::Plain([&a_bnd, &s_bmd], Order::Branch);
                let rstd_bl = call.forward(change, Order::Sequence, normed, sums, self.eps)?;
                let [attn, ssm] = &places;
                let left = |place: &Option<Fp8Place>, y: Tensor| match place {
                    Some(place) => place.fill(&y),
                    None => Ok(y),
                };
                (rstd_bl, left(attn, a_bnd)?, left(ssm, s_bmd)?)
            }
        };
        let sum = sum.unwrap_or_else(|| inputs[0].shallow_clone());
        if ctx.is_recorded() {
            [&sum, inputs[1], inputs[2], &rstd_bl].into_iter().for_each(|x| ctx.save(x));
        }
        let mut outputs = vec![sum, a_bnd, s_bmd];
        if self.with_tokens {
            for (tokens, route) in tokens.into_iter().zip([&self.attn, &self.ssm]) {
                outputs.push(tokens.map_or_else(|| pieces::take(&outputs[0], route), Ok)?);
            }
        }
        Ok(outputs)
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [sum, attn_weight, ssm_weight, rstd_bl] = ctx.saved() else { unreachable!("four tensors are saved") };
        let call = Call::new(Self::NAME, sum, self.routes(), &[attn_weight, ssm_weight])?;
        let dsum = call.sequence()?;
        let (dy, wanted) = ([Some(&grads[1]), Some(&grads[2])], [ctx.needs_grad(1), ctx.needs_grad(2)]);
        let ds = Sums { sequence: Some(&grads[0]), branches: [grads.get(3), grads.get(4)] };
        let dweights = call.backward(rstd_bl, dy, Order::Branch, ds, &dsum, [None, None], &wanted)?;
        let ddelta = (self.n_inputs == 4).then(|| Some(dsum.shallow_clone()));
        Ok([Some(dsum)].into_iter().chain(dweights).chain(ddelta).collect())
    }
}

/// Inputs x, the branches' outputs and weight; outputs `x + merge(a, s)` and its norm.
pub(crate) struct MergeResidualNorm {
    pub(crate) attn: Route,
    pub(crate) ssm: Route,
    pub(crate) eps: f64,
}

impl MergeResidualNorm {
    fn routes(&self) -> Routes<'_> {
        Routes { first: &self.attn, second: Some(&self.ssm) }
    }
}

impl Function for MergeResidualNorm {
    const NAME: &'static str = "merge_residual_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let [x_bld, a_bnd, s_bmd, weight] = inputs else { unreachable!("four inputs") };
        let call = Call::new(Self::NAME, x_bld, self.routes(), &[weight])?;
        let (a_bnd, s_bmd) = (with_dense_rows(a_bnd)?, with_dense_rows(s_bmd)?);
        let (sum, y) = (call.sequence()?, call.sequence()?);
        let change = Some([&a_bnd, &s_bmd]);
        let sums = Sums::of_sequence(Some(&sum));
        let normed = Normed::Plain([&y, &y], Order::Sequence);
        let rstd_bl = call.forward(change, Order::Branch, normed, sums, self.eps)?;
        if ctx.is_recorded() {
            [&sum, *weight, &rstd_bl].into_iter().for_each(|x| ctx.save(x));
        }
        Ok(vec![sum, y])
    }

    /// The branches' gradients are the sum's at their tokens, written in their order by the same pass: what consumes them
    /// would copy views.
    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [sum, weight, rstd_bl] = ctx.saved() else { unreachable!("three tensors are saved") };
        let call = Call::new(Self::NAME, sum, self.routes(), &[weight])?;
        let dsum = call.sequence()?;
        let da_bnd = ctx.needs_grad(1).then(|| call.branch(&self.attn)).transpose()?;
        let ds_bmd = ctx.needs_grad(2).then(|| call.branch(&self.ssm)).transpose()?;
        let (dy, branches) = ([Some(&grads[1]), Some(&grads[1])], [da_bnd.as_ref(), ds_bmd.as_ref()]);
        let wanted = [ctx.needs_grad(3)];
        let ds = Sums::of_sequence(Some(&grads[0]));
        let dweights = call.backward(rstd_bl, dy, Order::Sequence, ds, &dsum, branches, &wanted)?;
        Ok([Some(dsum), da_bnd, ds_bmd].into_iter().chain(dweights).collect())
    }
}

/// Where a token of a route is found in a tensor: at its place in the sequence or among the branch's tokens.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Sequence,
    Branch,
}

/// Where normalised tokens go.
#[derive(Clone, Copy)]
enum Normed<'a> {
    /// To tensors of the sequence or of the branches.
    Plain([&'a Tensor; 2], Order),
    /// Rounded, to the readers of the branches.
    Fp8([&'a Fp8Place; 2], Fp8Blocks),
}

/// The tokens before the norm, or the gradients that reach them past the norm: of the sequence and, in their order, of the branches.
#[derive(Clone, Copy)]
struct Sums<'a> {
    sequence: Option<&'a Tensor>,
    branches: [Option<&'a Tensor>; 2],
}

impl<'a> Sums<'a> {
    fn of_sequence(sequence: Option<&'a Tensor>) -> Self {
        Self { sequence, branches: [None, None] }
    }
}

/// What a launch forward and one backward have in common.
struct Call<'a> {
    x_bld: Tensor,
    routes: Routes<'a>,
    /// One for all tokens, or one for each route; f32.
    weights: Vec<Tensor>,
    weight_kind: Kind,
    x_kind: i64,
    batch: i64,
    seq_len: i64,
    d: i64,
}

impl<'a> Call<'a> {
    fn new(op: &'static str, x_bld: &Tensor, routes: Routes<'a>, weights: &[&Tensor]) -> Result<Self> {
        let (batch, seq_len, d) = x_bld.size3()?;
        let x_kind = kind_define(op, "x_bld", x_bld)?;
        routes.n_tokens(op, batch)?;
        Ok(Self {
            x_bld: with_dense_rows(x_bld)?,
            routes,
            weights: f32s(weights)?,
            weight_kind: weights[0].kind(),
            x_kind,
            batch,
            seq_len,
            d,
        })
    }

    /// A tensor for all tokens, unwritten.
    fn sequence(&self) -> Result<Tensor> {
        self.empty(self.seq_len)
    }

    /// A tensor for the tokens of a route, unwritten.
    fn branch(&self, route: &Route) -> Result<Tensor> {
        self.empty(route.len() as i64)
    }

    fn empty(&self, n: i64) -> Result<Tensor> {
        Ok(Tensor::f_empty([self.batch, n, self.d], (self.x_bld.kind(), self.x_bld.device()))?)
    }

    /// Shares for each route of the blocks that `blocks` grants for all rows.
    fn share(&self, blocks: impl Fn(i64) -> Result<i64>) -> Result<[i64; 2]> {
        let rows = |route: &Route| self.batch * route.len() as i64;
        let total: i64 = self.routes.iter().map(rows).sum();
        let all = blocks(total)?;
        let share = |route: &Route| if rows(route) == 0 { 0 } else { (all * rows(route) / total).max(1) };
        Ok([share(self.routes.first), self.routes.second.map_or(0, share)])
    }

    fn weight(&self, route_idx: usize) -> &Tensor {
        self.weights.get(route_idx).unwrap_or(&self.weights[0])
    }

    /// Writes the normalised tokens to where `normed` says and the tokens before the norm to where `sums` wants them, for the sequence only if there is a
    /// change; returns the reciprocal roots, `[batch, seq_len]`.
    fn forward(
        &self,
        change: Option<[&Tensor; 2]>,
        change_order: Order,
        normed: Normed,
        sums: Sums,
        eps: f64,
    ) -> Result<Tensor> {
        let rstd_bl = Tensor::f_empty([self.batch, self.seq_len], (Kind::Float, self.x_bld.device()))?;
        let (forms, y, y_order) = match normed {
            Normed::Plain(y, order) => (FORWARD, y.map(Some), order),
            Normed::Fp8(..) => (FP8_FORWARD, [None, None], Order::Branch),
        };
        let tiling = RowTiling::new("routed_norm", self.d, forms)?;
        let [n_blocks0, n_blocks1] = match normed {
            Normed::Plain(..) => self.share(|n_rows| tiling.n_blocks(n_rows, self.x_bld.device()))?,
            Normed::Fp8(places, blocks) => places.map(|place| blocks.n_blocks(place.n_padded())),
        };
        let change = change.map_or([None, None], |[first, second]| [Some(first), Some(second)]);
        let mut touched = vec![&self.x_bld, self.weight(0), self.weight(1)];
        touched.extend(y.into_iter().flatten());
        touched.extend(change.into_iter().flatten());

        let mut args = vec![Arg::Tensor(&self.x_bld)];
        args.extend(strides(Some(&self.x_bld), 1, 1));
        args.extend(self.routes.args());
        args.extend([Arg::I32(self.batch as i32), Arg::I32(self.seq_len as i32)]);
        args.extend(change.map(Arg::opt));
        args.extend(change.into_iter().flat_map(|x| strides(x, 1, 1)));
        args.push(Arg::I32(i32::from(change_order == Order::Branch)));
        args.extend([Arg::Tensor(self.weight(0)), Arg::Tensor(self.weight(1)), Arg::opt(sums.sequence)]);
        args.extend(sums.branches.map(Arg::opt));
        args.extend(y.map(Arg::opt));
        args.extend([Arg::I32(i32::from(y_order == Order::Branch)), Arg::Tensor(&rstd_bl)]);
        args.extend([Arg::I32(n_blocks0 as i32), Arg::I32(self.d as i32), Arg::I32(tiling.team as i32)]);
        args.push(Arg::F32(eps as f32));
        let grid = [(n_blocks0 + n_blocks1) as u32, 1, 1];
        const ENTRY: &str = "routed_norm_forward";
        match normed {
            Normed::Plain(..) => {
                let defines = defines(tiling.form, self.x_kind, RowAccess::of(self.d, &touched), false);
                kernel(ENTRY, &defines).launch(grid, tiling.block(), 0, &args)?;
            }
            Normed::Fp8(places, blocks) => {
                args.extend(places.into_iter().flat_map(Fp8Place::args));
                let defines = fp8_defines(tiling.form);
                kernel(ENTRY, &defines).launch(grid, tiling.block(), blocks.shared_bytes, &args)?;
            }
        }
        Ok(rstd_bl)
    }

    /// Writes the gradient of the tokens to `dx`, and to `branches` where given; returns those of the weights.
    #[expect(clippy::too_many_arguments, reason = "one tensor for each letter of the formula")]
    fn backward(
        &self,
        rstd_bl: &Tensor,
        dy: [Option<&Tensor>; 2],
        dy_order: Order,
        ds: Sums,
        dx_bld: &Tensor,
        branches: [Option<&Tensor>; 2],
        wants_dweights: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let dense = |x: Option<&Tensor>| x.map(with_dense_rows).transpose();
        let (dy, ds_k) = (dy.map(dense), ds.branches.map(dense));
        let ([dy0, dy1], [ds0, ds1], ds) = (dy, ds_k, dense(ds.sequence)?);
        let (dy0, dy1, ds0, ds1) = (dy0?, dy1?, ds0?, ds1?);
        let (dy, ds_k) = ([dy0.as_ref(), dy1.as_ref()], [ds0.as_ref(), ds1.as_ref()]);
        let tiling = RowTiling::new("routed_norm", self.d, BACKWARD)?;
        let [n_blocks0, n_blocks1] = self.share(|n_rows| tiling.n_resident_blocks(n_rows, self.x_bld.device()))?;
        let blocks_of: &[i64] =
            if self.weights.len() == 1 { &[n_blocks0 + n_blocks1] } else { &[n_blocks0, n_blocks1] };
        let sums: Vec<(i64, bool)> = blocks_of.iter().copied().zip(wants_dweights.iter().copied()).collect();
        let dweights = ColumnSums::new(&sums, self.d, self.x_bld.device())?;
        let mut touched = vec![&self.x_bld, dx_bld, self.weight(0), self.weight(1)];
        touched.extend(dy.into_iter().chain(ds_k).chain(branches).chain([ds.as_ref()]).flatten());

        let mut args = vec![Arg::Tensor(&self.x_bld)];
        args.extend(strides(Some(&self.x_bld), 1, 1));
        args.extend(self.routes.args());
        args.extend([Arg::I32(self.batch as i32), Arg::I32(self.seq_len as i32)]);
        args.extend(dy.map(Arg::opt));
        args.extend(dy.into_iter().flat_map(|x| strides(x, 1, 1)));
        args.extend([Arg::I32(i32::from(dy_order == Order::Branch)), Arg::opt(ds.as_ref())]);
        args.extend(strides(ds.as_ref(), 1, 1));
        args.extend(ds_k.map(Arg::opt));
        args.extend(ds_k.into_iter().flat_map(|x| strides(x, 1, 1)));
        args.extend([Arg::Tensor(self.weight(0)), Arg::Tensor(self.weight(1)), Arg::Tensor(rstd_bl)]);
        args.push(Arg::Tensor(dx_bld));
        args.extend(branches.map(Arg::opt));
        args.extend([dweights.arg(), Arg::I32(n_blocks0 as i32), Arg::I32(self.d as i32)]);
        args.push(Arg::I32(tiling.team as i32));
        let defines = defines(tiling.form, self.x_kind, RowAccess::of(self.d, &touched), ds_k[0].is_some());
        let grid = [(n_blocks0 + n_blocks1) as u32, 1, 1];
        kernel("routed_norm_backward", &defines).launch(grid, tiling.block(), tiling.weight_bytes(1), &args)?;
        dweights.totals(self.weight_kind)
    }
}

fn kernel<'a>(entry: &'static str, defines: Defines<'a>) -> Kernel<'a> {
    Kernel { source: &ROUTED_NORM, entry, defines }
}
