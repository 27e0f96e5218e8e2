//! The items of a task, out of a file.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use serde::Deserialize;

use super::{BY_NORM, task_name};
use crate::data::Fingerprint;
use crate::{Error, Result};

/// A question as it stands in its file; keys that are not here are ignored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Item {
    /// What names it; any JSON value.
    #[serde(default)]
    pub id: serde_json::Value,
    /// What is read first.
    pub context: String,
    /// What may follow, with the space before it.
    pub choices: Vec<String>,
    /// The right one.
    pub answer: usize,
    /// In partial scoring, what is scored after `context` and a choice.
    #[serde(default)]
    pub suffix: Option<String>,
    /// Its line in the file, from 1.
    #[serde(skip)]
    pub line: u64,
}

/// The items of one file.
#[derive(Clone, Debug)]
pub struct Task {
    name: String,
    path: PathBuf,
    items: Vec<Item>,
    n_in_file: usize,
    fingerprint: Fingerprint,
}

impl Task {
    /// Reads a file, all of it, and keeps its first `limit` items.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Item`] for a line that is no item, an answer that is no choice, an empty choice, or a file in which
    /// some items have one choice and some several.
    pub fn load(path: &Path, limit: Option<usize>) -> Result<Self> {
        let wrong = |line: u64, message: String| Error::Item { path: path.to_owned(), line, message };
        let name = task_name(path)
            .ok_or_else(|| wrong(0, "a file of items ends in .jsonl, .jsonl.gz or .jsonl.zst".to_owned()))?;
        let mut items: Vec<Item> = Vec::new();
        for (text, line) in BufReader::new(open(path)?).lines().zip(1..) {
            let text = text.map_err(Error::io(path, "read"))?;
            if text.trim_ascii().is_empty() {
                continue;
            }
            let item: Item = serde_json::from_str(&text).map_err(|error| {
                // The parser sees one line and calls it line 1; ours is the one that counts.
                let message = error.to_string();
                wrong(line, message.split(" at line ").next().unwrap_or_default().to_owned())
            })?;
            let item = Item { line, ..item };
            check(&item, items.first()).map_err(|message| wrong(line, message))?;
            items.push(item);
        }
        if items.is_empty() {
            return Err(wrong(0, "the file holds no item".to_owned()));
        }
        let n_in_file = items.len();
        items.truncate(limit.unwrap_or(usize::MAX));
        let fingerprint = Fingerprint::of_bytes(format!("{items:?}").as_bytes());
        Ok(Self { name, path: path.to_owned(), items, n_in_file, fingerprint })
    }

    /// What it is called: the file's name without its ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The items that are scored, in the file's order.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Items of the whole file.
    pub fn n_in_file(&self) -> usize {
        self.n_in_file
    }

    /// A hash of the items that are scored.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Whether items have several choices, of which one is taken; else there is one, which is written or not.
    pub fn is_choice(&self) -> bool {
        self.items.first().is_some_and(|item| item.choices.len() > 1)
    }

    /// Whether choices are the scored text, so that a normalised accuracy means something.
    pub(super) fn has_norm(&self) -> bool {
        self.is_choice() && self.items.iter().all(|item| item.suffix.is_none())
    }

    /// The metric by which the task is reported.
    pub fn metric(&self) -> &'static str {
        if BY_NORM.contains(&self.name.as_str()) && self.has_norm() { "acc_norm" } else { "acc" }
    }
}

fn check(item: &Item, first: Option<&Item>) -> std::result::Result<(), String> {
    let n_choices = item.choices.len();
    if item.answer >= n_choices {
        return Err(format!("the answer is {} of {n_choices} choices, counted from 0", item.answer));
    }
    if let Some(idx) = item.choices.iter().position(|choice| choice.trim().is_empty()) {
        return Err(format!("choice {idx} is empty"));
    }
    if item.suffix.as_ref().is_some_and(|suffix| suffix.trim().is_empty()) {
        return Err("the suffix, which is what is scored, is empty".to_owned());
    }
    match first {
        Some(first) if (first.choices.len() > 1) != (n_choices > 1) => {
            Err("some items have one choice and some several; a file holds either kind".to_owned())
        }
        _ => Ok(()),
    }
}

/// The file's text, decompressed as its name says.
pub(super) fn open(path: &Path) -> Result<Box<dyn Read>> {
    let file = BufReader::new(File::open(path).map_err(Error::io(path, "open"))?);
    Ok(match path.extension().and_then(|ending| ending.to_str()) {
        Some("gz") => Box::new(MultiGzDecoder::new(file)),
        Some("zst") => Box::new(zstd::stream::read::Decoder::with_buffer(file).map_err(Error::io(path, "decompress"))?),
        _ => Box::new(file),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const GOOD: &str = r#"{"task": "x", "id": 7, "context": "A", "choices": [" b", " c"], "answer": 1}"#;

    fn load(name: &str, bytes: &[u8]) -> Result<Task> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Task::load(&path, None)
    }

    #[test]
    fn all_compressions_give_the_same_items() {
        let text = format!("{GOOD}\n\n{}\n", GOOD.replace("\"A\"", "\"B\""));
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(text.as_bytes()).unwrap();
        let plain = load("mine.jsonl", text.as_bytes()).unwrap();
        let zst = zstd::encode_all(text.as_bytes(), 1).unwrap();
        for task in [load("mine.jsonl.gz", &gz.finish().unwrap()).unwrap(), load("mine.jsonl.zst", &zst).unwrap()] {
            assert_eq!((task.name(), task.items()), ("mine", plain.items()));
        }
        assert_eq!(plain.items()[1].line, 3);
        assert_eq!((plain.metric(), plain.is_choice()), ("acc", true));
    }

    #[test]
    fn what_is_no_item_is_told_by_its_line() {
        let refused = |second: &str, word: &str| {
            let error = load("mine.jsonl", format!("{GOOD}\n{second}\n").as_bytes()).unwrap_err().to_string();
            assert!(error.contains("mine.jsonl: line 2: ") && error.contains(word), "{error}");
        };
        refused("{\"context\": \"A\"}", "choices");
        refused("[", "EOF");
        refused(&GOOD.replace("\": 1", "\": 2"), "answer is 2 of 2");
        refused(&GOOD.replace(" c", " "), "choice 1 is empty");
        refused(&GOOD.replace("[\" b\", \" c\"], \"answer\": 1", "[\" b\"], \"answer\": 0"), "either kind");
        assert!(load("mine.jsonl", b"\n").unwrap_err().to_string().contains("no item"));
        assert!(load("mine.csv", b"a").unwrap_err().to_string().contains(".jsonl"));
    }
}
