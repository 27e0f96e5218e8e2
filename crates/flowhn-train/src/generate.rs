//! Continuing a prompt.

use std::ops::ControlFlow;

use flowhn_model::{Decoder, Model};
use flowhn_torch::{Error as TensorError, catch, cpu};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use crate::data::Tokenizer;
use crate::{Error, Result};

/// How the next token is chosen, and when to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleOptions {
    /// Logits are divided by it; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only the likeliest tokens whose probabilities add up to this are drawn from; 1 for all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Most tokens to add.
    pub max_tokens: usize,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self { temperature: 0.8, top_p: 0.95, seed: 0, max_tokens: 128 }
    }
}

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended the text.
    EndOfText,
    /// [`SampleOptions::max_tokens`] were added.
    MaxTokens,
    /// The caller broke off.
    Interrupted,
}

/// A prompt's continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The text, without the prompt.
    pub text: String,
    /// Tokens added, end-of-text not counted.
    pub n_tokens: usize,
    /// Why it ended.
    pub stop: StopReason,
}

/// Continues `prompt`, token by token through the model's caches, and hands each piece of text to `on_text` as soon as it is
/// whole; the callback may break off. The model reads end-of-text before the prompt, as it did before every document.
///
/// # Errors
/// [`Error::Setting`] for options outside their range, [`Error::Data`] where the tokenizer does not fit the model.
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &SampleOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Continuation> {
    tokenizer.check_vocab_size(model.config().vocab_size)?;
    let mut sampler = TokenSampler::new(options)?;
    let device = model.params().device();
    let mut ids = vec![i64::from(tokenizer.eot_id())];
    ids.extend(tokenizer.encode(prompt)?.into_iter().map(i64::from));

    let mut reader = Reader::new(model)?;
    let mut stream = tokenizer.stream_decoder();
    let mut out = Continuation { text: String::new(), n_tokens: 0, stop: StopReason::MaxTokens };
    let mut emit = |out: &mut Continuation, piece: String| {
        out.text.push_str(&piece);
        !piece.is_empty() && on_text(&piece).is_break()
    };
    while out.n_tokens < options.max_tokens {
        let ids_bm = on_device(&ids, device)?;
        let logits = host_row(&tch::no_grad(|| reader.feed(&ids_bm))?)?;
        // Rows of a head that is wider than the tokenizer stand for no token.
        let id = sampler.draw(&logits[..tokenizer.vocab_size()])?;
        if id == tokenizer.eot_id() {
            out.stop = StopReason::EndOfText;
            break;
        }
        out.n_tokens += 1;
        ids = vec![i64::from(id)];
        if emit(&mut out, stream.push(id)?) {
            out.stop = StopReason::Interrupted;
            return Ok(out);
        }
    }
    emit(&mut out, stream.finish()?);
    Ok(out)
}

/// What gives the logits of the next token.
enum Reader<'a> {
    /// Through the caches.
    Cached(Box<Decoder<'a>>),
    /// Over the whole text again: a model planned by the released script's own form routes by the length at hand.
    Whole { model: &'a Model, ids_bl: Option<Tensor> },
}

impl<'a> Reader<'a> {
    fn new(model: &'a Model) -> Result<Self> {
        match model.config().split.released {
            true => Ok(Self::Whole { model, ids_bl: None }),
            false => Ok(Self::Cached(Box::new(model.decoder(1)?))),
        }
    }

    /// Logits `[1, vocab_size]` after these tokens and all before.
    fn feed(&mut self, ids_bm: &Tensor) -> Result<Tensor> {
        match self {
            Self::Cached(decoder) => Ok(decoder.feed(ids_bm)?),
            Self::Whole { model, ids_bl } => {
                let before = ids_bl.take();
                let parts: Vec<&Tensor> = before.iter().chain([ids_bm]).collect();
                let whole = catch(|| Ok(Tensor::cat(&parts, 1)))?;
                let logits_blv = model.logits(&whole, None)?;
                *ids_bl = Some(whole);
                Ok(catch(|| Ok(logits_blv.select(1, -1)))?)
            }
        }
    }
}

/// Ids `[1, m]` on the device. A single one is written there by the device itself, so that the host need not wait for a copy.
fn on_device(ids: &[i64], device: Device) -> Result<Tensor> {
    let ids_bm = match *ids {
        [id] => Tensor::f_full([1, 1], id, (Kind::Int64, device)).map_err(TensorError::from)?,
        _ => cpu::from_slice(&[1, ids.len() as i64], ids)?.f_to_device(device).map_err(TensorError::from)?,
    };
    Ok(ids_bm)
}

fn host_row(logits_bv: &Tensor) -> Result<Vec<f32>> {
    let row = catch(|| Ok(logits_bv.select(0, 0).to_kind(Kind::Float).to_device(Device::Cpu).contiguous()))?;
    Ok(cpu::slice::<f32>(&row)?.to_vec())
}

/// Draws tokens from logits.
///
/// ```
/// use flowhn_train::generate::{SampleOptions, TokenSampler};
/// let greedy = SampleOptions { temperature: 0., ..SampleOptions::default() };
/// assert_eq!(TokenSampler::new(&greedy)?.draw(&[0.1, 2.5, 2.5, -1.])?, 1);
/// # Ok::<(), flowhn_train::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenSampler {
    temperature: f64,
    top_p: f64,
    rng: ChaCha8Rng,
}

