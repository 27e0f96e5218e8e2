//! Which launches of a trace are replayed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;

use flowhn_trace::{Launch, Record, Skipped};

/// Arguments that choose launches.
#[derive(Debug, Default, clap::Args)]
pub struct Choice {
    /// Only launches whose source, entry or macros contain this text, as `--verbose` shows them; may be repeated
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Of launches that differ in nothing but what their memory holds, at most the first N, in whatever traces they are
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    distinct: Option<u32>,
    /// At most so many launches of each variant of a kernel, from all over the traces
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    per_variant: Option<u32>,
}

/// A launch of one of several traces.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The trace's number.
    pub trace: usize,
    /// The number of its line from 1.
    pub line: usize,
    /// What was recorded.
    pub launch: &'a Launch,
}

/// Source, entry and macros.
pub fn name(launch: &Launch) -> String {
    format!("{} {}", launch.kernel, launch.variant)
}

impl Choice {
    /// The launches of all traces that are chosen, those of the same machine code one after the other.
    pub fn of<'a>(&self, traces: impl IntoIterator<Item = &'a [Record]>) -> Vec<Found<'a>> {
        let found = traces.into_iter().enumerate().flat_map(|(trace, records)| {
            records.iter().enumerate().filter_map(move |(idx, record)| match record {
                Record::Launch(launch) => Some(Found { trace, line: idx + 1, launch }),
                Record::Skipped(_) => None,
            })
        });
        let mut chosen: Vec<Found> = found.filter(|found| self.names(&name(found.launch))).collect();
        if let Some(k) = self.distinct {
            let mut n_of = HashMap::new();
            chosen.retain(|found| nth(&mut n_of, form(found.launch)) < k as usize);
        }
        if let Some(k) = self.per_variant {
            let (mut n_of, mut n_seen) = (HashMap::new(), HashMap::new());
            let variant = |found: &Found<'a>| [found.launch.kernel.as_str(), &found.launch.variant];
            chosen.iter().for_each(|found| {
                nth(&mut n_of, variant(found));
            });
            // Of n launches, the k that begin each k-th part of them.
            chosen.retain(|found| nth(&mut n_seen, variant(found)) * k as usize % n_of[&variant(found)] < k as usize);
        }
        chosen.sort_by_key(|found| [&found.launch.kernel, &found.launch.variant, &found.launch.cubin]);
        chosen
    }

    fn names(&self, name: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|text| name.contains(text))
    }

    /// What was recorded and what was not, of each source and entry that is chosen.
    pub fn kernels<'a>(&self, traces: &[&'a [Record]]) -> BTreeMap<&'a str, Kernel<'a>> {
        let mut kernels: BTreeMap<&str, Kernel> = BTreeMap::new();
        for found in self.of(traces.iter().copied()) {
            kernels.entry(&found.launch.kernel).or_default().n_launches += 1;
        }
        let records = || traces.iter().copied().flatten();
        let launches = records().filter_map(|record| match record {
            Record::Launch(Launch { kernel, variant, grid, .. }) => Some((kernel, variant, grid)),
            Record::Skipped(_) => None,
        });
        let recorded: HashSet<_> = launches.collect();
        for record in records() {
            let Record::Skipped(skipped) = record else { continue };
            let Skipped { kernel, variant, grid, .. } = skipped;
            if !self.names(&format!("{kernel} {variant}")) {
                continue;
            }
            let counts = kernels.entry(kernel).or_default();
            counts.n_skipped += 1;
            if !recorded.contains(&(kernel, variant, grid)) {
                counts.missing.insert((variant, *grid, &skipped.reason));
            }
        }
        kernels
    }
}

/// What there is of a kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kernel<'a> {
    /// Launches that are chosen.
    pub n_launches: usize,
    /// Launches that were not recorded.
    pub n_skipped: usize,
    /// Macros, grids and reasons of those of which no launch with the same macros and grid was recorded.
    pub missing: BTreeSet<(&'a str, [u32; 3], &'a str)>,
}

