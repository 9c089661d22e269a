/*
 * mxmoe.h: the kernels of mxmoe for programs that are not Python. Plain C99, also valid C++.
 *
 * Arrays     Whoever calls owns all memory; nothing is copied or kept after a call. An array is described by an
 *            mxmoe_tensor and passed by pointer. NULL stands for one that is left out; each declaration names those
 *            that may be ("or NULL"). "float" below is float32 or bfloat16, on each array's own account.
 * Layout     Row-major. The last axis is contiguous; "row stride" (or "token stride") means that the first axis may
 *            be any number of elements apart; otherwise arrays are contiguous. No stride is negative. data is aligned
 *            to its items; it may be NULL when a size is 0.
 * Overlap    Arrays that are written overlap no other argument, unless a declaration says that out may be x itself
 *            (the same data, dtype and strides).
 * Errors     Every function that can fail returns a status: MXMOE_OK, or what went wrong, and then
 *            mxmoe_last_error() is one sentence that names the argument, what came and what was wanted. All
 *            arguments are checked first: a call that fails has written nothing (MXMOE_OUT_OF_MEMORY and
 *            MXMOE_INTERNAL_ERROR apart). No C++ exception leaves the library.
 * Threads    Every function may be called from any thread. Calls that spread their work share one pool of workers
 *            and queue up for it. Results do not depend on the number of threads, nor a row's bits on the other rows
 *            of the batch; they may differ in the last bits between instruction sets. Nor do they depend on the
 *            caller's floating-point settings (rounding, subnormals flushed, traps), which are left as they are.
 * Memory     Working memory is kept for each calling thread and grows to what its largest call needed.
 * Rounding   `activations` says what activations are rounded to as they meet the weights: FLOAT32 nothing; BF16
 *            bfloat16; INT8 127 steps of the largest magnitude of each block of 32. Weights enter exactly, sums are
 *            float32. Conversions to bfloat16 round to nearest, ties to even. On CPUs without fast bfloat16 dot
 *            products BF16 meets MXFP4 and int8 weights as 16-bit integers: what is below a 128th of the power of two
 *            in its block's largest magnitude is rounded to 2^-14 of that power, in addition (of the next power where
 *            that magnitude's eight bits are all ones).
 */
#ifndef MXMOE_H
#define MXMOE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32) && defined(MXMOE_BUILDING_LIBRARY)
#define MXMOE_API __declspec(dllexport)
#elif defined(_WIN32)
#define MXMOE_API __declspec(dllimport)
#elif defined(__GNUC__)
#define MXMOE_API __attribute__((visibility("default")))
#else
#define MXMOE_API
#endif

/* ---- Version, status, machine ---------------------------------------------------------------------------------- */

/* Raised whenever a program compiled against an older header would break. */
#define MXMOE_ABI_VERSION 1

/* Status of a call. */
enum {
  MXMOE_OK = 0,
  MXMOE_TYPE_ERROR = 1,     /* a dtype that is not taken, or NULL where it may not be */
  MXMOE_VALUE_ERROR = 2,    /* a shape, stride, alignment, value or overlap that does not fit */
  MXMOE_OUT_OF_MEMORY = 3,  /* no working memory, or no thread, to be had */
  MXMOE_INTERNAL_ERROR = 4, /* a defect of the library */
};

/* Version of the package, such as "0.1.0". */
MXMOE_API const char* mxmoe_version(void);

/* MXMOE_VALUE_ERROR unless the library has the ABI of the header: call mxmoe_check_abi(MXMOE_ABI_VERSION) once,
 * first, where the library is found at run time. */
MXMOE_API int mxmoe_check_abi(int abi_version);

/* What the last call that failed in this thread said, "" before any did. Valid until the next one fails there.
 * At most 1023 bytes of UTF-8. */
MXMOE_API const char* mxmoe_last_error(void);

/* Threads of the calls made from this thread, itself among them: 0 (the default, as many as the process has CPUs) to
 * 1024. A process that forks may go on calling in the child. */
