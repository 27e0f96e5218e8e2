//! Streams, events, memory, graphs and functions on a GPU.
#![cfg(feature = "cuda")]

mod common;

use common::{Square, custom, values};
use flowhn_torch::{DeviceProperties, Error, Event, MemoryStats, Priority, Result, Stream, apply, record_stream};
use tch::{Device, Kind, Tensor};

const GPU: (Kind, Device) = (Kind::Float, Device::Cuda(0));

#[test]
fn the_device_describes_itself() -> Result<()> {
    let properties = DeviceProperties::of(0)?;
    assert!(properties.n_multiprocessors > 0 && properties.compute_capability >= 50, "{properties:?}");
    assert!(!properties.name.is_empty() && properties.shared_bytes_per_block >= 48 << 10, "{properties:?}");
    assert_eq!(properties.total_bytes, MemoryStats::of(0)?.total_bytes);
    Ok(())
}

#[test]
fn a_guard_makes_a_stream_current_and_puts_the_old_one_back() -> Result<()> {
    let before = Stream::current(0)?;
    assert_eq!(before, Stream::default_of(0)?);
    let side = Stream::from_pool(0, Priority::High)?;
    assert_ne!(side, before);
    {
        let _guard = side.enter()?;
        assert_eq!(Stream::current(0)?, side);
        let inner = Stream::from_pool(0, Priority::Normal)?;
        let nested = inner.enter()?;
        assert_eq!(Stream::current(0)?, inner);
        drop(nested);
        assert_eq!(Stream::current(0)?, side);
    }
    assert_eq!(Stream::current(0)?, before);
    assert!(!side.native_handle()?.is_null());
    Ok(())
}

#[test]
fn events_order_two_streams_and_measure_time() -> Result<()> {
    let (main, side) = (Stream::current(0)?, Stream::from_pool(0, Priority::Normal)?);
    let a = Tensor::randn([2048, 2048], GPU);
    let (mut start, mut end) = (Event::new(true)?, Event::new(true)?);
    start.record(main)?;
    let mut product = a.shallow_clone();
    for _ in 0..20 {
        product = product.matmul(&a) / 2048.;
    }
    let mut ready = Event::new(false)?;
    ready.record(main)?;
    side.wait(&ready)?;
    let sum = {
        let _guard = side.enter()?;
        record_stream(&product, side)?;
        product.abs().sum(Kind::Float)
    };
    end.record(side)?;
    end.synchronize()?;
    assert!(end.is_done()? && side.is_idle()?);
    assert!(start.elapsed_ms(&end)? > 0.);
    side.synchronize()?;
    let want = product.abs().sum(Kind::Float);
    assert_eq!(sum.double_value(&[]), want.double_value(&[]));
    assert!(matches!(start.elapsed_ms(&ready), Err(Error::Torch(_))), "made without timing");
    Ok(())
}

#[test]
fn a_tensor_of_the_cpu_has_no_stream() -> Result<()> {
    let outcome = record_stream(&Tensor::ones([2], (Kind::Float, Device::Cpu)), Stream::current(0)?);
    assert!(matches!(outcome, Err(Error::Torch(_))));
    Ok(())
}

#[test]
fn memory_statistics_follow_the_tensors() -> Result<()> {
    let bytes = 256u64 << 20;
    MemoryStats::reset_peak(0)?;
    let before = MemoryStats::of(0)?;
    let tensor = Tensor::zeros([bytes as i64 / 4], GPU);
    // Other tests allocate beside this one, though far less.
    assert!(MemoryStats::of(0)?.allocated_bytes >= bytes);
    drop(tensor);
    let after = MemoryStats::of(0)?;
    assert!(after.allocated_peak_bytes >= bytes && after.reserved_peak_bytes >= bytes);
    assert!(after.allocated_bytes < before.allocated_bytes + bytes);
    MemoryStats::empty_cache()?;
    assert!(MemoryStats::of(0)?.free_bytes <= after.total_bytes);
    Ok(())
}

