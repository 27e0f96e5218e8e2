//! A run from end to end, on a model that fits in a test.

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::storage::SmallDisk;
use common::{Bench, fresh, lines, resume, sit};
use flowhn_model::Model;
use flowhn_split::ScoreCount;
use flowhn_train::checkpoint::resolve;
use flowhn_train::data::{Score, ValidationSet};
use flowhn_train::estimate::{MemoryEstimate, StepFlops};
use flowhn_train::eval::{TextPartial, evaluate, evaluate_text};
use flowhn_train::generate::{SampleOptions, StopReason, generate};
use flowhn_train::metrics::{StepRecord, ValidRecord, read};
use flowhn_train::observe::{Event, StopFlag};
use flowhn_train::run_dir::{LOSS_PLOT, METRICS, SUMMARY, VALIDATION};
use flowhn_train::{Error, Outcome, RunConfig, TrainOptions, Trained, Trainer};
use tch::Device;

#[test]
fn a_run_learns_and_writes_everything_down() {
    let bench = Bench::new();
    let config = bench.config("learns", &["train.steps=120", "train.eval_every=60"]);
    let (trainer, outcome) = sit(&config, &fresh());
    let Outcome::Done(summary) = outcome else { panic!("{outcome:?}") };
    assert!(summary.val_bits_per_byte < 0.85 * summary.unigram_bits_per_byte, "{summary:?}");
    assert_eq!((summary.steps, summary.tokens), (120, 120 * 2 * 2 * 48));
    assert!(summary.seconds > 0. && summary.tokens_per_s > 0. && summary.mfu > 0. && summary.mfu < 1.);
    assert_eq!(summary.parameters, trainer.model().params().n_elements());

    let dir = &config.run.dir;
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join(SUMMARY)).unwrap()).unwrap();
    for key in
        ["parameters", "tokens", "seconds", "tokens_per_s", "val_loss", "val_bits_per_byte", "unigram_bits_per_byte"]
    {
        assert!(json[key].is_number(), "{key}");
    }
    let steps: Vec<StepRecord> = read(&dir.join(METRICS)).unwrap();
    assert_eq!(steps.iter().map(|record| record.step).collect::<Vec<_>>(), (1..=120).collect::<Vec<_>>());
    assert!(steps.iter().all(|r| r.mfu > 0. && r.tokens_per_s > 0. && r.max_memory_bytes > 0 && r.grad_norm > 0.));
    assert!(steps.windows(2).all(|pair| pair[0].elapsed_s <= pair[1].elapsed_s));
    assert_eq!(steps[119].lr, config.train.learning_rate().at(119));
    let valid: Vec<ValidRecord> = read(&dir.join(VALIDATION)).unwrap();
    assert_eq!(valid.iter().map(|record| record.step).collect::<Vec<_>>(), [60, 120]);
    assert_eq!(valid[1].val_loss, summary.val_loss);
    assert!(std::fs::read_to_string(dir.join(LOSS_PLOT)).unwrap().contains("unigram"));
    let names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().any(|name| name.to_string_lossy().starts_with("events.out.tfevents.")));
    let written: toml::Table = std::fs::read_to_string(dir.join("config.toml")).unwrap().parse().unwrap();
    assert_eq!(RunConfig::from_table(written).unwrap(), config);
}

fn load(config: &RunConfig) -> Trained {
    Trained::load(&config.run.dir, None, Device::Cpu, None).unwrap()
}

