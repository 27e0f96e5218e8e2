//! Shapes of branches, blocks and models, and the parameters they have.

use serde::{Deserialize, Serialize};

use crate::{Branch, Error, Result, Sharing};

/// What attention's queries see besides their own window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bridge {
    /// Nothing: keys and values come from attention's own tokens.
    #[default]
    None,
    /// Keys and values of every earlier token of the block's input.
    Kv,
}

/// Grouped-query attention without biases. `n_heads * d_head` may differ from `d_model`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttnShape {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// What the queries see.
    pub bridge: Bridge,
}

impl AttnShape {
    /// Width of all query heads.
    pub fn d_q(&self) -> usize {
        self.n_heads * self.d_head
    }

    /// Width of all key heads, and of all value heads.
    pub fn d_kv(&self) -> usize {
        self.n_kv_heads * self.d_head
    }

    /// Parameters of the mixer: q, k, v and o projections.
    pub fn params(&self, d_model: usize) -> u64 {
        product(&[2, d_model, self.d_q() + self.d_kv()])
    }
}

/// A state-space mixer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "mixer", rename_all = "lowercase")]
pub enum SsmShape {
    /// Selective scan with a diagonal state for each channel.
    Mamba1 {
        /// Width of the scan.
        d_inner: usize,
        /// State entries of a channel.
        d_state: usize,
        /// Taps of the causal convolution.
        d_conv: usize,
        /// Width of the low-rank step size.
        dt_rank: usize,
        /// Whether the low-rank step, B and C are normalised, as in Jamba.
        inner_norms: bool,
    },
    /// State-space duality: one decay for each head.
    Mamba2 {
        /// Width of the scan.
        d_inner: usize,
        /// State entries of a channel.
        d_state: usize,
        /// Taps of the causal convolution.
        d_conv: usize,
        /// Width of a head; divides `d_inner`.
        d_head: usize,
        /// Groups of heads that share B and C; divides the number of heads.
        n_groups: usize,
    },
}

impl SsmShape {
    /// Width of the scan.
    pub fn d_inner(&self) -> usize {
        match *self {
            SsmShape::Mamba1 { d_inner, .. } | SsmShape::Mamba2 { d_inner, .. } => d_inner,
        }
    }

    /// State entries of a channel.
    pub fn d_state(&self) -> usize {
        match *self {
            SsmShape::Mamba1 { d_state, .. } | SsmShape::Mamba2 { d_state, .. } => d_state,
        }
    }

    /// Taps of the causal convolution.
    pub fn d_conv(&self) -> usize {
        match *self {
            SsmShape::Mamba1 { d_conv, .. } | SsmShape::Mamba2 { d_conv, .. } => d_conv,
        }
    }

    /// Channels of the causal convolution: Mamba-2 convolves B and C too.
    pub fn conv_channels(&self) -> usize {
        match *self {
            SsmShape::Mamba1 { d_inner, .. } => d_inner,
            SsmShape::Mamba2 { d_inner, d_state, n_groups, .. } => d_inner + 2 * n_groups * d_state,
        }
    }

    /// The weight matrices that every token meets, as (inputs, outputs).
    pub fn matrices(&self, d_model: usize) -> Vec<(usize, usize)> {
        match *self {
            SsmShape::Mamba1 { d_inner, d_state, dt_rank, .. } => {
                vec![(d_model, 2 * d_inner), (d_inner, dt_rank + 2 * d_state), (dt_rank, d_inner), (d_inner, d_model)]
            }
            SsmShape::Mamba2 { d_inner, d_state, d_head, n_groups, .. } => {
                let d_in_proj = 2 * d_inner + 2 * n_groups * d_state + d_inner / d_head.max(1);
                vec![(d_model, d_in_proj), (d_inner, d_model)]
            }
        }
    }

