//! What holds for every plan, routing and balance, whatever the shapes.

use flowhn_split::balance::{Balance, Placement};
use flowhn_split::*;
use proptest::prelude::*;

fn shapes() -> impl Strategy<Value = BlockShape> {
    let attn = (1usize..5, 1usize..5, prop::sample::select(vec![4usize, 8, 24, 64]));
    let ssm = (1usize..5, prop::sample::select(vec![1usize, 8, 16, 128]), 1usize..5, any::<bool>());
    let form = prop::sample::select(vec![
        BlockForm::Released,
        BlockForm::Flow(Fusion::None),
        BlockForm::Flow(Fusion::Proj),
        BlockForm::Flow(Fusion::Gated),
    ]);
    let rest = (1usize..200, 0usize..600, form, any::<bool>());
    (attn, ssm, rest).prop_map(|((kv, group, d_head), (width, d_state, d_conv, mamba1), rest)| {
        let (d_model, d_ff, form, kv_bridge) = rest;
        let d_inner = 64 * width;
        let ssm = if mamba1 {
            let dt_rank = d_model.div_ceil(16);
            SsmShape::Mamba1 { d_inner, d_state, d_conv, dt_rank, inner_norms: true }
        } else {
            SsmShape::Mamba2 { d_inner, d_state, d_conv, d_head: 64, n_groups: 1 }
        };
        let bridge = if kv_bridge { Bridge::Kv } else { Bridge::None };
        let attn = AttnShape { n_heads: kv * group, n_kv_heads: kv, d_head, bridge };
        BlockShape { d_model, attn, ssm, mlp: MlpShape { d_ff }, form, options: BlockOptions::default() }
    })
}

fn settings() -> impl Strategy<Value = SplitSettings> {
    let frac = prop_oneof![
        Just(AttnFrac::Flops),
        Just(AttnFrac::Fixed(0.0)),
        Just(AttnFrac::Fixed(1.0)),
        (0.0..=1.0f64).prop_map(AttnFrac::Fixed),
    ];
    let cycle = prop::option::of((0usize..9, 1usize..9));
    let policy = 0..POLICIES.len();
    (policy, frac, any::<bool>(), any::<bool>(), 1usize..80, 1usize..80, cycle).prop_map(
        |(policy, attn_frac, first, released, tile, chunk_len, cycle)| {
            let policy: Policy = POLICIES[policy].name().parse().unwrap();
            let mut settings = SplitSettings::new(policy);
            settings.released = released && policy.has_released_form();
            if !settings.released {
                settings.attn_frac = attn_frac;
            }
            settings.window = if first { Window::First } else { Window::Last };
            (settings.tile, settings.chunk_len) = (tile, chunk_len);
            settings.cycle = cycle.map(|(attn, period)| Cycle { attn: attn.min(period), period });
            settings
        },
    )
}

fn routing(seq_len: usize, settings: &SplitSettings, shape: BlockShape) -> Routing {
    Routing::new(seq_len, &vec![settings.clone(); 4], &[shape; 4]).unwrap()
}

fn placements() -> impl Strategy<Value = Placement> {
    prop::sample::select(vec![Placement::First, Placement::Last, Placement::Spread])
}

