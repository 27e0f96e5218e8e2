//! The error of every tensor crate, and the guard that turns panics of plain `tch` calls into it.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::Once;

use tch::{Device, Kind, TchError};

use crate::ffi;

/// Result of a tensor operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a tensor operation; each variant says what was wanted and what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{op}: {arg} has shape {got:?}, expected {want}")]
    Shape {
        /// The operation that was called.
        op: &'static str,
        /// The argument at fault.
        arg: &'static str,
        /// Its shape.
        got: Vec<i64>,
        /// The shape it should have.
        want: String,
    },
    /// An argument has the wrong element type.
    #[error("{op}: {arg} is {got:?}, expected {want}")]
    Dtype {
        /// The operation that was called.
        op: &'static str,
        /// The argument at fault.
        arg: &'static str,
        /// Its element type.
        got: Kind,
        /// The element type it should have.
        want: String,
    },
    /// An argument lives on the wrong device.
    #[error("{op}: {arg} is on {got:?}, expected {want}")]
    Device {
        /// The operation that was called.
        op: &'static str,
        /// The argument at fault.
        arg: &'static str,
        /// Its device.
        got: Device,
        /// The device it should be on.
        want: String,
    },
    /// An argument breaks a rule that is not about shape, dtype or device.
    #[error("{op}: {message}")]
    Invalid {
        /// The operation that was called.
        op: &'static str,
        /// The rule and what came instead.
        message: String,
    },
    /// A kernel could not be compiled, loaded or launched.
    #[error("kernel {kernel}: {message}")]
    Kernel {
        /// File and entry.
        kernel: String,
        /// What is wrong.
        message: String,
    },
    /// A tensor did not fit into the memory of its device: which operation wanted how much, and how much is free.
    #[error("{0}")]
    OutOfMemory(String),
    /// libtorch reported an error.
    #[error("libtorch: {0}")]
    Torch(String),
    /// Rust code panicked inside a guarded region or an autograd callback.
    #[error("panic: {0}")]
    Panic(String),
    /// A file could not be opened or mapped.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// An [`Error::Invalid`] of operation `op`.
    pub fn invalid(op: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { op, message: message.into() }
    }

    /// The same, where memory ran out with the name of what wanted it.
    pub(crate) fn within(self, what: &str) -> Self {
        match self {
            Self::OutOfMemory(message) => Self::OutOfMemory(format!("{what}: {message}")),
            other => other,
        }
    }

    /// The error for a message of libtorch.
    pub(crate) fn torch(message: &str) -> Self {
        let message = without_backtrace(message);
        match message.contains("CUDA out of memory") {
            // The rest is advice about allocator settings.
            true => Self::OutOfMemory(message.split(" If reserved").next().unwrap_or(message).to_owned()),
            // What follows is the dispatcher's table of every backend.
            false => Self::Torch(
                message.split("' is only available for these backends").next().unwrap_or(message).to_owned(),
            ),
        }
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        match error {
            TchError::Torch(message) => Self::torch(&message),
            other => Self::Torch(other.to_string()),
        }
    }
}

thread_local! {
    /// How many [`catch`] regions this thread is in.
    static CATCH_DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Runs `f`; a panic inside it, such as that of a plain `tch` call, comes back as an [`Error`] and prints nothing.
///
/// Gradient recording is put back as it was: `tch::no_grad` alone would leave it off after a panic. The first call puts a hook in front of
/// the process's panic hook, which is silent inside of `catch` alone; a hook that is set later takes its place.
///
/// ```
/// use tch::Tensor;
/// let sum = flowhn_torch::catch(|| Ok(Tensor::from_slice(&[1f32, 2.]) + Tensor::from_slice(&[1f32, 2., 3.])));
/// assert!(sum.unwrap_err().to_string().contains("must match"));
/// ```
///
/// # Errors
/// Those of `f`; [`Error::Torch`] for a panic of `tch`, [`Error::Panic`] for any other.
pub fn catch<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    silence_caught_panics();
    // SAFETY: reads a flag of this thread.
    let grad_mode = unsafe { ffi::flowhn_grad_mode_get() };
    CATCH_DEPTH.with(|depth| depth.set(depth.get() + 1));
    let outcome = panic::catch_unwind(AssertUnwindSafe(f));
    CATCH_DEPTH.with(|depth| depth.set(depth.get() - 1));
    outcome.unwrap_or_else(|payload| {
        // SAFETY: sets a flag of this thread.
        unsafe { ffi::flowhn_grad_mode_set(grad_mode) };
        Err(from_panic(payload.as_ref()))
    })
}

/// Puts a panic hook in front of the current one that stays silent inside [`catch`]; elsewhere the old hook speaks.
fn silence_caught_panics() {
    static INSTALL: Once = Once::new();
    // While a thread unwinds the hook cannot be changed; a later call will do it.
    if std::thread::panicking() {
        return;
    }
    INSTALL.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if CATCH_DEPTH.with(Cell::get) == 0 {
                previous(info);
            }
        }));
    });
}

fn from_panic(payload: &(dyn Any + Send)) -> Error {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a message");
    match tch_message(text) {
        Some(message) => Error::torch(&message),
        None => Error::Panic(text.to_owned()),
    }
}

/// The message of a panic that a plain `tch` call raised: those unwrap a [`TchError`], so the panic carries its debug form.
fn tch_message(panic: &str) -> Option<String> {
    let (_, error) = panic.split_once("an `Err` value: ")?;
    let (variant, quoted) = error.strip_suffix("\")")?.split_once("(\"")?;
    ["Torch", "Kind", "Shape", "Convert"].contains(&variant).then(|| unescape(quoted))
}

/// Undoes the escapes of `{:?}` that error messages contain; others stay as they are.
fn unescape(quoted: &str) -> String {
    let mut text = String::with_capacity(quoted.len());
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            text.push(c);
            continue;
        }
        match chars.next() {
            Some('n') => text.push('\n'),
            Some('t') => text.push('\t'),
            Some(escaped @ ('"' | '\'' | '\\')) => text.push(escaped),
            Some(other) => text.extend(['\\', other]),
            None => text.push('\\'),
        }
    }
    text
}

/// libtorch appends where the C++ exception was raised; users of the message want the sentence before it.
fn without_backtrace(message: &str) -> &str {
    message.split("\nException raised from").next().unwrap_or(message).trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_device_is_told_apart() {
        let message = "while f: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. If reserved but \
                       unallocated memory is large try this\nException raised from malloc at a.cpp:1";
        let error = Error::torch(message);
        let want = "while f: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.";
        assert!(matches!(&error, Error::OutOfMemory(text) if text == want), "{error:?}");
        assert_eq!(error.within("ssd").to_string(), format!("ssd: {want}"));
        assert!(matches!(Error::torch("another\nException raised from g"), Error::Torch(text) if text == "another"));
    }

    #[test]
    fn a_panic_of_tch_becomes_its_message() {
        let panic = |value: TchError| format!("called `Result::unwrap()` on an `Err` value: {value:?}");
        let message = "f(\"x\\y\"):\n\tno (really)\nException raised from check at a.cpp:1\nframe #0";
        assert_eq!(tch_message(&panic(TchError::Torch(message.into()))).as_deref(), Some(message));
        assert_eq!(without_backtrace(message), "f(\"x\\y\"):\n\tno (really)");
        assert_eq!(tch_message(&panic(TchError::Shape("ends in )".into()))).as_deref(), Some("ends in )"));
        assert_eq!(tch_message("no error at all"), None);
        assert_eq!(tch_message("called `Result::unwrap()` on an `Err` value: Other(\"x\")"), None);
    }
}
