// Rows of tokens as the loops see them: elements of a row side by side, `stride` elements from row to row.
#pragma once

#include <stdint.h>

namespace fastpeft {

struct Rows {
  const void* data;
  int64_t stride;
};

struct MutableRows {
  void* data;
  int64_t stride;
};

}  // namespace fastpeft
