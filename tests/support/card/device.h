// What torch asks of a device: its guard, its hooks, its random numbers, and whether its context is still alive.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>

#include "memory.h"

namespace card {

// --- the context ---------------------------------------------------------------------------------------------------

// cudaErrorAssert, cudaErrorIllegalAddress, or 0. CUDA never clears them: every later call of the process fails.
inline std::atomic<int> g_context_error{0};
constexpr int kAssertTriggered = 710, kIllegalAddress = 700;

inline void check_context() {
  const int error = g_context_error;
  if (error == 0) return;
  const std::string what =
      error == kAssertTriggered ? "device-side assert triggered" : "an illegal memory access was encountered";
  throw c10::AcceleratorError(
      {__func__, __FILE__, __LINE__}, error,
      "CUDA error: " + what + "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
      "stacktrace below might be incorrect. (simulated)");
}

[[noreturn]] inline void lose_context(int error) {
  g_context_error = error;
  check_context();
  __builtin_unreachable();
}

inline void check_card(int64_t index) {
  if (index >= g_cards)
    throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 101, "CUDA error: invalid device ordinal (simulated)");
}

inline at::Device with_index(std::optional<at::Device> device) {
  if (device && device->has_index()) return *device;
  return {at::kCUDA, static_cast<c10::DeviceIndex>(t_current)};
}

// Makes a card the thread's current one for as long as this object lives.
struct Current {
  explicit Current(int card) : before(t_current) { t_current = card; }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() { t_current = before; }
  const int before;
};

// --- random numbers ------------------------------------------------------------------------------------------------

// A generator of a card. It draws as a CPU's generator does, from a state of its own that can be saved and restored.
class CardGenerator final : public c10::GeneratorImpl {
 public:
  CardGenerator(int card, at::Generator drawn)
      : c10::GeneratorImpl({at::kCUDA, static_cast<c10::DeviceIndex>(card)}, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        drawn_(std::move(drawn)) {}
  explicit CardGenerator(int card) : CardGenerator(card, at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val)) {}

  // What a CPU kernel draws from.
  const at::Generator& drawn() const { return drawn_; }

  void set_current_seed(uint64_t seed) override { drawn_.set_current_seed(seed); }
  uint64_t current_seed() const override { return drawn_.current_seed(); }
  uint64_t seed() override { return drawn_.seed(); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "simulated card: its generator has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "simulated card: its generator has no offset"); }
  void set_state(const c10::TensorImpl& state) override { drawn_.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return drawn_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  CardGenerator* clone_impl() const override { return new CardGenerator(device_.index(), drawn_.clone()); }
  at::Generator drawn_;
};

inline const at::Generator& default_generator(int card) {
  static at::Generator generators[kMostCards];
  std::lock_guard<std::mutex> hold(g_lock);
  at::Generator& generator = generators[card < 0 ? t_current : card];
  if (!generator.defined()) generator = at::make_generator<CardGenerator>(card < 0 ? t_current : card);
  return generator;
}

// --- what torch calls ----------------------------------------------------------------------------------------------

struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  at::DeviceType type() const override { return at::kCUDA; }
  at::Device exchangeDevice(at::Device device) const override {
    const at::Device before = getDevice();
    setDevice(device);
    return before;
  }
  at::Device getDevice() const override { return with_index(std::nullopt); }
  void setDevice(at::Device device) const override {
    check_card(device.index());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(at::Device device) const noexcept override {
    if (device.index() >= 0) t_current = device.index();
  }
  at::Stream getStream(at::Device device) const override { return at::Stream(at::Stream::DEFAULT, device); }
  at::Stream getDefaultStream(at::Device device) const override { return getStream(device); }
  at::Stream exchangeStream(at::Stream stream) const override { return getStream(stream.device()); }
  at::DeviceIndex deviceCount() const noexcept override { return static_cast<at::DeviceIndex>(g_cards); }
};

struct CardHooks final : at::CUDAHooksInterface {
  explicit CardHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex current_device() const override { return static_cast<at::DeviceIndex>(t_current); }
  at::DeviceIndex deviceCount() const override { return static_cast<at::DeviceIndex>(g_cards); }
  at::DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(at::DeviceIndex card) const override { t_current = card; }
  int getNumGPUs() const override { return g_cards; }
  void deviceSynchronize(at::DeviceIndex) const override { check_context(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(at::kCPU); }
  const at::Generator& getDefaultGenerator(at::DeviceIndex card) const override { return default_generator(card); }
  at::Generator getNewGenerator(at::DeviceIndex card) const override {
    return at::make_generator<CardGenerator>(card < 0 ? t_current : card);
  }
};

}  // namespace card
