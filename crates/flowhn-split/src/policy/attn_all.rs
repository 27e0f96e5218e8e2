//! One way: every token to attention, as in a Transformer.

use super::{Sharing, SplitPolicy, SplitRequest};
use crate::Result;
use crate::plan::{BlockPlan, Owner};

#[derive(Debug)]
pub(super) struct AttnAll;

impl SplitPolicy for AttnAll {
    fn name(&self) -> &'static str {
        "attn_all"
    }

    fn summary(&self) -> &'static str {
        "Attention reads every token; the block has no SSM."
    }

    fn sharing(&self) -> Sharing {
        Sharing::AttnOnly
    }

    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan> {
        BlockPlan::uniform(req.seq_len, Owner::Attn)
    }
}