    /// Parameters of the mixer: matrices; convolution with bias; for Mamba-1 `A_log` for each
    /// channel and state, `D`, the bias of `dt_proj` and the inner norms; for Mamba-2 `A_log`,
    /// `D` and `dt_bias` for each head and the gated norm.
    pub fn params(&self, d_model: usize) -> u64 {
        let matrices: u64 = self.matrices(d_model).iter().map(|&(k, n)| product(&[k, n])).sum();
        let conv = product(&[self.conv_channels(), self.d_conv() + 1]);
        let rest = match *self {
            SsmShape::Mamba1 { d_inner, d_state, dt_rank, inner_norms, .. } => {
                let norms = if inner_norms { dt_rank + 2 * d_state } else { 0 };
                product(&[d_inner, d_state + 2]) + norms as u64
            }
            SsmShape::Mamba2 { d_inner, d_head, .. } => (3 * (d_inner / d_head.max(1)) + d_inner) as u64,
        };
        matrices + conv + rest
    }
}

/// A SwiGLU MLP without biases; a `d_ff` of 0 leaves out the MLP and its norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MlpShape {
    /// Width of the hidden layer.
    pub d_ff: usize,
}

impl MlpShape {
    /// Parameters: gate, up and down projections and the norm before them.
    pub fn params(&self, d_model: usize) -> u64 {
        if self.d_ff == 0 {
            return 0;
        }
        product(&[3, d_model, self.d_ff]) + d_model as u64
    }
}

/// What a block may have beside its sizes. The default is what most models have: a bias in the convolution and nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockOptions {
    /// Biases of attention's q, k, v and o projections.
    pub attn_bias: bool,
    /// Biases of the MLP's gate, up and down projections.
    pub mlp_bias: bool,
    /// The bias of the SSM's convolution.
    pub conv_bias: bool,
    /// The bias of the SSM's input projection.
    pub ssm_bias: bool,
    /// The bias of the SSM's output projection.
    pub ssm_out_bias: bool,
    /// An RMSNorm with weight before the output projection of attention and of Mamba-1; Mamba-2 has its own.
    pub mixer_norms: bool,
    /// Mamba-2's own norm before the output projection.
    pub gate_norm: GateNorm,
    /// Whether one norm opens both branches of a flow block; one that has a single branch is the same either way.
    pub shared_norm: bool,
    /// Positions that a query sees, its own included; `None` for all before it. The balance of two branches that share the tokens out does not
    /// count it, nor does a bridge: [`Routing::new`](crate::Routing::new) refuses both.
    pub window: Option<usize>,
    /// Learned tokens in front of every sequence, which every query sees whatever its window. All blocks of a model have the same.
    /// Refused where a window would be.
    pub n_meta: usize,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            attn_bias: false,
            mlp_bias: false,
            conv_bias: true,
            ssm_bias: false,
            ssm_out_bias: false,
            mixer_norms: false,
            gate_norm: GateNorm::AfterGate,
            shared_norm: false,
            window: None,
            n_meta: 0,
        }
    }
}

/// The RMSNorm with weight of Mamba-2's output, `y`, and its gate `silu(z)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateNorm {
    /// `norm(y silu(z))`, as in Mamba-2.
    #[default]
    AfterGate,
    /// `norm(y) silu(z)`.
    BeforeGate,
    /// `y silu(z)`: no norm.
    None,
}

impl BlockOptions {
    /// What the options add to attention's parameters.
    fn attn_params(&self, attn: &AttnShape, d_model: usize) -> u64 {
        let bias = if self.attn_bias { attn.d_q() + 2 * attn.d_kv() + d_model } else { 0 };
        let norm = if self.mixer_norms { attn.d_q() } else { 0 };
        (bias + norm) as u64
    }

