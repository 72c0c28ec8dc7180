// The words that kernel bodies use for the machine, in the emulator; csrc/cuda/executor has the
// header of the same name for real hardware.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/device/plain_types.cuh"
#include "emulation/block.h"

#define DLM_DEVICE inline
#define DLM_KERNEL(threads) static void
#define DLM_LARGE_KERNEL(threads) static void
#define DLM_CLUSTER_KERNEL(threads, blocks) static void
#define DLM_UNROLL
#define DLM_ROLL

namespace dlm_fast::device {

constexpr unsigned kWarp = 32;

inline unsigned thread_index() {
  return emulation::here().thread;
}
inline unsigned thread_count() {
  return emulation::here().threads;
}
inline unsigned block_x() {
  return emulation::here().block_x;
}
inline unsigned block_y() {
  return emulation::here().block_y;
}
inline unsigned grid_x() {
  return emulation::here().grid_x;
}

inline void sync_block() {
  emulation::sync_block();
}
inline void sync_warp() {
  emulation::sync_warp();
}
inline unsigned char* shared_bytes() {
  return emulation::here().shared;
}

template <typename T>
T exchanged(const unsigned char* slots, unsigned lane) {
  T value;
  std::memcpy(&value, slots + lane * emulation::kExchangeBytes, sizeof(T));
  return value;
}
template <typename T>
T shuffle_xor(T value, unsigned mask) {
  const unsigned lane = thread_index() % kWarp;
  return exchanged<T>(emulation::exchange(&value, sizeof(T)), (lane ^ mask) % kWarp);
}
template <typename T>
T shuffle(T value, unsigned lane) {
  return exchanged<T>(emulation::exchange(&value, sizeof(T)), lane % kWarp);
}
template <typename T>
T shuffle_struct_xor(const T& value, unsigned mask) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 32, "whole words, up to eight");
  return shuffle_xor(value, mask);
}
inline unsigned ballot(bool vote) {
  const unsigned char mine = vote ? 1 : 0;
  const unsigned char* slots = emulation::exchange(&mine, 1);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    votes |= unsigned{slots[lane * emulation::kExchangeBytes]} << lane;
  return votes;
}

template <typename T>
T atomic_add(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
inline unsigned atomic_or(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address = before | value;
  return before;
}

inline unsigned cluster_rank() {
  return emulation::here().cluster_rank;
}
inline void sync_cluster() {
  emulation::sync_cluster();
}
inline float cluster_load(const float* local, unsigned rank) {
  float value;
  std::memcpy(&value, emulation::cluster_address(local, rank), sizeof(float));
  return value;
}

inline void copy_async_16(void* shared, const void* global) {
  emulation::copy_async(shared, global, 16);
}
inline void copy_commit() {
  emulation::copy_commit();
}
template <int pending>
void copy_wait() {
  emulation::copy_wait(pending);
}

inline float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of_bits(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned count_bits(unsigned bits) {
  return static_cast<unsigned>(__builtin_popcount(bits));
}

float half_to_float(unsigned short bits);
unsigned short float_to_half(float value);

inline void load_matrices(unsigned (&d)[4], const void* row) {
  const unsigned char* slots = emulation::exchange(&row, sizeof(row));
  const unsigned lane = thread_index() % kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    const auto* from =
        static_cast<const unsigned char*>(exchanged<const void*>(slots, 8 * i + lane / 4));
    std::memcpy(&d[i], from + lane % 4 * 4, 4);
  }
}

// What the lanes of a warp hold of the two factors: a [16, 16] by rows, b [16, 8] by columns.
struct MmaFragments {
  unsigned a[4];
  unsigned b[2];
};
static_assert(sizeof(MmaFragments) <= emulation::kExchangeBytes, "fragments must fit an exchange");

template <typename Widen>
void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Widen widen) {
  const MmaFragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const unsigned char* slots = emulation::exchange(&mine, sizeof(mine));
  const unsigned lane = thread_index() % kWarp;
  const unsigned row = lane / 4, column = lane % 4 * 2;
  for (unsigned entry = 0; entry < 4; ++entry) {
    const unsigned m = row + entry / 2 * 8, n = column + entry % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned quad = k % 8 / 2, upper = k / 8, shift = k % 2 * 16;
      const auto left = exchanged<MmaFragments>(slots, m % 8 * 4 + quad);
      const auto right = exchanged<MmaFragments>(slots, n * 4 + quad);
      d[entry] += widen(static_cast<unsigned short>(left.a[m / 8 + upper * 2] >> shift)) *
                  widen(static_cast<unsigned short>(right.b[upper] >> shift));
    }
  }
}
inline void mma_16x8x16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma_16x8x16(d, a, b, [](unsigned short bits) { return float_of_bits(unsigned{bits} << 16); });
}
inline void mma_16x8x16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma_16x8x16(d, a, b, half_to_float);
}

}  // namespace dlm_fast::device
