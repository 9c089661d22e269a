// Attention over a bfloat16 cache with tensor cores. A warp works alone: on a tile of 16 rows and one chunk of keys
// (the sums go to memory, and the block that comes last for a tile merges them), or on a tile and all its chunks one
// after the other. Keys and values come by cp.async into the warp's own buffers, in small steps; scores of a step
// become the weights that multiply the values without leaving registers.
#pragma once

#include "ops/sink_attention/sink_attention_rows.cuh"

namespace mxmoe {
namespace cuda {
namespace attention {

constexpr int kMmaWarps = 4;
constexpr int kMmaThreads = kMmaWarps * kWarp;
// Steps that are on their way or at work. A warp that has a chunk to itself wants nearly all of it at once: there is
// nothing else to hide the memory's latency behind.
constexpr int kBuffers = 2, kSplitBuffers = 3;

template <int kDim>
struct Shape {
  static constexpr int kStep = kDim <= 64 ? 32 : 16;   // keys: two buffers of four warps stay within 64 KiB
  static constexpr int kPieces = kDim / 8;             // of 16 bytes in a row
  static constexpr int kSideValues = kStep * kDim;     // keys or values of a step
  static constexpr int kWarpValues = 2 * kSideValues;  // of a buffer
  static constexpr size_t kBufferBytes = sizeof(bf16) * kMmaWarps * kWarpValues;
};

// Pieces of a row are permuted so that eight rows' pieces of one column lie in different banks.
template <int kDim>
__device__ __forceinline__ int piece_at(int row, int piece) {
  constexpr int kPieces = Shape<kDim>::kPieces;
  const int turn = kPieces >= 8 ? row & 7 : row / (8 / kPieces) & (kPieces - 1);
  return (row * kPieces + (piece ^ turn)) * 8;
}

template <int kDim>
struct Sums {
  Running row[2];  // of rows g and g + 8, g = lane / 4; denominators are each lane's own share until `close`
  float values[kDim / 8][4];
};

template <int kDim>
__device__ __forceinline__ void clear(Sums<kDim>& s) {
  s.row[0] = s.row[1] = {minus_infinity(), 0.0f};
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) s.values[i][0] = s.values[i][1] = s.values[i][2] = s.values[i][3] = 0.0f;
}

// The four lanes of a row add up its denominator.
template <int kDim>
__device__ __forceinline__ void close(Sums<kDim>& s) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    s.row[r].sum += __shfl_xor_sync(kAllLanes, s.row[r].sum, 1);
    s.row[r].sum += __shfl_xor_sync(kAllLanes, s.row[r].sum, 2);
  }
}

// Queries as the instruction's first operand.
template <int kDim, typename Q>
__device__ __forceinline__ void load_queries(const Problem& p, const Tile& tile, int kv_head,
                                             uint32_t (&q)[kDim / 16][4]) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = tile.first_row + g + part % 2 * 8, column = i * 16 + part / 2 * 8 + 2 * t;
      q[i][part] = 0;
      if (g + part % 2 * 8 >= tile.num_rows) continue;
      const Q* from = static_cast<const Q*>(p.q) + (int64_t{tile.first_token} + row / p.group) * p.q_stride +
                      (kv_head * p.group + row % p.group) * kDim + column;
      q[i][part] = ptx::pack_bf16(widen(from[0]), widen(from[1]));
    }
  }
}

// Keys and values of one step into a buffer; zeros for keys that no row sees, whatever the cache holds there.
template <int kDim>
__device__ __forceinline__ void fetch_step(const Problem& p, const Tile& tile, int kv_head, int first_key,
                                           bf16* buffer) {
  using S = Shape<kDim>;
  const bf16* k = static_cast<const bf16*>(p.k);
  const bf16* v = static_cast<const bf16*>(p.v);
#pragma unroll
  for (int i = 0; i < S::kStep * S::kPieces / kWarp; ++i) {
    const int number = i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
    const int row = number / S::kPieces, piece = number % S::kPieces, key = first_key + row;
    int64_t offset = -1;
    if (key >= tile.low && key < tile.high) offset = key_offset(p, tile, kv_head, key);
    const bool valid = offset >= 0;
    const int place = piece_at<kDim>(row, piece);
    ptx::cp_async_16(buffer + place, valid ? k + offset + piece * 8 : k, valid);
    ptx::cp_async_16(buffer + S::kSideValues + place, valid ? v + offset + piece * 8 : v, valid);
  }
}

