#include "device.cuh"
#include "tree_mask.cuh"

namespace xspec {

int tree_mask_cuda(const TreeMaskArgs& args, int device, void* stream) {
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  tree_mask_kernel<<<args.batch, kMaxNodes, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace xspec
