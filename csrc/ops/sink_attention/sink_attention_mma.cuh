// Attention over a bfloat16 or int8 cache with tensor cores. A warp works alone: on a tile of 16 rows and one chunk
// of keys (the sums go to memory, and the block that comes last for a tile merges them), or on a tile and all its
// chunks one after the other. Keys and values come by cp.async into the warp's own buffers, in small steps; scores of
// a step become the weights that multiply the values without leaving registers.
#pragma once

#include <type_traits>

#include "ops/sink_attention/sink_attention_merge.cuh"

namespace mxmoe {
namespace cuda {
namespace attention {

constexpr int kMmaWarps = 4;
constexpr int kMmaThreads = kMmaWarps * kWarp;
static_assert(kMmaThreads == kMergeThreads, "the last block merges with all its threads");
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

// Queries as the instruction's first operand. For an int8 cache they are whole numbers of up to 14 bits times a row's
// scale, in two parts that bfloat16 holds: multiples of 128 up to 16256, and what is left, 64 at most.
template <int kDim, typename KV>
struct Queries {
  uint32_t q[kDim / 16][4];
};
template <int kDim>
struct Queries<kDim, int8_t> {
  uint32_t q[kDim / 16][4], rest[kDim / 16][4];
  float scale[2];  // of rows g and g + 8
};

// A pair of a row's values, as `part` of the operand's register `i`; zeros past the tile's rows.
template <int kDim, typename Q>
__device__ __forceinline__ float2 query_pair(const Problem& p, const Tile& tile, int kv_head, int i, int part) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4 + part % 2 * 8, t = static_cast<int>(threadIdx.x) % 4;
  if (g >= tile.num_rows) return make_float2(0.0f, 0.0f);
  const int row = tile.first_row + g, column = i * 16 + part / 2 * 8 + 2 * t;
  const Q* from = static_cast<const Q*>(p.q) + (int64_t{tile.first_token} + row / p.group) * p.q_stride +
                  (kv_head * p.group + row % p.group) * kDim + column;
  return make_float2(widen(from[0]), widen(from[1]));
}

template <int kDim, typename Q>
__device__ __forceinline__ void load_queries(const Problem& p, const Tile& tile, int kv_head,
                                             Queries<kDim, bf16>& to) {
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float2 pair = query_pair<kDim, Q>(p, tile, kv_head, i, part);
      to.q[i][part] = ptx::pack_bf16(pair.x, pair.y);
    }
  }
}

template <int kDim, typename Q>
__device__ __forceinline__ void load_queries(const Problem& p, const Tile& tile, int kv_head,
                                             Queries<kDim, int8_t>& to) {
  float largest[2] = {}, not_finite[2] = {};
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float2 pair = query_pair<kDim, Q>(p, tile, kv_head, i, part);
      largest[part % 2] = fmaxf(largest[part % 2], fmaxf(fabsf(pair.x), fabsf(pair.y)));
      not_finite[part % 2] =
          __fadd_rn(not_finite[part % 2], __fadd_rn(__fmul_rn(pair.x, 0.0f), __fmul_rn(pair.y, 0.0f)));
    }
  }
  QueryScale scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int other = 1; other <= 2; ++other) {
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], other));
      not_finite[r] = __fadd_rn(not_finite[r], __shfl_xor_sync(kAllLanes, not_finite[r], other));
    }
    scale[r] = query_scale(largest[r], not_finite[r]);
    to.scale[r] = scale[r].scale;
  }
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float2 pair = query_pair<kDim, Q>(p, tile, kv_head, i, part);  // again: nobody holds that many registers
      const float x = scale[part % 2].code(pair.x), y = scale[part % 2].code(pair.y);
      const float high_x = rintf(x / 128.0f) * 128.0f, high_y = rintf(y / 128.0f) * 128.0f;
      to.q[i][part] = ptx::pack_bf16(high_x, high_y), to.rest[i][part] = ptx::pack_bf16(x - high_x, y - high_y);
    }
  }
}

