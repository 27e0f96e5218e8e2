//! Recording launches, so that tools can watch the kernels in a process without libtorch.
//!
//! With `FLOWHN_KERNEL_TRACE=DIR` in the environment every launch is written to a trace in `DIR` (the crate `flowhn-trace` tells the
//! format) before it takes place: its code, its arguments, and the bytes that its tensors reach. Launches that differ in nothing but
//! the values of floating-point tensors are recorded once. Those whose tensors reach more than `FLOWHN_KERNEL_TRACE_MAX_BYTES`, 64 MiB
//! if that is not set, and those that a CUDA graph captures are counted only. Recording waits for the device at every launch.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use flowhn_trace::{ALIGNMENT, Extent, Launch, Link, Place, Record, Region, Skipped, Value, Writer, regions};
use tch::{Kind, Tensor};
use xxhash_rust::xxh3::xxh3_128;

use super::{Arg, Kernel};
use crate::Result;

/// The variable that names the folder of this process's trace.
pub const DIR: &str = "FLOWHN_KERNEL_TRACE";
const MAX_BYTES: &str = "FLOWHN_KERNEL_TRACE_MAX_BYTES";
const DEFAULT_MAX_BYTES: u64 = 64 << 20;

/// A launch that is about to take place.
pub(super) struct Call<'a> {
    pub(super) kernel: &'a Kernel<'a>,
    /// Stands for the variant on its device.
    pub(super) variant: u128,
    pub(super) grid: [u32; 3],
    pub(super) block: u32,
    pub(super) shared_bytes: usize,
    pub(super) args: &'a [Arg<'a>],
    /// Whether it goes into a CUDA graph instead of to the device.
    pub(super) is_captured: bool,
}

/// What the recorder asks of the device.
pub(super) trait Source {
    /// The machine code of the variant.
    fn cubin(&self) -> Result<Vec<u8>>;
    /// What the memory holds once all earlier work is done.
    fn bytes(&self, extent: Extent) -> Result<Vec<u8>>;
}

/// Writes launches to a trace.
pub(super) struct Recorder {
    max_bytes: u64,
    state: Mutex<State>,
}

struct State {
    writer: Writer,
    /// Launches that need not be recorded again.
    seen: HashSet<u128>,
    /// The files of the variants' code.
    cubins: HashMap<u128, String>,
}

/// The recorder of this process, if the environment asks for one.
pub(super) fn recorder(kernel: &Kernel) -> Result<Option<&'static Recorder>> {
    static RECORDER: OnceLock<std::result::Result<Option<Recorder>, String>> = OnceLock::new();
    let made = RECORDER.get_or_init(|| {
        let Some(dir) = std::env::var_os(DIR).filter(|dir| !dir.is_empty()) else { return Ok(None) };
        let max_bytes = match std::env::var(MAX_BYTES) {
            Ok(text) => text.parse().map_err(|_| format!("{MAX_BYTES}={text} is no number of bytes"))?,
            Err(_) => DEFAULT_MAX_BYTES,
        };
        Recorder::new(Path::new(&dir), max_bytes).map(Some).map_err(|error| {
            format!("no trace can be begun in {DIR}={}: {error}; name a new folder", dir.to_string_lossy())
        })
    });
    made.as_ref().map(Option::as_ref).map_err(|message| kernel.error(message.clone()))
}

impl Recorder {
    fn new(dir: &Path, max_bytes: u64) -> io::Result<Self> {
        let state = State { writer: Writer::create(dir)?, seen: HashSet::new(), cubins: HashMap::new() };
        Ok(Self { max_bytes, state: Mutex::new(state) })
    }

