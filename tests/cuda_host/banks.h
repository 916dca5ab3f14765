// Counts bank conflicts of what runs under cuda_runtime.h: a file that includes this one is compiled with
// -fsanitize=thread and linked without it, so that every load and store of the compiled code calls a function below.
//
// Shared memory has 32 banks of 4 bytes. One instruction of a warp is served in passes: the whole warp at 4 bytes each,
// half of it at 8 bytes, a quarter at 16. In a pass lanes that want the same word are served together, and a bank gives
// one word at a time: the degree of the instruction is how many different words of one bank a pass wants, at most. An
// instruction is known by its place in the compiled code and by how often a thread has been there since its last
// barrier. That is what a warp runs together as long as threads do not skip rounds of a loop that they come back to.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>

namespace cuda_host {

class Banks {
 public:
  explicit Banks(std::span<std::byte> shared) : first_(shared.data()), bytes_(shared.size()) { current = this; }
  ~Banks() { current = nullptr; }

  // The highest degree of each kind of instruction, such as "read16".
  std::map<std::string, unsigned> degrees() const {
    std::map<std::string, unsigned> result;
    for (const auto& [instruction, lanes] : instructions_) {
      const auto& [block, warp, barriers, code, count, write, size] = instruction;
      unsigned& worst = result[(write ? "write" : "read") + std::to_string(size)];
      const size_t pass = kWarp * 4 / size;
      for (size_t begin = 0; begin < kWarp; begin += pass) {
        std::map<size_t, std::set<size_t>> words;  // of each bank
        for (size_t lane = begin; lane < begin + pass; ++lane) {
          if (!lanes.contains(lane)) continue;
          for (size_t word = lanes.at(lane) / 4; word < (lanes.at(lane) + size) / 4; ++word) {
            words[word % 32].insert(word);
          }
        }
        for (const auto& [bank, wanted] : words) worst = std::max(worst, static_cast<unsigned>(wanted.size()));
      }
    }
    return result;
  }

  __attribute__((no_sanitize("thread"))) void note(const void* address, size_t size, bool write, const void* code) {
    const size_t place = static_cast<size_t>(static_cast<const std::byte*>(address) - first_);
    if (place >= bytes_) return;
    Banks* const self = std::exchange(current, nullptr);
    const size_t thread = Block::current->thread();
    const unsigned barriers = Block::current->barriers();
    const unsigned count = counts_[{blockIdx.x, thread, barriers, code}]++;
    instructions_[{blockIdx.x, thread / kWarp, barriers, code, count, write, size}][thread % kWarp] = place;
    current = self;
  }

  static inline Banks* current = nullptr;

 private:
  using Instruction = std::tuple<unsigned, size_t, unsigned, const void*, unsigned, bool, size_t>;
  const std::byte* first_;
  size_t bytes_;
  std::map<std::tuple<unsigned, size_t, unsigned, const void*>, unsigned> counts_;
  std::map<Instruction, std::map<size_t, size_t>> instructions_;  // from lane to byte
};

}  // namespace cuda_host

#define NOTE_ACCESS(name, bytes, write)                                                        \
  extern "C" __attribute__((no_sanitize("thread"))) void __tsan_##name##bytes(void* address) { \
    if (cuda_host::Banks::current) {                                                           \
      cuda_host::Banks::current->note(address, bytes, write, __builtin_return_address(0));     \
    }                                                                                          \
  }
NOTE_ACCESS(read, 1, false)
NOTE_ACCESS(read, 2, false)
NOTE_ACCESS(read, 4, false)
NOTE_ACCESS(read, 8, false)
NOTE_ACCESS(read, 16, false)
NOTE_ACCESS(write, 1, true)
NOTE_ACCESS(write, 2, true)
NOTE_ACCESS(write, 4, true)
NOTE_ACCESS(write, 8, true)
NOTE_ACCESS(write, 16, true)
#undef NOTE_ACCESS

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void*, size_t) {}
void __tsan_write_range(void*, size_t) {}
}
