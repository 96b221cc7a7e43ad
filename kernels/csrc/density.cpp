#include "density.h"

#include <algorithm>

#include "parallel.h"

namespace ddim {
namespace {

constexpr int kColumns = 128;

// The sums of a sample's blocks, added in float64: block k to column k mod 128, in order, and the
// columns by halves.
double total_of(const BlockSum* sums, int64_t blocks) {
  double columns[kColumns] = {};
  for (int64_t k = 0; k < blocks; ++k) columns[k % kColumns] += sums[k].squares;
  for (int half = kColumns / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) columns[i] += columns[i + half];
  return columns[0];
}

}  // namespace

void for_blocks(int64_t n_samples, int64_t n_elements, int threads, const std::function<void(Range)>& work) {
  const int64_t per_sample = blocks_of(n_elements), useful = n_samples * n_elements / kThreadElements + 1;
  parallel_for(n_samples * per_sample, 1, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / per_sample, first = begin % per_sample;
      const int64_t last = std::min(per_sample, first + end - begin);
      work({sample, first * kSumBlock, std::min(n_elements, last * kSumBlock)});
      begin += last - first;
    }
  });
}

void reduce(const Reduction& r, const BlockSum* sums, int64_t n_samples, int64_t n_elements, float* results, float* counts) {
  const int64_t blocks = blocks_of(n_elements);
  for (int64_t i = 0; i < n_samples; ++i, sums += blocks) {
    double count = 0;
    for (int64_t k = 0; k < blocks; ++k) count += sums[k].count;
    const double squares = double{r.scale} * total_of(sums, blocks), offsets = double{r.offset} * count;
    const double total = double{r.sign} * (squares + offsets);
    if (count == 0) {
      results[i] = 0;
    } else {
      results[i] = static_cast<float>(r.mean ? total / count : total);
    }
    if (counts) counts[i] = static_cast<float>(count);
  }
}

}  // namespace ddim
