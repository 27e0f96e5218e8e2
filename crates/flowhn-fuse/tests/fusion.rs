//! Every entry of the table of fusion modules.

mod common;

use tch::{Device, Kind, Tensor};

use common::{noise, routes};
use flowhn_fuse::{FUSIONS, FuseShape, Fusion, FusionKind, FusionSpec, Route, Topology, merge};
use flowhn_nn::{Params, Residual, RmsNorm};
use flowhn_torch::testing::{assert_close, gradcheck};

const D: i64 = 5;
const TOPOLOGIES: [Topology; 4] = [Topology::Split, Topology::Both, Topology::AttnOnly, Topology::SsmOnly];

fn routes_for(topology: Topology, seq_len: usize) -> (Route, Route) {
    let (all, none) = (Route::all(seq_len, Device::Cpu).unwrap(), Route::none(seq_len, Device::Cpu).unwrap());
    match topology {
        Topology::Split => routes(&[1, 3, seq_len - 4]),
        Topology::Both => (all.clone(), all),
        Topology::AttnOnly => (all, none),
        Topology::SsmOnly => (none, all),
    }
}

fn new(kind: FusionKind, topology: Topology) -> (Params, Fusion) {
    let mut params = Params::new(Device::Cpu, 3);
    let shape = FuseShape { d_model: D, topology };
    let fusion = Fusion::new(&mut params.root().push("fuse"), kind, shape).unwrap();
    (params, fusion)
}

/// Gives every parameter values that are not those it starts with.
fn shake(params: &Params) {
    for (i, param) in params.iter().enumerate() {
        params.assign(&param.name, &noise(&param.weight.size(), 40 + i as u64, Kind::Float)).unwrap();
    }
}

fn outputs(attn: &Route, ssm: &Route, kind: Kind) -> (Tensor, Tensor) {
    (noise(&[2, attn.len() as i64, D], 1, kind), noise(&[2, ssm.len() as i64, D], 2, kind))
}

#[test]
fn the_flow_blocks_modules_start_as_the_identity() {
    for spec in FUSIONS.iter().filter(|spec| spec.name != "branch_proj") {
        for topology in TOPOLOGIES {
            let (_params, fusion) = new(spec.kind, topology);
            let (attn, ssm) = routes_for(topology, 9);
            let (a, s) = outputs(&attn, &ssm, Kind::Float);
            let y = fusion.forward(Some(&a), Some(&s), &attn, &ssm).unwrap();
            let want = match topology {
                Topology::Both if spec.name == "mean" => (&a + &s) * 0.5,
                Topology::Both => &a + &s,
                _ => merge(&a, &s, &attn, &ssm).unwrap(),
            };
            assert_close(spec.name, &y, &want, 1e-6);
        }
    }
}

#[test]
fn the_residual_form_adds_the_input() {
    for spec in FUSIONS {
        for topology in TOPOLOGIES {
            let (params, fusion) = new(spec.kind, topology);
            shake(&params);
            let (attn, ssm) = routes_for(topology, 9);
            let (a, s) = outputs(&attn, &ssm, Kind::Float);
            let x = noise(&[2, 9, D], 3, Kind::Float);
            let want = &x + fusion.forward(Some(&a), Some(&s), &attn, &ssm).unwrap();
            let got = fusion.forward_residual(&x, Some(&a), Some(&s), &attn, &ssm).unwrap();
            assert_close(spec.name, &got, &want, 1e-6);
        }
    }
}

#[test]
fn with_the_norm_it_takes_what_the_branches_still_add() {
    for spec in FUSIONS {
        for topology in TOPOLOGIES {
            let (mut params, fusion) = new(spec.kind, topology);
            let norm = RmsNorm::new(&mut params.root(), "norm", D, 1e-6).unwrap();
            shake(&params);
            let (attn, ssm) = routes_for(topology, 9);
            let (a, s) = outputs(&attn, &ssm, Kind::Float);
            let x = noise(&[2, 9, D], 3, Kind::Float);
            let pending = |x: &Tensor| Residual { x: x * 0.25, change: Some(x * 0.75) };
            let want = fusion.forward_residual(&x, Some(&a), Some(&s), &attn, &ssm).unwrap();
            let branches = (pending(&a), pending(&s));
            let (sum, normed) = fusion
                .forward_residual_norm(&x, Some(&branches.0), Some(&branches.1), &attn, &ssm, (&norm, None))
                .unwrap();
            assert_close(spec.name, &sum, &want, 1e-6);
            assert_close(spec.name, normed.values().unwrap(), &norm.forward(&want).unwrap(), 1e-6);
        }
    }
}

