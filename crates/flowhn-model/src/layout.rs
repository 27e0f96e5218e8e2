//! Where the tokens of a range go in each block, with the index tensors that say so on the device.

use std::ops::Range;

use flowhn_attn::Positions;
use flowhn_fuse::Route;
use flowhn_split::{BlockPlan, Branch, Owner, SplitPlan};
use tch::Device;

use crate::Result;

/// The layout of one block for a range of positions.
#[derive(Debug)]
pub(crate) struct BlockLayout {
    /// Attention's tokens, relative to the range.
    pub attn: Route,
    /// The SSM's tokens, relative to the range.
    pub ssm: Route,
    /// Absolute positions of attention's tokens; none in the layout of a step.
    pub attn_positions: Positions,
}

/// The layouts of all blocks for a range of positions.
#[derive(Debug)]
pub(crate) struct Layout {
    pub blocks: Vec<BlockLayout>,
    /// Absolute positions of all tokens of the range; none in the layout of a step.
    pub positions: Positions,
}

impl Layout {
    /// Lays out the tokens of `range`, whose plan is `plan`.
    pub fn new(plan: &SplitPlan, range: Range<usize>, device: Device) -> Result<Self> {
        let offset = range.start as i64;
        let positions = Positions::range(range.start as i64..range.end as i64, device)?;
        let blocks =
            plan.blocks().iter().map(|block| BlockLayout::new(block, offset, device)).collect::<Result<_>>()?;
        Ok(Self { blocks, positions })
    }

    /// Lays out one token that these branches read, block by block. A clock tells its position.
    pub fn step(owners: &[Owner], device: Device) -> Result<Self> {
        let block = |owner: &Owner| BlockLayout::step(*owner, device);
        let positions = Positions::new(&[], device)?;
        Ok(Self { blocks: owners.iter().map(block).collect::<Result<_>>()?, positions })
    }
}

impl BlockLayout {
    fn new(plan: &BlockPlan, offset: i64, device: Device) -> Result<Self> {
        let route = |branch| Route::new(plan.seq_len(), &plan.ranges(branch), device);
        let attn = route(Branch::Attn)?;
        let absolute: Vec<i64> = attn.positions().iter().map(|pos| pos + offset).collect();
        let attn_positions = Positions::new(&absolute, device)?;
        Ok(Self { ssm: route(Branch::Ssm)?, attn, attn_positions })
    }

    fn step(owner: Owner, device: Device) -> Result<Self> {
        let route = |branch| match owner.includes(branch) {
            true => Route::all(1, device),
            false => Route::none(1, device),
        };
        let (attn, ssm) = (route(Branch::Attn)?, route(Branch::Ssm)?);
        Ok(Self { attn, ssm, attn_positions: Positions::new(&[], device)? })
    }
}
