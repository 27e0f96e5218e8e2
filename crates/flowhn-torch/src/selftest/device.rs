//! Streams, events and memory.

use tch::{Device, Kind, Tensor};

use super::{ensure, error_of, of_cuda};
use crate::testing::Case;
use crate::{DeviceProperties, Event, MemoryStats, Priority, Result, Stream, record_stream};

pub(super) fn cases() -> Vec<Case> {
    vec![
        of_cuda("device: it describes itself", describes_itself),
        of_cuda("stream: a guard makes it current and puts the old one back", guards),
        of_cuda("event: it orders two streams and measures time", events),
        of_cuda("stream: a tensor of the CPU has none", cpu_tensor),
        of_cuda("memory: statistics follow the tensors", memory).alone(),
    ]
}

fn describes_itself(device_idx: usize) -> Result<String> {
    let properties = DeviceProperties::of(device_idx)?;
    let plausible = properties.n_multiprocessors > 0
        && properties.compute_capability >= 50
        && properties.shared_bytes_per_block >= 48 << 10
        && !properties.name.is_empty()
        && properties.pci_bus_id.split([':', '.']).all(|part| u32::from_str_radix(part, 16).is_ok());
    ensure(plausible, || format!("{properties:?}"))?;
    let total_bytes = MemoryStats::of(device_idx)?.total_bytes;
    ensure(properties.total_bytes == total_bytes, || format!("{properties:?}, but {total_bytes} bytes of memory"))?;
    Ok(format!("{} at {}, {} multiprocessors", properties.name, properties.pci_bus_id, properties.n_multiprocessors))
}

fn guards(device_idx: usize) -> Result<String> {
    let current_is = |want: Stream, when: &str| -> Result<()> {
        let current = Stream::current(device_idx)?;
        ensure(current == want, || format!("{when}: {current:?} is current, not {want:?}"))
    };
    let before = Stream::default_of(device_idx)?;
    current_is(before, "at first")?;
    let side = Stream::from_pool(device_idx, Priority::High)?;
    ensure(side != before, || "the pool gave the default stream".to_owned())?;
    {
        let _guard = side.enter()?;
        current_is(side, "inside")?;
        let inner = Stream::from_pool(device_idx, Priority::Normal)?;
        let nested = inner.enter()?;
        current_is(inner, "inside both")?;
        drop(nested);
        current_is(side, "after the inner one")?;
    }
    current_is(before, "after both")?;
    ensure(!side.native_handle()?.is_null(), || "a stream of the pool has no handle".to_owned())?;
    Ok(String::new())
}

fn events(device_idx: usize) -> Result<String> {
    let (main, side) = (Stream::current(device_idx)?, Stream::from_pool(device_idx, Priority::Normal)?);
    let a = Tensor::f_randn([2048, 2048], (Kind::Float, Device::Cuda(device_idx)))?;
    let (mut start, mut end) = (Event::new(true)?, Event::new(true)?);
    start.record(main)?;
    let mut product = a.shallow_clone();
    for _ in 0..20 {
        product = product.f_matmul(&a)?.f_div_scalar(2048.)?;
    }
    let mut ready = Event::new(false)?;
    ready.record(main)?;
    side.wait(&ready)?;
    let sum = {
        let _guard = side.enter()?;
        record_stream(&product, side)?;
        product.f_abs()?.f_sum(Kind::Float)?
    };
    end.record(side)?;
    end.synchronize()?;
    ensure(end.is_done()? && side.is_idle()?, || "an event was waited for and is not done".to_owned())?;
    let elapsed_ms = start.elapsed_ms(&end)?;
    ensure(elapsed_ms > 0., || format!("20 products took {elapsed_ms} ms"))?;
    side.synchronize()?;
    let (got, want) = (sum.double_value(&[]), product.f_abs()?.f_sum(Kind::Float)?.double_value(&[]));
    ensure(got == want, || format!("the side stream summed to {got}, not {want}"))?;
    error_of(start.elapsed_ms(&ready))?;
    Ok(format!("20 products in {elapsed_ms:.2} ms"))
}

fn cpu_tensor(device_idx: usize) -> Result<String> {
    error_of(record_stream(&Tensor::ones([2], (Kind::Float, Device::Cpu)), Stream::current(device_idx)?))
}

fn memory(device_idx: usize) -> Result<String> {
    let bytes = 256u64 << 20;
    MemoryStats::reset_peak(device_idx)?;
    let before = MemoryStats::of(device_idx)?;
    let tensor = Tensor::f_zeros([bytes as i64 / 4], (Kind::Float, Device::Cuda(device_idx)))?;
    let during = MemoryStats::of(device_idx)?;
    ensure(during.allocated_bytes >= before.allocated_bytes + bytes, || format!("{before:?}, then {during:?}"))?;
    drop(tensor);
    let after = MemoryStats::of(device_idx)?;
    let peaks = after.allocated_peak_bytes.min(after.reserved_peak_bytes);
    ensure(peaks >= bytes && after.allocated_bytes < during.allocated_bytes, || format!("{during:?}, then {after:?}"))?;
    MemoryStats::empty_cache()?;
    let emptied = MemoryStats::of(device_idx)?;
    ensure(emptied.reserved_bytes < after.reserved_bytes, || format!("{after:?}, then {emptied:?}"))?;
    Ok(String::new())
}
