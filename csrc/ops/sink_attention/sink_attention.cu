#include "ops/sink_attention/sink_attention.h"

#include <algorithm>
#include <type_traits>

#include "core/check.h"
#include "cuda/launch.h"
#include "ops/sink_attention/sink_attention_mma.cuh"
#include "ops/sink_attention/sink_attention_sm90.cuh"
#include "ops/sink_attention/sink_attention_simt.cuh"

namespace mxmoe {
namespace cuda {
namespace {

using attention::kChunk;
using attention::kMmaThreads;
using attention::kMmaWarps;
using attention::kTileRows;
using attention::Problem;

// Partial sums are kept for at most this many floats, 64 MiB: past that there is work enough without splitting.
constexpr int64_t kMaxPartial = int64_t{16} << 20;

// How many tiles there can be of so many rows each, whatever the sequences.
int64_t max_tiles(const Problem& p, int64_t num_tokens, int rows) {
  return ceil_div(num_tokens * p.group, rows) + (rows > 1 ? p.num_sequences : 0);
}

// How many chunks a tile of so many rows can see.
int64_t max_chunks(const Problem& p, int rows) {
  const int64_t all = ceil_div(p.max_seq_len, kChunk);
  if (p.sliding_window == 0) return all;
  const int64_t tokens = (rows - 1) / p.group + 2;  // rows begin anywhere within a token
  return std::min(all, ceil_div(p.sliding_window + tokens, kChunk) + 1);
}

// Room for the sums of every row's chunks, and a counter for each of so many tiles, unless that is too much or there
// is nothing to split.
bool prepare_split(Stream& stream, Problem& p, int64_t tiles, int64_t chunks) {
  const int64_t partial = int64_t{p.num_rows} * p.num_kv_heads * chunks * (p.head_dim + attention::kPartialTail);
  if (chunks <= 1 || partial > kMaxPartial) return false;
  p.max_chunks = static_cast<int>(chunks);
  p.partial = static_cast<float*>(
      stream.workspace(static_cast<size_t>(partial) * sizeof(float), "sink_attention's partial sums"));
  p.arrived = stream.counters(static_cast<size_t>(tiles * p.num_kv_heads));
  return true;
}

template <int kDim, typename Q, typename KV, typename Y>
void launch_mma(Stream& stream, Problem p, int64_t num_tokens) {
  constexpr size_t kBuffer = attention::Shape<kDim>::kBufferBytes;
  static_assert(attention::kSplitBuffers * kBuffer >= attention::kMergeBytes, "the merge has room");
  const int64_t tiles = max_tiles(p, num_tokens, kTileRows), chunks = max_chunks(p, kTileRows);
  const unsigned kv_heads = grid_depth(p.num_kv_heads);
  // Enough tiles for every multiprocessor's warps need no splitting.
  const int64_t warps = int64_t{device(stream.device()).multiprocessors} * 2 * kMmaWarps;
  if (tiles * p.num_kv_heads < warps && prepare_split(stream, p, tiles, chunks)) {
    record_kernel("sink_attention", "sink_attention_bf16_split_sm80_kernel");
    launch(attention::sink_attention_bf16_split_sm80_kernel<kDim, Q, KV, Y>,
           dim3(grid_size(tiles), kv_heads, grid_depth(ceil_div(chunks, kMmaWarps))), kMmaThreads,
           attention::kSplitBuffers * kBuffer, stream, Order::Dependent, p);
    return;
  }
  record_kernel("sink_attention", "sink_attention_bf16_sm80_kernel");
  launch(attention::sink_attention_bf16_sm80_kernel<kDim, Q, KV, Y>,
         dim3(grid_size(ceil_div(tiles, kMmaWarps)), kv_heads), kMmaThreads, attention::kBuffers * kBuffer, stream,
         Order::Dependent, p);
}

template <typename Q, typename Y>
void launch_sm90(Stream& stream, Problem p, int64_t num_tokens) {
  using attention::kGroupRows;
  const int64_t tiles = max_tiles(p, num_tokens, kGroupRows), chunks = max_chunks(p, kGroupRows);
  // Rows that would fill a block's tiles on every multiprocessor need no splitting. Tiles of one token each do: a
  // block has one sequence's, and all but one of its warpgroups nothing to do.
  const int64_t full_tiles = ceil_div(p.num_rows, kGroupRows) * p.num_kv_heads;
  const int64_t multiprocessors = device(stream.device()).multiprocessors;
  if (full_tiles < multiprocessors * attention::kGroups && prepare_split(stream, p, tiles, chunks)) {
    // No more blocks than run at once, as long as that leaves each a few chunks; then four times as many, whose ends
    // are less uneven.
    const int64_t at_once = multiprocessors * attention::kSplitBlocks, all = tiles * p.num_kv_heads * chunks;
    const int64_t of_block = all <= 4 * at_once ? ceil_div(all, at_once) : std::max<int64_t>(2, all / (4 * at_once));
    record_kernel("sink_attention", "sink_attention_bf16_split_sm90_kernel");
    launch(attention::sink_attention_bf16_split_sm90_kernel<Q, Y>,
           dim3(grid_size(tiles), grid_depth(p.num_kv_heads), grid_depth(ceil_div(chunks, of_block))),
           attention::kGroupThreads, attention::kSplitBytes, stream, Order::Dependent, p);
    return;
  }
  record_kernel("sink_attention", "sink_attention_bf16_sm90_kernel");
  launch(attention::sink_attention_bf16_sm90_kernel<Q, Y>,
         grid_size(max_tiles(p, num_tokens, attention::kBlockRows) * p.num_kv_heads), attention::kBlockThreads,
         attention::kManyBytes, stream, Order::Dependent, p);
}

template <typename Q, typename KV, typename Y>
void launch_simt(Stream& stream, const Problem& p, int64_t num_tokens) {
  const int64_t tiles = max_tiles(p, num_tokens, 1);
  record_kernel("sink_attention", "sink_attention_simt_sm80_kernel");
  launch(attention::sink_attention_simt_sm80_kernel<Q, KV, Y>,
         dim3(grid_size(ceil_div(tiles, attention::kSimtWarps)), grid_depth(p.num_kv_heads)), attention::kSimtThreads,
         attention::kSimtWarps * static_cast<size_t>(p.head_dim) * sizeof(float), stream, Order::Dependent, p);
}

template <typename Q, typename KV, typename Y>
void dispatch_width(Stream& stream, const Problem& p, int64_t num_tokens, bool tensor_cores) {
  if constexpr (std::is_same<KV, bf16>::value) {
    if (tensor_cores && p.head_dim == attention::kHopperDim && on_hopper(stream.device())) {
      return launch_sm90<Q, Y>(stream, p, num_tokens);
    }
  }
  if constexpr (!std::is_same<KV, float>::value) {
    if (tensor_cores && p.head_dim == 64) return launch_mma<64, Q, KV, Y>(stream, p, num_tokens);
    if (tensor_cores && p.head_dim == 32) return launch_mma<32, Q, KV, Y>(stream, p, num_tokens);
    if (tensor_cores && p.head_dim == 128) return launch_mma<128, Q, KV, Y>(stream, p, num_tokens);
  }
  launch_simt<Q, KV, Y>(stream, p, num_tokens);
}

template <typename Q, typename Y>
void dispatch(Stream& stream, const Problem& p, int64_t num_tokens, DType cache, bool tensor_cores) {
  if (cache == DType::f32) return dispatch_width<Q, float, Y>(stream, p, num_tokens, tensor_cores);
  if (cache == DType::i8) return dispatch_width<Q, int8_t, Y>(stream, p, num_tokens, tensor_cores);
  dispatch_width<Q, bf16, Y>(stream, p, num_tokens, tensor_cores);
}

bool takes_wide_reads(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

Problem describe(const Tensor& q, const KvCache& cache, const Tensor& sinks, const AttentionBatch& batch,
                 const Tensor& sink_share, const Tensor& y) {
  Problem p{};
  p.q = q.data, p.q_stride = q.stride[0];
  p.y = y.data, p.y_stride = y.stride[0];
  p.sink_share = sink_share ? sink_share.as<float>() : nullptr;
  if (sinks.dtype == DType::f32) p.sinks_f32 = sinks.as<float>();
  if (sinks.dtype == DType::bf16) p.sinks_bf16 = sinks.as<bf16>();
  p.k = cache.k.data, p.v = cache.v.data;
  if (cache.k_scales) p.k_scales = cache.k_scales.as<float>(), p.v_scales = cache.v_scales.as<float>();
  p.cu_seqlens = batch.cu_seqlens.as<int32_t>(), p.seq_lens = batch.seq_lens.as<int32_t>();
  p.block_table = batch.block_table.as<int32_t>();
  p.key_starts = batch.key_starts ? batch.key_starts.as<int32_t>() : nullptr;
  p.num_sequences = static_cast<int>(batch.seq_lens.shape[0]);
  p.max_blocks = static_cast<int>(batch.block_table.shape[1]);
  p.num_blocks = static_cast<int>(cache.k.shape[0]), p.block_size = static_cast<int>(cache.k.shape[2]);
  p.num_heads = static_cast<int>(q.shape[1]), p.num_kv_heads = static_cast<int>(cache.k.shape[1]);
  p.group = p.num_heads / p.num_kv_heads, p.head_dim = static_cast<int>(q.shape[2]);
  p.num_rows = static_cast<int>(q.shape[0]) * p.group;
  return p;
}

}  // namespace

void sink_attention(Stream& stream, const Tensor& q, const KvCache& cache, const Tensor& sinks,
                    const AttentionBatch& batch, int64_t max_seq_len, float sm_scale, int64_t sliding_window,
                    Activations activations, const Tensor& sink_share, const Tensor& y) {
  check_sink_attention(q, cache, sinks, batch, sm_scale, sliding_window, sink_share, y);
  check_contiguous("k_cache", cache.k);
  check_contiguous("v_cache", cache.v);
  const int64_t room = batch.block_table.shape[1] * cache.k.shape[2];
  constexpr int64_t kMost = int64_t{1} << 30;  // rows and keys are counted in 32 bits
  check_value(max_seq_len >= 0 && max_seq_len <= std::min(room, kMost), "max_seq_len is ", max_seq_len,
              "; block_table has room for ", std::min(room, kMost));
  check_value(q.shape[0] * q.shape[1] <= kMost && cache.k.shape[0] <= kMost, "q has ", q.shape[0],
              " tokens; wanted fewer");
  if (q.shape[0] == 0) return;
  Problem p = describe(q, cache, sinks, batch, sink_share, y);
  p.sm_scale = sm_scale, p.max_seq_len = static_cast<int>(max_seq_len);
  p.sliding_window = sliding_window <= kMost ? static_cast<int>(sliding_window) : 0;
  p.round_rows = activations != Activations::f32 && cache.k.dtype != DType::f32;
  const DType held = cache.k.dtype;
  const bool tensor_cores = p.round_rows && takes_wide_reads(cache.k) && takes_wide_reads(cache.v);
  const int64_t n = q.shape[0];
  if (q.dtype == DType::f32) {
    y.dtype == DType::f32 ? dispatch<float, float>(stream, p, n, held, tensor_cores)
                          : dispatch<float, bf16>(stream, p, n, held, tensor_cores);
  } else {
    y.dtype == DType::f32 ? dispatch<bf16, float>(stream, p, n, held, tensor_cores)
                          : dispatch<bf16, bf16>(stream, p, n, held, tensor_cores);
  }
}

}  // namespace cuda
}  // namespace mxmoe
