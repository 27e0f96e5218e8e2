//! The causal depthwise convolution in front of the scans.
// b batch, l seq_len, e channels, k d_conv, j d_conv - 1

use flowhn_torch::{Error, Result, catch};
use tch::{Device, Tensor};

use crate::args::{Carry, Checker};
use crate::{cpu, cuda, reference};

/// What follows the convolution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// `x * sigmoid(x)`, as in Mamba.
    #[default]
    Silu,
}

/// Arguments of [`causal_conv1d`]. [`CausalConv1d::new`] fills the optional ones.
#[derive(Clone, Copy, Debug)]
pub struct CausalConv1d<'a> {
    /// Input `[batch, seq_len, channels]`, bf16, f32 or f64.
    pub x_ble: &'a Tensor,
    /// Taps `[channels, d_conv]`, in the dtype of `x_ble` or f32, the last one for the present token; any `d_conv` from 1 on.
    pub weight_ek: &'a Tensor,
    /// Bias `[channels]`, in the dtype of `x_ble` or f32.
    pub bias_e: Option<&'a Tensor>,
    /// What follows.
    pub activation: Activation,
    /// The `d_conv - 1` inputs before the first token, oldest first, `[batch, d_conv - 1, channels]`, f32 (f64 with f64
    /// inputs); zeros if absent.
    pub initial_state_bje: Option<&'a Tensor>,
    /// bool `[batch, seq_len]`: true hides everything before that token from it and all later ones, as at the start of a packed
    /// document.
    pub reset_bl: Option<&'a Tensor>,
}

impl<'a> CausalConv1d<'a> {
    /// Input and taps; SiLU, nothing else.
    pub fn new(x_ble: &'a Tensor, weight_ek: &'a Tensor) -> Self {
        Self { x_ble, weight_ek, bias_e: None, activation: Activation::Silu, initial_state_bje: None, reset_bl: None }
    }
}

/// What [`causal_conv1d`] returns.
#[derive(Debug)]
pub struct CausalConv1dOutput {
    /// Output `[batch, seq_len, channels]`, in the dtype of the input.
    pub y_ble: Tensor,
    /// The last `d_conv - 1` inputs, oldest first, with zeros for those a reset hides; `[batch, d_conv - 1, channels]`, f32 (f64
    /// with f64 inputs).
    pub final_state_bje: Tensor,
}

/// Convolves each channel with its own taps, looking only back:
///
/// ```text
/// y_t = act(bias + sum_i weight_i x_{t - (d_conv - 1) + i})
/// ```
///
/// Sums are f32 for bf16 and f32 inputs, f64 for f64 inputs. Every floating-point argument is differentiable, the initial state
/// included, through the output and through the final state.
///
/// ```
/// use flowhn_ssm::{Activation, CausalConv1d, causal_conv1d};
/// use tch::Tensor;
///
/// let x = Tensor::from_slice(&[1f32, 2., 3., 4.]).view([1, 4, 1]);
/// let sum_of_two = Tensor::from_slice(&[1f32, 1.]).view([1, 2]);
/// let out = causal_conv1d(&CausalConv1d { activation: Activation::None, ..CausalConv1d::new(&x, &sum_of_two) })?;
/// assert_eq!(Vec::<f32>::try_from(out.y_ble.view(-1))?, [1., 3., 5., 7.]);
/// assert_eq!(Vec::<f32>::try_from(out.final_state_bje.view(-1))?, [4.]);
/// # Ok::<(), flowhn_ssm::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`] or [`Error::Invalid`], naming the argument at fault; `Error::Device` also on
/// a device other than the CPU and CUDA. On CUDA, `Error::Dtype` for f64 and `Error::Invalid` for a `d_conv` above 64.
pub fn causal_conv1d(args: &CausalConv1d) -> Result<CausalConv1dOutput> {
    catch(|| run(Carry::Apart, args))
}

pub(crate) fn run(carry: Carry, args: &CausalConv1d) -> Result<CausalConv1dOutput> {
    let checker = check(args)?;
    match args.x_ble.device() {
        Device::Cpu | Device::Cuda(_) if args.x_ble.numel() == 0 => reference::causal_conv1d(args),
        Device::Cpu => cpu::conv::causal_conv1d(args, carry),
        Device::Cuda(_) => cuda::conv::causal_conv1d(args, carry),
        _ => Err(checker.no_path("x_ble")),
    }
}

