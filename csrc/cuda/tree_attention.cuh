// Attention over a prefix tree: one block takes one work item of the plan for one key head.
//
// Traffic: a tile of 32 keys and values goes to shared memory once for up to 32 query lines (rows
// times the query heads that share the key head); an item with more lines passes its keys again. A
// line leaves d + 1 floats, or its output. Mapping: a warp owns four lines; for scores a lane is a
// key, for the weighted sum it is a stretch of the width. Warps meet at the tiles alone. Numerics:
// products and sums in float, one order whatever else the launch holds.
#pragma once

#include "common/real_math.h"
#include "cuda/device/chunks.cuh"
#include "cuda/device/kernel_list.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/tree_attention_params.h"

namespace dlm_fast::device {

using cuda::kTreeKeys;
using cuda::kTreeLines;
using cuda::kTreeWarpLines;
using cuda::TreeAttentionParams;

static_assert(kTreeKeys == static_cast<int>(kWarp), "a lane is a key");

// Shared memory: scaled queries, a tile of keys and of values, weights, offsets of the tile's keys.
template <typename Element, int kWidth>
struct TreeShared {
  static constexpr int kChunkNumbers = kChunkBytes / static_cast<int>(sizeof(Element));
  static constexpr int kRowChunks = kWidth / kChunkNumbers;
  // Sixteen bytes more than the width: eight lanes that read a chunk of eight rows meet all banks.
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(Element)) + kChunkBytes;

  alignas(kChunkBytes) unsigned char keys[kTreeKeys * kRowBytes];
  alignas(kChunkBytes) unsigned char values[kTreeKeys * kRowBytes];
  alignas(kChunkBytes) float queries[kTreeLines][kWidth];
  float weights[kTreeLines][kTreeKeys];
  Index offsets[kTreeKeys];

  DLM_DEVICE const Chunk<Element>& key_chunk(int key, int chunk) const {
    return *reinterpret_cast<const Chunk<Element>*>(keys + key * kRowBytes + chunk * kChunkBytes);
  }
  DLM_DEVICE const Element* value_row(int key) const {
    return reinterpret_cast<const Element*>(values + key * kRowBytes);
  }
};

template <typename Element, int kWidth>
struct TreeBlock {
  using Shared = TreeShared<Element, kWidth>;
  static constexpr int kColumns = kWidth / static_cast<int>(kWarp);  // of a lane

  const TreeAttentionParams& params;
  const TreeItem item;
  const int head, group;
  const int warp, lane;
  Shared& shared;
  // Of this warp's four lines.
  float max[kTreeWarpLines], sum[kTreeWarpLines];
  float out[kTreeWarpLines][kColumns];
  int seen[kTreeWarpLines];  // keys of the item that the line sees; 0 behind the last line

  DLM_DEVICE explicit TreeBlock(const TreeAttentionParams& given)
      : params(given),
        item(given.items[block_x()]),
        head(static_cast<int>(block_y())),
        group(given.query_heads / given.key_heads),
        warp(static_cast<int>(thread_index() / kWarp)),
        lane(static_cast<int>(lane_index())),
        shared(*reinterpret_cast<Shared*>(shared_bytes())) {}

  DLM_DEVICE void run() {
    const int lines = item.num_rows * group;
    const int at_once = static_cast<int>(thread_count() / kWarp) * kTreeWarpLines;
    for (int first = 0; first < lines; first += at_once) {
      const int mine = first + warp * kTreeWarpLines;
      start(mine, lines);
      for (int key = 0; key < item.num_keys; key += kTreeKeys) {
        const int count = smaller_of(kTreeKeys, item.num_keys - key);
        load_tile(key, count);
        if (mine >= lines) continue;
        add_scores(key, count);
        add_values(key, count);
      }
      finish(mine, lines);
    }
  }

  DLM_DEVICE int head_of(int line) const {
    return head * group + line % group;
  }

