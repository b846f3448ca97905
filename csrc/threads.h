// Rows dealt to threads as these become free: ignored rows cost nothing, so equal shares would not be equal work.
#pragma once

#include <algorithm>
#include <atomic>

#include "mrlhf.h"

namespace mrlhf::cpu {

/// body(begin, end) over all rows, a few at a time; `cost` is the elements of a row.
template <class Body>
void run(const Threads& threads, int64_t rows, int64_t cost, const Body& body) {
  constexpr int64_t kPiece = 1 << 16;  // elements; what a thread does before it asks for more
  const int64_t piece = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, cost));
  const int64_t tasks = std::min(threads.count, (rows + piece - 1) / piece);
  if (threads.run == nullptr || tasks <= 1) return body(0, rows);
  struct Shared {
    const Body& body;
    int64_t rows, piece;
    std::atomic<int64_t> next{0};
  } shared{body, rows, piece};
  threads.run(
      tasks,
      [](int64_t, void* context) {
        auto& all = *static_cast<Shared*>(context);
        for (int64_t begin; (begin = all.next.fetch_add(all.piece)) < all.rows;) {
          all.body(begin, std::min(all.rows, begin + all.piece));
        }
      },
      &shared);
}

}  // namespace mrlhf::cpu
