// Checks the CPU loops of one instruction set against plain loops in float64. tests/test_cpu_loops.py builds it with
// AddressSanitizer and UndefinedBehaviorSanitizer and calls it:
//
//   run_loops                 checks everything; prints the largest errors, then every fault that can be planted
//   run_loops kind buffer     plants one of them: kind is "shorter" or "wrong"
//
// The buffers have exactly the documented sizes. A mistake ends the program with a line that names the call.
#include <cstdio>

#include "check.h"
#include "checks.h"
#include "cpu/scratch.h"
#include "loops.h"

namespace fastpeft::check {
namespace {

// What a thread holds stays its own while it takes and gives back more, in any order of sizes.
void check_scratch() {
  now = "scratch";
  for (const int64_t outer : {int64_t(0), int64_t(1), int64_t(1000), int64_t(3) << 20, int64_t(17)}) {
    Scratch held(outer);
    std::fill_n(held.data(), outer, 1.0f);
    for (const int64_t inner : {int64_t(5), int64_t(5000), int64_t(3) << 20, int64_t(1)}) {
      Scratch other(inner);
      std::fill_n(other.data(), inner, 2.0f);
      Scratch third(inner / 2);
      std::fill_n(third.data(), inner / 2, 3.0f);
      if (reinterpret_cast<uintptr_t>(other.data()) % 64 || reinterpret_cast<uintptr_t>(third.data()) % 64) {
        fail("memory that is not aligned");
      }
      if (std::count(other.data(), other.data() + inner, 2.0f) != inner) fail("memory that two hold");
    }
    if (std::count(held.data(), held.data() + outer, 1.0f) != outer) fail("memory that two hold");
  }
}

void run(const std::string& only) {
  const std::pair<const char*, void (*)()> checks[] = {
      {"butterfly", check_butterfly}, {"butterfly_many", check_butterfly_many},
      {"scale", check_scale},         {"cayley", check_cayley},
      {"fourier", check_fourier},     {"fourier_many", check_fourier_many},
      {"lora", check_lora},           {"scratch", check_scratch},
  };
  for (const auto& [name, check] : checks) {
    if (only.empty() || only == name) check();
  }
}

}  // namespace
}  // namespace fastpeft::check

int main(int argc, char** argv) {
  using namespace fastpeft::check;
  if (argc != 1 && argc != 3) return 2;
  if (argc == 3) fault = {argv[1], argv[2]};
  run(fault.buffer.substr(0, fault.buffer.find('.')));
  for (const auto& [function, error] : worst) {
    std::printf("%s %s: at most %.3f of the bound\n", loops.isa, function.c_str(), error);
  }
  for (const std::string& possible : possible_faults) std::printf("fault %s\n", possible.c_str());
}
