// One chunk of a parameter: sum of squares, inner product and main += scale * grad.
//
// Memory bound: 10 bytes per number for bfloat16 gradients under a float32 main gradient. Sums run
// in eight double lanes, in which the product of two float32 numbers is exact, so they do not
// depend on the width of the vectors. scale * grad and the sum are rounded one after the other for
// the same reason.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast::cpu {

// Numbers of a chunk: a partial sum each, whatever the number of threads.
constexpr int64_t kAxpyChunk = 16384;

struct AxpyChunk {
  void* main;
  const void* grad;
  int64_t first;  // place of the chunk in its parameter, a multiple of kAxpyChunk
  int64_t count;
  Dtype main_dtype, grad_dtype;
  double scale;
  PhiloxKey key;
  uint32_t step;
};

struct AxpySums {
  double square, inner;
};

struct AxpyKernels {
  AxpySums (*add)(const AxpyChunk& chunk);
  // The sum of squares alone; reads grad only.
  AxpySums (*square)(const AxpyChunk& chunk);
};

// V: floats of the instruction set; Eight: eight doubles, whose add_product may fuse, since the
// product of two float32 numbers is exact.
template <class V, class Eight>
struct AxpyKernel {
  static constexpr int64_t kBlock = 64;
  static constexpr int kLanes = 8;
  static constexpr int64_t kRoundsAtOnce = kBlock / 8;  // Philox blocks that round a block

  struct Lanes {
    Eight square = Eight::zero();
    Eight inner = Eight::zero();
    AxpySums total() const {
      double squares[kLanes], inners[kLanes];
      square.store(squares);
      inner.store(inners);
      AxpySums sums{0, 0};
      for (int i = 0; i < kLanes; ++i) sums.square += squares[i], sums.inner += inners[i];
      return sums;
    }
  };

  template <Dtype kType>
  static constexpr int64_t size_of() {
    return kType == Dtype::kFloat32 ? 4 : 2;
  }

  template <Dtype kType>
  static void widen(const void* data, float* out) {
    for (int64_t i = 0; i < kBlock; i += V::kLanes) {
      if constexpr (kType == Dtype::kFloat32)
        V::load(static_cast<const float*>(data) + i).store(out + i);
      else if constexpr (kType == Dtype::kBFloat16)
        V::load_bfloat16(static_cast<const uint16_t*>(data) + i).store(out + i);
      else
        V::load_half(static_cast<const uint16_t*>(data) + i).store(out + i);
    }
  }

