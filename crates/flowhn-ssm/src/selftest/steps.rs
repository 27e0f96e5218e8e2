//! Steps write the new state over the old one: against calls of one token, which leave it in a tensor of its own.
// b batch, e channels, h n_heads, p d_head, g n_groups, n d_state, k d_conv

use flowhn_nn::Params;
use flowhn_torch::testing::{Case, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{
    Activation, CausalConv1d, CausalConv1dStep, DtActivation, GateNorm, GroupOrder, Mamba1Config, Mamba2Config,
    SelectiveScan, SelectiveScanStep, Ssd, SsdStep, SsmConfig, SsmInit, SsmMixer, SsmState, causal_conv1d,
    causal_conv1d_step, selective_scan, selective_scan_step, ssd, ssd_step,
};

/// Tokens of a check.
const TOKENS: i64 = 6;

/// Activations `[batch, TOKENS, ..]`, parameters, and resets `[batch, TOKENS]`.
struct Given {
    activations: Vec<Tensor>,
    parameters: Vec<Tensor>,
    reset_bl: Tensor,
}

/// An operation on what is given: a token's output and the state after it, from the state before.
type Apart = fn(&Given, i64, &Tensor) -> Result<(Tensor, Tensor)>;
/// Its step.
type InPlace = fn(&Given, i64, &mut Tensor) -> Result<Tensor>;

/// An operation with the shapes of its activations behind `[batch, TOKENS]`, of its parameters, and of its state.
struct Operation {
    name: &'static str,
    activations: Vec<Vec<i64>>,
    parameters: Vec<Vec<i64>>,
    state: Vec<i64>,
    apart: Apart,
    in_place: InPlace,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        let convs = [[3, 67, 4], [2, 520, 2], [4, 136, 7], [2, 9, 1]].map(conv);
        let scans = [[3, 33, 16], [2, 40, 5], [3, 72, 33]].map(scan);
        let ssds = [[3, 3, 5, 1, 20], [2, 4, 64, 2, 128], [2, 2, 40, 1, 130]].map(ssd_of);
        for operation in convs.into_iter().chain(scans).chain(ssds) {
            let name = format!("{}: {kind:?}, state {:?}, steps in place", operation.name, operation.state);
            cases.push(Case::new(name, move |device| operation.check(kind, device)));
        }
        for (name, config) in mixers() {
            let name = format!("{name}: {kind:?}, steps in place");
            cases.push(Case::new(name, move |device| mixer_steps(&config, kind, device)));
        }
    }
    cases
}

fn expect(what: &str, holds: bool) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("steps", format!("{what} does not hold"))) }
}

impl Operation {
    fn check(&self, kind: Kind, device: Device) -> Result<String> {
        let [batch, ..] = self.state[..] else { unreachable!("a state has a batch") };
        let made = |sizes: Vec<i64>, seed: usize, kind| noise(&sizes, seed as i64).to_kind(kind).to_device(device);
        let tokens = |(i, axes): (usize, &Vec<i64>)| made([&[batch, TOKENS], &axes[..]].concat(), i, kind);
        let given = Given {
            activations: self.activations.iter().enumerate().map(tokens).collect(),
            parameters: (20..).zip(&self.parameters).map(|(i, axes)| made(axes.clone(), i, Kind::Float)).collect(),
            reset_bl: noise(&[batch, TOKENS], 40).gt(0.6).to_device(device),
        };
        // Between neighbours, and at no boundary but that of an element.
        let n: i64 = self.state.iter().product();
        let around = made(vec![n + 2], 41, Kind::Float);
        let ends = Tensor::cat(&[around.narrow(0, 0, 1), around.narrow(0, n + 1, 1)], 0);
        let mut state = around.narrow(0, 1, n).view(&self.state[..]);
        let mut apart = state.copy();
        for token in 0..TOKENS {
            let before = apart.copy();
            let (want, next) = (self.apart)(&given, token, &apart)?;
            expect("that a call of one token leaves the state before it alone", same_bits(&apart, &before))?;
            let got = (self.in_place)(&given, token, &mut state)?;
            expect(&format!("that the outputs of token {token} have the same bits"), same_bits(&got, &want))?;
            expect(&format!("that the states after token {token} have the same bits"), same_bits(&state, &next))?;
            apart = next;
        }
        let after = Tensor::cat(&[around.narrow(0, 0, 1), around.narrow(0, n + 1, 1)], 0);
        expect("that what lies around the state stays as it was", same_bits(&after, &ends))?;
        Ok("the same bits".to_owned())
    }
}

