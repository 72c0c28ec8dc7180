// Conversions between storage types and arithmetic, infinities.
#pragma once

#include "device_api.cuh"

namespace dlm_fast::device {

DLM_DEVICE float infinity() {
  return float_of_bits(0x7F800000u);
}
DLM_DEVICE float not_a_number() {
  return float_of_bits(0x7FC00000u);
}

DLM_DEVICE float load_number(const float* at) {
  return *at;
}
DLM_DEVICE double load_number(const double* at) {
  return *at;
}
DLM_DEVICE float load_number(const BFloat16* at) {
  return float_of_bits(static_cast<unsigned>(at->bits) << 16);
}
DLM_DEVICE float load_number(const Float16* at) {
  return half_to_float(at->bits);
}

// To nearest, ties to even; NaN stays NaN.
DLM_DEVICE unsigned short bfloat16_bits(float value) {
  const unsigned bits = bits_of(value);
  if (value != value) return static_cast<unsigned short>((bits >> 16) | 0x40u);
  return static_cast<unsigned short>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

DLM_DEVICE void store_number(float* at, float value) {
  *at = value;
}
DLM_DEVICE void store_number(double* at, double value) {
  *at = value;
}
DLM_DEVICE void store_number(BFloat16* at, float value) {
  at->bits = bfloat16_bits(value);
}
DLM_DEVICE void store_number(Float16* at, float value) {
  at->bits = float_to_half(value);
}

}  // namespace dlm_fast::device
