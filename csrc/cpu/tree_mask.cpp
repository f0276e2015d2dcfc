// tree_mask on the CPU: one pass over the nodes, each taking its parent's bits and depth.
#include <algorithm>

#include "../api.h"

namespace xspec {
namespace {

// True if following the parents from some node never ends. Parents outside [0, rows) end a path.
bool has_cycle(const int32_t* parent, int rows) {
  for (int i = 0; i < rows; ++i) {
    int node = i, steps = 0;
    while (node >= 0 && node < rows && steps <= rows) {
      node = parent[node];
      ++steps;
    }
    if (steps > rows) return true;
  }
  return false;
}

// True if some node that is on no cycle lies at depth max_depth or below.
bool too_deep(const int32_t* parent, int rows, int max_depth) {
  for (int i = 0; i < rows; ++i) {
    int node = parent[i], depth = 0;
    while (node >= 0 && node < rows && depth <= rows) {
      node = parent[node];
      ++depth;
    }
    if (depth >= max_depth && depth < rows) return true;
  }
  return false;
}

int32_t check(const int32_t* parent, int rows, int max_depth) {
  bool bad = rows > 0 && parent[0] != -1;
  for (int i = 1; i < rows; ++i) bad |= parent[i] < 0 || parent[i] >= i;
  int32_t status = bad ? kBadParent : 0;
  if (bad && has_cycle(parent, rows)) status |= kCycle;
  if (rows > max_depth && too_deep(parent, rows, max_depth)) status |= kTooDeep;
  return status;
}

}  // namespace

void tree_mask_cpu(const TreeMaskArgs& a) {
  for (int b = 0; b < a.batch; ++b) {
    const int64_t base = int64_t(b) * a.nodes;
    const int rows = a.num_rows ? std::clamp(a.num_rows[b], 0, a.nodes) : a.nodes;
    const int32_t* parent = a.parent_idx + base;
    int64_t* bits = a.ancestor_bits + base;
    int32_t* depth = a.depth + base;
    int32_t* path = a.path_slot + base * a.max_depth;
    a.status[b] = check(parent, rows, a.max_depth);
    std::fill(path, path + int64_t(a.nodes) * a.max_depth, -1);
    for (int i = 0; i < a.nodes; ++i, path += a.max_depth) {
      if (i >= rows) {
        bits[i] = depth[i] = 0;
        continue;
      }
      const int64_t self = int64_t(uint64_t(1) << i);
      if (i == 0 || a.status[b]) {
        bits[i] = self;
        depth[i] = 0;
      } else {
        bits[i] = bits[parent[i]] | self;
        depth[i] = depth[parent[i]] + 1;
        const int32_t* above = path - int64_t(i - parent[i]) * a.max_depth;
        std::copy(above, above + depth[i], path);
      }
      path[depth[i]] = i;
    }
  }
}

}  // namespace xspec
