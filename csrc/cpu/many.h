// Batches of many adapters on CPUs, on raw pointers: the plan of a batch, and work that is cut into tasks.
//
// The operators (low_rank_many.cpp, boft_many.cpp, fourierft_many.cpp) check tensors and do the work of one family.
// LayerCalls (layer_calls.cpp) does that of all families of a layer at once.
#pragma once

#include <stdint.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <vector>

#include "common/half.h"
#include "cpu/rows.h"

namespace fastpeft {

// Rows of one width, looked at before they are read.
struct Arena {
  const float* data;
  int64_t rows, width;

  const float* row(int64_t number, const char* name) const {
    STD_TORCH_CHECK(number >= 0 && number < rows, name, " must hold numbers in [0, ", rows, "), got ", number);
    return data + number * width;
  }
};

// Activations: rows at any distance, features side by side. Those that are read are not written to.
struct Matrix {
  void* data;
  int64_t stride;  // in elements
  Scalar scalar;

  int64_t element_size() const { return scalar == Scalar::float32 ? 4 : 2; }
  void* row(int64_t t) const { return static_cast<char*>(data) + t * stride * element_size(); }
};

// Rows of x that have one slot and lie at one distance from each other, so that the loops take them at once. How rows
// are cut into segments changes no sum: each row has its own, in an order that its adapter and the sizes decide.
struct Segment {
  int64_t slot;
  int64_t first, step, count;  // rows first, first + step, ...

  Rows of(const Matrix& x) const { return {x.row(first), step * x.stride}; }
  MutableRows into(const Matrix& y) const { return {y.row(first), step * y.stride}; }
};

// A plan as fastpeft/ops/many.py has it, and which rows a family has taken already.
struct Batch {
  const int32_t* rows;   // [tokens]
  const int32_t* slots;  // [tokens]
  std::vector<char>& named;

  // Segments of the slots below `slots_count` for which wanted(slot), as long as whole tiles and all threads allow.
  template <typename Wanted>
  std::vector<Segment> segments(int64_t slots_count, Wanted wanted) const {
    std::vector<Segment> segments;
    const int64_t tokens = int64_t(named.size());
    const int64_t tasks = 4 * torch::stable::get_num_threads();
    const int64_t most = (tokens + 4 * tasks - 1) / (4 * tasks) * 4;
    for (int64_t position = 0; position < tokens; ++position) {
      const int64_t row = rows[position], slot = slots[position];
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
    return segments;
  }
};

// What one family does to the rows of a batch, in tasks that write to different rows.
class Work {
 public:
  virtual ~Work() = default;
  virtual void run(int64_t task) const = 0;

  int64_t tasks = 0;
  int64_t size = 0;  // multiply-adds of a task, about
};

using Works = std::vector<std::unique_ptr<Work>>;

// All tasks, by as many threads as they are worth. Each begins with a share of its own, so that what a thread has had
// in its cache comes back to it, and whoever is done helps the others: what a row gets does not depend on who computes.
inline void run_all(const Works& works) {
  constexpr int64_t kThreadSize = 1 << 14;
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  int64_t tasks = 0, size = 0;
  for (const auto& work : works) {
    tasks += work->tasks;
    size += work->tasks * work->size;
  }
  const int64_t threads = std::min<int64_t>({tasks, torch::stable::get_num_threads(), 1 + size / kThreadSize});
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = tasks * i / threads;
    shares[i].end = tasks * (i + 1) / threads;
  }
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first that failed: none may leave a thread of the pool
  const auto run = [&](int64_t thread, int64_t) {
    try {
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(thread + i) % threads];
        for (int64_t task = share.next++; task < share.end; task = share.next++) {
          const std::unique_ptr<Work>* work = works.data();
          while (task >= (*work)->tasks) task -= (*work++)->tasks;
          (*work)->run(task);
        }
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, run);
  } else if (threads == 1) {
    run(0, 1);
  }
  if (error) std::rethrow_exception(error);
}

// The tables of a family for one layer; see the operators' docstrings.

struct LowRankTables {
  Arena a, b;
  const int32_t *index_a, *index_b;  // [slots, r_max, per_row]
  const int32_t* rank;               // [slots]
  const float* scaling;              // [slots]
  int64_t slots, r_max, per_row;
};

struct RotationTables {
  Arena reflectors;    // rows as fastpeft/ops/boft_many.py has them
  const int32_t* row;  // [slots]
  int64_t slots, factors, block;
};

struct ScaleTables {
  Arena scale;         // rows of [out]
  const int32_t* row;  // [slots]
  int64_t slots;
};

struct FourierTables {
  Arena spectrum;         // rows of [n]
  const int32_t* row;     // [slots]
  const int32_t* places;  // [kinds, 2, n]
  const int32_t* place;   // [slots]
  const float* scaling;   // [slots]
  int64_t slots, kinds;
};

// y += s B A x
std::unique_ptr<Work> low_rank_work(const LowRankTables& tables, const Batch& batch, const Matrix& x, const Matrix& y);
// z = x R
std::unique_ptr<Work> rotation_work(const RotationTables& tables, const Batch& batch, const Matrix& x, const Matrix& z,
                                    int64_t features);
// z = x, for rows that nobody has taken
std::unique_ptr<Work> copy_work(const std::vector<char>& named, const Matrix& x, const Matrix& z, int64_t features);
// y = (y - bias) s + bias; bias may be null.
std::unique_ptr<Work> scale_work(const ScaleTables& tables, const Batch& batch, const void* bias, const Matrix& y);
// y += the delta of FourierFT
std::unique_ptr<Work> fourier_work(const FourierTables& tables, const Batch& batch, const Matrix& x, const Matrix& y,
                                   int64_t in_features, int64_t out_features);

}  // namespace fastpeft