  // The warp's own lines: nobody else reads their queries.
  DLM_DEVICE void start(int first, int lines) {
    DLM_UNROLL
    for (int i = 0; i < kTreeWarpLines; ++i) {
      max[i] = -infinity();
      sum[i] = 0;
      DLM_UNROLL
      for (int c = 0; c < kColumns; ++c) out[i][c] = 0;
      const int line = first + i;
      const bool inside = line < lines;
      const int row = item.first_row + (inside ? line / group : 0);
      const int limit = smaller_of(params.limits[row] - item.position, item.num_keys);
      seen[i] = inside ? larger_of(limit, 0) : 0;
      const Element* from = static_cast<const Element*>(params.q) +
                            params.rows[row] * params.q_row_stride +
                            (inside ? head_of(line) : 0) * params.q_head_stride;
      float* to = shared.queries[warp * kTreeWarpLines + i];
      for (int d = lane; d < kWidth; d += static_cast<int>(kWarp))
        to[d] = inside && d < params.width ? load_number(from + d) * params.scale : 0.0f;
    }
  }

  // Where key `number` of the item lies, by bisection over the starts of its pieces.
  DLM_DEVICE Index offset_of(int number) const {
    const int* starts = params.piece_starts + item.first_piece;
    const int wanted = number + starts[0];
    int low = 0, high = item.num_pieces;  // starts[low] <= wanted < starts[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (starts[middle] <= wanted)
        low = middle;
      else
        high = middle;
    }
    const int slot = params.piece_slots[item.first_piece + low] + wanted - starts[low];
    return slot / params.page * params.page_stride + slot % params.page * params.token_stride +
           head * params.head_stride;
  }

  DLM_DEVICE void load_tile(int key, int count) {
    if (warp == 0 && lane < count) shared.offsets[lane] = offset_of(key + lane);
    sync_block();  // and all are through with the queries, or the tile before
    const int chunks = count * Shared::kRowChunks;
    for (int i = static_cast<int>(thread_index()); i < 2 * chunks;
         i += static_cast<int>(thread_count())) {
      const bool is_value = i >= chunks;
      const int number = is_value ? i - chunks : i;
      const int row = number / Shared::kRowChunks, chunk = number % Shared::kRowChunks;
      const int column = chunk * Shared::kChunkNumbers;
      const Element* from = static_cast<const Element*>(params.keys) + shared.offsets[row] +
                            (is_value ? params.value_stride : 0);
      unsigned char* to = is_value ? shared.values : shared.keys;
      copy_chunk(to + row * Shared::kRowBytes + chunk * kChunkBytes, from, column, params.width,
                 params.is_aligned && column + Shared::kChunkNumbers <= params.width);
    }
    copy_commit();
    copy_wait<0>();
    sync_block();
  }

  // A lane is a key: its scores with the four lines become weights in shared memory.
  DLM_DEVICE void add_scores(int key, int count) {
    float score[kTreeWarpLines] = {};
    if (lane < count) {
      DLM_ROLL
      for (int chunk = 0; chunk < Shared::kRowChunks; ++chunk) {
        const Chunk<Element> numbers = shared.key_chunk(lane, chunk);
        DLM_UNROLL
        for (int n = 0; n < Shared::kChunkNumbers; ++n) {
          const float number = load_number(&numbers.value[n]);
          DLM_UNROLL
          for (int i = 0; i < kTreeWarpLines; ++i)
            score[i] = multiply_add(
                shared.queries[warp * kTreeWarpLines + i][chunk * Shared::kChunkNumbers + n],
                number, score[i]);
        }
      }
    }
    DLM_UNROLL
    for (int i = 0; i < kTreeWarpLines; ++i) {
      const bool sees = key + lane < seen[i];
      const float mine = sees ? score[i] : -infinity();
      float highest = mine;
      for (unsigned mask = 1; mask < kWarp; mask *= 2)
        highest = larger_of(highest, shuffle_xor(highest, mask));
      const float now = larger_of(max[i], highest);
      // a line that has seen nothing yet: minus infinity less itself would be NaN
      const float base = now == -infinity() ? 0.0f : now;
      const float weight = sees ? exp_of(mine - base) : 0.0f;
      const float rescale = exp_of(max[i] - base);
      float total = weight;
      for (unsigned mask = 1; mask < kWarp; mask *= 2) total += shuffle_xor(total, mask);
      sum[i] = sum[i] * rescale + total;
      max[i] = now;
      DLM_UNROLL
      for (int c = 0; c < kColumns; ++c) out[i][c] *= rescale;
      shared.weights[warp * kTreeWarpLines + i][lane] = weight;
    }
    sync_warp();
  }

  // A lane is kColumns neighbouring columns.
  DLM_DEVICE void add_values(int key, int count) {
    for (int k = 0; k < count; ++k) {
      const Element* row = shared.value_row(k) + lane * kColumns;
      float numbers[kColumns];
      DLM_UNROLL
      for (int c = 0; c < kColumns; ++c) numbers[c] = load_number(row + c);
      DLM_UNROLL
      for (int i = 0; i < kTreeWarpLines; ++i) {
        // NaN in a value must not reach a line that does not see it
        if (key + k >= seen[i]) continue;
        const float weight = shared.weights[warp * kTreeWarpLines + i][k];
        DLM_UNROLL
        for (int c = 0; c < kColumns; ++c) out[i][c] = multiply_add(weight, numbers[c], out[i][c]);
      }
    }
  }

  DLM_DEVICE void finish(int first, int lines) const {
    DLM_UNROLL
    for (int i = 0; i < kTreeWarpLines; ++i) {
      const int line = first + i;
      if (line >= lines) break;
      const int to = params.destinations[item.destination + line / group];
      const Index place = Index{to < 0 ? ~to : to} * params.query_heads + head_of(line);
      const float inverse = sum[i] == 0 ? 0.0f : 1.0f / sum[i];
      DLM_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int d = lane * kColumns + c;
        if (d >= params.width) break;
        if (to < 0)
          store_number(static_cast<Element*>(params.out) + place * params.width + d,
                       out[i][c] * inverse);
        else
          params.part_states[place * params.width + d] = out[i][c] * inverse;
      }
      if (lane == 0) (to < 0 ? params.lse : params.part_lse)[place] = max[i] + log_of(sum[i]);
    }
  }
};

