// Sixteen floats in an AVX-512 register; include only in files compiled for AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec_math.h"

namespace dlm_fast::cpu::avx512 {

struct Vec {
  using Real = float;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  // 14 x 2 accumulators, two operands and one broadcast fill 31 of the 32 registers.
  static constexpr int kTile = 14;
  __m512 x;

  static Vec load(const float* p) {
    return {_mm512_loadu_ps(p)};
  }
  // `count` numbers, below the width; zeros behind, where nothing is read.
  static Vec load_part(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
  }
  static Vec load_bfloat16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const {
    _mm512_storeu_ps(p, x);
  }
  // To nearest, ties to even, as torch rounds; subnormal numbers too, unlike the instruction.
  void store_bfloat16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), odd);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
  }
  static Vec set(float value) {
    return {_mm512_set1_ps(value)};
  }
  friend Vec operator+(Vec a, Vec b) {
    return {_mm512_add_ps(a.x, b.x)};
  }
  friend Vec operator-(Vec a, Vec b) {
    return {_mm512_sub_ps(a.x, b.x)};
  }
  friend Vec operator*(Vec a, Vec b) {
    return {_mm512_mul_ps(a.x, b.x)};
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.x, b.x, c.x)};
  }
  // The second operand where one of the two is NaN.
  static Vec larger(Vec a, Vec b) {
    return {_mm512_max_ps(a.x, b.x)};
  }
  static Vec smaller(Vec a, Vec b) {
    return {_mm512_min_ps(a.x, b.x)};
  }
  static Mask greater(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ);
  }
  static Mask equal(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ);
  }
  // Bit i stands for lane i.
  static Mask lanes(uint32_t bits) {
    return static_cast<__mmask16>(bits);
  }
  static Vec select(Mask mask, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(mask, no.x, yes.x)};
  }
  static float reduce(Vec a) {
    return _mm512_reduce_add_ps(a.x);
  }
  static void transpose(Vec (&r)[kLanes]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_ps(r[2 * i].x, r[2 * i + 1].x);
      a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].x, r[2 * i + 1].x);
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) {
        b[4 * i + 2 * j] = _mm512_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0x44);
        b[4 * i + 2 * j + 1] = _mm512_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0xEE);
      }
    // b[4i + c] holds, in its four 128-bit parts p, column 4p + c of rows 4i..4i+3.
    for (int c = 0; c < 4; ++c) {
      const __m512 low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44);
      const __m512 high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xEE);
      const __m512 low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44);
      const __m512 high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xEE);
      r[c].x = _mm512_shuffle_f32x4(low01, low23, 0x88);
      r[4 + c].x = _mm512_shuffle_f32x4(low01, low23, 0xDD);
      r[8 + c].x = _mm512_shuffle_f32x4(high01, high23, 0x88);
      r[12 + c].x = _mm512_shuffle_f32x4(high01, high23, 0xDD);
    }
  }
  static Vec round(Vec a) {
    return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static Vec times_power_of_two(Vec a, Vec n) {
    return {_mm512_scalef_ps(a.x, n.x)};
  }
  static void split(Vec a, Vec& mantissa, Vec& exponent) {
    mantissa.x = _mm512_getmant_ps(a.x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    exponent.x = _mm512_getexp_ps(a.x);
  }
  static Vec exp(Vec a) {
    return exp_polynomial(a);
  }
  static Vec log(Vec a) {
    return log_polynomial(a);
  }
};

}  // namespace dlm_fast::cpu::avx512
