//! From settings and shapes to a routing: who reads which position, at any length.

use std::ops::Range;

use crate::balance::{Balance, Placement};
use crate::plan::{BlockPlan, Branch, Owner, SplitPlan};
use crate::policy::{Needs, Policy, Sharing, SplitRequest};
use crate::{AttnFrac, BlockShape, Bridge, Cycle, Error, Result, ScoreCount, SplitSettings, mixing};

/// The routing of a model: a pure function from (block, position) to branch.
///
/// It is made once, for the training length; the balance and the cycle are solved there. A shorter
/// sequence routes as the prefix of the training plan does, a longer one repeats it with the
/// training length as the period (`cyclic_split` goes by absolute chunk and repeats nothing). So
/// decoding token by token routes as the whole sequence does. Blocks in the released form are
/// planned at the actual length instead, as the script does.
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
/// let settings = SplitSettings::new("fac_split".parse()?);
/// let routing = Routing::new(1024, &[settings.clone(), settings], &[block, block])?;
/// let plan = routing.plan(1024)?;
/// assert_eq!(plan.blocks()[0].ranges(Branch::Attn), [448..1024]);
/// assert_eq!(plan.blocks()[1].ranges(Branch::Attn), [0..448, 896..1024]);
/// assert_eq!(routing.owner(1, 1024 + 447), Some(Owner::Attn));
/// # Ok::<(), flowhn_split::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    seq_len: usize,
    blocks: Vec<BlockRoute>,
    bridges: Vec<Bridge>,
}

/// The routing of one block, with everything solved.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockRoute {
    settings: SplitSettings,
    sharing: Sharing,
    n_attn: Option<usize>,
    cycle: Option<Cycle>,
    trained: BlockPlan,
}

impl Routing {
    /// Solves the routing for the training length `seq_len`; block `i` has `settings[i]` and
    /// `shapes[i]`.
    ///
    /// # Errors
    /// [`Error::EmptySequence`]; [`Error::BlockCount`] when the two lists differ in length; and
    /// whatever [`SplitSettings::check`] and [`BlockShape::check`] find.
    pub fn new(seq_len: usize, settings: &[SplitSettings], shapes: &[BlockShape]) -> Result<Self> {
        if seq_len == 0 {
            return Err(Error::EmptySequence);
        }
        check_count(settings.len(), shapes.len())?;
        let mut blocks: Vec<BlockRoute> = Vec::with_capacity(shapes.len());
        for (block_idx, (settings, shape)) in settings.iter().zip(shapes).enumerate() {
            blocks.push(BlockRoute::new(seq_len, block_idx, settings, shape)?);
        }
        let bridges = shapes.iter().map(|shape| shape.attn.bridge).collect();
        Ok(Self { seq_len, blocks, bridges })
    }

    /// The training length.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The blocks' routes.
    pub fn blocks(&self) -> &[BlockRoute] {
        &self.blocks
    }

    /// The plan of the first `seq_len` tokens of a sequence of that length.
    ///
    /// # Errors
    /// [`Error::EmptySequence`] for no tokens.
    pub fn plan(&self, seq_len: usize) -> Result<SplitPlan> {
        self.plan_range(0..seq_len)
    }

    /// The plan of the tokens in `range`, re-based to 0: the slice of [`plan`](Self::plan) at
    /// `range.end`, at a cost that does not grow with `range.start`.
    ///
    /// # Errors
    /// [`Error::EmptySequence`] for an empty range.
    pub fn plan_range(&self, range: Range<usize>) -> Result<SplitPlan> {
        let blocks = self.blocks.iter().enumerate();
        let plans = blocks.map(|(idx, route)| route.plan_range(idx, self.seq_len, range.clone()));
        SplitPlan::new(plans.collect::<Result<_>>()?)
    }

    /// Who reads position `pos` in block `block_idx`; `None` past the last block. Released forms
    /// answer for the training length.
    pub fn owner(&self, block_idx: usize, pos: usize) -> Option<Owner> {
        let route = self.blocks.get(block_idx)?;
        let plan = route.tiled(block_idx, self.seq_len, pos..pos + 1).ok()?;
        plan.owner(0)
    }

    /// The cycle of the first block that has one, for the checked config.
    pub fn cycle(&self) -> Option<Cycle> {
        self.blocks.iter().find_map(|route| route.cycle)
    }

