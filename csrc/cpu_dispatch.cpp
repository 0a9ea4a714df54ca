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

#if defined(__x86_64__)
// Whether the processor has AMX, and Linux lets this process use its tiles, which it has to be asked for.
bool amx_granted() {
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

std::vector<Set> runnable() {
  std::vector<Set> sets{{"base", &base::kernels}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    sets.push_back({"avx2", &avx2::kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      sets.push_back({"avx512", &avx512::kernels});
      if (__builtin_cpu_supports("avx512bf16")) {
        sets.push_back({"avx512_bf16", &avx512_bf16::kernels});
        if (amx_granted()) sets.push_back({"amx", &amx::kernels});
      }
    }
  }
#endif
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
  throw std::invalid_argument("this processor does not run the instruction set '" + name + "'");
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
