use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::{Error, Fingerprint, Result, Shard, ShardMeta};

/// Salts the hash that splits documents, so that the split is independent of other uses of the hash.
const SPLIT_SALT: u64 = 0x466C_6F77_484E_0001;

/// A stream of tokens: whole documents of one or more shards, one after another.
///
/// Position `n_tokens()` holds one more end-of-text, which closes the last document. Cloning is cheap.
#[derive(Clone)]
pub struct Dataset {
    parts: Arc<[Part]>,
    pieces: Arc<[Piece]>,
    meta: ShardMeta,
    n_tokens: u64,
    n_documents: u64,
    text_bytes: u64,
    fingerprint: Fingerprint,
}

struct Part {
    shard: Shard,
    source: PathBuf,
}

/// Neighbouring documents of one shard.
#[derive(Debug, Clone)]
struct Piece {
    part: usize,
    documents: Range<u64>,
    /// Positions in the shard.
    tokens: Range<u64>,
    /// The position of the first token in the stream.
    start: u64,
}

/// Where a document comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentRef {
    /// The text file (or the shard, where a shard was listed).
    pub source: PathBuf,
    /// The line on which the document starts, from 1.
    pub line: u64,
    /// Its index among the documents of that file, from 0.
    pub index: u64,
}

impl fmt::Display for DocumentRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.source.display(), self.line)
    }
}

impl Dataset {
    /// Joins shards, each with the file it was made from.
    ///
    /// # Errors
    /// [`Error::NoFiles`] for none, [`Error::MixedTokenizers`].
    pub fn new(shards: Vec<(Shard, PathBuf)>) -> Result<Self> {
        let (first, rest) = shards.split_first().ok_or(Error::NoFiles)?;
        if let Some((other, _)) = rest.iter().find(|(shard, _)| shard.meta() != first.0.meta()) {
            let (first, second) = (first.0.path().to_owned(), other.path().to_owned());
            return Err(Error::MixedTokenizers { first, second });
        }
        let parts: Arc<[Part]> = shards.into_iter().map(|(shard, source)| Part { shard, source }).collect();
        let documents: Vec<_> =
            parts.iter().enumerate().map(|(idx, part)| (idx, 0..part.shard.n_documents())).collect();
        Ok(Self::of_documents(parts, documents))
    }

    fn of_documents(parts: Arc<[Part]>, runs: Vec<(usize, Range<u64>)>) -> Self {
        let meta = parts[0].shard.meta();
        let mut hasher = Xxh3::new();
        hasher.update(&meta.tokenizer.0);
        let (mut n_tokens, mut n_documents, mut text_bytes) = (0, 0, 0);
        let mut pieces = Vec::with_capacity(runs.len());
        for (part, documents) in runs {
            let shard = &parts[part].shard;
            let end = match documents.end {
                end if end == shard.n_documents() => shard.n_tokens(),
                end => shard.document(end).start,
            };
            let tokens = shard.document(documents.start).start..end;
            for word in [shard.checksum(), documents.start, documents.end] {
                hasher.update(&word.to_le_bytes());
            }
            text_bytes += match documents.end - documents.start {
                n if n == shard.n_documents() => shard.text_bytes(),
                _ => documents.clone().map(|idx| shard.document(idx).text_bytes).sum(),
            };
            n_documents += documents.end - documents.start;
            let len = tokens.end - tokens.start;
            pieces.push(Piece { part, documents, tokens, start: n_tokens });
            n_tokens += len;
        }
        let (pieces, fingerprint) = (pieces.into(), Fingerprint::finish(&hasher));
        Dataset { parts, pieces, meta, n_tokens, n_documents, text_bytes, fingerprint }
    }

    /// Tokens, one end-of-text for each document included; also the number of targets that can be predicted.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Documents.
    pub fn n_documents(&self) -> u64 {
        self.n_documents
    }

    /// UTF-8 bytes of the text.
    pub fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    /// Entries of the tokenizer's vocabulary.
    pub fn vocab_size(&self) -> u32 {
        self.meta.vocab_size
    }

    /// Makes sure that a model of `vocab_size` entries has an embedding for every token.
    ///
    /// # Errors
    /// [`Error::DataVocab`].
    pub fn check_vocab_size(&self, vocab_size: usize) -> Result<()> {
        match self.meta.vocab_size as usize {
            data if data <= vocab_size => Ok(()),
            data => Err(Error::DataVocab { data, model: vocab_size }),
        }
    }

    /// The end-of-text token.
    pub fn eot_id(&self) -> u32 {
        self.meta.eot_id
    }

    /// The tokenizer that made the tokens.
    pub fn tokenizer(&self) -> Fingerprint {
        self.meta.tokenizer
    }

