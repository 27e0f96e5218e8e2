//! The language model: embedding, blocks, final norm, head.
// b batch, l seq_len, d d_model, t tokens of the batch, v vocab_size

mod projections;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use flowhn_attn::Clock;
use flowhn_nn::{
    Bias, Decay, Embedding, Fp8Projections, HeadMatrix, Init, LOGITS_BYTES, Linear, Params, Residual, RmsNorm, Weight,
    check_ids, linear, linear_cross_entropy_within, token_losses,
};
use flowhn_split::{ModelShape, Owner, Routing, SplitPlan};
use flowhn_torch::{Priority, Stream, catch, timeline};
use tch::{Device, Kind, Tensor};

use crate::block::{Block, BlockCache};
use crate::layout::Layout;
use crate::recompute::RecomputeEvery;
use crate::{Error, ModelConfig, Result, init};

pub use projections::Linears;

/// The names under which a [`timeline`] finds the parts of a model.
pub mod parts {
    /// The embedding's look-up.
    pub const EMBEDDING: &str = "embedding";
    /// The attention branch; in a released block with its MLP.
    pub const ATTENTION: &str = "attention";
    /// The state-space branch; in a released block with its MLP.
    pub const SSM: &str = "ssm";
    /// What splits, merges, fuses and adds around the branches.
    pub const FUSION: &str = "fusion";
    /// The MLP that a flow block's branches share.
    pub const MLP: &str = "mlp";
    /// The last norm and the LM head with the loss.
    pub const HEAD: &str = "head";
}

/// How the two branches of a block share a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Branches {
    /// One after the other.
    #[default]
    Serial,
    /// Attention on a second stream, beside the state-space model; on CUDA only.
    Streams,
}

/// Targets with this value count nothing.
pub const IGNORE_INDEX: i64 = -100;

/// How many layouts a model keeps; training and evaluation need one or two.
const MAX_LAYOUTS: usize = 8;

/// A FlowHN language model with its parameters.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    routing: Routing,
    params: Params,
    compute_kind: Kind,
    /// Where attention branches run, beside the others.
    side: Option<Stream>,
    capture_stream: Cell<Option<Stream>>,
    recompute_every: RecomputeEvery,
    /// The most that the logits of a chunk of tokens take in a loss.
    logits_bytes: u64,
    fp8: Fp8Projections,
    embed: Embedding,
    /// Learned tokens in front of every sequence, `[n_meta, d_model]`.
    meta: Option<Weight>,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Head,
    layouts: RefCell<HashMap<Range<usize>, Rc<Layout>>>,
}

/// The LM head's matrix `[vocab_size, d_model]`: its own or the embedding's.
#[derive(Debug)]
pub(crate) enum Head {
    Own(Linear),
    Tied(Weight),
}

impl Head {
    pub fn weight(&self) -> &Weight {
        match self {
            Self::Own(linear) => linear.weight(),
            Self::Tied(weight) => weight,
        }
    }
}

/// A batch of sequences.
///
/// Tensors may be on the CPU whatever the model's device: ids are checked there before they are copied. Those on an accelerator are
/// taken as they are, for a check would make the host wait; an id outside the vocabulary then gives NaN.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Token ids, i64 `[batch, seq_len]`.
    pub ids_bl: &'a Tensor,
    /// Documents of packed sequences, i64 `[batch, seq_len]`: equal within one, larger in the next. On the CPU that is checked; on an
    /// accelerator attention answers NaN or what equal ids mean.
    pub segments_bl: Option<&'a Tensor>,
    /// Absolute position of the first token; it decides the routing and rotary angles.
    pub offset: usize,
}

/// A forward pass that has been checked and laid out.
pub(crate) struct Pass<'a> {
    ids_bl: Tensor,
    pub segments_bl: Option<Tensor>,
    pub layout: Rc<Layout>,
    /// In a step of decoding, where its token stands.
    pub clock: Option<&'a Clock>,
    /// Learned tokens that stand in front.
    n_front: i64,
    seq_len: i64,
}

