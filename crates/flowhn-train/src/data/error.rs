use std::path::PathBuf;

/// What the data path returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong between a text file and a batch.
///
/// Each message names the file, the place in it where there is one (lines count from 1, byte offsets from 0), and what to
/// do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A data set was asked for without a single file.
    #[error("no data files were given; list at least one .jsonl, .jsonl.zst or .txt file under [data]")]
    NoFiles,
    /// The file is not there.
    #[error("{path}: no such file; check the path (a relative one starts at the working directory)")]
    Missing {
        /// The path as given.
        path: PathBuf,
    },
    /// The path leads to a directory or a device.
    #[error("{path}: not a regular file; list the files themselves")]
    NotAFile {
        /// The path as given.
        path: PathBuf,
    },
    /// The name ends in none of the endings that say how to read the file.
    #[error("{path}: the ending says nothing about the format; expected .jsonl, .jsonl.zst, .txt, .txt.zst or .tokens")]
    UnknownFormat {
        /// The path as given.
        path: PathBuf,
    },
    /// The file (or what is compressed in it) has no bytes.
    #[error("{path}: the file is empty; remove it from the list or write it again")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file is readable and holds no document with text in it.
    #[error(
        "{path}: no documents: {n_empty} had no text but white space; remove the file from the list or write it again"
    )]
    NoDocuments {
        /// The file.
        path: PathBuf,
        /// How many documents were there and held only white space.
        n_empty: u64,
    },
    /// The file is not text.
    #[error("{path}: line {line}, byte {offset}: not text: {what}; {remedy}")]
    Binary {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The byte offset in the (decompressed) file, from 0.
        offset: u64,
        /// What was recognised.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A byte sequence that is not UTF-8.
    #[error("{path}: line {line}, byte {offset}: invalid UTF-8; convert the file to UTF-8, for example with iconv")]
    Utf8 {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The byte offset in the (decompressed) file, from 0.
        offset: u64,
    },
    /// A line, or a whole text file, is larger than the limit.
    #[error(
        "{path}: line {line}: the document is longer than {limit} bytes; split it, or raise the limit on document bytes"
    )]
    DocumentTooLong {
        /// The file.
        path: PathBuf,
        /// The line on which the document starts, from 1.
        line: u64,
        /// The limit in bytes.
        limit: usize,
    },
    /// A line of a JSON lines file is not JSON.
    #[error(
        "{path}: line {line}: not valid JSON: {message}; each line must be one object such as {{\"text\": \"...\"}}"
    )]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The parser's words, with the column.
        message: String,
    },
    /// A line is JSON without a string under `"text"`.
    #[error("{path}: line {line}: {found}; each line must be an object with a string under \"text\"")]
    NoText {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What stands there instead.
        found: String,
    },
    /// A zstd file ends early or does not decode.
    #[error("{path}: after line {line}: broken zstd data: {message}; copy or compress the file again")]
    Compressed {
        /// The file.
        path: PathBuf,
        /// How many complete lines could be read.
        line: u64,
        /// What the decoder said.
        message: String,
    },
    /// The source changed while its shard was being built.
    #[error("{path}: the file changed while it was being tokenised; start again once nothing writes to it")]
    SourceChanged {
        /// The source.
        path: PathBuf,
    },

    /// A tokenizer file that does not load, or a tokenizer that failed on a text.
    #[error("{path}: tokenizer: {message}")]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// No token marks the end of a text.
    #[error("{path}: the tokenizer has no end-of-text token {wanted}; its special tokens are: {special}")]
    NoEndOfText {
        /// The tokenizer file.
        path: PathBuf,
        /// What was looked for.
        wanted: String,
        /// The special tokens that exist, for a choice.
        special: String,
    },
    /// The tokenizer makes ids that the model has no embedding for.
    #[error(
        "{path}: the tokenizer has {tokenizer} entries, the model's vocab_size is {model}; \
         set model.vocab_size to at least {tokenizer} or choose a smaller tokenizer"
    )]
    VocabTooLarge {
        /// The tokenizer file.
        path: PathBuf,
        /// Largest id plus one.
        tokenizer: usize,
        /// The model's `vocab_size`.
        model: usize,
    },
    /// Something was made with another tokenizer.
    #[error("{whose} was made with tokenizer {stored}, but {path} is {loaded}; use the tokenizer it was made with")]
    TokenizerMismatch {
        /// What carries the stored fingerprint, for example "the checkpoint".
        whose: String,
        /// The fingerprint it carries.
        stored: super::Fingerprint,
        /// The fingerprint of the tokenizer at hand.
        loaded: super::Fingerprint,
        /// The tokenizer file at hand.
        path: PathBuf,
    },
    /// An id that the tokenizer has no token for.
    #[error("token id {id} is outside the tokenizer's {vocab_size} entries; the model and the tokenizer do not match")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Largest id plus one.
        vocab_size: usize,
    },
    /// A vocabulary size that byte-level BPE cannot have.
    #[error(
        "a byte-level vocabulary needs at least {min} entries (256 bytes and end-of-text), {wanted} were asked for"
    )]
    VocabTooSmall {
        /// The smallest size.
        min: usize,
        /// The size asked for.
        wanted: usize,
    },

    /// A token shard that cannot be used.
    #[error("{path}: token shard: {problem}; delete it, it will be rebuilt from the text")]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        problem: ShardProblem,
    },
    /// Two data sets that should share a vocabulary do not.
    #[error("{first} and {second} were tokenised with different tokenizers; delete the shards, they will be rebuilt")]
    MixedTokenizers {
        /// One shard.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// Data made for a larger vocabulary than the model's.
    #[error(
        "the data are tokenised for {data} entries, the model's vocab_size is {model}; set model.vocab_size to at least {data}"
    )]
    DataVocab {
        /// Entries of the tokenizer that made the data.
        data: usize,
        /// The model's `vocab_size`.
        model: usize,
    },
    /// An id in a shard outside the vocabulary it was made for.
    #[error(
        "{path}: token {position} has id {id}, outside a vocabulary of {vocab_size}; delete the shard, it will be rebuilt"
    )]
    TokenOutOfRange {
        /// The shard.
        path: PathBuf,
        /// The position of the token in the shard, from 0.
        position: u64,
        /// The id.
        id: u32,
        /// The size of the vocabulary.
        vocab_size: u32,
    },

    /// The data set does not fill one window.
    #[error(
        "the training text has {n_tokens} tokens, fewer than one sequence of {seq_len}; add text or lower model.seq_len"
    )]
    TooShort {
        /// Tokens at hand.
        n_tokens: u64,
        /// The length of a sequence.
        seq_len: usize,
    },
    /// A setting outside its range.
    #[error("{name} is {value}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// The range.
        expected: &'static str,
    },
    /// A split that leaves one side without documents.
    #[error(
        "valid_frac = {valid_frac} leaves no documents for {side} out of {n_documents}; \
         change data.valid_frac or name validation files under data.valid"
    )]
    EmptySplit {
        /// The fraction asked for.
        valid_frac: f64,
        /// "training" or "validation".
        side: &'static str,
        /// Documents before the split.
        n_documents: u64,
    },
    /// A sampler state that belongs to another data set or another run.
    #[error(
        "the sampler's state has {field} {stored}, this run has {current}; \
         resume with the data and settings of the checkpoint, or start a new run"
    )]
    StateMismatch {
        /// What differs.
        field: &'static str,
        /// Its value in the state.
        stored: String,
        /// Its value now.
        current: String,
    },

    /// There is no room for a file.
    #[error("{path}: the disk is full; free some space, or move the cache of token shards to another disk")]
    DiskFull {
        /// The file that did not fit.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, for example "write".
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be mapped into memory.
    #[error("{path}: cannot map into memory: {source}")]
    Map {
        /// The file.
        path: PathBuf,
        /// What the mapping said.
        source: Box<flowhn_torch::Error>,
    },
    /// The thread that reads ahead is gone.
    #[error("the thread that reads batches ahead stopped: {message}")]
    Prefetch {
        /// Its last words.
        message: String,
    },
}

