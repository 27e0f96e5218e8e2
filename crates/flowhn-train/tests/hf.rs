//! Checkpoints of transformers, in and out; the other side is in `crates/flowhn/tests/hf`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use flowhn_model::{Family, Input, Model, WeightFile};
use flowhn_torch::testing::assert_close;
use flowhn_train::checkpoint::Checkpoint;
use flowhn_train::hf::{ImportOptions, Imported, export, import};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};
use tch::{Device, Kind, Tensor, no_grad};

/// Tensors by name.
type Named = Vec<(String, Tensor)>;

/// A golden file: a model of transformers with its outputs.
fn golden(name: &str) -> WeightFile {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../flowhn-model/tests/golden");
    WeightFile::read(&dir.join(format!("{name}.safetensors"))).unwrap()
}

fn weights(file: &WeightFile) -> Named {
    let named =
        |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix("w.")?.to_owned(), tensor.shallow_clone()));
    let mut weights: Vec<_> = file.tensors.iter().filter_map(named).collect();
    weights.sort_by(|(left, _), (right, _)| left.cmp(right));
    weights
}

fn write(path: &Path, tensors: &[(String, Tensor)]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, t)| Vec::<f32>::try_from(t.flatten(0, -1)).unwrap().iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, tensor), bytes)| {
        let shape = tensor.size().into_iter().map(|size| size as usize).collect();
        (name.clone(), TensorView::new(Dtype::F32, shape, bytes).unwrap())
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// A directory as transformers would save the model of a golden file, its weights changed by `change`.
fn saved(dir: &Path, file: &WeightFile, change: impl FnOnce(&mut Named)) -> PathBuf {
    let from = dir.join("theirs");
    fs::create_dir_all(&from).unwrap();
    fs::write(from.join("config.json"), &file.metadata["config"]).unwrap();
    let mut tensors = weights(file);
    change(&mut tensors);
    write(&from.join("model.safetensors"), &tensors);
    from
}

fn imported(from: &Path, to: &Path) -> flowhn_train::Result<Imported> {
    import(&ImportOptions { from: from.to_owned(), to: to.to_owned(), seq_len: Some(64), tokenizer: None })
}

fn model_of(imported: &Imported) -> Model {
    let checkpoint = Checkpoint::open(&imported.checkpoint).unwrap();
    let model = Model::new(&checkpoint.config().unwrap().model, Device::Cpu, 1).unwrap();
    checkpoint.load_into(model.params()).unwrap();
    model
}

#[test]
fn every_family_comes_in_computes_and_goes_out_again() {
    for (name, family) in [
        ("llama_biases_mqa", Family::Llama),
        ("llama_scaled_positions", Family::Llama),
        ("mamba_untied_biases", Family::Mamba),
        ("mamba2_one_group_tied", Family::Mamba2),
        ("mamba2_strided_biases", Family::Mamba2),
        ("jamba_offset_biases", Family::Jamba),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let file = golden(name);
        let from = saved(dir.path(), &file, |_| ());
        let first = imported(&from, &dir.path().join("run")).unwrap();
        assert_eq!(first.family, family, "{name}");
        assert!(matches!(first.warnings.as_slice(), [one] if one.contains("tokenizer.json")), "{:?}", first.warnings);
        let model = model_of(&first);
        let logits = no_grad(|| model.forward(&Input::new(&file.tensors["input_ids"]))).unwrap().logits;
        assert_close(name, &logits, &file.tensors["logits"], 1e-5);

        let to = dir.path().join("back");
        let exported = export(&model, None, &to).unwrap();
        assert_eq!(exported.family, family);
        assert_eq!(exported.warnings.len(), usize::from(name.contains("strided")), "{:?}", exported.warnings);
        let back = WeightFile::read(&to.join("model.safetensors")).unwrap();
        assert_eq!(back.metadata["format"], "pt");
        let want = weights(&file);
        // transformers 4.57 wants the tied head of a Mamba-2 spelled out.
        let repeated = usize::from(family == Family::Mamba2 && model.config().tie_embeddings);
        assert_eq!(back.tensors.len(), want.len() + repeated, "{name}");
        assert!(want.iter().all(|(name, tensor)| back.tensors[name].equal(tensor)), "{name}");
        let second = imported(&to, &dir.path().join("again")).unwrap();
        let again = no_grad(|| model_of(&second).forward(&Input::new(&file.tensors["input_ids"]))).unwrap().logits;
        assert!(again.equal(&logits), "{name}");
    }
}

#[test]
fn multipliers_come_in_as_factors_and_go_out_as_ones() {
    for name in ["falcon_h1_multipliers", "falcon_h1_norm_before_gate"] {
        let dir = tempfile::tempdir().unwrap();
        let file = golden(name);
        let from = saved(dir.path(), &file, |_| ());
        let first = imported(&from, &dir.path().join("run")).unwrap();
        assert_eq!(first.family, Family::FalconH1);
        assert!(first.warnings.iter().any(|warning| warning.contains("multipliers")), "{:?}", first.warnings);
        let model = model_of(&first);
        assert_eq!(model.config().tie_embeddings, name.contains("before"));
        let ids = &file.tensors["input_ids"];
        let logits = no_grad(|| model.forward(&Input::new(ids))).unwrap().logits;
        assert_close(name, &logits, &file.tensors["logits"], 1e-5);

        let to = dir.path().join("back");
        assert!(export(&model, None, &to).unwrap().warnings.is_empty());
        let second = imported(&to, &dir.path().join("again")).unwrap();
        assert!(!second.warnings.iter().any(|warning| warning.contains("multipliers")), "{:?}", second.warnings);
        let again = model_of(&second);
        assert_eq!(again.config(), model.config());
        for (theirs, ours) in again.params().iter().zip(model.params()) {
            assert!(theirs.weight.master().equal(ours.weight.master()), "{name}: {}", ours.name);
        }
        // The same names as before, and one number by hand.
        let back = WeightFile::read(&to.join("model.safetensors")).unwrap().tensors;
        let want = weights(&file);
        assert_eq!(back.len(), want.len());
        assert!(want.iter().all(|(name, tensor)| back[name].size() == tensor.size()), "{name}");
        let down = "model.layers.1.feed_forward.down_proj.weight";
        let folded = (file.tensors[&format!("w.{down}")].to_kind(Kind::Double) * 0.59).to_kind(Kind::Float);
        assert!(back[down].equal(&folded), "{name}");
    }
}

#[test]
fn tensors_of_a_mixer_that_do_not_fit_are_listed_too() {
    let dir = tempfile::tempdir().unwrap();
    let from = saved(dir.path(), &golden("falcon_h1_norm_before_gate"), |tensors| {
        tensors.retain(|(name, _)| name != "model.layers.1.mamba.norm.weight");
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name == "model.layers.0.mamba.in_proj.weight") {
            *tensor = tensor.narrow(0, 0, 50);
        }
    });
    let message = imported(&from, &dir.path().join("run")).unwrap_err().to_string();
    assert!(message.contains("missing [\"model.layers.1.mamba.norm.weight\"]"), "{message}");
    assert!(message.contains("model.layers.0.mamba.in_proj.weight is [50, 12], expected [78, 12]"), "{message}");
}

