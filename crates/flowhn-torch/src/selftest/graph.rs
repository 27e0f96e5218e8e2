//! CUDA graphs.

use tch::{Device, Kind, Tensor};

use super::function::Square;
use super::{all_equal, ensure, error_of, of_cuda};
use crate::testing::Case;
use crate::{CaptureMode, Error, Graph, Priority, Result, Stream, apply};

pub(super) fn cases() -> Vec<Case> {
    vec![
        of_cuda("graph: a captured step replays on new values", replay),
        of_cuda("graph: memsets that became kernels do what they did", memsets),
        of_cuda("graph: a failed capture is an error and the stream goes on", failed),
        of_cuda("graph: the default stream cannot be captured", default_stream),
    ]
}

fn replay(device_idx: usize) -> Result<String> {
    let side = Stream::from_pool(device_idx, Priority::Normal)?;
    let _guard = side.enter()?;
    let mut x = Tensor::full([64], 3., (Kind::Float, Device::Cuda(device_idx))).set_requires_grad(true);
    // Forward and backward of a Rust function: the graph holds the kernels, not the callback.
    let step = |x: &Tensor| {
        let y = apply(Square, &[x])?.remove(0).f_sum(Kind::Float)?;
        Ok(Tensor::f_run_backward(&[&y], &[x], false, false)?.remove(0))
    };
    for _ in 0..3 {
        let _warm = step(&x)?;
    }
    side.synchronize()?;
    let mut graph = Graph::new()?;
    let grad = graph.capture(None, CaptureMode::ThreadLocal, || step(&x))?;
    for value in [1., 5., -2.] {
        let _ = tch::no_grad(|| x.f_fill_(value))?;
        graph.replay()?;
        side.synchronize()?;
        all_equal(&grad, 2. * value)?;
    }
    // A second graph may share the pool.
    let mut second = Graph::new()?;
    let sum = second.capture(Some(graph.pool()?), CaptureMode::ThreadLocal, || Ok(grad.f_sum(Kind::Float)?))?;
    second.replay()?;
    side.synchronize()?;
    all_equal(&sum, -256.)?;
    Ok(String::new())
}

fn memsets(device_idx: usize) -> Result<String> {
    let side = Stream::from_pool(device_idx, Priority::Normal)?;
    let _guard = side.enter()?;
    let options = (Kind::Float, Device::Cuda(device_idx));
    // A radix sort counts digits in memory that it clears with memsets.
    let mut x = Tensor::f_rand([100_000], options)?;
    let sort = |x: &Tensor| Ok(x.f_sort(0, false)?.0);
    let _warm = sort(&x)?;
    side.synchronize()?;
    let mut graph = Graph::new()?;
    let sorted = graph.capture(None, CaptureMode::ThreadLocal, || sort(&x))?;
    ensure(graph.n_memsets_replaced() > 0, || "a captured sort has no memset".to_owned())?;
    for _ in 0..3 {
        x.f_copy_(&Tensor::f_rand([100_000], options)?)?;
        graph.replay()?;
        side.synchronize()?;
        ensure(sorted.f_equal(&sort(&x)?)?, || "the replayed sort differs".to_owned())?;
    }
    Ok(format!("{} memsets", graph.n_memsets_replaced()))
}

fn failed(device_idx: usize) -> Result<String> {
    let side = Stream::from_pool(device_idx, Priority::Normal)?;
    let _guard = side.enter()?;
    let x = Tensor::ones([64], (Kind::Float, Device::Cuda(device_idx)));
    let mut graph = Graph::new()?;
    error_of(graph.replay())?;
    let outcome: Result<()> = graph.capture(None, CaptureMode::ThreadLocal, || panic!("half way"));
    let told = matches!(&outcome, Err(Error::Panic(text)) if text == "half way");
    ensure(told, || format!("the panic came back as {outcome:?}"))?;
    // Reading a value waits for the device, which no capture allows.
    error_of(Graph::new()?.capture(None, CaptureMode::ThreadLocal, || Ok((&x + &x).double_value(&[0]))))?;
    all_equal(&(&x + &x), 2.)?;
    Ok(String::new())
}

fn default_stream(device_idx: usize) -> Result<String> {
    let _guard = Stream::default_of(device_idx)?.enter()?;
    error_of(Graph::new()?.capture(None, CaptureMode::ThreadLocal, || Ok(())))
}
