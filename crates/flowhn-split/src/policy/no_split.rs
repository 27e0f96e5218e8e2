//! No split: the parallel hybrid.

use super::{Sharing, SplitPolicy, SplitRequest};
use crate::Result;
use crate::plan::{BlockPlan, Owner};

#[derive(Debug)]
pub(super) struct NoSplit;

impl SplitPolicy for NoSplit {
    fn name(&self) -> &'static str {
        "no_split"
    }

    fn summary(&self) -> &'static str {
        "Both branches read every token."
    }

    fn sharing(&self) -> Sharing {
        Sharing::Parallel
    }

    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan> {
        BlockPlan::uniform(req.seq_len, Owner::Both)
    }
}
