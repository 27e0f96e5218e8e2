//! One block: two branches side by side, their fusion, and what follows it.
// b batch, l seq_len of the range, n tokens of a branch, d d_model

use flowhn_attn::{AttnContext, KvCache};
use flowhn_fuse::{FuseShape, Fusion, FusionKind, Topology, gather, split_norm, split_norm_tokens, split_residual};
use flowhn_nn::{Bias, Linear, Path, Residual, RmsNorm};
use flowhn_split::{Branch, Bridge, Owner, Sharing};
use flowhn_ssm::SsmState;
use flowhn_torch::{Stream, fork_join, record_stream, timeline};
use tch::{Device, Kind, Tensor};

use crate::branch::{AttnBranch, BranchInput, MlpSublayer, Past, SsmBranch, Standing, opening};
use crate::config::BlockKind;
use crate::layout::BlockLayout;
use crate::model::Pass;
use crate::parts;
use crate::{ModelConfig, Result, init, mixer};

/// A FlowHN block. A branch that the policy gives nothing does not exist.
#[derive(Debug)]
pub(crate) struct Block {
    /// The norm that opens both branches, where they share one.
    norm: Option<RmsNorm>,
    attn: Option<AttnBranch>,
    ssm: Option<SsmBranch>,
    fusion: Fusion,
    tail: BlockTail,
    bridge: Bridge,
}

/// What follows the fusion.
#[derive(Debug)]
enum BlockTail {
    /// `x + final_proj(norm(x))`.
    Released { norm: RmsNorm, proj: Linear },
    /// `x + MLP(norm(x))`, for all tokens.
    Flow(Option<MlpSublayer>),
}

/// What decoding remembers of one block.
#[derive(Debug)]
pub(crate) struct BlockCache {
    pub kv: Option<KvCache>,
    pub ssm: Option<SsmState>,
}

impl BlockCache {
    /// Bytes that the cache holds.
    pub fn n_bytes(&self) -> u64 {
        self.kv.as_ref().map_or(0, KvCache::n_bytes) + self.ssm.as_ref().map_or(0, SsmState::n_bytes)
    }

    /// How often the keys and values have been given other memory.
    pub fn n_moves(&self) -> usize {
        self.kv.as_ref().map_or(0, KvCache::n_moves)
    }

    /// The tensors of the state-space branch's state.
    pub fn state(&self) -> Option<[Tensor; 2]> {
        self.ssm.as_ref().map(|state| [state.conv_bje.shallow_clone(), state.scan.shallow_clone()])
    }

    /// Copies the state into the tensors that it had before, if it has others now.
    pub fn put_state(&mut self, before: Option<[Tensor; 2]>) -> Result<()> {
        if let (Some(state), Some([conv_bje, scan])) = (&mut self.ssm, before) {
            for (now, mut before) in [(&mut state.conv_bje, conv_bje), (&mut state.scan, scan)] {
                if now.data_ptr() != before.data_ptr() {
                    before.f_copy_(now)?;
                    *now = before;
                }
            }
        }
        Ok(())
    }
}

impl Block {
    pub fn new(path: &mut Path, config: &ModelConfig, block_idx: usize, sharing: Sharing) -> Result<Self> {
        let released = config.block == BlockKind::Released;
        let norm = match config.block_shape(block_idx).shares_norm(sharing) {
            true => Some(opening(path, config, None)?),
            false => None,
        };
        let shared = norm.as_ref();
        let attn = match sharing.has(Branch::Attn) {
            true => Some(AttnBranch::new(&mut path.push("attn"), config, block_idx, shared, released)?),
            false => None,
        };
        let ssm = match sharing.has(Branch::Ssm) {
            true => Some(SsmBranch::new(&mut path.push("ssm"), config, shared, released)?),
            false => None,
        };
        let shape = FuseShape { d_model: config.d_model as i64, topology: topology(sharing) };
        let fusion = Fusion::new(&mut path.push("fusion"), fusion_kind(config, sharing), shape)?;
        let tail = match config.block {
            BlockKind::Released => {
                let d_model = config.d_model as i64;
                BlockTail::Released {
                    norm: RmsNorm::new(path, "final_norm", d_model, config.rms_norm_eps)?,
                    proj: Linear::new(path, "final_proj", d_model, d_model, init::linear(config, d_model), Bias::None)?,
                }
            }
            BlockKind::Flow => BlockTail::Flow(MlpSublayer::new(&mut path.push("mlp"), config)?),
        };
        Ok(Self { norm, attn, ssm, fusion, tail, bridge: config.attn.bridge })
    }

