// Starts kernels that nvcc compiled into this module.
#include <map>
#include <mutex>
#include <set>

#include "cuda/check.h"
#include "cuda/nvcc_launch.h"

namespace dlm_fast::cuda {

#define DLM_BODY(body) std::vector<KernelEntry> body##_kernels();
#include "kernel_bodies.inc"
#undef DLM_BODY

namespace {

const std::map<std::string, KernelEntry>& table() {
  static const std::map<std::string, KernelEntry> kernels = [] {
    std::map<std::string, KernelEntry> entries;
#define DLM_BODY(body) \
  for (const KernelEntry& entry : body##_kernels()) entries.emplace(entry.name, entry);
#include "kernel_bodies.inc"
#undef DLM_BODY
    return entries;
  }();
  return kernels;
}

// More than the 48 KiB that every kernel may use must be asked for, once per kernel and device.
void allow_shared_memory(const KernelEntry& entry, unsigned bytes) {
  constexpr unsigned kAlwaysAllowed = 48u << 10;
  if (bytes <= kAlwaysAllowed) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> asked;
  int device = 0;
  DLM_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (!asked.insert({entry.function, device}).second) return;
  int most = 0;
  DLM_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  DLM_CUDA_CHECK(
      cudaFuncSetAttribute(entry.function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [name, entry] : table()) names.push_back(name);
  return names;
}

void launch(const Launch& launch, void* stream) {
  const auto found = table().find(launch.kernel);
  if (found == table().end() || found->second.params_bytes != launch.params.size())
    throw std::invalid_argument("no kernel " + launch.kernel + " with such parameters");
  const KernelEntry& entry = found->second;
  allow_shared_memory(entry, launch.shared_bytes);
  void* arguments[] = {const_cast<char*>(launch.params.data())};
  DLM_CUDA_CHECK(cudaLaunchKernel(entry.function, dim3(launch.grid_x, launch.grid_y, 1),
                                  dim3(launch.threads, 1, 1), arguments, launch.shared_bytes,
                                  static_cast<cudaStream_t>(stream)));
}

}  // namespace dlm_fast::cuda