// Which keys of a step exist, a bit each: within the tile's range, and in a block that the cache has.
template <int kDim>
__device__ __forceinline__ unsigned existing_keys(const Problem& p, const Tile& tile, int first_key) {
  const int row = static_cast<int>(threadIdx.x) % kWarp, key = first_key + row;
  bool exists = row < Shape<kDim>::kStep && key >= tile.low && key < tile.high;
  if (exists) exists = key_offset(p, tile, 0, key) >= 0;
  return __ballot_sync(kAllLanes, exists);
}

// One step's scores, weights and weighted values.
template <int kDim>
__device__ __forceinline__ void attend_step(const Problem& p, const Tile& tile, const uint32_t (&q)[kDim / 16][4],
                                            const bf16* buffer, int first_key, const int (&positions)[2],
                                            Sums<kDim>& s) {
  using S = Shape<kDim>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
  float scores[S::kStep / 8][4];
#pragma unroll
  for (int n = 0; n < S::kStep / 8; ++n) {
    scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, buffer + piece_at<kDim>(n * 8 + lane % 8, i * 4 + lane / 8));
      ptx::mma_bf16_m16n8k16(scores[n], q[2 * i], k[0], k[1]);
      ptx::mma_bf16_m16n8k16(scores[n], q[2 * i + 1], k[2], k[3]);
    }
  }
  const float scale = __fmul_rn(p.sm_scale, kLog2e);
  const unsigned existing = existing_keys<kDim>(p, tile, first_key);
  float largest[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
  for (int n = 0; n < S::kStep / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = n * 8 + 2 * t + c % 2;
      const bool seen = (existing >> column & 1u) != 0 && sees(p, positions[c / 2], first_key + column);
      scores[n][c] = seen ? __fmul_rn(scores[n][c], scale) : minus_infinity();
      largest[c / 2] = fmaxf(largest[c / 2], scores[n][c]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 1));
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 2));
    const float maximum = fmaxf(s.row[r].maximum, largest[r]);
    const float shrink = weight_of(s.row[r].maximum, maximum);
    s.row[r].maximum = maximum, s.row[r].sum = __fmul_rn(s.row[r].sum, shrink);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      s.values[i][2 * r] = __fmul_rn(s.values[i][2 * r], shrink);
      s.values[i][2 * r + 1] = __fmul_rn(s.values[i][2 * r + 1], shrink);
    }
  }
#pragma unroll
  for (int j = 0; j < S::kStep / 16; ++j) {
    uint32_t weights[4];  // as the first operand: rows g and g + 8 of the left, then the right eight keys
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float* pair = scores[2 * j + part / 2] + part % 2 * 2;
      const float maximum = s.row[part % 2].maximum;
      weights[part] = ptx::pack_bf16(weight_of(pair[0], maximum), weight_of(pair[1], maximum));
      s.row[part % 2].sum =
          __fadd_rn(s.row[part % 2].sum, __fadd_rn(widen_low(weights[part]), widen_high(weights[part])));
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(
          v, buffer + S::kSideValues + piece_at<kDim>(j * 16 + lane / 8 % 2 * 8 + lane % 8, i * 2 + lane / 16));
      ptx::mma_bf16_m16n8k16(s.values[2 * i], weights, v[0], v[1]);
      ptx::mma_bf16_m16n8k16(s.values[2 * i + 1], weights, v[2], v[3]);
    }
  }
}

