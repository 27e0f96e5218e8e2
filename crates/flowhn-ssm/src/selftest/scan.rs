//! Checks of [`selective_scan`] on any device.
// b batch, l seq_len, e d_inner, n d_state

use flowhn_torch::testing::{Case, Rule, check_replay, max_rel, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::reference;
use crate::scan::{
    DtActivation, SelectiveScan, SelectiveScanOutput, SelectiveScanStep, selective_scan, selective_scan_step,
};

/// Sizes of a check: batch, seq_len, d_inner, d_state.
type Sizes = [i64; 4];

/// What a check is about, beside sizes and dtype.
#[derive(Clone, Copy, Debug, Default)]
struct With {
    /// One reset in so many tokens.
    resets: Option<i64>,
    /// No skip, no gate, no bias, no initial state.
    bare: bool,
    /// Activations as parts of wider rows.
    strided: Option<Place>,
    /// `dt`, `b` and `c` in f32 beside a bf16 `x`.
    wide: bool,
    /// `dt` unchanged by softplus.
    identity: bool,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// Four elements of a row can be read at once.
    Aligned,
    /// They cannot.
    Odd,
}

/// Every check of the selective scan.
pub(super) fn cases() -> Vec<Case> {
    let plain = With::default();
    let resets = |every| With { resets: Some(every), ..plain };
    let shapes: [(Sizes, With); 17] = [
        ([3, 1, 40, 16], plain),
        ([1, 1, 7, 5], resets(1)),
        ([1, 2, 33, 16], resets(2)),
        ([3, 31, 36, 16], With { strided: Some(Place::Aligned), ..resets(7) }),
        ([1, 31, 33, 16], With { strided: Some(Place::Odd), ..plain }),
        ([3, 64, 72, 16], plain),
        ([1, 65, 9, 1], With { strided: Some(Place::Odd), ..resets(9) }),
        ([1, 127, 40, 16], With { bare: true, ..plain }),
        ([3, 127, 5, 5], With { bare: true, ..resets(50) }),
        ([2, 70, 12, 64], resets(33)),
        ([1, 40, 6, 256], plain),
        ([1, 130, 10, 20], With { wide: true, ..plain }),
        ([2, 66, 34, 16], With { identity: true, ..plain }),
        ([1, 1000, 34, 16], plain),
        ([1, 1000, 17, 16], resets(301)),
        ([2, 1100, 6, 33], With { strided: Some(Place::Aligned), ..resets(900) }),
        ([8, 1000, 6, 16], resets(301)),
    ];
    // These fill a device of 132 multiprocessors: two chunks, more, less than one, and segments. The last does not, but is too
    // long for a CPU.
    let filling: [(Sizes, With); 6] = [
        ([44, 70, 280, 4], resets(30)),
        ([44, 232, 280, 16], plain),
        ([44, 100, 279, 16], With { bare: true, strided: Some(Place::Odd), ..plain }),
        ([44, 20, 280, 16], plain),
        ([11, 1100, 280, 16], resets(301)),
        ([8, 4096, 40, 16], With { strided: Some(Place::Aligned), ..resets(1500) }),
    ];
    let mut cases = Vec::new();
    for kind in [Kind::BFloat16, Kind::Float] {
        let name = |sizes: Sizes, with: With| format!("selective_scan: {kind:?}, sizes {sizes:?}, {with:?}");
        for (sizes, with) in shapes {
            cases.push(Case::new(name(sizes, with), move |device| rule(sizes, with, kind, device)));
        }
        for (sizes, with) in filling {
            cases.push(Case::on_cuda(name(sizes, with), move |device| rule(sizes, with, kind, device)));
        }
        // With segments and without.
        let with = resets(60);
        for sizes in [[1, 1200, 34, 16], [3, 70, 40, 16]] {
            let name = format!("selective_scan: {kind:?}, sizes {sizes:?}, replayed from a CUDA graph");
            cases.push(Case::on_cuda(name, move |device| replays(sizes, with, kind, device)));
        }
        let name = format!("selective_scan: extreme steps stay finite, {kind:?}");
        cases.push(Case::new(name, move |device| extremes_stay_finite(kind, device)));
    }
    cases.push(Case::new("selective_scan: steps equal the scan", steps_equal_the_scan));
    cases.push(Case::new("selective_scan: pieces equal the whole", pieces_equal_the_whole));
    cases.push(Case::new("selective_scan: a token leaves those before it alone", causal));
    cases.push(Case::new("selective_scan: unsupported arguments are refused by name", refusals));
    cases
}

/// Inputs in double precision, on the CPU: x, dt, a, b, c, d, z, dt_bias, initial state.
fn inputs([batch, l, e, n]: Sizes, with: With) -> Vec<Tensor> {
    let dt = noise(&[batch, l, e], 2);
    let mut inputs = vec![
        noise(&[batch, l, e], 1) * 1.7,
        if with.identity { dt.abs() * 0.3 } else { dt * 2.5 - 1. },
        -(noise(&[e, n], 3) * 1.5).exp(),
        noise(&[batch, l, n], 4) * 1.7,
        noise(&[batch, l, n], 5) * 1.7,
    ];
    if !with.bare {
        // A bias could make step sizes negative that softplus does not see.
        let bias = noise(&[e], 8) * if with.identity { 0. } else { 0.5 };
        inputs.extend([noise(&[e], 6), noise(&[batch, l, e], 7) * 2., bias, noise(&[batch, e, n], 9)]);
    }
    inputs
}

/// The dtypes of [`inputs`].
fn kinds(kind: Kind, with: With) -> Vec<Kind> {
    let wide = if with.wide { Kind::Float } else { kind };
    vec![kind, wide, Kind::Float, wide, wide, Kind::Float, kind, Kind::Float, Kind::Float]
}

fn resets([batch, l, ..]: Sizes, with: With, device: Device) -> Option<Tensor> {
    let index = Tensor::arange(batch * l, (Kind::Int64, device)).view([batch, l]);
    with.resets.map(|every| (index * 7).remainder(every).eq(0))
}

fn args<'a>(t: &'a [Tensor], reset_bl: Option<&'a Tensor>, with: With) -> SelectiveScan<'a> {
    SelectiveScan {
        d_e: t.get(5),
        z_ble: t.get(6),
        dt_bias_e: t.get(7),
        initial_state_ben: t.get(8),
        reset_bl,
        dt_activation: if with.identity { DtActivation::Identity } else { DtActivation::Softplus },
        ..SelectiveScan::new(&t[0], &t[1], &t[2], &t[3], &t[4])
    }
}

fn pair(out: SelectiveScanOutput) -> Vec<Tensor> {
    vec![out.y_ble, out.final_state_ben]
}

/// The activations as views of wider rows.
fn layout(t: &[Tensor], with: With) -> Vec<Tensor> {
    let view = |(i, t): (usize, &Tensor)| match with.strided {
        Some(place) if [0, 1, 3, 4, 6].contains(&i) => {
            let (width, pad) = (t.size()[2], t.narrow(2, 0, 1));
            let (before, after) = match place {
                Place::Aligned => (4, 4 + (4 - width % 4) % 4),
                Place::Odd => (1, 2),
            };
            let pads = |n: i64| pad.expand([-1, -1, n], false);
            Tensor::cat(&[pads(before), t.shallow_clone(), pads(after)], 2).narrow(2, before, width)
        }
        _ => t.shallow_clone(),
    };
    t.iter().enumerate().map(view).collect()
}

fn rule(sizes: Sizes, with: With, kind: Kind, device: Device) -> Result<String> {
    let reset_bl = resets(sizes, with, device);
    let reset_bl = reset_bl.as_ref();
    Rule {
        kernel: &|t| selective_scan(&args(&layout(t, with), reset_bl, with)).map(pair),
        plain: &|t| reference::selective_scan(&args(t, reset_bl, with)).map(pair),
        floor: Rule::floor_of(kind),
    }
    .check(&inputs(sizes, with), &kinds(kind, with), device)
}

fn replays(sizes: Sizes, with: With, kind: Kind, device: Device) -> Result<String> {
    let reset_bl = resets(sizes, with, device);
    let scan = |t: &[Tensor]| selective_scan(&args(t, reset_bl.as_ref(), with)).map(pair);
    check_replay(&scan, &inputs(sizes, with), &kinds(kind, with), device)
}

/// Inputs on the device in the dtypes of a call without gradients.
fn on_device(sizes: Sizes, kind: Kind, device: Device) -> Vec<Tensor> {
    let with = With::default();
    inputs(sizes, with).iter().zip(kinds(kind, with)).map(|(t, kind)| t.to_kind(kind).to_device(device)).collect()
}

fn expect(what: &str, holds: bool) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("selective_scan", format!("{what} does not hold"))) }
}

