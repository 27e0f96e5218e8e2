// One autograd node for every Rust function: `apply` calls back into Rust through a table of two functions.
#include "shim.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

extern "C" struct FlowhnFunction {
  // Returns 0, or 1 with `*error` set to a malloc'ed message. Each `out[i]` is null or an owned heap tensor. `node` is good
  // for `flowhn_function_grad_place` until the call returns.
  int (*backward)(void* data, const void* node, at::Tensor** saved, size_t n_saved, at::Tensor** grads, size_t n_grads,
                  const uint8_t* needs_grad, at::Tensor** out, size_t n_out, char** error);
  // An owned heap tensor for the gradient of an output, or null.
  at::Tensor* (*grad_place)(void* data, size_t output_idx);
  void (*drop)(void* data);
};

namespace {

// Flags of an output; `ffi.rs` has the same.
constexpr uint8_t NON_DIFFERENTIABLE = 1, ACCEPTS_UNDEFINED_GRAD = 2;

// The Rust value; its deleter is the table's `drop`.
using Data = std::unique_ptr<void, void (*)(void*)>;

struct OutputInfo {
  at::TensorOptions options;
  std::vector<int64_t> sizes;
  bool differentiable;
  bool accepts_undefined;

  // What a backward sees where nothing flowed back. Nothing ever flows into an output that is not differentiable, so that one
  // costs a single element.
  at::Tensor nothing() const {
    if (accepts_undefined) return at::Tensor();
    return differentiable ? at::zeros(sizes, options) : at::zeros({}, options).expand(sizes);
  }
};

struct RustNode final : Node {
  std::string name_;
  decltype(FlowhnFunction::backward) backward_ = nullptr;
  decltype(FlowhnFunction::grad_place) grad_place_ = nullptr;
  Data data_{nullptr, nullptr};
  std::vector<SavedVariable> saved_;
  std::vector<OutputInfo> outputs_;
  bool released_ = false;

  std::string name() const override { return name_; }

  void release_variables() override {
    // Freed after the lock is gone: the destructors run code that is not ours.
    std::vector<SavedVariable> saved;
    Data data(nullptr, nullptr);
    std::lock_guard<std::mutex> lock(mutex_);
    saved.swap(saved_);
    data.swap(data_);
    released_ = true;
  }

  // Where the gradient of an output may be written, if this function wants it anywhere.
  at::Tensor* grad_place(size_t output_idx) {
    std::lock_guard<std::mutex> lock(mutex_);
    return released_ ? nullptr : grad_place_(data_.get(), output_idx);
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    std::vector<at::Tensor> saved;
    saved.reserve(saved_.size());
    for (auto& variable : saved_) saved.push_back(variable.unpack(shared_from_this()));
    const bool create_graph = torch::autograd::GradMode::is_enabled();
    torch::autograd::edge_list grad_edges;
    if (create_graph) grad_edges = torch::autograd::collect_next_edges(grads);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) grads[i] = outputs_[i].nothing();
    }

    variable_list result = call_back(saved, grads);
    if (create_graph) forbid_second_derivative(result, grad_edges);
    return result;
  }

 private:
  variable_list call_back(std::vector<at::Tensor>& saved, variable_list& grads) {
    const size_t n_out = num_outputs();
    std::vector<uint8_t> needs_grad(n_out);
    for (size_t i = 0; i < n_out; ++i) needs_grad[i] = task_should_compute_output(i);
    std::vector<at::Tensor*> saved_ptrs, grad_ptrs, out_ptrs(n_out, nullptr);
    for (auto& tensor : saved) saved_ptrs.push_back(&tensor);
    for (auto& tensor : grads) grad_ptrs.push_back(&tensor);
    // What the callback hands over has a place to go before it is called, so that no exception can lose it.
    std::vector<std::unique_ptr<at::Tensor>> owned(n_out);
    variable_list result(n_out);

    char* error = nullptr;
    const int status = backward_(data_.get(), this, saved_ptrs.data(), saved_ptrs.size(), grad_ptrs.data(), grad_ptrs.size(),
                                 needs_grad.data(), out_ptrs.data(), n_out, &error);
    std::unique_ptr<char, void (*)(void*)> message(error, std::free);
    for (size_t i = 0; i < n_out; ++i) owned[i].reset(out_ptrs[i]);
    TORCH_CHECK(status == 0, name_, " backward: ", message ? message.get() : "no message");
    for (size_t i = 0; i < n_out; ++i) {
      if (owned[i] && needs_grad[i]) result[i] = std::move(*owned[i]);
    }
    return result;
  }

  // A backward in Rust records nothing. Where the caller asked for a graph of the gradients (create_graph), they hang on a node
  // that fails and that reaches everything they depend on, so that a second derivative can be neither zero nor incomplete.
  void forbid_second_derivative(variable_list& result, const torch::autograd::edge_list& grad_edges) {
    torch::autograd::edge_list edges;
    for (const auto* list : {&std::as_const(next_edges_), &grad_edges}) {
      for (const auto& edge : *list) {
        if (edge.is_valid()) edges.push_back(edge);
      }
    }
    std::shared_ptr<Node> refusal(
        new torch::autograd::Error(name_ + ": a function written in Rust has no second derivative", std::move(edges)),
        torch::autograd::deleteNode);
    for (auto& tensor : result) {
      if (!tensor.defined() || !torch::autograd::isDifferentiableType(tensor.scalar_type())) continue;
      tensor = tensor.detach();
      torch::autograd::create_gradient_edge(tensor, refusal);
    }
  }
};

}  // namespace

