//! Zero-shot tasks: questions with choices, judged by the likelihood that a model gives to each.
//!
//! ```text
//! arc_easy.jsonl.gz --Task::load--> items --requests--> token ids, where the continuation starts
//!                                                          | equal ones once, equal inputs in one row
//!             TaskResult <--score-- nats of each <--tiles--'  rows of one length, a fixed shape each
//! ```
//!
//! # Items
//!
//! JSON lines, plain, `.gz` or `.zst`: `{"id", "context", "choices": [..], "answer": index}`, in partial scoring with `"suffix"`. The
//! name of a task is that of its file. Prompts are part of the data; those that ship are EleutherAI's lm-evaluation-harness's.
//!
//! - A choice is scored by the log-likelihood of `choices[i]` after `context`; with a suffix, by that of `suffix` after
//!   `context + choices[i]` (WinoGrande).
//! - `acc` takes the choice of the largest sum, `acc_norm` that of the largest sum over the characters of the choice without its leading
//!   space. Where several choices tie, the item counts by the share of the right one among them.
//! - Items of one choice (LAMBADA) are right where every token of it is the likeliest at its place; perplexity is that of the choice.
//!
//! # Tokens
//!
//! As in the harness: white space at the end of a context goes over to the continuation, `context + continuation` is tokenised as one
//! text, and the continuation is what follows as many tokens as the context has alone. Nothing stands before the context, unless
//! [`TaskOptions::eot_first`] asks for the end-of-text token that opens every document in training; it also stands for an empty
//! context. What exceeds the model's length is cut on the left: the last `seq_len + 1` tokens remain, of which the last is only predicted.
//! A continuation that is longer than the model's length, which the harness refuses, is scored in pieces of half that length, each
//! after as much of what is before it as fits.
//!
//! # Neither batching nor padding changes a score
//!
//! A row is padded on the right, which a causal model does not see, to a length that follows from its own length alone. Rows of
//! one padded length are computed as many at a time as a fixed count says, the last ones beside empty rows, and targets go through the
//! head in chunks of a fixed size: so every matrix product has a shape that does not depend on what else is scored, and gives a row the
//! same bits in whatever company. A model planned at the actual length (`released = true`) is not padded at all.

mod item;
mod partial;
mod request;
mod result;
mod sample;
mod tiles;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use flowhn_model::Model;
use rayon::prelude::*;

pub use self::item::{Item, Task};
pub use self::partial::Partial;
use self::request::{Encoded, Encoder, Requests};
pub use self::result::{ItemScore, TaskResult, TaskScore};
pub use self::sample::sample_items;
use crate::data::Tokenizer;
use crate::{Error, Result};

/// The tasks that are reported by `acc_norm`; all others are by `acc`.
const BY_NORM: [&str; 4] = ["arc_easy", "arc_challenge", "hellaswag", "piqa"];

/// The tasks whose prompts ship, in the order in which they are told.
pub const TASKS: [&str; 7] =
    ["arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "boolq", "lambada_openai"];

/// The endings of a file of items.
const ENDINGS: [&str; 3] = [".jsonl", ".jsonl.gz", ".jsonl.zst"];

/// How tasks are scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskOptions {
    /// Most rows that are computed at once; `None` takes as many as suit the device. No score depends on it.
    pub batch_size: Option<usize>,
    /// Whether an end-of-text token stands before each context, as before each document in training. The harness has none.
    pub eot_first: bool,
}

/// Finds the files of tasks: each name is a file, or else that of a file in `dir`; `all` means every one of [`TASKS`] that is there.
///
/// # Errors
/// [`Error::NoTask`], which tells what there is.
pub fn find_tasks(names: &[String], dir: &Path) -> Result<Vec<PathBuf>> {
    let in_dir =
        |name: &str| ENDINGS.iter().map(|ending| dir.join(format!("{name}{ending}"))).find(|path| path.is_file());
    let mut found = Vec::new();
    for name in names {
        let path = Path::new(name);
        let paths: Vec<PathBuf> = match name.as_str() {
            "all" => TASKS.iter().filter_map(|task| in_dir(task)).collect(),
            _ if ENDINGS.iter().any(|ending| name.ends_with(ending)) && path.is_file() => vec![path.to_owned()],
            _ => in_dir(name).into_iter().collect(),
        };
        if paths.is_empty() {
            return Err(Error::NoTask { name: name.clone(), dir: dir.to_owned(), known: names_in(dir).join(", ") });
        }
        found.extend(paths.into_iter().filter(|path| !found.contains(path)).collect::<Vec<_>>());
    }
    Ok(found)
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| task_name(&entry.path())).collect();
    names.sort();
    names
}

/// The name of a task: its file's without the ending.
fn task_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)).map(str::to_owned)
}

/// Where the requests of an item are, for each choice: more than one where it is long.
type Places = Vec<Vec<usize>>;

/// Scores tasks, all together so that few rows are computed in vain.
///
/// `partial` keeps what is done and gives what was done before. `on_progress` hears after each computation how many of all requests
/// are scored, and may break off; the result is then `None`.
///
/// # Errors
/// [`Error::Item`] for an item whose continuation has no tokens of its own; [`Error::Data`] from the tokenizer;
/// [`Error::Model`]; [`Error::Io`] from `partial`.
pub fn evaluate_tasks(
    model: &Model,
    tokenizer: &Tokenizer,
    tasks: &[Task],
    options: &TaskOptions,
    partial: Option<&mut Partial>,
    on_progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Vec<TaskResult>>> {
    tokenizer.check_vocab_size(model.config().vocab_size)?;
    let encoder = Encoder::new(tokenizer, model.config().seq_len, options.eot_first);
    let mut requests = Requests::default();
    let mut of_tasks = Vec::with_capacity(tasks.len());
    for task in tasks {
        // Tokenising is what takes long here, and every item is its own.
        let encoded: Vec<_> = task.items().par_iter().map(|item| encoder.item(task, item)).collect::<Result<_>>()?;
        let mut place = |pieces: Vec<Encoded>| pieces.into_iter().map(|piece| requests.add(piece)).collect();
        let of_items = encoded.into_iter().map(|choices| choices.into_iter().map(&mut place).collect());
        of_tasks.push(of_items.collect::<Vec<Places>>());
    }
    let Some(scores) = tiles::run(model, &requests, options, partial, on_progress)? else {
        return Ok(None);
    };
    let result = |(task, of_items): (&Task, &Vec<Places>)| TaskResult::new(task, of_items, &requests, &scores);
    Ok(Some(tasks.iter().zip(&of_tasks).map(result).collect()))
}
