#include <cmath>

#include "core/check.h"
#include "ops/sink_attention/sink_attention.h"

namespace mxmoe {
namespace {

void check_rows(const char* name, const Tensor& t, const Tensor& q) {
  check_dtype(name, t, {DType::f32, DType::bf16});
  check_shape(name, t, {q.shape[0], q.shape[1], q.shape[2]}, "(num_tokens, num_attention_heads, head_dim)");
  check_value(t.shape[1] <= 1 || t.stride[1] == t.shape[2], name, " has a head stride of ", t.stride[1],
              " elements; wanted ", t.shape[2]);
}

// Kernels count in rows of head_dim values, so that one number finds a key and its scale.
void check_cache_rows(const char* name, const Tensor& t) {
  if (t.dtype == DType::i8) return check_contiguous(name, t);
  for (int i = 0; i < 3; ++i) {
    check_value(t.shape[i] <= 1 || t.stride[i] % t.shape[3] == 0, name, " has a stride of ", t.stride[i],
                " elements on axis ", i, "; wanted a multiple of head_dim = ", t.shape[3]);
  }
}

void check_arrays(const Tensor& q, const KvCache& cache, const Tensor& sinks, const Tensor& sink_share,
                  const Tensor& y) {
  check_kv_cache_shape(cache);
  check_cache_rows("k_cache", cache.k);
  check_cache_rows("v_cache", cache.v);
  check_shape("q", q, {-1, -1, cache.k.shape[3]}, "(num_tokens, num_attention_heads, head_dim of k_cache)");
  check_rows("q", q, q);
  check_rows("out", y, q);
  const int64_t heads = q.shape[1], kv_heads = cache.k.shape[1];
  check_value(heads >= 1 && heads % kv_heads == 0, "q has ", heads, " heads; wanted a multiple of k_cache's ",
              kv_heads);
  check_value(q.shape[2] <= kMaxHeadDim, "q has head_dim ", q.shape[2], "; wanted at most ", kMaxHeadDim);
  check_dtype("sinks", sinks, {DType::f32, DType::bf16});
  check_shape("sinks", sinks, {heads}, "(num_attention_heads,)");
  if (sink_share) {
    check_dtype("sink_share", sink_share, {DType::f32});
    check_shape("sink_share", sink_share, {q.shape[0], heads}, "(num_tokens, num_attention_heads)");
    check_contiguous("sink_share", sink_share);
  }
}

void check_aliasing(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& b,
                    const Tensor& sink_share, const Tensor& y) {
  for (const NamedTensor& written : {NamedTensor{"out", y}, NamedTensor{"sink_share", sink_share}}) {
    check_no_overlap(written.name, written.tensor,
                     {{"q", q},
                      {"k_cache", cache.k},
                      {"v_cache", cache.v},
                      {"k_scales", cache.k_scales},
                      {"v_scales", cache.v_scales},
                      {"sinks", sinks},
                      {"block_table", b.block_table},
                      {"cu_seqlens", b.cu_seqlens},
                      {"seq_lens", b.seq_lens},
                      {"key_starts", b.key_starts}});
  }
  check_no_overlap("sink_share", sink_share, "out", y);
}

void check_tables(const AttentionBatch& b) {
  check_dtype("cu_seqlens", b.cu_seqlens, {DType::i32});
  check_dtype("seq_lens", b.seq_lens, {DType::i32});
  check_dtype("block_table", b.block_table, {DType::i32});
  check_shape("seq_lens", b.seq_lens, {-1}, "(num_sequences,)");
  const int64_t num_sequences = b.seq_lens.shape[0];
  check_shape("cu_seqlens", b.cu_seqlens, {num_sequences + 1}, "(num_sequences + 1,)");
  check_shape("block_table", b.block_table, {num_sequences, -1}, "(num_sequences, max_blocks)");
  check_contiguous("block_table", b.block_table);
  if (b.key_starts) {
    check_dtype("key_starts", b.key_starts, {DType::i32});
    check_shape("key_starts", b.key_starts, {num_sequences}, "(num_sequences,)");
  }
}

}  // namespace

void check_sink_attention(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& b,
                          float sm_scale, int64_t sliding_window, const Tensor& sink_share, const Tensor& y) {
  check_arrays(q, cache, sinks, sink_share, y);
  check_value(std::isfinite(sm_scale), "sm_scale is ", sm_scale, "; wanted a finite number");
  check_value(sliding_window >= 0, "sliding_window is ", sliding_window,
              "; wanted 1 or more, or 0 for full attention");
  check_tables(b);
  check_aliasing(q, cache, sinks, b, sink_share, y);
}

}  // namespace mxmoe
