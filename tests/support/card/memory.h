// The memory of the simulated cards: an allocator with a limit for each card, and the borders that a kernel opens.
//
// A tensor's memory is host memory without access rights. Only a kernel that runs opens it, so that a host read of a
// data pointer ends the process with SIGSEGV, as a read of a card's address does.
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace card {

constexpr int kMostCards = 8;
constexpr size_t kPage = 4096;
constexpr size_t kAllocationUnit = 512;  // what the caching allocator of CUDA rounds to

inline int g_cards = 1;
inline thread_local int t_current = 0;  // the current card of this thread
inline std::mutex g_lock;

struct Usage {
  size_t total = 0;
  size_t used = 0;
  size_t peak = 0;
};
inline Usage g_usage[kMostCards];

struct Block {
  size_t charged;  // bytes that the card's limit counts
  size_t mapped;
  int kernels;  // how many of them use it now
  int card;
};
inline std::unordered_map<void*, Block> g_blocks;

inline size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

[[noreturn]] inline void throw_out_of_memory(int card, size_t bytes) {
  const Usage& usage = g_usage[card];
  throw c10::OutOfMemoryError(
      {__func__, __FILE__, __LINE__},
      "CUDA out of memory. Tried to allocate " + std::to_string(bytes >> 20) + ".00 MiB. GPU " + std::to_string(card) +
          " has a total capacity of " + std::to_string(usage.total >> 20) + ".00 MiB of which " +
          std::to_string((usage.total - usage.used) >> 20) + ".00 MiB is free. (simulated)");
}

inline void release(void* address) {
  std::lock_guard<std::mutex> hold(g_lock);
  auto block = g_blocks.find(address);
  if (block == g_blocks.end()) return;
  g_usage[block->second.card].used -= block->second.charged;
  munmap(address, block->second.mapped);
  g_blocks.erase(block);
}

struct CardAllocator final : at::Allocator {
  // Memory of the thread's current card.
  at::DataPtr allocate(size_t bytes) override {
    const int card = t_current;
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(card));
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    std::lock_guard<std::mutex> hold(g_lock);
    Usage& usage = g_usage[card];
    const size_t charged = round_up(bytes, kAllocationUnit);
    if (usage.used + charged > usage.total) throw_out_of_memory(card, charged);
    const size_t mapped = round_up(bytes, kPage);
    void* address = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(address != MAP_FAILED, "simulated card: the host has no memory for it");
    g_blocks[address] = {charged, mapped, 0, card};
    usage.used += charged;
    usage.peak = std::max(usage.peak, usage.used);
    return {address, address, &release, device};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void*, const void*, std::size_t) const override {
    TORCH_CHECK(false, "simulated card: the host copied a card's storage");
  }
};
inline CardAllocator g_allocator;

// Pinned memory is plain memory: nothing is asynchronous here.
struct PinnedAllocator final : at::HostAllocator {
  at::DataPtr allocate(size_t bytes) override { return c10::GetAllocator(at::kCPU)->allocate(bytes); }
  at::DeleterFnPtr raw_deleter() const override { return c10::GetAllocator(at::kCPU)->raw_deleter(); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
inline PinnedAllocator g_pinned_allocator;

// The blocks that one kernel may touch, for as long as this object lives. Kernels of several threads may share a block.
class Opened {
 public:
  Opened() = default;
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;
  ~Opened() {
    std::lock_guard<std::mutex> hold(g_lock);
    for (void* address : addresses_) {
      auto block = g_blocks.find(address);
      if (block != g_blocks.end() && --block->second.kernels == 0) mprotect(address, block->second.mapped, PROT_NONE);
    }
  }
  void add(void* address) {
    std::lock_guard<std::mutex> hold(g_lock);
    auto block = g_blocks.find(address);
    if (block == g_blocks.end()) return;
    if (block->second.kernels++ == 0) mprotect(address, block->second.mapped, PROT_READ | PROT_WRITE);
    addresses_.push_back(address);
  }

 private:
  std::vector<void*> addresses_;
};

}  // namespace card
