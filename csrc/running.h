// Sums over a row, taken a tile at a time: a tile fits the first cache, so its words are read from memory once although
// their maximum is wanted before the first exponential. Included as simd.h is.
#pragma once

#include <algorithm>

#include "simd.h"

namespace mrlhf::cpu::MRLHF_ISA {
namespace {

constexpr int64_t kTile = 2048;

/// Words summed in a lane before they are widened: longer chains of float additions would show in the last digits of S.
template <class E>
constexpr int64_t kChain = 4 * E::lanes;

/// x = logits / T of up to kTile words, filled up with -inf to whole vectors; returns the largest that is not NaN.
template <class E, bool kScaled>
inline typename E::Real fill(const typename E::Stored* from, int64_t count, typename E::Real temperature,
                             typename E::Real* x) {
  using Vector = typename E::Vector;
  constexpr typename E::Real infinity = std::numeric_limits<typename E::Real>::infinity();
  Vector best = Vector{} - infinity;
  int64_t i = 0;
  for (; i + E::lanes <= count; i += E::lanes) {
    Vector v = E::load(from + i);
    if (kScaled) v = v / temperature;
    best = v > best ? v : best;
    stored(x + i, v);
  }
  if (i < count) {
    Vector v = load_some<E>(from + i, count - i);
    if (kScaled) v = v / temperature;
    stored(x + i, v);
    for (int64_t word = count; word < i + E::lanes; ++word) x[word] = -infinity;
    v = loaded<Vector>(x + i);
    best = v > best ? v : best;
  }
  return largest(best);
}

/// m, S, Z of the words seen so far.
template <class E>
struct Running {
  using Real = typename E::Real;
  using Vector = typename E::Vector;

  Real m = -std::numeric_limits<Real>::infinity();
  double S = 0, Z = 0;

  /// What is subtracted from a word: m, and 0 while nothing but -inf was seen, since -inf less -inf is NaN.
  Real base() const { return std::isinf(m) && m < 0 ? Real(0) : m; }

  /// Makes m at least `found`; returns old m - new m.
  double grow(Real found) {
    if (!(found > m)) return 0;
    const double by = double(m) - double(found), shrink = std::exp(by);
    m = found;
    const double seen = S;
    S *= shrink;
    Z = shrink > 0 ? shrink * (Z + by * seen) : S;  // 0, or NaN where S is
    return by;
  }

  void add(const Real* x, int64_t count) {
    const Real from = base();
    typename E::Wide all_s{}, all_z{};
    for (int64_t start = 0; start < count; start += kChain<E>) {
      Vector s{}, z{};
      for (int64_t i = start; i < std::min(count, start + kChain<E>); i += E::lanes) {
        const Vector d = loaded<Vector>(x + i) - from, w = exponential(d);
        s += w;
        z += w == 0 ? Vector{} : w * d;
      }
      add_wide(all_s, s);
      add_wide(all_z, z);
    }
    S += sum(all_s);
    Z += sum(all_z);
  }
};

}  // namespace
}  // namespace mrlhf::cpu::MRLHF_ISA
