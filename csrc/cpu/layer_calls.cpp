// After a product the caches hold its weight and little else. Then an operator's way through Python, the dispatcher and
// a dozen checked tensors takes 30 to 70 us, as long as what it computes for 32 rows. So a layer's tables are looked at
// once for a batch, and each call of the layer has addresses alone.
#include "cpu/layer_calls.h"

#include <pybind11/numpy.h>

#include <initializer_list>
#include <utility>
#include <vector>

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

// What it is made of is not to move while it is there: arrays are kept, and their numbers read at every call, as a plan
// is refilled and adapters come and go.
class LayerCalls {
 public:
  LayerCalls(const std::string& dtype, int64_t tokens, int64_t in_features, int64_t out_features)
      : scalar_(scalar_named(dtype)), tokens_(tokens), in_(in_features), out_(out_features) {
    if (tokens < 1 || in_ < 1 || out_ < 1) throw py::value_error("tokens and features must be at least 1");
  }

  void low_rank(const Array<int32_t>& rows, const Array<int32_t>& slots, const Array<float>& arena_A,
                const Array<int32_t>& index_A, const Array<float>& arena_B, const Array<int32_t>& index_B,
                const Array<int32_t>& rank, const Array<float>& scaling) {
    const Plan plan = plan_of(rows, slots);
    check(index_A, "index_A", {-1, -1, -1});
    const int64_t count = index_A.shape(0), r_max = index_A.shape(1), l = index_A.shape(2);
    check(index_B, "index_B", {count, r_max, l});
    check(rank, "rank", {count});
    check(scaling, "scaling", {count});
    if (l < 1 || in_ % l || out_ % l) throw py::value_error("index_A must have shards that divide the features");
    keep({arena_A, index_A, arena_B, index_B, rank, scaling});
    low_rank_.emplace_back(plan,
                           LowRankTables{arena_of(arena_A, "arena_A", in_ / l), arena_of(arena_B, "arena_B", out_ / l),
                                         index_A.data(), index_B.data(), rank.data(), scaling.data(), count, r_max, l});
  }

  void boft(const Array<int32_t>& rows, const Array<int32_t>& slots, const Array<float>& arena_blocks,
            const Array<int32_t>& row_blocks, const Array<float>& arena_scale, const Array<int32_t>& row_scale,
            int64_t factors, int64_t block_size) {
    const Plan plan = plan_of(rows, slots);
    if (factors < 1 || factors > 31 || block_size < 1 || block_size > in_ || in_ % block_size ||
        (factors > 1 && (block_size % 2 || in_ % (block_size << (factors - 1))))) {
      throw py::value_error("factors and block_size must fit the features");
    }
    check(row_blocks, "row_blocks", {-1});
    check(row_scale, "row_scale", {row_blocks.shape(0)});
    keep({arena_blocks, row_blocks, arena_scale, row_scale});
    rotations_.emplace_back(plan, RotationTables{arena_of(arena_blocks, "arena_blocks", factors * in_ * block_size),
                                                 row_blocks.data(), row_blocks.shape(0), factors, block_size});
    scales_.emplace_back(plan,
                         ScaleTables{arena_of(arena_scale, "arena_scale", out_), row_scale.data(), row_scale.shape(0)});
  }

  void fourier(const Array<int32_t>& rows, const Array<int32_t>& slots, const Array<float>& arena_spectrum,
               const Array<int32_t>& row_spectrum, const Array<int32_t>& places, const Array<int32_t>& place,
               const Array<float>& scaling) {
    const Plan plan = plan_of(rows, slots);
    check(places, "places", {-1, 2, -1});
    check(row_spectrum, "row_spectrum", {-1});
    const int64_t count = row_spectrum.shape(0), n = places.shape(2);
    check(place, "place", {count});
    check(scaling, "scaling", {count});
    keep({arena_spectrum, row_spectrum, places, place, scaling});
    fourier_.emplace_back(plan, FourierTables{arena_of(arena_spectrum, "arena_spectrum", n), row_spectrum.data(),
                                              places.data(), place.data(), scaling.data(), count, places.shape(0)});
  }

