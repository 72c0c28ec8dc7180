// Tiles of the head and of hidden states: their way to shared memory, and their products.
#pragma once

#include "cuda/device/chunks.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/head_decode_params.h"

namespace dlm_fast::device {

using cuda::HeadDecodeParams;
using cuda::kDecodeSplit;
using cuda::kDecodeThreads;
using cuda::kDecodeTileBytes;

constexpr int kRowChunks = kDecodeTileBytes / kChunkBytes;
constexpr int kWarpRows = kDecodeSplit / (kDecodeThreads / static_cast<int>(kWarp));
constexpr int kTokens = 8;  // columns of a matrix instruction
static_assert(kWarpRows == 32, "a thread holds four neighbouring vocabulary rows");

// Where a chunk of a tile's row lies. The order of a row's chunks differs from row to row, so that
// eight lanes which read one chunk each of eight neighbouring rows, or of every fourth of 32, meet
// all banks once.
DLM_DEVICE int chunk_place(int row, int chunk) {
  return row * kDecodeTileBytes + ((chunk ^ row ^ (row >> 2)) & (kRowChunks - 1)) * kChunkBytes;
}

DLM_DEVICE Chunk<float> load_chunk(const unsigned char* tile, int row, int chunk) {
  return *reinterpret_cast<const Chunk<float>*>(tile + chunk_place(row, chunk));
}

// Until at most stages - 2 of the committed groups are under way: the oldest stage is there.
DLM_DEVICE void wait_for_oldest(int stages) {
  switch (stages) {
    case 2:
      return copy_wait<0>();
    case 3:
      return copy_wait<1>();
    case 4:
      return copy_wait<2>();
    case 5:
      return copy_wait<3>();
    default:
      return copy_wait<4>();
  }
}

// The block's way through its splits, tile by tile, a few tiles ahead of the products. It does not
// stop between splits: the next one streams in during the epilogue.
template <typename Element, int kTiles>
struct TileStream {
  static constexpr int kTileWidth = kDecodeTileBytes / sizeof(Element);
  static constexpr int kChunkWidth = kChunkBytes / sizeof(Element);
  static constexpr int kRowsAtOnce = kDecodeThreads / kRowChunks;  // eight threads copy one row
  static constexpr int kHiddenTurns = (kTiles * kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kWeightBytes = kDecodeSplit * kDecodeTileBytes;
  static constexpr int kStageBytes = kWeightBytes + kTiles * kTokens * kDecodeTileBytes;

  const HeadDecodeParams& params;
  unsigned char* stages;
  const Element* hidden[kHiddenTurns];  // rows of which this thread copies a chunk; null: zeros
  int row, chunk;                       // of the first tile row that this thread copies
  int split, tile, slot;                // to be copied next

  DLM_DEVICE TileStream(const HeadDecodeParams& given, unsigned char* memory)
      : params(given),
        stages(memory),
        row(static_cast<int>(thread_index()) / kRowChunks),
        chunk(static_cast<int>(thread_index()) % kRowChunks),
        split(static_cast<int>(block_x())),
        tile(0),
        slot(0) {
    DLM_UNROLL
    for (int turn = 0; turn < kHiddenTurns; ++turn) {
      const int token = row + turn * kRowsAtOnce;
      const int source = token < params.rows.count ? source_of(params.rows, token) : -1;
      const bool inside = source >= 0 && source < params.hidden_rows;
      hidden[turn] =
          inside ? static_cast<const Element*>(params.hidden) + source * params.hidden_stride
                 : nullptr;
    }
  }

  DLM_DEVICE int tiles() const {
    return (params.width + kTileWidth - 1) / kTileWidth;
  }
  DLM_DEVICE int splits() const {
    return (params.rows.vocabulary + kDecodeSplit - 1) / kDecodeSplit;
  }
  DLM_DEVICE const unsigned char* weight_tile(int at) const {
    return stages + at * kStageBytes;
  }
  DLM_DEVICE const unsigned char* hidden_tile(int at) const {
    return stages + at * kStageBytes + kWeightBytes;
  }
  DLM_DEVICE int slot_after(int at) const {
    return at + 1 == params.stages ? 0 : at + 1;
  }

  // One group of copies, an empty one behind the end.
  DLM_DEVICE void copy_next() {
    if (split < splits()) {
      unsigned char* to = stages + slot * kStageBytes + chunk_place(row, chunk);
      const Index column = Index{tile} * kTileWidth + chunk * kChunkWidth;
      const bool inside = column + kChunkWidth <= params.width;
      const Index first_id = Index{split} * kDecodeSplit + row;
      const Element* from =
          static_cast<const Element*>(params.weight) + first_id * params.weight_stride;
      DLM_UNROLL
      for (int first = 0; first < kDecodeSplit; first += kRowsAtOnce) {
        const bool exists = first_id + first < params.rows.vocabulary;
        copy_chunk(to + first * kDecodeTileBytes, exists ? from : nullptr, column, params.width,
                   inside && params.weight_aligned);
        if (exists) from += kRowsAtOnce * params.weight_stride;
      }
      to += kWeightBytes;
      DLM_UNROLL
      for (int turn = 0; turn < kHiddenTurns; ++turn) {
        if (row + turn * kRowsAtOnce < kTiles * kTokens)
          copy_chunk(to + turn * kRowsAtOnce * kDecodeTileBytes, hidden[turn], column, params.width,
                     inside && params.hidden_aligned);
      }
      if (++tile == tiles()) {
        tile = 0;
        split += static_cast<int>(grid_x());
      }
    }
    copy_commit();
    slot = slot_after(slot);
  }
};

DLM_DEVICE void multiply_16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                            BFloat16) {
  mma_16x8x16_bf16(d, a, b);
}
DLM_DEVICE void multiply_16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                            Float16) {
  mma_16x8x16_f16(d, a, b);
}

