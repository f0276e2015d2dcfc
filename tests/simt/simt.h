// Runs the source of a CUDA kernel as C++ on the host, so that sanitizers see every access.
//
// Each thread is a fiber and blocks run one after another. A fiber keeps the processor until it
// waits in __syncthreads or a warp collective; which one runs next is its index, or drawn at random
// where SIMT_SEED is set: an order in which a missing barrier shows. Shared memory is poisoned
// before every block. What would hang or be undefined on a device is an exception: a barrier that
// not all threads reach, a mask naming lanes that never come, lanes of one mask in two collectives.
//
// Stricter than hardware: exited threads do not count as arrived at __syncthreads. Not modelled:
// time, dynamic shared memory, asynchronous copies, matrix units, weak memory, blocks that wait for
// one another. g++ cannot place a __shared__ variable of a template in the poisoned section.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN(call) call
#else
#define SIMT_ASAN(call) (void)0
#endif

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
extern "C" char __start_simt_shared[] __attribute__((weak));
extern "C" char __stop_simt_shared[] __attribute__((weak));

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStack = 128 << 10;
constexpr int kPoison = 0xCB;

enum class State { kReady, kBlockBarrier, kWarpBarrier, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  unsigned mask = 0;       // of the collective it waits in
  const char* where = "";  // that collective's name
  void* fake_stack = nullptr;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<uint64_t> exchange;  // one word a thread, for shuffles and votes
  std::vector<unsigned> ready;
  unsigned current = 0;
  dim3 grid, block;
  uint3 block_index{};
  std::function<void()> kernel;
  std::exception_ptr error;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_fake_stack = nullptr;
  bool random = std::getenv("SIMT_SEED") != nullptr;
  std::mt19937 generator{unsigned(random ? std::atoi(std::getenv("SIMT_SEED")) : 0)};
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("simt: " + what);
}

inline void to_scheduler(State state) {
  Machine& m = machine();
  Thread& t = m.threads[m.current];
  t.state = state;
  SIMT_ASAN(__sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &t.fake_stack,
                                           m.scheduler_stack, m.scheduler_stack_size));
  swapcontext(&t.context, &m.scheduler);
  SIMT_ASAN(
      __sanitizer_finish_switch_fiber(t.fake_stack, &m.scheduler_stack, &m.scheduler_stack_size));
}

inline void fiber() {
  Machine& m = machine();
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size));
  try {
    m.kernel();
  } catch (...) {
    m.error = std::current_exception();
  }
  to_scheduler(State::kDone);
}

inline void resume(unsigned index) {
  Machine& m = machine();
  Thread& t = m.threads[index];
  m.current = index;
  SIMT_ASAN(__sanitizer_start_switch_fiber(&m.scheduler_fake_stack, t.stack.get(), kStack));
  swapcontext(&m.scheduler, &t.context);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr));
  if (m.error) std::rethrow_exception(m.error);
}

inline void make_ready(unsigned index) {
  machine().threads[index].state = State::kReady;
  machine().ready.push_back(index);
}

// Lets the lanes of `index`'s collective go on once all of its mask have come.
inline void try_release_warp(unsigned index) {
  Machine& m = machine();
  const Thread& t = m.threads[index];
  const unsigned first = index / kWarpSize * kWarpSize;
  if (!(t.mask >> (index - first) & 1))
    fail(std::string(t.where) + ": the calling lane is not in its own mask");
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(t.mask >> lane & 1)) continue;
    if (first + lane >= m.threads.size())
      fail(std::string(t.where) + ": the mask names a lane that does not exist");
    const Thread& other = m.threads[first + lane];
    if (other.state != State::kWarpBarrier || other.mask != t.mask) return;
    if (std::strcmp(other.where, t.where))
      fail(std::string("lanes of one mask meet in ") + t.where + " and " + other.where);
  }
  for (unsigned lane = 0, mask = t.mask; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) make_ready(first + lane);
}

inline void try_release_block() {
  Machine& m = machine();
  for (const Thread& t : m.threads)
    if (t.state != State::kBlockBarrier) return;
  for (unsigned i = 0; i < m.threads.size(); ++i) make_ready(i);
}

inline unsigned next_ready() {
  std::vector<unsigned>& ready = machine().ready;
  auto chosen = std::min_element(ready.begin(), ready.end());
  if (machine().random) chosen = ready.begin() + machine().generator() % ready.size();
  const unsigned index = *chosen;
  ready.erase(chosen);
  return index;
}

inline void start_threads() {
  Machine& m = machine();
  for (unsigned i = 0; i < m.threads.size(); ++i) {
    Thread& t = m.threads[i];
    SIMT_ASAN(__asan_unpoison_memory_region(t.stack.get(), kStack));
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber, 0);
    make_ready(i);
  }
}

inline void run_block() {
  Machine& m = machine();
  if (__start_simt_shared)
    std::memset(__start_simt_shared, kPoison, __stop_simt_shared - __start_simt_shared);
  m.ready.clear();
  start_threads();
  while (!m.ready.empty()) {
    const unsigned index = next_ready();
    resume(index);
    if (m.threads[index].state == State::kWarpBarrier) try_release_warp(index);
    if (m.threads[index].state == State::kBlockBarrier) try_release_block();
  }
  for (unsigned i = 0; i < m.threads.size(); ++i)
    if (m.threads[i].state != State::kDone)
      fail("deadlock: thread " + std::to_string(i) + " waits for ever in " + m.threads[i].where);
}

// What `kernel<<<grid, block, shared, stream>>>(args)` becomes.
inline void launch(dim3 grid, dim3 block, size_t shared, void*, std::function<void()> kernel) {
  Machine& m = machine();
  if (shared) fail("dynamic shared memory is not modelled");
  if (!grid.count() || !block.count() || block.count() > 1024) fail("invalid launch configuration");
  m.grid = grid;
  m.block = block;
  m.kernel = std::move(kernel);
  m.error = nullptr;
  m.threads.resize(block.count());
  m.exchange.assign(block.count(), 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block_index = {x, y, z};
        run_block();
      }
}

inline uint3 thread_index() {
  const Machine& m = machine();
  const unsigned x = m.block.x, y = m.block.y;
  return {m.current % x, m.current / x % y, m.current / (x * y)};
}

}  // namespace simt

#include "simt_intrinsics.h"
