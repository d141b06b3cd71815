// Shares the work of a group among threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace lowrank::cpu {

// Below this many elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 16384;

inline int useful_threads(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads));
}

// Calls work(matrix, begin, end) on ranges that cover [0, size) of each of `count` matrices, an
// equal share a thread, cut at multiples of `grain`.
template <typename Work>
void split(std::size_t count, int64_t size, int64_t grain, int threads, const Work& work) {
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t total = static_cast<int64_t>(count) * grains;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t last = total * (thread + 1) / threads;
    for (int64_t first = total * thread / threads; first < last;) {
      const int64_t matrix = first / grains;
      const int64_t next = std::min(last, (matrix + 1) * grains);
      const int64_t begin = (first - matrix * grains) * grain;
      work(static_cast<std::size_t>(matrix), begin,
           std::min(size, (next - matrix * grains) * grain));
      first = next;
    }
  }
}

}  // namespace lowrank::cpu
