/*
 * A mixture-of-experts layer and an attention layer through mxmoe.h, each checked against plain C.
 *
 *   gcc -std=c99 -O2 moe_and_attention.c -o moe_and_attention \
 *       -I"$(python -c 'import mxmoe; print(mxmoe.get_include())')" \
 *       "$(python -c 'import mxmoe; print(mxmoe.get_library())')" \
 *       -Wl,-rpath,"$(dirname "$(python -c 'import mxmoe; print(mxmoe.get_library())')")" -lm
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "mxmoe.h"

/* Ends the program with the library's sentence when a call fails. */
#define CALL(call)                                                 \
  do {                                                             \
    if ((call) != MXMOE_OK) {                                      \
      fprintf(stderr, "%s\n  in %s\n", mxmoe_last_error(), #call); \
      exit(EXIT_FAILURE);                                          \
    }                                                              \
  } while (0)

/* A small generator of our own, so that the data are the same everywhere. */
static uint64_t state = 1;

static uint32_t random_bits(void) {
  state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (uint32_t)(state >> 32);
}

static float random_float(void) { return (float)random_bits() / 2147483648.0f - 1.0f; }

static void fill(float* values, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) values[i] = random_float();
}

/* What a call is to write, so that a value left out shows. */
static void poison(float* values, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) values[i] = NAN;
}

static mxmoe_tensor tensor(const void* data, int dtype, int ndim, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
  const int64_t shape[MXMOE_MAX_DIMS] = {n0, n1, n2, n3};
  return mxmoe_contiguous(data, dtype, ndim, shape);
}

/* Largest difference, in units of the largest value expected; NaN when there is one. */
static double error_of(const float* got, const double* want, size_t n) {
  double worst = 0.0, largest = 0.0;
  size_t i;
  for (i = 0; i < n; ++i) {
    const double difference = fabs(got[i] - want[i]);
    if (isnan(difference)) return difference;
    worst = fmax(worst, difference);
    largest = fmax(largest, fabs(want[i]));
  }
  return worst / largest;
}

static int report(const char* what, double error) {
  const int ok = error < 1e-5; /* float32 sums of some hundred terms */
  printf("%-16s largest error %.1e  %s\n", what, error, ok ? "ok" : "WRONG");
  return ok;
}

/* ---- Mixture of experts ---- */

enum { TOKENS = 5, HIDDEN = 64, INNER = 96, EXPERTS = 4, CHOSEN = 2 };

/* One matrix of every expert: MXFP4, with a bias. */
typedef struct matrix {
  int64_t rows, k;
  uint8_t* blocks; /* [expert][row][k / 32][16] */
  uint8_t* scales; /* [expert][row][k / 32] */
  float* bias;     /* [expert][row] */
} matrix;

static matrix random_matrix(int64_t rows, int64_t k) {
  const size_t num_blocks = (size_t)(EXPERTS * rows * (k / 32));
  matrix m;
  size_t i;
  m.rows = rows, m.k = k;
  m.blocks = malloc(num_blocks * 16);
  m.scales = malloc(num_blocks);
  m.bias = malloc((size_t)(EXPERTS * rows) * sizeof(float));
  if (!m.blocks || !m.scales || !m.bias) exit(EXIT_FAILURE);
  for (i = 0; i < num_blocks * 16; ++i) m.blocks[i] = (uint8_t)(random_bits() >> 8);
  for (i = 0; i < num_blocks; ++i) m.scales[i] = (uint8_t)(121 + random_bits() % 4);
  fill(m.bias, (size_t)(EXPERTS * rows));
  return m;
}

static void free_matrix(matrix* m) {
  free(m->blocks);
  free(m->scales);
  free(m->bias);
}

static double weight_at(const matrix* m, int64_t expert, int64_t row, int64_t k) {
  static const double magnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6}; /* of e2m1 */
  const int64_t block = (expert * m->rows + row) * (m->k / 32) + k / 32;
  const int code = (m->blocks[block * 16 + k % 32 / 2] >> (k % 2 * 4)) & 15;
  const double value = ldexp(magnitudes[code & 7], m->scales[block] - 127);
  return code & 8 ? -value : value;
}

static double dot_row(const matrix* m, int64_t expert, int64_t row, const double* x) {
  double sum = m->bias[expert * m->rows + row];
  int64_t k;
  for (k = 0; k < m->k; ++k) sum += weight_at(m, expert, row, k) * x[k];
  return sum;
}

static void plain_expert(const matrix* gate_up, const matrix* down, int64_t expert, const double* x, double* y) {
  double inner[INNER];
  int64_t i;
  for (i = 0; i < INNER; ++i) {
    const double gate = fmin(dot_row(gate_up, expert, 2 * i, x), MXMOE_SWIGLU_LIMIT);
    const double up = dot_row(gate_up, expert, 2 * i + 1, x);
    const double clamped = fmax(fmin(up, MXMOE_SWIGLU_LIMIT), -MXMOE_SWIGLU_LIMIT);
    inner[i] = gate / (1.0 + exp(-MXMOE_SWIGLU_ALPHA * gate)) * (clamped + 1.0);
  }
  for (i = 0; i < HIDDEN; ++i) y[i] = dot_row(down, expert, i, inner);
}

