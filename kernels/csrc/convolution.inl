// A block of a convolution by Winograd's minimal filtering: transform patches of the input, a
// matrix product for each of the 36 points, transform the products back. Every output is the same
// sum in the same order for any block, thread or instruction set.

// One line of the input's transform, B^T d: points 0, 1, -1, 2, -2 and infinity.
DDIM_INLINE void to_points(const F (&d)[kPatch], F (&v)[kPatch]) {
  const F four = Isa::set(4.0f), minus_four = Isa::set(-4.0f), minus_five = Isa::set(-5.0f), two = Isa::set(2.0f);
  const F a = Isa::fma(minus_four, d[2], d[4]), b = Isa::fma(minus_four, d[1], d[3]);
  const F c = Isa::sub(d[4], d[2]), e = Isa::mul(two, Isa::sub(d[3], d[1]));
  v[0] = Isa::fma(four, d[0], Isa::fma(minus_five, d[2], d[4]));
  v[1] = Isa::add(a, b);
  v[2] = Isa::sub(a, b);
  v[3] = Isa::add(c, e);
  v[4] = Isa::sub(c, e);
  v[5] = Isa::fma(four, d[1], Isa::fma(minus_five, d[3], d[5]));
}

// One line of the products' transform, A^T m.
DDIM_INLINE void from_points(const F (&m)[kPatch], F (&y)[kTileSide]) {
  const F two = Isa::set(2.0f), four = Isa::set(4.0f), eight = Isa::set(8.0f);
  const F p = Isa::add(m[1], m[2]), q = Isa::sub(m[1], m[2]), r = Isa::add(m[3], m[4]), s = Isa::sub(m[3], m[4]);
  y[0] = Isa::add(Isa::add(m[0], p), r);
  y[1] = Isa::fma(two, s, q);
  y[2] = Isa::fma(four, r, p);
  y[3] = Isa::add(Isa::fma(eight, s, q), m[5]);
}

// Where a tile is: its image, and its first pixel.
struct Place {
  int64_t image, y, x;
};

inline Place place_of(const Convolution& c, int64_t tile) {
  const int64_t columns = tile_columns(c), rows = tile_rows(c);
  return {tile / (rows * columns), tile / columns % rows * kTileSide, tile % columns * kTileSide};
}

// The patch under a tile, transformed, to v + point * stride. `zeros` is read outside the image.
inline void transform_patch(const Convolution& c, Place at, const float* zeros, float* v, int64_t stride) {
  const float* pixels[kPatch][kPatch];
  for (int i = 0; i < kPatch; ++i) {
    for (int j = 0; j < kPatch; ++j) {
      const int64_t y = at.y + i - 1, x = at.x + j - 1;
      const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
      pixels[i][j] = inside ? c.input + ((at.image * c.height + y) * c.width + x) * c.in_channels : zeros;
    }
  }
  for (int64_t k = 0; k < c.in_channels; k += Isa::kLanes) {
    F lines[kPatch][kPatch];  // transformed across
#pragma GCC unroll 6
    for (int i = 0; i < kPatch; ++i) {
      F d[kPatch];
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) d[j] = Isa::load(pixels[i][j] + k);
      to_points(d, lines[i]);
    }
#pragma GCC unroll 6
    for (int j = 0; j < kPatch; ++j) {
      F d[kPatch], points[kPatch];
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) d[i] = lines[i][j];
      to_points(d, points);
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) Isa::store(v + (i * kPatch + j) * stride + k, points[i]);
    }
  }
}

// A tile's products at m + point * stride, transformed back, with the bias added, to those of its
// pixels that lie in the image.
inline void transform_products(const Convolution& c, Place at, const float* m, int64_t stride) {
  const int rows = static_cast<int>(std::min<int64_t>(kTileSide, c.height - at.y)), columns = static_cast<int>(std::min<int64_t>(kTileSide, c.width - at.x));
  float* output = c.output + ((at.image * c.height + at.y) * c.width + at.x) * c.out_channels;
  for (int64_t k = 0; k < c.out_channels; k += Isa::kLanes) {
    F lines[kPatch][kTileSide];
#pragma GCC unroll 6
    for (int i = 0; i < kPatch; ++i) {
      F points[kPatch];
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) points[j] = Isa::load(m + (i * kPatch + j) * stride + k);
      from_points(points, lines[i]);
    }
    const F bias = c.bias ? Isa::load(c.bias + k) : Isa::set(0.0f);
#pragma GCC unroll 4
    for (int j = 0; j < kTileSide; ++j) {
      F d[kPatch], y[kTileSide];
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) d[i] = lines[i][j];
      from_points(d, y);
      if (j >= columns) continue;
#pragma GCC unroll 4
      for (int i = 0; i < kTileSide; ++i)
        if (i < rows) Isa::store(output + (i * c.width + j) * c.out_channels + k, Isa::add(y[i], bias));
    }
  }
}