fn counts() -> impl Strategy<Value = ScoreCount> {
    prop::sample::select(vec![ScoreCount::Causal, ScoreCount::Full])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Each position goes to exactly one branch, or in `no_split` to both; order is kept.
    #[test]
    fn plans_cover_every_position(
        settings in settings(), shape in shapes(), trained in 1usize..300, len in 1usize..700,
    ) {
        let routing = routing(trained, &settings, shape);
        let plan = routing.plan(len).unwrap();
        prop_assert_eq!(plan.seq_len(), len);
        for (block_idx, (block, route)) in plan.blocks().iter().zip(routing.blocks()).enumerate() {
            let mut readers = vec![Vec::new(); len];
            for branch in Branch::ALL {
                let positions = block.positions(branch);
                prop_assert!(positions.is_sorted_by(|a, b| a < b));
                prop_assert_eq!(positions.len(), block.tokens(branch));
                prop_assert!(route.sharing().has(branch) || positions.is_empty());
                positions.into_iter().for_each(|pos| readers[pos].push(branch));
            }
            for (pos, readers) in readers.iter().enumerate() {
                let both = route.sharing() == Sharing::Parallel;
                prop_assert_eq!(readers.len(), if both { 2 } else { 1 });
                let owner = block.owner(pos).unwrap();
                prop_assert!(readers.iter().all(|&branch| owner.includes(branch)));
                if !settings.released {
                    prop_assert_eq!(routing.owner(block_idx, pos), Some(owner));
                }
            }
            let spans = block.spans();
            prop_assert_eq!(spans[0].start, 0);
            prop_assert!(spans.iter().all(|span| span.len > 0));
            for pair in spans.windows(2) {
                prop_assert_eq!(pair[0].end(), pair[1].start);
                prop_assert_ne!(pair[0].branch, pair[1].branch);
            }
        }
    }

    /// The same question always has the same answer.
    #[test]
    fn plans_are_pure(settings in settings(), shape in shapes(), len in 1usize..400) {
        let first = routing(len, &settings, shape);
        let second = routing(len, &settings, shape);
        prop_assert_eq!(first.plan(len).unwrap(), second.plan(len).unwrap());
        prop_assert_eq!(first.plan(len).unwrap(), first.plan(len).unwrap());
    }

    /// A prefix routes as the whole does, and beyond the training length the plan repeats.
    #[test]
    fn routing_is_by_absolute_position(
        settings in settings(), shape in shapes(), trained in 1usize..200, len in 1usize..700,
        cut in 0.0..1.0f64,
    ) {
        let routing = routing(trained, &settings, shape);
        let plan = routing.plan(len).unwrap();
        let start = (cut * len as f64) as usize;
        prop_assert_eq!(routing.plan_range(start..len).unwrap(), plan.slice(start..len).unwrap());
        if settings.released {
            return Ok(());
        }
        if start > 0 {
            prop_assert_eq!(routing.plan(start).unwrap(), plan.slice(0..start).unwrap());
        }
        for (block, route) in plan.blocks().iter().zip(routing.blocks()) {
            if route.cycle().is_none() {
                for pos in 0..len {
                    prop_assert_eq!(block.owner(pos), route.trained().owner(pos % trained));
                }
            }
        }
    }

    /// With the cycle fixed, the training length does not matter.
    #[test]
    fn cyclic_plans_do_not_know_the_training_length(
        shape in shapes(), chunk_len in 1usize..80, period in 1usize..9, attn in 0usize..9,
        short in 1usize..400, more in 0usize..400,
    ) {
        let mut settings = SplitSettings::new("cyclic_split".parse().unwrap());
        settings.chunk_len = chunk_len;
        settings.cycle = Some(Cycle { attn: attn.min(period), period });
        let long = short + more;
        let plan = routing(short, &settings, shape).plan(short).unwrap();
        let longer = routing(long, &settings, shape).plan(long).unwrap();
        prop_assert_eq!(plan, longer.slice(0..short).unwrap());
    }

    /// A solved cycle, written into the config, gives the same routing again.
    #[test]
    fn a_solved_cycle_can_be_written_back(shape in shapes(), len in 1usize..2000) {
        let mut settings = SplitSettings::new("cyclic_split".parse().unwrap());
        let solved = routing(len, &settings, shape);
        settings.cycle = solved.cycle();
        let cycle = solved.cycle().unwrap();
        prop_assert!((3..=8).contains(&cycle.period) && cycle.attn > 0 && cycle.attn < cycle.period);
        prop_assert_eq!(routing(len, &settings, shape).plan(len), solved.plan(len));
    }

    /// Bisection finds what trying all finds, before tiling and after.
    #[test]
    fn the_balance_is_the_argmin(
        shape in shapes(), seq_len in 1usize..1500, tile in 1usize..200,
        placement in placements(), count in counts(),
    ) {
        let balance = Balance::new(&shape, seq_len, placement, count);
        let miss = |n: usize| balance.difference(n).abs();
        let best = (0..=seq_len).min_by_key(|&n| miss(n)).unwrap();
        prop_assert_eq!(balance.solve(), best);
        let tiled = balance.solve_tiled(tile);
        if seq_len >= 2 * tile {
            let candidates = (tile..=seq_len - tile).filter(|n| n.is_multiple_of(tile));
            prop_assert_eq!(tiled, candidates.min_by_key(|&n| miss(n)).unwrap());
            prop_assert!(tiled >= tile && seq_len - tiled >= tile);
        } else {
            prop_assert_eq!(tiled, best);
        }
    }

    /// The difference of costs rises, or the bisection would have no ground to stand on.
    #[test]
    fn the_difference_rises(
        shape in shapes(), seq_len in 2usize..3000, at in 0.0..1.0f64,
        placement in placements(), count in counts(),
    ) {
        let balance = Balance::new(&shape, seq_len, placement, count);
        let n = (at * (seq_len - 1) as f64) as usize;
        prop_assert!(balance.difference(n + 1) > balance.difference(n));
    }

    /// n rises with the length and with d_state; its share falls with the length; d_ff pulls it
    /// towards one half.
    #[test]
    fn the_balance_moves_as_the_costs_do(mut shape in shapes(), len in 64usize..4000, d_ff in 1usize..4000) {
        shape.attn.bridge = Bridge::None;
        let solve = |shape: &BlockShape, len| {
            Balance::new(shape, len, Placement::Last, ScoreCount::Causal).solve()
        };
        let n = solve(&shape, len);
        let twice = solve(&shape, 2 * len);
        prop_assert!(twice >= n);
        // Rounding to whole tokens may move each by one.
        prop_assert!(twice <= 2 * n + 2);

        let mut wider = shape;
        match &mut wider.ssm {
            SsmShape::Mamba1 { d_state, .. } | SsmShape::Mamba2 { d_state, .. } => *d_state *= 2,
        }
        prop_assert!(solve(&wider, len) >= n);

        shape.form = BlockForm::Released;
        let mut deeper = shape;
        deeper.mlp.d_ff = shape.mlp.d_ff + d_ff;
        let from_half = |n: usize| (2 * n).abs_diff(len);
        let (before, after) = (from_half(solve(&shape, len)), from_half(solve(&deeper, len)));
        prop_assert!(after <= before.max(1), "{after} > {before}");
    }

    /// The report's parts add up to its whole, and the FLOPs do not depend on how the plan is cut.
    #[test]
    fn reports_add_up(settings in settings(), shape in shapes(), trained in 1usize..300, len in 1usize..600) {
        let routing = routing(trained, &settings, shape);
        let model = ModelShape {
            vocab_size: 100, d_model: shape.d_model, tie_embeddings: false, blocks: vec![shape; 4],
        };
        let report = PlanReport::new(&model, &routing, len, Element::Fp32).unwrap();
        let mut total = report.head;
        for block in &report.blocks {
            let flops = &block.flops;
            total += flops.attn.total + flops.ssm.total + flops.fuse.total + flops.mlp.total;
            prop_assert!(flops.attn.kinds.scores <= block.attn_scores_full);
            prop_assert!(block.imbalance.is_none_or(|imbalance| (0.0..=1.0).contains(&imbalance)));
            let share = block.connected_pairs.unwrap();
            prop_assert!(share > 0.0 && share <= 1.0 + 1e-12);
            let params = &block.parameters;
            prop_assert_eq!(params.total, params.attn + params.ssm + params.fuse + params.mlp);
            let bytes = &block.bytes;
            prop_assert_eq!(bytes.total, bytes.attn + bytes.ssm + bytes.fuse + bytes.mlp);
        }
        prop_assert_eq!(report.flops_per_token.forward.total, total);
        let json = serde_json::to_value(&report).unwrap();
        let mean = json["flops_per_token"]["forward"].as_f64().unwrap();
        prop_assert_eq!((mean * len as f64).round(), total as f64);
    }
}

