// The elements of a CPU tensor, for code that reads them itself.
#include "shim.h"

#include <ATen/ATen.h>

// Writes the address of the first element and how many elements the strides reach from there; null and 0 if there are none.
// Refuses every tensor whose values are not simply what lies in its memory.
extern "C" int flowhn_cpu_elements(const at::Tensor* tensor, const void** data, size_t* len) {
  FLOWHN_TRY({
    TORCH_CHECK(tensor->defined(), "the tensor is undefined");
    TORCH_CHECK(!tensor->is_nested(), "the tensor is nested");
    TORCH_CHECK(tensor->layout() == at::kStrided, "the tensor is ", tensor->layout(), ", not strided: make it dense first");
    TORCH_CHECK(tensor->device().is_cpu(), "the tensor is on ", tensor->device(), ", expected the CPU");
    TORCH_CHECK(!tensor->is_neg() && !tensor->is_conj(),
                "the tensor is a view that negates or conjugates on reading: call resolve_neg or resolve_conj first");
    TORCH_CHECK(!tensor->_is_zerotensor(), "the tensor has no memory, being zero by definition");
    *data = nullptr;
    *len = 0;
    if (tensor->numel() == 0) return 0;

    size_t reach = 1;
    for (int64_t axis = 0; axis < tensor->dim(); ++axis) {
      reach += static_cast<size_t>(tensor->size(axis) - 1) * static_cast<size_t>(tensor->stride(axis));
    }
    // Another handle may have shrunk the storage.
    const size_t end = (static_cast<size_t>(tensor->storage_offset()) + reach) * tensor->element_size();
    TORCH_CHECK(end <= tensor->storage().nbytes(), "the tensor reaches past its storage of ", tensor->storage().nbytes(),
                " bytes");
    *data = tensor->const_data_ptr();
    *len = reach;
  });
}
