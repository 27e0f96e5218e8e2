//! Floating-point operations of branches, blocks and models.
//!
//! One multiply-add counts 2. Matrix products, attention scores, convolution and scan are kept
//! apart; norms and elementwise work count as bytes ([`crate::BlockBytes`]), not here. The
//! embedding's look-up is free, the head is not. A backward pass costs twice its forward pass.
//! How an implementation tiles or chunks does not change what the model costs.

use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

use crate::shape::product;
use crate::{
    AttnShape, BlockForm, BlockPlan, BlockShape, Branch, Bridge, FuseShape, MlpShape, ModelShape, Result, Routing,
    Sharing, SsmShape,
};

/// How the products of queries with keys are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScoreCount {
    /// Each query with the keys up to its own position.
    #[default]
    Causal,
    /// Each query with all keys, as implementations without causal skipping compute.
    Full,
}

/// Forward FLOPs, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Flops {
    /// Matrix products with weights.
    pub matmul: u64,
    /// Products of queries with keys, and of scores with values.
    pub scores: u64,
    /// The causal convolution.
    pub conv: u64,
    /// The recurrence: decay, input and readout of the state.
    pub scan: u64,
}

impl Flops {
    /// The sum of all kinds.
    pub fn total(&self) -> u64 {
        self.matmul + self.scores + self.conv + self.scan
    }

    pub(crate) fn of_matmul(matmul: u64) -> Self {
        Self { matmul, ..Self::default() }
    }
}

impl Add for Flops {
    type Output = Flops;

    fn add(self, other: Flops) -> Flops {
        Flops {
            matmul: self.matmul + other.matmul,
            scores: self.scores + other.scores,
            conv: self.conv + other.conv,
            scan: self.scan + other.scan,
        }
    }
}

impl AddAssign for Flops {
    fn add_assign(&mut self, other: Flops) {
        *self = *self + other;
    }
}

impl AttnShape {
    /// FLOPs of the mixer for `n_attn` queries, `n_kv` keys and values, and `pairs` products of a
    /// query with a key, counted twice so that averages stay whole.
    pub(crate) fn flops(&self, d_model: usize, n_attn: usize, n_kv: usize, twice_pairs: u64) -> Flops {
        Flops {
            matmul: product(&[4, n_attn, d_model, self.d_q()]) + product(&[4, n_kv, d_model, self.d_kv()]),
            scores: product(&[2, self.d_q()]) * twice_pairs,
            ..Flops::default()
        }
    }
}

impl SsmShape {
    /// FLOPs of the mixer for `n_ssm` tokens.
    pub fn flops(&self, d_model: usize, n_ssm: usize) -> Flops {
        let weights: u64 = self.matrices(d_model).iter().map(|&(k, n)| product(&[k, n])).sum();
        Flops {
            matmul: product(&[2, n_ssm]) * weights,
            conv: product(&[2, n_ssm, self.d_conv(), self.conv_channels()]),
            scan: product(&[6, n_ssm, self.d_inner(), self.d_state()]),
            scores: 0,
        }
    }
}

impl MlpShape {
    /// FLOPs of the MLP for `n_tokens` tokens.
    pub fn flops(&self, d_model: usize, n_tokens: usize) -> u64 {
        product(&[6, n_tokens, d_model, self.d_ff])
    }
}

impl FuseShape {
    /// FLOPs of the joining matrices for `n_tokens` tokens.
    pub fn flops(&self, d_model: usize, n_tokens: usize) -> u64 {
        let squares = self.squares() + usize::from(self.final_proj);
        product(&[2, n_tokens, squares, d_model, d_model])
    }
}

/// Forward FLOPs of one block and one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockFlops {
    /// Attention, in a released block with its MLP.
    pub attn: Flops,
    /// The SSM, likewise.
    pub ssm: Flops,
    /// What joins the branches, and `final_proj`.
    pub fuse: u64,
    /// The shared MLP of a flow block.
    pub mlp: u64,
}

impl BlockFlops {
    /// The sum of all parts.
    pub fn total(&self) -> u64 {
        self.attn.total() + self.ssm.total() + self.fuse + self.mlp
    }

    /// How far apart the two branches are: the difference of their costs over the larger one, 0
    /// when they are balanced and 1 when one of them does nothing. `None` unless the block has
    /// both branches.
    pub fn imbalance(&self, sharing: Sharing) -> Option<f64> {
        let (attn, ssm) = (self.attn.total(), self.ssm.total());
        let both = Branch::ALL.iter().all(|&branch| sharing.has(branch));
        (both && attn.max(ssm) > 0).then(|| attn.abs_diff(ssm) as f64 / attn.max(ssm) as f64)
    }
}

