// Memory of the head ops: aligned buffers of a call and small ones that a thread keeps.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dlm_fast::cpu {

// Not initialised; aligned to a cache line, which is a whole vector of every instruction set.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))),
        size_(count) {}
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