    /// Writes the launch down unless one like it has been.
    pub(super) fn record(&self, call: &Call, source: &dyn Source) -> Result<()> {
        let written = |error: io::Error| call.kernel.error(format!("its launch cannot be recorded: {error}"));
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let memory = Memory::of(call.args);
        let n_bytes: u64 = memory.regions.iter().map(|(region, _)| region.n_bytes).sum();
        let reason = if call.is_captured {
            Some("a CUDA graph captures it".to_owned())
        } else if n_bytes > self.max_bytes {
            Some(format!("its tensors reach {n_bytes} bytes, {MAX_BYTES} is {}", self.max_bytes))
        } else {
            None
        };
        if let Some(reason) = reason {
            let skipped = Skipped { kernel: name(call.kernel), variant: macros(call.kernel), grid: call.grid, reason };
            return state.writer.record(&Record::Skipped(skipped)).map_err(written);
        }

        let args = call.args.iter().map(|arg| value(*arg, &memory)).collect::<std::result::Result<Vec<_>, _>>();
        let args = args.map_err(|message| call.kernel.error(message))?;
        // Indices and marks decide what a kernel does; other numbers do not.
        let decides = |kinds: &[Kind]| kinds.iter().any(|&kind| !is_float(kind));
        let content = |(region, kinds): &(Extent, Vec<Kind>)| decides(kinds).then(|| source.bytes(*region)).transpose();
        let mut contents = memory.regions.iter().map(content).collect::<Result<Vec<_>>>()?;
        let links = links(call.args, &memory, &mut contents);
        let mut like = shape(call, &memory, &args, &links).into_bytes();
        contents.iter().flatten().for_each(|bytes| like.extend(bytes));
        if !state.seen.insert(xxh3_128(&like)) {
            return Ok(());
        }
        let cubin = match state.cubins.get(&call.variant) {
            Some(name) => name.clone(),
            None => {
                let name = state.writer.cubin(&source.cubin()?).map_err(written)?;
                state.cubins.insert(call.variant, name.clone());
                name
            }
        };
        let mut regions = Vec::new();
        for ((region, kinds), bytes) in memory.regions.iter().zip(contents) {
            let bytes = bytes.map_or_else(|| source.bytes(*region), Ok)?;
            regions.push(Region {
                misalignment: region.address % ALIGNMENT,
                n_bytes: region.n_bytes,
                at: state.writer.data(&bytes).map_err(written)?,
                unwritten: kinds.iter().all(|kind| is_unwritten(*kind, &bytes)),
            });
        }
        let launch = Launch {
            kernel: name(call.kernel),
            variant: macros(call.kernel),
            cubin,
            entry: call.kernel.entry.to_owned(),
            grid: call.grid,
            block: call.block,
            shared_bytes: call.shared_bytes,
            regions,
            links,
            args,
        };
        state.writer.record(&Record::Launch(launch)).map_err(written)
    }
}

fn name(kernel: &Kernel) -> String {
    format!("{}/{}", kernel.source.name, kernel.entry)
}

fn macros(kernel: &Kernel) -> String {
    kernel.defines.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
}

/// The memory that the tensors of a launch reach.
struct Memory {
    /// With the dtypes of the tensors in them, in the order in which the arguments come to them: launches are alike wherever an
    /// allocator puts their tensors.
    regions: Vec<(Extent, Vec<Kind>)>,
    /// By address, with their numbers.
    sorted: Vec<(Extent, usize)>,
}

impl Memory {
    fn of(args: &[Arg]) -> Self {
        let tensors: Vec<&Tensor> = args.iter().flat_map(|arg| tensors(*arg)).collect();
        let joined = regions(&tensors.iter().map(|x| extent(x)).collect::<Vec<_>>());
        let n_regions = joined.len();
        let mut memory =
            Self { regions: Vec::new(), sorted: joined.into_iter().map(|region| (region, n_regions)).collect() };
        for x in tensors {
            let Some(idx) = memory.find(&extent(x)) else { continue };
            let (region, number) = &mut memory.sorted[idx];
            if *number == n_regions {
                *number = memory.regions.len();
                memory.regions.push((*region, Vec::new()));
            }
            memory.regions[*number].1.push(x.kind());
        }
        memory
    }

    /// Which of the sorted regions holds an extent; none holds an empty one.
    fn find(&self, extent: &Extent) -> Option<usize> {
        let n_before = self.sorted.partition_point(|(region, _)| region.address <= extent.address);
        let idx = n_before.checked_sub(1)?;
        (extent.n_bytes > 0 && self.sorted[idx].0.contains(extent)).then_some(idx)
    }

    /// Where a tensor's first element is, if it has one.
    fn place(&self, x: &Tensor) -> Option<Place> {
        let extent = extent(x);
        let (region, number) = self.sorted[self.find(&extent)?];
        Some(Place { region: number, offset: extent.address - region.address })
    }
}

/// The tensors that an argument reaches.
fn tensors<'a>(arg: Arg<'a>) -> impl Iterator<Item = &'a Tensor> {
    let reached = if let Arg::Addresses { reached, .. } = arg { reached } else { &[] };
    arg.tensor().into_iter().chain(reached.iter().copied())
}

fn extent(x: &Tensor) -> Extent {
    Extent::of_strided(x.data_ptr() as u64, &x.size(), &x.stride(), x.kind().elt_size_in_bytes())
}

