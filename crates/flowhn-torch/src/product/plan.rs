//! One way of cuBLASLt to do the products of some sizes.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::cublaslt::{result, sys};
use tch::{Device, Kind, Tensor};

use super::Sum;
use crate::kernel::driver::{Context, is_captured};
use crate::{Error, Result, Stream};

/// Proposals to ask for.
const N_PROPOSALS: usize = 8;
/// The most memory that a way may take besides its operands.
static MAX_WORKSPACE_BYTES: u64 = 32 << 20;
/// Addresses are multiples of this, as cuBLASLt supposes unless told otherwise.
const ALIGNMENT: usize = 256;

/// What a choice depends on. A factor is `transposed` if its columns are dense instead of its rows; `stride` counts elements from one of these to
/// the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sizes {
    device_idx: usize,
    m: u64,
    n: u64,
    k: u64,
    a: Factor,
    b: Factor,
    is_f32: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Factor {
    transposed: bool,
    stride: i64,
}

impl Factor {
    /// `None` where neither rows nor columns are dense, or where they are no multiples of 16 bytes apart.
    fn of(tensor: &Tensor) -> Option<Self> {
        let (size, stride) = (tensor.size(), tensor.stride());
        let factor = match (stride[0], stride[1]) {
            (row, 1) if row >= size[1] => Self { transposed: false, stride: row },
            (1, column) if column >= size[0] => Self { transposed: true, stride: column },
            _ => return None,
        };
        (factor.stride % 8 == 0).then_some(factor)
    }
}

impl Sizes {
    /// `None` for operands that are no matrices, do not fit each other or have gaps that cuBLASLt does not take.
    pub(super) fn of(device_idx: usize, a: &Tensor, b: &Tensor, out: &Tensor) -> Option<Self> {
        let ([m, k], [inner, n]) = (matrix(a)?, matrix(b)?);
        if k != inner || [m, n, k].contains(&0) || matrix(out)? != [m, n] || n % 8 != 0 || !out.is_contiguous() {
            return None;
        }
        let is_f32 = out.kind() == Kind::Float;
        Some(Self { device_idx, m, n, k, a: Factor::of(a)?, b: Factor::of(b)?, is_f32 })
    }

    pub(super) fn flops(&self) -> f64 {
        2. * self.m as f64 * self.n as f64 * self.k as f64
    }
}

/// Whether a tensor begins where cuBLASLt supposes.
pub(super) fn is_aligned(tensor: &Tensor) -> bool {
    (tensor.data_ptr() as usize).is_multiple_of(ALIGNMENT)
}

fn matrix(tensor: &Tensor) -> Option<[u64; 2]> {
    let size = tensor.size();
    <[i64; 2]>::try_from(size).ok().map(|size| size.map(|n| n as u64))
}

/// Whether there is a cuBLASLt to be asked.
pub(super) fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    // SAFETY: only looks whether the dynamic linker finds the library. libtorch has loaded one; should the linker find another, its
    // algorithms are held to the bits of libtorch's all the same.
    *THERE.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Descriptions of the operands as cuBLASLt has them. Its matrices have dense columns, so it is asked for the transposed product: `b` comes
/// first, then `a`, and a matrix of ours with dense rows is one of its own without a transposition.
struct Operands {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
}

// SAFETY: the descriptions are plain memory of the host that is only read once they are made.
unsafe impl Send for Operands {}
// SAFETY: as above.
unsafe impl Sync for Operands {}

impl Operands {
    fn new(sizes: &Sizes) -> std::result::Result<Self, result::CublasError> {
        let product =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        let mut operands = Self { product, layouts: [std::ptr::null_mut(); 3] };
        let transpositions = [
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, sizes.b.transposed),
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, sizes.a.transposed),
        ];
        for (attribute, transposed) in transpositions {
            let value = i32::from(transposed);
            // SAFETY: the description is alive, and the attribute is an int of 4 bytes.
            unsafe {
                result::set_matmul_desc_attribute(product, attribute, (&raw const value).cast(), size_of::<i32>())
            }?;
        }
        let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
        let factor = |factor: &Factor, rows, columns| match factor.transposed {
            false => result::create_matrix_layout(bf16, columns, rows, factor.stride),
            true => result::create_matrix_layout(bf16, rows, columns, factor.stride),
        };
        let out = if sizes.is_f32 { sys::cudaDataType_t::CUDA_R_32F } else { bf16 };
        operands.layouts[0] = factor(&sizes.b, sizes.k, sizes.n)?;
        operands.layouts[1] = factor(&sizes.a, sizes.m, sizes.k)?;
        operands.layouts[2] = result::create_matrix_layout(out, sizes.n, sizes.m, sizes.n as i64)?;
        Ok(operands)
    }
}

impl Drop for Operands {
    fn drop(&mut self) {
        // SAFETY: each was made by cuBLASLt and is destroyed once; the rest are null. What it answers changes nothing.
        unsafe {
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.product);
        }
    }
}

/// A way to do the products of some sizes.
pub(super) struct Plan {
    operands: Arc<Operands>,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
}