constexpr int kPanel = kChannelGrain / Isa::kLanes;  // vectors that are a panel of the weights wide

// kRows rows of a (rows, depth) times kVectors vectors of columns of b, which lies in panels.
template <int kRows, int kVectors>
__attribute__((noinline)) void multiply(const float* a, const float* b, float* result, int64_t depth, int64_t columns) {
  const float* panels[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) panels[j] = b + (j / kPanel * depth * kPanel + j % kPanel) * Isa::kLanes;
  F sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Isa::set(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    F line[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) line[j] = Isa::load(panels[j] + k * kChannelGrain);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F x = Isa::set(a[i * depth + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Isa::fma(x, line[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) Isa::store(result + i * columns + j * Isa::kLanes, sums[i][j]);
  }
}

// All rows, a multiple of kRowGrain, times kVectors vectors of columns.
template <int kVectors>
void multiply_rows(const float* a, const float* b, float* result, int64_t rows, int64_t depth, int64_t columns) {
  constexpr int kMost = Isa::kAccumulators / kVectors;
  int64_t i = 0;
  for (; (rows - i) % kMost; i += kRowGrain) multiply<kRowGrain, kVectors>(a + i * depth, b, result + i * columns, depth, columns);
  for (; i < rows; i += kMost) multiply<kMost, kVectors>(a + i * depth, b, result + i * columns, depth, columns);
}

// result (rows, columns) = a (rows, depth) times b (depth, columns), which lies in panels of
// kChannelGrain columns, each (depth, kChannelGrain). Whole cache lines are read, one after the other:
// with few rows, a product waits for the weights to arrive from the third-level cache. With more, a
// vector that is as wide as a panel needs several panels, or it would wait for its own sums.
inline void matrix_product(const float* a, const float* b, float* result, int64_t rows, int64_t depth, int64_t columns) {
  constexpr int64_t kGrain = kChannelGrain;
  int64_t j = 0;
  if constexpr (kPanel == 1) {
    const int64_t shared = rows > kRowGrain ? columns : 0;
    for (; shared - j > 4 * kGrain || shared - j == 3 * kGrain; j += 3 * kGrain) multiply_rows<3>(a, b + j * depth, result + j, rows, depth, columns);
    for (; shared - j >= 2 * kGrain; j += 2 * kGrain) multiply_rows<2>(a, b + j * depth, result + j, rows, depth, columns);
  }
  for (; j < columns; j += kGrain) multiply_rows<kPanel>(a, b + j * depth, result + j, rows, depth, columns);
}

// The tiles [begin, end). `scratch`: scratch_floats(c) floats, at a multiple of 64 bytes.
void convolve(const Convolution& c, int64_t begin, int64_t end, float* scratch) {
  const int64_t most = tiles_in_block(c), v_stride = point_stride(c, c.in_channels), m_stride = point_stride(c, c.out_channels);
  float *v = scratch, *m = v + kPoints * v_stride, *zeros = m + kPoints * m_stride;
  std::fill_n(zeros, c.in_channels, 0.0f);
  for (; begin < end; begin += most) {
    // Rows past the last tile are multiplied, whatever they hold, and their results are not read.
    const int64_t tiles = std::min(most, end - begin), rows = (tiles + kRowGrain - 1) / kRowGrain * kRowGrain;
    for (int64_t i = 0; i < tiles; ++i) transform_patch(c, place_of(c, begin + i), zeros, v + i * c.in_channels, v_stride);
    for (int point = 0; point < kPoints; ++point)
      matrix_product(v + point * v_stride, c.weights + point * c.in_channels * c.out_channels, m + point * m_stride, rows, c.in_channels, c.out_channels);
    for (int64_t i = 0; i < tiles; ++i) transform_products(c, place_of(c, begin + i), m + i * c.out_channels, m_stride);
  }
}
