//! Checkpoints: whole or absent, and every kind of damage told apart.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::Bench;
use common::storage::SmallDisk;
use flowhn_train::checkpoint::{
    self, Checkpoint, DeviceType, Progress, Snapshot, latest_valid, list, prune, resolve, save, step_dir,
};
use flowhn_train::data::SamplerState;
use flowhn_train::storage::{Disk, Storage};
use flowhn_train::{Error, RunConfig};
use tch::{Device, Kind, Tensor};

const PRINT: &str = "00112233445566778899aabbccddeeff";

struct Place {
    bench: Bench,
    config: RunConfig,
    dir: PathBuf,
}

impl Place {
    fn new() -> Self {
        let bench = Bench::new();
        let config = bench.config("run", &[]);
        let dir = bench.path("checkpoints");
        fs::create_dir(&dir).unwrap();
        Self { bench, config, dir }
    }

    fn save_on(&self, storage: &dyn Storage, step: u64) -> Result<PathBuf, Error> {
        let sampler =
            SamplerState { seed: 0, epoch: 0, index: step, n_windows: 99, seq_len: 48, data: PRINT.parse().unwrap() };
        let values = Tensor::arange(3000, (Kind::Float, Device::Cpu)) * step as f64 / 7.;
        let snapshot = Snapshot {
            progress: Progress {
                step,
                tokens: step * 192,
                elapsed_s: 0.1 * step as f64,
                n_threads: 2,
                device_type: Some(DeviceType::Cpu),
                sampler,
                tokenizer: PRINT.parse().unwrap(),
            },
            config: &self.config.to_toml().unwrap(),
            model: vec![("embed.weight".to_owned(), values.view([300, 10])), ("norm.weight".to_owned(), &values * 2.)],
            optimizer: vec![("step".to_owned(), Tensor::from(step as f32))],
        };
        save(storage, &self.dir, &snapshot)
    }

    fn save(&self, step: u64) -> PathBuf {
        self.save_on(&Disk, step).unwrap()
    }

    fn steps(&self) -> Vec<u64> {
        list(&self.dir).unwrap().into_iter().map(|(step, _)| step).collect()
    }

    /// Names in the directory, hidden ones included.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn open_error(path: &Path) -> String {
    Checkpoint::open(path).unwrap_err().to_string()
}

#[test]
fn what_was_saved_is_read() {
    let place = Place::new();
    let path = place.save(20);
    assert_eq!(place.names(), ["step-20"]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!((checkpoint.progress().step, checkpoint.progress().tokens), (20, 3840));
    assert_eq!(checkpoint.progress().sampler.index, 20);
    assert_eq!(checkpoint.config().unwrap(), place.config);
    let model = checkpoint.model().unwrap();
    assert_eq!(model[0].0, "embed.weight");
    let want = Tensor::arange(3000, (Kind::Float, Device::Cpu)) * 20. / 7.;
    assert!(model[0].1.equal(&want.view([300, 10])));
    assert!(model[1].1.equal(&(want * 2.)));
    assert_eq!(checkpoint.optimizer().unwrap()[0].1.double_value(&[]), 20.);
}

#[test]
fn torn_and_damaged_files_are_told_by_name() {
    let place = Place::new();
    let damaged = |name: &str, damage: &dyn Fn(&Path)| {
        let path = place.save(20);
        damage(&path.join(name));
        open_error(&path)
    };
    for name in ["model.safetensors", "optimizer.safetensors", "config.toml"] {
        let error = damaged(name, &|file| fs::remove_file(file).unwrap());
        assert!(error.contains(&format!("torn: {name} is missing")), "{error}");
        let error = damaged(name, &|file| {
            let bytes = fs::read(file).unwrap();
            fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
        });
        assert!(error.contains(&format!("torn: {name} has")), "{error}");
        let error = damaged(name, &|file| {
            let mut bytes = fs::read(file).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(file, bytes).unwrap();
        });
        assert!(error.contains(&format!("damaged: {name} does not have the hash")), "{error}");
    }
    let error = damaged("state.json", &|file| fs::remove_file(file).unwrap());
    assert!(error.contains("torn: state.json is missing"), "{error}");
    let error = damaged("state.json", &|file| fs::write(file, "{\"format\": \"flowhn-").unwrap());
    assert!(error.contains("state.json is damaged"), "{error}");
}

#[test]
fn foreign_things_and_later_versions_are_refused() {
    let place = Place::new();
    let foreign = place.dir.join("step-3");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("pytorch_model.bin"), "x").unwrap();
    assert!(open_error(&foreign).contains("not a FlowHN checkpoint"));
    fs::write(foreign.join("state.json"), "{\"epoch\": 3}").unwrap();
    assert!(open_error(&foreign).contains("not a FlowHN checkpoint"));

    let path = place.save(20);
    let state = fs::read_to_string(path.join("state.json")).unwrap();
    fs::write(path.join("state.json"), state.replace("\"version\": 2", "\"version\": 7")).unwrap();
    let error = open_error(&path);
    assert!(error.contains("newer FlowHN (format version 7") && error.contains("update"), "{error}");
    let error = resolve(&path.join("model.safetensors")).unwrap_err().to_string();
    assert!(error.contains("it is a file"), "{error}");
}

