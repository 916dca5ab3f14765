// Which instruction set the CPU loops use.
//
// Every csrc/cpu/*_loops.cpp is compiled once per instruction set with FASTPEFT_ISA set to its name, which is
// also the namespace of what the file defines. A loops file exports one constant table of function pointers and
// includes nothing that could emit a shared inline function: the linker keeps one copy of those, and a copy
// compiled for AVX-512 would crash an older processor.
#pragma once

#include <string>
#include <vector>

namespace fastpeft {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };  // each runs what those before it run

const char* isa_name(Isa isa);
std::vector<Isa> compiled_isas();
bool isa_supported(Isa isa);  // by this processor and by this build

// The widest supported instruction set, or the one that the environment variable FASTPEFT_ISA names. Chosen
// once; throws std::runtime_error where the variable names one that cannot run here.
Isa active_isa();

}  // namespace fastpeft

#if defined(__x86_64__)
#define FASTPEFT_FOR_EACH_ISA(apply) apply(baseline) apply(avx2) apply(avx512) apply(avx512_bf16)
#else
#define FASTPEFT_FOR_EACH_ISA(apply) apply(baseline)
#endif

// The loops table of the active instruction set: FASTPEFT_ACTIVE(lora).
#if defined(__x86_64__)
#define FASTPEFT_ACTIVE(table)                                                   \
  (::fastpeft::active_isa() == ::fastpeft::Isa::avx512_bf16 ? avx512_bf16::table \
   : ::fastpeft::active_isa() == ::fastpeft::Isa::avx512    ? avx512::table      \
   : ::fastpeft::active_isa() == ::fastpeft::Isa::avx2      ? avx2::table        \
                                                            : baseline::table)
#else
#define FASTPEFT_ACTIVE(table) (baseline::table)
#endif
