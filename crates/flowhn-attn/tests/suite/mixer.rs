//! The mixer: its formula, its weights, and decoding in pieces.

use tch::{Device, Kind, Tensor};

use crate::common::{leaf, noise, pick};
use flowhn_attn::{
    AttnConfig, AttnContext, AttnInit, AttnMixer, Bridge, Clock, KvCache, Mask, Positions, Rope, attention, rotary,
};
use flowhn_nn::Params;
use flowhn_torch::testing::{assert_close, gradcheck};

const D: i64 = 12;

fn configs() -> Vec<AttnConfig> {
    let mut configs = Vec::new();
    for bridge in [Bridge::None, Bridge::Kv] {
        for rope in [None, Some(Rope::new(10000.))] {
            for window in [None, Some(6)] {
                for (n_heads, n_kv_heads, d_head) in [(4, 2, 8), (3, 1, 6)] {
                    let sizes = AttnConfig::new(D, n_heads, n_kv_heads, d_head);
                    configs.push(AttnConfig { rope, bridge, window, ..sizes });
                }
            }
        }
    }
    configs
}

fn new(config: AttnConfig) -> (Params, AttnMixer) {
    let mut params = Params::new(Device::Cpu, 5);
    let mixer = AttnMixer::new(&mut params.root().push("attn"), config, AttnInit::normal(0.3)).unwrap();
    (params, mixer)
}

fn positions(host: &[i64]) -> Positions {
    Positions::new(host, Device::Cpu).unwrap()
}

