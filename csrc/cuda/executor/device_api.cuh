// The words that kernel bodies use for the machine, on real hardware: nvcc and NVRTC. The emulator
// has a header of the same name with the same words.
#pragma once

#include "cuda/device/plain_types.cuh"

#define DLM_DEVICE __device__ __forceinline__
#define DLM_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// One block fills a multiprocessor, so a thread may use all registers that there are.
#define DLM_LARGE_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
// Devices before sm_90 have no clusters and are never asked to start such a kernel.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define DLM_CLUSTER_KERNEL(threads, blocks) DLM_KERNEL(threads)
#else
#define DLM_CLUSTER_KERNEL(threads, blocks) \
  extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads)
#endif
// Before a loop: unrolled where its counter names registers, rolled where its body is large.
#define DLM_UNROLL _Pragma("unroll")
#define DLM_ROLL _Pragma("unroll 1")

namespace dlm_fast::device {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

DLM_DEVICE unsigned thread_index() {
  return threadIdx.x;
}
DLM_DEVICE unsigned thread_count() {
  return blockDim.x;
}
DLM_DEVICE unsigned block_x() {
  return blockIdx.x;
}
DLM_DEVICE unsigned block_y() {
  return blockIdx.y;
}
DLM_DEVICE unsigned grid_x() {
  return gridDim.x;
}

// --- synchronisation and shared memory
DLM_DEVICE void sync_block() {
  __syncthreads();
}
DLM_DEVICE void sync_warp() {
  __syncwarp();
}

DLM_DEVICE unsigned char* shared_bytes() {
  extern __shared__ __align__(128) unsigned char dlm_shared[];
  return dlm_shared;
}

// --- exchange inside a warp; all lanes must take part
template <typename T>
DLM_DEVICE T shuffle_xor(T value, unsigned mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <typename T>
DLM_DEVICE T shuffle(T value, unsigned lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
// A struct of 32-bit words, up to eight of them.
template <typename T>
DLM_DEVICE T shuffle_struct_xor(const T& value, unsigned mask) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 32, "whole words, up to eight");
  T other;
  const unsigned* from = reinterpret_cast<const unsigned*>(&value);
  unsigned* to = reinterpret_cast<unsigned*>(&other);
  DLM_UNROLL
  for (unsigned word = 0; word < sizeof(T) / 4; ++word)
    to[word] = __shfl_xor_sync(kAllLanes, from[word], mask);
  return other;
}
DLM_DEVICE unsigned ballot(bool vote) {
  return __ballot_sync(kAllLanes, vote);
}

// --- atomics on integers alone: sums of floats in any order would not repeat
DLM_DEVICE unsigned atomic_add(unsigned* address, unsigned value) {
  return atomicAdd(address, value);
}
DLM_DEVICE Wide atomic_add(Wide* address, Wide value) {
  return atomicAdd(address, value);
}
DLM_DEVICE unsigned atomic_or(unsigned* address, unsigned value) {
  return atomicOr(address, value);
}

// --- thread-block clusters (sm_90)
DLM_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
DLM_DEVICE void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Reads a float that lies at the given place of this block's shared memory in another block's.
DLM_DEVICE float cluster_load(const float* local, unsigned rank) {
  float value = 0.0f;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(local));
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
#endif
  return value;
}

// --- asynchronous copies of 16 bytes from global to shared memory
DLM_DEVICE void copy_async_16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
DLM_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` committed groups of this thread are under way.
template <int pending>
DLM_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- four 8x8 matrices of 16-bit numbers from shared memory: lane 8 i + r points to row r of
// matrix i, 16 bytes; d[i] gets the numbers 2 (lane % 4) and the next one of its row lane / 4
DLM_DEVICE void load_matrices(unsigned (&d)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// --- matrix instructions: d [16, 8] += a [16, 16] b [16, 8], fragments as the PTX manual has them
DLM_DEVICE void mma_16x8x16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DLM_DEVICE void mma_16x8x16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- arithmetic
DLM_DEVICE float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
DLM_DEVICE double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
DLM_DEVICE unsigned bits_of(float x) {
  return __float_as_uint(x);
}
DLM_DEVICE float float_of_bits(unsigned bits) {
  return __uint_as_float(bits);
}
DLM_DEVICE float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DLM_DEVICE unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DLM_DEVICE unsigned count_bits(unsigned bits) {
  return __popc(bits);
}

}  // namespace dlm_fast::device
