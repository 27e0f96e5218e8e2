//! Safe access to the elements of CPU tensors, for kernels written in Rust.
//!
//! A slice borrows the tensor handle it came from. `tch` lets other handles of the same storage write in place; as with every
//! safe `tch` call, doing so on another thread while a kernel reads is the caller's mistake. Kernels here read their inputs
//! and write only tensors they made themselves ([`build`]), so they never create such a situation.

use std::marker::PhantomData;

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

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
/// # Errors
/// [`Error::Invalid`] unless the tensor is on the CPU, of type `T` and contiguous.
pub fn slice<T: Element>(tensor: &Tensor) -> Result<&[T]> {
    if !tensor.is_contiguous() {
        return Err(Error::invalid(
            "cpu::slice",
            format!("the tensor has strides {:?}, not contiguous", tensor.stride()),
        ));
    }
    Ok(strided(tensor)?.data)
}

/// The elements of a CPU tensor with any strides.
///
/// # Errors
/// [`Error::Invalid`] unless the tensor is on the CPU and of type `T`.
pub fn strided<T: Element>(tensor: &Tensor) -> Result<Strided<'_, T>> {
    if tensor.device() != Device::Cpu || tensor.kind() != T::KIND {
        let (kind, device) = (tensor.kind(), tensor.device());
        return Err(Error::invalid(
            "cpu",
            format!("the tensor is {kind:?} on {device:?}, expected {:?} on the CPU", T::KIND),
        ));
    }
    let to_usize = |sizes: Vec<i64>| -> Vec<usize> { sizes.into_iter().map(|size| size as usize).collect() };
    let (shape, strides) = (to_usize(tensor.size()), to_usize(tensor.stride()));
    let len = match shape.contains(&0) {
        true => 0,
        false => 1 + shape.iter().zip(&strides).map(|(size, stride)| (size - 1) * stride).sum::<usize>(),
    };
    let data = match len {
        0 => &[][..],
        // SAFETY: the pointer is the tensor's first element, aligned and of type `T` (checked above); libtorch's strides are
        // never negative and stay inside the storage, so `len` elements from it belong to the storage, which lives at least as
        // long as the handle that the result borrows.
        _ => unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), len) },
    };
    Ok(Strided { data, shape, strides })
}

/// Makes a contiguous CPU tensor and lets `fill` write it. The elements start arbitrary: write every one.
pub fn build<T: Element>(shape: &[i64], fill: impl FnOnce(&mut [T])) -> Tensor {
    let mut tensor = Tensor::empty(shape, (T::KIND, Device::Cpu));
    fill(slice_mut(&mut tensor));
    tensor
}

/// As [`build`], for an operation with a result of its own.
///
/// # Errors
/// Those of `fill`.
pub fn try_build<T: Element, R>(shape: &[i64], fill: impl FnOnce(&mut [T]) -> Result<R>) -> Result<(Tensor, R)> {
    let mut tensor = Tensor::empty(shape, (T::KIND, Device::Cpu));
    let value = fill(slice_mut(&mut tensor))?;
    Ok((tensor, value))
}

/// A contiguous CPU tensor with the given elements.
///
/// # Errors
/// [`Error::Shape`] if their number is not that of the shape.
pub fn from_slice<T: Element>(shape: &[i64], elements: &[T]) -> Result<Tensor> {
    if shape.iter().product::<i64>() != elements.len() as i64 {
        return Err(Error::Shape {
            op: "cpu::from_slice",
            arg: "elements",
            got: vec![elements.len() as i64],
            want: format!("as many elements as {shape:?} has"),
        });
    }
    Ok(build(shape, |out: &mut [T]| out.copy_from_slice(elements)))
}

/// The elements of a tensor that was just made and has no other handle.
fn slice_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    let len = tensor.numel();
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller made the tensor just now, contiguous, of type `T`, with no other handle to its storage, so the slice is
    // exclusive. The memory comes from a foreign allocator through FFI: its bytes are arbitrary but fixed, and every
    // `Element` but `bool` accepts any bytes; a `bool` slice is only ever written before it is read.
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
