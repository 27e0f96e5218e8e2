//! The report as text.

use std::fmt;

use super::{BlockReport, KindFlops, PlanReport};
use crate::plan::{Owner, Span};

/// Columns of a block's picture.
const WIDTH: usize = 64;

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let per_token = &self.flops_per_token;
        writeln!(
            f,
            "{} tokens (split solved for {}), {} blocks, {} parameters",
            self.seq_len,
            self.training_seq_len,
            self.blocks.len(),
            Count(self.parameters),
        )?;
        writeln!(
            f,
            "FLOPs/token: forward {}, backward {}; head {} a sequence",
            Count(per_token.forward.mean() as u64),
            Count(per_token.backward.mean() as u64),
            Count(self.head),
        )?;
        writeln!(
            f,
            "A attention, s SSM, # both; FLOPs and bytes of one sequence, forward, bytes in {:?}",
            self.element
        )?;
        for (idx, block) in self.blocks.iter().enumerate() {
            writeln!(f)?;
            write_block(f, idx, block, self.seq_len)?;
        }
        for warning in &self.warnings {
            writeln!(f, "\nwarning: {warning}")?;
        }
        Ok(())
    }
}

fn write_block(f: &mut fmt::Formatter, idx: usize, block: &BlockReport, seq_len: usize) -> fmt::Result {
    write!(f, "block {idx}  {}", block.policy)?;
    if let Some(cycle) = block.cycle {
        write!(f, " {}/{}", cycle.attn, cycle.period)?;
    }
    writeln!(f, "  [{}]", picture(&block.spans, seq_len))?;
    writeln!(
        f,
        "  {:<5} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "tokens", "matmul", "scores", "conv", "scan", "total", "params", "bytes"
    )?;
    let (params, bytes) = (&block.parameters, &block.bytes);
    write_branch(f, "attn", block.attn_tokens, &block.flops.attn, params.attn, bytes.attn)?;
    write_branch(f, "ssm", block.ssm_tokens, &block.flops.ssm, params.ssm, bytes.ssm)?;
    let flops = &block.flops;
    let parts = [("fuse", flops.fuse.total, params.fuse, bytes.fuse), ("mlp", flops.mlp.total, params.mlp, bytes.mlp)];
    for (name, total, params, bytes) in parts {
        // A block whose branches have the MLPs has no shared one to speak of.
        if params == 0 && bytes == 0 {
            continue;
        }
        let (total, params, bytes) = (Count(total), Count(params), Count(bytes));
        writeln!(
            f,
            "  {name:<5} {seq_len:>8} {total:>9} {:>9} {:>9} {:>9} {total:>9} {params:>9} {bytes:>9}",
            "", "", ""
        )?;
    }
    write!(f, "  attention reads {:.1} %", 100.0 * block.attn_frac)?;
    if let Some(imbalance) = block.imbalance {
        write!(f, "; imbalance {:.1} %", 100.0 * imbalance)?;
    }
    if let Some(share) = block.connected_pairs {
        write!(f, "; {:.1} % of causal pairs connected", 100.0 * share)?;
    }
    writeln!(f)
}

fn write_branch(
    f: &mut fmt::Formatter,
    name: &str,
    tokens: usize,
    flops: &KindFlops,
    params: u64,
    bytes: u64,
) -> fmt::Result {
    let kinds = &flops.kinds;
    write!(f, "  {name:<5} {tokens:>8}")?;
    for count in [kinds.matmul, kinds.scores, kinds.conv, kinds.scan, flops.total, params, bytes] {
        write!(f, " {:>9}", Count(count))?;
    }
    writeln!(f)
}

/// A bar of at most [`WIDTH`] columns; a column shows the owner of the token in its middle.
fn picture(spans: &[Span], seq_len: usize) -> String {
    let width = WIDTH.min(seq_len);
    let column = |col: usize| {
        let pos = (2 * col + 1) * seq_len / (2 * width);
        match spans.iter().find(|span| span.end() > pos).map(|span| span.branch) {
            Some(Owner::Attn) => 'A',
            Some(Owner::Ssm) => 's',
            Some(Owner::Both) => '#',
            None => ' ',
        }
    };
    (0..width).map(column).collect()
}

/// A count with three or four figures and a decimal prefix.
struct Count(u64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut prefix = "";
        for next in ["k", "M", "G", "T", "P", "E"] {
            if value < 999.95 {
                break;
            }
            value /= 1000.0;
            prefix = next;
        }
        let text = if prefix.is_empty() { self.0.to_string() } else { format!("{value:.1}{prefix}") };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockPlan;

    #[test]
    fn counts_have_prefixes() {
        let text = |count| Count(count).to_string();
        assert_eq!(text(0), "0");
        assert_eq!(text(999), "999");
        assert_eq!(text(1_500), "1.5k");
        assert_eq!(text(999_999), "1.0M");
        assert_eq!(text(134_217_728), "134.2M");
    }

    #[test]
    fn a_picture_has_a_column_for_each_token_until_it_is_full() {
        let plan = BlockPlan::from_runs([(1, Owner::Ssm), (2, Owner::Attn)]).unwrap();
        assert_eq!(picture(plan.spans(), 3), "sAA");
        let plan = BlockPlan::from_runs([(448, Owner::Ssm), (576, Owner::Attn)]).unwrap();
        let want = "s".repeat(28) + &"A".repeat(36);
        assert_eq!(picture(plan.spans(), 1024), want);
    }
}
