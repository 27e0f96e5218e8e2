//! Kernel launches, right ones and wrong ones.

use tch::{Device, Kind, Tensor};

use super::{all_equal, ensure, error_of, of_cuda};
use crate::kernel::memset::{SET_MEMORY, THREADS};
use crate::kernel::{Arg, Boxes, ColumnSums, Kernel, KernelSource, compile, kind_define};
use crate::testing::Case;
use crate::{CaptureMode, DeviceProperties, Error, Graph, Priority, Result, Stream, record_stream};

/// `y = factor * x`; block `i` also uses dynamic shared memory, one float a thread.
const SCALE: KernelSource = KernelSource {
    name: "selftest_scale.cu",
    text: r#"
#include "flowhn.cuh"
#include "smem.cuh"
typedef DtypeOf<X_KIND>::type X;
extern "C" __global__ void selftest_scale(const X* x, X* y, int n, float factor) {
    float* staged = (float*)shared_memory();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    staged[threadIdx.x] = i < n ? to_f32(x[i]) : 0.f;
    __syncthreads();
    if (i < n) y[i] = from_f32<X>(factor * staged[threadIdx.x]);
}
"#,
    headers: &[],
};

/// Copies a matrix in boxes of 8 rows and 64 columns, a block each; adds up what it found, outside the matrix too.
const COPY: KernelSource = KernelSource {
    name: "selftest_boxes.cu",
    text: r#"
#include "flowhn.cuh"
#include "smem.cuh"
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
extern "C" __global__ void selftest_boxes(const __grid_constant__ BoxMap from, const __grid_constant__ BoxMap to, float* sums) {
    const bf16* found = (const bf16*)shared_memory();
    unsigned box = smem_address(found), barrier = box + 1024;
    int column = blockIdx.x * 64, row = blockIdx.y * 8;
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, 1024);
    box_load(box, from, column, row, barrier);
    mbarrier_wait(barrier, 0);
    float sum = 0.f;
    for (int i = 0; i < 512; i++) sum += to_f32(found[i]);
    sums[blockIdx.y * gridDim.x + blockIdx.x] = sum;
    box_store(to, column, row, box);
    box_commit();
    box_wait_read<0>();
}
#endif
"#,
    headers: &[],
};

/// `y = x + 1`, taking its time, and letting the next kernel start at once; one that waits for the kernel in front adds 1 again.
const CHAIN: KernelSource = KernelSource {
    name: "selftest_chain.cu",
    text: r#"
#include "flowhn.cuh"
extern "C" __global__ void selftest_first(const float* x, float* y, int n) {
    let_next_kernel_start();
    for (long long end = device_nanoseconds() + 20000; device_nanoseconds() < end;) {}
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + 1.f;
}
extern "C" __global__ void selftest_next(const float* x, float* y, int n) {
    wait_for_kernel_in_front();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + 1.f;
}
"#,
    headers: &[],
};

const BLOCK: u32 = 128;
const N: i64 = 1000;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("kernel: f32 and bf16 on the default stream and another", runs),
        Case::new("kernel: a matrix copied in boxes", boxes),
        Case::new("kernel: one that starts early finds what the one in front wrote", early_start),
        Case::new("kernel: sums of columns over blocks", column_sums),
        of_cuda("kernel: memory is set as a memset sets it", set_memory),
        Case::new("kernel: wrong arguments are refused", wrong_arguments),
        Case::new("kernel: tensors of another device are refused", wrong_device),
        Case::new("kernel: too much shared memory is refused", too_much_shared_memory),
        Case::new("kernel: what does not compile is told with file and line", does_not_compile),
    ]
}

fn launch(x: &Tensor, y: &Tensor, shared_bytes: usize, last: &[Arg]) -> Result<()> {
    let defines = [("X_KIND", kind_define("selftest_scale", "x", x)?)];
    let kernel = Kernel { source: &SCALE, entry: "selftest_scale", defines: &defines };
    let n_blocks = (x.numel() as u32).div_ceil(BLOCK);
    let args = [&[Arg::Tensor(x), Arg::Tensor(y)], last].concat();
    kernel.launch([n_blocks, 1, 1], BLOCK, shared_bytes, &args)
}

const SHARED_BYTES: usize = 4 * BLOCK as usize;
const RIGHT: [Arg; 2] = [Arg::I32(N as i32), Arg::F32(3.)];

/// On the CPU, where no kernel runs, the variant has to compile and the launch to be refused by name.
fn on_the_cpu(x: &Tensor, y: &Tensor) -> Result<String> {
    for kind in [0, 1] {
        let compiled = compile(&SCALE, &[("X_KIND", kind)], "sm_90a")?;
        ensure(compiled.entries.len() == 1, || format!("{:?}", compiled.entries))?;
    }
    let message = error_of(launch(x, y, SHARED_BYTES, &RIGHT))?;
    ensure(message.contains("Cpu, expected a CUDA device"), || message.clone())?;
    Ok("compiles; refused on the CPU".to_owned())
}

