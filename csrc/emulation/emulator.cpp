// Runs a kernel body on the CPU: blocks one after the other, their threads as fibers.
#include "emulation/emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#include "emulation/block.h"

// swapcontext asks the kernel for the signal mask every time; after the first entry, jumps do the
// same at a tenth of the cost. The address sanitizer follows contexts alone.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define DLM_LEAVE(save, bottom, bytes) __sanitizer_start_switch_fiber(save, bottom, bytes)
#define DLM_ENTER(saved) __sanitizer_finish_switch_fiber(saved, nullptr, nullptr)
#else
#define DLM_LEAVE(save, bottom, bytes) ((void)(save))
#define DLM_ENTER(saved) ((void)(saved))
#endif

namespace dlm_fast::emulation {
namespace {

constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr unsigned kWarp = 32;

// A meeting of a fixed number of threads; `round` counts the meetings that are over.
struct Meeting {
  unsigned arrived = 0;
  unsigned expected = 0;
  uint64_t round = 0;
};

struct Warp {
  Meeting meeting;
  alignas(16) unsigned char slots[2][kWarp * kExchangeBytes];  // rounds take turns
};

constexpr std::align_val_t kSharedAlignment{128};

void free_shared(void* memory) {
  ::operator delete(memory, kSharedAlignment);
}

struct Block {
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, free_shared};
  Meeting barrier;
  std::vector<Warp> warps;
  unsigned running = 0;  // threads that have not left
};

struct Copy {
  void* target;
  const void* source;
  std::size_t bytes;
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool entered = false;
  unsigned char* stack;
  void* fake_stack = nullptr;  // of the address sanitizer
  Position position;
  Block* block;
  State state = State::kReady;
  const Meeting* meeting = nullptr;  // where it waits, until its round is over
  uint64_t round = 0;
  std::vector<std::vector<Copy>> copies{1};  // committed groups, then the open one
};

// One cluster of blocks at work; all its fibers take turns.
struct Machine {
  const Kernel* kernel;
  const cuda::Launch* launch;
  ucontext_t scheduler;
  jmp_buf scheduler_jump;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  std::size_t scheduler_bytes = 0;
  std::vector<Block> blocks;
  Meeting cluster;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  std::exception_ptr error;
};

thread_local Machine* machine = nullptr;

// Stacks are kept: making 256 of them costs more than running a small block.
unsigned char* stack_of(std::size_t index) {
  thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= index) stacks.emplace_back(new unsigned char[kStackBytes]);
  return stacks[index].get();
}

#if defined(__SANITIZE_ADDRESS__)
void switch_to_scheduler(Fiber& fiber) {
  swapcontext(&fiber.context, &machine->scheduler);
}
void switch_to_fiber(Fiber& fiber) {
  swapcontext(&machine->scheduler, &fiber.context);
}
#else
void switch_to_scheduler(Fiber& fiber) {
  if (_setjmp(fiber.jump) == 0) _longjmp(machine->scheduler_jump, 1);
}
void switch_to_fiber(Fiber& fiber) {
  if (_setjmp(machine->scheduler_jump) != 0) return;
  if (fiber.entered) _longjmp(fiber.jump, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}
#endif

void to_scheduler(Fiber& fiber, bool for_good) {
  DLM_LEAVE(for_good ? nullptr : &fiber.fake_stack, machine->scheduler_bottom,
            machine->scheduler_bytes);
  switch_to_scheduler(fiber);
  DLM_ENTER(fiber.fake_stack);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_bottom, &machine->scheduler_bytes);
#endif
  Fiber& fiber = *machine->current;
  try {
    machine->kernel->run(machine->launch->params.data());
  } catch (...) {  // nothing to unwind to on this stack
    machine->error = std::current_exception();
  }
  fiber.state = State::kDone;
  to_scheduler(fiber, true);
}

void resume(Fiber& fiber) {
  machine->current = &fiber;
  DLM_LEAVE(&machine->scheduler_fake_stack, fiber.stack, kStackBytes);
  switch_to_fiber(fiber);
  DLM_ENTER(machine->scheduler_fake_stack);
  machine->current = nullptr;
  if (machine->error) std::rethrow_exception(machine->error);
}

void meet(Meeting& meeting) {
  Fiber& fiber = *machine->current;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  fiber.meeting = &meeting;
  fiber.round = meeting.round;
  fiber.state = State::kWaiting;
  to_scheduler(fiber, false);
}

bool may_run(const Fiber& fiber) {
  return fiber.state == State::kReady ||
         (fiber.state == State::kWaiting && fiber.meeting->round != fiber.round);
}

[[noreturn]] void report_stuck() {
  unsigned done = 0, waiting = 0;
  for (const Fiber& fiber : machine->fibers) (fiber.state == State::kDone ? done : waiting) += 1;
  throw std::runtime_error(machine->launch->kernel + ": " + std::to_string(waiting) +
                           " threads wait for others that never come; " + std::to_string(done) +
                           " have left the kernel");
}

// NaN in every floating-point type; no -1, which programs give a meaning.
void poison(Block& block) {
  constexpr unsigned char kWord[4] = {0xFF, 0xFF, 0xFF, 0x7F};
  for (std::size_t i = 0; i < machine->launch->shared_bytes; ++i)
    block.shared.get()[i] = kWord[i % sizeof(kWord)];
}

