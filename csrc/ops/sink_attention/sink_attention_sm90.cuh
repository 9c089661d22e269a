// Attention over a bfloat16 cache on Hopper, head_dim 64. A warpgroup multiplies a tile of 64 rows by chunks of 128
// keys with wgmma: all scores of a chunk, then, with the maximum of the whole chunk, its weighted values from
// nothing. Both kernels below do that with the same instructions in the same order, so a row's bits are the same in
// either.
//
// Many rows: three warpgroups take neighbouring tiles and share each chunk, 32 KB, in a ring of stages. They fetch by
// turns, and meet nowhere but at a stage's two barriers, so that one's exponentials, which take as long as its
// products, run beside another's products.
// Few rows: a warpgroup takes chunks of a tile, each for itself. Their sums go to memory, and the block that comes
// last for the tile merges them.
#pragma once

#include "ops/sink_attention/sink_attention_mma.cuh"

namespace mxmoe {
namespace cuda {
namespace attention {

constexpr int kHopperDim = 64;
constexpr int kGroupRows = 64, kGroupThreads = 4 * kWarp;  // of a warpgroup
constexpr int kGroups = 3;
constexpr int kBlockRows = kGroups * kGroupRows, kBlockThreads = kGroups * kGroupThreads;
constexpr int kRowBytes = kHopperDim * 2, kPattern = 8 * kRowBytes;  // of the 128-byte swizzle
constexpr int kSideBytes = kChunk * kRowBytes, kChunkBytes = 2 * kSideBytes;
constexpr int kWords = kChunk / 32;  // with a bit for each key of a chunk

constexpr int kStages = 6;
// A chunk is asked for so many chunks before its turn, and published to the others so many before: what lies between
// is its time to come, what is left of the ring is by how much a warpgroup may lag behind.
constexpr int kAskAhead = 4, kPublishAhead = 2;
static_assert(kAskAhead - kPublishAhead < kGroups, "a warpgroup has one chunk at a time on its way");
constexpr size_t kManyBytes =
    size_t{kStages} * (kChunkBytes + kWords * sizeof(uint32_t) + 2 * sizeof(uint64_t)) + sizeof(Tile);

// Few rows: one chunk at work and one on its way, and as many blocks to a multiprocessor as have room.
constexpr int kSplitStages = 2, kSplitBlocks = 3;
constexpr size_t kSplitBytes = kSplitStages * (kChunkBytes + kWords * sizeof(uint32_t));
static_assert(kSplitBytes >= kMergeBytes, "the merge has room");

// Rows [first, first + rows) of a tile.
__device__ __forceinline__ Tile part_of(const Problem& p, const Tile& tile, int first, int rows) {
  Tile part = tile;
  part.first_row += first;
  part.num_rows = max(0, min(rows, tile.num_rows - first));
  if (part.num_rows == 0) return part;
  part.high = min(position_of(p, part, part.num_rows - 1) + 1, tile.high);
  part.low = first_visible(p, position_of(p, part, 0));
  return part;
}

// How the scores of a call become powers of 2. The factor is positive, so that the largest score of a row is known
// before any is multiplied; what sign it had, or that it was zero, has gone into the queries, exactly.
struct Scale {
  float factor;
  uint32_t of_queries;  // 1, -1 or 0 twice, in bfloat16
};
__device__ __forceinline__ Scale scale_of(const Problem& p) {
  const float factor = __fmul_rn(fabsf(p.sm_scale), kLog2e);
  if (factor == 0.0f) return {1.0f, 0u};
  return {factor, p.sm_scale < 0.0f ? 0xbf80bf80u : 0x3f803f80u};
}

template <typename Q>
__device__ __forceinline__ void load_scaled_queries(const Problem& p, const Tile& rows, int kv_head,
                                                    const Scale& scale, Queries<kHopperDim, bf16>& q) {
  load_queries<kHopperDim, Q>(p, rows, kv_head, q);
#pragma unroll
  for (int i = 0; i < kHopperDim / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) q.q[i][part] = ptx::mul_bf16x2(q.q[i][part], scale.of_queries);
  }
}

// Keys 32 w .. of a chunk are warp w's to fetch. Where lane's one lies, or -1 when no row of the tile sees it.
__device__ __forceinline__ int64_t find_key(const Problem& p, const Tile& tile, int kv_head, int chunk) {
  const int key = chunk * kChunk + static_cast<int>(threadIdx.x) % kGroupThreads;
  return key >= tile.low && key < tile.high ? key_row(p, tile, kv_head, key) : -1;
}

// A warp's 32 keys, or their values, where wgmma wants them; zeros where there are none. Eight lanes a row.
__device__ __forceinline__ void fetch_rows(const void* from, int64_t found, unsigned char* side) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp % 4;
  const bf16* values = static_cast<const bf16*>(from);
  const int piece = lane % 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int of_warp = 4 * i + lane / 8, row = 32 * warp + of_warp;
    const int64_t at = __shfl_sync(kAllLanes, found, of_warp);
    const bool valid = at >= 0;
    ptx::cp_async_16(side + row * kRowBytes + (piece ^ row % 8) * 16,
                     valid ? values + at * kHopperDim + piece * 8 : values, valid);
  }
}

