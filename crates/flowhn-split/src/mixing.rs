//! How far information travels: which earlier tokens a later one can have heard of.
//!
//! In a block, a token learns of the earlier tokens that its branch reads, and of all that those
//! had learned in the blocks before. With a fixed split the two segments never meet, however deep
//! the model; a pattern that rotates connects every pair after a few blocks.

use crate::plan::{BlockPlan, Branch, Owner};
use crate::{Bridge, Result};

/// More pieces than this are not analysed: the work grows with their square.
const MAX_CELLS: usize = 4096;

/// The share of pairs of a token and an earlier one, or itself, that are connected after each
/// block. `bridges[i]` says what attention sees in block `i`. `None` when the plans cut the
/// sequence into more than 4096 pieces, or `blocks` and `bridges` differ in length.
///
/// ```
/// use flowhn_split::{BlockPlan, Bridge, Owner, mixing};
///
/// // The published figure: of six tokens attention reads 5 6, then 3 4, then 1 2.
/// let block = |start| {
///     BlockPlan::from_runs([(start, Owner::Ssm), (2, Owner::Attn), (4 - start, Owner::Ssm)])
/// };
/// let plans = [block(4)?, block(2)?, block(0)?];
/// let shares = mixing::connected_pairs(&plans, &[Bridge::None; 3]).unwrap();
/// assert_eq!(shares[2], 1.0);
/// # Ok::<(), flowhn_split::Error>(())
/// ```
pub fn connected_pairs(blocks: &[BlockPlan], bridges: &[Bridge]) -> Option<Vec<f64>> {
    let lens = cell_lens(blocks);
    if lens.len() > MAX_CELLS || blocks.len() != bridges.len() {
        return None;
    }
    Some(spread(blocks, bridges, &lens))
}

/// The same for as long a prefix as has few enough pieces.
pub(crate) fn connected_prefix(blocks: &[BlockPlan], bridges: &[Bridge]) -> Vec<f64> {
    let mut lens = cell_lens(blocks);
    lens.truncate(MAX_CELLS / 4);
    let prefix = 0..lens.iter().sum();
    let cut: Result<Vec<BlockPlan>> = blocks.iter().map(|block| block.slice(prefix.clone())).collect();
    cut.map(|blocks| spread(&blocks, bridges, &lens)).unwrap_or_default()
}

/// The longest pieces that no block divides. The tokens of a piece share a branch in every block,
/// so a piece as a whole hears of another or does not.
fn cell_lens(blocks: &[BlockPlan]) -> Vec<usize> {
    let mut ends: Vec<usize> = blocks.iter().flat_map(|block| block.spans().iter().map(|span| span.end())).collect();
    ends.sort_unstable();
    ends.dedup();
    let starts = std::iter::once(0).chain(ends.iter().copied());
    ends.iter().zip(starts).map(|(end, start)| end - start).collect()
}

fn spread(blocks: &[BlockPlan], bridges: &[Bridge], lens: &[usize]) -> Vec<f64> {
    let n_words = lens.len().div_ceil(64);
    // heard[c] is the set of pieces that piece c knows of.
    let mut heard: Vec<Vec<u64>> = (0..lens.len())
        .map(|cell| {
            let mut set = vec![0; n_words];
            set[cell / 64] |= 1 << (cell % 64);
            set
        })
        .collect();
    // One block is enough for the tokens of a piece to know one another.
    let within = lens.iter().map(|&len| pairs_within(len)).sum();
    let step = |(block, bridge): (&BlockPlan, &Bridge)| {
        hear(block, *bridge, lens, n_words, &mut heard);
        share(&heard, lens, within)
    };
    blocks.iter().zip(bridges).map(step).collect()
}

fn hear(block: &BlockPlan, bridge: Bridge, lens: &[usize], n_words: usize, heard: &mut [Vec<u64>]) {
    // What the tokens so far of each branch know together, and what all tokens so far know.
    let mut by_branch = [vec![0; n_words], vec![0; n_words]];
    let mut by_all = vec![0; n_words];
    let mut start = 0;
    for (cell, len) in lens.iter().enumerate() {
        let owner = block.owner(start).unwrap_or(Owner::Both);
        join(&mut by_all, &heard[cell]);
        let before = heard[cell].clone();
        for (branch, known) in Branch::ALL.into_iter().zip(&mut by_branch) {
            if !owner.includes(branch) {
                continue;
            }
            join(known, &before);
            let bridged = branch == Branch::Attn && bridge == Bridge::Kv;
            join(&mut heard[cell], if bridged { &by_all } else { known });
        }
        start += len;
    }
}

