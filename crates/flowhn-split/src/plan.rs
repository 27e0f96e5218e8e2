//! Split plans: per block, which tokens go to which branch.
//!
//! A plan is a sorted list of spans, not one boundary: a circulating window wraps, and a cyclic
//! pattern has many pieces.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One of the two branches of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Branch {
    /// Causal attention.
    Attn,
    /// The state-space mixer.
    Ssm,
}

impl Branch {
    /// Both branches.
    pub const ALL: [Branch; 2] = [Branch::Attn, Branch::Ssm];

    /// The branch's name: `attn` or `ssm`.
    pub fn name(self) -> &'static str {
        match self {
            Branch::Attn => "attn",
            Branch::Ssm => "ssm",
        }
    }
}

/// Who reads a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// Attention alone.
    Attn,
    /// The state-space mixer alone.
    Ssm,
    /// Both, as in `no_split`.
    Both,
}

impl Owner {
    /// Whether `branch` reads the token.
    pub fn includes(self, branch: Branch) -> bool {
        match self {
            Owner::Both => true,
            Owner::Attn => branch == Branch::Attn,
            Owner::Ssm => branch == Branch::Ssm,
        }
    }

    /// The owner's name: `attn`, `ssm` or `both`.
    pub fn name(self) -> &'static str {
        match self {
            Owner::Attn => "attn",
            Owner::Ssm => "ssm",
            Owner::Both => "both",
        }
    }
}

impl From<Branch> for Owner {
    fn from(branch: Branch) -> Self {
        match branch {
            Branch::Attn => Owner::Attn,
            Branch::Ssm => Owner::Ssm,
        }
    }
}

/// A run of neighbouring tokens with one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// Position of the first token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Who reads them.
    pub branch: Owner,
}

impl Span {
    /// One past the last position.
    pub fn end(&self) -> usize {
        self.start + self.len
    }

    /// The positions as a range.
    pub fn range(&self) -> Range<usize> {
        self.start..self.end()
    }
}

/// The spans of one block.
///
/// They are sorted, cover `0..seq_len` exactly, are never empty, and neighbours have different
/// owners, so that two plans which route alike are equal.
///
/// ```
/// use flowhn_split::{BlockPlan, Branch, Owner};
///
/// // Attention reads two tokens in the middle; the SSM scans the two pieces around them as one.
/// let plan = BlockPlan::from_runs([(2, Owner::Ssm), (2, Owner::Attn), (1, Owner::Ssm)])?;
/// assert_eq!(plan.seq_len(), 5);
/// assert_eq!(plan.ranges(Branch::Ssm), [0..2, 4..5]);
/// assert_eq!(plan.positions(Branch::Attn), [2, 3]);
/// # Ok::<(), flowhn_split::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<Span>", into = "Vec<Span>")]
pub struct BlockPlan {
    spans: Vec<Span>,
}

impl BlockPlan {
    /// Builds a plan from `(len, owner)` runs, in order from position 0. Empty runs vanish and
    /// neighbours of one owner merge.
    ///
    /// # Errors
    /// [`Error::EmptySequence`] when the runs hold no token.
    pub fn from_runs(runs: impl IntoIterator<Item = (usize, Owner)>) -> Result<Self> {
        let mut spans: Vec<Span> = Vec::new();
        let mut start = 0;
        for (len, branch) in runs {
            match spans.last_mut() {
                _ if len == 0 => {}
                Some(last) if last.branch == branch => last.len += len,
                _ => spans.push(Span { start, len, branch }),
            }
            start += len;
        }
        if spans.is_empty() {
            return Err(Error::EmptySequence);
        }
        Ok(Self { spans })
    }

    /// Builds a plan from spans that are sorted and cover `0..seq_len`.
    ///
    /// # Errors
    /// [`Error::Spans`] where a span does not start at the end of the one before it, or the last
    /// does not end at `seq_len`; [`Error::EmptySequence`] for a `seq_len` of 0.
    pub fn from_spans(seq_len: usize, spans: &[Span]) -> Result<Self> {
        let mut end = 0;
        for span in spans {
            if span.start != end {
                return Err(Error::Spans { seq_len, want: end, got: span.start });
            }
            end = span.end();
        }
        if end != seq_len {
            return Err(Error::Spans { seq_len, want: seq_len, got: end });
        }
        Self::from_runs(spans.iter().map(|span| (span.len, span.branch)))
    }

    /// A plan with one owner for every token.
    ///
    /// # Errors
    /// [`Error::EmptySequence`] for a `seq_len` of 0.
    pub fn uniform(seq_len: usize, owner: Owner) -> Result<Self> {
        Self::from_runs([(seq_len, owner)])
    }

    /// The number of tokens, at least 1.
    pub fn seq_len(&self) -> usize {
        self.spans.last().map_or(0, Span::end)
    }

    /// The spans, sorted.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The number of tokens that `branch` reads.
    pub fn tokens(&self, branch: Branch) -> usize {
        self.owned(branch).map(|span| span.len).sum()
    }

