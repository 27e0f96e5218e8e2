//! Text files to token shards, built once and kept.

use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rayon::prelude::*;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{
    Dataset, Document, Documents, Encoded, Error, Event, Progress, ReadOptions, Result, Shard, ShardMeta, ShardWriter,
    Tokenizer, atomic, shard,
};

/// The ending of token shards, with which one can be listed among the data files.
pub const SHARD_EXTENSION: &str = "tokens";

/// Texts are tokenised in rounds of about this many bytes, so memory stays bounded while all threads have work.
const ROUND_BYTES: usize = 4 << 20;
const ROUND_DOCUMENTS: usize = 4096;

/// Where shards are kept and how text is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrepareOptions {
    /// The directory of the cache, created where it is missing.
    pub cache_dir: PathBuf,
    /// Limits on reading.
    pub read: ReadOptions,
}

/// Turns text files into a [`Dataset`], tokenising those that the cache does not hold yet.
///
/// A shard is kept under the file's name and a hash of its contents, the ending that says how to read it, the tokenizer
/// and the format's version, so an edited file or another tokenizer gets a shard of its own and nothing goes stale. A cached
/// shard that is damaged is built again, which [`Event::Rebuilding`] reports. Processes that want the same shard at once
/// wait for the one that builds it; a build that is killed leaves no shard.
///
/// A path ending in `.tokens` is a shard already: it is used as it is, and refused where it is damaged or was made with
/// another tokenizer.
///
/// # Errors
/// What [`Documents`], [`Tokenizer::encode`] and [`Shard::open`] can bring; [`Error::NoFiles`],
/// [`Error::TokenizerMismatch`], [`Error::SourceChanged`].
pub fn prepare(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &PrepareOptions,
    progress: &dyn Progress,
) -> Result<Dataset> {
    if files.is_empty() {
        return Err(Error::NoFiles);
    }
    // All files are looked at before the first is tokenised, which may take long.
    for file in files {
        if !is_shard(file) {
            Documents::open(file, options.read)?;
        } else if !file.exists() {
            return Err(Error::Missing { path: file.clone() });
        }
    }
    let mut parts = Vec::with_capacity(files.len());
    for source in files {
        let shard = if is_shard(source) {
            let shard = Shard::open(source)?;
            tokenizer.check_fingerprint(shard.meta().tokenizer, &source.display().to_string())?;
            shard
        } else {
            cached(source, tokenizer, options, progress)?
        };
        parts.push((shard, source.clone()));
    }
    Dataset::new(parts)
}

fn is_shard(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == SHARD_EXTENSION)
}

fn cached(source: &Path, tokenizer: &Tokenizer, options: &PrepareOptions, progress: &dyn Progress) -> Result<Shard> {
    let before = stamp(source)?;
    let target = options.cache_dir.join(shard_name(source, tokenizer)?);
    let usable = |shard: Shard| {
        progress.report(&Event::Cached { source, shard: &target, n_tokens: shard.n_tokens() });
        shard
    };
    // A shard appears by a rename, so one that is there is whole and needs no lock.
    if let Ok(shard) = open_cached(&target, tokenizer) {
        return Ok(usable(shard));
    }
    fs::create_dir_all(&options.cache_dir).map_err(Error::io(&options.cache_dir, "create the directory"))?;
    let _lock = lock(&target, source, progress)?;
    // Whoever held the lock before may have built it.
    match open_cached(&target, tokenizer) {
        Ok(shard) => return Ok(usable(shard)),
        Err(Error::Missing { .. }) => {}
        Err(error) => {
            progress.report(&Event::Rebuilding { source, shard: &target, reason: reason(&error) });
        }
    }
    atomic::remove_stale(&target);
    build(source, tokenizer, &target, options.read, before, progress)?;
    open_cached(&target, tokenizer)
}

fn open_cached(target: &Path, tokenizer: &Tokenizer) -> Result<Shard> {
    let shard = Shard::open(target)?;
    tokenizer.check_fingerprint(shard.meta().tokenizer, &target.display().to_string())?;
    Ok(shard)
}

/// What is wrong with a shard, without the remedy, which is under way.
fn reason(error: &Error) -> String {
    match error {
        Error::Shard { problem, .. } => problem.to_string(),
        Error::TokenOutOfRange { position, id, vocab_size, .. } => {
            format!("token {position} has id {id}, outside a vocabulary of {vocab_size}")
        }
        other => other.to_string(),
    }
}

