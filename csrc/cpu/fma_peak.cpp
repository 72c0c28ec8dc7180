// Times the multiply-adds of a core: from registers alone, and in the tile of the head ops.
#include "cpu/fma_peak.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <vector>

#include "common/parallel_for.h"
#include "cpu/head_kernels.h"
#include "cpu/scratch.h"
#include "cpu/vec_portable.h"
#include "dlm_fast/check.h"
#include "dlm_fast/cpu_features.h"
#include "dlm_fast/fma_peak.h"

namespace dlm_fast::cpu {

namespace portable {
FmaLoop fma_loop() {
  return FmaChains<Vec<float, 4>, 12, 1>::loop();
}
}  // namespace portable

namespace {

using Wall = std::chrono::steady_clock;

double wall_seconds(Wall::time_point since) {
  return std::chrono::duration<double>(Wall::now() - since).count();
}

// Time this thread had a core for: other programs on the machine do not count.
double thread_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return wall_seconds(Wall::time_point{});
#endif
}

// GFLOP/s of the fastest interval of about a millisecond.
template <class Work>
double best_rate(double flop, double seconds, const Work& work) {
  int64_t rounds = 1;
  double best = 0;
  const auto start = Wall::now();
  while (wall_seconds(start) < seconds || best == 0) {
    const double before = thread_seconds();
    work(rounds);
    const double took = thread_seconds() - before;
    if (took < 1e-3) {
      rounds *= 2;
    } else {
      best = std::max(best, 1e-9 * flop * static_cast<double>(rounds) / took);
    }
  }
  return best;
}

FmaLoop fma_loop(bool pairs) {
#ifdef DLM_SIMD_X86
  if (pairs) return avx512bf16::pair_loop();
  const SimdLevel level = simd_level();
  if (level >= SimdLevel::kAvx512) return avx512::fma_loop();
  if (level == SimdLevel::kAvx2) return avx2::fma_loop();
#endif
  (void)pairs;
  return portable::fma_loop();
}

double peak_rate(bool pairs, double seconds) {
  const FmaLoop loop = fma_loop(pairs);
  float sink[kMostLanes];
  return best_rate(loop.flop, seconds, [&](int64_t rounds) { loop.run(rounds, sink); });
}

// A whole block: kBlockV vocabulary rows, one panel of rows, kBlockD numbers (or pairs) deep.
double tile_rate(bool pairs, double seconds) {
  const HeadKernels<float>& kernels = head_kernels<float>();
  const auto logits = pairs ? pair_kernels()->logits : kernels.logits;
  Buffer<float> rows(kBlockD * kernels.panel), weight(kPackedWeight), out(kBlockV * kernels.panel);
  std::fill_n(rows.data(), rows.size(), 0.25f);
  std::fill_n(weight.data(), weight.size(), 0.5f);
  const double flop = (pairs ? 4.0 : 2.0) * kBlockV * kBlockD * kernels.panel;
  return best_rate(flop, seconds, [&](int64_t rounds) {
    Ahead nothing[kAhead];
    for (int64_t i = 0; i < rounds; ++i)
      logits(rows.data(), weight.data(), {kBlockV, kBlockD}, false, 2, nothing, out.data());
  });
}

}  // namespace

FmaRate fma_peak(bool pairs, double seconds, int num_threads) {
  DLM_CHECK(seconds > 0 && seconds < 60, "fma_peak: seconds must lie between 0 and 60");
  DLM_CHECK(num_threads > 0 && num_threads <= 1024, "fma_peak: num_threads must lie in 1..1024");
  if (pairs && pair_kernels() == nullptr) return {0, 0};
  std::vector<FmaRate> rates(static_cast<size_t>(num_threads));
  parallel_for(num_threads, num_threads, [&](int64_t i) {
    rates[static_cast<size_t>(i)].peak = peak_rate(pairs, seconds / 2);
  });
  parallel_for(num_threads, num_threads, [&](int64_t i) {
    rates[static_cast<size_t>(i)].tile = tile_rate(pairs, seconds / 2);
  });
  FmaRate sum{0, 0};
  for (const FmaRate& rate : rates) {
    sum.peak += rate.peak;
    sum.tile += rate.tile;
  }
  return sum;
}

}  // namespace dlm_fast::cpu
