// Runs a kernel's blocks on the CPU, each thread of a block as a fiber, so that a C++ compiler and its sanitizers see
// the very source that nvcc compiles.
//
// Threads run one at a time until they reach a barrier or a shuffle, in an order that the test chooses (`order`): a
// result that needs a missing barrier differs in one of them. A barrier or shuffle that not every thread reaches at the
// same line aborts, as does a 16-byte access at another address than a multiple of 16 (device/row.cuh). Not shown: data
// races between barriers that no order of whole stretches reveals, the memory model, and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

// 16-bit numbers as their bits, rounded to the nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits = 0;
};
struct __half {
  uint16_t bits = 0;
};

namespace cuda_on_cpu {

enum class Order { forward, backward, mixed };
inline Order order = Order::forward;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", reason, blockIdx.x, threadIdx.x);
  std::abort();
}

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;

// One thread of a block.
struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  bool finished = false, in_shuffle = false;
  int line = 0;       // of the barrier or shuffle it waits at
  unsigned mask = 0;  // of the shuffle
  unsigned source = 0, value = 0;
  void* of_sanitizer = nullptr;
};

class Block {
 public:
  Block(unsigned threads, const std::function<void()>& body) : body_(body), fibers_(threads) {
    static std::vector<std::unique_ptr<char[]>> stacks;  // of every block in turn
    while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);
    for (unsigned thread = 0; thread < threads; ++thread) prepare(fibers_[thread], stacks[thread].get());
  }

  void run() {
    current() = this;
    do {
      for (unsigned i = 0; i < fibers_.size(); ++i) {
        const unsigned thread = in_order(i);
        if (!fibers_[thread].finished && fibers_[thread].line == 0) resume(thread);
      }
    } while (release());
  }

  // Called by the running thread, which goes on when the others have come this far.
  void wait(int line) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.line = line;
    leave(fiber);
  }

  unsigned shuffle(unsigned mask, unsigned value, unsigned source, int line) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.in_shuffle = true, fiber.mask = mask, fiber.value = value, fiber.source = source;
    wait(line);
    return fiber.value;
  }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

 private:
  static void prepare(Fiber& fiber, char* stack) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(stack, kStack);  // the frames of the block before
#endif
    fiber.stack = stack;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter() {
    Block& block = *current();
    block.entered();
    block.body_();
    Fiber& fiber = block.fibers_[threadIdx.x];
    fiber.finished = true;
    block.leave(fiber);
  }

  // Runs one thread until it waits or ends.
  void resume(unsigned thread) {
    threadIdx.x = thread;
    Fiber& fiber = fibers_[thread];
#ifdef __SANITIZE_ADDRESS__
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack, kStack);
#endif
    swapcontext(&main_, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  }

  void leave(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fiber.finished ? nullptr : &fiber.of_sanitizer, main_stack_, main_size_);
#endif
    swapcontext(&fiber.context, &main_);
    entered(fiber.of_sanitizer);
  }

  void entered([[maybe_unused]] void* of_sanitizer = nullptr) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(of_sanitizer, &main_stack_, &main_size_);
#endif
  }

  unsigned in_order(unsigned i) const {
    const unsigned count = static_cast<unsigned>(fibers_.size());
    if (order == Order::forward) return i;
    if (order == Order::backward) return count - 1 - i;
    return (i * 37 + 11) % count;  // a permutation: blocks are multiples of 32 threads, and none of 37
  }

  // Lets waiting threads go on: warps whose shuffle is complete, else all from a complete barrier. False at the end.
  bool release() {
    bool moved = false, waiting = false;
    for (unsigned first = 0; first < fibers_.size(); first += kWarp) moved |= exchange(first);
    for (const Fiber& fiber : fibers_) waiting |= !fiber.finished;
    if (moved || !waiting) return moved;
    const int line = fibers_[0].line;
    for (Fiber& fiber : fibers_) {
      if (fiber.finished || fiber.in_shuffle || fiber.line != line) fail("a barrier that not every thread reaches");
      fiber.line = 0;
    }
    return true;
  }

  // Hands the values of a complete shuffle around in the warp from thread `first` on.
  bool exchange(unsigned first) {
    unsigned lanes = 0, values[kWarp], line = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const Fiber& fiber = fibers_[first + lane];
      if (!fiber.in_shuffle) continue;
      lanes |= 1u << lane;
      line = static_cast<unsigned>(fiber.line);
      values[lane] = fiber.value;
    }
    if (lanes == 0) return false;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      Fiber& fiber = fibers_[first + lane];
      if (!fiber.in_shuffle) continue;
      if (fiber.mask != lanes || static_cast<unsigned>(fiber.line) != line || !(lanes >> fiber.source & 1u)) {
        fail("a shuffle that not every lane of its mask reaches");
      }
      fiber.value = values[fiber.source];
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      Fiber& fiber = fibers_[first + lane];
      if (fiber.in_shuffle) fiber.in_shuffle = false, fiber.line = 0;
    }
    return true;
  }

  const std::function<void()>& body_;
  std::vector<Fiber> fibers_;
  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
};

// Runs `body` as each thread of each block, one block after the other.
inline void launch(int64_t blocks, int threads, const std::function<void()>& body) {
  if (blocks < 1 || blocks > INT32_MAX) fail("a grid of no or too many blocks");
  if (threads < 1 || threads > 1024 || threads % kWarp != 0) fail("a block that is not made of 1 to 32 whole warps");
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) Block(blockDim.x, body).run();
}

}  // namespace cuda_on_cpu

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::Block::current()->wait(line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  using cuda_on_cpu::bits_of;
  const unsigned bits = bits_of<unsigned>(value), source = static_cast<unsigned>(lane) % cuda_on_cpu::kWarp;
  return bits_of<T>(cuda_on_cpu::Block::current()->shuffle(mask, bits, source, line));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp, source = lane + static_cast<unsigned>(distance);
  return __shfl_sync(mask, value, static_cast<int>(source < cuda_on_cpu::kWarp ? source : lane), line);
}

inline float __fmul_rn(float a, float b) { return a * b; }

inline float __bfloat162float(__nv_bfloat16 x) {
  return cuda_on_cpu::bits_of<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = cuda_on_cpu::bits_of<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return digits != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(digits), -24);
  return sign * std::ldexp(static_cast<float>(digits + 1024), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size == 0) return {sign};
  // in units of the last digit, which a half below 2^-14 keeps at 2^-24
  const int unit = std::max(std::ilogb(size), -14) - 10;
  const int digits = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + digits))};
}
