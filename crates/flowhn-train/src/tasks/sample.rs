//! A small part of a file of items, drawn by their text.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use flate2::{Compression, GzBuilder};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Task;
use super::item::open;
use crate::storage::{Disk, write_atomically};
use crate::{Error, Result};

/// Writes `n` items of a file, in their order, to a `.jsonl.gz` file, and returns how many there were to draw from.
///
/// Those are taken whose lines have the smallest hashes under `seed`: the choice depends on no order and on no generator. Lines go
/// over as they are, and the same ones give the same bytes.
///
/// # Errors
/// Those of [`Task::load`], as only items are drawn; [`Error::Io`].
pub fn sample_items(path: &Path, n: usize, seed: u64, out: &Path) -> Result<usize> {
    let n_items = Task::load(path, None)?.n_in_file();
    let lines = BufReader::new(open(path)?).lines();
    let lines = lines.collect::<std::io::Result<Vec<String>>>().map_err(Error::io(path, "read"))?;
    let lines: Vec<&str> = lines.iter().map(String::as_str).filter(|line| !line.trim_ascii().is_empty()).collect();
    let mut ranked: Vec<(u64, usize)> =
        lines.iter().enumerate().map(|(idx, line)| (xxh3_64_with_seed(line.as_bytes(), seed), idx)).collect();
    ranked.sort_unstable();
    ranked.truncate(n);
    ranked.sort_unstable_by_key(|&(_, idx)| idx);
    let packed = (|| {
        let mut gz = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
        ranked.iter().try_for_each(|&(_, idx)| writeln!(gz, "{}", lines[idx]))?;
        gz.finish()
    })();
    write_atomically(&Disk, out, &packed.map_err(Error::io(out, "compress"))?)?;
    Ok(n_items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_some_of_the_items_in_their_order_and_ever_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (all, some) = (dir.path().join("mine.jsonl"), dir.path().join("some.jsonl.gz"));
        let item =
            |idx: usize| format!("{{\"id\": {idx}, \"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 0}}\n");
        std::fs::write(&all, (0..50).map(item).collect::<String>()).unwrap();
        assert_eq!(sample_items(&all, 7, 1, &some).unwrap(), 50);
        let ids = |path: &Path| -> Vec<u64> {
            Task::load(path, None).unwrap().items().iter().map(|item| item.id.as_u64().unwrap()).collect()
        };
        let drawn = ids(&some);
        assert!(drawn.len() == 7 && drawn.is_sorted(), "{drawn:?}");
        let bytes = std::fs::read(&some).unwrap();
        sample_items(&all, 7, 1, &some).unwrap();
        assert_eq!(std::fs::read(&some).unwrap(), bytes);
        sample_items(&all, 7, 2, &some).unwrap();
        assert_ne!(ids(&some), drawn);
    }
}