// Which keys of the warp's 32 there are, to the chunk's words.
__device__ __forceinline__ void write_existing(int64_t found, uint32_t* existing) {
  const unsigned word = __ballot_sync(kAllLanes, found >= 0);
  if (threadIdx.x % kWarp == 0) existing[threadIdx.x / kWarp % 4] = word;
}

// The scores of a chunk, and its weighted values: asked for, not waited for. wgmma gives a row the same bits whatever
// the others hold.
__device__ __forceinline__ void ask_scores(const Queries<kHopperDim, bf16>& q, const unsigned char* keys,
                                           float (&scores)[kChunk / 2]) {
  ptx::wgmma_hold(scores);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kHopperDim / 16; ++i) {
    ptx::wgmma_bf16<kChunk>(scores, q.q[i], ptx::matrix_descriptor(keys + 32 * i, kPattern), i > 0);
  }
  ptx::wgmma_commit();
}

using Weights = uint32_t[kChunk / 16][4];  // as wgmma's first operand

template <int kBegin, int kEnd>
__device__ __forceinline__ void ask_values(const Weights& weights, const unsigned char* values,
                                           float (&sums)[kHopperDim / 2]) {
  ptx::wgmma_fence();
#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) {
    ptx::wgmma_bf16<kHopperDim, true>(sums, weights[i], ptx::matrix_descriptor(values + 2 * i * kPattern, kPattern),
                                      i > 0);
  }
  ptx::wgmma_commit();
}

// Scores of keys that a thread's two rows do not see become those of nothing.
__device__ __forceinline__ void mask_scores(const Problem& p, const int (&positions)[2], int first_key,
                                            const uint32_t* existing, float (&scores)[kChunk / 2]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Of the chunk's keys [first, end), a bit each, moved so that the thread's columns stand at fixed bits.
    const int first = first_visible(p, positions[r]) - first_key, end = positions[r] + 1 - first_key;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int from = max(0, first - 32 * w), to = min(32, end - 32 * w);
      const uint32_t seen = from < to ? (0xffffffffu >> (32 - (to - from))) << from : 0u;
      const uint32_t bits = (seen & existing[w]) >> (2 * t);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * (4 * w + n) + 2 * r + e];
          if ((bits >> (8 * n + e) & 1u) == 0) score = minus_infinity();
        }
      }
    }
  }
}

// The maximum of row r over the chunk, the same in the four lanes that share it, times the factor.
template <int r>
__device__ __forceinline__ float row_maximum(const float (&scores)[kChunk / 2], const Scale& scale) {
  float largest = minus_infinity();
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    largest = fmaxf(largest, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
  }
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  return __fmul_rn(largest, scale.factor);
}

