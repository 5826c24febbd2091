// Runs the threads of emulated kernels (include/cuda_runtime.h) on one thread of the CPU.
//
// A CUDA thread runs until it waits for others, and then keeps its stack (a fiber) until they have
// come. Without a seed blocks run one after the other and threads in order. With one, some blocks
// are resident at a time and take turns, blocks and threads come in random order, and __activemask
// splits a warp at random, as the hardware may; warps never run in lockstep. Not emulated are weak
// memory order (values are what was stored last), and limits of registers.
//
// Under ThreadSanitizer each CUDA thread is a fiber of its own, whose switches order nothing: only
// __syncthreads (within a block), __threadfence (between all) and launches do. Lanes that meet in
// __activemask or __match_all_sync stay unordered, as on the hardware. This file is compiled without
// ThreadSanitizer, which would see the fibers share it.
#include "cuda_runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#ifdef EMULATOR_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_RACES
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {

dim3 block_index, thread_index, block_size;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kSharedLimit = 48 * 1024;  // of a block, without dynamic shared memory
constexpr size_t kArena = size_t{1} << 30;  // of a launch's blocks, reserved and not committed
constexpr size_t kGap = 64;                 // between variables, which AddressSanitizer guards
constexpr unsigned char kPattern = 0xA5;    // neither zero nor a bool
constexpr unsigned kWarp = 32;
constexpr size_t kResident = 3;  // blocks at a time, with a seed
constexpr unsigned kTurn = 8;    // how often threads wait, about, before another block has its turn

enum class State { ready, barrier, active, match, done };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* sanitizer = nullptr;
};
struct Thread {
  State state = State::ready;
  Fiber* fiber = nullptr;  // none before it begins
  unsigned mask = 0, value = 0;
  bool equal = false;
};
struct Shared {
  unsigned number;
  char* address;
};
struct Block {
  unsigned index;
  std::vector<Thread> threads;
  std::vector<unsigned> ready;  // threads that can run, the next one last
  std::array<Shared, 16> variables;
  unsigned count = 0;
  size_t shared_bytes = 0;
  char* barrier_address;
  unsigned barriers = 0;
};

std::mt19937 random_numbers;
bool shuffled = false;
cudaError_t error = cudaSuccess;

const std::function<void()>* body;
Block* block;
unsigned current;
unsigned turn;  // threads that run before another block has its turn, about

// Fibers call nothing of libc and allocate nothing here: ThreadSanitizer would see that.
std::deque<Fiber*> idle;
std::vector<Fiber*> fibers;
Fiber home, *running, *finished;

char* arena;
size_t arena_used;

#ifdef EMULATOR_ADDRESS
const void* home_stack;
size_t home_stack_size;
#endif

void fail(const char* what) {
  if (error == cudaSuccess) std::fprintf(stderr, "emulated CUDA: %s\n", what);
  error = cudaErrorLaunchFailure;
}

void acquire([[maybe_unused]] void* address) {
#ifdef EMULATOR_RACES
  __tsan_acquire(address);
#endif
}
void release([[maybe_unused]] void* address) {
#ifdef EMULATOR_RACES
  __tsan_release(address);
#endif
}
// Addresses that stand for what orders threads: a launch's begin and end, and all fences.
char launch_begin, launch_end, fences;

void switch_to(Fiber& from, Fiber& to) {
#ifdef EMULATOR_ADDRESS
  const bool back = &to == &home;
  __sanitizer_start_switch_fiber(&from.sanitizer, back ? home_stack : to.stack,
                                 back ? home_stack_size : kStack);
#endif
#ifdef EMULATOR_RACES
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  running = &to;
  swapcontext(&from.context, &to.context);
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void become(unsigned thread) { current = thread, thread_index = {thread, 0, 0}; }
Thread& self() { return block->threads[current]; }
bool turn_ends() { return shuffled && random_numbers() % turn == 0; }

// What a fiber does, again and again: begins threads until one of them waits.
void work() {
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &home_stack, &home_stack_size);
#endif
  for (;;) {
    Fiber& fiber = *running;
    do {
      become(block->ready.back());
      block->ready.pop_back();
      self().fiber = &fiber;
      acquire(&launch_begin);
      (*body)();
      release(&launch_end);
      self().state = State::done;
#ifdef EMULATOR_RACES
      break;
#endif
    } while (!block->ready.empty() && block->threads[block->ready.back()].fiber == nullptr &&
             !turn_ends());
    finished = &fiber;
    switch_to(fiber, home);
  }
}

