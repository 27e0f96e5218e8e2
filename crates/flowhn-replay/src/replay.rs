//! One launch on memory of its own.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use flowhn_trace::{Launch, Link, Place, Region, Trace, Value};

use crate::driver::{Arg, Device, Function, Memory, Module};

/// How to launch.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Copy nothing into regions that nobody had written.
    pub leave_unwritten: bool,
    /// Launch twice and compare.
    pub compare: bool,
}

/// Where the time goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Loading machine code.
    pub code: Duration,
    /// Allocating memory, filling it and giving it back.
    pub memory: Duration,
    /// Launching and waiting.
    pub kernels: Duration,
}

/// A device with the machine code that was needed so far.
pub struct Replayer<'a> {
    device: &'a Device,
    mode: Mode,
    modules: HashMap<&'a str, Module>,
    /// By machine code and name.
    functions: HashMap<[&'a str; 2], Function>,
    spent: Spent,
}

impl<'a> Replayer<'a> {
    /// One without code.
    pub fn new(device: &'a Device, mode: Mode) -> Self {
        Self { device, mode, modules: HashMap::new(), functions: HashMap::new(), spent: Spent::default() }
    }

    /// Where its time went.
    pub fn spent(&self) -> Spent {
        self.spent
    }

    /// Launches once, or twice on the same bytes, and waits.
    ///
    /// # Errors
    /// What the driver refuses, or what the kernel did wrong as far as the driver tells; other bits from the second launch.
    pub fn run(&mut self, trace: &Trace, launch: &'a Launch) -> Result<()> {
        self.load(trace, launch)?;
        let (began, kernels) = (Instant::now(), self.spent.kernels);
        let outcome = self.launch(trace, launch);
        self.spent.memory += began.elapsed().saturating_sub(self.spent.kernels - kernels);
        outcome
    }

    fn load(&mut self, trace: &Trace, launch: &'a Launch) -> Result<()> {
        let (cubin, key) = (launch.cubin.as_str(), [launch.cubin.as_str(), launch.entry.as_str()]);
        if self.functions.contains_key(&key) {
            return Ok(());
        }
        let began = Instant::now();
        if !self.modules.contains_key(cubin) {
            let code = trace.cubin(cubin).with_context(|| format!("cannot read {cubin}"))?;
            self.modules.insert(cubin, self.device.load(&code)?);
        }
        self.functions.insert(key, self.modules[cubin].function(&launch.entry, launch.args.len())?);
        self.spent.code += began.elapsed();
        Ok(())
    }

    fn launch(&mut self, trace: &Trace, launch: &Launch) -> Result<()> {
        let first = self.once(trace, launch)?;
        if !self.mode.compare {
            return Ok(());
        }
        let results = |memory: &[Memory]| memory.iter().map(Memory::read).collect::<Result<Vec<_>>>();
        let (mut first, mut second) = (results(&first)?, results(&self.once(trace, launch)?)?);
        // Each launch has its own addresses.
        for results in [&mut first, &mut second] {
            write_links(&launch.links, results, |_| Ok(0))?;
        }
        let differing = first.iter().zip(&second).position(|(first, second)| first != second);
        differing.map_or(Ok(()), |idx| bail!("region {idx} of {} holds other bits after a second launch", first.len()))
    }

    fn once(&mut self, trace: &Trace, launch: &Launch) -> Result<Vec<Memory>> {
        let allocate =
            |region: &Region| Memory::new(self.device, region.misalignment as usize, region.n_bytes as usize);
        let memory = launch.regions.iter().map(allocate).collect::<Result<Vec<_>>>()?;
        let addresses: Vec<u64> = memory.iter().map(Memory::address).collect();
        let read = |region: &Region| trace.bytes(region).context("cannot read the bytes of a region");
        let mut contents = launch.regions.iter().map(read).collect::<Result<Vec<_>>>()?;
        write_links(&launch.links, &mut contents, |to| address(&addresses, to))?;
        for ((region, memory), bytes) in launch.regions.iter().zip(&memory).zip(&contents) {
            if !(self.mode.leave_unwritten && region.unwritten) {
                memory.write(bytes)?;
            }
        }
        let argument = |(idx, value): (usize, &Value)| {
            argument(self.device, value, &addresses).with_context(|| format!("argument {idx}"))
        };
        let mut args = launch.args.iter().enumerate().map(argument).collect::<Result<Vec<_>>>()?;
        let function = &self.functions[&[launch.cubin.as_str(), launch.entry.as_str()]];
        let began = Instant::now();
        let launched = function.launch(launch.grid, launch.block, launch.shared_bytes, &mut args);
        let outcome = launched.and_then(|()| self.device.synchronize());
        self.spent.kernels += began.elapsed();
        outcome.map(|()| memory)
    }
}

/// The address of a place, given where the regions are.
fn address(addresses: &[u64], place: Place) -> Result<u64> {
    let Place { region, offset } = place;
    let start = addresses.get(region);
    Ok(start.with_context(|| format!("it is in region {region}, and the launch has {}", addresses.len()))? + offset)
}

/// Writes the addresses of tables into the bytes of their regions.
fn write_links(links: &[Link], contents: &mut [Vec<u8>], address: impl Fn(Place) -> Result<u64>) -> Result<()> {
    for link in links {
        let Place { region, offset } = link.at;
        let to = address(link.to).with_context(|| format!("the address at byte {offset} of region {region}"))?;
        let word = contents.get_mut(region).and_then(|bytes| bytes.get_mut(offset as usize..)?.first_chunk_mut());
        *word.with_context(|| format!("region {region} has no 8 bytes at {offset}"))? = to.to_le_bytes();
    }
    Ok(())
}

/// What the driver reads for an argument, given where the regions are.
fn argument(device: &Device, value: &Value, addresses: &[u64]) -> Result<Arg> {
    Ok(match *value {
        Value::Bits(bits) => Arg::Bits(bits),
        Value::Address(place) => Arg::Bits(address(addresses, place)?),
        Value::Boxes { matrix, map } => Arg::map(device, address(addresses, matrix)?, &map)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn place(region: usize, offset: u64) -> Place {
        Place { region, offset }
    }

    #[test]
    fn places_follow_their_regions() {
        assert_eq!(address(&[1000, 2000], place(1, 8)).unwrap(), 2008);
        let error = address(&[1000, 2000], place(2, 0)).unwrap_err().to_string();
        assert!(error.contains("region 2") && error.contains("has 2"), "{error}");
    }

    #[test]
    fn tables_get_the_addresses_of_the_replay() {
        let links = [
            Link { at: place(0, 8), to: place(1, 4) },
            Link { at: place(0, 16), to: place(0, 0) },
            Link { at: place(1, 0), to: place(1, 0) },
        ];
        let mut contents = vec![vec![7; 24], vec![0; 8]];
        write_links(&links, &mut contents, |to| address(&[1 << 40, 2000], to)).unwrap();
        assert_eq!(contents[0], [[7; 8], 2004_u64.to_le_bytes(), (1_u64 << 40).to_le_bytes()].concat());
        assert_eq!(contents[1], 2000_u64.to_le_bytes());
        for (at, to, named) in [
            (place(1, 1), place(0, 0), "no 8 bytes at 1"),
            (place(1, u64::MAX), place(0, 0), "region 1"),
            (place(2, 0), place(0, 0), "region 2"),
            (place(0, 0), place(3, 0), "region 3"),
        ] {
            let outcome = write_links(&[Link { at, to }], &mut contents, |to| address(&[0, 0], to));
            let error = format!("{:#}", outcome.unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }
}
