// One ordered queue of items, on the thread pool of the caller. No step waits for a number of threads to arrive: an
// item may only wait for items that come before it in the queue, and those have been claimed by running threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gatedkernels {

// Spins a little, then lets another thread have the processor.
template <class Done>
void wait_until(const Done& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins > 1000) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }
}

// Calls item(0), …, item(total - 1) in this order, from up to `threads` threads. Parallel is a torch-like
// parallel_for(begin, end, grain, body(begin, end)), which may use fewer threads, or one.
template <class Parallel, class Item>
void run_in_order(int64_t total, int64_t threads, const Parallel& parallel, const Item& item) {
  if (total <= 1 || threads <= 1) {
    for (int64_t i = 0; i < total; ++i) item(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel(0, threads < total ? threads : total, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < total;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      item(i);
    }
  });
}

}  // namespace gatedkernels
