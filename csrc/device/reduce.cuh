// Reductions in a fixed order, so that equal rows give equal bits.
#pragma once

#include "cuda.cuh"

namespace mrlhf::device {

// `state` of the lane `distance` further on, four bytes at a time.
template <class State>
__device__ __forceinline__ State from_lane(State state, int distance) {
  static_assert(sizeof(State) % 4 == 0, "a state is made of 4-byte numbers");
  unsigned words[sizeof(State) / 4];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (unsigned& word : words) word = __shfl_down_sync(0xffffffffu, word, distance);
  memcpy(&state, words, sizeof(State));
  return state;
}

template <class State, class Merge>
__device__ __forceinline__ State warp_reduce(State state, Merge merge) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) merge(state, from_lane(state, distance));
  return state;
}

// The merger of all threads' states, in thread 0; blockDim.x is a multiple of 32. Called once a kernel.
template <class State, class Merge>
__device__ __forceinline__ State block_reduce(State state, Merge merge) {
  __shared__ State of_warp[kThreads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  state = warp_reduce(state, merge);
  if (lane == 0) of_warp[warp] = state;
  __syncthreads();
  if (warp > 0) return state;
  state = lane * kWarp < static_cast<int>(blockDim.x) ? of_warp[lane] : State::empty();
  return warp_reduce(state, merge);
}

}  // namespace mrlhf::device
