//! Decoding with caches: feeding a text in any pieces gives the logits of the whole.

use tch::Tensor;

use crate::block::BlockCache;
use crate::model::Input;
use crate::steps::{StepLaunch, Steps};
use crate::{Error, Model, Result};

/// A batch of sequences that grow together, with what each block remembers of them.
///
/// Each block keeps keys and values of the positions attention read, and the convolution window and state of those the SSM
/// read. Tokens are routed by absolute position, as in training. On a CUDA device single tokens are replayed from CUDA graphs
/// ([`StepLaunch`]).
#[derive(Debug)]
pub struct Decoder<'a> {
    model: &'a Model,
    batch: usize,
    position: usize,
    caches: Vec<BlockCache>,
    launch: StepLaunch,
    steps: Steps,
    /// Set while blocks are being fed; a failure in between leaves caches of different lengths.
    broken: bool,
}

impl Model {
    /// A decoder for `batch` sequences, before their first token.
    ///
    /// # Errors
    /// [`Error::Input`] for a model planned by the released script's own form, whose routing changes with the length.
    pub fn decoder(&self, batch: usize) -> Result<Decoder<'_>> {
        if self.routing().blocks().iter().any(|route| route.settings().released) {
            let message = "`released = true` plans anew at every length, so earlier tokens would change branches: \
                           decode with the figure's form, or run the whole sequence";
            return Err(Error::Input(message.to_owned()));
        }
        if batch == 0 {
            return Err(Error::Input("a decoder needs at least one sequence".to_owned()));
        }
        let (caches, steps) = (self.caches(batch), Steps::new(self, batch)?);
        Ok(Decoder { model: self, batch, position: 0, caches, launch: StepLaunch::default(), steps, broken: false })
    }
}

impl Decoder<'_> {
    /// Chooses how single tokens run on a CUDA device; both give the same bits. On the CPU there is no choice.
    pub fn set_step_launch(&mut self, launch: StepLaunch) {
        self.launch = launch;
    }

    /// Feeds the next tokens, `[batch, m]` with any `m >= 1`, and returns the logits after the last, `[batch, vocab_size]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the ids do not fit; [`Error::Tensor`] if an operation fails, after which the decoder is unusable.
    pub fn feed(&mut self, ids_bm: &Tensor) -> Result<Tensor> {
        // The head is the widest product: the other tokens do without.
        let logits_b1v = self.advance(ids_bm, |x_bmd| Ok(x_bmd.f_narrow(1, x_bmd.size()[1] - 1, 1)?))?;
        Ok(logits_b1v.f_select(1, 0)?)
    }

    /// As [`Decoder::feed`], with the logits after every fed token, `[batch, m, vocab_size]`.
    ///
    /// # Errors
    /// As [`Decoder::feed`].
    pub fn feed_all(&mut self, ids_bm: &Tensor) -> Result<Tensor> {
        self.advance(ids_bm, |x_bmd| Ok(x_bmd.shallow_clone()))
    }

    /// Feeds tokens; the logits of those of them that are chosen.
    fn advance(&mut self, ids_bm: &Tensor, choose: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        if self.broken {
            return Err(Error::Input("an earlier feed failed half-way: start a new decoder".to_owned()));
        }
        if ids_bm.dim() != 2 || ids_bm.size()[0] != self.batch as i64 {
            return Err(Error::Input(format!("ids have shape {:?}, expected [{}, m]", ids_bm.size(), self.batch)));
        }
        let input = Input::new(ids_bm).at(self.position);
        self.model.check_input(&input)?;
        self.broken = true;
        let _paused = self.model.params().pause_fp8();
        let logits = tch::no_grad(|| self.run(&input, choose))?;
        self.broken = false;
        self.position += ids_bm.size()[1] as usize;
        Ok(logits)
    }

    fn run(&mut self, input: &Input, choose: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (model, n_meta) = (self.model, self.model.config().options.n_meta);
        // The first token brings the learned ones along.
        if input.ids_bl.size()[1] == 1 && (n_meta == 0 || input.offset > 0) {
            let position = n_meta + input.offset;
            let logits_bv = self.steps.run(model, &mut self.caches, self.launch, input.ids_bl, position)?;
            return Ok(logits_bv.f_unsqueeze(1)?);
        }
        // Steps find the states where graphs have seen them.
        let seen = if model.device().is_cuda() { &self.caches[..] } else { &[] };
        let before: Vec<_> = seen.iter().map(BlockCache::state).collect();
        let x_bmd = model.run(input, Some(&mut self.caches), |_| Ok(()))?;
        self.caches.iter_mut().zip(before).try_for_each(|(cache, before)| cache.put_state(before))?;
        model.logits_of(&choose(&x_bmd)?)
    }

    /// Number of tokens fed so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes that the caches hold.
    pub fn cache_bytes(&self) -> u64 {
        self.caches.iter().map(BlockCache::n_bytes).sum()
    }
}
