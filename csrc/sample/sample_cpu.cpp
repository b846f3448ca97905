// A draw by perturbed maxima on a CPU; compiled once for each instruction set (simd.h).
#include "../rows.h"
#include "../running.h"

namespace mrlhf::cpu::MRLHF_ISA {
namespace {

constexpr uint32_t kFirst = 0x7feb352d, kSecond = 0x846ca68b, kColumns = 0x2b7e1516;

/// A bijection of 32-bit numbers, as `_mix` of parallel/random.py.
inline Bits mix(Bits b) {
  b = (b ^ (b >> 16)) * kFirst;
  b = (b ^ (b >> 15)) * kSecond;
  return b ^ (b >> 16);
}

/// -ln(-ln(1 - v)) of the hashed words, as `_hash` and `_to_gumbel` of parallel/random.py.
inline Floats gumbel(Bits words, uint32_t key, uint32_t second_key) {
  Bits b = mix(words ^ kColumns) ^ key;
  b = ((b ^ (b >> 16)) * kFirst) ^ second_key;
  b = (b ^ (b >> 15)) * kSecond;
  b = b ^ (b >> 16);
  Floats v = (__builtin_convertvector(b, Floats) + 0.5f) * 2.3283064365386963e-10f;
  v = v > 0.99999994f ? all(0.99999994f) : v;
  // ln(1 - v) without losing a small v: 1 - v is rounded to u, and ln u corrected by v / (1 - u)
  const Floats u = 1.0f - v;
  const Floats exponent = u == 1.0f ? v : logarithm(u) * v / (u - 1.0f);
  return -logarithm(exponent);
}

/// The largest value of each lane and its column; a later one wins only when it is larger.
struct Best {
  Floats value = all(-kInfinity);
  Bits column{};

  void add(const float* x, int64_t count, int64_t start, int64_t vocab_start, const uint32_t* keys) {
    Bits lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Bits here = lane + uint32_t(start + i);
      Floats v = loaded<Floats>(x + i);
      if (keys != nullptr) v += gumbel(here + uint32_t(vocab_start), keys[0], keys[1]);
      column = v > value ? here : column;
      value = v > value ? v : value;
    }
  }

  int winner() const {
    int best = 0;
    for (int i = 1; i < kLanes; ++i) {
      if (value[i] > value[best] || (value[i] == value[best] && column[i] < column[best])) best = i;
    }
    return best;
  }
};

template <class E, bool kScaled>
void sample_row(const SampleJob& job, int64_t row) {
  const Slice& slice = job.slice;
  const auto* logits = static_cast<const typename E::Stored*>(job.logits) + row * slice.stride;
  const float temperature = float(slice.temperature);
  const bool noisy = job.keys != nullptr;
  const uint32_t keys[2] = {noisy ? job.keys[row] : 0, noisy ? job.keys[slice.rows + row] : 0};
  alignas(64) float x[kTile];
  Running<E> sums;
  Best best;
  for (int64_t start = 0; start < slice.columns; start += kTile) {
    const int64_t count = std::min(kTile, slice.columns - start);
    sums.grow(fill<E, kScaled>(logits + start, count, temperature, x));
    sums.add(x, count);
    best.add(x, count, start, slice.vocab_start, noisy ? keys : nullptr);
  }
  float found[5] = {-kInfinity, 0, sums.m, float(sums.S), 0};
  if (slice.columns > 0) {
    const int lane = best.winner();
    found[0] = best.value[lane];
    found[1] = float(slice.vocab_start + best.column[lane]);
    found[4] = load_some<E>(logits + best.column[lane], 1)[0] / temperature;
  }
  for (int k = 0; k < 5; ++k) job.out[k * slice.rows + row] = found[k];
}

template <class E>
void rows(const SampleJob& job, int64_t begin, int64_t end) {
  const auto row = job.slice.temperature == 1 ? sample_row<E, false> : sample_row<E, true>;
  for (int64_t i = begin; i < end; ++i) row(job, i);
}

}  // namespace

void sample_rows(const SampleJob& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case DType::f32: return rows<F32>(job, begin, end);
    case DType::bf16: return rows<Bf16>(job, begin, end);
    case DType::f16: return rows<F16>(job, begin, end);
    case DType::f64: return;
  }
}

}  // namespace mrlhf::cpu::MRLHF_ISA
