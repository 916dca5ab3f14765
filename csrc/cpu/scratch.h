// Memory that a thread works in. Fresh pages cost more than the work on them, so each thread keeps what it last had.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <new>

namespace fastpeft {

class Scratch {
 public:
  // 64-byte aligned floats with any content, this thread's until the object dies. Throws std::bad_alloc.
  explicit Scratch(int64_t floats) : size_(floats) {
    Kept& kept = kept_here();
    if (kept.size >= floats) {
      size_ = kept.size;
      data_ = std::move(kept.data);
      kept.size = 0;
    } else {
      data_.reset(new (std::align_val_t(64)) float[floats]);
    }
  }
  ~Scratch() {
    Kept& kept = kept_here();
    if (size_ <= kKeptFloats && size_ > kept.size) {
      kept.data = std::move(data_);
      kept.size = size_;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { ::operator delete[](data, std::align_val_t(64)); }
  };
  using Memory = std::unique_ptr<float[], Free>;
  struct Kept {
    Memory data;
    int64_t size = 0;
  };
  static constexpr int64_t kKeptFloats = 2 << 20;  // 8 MiB for each thread

  static Kept& kept_here() {
    static thread_local Kept kept;
    return kept;
  }

  Memory data_;
  int64_t size_;
};

}  // namespace fastpeft
