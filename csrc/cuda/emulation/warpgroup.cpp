#include "cuda/emulation/warpgroup.h"

#include <array>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <vector>

#include "core/check.h"
#include "core/types.h"
#include "cuda/emulation/block.h"
#include "cuda/emulation/matrix_product.h"

namespace mxmoe {
namespace emulation {
namespace {

constexpr int kGroupThreads = 128, kRows = 64, kDepth = 16;
constexpr uint32_t kSharedBase = 1024;  // as on the device, where the system has the first KB
constexpr size_t kPiece = 16;           // bytes whose last writer is kept
constexpr int kFenced = -1;

// What matrix products see of shared memory.
struct AsyncView {
  std::vector<unsigned char> bytes;         // empty before the first fence
  std::vector<int> writer;                  // by piece: the thread whose cp.async brought it and has not been fenced
  std::vector<std::vector<size_t>> copied;  // by thread: pieces since its last fence, some perhaps others' by now
  size_t all_unfenced = 0;
  bool stale = false;  // a thread has fenced
};

// What a warpgroup accumulates while its registers hold NaN.
struct Accumulators {
  std::array<float*, kGroupThreads> registers{};
  std::vector<float> values;  // (64, n)
  int pending = 0;
};

struct Operands {
  std::vector<float> a, b;  // (64, 16), (16, n)
};

struct Product {
  std::array<WarpgroupProduct, kGroupThreads> threads;
  std::shared_ptr<Accumulators> sums;
  std::unique_ptr<Operands> read;  // unless they are read at the wait
};

// What threads of a warpgroup call together but need not wait for: it takes place when the last of them has come.
enum class Step { Fence, Product, Commit };
constexpr const char* kNames[] = {"wgmma.fence", "wgmma.mma_async", "wgmma.commit_group"};
struct Joint {
  Step step;
  int arrived;
  std::unique_ptr<Product> product;
};

struct Warpgroup {
  std::deque<Joint> joint;                     // that some threads have come to
  std::array<size_t, kGroupThreads> passed{};  // by each thread
  size_t done = 0;                             // by all
  bool fenced = false;
  std::vector<std::unique_ptr<Product>> open;
  std::deque<std::vector<std::unique_ptr<Product>>> groups;  // committed, oldest first
  std::vector<std::shared_ptr<Accumulators>> live;
};

AsyncView view;
std::deque<Warpgroup> warpgroups;

// Brings the copy up to date if a thread has fenced, but for what others have to fence.
void publish() {
  if (!view.stale) return;
  view.stale = false;
  const size_t bytes = shared_size();
  if (view.bytes.empty()) view.bytes.assign(bytes, 0xFF);
  if (view.all_unfenced == 0) {
    std::memcpy(view.bytes.data(), dynamic_shared(), bytes);
    return;
  }
  for (size_t piece = 0; piece < view.writer.size(); ++piece) {
    if (view.writer[piece] != kFenced) continue;
    const size_t at = piece * kPiece, size = at + kPiece <= bytes ? kPiece : bytes - at;
    std::memcpy(view.bytes.data() + at, dynamic_shared() + at, size);
  }
}

Warpgroup& own() { return warpgroups[thread_number() / kGroupThreads]; }

// Where the accumulator i of a thread stands.
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + 2 * (thread % 4) + i % 2; }

struct Tile {
  uint32_t start, leading, stride;
};

Tile decode(uint64_t descriptor) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fffu) << 4; };
  if (descriptor >> 62 != 1) fail("wgmma with a descriptor of a layout other than the 128-byte swizzle");
  if ((descriptor >> 49 & 7u) != 0) fail("wgmma with a base offset in its descriptor");
  const Tile tile{field(0), field(16), field(32)};
  if (tile.start / 128 % 8 != 0) fail("wgmma with a tile that does not begin where a swizzle pattern does");
  return tile;
}

