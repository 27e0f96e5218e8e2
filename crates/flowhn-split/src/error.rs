//! What can be wrong with a split, each with the thing at fault and the remedy.

use std::ops::Range;

/// The result of an operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A plan, policy, setting or shape that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A plan for no tokens.
    #[error("seq_len is 0: a plan needs at least one token")]
    EmptySequence,
    /// Spans that do not cover a sequence exactly once, in order.
    #[error("spans do not cover 0..{seq_len}: position {got} where {want} was expected")]
    Spans {
        /// The length to cover.
        seq_len: usize,
        /// Where a span had to start, or the last one to end.
        want: usize,
        /// Where it did.
        got: usize,
    },
    /// A range that is empty or reaches past the plan.
    #[error("range {start}..{end} is empty or outside 0..{seq_len}", start = range.start, end = range.end)]
    Range {
        /// The range asked for.
        range: Range<usize>,
        /// The length of the plan.
        seq_len: usize,
    },
    /// No policy has this name.
    #[error("unknown split policy {name:?}: did you mean {nearest:?}? (valid: {valid})")]
    UnknownPolicy {
        /// The name asked for.
        name: String,
        /// The valid name nearest to it.
        nearest: &'static str,
        /// All valid names.
        valid: String,
    },
    /// A list of policies that does not fit the number of blocks.
    #[error("{got} block policies for {n_layers} blocks: {remedy}")]
    BlockCount {
        /// Number of policies given.
        got: usize,
        /// Number of blocks.
        n_layers: usize,
        /// What to change.
        remedy: &'static str,
    },
    /// A fraction of attention tokens outside `0..=1`.
    #[error("attn_frac is {0}: it must be a number in 0..=1, or \"flops\"")]
    AttnFrac(f64),
    /// `attn_frac = "measured"`, which has nothing to go by.
    #[error(
        "attn_frac = \"measured\" needs a calibration of this machine, and there is none: \
         use attn_frac = \"flops\" or a number in 0..=1"
    )]
    Measured,
    /// A fraction that contradicts the constant of the released script.
    #[error(
        "attn_frac is {got}, but {policy} with released = true always gives attention int({want} * seq_len) \
         tokens: drop attn_frac or released"
    )]
    ReleasedFrac {
        /// The policy's name.
        policy: &'static str,
        /// The fraction that was asked for.
        got: f64,
        /// That of the script.
        want: f64,
    },
    /// `released = true` for a policy that the script does not have.
    #[error("{policy} has no released form: drop released = true")]
    ReleasedForm {
        /// The policy's name.
        policy: &'static str,
    },
    /// A setting that must be at least one.
    #[error("{0} is 0: it must be at least 1")]
    Zero(&'static str),
    /// A cycle whose attention share is more than the whole.
    #[error("cycle has attn = {attn}, period = {period}: it needs period >= 1 and attn <= period")]
    Cycle {
        /// Chunks for attention in a period.
        attn: usize,
        /// Chunks in a period.
        period: usize,
    },
    /// A shape that does not fit together.
    #[error("{name} is {got}: {want}")]
    Shape {
        /// The size at fault, as the config spells it.
        name: &'static str,
        /// Its value.
        got: usize,
        /// What it must be.
        want: String,
    },
}
