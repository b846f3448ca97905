// The kernels' interface, free of torch: what a row's statistics are, its gradient, a draw, and GAE.
//
// N rows, V columns of this rank's slice of the vocabulary, T the temperature, x = logits / T, y = reference / T.
// Numbers a row come as arrays of N, one after the other: `out_4N` is m of all rows, then S of all rows, and so on.
// They are float, and double where the logits are f64 (CPU only). Sums are relative to the largest logit: Z of plain x
// loses the last digits of the entropy as soon as the logits have an offset.
//
//     m = max x                              S = sum e^(x-m)
//     Z = sum (x-m) e^(x-m)                  t = x at the target, 0 where another slice holds it
//     D = sum ((x-m) - (y-m')) e^(x-m)       m', S', t' are m, S, t of y
//
// A word whose weight e^(x-m) is 0 adds nothing, -inf logits included. A slice without words, or with -inf alone, has
// m = -inf, S = Z = D = 0. A row with a negative target is not read: m = 0, S = 1, Z = t = 0, and its gradient is 0.
// A NaN among the words makes the sums NaN. Of slices, with m the largest m of all and d = m_slice - m:
//
//     S = sum e^d S_slice    Z = sum e^d (Z_slice + d S_slice)    D = sum e^d (D_slice + (d - d') S_slice)
//     log p = (t - m) - ln S           H = ln S - Z / S           KL(p || q) = D / S - ln S + ln S'
#pragma once

#include <cstdint>

namespace mrlhf {

enum class DType { f32, bf16, f16, f64 };

/// N rows of a slice of the vocabulary.
struct Slice {
  int64_t rows;
  int64_t stride;   // elements between rows; offsets are 64-bit, N V may exceed 2^31
  int64_t columns;  // words of this slice; what lies behind them is padding and never read
  int64_t width;    // columns and padding: what a backward pass writes, zeros in the padding
  int64_t vocab_start;
  double temperature;
};

namespace cpu {

/// How independent tasks are run: task(0, context) ... task(tasks - 1, context), in any order, at once or not.
struct Threads {
  int64_t count = 1;
  void (*run)(int64_t tasks, void (*task)(int64_t, void*), void* context) = nullptr;  // null: one after the other
};

/// m, S, Z, t of each row. No result depends on the number of threads.
void logprob_stats(DType dtype, const void* logits, const int64_t* targets, Slice slice, void* out_4N,
                   Threads threads = {});

/// m, S, Z, t, D, m', S', t' of each row.
void logprob_kl_stats(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, void* out_8N, Threads threads = {});

/// out = (1/T) [g (1_y - p) - h p (ln p + H) + k p (ln p - ln q - KL)], rounded once, with the gradients g of the
/// log-prob, h of the entropy and k of KL(p || q); 0 in the padding and in ignored rows. sums_3N holds m, S and Z / S
/// of the whole vocabulary, reference_sums_2N m' and D / S: with p = e^(x-m) / S the constants cancel, and
///
///     ln p + H = (x-m) - Z / S        ln p - ln q - KL = (x-m) - (y-m') - D / S
///
/// without the last digits that ln S, H and KL would cost. A null g, h or k is 0; reference and reference_sums are
/// needed with k. `out` may be `logits`.
void logprob_backward(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, const void* sums_3N, const void* reference_sums_2N, const void* grad_N,
                      const void* entropy_grad_N, const void* kl_grad_N, void* out, int64_t out_stride,
                      Threads threads = {});

/// Each row's best x + Gumbel noise, its word's global number (exact below 2^24), m, S, and x at that word: out_5N.
/// The noise is that of parallel/random.py for the two 32-bit keys of each row; null keys draw without noise. Of equal
/// values the first word wins. A slice without words: -inf, word 0, m = -inf, S = 0, x = 0. Not for f64.
void sample(DType dtype, const void* logits, Slice slice, const uint32_t* row_keys_2N, float* out_5N,
            Threads threads = {});

/// Advantages and returns [rows, width] of contiguous arrays, 0 where the mask is 0.
void gae(const float* rewards, const float* values, const float* mask, int64_t rows, int64_t width, double gamma,
         double lam, float* advantages, float* returns, Threads threads = {});

}  // namespace cpu

namespace cuda {

/// Kernels are launched on `device` from now on, by this thread. The CUDA runtime is linked statically: its current
/// device is its own, and not the one that torch's runtime has set.
void use_device(int device);

/// As in `cpu`, of device memory, queued on `stream` (a cudaStream_t).
void logprob_stats(DType dtype, const void* logits, const int64_t* targets, Slice slice, void* out_4N, void* stream);

void logprob_kl_stats(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, void* out_8N, void* stream);

void logprob_backward(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, const void* sums_3N, const void* reference_sums_2N, const void* grad_N,
                      const void* entropy_grad_N, const void* kl_grad_N, void* out, int64_t out_stride, void* stream);

void sample(DType dtype, const void* logits, Slice slice, const uint32_t* row_keys_2N, float* out_5N, void* stream);

void gae(const float* rewards, const float* values, const float* mask, int64_t rows, int64_t width, double gamma,
         double lam, float* advantages, float* returns, void* stream);

}  // namespace cuda
}  // namespace mrlhf
