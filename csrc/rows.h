// What the CPU's dispatcher (cpu.cpp) asks of the code of one instruction set: a job done for some of its rows.
#pragma once

#include <cstdint>

#include "mrlhf.h"

namespace mrlhf::cpu {

/// Statistics; without a reference `out` is [4, N], else [8, N].
struct StatsJob {
  DType dtype;
  const void *logits, *reference;
  const int64_t* targets;
  Slice slice;
  int64_t reference_stride;
  void* out;
};

struct BackwardJob {
  DType dtype;
  const void *logits, *reference;
  const int64_t* targets;
  Slice slice;
  int64_t reference_stride;
  const void *sums, *reference_sums;
  const void *grad, *entropy_grad, *kl_grad;
  void* out;
  int64_t out_stride;
};

struct SampleJob {
  DType dtype;
  const void* logits;
  Slice slice;
  const uint32_t* keys;
  float* out;
};

#define MRLHF_ROWS_OF(ISA)                                            \
  namespace ISA {                                                     \
  void stats_rows(const StatsJob& job, int64_t begin, int64_t end);       \
  void backward_rows(const BackwardJob& job, int64_t begin, int64_t end); \
  void sample_rows(const SampleJob& job, int64_t begin, int64_t end);     \
  }
MRLHF_ROWS_OF(generic)
MRLHF_ROWS_OF(avx2)
MRLHF_ROWS_OF(avx512)
#undef MRLHF_ROWS_OF

}  // namespace mrlhf::cpu
