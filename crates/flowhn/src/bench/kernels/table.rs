//! The operations and shapes that are timed.
// b batch, l seq_len, e d_inner, n d_state, h n_heads, p d_head, d features of a row, r rows

use flowhn_attn::{Mask, attention};
use flowhn_nn::{Decay, Init, Params, gated_rms_norm, linear_cross_entropy, rms_norm, swiglu};
use flowhn_ssm::{CausalConv1d, SelectiveScan, Ssd, causal_conv1d, selective_scan, ssd};
use flowhn_torch::{Result, product};
use tch::{Kind, Tensor};

use super::operation::Direction::{Backward, Forward};
use super::operation::{Build, Call, Operation, Pass, Products, leaf, random};

const BF16: Kind = Kind::BFloat16;
const EPS: f64 = 1e-5;
const CUDA_SCAN: &str = "mamba-ssm CUDA";
const TRITON_SSD: &str = "mamba-ssm Triton";
const TORCH: &str = "torch";
const COMPILED: &str = "torch, compiled";

/// Every operation; `tiny` makes the sizes small enough to try them on a CPU.
pub fn operations(tiny: bool) -> Vec<Operation> {
    let size = |n: i64, small: i64| if tiny { small } else { n };
    let mut all = Vec::new();
    let scans = [
        (8, 4096, 1536, Some((887., 3618.)), Some((1.8, 2.5))),
        (8, 4096, 2048, Some((1170., 4822.)), None),
        (8, 4096, 4096, Some((2304., 9617.)), None),
        (8, 8192, 1536, None, None),
        (1, 65536, 1536, None, None),
    ];
    for (b, l, e, recorded, target) in scans {
        all.push(scan([size(b, 1), size(l, 40), size(e, 24), size(16, 4)], recorded, target));
    }
    let ssds = [
        (8, 4096, 24, Some((511., Some(1753.))), Some((1.6, 1.8))),
        (8, 4096, 32, Some((663., Some(2208.))), None),
        (4, 4096, 64, Some((591., None)), None),
        (32, 512, 24, None, None),
    ];
    for (b, l, h, recorded, target) in ssds {
        all.push(ssd_of([size(b, 1), size(l, 70), size(h, 2), size(64, 8), size(128, 8)], recorded, target));
    }
    all.push(conv([size(8, 1), size(4096, 40), size(1792, 24), 4]));
    all.push(gated_norm(size(32768, 6), size(1536, 24)));
    all.push(norm(size(32768, 6), size(768, 24), (46., 179.)));
    all.push(norm(size(16384, 6), size(2048, 24), (55., 153.)));
    all.push(swiglu_of(size(32768, 6), size(4096, 24)));
    all.push(lm_head([size(32768, 40), size(768, 24), size(65536, 64)], 18_541., 1.22));
    all.push(lm_head([size(16384, 40), size(2048, 24), size(65536, 64)], 19_896., 1.11));
    let attentions = [
        ([8, 4096, 12, 12, 64], (481., 1390.)),
        ([8, 4096, 16, 16, 128], (914., 2957.)),
        ([32, 1024, 12, 3, 64], (159., 615.)),
        ([64, 512, 12, 3, 64], (102., 484.)),
    ];
    for ([b, t, h, k, p], recorded) in attentions {
        all.push(attention_of([size(b, 1), size(t, 20), h, k, size(p, 8)], recorded));
    }
    all.extend(super::routed::operations(tiny));
    all.extend(super::fp8::operations(tiny));
    all.extend(super::mlp::operations(tiny));
    all.extend(super::steps::operations(tiny));
    let products = [([32768, 4096, 768], 319.), ([32768, 65536, 768], 5260.), ([16384, 11264, 2048], 1095.)];
    for ([m, n, k], us) in products {
        let sizes = [size(m, 40), size(n, 24), size(k, 16)];
        all.push(gemm(sizes, Some(us)));
        all.push(Operation {
            op: "product",
            build: multiply(sizes, |a, b| product(a, b, BF16)),
            ..gemm(sizes, Some(us))
        });
    }
    all
}

