#include "simt.h"

#include "clusters.h"
#include "copies.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Of the section that shared.ld makes.
extern "C" __attribute__((visibility("hidden"))) unsigned char simt_shared_begin[], simt_shared_end[];

namespace simt {
namespace {

constexpr size_t kStack = 256 << 10;  // address space; only pages that are touched take memory
constexpr size_t kPage = 4096;

enum class State { ready, at_barrier, at_collective, at_cluster, ended };

// A fiber serves a thread of one block after the other. makecontext starts it; from then on it is switched by the
// compiler's setjmp and longjmp, which save three registers and leave the rest to the compiler.
using Place = void* [5];

struct Fiber {
  Fiber();
  ~Fiber() { munmap(stack, kStack); }

  char* stack;
  ucontext_t start;
  Place here;
  bool started = false;

  State state = State::ready;
  uint3 thread{};
  Site site{};
  unsigned mask = 0;
  void* argument = nullptr;
};

struct Block {
  uint3 index{};
  std::deque<int> ready;  // fibers
  int at_barrier = 0, left = 0;
  bool newest_first = false;           // one warp runs far ahead of the others
  uint64_t late = 0;                   // a bit for each warp whose copies come late
  std::vector<unsigned char> statics;  // its static shared memory, while another block of the cluster runs
};

struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> fibers;  // those of block r of a cluster from r * stride on
  std::vector<Block> blocks{1};                // of the cluster that runs
  int threads = 0, stride = 0;                 // of a block; the same in whole warps
  int size = 1, rank = 0;                      // of the cluster; the block that runs now
  std::vector<int> at_collective;              // threads of each warp
  int current = -1;
  Place home;

  const void* kernel = nullptr;
  size_t shared_bytes = 0;  // dynamic
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;

  uint64_t seed = 0;
  std::mt19937_64 random;

  Block& block() { return blocks[rank]; }
  int first() const { return rank * stride; }  // fiber of the block
  void run_cluster();
  bool choose_block();
  void enter(int rank);
  int next();
  [[noreturn]] void go_on();
  void yield();
  void release(int fiber);
  void release_block(int rank);
  std::string where() const;
  std::string deadlock() const;
};

Scheduler scheduler;
size_t shared_of_multiprocessor = kMaxShared + 1024;
std::map<const void*, size_t> shared_limits;  // of kernels
std::map<const void*, bool> large_clusters_allowed;
std::mutex one_grid_at_a_time;
alignas(1024) unsigned char shared_bytes_of_blocks[kMaxCluster][kMaxShared];

size_t static_bytes() { return size_t(simt_shared_end - simt_shared_begin); }

void fiber_main() {
  for (;;) {
    try {
      (*scheduler.body)();
      end_copies();
      end_cluster_thread();
    } catch (...) {
      scheduler.error = std::current_exception();
    }
    scheduler.fibers[scheduler.current]->state = State::ended;
    --scheduler.block().left;
    scheduler.yield();
  }
}

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack = static_cast<char*>(memory);
  mprotect(stack, kPage, PROT_NONE);  // an overflow faults rather than overwrites the next stack
}

// Leaves the thread that runs now for the next one, or for run_cluster.
__attribute__((noinline)) void Scheduler::go_on() {
  if (error || !choose_block()) __builtin_longjmp(home, 1);
  current = next();
  Fiber& fiber = *fibers[current];
  threadIdx = fiber.thread;
  if (fiber.started) __builtin_longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
  std::abort();
}

__attribute__((noinline)) void Scheduler::yield() {
  if (__builtin_setjmp(fibers[current]->here) == 0) go_on();
}

void Scheduler::release(int fiber) {
  fibers[fiber]->state = State::ready;
  blocks[fiber / stride].ready.push_back(fiber);
}

// All threads of a block. Shuffled, any warp may be the newest and go ahead.
void Scheduler::release_block(int rank) {
  const int start = seed == 0 ? 0 : int(random() % threads) / warpSize * warpSize;
  for (int t = 0; t < threads; ++t) release(rank * stride + (start + t) % threads);
}