fn check(args: &CausalConv1d) -> Result<Checker> {
    let checker = Checker::new("causal_conv1d", "x_ble", args.x_ble)?;
    let [batch, seq_len, channels] = checker.dims("x_ble", args.x_ble, "[batch, seq_len, channels]")?;
    let [_, d_conv] = checker.dims("weight_ek", args.weight_ek, "[channels, d_conv]")?;
    if d_conv == 0 {
        return Err(Error::invalid("causal_conv1d", "weight_ek has no taps, expected d_conv of at least 1"));
    }
    checker.activation("weight_ek", args.weight_ek, &[channels, d_conv])?;
    if let Some(bias_e) = args.bias_e {
        checker.activation("bias_e", bias_e, &[channels])?;
    }
    if let Some(initial_state_bje) = args.initial_state_bje {
        checker.state("initial_state_bje", initial_state_bje, &[batch, d_conv - 1, channels])?;
    }
    if let Some(reset_bl) = args.reset_bl {
        checker.reset("reset_bl", reset_bl, &[batch, seq_len])?;
    }
    Ok(checker)
}

/// Arguments of [`causal_conv1d_step`]: those of [`CausalConv1d`] for one token.
#[derive(Debug)]
pub struct CausalConv1dStep<'a> {
    /// Input `[batch, channels]`.
    pub x_be: &'a Tensor,
    /// Taps `[channels, d_conv]`.
    pub weight_ek: &'a Tensor,
    /// Bias `[channels]`.
    pub bias_e: Option<&'a Tensor>,
    /// What follows.
    pub activation: Activation,
    /// The `d_conv - 1` inputs before this token, oldest first, `[batch, d_conv - 1, channels]`, contiguous, f32 (f64 with f64
    /// inputs); they move up to make room for the token's.
    pub state_bje: &'a mut Tensor,
    /// bool `[batch]`: true hides the state from this token on.
    pub reset_b: Option<&'a Tensor>,
}

impl<'a> CausalConv1dStep<'a> {
    /// Input, taps and state; SiLU, nothing else.
    pub fn new(x_be: &'a Tensor, weight_ek: &'a Tensor, state_bje: &'a mut Tensor) -> Self {
        Self { x_be, weight_ek, bias_e: None, activation: Activation::Silu, state_bje, reset_b: None }
    }
}

/// Advances [`causal_conv1d`] by one token: returns `y_be` and writes the state after the token over the one before it.
///
/// It gives bit for bit what [`causal_conv1d`] gives for a sequence of one token. Other handles of the state's memory see the new
/// state, too; to go on from the old one as well, step a copy.
///
/// ```
/// use flowhn_ssm::{Activation, CausalConv1dStep, causal_conv1d_step};
/// use tch::Tensor;
///
/// let (x, mut state) = (Tensor::from_slice(&[5f32]).view([1, 1]), Tensor::from_slice(&[4f32]).view([1, 1, 1]));
/// let sum_of_two = Tensor::from_slice(&[1f32, 1.]).view([1, 2]);
/// let y = causal_conv1d_step(CausalConv1dStep {
///     activation: Activation::None,
///     ..CausalConv1dStep::new(&x, &sum_of_two, &mut state)
/// })?;
/// assert_eq!((y.double_value(&[0, 0]), state.double_value(&[0, 0, 0])), (9., 5.));
/// # Ok::<(), flowhn_ssm::Error>(())
/// ```
///
/// # Errors
/// As [`causal_conv1d`], whose name and arguments messages have (`x_ble` for `x_be`, `initial_state_bje` for `state_bje`) with
/// `seq_len` 1. [`Error::Invalid`] if the state is not contiguous, if another argument shares memory with it, or where gradients are
/// recorded: a step has none, [`causal_conv1d`] of one token has.
pub fn causal_conv1d_step(args: CausalConv1dStep) -> Result<Tensor> {
    catch(|| {
        let reset = args.reset_b.map(|t| t.unsqueeze(1));
        let one_token = CausalConv1d {
            x_ble: &args.x_be.unsqueeze(1),
            weight_ek: args.weight_ek,
            bias_e: args.bias_e,
            activation: args.activation,
            initial_state_bje: Some(&*args.state_bje),
            reset_bl: reset.as_ref(),
        };
        Ok(run(Carry::InPlace, &one_token)?.y_ble.squeeze_dim(1))
    })
}
