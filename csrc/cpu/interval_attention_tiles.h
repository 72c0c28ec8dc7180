// Packing and products of one query panel with one key tile, for any vector type.
//
// Query lines live in the lanes, keys are broadcast, so that every sum of the softmax runs down a
// lane. All products are the register tile of the head ops. Letters: P panel = 2 vectors of lines.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/head_gemm.h"
#include "cpu/interval_attention_kernels.h"
#include "cpu/scratch.h"

namespace dlm_fast::cpu {

inline int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// Rows with an infinity or NaN, which take no part in a product but through add_odd: times the zero
// weight of a pair that does not see each other they would give NaN.
template <typename Real>
struct OddRows {
  std::vector<int64_t> index;
  std::vector<Real> numbers;  // [count, d]
  void clear() {
    index.clear();
    numbers.clear();
  }
};

template <class V>
struct AttentionTiles {
  using Real = typename V::Real;
  using Gemm = HeadGemm<V>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPanel = 2 * kLanes;
  static constexpr int kTile = V::kTile;
  static_assert(kKeyTile % kTile == 0 && kTile <= kLanes && kPanel <= 32, "strips and masks");
  static_assert(kBlockLines % kPanel == 0, "blocks of lines are whole panels");

  // --- memory

  // A strip is kTile keys, turned; its last store runs over by less than a vector.
  static int64_t strips_size(int64_t width) {
    return kKeyTile * width + kLanes;
  }
  // Rows of a copied tile do not share cache sets, and a product may read past the last column.
  static int64_t row_stride(int64_t width) {
    return round_up(width, kLanes) + 16;
  }
  static int64_t rows_size(int64_t width) {
    return kKeyTile * row_stride(width) + kLanes;
  }
  static int64_t column_panels(int64_t width) {
    return (width + kPanel - 1) / kPanel;
  }

  // --- packing

  // Offsets of the lines of a panel in rows of an array; -1 past the last line.
  static void line_offsets(const IntervalAttentionInputs& in, const IntervalAttentionPlan& plan,
                           int64_t head, int64_t panel, int64_t row_stride, int64_t head_stride,
                           int64_t (&out)[kPanel]) {
    const int64_t group = in.query_heads / in.key_heads;
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t line = panel * kPanel + i;
      out[i] = line < plan.lines()
                   ? line / group * row_stride + (head * group + line % group) * head_stride
                   : -1;
    }
  }

  static Matrix matrix_of(const AttentionRows& rows, int64_t width, Dtype dtype) {
    return {rows.data, 1, width, dtype};
  }

  // Rows of one key head from key `first` on.
  static Matrix tile_rows(const IntervalAttentionInputs& in, const AttentionRows& rows,
                          int64_t head, int64_t first) {
    const int64_t offset = head * rows.head_stride + first * rows.row_stride;
    const char* data = static_cast<const char*>(rows.data) + offset * bytes_of(in.dtype);
    return {data, rows.row_stride, in.width, in.dtype};
  }

  // Where the rows of a tile lie in memory, in elements: apart by a stride, or anywhere.
  struct Strided {
    int64_t stride;
    int64_t operator()(int64_t row) const {
      return row * stride;
    }
  };

  // Keys [0, count) of a tile, turned: [strip][d][kTile], zero behind.
  static void pack_strips(const Matrix& matrix, int64_t count, Real* out) {
    pack_strips(matrix, Strided{matrix.stride}, count, out);
  }
  template <class Offset>
  static void pack_strips(const Matrix& matrix, const Offset& offset, int64_t count, Real* out) {
    for (int64_t strip = 0; strip < count; strip += kTile)
      for (int64_t d = 0; d < matrix.width; d += kLanes) {
        const int64_t columns = std::min<int64_t>(kLanes, matrix.width - d);
        V square[kLanes];
        for (int i = 0; i < kLanes; ++i)
          square[i] =
              i < kTile && strip + i < count
                  ? Gemm::read_vector(matrix.data, matrix.dtype, offset(strip + i) + d, columns)
                  : V::set(0);
        V::transpose(square);
        // A store runs over into the next column, which comes after it.
        for (int64_t k = 0; k < columns; ++k)
          square[k].store(out + strip * matrix.width + (d + k) * kTile);
      }
  }