/// In pieces, to the bit; in batches of one sequence, up to rounding.
fn text_is_scored_alike(model: &Model, valid: &ValidationSet, want: Score, path: &Path) {
    assert!(valid.n_batches() > 2, "the text is too short to be scored in pieces");
    let mut reports = Vec::new();
    for (fingerprint, stop_after, n_known) in
        [("a", Some(1), 0), ("a", Some(2), 1), ("a", None, 2), ("a", Some(1), 0), ("b", None, 0)]
    {
        let mut partial = TextPartial::open(path, fingerprint).unwrap();
        assert_eq!(partial.n_batches(), n_known, "{fingerprint}: only the same evaluation goes on");
        let score = evaluate_text(model, valid, true, &mut partial, &mut |done, all| {
            reports.push((done, all));
            if stop_after == Some(done) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(score.unwrap(), stop_after.is_none().then_some(want), "to the bit, in however many pieces");
        if stop_after.is_none() {
            partial.remove().unwrap();
        }
    }
    let all = valid.n_batches();
    assert_eq!(reports[..5], [(0, all), (1, all), (1, all), (2, all), (2, all)]);
    assert!(!path.exists());

    let one_by_one = ValidationSet::new(valid.dataset(), valid.seq_len(), 1, None).unwrap();
    let alone = evaluate(model, &one_by_one, true).unwrap();
    assert_eq!((alone.n_targets, alone.text_bytes), (want.n_targets, want.text_bytes));
    assert!((alone.nats - want.nats).abs() < 1e-6 * want.nats, "{alone:?}, {want:?}");
}

#[test]
fn a_checkpoint_evaluates_to_the_loss_that_training_logged_and_speaks() {
    let bench = Bench::new();
    let config = bench.config("speaks", &[]);
    let (trainer, outcome) = sit(&config, &fresh());
    let Outcome::Done(summary) = outcome else { panic!("{outcome:?}") };
    let Trained { model, tokenizer, .. } = load(&config);
    let score: Score = evaluate(&model, trainer.valid(), true).unwrap();
    assert_eq!(score.nats_per_token().to_bits(), summary.val_loss.to_bits());
    assert_eq!(score.n_targets, trainer.valid().n_targets());
    assert_eq!(score.text_bytes, trainer.valid().text_bytes());
    text_is_scored_alike(&model, trainer.valid(), score, &config.run.dir.join("sums"));

    let options = SampleOptions { max_tokens: 30, ..SampleOptions::default() };
    let speak = |options: &SampleOptions| {
        let mut pieces = String::new();
        let said = generate(&model, &tokenizer, "the fox", options, &mut |piece| {
            pieces.push_str(piece);
            ControlFlow::Continue(())
        });
        let said = said.unwrap();
        assert_eq!(pieces, said.text, "what streams is what is returned");
        said
    };
    assert_eq!(speak(&options), speak(&options));
    let greedy = SampleOptions { temperature: 0., ..options };
    assert_eq!(speak(&greedy), speak(&SampleOptions { seed: 1, top_p: 0.3, ..greedy }));
    let said = speak(&greedy);
    assert!(said.n_tokens == 30 || said.stop == StopReason::EndOfText, "{said:?}");
    assert!(!said.text.is_empty());
    let broken_off = generate(&model, &tokenizer, "the fox", &greedy, &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!(broken_off.stop, StopReason::Interrupted);
    assert!(said.text.starts_with(&broken_off.text) && broken_off.n_tokens < said.n_tokens);
}

/// Greedy decoding by definition: the whole text again for every token.
#[test]
fn greedy_tokens_are_those_of_the_full_forward() {
    let bench = Bench::new();
    let config = bench.config("greedy", &["train.steps=30"]);
    sit(&config, &fresh());
    let Trained { model, tokenizer, .. } = load(&config);
    let options = SampleOptions { temperature: 0., max_tokens: 20, ..SampleOptions::default() };
    let said = generate(&model, &tokenizer, "a crow", &options, &mut |_| ControlFlow::Continue(())).unwrap();

    let mut ids = vec![i64::from(tokenizer.eot_id())];
    ids.extend(tokenizer.encode("a crow").unwrap().into_iter().map(i64::from));
    let n_prompt = ids.len();
    for _ in 0..said.n_tokens {
        let logits = model.logits(&tch::Tensor::from_slice(&ids).view([1, -1]), None).unwrap();
        ids.push(logits.select(1, -1).narrow(1, 0, tokenizer.vocab_size() as i64).argmax(1, false).int64_value(&[0]));
    }
    let added: Vec<u32> = ids[n_prompt..].iter().map(|&id| id as u32).collect();
    assert_eq!(tokenizer.decode(&added).unwrap(), said.text);
}

#[test]
fn a_model_of_the_released_form_speaks_too() {
    let bench = Bench::new();
    let sets =
        ["train.steps=2", "model.split.policy=fa_split", "model.split.released=true", "model.split.first_blocks=[]"];
    let (_, outcome) = sit(&bench.config("released", &sets), &fresh());
    let Outcome::Done(summary) = outcome else { panic!("{outcome:?}") };
    assert!(!summary.sample.is_empty());
}

/// Trains until a weight is spoiled right after step `at`, and returns the error.
fn spoiled_at(config: &RunConfig, at: u64) -> Error {
    let mut trainer = Trainer::new(config, &fresh(), &mut ()).unwrap();
    let weight = trainer.model().params().iter().next().unwrap().weight.master().detach();
    let mut observer = move |event: Event<'_>| {
        if matches!(event, Event::Step { step, .. } if step == at) {
            let _ = weight.shallow_clone().fill_(f64::NAN);
        }
    };
    trainer.run(&mut observer, &StopFlag::default()).unwrap_err()
}

#[test]
fn divergence_stops_with_the_batch_and_the_last_good_checkpoint() {
    let bench = Bench::new();
    let config = bench.config("diverges", &[]);
    let error = spoiled_at(&config, 12);
    let Error::NonFinite { step, loss, provenance, last_good, .. } = &error else { panic!("{error}") };
    // Step 13 is the first to see the weight; losses are read at step 14.
    assert_eq!((*step, loss.is_nan()), (13, true));
    assert!(provenance.contains("train.jsonl") && provenance.contains("window"), "{provenance}");
    assert!(error.to_string().contains("train.lr"), "{error}");
    assert_eq!(lines(&config.run.dir.join(METRICS)).len(), 12, "all steps before it are logged");
    assert!(last_good.as_ref().unwrap().ends_with("step-10"));
    let saved = resolve(&config.run.dir).unwrap().checkpoint.unwrap().model().unwrap();
    assert!(saved.iter().all(|(_, tensor)| tensor.isfinite().all().int64_value(&[]) == 1));
}

#[test]
fn weights_that_are_not_numbers_are_not_saved_though_the_losses_are() {
    let bench = Bench::new();
    let error = spoiled_at(&bench.config("spoiled", &[]), 10);
    let Error::NonFinite { step: 10, what, loss, provenance, last_good: None, .. } = &error else { panic!("{error}") };
    assert!(what.contains("weights") && loss.is_finite() && provenance.contains("train.jsonl"), "{error}");
}

#[test]
fn bf16_computes_with_masters_in_fp32() {
    let bench = Bench::new();
    let config = bench.config("half", &["train.dtype=bf16", "train.steps=60", "train.eval_every=0"]);
    let (trainer, outcome) = sit(&config, &fresh());
    let Outcome::Done(summary) = outcome else { panic!("{outcome:?}") };
    assert_eq!(summary.dtype, "bf16");
    assert!(summary.val_bits_per_byte < summary.unigram_bits_per_byte, "{summary:?}");
    let state = trainer.optimizer_state();
    let masters = trainer.model().params().iter().map(|param| param.weight.master().kind());
    assert!(masters.chain(state.iter().map(|(_, tensor)| tensor.kind())).all(|kind| kind == tch::Kind::Float));
}

#[test]
fn a_stop_finishes_the_step_and_saves() {
    let bench = Bench::new();
    let config = bench.config("stops", &[]);
    let mut trainer = Trainer::new(&config, &fresh(), &mut ()).unwrap();
    let stop = StopFlag::default();
    let asked = stop.clone();
    let mut observer = move |event: Event<'_>| {
        if matches!(event, Event::Step { step: 13, .. }) {
            asked.request();
        }
    };
    let outcome = trainer.run(&mut observer, &stop).unwrap();
    let Outcome::Stopped { step, checkpoint } = outcome else { panic!("{outcome:?}") };
    assert_eq!(step, 13);
    assert!(checkpoint.ends_with("checkpoints/step-13"));
    assert_eq!(lines(&config.run.dir.join(METRICS)).len(), 13);
    assert!(!config.run.dir.join(SUMMARY).exists());
}

#[test]
fn a_full_disk_ends_the_run_with_the_earlier_checkpoint_in_place() {
    let bench = Bench::new();
    let config = bench.config("full", &["train.eval_every=0"]);
    let bytes = {
        let (trainer, _) = sit(&bench.config("measure", &["train.steps=1"]), &fresh());
        trainer.estimate().checkpoint_bytes
    };
    // Room for one checkpoint and a half, with the small files.
    let options = TrainOptions { storage: Arc::new(SmallDisk::new(bytes * 3 / 2 + 20_000)), ..fresh() };
    let mut trainer = Trainer::new(&config, &options, &mut ()).unwrap();
    let error = trainer.run(&mut (), &StopFlag::default()).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    drop(trainer);
    let kept = resolve(&config.run.dir).unwrap();
    assert_eq!(kept.checkpoint.unwrap().progress().step, 10);
    let (_, outcome) = sit(&config, &resume());
    assert!(matches!(outcome, Outcome::Done(_)), "with room again, it goes on");
}

#[test]
fn a_resume_with_another_setting_tokenizer_or_text_is_refused() {
    let bench = Bench::new();
    let config = bench.config("refuses", &["train.steps=12"]);
    sit(&config, &TrainOptions { stop_at: Some(10), ..fresh() });
    let refused = |config: &RunConfig| Trainer::new(config, &resume(), &mut ()).err().unwrap().to_string();
    let error = refused(&bench.config("refuses", &["train.steps=12", "train.weight_decay=0.2"]));
    assert!(error.contains("train.weight_decay = 0.1") && error.contains("0.2"), "{error}");

    let other = bench.path("other.json");
    let text = [bench.path("valid.jsonl")];
    flowhn_train::data::train_tokenizer(&text, 290, &other, &flowhn_train::data::ReadOptions::default()).unwrap();
    let set = format!("data.tokenizer={}", other.display());
    let error = refused(&bench.config("refuses", &["train.steps=12", &set]));
    assert!(error.contains("checkpoint") && error.contains("tokenizer"), "{error}");
    let error = Trained::load(&config.run.dir, Some(&other), Device::Cpu, None).unwrap_err().to_string();
    assert!(error.contains("checkpoint") && error.contains("tokenizer"), "{error}");

    let set = format!("data.train=[\"{}\"]", bench.path("valid.jsonl").display());
    let error = refused(&bench.config("refuses", &["train.steps=12", &set]));
    assert!(error.contains("sampler's state"), "{error}");
}

#[test]
fn training_needs_text_and_says_which_key() {
    let bench = Bench::new();
    for (set, key) in
        [("data.train=[]", "data.train"), ("data.valid=[]", "data.valid"), ("data.tokenizer=", "data.tokenizer")]
    {
        let error = Trainer::new(&bench.config("needs", &[set]), &fresh(), &mut ()).err().unwrap().to_string();
        assert!(error.starts_with(key), "{error}");
    }
    let config = bench.config("needs", &["data.valid=[]", "data.valid_frac=0.1", "train.steps=1"]);
    assert!(matches!(sit(&config, &fresh()).1, Outcome::Done(_)));
}

#[test]
fn an_estimate_adds_up() {
    let bench = Bench::new();
    let config = bench.config("estimate", &[]);
    let trainer = Trainer::new(&config, &fresh(), &mut ()).unwrap();
    let (estimate, n) = (trainer.estimate(), trainer.model().params().n_elements());
    let memory = &estimate.memory;
    assert_eq!((memory.parameters_bytes, memory.gradients_bytes, memory.optimizer_bytes), (4 * n, 4 * n, 8 * n));
    assert_eq!(memory.total_bytes, 16 * n + memory.activations_bytes);
    assert_eq!(estimate.tokens, 40 * 4 * 48);
    let per_step = estimate.flops_per_step as f64;
    assert!((estimate.least_seconds * estimate.matmul.flops_per_s / (40. * per_step) - 1.).abs() < 1e-9);
    // Three times the head's and the blocks' weights twice, roughly: scores, conv and scan come on top.
    let floor = 6 * (n - 320 * 32);
    assert!(estimate.flops_per_token > floor / 2 && estimate.flops_per_token < 4 * floor, "{estimate:?}");
    assert!(!estimate.exceeds_memory());
    assert_eq!(estimate.recomputed_flops_per_step, 0);
}

#[test]
fn kept_types_and_recomputed_blocks_show_in_the_estimate() {
    let bench = Bench::new();
    let of = |sets: &[&str]| {
        let config = bench.config("trade", sets);
        let memory = MemoryEstimate::new(&config.model, &config.train, 1_000_000).unwrap();
        (memory, StepFlops::new(&config, ScoreCount::Causal).unwrap())
    };
    let (kept, flops) = of(&[]);
    assert_eq!(of(&["train.optim_state=bf16"]).0.optimizer_bytes, 4_000_000);
    let int8 = of(&["train.optim_state=int8"]).0;
    assert_eq!(int8.optimizer_bytes, 2 * (1_000_000 + 4 * 3907));
    assert_eq!(kept.total_bytes - int8.total_bytes, kept.optimizer_bytes - int8.optimizer_bytes);
    let (fp32, bf16) =
        (of(&["train.dtype=bf16"]).0, of(&["train.dtype=bf16", "train.grads=bf16", "train.grad_accum=1"]).0);
    let saved = fp32.gradients_bytes - bf16.gradients_bytes;
    assert!(saved > 0 && saved < fp32.gradients_bytes / 2 && fp32.total_bytes - bf16.total_bytes == saved, "{saved}");

    // 64 sequences of 48 tokens, 320 words in bf16: all their logits, or a MiB of them. Where they are several chunks, the head's gradient stays f32.
    let many =
        |sets: &[&str]| of(&[&["train.batch_size=64", "train.grad_accum=1", "train.dtype=bf16"], sets].concat()).0;
    let (all, some) = (many(&[]), many(&["train.logits_mib=1"]));
    assert_eq!(all.activations_bytes - some.activations_bytes, 64 * 48 * 320 * 2 - (1 << 20));
    let grads = |sets: &[&str]| many(&[&["train.grads=bf16"], sets].concat()).gradients_bytes;
    assert_eq!(grads(&["train.logits_mib=1"]) - grads(&[]), 2 * 320 * 32);

    // The first of two blocks; both; and the same model FLOPs each time.
    let (half, all) = (of(&["train.recompute_every=2"]), of(&["train.recompute_every=1"]));
    assert!(half.1.recomputed > 0 && half.1.recomputed < all.1.recomputed && flops.recomputed == 0);
    assert!(all.1.recomputed < flops.model / 3 && [half.1.model, all.1.model] == [flops.model; 2]);
    assert!(all.0.activations_bytes < kept.activations_bytes, "{all:?} {kept:?}");
}
