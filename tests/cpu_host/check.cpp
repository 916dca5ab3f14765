#include "check.h"

#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

namespace fastpeft::check {

Fault fault;
std::set<std::string> possible_faults;
std::string now;
std::map<std::string, double> worst;

void fail(const std::string& message) {
  std::fprintf(stderr, "mistake: %s: %s\n", now.c_str(), message.c_str());
  std::exit(1);
}

bool has_fault(const char* kind, const std::string& buffer) {
  if (buffer.empty()) return false;
  possible_faults.insert(std::string(kind) + " " + buffer);
  return fault.kind == kind && fault.buffer == buffer;
}

const char* name_of(Scalar scalar) {
  return scalar == Scalar::float32 ? "float32" : scalar == Scalar::bfloat16 ? "bfloat16" : "float16";
}

double uniform() {
  static std::mt19937 generator;
  return double(int32_t(generator())) * 0x1p-31;
}

namespace {

// What storing `value` changes at most; float32 results are counted with the arithmetic.
double store_error(Scalar scalar, double value) {
  return scalar == Scalar::float32    ? 0.0
         : scalar == Scalar::bfloat16 ? 0x1p-8 * std::abs(value)
                                      : std::max(0x1p-11 * std::abs(value), 0x1p-25);
}

}  // namespace

Buffer::Buffer(const std::string& name, Scalar scalar, int64_t rows, int64_t columns, int64_t stride, bool aligned)
    : name_(name.empty() || scalar == Scalar::float32 ? name : name + "." + name_of(scalar)),
      scalar_(scalar),
      rows_(rows),
      columns_(columns),
      stride_(stride ? stride : columns),
      element_(scalar == Scalar::float32 ? 4 : 2),
      count_(rows && columns ? (rows - 1) * stride_ + columns : 0) {
  if (count_ && has_fault("shorter", name_)) --count_;
  const size_t front = aligned ? 0 : 8;  // no vector is aligned behind it
  memory_.reset(static_cast<char*>(::operator new(front + size_t(count_ * element_), std::align_val_t(64))));
  data_ = memory_.get() + front;
  std::memset(data_, 0xff, size_t(count_ * element_));
  ASAN_POISON_MEMORY_REGION(memory_.get(), front);
  for (int64_t row = 1; row < rows; ++row) {
    ASAN_POISON_MEMORY_REGION(at(row - 1, columns), size_t((stride_ - columns) * element_));
  }
}

Buffer Buffer::tokens(const std::string& name, Scalar scalar, int64_t tokens, int64_t features) {
  constexpr int64_t kGap = 5;  // of at least 8 bytes, so that the first of them can be poisoned wherever the row ends
  return Buffer(name, scalar, tokens, features, features + kGap);
}

void Buffer::set(const std::function<double(int64_t, int64_t)>& value) {
  for (int64_t row = 0; row < rows_; ++row) {
    for (int64_t column = 0; column < columns_; ++column) write(row, column, float(value(row, column)));
  }
  values_.clear();
  for (int64_t row = 0; row < rows_; ++row) {
    for (int64_t column = 0; column < columns_; ++column) values_.push_back(read(row, column));
  }
  if (!values_.empty() && has_fault("wrong", name_)) {
    const int64_t row = rows_ - 1, column = std::max<int64_t>(columns_ - 2, 0);
    write(row, column, float((*this)(row, column) + 1.0));
  }
}

void Buffer::fill() {
  set([](int64_t, int64_t) { return uniform(); });
}

void Buffer::expect(const std::function<Within(int64_t, int64_t)>& want) const {
  double& largest = worst[now.substr(0, now.find(' '))];
  for (int64_t row = 0; row < rows_; ++row) {
    for (int64_t column = 0; column < columns_; ++column) {
      const Within wanted = want(row, column);
      const double got = read(row, column), error = std::abs(got - wanted.value);
      const double stored = store_error(scalar_, std::abs(wanted.value) + wanted.bound);
      const double bound = wanted.exact ? 0.0 : wanted.bound + stored;
      if (!(error <= bound)) {
        char text[200];
        std::snprintf(text, sizeof(text), "%s[%lld, %lld] is %.9g, wanted %.9g to within %.3g", name_.c_str(),
                      static_cast<long long>(row), static_cast<long long>(column), got, wanted.value, bound);
        fail(text);
      }
      if (scalar_ == Scalar::float32 && bound > 0.0) largest = std::max(largest, error / bound);
    }
  }
}

std::string Buffer::bits() const {
  std::string result;
  for (int64_t row = 0; row < rows_; ++row) result.append(at(row, 0), size_t(columns_ * element_));
  return result;
}

void Buffer::write(int64_t row, int64_t column, float value) {
  if (is_missing(row, column)) return;
  const BFloat16 bfloat16 = from_float<BFloat16>(value);
  const Float16 float16 = from_float<Float16>(value);
  const void* from = scalar_ == Scalar::float32    ? static_cast<const void*>(&value)
                     : scalar_ == Scalar::bfloat16 ? static_cast<const void*>(&bfloat16)
                                                   : static_cast<const void*>(&float16);
  std::memcpy(at(row, column), from, size_t(element_));
}

double Buffer::read(int64_t row, int64_t column) const {
  if (is_missing(row, column)) return std::numeric_limits<double>::quiet_NaN();
  float float32;
  BFloat16 bfloat16;
  Float16 float16;
  void* to = scalar_ == Scalar::float32    ? static_cast<void*>(&float32)
             : scalar_ == Scalar::bfloat16 ? static_cast<void*>(&bfloat16)
                                           : static_cast<void*>(&float16);
  std::memcpy(to, at(row, column), size_t(element_));
  return scalar_ == Scalar::float32 ? float32 : scalar_ == Scalar::bfloat16 ? to_float(bfloat16) : to_float(float16);
}

}  // namespace fastpeft::check