// The keys of one chunk that the tile sees.
template <int kDim, int kDepth>
__device__ __forceinline__ void attend_chunk(const Problem& p, const Tile& tile, int kv_head,
                                             const uint32_t (&q)[kDim / 16][4], bf16* buffers, int chunk,
                                             Sums<kDim>& s) {
  using S = Shape<kDim>;
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int positions[2] = {position_of(p, tile, g), position_of(p, tile, g + 8)};
  clear(s);
  // Steps that no row of the tile sees would change nothing.
  const int begin = max(tile.low, chunk * kChunk) / S::kStep, last = min(tile.high, (chunk + 1) * kChunk);
  const int end = (last + S::kStep - 1) / S::kStep;
  const auto fetch = [&](int step) {
    bf16* buffer = buffers + (step - begin) % kDepth * S::kWarpValues;
    if (step < end) fetch_step<kDim>(p, tile, kv_head, step * S::kStep, buffer);
    ptx::cp_async_commit();  // also when empty, so that the count of groups stays that of steps
  };
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) fetch(begin + i);
  for (int step = begin; step < end; ++step) {
    fetch(step + kDepth - 1);
    ptx::cp_async_wait<kDepth - 1>();
    __syncwarp();  // what the other lanes fetched
    attend_step<kDim>(p, tile, q, buffers + (step - begin) % kDepth * S::kWarpValues, step * S::kStep, positions, s);
    __syncwarp();  // all have read what is overwritten next
  }
  close(s);
}

// Where a row's sums of one chunk stand: values, then maximum and denominator, and nothing to a multiple of 16 bytes.
constexpr int kPartialTail = 4;
__device__ __forceinline__ float* partial_row(const Problem& p, int tile, int kv_head, int chunk, int row) {
  const int64_t at = ((int64_t{tile} * p.num_kv_heads + kv_head) * p.max_chunks + chunk) * kTileRows + row;
  return p.partial + at * (p.head_dim + kPartialTail);
}

template <int kDim>
__device__ __forceinline__ void store_partial(const Problem& p, const Tile& tile, int number, int kv_head, int chunk,
                                              const Sums<kDim>& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    if (row >= tile.num_rows) continue;
    float* to = partial_row(p, number, kv_head, chunk, row);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      *reinterpret_cast<float2*>(to + i * 8 + 2 * (lane % 4)) =
          make_float2(s.values[i][2 * r], s.values[i][2 * r + 1]);
    }
    if (lane % 4 == 0) *reinterpret_cast<float2*>(to + kDim) = make_float2(s.row[r].maximum, s.row[r].sum);
  }
}

// A row's chunks in order, the sink last; kDim / 4 lanes a row, four values each. Many chunks are asked for at once,
// since each waits for the one before only in its arithmetic.
template <int kDim, typename Y>
__device__ __forceinline__ void merge_rows(const Problem& p, const Tile& tile, int number, int kv_head) {
  constexpr int kLanes = kDim / 4, kRows = kMmaThreads / kLanes, kAhead = 8;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int chunks = max(0, (tile.high + kChunk - 1) / kChunk - tile.low / kChunk);
  for (int row = static_cast<int>(threadIdx.x) / kLanes; row < tile.num_rows; row += kRows) {
    Running total{minus_infinity(), 0.0f};
    float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < chunks; first += kAhead) {
      float4 v[kAhead];
      float2 of_row[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float* from = partial_row(p, number, kv_head, min(first + i, chunks - 1), row);
        v[i] = __ldcg(reinterpret_cast<const float4*>(from) + lane);
        of_row[i] = __ldcg(reinterpret_cast<const float2*>(from + kDim));
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= chunks) continue;
        const Factors f = merge(total, {of_row[i].x, of_row[i].y});
        values = make_float4(merged(values.x, v[i].x, f), merged(values.y, v[i].y, f), merged(values.z, v[i].z, f),
                             merged(values.w, v[i].w, f));
      }
    }
    const int of_sequence = tile.first_row + row, head = kv_head * p.group + of_sequence % p.group;
    const int64_t token = int64_t{tile.first_token} + of_sequence / p.group;
    const Final final = add_sink(total, sink_of(p, head));
    Y* y = static_cast<Y*>(p.y) + token * p.y_stride + head * kDim + 4 * lane;
    const float scaled[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = narrow<Y>(__fmul_rn(scaled[i], final.scale));
    if (lane == 0 && p.sink_share != nullptr) p.sink_share[token * p.num_heads + head] = final.sink_share;
  }
}