    /// The pieces that `branch` reads, sorted and never adjacent.
    pub fn ranges(&self, branch: Branch) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for span in self.owned(branch) {
            match ranges.last_mut() {
                Some(last) if last.end == span.start => last.end = span.end(),
                _ => ranges.push(span.range()),
            }
        }
        ranges
    }

    /// The positions that `branch` reads, in causal order.
    pub fn positions(&self, branch: Branch) -> Vec<usize> {
        self.owned(branch).flat_map(|span| span.range()).collect()
    }

    /// Who reads position `pos`; `None` past the end.
    pub fn owner(&self, pos: usize) -> Option<Owner> {
        let idx = self.spans.partition_point(|span| span.end() <= pos);
        self.spans.get(idx).map(|span| span.branch)
    }

    /// The plan of the tokens in `range`, re-based so that `range.start` becomes position 0.
    ///
    /// # Errors
    /// [`Error::Range`] when the range is empty or reaches past the plan.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        if range.start >= range.end || range.end > self.seq_len() {
            return Err(Error::Range { range, seq_len: self.seq_len() });
        }
        Self::from_runs(self.clipped(range))
    }

    /// The runs within `range`, whose parts outside the plan count nothing.
    pub(crate) fn clipped(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Owner)> {
        let first = self.spans.partition_point(|span| span.end() <= range.start);
        self.spans[first..]
            .iter()
            .take_while(move |span| span.start < range.end)
            .map(move |span| (span.end().min(range.end) - span.start.max(range.start), span.branch))
    }

    fn owned(&self, branch: Branch) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(move |span| span.branch.includes(branch))
    }
}

impl TryFrom<Vec<Span>> for BlockPlan {
    type Error = Error;

    fn try_from(spans: Vec<Span>) -> Result<Self> {
        Self::from_spans(spans.last().map_or(0, Span::end), &spans)
    }
}

impl From<BlockPlan> for Vec<Span> {
    fn from(plan: BlockPlan) -> Self {
        plan.spans
    }
}

/// The plans of all blocks of a model, for one length.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct SplitPlan {
    seq_len: usize,
    blocks: Vec<BlockPlan>,
}

impl SplitPlan {
    /// Joins the plans of the blocks, in order.
    ///
    /// # Errors
    /// [`Error::EmptySequence`] for no blocks, [`Error::Spans`] when their lengths differ.
    pub fn new(blocks: Vec<BlockPlan>) -> Result<Self> {
        let seq_len = blocks.first().ok_or(Error::EmptySequence)?.seq_len();
        match blocks.iter().find(|block| block.seq_len() != seq_len) {
            Some(block) => Err(Error::Spans { seq_len, want: seq_len, got: block.seq_len() }),
            None => Ok(Self { seq_len, blocks }),
        }
    }

    /// The number of tokens.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The blocks' plans.
    pub fn blocks(&self) -> &[BlockPlan] {
        &self.blocks
    }

    /// The plan of the tokens in `range`, re-based to 0: what a decoder that has seen
    /// `range.start` tokens needs for the next `range.len()`.
    ///
    /// # Errors
    /// [`Error::Range`] when the range is empty or reaches past the plan.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        let blocks = self.blocks.iter().map(|block| block.slice(range.clone()));
        Self::new(blocks.collect::<Result<_>>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> BlockPlan {
        BlockPlan::from_runs([
            (0, Owner::Both),
            (2, Owner::Ssm),
            (1, Owner::Ssm),
            (0, Owner::Attn),
            (1, Owner::Ssm),
            (4, Owner::Attn),
        ])
        .unwrap()
    }

    #[test]
    fn neighbours_merge_and_empty_runs_vanish() {
        let spans = plan().spans().to_vec();
        assert_eq!(
            spans,
            [Span { start: 0, len: 4, branch: Owner::Ssm }, Span { start: 4, len: 4, branch: Owner::Attn },]
        );
    }

    #[test]
    fn empty_plans_are_refused() {
        assert_eq!(BlockPlan::uniform(0, Owner::Attn), Err(Error::EmptySequence));
        assert_eq!(BlockPlan::from_spans(0, &[]), Err(Error::EmptySequence));
        assert_eq!(SplitPlan::new(vec![]), Err(Error::EmptySequence));
    }

    #[test]
    fn gaps_and_overlaps_are_refused() {
        let span = |start, len| Span { start, len, branch: Owner::Attn };
        let gap = BlockPlan::from_spans(4, &[span(0, 1), span(2, 2)]);
        assert_eq!(gap, Err(Error::Spans { seq_len: 4, want: 1, got: 2 }));
        let short = BlockPlan::from_spans(4, &[span(0, 3)]);
        assert_eq!(short, Err(Error::Spans { seq_len: 4, want: 4, got: 3 }));
    }

    #[test]
    fn slices_are_rebased() {
        let slice = plan().slice(3..6).unwrap();
        assert_eq!(slice.positions(Branch::Ssm), [0]);
        assert_eq!(slice.positions(Branch::Attn), [1, 2]);
        assert!(plan().slice(3..3).is_err());
        assert!(plan().slice(3..9).is_err());
    }

    #[test]
    fn owner_ends_with_the_plan() {
        assert_eq!(plan().owner(3), Some(Owner::Ssm));
        assert_eq!(plan().owner(4), Some(Owner::Attn));
        assert_eq!(plan().owner(8), None);
    }

    #[test]
    fn json_round_trip_checks_coverage() {
        let json = serde_json::to_string(&plan()).unwrap();
        assert_eq!(serde_json::from_str::<BlockPlan>(&json).unwrap(), plan());
        let hole = r#"[{"start": 1, "len": 2, "branch": "attn"}]"#;
        assert!(serde_json::from_str::<BlockPlan>(hole).is_err());
    }
}