/// An argument as a place in the memory, or as it is. The address of an empty tensor means nothing, and is kept.
fn value(arg: Arg, memory: &Memory) -> std::result::Result<Value, String> {
    Ok(match (arg, arg.tensor().and_then(|x| memory.place(x))) {
        (Arg::Boxes(boxes), Some(matrix)) => Value::Boxes { matrix, map: boxes.form()? },
        (_, Some(place)) => Value::Address(place),
        (_, None) => Value::Bits(arg.bits()),
    })
}

/// What the tables among the arguments lead to, if the regions of tables are read; there the addresses become 0.
fn links(args: &[Arg], memory: &Memory, contents: &mut [Option<Vec<u8>>]) -> Vec<Link> {
    let mut links = Vec::new();
    for arg in args {
        let Arg::Addresses { table, reached } = *arg else { continue };
        let Some(start) = memory.place(table) else { continue };
        let Some(bytes) = &mut contents[start.region] else { continue };
        let targets: HashMap<u64, Place> =
            reached.iter().filter_map(|x| Some((x.data_ptr() as u64, memory.place(x)?))).collect();
        let words = bytes[start.offset as usize..][..8 * table.numel()].as_chunks_mut::<8>().0;
        for (word, offset) in words.iter_mut().zip((start.offset..).step_by(8)) {
            if let Some(to) = targets.get(&u64::from_le_bytes(*word)) {
                *word = [0; 8];
                links.push(Link { at: Place { region: start.region, offset }, to: *to });
            }
        }
    }
    links
}

/// All of a launch but the contents of its tensors, in words.
fn shape(call: &Call, memory: &Memory, args: &[Value], links: &[Link]) -> String {
    let Call { kernel, variant, grid, block, shared_bytes, .. } = call;
    let entry = kernel.entry;
    let of_region = |(region, _): &(Extent, _)| [region.address % ALIGNMENT, region.n_bytes];
    let regions: Vec<[u64; 2]> = memory.regions.iter().map(of_region).collect();
    let tensors: Vec<_> =
        call.args.iter().flat_map(|arg| tensors(*arg)).map(|x| (x.kind(), x.size(), x.stride())).collect();
    format!("{variant} {entry} {grid:?} {block} {shared_bytes} {regions:?} {args:?} {links:?} {tensors:?}")
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double)
}

