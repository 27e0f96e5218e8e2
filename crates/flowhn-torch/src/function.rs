//! Custom autograd functions in Rust: a forward that libtorch does not record and a backward that it calls.

use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{self, AssertUnwindSafe};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::ffi::{self, FunctionTable};
use crate::{Error, Result, catch};

/// A differentiable operation whose derivative is written by hand.
///
/// The value itself is kept until the graph is released, so anything the backward needs besides tensors (sizes, flags)
/// can be a field. Tensors belong into [`ForwardCtx::save`]: saved that way, an in-place edit between forward and backward is
/// noticed and no reference cycle keeps the graph alive.
///
/// CPU callbacks run on the thread that calls `backward`; CUDA ones on libtorch's device thread with the forward's stream
/// current, hence `Send`.
///
/// ```
/// use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result, apply};
/// use tch::{Kind, Tensor};
///
/// struct Square;
/// impl Function for Square {
///     const NAME: &'static str = "square";
///     fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
///         ctx.save(inputs[0]);
///         Ok(vec![inputs[0] * inputs[0]])
///     }
///     fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
///         Ok(vec![Some(&ctx.saved()[0] * &grads[0] * 2.)])
///     }
/// }
///
/// let x = Tensor::from_slice(&[3f32]).set_requires_grad(true);
/// let y = apply(Square, &[&x])?.remove(0);
/// y.sum(Kind::Float).backward();
/// assert_eq!(x.grad().double_value(&[0]), 6.);
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
pub trait Function: Send + 'static {
    /// The name that autograd and error messages use.
    const NAME: &'static str;

    /// Computes the outputs with gradient recording off. Outputs may be views of the inputs, or inputs themselves, but the
    /// values of inputs that require a gradient stay as they are.
    ///
    /// # Errors
    /// Whatever the operation reports; [`apply`] returns it unchanged.
    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>>;

    /// Computes one gradient per input, in order; `None` stands for zero. `grads` has one tensor per output,
    /// zeros where nothing flowed back (expanded from one element for an output without gradient, which receives nothing), or an
    /// undefined tensor if the forward said so ([`ForwardCtx::accept_undefined_grad`]).
    /// Gradients that [`BackwardCtx::needs_grad`] denies are thrown away.
    ///
    /// Nothing here is recorded, so there is no second derivative: under `create_graph` the gradients come out right, and
    /// differentiating through them is an error.
    ///
    /// # Errors
    /// Whatever the operation reports; it surfaces from `f_backward` with the function's name (`backward` of `tch` panics with it).
    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>>;

    /// Where the gradient of output `output_idx` had best be written, as whoever computes it learns from
    /// [`BackwardCtx::grad_place`]: a tensor of the output's shape with a dense last axis, unwritten, given away once. The function still takes the gradient
    /// from wherever it comes.
    fn grad_place(&self, _output_idx: usize) -> Option<Tensor> {
        None
    }
}

/// What a forward may tell autograd.
#[derive(Debug)]
pub struct ForwardCtx {
    recorded: bool,
    needs_grad: Vec<bool>,
    saved: Vec<Tensor>,
    non_differentiable: Vec<usize>,
    accepts_undefined: Vec<usize>,
}

impl ForwardCtx {
    /// Keeps an input, an output or an intermediate tensor for the backward.
    pub fn save(&mut self, tensor: &Tensor) {
        self.saved.push(tensor.shallow_clone());
    }

    /// Declares that output `output_idx` has no gradient, as integer outputs and detached states do.
    pub fn mark_non_differentiable(&mut self, output_idx: usize) {
        self.non_differentiable.push(output_idx);
    }

    /// Declares that the backward takes an undefined tensor for the gradient of output `output_idx` where nothing flowed back, which
    /// spares it zeros to write and to read.
    pub fn accept_undefined_grad(&mut self, output_idx: usize) {
        self.accepts_undefined.push(output_idx);
    }

    /// Whether a backward may follow at all; if not, nothing needs saving.
    pub fn is_recorded(&self) -> bool {
        self.recorded
    }

