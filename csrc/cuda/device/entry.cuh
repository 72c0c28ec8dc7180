// Positions in the order of a key, and their sort in shared memory by all threads of a block.
#pragma once

#include "cuda/device/numbers.cuh"

namespace dlm_fast::device {

// Ordered by key, ascending, then by position; so no two entries of a row are equal.
template <typename Score>
struct Entry;

// One integer: the key above, the position below. A float's bits are made to ascend with it.
template <>
struct Entry<float> {
  Wide packed;

  DLM_DEVICE static Entry of_word(unsigned word, unsigned position) {
    return {Wide{word} << 32 | position};
  }
  DLM_DEVICE static Entry of(float key, unsigned position) {
    const unsigned bits = key == 0 ? 0u : bits_of(key);  // -0 and 0 are equal
    return of_word(bits >> 31 ? ~bits : bits | 0x80000000u, position);
  }
  DLM_DEVICE static Entry last() {
    return {~Wide{0}};
  }
  DLM_DEVICE unsigned position() const {
    return static_cast<unsigned>(packed);
  }
  DLM_DEVICE bool before(const Entry& other) const {
    return packed < other.packed;
  }
};

template <>
struct Entry<double> {
  double key;
  unsigned place;

  DLM_DEVICE static Entry of_word(unsigned word, unsigned position) {
    return {static_cast<double>(word), position};
  }
  DLM_DEVICE static Entry of(double key, unsigned position) {
    return {key, position};
  }
  DLM_DEVICE static Entry last() {
    return {infinity(), ~0u};
  }
  DLM_DEVICE unsigned position() const {
    return place;
  }
  DLM_DEVICE bool before(const Entry& other) const {
    return key == other.key ? place < other.place : key < other.key;
  }
};

// Bitonic sort of `count` entries, a power of two. What was written before need not have been
// waited for; afterwards all threads see the order.
template <typename Score>
DLM_DEVICE void sort_entries(Entry<Score>* entries, unsigned count) {
  for (unsigned size = 2; size <= count; size *= 2) {
    for (unsigned stride = size / 2; stride > 0; stride /= 2) {
      sync_block();
      for (unsigned pair = thread_index(); pair < count / 2; pair += thread_count()) {
        const unsigned low = 2 * pair - (pair & (stride - 1));
        const Entry<Score> left = entries[low], right = entries[low + stride];
        const bool ascending = (low & size) == 0;
        if (right.before(left) == ascending) {
          entries[low] = right;
          entries[low + stride] = left;
        }
      }
    }
  }
  sync_block();
}

}  // namespace dlm_fast::device
