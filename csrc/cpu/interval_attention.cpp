// Attention under intervals on the CPU, forward and backward.
//
// Traffic: a key head's rows are copied once per 128 query lines (forward) or once (backward);
// nothing of the size [Tq, Tk] exists, but a list of the tiles that are not empty. Threads take
// (key head, block of lines) forward and (key head, chunk of keys) backward; the shares of the
// chunks in the queries' gradients are added in the order of the chunks.
#include "dlm_fast/interval_attention.h"

#include <algorithm>
#include <string>
#include <vector>

#include "common/parallel_for.h"
#include "cpu/interval_attention_kernels.h"
#include "cpu/scratch.h"
#include "dlm_fast/check.h"
#include "dlm_fast/cpu_features.h"

namespace dlm_fast::cpu {

namespace {

template <typename Real>
const AttentionKernels<Real>& attention_kernels();

template <>
const AttentionKernels<float>& attention_kernels<float>() {
#ifdef DLM_SIMD_X86
  const SimdLevel level = simd_level();
  if (level >= SimdLevel::kAvx512) return avx512::float_attention();
  if (level == SimdLevel::kAvx2) return avx2::float_attention();
#endif
  return portable::float_attention();
}

template <>
const AttentionKernels<double>& attention_kernels<double>() {
  return portable::double_attention();
}

int64_t ceil_of(int64_t number, int64_t divisor) {
  return (number + divisor - 1) / divisor;
}

void check(const IntervalAttentionInputs& in) {
  DLM_CHECK(in.num_queries >= 0 && in.num_keys >= 0 && in.key_heads > 0 && in.width > 0,
            "interval_attention: sizes must not be negative, heads and width not zero");
  DLM_CHECK(in.query_heads > 0 && in.query_heads % in.key_heads == 0,
            "interval_attention: query heads must be a multiple of key heads");
  DLM_CHECK(in.dtype >= Dtype::kFloat32 && in.dtype <= Dtype::kFloat64,
            "interval_attention: unknown element type");
  DLM_CHECK(in.num_threads > 0, "interval_attention: the number of threads must be above 0");
  for (int64_t key = 0; key < in.num_keys; ++key) {
    const int32_t* i = in.intervals + 4 * key;
    DLM_CHECK(std::min(i[0], i[2]) >= 0 && i[0] <= i[1] && i[2] <= i[3] &&
                  std::max(i[1], i[3]) <= in.num_queries &&
                  std::max(i[0], i[2]) >= std::min(i[1], i[3]),
              "interval_attention: intervals must be two disjoint ranges 0 <= lo <= hi <= query "
              "rows for each key, but those of key " +
                  std::to_string(key) + " are not");
  }
}

template <typename Real>
void forward(const IntervalAttentionInputs& in, void* out, void* lse) {
  const AttentionKernels<Real>& kernels = attention_kernels<Real>();
  const IntervalAttentionPlan plan(in.intervals, in.num_keys, in.num_queries,
                                   in.query_heads / in.key_heads, kernels.panel);
  const AttentionForward call{in, plan, out, lse};
  const int64_t blocks = ceil_of(plan.lines(), kBlockLines);
  parallel_for(in.key_heads * blocks, in.num_threads,
               [&](int64_t item) { kernels.forward(call, item / blocks, item % blocks); });
}

template <typename Real>
void backward(const IntervalAttentionInputs& in, const IntervalAttentionCotangents& cotangents,
              const IntervalAttentionGradients& gradients) {
  const AttentionKernels<Real>& kernels = attention_kernels<Real>();
  const IntervalAttentionPlan plan(in.intervals, in.num_keys, in.num_queries,
                                   in.query_heads / in.key_heads, kernels.panel);
  const Buffer<Real> delta(in.num_queries * in.query_heads);
  const AttentionBackward call{in, plan, cotangents, gradients, delta.data()};
  parallel_for(in.num_queries, in.num_threads, [&](int64_t row) { kernels.delta(call, row); });
  std::fill_n(static_cast<Real*>(gradients.q), in.num_queries * in.query_heads * in.width, Real(0));
  const int64_t chunks = ceil_of(in.num_keys, kKeyTile * kChunkTiles);
  const int64_t workers = std::min<int64_t>(in.num_threads, in.key_heads * chunks);
  std::vector<Buffer<Real>> query_panels;
  for (int64_t worker = 0; worker < workers; ++worker)
    query_panels.emplace_back(plan.panels() * in.width * kernels.panel);
  ordered_for(
      in.key_heads * chunks, static_cast<int>(workers),
      [&](int64_t item, int worker) {
        kernels.backward(call, item / chunks, item % chunks, query_panels[worker].data());
      },
      [&](int64_t item, int worker) {
        kernels.add_queries(call, item / chunks, item % chunks, query_panels[worker].data());
      });
}

}  // namespace

void interval_attention(const IntervalAttentionInputs& inputs, void* out, void* lse) {
  check(inputs);
  if (inputs.dtype == Dtype::kFloat64)
    forward<double>(inputs, out, lse);
  else
    forward<float>(inputs, out, lse);
}

void interval_attention_bwd(const IntervalAttentionInputs& inputs,
                            const IntervalAttentionCotangents& cotangents,
                            const IntervalAttentionGradients& gradients) {
  check(inputs);
  if (inputs.dtype == Dtype::kFloat64)
    backward<double>(inputs, cotangents, gradients);
  else
    backward<float>(inputs, cotangents, gradients);
}

}  // namespace dlm_fast::cpu
