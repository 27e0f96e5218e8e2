//! Steps of decoding: what a token leaves in the cache and finds there, and the mixer that goes on by steps.

use flowhn_nn::Params;
use flowhn_torch::testing::{Case, Rule, noise};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::attention::formula;
use crate::{
    AttnConfig, AttnContext, AttnInit, AttnMixer, Bridge, Clock, KvCache, Positions, Rope, RotaryTable, decode, rotary,
};

/// Sizes of a step: sequences, cached tokens with the new one, key heads, queries a key head, width of a head.
type Sizes = [i64; 5];

/// Positions that a query sees, positions at the start that it sees too, and whether positions are left out.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    window: Option<usize>,
    n_sinks: usize,
    has_gaps: bool,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |sizes: Sizes, seen: Seen| {
        for kind in [Kind::Float, Kind::BFloat16] {
            let name = format!("decode attention: {sizes:?} {seen:?} {kind:?}");
            cases.push(Case::on_cuda(name, move |device| attends(sizes, seen, kind, device)));
        }
    };
    for n in [1, 2, 31, 64, 127, 1000, 4096, 65_536] {
        add([1, n, 3, 4, 64], Seen::default());
    }
    for (batch, n) in [(8, 1), (8, 127), (8, 1000), (64, 1), (64, 64), (64, 1000)] {
        add([batch, n, 3, 4, 64], Seen::default());
    }
    for (n_kv_heads, ratio) in [(4, 1), (2, 3), (2, 8), (1, 11)] {
        add([2, 131, n_kv_heads, ratio, 64], Seen::default());
    }
    for d_head in [6, 20, 128, 256, 320] {
        add([2, 75, 2, 2, d_head], Seen::default());
    }
    for (window, n_sinks, has_gaps) in [(1, 0, false), (9, 0, true), (9, 5, false), (40, 5, true), (1000, 3, true)] {
        for n in [1, 8, 131] {
            add([2, n, 2, 2, 64], Seen { window: Some(window), n_sinks, has_gaps });
        }
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        for (rope, d_head) in [(true, 64), (true, 6), (false, 64), (false, 5)] {
            let name = format!("decode append: rope {rope}, heads of {d_head}, {kind:?}");
            cases.push(Case::on_cuda(name, move |device| appends(rope, d_head, kind, device)));
        }
    }
    for (name, change) in MIXERS {
        cases.push(Case::new(format!("decode mixer: {name}"), move |device| steps_equal_pieces(change, device)));
    }
    cases
}

/// A cache of these tokens but for the last, with room for it, and numbers in no other place.
fn cache_before(k: &Tensor, v: &Tensor, positions: &[i64]) -> Result<KvCache> {
    let (size, last) = (k.size(), positions.len() - 1);
    let mut cache = KvCache::new();
    let before = |x: &Tensor| x.narrow(1, 0, last as i64);
    cache.append(&before(k), &before(v), &positions[..last], None)?;
    cache.make_room([size[0], size[2], size[3]], k.kind(), k.device())?;
    cache.poison()?;
    Ok(cache)
}

fn attends(sizes: Sizes, seen: Seen, kind: Kind, device: Device) -> Result<String> {
    let [batch, n, n_kv_heads, ratio, d_head] = sizes;
    let gap = |i: i64| if seen.has_gaps { i % 3 + 1 } else { 1 };
    let positions: Vec<i64> = (0..n)
        .scan(-1, |at, i| {
            *at += gap(i);
            Some(*at)
        })
        .collect();
    let last = positions[positions.len() - 1];
    let is_seen =
        |&position: &i64| seen.window.is_none_or(|w| position > last - w as i64 || position < seen.n_sinks as i64);
    let visible: Vec<bool> = positions.iter().map(is_seen).collect();
    let visible = Tensor::from_slice(&visible).view([1, 1, 1, n]).to_device(device);
    // As in the mixer, parts of one projection.
    let q = noise(&[batch, 1, n_kv_heads * ratio + 1, d_head], 1).narrow(2, 1, n_kv_heads * ratio) * 2.;
    let inputs = [q, noise(&[batch, n, n_kv_heads, d_head], 2) * 2., noise(&[batch, n, n_kv_heads, d_head], 3) * 2.];
    let kernel = |x: &[Tensor]| -> Result<Vec<Tensor>> {
        let [q, k, v] = [&x[0], &x[1], &x[2]].map(Tensor::detach);
        let mut cache = cache_before(&k, &v, &positions)?;
        let mut clock = Clock::new(None, device)?;
        clock.move_to(last)?;
        clock.tick()?;
        let new = |x: &Tensor| x.narrow(1, n - 1, 1);
        let q = decode::append(Some(&q), &new(&k), &new(&v), &clock, &mut cache)?;
        let q = q.ok_or_else(|| Error::invalid("decode", "the queries were lost"))?;
        Ok(vec![decode::attend(&q, &cache, seen.window, seen.n_sinks)?])
    };
    let plain = |x: &[Tensor]| Ok(vec![formula(&x[0], &x[1], &x[2], &visible)]);
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check_at_scale(1., &inputs, &[kind; 3], device)
}

