// csrc/cuda/kv_commit.{cuh,cu} under the shim, against a definition that reads all rows before it
// writes any, and, where the paths are sound, against the C++ CPU version. Every byte is compared.
#include "cuda_runtime.h"
// The generated sources; they define VARIANTS(X).
#include "variants.inc"
// After them, so that nothing they lack comes from here.
#include "cases.h"

namespace {

using xspec::KvCommitArgs;
using Variant = int (*)(const KvCommitArgs&, int, void*);
using Bytes = std::vector<uint8_t>;

#define ENTRY(name) {#name, xspec::name::kv_commit_cuda},
const std::map<std::string, Variant> kVariants = {VARIANTS(ENTRY)};

struct Case {
  std::vector<Bytes> caches;
  std::vector<int64_t> addresses;
  std::vector<int32_t> accept_path, accept_len, cache_seqlens, new_seqlens;
  KvCommitArgs shape{};

  KvCommitArgs args() {
    KvCommitArgs a = shape;
    addresses.clear();
    for (Bytes& cache : caches) addresses.push_back(reinterpret_cast<int64_t>(cache.data()));
    a.caches = addresses.data();
    a.accept_path = accept_path.data();
    a.accept_len = accept_len.data();
    a.cache_seqlens = cache_seqlens.data();
    a.new_seqlens = new_seqlens.data();
    return a;
  }
  void expect(const char* against, const Case& want) const {
    try {
      expect_equal("new_seqlens", new_seqlens, want.new_seqlens);
      for (size_t c = 0; c < caches.size(); ++c) expect_equal("cache", caches[c], want.caches[c]);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(error.what()) + " by the " + against);
    }
  }
};

// [B, H, S, D], [B, S, H, D] or rows with a gap behind them; the last row ends the allocation.
void draw_layout(KvCommitArgs& a, Random& random) {
  const int64_t row = a.row_words + (random.chance(30) ? random.draw(1, 3) : 0);
  const bool slots_outside = random.chance(50);
  a.stride_slot = slots_outside ? row * a.heads : row;
  a.stride_head = slots_outside ? row : row * a.slots;
  a.stride_batch = row * a.heads * a.slots;
}

void draw_path(Case& c, Random& random, int request, int room) {
  const KvCommitArgs& a = c.shape;
  const int percent = random.draw(20, 100);
  std::vector<int> path;
  for (int node = 1; node < room && int(path.size()) < a.path_width; ++node)
    if (random.chance(percent)) path.push_back(node);
  c.accept_len[request] = random.chance(15) ? -1 : int(path.size());
  for (size_t j = 0; j < path.size(); ++j) c.accept_path[request * a.path_width + j] = path[j];
}

Case draw_case(Random& random) {
  Case c;
  KvCommitArgs& a = c.shape;
  a.num_caches = random.draw(1, 3);
  a.batch = random.draw(1, 3);
  a.heads = random.draw(1, 3);
  a.slots = random.draw(1, 80);
  a.row_words = random.draw(1, 20);
  a.path_width = random.draw(1, 64);
  a.word_bytes = 1 << random.draw(0, 3);
  draw_layout(a, random);
  const int64_t words = (a.batch - 1) * a.stride_batch + (a.heads - 1) * a.stride_head +
                        (a.slots - 1) * a.stride_slot + a.row_words;
  c.caches.assign(a.num_caches, Bytes(words * a.word_bytes));
  for (Bytes& cache : c.caches)
    for (uint8_t& byte : cache) byte = uint8_t(random.generator());
  c.accept_path.assign(a.batch * a.path_width, -1);
  c.accept_len.assign(a.batch, 0);
  c.new_seqlens.assign(a.batch, 77);
  for (int b = 0; b < a.batch; ++b) {
    c.cache_seqlens.push_back(random.draw(0, a.slots - 1));
    draw_path(c, random, b, a.slots - c.cache_seqlens[b]);
  }
  return c;
}

// What the kernel must survive: rows that leave the cache are skipped.
void damage(Case& c, Random& random) {
  const KvCommitArgs& a = c.shape;
  const int request = random.draw(0, a.batch - 1);
  switch (random.draw(0, 3)) {
    case 0:
      c.cache_seqlens[request] = random.draw(0, a.slots + 2);
      break;
    case 1:
      c.cache_seqlens[request] = -random.draw(1, 3);
      break;
    case 2:
      c.accept_len[request] =
          random.chance(50) ? random.draw(a.path_width, 99) : -random.draw(2, 9);
      break;
    default:
      for (int j = 0, node = 0; j < a.path_width; ++j)
        c.accept_path[request * a.path_width + j] = node += random.draw(1, 3);
      c.accept_len[request] = a.path_width;
  }
}

// All sources are read from `before`, so no order of moves can matter.
long define(const Case& before, Case& after) {
  const KvCommitArgs& a = before.shape;
  long moved = 0;
  for (int b = 0; b < a.batch; ++b) {
    const int64_t start = before.cache_seqlens[b];
    const int len = before.accept_len[b];
    after.new_seqlens[b] = int32_t(start) + std::max(len, -1) + 1;
    for (int j = 0; j < std::min(len, a.path_width) && start >= 0; ++j) {
      const int node = before.accept_path[b * a.path_width + j];
      if (node <= j + 1 || start + node >= a.slots) continue;
      ++moved;
      for (int c = 0; c < a.num_caches; ++c)
        for (int h = 0; h < a.heads; ++h) {
          const int64_t root = b * a.stride_batch + h * a.stride_head + start * a.stride_slot;
          const int64_t from = (root + node * a.stride_slot) * a.word_bytes;
          const int64_t to = (root + (j + 1) * a.stride_slot) * a.word_bytes;
          for (int byte = 0; byte < a.row_words * a.word_bytes; ++byte)
            after.caches[c][to + byte] = before.caches[c][from + byte];
        }
    }
  }
  return moved;
}

long run_case(const Variant& variant, Random& random, int) {
  Case before = draw_case(random);
  const bool sound = random.chance(70);
  if (!sound) damage(before, random);
  Case got = before, want = before, cpu = before;
  if (variant(got.args(), 0, nullptr)) mismatch("the launch returned an error");
  const long moved = define(before, want);
  got.expect("definition", want);
  if (sound) {
    if (xspec::kv_commit_cpu(cpu.args()) != -1) mismatch("the CPU version refused a sound path");
    got.expect("CPU version", cpu);
  }
  return moved;
}

}  // namespace

int main(int argc, char** argv) { return drive(argc, argv, kVariants, run_case); }
