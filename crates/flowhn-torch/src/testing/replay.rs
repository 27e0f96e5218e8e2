//! Operations in CUDA graphs.

use tch::{Device, Kind, Tensor};

use super::rule::{Op, directions_of, leaves_of, results, round, same_bits};
use crate::{CaptureMode, Error, Graph, Result, SideStream};

/// Calls before the capture: kernels are compiled, and libtorch's libraries have their workspaces.
const WARM_UP: u32 = 2;

/// Checks that a CUDA graph can hold `op` with its backward, which fails where the host waits for the device, and that a replay gives
/// the bits of an eager call, on the values of the capture and on others.
///
/// `inputs` and `kinds` are as for [`Rule::check`](super::Rule::check). What else `op` reads has to be on the device before. Everything
/// runs on a stream of its own, since the default one cannot be captured.
///
/// # Errors
/// Those of `op`; [`Error::Torch`] if it cannot be captured; [`Error::Invalid`] that names the output or gradient that differs, and for
/// a device without graphs.
pub fn check_replay(op: Op, inputs: &[Tensor], kinds: &[Kind], device: Device) -> Result<String> {
    let Some(side) = SideStream::enter(device)? else { return Err(Error::invalid("replay", "not a CUDA device")) };
    let given: Vec<Tensor> = inputs.iter().zip(kinds).map(|(x, kind)| round(x, *kind).to_device(device)).collect();
    let copies: Vec<Tensor> = given.iter().map(Tensor::copy).collect();
    let leaves = leaves_of(&copies);
    let fill = |factor: f64| -> Result<()> {
        for (leaf, given) in leaves.iter().zip(&given).filter(|(leaf, _)| leaf.is_floating_point()) {
            leaf.detach().f_copy_(&given.f_mul_scalar(factor)?)?;
        }
        Ok(())
    };
    // Made on the host, and so no part of what is captured.
    let directions = directions_of(&op(&leaves)?);
    let run = || results(&leaves, &op(&leaves)?, &directions);
    fill(0.5)?;
    for _ in 0..WARM_UP {
        run()?;
    }
    side.stream().synchronize()?;
    let mut graph = Graph::new()?;
    let replayed = graph.capture(None, CaptureMode::ThreadLocal, run)?;
    // Other values than those of the capture first: nothing that was there before can pass for a result.
    for factor in [1., 0.5] {
        fill(factor)?;
        let eager = run()?;
        graph.replay()?;
        side.stream().synchronize()?;
        for ((name, eager), (_, replayed)) in eager.iter().zip(&replayed) {
            if !same_bits(eager, replayed) {
                let message = format!("{name} of inputs times {factor} differs between the replay and an eager call");
                return Err(Error::invalid("replay", message));
            }
        }
    }
    Ok(format!("the same bits of {} results", replayed.len()))
}
