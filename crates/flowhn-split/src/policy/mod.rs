//! Split policies: rules that say, per block, who reads which token.
//!
//! A policy is one file here and one entry in [`POLICIES`]; configs, help texts and tests read
//! that table.

mod ae_split;
mod attn_all;
mod cyclic_split;
mod fa_split;
mod fac_split;
mod no_split;
mod ssm_all;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::balance::Placement;
use crate::plan::{BlockPlan, Branch, Owner};
use crate::{AttnFrac, Cycle, Error, Result, SplitSettings, Window};

/// Every policy, in the order in which help texts list them.
pub static POLICIES: [&dyn SplitPolicy; 7] = [
    &no_split::NoSplit,
    &ae_split::AeSplit,
    &fa_split::FaSplit,
    &fac_split::FacSplit,
    &cyclic_split::CyclicSplit,
    &attn_all::AttnAll,
    &ssm_all::SsmAll,
];

/// A rule that says who reads which token of a block.
pub trait SplitPolicy: fmt::Debug + Sync {
    /// The name in configs, `snake_case`.
    fn name(&self) -> &'static str;

    /// One sentence for help texts.
    fn summary(&self) -> &'static str;

    /// How the branches share the tokens.
    fn sharing(&self) -> Sharing {
        Sharing::Split
    }

    /// What has to be solved from the branches' costs before the policy can plan.
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    /// Where attention's tokens lie, seen over all blocks.
    fn placement(&self, _window: Window) -> Placement {
        Placement::Spread
    }

    /// Whether `released = true` means something, possibly the same plan.
    fn has_released_form(&self) -> bool {
        true
    }

    /// The share of tokens that attention has in the released form, where that is a number of its own.
    fn released_frac(&self) -> Option<f64> {
        None
    }

    /// The spans of one block.
    ///
    /// # Errors
    /// [`Error::EmptySequence`] for a `seq_len` of 0.
    fn plan(&self, req: &SplitRequest) -> Result<BlockPlan>;
}

/// How the two branches of a block share its tokens. It decides which parameters the block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Both branches read every token.
    Parallel,
    /// Each token is read by one branch.
    Split,
    /// Attention reads every token; the block has no SSM.
    AttnOnly,
    /// The SSM reads every token; the block has no attention.
    SsmOnly,
}

impl Sharing {
    /// Whether the block has `branch` at all.
    pub fn has(self, branch: Branch) -> bool {
        match self {
            Sharing::Parallel | Sharing::Split => true,
            Sharing::AttnOnly => branch == Branch::Attn,
            Sharing::SsmOnly => branch == Branch::Ssm,
        }
    }
}

/// What a policy takes from the balance of the branches' costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// The number of attention tokens.
    Tokens,
    /// The cycle of chunks.
    Cycle,
}

/// What a policy is asked: one block of one length, with everything solved.
#[derive(Clone, Debug, PartialEq)]
pub struct SplitRequest {
    /// The number of tokens.
    pub seq_len: usize,
    /// The index of the block in the model.
    pub block_idx: usize,
    /// The number of tokens for attention, for policies that need it.
    pub n_attn: usize,
    /// Which end is attention's.
    pub window: Window,
    /// The released script's own form.
    pub released: bool,
    /// Tokens in a chunk.
    pub chunk_len: usize,
    /// The cycle of chunks, for policies that need it.
    pub cycle: Cycle,
}

/// A policy of the table, by value.
///
/// ```
/// use flowhn_split::Policy;
///
/// let policy: Policy = "fac_split".parse()?;
/// assert_eq!(policy.name(), "fac_split");
/// let error = "fac_spilt".parse::<Policy>().unwrap_err();
/// assert!(error.to_string().contains("did you mean \"fac_split\"?"));
/// # Ok::<(), flowhn_split::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Policy(&'static dyn SplitPolicy);

impl Policy {
    /// All policies.
    pub fn all() -> impl Iterator<Item = Policy> {
        POLICIES.iter().map(|&policy| Policy(policy))
    }

    /// Looks a policy up by name.
    ///
    /// # Errors
    /// [`Error::UnknownPolicy`] with the nearest valid name.
    pub fn named(name: &str) -> Result<Self> {
        Self::all().find(|policy| policy.name() == name).ok_or_else(|| unknown(name))
    }
}

