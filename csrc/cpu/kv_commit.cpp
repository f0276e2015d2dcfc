// kv_commit on the CPU. An ascending path never writes a row that a later step still has to read,
// so rows move one after another in place.
#include <algorithm>
#include <cstring>

#include "../api.h"

namespace xspec {
namespace {

bool valid(const KvCommitArgs& a, int b) {
  const int len = a.accept_len[b];
  const int32_t* path = a.accept_path + int64_t(b) * a.path_width;
  if (len > a.path_width || a.cache_seqlens[b] < 0) return false;
  for (int j = 0; j < len; ++j)
    if (path[j] <= (j ? path[j - 1] : 0)) return false;
  const int last = len > 0 ? path[len - 1] : 0;
  return len < 0 || int64_t(a.cache_seqlens[b]) + last < a.slots;
}

}  // namespace

int kv_commit_cpu(const KvCommitArgs& a) {
  for (int b = 0; b < a.batch; ++b)
    if (!valid(a, b)) return b;
  const size_t row_bytes = size_t(a.row_words) * a.word_bytes;
  for (int b = 0; b < a.batch; ++b) {
    const int64_t start = a.cache_seqlens[b];
    const int32_t* path = a.accept_path + int64_t(b) * a.path_width;
    const int len = std::max(a.accept_len[b], -1);
    a.new_seqlens[b] = int32_t(start) + len + 1;
    int first = 0;
    while (first < len && path[first] == first + 1) ++first;
    if (first >= len) continue;
    for (int c = 0; c < a.num_caches; ++c)
      for (int h = 0; h < a.heads; ++h) {
        const int64_t offset = b * a.stride_batch + h * a.stride_head + start * a.stride_slot;
        char* root = reinterpret_cast<char*>(a.caches[c]) + offset * a.word_bytes;
        const int64_t slot_bytes = a.stride_slot * a.word_bytes;
        for (int j = first; j < len; ++j)
          std::memcpy(root + (j + 1) * slot_bytes, root + path[j] * slot_bytes, row_bytes);
      }
  }
  return -1;
}

}  // namespace xspec
