//! Model configuration: from TOML to a checked form with every size derived, and back.

mod raw;
mod strict;

use flowhn_attn::{Rope, RopeScaling};
use flowhn_split::{
    AttnShape, BlockForm, BlockOptions, BlockShape, Branch, Bridge, Fusion, GateNorm, MlpShape, ModelShape, Policy,
    Routing, Sharing, SplitSettings, SsmShape, policy_per_block,
};

pub use raw::{BlockKind, GroupOrder, InitKind, Mixer, PolicyList, RawModel};
pub use strict::{from_table, load_table};

use crate::{Error, Result};
use raw::{RawAttn, RawRopeScaling, RawSplit, RawSsm};

/// A model whose sizes fit together. Made from the `[model]` section by [`ModelConfig::check`].
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the SwiGLU MLP; 0 for none.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Training length, for which plans are made.
    pub seq_len: usize,
    /// The form of all blocks.
    pub block: BlockKind,
    /// How a flow block joins the branches' changes.
    pub fusion: Fusion,
    /// Added to the mean square under the root of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the LM head shares the embedding's weights.
    pub tie_embeddings: bool,
    /// How weights start.
    pub init: InitKind,
    /// A token whose embedding gets no gradient from the look-up.
    pub padding_idx: Option<usize>,
    /// The attention mixer.
    pub attn: AttnShape,
    /// The rotary embedding; `None` for no positions.
    pub rope: Option<Rope>,
    /// The state-space mixer.
    pub ssm: SsmShape,
    /// Which group of B and C a head of Mamba-2 reads.
    pub group_order: GroupOrder,
    /// Equal groups of channels that Mamba-2's own norm (`options.gate_norm`) normalises apart.
    pub norm_groups: usize,
    /// Tokens of a chunk of the SSD algorithm; no effect on what Mamba-2 computes.
    pub ssd_chunk_len: usize,
    /// What blocks have beside their sizes; the window is that of the blocks that are not in `global_blocks`.
    pub options: BlockOptions,
    /// Blocks whose attention has no window.
    pub global_blocks: Vec<usize>,
    /// Policies of the first blocks.
    pub first_blocks: Vec<Policy>,
    /// The policy of the rest, or one for each block.
    pub policy: Vec<Policy>,
    /// What all policies share; its own `policy` is that of the first block.
    pub split: SplitSettings,
}