template <typename Element, int kWidth>
DLM_DEVICE void tree_attention(const TreeAttentionParams& params) {
  TreeBlock<Element, kWidth>(params).run();
}

}  // namespace dlm_fast::device

#define DLM_TREE_KERNEL DLM_KERNEL(dlm_fast::cuda::kTreeThreads)
#define DLM_KERNELS(KERNEL)                                                                        \
  KERNEL(DLM_TREE_KERNEL, tree_attention_f32_64, TreeAttentionParams, tree_attention<float, 64>)   \
  KERNEL(DLM_TREE_KERNEL, tree_attention_f32_128, TreeAttentionParams, tree_attention<float, 128>) \
  KERNEL(DLM_TREE_KERNEL, tree_attention_f32_256, TreeAttentionParams, tree_attention<float, 256>) \
  KERNEL(DLM_TREE_KERNEL, tree_attention_bf16_64, TreeAttentionParams,                             \
         tree_attention<BFloat16, 64>)                                                             \
  KERNEL(DLM_TREE_KERNEL, tree_attention_bf16_128, TreeAttentionParams,                            \
         tree_attention<BFloat16, 128>)                                                            \
  KERNEL(DLM_TREE_KERNEL, tree_attention_bf16_256, TreeAttentionParams,                            \
         tree_attention<BFloat16, 256>)                                                            \
  KERNEL(DLM_TREE_KERNEL, tree_attention_f16_64, TreeAttentionParams, tree_attention<Float16, 64>) \
  KERNEL(DLM_TREE_KERNEL, tree_attention_f16_128, TreeAttentionParams,                             \
         tree_attention<Float16, 128>)                                                             \
  KERNEL(DLM_TREE_KERNEL, tree_attention_f16_256, TreeAttentionParams, tree_attention<Float16, 256>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