impl std::ops::Deref for Policy {
    type Target = dyn SplitPolicy;

    fn deref(&self) -> &Self::Target {
        self.0
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::named(name)
    }
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Policy {}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Policy({})", self.name())
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::named(&name).map_err(de::Error::custom)
    }
}

pub(crate) fn check_released(settings: &SplitSettings) -> Result<()> {
    let policy = settings.policy;
    if !policy.has_released_form() {
        return Err(Error::ReleasedForm { policy: policy.name() });
    }
    match (settings.attn_frac, policy.released_frac()) {
        (AttnFrac::Fixed(got), Some(want)) if got != want => {
            Err(Error::ReleasedFrac { policy: policy.name(), got, want })
        }
        _ => Ok(()),
    }
}

/// The plan in which attention reads the `n_attn` tokens from `start` on, wrapping at the end,
/// and the SSM the rest.
fn window_plan(seq_len: usize, start: usize, n_attn: usize) -> Result<BlockPlan> {
    let end = start + n_attn;
    let wrapped = end.saturating_sub(seq_len);
    BlockPlan::from_runs([
        (wrapped, Owner::Attn),
        (start - wrapped, Owner::Ssm),
        (n_attn - wrapped, Owner::Attn),
        (seq_len.saturating_sub(end), Owner::Ssm),
    ])
}

fn unknown(name: &str) -> Error {
    let distance = |valid: &&str| {
        let common = name.chars().zip(valid.chars()).take_while(|(a, b)| a == b).count();
        (edit_distance(name, valid), std::cmp::Reverse(common))
    };
    let nearest = POLICIES.iter().map(|policy| policy.name()).min_by_key(distance).unwrap_or_default();
    let valid: Vec<&str> = POLICIES.iter().map(|policy| policy.name()).collect();
    Error::UnknownPolicy { name: name.to_owned(), nearest, valid: valid.join(", ") }
}

/// Levenshtein's distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
pub(crate) fn request(seq_len: usize, block_idx: usize, n_attn: usize) -> SplitRequest {
    SplitRequest {
        seq_len,
        block_idx,
        n_attn,
        window: Window::Last,
        released: false,
        chunk_len: 64,
        cycle: Cycle { attn: 4, period: 7 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_summaries_are_sentences() {
        for (idx, policy) in POLICIES.iter().enumerate() {
            assert!(POLICIES[..idx].iter().all(|other| other.name() != policy.name()));
            assert!(policy.summary().ends_with('.'), "{policy:?}");
            assert_eq!(Policy::named(policy.name()).unwrap().name(), policy.name());
        }
    }

    #[test]
    fn unknown_names_get_the_nearest() {
        for (name, want) in [
            ("fac", "fac_split"),
            ("nosplit", "no_split"),
            ("circular_split", "cyclic_split"),
            ("smm_all", "ssm_all"),
            ("attention_all", "attn_all"),
        ] {
            match Policy::named(name) {
                Err(Error::UnknownPolicy { nearest, .. }) => assert_eq!(nearest, want, "{name}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn distances() {
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("same", "same"), 0);
    }

    #[test]
    fn every_policy_refuses_an_empty_sequence() {
        for policy in POLICIES {
            assert_eq!(policy.plan(&request(0, 0, 0)), Err(Error::EmptySequence), "{policy:?}");
        }
    }

    #[test]
    fn every_policy_keeps_its_sharing() {
        for policy in POLICIES {
            for seq_len in [1, 2, 5, 64, 129] {
                for block_idx in 0..5 {
                    for released in [false, true] {
                        let mut req = request(seq_len, block_idx, seq_len / 2);
                        req.released = released;
                        let plan = policy.plan(&req).unwrap();
                        assert_eq!(plan.seq_len(), seq_len, "{policy:?}");
                        let (attn, ssm) = (plan.tokens(Branch::Attn), plan.tokens(Branch::Ssm));
                        let want = match policy.sharing() {
                            Sharing::Parallel => (seq_len, seq_len),
                            Sharing::Split => (attn, seq_len - attn),
                            Sharing::AttnOnly => (seq_len, 0),
                            Sharing::SsmOnly => (0, seq_len),
                        };
                        assert_eq!((attn, ssm), want, "{policy:?} {seq_len} {block_idx}");
                    }
                }
            }
        }
    }
}