void set_up_block(unsigned rank, unsigned block_x, unsigned block_y) {
  const cuda::Launch& launch = *machine->launch;
  Block& block = machine->blocks[rank];
  // Its own allocation of the exact size, so that the address sanitizer sees every step outside.
  const std::size_t bytes = launch.shared_bytes;
  block.shared.reset(static_cast<unsigned char*>(::operator new(bytes, kSharedAlignment)));
  poison(block);
  block.barrier = {0, launch.threads, 0};
  block.running = launch.threads;
  block.warps = std::vector<Warp>(launch.threads / kWarp);
  for (Warp& warp : block.warps) warp.meeting.expected = kWarp;
  for (unsigned thread = 0; thread < launch.threads; ++thread) {
    const std::size_t index = std::size_t{rank} * launch.threads + thread;
    Fiber& fiber = machine->fibers[index];
    fiber = Fiber{};
    fiber.block = &block;
    fiber.stack = stack_of(index);
    fiber.position = {thread,        launch.threads, block_x, block_y,
                      launch.grid_x, launch.grid_y,  rank,    block.shared.get()};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

std::vector<std::size_t> turns(std::size_t count, Order order, std::mt19937_64& random) {
  std::vector<std::size_t> indices(count);
  std::iota(indices.begin(), indices.end(), std::size_t{0});
  if (order == Order::kReverse) std::reverse(indices.begin(), indices.end());
  if (order == Order::kRandom) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

// A turn for the fiber if it may run. Counts down where it is done.
bool take_turn(Fiber& fiber, std::size_t& left) {
  if (!may_run(fiber)) return false;
  fiber.state = State::kReady;
  resume(fiber);
  if (fiber.state == State::kDone) {
    --left;
    // a block that has left keeps nothing for others of its cluster
    if (--fiber.block->running == 0) poison(*fiber.block);
  }
  return true;
}

// Until all fibers are done. In reverse order a warp goes as far as it can before the next one:
// with a turn each, no thread would be more than a meeting of its warp behind.
void run_fibers(Order order, std::mt19937_64& random) {
  const std::size_t count = machine->fibers.size();
  const std::size_t group = order == Order::kReverse ? kWarp : count;
  for (std::size_t left = count; left > 0;) {
    const std::vector<std::size_t> indices = turns(count, order, random);
    bool moved = false;
    for (std::size_t first = 0; first < count; first += group) {
      for (bool again = true; again;) {
        bool any = false;
        for (std::size_t i = first; i < first + group; ++i)
          any = take_turn(machine->fibers[indices[i]], left) || any;
        moved = moved || any;
        again = any && group < count;
      }
    }
    if (!moved) report_stuck();
  }
  for (const Fiber& fiber : machine->fibers)
    for (const auto& group : fiber.copies)
      if (!group.empty())
        throw std::runtime_error(machine->launch->kernel + ": asynchronous copies left unawaited");
}

void check(const Kernel& kernel, const cuda::Launch& launch) {
  const auto require = [&](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(launch.kernel + ": " + what);
  };
  require(launch.params.size() == kernel.params_bytes, "parameters of another size");
  require(launch.threads % kWarp == 0 && launch.threads > 0 && launch.threads <= 1024,
          "threads per block must be a multiple of 32 up to 1024");
  require(launch.grid_x > 0 && launch.grid_y > 0 && launch.grid_y <= 65535, "empty or large grid");
  require(launch.cluster > 0 && launch.grid_x % launch.cluster == 0,
          "the grid must be a multiple of the cluster");
  require(launch.shared_bytes <= 227u << 10, "more shared memory than a block can have");
}

}  // namespace

void run(const Kernel& kernel, const cuda::Launch& launch, Order order, uint64_t seed) {
  check(kernel, launch);
  Machine here;
  here.kernel = &kernel;
  here.launch = &launch;
  std::mt19937_64 random(seed);
  struct Reset {
    ~Reset() {
      machine = nullptr;
    }
  } reset;
  machine = &here;
  const unsigned across = launch.grid_x / launch.cluster;
  for (const std::size_t item : turns(std::size_t{across} * launch.grid_y, order, random)) {
    here.blocks = std::vector<Block>(launch.cluster);
    here.fibers = std::vector<Fiber>(std::size_t{launch.cluster} * launch.threads);
    here.cluster = {0, launch.cluster * launch.threads, 0};
    for (unsigned rank = 0; rank < launch.cluster; ++rank)
      set_up_block(rank, static_cast<unsigned>(item % across) * launch.cluster + rank,
                   static_cast<unsigned>(item / across));
    run_fibers(order, random);
  }
}

const Position& here() {
  return machine->current->position;
}

void sync_block() {
  meet(machine->current->block->barrier);
}

void sync_cluster() {
  meet(machine->cluster);
}

void sync_warp() {
  const unsigned char nothing = 0;
  exchange(&nothing, 1);
}

const unsigned char* exchange(const void* value, std::size_t bytes) {
  const Fiber& fiber = *machine->current;
  Warp& warp = fiber.block->warps[fiber.position.thread / kWarp];
  unsigned char* slots = warp.slots[warp.meeting.round % 2];
  std::memcpy(slots + fiber.position.thread % kWarp * kExchangeBytes, value, bytes);
  meet(warp.meeting);
  return slots;
}

const unsigned char* cluster_address(const void* local, unsigned rank) {
  const auto offset = static_cast<const unsigned char*>(local) - here().shared;
  return machine->blocks.at(rank).shared.get() + offset;
}

void copy_async(void* target, const void* source, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(target) % bytes || reinterpret_cast<uintptr_t>(source) % bytes)
    throw std::runtime_error(machine->launch->kernel + ": an asynchronous copy is not aligned");
  machine->current->copies.back().push_back({target, source, bytes});
}

void copy_commit() {
  machine->current->copies.emplace_back();
}

void copy_wait(int pending) {
  auto& groups = machine->current->copies;
  const std::size_t keep = static_cast<std::size_t>(pending) + 1;  // and the open one
  while (groups.size() > keep) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.target, copy.source, copy.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace dlm_fast::emulation
