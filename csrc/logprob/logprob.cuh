// Statistics of rows of logits and the gradient of log-prob, entropy and exact KL: one block a row, each logit read
// once, 16 bytes at a time. The formulae and the layout of the results stand in mrlhf.h.
#pragma once

#include "../device/mass.cuh"
#include "../device/reduce.cuh"
#include "../device/row.cuh"

namespace mrlhf::device {

constexpr int kStatsBatch = 4;     // vectors a thread asks for before it needs the first
constexpr int kKlStatsBatch = 2;   // of each of two rows
constexpr int kBackwardBatch = 4;

// 0 where the weight is 0, whatever the value: absent words and those too small for a float weigh nothing.
__device__ __forceinline__ float product(float weight, float value) { return weight > 0 ? weight * value : 0; }

// Sums over the words of one row; distances are in powers of 2.
struct Policy {
  Mass mass;
  float distance;  // Z log2(e): sum of log2(e) (x - m) e^(x-m)

  __device__ static Policy empty() { return {{-INFINITY, 0}, 0}; }

  __device__ __forceinline__ float raise(float to, float base_2) {
    const float sum = mass.sum, shift = mass.raise(to, base_2);
    distance = product(power_of_2(shift), distance + shift * sum);
    return shift;
  }

  template <class T, int kBatch>
  __device__ __forceinline__ void add(const Vector<T> (&x)[kBatch], float base_2) {
    raise(largest_of(x, mass.largest), base_2);
    const float origin = mass.origin();
    const Policy none = {{mass.largest, 0}, 0};
    Policy batch = none;
#pragma unroll
    for (const Vector<T>& vector : x) {
      Policy few = none;  // summed apart: long chains of additions would show in the last digits
#pragma unroll
      for (int e = 0; e < Vector<T>::kWidth; ++e) few.weigh((vector[e] - origin) * base_2);
      batch.join(few);
    }
    join(batch);
  }

  // Adds sums relative to the same largest word.
  __device__ __forceinline__ void join(const Policy& other) {
    mass.sum += other.mass.sum;
    distance += other.distance;
  }

  // Adds a word that lies `d` from the largest, in powers of 2; gives its weight.
  __device__ __forceinline__ float weigh(float d) {
    const float weight = power_of_2(d);
    mass.sum += weight;
    distance += weight * fmaxf(d, -256.0f);  // weightless from -150 on; -inf would make NaN
    return weight;
  }

  __device__ __forceinline__ void merge(Policy other, float base_2) {
    const float to = fmaxf(mass.largest, other.mass.largest);
    raise(to, base_2);
    other.raise(to, base_2);
    join(other);
  }

  template <class T, int kBatch>
  __device__ __forceinline__ static float largest_of(const Vector<T> (&x)[kBatch], float so_far) {
#pragma unroll
    for (const Vector<T>& vector : x) {
#pragma unroll
      for (int e = 0; e < Vector<T>::kWidth; ++e) so_far = fmaxf(so_far, vector[e]);
    }
    return so_far;
  }

  // Writes m, S, Z.
  __device__ void write(float* out, int64_t rows, Scale scale) const {
    out[0] = mass.largest * scale.inverse;
    out[rows] = mass.sum;
    out[2 * rows] = kLn2 * distance;
  }
};

// The same beside a reference's row.
struct Pair {
  Policy policy;
  Mass reference;
  float apart;  // D log2(e): sum of log2(e) ((x - m) - (y - m')) e^(x-m)

  __device__ static Pair empty() { return {Policy::empty(), {-INFINITY, 0}, 0}; }

  __device__ __forceinline__ void raise(float to, float reference_to, float base_2) {
    const float sum = policy.mass.sum, shift = policy.raise(to, base_2);
    apart = product(power_of_2(shift), apart + (shift - reference.raise(reference_to, base_2)) * sum);
  }

  template <class T, int kBatch>
  __device__ __forceinline__ void add(const Vector<T> (&x)[kBatch], const Vector<T> (&y)[kBatch], float base_2) {
    raise(Policy::largest_of(x, policy.mass.largest), Policy::largest_of(y, reference.largest), base_2);
    const float origin = policy.mass.origin(), reference_origin = reference.origin();
    const Pair none = {{{policy.mass.largest, 0}, 0}, {reference.largest, 0}, 0};
    Pair batch = none;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      Pair few = none;
#pragma unroll
      for (int e = 0; e < Vector<T>::kWidth; ++e) {
        const float d = (x[u][e] - origin) * base_2, reference_d = (y[u][e] - reference_origin) * base_2;
        few.reference.sum += power_of_2(reference_d);
        few.apart += product(few.policy.weigh(d), d - reference_d);
      }
      batch.join(few);
    }
    join(batch);
  }

