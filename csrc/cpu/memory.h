// Memory of CPU kernels: outputs, which callers allocate, and workspaces (workspace.h).
//
// Large outputs are fresh from the operating system at every call (glibc maps blocks of 32 MiB and more
// anew), and a page fault per 4 KiB then costs more than the arithmetic: ask for 2 MiB pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastllm::cpu {

static inline void expect_large_write(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (bytes >= int64_t(2 * kHuge) && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

constexpr int64_t kCacheLine = 64;

// count * size bytes from std::malloc, quicker than std::aligned_alloc, and room to begin on a cache line. Throws
// std::bad_alloc, with what was wanted: call it outside of parallel regions, which an exception can't leave.
void* allocate(int64_t count, int64_t size);

}  // namespace fastllm::cpu
