// Which row, and which of its columns, a thread works on in the kernels that hold rows in registers.
#pragma once

#include <cstdint>

#include "reduce.h"
#include "vec.h"

namespace fastllm::cuda {

// The blocks of a cluster share the columns of one row evenly, in whole vectors of a warp, so that each begins at a
// cache line. Otherwise a block has all columns of blockDim.y rows.
template <int V, bool kCluster>
struct RowColumns {
  int64_t row;
  int first, end;  // where the thread's vectors begin, and the block's columns end

  __device__ explicit RowColumns(int64_t cols) {
    if constexpr (kCluster) {
      const int unit = kWarp * V, size = cluster_size();
      const int share = (int(cols) + unit * size - 1) / (unit * size) * unit;
      row = cluster_index();
      first = cluster_rank() * share;
      end = min(first + share, int(cols));
    } else {
      row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
      first = 0;
      end = int(cols);
    }
    first += threadIdx.x * V;
  }
};

}  // namespace fastllm::cuda
