//! Text to ids and back.

mod alphabet;
mod stream;
mod train;

use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tokenizers::{DecoderWrapper, PreTokenizerWrapper};
use xxhash_rust::xxh3::Xxh3;

pub use self::stream::StreamDecoder;
pub use self::train::{TrainedTokenizer, train_tokenizer};
use super::{Error, Fingerprint, Result};

/// The end-of-text token of GPT-2 and of the tokenizers that [`train_tokenizer`] makes.
const END_OF_TEXT: &str = "<|endoftext|>";

/// Texts longer than this are tokenised in pieces where that provably gives the same tokens.
const PIECE_BYTES: usize = 1 << 18;

/// A loaded `tokenizer.json` of the Hugging Face `tokenizers` format.
///
/// Text is always text: a document that spells out `<|endoftext|>` gets the tokens of those characters, never the
/// special token. Truncation, padding and post-processing templates of the file are ignored.
///
/// ```
/// # use flowhn_train::data::{Tokenizer, train_tokenizer, ReadOptions};
/// # let dir = tempfile::tempdir()?;
/// # let text = dir.path().join("a.txt");
/// # std::fs::write(&text, "to be or not to be")?;
/// # let path = dir.path().join("tokenizer.json");
/// # train_tokenizer(&[text], 260, &path, &ReadOptions::default())?;
/// let tokenizer = Tokenizer::load(&path)?;
/// let ids = tokenizer.encode("not to be 🙂")?;
/// assert_eq!(tokenizer.decode(&ids)?, "not to be 🙂");
/// assert_eq!(tokenizer.eot_id(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    eot_id: u32,
    vocab_size: usize,
    fingerprint: Fingerprint,
    /// The bytes of each token, where the decoder is byte-level.
    bytes: Option<TokenBytes>,
    /// Whether a text may be cut before a space between two letters without changing its tokens.
    cuttable: bool,
}

/// The tokens of a text, with the share of the text that each stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids, without any end-of-text.
    pub ids: Vec<u32>,
    /// UTF-8 bytes of the text behind each token. They add up to the length of the text whenever there is a token.
    pub byte_lens: Vec<u32>,
}

