// The emulator's view of one running thread: where it is, and the ways it meets other threads.
// A test device: threads are fibers that switch only at these meetings, in an order the test picks.
#pragma once

#include <cstddef>

namespace dlm_fast::emulation {

struct Position {
  unsigned thread, threads;  // in the block
  unsigned block_x, block_y, grid_x, grid_y;
  unsigned cluster_rank;
  unsigned char* shared;  // dynamic shared memory of the block
};

const Position& here();

void sync_block();
void sync_cluster();
void sync_warp();

constexpr std::size_t kExchangeBytes = 32;

// Every lane of the warp hands in `bytes` bytes; returns where those of all 32 lie, kExchangeBytes
// apart, until the warp's next exchange but one.
const unsigned char* exchange(const void* value, std::size_t bytes);

// Shared memory of another block of the cluster, at the place that `local` has in this one.
const unsigned char* cluster_address(const void* local, unsigned rank);

// Copies happen as late as the program allows, so that a missing wait shows.
void copy_async(void* target, const void* source, std::size_t bytes);
void copy_commit();
void copy_wait(int pending);

}  // namespace dlm_fast::emulation
