// Waits for a word that a device writes into host memory.
#include <chrono>

#include "../api.h"

namespace xspec {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

bool await_change(const int64_t* word, int64_t before, int64_t microseconds) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::microseconds(microseconds);
  do {
    for (int look = 0; look < 64; ++look) {
      if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != before) return true;
      pause();
    }
  } while (Clock::now() < deadline);
  return false;
}

}  // namespace xspec
