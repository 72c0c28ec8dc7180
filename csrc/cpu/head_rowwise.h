// What happens to a block of logits while it is hot: statistics, noise, gradient; any vector type.
//
// A block is [kBlockV, P]: vocabulary down, rows of hidden states across the lanes.
#pragma once

#include "common/philox.h"
#include "cpu/head_gemm.h"

namespace dlm_fast::cpu {

template <class V>
struct HeadRowwise {
  using Real = typename V::Real;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPanel = 2 * kLanes;
  static constexpr Real kInfinity = static_cast<Real>(__builtin_huge_val());
  // e^x is 0 below; keeps 0 * ln 0 away from 0 * infinity.
  static constexpr Real kVanishing = sizeof(Real) == 4 ? Real(-104) : Real(-746);
  // Independent partial sums, so that additions of neighbouring columns need not wait.
  static constexpr int kWays = 4;

  // Multiplication by a factor close to any number: a float factor alone would stretch the logits
  // by its own rounding error.
  struct Scale {
    V high, low;
    bool identity;
    Scale(double factor, const Real* bias)
        : high(V::set(static_cast<Real>(factor))),
          low(V::set(static_cast<Real>(factor - static_cast<Real>(factor)))),
          identity(!bias && factor == 1.0) {}
  };

  static DLM_INLINE V scaled(Real* place, int64_t v, const Real* bias, const Scale& scale) {
    V x = V::load(place);
    if (scale.identity) return x;
    if (bias) x = x + V::set(bias[v]);
    // Minus infinity times a negative low part would be plus infinity.
    const auto forbidden = V::equal(x, V::set(-kInfinity));
    x = V::select(forbidden, x, V::fma(x, scale.high, x * scale.low));
    x.store(place);
    return x;
  }

  static void scale(Real* logits, int64_t v, const Real* bias, double factor, int vectors) {
    const Scale scale(factor, bias);
    if (scale.identity) return;
    for (int64_t i = 0; i < v; ++i)
      for (int j = 0; j < vectors; ++j) scaled(logits + i * kPanel + j * kLanes, i, bias, scale);
  }

  static void accumulate(Real* logits, int64_t v, const Real* bias, double factor, int vectors,
                         Real* state_base) {
    const Scale scale(factor, bias);
    for (int j = 0; j < vectors; ++j) {
      Real* column = logits + j * kLanes;
      V top[kWays];
      for (V& t : top) t = V::set(-kInfinity);
      int64_t i = 0;
      for (; i + kWays <= v; i += kWays)
        for (int w = 0; w < kWays; ++w)
          top[w] = V::larger(scaled(column + (i + w) * kPanel, i + w, bias, scale), top[w]);
      for (; i < v; ++i) top[0] = V::larger(scaled(column + i * kPanel, i, bias, scale), top[0]);
      const V block_max = V::larger(V::larger(top[0], top[1]), V::larger(top[2], top[3]));
      add_block(column, v, block_max, j, state_base);
    }
  }

  static void accumulate_top(Real* logits, int64_t v, const Real* bias, double factor, int vectors,
                             int64_t first, Real* state_base) {
    const Scale scale(factor, bias);
    PanelState<Real> state(state_base, kPanel);
    for (int j = 0; j < vectors; ++j) {
      Real* column = logits + j * kLanes;
      V top = V::load(state.max + j * kLanes), second = V::load(state.second + j * kLanes);
      V index = V::load(state.index + j * kLanes);
      for (int64_t i = 0; i < v; ++i) {
        const V x = scaled(column + i * kPanel, i, bias, scale);
        const auto wins = V::greater(x, top);
        second = V::larger(V::smaller(x, top), second);
        index = V::select(wins, V::set(static_cast<Real>(first + i)), index);
        top = V::larger(x, top);
      }
      second.store(state.second + j * kLanes);
      index.store(state.index + j * kLanes);
      add_block(column, v, top, j, state_base);
    }
  }

  // Adds the columns of a block, whose maximum is known, to the sums of vector j of a panel.
  static DLM_INLINE void add_block(const Real* column, int64_t v, V block_max, int j,
                                   Real* state_base) {
    PanelState<Real> state(state_base, kPanel);
    const V old_max = V::load(state.max + j * kLanes);
    const V max = V::larger(block_max, old_max);
    // Where all columns so far are minus infinity, x - max would be NaN instead of minus infinity.
    const V base = V::select(V::equal(max, V::set(-kInfinity)), V::set(0), max);
    V sum[kWays], weighted[kWays];
    for (int w = 0; w < kWays; ++w) sum[w] = weighted[w] = V::set(0);
    int64_t i = 0;
    for (; i + kWays <= v; i += kWays)
      for (int w = 0; w < kWays; ++w)
        add_term(V::load(column + (i + w) * kPanel) - base, sum[w], weighted[w]);
    for (; i < v; ++i) add_term(V::load(column + i * kPanel) - base, sum[0], weighted[0]);

    const V old_sum = V::load(state.sum + j * kLanes);
    const V shift = old_max - base, ratio = V::exp(shift);
    const auto was_empty = V::equal(old_sum, V::set(0));
    const V old_weighted = V::load(state.weighted + j * kLanes);
    const V kept_sum = V::select(was_empty, V::set(0), ratio * old_sum);
    const V kept_weighted =
        V::select(was_empty, V::set(0), ratio * V::fma(old_sum, shift, old_weighted));
    max.store(state.max + j * kLanes);
    (kept_sum + ((sum[0] + sum[1]) + (sum[2] + sum[3]))).store(state.sum + j * kLanes);
    (kept_weighted + ((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])))
        .store(state.weighted + j * kLanes);
  }

