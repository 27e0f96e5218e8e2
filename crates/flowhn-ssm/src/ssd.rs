//! SSD, the recurrence of Mamba-2: one decay per head and token, so that chunks of it are matrix products.
// b batch, l seq_len, h n_heads, p d_head, g n_groups, n d_state

use flowhn_torch::{Error, Result, catch};
use tch::{Device, Tensor};

use crate::args::{Carry, Checker, check_sizes};
use crate::scan::DtActivation;
use crate::{cpu, cuda, reference};

/// Arguments of [`ssd`]. [`Ssd::new`] fills the optional ones.
#[derive(Clone, Copy, Debug)]
pub struct Ssd<'a> {
    /// Input `[batch, seq_len, n_heads, d_head]`, bf16, f32 or f64.
    pub x_blhp: &'a Tensor,
    /// Step sizes before bias and activation, `[batch, seq_len, n_heads]`, in the dtype of `x_blhp` or f32.
    pub dt_blh: &'a Tensor,
    /// Decay rates `[n_heads]`, negative, f32 (f64 with f64 inputs).
    pub a_h: &'a Tensor,
    /// Input projections `[batch, seq_len, n_groups, d_state]`, in the dtype of `x_blhp` or f32; head `h` uses group `h / (n_heads / n_groups)`.
    pub b_blgn: &'a Tensor,
    /// Output projections, with shape and dtypes as `b_blgn`.
    pub c_blgn: &'a Tensor,
    /// Skip weights `[n_heads]`, f32 (f64 with f64 inputs): adds `d x` to the output.
    pub d_h: Option<&'a Tensor>,
    /// Added to `dt_blh` before the activation, `[n_heads]`, f32 (f64 with f64 inputs).
    pub dt_bias_h: Option<&'a Tensor>,
    /// What turns `dt_blh` into step sizes.
    pub dt_activation: DtActivation,
    /// State before the first token, `[batch, n_heads, d_head, d_state]`, f32 (f64 with f64 inputs); zero if absent.
    pub initial_state_bhpn: Option<&'a Tensor>,
    /// bool `[batch, seq_len]`: true clears the state before that token, as at the start of a packed document.
    pub reset_bl: Option<&'a Tensor>,
    /// The most tokens that are computed together as matrix products on the CPU, where more than 64 count as 64; any positive number gives the
    /// same result up to rounding. CUDA goes by the dtypes: bf16 runs in chunks of 64; f32, and f32 `b_blgn` or `c_blgn` beside bf16, run token
    /// by token, which is exact and much slower.
    pub chunk_len: usize,
}

impl<'a> Ssd<'a> {
    /// The arguments that every call has; softplus on `dt_blh`, chunks of 64 tokens, nothing else.
    pub fn new(
        x_blhp: &'a Tensor,
        dt_blh: &'a Tensor,
        a_h: &'a Tensor,
        b_blgn: &'a Tensor,
        c_blgn: &'a Tensor,
    ) -> Self {
        Self {
            x_blhp,
            dt_blh,
            a_h,
            b_blgn,
            c_blgn,
            d_h: None,
            dt_bias_h: None,
            dt_activation: DtActivation::Softplus,
            initial_state_bhpn: None,
            reset_bl: None,
            chunk_len: 64,
        }
    }
}

/// What [`ssd`] returns.
#[derive(Debug)]
pub struct SsdOutput {
    /// Output `[batch, seq_len, n_heads, d_head]`, in the dtype of the input.
    pub y_blhp: Tensor,
    /// State after the last token, `[batch, n_heads, d_head, d_state]`, f32 (f64 with f64 inputs).
    pub final_state_bhpn: Tensor,
}