/// How often that came before.
fn nth<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: K) -> usize {
    let count = counts.entry(key).or_default();
    *count += 1;
    *count - 1
}

/// All of a launch but what its memory holds.
fn form(launch: &Launch) -> impl Eq + Hash + '_ {
    let Launch { cubin, entry, grid, block, shared_bytes, regions, links, args, .. } = launch;
    let regions: Vec<[u64; 2]> = regions.iter().map(|region| [region.misalignment, region.n_bytes]).collect();
    (cubin, entry, grid, block, shared_bytes, regions, links, args)
}

#[cfg(test)]
mod tests {
    use flowhn_trace::{Region, Value};

    use super::*;

    fn launch(kernel: &str, variant: &str) -> Launch {
        Launch {
            kernel: kernel.to_owned(),
            variant: variant.to_owned(),
            cubin: format!("{kernel} {variant}"),
            entry: String::new(),
            grid: [1; 3],
            block: 32,
            shared_bytes: 0,
            regions: Vec::new(),
            links: Vec::new(),
            args: Vec::new(),
        }
    }

    fn skipped(variant: &str, grid: [u32; 3]) -> Record {
        let [kernel, reason] = ["a.cu/f", "too large"].map(str::to_owned);
        Record::Skipped(Skipped { kernel, variant: variant.to_owned(), grid, reason })
    }

    #[test]
    fn launches_are_chosen_by_name_and_number() {
        let mut records: Vec<Record> = (0..10).map(|_| Record::Launch(launch("a.cu/f", "X=1"))).collect();
        records.extend([skipped("X=1", [1; 3]), skipped("X=1", [2; 3]), skipped("X=1", [2; 3])]);
        records.extend([launch("a.cu/g", "X=1"), launch("a.cu/f", "X=2")].map(Record::Launch));
        let lines = |filter: &[&str], per_variant| {
            let filter = filter.iter().map(|&text| text.to_owned()).collect();
            let choice = Choice { filter, distinct: None, per_variant };
            choice.of([&records[..]]).iter().map(|found| found.line).collect::<Vec<_>>()
        };
        assert_eq!(lines(&[], None), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 14], "by machine code");
        assert_eq!(lines(&[], Some(2)), [1, 6, 15, 14]);
        assert_eq!(lines(&[], Some(3)), [1, 5, 8, 15, 14]);
        assert_eq!(lines(&[], Some(100)).len(), 12);
        assert_eq!(lines(&["/g", "X=2"], None), [15, 14]);

        let kernels = Choice::default().kernels(&[&records, &records]);
        let f = Kernel { n_launches: 22, n_skipped: 6, missing: [("X=1", [2; 3], "too large")].into() };
        assert_eq!(kernels, [("a.cu/f", f), ("a.cu/g", Kernel { n_launches: 2, ..Kernel::default() })].into());
    }

    #[test]
    fn launches_are_distinct_but_for_the_bytes() {
        let region = |at, n_bytes| Region { misalignment: 0, n_bytes, at, unwritten: at > 0 };
        let of = |region, args| Record::Launch(Launch { regions: vec![region], args, ..launch("a.cu/f", "") });
        let records = [
            of(region(0, 8), vec![Value::Bits(1)]),
            of(region(8, 8), vec![Value::Bits(1)]),
            of(region(0, 8), vec![Value::Bits(2)]),
            of(region(16, 8), vec![Value::Bits(1)]),
            of(region(0, 16), vec![Value::Bits(1)]),
        ];
        let lines = |k| {
            let choice = Choice { distinct: Some(k), ..Choice::default() };
            let chosen = choice.of([&records[..], &records[..2]]);
            chosen.iter().map(|found| (found.trace, found.line)).collect::<Vec<_>>()
        };
        assert_eq!(lines(1), [(0, 1), (0, 3), (0, 5)]);
        assert_eq!(lines(2), [(0, 1), (0, 2), (0, 3), (0, 5)]);
        assert_eq!(lines(4), [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 1)]);
    }
}