void prepare(Fiber& fiber) {
#ifdef EMULATOR_ADDRESS
  __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, work, 0);
}

// More than a block has threads, so that the fibers of a thread differ from block to block: what
// one fiber does is ordered.
Fiber& free_fiber() {
  if (idle.size() <= kWarp / 3) {
    Fiber* made = new Fiber;
    made->stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#ifdef EMULATOR_RACES
    made->sanitizer = __tsan_create_fiber(0);
#endif
    prepare(*made);
    fibers.push_back(made), idle.push_back(made);
  }
  Fiber& first = *idle.front();
  idle.pop_front();
  return first;
}

void wait(State why) {
  self().state = why;
  switch_to(*self().fiber, home);
}

void make_ready(unsigned thread) {
  block->threads[thread].state = State::ready;
  block->ready.push_back(thread);
}

// Lets the lanes of one warp go on that have met.
void release_warp(unsigned first, unsigned end) {
  std::vector<Thread>& threads = block->threads;
  unsigned active = 0, matching = 0;
  for (unsigned t = first; t < end; ++t) {
    if (threads[t].state == State::active) active |= 1u << (t - first);
    if (threads[t].state == State::match) matching |= 1u << (t - first);
  }
  const auto each = [&](unsigned mask, auto&& what) {
    for (unsigned t = first; t < end; ++t) {
      if (mask >> (t - first) & 1u) what(t);
    }
  };
  bool released = false;
  for (unsigned t = first; t < end; ++t) {
    const unsigned mask = threads[t].mask, value = threads[t].value;
    if (threads[t].state != State::match || (mask & matching) != mask) continue;
    bool equal = true, agreed = mask >> (t - first) & 1u;
    each(mask, [&](unsigned lane) {
      agreed &= threads[lane].mask == mask, equal &= threads[lane].value == value;
    });
    if (!agreed) return fail("__match_all_sync of lanes that disagree on the mask");
    each(mask, [&](unsigned lane) { threads[lane].equal = equal, make_ready(lane); });
    matching &= ~mask, released = true;
  }
  if (released || active == 0) return;
  unsigned together = active;
  if (shuffled) {
    together &= static_cast<unsigned>(random_numbers());
    if (together == 0) together = active & -active;
  }
  each(together, [&](unsigned lane) { threads[lane].mask = together, make_ready(lane); });
}

// Lets threads of a block go on where none can run; false where the block has ended or failed.
bool release_threads() {
  const unsigned count = block->threads.size();
  for (unsigned first = 0; first < count; first += kWarp) {
    release_warp(first, std::min(first + kWarp, count));
  }
  if (error != cudaSuccess) return false;
  if (block->ready.empty()) {
    unsigned waiting = 0, done = 0;
    for (const Thread& one : block->threads) {
      waiting += one.state == State::barrier, done += one.state == State::done;
    }
    if (done == count) return false;
    if (waiting + done < count) return fail("lanes wait for lanes that never come"), false;
    if (done != 0) return fail("__syncthreads that some threads of the block never reach"), false;
    ++block->barriers;
    for (unsigned t = count; t-- > 0;) make_ready(t);
  }
  if (shuffled) std::shuffle(block->ready.begin(), block->ready.end(), random_numbers);
  return true;
}

std::unique_ptr<Block> begin(unsigned index, unsigned count) {
  auto made = std::make_unique<Block>();
  made->index = index, made->threads.resize(count), made->ready.resize(count);
  std::iota(made->ready.rbegin(), made->ready.rend(), 0u);
  if (shuffled) std::shuffle(made->ready.begin(), made->ready.end(), random_numbers);
  // Addresses differ from block to block, so that ThreadSanitizer tells their variables apart.
  made->barrier_address = arena + arena_used;
  arena_used += kGap;
  return made;
}

