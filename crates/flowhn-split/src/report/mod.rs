//! What a model's split is and costs, for people and for programs.

mod text;

use serde::{Serialize, Serializer};

use crate::{
    BlockBytes, BlockFlops, BlockParams, Branch, Cycle, Element, Flops, ModelFlops, ModelShape, Policy, Result,
    Routing, ScoreCount, Sharing, Span,
};

/// The split of a model at one length: spans, FLOPs, parameters and bytes, one sequence, forward.
///
/// `Serialize` gives the object that `flowhn plan --json` prints; `Display` gives the text. The blocks' `total`s
/// and `head` add up to `flops_per_token.forward * seq_len`. Where a model has learned tokens in front of every sequence, the
/// blocks' spans, tokens and FLOPs include them.
///
/// ```
/// # use flowhn_split::*;
/// # let block = BlockShape {
/// #     d_model: 768,
/// #     attn: AttnShape { n_heads: 32, n_kv_heads: 8, d_head: 24, bridge: Bridge::None },
/// #     ssm: SsmShape::Mamba1 { d_inner: 1536, d_state: 16, d_conv: 4, dt_rank: 48, inner_norms: true },
/// #     mlp: MlpShape { d_ff: 2048 },
/// #     form: BlockForm::Released,
/// #     options: BlockOptions::default(),
/// # };
/// let blocks = vec![block; 2];
/// let settings = vec![SplitSettings::new("fac_split".parse()?); 2];
/// let routing = Routing::new(1024, &settings, &blocks)?;
/// let model = ModelShape { vocab_size: 65536, d_model: 768, tie_embeddings: false, blocks };
/// let report = PlanReport::new(&model, &routing, 1024, Element::Bf16)?;
/// assert_eq!(report.blocks[0].attn_tokens, 576);
/// println!("{report}");
/// # Ok::<(), flowhn_split::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanReport {
    /// The number of tokens.
    pub seq_len: usize,
    /// Parameters of the model.
    pub parameters: u64,
    /// FLOPs of the model for each token.
    pub flops_per_token: FlopsPerToken,
    /// Forward FLOPs of the head.
    pub head: u64,
    /// The blocks.
    pub blocks: Vec<BlockReport>,
    /// The length for which the split was solved.
    pub training_seq_len: usize,
    /// The element in which bytes are counted.
    pub element: Element,
    /// What is unwise about the routing; see [`Routing::warnings`].
    pub warnings: Vec<String>,
}

/// FLOPs of a model for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FlopsPerToken {
    /// The forward pass.
    pub forward: PerToken,
    /// The backward pass: twice the forward pass.
    pub backward: PerToken,
}

/// FLOPs of a sequence, divided by its tokens.
///
/// Attention's scores depend on the position, so the mean need not be whole. It serializes as an
/// integer when it is, and otherwise as the double nearest to it, which printed and read again is
/// the same double; times `seq_len` it is the total to the nearest integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerToken {
    /// FLOPs of the sequence.
    pub total: u64,
    /// Its tokens.
    pub seq_len: usize,
}

impl PerToken {
    /// The mean.
    pub fn mean(&self) -> f64 {
        self.total as f64 / self.seq_len as f64
    }
}

impl Serialize for PerToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let seq_len = self.seq_len as u64;
        match self.total.checked_rem(seq_len) {
            Some(0) => serializer.serialize_u64(self.total / seq_len),
            _ => serializer.serialize_f64(self.mean()),
        }
    }
}

/// The split of one block.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BlockReport {
    /// Who reads which tokens.
    pub spans: Vec<Span>,
    /// The number of tokens that attention reads.
    pub attn_tokens: usize,
    /// The number of tokens that the SSM reads.
    pub ssm_tokens: usize,
    /// The share of the tokens that attention reads.
    pub attn_frac: f64,
    /// Forward FLOPs, by part.
    pub flops: PartFlops,
    /// The policy.
    pub policy: Policy,
    /// How the branches share the tokens.
    pub sharing: Sharing,
    /// The cycle, for a policy that goes by one.
    pub cycle: Option<Cycle>,
    /// Attention's scores by the second convention, the full square.
    pub attn_scores_full: u64,
    /// The difference of the branches' FLOPs over the larger one; absent in a block with one
    /// branch.
    pub imbalance: Option<f64>,
    /// Parameters, by part.
    pub parameters: BlockParams,
    /// Bytes moved forward, by part.
    pub bytes: BlockBytes,
    /// The share of causal pairs of tokens that are connected after this block; absent when the
    /// plan has too many pieces to say.
    pub connected_pairs: Option<f64>,
}

