//! Checks of [`ssd`] on any device.
// b batch, l seq_len, h n_heads, p d_head, g n_groups, n d_state

use flowhn_torch::testing::{Case, Rule, check_replay, noise, same_bits};
use flowhn_torch::{Error, Result, split_features};
use tch::{Device, Kind, Tensor};

use crate::reference;
use crate::scan::DtActivation;
use crate::ssd::{Ssd, SsdOutput, SsdStep, ssd, ssd_step};

/// Sizes of a check: batch, seq_len, n_heads, d_head, n_groups, d_state.
type Sizes = [i64; 6];

/// What a check is about, beside sizes and dtype.
#[derive(Clone, Copy, Debug, Default)]
struct With {
    /// One reset in so many tokens.
    resets: Option<i64>,
    /// No skip, no bias, no initial state.
    bare: bool,
    /// `x`, `b`, `c` as parts of wider rows.
    strided: Option<Place>,
    /// `dt` in f32 beside bf16 inputs, unchanged by softplus.
    exact_dt: bool,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// Each in rows of its own, at places that no vector fits.
    Odd,
    /// Side by side in the same rows, at multiples of 16 bytes, as the mixer of Mamba-2 hands them over.
    Mixer,
}

/// Every check of SSD.
pub(super) fn cases() -> Vec<Case> {
    let plain = With::default();
    let resets = |every| With { resets: Some(every), ..plain };
    let mixer = Some(Place::Mixer);
    let shapes: [(Sizes, With); 19] = [
        ([3, 1, 4, 64, 2, 128], plain),
        ([1, 2, 4, 64, 2, 128], resets(2)),
        ([1, 31, 3, 64, 1, 64], plain),
        ([3, 64, 2, 64, 1, 128], plain),
        ([1, 127, 4, 64, 2, 128], resets(37)),
        ([3, 257, 4, 64, 2, 128], plain),
        ([1, 1000, 3, 64, 1, 128], resets(301)),
        ([1, 1100, 2, 32, 1, 16], resets(450)),
        ([2, 70, 4, 24, 2, 20], resets(11)),
        ([1, 65, 2, 80, 1, 40], With { exact_dt: true, ..plain }),
        ([1, 130, 2, 128, 1, 64], plain),
        ([1, 66, 2, 16, 2, 32], With { strided: Some(Place::Odd), ..plain }),
        ([2, 66, 2, 5, 1, 3], With { strided: Some(Place::Odd), ..resets(5) }),
        ([1, 100, 2, 64, 1, 256], plain),
        ([2, 130, 2, 64, 1, 128], With { bare: true, ..plain }),
        ([2, 70, 34, 16, 1, 16], plain),
        ([2, 130, 2, 64, 1, 128], With { strided: mixer, ..plain }),
        ([1, 200, 6, 64, 2, 128], With { strided: mixer, ..resets(70) }),
        ([8, 1000, 2, 64, 1, 128], With { strided: mixer, ..resets(301) }),
    ];
    let mut cases = Vec::new();
    for kind in [Kind::BFloat16, Kind::Float] {
        let name = |sizes: Sizes, with: With| format!("ssd: {kind:?}, sizes {sizes:?}, {with:?}");
        for (sizes, with) in shapes {
            cases.push(Case::new(name(sizes, with), move |device| rule(sizes, with, kind, device)));
        }
        for sizes in [[1, 140, 2, 16, 1, 16], [1, 140, 2, 64, 1, 128]] {
            let name = format!("ssd: extreme steps stay finite, {kind:?}, sizes {sizes:?}");
            cases.push(Case::new(name, move |device| extremes_stay_finite(sizes, kind, device)));
        }
        // Long for a CPU.
        let (sizes, with) = ([8, 4096, 2, 64, 1, 128], With { strided: mixer, ..resets(1500) });
        cases.push(Case::on_cuda(name(sizes, with), move |device| rule(sizes, with, kind, device)));
        // With segments and without.
        let with = resets(60);
        for sizes in [[1, 1200, 2, 64, 1, 128], [3, 70, 4, 24, 2, 20]] {
            let name = format!("ssd: {kind:?}, sizes {sizes:?}, replayed from a CUDA graph");
            cases.push(Case::on_cuda(name, move |device| replays(sizes, with, kind, device)));
        }
    }
    cases.push(Case::new("ssd: steps equal the scan", steps_equal_the_scan));
    cases.push(Case::new("ssd: pieces equal the whole", pieces_equal_the_whole));
    cases.push(Case::new("ssd: a token leaves those before it alone", causal));
    cases.push(Case::new("ssd: a document leaves others in its pack alone", documents_stay_apart));
    cases.push(Case::new("ssd: unsupported arguments are refused by name", refusals));
    cases
}