fn scan([b, l, e, n]: [i64; 4], recorded: Option<(f64, f64)>, target: Option<(f64, f64)>) -> Operation {
    let (wide, narrow) = ((2 * b * l * e) as f64, (2 * b * l * n) as f64);
    // x, dt, z and y; then x, dt, z, dy and the gradients of the first three. b and c twice as small.
    let mut passes =
        [Pass::new(Forward, 4. * wide + 2. * narrow, 0.), Pass::new(Backward, 7. * wide + 4. * narrow, 0.)];
    if let Some((forward, backward)) = recorded {
        let [f, g] = passes;
        passes = [
            f.against(CUDA_SCAN, forward, target.map(|target| target.0)),
            g.against(CUDA_SCAN, backward, target.map(|target| target.1)),
        ];
    }
    Operation {
        op: "selective_scan",
        shape: format!("B{b} L{l} D{e} N{n}"),
        passes: passes.into(),
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| leaf(shape, kind, device, seed);
            let rates = random(&[e, n], Kind::Float, device, 3)?.abs().f_neg()? - 0.1;
            Ok(Call {
                leaves: vec![
                    part(&[b, l, e], BF16, 1)?,
                    part(&[b, l, e], BF16, 2)?,
                    rates.detach().set_requires_grad(true),
                    part(&[b, l, n], BF16, 4)?,
                    part(&[b, l, n], BF16, 5)?,
                    part(&[b, l, e], BF16, 6)?,
                    part(&[e], Kind::Float, 7)?,
                    part(&[e], Kind::Float, 8)?,
                ],
                run: Box::new(|t| {
                    let args = SelectiveScan {
                        z_ble: Some(&t[5]),
                        d_e: Some(&t[6]),
                        dt_bias_e: Some(&t[7]),
                        ..SelectiveScan::new(&t[0], &t[1], &t[2], &t[3], &t[4])
                    };
                    Ok(vec![selective_scan(&args)?.y_ble])
                }),
            })
        }),
    }
}

fn ssd_of([b, l, h, p, n]: [i64; 5], recorded: Option<(f64, Option<f64>)>, target: Option<(f64, f64)>) -> Operation {
    const CHUNK: i64 = 64;
    let (wide, narrow) = ((2 * b * l * h * p) as f64, (2 * b * l * n) as f64);
    // States and outputs of chunks, and the causal half of the products inside one.
    let flops = (b * l) as f64 * (4 * p * n * h + p * CHUNK * h + n * CHUNK) as f64;
    let mut forward = Pass::new(Forward, 2. * wide + 2. * narrow, flops);
    let mut backward = Pass::new(Backward, 3. * wide + 4. * narrow, 2. * flops);
    if let Some((f, g)) = recorded {
        forward = forward.against(TRITON_SSD, f, target.map(|target| target.0));
        if let Some(g) = g {
            backward = backward.against(TRITON_SSD, g, target.map(|target| target.1));
        }
    }
    Operation {
        op: "ssd",
        shape: format!("B{b} L{l} {h}x{p} N{n}"),
        passes: vec![forward, backward],
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| leaf(shape, kind, device, seed);
            let rates = random(&[h], Kind::Float, device, 3)?.abs().f_neg()? - 0.1;
            Ok(Call {
                leaves: vec![
                    part(&[b, l, h, p], BF16, 1)?,
                    part(&[b, l, h], BF16, 2)?,
                    rates.detach().set_requires_grad(true),
                    part(&[b, l, 1, n], BF16, 4)?,
                    part(&[b, l, 1, n], BF16, 5)?,
                    part(&[h], Kind::Float, 6)?,
                    part(&[h], Kind::Float, 7)?,
                ],
                run: Box::new(|t| {
                    let args =
                        Ssd { d_h: Some(&t[5]), dt_bias_h: Some(&t[6]), ..Ssd::new(&t[0], &t[1], &t[2], &t[3], &t[4]) };
                    Ok(vec![ssd(&args)?.y_blhp])
                }),
            })
        }),
    }
}

