// Online softmax of query panels over key tiles: scores, weights, weighted values.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/interval_attention_tiles.h"

namespace dlm_fast::cpu {

// Holds the packed keys and values of one tile, and meets panels with it.
template <class V>
struct PanelSoftmax {
  using Tiles = AttentionTiles<V>;
  using Gemm = typename Tiles::Gemm;
  using Real = typename V::Real;
  using Part = typename Tiles::Part;
  static constexpr int kLanes = Tiles::kLanes;
  static constexpr int kPanel = Tiles::kPanel;
  static constexpr int kTile = Tiles::kTile;

  // The queries of a panel, running maximum and sum, sum of weighted values.
  struct Panel {
    Real *query, *max, *sum, *out;
  };

  const int64_t width;
  Real *strips, *values, *scores;
  OddRows<Real> odd;

  PanelSoftmax(int64_t d, Real* memory) : width(d) {
    strips = memory;
    values = strips + round_up(Tiles::strips_size(width), 16);
    scores = values + round_up(Tiles::rows_size(width), 16);
  }
  // Numbers of memory that a tile takes, and a panel.
  static int64_t tile_size(int64_t width) {
    return round_up(Tiles::strips_size(width), 16) + round_up(Tiles::rows_size(width), 16) +
           kKeyTile * kPanel;
  }
  static int64_t panel_size(int64_t width) {
    return 2 * (width + 1) * kPanel;
  }
  static Panel panel_at(Real* place, int64_t width) {
    return {place, place + width * kPanel, place + (width + 1) * kPanel,
            place + (width + 2) * kPanel};
  }

  // Lines lie at `offsets` of the queries; -1: no line.
  void start(const Panel& panel, const Matrix& queries, const int64_t (&offsets)[kPanel],
             double scale) const {
    Gemm::pack_rows(queries, offsets, kPanel, panel.query);
    const V factor = V::set(static_cast<Real>(scale));
    for (int64_t i = 0; i < width * kPanel; i += kLanes)
      (factor * V::load(panel.query + i)).store(panel.query + i);
    std::fill_n(panel.max, kPanel, -std::numeric_limits<Real>::infinity());
    std::fill_n(panel.sum, kPanel, Real(0));
    std::fill_n(panel.out, width * kPanel, Real(0));
  }

  void meet(const Panel& panel, int64_t lines, const Part& part) {
    if (lines <= kLanes)
      meet<1>(panel, part);
    else
      meet<2>(panel, part);
  }

  template <int kVectors>
  void meet(const Panel& panel, const Part& part) {
    V highest[kVectors], scale[kVectors];
    if (part.masked)
      score<kVectors, true>(panel, part, highest);
    else
      score<kVectors, false>(panel, part, highest);
    exponentials(panel, part, highest, scale);
    Tiles::over_keys(values, width, scores, part, scale, panel.out);
    if (!odd.index.empty()) Tiles::add_odd_keys(odd, width, scores, part, panel.out);
  }

  // Scores of the part, minus infinity where a line does not see the key, and their maximum.
  template <int kVectors, bool kMasked>
  void score(const Panel& panel, const Part& part, V (&highest)[kVectors]) {
    const V nothing = V::set(-std::numeric_limits<Real>::infinity());
    for (V& h : highest) h = nothing;
    for (int64_t key = part.first; key < part.last; key += kTile) {
      V tile[kTile][kVectors];
      Tiles::strip_product(strips + key * width, panel.query, width, tile);
      DLM_UNROLL
      for (int i = 0; i < kTile; ++i)
        for (int j = 0; j < kVectors; ++j) {
          V value = tile[i][j];
          if (kMasked)
            value = V::select(V::lanes(part.bits[key + i] >> (j * kLanes)), value, nothing);
          highest[j] = V::larger(value, highest[j]);
          value.store(scores + (key + i) * kPanel + j * kLanes);
        }
    }
  }

  // Scores become weights under the new maximum; `scale` takes what was summed before to it.
  template <int kVectors>
  void exponentials(const Panel& panel, const Part& part, const V (&highest)[kVectors],
                    V (&scale)[kVectors]) {
    const V nothing = V::set(-std::numeric_limits<Real>::infinity());
    for (int j = 0; j < kVectors; ++j) {
      const V before = V::load(panel.max + j * kLanes);
      const V max = V::larger(highest[j], before);
      // A line that has seen nothing yet: minus infinity less itself would be NaN.
      const V base = V::select(V::equal(max, nothing), V::set(0), max);
      scale[j] = V::exp(before - base);
      V sum = V::set(0);
      for (int64_t key = part.first; key < part.last; ++key) {
        Real* place = scores + key * kPanel + j * kLanes;
        const V weight = V::exp(V::load(place) - base);
        weight.store(place);
        sum = sum + weight;
      }
      V::fma(V::load(panel.sum + j * kLanes), scale[j], sum).store(panel.sum + j * kLanes);
      max.store(panel.max + j * kLanes);
    }
  }

  // Writes the rows of `lines` lines, at `offsets` of out, and their log-sum-exp at `rows` of lse.
  void finish(const Panel& panel, int64_t lines, const int64_t (&offsets)[kPanel],
              const int64_t (&rows)[kPanel], Real* out, Real* lse) const {
    Real inverse[kPanel] = {};
    for (int64_t i = 0; i < lines; ++i) {
      const double sum = panel.sum[i];
      inverse[i] = sum == 0 ? Real(0) : static_cast<Real>(1 / sum);
      lse[rows[i]] = static_cast<Real>(panel.max[i] + std::log(sum));
      std::fill_n(out + offsets[i], width, Real(0));
    }
    for (int64_t d = 0; d < width; ++d)
      for (int j = 0; j < kPanel; j += kLanes)
        (V::load(inverse + j) * V::load(panel.out + d * kPanel + j))
            .store(panel.out + d * kPanel + j);
    Gemm::add_rows(panel.out, width, offsets, lines, 1, out);
  }
};

}  // namespace dlm_fast::cpu
