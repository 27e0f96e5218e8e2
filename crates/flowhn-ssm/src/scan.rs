//! The selective scan of Mamba-1: a diagonal linear recurrence whose decay and input depend on the token.
// b batch, l seq_len, e d_inner, n d_state

use flowhn_torch::{Result, catch};
use tch::{Device, Tensor};

use crate::args::{Carry, Checker, check_sizes};
use crate::{cpu, cuda, reference};

/// How the step sizes are made from `dt_ble`, after the bias is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DtActivation {
    /// `ln(1 + exp(dt))`, as in Mamba.
    #[default]
    Softplus,
    /// The values are step sizes already.
    Identity,
}

/// Arguments of [`selective_scan`]. [`SelectiveScan::new`] fills the optional ones.
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScan<'a> {
    /// Input `[batch, seq_len, d_inner]`, bf16, f32 or f64.
    pub x_ble: &'a Tensor,
    /// Step sizes before bias and activation, `[batch, seq_len, d_inner]`, in the dtype of `x_ble` or f32.
    pub dt_ble: &'a Tensor,
    /// Decay rates `[d_inner, d_state]`, negative, f32 (f64 with f64 inputs).
    pub a_en: &'a Tensor,
    /// Input projections `[batch, seq_len, d_state]`, in the dtype of `x_ble` or f32.
    pub b_bln: &'a Tensor,
    /// Output projections `[batch, seq_len, d_state]`, in the dtype of `x_ble` or f32.
    pub c_bln: &'a Tensor,
    /// Skip weights `[d_inner]`, f32 (f64 with f64 inputs): adds `d x` to the output.
    pub d_e: Option<&'a Tensor>,
    /// Gate `[batch, seq_len, d_inner]`, in the dtype of `x_ble` or f32: multiplies the output by `silu(z)`.
    pub z_ble: Option<&'a Tensor>,
    /// Added to `dt_ble` before the activation, `[d_inner]`, f32 (f64 with f64 inputs).
    pub dt_bias_e: Option<&'a Tensor>,
    /// What turns `dt_ble` into step sizes.
    pub dt_activation: DtActivation,
    /// State before the first token, `[batch, d_inner, d_state]`, f32 (f64 with f64 inputs); zero if absent.
    pub initial_state_ben: Option<&'a Tensor>,
    /// bool `[batch, seq_len]`: true clears the state before that token, as at the start of a packed document.
    pub reset_bl: Option<&'a Tensor>,
}

impl<'a> SelectiveScan<'a> {
    /// The arguments that every scan has; softplus on `dt_ble`, nothing else.
    pub fn new(x_ble: &'a Tensor, dt_ble: &'a Tensor, a_en: &'a Tensor, b_bln: &'a Tensor, c_bln: &'a Tensor) -> Self {
        Self {
            x_ble,
            dt_ble,
            a_en,
            b_bln,
            c_bln,
            d_e: None,
            z_ble: None,
            dt_bias_e: None,
            dt_activation: DtActivation::Softplus,
            initial_state_ben: None,
            reset_bl: None,
        }
    }
}

/// What [`selective_scan`] returns.
#[derive(Debug)]
pub struct SelectiveScanOutput {
    /// Output `[batch, seq_len, d_inner]`, in the dtype of the input.
    pub y_ble: Tensor,
    /// State after the last token, `[batch, d_inner, d_state]`, f32 (f64 with f64 inputs).
    pub final_state_ben: Tensor,
}

