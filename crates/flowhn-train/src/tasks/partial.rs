//! Scores on disk as they come, so that an evaluation which was killed goes on.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::request::Request;
use super::tiles::Score;
use crate::{Error, Result};

/// What the first line begins with.
const FORMAT: &str = "flowhn-scores-1";

/// A file of scores: a line that says whose they are, then one for each request, known by a hash of its tokens.
///
/// Other items, other tokens or another limit only make for other requests, so what is known of the old ones stays good. Scores of
/// another model, or computed in another way, are not: whoever opens the file names both by a fingerprint.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: File,
    known: HashMap<u128, Score>,
}

impl Partial {
    /// Opens a file and reads its scores, or starts it anew where there is none or its fingerprint is another.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, fingerprint: &str) -> Result<Self> {
        let header = format!("{FORMAT} {fingerprint}\n");
        let text = match std::fs::read(path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(path, "read")(error)),
        };
        // A line that was being written when the process died has no end and is not believed.
        let whole = text.strip_prefix(&header).map(|lines| &lines[..lines.rfind('\n').map_or(0, |end| end + 1)]);
        let mut options = OpenOptions::new();
        let mut file = options.create(true).truncate(false).write(true).open(path).map_err(Error::io(path, "open"))?;
        let kept = whole.map_or(0, |lines| header.len() + lines.len());
        let fresh = if kept == 0 { header.as_str() } else { "" };
        let started = (|| {
            file.set_len(kept as u64)?;
            std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
            file.write_all(fresh.as_bytes())
        })();
        started.map_err(Error::io(path, "write"))?;
        let known = whole.unwrap_or_default().lines().filter_map(parse).collect();
        Ok(Self { path: path.to_owned(), file, known })
    }

    /// Requests whose scores are known.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether nothing is known yet.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Removes the file, once what it served for is safe elsewhere.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(self) -> Result<()> {
        drop(self.file);
        std::fs::remove_file(&self.path).map_err(Error::io(&self.path, "remove"))
    }

    pub(super) fn get(&self, request: &Request) -> Option<Score> {
        self.known.get(&hash(request)).copied()
    }

    pub(super) fn add<'a>(&mut self, scores: impl Iterator<Item = (&'a Request, Score)>) -> Result<()> {
        let mut lines = String::new();
        for (request, score) in scores {
            // Rust writes the shortest digits that read back as the same number.
            let Score { log_likelihood, likeliest } = score;
            lines += &format!("{:032x} {log_likelihood:?} {}\n", hash(request), u8::from(likeliest));
            self.known.insert(hash(request), score);
        }
        self.file.write_all(lines.as_bytes()).map_err(Error::io(&self.path, "write"))
    }
}

fn hash(request: &Request) -> u128 {
    let mut hasher = Xxh3::new();
    hasher.update(&(request.n_context as u64).to_le_bytes());
    hasher.update(&[u8::from(request.likeliest)]);
    request.ids.iter().for_each(|id| hasher.update(&id.to_le_bytes()));
    hasher.digest128()
}

fn parse(line: &str) -> Option<(u128, Score)> {
    let mut words = line.split(' ');
    let key = u128::from_str_radix(words.next()?, 16).ok()?;
    let log_likelihood = words.next()?.parse().ok()?;
    let likeliest = words.next()? == "1";
    Some((key, Score { log_likelihood, likeliest }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(last: i64) -> Request {
        Request { ids: vec![1, 2, last], n_context: 1, likeliest: false }
    }

    #[test]
    fn scores_come_back_to_the_bit_and_torn_lines_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scores");
        let score = Score { log_likelihood: -0.1f64 - 1e-17 - 7. / 3., likeliest: true };
        let (first, second) = (request(3), request(4));
        Partial::open(&path, "a").unwrap().add([(&first, score), (&second, score)].into_iter()).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - 3);
        std::fs::write(&path, bytes).unwrap();
        let mut partial = Partial::open(&path, "a").unwrap();
        assert_eq!((partial.get(&first), partial.get(&second), partial.len()), (Some(score), None, 1));
        partial.add([(&second, score)].into_iter()).unwrap();
        drop(partial);
        assert_eq!(Partial::open(&path, "a").unwrap().get(&second), Some(score));
        assert!(Partial::open(&path, "b").unwrap().is_empty(), "another model's scores are worth nothing");
        assert!(Partial::open(&path, "a").unwrap().is_empty(), "and were overwritten");
    }
}
