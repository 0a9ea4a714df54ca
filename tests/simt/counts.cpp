#include "counts.h"

#include <cstdint>
#include <vector>

namespace simt {

bool counting = false;

namespace {

struct Range {
  uintptr_t begin;
  size_t bytes;
  uint64_t counts[2];  // read, written
};
std::vector<Range> ranges;

}  // namespace

void count(const void* at, size_t bytes, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  for (Range& range : ranges)
    if (address - range.begin < range.bytes) range.counts[write] += bytes;
}

}  // namespace simt

#define EXPORT extern "C" __attribute__((visibility("default")))

// Counts from now on what is read and written there; the number of the range.
EXPORT int simt_count(const void* begin, size_t bytes) {
  simt::counting = true;
  simt::ranges.push_back({reinterpret_cast<uintptr_t>(begin), bytes, {}});
  return int(simt::ranges.size()) - 1;
}
EXPORT uint64_t simt_counted(int range, bool written) { return simt::ranges[range].counts[written]; }
EXPORT void simt_count_nothing() {
  simt::counting = false;
  simt::ranges.clear();
}