  bool rotates() const { return !rotations_.empty(); }

  // z = x as the rotations have it, both (tokens, in) without gaps.
  void before(uintptr_t x, uintptr_t z) const {
    const py::gil_scoped_release release;
    const Matrix source = matrix(x, in_), target = matrix(z, in_);
    std::vector<char> named(tokens_);
    Works works;
    for (const auto& [plan, tables] : rotations_) {
      works.push_back(rotation_work(tables, batch(plan, named), source, target, in_));
    }
    works.push_back(copy_work(named, source, target, in_));
    run_all(works);
  }

  // What is done to y, (tokens, out) without gaps; bias (out,) of its dtype, or 0.
  void after(uintptr_t x, uintptr_t y, uintptr_t bias) const {
    const py::gil_scoped_release release;
    const Matrix source = matrix(x, in_), target = matrix(y, out_);
    std::vector<char> named(tokens_);  // a row has one adapter, so that no two tasks write to it
    Works works;
    for (const auto& [plan, tables] : fourier_) {  // the longest tasks first
      works.push_back(fourier_work(tables, batch(plan, named), source, target, in_, out_));
    }
    for (const auto& [plan, tables] : low_rank_) {
      works.push_back(low_rank_work(tables, batch(plan, named), source, target));
    }
    for (const auto& [plan, tables] : scales_) {
      works.push_back(scale_work(tables, batch(plan, named), reinterpret_cast<const void*>(bias), target));
    }
    run_all(works);
  }

 private:
  struct Plan {
    const int32_t *rows, *slots;
  };
  template <typename Tables>
  using Entries = std::vector<std::pair<Plan, Tables>>;

  Plan plan_of(const Array<int32_t>& rows, const Array<int32_t>& slots) {
    check(rows, "rows", {tokens_});
    check(slots, "slots", {tokens_});
    keep({rows, slots});
    return {rows.data(), slots.data()};
  }

  void keep(std::initializer_list<py::array> arrays) { kept_.insert(kept_.end(), arrays); }

  Matrix matrix(uintptr_t data, int64_t width) const { return {reinterpret_cast<void*>(data), width, scalar_}; }

  static Batch batch(const Plan& plan, std::vector<char>& named) { return {plan.rows, plan.slots, named}; }

  Scalar scalar_;
  int64_t tokens_, in_, out_;
  std::vector<py::array> kept_;
  Entries<LowRankTables> low_rank_;
  Entries<RotationTables> rotations_;
  Entries<ScaleTables> scales_;
  Entries<FourierTables> fourier_;
};

}  // namespace

void bind_layer_calls(py::module_& m) {
  const auto table = [](const char* name) { return py::arg(name).noconvert(); };
  py::class_<LayerCalls>(m, "LayerCalls",
                         "What the adapters of a batch do to one layer: see fastpeft/serving/layer.py.")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t>(), py::arg("dtype"), py::arg("tokens"),
           py::arg("in_features"), py::arg("out_features"))
      .def("low_rank", &LayerCalls::low_rank, table("rows"), table("slots"), table("arena_A"), table("index_A"),
           table("arena_B"), table("index_B"), table("rank"), table("scaling"))
      .def("boft", &LayerCalls::boft, table("rows"), table("slots"), table("arena_blocks"), table("row_blocks"),
           table("arena_scale"), table("row_scale"), py::arg("factors"), py::arg("block_size"))
      .def("fourier", &LayerCalls::fourier, table("rows"), table("slots"), table("arena_spectrum"),
           table("row_spectrum"), table("places"), table("place"), table("scaling"))
      .def_property_readonly("rotates", &LayerCalls::rotates)
      .def("before", &LayerCalls::before)
      .def("after", &LayerCalls::after);
}

}  // namespace fastpeft