impl TokenSampler {
    /// A sampler with its own random stream.
    ///
    /// # Errors
    /// [`Error::Setting`] for options outside their range.
    pub fn new(options: &SampleOptions) -> Result<Self> {
        let &SampleOptions { temperature, top_p, seed, .. } = options;
        if !(temperature.is_finite() && temperature >= 0.) {
            return Err(Error::setting("temperature", temperature, "it must be a finite number, at least 0"));
        }
        if !(top_p > 0. && top_p <= 1.) {
            return Err(Error::setting("top_p", top_p, "it must be above 0 and at most 1"));
        }
        Ok(Self { temperature, top_p, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The index of the token drawn. Of equal logits the first counts as the larger.
    ///
    /// # Errors
    /// [`Error::Tensor`] where the logits are empty or not finite.
    pub fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.is_empty() || logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY) {
            return Err(
                TensorError::invalid("draw", "the model's logits are not numbers; its weights are damaged").into()
            );
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |id: u32| f64::from(logits[id as usize]);
        if self.temperature == 0. {
            let first = |best: u32, id: u32| if logit(id) > logit(best) { id } else { best };
            return Ok(order.into_iter().reduce(first).unwrap_or(0));
        }
        // A stable sort leaves equal logits in the order of their ids.
        order.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)));
        let top = logit(order[0]);
        let weights: Vec<f64> = order.iter().map(|&id| ((logit(id) - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.;
        let n_kept = 1 + weights
            .iter()
            .take_while(|&weight| {
                kept += weight;
                kept < self.top_p * total
            })
            .count();
        let weights = &weights[..n_kept.min(weights.len())];
        let uniform = (self.rng.next_u64() >> 11) as f64 * (0.5f64).powi(53);
        let mut left = uniform * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|weight| {
            left -= weight;
            left < 0.
        });
        // Rounding may leave a speck after the last one.
        Ok(order[drawn.unwrap_or(weights.len() - 1)])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn draws(options: SampleOptions, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = TokenSampler::new(&options).unwrap();
        (0..n).map(|_| sampler.draw(logits).unwrap()).collect()
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [1f32.ln(), 2f32.ln(), 5f32.ln()];
        let options = SampleOptions { temperature: 1., top_p: 1., ..SampleOptions::default() };
        let drawn = draws(options, &logits, 40_000);
        for (id, want) in [(0, 0.125), (1, 0.25), (2, 0.625)] {
            let share = drawn.iter().filter(|&&got| got == id).count() as f64 / 40_000.;
            // Five standard deviations of the likeliest one are 0.012.
            assert!((share - want).abs() < 0.0125, "{id}: {share}");
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        let logits = [1f32.ln(), 2f32.ln(), 5f32.ln()];
        let only = |top_p| {
            let mut ids = draws(SampleOptions { temperature: 1., top_p, ..SampleOptions::default() }, &logits, 500);
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(only(0.6), [2]);
        assert_eq!(only(0.7), [1, 2]);
        assert_eq!(only(0.9), [0, 1, 2]);
    }

    #[test]
    fn the_seed_decides_and_a_cold_sampler_is_greedy() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37) % 11) as f32 * 0.3).collect();
        let options = SampleOptions { temperature: 1., top_p: 1., seed: 3, ..SampleOptions::default() };
        assert_eq!(draws(options, &logits, 30), draws(options, &logits, 30));
        assert_ne!(draws(options, &logits, 30), draws(SampleOptions { seed: 4, ..options }, &logits, 30));
        let cold = draws(SampleOptions { temperature: 1e-4, ..options }, &[0., 3., 2.9], 30);
        assert!(cold.iter().all(|&id| id == 1));
    }

    #[test]
    fn options_and_logits_out_of_range_are_refused() {
        let refused = |options| TokenSampler::new(&options).unwrap_err().to_string();
        assert!(refused(SampleOptions { temperature: -1., ..SampleOptions::default() }).contains("temperature"));
        assert!(refused(SampleOptions { top_p: 0., ..SampleOptions::default() }).contains("top_p"));
        let mut sampler = TokenSampler::new(&SampleOptions::default()).unwrap();
        assert!(sampler.draw(&[0., f32::NAN]).is_err());
        assert!(sampler.draw(&[]).is_err());
        assert_eq!(sampler.draw(&[f32::NEG_INFINITY, 0.]).unwrap(), 1);
    }

    proptest! {
        #[test]
        fn a_drawn_token_is_among_the_kept_ones(
            logits in prop::collection::vec(-20f32..20., 1..40),
            temperature in 0f64..3., top_p in 0.01f64..1., seed in any::<u64>(),
        ) {
            let options = SampleOptions { temperature, top_p, seed, max_tokens: 1 };
            let id = draws(options, &logits, 1)[0] as usize;
            prop_assert!(id < logits.len());
            // The likelier tokens alone must not reach top_p already.
            let weight = |logit: f32| (f64::from(logit) / temperature.max(1e-6)).exp();
            if temperature > 0.1 {
                let likelier: f64 = logits.iter().filter(|&&l| l > logits[id]).map(|&l| weight(l)).sum();
                let total: f64 = logits.iter().map(|&l| weight(l)).sum();
                prop_assert!(likelier < top_p * total * (1. + 1e-9));
            }
        }
    }
}
