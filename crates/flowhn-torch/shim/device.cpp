// Streams, events and memory statistics through c10's device-generic interface: no CUDA header is needed.
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

extern "C" struct FlowhnStream {
  int64_t id;
  int64_t device_index;
  int64_t device_type;
};

extern "C" struct FlowhnMemory {
  int64_t allocated, allocated_peak, reserved, reserved_peak, n_ooms, n_alloc_retries, free, total;
};

namespace {

constexpr auto kType = c10::DeviceType::CUDA;

FlowhnStream pack(const c10::Stream& stream) {
  auto parts = stream.pack3();
  return {parts.stream_id, parts.device_index, static_cast<int64_t>(parts.device_type)};
}

c10::Stream unpack(const FlowhnStream& stream) {
  return c10::Stream::unpack3(stream.id, static_cast<c10::DeviceIndex>(stream.device_index),
                              static_cast<c10::DeviceType>(stream.device_type));
}

c10::impl::VirtualGuardImpl guard() { return c10::impl::VirtualGuardImpl(kType); }

// The device, after making sure that it is there and that libtorch's CUDA side is awake. c10 itself narrows the index to a
// byte and asserts, or not even that, on a machine without a device.
c10::Device device(int64_t index) {
  TORCH_CHECK(c10::impl::hasDeviceGuardImpl(kType), "this libtorch has no CUDA: install a CUDA build of PyTorch");
  const int64_t n_devices = guard().deviceCount();
  TORCH_CHECK(index >= 0 && index < n_devices, "there is no CUDA device ", index, ": this machine has ", n_devices);
  at::globalContext().lazyInitDevice(kType);
  return c10::Device(kType, static_cast<c10::DeviceIndex>(index));
}

// libtorch's CUDA allocator, where there is a device.
c10::DeviceAllocator* allocator() {
  device(0);
  return c10::getDeviceAllocator(kType);
}

}  // namespace

extern "C" int flowhn_stream_current(int64_t index, FlowhnStream* out) {
  FLOWHN_TRY(*out = pack(guard().getStream(device(index))));
}
extern "C" int flowhn_stream_default(int64_t index, FlowhnStream* out) {
  FLOWHN_TRY(*out = pack(guard().getDefaultStream(device(index))));
}
extern "C" int flowhn_stream_from_pool(int64_t index, int high_priority, FlowhnStream* out) {
  FLOWHN_TRY(*out = pack(guard().getStreamFromGlobalPool(device(index), high_priority != 0)));
}
extern "C" int flowhn_stream_exchange(FlowhnStream stream, FlowhnStream* previous) {
  FLOWHN_TRY(*previous = pack(guard().exchangeStream(unpack(stream))));
}
extern "C" int flowhn_stream_native(FlowhnStream stream, void** out) {
  FLOWHN_TRY(*out = unpack(stream).native_handle());
}
extern "C" int flowhn_stream_synchronize(FlowhnStream stream) { FLOWHN_TRY(unpack(stream).synchronize()); }
extern "C" int flowhn_stream_query(FlowhnStream stream, int* out) { FLOWHN_TRY(*out = unpack(stream).query()); }
extern "C" int flowhn_record_stream(at::Tensor* tensor, FlowhnStream stream) {
  FLOWHN_TRY(tensor->record_stream(unpack(stream)));
}

extern "C" int flowhn_event_new(int timing, c10::Event** out) {
  FLOWHN_TRY({
    const auto type = device(0).type();
    *out = new c10::Event(type, timing ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT);
  });
}
extern "C" void flowhn_event_free(c10::Event* event) { delete event; }
extern "C" int flowhn_event_record(c10::Event* event, FlowhnStream stream) { FLOWHN_TRY(event->record(unpack(stream))); }
extern "C" int flowhn_event_block(c10::Event* event, FlowhnStream stream) { FLOWHN_TRY(event->block(unpack(stream))); }
extern "C" int flowhn_event_synchronize(c10::Event* event) { FLOWHN_TRY(event->synchronize()); }
extern "C" int flowhn_event_query(c10::Event* event, int* out) { FLOWHN_TRY(*out = event->query()); }
extern "C" int flowhn_event_elapsed_ms(c10::Event* start, c10::Event* end, double* out) {
  FLOWHN_TRY(*out = start->elapsedTime(*end));
}

extern "C" int flowhn_memory_stats(int64_t index, FlowhnMemory* out) {
  FLOWHN_TRY({
    const auto place = device(index);
    const auto stats = allocator()->getDeviceStats(place.index());
    const auto info = allocator()->getMemoryInfo(place.index());
    out->allocated = stats.allocated_bytes[0].current;
    out->allocated_peak = stats.allocated_bytes[0].peak;
    out->reserved = stats.reserved_bytes[0].current;
    out->reserved_peak = stats.reserved_bytes[0].peak;
    out->n_ooms = stats.num_ooms;
    out->n_alloc_retries = stats.num_alloc_retries;
    out->free = static_cast<int64_t>(info.first);
    out->total = static_cast<int64_t>(info.second);
  });
}
extern "C" int flowhn_memory_reset_peak(int64_t index) {
  FLOWHN_TRY(allocator()->resetPeakStats(device(index).index()));
}
extern "C" int flowhn_memory_empty_cache() { FLOWHN_TRY(allocator()->emptyCache()); }
