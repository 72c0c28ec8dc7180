// Packing and the three matrix products of the head ops, for any vector type.
//
// All three are one register tile: kTile broadcast numbers times two vectors, streamed over the
// depth. Logits: weight rows times hidden panels. Hidden gradient: weight columns times logit
// gradients. Weight gradient: logit gradients times hidden columns.
#pragma once

#include <algorithm>

#include "common/host_device.h"
#include "cpu/head_kernels.h"

#if defined(__GNUC__)
#define DLM_INLINE __attribute__((always_inline)) inline
#define DLM_UNROLL _Pragma("GCC unroll 16")
#else
#define DLM_INLINE inline
#define DLM_UNROLL
#endif

namespace dlm_fast::cpu {

// One number of an operand is one factor.
template <class V>
struct SingleProduct {
  static constexpr int kDepth = 1;
  static DLM_INLINE V fma(V a, V b, V sum) {
    return V::fma(a, b, sum);
  }
};

template <class V, class Product = SingleProduct<V>>
struct HeadGemm {
  using Real = typename V::Real;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPanel = 2 * kLanes;
  static constexpr int kTile = V::kTile;
  static constexpr int kDepth = Product::kDepth;  // numbers along the depth that one lane holds
  static constexpr int kMostFewRows = kLanes < 8 ? kLanes : 8;
  static_assert(kBlockV % kTile == 0, "blocks hold whole tiles");
  static_assert(kBlockD + kTile <= kWeightStride, "a tile may read past the last column");

  // --- reading the inputs

  // Numbers [i, i + count) as a vector, zero behind; reads nothing past count.
  static DLM_INLINE V read_vector(const void* data, Dtype dtype, int64_t i, int64_t count) {
    if (count >= kLanes) {
      if (dtype == Dtype::kBFloat16)
        return V::load_bfloat16(static_cast<const uint16_t*>(data) + i);
      if (dtype == Dtype::kFloat16) return V::load_half(static_cast<const uint16_t*>(data) + i);
      return V::load(static_cast<const Real*>(data) + i);
    }
    if (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) {
      uint16_t words[kLanes] = {};
      std::copy_n(static_cast<const uint16_t*>(data) + i, count, words);
      return dtype == Dtype::kBFloat16 ? V::load_bfloat16(words) : V::load_half(words);
    }
    return V::load_part(static_cast<const Real*>(data) + i, count);
  }

  static void pack_rows(const Matrix& matrix, const int64_t* rows, int64_t count, Real* out) {
    for (int64_t lane0 = 0; lane0 < kPanel; lane0 += kLanes)
      for (int64_t d = 0; d < matrix.width; d += kLanes) {
        const int64_t columns = matrix.width - d < kLanes ? matrix.width - d : kLanes;
        V square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t row = lane0 + i < count ? rows[lane0 + i] : -1;
          square[i] =
              row < 0 ? V::set(0)
                      : read_vector(matrix.data, matrix.dtype, row * matrix.stride + d, columns);
        }
        V::transpose(square);
        for (int64_t k = 0; k < columns; ++k) square[k].store(out + (d + k) * kPanel + lane0);
      }
  }