// Weights of row r for keys [16 kBegin, 16 kEnd) of the chunk, rounded, and what the thread's own add to the
// denominator.
template <int r, int kBegin, int kEnd>
__device__ __forceinline__ void weigh(const float (&scores)[kChunk / 2], const Scale& scale, Running& row,
                                      Weights& weights) {
  // Of a row that sees nothing every score is minus infinity, and 2^(score - 0) nothing, too.
  const float base = row.maximum == minus_infinity() ? 0.0f : -row.maximum;
#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* pair = scores + 4 * (2 * i + half) + 2 * r;
      const uint32_t both = ptx::pack_bf16(ptx::exp2_approx(__fmaf_rn(pair[0], scale.factor, base)),
                                           ptx::exp2_approx(__fmaf_rn(pair[1], scale.factor, base)));
      row.sum = __fadd_rn(row.sum, __fadd_rn(widen_low(both), widen_high(both)));
      weights[i][2 * half + r] = both;
    }
  }
}

// Accumulators of a chunk's values as sums; the four lanes of a row add up its denominator.
__device__ __forceinline__ void take_values(const float (&values)[kHopperDim / 2], Sums<kHopperDim>& chunk) {
#pragma unroll
  for (int i = 0; i < kHopperDim / 2; ++i) chunk.values[i / 4][i % 4] = values[i];
  close(chunk);
}

// A chunk's keys on their way to a stage, and its values behind them.
__device__ __forceinline__ void ask_chunk(const Problem& p, const Tile& tile, int kv_head, int chunk,
                                          unsigned char* stage, uint32_t* existing) {
  const int64_t found = find_key(p, tile, kv_head, chunk);
  fetch_rows(p.k, found, stage);
  ptx::cp_async_commit();
  fetch_rows(p.v, found, stage + kSideBytes);
  ptx::cp_async_commit();
  write_existing(found, existing);
}

// What all have copied but for the last kLeft groups of each can be multiplied.
template <int kLeft>
__device__ __forceinline__ void receive() {
  ptx::cp_async_wait<kLeft>();
  ptx::fence_proxy_async();
  __syncthreads();
}

// The sums of one chunk for a warp's rows; the next chunk may be on its way. A warp without rows multiplies zeros.
__device__ __forceinline__ void attend_alone(const Problem& p, const Queries<kHopperDim, bf16>& q, const Scale& scale,
                                             const Tile& rows, int first_key, const unsigned char* stage,
                                             const uint32_t* existing, Sums<kHopperDim>& sums) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int positions[2] = {position_of(p, rows, g), position_of(p, rows, g + 8)};
  float scores[kChunk / 2], of_chunk[kHopperDim / 2];
  Weights weights = {};
  clear(sums);
  receive<3>();
  ask_scores(q, stage, scores);
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(scores);
  if (rows.num_rows > 0) {
    mask_scores(p, positions, first_key, existing, scores);
    sums.row[0].maximum = row_maximum<0>(scores, scale);
    weigh<0, 0, kChunk / 16>(scores, scale, sums.row[0], weights);
  }
  if (rows.num_rows > 8) {
    sums.row[1].maximum = row_maximum<1>(scores, scale);
    weigh<1, 0, kChunk / 16>(scores, scale, sums.row[1], weights);
  }
  receive<2>();
  ptx::wgmma_hold(of_chunk);
  ask_values<0, kChunk / 16>(weights, stage + kSideBytes, of_chunk);
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(of_chunk);
  take_values(of_chunk, sums);
}