impl Tokenizer {
    /// Loads a tokenizer whose end-of-text token is `<|endoftext|>`, or where it has none that of Llama 3 (`<|end_of_text|>`) or Llama 2
    /// (`</s>`).
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Tokenizer`] where the file does not load, [`Error::NoEndOfText`].
    pub fn load(path: &Path) -> Result<Self> {
        let ours = Self::load_with_eot(path, END_OF_TEXT);
        let others = ["<|end_of_text|>", "</s>"].into_iter();
        match ours {
            Err(Error::NoEndOfText { .. }) => {
                others.map(|eot| Self::load_with_eot(path, eot)).find(Result::is_ok).unwrap_or(ours)
            }
            ours => ours,
        }
    }

    /// Loads a tokenizer and takes the token `eot` as its end of text.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn load_with_eot(path: &Path, eot: &str) -> Result<Self> {
        let json = std::fs::read(path).map_err(Error::io(path, "open"))?;
        Self::from_json(&json, path, eot)
    }

    /// Builds a tokenizer from the bytes of a `tokenizer.json`; `path` serves in messages only.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], [`Error::NoEndOfText`].
    pub fn from_json(json: &[u8], path: &Path, eot: &str) -> Result<Self> {
        let fail = |message: String| Error::Tokenizer { path: path.to_owned(), message };
        let mut value: serde_json::Value = serde_json::from_slice(json).map_err(|e| {
            fail(format!("not JSON ({e}); expected a tokenizer.json of the Hugging Face tokenizers library"))
        })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| fail(format!("{e}; expected a tokenizer.json of the Hugging Face tokenizers library")))?;
        inner.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);

        let eot_id = inner.token_to_id(eot).ok_or_else(|| {
            let mut special: Vec<_> =
                inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).collect();
            special.sort_unstable_by_key(|(id, _)| *id);
            let special: Vec<_> = special.into_iter().map(|(_, token)| token.content).collect();
            Error::NoEndOfText {
                path: path.to_owned(),
                wanted: eot.to_owned(),
                special: if special.is_empty() { "none".to_owned() } else { special.join(" ") },
            }
        })?;
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);

        // Truncation and padding are switched off above, so they are no part of what the tokenizer is.
        if let Some(map) = value.as_object_mut() {
            map.remove("truncation");
            map.remove("padding");
        }
        let mut hasher = Xxh3::new();
        Fingerprint::update_json(&mut hasher, &value);
        hasher.update(&eot_id.to_le_bytes());
        let fingerprint = Fingerprint::finish(&hasher);

        let bytes = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
            .then(|| TokenBytes::new(&inner, vocab_size));
        let cuttable = bytes.is_some()
            && inner.get_normalizer().is_none()
            && inner.get_added_tokens_decoder().values().all(|token| token.special)
            && matches!(inner.get_pre_tokenizer(),
                Some(PreTokenizerWrapper::ByteLevel(split)) if split.use_regex && !split.add_prefix_space);
        Ok(Tokenizer { inner, path: path.to_owned(), eot_id, vocab_size, fingerprint, bytes, cuttable })
    }

    /// The id of the end-of-text token.
    pub fn eot_id(&self) -> u32 {
        self.eot_id
    }

    /// The largest id plus one: the smallest `vocab_size` a model for this tokenizer can have.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// A hash of everything that decides which ids a text gets.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes sure that a model of `vocab_size` entries has an embedding for every id. A larger model is fine.
    ///
    /// # Errors
    /// [`Error::VocabTooLarge`].
    pub fn check_vocab_size(&self, vocab_size: usize) -> Result<()> {
        if self.vocab_size <= vocab_size {
            return Ok(());
        }
        Err(Error::VocabTooLarge { path: self.path.clone(), tokenizer: self.vocab_size, model: vocab_size })
    }

    /// Makes sure that what was stored by `whose`, for example "the checkpoint", was made with this tokenizer.
    ///
    /// # Errors
    /// [`Error::TokenizerMismatch`].
    pub fn check_fingerprint(&self, stored: Fingerprint, whose: &str) -> Result<()> {
        if stored == self.fingerprint || stored == Fingerprint::NONE {
            return Ok(());
        }
        let (loaded, path) = (self.fingerprint, self.path.clone());
        Err(Error::TokenizerMismatch { whose: whose.to_owned(), stored, loaded, path })
    }

    /// The ids of a text, without an end-of-text token at either end.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the tokenizer itself fails, which byte-level ones do not.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_with_bytes(text)?.ids)
    }

    /// The ids of a text and how many of its bytes each stands for.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_bytes(&self, text: &str) -> Result<Encoded> {
        if !self.cuttable || text.len() <= 2 * PIECE_BYTES {
            return self.encode_piece(text);
        }
        let pieces: Vec<Encoded> =
            pieces(text, PIECE_BYTES).into_par_iter().map(|piece| self.encode_piece(piece)).collect::<Result<_>>()?;
        let mut all = Encoded::default();
        for piece in pieces {
            all.ids.extend(piece.ids);
            all.byte_lens.extend(piece.byte_lens);
        }
        Ok(all)
    }

    fn encode_piece(&self, text: &str) -> Result<Encoded> {
        let fail = |e: tokenizers::Error| Error::Tokenizer { path: self.path.clone(), message: e.to_string() };
        if let Some(bytes) = &self.bytes {
            let ids = self.inner.encode_fast(text, false).map_err(fail)?.get_ids().to_vec();
            let byte_lens: Vec<u32> = ids.iter().map(|&id| bytes.len(id)).collect();
            // A byte-level tokenizer without normaliser or prefix loses nothing, and its tokens are the text.
            if byte_lens.iter().map(|&n| n as usize).sum::<usize>() == text.len() {
                return Ok(Encoded { ids, byte_lens });
            }
        }
        let encoding = self.inner.encode(text, false).map_err(fail)?;
        let mut covered = 0;
        let mut byte_lens: Vec<u32> = encoding
            .get_offsets()
            .iter()
            .map(|&(_, end)| {
                let end = end.clamp(covered, text.len());
                let len = end - covered;
                covered = end;
                len as u32
            })
            .collect();
        // What the tokenizer dropped at the end is still text that the model was to predict.
        if let Some(last) = byte_lens.last_mut() {
            *last += (text.len() - covered) as u32;
        }
        Ok(Encoded { ids: encoding.get_ids().to_vec(), byte_lens })
    }

    /// The text of some ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::UnknownToken`] for an id outside the vocabulary, [`Error::Tokenizer`] where the decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.check_ids(ids)?;
        match &self.bytes {
            Some(bytes) => {
                let text: Vec<u8> = ids.iter().flat_map(|&id| bytes.get(id)).copied().collect();
                Ok(String::from_utf8(text).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
            }
            None => self
                .inner
                .decode(ids, true)
                .map_err(|e| Error::Tokenizer { path: self.path.clone(), message: e.to_string() }),
        }
    }

    /// A decoder that takes ids one by one and gives text as soon as it is complete.
    pub fn stream_decoder(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(&id) => Err(Error::UnknownToken { id, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .field("eot_id", &self.eot_id)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// The bytes that each token decodes to; none for special tokens and ids without a token.
struct TokenBytes {
    starts: Vec<u32>,
    bytes: Vec<u8>,
}

impl TokenBytes {
    fn new(inner: &tokenizers::Tokenizer, vocab_size: usize) -> Self {
        let added = inner.get_added_tokens_decoder();
        let mut table = TokenBytes { starts: Vec::with_capacity(vocab_size + 1), bytes: Vec::new() };
        table.starts.push(0);
        for id in 0..vocab_size as u32 {
            let special = added.get(&id).is_some_and(|token| token.special);
            if let Some(token) = inner.id_to_token(id).filter(|_| !special) {
                match alphabet::bytes_of(&token) {
                    Some(bytes) => table.bytes.extend(bytes),
                    // Not spelt in the byte alphabet: an added token, which stands for its own text.
                    None => table.bytes.extend(token.as_bytes()),
                }
            }
            table.starts.push(table.bytes.len() as u32);
        }
        table
    }

    fn get(&self, id: u32) -> &[u8] {
        &self.bytes[self.starts[id as usize] as usize..self.starts[id as usize + 1] as usize]
    }

    fn len(&self, id: u32) -> u32 {
        self.starts[id as usize + 1] - self.starts[id as usize]
    }
}

/// Cuts a text before spaces that stand between two ASCII letters, about every `piece_bytes`.
///
/// GPT-2's splitting never lets a match run across such a point: a run of letters ends at the space, and the space
/// opens the next word. So the words, and with them the tokens, are those of the whole text.
fn pieces(text: &str, piece_bytes: usize) -> Vec<&str> {
    let bytes = text.as_bytes();
    let mut pieces = Vec::new();
    let mut start = 0;
    while bytes.len() - start > piece_bytes {
        let cut = (start + piece_bytes..bytes.len() - 1)
            .find(|&i| bytes[i] == b' ' && bytes[i - 1].is_ascii_alphabetic() && bytes[i + 1].is_ascii_alphabetic());
        let Some(cut) = cut else { break };
        pieces.push(&text[start..cut]);
        start = cut;
    }
    pieces.push(&text[start..]);
    pieces
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static SHIPPED: LazyLock<Tokenizer> = LazyLock::new(|| {
        Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tiny/tokenizer.json")).unwrap()
    });

    proptest! {
        #[test]
        fn cutting_wherever_it_is_allowed_changes_no_token(
            text in "([a-zA-Z]{1,4}|don't|[0-9]{1,3}| {1,3}|[\t\n\u{A0}]|[.,'<|>é日🙂]){0,80}",
            piece_bytes in 1usize..20,
        ) {
            prop_assert!(SHIPPED.cuttable);
            let pieces = pieces(&text, piece_bytes);
            prop_assert_eq!(pieces.concat(), &text[..]);
            let cut: Vec<u32> = pieces.iter().flat_map(|piece| SHIPPED.encode_piece(piece).unwrap().ids).collect();
            prop_assert_eq!(cut, SHIPPED.encode_piece(&text).unwrap().ids);
        }
    }

    #[test]
    fn pieces_are_of_the_size_asked_for_where_there_are_words() {
        let text = "some words here ".repeat(100);
        let lens: Vec<_> = pieces(&text, 100).iter().map(|piece| piece.len()).collect();
        assert_eq!(lens.iter().sum::<usize>(), 1600);
        assert!(lens[..lens.len() - 1].iter().all(|len| (100..110).contains(len)), "{lens:?}");
        assert_eq!(pieces(&"x".repeat(1000), 100).len(), 1);
        assert_eq!(pieces("", 100), [""]);
        assert_eq!(pieces("a b", 1), ["a", " b"]);
    }
}
