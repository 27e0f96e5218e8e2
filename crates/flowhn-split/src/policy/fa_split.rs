//! FLOP-aware split: a fixed window.

use super::{Needs, SplitPolicy, SplitRequest, window_plan};
use crate::balance::Placement;
use crate::plan::BlockPlan;
use crate::{Result, Window};

/// The share of tokens that the script's mode C gives to attention.
const RELEASED_FRAC: f64 = 0.59;

#[derive(Debug)]
pub(super) struct FaSplit;

impl SplitPolicy for FaSplit {
    fn name(&self) -> &'static str {
        "fa_split"
    }

    fn summary(&self) -> &'static str {
        "Attention reads the same window in every block, as long as the balance of costs says."
    }

    fn needs(&self) -> Needs {
        Needs::Tokens
    }

    fn placement(&self, window: Window) -> Placement {
        match window {
            Window::Last => Placement::Last,
            Window::First => Placement::First,
        }
    }

    fn released_frac(&self) -> Option<f64> {
        Some(RELEASED_FRAC)
    }

    /// The released script takes the first `int(0.59 * seq_len)` tokens, whatever the shapes. The
    /// product is in f64: in f32 it differs at lengths 100, 200 and 1200.
    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan> {
        let seq_len = req.seq_len;
        if req.released {
            return window_plan(seq_len, 0, (RELEASED_FRAC * seq_len as f64) as usize);
        }
        let n_attn = req.n_attn.min(seq_len);
        match req.window {
            Window::Last => window_plan(seq_len, seq_len - n_attn, n_attn),
            Window::First => window_plan(seq_len, 0, n_attn),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::request;
    use super::*;
    use crate::Branch;

    #[test]
    fn the_figure_reads_the_last_tokens_in_every_block() {
        for block_idx in 0..3 {
            let plan = FaSplit.plan(&request(6, block_idx, 2)).unwrap();
            assert_eq!(plan.positions(Branch::Attn), [4, 5]);
        }
    }

    #[test]
    fn the_first_window_is_a_choice() {
        let mut req = request(6, 1, 2);
        req.window = Window::First;
        assert_eq!(FaSplit.plan(&req).unwrap().positions(Branch::Attn), [0, 1]);
    }

    #[test]
    fn the_script_multiplies_in_f64() {
        for (seq_len, want) in [(1, 0), (32, 18), (100, 59), (200, 118), (1024, 604), (1200, 708)] {
            let mut req = request(seq_len, 0, 0);
            req.released = true;
            let plan = FaSplit.plan(&req).unwrap();
            assert_eq!(plan.tokens(Branch::Attn), want, "{seq_len}");
            assert_eq!(plan.positions(Branch::Attn), (0..want).collect::<Vec<_>>());
        }
    }

    #[test]
    fn all_or_nothing() {
        assert_eq!(FaSplit.plan(&request(6, 0, 0)).unwrap().tokens(Branch::Ssm), 6);
        assert_eq!(FaSplit.plan(&request(6, 0, 6)).unwrap().tokens(Branch::Attn), 6);
    }
}