// Few rows. grid: (tile, key/value head, chunks by turns).
template <typename Q, typename Y>
__global__ void __launch_bounds__(kGroupThreads, kSplitBlocks) sink_attention_bf16_split_sm90_kernel(Problem p) {
#if MXMOE_HOPPER
  unsigned char* stages = ptx::dynamic_shared();
  uint32_t* existing = reinterpret_cast<uint32_t*>(stages + kSplitStages * kChunkBytes);
  const int number = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y);
  const int turn = static_cast<int>(blockIdx.z), turns = static_cast<int>(gridDim.z);
  ptx::release_next_kernel();
  ptx::wait_for_previous_kernel();
  const Tile tile = find_tile(p, number, kGroupRows);
  const int chunks = chunks_of(tile), blocks = max(1, min(chunks, turns)), first = tile.low / kChunk;
  if (tile.num_rows == 0 || turn >= blocks) return;
  // Which warp has a tile's only rows differs from block to block, and with it whose exponentials they are.
  const int warp = (static_cast<int>(threadIdx.x) / kWarp + turn) % 4;
  const Tile rows = part_of(p, tile, 16 * warp, 16);
  if (turn < chunks) ask_chunk(p, tile, kv_head, first + turn, stages, existing);
  const Scale scale = scale_of(p);
  Queries<kHopperDim, bf16> q;
  load_scaled_queries<Q>(p, rows, kv_head, scale, q);
  for (int chunk = turn, stage = 0; chunk < chunks; chunk += turns, stage ^= 1) {
    if (chunk + turns < chunks) {
      ask_chunk(p, tile, kv_head, first + chunk + turns, stages + (stage ^ 1) * kChunkBytes,
                existing + (stage ^ 1) * kWords);
    } else {
      ptx::cp_async_commit(), ptx::cp_async_commit();  // so that the count of groups stays that of chunks
    }
    Sums<kHopperDim> sums;
    attend_alone(p, q, scale, rows, (first + chunk) * kChunk, stages + stage * kChunkBytes, existing + stage * kWords,
                 sums);
    store_partial<kHopperDim>(p, rows, kv_head, chunk, sums);
    __syncthreads();  // all have used the stage
  }
  unsigned* arrived = p.arrived + number * p.num_kv_heads + kv_head;
  if (!is_last_block(arrived, blocks, reinterpret_cast<int*>(stages + kFactorBytes))) return;
  merge_rows<kHopperDim, Y>(p, tile, kv_head, reinterpret_cast<float4*>(stages));
#endif
}

// What the warpgroups of many rows share: of each stage keys and values, which of them there are, and two barriers;
// and the rows of the block, for which there are no registers.
struct Ring {
  unsigned char* stages;
  uint32_t* existing;  // [kStages][kWords]
  uint64_t *full, *empty;
  Tile* block;
  __device__ __forceinline__ explicit Ring(unsigned char* shared)
      : stages(shared),
        existing(reinterpret_cast<uint32_t*>(shared + kStages * kChunkBytes)),
        full(reinterpret_cast<uint64_t*>(existing + kStages * kWords)),
        empty(full + kStages),
        block(reinterpret_cast<Tile*>(empty + kStages)) {}
};

// Before a warpgroup takes the chunk of number `i`, counted from the block's first, it asks for one that comes later
// or tells the others that what it has asked for is there, when it is its turn.
__device__ __forceinline__ void serve(const Problem& p, int kv_head, const Ring& ring, int i, int chunks) {
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  const int asked = i + kAskAhead, published = i + kPublishAhead;
  if (published >= 0 && published < chunks && published % kGroups == group) {
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ptx::phase_arrive(ring.full + published % kStages);
  }
  if (asked < chunks && asked % kGroups == group) {
    const int stage = asked % kStages;
    if (asked >= kStages) ptx::phase_wait(ring.empty + stage, (asked / kStages + 1) % 2);
    const int64_t found = find_key(p, *ring.block, kv_head, ring.block->low / kChunk + asked);
    unsigned char* keys = ring.stages + stage * kChunkBytes;
    fetch_rows(p.k, found, keys);
    fetch_rows(p.v, found, keys + kSideBytes);
    ptx::cp_async_commit();
    write_existing(found, ring.existing + stage * kWords);
  }
}

// The keys that all rows of a tile see: [first, end).
struct SeenByAll {
  int first, end;
  __device__ __forceinline__ SeenByAll(const Problem& p, const Tile& tile)
      : first(first_visible(p, position_of(p, tile, tile.num_rows - 1))),
        end(min(position_of(p, tile, 0) + 1, tile.high)) {}
  __device__ __forceinline__ bool holds(int first_key, const uint32_t* existing) const {
    const uint4 words = *reinterpret_cast<const uint4*>(existing);
    return first_key >= first && first_key + kChunk <= end && (words.x & words.y & words.z & words.w) == 0xffffffffu;
  }
};

