//! The ten systems of the paper's table and Falcon-H1 as they ship (`configs/paper/tiny`, `configs/falcon_h1`): what they cost is what they
//! compute, as it is for the rows of `configs/bench`; every parameter learns, and they decode exactly.

use std::path::Path;

use flowhn_model::config::{ModelConfig, RawModel, from_table, load_table};
use flowhn_model::selftest::small::ids as any_ids;
use flowhn_model::{Family, Input, Model, hf};
use flowhn_split::{BlockForm, Element, ModelFlops, PlanReport, ScoreCount};
use flowhn_torch::testing::{assert_close, count_matmul_flops};
use tch::{Device, Tensor, no_grad};

const ROWS: [&str; 10] =
    ["llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "no_split", "ae_split", "fa_split", "fac_split"];
const SIZES: [&str; 4] = ["tiny", "135m", "350m", "1b"];

fn config(size: &str, row: &str, sets: &[&str]) -> ModelConfig {
    let file = if row == "falcon_h1" { format!("{row}/{size}.toml") } else { format!("paper/{size}/{row}.toml") };
    config_of(&file, sets)
}

fn config_of(file: &str, sets: &[&str]) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(file);
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let mut table = load_table(&path, &sets).unwrap();
    let toml::Value::Table(section) = table.remove("model").unwrap() else { panic!("{file} has no [model]") };
    ModelConfig::check(from_table::<RawModel>(section).unwrap()).unwrap()
}

/// The rows and what has a folder of its own.
fn models() -> impl Iterator<Item = &'static str> {
    ROWS.into_iter().chain(["falcon_h1"])
}

/// A row that is quick to run: the shipped one with fewer tokens.
fn model(row: &str) -> Model {
    Model::new(&config("tiny", row, &["model.vocab_size=61", "model.seq_len=48"]), Device::Cpu, 3).unwrap()
}

/// The rows whose speed is measured.
fn bench_rows() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/bench/1b");
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let rows: Vec<String> = files.map(|file| file.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    assert!(rows.len() >= 11, "{rows:?}");
    rows.into_iter().filter(|row| row != "base").collect()
}

/// A row of `configs/bench` with fewer tokens and narrower; blocks, policy and mixer are its own.
fn bench_model(row: &str) -> Model {
    let mut sets = vec![
        "model.vocab_size=61",
        "model.seq_len=48",
        "model.d_model=64",
        "model.attn.n_heads=4",
        "model.attn.n_kv_heads=2",
        "model.attn.d_head=16",
        "model.ssm.d_inner=128",
        "model.split.tile=8",
        "model.split.chunk_len=8",
    ];
    // This row has no MLP.
    if row != "mamba2" {
        sets.push("model.d_ff=172");
    }
    Model::new(&config_of(&format!("bench/1b/{row}.toml"), &sets), Device::Cpu, 3).unwrap()
}

fn ids(batch: i64, len: usize) -> Tensor {
    any_ids(batch, len, 4, Device::Cpu)
}

fn report(config: &ModelConfig) -> PlanReport {
    PlanReport::new(&config.shape(), &config.routing().unwrap(), config.seq_len, Element::Fp32).unwrap()
}

#[test]
fn rows_of_one_size_have_as_many_parameters() {
    for size in SIZES {
        let counts = ROWS.map(|row| report(&config(size, row, &[])).parameters);
        let want = counts[9] as f64;
        for (row, count) in ROWS.iter().zip(counts) {
            let off = (count as f64 / want - 1.).abs();
            assert!(off < 0.05, "{size}/{row} has {count} parameters, fac_split {want}");
        }
    }
}

