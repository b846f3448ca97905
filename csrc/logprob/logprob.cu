#include "logprob.cuh"

#include <algorithm>

namespace mrlhf::cuda {

void logprob_stats(DType dtype, const void* logits, const int64_t* targets, Slice slice, void* out, void* stream) {
  if (slice.rows == 0) return;
  slice.columns = std::max<int64_t>(slice.columns, 0);
  device::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int threads = device::row_threads(slice.rows, slice.columns, sizeof(T), device::kStatsBatch);
    MRLHF_LAUNCH(device::stats<T>, slice.rows, threads, stream, static_cast<const T*>(logits), targets, slice,
                 device::Scale(slice.temperature), static_cast<float*>(out));
  });
  device::check("logprob_stats");
}

void logprob_kl_stats(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, void* out, void* stream) {
  if (slice.rows == 0) return;
  slice.columns = std::max<int64_t>(slice.columns, 0);
  device::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int threads = device::row_threads(slice.rows, slice.columns, sizeof(T), device::kKlStatsBatch);
    MRLHF_LAUNCH(device::kl_stats<T>, slice.rows, threads, stream, static_cast<const T*>(logits),
                 static_cast<const T*>(reference), targets, slice, reference_stride,
                 device::Scale(slice.temperature), static_cast<float*>(out));
  });
  device::check("logprob_kl_stats");
}

void logprob_backward(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, const void* log_sum, const void* entropy, const void* kl,
                      const void* reference_log_sum, const void* grad, const void* entropy_grad, const void* kl_grad,
                      void* out, int64_t out_stride, void* stream) {
  if (slice.rows == 0 || slice.width == 0) return;
  slice.columns = std::max<int64_t>(slice.columns, 0);
  const auto floats = [](const void* numbers) { return static_cast<const float*>(numbers); };
  const device::Numbers numbers{floats(log_sum), floats(entropy),      floats(kl),     floats(reference_log_sum),
                                floats(grad),    floats(entropy_grad), floats(kl_grad)};
  const bool pair = kl_grad != nullptr;
  device::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int batch = device::kBackwardBatch / (pair ? 2 : 1);
    const int threads = device::row_threads(slice.rows, slice.width, sizeof(T), batch);
    MRLHF_LAUNCH((pair ? device::backward<T, true> : device::backward<T, false>), slice.rows, threads, stream,
                 static_cast<const T*>(logits), static_cast<const T*>(reference), targets, slice, reference_stride,
                 device::Scale(slice.temperature), numbers, static_cast<T*>(out), out_stride);
  });
  device::check("logprob_backward");
}

}  // namespace mrlhf::cuda
