// Which instruction sets this CPU has, which one is asked for, and the one way to pick a kernel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace mxmoe {

// Bits of what a kernel needs.
enum Feature : uint32_t {
  kAvx2 = 1u << 0,        // AVX2, FMA, F16C
  kAvx512 = 1u << 1,      // AVX-512 F, BW, DQ, VL
  kAvx512Vnni = 1u << 2,  // vpdpbusd
  kAvx512Bf16 = 1u << 3,  // vdpbf16ps
  kFastBf16 = 1u << 4,    // which does more products than fused multiply-adds do, not fewer
  kAvxVnni = 1u << 5,     // vpdpbusd in AVX2's registers
};

struct IsaLevel {
  const char* name;   // as in MXMOE_ISA
  uint32_t required;  // what the machine must have to be allowed to ask for it
  uint32_t allowed;   // what kernels may use when it is asked for
};

// Worst first. "avxvnni" is AVX2 with AVX-VNNI, "avx512base" keeps to AVX-512 without VNNI and BF16, "avx512vnni" to
// it without BF16; "avx512" adds those the machine has.
const std::vector<IsaLevel>& isa_levels();

uint32_t cpu_features();
std::string feature_names(uint32_t features);

// The level in force: MXMOE_ISA when set, else the best this machine has. Throws ValueError for an
// unknown or unavailable name, never falls back.
const IsaLevel& active_isa();
void set_isa(const std::string& name);  // "" returns to the default
uint32_t usable_features();             // what the machine has and the level in force allows
std::vector<std::string> available_isas();
bool has_isa(const std::string& name);  // throws ValueError for an unknown one

// Wraps the rows of a dispatch table whose kernels exist only on x86-64.
#if defined(MXMOE_X86_KERNELS)
#define MXMOE_X86(...) __VA_ARGS__,
#else
#define MXMOE_X86(...)
#endif

// GCC knows AVX-VNNI from 11 on; built by an older one, no CPU has it.
#if defined(MXMOE_X86_KERNELS) && (!defined(__GNUC__) || defined(__clang__) || __GNUC__ >= 11)
#define MXMOE_AVX_VNNI_KERNELS 1
#endif

constexpr uint32_t kAvx512VnniDot = kAvx512 | kAvx512Vnni;            // what target_avx512vnni.h compiles for
constexpr uint32_t kAvx512Dot = kAvx512 | kAvx512Vnni | kAvx512Bf16;  // what target_avx512x.h compiles for
constexpr uint32_t kAvx512Bf16Dot = kAvx512Dot | kFastBf16;           // where matrix products gain by vdpbf16ps

// A row of an op's dispatch table.
struct KernelRow {
  const char* name;
  uint32_t required;  // Feature bits
};

// What doctor() sees of a dispatch table.
class DispatchBase {
 public:
  explicit DispatchBase(const char* op);
  virtual ~DispatchBase() = default;
  const char* op() const { return op_; }
  const char* last() const { return last_.load(std::memory_order_relaxed); }
  virtual std::vector<KernelRow> rows() const = 0;
  size_t pick_index() const;
  static std::vector<const DispatchBase*> all();

 protected:
  std::atomic<const char*> last_{nullptr};  // the kernel that ran last; nullptr before the first run

 private:
  const char* op_;
};

// The one way an op gets at its kernels: a table, best first, whose last row requires nothing.
template <typename Fn>
class Dispatch final : public DispatchBase {
 public:
  struct Row {
    const char* name;
    uint32_t required;
    Fn fn;
  };
  Dispatch(const char* op, std::initializer_list<Row> table) : DispatchBase(op), table_(table) {}

  Fn pick() {
    const uint32_t usable = usable_features();
    for (const Row& row : table_) {
      if ((row.required & ~usable) == 0) {
        last_.store(row.name, std::memory_order_relaxed);
        return row.fn;
      }
    }
    return table_.back().fn;
  }
  std::vector<KernelRow> rows() const override {
    std::vector<KernelRow> rows;
    for (const Row& row : table_) rows.push_back({row.name, row.required});
    return rows;
  }

 private:
  std::vector<Row> table_;
};

}  // namespace mxmoe