/// Runs the recurrence of Mamba-2 (Dao and Gu, arXiv 2405.21060, section 6) over whole sequences:
///
/// ```text
/// dt_t = softplus(dt_t + dt_bias)
/// h_t  = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T      a matrix [d_head, d_state] per head
/// y_t  = h_t c_t + d x_t
/// ```
///
/// Inside a chunk the outputs are matrix products; chunks hand a state on. The state and all sums are f32 for bf16 and f32
/// inputs, f64 for f64 inputs. Every floating-point argument is differentiable, the initial state included, through the output
/// and through the final state. A reset at position 0 discards the initial state.
///
/// ```
/// use flowhn_ssm::{Ssd, ssd};
/// use tch::{Device, Kind, Tensor};
///
/// let f32_cpu = (Kind::Float, Device::Cpu);
/// let (x, dt) = (Tensor::randn([2, 9, 4, 8], f32_cpu), Tensor::randn([2, 9, 4], f32_cpu));
/// let (b, c) = (Tensor::randn([2, 9, 2, 5], f32_cpu), Tensor::randn([2, 9, 2, 5], f32_cpu));
/// let a = -Tensor::rand([4], f32_cpu);
/// let out = ssd(&Ssd { chunk_len: 4, ..Ssd::new(&x, &dt, &a, &b, &c) })?;
/// assert_eq!(out.y_blhp.size(), [2, 9, 4, 8]);
/// assert_eq!(out.final_state_bhpn.size(), [2, 4, 8, 5]);
/// # Ok::<(), flowhn_ssm::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`] or [`Error::Invalid`], naming the argument at fault; `Error::Device` also on
/// a device other than the CPU and CUDA. On CUDA, `Error::Dtype` for f64 and `Error::Invalid` for a `d_state` above 256.
pub fn ssd(args: &Ssd) -> Result<SsdOutput> {
    catch(|| run(Carry::Apart, args))
}

pub(crate) fn run(carry: Carry, args: &Ssd) -> Result<SsdOutput> {
    let checker = check(args)?;
    match args.x_blhp.device() {
        Device::Cpu if args.x_blhp.numel() == 0 => reference::ssd_chunked(args),
        Device::Cpu => cpu::ssd::ssd(args, carry),
        Device::Cuda(_) => cuda::ssd::ssd(args, carry),
        _ => Err(checker.no_path("x_blhp")),
    }
}

fn check(args: &Ssd) -> Result<Checker> {
    let checker = Checker::new("ssd", "x_blhp", args.x_blhp)?;
    let [batch, seq_len, n_heads, d_head] = checker.dims("x_blhp", args.x_blhp, "[batch, seq_len, n_heads, d_head]")?;
    let [_, _, n_groups, d_state] = checker.dims("b_blgn", args.b_blgn, "[batch, seq_len, n_groups, d_state]")?;
    check_sizes("ssd", &[("d_head", d_head), ("d_state", d_state)])?;
    if n_groups == 0 || n_heads % n_groups != 0 {
        return Err(Error::invalid(
            "ssd",
            format!("b_blgn has {n_groups} groups, which do not divide the {n_heads} heads of x_blhp"),
        ));
    }
    if args.chunk_len == 0 {
        return Err(Error::invalid("ssd", "chunk_len is 0, expected a positive number of tokens"));
    }
    checker.activation("dt_blh", args.dt_blh, &[batch, seq_len, n_heads])?;
    checker.state("a_h", args.a_h, &[n_heads])?;
    checker.activation("b_blgn", args.b_blgn, &[batch, seq_len, n_groups, d_state])?;
    checker.activation("c_blgn", args.c_blgn, &[batch, seq_len, n_groups, d_state])?;
    if let Some(d_h) = args.d_h {
        checker.state("d_h", d_h, &[n_heads])?;
    }
    if let Some(dt_bias_h) = args.dt_bias_h {
        checker.state("dt_bias_h", dt_bias_h, &[n_heads])?;
    }
    if let Some(initial_state_bhpn) = args.initial_state_bhpn {
        checker.state("initial_state_bhpn", initial_state_bhpn, &[batch, n_heads, d_head, d_state])?;
    }
    if let Some(reset_bl) = args.reset_bl {
        checker.reset("reset_bl", reset_bl, &[batch, seq_len])?;
    }
    Ok(checker)
}