    /// What decoding remembers of the block before the first token.
    pub fn cache(&self, batch: usize, config: &ModelConfig, device: Device) -> BlockCache {
        BlockCache {
            kv: self.attn.as_ref().map(|_| KvCache::new()),
            ssm: self.ssm.as_ref().map(|_| SsmState::new(&mixer::ssm(config), batch, device)),
        }
    }

    /// Whether a token that goes to `owner` leaves a key and a value in the block's cache.
    pub fn caches_keys_of(&self, owner: Owner) -> bool {
        self.attn.is_some() && (self.bridge == Bridge::Kv || owner.includes(Branch::Attn))
    }

    /// Prepares the cache for a step whose token leaves a key and a value there.
    pub fn make_room(&self, cache: &mut BlockCache, batch: usize, kind: Kind, device: Device) -> Result<()> {
        if let (Some(branch), Some(kv)) = (&self.attn, &mut cache.kv) {
            branch.mixer().make_room(kv, batch as i64, kind, device)?;
        }
        Ok(())
    }

    /// Runs block `block_idx` of the pass on the sum of `stream`; with a cache, goes on from the tokens it remembers; with a stream on
    /// the `side`, attention runs there, beside the state-space branch.
    pub fn forward(
        &self,
        stream: &Residual,
        block_idx: usize,
        pass: &Pass,
        cache: Option<&mut BlockCache>,
        side: Option<Stream>,
    ) -> Result<Residual> {
        let routes = &pass.layout.blocks[block_idx];
        let (kv, state) = match cache {
            Some(cache) => (cache.kv.as_mut(), cache.ssm.as_mut()),
            None => (None, None),
        };
        let (x_bld, attn_input, ssm_input) = self.read(stream, routes)?;
        let leave = |part: &'static str| move |x: Residual| x.map_last(|x| timeline::pass(x, parts::FUSION, part));
        let attend = || -> Result<Option<Residual>> {
            let a_bnd = self.attend(&x_bld, &attn_input, pass, routes, kv)?;
            Ok(a_bnd.map(leave(parts::ATTENTION)).transpose()?)
        };
        let scan = || -> Result<Option<Residual>> {
            let s_bmd = self.scan(&ssm_input, routes, pass, state)?;
            Ok(s_bmd.map(leave(parts::SSM)).transpose()?)
        };
        let (a_bnd, s_bmd) = match (side, x_bld.device()) {
            (Some(side), Device::Cuda(device_idx)) if self.attn.is_some() && self.ssm.is_some() => {
                // What crosses between the streams lives until both are done with it, backward too.
                attn_input.record_stream(side)?;
                record_stream(&x_bld, side)?;
                let (a_bnd, s_bmd) = fork_join(device_idx, side, attend, scan)?;
                a_bnd.iter().try_for_each(|a_bnd| a_bnd.record_stream(Stream::current(device_idx)?))?;
                (a_bnd, s_bmd)
            }
            _ => (attend()?, scan()?),
        };
        let (a, s, attn, ssm) = (a_bnd.as_ref(), s_bmd.as_ref(), &routes.attn, &routes.ssm);
        match &self.tail {
            BlockTail::Released { norm, proj } => {
                let (x_bld, normed_bld) =
                    self.fusion.forward_residual_norm(&x_bld, a, s, attn, ssm, (norm, Some(proj)))?;
                Ok(Residual { x: x_bld, change: Some(proj.forward(normed_bld)?) })
            }
            BlockTail::Flow(Some(mlp)) => {
                let norm = (mlp.norm(), Some(mlp.in_proj()));
                let (x_bld, normed_bld) = self.fusion.forward_residual_norm(&x_bld, a, s, attn, ssm, norm)?;
                let normed_bld = normed_bld.pass(|x| timeline::pass(x, parts::MLP, parts::FUSION))?;
                Ok(mlp.forward_normed(x_bld, normed_bld)?.map_last(|x| timeline::pass(x, parts::FUSION, parts::MLP))?)
            }
            BlockTail::Flow(None) => {
                let [a_bnd, s_bmd] = [a, s].map(|x| x.map(Residual::sum).transpose());
                let sum = self.fusion.forward_residual(&x_bld, a_bnd?.as_ref(), s_bmd?.as_ref(), attn, ssm)?;
                Ok(Residual::of(sum))
            }
        }
    }

