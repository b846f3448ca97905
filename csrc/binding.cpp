// The operators torch.ops.megatron_rlhf.*, on LibTorch's stable ABI: one build serves every torch from 2.10 on.
//
// MRLHF_CUDA links the CUDA side. A torch without CUDA still loads such a build: the one function of it that only a CUDA
// torch has is looked up when the first CUDA tensor comes (torch_cuda.h).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "mrlhf.h"

#ifdef MRLHF_CUDA
#include "torch_cuda.h"
#endif

namespace {

using mrlhf::DType;
using mrlhf::Slice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

DType dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, "logits are float32, bfloat16, float16 or float64");
  }
  return DType::f32;
}

/// The dtype of what is computed from the logits.
ScalarType real_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

constexpr int64_t kMost = int64_t{1} << 31;

Slice slice_of(const Tensor& logits, int64_t vocab_start, int64_t columns, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits are [N, V]");
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, "the words of a row lie side by side");
  STD_TORCH_CHECK(columns <= logits.size(1), "there are more words than columns");
  // a row is a block of a grid, a column an int; offsets are 64-bit
  STD_TORCH_CHECK(logits.size(0) < kMost && logits.size(1) < kMost, "rows and columns are fewer than 2^31 each");
  return {logits.size(0), logits.stride(0), columns < 0 ? 0 : columns, logits.size(1), vocab_start, temperature};
}

void check_like(const Tensor& other, const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(other.dim() == 2 && other.size(0) == logits.size(0) && other.size(1) == logits.size(1) &&
                      other.scalar_type() == logits.scalar_type() && other.get_device() == logits.get_device() &&
                      other.is_cpu() == logits.is_cpu() && (other.size(1) <= 1 || other.stride(1) == 1),
                  name, " has the shape, dtype and device of the logits, and words side by side");
}

/// The numbers of contiguous `values`, null where there are none.
const void* numbers(const Maybe& values, int64_t count, ScalarType dtype, const Tensor& logits, const char* name) {
  if (!values.has_value()) return nullptr;
  STD_TORCH_CHECK(values->numel() == count && values->is_contiguous() && values->scalar_type() == dtype &&
                      values->is_cpu() == logits.is_cpu() && values->get_device() == logits.get_device(),
                  name, " has ", count, " contiguous numbers of the right dtype on the logits' device");
  return values->const_data_ptr();
}

const int64_t* targets_of(const Tensor& targets, const Tensor& logits) {
  return static_cast<const int64_t*>(numbers(targets, logits.size(0), ScalarType::Long, logits, "targets"));
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

/// torch's own threads, as many as torch.get_num_threads() says.
mrlhf::cpu::Threads threads() {
  return {torch::stable::get_num_threads(), [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i, context);
            });
          }};
}

// Each operator takes a Backend: which of mrlhf::cpu and mrlhf::cuda runs, and with which threads or stream.

#define MRLHF_FORWARD(space, function)          \
  template <class... A>                         \
  static void function(const Tensor& on, A... a) { \
    const Where where(on);                      \
    mrlhf::space::function(a..., where.last);   \
  }
#define MRLHF_BACKEND(space)            \
  MRLHF_FORWARD(space, logprob_stats)    \
  MRLHF_FORWARD(space, logprob_kl_stats) \
  MRLHF_FORWARD(space, logprob_backward) \
  MRLHF_FORWARD(space, sample)           \
  MRLHF_FORWARD(space, gae)

struct Cpu {
  struct Where {
    explicit Where(const Tensor&) {}
    mrlhf::cpu::Threads last = threads();
  };
  MRLHF_BACKEND(cpu)
};

#ifdef MRLHF_CUDA
struct Cuda {
  struct Where {
    explicit Where(const Tensor& on) : guard(on.get_device_index()) {
      STD_TORCH_CHECK(mrlhf::current_stream(on.get_device(), &last), "libtorch_cuda.so has no current CUDA stream");
      mrlhf::cuda::use_device(on.get_device());
    }
    torch::stable::accelerator::DeviceGuard guard;
    void* last = nullptr;
  };
  MRLHF_BACKEND(cuda)
};
#endif

template <class Backend>
Tensor logprob_stats(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t columns,
                     double temperature) {
  Tensor out = empty(logits, {4, logits.size(0)}, real_of(logits));
  Backend::logprob_stats(logits, dtype_of(logits), logits.const_data_ptr(), targets_of(targets, logits),
                         slice_of(logits, vocab_start, columns, temperature), out.mutable_data_ptr());
  return out;
}

template <class Backend>
Tensor logprob_kl_stats(const Tensor& logits, const Tensor& reference, const Tensor& targets, int64_t vocab_start,
                        int64_t columns, double temperature) {
  check_like(reference, logits, "reference");
  Tensor out = empty(logits, {8, logits.size(0)}, real_of(logits));
  Backend::logprob_kl_stats(logits, dtype_of(logits), logits.const_data_ptr(), reference.const_data_ptr(),
                            targets_of(targets, logits), slice_of(logits, vocab_start, columns, temperature),
                            reference.stride(0), out.mutable_data_ptr());
  return out;
}

