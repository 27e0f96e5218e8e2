//! What a user may choose about a split.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{Error, Policy, Result, policy};

/// How many of a block's tokens attention reads.
///
/// In a config: `"flops"`, `"measured"`, or a number in `0..=1`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AttnFrac {
    /// As many as balance the FLOPs of the two whole branches.
    Flops,
    /// As many as balance their measured times; refused until there is a calibration.
    Measured,
    /// This share. 0 and 1 leave the other branch all tokens, and the block has no parameters
    /// for the one that reads none.
    Fixed(f64),
}

impl AttnFrac {
    pub(crate) fn check(self) -> Result<()> {
        match self {
            AttnFrac::Flops => Ok(()),
            AttnFrac::Measured => Err(Error::Measured),
            AttnFrac::Fixed(frac) if (0.0..=1.0).contains(&frac) => Ok(()),
            AttnFrac::Fixed(frac) => Err(Error::AttnFrac(frac)),
        }
    }
}

impl Serialize for AttnFrac {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            AttnFrac::Flops => serializer.serialize_str("flops"),
            AttnFrac::Measured => serializer.serialize_str("measured"),
            AttnFrac::Fixed(frac) => serializer.serialize_f64(*frac),
        }
    }
}

impl<'de> Deserialize<'de> for AttnFrac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(AttnFracVisitor)
    }
}

struct AttnFracVisitor;

impl de::Visitor<'_> for AttnFracVisitor {
    type Value = AttnFrac;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("attn_frac as \"flops\", \"measured\" or a number in 0..=1")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<AttnFrac, E> {
        match name {
            "flops" => Ok(AttnFrac::Flops),
            "measured" => Ok(AttnFrac::Measured),
            _ => Err(E::invalid_value(de::Unexpected::Str(name), &self)),
        }
    }

    fn visit_f64<E: de::Error>(self, frac: f64) -> std::result::Result<AttnFrac, E> {
        let fixed = AttnFrac::Fixed(frac);
        fixed.check().map(|()| fixed).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, frac: i64) -> std::result::Result<AttnFrac, E> {
        self.visit_f64(frac as f64)
    }

    fn visit_u64<E: de::Error>(self, frac: u64) -> std::result::Result<AttnFrac, E> {
        self.visit_f64(frac as f64)
    }
}

/// Which end of the sequence `fa_split` gives to attention, and where `fac_split` starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    /// The last tokens; `fac_split` moves towards the start.
    #[default]
    Last,
    /// The first tokens; `fac_split` moves towards the end.
    First,
}

/// The share of chunks that `cyclic_split` gives to attention: `attn` of every `period`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cycle {
    /// Chunks for attention in a period.
    pub attn: usize,
    /// Chunks in a period.
    pub period: usize,
}

impl Cycle {
    /// The cycle in lowest terms, with a period of 3 to 8, nearest to `frac`; of two equally near
    /// the one with the shorter period. 0 and 1 give the cycles that send every chunk one way.
    ///
    /// ```
    /// use flowhn_split::Cycle;
    /// assert_eq!(Cycle::nearest(0.5625), Cycle { attn: 4, period: 7 });
    /// ```
    pub fn nearest(frac: f64) -> Self {
        if frac <= 0.0 {
            return Self { attn: 0, period: 1 };
        }
        if frac >= 1.0 {
            return Self { attn: 1, period: 1 };
        }
        let mut best = Self { attn: 1, period: 3 };
        for period in 3..=8 {
            for attn in (1..period).filter(|&attn| gcd(attn, period) == 1) {
                let cycle = Self { attn, period };
                if (cycle.frac() - frac).abs() + 1e-12 < (best.frac() - frac).abs() {
                    best = cycle;
                }
            }
        }
        best
    }

    /// The share of the chunks that go to attention.
    pub fn frac(self) -> f64 {
        self.attn as f64 / self.period as f64
    }

    pub(crate) fn check(self) -> Result<()> {
        let Self { attn, period } = self;
        if period == 0 || attn > period {
            return Err(Error::Cycle { attn, period });
        }
        Ok(())
    }
}