#[test]
fn shards_are_read_by_their_index_and_a_repeated_head_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let file = golden("mamba2_one_group_tied");
    let from = saved(dir.path(), &file, |_| ());
    fs::remove_file(from.join("model.safetensors")).unwrap();
    let mut all = weights(&file);
    // transformers leaves it out; other writers do not.
    all.push(("lm_head.weight".to_owned(), file.tensors["w.backbone.embeddings.weight"].shallow_clone()));
    let (left, right) = all.split_at(all.len() / 2);
    let mut map = HashMap::new();
    for (name, part) in [("a.safetensors", left), ("b.safetensors", right)] {
        write(&from.join(name), part);
        map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), name)));
    }
    let index = |map: &HashMap<String, &str>| {
        let text = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        fs::write(from.join("model.safetensors.index.json"), text).unwrap();
    };
    index(&map);
    imported(&from, &dir.path().join("run")).unwrap();
    map.insert("elsewhere".to_owned(), "a.safetensors");
    index(&map);
    let error = imported(&from, &dir.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("do not hold: [\"elsewhere\"]"), "{error}");
    map.insert("elsewhere".to_owned(), "c.safetensors");
    index(&map);
    assert!(imported(&from, &dir.path().join("none")).unwrap_err().to_string().contains("c.safetensors"));
}

#[test]
fn tensors_that_do_not_fit_are_listed_and_nothing_is_made() {
    let file = golden("llama_biases_mqa");
    let refusal = |change: &dyn Fn(&mut Named)| {
        let dir = tempfile::tempdir().unwrap();
        let from = saved(dir.path(), &file, change);
        let run = dir.path().join("run");
        let message = imported(&from, &run).unwrap_err().to_string();
        assert!(!run.exists());
        message
    };
    let (norm, bias) = ("model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.bias");
    let missing = refusal(&|tensors| tensors.retain(|(name, _)| name != norm && name != bias));
    assert!(missing.contains("missing [") && missing.contains(norm) && missing.contains(bias), "{missing}");
    let extra = refusal(&|tensors| tensors.push(("extra".to_owned(), Tensor::zeros([1], (Kind::Float, Device::Cpu)))));
    assert!(extra.contains("left over [\"extra\"]"), "{extra}");
    let shape = refusal(&|tensors| {
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name == norm) {
            *tensor = Tensor::zeros([5], (Kind::Float, Device::Cpu));
        }
    });
    assert!(shape.contains(&format!("{norm} is [5], expected [12]")), "{shape}");
}