fn join(set: &mut [u64], other: &[u64]) {
    for (word, other) in set.iter_mut().zip(other) {
        *word |= other;
    }
}

fn pairs_within(len: usize) -> u128 {
    (len as u128) * (len as u128 + 1) / 2
}

fn share(heard: &[Vec<u64>], lens: &[usize], within: u128) -> f64 {
    let mut connected = within;
    for (cell, set) in heard.iter().enumerate() {
        let known = (0..cell).filter(|earlier| set[earlier / 64] >> (earlier % 64) & 1 == 1);
        let tokens: usize = known.map(|earlier| lens[earlier]).sum();
        connected += (tokens as u128) * (lens[cell] as u128);
    }
    connected as f64 / pairs_within(lens.iter().sum()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cycle;
    use crate::policy::{Policy, request};

    fn shares(name: &str, seq_len: usize, n_attn: usize, n_blocks: usize) -> Vec<f64> {
        let policy = Policy::named(name).unwrap();
        let plans: Vec<_> =
            (0..n_blocks).map(|block_idx| policy.plan(&request(seq_len, block_idx, n_attn)).unwrap()).collect();
        connected_pairs(&plans, &vec![Bridge::None; n_blocks]).unwrap()
    }

    fn percent(shares: &[f64]) -> Vec<i64> {
        shares.iter().map(|share| (100.0 * share).round() as i64).collect()
    }

    /// Token by token, as the definition says.
    fn by_token(plans: &[BlockPlan], bridge: Bridge) -> Vec<f64> {
        let seq_len = plans[0].seq_len();
        let mut heard: Vec<Vec<bool>> = (0..seq_len).map(|t| (0..seq_len).map(|s| s == t).collect()).collect();
        let mut shares = Vec::new();
        for plan in plans {
            let before = heard.clone();
            for (to, knows) in heard.iter_mut().enumerate() {
                for (from, told) in before.iter().enumerate().take(to) {
                    let together = Branch::ALL.into_iter().any(|branch| {
                        let reads = |pos| plan.owner(pos).unwrap().includes(branch);
                        let bridged = branch == Branch::Attn && bridge == Bridge::Kv;
                        reads(to) && (reads(from) || bridged)
                    });
                    for (knows, told) in knows.iter_mut().zip(told) {
                        *knows |= together && *told;
                    }
                }
            }
            let known = heard.iter().flatten().filter(|&&known| known).count();
            shares.push(known as f64 / pairs_within(seq_len) as f64);
        }
        shares
    }

    #[test]
    fn pieces_say_what_tokens_say() {
        for policy in Policy::all() {
            for (seq_len, n_attn) in [(1, 1), (7, 3), (24, 9), (24, 12), (30, 10)] {
                let plans: Vec<_> = (0..5)
                    .map(|block_idx| {
                        let mut req = request(seq_len, block_idx, n_attn);
                        req.chunk_len = 3;
                        policy.plan(&req).unwrap()
                    })
                    .collect();
                for bridge in [Bridge::None, Bridge::Kv] {
                    let got = connected_pairs(&plans, &[bridge; 5]).unwrap();
                    let want = by_token(&plans, bridge);
                    for (got, want) in got.iter().zip(&want) {
                        assert!((got - want).abs() < 1e-12, "{policy} {seq_len} {bridge:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn three_windows_connect_everything() {
        assert_eq!(percent(&shares("fac_split", 1200, 400, 3)), [56, 78, 100]);
    }

    #[test]
    fn rotating_chunks_connect_everything() {
        let plans = shares("cyclic_split", 1024, 0, 3);
        assert_eq!(percent(&plans)[1..], [98, 100]);
        assert_eq!(plans[2], 1.0);
    }

    #[test]
    fn fixed_sets_never_meet() {
        assert_eq!(percent(&shares("ae_split", 1000, 0, 20))[19], 50);
        assert_eq!(percent(&shares("fac_split", 1000, 500, 20))[19], 50);
        let fixed = shares("fa_split", 1000, 590, 20);
        assert_eq!(fixed[0], fixed[19]);
    }

    #[test]
    fn too_many_pieces_are_declined() {
        let mut req = request(10_000, 0, 0);
        (req.chunk_len, req.cycle) = (1, Cycle { attn: 1, period: 2 });
        let plan = Policy::named("cyclic_split").unwrap().plan(&req).unwrap();
        assert_eq!(connected_pairs(std::slice::from_ref(&plan), &[Bridge::None]), None);
        assert_eq!(connected_prefix(&[plan], &[Bridge::None]).len(), 1);
    }
}
