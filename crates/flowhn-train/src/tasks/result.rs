//! Scores of items, and what follows from them for a task.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::request::Requests;
use super::tiles::Score;
use super::{Item, Places, Task};

/// What a model says of an item.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemScore {
    /// The item's id.
    pub id: Value,
    /// Log-likelihood of each choice in nats; in partial scoring, of the suffix after each.
    pub log_likelihoods: Vec<f64>,
    /// What the item counts for `acc`: 0, 1, or its share of a tie.
    pub acc: f64,
    /// The same for `acc_norm`, where there is one.
    pub acc_norm: Option<f64>,
}

/// The numbers of a task. Accuracies are fractions of 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// The task.
    pub task: String,
    /// Items scored.
    pub items: usize,
    /// Items of the file.
    pub items_in_file: usize,
    /// Which of the accuracies the task is reported by: `acc` or `acc_norm`.
    pub metric: String,
    /// That accuracy.
    pub accuracy: f64,
    /// Its standard error: the items' sample deviation over the root of their number; absent for one item.
    pub stderr: Option<f64>,
    /// Share of the items whose choice of the largest log-likelihood is right; of one choice, whether it is the likeliest text.
    pub acc: f64,
    /// Its standard error.
    pub acc_stderr: Option<f64>,
    /// The same by log-likelihood a character; absent where choices are not what is scored.
    pub acc_norm: Option<f64>,
    /// Its standard error.
    pub acc_norm_stderr: Option<f64>,
    /// What guessing gets: the mean of one over the number of choices; absent for items of one choice.
    pub chance: Option<f64>,
    /// What always naming the most frequent place of the answer gets; absent for items of one choice.
    pub majority: Option<f64>,
    /// `exp` of minus the mean log-likelihood of the choice; for items of one choice alone.
    pub perplexity: Option<f64>,
    /// Its standard error, to first order in that of the mean.
    pub perplexity_stderr: Option<f64>,
    /// Items in which the best choices tie.
    pub tied: usize,
    /// Items whose context was cut on the left.
    pub cut: usize,
}

/// A task's numbers, and those of its items.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskResult {
    /// The task as a whole.
    pub score: TaskScore,
    /// Its items in order.
    pub items: Vec<ItemScore>,
}

impl TaskResult {
    /// Judges the items of a task; `of_items` holds the places of their requests.
    pub(super) fn new(task: &Task, of_items: &[Places], requests: &Requests, scores: &[Score]) -> Self {
        let mut items = Vec::with_capacity(of_items.len());
        let (mut tied, mut cut) = (0, 0);
        for (item, places) in task.items().iter().zip(of_items) {
            let sum = |pieces: &Vec<usize>| pieces.iter().map(|&place| scores[place].log_likelihood).sum();
            let log_likelihoods: Vec<f64> = places.iter().map(sum).collect();
            let (acc, ties) = match task.is_choice() {
                true => share(&log_likelihoods, item.answer),
                false => (f64::from(u8::from(places[0].iter().all(|&place| scores[place].likeliest))), 1),
            };
            let acc_norm = task.has_norm().then(|| share(&by_character(&log_likelihoods, item), item.answer).0);
            tied += usize::from(ties > 1);
            cut += usize::from(places.iter().flatten().any(|&place| requests.is_cut(place)));
            items.push(ItemScore { id: item.id.clone(), log_likelihoods, acc, acc_norm });
        }
        let acc = Mean::of(items.iter().map(|item| item.acc));
        let acc_norm = task.has_norm().then(|| Mean::of(items.iter().filter_map(|item| item.acc_norm)));
        let main = acc_norm.filter(|_| task.metric() == "acc_norm").unwrap_or(acc);
        let nats = (!task.is_choice()).then(|| Mean::of(items.iter().map(|item| -item.log_likelihoods[0])));
        let perplexity = nats.map(|nats| nats.mean.exp());
        let guesses = task.is_choice().then(|| guesses(task.items()));
        let score = TaskScore {
            task: task.name().to_owned(),
            items: items.len(),
            items_in_file: task.n_in_file(),
            metric: task.metric().to_owned(),
            accuracy: main.mean,
            stderr: main.stderr,
            acc: acc.mean,
            acc_stderr: acc.stderr,
            acc_norm: acc_norm.map(|acc| acc.mean),
            acc_norm_stderr: acc_norm.and_then(|acc| acc.stderr),
            chance: guesses.map(|(chance, _)| chance),
            majority: guesses.map(|(_, majority)| majority),
            perplexity,
            perplexity_stderr: nats.and_then(|nats| nats.stderr).zip(perplexity).map(|(stderr, value)| stderr * value),
            tied,
            cut,
        };
        Self { score, items }
    }
}

/// What an item counts whose choices have these scores, and how many of them are best.
fn share(scores: &[f64], answer: usize) -> (f64, usize) {
    let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let n_best = scores.iter().filter(|&&score| score == best).count();
    (if scores[answer] == best { 1. / n_best as f64 } else { 0. }, n_best)
}

/// Scores over the characters of the choices without their leading space.
fn by_character(log_likelihoods: &[f64], item: &Item) -> Vec<f64> {
    let n_chars = |choice: &str| choice.strip_prefix(' ').unwrap_or(choice).chars().count() as f64;
    log_likelihoods.iter().zip(&item.choices).map(|(score, choice)| score / n_chars(choice)).collect()
}

/// Accuracy of guessing, and of naming the same place always.
fn guesses(items: &[Item]) -> (f64, f64) {
    let n_items = items.len() as f64;
    let chance = items.iter().map(|item| 1. / item.choices.len() as f64).sum::<f64>() / n_items;
    let mut counts = vec![0usize; items.iter().map(|item| item.choices.len()).max().unwrap_or(0)];
    items.iter().for_each(|item| counts[item.answer] += 1);
    (chance, counts.into_iter().max().unwrap_or(0) as f64 / n_items)
}

#[derive(Clone, Copy)]
struct Mean {
    mean: f64,
    stderr: Option<f64>,
}

impl Mean {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let n = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / n;
        let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
        Self { mean, stderr: (n > 1.).then(|| (squares / (n - 1.) / n).sqrt()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tie_counts_by_its_share() {
        assert_eq!(share(&[-3., -1., -2.], 1), (1., 1));
        assert_eq!(share(&[-3., -1., -2.], 0), (0., 1));
        assert_eq!(share(&[-1., -1., -2., -1.], 3), (1. / 3., 3));
        assert_eq!(share(&[-1., -1., -2., -1.], 2), (0., 3));
    }

    #[test]
    fn a_choice_is_as_long_as_its_characters() {
        let choices = vec![" añb".to_owned(), "  x".to_owned()];
        let item = Item { id: Value::Null, context: String::new(), choices, answer: 0, suffix: None, line: 1 };
        assert_eq!(by_character(&[-6., -6.], &item), [-2., -3.]);
    }

    #[test]
    fn the_standard_error_is_that_of_the_sample() {
        let mean = Mean::of([1., 0., 0., 1., 1.].into_iter());
        assert!((mean.mean - 0.6).abs() < 1e-15);
        assert!((mean.stderr.unwrap() - (0.3f64 / 5.).sqrt()).abs() < 1e-15);
        assert_eq!(Mean::of([1.].into_iter()).stderr, None);
    }
}
