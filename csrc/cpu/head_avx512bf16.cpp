// Matrix products of bfloat16 inputs by AVX-512's dot product of pairs, which doubles the rate.
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from undefined registers and trip this warning when inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu/head_gemm.h"
#include "cpu/vec_avx512.h"

namespace dlm_fast::cpu::avx512bf16 {

namespace {

// Operands hold sixteen pairs of bfloat16, sums sixteen floats. Products are exact in float32 and
// are added there.
struct PairProduct {
  static constexpr int kDepth = 2;
  static DLM_INLINE avx512::Vec fma(avx512::Vec a, avx512::Vec b, avx512::Vec sum) {
    return {_mm512_dpbf16_ps(sum.x, (__m512bh)a.x, (__m512bh)b.x)};
  }
};

using Gemm = HeadGemm<avx512::Vec, PairProduct>;
constexpr int kLanes = Gemm::kLanes;
constexpr int kPanel = Gemm::kPanel;

// Sixteen bfloat16 numbers of a row, zero past the width or without a row.
__m256i read_row(const Matrix& matrix, int64_t row, int64_t d) {
  const int64_t left = matrix.width - d;
  if (row < 0 || left <= 0) return _mm256_setzero_si256();
  const auto* numbers = static_cast<const uint16_t*>(matrix.data) + row * matrix.stride + d;
  const __mmask16 inside = left >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
  return _mm256_maskz_loadu_epi16(inside, numbers);
}

// Lane i: low half from the first, high half from the second.
__m512 interleave(__m256i first, __m256i second) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
}

void pack_columns(const Matrix& matrix, const int64_t* rows, int64_t count, int64_t first,
                  float* out) {
  for (int64_t i = 0; i < count; i += 2)
    for (int j = 0; j < 2; ++j) {
      const int64_t d = first + j * kLanes;
      const __m512 pairs = interleave(read_row(matrix, rows[i], d),
                                      read_row(matrix, i + 1 < count ? rows[i + 1] : -1, d));
      _mm512_storeu_ps(out + i / 2 * kPanel + j * kLanes, pairs);
    }
}

void pack_weight(const Matrix& weight, int64_t v, int64_t d, BlockSize size, float* out) {
  const Matrix part{weight.data, weight.stride, d + size.d, weight.dtype};
  for (int64_t i = 0; i < size.v; i += 2)
    for (int64_t k = 0; k < size.d; k += kLanes) {
      const __m512 pairs = interleave(read_row(part, v + i, d + k),
                                      read_row(part, i + 1 < size.v ? v + i + 1 : -1, d + k));
      _mm512_storeu_ps(out + i / 2 * kWeightStride + k, pairs);
    }
}

__m256i rounded(const float* numbers) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(numbers));
}

void pack_gradient(float* gradient, int64_t v) {
  // Rows are read before the first half grows over them; the second half waits beside.
  alignas(64) float vocabulary_pairs[kBlockV / 2 * kPanel];
  auto* row_pairs = reinterpret_cast<uint16_t*>(gradient);
  for (int64_t i = 0; i < v; i += 2) {
    const float* rows = gradient + i * kPanel;
    const bool last = i + 1 == v;
    __m256i number[2][2];
    for (int j = 0; j < 2; ++j) {
      number[0][j] = rounded(rows + j * kLanes);
      number[1][j] = last ? _mm256_setzero_si256() : rounded(rows + kPanel + j * kLanes);
      _mm512_store_ps(vocabulary_pairs + i / 2 * kPanel + j * kLanes,
                      interleave(number[0][j], number[1][j]));
    }
    for (int row = 0; row < (last ? 1 : 2); ++row)
      for (int j = 0; j < 2; ++j)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_pairs + (i + row) * kPanel + j * kLanes),
                            number[row][j]);
  }
  float* second_half = gradient + kBlockV * kPanel / 2;
  for (int64_t i = 0; i < (v + 1) / 2 * kPanel; i += kLanes)
    _mm512_storeu_ps(second_half + i, _mm512_load_ps(vocabulary_pairs + i));
}

}  // namespace

const PairKernels& pair_kernels() {
  static const PairKernels kernels{pack_gradient,         pack_columns,          pack_weight,
                                   Gemm::logits,          Gemm::logits_and_pack, Gemm::few_logits,
                                   Gemm::hidden_gradient, Gemm::weight_gradient};
  return kernels;
}

}  // namespace dlm_fast::cpu::avx512bf16