fn steps_equal_the_scan(device: Device) -> Result<String> {
    let (sizes, with) = ([2, 9, 40, 16], With { resets: Some(4), ..With::default() });
    let t = on_device(sizes, Kind::BFloat16, device);
    let reset_bl = resets(sizes, with, device);
    let whole = selective_scan(&args(&t, reset_bl.as_ref(), with))?;
    let mut state = t[8].copy();
    for i in 0..sizes[1] {
        let token = |t: &Tensor| t.select(1, i);
        let (x, dt, b, c, z) = (token(&t[0]), token(&t[1]), token(&t[3]), token(&t[4]), token(&t[6]));
        let reset_b = reset_bl.as_ref().map(token);
        let y = selective_scan_step(SelectiveScanStep {
            x_be: &x,
            dt_be: &dt,
            a_en: &t[2],
            b_bn: &b,
            c_bn: &c,
            d_e: Some(&t[5]),
            z_be: Some(&z),
            dt_bias_e: Some(&t[7]),
            dt_activation: DtActivation::Softplus,
            state_ben: &mut state,
            reset_b: reset_b.as_ref(),
        })?;
        expect("that the output of a step has the bits of the scan's", same_bits(&y, &whole.y_ble.select(1, i)))?;
    }
    expect("that the last state has the bits of the scan's", same_bits(&state, &whole.final_state_ben))?;
    Ok("the same bits".to_owned())
}

