//! Our scores against those of EleutherAI's lm-evaluation-harness, which `harness/make.py` recorded for the same model and items.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use flowhn_model::{Model, hf};
use flowhn_train::data::Tokenizer;
use flowhn_train::tasks::{Task, TaskOptions, evaluate_tasks, find_tasks};
use serde::Deserialize;
use tch::{Device, Tensor};

#[derive(Deserialize)]
struct Fixture {
    made_by: String,
    config: serde_json::Value,
    limit: usize,
    tasks: BTreeMap<String, Recorded>,
}

#[derive(Deserialize)]
struct Recorded {
    acc: f64,
    acc_stderr: f64,
    acc_norm: Option<f64>,
    acc_norm_stderr: Option<f64>,
    perplexity: Option<f64>,
    log_likelihoods: Vec<Vec<f64>>,
}

fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// The weight of that name in `make.py`: numbers out of a hash of name and place.
fn weight(name: &str, shape: &[i64]) -> Tensor {
    let numel: i64 = shape.iter().product();
    let seed = u64::from(crc32(name.as_bytes()));
    let values: Vec<f32> = (0..numel as u64)
        .map(|idx| {
            let mut x = idx.wrapping_mul(2_654_435_761).wrapping_add(seed) & 0xFFFF_FFFF;
            x ^= x >> 15;
            x = (x * 2_246_822_519) & 0xFFFF_FFFF;
            x ^= x >> 13;
            let unit = x as f64 / 2f64.powi(32) - 0.5;
            let value = if let [_, width] = shape { unit * 5. / (*width as f64).sqrt() } else { 1. + unit / 4. };
            value as f32
        })
        .collect();
    Tensor::from_slice(&values).view(shape)
}

/// The checksum of zlib, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    };
    !bytes.iter().fold(!0, step)
}

fn model(config: &serde_json::Value) -> Model {
    let described = hf::read_config(&config.to_string(), 256).unwrap();
    let model = Model::new(&described.config, Device::Cpu, 0).unwrap();
    let names = described.family.names(&model).unwrap();
    let tensors: HashMap<String, Tensor> = names
        .iter()
        .map(|name| {
            let shape = name.piece_of(&model, |weight| Ok(weight.detach())).unwrap().size();
            (name.theirs.clone(), weight(&name.theirs, &shape))
        })
        .collect();
    described.family.load(&model, &tensors, &described.fold).unwrap();
    model
}

#[test]
fn scores_are_those_of_the_harness() {
    let fixture: Fixture = serde_json::from_str(include_str!("harness/llama.json")).unwrap();
    let model = model(&fixture.config);
    let tokenizer = Tokenizer::load(&repo("data/tiny/tokenizer.json")).unwrap();
    let files = find_tasks(&["all".to_owned()], &repo("data/eval")).unwrap();
    let tasks: Vec<Task> = files.iter().map(|file| Task::load(file, Some(fixture.limit)).unwrap()).collect();
    assert_eq!(tasks.len(), fixture.tasks.len(), "{}", fixture.made_by);
    let results =
        evaluate_tasks(
            &model,
            &tokenizer,
            &tasks,
            &TaskOptions::default(),
            None,
            &mut |_, _| ControlFlow::Continue(()),
        );
    for result in results.unwrap().unwrap() {
        let (name, score, want) = (&result.score.task, &result.score, &fixture.tasks[&result.score.task]);
        for (item, want) in result.items.iter().zip(&want.log_likelihoods) {
            assert_eq!(item.log_likelihoods.len(), want.len(), "{name} {}", item.id);
            for (got, want) in item.log_likelihoods.iter().zip(want) {
                assert!((got - want).abs() <= 1e-4, "{name} {}: {got}, {want} in the harness", item.id);
            }
        }
        let near = |got: Option<f64>, want: Option<f64>, what: &str| {
            if let Some(want) = want {
                let got = got.unwrap_or(f64::NAN);
                assert!((got - want).abs() <= 1e-5 * want.abs(), "{name} {what}: {got}, {want} in the harness");
            }
        };
        near(Some(score.acc), Some(want.acc), "acc");
        near(score.acc_stderr, Some(want.acc_stderr), "acc_stderr");
        near(score.acc_norm, want.acc_norm, "acc_norm");
        near(score.acc_norm_stderr, want.acc_norm_stderr, "acc_norm_stderr");
        near(score.perplexity, want.perplexity, "perplexity");
    }
}

#[test]
fn the_checksum_is_that_of_zlib() {
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
}