/// Inputs in double precision, on the CPU.
fn inputs([batch, l, h, p, g, n]: Sizes, with: With) -> Vec<Tensor> {
    let mut inputs = vec![
        noise(&[batch, l, h, p], 1) * 1.7,
        noise(&[batch, l, h], 2) - if with.exact_dt { -1.1 } else { 1.5 },
        -(noise(&[h], 3) * 1.5).exp(),
        noise(&[batch, l, g, n], 4) * 1.7,
        noise(&[batch, l, g, n], 5) * 1.7,
    ];
    if !with.bare {
        inputs.extend([noise(&[h], 6), noise(&[h], 7) * 0.5, noise(&[batch, h, p, n], 8)]);
    }
    inputs
}

/// The dtypes of [`inputs`].
fn kinds(kind: Kind, with: With) -> Vec<Kind> {
    let dt = if with.exact_dt { Kind::Float } else { kind };
    vec![kind, dt, Kind::Float, kind, kind, Kind::Float, Kind::Float, Kind::Float]
}

fn resets([batch, l, ..]: Sizes, with: With, device: Device) -> Option<Tensor> {
    let index = Tensor::arange(batch * l, (Kind::Int64, device)).view([batch, l]);
    with.resets.map(|every| (index * 7).remainder(every).eq(0))
}

fn args<'a>(t: &'a [Tensor], reset_bl: Option<&'a Tensor>, with: With) -> Ssd<'a> {
    Ssd {
        d_h: t.get(5),
        dt_bias_h: t.get(6),
        initial_state_bhpn: t.get(7),
        reset_bl,
        dt_activation: if with.exact_dt { DtActivation::Identity } else { DtActivation::Softplus },
        ..Ssd::new(&t[0], &t[1], &t[2], &t[3], &t[4])
    }
}

fn pair(out: SsdOutput) -> Vec<Tensor> {
    vec![out.y_blhp, out.final_state_bhpn]
}

/// `x`, `b` and `c` as views of wider rows.
fn layout(t: &[Tensor], with: With) -> Result<Vec<Tensor>> {
    let mut views: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
    match with.strided {
        None => {}
        Some(Place::Odd) => {
            for i in [0, 3, 4] {
                let rows = t[i].flatten(2, 3);
                let pad = rows.narrow(2, 0, 1);
                let wide = Tensor::cat(&[&pad, &rows, &pad, &pad], 2);
                views[i] = wide.narrow(2, 1, rows.size()[2]).unflatten(2, &t[i].size()[2..]);
            }
        }
        Some(Place::Mixer) => {
            let rows = [0, 3, 4].map(|i| t[i].flatten(2, 3));
            // 16 bytes in bf16 in front of all.
            let wide = Tensor::cat(&[&rows[0].narrow(2, 0, 8), &rows[0], &rows[1], &rows[2]], 2);
            let group = &t[3].size()[2..];
            let pieces = split_features(&wide, &[&[8], &t[0].size()[2..], group, group])?;
            for (i, piece) in [0, 3, 4].into_iter().zip(&pieces[1..]) {
                views[i] = piece.shallow_clone();
            }
        }
    }
    Ok(views)
}

fn rule(sizes: Sizes, with: With, kind: Kind, device: Device) -> Result<String> {
    let reset_bl = resets(sizes, with, device);
    let reset_bl = reset_bl.as_ref();
    Rule {
        kernel: &|t| ssd(&args(&layout(t, with)?, reset_bl, with)).map(pair),
        plain: &|t| match t[0].kind() {
            Kind::BFloat16 => bf16_products(&args(t, reset_bl, with)).map(pair),
            _ => reference::ssd_chunked(&args(t, reset_bl, with)).map(pair),
        },
        floor: Rule::floor_of(kind),
    }
    .check(&inputs(sizes, with), &kinds(kind, with), device)
}

fn replays(sizes: Sizes, with: With, kind: Kind, device: Device) -> Result<String> {
    let reset_bl = resets(sizes, with, device);
    let ssd = |t: &[Tensor]| ssd(&args(t, reset_bl.as_ref(), with)).map(pair);
    check_replay(&ssd, &inputs(sizes, with), &kinds(kind, with), device)
}

