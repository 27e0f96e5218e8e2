// CUDA graphs. Needs the CUDA headers and libtorch_cuda; compiled only where both are there.
#include "shim.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>

#include <cstdio>
#include <cstring>

using at::cuda::CUDAGraph;

extern "C" int flowhn_graph_new(CUDAGraph** out) {
  FLOWHN_TRY({
    TORCH_CHECK(at::cuda::is_available(), "there is no CUDA device");
    *out = new CUDAGraph(/*keep_graph=*/true);
  });
}
extern "C" void flowhn_graph_free(CUDAGraph* graph) {
  try {
    delete graph;
  } catch (...) {
  }
}
// Pool (0, 0) asks for a private memory pool. Modes: 0 global, 1 thread-local, 2 relaxed.
extern "C" int flowhn_graph_begin(CUDAGraph* graph, uint64_t pool_a, uint64_t pool_b, int mode) {
  FLOWHN_TRY({
    // libtorch looks at this only after it has put its random generators into capture mode, where they would stay.
    TORCH_CHECK(at::cuda::getCurrentCUDAStream() != at::cuda::getDefaultCUDAStream(),
                "the default stream cannot be captured: enter another one first");
    graph->capture_begin({pool_a, pool_b}, static_cast<cudaStreamCaptureMode>(mode));
  });
}
// A capture that fails leaves libtorch's random generators in capture mode, where the next operator that draws a number fails. One
// that succeeds, if only of nothing, ends that.
extern "C" int flowhn_graph_end(CUDAGraph* graph) {
  FLOWHN_TRY({
    try {
      graph->capture_end();
    } catch (...) {
      try {
        CUDAGraph nothing;
        nothing.capture_begin({0, 0}, cudaStreamCaptureModeRelaxed);
        nothing.capture_end();
      } catch (...) {
      }
      throw;
    }
  });
}
// The captured nodes, which may be changed until `flowhn_graph_instantiate`.
extern "C" int flowhn_graph_raw(CUDAGraph* graph, void** out) { FLOWHN_TRY(*out = graph->raw_cuda_graph()); }
extern "C" int flowhn_graph_instantiate(CUDAGraph* graph) { FLOWHN_TRY(graph->instantiate()); }
extern "C" int flowhn_graph_replay(CUDAGraph* graph) { FLOWHN_TRY(graph->replay()); }
extern "C" int flowhn_graph_pool(CUDAGraph* graph, uint64_t* a, uint64_t* b) {
  FLOWHN_TRY({
    auto pool = graph->pool();
    *a = pool.first;
    *b = pool.second;
  });
}

extern "C" int flowhn_cuda_properties(int64_t index, char* name, size_t capacity, int64_t* n_multiprocessors,
                                      int64_t* compute_capability, int64_t* total_bytes, int64_t* shared_bytes,
                                      char* pci_bus_id, size_t pci_capacity) {
  FLOWHN_TRY({
    const int64_t n_devices = at::cuda::device_count();
    TORCH_CHECK(index >= 0 && index < n_devices, "there is no CUDA device ", index, ": this machine has ", n_devices);
    const auto* properties = at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(index));
    strncpy(name, properties->name, capacity - 1);
    *n_multiprocessors = properties->multiProcessorCount;
    *compute_capability = properties->major * 10 + properties->minor;
    *total_bytes = static_cast<int64_t>(properties->totalGlobalMem);
    *shared_bytes = static_cast<int64_t>(properties->sharedMemPerBlockOptin);
    snprintf(pci_bus_id, pci_capacity, "%08x:%02x:%02x.0", properties->pciDomainID, properties->pciBusID,
             properties->pciDeviceID);
  });
}
