// The CPU's side of mrlhf.h: chooses the instruction set once and deals rows to threads.
#include "pages.h"
#include "rows.h"
#include "threads.h"

namespace mrlhf::cpu {
namespace {

enum Isa { kGeneric, kAvx2, kAvx512 };

Isa newest() {
#ifdef MRLHF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kGeneric;
}

Isa chosen = newest();

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

template <class Job>
using Rows = void (*)(const Job&, int64_t, int64_t);

template <class Job>
void run_rows(const Threads& threads, const Job& job, Rows<Job> generic, Rows<Job> avx2, Rows<Job> avx512) {
  const Rows<Job> rows = chosen == kAvx512 ? avx512 : chosen == kAvx2 ? avx2 : generic;
  run(threads, job.slice.rows, job.slice.width, [&](int64_t begin, int64_t end) { rows(job, begin, end); });
}

#ifdef MRLHF_X86
#define MRLHF_EACH_ISA(rows) generic::rows, avx2::rows, avx512::rows
#else
#define MRLHF_EACH_ISA(rows) generic::rows, generic::rows, generic::rows
#endif

}  // namespace

void logprob_stats(DType dtype, const void* logits, const int64_t* targets, Slice slice, void* out_4N,
                   Threads threads) {
  const StatsJob job{dtype, logits, nullptr, targets, slice, 0, out_4N};
  run_rows(threads, job, MRLHF_EACH_ISA(stats_rows));
}

void logprob_kl_stats(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, void* out_8N, Threads threads) {
  const StatsJob job{dtype, logits, reference, targets, slice, reference_stride, out_8N};
  run_rows(threads, job, MRLHF_EACH_ISA(stats_rows));
}

void logprob_backward(DType dtype, const void* logits, const void* reference, const int64_t* targets, Slice slice,
                      int64_t reference_stride, const void* sums_3N, const void* reference_sums_2N, const void* grad_N,
                      const void* entropy_grad_N, const void* kl_grad_N, void* out, int64_t out_stride,
                      Threads threads) {
  if (out != logits && out_stride == slice.width) want_large_pages(out, slice.rows * out_stride * size_of(dtype));
  const BackwardJob job{dtype,   logits,            reference, targets,        slice,     reference_stride,
                        sums_3N, reference_sums_2N, grad_N,    entropy_grad_N, kl_grad_N, out,
                        out_stride};
  run_rows(threads, job, MRLHF_EACH_ISA(backward_rows));
}

void sample(DType dtype, const void* logits, Slice slice, const uint32_t* row_keys_2N, float* out_5N,
            Threads threads) {
  const SampleJob job{dtype, logits, slice, row_keys_2N, out_5N};
  run_rows(threads, job, MRLHF_EACH_ISA(sample_rows));
}

}  // namespace mrlhf::cpu

/// The instruction set from now on: the newest of this machine up to `most` (0 generic, 1 avx2, 2 avx512).
extern "C" __attribute__((visibility("default"))) int mrlhf_instruction_set(int most) {
  using namespace mrlhf::cpu;
  const int best = newest();
  chosen = static_cast<Isa>(most < best ? most : best);
  return chosen;
}
