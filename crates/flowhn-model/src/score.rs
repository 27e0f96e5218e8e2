//! The likelihood of chosen tokens: only their positions go through the head.
// b batch, l seq_len, d d_model, n targets of a chunk

use flowhn_torch::{catch, cpu};
use tch::{Device, Kind, Tensor};

use crate::model::Input;
use crate::{Error, Model, Result};

/// Targets that go through the head at once: always so many, as the rounding of a matrix product follows its shape.
const CHUNK: usize = 256;

/// A token whose likelihood is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The sequence in the batch.
    pub row: usize,
    /// The position after which the token is predicted.
    pub position: usize,
    /// The token.
    pub id: i64,
}

/// What [`Model::score`] found, in the order of the targets.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetScores {
    /// Cross-entropy of each target in nats.
    pub nats: Vec<f32>,
    /// Whether each is the token that the model holds likeliest; empty where that was not asked for.
    pub likeliest: Vec<bool>,
}

impl Model {
    /// Scores chosen tokens of sequences that start at position 0; one position may be asked about several tokens.
    ///
    /// Only the positions of the targets go through final norm and head, and there in f32 whatever the type of activations:
    /// logits rounded to bf16 differ by as much as the continuations that one compares. The result comes to the host.
    ///
    /// # Errors
    /// [`Error::Input`] for a target outside the batch or the vocabulary, else as [`Model::forward`].
    pub fn score(&self, ids_bl: &Tensor, targets: &[Target], likeliest: bool) -> Result<TargetScores> {
        let seq_len = self.check_input(&Input::new(ids_bl))?;
        let (n_rows, vocab_size) = (ids_bl.size()[0] as usize, self.config().vocab_size);
        let fits = |target: &Target| {
            target.row < n_rows && target.position < seq_len && (0..vocab_size as i64).contains(&target.id)
        };
        if let Some(target) = targets.iter().find(|target| !fits(target)) {
            let message = format!("{target:?} is outside {n_rows} sequences of {seq_len} tokens or {vocab_size} ids");
            return Err(Error::Input(message));
        }
        // The last chunk is filled up with tokens that nobody reads.
        let n_padded = targets.len().next_multiple_of(CHUNK).max(CHUNK);
        let on_device = |value: &dyn Fn(&Target) -> i64| {
            let mut values: Vec<i64> = targets.iter().map(value).collect();
            values.resize(n_padded, 0);
            catch(|| Ok(Tensor::from_slice(&values).f_to_device(self.device())?))
        };
        let places = on_device(&|target| (target.row * seq_len + target.position) as i64)?;
        let ids = on_device(&|target| target.id)?;
        let _paused = self.params().pause_fp8();
        let (nats, best) = tch::no_grad(|| -> Result<_> {
            let x_bld = self.run(&Input::new(ids_bl), None, |_| Ok(()))?;
            let x_td = x_bld.f_reshape([-1, self.config().d_model as i64])?;
            let (mut nats, mut best) = (Vec::new(), Vec::new());
            for (places_n, ids_n) in places.f_split(CHUNK as i64, 0)?.iter().zip(ids.f_split(CHUNK as i64, 0)?) {
                let x_nd = x_td.f_index_select(0, places_n)?.f_to_kind(Kind::Float)?;
                nats.push(self.losses_of_rows(&x_nd, &ids_n)?);
                if likeliest {
                    best.push(self.logits_of(&x_nd)?.f_argmax(-1, false)?.f_eq_tensor(&ids_n)?);
                }
            }
            Ok((nats, best))
        })?;
        let to_host = |chunks: &[Tensor]| -> Result<Tensor> {
            Ok(Tensor::f_cat(chunks, 0)?.f_narrow(0, 0, targets.len() as i64)?.f_to_device(Device::Cpu)?)
        };
        let nats = cpu::slice::<f32>(&to_host(&nats)?)?.to_vec();
        let likeliest = if likeliest { cpu::slice::<bool>(&to_host(&best)?)?.to_vec() } else { Vec::new() };
        Ok(TargetScores { nats, likeliest })
    }
}
