// Memory of a kernel beside its outputs. All of it is allocated before a parallel region, which an exception can't
// leave; and none of it is large on the stack, of which threads may have 64 KiB (tests/kernels/test_resources.py).
#pragma once

#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "memory.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {

// On cache lines, freed at the end of the scope.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(allocate(count, sizeof(E))) {
    const auto at = reinterpret_cast<uintptr_t>(memory_);
    data_ = reinterpret_cast<E*>((at + kCacheLine - 1) / kCacheLine * kCacheLine);
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  operator E*() const { return data_; }

 private:
  void* const memory_;
  E* data_;
};

// Cuts memory into arrays on cache lines; without memory it only counts their bytes.
class Arena {
 public:
  explicit Arena(uint8_t* data = nullptr) : data_(data) {}

  template <typename E>
  E* array(int64_t count) {
    uint8_t* const at = data_ ? data_ + bytes_ : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(E)) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<E*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_;
  int64_t bytes_ = 0;
};

inline int64_t most_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Memory for a Scratch(Arena&, arguments...) in each thread of a parallel region.
template <typename Scratch>
class PerThread {
 public:
  template <typename... Arguments>
  explicit PerThread(const Arguments&... arguments)
      : bytes_(bytes_of(arguments...)), memory_(bytes_ * most_threads()) {}

  // That of the calling thread.
  Arena mine() const {
#if defined(_OPENMP)
    return Arena(memory_ + omp_get_thread_num() * bytes_);
#else
    return Arena(memory_);
#endif
  }

 private:
  template <typename... Arguments>
  static int64_t bytes_of(const Arguments&... arguments) {
    Arena arena;
    static_cast<void>(Scratch(arena, arguments...));
    return arena.bytes();
  }

  int64_t bytes_;
  Buffer<uint8_t> memory_;
};

}  // namespace fastllm::cpu::FASTLLM_ISA
