//! The mixers: golden files, decoding, packed documents, initial values.

mod common;

use std::collections::HashMap;

use common::{normal, resets, same_bits};
use flowhn_nn::{Decay, Params};
use flowhn_ssm::{GateNorm, GroupOrder, Mamba1Config, Mamba2Config, SsmConfig, SsmInit, SsmMixer, SsmState};
use flowhn_torch::testing::assert_close;
use tch::{Device, Kind, Tensor};

const MAMBA1: Mamba1Config = Mamba1Config::new(16, 24, 8, 4, 3);

const MAMBA2: Mamba2Config = Mamba2Config {
    d_model: 16,
    n_heads: 4,
    d_head: 8,
    d_state: 6,
    n_groups: 2,
    d_conv: 4,
    chunk_len: 8,
    norm_eps: 1e-5,
    norm_groups: 1,
    gate_norm: GateNorm::AfterGate,
    conv_bias: true,
    in_bias: false,
    out_bias: false,
    group_order: GroupOrder::Contiguous,
};

fn configs() -> [SsmConfig; 5] {
    let jamba = Mamba1Config { inner_norm_eps: Some(1e-6), ..MAMBA1 };
    let before_gate = Mamba2Config { gate_norm: GateNorm::BeforeGate, norm_groups: 2, out_bias: true, ..MAMBA2 };
    let without_norm = Mamba2Config { gate_norm: GateNorm::None, ..MAMBA2 };
    [
        SsmConfig::Mamba1(MAMBA1),
        SsmConfig::Mamba1(jamba),
        SsmConfig::Mamba2(MAMBA2),
        SsmConfig::Mamba2(before_gate),
        SsmConfig::Mamba2(without_norm),
    ]
}

fn new_mixer(config: &SsmConfig, init: SsmInit) -> (SsmMixer, Params) {
    let mut params = Params::new(Device::Cpu, 3);
    let mixer = SsmMixer::new(&mut params.root(), config, init).unwrap();
    (mixer, params)
}

fn input(seq_len: i64) -> Tensor {
    normal(1, &[2, seq_len, 16]).to_kind(Kind::Float)
}

