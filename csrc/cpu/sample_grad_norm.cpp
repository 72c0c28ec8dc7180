// Squared norms of samples' weight gradients from tiles that never leave the cache.
//
// Gram: tiles of 128 x 128 pairs of rows, upper triangle; a thread holds one tile of each Gram
// matrix. Direct: tiles of 252 x 256 numbers of the gradient. Both use the head ops' products. A
// tile's sum has its own place, so the order of the sum does not depend on the threads.
#include "dlm_fast/sample_grad_norm.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/parallel_for.h"
#include "cpu/head_kernels.h"
#include "cpu/scratch.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cpu {

namespace {

constexpr int64_t kGramRows = 128;
constexpr int64_t kDirectColumns = 256;
constexpr int64_t kDirectDepth = 256;  // rows of a sample that are packed at a time

struct Tile {
  int64_t sample;
  int64_t first, second;  // Gram: rows; direct: columns of grad_output and of input
  bool gram;
};

int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : (dtype == Dtype::kFloat32 ? 4 : 2);
}

// Columns [first, first + width) of a matrix.
Matrix columns_of(const Matrix& matrix, int64_t first, int64_t width) {
  return {static_cast<const char*>(matrix.data) + first * bytes_of(matrix.dtype), matrix.stride,
          std::min(width, matrix.width - first), matrix.dtype};
}

template <typename Real>
class SampleGradNorm {
 public:
  SampleGradNorm(const SampleGradShape& shape, const void* grad_output, const void* input,
                 const int64_t* starts)
      : shape_(shape),
        k_(head_kernels<Real>()),
        grad_{grad_output, shape.grad_stride, shape.d_out, shape.grad_dtype},
        input_{input, shape.input_stride, shape.d_in, shape.input_dtype},
        starts_(starts) {}

  void run(double* square, int num_threads) {
    list_tiles();
    std::vector<double> partial(tiles_.size());
    parallel_for(static_cast<int64_t>(tiles_.size()), num_threads, [&](int64_t i) {
      partial[i] = tiles_[i].gram ? gram_tile(tiles_[i]) : direct_tile(tiles_[i]);
    });
    std::fill_n(square, shape_.samples, 0.0);
    for (size_t i = 0; i < tiles_.size(); ++i) square[tiles_[i].sample] += partial[i];
  }

 private:
  bool use_gram(int64_t rows) const {
    if (shape_.method != SampleGradMethod::kAuto) return shape_.method == SampleGradMethod::kGram;
    return rows * (shape_.d_in + shape_.d_out) < shape_.d_in * shape_.d_out;
  }

  void list_tiles() {
    for (int64_t k = 0; k < shape_.samples; ++k) {
      const int64_t begin = starts_[k], end = starts_[k + 1];
      if (end == begin) continue;
      if (use_gram(end - begin)) {
        for (int64_t i = begin; i < end; i += kGramRows)
          for (int64_t j = i; j < end; j += kGramRows) tiles_.push_back({k, i, j, true});
      } else {
        for (int64_t v = 0; v < shape_.d_out; v += kBlockV)
          for (int64_t d = 0; d < shape_.d_in; d += kDirectColumns)
            tiles_.push_back({k, v, d, false});
      }
    }
  }

  std::vector<int64_t> rows_from(int64_t first, int64_t count) const {
    std::vector<int64_t> rows(static_cast<size_t>(count));
    std::iota(rows.begin(), rows.end(), first);
    return rows;
  }

  double gram_tile(const Tile& tile) const {
    const int64_t end = starts_[tile.sample + 1];
    const int64_t count_i = std::min(kGramRows, end - tile.first);
    const std::vector<int64_t> rows_j =
        rows_from(tile.second, std::min(kGramRows, end - tile.second));
    // Products are written in whole register tiles: 128 rows may become 140.
    const int64_t gram_size = kBlockV * kGramRows;
    Real* gram_dy = thread_scratch<Real>(2 * gram_size + kPackedWeight + kBlockD * kGramRows);
    Real* gram_x = gram_dy + gram_size;
    multiply_rows(grad_, tile.first, count_i, rows_j, gram_x + gram_size, gram_dy);
    multiply_rows(input_, tile.first, count_i, rows_j, gram_x + gram_size, gram_x);
    double sum = 0;
    for (int64_t j = 0; j < static_cast<int64_t>(rows_j.size()); j += k_.panel) {
      const int64_t lanes = std::min<int64_t>(k_.panel, rows_j.size() - j);
      for (int64_t i = 0; i < count_i; ++i) {
        const int64_t at = j * kBlockV + i * k_.panel;
        for (int64_t lane = 0; lane < lanes; ++lane)
          sum += static_cast<double>(gram_dy[at + lane]) * static_cast<double>(gram_x[at + lane]);
      }
    }
    return tile.first == tile.second ? sum : 2 * sum;
  }