/// A name, and which positions attention reads.
type Routing = (&'static str, fn(i64) -> bool);

/// A sequence of which attention reads some tokens.
struct Sequence {
    x_bld: Tensor,
    segments_bl: Option<Tensor>,
    /// Sorted.
    routed: Vec<i64>,
}

impl Sequence {
    fn new(len: i64, routed: impl Fn(i64) -> bool, packed: bool, kind: Kind) -> Self {
        let segments: Vec<i64> = (0..2 * len).map(|i| (i % len + 3 * (i / len)) / 11).collect();
        Self {
            x_bld: noise(&[2, len, D], 1, kind),
            segments_bl: packed.then(|| Tensor::from_slice(&segments).view([2, len])),
            routed: (0..len).filter(|&i| routed(i)).collect(),
        }
    }

    /// What the mixer does with the tokens `start..end`, and how many of them are routed.
    fn piece(&self, mixer: &AttnMixer, start: i64, end: i64, cache: Option<&mut KvCache>) -> (Tensor, i64) {
        let routed: Vec<i64> = self.routed.iter().copied().filter(|i| (start..end).contains(i)).collect();
        let index = Tensor::from_slice(&routed);
        let (window, all) = (positions(&routed), Positions::range(start..end, Device::Cpu).unwrap());
        let source_bmd = self.x_bld.narrow(1, start, end - start);
        let segments = self.segments_bl.as_ref();
        let (q_segments, k_segments) =
            (segments.map(|s| s.index_select(1, &index)), segments.map(|s| s.narrow(1, start, end - start)));
        let bridge = mixer.config().bridge == Bridge::Kv;
        let mut ctx = AttnContext::new(&window);
        if bridge {
            ctx = ctx.with_source(&all);
        }
        if let Some(q_segments) = &q_segments {
            ctx = ctx.with_segments(q_segments, k_segments.as_ref().filter(|_| bridge));
        }
        let x_bnd = self.x_bld.index_select(1, &index);
        let y = mixer.forward(&x_bnd, bridge.then_some(&source_bmd), &ctx, cache).unwrap();
        (y, routed.len() as i64)
    }
}

#[test]
fn pieces_of_any_size_give_what_the_whole_gives() {
    let routings: [Routing; 4] = [
        ("all", |_| true),
        ("chunks", |i| i / 4 % 2 == 1),
        ("a window in the middle", |i| (10..30).contains(&i)),
        ("every third", |i| i % 3 == 2),
    ];
    for config in configs() {
        let (_params, mixer) = new(config);
        for (name, routed) in routings {
            for packed in [false, true] {
                let sequence = Sequence::new(33, routed, packed, Kind::Float);
                let (whole, _) = sequence.piece(&mixer, 0, 33, None);
                for seed in 0..2 {
                    // The first goes token by token, the second in pieces of any size.
                    let mut cache = KvCache::new();
                    let (mut start, mut seen) = (0, 0);
                    while start < 33 {
                        let longest = if seed == 0 { 1 } else { 15 };
                        let end = (start + 1 + pick(100 * seed + start as u64, longest) as i64).min(33);
                        let (part, n) = sequence.piece(&mixer, start, end, Some(&mut cache));
                        let label = format!("{config:?}, {name}, packed {packed}, tokens {start}..{end}");
                        if n > 0 {
                            assert_close(&label, &part, &whole.narrow(1, seen, n), 1e-5);
                        }
                        (start, seen) = (end, seen + n);
                        let cached = if config.bridge == Bridge::Kv { start } else { seen };
                        assert_eq!(cache.len() as i64, cached, "{label}");
                    }
                }
            }
        }
    }
}

#[test]
fn tokens_routed_elsewhere_reach_the_cache_of_a_bridge() {
    let config = AttnConfig { bridge: Bridge::Kv, ..configs()[0] };
    let (_params, mixer) = new(config);
    let sequence = Sequence::new(9, |i| i == 8, false, Kind::Float);
    let (whole, _) = sequence.piece(&mixer, 0, 9, None);
    let mut cache = KvCache::new();
    let source_bmd = sequence.x_bld.narrow(1, 0, 8);
    mixer.append_source(&source_bmd, &Positions::range(0..8, Device::Cpu).unwrap(), None, &mut cache).unwrap();
    assert_eq!(cache.len(), 8);
    let (last, _) = sequence.piece(&mixer, 8, 9, Some(&mut cache));
    assert_close("the ninth token", &last, &whole, 1e-5);

    let (_params, plain) = new(configs()[0]);
    let mut untouched = KvCache::new();
    plain.append_source(&source_bmd, &Positions::range(0..8, Device::Cpu).unwrap(), None, &mut untouched).unwrap();
    assert!(untouched.is_empty(), "without a bridge the source is not read");
}

#[test]
fn weights_have_their_rows_in_the_order_queries_keys_values() {
    let config = AttnConfig { rope: Some(Rope::new(100.)), ..configs()[0] };
    let AttnConfig { n_heads: h, n_kv_heads: k, d_head: p, .. } = config;
    let at = positions(&[2, 3, 7, 11, 12]);
    let x = noise(&[2, 5, D], 2, Kind::Float);
    let reference = |qkv: &Tensor, o: &Tensor| {
        let heads = |start: i64, n: i64| x.linear::<Tensor>(&qkv.narrow(0, start * p, n * p), None).view([2, 5, n, p]);
        let turned = |x: Tensor| rotary(&x, &at.rotary_table(p, 100.).unwrap()).unwrap();
        let out = attention(&turned(heads(0, h)), &turned(heads(h, k)), &heads(h + k, k), &Mask::causal()).unwrap();
        out.reshape([2, 5, h * p]).linear::<Tensor>(o, None)
    };
    let weight = |params: &Params, name: &str| params.get(name).unwrap().weight.master().detach();

    let (params, mixer) = new(config);
    let (qkv, o) = (weight(&params, "attn.qkv_proj.weight"), weight(&params, "attn.o_proj.weight"));
    assert_eq!((qkv.size(), o.size()), (vec![(h + 2 * k) * p, D], vec![D, h * p]));
    let y = mixer.forward(&x, None, &AttnContext::new(&at), None).unwrap();
    assert_close("merged", &y, &reference(&qkv, &o), 1e-5);

    // Through a bridge whose source is the window itself, the same weights give the same tokens.
    let (params, bridge) = new(AttnConfig { bridge: Bridge::Kv, ..config });
    params.assign("attn.q_proj.weight", &qkv.narrow(0, 0, h * p)).unwrap();
    params.assign("attn.kv_proj.weight", &qkv.narrow(0, h * p, 2 * k * p)).unwrap();
    params.assign("attn.o_proj.weight", &o).unwrap();
    let through = bridge.forward(&x, Some(&x), &AttnContext::new(&at).with_source(&at), None).unwrap();
    assert_close("bridge", &through, &y, 1e-5);
}

#[test]
fn only_distances_matter_where_rotary_is_on() {
    let config = AttnConfig { rope: Some(Rope::new(10000.)), ..configs()[0] };
    let (_params, mixer) = new(config);
    let x = noise(&[2, 4, D], 3, Kind::Float);
    let at = |offset: i64, gap: i64| {
        let at = positions(&[offset, offset + 1, offset + 2, offset + 2 + gap]);
        mixer.forward(&x, None, &AttnContext::new(&at), None).unwrap()
    };
    assert_close("moved by 5000", &at(5000, 1), &at(0, 1), 1e-4);
    let apart = (at(0, 9) - at(0, 1)).abs().max().double_value(&[]);
    assert!(apart > 1e-3, "a gap between tokens shows: {apart}");
}

#[test]
fn gradients_match_finite_differences() {
    for config in configs() {
        let (params, mixer) = new(config);
        let bridge = config.bridge == Bridge::Kv;
        let (window, all) = (positions(&[1, 2, 5]), Positions::range(0..6, Device::Cpu).unwrap());
        let run = |inputs: &[Tensor]| {
            let mut ctx = AttnContext::new(&window);
            if bridge {
                ctx = ctx.with_source(&all);
            }
            mixer.forward(inputs[0].index_select(1, &window.tensor()?), bridge.then_some(&inputs[0]), &ctx, None)
        };
        let x = leaf(&noise(&[1, 6, D], 4, Kind::Double));
        gradcheck(run, &[x.shallow_clone()], 1e-5, 1e-6).unwrap_or_else(|error| panic!("{config:?}: {error}"));

        run(&[x]).unwrap().square().sum(Kind::Double).backward();
        for param in &params {
            let grad = param.weight.master().grad();
            assert!(grad.defined() && grad.abs().max().double_value(&[]) > 0., "{} learns nothing", param.name);
        }
    }
}

#[test]
fn bf16_follows_f32() {
    for config in configs() {
        let (_params, mixer) = new(config);
        let run = |kind| Sequence::new(41, |i| i % 2 == 0, true, kind).piece(&mixer, 0, 41, None).0;
        let (half, full) = (run(Kind::BFloat16), run(Kind::Float));
        assert_eq!(half.kind(), Kind::BFloat16);
        assert_close(&format!("{config:?}"), &half, &full, 4e-2);
    }
}

#[test]
fn a_window_may_be_empty() {
    for config in configs() {
        let (_params, mixer) = new(config);
        let sequence = Sequence::new(5, |_| false, false, Kind::Float);
        assert_eq!(sequence.piece(&mixer, 0, 5, None).0.size(), [2, 0, D]);
        let mut cache = KvCache::new();
        assert_eq!(sequence.piece(&mixer, 0, 5, Some(&mut cache)).0.size(), [2, 0, D]);
        assert_eq!(cache.len(), if config.bridge == Bridge::Kv { 5 } else { 0 });
    }
}

#[test]
fn mistakes_are_named() {
    let base = configs()[0];
    let bad = |config: AttnConfig| {
        let mut params = Params::new(Device::Cpu, 0);
        AttnMixer::new(&mut params.root(), config, AttnInit::normal(0.1)).unwrap_err().to_string()
    };
    assert!(bad(AttnConfig { n_kv_heads: 3, ..base }).contains("n_heads 4 is not a multiple of n_kv_heads 3"));
    assert!(bad(AttnConfig { d_head: 0, ..base }).contains("must all be positive"));
    assert!(bad(AttnConfig { d_head: 7, rope: Some(Rope::new(1e4)), ..base }).contains("needs an even one"));
    assert!(bad(AttnConfig { rope: Some(Rope::new(-1.)), ..base }).contains("theta is -1"));
    assert!(bad(AttnConfig { window: Some(0), ..base }).contains("window of 0"));

    let at = positions(&[0, 1, 2]);
    let (x, segments) = (noise(&[2, 3, D], 0, Kind::Float), Tensor::zeros([2, 3], (Kind::Int64, Device::Cpu)));
    let (_params, plain) = new(base);
    let ctx = AttnContext::new(&at);
    let message = |result: flowhn_attn::Result<Tensor>| result.unwrap_err().to_string();
    assert!(
        message(plain.forward(x.narrow(2, 0, 5), None, &ctx, None))
            .contains("x_bnd has shape [2, 3, 5], expected [2, 3, 12]")
    );
    assert!(message(plain.forward(x.narrow(1, 0, 2), None, &ctx, None)).contains("expected [2, 3, 12]"));
    assert!(message(plain.forward(&x, Some(&x), &ctx, None)).contains("only a mixer with a kv bridge"));
    let (_params, bridge) = new(AttnConfig { bridge: Bridge::Kv, ..base });
    assert!(message(bridge.forward(&x, None, &ctx, None)).contains("needs the source tokens and their positions"));
    assert!(message(bridge.forward(&x, Some(&x), &ctx, None)).contains("needs the source tokens and their positions"));
    let with_source = ctx.with_source(&at);
    assert!(
        message(bridge.forward(&x, Some(&x.narrow(1, 0, 2)), &with_source, None))
            .contains("source_bmd has shape [2, 2, 12]")
    );
    let half = with_source.with_segments(&segments, None);
    assert!(message(bridge.forward(&x, Some(&x), &half, None)).contains("segments must be given"));
    let mut cache = KvCache::new();
    assert!(plain.forward(&x, None, &ctx, Some(&mut cache)).is_ok());
    assert!(message(plain.forward(&x, None, &ctx, Some(&mut cache))).contains("0 comes after 2"));
}

#[test]
fn a_clock_of_other_angles_is_refused() {
    let sizes = AttnConfig::new(D, 4, 2, 8);
    let turning = AttnConfig { rope: Some(Rope::new(10000.)), ..sizes };
    let x = noise(&[2, 1, D], 3, Kind::Float);
    for (config, fitting) in [(sizes, None), (turning, Some((8, 10000.)))] {
        let (_params, mixer) = new(config);
        for rope in [None, Some((8, 10000.)), Some((6, 10000.)), Some((8, 500.))] {
            let outcome = mixer.step(
                &x,
                None,
                &Clock::new(rope.map(|(d_head, theta)| (d_head, Rope::new(theta))), Device::Cpu).unwrap(),
                &mut KvCache::new(),
            );
            match rope == fitting {
                true => assert_eq!(outcome.unwrap().size(), [2, 1, D]),
                false => assert!(outcome.unwrap_err().to_string().contains("the clock is for"), "{rope:?}"),
            }
        }
    }
}