#[test]
fn another_configuration_is_told_by_its_first_key_and_both_values() {
    let place = Place::new();
    let checkpoint = Checkpoint::open(&place.save(20)).unwrap();
    let other = |sets: &[&str]| checkpoint.check_config(&place.bench.config("run", sets));
    for free in
        ["train.log_every=3", "run.dir=elsewhere", "train.keep_last=9", "data.cache_dir=/x", "train.eval_every=1"]
    {
        other(&[free]).unwrap();
    }
    for (set, key, stored, current) in [
        ("train.lr=0.25", "train.lr", "0.005", "0.25"),
        ("train.optim_state=int8", "train.optim_state", "\"fp32\"", "\"int8\""),
        ("model.d_ff=64", "model.d_ff", "48", "64"),
        ("train.schedule=wsd", "train.schedule", "\"cosine\"", "\"wsd\""),
        ("model.split.policy=ae_split", "model.split.policy", "cyclic_split", "ae_split"),
    ] {
        let error = other(&[set]).unwrap_err().to_string();
        let said = format!("made with {key} = ");
        assert!(error.contains(&said) && error.contains(stored) && error.contains(current), "{error}");
    }
}

#[test]
fn parameters_that_do_not_fit_the_model_are_named() {
    let place = Place::new();
    let checkpoint = Checkpoint::open(&place.save(20)).unwrap();
    let mut params = flowhn_nn::Params::new(Device::Cpu, 0);
    let mut root = params.root();
    let (init, decay) = (flowhn_nn::Init::Zeros, flowhn_nn::Decay::Yes);
    root.push("embed").weight("weight", &[300, 10], init.clone(), decay).unwrap();
    let error = checkpoint.load_into(&params).unwrap_err().to_string();
    assert!(error.contains("model.safetensors does not fit the model") && error.contains("norm.weight"), "{error}");
    let mut root = params.root();
    root.push("norm").weight("weight", &[3000], init.clone(), decay).unwrap();
    checkpoint.load_into(&params).unwrap();
    assert_eq!(params.get("norm.weight").unwrap().weight.master().double_value(&[7]), 40.);
    params.root().weight("extra", &[1], init, decay).unwrap();
    assert!(checkpoint.load_into(&params).unwrap_err().to_string().contains("it has no parameter extra"));
}

#[test]
fn the_newest_usable_one_is_found_and_the_others_are_accounted_for() {
    let place = Place::new();
    assert!(latest_valid(&place.dir).unwrap().checkpoint.is_none());
    for step in [5, 10, 100] {
        place.save(step);
    }
    let at = |latest: &checkpoint::Latest| latest.checkpoint.as_ref().unwrap().progress().step;
    let latest = latest_valid(&place.dir).unwrap();
    assert_eq!((at(&latest), latest.skipped.len()), (100, 0));
    fs::remove_file(step_dir(&place.dir, 100).join("state.json")).unwrap();
    fs::write(step_dir(&place.dir, 10).join("model.safetensors"), "short").unwrap();
    let latest = resolve(&place.dir).unwrap();
    assert_eq!(at(&latest), 5);
    let reasons: Vec<String> = latest.skipped.iter().map(ToString::to_string).collect();
    assert!(reasons[0].contains("step-100") && reasons[1].contains("step-10:"), "{reasons:?}");
    // The directory that holds `checkpoints` will do as well.
    assert_eq!(at(&resolve(place.dir.parent().unwrap()).unwrap()), 5);
    fs::remove_dir_all(step_dir(&place.dir, 5)).unwrap();
    let error = latest_valid(&place.dir).unwrap_err().to_string();
    assert!(
        error.contains("no usable checkpoint") && error.contains("step-100") && error.contains("step-10:"),
        "{error}"
    );
}

