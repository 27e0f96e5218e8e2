//! Times the operations and a mixer on this machine: `cargo run --release -p flowhn-ssm --example timing`.
//!
//! Prints the median of a few runs, in ms and in ns per elementary step: (token, channel, state element) for the scans,
//! (token, channel, tap) for the convolution.

use std::time::Instant;

use flowhn_nn::Params;
use flowhn_ssm::{
    CausalConv1d, GateNorm, GroupOrder, Mamba1Config, Mamba2Config, Result, SelectiveScan, Ssd, SsmConfig, SsmInit,
    SsmMixer, causal_conv1d, selective_scan, ssd,
};
use tch::{Device, Kind, Tensor};

const BATCH: i64 = 8;
const SEQ_LEN: i64 = 150;
const D_MODEL: i64 = 128;
const D_INNER: i64 = 256;
const D_STATE: i64 = 16;
const D_HEAD: i64 = 64;
const SSD_STATE: i64 = 64;
const D_CONV: i64 = 4;

fn main() -> Result<()> {
    println!("batch {BATCH}, seq_len {SEQ_LEN}, {} rayon threads, f32", rayon::current_num_threads());
    let tokens = BATCH * SEQ_LEN;
    let leaf = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let frozen = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));

    let (x, dt, z) =
        (leaf(&[BATCH, SEQ_LEN, D_INNER]), leaf(&[BATCH, SEQ_LEN, D_INNER]), leaf(&[BATCH, SEQ_LEN, D_INNER]));
    let (b, c) = (leaf(&[BATCH, SEQ_LEN, D_STATE]), leaf(&[BATCH, SEQ_LEN, D_STATE]));
    let a = (-frozen(&[D_INNER, D_STATE]).exp()).set_requires_grad(true);
    time("selective_scan", tokens * D_INNER * D_STATE, || {
        let args = SelectiveScan { z_ble: Some(&z), ..SelectiveScan::new(&x, &dt, &a, &b, &c) };
        Ok(selective_scan(&args)?.y_ble)
    })?;

    let heads = D_INNER / D_HEAD;
    let (xh, dth) = (leaf(&[BATCH, SEQ_LEN, heads, D_HEAD]), leaf(&[BATCH, SEQ_LEN, heads]));
    let (bg, cg) = (leaf(&[BATCH, SEQ_LEN, 1, SSD_STATE]), leaf(&[BATCH, SEQ_LEN, 1, SSD_STATE]));
    let ah = (-frozen(&[heads]).exp()).set_requires_grad(true);
    time("ssd", tokens * D_INNER * SSD_STATE, || Ok(ssd(&Ssd::new(&xh, &dth, &ah, &bg, &cg))?.y_blhp))?;

    let w = leaf(&[D_INNER, D_CONV]);
    time("causal_conv1d", tokens * D_INNER * D_CONV, || Ok(causal_conv1d(&CausalConv1d::new(&x, &w))?.y_ble))?;

    let configs = [
        SsmConfig::Mamba1(Mamba1Config {
            inner_norm_eps: Some(1e-6),
            ..Mamba1Config::new(D_MODEL, D_INNER, D_STATE, D_CONV, D_MODEL / 16)
        }),
        SsmConfig::Mamba2(Mamba2Config {
            d_model: D_MODEL,
            n_heads: heads,
            d_head: D_HEAD,
            d_state: SSD_STATE,
            n_groups: 1,
            d_conv: D_CONV,
            chunk_len: 64,
            norm_eps: 1e-6,
            norm_groups: 1,
            gate_norm: GateNorm::AfterGate,
            conv_bias: true,
            in_bias: false,
            out_bias: false,
            group_order: GroupOrder::Contiguous,
        }),
    ];
    let x_bld = leaf(&[BATCH, SEQ_LEN, D_MODEL]);
    for (name, config) in ["mamba1 mixer", "mamba2 mixer"].iter().zip(&configs) {
        let mut params = Params::new(Device::Cpu, 0);
        let mixer = SsmMixer::new(&mut params.root(), config, SsmInit::Mamba)?;
        time(name, tokens * D_INNER, || mixer.forward(&x_bld, None, None))?;
    }
    let weights =
        [leaf(&[2 * D_INNER, D_MODEL]), leaf(&[D_INNER / 8 + 2 * D_STATE, D_INNER]), leaf(&[D_MODEL, D_INNER])];
    time("matmuls of mamba1", tokens * D_INNER, || {
        let inside = x_bld.linear(&weights[0], None::<&Tensor>).narrow(2, 0, D_INNER);
        Ok(inside.linear(&weights[2], None::<&Tensor>) + inside.linear(&weights[1], None::<&Tensor>).sum(Kind::Float))
    })
}

/// Prints forward, forward with a graph, and backward.
fn time(name: &str, steps: i64, run: impl Fn() -> Result<Tensor>) -> Result<()> {
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..30 {
        let start = Instant::now();
        drop(tch::no_grad(&run)?);
        times[0].push(start.elapsed());
        let start = Instant::now();
        let y = run()?;
        times[1].push(start.elapsed());
        let grad = y.ones_like();
        let start = Instant::now();
        (y * grad).sum(Kind::Float).backward();
        times[2].push(start.elapsed());
    }
    let medians = times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64()
    });
    let columns = medians.map(|s| format!("{:8.3} ms {:7.3} ns", s * 1e3, s * 1e9 / steps as f64));
    println!("{name:18} forward {}   recorded {}   backward {}", columns[0], columns[1], columns[2]);
    Ok(())
}
