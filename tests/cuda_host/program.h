// What the programs that run kernels share: their options, tensors in files and in buffers that have no byte more, so
// that reading outside of them is seen.
#pragma once

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <type_traits>

#include "cuda/element.cuh"

namespace cuda_host {

[[noreturn]] inline void fail(const std::string& message) {
  std::cerr << message << "\n";
  std::exit(1);
}

// `bytes` of memory that end where the allocation ends and begin `offset` bytes behind a 16-byte boundary; all ones.
class Buffer {
 public:
  Buffer(size_t bytes, size_t offset) : memory_(new char[offset + bytes]), data_(memory_.get() + offset) {
    std::memset(memory_.get(), 0xff, offset + bytes);
  }
  template <typename T = char>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* data_;
};

// The first `bytes` of a file: what pads its last row is not part of a tensor.
inline std::string read_file(const std::string& path, size_t bytes) {
  std::string content(bytes, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(content.data(), static_cast<std::streamsize>(bytes))) fail("cannot read " + path);
  return content;
}

inline Buffer read_buffer(const std::string& path, size_t bytes, size_t offset = 0) {
  Buffer buffer(bytes, offset);
  std::memcpy(buffer.as(), read_file(path, bytes).data(), bytes);
  return buffer;
}

// A matrix whose rows of `row_bytes` begin `stride` bytes apart, with ones in between. Rows that are far apart are in
// memory that is only touched where there are rows.
class Matrix {
 public:
  Matrix(const std::string& rows, size_t row_bytes, size_t stride, size_t offset)
      : rows_(rows.size() / row_bytes),
        row_bytes_(row_bytes),
        stride_(stride),
        bytes_((rows_ - 1) * stride + row_bytes),
        near_(far() ? 0 : bytes_, offset),
        data_(near_.as()) {
    if (far()) {
      void* map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (map == MAP_FAILED) fail("no memory for rows so far apart");
      data_ = static_cast<char*>(map);
    }
    for (size_t row = 0; row < rows_; ++row) {
      std::memcpy(data_ + row * stride, rows.data() + row * row_bytes, row_bytes);
    }
  }
  ~Matrix() {
    if (far()) munmap(data_, bytes_);
  }
  Matrix(const Matrix&) = delete;
  char* data() const { return data_; }

  // The rows one after the other, after a look at what lies between them.
  std::string rows() const {
    std::string bits;
    for (size_t row = 0; row < rows_; ++row) {
      const char* const begin = data_ + row * stride_;
      bits.append(begin, row_bytes_);
      const size_t gap = row + 1 < rows_ && !far() && stride_ > row_bytes_ ? stride_ - row_bytes_ : 0;
      if (std::string(begin + row_bytes_, gap) != std::string(gap, '\xff')) fail("wrote between rows");
    }
    return bits;
  }

 private:
  bool far() const { return bytes_ > size_t{1} << 30; }
  size_t rows_, row_bytes_, stride_, bytes_;
  Buffer near_;
  char* data_;
};

inline void write_file(const std::string& path, const std::string& bits) {
  if (!std::ofstream(path, std::ios::binary).write(bits.data(), static_cast<std::streamsize>(bits.size()))) {
    fail("cannot write " + path);
  }
}

// Every seed must give the same bits: an order of threads that matters is a race.
inline void check_same(const std::string& bits, std::string& first, int64_t seed) {
  if (seed == 0) first = bits;
  if (bits != first) fail("the order of the threads changes the result, seed " + std::to_string(seed));
}

// Arguments of the form name=value.
class Options {
 public:
  Options(int argc, char** argv) {
    for (int i = 0; i < argc; ++i) {
      const std::string option = argv[i];
      const size_t middle = option.find('=');
      if (middle == std::string::npos) fail("no value in " + option);
      values_[option.substr(0, middle)] = option.substr(middle + 1);
    }
  }
  bool has(const std::string& name) const { return values_.contains(name); }
  const std::string& text(const std::string& name) const {
    if (!has(name)) fail(name + " is missing");
    return values_.at(name);
  }
  int64_t number(const std::string& name) const { return std::stoll(text(name)); }
  size_t size(const std::string& name) const { return static_cast<size_t>(number(name)); }
  std::string content(const std::string& name, size_t bytes) const { return read_file(text(name), bytes); }
  Buffer file(const std::string& name, size_t bytes, size_t offset = 0) const {
    return read_buffer(text(name), bytes, offset);
  }

 private:
  std::map<std::string, std::string> values_;
};

template <typename T>
constexpr fastpeft::Element kElement = sizeof(T) == 4              ? fastpeft::Element::kFloat32
                                       : std::is_same_v<T, __half> ? fastpeft::Element::kFloat16
                                                                   : fastpeft::Element::kBFloat16;

// Calls f with the type of that name as a template argument.
template <typename F>
void with_dtype(const std::string& dtype, F&& f) {
  if (dtype == "float32") return f.template operator()<float>();
  if (dtype == "float16") return f.template operator()<__half>();
  if (dtype == "bfloat16") return f.template operator()<__nv_bfloat16>();
  fail("unknown dtype " + dtype);
}

}  // namespace cuda_host
