//! Loss and gradients in one go, with blocks whose activations are computed anew for the backward pass (activation checkpointing: Chen et
//! al., "Training deep nets with sublinear memory cost").
//!
//! The stream is cut in front of every block. A block that is recomputed runs forward as any other, and of what it would keep for its
//! backward pass only its input stays; when its gradient is due, it runs again, keeps everything, and goes backward at once. It is the
//! same code on the same numbers, so loss and gradients are, bit for bit, those without.
// b batch, l seq_len, d d_model, t tokens of the batch, v vocab_size

use std::cell::Cell;

use flowhn_nn::{HeadMatrix, Residual};
use flowhn_torch::{BackwardCtx, Error as TensorError, ForwardCtx, Function, apply, catch};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::model::{Head, Pass};
use crate::{Input, Model, Result};

/// One block in so many, from the first on, is recomputed in the backward pass; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RecomputeEvery(pub usize);

impl RecomputeEvery {
    /// Whether this block is.
    pub fn takes(self, block_idx: usize) -> bool {
        self.0 > 0 && block_idx.is_multiple_of(self.0)
    }
}

/// A block's input, which is a leaf, and its output where that is kept together with its history.
struct Piece {
    x_bld: Tensor,
    y_bld: Option<Tensor>,
}

impl Model {
    /// Adds the gradients of a share of [`Model::loss`], the loss over `n_shares`, to those of the parameters, and returns the share,
    /// without history.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn backward(
        &self,
        ids_bl: &Tensor,
        targets_bl: &Tensor,
        segments_bl: Option<&Tensor>,
        n_shares: usize,
    ) -> Result<Tensor> {
        if self.recompute_every() == RecomputeEvery(0) {
            return go_back(&self.loss(ids_bl, targets_bl, segments_bl)?, n_shares);
        }
        catch(|| Ok(self.backward_in_pieces(ids_bl, targets_bl, segments_bl, n_shares)))?
    }

    /// The tokens behind a block, of the tokens before it: between two blocks one tensor is kept, not a sum's two terms.
    fn block_output(&self, block_idx: usize, x_bld: &Tensor, pass: &Pass) -> Result<Tensor> {
        Ok(self.run_block(block_idx, &Residual::of(x_bld.shallow_clone()), pass, None)?.sum()?)
    }

    fn backward_in_pieces(
        &self,
        ids_bl: &Tensor,
        targets_bl: &Tensor,
        segments_bl: Option<&Tensor>,
        n_shares: usize,
    ) -> Result<Tensor> {
        let targets_t = self.targets(ids_bl, targets_bl)?;
        let pass = self.begin(&Input::new(ids_bl).with_segments(segments_bl), false)?;
        let embedded_bld = self.entry(&pass)?;
        let mut x_bld = leaf(&embedded_bld)?;
        let mut pieces = Vec::with_capacity(self.n_blocks());
        for block_idx in 0..self.n_blocks() {
            let y_bld = self.block_output(block_idx, &x_bld, &pass)?;
            let next_bld = leaf(&y_bld)?;
            let y_bld = (!self.recompute_every().takes(block_idx)).then_some(y_bld);
            pieces.push(Piece { x_bld: std::mem::replace(&mut x_bld, next_bld), y_bld });
        }

        // The gradients of a weight that embedding and head share add up before they join those of earlier shares, as they would in
        // one graph.
        let tied = match self.head() {
            Head::Own(_) => None,
            Head::Tied(weight) => {
                let weight_vd =
                    if x_bld.kind() == Kind::BFloat16 { weight.to(Kind::Float) } else { weight.to(x_bld.kind()) };
                Some((leaf(&weight_vd)?, weight_vd))
            }
        };
        let matrix =
            tied.as_ref().map_or_else(|| self.head().weight().into(), |(leaf_vd, _)| HeadMatrix::from(leaf_vd));
        let loss = self.loss_of(&pass.of_tokens(&x_bld)?, matrix, &targets_t)?;
        let share = go_back(&loss, n_shares)?;
        drop(loss);

        let mut grad_bld = take_grad(x_bld)?;
        for (block_idx, Piece { x_bld, y_bld }) in pieces.into_iter().enumerate().rev() {
            let y_bld = match y_bld {
                Some(y_bld) => y_bld,
                None => self.block_output(block_idx, &x_bld, &pass)?,
            };
            feed(&[&y_bld], vec![grad_bld])?;
            drop(y_bld);
            grad_bld = take_grad(x_bld)?;
        }
        match tied {
            None => feed(&[&embedded_bld], vec![grad_bld])?,
            Some((leaf_vd, weight_vd)) => feed(&[&embedded_bld, &weight_vd], vec![grad_bld, take_grad(leaf_vd)?])?,
        }
        Ok(share)
    }
}

/// Goes backward from a share of a loss and returns it.
fn go_back(loss: &Tensor, n_shares: usize) -> Result<Tensor> {
    let share = loss.f_div_scalar(n_shares as f64)?;
    share.f_backward()?;
    Ok(share.f_detach()?)
}

/// The same values as the end of a graph of their own.
fn leaf(x: &Tensor) -> flowhn_torch::Result<Tensor> {
    Ok(x.f_detach()?.f_set_requires_grad(true)?)
}

/// The gradient of a leaf that is not needed any more.
fn take_grad(leaf: Tensor) -> flowhn_torch::Result<Tensor> {
    let grad = leaf.f_grad()?;
    if grad.defined() { Ok(grad) } else { Ok(leaf.f_detach()?.f_zeros_like()?) }
}

/// Goes backward from tensors whose gradients are known.
fn feed(tensors: &[&Tensor], grads: Vec<Tensor>) -> flowhn_torch::Result<()> {
    let end = apply(Feed(Cell::new(grads)), tensors)?.swap_remove(0);
    Ok(end.f_backward()?)
}

/// A number whose derivatives are the gradients that it was given.
struct Feed(Cell<Vec<Tensor>>);

impl Function for Feed {
    const NAME: &'static str = "feed";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> flowhn_torch::Result<Vec<Tensor>> {
        Ok(vec![Tensor::f_zeros([], (Kind::Float, inputs[0].device()))?])
    }

    fn backward(&self, _ctx: &BackwardCtx, _grads: &[Tensor]) -> flowhn_torch::Result<Vec<Option<Tensor>>> {
        // Given away, so that whoever takes one last may keep it without a copy.
        match self.0.take() {
            grads if grads.is_empty() => Err(TensorError::invalid(Self::NAME, "its gradients have been taken before")),
            grads => Ok(grads.into_iter().map(Some).collect()),
        }
    }
}
