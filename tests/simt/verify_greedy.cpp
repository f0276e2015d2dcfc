// csrc/cuda/verify_greedy.{cuh,cu} under the shim, against the C++ CPU version on every case and
// against a walk along all paths on sound trees.
#include "cuda_runtime.h"
// The generated sources; they define VARIANTS(X).
#include "variants.inc"
// After them, so that nothing they lack comes from here.
#include "cases.h"

namespace {

using xspec::kMaxNodes;
using xspec::VerifyGreedyArgs;

struct Variant {
  int (*narrow)(const VerifyGreedyArgs<int32_t>&, int, void*);
  int (*wide)(const VerifyGreedyArgs<int64_t>&, int, void*);

  int operator()(const VerifyGreedyArgs<int32_t>& a) const { return narrow(a, 0, nullptr); }
  int operator()(const VerifyGreedyArgs<int64_t>& a) const { return wide(a, 0, nullptr); }
};

#define ENTRY(name) \
  {#name, {xspec::name::verify_greedy_cuda<int32_t>, xspec::name::verify_greedy_cuda<int64_t>}},
const std::map<std::string, Variant> kVariants = {VARIANTS(ENTRY)};

template <class Token>
struct Trees {
  int batch, nodes;
  bool padded;
  std::vector<Token> token_ids, target_ids;
  std::vector<int32_t> parent_idx, num_rows;
  std::vector<int64_t> ancestor_bits;
};

template <class Token>
struct Result {
  std::vector<int32_t> accept_len, accept_path;
  std::vector<Token> output_ids;

  explicit Result(const Trees<Token>& t)
      : accept_len(t.batch, 77),
        accept_path(t.batch * t.nodes, 77),
        output_ids(t.batch * t.nodes, 77) {}

  VerifyGreedyArgs<Token> args(const Trees<Token>& t) {
    return {t.token_ids.data(),
            t.parent_idx.data(),
            t.target_ids.data(),
            t.ancestor_bits.data(),
            t.padded ? t.num_rows.data() : nullptr,
            accept_len.data(),
            accept_path.data(),
            output_ids.data(),
            t.batch,
            t.nodes};
  }
  void expect(const char* against, const Result& want) const {
    try {
      expect_equal("accept_len", accept_len, want.accept_len);
      expect_equal("accept_path", accept_path, want.accept_path);
      expect_equal("output_ids", output_ids, want.output_ids);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(error.what()) + " by the " + against);
    }
  }
};

// Parents near their children make deep trees; two token values make many nodes match and tie.
template <class Token>
Trees<Token> draw_trees(Random& random) {
  const int sizes[] = {1, 2, 5, 31, 32, 33, 63, 64, random.draw(1, 64)};
  Trees<Token> t;
  t.batch = random.draw(1, 3);
  t.nodes = sizes[random.draw(0, 8)];
  t.padded = random.chance(60);
  const int values = random.chance(30) ? 1 : 2;
  const int reach = random.chance(30) ? 1 : 5;
  for (int b = 0; b < t.batch; ++b) {
    t.num_rows.push_back(random.chance(70) ? random.draw(0, t.nodes) : t.nodes);
    std::vector<uint64_t> bits;
    for (int i = 0; i < t.nodes; ++i) {
      const int parent = i ? random.draw(std::max(0, i - reach), i - 1) : -1;
      bits.push_back((i ? bits[parent] : 0) | uint64_t(1) << i);
      t.parent_idx.push_back(parent);
      t.ancestor_bits.push_back(int64_t(bits.back()));
      t.token_ids.push_back(Token(random.draw(1, values)));
      t.target_ids.push_back(random.chance(4) ? Token(-1 - random.draw(0, 4))
                                              : Token(random.draw(1, values)));
    }
  }
  return t;
}

// Parents outside the tree, ancestor words that do not fit them, invalid targets drafted as such.
template <class Token>
void damage(Trees<Token>& t, Random& random) {
  for (int times = random.draw(1, 6); times > 0; --times) {
    const int row = random.draw(0, t.batch - 1) * t.nodes;
    const int node = random.draw(0, t.nodes - 1), parent = t.parent_idx[row + node];
    if (random.chance(40)) t.ancestor_bits[row + node] ^= int64_t(1) << random.draw(0, 62);
    if (random.chance(40)) t.num_rows[row / t.nodes] = random.draw(-3, t.nodes + 3);
    if (random.chance(40) && parent >= 0 && parent < node)
      t.token_ids[row + node] = t.target_ids[row + parent] = -1 - random.draw(0, 1);
    if (random.chance(40)) t.parent_idx[row + node] = random.draw(-2, t.nodes + 1);
  }
}

template <class Token>
Result<Token> oracle(const Trees<Token>& t) {
  Result<Token> result(t);
  for (int b = 0; b < t.batch; ++b) {
    const int rows = t.padded ? t.num_rows[b] : t.nodes;
    std::vector<int> best;
    for (int i = 0; i < rows; ++i) {
      std::vector<int> path;
      bool agreed = true;
      for (int node = i; node >= 0; node = t.parent_idx[b * t.nodes + node]) {
        path.insert(path.begin(), node);
        const int up = t.parent_idx[b * t.nodes + node];
        if (up < 0) continue;
        const Token want = t.target_ids[b * t.nodes + up];
        agreed = agreed && want >= 0 && want == t.token_ids[b * t.nodes + node];
      }
      if (agreed && path.size() > best.size()) best = path;
    }
    result.accept_len[b] = int(best.size()) - 1;
    for (int k = 0; k < t.nodes; ++k) {
      const int at = b * t.nodes + k;
      const bool taken = k + 1 < int(best.size());
      result.accept_path[at] = taken ? best[k + 1] : -1;
      result.output_ids[at] = taken ? t.token_ids[b * t.nodes + best[k + 1]] : Token(-1);
      if (k + 1 == int(best.size()))
        result.output_ids[at] = std::max(t.target_ids[b * t.nodes + best[k]], Token(-1));
    }
  }
  return result;
}

template <class Token>
long run_case(const Variant& variant, Random& random) {
  auto trees = draw_trees<Token>(random);
  const bool sound = random.chance(70);
  if (!sound) damage(trees, random);
  Result<Token> got(trees), cpu(trees);
  if (variant(got.args(trees))) mismatch("the launch returned an error");
  if (sound) got.expect("walk along all paths", oracle(trees));
  xspec::verify_greedy_cpu(cpu.args(trees));
  got.expect("CPU version", cpu);
  long accepted = 0;
  for (const int len : got.accept_len) accepted += std::max(len, 0);
  return accepted;
}

}  // namespace

int main(int argc, char** argv) {
  return drive(argc, argv, kVariants, [](const Variant& variant, Random& random, int number) {
    return number % 2 ? run_case<int32_t>(variant, random) : run_case<int64_t>(variant, random);
  });
}