  // Keys [0, count) as rows of row_stride(width); odd rows are set aside.
  static void copy_rows(const Matrix& matrix, int64_t count, Real* out, OddRows<Real>& odd) {
    copy_rows(matrix, Strided{matrix.stride}, count, out, odd);
  }
  template <class Offset>
  static void copy_rows(const Matrix& matrix, const Offset& offset, int64_t count, Real* out,
                        OddRows<Real>& odd) {
    const int64_t stride = row_stride(matrix.width);
    odd.clear();
    for (int64_t j = 0; j < count; ++j) {
      V check = V::set(0);
      for (int64_t d = 0; d < matrix.width; d += kLanes) {
        const V numbers =
            Gemm::read_vector(matrix.data, matrix.dtype, offset(j) + d, matrix.width - d);
        check = V::fma(numbers, V::set(0), check);
        numbers.store(out + j * stride + d);
      }
      if (V::reduce(check) == 0) continue;
      odd.index.push_back(j);
      odd.numbers.insert(odd.numbers.end(), out + j * stride, out + j * stride + matrix.width);
      std::fill_n(out + j * stride, matrix.width, Real(0));
    }
    std::fill_n(out + count * stride, (round_up(count, kTile) - count) * stride, Real(0));
  }

  // Lines of a panel as [column panel][line][P]; odd ones are set aside.
  static void pack_columns(const Matrix& matrix, const int64_t (&offsets)[kPanel], int64_t count,
                           Real* out, OddRows<Real>& odd) {
    odd.clear();
    const int64_t panels = column_panels(matrix.width);
    for (int64_t c = 0; c < panels; ++c)
      Gemm::pack_columns(matrix, offsets, count, c * kPanel, out + c * kPanel * kPanel);
    for (int64_t i = 0; i < count; ++i) {
      V check = V::set(0);
      for (int64_t c = 0; c < panels; ++c)
        for (int j = 0; j < 2; ++j)
          check = V::fma(V::load(out + (c * kPanel + i) * kPanel + j * kLanes), V::set(0), check);
      if (V::reduce(check) == 0) continue;
      odd.index.push_back(i);
      for (int64_t d = 0; d < matrix.width; ++d) {
        Real& number = out[(d / kPanel * kPanel + i) * kPanel + d % kPanel];
        odd.numbers.push_back(number);
        number = 0;
      }
    }
  }

  // --- which part of a tile

  // Whole strips around the keys that a panel sees, and who sees them.
  struct Part {
    int64_t first, last;      // keys, multiples of kTile
    bool masked;              // some pair in it does not see each other
    uint32_t bits[kKeyTile];  // by key of the tile; all lines where not masked

    // Keys [0, count), all seen by all; the caller may take bits away.
    explicit Part(int64_t count) : first(0), last(round_up(count, kTile)), masked(count < last) {
      std::fill(bits, bits + count, ~0u);
      std::fill(bits + count, bits + last, 0u);
    }
    Part(const IntervalAttentionPlan& plan, int64_t panel, const TileEntry& entry)
        : first(entry.first / kTile * kTile), last(round_up(entry.last, kTile)) {
      masked = !entry.full || first < entry.first || entry.last < last;
      std::fill(bits + first, bits + last, 0u);
      plan.visible(panel, entry, bits + entry.first);
    }
  };

  // --- products

  // strip [d][kTile] times panel [d][P]: a tile of [kTile] by [P].
  template <int kVectors>
  static DLM_INLINE void strip_product(const Real* strip, const Real* panel, int64_t width,
                                       V (&tile)[kTile][kVectors]) {
    Gemm::clear(tile);
    Gemm::template multiply<1, kTile>(strip, panel, width, tile);
  }