/// The settings of one block's split.
#[derive(Clone, Debug, PartialEq)]
pub struct SplitSettings {
    /// The policy.
    pub policy: Policy,
    /// How many tokens attention reads (`fa_split`, `fac_split`, `cyclic_split`).
    pub attn_frac: AttnFrac,
    /// Which end is attention's (`fa_split`, `fac_split`).
    pub window: Window,
    /// The form of the authors' script, planned at the actual length: `fa_split` gives attention the first `floor(0.59 seq_len)` tokens,
    /// `fac_split` the last `floor(seq_len / 2)` in even blocks and the first in odd ones; `cyclic_split` has none, others plan as ever.
    pub released: bool,
    /// The number of attention tokens is a multiple of this wherever the length holds two tiles.
    pub tile: usize,
    /// Tokens in a chunk (`cyclic_split`).
    pub chunk_len: usize,
    /// The cycle (`cyclic_split`); solved from `attn_frac` at the training length when absent.
    pub cycle: Option<Cycle>,
}

impl SplitSettings {
    /// The defaults for `policy`: FLOP balance, last window, tiles and chunks of 64 tokens.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            attn_frac: AttnFrac::Flops,
            window: Window::Last,
            released: false,
            tile: 64,
            chunk_len: 64,
            cycle: None,
        }
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// [`Error`], naming the setting at fault.
    pub fn check(&self) -> Result<()> {
        self.attn_frac.check()?;
        if self.tile == 0 {
            return Err(Error::Zero("tile"));
        }
        if self.chunk_len == 0 {
            return Err(Error::Zero("chunk_len"));
        }
        if let Some(cycle) = self.cycle {
            cycle.check()?;
        }
        if self.released {
            policy::check_released(self)?;
        }
        Ok(())
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_cycle_is_in_lowest_terms() {
        for percent in 1..100 {
            let frac = f64::from(percent) / 100.0;
            let cycle = Cycle::nearest(frac);
            assert!((3..=8).contains(&cycle.period), "{frac}: {cycle:?}");
            assert_eq!(gcd(cycle.attn, cycle.period), 1, "{frac}: {cycle:?}");
            assert!((1..cycle.period).contains(&cycle.attn), "{frac}: {cycle:?}");
        }
        // One half is not on offer: its period of 2 never mixes.
        assert_eq!(Cycle::nearest(0.5), Cycle { attn: 3, period: 7 });
        assert_eq!(Cycle::nearest(0.0), Cycle { attn: 0, period: 1 });
        assert_eq!(Cycle::nearest(1.0), Cycle { attn: 1, period: 1 });
    }

    #[test]
    fn attn_frac_reads_names_and_numbers() {
        let read = |text: &str| serde_json::from_str::<AttnFrac>(text);
        assert_eq!(read("\"flops\"").unwrap(), AttnFrac::Flops);
        assert_eq!(read("0.59").unwrap(), AttnFrac::Fixed(0.59));
        assert_eq!(read("1").unwrap(), AttnFrac::Fixed(1.0));
        assert!(read("1.5").unwrap_err().to_string().contains("attn_frac is 1.5"));
        assert!(read("\"flop\"").unwrap_err().to_string().contains("\"flops\""));
        assert_eq!(serde_json::to_string(&AttnFrac::Measured).unwrap(), "\"measured\"");
    }

    #[test]
    fn impossible_settings_are_named() {
        let with = |change: fn(&mut SplitSettings)| {
            let mut settings = SplitSettings::new("cyclic_split".parse().unwrap());
            change(&mut settings);
            settings.check().unwrap_err()
        };
        assert_eq!(with(|s| s.attn_frac = AttnFrac::Measured), Error::Measured);
        assert_eq!(with(|s| s.attn_frac = AttnFrac::Fixed(-0.1)), Error::AttnFrac(-0.1));
        assert!(matches!(with(|s| s.attn_frac = AttnFrac::Fixed(f64::NAN)), Error::AttnFrac(_)));
        assert_eq!(with(|s| s.tile = 0), Error::Zero("tile"));
        assert_eq!(with(|s| s.chunk_len = 0), Error::Zero("chunk_len"));
        let cycle = with(|s| s.cycle = Some(Cycle { attn: 4, period: 3 }));
        assert_eq!(cycle, Error::Cycle { attn: 4, period: 3 });
        let released = with(|s| s.released = true);
        assert_eq!(released, Error::ReleasedForm { policy: "cyclic_split" });
    }
}
