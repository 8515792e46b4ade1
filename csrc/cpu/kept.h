// Memory that threads keep beyond a call, so that its pages stay mapped.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>

namespace gatedkernels {

// Room for floats, from a cache line on.
class Kept {
 public:
  // What it held is lost where it had less room.
  float* reserve(int64_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(operator new(floats * sizeof(float), kLine)));
      size_ = floats;
    }
    return memory_.get();
  }

  int64_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* memory) const { operator delete(memory, kLine); }
  };

  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// The same with what a thread computed into it last, as far as a key says. Other calls may have other tensors at the
// same place: a key names its call.
template <class Key>
class KeptResult {
 public:
  float* reserve(int64_t floats) {
    if (floats > memory_.size()) key_.reset();
    return memory_.reserve(floats);
  }

  // Whether it is not the result of this key yet; from now on it is.
  bool lacks(const Key& key) {
    if (key_ == key) return false;
    key_ = key;
    return true;
  }

 private:
  Kept memory_;
  std::optional<Key> key_;
};

// What a call is known by to its threads.
inline uint64_t next_call() {
  static std::atomic<uint64_t> calls{0};
  return ++calls;
}

}  // namespace gatedkernels
