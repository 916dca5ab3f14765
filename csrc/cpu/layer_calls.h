// All that the adapters of a batch do to one layer on a CPU, in two calls from Python: before and after the base layer.
#pragma once

#include <pybind11/pybind11.h>

namespace fastpeft {

void bind_layer_calls(pybind11::module_& m);

}  // namespace fastpeft
