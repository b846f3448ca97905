// Drawing words by perturbed maxima: one block a row, noise, largest and denominator in one pass. The noise is
// parallel/random.py's: the same integers, Gumbel values up to the last bit of the logarithms.
#pragma once

#include "../device/mass.cuh"
#include "../device/reduce.cuh"
#include "../device/row.cuh"

namespace mrlhf::device {

constexpr int kSampleBatch = 2;

// The hash's multipliers ("lowbias32") and the number that keys the columns.
constexpr uint32_t kFirst = 0x7FEB352D, kSecond = 0x846CA68B, kColumns = 0x2B7E1516;

// 32 random bits of a row's two keys and a word.
__device__ __forceinline__ uint32_t random_bits(uint32_t key, uint32_t second_key, uint32_t word) {
  uint32_t column = word ^ kColumns;
  column = (column ^ (column >> 16)) * kFirst;
  column = (column ^ (column >> 15)) * kSecond;
  uint32_t bits = key ^ column ^ (column >> 16);
  bits = (bits ^ (bits >> 16)) * kFirst ^ second_key;
  bits = (bits ^ (bits >> 15)) * kSecond;
  return bits ^ (bits >> 16);
}

// -log(-log(1 - v)) with v = (bits + 1/2) / 2^32, which rounding must not make 1.
__device__ __forceinline__ float gumbel(uint32_t bits) {
  const float v = fminf((static_cast<float>(bits) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -logf(-log1pf(-v));
}

// The best word so far, and the softmax's denominator.
struct Draw {
  Mass mass;
  float best, logit;  // of the best word: its perturbed value, its logit
  uint32_t column;

  __device__ static Draw empty() { return {{-INFINITY, 0}, -INFINITY, -INFINITY, 0xffffffffu}; }

  __device__ __forceinline__ void consider(float other_best, float other_logit, uint32_t other_column) {
    if (other_best > best || (other_best == best && other_column < column)) {
      best = other_best, logit = other_logit, column = other_column;
    }
  }

  __device__ __forceinline__ void merge(Draw other, float base_2) {
    const float to = fmaxf(mass.largest, other.mass.largest);
    mass.raise(to, base_2);
    other.mass.raise(to, base_2);
    mass.sum += other.mass.sum;
    consider(other.best, other.logit, other.column);
  }
};

// What one row draws with; without keys nothing is added.
struct Noise {
  uint32_t key = 0, second_key = 0, vocab_start;
  bool silent;

  __device__ Noise(const uint32_t* keys, int64_t row, const Slice& slice)
      : vocab_start(static_cast<uint32_t>(slice.vocab_start)), silent(keys == nullptr) {
    if (!silent) key = keys[row], second_key = keys[slice.rows + row];
  }

  __device__ __forceinline__ float of(uint32_t column) const {
    return silent ? 0 : gumbel(random_bits(key, second_key, vocab_start + column));
  }
};

// Adds `count` words that lie side by side from `column` on.
template <class T>
__device__ __forceinline__ void add(Draw& draw, const Vector<T>& words, int count, uint32_t column, const Noise& noise,
                                    Scale scale) {
  float largest = draw.mass.largest;
#pragma unroll
  for (int e = 0; e < Vector<T>::kWidth; ++e) largest = e < count ? fmaxf(largest, words[e]) : largest;
  draw.mass.raise(largest, scale.base_2);
  const float origin = draw.mass.origin();
  float sum = 0;
#pragma unroll
  for (int e = 0; e < Vector<T>::kWidth; ++e) {
    if (e >= count) break;
    const float logit = words[e];
    sum += power_of_2((logit - origin) * scale.base_2);
    draw.consider(__fmul_rn(logit, scale.inverse) + noise.of(column + e), logit, column + e);
  }
  draw.mass.sum += sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_words(const T* __restrict__ logits, const uint32_t* __restrict__ row_keys, Slice slice, Scale scale,
               float* __restrict__ out) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * slice.stride;
  const Cut<T> cut(x, slice.columns);
  const Noise noise(row_keys, row, slice);
  Draw draw = Draw::empty();
  Vector<T> words[kSampleBatch];
  for (int first = threadIdx.x; first < cut.vectors; first += kSampleBatch * blockDim.x) {
    fetch(x, cut, true, first, words);
#pragma unroll
    for (int u = 0; u < kSampleBatch; ++u) {
      const int i = first + u * static_cast<int>(blockDim.x);
      if (i < cut.vectors) add(draw, words[u], Vector<T>::kWidth, cut.column(i), noise, scale);
    }
  }
  cut.singles([&](int column) { add(draw, alone<T>(to_float(x[column])), 1, column, noise, scale); });
  draw = block_reduce(draw, [&](Draw& into, const Draw& other) { into.merge(other, scale.base_2); });
  if (threadIdx.x > 0) return;
  out += row;
  const bool any = draw.column != Draw::empty().column;
  out[0] = draw.best;
  out[slice.rows] = any ? static_cast<float>(slice.vocab_start + draw.column) : 0;
  out[2 * slice.rows] = draw.mass.largest * scale.inverse;
  out[3 * slice.rows] = draw.mass.sum;
  out[4 * slice.rows] = any ? draw.logit * scale.inverse : 0;
}

}  // namespace mrlhf::device
