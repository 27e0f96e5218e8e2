//! What is asked of the model: token ids, and from where on they are scored.

use std::collections::HashMap;

use super::{Item, Task};
use crate::data::Tokenizer;
use crate::{Error, Result};

/// A text whose end is scored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Request {
    /// Context and continuation, at most one token longer than the model reads.
    pub(super) ids: Vec<i64>,
    /// Tokens of the context, at least one.
    pub(super) n_context: usize,
    /// Whether it is asked if the model would have written the continuation.
    pub(super) likeliest: bool,
}

impl Request {
    /// What the model reads: all but the last token, which is only predicted.
    pub(super) fn inputs(&self) -> &[i64] {
        &self.ids[..self.ids.len() - 1]
    }
}

/// A request with what is told of it.
pub(super) struct Encoded {
    pub(super) request: Request,
    /// Whether the start of its context did not fit.
    pub(super) cut: bool,
}

/// Requests, equal ones once: choices of the same words get the same bits and so tie.
#[derive(Default)]
pub(super) struct Requests {
    list: Vec<Request>,
    cut: Vec<bool>,
    places: HashMap<Request, usize>,
}

impl Requests {
    /// The place of a request, which is added if it is new.
    pub(super) fn add(&mut self, encoded: Encoded) -> usize {
        let Encoded { request, cut } = encoded;
        if let Some(&place) = self.places.get(&request) {
            self.cut[place] |= cut;
            return place;
        }
        self.list.push(request.clone());
        self.cut.push(cut);
        self.places.insert(request, self.list.len() - 1);
        self.list.len() - 1
    }

    pub(super) fn list(&self) -> &[Request] {
        &self.list
    }

    pub(super) fn is_cut(&self, place: usize) -> bool {
        self.cut[place]
    }
}

/// Makes requests of items.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    seq_len: usize,
    eot_first: bool,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, seq_len: usize, eot_first: bool) -> Self {
        Self { tokenizer, seq_len, eot_first }
    }

    /// The requests of each choice: one, or several where what is scored is longer than the model reads.
    pub(super) fn item(&self, task: &Task, item: &Item) -> Result<Vec<Vec<Encoded>>> {
        let pairs = item.choices.iter().map(|choice| match &item.suffix {
            Some(suffix) => (format!("{}{choice}", item.context), suffix.clone()),
            None => (item.context.clone(), choice.clone()),
        });
        pairs
            .map(|(context, continuation)| {
                let (ids, n_context) = self.pair(&context, &continuation)?;
                if ids.len() == n_context {
                    let message = "after the tokens of its context alone, nothing is left to score".to_owned();
                    return Err(Error::Item { path: task.path().to_owned(), line: item.line, message });
                }
                Ok(self.pieces(&ids, n_context, !task.is_choice()))
            })
            .collect()
    }

    /// The tokens of a pair, and how many of them are the context's.
    fn pair(&self, context: &str, continuation: &str) -> Result<(Vec<i64>, usize)> {
        let bare = context.trim_end_matches(is_python_space);
        let whole = self.tokenizer.encode(&format!("{context}{continuation}"))?;
        let n_context = self.tokenizer.encode(bare)?.len().min(whole.len());
        let mut ids: Vec<i64> = whole.into_iter().map(i64::from).collect();
        if self.eot_first || n_context == 0 {
            ids.insert(0, i64::from(self.tokenizer.eot_id()));
            return Ok((ids, n_context + 1));
        }
        Ok((ids, n_context))
    }

    /// The scored tokens as one piece if the model reads that many at once, else in pieces of half its length, each after as much of
    /// what is before it as fits.
    fn pieces(&self, ids: &[i64], n_context: usize, likeliest: bool) -> Vec<Encoded> {
        let n_scored = ids.len() - n_context;
        let most = if n_scored > self.seq_len { (self.seq_len / 2).max(1) } else { n_scored };
        let starts = (n_context..ids.len()).step_by(most);
        starts
            .map(|start| {
                let end = (start + most).min(ids.len());
                let n_cut = end.saturating_sub(self.seq_len + 1);
                let request = Request { ids: ids[n_cut..end].to_vec(), n_context: start - n_cut, likeliest };
                Encoded { request, cut: n_cut > 0 }
            })
            .collect()
    }
}

