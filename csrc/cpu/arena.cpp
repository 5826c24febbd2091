// An arena: one reservation of memory that the large tensors of a call's launches share. Pages are
// touched once for all launches, and what one tensor gives back another takes, so that the process
// grows by little more than the tensors that live at once. malloc maps and clears tensors of tens
// of megabytes anew each time, and leaves holes between smaller ones.
//
// PyTorch's own allocator stays in charge of everything else: ours stands before it and serves only
// threads that have entered an arena. Memory is known by its address, so that a tensor may outlive
// its arena and be let go of by any thread.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceType.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace saliency_fast {
namespace {

// Smaller ones are malloc's, whose heap keeps them well.
constexpr size_t kLeast = size_t{64} << 10;
constexpr size_t kGrain = 4096;
constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded(size_t bytes, size_t grain) { return (bytes + grain - 1) / grain * grain; }

char* reserve(size_t bytes) {
#if defined(__linux__)
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  madvise(found, bytes, MADV_HUGEPAGE);
  return static_cast<char*>(found);
#else
  return nullptr;
#endif
}

void forget(char* start, size_t bytes) {
#if defined(__linux__)
  madvise(start, bytes, MADV_DONTNEED);
#endif
}

void unmap(char* start, size_t bytes) {
#if defined(__linux__)
  munmap(start, bytes);
#endif
}

class Arena {
 public:
  Arena(char* base, size_t size) : base_(base), size_(size), holes_{{0, size}} {}
  ~Arena() { unmap(base_, size_); }

  // Memory from the smallest hole that is large enough, the lowest among equals; null without one.
  void* take(size_t wanted) {
    const size_t bytes = rounded(wanted, kGrain);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = holes_.end();
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
      if (hole->second >= bytes && (best == holes_.end() || hole->second < best->second)) {
        best = hole;
      }
    }
    if (best == holes_.end()) return nullptr;
    const auto [start, size] = *best;
    holes_.erase(best);
    if (size > bytes) holes_.emplace(start + bytes, size - bytes);
    blocks_.emplace(start, bytes);
    extent_ = std::max(extent_, start + bytes);
    return base_ + start;
  }

  bool holds(const void* memory) const {
    const auto* place = static_cast<const char*>(memory);
    return place >= base_ && place < base_ + size_;
  }

  // True when the arena is closed and this was its last block.
  bool give_back(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto block = blocks_.find(static_cast<size_t>(static_cast<char*>(memory) - base_));
    auto [start, bytes] = *block;
    blocks_.erase(block);
    if (closed_) forget(base_ + start, bytes);
    auto after = holes_.lower_bound(start);
    if (after != holes_.end() && after->first == start + bytes) {
      bytes += after->second;
      after = holes_.erase(after);
    }
    if (after != holes_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == start) {
        before->second += bytes;
        return closed_ && blocks_.empty();
      }
    }
    holes_.emplace(start, bytes);
    return closed_ && blocks_.empty();
  }

  // Pages that no tensor lives in go back to the system. True when there are no others.
  bool close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    for (const auto& [start, bytes] : holes_) {
      if (start < extent_) forget(base_ + start, std::min(bytes, extent_ - start));
    }
    return blocks_.empty();
  }

  size_t extent() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return extent_;
  }

 private:
  char* base_;
  size_t size_, extent_ = 0;
  bool closed_ = false;
  std::mutex mutex_;
  std::map<size_t, size_t> holes_;  // start to bytes, never two that touch
  std::unordered_map<size_t, size_t> blocks_;
};

thread_local Arena* entered = nullptr;

// Every arena that memory may still belong to.
struct Arenas {
  std::shared_mutex mutex;
  std::vector<Arena*> all;
  std::atomic<size_t> count{0};

  void add(Arena* arena) {
    const std::unique_lock<std::shared_mutex> lock(mutex);
    all.push_back(arena);
    ++count;
  }

  void remove(Arena* arena) {
    {
      const std::unique_lock<std::shared_mutex> lock(mutex);
      all.erase(std::find(all.begin(), all.end(), arena));
      --count;
    }
    delete arena;
  }

  Arena* of(const void* memory) {
    if (count == 0) return nullptr;
    const std::shared_lock<std::shared_mutex> lock(mutex);
    for (Arena* arena : all) {
      if (arena->holds(memory)) return arena;
    }
    return nullptr;
  }
};

Arenas& arenas() {
  static auto* found = new Arenas;  // never destroyed: tensors may outlive everything else
  return *found;
}

c10::Allocator* behind = nullptr;

void let_go(void* memory) {
  if (memory == nullptr) return;
  if (Arena* arena = arenas().of(memory)) {
    if (arena->give_back(memory)) arenas().remove(arena);
  } else {
    behind->raw_deallocate(memory);
  }
}

struct Front final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (entered != nullptr && bytes >= kLeast) {
      if (void* memory = entered->take(bytes)) {
        return {memory, memory, &let_go, c10::Device(c10::DeviceType::CPU)};
      }
    }
    return behind->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &let_go; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    behind->copy_data(to, from, bytes);
  }
};

// Puts ours before PyTorch's, once. False where that cannot be: raw memory must be known by its
// address alone.
bool in_front() {
  static const bool done = [] {
    behind = c10::GetCPUAllocator();
    if (behind->raw_deleter() == nullptr) return false;
    static auto* front = new Front;
    c10::SetCPUAllocator(front, 1);
    return c10::GetCPUAllocator() == front;
  }();
  return done;
}

}  // namespace
}  // namespace saliency_fast

#define SALIENCY_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// A new arena of at most `bytes`; null where the system does not give one.
SALIENCY_FAST_EXPORT void* saliency_fast_arena_open(size_t bytes) {
  using namespace saliency_fast;
  if (!in_front()) return nullptr;
  const size_t size = rounded(bytes, kHugePage);
  char* base = reserve(size);
  if (base == nullptr) return nullptr;
  auto* arena = new (std::nothrow) Arena(base, size);
  if (arena == nullptr) {
    unmap(base, size);
  } else {
    arenas().add(arena);
  }
  return arena;
}

// The calling thread's large tensors come from `arena`, or from malloc where it is null; gives what
// was entered before.
SALIENCY_FAST_EXPORT void* saliency_fast_arena_enter(void* arena) {
  return std::exchange(saliency_fast::entered, static_cast<saliency_fast::Arena*>(arena));
}

// The bytes from the arena's beginning to the end of what was ever taken.
SALIENCY_FAST_EXPORT size_t saliency_fast_arena_extent(void* arena) {
  return static_cast<saliency_fast::Arena*>(arena)->extent();
}

// The arena ends with the last tensor in it; nobody may enter it any more.
SALIENCY_FAST_EXPORT void saliency_fast_arena_close(void* arena) {
  auto* mine = static_cast<saliency_fast::Arena*>(arena);
  if (mine->close()) saliency_fast::arenas().remove(mine);
}
