// Chunks of gradients for AVX2 with F16C.
#include "cpu/grad_accumulator_kernels.h"
#include "cpu/vec_avx2.h"

namespace dlm_fast::cpu::avx2 {

namespace {
struct Eight {
  __m256d low, high;
  static Eight zero() {
    return {_mm256_setzero_pd(), _mm256_setzero_pd()};
  }
  static Eight load(const float* p) {
    return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
  }
  void store(double* p) const {
    _mm256_storeu_pd(p, low);
    _mm256_storeu_pd(p + 4, high);
  }
  static Eight add_product(Eight sum, Eight a, Eight b) {
    return {_mm256_fmadd_pd(a.low, b.low, sum.low), _mm256_fmadd_pd(a.high, b.high, sum.high)};
  }
};
}  // namespace

const AxpyKernels& axpy_kernels() {
  return AxpyKernel<Vec, Eight>::kernels();
}

}  // namespace dlm_fast::cpu::avx2
