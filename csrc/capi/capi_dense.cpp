#include <vector>

#include "capi/capi.h"
#include "ops/embedding/embedding.h"
#include "ops/linear/linear.h"
#include "ops/rmsnorm/rmsnorm.h"
#include "ops/rope/rope.h"

using namespace mxmoe;
using namespace mxmoe::capi;

int mxmoe_embedding(const mxmoe_tensor* token_ids, const mxmoe_tensor* weight, const mxmoe_tensor* out) {
  return guarded([&] {
    embedding(required("token_ids", token_ids), required("weight", weight), required("out", out, Access::kWrite));
  });
}

int mxmoe_rmsnorm(const mxmoe_tensor* x, const mxmoe_tensor* weight, float eps, const mxmoe_tensor* out) {
  return guarded(
      [&] { rmsnorm(required("x", x), required("weight", weight), eps, required("out", out, Access::kWrite)); });
}

int mxmoe_rope_inv_freq(int64_t head_dim, double theta, double factor, int64_t original_max_position_embeddings,
                        double beta_fast, double beta_slow, int truncate, const mxmoe_tensor* inv_freq,
                        double* scaling) {
  return guarded([&] {
    constexpr int64_t kMostHeadDim = 65536;  // as in Python
    check_value(head_dim <= kMostHeadDim, "head_dim is ", head_dim, "; wanted at most ", kMostHeadDim);
    check_value(head_dim >= 2 && head_dim % 2 == 0, "head_dim is ", head_dim, "; wanted an even number, 2 or more");
    const Tensor to = required("inv_freq", inv_freq, Access::kWrite);
    check_dtype("inv_freq", to, {DType::f64});
    check_shape("inv_freq", to, {head_dim / 2}, "(head_dim / 2,)");
    double& factor_of_table = pointed("scaling", scaling);
    const YarnParams yarn{theta, factor, original_max_position_embeddings, beta_fast, beta_slow, truncate != 0};
    factor_of_table = rope_inv_freq(head_dim, yarn, to.as<double>());
  });
}

int mxmoe_rope_cos_sin(const mxmoe_tensor* positions, const mxmoe_tensor* inv_freq, double scaling,
                       const mxmoe_tensor* cos, const mxmoe_tensor* sin) {
  return guarded([&] {
    rope_cos_sin(required("positions", positions), required("inv_freq", inv_freq), scaling,
                 required("cos", cos, Access::kWrite), required("sin", sin, Access::kWrite));
  });
}

int mxmoe_rope(const mxmoe_tensor* x, const mxmoe_tensor* cos, const mxmoe_tensor* sin, const mxmoe_tensor* out) {
  return guarded([&] {
    rope(required("x", x), required("cos", cos), required("sin", sin), required("out", out, Access::kWrite));
  });
}

int mxmoe_linear(const mxmoe_tensor* x, const mxmoe_tensor* weight, const mxmoe_tensor* scales,
                 const mxmoe_tensor* bias, int activations, const mxmoe_tensor* residual, const mxmoe_tensor* out) {
  return guarded([&] {
    const LinearWeights w{required("weight", weight), optional("scales", scales), optional("bias", bias)};
    linear(required("x", x), w, parse_activations(activations), optional("residual", residual),
           required("out", out, Access::kWrite));
  });
}

int mxmoe_linear_group(const mxmoe_tensor* x, const mxmoe_linear_weights* layers, int64_t num_layers, int activations,
                       const mxmoe_tensor* out) {
  return guarded([&] {
    check_value(num_layers >= 0, "num_layers is ", num_layers, "; wanted 1 or more");
    std::vector<LinearWeights> weights;
    for (int64_t i = 0; i < num_layers; ++i) {
      const mxmoe_linear_weights& w = (&pointed("layers", layers))[i];
      weights.push_back({required("weight", w.weight), optional("scales", w.scales), optional("bias", w.bias)});
    }
    linear_group(required("x", x), weights, parse_activations(activations), required("out", out, Access::kWrite));
  });
}
