#include "logprob.cuh"

#include <algorithm>

namespace mrlhf::cuda {

void logprob_stats(DType dtype, const void* logits, const int64_t* targets, Slice slice, void* out_4N, void* stream) {
  if (slice.rows == 0) return;
  slice.columns = std::max<int64_t>(slice.columns, 0);
  device::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int threads = device::row_threads(slice.rows, slice.columns, sizeof(T), device::kStatsBatch);
    MRLHF_LAUNCH(device::stats<T>, slice.rows, threads, stream, static_cast<const T*>(logits), targets, slice,
                 device::Scale(slice.temperature), static_cast<float*>(out_4N));
  });
  device::check("logprob_stats");
}

void logprob_kl_stats(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, void* out_8N, void* stream) {
  if (slice.rows == 0) return;
  slice.columns = std::max<int64_t>(slice.columns, 0);
  device::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int threads = device::row_threads(slice.rows, slice.columns, sizeof(T), device::kKlStatsBatch);
    MRLHF_LAUNCH(device::kl_stats<T>, slice.rows, threads, stream, static_cast<const T*>(logits),
                 static_cast<const T*>(reference), targets, slice, reference_stride,
                 device::Scale(slice.temperature), static_cast<float*>(out_8N));
  });
  device::check("logprob_kl_stats");
}

void logprob_backward(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, const void* sums_3N, const void* reference_sums_2N, const void* grad_N,
                      const void* entropy_grad_N, const void* kl_grad_N, void* out, int64_t out_stride, void* stream) {
  if (slice.rows == 0 || slice.width == 0) return;
  slice.columns = std::max<int64_t>(slice.columns, 0);
  const auto floats = [](const void* numbers) { return static_cast<const float*>(numbers); };
  const device::Numbers numbers{floats(sums_3N), floats(reference_sums_2N), floats(grad_N), floats(entropy_grad_N),
                                floats(kl_grad_N)};
  const bool pair = kl_grad_N != nullptr;
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
