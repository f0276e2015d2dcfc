// kv_commit, all caches in one launch. A thread owns one word column of one (cache, request, head):
// it reads and writes that column alone, so no other thread can overtake it and no barrier is
// needed. Rows go kBatch at a time, all reads of a batch before its writes, to overlap the loads; a
// later batch reads only rows above those already written, because the path ascends. No CUDA header
// is included, so that a host shim can compile the same source.
#pragma once

#include "../api.h"

namespace xspec {

constexpr int kCommitThreads = 128;
constexpr int kBatch = 8;

template <class Word>
__global__ void __launch_bounds__(kCommitThreads) kv_commit_kernel(KvCommitArgs a) {
  const int64_t columns = int64_t(a.num_caches) * a.batch * a.heads * a.row_words;
  const int64_t column = int64_t(blockIdx.x) * kCommitThreads + threadIdx.x;
  if (column < a.batch) {
    const int len = a.accept_len[column];
    a.new_seqlens[column] = a.cache_seqlens[column] + (len < -1 ? -1 : len) + 1;
  }
  if (column >= columns) return;

  const int word = column % a.row_words;
  const int64_t group = column / a.row_words;
  const int head = group % a.heads;
  const int request = group / a.heads % a.batch;
  const int cache = group / a.heads / a.batch;
  const int64_t start = a.cache_seqlens[request];
  const int64_t room = a.slots - start;
  const int32_t* path = a.accept_path + int64_t(request) * a.path_width;
  int len = a.accept_len[request];
  len = len > a.path_width ? a.path_width : len;
  if (start < 0) return;

  Word* root = reinterpret_cast<Word*>(a.caches[cache]) + request * a.stride_batch +
               head * a.stride_head + start * a.stride_slot + word;
  for (int first = 0; first < len; first += kBatch) {
    Word row[kBatch];
    bool move[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int j = first + k;
      const int node = j < len ? path[j] : 0;
      move[k] = node > j + 1 && node < room;
      if (move[k]) row[k] = root[node * a.stride_slot];
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (move[k]) root[(first + k + 1) * a.stride_slot] = row[k];
  }
}

}  // namespace xspec
