// The dot products of bfloat16 pairs of AVX-512.
#include <immintrin.h>

#include "cpu/fma_peak.h"

namespace dlm_fast::cpu::avx512bf16 {

namespace {

// Sixteen sums; the operands are any bits, read as pairs.
struct Sums {
  static constexpr int kLanes = 16;
  __m512 x;
  static Sums set(float value) {
    return {_mm512_set1_ps(value)};
  }
  friend Sums operator+(Sums a, Sums b) {
    return {_mm512_add_ps(a.x, b.x)};
  }
  void store(float* p) const {
    _mm512_storeu_ps(p, x);
  }
  static Sums fma(Sums sum, Sums a, Sums b) {
    return {_mm512_dpbf16_ps(sum.x, (__m512bh)a.x, (__m512bh)b.x)};
  }
};

}  // namespace

FmaLoop pair_loop() {
  return FmaChains<Sums, 24, 2>::loop();
}

}  // namespace dlm_fast::cpu::avx512bf16
