// Gathers selected rows into a contiguous block and adds their gradients back, in a fixed order.
#pragma once

#include "cuda/device/kernel_list.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/select_rows_params.h"

namespace dlm_fast::device {

using cuda::GatherRowsParams;
using cuda::ScatterRowsParams;

constexpr unsigned kSelectThreads = 256;

// An ignored row and one behind the valid ones is zero. A row number outside the source cannot be
// reported without a wait: all bits set, which is NaN in every type, tells of it.
template <typename Element>
DLM_DEVICE void gather_rows(const GatherRowsParams& params) {
  const int row = static_cast<int>(block_x());
  const int step = static_cast<int>(thread_count());
  Element* out = static_cast<Element*>(params.out) + static_cast<Index>(row) * params.width;
  const Element* from = nullptr;
  Element fill = 0;
  if (row < params.valid && !(params.targets && params.targets[row] == -100)) {
    const Index number = params.rows ? params.rows[row] : params.first + row;
    if (number >= 0 && number < params.source_rows)
      from = static_cast<const Element*>(params.source) + number * params.source_stride;
    else
      fill = static_cast<Element>(~Wide{0});
  }
  for (int column = static_cast<int>(thread_index()); column < params.width; column += step)
    out[column] = from ? from[column] : fill;
}

template <typename Real, typename Stored>
DLM_DEVICE void scatter_rows(const ScatterRowsParams& params) {
  const Index row = block_x();
  const int step = static_cast<int>(thread_count());
  Stored* out = static_cast<Stored*>(params.out) + row * params.width;
  const Index begin = params.start[row], end = params.start[row + 1];
  for (int column = static_cast<int>(thread_index()); column < params.width; column += step) {
    Real sum = 0;
    for (Index entry = begin; entry < end; ++entry)
      sum += static_cast<const Real*>(params.grad)[params.order[entry] * params.width + column];
    store_number(out + column, sum);
  }
}

}  // namespace dlm_fast::device

#define DLM_SELECT_KERNEL DLM_KERNEL(dlm_fast::device::kSelectThreads)
#define DLM_KERNELS(KERNEL)                                                                        \
  KERNEL(DLM_SELECT_KERNEL, gather_rows_16, GatherRowsParams, gather_rows<unsigned short>)         \
  KERNEL(DLM_SELECT_KERNEL, gather_rows_32, GatherRowsParams, gather_rows<unsigned>)               \
  KERNEL(DLM_SELECT_KERNEL, gather_rows_64, GatherRowsParams, gather_rows<Wide>)                   \
  KERNEL(DLM_SELECT_KERNEL, scatter_rows_f32_f32, ScatterRowsParams, scatter_rows<float, float>)   \
  KERNEL(DLM_SELECT_KERNEL, scatter_rows_f32_bf16, ScatterRowsParams,                              \
         scatter_rows<float, BFloat16>)                                                            \
  KERNEL(DLM_SELECT_KERNEL, scatter_rows_f32_f16, ScatterRowsParams, scatter_rows<float, Float16>) \
  KERNEL(DLM_SELECT_KERNEL, scatter_rows_f64_f64, ScatterRowsParams, scatter_rows<double, double>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
