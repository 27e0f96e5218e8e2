//! Marks on the device's clock.

use tch::{Device, Kind, Tensor};

use super::{ensure, of_cuda};
use crate::Result;
use crate::testing::Case;
use crate::timeline::{Timeline, begin, end, pass};

pub(super) fn cases() -> Vec<Case> {
    vec![of_cuda("timeline: a walk on the device's clock", walk)]
}

fn walk(device_idx: usize) -> Result<String> {
    let device = Device::Cuda(device_idx);
    let timeline = Timeline::start(device)?;
    let x = Tensor::f_ones([1000], (Kind::Float, device))?.f_set_requires_grad(true)?;
    for _ in 0..2 {
        begin("before")?;
        pass(&x, "forward", "backward")?.f_sum(Kind::Float)?.f_backward()?;
        end()?;
    }
    let (parts, idle_ms) = timeline.parts()?;
    let names: Vec<&str> = parts.iter().map(|part| part.name).collect();
    ensure(names == ["before", "forward", "backward"], || format!("{names:?}"))?;
    let times: Vec<f64> = parts.iter().map(|part| part.ms).chain([idle_ms]).collect();
    // What took longer was not this.
    ensure(times.iter().all(|ms| (0. ..60_000.).contains(ms)), || format!("{times:?} ms"))?;
    Ok(format!("{:.3} ms", times.iter().sum::<f64>()))
}
