// verify_greedy on the CPU: nodes in order, each accepted iff its ancestors are and its token
// matches.
#include <algorithm>

#include "../api.h"

namespace xspec {

template <class Token>
void verify_greedy_cpu(const VerifyGreedyArgs<Token>& a) {
  for (int b = 0; b < a.batch; ++b) {
    const int64_t base = int64_t(b) * a.nodes;
    const int rows = a.num_rows ? std::clamp(a.num_rows[b], 0, a.nodes) : a.nodes;
    const Token* token = a.token_ids + base;
    const Token* target = a.target_ids + base;
    const int32_t* parent = a.parent_idx + base;
    int32_t* path = a.accept_path + base;
    Token* output = a.output_ids + base;

    std::fill(path, path + a.nodes, -1);
    std::fill(output, output + a.nodes, Token(-1));
    a.accept_len[b] = -1;
    if (rows == 0) continue;

    uint64_t ok = 1;
    for (int i = 1; i < rows; ++i) {
      const int p = parent[i];
      if (p >= 0 && p < i && target[p] >= 0 && token[i] == target[p]) ok |= uint64_t(1) << i;
    }
    uint64_t best_bits = 1;
    int best = 0, best_len = 0;
    for (int i = 1; i < rows; ++i) {
      const uint64_t bits = uint64_t(a.ancestor_bits[base + i]);
      const bool complete = (bits & 1) && (bits >> i & 1) && (bits & ok) == bits;
      const int len = __builtin_popcountll(bits) - 1;
      if (complete && len > best_len) {
        best = i;
        best_len = len;
        best_bits = bits;
      }
    }
    int k = 0;
    for (uint64_t left = best_bits & ~uint64_t(1); left; left &= left - 1, ++k) {
      path[k] = __builtin_ctzll(left);
      output[k] = token[path[k]];
    }
    output[k] = std::max(target[best], Token(-1));
    a.accept_len[b] = best_len;
  }
}

template void verify_greedy_cpu(const VerifyGreedyArgs<int32_t>&);
template void verify_greedy_cpu(const VerifyGreedyArgs<int64_t>&);

}  // namespace xspec