fn conv([b, l, e, k]: [i64; 4]) -> Operation {
    let wide = (2 * b * l * e) as f64;
    Operation {
        op: "causal_conv1d",
        shape: format!("B{b} L{l} D{e} K{k}"),
        passes: vec![
            Pass::new(Forward, 2. * wide, 0.).against("causal-conv1d CUDA", 92., Some(1.05)),
            Pass::new(Backward, 3. * wide, 0.).against("causal-conv1d CUDA", 235., Some(1.4)),
        ],
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| leaf(shape, kind, device, seed);
            Ok(Call {
                leaves: vec![part(&[b, l, e], BF16, 1)?, part(&[e, k], Kind::Float, 2)?, part(&[e], Kind::Float, 3)?],
                run: Box::new(|t| {
                    let args = CausalConv1d { bias_e: Some(&t[2]), ..CausalConv1d::new(&t[0], &t[1]) };
                    Ok(vec![causal_conv1d(&args)?.y_ble])
                }),
            })
        }),
    }
}

fn gated_norm(r: i64, d: i64) -> Operation {
    let wide = (2 * r * d) as f64;
    Operation {
        op: "gated_rms_norm",
        shape: format!("{r}x{d}"),
        passes: vec![
            Pass::new(Forward, 3. * wide, 0.).against(TRITON_SSD, 100., None),
            Pass::new(Backward, 5. * wide, 0.).against(TRITON_SSD, 331., Some(1.5)),
        ],
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| leaf(shape, kind, device, seed);
            Ok(Call {
                leaves: vec![part(&[r, d], BF16, 1)?, part(&[r, d], BF16, 2)?, part(&[d], Kind::Float, 3)?],
                run: Box::new(|t| Ok(vec![gated_rms_norm(&t[0], &t[1], &t[2], EPS, 1)?])),
            })
        }),
    }
}

fn norm(r: i64, d: i64, (forward, backward): (f64, f64)) -> Operation {
    let wide = (2 * r * d) as f64;
    Operation {
        op: "rms_norm",
        shape: format!("{r}x{d}"),
        passes: vec![
            Pass::new(Forward, 2. * wide, 0.).against(TORCH, forward, None),
            Pass::new(Backward, 3. * wide, 0.).against(TORCH, backward, Some(2.)),
        ],
        build: Box::new(move |device| {
            let part = |shape: &[i64], kind, seed| leaf(shape, kind, device, seed);
            Ok(Call {
                leaves: vec![part(&[r, d], BF16, 1)?, part(&[d], Kind::Float, 2)?],
                run: Box::new(|t| Ok(vec![rms_norm(&t[0], &t[1], EPS)?])),
            })
        }),
    }
}

fn swiglu_of(r: i64, d: i64) -> Operation {
    let wide = (2 * r * d) as f64;
    Operation {
        op: "swiglu",
        shape: format!("{r}x{d}"),
        passes: vec![
            Pass::new(Forward, 1.5 * wide, 0.).against(COMPILED, 138., Some(1.)),
            Pass::new(Backward, 2.5 * wide, 0.).against(COMPILED, 262., Some(1.)),
        ],
        build: Box::new(move |device| {
            Ok(Call { leaves: vec![leaf(&[r, d], BF16, device, 1)?], run: Box::new(|t| Ok(vec![swiglu(&t[0])?])) })
        }),
    }
}

