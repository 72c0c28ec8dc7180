// Online softmax of few query lines over key rows: numbers of a row in the lanes, nothing copied.
//
// A panel of queries in the lanes (attention_panels.h) costs the same for one line as for all its
// lanes. Here a line costs itself, and keys are read where they lie, once for up to four lines.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/head_gemm.h"

namespace dlm_fast::cpu {

// Key rows of a tile: offsets of keys and of values, in elements.
struct KeyRows {
  const void* data;
  const int64_t* keys;  // [count]
  int64_t value_stride;
  int64_t count;
};

// Numbers of a storage type as vectors.
template <class V, Dtype kType>
struct RowReader {
  static DLM_INLINE V whole(const void* data, int64_t i) {
    if constexpr (kType == Dtype::kBFloat16)
      return V::load_bfloat16(static_cast<const uint16_t*>(data) + i);
    else if constexpr (kType == Dtype::kFloat16)
      return V::load_half(static_cast<const uint16_t*>(data) + i);
    else
      return V::load(static_cast<const typename V::Real*>(data) + i);
  }
  // `count` numbers, zeros behind.
  static DLM_INLINE V part(const void* data, int64_t i, int64_t count) {
    return HeadGemm<V>::read_vector(data, kType, i, count);
  }
  static DLM_INLINE void prefetch(const void* data, int64_t i, int64_t width) {
#if defined(__GNUC__)
    constexpr int64_t kBytes = kType == Dtype::kFloat64 ? 8 : kType == Dtype::kFloat32 ? 4 : 2;
    const char* row = static_cast<const char*>(data) + i * kBytes;
    for (int64_t at = 0; at < width * kBytes; at += 64) __builtin_prefetch(row + at, 0, 3);
#else
    (void)data;
    (void)i;
    (void)width;
#endif
  }
};

template <class V, Dtype kType>
struct LineSoftmax {
  using Real = typename V::Real;
  using Reader = RowReader<V, kType>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kSums = kLanes < 16 ? 8 : 16;  // vectors that fit the registers as sums
  static constexpr int kMostLines = 4;
  static_assert(kLanes >= kMostLines, "a vector of sums belongs to whole lines");

  const int64_t width, stride;  // numbers of a line, and of its place: whole vectors
  const int64_t tile;           // most keys of a tile
  Real *query, *out, *scores, *max, *sum;

  LineSoftmax(int64_t d, int64_t most_lines, int64_t most_keys, Real* memory)
      : width(d), stride(padded(d)), tile(padded(most_keys)) {
    query = memory;
    out = query + most_lines * stride;
    scores = out + most_lines * stride;
    max = scores + most_lines * tile;
    sum = max + most_lines;
  }
  static int64_t padded(int64_t count) {
    return (count + kLanes - 1) / kLanes * kLanes;
  }
  static int64_t size(int64_t d, int64_t most_lines, int64_t most_keys) {
    return most_lines * (2 * padded(d) + padded(most_keys) + 2) + kLanes;
  }

  void start(int64_t line, const void* row, int64_t offset, double scale) {
    const V factor = V::set(static_cast<Real>(scale));
    for (int64_t d = 0; d < width; d += kLanes)
      (factor * Reader::part(row, offset + d, width - d)).store(query + line * stride + d);
    std::fill_n(out + line * stride, stride, Real(0));
    max[line] = -std::numeric_limits<Real>::infinity();
    sum[line] = 0;
  }

  // Lines [first, first + count) see the first seen[i] keys of the tile, line by line.
  void meet(int64_t first, int64_t count, const KeyRows& rows, const int64_t* seen) {
    const bool alike = std::all_of(seen, seen + count, [&](int64_t s) { return s == seen[0]; });
    int64_t line = 0;
    while (line < count) {
      const int64_t left = alike ? count - line : 1;
      KeyRows part = rows;
      part.count = seen[line];
      if (part.count == 0) {
        ++line;
      } else if (left >= 4) {
        meet_lines<4>(first + line, part);
        line += 4;
      } else if (left >= 2) {
        meet_lines<2>(first + line, part);
        line += 2;
      } else {
        meet_lines<1>(first + line, part);
        ++line;
      }
    }
  }

  template <int kLines>
  void meet_lines(int64_t line, const KeyRows& rows) {
    for (int64_t key = 0; key < rows.count; key += kLanes / kLines) score<kLines>(line, rows, key);
    Real scale[kLines];
    for (int i = 0; i < kLines; ++i) scale[i] = exponentials(line + i, rows.count);
    int64_t d = 0;
    const int64_t whole = width / kLanes * kLanes;
    while (d < whole) {
      const int64_t vectors = (whole - d) / kLanes;
      constexpr int kMost = kSums / kLines < 8 ? kSums / kLines : 8;
      if (vectors >= kMost)
        d += add_values<kLines, kMost>(line, rows, scale, d);
      else if (kMost > 4 && vectors >= 4)
        d += add_values<kLines, (kMost > 4 ? 4 : 1)>(line, rows, scale, d);
      else if (kMost > 2 && vectors >= 2)
        d += add_values<kLines, (kMost > 2 ? 2 : 1)>(line, rows, scale, d);
      else
        d += add_values<kLines, 1>(line, rows, scale, d);
    }
    if (d < width) add_last_values<kLines>(line, rows, scale, d);
  }