MXMOE_API int mxmoe_set_num_threads(int num_threads);
MXMOE_API int mxmoe_get_num_threads(int* num_threads);

/* The instruction set in force for the whole process: "scalar", "avx2", "avxvnni" (AVX2 with AVX-VNNI), "avx512base"
 * (without VNNI and BF16), "avx512vnni" (without BF16) or "avx512"; the best this CPU has unless the environment
 * variable MXMOE_ISA, read when first needed, or mxmoe_set_isa says otherwise. "" returns to the default. What is
 * unknown or lacking here is MXMOE_VALUE_ERROR, never another one. Names that are given out are valid for ever. */
MXMOE_API int mxmoe_set_isa(const char* name);
MXMOE_API int mxmoe_get_isa(const char** name);
/* Whether this CPU has that instruction set: 1 or 0. */
MXMOE_API int mxmoe_has_isa(const char* name, int* has);

/* The kernel of a dispatch table that ran last in this process, such as "rmsnorm_avx2" of "rmsnorm"; NULL before any
 * did. `mxmoe doctor` lists the tables. */
MXMOE_API int mxmoe_last_kernel(const char* table, const char** name);

/* ---- Arrays ---------------------------------------------------------------------------------------------------- */

enum {
  MXMOE_FLOAT32 = 1,
  MXMOE_FLOAT64 = 2,
  MXMOE_BFLOAT16 = 3, /* the upper half of a float32 */
  MXMOE_INT8 = 4,
  MXMOE_UINT8 = 5,
  MXMOE_INT32 = 6,
  MXMOE_INT64 = 7,
};

#define MXMOE_MAX_DIMS 4

typedef struct mxmoe_tensor {
  void* data; /* inputs are not written */
  int dtype;
  int ndim; /* 1 to 4 */
  int64_t shape[MXMOE_MAX_DIMS];
  int64_t stride[MXMOE_MAX_DIMS]; /* in elements; that of an axis of one element is not looked at */
} mxmoe_tensor;

/* A contiguous array of ndim axes; for ndim above 4 what any call refuses. */
static inline mxmoe_tensor mxmoe_contiguous(const void* data, int dtype, int ndim, const int64_t* shape) {
  mxmoe_tensor tensor;
  int64_t stride = 1;
  int i;
  tensor.data = (void*)(uintptr_t)data;
  tensor.dtype = dtype;
  tensor.ndim = ndim;
  for (i = MXMOE_MAX_DIMS - 1; i >= 0; --i) {
    tensor.shape[i] = i < ndim ? shape[i] : 0;
    tensor.stride[i] = i < ndim ? stride : 0;
    if (i < ndim) stride = (int64_t)((uint64_t)stride * (uint64_t)shape[i]); /* wraps; the library checks sizes */
  }
  return tensor;
}

/* `activations` of the calls below. */
enum {
  MXMOE_ACTIVATIONS_FLOAT32 = 0,
  MXMOE_ACTIVATIONS_BF16 = 1,
  MXMOE_ACTIVATIONS_INT8 = 2,
};

/* ---- Embedding, normalisation, rotary positions ---------------------------------------------------------------- */

/* out[t] = weight[token_ids[t]].
 *   token_ids (num_tokens) int64, within [0, vocab_size), contiguous
 *   weight    (vocab_size, hidden_size) float; row stride
 *   out       (num_tokens, hidden_size) float32; row stride */
MXMOE_API int mxmoe_embedding(const mxmoe_tensor* token_ids, const mxmoe_tensor* weight, const mxmoe_tensor* out);

/* out = x / sqrt(mean(x^2) + eps) * weight, by row. Computed in float32, rounded once. Zhang and Sennrich 2019.
 *   x, out    (num_tokens, hidden_size) float; row stride; out may be x itself
 *   weight    (hidden_size) float
 *   eps       finite, 0 or more */