fn lm_head([r, d, v]: [i64; 3], us: f64, within: f64) -> Operation {
    // Three products of the same size; each operand is read and each gradient written once, that of the weight in f32.
    let (flops, bytes) = (6. * (r * d * v) as f64, (4 * r * d + 6 * v * d) as f64);
    // Half a GiB, and what a head without logits needs as well: two numbers for each token and some single ones.
    let memory = (1 << 29) + 8 * r as u64 + 4096;
    let products = Products { shapes: [[r, v, d], [r, d, v], [v, d, r]], within, memory };
    Operation {
        op: "linear_cross_entropy",
        shape: format!("{r}x{d} V{v}"),
        passes: vec![Pass::of_products(products, bytes, flops).against(COMPILED, us, None)],
        build: Box::new(move |device| {
            let targets = (Tensor::arange(r, (Kind::Int64, device)) * 7919).remainder(v);
            // As in training: a master in f32 and the copy that the products take.
            let mut params = Params::new(device, 0);
            let weight = params.root().weight("head", &[v, d], Init::Zeros, Decay::Yes)?;
            params.assign("head", &(random(&[v, d], Kind::Float, device, 2)? * 0.02))?;
            weight.want_bf16_copy();
            params.refresh_bf16_copies()?;
            Ok(Call {
                leaves: vec![leaf(&[r, d], BF16, device, 1)?, weight.master().shallow_clone()],
                run: Box::new(move |t| Ok(vec![linear_cross_entropy(&t[0], &weight, &targets, -100)?])),
            })
        }),
    }
}

fn attention_of([b, t, h, k, p]: [i64; 5], (forward, backward): (f64, f64)) -> Operation {
    // The causal half of two products; the backward computes the scores once more and has four others.
    let flops = 2. * (b * h * p) as f64 * (t * t) as f64;
    let (q, kv) = ((2 * b * t * h * p) as f64, (2 * b * t * k * p) as f64);
    let heads = if h == k { h.to_string() } else { format!("{h}/{k}") };
    Operation {
        op: "attention",
        shape: format!("B{b} T{t} {heads}x{p}"),
        passes: vec![
            Pass::new(Forward, 2. * q + 2. * kv, flops).against("torch SDPA, cuDNN", forward, None),
            Pass::new(Backward, 4. * q + 4. * kv, 2.5 * flops).against("torch SDPA, cuDNN", backward, None),
        ],
        build: Box::new(move |device| {
            let part = |heads, seed| leaf(&[b, t, heads, p], BF16, device, seed);
            Ok(Call {
                leaves: vec![part(h, 1)?, part(k, 2)?, part(k, 3)?],
                run: Box::new(|t| Ok(vec![attention(&t[0], &t[1], &t[2], &Mask::causal())?])),
            })
        }),
    }
}

/// A product of libtorch's, bf16: `[m, k]` with `[n, k]`, as a linear map has it.
pub fn gemm([m, n, k]: [i64; 3], us: Option<f64>) -> Operation {
    let pass = Pass::new(Forward, 2. * (m * n + n * k + m * k) as f64, 2. * (m * n) as f64 * k as f64);
    Operation {
        op: "gemm",
        shape: format!("{m}x{n}x{k}"),
        passes: vec![match us {
            Some(us) => pass.against(TORCH, us, None),
            None => pass,
        }],
        build: multiply([m, n, k], |a, b| Ok(a.f_mm(b)?)),
    }
}

/// The operands of such a product, for a way to do it.
fn multiply([m, n, k]: [i64; 3], run: fn(&Tensor, &Tensor) -> Result<Tensor>) -> Build {
    Box::new(move |device| {
        Ok(Call {
            leaves: vec![random(&[m, k], BF16, device, 1)?, random(&[n, k], BF16, device, 2)?],
            run: Box::new(move |t| Ok(vec![run(&t[0], &t[1].f_tr()?)?])),
        })
    })
}

/// A copy of `n` bf16 values.
pub fn copy(n: i64) -> Operation {
    Operation {
        op: "copy",
        shape: format!("{n}"),
        passes: vec![Pass::new(Forward, 4. * n as f64, 0.)],
        build: Box::new(move |device| {
            let (from, to) = (random(&[n], BF16, device, 1)?, random(&[n], BF16, device, 2)?);
            Ok(Call { leaves: vec![from, to], run: Box::new(copied) })
        }),
    }
}

fn copied(t: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut to = t[1].shallow_clone();
    to.f_copy_(&t[0])?;
    Ok(vec![to])
}
