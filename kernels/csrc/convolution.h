// What a convolution needs, as plain C. It is no part of a step, but a sampler spends most of its
// time in its model's convolutions.
#pragma once
#include <cstdint>

namespace ddim {

// A 3 x 3 convolution, stride 1, zero padding 1, of channels-last float32: (batch, height, width,
// channels), contiguous. Channels are multiples of kChannelGrain. Computed in tiles of kTileSide x
// kTileSide pixels of the output by Winograd's minimal filtering F(4 x 4, 3 x 3) (Lavin and Gray,
// arXiv 1509.09308): kPoints products for a tile instead of nine for each of its pixels.
constexpr int kTileSide = 4, kPatch = kTileSide + 2, kPoints = kPatch * kPatch;
constexpr int64_t kChannelGrain = 16;

struct Convolution {
  const float* input;
  const float* weights;  // transformed, in panels: (kPoints, out_channels / kChannelGrain, in_channels, kChannelGrain)
  const float* bias;     // (out_channels), or null
  float* output;
  int64_t batch, height, width, in_channels, out_channels;
};

// Tiles are computed in blocks whose transformed input and products stay in a core's second-level
// cache.
constexpr int64_t kBlockBytes = 640 << 10, kRowGrain = 4;

// Each instruction set compiles these for itself: none may be shared with a processor that has
// fewer instructions.
namespace {

[[maybe_unused]] inline int64_t tile_rows(const Convolution& c) { return (c.height + kTileSide - 1) / kTileSide; }
[[maybe_unused]] inline int64_t tile_columns(const Convolution& c) { return (c.width + kTileSide - 1) / kTileSide; }
[[maybe_unused]] inline int64_t tile_count(const Convolution& c) { return c.batch * tile_rows(c) * tile_columns(c); }

// A multiple of kRowGrain, no more than the convolution has (rounded up).
[[maybe_unused]] inline int64_t tiles_in_block(const Convolution& c) {
  const int64_t fit = kBlockBytes / (kPoints * (c.in_channels + c.out_channels) * static_cast<int64_t>(sizeof(float)));
  const int64_t most = fit < 24 ? 24 : fit / 24 * 24, all = (tile_count(c) + kRowGrain - 1) / kRowGrain * kRowGrain;
  return most < all ? most : all;
}

// From one point's tiles of so many channels to the next one's. A transform reads or writes one cache
// line of each point at a time: they must not fall into the same few sets of the cache, and do if their
// distance is divided by a high power of two.
[[maybe_unused]] inline int64_t point_stride(const Convolution& c, int64_t channels) { return tiles_in_block(c) * channels + kChannelGrain; }

[[maybe_unused]] inline int64_t scratch_floats(const Convolution& c) {
  return kPoints * (point_stride(c, c.in_channels) + point_stride(c, c.out_channels)) + c.in_channels;
}

}  // namespace
}  // namespace ddim
