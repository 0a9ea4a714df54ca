// ldmatrix and mma.sync: called by all 32 lanes of a warp. csrc/cuda/ptx.h says which lane has which elements.
#pragma once

#include "simt.h"

namespace simt {

void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed, const Site& site);

enum class Element { float16, bfloat16 };

// d += a b, [16, 8] += [16, 16] [16, 8].
void multiply(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Site& site);

}  // namespace simt