    /// Whether input `input_idx` requires a gradient in a recorded graph.
    ///
    /// # Panics
    /// If there is no such input.
    pub fn needs_grad(&self, input_idx: usize) -> bool {
        self.recorded && self.needs_grad[input_idx]
    }

    /// Prepares a write into input `input_idx`, which may then be an output too: a state that is advanced where it lies. libtorch
    /// does not see what code of our own writes, so the write is counted here as libtorch counts its own, and a backward pass that saved
    /// the old values is refused.
    ///
    /// # Errors
    /// [`Error::Invalid`], which calls the input `arg`, if gradients are recorded, for that of the old values would be lost; if the
    /// input is not contiguous; or if another input shares memory with it.
    ///
    /// # Panics
    /// If there is no such input.
    pub fn overwrite(&self, op: &'static str, arg: &str, inputs: &[&Tensor], input_idx: usize) -> Result<()> {
        if self.recorded {
            let message = format!("{arg} is written in place, which has no gradient: call it in tch::no_grad");
            return Err(Error::invalid(op, message));
        }
        assert!(input_idx < inputs.len(), "there is no input {input_idx}");
        let inputs: Vec<*const C_tensor> = inputs.iter().map(|t| t.as_ptr()).collect();
        // SAFETY: the pointers belong to the function's inputs, which outlive the call, and `input_idx` is one of theirs.
        let status = ffi::status(unsafe { ffi::flowhn_write_begin(inputs.as_ptr(), inputs.len(), input_idx) });
        status.map_err(|error| match error {
            Error::Torch(message) => Error::invalid(op, format!("{arg} {message}")),
            other => other,
        })
    }
}

/// What a backward may ask autograd.
#[derive(Debug)]
pub struct BackwardCtx {
    node: *const c_void,
    saved: Vec<Tensor>,
    needs_grad: Vec<bool>,
}

impl BackwardCtx {
    /// The saved tensors, in the order of [`ForwardCtx::save`], without history.
    pub fn saved(&self) -> &[Tensor] {
        &self.saved
    }

    /// Whether the gradient of input `input_idx` is wanted.
    ///
    /// # Panics
    /// If there is no such input.
    pub fn needs_grad(&self, input_idx: usize) -> bool {
        self.needs_grad[input_idx]
    }

    /// An unwritten tensor for the gradient of input `input_idx`, `like` the input in shape, dtype and device.
    ///
    /// It lies where the function that made the input wants it ([`Function::grad_place`]), as a view with gaps before its last axis if need be, and is a
    /// tensor of its own, contiguous, where nobody cares.
    ///
    /// # Errors
    /// [`Error::Torch`] if there is no memory.
    pub fn grad_place(&self, input_idx: usize, like: &Tensor) -> Result<Tensor> {
        if self.needs_grad.get(input_idx) == Some(&true) {
            let mut place = std::ptr::null_mut();
            // SAFETY: the node runs this backward, so it is alive, and it has an edge for each input, of which there are as many as
            // entries of `needs_grad`. What comes back is a heap tensor that nobody else owns.
            let place = unsafe {
                ffi::status(ffi::flowhn_function_grad_place(self.node, input_idx, &mut place))?;
                (!place.is_null()).then(|| Tensor::from_ptr(place))
            };
            let fits = |place: &Tensor| {
                place.size() == like.size()
                    && place.kind() == like.kind()
                    && place.device() == like.device()
                    && place.stride().last().is_none_or(|&stride| stride == 1)
            };
            if let Some(place) = place.filter(fits) {
                return Ok(place);
            }
        }
        Ok(Tensor::f_empty(like.size(), (like.kind(), like.device()))?)
    }
}

