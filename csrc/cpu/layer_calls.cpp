// After a product the caches hold its weight and little else. Then an operator's way through Python, the dispatcher and
// a dozen checked tensors takes 30 to 70 us, as long as what it computes for 32 rows. So a layer's tables are looked at
// once, a batch's rows once, and each call of the layer has them and addresses alone.
#include "cpu/layer_calls.h"

#include <pybind11/numpy.h>

#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "common/boft_reflectors.h"
#include "cpu/many.h"

namespace py = pybind11;

namespace fastpeft {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // arguments of it are taken without conversion, see below

Scalar scalar_named(const std::string& name) {
  if (name == "float32") return Scalar::float32;
  if (name == "bfloat16") return Scalar::bfloat16;
  if (name == "float16") return Scalar::float16;
  throw py::value_error("dtype must be float32, bfloat16 or float16, got " + name);
}

// -1 stands for any size.
void check(const py::array& array, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = array.ndim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes.begin()[i] == -1 || sizes.begin()[i] == array.shape(int64_t(i));
  }
  if (!fits) throw py::value_error(std::string(name) + " must have the sizes that the other tables give it");
}

Arena arena_of(const Array<float>& arena, const char* name, int64_t width) {
  check(arena, name, {-1, width});
  return {arena.data(), arena.shape(0), width};
}

// Python's lock, given up for calls that are long enough for another thread to use it. Those of a decoding batch end
// sooner than a thread that waits wakes up, and getting the lock back from that one would take longer than the call.
class MaybeReleased {
 public:
  explicit MaybeReleased(int64_t numbers) {
    if (numbers > kFew) release_.emplace();
  }

 private:
  static constexpr int64_t kFew = 1 << 17;  // of x and y: 32 rows of 2048 features each
  std::optional<py::gil_scoped_release> release_;
};

// The rows of a batch, see fastpeft/serving/plan.py: for each family of the plan its rows and their slots. They are
// read at every call, since a plan is refilled in place.
class BatchRows {
 public:
  explicit BatchRows(const Array<int32_t>& packed) : packed_(packed) {
    check(packed, "packed", {-1, 2, -1});
    if (packed.shape(2) < 1) throw py::value_error("packed must have at least one token");
  }

  int64_t tokens() const { return packed_.shape(2); }

  Batch of(int64_t family, std::vector<char>& named) const {
    STD_TORCH_CHECK(family < packed_.shape(0), "the batch has ", packed_.shape(0), " families, not a number ", family);
    const int32_t* rows = packed_.data() + family * 2 * tokens();
    return {rows, rows + tokens(), named};
  }

 private:
  Array<int32_t> packed_;
};

// What it is made of is not to move while it is there: arrays are kept, and their numbers read at every call, as
// adapters come and go. `family` is a family's number in the batches that are to come.
class LayerCalls {
 public:
  LayerCalls(const std::string& dtype, int64_t in_features, int64_t out_features)
      : scalar_(scalar_named(dtype)), in_(in_features), out_(out_features) {
    if (in_ < 1 || out_ < 1) throw py::value_error("in_features and out_features must be at least 1");
  }

  void low_rank(int64_t family, const Array<float>& arena_A, const Array<int32_t>& index_A, const Array<float>& arena_B,
                const Array<int32_t>& index_B, const Array<int32_t>& rank, const Array<float>& scaling) {
    check_family(family);
    check(index_A, "index_A", {-1, -1, -1});
    const int64_t count = index_A.shape(0), r_max = index_A.shape(1), l = index_A.shape(2);
    check(index_B, "index_B", {count, r_max, l});
    check(rank, "rank", {count});
    check(scaling, "scaling", {count});
    if (l < 1 || in_ % l || out_ % l) throw py::value_error("index_A must have shards that divide the features");
    keep({arena_A, index_A, arena_B, index_B, rank, scaling});
    low_rank_.emplace_back(family,
                           LowRankTables{arena_of(arena_A, "arena_A", in_ / l), arena_of(arena_B, "arena_B", out_ / l),
                                         index_A.data(), index_B.data(), rank.data(), scaling.data(), count, r_max, l});
  }

  void boft(int64_t family, const Array<float>& arena_reflectors, const Array<int32_t>& row_reflectors,
            const Array<float>& arena_scale, const Array<int32_t>& row_scale, int64_t factors, int64_t block_size) {
    check_family(family);
    if (factors < 1 || factors > 31 || block_size < 1 || block_size > in_ || in_ % block_size ||
        (factors > 1 && (block_size % 2 || in_ % (block_size << (factors - 1))))) {
      throw py::value_error("factors and block_size must fit the features");
    }
    check(row_reflectors, "row_reflectors", {-1});
    check(row_scale, "row_scale", {row_reflectors.shape(0)});
    keep({arena_reflectors, row_reflectors, arena_scale, row_scale});
    const int64_t width = factors * (in_ / block_size) * reflector_numbers(block_size);
    rotations_.emplace_back(family,
                            RotationTables{arena_of(arena_reflectors, "arena_reflectors", width), row_reflectors.data(),
                                           row_reflectors.shape(0), factors, block_size});
    scales_.emplace_back(family,
                         ScaleTables{arena_of(arena_scale, "arena_scale", out_), row_scale.data(), row_scale.shape(0)});
  }