/* The chosen experts of a token are those with the largest logits; their weights, a softmax over these alone. */
static void plain_moe(const float* x, const float* logits, const matrix* gate_up, const matrix* down, double* y) {
  int64_t t, c, e, i;
  for (t = 0; t < TOKENS; ++t) {
    const float* of_token = logits + t * EXPERTS;
    int64_t ids[CHOSEN];
    double wide[HIDDEN], result[HIDDEN], total = 0.0;
    int taken[EXPERTS] = {0};
    for (c = 0; c < CHOSEN; ++c) {
      ids[c] = -1;
      for (e = 0; e < EXPERTS; ++e) {
        if (!taken[e] && (ids[c] < 0 || of_token[e] > of_token[ids[c]])) ids[c] = e;
      }
      taken[ids[c]] = 1;
      total += exp(of_token[ids[c]]);
    }
    for (i = 0; i < HIDDEN; ++i) wide[i] = x[t * HIDDEN + i], y[t * HIDDEN + i] = wide[i];
    for (c = 0; c < CHOSEN; ++c) {
      plain_expert(gate_up, down, ids[c], wide, result);
      for (i = 0; i < HIDDEN; ++i) y[t * HIDDEN + i] += exp(of_token[ids[c]]) / total * result[i];
    }
  }
}

static int check_moe(void) {
  float x[TOKENS * HIDDEN], logits[TOKENS * EXPERTS], topk_weights[TOKENS * CHOSEN], y[TOKENS * HIDDEN];
  int32_t topk_ids[TOKENS * CHOSEN];
  double want[TOKENS * HIDDEN];
  matrix gate_up = random_matrix(2 * INNER, HIDDEN), down = random_matrix(HIDDEN, INNER);
  fill(x, TOKENS * HIDDEN);
  fill(logits, TOKENS * EXPERTS);
  poison(y, TOKENS * HIDDEN);

  const mxmoe_tensor x_view = tensor(x, MXMOE_FLOAT32, 2, TOKENS, HIDDEN, 0, 0);
  const mxmoe_tensor logits_view = tensor(logits, MXMOE_FLOAT32, 2, TOKENS, EXPERTS, 0, 0);
  const mxmoe_tensor ids_view = tensor(topk_ids, MXMOE_INT32, 2, TOKENS, CHOSEN, 0, 0);
  const mxmoe_tensor weights_view = tensor(topk_weights, MXMOE_FLOAT32, 2, TOKENS, CHOSEN, 0, 0);
  const mxmoe_tensor y_view = tensor(y, MXMOE_FLOAT32, 2, TOKENS, HIDDEN, 0, 0);
  const mxmoe_tensor gu_blocks = tensor(gate_up.blocks, MXMOE_UINT8, 4, EXPERTS, 2 * INNER, HIDDEN / 32, 16);
  const mxmoe_tensor gu_scales = tensor(gate_up.scales, MXMOE_UINT8, 3, EXPERTS, 2 * INNER, HIDDEN / 32, 0);
  const mxmoe_tensor gu_bias = tensor(gate_up.bias, MXMOE_FLOAT32, 2, EXPERTS, 2 * INNER, 0, 0);
  const mxmoe_tensor d_blocks = tensor(down.blocks, MXMOE_UINT8, 4, EXPERTS, HIDDEN, INNER / 32, 16);
  const mxmoe_tensor d_scales = tensor(down.scales, MXMOE_UINT8, 3, EXPERTS, HIDDEN, INNER / 32, 0);
  const mxmoe_tensor d_bias = tensor(down.bias, MXMOE_FLOAT32, 2, EXPERTS, HIDDEN, 0, 0);
  const mxmoe_moe_weights weights = {&gu_blocks, &gu_scales, &gu_bias, &d_blocks, &d_scales, &d_bias};

  CALL(mxmoe_expert_routing(&logits_view, &ids_view, &weights_view));
  CALL(mxmoe_mxfp4_moe(&x_view, &ids_view, &weights_view, &weights, MXMOE_ACTIVATIONS_FLOAT32, MXMOE_SWIGLU_ALPHA,
                       MXMOE_SWIGLU_LIMIT, 0, &x_view, &y_view)); /* x is its own residual */

  plain_moe(x, logits, &gate_up, &down, want);
  free_matrix(&gate_up);
  free_matrix(&down);
  return report("mxfp4_moe", error_of(y, want, TOKENS * HIDDEN));
}

/* ---- Attention ---- */

enum { KEYS = 21, NEW = 3, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 16, BLOCK_SIZE = 8, BLOCKS = 4, WINDOW = 12 };

static const int32_t block_table[BLOCKS] = {2, 0, 3, 1}; /* the sequence's places in the cache, out of order */

