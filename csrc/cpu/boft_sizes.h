// Block sizes that have code of their own. Part of the loops that include it.
#pragma once

#include <stdint.h>

namespace fastpeft::FASTPEFT_ISA {
namespace {

// Calls call with the block size as a template argument, or with 0 where it is known only at run time.
template <typename Call>
inline void with_block_size(int64_t block, Call call) {
  switch (block) {
    case 2:
      return call.template operator()<2>();
    case 4:
      return call.template operator()<4>();
    case 8:
      return call.template operator()<8>();
    case 16:
      return call.template operator()<16>();
    case 32:
      return call.template operator()<32>();
    default:
      return call.template operator()<0>();
  }
}

}  // namespace
}  // namespace fastpeft::FASTPEFT_ISA