MXMOE_API int mxmoe_rmsnorm(const mxmoe_tensor* x, const mxmoe_tensor* weight, float eps, const mxmoe_tensor* out);

/* Frequencies of rotary position embedding in radians per token, YaRN-scaled when factor is above 1 (Peng et al.
 * 2023, sections 3.2 and 3.4), and in *scaling what cos and sin are multiplied by.
 *   theta     above 1
 *   factor    by how much the context is extended, 1 or more
 *   original_max_position_embeddings   the context before, in tokens, 1 or more
 *   beta_fast >= beta_slow > 0         rotations within it above which a frequency stays, below which it is divided
 *   truncate  not 0: the range of blended dimensions is rounded outwards to whole numbers
 *   inv_freq  (head_dim / 2) float64, written; head_dim is even and at most 65536 */
MXMOE_API int mxmoe_rope_inv_freq(int64_t head_dim, double theta, double factor,
                                  int64_t original_max_position_embeddings, double beta_fast, double beta_slow,
                                  int truncate, const mxmoe_tensor* inv_freq, double* scaling);

/* cos and sin of positions * inv_freq, times scaling. Angles are float64.
 *   positions (num_tokens) int64, 0 or more
 *   inv_freq  (head_dim / 2) float64
 *   cos, sin  (num_tokens, head_dim / 2) float32, written */
MXMOE_API int mxmoe_rope_cos_sin(const mxmoe_tensor* positions, const mxmoe_tensor* inv_freq, double scaling,
                                 const mxmoe_tensor* cos, const mxmoe_tensor* sin);

/* Rotary position embedding, half-split: with x1, x2 the halves of a head, x1 cos - x2 sin and x2 cos + x1 sin.
 * Computed in float32, rounded once. Su et al. 2021, section 3.4.2.
 *   x, out    (num_tokens, num_heads, head_dim) float, head_dim even; token stride; out may be x itself
 *   cos, sin  (num_tokens, head_dim / 2) float32 */
MXMOE_API int mxmoe_rope(const mxmoe_tensor* x, const mxmoe_tensor* cos, const mxmoe_tensor* sin,
                         const mxmoe_tensor* out);

/* ---- Dense layers ---------------------------------------------------------------------------------------------- */

/* out = x weight^T + bias + residual.
 *   x         (num_tokens, in_features) float; row stride
 *   weight    (out_features, in_features) bfloat16, or int8 with in_features a multiple of 32; row stride. Or packed
 *             by mxmoe_pack_linear (then, as with scales, any strides but the last axis's), with the same result to
 *             the last bit
 *   scales    (out_features, in_features / 32) bfloat16 with int8 weights; NULL with bfloat16 ones; row stride
 *   bias      (out_features) float, or NULL
 *   activations   INT8 with bfloat16 weights rounds to bfloat16. Subnormal bfloat16 counts as zero where the CPU's
 *             bf16 dot product does that
 *   residual  (num_tokens, out_features) float32, or NULL; row stride
 *   out       (num_tokens, out_features) float32; row stride; may be residual itself */
MXMOE_API int mxmoe_linear(const mxmoe_tensor* x, const mxmoe_tensor* weight, const mxmoe_tensor* scales,
                           const mxmoe_tensor* bias, int activations, const mxmoe_tensor* residual,
                           const mxmoe_tensor* out);

typedef struct mxmoe_linear_weights {
  const mxmoe_tensor *weight, *scales, *bias; /* as in mxmoe_linear; scales and bias or NULL */
} mxmoe_linear_weights;

/* num_layers (1 or more) layers of the same x, their results side by side: what mxmoe_linear gives for each, to the
 * last bit, but x is rounded once and the work shared out together. Errors call the arguments of layer i weight[i],
 * scales[i] and bias[i].
 *   out       (num_tokens, sum of out_features) float32; row stride */
MXMOE_API int mxmoe_linear_group(const mxmoe_tensor* x, const mxmoe_linear_weights* layers, int64_t num_layers,
                                 int activations, const mxmoe_tensor* out);

