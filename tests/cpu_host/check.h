// What the checks of the CPU loops share: memory that ends where the loops have to stop, numbers in float64 with a
// bound on what float32 can make of them, and the faults that prove that a mistake is seen.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "common/half.h"
#include "cpu/rows.h"

namespace fastpeft::check {

// A mistake made on purpose: the named buffer is one element shorter than it should be, or its last element but one is
// wrong (the last one of a matrix is on the diagonal, which the Cayley transform does not read).
struct Fault {
  std::string kind, buffer;
};
extern Fault fault;
extern std::set<std::string> possible_faults;  // "shorter <buffer>", "wrong <buffer>"
extern std::string now;                        // the call that is checked, for messages
extern std::map<std::string, double> worst;    // of each function: the largest error in float32, in units of its bound

[[noreturn]] void fail(const std::string& message);

// Whether the fault is wanted. Nobody sees one in a buffer without a name.
bool has_fault(const char* kind, const std::string& buffer);

constexpr double kUnit = 0x1p-24;  // what rounding to float32 changes at most, as a part of the number

constexpr Scalar kScalars[] = {Scalar::float32, Scalar::bfloat16, Scalar::float16};

const char* name_of(Scalar scalar);

// A number made of sums and products, and the sum of the sizes of all its terms: n roundings on the way of every term
// change the number by at most n kUnit size, to first order.
struct Terms {
  double value = 0.0, size = 0.0;

  Terms() = default;
  Terms(double number) : value(number), size(std::abs(number)) {}
  Terms(double number, double terms) : value(number), size(terms) {}
  Terms& operator+=(Terms b) { return *this = {value + b.value, size + b.size}; }
};
inline Terms operator*(Terms a, Terms b) { return {a.value * b.value, a.size * b.size}; }

struct Within {
  double value, bound;
  bool exact = false;  // not a bit may differ
};
inline Within rounded(Terms terms, int64_t roundings) { return {terms.value, double(roundings) * kUnit * terms.size}; }

double uniform();  // random, in [-1, 1)

// A copy of a table with not an element behind it.
template <typename T>
std::unique_ptr<T[]> exact(const std::string& name, const std::vector<T>& values) {
  const size_t count = values.size() - (!values.empty() && has_fault("shorter", name) ? 1 : 0);
  std::unique_ptr<T[]> copy(new T[count]);
  std::copy_n(values.begin(), count, copy.get());
  return copy;
}

// Rows of one dtype that end with the allocation. Between rows, where the stride leaves room, and in front of the first
// one AddressSanitizer allows nothing. All bits are ones at the start, a NaN in every format.
class Buffer {
 public:
  Buffer(const std::string& name, Scalar scalar, int64_t rows, int64_t columns, int64_t stride = 0,
         bool aligned = false);

  // Rows of tokens, apart from one another.
  static Buffer tokens(const std::string& name, Scalar scalar, int64_t tokens, int64_t features);
  static Buffer floats(const std::string& name, int64_t count) { return Buffer(name, Scalar::float32, 1, count); }
  static Buffer scratch(const std::string& name, int64_t count) {
    return Buffer(name, Scalar::float32, 1, count, 0, true);
  }

  void set(const std::function<double(int64_t row, int64_t column)>& value);
  void fill();  // with random numbers in [-1, 1)

  // What was set, whatever the loops made of it since.
  double operator()(int64_t row, int64_t column) const { return values_[size_t(row * columns_ + column)]; }
  double operator[](int64_t i) const { return values_[size_t(i)]; }

  void expect(const std::function<Within(int64_t row, int64_t column)>& want) const;

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data()); }
  int64_t stride() const { return stride_; }
  Rows rows(int64_t row = 0) const { return {at(row, 0), stride_}; }
  MutableRows mutable_rows(int64_t row = 0) const { return {at(row, 0), stride_}; }

  // The bits of all rows, without what is between them.
  std::string bits() const;

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };

  char* at(int64_t row, int64_t column) const { return data_ + (row * stride_ + column) * element_; }
  bool is_missing(int64_t row, int64_t column) const { return row * stride_ + column >= count_; }
  void write(int64_t row, int64_t column, float value);
  double read(int64_t row, int64_t column) const;

  std::string name_;
  Scalar scalar_;
  int64_t rows_, columns_, stride_, element_, count_;
  std::unique_ptr<char, Free> memory_;
  char* data_;
  std::vector<double> values_;
};

}  // namespace fastpeft::check
