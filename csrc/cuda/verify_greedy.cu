#include "device.cuh"
#include "verify_greedy.cuh"

namespace xspec {

template <class Token>
int verify_greedy_cuda(const VerifyGreedyArgs<Token>& args, int device, void* stream) {
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  verify_greedy_kernel<<<args.batch, 32, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template int verify_greedy_cuda(const VerifyGreedyArgs<int32_t>&, int, void*);
template int verify_greedy_cuda(const VerifyGreedyArgs<int64_t>&, int, void*);

}  // namespace xspec
