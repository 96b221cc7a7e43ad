// A pool of threads that split a range. No OpenMP: a second OpenMP runtime would compete with
// torch's for the processors.
#pragma once
#include <cstdint>
#include <functional>

namespace ddim {

// Calls work(begin, end) on up to `threads` disjoint parts that make up [0, n), each a multiple of
// `grain` but the last. Returns when all are done. The caller's thread takes part; where the pool
// is busy with another caller's work, it does everything itself, and where no more threads can be
// made, what they would have done.
void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work);

}  // namespace ddim