/// The plain implementation in bf16: the chunked form with the operands of its matrix products in bf16, as libtorch's autocast
/// and every published kernel have them; decays, sums and the state in f32.
fn bf16_products(args: &Ssd) -> Result<SsdOutput> {
    let f32_of = |t: &Tensor| t.to_kind(Kind::Float);
    let product =
        |a: &Tensor, b: &Tensor| f32_of(&a.to_kind(Kind::BFloat16)).matmul(&f32_of(&b.to_kind(Kind::BFloat16)));
    let (batch, seq_len, n_heads, d_head) = args.x_blhp.size4()?;
    let device = args.x_blhp.device();
    let repeats = n_heads / args.b_blgn.size()[2];
    let heads_first = |t: &Tensor| f32_of(t).transpose(1, 2);
    let for_heads = |t: &Tensor| heads_first(&t.repeat_interleave_self_int(repeats, 2, None));
    let (x, b, c) = (heads_first(args.x_blhp), for_heads(args.b_blgn), for_heads(args.c_blgn));
    let mut dt_blh = f32_of(args.dt_blh);
    if let Some(bias) = args.dt_bias_h {
        dt_blh = &dt_blh + bias;
    }
    if args.dt_activation == DtActivation::Softplus {
        dt_blh = dt_blh.softplus();
    }
    let dt = dt_blh.transpose(1, 2);
    let log_decay = &dt * args.a_h.unsqueeze(-1);
    let options = (Kind::Float, device);
    let mut state = args
        .initial_state_bhpn
        .map_or_else(|| Tensor::zeros([batch, n_heads, d_head, b.size()[3]], options), Tensor::shallow_clone);
    let mut y = Vec::new();
    for start in (0..seq_len).step_by(64) {
        let len = (seq_len - start).min(64);
        let part = |t: &Tensor| t.narrow(2, start, len);
        let (x, b, c, log_decay) = (part(&x), part(&b), part(&c), part(&log_decay));
        let input = &x * part(&dt).unsqueeze(-1);
        let causal = Tensor::ones([len, len], (Kind::Bool, device)).tril(0);
        let later = Tensor::ones([len, len], (Kind::Bool, device)).tril(-1);
        let resets = match args.reset_bl {
            Some(reset_bl) => reset_bl.narrow(1, start, len).cumsum(1, Kind::Int64),
            None => Tensor::zeros([batch, len], (Kind::Int64, device)),
        };
        let visible = resets.unsqueeze(2).eq_tensor(&resets.unsqueeze(1)).logical_and(&causal).unsqueeze(1);
        let spread = log_decay.unsqueeze(-1).expand([-1, -1, -1, len], false).masked_fill(&later.logical_not(), 0.);
        let hidden = f64::NEG_INFINITY;
        let decay = spread.cumsum(-2, Kind::Float).masked_fill(&visible.logical_not(), hidden).exp();
        let from_start =
            log_decay.cumsum(-1, Kind::Float).masked_fill(&resets.ne(0).unsqueeze(1), hidden).exp().unsqueeze(-1);
        let scores = product(&c, &b.transpose(-1, -2));
        y.push(product(&(scores * &decay), &input) + product(&c, &state.transpose(-1, -2)) * &from_start);
        let to_end = decay.select(-2, -1).unsqueeze(-1);
        state = from_start.select(-2, -1).unsqueeze(-1) * state + product(&input.transpose(-1, -2), &(b * to_end));
    }
    let mut y_blhp = Tensor::cat(&y, 2).transpose(1, 2);
    if let Some(d_h) = args.d_h {
        y_blhp = &y_blhp + d_h.unsqueeze(-1) * f32_of(args.x_blhp);
    }
    Ok(SsdOutput { y_blhp: y_blhp.to_kind(args.x_blhp.kind()), final_state_bhpn: state })
}

/// Inputs on the device in the dtypes of a call without gradients.
fn on_device(sizes: Sizes, kind: Kind, device: Device) -> Vec<Tensor> {
    let with = With::default();
    inputs(sizes, with).iter().zip(kinds(kind, with)).map(|(t, kind)| t.to_kind(kind).to_device(device)).collect()
}

fn expect(what: &str, holds: bool) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("ssd", format!("{what} does not hold"))) }
}

fn error_of(got: &Tensor, want: &Tensor) -> f64 {
    flowhn_torch::testing::max_rel(got, want)
}