  __device__ __forceinline__ void join(const Pair& other) {
    policy.join(other.policy);
    reference.sum += other.reference.sum;
    apart += other.apart;
  }

  __device__ __forceinline__ void merge(Pair other, float base_2) {
    const float to = fmaxf(policy.mass.largest, other.policy.mass.largest);
    const float reference_to = fmaxf(reference.largest, other.reference.largest);
    raise(to, reference_to, base_2);
    other.raise(to, reference_to, base_2);
    join(other);
  }

  // Writes D, m', S'.
  __device__ void write(float* out, int64_t rows, Scale scale) const {
    out[0] = kLn2 * apart;
    out[rows] = reference.largest * scale.inverse;
    out[2 * rows] = reference.sum;
  }
};

// The column of a row's target, or -1 where it is ignored or another slice's.
__device__ __forceinline__ int64_t target_column(int64_t target, const Slice& slice) {
  const int64_t column = target - slice.vocab_start;
  return target >= 0 && column >= 0 && column < slice.columns ? column : -1;
}

// True where there is nothing to read; then the row's [kNumbers, N] of `out` are written already: those of one word
// of logit 0 where the row is ignored, those of no word where the slice has none.
template <int kNumbers>
__device__ __forceinline__ bool without_words(int64_t target, const Slice& slice, float* out) {
  if (target >= 0 && slice.columns > 0) return false;
  if (threadIdx.x == 0) {
    for (int k = 0; k < kNumbers; ++k) {
      const bool largest = k == 0 || k == 5, sum = k == 1 || k == 6;
      out[k * slice.rows] = slice.columns > 0 ? (sum ? 1.0f : 0.0f) : (largest ? -INFINITY : 0.0f);
    }
  }
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    stats(const T* __restrict__ logits, const int64_t* __restrict__ targets, Slice slice, Scale scale,
          float* __restrict__ out) {
  const int64_t row = blockIdx.x, target = targets[row];
  out += row;
  if (without_words<4>(target, slice, out)) return;
  const T* x = logits + row * slice.stride;
  const Cut<T> cut(x, slice.columns);
  Policy sums = Policy::empty();
  Vector<T> words[kStatsBatch];
  for (int first = threadIdx.x; first < cut.vectors; first += kStatsBatch * blockDim.x) {
    fetch(x, cut, true, first, words);
    sums.add(words, scale.base_2);
  }
  cut.singles([&](int column) {
    const Vector<T> word[1] = {alone<T>(to_float(x[column]))};
    sums.add(word, scale.base_2);
  });
  sums = block_reduce(sums, [&](Policy& into, const Policy& other) { into.merge(other, scale.base_2); });
  if (threadIdx.x > 0) return;
  sums.write(out, slice.rows, scale);
  const int64_t column = target_column(target, slice);
  out[3 * slice.rows] = column < 0 ? 0 : to_float(x[column]) * scale.inverse;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    kl_stats(const T* __restrict__ logits, const T* __restrict__ reference, const int64_t* __restrict__ targets,
             Slice slice, int64_t reference_stride, Scale scale, float* __restrict__ out) {
  const int64_t row = blockIdx.x, target = targets[row];
  out += row;
  if (without_words<8>(target, slice, out)) return;
  const T *x = logits + row * slice.stride, *y = reference + row * reference_stride;
  const Cut<T> cut(x, slice.columns);
  const bool whole = aligned(y + cut.head);
  Pair sums = Pair::empty();
  Vector<T> words[kKlStatsBatch], others[kKlStatsBatch];
  for (int first = threadIdx.x; first < cut.vectors; first += kKlStatsBatch * blockDim.x) {
    fetch(x, cut, true, first, words);
    fetch(y, cut, whole, first, others);
    sums.add(words, others, scale.base_2);
  }
  cut.singles([&](int column) {
    const Vector<T> word[1] = {alone<T>(to_float(x[column]))}, other[1] = {alone<T>(to_float(y[column]))};
    sums.add(word, other, scale.base_2);
  });
  sums = block_reduce(sums, [&](Pair& into, const Pair& other) { into.merge(other, scale.base_2); });
  if (threadIdx.x > 0) return;
  sums.policy.write(out, slice.rows, scale);
  sums.write(out + 4 * slice.rows, slice.rows, scale);
  const int64_t column = target_column(target, slice);
  out[3 * slice.rows] = column < 0 ? 0 : to_float(x[column]) * scale.inverse;
  out[7 * slice.rows] = column < 0 ? 0 : to_float(y[column]) * scale.inverse;
}

// Numbers a row: m, S, Z / S and m', D / S of the whole vocabulary, and a gradient each. Null is 0.
struct Numbers {
  const float *sums_3N, *reference_sums_2N, *grad, *entropy_grad, *kl_grad;
};

// The gradient of one row's words.
struct Gradient {
  Scale scale;
  float m, per_s, mean, reference_m, mean_apart, grad, entropy_grad, kl_grad;

  __device__ Gradient(Scale scale, const Numbers& of, int64_t row, int64_t rows)
      : scale(scale),
        m(of.sums_3N[row]),
        per_s(1 / of.sums_3N[rows + row]),
        mean(of.sums_3N[2 * rows + row]),
        reference_m(at(of.reference_sums_2N, row)),
        mean_apart(at(of.reference_sums_2N, rows + row)),
        grad(at(of.grad, row)),
        entropy_grad(at(of.entropy_grad, row)),
        kl_grad(at(of.kl_grad, row)) {}

  __device__ static float at(const float* numbers, int64_t row) { return numbers == nullptr ? 0 : numbers[row]; }

  // Of a word that is not the target; with kPair `reference` is its logit under the reference.
  template <bool kPair>
  __device__ __forceinline__ float operator()(float logit, float reference) const {
    // x is rounded before m is taken away, as m was: at the largest word their difference is 0
    const float d = __fmul_rn(logit, scale.inverse) - m, p = power_of_2(d * kLog2E) * per_s;
    float slope = fmaf(entropy_grad, d - mean, grad);
    if (kPair) {
      const float reference_d = __fmul_rn(reference, scale.inverse) - reference_m;
      slope -= kl_grad * (d - reference_d - mean_apart);
    }
    return p == 0 ? 0 : -scale.inverse * p * slope;  // an absent word's slope may be infinite
  }

  __device__ __forceinline__ float of_target() const { return scale.inverse * grad; }
};

// `out` may be `logits`: each thread reads what it overwrites, and nobody else does.
template <class T, bool kPair>
__global__ void __launch_bounds__(kThreads)
    backward(const T* logits, const T* __restrict__ reference, const int64_t* __restrict__ targets, Slice slice,
             int64_t reference_stride, Scale scale, Numbers numbers, T* out, int64_t out_stride) {
  constexpr int kWidth = Vector<T>::kWidth, kBatch = kPair ? kBackwardBatch / 2 : kBackwardBatch;
  const int64_t row = blockIdx.x;
  out += row * out_stride;
  if (targets[row] < 0) return clear(out, slice.width);
  clear(out + slice.columns, slice.width - slice.columns);
  const T *x = logits + row * slice.stride, *y = kPair ? reference + row * reference_stride : nullptr;
  const Cut<T> cut(x, slice.columns);
  const bool whole = kPair && aligned(y + cut.head), whole_out = aligned(out + cut.head);
  const int target = static_cast<int>(target_column(targets[row], slice));
  const Gradient gradient(scale, numbers, row, slice.rows);
  const auto of_word = [&](float logit, float other, int column) {
    const float result = gradient.operator()<kPair>(logit, other);
    return column == target ? result + gradient.of_target() : result;
  };
  Vector<T> words[kBatch], others[kPair ? kBatch : 1];
  for (int first = threadIdx.x; first < cut.vectors; first += kBatch * blockDim.x) {
    fetch(x, cut, true, first, words);
    if constexpr (kPair) fetch(y, cut, whole, first, others);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = first + u * static_cast<int>(blockDim.x), column = cut.column(i);
      if (i >= cut.vectors) break;
      Vector<T> result;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        round_to(of_word(words[u][e], kPair ? others[kPair ? u : 0][e] : 0, column + e), result.element[e]);
      }
      if (whole_out) {
        store(out + column, result);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) out[column + e] = result.element[e];
      }
    }
  }
  cut.singles([&](int column) {
    round_to(of_word(to_float(x[column]), kPair ? to_float(y[column]) : 0, column), out[column]);
  });
}

}  // namespace mrlhf::device
