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
#include <string>
#include <unordered_map>
#include <utility>

namespace cuda_host {

class Banks {
 public:
  explicit Banks(std::span<std::byte> shared) : first_(shared.data()), bytes_(shared.size()) { current = this; }
  ~Banks() { current = nullptr; }

  // The highest degree of each kind of instruction, such as "read16",
  std::map<std::string, unsigned> degrees() {
    finish_block();
    std::map<std::string, unsigned> result;
    for (const auto& [kind, degree] : by_kind_) {
      result[(kind.first ? "write" : "read") + std::to_string(kind.second)] = degree;
    }
    return result;
  }
  // and between two barriers each, zero where there is none.
  std::vector<unsigned> degrees_between_barriers() {
    finish_block();
    return by_barrier_;
  }

  __attribute__((no_sanitize("thread"))) void note(const void* address, size_t size, bool write, const void* code) {
    const size_t place = static_cast<size_t>(static_cast<const std::byte*>(address) - first_);
    if (place >= bytes_) return;
    Banks* const self = std::exchange(current, nullptr);
    if (blockIdx.x != block_) finish_block();
    const size_t thread = Block::current->thread();
    const unsigned barriers = Block::current->barriers();
    if (rounds_.size() <= thread) rounds_.resize(thread + 1);
    Rounds& rounds = rounds_[thread];
    if (rounds.barriers != barriers) rounds = {barriers, {}};
    const unsigned round = rounds.of_code[code]++;
    Lanes& lanes = instructions_[{code, static_cast<unsigned>(thread / kWarp), barriers, round, write, size}];
    lanes.there |= 1u << thread % kWarp;
    lanes.place[thread % kWarp] = place;
    current = self;
  }

  static inline Banks* current = nullptr;

 private:
  struct Instruction {
    const void* code;
    unsigned warp, barriers, round;
    bool write;
    size_t size;
    bool operator==(const Instruction&) const = default;
  };
  struct Hash {
    size_t operator()(const Instruction& of) const {
      size_t hash = reinterpret_cast<size_t>(of.code);
      for (size_t part : {of.warp, of.barriers, of.round}) hash = hash * 0x9e3779b97f4a7c15 + part;
      return hash;
    }
  };
  struct Lanes {
    unsigned there = 0;
    size_t place[kWarp];
  };
  struct Rounds {  // of a thread since its last barrier
    unsigned barriers = ~0u;
    std::unordered_map<const void*, unsigned> of_code;
  };

  static unsigned degree_of(const Lanes& lanes, size_t size) {
    unsigned worst = 0;
    const size_t pass = std::min(kWarp, kWarp * 4 / size);
    for (size_t begin = 0; begin < kWarp; begin += pass) {
      std::vector<size_t> wanted[32];  // words of each bank
      for (size_t lane = begin; lane < begin + pass; ++lane) {
        if (!(lanes.there >> lane & 1)) continue;
        for (size_t word = lanes.place[lane] / 4; word < (lanes.place[lane] + size + 3) / 4; ++word) {
          std::vector<size_t>& words = wanted[word % 32];
          if (std::ranges::find(words, word) == words.end()) words.push_back(word);
          worst = std::max(worst, static_cast<unsigned>(words.size()));
        }
      }
    }
    return worst;
  }

  void finish_block() {
    for (const auto& [instruction, lanes] : instructions_) {
      const unsigned degree = degree_of(lanes, instruction.size);
      unsigned& of_kind = by_kind_[{instruction.write, instruction.size}];
      of_kind = std::max(of_kind, degree);
      if (by_barrier_.size() <= instruction.barriers) by_barrier_.resize(instruction.barriers + 1);
      by_barrier_[instruction.barriers] = std::max(by_barrier_[instruction.barriers], degree);
    }
    instructions_.clear();
    rounds_.clear();
    block_ = blockIdx.x;
  }

  const std::byte* first_;
  size_t bytes_;
  unsigned block_ = 0;
  std::vector<Rounds> rounds_;  // of each thread
  std::unordered_map<Instruction, Lanes, Hash> instructions_;
  std::map<std::pair<bool, size_t>, unsigned> by_kind_;
  std::vector<unsigned> by_barrier_;
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
