// Asks the system for large pages where a job is about to write much memory for the first time.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace mrlhf::cpu {

/// Advises 2 MiB pages for the whole ones within `bytes` from `place` on, of 32 MiB and more: a page that is written for
/// the first time stops its thread, and 4 KiB ones do so a hundred thousand times for a gradient of 400 MB. Where the
/// system gives none, or there is memory there already, nothing changes.
inline void want_large_pages(void* place, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (bytes < int64_t{1} << 25) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(place), begin = (from + kPage - 1) / kPage * kPage;
  const uintptr_t end = (from + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)place, (void)bytes;
#endif
}

}  // namespace mrlhf::cpu
