// Launching kernels: the only place that talks to the CUDA runtime about devices, launches and errors.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

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

template <typename... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            typename Parameter<P>::type... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more has to be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) check(error, name_of(reinterpret_cast<const void*>(kernel)));
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

}  // namespace fastllm::cuda
