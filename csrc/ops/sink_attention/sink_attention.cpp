#include "ops/sink_attention/sink_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {

Dispatch<AttentionKernel> table("sink_attention",
                                {MXMOE_X86({"sink_attention_avx512", kAvx512, sink_attention_avx512},
                                           {"sink_attention_avx2", kAvx2, sink_attention_avx2}){
                                    "sink_attention_scalar", 0, sink_attention_scalar}});

void check_rows(const char* name, const Tensor& t, const Tensor& q) {
  check_dtype(name, t, {DType::f32, DType::bf16});
  check_shape(name, t, {q.shape[0], q.shape[1], q.shape[2]}, "(num_tokens, num_attention_heads, head_dim)");
  check_value(t.shape[1] <= 1 || t.stride[1] == t.shape[2], name, " has a head stride of ", t.stride[1],
              " elements; wanted ", t.shape[2]);
}

void check_arrays(const Tensor& q, const KvCache& cache, const Tensor& sinks, const Tensor& sink_share,
                  const Tensor& y) {
  check_kv_cache(cache);
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
                      {"seq_lens", b.seq_lens}});
  }
  check_no_overlap("sink_share", sink_share, "out", y);
}

// First key that the first new token of a sequence sees.
int64_t first_visible(int64_t position, int64_t sliding_window) {
  return sliding_window > 0 ? std::max<int64_t>(0, position - sliding_window + 1) : 0;
}

void check_batch(const Tensor& q, const KvCache& cache, const AttentionBatch& b, int64_t sliding_window) {
  check_dtype("cu_seqlens", b.cu_seqlens, {DType::i32});
  check_dtype("seq_lens", b.seq_lens, {DType::i32});
  check_dtype("block_table", b.block_table, {DType::i32});
  check_shape("seq_lens", b.seq_lens, {-1}, "(num_sequences,)");
  const int64_t num_sequences = b.seq_lens.shape[0];
  check_shape("cu_seqlens", b.cu_seqlens, {num_sequences + 1}, "(num_sequences + 1,)");
  check_shape("block_table", b.block_table, {num_sequences, -1}, "(num_sequences, max_blocks)");
  check_contiguous("block_table", b.block_table);
  const int32_t* cu = b.cu_seqlens.as<int32_t>();
  check_value(cu[0] == 0 && cu[num_sequences] == q.shape[0], "cu_seqlens runs from ", cu[0], " to ",
              cu[num_sequences], "; wanted 0 to num_tokens = ", q.shape[0]);
  const int64_t block_size = cache.k.shape[2], num_blocks = cache.k.shape[0], max_blocks = b.block_table.shape[1];
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t added = static_cast<int64_t>(cu[s + 1]) - cu[s], length = b.seq_lens.as<int32_t>()[s];
    check_value(added >= 0, "cu_seqlens falls from ", cu[s], " to ", cu[s + 1], "; wanted it not to fall");
    check_value(length >= added, "seq_lens[", s, "] is ", length, "; wanted at least its ", added, " new tokens");
    check_value(length <= max_blocks * block_size, "seq_lens[", s, "] is ", length, "; block_table has room for ",
                max_blocks * block_size);
    if (added == 0) continue;
    for (int64_t i = first_visible(length - added, sliding_window) / block_size; i * block_size < length; ++i) {
      const int32_t block = b.block_table.as<int32_t>()[s * max_blocks + i];
      check_value(block >= 0 && block < num_blocks, "block_table[", s, ", ", i, "] is ", block, "; wanted 0 to ",
                  num_blocks - 1);
    }
  }
}

struct Span {  // of one item
  int64_t sequence, token, num_tokens, kv_head, head, num_heads;
};

std::vector<Span> split(const Tensor& q, const KvCache& cache, const AttentionBatch& b) {
  const int64_t kv_heads = cache.k.shape[1], group = q.shape[1] / kv_heads;
  const int64_t heads_per_item = std::min<int64_t>(group, kAttentionRows);
  const int64_t tokens_per_item = kAttentionRows / heads_per_item;
  std::vector<Span> spans;
  for (int64_t s = 0; s < b.seq_lens.shape[0]; ++s) {
    const int64_t begin = b.cu_seqlens.as<int32_t>()[s], end = b.cu_seqlens.as<int32_t>()[s + 1];
    for (int64_t kv = 0; kv < kv_heads; ++kv) {
      for (int64_t h = 0; h < group; h += heads_per_item) {
        for (int64_t t = begin; t < end; t += tokens_per_item) {
          spans.push_back(
              {s, t, std::min(tokens_per_item, end - t), kv, kv * group + h, std::min(heads_per_item, group - h)});
        }
      }
    }
  }
  return spans;
}

}  // namespace

void sink_attention(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& b,
                    float sm_scale, int64_t sliding_window, const Tensor& sink_share, const Tensor& y) {
  check_arrays(q, cache, sinks, sink_share, y);
  check_value(std::isfinite(sm_scale), "sm_scale is ", sm_scale, "; wanted a finite number");
  check_value(sliding_window >= 0, "sliding_window is ", sliding_window,
              "; wanted 1 or more, or 0 for full attention");
  check_batch(q, cache, b, sliding_window);
  check_aliasing(q, cache, sinks, b, sink_share, y);

  const int64_t heads = q.shape[1], head_dim = q.shape[2];
  std::vector<float> sinks_f32(static_cast<size_t>(heads));
  for (int64_t h = 0; h < heads; ++h) {
    sinks_f32[static_cast<size_t>(h)] =
        sinks.dtype == DType::f32 ? sinks.as<float>()[h] : to_float(sinks.as<bf16>()[h]);
  }
  const std::vector<Span> spans = split(q, cache, b);
  const AttentionKernel kernel = table.pick();
  parallel_for(static_cast<int64_t>(spans.size()), [&](int64_t i) {
    const Span& span = spans[static_cast<size_t>(i)];
    const int64_t added_before = span.token - b.cu_seqlens.as<int32_t>()[span.sequence];
    const int64_t added = b.cu_seqlens.as<int32_t>()[span.sequence + 1] - b.cu_seqlens.as<int32_t>()[span.sequence];
    AttentionItem item{};
    item.q = q.as<char>() + (span.token * q.stride[0] + span.head * head_dim) * dtype_size(q.dtype);
    item.q_dtype = q.dtype, item.q_token_stride = q.stride[0];
    item.y = y.as<char>() + (span.token * y.stride[0] + span.head * head_dim) * dtype_size(y.dtype);
    item.y_dtype = y.dtype, item.y_token_stride = y.stride[0];
    item.sink_share = sink_share ? sink_share.as<float>() + span.token * heads + span.head : nullptr;
    item.share_token_stride = heads;
    item.sinks = sinks_f32.data() + span.head;
    item.num_tokens = span.num_tokens, item.num_heads = span.num_heads, item.head_dim = head_dim;
    item.first_position = b.seq_lens.as<int32_t>()[span.sequence] - added + added_before;
    item.sliding_window = sliding_window, item.sm_scale = sm_scale;
    item.k = cache.k.data, item.v = cache.v.data, item.kv_dtype = cache.k.dtype;
    item.k_scales = cache.k_scales.as<float>(), item.v_scales = cache.v_scales.as<float>();
    item.kv_head = span.kv_head, item.num_kv_heads = cache.k.shape[1], item.block_size = cache.k.shape[2];
    item.blocks = b.block_table.as<int32_t>() + span.sequence * b.block_table.shape[1];
    kernel(item);
  });
}

}  // namespace mxmoe