fn inputs(kind: Kind, device: Device) -> Result<(Tensor, Tensor)> {
    Ok((Tensor::f_full([N], 2., (kind, device))?, Tensor::f_full([N], f64::NAN, (kind, device))?))
}

fn runs(device: Device) -> Result<String> {
    for kind in [Kind::Float, Kind::BFloat16] {
        let (x, y) = inputs(kind, device)?;
        let Device::Cuda(device_idx) = device else { return on_the_cpu(&x, &y) };
        launch(&x, &y, SHARED_BYTES, &RIGHT)?;
        all_equal(&y, 6.)?;
        let (x, y) = inputs(kind, device)?;
        Stream::current(device_idx)?.synchronize()?;
        let side = Stream::from_pool(device_idx, Priority::Normal)?;
        {
            let _guard = side.enter()?;
            record_stream(&x, side)?;
            record_stream(&y, side)?;
            launch(&x, &y, SHARED_BYTES, &RIGHT)?;
        }
        side.synchronize()?;
        all_equal(&y, 6.)?;
    }
    Ok(String::new())
}

/// The matrix lies in wider ones; what is beside it is neither read nor written.
fn boxes(device: Device) -> Result<String> {
    compile(&COPY, &[], "sm_90a")?;
    let kernel = Kernel { source: &COPY, entry: "selftest_boxes", defines: &[] };
    let Device::Cuda(device_idx) = device else { return Ok("compiles".to_owned()) };
    if DeviceProperties::of(device_idx)?.compute_capability != 90 {
        return Ok("for compute capability 9.0 alone".to_owned());
    }
    let wide = || -> Result<Tensor> { Ok(Tensor::f_full([25, 216], f64::NAN, (Kind::BFloat16, device))?) };
    let inside = |x: &Tensor| -> Result<Tensor> { Ok(x.f_narrow(0, 2, 21)?.f_narrow(1, 8, 200)?) };
    let (from, to) = (inside(&wide()?)?.f_fill_(1.)?, wide()?);
    let sums = Tensor::f_zeros([3, 4], (Kind::Float, device))?;
    let matrix = inside(&to)?;
    let arg = |matrix, n_rows| Arg::Boxes(Boxes { matrix, n_rows });
    kernel.launch([4, 3, 1], 1, 1024 + 8, &[arg(&from, 8), arg(&matrix, 8), Arg::Tensor(&sums)])?;
    all_equal(&matrix, 1.)?;
    let n_written = to.f_isnan()?.f_logical_not()?.f_sum(Kind::Int64)?.int64_value(&[]);
    ensure(n_written == 21 * 200, || format!("{n_written} elements were written"))?;
    let n_found = sums.f_sum(Kind::Float)?.double_value(&[]);
    ensure(n_found == 21. * 200., || format!("the boxes add up to {n_found}"))?;
    let message =
        error_of(kernel.launch([1, 1, 1], 1, 1024 + 8, &[arg(&from.tr(), 8), arg(&matrix, 8), Arg::Tensor(&sums)]))?;
    ensure(message.contains("dense rows at multiples of 16 bytes"), || message.clone())?;
    Ok(String::new())
}

/// A slow kernel and two that start early behind it, in a stream and in a graph.
fn early_start(device: Device) -> Result<String> {
    compile(&CHAIN, &[], "sm_80")?;
    compile(&CHAIN, &[], "sm_90a")?;
    let Device::Cuda(device_idx) = device else { return Ok("compiles".to_owned()) };
    let side = Stream::from_pool(device_idx, Priority::Normal)?;
    let _guard = side.enter()?;
    let [mut x, one, two, three] = [0; 4].map(|_| Tensor::zeros([N], (Kind::Float, device)));
    let chain = |x: &Tensor| -> Result<()> {
        let kernel = |entry| Kernel { source: &CHAIN, entry, defines: &[] };
        let grid = [(N as u32).div_ceil(BLOCK), 1, 1];
        let args = |x, y| [Arg::Tensor(x), Arg::Tensor(y), Arg::I32(N as i32)];
        kernel("selftest_first").launch(grid, BLOCK, 0, &args(x, &one))?;
        kernel("selftest_next").launch_early(grid, BLOCK, 0, &args(&one, &two))?;
        kernel("selftest_next").launch_early(grid, BLOCK, 0, &args(&two, &three))
    };
    let mut graph = Graph::new()?;
    chain(&x)?;
    side.synchronize()?;
    graph.capture(None, CaptureMode::ThreadLocal, || chain(&x))?;
    for round in 0..20 {
        let value = f64::from(2 * round);
        let _ = x.f_fill_(value)?;
        chain(&x)?;
        // What follows in its turn comes after all three.
        all_equal(&three.copy(), value + 3.)?;
        let _ = x.f_fill_(value + 1.)?;
        graph.replay()?;
        all_equal(&three.copy(), value + 4.)?;
    }
    Ok(String::new())
}