/// Forward FLOPs of a block, by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PartFlops {
    /// Attention, in a released block with its MLP.
    pub attn: KindFlops,
    /// The SSM, likewise.
    pub ssm: KindFlops,
    /// What joins the branches, and `final_proj`.
    pub fuse: TotalFlops,
    /// The shared MLP of a flow block.
    pub mlp: TotalFlops,
}

/// Forward FLOPs of a branch, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KindFlops {
    /// The kinds.
    #[serde(flatten)]
    pub kinds: Flops,
    /// Their sum.
    pub total: u64,
}

/// Forward FLOPs of a part that is matrix products alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TotalFlops {
    /// The sum.
    pub total: u64,
}

impl PlanReport {
    /// Reports the split of `seq_len` tokens, with bytes counted in `element`.
    ///
    /// # Errors
    /// [`crate::Error::EmptySequence`] for no tokens; [`crate::Error::Shape`] for a model that does not fit
    /// together; [`crate::Error::BlockCount`] when `routing` was made for another number of blocks.
    pub fn new(model: &ModelShape, routing: &Routing, seq_len: usize, element: Element) -> Result<Self> {
        model.check()?;
        let flops = ModelFlops::new(model, routing, seq_len, ScoreCount::Causal)?;
        let full = ModelFlops::new(model, routing, seq_len, ScoreCount::Full)?;
        let n_tokens = seq_len + model.n_meta();
        let plan = routing.plan(n_tokens)?;
        // What a window hides the plan does not know.
        let windowed = model.blocks.iter().any(|block| block.options.window.is_some());
        let connected = if windowed { None } else { routing.connected_pairs(n_tokens)? };
        let mut blocks = Vec::with_capacity(model.blocks.len());
        for (idx, shape) in model.blocks.iter().enumerate() {
            let (route, plan) = (&routing.blocks()[idx], &plan.blocks()[idx]);
            let sharing = route.sharing();
            blocks.push(BlockReport {
                spans: plan.spans().to_vec(),
                attn_tokens: plan.tokens(Branch::Attn),
                ssm_tokens: plan.tokens(Branch::Ssm),
                attn_frac: plan.tokens(Branch::Attn) as f64 / n_tokens as f64,
                flops: flops.blocks[idx].into(),
                policy: route.policy(),
                sharing,
                cycle: route.cycle(),
                attn_scores_full: full.blocks[idx].attn.scores,
                imbalance: flops.blocks[idx].imbalance(sharing),
                parameters: shape.params(sharing),
                bytes: shape.bytes(sharing, plan, element),
                connected_pairs: connected.as_ref().map(|shares| shares[idx]),
            });
        }
        let in_blocks: u64 = blocks.iter().map(|block| block.parameters.total).sum();
        let per_token = |total| PerToken { total, seq_len };
        Ok(Self {
            seq_len,
            parameters: model.outer_params() + in_blocks,
            flops_per_token: FlopsPerToken {
                forward: per_token(flops.forward()),
                backward: per_token(flops.backward()),
            },
            head: flops.head,
            blocks,
            training_seq_len: routing.seq_len(),
            element,
            warnings: routing.warnings(),
        })
    }
}