/// Tokens that come one by one past the cache's first room are those that operators turn and copy.
fn appends(rope: bool, d_head: i64, kind: Kind, device: Device) -> Result<String> {
    const START: i64 = 100_000;
    let (batch, n_kv_heads, n_heads, n) = (3, 2, 6, 70);
    let part = |heads, seed| (noise(&[batch, n, heads, d_head], seed) * 2.).to_kind(kind).to_device(device);
    let (q, k, v) = (part(n_heads, 1), part(n_kv_heads, 2), part(n_kv_heads, 3));
    let positions: Vec<i64> = (0..n).map(|i| START + i + i / 9).collect();
    let theta = 10_000.;
    let mut clock = Clock::new(rope.then_some((d_head, Rope::new(theta))), device)?;
    let mut cache = KvCache::new();
    let mut turned_q = Vec::new();
    for (i, &position) in (0..n).zip(&positions) {
        let token = |x: &Tensor| x.narrow(1, i, 1);
        cache.make_room([batch, n_kv_heads, d_head], kind, device)?;
        cache.poison()?;
        clock.move_to(position)?;
        clock.tick()?;
        turned_q.extend(decode::append(Some(&token(&q)), &token(&k), &token(&v), &clock, &mut cache)?);
    }
    let table = RotaryTable::new(&positions, if rope { d_head } else { 2 }, theta, device)?;
    let turned = |x: &Tensor| if rope { rotary(x, &table) } else { Ok(x.shallow_clone()) };
    let cached = |x: Option<Tensor>| x.ok_or_else(|| Error::invalid("decode", "the cache is empty"));
    let [keys, values] = [cached(cache.keys()?)?, cached(cache.values()?)?];
    // A rotation rounds twice before it rounds to the type.
    let allowed = if kind == Kind::BFloat16 { 1.6e-2 } else { 1e-6 };
    for (name, got, want, allowed) in [
        ("keys", &keys, turned(&k)?, if rope { allowed } else { 0. }),
        ("queries", &Tensor::cat(&turned_q, 1), turned(&q)?, if rope { allowed } else { 0. }),
        ("values", &values, v.shallow_clone(), 0.),
    ] {
        let off = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
        if !(off <= allowed && got.size() == want.size()) {
            return Err(Error::invalid("decode", format!("{name} of {:?} are off by {off:.2e}", got.size())));
        }
    }
    let counted = &cache.step_room()?.counted;
    let on_device = Vec::<i64>::try_from(counted.positions.narrow(0, 0, n))?;
    let count = Vec::<i32>::try_from(&counted.count)?;
    match on_device == positions && cache.positions().is_some_and(|p| p.host() == positions) && count == [n as i32, 0] {
        true => Ok(format!("{n} tokens")),
        false => Err(Error::invalid("decode", format!("the device counts {count:?}, at positions {on_device:?}"))),
    }
}

/// A mixer, by what is not plain about it.
type Change = fn(AttnConfig) -> AttnConfig;

const ROPE: Option<Rope> = Some(Rope::new(10_000.));

const MIXERS: [(&str, Change); 5] = [
    ("plain", |config| config),
    ("rotary", |config| AttnConfig { rope: ROPE, ..config }),
    ("bridge", |config| AttnConfig { rope: ROPE, bridge: Bridge::Kv, ..config }),
    ("window, sinks and biases", |config| AttnConfig { rope: ROPE, window: Some(5), n_sinks: 2, bias: true, ..config }),
    ("out norm", |config| AttnConfig { out_norm_eps: Some(1e-6), ..config }),
];

/// Feeds a mixer by steps, and by pieces with positions; over a bridge every third token has no query.
fn steps_equal_pieces(change: Change, device: Device) -> Result<String> {
    let (batch, n, d_model) = (2, 80, 24);
    let config = change(AttnConfig::new(d_model, 6, 2, 8));
    let mut params = Params::new(device, 0);
    let mixer = AttnMixer::new(&mut params.root(), config, AttnInit::normal(0.3))?;
    let x = noise(&[batch, n, d_model], 1).to_kind(Kind::Float).to_device(device);
    let mut clock = Clock::new(config.rope.map(|rope| (config.d_head, rope)), device)?;
    let (mut by_steps, mut by_pieces) = (KvCache::new(), KvCache::new());
    let mut worst = 0f64;
    for i in 0..n {
        let (x, position) = (x.narrow(1, i, 1), 2 * i + 3);
        let positions = Positions::new(&[position], device)?;
        let is_bridge = config.bridge == Bridge::Kv;
        clock.move_to(position)?;
        if device.is_cuda() {
            mixer.make_room(&mut by_steps, batch, Kind::Float, device)?;
        }
        clock.tick()?;
        if is_bridge && i % 3 == 2 {
            mixer.step_source(&x, &clock, &mut by_steps)?;
            mixer.append_source(&x, &positions, None, &mut by_pieces)?;
            continue;
        }
        let ctx = AttnContext { source_positions: is_bridge.then_some(&positions), ..AttnContext::new(&positions) };
        let source = is_bridge.then_some(&x);
        let got = tch::no_grad(|| mixer.step(&x, source, &clock, &mut by_steps))?;
        let want = tch::no_grad(|| mixer.forward(&x, source, &ctx, Some(&mut by_pieces)))?;
        worst = worst.max((got - &want).abs().max().double_value(&[]) / want.abs().max().double_value(&[]));
    }
    // Written so that NaN fails.
    match worst <= 1e-5 {
        true => Ok(format!("{worst:.0e}")),
        false => Err(Error::invalid("decode", format!("a step is off by {worst:.2e}"))),
    }
}
