// IEEE half precision in integer arithmetic, for the emulator.
#include <algorithm>
#include <cmath>

#include "device_api.cuh"

namespace dlm_fast::device {

float half_to_float(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u,
                 fraction = bits & 1023u;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000u | fraction << 13);
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(fraction | 1024u),
                                                     static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}

unsigned short float_to_half(float value) {
  const unsigned bits = bits_of(value), sign = bits >> 16 & 0x8000u;
  if (value != value) return static_cast<unsigned short>(sign | 0x7E00u);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return static_cast<unsigned short>(sign | 0x7C00u);
  // Multiples of 2^-24 up to the smallest normal number, of 2^(e-10) above it; nearbyint rounds to
  // nearest, ties to even. A fraction that rounds up to 2048 carries into the exponent by itself.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int step = magnitude == 0 ? -24 : std::max(exponent - 11, -24);
  const unsigned fraction = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, -step)));
  const unsigned encoded =
      step == -24 ? fraction : (static_cast<unsigned>(step + 24) << 10) + fraction;
  return static_cast<unsigned short>(sign | encoded);
}

}  // namespace dlm_fast::device
