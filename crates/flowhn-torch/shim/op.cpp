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

template <typename T>
const T* items(const FlowhnArg& arg) {
  return static_cast<const T*>(arg.p);
}

c10::IValue to_list(const FlowhnArg& arg, const c10::TypePtr& element) {
  auto* tensors = items<const at::Tensor*>(arg);
  if (element->kind() != c10::TypeKind::OptionalType) {
    c10::List<at::Tensor> list;
    for (size_t k = 0; k < arg.n; ++k) list.push_back(*tensors[k]);
    return list;
  }
  c10::List<std::optional<at::Tensor>> list;
  for (size_t k = 0; k < arg.n; ++k) {
    list.push_back(tensors[k]->defined() ? std::make_optional(*tensors[k]) : std::nullopt);
  }
  return list;
}

// The value in the form that the schema asks for, where an argument can mean several.
c10::IValue to_ivalue(const FlowhnArg& arg, const c10::Argument& argument) {
  c10::TypePtr type = argument.type();
  if (const auto* optional = type->castRaw<c10::OptionalType>()) type = optional->getElementType();
  const auto* list = type->castRaw<c10::ListType>();
  const c10::TypePtr element = list != nullptr ? list->getElementType() : c10::TypePtr(c10::AnyType::get());
  switch (arg.tag) {
    case 0: return c10::IValue();
    case 1: return *static_cast<const at::Tensor*>(arg.p);
    case 2: return type->kind() == c10::TypeKind::FloatType ? c10::IValue(static_cast<double>(arg.i)) : c10::IValue(arg.i);
    case 3: return arg.d;
    case 4: return arg.i != 0;
    case 5: return to_list(arg, element);
    case 6: {
      auto* values = items<int64_t>(arg);
      if (element->kind() == c10::TypeKind::FloatType) return std::vector<double>(values, values + arg.n);
      if (element->kind() == c10::TypeKind::BoolType) {
        c10::List<bool> flags;
        for (size_t k = 0; k < arg.n; ++k) flags.push_back(values[k] != 0);
        return flags;
      }
      return std::vector<int64_t>(values, values + arg.n);
    }
    case 7: {
      std::string text(static_cast<const char*>(arg.p), arg.n);
      if (type->kind() == c10::TypeKind::DeviceObjType) return c10::Device(text);
      return text;
    }
    case 8: return std::vector<double>(items<double>(arg), items<double>(arg) + arg.n);
    default: TORCH_CHECK(false, "unknown argument tag ", arg.tag);
  }
}

// Kernels called with a boxed stack trust its types, so a wrong one must not get that far.
void check_type(const c10::FunctionSchema& schema, const c10::IValue& value, size_t position) {
  const auto& argument = schema.arguments()[position];
  c10::TypePtr type = argument.type();
  if (const auto* optional = type->castRaw<c10::OptionalType>()) type = optional->getElementType();
  if (type->kind() == c10::TypeKind::NumberType && value.isScalar()) return;
  if (value.isTensor() && type->kind() == c10::TypeKind::TensorType) return;
  TORCH_CHECK(value.type()->isSubtypeOf(*argument.type()), "argument ", argument.name(), " is a ", argument.type()->repr_str(),
              ", not a ", value.type()->repr_str(), ": ", schema);
}

}  // namespace

// Calls `name.overload`; trailing arguments take the schema's defaults. `push` receives each returned tensor
// (owned, or null for an undefined one); integers and floats come as zero-dimensional tensors.
extern "C" int flowhn_op_call(const char* name, const char* overload, const FlowhnArg* args, size_t n_args, void* sink,
                              void (*push)(void* sink, at::Tensor* tensor)) {
  FLOWHN_TRY({
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
    const auto& schema = op.schema();
    TORCH_CHECK(n_args <= schema.arguments().size(), n_args, " arguments are too many for ", schema);
    torch::jit::Stack stack;
    for (size_t k = 0; k < n_args; ++k) {
      stack.push_back(to_ivalue(args[k], schema.arguments()[k]));
      check_type(schema, stack.back(), k);
    }
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
