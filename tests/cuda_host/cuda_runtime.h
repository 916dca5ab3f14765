// A CUDA for the CPU: as much of <cuda_runtime.h> as the kernels in csrc/cuda use, found before CUDA's own by include
// path, so that their source runs unchanged under g++ and its sanitizers. For tests; nothing here is fast.
//
// The threads of a block are fibers. One runs until it reaches a barrier, so in a race-free kernel the order in which
// they are resumed changes nothing, and in another one it does: of two threads that meet in shared memory without a
// barrier between them, the ascending and the descending order each let another one win. Shared memory, static and
// dynamic, holds NaN when a block starts, and is out of bounds beyond what was asked for: AddressSanitizer sees it of
// dynamic memory, UndefinedBehaviorSanitizer of static arrays. Shuffles and votes are of whole warps.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local  // extern or local: there is one thread, and nothing else is its own
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Loads and stores through these may alias any type, as they may in CUDA; their alignment is UBSan's to check.
struct __attribute__((may_alias, aligned(8))) float2 {
  float x, y;
};
struct __attribute__((may_alias, aligned(16))) float4 {
  float x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::min;

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_host {

constexpr size_t kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  enum State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };
  State state = kReady;
  std::source_location where;  // the barrier it waits at
  unsigned barriers = 0;       // that it has come to
  uint3 thread;
  char* stack;
  bool entered = false;
  void* place[5];  // where it waits, see `change`
};

// From here to another place on another stack. swapcontext would do, but it asks the kernel for signal masks, and under
// AddressSanitizer each time clears what that knows of a whole stack: both together were nine tenths of all time.
[[noreturn, gnu::noinline, gnu::no_sanitize("address")]] inline void leave(void** place) {
  __builtin_longjmp(place, 1);
}
[[gnu::noinline, gnu::no_sanitize("address")]] inline void change(void** from, void** to) {
  if (!__builtin_setjmp(from)) leave(to);
}
[[gnu::noinline, gnu::no_sanitize("address")]] inline void change(void** from, const ucontext_t& to) {
  if (!__builtin_setjmp(from)) setcontext(&to);
}

