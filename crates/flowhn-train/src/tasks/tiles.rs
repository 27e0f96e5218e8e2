//! Requests through the model, in tiles of fixed shapes.

use std::collections::HashMap;
use std::ops::ControlFlow;

use flowhn_model::{Model, Target};
use flowhn_torch::catch;
use tch::{Device, Tensor};

use super::request::{Request, Requests};
use super::{Partial, TaskOptions};
use crate::Result;

/// Tokens of a tile: enough for a matrix product to be worth its start, few enough that filling up the last tile of each
/// length costs little.
const CPU_TILE_TOKENS: usize = 1024;
const GPU_TILE_TOKENS: usize = 16384;

/// The score of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Score {
    /// Log-likelihood of the continuation, in nats.
    pub(super) log_likelihood: f64,
    /// Whether every token of it is the likeliest at its place; false where that was not asked.
    pub(super) likeliest: bool,
}

/// Inputs that are computed once, with the requests that are answered by them.
struct Row<'a> {
    inputs: &'a [i64],
    requests: Vec<usize>,
}

/// Scores every request that `partial` does not know; `None` where `on_progress` broke off.
pub(super) fn run(
    model: &Model,
    requests: &Requests,
    options: &TaskOptions,
    mut partial: Option<&mut Partial>,
    on_progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Vec<Score>>> {
    let list = requests.list();
    let mut scores: Vec<Option<Score>> =
        list.iter().map(|request| partial.as_ref().and_then(|partial| partial.get(request))).collect();
    let mut n_done = scores.iter().flatten().count();
    let shapes = Shapes::of(model);
    if on_progress(n_done, list.len()).is_break() {
        return Ok(None);
    }
    let rows = rows(list, &scores);
    // The longest first: what does not fit into memory shows at once, and what is left goes ever faster.
    for same_len in rows.chunk_by(|a, b| shapes.padded(a.inputs.len()) == shapes.padded(b.inputs.len())) {
        let seq_len = shapes.padded(same_len[0].inputs.len());
        let n_rows = shapes.n_rows(seq_len);
        for tile in same_len.chunks(options.batch_size.unwrap_or(n_rows).clamp(1, n_rows)) {
            let found = score_tile(model, list, tile, n_rows, seq_len)?;
            for &(place, score) in &found {
                scores[place] = Some(score);
            }
            if let Some(partial) = partial.as_deref_mut() {
                partial.add(found.iter().map(|&(place, score)| (&list[place], score)))?;
            }
            n_done += found.len();
            if on_progress(n_done, list.len()).is_break() {
                return Ok(None);
            }
        }
    }
    Ok(Some(scores.into_iter().flatten().collect()))
}

/// The requests without a score as rows, the longest first.
fn rows<'a>(list: &'a [Request], scores: &[Option<Score>]) -> Vec<Row<'a>> {
    let mut rows: Vec<Row> = Vec::new();
    let mut places: HashMap<&[i64], usize> = HashMap::new();
    for (idx, request) in list.iter().enumerate().filter(|&(idx, _)| scores[idx].is_none()) {
        let place = *places.entry(request.inputs()).or_insert_with(|| {
            rows.push(Row { inputs: request.inputs(), requests: Vec::new() });
            rows.len() - 1
        });
        rows[place].requests.push(idx);
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.inputs.len()));
    rows
}

/// Which shapes are computed: a function of the length of a row, the model and the kind of device.
struct Shapes {
    max_len: usize,
    tile_tokens: usize,
    /// A model planned at the length at hand would be another one at the padded length.
    exact: bool,
}

impl Shapes {
    fn of(model: &Model) -> Self {
        let config = model.config();
        let tile_tokens = if model.device() == Device::Cpu { CPU_TILE_TOKENS } else { GPU_TILE_TOKENS };
        Self { max_len: config.seq_len, tile_tokens, exact: config.split.released }
    }

    /// The length to which a row is padded: up by an eighth at most, from 128 tokens on.
    fn padded(&self, len: usize) -> usize {
        let step = (len.next_power_of_two() / 8).max(16);
        if self.exact { len } else { len.next_multiple_of(step).min(self.max_len) }
    }

    fn n_rows(&self, seq_len: usize) -> usize {
        (self.tile_tokens / seq_len).max(1)
    }
}

fn score_tile(
    model: &Model,
    list: &[Request],
    tile: &[Row],
    n_rows: usize,
    seq_len: usize,
) -> Result<Vec<(usize, Score)>> {
    let mut ids = vec![0i64; n_rows * seq_len];
    let mut targets = Vec::new();
    let mut spans = Vec::new();
    for (row, (ids, content)) in ids.chunks_exact_mut(seq_len).zip(tile).enumerate() {
        ids[..content.inputs.len()].copy_from_slice(content.inputs);
        for &place in &content.requests {
            let request = &list[place];
            let from = targets.len();
            let scored = request.ids.iter().enumerate().skip(request.n_context);
            targets.extend(scored.map(|(idx, &id)| Target { row, position: idx - 1, id }));
            spans.push((place, from..targets.len()));
        }
    }
    let ids_bl = catch(|| Ok(Tensor::from_slice(&ids).f_view([n_rows as i64, seq_len as i64])?))?;
    let likeliest = spans.iter().any(|(place, _)| list[*place].likeliest);
    let found = model.score(&ids_bl, &targets, likeliest)?;
    let scores = spans.into_iter().map(|(place, span)| {
        let nats: f64 = found.nats[span.clone()].iter().map(|&nats| f64::from(nats)).sum();
        let likeliest = list[place].likeliest && found.likeliest[span].iter().all(|&likeliest| likeliest);
        (place, Score { log_likelihood: -nats, likeliest })
    });
    Ok(scores.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_follows_from_the_length_alone() {
        let shapes = Shapes { max_len: 1000, tile_tokens: 1024, exact: false };
        assert_eq!(
            [1, 16, 17, 128, 129, 257, 600, 990].map(|len| shapes.padded(len)),
            [16, 16, 32, 128, 160, 320, 640, 1000]
        );
        assert!((1..1000).all(|len| shapes.padded(shapes.padded(len)) == shapes.padded(len)), "shapes are closed");
        assert!((1..1000).all(|len| shapes.padded(len) <= shapes.padded(len + 1)), "so that equal ones are neighbours");
        assert_eq!([16, 320, 1000].map(|len| shapes.n_rows(len)), [64, 3, 1]);
        assert_eq!(Shapes { exact: true, ..shapes }.padded(37), 37);
    }
}