#[test]
fn a_torn_checkpoint_of_the_same_step_is_replaced() {
    let place = Place::new();
    let path = place.save(20);
    fs::write(path.join("model.safetensors"), "torn").unwrap();
    place.save(20);
    assert!(Checkpoint::open(&path).is_ok());
    assert_eq!(place.names(), ["step-20"]);
}

#[test]
fn old_ones_go_only_once_the_new_one_is_there() {
    let place = Place::new();
    for step in [9, 10, 20, 30] {
        place.save(step);
    }
    assert!(prune(&Disk, &place.dir, 30, 0).unwrap().is_empty());
    let removed = prune(&Disk, &place.dir, 30, 2).unwrap();
    assert_eq!(removed, [step_dir(&place.dir, 9), step_dir(&place.dir, 10)]);
    assert_eq!(place.steps(), [20, 30]);
    // A run that went on from 20 because 30 was torn keeps what it writes itself.
    place.save(25);
    prune(&Disk, &place.dir, 25, 1).unwrap();
    assert_eq!(place.steps(), [25, 30]);
}

/// Bytes of one checkpoint's tensors: 6000 f32 of the model and one of the optimiser.
const TENSOR_BYTES: u64 = 4 * 6001;

#[test]
fn a_full_disk_at_any_byte_leaves_the_earlier_ones_and_nothing_else() {
    let place = Place::new();
    let whole: u64 = fs::read_dir(place.save(10)).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    let before = fs::read(step_dir(&place.dir, 10).join("model.safetensors")).unwrap();
    for left in (0..whole).step_by(1777).chain([whole - 1]) {
        let error = place.save_on(&SmallDisk::new(left), 20).unwrap_err();
        let Error::DiskFull { needed_bytes, .. } = &error else { panic!("{left}: {error}") };
        assert_eq!(*needed_bytes, TENSOR_BYTES);
        let text = error.to_string();
        assert!(
            text.contains("step-20") && text.contains("disk is full") && text.contains("free some space"),
            "{text}"
        );
        assert_eq!(place.names(), ["step-10"], "with room for {left} bytes");
    }
    assert_eq!(fs::read(step_dir(&place.dir, 10).join("model.safetensors")).unwrap(), before);
    place.save_on(&SmallDisk::new(whole + 9), 20).unwrap();
    assert_eq!(place.steps(), [10, 20]);
}

#[test]
fn a_disk_that_says_it_is_too_small_is_believed_before_anything_is_written() {
    let place = Place::new();
    let error = place.save_on(&SmallDisk::honest(20_000), 20).unwrap_err();
    let Error::DiskFull { path, needed_bytes, free_bytes } = &error else { panic!("{error}") };
    assert!(path.ends_with("model.safetensors"));
    assert_eq!((*needed_bytes, *free_bytes), (TENSOR_BYTES, 20_000));
    assert!(place.names().is_empty());
}

#[test]
fn a_process_that_dies_while_writing_leaves_the_earlier_one_in_use() {
    let place = Place::new();
    let whole: u64 = fs::read_dir(place.save(10)).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    for left in (0..whole).step_by(2311) {
        place.save_on(&SmallDisk::deadly(left), 20).unwrap_err();
        assert_eq!(place.names().len(), 2, "what it left is there");
        assert_eq!(latest_valid(&place.dir).unwrap().checkpoint.unwrap().progress().step, 10);
        checkpoint::remove_stale(&Disk, &place.dir);
        assert_eq!(place.names(), ["step-10"]);
    }
}
