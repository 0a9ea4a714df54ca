// What tests ask to be kept: what the runtime was called for, the launches, and the bytes that kernels read and write
// in ranges of memory, through csrc/cuda/vec.h.
#pragma once

#include <cstddef>
#include <string>

#include "simt.h"

namespace simt {

void record(const std::string& call);
void record_launch(dim3 grid, dim3 block, int cluster, const void* kernel);

extern bool counting;  // whether a test has named a range (simt_count)
void count(const void* at, size_t bytes, bool write);

inline void count_read(const void* from, size_t bytes) {
  if (counting) count(from, bytes, false);
}
inline void count_write(const void* to, size_t bytes) {
  if (counting) count(to, bytes, true);
}

}  // namespace simt
