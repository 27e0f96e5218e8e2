//! Any operator that libtorch registers, called by name through its dispatcher.

use std::ffi::{CString, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::ffi::{self, RawArg};
use crate::{Error, Result, catch};

/// One argument of an operator.
#[derive(Debug)]
pub enum Arg<'a> {
    /// `None` of an optional argument.
    None,
    /// A tensor.
    Tensor(&'a Tensor),
    /// An integer, also where a float is wanted; also scalar types, layouts and memory formats, which the dispatcher passes as
    /// integers.
    Int(i64),
    /// A float.
    Double(f64),
    /// A flag.
    Bool(bool),
    /// A list of tensors; undefined ones stand for `None` in a list of optional tensors.
    Tensors(&'a [&'a Tensor]),
    /// A list of integers, also where floats or flags (0 is false) are wanted.
    Ints(&'a [i64]),
    /// A string, or a device by its name.
    Str(&'a str),
    /// A list of floats.
    Doubles(&'a [f64]),
}

/// Calls `name.overload` (an empty overload for the default one); trailing arguments take the schema's defaults.
///
/// Returns the results in order, lists flattened, numbers as zero-dimensional tensors, `None` for undefined tensors.
///
/// ```
/// use flowhn_torch::op::{Arg, call};
/// use tch::Tensor;
/// let x = Tensor::from_slice(&[3f32, 4.]);
/// let norms = call("aten::_foreach_norm", "Scalar", &[Arg::Tensors(&[&x]), Arg::Double(2.)])?;
/// assert_eq!(norms[0].as_ref().unwrap().double_value(&[]), 5.);
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
///
/// # Errors
/// [`Error::Torch`] if there is no such operator, an argument does not fit its schema, or the operator fails.
pub fn call(name: &str, overload: &str, args: &[Arg]) -> Result<Vec<Option<Tensor>>> {
    let (name, overload) = (c_string(name)?, c_string(overload)?);
    let lists: Vec<Vec<*const C_tensor>> = args
        .iter()
        .map(|arg| match arg {
            Arg::Tensors(tensors) => tensors.iter().map(|t| t.as_ptr()).collect(),
            _ => Vec::new(),
        })
        .collect();
    let raw: Vec<RawArg> = args.iter().zip(&lists).map(|(arg, list)| raw_arg(arg, list)).collect();
    let mut results: Vec<Option<Tensor>> = Vec::new();
    let sink: *mut Vec<Option<Tensor>> = &mut results;
    // SAFETY: `raw` points into `args` and `lists`, which outlive the call; `push_result` is given the sink it expects and is
    // called only during the call.
    catch(|| unsafe {
        ffi::status(ffi::flowhn_op_call(
            name.as_ptr(),
            overload.as_ptr(),
            raw.as_ptr(),
            raw.len(),
            sink.cast(),
            push_result,
        ))
    })?;
    Ok(results)
}

/// The schema of an operator, as libtorch prints it.
///
/// # Errors
/// [`Error::Torch`] if there is no such operator.
pub fn schema(name: &str, overload: &str) -> Result<String> {
    let (name, overload) = (c_string(name)?, c_string(overload)?);
    let mut out = std::ptr::null_mut();
    // SAFETY: both strings outlive the call; on status 0 the shim wrote a malloc'ed string.
    unsafe {
        ffi::status(ffi::flowhn_op_schema(name.as_ptr(), overload.as_ptr(), &mut out))?;
        Ok(ffi::take_string(out))
    }
}

fn raw_arg(arg: &Arg, list: &[*const C_tensor]) -> RawArg {
    let (mut i, mut d, mut p, mut n) = (0, 0., std::ptr::null(), 0);
    let tag = match *arg {
        Arg::None => 0,
        Arg::Tensor(tensor) => {
            p = tensor.as_ptr().cast::<c_void>();
            1
        }
        Arg::Int(value) => {
            i = value;
            2
        }
        Arg::Double(value) => {
            d = value;
            3
        }
        Arg::Bool(value) => {
            i = i64::from(value);
            4
        }
        Arg::Tensors(_) => {
            (p, n) = (list.as_ptr().cast(), list.len());
            5
        }
        Arg::Ints(values) => {
            (p, n) = (values.as_ptr().cast(), values.len());
            6
        }
        Arg::Str(text) => {
            (p, n) = (text.as_ptr().cast(), text.len());
            7
        }
        Arg::Doubles(values) => {
            (p, n) = (values.as_ptr().cast(), values.len());
            8
        }
    };
    RawArg { tag, i, d, p, n }
}

/// Receives one result of [`call`].
///
/// # Safety
/// `sink` is the vector that [`call`] passed; `tensor` is null or a heap tensor handed over to us.
unsafe extern "C" fn push_result(sink: *mut c_void, tensor: *mut C_tensor) {
    // SAFETY: by the contract above.
    unsafe {
        let results = &mut *sink.cast::<Vec<Option<Tensor>>>();
        results.push((!tensor.is_null()).then(|| Tensor::from_ptr(tensor)));
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid("op", "an operator's name contains a NUL byte"))
}