template <class Backend>
void logprob_backward(const Tensor& logits, const Maybe& reference, const Tensor& targets, const Tensor& sums,
                      const Maybe& reference_sums, const Maybe& grad, const Maybe& entropy_grad, const Maybe& kl_grad,
                      int64_t vocab_start, int64_t columns, double temperature, Tensor out) {
  check_like(out, logits, "out");
  STD_TORCH_CHECK(!kl_grad.has_value() || (reference.has_value() && reference_sums.has_value()),
                  "the KL's gradient needs the reference and its sums");
  if (reference.has_value()) check_like(*reference, logits, "reference");
  const int64_t n = logits.size(0);
  const ScalarType real = real_of(logits);
  const auto of = [&](const Maybe& values, int64_t count, const char* name) {
    return numbers(values, count, real, logits, name);
  };
  Backend::logprob_backward(
      logits, dtype_of(logits), logits.const_data_ptr(),
      reference.has_value() ? reference->const_data_ptr() : static_cast<const void*>(nullptr),
      targets_of(targets, logits), slice_of(logits, vocab_start, columns, temperature),
      reference.has_value() ? reference->stride(0) : int64_t(0), of(sums, 3 * n, "sums"),
      of(reference_sums, 2 * n, "reference_sums"), of(grad, n, "grad"), of(entropy_grad, n, "entropy_grad"),
      of(kl_grad, n, "kl_grad"), out.mutable_data_ptr(), out.stride(0));
}

template <class Backend>
Tensor sample(const Tensor& logits, const Maybe& keys, int64_t vocab_start, int64_t columns, double temperature) {
  STD_TORCH_CHECK(dtype_of(logits) != DType::f64, "logits are float32, bfloat16 or float16");
  Tensor out = empty(logits, {5, logits.size(0)}, ScalarType::Float);
  // 32-bit keys travel as int32: few of torch's operators know uint32
  const void* row_keys = numbers(keys, 2 * logits.size(0), ScalarType::Int, logits, "keys");
  Backend::sample(logits, dtype_of(logits), logits.const_data_ptr(),
                  slice_of(logits, vocab_start, columns, temperature), static_cast<const uint32_t*>(row_keys),
                  static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, double gamma,
                               double lam) {
  STD_TORCH_CHECK(rewards.dim() == 2, "rewards are [B, R]");
  const int64_t rows = rewards.size(0), width = rewards.size(1);
  STD_TORCH_CHECK(rows < kMost, "rows are fewer than 2^31");
  const auto of = [&](const Tensor& t, const char* name) {
    return static_cast<const float*>(numbers(t, rows * width, ScalarType::Float, rewards, name));
  };
  Tensor advantages = empty(rewards, {rows, width}, ScalarType::Float);
  Tensor returns = empty(rewards, {rows, width}, ScalarType::Float);
  Backend::gae(rewards, of(rewards, "rewards"), of(values, "values"), of(mask, "mask"), rows, width, gamma, lam,
               static_cast<float*>(advantages.mutable_data_ptr()), static_cast<float*>(returns.mutable_data_ptr()));
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_rlhf, m) {
  m.def("logprob_stats(Tensor logits, Tensor targets, int vocab_start, int columns, float temperature) -> Tensor");
  m.def(
      "logprob_kl_stats(Tensor logits, Tensor reference, Tensor targets, int vocab_start, int columns, "
      "float temperature) -> Tensor");
  m.def(
      "logprob_backward(Tensor logits, Tensor? reference, Tensor targets, Tensor sums, Tensor? reference_sums, "
      "Tensor? grad, Tensor? entropy_grad, Tensor? kl_grad, int vocab_start, int columns, float temperature, "
      "Tensor(a!) out) -> ()");
  m.def("sample(Tensor logits, Tensor? keys, int vocab_start, int columns, float temperature) -> Tensor");
  m.def("gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor, Tensor)");
}

#define MRLHF_OPERATORS(Backend)                              \
  m.impl("logprob_stats", TORCH_BOX(&logprob_stats<Backend>));       \
  m.impl("logprob_kl_stats", TORCH_BOX(&logprob_kl_stats<Backend>)); \
  m.impl("logprob_backward", TORCH_BOX(&logprob_backward<Backend>)); \
  m.impl("sample", TORCH_BOX(&sample<Backend>));                     \
  m.impl("gae", TORCH_BOX(&gae<Backend>));

STABLE_TORCH_LIBRARY_IMPL(megatron_rlhf, CPU, m) { MRLHF_OPERATORS(Cpu) }

#ifdef MRLHF_CUDA
STABLE_TORCH_LIBRARY_IMPL(megatron_rlhf, CUDA, m) { MRLHF_OPERATORS(Cuda) }
#endif