    /// What is unwise about this routing though it works, each a sentence: blocks whose branches
    /// can never tell each other everything, and branches that get no token.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let limit = self.limit_of_connection();
        if limit < 1.0 {
            warnings.push(format!(
                "this routing never mixes: at any depth at most {:.0} % of the pairs of an earlier \
                 and a later token are connected; use cyclic_split, fac_split with a window other \
                 than half the length, bridge = \"kv\", or first_blocks = [\"ssm_all\"]",
                100.0 * limit
            ));
        }
        for (idx, route) in self.blocks.iter().enumerate() {
            for branch in Branch::ALL {
                if route.sharing.has(branch) && route.trained.tokens(branch) == 0 {
                    warnings.push(format!(
                        "block {idx}: {} gets no token at the training length of {}",
                        branch.name(),
                        self.seq_len
                    ));
                }
            }
        }
        warnings
    }

    /// The share of causal pairs of the first `seq_len` tokens that are connected after each
    /// block; `None` when the plan has too many pieces to say.
    ///
    /// # Errors
    /// [`Error::EmptySequence`] for no tokens.
    pub fn connected_pairs(&self, seq_len: usize) -> Result<Option<Vec<f64>>> {
        let plan = self.plan(seq_len)?;
        Ok(mixing::connected_pairs(plan.blocks(), &self.bridges))
    }

    pub(crate) fn check_blocks(&self, shapes: &[BlockShape]) -> Result<()> {
        check_count(self.blocks.len(), shapes.len())
    }

    /// The connected share when blocks like the last one follow for as long as that helps.
    fn limit_of_connection(&self) -> f64 {
        const MORE_BLOCKS: usize = 32;
        let (Some(last), Some(&bridge)) = (self.blocks.last(), self.bridges.last()) else {
            return 1.0;
        };
        let mut plans: Vec<BlockPlan> = self.blocks.iter().map(|r| r.trained.clone()).collect();
        for block_idx in plans.len()..plans.len() + MORE_BLOCKS {
            plans.extend(last.plan_at(self.seq_len, block_idx));
        }
        let mut bridges = self.bridges.clone();
        bridges.resize(plans.len(), bridge);
        mixing::connected_prefix(&plans, &bridges).last().copied().unwrap_or(1.0)
    }
}

/// Refuses what the balance of the branches and the cost of a bridge leave out.
fn check_counted(settings: &SplitSettings, shape: &BlockShape) -> Result<()> {
    let options = &shape.options;
    let counts_all = settings.policy.sharing() != Sharing::Split && shape.attn.bridge == Bridge::None;
    let sizes = [("model.attn.window", options.window.unwrap_or(0)), ("model.n_meta", options.n_meta)];
    match sizes.into_iter().find(|&(_, got)| got > 0 && !counts_all) {
        None => Ok(()),
        Some((name, got)) => {
            let want = "leave it out where branches share the tokens out or attention has a bridge, whose costs do not count it";
            Err(Error::Shape { name, got, want: want.to_owned() })
        }
    }
}

impl BlockRoute {
    fn new(seq_len: usize, block_idx: usize, settings: &SplitSettings, shape: &BlockShape) -> Result<Self> {
        settings.check()?;
        shape.check()?;
        check_counted(settings, shape)?;
        let needs = if settings.released { Needs::Nothing } else { settings.policy.needs() };
        let n_attn = (needs == Needs::Tokens).then(|| solve_tokens(seq_len, settings, shape));
        let cycle = (needs == Needs::Cycle).then(|| solve_cycle(seq_len, settings, shape));
        let mut route = Self {
            settings: settings.clone(),
            sharing: solved_sharing(settings, needs, cycle),
            n_attn,
            cycle,
            trained: BlockPlan::uniform(seq_len, Owner::Both)?,
        };
        route.trained = route.plan_at(seq_len, block_idx)?;
        Ok(route)
    }

    /// The settings as given.
    pub fn settings(&self) -> &SplitSettings {
        &self.settings
    }

    /// The policy.
    pub fn policy(&self) -> Policy {
        self.settings.policy
    }

    /// How the branches share the tokens, and so which of them the block has: a split with an
    /// `attn_frac` of 0 or 1 is one way.
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// The number of attention tokens at the training length, for policies that solve it.
    pub fn n_attn(&self) -> Option<usize> {
        self.n_attn
    }

    /// The cycle, for policies that go by one.
    pub fn cycle(&self) -> Option<Cycle> {
        self.cycle
    }

    /// The plan at the training length.
    pub fn trained(&self) -> &BlockPlan {
        &self.trained
    }