// Keys and values of one step into a buffer, as they are; zeros for keys that no row sees, whatever the cache holds
// there. bfloat16 is permuted for the tensor cores' reads, int8 will be when it is widened.
template <int kDim, typename KV>
__device__ __forceinline__ void fetch_step(const Problem& p, const Tile& tile, int kv_head, int first_key,
                                           KV* buffer) {
  using S = Shape<kDim>;
  constexpr int kOfPiece = 16 / static_cast<int>(sizeof(KV)), kPieces = kDim / kOfPiece;
  const KV* k = static_cast<const KV*>(p.k);
  const KV* v = static_cast<const KV*>(p.v);
#pragma unroll
  for (int i = 0; i < (S::kStep * kPieces + kWarp - 1) / kWarp; ++i) {
    const int number = i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
    const int row = number / kPieces, piece = number % kPieces, key = first_key + row;
    int64_t found = -1;
    if (key >= tile.low && key < tile.high) found = key_row(p, tile, kv_head, key);
    const bool valid = found >= 0;
    const int64_t offset = found * kDim + piece * kOfPiece;
    const int place = sizeof(KV) == 1 ? number * kOfPiece : piece_at<kDim>(row, piece);
    ptx::cp_async_16(buffer + place, valid ? k + offset : k, valid);
    ptx::cp_async_16(buffer + S::kSideValues + place, valid ? v + offset : v, valid);
  }
}

// Four int8 codes as bfloat16, exactly: a byte with its sign flipped, under the exponent of 2^23, is that much more
// than the code plus 128.
__device__ __forceinline__ uint2 widen_codes(uint32_t codes) {
  const uint32_t raised = codes ^ 0x80808080u;
  float value[4];
#pragma unroll
  for (unsigned j = 0; j < 4; ++j) {
    value[j] = __fsub_rn(__uint_as_float(__byte_perm(raised, 0x4b000000u, 0x7440u + j)), 8388736.0f);
  }
  return make_uint2(ptx::pack_bf16(value[0], value[1]), ptx::pack_bf16(value[2], value[3]));
}

// Both sides of a step from int8, in order, to bfloat16, permuted.
template <int kDim>
__device__ __forceinline__ void widen_step(const int8_t* from, bf16* to) {
  using S = Shape<kDim>;
  constexpr int kPieces = kDim / 16, kAll = 2 * S::kStep * kPieces;
#pragma unroll
  for (int i = 0; i < kAll / kWarp; ++i) {
    const int number = i * kWarp + static_cast<int>(threadIdx.x) % kWarp, row = number / kPieces % S::kStep;
    const uint4 codes = *reinterpret_cast<const uint4*>(from + number * 16);
    bf16* side = to + number / (S::kStep * kPieces) * S::kSideValues;
    const uint2 a = widen_codes(codes.x), b = widen_codes(codes.y), c = widen_codes(codes.z),
                d = widen_codes(codes.w);
    const int piece = number % kPieces * 2;
    *reinterpret_cast<uint4*>(side + piece_at<kDim>(row, piece)) = make_uint4(a.x, a.y, b.x, b.y);
    *reinterpret_cast<uint4*>(side + piece_at<kDim>(row, piece + 1)) = make_uint4(c.x, c.y, d.x, d.y);
  }
}

// The scales of the key of this lane's number in a step, and of its value; zeros where there is none.
struct KeyScales {
  float k, v;
};
template <int kDim>
__device__ __forceinline__ KeyScales load_scales(const Problem& p, const Tile& tile, int kv_head, int first_key) {
  const int number = static_cast<int>(threadIdx.x) % kWarp, key = first_key + number;
  int64_t row = -1;
  if (number < Shape<kDim>::kStep && key >= tile.low && key < tile.high) row = key_row(p, tile, kv_head, key);
  if (row < 0) return {0.0f, 0.0f};
  return {p.k_scales[row], p.v_scales[row]};
}

// Which keys of a step exist, a bit each: within the tile's range, and in a block that the cache has.
template <int kDim>
__device__ __forceinline__ unsigned existing_keys(const Problem& p, const Tile& tile, int first_key) {
  const int row = static_cast<int>(threadIdx.x) % kWarp, key = first_key + row;
  bool exists = row < Shape<kDim>::kStep && key >= tile.low && key < tile.high;
  if (exists) exists = key_row(p, tile, 0, key) >= 0;
  return __ballot_sync(kAllLanes, exists);
}

