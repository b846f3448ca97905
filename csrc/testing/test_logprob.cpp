// Statistics and gradients of the CUDA source, run on the CPU, against loops in double. Arguments: the widths to test.
#include "check.h"

namespace {

using check::near;
using check::Rows;

// A row of the whole numbers that stats should find, in double.
struct Exact {
  double m = -INFINITY, S = 0, Z = 0, t = 0, D = 0, reference_m = -INFINITY, reference_S = 0, reference_t = 0;
};

template <class T>
Exact exact(Rows<T>& logits, Rows<T>& reference, int64_t row, int64_t target, const mrlhf::Slice& slice) {
  Exact e;
  for (int64_t v = 0; v < slice.columns; ++v) {
    e.m = std::fmax(e.m, logits.at(row, v) / slice.temperature);
    e.reference_m = std::fmax(e.reference_m, reference.at(row, v) / slice.temperature);
  }
  for (int64_t v = 0; v < slice.columns; ++v) {
    const double d = logits.at(row, v) / slice.temperature - e.m, weight = std::exp(d);
    const double reference_d = reference.at(row, v) / slice.temperature - e.reference_m;
    e.reference_S += std::exp(reference_d);
    if (!(weight > 0)) continue;
    e.S += weight;
    e.Z += weight * d;
    e.D += weight * (d - reference_d);
  }
  const int64_t column = target - slice.vocab_start;
  if (column >= 0 && column < slice.columns) {
    e.t = logits.at(row, column) / slice.temperature;
    e.reference_t = reference.at(row, column) / slice.temperature;
  }
  return e;
}

// What a case is made of; places are in elements behind a 16-byte boundary.
struct Case {
  int64_t rows, columns, padding, gap, place, reference_place, out_place;
  double temperature;
};

// Rows of a case: ordinary, ignored (NaN, for it is not read), with absent words and another slice's target, far from
// 0, and without any word that is not absent.
template <class T>
struct Batch {
  mrlhf::Slice slice;
  Rows<T> logits, reference;
  std::vector<int64_t> targets;

  explicit Batch(const Case& of)
      : slice{of.rows,           of.columns + of.padding + of.gap, of.columns, of.columns + of.padding, 1000,
              of.temperature},
        logits(of.rows, of.columns + of.padding, slice.stride, of.place),
        reference(of.rows, of.columns + of.padding, slice.stride + 3, of.reference_place) {
    check::Random random{static_cast<uint64_t>(of.columns * 7 + of.place)};
    for (int64_t row = 0; row < of.rows; ++row) {
      const int64_t kind = row % 5, inside = static_cast<int64_t>(random.bits() % of.columns);
      targets.push_back(kind == 1 ? -100 : slice.vocab_start + (kind == 2 ? of.columns : inside));
      if (kind == 1) continue;
      for (int64_t v = 0; v < of.columns; ++v) {
        const bool absent = kind == 4 || (kind == 2 && v != of.columns / 2 && random.bits() % 3 == 0);
        logits.set(row, v, absent ? -INFINITY : 3 * random.normal() + (kind == 3 ? 2000 : 0));
        reference.set(row, v, 3 * random.normal() - (kind == 3 ? 700 : 0));
      }
    }
  }
};

template <class T>
void stats(Batch<T>& batch) {
  const int64_t rows = batch.slice.rows;
  for (const bool pair : {false, true}) {
    std::vector<float> out(rows * (pair ? 8 : 4), NAN);
    if (pair) {
      mrlhf::cuda::logprob_kl_stats(check::dtype_of<T>(), batch.logits.data(), batch.reference.data(),
                                    batch.targets.data(), batch.slice, batch.reference.stride, out.data(), nullptr);
    } else {
      mrlhf::cuda::logprob_stats(check::dtype_of<T>(), batch.logits.data(), batch.targets.data(), batch.slice,
                                 out.data(), nullptr);
    }
    for (int64_t row = 0; row < rows; ++row) {
      Exact e = exact(batch.logits, batch.reference, row, batch.targets[row], batch.slice);
      if (batch.targets[row] < 0) e = {0, 1, 0, 0, 0, 0, 1, 0};
      const double wanted[] = {e.m, e.S, e.Z, e.t, e.D, e.reference_m, e.reference_S, e.reference_t};
      const char* names[] = {"m", "S", "Z", "t", "D", "m'", "S'", "t'"};
      // of Z and D, by the largest of what they sum
      const double sums = 2e-6 * e.S * 40;
      const double errors[] = {std::fabs(e.m), e.S, sums, std::fabs(e.t), sums, std::fabs(e.reference_m),
                               e.reference_S,  std::fabs(e.reference_t)};
      for (int k = 0; k < (pair ? 8 : 4); ++k) {
        near(out[k * rows + row], wanted[k], k == 2 || k == 4 ? sums : 2e-6 * errors[k], names[k], row);
      }
    }
  }
}

// The numbers a row of the whole vocabulary, of which this slice holds two thirds of the mass.
struct Whole {
  std::vector<float> sums, reference_sums, grad, entropy_grad, kl_grad;

