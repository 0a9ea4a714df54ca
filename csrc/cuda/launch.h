// Launching kernels: the only place that talks to the CUDA runtime about devices, launches and errors.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "reduce.h"

namespace fastllm::cuda {

// `what` failed, if something did.
inline void check(cudaError_t error, const std::string& what = "") {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the runtime forgets it, too
  throw std::runtime_error("CUDA: " + what + (what.empty() ? "" : ": ") + cudaGetErrorString(error));
}

// Makes `device` the current one for a scope. It is set even where the runtime takes it for current already, for
// this module has a runtime of its own beside torch's. It is set back, for what is current is the driver's context,
// of which torch's runtime reads its own current device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(device_), "device " + std::to_string(device));
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

inline int sm_count(int device) {
  static std::atomic<int> known[64];
  const bool fits = device >= 0 && device < 64;
  int count = fits ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (fits) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Bytes of shared memory, at most, of a block; dynamic and static.
inline size_t shared_per_block(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return size_t(bytes);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// For messages.
inline std::string name_of(const void* kernel) {
  const char* name = nullptr;
#if CUDART_VERSION >= 12030
  if (cudaFuncGetName(&name, kernel) != cudaSuccess) name = nullptr;
#endif
  if (!name) return "a kernel";
  char* plain = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
  const std::string text = plain ? plain : name;
  std::free(plain);
  return text;
}

// The arguments convert to the kernel's parameters as in a plain call.
template <typename T>
struct Parameter {
  using type = T;
};

// The dynamic shared memory of a kernel that has it for a template argument: its name says then what its machine code
// does not, and benchmarks/machine_code.py reads it there.
template <size_t BYTES>
struct Shared {
  static constexpr size_t kBytes = BYTES;
};

// A launch's shape: `cluster` blocks, along x, run at the same time.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  int cluster;

  cudaLaunchConfig_t config(cudaStream_t stream, cudaLaunchAttribute& attribute) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    if (cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(cluster), 1, 1};
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    return config;
  }
};

template <typename... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;  // more has to be asked for
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <typename... P>
void launch(void (*kernel)(P...), const Launch& shape, cudaStream_t stream, typename Parameter<P>::type... args) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = shape.config(stream, attribute);
  cudaError_t error = allow_shared(kernel, shape.shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) check(error, name_of(reinterpret_cast<const void*>(kernel)));
}

template <typename... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            typename Parameter<P>::type... args) {
  launch(kernel, Launch{grid, block, shared_bytes, 1}, stream, args...);
}

// How many clusters of `size` blocks of kClusterThreads threads `device`, the current one, runs at once. 0: it has no
// clusters, none so large, or the kernel was compiled for GPUs that have none.
template <typename... P>
int active_clusters(void (*kernel)(P...), int size, size_t shared_bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(P...), int, int>, int> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto [found, unknown] = known.try_emplace({kernel, size, device}, 0);
  if (!unknown) return found->second;
  int has_clusters = 0;
  check(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device));
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  if (!has_clusters || attributes.ptxVersion < 90) return 0;
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error == cudaSuccess && size > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute;
  const auto config = Launch{dim3(size), dim3(kClusterThreads), shared_bytes, size}.config(nullptr, attribute);
  int clusters = 0;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess)
    found->second = clusters;
  else
    cudaGetLastError();  // not an error of the caller's
  return found->second;
}

constexpr int kMaxThreads = 1024;  // of a block: with 64 registers each they fill a multiprocessor

// dim3(threads per row, rows), see reduce.h, for rows of `units` of which a thread takes `per_thread`.
inline dim3 block_for(int64_t units, int per_thread, int threads_wanted, int most = kMaxThreads) {
  const int64_t needed = std::min<int64_t>(ceil_div(units, per_thread), most);
  int threads = 1;
  if (needed <= 32)
    while (threads < needed) threads *= 2;
  else
    threads = int(ceil_div(needed, 32)) * 32;
  return dim3(threads, std::max(1, threads_wanted / threads));
}

// A block for every blockDim.y rows.
template <typename Args>
void launch_rows(void (*kernel)(Args), const Args& args, dim3 block, cudaStream_t stream) {
  launch(kernel, dim3(unsigned(ceil_div(args.rows, block.y))), block, 0, stream, args);
}

// The smallest cluster, of 2^n blocks, whose threads hold `vectors` in `per_thread` of each; it may be larger than any.
inline int cluster_for(int64_t vectors, int per_thread) {
  int size = 1;
  while (size <= kMaxCluster && int64_t(size) * kClusterThreads * per_thread < vectors) size *= 2;
  return size;
}

// Launches `kernel` in a cluster for every row. False, and nothing happens, where the device has none that hold it.
template <typename Args>
bool launch_row_clusters(void (*kernel)(Args), const Args& args, int64_t vectors, int per_thread, int device,
                         cudaStream_t stream) {
  const int size = cluster_for(vectors, per_thread);
  if (size > kMaxCluster || active_clusters(kernel, size, 0, device) == 0) return false;
  launch(kernel, Launch{dim3(unsigned(args.rows * size)), dim3(kClusterThreads), 0, size}, stream, args);
  return true;
}

}  // namespace fastllm::cuda
