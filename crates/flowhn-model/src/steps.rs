//! Steps of decoding: single tokens, on a GPU from a CUDA graph for each way in which blocks share a token out.
// b batch, d d_model, v vocab_size

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use flowhn_attn::Clock;
use flowhn_split::Owner;
use flowhn_torch::{CaptureMode, Graph, GraphPool};
use tch::{Device, Kind, Tensor};

use crate::block::BlockCache;
use crate::layout::Layout;
use crate::{Error, Model, Result};

/// How a decoder runs single tokens on a CUDA device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepLaunch {
    /// A step is captured in a CUDA graph once it has run, and then replayed.
    #[default]
    Graph,
    /// Operator by operator.
    Operators,
}

/// What single tokens need beside the caches. Everything that a graph reads and writes stays where it is: the ids, the clock, the
/// states; only keys and values move, when they outgrow their memory, and then graphs are captured anew.
#[derive(Debug)]
pub(crate) struct Steps {
    clock: Clock,
    ids_b1: Tensor,
    patterns: HashMap<Vec<Owner>, Step>,
    /// How often caches had moved when the graphs were captured.
    n_moves: usize,
}

/// A step for tokens that all blocks share out alike.
#[derive(Debug)]
struct Step {
    layout: Rc<Layout>,
    /// Whether it has run: kernels are compiled and libtorch's libraries have chosen theirs.
    is_warm: bool,
    captured: Option<Captured>,
}

#[derive(Debug)]
struct Captured {
    graph: Graph,
    logits_bv: Tensor,
}

impl Steps {
    pub fn new(model: &Model, batch: usize) -> Result<Self> {
        let (config, device) = (model.config(), model.device());
        let rope = config.rope.map(|rope| (config.attn.d_head as i64, rope));
        let ids_b1 = Tensor::f_zeros([batch as i64, 1], (Kind::Int64, device))?;
        Ok(Self { clock: Clock::new(rope, device)?, ids_b1, patterns: HashMap::new(), n_moves: 0 })
    }

    /// Runs the token at an absolute position and returns the logits after it, `[batch, vocab_size]`.
    pub fn run(
        &mut self,
        model: &Model,
        caches: &mut [BlockCache],
        launch: StepLaunch,
        ids_b1: &Tensor,
        position: usize,
    ) -> Result<Tensor> {
        // A replay does not look at whether a weight's bf16 copy is up to date.
        model.refresh_bf16_copies()?;
        let owners = model.owners(position)?;
        self.clock.move_to(position as i64)?;
        self.ids_b1.f_copy_(ids_b1)?;
        self.make_room(model, caches, &owners)?;
        let pool = self.patterns.values().find_map(|step| step.captured.as_ref());
        let pool = pool.map(|captured| captured.graph.pool()).transpose()?;
        let step = match self.patterns.entry(owners) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let layout = Rc::new(Layout::step(entry.key(), model.device())?);
                entry.insert(Step { layout, is_warm: false, captured: None })
            }
        };
        let place = Place { model, clock: &self.clock, layout: &step.layout, ids_b1: &self.ids_b1 };
        let device_idx = match model.device() {
            Device::Cuda(device_idx) if launch == StepLaunch::Graph => device_idx,
            _ => return place.compute(caches),
        };
        if !step.is_warm {
            step.is_warm = true;
            return place.compute(caches);
        }
        let captured = match &mut step.captured {
            Some(captured) => {
                place.count(caches, position)?;
                captured
            }
            // What is captured counts the token too.
            none => none.insert(Captured::new(&place, caches, pool, device_idx)?),
        };
        captured.graph.replay()?;
        // The next replay overwrites what it wrote.
        let mut logits_bv = captured.logits_bv.f_empty_like()?;
        logits_bv.f_copy_(&captured.logits_bv)?;
        Ok(logits_bv)
    }

    /// Prepares the caches that the token leaves keys in; graphs that know other memory go.
    fn make_room(&mut self, model: &Model, caches: &mut [BlockCache], owners: &[Owner]) -> Result<()> {
        // On the CPU a cache grows when a token comes.
        let (batch, device) = (self.ids_b1.size()[0] as usize, model.device());
        if !device.is_cuda() {
            return Ok(());
        }
        for ((block, cache), owner) in model.blocks().iter().zip(&mut *caches).zip(owners) {
            if block.caches_keys_of(*owner) {
                block.make_room(cache, batch, model.compute_kind(), device)?;
            }
        }
        let n_moves = caches.iter().map(BlockCache::n_moves).sum();
        if n_moves != self.n_moves {
            self.patterns.values_mut().for_each(|step| step.captured = None);
            self.n_moves = n_moves;
        }
        Ok(())
    }
}

/// What a step works on.
#[derive(Clone, Copy)]
struct Place<'a> {
    model: &'a Model,
    clock: &'a Clock,
    layout: &'a Rc<Layout>,
    ids_b1: &'a Tensor,
}

impl Place<'_> {
    /// Enqueues the step and counts its token.
    fn compute(&self, caches: &mut [BlockCache]) -> Result<Tensor> {
        let pass = self.model.begin_token(self.ids_b1, self.layout, self.clock);
        self.clock.tick()?;
        let x_b1d = self.model.run_pass(&pass, Some(caches), |_| Ok(()))?;
        let logits_b1v = self.model.logits_of(&x_b1d)?;
        Ok(logits_b1v.f_select(1, 0)?)
    }

    /// Counts the token of a replay.
    fn count(&self, caches: &mut [BlockCache], position: usize) -> Result<()> {
        for ((block, cache), layout) in self.model.blocks().iter().zip(caches).zip(&self.layout.blocks) {
            let owner = if layout.attn.is_empty() { Owner::Ssm } else { Owner::Attn };
            if let Some(kv) = cache.kv.as_mut().filter(|_| block.caches_keys_of(owner)) {
                kv.count_step(position as i64)?;
            }
        }
        Ok(())
    }
}

impl Captured {
    fn new(place: &Place, caches: &mut [BlockCache], pool: Option<GraphPool>, device_idx: usize) -> Result<Self> {
        let mut graph = Graph::new()?;
        // The default stream cannot be captured. Nothing runs here: the replay does, in the stream that is current then.
        let _guard = place.model.capture_stream(device_idx)?.enter()?;
        match graph.try_capture(pool, CaptureMode::ThreadLocal, || place.compute(caches)) {
            Ok(logits_bv) => Ok(Self { logits_bv: logits_bv?, graph }),
            Err(error) => Err(Error::Input(format!(
                "{error}: the step cannot be captured on this device; StepLaunch::Operators runs it operator by operator"
            ))),
        }
    }
}
