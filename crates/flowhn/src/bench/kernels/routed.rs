//! Operations on the tokens of two branches, and what they read first: halves of a sequence, as the released block shares them out.
// b batch, l seq_len, d d_model, h heads, p d_head, v vocab_size

use std::ops::Range;

use flowhn_attn::{RotaryTable, rotary};
use flowhn_fuse::{Route, merge, merge_residual, merge_residual_norm, merge_sums, split_norm, split_norm_tokens};
use flowhn_nn::{Params, Residual, RmsNorm, embedding, residual_norm};
use flowhn_torch::Result;
use tch::{Device, Kind, Tensor};

use super::operation::Direction::{Backward, Forward};
use super::operation::{Call, Operation, Pass, leaf};

const BF16: Kind = Kind::BFloat16;
const EPS: f64 = 1e-6;

/// Those of both halves, that of all tokens, and a norm for either branch.
struct Routes {
    attn: Route,
    ssm: Route,
    all: Route,
    norm: RmsNorm,
}

impl Routes {
    fn new(l: i64, d: i64, device: Device) -> Result<Self> {
        let (l, mut params) = (l as usize, Params::new(device, 0));
        let norm = RmsNorm::new(&mut params.root(), "norm", d, EPS)?;
        let route = |tokens: Range<usize>| Route::new(l, std::slice::from_ref(&tokens), device);
        Ok(Self { attn: route(0..l / 2)?, ssm: route(l / 2..l)?, all: Route::all(l, device)?, norm })
    }
}

/// An operation on whole sequences, which come first, and halves of them.
struct Routed {
    op: &'static str,
    /// Leaves of `[batch, seq_len, d]` and of `[batch, seq_len / 2, d]`.
    leaves: [usize; 2],
    /// Tensors as large as the sequence that are read and written forward, and backward.
    moved: [f64; 2],
    run: fn(&[Tensor], &Routes) -> Result<Vec<Tensor>>,
}

/// The table's lines; `tiny` makes the sizes small enough to try them on a CPU.
pub fn operations(tiny: bool) -> Vec<Operation> {
    let shape = if tiny { [2, 10, 16] } else { [32, 1024, 1024] };
    let mut all = vec![
        embedding_of(shape, if tiny { 50 } else { 65_536 }),
        residual_norm_of(shape),
        rotary_of(if tiny { [2, 10, 2, 8] } else { [32, 512, 16, 64] }),
    ];
    all.extend(routed().into_iter().map(|routed| routed.operation(shape)));
    all
}

fn routed() -> [Routed; 7] {
    [
        Routed { op: "split_norm", leaves: [1, 0], moved: [2., 4.], run: split_norms },
        Routed {
            op: "split_norm_tokens",
            leaves: [2, 0],
            moved: [4., 5.],
            run: |t, routes| split_norms_and_tokens(t, [&routes.attn, &routes.ssm], &routes.norm),
        },
        // Every token to both branches.
        Routed {
            op: "twin_norm",
            leaves: [2, 0],
            moved: [5., 7.],
            run: |t, routes| split_norms_and_tokens(t, [&routes.all; 2], &routes.norm),
        },
        Routed {
            op: "merge",
            leaves: [0, 2],
            moved: [2., 2.],
            run: |t, routes| Ok(vec![merge(&t[0], &t[1], &routes.attn, &routes.ssm)?]),
        },
        Routed { op: "merge_sums", leaves: [0, 4], moved: [3., 2.], run: merged_sums },
        Routed {
            op: "merge_residual",
            leaves: [1, 2],
            moved: [3., 2.],
            run: |t, routes| Ok(vec![merge_residual(&t[0], &t[1], &t[2], &routes.attn, &routes.ssm)?]),
        },
        Routed {
            op: "merge_residual_norm",
            leaves: [1, 2],
            moved: [4., 5.],
            run: |t, routes| {
                let (sum, normed) = merge_residual_norm(&t[0], &t[1], &t[2], &routes.attn, &routes.ssm, &routes.norm)?;
                Ok(vec![sum, normed])
            },
        },
    ]
}

fn split_norms(t: &[Tensor], routes: &Routes) -> Result<Vec<Tensor>> {
    let normed = split_norm(&t[0], None, &routes.attn, &routes.ssm, &routes.norm, &routes.norm)?;
    Ok(vec![normed.sum_bld, normed.attn_bnd, normed.ssm_bmd])
}