  static DLM_INLINE void add_term(V shifted, V& sum, V& weighted) {
    const V term = V::exp(shifted);
    sum = sum + term;
    weighted = V::fma(term, V::larger(V::set(kVanishing), shifted), weighted);
  }

  static void gradient(const Real* logits, int64_t v, const GradientLanes<Real>& lanes, int vectors,
                       Real* out) {
    for (int j = 0; j < vectors; ++j) {
      const Real* column = logits + j * kLanes;
      const V max = V::load(lanes.max + j * kLanes);
      const V inverse_sum = V::load(lanes.inverse_sum + j * kLanes);
      const V log_sum = V::load(lanes.log_sum + j * kLanes);
      const V linear = V::load(lanes.linear + j * kLanes);
      const V entropic = V::load(lanes.entropic + j * kLanes);
      const auto idle = V::equal(V::load(lanes.active + j * kLanes), V::set(0));
      for (int64_t i = 0; i < v; ++i) {
        const V shifted = V::load(column + i * kPanel) - max;
        V factor = linear;
        if (lanes.with_entropy) {
          const V finite = V::larger(V::set(kVanishing), shifted);
          factor = V::fma(entropic, finite - log_sum, linear);
        }
        const V value = V::exp(shifted) * inverse_sum * factor;
        V::select(idle, V::set(0), value).store(out + i * kPanel + j * kLanes);
      }
    }
  }

  static void bias_gradient(const Real* gradient, int64_t v, int64_t n, Real* out) {
    for (int64_t i = 0; i < v; ++i) {
      V sum = V::set(0);
      for (int64_t row = 0; row < n; row += kLanes) {
        const int64_t panel = row / kPanel;
        sum = sum + V::load(gradient + (panel * kBlockV + i) * kPanel + row % kPanel);
      }
      out[i] = V::reduce(sum);
    }
  }

  // Philox words of columns [4 * block, 4 * block + 4) for one vector of rows, as uniform numbers.
  static DLM_INLINE void uniforms(const NoiseLanes& noise, int offset, uint32_t block,
                                  Real (&u)[4][kLanes]) {
    PhiloxWord c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes], low[kLanes], high[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      c0[i] = block;
      c1[i] = noise.position[offset + i];
      c2[i] = noise.step[offset + i];
      c3[i] = noise.draw;
      low[i] = noise.key_low[offset + i];
      high[i] = noise.key_high[offset + i];
    }
    for (int round = 0; round < kPhiloxRounds; ++round)
      for (int i = 0; i < kLanes; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], low[i], high[i]);
    for (int i = 0; i < kLanes; ++i) {
      u[0][i] = uniform_from_word(c0[i]);
      u[1][i] = uniform_from_word(c1[i]);
      u[2][i] = uniform_from_word(c2[i]);
      u[3][i] = uniform_from_word(c3[i]);
    }
  }

  // size.d carries the vocabulary index of the block's first column, a multiple of four.
  static void sample(const Real* logits, BlockSize first_and_v, Real inverse_temperature,
                     const NoiseLanes& noise, int vectors, const BestLanes<Real>& best) {
    const int64_t first = first_and_v.d, v = first_and_v.v;
    const V scale = V::set(inverse_temperature);
    for (int j = 0; j < vectors; ++j) {
      const Real* column = logits + j * kLanes;
      V score = V::load(best.score + j * kLanes), index = V::load(best.index + j * kLanes);
      V logit = V::load(best.logit + j * kLanes);
      for (int64_t i = 0; i < v; i += 4) {
        Real u[4][kLanes];
        uniforms(noise, j * kLanes, static_cast<uint32_t>((first + i) >> 2), u);
        for (int64_t w = 0; w < 4 && i + w < v; ++w) {
          const V z = V::load(column + (i + w) * kPanel);
          const V race = V::set(0) - V::log(V::load(u[w]));
          const V tried = V::fma(z, scale, V::set(0) - V::log(race));
          const auto wins = V::greater(tried, score);
          score = V::select(wins, tried, score);
          index = V::select(wins, V::set(static_cast<Real>(first + i + w)), index);
          logit = V::select(wins, z, logit);
        }
      }
      score.store(best.score + j * kLanes);
      index.store(best.index + j * kLanes);
      logit.store(best.logit + j * kLanes);
    }
  }
};

template <class V>
HeadKernels<typename V::Real> make_head_kernels() {
  using Gemm = HeadGemm<V>;
  using Rowwise = HeadRowwise<V>;
  HeadKernels<typename V::Real> kernels{};
  kernels.lanes = V::kLanes;
  kernels.panel = 2 * V::kLanes;
  kernels.tile = V::kTile;
  kernels.pack_rows = Gemm::pack_rows;
  kernels.pack_columns = Gemm::pack_columns;
  kernels.pack_weight = Gemm::pack_weight;
  kernels.logits = Gemm::logits;
  kernels.logits_and_pack = Gemm::logits_and_pack;
  kernels.few_logits = Gemm::few_logits;
  kernels.scale = Rowwise::scale;
  kernels.accumulate = Rowwise::accumulate;
  kernels.accumulate_top = Rowwise::accumulate_top;
  kernels.sample = Rowwise::sample;
  kernels.gradient = Rowwise::gradient;
  kernels.hidden_gradient = Gemm::hidden_gradient;
  kernels.weight_gradient = Gemm::weight_gradient;
  kernels.bias_gradient = Rowwise::bias_gradient;
  kernels.round = Gemm::round;
  kernels.add_rows = Gemm::add_rows;
  return kernels;
}

}  // namespace dlm_fast::cpu
