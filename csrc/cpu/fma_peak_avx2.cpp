// The multiply-adds of AVX2 with FMA.
#include "cpu/fma_peak.h"
#include "cpu/vec_avx2.h"

namespace dlm_fast::cpu::avx2 {

FmaLoop fma_loop() {
  return FmaChains<Vec, 12, 1>::loop();
}

}  // namespace dlm_fast::cpu::avx2
