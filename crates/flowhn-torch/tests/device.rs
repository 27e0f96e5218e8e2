//! On a machine without CUDA everything about devices is a clear error, never an abort.

use flowhn_torch::{DeviceProperties, Error, Event, MemoryStats, Priority, Result, Stream};

/// The message, if there is no such device; `None` where the call succeeded.
fn refusal<T: std::fmt::Debug>(outcome: Result<T>) -> Option<String> {
    match outcome {
        Ok(_) => None,
        Err(Error::Torch(message) | Error::Invalid { message, .. }) => {
            assert!(message.contains("CUDA") && !message.contains("Exception raised"), "{message}");
            Some(message)
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn devices_that_are_not_there_are_errors() {
    // 256 and 2^32 would be device 0 if the index were narrowed.
    for device_idx in [63, 128, 255, 256, 1 << 32, usize::MAX] {
        assert!(refusal(Stream::current(device_idx)).is_some());
        assert!(refusal(Stream::default_of(device_idx)).is_some());
        assert!(refusal(Stream::from_pool(device_idx, Priority::Normal)).is_some());
        assert!(refusal(MemoryStats::of(device_idx)).is_some());
        assert!(refusal(MemoryStats::reset_peak(device_idx)).is_some());
        assert!(refusal(DeviceProperties::of(device_idx)).is_some());
    }
}

#[test]
fn a_machine_without_cuda_says_so() {
    if tch::Cuda::is_available() {
        return;
    }
    let none = |message: Option<String>| {
        let message = message.expect("an error, for there is no device");
        assert!(message.contains("no CUDA"), "{message}");
    };
    none(refusal(Stream::current(0)));
    none(refusal(Stream::default_of(0)));
    none(refusal(Stream::from_pool(0, Priority::High)));
    none(refusal(Event::new(true)));
    none(refusal(Event::new(false)));
    none(refusal(MemoryStats::of(0)));
    none(refusal(MemoryStats::reset_peak(0)));
    none(refusal(MemoryStats::empty_cache()));
    none(refusal(DeviceProperties::of(0)));
    #[cfg(flowhn_cuda)]
    none(refusal(flowhn_torch::Graph::new()));
}

#[test]
fn the_build_says_whether_graphs_are_compiled_in() {
    assert_eq!(flowhn_torch::BUILT_WITH_CUDA, cfg!(flowhn_cuda));
    let has_library = flowhn_torch::torch_lib_dir().unwrap().join("libtorch_cuda.so").exists();
    assert!(has_library || !flowhn_torch::BUILT_WITH_CUDA, "built with CUDA, run without it");
}
