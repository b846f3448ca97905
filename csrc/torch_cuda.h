// What is asked of a torch with CUDA beyond the stable ABI of the torch that this library is linked to.
#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace mrlhf {

/// torch's current stream of a device, where libtorch_cuda.so is loaded; false where it is not, or on torch's error.
///
/// The function is looked up by name: linking to libtorch_cuda.so would keep the library from loading under a torch
/// without CUDA, and a weak symbol stays null under one with it, since torch loads its libraries out of sight of others.
inline bool current_stream(int32_t device, void** stream) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(found);
  }();
  return get != nullptr && get(device, stream) == 0;
}

}  // namespace mrlhf