[[noreturn]] inline void fail(const char* what, const Fiber& one, const Fiber& other) {
  std::fprintf(stderr, "cuda_host: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z);
  for (const Fiber* fiber : {&one, &other}) {
    std::fprintf(stderr, "  thread (%u, %u, %u) waits at line %u of %s\n", fiber->thread.x, fiber->thread.y,
                 fiber->thread.z, static_cast<unsigned>(fiber->where.line()), fiber->where.file_name());
  }
  std::abort();
}

inline void check_whole_warp(unsigned mask) {
  if (mask == ~0u) return;
  std::fprintf(stderr, "cuda_host: a shuffle or a vote of a part of a warp, mask %x\n", mask);
  std::abort();
}

// Of the program's thread: all that is declared __shared__.
inline std::span<std::byte> all_shared_memory() {
  std::span<std::byte> found;
  dl_iterate_phdr(  // the program comes first
      [](dl_phdr_info* info, size_t, void* result) {
        for (const auto& header : std::span(info->dlpi_phdr, info->dlpi_phnum)) {
          if (header.p_type != PT_TLS) continue;
          *static_cast<std::span<std::byte>*>(result) = {static_cast<std::byte*>(info->dlpi_tls_data), header.p_memsz};
        }
        return 1;
      },
      &found);
  return found;
}

// Runs the fibers of one block at a time, on stacks that stay from one launch to the next.
class Block {
 public:
  Block(unsigned threads, std::function<void()> kernel, unsigned seed)
      : kernel_(std::move(kernel)), fibers_(threads), handed_in_(threads), order_(threads), seed_(seed), random_(seed) {
    std::iota(order_.begin(), order_.end(), size_t{0});
    if (seed == 1) std::reverse(order_.begin(), order_.end());
    while (stacks_.size() < threads) stacks_.emplace_back(new char[kStackBytes]);
    for (size_t i = 0; i < threads; ++i) {
      fibers_[i].stack = stacks_[i].get();
      ASAN_UNPOISON_MEMORY_REGION(fibers_[i].stack, kStackBytes);  // the last launch's fiber never left it
    }
  }

  void run() {
    for (size_t i = 0; i < fibers_.size(); ++i) start(i);
    for (;;) {
      if (seed_ > 1) std::shuffle(order_.begin(), order_.end(), random_);
      for (size_t i : order_) {
        if (fibers_[i].state == Fiber::kReady) resume(fibers_[i]);
      }
      if (std::ranges::all_of(fibers_, [](const Fiber& fiber) { return fiber.state == Fiber::kDone; })) return;
      bool released = release(Fiber::kAtBlockBarrier, fibers_);
      for (size_t first = 0; first < fibers_.size(); first += kWarp) {
        const size_t size = std::min(kWarp, fibers_.size() - first);
        released |= release(Fiber::kAtWarpBarrier, std::span(fibers_).subspan(first, size));
      }
      if (!released) fail_deadlocked();
    }
  }

  // Called by the running fiber.
  void wait(Fiber::State state, std::source_location where) {
    running_->state = state;
    running_->where = where;
    ++running_->barriers;
    switch_to(running_->place, scheduler_, scheduler_stack_, scheduler_stack_bytes_);
  }

  // What `take` makes of the values that all lanes of the running fiber's warp hand in; all meet here.
  template <typename T, typename F>
  auto exchange(T value, F take, std::source_location where) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const size_t self = thread(), first = self / kWarp * kWarp;
    std::memcpy(&handed_in_[self], &value, sizeof(T));
    wait(Fiber::kAtWarpBarrier, where);
    const auto result = take([&](size_t lane) {
      if (first + lane >= fibers_.size() || fibers_[first + lane].state == Fiber::kDone) {
        fail("a shuffle or a vote asks a thread that is not there", *running_, *running_);
      }
      std::memcpy(&value, &handed_in_[first + lane], sizeof(T));
      return value;
    });
    wait(Fiber::kAtWarpBarrier, where);  // read by all before the next value is handed in
    return result;
  }
  // Whether any thread that has not ended says yes; all of these meet here.
  bool any(bool yes, std::source_location where) {
    handed_in_[thread()] = yes;
    wait(Fiber::kAtBlockBarrier, where);
    bool result = false;
    for (size_t i = 0; i < fibers_.size(); ++i) result |= fibers_[i].state != Fiber::kDone && handed_in_[i];
    wait(Fiber::kAtBlockBarrier, where);  // as above
    return result;
  }
  size_t lane() const { return thread() % kWarp; }
  size_t thread() const { return index_of(*running_); }
  unsigned barriers() const { return running_->barriers; }

  static inline Block* current = nullptr;

 private:
  size_t index_of(const Fiber& fiber) const { return static_cast<size_t>(&fiber - fibers_.data()); }

  void start(size_t i) {
    Fiber& fiber = fibers_[i];
    const unsigned t = static_cast<unsigned>(i);
    fiber.thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    fiber.state = Fiber::kReady;
    fiber.barriers = 0;
  }

  // Of every fiber, which runs the kernel once for each block.
  static void enter() {
    Block& block = *current;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack_, &block.scheduler_stack_bytes_);
#endif
    for (;;) {
      block.kernel_();
      block.wait(Fiber::kDone, {});
    }
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    threadIdx = fiber.thread;
    if (fiber.entered) {
      switch_to(scheduler_, fiber.place, fiber.stack, kStackBytes);
      return;
    }
    fiber.entered = true;
    ucontext_t beginning;
    getcontext(&beginning);
    beginning.uc_stack.ss_sp = fiber.stack;
    beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&beginning, &Block::enter, 0);
    switch_to(scheduler_, beginning, fiber.stack, kStackBytes);
  }

  // AddressSanitizer is told of every change of stack.
  template <typename Place>
  void switch_to(void** from, Place&& to, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack, bytes);
