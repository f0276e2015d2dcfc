// csrc/cuda/tree_mask.{cuh,cu} under the shim, against the C++ CPU version on every case and
// against a walk from each node to the root on sound trees.
#include "cuda_runtime.h"
// The generated sources; they define VARIANTS(X).
#include "variants.inc"
// After them, so that nothing they lack comes from here.
#include "cases.h"

namespace {

using xspec::kMaxNodes;
using xspec::TreeMaskArgs;
using Variant = int (*)(const TreeMaskArgs&, int, void*);

#define ENTRY(name) {#name, xspec::name::tree_mask_cuda},
const std::map<std::string, Variant> kVariants = {VARIANTS(ENTRY)};

struct Trees {
  int batch, nodes, max_depth;
  bool padded;
  std::vector<int32_t> parent_idx, num_rows;
};

struct Result {
  std::vector<int64_t> ancestor_bits;
  std::vector<int32_t> depth, path_slot, status;

  explicit Result(const Trees& t)
      : ancestor_bits(t.batch * t.nodes, 77),
        depth(t.batch * t.nodes, 77),
        path_slot(t.batch * t.nodes * t.max_depth, 77),
        status(t.batch, 77) {}

  TreeMaskArgs args(const Trees& t) {
    const int32_t* rows = t.padded ? t.num_rows.data() : nullptr;
    return {t.parent_idx.data(),
            rows,
            ancestor_bits.data(),
            depth.data(),
            path_slot.data(),
            status.data(),
            t.batch,
            t.nodes,
            t.max_depth};
  }
  void expect(const char* against, const Result& want) const {
    try {
      expect_equal("status", status, want.status);
      expect_equal("ancestor_bits", ancestor_bits, want.ancestor_bits);
      expect_equal("depth", depth, want.depth);
      expect_equal("path_slot", path_slot, want.path_slot);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(error.what()) + " by the " + against);
    }
  }
};

Trees draw_trees(Random& random) {
  const int sizes[] = {1, 2, 31, 32, 33, 63, 64, random.draw(1, 64)};
  Trees t;
  t.batch = random.draw(1, 3);
  t.nodes = sizes[random.draw(0, 7)];
  t.max_depth = random.chance(50) ? kMaxNodes : random.draw(1, 40);
  t.padded = random.chance(60);
  for (int b = 0; b < t.batch; ++b) {
    const int reach = random.chance(40) ? 1 : random.draw(2, 8);
    t.num_rows.push_back(random.chance(70) ? random.draw(-2, t.nodes + 2) : t.nodes);
    for (int i = 0; i < t.nodes; ++i)
      t.parent_idx.push_back(i ? random.draw(std::max(0, i - reach), i - 1) : -1);
  }
  return t;
}

void damage(Trees& t, Random& random) {
  for (int times = random.draw(1, 3); times > 0; --times)
    t.parent_idx[random.draw(0, t.batch * t.nodes - 1)] = random.draw(-2, t.nodes + 1);
}

Result oracle(const Trees& t) {
  Result result(t);
  for (int b = 0; b < t.batch; ++b) {
    const int given = t.padded ? t.num_rows[b] : t.nodes;
    const int rows = std::min(std::max(given, 0), t.nodes);
    std::vector<std::vector<int>> paths(t.nodes);
    size_t longest = 0;
    for (int i = 0; i < rows; ++i) {
      for (int node = i; node >= 0; node = t.parent_idx[b * t.nodes + node])
        paths[i].insert(paths[i].begin(), node);
      longest = std::max(longest, paths[i].size());
    }
    result.status[b] = longest > size_t(t.max_depth) ? xspec::kTooDeep : 0;
    for (int i = 0; i < t.nodes; ++i) {
      if (result.status[b] && i < rows) paths[i] = {i};
      const int at = b * t.nodes + i;
      uint64_t bits = 0;
      for (const int node : paths[i]) bits |= uint64_t(1) << node;
      result.ancestor_bits[at] = int64_t(bits);
      result.depth[at] = std::max(int(paths[i].size()) - 1, 0);
      for (int d = 0; d < t.max_depth; ++d)
        result.path_slot[at * t.max_depth + d] = d < int(paths[i].size()) ? paths[i][d] : -1;
    }
  }
  return result;
}

long run_case(const Variant& variant, Random& random, int) {
  Trees trees = draw_trees(random);
  const bool sound = random.chance(60);
  if (!sound) damage(trees, random);
  Result got(trees), cpu(trees);
  if (variant(got.args(trees), 0, nullptr)) mismatch("the launch returned an error");
  if (sound) got.expect("walk to the root", oracle(trees));
  xspec::tree_mask_cpu(cpu.args(trees));
  got.expect("CPU version", cpu);
  long depths = 0;
  for (const int depth : got.depth) depths += depth;
  return depths;
}

}  // namespace

int main(int argc, char** argv) { return drive(argc, argv, kVariants, run_case); }