/// Arguments of [`ssd_step`]: those of [`Ssd`] for one token.
#[derive(Debug)]
pub struct SsdStep<'a> {
    /// Input `[batch, n_heads, d_head]`.
    pub x_bhp: &'a Tensor,
    /// Step sizes before bias and activation, `[batch, n_heads]`.
    pub dt_bh: &'a Tensor,
    /// Decay rates `[n_heads]`.
    pub a_h: &'a Tensor,
    /// Input projections `[batch, n_groups, d_state]`.
    pub b_bgn: &'a Tensor,
    /// Output projections `[batch, n_groups, d_state]`.
    pub c_bgn: &'a Tensor,
    /// Skip weights `[n_heads]`.
    pub d_h: Option<&'a Tensor>,
    /// Added to `dt_bh` before the activation, `[n_heads]`.
    pub dt_bias_h: Option<&'a Tensor>,
    /// What turns `dt_bh` into step sizes.
    pub dt_activation: DtActivation,
    /// State before this token and, when the call returns, after it: `[batch, n_heads, d_head, d_state]`, contiguous, f32 (f64 with
    /// f64 inputs).
    pub state_bhpn: &'a mut Tensor,
    /// bool `[batch]`: true clears the state first.
    pub reset_b: Option<&'a Tensor>,
}

impl<'a> SsdStep<'a> {
    /// The arguments that every step has; softplus on `dt_bh`, nothing else.
    pub fn new(
        x_bhp: &'a Tensor,
        dt_bh: &'a Tensor,
        a_h: &'a Tensor,
        b_bgn: &'a Tensor,
        c_bgn: &'a Tensor,
        state_bhpn: &'a mut Tensor,
    ) -> Self {
        Self {
            x_bhp,
            dt_bh,
            a_h,
            b_bgn,
            c_bgn,
            d_h: None,
            dt_bias_h: None,
            dt_activation: DtActivation::Softplus,
            state_bhpn,
            reset_b: None,
        }
    }
}

/// Advances the recurrence of [`ssd`] by one token: returns `y_bhp` and writes the state after the token over the one before it.
///
/// Other handles of the state's memory see the new state, too; to go on from the old one as well, step a copy.
///
/// ```
/// use flowhn_ssm::{DtActivation, SsdStep, ssd_step};
/// use tch::{Device, Kind, Tensor};
///
/// let one = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
/// let (x, dt, a, bc, mut state) = (one(&[1, 2, 3]), one(&[1, 2]), -one(&[2]), one(&[1, 1, 4]), one(&[1, 2, 3, 4]));
/// let y = ssd_step(SsdStep {
///     dt_activation: DtActivation::Identity,
///     ..SsdStep::new(&x, &dt, &a, &bc, &bc, &mut state)
/// })?;
/// let want = (-1f64).exp() + 1.;
/// assert!((state.double_value(&[0, 0, 0, 0]) - want).abs() < 1e-6);
/// assert!((y.double_value(&[0, 0, 0]) - 4. * want).abs() < 1e-6);
/// # Ok::<(), flowhn_ssm::Error>(())
/// ```
///
/// # Errors
/// As [`ssd`], whose name and arguments messages have (`x_blhp` for `x_bhp`, `initial_state_bhpn` for `state_bhpn`) with `seq_len` 1.
/// [`Error::Invalid`] if the state is not contiguous, if another argument shares memory with it, or where gradients are recorded: a
/// step has none, [`ssd`] of one token has.
pub fn ssd_step(args: SsdStep) -> Result<Tensor> {
    catch(|| {
        let one_token = |t: &Tensor| t.unsqueeze(1);
        let reset = args.reset_b.map(one_token);
        let one_token = Ssd {
            x_blhp: &one_token(args.x_bhp),
            dt_blh: &one_token(args.dt_bh),
            a_h: args.a_h,
            b_blgn: &one_token(args.b_bgn),
            c_blgn: &one_token(args.c_bgn),
            d_h: args.d_h,
            dt_bias_h: args.dt_bias_h,
            dt_activation: args.dt_activation,
            initial_state_bhpn: Some(&*args.state_bhpn),
            reset_bl: reset.as_ref(),
            chunk_len: 1,
        };
        Ok(run(Carry::InPlace, &one_token)?.y_blhp.squeeze_dim(1))
    })
}
