#include "capi/capi.h"
#include "ops/pack/pack.h"
#include "ops/quantize/quantize.h"

using namespace mxmoe;
using namespace mxmoe::capi;

namespace {
PackedForm parse_weights(int weights) {
  switch (weights) {
    case MXMOE_WEIGHTS_MXFP4:
      return PackedForm::mxfp4;
    case MXMOE_WEIGHTS_BF16:
      return PackedForm::bf16;
    case MXMOE_WEIGHTS_INT8:
      return PackedForm::i8;
    default:
      throw ValueError(concat("weights is ", weights, "; wanted 0 (mxfp4), 1 (bf16) or 2 (int8)"));
  }
}
}  // namespace

int mxmoe_mxfp4_dequantize(const mxmoe_tensor* blocks, const mxmoe_tensor* scales, const mxmoe_tensor* out) {
  return guarded([&] {
    mxfp4_dequantize(required("blocks", blocks), required("scales", scales), required("out", out, Access::kWrite));
  });
}

int mxmoe_mxfp4_quantize(const mxmoe_tensor* x, const mxmoe_tensor* blocks, const mxmoe_tensor* scales) {
  return guarded([&] {
    mxfp4_quantize(required("x", x), required("blocks", blocks, Access::kWrite),
                   required("scales", scales, Access::kWrite));
  });
}

int mxmoe_int8_quantize(const mxmoe_tensor* x, const mxmoe_tensor* codes, const mxmoe_tensor* scales) {
  return guarded([&] {
    int8_quantize(required("x", x), required("codes", codes, Access::kWrite),
                  required("scales", scales, Access::kWrite));
  });
}

int mxmoe_prefers_packed(int activations, int weights, int* prefers) {
  return guarded([&] {
    int& result = pointed("prefers", prefers);
    result = prefers_packed(parse_activations(activations), parse_weights(weights));
  });
}

int mxmoe_pack_mxfp4(const mxmoe_tensor* blocks, const mxmoe_tensor* scales, const mxmoe_tensor* packed,
                     const mxmoe_tensor* packed_scales) {
  return guarded([&] {
    pack_mxfp4(required("blocks", blocks), required("scales", scales), required("packed", packed, Access::kWrite),
               required("packed_scales", packed_scales, Access::kWrite));
  });
}

int mxmoe_unpack_mxfp4(const mxmoe_tensor* packed, const mxmoe_tensor* packed_scales, const mxmoe_tensor* blocks,
                       const mxmoe_tensor* scales) {
  return guarded([&] {
    unpack_mxfp4(required("packed", packed), required("packed_scales", packed_scales),
                 required("blocks", blocks, Access::kWrite), required("scales", scales, Access::kWrite));
  });
}

int mxmoe_pack_linear(const mxmoe_tensor* weight, const mxmoe_tensor* scales, const mxmoe_tensor* packed,
                      const mxmoe_tensor* packed_scales) {
  return guarded([&] {
    pack_linear(required("weight", weight), optional("scales", scales), required("packed", packed, Access::kWrite),
                optional("packed_scales", packed_scales, Access::kWrite));
  });
}

int mxmoe_unpack_linear(const mxmoe_tensor* packed, const mxmoe_tensor* packed_scales, const mxmoe_tensor* weight,
                        const mxmoe_tensor* scales) {
  return guarded([&] {
    unpack_linear(required("packed", packed), optional("packed_scales", packed_scales),
                  required("weight", weight, Access::kWrite), optional("scales", scales, Access::kWrite));
  });
}