impl BlockShape {
    /// FLOPs of the block for one sequence routed by `plan`.
    pub fn flops(&self, sharing: Sharing, plan: &BlockPlan, count: ScoreCount) -> BlockFlops {
        let seq_len = plan.seq_len();
        let n_attn = plan.tokens(Branch::Attn);
        let twice_pairs = match self.attn.bridge {
            Bridge::None => self.own_pairs(n_attn, count),
            Bridge::Kv => plan
                .ranges(Branch::Attn)
                .iter()
                .map(|range| bridged_pairs(range.end, range.len(), seq_len, count))
                .sum(),
        };
        let shared_mlp = match self.form {
            BlockForm::Released => 0,
            BlockForm::Flow(_) => self.mlp.flops(self.d_model, seq_len),
        };
        BlockFlops {
            attn: self.attn_flops(n_attn, seq_len, twice_pairs),
            ssm: self.ssm_flops(plan.tokens(Branch::Ssm)),
            fuse: self.fuse(sharing).flops(self.d_model, seq_len),
            mlp: shared_mlp,
        }
    }

    /// The whole attention branch: mixer, and MLP where it belongs to the branch.
    pub(crate) fn attn_flops(&self, n_attn: usize, seq_len: usize, twice_pairs: u64) -> Flops {
        let n_kv = match self.attn.bridge {
            Bridge::Kv if n_attn > 0 => seq_len,
            _ => n_attn,
        };
        self.attn.flops(self.d_model, n_attn, n_kv, twice_pairs) + self.own_mlp(n_attn)
    }

    /// The whole SSM branch: mixer, and MLP where it belongs to the branch.
    pub(crate) fn ssm_flops(&self, n_ssm: usize) -> Flops {
        self.ssm.flops(self.d_model, n_ssm) + self.own_mlp(n_ssm)
    }

    /// Twice the pairs of a query and a key that the window shows it among `n_attn` tokens that follow each other.
    fn own_pairs(&self, n_attn: usize, count: ScoreCount) -> u64 {
        match (self.options.window, count) {
            (Some(window), ScoreCount::Causal) => {
                // The query at position p sees the window and what learned tokens lie before it: min(p + 1, reach) keys.
                let reach = (window + self.options.n_meta).min(n_attn);
                product(&[reach, reach + 1]) + product(&[2, reach, n_attn - reach])
            }
            _ => own_pairs(n_attn, count),
        }
    }

    fn own_mlp(&self, n_tokens: usize) -> Flops {
        match self.form {
            BlockForm::Released => Flops::of_matmul(self.mlp.flops(self.d_model, n_tokens)),
            BlockForm::Flow(_) => Flops::default(),
        }
    }
}

/// Twice the pairs of a query and a key among `n_attn` tokens that see only one another.
pub(crate) fn own_pairs(n_attn: usize, count: ScoreCount) -> u64 {
    match count {
        ScoreCount::Causal => product(&[n_attn, n_attn + 1]),
        ScoreCount::Full => product(&[2, n_attn, n_attn]),
    }
}

/// Twice the pairs of the `len` queries that end before position `end` with every earlier key.
pub(crate) fn bridged_pairs(end: usize, len: usize, seq_len: usize, count: ScoreCount) -> u64 {
    match count {
        // The queries at end - len .. end see end - len + 1 ..= end keys.
        ScoreCount::Causal => product(&[len, 2 * end + 1 - len]),
        ScoreCount::Full => product(&[2, len, seq_len]),
    }
}

/// Forward FLOPs of a model for one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFlops {
    /// The blocks.
    pub blocks: Vec<BlockFlops>,
    /// The head.
    pub head: u64,
}

impl ModelFlops {
    /// Counts the FLOPs of `seq_len` tokens, routed as `routing` does, and of the learned tokens in front of them.
    ///
    /// # Errors
    /// [`crate::Error::EmptySequence`] for no tokens; [`crate::Error::BlockCount`] when `routing` was made for
    /// another number of blocks.
    pub fn new(model: &ModelShape, routing: &Routing, seq_len: usize, count: ScoreCount) -> Result<Self> {
        routing.check_blocks(&model.blocks)?;
        let plan = routing.plan(seq_len + model.n_meta())?;
        let blocks = model.blocks.iter().zip(routing.blocks()).zip(plan.blocks());
        Ok(Self {
            blocks: blocks.map(|((shape, route), plan)| shape.flops(route.sharing(), plan, count)).collect(),
            head: product(&[2, seq_len, model.d_model, model.vocab_size]),
        })
    }

    /// The forward pass.
    pub fn forward(&self) -> u64 {
        self.head + self.blocks.iter().map(BlockFlops::total).sum::<u64>()
    }

    /// The backward pass: twice the forward pass.
    pub fn backward(&self) -> u64 {
        2 * self.forward()
    }

    /// Forward and backward pass: the FLOPs of the model in a training step. Recomputed
    /// activations do not count, see [`ModelFlops::recomputed`].
    pub fn training(&self) -> u64 {
        3 * self.forward()
    }

