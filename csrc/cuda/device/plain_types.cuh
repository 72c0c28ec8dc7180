// Plain types of the kernel bodies; NVRTC has no standard headers.
#pragma once

namespace dlm_fast::device {

using Index = long long;          // offsets: N * V passes 2^31
using Wide = unsigned long long;  // 64 bits
static_assert(sizeof(Index) == 8 && sizeof(Wide) == 8 && sizeof(int) == 4, "unexpected widths");

// Storage of 16-bit numbers; arithmetic is done in float.
struct BFloat16 {
  unsigned short bits;
};
struct Float16 {
  unsigned short bits;
};

}  // namespace dlm_fast::device