/// Runs the recurrence of Mamba-1 (Gu and Dao, arXiv 2312.00752, algorithm 2) over whole sequences:
///
/// ```text
/// dt_t = softplus(dt_t + dt_bias)
/// h_t  = exp(dt_t a) h_{t-1} + dt_t b_t x_t
/// y_t  = (c_t h_t + d x_t) silu(z_t)
/// ```
///
/// The state and all sums are f32 for bf16 and f32 inputs, f64 for f64 inputs. Every floating-point argument is differentiable,
/// the initial state included, through the output and through the final state. A reset at position 0 discards the initial state.
///
/// ```
/// use flowhn_ssm::{SelectiveScan, selective_scan};
/// use tch::{Device, Kind, Tensor};
///
/// let f32_cpu = (Kind::Float, Device::Cpu);
/// let (x, dt) = (Tensor::randn([2, 7, 6], f32_cpu), Tensor::randn([2, 7, 6], f32_cpu));
/// let (b, c) = (Tensor::randn([2, 7, 4], f32_cpu), Tensor::randn([2, 7, 4], f32_cpu));
/// let a = -Tensor::rand([6, 4], f32_cpu);
/// let whole = selective_scan(&SelectiveScan::new(&x, &dt, &a, &b, &c))?;
///
/// // Scanning in two pieces gives the same outputs.
/// let piece = |t: &Tensor, start, len| t.narrow(1, start, len);
/// let (x0, dt0, b0, c0) = (piece(&x, 0, 3), piece(&dt, 0, 3), piece(&b, 0, 3), piece(&c, 0, 3));
/// let (x1, dt1, b1, c1) = (piece(&x, 3, 4), piece(&dt, 3, 4), piece(&b, 3, 4), piece(&c, 3, 4));
/// let first = selective_scan(&SelectiveScan::new(&x0, &dt0, &a, &b0, &c0))?;
/// let second = selective_scan(&SelectiveScan {
///     initial_state_ben: Some(&first.final_state_ben),
///     ..SelectiveScan::new(&x1, &dt1, &a, &b1, &c1)
/// })?;
/// let pieces = Tensor::cat(&[first.y_ble, second.y_ble], 1);
/// assert!((pieces - whole.y_ble).abs().max().double_value(&[]) < 1e-5);
/// # Ok::<(), flowhn_ssm::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype) or [`Error::Device`](crate::Error::Device), naming
/// the argument at fault; `Error::Device` also on a device other than the CPU and CUDA. On CUDA, `Error::Dtype` for f64 and
/// [`Error::Invalid`](crate::Error::Invalid) for a `d_state` above 256.
pub fn selective_scan(args: &SelectiveScan) -> Result<SelectiveScanOutput> {
    catch(|| run(Carry::Apart, args))
}

pub(crate) fn run(carry: Carry, args: &SelectiveScan) -> Result<SelectiveScanOutput> {
    let checker = check(args)?;
    match args.x_ble.device() {
        Device::Cpu | Device::Cuda(_) if args.x_ble.numel() == 0 => reference::selective_scan(args),
        Device::Cpu => cpu::scan::selective_scan(args, carry),
        Device::Cuda(_) => cuda::scan::selective_scan(args, carry),
        _ => Err(checker.no_path("x_ble")),
    }
}

fn check(args: &SelectiveScan) -> Result<Checker> {
    let checker = Checker::new("selective_scan", "x_ble", args.x_ble)?;
    let [batch, seq_len, d_inner] = checker.dims("x_ble", args.x_ble, "[batch, seq_len, d_inner]")?;
    let [_, d_state] = checker.dims("a_en", args.a_en, "[d_inner, d_state]")?;
    check_sizes("selective_scan", &[("d_state", d_state)])?;
    checker.activation("dt_ble", args.dt_ble, &[batch, seq_len, d_inner])?;
    checker.state("a_en", args.a_en, &[d_inner, d_state])?;
    checker.activation("b_bln", args.b_bln, &[batch, seq_len, d_state])?;
    checker.activation("c_bln", args.c_bln, &[batch, seq_len, d_state])?;
    if let Some(d_e) = args.d_e {
        checker.state("d_e", d_e, &[d_inner])?;
    }
    if let Some(z_ble) = args.z_ble {
        checker.activation("z_ble", z_ble, &[batch, seq_len, d_inner])?;
    }
    if let Some(dt_bias_e) = args.dt_bias_e {
        checker.state("dt_bias_e", dt_bias_e, &[d_inner])?;
    }
    if let Some(initial_state_ben) = args.initial_state_ben {
        checker.state("initial_state_ben", initial_state_ben, &[batch, d_inner, d_state])?;
    }
    if let Some(reset_bl) = args.reset_bl {
        checker.reset("reset_bl", reset_bl, &[batch, seq_len])?;
    }
    Ok(checker)
}