// One step's scores, weights and weighted values. `of_key` are of an int8 cache, the scales of lane's key.
template <int kDim, typename KV>
__device__ __forceinline__ void attend_step(const Problem& p, const Tile& tile, const Queries<kDim, KV>& q,
                                            const bf16* buffer, int first_key, const int (&positions)[2],
                                            KeyScales of_key, Sums<kDim>& s) {
  using S = Shape<kDim>;
  constexpr bool kInt8 = std::is_same<KV, int8_t>::value;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
  float scores[S::kStep / 8][4];
#pragma unroll
  for (int n = 0; n < S::kStep / 8; ++n) {
    scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, buffer + piece_at<kDim>(n * 8 + lane % 8, i * 4 + lane / 8));
      ptx::mma_bf16_m16n8k16(scores[n], q.q[2 * i], k[0], k[1]);
      ptx::mma_bf16_m16n8k16(scores[n], q.q[2 * i + 1], k[2], k[3]);
      if constexpr (kInt8) {
        ptx::mma_bf16_m16n8k16(scores[n], q.rest[2 * i], k[0], k[1]);
        ptx::mma_bf16_m16n8k16(scores[n], q.rest[2 * i + 1], k[2], k[3]);
      }
    }
  }
  float scale[2] = {__fmul_rn(p.sm_scale, kLog2e), __fmul_rn(p.sm_scale, kLog2e)};
  if constexpr (kInt8) scale[0] = __fmul_rn(scale[0], q.scale[0]), scale[1] = __fmul_rn(scale[1], q.scale[1]);
  const unsigned existing = existing_keys<kDim>(p, tile, first_key);
  float largest[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
  for (int n = 0; n < S::kStep / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = n * 8 + 2 * t + c % 2;
      if constexpr (kInt8) scores[n][c] = __fmul_rn(scores[n][c], __shfl_sync(kAllLanes, of_key.k, column));
      const bool seen = (existing >> column & 1u) != 0 && sees(p, positions[c / 2], first_key + column);
      scores[n][c] = seen ? __fmul_rn(scores[n][c], scale[c / 2]) : minus_infinity();
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
      float a = weight_of(pair[0], maximum), b = weight_of(pair[1], maximum);
      weights[part] = ptx::pack_bf16(a, b);
      if constexpr (kInt8) {  // the denominator takes weights as they are; the values' scales join before rounding
        const int column = (2 * j + part / 2) * 8 + 2 * t;
        weights[part] = ptx::pack_bf16(scaled_weight(a, __shfl_sync(kAllLanes, of_key.v, column)),
                                       scaled_weight(b, __shfl_sync(kAllLanes, of_key.v, column + 1)));
      } else {
        a = widen_low(weights[part]), b = widen_high(weights[part]);
      }
      s.row[part % 2].sum = __fadd_rn(s.row[part % 2].sum, __fadd_rn(a, b));
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
template <int kDim, typename KV, int kDepth>
__device__ __forceinline__ void attend_chunk(const Problem& p, const Tile& tile, int kv_head,
                                             const Queries<kDim, KV>& q, bf16* buffers, int chunk, Sums<kDim>& s) {
  // int8 comes to buffers behind a first one, in which a step is widened: with two or more they are not more memory.
  constexpr bool kInt8 = std::is_same<KV, int8_t>::value;
  KV* const arriving = reinterpret_cast<KV*>(buffers + (kInt8 ? Shape<kDim>::kWarpValues : 0));
  using S = Shape<kDim>;
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int positions[2] = {position_of(p, tile, g), position_of(p, tile, g + 8)};
  clear(s);
  // Steps that no row of the tile sees would change nothing.
  const int begin = max(tile.low, chunk * kChunk) / S::kStep, last = min(tile.high, (chunk + 1) * kChunk);
  const int end = (last + S::kStep - 1) / S::kStep;
  const auto fetch = [&](int step) {
    KV* buffer = arriving + (step - begin) % kDepth * S::kWarpValues;
    if (step < end) fetch_step<kDim, KV>(p, tile, kv_head, step * S::kStep, buffer);
    ptx::cp_async_commit();  // also when empty, so that the count of groups stays that of steps
  };
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) fetch(begin + i);
  KeyScales next{};
  if (kInt8 && begin < end) next = load_scales<kDim>(p, tile, kv_head, begin * S::kStep);
  for (int step = begin; step < end; ++step) {
    fetch(step + kDepth - 1);
    ptx::cp_async_wait<kDepth - 1>();
    __syncwarp();  // what the other lanes fetched
    const KV* arrived = arriving + (step - begin) % kDepth * S::kWarpValues;
    const KeyScales of_key = next;
    if constexpr (kInt8) {
      if (step + 1 < end) next = load_scales<kDim>(p, tile, kv_head, (step + 1) * S::kStep);
      widen_step<kDim>(arrived, buffers);
      __syncwarp();  // what the other lanes widened
      attend_step<kDim, KV>(p, tile, q, buffers, step * S::kStep, positions, of_key, s);
    } else {
      attend_step<kDim, KV>(p, tile, q, arrived, step * S::kStep, positions, of_key, s);
    }
    __syncwarp();  // all have read what is overwritten next
  }
  close(s);
}

template <int kDim>
__device__ __forceinline__ void store_partial(const Problem& p, const Tile& tile, int kv_head, int chunk,
                                              const Sums<kDim>& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    if (row >= tile.num_rows) continue;
    const int64_t at = partial_at(p, tile, kv_head, row) + chunk;
    float* to = partial_values(p, at);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      *reinterpret_cast<float2*>(to + i * 8 + 2 * (lane % 4)) =
          make_float2(s.values[i][2 * r], s.values[i][2 * r + 1]);
    }
    if (lane % 4 == 0) *partial_row(p, at) = make_float2(s.row[r].maximum, s.row[r].sum);
  }
}