  void fourier(int64_t family, const Array<float>& arena_spectrum, const Array<int32_t>& row_spectrum,
               const Array<int32_t>& places, const Array<int32_t>& place, const Array<float>& scaling) {
    check_family(family);
    check(places, "places", {-1, 2, -1});
    check(row_spectrum, "row_spectrum", {-1});
    const int64_t count = row_spectrum.shape(0), n = places.shape(2);
    check(place, "place", {count});
    check(scaling, "scaling", {count});
    keep({arena_spectrum, row_spectrum, places, place, scaling});
    fourier_.emplace_back(family, FourierTables{arena_of(arena_spectrum, "arena_spectrum", n), row_spectrum.data(),
                                                places.data(), place.data(), scaling.data(), count, places.shape(0)});
  }

  bool rotates() const { return !rotations_.empty(); }

  // z = x as the rotations have it, both (tokens, in) without gaps.
  void before(const BatchRows& rows, uintptr_t x, uintptr_t z) const {
    const MaybeReleased release(rows.tokens() * (in_ + out_));
    const Matrix source = matrix(x, in_), target = matrix(z, in_);
    std::vector<char> named(rows.tokens());
    Works works;
    for (const auto& [family, tables] : rotations_) {
      works.push_back(rotation_work(tables, rows.of(family, named), source, target, in_));
    }
    works.push_back(copy_work(named, source, target, in_));
    run_all(works);
  }

  // What is done to y, (tokens, out) without gaps; bias (out,) of its dtype, or 0.
  void after(const BatchRows& rows, uintptr_t x, uintptr_t y, uintptr_t bias) const {
    const MaybeReleased release(rows.tokens() * (in_ + out_));
    const Matrix source = matrix(x, in_), target = matrix(y, out_);
    std::vector<char> named(rows.tokens());  // a row has one adapter, so that no two tasks write to it
    Works works;
    for (const auto& [family, tables] : fourier_) {  // the longest tasks first
      works.push_back(fourier_work(tables, rows.of(family, named), source, target, in_, out_));
    }
    for (const auto& [family, tables] : low_rank_) {
      works.push_back(low_rank_work(tables, rows.of(family, named), source, target));
    }
    for (const auto& [family, tables] : scales_) {
      works.push_back(scale_work(tables, rows.of(family, named), reinterpret_cast<const void*>(bias), target));
    }
    run_all(works);
  }

 private:
  template <typename Tables>
  using Entries = std::vector<std::pair<int64_t, Tables>>;  // with the family

  static void check_family(int64_t family) {
    if (family < 0) throw py::value_error("family must be at least 0, got " + std::to_string(family));
  }

  void keep(std::initializer_list<py::array> arrays) { kept_.insert(kept_.end(), arrays); }

  Matrix matrix(uintptr_t data, int64_t width) const { return {reinterpret_cast<void*>(data), width, scalar_}; }

  Scalar scalar_;
  int64_t in_, out_;
  std::vector<py::array> kept_;
  Entries<LowRankTables> low_rank_;
  Entries<RotationTables> rotations_;
  Entries<ScaleTables> scales_;
  Entries<FourierTables> fourier_;
};

}  // namespace

void bind_layer_calls(py::module_& m) {
  const auto table = [](const char* name) { return py::arg(name).noconvert(); };
  py::class_<BatchRows>(m, "BatchRows", "The rows of a batch: see fastpeft/serving/plan.py.")
      .def(py::init<const Array<int32_t>&>(), table("packed"));
  py::class_<LayerCalls>(m, "LayerCalls",
                         "What the adapters of a batch do to one layer: see fastpeft/serving/layer.py.")
      .def(py::init<const std::string&, int64_t, int64_t>(), py::arg("dtype"), py::arg("in_features"),
           py::arg("out_features"))
      .def("low_rank", &LayerCalls::low_rank, py::arg("family"), table("arena_A"), table("index_A"), table("arena_B"),
           table("index_B"), table("rank"), table("scaling"))
      .def("boft", &LayerCalls::boft, py::arg("family"), table("arena_reflectors"), table("row_reflectors"),
           table("arena_scale"), table("row_scale"), py::arg("factors"), py::arg("block_size"))
      .def("fourier", &LayerCalls::fourier, py::arg("family"), table("arena_spectrum"), table("row_spectrum"),
           table("places"), table("place"), table("scaling"))
      .def_property_readonly("rotates", &LayerCalls::rotates)
      .def("before", &LayerCalls::before)
      .def("after", &LayerCalls::after);
}

}  // namespace fastpeft