impl Pass<'_> {
    /// The stream without the learned tokens.
    pub fn of_tokens(&self, x_bld: &Tensor) -> Result<Tensor> {
        if self.n_front == 0 { Ok(x_bld.shallow_clone()) } else { Ok(x_bld.f_narrow(1, self.n_front, self.seq_len)?) }
    }

    fn part(&self, stream: &Residual) -> Result<Residual> {
        let change = stream.change.as_ref().map(|change| self.of_tokens(change)).transpose()?;
        Ok(Residual { x: self.of_tokens(&stream.x)?, change })
    }
}

impl<'a> Input<'a> {
    /// Sequences of one document each, from position 0.
    pub fn new(ids_bl: &'a Tensor) -> Self {
        Self { ids_bl, segments_bl: None, offset: 0 }
    }

    /// The same with documents.
    pub fn with_segments(self, segments_bl: Option<&'a Tensor>) -> Self {
        Self { segments_bl, ..self }
    }

    /// The same from another position on.
    pub fn at(self, offset: usize) -> Self {
        Self { offset, ..self }
    }
}

/// What a forward pass returns.
#[derive(Debug)]
pub struct Output {
    /// `[batch, seq_len, vocab_size]`.
    pub logits: Tensor,
    /// The embeddings, then the output of each block: `[batch, seq_len, d_model]`.
    pub hidden: Vec<Tensor>,
}