fn steps_equal_the_scan(device: Device) -> Result<String> {
    let mut worst = 0f64;
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
        let sizes = [2, 9, 4, 24, 2, 20];
        let t = on_device(sizes, kind, device);
        let reset_bl = resets(sizes, With { resets: Some(4), ..With::default() }, device);
        let whole = ssd(&args(&t, reset_bl.as_ref(), With::default()))?;
        let mut state_bhpn = t[7].copy();
        for token in 0..9 {
            let at = |i: usize| t[i].select(1, token);
            let reset_b = reset_bl.as_ref().map(|reset_bl| reset_bl.select(1, token));
            let y_bhp = ssd_step(SsdStep {
                x_bhp: &at(0),
                dt_bh: &at(1),
                a_h: &t[2],
                b_bgn: &at(3),
                c_bgn: &at(4),
                d_h: Some(&t[5]),
                dt_bias_h: Some(&t[6]),
                dt_activation: DtActivation::Softplus,
                state_bhpn: &mut state_bhpn,
                reset_b: reset_b.as_ref(),
            })?;
            let error = error_of(&y_bhp, &whole.y_blhp.select(1, token));
            expect(&format!("{kind:?}, token {token}: {error:.1e} within {tolerance:.0e}"), error <= tolerance)?;
            worst = worst.max(error / tolerance);
        }
        let error = error_of(&state_bhpn, &whole.final_state_bhpn);
        expect(&format!("{kind:?}, state: {error:.1e} within {tolerance:.0e}"), error <= tolerance)?;
    }
    Ok(format!("{:.0} % of the tolerance", 100. * worst))
}

fn pieces_equal_the_whole(device: Device) -> Result<String> {
    let mut worst = 0f64;
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
        let sizes = [2, 200, 4, 64, 2, 128];
        let t = on_device(sizes, kind, device);
        let reset_bl = resets(sizes, With { resets: Some(90), ..With::default() }, device);
        let reset_bl = reset_bl.as_ref();
        let whole = ssd(&args(&t, reset_bl, With::default()))?;
        for cut in [1, 63, 64, 150] {
            let run = |start: i64, len: i64, state: &Tensor| {
                let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
                for i in [0, 1, 3, 4] {
                    t[i] = t[i].narrow(1, start, len);
                }
                t[7] = state.shallow_clone();
                let reset_bl = reset_bl.map(|reset_bl| reset_bl.narrow(1, start, len));
                ssd(&args(&t, reset_bl.as_ref(), With::default()))
            };
            let first = run(0, cut, &t[7])?;
            let second = run(cut, 200 - cut, &first.final_state_bhpn)?;
            let y = Tensor::cat(&[first.y_blhp, second.y_blhp], 1);
            let error = error_of(&y, &whole.y_blhp).max(error_of(&second.final_state_bhpn, &whole.final_state_bhpn));
            expect(&format!("{kind:?}, cut at {cut}: {error:.1e} within {tolerance:.0e}"), error <= tolerance)?;
            worst = worst.max(error / tolerance);
        }
    }
    Ok(format!("{:.0} % of the tolerance", 100. * worst))
}

fn extremes_stay_finite(sizes: Sizes, kind: Kind, device: Device) -> Result<String> {
    let with = With::default();
    let rule = Rule {
        kernel: &|t| ssd(&args(t, None, with)).map(pair),
        plain: &|t| match t[0].kind() {
            Kind::BFloat16 => bf16_products(&args(t, None, with)).map(pair),
            _ => reference::ssd_chunked(&args(t, None, with)).map(pair),
        },
        // Gradients of biases add terms of both signs, whose roundings count from the terms, and an exponential far below 0 loses digits to
        // its argument. An H100 was seen to need 3.1 times.
        floor: 4. * Rule::floor_of(kind),
    };
    let mut found = String::new();
    for (dt, a, x) in [(-60., -1., 1.), (-18., -1e-4, 1.), (50., -1e4, 1.), (50., -1e-4, 1e4), (-18., -1e4, 1e6)] {
        let mut t = inputs(sizes, with);
        t[0] = &t[0] * x;
        t[1] = t[1].full_like(dt);
        t[2] = t[2].full_like(a);
        found = rule
            .check_extremes(&t, &kinds(kind, with), device)
            .map_err(|error| Error::invalid("ssd", format!("steps of {dt}, rates of {a}, inputs of {x}: {error}")))?;
    }
    Ok(found)
}

