// Statistics of rows and their gradient on a CPU; compiled once for each instruction set (simd.h).
#include "../rows.h"
#include "../running.h"

namespace mrlhf::cpu::MRLHF_ISA {
namespace {

/// The target's column in this slice, -1 where another slice holds it or the row is ignored.
inline int64_t local(int64_t target, const Slice& slice) {
  const int64_t column = target - slice.vocab_start;
  return target >= 0 && column >= 0 && column < slice.columns ? column : -1;
}

template <class E>
inline typename E::Real at(const typename E::Stored* row, int64_t column, typename E::Real temperature) {
  typename E::Real x[E::lanes];
  stored(x, load_some<E>(row + column, 1));
  return x[0] / temperature;
}

/// Policy and reference at once: D needs both words under one weight.
template <class E>
struct RunningPair {
  using Real = typename E::Real;
  using Vector = typename E::Vector;

  Running<E> p, q;
  double D = 0;

  void grow(Real found, Real reference_found) {
    const double S = p.S, by = p.grow(found), q_by = q.grow(reference_found), shrink = std::exp(by);
    D = S == 0 || shrink == 0 ? p.S : shrink * (D + (by - q_by) * S);  // p.S is 0 then, or NaN
  }

  void add(const Real* x, const Real* y, int64_t count) {
    const Real x_from = p.base(), y_from = q.base();
    typename E::Wide all_s{}, all_z{}, all_d{}, all_q{};
    for (int64_t start = 0; start < count; start += kChain<E>) {
      Vector s{}, z{}, d{}, q_s{};
      for (int64_t i = start; i < std::min(count, start + kChain<E>); i += E::lanes) {
        const Vector dx = loaded<Vector>(x + i) - x_from, dy = loaded<Vector>(y + i) - y_from, w = exponential(dx);
        s += w;
        z += w == 0 ? Vector{} : w * dx;
        d += w == 0 ? Vector{} : w * (dx - dy);
        q_s += exponential(dy);
      }
      add_wide(all_s, s);
      add_wide(all_z, z);
      add_wide(all_d, d);
      add_wide(all_q, q_s);
    }
    p.S += sum(all_s);
    p.Z += sum(all_z);
    D += sum(all_d);
    q.S += sum(all_q);
  }
};

template <class E, bool kScaled>
void stats_row(const StatsJob& job, int64_t row) {
  using Real = typename E::Real;
  const Slice& slice = job.slice;
  const Real temperature = Real(slice.temperature);
  const auto* logits = static_cast<const typename E::Stored*>(job.logits) + row * slice.stride;
  const auto* reference = static_cast<const typename E::Stored*>(job.reference) + row * job.reference_stride;
  alignas(64) Real x[kTile], y[kTile];
  RunningPair<E> sums;
  Real t = 0, reference_t = 0;
  if (job.targets[row] < 0 && slice.columns > 0) {
    sums.p.m = sums.q.m = 0;
    sums.p.S = sums.q.S = 1;
  } else {
    for (int64_t start = 0; start < slice.columns; start += kTile) {
      const int64_t count = std::min(kTile, slice.columns - start);
      const Real found = fill<E, kScaled>(logits + start, count, temperature, x);
      if (job.reference == nullptr) {
        sums.p.grow(found);
        sums.p.add(x, count);
      } else {
        sums.grow(found, fill<E, kScaled>(reference + start, count, temperature, y));
        sums.add(x, y, count);
      }
    }
    const int64_t column = local(job.targets[row], slice);
    if (column >= 0) {
      t = at<E>(logits, column, temperature);
      if (job.reference != nullptr) reference_t = at<E>(reference, column, temperature);
    }
  }
  const Real all[] = {sums.p.m,     Real(sums.p.S), Real(sums.p.Z), t,
                      Real(sums.D), sums.q.m,       Real(sums.q.S), reference_t};
  auto* out = static_cast<Real*>(job.out);
  for (int k = 0; k < (job.reference == nullptr ? 4 : 8); ++k) out[k * slice.rows + row] = all[k];
}

template <class E, bool kScaled, bool kEntropy, bool kKl>
void backward_row(const BackwardJob& job, int64_t row) {
  using Real = typename E::Real;
  using Stored = typename E::Stored;
  using Vector = typename E::Vector;
  const Slice& slice = job.slice;
  const int64_t columns = std::max<int64_t>(slice.columns, 0);
  const auto* logits = static_cast<const Stored*>(job.logits) + row * slice.stride;
  const auto* reference = static_cast<const Stored*>(job.reference) + row * job.reference_stride;
  auto* out = static_cast<Stored*>(job.out) + row * job.out_stride;
  if (job.targets[row] < 0) {
    std::memset(out, 0, slice.width * sizeof(Stored));
    return;
  }
  const auto number = [&](const void* numbers, int64_t k) {
    return numbers == nullptr ? Real(0) : static_cast<const Real*>(numbers)[k * slice.rows + row];
  };
  const Real temperature = Real(slice.temperature);
  const Real g = Real(number(job.grad, 0) / slice.temperature);
  const Real h = Real(number(job.entropy_grad, 0) / slice.temperature);
  const Real k = Real(number(job.kl_grad, 0) / slice.temperature);
  const Real m = number(job.sums, 0), per_s = 1 / number(job.sums, 1), mean = number(job.sums, 2);
  const Real q_m = number(job.reference_sums, 0), mean_apart = number(job.reference_sums, 1);
  const auto slope = [&](Vector x, Vector y) {
    if (kScaled) x = x / temperature;
    const Vector d = x - m, p = exponential(d) * per_s;
    Vector s = Vector{} - g;
    if (kEntropy) s -= h * (d - mean);
    if (kKl) {
      if (kScaled) y = y / temperature;
      s += k * ((d - (y - q_m)) - mean_apart);
    }
    return p == 0 ? Vector{} : p * s;
  };
  // read before the row is overwritten
  const int64_t column = local(job.targets[row], slice);
  Real at_target[E::lanes] = {};
  if (column >= 0) {
    const Vector y = kKl ? load_some<E>(reference + column, 1) : Vector{};
    stored(at_target, slope(load_some<E>(logits + column, 1), y));
    at_target[0] += g;
  }
  int64_t i = 0;
  for (; i + E::lanes <= columns; i += E::lanes) {
    E::store(out + i, slope(E::load(logits + i), kKl ? E::load(reference + i) : Vector{}));
  }
  if (i < columns) {
    const Vector y = kKl ? load_some<E>(reference + i, columns - i) : Vector{};
    store_some<E>(out + i, slope(load_some<E>(logits + i, columns - i), y), columns - i);
  }
  if (column >= 0) store_some<E>(out + column, loaded<Vector>(at_target), 1);
  std::memset(out + columns, 0, (slice.width - columns) * sizeof(Stored));
}

template <class Job>
using RowOf = void (*)(const Job&, int64_t);

template <class E, bool kScaled>
RowOf<BackwardJob> backward_of(const BackwardJob& job) {
  if (job.kl_grad != nullptr) {
    return job.entropy_grad != nullptr ? backward_row<E, kScaled, true, true> : backward_row<E, kScaled, false, true>;
  }
  return job.entropy_grad != nullptr ? backward_row<E, kScaled, true, false> : backward_row<E, kScaled, false, false>;
}

template <class E>
RowOf<BackwardJob> of(const BackwardJob& job) {
  return job.slice.temperature == 1 ? backward_of<E, false>(job) : backward_of<E, true>(job);
}

template <class E>
RowOf<StatsJob> of(const StatsJob& job) {
  return job.slice.temperature == 1 ? stats_row<E, false> : stats_row<E, true>;
}

template <class Job>
void rows(const Job& job, int64_t begin, int64_t end) {
  RowOf<Job> row = nullptr;
  switch (job.dtype) {
    case DType::f32: row = of<F32>(job); break;
    case DType::bf16: row = of<Bf16>(job); break;
    case DType::f16: row = of<F16>(job); break;
    case DType::f64: row = of<F64>(job); break;
  }
  for (int64_t i = begin; i < end; ++i) row(job, i);
}

}  // namespace

void stats_rows(const StatsJob& job, int64_t begin, int64_t end) { rows(job, begin, end); }

void backward_rows(const BackwardJob& job, int64_t begin, int64_t end) { rows(job, begin, end); }

}  // namespace mrlhf::cpu::MRLHF_ISA
