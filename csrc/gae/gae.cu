#include "gae.cuh"

namespace mrlhf::cuda {

void gae(const float* rewards, const float* values, const float* mask, int64_t rows, int64_t width, double gamma,
         double lam, float* advantages, float* returns, void* stream) {
  if (rows == 0 || width == 0) return;
  const int64_t rows_a_block = device::kGaeThreads / device::kWarp;
  MRLHF_LAUNCH(device::scan, (rows + rows_a_block - 1) / rows_a_block, device::kGaeThreads, stream, rewards, values,
               mask, rows, width, static_cast<float>(gamma), static_cast<float>(gamma * lam), advantages, returns);
  device::check("gae");
}

}  // namespace mrlhf::cuda
