// Thread-block clusters: blocks that run at the same time, wait for each other and store into each other's shared
// memory.
#pragma once

#include "simt.h"

namespace simt {

constexpr int kMaxCluster = 16;

int cluster_size();
int cluster_rank();  // of the block that runs now

// Every thread of the cluster arrives, and then waits for all the others.
void cluster_arrive(const Site& site);
void cluster_wait(const Site& site);

// Stores to where block `rank` of the cluster has what the calling block has at `to`. It comes at once, or with the
// barrier at which the thread arrives next: no reader may rely on either.
void store_to_block(float* to, float value, int rank, const Site& site);

// The core's part.
void begin_cluster(uint64_t random);  // 0: stores come late
void end_cluster_thread();            // fails where the calling thread has something under way

// What clusters.cpp asks the core for.
int cluster_threads();
int cluster_thread();  // the one that runs now, of cluster_threads()
bool has_ended(int rank);
void wait_for_cluster(const Site& site);
void release_cluster();  // those who wait so

struct SharedPlace {  // in any block of the cluster
  bool is_static;
  size_t offset;
};
bool find_shared(const void* pointer, size_t bytes, SharedPlace& place);  // false: the calling block has none there
unsigned char* address_in(int rank, const SharedPlace& place);            // until another block runs

}  // namespace simt