/* k and v: [key][kv head][head_dim]. The last NEW keys belong to the new tokens. */
static void plain_attention(const float* q, const float* k, const float* v, const float* sinks, double* y) {
  const double sm_scale = 1.0 / sqrt(HEAD_DIM);
  int t, h, j, d;
  for (t = 0; t < NEW; ++t) {
    for (h = 0; h < HEADS; ++h) {
      const int position = KEYS - NEW + t, kv_head = h / (HEADS / KV_HEADS);
      const float* query = q + (t * HEADS + h) * HEAD_DIM;
      double* out = y + (t * HEADS + h) * HEAD_DIM;
      double total = exp(sinks[h]);
      for (d = 0; d < HEAD_DIM; ++d) out[d] = 0.0;
      for (j = position - WINDOW + 1; j <= position; ++j) {
        const float *key = k + (j * KV_HEADS + kv_head) * HEAD_DIM, *value = v + (j * KV_HEADS + kv_head) * HEAD_DIM;
        double score = 0.0;
        for (d = 0; d < HEAD_DIM; ++d) score += (double)query[d] * key[d];
        score = exp(score * sm_scale);
        total += score;
        for (d = 0; d < HEAD_DIM; ++d) out[d] += score * value[d];
      }
      for (d = 0; d < HEAD_DIM; ++d) out[d] /= total;
    }
  }
}

static int check_attention(void) {
  enum { CACHE = BLOCKS * KV_HEADS * BLOCK_SIZE * HEAD_DIM, ROWS = KV_HEADS * HEAD_DIM };
  static float k_cache[CACHE], v_cache[CACHE];
  float q[NEW * HEADS * HEAD_DIM], k[KEYS * ROWS], v[KEYS * ROWS], sinks[HEADS], y[NEW * HEADS * HEAD_DIM];
  double want[NEW * HEADS * HEAD_DIM];
  int64_t slots[KEYS], i;
  const int32_t cu_seqlens[2] = {0, NEW}, seq_lens[1] = {KEYS};
  fill(q, NEW * HEADS * HEAD_DIM);
  fill(k, KEYS * ROWS);
  fill(v, KEYS * ROWS);
  fill(sinks, HEADS);
  poison(y, NEW * HEADS * HEAD_DIM);
  for (i = 0; i < KEYS; ++i) slots[i] = block_table[i / BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE;

  const mxmoe_tensor q_view = tensor(q, MXMOE_FLOAT32, 3, NEW, HEADS, HEAD_DIM, 0);
  const mxmoe_tensor k_view = tensor(k, MXMOE_FLOAT32, 3, KEYS, KV_HEADS, HEAD_DIM, 0);
  const mxmoe_tensor v_view = tensor(v, MXMOE_FLOAT32, 3, KEYS, KV_HEADS, HEAD_DIM, 0);
  const mxmoe_tensor kc_view = tensor(k_cache, MXMOE_FLOAT32, 4, BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM);
  const mxmoe_tensor vc_view = tensor(v_cache, MXMOE_FLOAT32, 4, BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM);
  const mxmoe_tensor slots_view = tensor(slots, MXMOE_INT64, 1, KEYS, 0, 0, 0);
  const mxmoe_tensor sinks_view = tensor(sinks, MXMOE_FLOAT32, 1, HEADS, 0, 0, 0);
  const mxmoe_tensor table_view = tensor(block_table, MXMOE_INT32, 2, 1, BLOCKS, 0, 0);
  const mxmoe_tensor cu_view = tensor(cu_seqlens, MXMOE_INT32, 1, 2, 0, 0, 0);
  const mxmoe_tensor lens_view = tensor(seq_lens, MXMOE_INT32, 1, 1, 0, 0, 0);
  const mxmoe_tensor y_view = tensor(y, MXMOE_FLOAT32, 3, NEW, HEADS, HEAD_DIM, 0);
  const mxmoe_kv_cache cache = {&kc_view, &vc_view, NULL, NULL};
  const mxmoe_attention_batch batch = {&table_view, &cu_view, &lens_view, NULL};

  CALL(mxmoe_kv_cache_write(&k_view, &v_view, &cache, &slots_view));
  CALL(mxmoe_sink_attention(&q_view, &cache, &sinks_view, &batch, 1.0f / sqrtf(HEAD_DIM), WINDOW,
                            MXMOE_ACTIVATIONS_FLOAT32, NULL, &y_view));

  plain_attention(q, k, v, sinks, want);
  return report("sink_attention", error_of(y, want, NEW * HEADS * HEAD_DIM));
}

int main(void) {
  const char* isa = NULL;
  int ok;
  CALL(mxmoe_check_abi(MXMOE_ABI_VERSION));
  CALL(mxmoe_get_isa(&isa));
  printf("mxmoe %s, %s\n", mxmoe_version(), isa);
  ok = check_moe();
  ok = check_attention() && ok;
  puts(ok ? "ok" : "FAILED");
  return ok ? EXIT_SUCCESS : EXIT_FAILURE;
}