    /// What a training step computes beside [`ModelFlops::training`] where the blocks that `takes`
    /// tells run forward once more for their backward pass.
    pub fn recomputed(&self, takes: impl Fn(usize) -> bool) -> u64 {
        let blocks = self.blocks.iter().enumerate().filter(|(block_idx, _)| takes(*block_idx));
        blocks.map(|(_, block)| block.total()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Owner;
    use crate::shape::tests::{mamba2, released_135m};
    use crate::{BlockForm, Fusion};

    fn plan(runs: &[(usize, Owner)]) -> BlockPlan {
        BlockPlan::from_runs(runs.iter().copied()).unwrap()
    }

    #[test]
    fn a_block_by_hand() {
        let block = released_135m();
        let plan = plan(&[(2, Owner::Ssm), (3, Owner::Attn)]);
        let flops = block.flops(Sharing::Split, &plan, ScoreCount::Causal);
        let mlp = 6 * 768 * 2048;
        assert_eq!(flops.attn.matmul, 3 * (4 * 768 * 768 + 4 * 768 * 192 + mlp));
        assert_eq!(flops.attn.scores, 6 * 4 * 24 * 32);
        let ssm = 2 * (768 * 3072 + 1536 * 80 + 48 * 1536 + 1536 * 768) + mlp;
        assert_eq!(flops.ssm.matmul, 2 * ssm);
        assert_eq!(flops.ssm.conv, 2 * 2 * 4 * 1536);
        assert_eq!(flops.ssm.scan, 2 * 6 * 1536 * 16);
        assert_eq!(flops.fuse, 5 * 2 * 2 * 768 * 768);
        assert_eq!(flops.mlp, 0);
    }

    #[test]
    fn the_full_square_counts_every_pair() {
        let block = released_135m();
        let plan = plan(&[(5, Owner::Both)]);
        let flops = block.flops(Sharing::Parallel, &plan, ScoreCount::Full);
        assert_eq!(flops.attn.scores, 25 * 4 * 768);
    }

    #[test]
    fn a_window_shows_a_query_at_most_its_reach() {
        let mut block = released_135m();
        block.options.window = Some(3);
        let scores = |block: &BlockShape, n| {
            let plan = plan(&[(n, Owner::Attn)]);
            block.flops(Sharing::AttnOnly, &plan, ScoreCount::Causal).attn.scores / (4 * 768)
        };
        assert_eq!(scores(&block, 2), 1 + 2);
        assert_eq!(scores(&block, 6), 1 + 2 + 3 * 4);
        block.options.n_meta = 2;
        assert_eq!(scores(&block, 7), 1 + 2 + 3 + 4 + 5 * 3);
    }

    #[test]
    fn learned_tokens_cost_blocks_but_no_head() {
        let mut block = released_135m();
        block.form = BlockForm::Flow(Fusion::None);
        let routing = Routing::new(16, &[crate::SplitSettings::new("no_split".parse().unwrap())], &[block]).unwrap();
        let flops = |n_meta, seq_len| {
            let mut block = block;
            block.options.n_meta = n_meta;
            let model = ModelShape { vocab_size: 11, d_model: 768, tie_embeddings: true, blocks: vec![block] };
            ModelFlops::new(&model, &routing, seq_len, ScoreCount::Causal).unwrap()
        };
        assert_eq!(flops(4, 16).blocks, flops(0, 20).blocks);
        assert_eq!(flops(4, 16).head, flops(0, 16).head);
    }

    #[test]
    fn a_bridge_projects_all_and_scores_all_earlier_positions() {
        let mut block = released_135m();
        block.attn.bridge = Bridge::Kv;
        let plan = plan(&[(2, Owner::Attn), (3, Owner::Ssm), (1, Owner::Attn)]);
        let flops = block.flops(Sharing::Split, &plan, ScoreCount::Causal);
        assert_eq!(flops.attn.scores, (1 + 2 + 6) * 4 * 768);
        let per_query = 4 * 768 * 768 + 6 * 768 * 2048;
        assert_eq!(flops.attn.matmul, 3 * per_query + 6 * 4 * 768 * 192);
    }

    #[test]
    fn a_flow_block_counts_one_mlp_for_all_tokens() {
        let mut block = released_135m();
        block.form = BlockForm::Flow(Fusion::None);
        let plan = plan(&[(2, Owner::Ssm), (3, Owner::Attn)]);
        let flops = block.flops(Sharing::Split, &plan, ScoreCount::Causal);
        assert_eq!(flops.mlp, 5 * 6 * 768 * 2048);
        assert_eq!(flops.fuse, 0);
        assert_eq!(flops.attn.matmul, 3 * (4 * 768 * 768 + 4 * 768 * 192));
    }

    #[test]
    fn mamba_2_convolves_b_and_c() {
        let flops = mamba2(1536).flops(768, 1);
        assert_eq!(flops.conv, 2 * 4 * (1536 + 256));
        assert_eq!(flops.scan, 6 * 1536 * 128);
        assert_eq!(flops.matmul, 2 * 768 * (3072 + 256 + 24) + 2 * 1536 * 768);
    }

    #[test]
    fn imbalance_needs_two_branches() {
        let block = released_135m();
        let plan = plan(&[(5, Owner::Ssm)]);
        let flops = block.flops(Sharing::Split, &plan, ScoreCount::Causal);
        assert_eq!(flops.imbalance(Sharing::Split), Some(1.0));
        assert_eq!(flops.imbalance(Sharing::SsmOnly), None);
    }
}
