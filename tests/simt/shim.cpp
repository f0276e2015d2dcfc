// The shim on kernels small enough to judge by eye: sound ones give the right answer, faulty ones
// are reported. Usage: shim NAME; exit status 0 if the kernel's answer was right.
#include <cstdio>
#include <map>
#include <memory>

#include "simt.h"

namespace {

constexpr int kThreads = 128;

__global__ void reversed(int* out) {
  __shared__ int stage[kThreads];
  const int t = threadIdx.x;
  stage[t] = t;
  __syncthreads();
  out[t] = stage[kThreads - 1 - t];
}

__global__ void reversed_without_barrier(int* out) {
  __shared__ int stage[kThreads];
  const int t = threadIdx.x;
  stage[t] = t;
  out[t] = stage[kThreads - 1 - t];
}

__global__ void reversed_past_the_end(int* out) {
  __shared__ int stage[kThreads];
  const int t = threadIdx.x;
  stage[t + 1] = t;
  __syncthreads();
  out[t] = stage[kThreads - t];
}

__global__ void reversed_by_shuffles(int* out) {
  __shared__ int warp_value[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int mirrored = __shfl_xor_sync(~0u, lane, 31);
  const int first = __shfl_sync(~0u, warp, 0);
  if (lane == 0) warp_value[kThreads / 32 - 1 - first] = warp;
  __syncthreads();
  out[threadIdx.x] = warp_value[warp] * 32 + mirrored;
}

__global__ void reversed_by_votes(int* out) {
  __shared__ int above;
  if (threadIdx.x == 0) above = 0;
  __syncthreads();
  for (int t = 0; t < kThreads; ++t) {
    const unsigned votes = __ballot_sync(~0u, int(threadIdx.x) > t);
    if (threadIdx.x % 32 == 0) atomicAdd(&above, __popc(votes));
    __syncthreads();
    if (int(threadIdx.x) == t) out[t] = above, above = 0;
    __syncthreads();
  }
}

__global__ void stale_shared_memory(int* out) {
  __shared__ int stage[kThreads];
  const int t = threadIdx.x;
  if (stage[t] != kThreads - 1 - t) out[t] = stage[t];
  stage[t] = kThreads - 1 - t;
}

__global__ void barrier_in_a_branch(int* out) {
  if (threadIdx.x < 32) return;
  __syncthreads();
  out[threadIdx.x] = kThreads - 1 - threadIdx.x;
}

__global__ void mask_of_absent_lanes(int* out) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

__global__ void lane_outside_its_mask(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, int(threadIdx.x), 1);
}

__global__ void source_outside_the_mask(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, int(threadIdx.x), 20);
}

__global__ void two_collectives_of_one_mask(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __any_sync(~0u, 1) : __shfl_sync(~0u, 1, 0);
}

__global__ void past_the_end(int* out) { out[threadIdx.x + 1] = 0; }

const std::map<std::string, void (*)(int*)> kKernels = {
    {"reversed", reversed},
    {"reversed_by_shuffles", reversed_by_shuffles},
    {"reversed_by_votes", reversed_by_votes},
    {"reversed_without_barrier", reversed_without_barrier},
    {"reversed_past_the_end", reversed_past_the_end},
    {"stale_shared_memory", stale_shared_memory},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"mask_of_absent_lanes", mask_of_absent_lanes},
    {"lane_outside_its_mask", lane_outside_its_mask},
    {"source_outside_the_mask", source_outside_the_mask},
    {"two_collectives_of_one_mask", two_collectives_of_one_mask},
    {"past_the_end", past_the_end},
};

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto kernel = kKernels.at(argc > 1 ? argv[1] : "");
    const std::unique_ptr<int[]> out(new int[kThreads]);
    simt::launch(2, kThreads, 0, nullptr, [&] { kernel(out.get()); });
    for (int t = 0; t < kThreads; ++t)
      if (out[t] != kThreads - 1 - t) simt::fail("wrong answer at " + std::to_string(t));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  std::puts("right");
}
