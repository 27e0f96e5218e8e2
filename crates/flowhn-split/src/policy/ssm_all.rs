//! One way: every token to the SSM, as in Mamba.

use super::{Sharing, SplitPolicy, SplitRequest};
use crate::Result;
use crate::plan::{BlockPlan, Owner};

#[derive(Debug)]
pub(super) struct SsmAll;

impl SplitPolicy for SsmAll {
    fn name(&self) -> &'static str {
        "ssm_all"
    }

    fn summary(&self) -> &'static str {
        "The SSM reads every token; the block has no attention."
    }

    fn sharing(&self) -> Sharing {
        Sharing::SsmOnly
    }

    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan> {
        BlockPlan::uniform(req.seq_len, Owner::Ssm)
    }
}
