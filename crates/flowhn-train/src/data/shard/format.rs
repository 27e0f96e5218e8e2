//! The bytes of a shard; the table is in the documentation of [`Shard`](super::Shard).

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_64;

use super::{DocumentEntry, ShardMeta};
use crate::data::{Fingerprint, ShardProblem};

pub(super) const HEADER_BYTES: usize = 128;
pub(super) const DOCUMENT_BYTES: usize = 32;
/// Stands in the byte counts for a count that does not fit.
pub(super) const LONG: u8 = 255;
const MAGIC: [u8; 8] = *b"FLOWTOK\x1A";
/// Raised whenever the bytes of a shard for the same text and tokenizer change.
pub(in crate::data) const VERSION: u32 = 1;

// Byte offsets of the header's fields. What is not named is zero.
const AT_VERSION: usize = 8;
const AT_WIDTH: usize = 12;
const AT_TOKENS: usize = 16;
const AT_DOCUMENTS: usize = 24;
const AT_TEXT_BYTES: usize = 32;
const AT_LONG: usize = 40;
const AT_VOCAB: usize = 48;
const AT_EOT: usize = 52;
const AT_TOKENIZER: usize = 56;
const AT_PAYLOAD_CHECKSUM: usize = 72;
const AT_HEADER_CHECKSUM: usize = 120;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub meta: ShardMeta,
    pub token_width: usize,
    pub n_tokens: u64,
    pub n_documents: u64,
    pub n_long: u64,
    pub text_bytes: u64,
    pub payload_checksum: u64,
}

/// Where the sections are.
pub(super) struct Layout {
    pub tokens: Range<usize>,
    pub byte_counts: Range<usize>,
    pub long_counts: Range<usize>,
    pub documents: Range<usize>,
}

/// Two bytes hold every id of a vocabulary of up to 65,536.
pub(super) fn token_width(vocab_size: u32) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Zero bytes that bring a section of `len` bytes to a multiple of eight.
pub(super) fn padding(len: u64) -> usize {
    (len.next_multiple_of(8) - len) as usize
}

impl Header {
    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(AT_VERSION, &VERSION.to_le_bytes());
        put(AT_WIDTH, &(self.token_width as u32).to_le_bytes());
        put(AT_TOKENS, &self.n_tokens.to_le_bytes());
        put(AT_DOCUMENTS, &self.n_documents.to_le_bytes());
        put(AT_TEXT_BYTES, &self.text_bytes.to_le_bytes());
        put(AT_LONG, &self.n_long.to_le_bytes());
        put(AT_VOCAB, &self.meta.vocab_size.to_le_bytes());
        put(AT_EOT, &self.meta.eot_id.to_le_bytes());
        put(AT_TOKENIZER, &self.meta.tokenizer.0);
        put(AT_PAYLOAD_CHECKSUM, &self.payload_checksum.to_le_bytes());
        let checksum = xxh3_64(&bytes[..AT_HEADER_CHECKSUM]);
        bytes[AT_HEADER_CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the header of a file of at least [`HEADER_BYTES`] and checks it against the file's length.
    pub(super) fn parse(file: &[u8]) -> Result<(Header, Layout), ShardProblem> {
        let bytes = &file[..HEADER_BYTES];
        if bytes[..8] != MAGIC {
            return Err(ShardProblem::Magic);
        }
        // The version comes before the checksum: a later version may keep its checksum elsewhere.
        let found = u32_at(bytes, AT_VERSION);
        if found != VERSION {
            return Err(ShardProblem::Version { found, expected: VERSION });
        }
        if u64_at(bytes, AT_HEADER_CHECKSUM) != xxh3_64(&bytes[..AT_HEADER_CHECKSUM]) {
            return Err(ShardProblem::Header("checksum"));
        }
        let mut tokenizer = [0; 16];
        tokenizer.copy_from_slice(&bytes[AT_TOKENIZER..AT_TOKENIZER + 16]);
        let header = Header {
            meta: ShardMeta {
                vocab_size: u32_at(bytes, AT_VOCAB),
                eot_id: u32_at(bytes, AT_EOT),
                tokenizer: Fingerprint(tokenizer),
            },
            token_width: u32_at(bytes, AT_WIDTH) as usize,
            n_tokens: u64_at(bytes, AT_TOKENS),
            n_documents: u64_at(bytes, AT_DOCUMENTS),
            n_long: u64_at(bytes, AT_LONG),
            text_bytes: u64_at(bytes, AT_TEXT_BYTES),
            payload_checksum: u64_at(bytes, AT_PAYLOAD_CHECKSUM),
        };
        if header.token_width != token_width(header.meta.vocab_size) {
            return Err(ShardProblem::Header("bytes per token"));
        }
        if header.meta.eot_id >= header.meta.vocab_size {
            return Err(ShardProblem::Header("end-of-text id"));
        }
        if header.n_documents == 0 || header.n_documents > header.n_tokens {
            return Err(ShardProblem::Header("number of documents"));
        }
        let layout = header.layout().ok_or(ShardProblem::Header("counts"))?;
        let (expected, found) = (layout.documents.end as u64, file.len() as u64);
        if expected != found {
            return Err(ShardProblem::Length { expected, found });
        }
        Ok((header, layout))
    }

    /// `None` where the counts are too large for any file.
    fn layout(&self) -> Option<Layout> {
        let mut at = HEADER_BYTES;
        let mut section = |n: u64, bytes_each: usize| {
            let start = at.checked_next_multiple_of(8)?;
            let len = usize::try_from(n).ok()?.checked_mul(bytes_each)?;
            at = start.checked_add(len)?;
            Some(start..at)
        };
        Some(Layout {
            tokens: section(self.n_tokens, self.token_width)?,
            byte_counts: section(self.n_tokens, 1)?,
            long_counts: section(self.n_long, 16)?,
            documents: section(self.n_documents, DOCUMENT_BYTES)?,
        })
    }
}

pub(super) fn document_bytes(document: &DocumentEntry) -> [u8; DOCUMENT_BYTES] {
    let fields = [document.start, document.text_bytes, document.text_hash, document.line];
    let mut bytes = [0; DOCUMENT_BYTES];
    for (slot, field) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
        *slot = field.to_le_bytes();
    }
    bytes
}

pub(super) fn parse_document(bytes: &[u8]) -> DocumentEntry {
    DocumentEntry {
        start: u64_at(bytes, 0),
        text_bytes: u64_at(bytes, 8),
        text_hash: u64_at(bytes, 16),
        line: u64_at(bytes, 24),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_bytes_and_absurd_counts_do_not() {
        let header = Header {
            meta: ShardMeta { vocab_size: 70_000, eot_id: 3, tokenizer: Fingerprint([7; 16]) },
            token_width: 4,
            n_tokens: 5,
            n_documents: 2,
            n_long: 1,
            text_bytes: 300,
            payload_checksum: 9,
        };
        // 128 + 20 -> 148 | 152 + 5 -> 157 | 160 + 16 | 176 + 64
        let mut file = header.to_bytes().to_vec();
        file.resize(240, 0);
        let (parsed, layout) = Header::parse(&file).unwrap();
        assert_eq!(parsed, header);
        assert_eq!(layout.byte_counts, 152..157);
        assert_eq!(layout.documents, 176..240);

        let absurd = Header { n_tokens: u64::MAX / 2, ..header }.to_bytes();
        assert_eq!(Header::parse(&absurd).err(), Some(ShardProblem::Header("counts")));
    }
}
