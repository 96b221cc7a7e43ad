// The log-density of a step and the divergence of two steps, as plain C: docs/LOG_PROB.md.
#pragma once
#include <functional>

#include "step.h"

namespace ddim {

// From the sums of a sample's blocks to its result: sign * (scale * squares + offset * count), divided
// by the count for a mean.
struct Reduction {
  float scale, offset, sign;
  bool mean;
};

struct Density {
  Step step;  // x_t, the model's outputs and the row; mask; x_prev, the value, which is read; block_sums
  Tensor reference, reference_uncond;             // instead of x_prev: outputs that give a second mean
  Tensor of_model_output, of_uncond, of_x_t;      // gradients, or null
  const float* factors;                           // (n_samples): what x_prev - mean is multiplied by in the gradient of the mean
};

constexpr int64_t kThreadElements = 8192;  // with fewer for each, a second thread costs more than it saves

constexpr int64_t blocks_of(int64_t n_elements) { return (n_elements + kSumBlock - 1) / kSumBlock; }

// Calls work on ranges of whole blocks that make up all samples, on up to `threads` threads.
void for_blocks(int64_t n_samples, int64_t n_elements, int threads, const std::function<void(Range)>& work);

// results[i] of sample i, and how many of its elements count (counts may be null).
void reduce(const Reduction& reduction, const BlockSum* sums, int64_t n_samples, int64_t n_elements, float* results, float* counts);

}  // namespace ddim