#[test]
fn functions_run_on_the_stream_of_their_forward() -> Result<()> {
    let side = Stream::from_pool(0, Priority::Normal)?;
    let _guard = side.enter()?;
    let x = Tensor::full([64], 3., GPU).set_requires_grad(true);
    let function = custom(
        |_, x| Ok(vec![x[0] * 2.]),
        move |_, g| {
            assert_eq!(Stream::current(0)?, side);
            Ok(vec![Some(&g[0] * 2.)])
        },
    );
    let y = apply(function, &[&x])?.remove(0);
    apply(Square, &[&y])?[0].sum(Kind::Float).f_backward()?;
    assert_eq!(values(&x.grad().to_device(Device::Cpu)), [24.; 64]);

    let failing = custom(|_, x| Ok(vec![x[0] * 2.]), |_, _| panic!("on the device thread"));
    let error = apply(failing, &[&x])?[0].sum(Kind::Float).f_backward().unwrap_err().to_string();
    assert!(error.contains("custom backward: panic: on the device thread"), "{error}");
    Ok(())
}

#[cfg(flowhn_cuda)]
mod graph {
    use super::*;
    use flowhn_torch::{CaptureMode, Graph};

    #[test]
    fn a_captured_step_replays_on_new_values() -> Result<()> {
        let side = Stream::from_pool(0, Priority::Normal)?;
        let _guard = side.enter()?;
        let mut x = Tensor::full([64], 3., GPU).set_requires_grad(true);
        // Forward and backward of a Rust function: the graph holds the kernels, not the callback.
        let step = |x: &Tensor| {
            let y = apply(Square, &[x])?.remove(0).sum(Kind::Float);
            Ok(Tensor::f_run_backward(&[&y], &[x], false, false)?.remove(0))
        };
        for _ in 0..3 {
            let _warm = step(&x)?;
        }
        side.synchronize()?;
        let mut graph = Graph::new()?;
        let grad = graph.capture(None, CaptureMode::ThreadLocal, || step(&x))?;
        for value in [1., 5., -2.] {
            let _ = tch::no_grad(|| x.fill_(value));
            graph.replay()?;
            side.synchronize()?;
            assert_eq!(values(&grad.to_device(Device::Cpu)), [2. * value; 64]);
        }
        // A second graph may share the pool.
        let mut second = Graph::new()?;
        let sum = second.capture(Some(graph.pool()?), CaptureMode::ThreadLocal, || Ok(grad.sum(Kind::Float)))?;
        second.replay()?;
        side.synchronize()?;
        assert_eq!(sum.double_value(&[]), -256.);
        Ok(())
    }

    #[test]
    fn a_failed_capture_is_an_error_and_the_stream_goes_on() -> Result<()> {
        let side = Stream::from_pool(0, Priority::Normal)?;
        let _guard = side.enter()?;
        let x = Tensor::ones([64], GPU);
        let mut graph = Graph::new()?;
        assert!(matches!(graph.replay(), Err(Error::Torch(_))), "nothing was captured yet");
        let failed: Result<()> = graph.capture(None, CaptureMode::ThreadLocal, || panic!("half way"));
        assert!(matches!(failed, Err(Error::Panic(text)) if text == "half way"));
        let failed = Graph::new()?.capture(None, CaptureMode::ThreadLocal, || Ok((&x + &x).double_value(&[0])));
        assert!(failed.is_err(), "reading a value waits for the device, which no capture allows");
        assert_eq!((&x + &x).double_value(&[0]), 2.);
        Ok(())
    }

    #[test]
    fn the_default_stream_cannot_be_captured() -> Result<()> {
        let outcome: Result<()> = Graph::new()?.capture(None, CaptureMode::ThreadLocal, || Ok(()));
        assert!(matches!(outcome, Err(Error::Torch(_))));
        Ok(())
    }
}
