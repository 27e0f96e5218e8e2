//! The `[model]` section as it is written: nearly every key has a default.

use std::fmt;

use flowhn_attn::{Rope, RopeScaling};
use flowhn_split::{AttnFrac, Bridge, Cycle, Fusion, GateNorm, Policy, Window};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The form of all blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockKind {
    /// The block of the authors' released script: branches with their own residuals and MLPs, two projections.
    Released,
    /// Ours: branches return changes, the fusion starts as the identity, one MLP follows.
    #[default]
    Flow,
}

/// The state-space mixer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixer {
    /// Selective scan.
    #[default]
    Mamba1,
    /// State-space duality.
    Mamba2,
}

/// Which group of B and C a head of Mamba-2 reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupOrder {
    /// Neighbouring heads share a group, as in `mamba_ssm`.
    #[default]
    Contiguous,
    /// Head `h` reads group `h % n_groups`, as `transformers` up to 4.51 computes without CUDA kernels.
    Strided,
}

/// How weights start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitKind {
    /// Step sizes log-uniform in `[0.001, 0.1]`, as in Mamba; residual outputs scaled by depth.
    #[default]
    Mamba,
    /// As the authors' script: every matrix normal with standard deviation 0.02, biases zero.
    Released,
}

/// One policy for every block, or a list with one for each.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyList(pub Vec<Policy>);

/// The `[model]` section.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawModel {
    pub(super) vocab_size: usize,
    pub(super) d_model: usize,
    pub(super) d_ff: usize,
    pub(super) n_layers: usize,
    pub(super) seq_len: usize,
    #[serde(default)]
    pub(super) block: BlockKind,
    pub(super) fusion: Option<Fusion>,
    #[serde(default = "rms_norm_eps")]
    pub(super) rms_norm_eps: f64,
    #[serde(default)]
    pub(super) tie_embeddings: bool,
    #[serde(default)]
    pub(super) init: InitKind,
    pub(super) padding_idx: Option<usize>,
    #[serde(default)]
    pub(super) mlp_bias: bool,
    #[serde(default)]
    pub(super) mixer_norms: bool,
    #[serde(default)]
    pub(super) shared_norm: bool,
    #[serde(default)]
    pub(super) n_meta: usize,
    #[serde(default)]
    pub(super) attn: RawAttn,
    #[serde(default)]
    pub(super) ssm: RawSsm,
    #[serde(default)]
    pub(super) split: RawSplit,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawAttn {
    pub(super) n_heads: Option<usize>,
    pub(super) n_kv_heads: Option<usize>,
    pub(super) d_head: Option<usize>,
    pub(super) rope: bool,
    pub(super) rope_theta: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rope_scaling: Option<RawRopeScaling>,
    pub(super) bridge: Bridge,
    pub(super) bias: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) window: Option<usize>,
    pub(super) global_blocks: Vec<usize>,
}

impl Default for RawAttn {
    fn default() -> Self {
        Self {
            n_heads: None,
            n_kv_heads: None,
            d_head: None,
            rope: false,
            rope_theta: 10_000.,
            rope_scaling: None,
            bridge: Bridge::None,
            bias: false,
            window: None,
            global_blocks: Vec::new(),
        }
    }
}

impl RawAttn {
    pub(super) fn rope(&self) -> Option<Rope> {
        let scaling = self.rope_scaling.map_or(RopeScaling::None, RopeScaling::from);
        self.rope.then_some(Rope { theta: self.rope_theta, scaling })
    }
}

/// `model.attn.rope_scaling`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum RawRopeScaling {
    Linear { factor: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_seq_len: usize },
}

impl RawRopeScaling {
    pub(super) fn of(scaling: RopeScaling) -> Option<Self> {
        match scaling {
            RopeScaling::None => None,
            RopeScaling::Linear { factor } => Some(Self::Linear { factor }),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len: original_seq_len } => {
                Some(Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_seq_len })
            }
        }
    }
}

impl From<RawRopeScaling> for RopeScaling {
    fn from(raw: RawRopeScaling) -> Self {
        match raw {
            RawRopeScaling::Linear { factor } => Self::Linear { factor },
            RawRopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_seq_len: original_len } => {
                Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_len }
            }
        }
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSsm {
    #[serde(default)]
    pub(super) mixer: Mixer,
    pub(super) d_inner: Option<usize>,
    pub(super) d_state: Option<usize>,
    pub(super) d_conv: Option<usize>,
    pub(super) conv_bias: Option<bool>,
    #[serde(default)]
    pub(super) proj_bias: bool,
    pub(super) out_proj_bias: Option<bool>,
    pub(super) dt_rank: Option<usize>,
    pub(super) inner_norms: Option<bool>,
    pub(super) d_head: Option<usize>,
    pub(super) n_groups: Option<usize>,
    pub(super) group_order: Option<GroupOrder>,
    pub(super) gate_norm: Option<GateNorm>,
    pub(super) norm_groups: Option<usize>,
    pub(super) chunk_len: Option<usize>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawSplit {
    pub(super) policy: PolicyList,
    pub(super) first_blocks: Vec<Policy>,
    pub(super) attn_frac: AttnFrac,
    pub(super) window: Window,
    pub(super) released: bool,
    pub(super) tile: usize,
    pub(super) chunk_len: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cycle: Option<Cycle>,
}

impl Default for RawSplit {
    fn default() -> Self {
        Self {
            policy: PolicyList(Policy::all().find(|policy| policy.name() == "cyclic_split").into_iter().collect()),
            first_blocks: Vec::new(),
            attn_frac: AttnFrac::Flops,
            window: Window::Last,
            released: false,
            tile: 64,
            chunk_len: 64,
            cycle: None,
        }
    }
}

fn rms_norm_eps() -> f64 {
    1e-6
}

impl Serialize for PolicyList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [one] => one.serialize(serializer),
            list => list.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for PolicyList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMore;
        impl<'de> de::Visitor<'de> for OneOrMore {
            type Value = PolicyList;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("the name of a split policy, or a list with one name for each block")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<PolicyList, E> {
                Policy::named(name).map(|policy| PolicyList(vec![policy])).map_err(E::custom)
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<PolicyList, A::Error> {
                let mut list = Vec::new();
                while let Some(policy) = seq.next_element()? {
                    list.push(policy);
                }
                Ok(PolicyList(list))
            }
        }
        deserializer.deserialize_any(OneOrMore)
    }
}