impl Given {
    /// One token of an activation, `[batch, ..]`, and the same as a sequence.
    fn token(&self, idx: usize, token: i64) -> Tensor {
        self.activations[idx].select(1, token)
    }

    fn sequence(&self, idx: usize, token: i64) -> Tensor {
        self.activations[idx].narrow(1, token, 1)
    }
}

fn conv([b, e, k]: [i64; 3]) -> Operation {
    Operation {
        name: "causal_conv1d",
        activations: vec![vec![e]],
        parameters: vec![vec![e, k], vec![e]],
        state: vec![b, k - 1, e],
        apart: |given, token, state| {
            let out = causal_conv1d(&CausalConv1d {
                bias_e: Some(&given.parameters[1]),
                initial_state_bje: Some(state),
                reset_bl: Some(&given.reset_bl.narrow(1, token, 1)),
                ..CausalConv1d::new(&given.sequence(0, token), &given.parameters[0])
            })?;
            Ok((out.y_ble.squeeze_dim(1), out.final_state_bje))
        },
        in_place: |given, token, state| {
            causal_conv1d_step(CausalConv1dStep {
                x_be: &given.token(0, token),
                weight_ek: &given.parameters[0],
                bias_e: Some(&given.parameters[1]),
                activation: Activation::Silu,
                state_bje: state,
                reset_b: Some(&given.reset_bl.select(1, token)),
            })
        },
    }
}

fn scan([b, e, n]: [i64; 3]) -> Operation {
    Operation {
        name: "selective_scan",
        activations: vec![vec![e], vec![e], vec![n], vec![n], vec![e]],
        parameters: vec![vec![e, n], vec![e], vec![e]],
        state: vec![b, e, n],
        apart: |given, token, state| {
            let [x, dt, b, c, z] = [0, 1, 2, 3, 4].map(|idx| given.sequence(idx, token));
            let out = selective_scan(&SelectiveScan {
                d_e: Some(&given.parameters[1]),
                z_ble: Some(&z),
                dt_bias_e: Some(&given.parameters[2]),
                initial_state_ben: Some(state),
                reset_bl: Some(&given.reset_bl.narrow(1, token, 1)),
                ..SelectiveScan::new(&x, &dt, &-given.parameters[0].abs(), &b, &c)
            })?;
            Ok((out.y_ble.squeeze_dim(1), out.final_state_ben))
        },
        in_place: |given, token, state| {
            let [x, dt, b, c, z] = [0, 1, 2, 3, 4].map(|idx| given.token(idx, token));
            selective_scan_step(SelectiveScanStep {
                x_be: &x,
                dt_be: &dt,
                a_en: &-given.parameters[0].abs(),
                b_bn: &b,
                c_bn: &c,
                d_e: Some(&given.parameters[1]),
                z_be: Some(&z),
                dt_bias_e: Some(&given.parameters[2]),
                dt_activation: DtActivation::Softplus,
                state_ben: state,
                reset_b: Some(&given.reset_bl.select(1, token)),
            })
        },
    }
}