/// A scan that a device may cut into segments against pieces that it does not.
fn pieces_equal_the_whole(device: Device) -> Result<String> {
    let (sizes, with) = ([1, 2048, 33, 16], With { resets: Some(700), ..With::default() });
    let t = on_device(sizes, Kind::Float, device);
    let reset_bl = resets(sizes, with, device);
    let whole = selective_scan(&args(&t, reset_bl.as_ref(), with))?;
    let (mut state, mut y) = (t[8].shallow_clone(), Vec::new());
    for start in (0..sizes[1]).step_by(256) {
        let piece = |(i, t): (usize, &Tensor)| match i {
            0 | 1 | 3 | 4 | 6 => t.narrow(1, start, 256),
            8 => state.shallow_clone(),
            _ => t.shallow_clone(),
        };
        let t: Vec<Tensor> = t.iter().enumerate().map(piece).collect();
        let reset_bl = reset_bl.as_ref().map(|reset_bl| reset_bl.narrow(1, start, 256));
        let out = selective_scan(&args(&t, reset_bl.as_ref(), with))?;
        y.push(out.y_ble);
        state = out.final_state_ben;
    }
    let error = max_rel(&Tensor::cat(&y, 1), &whole.y_ble).max(max_rel(&state, &whole.final_state_ben));
    expect(&format!("that pieces agree to 1e-6 ({error:.1e})"), error < 1e-6)?;
    Ok(format!("differ by {error:.1e}"))
}

/// Steps, rates and inputs that are too large or too small for careless arithmetic.
fn extremes_stay_finite(kind: Kind, device: Device) -> Result<String> {
    let (sizes, with) = ([1, 700, 8, 16], With::default());
    let rule = Rule {
        kernel: &|t| selective_scan(&args(t, None, with)).map(pair),
        plain: &|t| reference::selective_scan(&args(t, None, with)).map(pair),
        // The exponential of a step far from 0 has the rounding of its argument, some 1e-6 of it in f32.
        floor: 2. * Rule::floor_of(kind),
    };
    let mut found = String::new();
    for (dt, a, x) in
        [(60., 1., 1.), (-60., 1., 1.), (1e4, 1e4, 1.), (-200., 1e-6, 1.), (3., 1e-30, 1e15), (0., 1., 1e18)]
    {
        let mut t = inputs(sizes, with);
        t[1] = &t[1] + dt;
        t[2] = &t[2] * a;
        t[0] = &t[0] * x;
        t[6] = &t[6] * 100.;
        found = rule.check_extremes(&t, &kinds(kind, with), device).map_err(|error| {
            Error::invalid("selective_scan", format!("steps of {dt}, rates of {a}, inputs of {x}: {error}"))
        })?;
    }
    Ok(found)
}

fn causal(device: Device) -> Result<String> {
    let (sizes, with, changed) = ([1, 90, 34, 16], With::default(), 41);
    let t = on_device(sizes, Kind::BFloat16, device);
    let before = selective_scan(&args(&t, None, with))?.y_ble;
    for i in [0, 1, 3, 4, 6] {
        let mut other: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
        other[i] = t[i].copy();
        let _ = other[i].narrow(1, changed, 1).fill_(3.);
        let after = selective_scan(&args(&other, None, with))?.y_ble;
        let same = |start, len| same_bits(&before.narrow(1, start, len), &after.narrow(1, start, len));
        expect("that tokens before a change keep their bits", same(0, changed))?;
        expect("that the changed token feels the change", !same(changed, 1))?;
    }
    Ok("the same bits before the change".to_owned())
}

fn refusals(device: Device) -> Result<String> {
    let with = With::default();
    let mut t = on_device([1, 4, 6, 3], Kind::Float, device);
    t[3] = t[3].narrow(2, 0, 2);
    let message =
        selective_scan(&args(&t, None, with)).map(|_| String::new()).unwrap_or_else(|error| error.to_string());
    expect(&format!("that b_bln is named in {message:?}"), message.contains("b_bln"))?;
    if device == Device::Cpu {
        return Ok(message);
    }
    let t: Vec<Tensor> = inputs([1, 4, 6, 3], with).iter().map(|t| t.to_device(device)).collect();
    let message =
        selective_scan(&args(&t, None, with)).map(|_| String::new()).unwrap_or_else(|error| error.to_string());
    expect(&format!("that f64 is refused in {message:?}"), message.contains("x_ble") && message.contains("CPU"))?;
    let t = on_device([1, 4, 6, 257], Kind::Float, device);
    let message =
        selective_scan(&args(&t, None, with)).map(|_| String::new()).unwrap_or_else(|error| error.to_string());
    expect(&format!("that 257 states are refused in {message:?}"), message.contains("d_state is 257"))?;
    Ok(message)
}
