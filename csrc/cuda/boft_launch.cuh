// What the launches of BOFT's kernels have in common: kernels for some block sizes, and groups of rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastpeft {

// Block sizes that have kernels of their own; 0 names those for any other.
inline int boft_kernel_size(int64_t b) {
  return b == 2 || b == 4 || b == 8 || b == 16 || b == 32 ? static_cast<int>(b) : 0;
}

// Calls f with the kernel size as a template argument.
template <typename F>
void with_boft_kernel_size(int kernel_size, F&& f) {
  switch (kernel_size) {
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    case 8:
      return f.template operator()<8>();
    case 16:
      return f.template operator()<16>();
    case 32:
      return f.template operator()<32>();
    default:
      return f.template operator()<0>();
  }
}

struct RowGroups {
  int64_t tiles;   // of a group, but for the last one
  int64_t groups;  // at least one if there is a tile
};

// Tiles of rows in up to `most_groups` groups of as many each. Where each group writes a part of a sum there had better
// be no more than fill the GPU once, so that how sums are rounded depends on the number of multiprocessors, though not
// on anything else. A number that the shape alone gives would cost time: of 264 thread blocks, right for an H200, an
// A100 runs 216 at once and then 48 by themselves; with groups so short that this is evened out, of 64 rows, parts for
// (8, 4) are two thirds of the other traffic.
inline RowGroups split_rows(int64_t row_tiles, int64_t most_groups) {
  const int64_t wanted = most_groups < 1 ? 1 : most_groups < row_tiles ? most_groups : row_tiles;
  const int64_t tiles = (row_tiles + wanted - 1) / wanted;
  return {tiles, (row_tiles + tiles - 1) / tiles};
}

}  // namespace fastpeft
