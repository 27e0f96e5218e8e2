// Any registered operator by name, and libtorch's global switches.
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>
#include <dlfcn.h>

#include <cstring>
#include <sstream>
#include <string>
#include <vector>

extern "C" struct FlowhnArg {
  int64_t tag;  // the variants of `op::Arg`, in order
  int64_t i;
  double d;
  const void* p;
  size_t n;
};

namespace {

c10::IValue to_ivalue(const FlowhnArg& arg) {
  switch (arg.tag) {
    case 0: return c10::IValue();
    case 1: return *static_cast<const at::Tensor*>(arg.p);
    case 2: return arg.i;
    case 3: return arg.d;
    case 4: return arg.i != 0;
    case 5: {
      c10::List<at::Tensor> list;
      auto* tensors = static_cast<const at::Tensor* const*>(arg.p);
      for (size_t k = 0; k < arg.n; ++k) list.push_back(*tensors[k]);
      return list;
    }
    case 6: {
      auto* values = static_cast<const int64_t*>(arg.p);
      return std::vector<int64_t>(values, values + arg.n);
    }
    case 7: return std::string(static_cast<const char*>(arg.p), arg.n);
    case 8: {
      auto* values = static_cast<const double*>(arg.p);
      return std::vector<double>(values, values + arg.n);
    }
    default: TORCH_CHECK(false, "unknown argument tag ", arg.tag);
  }
}

}  // namespace

// Calls `name.overload`; trailing arguments take the schema's defaults. `push` receives each returned tensor
// (owned, or null for an undefined one); integers and floats come as zero-dimensional tensors.
extern "C" int flowhn_op_call(const char* name, const char* overload, const FlowhnArg* args, size_t n_args, void* sink,
                              void (*push)(void* sink, at::Tensor* tensor)) {
  FLOWHN_TRY({
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
    const auto& schema = op.schema();
    TORCH_CHECK(n_args <= schema.arguments().size(), "too many arguments for ", schema);
    torch::jit::Stack stack;
    for (size_t k = 0; k < n_args; ++k) stack.push_back(to_ivalue(args[k]));
    for (size_t k = n_args; k < schema.arguments().size(); ++k) {
      const auto& argument = schema.arguments()[k];
      TORCH_CHECK(argument.default_value().has_value(), "missing argument ", argument.name(), " of ", schema);
      stack.push_back(*argument.default_value());
    }
    op.callBoxed(stack);

    auto emit = [&](const at::Tensor& t) { push(sink, t.defined() ? new at::Tensor(t) : nullptr); };
    for (const auto& value : stack) {
      if (value.isTensor()) {
        emit(value.toTensor());
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) emit(tensor);
      } else if (value.isInt()) {
        emit(at::scalar_tensor(value.toInt(), at::kLong));
      } else if (value.isDouble()) {
        emit(at::scalar_tensor(value.toDouble(), at::kDouble));
      } else if (value.isBool()) {
        emit(at::scalar_tensor(value.toBool(), at::kBool));
      } else {
        TORCH_CHECK(value.isNone(), name, " returns a ", value.tagKind(), ", which has no tensor form");
      }
    }
  });
}

extern "C" int flowhn_op_schema(const char* name, const char* overload, char** out) {
  FLOWHN_TRY({
    std::stringstream text;
    text << c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).schema();
    *out = strdup(text.str().c_str());
  });
}

extern "C" int flowhn_flag_set(const char* name, int value) {
  FLOWHN_TRY({
    auto& context = at::globalContext();
    const std::string flag(name);
    const bool on = value != 0;
    if (flag == "tf32_cublas") context.setAllowTF32CuBLAS(on);
    else if (flag == "tf32_cudnn") context.setAllowTF32CuDNN(on);
    else if (flag == "bf16_reduced_precision_reduction") context.setAllowBF16ReductionCuBLAS(on, on);
    else if (flag == "deterministic") context.setDeterministicAlgorithms(on, /*warn_only=*/false);
    else if (flag == "deterministic_cudnn") context.setDeterministicCuDNN(on);
    else if (flag == "deterministic_fill") context.setDeterministicFillUninitializedMemory(on);
    else if (flag == "sdp_flash") context.setSDPUseFlash(on);
    else if (flag == "sdp_mem_efficient") context.setSDPUseMemEfficient(on);
    else if (flag == "sdp_math") context.setSDPUseMath(on);
    else if (flag == "sdp_cudnn") context.setSDPUseCuDNN(on);
    else TORCH_CHECK(false, "unknown flag ", flag);
  });
}

extern "C" int flowhn_flag_get(const char* name, int* out) {
  FLOWHN_TRY({
    auto& context = at::globalContext();
    const std::string flag(name);
    if (flag == "tf32_cublas") *out = context.allowTF32CuBLAS();
    else if (flag == "tf32_cudnn") *out = context.allowTF32CuDNN();
    else if (flag == "bf16_reduced_precision_reduction")
      *out = context.allowBF16ReductionCuBLAS() == at::CuBLASReductionOption::AllowReducedPrecisionWithSplitK;
    else if (flag == "deterministic") *out = context.deterministicAlgorithms();
    else if (flag == "deterministic_cudnn") *out = context.deterministicCuDNN();
    else if (flag == "deterministic_fill") *out = context.deterministicFillUninitializedMemory();
    else if (flag == "sdp_flash") *out = context.userEnabledFlashSDP();
    else if (flag == "sdp_mem_efficient") *out = context.userEnabledMemEfficientSDP();
    else if (flag == "sdp_math") *out = context.userEnabledMathSDP();
    else if (flag == "sdp_cudnn") *out = context.userEnabledCuDNNSDP();
    else TORCH_CHECK(false, "unknown flag ", flag);
  });
}

// The folder that libc10 was loaded from, so that a binary can say which libtorch it runs on.
extern "C" int flowhn_torch_lib_dir(char** out) {
  FLOWHN_TRY({
    Dl_info info;
    TORCH_CHECK(dladdr(reinterpret_cast<void*>(&c10::GetAllocator), &info) != 0, "dladdr cannot place libc10");
    std::string path(info.dli_fname);
    *out = strdup(path.substr(0, path.rfind('/')).c_str());
  });
}
