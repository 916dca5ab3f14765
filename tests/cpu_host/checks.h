// Each calls the functions of one kind of loops with awkward sizes, and ends the program on a mistake.
#pragma once

namespace fastpeft::check {

void check_butterfly();
void check_butterfly_many();
void check_scale();
void check_cayley();
void check_fourier();
void check_fourier_many();
void check_lora();

}  // namespace fastpeft::check
