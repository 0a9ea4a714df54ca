// Asynchronous copies to shared memory: they land where their thread waits for them, and what a barrier has not yet
// made visible may not be read.
#pragma once

#include "simt.h"

namespace simt {

// 16 bytes, or as many zeros: NaN is there until the wait.
void copy_async(void* to, const void* from, bool there, const Site& site);
void copy_async(float* to, const float* from, bool there, const Site& site);  // 4 bytes
void commit_copies();
void wait_copies(int under_way, const Site& site);

// Fails where `thread` may not yet read the 16 bytes at `row`.
void check_row(const void* row, int thread, const Site& site);

// The core's part.
void begin_copies(int threads);         // of a block
void end_copies();                      // of the calling thread: fails where it has not waited
void abandon_copies();                  // those of a block that an error ends
void make_copies_visible();             // to the block
void make_copies_visible_to(int warp);  // those of its own threads

}  // namespace simt
