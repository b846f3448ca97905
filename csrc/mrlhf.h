// The kernels' C++ interface: free of torch, the same functions for CPU and CUDA.
//
// N rows, V columns of a slice of the vocabulary, T the temperature; x = logits / T and y = reference / T. Arrays named
// [k, N] lie one row of N numbers behind the other; they are float (double where the DType is f64). A word whose
// logit is -inf is absent: it adds nothing to S, Z or C, and its gradient is 0. NaN logits give NaN.
#pragma once

#include <cstdint>

namespace mrlhf {

enum class DType { f32, bf16, f16, f64 };  // f64 on the CPU only

// N rows of a slice of the vocabulary.
struct Slice {
  int64_t rows;
  int64_t stride;   // elements from one row to the next
  int64_t columns;  // words of this slice; what lies behind them is padding and never read
  int64_t width;    // columns and padding: what backward writes, zeros in the padding
  int64_t vocab_start;
  double temperature;
};

namespace cpu {

// out [4, N]: m = max x, S = sum e^(x-m), Z = sum x e^(x-m), t = x at the target (0 where another slice holds it). A
// negative target is an ignored row: not read, its numbers finite. A slice without words gives m = -inf, S = Z = t = 0.
void logprob_stats(DType, const void* logits, const int64_t* targets, Slice, void* out);

// out [8, N]: m, S, Z, t as above, C = sum e^(x-m) y, and the reference's m', S', t'.
void logprob_kl_stats(DType, const void* logits, const void* reference, const int64_t* targets, Slice,
                      int64_t reference_stride, void* out);

// out = (1/T) [g (1_y - p) - h p (x - lse + H) + k p ((x - lse) - (y - lse') - KL)] with the gradients g of the
// log-prob, h of the entropy and k of KL(policy || reference); 0 in the padding and in ignored rows, which are not
// read. [N] each: log_sum lse, entropy H, kl KL, reference_log_sum lse', grad g, entropy_grad h, kl_grad k. A null g, h
// or k is 0; entropy is needed with h; reference, kl and reference_log_sum with k. `out` may be `logits`.
void logprob_backward(DType, const void* logits, const void* reference, const int64_t* targets, Slice,
                      int64_t reference_stride, const void* log_sum, const void* entropy, const void* kl,
                      const void* reference_log_sum, const void* grad, const void* entropy_grad, const void* kl_grad,
                      void* out, int64_t out_stride);

// out [5, N]: the largest x + Gumbel noise, its word (global, exact in a float below 2^24; the lowest of equals), m, S,
// and x at that word. row_keys [2, N] are the keys of parallel/random.py; null draws without noise (greedy). A slice
// without words gives -inf, 0, -inf, 0, 0.
void sample(DType, const void* logits, Slice, const uint32_t* row_keys, void* out);

// Advantages and returns [rows, width] of algorithms/gae.py: 0 where the mask is 0, whatever stands there.
void gae(const float* rewards, const float* values, const float* mask, int64_t rows, int64_t width, double gamma,
         double lam, float* advantages, float* returns);

}  // namespace cpu

// The same functions on a stream (a cudaStream_t; null is the default one). They do not wait for it.
namespace cuda {

void logprob_stats(DType, const void* logits, const int64_t* targets, Slice, void* out, void* stream);
void logprob_kl_stats(DType, const void* logits, const void* reference, const int64_t* targets, Slice,
                      int64_t reference_stride, void* out, void* stream);
void logprob_backward(DType, const void* logits, const void* reference, const int64_t* targets, Slice,
                      int64_t reference_stride, const void* log_sum, const void* entropy, const void* kl,
                      const void* reference_log_sum, const void* grad, const void* entropy_grad, const void* kl_grad,
                      void* out, int64_t out_stride, void* stream);
void sample(DType, const void* logits, Slice, const uint32_t* row_keys, void* out, void* stream);
void gae(const float* rewards, const float* values, const float* mask, int64_t rows, int64_t width, double gamma,
         double lam, float* advantages, float* returns, void* stream);

}  // namespace cuda
}  // namespace mrlhf
