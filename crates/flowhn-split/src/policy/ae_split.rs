//! Alternating equal halves.

use super::{SplitPolicy, SplitRequest};
use crate::Result;
use crate::plan::{BlockPlan, Owner};

#[derive(Debug)]
pub(super) struct AeSplit;

impl SplitPolicy for AeSplit {
    fn name(&self) -> &'static str {
        "ae_split"
    }

    fn summary(&self) -> &'static str {
        "Each branch reads one half; the halves swap from block to block."
    }

    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan> {
        let half = req.seq_len / 2;
        let rest = req.seq_len - half;
        match req.block_idx % 2 {
            0 => BlockPlan::from_runs([(half, Owner::Ssm), (rest, Owner::Attn)]),
            _ => BlockPlan::from_runs([(half, Owner::Attn), (rest, Owner::Ssm)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::request;
    use super::*;
    use crate::Branch;

    #[test]
    fn halves_swap_and_the_odd_token_stays_with_the_last_half() {
        let attn = |block_idx| AeSplit.plan(&request(5, block_idx, 0)).unwrap().ranges(Branch::Attn);
        assert_eq!(attn(0), [2..5]);
        assert_eq!(attn(1), [0..2]);
        assert_eq!(attn(2), [2..5]);
    }
}