impl ModelConfig {
    /// Derives the sizes that the section leaves out and checks that all fit together.
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::Split`], naming the key at fault and what would be right.
    pub fn check(raw: RawModel) -> Result<Self> {
        let d_model = raw.d_model;
        if raw.split.policy.0.is_empty() {
            return Err(Error::value("model.split.policy", "the list is empty: name at least one policy"));
        }
        let mut policies = raw.split.first_blocks.iter().chain(&raw.split.policy.0);
        let has_attn = policies.any(|policy| policy.sharing().has(Branch::Attn));
        let attn = check_attn(&raw.attn, d_model, has_attn)?;
        let (ssm, ssd_chunk_len) = check_ssm(&raw.ssm, d_model)?;
        if raw.fusion.is_some() && raw.block == BlockKind::Released {
            let message = "the released block always projects: drop the key or use block = \"flow\"";
            return Err(Error::value("model.fusion", message));
        }
        if raw.attn.bridge == Bridge::Kv && raw.block == BlockKind::Released {
            let message = "the released block has no bridge: use block = \"flow\" or bridge = \"none\"";
            return Err(Error::value("model.attn.bridge", message));
        }
        if raw.shared_norm && raw.block == BlockKind::Released {
            let message = "each branch of the released block has its norm: drop the key or use block = \"flow\"";
            return Err(Error::value("model.shared_norm", message));
        }
        if raw.rms_norm_eps.is_nan() || raw.rms_norm_eps <= 0. {
            return Err(Error::value("model.rms_norm_eps", format!("{} is not above 0", raw.rms_norm_eps)));
        }
        if let Some(idx) = raw.padding_idx.filter(|&idx| idx >= raw.vocab_size) {
            let message = format!("{idx} is not below model.vocab_size, which is {}", raw.vocab_size);
            return Err(Error::value("model.padding_idx", message));
        }
        let mut config = Self {
            vocab_size: raw.vocab_size,
            d_model,
            d_ff: raw.d_ff,
            n_layers: raw.n_layers,
            seq_len: raw.seq_len,
            block: raw.block,
            fusion: raw.fusion.unwrap_or_default(),
            rms_norm_eps: raw.rms_norm_eps,
            tie_embeddings: raw.tie_embeddings,
            init: raw.init,
            padding_idx: raw.padding_idx,
            attn,
            rope: raw.attn.rope(),
            ssm,
            group_order: raw.ssm.group_order.unwrap_or_default(),
            norm_groups: raw.ssm.norm_groups.unwrap_or(1),
            ssd_chunk_len,
            options: BlockOptions {
                attn_bias: raw.attn.bias,
                mlp_bias: raw.mlp_bias,
                conv_bias: raw.ssm.conv_bias.unwrap_or(true),
                ssm_bias: raw.ssm.proj_bias,
                ssm_out_bias: raw.ssm.out_proj_bias.unwrap_or(raw.ssm.proj_bias),
                mixer_norms: raw.mixer_norms,
                gate_norm: raw.ssm.gate_norm.unwrap_or_default(),
                shared_norm: raw.shared_norm,
                window: raw.attn.window,
                n_meta: raw.n_meta,
            },
            global_blocks: raw.attn.global_blocks,
            first_blocks: raw.split.first_blocks,
            split: SplitSettings {
                policy: raw.split.policy.0[0],
                attn_frac: raw.split.attn_frac,
                window: raw.split.window,
                released: raw.split.released,
                tile: raw.split.tile,
                chunk_len: raw.split.chunk_len,
                cycle: raw.split.cycle,
            },
            policy: raw.split.policy.0,
        };
        config.shape().check()?;
        config.check_options()?;
        // A cycle solved now is written down, so that it stays the same at every other length.
        config.split.cycle = config.routing()?.cycle();
        Ok(config)
    }

    /// The section with every key written out; checking it gives this configuration again.
    pub fn to_raw(&self) -> RawModel {
        let (mixer, dt_rank, inner_norms, d_head, n_groups, chunk_len) = match self.ssm {
            SsmShape::Mamba1 { dt_rank, inner_norms, .. } => {
                (Mixer::Mamba1, Some(dt_rank), Some(inner_norms), None, None, None)
            }
            SsmShape::Mamba2 { d_head, n_groups, .. } => {
                (Mixer::Mamba2, None, None, Some(d_head), Some(n_groups), Some(self.ssd_chunk_len))
            }
        };
        RawModel {
            vocab_size: self.vocab_size,
            d_model: self.d_model,
            d_ff: self.d_ff,
            n_layers: self.n_layers,
            seq_len: self.seq_len,
            block: self.block,
            fusion: (self.block == BlockKind::Flow).then_some(self.fusion),
            rms_norm_eps: self.rms_norm_eps,
            tie_embeddings: self.tie_embeddings,
            init: self.init,
            padding_idx: self.padding_idx,
            mlp_bias: self.options.mlp_bias,
            mixer_norms: self.options.mixer_norms,
            shared_norm: self.options.shared_norm,
            n_meta: self.options.n_meta,
            attn: RawAttn {
                n_heads: Some(self.attn.n_heads),
                n_kv_heads: Some(self.attn.n_kv_heads),
                d_head: Some(self.attn.d_head),
                rope: self.rope.is_some(),
                rope_theta: self.rope.map_or(10_000., |rope| rope.theta),
                rope_scaling: self.rope.and_then(|rope| RawRopeScaling::of(rope.scaling)),
                bridge: self.attn.bridge,
                bias: self.options.attn_bias,
                window: self.options.window,
                global_blocks: self.global_blocks.clone(),
            },
            ssm: RawSsm {
                mixer,
                d_inner: Some(self.ssm.d_inner()),
                d_state: Some(self.ssm.d_state()),
                d_conv: Some(self.ssm.d_conv()),
                conv_bias: Some(self.options.conv_bias),
                proj_bias: self.options.ssm_bias,
                out_proj_bias: (mixer == Mixer::Mamba2).then_some(self.options.ssm_out_bias),
                dt_rank,
                inner_norms,
                d_head,
                n_groups,
                group_order: (mixer == Mixer::Mamba2).then_some(self.group_order),
                gate_norm: (mixer == Mixer::Mamba2).then_some(self.options.gate_norm),
                norm_groups: (mixer == Mixer::Mamba2 && self.options.gate_norm != GateNorm::None)
                    .then_some(self.norm_groups),
                chunk_len,
            },
            split: RawSplit {
                policy: PolicyList(self.policy.clone()),
                first_blocks: self.first_blocks.clone(),
                attn_frac: self.split.attn_frac,
                window: self.split.window,
                released: self.split.released,
                tile: self.split.tile,
                chunk_len: self.split.chunk_len,
                cycle: self.split.cycle,
            },
        }
    }

    /// The shape of a block; what it really has follows from its policy.
    pub fn block_shape(&self, block_idx: usize) -> BlockShape {
        let form = match self.block {
            BlockKind::Released => BlockForm::Released,
            BlockKind::Flow => BlockForm::Flow(self.fusion),
        };
        let window = self.options.window.filter(|_| !self.global_blocks.contains(&block_idx));
        BlockShape {
            d_model: self.d_model,
            attn: self.attn,
            ssm: self.ssm,
            mlp: MlpShape { d_ff: self.d_ff },
            form,
            options: BlockOptions { window, ..self.options },
        }
    }

    /// The shape of the whole model, for costs and plans.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            vocab_size: self.vocab_size,
            d_model: self.d_model,
            tie_embeddings: self.tie_embeddings,
            blocks: (0..self.n_layers).map(|block_idx| self.block_shape(block_idx)).collect(),
        }
    }

    /// Who reads which token, solved at the training length.
    ///
    /// # Errors
    /// [`Error::Split`] if the policies do not fit the blocks.
    pub fn routing(&self) -> Result<Routing> {
        let policies = policy_per_block(&self.first_blocks, &self.policy, self.n_layers)?;
        let settings: Vec<SplitSettings> = policies
            .into_iter()
            .map(|policy| {
                // The script has no blocks that send everything one way; beside released ones they stay as they are.
                let one_way = matches!(policy.sharing(), Sharing::AttnOnly | Sharing::SsmOnly);
                SplitSettings { policy, released: self.split.released && !one_way, ..self.split.clone() }
            })
            .collect();
        Ok(Routing::new(self.seq_len, &settings, &self.shape().blocks)?)
    }

    /// Checks that windows and learned tokens meet blocks that can have them.
    fn check_options(&self) -> Result<()> {
        let BlockOptions { window, n_meta, .. } = self.options;
        if let Some(idx) = self.global_blocks.iter().find(|&&idx| idx >= self.n_layers) {
            let message = format!("there is no block {idx} among {}, which are counted from 0", self.n_layers);
            return Err(Error::value("model.attn.global_blocks", message));
        }
        if window.is_none() && !self.global_blocks.is_empty() {
            let message = "without model.attn.window every block sees everything: drop the key or set a window";
            return Err(Error::value("model.attn.global_blocks", message));
        }
        let policies = policy_per_block(&self.first_blocks, &self.policy, self.n_layers)?;
        let split = policies.iter().find(|policy| policy.sharing() == Sharing::Split);
        for (key, given) in [("model.attn.window", window.is_some()), ("model.n_meta", n_meta > 0)] {
            if let Some(policy) = split.filter(|_| given) {
                let message = format!(
                    "policy {policy} shares out the tokens, and the balance of the branches does not count it: use no_split, \
                     attn_all or ssm_all in every block, or drop the key"
                );
                return Err(Error::value(key, message));
            }
            if given && self.attn.bridge == Bridge::Kv {
                return Err(Error::value(key, "it does not go with model.attn.bridge = \"kv\": drop one of the two"));
            }
        }
        Ok(())
    }
}

/// Attention's shape; a model without attention need not name any.
fn check_attn(raw: &RawAttn, d_model: usize, has_attn: bool) -> Result<AttnShape> {
    let n_heads = match raw.n_heads {
        Some(n_heads) => n_heads,
        None if has_attn => {
            return Err(Error::value("model.attn", "missing field `n_heads`: the number of query heads"));
        }
        None => 1,
    };
    let d_head = match raw.d_head {
        Some(d_head) => d_head,
        None if n_heads > 0 && d_model.is_multiple_of(n_heads) => d_model / n_heads,
        None => {
            let message = format!("{n_heads} heads do not divide model.d_model = {d_model}: set model.attn.d_head");
            return Err(Error::value("model.attn.n_heads", message));
        }
    };
    if raw.rope && !d_head.is_multiple_of(2) {
        let message = format!("rotary embedding turns pairs of features, and {d_head} is odd");
        return Err(Error::value("model.attn.d_head", message));
    }
    if raw.rope && (raw.rope_theta.is_nan() || raw.rope_theta <= 1.) {
        return Err(Error::value("model.attn.rope_theta", format!("{} is not above 1", raw.rope_theta)));
    }
    if let Some(scaling) = &raw.rope_scaling {
        if !raw.rope {
            let message = "there is nothing to scale with model.attn.rope = false".to_owned();
            return Err(Error::value("model.attn.rope_scaling", message));
        }
        if let Some(problem) = RopeScaling::from(*scaling).problem() {
            return Err(Error::value("model.attn.rope_scaling", problem));
        }
    }
    Ok(AttnShape { n_heads, n_kv_heads: raw.n_kv_heads.unwrap_or(n_heads), d_head, bridge: raw.bridge })
}

/// The mixer's shape and the chunk length of its algorithm.
fn check_ssm(raw: &RawSsm, d_model: usize) -> Result<(SsmShape, usize)> {
    let foreign: &[(&str, bool)] = match raw.mixer {
        Mixer::Mamba1 => &[
            ("d_head", raw.d_head.is_some()),
            ("n_groups", raw.n_groups.is_some()),
            ("chunk_len", raw.chunk_len.is_some()),
            ("group_order", raw.group_order.is_some()),
            ("gate_norm", raw.gate_norm.is_some()),
            ("norm_groups", raw.norm_groups.is_some()),
            ("out_proj_bias", raw.out_proj_bias.is_some()),
        ],
        Mixer::Mamba2 => &[("dt_rank", raw.dt_rank.is_some()), ("inner_norms", raw.inner_norms.is_some())],
    };
    if let Some((key, _)) = foreign.iter().find(|&&(_, given)| given) {
        let (own, other) = match raw.mixer {
            Mixer::Mamba1 => ("mamba1", "mamba2"),
            Mixer::Mamba2 => ("mamba2", "mamba1"),
        };
        let message =
            format!("it belongs to mixer = \"{other}\", and the mixer is \"{own}\": drop the key or change the mixer");
        return Err(Error::value(format!("model.ssm.{key}"), message));
    }
    let d_inner = raw.d_inner.unwrap_or(2 * d_model);
    let d_conv = raw.d_conv.unwrap_or(4);
    let chunk_len = raw.chunk_len.unwrap_or(256);
    if chunk_len == 0 {
        return Err(Error::value("model.ssm.chunk_len", "it must be at least 1"));
    }
    if raw.gate_norm == Some(GateNorm::None) && raw.norm_groups.is_some() {
        let message = "there is no norm with gate_norm = \"none\": drop one of the two keys";
        return Err(Error::value("model.ssm.norm_groups", message));
    }
    if let Some(n_groups) = raw.norm_groups.filter(|&n| n == 0 || !d_inner.is_multiple_of(n)) {
        let message = format!("{n_groups} groups do not divide the {d_inner} channels of model.ssm.d_inner");
        return Err(Error::value("model.ssm.norm_groups", message));
    }
    let shape = match raw.mixer {
        Mixer::Mamba1 => SsmShape::Mamba1 {
            d_inner,
            d_state: raw.d_state.unwrap_or(16),
            d_conv,
            dt_rank: raw.dt_rank.unwrap_or(d_model.div_ceil(16)),
            inner_norms: raw.inner_norms.unwrap_or(true),
        },
        Mixer::Mamba2 => SsmShape::Mamba2 {
            d_inner,
            d_state: raw.d_state.unwrap_or(128),
            d_conv,
            d_head: raw.d_head.unwrap_or(64),
            n_groups: raw.n_groups.unwrap_or(1),
        },
    };
    Ok((shape, chunk_len))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        vocab_size = 97
        d_model = 64
        d_ff = 96
        n_layers = 3
        seq_len = 256
        [attn]
        n_heads = 4
        n_kv_heads = 2
        [split]
        policy = "cyclic_split"
        first_blocks = ["ssm_all"]
    "#;

    fn read(changes: &[(&str, &str)]) -> Result<ModelConfig> {
        let text = changes.iter().fold(TEXT.to_owned(), |text, (from, to)| text.replace(from, to));
        ModelConfig::check(from_table(text.parse().unwrap())?)
    }

    #[test]
    fn the_checked_form_is_complete_and_reads_back() {
        let config = read(&[]).unwrap();
        assert!(config.split.cycle.is_some(), "the cycle is solved and written down");
        let text = toml::to_string(&config.to_raw()).unwrap();
        let again = ModelConfig::check(from_table(text.parse().unwrap()).unwrap()).unwrap();
        assert_eq!(again, config);
        let mamba2 = read(&[("[split]", "[ssm]\nmixer = \"mamba2\"\nd_head = 16\n[split]")]).unwrap();
        let text = toml::to_string(&mamba2.to_raw()).unwrap();
        assert_eq!(ModelConfig::check(from_table(text.parse().unwrap()).unwrap()).unwrap(), mamba2);
        for keys in
            ["norm = \"before_gate\"\nnorm_groups = 2\nout_proj_bias = true", "norm = \"none\"\nproj_bias = true"]
        {
            let section = format!("[ssm]\nmixer = \"mamba2\"\nd_head = 16\ngate_{keys}\n[split]");
            let gated = read(&[("seq_len = 256", "seq_len = 256\nshared_norm = true"), ("[split]", &section)]).unwrap();
            let text = toml::to_string(&gated.to_raw()).unwrap();
            assert_eq!(ModelConfig::check(from_table(text.parse().unwrap()).unwrap()).unwrap(), gated);
            assert!(gated.options.ssm_out_bias && gated.options.shared_norm && gated.options != mamba2.options);
        }
    }

    #[test]
    fn derived_sizes() {
        let config = read(&[]).unwrap();
        assert_eq!(config.attn.d_head, 16);
        let SsmShape::Mamba1 { d_inner, d_state, dt_rank, .. } = config.ssm else { panic!("{:?}", config.ssm) };
        assert_eq!((d_inner, d_state, dt_rank), (128, 16, 4));
        assert_eq!(read(&[("d_model = 64", "d_model = 68")]).unwrap().attn.d_head, 17);
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        for (from, to, want) in [
            ("n_heads = 4", "n_heads = 5", "model.attn.n_heads"),
            ("n_kv_heads = 2", "n_kv_heads = 3", "model.attn.n_kv_heads"),
            ("n_heads = 4", "n_heads = 4\nd_head = 15\nrope = true", "model.attn.d_head"),
            ("d_model = 64", "d_model = 0", "model.d_model"),
            ("n_layers = 3", "n_layers = 0", "n_layers"),
            ("seq_len = 256", "seq_len = 0", "seq_len"),
            ("policy = \"cyclic_split\"", "policy = \"cyclc_split\"", "cyclic_split"),
            ("policy = \"cyclic_split\"", "policy = []", "model.split.policy"),
            ("policy = \"cyclic_split\"", "policy = [\"ae_split\", \"ae_split\"]", "2 block policies for 3 blocks"),
            ("policy = \"cyclic_split\"", "attn_frac = \"measured\"", "calibration"),
            ("[split]", "[ssm]\nn_groups = 2\n[split]", "model.ssm.n_groups"),
            ("[split]", "[ssm]\nmixer = \"mamba2\"\nd_head = 24\n[split]", "model.ssm.d_head"),
            ("seq_len = 256", "seq_len = 256\nblock = \"released\"\nfusion = \"none\"", "model.fusion"),
            ("[split]", "[split]\nreleased = true", "cyclic_split has no released form"),
            ("seq_len = 256", "seq_len = 256\nrms_norm_eps = 0.0", "model.rms_norm_eps"),
            ("seq_len = 256", "seq_len = 256\npadding_idx = 97", "model.padding_idx"),
            ("vocab_size = 97", "vocab_sice = 97", "did you mean `vocab_size`"),
            ("n_heads = 4", "n_heads = 4\nwindow = 8", "`model.attn.window`: policy cyclic_split"),
            ("seq_len = 256", "seq_len = 256\nn_meta = 8", "`model.n_meta`: policy cyclic_split"),
            ("n_heads = 4", "n_heads = 4\nglobal_blocks = [0]", "model.attn.global_blocks"),
            ("n_heads = 4", "n_heads = 4\nwindow = 8\nglobal_blocks = [3]", "there is no block 3 among 3"),
            ("[split]", "[ssm]\ngroup_order = \"strided\"\n[split]", "model.ssm.group_order"),
            ("[split]", "[ssm]\ngate_norm = \"none\"\n[split]", "model.ssm.gate_norm"),
            ("[split]", "[ssm]\nout_proj_bias = true\n[split]", "model.ssm.out_proj_bias"),
            (
                "[split]",
                "[ssm]\nmixer = \"mamba2\"\nd_head = 16\nnorm_groups = 3\n[split]",
                "`model.ssm.norm_groups`: 3 groups do not divide the 128 channels",
            ),
            (
                "[split]",
                "[ssm]\nmixer = \"mamba2\"\nd_head = 16\ngate_norm = \"none\"\nnorm_groups = 2\n[split]",
                "there is no norm with gate_norm",
            ),
            ("seq_len = 256", "seq_len = 256\nblock = \"released\"\nshared_norm = true", "model.shared_norm"),
        ] {
            let error = read(&[(from, to)]).unwrap_err().to_string();
            assert!(error.contains(want), "{to}: {error}");
        }
    }

    #[test]
    fn rotary_scaling_reads_back_or_is_refused_by_name() {
        let with = |rope: bool, scaling: &str| {
            read(&[("n_kv_heads = 2", &format!("n_kv_heads = 2\nrope = {rope}\nrope_scaling = {{ {scaling} }}"))])
        };
        let llama =
            "type = \"llama3\", factor = 8.0, low_freq_factor = 1.0, high_freq_factor = 4.0, original_seq_len = 64";
        for scaling in [llama, "type = \"linear\", factor = 2.5"] {
            let config = with(true, scaling).unwrap();
            assert!(config.rope.unwrap().scaling != RopeScaling::None);
            let text = toml::to_string(&config.to_raw()).unwrap();
            assert_eq!(ModelConfig::check(from_table(text.parse().unwrap()).unwrap()).unwrap(), config);
        }
        for (rope, scaling, want) in [
            (false, llama, "model.attn.rope = false"),
            (true, "type = \"linear\", factor = 0.0", "factor of rotary scaling is 0"),
            (true, "type = \"linear\"", "factor"),
            (true, "type = \"yarn\", factor = 2.0", "yarn"),
            (true, "type = \"linear\", factor = 2.0, beta = 1.0", "beta"),
        ] {
            let message = with(rope, scaling).unwrap_err().to_string();
            assert!(message.contains(want) && message.contains("attn.rope_scaling"), "{message}");
        }
    }
}
