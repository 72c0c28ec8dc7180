// The multiply-adds of AVX-512.
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from undefined registers and trip this warning when inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu/fma_peak.h"
#include "cpu/vec_avx512.h"

namespace dlm_fast::cpu::avx512 {

FmaLoop fma_loop() {
  return FmaChains<Vec, 24, 1>::loop();
}

}  // namespace dlm_fast::cpu::avx512
