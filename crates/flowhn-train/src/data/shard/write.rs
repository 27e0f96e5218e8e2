use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::format::{self, Header};
use super::{DocumentEntry, ShardMeta};
use crate::data::atomic::AtomicFile;
use crate::data::{Encoded, Error, Result};

/// Writes a [`Shard`](super::Shard) document by document; the file appears when [`finish`](ShardWriter::finish) has
/// made it durable, and never half-written.
///
/// Memory grows by 32 bytes a document; tokens and byte counts go to disk as they come.
pub struct ShardWriter {
    file: AtomicFile,
    checksum: Xxh3,
    /// Byte counts wait in an unnamed file, as their section comes after all tokens.
    counts: BufWriter<File>,
    long_counts: Vec<(u64, u64)>,
    documents: Vec<DocumentEntry>,
    meta: ShardMeta,
    n_tokens: u64,
    text_bytes: u64,
    buffer: Vec<u8>,
}

impl fmt::Debug for ShardWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardWriter")
            .field("path", &self.file.target())
            .field("meta", &self.meta)
            .field("n_tokens", &self.n_tokens)
            .finish_non_exhaustive()
    }
}

impl ShardWriter {
    /// Starts a shard that will be called `path`.
    ///
    /// # Errors
    /// [`Error::Setting`] where the end-of-text id is outside the vocabulary, [`Error::Io`].
    pub fn create(path: &Path, meta: ShardMeta) -> Result<Self> {
        if meta.eot_id >= meta.vocab_size {
            let value = meta.eot_id.to_string();
            return Err(Error::Setting { name: "eot_id", value, expected: "an id below vocab_size" });
        }
        let mut file = AtomicFile::create(path)?;
        file.write(&[0; format::HEADER_BYTES])?;
        let counts = file.scratch()?;
        Ok(ShardWriter {
            file,
            checksum: Xxh3::new(),
            counts: BufWriter::with_capacity(1 << 16, counts),
            long_counts: Vec::new(),
            documents: Vec::new(),
            meta,
            n_tokens: 0,
            text_bytes: 0,
            buffer: Vec::new(),
        })
    }

    /// Tokens written so far.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Documents written so far.
    pub fn n_documents(&self) -> u64 {
        self.documents.len() as u64
    }

    /// UTF-8 bytes of the text of the documents written so far.
    pub fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    /// Adds a document: an end-of-text token, then its tokens. `text_bytes` is the size of its text, at least the sum of
    /// the byte counts; `text_hash` any hash of it; `line` where it starts in its source.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], [`Error::Setting`] for `text_bytes` below the sum of the byte counts, [`Error::Io`].
    pub fn push(&mut self, document: &Encoded, text_bytes: u64, text_hash: u64, line: u64) -> Result<()> {
        let vocab_size = self.meta.vocab_size;
        if let Some(at) = document.ids.iter().position(|&id| id >= vocab_size) {
            let (path, position) = (self.file.target().to_owned(), self.n_tokens + 1 + at as u64);
            return Err(Error::TokenOutOfRange { path, position, id: document.ids[at], vocab_size });
        }
        let covered: u64 = document.byte_lens.iter().map(|&n| u64::from(n)).sum();
        // Text that became no token at all is charged to the end-of-text, so that totals stay those of the text.
        let Some(eot_bytes) = text_bytes.checked_sub(covered) else {
            let value = text_bytes.to_string();
            return Err(Error::Setting { name: "text_bytes", value, expected: "at least the sum of the byte counts" });
        };

        let start = self.n_tokens;
        self.documents.push(DocumentEntry { start, text_bytes, text_hash, line });
        self.buffer.clear();
        let ids = std::iter::once(self.meta.eot_id).chain(document.ids.iter().copied());
        match format::token_width(vocab_size) {
            2 => ids.for_each(|id| self.buffer.extend_from_slice(&(id as u16).to_le_bytes())),
            _ => ids.for_each(|id| self.buffer.extend_from_slice(&id.to_le_bytes())),
        }
        self.checksum.update(&self.buffer);
        self.file.write(&self.buffer)?;

        self.buffer.clear();
        let counts = std::iter::once(eot_bytes).chain(document.byte_lens.iter().map(|&n| u64::from(n)));
        for (position, count) in (start..).zip(counts) {
            match u8::try_from(count) {
                Ok(short) if short != format::LONG => self.buffer.push(short),
                _ => {
                    self.buffer.push(format::LONG);
                    self.long_counts.push((position, count));
                }
            }
        }
        self.counts.write_all(&self.buffer).map_err(Error::io(self.file.target(), "write"))?;
        self.n_tokens += 1 + document.ids.len() as u64;
        self.text_bytes += text_bytes;
        Ok(())
    }

    /// Completes the shard and puts it in its place.
    ///
    /// # Errors
    /// [`Error::NoDocuments`] where nothing was pushed, [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        if self.documents.is_empty() {
            return Err(Error::NoDocuments { path: self.file.target().to_owned(), n_empty: 0 });
        }
        let token_width = format::token_width(self.meta.vocab_size);
        self.pad(self.n_tokens * token_width as u64)?;
        self.append_counts()?;
        self.pad(self.n_tokens)?;
        let n_long = self.long_counts.len() as u64;
        for (position, count) in std::mem::take(&mut self.long_counts) {
            self.append(&position.to_le_bytes())?;
            self.append(&count.to_le_bytes())?;
        }
        let documents = std::mem::take(&mut self.documents);
        for document in &documents {
            self.append(&format::document_bytes(document))?;
        }
        let header = Header {
            meta: self.meta,
            token_width,
            n_tokens: self.n_tokens,
            n_documents: documents.len() as u64,
            n_long,
            text_bytes: self.text_bytes,
            payload_checksum: self.checksum.digest(),
        };
        self.file.rewrite_start(&header.to_bytes())?;
        self.file.commit()
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.checksum.update(bytes);
        self.file.write(bytes)
    }

    fn pad(&mut self, len: u64) -> Result<()> {
        self.append(&[0; 8][..format::padding(len)])
    }

    fn append_counts(&mut self) -> Result<()> {
        let path = self.file.target().to_owned();
        self.counts.flush().map_err(Error::io(&path, "write"))?;
        self.counts.get_mut().seek(SeekFrom::Start(0)).map_err(Error::io(&path, "write"))?;
        let mut chunk = vec![0; 1 << 16];
        loop {
            let n = self.counts.get_mut().read(&mut chunk).map_err(Error::io(&path, "write"))?;
            if n == 0 {
                return Ok(());
            }
            self.append(&chunk[..n])?;
        }
    }
}
