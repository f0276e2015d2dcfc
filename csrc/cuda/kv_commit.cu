#include <algorithm>

#include "device.cuh"
#include "kv_commit.cuh"

namespace xspec {
namespace {

template <class Word>
void launch(const KvCommitArgs& args, cudaStream_t stream) {
  const int64_t columns = int64_t(args.num_caches) * args.batch * args.heads * args.row_words;
  const int64_t blocks = (columns + kCommitThreads - 1) / kCommitThreads;
  kv_commit_kernel<Word><<<unsigned(blocks), kCommitThreads, 0, stream>>>(args);
}

}  // namespace

int kv_commit_cuda(const KvCommitArgs& args, int device, void* raw_stream) {
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  switch (args.word_bytes) {
    case 1:
      launch<uint8_t>(args, stream);
      break;
    case 2:
      launch<uint16_t>(args, stream);
      break;
    case 4:
      launch<uint32_t>(args, stream);
      break;
    case 8:
      launch<uint64_t>(args, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace xspec
