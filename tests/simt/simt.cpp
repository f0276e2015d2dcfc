// The scheduler behind simt.h. Compile it with -fsanitize=address where the kernels are, but never
// with -fsanitize=thread: give -DSIMT_TSAN instead, so that its own bookkeeping is not examined.
#include "simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(call) call
#else
#define ASAN(call) (void)0
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#define TSAN(call) call
#else
#define TSAN(call) (void)0
#endif

extern "C" char __start_simt_shared[] __attribute__((weak));
extern "C" char __stop_simt_shared[] __attribute__((weak));

namespace simt {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kPoison = 0xCB;

enum class State { kReady, kBlockBarrier, kWarpBarrier, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  unsigned mask = 0;       // of the collective it waits in
  const char* where = "";  // that collective's name
  uint64_t word = 0;
  // Barriers passed. What one of them orders is kept apart from the next one's, which a fast thread
  // may reach before a slow one has left this one.
  unsigned block_barriers = 0, warp_barriers = 0;
  unsigned parities = 0;  // bit l: that of lane l's warp_barriers in the collective just left
  char order[2] = {};
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<unsigned> ready;
  unsigned current = 0;
  dim3 grid, block;
  uint3 block_index{};
  std::function<void()> kernel;
  std::exception_ptr error;
  char order[2] = {}, started = 0, done = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_fake_stack = nullptr;
  void* scheduler_tsan_fiber = nullptr;
  bool random = std::getenv("SIMT_SEED") != nullptr;
  std::mt19937 generator{unsigned(random ? std::atoi(std::getenv("SIMT_SEED")) : 0)};
};

Machine m;

Thread& current() { return m.threads[m.current]; }
Thread* warp() { return &m.threads[m.current / kWarpSize * kWarpSize]; }

void to_scheduler(State state) {
  Thread& t = current();
  t.state = state;
  ASAN(__sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &t.fake_stack,
                                      m.scheduler_stack, m.scheduler_stack_size));
  TSAN(__tsan_switch_to_fiber(m.scheduler_tsan_fiber, __tsan_switch_to_fiber_no_sync));
  swapcontext(&t.context, &m.scheduler);
  ASAN(__sanitizer_finish_switch_fiber(t.fake_stack, &m.scheduler_stack, &m.scheduler_stack_size));
}

void fiber() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size));
  TSAN(__tsan_acquire(&m.started));
  try {
    m.kernel();
  } catch (...) {
    m.error = std::current_exception();
  }
  TSAN(__tsan_release(&m.done));
  to_scheduler(State::kDone);
}

void resume(unsigned index) {
  Thread& t = m.threads[index];
  m.current = index;
  ASAN(__sanitizer_start_switch_fiber(&m.scheduler_fake_stack, t.stack.get(), kStack));
  TSAN(__tsan_switch_to_fiber(t.tsan_fiber, __tsan_switch_to_fiber_no_sync));
  swapcontext(&m.scheduler, &t.context);
  ASAN(__sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr));
  if (m.error) std::rethrow_exception(m.error);
}

void make_ready(unsigned index) {
  m.threads[index].state = State::kReady;
  m.ready.push_back(index);
}

// Lets the lanes of `index`'s collective go on once all of its mask have come.
void try_release_warp(unsigned index) {
  const Thread& t = m.threads[index];
  const unsigned first = index / kWarpSize * kWarpSize;
  const std::string where = t.where;
  if (!(t.mask >> (index - first) & 1)) fail(where + ": the calling lane is not in its own mask");
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(t.mask >> lane & 1)) continue;
    if (first + lane >= m.threads.size())
      fail(where + ": the mask names a lane that does not exist");
    const Thread& other = m.threads[first + lane];
    if (other.state != State::kWarpBarrier || other.mask != t.mask) return;
    if (where != other.where) fail("lanes of one mask meet in " + where + " and " + other.where);
  }
  unsigned parities = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (t.mask >> lane & 1) parities |= (m.threads[first + lane].warp_barriers & 1) << lane;
  for (unsigned lane = 0, mask = t.mask; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    m.threads[first + lane].parities = parities;
    make_ready(first + lane);
  }
}

