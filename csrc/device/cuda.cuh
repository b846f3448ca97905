// What the kernels need of CUDA, and its stand-in where a C++ compiler builds them for the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../mrlhf.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MRLHF_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(grid), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "../testing/cuda_on_cpu.h"

#define MRLHF_LAUNCH(kernel, grid, threads, stream, ...) \
  cuda_on_cpu::launch(grid, threads, [&, unused = (stream)] { (void)unused, (kernel)(__VA_ARGS__); })
#endif

namespace mrlhf::device {

constexpr int kWarp = 32;
constexpr int kThreads = 1024;  // the most of a block
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// 2^x to two units in the last place, with one instruction; 0 below 2^-126.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// Throws what the last launch said, if it was not success.
inline void check(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Calls `run` with a value of the type behind `dtype`; the kernels know no double.
template <class Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::bf16:
      return run(__nv_bfloat16{});
    case DType::f16:
      return run(__half{});
    default:
      throw std::invalid_argument("float64 logits are computed on the CPU only");
  }
}

}  // namespace mrlhf::device