// A block of which threads can run: the same as long as it has some, or, shuffled, any at times. False: there is none.
bool Scheduler::choose_block() {
  if (size == 1) return !block().ready.empty();
  const bool other = seed != 0 && random() % 256 == 0;
  if (!block().ready.empty() && !other) return true;
  const int start = seed == 0 ? rank : int(random() % size);
  for (int i = 0; i < size; ++i) {
    const int candidate = (start + i) % size;
    if (blocks[candidate].ready.empty()) continue;
    enter(candidate);
    return true;
  }
  return false;
}

// Static shared memory exists once: it is swapped.
void Scheduler::enter(int to) {
  if (to == rank) return;
  std::memcpy(block().statics.data(), simt_shared_begin, static_bytes());
  std::memcpy(simt_shared_begin, blocks[to].statics.data(), static_bytes());
  rank = to;
  blockIdx = block().index;
}

int Scheduler::next() {
  Block& b = block();
  if (seed != 0 && !b.newest_first) std::swap(b.ready.front(), b.ready[random() % b.ready.size()]);
  const bool newest = seed != 0 && b.newest_first;
  const int fiber = newest ? b.ready.back() : b.ready.front();
  newest ? b.ready.pop_back() : b.ready.pop_front();
  return fiber;
}

// The blocks of a cluster, whose indices are set; as a rule one.
__attribute__((noinline)) void Scheduler::run_cluster() {
  std::memset(simt_shared_begin, 0xff, static_bytes());  // NaN in every floating-point type
  begin_copies(threads);
  begin_cluster(seed == 0 ? 0 : random());
  at_collective.assign(size * stride / warpSize, 0);
  error = nullptr;
  for (int r = 0; r < size; ++r) {
    Block& b = blocks[r];
    std::memset(shared_bytes_of_blocks[r], 0xff, shared_bytes);
    if (size > 1) b.statics.assign(static_bytes(), 0xff);
    b.at_barrier = 0;
    b.left = threads;
    b.ready.resize(threads);
    std::iota(b.ready.begin(), b.ready.end(), r * stride);
    for (int t = 0; t < threads; ++t) fibers[r * stride + t]->state = State::ready;
    if (seed == 0) continue;
    b.newest_first = random() % 2;
    b.late = random();
    std::shuffle(b.ready.begin(), b.ready.end(), random);
  }
  rank = 0;
  blockIdx = block().index;
  if (__builtin_setjmp(home) == 0) go_on();
  const bool stuck = !error && std::any_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.left != 0; });
  if (stuck) error = std::make_exception_ptr(std::runtime_error(deadlock()));
  current = -1;
  if (error) {
    for (auto& fiber : fibers)  // what stands on their stacks is given up
      if (fiber->state != State::ended) fiber->started = false;
    abandon_copies();
    std::rethrow_exception(error);
  }
}

std::string Scheduler::where() const {
  return plain_name_of(kernel) + ", block " + text(blockIdx);
}

std::string Scheduler::deadlock() const {
  struct Group {
    int threads = 0, first = 0;
  };
  std::map<std::string, Group> groups;  // what threads do
  for (int i = 0; i < size * threads; ++i) {
    const int at = i / threads * stride + i % threads;
    const Fiber& fiber = *fibers[at];
    std::ostringstream what;
    if (fiber.state == State::ended)
      what << "ended";
    else
      what << "at " << text(fiber.site);
    if (fiber.state == State::at_collective) what << " with mask 0x" << std::hex << fiber.mask;
    auto [group, created] = groups.try_emplace(what.str(), Group{0, at});
    ++group->second.threads;
  }
  std::ostringstream message;
  message << where() << ": threads wait for others that never come:";
  for (const auto& [what, group] : groups) {
    message << "\n  " << group.threads << " of " << size * threads << " threads " << what << ", first "
            << text(fibers[group.first]->thread);
    if (size > 1) message << " of block " << text(blocks[group.first / stride].index);
  }
  return message.str();
}

}  // namespace