// Adds the chunk that lies in a stage to a tile's sums, and leaves the stage.
__device__ __forceinline__ void attend_stage(const Problem& p, const Queries<kHopperDim, bf16>& q, const Scale& scale,
                                             const SeenByAll& all, const int (&positions)[2], int first_key,
                                             const Ring& ring, int stage, Sums<kHopperDim>& total) {
  constexpr int kHalf = kChunk / 32;
  const unsigned char* keys = ring.stages + stage * kChunkBytes;
  const uint32_t* existing = ring.existing + stage * kWords;
  float scores[kChunk / 2], of_chunk[kHopperDim / 2];
  Sums<kHopperDim> chunk;
  Weights weights;
  ask_scores(q, keys, scores);
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(scores);
  if (!all.holds(first_key, existing)) mask_scores(p, positions, first_key, existing, scores);
  chunk.row[0] = {row_maximum<0>(scores, scale), 0.0f};
  chunk.row[1] = {row_maximum<1>(scores, scale), 0.0f};
  weigh<0, 0, kHalf>(scores, scale, chunk.row[0], weights);
  weigh<1, 0, kHalf>(scores, scale, chunk.row[1], weights);
  // The first half's products run beside the second half's exponentials.
  ptx::wgmma_hold(of_chunk);
  ask_values<0, kHalf>(weights, keys + kSideBytes, of_chunk);
  weigh<0, kHalf, 2 * kHalf>(scores, scale, chunk.row[0], weights);
  weigh<1, kHalf, 2 * kHalf>(scores, scale, chunk.row[1], weights);
  ask_values<kHalf, 2 * kHalf>(weights, keys + kSideBytes, of_chunk);
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(of_chunk);
  if (threadIdx.x % kWarp == 0) ptx::phase_arrive(ring.empty + stage);
  take_values(of_chunk, chunk);
  add_chunk(total, chunk);
}

// Many rows. grid: groups of three tiles by key/value heads; the last tiles first, since they see most.
template <typename Q, typename Y>
__global__ void __launch_bounds__(kBlockThreads, 1) sink_attention_bf16_sm90_kernel(Problem p) {
#if MXMOE_HOPPER
  const Ring ring(ptx::dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), group = thread / kGroupThreads, warp = thread / kWarp % 4;
  const int kv_head = static_cast<int>(blockIdx.x) % p.num_kv_heads;
  const int number = static_cast<int>(gridDim.x / p.num_kv_heads) - 1 - static_cast<int>(blockIdx.x) / p.num_kv_heads;
  ptx::release_next_kernel();
  if (thread < kStages) {
    ptx::phase_init(ring.full + thread, 4);             // warps that fetch it
    ptx::phase_init(ring.empty + thread, 4 * kGroups);  // and that use it
  }
  ptx::wait_for_previous_kernel();
  const Tile block = find_tile(p, number, kBlockRows);
  if (block.num_rows == 0) return;
  if (thread == 0) *ring.block = block;
  __syncthreads();  // the barriers are there
  const Tile tile = part_of(p, block, group * kGroupRows, kGroupRows), rows = part_of(p, tile, 16 * warp, 16);
  const int g = thread % kWarp / 4, chunks = chunks_of(block);
  const int positions[2] = {position_of(p, rows, g), position_of(p, rows, g + 8)};
  const int first = block.low / kChunk, own_chunks = tile.num_rows > 0 ? chunks_of(tile) : 0;
  const int own = tile.low / kChunk - first;
  const SeenByAll all(p, tile);
  const Scale scale = scale_of(p);
  Queries<kHopperDim, bf16> q;
  load_scaled_queries<Q>(p, rows, kv_head, scale, q);
  Sums<kHopperDim> total;
  clear(total);
  for (int i = -kAskAhead; i < chunks; ++i) {
    serve(p, kv_head, ring, i, chunks);
    if (i < 0) continue;
    const int stage = i % kStages;
    // Also by who does not see it, so that nobody releases a stage twice before it is filled again.
    ptx::phase_wait(ring.full + stage, i / kStages % 2);
    if (i >= own && i < own + own_chunks) {
      attend_stage(p, q, scale, all, positions, (first + i) * kChunk, ring, stage, total);
    } else {
      __syncwarp();  // all of the warp have seen it full
      if (thread % kWarp == 0) ptx::phase_arrive(ring.empty + stage);
    }
  }
  const Tile again = part_of(p, *ring.block, group * kGroupRows + 16 * warp, 16);
  write_rows<kHopperDim, Y>(p, again, kv_head, total);
#endif
}

}  // namespace attention
}  // namespace cuda
}  // namespace mxmoe