void try_release_block() {
  for (const Thread& t : m.threads)
    if (t.state != State::kBlockBarrier) return;
  for (unsigned i = 0; i < m.threads.size(); ++i) make_ready(i);
}

unsigned next_ready() {
  auto chosen = std::min_element(m.ready.begin(), m.ready.end());
  if (m.random) chosen = m.ready.begin() + m.generator() % m.ready.size();
  const unsigned index = *chosen;
  m.ready.erase(chosen);
  return index;
}

void start_threads() {
  for (unsigned i = 0; i < m.threads.size(); ++i) {
    Thread& t = m.threads[i];
    ASAN(__asan_unpoison_memory_region(t.stack.get(), kStack));
    TSAN(if (!t.tsan_fiber) t.tsan_fiber = __tsan_create_fiber(0));
    t.block_barriers = t.warp_barriers = 0;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber, 0);
    make_ready(i);
  }
}

void run_block() {
  if (__start_simt_shared)
    std::memset(__start_simt_shared, kPoison, __stop_simt_shared - __start_simt_shared);
  TSAN(__tsan_release(&m.started));
  m.ready.clear();
  start_threads();
  while (!m.ready.empty()) {
    const unsigned index = next_ready();
    resume(index);
    const State state = m.threads[index].state;
    if (state == State::kWarpBarrier) try_release_warp(index);
    if (state == State::kBlockBarrier) try_release_block();
  }
  TSAN(__tsan_acquire(&m.done));
  for (unsigned i = 0; i < m.threads.size(); ++i)
    if (m.threads[i].state != State::kDone)
      fail("deadlock: thread " + std::to_string(i) + " waits for ever in " + m.threads[i].where);
}

}  // namespace

void fail(const std::string& what) { throw std::runtime_error("simt: " + what); }

void launch(dim3 grid, dim3 block, size_t shared, void*, std::function<void()> kernel) {
  if (shared) fail("dynamic shared memory is not modelled");
  if (!grid.count() || !block.count() || block.count() > 1024) fail("invalid launch configuration");
  m.grid = grid;
  m.block = block;
  m.kernel = std::move(kernel);
  m.error = nullptr;
  TSAN(m.scheduler_tsan_fiber = __tsan_get_current_fiber());
  if (m.threads.size() != block.count()) m.threads = std::vector<Thread>(block.count());
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block_index = {x, y, z};
        run_block();
      }
}

uint3 thread_index() {
  const unsigned x = m.block.x, y = m.block.y;
  return {m.current % x, m.current / x % y, m.current / (x * y)};
}
uint3 block_index() { return m.block_index; }
dim3 block_dim() { return m.block; }
dim3 grid_dim() { return m.grid; }
unsigned lane() { return m.current % kWarpSize; }

void wait_block(const char* where) {
  Thread& t = current();
  t.where = where;
  [[maybe_unused]] char* order = &m.order[t.block_barriers++ % 2];
  TSAN(__tsan_release(order));
  to_scheduler(State::kBlockBarrier);
  TSAN(__tsan_acquire(order));
}

void wait_warp(unsigned mask, const char* where, bool orders) {
  Thread& t = current();
  t.mask = mask;
  t.where = where;
  t.warp_barriers += orders;
  if (orders) TSAN(__tsan_release(&t.order[t.warp_barriers & 1]));
  to_scheduler(State::kWarpBarrier);
  for (unsigned lane = 0; orders && lane < kWarpSize; ++lane)
    if (mask >> lane & 1) TSAN(__tsan_acquire(&warp()[lane].order[t.parities >> lane & 1]));
}

void give(uint64_t word) { current().word = word; }
uint64_t given(unsigned lane) { return warp()[lane].word; }

}  // namespace simt