    fn plan_range(&self, block_idx: usize, period: usize, range: Range<usize>) -> Result<BlockPlan> {
        if range.is_empty() {
            return Err(Error::EmptySequence);
        }
        if self.settings.released {
            return self.plan_at(range.end, block_idx)?.slice(range);
        }
        self.tiled(block_idx, period, range)
    }

    /// The routing of a non-empty range by absolute position.
    fn tiled(&self, block_idx: usize, period: usize, range: Range<usize>) -> Result<BlockPlan> {
        if let Some(cycle) = self.cycle {
            // Chunks whole cycles apart are alike, so the plan may start at the cycle before.
            let cycle_len = self.settings.chunk_len * cycle.period;
            let base = range.start / cycle_len * cycle_len;
            let plan = self.plan_at(range.end - base, block_idx)?;
            return plan.slice(range.start - base..range.end - base);
        }
        let tiles = range.start / period..=(range.end - 1) / period;
        BlockPlan::from_runs(tiles.flat_map(|tile| {
            let base = tile * period;
            self.trained.clipped(range.start.saturating_sub(base)..range.end - base)
        }))
    }

    fn plan_at(&self, seq_len: usize, block_idx: usize) -> Result<BlockPlan> {
        let settings = &self.settings;
        settings.policy.plan(&SplitRequest {
            seq_len,
            block_idx,
            n_attn: self.n_attn.unwrap_or_default(),
            window: settings.window,
            released: settings.released,
            chunk_len: settings.chunk_len,
            cycle: self.cycle.unwrap_or(Cycle { attn: 0, period: 1 }),
        })
    }
}

/// Gives each of `n_layers` blocks its policy: `first_blocks` for the first ones, and for the rest
/// either the one in `policy` or, when that lists one for each block of the model, its own.
///
/// ```
/// # use flowhn_split::*;
/// let policies = policy_per_block(&["ssm_all".parse()?], &["cyclic_split".parse()?], 3)?;
/// let names: Vec<_> = policies.iter().map(|policy| policy.name()).collect();
/// assert_eq!(names, ["ssm_all", "cyclic_split", "cyclic_split"]);
/// # Ok::<(), flowhn_split::Error>(())
/// ```
///
/// # Errors
/// [`Error::BlockCount`] when there are more first blocks than blocks, or a list of another length.
pub fn policy_per_block(first_blocks: &[Policy], policy: &[Policy], n_layers: usize) -> Result<Vec<Policy>> {
    let fail = |got, remedy| Err(Error::BlockCount { got, n_layers, remedy });
    if first_blocks.len() > n_layers {
        return fail(first_blocks.len(), "shorten first_blocks");
    }
    match policy {
        [one] => {
            let rest = std::iter::repeat_n(*one, n_layers - first_blocks.len());
            Ok(first_blocks.iter().copied().chain(rest).collect())
        }
        list if list.len() == n_layers => {
            let rest = &list[first_blocks.len()..];
            Ok(first_blocks.iter().chain(rest).copied().collect())
        }
        list => fail(list.len(), "give policy as one name, or as one name for each block"),
    }
}

fn check_count(got: usize, n_layers: usize) -> Result<()> {
    if got == n_layers && n_layers > 0 {
        return Ok(());
    }
    Err(Error::BlockCount { got, n_layers, remedy: "each block needs settings and a shape" })
}

fn solve_tokens(seq_len: usize, settings: &SplitSettings, shape: &BlockShape) -> usize {
    match settings.attn_frac {
        AttnFrac::Fixed(frac) => fixed_tokens(seq_len, frac, settings.tile),
        AttnFrac::Flops | AttnFrac::Measured => {
            let placement = settings.policy.placement(settings.window);
            Balance::new(shape, seq_len, placement, ScoreCount::Causal).solve_tiled(settings.tile)
        }
    }
}

/// The share of the tokens, to the nearest tile where the length holds two; 0 and 1 are exact.
fn fixed_tokens(seq_len: usize, frac: f64, tile: usize) -> usize {
    let exact = frac * seq_len as f64;
    if frac == 0.0 || frac == 1.0 || seq_len / tile < 2 {
        return exact.round() as usize;
    }
    let tiles = (exact / tile as f64).round() as usize;
    tiles.clamp(1, (seq_len - tile) / tile) * tile
}