void run(dim3 grid, dim3 block, int cluster, size_t shared_bytes, const void* kernel,
         const std::function<void()>& thread) {
  std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  Scheduler& s = scheduler;
  gridDim = grid;
  blockDim = block;
  s.kernel = kernel;
  s.shared_bytes = shared_bytes;
  s.body = &thread;
  s.threads = int(block.x * block.y * block.z);
  s.stride = (s.threads + warpSize - 1) / warpSize * warpSize;
  s.size = cluster;
  s.blocks.resize(cluster);
  while (int(s.fibers.size()) < s.stride * cluster) s.fibers.push_back(std::make_unique<Fiber>());
  for (int r = 0, t = 0; r < cluster; ++r, t = r * s.stride)
    for (unsigned z = 0; z < block.z; ++z)
      for (unsigned y = 0; y < block.y; ++y)
        for (unsigned x = 0; x < block.x; ++x) s.fibers[t++]->thread = {x, y, z};

  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z / cluster);
  std::iota(order.begin(), order.end(), 0);
  s.random.seed(s.seed);
  if (s.seed != 0) std::shuffle(order.begin(), order.end(), s.random);
  for (const uint64_t index : order) {
    for (int r = 0; r < cluster; ++r) {
      const uint64_t at = index * cluster + r;
      s.blocks[r].index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    }
    s.run_cluster();
  }
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(const Site& site) {
  return std::string(site.operation) + " in " + site.function + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

void set_seed(uint64_t seed) { scheduler.seed = seed; }

void barrier(const Site& site) {
  Scheduler& s = scheduler;
  Fiber& me = *s.fibers[s.current];
  me.state = State::at_barrier;
  me.site = site;
  if (++s.block().at_barrier == s.threads) {
    s.block().at_barrier = 0;
    for (int t = 0; t < s.threads; ++t) {
      const Site& other = s.fibers[s.first() + t]->site;
      if (other.line != site.line || std::strcmp(other.file, site.file) != 0)
        fail(site, "met by threads at another barrier, " + text(other));
    }
    make_copies_visible();
    s.release_block(s.rank);
  }
  s.yield();
}

void wait_for_cluster(const Site& site) {
  Fiber& me = *scheduler.fibers[scheduler.current];
  me.state = State::at_cluster;
  me.site = site;
  scheduler.yield();
}

void release_cluster() {
  Scheduler& s = scheduler;
  for (int i = 0; i < s.size * s.threads; ++i) {
    const int fiber = i / s.threads * s.stride + i % s.threads;
    if (s.fibers[fiber]->state == State::at_cluster) s.release(fiber);
  }
}

int cluster_size() { return scheduler.size; }
int cluster_rank() { return scheduler.rank; }
int cluster_threads() { return scheduler.size * scheduler.threads; }
int cluster_thread() { return scheduler.rank * scheduler.threads + thread(); }
bool has_ended(int rank) { return scheduler.blocks[rank].left == 0; }

bool find_shared(const void* pointer, size_t bytes, SharedPlace& place) {
  place.is_static = in_static_shared(pointer, bytes);
  const unsigned char* begin = place.is_static ? simt_shared_begin : dynamic_shared();
  place.offset = size_t(static_cast<const unsigned char*>(pointer) - begin);
  return place.is_static || (place.offset < shared_size() && shared_size() - place.offset >= bytes);
}

unsigned char* address_in(int rank, const SharedPlace& place) {
  if (!place.is_static) return shared_bytes_of_blocks[rank] + place.offset;
  return (rank == scheduler.rank ? simt_shared_begin : scheduler.blocks[rank].statics.data()) + place.offset;
}

void wait_late() {
  Scheduler& s = scheduler;
  if (s.seed == 0 || (s.block().late >> thread() / warpSize & 1) == 0) return;
  s.block().ready.push_front(s.current);
  s.yield();
}

int thread() { return scheduler.current - scheduler.first(); }
int lane() { return scheduler.current % warpSize; }
uint3 thread_index(int thread) { return scheduler.fibers[thread]->thread; }

void collective(unsigned mask, const Site& site, void* argument, void (*resolve)(const Lanes&)) {
  Scheduler& s = scheduler;
  Fiber& me = *s.fibers[s.current];
  me.state = State::at_collective;
  me.site = site;
  me.mask = mask;
  me.argument = argument;
  if ((mask >> lane() & 1) == 0) fail(site, "the mask does not name the calling lane");

  const int first = s.current - lane();
  int& come = s.at_collective[first / warpSize];
  Lanes lanes;
  lanes.mask = mask;
  lanes.first = first - s.first();
  bool complete = ++come >= __builtin_popcount(mask);
  for (int l = 0; l < warpSize && complete; ++l) {
    if (!lanes.has(l)) continue;
    complete = lanes.first + l < s.threads;
    if (!complete) break;
    const Fiber& other = *s.fibers[first + l];
    complete = other.state == State::at_collective && other.mask == mask &&
               (other.site.operation == site.operation || std::strcmp(other.site.operation, site.operation) == 0);
    lanes.arguments[l] = other.argument;
  }
  if (complete) {
    resolve(lanes);
    come -= __builtin_popcount(mask);
    for (int l = 0; l < warpSize; ++l)
      if (lanes.has(l)) s.release(first + l);
  }
  s.yield();
}

void fail(const Site& site, const std::string& message, int thread) {
  const uint3 index = thread < 0 ? threadIdx : thread_index(thread);
  throw std::runtime_error(scheduler.where() + ", thread " + text(index) + ": " + text(site) + ": " + message);
}

int& device() {
  thread_local int current = 0;
  return current;
}

const char* name_of(const void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) && info.dli_saddr == kernel ? info.dli_sname : nullptr;
}

