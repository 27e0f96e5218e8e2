//! From text files to batches: readers, tokenizer, token shards, packing, sampling.
//!
//! ```text
//! jsonl, jsonl.zst, txt --Documents--> text --Tokenizer--> ids --ShardWriter--> one shard a file, cached
//! shards --prepare--> Dataset --split--> Dataset x 2
//! Dataset --TrainLoader--> Batch, Batch, ...      shuffled windows, resumable, prefetched
//! Dataset --ValidationSet--> Batch, Batch, ...    in order, every token once, exact byte counts
//! ```
//!
//! Nothing here prints or touches a tensor: progress goes to a [`Progress`], batches are host vectors.
//!
//! # The interface at a glance
//!
//! ```text
//! Tokenizer::load(path) / load_with_eot(path, "</s>") -> Result<Tokenizer>
//!     .encode(&str) .encode_with_bytes(&str) .decode(&[u32]) .stream_decoder()
//!     .eot_id() .vocab_size() .fingerprint() .check_vocab_size(model_vocab) .check_fingerprint(stored, "checkpoint")
//! train_tokenizer(&[PathBuf], vocab_size, out, &ReadOptions) -> Result<TrainedTokenizer>
//! prepare(&[PathBuf], &Tokenizer, &PrepareOptions, &dyn Progress) -> Result<Dataset>
//! Dataset: .n_tokens() .n_documents() .text_bytes() .vocab_size() .check_vocab_size(model_vocab) .eot_id()
//!     .tokenizer() .fingerprint() .split(valid_frac) -> Result<(Dataset, Dataset)>
//! TrainLoader::new(&Dataset, &LoaderOptions) / ::resume(&Dataset, &LoaderOptions, &SamplerState) -> Result<TrainLoader>
//!     .next_batch() -> Result<Batch>   .state() -> &SamplerState   .provenance(&Batch) -> Vec<RowProvenance>
//! ValidationSet::new(&Dataset, seq_len, batch_size, max_windows: Option<u64>) -> Result<ValidationSet>
//!     .batches() -> iterator of Result<Batch>   .n_batches() .n_targets() .text_bytes()
//! Batch { batch_size, seq_len, inputs, targets, segments: Vec<i64>, n_targets, text_bytes, rows }
//! Score::default().add(nats_sum, n_targets, text_bytes); .nats_per_token() .bits_per_byte()
//! Unigram::fit(&Dataset, vocab_size) -> Result<Unigram>;  .score(&ValidationSet) -> Result<Score>
//! ```
//!
//! # Example
//!
//! ```
//! use flowhn_train::data::*;
//! # let dir = tempfile::tempdir()?;
//! # let file = |name: &str| dir.path().join(name);
//! # std::fs::write(file("train.jsonl"), "{\"text\": \"one two three\"}\n".repeat(20))?;
//! # std::fs::write(file("valid.txt"), "three two one")?;
//! train_tokenizer(&[file("train.jsonl")], 260, &file("tokenizer.json"), &ReadOptions::default())?;
//! let tokenizer = Tokenizer::load(&file("tokenizer.json"))?;
//! tokenizer.check_vocab_size(260)?;
//!
//! let options = PrepareOptions { cache_dir: file("cache"), read: ReadOptions::default() };
//! let train = prepare(&[file("train.jsonl")], &tokenizer, &options, &())?;
//! let valid = prepare(&[file("valid.txt")], &tokenizer, &options, &())?;
//!
//! let options = LoaderOptions { seq_len: 8, batch_size: 2, seed: 0, prefetch: 2 };
//! let mut loader = TrainLoader::new(&train, &options)?;
//! let batch = loader.next_batch()?;
//! assert_eq!(batch.inputs.len(), 2 * 8);
//! assert_eq!(batch.inputs[1], batch.targets[0]);
//!
//! // A checkpoint keeps the state; what follows is then the same as if nothing had happened.
//! let state = loader.state().clone();
//! let mut resumed = TrainLoader::resume(&train, &options, &state)?;
//! assert_eq!(resumed.next_batch()?, loader.next_batch()?);
//!
//! let valid = ValidationSet::new(&valid, 8, 2, None)?;
//! assert_eq!(valid.text_bytes(), "three two one".len() as u64);
//! let baseline = Unigram::fit(&train, 260)?.score(&valid)?;
//! assert!(baseline.bits_per_byte() > 0.0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The token stream
//!
//! An end-of-text token opens every document: the stream is `eot d0 eot d1 ... eot dn`, and one more end-of-text
//! token closes it. End-of-text belongs to the document that follows, so a document always starts from a known token and
//! generation from an empty prompt feeds exactly what training fed. With `n` stored tokens there are `n` targets: every
//! token but the first, and the closing one. A window of `seq_len` targets reads `seq_len + 1` tokens; neighbouring
//! windows share one token, as the last target of one and the first input of the next.
//!
//! Segment ids start at 0 in each window and rise by one at each end-of-text that opens a document. Where a target
//! is the end-of-text of the *next* document, its input is the last token of the old one, so what is trained there is
//! "this document ends"; where the input is end-of-text, the target is the first token of the same segment. No
//! prediction ever needs to look across a border.
//!
//! # Bits per byte
//!
//! `bits_per_byte = (sum of nats over all predicted tokens / ln 2) / (UTF-8 bytes of the text behind those tokens)`.
//! End-of-text tokens are predicted, so their nats count, and they stand for zero bytes. Byte counts come from the text
//! itself and are stored beside the tokens: over a whole data set they add up to the size of its text exactly.

mod atomic;
mod batch;
mod cache;
mod dataset;
mod error;
mod fingerprint;
mod loader;
mod progress;
mod read;
mod sampler;
mod score;
mod shard;
mod tokenizer;
mod unigram;
mod valid;
mod windows;

pub use batch::{Batch, IGNORE_TARGET, Row};
pub use cache::{PrepareOptions, SHARD_EXTENSION, prepare};
pub use dataset::{Dataset, DocumentRef};
pub use error::{Error, Result, ShardProblem};
pub use fingerprint::Fingerprint;
pub use loader::{LoaderOptions, RowProvenance, TrainLoader};
pub use progress::{Event, Progress};
pub use read::{Document, Documents, ReadOptions};
pub use sampler::{Sampler, SamplerState};
pub use score::Score;
pub use shard::{DocumentEntry, Shard, ShardMeta, ShardWriter};
pub use tokenizer::{Encoded, StreamDecoder, Tokenizer, TrainedTokenizer, train_tokenizer};
pub use unigram::Unigram;
pub use valid::ValidationSet;
pub use windows::Windows;
