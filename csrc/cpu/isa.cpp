#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace fastpeft {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

std::vector<Isa> compiled_isas() {
#define FASTPEFT_LIST(name) Isa::name,
  return {FASTPEFT_FOR_EACH_ISA(FASTPEFT_LIST)};
#undef FASTPEFT_LIST
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    case Isa::avx512_bf16:
      return isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

namespace {

Isa choose_isa() {
  const char* forced = std::getenv("FASTPEFT_ISA");
  Isa widest = Isa::baseline;
  std::string known;
  for (Isa isa : compiled_isas()) {
    if (forced != nullptr && forced == std::string(isa_name(isa))) {
      if (isa_supported(isa)) return isa;
      throw std::runtime_error(std::string("FASTPEFT_ISA=") + forced + ": this processor cannot run it");
    }
    if (isa_supported(isa)) widest = isa;
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  if (forced != nullptr && *forced != '\0') {
    throw std::runtime_error(std::string("FASTPEFT_ISA=") + forced + ": expected one of " + known);
  }
  return widest;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace fastpeft
