// The emulator's core: a grid of blocks whose threads run as fibers of one OS thread. cuda_runtime.h
// puts CUDA's names on top; copies.h and tensor_cores.h add instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// Where a thread waits. Functions that wait take the caller's place as a default argument.
struct Site {
  const char* operation;
  const char* function;
  const char* file;
  int line;
};

// Runs `thread` once for every thread of the grid, a block at a time, or the blocks of a cluster, which are `cluster`
// along x. Throws std::runtime_error when threads wait for others that never come, and whatever `thread` throws.
void run(dim3 grid, dim3 block, int cluster, size_t shared_bytes, const void* kernel,
         const std::function<void()>& thread);

// 0: threads and blocks run in order. Otherwise in an order drawn from the seed, block by block anew.
void set_seed(uint64_t seed);

// Every thread of the block waits here for all the others.
void barrier(const Site& site);

// The arguments of a warp's lanes, which wait together.
class Lanes {
 public:
  unsigned mask = 0;
  int first = 0;  // the thread that is lane 0
  void* arguments[warpSize];

  bool has(int lane) const { return mask >> lane & 1; }
  template <typename Argument>
  Argument& at(int lane) const {
    return *static_cast<Argument*>(arguments[lane]);
  }
};

void wait_late();  // lets other threads go first, where this warp's copies come late
int thread();  // the one that runs now, of the block
int lane();
uint3 thread_index(int thread);

// The lanes in `mask` wait for each other; the last one to come calls `resolve`, which reads and writes
// the arguments of all of them; then all go on.
void collective(unsigned mask, const Site& site, void* argument, void (*resolve)(const Lanes&));

// Ends the grid. `thread` did it: by default the one that runs now.
[[noreturn]] void fail(const Site& site, const std::string& message, int thread = -1);

std::string text(const uint3& index);
std::string text(const Site& site);

// Blocks of the largest cluster that each device runs: as an H100, as a GeForce, and none, as an A100.
constexpr int kLargestCluster[] = {16, 8, 0};
constexpr int kDevices = 3;
constexpr int kPortableCluster = 8;  // larger ones a kernel has to allow
int& device();                       // the current one of the calling thread of the host

const char* name_of(const void* kernel);  // mangled, or null
std::string plain_name_of(const void* kernel);

constexpr size_t kMaxShared = 227 << 10;  // of a block, and of the emulator
unsigned char* dynamic_shared();
size_t shared_size();  // dynamic, of the block that runs now
bool in_static_shared(const void* pointer, size_t bytes);

// What the GPU has, set by simt_set_shared_memory.
size_t shared_per_multiprocessor();
size_t shared_per_block();                 // at most, where a kernel asks for it
// What a kernel has asked for (cudaFuncSetAttribute).
size_t& shared_limit(const void* kernel);
bool& large_clusters(const void* kernel);

}  // namespace simt
