#include "ops/sink_attention/sink_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {

using Fn = const AttentionKernel*;
Dispatch<Fn> f32("sink_attention_f32", {MXMOE_X86({"sink_attention_f32_avx512", kAvx512, &sink_attention_avx512.f32},
                                                  {"sink_attention_f32_avx2", kAvx2, &sink_attention_avx2.f32}){
                                           "sink_attention_f32_scalar", 0, &sink_attention_scalar.f32}});
Dispatch<Fn> bf16_dot("sink_attention_bf16",
                      {MXMOE_X86({"sink_attention_bf16_avx512bf16", kAvx512Dot, &sink_attention_bf16_avx512x},
                                 {"sink_attention_bf16_avx512", kAvx512, &sink_attention_avx512.bf16},
                                 {"sink_attention_bf16_avx2", kAvx2, &sink_attention_avx2.bf16}){
                          "sink_attention_bf16_scalar", 0, &sink_attention_scalar.bf16}});

CacheRows cache_rows(const Tensor& t) {
  return {t.stride[0] / t.shape[3], t.stride[1] / t.shape[3], t.stride[2] / t.shape[3]};
}

// First key that the first new token of a sequence sees.
int64_t first_visible(int64_t position, int64_t sliding_window) {
  return sliding_window > 0 ? std::max<int64_t>(0, position - sliding_window + 1) : 0;
}

int64_t key_start(const AttentionBatch& b, int64_t sequence) {
  return b.key_starts ? b.key_starts.as<int32_t>()[sequence] : 0;
}

// What the tables say.
void check_batch(const Tensor& q, const KvCache& cache, const AttentionBatch& b, int64_t sliding_window) {
  const int64_t num_sequences = b.seq_lens.shape[0];
  const int32_t* cu = b.cu_seqlens.as<int32_t>();
  check_value(cu[0] == 0 && cu[num_sequences] == q.shape[0], "cu_seqlens runs from ", cu[0], " to ",
              cu[num_sequences], "; wanted 0 to num_tokens = ", q.shape[0]);
  const int64_t block_size = cache.k.shape[2], num_blocks = cache.k.shape[0], max_blocks = b.block_table.shape[1];
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t added = static_cast<int64_t>(cu[s + 1]) - cu[s], length = b.seq_lens.as<int32_t>()[s];
    check_value(added >= 0, "cu_seqlens falls from ", cu[s], " to ", cu[s + 1], "; wanted it not to fall");
    const int64_t start = key_start(b, s), room = max_blocks * block_size - start;
    check_value(start >= 0, "key_starts[", s, "] is ", start, "; wanted 0 or more");
    check_value(length >= std::max<int64_t>(0, added - start), "seq_lens[", s, "] is ", length,
                "; wanted at least its ", added, " new tokens", start > 0 ? " but those before its first key" : "");
    check_value(length <= room, "seq_lens[", s, "] is ", length, "; block_table has room for ", room);
    if (added == 0) continue;
    const int64_t first = start + first_visible(length - added, sliding_window);
    for (int64_t i = first / block_size; i * block_size < start + length; ++i) {
      const int32_t block = b.block_table.as<int32_t>()[s * max_blocks + i];
      check_value(block >= 0 && block < num_blocks, "block_table[", s, ", ", i, "] is ", block, "; wanted 0 to ",
                  num_blocks - 1);
    }
  }
}

struct Span {  // of one item
  int64_t sequence, token, num_tokens, kv_head, head, num_heads;
  int64_t begin_chunk, end_chunk;  // of the keys its rows see
  int64_t partial;                 // where its partial sums begin
};

// Partial sums are kept for at most this many floats, 32 MiB: past that there is work enough without.
constexpr int64_t kMaxPartial = int64_t{8} << 20;

// So many that threads end together.
constexpr int64_t kPiecesPerThread = 8;

struct Work {
  std::vector<Span> spans;
  int64_t partial_floats = 0;
  bool several_chunks = false;
};

Work split(const Tensor& q, const KvCache& cache, const AttentionBatch& b, int64_t sliding_window) {
  const int64_t kv_heads = cache.k.shape[1], group = q.shape[1] / kv_heads;
  const int64_t heads_per_item = std::min<int64_t>(group, kAttentionRows);
  const int64_t tokens_per_item = kAttentionRows / heads_per_item;
  Work work;
  for (int64_t s = 0; s < b.seq_lens.shape[0]; ++s) {
    const int64_t begin = b.cu_seqlens.as<int32_t>()[s], end = b.cu_seqlens.as<int32_t>()[s + 1];
    const int64_t first_position = b.seq_lens.as<int32_t>()[s] - (end - begin);
    for (int64_t kv = 0; kv < kv_heads; ++kv) {
      for (int64_t h = 0; h < group; h += heads_per_item) {
        for (int64_t t = begin; t < end; t += tokens_per_item) {
          Span span{};
          span.sequence = s, span.token = t, span.num_tokens = std::min(tokens_per_item, end - t);
          span.kv_head = kv, span.head = kv * group + h, span.num_heads = std::min(heads_per_item, group - h);
          const int64_t position = first_position + (t - begin);
          span.begin_chunk = first_visible(position, sliding_window) / kAttentionChunk;
          span.end_chunk = std::max<int64_t>(0, position + span.num_tokens - 1) / kAttentionChunk + 1;
          span.partial = work.partial_floats;
          const int64_t chunks = span.end_chunk - span.begin_chunk;
          work.partial_floats += chunks * span.num_tokens * span.num_heads * partial_size(q.shape[2]);
          work.several_chunks = work.several_chunks || chunks > 1;
          work.spans.push_back(span);
        }
      }
    }
  }
  return work;
}

