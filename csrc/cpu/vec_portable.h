// A vector of a few numbers in plain C++, for processors without a variant of their own and for
// float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/vec_math.h"

namespace dlm_fast::cpu::portable {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float float_from_bfloat16(uint16_t bits) {
  return float_from_bits(uint32_t{bits} << 16);
}

// To nearest, ties to even, as torch rounds.
inline uint16_t bfloat16_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_from_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu;
  const uint32_t fraction = half & 0x3FFu;
  if (exponent == 0x1F) return float_from_bits(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // zero or subnormal
  return sign ? -magnitude : magnitude;
}

template <typename R, int kWidth>
struct Vec {
  using Real = R;
  static constexpr int kLanes = kWidth;
  static constexpr int kTile = 4;  // vocabulary rows of a register tile
  struct Mask {
    bool on[kWidth];
  };
  R x[kWidth];

  template <class F>
  static Vec make(const F& f) {
    Vec v;
    for (int i = 0; i < kWidth; ++i) v.x[i] = f(i);
    return v;
  }
  static Vec load(const R* p) {
    return make([&](int i) { return p[i]; });
  }
  // `count` numbers, below the width; zeros behind, where nothing is read.
  static Vec load_part(const R* p, int64_t count) {
    return make([&](int i) { return i < count ? p[i] : R(0); });
  }
  static Vec load_bfloat16(const uint16_t* p) {
    return make([&](int i) { return static_cast<R>(float_from_bfloat16(p[i])); });
  }
  static Vec load_half(const uint16_t* p) {
    return make([&](int i) { return static_cast<R>(float_from_half(p[i])); });
  }
  void store(R* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = x[i];
  }
  void store_bfloat16(uint16_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = bfloat16_from_float(static_cast<float>(x[i]));
  }
  static Vec set(R value) {
    return make([&](int) { return value; });
  }
  friend Vec operator+(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.x[i] + b.x[i]; });
  }
  friend Vec operator-(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.x[i] - b.x[i]; });
  }
  friend Vec operator*(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.x[i] * b.x[i]; });
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return make([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  // The second operand where one of the two is NaN.
  static Vec larger(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static Vec smaller(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
  }
  static Mask greater(const Vec& a, const Vec& b) {
    Mask mask;
    for (int i = 0; i < kWidth; ++i) mask.on[i] = a.x[i] > b.x[i];
    return mask;
  }
  static Mask equal(const Vec& a, const Vec& b) {
    Mask mask;
    for (int i = 0; i < kWidth; ++i) mask.on[i] = a.x[i] == b.x[i];
    return mask;
  }
  // Bit i stands for lane i.
  static Mask lanes(uint32_t bits) {
    Mask mask;
    for (int i = 0; i < kWidth; ++i) mask.on[i] = (bits >> i & 1) != 0;
    return mask;
  }
  static Vec select(const Mask& mask, const Vec& yes, const Vec& no) {
    return make([&](int i) { return mask.on[i] ? yes.x[i] : no.x[i]; });
  }
  // Sum over lanes in a fixed order.
  static R reduce(const Vec& a) {
    R sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += a.x[i];
    return sum;
  }
  static void transpose(Vec (&rows)[kWidth]) {
    for (int i = 0; i < kWidth; ++i)
      for (int j = 0; j < i; ++j) {
        const R swapped = rows[i].x[j];
        rows[i].x[j] = rows[j].x[i];
        rows[j].x[i] = swapped;
      }
  }
  static Vec round(const Vec& a) {
    // Adding 1.5 * 2^23 leaves no bits behind the point; std::nearbyint is a call on plain x86-64.
    return make([&](int i) { return (a.x[i] + R(12582912)) - R(12582912); });
  }
  static Vec times_power_of_two(const Vec& a, const Vec& n) {
    return make([&](int i) {
      const int power = static_cast<int>(n.x[i] >= R(-126) ? n.x[i] : R(-126));
      return a.x[i] * static_cast<R>(float_from_bits(static_cast<uint32_t>(power + 127) << 23));
    });
  }
  static void split(const Vec& a, Vec& mantissa, Vec& exponent) {
    for (int i = 0; i < kWidth; ++i) {
      int power;
      mantissa.x[i] = std::frexp(a.x[i], &power) * R(2);
      exponent.x[i] = static_cast<R>(power - 1);
    }
  }
  static Vec exp(const Vec& a) {
    if constexpr (sizeof(R) == 4) return exp_polynomial(a);
    return make([&](int i) { return std::exp(a.x[i]); });
  }
  static Vec log(const Vec& a) {
    if constexpr (sizeof(R) == 4) return log_polynomial(a);
    return make([&](int i) { return std::log(a.x[i]); });
  }
};

}  // namespace dlm_fast::cpu::portable
