// Draws of the CUDA source, run on the CPU, against loops in double. Arguments: quadruples of a row's two keys, a word,
// and the bits that parallel/random.py makes of them; then, behind a colon, the widths to test.
#include <string>

#include "../sample/sample.cuh"
#include "check.h"

namespace {

using check::near;
using check::Rows;

constexpr uint32_t kKeys[] = {0x12345678, 0x9abcdef0, 0xdeadbeef, 7, 0xffffffff, 0};  // [2, rows]
constexpr int64_t kRows = 3, kStart = 50000;

double noise(uint32_t bits) {
  const float v = std::fmin((static_cast<float>(bits) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -std::log(-std::log1p(-static_cast<double>(v)));
}

// Rows: ordinary; with absent words; all equal (greedy, the first word is drawn), one of them all absent.
template <class T>
void run(int64_t columns, int64_t place, double temperature, bool greedy) {
  Rows<T> logits(kRows, columns, columns + 2 * place, place);
  check::Random random{static_cast<uint64_t>(columns)};
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t v = 0; v < columns; ++v) {
      const bool absent = row == 1 && v != columns / 2 && random.bits() % 2 == 0;
      const double x = row == 2 ? (temperature == 1 ? 0.5 : -INFINITY) : 2 * random.normal();
      logits.set(row, v, absent ? -INFINITY : x);
    }
  }
  const mrlhf::Slice slice{kRows, logits.stride, columns, columns, kStart, temperature};
  float out[5 * kRows];
  mrlhf::cuda::sample(check::dtype_of<T>(), logits.data(), slice, greedy ? nullptr : kKeys, out, nullptr);
  for (int64_t row = 0; row < kRows; ++row) {
    const uint32_t key = kKeys[row], second_key = kKeys[kRows + row];
    const auto perturbed = [&](int64_t v) {
      const uint32_t bits = mrlhf::device::random_bits(key, second_key, static_cast<uint32_t>(kStart + v));
      return logits.at(row, v) / temperature + (greedy ? 0 : noise(bits));
    };
    double m = -INFINITY, S = 0, best = -INFINITY;
    int64_t word = 0;
    for (int64_t v = 0; v < columns; ++v) {
      m = std::fmax(m, logits.at(row, v) / temperature);
      if (perturbed(v) > best) best = perturbed(v), word = v;
    }
    for (int64_t v = 0; v < columns; ++v) S += std::isinf(m) ? 0 : std::exp(logits.at(row, v) / temperature - m);
    near(out[row], best, 4e-6 * (1 + std::fabs(best)), "best", row);
    // words whose perturbed values differ in the last bits may change places
    const int64_t drawn = static_cast<int64_t>(out[kRows + row]) - kStart;
    const bool inside = drawn >= 0 && drawn < columns;
    const bool same = drawn == word || (!greedy && inside && std::fabs(perturbed(drawn) - best) < 4e-6);
    check::expect(same, "word", row, -1, out[kRows + row], kStart + word);
    near(out[2 * kRows + row], m, 2e-7 * std::fabs(m), "m", row);
    near(out[3 * kRows + row], S, 2e-6 * S, "S", row);
    const double x = inside ? logits.at(row, drawn) / temperature : NAN;
    near(out[4 * kRows + row], x, 2e-7 * std::fabs(x), "x", row);
  }
}

// A slice without words.
void nothing() {
  check::situation = "no words";
  float out[10];
  for (const int64_t columns : {int64_t{0}, int64_t{-4}}) {
    const float wanted[] = {-INFINITY, 0, -INFINITY, 0, 0};
    mrlhf::cuda::sample(mrlhf::DType::f32, nullptr, {2, 8, columns, 8, 90, 1.0}, kKeys, out, nullptr);
    for (int k = 0; k < 10; ++k) near(out[k], wanted[k / 2], 0, "a number", k % 2, k / 2);
  }
}

// A row that begins more than 2^31 elements behind the first.
void far() {
  check::situation = "offsets beyond 2^31";
  check::FarRows<__nv_bfloat16> logits(9);
  if (!logits.there()) return;
  logits.set(0, 3, 1), logits.set(1, 5, 2);
  float out[10];
  mrlhf::cuda::sample(mrlhf::DType::bf16, logits.data(), {2, logits.stride, 9, 9, 0, 1.0}, nullptr, out, nullptr);
  for (int64_t row = 0; row < 2; ++row) {
    near(out[2 + row], row == 0 ? 3 : 5, 0, "word", row);
    near(out[6 + row], 1 + 8 * std::exp(-1.0 - row), 1e-5, "S", row);
  }
}

// A word with the hash's largest and smallest bits has finite noise.
void ends() {
  check::situation = "the ends of the noise";
  near(mrlhf::device::gumbel(0), -std::log(0x1p-33), 1e-5, "noise", 0);
  near(mrlhf::device::gumbel(0xffffffff), -std::log(24 * std::log(2.0)), 1e-5, "noise", 0);
}

}  // namespace

int main(int count, char** words) {
  int next = 1;
  check::situation = "random bits";
  for (; next + 4 < count && std::string(words[next]) != ":"; next += 4) {
    uint32_t numbers[4];
    for (int i = 0; i < 4; ++i) numbers[i] = static_cast<uint32_t>(std::strtoull(words[next + i], nullptr, 10));
    near(mrlhf::device::random_bits(numbers[0], numbers[1], numbers[2]), numbers[3], 0, "bits", next / 4);
  }
  ends();
  check::in_every_order([&] {
    nothing();
    far();
    for (int i = next + 1; i < count; ++i) {
      for (const bool greedy : {false, true}) {
        const std::string text = std::string(greedy ? "greedy" : "random") + ", V = " + words[i];
        check::situation = text.c_str();
        run<float>(std::atoll(words[i]), 0, 1, greedy);
        run<float>(std::atoll(words[i]), 1, 0.7, greedy);
        run<__nv_bfloat16>(std::atoll(words[i]), 3, 1, greedy);
        run<__half>(std::atoll(words[i]), 0, 0.7, greedy);
      }
    }
  });
  return check::report();
}
