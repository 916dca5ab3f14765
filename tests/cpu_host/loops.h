// The loops of the instruction set that the program is built for.
#pragma once

#include "cpu/boft_cayley_loops.h"
#include "cpu/boft_loops.h"
#include "cpu/boft_many_loops.h"
#include "cpu/fourierft_loops.h"
#include "cpu/fourierft_many_loops.h"
#include "cpu/lora_loops.h"

namespace fastpeft::check {

struct Loops {
  const char* isa;
  const ButterflyLoops& butterfly;
  const ButterflyManyLoops& butterfly_many;
  const CayleyLoops& cayley;
  const FourierLoops& fourier;
  const FourierManyLoops& fourier_many;
  const LoraLoops& lora;
};

extern const Loops loops;

}  // namespace fastpeft::check
