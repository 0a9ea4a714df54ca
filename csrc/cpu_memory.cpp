// The memory of CPU kernels beside their outputs. It is compiled once: what throws needs the standard library.
#include "cpu/memory.h"

#include <cstdio>
#include <cstdlib>
#include <new>

namespace fastllm::cpu {
namespace {

class OutOfMemory : public std::bad_alloc {  // becomes a MemoryError
 public:
  explicit OutOfMemory(double bytes) {
    std::snprintf(text_, sizeof text_, "the CPU kernel could not allocate a workspace of %.0f bytes (%.1f MiB)", bytes,
                  bytes / (1 << 20));
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[128];
};

}  // namespace

void* allocate(int64_t count, int64_t size) {
  int64_t bytes;
  void* data = nullptr;
  if (!__builtin_mul_overflow(count, size, &bytes) && !__builtin_add_overflow(bytes, kCacheLine, &bytes)) {
    data = std::malloc(bytes);
  }
  if (!data) throw OutOfMemory(static_cast<double>(count) * static_cast<double>(size));
  expect_large_write(data, bytes);
  return data;
}

}  // namespace fastllm::cpu
