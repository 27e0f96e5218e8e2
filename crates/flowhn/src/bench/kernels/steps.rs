//! What runs once a token in decoding, and once a step in training.
// b batch, e d_inner, n d_state, h n_heads, p d_head, k d_conv

use std::cell::RefCell;

use flowhn_nn::{Decay, Param, Weight};
use flowhn_ssm::{
    Activation, CausalConv1dStep, DtActivation, SelectiveScanStep, SsdStep, causal_conv1d_step, selective_scan_step,
    ssd_step,
};
use flowhn_torch::{Error, catch};
use flowhn_train::optim::{AdamW, AdamWOptions, StateType};
use tch::{Kind, Tensor};

use super::operation::Direction::Forward;
use super::operation::{Call, Operation, Pass, random};

const BF16: Kind = Kind::BFloat16;

/// The table's lines; `tiny` makes the sizes small enough to try them on a CPU.
pub fn operations(tiny: bool) -> Vec<Operation> {
    let mut all = Vec::new();
    for b in [1, 64] {
        let b = if tiny { 1 } else { b };
        all.push(scan_step(if tiny { [b, 24, 4] } else { [b, 1536, 16] }));
        all.push(ssd_of_one(if tiny { [b, 2, 8, 8] } else { [b, 24, 64, 128] }));
        all.push(conv_step(if tiny { [b, 24, 4] } else { [b, 1792, 4] }));
    }
    for state in [StateType::Fp32, StateType::Bf16, StateType::Int8] {
        all.push(adamw(if tiny { 10_000 } else { 132_000_000 }, state));
    }
    all
}

fn scan_step([b, e, n]: [i64; 3]) -> Operation {
    // The state twice, five rows of channels, two of states.
    let bytes = (8 * b * e * n + 10 * b * e + 4 * b * n) as f64;
    Operation {
        op: "selective_scan_step",
        shape: format!("B{b} D{e} N{n}"),
        passes: vec![Pass::new(Forward, bytes, 0.)],
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| random(shape, kind, device, seed);
            let rates = part(&[e, n], Kind::Float, 3)?.abs().f_neg()? - 0.1;
            let leaves = vec![
                part(&[b, e], BF16, 1)?,
                part(&[b, e], BF16, 2)?,
                rates,
                part(&[b, n], BF16, 4)?,
                part(&[b, n], BF16, 5)?,
                part(&[b, e], BF16, 6)?,
                part(&[e], Kind::Float, 7)?,
                part(&[b, e, n], Kind::Float, 8)?,
            ];
            Ok(Call {
                leaves,
                run: Box::new(|t| {
                    let y = selective_scan_step(SelectiveScanStep {
                        x_be: &t[0],
                        dt_be: &t[1],
                        a_en: &t[2],
                        b_bn: &t[3],
                        c_bn: &t[4],
                        z_be: Some(&t[5]),
                        d_e: Some(&t[6]),
                        dt_bias_e: Some(&t[6]),
                        dt_activation: DtActivation::Softplus,
                        state_ben: &mut t[7].shallow_clone(),
                        reset_b: None,
                    })?;
                    Ok(vec![y])
                }),
            })
        }),
    }
}

fn ssd_of_one([b, h, p, n]: [i64; 4]) -> Operation {
    let bytes = (8 * b * h * p * n + 4 * b * h * p + 4 * b * n) as f64;
    Operation {
        op: "ssd_step",
        shape: format!("B{b} {h}x{p} N{n}"),
        passes: vec![Pass::new(Forward, bytes, 0.)],
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| random(shape, kind, device, seed);
            let rates = part(&[h], Kind::Float, 3)?.abs().f_neg()? - 0.1;
            let leaves = vec![
                part(&[b, h, p], BF16, 1)?,
                part(&[b, h], BF16, 2)?,
                rates,
                part(&[b, 1, n], BF16, 4)?,
                part(&[b, 1, n], BF16, 5)?,
                part(&[h], Kind::Float, 6)?,
                part(&[b, h, p, n], Kind::Float, 7)?,
            ];
            Ok(Call {
                leaves,
                run: Box::new(|t| {
                    let y = ssd_step(SsdStep {
                        x_bhp: &t[0],
                        dt_bh: &t[1],
                        a_h: &t[2],
                        b_bgn: &t[3],
                        c_bgn: &t[4],
                        d_h: Some(&t[5]),
                        dt_bias_h: Some(&t[5]),
                        dt_activation: DtActivation::Softplus,
                        state_bhpn: &mut t[6].shallow_clone(),
                        reset_b: None,
                    })?;
                    Ok(vec![y])
                }),
            })
        }),
    }
}

fn conv_step([b, e, k]: [i64; 3]) -> Operation {
    // Input and output, the window before and after, the taps.
    let bytes = (4 * b * e + 8 * b * (k - 1) * e + 4 * e * k) as f64;
    Operation {
        op: "causal_conv1d_step",
        shape: format!("B{b} D{e} K{k}"),
        passes: vec![Pass::new(Forward, bytes, 0.)],
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| random(shape, kind, device, seed);
            let leaves = vec![
                part(&[b, e], BF16, 1)?,
                part(&[e, k], Kind::Float, 2)?,
                part(&[e], Kind::Float, 3)?,
                part(&[b, k - 1, e], Kind::Float, 4)?,
            ];
            Ok(Call {
                leaves,
                run: Box::new(|t| {
                    let y = causal_conv1d_step(CausalConv1dStep {
                        x_be: &t[0],
                        weight_ek: &t[1],
                        bias_e: Some(&t[2]),
                        activation: Activation::Silu,
                        state_bje: &mut t[3].shallow_clone(),
                        reset_b: None,
                    })?;
                    Ok(vec![y])
                }),
            })
        }),
    }
}

/// The norm of the gradients, clipping and the update, of one tensor.
fn adamw(n: i64, state: StateType) -> Operation {
    let kept = match state {
        StateType::Fp32 => 4.,
        StateType::Bf16 => 2.,
        // A code, and a factor for each block of 256.
        StateType::Int8 => 1. + 4. / 256.,
    };
    // The gradient twice, once for its norm; the parameter and both means read and written.
    let pass = Pass::new(Forward, n as f64 * (4. * (2. + 2.) + 2. * 2. * kept), 0.);
    let fp32 = state == StateType::Fp32;
    Operation {
        op: "adamw",
        shape: format!("{n} {state}"),
        passes: vec![if fp32 { pass.against("torch, fused, without clipping", 1418., None) } else { pass }],
        build: Box::new(move |device| {
            let leaf = random(&[n], Kind::Float, device, 1)?.set_requires_grad(true);
            catch(|| Ok((&leaf * 1e-3).sum(Kind::Float).f_backward()?))?;
            let param = Param { name: "weight".to_owned(), weight: Weight::new(leaf), decay: Decay::Yes };
            let options = AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 1., state };
            let refused = |error: flowhn_train::Error| Error::invalid("adamw", error.to_string());
            let mut adamw = AdamW::new(vec![param], options).map_err(refused)?;
            adamw.set_learning_rate(1e-4).map_err(refused)?;
            let adamw = RefCell::new(adamw);
            let update = move |_: &[Tensor]| Ok(vec![adamw.borrow_mut().clip_and_update().map_err(refused)?]);
            Ok(Call { leaves: Vec::new(), run: Box::new(update) })
        }),
    }
}