struct Arguments {
  const Tensor& q;
  const KvCache& cache;
  const float* sinks;
  const AttentionBatch& b;
  float sm_scale;
  int64_t sliding_window;
  const Tensor& sink_share;
  const Tensor& y;
};

AttentionItem make_item(const Arguments& a, const Span& span) {
  const int64_t heads = a.q.shape[1], head_dim = a.q.shape[2];
  const int32_t* cu = a.b.cu_seqlens.as<int32_t>();
  AttentionItem item{};
  item.q = a.q.as<char>() + (span.token * a.q.stride[0] + span.head * head_dim) * dtype_size(a.q.dtype);
  item.q_dtype = a.q.dtype, item.q_token_stride = a.q.stride[0];
  item.y = a.y.as<char>() + (span.token * a.y.stride[0] + span.head * head_dim) * dtype_size(a.y.dtype);
  item.y_dtype = a.y.dtype, item.y_token_stride = a.y.stride[0];
  item.sink_share = a.sink_share ? a.sink_share.as<float>() + span.token * heads + span.head : nullptr;
  item.share_token_stride = heads;
  item.sinks = a.sinks + span.head;
  item.num_tokens = span.num_tokens, item.num_heads = span.num_heads, item.head_dim = head_dim;
  // The last new token stands at the sequence's last position.
  item.first_position = a.b.seq_lens.as<int32_t>()[span.sequence] - (cu[span.sequence + 1] - span.token);
  item.sliding_window = a.sliding_window, item.sm_scale = a.sm_scale;
  item.k = a.cache.k.data, item.v = a.cache.v.data, item.kv_dtype = a.cache.k.dtype;
  item.k_scales = a.cache.k_scales.as<float>(), item.v_scales = a.cache.v_scales.as<float>();
  item.k_rows = cache_rows(a.cache.k), item.v_rows = cache_rows(a.cache.v);
  item.kv_head = span.kv_head, item.block_size = a.cache.k.shape[2];
  item.blocks = a.b.block_table.as<int32_t>() + span.sequence * a.b.block_table.shape[1];
  item.key_start = key_start(a.b, span.sequence);
  item.begin_chunk = span.begin_chunk, item.end_chunk = span.end_chunk;
  return item;
}

// All spans at once, each from its first chunk to its last.
void attend_whole(const AttentionKernel& kernel, const Work& work, const Arguments& arguments) {
  parallel_for(static_cast<int64_t>(work.spans.size()),
               [&](int64_t i) { kernel.attend(make_item(arguments, work.spans[static_cast<size_t>(i)])); });
}

// Some chunks of a span at a time, each on its own, then the sums of each span's chunks in order: the same operations
// as above.
void attend_by_chunks(const AttentionKernel& kernel, const Work& work, const Arguments& arguments) {
  struct Piece {
    size_t span;
    int64_t begin_chunk, end_chunk;
  };
  int64_t all = 0;
  for (const Span& span : work.spans) all += span.end_chunk - span.begin_chunk;
  const int64_t some = std::max<int64_t>(all / (kPiecesPerThread * current_num_threads()), 1);
  std::vector<Piece> pieces;
  for (size_t i = 0; i < work.spans.size(); ++i) {
    const Span& span = work.spans[i];
    for (int64_t chunk = span.begin_chunk; chunk < span.end_chunk; chunk += some) {
      pieces.push_back({i, chunk, std::min(chunk + some, span.end_chunk)});
    }
  }
  const auto floats = static_cast<size_t>(work.partial_floats);
  Scratch scratch(Scratch::bytes<float>(floats));
  float* partial = scratch.take<float>(floats);
  const auto item_of = [&](const Span& span) {
    AttentionItem item = make_item(arguments, span);
    item.partial = partial + span.partial, item.partial_chunk = span.begin_chunk;
    return item;
  };
  parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    AttentionItem item = item_of(work.spans[piece.span]);
    item.begin_chunk = piece.begin_chunk, item.end_chunk = piece.end_chunk;
    kernel.attend(item);
  });
  parallel_for(static_cast<int64_t>(work.spans.size()),
               [&](int64_t i) { kernel.merge(item_of(work.spans[static_cast<size_t>(i)])); });
}

}  // namespace

void sink_attention(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& b,
                    float sm_scale, int64_t sliding_window, Activations activations, const Tensor& sink_share,
                    const Tensor& y) {
  check_sink_attention(q, cache, sinks, b, sm_scale, sliding_window, sink_share, y);
  check_batch(q, cache, b, sliding_window);

  std::vector<float> sinks_f32(static_cast<size_t>(q.shape[1]));
  for (size_t h = 0; h < sinks_f32.size(); ++h) {
    sinks_f32[h] = sinks.dtype == DType::f32 ? sinks.as<float>()[h] : to_float(sinks.as<bf16>()[h]);
  }
  const Work work = split(q, cache, b, sliding_window);
  const bool exact = activations == Activations::f32 || cache.k.dtype == DType::f32;
  const AttentionKernel& kernel = exact ? *f32.pick() : *bf16_dot.pick();
  const Arguments arguments{q, cache, sinks_f32.data(), b, sm_scale, sliding_window, sink_share, y};

  // Few spans of many keys leave threads without work; finer pieces also end together on a busy machine.
  const int threads = current_num_threads();
  const bool few = threads > 1 && static_cast<int64_t>(work.spans.size()) < kPiecesPerThread * threads;
  if (few && work.several_chunks && work.partial_floats <= kMaxPartial) {
    attend_by_chunks(kernel, work, arguments);
  } else {
    attend_whole(kernel, work, arguments);
  }
}

}  // namespace mxmoe
