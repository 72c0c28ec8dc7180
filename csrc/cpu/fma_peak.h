// A loop of independent multiply-adds, for any vector type.
#pragma once

#include <cstdint>

namespace dlm_fast::cpu {

struct FmaLoop {
  double flop;  // of one round
  // runs the rounds and stores a number that depends on all of them
  void (*run)(int64_t rounds, float* out);
};

// kChains hides the latency of the multiply-adds and fits the registers with the two operands.
template <class V, int kChains, int kDepth>
struct FmaChains {
  static void run(int64_t rounds, float* out) {
    const V factor = V::set(0.5f), summand = V::set(1.0f);
    V chain[kChains];
    for (int i = 0; i < kChains; ++i) chain[i] = V::set(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round)
    // The chain is the factor that changes, so that no product can be taken out of the loop.
#if defined(__GNUC__)
#pragma GCC unroll 32
#endif
      for (int i = 0; i < kChains; ++i) chain[i] = V::fma(chain[i], factor, summand);
    V sum = chain[0];
    for (int i = 1; i < kChains; ++i) sum = sum + chain[i];
    sum.store(out);
  }
  static FmaLoop loop() {
    return {2.0 * kChains * V::kLanes * kDepth, run};
  }
};

constexpr int kMostLanes = 16;

namespace portable {
FmaLoop fma_loop();
}
namespace avx2 {
FmaLoop fma_loop();
}
namespace avx512 {
FmaLoop fma_loop();
}
namespace avx512bf16 {
FmaLoop pair_loop();
}

}  // namespace dlm_fast::cpu