  template <class T>
  explicit Whole(Batch<T>& batch) {
    const int64_t rows = batch.slice.rows;
    sums.resize(3 * rows), reference_sums.resize(2 * rows);
    check::Random random{5};
    for (int64_t row = 0; row < rows; ++row) {
      const bool ignored = batch.targets[row] < 0;
      const Exact e = exact(batch.logits, batch.reference, row, batch.targets[row], batch.slice);
      // a slice of absent words stands beside one that has some
      sums[row] = static_cast<float>(ignored ? NAN : std::isinf(e.m) ? 1 : e.m);
      sums[rows + row] = static_cast<float>(1.5 * e.S + std::isinf(e.m));
      sums[2 * rows + row] = static_cast<float>(random.uniform() * -3);
      reference_sums[row] = static_cast<float>(ignored ? NAN : e.reference_m);
      reference_sums[rows + row] = static_cast<float>(random.uniform());
      grad.push_back(static_cast<float>(random.normal()));
      entropy_grad.push_back(static_cast<float>(random.normal()));
      kl_grad.push_back(static_cast<float>(random.normal()));
    }
  }
};

// Expects the gradient's row; the error is by the size of what is added up, and one rounding to T.
template <class T>
void expect_gradient(Batch<T>& batch, Rows<T>& out, const Whole& whole, int64_t row, double g,
                     double h, double k) {
  const mrlhf::Slice& slice = batch.slice;
  for (int64_t v = 0; v < slice.width; ++v) {
    double wanted = 0, size = 0;
    if (batch.targets[row] >= 0 && v < slice.columns) {
      const double d = batch.logits.at(row, v) / slice.temperature - whole.sums[row];
      const double p = std::exp(d) / whole.sums[slice.rows + row], mean = whole.sums[2 * slice.rows + row];
      const double reference_d = batch.reference.at(row, v) / slice.temperature - whole.reference_sums[row];
      const double apart = whole.reference_sums[slice.rows + row], target = slice.vocab_start + v == batch.targets[row];
      if (p > 0) {
        wanted = -p * (g + h * (d - mean) - k * (d - reference_d - apart));
        size = p * (std::fabs(g) + std::fabs(h) * (std::fabs(d) + std::fabs(mean)));
        size += p * std::fabs(k) * (std::fabs(d) + std::fabs(reference_d) + std::fabs(apart));
        // x and y themselves are rounded
        const double rounded = 0x1p-23 * (std::fabs(whole.sums[row]) + std::fabs(whole.reference_sums[row]));
        size += rounded / 1e-5 * (size + p * (std::fabs(h) + std::fabs(k)));
      }
      wanted = (wanted + target * g) / slice.temperature;
      size = (size + target * std::fabs(g)) / slice.temperature;
    }
    const double smallest = std::is_same_v<T, __half> ? 0x1p-24 : 0x1p-126;
    near(out.at(row, v), wanted, check::rounding<T>() * std::fabs(wanted) + 1e-5 * size + smallest, "gradient", row, v);
  }
}

template <class T>
void backward(Batch<T>& batch, int64_t out_place) {
  const mrlhf::Slice& slice = batch.slice;
  const Whole whole(batch);
  struct {
    bool g, h, k;
  } const asked[] = {{true, false, false}, {false, true, false}, {true, true, true}};
  for (const auto& of : asked) {
    for (const bool inplace : {false, true}) {
      Rows<T> work(slice.rows, slice.width, slice.stride, inplace ? out_place : 0);
      for (int64_t row = 0; row < slice.rows; ++row) {
        for (int64_t v = 0; v < slice.columns; ++v) work.set(row, v, batch.logits.at(row, v));
      }
      Rows<T> elsewhere(slice.rows, slice.width, slice.stride + 5, out_place);
      Rows<T>& out = inplace ? work : elsewhere;
      mrlhf::cuda::logprob_backward(check::dtype_of<T>(), inplace ? work.data() : batch.logits.data(),
                                    of.k ? batch.reference.data() : nullptr, batch.targets.data(), slice,
                                    batch.reference.stride, whole.sums.data(),
                                    of.k ? whole.reference_sums.data() : nullptr,
                                    of.g ? whole.grad.data() : nullptr, of.h ? whole.entropy_grad.data() : nullptr,
                                    of.k ? whole.kl_grad.data() : nullptr, out.data(), out.stride, nullptr);
      for (int64_t row = 0; row < slice.rows; ++row) {
        expect_gradient(batch, out, whole, row, of.g ? whole.grad[row] : 0,
                        of.h ? whole.entropy_grad[row] : 0, of.k ? whole.kl_grad[row] : 0);
      }
      out.expect_untouched_gaps();
    }
  }
}

template <class T>
void run(int64_t columns, const char* name) {
  char text[200];
  const int64_t rows = columns > 5000 ? 2 : 6;
  const Case cases[] = {{rows, columns, 0, 0, 0, 0, 0, 1.0}, {rows, columns, 5, 2, 1, 2, 3, 0.7}};
  for (const Case& of : cases) {
    std::snprintf(text, sizeof(text), "%s, V = %lld + %lld, stride + %lld, T = %g, order %d", name,
                  static_cast<long long>(columns), static_cast<long long>(of.padding), static_cast<long long>(of.gap),
                  of.temperature, static_cast<int>(cuda_on_cpu::order));
    check::situation = text;
    Batch<T> batch(of);
    stats(batch);
    backward(batch, of.out_place);
  }
}

// A slice that lies wholly in the padding has no words; no row at all launches nothing.
void nothing() {
  check::situation = "no words";
  Rows<float> logits(2, 6, 6, 0), out(2, 6, 6, 1);
  const int64_t targets[] = {3, -1};
  const float numbers[] = {0, 0, 0, 0, 0, 0};
  float stats[16];
  for (const int64_t columns : {int64_t{0}, int64_t{-4}}) {
    const mrlhf::Slice slice{2, 6, columns, 6, 100, 1.0};
    mrlhf::cuda::logprob_kl_stats(mrlhf::DType::f32, logits.data(), logits.data(), targets, slice, 6, stats, nullptr);
    for (int k = 0; k < 16; ++k) near(stats[k], k / 2 == 0 || k / 2 == 5 ? -INFINITY : 0, 0, "a number", k % 2, k / 2);
    mrlhf::cuda::logprob_backward(mrlhf::DType::f32, logits.data(), nullptr, targets, slice, 0, numbers, nullptr,
                                  numbers, nullptr, nullptr, out.data(), out.stride, nullptr);
    for (int k = 0; k < 12; ++k) near(out.at(k / 6, k % 6), 0, 0, "gradient", k / 6, k % 6);
  }
  mrlhf::cuda::logprob_stats(mrlhf::DType::f32, nullptr, nullptr, {0, 6, 6, 6, 0, 1.0}, nullptr, nullptr);
}

// NaN among the words makes the sums NaN wherever it stands.
void not_a_number() {
  check::situation = "a NaN logit";
  for (int64_t place = 0; place < 70; place += 23) {
    Rows<__nv_bfloat16> logits(1, 70, 70, 3);
    for (int64_t v = 0; v < 70; ++v) logits.set(0, v, v == place ? NAN : 1);
    const int64_t target = 0;
    float out[4];
    mrlhf::cuda::logprob_stats(mrlhf::DType::bf16, logits.data(), &target, {1, 70, 70, 70, 0, 1.0}, out, nullptr);
    near(out[1], NAN, 0, "S", 0);
  }
}

// A row that begins more than 2^31 elements behind the first, of logits, reference and gradient. Row r has logit 1 at
// word 7 - r, and the reference at word 3 + r: wherever else a row is read, its sums differ.
void far() {
  check::situation = "offsets beyond 2^31";
  constexpr int64_t columns = 9;
  check::FarRows<__nv_bfloat16> logits(columns), reference(columns);
  if (!logits.there() || !reference.there()) return;
  for (int64_t row = 0; row < 2; ++row) logits.set(row, 7 - row, 1), reference.set(row, 3 + row, 1);
  const int64_t targets[] = {0, 1}, stride = logits.stride;
  const mrlhf::Slice slice{2, stride, columns, columns, 0, 1.0};
  const auto bf16 = mrlhf::DType::bf16;
  const double S = 1 + 8 * std::exp(-1.0), D = 1 - std::exp(-1.0), kl = D / S;
  const float s = static_cast<float>(S), mean_apart = static_cast<float>(kl), one[] = {1, 1};
  const float sums[] = {1, 1, s, s, 0, 0}, reference_sums[] = {1, 1, mean_apart, mean_apart};
  float out[8], both[16];
  mrlhf::cuda::logprob_stats(bf16, logits.data(), targets, slice, out, nullptr);
  mrlhf::cuda::logprob_kl_stats(bf16, logits.data(), reference.data(), targets, slice, stride, both, nullptr);
  mrlhf::cuda::logprob_backward(bf16, logits.data(), reference.data(), targets, slice, stride, sums,
                                reference_sums, one, nullptr, one, logits.data(), stride, nullptr);
  for (int64_t row = 0; row < 2; ++row) {
    near(out[2 + row], S, 1e-5, "S", row);
    near(both[2 + row], S, 1e-5, "S beside a reference", row);
    near(both[12 + row], S, 1e-5, "S of the reference", row);
    near(both[8 + row], D, 1e-5, "D", row);
    for (int64_t v = 0; v < columns; ++v) {
      const double x = v == 7 - row, y = v == 3 + row, p = std::exp(x - 1) / S;
      near(logits.at(row, v), (v == row) - p + p * (x - y - kl), 4e-3, "gradient", row, v);
    }
  }
}

}  // namespace

int main(int count, char** widths) {
  check::in_every_order([&] {
    for (int i = 1; i < count; ++i) {
      run<float>(std::atoll(widths[i]), "float32");
      run<__nv_bfloat16>(std::atoll(widths[i]), "bfloat16");
      run<__half>(std::atoll(widths[i]), "float16");
    }
    nothing();
    not_a_number();
    far();
  });
  return check::report();
}