    /// A hash of the tokens and their order.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Parts the documents into training and validation by a hash of their text.
    ///
    /// About `valid_frac` of the documents go to validation. A document's side depends on its text and the fraction
    /// alone, so it survives additions and reordering, and copies of one text stay on one side.
    ///
    /// # Errors
    /// [`Error::Setting`] where `valid_frac` is not between 0 and 1, [`Error::EmptySplit`].
    pub fn split(&self, valid_frac: f64) -> Result<(Dataset, Dataset)> {
        if !(valid_frac > 0.0 && valid_frac < 1.0) {
            let value = valid_frac.to_string();
            return Err(Error::Setting { name: "data.valid_frac", value, expected: "a number between 0 and 1" });
        }
        // 2^64 times a double below 1 is exact and below 2^64.
        let threshold = (valid_frac * 2f64.powi(64)) as u64;
        let mut sides: [Vec<(usize, Range<u64>)>; 2] = [Vec::new(), Vec::new()];
        for piece in self.pieces.iter() {
            for idx in piece.documents.clone() {
                let text_hash = self.parts[piece.part].shard.document(idx).text_hash;
                let valid = xxh3_64_with_seed(&text_hash.to_le_bytes(), SPLIT_SALT) < threshold;
                let side = &mut sides[usize::from(valid)];
                match side.last_mut() {
                    Some((part, run)) if *part == piece.part && run.end == idx => run.end += 1,
                    _ => side.push((piece.part, idx..idx + 1)),
                }
            }
        }
        for (side, name) in sides.iter().zip(["training", "validation"]) {
            if side.is_empty() {
                return Err(Error::EmptySplit { valid_frac, side: name, n_documents: self.n_documents });
            }
        }
        let [train, valid] = sides.map(|side| Self::of_documents(Arc::clone(&self.parts), side));
        Ok((train, valid))
    }

    /// Appends the tokens of some positions, of which the last may be the closing end-of-text at `n_tokens()`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] where a shard was changed after it was opened.
    ///
    /// # Panics
    /// Where the range ends after `n_tokens() + 1`.
    pub fn tokens(&self, range: Range<u64>, out: &mut Vec<i64>) -> Result<()> {
        assert!(range.end <= self.n_tokens + 1, "positions {range:?} of {}", self.n_tokens);
        let vocab_size = self.meta.vocab_size;
        for (piece, span) in self.spans(range.clone()) {
            let shard = &self.parts[piece.part].shard;
            let from = out.len();
            shard.tokens(span.clone(), out);
            if let Some(at) = out[from..].iter().position(|&id| id >= i64::from(vocab_size)) {
                let (path, position) = (shard.path().to_owned(), span.start + at as u64);
                return Err(Error::TokenOutOfRange { path, position, id: out[from + at] as u32, vocab_size });
            }
        }
        if range.contains(&self.n_tokens) {
            out.push(i64::from(self.meta.eot_id));
        }
        Ok(())
    }

    /// UTF-8 bytes of text behind the tokens of some positions; the closing end-of-text counts none.
    pub fn bytes_behind(&self, range: Range<u64>) -> u64 {
        self.spans(range).map(|(piece, span)| self.parts[piece.part].shard.bytes_behind(span)).sum()
    }

    /// The positions at which documents begin, among some positions of the stream.
    pub fn document_starts(&self, range: Range<u64>) -> Vec<u64> {
        let mut starts = Vec::new();
        for (piece, span) in self.spans(range) {
            let shard = &self.parts[piece.part].shard;
            let documents = shard.document_at(span.start)..piece.documents.end;
            let inside = documents
                .map(|idx| shard.document(idx).start)
                .skip_while(|&start| start < span.start)
                .take_while(|&start| start < span.end);
            starts.extend(inside.map(|start| piece.start + (start - piece.tokens.start)));
        }
        starts
    }

    /// The documents that own some positions of the stream, in order.
    pub fn documents(&self, range: Range<u64>) -> Vec<DocumentRef> {
        let mut documents = Vec::new();
        for (piece, span) in self.spans(range) {
            let part = &self.parts[piece.part];
            let (first, last) = (part.shard.document_at(span.start), part.shard.document_at(span.end - 1));
            documents.extend((first..=last).map(|idx| DocumentRef {
                source: part.source.clone(),
                line: part.shard.document(idx).line,
                index: idx,
            }));
        }
        documents
    }

    /// The pieces under some positions of the stream, each with its positions in its shard. None is empty.
    fn spans(&self, range: Range<u64>) -> impl Iterator<Item = (&Piece, Range<u64>)> {
        let first = self.pieces.partition_point(|piece| piece.start <= range.start).saturating_sub(1);
        self.pieces[first..].iter().take_while(move |piece| piece.start < range.end).filter_map(move |piece| {
            let to_shard =
                |position: u64| (piece.tokens.start + position.saturating_sub(piece.start)).min(piece.tokens.end);
            let span = to_shard(range.start)..to_shard(range.end);
            (span.start < span.end).then_some((piece, span))
        })
    }
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dataset")
            .field("sources", &self.parts.iter().map(|part| &part.source).collect::<Vec<_>>())
            .field("n_tokens", &self.n_tokens)
            .field("n_documents", &self.n_documents)
            .field("text_bytes", &self.text_bytes)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}
