use super::Tokenizer;
use crate::data::Result;

/// Decodes ids one at a time, holding back the bytes of a character until all of them are there.
///
/// The concatenation of everything [`push`](StreamDecoder::push) and [`finish`](StreamDecoder::finish) return is what
/// [`Tokenizer::decode`] makes of the same ids, for byte-level tokenizers.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Byte-level: an incomplete UTF-8 sequence, at most three bytes.
    pending: Vec<u8>,
    /// Others: the ids since the last point at which text was complete, the first `n_context` of them already given.
    ids: Vec<u32>,
    n_context: usize,
}

/// Ids after which a tokenizer that is not byte-level has surely completed a character.
const MAX_HELD_IDS: usize = 8;

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        StreamDecoder { tokenizer, pending: Vec::new(), ids: Vec::new(), n_context: 0 }
    }

    /// Takes one id and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.tokenizer.check_ids(&[id])?;
        match &self.tokenizer.bytes {
            Some(bytes) => {
                self.pending.extend_from_slice(bytes.get(id));
                Ok(take_complete(&mut self.pending))
            }
            None => {
                self.ids.push(id);
                self.grow(false)
            }
        }
    }

    /// Returns what is still held back, with U+FFFD for a character that never became complete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        match self.tokenizer.bytes {
            Some(_) => Ok(String::from_utf8_lossy(&self.pending).into_owned()),
            None => self.grow(true),
        }
    }

    /// The text that the ids after the context add to it. A decoder may treat the first id of a text in its own way
    /// (no leading space, say), so the last ids given stay as context.
    fn grow(&mut self, all: bool) -> Result<String> {
        let context = self.tokenizer.decode(&self.ids[..self.n_context])?;
        let text = self.tokenizer.decode(&self.ids)?;
        let held = self.ids.len() - self.n_context;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && held < MAX_HELD_IDS && !all {
            return Ok(String::new());
        }
        let new = text.strip_prefix(context.as_str()).unwrap_or_default().to_owned();
        if !new.is_empty() {
            self.ids.drain(..self.n_context);
            self.n_context = self.ids.len();
        }
        Ok(new)
    }
}

/// Splits off everything that is decided: valid text, and U+FFFD for each sequence that can no longer become valid.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = pending.as_slice();
    let held = loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                break 0;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                let Some(n_invalid) = error.error_len() else { break after.len() };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &after[n_invalid..];
            }
        }
    };
    let n_taken = pending.len() - held;
    pending.drain(..n_taken);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_wait_for_their_character() {
        let mut pending = vec![b'a', 0xF0, 0x9F];
        assert_eq!(take_complete(&mut pending), "a");
        assert_eq!(pending, [0xF0, 0x9F]);
        pending.extend([0x99, 0x82, b'!']);
        assert_eq!(take_complete(&mut pending), "🙂!");
        assert!(pending.is_empty());
    }

    #[test]
    fn what_can_never_be_valid_is_not_held() {
        let mut pending = vec![0x80, b'x', 0xE2, 0x28];
        assert_eq!(take_complete(&mut pending), "\u{FFFD}x\u{FFFD}(");
        assert!(pending.is_empty());
    }
}
