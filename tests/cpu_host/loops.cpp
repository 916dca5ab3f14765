// Compiled with FASTPEFT_ISA, like the loops, but without the flags of the instruction set.
#include "loops.h"

namespace fastpeft::check {

#define FASTPEFT_QUOTE(name) #name
#define FASTPEFT_NAME(name) FASTPEFT_QUOTE(name)
const Loops loops = {FASTPEFT_NAME(FASTPEFT_ISA), FASTPEFT_ISA::butterfly, FASTPEFT_ISA::butterfly_many,
                     FASTPEFT_ISA::cayley,        FASTPEFT_ISA::fourier,   FASTPEFT_ISA::fourier_many,
                     FASTPEFT_ISA::lora};

}  // namespace fastpeft::check