    /// The SSM's parameters with these options.
    fn ssm_params(&self, ssm: &SsmShape, d_model: usize) -> u64 {
        let conv = if self.conv_bias { 0 } else { ssm.conv_channels() };
        let in_bias = ssm.matrices(d_model).first().filter(|_| self.ssm_bias).map_or(0, |&(_, d_in_proj)| d_in_proj);
        let out_bias = if self.ssm_out_bias { d_model } else { 0 };
        let (norm, no_norm) = match *ssm {
            SsmShape::Mamba1 { d_inner, .. } if self.mixer_norms => (d_inner, 0),
            SsmShape::Mamba2 { d_inner, .. } if self.gate_norm == GateNorm::None => (0, d_inner),
            _ => (0, 0),
        };
        ssm.params(d_model) + (in_bias + out_bias + norm) as u64 - (conv + no_norm) as u64
    }

    /// What the options add to the MLP's parameters.
    fn mlp_params(&self, mlp: MlpShape, d_model: usize) -> u64 {
        if self.mlp_bias && mlp.d_ff > 0 { (2 * mlp.d_ff + d_model) as u64 } else { 0 }
    }
}

/// How the flow block joins the branches' changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fusion {
    /// Merge by position, or the sum where both branches read a token.
    None,
    /// A projection that starts as the identity.
    #[default]
    Proj,
    /// A gate for each branch, computed from its change by a square matrix with bias.
    Gated,
    /// Merge by position, or the mean where both branches read a token, as in Hymba.
    Mean,
}

/// The form of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockForm {
    /// The released block: each branch has its own residuals and MLP; `branch_proj`, then norm
    /// and `final_proj`.
    Released,
    /// Branches return changes; one MLP for all tokens after the fusion.
    Flow(Fusion),
}

/// The matrices that join the branches, and what comes with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FuseShape {
    /// What stands at the join.
    pub join: Join,
    /// Whether the norm and the square `final_proj` of the released block follow.
    pub final_proj: bool,
}

/// What stands where the branches join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Join {
    /// Nothing learned.
    Plain,
    /// One matrix without bias from `n_inputs * d_model` features to `d_model`: 2 where both
    /// branches read every token, else 1.
    Proj {
        /// Inputs of `d_model` features.
        n_inputs: usize,
    },
    /// A square matrix with bias in each of the two branches.
    Gates {
        /// Gates that a token passes: 2 where both branches read every token, else 1.
        n_passed: usize,
    },
}

impl FuseShape {
    /// Parameters.
    pub fn params(&self, d_model: usize) -> u64 {
        let join = match self.join {
            Join::Plain => 0,
            Join::Proj { n_inputs } => product(&[n_inputs, d_model, d_model]),
            Join::Gates { .. } => product(&[2, d_model, d_model + 1]),
        };
        let last = if self.final_proj { product(&[d_model, d_model + 1]) } else { 0 };
        join + last
    }

    /// Square blocks of the join that a token meets.
    pub(crate) fn squares(&self) -> usize {
        match self.join {
            Join::Plain => 0,
            Join::Proj { n_inputs: n } | Join::Gates { n_passed: n } => n,
        }
    }
}

/// One block: both branches, the MLP and the form. What a block really has depends on how its
/// policy shares the tokens; see [`Sharing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockShape {
    /// Width of the residual stream.
    pub d_model: usize,
    /// The attention mixer.
    pub attn: AttnShape,
    /// The state-space mixer.
    pub ssm: SsmShape,
    /// The MLP: one in each branch of a released block, one for all tokens in a flow block.
    pub mlp: MlpShape,
    /// The form of the block.
    pub form: BlockForm,
    /// What it has beside.
    pub options: BlockOptions,
}

/// Parameters of a block, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockParams {
    /// Attention: mixer and norm, in a released block also its MLP.
    pub attn: u64,
    /// SSM: likewise.
    pub ssm: u64,
    /// What joins the branches; `final_proj` and its norm belong here, and the norm that opens both branches.
    pub fuse: u64,
    /// The shared MLP of a flow block with its norm.
    pub mlp: u64,
    /// The sum.
    pub total: u64,
}