/// Whether bytes are nothing but what libtorch fills new memory with in deterministic mode: NaN, or the largest integer.
fn is_unwritten(kind: Kind, bytes: &[u8]) -> bool {
    match kind {
        Kind::Float => bytes.as_chunks().0.iter().all(|&x| f32::from_le_bytes(x).is_nan()),
        Kind::BFloat16 => bytes.as_chunks().0.iter().all(|&x| half::bf16::from_le_bytes(x).is_nan()),
        Kind::Int => bytes.as_chunks().0.iter().all(|&x| i32::from_le_bytes(x) == i32::MAX),
        Kind::Int64 => bytes.as_chunks().0.iter().all(|&x| i64::from_le_bytes(x) == i64::MAX),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use flowhn_trace::{BoxMap, Trace};
    use tch::Device;

    use super::*;
    use crate::kernel::{Boxes, KernelSource};

    static SOURCE: KernelSource = KernelSource { name: "k.cu", text: "", headers: &[] };

    /// The memory of the CPU in the place of a device's.
    struct Host;

    impl Source for Host {
        fn cubin(&self) -> Result<Vec<u8>> {
            Ok(b"\x7fELF".to_vec())
        }

        fn bytes(&self, extent: Extent) -> Result<Vec<u8>> {
            // SAFETY: the extent is that of tensors of the CPU that the test holds.
            let bytes = unsafe { std::slice::from_raw_parts(extent.address as *const u8, extent.n_bytes as usize) };
            Ok(bytes.to_vec())
        }
    }

    /// Records these argument lists as launches of one kernel, one after the other.
    fn recorded(max_bytes: u64, is_captured: bool, launches: &[&[Arg]]) -> (tempfile::TempDir, Vec<Record>) {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::new(folder.path(), max_bytes).unwrap();
        let kernel = Kernel { source: &SOURCE, entry: "k", defines: &[("X_KIND", 1), ("N", -2)] };
        for args in launches {
            let call =
                Call { kernel: &kernel, variant: 1, grid: [2, 1, 1], block: 64, shared_bytes: 16, args, is_captured };
            recorder.record(&call, &Host).unwrap();
        }
        let records = Trace::open(folder.path()).unwrap().records().unwrap();
        (folder, records)
    }

    fn launch(record: &Record) -> &Launch {
        match record {
            Record::Launch(launch) => launch,
            Record::Skipped(skipped) => panic!("{skipped:?}"),
        }
    }

    #[test]
    fn views_of_one_tensor_share_its_region_and_others_have_their_own() {
        let x = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([3, 8]);
        let (left, right) = (x.narrow(1, 1, 3), x.narrow(1, 4, 4));
        let out = Tensor::full([5], f64::NAN, (Kind::BFloat16, Device::Cpu));
        let empty = Tensor::zeros([0, 4], (Kind::Float, Device::Cpu));
        let args = [
            Arg::Tensor(&right),
            Arg::Tensor(&left),
            Arg::Tensor(&out),
            Arg::Null,
            Arg::F32(0.5),
            Arg::I32(-1),
            Arg::Tensor(&empty),
            Arg::Tensor(&right),
        ];
        let (folder, records) = recorded(1000, false, &[&args]);
        let launch = launch(&records[0]);
        assert_eq!((launch.kernel.as_str(), launch.variant.as_str()), ("k.cu/k", "X_KIND=1 N=-2"));
        let address = |region, offset| Value::Address(Place { region, offset });
        assert_eq!(launch.args[..3], [address(0, 12), address(0, 0), address(1, 0)]);
        let scalars = [Value::Bits(0), Value::Bits(0x3f00_0000), Value::Bits(0xffff_ffff), Value::Bits(0)];
        assert_eq!(launch.args[3..7], scalars);
        assert_eq!(launch.args[7], launch.args[0]);

        assert_eq!(launch.regions.len(), 2);
        let (views, own) = (launch.regions[0], launch.regions[1]);
        assert_eq!(views.misalignment, left.data_ptr() as u64 % 256);
        assert!(!views.unwritten && own.unwritten && own.n_bytes == 10, "{views:?} {own:?}");
        let trace = Trace::open(folder.path()).unwrap();
        let bytes = trace.bytes(&views).unwrap();
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        assert_eq!(numbers, (1..24).map(|i| i as f32).collect::<Vec<_>>());
        assert_eq!(trace.cubin(&launch.cubin).unwrap(), b"\x7fELF");
    }

    #[test]
    fn launches_are_alike_but_for_floating_point_values() {
        let [mut x, mut ids] = [Kind::Float, Kind::Int].map(|kind| Tensor::ones([4], (kind, Device::Cpu)));
        let n_recorded = |launches: &[&[Arg]]| recorded(1000, false, launches).1.len();
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::new(folder.path(), 1000).unwrap();
        let kernel = Kernel { source: &SOURCE, entry: "k", defines: &[] };
        let record = |x: &Tensor, ids: &Tensor| {
            let args = [Arg::Tensor(x), Arg::Tensor(ids)];
            let call = Call {
                kernel: &kernel,
                variant: 1,
                grid: [1; 3],
                block: 32,
                shared_bytes: 0,
                args: &args,
                is_captured: false,
            };
            recorder.record(&call, &Host).unwrap();
            Trace::open(folder.path()).unwrap().records().unwrap().len()
        };
        assert_eq!(record(&x, &ids), 1);
        let _ = x.fill_(3.);
        assert_eq!(record(&x, &ids), 1, "other values");
        let _ = ids.fill_(3);
        assert_eq!(record(&x, &ids), 2, "other indices");
        assert_eq!(record(&x.expand([2, 4], false), &ids), 3, "another shape");

        assert_eq!(n_recorded(&[&[Arg::Tensor(&x), Arg::I64(1)], &[Arg::Tensor(&x), Arg::I64(2)]]), 2);
        let y = x.copy();
        let alias: [&[Arg]; 2] = [&[Arg::Tensor(&x), Arg::Tensor(&y)], &[Arg::Tensor(&x), Arg::Tensor(&x)]];
        assert_eq!(n_recorded(&alias), 2, "in place is another launch");
        // As many bytes apart as addresses are kept modulo.
        let both = Tensor::ones([128], (Kind::Float, Device::Cpu));
        let [x, y] = [0, ALIGNMENT as i64 / 4].map(|start| both.narrow(0, start, 4));
        let swapped: [&[Arg]; 2] = [&[Arg::Tensor(&x), Arg::Tensor(&y)], &[Arg::Tensor(&y), Arg::Tensor(&x)]];
        assert_eq!(n_recorded(&swapped), 1, "which of them comes first in memory does not matter");
    }

    #[test]
    fn tables_lead_to_tensors_and_keep_their_numbers() {
        let tensors = [3, 0, 5].map(|n| Tensor::ones([n], (Kind::Float, Device::Cpu)));
        let [three, none, five] = &tensors;
        let inside = five.narrow(0, 2, 3);
        let address = |x: &Tensor| x.data_ptr() as i64;
        let table = Tensor::from_slice(&[0, address(five), 3, address(&inside), address(three), 4096]).view([2, 3]);
        let args =
            [Arg::I32(2), Arg::Addresses { table: &table, reached: &[three, none, five, &inside] }, Arg::Tensor(three)];
        let (folder, records) = recorded(1000, false, &[&args]);
        let launch = launch(&records[0]);
        let place = |region, offset| Place { region, offset };
        assert_eq!(launch.args[1..], [Value::Address(place(0, 0)), Value::Address(place(1, 0))]);
        assert_eq!(launch.regions.iter().map(|region| region.n_bytes).collect::<Vec<_>>(), [48, 12, 20]);
        let want = [(8, place(2, 0)), (24, place(2, 8)), (32, place(1, 0))];
        assert_eq!(launch.links, want.map(|(offset, to)| Link { at: place(0, offset), to }));
        let bytes = Trace::open(folder.path()).unwrap().bytes(&launch.regions[0]).unwrap();
        let words: Vec<i64> = bytes.as_chunks().0.iter().map(|&word| i64::from_le_bytes(word)).collect();
        assert_eq!(words, [0, 0, 3, 0, 0, 4096]);

        // Elsewhere in memory it is the same launch.
        let moved = [three.copy(), five.copy()];
        let words = [0, address(&moved[1]), 3, address(&moved[1]) + 8, address(&moved[0]), 4096];
        let other_table = Tensor::from_slice(&words).view([2, 3]);
        let inside = moved[1].narrow(0, 2, 3);
        let reached = [&moved[0], none, &moved[1], &inside];
        let other = [args[0], Arg::Addresses { table: &other_table, reached: &reached }, Arg::Tensor(&moved[0])];
        let alike = |x: &Tensor, y: &Tensor| (address(x) - address(y)) % ALIGNMENT as i64 == 0;
        let is_alike = alike(&table, &other_table) && moved.iter().zip([three, five]).all(|(moved, x)| alike(moved, x));
        assert_eq!(recorded(1000, false, &[&args, &other]).1.len(), if is_alike { 1 } else { 2 });
    }

    #[test]
    fn maps_of_matrices_are_kept_as_what_they_are_made_from() {
        let matrix = Tensor::zeros([4, 64], (Kind::BFloat16, Device::Cpu));
        let part = matrix.narrow(0, 1, 3).narrow(1, 8, 20);
        let boxes = |matrix| Arg::Boxes(Boxes { matrix, n_rows: 8 });
        let (_folder, records) = recorded(1000, false, &[&[Arg::Tensor(&matrix), boxes(&part)]]);
        let map = BoxMap { n_axes: 2, size: [20, 3, 1, 1], strides: [128, 16, 16], box_size: [64, 8, 1, 1] };
        assert_eq!(launch(&records[0]).args[1], Value::Boxes { matrix: Place { region: 0, offset: 144 }, map });
        let (_folder, records) = recorded(1000, false, &[&[boxes(&part)]]);
        assert_eq!(launch(&records[0]).regions[0].n_bytes, 2 * 128 + 40, "nothing behind the last row");
    }

    #[test]
    fn large_and_captured_launches_are_counted() {
        let x = Tensor::zeros([10, 10], (Kind::Float, Device::Cpu));
        let half = x.narrow(0, 0, 5);
        let reason =
            |max_bytes, is_captured, x: &Tensor| match &recorded(max_bytes, is_captured, &[&[Arg::Tensor(x)]]).1[..] {
                [Record::Skipped(skipped)] => Some(skipped.reason.clone()),
                [Record::Launch(_)] => None,
                other => panic!("{other:?}"),
            };
        assert_eq!(
            reason(399, false, &x).unwrap(),
            "its tensors reach 400 bytes, FLOWHN_KERNEL_TRACE_MAX_BYTES is 399"
        );
        assert_eq!(reason(400, false, &x), None);
        assert_eq!(reason(399, false, &half), None, "a view counts for what it reaches");
        assert!(reason(400, true, &x).unwrap().contains("CUDA graph"));
    }
}
