// One autograd node for every Rust function: `apply` calls back into Rust through a table of two functions.
#include "shim.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

extern "C" struct FlowhnFunction {
  // Returns 0, or 1 with `*error` set to a malloc'ed message. Each `out[i]` is null or an owned heap tensor.
  int (*backward)(void* data, at::Tensor** saved, size_t n_saved, at::Tensor** grads, size_t n_grads,
                  const uint8_t* needs_grad, at::Tensor** out, size_t n_out, char** error);
  void (*drop)(void* data);
};

namespace {

struct RustNode final : Node {
  std::string name_;
  FlowhnFunction function_{};
  void* data_ = nullptr;
  std::vector<SavedVariable> saved_;
  bool released_ = false;

  std::string name() const override { return name_; }

  void drop_data() {
    if (data_ != nullptr) {
      function_.drop(data_);
      data_ = nullptr;
    }
  }

  ~RustNode() override { drop_data(); }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    saved_.clear();
    drop_data();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    std::vector<at::Tensor> saved;
    saved.reserve(saved_.size());
    for (auto& variable : saved_) saved.push_back(variable.unpack(shared_from_this()));
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) grads[i] = input_metadata(i).zeros_like();
    }

    const size_t n_out = num_outputs();
    std::vector<uint8_t> needs_grad(n_out);
    for (size_t i = 0; i < n_out; ++i) needs_grad[i] = task_should_compute_output(i);
    std::vector<at::Tensor*> saved_ptrs, grad_ptrs, out_ptrs(n_out, nullptr);
    for (auto& tensor : saved) saved_ptrs.push_back(&tensor);
    for (auto& tensor : grads) grad_ptrs.push_back(&tensor);

    char* error = nullptr;
    const int status = function_.backward(data_, saved_ptrs.data(), saved_ptrs.size(), grad_ptrs.data(),
                                          grad_ptrs.size(), needs_grad.data(), out_ptrs.data(), n_out, &error);
    variable_list result(n_out);
    for (size_t i = 0; i < n_out; ++i) {
      if (out_ptrs[i] == nullptr) continue;
      if (needs_grad[i]) result[i] = std::move(*out_ptrs[i]);
      delete out_ptrs[i];
    }
    if (status != 0) {
      std::string message = error != nullptr ? error : "no message";
      std::free(error);
      TORCH_CHECK(false, name_, " backward: ", message);
    }
    return result;
  }
};

}  // namespace

// Whether autograd would record a function of these inputs now.
extern "C" int flowhn_function_is_recorded(at::Tensor** inputs, size_t n_inputs) {
  if (!torch::autograd::GradMode::is_enabled()) return 0;
  for (size_t i = 0; i < n_inputs; ++i) {
    if (inputs[i]->requires_grad()) return 1;
  }
  return 0;
}

// Attaches a node to the outputs. Owns `data` from here on, whatever happens.
extern "C" int flowhn_function_attach(const char* name, at::Tensor** inputs, size_t n_inputs, at::Tensor** outputs,
                                      size_t n_outputs, const uint8_t* non_differentiable, at::Tensor** saved,
                                      size_t n_saved, FlowhnFunction function, void* data, at::Tensor** result) {
  FLOWHN_TRY({
    std::shared_ptr<RustNode> node(new RustNode(), torch::autograd::deleteNode);
    node->function_ = function;
    node->data_ = data;
    node->name_ = name;

    variable_list input_vars;
    for (size_t i = 0; i < n_inputs; ++i) input_vars.push_back(*inputs[i]);
    const bool recorded =
        torch::autograd::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(input_vars);
    if (recorded) {
      node->set_next_edges(torch::autograd::collect_next_edges(input_vars));
      node->clear_input_metadata();
    }

    std::unordered_set<at::TensorImpl*> plain;
    std::vector<std::optional<at::Tensor>> raw;
    for (size_t i = 0; i < n_outputs; ++i) {
      raw.emplace_back(*outputs[i]);
      if (non_differentiable[i]) plain.insert(outputs[i]->unsafeGetTensorImpl());
    }
    torch::autograd::_jvp_fn_t jvp = [](const variable_list&, const variable_list&) -> variable_list {
      TORCH_CHECK(false, "forward-mode differentiation of Rust functions is not supported");
    };
    torch::autograd::_view_as_self_fn_t view_as_self = [](const at::Tensor& x) { return x.view_as(x); };
    auto wrapped =
        torch::autograd::_wrap_outputs(input_vars, plain, {}, raw, recorded ? node : std::shared_ptr<Node>(), jvp, {},
                                       view_as_self, /*pure_view=*/false);
    if (recorded) {
      for (size_t i = 0; i < n_saved; ++i) {
        at::Tensor tensor = *saved[i];
        bool is_output = false;
        for (size_t j = 0; j < n_outputs; ++j) {
          if (tensor.is_same(*outputs[j])) {
            tensor = *wrapped[j];
            is_output = tensor.grad_fn().get() == node.get();
          }
        }
        node->saved_.emplace_back(tensor, is_output);
      }
    }
    for (size_t i = 0; i < n_outputs; ++i) result[i] = new at::Tensor(*wrapped[i]);
  });
}
