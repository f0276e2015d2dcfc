// The CUDA names that kernels use, over simt.h.
#pragma once

#include "simt.h"

namespace simt {

inline void wait(State state, unsigned mask, const char* where) {
  Thread& t = machine().threads[machine().current];
  t.mask = mask;
  t.where = where;
  to_scheduler(state);
}

// Every lane of `mask` gives `value`; `read` then takes what it wants, by lane.
template <class T, class Read>
auto collective(unsigned mask, T value, const char* where, Read read) {
  static_assert(sizeof(T) <= 8, "a collective over a type of more than 8 bytes");
  Machine& m = machine();
  const unsigned me = m.current, first = me / kWarpSize * kWarpSize;
  std::memcpy(&m.exchange[me], &value, sizeof value);
  wait(State::kWarpBarrier, mask, where);
  const auto result = read([&](unsigned lane) {
    if (lane >= kWarpSize || !(mask >> lane & 1))
      fail(std::string(where) + " reads a lane outside its mask");
    T given;
    std::memcpy(&given, &m.exchange[first + lane], sizeof given);
    return given;
  });
  wait(State::kWarpBarrier, mask, where);  // no lane gives again before all have read
  return result;
}

template <class T>
T shuffle(unsigned mask, T value, const char* where, unsigned source) {
  return collective(mask, value, where,
                    [&](auto given) { return source < kWarpSize ? given(source) : value; });
}

inline unsigned lane() { return machine().current % kWarpSize; }

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::machine().block_index)
#define blockDim (simt::machine().block)
#define gridDim (simt::machine().grid)

inline void __syncthreads() { simt::wait(simt::State::kBlockBarrier, 0, "__syncthreads"); }
inline void __syncwarp(unsigned mask = ~0u) {
  simt::wait(simt::State::kWarpBarrier, mask, "__syncwarp");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return simt::shuffle(mask, value, "__shfl_sync", unsigned(source) % simt::kWarpSize);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::shuffle(mask, value, "__shfl_xor_sync", simt::lane() ^ unsigned(bits));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return simt::shuffle(mask, value, "__shfl_down_sync", simt::lane() + by);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  return simt::shuffle(mask, value, "__shfl_up_sync", simt::lane() - by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::collective(mask, predicate, "__ballot_sync", [&](auto given) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < simt::kWarpSize; ++lane)
      if ((mask >> lane & 1) && given(lane)) votes |= 1u << lane;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __popcll(unsigned long long word) { return __builtin_popcountll(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __ffsll(long long word) { return __builtin_ffsll(word); }
inline int __clz(int word) { return word ? __builtin_clz(unsigned(word)) : 32; }

// A fiber is never interrupted, so a plain update is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = T(old + value);
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
template <class T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