/// Runs a function and, where an input requires a gradient, puts it on the autograd tape.
///
/// # Errors
/// Those of the forward; [`Error::Panic`] or [`Error::Torch`] if it panics; [`Error::Invalid`] if it returns an undefined
/// tensor, marks an output that is not there or changes an input that requires a gradient; [`Error::Torch`] if libtorch
/// refuses the node.
pub fn apply<F: Function>(mut function: F, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let input_ptrs: Vec<*const C_tensor> = inputs.iter().map(|t| t.as_ptr()).collect();
    // SAFETY: the pointers belong to `inputs`, which outlive the call.
    let recorded = unsafe { ffi::flowhn_function_is_recorded(input_ptrs.as_ptr(), input_ptrs.len()) } != 0;
    let mut ctx = ForwardCtx {
        recorded,
        needs_grad: inputs.iter().map(|t| t.requires_grad()).collect(),
        saved: Vec::new(),
        non_differentiable: Vec::new(),
        accepts_undefined: Vec::new(),
    };
    let versions = versions(&ctx, inputs);
    let outputs =
        catch(|| tch::no_grad(|| function.forward(&mut ctx, inputs))).map_err(|error| error.within(F::NAME))?;
    if let Some(idx) = outputs.iter().position(|output| !output.defined()) {
        return Err(Error::invalid(F::NAME, format!("output {idx} is an undefined tensor")));
    }
    let mut output_flags = vec![0u8; outputs.len()];
    for (marked, flag) in
        [(&ctx.non_differentiable, ffi::NON_DIFFERENTIABLE), (&ctx.accepts_undefined, ffi::ACCEPTS_UNDEFINED_GRAD)]
    {
        for &idx in marked {
            *output_flags.get_mut(idx).ok_or_else(|| {
                Error::invalid(F::NAME, format!("output {idx} was marked, but there are {} outputs", outputs.len()))
            })? |= flag;
        }
    }
    if !recorded {
        return Ok(outputs);
    }
    if let Some(idx) =
        self::versions(&ctx, inputs).into_iter().zip(versions).position(|(after, before)| after != before)
    {
        let message = format!("forward changed input {idx} in place, which its gradient would not know");
        return Err(Error::invalid(F::NAME, message));
    }

    let name = CString::new(F::NAME).map_err(|_| Error::invalid("apply", "a function's name contains a NUL byte"))?;
    let output_ptrs: Vec<*const C_tensor> = outputs.iter().map(|t| t.as_ptr()).collect();
    let saved_ptrs: Vec<*const C_tensor> = ctx.saved.iter().map(|t| t.as_ptr()).collect();
    let mut result = vec![std::ptr::null_mut(); outputs.len()];
    let table = FunctionTable {
        backward: backward_callback::<F>,
        grad_place: grad_place_callback::<F>,
        drop: drop_callback::<F>,
    };
    let data = Box::into_raw(Box::new(function)).cast::<c_void>();
    // SAFETY: every pointer refers to a vector that outlives the call, with the length given beside it. The node takes
    // ownership of `data`, also on failure, and frees it through `drop_callback::<F>`, which knows its type.
    // On success each entry of `result` is a heap tensor that nobody else owns.
    unsafe {
        ffi::status(ffi::flowhn_function_attach(
            name.as_ptr(),
            input_ptrs.as_ptr(),
            input_ptrs.len(),
            output_ptrs.as_ptr(),
            output_ptrs.len(),
            output_flags.as_ptr(),
            saved_ptrs.as_ptr(),
            saved_ptrs.len(),
            table,
            data,
            result.as_mut_ptr(),
        ))?;
        Ok(result.into_iter().map(|tensor| Tensor::from_ptr(tensor)).collect())
    }
}

/// Forgets the gradient of a leaf: the next backward pass hands it the tensor that it computed, where it would otherwise add to the old.
///
/// ```
/// use tch::{Kind, Tensor};
/// let x = Tensor::from_slice(&[3f32]).set_requires_grad(true);
/// (&x * 2.).sum(Kind::Float).backward();
/// flowhn_torch::clear_grad(&x)?;
/// assert!(!x.grad().defined());
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
///
/// # Errors
/// [`Error::Torch`] if the tensor cannot have a gradient.
pub fn clear_grad(leaf: &Tensor) -> Result<()> {
    // SAFETY: the handle lives to the end of the call; the shim drops its reference to the gradient and nothing else.
    ffi::status(unsafe { ffi::flowhn_grad_clear(leaf.as_ptr().cast_mut()) })
}

