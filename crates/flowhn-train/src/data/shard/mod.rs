//! Token shards: the tokens of one text file, ready to be mapped into memory.

mod format;
mod write;

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use flowhn_torch::MappedFile;
use xxhash_rust::xxh3::xxh3_64;

pub(super) use self::format::VERSION;
use self::format::{Header, Layout};
pub use self::write::ShardWriter;
use super::{Error, Fingerprint, Result, ShardProblem};

/// What a shard must know of the tokenizer that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardMeta {
    /// Ids are below this; up to 65,536 they take two bytes each, above that four.
    pub vocab_size: u32,
    /// The id that opens every document.
    pub eot_id: u32,
    /// The tokenizer.
    pub tokenizer: Fingerprint,
}

/// One document of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DocumentEntry {
    /// The position of its end-of-text token in the shard.
    pub start: u64,
    /// UTF-8 bytes of its text.
    pub text_bytes: u64,
    /// A hash of its text, by which documents are split into training and validation.
    pub text_hash: u64,
    /// The line of the source file on which it starts, from 1.
    pub line: u64,
}

/// A token shard, mapped into memory and checked.
///
/// # File
///
/// Little-endian throughout, every section starts at a multiple of eight bytes:
///
/// | section | bytes | contents |
/// |---|---|---|
/// | header | 128 | magic, version, bytes per token, counts, vocabulary, tokenizer, checksums |
/// | tokens | `n_tokens` x 2 or 4 | ids; each document is an end-of-text token and then its text |
/// | byte counts | `n_tokens` | UTF-8 bytes behind each token, 255 for "see below" |
/// | long counts | `n_long` x 16 | position and count of the tokens of 255 bytes or more |
/// | documents | `n_documents` x 32 | start, text bytes, hash of the text, line |
pub struct Shard {
    path: PathBuf,
    map: MappedFile,
    header: Header,
    layout: Layout,
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard").field("path", &self.path).field("header", &self.header).finish_non_exhaustive()
    }
}

