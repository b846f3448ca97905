// The running denominator of a softmax.
#pragma once

#include "cuda.cuh"

namespace mrlhf::device {

// 1 / T, and log2(e) / T, with which e^(x-m) is one power of 2 of a difference of logits.
struct Scale {
  float inverse, base_2;

  explicit Scale(double temperature)
      : inverse(static_cast<float>(1 / temperature)), base_2(static_cast<float>(1.4426950408889634 / temperature)) {}
};

// S relative to the largest logit so far (before the temperature). An empty one has largest -inf and sum 0.
struct Mass {
  float largest, sum;

  // What logits are subtracted from: absent words alone must not give inf - inf.
  __device__ __forceinline__ float origin() const { return largest == -INFINITY ? 0 : largest; }

  // Moves on to a larger logit; log2 of the factor by which sums shrink, finite also for an empty mass.
  __device__ __forceinline__ float raise(float to, float base_2) {
    const float shift = fmaxf((largest - to) * base_2, -1e30f);
    sum *= power_of_2(shift);
    largest = to;
    return shift;
  }
};

}  // namespace mrlhf::device
