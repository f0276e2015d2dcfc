// tree_mask, one thread a node: six rounds of pointer jumping through shared memory cover the 64
// generations that 64 nodes can have. No CUDA header is included, so that a host shim can compile
// the same source.
#pragma once

#include "../api.h"

namespace xspec {

__global__ void __launch_bounds__(kMaxNodes) tree_mask_kernel(TreeMaskArgs a) {
  __shared__ uint64_t shared_bits[kMaxNodes];
  __shared__ int shared_depth[kMaxNodes];
  __shared__ int shared_above[kMaxNodes];
  __shared__ int shared_status;
  const int i = threadIdx.x;
  const int64_t base = int64_t(blockIdx.x) * a.nodes;
  int rows = a.num_rows ? a.num_rows[blockIdx.x] : a.nodes;
  rows = rows < 0 ? 0 : rows > a.nodes ? a.nodes : rows;

  const bool real = i < rows;
  const int parent = real ? a.parent_idx[base + i] : -1;
  const bool misplaced = real && (i == 0 ? parent != -1 : parent < 0 || parent >= i);
  const uint64_t own = uint64_t(1) << i;
  // After round r, `bits` and `depth` cover 2^r generations, `above` is the 2^r-th ancestor.
  uint64_t bits = own;
  int above = parent >= 0 && parent < rows ? parent : -1;
  int depth = above >= 0;
  if (i == 0) shared_status = 0;
  for (int round = 0; round < 6; ++round) {
    shared_bits[i] = bits;
    shared_depth[i] = depth;
    shared_above[i] = above;
    __syncthreads();
    if (above >= 0) {
      bits |= shared_bits[above];
      depth += shared_depth[above];
      above = shared_above[above];
    }
    __syncthreads();
  }

  const bool endless = above >= 0;
  const int flags = (!endless && depth >= a.max_depth ? kTooDeep : 0) |
                    (misplaced ? kBadParent : 0) | (endless ? kCycle : 0);
  if (flags) atomicOr(&shared_status, flags);
  __syncthreads();
  const int status = shared_status;
  if (status) {
    bits = own;
    depth = 0;
  }
  shared_depth[i] = depth;
  __syncthreads();

  if (i == 0) a.status[blockIdx.x] = status;
  if (i >= a.nodes) return;
  a.ancestor_bits[base + i] = real ? int64_t(bits) : 0;
  a.depth[base + i] = real ? depth : 0;
  int32_t* path = a.path_slot + (base + i) * a.max_depth;
  for (int column = real ? depth + 1 : 0; column < a.max_depth; ++column) path[column] = -1;
  if (!real) return;
  for (int node = 0; node <= i; ++node)
    if (bits >> node & 1) path[shared_depth[node]] = node;
}

}  // namespace xspec