/// White space as Python's `str.rstrip` takes it, by which the harness finds where a context ends.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tiny/tokenizer.json")).unwrap()
    }

    fn encoded(encoder: &Encoder, context: &str, continuation: &str) -> Encoded {
        let (ids, n_context) = encoder.pair(context, continuation).unwrap();
        let mut pieces = encoder.pieces(&ids, n_context, false);
        assert_eq!(pieces.len(), 1);
        pieces.swap_remove(0)
    }

    #[test]
    fn spaces_at_the_end_of_a_context_belong_to_the_continuation() {
        let tokenizer = tokenizer();
        let encoder = Encoder::new(&tokenizer, 64, false);
        let plain = encoded(&encoder, "The capital of France is", " Paris in the north").request;
        assert_eq!(plain, encoded(&encoder, "The capital of France is ", "Paris in the north").request);
        let context = tokenizer.encode("The capital of France is").unwrap();
        assert_eq!(plain.n_context, context.len());
        let scored: Vec<u32> = plain.ids[plain.n_context..].iter().map(|&id| id as u32).collect();
        assert_eq!(tokenizer.decode(&scored).unwrap(), " Paris in the north");
        assert_eq!(plain.inputs().len(), plain.ids.len() - 1);
    }

    #[test]
    fn end_of_text_stands_first_where_asked_for_and_for_nothing() {
        let tokenizer = tokenizer();
        let eot = i64::from(tokenizer.eot_id());
        let first = encoded(&Encoder::new(&tokenizer, 64, true), "One", " two").request;
        let bare = encoded(&Encoder::new(&tokenizer, 64, false), "One", " two").request;
        assert_eq!((first.ids[0], &first.ids[1..], first.n_context), (eot, &bare.ids[..], bare.n_context + 1));
        let nothing = encoded(&Encoder::new(&tokenizer, 64, false), "", "One two").request;
        assert_eq!((nothing.ids[0], nothing.n_context), (eot, 1));
    }

    #[test]
    fn contexts_are_cut_on_the_left_and_continuations_are_not() {
        let tokenizer = tokenizer();
        let encoder = Encoder::new(&tokenizer, 8, false);
        let long = encoded(&encoder, &"a long story ".repeat(9), "and its end");
        let whole = encoded(&Encoder::new(&tokenizer, 999, false), &"a long story ".repeat(9), "and its end");
        assert!(long.cut && !whole.cut);
        assert_eq!(long.request.ids, whole.request.ids[whole.request.ids.len() - 9..]);
        assert_eq!(long.request.ids.len() - long.request.n_context, whole.request.ids.len() - whole.request.n_context);
        assert_eq!(long.request.inputs().len(), 8);
    }

    #[test]
    fn every_token_of_a_long_continuation_is_scored_once() {
        let tokenizer = tokenizer();
        let encoder = Encoder::new(&tokenizer, 8, false);
        let (ids, n_context) = encoder.pair("Once", &" upon a time".repeat(9)).unwrap();
        let pieces = encoder.pieces(&ids, n_context, false);
        let scored = pieces.iter().flat_map(|piece| piece.request.ids[piece.request.n_context..].iter().copied());
        assert_eq!(scored.collect::<Vec<_>>(), ids[n_context..]);
        assert!(pieces.iter().all(|piece| piece.request.n_context > 0 && piece.request.inputs().len() <= 8));
        assert!(pieces.len() > 1 && pieces[1..].iter().all(|piece| piece.cut || piece.request.n_context > 4));
    }

    #[test]
    fn equal_requests_are_one() {
        let tokenizer = tokenizer();
        let encoder = Encoder::new(&tokenizer, 64, false);
        let mut requests = Requests::default();
        let places = [" yes", " no", " yes"].map(|choice| requests.add(encoded(&encoder, "Is it?", choice)));
        assert_eq!((places, requests.list().len()), ([0, 1, 0], 2));
    }
}