fn ssd_of([b, h, p, g, n]: [i64; 5]) -> Operation {
    // Heads share groups evenly.
    let h = h * g;
    Operation {
        name: "ssd",
        activations: vec![vec![h, p], vec![h], vec![g, n], vec![g, n]],
        parameters: vec![vec![h], vec![h], vec![h]],
        state: vec![b, h, p, n],
        apart: |given, token, state| {
            let [x, dt, b, c] = [0, 1, 2, 3].map(|idx| given.sequence(idx, token));
            let out = ssd(&Ssd {
                d_h: Some(&given.parameters[1]),
                dt_bias_h: Some(&given.parameters[2]),
                initial_state_bhpn: Some(state),
                reset_bl: Some(&given.reset_bl.narrow(1, token, 1)),
                ..Ssd::new(&x, &dt, &-given.parameters[0].abs(), &b, &c)
            })?;
            Ok((out.y_blhp.squeeze_dim(1), out.final_state_bhpn))
        },
        in_place: |given, token, state| {
            let [x, dt, b, c] = [0, 1, 2, 3].map(|idx| given.token(idx, token));
            ssd_step(SsdStep {
                x_bhp: &x,
                dt_bh: &dt,
                a_h: &-given.parameters[0].abs(),
                b_bgn: &b,
                c_bgn: &c,
                d_h: Some(&given.parameters[1]),
                dt_bias_h: Some(&given.parameters[2]),
                dt_activation: DtActivation::Softplus,
                state_bhpn: state,
                reset_b: Some(&given.reset_bl.select(1, token)),
            })
        },
    }
}

fn mixers() -> [(&'static str, SsmConfig); 2] {
    let mamba2 = Mamba2Config {
        d_model: 32,
        n_heads: 4,
        d_head: 16,
        d_state: 24,
        n_groups: 2,
        d_conv: 4,
        chunk_len: 64,
        gate_norm: GateNorm::AfterGate,
        norm_eps: 1e-6,
        norm_groups: 1,
        conv_bias: true,
        in_bias: false,
        out_bias: false,
        group_order: GroupOrder::Contiguous,
    };
    let mamba1 = Mamba1Config::new(32, 48, 16, 4, 2);
    [("Mamba1", SsmConfig::Mamba1(mamba1)), ("Mamba2", SsmConfig::Mamba2(mamba2))]
}

/// A prompt, then tokens by steps and by forward passes of one.
fn mixer_steps(config: &SsmConfig, kind: Kind, device: Device) -> Result<String> {
    let mut params = Params::new(device, 5);
    let mixer = SsmMixer::new(&mut params.root(), config, SsmInit::Mamba)?;
    let x_bld = noise(&[2, 9 + TOKENS, 32], 50).to_kind(kind).to_device(device);
    tch::no_grad(|| {
        let mut stepped = SsmState::new(config, 2, device);
        let _prompt = mixer.forward(x_bld.narrow(1, 0, 9), None, Some(&mut stepped))?;
        let mut apart = stepped.copy()?;
        let bits_of = |a: &SsmState, b: &SsmState| same_bits(&a.conv_bje, &b.conv_bje) && same_bits(&a.scan, &b.scan);
        let place = |state: &SsmState| [state.conv_bje.data_ptr(), state.scan.data_ptr()];
        for token in 9..9 + TOKENS {
            let x_b1d = x_bld.narrow(1, token, 1);
            let (kept, before) = (apart.copy()?, shallow(&apart));
            let want = mixer.forward(&x_b1d, None, Some(&mut apart))?;
            expect("that a forward pass leaves the tensors that it was given alone", bits_of(&kept, &before))?;
            let here = place(&stepped);
            let got = mixer.step(&x_b1d, &mut stepped)?;
            expect("that a step stays in its tensors", place(&stepped) == here)?;
            expect(&format!("that the outputs of token {token} have the same bits"), same_bits(&got, &want))?;
            expect(&format!("that the states after token {token} have the same bits"), bits_of(&stepped, &apart))?;
        }
        Ok("the same bits".to_owned())
    })
}

/// Further handles of a state's tensors.
fn shallow(state: &SsmState) -> SsmState {
    SsmState { conv_bje: state.conv_bje.shallow_clone(), scan: state.scan.shallow_clone() }
}