fn split_norms_and_tokens(t: &[Tensor], [attn, ssm]: [&Route; 2], norm: &RmsNorm) -> Result<Vec<Tensor>> {
    let split = split_norm_tokens(&t[0], Some(&t[1]), attn, ssm, [norm; 2], [None, None])?;
    let [attn_normed, ssm_normed] = [&split.attn_normed, &split.ssm_normed].map(|x| x.tensor().shallow_clone());
    Ok(vec![split.sum_bld, attn_normed, ssm_normed, split.attn_bnd, split.ssm_bmd])
}

fn merged_sums(t: &[Tensor], routes: &Routes) -> Result<Vec<Tensor>> {
    let pending = |x: &Tensor, change: &Tensor| Residual { x: x.shallow_clone(), change: Some(change.shallow_clone()) };
    Ok(vec![merge_sums(&pending(&t[0], &t[1]), &pending(&t[2], &t[3]), &routes.attn, &routes.ssm)?])
}

impl Routed {
    fn operation(self, [b, l, d]: [i64; 3]) -> Operation {
        let Self { op, leaves, moved, run } = self;
        let wide = (2 * b * l * d) as f64;
        Operation {
            op,
            shape: format!("B{b} L{l} D{d}"),
            passes: vec![Pass::new(Forward, moved[0] * wide, 0.), Pass::new(Backward, moved[1] * wide, 0.)],
            build: Box::new(move |device| {
                let lens = [l, l / 2].into_iter().zip(leaves).flat_map(|(len, n)| std::iter::repeat_n(len, n));
                let part = |(len, seed)| leaf(&[b, len, d], BF16, device, seed);
                let routes = Routes::new(l, d, device)?;
                Ok(Call {
                    leaves: lens.zip(1..).map(part).collect::<Result<_>>()?,
                    run: Box::new(move |t| run(t, &routes)),
                })
            }),
        }
    }
}

fn embedding_of([b, l, d]: [i64; 3], v: i64) -> Operation {
    let (rows, table) = ((b * l * d) as f64, (v * d) as f64);
    Operation {
        op: "embedding",
        shape: format!("B{b} L{l} D{d} V{v}"),
        // Rows of f32 to bf16; back, all rows of the gradient are written.
        passes: vec![Pass::new(Forward, 6. * rows, 0.), Pass::new(Backward, 2. * rows + 4. * table, 0.)],
        build: Box::new(move |device| {
            let ids = (Tensor::arange(b * l, (Kind::Int64, device)) * 7919).remainder(v).f_view([b, l])?;
            Ok(Call {
                leaves: vec![leaf(&[v, d], Kind::Float, device, 1)?],
                run: Box::new(move |t| Ok(vec![embedding(&t[0], &ids, BF16, None)?])),
            })
        }),
    }
}

fn residual_norm_of([b, l, d]: [i64; 3]) -> Operation {
    let wide = (2 * b * l * d) as f64;
    Operation {
        op: "residual_norm",
        shape: format!("{}x{d}", b * l),
        passes: vec![Pass::new(Forward, 4. * wide, 0.), Pass::new(Backward, 4. * wide, 0.)],
        build: Box::new(move |device| {
            let part = |seed| leaf(&[b * l, d], BF16, device, seed);
            Ok(Call {
                leaves: vec![part(1)?, part(2)?, leaf(&[d], Kind::Float, device, 3)?],
                run: Box::new(|t| {
                    let (sum, normed) = residual_norm(&t[0], Some(&t[1]), &t[2], EPS)?;
                    Ok(vec![sum, normed])
                }),
            })
        }),
    }
}

fn rotary_of([b, l, h, p]: [i64; 4]) -> Operation {
    let wide = (2 * b * l * h * p) as f64;
    Operation {
        op: "rotary",
        shape: format!("B{b} L{l} {h}x{p}"),
        passes: vec![Pass::new(Forward, 2. * wide, 0.), Pass::new(Backward, 2. * wide, 0.)],
        build: Box::new(move |device| {
            let positions: Vec<i64> = (0..l).collect();
            let table = RotaryTable::new(&positions, p, 10_000., device)?;
            Ok(Call {
                leaves: vec![leaf(&[b, l, h, p], BF16, device, 1)?],
                run: Box::new(move |t| Ok(vec![rotary(&t[0], &table)?])),
            })
        }),
    }
}
