// What the tests of the kernels share: numbers, arrays at any alignment, and what is said when an expectation fails.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <vector>

#include "../device/row.cuh"

namespace check {

inline int failures = 0;
inline const char* situation = "";

inline void expect(bool true_here, const char* what, int64_t row, int64_t column, double found, double wanted) {
  if (true_here) return;
  if (++failures <= 10) {
    std::printf("%s: %s of row %lld, column %lld is %.9g and not %.9g\n", situation, what,
                static_cast<long long>(row), static_cast<long long>(column), found, wanted);
  }
}

// Equal infinities, both NaN, or within `error`.
inline void near(double found, double wanted, double error, const char* what, int64_t row, int64_t column = -1) {
  const bool equal = found == wanted || (std::isnan(found) && std::isnan(wanted));
  expect(equal || std::fabs(found - wanted) <= error, what, row, column, found, wanted);
}

inline int report() {
  if (failures > 0) std::printf("%d expectations failed\n", failures);
  return failures > 0 ? 1 : 0;
}

// Numbers that look random and are the same everywhere.
struct Random {
  uint64_t state;

  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  double uniform() { return (bits() + 0.5) * 0x1p-32; }
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }
};

template <class T>
constexpr mrlhf::DType dtype_of() {
  return sizeof(T) == 4 ? mrlhf::DType::f32 : std::is_same_v<T, __half> ? mrlhf::DType::f16 : mrlhf::DType::bf16;
}

// The largest relative error of rounding to T.
template <class T>
constexpr double rounding() {
  return sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
}

// `rows` rows of `width` numbers, `stride` apart, the first `offset` numbers behind a 16-byte boundary; no byte of the
// heap belongs to it after the last row. What is not set is NaN, so that reading it shows.
template <class T>
class Rows {
 public:
  Rows(int64_t rows, int64_t width, int64_t stride, int64_t offset)
      : stride(stride), width_(width), offset_(offset), count_(offset + (rows > 0 ? (rows - 1) * stride + width : 0)) {
    all_.reset(static_cast<T*>(::operator new(count_ * sizeof(T), std::align_val_t(16))));
    for (int64_t i = 0; i < count_; ++i) mrlhf::device::round_to(NAN, all_.get()[i]);
  }

  T* data() { return all_.get() + offset_; }
  double at(int64_t row, int64_t column) { return mrlhf::device::to_float(data()[row * stride + column]); }
  void set(int64_t row, int64_t column, double x) {
    mrlhf::device::round_to(static_cast<float>(x), data()[row * stride + column]);
  }

  // Expects that nobody wrote before or between the rows.
  void expect_untouched_gaps() {
    for (int64_t i = 0; i < count_; ++i) {
      if (i >= offset_ && (i - offset_) % stride < width_) continue;
      const double found = mrlhf::device::to_float(all_.get()[i]);
      expect(std::isnan(found), "what lies between the rows", (i - offset_) / stride, i, found, NAN);
    }
  }

  const int64_t stride;

 private:
  struct Free {
    void operator()(T* place) const { ::operator delete(place, std::align_val_t(16)); }
  };
  int64_t width_, offset_, count_;
  std::unique_ptr<T, Free> all_;
};

// Two rows of zeros that begin more than 2^31 elements apart; of the memory only the touched pages exist.
template <class T>
class FarRows {
 public:
  static constexpr int64_t stride = (int64_t{1} << 31) + 8;

  explicit FarRows(int64_t columns) : bytes_(sizeof(T) * (stride + columns)) {
    constexpr int reserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    place_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, reserved, -1, 0);
    if (place_ == MAP_FAILED) expect(false, "address space", 0, 0, 0, static_cast<double>(bytes_));
  }
  ~FarRows() {
    if (there()) munmap(place_, bytes_);
  }
  FarRows(const FarRows&) = delete;
  void operator=(const FarRows&) = delete;

  bool there() const { return place_ != MAP_FAILED; }
  T* data() { return static_cast<T*>(place_); }
  double at(int64_t row, int64_t column) { return mrlhf::device::to_float(data()[row * stride + column]); }
  void set(int64_t row, int64_t column, double x) {
    mrlhf::device::round_to(static_cast<float>(x), data()[row * stride + column]);
  }

 private:
  size_t bytes_;
  void* place_;
};

// Runs `test` in each order of the threads.
template <class Test>
void in_every_order(Test test) {
  for (const auto order : {cuda_on_cpu::Order::forward, cuda_on_cpu::Order::backward, cuda_on_cpu::Order::mixed}) {
    cuda_on_cpu::order = order;
    test();
  }
}

}  // namespace check
