// Stands in for the CUDA runtime's header where a .cu file is compiled by g++ (see README.md). It has
// what the kernels use; add to it what the next one needs.
#pragma once

#define SIMT_EMULATOR
#define CUDART_VERSION 13000

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>

#include "clusters.h"
#include "copies.h"
#include "records.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// One block runs at a time, or those of a cluster, for which it is swapped. The tag, a part of the variable's name for
// the linker, is how shared.ld finds it: GCC heeds no section attribute in a template. `used`: what a block finds there
// is not the zero that C++ promises.
#define __shared__ static __attribute__((used, abi_tag("simt_shared")))

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }

using std::max;
using std::min;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float value) { return float(1.0 / std::sqrt(double(value))); }

template <typename T>
inline T __ldg(const T* from) {
  simt::count_read(from, sizeof(T));
  return *from;
}

// ---- waiting for each other ----------------------------------------------------------------------

#define SIMT_CALLER \
  const char *function = __builtin_FUNCTION(), const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_CALLER) { simt::barrier({"__syncthreads", function, file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_CALLER) {
  simt::collective(mask, {"__syncwarp", function, file, line}, nullptr, [](const simt::Lanes& lanes) {
    if (lanes.mask == 0xffffffffu) simt::make_copies_visible_to(lanes.first / warpSize);
  });
}

namespace simt {

template <typename T>
struct Shuffle {
  T value, result;
  int source;
  Site site;
};

// The value that lane `source` brings; a source outside the lane's own segment is the lane itself.
template <typename T>
inline T shuffle(unsigned mask, T value, int source, const Site& site) {
  Shuffle<T> mine{value, value, source, site};
  collective(mask, site, &mine, [](const Lanes& lanes) {
    for (int lane = 0; lane < warpSize; ++lane) {
      if (!lanes.has(lane)) continue;
      auto& argument = lanes.at<Shuffle<T>>(lane);
      if (!lanes.has(argument.source)) fail(argument.site, "reads a lane that the mask does not name");
      argument.result = lanes.at<Shuffle<T>>(argument.source).value;
    }
  });
  return mine.result;
}

inline unsigned ballot(unsigned mask, bool vote, const Site& site) {
  struct Vote {
    bool vote;
    unsigned result;
  } mine{vote, 0};
  collective(mask, site, &mine, [](const Lanes& lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < warpSize; ++lane)
      if (lanes.has(lane) && lanes.at<Vote>(lane).vote) votes |= 1u << lane;
    for (int lane = 0; lane < warpSize; ++lane)
      if (lanes.has(lane)) lanes.at<Vote>(lane).result = votes;
  });
  return mine.result;
}

}  // namespace simt

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SIMT_CALLER) {
  const int first = simt::lane() & ~(width - 1);
  return simt::shuffle(mask, value, first + (source & (width - 1)), {"__shfl_sync", function, file, line});
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, SIMT_CALLER) {
  const int lane = simt::lane(), source = lane ^ lanes;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return simt::shuffle(mask, value, inside ? source : lane, {"__shfl_xor_sync", function, file, line});
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_CALLER) {
  const int lane = simt::lane(), source = lane - int(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return simt::shuffle(mask, value, inside ? source : lane, {"__shfl_up_sync", function, file, line});
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_CALLER) {
  const int lane = simt::lane(), source = lane + int(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return simt::shuffle(mask, value, inside ? source : lane, {"__shfl_down_sync", function, file, line});
}

inline unsigned __ballot_sync(unsigned mask, bool vote, SIMT_CALLER) {
  return simt::ballot(mask, vote, {"__ballot_sync", function, file, line});
}
inline bool __any_sync(unsigned mask, bool vote, SIMT_CALLER) {
  return simt::ballot(mask, vote, {"__any_sync", function, file, line}) != 0;
}
inline bool __all_sync(unsigned mask, bool vote, SIMT_CALLER) {
  return simt::ballot(mask, vote, {"__all_sync", function, file, line}) == mask;
}

// ---- the runtime's functions ---------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};

struct cudaFuncAttributes {
  int ptxVersion;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidClusterSize: return "Invalid cluster size";
  }
  return "unknown error";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::device();
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::kDevices) return cudaErrorInvalidDevice;
  simt::record("cudaSetDevice(" + std::to_string(device) + ")");
  simt::device() = device;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
  *name = simt::name_of(kernel);
  return *name ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= simt::kDevices) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; return cudaSuccess;  // few: small inputs fill them
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(simt::shared_per_multiprocessor()); return cudaSuccess;
    case cudaDevAttrClusterLaunch: *value = simt::kLargestCluster[device] != 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(simt::shared_per_block()); return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  const void* address = reinterpret_cast<const void*>(kernel);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    simt::large_clusters(address) = value != 0;
    return cudaSuccess;
  }
  if (value < 0 || size_t(value) > simt::shared_per_block()) return cudaErrorInvalidValue;
  simt::shared_limit(address) = value;
  return cudaSuccess;
}

template <typename Kernel>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {90};
  return cudaSuccess;
}

namespace simt {

// Of a launch; 0: not one that the current device and the kernel allow.
inline int cluster_of(const cudaLaunchConfig_t& config, const void* kernel) {
  int size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& cluster = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension || cluster.y != 1 || cluster.z != 1) return 0;
    size = int(cluster.x);
    const int most = large_clusters(kernel) ? kMaxCluster : kPortableCluster;
    if (size < 1 || size > std::min(most, kLargestCluster[device()]) || config.gridDim.x % size != 0) return 0;
  }
  return size;
}

}  // namespace simt

template <typename... Parameters>
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                                  const cudaLaunchConfig_t* config) {
  const int size = simt::cluster_of(*config, reinterpret_cast<const void*>(kernel));
  *clusters = size == 0 ? 0 : 2;  // few: small inputs fill them
  return size == 0 ? cudaErrorInvalidClusterSize : cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                                      Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const void* address = reinterpret_cast<const void*>(kernel);
  const bool fits = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 65535 && grid.z - 1 < 65535 && block.x - 1 < 1024 &&
                    block.y - 1 < 1024 && block.z - 1 < 64 && block.x * block.y * block.z <= 1024;
  if (!fits) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > simt::shared_limit(address)) return cudaErrorInvalidValue;
  const int cluster = simt::cluster_of(*config, address);
  if (cluster == 0) return cudaErrorInvalidClusterSize;
  simt::record("launch on " + std::to_string(simt::device()));
  simt::record_launch(grid, block, cluster, address);
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  simt::run(grid, block, cluster, config->dynamicSmemBytes, address, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}
