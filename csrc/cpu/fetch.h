// Memory that is read soon, asked for a part at each step of a product, so that it comes while the product is computed.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {

struct NoFetch {
  void step() {}
};

struct Fetch {  // into the L2 cache
  const char* at;
  int64_t bytes;  // of a step

  void step() {
    const char* const end = at + bytes;
    for (const char* line = at; line < end; line += 64) __builtin_prefetch(line, 0, 2);
    at = end;
  }
};

}  // namespace fastllm::cpu::FASTLLM_ISA
