#include "cuda.cuh"

namespace mrlhf::cuda {

void use_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("cudaSetDevice: ") + cudaGetErrorString(error));
}

}  // namespace mrlhf::cuda