impl BlockShape {
    /// The joining matrices under this sharing. A flow block with one branch has none: its fusion
    /// is the residual addition.
    pub fn fuse(&self, sharing: Sharing) -> FuseShape {
        let inputs = match sharing {
            Sharing::Parallel => 2,
            Sharing::Split | Sharing::AttnOnly | Sharing::SsmOnly => 1,
        };
        let one_way = matches!(sharing, Sharing::AttnOnly | Sharing::SsmOnly);
        let join = match self.form {
            BlockForm::Released | BlockForm::Flow(Fusion::Proj) => Join::Proj { n_inputs: inputs },
            BlockForm::Flow(Fusion::Gated) => Join::Gates { n_passed: inputs },
            BlockForm::Flow(Fusion::None | Fusion::Mean) => Join::Plain,
        };
        match self.form {
            BlockForm::Released => FuseShape { join, final_proj: true },
            BlockForm::Flow(_) if one_way => FuseShape { join: Join::Plain, final_proj: false },
            BlockForm::Flow(_) => FuseShape { join, final_proj: false },
        }
    }

    /// The parameters under this sharing: a branch that the block does not have counts nothing.
    pub fn params(&self, sharing: Sharing) -> BlockParams {
        let d_model = self.d_model;
        let options = &self.options;
        let mlp = self.mlp.params(d_model) + options.mlp_params(self.mlp, d_model);
        let (own_mlp, shared_mlp) = match self.form {
            BlockForm::Released => (mlp, 0),
            BlockForm::Flow(_) => (0, mlp),
        };
        let shared_norm = if self.shares_norm(sharing) { d_model as u64 } else { 0 };
        let branch = |branch, mixer: u64| {
            if sharing.has(branch) { mixer + d_model as u64 - shared_norm + own_mlp } else { 0 }
        };
        let attn = branch(Branch::Attn, self.attn.params(d_model) + options.attn_params(&self.attn, d_model));
        let ssm = branch(Branch::Ssm, options.ssm_params(&self.ssm, d_model));
        let fuse = self.fuse(sharing).params(d_model) + shared_norm;
        BlockParams { attn, ssm, fuse, mlp: shared_mlp, total: attn + ssm + fuse + shared_mlp }
    }

    /// Whether one norm opens both branches.
    pub fn shares_norm(&self, sharing: Sharing) -> bool {
        let flow = matches!(self.form, BlockForm::Flow(_));
        self.options.shared_norm && flow && Branch::ALL.iter().all(|&branch| sharing.has(branch))
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// [`Error::Shape`], naming the size at fault.
    pub fn check(&self) -> Result<()> {
        positive("model.d_model", self.d_model)?;
        positive("model.attn.n_heads", self.attn.n_heads)?;
        positive("model.attn.d_head", self.attn.d_head)?;
        positive("model.ssm.d_inner", self.ssm.d_inner())?;
        positive("model.ssm.d_state", self.ssm.d_state())?;
        positive("model.ssm.d_conv", self.ssm.d_conv())?;
        if let Some(window) = self.options.window {
            positive("model.attn.window", window)?;
        }
        let n_heads = self.attn.n_heads;
        divides("model.attn.n_kv_heads", self.attn.n_kv_heads, "model.attn.n_heads", n_heads)?;
        match self.ssm {
            SsmShape::Mamba1 { dt_rank, .. } => positive("model.ssm.dt_rank", dt_rank),
            SsmShape::Mamba2 { d_inner, d_head, n_groups, .. } => {
                divides("model.ssm.d_head", d_head, "model.ssm.d_inner", d_inner)?;
                let what = "the number of SSM heads, d_inner / d_head";
                divides("model.ssm.n_groups", n_groups, what, d_inner / d_head)
            }
        }
    }
}

/// A language model: embedding, blocks, final norm, head.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ModelShape {
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream, the same in all blocks.
    pub d_model: usize,
    /// Whether the head shares the embedding's weights.
    pub tie_embeddings: bool,
    /// The blocks.
    pub blocks: Vec<BlockShape>,
}

