#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <utility>

#include "core/check.h"
#include "core/fetch.h"

#if defined(__x86_64__) || defined(_M_X64)
#define MXMOE_CPUID 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace mxmoe {
namespace {

#if defined(MXMOE_CPUID)
struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf r;
#if defined(_MSC_VER)
  int regs[4];
  __cpuidex(regs, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = regs[0], r.ebx = regs[1], r.ecx = regs[2], r.edx = regs[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// Which register files the operating system saves: bits 1-2 are XMM and YMM, 5-7 the AVX-512 state.
uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
#endif
}

bool made_by_intel() {
  const CpuidLeaf leaf0 = cpuid(0, 0);
  return leaf0.ebx == 0x756e6547 && leaf0.edx == 0x49656e69 && leaf0.ecx == 0x6c65746e;  // "GenuineIntel"
}

uint32_t detect() {
  const CpuidLeaf leaf1 = cpuid(1, 0);
  const bool osxsave = (leaf1.ecx >> 27) & 1;
  if (!osxsave || cpuid(0, 0).eax < 7) return 0;
  const uint64_t state = xcr0();
  const CpuidLeaf leaf7 = cpuid(7, 0);
  const bool fma = (leaf1.ecx >> 12) & 1, f16c = (leaf1.ecx >> 29) & 1, avx2 = (leaf7.ebx >> 5) & 1;
  uint32_t features = 0;
  if ((state & 0x6) == 0x6 && fma && f16c && avx2) features |= kAvx2;
#if defined(MXMOE_AVX_VNNI_KERNELS)
  const bool vnni = leaf7.eax >= 1 && ((cpuid(7, 1).eax >> 4) & 1);
  if ((features & kAvx2) && vnni) features |= kAvxVnni;
#endif
  const bool f = (leaf7.ebx >> 16) & 1, dq = (leaf7.ebx >> 17) & 1, bw = (leaf7.ebx >> 30) & 1,
             vl = (leaf7.ebx >> 31) & 1;
  if ((features & kAvx2) && (state & 0xe6) == 0xe6 && f && dq && bw && vl) {
    features |= kAvx512;
    if ((leaf7.ecx >> 11) & 1) features |= kAvx512Vnni;
    if (leaf7.eax >= 1 && ((cpuid(7, 1).eax >> 5) & 1)) {
      features |= kAvx512Bf16;
      // Intel's vdpbf16ps does half as many products a cycle as two units of fused multiply-adds, AMD's twice as
      // many.
      if (!made_by_intel()) features |= kFastBf16;
    }
  }
  return features;
}
#else
bool made_by_intel() { return false; }
uint32_t detect() { return 0; }
#endif

std::atomic<const IsaLevel*> active{nullptr};

const IsaLevel& best_level() {
  const IsaLevel* best = &isa_levels().front();
  for (const IsaLevel& level : isa_levels()) {
    if ((level.required & ~cpu_features()) == 0) best = &level;
  }
  return *best;
}

const IsaLevel& known_level(const std::string& name, const char* source) {
  std::string known;
  for (const IsaLevel& level : isa_levels()) {
    if (name == level.name) return level;
    known += (known.empty() ? "" : ", ") + std::string(level.name);
  }
  throw ValueError(concat(source, " is '", name, "'; wanted one of ", known));
}

const IsaLevel& level_by_name(const std::string& name, const char* source) {
  const IsaLevel& level = known_level(name, source);
  const uint32_t missing = level.required & ~cpu_features();
  check_value(missing == 0, source, " asks for '", name, "', but this CPU lacks ", feature_names(missing));
  return level;
}

// Tables register themselves while the library loads, before any thread of ours runs.
std::vector<const DispatchBase*>& registry() {
  static std::vector<const DispatchBase*> tables;
  return tables;
}

}  // namespace

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = {
      {"scalar", 0, 0},
      {"avx2", kAvx2, kAvx2},
      {"avxvnni", kAvx2 | kAvxVnni, kAvx2 | kAvxVnni},
      {"avx512base", kAvx2 | kAvx512, kAvx2 | kAvx512},
      {"avx512vnni", kAvx2 | kAvx512 | kAvx512Vnni, kAvx2 | kAvx512 | kAvx512Vnni},
      {"avx512", kAvx2 | kAvx512, kAvx2 | kAvx512 | kAvx512Vnni | kAvx512Bf16 | kFastBf16},
  };
  return levels;
}

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features;
}

std::string feature_names(uint32_t features) {
  static const std::pair<uint32_t, const char*> names[] = {
      {kAvx2, "AVX2+FMA+F16C"},        {kAvxVnni, "AVX-VNNI"},
      {kAvx512, "AVX-512 F+BW+DQ+VL"}, {kAvx512Vnni, "AVX-512 VNNI"},
      {kAvx512Bf16, "AVX-512 BF16"},   {kFastBf16, "BF16 products faster than float32's"}};
  std::string text;
  for (const auto& [bit, name] : names) {
    if (features & bit) text += (text.empty() ? "" : ", ") + std::string(name);
  }
  return text.empty() ? "nothing beyond the baseline" : text;
}

const IsaLevel& active_isa() {
  const IsaLevel* level = active.load(std::memory_order_acquire);
  if (level == nullptr) {
    const char* forced = std::getenv("MXMOE_ISA");
    level = forced != nullptr && *forced != '\0' ? &level_by_name(forced, "MXMOE_ISA") : &best_level();
    active.store(level, std::memory_order_release);
  }
  return *level;
}

void set_isa(const std::string& name) {
  active.store(name.empty() ? nullptr : &level_by_name(name, "isa"), std::memory_order_release);
}

bool has_isa(const std::string& name) { return (known_level(name, "isa").required & ~cpu_features()) == 0; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaLevel& level : isa_levels()) {
    if ((level.required & ~cpu_features()) == 0) names.emplace_back(level.name);
  }
  return names;
}

uint32_t usable_features() { return cpu_features() & active_isa().allowed; }

DispatchBase::DispatchBase(const char* op) : op_(op) { registry().push_back(this); }

size_t DispatchBase::pick_index() const {
  const std::vector<KernelRow> table = rows();
  const uint32_t usable = usable_features();
  for (size_t i = 0; i < table.size(); ++i) {
    if ((table[i].required & ~usable) == 0) return i;
  }
  return table.size() - 1;
}

std::vector<const DispatchBase*> DispatchBase::all() { return registry(); }

FetchDistance fetch_distance(int64_t usual) {
  static const bool in_two_steps = made_by_intel();
  return in_two_steps ? FetchDistance{4096, 12288} : FetchDistance{usual, 0};
}

}  // namespace mxmoe