#endif
    change(from, to);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // Opens a barrier that every fiber of the scope waits at; those that have ended need not come.
  static bool release(Fiber::State barrier, std::span<Fiber> scope) {
    Fiber* first = nullptr;
    for (Fiber& fiber : scope) {
      if (fiber.state == Fiber::kDone) continue;
      if (fiber.state != barrier) return false;
      if (!first) first = &fiber;
      if (fiber.where.line() != first->where.line()) fail("threads meet at different barriers", *first, fiber);
    }
    for (Fiber& fiber : scope) {
      if (fiber.state == barrier) fiber.state = Fiber::kReady;
    }
    return first != nullptr;
  }

  [[noreturn]] void fail_deadlocked() {
    const Fiber* one = nullptr;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == Fiber::kDone) continue;
      if (one && one->state != fiber.state) fail("deadlock", *one, fiber);
      if (!one) one = &fiber;
    }
    std::abort();  // not reached: fibers that all wait at one kind of barrier are released
  }

  static inline std::vector<std::unique_ptr<char[]>> stacks_;

  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;
  std::vector<uint64_t> handed_in_;  // by each fiber, to a shuffle or a vote
  std::vector<size_t> order_;
  unsigned seed_;
  std::mt19937 random_;
  Fiber* running_ = nullptr;
  void* scheduler_[5];  // where it waits
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// Calls kernel() once for every thread of the grid. `shared` is all the dynamic shared memory there is: the array that
// the kernel declares `extern __shared__`, defined by the test. Threads are resumed in ascending order for seed 0, in
// descending order for seed 1, and in an order drawn anew after every barrier for any other.
inline void launch(dim3 grid, dim3 block, std::span<std::byte> shared, size_t shared_bytes, unsigned seed,
                   const std::function<void()>& kernel) {
  if (shared_bytes > shared.size() || block.x * block.y * block.z > 1024) {
    std::fprintf(stderr, "cuda_host: a launch with %zu bytes of shared memory and %u threads\n", shared_bytes,
                 block.x * block.y * block.z);
    std::abort();
  }
  gridDim = grid, blockDim = block;
  Block fibers(block.x * block.y * block.z, kernel, seed);
  Block::current = &fibers;
  const std::span<std::byte> all = all_shared_memory();
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        std::memset(all.data(), 0xff, all.size());  // all ones are a NaN in every floating-point format
        ASAN_POISON_MEMORY_REGION(shared.data() + shared_bytes, shared.size() - shared_bytes);
        fibers.run();
        ASAN_UNPOISON_MEMORY_REGION(shared.data() + shared_bytes, shared.size() - shared_bytes);
      }
    }
  }
}

// The value of another lane.
template <typename T>
T shuffle(unsigned mask, T value, size_t lane, std::source_location where) {
  check_whole_warp(mask);
  return Block::current->exchange(value, [&](auto of_lane) { return of_lane(lane); }, where);
}

}  // namespace cuda_host

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_host::Block::current->wait(cuda_host::Fiber::kAtBlockBarrier, where);
}
inline int __syncthreads_or(int yes, std::source_location where = std::source_location::current()) {
  return cuda_host::Block::current->any(yes != 0, where);
}
inline void __syncwarp(std::source_location where = std::source_location::current()) {
  cuda_host::Block::current->wait(cuda_host::Fiber::kAtWarpBarrier, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, std::source_location where = std::source_location::current()) {
  return cuda_host::shuffle(mask, value, cuda_host::Block::current->lane() ^ static_cast<size_t>(lane_mask), where);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, std::source_location where = std::source_location::current()) {
  return cuda_host::shuffle(mask, value, static_cast<size_t>(lane) % cuda_host::kWarp, where);
}
// A lane without a partner keeps what it has.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   std::source_location where = std::source_location::current()) {
  const size_t lane = cuda_host::Block::current->lane(), from = lane + delta;
  return cuda_host::shuffle(mask, value, from < cuda_host::kWarp ? from : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int vote, std::source_location where = std::source_location::current()) {
  cuda_host::check_whole_warp(mask);
  const auto count = [](auto vote_of) {
    unsigned votes = 0;
    for (size_t lane = 0; lane < cuda_host::kWarp; ++lane) votes |= (vote_of(lane) ? 1u : 0u) << lane;
    return votes;
  };
  return cuda_host::Block::current->exchange(vote, count, where);
}
inline int __any_sync(unsigned mask, int vote, std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, vote, where) == ~0u;
}

// Between two barriers one thread runs at a time. Sums of floats depend on the order of the threads, as they do on a
// GPU.
template <typename T>
  requires std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, float> || std::same_as<T, double>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address + value);
}
template <typename T>
  requires std::same_as<T, int> || std::same_as<T, unsigned>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}
