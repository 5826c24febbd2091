// An arena: one reservation of memory that the tensors of a call's launches share. Pages are touched
// once for all launches, and what one tensor gives back another takes. malloc maps and clears
// tensors of tens of megabytes anew each time, and leaves holes between smaller ones.
//
// Launches of one call make the same tensors in the same order. Where an earlier one was traced,
// each tensor has a place of its own that was found for all of them together, and the process grows
// by no more than what lives at once. What comes unexpected goes into a hole: small memory, which
// often lives from forward to backward, from the far end.
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
#include <numeric>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace saliency_fast {
namespace {

constexpr size_t kGrain = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// Bytes of addresses that are worth asking for.
constexpr size_t kFewest = size_t{1} << 30;
// Memory is small that takes less than this share of the largest so far, where that is large: the
// far end costs a page of its own.
constexpr size_t kSmall = 16;
constexpr size_t kLarge = size_t{32} << 20;
// How far from the next expected piece another is looked for, where some came that were not.
constexpr size_t kAway = 16;

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

// Gives back the pages that lie in `bytes` from `start` as a whole: others live in the rest.
void forget(char* base, size_t start, size_t bytes) {
#if defined(__linux__)
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t first = rounded(start, page), last = (start + bytes) / page * page;
  if (first < last) madvise(base + first, last - first, MADV_DONTNEED);
#endif
}

void unmap(char* start, size_t bytes) {
#if defined(__linux__)
  munmap(start, bytes);
#endif
}

// One piece of memory of a launch: its bytes, and the events (memory taken or given back) of the
// launch between which it lives.
struct Life {
  uint64_t bytes, from, until;
};
constexpr uint64_t kForever = ~uint64_t{0};

// Places for `lives` such that no two that live at once overlap: the largest first, each as low as
// it can lie. Gives the end of the highest.
size_t place(const Life* lives, size_t count, size_t* starts) {
  std::vector<size_t> order(count), placed;
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return lives[a].bytes > lives[b].bytes; });
  size_t extent = 0;
  for (const size_t one : order) {
    const size_t bytes = rounded(lives[one].bytes, kGrain);
    size_t start = 0;
    // `placed` is ordered by start: the first gap that is wide enough.
    for (const size_t other : placed) {
      if (lives[other].until < lives[one].from || lives[one].until < lives[other].from) continue;
      if (starts[other] >= start + bytes) break;
      start = std::max(start, starts[other] + rounded(lives[other].bytes, kGrain));
    }
    starts[one] = start;
    extent = std::max(extent, start + bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), start,
                                   [&](size_t at, size_t other) { return at < starts[other]; }),
                  one);
  }
  return extent;
}

class Arena {
 public:
  Arena(char* base, size_t size, size_t least)
      : base_(base), size_(size), least_(least), far_(size), holes_{{0, size}} {}
  ~Arena() { unmap(base_, size_); }

  // Smaller memory is malloc's, whose heap keeps it well.
  size_t least() const { return least_; }

  // A launch begins: from now on lives are noted, and expected ones looked for from the first.
  void begin() {
    const std::lock_guard<std::mutex> lock(mutex_);
    seen_.clear();
    born_.clear();
    for (Slot& slot : expected_) slot.taken = false;
    next_ = 0;
    event_ = 0;
  }

  void expect(const Life* lives, size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<size_t> starts(count);
    floor_ = place(lives, count, starts.data());
    expected_.clear();
    for (size_t one = 0; one < count; ++one) expected_.push_back({starts[one], lives[one].bytes});
  }