impl Shard {
    /// Maps a shard and checks all of it: header, length, checksum, document index, range of the ids.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Shard`], [`Error::TokenOutOfRange`], [`Error::Io`], [`Error::Map`].
    pub fn open(path: &Path) -> Result<Self> {
        let problem = |problem| Error::shard(path, problem);
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "open"))?;
        if !metadata.is_file() {
            return Err(Error::NotAFile { path: path.to_owned() });
        }
        // An empty file cannot be mapped, and anything shorter than a header is torn.
        if metadata.len() < format::HEADER_BYTES as u64 {
            let expected = format::HEADER_BYTES as u64;
            return Err(problem(ShardProblem::Length { expected, found: metadata.len() }));
        }
        let map =
            MappedFile::open(path).map_err(|source| Error::Map { path: path.to_owned(), source: Box::new(source) })?;
        let (header, layout) = Header::parse(&map).map_err(problem)?;
        let shard = Shard { path: path.to_owned(), map, header, layout };
        shard.verify()?;
        Ok(shard)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tokenizer's facts.
    pub fn meta(&self) -> ShardMeta {
        self.header.meta
    }

    /// Tokens, one end-of-text for each document included.
    pub fn n_tokens(&self) -> u64 {
        self.header.n_tokens
    }

    /// Documents.
    pub fn n_documents(&self) -> u64 {
        self.header.n_documents
    }

    /// UTF-8 bytes of the text of all documents.
    pub fn text_bytes(&self) -> u64 {
        self.header.text_bytes
    }

    /// Bytes an id takes, 2 or 4.
    pub fn token_width(&self) -> usize {
        self.header.token_width
    }

    /// The checksum of everything after the header.
    pub fn checksum(&self) -> u64 {
        self.header.payload_checksum
    }

    /// A document by its index.
    ///
    /// # Panics
    /// Where `idx >= n_documents()`.
    pub fn document(&self, idx: u64) -> DocumentEntry {
        assert!(idx < self.header.n_documents, "document {idx} of {}", self.header.n_documents);
        let start = self.layout.documents.start + idx as usize * format::DOCUMENT_BYTES;
        format::parse_document(&self.map[start..start + format::DOCUMENT_BYTES])
    }

    /// The index of the document that holds the token at `position`.
    pub fn document_at(&self, position: u64) -> u64 {
        let (mut low, mut high) = (0, self.header.n_documents);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.document(middle).start <= position { low = middle + 1 } else { high = middle }
        }
        low.saturating_sub(1)
    }

    /// The tokens at some positions, appended to `out`.
    ///
    /// # Panics
    /// Where the range ends after `n_tokens()`.
    pub fn tokens(&self, range: Range<u64>, out: &mut Vec<i64>) {
        let width = self.header.token_width;
        let section = &self.map[self.layout.tokens.clone()];
        let bytes = &section[range.start as usize * width..range.end as usize * width];
        match width {
            2 => out.extend(bytes.as_chunks().0.iter().map(|&b| i64::from(u16::from_le_bytes(b)))),
            _ => out.extend(bytes.as_chunks().0.iter().map(|&b| i64::from(u32::from_le_bytes(b)))),
        }
    }

    /// UTF-8 bytes of text behind the tokens at some positions.
    ///
    /// # Panics
    /// Where the range ends after `n_tokens()`.
    pub fn bytes_behind(&self, range: Range<u64>) -> u64 {
        let counts = &self.map[self.layout.byte_counts.clone()][range.start as usize..range.end as usize];
        let short: u64 = counts.iter().filter(|&&n| n != format::LONG).map(|&n| u64::from(n)).sum();
        let long: u64 = self.long_counts().filter(|(position, _)| range.contains(position)).map(|(_, n)| n).sum();
        short + long
    }

    /// The tokens of 255 bytes and more, each with its count.
    fn long_counts(&self) -> impl Iterator<Item = (u64, u64)> {
        let entries = self.map[self.layout.long_counts.clone()].as_chunks::<16>().0;
        entries.iter().map(|entry| {
            let words = entry.as_chunks::<8>().0;
            (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1]))
        })
    }

    fn verify(&self) -> Result<()> {
        let problem = |problem| Err(Error::shard(&self.path, problem));
        let header = &self.header;
        let found = xxh3_64(&self.map[format::HEADER_BYTES..]);
        if found != header.payload_checksum {
            return problem(ShardProblem::Checksum { expected: header.payload_checksum, found });
        }
        self.verify_ids()?;
        let mut end = 0;
        let mut index_bytes = 0u64;
        for idx in 0..header.n_documents {
            let document = self.document(idx);
            let expected_start = if idx == 0 { 0 } else { end + 1 };
            if document.start < expected_start || (idx == 0 && document.start != 0) || document.start >= header.n_tokens
            {
                return problem(ShardProblem::Index(idx));
            }
            end = document.start;
            index_bytes = index_bytes.saturating_add(document.text_bytes);
        }
        for found in [index_bytes, self.bytes_behind(0..header.n_tokens)] {
            if found != header.text_bytes {
                return problem(ShardProblem::TextBytes { expected: header.text_bytes, found });
            }
        }
        Ok(())
    }

    fn verify_ids(&self) -> Result<()> {
        const CHUNK: u64 = 1 << 16;
        let vocab_size = self.header.meta.vocab_size;
        let mut ids = Vec::new();
        let mut start = 0;
        while start < self.header.n_tokens {
            let end = self.header.n_tokens.min(start + CHUNK);
            ids.clear();
            self.tokens(start..end, &mut ids);
            if let Some(at) = ids.iter().position(|&id| id >= i64::from(vocab_size)) {
                return Err(Error::TokenOutOfRange {
                    path: self.path.clone(),
                    position: start + at as u64,
                    id: ids[at] as u32,
                    vocab_size,
                });
            }
            start = end;
        }
        Ok(())
    }
}