// Runs threads of a block for a turn; false where it has ended.
bool advance(Block& which) {
  block = &which, block_index = {which.index, 0, 0};
  // Every other turn goes to the block's end, while another one stands still anywhere.
  const unsigned length = kTurn * which.threads.size();
  turn = random_numbers() % 2 == 0 ? 1 + random_numbers() % length : UINT32_MAX;
  do {
    if (block->ready.empty() && !release_threads()) return false;
    const unsigned next = block->ready.back();
    Fiber* fiber = block->threads[next].fiber;
    if (fiber == nullptr) {
      fiber = &free_fiber();
    } else {
      block->ready.pop_back();
      become(next);
    }
    switch_to(home, *fiber);
    if (finished != nullptr) idle.push_back(std::exchange(finished, nullptr));
  } while (!turn_ends());
  return true;
}

}  // namespace

void barrier() {
  // Two addresses in turn: threads that run ahead to the next barrier must not order this one.
  void* const met = block->barrier_address + block->barriers % 2;
  release(met);
  wait(State::barrier);
  acquire(met);
}

unsigned active_mask() {
  wait(State::active);
  return self().mask;
}

bool match_all(unsigned mask, unsigned value) {
  self().mask = mask, self().value = value;
  wait(State::match);
  return self().equal;
}

void fence() { acquire(&fences), release(&fences); }

void* shared_memory(unsigned number, size_t size, size_t alignment) {
  for (unsigned i = 0; i < block->count; ++i) {
    if (block->variables[i].number == number) return block->variables[i].address;
  }
  block->shared_bytes += size;
  if (block->shared_bytes > kSharedLimit) fail("more shared memory than a block may have");
  arena_used = (arena_used + kGap + alignment - 1) / alignment * alignment;
  char* const address = arena + arena_used;
  arena_used += size;
#ifdef EMULATOR_ADDRESS
  __asan_unpoison_memory_region(address, size);
#endif
  // Volatile, since ThreadSanitizer would see a memset.
  for (size_t i = 0; i < size; ++i) *static_cast<volatile char*>(address + i) = kPattern;
  block->variables.at(block->count++) = {number, address};
  return address;
}

cudaError_t last_error() { return std::exchange(error, cudaSuccess); }

void run(const Grid& grid, const std::function<void()>& thread) {
  if (error != cudaSuccess) return;
  if (grid.blocks == 0 || grid.blocks > INT32_MAX || grid.threads == 0 || grid.threads > 1024 ||
      grid.dynamic_shared != 0) {
    error = cudaErrorInvalidConfiguration;
    return;
  }
  if (arena == nullptr) {
    arena = static_cast<char*>(mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#ifdef EMULATOR_RACES
    home.sanitizer = __tsan_get_current_fiber();
#endif
  }
  body = &thread, block_size = {static_cast<unsigned>(grid.threads), 1, 1};
  std::vector<unsigned> waiting(grid.blocks);
  std::iota(waiting.rbegin(), waiting.rend(), 0u);
  if (shuffled) std::shuffle(waiting.begin(), waiting.end(), random_numbers);
  std::vector<std::unique_ptr<Block>> resident;
  release(&launch_begin);
  while (error == cudaSuccess && !(waiting.empty() && resident.empty())) {
    if (resident.empty()) {
#ifdef EMULATOR_ADDRESS
      __asan_poison_memory_region(arena, std::min(kArena, arena_used + kResident * 2 * kSharedLimit));
#endif
      arena_used = 0;
    }
    const bool room = kArena - arena_used > (kResident + 1) * 2 * kSharedLimit;
    while (!waiting.empty() && room && resident.size() < (shuffled ? kResident : 1)) {
      resident.push_back(begin(waiting.back(), block_size.x));
      waiting.pop_back();
    }
    const size_t next = shuffled ? random_numbers() % resident.size() : 0;
    if (!advance(*resident[next])) resident.erase(resident.begin() + next);
  }
  if (error != cudaSuccess) {
    // Threads are given up where they wait.
    for (Fiber* one : fibers) prepare(*one);
    idle.assign(fibers.begin(), fibers.end()), finished = nullptr;
  }
  acquire(&launch_end);
}

}  // namespace emulator

// Seed 0: everything in order.
extern "C" void emulator_seed(uint64_t seed) {
  emulator::shuffled = seed != 0;
  emulator::random_numbers.seed(static_cast<uint32_t>(seed));
}