// A tile's rows when all their chunks are in the sums.
template <int kDim, typename Y>
__device__ __forceinline__ void write_rows(const Problem& p, const Tile& tile, int kv_head, const Sums<kDim>& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
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
      y[i * 8] = narrow<Y>(scaled(total.values[i][2 * r], final));
      y[i * 8 + 1] = narrow<Y>(scaled(total.values[i][2 * r + 1], final));
    }
    if (lane % 4 == 0 && p.sink_share != nullptr) p.sink_share[token * p.num_heads + head] = final.sink_share;
  }
}

// The sums of the next chunk join those so far.
template <int kDim>
__device__ __forceinline__ void add_chunk(Sums<kDim>& total, const Sums<kDim>& chunk) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Factors f = merge(total.row[r], chunk.row[r]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      total.values[i][2 * r] = merged(total.values[i][2 * r], chunk.values[i][2 * r], f);
      total.values[i][2 * r + 1] = merged(total.values[i][2 * r + 1], chunk.values[i][2 * r + 1], f);
    }
  }
}

// grid: (tile, key/value head, group of chunks). A warp a chunk; the block that is done last for its tile and head
// merges what all have left.
template <int kDim, typename Q, typename KV, typename Y>
__global__ void __launch_bounds__(kMmaThreads) sink_attention_bf16_split_sm80_kernel(Problem p) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  bf16* buffers = reinterpret_cast<bf16*>(ptx::dynamic_shared()) + warp * kSplitBuffers * Shape<kDim>::kWarpValues;
  const int number = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const Tile tile = find_tile(p, number, kTileRows);
  const int chunks = chunks_of(tile);
  const int blocks = max(1, (chunks + kMmaWarps - 1) / kMmaWarps);  // that have work here: one also without any key
  if (tile.num_rows == 0 || static_cast<int>(blockIdx.z) >= blocks) return;
  const int relative = static_cast<int>(blockIdx.z) * kMmaWarps + warp;
  if (relative < chunks) {
    Queries<kDim, KV> q;
    load_queries<kDim, Q>(p, tile, kv_head, q);
    Sums<kDim> s;
    attend_chunk<kDim, KV, kSplitBuffers>(p, tile, kv_head, q, buffers, tile.low / kChunk + relative, s);
    store_partial<kDim>(p, tile, kv_head, relative, s);
  }
  unsigned char* shared = ptx::dynamic_shared();
  unsigned* arrived = p.arrived + number * p.num_kv_heads + kv_head;
  if (!is_last_block(arrived, blocks, reinterpret_cast<int*>(shared + kFactorBytes))) return;
  merge_rows<kDim, Y>(p, tile, kv_head, reinterpret_cast<float4*>(shared));
}

// grid: (group of tiles, key/value head). A warp a tile with all its chunks.
template <int kDim, typename Q, typename KV, typename Y>
__global__ void __launch_bounds__(kMmaThreads) sink_attention_bf16_sm80_kernel(Problem p) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  bf16* buffers = reinterpret_cast<bf16*>(ptx::dynamic_shared()) + warp * kBuffers * Shape<kDim>::kWarpValues;
  const int kv_head = static_cast<int>(blockIdx.y);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const Tile tile = find_tile(p, static_cast<int>(blockIdx.x) * kMmaWarps + warp, kTileRows);
  if (tile.num_rows == 0) return;
  Queries<kDim, KV> q;
  load_queries<kDim, Q>(p, tile, kv_head, q);
  Sums<kDim> total, s;
  clear(total);
  for (int chunk = tile.low / kChunk; chunk * kChunk < tile.high; ++chunk) {
    attend_chunk<kDim, KV, kBuffers>(p, tile, kv_head, q, buffers, chunk, s);
    add_chunk(total, s);
  }
  write_rows<kDim, Y>(p, tile, kv_head, total);
}

}  // namespace attention
}  // namespace cuda
}  // namespace mxmoe