  // kLanes / kLines keys times kLines lines: their sums fill one vector after a transposition.
  template <int kLines>
  DLM_INLINE void score(int64_t line, const KeyRows& rows, int64_t key) {
    constexpr int kKeys = kLanes / kLines;
    int64_t at[kKeys];
    // Past the last key: any key, whose scores are not looked at.
    for (int k = 0; k < kKeys; ++k) at[k] = rows.keys[std::min(key + k, rows.count - 1)];
    V sums[kLanes];
    for (V& one : sums) one = V::set(0);
    const Real* lines = query + line * stride;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) multiply<kLines, true>(rows.data, at, lines, d, sums);
    if (d < width) multiply<kLines, false>(rows.data, at, lines, d, sums);
    for (int k = 0; k < kKeys; ++k) Reader::prefetch(rows.data, at[k] + rows.value_stride, width);
    V::transpose(sums);
    for (int step = 1; step < kLanes; step *= 2)
      for (int i = 0; i + step < kLanes; i += 2 * step) sums[i] = sums[i] + sums[i + step];
    Real numbers[kLanes];
    sums[0].store(numbers);
    for (int i = 0; i < kLines; ++i)
      std::copy_n(numbers + i * kKeys, kKeys, scores + (line + i) * tile + key);
  }

  template <int kLines, bool kWhole>
  DLM_INLINE void multiply(const void* data, const int64_t (&at)[kLanes / kLines],
                           const Real* lines, int64_t d, V (&sums)[kLanes]) {
    constexpr int kKeys = kLanes / kLines;
    V factors[kLines];
    DLM_UNROLL
    for (int i = 0; i < kLines; ++i) factors[i] = V::load(lines + i * stride + d);
    DLM_UNROLL
    for (int k = 0; k < kKeys; ++k) {
      const V key =
          kWhole ? Reader::whole(data, at[k] + d) : Reader::part(data, at[k] + d, width - d);
      DLM_UNROLL
      for (int i = 0; i < kLines; ++i)
        sums[i * kKeys + k] = V::fma(factors[i], key, sums[i * kKeys + k]);
    }
  }

  // Scores become weights under the new maximum; gives back what takes old sums to it.
  Real exponentials(int64_t line, int64_t count) {
    Real* place = scores + line * tile;
    const Real nothing = -std::numeric_limits<Real>::infinity();
    std::fill(place + count, place + padded(count), nothing);
    V highest = V::set(nothing);
    for (int64_t i = 0; i < count; i += kLanes) highest = V::larger(V::load(place + i), highest);
    Real numbers[kLanes];
    highest.store(numbers);
    const Real before = max[line];
    const Real now = std::max(before, *std::max_element(numbers, numbers + kLanes));
    // A line that has seen nothing yet: minus infinity less itself would be NaN.
    const Real base = now == nothing ? Real(0) : now;
    V total = V::set(0);
    for (int64_t i = 0; i < count; i += kLanes) {
      const V weight = V::exp(V::load(place + i) - V::set(base));
      weight.store(place + i);
      total = total + weight;
    }
    const Real scale = before == nothing ? Real(0) : std::exp(before - base);
    sum[line] = sum[line] * scale + V::reduce(total);
    max[line] = now;
    return scale;
  }

  // kVectors vectors of out, from number d on.
  template <int kLines, int kVectors>
  DLM_INLINE int64_t add_values(int64_t line, const KeyRows& rows, const Real (&scale)[kLines],
                                int64_t d) {
    V sums[kLines][kVectors];
    HeadGemm<V>::clear(sums);
    for (int64_t key = 0; key < rows.count; ++key) {
      const int64_t at = rows.keys[key] + rows.value_stride + d;
      V values[kVectors];
      DLM_UNROLL
      for (int j = 0; j < kVectors; ++j) values[j] = Reader::whole(rows.data, at + j * kLanes);
      add_weighted(line, key, values, sums);
    }
    put(line, scale, sums, d);
    return kVectors * kLanes;
  }

  template <int kLines>
  void add_last_values(int64_t line, const KeyRows& rows, const Real (&scale)[kLines], int64_t d) {
    V sums[kLines][1];
    HeadGemm<V>::clear(sums);
    for (int64_t key = 0; key < rows.count; ++key) {
      const V values[1] = {
          Reader::part(rows.data, rows.keys[key] + rows.value_stride + d, width - d)};
      add_weighted(line, key, values, sums);
    }
    put(line, scale, sums, d);
  }

  template <int kLines, int kVectors>
  DLM_INLINE void add_weighted(int64_t line, int64_t key, const V (&values)[kVectors],
                               V (&sums)[kLines][kVectors]) {
    DLM_UNROLL
    for (int i = 0; i < kLines; ++i) {
      const V weight = V::set(scores[(line + i) * tile + key]);
      DLM_UNROLL
      for (int j = 0; j < kVectors; ++j) sums[i][j] = V::fma(weight, values[j], sums[i][j]);
    }
  }

  template <int kLines, int kVectors>
  DLM_INLINE void put(int64_t line, const Real (&scale)[kLines], const V (&sums)[kLines][kVectors],
                      int64_t d) {
    for (int i = 0; i < kLines; ++i)
      for (int j = 0; j < kVectors; ++j) {
        Real* place = out + (line + i) * stride + d + j * kLanes;
        V::fma(V::load(place), V::set(scale[i]), sums[i][j]).store(place);
      }
  }

  // Writes width numbers, and gives the line's log-sum-exp.
  Real finish(int64_t line, Real* row) const {
    const double total = sum[line];
    const Real inverse = total == 0 ? Real(0) : static_cast<Real>(1 / total);
    for (int64_t d = 0; d < width; ++d) row[d] = out[line * stride + d] * inverse;
    return static_cast<Real>(max[line] + std::log(total));
  }
};

}  // namespace dlm_fast::cpu
