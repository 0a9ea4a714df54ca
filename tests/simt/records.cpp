#include "records.h"

#include <cstdint>
#include <sstream>
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
bool recording = false;
std::string recorded, launches;

}  // namespace

void record(const std::string& call) {
  if (recording) recorded += (recorded.empty() ? "" : ", ") + call;
}

void record_launch(dim3 grid, dim3 block, int cluster, const void* kernel) {
  if (!recording) return;
  std::ostringstream line;
  line << plain_name_of(kernel);
  for (const unsigned n : {grid.x, grid.y, grid.z, block.x, block.y, block.z, unsigned(cluster)}) line << '\t' << n;
  launches += line.str() + '\n';
}

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

// From now on, or no more.
EXPORT void simt_record(bool on) {
  simt::recording = on;
  simt::recorded.clear();
  simt::launches.clear();
}
EXPORT const char* simt_recorded() { return simt::recorded.c_str(); }
// A line for each: kernel, grid, block and the cluster's size, apart by tabs.
EXPORT const char* simt_launches() { return simt::launches.c_str(); }