/// Long sequences are solved by bisection, in no time.
#[test]
fn long_sequences() {
    let shape = BlockShape {
        d_model: 2048,
        attn: AttnShape { n_heads: 32, n_kv_heads: 8, d_head: 64, bridge: Bridge::None },
        ssm: SsmShape::Mamba2 { d_inner: 4096, d_state: 128, d_conv: 4, d_head: 64, n_groups: 1 },
        mlp: MlpShape { d_ff: 5632 },
        form: BlockForm::Released,
        options: BlockOptions::default(),
    };
    for seq_len in [1 << 16, 1 << 20] {
        let balance = Balance::new(&shape, seq_len, Placement::Last, ScoreCount::Causal);
        let n = balance.solve();
        assert!(balance.difference(n - 1).abs() >= balance.difference(n).abs());
        assert!(balance.difference(n + 1).abs() >= balance.difference(n).abs());
        for policy in Policy::all() {
            let settings = SplitSettings::new(policy);
            let routing = Routing::new(seq_len, &[settings], &[shape]).unwrap();
            assert_eq!(routing.plan(seq_len).unwrap().seq_len(), seq_len);
            let far = routing.plan_range(1 << 40..(1 << 40) + 3).unwrap();
            assert_eq!(far.seq_len(), 3, "{policy}");
        }
    }
}