/* ---- Mixture of experts ---------------------------------------------------------------------------------------- */

/* For every token the experts_per_token largest logits in descending order, equal ones by lower index, NaN last, and
 * the softmax over those alone. gpt-oss model card (arXiv 2508.10925), section 2.2.
 *   router_logits (num_tokens, num_experts) float32, num_experts at most 65536; row stride
 *   topk_ids      (num_tokens, experts_per_token) int32, written
 *   topk_weights  (num_tokens, experts_per_token) float32, written */
MXMOE_API int mxmoe_expert_routing(const mxmoe_tensor* router_logits, const mxmoe_tensor* topk_ids,
                                   const mxmoe_tensor* topk_weights);

/* The (token, choice) pairs sorted by expert, stably: expert e owns order[expert_offsets[e]] up to, without it,
 * order[expert_offsets[e + 1]], a pair being token * experts_per_token + choice.
 *   topk_ids       (num_tokens, experts_per_token) int32, within [0, num_experts)
 *   num_experts    1 to 65536
 *   expert_offsets (num_experts + 1) int32, written
 *   order          (num_tokens * experts_per_token) int32, written */
MXMOE_API int mxmoe_expert_offsets(const mxmoe_tensor* topk_ids, int64_t num_experts,
                                   const mxmoe_tensor* expert_offsets, const mxmoe_tensor* order);

/* MXFP4 (OCP Microscaling v1.0, section 5): blocks of 32 e2m1 codes along the last axis, two to a byte, low nibble
 * first, with one e8m0 scale byte a block. No scale byte is 255 (NaN): who loads weights checks that. Blocks and
 * scales may be packed by mxmoe_pack_mxfp4, those of both matrices alike. */
typedef struct mxmoe_moe_weights {
  const mxmoe_tensor* gate_up_blocks; /* (num_experts, 2 * intermediate_size, hidden_size / 32, 16) uint8; gate and up
                                         rows alternate */
  const mxmoe_tensor* gate_up_scales; /* (num_experts, 2 * intermediate_size, hidden_size / 32) uint8 */
  const mxmoe_tensor* gate_up_bias;   /* (num_experts, 2 * intermediate_size) float */
  const mxmoe_tensor* down_blocks;    /* (num_experts, hidden_size, intermediate_size / 32, 16) uint8 */
  const mxmoe_tensor* down_scales;    /* (num_experts, hidden_size, intermediate_size / 32) uint8 */
  const mxmoe_tensor* down_bias;      /* (num_experts, hidden_size) float */
} mxmoe_moe_weights;

#define MXMOE_SWIGLU_ALPHA 1.702f /* of gpt-oss */
#define MXMOE_SWIGLU_LIMIT 7.0f

/* out = residual + sum_c topk_weights[:, c] * expert(topk_ids[:, c], x), in the order of the choices, with, in an
 * expert, g = W1 x + b1; gate = min(g[0::2], limit); up = clamp(g[1::2], -limit, limit);
 * W2 (gate * sigmoid(alpha * gate) * (up + 1)) + b2.
 *   x            (num_tokens, hidden_size) float; row stride. hidden_size and intermediate_size multiples of 32
 *   topk_ids     (num_tokens, experts_per_token) int32, 0 or more. Those outside [first_expert, first_expert +
 *                num_experts) contribute nothing, so that holders of different ranges can add up their results
 *   topk_weights (num_tokens, experts_per_token) float32
 *   activations  what x and the SwiGLU's result are rounded to, once each
 *   swiglu_alpha finite; swiglu_limit above 0; first_expert 0 or more
 *   residual     (num_tokens, hidden_size) float32, or NULL; row stride
 *   out          (num_tokens, hidden_size) float32; row stride; may be residual itself */
MXMOE_API int mxmoe_mxfp4_moe(const mxmoe_tensor* x, const mxmoe_tensor* topk_ids, const mxmoe_tensor* topk_weights,
                              const mxmoe_moe_weights* weights, int activations, float swiglu_alpha,
                              float swiglu_limit, int64_t first_expert, const mxmoe_tensor* residual,
                              const mxmoe_tensor* out);

