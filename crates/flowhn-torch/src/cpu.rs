//! Safe access to the elements of CPU tensors, for kernels written in Rust.
//!
//! A slice borrows the tensor handle it came from. `tch` lets other handles of the same storage write in place; as with every
//! safe `tch` call, doing so on another thread while a kernel reads is the caller's mistake. Kernels here read their inputs
//! and write tensors they made themselves ([`build`]), or a caller's ([`update`]) that shares no memory with what they read
//! ([`ForwardCtx::overwrite`](crate::ForwardCtx::overwrite)), so they never create such a situation.

use std::marker::PhantomData;

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, ffi};

mod sealed {
    pub trait Sealed {}
}

/// Element types that map onto a tensor's memory bit for bit.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The tensor type whose elements these are.
    const KIND: Kind;
}

macro_rules! element {
    ($($ty:ty => $kind:ident),*) => {$(
        impl sealed::Sealed for $ty {}
        impl Element for $ty { const KIND: Kind = Kind::$kind; }
    )*};
}
element!(f32 => Float, f64 => Double, bf16 => BFloat16, i64 => Int64, i32 => Int, u8 => Uint8, bool => Bool);

/// A CPU tensor seen as elements, shape and strides.
#[derive(Clone, Debug)]
pub struct Strided<'a, T> {
    /// The elements from the first to the last that the strides reach.
    pub data: &'a [T],
    /// Size of each axis.
    pub shape: Vec<usize>,
    /// Elements between neighbours on each axis.
    pub strides: Vec<usize>,
}

/// The elements of a contiguous CPU tensor.
///
/// ```
/// use flowhn_torch::cpu;
/// use tch::Tensor;
/// let x = Tensor::from_slice(&[1f32, 2., 3.]);
/// assert_eq!(cpu::slice::<f32>(&x)?.iter().sum::<f32>(), 6.);
/// assert!(cpu::slice::<f64>(&x).unwrap_err().to_string().contains("expected Double"));
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
///
/// # Errors
/// [`Error::Invalid`] unless the tensor is on the CPU, of type `T`, contiguous, and its memory holds its values as they are:
/// undefined, sparse and nested tensors, lazily negated or conjugated views and `bool` bytes other than 0 and 1 do not.
pub fn slice<T: Element>(tensor: &Tensor) -> Result<&[T]> {
    let data = elements("cpu::slice", tensor)?;
    if !tensor.is_contiguous() {
        return Err(Error::invalid(
            "cpu::slice",
            format!("the tensor has strides {:?}, not contiguous", tensor.stride()),
        ));
    }
    Ok(data)
}

/// The elements of a CPU tensor with any strides.
///
/// ```
/// use flowhn_torch::cpu;
/// use tch::Tensor;
/// let x = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6]).view([2, 3]).transpose(0, 1);
/// let x = cpu::strided::<i64>(&x)?;
/// assert_eq!((x.shape, x.strides, x.data[3]), (vec![3, 2], vec![1, 3], 4));
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
///
/// # Errors
/// As [`slice()`], but for contiguity.
pub fn strided<T: Element>(tensor: &Tensor) -> Result<Strided<'_, T>> {
    let data = elements("cpu::strided", tensor)?;
    let to_usize = |sizes: Vec<i64>| -> Vec<usize> { sizes.into_iter().map(|size| size as usize).collect() };
    Ok(Strided { data, shape: to_usize(tensor.size()), strides: to_usize(tensor.stride()) })
}

/// The elements from the first to the last that the tensor's strides reach.
fn elements<'a, T: Element>(op: &'static str, tensor: &'a Tensor) -> Result<&'a [T]> {
    let (mut data, mut len) = (std::ptr::null(), 0);
    // SAFETY: the tensor outlives the call; `data` and `len` are places for one value each.
    let status = ffi::status(unsafe { ffi::flowhn_cpu_elements(tensor.as_ptr(), &mut data, &mut len) });
    status.map_err(|error| match error {
        Error::Torch(message) => Error::invalid(op, message),
        other => other,
    })?;
    let kind = tensor.f_kind()?;
    if kind != T::KIND {
        return Err(Error::invalid(op, format!("the tensor is {kind:?} on the CPU, expected {:?}", T::KIND)));
    }
    if len == 0 {
        return Ok(&[]);
    }
    if T::KIND == Kind::Bool {
        // SAFETY: `len` bytes of the storage, see below; bytes may have any value.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) };
        if let Some(byte) = bytes.iter().find(|&&byte| byte > 1) {
            return Err(Error::invalid(op, format!("the tensor is Bool, but one of its bytes is {byte}")));
        }
    }
    // SAFETY: the shim found `len` elements from `data` inside the storage of a dense CPU tensor, whose elements have type `T`
    // (checked above) and are aligned for it. The storage lives at least as long as the handle that the result borrows.
    Ok(unsafe { std::slice::from_raw_parts(data.cast::<T>(), len) })
}

/// Makes a contiguous CPU tensor and lets `fill` write it. The elements start arbitrary (`false` for `bool`): write every one.
///
/// ```
/// use flowhn_torch::cpu;
/// let squares = cpu::build(&[2, 2], |out: &mut [f32]| out.iter_mut().enumerate().for_each(|(i, x)| *x = (i * i) as f32));
/// assert_eq!(squares.double_value(&[1, 1]), 9.);
/// ```
///
/// # Panics
/// If a size is negative or there is no memory; [`try_build`] returns an error.
pub fn build<T: Element>(shape: &[i64], fill: impl FnOnce(&mut [T])) -> Tensor {
    let mut tensor = uninitialised::<T>(shape).expect("the shape is valid and fits into memory");
    fill(slice_mut(&mut tensor));
    tensor
}