// Whether operators of this thread are recorded.
extern "C" int flowhn_grad_mode_get() { return torch::autograd::GradMode::is_enabled(); }
extern "C" void flowhn_grad_mode_set(int enabled) { torch::autograd::GradMode::set_enabled(enabled != 0); }

// Whether autograd would record a function of these inputs now. Reads two fields of each tensor and cannot throw.
extern "C" int flowhn_function_is_recorded(at::Tensor** inputs, size_t n_inputs) {
  if (!torch::autograd::GradMode::is_enabled()) return 0;
  for (size_t i = 0; i < n_inputs; ++i) {
    if (inputs[i]->requires_grad()) return 1;
  }
  return 0;
}

// Attaches a node to the outputs. Owns `data` from here on, whatever happens.
extern "C" int flowhn_function_attach(const char* name, at::Tensor** inputs, size_t n_inputs, at::Tensor** outputs,
                                      size_t n_outputs, const uint8_t* output_flags, at::Tensor** saved,
                                      size_t n_saved, FlowhnFunction function, void* data, at::Tensor** result) {
  Data owned(data, function.drop);
  FLOWHN_TRY({
    std::shared_ptr<RustNode> node(new RustNode(), torch::autograd::deleteNode);
    node->data_ = std::move(owned);
    node->backward_ = function.backward;
    node->grad_place_ = function.grad_place;
    node->name_ = name;

    variable_list input_vars;
    for (size_t i = 0; i < n_inputs; ++i) input_vars.push_back(*inputs[i]);
    node->set_next_edges(torch::autograd::collect_next_edges(input_vars));
    node->clear_input_metadata();

    std::unordered_set<at::TensorImpl*> plain;
    std::vector<std::optional<at::Tensor>> raw;
    for (size_t i = 0; i < n_outputs; ++i) {
      raw.emplace_back(*outputs[i]);
      if (output_flags[i] & NON_DIFFERENTIABLE) plain.insert(outputs[i]->unsafeGetTensorImpl());
    }
    // Saved without their history: a backward in Rust records nothing, and an output, or a view of one, that knew its
    // history would own the node that owns it. The version counter stays shared, so in-place edits are noticed.
    for (size_t i = 0; i < n_saved; ++i) {
      node->saved_.emplace_back(saved[i]->defined() ? saved[i]->detach() : at::Tensor(), /*is_output=*/false);
    }
    torch::autograd::_jvp_fn_t jvp = [](const variable_list&, const variable_list&) -> variable_list {
      TORCH_CHECK(false, "forward-mode differentiation of Rust functions is not supported");
    };
    torch::autograd::_view_as_self_fn_t view_as_self = [](const at::Tensor& x) { return x.view_as(x); };
    auto wrapped = torch::autograd::_wrap_outputs(input_vars, plain, {}, raw, node, jvp, {}, view_as_self,
                                                  /*pure_view=*/false);
    std::vector<std::unique_ptr<at::Tensor>> handles;
    for (const auto& tensor : wrapped) {
      const bool accepts_undefined = output_flags[handles.size()] & ACCEPTS_UNDEFINED_GRAD;
      node->outputs_.push_back({tensor->options(), tensor->sizes().vec(), tensor->requires_grad(), accepts_undefined});
      handles.push_back(std::make_unique<at::Tensor>(*tensor));
    }
    for (size_t i = 0; i < n_outputs; ++i) result[i] = handles[i].release();
  });
}

// Where the gradient of an input may be written: asks the function that the input came out of, if Rust wrote it and it came from
// there directly. `*out` is null or an owned heap tensor.
extern "C" int flowhn_function_grad_place(const void* node, size_t input_idx, at::Tensor** out) {
  FLOWHN_TRY({
    *out = nullptr;
    const auto& edge = static_cast<const RustNode*>(node)->next_edge(input_idx);
    if (auto* producer = dynamic_cast<RustNode*>(edge.function.get())) *out = producer->grad_place(edge.input_nr);
  });
}

// Forgets the gradient of a leaf.
extern "C" int flowhn_grad_clear(at::Tensor* tensor) { FLOWHN_TRY(tensor->mutable_grad().reset()); }