impl Model {
    /// Makes a model with initial weights that follow from `seed`.
    ///
    /// # Errors
    /// [`Error::Split`] or [`Error::Tensor`] if the configuration's sizes do not fit or the device refuses.
    pub fn new(config: &ModelConfig, device: Device, seed: u64) -> Result<Self> {
        let routing = config.routing()?;
        let mut params = Params::new(device, seed);
        let mut root = params.root();
        let (vocab_size, d_model) = (config.vocab_size as i64, config.d_model as i64);
        let std = Init::Normal { std: init::STD };
        let padding_idx = config.padding_idx.map(|idx| idx as i64);
        let embed = Embedding::new(&mut root, "embed", vocab_size, d_model, std.clone(), padding_idx)?;
        let meta = match config.options.n_meta as i64 {
            0 => None,
            n_meta => Some(root.weight("meta", &[n_meta, d_model], std.clone(), Decay::Yes)?),
        };
        let mut blocks = Vec::with_capacity(config.n_layers);
        for (block_idx, route) in routing.blocks().iter().enumerate() {
            blocks.push(Block::new(&mut root.push("layers").push(block_idx), config, block_idx, route.sharing())?);
        }
        let norm = RmsNorm::new(&mut root, "norm", d_model, config.rms_norm_eps)?;
        let head = match config.tie_embeddings {
            true => {
                embed.weight().want_bf16_copy();
                Head::Tied(embed.weight().clone())
            }
            false => Head::Own(Linear::new(&mut root, "lm_head", d_model, vocab_size, std, Bias::None)?),
        };
        init::scale_residual_outputs(config, &params)?;
        Ok(Self {
            config: config.clone(),
            routing,
            params,
            compute_kind: Kind::Float,
            side: None,
            capture_stream: Cell::new(None),
            recompute_every: RecomputeEvery::default(),
            logits_bytes: LOGITS_BYTES,
            fp8: Fp8Projections::default(),
            embed,
            meta,
            blocks,
            norm,
            head,
            layouts: RefCell::default(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The parameters, f32 masters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Where the parameters live.
    pub fn device(&self) -> Device {
        self.params.device()
    }

    /// The shape that costs follow from.
    pub fn shape(&self) -> ModelShape {
        self.config.shape()
    }

    /// Who reads which token.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// The plan of the first `seq_len` tokens.
    ///
    /// # Errors
    /// [`Error::Split`] for no tokens.
    pub fn plan(&self, seq_len: usize) -> Result<SplitPlan> {
        Ok(self.routing.plan(seq_len)?)
    }

    /// Chooses the type of activations, f32 or bf16; parameters stay f32.
    pub fn set_compute_kind(&mut self, kind: Kind) {
        self.compute_kind = kind;
    }

    /// Chooses whether the branches of a block run one after the other or beside each other.
    ///
    /// # Errors
    /// [`Error::Input`] for streams on another device than CUDA; [`Error::Tensor`] if there is no stream.
    pub fn set_branches(&mut self, branches: Branches) -> Result<()> {
        self.side = match (branches, self.device()) {
            (Branches::Serial, _) => None,
            (Branches::Streams, Device::Cuda(device_idx)) => Some(Stream::from_pool(device_idx, Priority::Normal)?),
            (Branches::Streams, device) => {
                let message = format!(
                    "branches on two streams need a CUDA device, and the model is on {device:?}: run them one after the other \
                     (train.branches = \"serial\")"
                );
                return Err(Error::Input(message));
            }
        };
        Ok(())
    }

    /// Chooses the blocks that [`Model::backward`] recomputes: less memory for more FLOPs, and the same bits.
    pub fn set_recompute_every(&mut self, every: RecomputeEvery) {
        self.recompute_every = every;
    }

    /// Chooses the most bytes that logits take at a time in [`Model::loss`] on CUDA, [`flowhn_nn::LOGITS_BYTES`] unless set: more are fewer
    /// passes over the gradient of the head ([`flowhn_nn::linear_cross_entropy_within`]), whose last bits they decide.
    pub fn set_logits_bytes(&mut self, n_bytes: u64) {
        self.logits_bytes = n_bytes;
    }

    /// Begins a training step: where projections are in fp8, chooses the scales and rounds the weights. It belongs before the step's
    /// first [`Model::loss`], and into the CUDA graph that captures the step.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device refuses.
    pub fn begin_step(&self) -> Result<()> {
        self.refresh_bf16_copies()?;
        Ok(self.params.begin_fp8_step()?)
    }

    /// Brings the bf16 copies of the weights up to date where the model computes with such: on CUDA in bf16. A forward pass does so
    /// by itself; the replay of one that a CUDA graph captured does not.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device refuses.
    pub fn refresh_bf16_copies(&self) -> Result<()> {
        match self.device().is_cuda() && self.compute_kind == Kind::BFloat16 {
            true => Ok(self.params.refresh_bf16_copies()?),
            false => Ok(()),
        }
    }

    /// Logits and hidden states of a batch.
    ///
    /// # Errors
    /// [`Error::Input`] for ids that are no tokens or shapes that do not fit; [`Error::Tensor`] if an operation fails.
    pub fn forward(&self, input: &Input) -> Result<Output> {
        let mut hidden = Vec::with_capacity(self.blocks.len() + 1);
        let _paused = self.params.pause_fp8();
        let x_bld = self.run(input, None, |stream| {
            hidden.push(stream.sum()?);
            Ok(())
        })?;
        Ok(Output { logits: self.logits_of(&x_bld)?, hidden })
    }

    /// Logits `[batch, seq_len, vocab_size]` of sequences from position 0.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn logits(&self, ids_bl: &Tensor, segments_bl: Option<&Tensor>) -> Result<Tensor> {
        let _paused = self.params.pause_fp8();
        let x_bld = self.run(&Input::new(ids_bl).with_segments(segments_bl), None, |_| Ok(()))?;
        self.logits_of(&x_bld)
    }

    /// Mean cross-entropy in nats, a scalar f32 that stays on the device, over the targets that are not [`IGNORE_INDEX`].
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn loss(&self, ids_bl: &Tensor, targets_bl: &Tensor, segments_bl: Option<&Tensor>) -> Result<Tensor> {
        let targets_t = self.targets(ids_bl, targets_bl)?;
        let x_bld = self.run(&Input::new(ids_bl).with_segments(segments_bl), None, |_| Ok(()))?;
        self.loss_of(&x_bld, self.head.weight(), &targets_t)
    }

    /// Cross-entropy of each target in nats, f32 `[batch, seq_len]`, 0 where it is [`IGNORE_INDEX`]; no gradient.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn token_losses(&self, ids_bl: &Tensor, targets_bl: &Tensor, segments_bl: Option<&Tensor>) -> Result<Tensor> {
        let _paused = self.params.pause_fp8();
        tch::no_grad(|| {
            let targets_t = self.targets(ids_bl, targets_bl)?;
            let x_bld = self.run(&Input::new(ids_bl).with_segments(segments_bl), None, |_| Ok(()))?;
            let x_td = self.before_head(&x_bld)?;
            let losses_t = catch(|| token_losses(&x_td, self.head.weight(), &targets_t, IGNORE_INDEX))?;
            Ok(losses_t.f_view(targets_bl.size().as_slice())?)
        })
    }

    /// The targets of these ids as `[batch * seq_len]`, on the model's device.
    pub(crate) fn targets(&self, ids_bl: &Tensor, targets_bl: &Tensor) -> Result<Tensor> {
        if targets_bl.size() != ids_bl.size() {
            let (ids, targets) = (ids_bl.size(), targets_bl.size());
            return Err(Error::Input(format!(
                "the targets have shape {targets:?}, the ids {ids:?}: give each id a target"
            )));
        }
        let targets_t = targets_bl.f_reshape([-1])?;
        // On the model's own device the loss checks them, where that can be done without waiting.
        if targets_t.device() == Device::Cpu && self.device() != Device::Cpu {
            let vocab_size = self.config.vocab_size as i64;
            check_ids("linear_cross_entropy", "targets_t", &targets_t, vocab_size, Some(IGNORE_INDEX))?;
        }
        Ok(targets_t.f_to_device(self.device())?)
    }

    /// The mean cross-entropy behind the last block's output, with this matrix in the head.
    pub(crate) fn loss_of<'a>(
        &self,
        x_bld: &Tensor,
        weight_vd: impl Into<HeadMatrix<'a>>,
        targets_t: &Tensor,
    ) -> Result<Tensor> {
        let x_td = self.before_head(x_bld)?;
        let loss = || linear_cross_entropy_within(&x_td, weight_vd, targets_t, IGNORE_INDEX, self.logits_bytes);
        catch(loss).map_err(Error::from)
    }

    /// Normed hidden states as rows `[batch * seq_len, d_model]`.
    fn before_head(&self, x_bld: &Tensor) -> Result<Tensor> {
        let x_bld = self.norm.forward(&timeline::pass(x_bld, parts::HEAD, parts::FUSION)?)?;
        Ok(x_bld.f_reshape([-1, self.config.d_model as i64])?)
    }

    /// The stream before the first block: embeddings, at the start of a sequence with the learned tokens in front.
    pub(crate) fn entry(&self, pass: &Pass) -> Result<Tensor> {
        let x_bld = self.embed.forward(&pass.ids_bl, self.compute_kind)?;
        let x_bld = match &self.meta {
            Some(meta) if pass.n_front > 0 => {
                let meta_bmd = meta.to(self.compute_kind).f_unsqueeze(0)?.f_expand([x_bld.size()[0], -1, -1], false)?;
                Tensor::f_cat(&[meta_bmd, x_bld], 1)?
            }
            _ => x_bld,
        };
        Ok(timeline::pass(&x_bld, parts::FUSION, parts::EMBEDDING)?)
    }

    /// The stream behind a block.
    pub(crate) fn run_block(
        &self,
        block_idx: usize,
        stream: &Residual,
        pass: &Pass,
        cache: Option<&mut BlockCache>,
    ) -> Result<Residual> {
        self.blocks[block_idx].forward(stream, block_idx, pass, cache, self.side)
    }

    pub(crate) fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(crate) fn head(&self) -> &Head {
        &self.head
    }

    pub(crate) fn recompute_every(&self) -> RecomputeEvery {
        self.recompute_every
    }

    /// Runs embedding and blocks; `visit` sees the tokens of the stream before the first and after each block. With caches, goes on from them.
    pub(crate) fn run(
        &self,
        input: &Input,
        caches: Option<&mut [BlockCache]>,
        visit: impl FnMut(&Residual) -> Result<()>,
    ) -> Result<Tensor> {
        let pass = self.begin(input, caches.is_some())?;
        self.run_pass(&pass, caches, visit)
    }

    /// As [`Model::run`], for an input that has been laid out.
    pub(crate) fn run_pass(
        &self,
        pass: &Pass,
        mut caches: Option<&mut [BlockCache]>,
        mut visit: impl FnMut(&Residual) -> Result<()>,
    ) -> Result<Tensor> {
        let outcome = catch(|| {
            let mut inner = || -> Result<Tensor> {
                let mut stream = Residual::of(self.entry(pass)?);
                visit(&pass.part(&stream)?)?;
                for block_idx in 0..self.n_blocks() {
                    let cache = caches.as_deref_mut().map(|caches| &mut caches[block_idx]);
                    stream = self.run_block(block_idx, &stream, pass, cache)?;
                    visit(&pass.part(&stream)?)?;
                }
                Ok(pass.part(&stream)?.sum()?)
            };
            Ok(inner())
        });
        outcome?
    }

    /// Checks an input, brings it to the device and lays out who reads which token of it.
    pub(crate) fn begin(&self, input: &Input, has_caches: bool) -> Result<Pass<'static>> {
        let seq_len = self.check_input(input)?;
        // Before anything else, so that no part of the pass waits for another part's stream.
        self.refresh_bf16_copies()?;
        let ids_bl = input.ids_bl.f_to_device(self.device())?;
        let segments_bl = input.segments_bl.map(|segments| segments.f_to_device(self.device())).transpose()?;
        let n_meta = self.config.options.n_meta;
        if n_meta > 0 && input.offset > 0 && !has_caches {
            let message =
                "a sequence begins with the learned tokens (model.n_meta), so without a cache it begins at position 0";
            return Err(Error::Input(message.to_owned()));
        }
        // Tokens stand behind the learned ones, which the first piece of a sequence brings along.
        let n_front = if input.offset == 0 { n_meta as i64 } else { 0 };
        let end = n_meta + input.offset + seq_len;
        let layout = self.layout(end - seq_len - n_front as usize..end)?;
        Ok(Pass { ids_bl, segments_bl, layout, clock: None, n_front, seq_len: seq_len as i64 })
    }