/* ---- Attention ------------------------------------------------------------------------------------------------- */

/* A paged cache (Kwon et al. 2023): slot = block * block_size + offset in the block. */
typedef struct mxmoe_kv_cache {
  const mxmoe_tensor *k, *v;               /* (num_blocks, num_key_value_heads, block_size, head_dim), both float32,
                                              bfloat16 or int8 */
  const mxmoe_tensor *k_scales, *v_scales; /* (num_blocks, num_key_value_heads, block_size) float32 with an int8
                                              cache, else NULL */
} mxmoe_kv_cache;

/* Copies the keys and values of new tokens into their slots, rounding to the cache's dtype; int8 to round(x / scale)
 * with scale = amax / 127 of the token's head. Of two tokens for one slot the later stays.
 *   k, v      (num_tokens, num_key_value_heads, head_dim) float; finite with an int8 cache; token stride
 *   cache     written; contiguous
 *   slots     (num_tokens) int64, within [0, num_blocks * block_size) */
MXMOE_API int mxmoe_kv_cache_write(const mxmoe_tensor* k, const mxmoe_tensor* v, const mxmoe_kv_cache* cache,
                                   const mxmoe_tensor* slots);

/* The sequences of a call. Sequence b has the new tokens [cu_seqlens[b], cu_seqlens[b + 1]) and seq_lens[b] keys, its
 * new tokens' own included. */
typedef struct mxmoe_attention_batch {
  const mxmoe_tensor* block_table; /* (num_sequences, max_blocks) int32: the cache block of places [i * block_size,
                                      (i + 1) * block_size); entries without a visible key are not looked at */
  const mxmoe_tensor* cu_seqlens;  /* (num_sequences + 1) int32, from 0 to num_tokens */
  const mxmoe_tensor* seq_lens;    /* (num_sequences) int32 */
  const mxmoe_tensor* key_starts;  /* (num_sequences) int32, the place of each sequence's first key, what lies before
                                      being padding; or NULL for 0. A new token before it sees nothing and gives 0 */
} mxmoe_attention_batch;

/* Causal grouped-query attention with sinks: with s_j = sm_scale * q . k_j over the visible keys,
 * out = sum_j exp(s_j - m) v_j / (sum_j exp(s_j - m) + exp(sink - m)). gpt-oss model card, section 2.3; Xiao et al.
 * 2023; Dao 2023, section 3.1.
 *   q         (num_tokens, num_attention_heads, head_dim) float, the new tokens of all sequences one after the other;
 *             num_attention_heads a multiple of num_key_value_heads, head_dim at most 256; token stride
 *   cache     the new tokens' keys and values included; any strides that are multiples of head_dim, but int8, which
 *             is contiguous
 *   sinks     (num_attention_heads) float
 *   sm_scale  finite, usually head_dim^-0.5
 *   sliding_window   visible keys, the query's own included; 0 for all
 *   activations   FLOAT32, and any with a float32 cache, rounds nothing before out. The others, which are one here,
 *             round queries for a bfloat16 cache to bfloat16, for an int8 cache to 1 / 16256 of a head's largest
 *             magnitude, and the weights exp(s_j - m) to bfloat16, or for some processors' int8 caches finer, as they
 *             multiply the values; the denominator sums the weights of a bfloat16 cache as rounded
 *   sink_share    (num_tokens, num_attention_heads) float32, written: the sink's share of each softmax; or NULL
 *   out       shape of q, float; token stride */
MXMOE_API int mxmoe_sink_attention(const mxmoe_tensor* q, const mxmoe_kv_cache* cache, const mxmoe_tensor* sinks,
                                   const mxmoe_attention_batch* batch, float sm_scale, int64_t sliding_window,
                                   int activations, const mxmoe_tensor* sink_share, const mxmoe_tensor* out);