#[test]
fn every_row_computes_what_the_plan_counts() {
    let shipped = models().map(|row| (row.to_owned(), model(row)));
    let measured = bench_rows().into_iter().map(|row| (format!("bench/{row}"), bench_model(&row)));
    for (row, model) in shipped.chain(measured) {
        let seq_len = model.config().seq_len;
        let (batch, shape) = (2, model.shape());
        let output = count_matmul_flops(|| no_grad(|| model.forward(&Input::new(&ids(batch, seq_len)))));
        let (output, executed) = output.unwrap();
        assert_eq!(output.unwrap().logits.size(), [batch, seq_len as i64, 61]);
        let counted = ModelFlops::new(&shape, model.routing(), seq_len, ScoreCount::Causal).unwrap();
        let of_block = |flops: &flowhn_split::BlockFlops| flops.attn.matmul + flops.ssm.matmul + flops.fuse + flops.mlp;
        let counted = counted.head + counted.blocks.iter().map(of_block).sum::<u64>();
        assert_eq!(executed, batch as u64 * counted, "{row}");
        let ids = ids(batch, seq_len);
        let step = count_matmul_flops(|| model.backward(&ids, &ids, None, 1).unwrap()).unwrap().1;
        assert_eq!(step, 3 * executed, "{row}: backward computes twice what forward does");
        assert_eq!(model.params().n_elements(), report(model.config()).parameters, "{row}");
    }
}

#[test]
fn every_parameter_of_every_row_learns() {
    for row in models() {
        let model = model(row);
        let seq_len = model.config().seq_len;
        let batch = ids(2, seq_len + 1);
        let (inputs, targets) = (batch.narrow(1, 0, seq_len as i64), batch.narrow(1, 1, seq_len as i64));
        let before = model.loss(&inputs, &targets, None).unwrap();
        before.backward();
        let mut squares = 0.;
        for param in model.params() {
            let grad = param.weight.master().grad();
            assert!(grad.defined() && grad.abs().max().double_value(&[]) > 0., "{row}: {} stays", param.name);
            squares += grad.square().sum(tch::Kind::Double).double_value(&[]);
        }
        for param in model.params() {
            let weight = param.weight.master();
            let moved = weight.detach() - weight.grad() * (0.02 / squares.sqrt());
            model.params().assign(&param.name, &moved).unwrap();
        }
        let after = no_grad(|| model.loss(&inputs, &targets, None)).unwrap().double_value(&[]);
        assert!(after < before.double_value(&[]), "{row}: {after} after a step, {before} before");
    }
}

#[test]
fn every_row_decodes_and_looks_back_only() {
    for row in models() {
        let model = model(row);
        let ids = ids(2, 60);
        let want = no_grad(|| model.logits(&ids, None)).unwrap();
        let mut decoder = model.decoder(2).unwrap();
        let mut pieces = vec![decoder.feed_all(&ids.narrow(1, 0, 19)).unwrap()];
        pieces.extend((19..60).map(|pos| decoder.feed_all(&ids.narrow(1, pos, 1)).unwrap()));
        assert_close(row, &Tensor::cat(&pieces, 1), &want, 1e-4);
        let changed = ids.copy();
        let other = (ids.narrow(1, 31, 1) + 1).remainder(61);
        changed.narrow(1, 31, 1).copy_(&other);
        let moved = no_grad(|| model.logits(&changed, None)).unwrap();
        assert!(moved.narrow(1, 0, 31).equal(&want.narrow(1, 0, 31)), "{row} sees ahead");
    }
}

#[test]
fn rows_that_have_a_public_twin_are_written_as_such() {
    for (row, want) in [
        ("llama", Family::Llama),
        ("mamba1", Family::Mamba),
        ("mamba2", Family::Mamba2),
        ("jamba", Family::Jamba),
        ("shm", Family::Jamba),
    ] {
        for size in SIZES {
            let config = config(size, row, &[]);
            assert_eq!(hf::write_config(&config).unwrap().0, want, "{size}/{row}");
        }
    }
    assert_eq!(hf::write_config(&config("tiny", "falcon_h1", &[])).unwrap().0, Family::FalconH1);
    for row in ["hymba", "no_split", "ae_split", "fa_split", "fac_split"] {
        let config = config("tiny", row, &[]);
        assert!(hf::write_config(&config).is_err(), "{row}");
        assert_eq!(config.block_shape(0).form == BlockForm::Released, row != "hymba");
    }
}