  static void pack_columns(const Matrix& matrix, const int64_t* rows, int64_t count, int64_t first,
                           Real* out) {
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < 2; ++j) {
        const int64_t d = first + j * kLanes;
        const bool inside = rows[i] >= 0 && d < matrix.width;
        const V numbers = inside ? read_vector(matrix.data, matrix.dtype,
                                               rows[i] * matrix.stride + d, matrix.width - d)
                                 : V::set(0);
        numbers.store(out + i * kPanel + j * kLanes);
      }
  }

  // Starts the transfer of a number to L2; the address may lie past the end of the array.
  static DLM_INLINE void prefetch(const Matrix& matrix, int64_t i) {
#if defined(__GNUC__)
    const auto address = reinterpret_cast<uintptr_t>(matrix.data) +
                         static_cast<uintptr_t>(i * bytes_of(matrix.dtype));
    __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
#else
    (void)matrix;
    (void)i;
#endif
  }

  // The head comes from memory: while one tile is multiplied, the next one is on its way.
  static void pack_weight(const Matrix& weight, int64_t v, int64_t d, BlockSize size, Real* out) {
    const int64_t whole_tiles = (size.v + kTile - 1) / kTile * kTile;
    for (int64_t i = 0; i < whole_tiles; ++i)
      for (int64_t k = 0; k < size.d; k += kLanes) {
        const V numbers = i < size.v ? read_vector(weight.data, weight.dtype,
                                                   (v + i) * weight.stride + d + k, size.d - k)
                                     : V::set(0);
        numbers.store(out + i * kWeightStride + k);
        prefetch(weight, (v + i + kTile) * weight.stride + d + k);
      }
  }

  static void round(const Real* numbers, int64_t count, uint16_t* bfloat16) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) V::load(numbers + i).store_bfloat16(bfloat16 + i);
    if (i == count) return;
    Real last[kLanes] = {};
    uint16_t words[kLanes];
    std::copy(numbers + i, numbers + count, last);
    V::load(last).store_bfloat16(words);
    std::copy(words, words + (count - i), bfloat16 + i);
  }

  static void add_rows(const Real* panel, int64_t columns, const int64_t* rows, int64_t count,
                       int64_t stride, Real* out) {
    for (int64_t lane0 = 0; lane0 < count; lane0 += kLanes)
      for (int64_t d = 0; d < columns; d += kLanes) {
        const int64_t width = columns - d < kLanes ? columns - d : kLanes;
        V square[kLanes];
        for (int k = 0; k < kLanes; ++k)
          square[k] = k < width ? V::load(panel + (d + k) * kPanel + lane0) : V::set(0);
        V::transpose(square);
        for (int64_t i = 0; i < kLanes && lane0 + i < count; ++i) {
          if (rows[lane0 + i] < 0) continue;
          Real* target = out + rows[lane0 + i] * stride + d;
          if (width == kLanes) {
            (V::load(target) + square[i]).store(target);
          } else {
            Real numbers[kLanes];
            square[i].store(numbers);
            for (int64_t k = 0; k < width; ++k) target[k] += numbers[k];
          }
        }
      }
  }

  // --- the register tile

  // tile += left [kTile, depth] times right [depth, kPanel]; the strides of left are constants, so
  // that every broadcast is one instruction.
  template <int64_t kRowStride, int64_t kDepthStride, int kRows, int kVectors>
  static DLM_INLINE void multiply(const Real* left, const Real* right, int64_t depth,
                                  V (&tile)[kRows][kVectors]) {
    for (int64_t k = 0; k < depth; ++k)
      multiply_step<kRowStride>(left + k * kDepthStride, right + k * kPanel, tile);
  }

  template <int64_t kRowStride, int kRows, int kVectors>
  static DLM_INLINE void multiply_step(const Real* left, const Real* right,
                                       V (&tile)[kRows][kVectors]) {
    V column[kVectors];
    for (int j = 0; j < kVectors; ++j) column[j] = V::load(right + j * kLanes);
    DLM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const V factor = V::set(left[i * kRowStride]);
      for (int j = 0; j < kVectors; ++j) tile[i][j] = Product::fma(factor, column[j], tile[i][j]);
    }
  }

  template <int kRows, int kVectors>
  static DLM_INLINE void clear(V (&tile)[kRows][kVectors]) {
    DLM_UNROLL
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) tile[i][j] = V::set(0);
  }

  // Writes or adds the first `rows` rows of a tile to a panel.
  template <int kRows, int kVectors>
  static DLM_INLINE void put(const V (&tile)[kRows][kVectors], int64_t rows, bool add, Real* out) {
    DLM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      for (int j = 0; j < kVectors; ++j) {
        Real* place = out + i * kPanel + j * kLanes;
        (add ? V::load(place) + tile[i][j] : tile[i][j]).store(place);
      }
    }
  }

  static DLM_INLINE void fetch(Ahead* ahead) {
    for (int i = 0; i < kAhead; ++i) ahead[i].fetch();
  }

  template <int kVectors>
  static void logits_of(const Real* rows, const Real* weight, BlockSize size, bool add,
                        Ahead* ahead, Real* out) {
    for (int64_t v = 0; v < size.v; v += kTile) {
      fetch(ahead);
      V tile[kTile][kVectors];
      clear(tile);
      multiply<kWeightStride, 1>(weight + v * kWeightStride, rows, size.d, tile);
      put(tile, kTile, add, out + v * kPanel);
    }
  }

  // The same, packing the weights on the way: while a tile is multiplied, a vector of the next one
  // is copied in almost every step. A copy before would stand still for each of its cache misses.
  static void logits_and_pack(const Real* rows, const Matrix& matrix, int64_t v0, int64_t d0,
                              BlockSize size, bool add, Ahead* ahead, Real* weight, Real* out) {
    const int64_t vectors = size.d / kLanes;
    const Real* source = static_cast<const Real*>(matrix.data) + v0 * matrix.stride + d0;
    const auto copy = [&](int64_t v, int64_t k) {
      V::load(source + v * matrix.stride + k * kLanes)
          .store(weight + v * kWeightStride + k * kLanes);
    };
    for (int64_t v = 0; v < kTile; ++v)
      for (int64_t k = 0; k < vectors; ++k) copy(v, k);
    for (int64_t v = 0; v < size.v; v += kTile) {
      fetch(ahead);
      V tile[kTile][2];
      clear(tile);
      const Real* left = weight + v * kWeightStride;
      const Real* right = rows;
      int64_t left_over = size.d;
      if (v + kTile < size.v) {
        for (int i = 0; i < kTile; ++i)
          for (int64_t k = 0; k < vectors; ++k) {
            copy(v + kTile + i, k);
            multiply_step<kWeightStride>(left, right, tile);
            ++left;
            right += kPanel;
          }
        left_over -= kTile * vectors;
      }
      multiply<kWeightStride, 1>(left, right, left_over, tile);
      put(tile, kTile, add, out + v * kPanel);
    }
  }

  static void logits(const Real* rows, const Real* weight, BlockSize size, bool add, int vectors,
                     Ahead* ahead, Real* out) {
    if (vectors == 1)
      logits_of<1>(rows, weight, size, add, ahead, out);
    else
      logits_of<2>(rows, weight, size, add, ahead, out);
  }

  // --- logits of few rows: vocabulary rows in the lanes, straight from the row-major head

  // Sums are those of `logits`, number by number: depth in order, in parts of kBlockD.
  template <int kRows>
  static void few_logits_of(const Matrix& weight, int64_t v, int64_t count, const Real* rows,
                            Real* out) {
    const int64_t depth = weight.width, number = bytes_of(weight.dtype);
    // The next rows come row by row, as memory is fastest, not square by square.
    Ahead ahead(static_cast<const char*>(weight.data) + (v + kLanes) * weight.stride * number,
                weight.stride * number, depth * number, kLanes, (depth + kLanes - 1) / kLanes);
    V total[kLanes];
    for (V& t : total) t = V::set(0);
    for (int64_t first = 0; first < depth; first += kBlockD) {
      const int64_t end = std::min(depth, first + kBlockD);
      V sum[kRows];
      for (V& s : sum) s = V::set(0);
      for (int64_t d = first; d < end; d += kLanes) {
        V square[kLanes];
        ahead.fetch();
        for (int i = 0; i < kLanes; ++i)
          square[i] = i < count ? read_vector(weight.data, weight.dtype,
                                              (v + i) * weight.stride + d, end - d)
                                : V::set(0);
        V::transpose(square);
        const auto multiply_column = [&](int64_t k, V column) {
          for (int n = 0; n < kRows; ++n)
            sum[n] = Product::fma(V::set(rows[n * depth + d + k]), column, sum[n]);
        };
        if (end - d >= kLanes) {
          DLM_UNROLL
          for (int k = 0; k < kLanes; ++k) multiply_column(k, square[k]);
        } else {
          for (int64_t k = 0; k < end - d; ++k) multiply_column(k, square[k]);
        }
      }
      for (int n = 0; n < kRows; ++n) total[n] = first == 0 ? sum[n] : total[n] + sum[n];
    }
    V::transpose(total);
    for (int64_t i = 0; i < count; ++i) total[i].store(out + i * kPanel);
  }

  static void few_logits(const Matrix& weight, int64_t v, int64_t count, const Real* rows,
                         int64_t num_rows, Real* out) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, count - i);
      if (num_rows == 1)
        few_logits_of<1>(weight, v + i, lanes, rows, out + i * kPanel);
      else if (num_rows == 2)
        few_logits_of<2>(weight, v + i, lanes, rows, out + i * kPanel);
      else if (num_rows <= 4)
        few_logits_of<4>(weight, v + i, lanes, rows, out + i * kPanel);
      else
        few_logits_of<kMostFewRows>(weight, v + i, lanes, rows, out + i * kPanel);
    }
  }

  template <int kRows, int kVectors>
  static DLM_INLINE void hidden_gradient_tile(const Real* gradient, const Real* weight,
                                              BlockSize size, bool add, Real* out) {
    V tile[kRows][kVectors];
    clear(tile);
    multiply<1, kWeightStride>(weight, gradient, size.v, tile);
    put(tile, size.d, add, out);
  }

  // A block of 256 columns is 18 tiles of 14 and one of 4.
  template <int kVectors>
  static void hidden_gradient_of(const Real* gradient, const Real* weight, BlockSize size, bool add,
                                 Ahead* ahead, Real* out) {
    constexpr int kLow = kTile < 4 ? kTile : 4;
    for (int64_t d = 0; d < size.d; d += kTile) {
      fetch(ahead);
      const BlockSize rest{size.v, size.d - d};
      if (rest.d <= kLow)
        hidden_gradient_tile<kLow, kVectors>(gradient, weight + d, rest, add, out + d * kPanel);
      else
        hidden_gradient_tile<kTile, kVectors>(gradient, weight + d, rest, add, out + d * kPanel);
    }
  }

  static void hidden_gradient(const Real* gradient, const Real* weight, BlockSize size, bool add,
                              int vectors, Ahead* ahead, Real* out) {
    if (vectors == 1)
      hidden_gradient_of<1>(gradient, weight, size, add, ahead, out);
    else
      hidden_gradient_of<2>(gradient, weight, size, add, ahead, out);
  }

  static void weight_gradient(const Real* gradient, const Real* columns, int64_t n,
                              const WeightUpdate<Real>& update, Ahead* ahead) {
    for (int64_t v = 0; v < update.v; v += kTile) {
      fetch(ahead);
      V tile[kTile][2];
      clear(tile);
      for (int64_t i = 0; i < n; i += kPanel) {
        const int64_t rows = n - i < kPanel ? n - i : kPanel;
        multiply<kPanel / kDepth, 1>(gradient + i * kBlockV + v * (kPanel / kDepth),
                                     columns + i / kDepth * kPanel, (rows + kDepth - 1) / kDepth,
                                     tile);
      }
      const int64_t rows = update.v - v < kTile ? update.v - v : kTile;
      if (update.round)
        store_rounded(tile, rows, update, v);
      else
        store_update(tile, rows, update, static_cast<Real*>(update.out) + v * update.stride);
    }
  }

  static DLM_INLINE void store_rounded(const V (&tile)[kTile][2], int64_t rows,
                                       const WeightUpdate<Real>& update, int64_t v) {
    const V alpha = V::set(update.alpha);
    auto* out = static_cast<uint16_t*>(update.out) + v * update.stride;
    DLM_UNROLL
    for (int i = 0; i < kTile; ++i) {
      if (i >= rows) break;
      uint16_t words[kPanel];
      uint16_t* row = out + i * update.stride;
      uint16_t* place = update.columns == kPanel ? row : words;
      for (int j = 0; j < 2; ++j) (alpha * tile[i][j]).store_bfloat16(place + j * kLanes);
      if (place == words) std::copy(words, words + update.columns, row);
    }
  }

  static DLM_INLINE void store_update(const V (&tile)[kTile][2], int64_t rows,
                                      const WeightUpdate<Real>& update, Real* out) {
    const V alpha = V::set(update.alpha);
    DLM_UNROLL
    for (int i = 0; i < kTile; ++i) {
      if (i >= rows) break;
      Real* row = out + i * update.stride;
      if (update.columns == kPanel) {
        for (int j = 0; j < 2; ++j) {
          const V value = alpha * tile[i][j];
          Real* place = row + j * kLanes;
          (update.add ? V::load(place) + value : value).store(place);
        }
        continue;
      }
      Real numbers[kPanel];
      for (int j = 0; j < 2; ++j) (alpha * tile[i][j]).store(numbers + j * kLanes);
      for (int64_t k = 0; k < update.columns; ++k)
        row[k] = update.add ? row[k] + numbers[k] : numbers[k];
    }
  }
};

}  // namespace dlm_fast::cpu
