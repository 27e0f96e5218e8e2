//! How many tokens attention must read for both branches to cost the same.
//!
//! The costs are those of the whole branches. Attention's grows with the square of its tokens, so
//! the balance moves with the length.

use crate::cost::{bridged_pairs, own_pairs};
use crate::shape::product;
use crate::{BlockShape, Bridge, Flops, ScoreCount};

/// Where attention's tokens lie. It matters to a bridge alone, whose queries see every earlier
/// position: late windows see more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Placement {
    /// At the start.
    First,
    /// At the end.
    Last,
    /// Anywhere in the course of the blocks; the mean over all places counts.
    Spread,
}

/// The two costs between which to balance, for one block and length.
///
/// ```
/// # use flowhn_split::*;
/// use flowhn_split::balance::{Balance, Placement};
///
/// // The shapes of the released 135M model.
/// let block = BlockShape {
///     d_model: 768,
///     attn: AttnShape { n_heads: 32, n_kv_heads: 8, d_head: 24, bridge: Bridge::None },
///     ssm: SsmShape::Mamba1 { d_inner: 1536, d_state: 16, d_conv: 4, dt_rank: 48, inner_norms: true },
///     mlp: MlpShape { d_ff: 2048 },
///     form: BlockForm::Released,
///     options: BlockOptions::default(),
/// };
/// let balance = Balance::new(&block, 1024, Placement::Last, ScoreCount::Causal);
/// assert_eq!(balance.solve(), 576);
/// assert_eq!(balance.solve_tiled(64), 576);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Balance<'a> {
    block: &'a BlockShape,
    seq_len: usize,
    placement: Placement,
    count: ScoreCount,
}

impl<'a> Balance<'a> {
    /// Poses the balance for `seq_len` tokens.
    pub fn new(block: &'a BlockShape, seq_len: usize, placement: Placement, count: ScoreCount) -> Self {
        Self { block, seq_len, placement, count }
    }

    /// The cost of attention over `n_attn` tokens: zero for none, and rising.
    pub fn attn(&self, n_attn: usize) -> Flops {
        let seq_len = self.seq_len;
        let twice_pairs = match (self.block.attn.bridge, self.placement) {
            (Bridge::None, _) => own_pairs(n_attn, self.count),
            (Bridge::Kv, Placement::First) => bridged_pairs(n_attn, n_attn, seq_len, self.count),
            (Bridge::Kv, Placement::Last) => bridged_pairs(seq_len, n_attn, seq_len, self.count),
            (Bridge::Kv, Placement::Spread) => match self.count {
                ScoreCount::Causal => product(&[n_attn, seq_len + 1]),
                ScoreCount::Full => product(&[2, n_attn, seq_len]),
            },
        };
        self.block.attn_flops(n_attn, seq_len, twice_pairs)
    }

    /// The cost of the SSM over `n_ssm` tokens: zero for none, and rising.
    pub fn ssm(&self, n_ssm: usize) -> Flops {
        self.block.ssm_flops(n_ssm)
    }

    /// `cost_attn(n) - cost_ssm(seq_len - n)`, which rises with `n`.
    ///
    /// # Panics
    /// For more than `seq_len` tokens.
    pub fn difference(&self, n_attn: usize) -> i128 {
        let attn = i128::from(self.attn(n_attn).total());
        attn - i128::from(self.ssm(self.seq_len - n_attn).total())
    }

    /// The number of attention tokens, in `0..=seq_len`, with the least difference of costs; of
    /// two with the same the smaller.
    pub fn solve(&self) -> usize {
        self.best(1, 0, self.seq_len)
    }

    /// The same among the multiples of `tile` that leave each branch a tile, where the length
    /// holds two tiles; below that [`solve`](Self::solve).
    pub fn solve_tiled(&self, tile: usize) -> usize {
        let tile = tile.max(1);
        match self.seq_len / tile {
            0 | 1 => self.solve(),
            _ => self.best(tile, 1, (self.seq_len - tile) / tile),
        }
    }

    /// The best `step * k` with `k` in `low..=high`, by bisection: the difference is monotone.
    fn best(&self, step: usize, low: usize, high: usize) -> usize {
        let (mut below, mut above) = (low, high);
        while below < above {
            let middle = below + (above - below) / 2;
            if self.difference(step * middle) >= 0 {
                above = middle;
            } else {
                below = middle + 1;
            }
        }
        // `above` is the first without a deficit, or the last there is; its neighbour may be nearer.
        let previous = above.saturating_sub(1).max(low);
        let miss = |k: usize| self.difference(step * k).abs();
        step * if miss(previous) <= miss(above) { previous } else { above }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::{mamba2, released_135m};

    #[test]
    fn the_released_shapes_at_1024() {
        let block = released_135m();
        let solve = |count| Balance::new(&block, 1024, Placement::Last, count).solve();
        assert_eq!(solve(ScoreCount::Causal), 576);
        assert_eq!(solve(ScoreCount::Full), 561);
    }

    #[test]
    fn short_lengths_have_no_tiles() {
        let block = released_135m();
        for seq_len in 1..128 {
            let balance = Balance::new(&block, seq_len, Placement::Last, ScoreCount::Causal);
            assert_eq!(balance.solve_tiled(64), balance.solve(), "{seq_len}");
            assert!(balance.solve() <= seq_len);
        }
    }

    #[test]
    fn both_branches_keep_a_tile() {
        // An SSM this narrow would take nearly every token.
        let mut block = released_135m();
        block.ssm = mamba2(64);
        block.mlp.d_ff = 0;
        let balance = Balance::new(&block, 130, Placement::Last, ScoreCount::Causal);
        assert_eq!(balance.solve_tiled(64), 64);
        // And attention with one head of one would, too.
        block.ssm = mamba2(1 << 14);
        block.attn.n_heads = 1;
        block.attn.n_kv_heads = 1;
        block.attn.d_head = 1;
        let balance = Balance::new(&block, 200, Placement::Last, ScoreCount::Causal);
        assert_eq!(balance.solve_tiled(64), 128);
    }

    #[test]
    fn a_bridge_takes_tokens_from_attention() {
        let mut block = released_135m();
        let without = Balance::new(&block, 1024, Placement::Spread, ScoreCount::Causal).solve();
        block.attn.bridge = Bridge::Kv;
        let solve = |place| Balance::new(&block, 1024, place, ScoreCount::Causal).solve();
        let (first, spread) = (solve(Placement::First), solve(Placement::Spread));
        assert!(first < without);
        assert!(spread < first);
        assert!(solve(Placement::Last) < spread);
    }
}
