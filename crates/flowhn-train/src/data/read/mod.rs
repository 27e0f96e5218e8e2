//! Documents out of text files, one at a time, in bounded memory.

mod lines;

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Deserialize;

use self::lines::Lines;
use super::{Error, Result};

/// Limits on reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOptions {
    /// The longest document in bytes: a line of a JSON lines file or a whole text file. 64 MiB by default.
    pub max_document_bytes: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        ReadOptions { max_document_bytes: 64 << 20 }
    }
}

/// One document of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The text, exactly as it stands in the file (JSON escapes resolved).
    pub text: String,
    /// The line of the file on which it starts, from 1.
    pub line: u64,
}

/// Reads the documents of one file in order.
///
/// The ending of the name says how:
///
/// - `.jsonl`, `.jsonl.zst`: a JSON object a line; its document is the string under `"text"`, other keys are ignored.
///   Blank lines are skipped.
/// - `.txt`, `.txt.zst`: the whole file is one document. Blank lines are part of the text and separate nothing; to
///   train on many documents from plain text, put each in a file of its own or write JSON lines.
///
/// A byte order mark at the start is dropped. Documents that hold only white space are left out and counted. The first
/// error ends the iteration; a file without any document is an error.
///
/// ```
/// # use flowhn_train::data::{Documents, ReadOptions};
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("two.jsonl");
/// std::fs::write(&path, "{\"text\": \"One.\"}\n{\"text\": \"Two.\", \"id\": 2}\n")?;
/// let texts: Result<Vec<_>, _> = Documents::open(&path, ReadOptions::default())?.map(|d| d.map(|d| d.text)).collect();
/// assert_eq!(texts?, ["One.", "Two."]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Documents {
    path: PathBuf,
    format: Format,
    lines: Lines,
    bytes_read: Arc<AtomicU64>,
    bytes_total: u64,
    n_documents: u64,
    n_empty: u64,
    finished: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    JsonLines,
    Text,
}

#[derive(Deserialize)]
struct Record {
    text: String,
}

impl Documents {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotAFile`], [`Error::UnknownFormat`], [`Error::Empty`], [`Error::Binary`] for a file
    /// that starts like another format, [`Error::Compressed`], [`Error::Io`].
    pub fn open(path: &Path, options: ReadOptions) -> Result<Self> {
        // Opening a pipe would wait for a writer, so the kind of file is looked at first.
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "open"))?;
        if !metadata.is_file() {
            return Err(Error::NotAFile { path: path.to_owned() });
        }
        let (format, compressed) = format_of(path)?;
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let bytes_read = Arc::new(AtomicU64::new(0));
        let mut reader = BufReader::with_capacity(1 << 16, Counted { file, bytes_read: Arc::clone(&bytes_read) });
        let first = reader.fill_buf().map_err(Error::io(path, "read"))?;
        if first.is_empty() {
            return Err(Error::Empty { path: path.to_owned() });
        }
        let reader: Box<dyn BufRead + Send> = if compressed {
            if !starts_like_zstd(first) {
                return Err(Error::Compressed {
                    path: path.to_owned(),
                    line: 0,
                    message: "it does not start like zstd data; is it compressed at all?".to_owned(),
                });
            }
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(reader).map_err(Error::io(path, "decompress"))?;
            // The decoder's default refuses frames made with `zstd --long=31`.
            decoder.window_log_max(31).map_err(Error::io(path, "decompress"))?;
            Box::new(BufReader::with_capacity(1 << 17, decoder))
        } else {
            Box::new(reader)
        };
        let lines = Lines::new(reader, path, options.max_document_bytes, compressed)?;
        Ok(Documents {
            path: path.to_owned(),
            format,
            lines,
            bytes_read,
            bytes_total: metadata.len(),
            n_documents: 0,
            n_empty: 0,
            finished: false,
        })
    }

    /// Bytes of the file read so far; compressed bytes where it is compressed.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// The size of the file in bytes.
    pub fn bytes_total(&self) -> u64 {
        self.bytes_total
    }

    /// Documents left out so far because they held only white space.
    pub fn n_empty(&self) -> u64 {
        self.n_empty
    }

    fn read_document(&mut self) -> Result<Option<Document>> {
        loop {
            let Some(document) = (match self.format {
                Format::JsonLines => self.read_record()?,
                Format::Text => self.read_text()?,
            }) else {
                return match self.n_documents {
                    0 => Err(Error::NoDocuments { path: self.path.clone(), n_empty: self.n_empty }),
                    _ => Ok(None),
                };
            };
            if document.text.trim().is_empty() {
                self.n_empty += 1;
                continue;
            }
            self.n_documents += 1;
            return Ok(Some(document));
        }
    }

    fn read_record(&mut self) -> Result<Option<Document>> {
        while let Some((line, json)) = self.lines.next_line()? {
            if json.trim_ascii().is_empty() {
                continue;
            }
            return match serde_json::from_str::<Record>(json) {
                Ok(record) => Ok(Some(Document { text: record.text, line })),
                Err(error) => Err(explain(&self.path, line, json, &error)),
            };
        }
        Ok(None)
    }

    fn read_text(&mut self) -> Result<Option<Document>> {
        Ok(self.lines.rest()?.map(|text| Document { text, line: 1 }))
    }
}

impl fmt::Debug for Documents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Documents")
            .field("path", &self.path)
            .field("format", &self.format)
            .field("n_documents", &self.n_documents)
            .finish_non_exhaustive()
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let next = self.read_document().transpose();
        self.finished = !matches!(next, Some(Ok(_)));
        next
    }
}

struct Counted {
    file: File,
    bytes_read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buf)?;
        self.bytes_read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

fn format_of(path: &Path) -> Result<(Format, bool)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let (stem, compressed) = match name.strip_suffix(".zst") {
        Some(stem) => (stem, true),
        None => (name.as_str(), false),
    };
    let format = if stem.ends_with(".jsonl") {
        Format::JsonLines
    } else if stem.ends_with(".txt") {
        Format::Text
    } else {
        return Err(Error::UnknownFormat { path: path.to_owned() });
    };
    Ok((format, compressed))
}

/// A zstd frame, or a skippable frame, which some tools put first.
fn starts_like_zstd(bytes: &[u8]) -> bool {
    matches!(bytes, [0x28, 0xB5, 0x2F, 0xFD, ..] | [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..])
}

/// Says why a line is no record: not JSON, or JSON of another shape.
fn explain(path: &Path, line: u64, json: &str, error: &serde_json::Error) -> Error {
    use serde_json::Value;
    let kind = |value: &Value| match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    let found = match serde_json::from_str(json) {
        Ok(Value::Object(map)) => match map.get("text") {
            None => {
                let keys: Vec<_> = map.keys().take(8).map(|key| format!("\"{key}\"")).collect();
                format!(
                    "there is no \"text\" key (keys: {})",
                    if keys.is_empty() { "none".into() } else { keys.join(", ") }
                )
            }
            Some(Value::String(_)) => "\"text\" occurs more than once".to_owned(),
            Some(other) => format!("\"text\" is {}", kind(other)),
        },
        Ok(other) => format!("the line is {}", kind(&other)),
        Err(_) => {
            // The parser sees one line and calls it line 1; ours is the one that counts.
            let message = error.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            let message = format!("{message} at column {}", error.column());
            return Error::Json { path: path.to_owned(), line, message };
        }
    };
    Error::NoText { path: path.to_owned(), line, found }
}
