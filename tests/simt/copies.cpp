#include "copies.h"

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
  int unit;          // or -1: of 4 bytes, which only plain loads read, so that no state is kept
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  std::vector<Copy> begun;  // since the last commit
  std::deque<std::vector<Copy>> groups;
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
  return offset < shared_size() && shared_size() - offset >= sizeof(float) ? int(offset / kUnit) : -1;
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

void forget(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies)
    if (copy.unit >= 0) units[copy.unit].state = Unit::clean;
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
  std::memset(to, 0xff, kUnit);
  unit = {Unit::pending, thread(), site, {}};
  of_thread[thread()].begun.push_back({at, to, there ? from : nullptr});
}

void copy_async(float* to, const float* from, bool there, const Site& site) {
  if (unit_at(to) < 0) fail(site, "the destination is not in the block's dynamic shared memory");
  std::memset(to, 0xff, sizeof *to);
  of_thread[thread()].begun.push_back({-1, to, there ? from : nullptr});
}

void commit_copies() {
  Thread& mine = of_thread[thread()];
  mine.groups.emplace_back();  // may stay empty, and counts
  mine.groups.back().swap(mine.begun);
}

void wait_copies(int under_way, const Site& site) {
  auto& groups = of_thread[thread()].groups;
  if (int(groups.size()) > under_way) wait_late();
  for (; int(groups.size()) > under_way; groups.pop_front())
    for (const Copy& copy : groups.front()) land(copy, site);
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
  for (Thread& thread : of_thread) {  // those of a block that an error ended
    forget(thread.begun);
    for (const auto& group : thread.groups) forget(group);
    thread.begun.clear();
    thread.groups.clear();
  }
  make_copies_visible();
  if (int(of_thread.size()) < threads) of_thread.resize(threads);
}

void end_copies() {
  Thread& mine = of_thread[thread()];
  const auto check = [](const std::vector<Copy>& copies) {
    if (copies.empty() || copies[0].unit < 0) return;
    const Unit& unit = units[copies[0].unit];
    fail(unit.copy, "the thread ends, and has not waited for this copy (commit_copies, wait_copies)");
  };
  for (const auto& group : mine.groups) check(group);
  check(mine.begun);
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