  // gram [panels of rows_j, kBlockV, P] = rows [first, first + count) times rows_j.
  void multiply_rows(const Matrix& matrix, int64_t first, int64_t count,
                     const std::vector<int64_t>& rows_j, Real* packed, Real* gram) const {
    const int64_t num_j = static_cast<int64_t>(rows_j.size());
    Real* panels = packed + kPackedWeight;
    Ahead nothing[kAhead];
    for (int64_t d = 0; d < matrix.width; d += kBlockD) {
      const Matrix part = columns_of(matrix, d, kBlockD);
      k_.pack_weight(part, first, 0, {count, part.width}, packed);
      for (int64_t j = 0; j < num_j; j += k_.panel) {
        const int64_t lanes = std::min<int64_t>(k_.panel, num_j - j);
        k_.pack_rows(part, rows_j.data() + j, lanes, panels);
        k_.logits(panels, packed, {count, part.width}, d > 0, lanes > k_.lanes ? 2 : 1, nothing,
                  gram + j * kBlockV);
      }
    }
  }

  double direct_tile(const Tile& tile) const {
    const Matrix grad = columns_of(grad_, tile.first, kBlockV);
    const Matrix input = columns_of(input_, tile.second, kDirectColumns);
    const int64_t begin = starts_[tile.sample], end = starts_[tile.sample + 1];
    Real* gradient = thread_scratch<Real>(kBlockV * kDirectColumns + kBlockV * kDirectDepth +
                                          kDirectDepth * k_.panel);
    Real* packed = gradient + kBlockV * kDirectColumns;
    Real* columns = packed + kBlockV * kDirectDepth;
    Ahead nothing[kAhead];
    for (int64_t first = begin; first < end; first += kDirectDepth) {
      const std::vector<int64_t> rows = rows_from(first, std::min(kDirectDepth, end - first));
      const int64_t count = static_cast<int64_t>(rows.size());
      for (int64_t i = 0; i < count; i += k_.panel)
        k_.pack_rows(grad, rows.data() + i, std::min<int64_t>(k_.panel, count - i),
                     packed + i * kBlockV);
      for (int64_t d = 0; d < input.width; d += k_.panel) {
        k_.pack_columns(input, rows.data(), count, d, columns);
        k_.weight_gradient(
            packed, columns, count,
            {gradient + d, kDirectColumns, grad.width, std::min<int64_t>(k_.panel, input.width - d),
             Real(1), first > begin, false},
            nothing);
      }
    }
    double sum = 0;
    for (int64_t v = 0; v < grad.width; ++v)
      for (int64_t d = 0; d < input.width; ++d) {
        const double number = gradient[v * kDirectColumns + d];
        sum += number * number;
      }
    return sum;
  }

  const SampleGradShape& shape_;
  const HeadKernels<Real>& k_;
  Matrix grad_, input_;
  const int64_t* starts_;
  std::vector<Tile> tiles_;
};

}  // namespace

void sample_grad_norm(const SampleGradShape& shape, const void* grad_output, const void* input,
                      const int64_t* starts, double* square, int num_threads) {
  const bool wide = shape.grad_dtype == Dtype::kFloat64;
  DLM_CHECK(wide == (shape.input_dtype == Dtype::kFloat64),
            "sample_grad_norm: float64 goes with float64 alone");
  DLM_CHECK(shape.samples >= 0 && shape.d_out >= 0 && shape.d_in >= 0,
            "sample_grad_norm: sizes must not be negative");
  for (int64_t k = 0; k < shape.samples; ++k)
    DLM_CHECK(starts[k] >= 0 && starts[k] <= starts[k + 1],
              "sample_grad_norm: starts must not fall");
  if (wide)
    SampleGradNorm<double>(shape, grad_output, input, starts).run(square, num_threads);
  else
    SampleGradNorm<float>(shape, grad_output, input, starts).run(square, num_threads);
}

}  // namespace dlm_fast::cpu
