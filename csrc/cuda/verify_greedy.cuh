// verify_greedy, one warp a request: lane l owns nodes l and l + 32, two ballots make the 64-bit
// set of matching nodes, a shuffle maximum picks the longest accepted path. No CUDA header is
// included, so that a host shim can compile the same source.
#pragma once

#include "../api.h"

namespace xspec {

constexpr unsigned kWarp = 0xffffffffu;

template <class Token>
__global__ void __launch_bounds__(32) verify_greedy_kernel(VerifyGreedyArgs<Token> a) {
  const int lane = threadIdx.x;
  const int64_t base = int64_t(blockIdx.x) * a.nodes;
  int rows = a.num_rows ? a.num_rows[blockIdx.x] : a.nodes;
  rows = rows < 0 ? 0 : rows > a.nodes ? a.nodes : rows;

  uint64_t ok = 0;
  for (int half = 0; half < 2; ++half) {
    const int i = lane + 32 * half;
    bool match = i == 0 && rows > 0;
    if (i > 0 && i < rows) {
      const int p = a.parent_idx[base + i];
      if (p >= 0 && p < i) {
        const Token want = a.target_ids[base + p];
        match = want >= 0 && a.token_ids[base + i] == want;
      }
    }
    ok |= uint64_t(__ballot_sync(kWarp, match)) << (32 * half);
  }

  // Key: path length above the node's index reversed, so the maximum is the longest, then the
  // lowest. An idle request keeps key 0 and so accept_len -1.
  int best = 0;
  for (int half = 0; half < 2; ++half) {
    const int i = lane + 32 * half;
    if (i >= rows) continue;
    const uint64_t bits = i ? uint64_t(a.ancestor_bits[base + i]) : 1;
    const bool complete = (bits & 1) && (bits >> i & 1) && (bits & ok) == bits;
    const int key = complete ? __popcll(bits) * kMaxNodes + (kMaxNodes - 1 - i) : 0;
    best = key > best ? key : best;
  }
  for (int step = 16; step > 0; step >>= 1) {
    const int other = __shfl_xor_sync(kWarp, best, step);
    best = other > best ? other : best;
  }

  const int len = best / kMaxNodes - 1;
  const int node = kMaxNodes - 1 - best % kMaxNodes;
  const uint64_t taken = len > 0 ? uint64_t(a.ancestor_bits[base + node]) & ~uint64_t(1) : 0;
  for (int half = 0; half < 2; ++half) {
    const int i = lane + 32 * half;
    if (i >= a.nodes) continue;
    if (taken >> i & 1) {
      const int rank = __popcll(taken & ((uint64_t(1) << i) - 1));
      a.accept_path[base + rank] = i;
      a.output_ids[base + rank] = a.token_ids[base + i];
    }
    if (i >= len) {
      a.accept_path[base + i] = -1;
      const Token recovered = i == len ? a.target_ids[base + node] : Token(-1);
      a.output_ids[base + i] = recovered < 0 ? Token(-1) : recovered;
    }
  }
  if (lane == 0) a.accept_len[blockIdx.x] = len;
}

}  // namespace xspec