    /// The block's input, to go on with, and what the branches read of it. Taking the sum, splitting and the norms are one pass where
    /// every token is read and nothing else reads their norms.
    fn read(&self, stream: &Residual, routes: &BlockLayout) -> Result<(Tensor, BranchInput, BranchInput)> {
        let (attn_route, ssm_route) = (&routes.attn, &routes.ssm);
        let (x_bld, change) = (&stream.x, stream.change.as_ref());
        if self.bridge == Bridge::None {
            if let Some(norm) = self.norm.as_ref().filter(|_| attn_route.is_all() && ssm_route.is_all()) {
                return read_alike(stream, norm);
            }
            match (&self.attn, &self.ssm) {
                (Some(attn), Some(ssm)) if !(attn_route.is_empty() || ssm_route.is_empty()) => {
                    let norms = (attn.norm(), ssm.norm());
                    if attn.has_tail() {
                        let readers = [attn.mixer().in_proj(), Some(ssm.mixer().in_proj())];
                        let split = split_norm_tokens(x_bld, change, attn_route, ssm_route, norms.into(), readers)?;
                        let attn = BranchInput::Both { x_bnd: split.attn_bnd, normed_bnd: split.attn_normed };
                        let ssm = BranchInput::Both { x_bnd: split.ssm_bmd, normed_bnd: split.ssm_normed };
                        return Ok((split.sum_bld, attn, ssm));
                    }
                    let normed = split_norm(x_bld, change, attn_route, ssm_route, norms.0, norms.1)?;
                    let (attn, ssm) =
                        (BranchInput::Normed(normed.attn_bnd.into()), BranchInput::Normed(normed.ssm_bmd.into()));
                    return Ok((normed.sum_bld, attn, ssm));
                }
                // One branch reads all, as in a step of decoding, or is the only one.
                (Some(attn), _) if attn_route.is_all() && ssm_route.is_empty() => {
                    return read_alike(stream, attn.norm());
                }
                (_, Some(ssm)) if ssm_route.is_all() && attn_route.is_empty() => return read_alike(stream, ssm.norm()),
                _ => {}
            }
        }
        let (x_bld, x_attn, x_ssm) = split_residual(&stream.sum()?, attn_route, ssm_route)?;
        Ok((x_bld, BranchInput::Tokens(x_attn), BranchInput::Tokens(x_ssm)))
    }

    /// The attention branch on its tokens; over a bridge, keys and values come from every token of the range.
    fn attend(
        &self,
        x_bld: &Tensor,
        input: &BranchInput,
        pass: &Pass,
        routes: &BlockLayout,
        cache: Option<&mut KvCache>,
    ) -> Result<Option<Residual>> {
        let Some(branch) = &self.attn else { return Ok(None) };
        let input = &input.timed(parts::ATTENTION, parts::FUSION)?;
        let segments_bl = pass.segments_bl.as_ref();
        let positions = &pass.layout.positions;
        let window_segments = gathered(segments_bl, &routes.attn)?;
        let mut ctx = AttnContext::new(&routes.attn_positions);
        if let Some(segments_bn) = &window_segments {
            ctx = ctx.with_segments(segments_bn, segments_bl);
        }
        if self.bridge == Bridge::Kv {
            let source_bld = branch.norm().forward(x_bld)?;
            if routes.attn.is_empty() {
                // Tokens that attention does not read still serve it as keys and values later.
                match (pass.clock, cache) {
                    (Some(clock), Some(cache)) => branch.mixer().step_source(&source_bld, clock, cache)?,
                    (None, Some(cache)) => {
                        branch.mixer().append_source(&source_bld, positions, segments_bl, cache)?;
                    }
                    (_, None) => {}
                }
                return Ok(None);
            }
            let normed_bnd = gather(&source_bld, &routes.attn)?;
            let standing = standing(pass, ctx.with_source(positions), cache);
            return branch.forward(input.tokens(), &normed_bnd, Some(&source_bld), standing).map(Some);
        }
        if routes.attn.is_empty() {
            return Ok(None);
        }
        let (x_bnd, normed_bnd) = input.normed_by(branch.norm())?;
        branch.forward(x_bnd.as_ref(), normed_bnd, None, standing(pass, ctx, cache)).map(Some)
    }

