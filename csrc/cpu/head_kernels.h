// The block kernels that the head ops are made of: one table per instruction set.
//
// Rows of hidden states live in the lanes of vectors, vocabulary rows are broadcast. So every
// statistic runs down a lane without a step across lanes, a row's numbers do not depend on the rows
// beside it, and neither operand of the logit GEMM needs more than a copy.
// Letters: D width, P panel = 2 vectors of rows, n rows, V vocabulary.
#pragma once

#include <cstdint>

#include "dlm_fast/dtype.h"

namespace dlm_fast::cpu {

// Vocabulary rows whose logits (for 256 rows) and weights stay in a 1 MiB L2 cache. A multiple of
// every tile height (4, 6, 14) and of the four columns of a Philox block.
constexpr int64_t kBlockV = 252;
// Columns of D that are multiplied before partial sums are added up: bounds the rounding error and
// keeps the operands near. Whole cache lines, so that widths of models need no short last part.
constexpr int64_t kBlockD = 256;
// 17 cache lines: rows of a packed block fall into different cache sets, and a tile may read past
// its last column.
constexpr int64_t kWeightStride = 272;
constexpr int64_t kPackedWeight = kBlockV * kWeightStride;
// Blocks between two cuts of the vocabulary; fixed, so that results never depend on the threads.
constexpr int64_t kChunkBlocks = 8;
// Rows that share one packed block of weights.
constexpr int64_t kGroupRows = 256;
// Rows that are fewer than it pays to copy weights for, where a vector has as many lanes.
constexpr int64_t kFewRows = 8;

// What products fetch ahead of their use: from L3 for the next panel, from memory for the next
// part.
constexpr int kAhead = 2;

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : (dtype == Dtype::kFloat32 ? 4 : 2);
}

struct Matrix {
  const void* data;
  int64_t stride;
  int64_t width;
  Dtype dtype;
};

// Part of a block that exists: rows of the vocabulary, columns of D.
struct BlockSize {
  int64_t v;
  int64_t d;
};

// Memory that will be read soon: a product asks for a few cache lines of it with every tile, so
// that they come from memory, or from L3, while it multiplies.
struct Ahead {
  uintptr_t row = 0;  // an address, which may run past the end of an array
  int64_t stride = 0, bytes = 0;
  int64_t lines = 0, per_tile = 0;
  int64_t offset = 0;

  Ahead() = default;
  // Rows that have come by the end of a number of tiles.
  Ahead(const void* data, int64_t row_stride, int64_t row_bytes, int64_t rows, int64_t tiles)
      : row(reinterpret_cast<uintptr_t>(data)),
        stride(row_stride),
        bytes(row_bytes),
        lines((row_bytes + 63) / 64 * rows),
        per_tile((lines + tiles - 1) / tiles) {}

  // Call once per tile.
  void fetch() {
    const int64_t count = per_tile < lines ? per_tile : lines;
    lines -= count;
    for (int64_t i = 0; i < count; ++i) {
#if defined(__GNUC__)
      __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<uintptr_t>(offset)), 0, 2);
#endif
      offset += 64;
      if (offset < bytes) continue;
      offset = 0;
      row += static_cast<uintptr_t>(stride);
    }
  }
};

// Softmax state of a panel: five arrays [P] behind each other.
template <typename Real>
struct PanelState {
  Real *max, *sum, *weighted, *second, *index;
  PanelState(Real* base, int panel)
      : max(base),
        sum(base + panel),
        weighted(base + 2 * panel),
        second(base + 3 * panel),
        index(base + 4 * panel) {}
};
constexpr int kStateArrays = 5;

// Counter-based noise of a panel: arrays [P].
struct NoiseLanes {
  const uint32_t *key_low, *key_high, *position, *step;
  uint32_t draw;
};

// Best column of a panel by logit / temperature + noise: arrays [P].
template <typename Real>
struct BestLanes {
  Real *score, *index, *logit;
};

// With p = e^(z - max) / sum and l = z - max - log_sum, the gradient of a logit is
// p * (linear + entropic * l), plus the cotangent of the target in its column. Arrays [P]; lanes
// with active = 0 get exactly zero, whatever they hold.
template <typename Real>
struct GradientLanes {
  const Real *max, *inverse_sum, *log_sum, *linear, *entropic, *active;
  bool with_entropy;
};

template <typename Real>
struct WeightUpdate {
  void* out;  // [v, columns], rows stride apart; bfloat16 where round is set, else Real
  int64_t stride;
  int64_t v;
  int64_t columns;  // at most P
  Real alpha;
  bool add;
  bool round;  // never with add
};

template <typename Real>
struct HeadKernels {
  int lanes;
  int panel;  // P = 2 * lanes
  int tile;   // vocabulary rows of a register tile