impl From<BlockFlops> for PartFlops {
    fn from(flops: BlockFlops) -> Self {
        let branch = |kinds: Flops| KindFlops { kinds, total: kinds.total() };
        Self {
            attn: branch(flops.attn),
            ssm: branch(flops.ssm),
            fuse: TotalFlops { total: flops.fuse },
            mlp: TotalFlops { total: flops.mlp },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::released_135m;
    use crate::{BlockForm, Fusion, SplitSettings};

    fn report(names: &[&str], form: BlockForm, seq_len: usize) -> PlanReport {
        let block = crate::BlockShape { form, ..released_135m() };
        let settings: Vec<_> = names.iter().map(|name| SplitSettings::new(name.parse().unwrap())).collect();
        let blocks = vec![block; names.len()];
        let routing = Routing::new(1024, &settings, &blocks).unwrap();
        let model = ModelShape { vocab_size: 65536, d_model: 768, tie_embeddings: false, blocks };
        PlanReport::new(&model, &routing, seq_len, Element::Bf16).unwrap()
    }

    #[test]
    fn json_has_the_promised_keys_and_sums() {
        for policy in crate::POLICIES {
            for form in [BlockForm::Released, BlockForm::Flow(Fusion::Proj)] {
                for seq_len in [1, 63, 1000, 1024, 1500] {
                    let report = report(&[policy.name(), policy.name()], form, seq_len);
                    let json = serde_json::to_string(&report).unwrap();
                    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
                    let per_token = json["flops_per_token"]["forward"].as_f64().unwrap();
                    let mut sum = json["head"].as_u64().unwrap();
                    for block in json["blocks"].as_array().unwrap() {
                        let flops = &block["flops"];
                        for branch in ["attn", "ssm"] {
                            let kind = |name: &str| flops[branch][name].as_u64().unwrap();
                            let kinds = ["matmul", "scores", "conv", "scan"].map(kind);
                            assert_eq!(kinds.iter().sum::<u64>(), kind("total"));
                        }
                        sum += ["attn", "ssm", "fuse", "mlp"]
                            .map(|part| flops[part]["total"].as_u64().unwrap())
                            .iter()
                            .sum::<u64>();
                        let tokens = |name: &str| block[name].as_u64().unwrap() as usize;
                        let owned = tokens("attn_tokens") + tokens("ssm_tokens");
                        let both = block["spans"][0]["branch"] == "both";
                        assert_eq!(owned, if both { 2 * seq_len } else { seq_len });
                        let frac = block["attn_frac"].as_f64().unwrap();
                        assert_eq!(frac, tokens("attn_tokens") as f64 / seq_len as f64);
                    }
                    let product = per_token * seq_len as f64;
                    assert!((product - sum as f64).abs() < 0.5, "{policy:?} {product} {sum}");
                    assert_eq!(report.flops_per_token.forward.total, sum);
                    assert_eq!(report.flops_per_token.backward.total, 2 * sum);
                }
            }
        }
    }

    #[test]
    fn whole_means_are_integers() {
        let json = |total, seq_len| serde_json::to_string(&PerToken { total, seq_len }).unwrap();
        assert_eq!(json(12, 4), "3");
        assert_eq!(json(7, 2), "3.5");
        let report = report(&["fac_split"], BlockForm::Released, 1024);
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["flops_per_token"]["forward"].is_u64());
        assert!(json["flops_per_token"]["backward"].is_u64());
    }

    #[test]
    fn no_split_is_one_span_of_both() {
        let json = serde_json::to_value(report(&["no_split"], BlockForm::Released, 8)).unwrap();
        let want = serde_json::json!([{"start": 0, "len": 8, "branch": "both"}]);
        assert_eq!(json["blocks"][0]["spans"], want);
        assert_eq!(json["blocks"][0]["flops"]["mlp"]["total"], 0);
    }

    #[test]
    fn absent_branches_count_nothing() {
        let report = report(&["ssm_all", "attn_all"], BlockForm::Flow(Fusion::Proj), 1024);
        assert_eq!(report.blocks[0].parameters.attn, 0);
        assert_eq!(report.blocks[1].flops.ssm.total, 0);
        assert_eq!(report.blocks[0].imbalance, None);
    }

    #[test]
    fn the_text_shows_spans_costs_and_warnings() {
        let text = report(&["fac_split", "no_split"], BlockForm::Released, 1024).to_string();
        for want in ["fac_split", "576", "scores", "imbalance", "FLOPs/token", "[", "backward"] {
            assert!(text.contains(want), "{want} is missing in:\n{text}");
        }
        let text = report(&["ae_split", "ae_split"], BlockForm::Released, 1024).to_string();
        assert!(text.contains("warning: this routing never mixes"), "{text}");
    }
}