#[test]
fn one_token_at_a_time_gives_what_the_sequence_gives() {
    for spec in FUSIONS {
        let (params, fusion) = new(spec.kind, Topology::Split);
        shake(&params);
        let (attn, ssm) = routes_for(Topology::Split, 9);
        let (a, s) = outputs(&attn, &ssm, Kind::Float);
        let whole = fusion.forward(Some(&a), Some(&s), &attn, &ssm).unwrap();
        let (all, none) = (Route::all(1, Device::Cpu).unwrap(), Route::none(1, Device::Cpu).unwrap());
        for (branch, route) in [(&a, &attn), (&s, &ssm)] {
            for (i, &position) in route.positions().iter().enumerate() {
                let token = branch.narrow(1, i as i64, 1);
                let one = match std::ptr::eq(branch, &a) {
                    true => fusion.forward(Some(&token), None, &all, &none),
                    false => fusion.forward(None, Some(&token), &none, &all),
                };
                assert_close(spec.name, &one.unwrap(), &whole.narrow(1, position, 1), 1e-5);
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for spec in FUSIONS {
        for topology in TOPOLOGIES {
            let (params, fusion) = new(spec.kind, topology);
            shake(&params);
            let (attn, ssm) = routes_for(topology, 6);
            let (a, s) = outputs(&attn, &ssm, Kind::Double);
            let used: Vec<Tensor> =
                [a, s].into_iter().filter(|x| x.numel() > 0).map(|x| x.set_requires_grad(true)).collect();
            let f = |inputs: &[Tensor]| match topology {
                Topology::AttnOnly => fusion.forward(Some(&inputs[0]), None, &attn, &ssm),
                Topology::SsmOnly => fusion.forward(None, Some(&inputs[0]), &attn, &ssm),
                _ => fusion.forward(Some(&inputs[0]), Some(&inputs[1]), &attn, &ssm),
            };
            gradcheck(f, &used, 1e-5, 1e-6).unwrap_or_else(|error| panic!("{} {topology:?}: {error}", spec.name));

            f(&used).unwrap().square().sum(Kind::Double).backward();
            for param in &params {
                let grad = param.weight.master().grad();
                assert!(grad.defined() && grad.abs().max().double_value(&[]) > 0., "{} learns nothing", param.name);
            }
        }
    }
}

#[test]
fn features_are_concatenated_with_the_ssm_first() {
    let (params, fusion) = new(FusionKind::BranchProj { std: 0.02 }, Topology::Both);
    let weight = params.get("fuse.branch_proj.weight").unwrap();
    assert_eq!(weight.weight.size(), [D, 2 * D]);
    let pick_first = Tensor::cat(
        &[Tensor::eye(D, (Kind::Float, Device::Cpu)), Tensor::zeros([D, D], (Kind::Float, Device::Cpu))],
        1,
    );
    params.assign("fuse.branch_proj.weight", &pick_first).unwrap();
    let (attn, ssm) = routes_for(Topology::Both, 4);
    let (a, s) = outputs(&attn, &ssm, Kind::Float);
    assert_close("ssm half", &fusion.forward(Some(&a), Some(&s), &attn, &ssm).unwrap(), &s, 1e-6);
}

#[test]
fn parameters_are_those_that_the_topology_needs() {
    let names = |name: &str, topology| {
        let (params, _) = new(FusionSpec::find(name).unwrap().kind, topology);
        params.iter().map(|param| param.name.clone()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(names("none", Topology::Both), "");
    assert_eq!(names("proj", Topology::AttnOnly), "fuse.branch_proj.weight");
    assert_eq!(names("gated", Topology::AttnOnly), "fuse.attn_gate.weight fuse.attn_gate.bias");
    assert_eq!(names("gated", Topology::SsmOnly), "fuse.ssm_gate.weight fuse.ssm_gate.bias");
    assert_eq!(names("gated", Topology::Split).split(' ').count(), 4);
    let (params, _) = new(FusionKind::BranchProj { std: 0.5 }, Topology::Split);
    let std = params.get("fuse.branch_proj.weight").unwrap().weight.master().std(true).double_value(&[]);
    assert!((0.25..0.75).contains(&std), "{std}");
    assert!(FusionSpec::find("sum").is_none());
}

#[test]
fn mistakes_are_named() {
    let (_params, fusion) = new(FusionKind::None, Topology::Split);
    let (attn, ssm) = routes_for(Topology::Split, 9);
    let (a, s) = outputs(&attn, &ssm, Kind::Float);
    let message = |a: Option<&Tensor>, s: Option<&Tensor>, attn: &Route, ssm: &Route| {
        fusion.forward(a, s, attn, ssm).unwrap_err().to_string()
    };
    assert!(message(Some(&a), None, &attn, &ssm).contains("s_bmd is missing, but its route has 3 tokens"));
    assert!(message(None, None, &attn, &ssm).contains("no branch output"));
    assert!(message(Some(&a), Some(&s), &attn, &attn).contains("topology Split"));
    assert!(message(Some(&a.narrow(2, 0, 3)), Some(&s), &attn, &ssm).contains("a_bnd has shape [2, 6, 3]"));
    assert!(message(Some(&a), Some(&s.narrow(0, 0, 1)), &attn, &ssm).contains("s_bmd has shape [1, 3, 5]"));
    let (all, none) = routes_for(Topology::AttnOnly, 9);
    let (_params, one_way) = new(FusionKind::Gated, Topology::SsmOnly);
    let error = one_way.forward(Some(&noise(&[2, 9, D], 0, Kind::Float)), None, &all, &none).unwrap_err().to_string();
    assert!(error.contains("topology SsmOnly"), "{error}");
}
