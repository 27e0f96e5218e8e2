//! A final state that nobody reads: its gradient is not there, which must count as zeros.
// b batch, l seq_len, e d_inner, n d_state, h n_heads, p d_head, g n_groups

use flowhn_torch::testing::{Case, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{CausalConv1d, SelectiveScan, Ssd, causal_conv1d, selective_scan, ssd};

/// Output and final state of an operation, of tensors in its order.
type Run = fn(&[Tensor]) -> Result<[Tensor; 2]>;

/// Every such check.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = |name: String, shapes: Vec<Vec<i64>>, kind, run: Run| {
        let check = move |device| agrees(&shapes, kind, run, device);
        cases
            .push(Case::new(format!("{name}, {kind:?}: a final state that nobody reads is one without weight"), check));
    };
    for kind in [Kind::BFloat16, Kind::Float] {
        // Few channels and many tokens, so that there are segments, and the other way round.
        for [b, l, e, n] in [[1, 1200, 34, 16], [3, 70, 40, 16]] {
            let shapes = vec![vec![b, l, e], vec![b, l, e], vec![e, n], vec![b, l, n], vec![b, l, n], vec![b, e, n]];
            case(format!("selective_scan [{b}, {l}, {e}, {n}]"), shapes, kind, |t| {
                let scan = SelectiveScan::new(&t[0], &t[1], &t[2], &t[3], &t[4]);
                let out = selective_scan(&SelectiveScan { initial_state_ben: Some(&t[5]), ..scan })?;
                Ok([out.y_ble, out.final_state_ben])
            });
        }
        for [b, l, h, p, g, n] in [[1, 1200, 2, 64, 1, 128], [3, 70, 4, 24, 2, 20]] {
            let state = vec![b, h, p, n];
            let shapes = vec![vec![b, l, h, p], vec![b, l, h], vec![h], vec![b, l, g, n], vec![b, l, g, n], state];
            case(format!("ssd [{b}, {l}, {h}, {p}, {g}, {n}]"), shapes, kind, |t| {
                let whole = Ssd::new(&t[0], &t[1], &t[2], &t[3], &t[4]);
                let out = ssd(&Ssd { initial_state_bhpn: Some(&t[5]), ..whole })?;
                Ok([out.y_blhp, out.final_state_bhpn])
            });
        }
        case("causal_conv1d [2, 37, 72]".to_owned(), vec![vec![2, 37, 72], vec![72, 4], vec![2, 3, 72]], kind, |t| {
            let conv = CausalConv1d::new(&t[0], &t[1]);
            let out = causal_conv1d(&CausalConv1d { initial_state_bje: Some(&t[2]), ..conv })?;
            Ok([out.y_ble, out.final_state_bje])
        });
    }
    cases
}

fn agrees(shapes: &[Vec<i64>], kind: Kind, run: Run, device: Device) -> Result<String> {
    let grads = |reads_state: bool| -> Result<Vec<Tensor>> {
        let leaf = |(idx, shape): (usize, &Vec<i64>)| {
            // The third is the rate of decay, a parameter, or, as the last is, the initial state.
            let kind = if [2, 5].contains(&idx) { Kind::Float } else { kind };
            let values = noise(shape, idx as i64 + 1);
            let values = if idx == 2 { -values.exp() } else { values };
            values.to_kind(kind).to_device(device).set_requires_grad(true)
        };
        let leaves: Vec<Tensor> = shapes.iter().enumerate().map(leaf).collect();
        let [y, state] = run(&leaves)?;
        let mut loss = (&y * &y).f_sum(Kind::Float)?;
        if reads_state {
            loss += (state * 0.).f_sum(Kind::Float)?;
        }
        Ok(Tensor::f_run_backward(&[loss], &leaves, false, false)?)
    };
    let (unread, read) = (grads(false)?, grads(true)?);
    match unread.iter().zip(&read).position(|(unread, read)| !same_bits(unread, read)) {
        None => Ok("the same bits".to_owned()),
        Some(idx) => Err(Error::invalid("selftest", format!("the gradient of input {idx} differs"))),
    }
}
