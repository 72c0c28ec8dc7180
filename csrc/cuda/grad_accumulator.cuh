// One sample's gradients into main gradients: sum, squared norm and inner product in one pass. A
// block takes one chunk of one tensor, a thread eight neighbouring numbers at a time, which is one
// Philox block where the sum is rounded stochastically. Traffic: 10 bytes per number for bfloat16
// gradients under float32 main gradients. Sums are double and have their own place per chunk.
#pragma once

#include "common/philox.h"
#include "cuda/device/kernel_list.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/grad_accumulator_params.h"

namespace dlm_fast::device {

using cuda::AxpyEntry;
using cuda::AxpyParams;
using cuda::AxpyTotalParams;

constexpr int kGroup = 8;

struct AxpySums {
  double square, inner;
};

template <typename T>
struct alignas(16) AxpyWords {
  T value[16 / sizeof(T)];
};

template <typename T>
DLM_DEVICE bool is_aligned(const T* at) {
  return (reinterpret_cast<Wide>(at) & 15u) == 0;
}

// Numbers [0, count) of eight; by words of 16 bytes where all eight exist and lie on their border.
template <typename Real, typename T>
DLM_DEVICE void load_group(const T* at, int count, Real (&numbers)[kGroup]) {
  constexpr int kWords = static_cast<int>(16 / sizeof(T));
  if (count == kGroup && is_aligned(at)) {
    DLM_UNROLL
    for (int word = 0; word < kGroup / kWords; ++word) {
      const AxpyWords<T> words = reinterpret_cast<const AxpyWords<T>*>(at)[word];
      DLM_UNROLL
      for (int i = 0; i < kWords; ++i)
        numbers[word * kWords + i] = static_cast<Real>(load_number(&words.value[i]));
    }
    return;
  }
  DLM_UNROLL
  for (int i = 0; i < kGroup; ++i)
    numbers[i] = i < count ? static_cast<Real>(load_number(at + i)) : Real(0);
}

template <typename Real, typename T>
DLM_DEVICE void store_group(T* at, int count, const Real (&numbers)[kGroup]) {
  DLM_UNROLL
  for (int offset = 0; offset < kGroup; ++offset)
    if (offset < count) store_number(at + offset, numbers[offset]);
}

// Up with the probability of the fraction that is cut off; a number that is rounded already.
DLM_DEVICE float round_stochastically(float number, unsigned random) {
  const unsigned bits = bits_of(number);
  if (number != number) return number;
  return float_of_bits((bits + random) & 0xFFFF0000u);
}

template <typename Main, typename Real>
DLM_DEVICE void round_group(const AxpyParams&, const AxpyEntry&, Index, const Main*,
                            Real (&)[kGroup]) {}

// Number e takes half e & 1 of word (e >> 1) & 3 of the block (e >> 3, e >> 35, step, 0).
DLM_DEVICE void round_group(const AxpyParams& params, const AxpyEntry& entry, Index first,
                            const BFloat16*, float (&numbers)[kGroup]) {
  const Wide block = static_cast<Wide>(first) / kGroup;
  const PhiloxBlock random =
      philox4x32(static_cast<PhiloxWord>(block), static_cast<PhiloxWord>(block >> 32), params.step,
                 0u, philox_key(entry.key));
  DLM_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const unsigned word = random.word[i / 2];
    numbers[i] = round_stochastically(numbers[i], i % 2 ? word >> 16 : word & 0xFFFFu);
  }
}

template <typename Real, typename Grad>
DLM_DEVICE AxpySums square_chunk(const AxpyEntry& entry, Index begin, Index end) {
  AxpySums sums{0, 0};
  for (Index i = begin + Index{kGroup} * thread_index(); i < end; i += kGroup * thread_count()) {
    Real grad[kGroup];
    load_group(static_cast<const Grad*>(entry.grad) + i,
               end - i < kGroup ? static_cast<int>(end - i) : kGroup, grad);
    DLM_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      const double g = grad[k];
      sums.square += g * g;
    }
  }
  return sums;
}

template <typename Real, typename Main, typename Grad>
DLM_DEVICE AxpySums add_chunk(const AxpyParams& params, const AxpyEntry& entry, Index begin,
                              Index end) {
  const double factor = params.factor ? *params.factor : 1.0;
  const Real scale = static_cast<Real>(factor * params.scale);
  AxpySums sums{0, 0};
  for (Index i = begin + Index{kGroup} * thread_index(); i < end; i += kGroup * thread_count()) {
    const int count = end - i < kGroup ? static_cast<int>(end - i) : kGroup;
    Main* place = static_cast<Main*>(entry.main) + i;
    Real grad[kGroup], main[kGroup];
    load_group(static_cast<const Grad*>(entry.grad) + i, count, grad);
    load_group(place, count, main);
    DLM_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      const double g = grad[k], m = main[k];
      sums.square += g * g;
      sums.inner += g * m;
      main[k] += scale * grad[k];
    }
    round_group(params, entry, i, place, main);
    store_group(place, count, main);
  }
  return sums;
}