// The value at K = k of row (or column) i; NaN when it is not what the last fence left there.
float element(const Tile& tile, bool transposed, int k, int i) {
  const auto at = static_cast<uint32_t>(i), depth = static_cast<uint32_t>(k);
  uint32_t address = tile.start;
  if (transposed) {
    address += at / 64 * tile.leading + at % 64 * 2 + depth / 8 * tile.stride + depth % 8 * 128;
  } else {
    address += at / 8 * tile.stride + at % 8 * 128 + depth * 2;
  }
  address ^= (address >> 7 & 7u) << 4;
  const size_t offset = size_t{address} - kSharedBase;
  if (address < kSharedBase || offset + 2 > shared_size()) fail("wgmma reads past the end of shared memory");
  uint16_t now, seen;
  std::memcpy(&now, dynamic_shared() + offset, 2);
  if (view.bytes.empty()) return std::numeric_limits<float>::quiet_NaN();
  std::memcpy(&seen, view.bytes.data() + offset, 2);
  return now == seen ? to_float(bf16{seen}) : std::numeric_limits<float>::quiet_NaN();
}

std::unique_ptr<Operands> read(const Product& product) {
  auto operands = std::make_unique<Operands>();
  const WarpgroupProduct& first = product.threads[0];
  operands->a.resize(kRows * kDepth);
  if (first.a == nullptr) {
    const Tile tile = decode(first.a_tile);
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; ++k) operands->a[row * kDepth + k] = element(tile, first.transposed_a, k, row);
    }
  } else {
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair = product.threads[thread].a[i / 2];
        const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, k = 2 * (thread % 4) + i / 4 * 8 + i % 2;
        operands->a[row * kDepth + k] = to_float(bf16{static_cast<uint16_t>(pair >> 16 * (i % 2))});
      }
    }
  }
  const Tile tile = decode(first.b_tile);
  operands->b.resize(static_cast<size_t>(kDepth * first.n));
  for (int n = 0; n < first.n; ++n) {
    for (int k = 0; k < kDepth; ++k) operands->b[k * first.n + n] = element(tile, first.transposed_b, k, n);
  }
  return operands;
}

void accumulate(const Product& product) {
  const std::unique_ptr<Operands> late = product.read ? nullptr : read(product);
  const Operands& operands = product.read ? *product.read : *late;
  const WarpgroupProduct& first = product.threads[0];
  matrix_product(kRows, first.n, kDepth, operands.a.data(), operands.b.data(), first.accumulate,
                 product.sums->values.data());
}

void finish(Warpgroup& group, const std::vector<std::unique_ptr<Product>>& products) {
  for (const auto& product : products) {
    accumulate(*product);
    Accumulators& sums = *product->sums;
    if (--sums.pending > 0) continue;
    const int n = product->threads[0].n;
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      for (int i = 0; i < n / 2; ++i) {
        sums.registers[thread][i] = sums.values[row_of(thread, i) * n + column_of(thread, i)];
      }
    }
    for (size_t i = 0; i < group.live.size(); ++i) {
      if (group.live[i] == product->sums) group.live.erase(group.live.begin() + static_cast<ptrdiff_t>(i--));
    }
  }
}