std::string plain_name_of(const void* kernel) {
  const char* mangled = name_of(kernel);
  if (!mangled) return "a kernel";
  char* plain = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  const std::string name = plain ? plain : mangled;
  std::free(plain);
  return name;
}

unsigned char* dynamic_shared() { return shared_bytes_of_blocks[scheduler.rank]; }
size_t shared_size() { return scheduler.shared_bytes; }
bool in_static_shared(const void* pointer, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(simt_shared_begin);
  const size_t size = reinterpret_cast<uintptr_t>(simt_shared_end) - begin;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(pointer) - begin;
  return offset < size && size - offset >= bytes;
}

size_t shared_per_multiprocessor() { return shared_of_multiprocessor; }
size_t shared_per_block() { return shared_of_multiprocessor - 1024; }
size_t& shared_limit(const void* kernel) { return shared_limits.try_emplace(kernel, 48 << 10).first->second; }
bool& large_clusters(const void* kernel) { return large_clusters_allowed[kernel]; }

[[noreturn]] void misaligned(const char* file, int line, int alignment, const void* pointer) {
  std::ostringstream message;
  message << (scheduler.current < 0 ? "the host" : scheduler.where() + ", thread " + text(threadIdx)) << ": " << file
          << ":" << line << ": " << pointer << " is not aligned to " << alignment << " bytes";
  if (scheduler.current < 0) {
    std::fprintf(stderr, "%s\n", message.str().c_str());
    std::abort();
  }
  scheduler.error = std::make_exception_ptr(std::runtime_error(message.str()));
  for (;;) scheduler.yield();
}

}  // namespace simt

#define EXPORT extern "C" __attribute__((visibility("default")))

// Where a pointer's alignment is not that of its type, -fsanitize=alignment calls this (and no other of its runtime).
// GCC takes it for a function that does not throw: the thread is left here instead.
struct Misaligned {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};

EXPORT void __ubsan_handle_type_mismatch_v1(const Misaligned* at, const void* pointer) {
  simt::misaligned(at->file, int(at->line), 1 << at->log_alignment, pointer);
}

EXPORT void simt_set_seed(uint64_t seed) { simt::set_seed(seed); }

// A GPU of so much shared memory for each multiprocessor; false where it is more than the emulator has.
EXPORT bool simt_set_shared_memory(size_t per_multiprocessor) {
  if (per_multiprocessor < 49 << 10 || per_multiprocessor > simt::kMaxShared + 1024) return false;
  simt::shared_of_multiprocessor = per_multiprocessor;
  simt::shared_limits.clear();
  return true;
}
EXPORT int simt_device() { return simt::device(); }
