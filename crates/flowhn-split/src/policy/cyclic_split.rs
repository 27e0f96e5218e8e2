//! Rotating chunks.

use super::{Needs, SplitPolicy, SplitRequest};
use crate::Result;
use crate::plan::{BlockPlan, Owner};

#[derive(Debug)]
pub(super) struct CyclicSplit;

impl SplitPolicy for CyclicSplit {
    fn name(&self) -> &'static str {
        "cyclic_split"
    }

    fn summary(&self) -> &'static str {
        "Chunks by absolute position; attention's share of every period rotates from block to \
         block, so a prefix always routes the same."
    }

    fn needs(&self) -> Needs {
        Needs::Cycle
    }

    fn has_released_form(&self) -> bool {
        false
    }

    /// Chunk `k` goes to attention in block `i` if `(k + i) mod period < attn`.
    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan> {
        let chunk_len = req.chunk_len.max(1);
        let n_chunks = req.seq_len.div_ceil(chunk_len);
        BlockPlan::from_runs((0..n_chunks).map(|chunk| {
            let len = chunk_len.min(req.seq_len - chunk * chunk_len);
            (len, chunk_owner(req, chunk))
        }))
    }
}

fn chunk_owner(req: &SplitRequest, chunk: usize) -> Owner {
    let phase = (chunk + req.block_idx) % req.cycle.period.max(1);
    if phase < req.cycle.attn { Owner::Attn } else { Owner::Ssm }
}

#[cfg(test)]
mod tests {
    use super::super::request;
    use super::*;
    use crate::{Branch, Cycle};

    #[test]
    fn chunks_rotate_with_the_block() {
        let mut req = request(14, 0, 0);
        (req.chunk_len, req.cycle) = (2, Cycle { attn: 4, period: 7 });
        assert_eq!(CyclicSplit.plan(&req).unwrap().ranges(Branch::Attn), [0..8]);
        req.block_idx = 1;
        assert_eq!(CyclicSplit.plan(&req).unwrap().ranges(Branch::Attn), [0..6, 12..14]);
    }

    #[test]
    fn the_last_chunk_may_be_short() {
        let mut req = request(65, 0, 0);
        req.cycle = Cycle { attn: 1, period: 3 };
        let plan = CyclicSplit.plan(&req).unwrap();
        assert_eq!(plan.ranges(Branch::Attn), [0..64]);
        assert_eq!(plan.ranges(Branch::Ssm), [64..65]);
    }

    #[test]
    fn whole_cycles_go_one_way() {
        let mut req = request(100, 3, 0);
        req.cycle = Cycle { attn: 0, period: 1 };
        assert_eq!(CyclicSplit.plan(&req).unwrap().tokens(Branch::Ssm), 100);
        req.cycle = Cycle { attn: 1, period: 1 };
        assert_eq!(CyclicSplit.plan(&req).unwrap().tokens(Branch::Attn), 100);
    }
}
