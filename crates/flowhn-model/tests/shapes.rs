//! What a model is made of agrees with what the cost model says of it, and bad input gets an error.

use flowhn_model::selftest::small::{self, POLICIES, SEQ_LEN, VARIANTS, VOCAB, Variant};
use flowhn_split::{Element, PlanReport};
use tch::{Device, Kind, Tensor};

const MAMBA1: Variant = Variant { block: "flow", mixer: "mamba1", attn: "" };

fn ids(batch: i64, len: usize, seed: i64) -> Tensor {
    small::ids(batch, len, seed, Device::Cpu)
}

#[test]
fn parameters_are_those_of_the_cost_model() {
    let fusions = ["", "fusion = \"none\"", "fusion = \"gated\""];
    for variant in VARIANTS {
        for split in POLICIES {
            for fusion in fusions.iter().filter(|fusion| fusion.is_empty() || variant.block == "flow") {
                let mut config = variant.config(split).unwrap();
                match *fusion {
                    "fusion = \"none\"" => config.fusion = flowhn_split::Fusion::None,
                    "fusion = \"gated\"" => config.fusion = flowhn_split::Fusion::Gated,
                    _ => {}
                }
                let model = flowhn_model::Model::new(&config, Device::Cpu, 0).unwrap();
                let report = PlanReport::new(&model.shape(), model.routing(), SEQ_LEN, Element::Fp32).unwrap();
                let names: Vec<&str> = model.params().iter().map(|param| param.name.as_str()).collect();
                let made = model.params().n_elements();
                assert_eq!(made, report.parameters, "{variant:?} {split} {fusion}: {names:?}");
            }
        }
    }
}

#[test]
fn a_block_without_a_branch_has_no_parameters_for_it() {
    let model = MAMBA1.model(POLICIES[10], Device::Cpu).unwrap();
    let has = |prefix: &str| model.params().iter().any(|param| param.name.starts_with(prefix));
    assert!(has("layers.0.ssm.") && !has("layers.0.attn."));
    assert!(has("layers.1.attn.") && !has("layers.1.ssm."));
    assert!(has("layers.2.attn.") && has("layers.2.ssm."));
}

#[test]
fn gradients_in_bf16_take_the_head_where_its_logits_are_one_chunk() {
    const MIB: u64 = 1 << 20;
    // 600 tokens of this vocabulary are less than a MiB; a byte is room for a chunk of 256.
    for (tie_embeddings, logits_bytes, want) in
        [(false, MIB, Some(Kind::BFloat16)), (false, 1, Some(Kind::Float)), (true, MIB, None)]
    {
        let mut config = MAMBA1.config(POLICIES[0]).unwrap();
        config.tie_embeddings = tie_embeddings;
        let mut model = flowhn_model::Model::new(&config, Device::Cpu, 0).unwrap();
        model.set_logits_bytes(logits_bytes);
        model.use_bf16_grads(600).unwrap();
        let kind = |name: &str| {
            let param = model.params().iter().find(|param| param.name == name);
            param.map(|param| param.weight.grad_kind())
        };
        let embedding = model.params().iter().find(|param| param.name.starts_with("embed")).unwrap();
        assert_eq!((kind("lm_head.weight"), embedding.weight.grad_kind()), (want, Kind::Float));
        let in_blocks = model.params().iter().filter(|param| param.name.starts_with("layers."));
        assert!(in_blocks.filter(|param| param.weight.grad_kind() == Kind::BFloat16).count() > 4);
    }
}

#[test]
fn every_parameter_gets_a_gradient() {
    for variant in VARIANTS {
        for split in POLICIES {
            let model = variant.model(split, Device::Cpu).unwrap();
            let batch = ids(2, SEQ_LEN + 1, 2);
            let (inputs, targets) = (batch.narrow(1, 0, SEQ_LEN as i64), batch.narrow(1, 1, SEQ_LEN as i64));
            model.loss(&inputs, &targets, None).unwrap().backward();
            for param in model.params() {
                let grad = param.weight.master().grad();
                let live = grad.defined() && grad.abs().max().double_value(&[]) > 0.;
                assert!(live, "{variant:?} {split}: {} has no gradient", param.name);
                assert!(grad.isfinite().all().int64_value(&[]) == 1, "{}", param.name);
            }
        }
    }
}

