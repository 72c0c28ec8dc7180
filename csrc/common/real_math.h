// Elementary functions by overload, on the CPU, under nvcc and under NVRTC.
#pragma once

// NVRTC knows the functions without a header, but no names for these values.
#ifdef __CUDACC_RTC__
#define DLM_INFINITY __int_as_float(0x7F800000)
#define DLM_NAN __int_as_float(0x7FC00000)
#else
#include <math.h>
#define DLM_INFINITY HUGE_VALF
#define DLM_NAN NAN
#endif

#include "common/host_device.h"

namespace dlm_fast {

DLM_HOST_DEVICE inline float exp_of(float x) {
  return ::expf(x);
}
DLM_HOST_DEVICE inline double exp_of(double x) {
  return ::exp(x);
}
DLM_HOST_DEVICE inline float log_of(float x) {
  return ::logf(x);
}
DLM_HOST_DEVICE inline double log_of(double x) {
  return ::log(x);
}

template <typename Real>
DLM_HOST_DEVICE inline Real infinity_of() {
  return static_cast<Real>(DLM_INFINITY);
}
template <typename Real>
DLM_HOST_DEVICE inline Real nan_of() {
  return static_cast<Real>(DLM_NAN);
}
template <typename Real>
DLM_HOST_DEVICE inline Real larger_of(Real a, Real b) {
  return a < b ? b : a;
}
template <typename Real>
DLM_HOST_DEVICE inline Real smaller_of(Real a, Real b) {
  return b < a ? b : a;
}

}  // namespace dlm_fast
