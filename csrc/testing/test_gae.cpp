// The advantage scan of the CUDA source, run on the CPU, against the recursion in double. Arguments: widths to test.
#include "check.h"

namespace {

using check::near;
using check::Rows;

// Rows: whole, cut short, with holes, empty, and with a NaN behind a hole. Outside the mask lies NaN.
void run(int64_t width, double gamma, double lam) {
  constexpr int64_t kRows = 5;
  Rows<float> rewards(kRows, width, width, 0), values(kRows, width, width, 0), mask(kRows, width, width, 0);
  Rows<float> advantages(kRows, width, width, 0), returns(kRows, width, width, 0);
  check::Random random{static_cast<uint64_t>(width)};
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t t = 0; t < width; ++t) {
      const bool holes = (row == 4 && t != width / 2) || (row == 2 && t % 37 != 5);
      const bool kept = row == 0 || holes || (row == 1 && t <= width / 2);
      const bool broken = row == 4 && t == width - 1 && gamma * lam > 0;
      mask.set(row, t, kept);
      if (kept) rewards.set(row, t, broken ? NAN : random.normal()), values.set(row, t, random.normal());
    }
  }
  mrlhf::cuda::gae(rewards.data(), values.data(), mask.data(), kRows, width, gamma, lam, advantages.data(),
                   returns.data(), nullptr);
  for (int64_t row = 0; row < kRows; ++row) {
    double advantage = 0, next = 0;
    for (int64_t t = width - 1; t >= 0; --t) {
      const bool kept = mask.at(row, t) != 0;
      const double value = kept ? values.at(row, t) : 0;
      advantage = kept ? rewards.at(row, t) + gamma * next - value + gamma * lam * advantage : 0;
      next = value;
      const double error = kept ? 1e-5 + 1e-7 * width : 0;  // a sum of that many
      near(advantages.at(row, t), advantage, error, "advantage", row, t);
      near(returns.at(row, t), advantage + value, error, "return", row, t);
    }
  }
}

}  // namespace

int main(int count, char** widths) {
  char text[100];
  check::in_every_order([&] {
    mrlhf::cuda::gae(nullptr, nullptr, nullptr, 0, 7, 1, 1, nullptr, nullptr, nullptr);
    mrlhf::cuda::gae(nullptr, nullptr, nullptr, 7, 0, 1, 1, nullptr, nullptr, nullptr);
    const double pairs[][2] = {{1, 0.95}, {0.9, 0.8}, {1, 1}, {0.5, 0}, {0, 0.5}};
    for (int i = 1; i < count; ++i) {
      for (const auto& [gamma, lam] : pairs) {
        std::snprintf(text, sizeof(text), "width %s, gamma %g, lam %g", widths[i], gamma, lam);
        check::situation = text;
        run(std::atoll(widths[i]), gamma, lam);
      }
    }
  });
  return check::report();
}
