//! One launch on memory of its own.

use anyhow::{Context as _, Result, bail};
use flowhn_trace::{Launch, Trace, Value};

use crate::driver::{Device, Function, Memory};

/// How to launch.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Copy nothing into regions that nobody had written.
    pub leave_unwritten: bool,
    /// Launch twice and compare.
    pub compare: bool,
}

/// Launches once, or twice on the same bytes, and waits.
///
/// # Errors
/// What the driver refuses, or what the kernel did wrong as far as the driver tells; other bits from the second launch.
pub fn run(device: &Device, function: &Function, trace: &Trace, launch: &Launch, mode: Mode) -> Result<()> {
    let first = once(device, function, trace, launch, mode)?;
    if !mode.compare {
        return Ok(());
    }
    let results = |memory: &[Memory]| memory.iter().map(Memory::read).collect::<Result<Vec<_>>>();
    let (first, second) = (results(&first)?, results(&once(device, function, trace, launch, mode)?)?);
    let differing = first.iter().zip(&second).position(|(first, second)| first != second);
    differing.map_or(Ok(()), |idx| bail!("region {idx} of {} holds other bits after a second launch", first.len()))
}

fn once(device: &Device, function: &Function, trace: &Trace, launch: &Launch, mode: Mode) -> Result<Vec<Memory>> {
    let mut memory = Vec::new();
    for region in &launch.regions {
        let allocated = Memory::new(device, region.misalignment as usize, region.n_bytes as usize)?;
        if !(mode.leave_unwritten && region.unwritten) {
            allocated.write(&trace.bytes(region).context("cannot read the bytes of a region")?)?;
        }
        memory.push(allocated);
    }
    let addresses: Vec<u64> = memory.iter().map(Memory::address).collect();
    function.launch(launch.grid, launch.block, launch.shared_bytes, &arguments(launch, &addresses)?)?;
    device.synchronize()?;
    Ok(memory)
}

/// What the driver reads for each argument, given where the regions are.
fn arguments(launch: &Launch, addresses: &[u64]) -> Result<Vec<u64>> {
    let value = |(idx, value): (usize, &Value)| match *value {
        Value::Bits(bits) => Ok(bits),
        Value::Address { region, offset } => match addresses.get(region) {
            Some(address) => Ok(address + offset),
            None => bail!("argument {idx} lies in region {region}, and the launch has {}", addresses.len()),
        },
    };
    launch.args.iter().enumerate().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_follow_their_regions() {
        let mut launch = Launch {
            kernel: String::new(),
            variant: String::new(),
            cubin: String::new(),
            entry: String::new(),
            grid: [1; 3],
            block: 1,
            shared_bytes: 0,
            regions: Vec::new(),
            args: vec![
                Value::Address { region: 1, offset: 8 },
                Value::Bits(7),
                Value::Address { region: 0, offset: 0 },
            ],
        };
        assert_eq!(arguments(&launch, &[1000, 2000]).unwrap(), [2008, 7, 1000]);
        launch.args.push(Value::Address { region: 2, offset: 0 });
        let error = arguments(&launch, &[1000, 2000]).unwrap_err().to_string();
        assert!(error.contains("argument 3") && error.contains("region 2"), "{error}");
    }
}
