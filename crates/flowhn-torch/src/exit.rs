//! The end of a process whose threads are inside of libtorch.

/// Ends the process with this code, without the destructors of libtorch's globals: other threads may be in the middle of operators that
/// use them, and [`std::process::exit`] would end in their segmentation fault. Nothing that is buffered is written.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: it takes a number, touches no memory of the program and does not return.
    unsafe { libc::_exit(code) }
}
