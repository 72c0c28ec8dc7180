// Chunks of gradients for AVX-512.
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from undefined registers and trip this warning when inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu/grad_accumulator_kernels.h"
#include "cpu/vec_avx512.h"

namespace dlm_fast::cpu::avx512 {

namespace {
struct Eight {
  __m512d x;
  static Eight zero() {
    return {_mm512_setzero_pd()};
  }
  static Eight load(const float* p) {
    return {_mm512_cvtps_pd(_mm256_loadu_ps(p))};
  }
  void store(double* p) const {
    _mm512_storeu_pd(p, x);
  }
  static Eight add_product(Eight sum, Eight a, Eight b) {
    return {_mm512_fmadd_pd(a.x, b.x, sum.x)};
  }
};
}  // namespace

const AxpyKernels& axpy_kernels() {
  return AxpyKernel<Vec, Eight>::kernels();
}

}  // namespace dlm_fast::cpu::avx512
