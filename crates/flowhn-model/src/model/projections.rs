//! The types that projections multiply and leave their gradients in while a model trains.

use flowhn_nn::{Fp8Projections, logits_are_one_chunk};
use tch::Kind;

use super::Model;
use crate::{Error, Result};

/// The type of the factors that the blocks' projections multiply while a model trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Linears {
    /// That of activations.
    #[default]
    Dtype,
    /// 8-bit floats, from bf16 activations, where both sizes of a projection are multiples of 16.
    Fp8,
}

impl Model {
    /// Chooses the type of the factors that the blocks' projections multiply in [`Model::loss`], after the type of activations has been
    /// chosen; to be done once. All other uses of the model compute in the type of activations: a model's scores do not depend on how
    /// it was trained. Embedding, head, norms and convolutions stay as they are.
    ///
    /// # Errors
    /// [`Error::Input`] for fp8 beside activations that are not bf16; [`Error::Tensor`] on a device without 8-bit floats.
    pub fn set_linears(&mut self, linears: Linears) -> Result<()> {
        if linears == Linears::Fp8 {
            if self.compute_kind != Kind::BFloat16 {
                let kind = self.compute_kind;
                return Err(Error::Input(format!("projections in fp8 need bf16 activations, and those are {kind:?}")));
            }
            self.fp8 = self.params.use_fp8(is_in_block)?;
        }
        Ok(())
    }

    /// Leaves gradients of the blocks' projections in bf16, see [`flowhn_nn::Params::use_bf16_grads`], and that of a head with a matrix
    /// of its own where the logits of `n_tokens` are one chunk. Where they are several, it is a sum of products and stays f32, as does
    /// that of the embedding. To be called after [`Model::set_logits_bytes`].
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no memory.
    pub fn use_bf16_grads(&self, n_tokens: usize) -> Result<()> {
        let is_one_chunk = logits_are_one_chunk(n_tokens, self.config.vocab_size, self.logits_bytes);
        Ok(self.params.use_bf16_grads(|name| is_in_block(name) || is_one_chunk && name == "lm_head.weight")?)
    }

    /// How many projections take their products in fp8.
    pub fn fp8_projections(&self) -> Fp8Projections {
        self.fp8
    }
}

/// Whether a parameter of this name belongs to a block.
fn is_in_block(name: &str) -> bool {
    name.starts_with("layers.")
}
