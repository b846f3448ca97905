// Generalised advantage estimation: a warp a row walks 32 positions at a time from the end. Semantics of
// algorithms/gae.py: A_t = delta_t + gamma lam A_{t+1} inside the mask, 0 outside, nothing follows the last position.
#pragma once

#include "../device/reduce.cuh"

namespace mrlhf::device {

constexpr int kGaeThreads = 128;

// The affine map A -> rest + factor A that leads from the advantage behind some positions to that of the first.
struct Step {
  float factor, rest;
};

// `outer` after `inner`. Nothing crosses a factor of 0, NaN neither: the mask stands there.
__device__ __forceinline__ Step after(Step outer, Step inner) {
  if (outer.factor == 0) return outer;
  return {outer.factor * inner.factor, fmaf(outer.factor, inner.rest, outer.rest)};
}

// The map of each lane's position and all that follow it in the warp.
__device__ __forceinline__ Step suffix(Step step, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Step further = from_lane(step, distance);
    if (lane + distance < kWarp) step = after(step, further);
  }
  return step;
}

static __global__ void __launch_bounds__(kGaeThreads)
    scan(const float* __restrict__ rewards, const float* __restrict__ values, const float* __restrict__ mask,
         int64_t rows, int64_t width, float gamma, float gamma_lam, float* __restrict__ advantages,
         float* __restrict__ returns) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kGaeThreads) + threadIdx.x) / kWarp;
  if (row >= rows) return;
  float value_behind = 0, advantage_behind = 0;
  for (int64_t first = (width - 1) / kWarp * kWarp; first >= 0; first -= kWarp) {
    const int64_t t = first + lane, place = row * width + t;
    const bool kept = t < width && mask[place] != 0;
    const float value = kept ? values[place] : 0, next = __shfl_down_sync(0xffffffffu, value, 1);
    const float next_value = lane == kWarp - 1 ? value_behind : next;
    const Step step = {kept ? gamma_lam : 0, kept ? rewards[place] + gamma * next_value - value : 0};
    const float advantage = after(suffix(step, lane), {0, advantage_behind}).rest;
    if (t < width) {
      advantages[place] = advantage;
      returns[place] = advantage + value;
    }
    advantage_behind = __shfl_sync(0xffffffffu, advantage, 0);
    value_behind = __shfl_sync(0xffffffffu, value, 0);
  }
}

}  // namespace mrlhf::device
