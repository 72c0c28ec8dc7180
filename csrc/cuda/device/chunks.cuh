// Sixteen bytes of a row: the unit of copies from global to shared memory.
#pragma once

#include "device_api.cuh"

namespace dlm_fast::device {

constexpr int kChunkBytes = 16;

template <typename Element>
struct alignas(kChunkBytes) Chunk {
  Element value[kChunkBytes / sizeof(Element)];
};

// Zeros behind the width, and without a row. What is not a `whole` aligned chunk is copied number
// by number, at once.
template <typename Element>
DLM_DEVICE void copy_chunk(unsigned char* place, const Element* row, Index column, int width,
                           bool whole) {
  if (row && whole) {
    copy_async_16(place, row + column);
    return;
  }
  Chunk<Element> chunk;
  for (int i = 0; i < static_cast<int>(kChunkBytes / sizeof(Element)); ++i)
    chunk.value[i] = row && column + i < width ? row[column + i] : Element{};
  *reinterpret_cast<Chunk<Element>*>(place) = chunk;
}

}  // namespace dlm_fast::device