/// Tokenises `source` into the shard `target`.
fn build(
    source: &Path,
    tokenizer: &Tokenizer,
    target: &Path,
    read: ReadOptions,
    before: Stamp,
    progress: &dyn Progress,
) -> Result<()> {
    let mut documents = Documents::open(source, read)?;
    let meta = ShardMeta {
        vocab_size: tokenizer.vocab_size() as u32,
        eot_id: tokenizer.eot_id(),
        tokenizer: tokenizer.fingerprint(),
    };
    let mut writer = ShardWriter::create(target, meta)?;
    let mut round = next_round(&mut documents)?;
    while !round.is_empty() {
        // The next round is read and unpacked while this one is tokenised.
        let (encoded, next) = rayon::join(|| encode(&round, tokenizer), || next_round(&mut documents));
        for (document, encoded) in round.iter().zip(&encoded?) {
            let text = document.text.as_bytes();
            writer.push(encoded, text.len() as u64, xxh3_64(text), document.line)?;
        }
        progress.report(&Event::Tokenizing {
            source,
            bytes_read: documents.bytes_read(),
            bytes_total: documents.bytes_total(),
            n_documents: writer.n_documents(),
            n_tokens: writer.n_tokens(),
        });
        round = next?;
    }
    if stamp(source)? != before {
        return Err(Error::SourceChanged { path: source.to_owned() });
    }
    let (n_documents, n_tokens, text_bytes) = (writer.n_documents(), writer.n_tokens(), writer.text_bytes());
    writer.finish()?;
    let n_empty = documents.n_empty();
    progress.report(&Event::Built { source, shard: target, n_documents, n_empty, n_tokens, text_bytes });
    Ok(())
}

fn next_round(documents: &mut Documents) -> Result<Vec<Document>> {
    let mut round = Vec::new();
    let mut n_bytes = 0;
    while n_bytes < ROUND_BYTES && round.len() < ROUND_DOCUMENTS {
        let Some(document) = documents.next().transpose()? else { break };
        n_bytes += document.text.len();
        round.push(document);
    }
    Ok(round)
}

fn encode(round: &[Document], tokenizer: &Tokenizer) -> Result<Vec<Encoded>> {
    round.par_iter().map(|document| tokenizer.encode_with_bytes(&document.text)).collect()
}

/// The name of a source's shard: its own name for people, a hash of all that decides the contents for us.
fn shard_name(source: &Path, tokenizer: &Tokenizer) -> Result<String> {
    let mut hasher = Xxh3::new();
    let mut file = File::open(source).map_err(Error::io(source, "open"))?;
    let mut chunk = vec![0; 1 << 18];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => hasher.update(&chunk[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(source, "read")(error)),
        }
    }
    let name = source.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let (stem, endings) = name.split_at(name.find(".jsonl").or_else(|| name.find(".txt")).unwrap_or(name.len()));
    hasher.update(endings.as_bytes());
    hasher.update(&tokenizer.fingerprint().0);
    hasher.update(&shard::VERSION.to_le_bytes());
    let stem: String =
        stem.chars().take(64).map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    Ok(format!("{stem}-{:032x}.{SHARD_EXTENSION}", hasher.digest128()))
}

type Stamp = (u64, Option<SystemTime>);

/// Changes when the file does, save for edits that keep its size within one tick of the file system's clock.
fn stamp(path: &Path) -> Result<Stamp> {
    let metadata = fs::metadata(path).map_err(Error::io(path, "open"))?;
    Ok((metadata.len(), metadata.modified().ok()))
}

/// Takes the right to build `target`; it ends when the file is dropped, or its process dies.
fn lock(target: &Path, source: &Path, progress: &dyn Progress) -> Result<File> {
    let name = format!(".{}.lock", target.file_name().unwrap_or_default().to_string_lossy());
    let path = target.with_file_name(name);
    let file = File::options().create(true).append(true).open(&path).map_err(Error::io(&path, "create"))?;
    let result = match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            progress.report(&Event::Waiting { source });
            file.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    };
    match result {
        // Where the file system has no locks two processes may build the same shard; the renames make that harmless.
        Err(error) if error.kind() != std::io::ErrorKind::Unsupported => Err(Error::io(&path, "lock")(error)),
        _ => Ok(file),
    }
}
