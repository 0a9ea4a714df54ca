#include "copies.h"

#include "clusters.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr int kUnit = 16;

struct Unit {
  enum { clean, pending, landed, in_warp } state = clean;  // in_warp: visible to the warp of the thread, to no other
  int thread = 0;
  Site copy{}, wait{};
};

struct Copy {
  int unit;  // or -1: of 4 bytes, which plain loads alone read, so that no state is kept
  void* to;
  const void* from;  // null: zeros
  Site site;
};

struct Thread {
  std::deque<Copy> under_way;
  std::deque<int> groups;  // how many of them each group has
  int begun = 0;           // those since the last commit
};

Unit units[kMaxShared / kUnit];
std::vector<Thread> of_thread;
std::vector<int> landed;  // units, since the last __syncthreads

std::string place(const Unit& unit) {
  return std::string("the copy at ") + unit.copy.file + ":" + std::to_string(unit.copy.line) + ", of thread " +
         text(thread_index(unit.thread)) + ",";
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kUnit == 0; }

// The number of the unit there, or -1 outside dynamic shared memory.
int unit_at(const void* pointer) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(dynamic_shared());
  return offset < shared_size() && shared_size() - offset >= kUnit ? int(offset / kUnit) : -1;
}

void begin(const Copy& copy, size_t bytes) {
  if (cluster_size() > 1) fail(copy.site, "copies are not emulated in clusters");
  std::memset(copy.to, 0xff, bytes);
  Thread& mine = of_thread[thread()];
  mine.under_way.push_back(copy);
  ++mine.begun;
}

void land(const Copy& copy, const Site& site) {
  const size_t bytes = copy.unit < 0 ? sizeof(float) : kUnit;
  const auto* now = static_cast<const unsigned char*>(copy.to);
  if (std::any_of(now, now + bytes, [](unsigned char byte) { return byte != 0xff; }))
    fail(site, "a copy comes to shared memory where something has been stored since it began");
  if (copy.from)
    std::memcpy(copy.to, copy.from, bytes);
  else
    std::memset(copy.to, 0, bytes);
  if (copy.unit < 0) return;
  Unit& unit = units[copy.unit];
  unit.state = Unit::landed;
  unit.wait = site;
  landed.push_back(copy.unit);
}

}  // namespace

void copy_async(void* to, const void* from, bool there, const Site& site) {
  if (!aligned(to)) fail(site, "the destination is not aligned to 16 bytes");
  if (!aligned(from)) fail(site, "the source is not aligned to 16 bytes");
  const int at = unit_at(to);
  if (at < 0) fail(site, "the destination is not in the block's dynamic shared memory");
  Unit& unit = units[at];
  if (unit.state == Unit::pending)
    fail(site, "writes shared memory that " + place(unit) + " has not brought yet (wait_copies)");
  unit = {Unit::pending, thread(), site, {}};
  begin({at, to, there ? from : nullptr, site}, kUnit);
}

void copy_async(float* to, const float* from, bool there, const Site& site) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(dynamic_shared());
  if (offset + sizeof *to > shared_size()) fail(site, "the destination is not in the block's dynamic shared memory");
  begin({-1, to, there ? from : nullptr, site}, sizeof *to);
}

void commit_copies() {
  Thread& mine = of_thread[thread()];
  mine.groups.push_back(mine.begun);  // an empty group counts, too
  mine.begun = 0;
}

void wait_copies(int under_way, const Site& site) {
  Thread& mine = of_thread[thread()];
  if (int(mine.groups.size()) > under_way) wait_late();
  for (; int(mine.groups.size()) > under_way; mine.groups.pop_front()) {
    for (int i = 0; i < mine.groups.front(); ++i) {
      land(mine.under_way.front(), site);
      mine.under_way.pop_front();
    }
  }
}

void check_row(const void* row, int thread, const Site& site) {
  if (!aligned(row)) fail(site, "the row is not aligned to 16 bytes", thread);
  const int at = unit_at(row);
  if (at < 0) {
    if (!in_static_shared(row, kUnit)) fail(site, "the row is not in the block's shared memory", thread);
    return;
  }
  const Unit& unit = units[at];
  if (unit.state == Unit::clean) return;
  if (unit.state == Unit::pending)
    fail(site, "reads shared memory that " + place(unit) + " has not brought yet (wait_copies)", thread);
  if (unit.state == Unit::in_warp && unit.thread / warpSize == thread / warpSize) return;
  fail(site,
       "reads shared memory that " + place(unit) + " has brought, but no barrier since the wait at " + unit.wait.file +
           ":" + std::to_string(unit.wait.line) + " has made it visible",
       thread);
}

void begin_copies(int threads) {
  make_copies_visible();
  if (int(of_thread.size()) < threads) of_thread.resize(threads);
}

void end_copies() {
  Thread& mine = of_thread[thread()];
  mine.groups.clear();  // empty ones
  if (mine.under_way.empty()) return;
  fail(mine.under_way.front().site, "the thread ends, and has not waited for this copy (commit_copies, wait_copies)");
}

void abandon_copies() {
  for (Thread& thread : of_thread) {
    for (const Copy& copy : thread.under_way)
      if (copy.unit >= 0) units[copy.unit].state = Unit::clean;
    thread = {};
  }
}

void make_copies_visible() {
  for (const int at : landed)
    if (units[at].state != Unit::pending) units[at].state = Unit::clean;
  landed.clear();
}

void make_copies_visible_to(int warp) {
  for (const int at : landed)
    if (units[at].state == Unit::landed && units[at].thread / warpSize == warp) units[at].state = Unit::in_warp;
}

}  // namespace simt