// Takes a thread's part of a product. Its accumulators hold NaN from here on.
void join(Warpgroup& group, Product& product, size_t thread, const WarpgroupProduct& part) {
  product.threads[thread] = part;
  if (!product.sums) {
    for (const auto& sums : group.live) {
      if (sums->registers[thread] == part.d) product.sums = sums;
    }
  }
  if (!product.sums) {
    product.sums = std::make_shared<Accumulators>();
    product.sums->values.resize(static_cast<size_t>(kRows * part.n));
    group.live.push_back(product.sums);
  }
  Accumulators& sums = *product.sums;
  if (sums.values.size() != static_cast<size_t>(kRows * part.n))
    fail("wgmma of another shape on the same accumulators");
  if (sums.registers[thread] == part.d) return;
  if (sums.registers[thread] != nullptr) fail("threads of a warpgroup give wgmma different accumulators");
  sums.registers[thread] = part.d;
  for (int i = 0; i < part.n / 2; ++i) {
    const int at = static_cast<int>(thread);
    sums.values[row_of(at, i) * part.n + column_of(at, i)] = part.d[i];
    part.d[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

// When all threads have joined.
void issue(Warpgroup& group, std::unique_ptr<Product> product) {
  if (group.open.empty() && !group.fenced) fail("a group of wgmma does not begin with wgmma.fence");
  for (const WarpgroupProduct& other : product->threads) {
    const WarpgroupProduct& first = product->threads[0];
    if (other.a_tile != first.a_tile || other.b_tile != first.b_tile || other.accumulate != first.accumulate ||
        other.n != first.n || (other.a == nullptr) != (first.a == nullptr)) {
      fail("threads of a warpgroup are in different wgmma, or give it different descriptors");
    }
  }
  ++product->sums->pending;
  publish();
  if (coin()) product->read = read(*product);
  group.open.push_back(std::move(product));
}

void arrive(Step step, const WarpgroupProduct* part) {
  Warpgroup& group = own();
  const size_t thread = thread_number() % kGroupThreads, at = group.passed[thread]++ - group.done;
  if (at == group.joint.size()) group.joint.push_back({step, 0, nullptr});
  Joint& joint = group.joint[at];
  if (joint.step != step) {
    fail(concat("threads of one warpgroup are in different collectives: ", kNames[static_cast<int>(step)], " and ",
                kNames[static_cast<int>(joint.step)]));
  }
  if (part != nullptr) {
    if (!joint.product) joint.product = std::make_unique<Product>();
    join(group, *joint.product, thread, *part);
  }
  if (++joint.arrived < kGroupThreads) return;
  // Threads come to one after the other, so this is the first.
  Joint whole = std::move(joint);
  group.joint.pop_front();
  ++group.done;
  if (step == Step::Fence) group.fenced = true;
  if (step == Step::Product) issue(group, std::move(whole.product));
  if (step == Step::Commit) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    group.fenced = false;
  }
}

}  // namespace

void start_warpgroups(size_t num_threads, size_t shared_bytes) {
  warpgroups.clear();
  warpgroups.resize((num_threads + kGroupThreads - 1) / kGroupThreads);
  view.bytes.clear();
  view.writer.assign((shared_bytes + kPiece - 1) / kPiece, kFenced);
  view.copied.assign(num_threads, {});
  view.all_unfenced = 0;
  view.stale = false;
}

std::string end_warpgroups() {
  for (size_t i = 0; i < warpgroups.size(); ++i) {
    const Warpgroup& group = warpgroups[i];
    if (!group.joint.empty()) {
      return concat("warpgroup ", i, " ends with threads that wait in ",
                    kNames[static_cast<int>(group.joint.front().step)], " for others");
    }
    if (!group.open.empty()) return concat("warpgroup ", i, " ends with wgmma that it has not committed");
    if (!group.groups.empty()) return concat("warpgroup ", i, " ends with wgmma that it has not waited for");
  }
  return {};
}

void copied_to_shared(size_t thread, size_t offset, size_t bytes) {
  for (size_t piece = offset / kPiece; piece * kPiece < offset + bytes; ++piece) {
    int& writer = view.writer[piece];
    if (writer == static_cast<int>(thread)) continue;
    if (writer == kFenced) ++view.all_unfenced;
    writer = static_cast<int>(thread);
    view.copied[thread].push_back(piece);
  }
}

uint32_t shared_address(const void* p) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - dynamic_shared());
}

void shared_barrier() { publish(); }

void fence_proxy_async() {
  const size_t thread = thread_number();
  view.stale = true;
  for (const size_t piece : view.copied[thread]) {
    if (view.writer[piece] != static_cast<int>(thread)) continue;
    view.writer[piece] = kFenced;
    --view.all_unfenced;
  }
  view.copied[thread].clear();
}

void wgmma_fence() { arrive(Step::Fence, nullptr); }
void wgmma_commit() { arrive(Step::Commit, nullptr); }
void wgmma(const WarpgroupProduct& product) { arrive(Step::Product, &product); }

void wgmma_wait(int groups_left) {
  warpgroup_collective("wgmma.wait_group", &groups_left, [](const void* const(&in)[kGroupThreads]) {
    Warpgroup& group = own();
    if (!group.joint.empty()) fail("threads of one warpgroup have not issued the same wgmma before they wait");
    publish();
    const auto left = static_cast<size_t>(*static_cast<const int*>(in[0]));
    while (group.groups.size() > left) {
      finish(group, group.groups.front());
      group.groups.pop_front();
    }
  });
}

}  // namespace emulation
}  // namespace mxmoe
