// Small kernels, right and wrong ones, on which the tests try the emulator itself.
#pragma once

#include "cuda/device/kernel_list.cuh"
#include "cuda/device/numbers.cuh"

namespace dlm_fast::cuda {

struct SelftestParams {
  const void* input;
  void* output;
  long long count;
};

}  // namespace dlm_fast::cuda

namespace dlm_fast::device {

using cuda::SelftestParams;

DLM_DEVICE unsigned* words(void* bytes) {
  return static_cast<unsigned*>(bytes);
}
DLM_DEVICE unsigned* shared_words() {
  return words(shared_bytes());
}
DLM_DEVICE unsigned global_thread() {
  return (block_y() * grid_x() + block_x()) * thread_count() + thread_index();
}

// --- barriers: every thread gets its left neighbour's word

template <bool kBarrier>
DLM_DEVICE void left_neighbour(const SelftestParams& params) {
  const unsigned thread = thread_index();
  shared_words()[thread] = thread;
  if (kBarrier) sync_block();
  words(params.output)[global_thread()] = shared_words()[thread == 0 ? 0 : thread - 1];
}

template <bool kBarrier>
DLM_DEVICE void left_lane(const SelftestParams& params) {
  const unsigned thread = thread_index();
  shared_words()[thread] = thread;
  if (kBarrier) sync_warp();
  words(params.output)[global_thread()] = shared_words()[thread % kWarp == 0 ? thread : thread - 1];
}

// The first warp's word, which others read after meetings of their own warps.
template <bool kBarrier>
DLM_DEVICE void late_word(const SelftestParams& params) {
  if (thread_index() == 0) *shared_words() = 1;
  if (kBarrier) sync_block();
  for (int meeting = 0; meeting < 5; ++meeting) sync_warp();
  words(params.output)[global_thread()] = *shared_words();
}

DLM_DEVICE void wait_at_two_places(const SelftestParams&) {
  if (thread_index() % 2) {
    sync_warp();
  } else {
    sync_block();
  }
}

DLM_DEVICE void leave_before_the_barrier(const SelftestParams& params) {
  if (thread_index() < params.count) return;
  sync_block();
}

DLM_DEVICE void leave_before_the_shuffle(const SelftestParams& params) {
  if (thread_index() < params.count) return;
  ballot(true);
}

// --- shared memory

DLM_DEVICE void read_fresh(const SelftestParams& params) {
  words(params.output)[global_thread()] = shared_words()[thread_index()];
}

DLM_DEVICE void read_behind_the_end(const SelftestParams& params) {
  words(params.output)[global_thread()] = shared_words()[params.count];
}

// --- asynchronous copies of 16 bytes a thread

DLM_DEVICE void start_copy(const SelftestParams& params, unsigned place) {
  const unsigned offset = (place * thread_count() + thread_index()) * 16;
  copy_async_16(shared_bytes() + offset, static_cast<const char*>(params.input) + offset);
  copy_commit();
}

// `count` tells how many of two copies of the thread may be under way when it reads the first.
DLM_DEVICE void read_first_copy(const SelftestParams& params) {
  start_copy(params, 0);
  start_copy(params, 1);
  if (params.count == 0) copy_wait<0>();
  if (params.count == 1) copy_wait<1>();
  const unsigned first = shared_words()[thread_index() * 4];
  const unsigned second = shared_words()[(thread_count() + thread_index()) * 4];
  copy_wait<0>();
  words(params.output)[2 * global_thread()] = first;
  words(params.output)[2 * global_thread() + 1] = second;
}

DLM_DEVICE void leave_a_copy(const SelftestParams& params) {
  start_copy(params, 0);
  start_copy(params, 1);
  copy_wait<1>();
}

DLM_DEVICE void leave_an_open_group(const SelftestParams& params) {
  copy_async_16(shared_bytes() + thread_index() * 16, params.input);
  copy_wait<0>();
}

// --- exchange inside a warp

DLM_DEVICE void exchange_words(const SelftestParams& params) {
  const unsigned mine = words(const_cast<void*>(params.input))[global_thread()];
  unsigned* out = words(params.output) + 4 * global_thread();
  out[0] = shuffle_xor(mine, 5);
  out[1] = shuffle(mine, 7);
  out[2] = ballot(mine & 1u);
  out[3] = count_bits(mine);
}

DLM_DEVICE void exchange_doubles(const SelftestParams& params) {
  const double mine = static_cast<const double*>(params.input)[global_thread()];
  static_cast<double*>(params.output)[global_thread()] = shuffle_xor(mine, 16);
}

// --- order and atomics: who comes when

DLM_DEVICE void take_a_ticket(const SelftestParams& params) {
  unsigned* counter = words(const_cast<void*>(params.input));
  words(params.output)[global_thread()] = atomic_add(counter, 1u);
  atomic_or(counter + 1, 1u << global_thread() % 32);
}

// --- clusters: every block gets the number that each block of its cluster keeps

// A block that leaves before the others have read takes its shared memory along.
template <bool kStay>
DLM_DEVICE void visit_cluster(const SelftestParams& params) {
  float* mine = reinterpret_cast<float*>(shared_bytes());
  if (thread_index() == 0) mine[1] = static_cast<float>(100 * block_y() + block_x());
  sync_cluster();
  for (unsigned rank = 0; rank < params.count; ++rank)
    if (thread_index() == 0)
      static_cast<float*>(params.output)[(block_y() * grid_x() + block_x()) * params.count + rank] =
          cluster_load(mine + 1, rank);
  if (kStay) sync_cluster();
}

// --- arithmetic

DLM_DEVICE void widen_halves(const SelftestParams& params) {
  const unsigned index = global_thread();
  if (index >= params.count) return;
  const auto* halves = static_cast<const Float16*>(params.input);
  static_cast<float*>(params.output)[index] = load_number(halves + index);
}
DLM_DEVICE void widen_bfloat16(const SelftestParams& params) {
  const unsigned index = global_thread();
  if (index >= params.count) return;
  const auto* numbers = static_cast<const BFloat16*>(params.input);
  static_cast<float*>(params.output)[index] = load_number(numbers + index);
}
template <typename Stored>
DLM_DEVICE void narrow(const SelftestParams& params) {
  const unsigned index = global_thread();
  if (index >= params.count) return;
  store_number(static_cast<Stored*>(params.output) + index,
               static_cast<const float*>(params.input)[index]);
}

DLM_DEVICE unsigned pair_at(const unsigned short* at, unsigned step) {
  return unsigned{at[0]} | unsigned{at[step]} << 16;
}

// d [16, 8] += a [16, 16] b [16, 8], one warp: input holds a, then b, output d, all by rows.
template <bool kHalf>
DLM_DEVICE void multiply_tiles(const SelftestParams& params) {
  const auto* a = static_cast<const unsigned short*>(params.input);
  const unsigned short* b = a + 256;
  const unsigned row = thread_index() / 4, column = thread_index() % 4 * 2;
  unsigned left[4], right[2];
  for (unsigned part = 0; part < 4; ++part)
    left[part] = pair_at(a + (row + part % 2 * 8) * 16 + column + part / 2 * 8, 1);
  for (unsigned part = 0; part < 2; ++part)
    right[part] = pair_at(b + (column + part * 8) * 8 + row, 8);
  float* d = static_cast<float*>(params.output);
  float sums[4];
  for (unsigned part = 0; part < 4; ++part)
    sums[part] = d[(row + part / 2 * 8) * 8 + column + part % 2];
  if (kHalf) {
    mma_16x8x16_f16(sums, left, right);
  } else {
    mma_16x8x16_bf16(sums, left, right);
  }
  for (unsigned part = 0; part < 4; ++part)
    d[(row + part / 2 * 8) * 8 + column + part % 2] = sums[part];
}

}  // namespace dlm_fast::device

