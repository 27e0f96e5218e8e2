use std::path::{Path, PathBuf};

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, TokenizerBuilder};

use super::END_OF_TEXT;
use crate::data::atomic::AtomicFile;
use crate::data::{Documents, Error, ReadOptions, Result};

/// What [`train_tokenizer`] made, and of how much text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainedTokenizer {
    /// Entries of the vocabulary; fewer than asked for where the text has no more pairs worth merging.
    pub vocab_size: usize,
    /// Documents read.
    pub n_documents: u64,
    /// UTF-8 bytes of their text.
    pub text_bytes: u64,
}

/// The smallest vocabulary: every byte and end-of-text.
const MIN_VOCAB_SIZE: usize = 257;

/// Trains a byte-level BPE on text files and writes it to `out` in the `tokenizer.json` format.
///
/// Words are split by GPT-2's rule; there is no normaliser and no added space; `<|endoftext|>` has id 0 and all
/// 256 bytes have an id, so any UTF-8 text survives encoding and decoding unchanged. A pair must occur twice to be
/// merged. The same files in the same order give the same bytes.
///
/// # Errors
/// [`Error::VocabTooSmall`], [`Error::NoFiles`], and what reading and writing can bring.
pub fn train_tokenizer(
    files: &[PathBuf],
    vocab_size: usize,
    out: &Path,
    options: &ReadOptions,
) -> Result<TrainedTokenizer> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(Error::VocabTooSmall { min: MIN_VOCAB_SIZE, wanted: vocab_size });
    }
    if files.is_empty() {
        return Err(Error::NoFiles);
    }
    let fail = |e: tokenizers::Error| Error::Tokenizer { path: out.to_owned(), message: e.to_string() };

    let split = ByteLevel::new(false, false, true);
    let mut tokenizer = TokenizerBuilder::<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(split))
        .with_decoder(Some(split))
        .build()
        .map_err(fail)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();

    let mut source = Source { files: files.iter(), options: *options, documents: None, failure: None, counts: (0, 0) };
    tokenizer.train(&mut trainer, &mut source).map_err(fail)?;
    if let Some(error) = source.failure {
        return Err(error);
    }

    let json = tokenizer.to_string(false).map_err(fail)?;
    let mut file = AtomicFile::create(out)?;
    file.write(json.as_bytes())?;
    file.write(b"\n")?;
    file.commit()?;
    let (n_documents, text_bytes) = source.counts;
    Ok(TrainedTokenizer { vocab_size: tokenizer.get_vocab_size(true), n_documents, text_bytes })
}

/// The texts of all files; stops at the first error and keeps it, as the trainer takes texts only.
struct Source<'a> {
    files: std::slice::Iter<'a, PathBuf>,
    options: ReadOptions,
    documents: Option<Documents>,
    failure: Option<Error>,
    counts: (u64, u64),
}

impl Iterator for Source<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        while self.failure.is_none() {
            let Some(documents) = &mut self.documents else {
                match Documents::open(self.files.next()?, self.options) {
                    Ok(documents) => self.documents = Some(documents),
                    Err(error) => self.failure = Some(error),
                }
                continue;
            };
            match documents.next() {
                Some(Ok(document)) => {
                    self.counts.0 += 1;
                    self.counts.1 += document.text.len() as u64;
                    return Some(document.text);
                }
                Some(Err(error)) => self.failure = Some(error),
                None => self.documents = None,
            }
        }
        None
    }
}
