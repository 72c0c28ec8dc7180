// Eight floats in an AVX2 register; include only in files compiled for AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec_math.h"

namespace dlm_fast::cpu::avx2 {

struct Vec {
  using Real = float;
  using Mask = __m256;
  static constexpr int kLanes = 8;
  // 6 x 2 accumulators, two operands and one broadcast fill the sixteen registers.
  static constexpr int kTile = 6;
  __m256 x;

  static Vec load(const float* p) {
    return {_mm256_loadu_ps(p)};
  }
  // `count` numbers, below the width; zeros behind, where nothing is read.
  static Vec load_part(const float* p, int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_maskload_ps(
        p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane))};
  }
  static Vec load_bfloat16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, x);
  }
  // To nearest, ties to even, as torch rounds; subnormal numbers too.
  void store_bfloat16(uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), odd);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
  static Vec set(float value) {
    return {_mm256_set1_ps(value)};
  }
  friend Vec operator+(Vec a, Vec b) {
    return {_mm256_add_ps(a.x, b.x)};
  }
  friend Vec operator-(Vec a, Vec b) {
    return {_mm256_sub_ps(a.x, b.x)};
  }
  friend Vec operator*(Vec a, Vec b) {
    return {_mm256_mul_ps(a.x, b.x)};
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.x, b.x, c.x)};
  }
  // The second operand where one of the two is NaN.
  static Vec larger(Vec a, Vec b) {
    return {_mm256_max_ps(a.x, b.x)};
  }
  static Vec smaller(Vec a, Vec b) {
    return {_mm256_min_ps(a.x, b.x)};
  }
  static Mask greater(Vec a, Vec b) {
    return _mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ);
  }
  static Mask equal(Vec a, Vec b) {
    return _mm256_cmp_ps(a.x, b.x, _CMP_EQ_OQ);
  }
  // Bit i stands for lane i.
  static Mask lanes(uint32_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i found = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(found, each));
  }
  static Vec select(Mask mask, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.x, yes.x, mask)};
  }
  static float reduce(Vec a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void transpose(Vec (&r)[kLanes]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(r[2 * i].x, r[2 * i + 1].x);
      a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].x, r[2 * i + 1].x);
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        b[4 * i + 2 * j] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0x44);
        b[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0xEE);
      }
    for (int i = 0; i < 4; ++i) {
      r[i].x = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      r[i + 4].x = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }
  static Vec round(Vec a) {
    return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static Vec times_power_of_two(Vec a, Vec n) {
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n.x), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.x, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)))};
  }
  static void split(Vec a, Vec& mantissa, Vec& exponent) {
    const __m256i bits = _mm256_castps_si256(a.x);
    const __m256i power = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127));
    exponent.x = _mm256_cvtepi32_ps(power);
    const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x007FFFFF));
    mantissa.x = _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3F800000)));
  }
  static Vec exp(Vec a) {
    return exp_polynomial(a);
  }
  static Vec log(Vec a) {
    return log_polynomial(a);
  }
};

}  // namespace dlm_fast::cpu::avx2