// Adds the products of one tile. A thread's sums belong to the vocabulary rows
// warp * 32 + lane / 4 * 4 + {0, 1, 2, 3}, which share a block of noise, and in tile j of tokens to
// 8 j + lane % 4 * 2 + {0, 1}: sums[r / 2][j][r % 2 * 2 + token]. An instruction's 16 rows may be
// any: they are every fourth one and their neighbours.
template <int kTiles, typename Element>
DLM_DEVICE void add_products(const unsigned char* weight, const unsigned char* hidden,
                             float (&sums)[2][kTiles][4], Element type) {
  const int lane = static_cast<int>(thread_index() % kWarp);
  const int matrix = lane / 8, matrix_row = lane % 8;  // that this lane points to
  const int first = static_cast<int>(thread_index() / kWarp) * kWarpRows + matrix_row * 4;
  // Four chunks, two depths of 16, at a time.
  DLM_UNROLL
  for (int chunk = 0; chunk < kRowChunks; chunk += 4) {
    unsigned a[2][2][4];  // [depth][rows 0 and 1, rows 2 and 3]
    DLM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = first + i % 2 * 2 + matrix % 2;
      load_matrices(a[i / 2][i % 2], weight + chunk_place(row, chunk + i / 2 * 2 + matrix / 2));
    }
    DLM_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      unsigned b[4];
      load_matrices(b, hidden + chunk_place(j * kTokens + matrix_row, chunk + matrix));
      DLM_UNROLL
      for (int depth = 0; depth < 2; ++depth) {
        const unsigned pair[2] = {b[2 * depth], b[2 * depth + 1]};
        multiply_16(sums[0][j], a[depth][0], pair, type);
        multiply_16(sums[1][j], a[depth][1], pair, type);
      }
    }
  }
}

// The same sums by single multiply-adds.
template <int kTiles>
DLM_DEVICE void add_products(const unsigned char* weight, const unsigned char* hidden,
                             float (&sums)[2][kTiles][4], float) {
  const int lane = static_cast<int>(thread_index() % kWarp);
  const int first = static_cast<int>(thread_index() / kWarp) * kWarpRows + lane / 4 * 4;
  DLM_ROLL
  for (int chunk = 0; chunk < kRowChunks; ++chunk) {
    Chunk<float> row[4];
    DLM_UNROLL
    for (int r = 0; r < 4; ++r) row[r] = load_chunk(weight, first + r, chunk);
    DLM_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      DLM_UNROLL
      for (int token = 0; token < 2; ++token) {
        const Chunk<float> column = load_chunk(hidden, j * kTokens + lane % 4 * 2 + token, chunk);
        DLM_UNROLL
        for (int r = 0; r < 4; ++r) {
          float& sum = sums[r / 2][j][r % 2 * 2 + token];
          DLM_UNROLL
          for (int i = 0; i < 4; ++i) sum = multiply_add(row[r].value[i], column.value[i], sum);
        }
      }
    }
  }
}

}  // namespace dlm_fast::device
