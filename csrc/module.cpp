// The module fastpeft._C: what this build holds, and what is called without the dispatcher. Importing it loads the
// shared library, and with it the operators that csrc/cpu and csrc/cuda register.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/version.h>

#include <cstring>

#include "cpu/isa.h"
#include "cpu/layer_calls.h"

namespace {

std::vector<std::string> names(bool supported_only) {
  std::vector<std::string> result;
  for (fastpeft::Isa isa : fastpeft::compiled_isas()) {
    if (!supported_only || fastpeft::isa_supported(isa)) result.emplace_back(fastpeft::isa_name(isa));
  }
  return result;
}

std::string target_version() {
  return std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of fastpeft holds. The operators are in torch.ops.fastpeft.";
  m.def(
      "same_bytes",
      [](intptr_t a, intptr_t b, size_t bytes) {
        return memcmp(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), bytes) == 0;
      },
      "Whether two stretches of memory, given by their addresses, hold the same.");
  fastpeft::bind_layer_calls(m);
  m.attr("isa") = fastpeft::isa_name(fastpeft::active_isa());
  m.attr("compiled_isas") = names(false);
  m.attr("supported_isas") = names(true);
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target_version") = target_version();
#ifdef FASTPEFT_CUDA
  m.attr("cuda") = FASTPEFT_CUDA;  // the architectures
#else
  m.attr("cuda") = pybind11::none();
#endif
}