  std::vector<Life> seen() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return seen_;
  }

  // Null where there is no room.
  void* take(size_t wanted) {
    const size_t bytes = rounded(wanted, kGrain);
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t start = 0;
    if (!take_expected(wanted, bytes, &start) && !take_any(bytes, &start)) return nullptr;
    blocks_.emplace(start, bytes);
    largest_ = std::max(largest_, bytes);
    if (start < size_ / 2) {
      extent_ = std::max(extent_, start + bytes);
    } else {
      far_ = std::min(far_, start);
    }
    born_[start] = seen_.size();
    seen_.push_back({wanted, event_++, kForever});
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
    if (const auto born = born_.find(start); born != born_.end()) {
      seen_[born->second].until = event_;
      born_.erase(born);
    }
    ++event_;
    if (closed_) forget(base_, start, bytes);
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
      const size_t end = start + bytes;
      if (start < extent_) forget(base_, start, std::min(end, extent_) - start);
      if (end > far_) forget(base_, std::max(start, far_), end - std::max(start, far_));
    }
    return blocks_.empty();
  }

  size_t extent() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return rounded(extent_, kHugePage) + rounded(size_ - far_, kHugePage);
  }

 private:
  struct Slot {
    size_t start, bytes;
    bool taken = false;
  };

  // The place of an expected piece of just this size, the nearest to the next one, if nothing else
  // lies there.
  bool take_expected(size_t wanted, size_t bytes, size_t* start) {
    const size_t next = next_++;
    for (size_t away = 0; away <= kAway; ++away) {
      for (const size_t one : {next + away, next - away}) {
        if (one >= expected_.size() || expected_[one].taken || expected_[one].bytes != wanted) {
          continue;
        }
        expected_[one].taken = true;
        *start = expected_[one].start;
        auto hole = holes_.upper_bound(*start);
        if (hole == holes_.begin()) return false;
        --hole;
        if (hole->first + hole->second < *start + bytes) return false;
        cut(hole, *start, bytes);
        return true;
      }
    }
    return false;
  }

  // The smallest hole, the lowest among equals; for small memory the end of the highest. What is
  // expected keeps its places.
  bool take_any(size_t bytes, size_t* start) {
    const bool small = largest_ >= kLarge && bytes < largest_ / kSmall;
    auto best = holes_.end();
    size_t room = 0;
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
      const size_t end = hole->first + hole->second;
      const size_t from = std::max(hole->first, floor_);
      if (end < from + bytes) continue;
      if (best == holes_.end() || small || end - from < room) {
        best = hole;
        room = end - from;
      }
    }
    if (best == holes_.end()) return false;
    *start = small ? best->first + best->second - bytes : std::max(best->first, floor_);
    cut(best, *start, bytes);
    return true;
  }

  void cut(std::map<size_t, size_t>::iterator hole, size_t start, size_t bytes) {
    const auto [from, size] = *hole;
    holes_.erase(hole);
    if (start > from) holes_.emplace(from, start - from);
    if (from + size > start + bytes) holes_.emplace(start + bytes, from + size - start - bytes);
  }

  char* base_;
  size_t size_, least_;
  // Memory was touched below the one and above the other.
  size_t extent_ = 0, far_;
  size_t largest_ = 0, floor_ = 0;
  bool closed_ = false;
  std::mutex mutex_;
  std::map<size_t, size_t> holes_;  // start to bytes, never two that touch
  std::unordered_map<size_t, size_t> blocks_, born_;
  std::vector<Life> seen_;
  std::vector<Slot> expected_;
  size_t next_ = 0, event_ = 0;
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
    if (entered != nullptr && bytes >= entered->least()) {
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

using saliency_fast::Arena;
using saliency_fast::Life;

// A new arena of at most `bytes`, for memory from `least` bytes on; null where the system gives none.
SALIENCY_FAST_EXPORT Arena* saliency_fast_arena_open(size_t bytes, size_t least) {
  if (!saliency_fast::in_front()) return nullptr;
  size_t size = saliency_fast::rounded(bytes, saliency_fast::kHugePage);
  char* base = saliency_fast::reserve(size);
  // Some systems limit addresses, too.
  while (base == nullptr && size > saliency_fast::kFewest) {
    size /= 2;
    base = saliency_fast::reserve(size);
  }
  if (base == nullptr) return nullptr;
  auto* arena = new Arena(base, size, least);
  saliency_fast::arenas().add(arena);
  return arena;
}

// The calling thread's tensors come from `arena`, and a launch begins; null: from malloc again.
// Gives what was entered before.
SALIENCY_FAST_EXPORT Arena* saliency_fast_arena_enter(Arena* arena) {
  if (arena != nullptr) arena->begin();
  return std::exchange(saliency_fast::entered, arena);
}

SALIENCY_FAST_EXPORT void saliency_fast_arena_leave(Arena* before) {
  saliency_fast::entered = before;
}

// The bytes of the pages that were ever touched, holes between them included.
SALIENCY_FAST_EXPORT size_t saliency_fast_arena_extent(Arena* arena) { return arena->extent(); }

// Writes at most `room` lives of the last launch, in the order in which they began; gives their
// number.
SALIENCY_FAST_EXPORT size_t saliency_fast_arena_seen(Arena* arena, Life* lives, size_t room) {
  const std::vector<Life> seen = arena->seen();
  std::copy_n(seen.begin(), std::min(room, seen.size()), lives);
  return seen.size();
}

// Finds a place for each of the lives of the launches to come.
SALIENCY_FAST_EXPORT void saliency_fast_arena_expect(Arena* arena, const Life* lives,
                                                     size_t count) {
  arena->expect(lives, count);
}

// The bytes of the pages that a launch with these lives takes.
SALIENCY_FAST_EXPORT size_t saliency_fast_arena_needed(const Life* lives, size_t count) {
  std::vector<size_t> starts(count);
  return saliency_fast::rounded(saliency_fast::place(lives, count, starts.data()),
                                saliency_fast::kHugePage);
}

// The arena ends with the last tensor in it; nobody may enter it any more.
SALIENCY_FAST_EXPORT void saliency_fast_arena_close(Arena* arena) {
  if (arena->close()) saliency_fast::arenas().remove(arena);
}
