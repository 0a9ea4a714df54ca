// Chooses among the instruction sets that the CPU kernels were compiled for.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace fastllm::cpu {
namespace {

struct Set {
  const char* name;
  const Kernels* kernels;
};

// Whether the processor runs an instruction set, and the system saves its registers.
struct Runs {
  static bool base() { return true; }
#if defined(__x86_64__)
  static bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c(); }
  static bool avx512() {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  static bool avx512_bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }
  static bool amx() { return avx512_bf16() && amx_granted(); }

 private:
  static bool f16c() {  // clang 14 has no string for it; its registers are those of AVX2
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }
  // Linux lets a process use the tiles of AMX that asks for them.
  static bool amx_granted() {
#if defined(FASTLLM_EMULATE_AMX)
    return true;
#elif defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1;
    return bf16 && tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
#endif
};

// FASTLLM_EACH_ISA, set by setup.py: those that the kernels were compiled for, the best last.
std::vector<Set> runnable() {
  std::vector<Set> sets;
#define FASTLLM_ADD(isa) \
  if (Runs::isa()) sets.push_back({#isa, &isa::kernels});
  FASTLLM_EACH_ISA(FASTLLM_ADD)
#undef FASTLLM_ADD
  return sets;
}

const std::vector<Set>& sets() {
  static const std::vector<Set> found = runnable();
  return found;
}

const Set& named(const std::string& name) {
  for (const Set& set : sets()) {
    if (name == set.name) return set;
  }
  throw std::invalid_argument("this build or processor does not run the instruction set '" + name + "'");
}

// The best there is, or the one that the environment variable FASTLLM_CPU_ISA names.
const Set*& current() {
  static const Set* set = [] {
    const char* asked = std::getenv("FASTLLM_CPU_ISA");
    return asked && *asked ? &named(asked) : &sets().back();
  }();
  return set;
}

}  // namespace

const Kernels& kernels() { return *current()->kernels; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Set& set : sets()) names.emplace_back(set.name);
  return names;
}

std::string instruction_set() { return current()->name; }

void use_instruction_set(const std::string& name) { current() = &named(name); }

}  // namespace fastllm::cpu
