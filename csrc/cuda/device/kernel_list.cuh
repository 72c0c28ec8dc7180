// How a body file names its entry points. It defines DLM_KERNELS(KERNEL), a list of
// KERNEL(qualifier, name, Params, function), and ends with DLM_KERNELS(DLM_DEFINE_KERNEL); the
// executors go through the same list.
#pragma once

#define DLM_DEFINE_KERNEL(qualifier, name, Params, ...) \
  qualifier name(const dlm_fast::cuda::Params params) { \
    using namespace dlm_fast::device;                   \
    __VA_ARGS__(params);                                \
  }
