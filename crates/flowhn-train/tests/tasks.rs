//! Scores of tasks: the same in any company, those of a plain forward pass, and none lost where an evaluation is killed.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use flowhn_model::Model;
use flowhn_train::RunConfig;
use flowhn_train::data::Tokenizer;
use flowhn_train::tasks::{Partial, TASKS, Task, TaskOptions, TaskResult, evaluate_tasks, find_tasks};
use tch::{Device, Kind, Tensor};

fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&repo("data/tiny/tokenizer.json")).unwrap()
}

/// A configuration's model, smaller, with weights large enough to prefer some choices clearly.
fn model(config: &str) -> Model {
    let small = ["vocab_size=4096", "d_model=48", "d_ff=64", "n_layers=2", "seq_len=192"];
    let sets = small.map(|set| format!("model.{set}"));
    let config = RunConfig::load(&repo(config), &sets).unwrap().model;
    let model = Model::new(&config, Device::Cpu, 5).unwrap();
    tch::no_grad(|| {
        for param in model.params().iter() {
            let weight = param.weight.master();
            if weight.dim() == 2 {
                let _ = weight.shallow_clone().f_mul_scalar_(4.).unwrap();
            }
        }
    });
    model
}

fn tasks(limit: usize) -> Vec<Task> {
    let files = find_tasks(&["all".to_owned()], &repo("data/eval")).unwrap();
    assert_eq!(files.len(), TASKS.len(), "every task ships");
    files.iter().map(|file| Task::load(file, Some(limit)).unwrap()).collect()
}

fn score(model: &Model, tasks: &[Task], batch_size: Option<usize>) -> Vec<TaskResult> {
    let options = TaskOptions { batch_size, eot_first: false };
    evaluate_tasks(model, &tokenizer(), tasks, &options, None, &mut |_, _| ControlFlow::Continue(())).unwrap().unwrap()
}

#[test]
fn batch_one_equals_batch_sixty_four_to_the_bit() {
    // The second is planned at the actual length, so padding would make another model of it.
    for config in ["configs/tiny.toml", "configs/bench/cpu.toml"] {
        let model = model(config);
        let tasks = tasks(4);
        let alone = score(&model, &tasks, Some(1));
        assert_eq!(alone, score(&model, &tasks, Some(64)), "{config}");
        assert_eq!(
            alone[2],
            score(&model, &tasks[2..3], None).swap_remove(0),
            "nor does it matter what else is scored"
        );
        let spread = alone.iter().flat_map(|task| &task.items).map(|item| item.log_likelihoods[0]);
        assert!(spread.clone().all(|score| score.is_finite() && score < 0.));
    }
}

#[test]
fn batches_do_not_matter_to_any_row_of_the_table() {
    let tasks = tasks(1);
    let mut n_rows = 0;
    for entry in std::fs::read_dir(repo("configs/paper/tiny")).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("base.toml") {
            continue;
        }
        let config = RunConfig::load(&path, &[]).unwrap().model;
        let model = Model::new(&config, Device::Cpu, 5).unwrap();
        assert_eq!(score(&model, &tasks, Some(1)), score(&model, &tasks, Some(64)), "{}", path.display());
        n_rows += 1;
    }
    assert_eq!(n_rows, 10);
}

/// The log-likelihood of each choice, by a forward pass over this text alone.
fn plain(model: &Model, tokenizer: &Tokenizer, context: &str, continuation: &str) -> f64 {
    let encode = |text: &str| tokenizer.encode(text).unwrap().into_iter().map(i64::from).collect::<Vec<_>>();
    let whole = encode(&format!("{context}{continuation}"));
    let n_scored = whole.len() - encode(context.trim_end()).len();
    let kept = &whole[whole.len().saturating_sub(model.config().seq_len + 1)..];
    let inputs = Tensor::from_slice(&kept[..kept.len() - 1]).unsqueeze(0);
    let log_probs = model.logits(&inputs, None).unwrap().log_softmax(-1, Kind::Double);
    let first = kept.len() - n_scored;
    (first..kept.len()).map(|idx| log_probs.double_value(&[0, idx as i64 - 1, kept[idx]])).sum()
}