fn solve_cycle(seq_len: usize, settings: &SplitSettings, shape: &BlockShape) -> Cycle {
    settings.cycle.unwrap_or_else(|| match settings.attn_frac {
        AttnFrac::Fixed(frac) => Cycle::nearest(frac),
        AttnFrac::Flops | AttnFrac::Measured => {
            let balance = Balance::new(shape, seq_len, Placement::Spread, ScoreCount::Causal);
            let frac = balance.solve() as f64 / seq_len as f64;
            // A balance keeps both branches at work; only a request sends all tokens one way.
            Cycle::nearest(frac.clamp(0.125, 0.875))
        }
    })
}

fn solved_sharing(settings: &SplitSettings, needs: Needs, cycle: Option<Cycle>) -> Sharing {
    let frac = match (needs, cycle, settings.attn_frac) {
        (Needs::Cycle, Some(cycle), _) => cycle.frac(),
        (Needs::Tokens, _, AttnFrac::Fixed(frac)) => frac,
        _ => return settings.policy.sharing(),
    };
    if frac == 0.0 {
        Sharing::SsmOnly
    } else if frac == 1.0 {
        Sharing::AttnOnly
    } else {
        settings.policy.sharing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::released_135m;
    use crate::{BlockOptions, Window};

    fn routing(name: &str, seq_len: usize, change: impl Fn(&mut SplitSettings)) -> Routing {
        let mut settings = SplitSettings::new(name.parse().unwrap());
        change(&mut settings);
        Routing::new(seq_len, &vec![settings; 3], &[released_135m(); 3]).unwrap()
    }

    #[test]
    fn the_balance_at_the_released_shapes() {
        let routing = routing("fa_split", 1024, |_| {});
        assert_eq!(routing.blocks()[2].n_attn(), Some(576));
        assert_eq!(routing.plan(1024).unwrap().blocks()[2].ranges(Branch::Attn), [448..1024]);
    }

    #[test]
    fn the_cycle_at_the_released_shapes() {
        let routing = routing("cyclic_split", 1024, |_| {});
        assert_eq!(routing.cycle(), Some(Cycle { attn: 4, period: 7 }));
        let kept = Cycle { attn: 1, period: 3 };
        let kept_routing = self::routing("cyclic_split", 1024, |s| s.cycle = Some(kept));
        assert_eq!(kept_routing.cycle(), Some(kept));
    }

    #[test]
    fn fixed_fractions_go_to_the_nearest_tile() {
        let n_attn = |frac, seq_len| {
            let change = |s: &mut SplitSettings| s.attn_frac = AttnFrac::Fixed(frac);
            routing("fa_split", seq_len, change).blocks()[0].n_attn().unwrap()
        };
        assert_eq!(n_attn(0.59, 1024), 576);
        assert_eq!(n_attn(0.01, 1024), 64);
        assert_eq!(n_attn(0.99, 1000), 896);
        assert_eq!(n_attn(0.59, 100), 59);
        assert_eq!(n_attn(0.0, 1000), 0);
        assert_eq!(n_attn(1.0, 1000), 1000);
    }

    #[test]
    fn requests_for_all_or_nothing_are_one_way() {
        for (frac, want) in [(0.0, Sharing::SsmOnly), (1.0, Sharing::AttnOnly)] {
            for name in ["fa_split", "fac_split", "cyclic_split"] {
                let routing = routing(name, 100, |s| s.attn_frac = AttnFrac::Fixed(frac));
                assert_eq!(routing.blocks()[1].sharing(), want, "{name}");
                let tokens = routing.plan(100).unwrap().blocks()[1].tokens(Branch::Attn);
                assert_eq!(tokens, (100.0 * frac) as usize, "{name}");
                assert_eq!(routing.warnings(), Vec::<String>::new(), "{name}");
            }
        }
    }

    #[test]
    fn one_token_keeps_both_branches() {
        for name in ["ae_split", "fa_split", "fac_split", "cyclic_split"] {
            let routing = routing(name, 1, |_| {});
            assert_eq!(routing.blocks()[0].sharing(), Sharing::Split, "{name}");
            assert!(routing.warnings().iter().any(|w| w.contains("gets no token")), "{name}");
        }
    }

    #[test]
    fn released_forms_plan_at_the_actual_length() {
        let routing = routing("fa_split", 1024, |s| s.released = true);
        let plan = routing.plan(100).unwrap();
        assert_eq!(plan.blocks()[0].ranges(Branch::Attn), [0..59]);
        let range = routing.plan_range(50..100).unwrap();
        assert_eq!(range.blocks()[0].ranges(Branch::Attn), [0..9]);
    }

    #[test]
    fn what_a_balance_does_not_count_is_refused() {
        for (window, n_meta) in [(Some(64), 0), (None, 4)] {
            let mut block = released_135m();
            block.options = BlockOptions { window, n_meta, ..block.options };
            let route =
                |policy: &str, block| Routing::new(256, &[SplitSettings::new(policy.parse().unwrap())], &[block]);
            assert!(route("no_split", block).is_ok() && route("attn_all", block).is_ok());
            let refused = route("fac_split", block).unwrap_err().to_string();
            assert!(refused.contains(if n_meta > 0 { "n_meta is 4" } else { "window is 64" }), "{refused}");
            block.attn.bridge = Bridge::Kv;
            assert!(route("no_split", block).is_err());
        }
    }

    #[test]
    fn a_contradicted_released_fraction_is_refused() {
        let mut settings = SplitSettings::new("fa_split".parse().unwrap());
        settings.released = true;
        settings.attn_frac = AttnFrac::Fixed(0.5);
        let refused = Routing::new(64, &[settings.clone()], &[released_135m()]);
        assert_eq!(refused, Err(Error::ReleasedFrac { policy: "fa_split", got: 0.5, want: 0.59 }));
        settings.attn_frac = AttnFrac::Fixed(0.59);
        assert!(Routing::new(64, &[settings.clone()], &[released_135m()]).is_ok());
        // Halves that swap: one half is what the script's fac_split has.
        settings.policy = "fac_split".parse().unwrap();
        let refused = Routing::new(64, &[settings.clone()], &[released_135m()]).unwrap_err().to_string();
        assert!(refused.contains("fac_split") && refused.contains("0.5 *"), "{refused}");
        settings.attn_frac = AttnFrac::Fixed(0.5);
        assert!(Routing::new(64, &[settings], &[released_135m()]).is_ok());
    }

    #[test]
    fn measured_is_refused_by_name() {
        let mut settings = SplitSettings::new("fac_split".parse().unwrap());
        settings.attn_frac = AttnFrac::Measured;
        let error = Routing::new(64, &[settings], &[released_135m()]).unwrap_err();
        assert!(error.to_string().contains("attn_frac = \"measured\""), "{error}");
    }

    #[test]
    fn warnings_name_what_never_mixes() {
        let half = |s: &mut SplitSettings| s.attn_frac = AttnFrac::Fixed(0.5);
        let never = |routing: Routing| routing.warnings().iter().any(|warning| warning.contains("never mixes"));
        assert!(never(routing("fac_split", 1024, half)));
        assert!(!never(routing("fac_split", 1024, |_| {})));
        assert!(!never(routing("fac_split", 1024, |s| s.window = Window::First)));
        assert!(never(routing("ae_split", 1024, |_| {})));
        assert!(never(routing("fa_split", 1024, |_| {})));
        assert!(!never(routing("cyclic_split", 1024, |_| {})));
        let pairs = Some(Cycle { attn: 1, period: 2 });
        assert!(never(routing("cyclic_split", 1024, |s| s.cycle = pairs)));
        assert!(!never(routing("no_split", 1024, |_| {})));
    }

    #[test]
    fn a_bridge_or_a_first_block_mixes() {
        let fa = SplitSettings::new("fa_split".parse().unwrap());
        let all = SplitSettings::new("ssm_all".parse().unwrap());
        let block = released_135m();
        let routing = Routing::new(1024, &[all, fa.clone()], &[block, block]).unwrap();
        assert_eq!(routing.warnings(), Vec::<String>::new());
        let mut bridged = block;
        bridged.attn.bridge = Bridge::Kv;
        let ae = SplitSettings::new("ae_split".parse().unwrap());
        let routing = Routing::new(1024, &[ae.clone(), ae], &[bridged, bridged]).unwrap();
        assert_eq!(routing.warnings(), Vec::<String>::new());
    }

    #[test]
    fn policies_per_block() {
        let named = |names: &[&str]| -> Vec<Policy> { names.iter().map(|name| name.parse().unwrap()).collect() };
        let list = named(&["no_split", "ae_split", "fa_split"]);
        assert_eq!(policy_per_block(&[], &list, 3).unwrap(), list);
        let mixed = policy_per_block(&named(&["ssm_all"]), &list, 3).unwrap();
        assert_eq!(mixed, named(&["ssm_all", "ae_split", "fa_split"]));
        assert!(policy_per_block(&[], &list, 4).is_err());
        assert!(policy_per_block(&list, &named(&["no_split"]), 2).is_err());
        assert!(policy_per_block(&[], &[], 2).is_err());
    }
}
