//! The causal convolution against its plain formula.

use flowhn_torch::testing::{Case, Rule, check_replay, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{
    Activation, CausalConv1d, CausalConv1dOutput, CausalConv1dStep, causal_conv1d, causal_conv1d_step, reference,
};

const BATCH: i64 = 2;

/// One set of arguments.
#[derive(Clone, Copy, Debug)]
struct Setting {
    batch: i64,
    seq_len: i64,
    channels: i64,
    d_conv: i64,
    activation: Activation,
    /// Whether there are bias and initial state.
    optional: bool,
    /// One token in so many is a reset; 0 for no mask.
    reset_every: i64,
    /// Where the channels begin in a wider tensor, and how many follow them there.
    around: [i64; 2],
    kind: Kind,
}

impl Setting {
    fn new(kind: Kind) -> Self {
        let activation = Activation::Silu;
        let (batch, seq_len, channels) = (BATCH, 37, 72);
        Self { batch, seq_len, channels, d_conv: 4, activation, optional: true, reset_every: 0, around: [0, 0], kind }
    }

    fn name(&self) -> String {
        let Self { batch, seq_len, channels, d_conv, activation, optional, reset_every, around, kind } = self;
        let mut name = format!("causal_conv1d: {kind:?}, {seq_len} tokens x {channels}, {d_conv} taps, {activation:?}");
        if *batch != BATCH {
            name.push_str(&format!(", batch {batch}"));
        }
        if !optional {
            name.push_str(", neither bias nor initial state");
        }
        if *reset_every > 0 {
            name.push_str(&format!(", a reset in {reset_every}"));
        }
        if *around != [0, 0] {
            name.push_str(&format!(", channels {} to {} of wider rows", around[0], around[0] + channels));
        }
        name
    }

    /// The input in its wider rows, taps, then bias and initial state, then the resets.
    fn inputs(&self) -> Vec<Tensor> {
        let Self { batch, seq_len, channels, d_conv, around: [before, after], .. } = *self;
        let mut inputs =
            vec![noise(&[batch, seq_len, before + channels + after], 1) * 2., noise(&[channels, d_conv], 2)];
        if self.optional {
            inputs.extend([noise(&[channels], 3), noise(&[batch, d_conv - 1, channels], 4)]);
        }
        if self.reset_every > 0 {
            inputs.push(noise(&[batch, seq_len], 5).lt(2. / self.reset_every as f64 - 1.));
        }
        inputs
    }

    fn run(&self, op: fn(&CausalConv1d) -> Result<CausalConv1dOutput>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x_ble = inputs[0].narrow(2, self.around[0], self.channels);
        let out = op(&CausalConv1d {
            bias_e: inputs.get(2).filter(|_| self.optional),
            initial_state_bje: inputs.get(3).filter(|_| self.optional),
            reset_bl: inputs.last().filter(|_| self.reset_every > 0),
            activation: self.activation,
            ..CausalConv1d::new(&x_ble, &inputs[1])
        })?;
        Ok(vec![out.y_ble, out.final_state_bje])
    }

    /// The dtypes of so many inputs.
    fn kinds(&self, n_inputs: usize) -> Vec<Kind> {
        let mut kinds = vec![Kind::Float; n_inputs];
        kinds[0] = self.kind;
        kinds
    }

    fn check(&self, device: Device) -> Result<String> {
        let inputs = self.inputs();
        let rule = Rule {
            kernel: &|inputs| self.run(causal_conv1d, inputs),
            plain: &|inputs| self.run(reference::causal_conv1d, inputs),
            floor: Rule::floor_of(self.kind),
        };
        rule.check(&inputs, &self.kinds(inputs.len()), device)
    }

    /// Sums far from zero on either side, where the sigmoid is 0 or 1 and its exponential too large for f32.
    fn check_extremes(&self, device: Device) -> Result<String> {
        let rule = Rule {
            kernel: &|inputs| self.run(causal_conv1d, inputs),
            plain: &|inputs| self.run(reference::causal_conv1d, inputs),
            floor: Rule::floor_of(self.kind),
        };
        let mut found = String::new();
        for size in [1e-30, 100., 1e4, 1e18, 1e30] {
            let mut inputs = self.inputs();
            inputs[0] = &inputs[0] * size;
            found = rule.check_extremes(&inputs, &self.kinds(inputs.len()), device)?;
        }
        Ok(found)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut settings = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        let plain = Setting::new(kind);
        for (i, seq_len) in [1, 2, 3, 31, 64, 127, 1000].into_iter().enumerate() {
            settings.push(Setting { seq_len, reset_every: if i % 2 == 0 { 5 } else { 0 }, ..plain });
        }
        for d_conv in [1, 2, 4, 7] {
            settings.push(Setting { d_conv, channels: 67, ..plain });
            settings.push(Setting { d_conv, reset_every: 4, ..plain });
            settings.push(Setting { d_conv, seq_len: 2, reset_every: 2, ..plain });
        }
        settings.push(Setting { activation: Activation::None, optional: false, seq_len: 130, channels: 6, ..plain });
        settings.push(Setting { optional: false, reset_every: 9, seq_len: 300, channels: 264, ..plain });
        for around in [[8, 24], [4, 20], [2, 22], [1, 3]] {
            settings.push(Setting { around, seq_len: 140, channels: 136, ..plain });
        }
        settings.push(Setting { batch: 8, seq_len: 1000, channels: 40, reset_every: 301, ..plain });
        settings.push(Setting { batch: 8, seq_len: 4096, channels: 24, around: [8, 24], ..plain });
    }
    let mut cases: Vec<Case> =
        settings.into_iter().map(|setting| Case::new(setting.name(), move |device| setting.check(device))).collect();
    for kind in [Kind::Float, Kind::BFloat16] {
        let setting = Setting::new(kind);
        let name = format!("causal_conv1d: extreme sums stay finite, {kind:?}");
        cases.push(Case::new(name, move |device| setting.check_extremes(device)));
        let name = format!("causal_conv1d: replayed from a CUDA graph, {kind:?}");
        cases.push(Case::on_cuda(name, move |device| {
            let setting = Setting { reset_every: 5, ..setting };
            let inputs = setting.inputs();
            check_replay(&|inputs| setting.run(causal_conv1d, inputs), &inputs, &setting.kinds(inputs.len()), device)
        }));
    }
    cases.push(Case::new("causal_conv1d: steps equal the whole", steps_equal_the_whole));
    cases.push(Case::new("causal_conv1d: no tokens hand the state through", no_tokens));
    cases
}

fn steps_equal_the_whole(device: Device) -> Result<String> {
    let setting = Setting { seq_len: 9, reset_every: 4, ..Setting::new(Kind::Float) };
    let t: Vec<Tensor> = setting.inputs().iter().map(|t| in_float(t).to_device(device)).collect();
    let whole = setting.run(causal_conv1d, &t)?;
    let mut state_bje = t[3].copy();
    for token in 0..setting.seq_len {
        let y_be = causal_conv1d_step(CausalConv1dStep {
            x_be: &t[0].select(1, token),
            weight_ek: &t[1],
            bias_e: Some(&t[2]),
            activation: setting.activation,
            state_bje: &mut state_bje,
            reset_b: Some(&t[4].select(1, token)),
        })?;
        expect(same_bits(&y_be, &whole[0].select(1, token)), &format!("token {token} differs"))?;
    }
    expect(same_bits(&state_bje, &whole[1]), "the final state differs")?;
    Ok("bit for bit".to_owned())
}

fn no_tokens(device: Device) -> Result<String> {
    let setting = Setting { seq_len: 0, ..Setting::new(Kind::Float) };
    let t: Vec<Tensor> = setting.inputs().iter().map(|t| in_float(t).to_device(device)).collect();
    let out = setting.run(causal_conv1d, &t)?;
    expect(out[0].size() == [BATCH, 0, setting.channels], "the output has a wrong shape")?;
    expect(same_bits(&out[1], &t[3]), "the state changed")?;
    Ok("the state came back".to_owned())
}

fn in_float(t: &Tensor) -> Tensor {
    if t.is_floating_point() { t.to_kind(Kind::Float) } else { t.shallow_clone() }
}

fn expect(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("causal_conv1d", otherwise)) }
}
