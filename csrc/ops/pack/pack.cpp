#include "ops/pack/pack.h"

#include <algorithm>

#include "core/check.h"
#include "core/isa.h"
#include "core/packed.h"
#include "core/thread_pool.h"

namespace mxmoe {
namespace {

struct Matrix {
  int64_t rows, k;
  int64_t panels() const { return rows / kPanelRows; }
  int64_t blocks() const { return k / kMxBlock; }
};

// The panels of one array: every dword of `stored` (rows of block_dwords a block, a multiple of four) through
// `change` to its place, or back. Four dwords of a row at a time, which compilers turn into vectors.
template <bool kPack, class Change>
void move_panels(const Matrix& m, const Tensor& stored, const Tensor& packed, int64_t block_dwords,
                 const Change& change) {
  constexpr int kWide = 4;
  const int64_t row_dwords = m.blocks() * block_dwords, item = dtype_size(packed.dtype);
  parallel_for(m.panels(), [&](int64_t panel) {
    unsigned char* rows = stored.as<unsigned char>() + panel * kPanelRows * row_dwords * 4;
    unsigned char* panels = packed.as<unsigned char>() + panel * packed.stride[0] * item;
    for (int64_t i = 0; i < row_dwords; i += kWide) {
      uint32_t by_row[kPanelRows][kWide], by_place[kWide][kPanelRows];
      const int64_t block = i / block_dwords;
      unsigned char* here = panels + block * packed.stride[1] * item + i % block_dwords * kPanelRows * 4;
      if (kPack) {
        for (int64_t r = 0; r < kPanelRows; ++r) {
          std::memcpy(by_row[r], rows + (r * row_dwords + i) * 4, sizeof by_row[r]);
        }
        for (auto& row : by_row) {
          for (uint32_t& x : row) x = change(x);
        }
        for (int r = 0; r < kPanelRows; ++r) {
          for (int j = 0; j < kWide; ++j) by_place[j][r] = by_row[r][j];
        }
        std::memcpy(here, by_place, sizeof by_place);
      } else {
        std::memcpy(by_place, here, sizeof by_place);
        for (int r = 0; r < kPanelRows; ++r) {
          for (int j = 0; j < kWide; ++j) by_row[r][j] = by_place[j][r];
        }
        for (auto& row : by_row) {
          for (uint32_t& x : row) x = change(x);
        }
        for (int64_t r = 0; r < kPanelRows; ++r) {
          std::memcpy(rows + (r * row_dwords + i) * 4, by_row[r], sizeof by_row[r]);
        }
      }
    }
  });
}

template <bool kPack, typename T>
void move_scales(const Matrix& m, const Tensor& stored, const Tensor& packed) {
  parallel_for(m.panels(), [&](int64_t panel) {
    T* rows = stored.as<T>() + panel * kPanelRows * m.blocks();
    T* to = packed.as<T>() + panel * packed.stride[0];
    for (int64_t b = 0; b < m.blocks(); ++b) {
      for (int64_t r = 0; r < kPanelRows; ++r) {
        T& a = rows[r * m.blocks() + b];
        T& c = to[b * packed.stride[1] + r];
        (kPack ? c : a) = kPack ? a : c;
      }
    }
  });
}

Matrix check_rows(const char* name, int64_t rows, int64_t k) {
  check_value(rows % kPanelRows == 0, name, " has ", rows, " rows; wanted a multiple of ", kPanelRows);
  check_value(k >= kMxBlock && k % kMxBlock == 0, name, " has K = ", k, "; wanted a multiple of ", kMxBlock);
  return {rows, k};
}

// Whether each block's scales lie behind its values, before the next block's: then the arrays' ranges overlap, but no
// byte belongs to both.
bool side_by_side(const Tensor& values, const Tensor& scales) {
  const int last = values.ndim - 1;
  if (!values || scales.ndim != values.ndim) return false;
  int64_t step = INT64_MAX;
  for (int i = 0; i < last; ++i) {
    if (values.shape[i] == 1) continue;
    const int64_t bytes = values.stride[i] * dtype_size(values.dtype);
    if (scales.stride[i] * dtype_size(scales.dtype) != bytes) return false;
    step = std::min(step, bytes);
  }
  const auto begin = reinterpret_cast<uintptr_t>(values.data),
             scales_begin = reinterpret_cast<uintptr_t>(scales.data);
  if (scales_begin < begin) return false;
  const auto behind = static_cast<int64_t>(scales_begin - begin);
  return values.shape[last] * dtype_size(values.dtype) <= behind && behind < step &&
         scales.shape[last] * dtype_size(scales.dtype) <= step - behind;
}

void check_written(const NamedTensor& a, const NamedTensor& b, std::initializer_list<NamedTensor> read) {
  if (!side_by_side(a.tensor, b.tensor)) check_no_overlap(a.name, a.tensor, b.name, b.tensor);
  for (const NamedTensor& r : read) {
    check_no_overlap(a.name, a.tensor, r.name, r.tensor);
    check_no_overlap(b.name, b.tensor, r.name, r.tensor);
  }
}

Matrix check_mxfp4(const Tensor& blocks, const Tensor& scales, const Tensor& packed, const Tensor& packed_scales) {
  const std::pair<const char*, const Tensor*> all[] = {
      {"blocks", &blocks}, {"scales", &scales}, {"packed", &packed}, {"packed_scales", &packed_scales}};
  for (const auto& [name, t] : all) check_dtype(name, *t, {DType::u8});
  check_contiguous("blocks", blocks);
  check_contiguous("scales", scales);
  check_shape("blocks", blocks, {-1, -1, kMxBlockBytes}, "(rows, K / 32, 16)");
  const Matrix m = check_rows("blocks", blocks.shape[0], blocks.shape[1] * kMxBlock);
  check_shape("scales", scales, {m.rows, m.blocks()}, "(rows, K / 32)");
  check_shape("packed", packed, {m.panels(), m.blocks(), kPackedMxfp4Bytes}, "(rows / 16, K / 32, 256)");
  check_shape("packed_scales", packed_scales, {m.panels(), m.blocks(), kPanelRows}, "(rows / 16, K / 32, 16)");
  return m;
}

Matrix check_linear(const Tensor& weight, const Tensor& scales, const Tensor& packed, const Tensor& packed_scales) {
  check_dtype("weight", weight, {DType::bf16, DType::i8});
  check_shape("weight", weight, {-1, -1}, "(rows, K)");
  check_contiguous("weight", weight);
  const Matrix m = check_rows("weight", weight.shape[0], weight.shape[1]);
  const bool int8 = weight.dtype == DType::i8;
  check_dtype("packed", packed, {int8 ? DType::u8 : DType::bf16});
  check_shape("packed", packed, {m.panels(), m.blocks(), kPackedInt8Bytes}, "(rows / 16, K / 32, 512)");
  check_value(int8 == static_cast<bool>(scales), "scales ", int8 ? "are missing" : "came with bfloat16 weights",
              "; wanted ", int8 ? "(rows, K / 32)" : "none");
  check_value(int8 == static_cast<bool>(packed_scales), "packed_scales ",
              int8 ? "are missing" : "came with bfloat16 weights", "; wanted ",
              int8 ? "(rows / 16, K / 32, 16)" : "none");
  if (int8) {
    check_dtype("scales", scales, {DType::bf16});
    check_shape("scales", scales, {m.rows, m.blocks()}, "(rows, K / 32)");
    check_contiguous("scales", scales);
    check_dtype("packed_scales", packed_scales, {DType::bf16});
    check_shape("packed_scales", packed_scales, {m.panels(), m.blocks(), kPanelRows}, "(rows / 16, K / 32, 16)");
  }
  return m;
}

template <bool kPack>
void move_linear(const Matrix& m, const Tensor& weight, const Tensor& scales, const Tensor& packed,
                 const Tensor& packed_scales) {
  if (weight.dtype == DType::bf16) {
    move_panels<kPack>(m, weight, packed, kMxBlock / 2, [](uint32_t x) { return x; });
    return;
  }
  move_panels<kPack>(m, weight, packed, kMxBlock / 4, [](uint32_t x) { return flip_signs(x); });
  move_scales<kPack, uint16_t>(m, scales, packed_scales);
}

}  // namespace

bool prefers_packed(Activations, PackedForm) { return (kAvx2 & ~usable_features()) == 0; }  // all but portable code

void pack_mxfp4(const Tensor& blocks, const Tensor& scales, const Tensor& packed, const Tensor& packed_scales) {
  const Matrix m = check_mxfp4(blocks, scales, packed, packed_scales);
  check_written({"packed", packed}, {"packed_scales", packed_scales}, {{"blocks", blocks}, {"scales", scales}});
  move_panels<true>(m, blocks, packed, kMxBlock / 8, [](uint32_t x) { return pack_codes(x); });
  move_scales<true, uint8_t>(m, scales, packed_scales);
}

void unpack_mxfp4(const Tensor& packed, const Tensor& packed_scales, const Tensor& blocks, const Tensor& scales) {
  const Matrix m = check_mxfp4(blocks, scales, packed, packed_scales);
  check_written({"blocks", blocks}, {"scales", scales}, {{"packed", packed}, {"packed_scales", packed_scales}});
  move_panels<false>(m, blocks, packed, kMxBlock / 8, [](uint32_t x) { return unpack_codes(x); });
  move_scales<false, uint8_t>(m, scales, packed_scales);
}

void pack_linear(const Tensor& weight, const Tensor& scales, const Tensor& packed, const Tensor& packed_scales) {
  const Matrix m = check_linear(weight, scales, packed, packed_scales);
  check_written({"packed", packed}, {"packed_scales", packed_scales}, {{"weight", weight}, {"scales", scales}});
  move_linear<true>(m, weight, scales, packed, packed_scales);
}

void unpack_linear(const Tensor& packed, const Tensor& packed_scales, const Tensor& weight, const Tensor& scales) {
  const Matrix m = check_linear(weight, scales, packed, packed_scales);
  check_written({"weight", weight}, {"scales", scales}, {{"packed", packed}, {"packed_scales", packed_scales}});
  move_linear<false>(m, weight, scales, packed, packed_scales);
}

}  // namespace mxmoe