  // rows of the matrix (below zero: zeros) -> [D, P], lanes past count zero
  void (*pack_rows)(const Matrix& matrix, const int64_t* rows, int64_t count, Real* out);
  // columns [first, first + P) of rows -> [count, P], zero past the width
  void (*pack_columns)(const Matrix& matrix, const int64_t* rows, int64_t count, int64_t first,
                       Real* out);
  // a block at (v, d) -> [kBlockV, kWeightStride], rows past size.v zero up to a whole tile
  void (*pack_weight)(const Matrix& weight, int64_t v, int64_t d, BlockSize size, Real* out);
  // out [kBlockV, P] (+)= weight block times rows [D, P]
  void (*logits)(const Real* rows, const Real* weight, BlockSize size, bool add, int vectors,
                 Ahead* ahead, Real* out);
  // pack_weight and logits in one, for whole tiles of rows, whole vectors of depth, two vectors of
  // hidden states, and a matrix of type Real
  void (*logits_and_pack)(const Real* rows, const Matrix& matrix, int64_t v, int64_t d,
                          BlockSize size, bool add, Ahead* ahead, Real* weight, Real* out);
  // the same sums for at most min(kFewRows, lanes) rows: out [count, P] = weight rows
  // [v, v + count) times rows [kFewRows, D], zero past num_rows
  void (*few_logits)(const Matrix& weight, int64_t v, int64_t count, const Real* rows,
                     int64_t num_rows, Real* out);
  // logits = (logits + bias) * scale in place
  void (*scale)(Real* logits, int64_t v, const Real* bias, double scale, int vectors);
  // the same, then into the state; `first` numbers the columns
  void (*accumulate)(Real* logits, int64_t v, const Real* bias, double scale, int vectors,
                     Real* state);
  // as accumulate, with second maximum and index of the maximum
  void (*accumulate_top)(Real* logits, int64_t v, const Real* bias, double scale, int vectors,
                         int64_t first, Real* state);
  void (*sample)(const Real* logits, BlockSize first_and_v, Real inverse_temperature,
                 const NoiseLanes& noise, int vectors, const BestLanes<Real>& best);
  // logits -> their gradient, without the target's cotangent; out may be the logits
  void (*gradient)(const Real* logits, int64_t v, const GradientLanes<Real>& lanes, int vectors,
                   Real* out);
  // out [D, P] at d (+)= weight block transposed times gradient [kBlockV, P]
  void (*hidden_gradient)(const Real* gradient, const Real* weight, BlockSize size, bool add,
                          int vectors, Ahead* ahead, Real* out);
  // out (+)= alpha * gradient of all panels [n / P, kBlockV, P] times columns [n, P]
  void (*weight_gradient)(const Real* gradient, const Real* columns, int64_t n,
                          const WeightUpdate<Real>& update, Ahead* ahead);
  // out[v] = sum over n rows of the gradient
  void (*bias_gradient)(const Real* gradient, int64_t v, int64_t n, Real* out);
  void (*round)(const Real* numbers, int64_t count, uint16_t* bfloat16);
  // out[rows[i]] += column i of the panel [columns, P], for columns [0, columns)
  void (*add_rows)(const Real* panel, int64_t columns, const int64_t* rows, int64_t count,
                   int64_t stride, Real* out);
};

// The matrix products of bfloat16 inputs by a dot product of pairs: a "number" of an operand is two
// neighbours along the depth, and sizes along the depth count pairs. Logits need no conversion, a
// row of 2D numbers is one of D pairs; gradients are rounded to bfloat16, once.
struct PairKernels {
  // [kBlockV, P] of one panel -> in its first half [kBlockV, P / 2], pairs of rows of hidden
  // states; in its second half [kBlockV / 2, P], pairs of vocabulary rows
  void (*pack_gradient)(float* gradient, int64_t v);
  // as pack_columns -> [count / 2, P], pairs of rows
  void (*pack_columns)(const Matrix& matrix, const int64_t* rows, int64_t count, int64_t first,
                       float* out);
  // as pack_weight -> [kBlockV / 2, kWeightStride], pairs of vocabulary rows
  void (*pack_weight)(const Matrix& weight, int64_t v, int64_t d, BlockSize size, float* out);
  decltype(HeadKernels<float>::logits) logits;
  decltype(HeadKernels<float>::logits_and_pack) logits_and_pack;
  decltype(HeadKernels<float>::few_logits) few_logits;
  decltype(HeadKernels<float>::hidden_gradient) hidden_gradient;
  decltype(HeadKernels<float>::weight_gradient) weight_gradient;
};

// The variant of the instruction set in force.
template <typename Real>
const HeadKernels<Real>& head_kernels();

// Null where the instruction set in force has no such product.
const PairKernels* pair_kernels();

namespace portable {
const HeadKernels<float>& float_kernels();
const HeadKernels<double>& double_kernels();
}  // namespace portable
namespace avx2 {
const HeadKernels<float>& float_kernels();
}
namespace avx512 {
const HeadKernels<float>& float_kernels();
}
namespace avx512bf16 {
const PairKernels& pair_kernels();  // for panels of avx512
}

}  // namespace dlm_fast::cpu