#[test]
fn loss_is_the_mean_of_token_losses_and_starts_near_the_uniform_one() {
    let config = MAMBA1.config("policy = \"cyclic_split\"").unwrap();
    let model = flowhn_model::Model::new(&config, Device::Cpu, 0).unwrap();
    let batch = ids(3, 21, 2);
    let (inputs, targets) = (batch.narrow(1, 0, 20), batch.narrow(1, 1, 20).copy());
    targets.narrow(1, 4, 3).fill_(flowhn_model::IGNORE_INDEX).size();
    let loss = model.loss(&inputs, &targets, None).unwrap().double_value(&[]);
    let losses = model.token_losses(&inputs, &targets, None).unwrap();
    assert_eq!(losses.size(), [3, 20]);
    let mean = losses.sum(Kind::Double).double_value(&[]) / (3. * 17.);
    assert!((loss - mean).abs() < 1e-5 * mean, "{loss} {mean}");
    assert!((loss - (VOCAB as f64).ln()).abs() < 0.2, "{loss}");
}

#[test]
fn bf16_stays_close_to_f32() {
    for variant in VARIANTS {
        let mut model = variant.model("policy = \"cyclic_split\"", Device::Cpu).unwrap();
        let batch = ids(2, SEQ_LEN + 1, 2);
        let (inputs, targets) = (batch.narrow(1, 0, SEQ_LEN as i64), batch.narrow(1, 1, SEQ_LEN as i64));
        let f32_loss = model.loss(&inputs, &targets, None).unwrap().double_value(&[]);
        model.set_compute_kind(Kind::BFloat16);
        let loss = model.loss(&inputs, &targets, None).unwrap();
        assert_eq!(loss.kind(), Kind::Float);
        loss.backward();
        let bf16_loss = loss.double_value(&[]);
        assert!((bf16_loss - f32_loss).abs() < 0.03 * f32_loss, "{variant:?}: {bf16_loss} {f32_loss}");
        for param in model.params() {
            assert_eq!(param.weight.master().grad().kind(), Kind::Float, "{}", param.name);
        }
    }
}

#[test]
fn bad_input_is_refused() {
    let model = MAMBA1.model("policy = \"ae_split\"", Device::Cpu).unwrap();
    let good = ids(2, 8, 0);
    let refused = |ids: &Tensor, segments: Option<&Tensor>| model.logits(ids, segments).unwrap_err().to_string();
    assert!(refused(&(&good + VOCAB), None).contains("outside the vocabulary of 61"));
    assert!(refused(&(&good - VOCAB), None).contains("outside the vocabulary"));
    assert!(refused(&good.to_kind(Kind::Float), None).contains("expected i64"));
    assert!(refused(&good.view([16]), None).contains("[16]"));
    assert!(refused(&good.narrow(1, 0, 0), None).contains("at least one token"));
    assert!(refused(&good, Some(&good.narrow(1, 0, 4))).contains("segments have shape [2, 4]"));
    let segments = good.zeros_like();
    let _ = segments.get(1).narrow(0, 0, 3).fill_(1);
    assert!(refused(&good, Some(&segments)).contains("segments decrease at token 3 of sequence 1"));
    let targets = good.narrow(1, 0, 4);
    assert!(model.loss(&good, &targets, None).unwrap_err().to_string().contains("targets have shape [2, 4]"));
}

#[test]
fn any_length_runs() {
    for variant in VARIANTS {
        for split in POLICIES {
            let model = variant.model(split, Device::Cpu).unwrap();
            for len in [1, 2, 3, 7, SEQ_LEN + 1, 2 * SEQ_LEN + 3] {
                let logits = tch::no_grad(|| model.logits(&ids(1, len, 0), None)).unwrap();
                assert_eq!(logits.size(), [1, len as i64, VOCAB], "{variant:?} {split}");
            }
        }
    }
}
