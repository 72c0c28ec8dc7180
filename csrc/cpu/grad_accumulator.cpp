// Adds the gradients of one sample to main gradients: chunks to kernels, partial sums in order.
#include "dlm_fast/grad_accumulator.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel_for.h"
#include "cpu/grad_accumulator_kernels.h"
#include "cpu/vec_portable.h"
#include "dlm_fast/cpu_features.h"

namespace dlm_fast::cpu {

namespace {

struct PortableEight {
  double x[8];
  static PortableEight zero() {
    return {};
  }
  static PortableEight load(const float* p) {
    PortableEight out;
    for (int i = 0; i < 8; ++i) out.x[i] = p[i];
    return out;
  }
  void store(double* p) const {
    std::copy_n(x, 8, p);
  }
  static PortableEight add_product(PortableEight sum, const PortableEight& a,
                                   const PortableEight& b) {
    for (int i = 0; i < 8; ++i) sum.x[i] += a.x[i] * b.x[i];
    return sum;
  }
};

const AxpyKernels& axpy_kernels() {
#ifdef DLM_SIMD_X86
  if (simd_level() >= SimdLevel::kAvx512) return avx512::axpy_kernels();
  if (simd_level() >= SimdLevel::kAvx2) return avx2::axpy_kernels();
#endif
  return AxpyKernel<portable::Vec<float, 4>, PortableEight>::kernels();
}

AxpySums add_double(const AxpyChunk& chunk) {
  double* main = static_cast<double*>(chunk.main);
  const double* grad = static_cast<const double*>(chunk.grad);
  AxpySums sums{0, 0};
  for (int64_t i = 0; i < chunk.count; ++i) {
    sums.square += grad[i] * grad[i];
    sums.inner += grad[i] * main[i];
    main[i] += chunk.scale * grad[i];
  }
  return sums;
}

AxpySums square_double(const AxpyChunk& chunk) {
  const double* grad = static_cast<const double*>(chunk.grad);
  AxpySums sums{0, 0};
  for (int64_t i = 0; i < chunk.count; ++i) sums.square += grad[i] * grad[i];
  return sums;
}

const AxpyKernels& double_kernels() {
  static const AxpyKernels kernels{add_double, square_double};
  return kernels;
}

int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : (dtype == Dtype::kFloat32 ? 4 : 2);
}

std::vector<AxpyChunk> chunks_of(const AxpyTensor* tensors, int64_t count, uint32_t step) {
  std::vector<AxpyChunk> chunks;
  for (int64_t t = 0; t < count; ++t) {
    check_axpy(tensors[t]);
    for (int64_t first = 0; first < tensors[t].size; first += kAxpyChunk)
      chunks.push_back(
          {static_cast<char*>(tensors[t].main) + first * bytes_of(tensors[t].main_dtype),
           static_cast<const char*>(tensors[t].grad) + first * bytes_of(tensors[t].grad_dtype),
           first, std::min(kAxpyChunk, tensors[t].size - first), tensors[t].main_dtype,
           tensors[t].grad_dtype, 0.0, philox_key(tensors[t].key), step});
  }
  return chunks;
}

// Runs one kernel over all chunks; a chunk's sums have their own place, which fixes the order.
AxpySums run(const std::vector<AxpyChunk>& chunks,
             AxpySums (*AxpyKernels::*kernel)(const AxpyChunk&), int num_threads) {
  const AxpyKernels& single = axpy_kernels();
  std::vector<AxpySums> partial(chunks.size());
  parallel_for(static_cast<int64_t>(chunks.size()), num_threads, [&](int64_t i) {
    const bool wide = chunks[i].grad_dtype == Dtype::kFloat64;
    partial[i] = ((wide ? double_kernels() : single).*kernel)(chunks[i]);
  });
  AxpySums total{0, 0};
  for (const AxpySums& sums : partial) total.square += sums.square, total.inner += sums.inner;
  return total;
}

}  // namespace

AxpyResult axpy_multi(const AxpyTensor* tensors, int64_t count, const AxpyScale& scale,
                      int num_threads) {
  std::vector<AxpyChunk> chunks = chunks_of(tensors, count, scale.step);
  double factor = 1;
  if (scale.max_norm < std::numeric_limits<double>::infinity()) {
    const AxpySums sums = run(chunks, &AxpyKernels::square, num_threads);
    const double norm = std::sqrt(sums.square + scale.square_elsewhere);
    // A norm that is not a number makes the factor one too: what is wrong must show.
    if (!(norm <= scale.max_norm)) factor = scale.max_norm / norm;
  }
  for (AxpyChunk& chunk : chunks) chunk.scale = factor * scale.scale;
  const AxpySums sums = run(chunks, &AxpyKernels::add, num_threads);
  return {sums.square, sums.inner, factor};
}

}  // namespace dlm_fast::cpu
