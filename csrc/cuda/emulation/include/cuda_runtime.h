// Stands where CUDA's own header would: the part of the runtime and of the device language that mxmoe uses, on the
// host. See block.h for what it can judge and what not.
#pragma once

#include "cuda/emulation/device_code.h"
#include "cuda/emulation/runtime.h"