/// What can be wrong with a token shard.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardProblem {
    /// The first bytes are not those of a shard.
    #[error("not a token shard (wrong magic bytes)")]
    Magic,
    /// Written by a version that this one does not read.
    #[error("format version {found}, this build reads {expected}")]
    Version {
        /// The version in the file.
        found: u32,
        /// The version of this build.
        expected: u32,
    },
    /// The header contradicts itself or its checksum.
    #[error("damaged header ({0})")]
    Header(&'static str),
    /// The file is shorter or longer than its header says.
    #[error("{found} bytes long, its header says {expected} (a torn copy?)")]
    Length {
        /// Bytes that the header calls for.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// The payload does not have the checksum that the header records.
    #[error("checksum {found:016x}, its header says {expected:016x}")]
    Checksum {
        /// The checksum in the header.
        expected: u64,
        /// The checksum of the bytes.
        found: u64,
    },
    /// The document index contradicts the tokens.
    #[error("damaged document index (document {0})")]
    Index(u64),
    /// The byte counts do not add up to the text's size.
    #[error("byte counts add up to {found}, its header says {expected}")]
    TextBytes {
        /// The size in the header.
        expected: u64,
        /// The sum of the counts.
        found: u64,
    },
}

impl Error {
    /// Wraps an I/O error with the file and the action; a missing file becomes [`Error::Missing`], a full disk
    /// [`Error::DiskFull`].
    pub(super) fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| match (source.kind(), action) {
            (std::io::ErrorKind::NotFound, "open") => Error::Missing { path },
            (std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded, _) => Error::DiskFull { path },
            _ => Error::Io { path, action, source },
        }
    }

    pub(super) fn shard(path: impl Into<PathBuf>, problem: ShardProblem) -> Error {
        Error::Shard { path: path.into(), problem }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn io_errors_with_a_remedy_have_a_variant() {
        let of = |kind: ErrorKind, action| Error::io("a/b", action)(kind.into()).to_string();
        assert!(of(ErrorKind::NotFound, "open").starts_with("a/b: no such file"));
        assert!(of(ErrorKind::StorageFull, "write").starts_with("a/b: the disk is full; free some space"));
        assert!(of(ErrorKind::PermissionDenied, "write").starts_with("a/b: cannot write: permission denied"));
    }
}
