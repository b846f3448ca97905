// A row of logits, read and written 16 bytes at a time wherever it begins.
#pragma once

#include "cuda.cuh"

namespace mrlhf::device {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void round_to(float x, float& out) { out = x; }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(float x, __half& out) { out = __float2half_rn(x); }

// 16 bytes of a row.
template <class T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T element[kWidth];

  __device__ __forceinline__ float operator[](int i) const { return to_float(element[i]); }
};

// A vector of absent words, with `x` the first of them.
template <class T>
__device__ __forceinline__ Vector<T> alone(float x = -INFINITY) {
  Vector<T> result;
#pragma unroll
  for (int i = 0; i < Vector<T>::kWidth; ++i) round_to(i == 0 ? x : -INFINITY, result.element[i]);
  return result;
}

template <class T>
__host__ __device__ __forceinline__ bool aligned(const T* place) {
  return reinterpret_cast<uintptr_t>(place) % sizeof(Vector<T>) == 0;
}

// Inline PTX, because the compiler is free to split a 16-byte access of C++ and has been seen to.
template <class T>
__device__ __forceinline__ Vector<T> load(const T* place) {
  Vector<T> result;
#ifdef __CUDACC__
  uint4 bits;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(place));
  memcpy(&result, &bits, sizeof(result));
#else
  if (!aligned(place)) cuda_on_cpu::fail("16 bytes read at an address that is no multiple of 16");
  std::memcpy(static_cast<void*>(&result), place, sizeof(result));
#endif
  return result;
}

template <class T>
__device__ __forceinline__ void store(T* place, const Vector<T>& vector) {
#ifdef __CUDACC__
  uint4 bits;
  memcpy(&bits, &vector, sizeof(bits));
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(place), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  if (!aligned(place)) cuda_on_cpu::fail("16 bytes written at an address that is no multiple of 16");
  std::memcpy(static_cast<void*>(place), &vector, sizeof(vector));
#endif
}

// How `columns` elements from `row` on lie: single ones up to a 16-byte boundary, vectors, and single ones again.
template <class T>
struct Cut {
  int head, vectors, tail;

  __device__ Cut(const T* row, int64_t columns) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Vector<T>) / sizeof(T));
    const int until = (Vector<T>::kWidth - past) % Vector<T>::kWidth;
    head = static_cast<int>(columns < until ? columns : until);
    vectors = static_cast<int>(columns - head) / Vector<T>::kWidth;
    tail = static_cast<int>(columns - head) % Vector<T>::kWidth;
  }

  // The column where vector `i` begins.
  __device__ __forceinline__ int column(int i) const { return head + i * Vector<T>::kWidth; }

  // Calls `visit` with the column of each single element; the first threads of the block take one or two each.
  template <class Visit>
  __device__ __forceinline__ void singles(Visit visit) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < head) visit(thread);
    if (thread < tail) visit(column(vectors) + thread);
  }
};

// Vectors first, first + step, ... of `row`, absent words from vector `count` on. Where another row's cut gave the
// columns, this row may lie at another distance from a boundary: `whole` says that it does not.
template <class T, int kBatch>
__device__ __forceinline__ void fetch(const T* row, const Cut<T>& cut, bool whole, int first,
                                      Vector<T> (&into)[kBatch]) {
#pragma unroll
  for (int u = 0; u < kBatch; ++u) {
    const int i = first + u * static_cast<int>(blockDim.x);
    if (i >= cut.vectors) {
      into[u] = alone<T>();
    } else if (whole) {
      into[u] = load(row + cut.column(i));
    } else {
#pragma unroll
      for (int e = 0; e < Vector<T>::kWidth; ++e) into[u].element[e] = row[cut.column(i) + e];
    }
  }
}

// The block writes zeros to `count` elements.
template <class T>
__device__ void clear(T* place, int64_t count) {
  const Cut<T> cut(place, count);
  Vector<T> zeros;
#pragma unroll
  for (int e = 0; e < Vector<T>::kWidth; ++e) round_to(0.0f, zeros.element[e]);
  cut.singles([&](int column) { place[column] = zeros.element[0]; });
  for (int i = threadIdx.x; i < cut.vectors; i += blockDim.x) store(place + cut.column(i), zeros);
}

// Threads of a block that walks one row, `batch` vectors a thread and turn: few rows get more threads each, and the
// last turn is as full as whole warps allow.
inline int row_threads(int64_t rows, int64_t columns, int64_t element, int batch) {
  const int64_t few = 256, most = rows < few ? kThreads : kThreads / 2;
  const int64_t vectors = columns * element / 16 + 1;
  const int64_t turns = (vectors + batch * most - 1) / (batch * most);
  const int64_t threads = (vectors + batch * turns - 1) / (batch * turns);
  return static_cast<int>((threads + kWarp - 1) / kWarp * kWarp);
}

}  // namespace mrlhf::device
