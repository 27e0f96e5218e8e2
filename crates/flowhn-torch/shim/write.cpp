// Writes of our own into tensors of others, which libtorch does not see.
#include "shim.h"

#include <ATen/ATen.h>

namespace {

// The first byte that the strides reach, and the one behind the last.
struct Reach {
  const char* begin;
  const char* end;
};

Reach reach(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return {nullptr, nullptr};
  int64_t elements = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) elements += (tensor.size(axis) - 1) * tensor.stride(axis);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + elements * static_cast<int64_t>(tensor.element_size())};
}

}  // namespace

// Counts a write to input `target_idx` as libtorch counts its own. Refuses a target whose elements do not lie side by side, or
// share memory with another input.
extern "C" int flowhn_write_begin(at::Tensor** inputs, size_t n_inputs, size_t target_idx) {
  FLOWHN_TRY({
    const at::Tensor* target = inputs[target_idx];
    TORCH_CHECK(target->is_contiguous(), "has strides ", target->strides(), ", but is written in place: make it contiguous");
    const Reach written = reach(*target);
    for (size_t i = 0; i < n_inputs; ++i) {
      if (i == target_idx) continue;
      const Reach read = reach(*inputs[i]);
      TORCH_CHECK(read.end <= written.begin || written.end <= read.begin,
                  "is written in place, but shares memory with another argument: copy one of them");
    }
    target->unsafeGetTensorImpl()->bump_version();
  });
}
