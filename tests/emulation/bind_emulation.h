// What only the emulated module has: orders, faults, limits, and the kernels that must be caught.
#pragma once

#include <pybind11/pybind11.h>

namespace mxmoe {
namespace emulation {

void bind_emulation(pybind11::module_& m);
void bind_products(pybind11::module_& m);

}  // namespace emulation
}  // namespace mxmoe
