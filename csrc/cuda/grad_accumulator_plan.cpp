// Launch plans that add one sample's gradients to main gradients.
#include "cuda/grad_accumulator_plan.h"

#include <limits>

#include "cuda/grad_accumulator_params.h"

namespace dlm_fast::cuda {
namespace {

int64_t chunks_of(const AxpyTensor& tensor) {
  return (tensor.size + kAxpyNumbers - 1) / kAxpyNumbers;
}

Launch launch_of(const char* kernel, int64_t blocks, std::string params) {
  DLM_CHECK(blocks < int64_t{1} << 31, "axpy_multi: too many numbers for one launch");
  Launch launch;
  launch.kernel = kernel;
  launch.grid_x = static_cast<unsigned>(blocks);
  launch.threads = kAxpyThreads;
  launch.shared_bytes = kAxpyScratchBytes;
  launch.params = std::move(params);
  return launch;
}

// The tensors in bundles that fit into kernel parameters.
void append_chunks(const char* kernel, const std::vector<AxpyTensor>& tensors,
                   const AxpyParams& common, int64_t chunks, std::vector<Launch>& launches) {
  AxpyParams params = common;
  int64_t blocks = 0, done = 0;
  const auto flush = [&] {
    if (blocks == 0) return;
    params.inner = params.square + chunks;
    launches.push_back(launch_of(kernel, blocks, bytes_of(params)));
    done += blocks;
    params = common;
    params.square += done;
    blocks = 0;
  };
  for (const AxpyTensor& tensor : tensors) {
    if (tensor.size == 0) continue;
    if (params.count == kAxpyTensors) flush();
    params.entries[params.count++] = {tensor.main,
                                      tensor.grad,
                                      tensor.size,
                                      tensor.key,
                                      static_cast<int>(blocks),
                                      static_cast<short>(tensor.main_dtype),
                                      static_cast<short>(tensor.grad_dtype)};
    blocks += chunks_of(tensor);
  }
  flush();
}

}  // namespace

int64_t axpy_chunks(const std::vector<AxpyTensor>& tensors) {
  int64_t chunks = 0;
  for (const AxpyTensor& tensor : tensors) {
    check_axpy(tensor);
    chunks += chunks_of(tensor);
  }
  return chunks;
}

std::vector<Launch> plan_axpy(const std::vector<AxpyTensor>& tensors, const AxpyScale& scale,
                              double* partial, double* result) {
  const int64_t chunks = axpy_chunks(tensors);
  const bool clips = scale.max_norm < std::numeric_limits<double>::infinity();
  AxpyParams params{};
  params.step = scale.step;
  params.scale = scale.scale;
  params.square = partial;
  AxpyTotalParams total{partial, chunks, scale.max_norm, scale.square_elsewhere, true, result};
  std::vector<Launch> launches;
  if (clips) {
    append_chunks("axpy_square", tensors, params, chunks, launches);
    launches.push_back(launch_of("axpy_total", 2, bytes_of(total)));
    params.factor = result + 2;
    total.find_factor = false;
  }
  append_chunks("axpy_add", tensors, params, chunks, launches);
  launches.push_back(launch_of("axpy_total", 2, bytes_of(total)));
  return launches;
}

}  // namespace dlm_fast::cuda