/* ---- Weights: quantising and packing --------------------------------------------------------------------------- */

/* value = e2m1[code] * 2^(scale - 127), exactly; scale byte 255 gives NaN.
 *   blocks    (rows, k / 32, 16) uint8
 *   scales    (rows, k / 32) uint8
 *   out       (rows, k) float, written */
MXMOE_API int mxmoe_mxfp4_dequantize(const mxmoe_tensor* blocks, const mxmoe_tensor* scales, const mxmoe_tensor* out);

/* Per block of 32 the scale 2^(floor(log2(amax)) - 2), codes to nearest, ties to the even code, saturating at 6; a
 * block of zeros gets scale byte 0. OCP Microscaling v1.0, section 6.3.
 *   x         (rows, k) float, finite, k a multiple of 32; row stride
 *   blocks    (rows, k / 32, 16) uint8, written
 *   scales    (rows, k / 32) uint8, written */
MXMOE_API int mxmoe_mxfp4_quantize(const mxmoe_tensor* x, const mxmoe_tensor* blocks, const mxmoe_tensor* scales);

/* Per block of 32 the scale amax / 127 rounded up to bfloat16, codes round(x / scale), ties to even.
 *   x         (rows, k) float, finite, k a multiple of 32; row stride
 *   codes     (rows, k) int8, written, within [-127, 127]
 *   scales    (rows, k / 32) bfloat16, written */
MXMOE_API int mxmoe_int8_quantize(const mxmoe_tensor* x, const mxmoe_tensor* codes, const mxmoe_tensor* scales);

/* `weights` of the call below. */
enum {
  MXMOE_WEIGHTS_MXFP4 = 0,
  MXMOE_WEIGHTS_BF16 = 1,
  MXMOE_WEIGHTS_INT8 = 2,
};

/* Whether the kernels in force are made for such weights packed, with these activations: 1 or 0. With 0 they take
 * packed weights, too, but read stored ones faster. */
MXMOE_API int mxmoe_prefers_packed(int activations, int weights, int* prefers);

/* MXFP4 weights to panels of sixteen rows, and back. An expert's matrix at a time, or all, one after another.
 *   blocks        (rows, k / 32, 16) uint8, rows a multiple of 16
 *   scales        (rows, k / 32) uint8
 *   packed        (rows / 16, k / 32, 256) uint8, any strides but the last axis's
 *   packed_scales (rows / 16, k / 32, 16) uint8, likewise
 * Memory is read fastest when a block's scales lie right behind it: both arrays in one buffer with 272 bytes from
 * block to block. */
MXMOE_API int mxmoe_pack_mxfp4(const mxmoe_tensor* blocks, const mxmoe_tensor* scales, const mxmoe_tensor* packed,
                               const mxmoe_tensor* packed_scales);
MXMOE_API int mxmoe_unpack_mxfp4(const mxmoe_tensor* packed, const mxmoe_tensor* packed_scales,
                                 const mxmoe_tensor* blocks, const mxmoe_tensor* scales);

/* The same for dense weights; scales only with int8 ones, else NULL.
 *   weight        (rows, k) bfloat16 or int8, rows a multiple of 16, k of 32
 *   scales        (rows, k / 32) bfloat16
 *   packed        (rows / 16, k / 32, 512) bfloat16, or uint8 for int8 weights (raised by 128)
 *   packed_scales (rows / 16, k / 32, 16) bfloat16
 * Strides as above: one buffer with 544 bytes from block to block is read fastest. */
MXMOE_API int mxmoe_pack_linear(const mxmoe_tensor* weight, const mxmoe_tensor* scales, const mxmoe_tensor* packed,
                                const mxmoe_tensor* packed_scales);
MXMOE_API int mxmoe_unpack_linear(const mxmoe_tensor* packed, const mxmoe_tensor* packed_scales,
                                  const mxmoe_tensor* weight, const mxmoe_tensor* scales);

#ifdef __cplusplus
}
#endif

#endif /* MXMOE_H */