// grid: (tile, key/value head, group of chunks). A warp a chunk; the block that is done last for its tile and head
// merges what all have left.
template <int kDim, typename Q, typename Y>
__global__ void __launch_bounds__(kMmaThreads) sink_attention_bf16_split_sm80_kernel(Problem p) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  bf16* buffers = reinterpret_cast<bf16*>(ptx::dynamic_shared()) + warp * kSplitBuffers * Shape<kDim>::kWarpValues;
  const int number = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const Tile tile = find_tile(p, number, kTileRows);
  const int first = tile.low / kChunk, chunks = (tile.high + kChunk - 1) / kChunk - first;
  const int blocks = max(1, (chunks + kMmaWarps - 1) / kMmaWarps);  // that have work here: one also without any key
  if (tile.num_rows == 0 || static_cast<int>(blockIdx.z) >= blocks) return;
  const int relative = static_cast<int>(blockIdx.z) * kMmaWarps + warp;
  if (relative < chunks) {
    uint32_t q[kDim / 16][4];
    load_queries<kDim, Q>(p, tile, kv_head, q);
    Sums<kDim> s;
    attend_chunk<kDim, kSplitBuffers>(p, tile, kv_head, q, buffers, first + relative, s);
    store_partial<kDim>(p, tile, number, kv_head, relative, s);
  }
  if (blocks > 1) {
    int* last = reinterpret_cast<int*>(ptx::dynamic_shared());
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* arrived = p.arrived + number * p.num_kv_heads + kv_head;
      *last = atomicAdd(arrived, 1u) == static_cast<unsigned>(blocks) - 1u;
      if (*last) *arrived = 0;  // as the next launch wants it
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
  } else {
    __syncthreads();
  }
  merge_rows<kDim, Y>(p, tile, number, kv_head);
}

// grid: (group of tiles, key/value head). A warp a tile with all its chunks.
template <int kDim, typename Q, typename Y>
__global__ void __launch_bounds__(kMmaThreads) sink_attention_bf16_sm80_kernel(Problem p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  bf16* buffers = reinterpret_cast<bf16*>(ptx::dynamic_shared()) + warp * kBuffers * Shape<kDim>::kWarpValues;
  const int kv_head = static_cast<int>(blockIdx.y);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const Tile tile = find_tile(p, static_cast<int>(blockIdx.x) * kMmaWarps + warp, kTileRows);
  if (tile.num_rows == 0) return;
  uint32_t q[kDim / 16][4];
  load_queries<kDim, Q>(p, tile, kv_head, q);
  Sums<kDim> total, s;
  clear(total);
  for (int chunk = tile.low / kChunk; chunk * kChunk < tile.high; ++chunk) {
    attend_chunk<kDim, kBuffers>(p, tile, kv_head, q, buffers, chunk, s);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Factors f = merge(total.row[r], s.row[r]);
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        total.values[i][2 * r] = merged(total.values[i][2 * r], s.values[i][2 * r], f);
        total.values[i][2 * r + 1] = merged(total.values[i][2 * r + 1], s.values[i][2 * r + 1], f);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    if (row >= tile.num_rows) continue;
    const int of_sequence = tile.first_row + row, head = kv_head * p.group + of_sequence % p.group;
    const int64_t token = int64_t{tile.first_token} + of_sequence / p.group;
    const Final final = add_sink(total.row[r], sink_of(p, head));
    Y* y = static_cast<Y*>(p.y) + token * p.y_stride + head * kDim + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      y[i * 8] = narrow<Y>(__fmul_rn(total.values[i][2 * r], final.scale));
      y[i * 8 + 1] = narrow<Y>(__fmul_rn(total.values[i][2 * r + 1], final.scale));
    }
    if (lane % 4 == 0 && p.sink_share != nullptr) p.sink_share[token * p.num_heads + head] = final.sink_share;
  }
}

}  // namespace attention
}  // namespace cuda
}  // namespace mxmoe
