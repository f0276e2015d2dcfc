// Runs the source of a CUDA kernel as C++ on the host, so that sanitizers see every access.
//
// Each thread is a fiber and blocks run one after another. A fiber keeps the processor until it
// waits in __syncthreads or a warp collective; which one runs next is its index, or drawn at random
// where SIMT_SEED is set. Shared memory is poisoned before every block. What would hang or be
// undefined on a device is an exception: a barrier that not all threads reach, a mask naming lanes
// that never come, lanes of one mask in two collectives.
//
// A missing barrier shows as a wrong answer in some order of the threads, and in any order under
// ThreadSanitizer: to it the fibers are threads that only __syncthreads and __syncwarp order.
//
// Stricter than hardware: exited threads do not count as arrived at __syncthreads. Not modelled:
// time, dynamic shared memory, asynchronous copies, matrix units, weak memory, races between
// blocks. g++ cannot place a __shared__ variable of a template in the poisoned section.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after another on one system thread: static storage is the block's own.
#define __shared__ static __attribute__((section("simt_shared")))

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())

// simt.cpp, which no thread sanitizer may instrument.
namespace simt {

constexpr unsigned kWarpSize = 32;

[[noreturn]] void fail(const std::string& what);

// What `kernel<<<grid, block, shared, stream>>>(args)` becomes.
void launch(dim3 grid, dim3 block, size_t shared, void* stream, std::function<void()> kernel);

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
unsigned lane();

void wait_block(const char* where);
// Waits until all lanes of `mask` wait under the same name. `orders`: memory is ordered, too.
void wait_warp(unsigned mask, const char* where, bool orders);
// One word of each thread, for shuffles and votes.
void give(uint64_t word);
uint64_t given(unsigned lane);

// Every lane of `mask` gives `value`; `read` then takes what it wants, by lane.
template <class T, class Read>
auto collective(unsigned mask, T value, const char* where, Read read) {
  static_assert(sizeof(T) <= 8, "a collective over a type of more than 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  give(word);
  wait_warp(mask, where, false);
  const auto result = read([&](unsigned lane) {
    if (lane >= kWarpSize || !(mask >> lane & 1))
      fail(std::string(where) + " reads a lane outside its mask");
    const uint64_t word = given(lane);
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  });
  wait_warp(mask, where, false);  // no lane gives again before all have read
  return result;
}

template <class T>
T shuffle(unsigned mask, T value, const char* where, unsigned source) {
  return collective(mask, value, where,
                    [&](auto from) { return source < kWarpSize ? from(source) : value; });
}

}  // namespace simt

#include "simt_intrinsics.h"
