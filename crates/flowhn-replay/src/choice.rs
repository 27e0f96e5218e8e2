//! Which launches of a trace are replayed.

use std::collections::{BTreeMap, HashMap};

use flowhn_trace::{Launch, Record};

/// Arguments that choose launches.
#[derive(Debug, Default, clap::Args)]
pub struct Choice {
    /// Only launches whose source, entry or macros contain this text, as `--verbose` shows them; may be repeated
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// At most so many launches of each variant of a kernel, from all over the trace
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    per_variant: Option<u32>,
}

/// Source, entry and macros.
pub fn name(launch: &Launch) -> String {
    format!("{} {}", launch.kernel, launch.variant)
}

impl Choice {
    /// The launches that are chosen, with the numbers of their lines from 1.
    pub fn of<'a>(&self, records: &'a [Record]) -> Vec<(usize, &'a Launch)> {
        let launches = records.iter().enumerate().filter_map(|(idx, record)| match record {
            Record::Launch(launch) => Some((idx + 1, launch, name(launch))),
            Record::Skipped(_) => None,
        });
        let wanted: Vec<_> = launches
            .filter(|(_, _, name)| self.filter.is_empty() || self.filter.iter().any(|text| name.contains(text)))
            .collect();
        let mut n_of: HashMap<&str, usize> = HashMap::new();
        for (_, _, name) in &wanted {
            *n_of.entry(name).or_default() += 1;
        }
        let mut n_seen: HashMap<&str, usize> = HashMap::new();
        let mut chosen = Vec::new();
        for (line, launch, name) in &wanted {
            let seen = n_seen.entry(name).or_default();
            let (nth, n) = (*seen, n_of[name.as_str()]);
            *seen += 1;
            // Of n launches, the k that begin each k-th part of them.
            if self.per_variant.is_none_or(|k| (nth * k as usize) % n < k as usize) {
                chosen.push((*line, *launch));
            }
        }
        chosen
    }
}

/// For each source and entry, how many launches were recorded and how many were not.
pub fn kernels<'a>(records: impl Iterator<Item = &'a Record>) -> BTreeMap<&'a str, [usize; 2]> {
    let mut counts: BTreeMap<&str, [usize; 2]> = BTreeMap::new();
    for record in records {
        let (kernel, idx) = match record {
            Record::Launch(launch) => (&launch.kernel, 0),
            Record::Skipped(skipped) => (&skipped.kernel, 1),
        };
        counts.entry(kernel).or_default()[idx] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use flowhn_trace::Skipped;

    use super::*;

    fn launch(kernel: &str, variant: &str) -> Record {
        Record::Launch(Launch {
            kernel: kernel.to_owned(),
            variant: variant.to_owned(),
            cubin: String::new(),
            entry: String::new(),
            grid: [1; 3],
            block: 32,
            shared_bytes: 0,
            regions: Vec::new(),
            args: Vec::new(),
        })
    }

    #[test]
    fn launches_are_chosen_by_name_and_number() {
        let mut records: Vec<Record> = (0..10).map(|_| launch("a.cu/f", "X=1")).collect();
        records.push(Record::Skipped(Skipped { kernel: "a.cu/f".to_owned(), reason: "too large".to_owned() }));
        records.extend([launch("a.cu/f", "X=2"), launch("a.cu/g", "X=1")]);
        let lines = |filter: &[&str], per_variant| {
            let choice = Choice { filter: filter.iter().map(|&text| text.to_owned()).collect(), per_variant };
            choice.of(&records).iter().map(|(line, _)| *line).collect::<Vec<_>>()
        };
        assert_eq!(lines(&[], None), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13]);
        assert_eq!(lines(&[], Some(2)), [1, 6, 12, 13]);
        assert_eq!(lines(&[], Some(3)), [1, 5, 8, 12, 13]);
        assert_eq!(lines(&[], Some(100)).len(), 12);
        assert_eq!(lines(&["/g", "X=2"], None), [12, 13]);
        assert_eq!(kernels(records.iter()), [("a.cu/f", [11, 1]), ("a.cu/g", [1, 0])].into());
    }
}
