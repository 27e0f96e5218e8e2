//! Argument checks that the operations share.

use flowhn_torch::{Error, ForwardCtx, Result, check};
use tch::{Device, Kind, Tensor};

/// Where a call leaves the state after its last token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carry {
    /// In a tensor of its own.
    Apart,
    /// In that of the state before its first token, which is its last too: a step.
    InPlace,
}

impl Carry {
    /// Where to write the final state: the initial one, which is then among the inputs, or what `make` makes.
    pub(crate) fn place(
        self,
        op: &'static str,
        ctx: &ForwardCtx,
        inputs: &[&Tensor],
        initial_state: Option<usize>,
        make: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (Self::InPlace, Some(idx)) = (self, initial_state) else { return make() };
        ctx.overwrite(op, "the state", inputs, idx)?;
        Ok(inputs[idx].shallow_clone())
    }
}

/// The type that states, decays and sums are kept in: f64 for f64 inputs, f32 for all others.
pub(crate) fn state_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Checks the arguments of one operation against the dtype and device of its main input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checker {
    op: &'static str,
    kind: Kind,
    device: Device,
}

impl Checker {
    /// Takes dtype and device from the main input and refuses dtypes that no operation here supports.
    pub(crate) fn new(op: &'static str, arg: &'static str, main: &Tensor) -> Result<Self> {
        check::kind(op, arg, main, &[Kind::BFloat16, Kind::Float, Kind::Double])?;
        Ok(Self { op, kind: main.kind(), device: main.device() })
    }

    /// A tensor of activations: in the dtype of the main input, or in that of the state.
    pub(crate) fn activation(&self, arg: &'static str, tensor: &Tensor, want: &[i64]) -> Result<()> {
        check::shape(self.op, arg, tensor, want)?;
        check::kind(self.op, arg, tensor, &[self.kind, state_kind(self.kind)])?;
        check::device(self.op, arg, tensor, self.device)
    }

    /// A tensor in the dtype of the state: decays, initial states.
    pub(crate) fn state(&self, arg: &'static str, tensor: &Tensor, want: &[i64]) -> Result<()> {
        check::shape(self.op, arg, tensor, want)?;
        check::kind(self.op, arg, tensor, &[state_kind(self.kind)])?;
        check::device(self.op, arg, tensor, self.device)
    }

    /// A mask of resets.
    pub(crate) fn reset(&self, arg: &'static str, tensor: &Tensor, want: &[i64]) -> Result<()> {
        check::shape(self.op, arg, tensor, want)?;
        check::kind(self.op, arg, tensor, &[Kind::Bool])?;
        check::device(self.op, arg, tensor, self.device)
    }

    /// The number of dimensions of an argument; returns its sizes.
    pub(crate) fn dims<const N: usize>(&self, arg: &'static str, tensor: &Tensor, want: &str) -> Result<[i64; N]> {
        check::dims(self.op, arg, tensor, want)
    }

    /// The error for a device without a path.
    pub(crate) fn no_path(&self, arg: &'static str) -> Error {
        Error::Device { op: self.op, arg, got: self.device, want: "the CPU or a CUDA device".to_owned() }
    }
}

/// Refuses sizes below 1 by name.
pub(crate) fn check_sizes(op: &'static str, sizes: &[(&str, i64)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size < 1) {
        None => Ok(()),
        Some((name, size)) => Err(Error::invalid(op, format!("{name} is {size}, expected at least 1"))),
    }
}
