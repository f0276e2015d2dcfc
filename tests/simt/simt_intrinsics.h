// The CUDA functions that kernels use, over simt.h.
#pragma once

#include "simt.h"

inline void __syncthreads() { simt::wait_block("__syncthreads"); }
inline void __syncwarp(unsigned mask = ~0u) { simt::wait_warp(mask, "__syncwarp", true); }

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
  return simt::collective(mask, predicate, "__ballot_sync", [&](auto from) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < simt::kWarpSize; ++lane)
      if ((mask >> lane & 1) && from(lane)) votes |= 1u << lane;
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

// Integers only. A fiber is never interrupted; the builtins tell ThreadSanitizer what is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMax(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && atomicCAS(address, old, value) != old)
    old = __atomic_load_n(address, __ATOMIC_RELAXED);
  return old;
}
