// One token's choice of experts, in the vector vocabulary. Included inside a kernel's namespace and target
// region.

inline bool already_chosen(const int32_t* ids, int64_t count, int64_t expert) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] == expert) return true;
  }
  return false;
}

// The largest logit that follows (last_value, last_id) in the order of choice: by value, then by lower index.
inline float largest_after(const RoutingRow& r, float last_value, int64_t last_id) {
  const f32v lowest = set1(float_from_bits(0xff800000u));  // -infinity
  const f32v limit = set1(last_value), limit_id = set1(static_cast<float>(last_id));
  f32v best = lowest;
  for (int64_t e = 0; e < r.num_experts; e += kLanes) {
    const int64_t left = r.num_experts - e;
    const int n = static_cast<int>(left < kLanes ? left : kLanes);
    const f32v id = add(iota(), set1(static_cast<float>(e)));
    f32v v = load_n(r.logits + e, n);
    v = select_lt(id, set1(static_cast<float>(r.num_experts)), v, lowest);
    // Equal to the last value: still free when its index is higher. Above it: taken before.
    const f32v tied = select_lt(limit_id, id, v, lowest);
    v = select_lt(v, limit, v, select_lt(limit, v, lowest, tied));
    best = max(v, best);  // NaN loses
  }
  return reduce_max(best);
}

inline void expert_routing_row(const RoutingRow& r) {
  float last_value = float_from_bits(0x7f800000u);  // +infinity
  int64_t last_id = -1;
  for (int64_t i = 0; i < r.experts_per_token; ++i) {
    const float value = largest_after(r, last_value, last_id);
    int64_t chosen = -1;
    for (int64_t e = 0; e < r.num_experts && chosen < 0; ++e) {
      if (r.logits[e] == value && !already_chosen(r.ids, i, e)) chosen = e;
    }
    if (chosen < 0) {  // nothing but NaN is left: by index
      for (chosen = 0; already_chosen(r.ids, i, chosen);) ++chosen;
    }
    r.ids[i] = static_cast<int32_t>(chosen);
    last_value = value;
    last_id = chosen;
  }
  // Softmax over the chosen; the first is the largest.
  const float top = r.logits[r.ids[0]];
  float sum = 0.0f;
  for (int64_t i = 0; i < r.experts_per_token; ++i) {
    r.weights[i] = std::exp(r.logits[r.ids[i]] - top);
    sum += r.weights[i];
  }
  for (int64_t i = 0; i < r.experts_per_token; ++i) r.weights[i] /= sum;
}
