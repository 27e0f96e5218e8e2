//! An operation that is timed: its tensors, what it costs, what others take for it.

use flowhn_torch::testing::noise;
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result, apply};
use tch::{Device, Kind, Tensor};

/// One line or two of the table: an operation at one shape.
pub struct Operation {
    /// The operation.
    pub op: &'static str,
    /// The shape in words: a letter and a number for each size, heads as `24x64` or `12/3x64`.
    pub shape: String,
    /// What is timed of it.
    pub passes: Vec<Pass>,
    /// Makes its tensors.
    pub build: Build,
}

/// Matrix products that are timed in turns with an operation, and what that may take more than they do.
#[derive(Clone, Copy, Debug)]
pub struct Products {
    /// `m`, `n` and `k` of each.
    pub shapes: [[i64; 3]; 3],
    /// The multiple of their time that we want to stay within.
    pub within: f64,
    /// The most bytes beside operands and gradients that we want to take.
    pub memory: u64,
}

/// A direction of an operation.
pub struct Pass {
    /// Which.
    pub direction: Direction,
    /// The least it has to move and compute.
    pub cost: Cost,
    /// What the best public program took.
    pub recorded: Option<Recorded>,
    /// The matrix products that forward and backward together cannot do without, where the aim is a multiple of their time.
    pub products: Option<Products>,
}

/// Which way an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Inputs to outputs, with what the gradients need.
    Forward,
    /// Gradients of outputs to gradients of inputs.
    Backward,
    /// One after the other.
    Both,
}

impl Direction {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Both => "both",
        }
    }
}

/// Bytes to and from memory, operands read once and results written once, and floating-point operations of matrix products.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Bytes.
    pub bytes: f64,
    /// FLOPs on tensor cores.
    pub flops: f64,
}

/// A figure that was measured earlier; see [`super::row::SOURCE`].
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// The program.
    pub peer: &'static str,
    /// Its time in microseconds.
    pub us: f64,
    /// How many times faster we want to be.
    pub target: Option<f64>,
}

/// Makes the tensors of an operation on a device.
pub type Build = Box<dyn Fn(Device) -> Result<Call>>;

/// An operation on its tensors: its outputs.
type Run = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>>;

/// Tensors and what is done with them.
pub struct Call {
    /// The tensors whose gradients are wanted.
    pub leaves: Vec<Tensor>,
    /// Runs the operation and returns the outputs that gradients flow into.
    pub run: Run,
}

impl Operation {
    /// The operation and its shape: what peers are asked by, and what `--filter` looks at.
    pub fn name(&self) -> String {
        format!("{} {}", self.op, self.shape)
    }
}

impl Pass {
    /// A pass without a figure of others.
    pub fn new(direction: Direction, bytes: f64, flops: f64) -> Self {
        Self { direction, cost: Cost { bytes, flops }, recorded: None, products: None }
    }

    /// The same with the time of a peer.
    pub fn against(self, peer: &'static str, us: f64, target: Option<f64>) -> Self {
        Self { recorded: Some(Recorded { peer, us, target }), ..self }
    }

    /// Forward and backward, judged by matrix products.
    pub fn of_products(products: Products, bytes: f64, flops: f64) -> Self {
        Self { products: Some(products), ..Self::new(Direction::Both, bytes, flops) }
    }
}

/// A scalar without a value, whose backward hands on gradients that were made before: autograd starts at a scalar, and computing
/// one would be timed too.
struct Start(Vec<Tensor>);

impl Function for Start {
    const NAME: &'static str = "start of the backward";

    fn forward(&mut self, _: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![Tensor::f_zeros([], (Kind::Float, inputs[0].device()))?])
    }

    fn backward(&self, _: &BackwardCtx, _: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(self.0.iter().map(|grad| Some(grad.shallow_clone())).collect())
    }
}

impl Call {
    /// The operation, recorded; its backward may run any number of times.
    pub fn recorded(&self) -> Result<Tensor> {
        let mut outputs = (self.run)(&self.leaves)?;
        if let [output] = &outputs[..]
            && output.numel() == 1
        {
            return Ok(outputs.remove(0));
        }
        let grad = |output: &Tensor| random(&output.size(), output.kind(), output.device(), 77);
        let grads = outputs.iter().map(grad).collect::<Result<_>>()?;
        Ok(apply(Start(grads), &outputs.iter().collect::<Vec<_>>())?.remove(0))
    }

    /// The backward of [`Call::recorded`].
    pub fn backward(&self, recorded: &Tensor) -> Result<()> {
        self.gradients(recorded).map(drop)
    }

    /// The gradients of the leaves.
    pub fn gradients(&self, recorded: &Tensor) -> Result<Vec<Tensor>> {
        Ok(Tensor::f_run_backward(&[recorded], &self.leaves, true, false)?)
    }

    /// The start of a backward alone.
    pub fn only_start(device: Device) -> Result<Self> {
        Ok(Self {
            leaves: vec![random(&[8], Kind::Float, device, 1)?.set_requires_grad(true)],
            run: Box::new(|leaves| Ok(vec![leaves[0].shallow_clone()])),
        })
    }
}

/// Such values, of which the gradient is wanted.
pub fn leaf(shape: &[i64], kind: Kind, device: Device, seed: i64) -> Result<Tensor> {
    Ok(random(shape, kind, device, seed)?.set_requires_grad(true))
}

/// Values in -1..1 of a fixed pattern. Large tensors repeat it, so that making them takes no time.
pub fn random(shape: &[i64], kind: Kind, device: Device, seed: i64) -> Result<Tensor> {
    const PERIOD: i64 = 1 << 16;
    let n: i64 = shape.iter().product();
    let period = PERIOD.min(n.max(1));
    let pattern = noise(&[period], seed).to_kind(kind).f_to_device(device)?;
    let repeated = pattern.f_repeat([(n + period - 1) / period])?;
    Ok(repeated.f_narrow(0, 0, n)?.f_reshape(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_hands_on_the_gradient() {
        let x = random(&[3, 5], Kind::Double, Device::Cpu, 2).unwrap().set_requires_grad(true);
        let call = Call { leaves: vec![x], run: Box::new(|leaves| Ok(vec![&leaves[0] * 2.])) };
        let recorded = call.recorded().unwrap();
        let grad = Tensor::f_run_backward(&[&recorded], &call.leaves, true, false).unwrap().remove(0);
        assert!(grad.equal(&(random(&[3, 5], Kind::Double, Device::Cpu, 77).unwrap() * 2.)));
        call.backward(&recorded).unwrap();
    }

    #[test]
    fn patterns_fill_any_shape() {
        for shape in [&[1][..], &[7, 3], &[300, 300]] {
            let tensor = random(shape, Kind::Float, Device::Cpu, 3).unwrap();
            assert_eq!(tensor.size(), shape);
            assert!(tensor.abs().max().double_value(&[]) <= 1.);
        }
    }
}
