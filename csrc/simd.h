// Vectors of one instruction set, and the few functions on them that no compiler vectorises by itself.
//
// A file that includes this is compiled once for each instruction set, with MRLHF_ISA its name and the compiler's flags
// for it. Everything here is in an unnamed namespace: code compiled for a newer set must never be linked into an older.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifndef MRLHF_ISA
#define MRLHF_ISA generic
#endif

namespace mrlhf::cpu::MRLHF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class V, class S>
inline V loaded(const S* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class V, class S>
inline void stored(S* to, V vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Bits bits(Floats x) { return reinterpret_cast<Bits>(x); }
inline Floats floats(Bits x) { return reinterpret_cast<Floats>(x); }
inline Floats all(float x) { return Floats{} + x; }

/// e^x within 1 ulp for x <= 88; 0 below -87.3, where it would not be a normal number; NaN of NaN.
inline Floats exponential(Floats x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first times n exact
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = floats((bits(shifted) + 127) << 23);
  return x < -87.3f ? Floats{} : p * power;
}

/// ln x within 1 ulp for normal x > 0.
inline Floats logarithm(Floats x) {
  const Bits exponent = (bits(x) - 0x3f3504f3) & 0xff800000;  // x / 2^e is in [sqrt 1/2, sqrt 2)
  const Floats e = __builtin_convertvector(reinterpret_cast<Integers>(exponent) >> 23, Floats);
  const Floats f = floats(bits(x) - exponent) - 1.0f;
  Floats p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Floats square = f * f;
  return (((p * f) * square + e * -2.12194440e-4f) - square * 0.5f + f) + e * 0.693359375f;
}

// Stored types: how a vector of them becomes one to compute with, and back, rounded to the nearest, ties to even; Wide
// holds long sums.

struct F32 {
  using Stored = float;
  using Real = float;
  using Vector = Floats;
  using Wide = Doubles;
  static constexpr int lanes = kLanes;
  static Vector load(const Stored* from) { return loaded<Floats>(from); }
  static void store(Stored* to, Vector x) { stored(to, x); }
};

struct Bf16 {
  using Stored = uint16_t;
  using Real = float;
  using Vector = Floats;
  using Wide = Doubles;
  static constexpr int lanes = kLanes;
  static Vector load(const Stored* from) { return floats(__builtin_convertvector(loaded<Halves>(from), Bits) << 16); }
  static void store(Stored* to, Vector x) {
    const Bits b = bits(x);
    const Bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    stored(to, __builtin_convertvector(x != x ? (Bits{} + 0x7fc0) : rounded, Halves));
  }
};

struct F16 {
  using Stored = uint16_t;
  using Real = float;
  using Vector = Floats;
  using Wide = Doubles;
  static constexpr int lanes = kLanes;
  static Vector load(const Stored* from) {
    const Bits h = __builtin_convertvector(loaded<Halves>(from), Bits);
    const Bits magnitude = (h & 0x7fff) << 13;
    const Bits finite = bits(floats(magnitude) * 5.192296858534828e33f);  // 2^112: the exponents' biases differ by it
    return floats((magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : finite) | ((h & 0x8000) << 16));
  }
  static void store(Stored* to, Vector x) {
    const Bits sign = (bits(x) >> 16) & 0x8000, b = bits(x) & 0x7fffffff;
    const Bits normal = (b - (112u << 23) + 0xfff + ((b >> 13) & 1)) >> 13;
    const Bits tiny = bits(floats(b) + 0.5f) - bits(all(0.5f));  // the addition rounds to multiples of 2^-24
    Bits h = b < (113u << 23) ? tiny : normal;
    h = b >= 0x477ff000 ? (Bits{} + 0x7c00) : h;
    h = b > 0x7f800000 ? (Bits{} + 0x7e00) : h;
    stored(to, __builtin_convertvector(h | sign, Halves));
  }
};

struct F64 {
  using Stored = double;
  using Real = double;
  using Vector = double;
  using Wide = double;
  static constexpr int lanes = 1;
  static Vector load(const Stored* from) { return *from; }
  static void store(Stored* to, Vector x) { *to = x; }
};

inline double exponential(double x) { return std::exp(x); }

inline double sum(double x) { return x; }

inline double sum(const Doubles& x) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

inline void add_wide(double& to, double x) { to += x; }
inline void add_wide(Doubles& to, Floats x) { to += __builtin_convertvector(x, Doubles); }

inline double largest(double x) { return x; }

inline float largest(Floats x) {
  float found = x[0];
  for (int lane = 1; lane < kLanes; ++lane) found = x[lane] > found ? x[lane] : found;
  return found;
}

/// The first `count` words as a vector, zeros behind them.
template <class E>
inline typename E::Vector load_some(const typename E::Stored* from, int64_t count) {
  typename E::Stored whole[E::lanes] = {};
  std::memcpy(whole, from, count * sizeof whole[0]);
  return E::load(whole);
}

template <class E>
inline void store_some(typename E::Stored* to, typename E::Vector x, int64_t count) {
  typename E::Stored whole[E::lanes];
  E::store(whole, x);
  std::memcpy(to, whole, count * sizeof whole[0]);
}

}  // namespace
}  // namespace mrlhf::cpu::MRLHF_ISA
