// Counting what libtorch's operators compute, for tests.

// libtorch is built so, and the header checks without it a mark that such a build never sets.
#ifndef NDEBUG
#define NDEBUG
#endif
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <cstring>

namespace {

thread_local uint64_t matmul_flops = 0;

// The operators that matrix products come down to, with the positions of their two matrices.
std::unique_ptr<at::ObserverContext> on_operator(const at::RecordFunction& function) {
  static constexpr struct {
    const char* name;
    size_t left, right;
  } kProducts[] = {{"aten::mm", 0, 1}, {"aten::bmm", 0, 1}, {"aten::addmm", 1, 2}, {"aten::baddbmm", 1, 2}};
  for (const auto& product : kProducts) {
    if (std::strcmp(function.name(), product.name) != 0) continue;
    const auto inputs = function.inputs();
    const at::Tensor left = inputs.at(product.left).toTensor();
    const at::Tensor right = inputs.at(product.right).toTensor();
    matmul_flops += 2 * static_cast<uint64_t>(left.numel()) * static_cast<uint64_t>(right.size(-1));
  }
  return nullptr;
}

}  // namespace

// Starts to count this thread's matrix products and writes a handle of the count.
extern "C" int flowhn_count_begin(uint64_t* handle) {
  FLOWHN_TRY({
    matmul_flops = 0;
    *handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(on_operator).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  });
}

// Ends the count and writes the floating-point operations.
extern "C" int flowhn_count_end(uint64_t handle, uint64_t* flops) {
  FLOWHN_TRY({
    at::removeCallback(handle);
    *flops = matmul_flops;
  });
}