impl Plan {
    /// What cuBLASLt proposes, the best by its own estimate first.
    pub(super) fn proposals(device_idx: usize, sizes: &Sizes) -> Result<Vec<Self>> {
        let _context = Context::of_device(device_idx).map_err(unanswered)?;
        let operands = Arc::new(Operands::new(sizes).map_err(refused)?);
        let [b, a, out] = operands.layouts;
        let preference = Preference::new().map_err(refused)?;
        let mut found =
            [const { std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit() }; N_PROPOSALS];
        let mut n_found = 0;
        // SAFETY: all descriptions are alive, and there is room for as many results as are asked for.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle(device_idx)?,
                operands.product,
                b,
                a,
                out,
                out,
                preference.0,
                N_PROPOSALS as i32,
                found.as_mut_ptr().cast(),
                &mut n_found,
            )
        }
        .result()
        .map_err(refused)?;
        // SAFETY: cuBLASLt has written this many of them.
        let found = found.iter().take(n_found as usize).map(|found| unsafe { found.assume_init() });
        Ok(found
            .filter(|found| found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .map(|found| Self {
                operands: operands.clone(),
                algorithm: found.algo,
                workspace_bytes: found.workspaceSize,
            })
            .collect())
    }

    /// `out = a b`, or that added to `out`, on libtorch's current stream, for operands of the plan's sizes.
    pub(super) fn run(&self, device_idx: usize, a: &Tensor, b: &Tensor, out: &Tensor, sum: Sum) -> Result<()> {
        let workspace = match self.workspace_bytes {
            0 => None,
            n_bytes => Some(Tensor::f_empty([n_bytes as i64], (Kind::Uint8, Device::Cuda(device_idx)))?),
        };
        let stream = Stream::current(device_idx)?.native_handle()?;
        let _context = Context::of_device(device_idx).map_err(unanswered)?;
        let (one, old) = (1f32, if sum == Sum::Old { 1f32 } else { 0. });
        let [b_layout, a_layout, out_layout] = self.operands.layouts;
        // SAFETY: the operands have the sizes that the descriptions were made from, for those are the key under which plans are kept; the
        // workspace has as many bytes as the algorithm asks for. Their memory goes back to libtorch's allocator in the order of this
        // stream. The two numbers are read before the call returns.
        let outcome = unsafe {
            result::matmul(
                handle(device_idx)?,
                self.operands.product,
                (&raw const one).cast(),
                (&raw const old).cast(),
                b.data_ptr(),
                b_layout,
                a.data_ptr(),
                a_layout,
                out.data_ptr(),
                out_layout,
                out.data_ptr(),
                out_layout,
                &self.algorithm,
                workspace.as_ref().map_or(std::ptr::null_mut(), Tensor::data_ptr),
                self.workspace_bytes,
                stream.cast(),
            )
        };
        outcome.map_err(refused)
    }
}

/// Whether work on the current stream is captured, so that nothing can be timed.
pub(super) fn is_capturing(device_idx: usize) -> Result<bool> {
    is_captured(Stream::current(device_idx)?.native_handle()?.cast()).map_err(unanswered)
}

/// What to look for, destroyed when dropped.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> std::result::Result<Self, result::CublasError> {
        let preference = Self(result::create_matmul_pref()?);
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let value: *const c_void = (&raw const MAX_WORKSPACE_BYTES).cast();
        // SAFETY: the preference is alive, and the attribute is a number of 8 bytes.
        unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value, size_of::<u64>()) }?;
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by cuBLASLt and destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// cuBLASLt's own state for a device, whose context is current; for the life of the process.
fn handle(device_idx: usize) -> Result<sys::cublasLtHandle_t> {
    struct Handle(sys::cublasLtHandle_t);
    // SAFETY: cuBLASLt's functions may be called with one handle from any thread.
    unsafe impl Send for Handle {}
    static HANDLES: Mutex<BTreeMap<usize, Handle>> = Mutex::new(BTreeMap::new());
    let mut handles = HANDLES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(handle) = handles.get(&device_idx) {
        return Ok(handle.0);
    }
    let handle = result::create_handle().map_err(refused)?;
    handles.insert(device_idx, Handle(handle));
    Ok(handle)
}

fn refused(error: result::CublasError) -> Error {
    Error::Kernel { kernel: "cuBLASLt".to_owned(), message: format!("{:?}", error.0) }
}

fn unanswered(error: cudarc::driver::result::DriverError) -> Error {
    Error::Kernel { kernel: "cuBLASLt".to_owned(), message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_described_as_they_lie() {
        let kind = (Kind::BFloat16, Device::Cpu);
        let zeros = |rows: i64, columns: i64| Tensor::zeros([rows, columns], kind);
        let (x, w, out) = (zeros(40, 24), zeros(24, 16), zeros(40, 16));
        let sizes = Sizes::of(0, &x, &w, &out).unwrap();
        assert_eq!((sizes.m, sizes.n, sizes.k, sizes.is_f32), (40, 16, 24, false));
        assert_eq!(
            (sizes.a, sizes.b),
            (Factor { transposed: false, stride: 24 }, Factor { transposed: false, stride: 16 })
        );
        assert_eq!(sizes.flops(), 2. * 40. * 16. * 24.);
        let part = Sizes::of(0, &zeros(40, 32).narrow(1, 8, 24), &zeros(16, 24).tr(), &out).unwrap();
        assert_eq!(
            (part.a, part.b),
            (Factor { transposed: false, stride: 32 }, Factor { transposed: true, stride: 24 })
        );
        let none = |a: &Tensor, b: &Tensor, out: &Tensor| Sizes::of(0, a, b, out).is_none();
        assert!(none(&x, &zeros(16, 24), &out), "sizes that do not fit");
        assert!(none(&x, &w, &zeros(16, 40)), "a result that does not fit");
        assert!(none(&x, &w, &zeros(40, 32).narrow(1, 0, 16)), "a result with gaps");
        assert!(none(&x.narrow(1, 0, 20), &zeros(20, 32).slice(1, 0, 32, 2), &out), "a factor with gaps");
        assert!(none(&zeros(8, 12), &zeros(12, 8), &zeros(8, 8)), "rows of 24 bytes");
        assert!(none(&x.unsqueeze(0), &w, &out), "three axes");
    }
}
