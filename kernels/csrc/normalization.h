// What a group normalization needs, as plain C. Like a convolution, it is no part of a step, but of
// the models that a sampler spends its time in.
#pragma once
#include <cstdint>

namespace ddim {

// Group normalization (Wu and He, arXiv 1803.08494) of channels-last float32: (batch, pixels,
// channels), contiguous. Channels are a multiple of kNormalizedGrain and of the groups. What is
// normalized is multiplied by weight and bias is added; then by 1 + scale, and shift is added; then
// comes SiLU where that is wanted.
constexpr int64_t kNormalizedGrain = 16;
constexpr int64_t kSiluGrain = 64;  // elements, by which threads divide a tensor

struct Normalization {
  const float* input;
  const float *weight, *bias;  // (channels,), each or null
  const float *scale, *shift;  // of each sample: sample i's channels at scale + i * scale_stride; each or null
  int64_t scale_stride, shift_stride;
  float* output;  // may be the input
  int64_t batch, pixels, channels, groups;
  double eps;
  bool silu;
};

// Each instruction set compiles these for itself: none may be shared with a processor that has
// fewer instructions.
namespace {

// Samples are divided into slabs, of the fewest channels that are whole groups and whole cache lines.
[[maybe_unused]] inline int64_t slab_channels(const Normalization& n) {
  int64_t channels = n.channels / n.groups;
  while (channels % kNormalizedGrain) channels += n.channels / n.groups;
  return channels;
}
[[maybe_unused]] inline int64_t slab_count(const Normalization& n) { return n.batch * (n.channels / slab_channels(n)); }

// Two float64 and three float32 numbers for each channel.
[[maybe_unused]] inline int64_t scratch_floats(const Normalization& n) { return 7 * n.channels; }

}  // namespace
}  // namespace ddim
