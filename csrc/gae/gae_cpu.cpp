// Generalised advantage estimation on a CPU: one backward scan a row.
#include "../threads.h"

namespace mrlhf::cpu {

void gae(const float* rewards, const float* values, const float* mask, int64_t rows, int64_t width, double gamma,
         double lam, float* advantages, float* returns, Threads threads) {
  const float g = float(gamma), gl = float(gamma * lam);
  run(threads, rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float next_value = 0, next_advantage = 0;
      for (int64_t i = (row + 1) * width; i-- > row * width;) {
        const float value = mask[i] != 0 ? values[i] : 0;
        const float delta = rewards[i] + g * next_value - value;
        next_advantage = mask[i] != 0 ? delta + gl * next_advantage : 0;
        next_value = value;
        advantages[i] = next_advantage;
        returns[i] = next_advantage + value;
      }
    }
  });
}

}  // namespace mrlhf::cpu