/// As [`build`], for an operation with a result of its own.
///
/// # Errors
/// Those of `fill`; [`Error::Torch`] if a size is negative or there is no memory.
pub fn try_build<T: Element, R>(shape: &[i64], fill: impl FnOnce(&mut [T]) -> Result<R>) -> Result<(Tensor, R)> {
    let mut tensor = uninitialised::<T>(shape)?;
    let value = fill(slice_mut(&mut tensor))?;
    Ok((tensor, value))
}

/// Lets `run` change the elements of a contiguous CPU tensor. As with every write in place, nobody knows who else holds its memory: while `run`
/// runs, nothing else may read or write it, be it through another handle or a slice that was taken before.
///
/// ```
/// use flowhn_torch::cpu;
/// use tch::Tensor;
/// let mut x = Tensor::from_slice(&[1f32, 2., 3.]);
/// let first = cpu::update(&mut x, |x: &mut [f32]| {
///     x.reverse();
///     Ok(x[0])
/// })?;
/// assert_eq!((first, x.double_value(&[2])), (3., 1.));
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
///
/// # Errors
/// As [`slice()`], and those of `run`.
pub fn update<T: Element, R>(tensor: &mut Tensor, run: impl FnOnce(&mut [T]) -> Result<R>) -> Result<R> {
    slice::<T>(tensor)?;
    run(slice_mut(tensor))
}

/// A contiguous CPU tensor with the given elements.
///
/// # Errors
/// [`Error::Shape`] if their number is not that of the shape.
pub fn from_slice<T: Element>(shape: &[i64], elements: &[T]) -> Result<Tensor> {
    let numel = shape.iter().try_fold(1usize, |numel, &size| numel.checked_mul(usize::try_from(size).ok()?));
    if numel != Some(elements.len()) {
        return Err(Error::Shape {
            op: "cpu::from_slice",
            arg: "elements",
            got: vec![elements.len() as i64],
            want: format!("as many elements as {shape:?} has"),
        });
    }
    let mut tensor = uninitialised::<T>(shape)?;
    slice_mut(&mut tensor).copy_from_slice(elements);
    Ok(tensor)
}

fn uninitialised<T: Element>(shape: &[i64]) -> Result<Tensor> {
    let options = (T::KIND, Device::Cpu);
    Ok(match T::KIND {
        Kind::Bool => Tensor::f_zeros(shape, options)?,
        _ => Tensor::f_empty(shape, options)?,
    })
}

/// The elements of a contiguous CPU tensor of type `T`, whose memory nothing else reads or writes as long as the slice lives.
fn slice_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    let len = tensor.numel();
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the callers made the tensor just now, contiguous, of type `T`, with no other handle to its storage, or have checked
    // all but the last and pass that duty on, as every write through `tch` does; so the slice is exclusive. The memory comes from a
    // foreign allocator through FFI: its bytes are arbitrary but fixed, and every `Element` accepts any bytes but `bool`, for which
    // `uninitialised` writes zeros and `slice` has looked at each.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), len) }
}

/// A block of neighbouring columns of a row-major matrix, writable on its own.
#[derive(Debug)]
pub struct ColumnBlock<'a, T> {
    data: *mut T,
    n_rows: usize,
    row_stride: usize,
    start: usize,
    n_cols: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a block is an exclusive borrow of its own columns, as `&mut [T]` would be.
unsafe impl<T: Send> Send for ColumnBlock<'_, T> {}

impl<T> ColumnBlock<'_, T> {
    /// First column of the block.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Number of columns in the block.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// The block's part of row `row_idx`.
    ///
    /// # Panics
    /// If `row_idx` is not below the number of rows.
    pub fn row(&mut self, row_idx: usize) -> &mut [T] {
        assert!(row_idx < self.n_rows, "row {row_idx} of {}", self.n_rows);
        // SAFETY: the row lies inside the matrix that `column_blocks` borrowed; no other block holds these columns, and `&mut
        // self` keeps a second slice of this block away.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row_idx * self.row_stride + self.start), self.n_cols) }
    }
}

/// Splits a row-major matrix of `n_cols` columns into blocks of at most `block_len` columns, which threads may write at once.
///
/// # Panics
/// If `n_cols` or `block_len` is 0 or the matrix is not a whole number of rows.
pub fn column_blocks<T>(matrix: &mut [T], n_cols: usize, block_len: usize) -> Vec<ColumnBlock<'_, T>> {
    assert!(n_cols > 0 && block_len > 0 && matrix.len().is_multiple_of(n_cols), "{} x {n_cols}", matrix.len());
    let (data, n_rows) = (matrix.as_mut_ptr(), matrix.len() / n_cols);
    (0..n_cols)
        .step_by(block_len)
        .map(|start| ColumnBlock {
            data,
            n_rows,
            row_stride: n_cols,
            start,
            n_cols: block_len.min(n_cols - start),
            _borrow: PhantomData,
        })
        .collect()
}
