//! FLOP-aware circulating split: a window that moves from block to block.

use super::{Needs, SplitPolicy, SplitRequest, window_plan};
use crate::plan::BlockPlan;
use crate::{Result, Window};

#[derive(Debug)]
pub(super) struct FacSplit;

impl SplitPolicy for FacSplit {
    fn name(&self) -> &'static str {
        "fac_split"
    }

    fn summary(&self) -> &'static str {
        "Attention's window, as long as the balance of costs says, moves by its length in each \
         block and wraps."
    }

    fn needs(&self) -> Needs {
        Needs::Tokens
    }

    fn released_frac(&self) -> Option<f64> {
        Some(0.5)
    }

    /// In block `i` the window starts at `(l - (i + 1) n) mod l`, or at `i n mod l` when it begins
    /// with the first tokens. The released script swaps halves instead: attention reads
    /// `floor(l / 2)` tokens, the last ones in even blocks and the first ones in odd blocks.
    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan> {
        let seq_len = req.seq_len;
        if seq_len == 0 {
            return window_plan(0, 0, 0);
        }
        if req.released {
            let half = seq_len / 2;
            let start = if req.block_idx.is_multiple_of(2) { seq_len - half } else { 0 };
            return window_plan(seq_len, start, half);
        }
        let n_attn = req.n_attn.min(seq_len);
        let moved = req.block_idx * n_attn % seq_len;
        let start = match req.window {
            Window::Last => (2 * seq_len - moved - n_attn) % seq_len,
            Window::First => moved,
        };
        window_plan(seq_len, start, n_attn)
    }
}

#[cfg(test)]
mod tests {
    use super::super::request;
    use super::*;
    use crate::Branch;

    fn attn(seq_len: usize, n_attn: usize, block_idx: usize) -> Vec<usize> {
        FacSplit.plan(&request(seq_len, block_idx, n_attn)).unwrap().positions(Branch::Attn)
    }

    #[test]
    fn the_figure_of_six_tokens() {
        assert_eq!(attn(6, 2, 0), [4, 5]);
        assert_eq!(attn(6, 2, 1), [2, 3]);
        assert_eq!(attn(6, 2, 2), [0, 1]);
        assert_eq!(attn(6, 2, 3), [4, 5]);
    }

    #[test]
    fn the_window_follows_the_formula() {
        for seq_len in 1..20 {
            for n_attn in 0..=seq_len {
                for block_idx in 0..25 {
                    let moved = (block_idx + 1) * n_attn;
                    let start = (seq_len * 30 - moved) % seq_len;
                    let mut want: Vec<_> = (0..n_attn).map(|j| (start + j) % seq_len).collect();
                    want.sort_unstable();
                    assert_eq!(attn(seq_len, n_attn, block_idx), want);
                }
            }
        }
    }

    #[test]
    fn a_wrapped_window_has_two_pieces() {
        let plan = FacSplit.plan(&request(1024, 1, 576)).unwrap();
        assert_eq!(plan.ranges(Branch::Attn), [0..448, 896..1024]);
        assert_eq!(plan.ranges(Branch::Ssm), [448..896]);
    }

    #[test]
    fn windows_from_the_first_token_move_forward() {
        let mut req = request(6, 1, 2);
        req.window = Window::First;
        assert_eq!(FacSplit.plan(&req).unwrap().positions(Branch::Attn), [2, 3]);
    }

    #[test]
    fn the_script_swaps_floored_halves() {
        for (seq_len, block_idx, want) in [(7, 0, 4..7), (7, 1, 0..3), (8, 2, 4..8), (8, 3, 0..4)] {
            let mut req = request(seq_len, block_idx, 2);
            req.released = true;
            let plan = FacSplit.plan(&req).unwrap();
            assert_eq!(plan.ranges(Branch::Attn), [want]);
        }
    }
}
