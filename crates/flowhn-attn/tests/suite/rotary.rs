//! Rotary embedding against complex rotation.

use tch::{Device, Kind, Tensor};

use crate::common::{leaf, noise};
use flowhn_attn::{RotaryTable, rotary};
use flowhn_torch::testing::{assert_close, gradcheck};

fn table(positions: &[i64], d_head: i64, theta: f64) -> RotaryTable {
    RotaryTable::new(positions, d_head, theta, Device::Cpu).unwrap()
}

fn elements(x: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(x.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

#[test]
fn pairs_turn_as_complex_numbers() {
    let positions = [0i64, 1, 2, 511, 40_000];
    for (d_head, theta) in [(2, 10000.), (6, 10000f64), (32, 500_000.)] {
        let half = d_head as usize / 2;
        for (kind, tol) in [(Kind::Float, 1e-6), (Kind::Double, 1e-6), (Kind::BFloat16, 1e-2)] {
            let x = noise(&[2, 5, 3, d_head], 1, kind);
            let mut want = elements(&x);
            for (i, head) in want.chunks_exact_mut(d_head as usize).enumerate() {
                let position = positions[i / 3 % 5] as f64;
                for j in 0..half {
                    // (a + b i) e^(i angle), multiplied out.
                    let angle = position * theta.powf(-(2. * j as f64) / d_head as f64);
                    let (a, b) = (head[j], head[j + half]);
                    head[j] = a * angle.cos() - b * angle.sin();
                    head[j + half] = a * angle.sin() + b * angle.cos();
                }
            }
            let got = rotary(&x, &table(&positions, d_head, theta)).unwrap();
            assert_eq!(got.kind(), kind);
            assert_close("turned", &got, &Tensor::from_slice(&want).view(x.size().as_slice()), tol);
        }
    }
}

#[test]
fn products_depend_on_the_distance_alone() {
    let (q, k) = (noise(&[1, 1, 1, 16], 1, Kind::Double), noise(&[1, 1, 1, 16], 2, Kind::Double));
    let product = |q_position: i64, k_position: i64| {
        let (q, k) = (rotary(&q, &table(&[q_position], 16, 10000.)), rotary(&k, &table(&[k_position], 16, 10000.)));
        (q.unwrap() * k.unwrap()).sum(Kind::Double).double_value(&[])
    };
    for (near, far) in [((3, 0), (70_003, 70_000)), ((17, 12), (1017, 1012)), ((5, 5), (0, 0))] {
        let (near, far) = (product(near.0, near.1), product(far.0, far.1));
        assert!((near - far).abs() < 1e-5, "{near} {far}");
    }
    assert!((product(3, 0) - product(4, 0)).abs() > 1e-2, "and it does depend on the distance");
}

#[test]
fn lengths_stay_and_strides_do_not_matter() {
    let x = noise(&[2, 300, 6, 32], 3, Kind::Float);
    let table = table(&(5..305).collect::<Vec<_>>(), 32, 10000.);
    let turned = rotary(&x, &table).unwrap();
    assert!(turned.is_contiguous());
    assert_close("length", &turned.square().sum(Kind::Double), &x.square().sum(Kind::Double), 1e-6);
    let part = rotary(&x.narrow(2, 1, 4), &table).unwrap();
    assert_eq!(part, turned.narrow(2, 1, 4));
    let spread = x.transpose(1, 3).contiguous().transpose(1, 3);
    assert_eq!(rotary(&spread, &table).unwrap(), turned);
}

#[test]
fn gradients_match_finite_differences() {
    let x = leaf(&noise(&[2, 3, 2, 4], 4, Kind::Double));
    let table = table(&[0, 5, 6], 4, 100.);
    gradcheck(|inputs| rotary(&(&inputs[0] * &inputs[0]), &table), &[x], 1e-5, 1e-7).unwrap();
}

#[test]
fn no_tokens_are_no_trouble() {
    assert!(table(&[], 4, 100.).is_empty());
    assert_eq!(rotary(&noise(&[2, 0, 3, 4], 0, Kind::Float), &table(&[], 4, 100.)).unwrap().size(), [2, 0, 3, 4]);
    assert_eq!(rotary(&noise(&[0, 2, 3, 4], 0, Kind::Float), &table(&[0, 1], 4, 100.)).unwrap().size(), [0, 2, 3, 4]);
}

#[test]
fn mistakes_are_named() {
    let message = |x: &Tensor| rotary(x, &table(&[0, 1], 4, 100.)).unwrap_err().to_string();
    assert!(
        message(&noise(&[2, 3, 1, 4], 0, Kind::Float)).contains("x_bnhp has shape [2, 3, 1, 4], expected [2, 2, 1, 4]")
    );
    assert!(message(&noise(&[2, 2, 1, 6], 0, Kind::Float)).contains("expected [2, 2, 1, 4]"));
    assert!(message(&noise(&[2, 2, 1, 4], 0, Kind::Int64)).contains("x_bnhp is Int64"));
    assert!(RotaryTable::new(&[0], 5, 100., Device::Cpu).unwrap_err().to_string().contains("must be even"));
    assert!(RotaryTable::new(&[0], 4, 0., Device::Cpu).unwrap_err().to_string().contains("theta is 0"));
}
