#include "clusters.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {
namespace {

struct Thread {
  bool arrived = false;  // and has not waited
  int phase = 0;         // in which it has
};

struct Store {
  SharedPlace to;
  int rank;
  float value;
  int thread, phase;  // the phase whose barrier makes it visible
  bool landed;
};

std::vector<Thread> threads;
std::vector<Store> stores;  // of the phase under way, and the next
std::unordered_map<uint64_t, int> writers[2];  // of those: which thread stores to a place of a block
int phase = 0, come = 0;
Site first;          // where the first thread of the phase arrived
uint64_t early = 0;  // a bit for each block whose stores come at once

void land(const Store& store) { std::memcpy(address_in(store.rank, store.to), &store.value, sizeof store.value); }

}  // namespace

void begin_cluster(uint64_t random) {
  threads.assign(cluster_threads(), {});
  stores.clear();
  for (auto& places : writers) places.clear();
  phase = come = 0;
  early = random;
}

void cluster_arrive(const Site& site) {
  Thread& me = threads[cluster_thread()];
  if (me.arrived) fail(site, "the thread has arrived before, and has not waited since");
  if (come == 0) first = site;
  if (site.line != first.line || std::strcmp(site.file, first.file) != 0)
    fail(site, "met by threads that arrive elsewhere, " + text(first));
  me = {true, phase};
  if (++come != cluster_threads()) return;
  for (const Store& store : stores)
    if (store.phase == phase && !store.landed) land(store);
  stores.erase(std::remove_if(stores.begin(), stores.end(), [](const Store& store) { return store.phase == phase; }),
               stores.end());
  writers[phase % 2].clear();
  come = 0;
  ++phase;
  release_cluster();
}

void cluster_wait(const Site& site) {
  Thread& me = threads[cluster_thread()];
  if (!me.arrived) fail(site, "the thread waits without having arrived");
  me.arrived = false;
  if (me.phase == phase) wait_for_cluster(site);
}

void store_to_block(float* to, float value, int rank, const Site& site) {
  if (rank < 0 || rank >= cluster_size())
    fail(site, "there is no block " + std::to_string(rank) + " in a cluster of " + std::to_string(cluster_size()));
  if (phase == 0) fail(site, "the other block may not have started: no barrier of the cluster came before");
  if (has_ended(rank)) fail(site, "block " + std::to_string(rank) + " of the cluster has ended");
  Store store{{}, rank, value, cluster_thread(), phase, bool(early >> cluster_rank() & 1)};
  if (!find_shared(to, sizeof value, store.to)) fail(site, "the address is not in the block's shared memory");
  store.phase += threads[store.thread].arrived;
  const uint64_t place = store.to.offset * 2 + store.to.is_static;
  const auto [writer, fresh] = writers[store.phase % 2].try_emplace(place * kMaxCluster + rank, store.thread);
  if (!fresh && writer->second != store.thread)
    fail(site, "another thread stores there, too, before the same barrier");
  if (store.landed) land(store);
  stores.push_back(store);
}

void end_cluster_thread() {
  if (cluster_size() == 1) return;
  const int thread = cluster_thread();
  const Site site{"the end", "the kernel", "", 0};
  if (threads[thread].arrived) fail(site, "the thread has arrived at a barrier of the cluster, and has not waited");
  for (const Store& store : stores)
    if (store.thread == thread) fail(site, "no barrier of the cluster came after a store to another block");
}

}  // namespace simt
