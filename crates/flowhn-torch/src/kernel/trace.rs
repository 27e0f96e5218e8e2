//! Recording launches, so that tools can watch the kernels in a process without libtorch.
//!
//! With `FLOWHN_KERNEL_TRACE=DIR` in the environment every launch is written to a trace in `DIR` (the crate `flowhn-trace` tells the
//! format) before it takes place: its code, its arguments, and the bytes that its tensors reach. Launches that differ in nothing but
//! the values of floating-point tensors are recorded once. Those whose tensors reach more than `FLOWHN_KERNEL_TRACE_MAX_BYTES`, 64 MiB
//! if that is not set, those that a CUDA graph captures, and those that reach memory through tables of addresses or maps of matrices, are
//! counted only. Recording waits for the device at every launch.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use flowhn_trace::{ALIGNMENT, Extent, Launch, Record, Region, Skipped, Value, Writer, regions};
use tch::Kind;
use xxhash_rust::xxh3::xxh3_128;

use super::{Arg, Kernel};
use crate::Result;

const DIR: &str = "FLOWHN_KERNEL_TRACE";
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
        let memory = regions(&call.args.iter().map(|arg| extent(*arg)).collect::<Vec<_>>());
        let n_bytes: u64 = memory.iter().map(|region| region.n_bytes).sum();
        let reason = if call.is_captured {
            Some("a CUDA graph captures it".to_owned())
        } else if call.args.iter().any(|arg| matches!(arg, Arg::Addresses(_))) {
            Some("it reaches memory through addresses in a table".to_owned())
        } else if call.args.iter().any(|arg| matches!(arg, Arg::Boxes(_))) {
            Some("it reaches memory through the map of a matrix".to_owned())
        } else if n_bytes > self.max_bytes {
            Some(format!("its tensors reach {n_bytes} bytes, {MAX_BYTES} is {}", self.max_bytes))
        } else {
            None
        };
        if let Some(reason) = reason {
            return state
                .writer
                .record(&Record::Skipped(Skipped { kernel: name(call.kernel), reason }))
                .map_err(written);
        }

        let args: Vec<Value> = call.args.iter().map(|arg| value(*arg, &memory)).collect();
        let mut like = shape(call, &memory, &args).into_bytes();
        // Indices and marks decide what a kernel does; other numbers do not.
        for region in memory.iter().filter(|region| kinds(call.args, region).any(|kind| !is_float(kind))) {
            like.extend(source.bytes(*region)?);
        }
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
        for region in &memory {
            let bytes = source.bytes(*region)?;
            regions.push(Region {
                misalignment: region.address % ALIGNMENT,
                n_bytes: region.n_bytes,
                at: state.writer.data(&bytes).map_err(written)?,
                unwritten: kinds(call.args, region).all(|kind| is_unwritten(kind, &bytes)),
            });
        }
        let macros: Vec<String> = call.kernel.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let launch = Launch {
            kernel: name(call.kernel),
            variant: macros.join(" "),
            cubin,
            entry: call.kernel.entry.to_owned(),
            grid: call.grid,
            block: call.block,
            shared_bytes: call.shared_bytes,
            regions,
            args,
        };
        state.writer.record(&Record::Launch(launch)).map_err(written)
    }
}

fn name(kernel: &Kernel) -> String {
    format!("{}/{}", kernel.source.name, kernel.entry)
}

/// The memory that an argument reaches; none for one that is no tensor.
fn extent(arg: Arg) -> Extent {
    match arg {
        Arg::Tensor(x) => {
            let element_bytes = x.kind().elt_size_in_bytes();
            Extent::of_strided(x.data_ptr() as u64, &x.size(), &x.stride(), element_bytes)
        }
        _ => Extent { address: 0, n_bytes: 0 },
    }
}

/// An argument as a place in these regions, or as it is. The address of an empty tensor means nothing, and is kept.
fn value(arg: Arg, memory: &[Extent]) -> Value {
    let extent = extent(arg);
    let holds = |region: &Extent| extent.n_bytes > 0 && region.contains(&extent);
    match memory.iter().position(holds) {
        Some(region) => Value::Address { region, offset: extent.address - memory[region].address },
        None => Value::Bits(arg.bits()),
    }
}

/// The dtypes of the tensors in a region.
fn kinds(args: &[Arg], region: &Extent) -> impl Iterator<Item = Kind> {
    args.iter().filter_map(|arg| match arg {
        Arg::Tensor(x) if x.numel() > 0 && region.contains(&extent(*arg)) => Some(x.kind()),
        _ => None,
    })
}

/// All of a launch but the contents of its tensors, in words.
fn shape(call: &Call, memory: &[Extent], args: &[Value]) -> String {
    let Call { kernel, variant, grid, block, shared_bytes, .. } = call;
    let entry = kernel.entry;
    let regions: Vec<[u64; 2]> = memory.iter().map(|region| [region.address % ALIGNMENT, region.n_bytes]).collect();
    let tensors: Vec<_> = call
        .args
        .iter()
        .map(|arg| match arg {
            Arg::Tensor(x) => Some((x.kind(), x.size(), x.stride())),
            _ => None,
        })
        .collect();
    format!("{variant} {entry} {grid:?} {block} {shared_bytes} {regions:?} {args:?} {tensors:?}")
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
    use flowhn_trace::Trace;
    use tch::{Device, Tensor};

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
        let Value::Address { region, offset: 12 } = launch.args[0] else { panic!("{:?}", launch.args) };
        assert_eq!(launch.args[1], Value::Address { region, offset: 0 });
        assert_eq!(launch.args[2], Value::Address { region: 1 - region, offset: 0 });
        let scalars = [Value::Bits(0), Value::Bits(0x3f00_0000), Value::Bits(0xffff_ffff), Value::Bits(0)];
        assert_eq!(launch.args[3..7], scalars);
        assert_eq!(launch.args[7], launch.args[0]);

        assert_eq!(launch.regions.len(), 2);
        let (views, own) = (launch.regions[region], launch.regions[1 - region]);
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
        let boxes = Arg::Boxes(Boxes { matrix: &x, n_rows: 8 });
        let (_folder, records) = recorded(400, false, &[&[boxes, Arg::Tensor(&half)]]);
        assert!(
            matches!(&records[..], [Record::Skipped(skipped)] if skipped.reason.contains("map of a matrix")),
            "{records:?}"
        );
    }
}