#[test]
fn scores_are_those_of_a_forward_pass_over_the_text_alone() {
    let (model, tokenizer) = (model("configs/tiny.toml"), tokenizer());
    let tasks = tasks(3);
    let results = score(&model, &tasks, None);
    for (task, result) in tasks.iter().zip(&results) {
        for (item, found) in task.items().iter().zip(&result.items) {
            for (choice, got) in item.choices.iter().zip(&found.log_likelihoods) {
                let want = match &item.suffix {
                    Some(suffix) => plain(&model, &tokenizer, &format!("{}{choice}", item.context), suffix),
                    None => plain(&model, &tokenizer, &item.context, choice),
                };
                assert!((got - want).abs() < 1e-5 * want.abs().max(1.), "{} {}: {got}, {want}", task.name(), item.id);
            }
        }
    }
    let cut = |name: &str| results.iter().find(|result| result.score.task == name).unwrap().score.cut;
    assert!(cut("boolq") > 0, "some passages are longer than the model");
}

#[test]
fn a_killed_evaluation_goes_on() {
    let (model, tokenizer) = (model("configs/tiny.toml"), tokenizer());
    let tasks = tasks(5);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scores");
    let whole = score(&model, &tasks, None);
    let options = TaskOptions::default();

    let mut partial = Partial::open(&path, "this model").unwrap();
    let mut broke_at = 0;
    let stopped = evaluate_tasks(&model, &tokenizer, &tasks, &options, Some(&mut partial), &mut |done, all| {
        broke_at = done;
        if 2 * done > all { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(stopped.unwrap().is_none());
    drop(partial);

    let mut partial = Partial::open(&path, "this model").unwrap();
    assert_eq!(partial.len(), broke_at);
    let mut first = None;
    let resumed = evaluate_tasks(&model, &tokenizer, &tasks, &options, Some(&mut partial), &mut |done, _| {
        first.get_or_insert(done);
        ControlFlow::Continue(())
    });
    assert_eq!(resumed.unwrap().unwrap(), whole);
    assert_eq!(first, Some(broke_at), "nothing was scored twice");
    let nothing_left = evaluate_tasks(&model, &tokenizer, &tasks, &options, Some(&mut partial), &mut |done, all| {
        assert_eq!(done, all);
        ControlFlow::Continue(())
    });
    assert_eq!(nothing_left.unwrap().unwrap(), whole);
    partial.remove().unwrap();
    assert!(!path.exists());
}

#[test]
fn equal_choices_tie_and_a_model_that_knows_nothing_guesses() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.jsonl");
    let item = |choices: &str, answer: usize| {
        format!("{{\"context\": \"The word is\", \"choices\": [{choices}], \"answer\": {answer}}}\n")
    };
    let text = item("\" one\", \" one\"", 1) + &item("\" one\", \" the\", \" one\", \" two\"", 1);
    std::fs::write(&path, text).unwrap();
    let tasks = [Task::load(&path, None).unwrap()];
    let model = model("configs/tiny.toml");
    let known = score(&model, &tasks, None).swap_remove(0);
    assert_eq!((known.items[0].acc, known.items[0].acc_norm), (0.5, Some(0.5)));
    assert_eq!(known.items[1].log_likelihoods[0], known.items[1].log_likelihoods[2]);

    tch::no_grad(|| {
        let head = model.params().iter().find(|param| param.name.starts_with("lm_head")).unwrap();
        let _ = head.weight.master().shallow_clone().f_zero_().unwrap();
    });
    let uniform = score(&model, &tasks, None).swap_remove(0);
    let (chance, scored) = (uniform.score.chance.unwrap(), uniform.score.acc);
    assert_eq!((chance, scored, uniform.score.tied), (0.375, 0.375, 2), "every choice is one token");
}

#[test]
fn a_task_that_is_not_there_is_told_with_those_that_are() {
    let error = find_tasks(&["arc_hard".to_owned()], &repo("data/eval")).unwrap_err().to_string();
    assert!(error.contains("arc_hard") && error.contains("arc_easy") && error.contains("--eval-data"), "{error}");
    let file = repo("data/eval/piqa.jsonl.gz");
    let found = find_tasks(&["boolq".to_owned(), file.display().to_string()], &repo("data/eval")).unwrap();
    assert_eq!(found.len(), 2);
    let all = find_tasks(&["boolq".to_owned(), "all".to_owned()], &repo("data/eval")).unwrap();
    assert_eq!((all.len(), all[0].file_name().unwrap().to_str()), (TASKS.len(), Some("boolq.jsonl.gz")));
}