/// Arguments of [`selective_scan_step`]: those of [`SelectiveScan`] for one token, in the same dtypes.
#[derive(Debug)]
pub struct SelectiveScanStep<'a> {
    /// Input `[batch, d_inner]`.
    pub x_be: &'a Tensor,
    /// Step sizes before bias and activation, `[batch, d_inner]`.
    pub dt_be: &'a Tensor,
    /// Decay rates `[d_inner, d_state]`.
    pub a_en: &'a Tensor,
    /// Input projections `[batch, d_state]`.
    pub b_bn: &'a Tensor,
    /// Output projections `[batch, d_state]`.
    pub c_bn: &'a Tensor,
    /// Skip weights `[d_inner]`.
    pub d_e: Option<&'a Tensor>,
    /// Gate `[batch, d_inner]`.
    pub z_be: Option<&'a Tensor>,
    /// Added to `dt_be` before the activation, `[d_inner]`.
    pub dt_bias_e: Option<&'a Tensor>,
    /// What turns `dt_be` into step sizes.
    pub dt_activation: DtActivation,
    /// State before this token and, when the call returns, after it: `[batch, d_inner, d_state]`, contiguous, f32 (f64 with f64 inputs).
    pub state_ben: &'a mut Tensor,
    /// bool `[batch]`: true clears the state first.
    pub reset_b: Option<&'a Tensor>,
}

impl<'a> SelectiveScanStep<'a> {
    /// The arguments that every step has; softplus on `dt_be`, nothing else.
    pub fn new(
        x_be: &'a Tensor,
        dt_be: &'a Tensor,
        a_en: &'a Tensor,
        b_bn: &'a Tensor,
        c_bn: &'a Tensor,
        state_ben: &'a mut Tensor,
    ) -> Self {
        Self {
            x_be,
            dt_be,
            a_en,
            b_bn,
            c_bn,
            d_e: None,
            z_be: None,
            dt_bias_e: None,
            dt_activation: DtActivation::Softplus,
            state_ben,
            reset_b: None,
        }
    }
}

/// Advances the recurrence of [`selective_scan`] by one token: returns `y_be` and writes the state after the token over the one
/// before it.
///
/// It gives bit for bit what the scan gives for a sequence of one token. Other handles of the state's memory see the new state, too;
/// to go on from the old one as well, step a copy.
///
/// ```
/// use flowhn_ssm::{DtActivation, SelectiveScanStep, selective_scan_step};
/// use tch::{Device, Kind, Tensor};
///
/// let one = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
/// let (x, a, bc, mut state) = (one(&[1, 2]), -one(&[2, 3]), one(&[1, 3]), one(&[1, 2, 3]));
/// let y = selective_scan_step(SelectiveScanStep {
///     dt_activation: DtActivation::Identity,
///     ..SelectiveScanStep::new(&x, &x, &a, &bc, &bc, &mut state)
/// })?;
/// let want = (-1f64).exp() + 1.;
/// assert!((state.double_value(&[0, 0, 0]) - want).abs() < 1e-6);
/// assert!((y.double_value(&[0, 0]) - 3. * want).abs() < 1e-6);
/// # Ok::<(), flowhn_ssm::Error>(())
/// ```
///
/// # Errors
/// As [`selective_scan`], whose name and arguments messages have (`x_ble` for `x_be`, `initial_state_ben` for `state_ben`) with
/// `seq_len` 1. [`Error::Invalid`](crate::Error::Invalid) if the state is not contiguous, if another argument shares memory with it, or
/// where gradients are recorded: a step has none, [`selective_scan`] of one token has.
pub fn selective_scan_step(args: SelectiveScanStep) -> Result<Tensor> {
    catch(|| {
        let one_token = |t: &Tensor| t.unsqueeze(1);
        let (z, reset) = (args.z_be.map(one_token), args.reset_b.map(one_token));
        let one_token = SelectiveScan {
            x_ble: &one_token(args.x_be),
            dt_ble: &one_token(args.dt_be),
            a_en: args.a_en,
            b_bln: &one_token(args.b_bn),
            c_bln: &one_token(args.c_bn),
            d_e: args.d_e,
            z_ble: z.as_ref(),
            dt_bias_e: args.dt_bias_e,
            dt_activation: args.dt_activation,
            initial_state_ben: Some(&*args.state_ben),
            reset_bl: reset.as_ref(),
        };
        Ok(run(Carry::InPlace, &one_token)?.y_ble.squeeze_dim(1))
    })
}