impl ModelShape {
    /// Parameters outside the blocks: embedding, learned tokens, final norm, and the head unless it is tied.
    pub fn outer_params(&self) -> u64 {
        let table = product(&[self.vocab_size, self.d_model]);
        let tables = if self.tie_embeddings { 1 } else { 2 };
        tables * table + product(&[self.n_meta() + 1, self.d_model])
    }

    /// Learned tokens in front of every sequence: the blocks work on so many more tokens than the head.
    pub fn n_meta(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.options.n_meta)
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// [`Error::Shape`], naming the size at fault.
    pub fn check(&self) -> Result<()> {
        positive("model.vocab_size", self.vocab_size)?;
        positive("model.n_layers", self.blocks.len())?;
        for block in &self.blocks {
            block.check()?;
            if block.d_model != self.d_model {
                let want = format!("all blocks need the model's d_model of {}", self.d_model);
                return Err(Error::Shape { name: "model.d_model", got: block.d_model, want });
            }
            if block.options.n_meta != self.n_meta() {
                let want = format!("all blocks need the {} of the first", self.n_meta());
                return Err(Error::Shape { name: "model.n_meta", got: block.options.n_meta, want });
            }
        }
        Ok(())
    }
}

/// The product of sizes as a count.
pub(crate) fn product(sizes: &[usize]) -> u64 {
    sizes.iter().map(|&size| size as u64).product()
}

fn positive(name: &'static str, got: usize) -> Result<()> {
    match got {
        0 => Err(Error::Shape { name, got, want: "it must be at least 1".to_owned() }),
        _ => Ok(()),
    }
}