#define DLM_SELFTEST(KERNEL, name, ...) \
  KERNEL(DLM_KERNEL(1024), selftest_##name, SelftestParams, __VA_ARGS__)
#define DLM_KERNELS(KERNEL)                                                \
  DLM_SELFTEST(KERNEL, left_neighbour, left_neighbour<true>)               \
  DLM_SELFTEST(KERNEL, left_neighbour_no_barrier, left_neighbour<false>)   \
  DLM_SELFTEST(KERNEL, left_lane, left_lane<true>)                         \
  DLM_SELFTEST(KERNEL, left_lane_no_barrier, left_lane<false>)             \
  DLM_SELFTEST(KERNEL, late_word, late_word<true>)                         \
  DLM_SELFTEST(KERNEL, late_word_no_barrier, late_word<false>)             \
  DLM_SELFTEST(KERNEL, wait_at_two_places, wait_at_two_places)             \
  DLM_SELFTEST(KERNEL, leave_before_the_barrier, leave_before_the_barrier) \
  DLM_SELFTEST(KERNEL, leave_before_the_shuffle, leave_before_the_shuffle) \
  DLM_SELFTEST(KERNEL, read_fresh, read_fresh)                             \
  DLM_SELFTEST(KERNEL, read_behind_the_end, read_behind_the_end)           \
  DLM_SELFTEST(KERNEL, read_first_copy, read_first_copy)                   \
  DLM_SELFTEST(KERNEL, leave_a_copy, leave_a_copy)                         \
  DLM_SELFTEST(KERNEL, leave_an_open_group, leave_an_open_group)           \
  DLM_SELFTEST(KERNEL, exchange_words, exchange_words)                     \
  DLM_SELFTEST(KERNEL, exchange_doubles, exchange_doubles)                 \
  DLM_SELFTEST(KERNEL, take_a_ticket, take_a_ticket)                       \
  DLM_SELFTEST(KERNEL, visit_cluster, visit_cluster<true>)                 \
  DLM_SELFTEST(KERNEL, visit_cluster_and_leave, visit_cluster<false>)      \
  DLM_SELFTEST(KERNEL, widen_halves, widen_halves)                         \
  DLM_SELFTEST(KERNEL, widen_bfloat16, widen_bfloat16)                     \
  DLM_SELFTEST(KERNEL, narrow_halves, narrow<Float16>)                     \
  DLM_SELFTEST(KERNEL, narrow_bfloat16, narrow<BFloat16>)                  \
  DLM_SELFTEST(KERNEL, multiply_tiles_bf16, multiply_tiles<false>)         \
  DLM_SELFTEST(KERNEL, multiply_tiles_f16, multiply_tiles<true>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