  // out [d][P] = scale * out + sum over keys of rows[key][d] * weights[key][P].
  template <int kRows, int kVectors>
  static DLM_INLINE void over_keys_tile(const Real* rows, int64_t stride, const Real* weights,
                                        int64_t depth, int64_t count, const V (&scale)[kVectors],
                                        Real* out) {
    V tile[kRows][kVectors];
    Gemm::clear(tile);
    for (int64_t k = 0; k < depth; ++k)
      Gemm::template multiply_step<1>(rows + k * stride, weights + k * kPanel, tile);
    DLM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i >= count) break;
      for (int j = 0; j < kVectors; ++j) {
        Real* place = out + i * kPanel + j * kLanes;
        V::fma(V::load(place), scale[j], tile[i][j]).store(place);
      }
    }
  }

  template <int kVectors>
  static void over_keys(const Real* rows, int64_t width, const Real* weights, const Part& part,
                        const V (&scale)[kVectors], Real* out) {
    constexpr int kHalf = kTile > 8 ? 8 : kTile, kLow = kTile < 4 ? kTile : 4;
    const int64_t stride = row_stride(width), depth = part.last - part.first;
    const Real* left = rows + part.first * stride;
    const Real* right = weights + part.first * kPanel;
    for (int64_t d = 0; d < width;) {
      const int64_t rest = width - d;
      Real* place = out + d * kPanel;
      if (rest <= kLow) {
        over_keys_tile<kLow>(left + d, stride, right, depth, rest, scale, place);
        break;
      }
      if (rest <= kHalf) {
        over_keys_tile<kHalf>(left + d, stride, right, depth, rest, scale, place);
        break;
      }
      over_keys_tile<kTile>(left + d, stride, right, depth, rest, scale, place);
      d += kTile;
    }
  }

  // out [key][P] of each column panel += sum over lines of weights[key][line] * columns[line][P].
  template <int kVectors>
  static void over_lines_of(const Real* weights, const Real* columns, int64_t lines,
                            const Part& part, Real* out) {
    for (int64_t j = part.first; j < part.last; j += kTile) {
      V tile[kTile][kVectors];
      Gemm::clear(tile);
      Gemm::template multiply<kPanel, 1>(weights + j * kPanel, columns, lines, tile);
      Gemm::put(tile, kTile, true, out + j * kPanel);
    }
  }

  static void over_lines(const Real* weights, const Real* columns, int64_t width, int64_t lines,
                         const Part& part, Real* out) {
    for (int64_t c = 0; c < column_panels(width); ++c) {
      const Real* right = columns + c * kPanel * kPanel;
      Real* place = out + c * kKeyTile * kPanel;
      if (width - c * kPanel <= kLanes)
        over_lines_of<1>(weights, right, lines, part, place);
      else
        over_lines_of<2>(weights, right, lines, part, place);
    }
  }

  // What odd rows add, to the lines that see them: out [d][P] from weights [key][P].
  static void add_odd_keys(const OddRows<Real>& odd, int64_t width, const Real* weights,
                           const Part& part, Real* out) {
    for (size_t r = 0; r < odd.index.size(); ++r) {
      const int64_t key = odd.index[r];
      if (key < part.first || key >= part.last) continue;
      for (int64_t i = 0; i < kPanel; ++i)
        if (part.bits[key] >> i & 1)
          for (int64_t d = 0; d < width; ++d)
            out[d * kPanel + i] += weights[key * kPanel + i] * odd.numbers[r * width + d];
    }
  }

  // The same for odd lines: out [column panel][key][P].
  static void add_odd_lines(const OddRows<Real>& odd, int64_t width, const Real* weights,
                            const Part& part, Real* out) {
    for (size_t r = 0; r < odd.index.size(); ++r)
      for (int64_t key = part.first; key < part.last; ++key)
        if (part.bits[key] >> odd.index[r] & 1)
          for (int64_t d = 0; d < width; ++d)
            out[(d / kPanel * kKeyTile + key) * kPanel + d % kPanel] +=
                weights[key * kPanel + odd.index[r]] * odd.numbers[r * width + d];
  }
};

}  // namespace dlm_fast::cpu