    /// The state-space branch on its tokens.
    fn scan(
        &self,
        input: &BranchInput,
        routes: &BlockLayout,
        pass: &Pass,
        state: Option<&mut SsmState>,
    ) -> Result<Option<Residual>> {
        let Some(branch) = self.ssm.as_ref().filter(|_| !routes.ssm.is_empty()) else { return Ok(None) };
        let input = &input.timed(parts::SSM, parts::FUSION)?;
        let segments_bm = gathered(pass.segments_bl.as_ref(), &routes.ssm)?;
        let reset_bm = segments_bm.map(|segments| document_starts(&segments)).transpose()?;
        let past = match (pass.clock, state) {
            (Some(_), Some(state)) => Past::Step(state),
            (_, state) => Past::Tokens { reset_bm: reset_bm.as_ref(), state },
        };
        branch.forward(input, past).map(Some)
    }
}

/// Where attention's tokens stand in this pass.
fn standing<'a>(pass: &Pass<'a>, ctx: AttnContext<'a>, cache: Option<&'a mut KvCache>) -> Standing<'a> {
    match (pass.clock, cache) {
        (Some(clock), Some(cache)) => Standing::Step { clock, cache },
        (_, cache) => Standing::Tokens { ctx, cache },
    }
}

/// What the only branch with tokens reads, or both where one norm serves them; a branch without is given the same and reads nothing.
fn read_alike(stream: &Residual, norm: &RmsNorm) -> Result<(Tensor, BranchInput, BranchInput)> {
    let (x_bld, normed_bld) = norm.forward_residual(&stream.x, stream.change.as_ref())?;
    let input = || BranchInput::Both { x_bnd: x_bld.shallow_clone(), normed_bnd: (&normed_bld).into() };
    let (attn, ssm) = (input(), input());
    Ok((x_bld, attn, ssm))
}

/// The segments of a route's tokens.
fn gathered(segments_bl: Option<&Tensor>, route: &flowhn_fuse::Route) -> Result<Option<Tensor>> {
    let Some(segments_bl) = segments_bl else { return Ok(None) };
    Ok(Some(gather(&segments_bl.f_unsqueeze(-1)?, route)?.f_squeeze_dim(-1)?))
}

/// True where a token's document differs from that of the branch's token before it. The first token continues whatever came
/// before.
fn document_starts(segments_bn: &Tensor) -> Result<Tensor> {
    let n = segments_bn.size()[1];
    let first = segments_bn.f_narrow(1, 0, 1)?.f_zeros_like()?.f_to_kind(Kind::Bool)?;
    let changes = segments_bn.f_narrow(1, 1, n - 1)?.f_ne_tensor(&segments_bn.f_narrow(1, 0, n - 1)?)?;
    Ok(Tensor::f_cat(&[first, changes], 1)?)
}

fn topology(sharing: Sharing) -> Topology {
    match sharing {
        Sharing::Parallel => Topology::Both,
        Sharing::Split => Topology::Split,
        Sharing::AttnOnly => Topology::AttnOnly,
        Sharing::SsmOnly => Topology::SsmOnly,
    }
}

/// The released block always projects. A flow block with one branch has nothing to fuse.
fn fusion_kind(config: &ModelConfig, sharing: Sharing) -> FusionKind {
    let one_way = matches!(sharing, Sharing::AttnOnly | Sharing::SsmOnly);
    match (config.block, config.fusion) {
        (BlockKind::Released, _) => FusionKind::BranchProj { std: init::STD },
        (BlockKind::Flow, _) if one_way => FusionKind::None,
        (BlockKind::Flow, flowhn_split::Fusion::None) => FusionKind::None,
        (BlockKind::Flow, flowhn_split::Fusion::Mean) => FusionKind::Mean,
        (BlockKind::Flow, flowhn_split::Fusion::Proj) => FusionKind::Proj,
        (BlockKind::Flow, flowhn_split::Fusion::Gated) => FusionKind::Gated,
    }
}
