// Memory of the head ops: aligned buffers of a call and small ones that a thread keeps.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <memory>
#include <new>

namespace dlm_fast::cpu {

// Asks for pages of 2 MiB where memory is about to be written for the first time: a system that
// hands out 4 KiB at a time spends more on a fresh gradient of the head than its product costs.
inline void prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Advice only: whatever comes back, the memory is as it was.
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Not initialised; aligned to a cache line, which is a whole vector of every instruction set.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))),
        size_(count) {
    prefer_large_pages(data(), count * static_cast<int64_t>(sizeof(T)));
  }
  T* data() const {
    return data_.get();
  }
  int64_t size() const {
    return size_;
  }
  // At least `count` elements; contents are lost when it grows.
  T* grow(int64_t count) {
    if (count > size_) *this = Buffer(count);
    return data();
  }

 private:
  struct Release {
    void operator()(T* data) const {
      ::operator delete(data, std::align_val_t{64});
    }
  };
  std::unique_ptr<T, Release> data_;
  int64_t size_ = 0;
};

// A block of logits and one of weights, well below a megabyte: kept from call to call, because
// fresh pages cost more than the work of a small call.
template <typename T>
T* thread_scratch(int64_t count) {
  static thread_local Buffer<T> buffer;
  return buffer.grow(count);
}

}  // namespace dlm_fast::cpu