    /// A pass over one token a sequence behind the first, for which the clock and the layout of a step stand.
    pub(crate) fn begin_token<'a>(&self, ids_b1: &Tensor, layout: &Rc<Layout>, clock: &'a Clock) -> Pass<'a> {
        let layout = Rc::clone(layout);
        Pass { ids_bl: ids_b1.shallow_clone(), segments_bl: None, layout, clock: Some(clock), n_front: 0, seq_len: 1 }
    }

    /// Who reads the token at an absolute position, block by block.
    pub(crate) fn owners(&self, position: usize) -> Result<Vec<Owner>> {
        let owner = |block_idx| {
            let message = || Error::Input(format!("block {block_idx} has no plan for position {position}"));
            self.routing.owner(block_idx, position).ok_or_else(message)
        };
        (0..self.blocks.len()).map(owner).collect()
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    pub(crate) fn compute_kind(&self) -> Kind {
        self.compute_kind
    }

    /// The stream that steps of decoding are captured on; one, so that libraries keep one workspace for it.
    pub(crate) fn capture_stream(&self, device_idx: usize) -> Result<Stream> {
        let stream = match self.capture_stream.get() {
            Some(stream) => stream,
            None => Stream::from_pool(device_idx, Priority::Normal)?,
        };
        self.capture_stream.set(Some(stream));
        Ok(stream)
    }

    /// Final norm and cross-entropy in f32 of some rows of the stream, `[rows, d_model]`; no gradient.
    pub(crate) fn losses_of_rows(&self, x_td: &Tensor, targets_t: &Tensor) -> Result<Tensor> {
        let x_td = self.norm.forward(&x_td.f_to_kind(Kind::Float)?)?;
        catch(|| token_losses(&x_td, self.head.weight(), targets_t, IGNORE_INDEX)).map_err(Error::from)
    }

    pub(crate) fn logits_of(&self, x_bld: &Tensor) -> Result<Tensor> {
        let x_bld = self.norm.forward(x_bld)?;
        Ok(linear(&x_bld, self.head.weight())?)
    }

    /// The norm before the head.
    pub(crate) fn final_norm(&self, x_bld: &Tensor) -> Result<Tensor> {
        Ok(self.norm.forward(x_bld)?)
    }

    /// Empty caches for a batch.
    pub(crate) fn caches(&self, batch: usize) -> Vec<BlockCache> {
        self.blocks.iter().map(|block| block.cache(batch, &self.config, self.device())).collect()
    }

    pub(crate) fn check_input(&self, input: &Input) -> Result<usize> {
        let (size, kind) = (input.ids_bl.size(), input.ids_bl.kind());
        let (2, Kind::Int64) = (size.len(), kind) else {
            return Err(Error::Input(format!("ids are {kind:?} of shape {size:?}, expected i64 [batch, seq_len]")));
        };
        if size.contains(&0) {
            return Err(Error::Input(format!("ids have shape {size:?}: a batch needs at least one token")));
        }
        if let Some(segments) = input.segments_bl.filter(|segments| segments.size() != size) {
            return Err(Error::Input(format!("segments have shape {:?}, the ids {size:?}", segments.size())));
        }
        if let Some(segments) = input.segments_bl.filter(|segments| segments.device() == Device::Cpu) {
            check_documents(segments)?;
        }
        if input.segments_bl.is_some() && self.config.options.n_meta > 0 {
            let message = "a model with learned tokens (model.n_meta) reads one document a sequence: set \
                           data.reset_documents = false, or model.n_meta = 0";
            return Err(Error::Input(message.to_owned()));
        }
        // On an accelerator the check would make the host wait; there, data is checked when it is read.
        if input.ids_bl.device() == Device::Cpu {
            let (low, high) = (input.ids_bl.f_min()?.int64_value(&[]), input.ids_bl.f_max()?.int64_value(&[]));
            let vocab_size = self.config.vocab_size as i64;
            if let Some(id) = [low, high].into_iter().find(|id| !(0..vocab_size).contains(id)) {
                return Err(Error::Input(format!("token id {id} is outside the vocabulary of {vocab_size} tokens")));
            }
        }
        Ok(size[1] as usize)
    }

    fn layout(&self, range: Range<usize>) -> Result<Rc<Layout>> {
        if let Some(layout) = self.layouts.borrow().get(&range) {
            return Ok(Rc::clone(layout));
        }
        let plan = self.routing.plan_range(range.clone())?;
        let layout = Rc::new(Layout::new(&plan, range.clone(), self.device())?);
        let mut layouts = self.layouts.borrow_mut();
        // Decoding visits each range once; only layouts from the start are asked for again.
        if range.start == 0 {
            if layouts.len() == MAX_LAYOUTS {
                layouts.clear();
            }
            layouts.insert(range, Rc::clone(&layout));
        }
        Ok(layout)
    }
}

/// Documents follow one another: what reads them finds their ends by halves.
fn check_documents(segments_bl: &Tensor) -> Result<()> {
    let steps = segments_bl.f_diff(1, 1, None::<&Tensor>, None::<&Tensor>)?;
    let decreasing = steps.f_lt(0)?.f_nonzero()?;
    if decreasing.size()[0] == 0 {
        return Ok(());
    }
    let (row, token) = (decreasing.int64_value(&[0, 0]), decreasing.int64_value(&[0, 1]) + 1);
    Err(Error::Input(format!(
        "segments decrease at token {token} of sequence {row}: number the documents of a sequence in their order"
    )))
}
