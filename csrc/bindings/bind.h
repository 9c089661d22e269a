// Every op's binding: arrays to Tensors, the GIL released, one call.
#pragma once

#include <pybind11/pybind11.h>

#include "core/float_environment.h"

namespace mxmoe {

// What all that computes runs in: no GIL, and not the caller's floating-point settings.
class Unlocked {
  pybind11::gil_scoped_release released_;
  DefaultFloatEnvironment environment_;
};

void bind_rmsnorm(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_expert_routing(pybind11::module_& m);
void bind_mxfp4_moe(pybind11::module_& m);
void bind_sink_attention(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);
void bind_pack(pybind11::module_& m);
void bind_ceilings(pybind11::module_& m);
void bind_recording(pybind11::module_& m);

}  // namespace mxmoe
