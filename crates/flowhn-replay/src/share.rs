//! Several processes that replay the same traces, each a part of the launches.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};

/// Arguments that leave launches to other processes.
#[derive(Debug, Default, clap::Args)]
pub struct Share {
    /// Only the I-th of N parts of the launches, I from 1; those of the same machine code are in few of the parts
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// With other processes that name the same new folder and have the other shards: whoever is done with its own part goes on with
    /// what is left of the others', and each launch is replayed once
    #[arg(long, value_name = "DIR", requires = "shard")]
    claims: Option<PathBuf>,
}

/// One of several parts.
#[derive(Clone, Copy, Debug)]
struct Shard {
    idx: usize,
    n: usize,
}

impl FromStr for Shard {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (nth, n) = text.split_once('/').context("expected two numbers, I/N")?;
        let (nth, n): (usize, usize) = (nth.parse()?, n.parse()?);
        if !(1..=n).contains(&nth) {
            bail!("there is no part {nth} of {n}");
        }
        Ok(Self { idx: nth - 1, n })
    }
}

impl Share {
    /// The part of `n_launches` that is this process's own.
    pub fn part(&self, n_launches: usize) -> Range<usize> {
        let Shard { idx, n } = self.shard.unwrap_or(Shard { idx: 0, n: 1 });
        n_launches * idx / n..n_launches * (idx + 1) / n
    }

    /// The numbers of the launches that it may replay: its own part first, then what the others may have left.
    pub fn order(&self, n_launches: usize) -> impl Iterator<Item = usize> + use<> {
        let own = self.part(n_launches);
        let n_others = if self.claims.is_some() { n_launches - own.len() } else { 0 };
        (own.start..own.end + n_others).map(move |idx| idx % n_launches)
    }

    /// Whether a launch is now this process's, and not one that another has begun.
    ///
    /// # Errors
    /// What the system says if the folder cannot be written.
    pub fn claim(&self, idx: usize) -> Result<bool> {
        let Some(dir) = &self.claims else { return Ok(true) };
        let attempt = || {
            fs::create_dir_all(dir)?;
            File::create_new(dir.join(idx.to_string()))
        };
        match attempt() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot write in {}", dir.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn share(idx: usize, n: usize) -> Share {
        Share { shard: Some(Shard { idx, n }), claims: None }
    }

    #[test]
    fn shards_count_from_one() {
        let part = |text: &str| Share { shard: Some(text.parse().unwrap()), claims: None }.part(10);
        assert_eq!([part("1/3"), part("2/3"), part("3/3")], [0..3, 3..6, 6..10]);
        assert_eq!(Share::default().part(10), 0..10);
        for text in ["0/3", "4/3", "0/0", "1", "a/3", "1/-3"] {
            assert!(text.parse::<Shard>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_empty_trace_has_empty_parts() {
        assert_eq!(share(1, 3).order(0).count(), 0);
        let claims = Some(PathBuf::from("unused"));
        assert_eq!(Share { claims, ..share(1, 3) }.order(0).count(), 0);
    }

    proptest! {
        #[test]
        fn parts_are_even_and_cover_every_launch_once(n_launches in 0_usize..300, n in 1_usize..70) {
            let all: Vec<usize> = (0..n).flat_map(|idx| share(idx, n).order(n_launches)).collect();
            prop_assert_eq!(all, (0..n_launches).collect::<Vec<_>>());
            for idx in 0..n {
                prop_assert!((n_launches / n..=n_launches.div_ceil(n)).contains(&share(idx, n).part(n_launches).len()));
            }
        }

        #[test]
        fn claims_give_every_launch_to_one_process(
            n_launches in 0_usize..40,
            n in 1_usize..6,
            turns in prop::collection::vec(0_usize..6, 0..400),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let claims = folder.path().join("claims");
            let shares: Vec<Share> = (0..n).map(|idx| Share { claims: Some(claims.clone()), ..share(idx, n) }).collect();
            let mut orders: Vec<_> = shares.iter().map(|share| share.order(n_launches)).collect();
            let mut replayed = Vec::new();
            // Processes take turns at random; one of them is left to finish alone.
            for turn in turns.into_iter().map(|turn| turn % n).chain(std::iter::repeat_n(0, n_launches)) {
                if let Some(idx) = orders[turn].next() {
                    replayed.extend(shares[turn].claim(idx).unwrap().then_some(idx));
                }
            }
            replayed.sort_unstable();
            prop_assert_eq!(replayed, (0..n_launches).collect::<Vec<_>>());
        }
    }
}