  static void add_squares(const float* grad, Lanes& sums) {
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Eight g = Eight::load(grad + i);
      sums.square = Eight::add_product(sums.square, g, g);
    }
  }

  static void add_products(const float* grad, const float* main, Lanes& sums) {
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Eight g = Eight::load(grad + i);
      sums.square = Eight::add_product(sums.square, g, g);
      sums.inner = Eight::add_product(sums.inner, g, Eight::load(main + i));
    }
  }

  // 16 random bits for each number of a block; number e of a parameter takes half e & 1 of word
  // (e >> 1) & 3 of the Philox block (e >> 3, e >> 35, step, 0).
  static void random_halves(const AxpyChunk& chunk, int64_t place, uint32_t* out) {
    PhiloxWord c[4][kRoundsAtOnce], low[kRoundsAtOnce], high[kRoundsAtOnce];
    for (int64_t i = 0; i < kRoundsAtOnce; ++i) {
      const int64_t block = (chunk.first + place) / 8 + i;
      c[0][i] = static_cast<PhiloxWord>(block);
      c[1][i] = static_cast<PhiloxWord>(block >> 32);
      c[2][i] = chunk.step;
      c[3][i] = 0;
      low[i] = chunk.key.low;
      high[i] = chunk.key.high;
    }
    for (int round = 0; round < kPhiloxRounds; ++round)
      for (int64_t i = 0; i < kRoundsAtOnce; ++i)
        philox_round(c[0][i], c[1][i], c[2][i], c[3][i], low[i], high[i]);
    for (int64_t i = 0; i < kRoundsAtOnce; ++i)
      for (int word = 0; word < 4; ++word) {
        out[8 * i + 2 * word] = c[word][i] & 0xFFFFu;
        out[8 * i + 2 * word + 1] = c[word][i] >> 16;
      }
  }

  // Up with the probability of the fraction that is cut off; NaN and infinities stay what they are.
  static void round_stochastically(const float* numbers, const uint32_t* random, uint16_t* out) {
    for (int64_t i = 0; i < kBlock; ++i) {
      uint32_t bits;
      std::memcpy(&bits, numbers + i, sizeof(bits));
      const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
      out[i] = static_cast<uint16_t>((is_nan ? bits | 0x00400000u : bits + random[i]) >> 16);
    }
  }

  template <Dtype kMain, Dtype kGrad>
  static void add_block(const AxpyChunk& chunk, int64_t place, void* main, const void* grad,
                        Lanes& sums) {
    alignas(64) float g[kBlock], m[kBlock];
    widen<kGrad>(grad, g);
    widen<kMain>(main, m);
    add_products(g, m, sums);
    const float scale = static_cast<float>(chunk.scale);
    for (int64_t i = 0; i < kBlock; ++i) m[i] += scale * g[i];
    if constexpr (kMain == Dtype::kBFloat16) {
      alignas(64) uint32_t random[kBlock];
      random_halves(chunk, place, random);
      round_stochastically(m, random, static_cast<uint16_t*>(main));
    } else {
      std::memcpy(main, m, sizeof(m));
    }
  }

  template <Dtype kMain, Dtype kGrad>
  static AxpySums add_as(const AxpyChunk& chunk) {
    constexpr int64_t kMainSize = size_of<kMain>(), kGradSize = size_of<kGrad>();
    char* main = static_cast<char*>(chunk.main);
    const char* grad = static_cast<const char*>(chunk.grad);
    Lanes sums;
    int64_t i = 0;
    for (; i + kBlock <= chunk.count; i += kBlock)
      add_block<kMain, kGrad>(chunk, i, main + i * kMainSize, grad + i * kGradSize, sums);
    if (i < chunk.count) {
      alignas(64) char tail_main[kBlock * 4] = {}, tail_grad[kBlock * 4] = {};
      const size_t rest = static_cast<size_t>(chunk.count - i);
      std::memcpy(tail_main, main + i * kMainSize, rest * kMainSize);
      std::memcpy(tail_grad, grad + i * kGradSize, rest * kGradSize);
      add_block<kMain, kGrad>(chunk, i, tail_main, tail_grad, sums);
      std::memcpy(main + i * kMainSize, tail_main, rest * kMainSize);
    }
    return sums.total();
  }

  template <Dtype kMain>
  static AxpySums add_to(const AxpyChunk& chunk) {
    if (chunk.grad_dtype == Dtype::kBFloat16) return add_as<kMain, Dtype::kBFloat16>(chunk);
    if (chunk.grad_dtype == Dtype::kFloat16) return add_as<kMain, Dtype::kFloat16>(chunk);
    return add_as<kMain, Dtype::kFloat32>(chunk);
  }

  static AxpySums add(const AxpyChunk& chunk) {
    return chunk.main_dtype == Dtype::kBFloat16 ? add_to<Dtype::kBFloat16>(chunk)
                                                : add_to<Dtype::kFloat32>(chunk);
  }

  template <Dtype kGrad>
  static AxpySums square_as(const AxpyChunk& chunk) {
    constexpr int64_t kGradSize = size_of<kGrad>();
    const char* grad = static_cast<const char*>(chunk.grad);
    alignas(64) float g[kBlock];
    Lanes sums;
    int64_t i = 0;
    for (; i + kBlock <= chunk.count; i += kBlock) {
      widen<kGrad>(grad + i * kGradSize, g);
      add_squares(g, sums);
    }
    if (i < chunk.count) {
      alignas(64) char tail[kBlock * 4] = {};
      std::memcpy(tail, grad + i * kGradSize, static_cast<size_t>((chunk.count - i) * kGradSize));
      widen<kGrad>(tail, g);
      add_squares(g, sums);
    }
    return sums.total();
  }

  static AxpySums square(const AxpyChunk& chunk) {
    if (chunk.grad_dtype == Dtype::kBFloat16) return square_as<Dtype::kBFloat16>(chunk);
    if (chunk.grad_dtype == Dtype::kFloat16) return square_as<Dtype::kFloat16>(chunk);
    return square_as<Dtype::kFloat32>(chunk);
  }

  static const AxpyKernels& kernels() {
    static const AxpyKernels found{add, square};
    return found;
  }
};

namespace avx2 {
const AxpyKernels& axpy_kernels();
}
namespace avx512 {
const AxpyKernels& axpy_kernels();
}

}  // namespace dlm_fast::cpu
