#include "sample.cuh"

#include <algorithm>

namespace mrlhf::cuda {

void sample(DType dtype, const void* logits, Slice slice, const uint32_t* row_keys_2N, float* out_5N, void* stream) {
  if (slice.rows == 0) return;
  slice.columns = std::max<int64_t>(slice.columns, 0);
  device::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int threads = device::row_threads(slice.rows, slice.columns, sizeof(T), device::kSampleBatch);
    MRLHF_LAUNCH(device::draw_words<T>, slice.rows, threads, stream, static_cast<const T*>(logits), row_keys_2N, slice,
                 device::Scale(slice.temperature), out_5N);
  });
  device::check("sample");
}

}  // namespace mrlhf::cuda