fn divides(name: &'static str, got: usize, of: &str, whole: usize) -> Result<()> {
    positive(name, got)?;
    if whole.is_multiple_of(got) {
        return Ok(());
    }
    Err(Error::Shape { name, got, want: format!("it must divide {of}, which is {whole}") })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The released script's defaults, about 135M parameters.
    pub(crate) fn released_135m() -> BlockShape {
        BlockShape {
            d_model: 768,
            attn: AttnShape { n_heads: 32, n_kv_heads: 8, d_head: 24, bridge: Bridge::None },
            ssm: SsmShape::Mamba1 { d_inner: 1536, d_state: 16, d_conv: 4, dt_rank: 48, inner_norms: true },
            mlp: MlpShape { d_ff: 2048 },
            form: BlockForm::Released,
            options: BlockOptions::default(),
        }
    }

    pub(crate) fn mamba2(d_inner: usize) -> SsmShape {
        SsmShape::Mamba2 { d_inner, d_state: 128, d_conv: 4, d_head: 64, n_groups: 1 }
    }

    #[test]
    fn branches_that_are_not_there_have_no_parameters() {
        let block = released_135m();
        let split = block.params(Sharing::Split);
        let attn_only = block.params(Sharing::AttnOnly);
        assert_eq!(attn_only.ssm, 0);
        assert_eq!(attn_only.attn, split.attn);
        assert_eq!(block.params(Sharing::SsmOnly).attn, 0);
        let parallel = block.params(Sharing::Parallel);
        assert_eq!(parallel.fuse - split.fuse, 768 * 768);
    }

    #[test]
    fn mamba_2_parameters_by_hand() {
        // in_proj 768 x (3072 + 256 + 24), conv 1792 x 5, A_log D dt_bias 72, norm 1536, out_proj.
        let want = 768 * 3352 + 1792 * 5 + 72 + 1536 + 1536 * 768;
        assert_eq!(mamba2(1536).params(768), want);
    }

    #[test]
    fn a_flow_block_shares_its_mlp() {
        let mut block = released_135m();
        block.form = BlockForm::Flow(Fusion::None);
        let params = block.params(Sharing::Split);
        assert_eq!(params.mlp, 3 * 768 * 2048 + 768);
        assert_eq!(params.attn, block.attn.params(768) + 768);
        assert_eq!(params.fuse, 0);
        block.form = BlockForm::Flow(Fusion::Proj);
        assert_eq!(block.params(Sharing::Parallel).fuse, 2 * 768 * 768);
        assert_eq!(block.params(Sharing::SsmOnly).fuse, 0);
        block.form = BlockForm::Flow(Fusion::Gated);
        assert_eq!(block.params(Sharing::Split).fuse, 2 * 768 * 769);
        assert_eq!(block.fuse(Sharing::Split).join, Join::Gates { n_passed: 1 });
        assert_eq!(block.fuse(Sharing::AttnOnly).join, Join::Plain);
    }

    #[test]
    fn options_by_hand() {
        let plain = released_135m();
        let mut block = plain;
        let d_inner = plain.ssm.d_inner() as u64;
        block.options = BlockOptions { attn_bias: true, mlp_bias: true, ..BlockOptions::default() };
        let grown = |part: fn(&BlockParams) -> u64, block: &BlockShape| {
            part(&block.params(Sharing::Split)) as i64 - part(&plain.params(Sharing::Split)) as i64
        };
        assert_eq!(grown(|p| p.attn, &block), 768 + 2 * 192 + 768 + 2 * 2048 + 768);
        assert_eq!(grown(|p| p.ssm, &block), 2 * 2048 + 768);
        block.options = BlockOptions { ssm_bias: true, conv_bias: false, ..BlockOptions::default() };
        assert_eq!(grown(|p| p.ssm, &block), 2 * 1536 - 1536);
        block.options = BlockOptions { ssm_out_bias: true, ..BlockOptions::default() };
        assert_eq!(grown(|p| p.ssm, &block), 768);
        block.options = BlockOptions { mixer_norms: true, ..BlockOptions::default() };
        assert_eq!((grown(|p| p.attn, &block), grown(|p| p.ssm, &block)), (768, d_inner as i64));
        block.ssm = mamba2(1536);
        assert_eq!(block.options.ssm_params(&block.ssm, 768), block.ssm.params(768));
        block.options.gate_norm = GateNorm::BeforeGate;
        assert_eq!(block.options.ssm_params(&block.ssm, 768), block.ssm.params(768));
        block.options.gate_norm = GateNorm::None;
        assert_eq!(block.options.ssm_params(&block.ssm, 768), block.ssm.params(768) - 1536);
    }

    #[test]
    fn a_shared_norm_is_counted_once() {
        let mut block = released_135m();
        block.form = BlockForm::Flow(Fusion::None);
        let apart = block.params(Sharing::Parallel);
        let alone = block.params(Sharing::SsmOnly);
        block.options.shared_norm = true;
        let shared = block.params(Sharing::Parallel);
        assert_eq!((shared.attn, shared.ssm, shared.fuse), (apart.attn - 768, apart.ssm - 768, apart.fuse + 768));
        assert_eq!(shared.total, apart.total - 768);
        assert_eq!(block.params(Sharing::SsmOnly), alone);
    }

    #[test]
    fn impossible_shapes_are_named() {
        let mut block = released_135m();
        block.attn.n_kv_heads = 7;
        let message = block.check().unwrap_err().to_string();
        let want = "model.attn.n_kv_heads is 7: it must divide model.attn.n_heads, which is 32";
        assert_eq!(message, want);
        block.attn.n_kv_heads = 8;
        block.ssm = SsmShape::Mamba2 { d_inner: 96, d_state: 8, d_conv: 4, d_head: 64, n_groups: 1 };
        assert!(block.check().unwrap_err().to_string().starts_with("model.ssm.d_head is 64"));
    }
}