/// Sums of small whole numbers, exact in any order; widths with and without four neighbours, and sums that nobody wants.
fn column_sums(device: Device) -> Result<String> {
    if device == Device::Cpu {
        let message = error_of(ColumnSums::new(&[(3, true)], 4, device)?.totals(Kind::Float))?;
        ensure(message.contains("Cpu, expected a CUDA device"), || message.clone())?;
        return Ok("refused on the CPU".to_owned());
    }
    for d in [1, 8, 67, 250, 2048] {
        for [first, second] in [[1, 0], [2, 131], [264, 3], [1000, 700]] {
            let sums = ColumnSums::new(&[(first, true), (5, false), (second, true)], d, device)?;
            let Arg::Tensor(partials) = sums.arg() else { return Err(Error::invalid("column_sums", "no room")) };
            let n_rows = first + 5 + second;
            let rows = Tensor::f_arange(n_rows * d, (Kind::Int64, device))?.f_remainder(1009)?.f_view([n_rows, d])?;
            partials.shallow_clone().f_copy_(&rows)?;
            let want = |start, n| -> Result<Tensor> {
                Ok(rows.f_narrow(0, start, n)?.f_sum_dim_intlist(&[0_i64][..], false, Kind::Float)?)
            };
            let want = [Some(want(0, first)?), None, Some(want(first + 5, second)?)];
            for (got, want) in sums.totals(Kind::Float)?.iter().zip(&want) {
                let is_right = match (got, want) {
                    (Some(got), Some(want)) => got.f_equal(want)?,
                    (got, want) => got.is_none() && want.is_none(),
                };
                ensure(is_right, || format!("{first} and {second} blocks of {d} columns: {got:?}, not {want:?}"))?;
            }
        }
    }
    Ok(String::new())
}

/// What the small memsets of a graph become, alone: elements of each size, and nothing beside them.
fn set_memory(device_idx: usize) -> Result<String> {
    const FIRST: i64 = 3;
    for (kind, element_bytes, value) in [(Kind::Uint8, 1, 0x5a), (Kind::Int16, 2, 0x1234), (Kind::Int, 4, 0x1234_5678)]
    {
        let x = Tensor::f_zeros([N], (kind, Device::Cuda(device_idx)))?;
        let n = N - 2 * FIRST;
        let part = x.f_narrow(0, FIRST, n)?;
        let args = [Arg::Tensor(&part), Arg::I32(value), Arg::I32(element_bytes), Arg::I32(n as i32)];
        SET_MEMORY.launch([1, 1, 1], THREADS, 0, &args)?;
        all_equal(&part, f64::from(value))?;
        all_equal(&x.f_narrow(0, 0, FIRST)?, 0.)?;
        all_equal(&x.f_narrow(0, N - FIRST, FIRST)?, 0.)?;
    }
    Ok("elements of 1, 2 and 4 bytes".to_owned())
}

fn wrong_arguments(device: Device) -> Result<String> {
    let (x, y) = inputs(Kind::Float, device)?;
    if device == Device::Cpu {
        return on_the_cpu(&x, &y);
    }
    for wrong in [&RIGHT[..1], &[Arg::I64(N), Arg::F32(3.)], &[Arg::I32(N as i32), Arg::F32(3.), Arg::Null]] {
        let message = error_of(launch(&x, &y, SHARED_BYTES, wrong))?;
        ensure(message.contains("it takes [8, 8, 4, 4]"), || message.clone())?;
    }
    let error = kind_define("selftest_scale", "x", &x.to_kind(Kind::Double)).err();
    ensure(matches!(error, Some(Error::Dtype { arg: "x", .. })), || format!("doubles: {error:?}"))?;
    // Nothing of it was launched, and the device goes on.
    launch(&x, &y, SHARED_BYTES, &RIGHT)?;
    all_equal(&y, 6.)?;
    Ok(String::new())
}

fn wrong_device(device: Device) -> Result<String> {
    let (x, y) = inputs(Kind::Float, device)?;
    if device == Device::Cpu {
        return on_the_cpu(&x, &y);
    }
    let (on_cpu, _) = inputs(Kind::Float, Device::Cpu)?;
    for (x, y) in [(&x, &on_cpu), (&on_cpu, &y)] {
        let outcome = launch(x, y, SHARED_BYTES, &RIGHT);
        ensure(matches!(outcome, Err(Error::Device { .. })), || format!("{outcome:?}"))?;
    }
    Ok(String::new())
}

fn too_much_shared_memory(device: Device) -> Result<String> {
    let (x, y) = inputs(Kind::Float, device)?;
    if device == Device::Cpu {
        return on_the_cpu(&x, &y);
    }
    let message = error_of(launch(&x, &y, 1 << 20, &RIGHT))?;
    ensure(message.contains("1048576 bytes of shared memory"), || message.clone())?;
    // More than a block gets unasked is there for those who ask.
    launch(&x, &y, 64 << 10, &RIGHT)?;
    all_equal(&y, 6.)?;
    Ok(String::new())
}

fn does_not_compile(_: Device) -> Result<String> {
    const BROKEN: KernelSource =
        KernelSource { name: "selftest_broken.cu", text: "__global__ void f() {\n  nothing();\n}\n", headers: &[] };
    let message = error_of(compile(&BROKEN, &[], "sm_90a"))?;
    ensure(message.contains("selftest_broken.cu(2)"), || message.clone())?;
    Ok(String::new())
}