/// Output and all gradients against a file that `golden/make.py` wrote.
fn check_golden(file: &str, config: &SsmConfig) {
    let path = format!("{}/tests/golden/{file}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let golden: HashMap<String, Tensor> = Tensor::read_safetensors(path).unwrap().into_iter().collect();
    let (mixer, params) = new_mixer(config, SsmInit::Mamba);
    for param in &params {
        params.assign(&param.name, &golden[&param.name]).unwrap();
    }
    let x = golden["x"].copy().set_requires_grad(true);
    let y = mixer.forward(&x, None, None).unwrap();
    assert_close(&format!("{file}: y"), &y, &golden["y"], 1e-5);
    (&y * &golden["grad.y"]).sum(Kind::Float).backward();
    assert_close(&format!("{file}: grad.x"), &x.grad(), &golden["grad.x"], 1e-4);
    for param in &params {
        let key = format!("grad.{}", param.name);
        assert_close(&format!("{file}: {key}"), &param.weight.master().grad(), &golden[&key], 1e-4);
    }
    // Nothing in the file is left over.
    assert_eq!(golden.len(), 4 + 2 * params.iter().count());
}

#[test]
fn mamba1_is_that_of_transformers() {
    check_golden("mamba1", &SsmConfig::Mamba1(MAMBA1));
}

#[test]
fn mamba1_with_inner_norms_is_jambas() {
    check_golden("jamba", &SsmConfig::Mamba1(Mamba1Config { d_inner: 32, inner_norm_eps: Some(1e-6), ..MAMBA1 }));
}

#[test]
fn mamba2_is_that_of_transformers() {
    check_golden("mamba2", &SsmConfig::Mamba2(MAMBA2));
}

#[test]
fn prompt_then_tokens_equal_the_whole() {
    let x_bld = input(23);
    for config in configs() {
        let (mixer, _) = new_mixer(&config, SsmInit::Mamba);
        let whole = mixer.forward(&x_bld, None, None).unwrap();
        for prompt_len in [1, 2, 8, 22] {
            let mut state = SsmState::new(&config, 2, Device::Cpu);
            assert_eq!(state.n_bytes(), config.state_bytes(2));
            let mut pieces = vec![mixer.forward(x_bld.narrow(1, 0, prompt_len), None, Some(&mut state)).unwrap()];
            for token in prompt_len..23 {
                pieces.push(mixer.forward(x_bld.narrow(1, token, 1), None, Some(&mut state)).unwrap());
                state.detach();
            }
            assert_close(&format!("{config:?}"), &Tensor::cat(&pieces, 1), &whole, 1e-5);
        }
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let x_bld = input(20);
    let reset_bl = Tensor::zeros([2, 20], (Kind::Bool, Device::Cpu));
    let _ = reset_bl.narrow(1, 7, 1).fill_(1);
    for config in configs() {
        let (mixer, _) = new_mixer(&config, SsmInit::Mamba);
        let packed = mixer.forward(&x_bld, Some(&reset_bl), None).unwrap();
        let alone = |start, len| mixer.forward(x_bld.narrow(1, start, len), None, None).unwrap();
        assert_close("first", &packed.narrow(1, 0, 7), &alone(0, 7), 1e-5);
        assert_close("second", &packed.narrow(1, 7, 13), &alone(7, 13), 1e-5);
        let unpacked = mixer.forward(&x_bld, None, None).unwrap();
        assert!(!same_bits(&unpacked.narrow(1, 7, 13), &packed.narrow(1, 7, 13)));
    }
}

#[test]
fn resets_also_hold_while_decoding() {
    let (x_bld, reset_bl) = (input(12), resets(2, 12, 5));
    for config in configs() {
        let (mixer, _) = new_mixer(&config, SsmInit::Mamba);
        let whole = mixer.forward(&x_bld, Some(&reset_bl), None).unwrap();
        let mut state = SsmState::new(&config, 2, Device::Cpu);
        let token = |t: i64| (x_bld.narrow(1, t, 1), reset_bl.narrow(1, t, 1));
        let step = |t| {
            let (x, reset) = token(t);
            mixer.forward(&x, Some(&reset), Some(&mut state)).unwrap()
        };
        let decoded: Vec<Tensor> = (0..12).map(step).collect();
        assert_close(&format!("{config:?}"), &Tensor::cat(&decoded, 1), &whole, 1e-5);
    }
}

#[test]
fn a_token_leaves_those_before_it_alone() {
    let x_bld = input(20);
    for config in configs() {
        let (mixer, _) = new_mixer(&config, SsmInit::Mamba);
        let before = mixer.forward(&x_bld, None, None).unwrap();
        for token in [1, 8, 19] {
            let changed = x_bld.copy();
            let _ = changed.select(1, token).fill_(2.);
            let after = mixer.forward(&changed, None, None).unwrap();
            assert!(same_bits(&after.narrow(1, 0, token), &before.narrow(1, 0, token)), "{config:?}, token {token}");
            assert!(!same_bits(&after, &before));
        }
    }
}

#[test]
fn bf16_stays_near_f32() {
    let x_bld = input(30);
    for config in configs() {
        let (mixer, params) = new_mixer(&config, SsmInit::Mamba);
        let want = mixer.forward(&x_bld, None, None).unwrap();
        let got = mixer.forward(x_bld.to_kind(Kind::BFloat16), None, None).unwrap();
        assert_eq!(got.kind(), Kind::BFloat16);
        assert_close(&format!("{config:?}"), &got, &want, 0.03);
        got.sum(Kind::Float).backward();
        assert!(params.iter().all(|p| p.weight.master().grad().isfinite().all().int64_value(&[]) == 1));
    }
}

#[test]
fn f64_passes_through() {
    for config in configs() {
        let (mixer, _) = new_mixer(&config, SsmInit::Mamba);
        let x_bld = input(9);
        let wide = mixer.forward(x_bld.to_kind(Kind::Double), None, None).unwrap();
        assert_eq!(wide.kind(), Kind::Double);
        assert_close("f32", &mixer.forward(&x_bld, None, None).unwrap(), &wide, 1e-5);
        // A state starts in f32 and goes on in what the mixer computes in.
        let mut state = SsmState::new(&config, 2, Device::Cpu);
        let step = |t| mixer.step(x_bld.narrow(1, t, 1).to_kind(Kind::Double), &mut state).unwrap();
        let steps: Vec<Tensor> = tch::no_grad(|| (0..9).map(step).collect());
        assert_close("steps", &Tensor::cat(&steps, 1), &wide, 1e-12);
    }
}

#[test]
fn a_copy_of_a_state_goes_its_own_way() {
    let x_bld = input(6);
    let token = |t| x_bld.narrow(1, t, 1);
    for config in configs() {
        let (mixer, _) = new_mixer(&config, SsmInit::Mamba);
        tch::no_grad(|| {
            let mut state = SsmState::new(&config, 2, Device::Cpu);
            let _prompt = mixer.forward(x_bld.narrow(1, 0, 4), None, Some(&mut state)).unwrap();
            let mut fork = state.copy().unwrap();
            let alone = mixer.forward(token(5), None, Some(&mut fork.copy().unwrap())).unwrap();
            let _other = mixer.step(token(4), &mut state).unwrap();
            assert!(same_bits(&mixer.step(token(5), &mut fork).unwrap(), &alone), "{config:?}");
        });
    }
}

#[test]
fn a_step_takes_one_token_and_records_no_gradient() {
    for config in configs() {
        let (mixer, _) = new_mixer(&config, SsmInit::Mamba);
        let mut state = SsmState::new(&config, 2, Device::Cpu);
        let two = mixer.step(input(2), &mut state).unwrap_err().to_string();
        assert!(two.contains("x_b1d has 2 tokens, a step takes one"), "{two}");
        let recorded = mixer.step(input(1), &mut state).unwrap_err().to_string();
        assert!(recorded.contains("which has no gradient: call it in tch::no_grad"), "{recorded}");
        assert!([&state.conv_bje, &state.scan].iter().all(|t| t.abs().max().double_value(&[]) == 0.));
    }
}

#[test]
fn mambas_step_sizes_start_between_a_thousandth_and_a_tenth() {
    for (config, name) in [(&configs()[0], "dt_proj.bias"), (&configs()[2], "dt_bias")] {
        let (_, params) = new_mixer(config, SsmInit::Mamba);
        let dt = params.get(name).unwrap().weight.master().softplus();
        assert!(dt.min().double_value(&[]) > 0.99e-3 && dt.max().double_value(&[]) < 0.101, "{name}");
        assert!(dt.max().double_value(&[]) > 2. * dt.min().double_value(&[]), "{name} must spread");
    }
}

#[test]
fn released_step_sizes_start_at_ln_two() {
    let (_, params) = new_mixer(&configs()[1], SsmInit::Released);
    let values = |name: &str| params.get(name).unwrap().weight.master().detach();
    assert_eq!(values("dt_proj.bias").abs().max().double_value(&[]), 0.);
    assert_eq!(values("conv1d.bias").abs().max().double_value(&[]), 0.);
    let std = values("in_proj.weight").std(false).double_value(&[]);
    assert!((std / 0.02 - 1.).abs() < 0.1, "{std}");
}

#[test]
fn both_inits_start_the_decays_at_minus_one_to_minus_d_state() {
    for init in [SsmInit::Mamba, SsmInit::Released] {
        let (_, params) = new_mixer(&configs()[0], init);
        let a_en = -params.get("A_log").unwrap().weight.master().detach().exp();
        let want = -(Tensor::arange(8, (Kind::Float, Device::Cpu)) + 1.).expand([24, 8], false);
        assert_close("A", &a_en, &want, 1e-6);
        assert_eq!(params.get("D").unwrap().weight.master().min().double_value(&[]), 1.);
    }
}

#[test]
fn only_matrices_are_decayed() {
    for config in configs() {
        let (_, params) = new_mixer(&config, SsmInit::Mamba);
        for param in &params {
            let matrix = param.weight.size().len() == 2 && param.name != "A_log";
            assert_eq!(param.decay == Decay::Yes, matrix, "{}", param.name);
        }
    }
}

#[test]
fn group_norms_differ_from_one_norm() {
    let grouped = SsmConfig::Mamba2(Mamba2Config { norm_groups: 2, ..MAMBA2 });
    let (one, _) = new_mixer(&SsmConfig::Mamba2(MAMBA2), SsmInit::Mamba);
    let (two, _) = new_mixer(&grouped, SsmInit::Mamba);
    let x_bld = input(5);
    let (one, two) = (one.forward(&x_bld, None, None).unwrap(), two.forward(&x_bld, None, None).unwrap());
    assert!(!same_bits(&one, &two));
}

/// Every place of the norm, from the output without one: the output projection is the identity here.
#[test]
fn gate_and_norm_are_what_they_say() {
    let x_bld = normal(1, &[2, 7, 32]).to_kind(Kind::Float);
    let scale = normal(2, &[32]).to_kind(Kind::Float);
    let output = |gate_norm, norm_groups| {
        let config = Mamba2Config { d_model: 32, gate_norm, norm_groups, ..MAMBA2 };
        let (mixer, params) = new_mixer(&SsmConfig::Mamba2(config), SsmInit::Mamba);
        params.assign("out_proj.weight", &Tensor::eye(32, (Kind::Float, Device::Cpu))).unwrap();
        match params.get("norm.weight") {
            Some(_) => params.assign("norm.weight", &scale).unwrap(),
            None => assert_eq!(gate_norm, GateNorm::None),
        }
        let z_ble =
            x_bld.linear(&params.get("in_proj.weight").unwrap().weight.master().narrow(0, 0, 32), None::<Tensor>);
        (mixer.forward(&x_bld, None, None).unwrap(), z_ble.silu())
    };
    let (gated, gate) = output(GateNorm::None, 1);
    for groups in [1, 2, 4] {
        let norm = |x: &Tensor| {
            let x = x.unflatten(-1, [groups, 32 / groups]);
            let square = x.square().mean_dim(-1, true, Kind::Float);
            (x / (square + MAMBA2.norm_eps).sqrt()).flatten(-2, -1) * &scale
        };
        assert_close("after", &output(GateNorm::AfterGate, groups).0, &norm(&gated), 1e-5);
        assert_close("before", &output(GateNorm::BeforeGate, groups).0, &(norm(&(&gated / &gate)) * &gate), 1e-5);
    }
}

#[test]
fn errors_name_the_size() {
    let error = |config: &SsmConfig| {
        let mut params = Params::new(Device::Cpu, 0);
        SsmMixer::new(&mut params.root(), config, SsmInit::Mamba).unwrap_err().to_string()
    };
    let no_state = SsmConfig::Mamba1(Mamba1Config { d_state: 0, ..MAMBA1 });
    assert_eq!(error(&no_state), "Mamba1: d_state is 0, expected at least 1");
    let groups = SsmConfig::Mamba2(Mamba2Config { n_groups: 3, ..MAMBA2 });
    assert_eq!(error(&groups), "Mamba2: n_groups 3 does not divide n_heads 4");
    let norm_groups = SsmConfig::Mamba2(Mamba2Config { norm_groups: 5, ..MAMBA2 });
    assert_eq!(error(&norm_groups), "Mamba2: norm_groups 5 does not divide the inner width 32");

    let (mixer, _) = new_mixer(&configs()[0], SsmInit::Mamba);
    let wrong = mixer.forward(input(3).narrow(2, 0, 8), None, None).unwrap_err().to_string();
    assert_eq!(wrong, "Mamba1: x_bld has shape [2, 3, 8], expected [2, 3, 16]");
}