template <typename Main>
DLM_DEVICE AxpySums add_to(const AxpyParams& params, const AxpyEntry& entry, Index begin,
                           Index end) {
  switch (entry.grad_dtype) {
    case 1:
      return add_chunk<float, Main, BFloat16>(params, entry, begin, end);
    case 2:
      return add_chunk<float, Main, Float16>(params, entry, begin, end);
    default:
      return add_chunk<float, Main, float>(params, entry, begin, end);
  }
}

struct AxpyAdd {
  DLM_DEVICE AxpySums operator()(const AxpyParams& params, const AxpyEntry& entry, Index begin,
                                 Index end) const {
    if (entry.main_dtype == 3) return add_chunk<double, double, double>(params, entry, begin, end);
    if (entry.main_dtype == 1) return add_to<BFloat16>(params, entry, begin, end);
    return add_to<float>(params, entry, begin, end);
  }
};

struct AxpySquare {
  DLM_DEVICE AxpySums operator()(const AxpyParams&, const AxpyEntry& entry, Index begin,
                                 Index end) const {
    switch (entry.grad_dtype) {
      case 1:
        return square_chunk<float, BFloat16>(entry, begin, end);
      case 2:
        return square_chunk<float, Float16>(entry, begin, end);
      case 3:
        return square_chunk<double, double>(entry, begin, end);
      default:
        return square_chunk<float, float>(entry, begin, end);
    }
  }
};

// The sums of all threads, in thread 0, in an order that does not depend on timing.
DLM_DEVICE AxpySums sum_block(AxpySums sums) {
  auto* scratch = reinterpret_cast<AxpySums*>(shared_bytes());
  for (unsigned mask = 1; mask < kWarp; mask *= 2) {
    sums.square += shuffle_xor(sums.square, mask);
    sums.inner += shuffle_xor(sums.inner, mask);
  }
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = sums;
  sync_block();
  if (thread_index() == 0)
    for (unsigned warp = 1; warp < thread_count() / kWarp; ++warp) {
      sums.square += scratch[warp].square;
      sums.inner += scratch[warp].inner;
    }
  return sums;
}

template <typename Work>
DLM_DEVICE void axpy_chunks(const AxpyParams& params) {
  const int block = static_cast<int>(block_x());
  int index = 0;
  while (index + 1 < params.count && params.entries[index + 1].first_chunk <= block) ++index;
  const AxpyEntry& entry = params.entries[index];
  const Index begin = Index{block - entry.first_chunk} * cuda::kAxpyNumbers;
  const Index rest = entry.size - begin;
  const Index end = begin + (rest < cuda::kAxpyNumbers ? rest : cuda::kAxpyNumbers);
  const AxpySums sums = sum_block(Work{}(params, entry, begin, end));
  if (thread_index() == 0) {
    params.square[block] = sums.square;
    params.inner[block] = sums.inner;
  }
}

DLM_DEVICE void add_up_chunks(const AxpyTotalParams& params) {
  const double* partial = params.partial + Index{block_x()} * params.chunks;
  AxpySums sums{0, 0};
  for (Index i = thread_index(); i < params.chunks; i += thread_count()) sums.square += partial[i];
  const double total = sum_block(sums).square;
  if (thread_index() != 0) return;
  params.result[block_x()] = total;
  if (block_x() != 0 || !params.find_factor) return;
  const double square = total + params.square_elsewhere;
  // a norm that is not a number makes the factor one too: what is wrong must show
  const bool fits = square <= params.max_norm * params.max_norm;
  params.result[2] = fits ? 1.0 : params.max_norm / sqrt(square);
}

}  // namespace dlm_fast::device

#define DLM_AXPY_KERNEL DLM_KERNEL(dlm_fast::cuda::kAxpyThreads)
#define DLM_KERNELS(KERNEL)                                                 \
  KERNEL(DLM_AXPY_KERNEL, axpy_square, AxpyParams, axpy_chunks<AxpySquare>) \
  KERNEL(DLM_AXPY_KERNEL, axpy_add, AxpyParams, axpy_chunks<AxpyAdd>)       \
  KERNEL(DLM_AXPY_KERNEL, axpy_total, AxpyTotalParams, add_up_chunks)

DLM_KERNELS(DLM_DEFINE_KERNEL)
