// What the operators for batches of many adapters share on CPU tensors: the plan of a batch, and checks of its tables.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "cpu/tensor.h"

namespace fastpeft {

// Whoever calls the operators by name gets an error, not a crash. -1 stands for any size.
inline void check_table(const torch::stable::Tensor& table, const char* name, torch::headeronly::ScalarType type,
                        std::initializer_list<int64_t> sizes) {
  check_cpu(table, name);
  STD_TORCH_CHECK(table.scalar_type() == type, name, " must be ", type, ", got ", table.scalar_type());
  bool fits = table.dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes.begin()[i] == -1 || sizes.begin()[i] == table.size(int64_t(i));
  }
  STD_TORCH_CHECK(fits, name, " must have the sizes that the other tensors give it");
  STD_TORCH_CHECK(table.is_contiguous(), name, " must be contiguous");
}

inline void check_activation(const torch::stable::Tensor& x, const char* name, int64_t tokens) {
  check_cpu(x, name);
  scalar_of(x, name);
  STD_TORCH_CHECK(x.dim() == 2 && (tokens == -1 || x.size(0) == tokens), name, " must be a matrix with the rows of y");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, " must have its features side by side");
}

template <typename T>
inline const T* data_of(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Row `number` of an arena, looked at before it is read.
inline const float* arena_row(const torch::stable::Tensor& arena, int64_t number, const char* name) {
  STD_TORCH_CHECK(number >= 0 && number < arena.size(0), name, " must hold numbers in [0, ", arena.size(0), "), got ",
                  number);
  return data_of<float>(arena) + number * arena.size(1);
}

// Rows of x that have one slot and lie at one distance from each other, so that the loops take them at once. How rows
// are cut into segments changes no sum: each row has its own, in an order that its adapter and the sizes decide.
struct Segment {
  int64_t slot;
  int64_t first, step, count;  // rows first, first + step, ...

  Rows of(const torch::stable::Tensor& x, int64_t from = 0) const {
    return {rows_from(x, first + from * step).data, step * x.stride(0)};
  }
  MutableRows into(const torch::stable::Tensor& y, int64_t from = 0) const {
    return {rows_into(y, first + from * step).data, step * y.stride(0)};
  }
};

struct BatchPlan {
  std::vector<Segment> segments;
  std::vector<char> named;  // which rows belong to a segment

  // There are `slots_count` slots, of which wanted(slot) says whether it does anything. Segments are as long as whole
  // tiles and all threads allow.
  template <typename Wanted>
  BatchPlan(const torch::stable::Tensor& rows, const torch::stable::Tensor& slots, int64_t tokens, int64_t slots_count,
            Wanted wanted)
      : named(tokens, 0) {
    using torch::headeronly::ScalarType;
    check_table(rows, "rows", ScalarType::Int, {tokens});
    check_table(slots, "slots", ScalarType::Int, {tokens});
    const int64_t tasks = 4 * torch::stable::get_num_threads();
    const int64_t most = (tokens + 4 * tasks - 1) / (4 * tasks) * 4;
    const int32_t *row_numbers = data_of<int32_t>(rows), *slot_numbers = data_of<int32_t>(slots);
    for (int64_t position = 0; position < tokens; ++position) {
      const int64_t row = row_numbers[position], slot = slot_numbers[position];
      if (slot < 0 || slot >= slots_count || row < 0 || row >= tokens || !wanted(slot)) continue;
      STD_TORCH_CHECK(!named[row], "rows must name each row at most once, ", row, " is there twice");
      named[row] = 1;
      if (!segments.empty()) {
        Segment& last = segments.back();
        const bool fits = last.count == 1 || row == last.first + last.count * last.step;
        if (last.slot == slot && last.count < most && fits) {
          if (last.count == 1) last.step = row - last.first;
          ++last.count;
          continue;
        }
      }
      segments.push_back({slot, row, 0, 1});
    }
  }
};

// A task is worth handing to another thread from about this many multiply-adds on.
constexpr int64_t kManyGrainWork = 1 << 16;

inline int64_t grain_of(int64_t work_per_task) { return 1 + kManyGrainWork / std::max<int64_t>(work_per_task, 1); }

}  // namespace fastpeft
