//! A run that died ends where an uninterrupted one does, to the last bit. Those that were stopped are in `tests/selftest.rs`.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use common::{Bench, fresh, resume, sit};
use flowhn_train::checkpoint;
use flowhn_train::observe::{Event, StopFlag};
use flowhn_train::run_dir::METRICS;
use flowhn_train::selftest::small::Ending;
use flowhn_train::{Outcome, RunConfig, TrainOptions, Trainer};

fn ending(trainer: &Trainer) -> Ending {
    Ending::of(trainer).unwrap()
}

#[track_caller]
fn assert_same(got: &Ending, want: &Ending) {
    assert_eq!(got.difference(want), None);
}

/// A run of 40 steps without a break: the same for every test.
fn uninterrupted() -> &'static Ending {
    static ENDING: OnceLock<Ending> = OnceLock::new();
    ENDING.get_or_init(train_uninterrupted)
}

fn train_uninterrupted() -> Ending {
    let bench = Bench::new();
    let (trainer, outcome) = sit(&bench.config("whole", &[]), &fresh());
    assert!(matches!(outcome, Outcome::Done(_)));
    let ending = ending(&trainer);
    assert_eq!(ending.metrics.len(), 40, "every step is logged");
    assert_eq!(ending.validations.len(), 3, "steps 15, 30 and 40 are validated");
    ending
}

/// Trains and dies, as a killed process does, when step `at` has been handed to the device.
fn die_at(config: &RunConfig, options: &TrainOptions, at: u64) {
    let mut trainer = Trainer::new(config, options, &mut ()).unwrap();
    let mut observer = move |event: Event<'_>| {
        if let Event::Step { step, .. } = event {
            assert!(step < at, "dies here");
        }
    };
    let run = catch_unwind(AssertUnwindSafe(|| trainer.run(&mut observer, &StopFlag::default())));
    assert!(run.is_err());
}

#[test]
fn died_twice_and_resumed_from_the_last_checkpoint() {
    let bench = Bench::new();
    let want = uninterrupted();
    let config = bench.config("died", &[]);
    die_at(&config, &fresh(), 27);
    die_at(&config, &resume(), 39);
    // A line that was being written when the process died.
    let metrics = config.run.dir.join(METRICS);
    let mut torn = std::fs::read(&metrics).unwrap();
    torn.extend_from_slice(b"{\"step\": 36, \"tok");
    std::fs::write(&metrics, torn).unwrap();
    let (trainer, _) = sit(&config, &resume());
    assert_same(&ending(&trainer), want);
}

#[test]
fn died_before_the_first_checkpoint() {
    let bench = Bench::new();
    let want = uninterrupted();
    let config = bench.config("early", &[]);
    die_at(&config, &fresh(), 8);
    let (trainer, _) = sit(&config, &resume());
    assert_same(&ending(&trainer), want);
}

#[test]
fn a_torn_checkpoint_and_a_half_written_one_are_passed_over() {
    let bench = Bench::new();
    let want = uninterrupted();
    let config = bench.config("torn", &[]);
    sit(&config, &TrainOptions { stop_at: Some(30), ..fresh() });
    let checkpoints = config.run.dir.join("checkpoints");
    let model = checkpoints.join("step-30/model.safetensors");
    let bytes = std::fs::read(&model).unwrap();
    std::fs::write(&model, &bytes[..bytes.len() / 2]).unwrap();
    let half = checkpoints.join(".step-33.tmp-1");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("model.safetensors"), b"half").unwrap();

    let mut skipped = Vec::new();
    let mut resumed = None;
    let mut observer = |event: Event<'_>| match event {
        Event::Skipped(error) => skipped.push(error.to_string()),
        Event::Resumed { step, .. } => resumed = Some(step),
        _ => {}
    };
    let mut trainer = Trainer::new(&config, &resume(), &mut observer).unwrap();
    assert_eq!(resumed, Some(20));
    assert_eq!(skipped.len(), 1);
    assert!(skipped[0].contains("step-30") && skipped[0].contains("model.safetensors has"), "{}", skipped[0]);
    assert!(!half.exists(), "what a dead process left is cleared away");
    trainer.run(&mut (), &StopFlag::default()).unwrap();
    assert_same(&ending(&trainer), want);
    assert!(valid(&checkpoints.join("step-30")), "the torn checkpoint was replaced on the way");
}

fn valid(path: &Path) -> bool {
    checkpoint::Checkpoint::open(path).is_ok()
}

#[test]
fn when_things_are_shown_and_kept_changes_nothing() {
    let bench = Bench::new();
    let want = uninterrupted();
    let sets = ["train.log_every=1", "train.checkpoint_every=0", "train.keep_last=1"];
    let config = bench.config("other", &sets);
    let options = TrainOptions { prefetch: 0, ..fresh() };
    sit(&config, &TrainOptions { stop_at: Some(12), ..options.clone() });
    let sets = ["train.log_every=13", "train.checkpoint_every=4", "train.recompute_every=1"];
    let config = bench.config("other", &sets);
    let (trainer, _) = sit(&config, &TrainOptions { start: flowhn_train::run_dir::Start::Resume, ..options });
    assert_same(&ending(&trainer), want);
}

#[test]
fn a_complete_run_resumes_to_its_summary() {
    let bench = Bench::new();
    let config = bench.config("complete", &["train.steps=6"]);
    let (trainer, _) = sit(&config, &fresh());
    let want = ending(&trainer);
    drop(trainer);
    let (trainer, outcome) = sit(&config, &resume());
    assert!(matches!(outcome, Outcome::Done(summary) if summary.steps == 6));
    assert_same(&ending(&trainer), &want);
}

#[test]
fn a_run_that_changes_its_device_is_warned() {
    let bench = Bench::new();
    let config = bench.config("moved", &[]);
    die_at(&config, &fresh(), 27);
    let warnings = || {
        let mut warnings = Vec::new();
        let mut observer = |event: Event<'_>| {
            if let Event::Warning(text) = event {
                warnings.push(text);
            }
        };
        Trainer::new(&config, &resume(), &mut observer).unwrap();
        warnings
    };
    assert!(warnings().is_empty());
    let (_, checkpoint) = checkpoint::list(&config.run.dir.join("checkpoints")).unwrap().pop().unwrap();
    let state = checkpoint.join("state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let moved = text.replace("\"device_type\": \"cpu\"", "\"device_type\": \"cuda\"");
    assert_ne!(moved, text);
    std::fs::write(&state, moved).unwrap();
    let [warning] = &warnings()[..] else { panic!("one warning is expected") };
    assert!(warning.contains("on a GPU, this process computes on the CPU (--device)"), "{warning}");
}