fn causal(device: Device) -> Result<String> {
    for kind in [Kind::BFloat16, Kind::Float] {
        let t = on_device([1, 140, 2, 64, 1, 128], kind, device);
        let before = ssd(&args(&t, None, With::default()))?.y_blhp;
        for token in [1, 15, 16, 64, 139] {
            for i in [0, 1, 3, 4] {
                let changed: Vec<Tensor> = t.iter().map(Tensor::copy).collect();
                let _ = changed[i].select(1, token).fill_(3.);
                let after = ssd(&args(&changed, None, With::default()))?.y_blhp;
                let kept = same_bits(&after.narrow(1, 0, token), &before.narrow(1, 0, token));
                expect(&format!("{kind:?}: what comes before token {token} of input {i} stays"), kept)?;
                expect(&format!("{kind:?}: token {token} of input {i} counts"), !same_bits(&after, &before))?;
            }
        }
    }
    Ok("bit for bit".to_owned())
}

/// Not even by rounding: a document's outputs and gradients have the same bits whatever finite inputs lie before and after it, those among
/// them whose states and scores overflow.
fn documents_stay_apart(device: Device) -> Result<String> {
    for (kind, sizes, first, len) in [
        (Kind::BFloat16, [1, 140, 2, 64, 1, 128], 50, 40),
        (Kind::BFloat16, [1, 140, 2, 24, 1, 20], 50, 40),
        (Kind::Float, [1, 140, 2, 24, 1, 20], 50, 40),
        (Kind::BFloat16, [1, 140, 2, 64, 1, 128], 64, 64),
        (Kind::BFloat16, [1, 140, 4, 128, 2, 256], 70, 65),
    ] {
        let tokens = Tensor::arange(sizes[1], (Kind::Int64, device)).unsqueeze(0);
        let reset_bl = tokens.eq(first).logical_or(&tokens.eq(first + len));
        let run = |t: &[Tensor]| -> Result<Vec<Tensor>> {
            let leaves: Vec<Tensor> = t.iter().map(|t| t.detach().set_requires_grad(true)).collect();
            let y = ssd(&args(&leaves, Some(&reset_bl), With::default()))?.y_blhp;
            let direction = noise(&y.size(), 30).to_kind(y.kind()).to_device(device);
            let loss = (&y * direction).sum(Kind::Float);
            let wanted = [&leaves[0], &leaves[1], &leaves[3], &leaves[4]];
            let grads = Tensor::f_run_backward(&[loss], &wanted, false, false)?;
            Ok(std::iter::once(y).chain(grads).map(|t| t.narrow(1, first, len)).collect())
        };
        let t = on_device(sizes, kind, device);
        let alone = run(&t)?;
        for (factor, initial) in [(2., 3.), (1e38, f64::INFINITY)] {
            let mut changed: Vec<Tensor> = t.iter().map(Tensor::copy).collect();
            for (i, factor) in [(0, factor), (1, 2.), (3, factor), (4, factor)] {
                for (start, len) in [(0, first), (first + len, sizes[1] - first - len)] {
                    let mut part = changed[i].narrow(1, start, len);
                    let other = (noise(&part.size(), 40 + i as i64) * factor).clamp(-3e38, 3e38);
                    part.copy_(&other.to_kind(kind).to_device(device));
                }
            }
            changed[7] = &changed[7] * initial;
            for (name, (before, after)) in ["y", "dx", "d_dt", "db", "dc"].iter().zip(alone.iter().zip(&run(&changed)?))
            {
                let what = format!("{kind:?}, sizes {sizes:?}, others times {factor:e}: {name} has the same bits");
                expect(&what, same_bits(before, after))?;
            }
        }
    }
    Ok("bit for bit".to_owned())
}

fn refusals(device: Device) -> Result<String> {
    let t = on_device([1, 3, 2, 4, 1, 300], Kind::Float, device);
    let wide = ssd(&args(&t, None, With::default()));
    let t: Vec<Tensor> =
        on_device([1, 3, 2, 4, 1, 5], Kind::Float, device).iter().map(|t| t.to_kind(Kind::Double)).collect();
    let double = ssd(&args(&t, None, With::default()));
    let message = |out: Result<SsdOutput>| out.map_or_else(|error| error.to_string(), |_| String::new());
    match device {
        Device::Cpu => expect("the CPU takes both", message(wide).is_empty() && message(double).is_empty())?,
        _ => {
            let (wide, double) = (message(wide), message(double));
            expect(&format!("d_state 300 is refused by name: {wide:?}"), wide.contains("d_state is 300"))?;
            expect(&format!("f64 is refused by name: {double:?}"), double.contains("x_blhp is Double"))?;
        }
    }
    Ok("by name".to_owned())
}