/// How often each input that requires a gradient was written in place; the others do not matter here.
fn versions(ctx: &ForwardCtx, inputs: &[&Tensor]) -> Vec<i64> {
    let version = |(idx, input): (usize, &&Tensor)| match ctx.needs_grad(idx) {
        true => input.f_internal_version().unwrap_or(0),
        false => 0,
    };
    inputs.iter().enumerate().map(version).collect()
}

/// Frees the function of a node.
///
/// # Safety
/// `data` came from `Box::<F>::into_raw` in [`apply`] and is not used afterwards.
unsafe extern "C" fn drop_callback<F: Function>(data: *mut c_void) {
    // SAFETY: by the contract above.
    let function = unsafe { Box::from_raw(data.cast::<F>()) };
    // A destructor that panics must not unwind into C++. The panic hook has spoken and there is nobody else to tell; what was
    // thrown is forgotten, for its destructor might panic as well.
    if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| drop(function))) {
        std::mem::forget(payload);
    }
}

/// Asks a function where the gradient of an output should go; null where it does not care, and also where it panics: then the
/// gradient goes the ordinary way.
///
/// # Safety
/// `data` points to a live `F` that no other thread uses (the node holds its mutex).
unsafe extern "C" fn grad_place_callback<F: Function>(data: *mut c_void, output_idx: usize) -> *mut C_tensor {
    // SAFETY: by the contract above.
    let function = unsafe { &*data.cast::<F>() };
    match catch(|| Ok(tch::no_grad(|| function.grad_place(output_idx)))) {
        Ok(Some(mut place)) => {
            let tensor = place.as_mut_ptr();
            std::mem::forget(place);
            tensor
        }
        _ => std::ptr::null_mut(),
    }
}

/// Runs the backward of a node and reports failure as a malloc'ed message.
///
/// # Safety
/// `data` points to a live `F` that no other thread uses (the node holds its mutex); each array has the length given
/// beside it and holds live tensors; `out` has `n_out` null entries.
unsafe extern "C" fn backward_callback<F: Function>(
    data: *mut c_void,
    node: *const c_void,
    saved: *mut *mut C_tensor,
    n_saved: usize,
    grads: *mut *mut C_tensor,
    n_grads: usize,
    needs_grad: *const u8,
    out: *mut *mut C_tensor,
    n_out: usize,
    error: *mut *mut c_char,
) -> c_int {
    let outcome = catch(|| {
        // SAFETY: by the contract above. `clone_from_ptr` makes handles of our own, so C++ keeps its tensors.
        let (function, ctx, grads) = unsafe {
            let handles = |tensors: *mut *mut C_tensor, n: usize| -> Vec<Tensor> {
                (0..n).map(|i| Tensor::clone_from_ptr(*tensors.add(i))).collect()
            };
            let ctx = BackwardCtx {
                node,
                saved: handles(saved, n_saved),
                needs_grad: (0..n_out).map(|i| *needs_grad.add(i) != 0).collect(),
            };
            (&*data.cast::<F>(), ctx, handles(grads, n_grads))
        };
        let gradients = tch::no_grad(|| function.backward(&ctx, &grads))?;
        if gradients.len() != n_out {
            let message = format!("backward returned {} gradients for {n_out} inputs", gradients.len());
            return Err(Error::invalid(F::NAME, message));
        }
        for (i, gradient) in gradients.into_iter().enumerate() {
            if let Some(mut gradient) = gradient {
                let tensor = gradient.as_mut_ptr();
                std::mem::forget(gradient);
                // SAFETY: `out` has `n_out` entries; the node takes the tensor over.
                unsafe { *out.add(i) = tensor };
            }
        }
        Ok(())
    });
    match outcome {
        Ok(()) => 0,
        Err(cause) => {
            let message = CString::new(cause.to_string().replace('\0', " ")).unwrap_or_default();
            // SAFETY: `error` is a valid place for one pointer; the node frees what `strdup` allocates.
            unsafe { *error = libc::strdup(message.as_ptr()) };
            1
        }
    }
}
